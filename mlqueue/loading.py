"""Posted functions in a worker: fetched when they change, verified, and only then unpickled.

A thread does it, so that an import that takes long holds up no job. It is there only where a signing key is set; it is
told of changes over the worker's bell, and looks at their number every now and then, lest it has missed one.

What cannot be verified or loaded becomes an error on the function's record, and a function that raises it: the jobs
that name it fail with that. Those that name no function go on without it.
"""

from __future__ import annotations

import logging
import pickle
import platform
import threading
from collections.abc import Callable
from typing import Any, Final, NamedTuple

from .errors import MLQueueError, SignatureInvalid, StoreError
from .functions import Function, check_listener, keyring, verify
from .signing import Keyring
from .store import Store
from .store.functions import FunctionStore, StoredFunction

__all__ = ["LoadedFunctions"]

#: How often in a lease the number of changes is looked at.
LOOKS_PER_LEASE: Final = 3

#: How long a worker waits at its start for the functions to be loaded, in seconds, before it takes jobs without them.
LOAD_PATIENCE: Final = 30.0

#: How long `LoadedFunctions.stop` waits for a function that is being loaded, in seconds.
STOP_PATIENCE: Final = 2.0

logger = logging.getLogger("mlqueue.functions")


class Loaded(NamedTuple):
    """A posted function, as this process has it."""

    place: int
    serial: int
    function: Function
    #: Whether it is what was posted, rather than a function that raises why it could not be loaded.
    usable: bool


