"""Keeping a process after its main program has ended, until what works in it has been stopped.

At the end of the main program Python waits for threads that are no daemons, but before that it forbids thread and
process pools to take work; jobs that ran then would fail with "cannot schedule new futures after interpreter shutdown".
So the main thread is held earlier, by ``threading._register_atexit``, as the pools register their own ends.

A signal (SIGTERM, Ctrl-C) is the order to stop. Its handlers are set from the main thread only, and only over those
that nobody has changed. While the main program still runs `Stopped` is raised in it, so that it ends; where it waits
for the end already, the signal only begins that.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import queue
import signal
import sys
import threading
import time
from typing import Any, Final, Protocol

from .processes import in_forks

__all__ = ["Resident", "Stopped", "leave", "stay", "wait"]

logger = logging.getLogger("mlqueue.listener")

#: The signals that stop a process, and the handler that each has when nobody has set another.
SIGNALS: Final[dict[signal.Signals, Any]] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

#: A second signal within so many seconds is the first one's echo: a terminal and a process manager both send one.
ECHO: Final = 0.25

#: How often the main thread looks up while it waits, in seconds. A signal that comes in the moment before it sleeps
#: does not wake it, and the handler runs in the main thread only.
LOOK_INTERVAL: Final = 0.5

#: Pools register their ends when they are imported. Those that came behind ours would be closed before it.
POOLS: Final = ("concurrent.futures.thread", "concurrent.futures.process")

#: Python 3.12 forbids new threads and processes as soon as the main program has ended.
FORBIDS_THREADS: Final = sys.version_info[:2] == (3, 12)


class Stopped(SystemExit, KeyboardInterrupt):
    """Raised in the main program by a signal. ``except KeyboardInterrupt`` catches it; if nobody does the process ends,
    with exit code 0, as soon as the job in hand has ended."""


class Resident(Protocol):
    """What the process outlives its main program for."""

    #: Set when it has ended.
    ended: threading.Event

    def stop_soon(self) -> None:
        """Begins its end, for a signal. Called in the handler: it must take no lock."""

    def give_up(self) -> None:
        """Ends it at once, for a second signal."""


_lock = threading.Lock()
#: Replaced as a whole: a signal's handler looks without the lock.
_residents: tuple[Resident, ...] = ()
_armed = False
#: Whether the main thread waits for their end.
_waiting = 0
_wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
_signalled_at: float | None = None
_impatient = False


def stay(resident: Resident) -> None:
    """From now on the process outlives its main program, until `resident` has ended."""
    global _armed, _residents, _signalled_at, _impatient
    with _lock:
        if not _residents:
            _signalled_at, _impatient = None, False
        _residents = (*_residents, resident)
        if not _armed:
            _armed = True
            _arm()
    _take_signals()


def leave(resident: Resident) -> None:
    """It has ended."""
    global _residents
    with _lock:
        _residents = tuple(one for one in _residents if one is not resident)
    _wakes.put(None)


def wait(resident: Resident, timeout: float | None = None) -> bool:
    """Waits until it has ended; False when `timeout` seconds pass first. Meanwhile a signal begins the end."""
    if threading.current_thread() is not threading.main_thread():
        return resident.ended.wait(timeout)
    global _waiting
    deadline = None if timeout is None else time.monotonic() + timeout
    _waiting += 1
    try:
        _take_signals()
        while not resident.ended.is_set():
            if _impatient:
                resident.give_up()
                continue
            left = LOOK_INTERVAL if deadline is None else min(LOOK_INTERVAL, deadline - time.monotonic())
            if left < 0:
                return resident.ended.is_set()
            with contextlib.suppress(queue.Empty):
                _wakes.get(timeout=left)
        return True
    finally:
        _waiting -= 1


def _arm() -> None:
    for name in POOLS:
        with contextlib.suppress(ImportError):  # a platform without semaphores has no process pool
            importlib.import_module(name)
    in_forks(_forget, SIGNALS)
    if FORBIDS_THREADS:
        _hold_at_return()
    register = getattr(threading, "_register_atexit", None)
    if register is None:
        threading.Thread(target=_outlast, name="mlqueue-outliving").start()
        return
    try:
        register(_hold)
    except RuntimeError as error:
        logger.warning("the main program has ended already, so this process may end before the listener: %s", error)


def _hold_at_return() -> None:
    """Holds the main thread when the outermost function of the main program returns. One that is left by an exception,
    as by ``sys.exit()``, is held by `_hold` only."""
    monitoring: Any = sys.monitoring  # type: ignore[attr-defined]
    tool = next((number for number in (4, 3) if monitoring.get_tool(number) is None), None)
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if tool is None or frame is None or _is_interactive():  # there each line typed is a main program
        return
    while frame.f_back is not None:
        frame = frame.f_back
    monitoring.use_tool_id(tool, "mlqueue")
    monitoring.register_callback(tool, monitoring.events.PY_RETURN, lambda *_: _after_main(forbids=""))
    monitoring.set_local_events(tool, frame.f_code, monitoring.events.PY_RETURN)


def _hold() -> None:
    """The main program has ended: what a registered end does, before all others."""
    _after_main(forbids="new threads and processes" if FORBIDS_THREADS else "")


def _outlast() -> None:
    """The same for a Python without ``_register_atexit``, in a thread that it waits for."""
    threading.main_thread().join()
    _after_main(forbids="work for thread pools")


def _after_main(forbids: str) -> None:
    global _waiting
    _waiting += 1  # first of all: there is no main program any more that a signal could end
    try:
        _outlive(forbids)
    finally:
        _waiting -= 1


def _outlive(forbids: str) -> None:
    last = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)
    if isinstance(last, KeyboardInterrupt) and not _is_interactive():
        for resident in _residents:
            resident.stop_soon()
    elif _residents and forbids:
        logger.warning(
            "the main program has ended, and the listener goes on; but then Python %d.%d forbids %s, and jobs that "
            "need them fail. End the program with mlq.join().",
            *sys.version_info[:2],
            forbids,
        )
    while residents := _residents:
        try:
            wait(residents[0])
        except BaseException as error:  # noqa: BLE001 - the handler of somebody else's for a signal
            logger.info("%s: the listener stops", type(error).__name__)
            for resident in residents:
                resident.stop_soon()


def _take_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for signum, default in SIGNALS.items():
        if signal.getsignal(signum) == default:
            with contextlib.suppress(ValueError):  # the main thread of a subinterpreter
                signal.signal(signum, _on_signal)


def _on_signal(signum: int, frame: Any) -> None:
    global _signalled_at, _impatient
    outlived = bool(_waiting) or not threading.main_thread().is_alive()
    residents = _residents
    if not residents or (signum == signal.SIGINT and _is_interactive() and not outlived):
        _by_default(signum, frame)
        return
    now = time.monotonic()
    first, echo = _signalled_at is None, _signalled_at is not None and now <= _signalled_at + ECHO
    if first:
        _signalled_at = now
        for resident in residents:
            resident.stop_soon()
    elif not echo:
        _impatient = True
        _wakes.put(None)
    if not outlived and not echo:
        raise Stopped(0)


def _by_default(signum: int, frame: Any) -> None:
    """What would have happened without us."""
    if signum == signal.SIGINT:
        signal.default_int_handler(signum, frame)
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)


def _is_interactive() -> bool:
    """Whether a person types the program: Ctrl-C interrupts what was typed last, and ends nothing."""
    return hasattr(sys, "ps1") or bool(sys.flags.interactive)


def _forget() -> None:
    """In a forked child nothing of ours runs, and the handlers are not meant for it: multiprocessing's terminate() must
    end it."""
    global _lock, _residents, _waiting, _wakes
    _lock, _residents, _waiting, _wakes = threading.Lock(), (), 0, queue.SimpleQueue()
    for signum, default in SIGNALS.items():
        if signal.getsignal(signum) is _on_signal:
            signal.signal(signum, default)
