"""`Dashboard`: a dashboard where it is registered, and what it has read of the store lately."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

from ...overview import Now
from ..mount import Mount

T = TypeVar("T")

#: How long what was read of the store is shown to others too, in seconds: many who look cost as much as one.
FRESH: Final = 1.0


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dashboard(Mount):
    """What the pages of one registered dashboard work with."""

    #: Whether nothing can be changed by it.
    read_only: bool
    #: The scope that shows arguments and results.
    values_scope: str
    #: How the namespace stands.
    now: Recent[Now]
    #: Overviews as they were made, each with what it shows; see `overview`.
    made: dict[Any, tuple[Now, bytes]] = dataclasses.field(default_factory=dict)


__all__ = ["Dashboard", "Recent"]
