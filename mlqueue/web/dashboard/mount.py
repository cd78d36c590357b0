"""`Dashboard`: a dashboard where it is registered, and what it has read and made lately."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Hashable
from typing import Final, Generic, TypeVar

from ...overview import Now
from ..mount import Mount

T = TypeVar("T")

#: How long what was read of the store, and a page that was made of it, is shown to others too, in seconds: many who
#: look cost as much as one.
FRESH: Final = 1.0

#: How many pages are kept that long.
MOST_PAGES: Final = 50

#: Which part of a processor may go into making pages for those who follow them, in each process: 1/20 of a machine with
#: two.
SHARE: Final = 0.1


class Recent(Generic[T]):
    """A value that is read anew when it is older than `FRESH`, by one thread for all."""

    def __init__(self, read: Callable[[], T], fresh: float = FRESH) -> None:
        self._read = read
        self._fresh = fresh
        self._lock = threading.Lock()
        self._value: T | None = None
        self._read_at = float("-inf")

    def __call__(self) -> T:
        with self._lock:
            if self._value is None or time.monotonic() > self._read_at + self._fresh:
                self._value = self._read()
                self._read_at = time.monotonic()
            return self._value

    def forget(self) -> None:
        """Has it read anew: something was changed."""
        self._read_at = float("-inf")


class Pages:
    """Pages as they were made a moment ago, by what they depend on; and how often they may be made for those who
    follow them, so that these slow nobody else down."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._made: dict[Hashable, tuple[float, bytes]] = {}
        self._next_at = 0.0

    def recent(self, key: Hashable) -> bytes | None:
        """The page, if it was made a moment ago."""
        with self._lock:
            made = self._made.get(key)
        return made[1] if made is not None and time.monotonic() <= made[0] + FRESH else None

    def keep(self, key: Hashable, page: bytes, took: float) -> None:
        """Keeps a page that was made in `took` seconds."""
        with self._lock:
            now = time.monotonic()
            if len(self._made) >= MOST_PAGES:
                self._made = {one: made for one, made in self._made.items() if now <= made[0] + FRESH}
            if len(self._made) < MOST_PAGES:
                self._made[key] = now, page
            self._next_at = max(self._next_at, now) + took * (1 / SHARE - 1)

    @property
    def wait(self) -> float:
        """After how many seconds the next page may be made for those who follow one."""
        return max(0.0, self._next_at - time.monotonic())

    def forget(self) -> None:
        """Has them made anew: something was changed."""
        with self._lock:
            self._made.clear()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dashboard(Mount):
    """What the pages of one registered dashboard work with."""

    #: Whether nothing can be changed by it.
    read_only: bool
    #: The scope that shows arguments and results.
    values_scope: str
    #: How the namespace stands.
    now: Recent[Now]
    #: What was made of it.
    pages: Pages = dataclasses.field(default_factory=Pages)

    def forget(self) -> None:
        """Has all of it read and made anew: something was changed."""
        self.now.forget()
        self.pages.forget()


__all__ = ["FRESH", "Dashboard", "Pages", "Recent"]
