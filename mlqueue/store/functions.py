"""The posted functions of a namespace as the store keeps them. What they are is the business of `mlqueue.functions`."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgpack

from ..errors import StoreFull
from .records import flat
from .scripts import script
from .store import Store

__all__ = ["FunctionStore", "ListedFunction", "StoredFunction"]

#: How many functions a namespace may have. Of ten times as many names the serials are kept.
MOST: Final = 1000


class StoredFunction(NamedTuple):
    """A function with its signature."""

    name: str
    serial: int
    #: When it was signed, in Unix seconds.
    time: int
    code: bytes
    signature: bytes


class ListedFunction(NamedTuple):
    """A function without its code."""

    name: str
    serial: int
    time: int
    posted_ms: int
    size: int
    #: Why a worker could not load it; None when none has said so.
    error: str | None


class FunctionStore:
    """What can be done with them: one call of the store each."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._root = store.root

    def put(self, item: StoredFunction, nonce: str) -> int:
        """Keeps a function in place of the one of its name, and tells all workers: 0, or the newest serial of the name
        when that is not below its own. The same nonce makes it one call, sent twice."""
        answer = self._run("put_function", item.name, item.serial, item.time, item.code, item.signature, nonce, MOST)
        if answer == b"full":
            raise StoreFull(
                f"{MOST:,} functions have been posted to {self._store.namespace!r}, or {10 * MOST:,} have been "
                "removed; there is room for no more. `mlqueue functions remove` makes some."
            )
        return int(answer)

    def drop(self, name: str) -> bool:
        """Forgets a function but its serial, and tells all workers; False when there is none of this name."""
        return bool(self._run("drop_function", name))

    def list(self) -> list[ListedFunction]:
        """The functions, in the order of their posting."""
        listed = []
        for name, serial, moment, posted, size, error in self._run("functions"):
            told = msgpack.unpackb(error, raw=True)[1].decode(errors="replace") if error else None
            listed.append(ListedFunction(name.decode(), int(serial), int(moment), int(posted), int(size), told))
        return listed

    def version(self) -> int:
        """A number that changes with every change of a function."""
        return int(self._execute("GET", f"{self._root}:pfv") or 0)

    def serial(self, name: str) -> int:
        """The newest serial that a name has had, removed ones included; 0 for a name that is new."""
        return int(self._execute("HGET", f"{self._root}:pfs", name) or 0)

    def serials(self) -> dict[str, int]:
        """The same of all names."""
        found = flat(self._execute("HGETALL", f"{self._root}:pfs"))
        return {name.decode(errors="replace"): int(serial) for name, serial in found.items()}

    def names(self) -> set[str]:
        """The names of the functions that are there."""
        return {name.decode(errors="replace") for name in self._execute("HKEYS", f"{self._root}:pf")}

    def get(self, name: str) -> tuple[int, StoredFunction] | None:
        """A function and its place among the others; None when there is none of this name. What it says is not to be
        believed before its signature is verified."""
        data = self._execute("HGET", f"{self._root}:pf", name)
        if data is None:
            return None
        try:
            place, serial, moment, _, code, signature, _ = msgpack.unpackb(data, raw=True)
            return int(place), StoredFunction(name, int(serial), int(moment), bytes(code), bytes(signature))
        except (ValueError, TypeError, msgpack.UnpackException):
            return 0, StoredFunction(name, 0, 0, b"", b"")  # which nobody has signed

    def note_error(self, name: str, serial: int, error: str, worker: str) -> None:
        """Notes why a worker could not load a function."""
        self._run("note_function", name, serial, error, worker)

    def _run(self, name: str, *args: Any) -> Any:
        return self._store.connector.run(script(name), self._root, *args)

    def _execute(self, *command: Any) -> Any:
        return self._store.connector.execute(*command)