class LoadedFunctions:
    """The posted functions of a namespace in this process.

    Parameters:
      store: Theirs.
      changed: Called, in a thread of its own, when there are others than before.
    """

    def __init__(self, store: Store, changed: Callable[[], None]) -> None:
        self._store = store
        self._kept = FunctionStore(store)
        self._changed = changed
        #: By name. Replaced as a whole.
        self._loaded: dict[str, Loaded] = {}
        #: The highest serial that this process has seen of each name: one below is sent again by somebody.
        self._seen: dict[str, int] = {}
        self._version = -1
        #: Notified when the version has been taken in.
        self._taken = threading.Condition()
        self._worker = ""
        self._look = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._patience: threading.Timer | None = None
        #: Whether they have been loaded, or have taken too long for the jobs to wait.
        self.ready = True

    @property
    def enabled(self) -> bool:
        """Whether posted functions are taken here at all."""
        return bool(self._store.settings.signing_keys)

    def start(self, worker: str) -> None:
        """Begins to load them, for a worker of this incarnation."""
        if not self.enabled or (self._thread is not None and self._thread.is_alive()):
            return
        self._worker, self.ready, self._version = worker, False, -1
        self._stopping.clear()
        self._look.set()
        self._patience = threading.Timer(LOAD_PATIENCE, self._open)
        self._patience.name, self._patience.daemon = "mlqueue-functions-patience", True
        self._patience.start()
        self._thread = threading.Thread(target=self._run, name="mlqueue-functions", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping.set()
        self._look.set()
        with self._taken:
            self._taken.notify_all()
        if self._patience is not None:
            self._patience.cancel()
        thread.join(STOP_PATIENCE)

    def look(self) -> None:
        """There may be others now. Returns at once."""
        self._look.set()

    def catch_up(self) -> None:
        """Waits until this process has what was posted, and no longer has what was removed, before the call: a job that
        is posted after a function was replaced must not run the old one. One that takes longer than `LOAD_PATIENCE` to
        load is not waited for. Raises `StoreUnavailable`."""
        if self._thread is None:
            return
        version = self._kept.version()
        if version == self._version:
            return
        self._look.set()
        with self._taken:
            self._taken.wait_for(lambda: self._version >= version or self._stopping.is_set(), LOAD_PATIENCE)

    def named(self) -> dict[str, Function]:
        """By name, in the order of their posting, those that raise included."""
        return {name: one.function for name, one in self._in_order()}

    def usable(self) -> dict[str, Function]:
        """Those of them that were loaded."""
        return {name: one.function for name, one in self._in_order() if one.usable}

    def _in_order(self) -> list[tuple[str, Loaded]]:
        return sorted(self._loaded.items(), key=lambda item: item[1].place)

    def _open(self) -> None:
        if not self.ready:
            self.ready = True
            logger.warning("posted functions take longer than %g s to load; jobs go on without them", LOAD_PATIENCE)
            self._changed()

    def _run(self) -> None:
        interval = self._store.settings.lease / LOOKS_PER_LEASE
        stopping = self._stopping
        while not stopping.is_set():
            self._look.wait(interval)
            self._look.clear()
            if stopping.is_set():
                return
            try:
                self._update()
            except StoreError as error:
                logger.warning("posted functions cannot be looked at now: %s", error)
            except Exception:
                logger.exception("posted functions cannot be looked at")

    def _update(self) -> None:
        # Before the rest: a change in between is found at the next look.
        version = self._kept.version()
        if version == self._version:
            return
        before, was_ready = self._loaded, self.ready
        self._loaded = self._fetch()
        with self._taken:
            self._version, self.ready = version, True
            self._taken.notify_all()
        if self._patience is not None:
            self._patience.cancel()
        if self._loaded != before or not was_ready:
            self._changed()

    def _fetch(self) -> dict[str, Loaded]:
        serials, ring = self._kept.serials(), keyring(self._store.settings)
        loaded: dict[str, Loaded] = {}
        present = self._kept.names()
        for name, serial in serials.items():
            if name not in present:
                # Removed: what was signed before that is not taken again.
                self._seen[name] = max(self._seen.get(name, 0), serial)
        for name in present:
            have = self._loaded.get(name)
            if have is not None and have.serial == serials.get(name):
                loaded[name] = have
            elif (got := self._kept.get(name)) is not None:
                loaded[name] = self._load(ring, *got, newest=serials.get(name, 0))
        return loaded

    def _load(self, ring: Keyring, place: int, item: StoredFunction, newest: int) -> Loaded:
        try:
            self._check(ring, item, newest)
            self._seen[item.name] = item.serial
            function = _unpickle(item)
        except BaseException as error:  # noqa: BLE001 - what is unpickled may raise anything, and ends no worker
            text = _describe(error)
            logger.error("the posted function %r cannot be loaded: %s", item.name, text)
            try:
                self._kept.note_error(item.name, item.serial, text, self._worker)
            except StoreError as failure:
                logger.warning("that could not be noted: %s", failure)
            return Loaded(place, item.serial, _raising(item.name, text), False)
        logger.info("the posted function %r is loaded (serial %d)", item.name, item.serial)
        return Loaded(place, item.serial, function, True)

    def _check(self, ring: Keyring, item: StoredFunction, newest: int) -> None:
        """Raises `SignatureInvalid` for what is not to be unpickled."""
        verify(ring, self._store.namespace, item)
        seen = max(self._seen.get(item.name, 0), newest)
        if item.serial < seen:
            raise SignatureInvalid(
                f"it has the serial {item.serial}, and {seen} was there before: somebody has put an old one back"
            )


def _unpickle(item: StoredFunction) -> Function:
    """The function. Its signature has been verified: nothing else in this project may call this."""
    function: Function = pickle.loads(item.code)  # noqa: S301
    check_listener(function, item.name)
    return function


def _describe(error: BaseException) -> str:
    if isinstance(error, MLQueueError):
        return error.message
    try:
        text = f"{type(error).__name__}: {error}"
    except Exception:  # noqa: BLE001 - a __str__ may do anything
        text = type(error).__name__
    return f"{text[:2000]} (it was unpickled by Python {platform.python_version()}, which should be who signed it has)"


def _raising(name: str, text: str) -> Function:
    def refuse(*args: Any) -> None:
        raise MLQueueError(f"the posted function {name!r} could not be loaded by this worker: {text}")

    return refuse
