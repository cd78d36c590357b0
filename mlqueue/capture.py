"""Output of running jobs: what they print, and what they log, goes into their journals as well.

While a worker runs in this process, ``sys.stdout`` and ``sys.stderr`` are stand-ins that pass everything on, and what
loggers hand to their handlers is seen. Whose output it is the context says (`mlqueue.delivery.current_delivery`): that
of the job's thread and of its coroutines; a thread that the job starts has it when it runs in a copy of the context
(``contextvars.copy_context().run``). What programs and libraries in C write to the descriptors is not seen.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterable
from typing import Any, Final

from .delivery import Delivery, current_delivery
from .journal import Journal

__all__ = ["install", "uninstall"]

_lock = threading.Lock()
_users = 0
_local = threading.local()


def install() -> None:
    """Begins; `uninstall` is called as often."""
    global _users
    with _lock:
        _users += 1
        if _users == 1:
            sys.stdout = _Tee.before(sys.stdout, "o")
            sys.stderr = _Tee.before(sys.stderr, "e")
            # Not a handler of the root logger: a host's basicConfig() would find it there and do nothing, and with no
            # handler at all warnings would not be shown any more.
            logging.Logger.callHandlers = _call_handlers  # type: ignore[method-assign, assignment]


def uninstall() -> None:
    """Ends. What was put in the place of ours meanwhile stays."""
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            if isinstance(sys.stdout, _Tee):
                sys.stdout = sys.stdout.stream
            if isinstance(sys.stderr, _Tee):
                sys.stderr = sys.stderr.stream
            if logging.Logger.callHandlers is _call_handlers:
                logging.Logger.callHandlers = _plain_call_handlers  # type: ignore[method-assign]


def _journal() -> Journal | None:
    """The journal of the job whose code this is; None where there is no job, or its log is not kept."""
    delivery: Delivery | None = current_delivery.get()
    if delivery is None or delivery.process != os.getpid():
        return None  # in a process that a job has forked nobody would send it, and locks may be held for ever
    journal: Journal = delivery.journal or delivery.broker.journals.open(delivery)
    return journal if journal.keeps_log else None


class _Tee:
    """Stands for a stream of text: what is written to it goes on, and into the journal of the job that writes."""

    def __init__(self, stream: Any, kind: str) -> None:
        self.stream = stream
        self._kind = kind

    @classmethod
    def before(cls, stream: Any, kind: str) -> Any:
        """One that stands for a stream; None for a program that has none."""
        return None if stream is None else cls(stream, kind)

    def write(self, text: str) -> int:
        """Writes the text."""
        written: int = self.stream.write(text)
        # What handlers of loggers write has been seen already.
        if not getattr(_local, "logging", False):
            journal = _journal()
            if journal is not None:
                journal.write(self._kind, text)
        return written

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes the lines."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Handler(logging.Handler):
    """Adds what is logged to the journal of the job that logs it."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Adds a record."""
        journal = _journal()
        if journal is not None:
            try:
                plain = not (record.exc_info or record.exc_text or record.stack_info)
                # What the formatter would make of it, without its detours: there may be thousands a second.
                text = f"{record.name}: {record.getMessage()}" if plain else self.format(record)
                journal.log(record.levelname, text)
            except Exception:  # noqa: BLE001 - as other handlers: a wrong argument of a log call is no error in the job
                self.handleError(record)


_handler: Final = _Handler()
_plain_call_handlers: Final = logging.Logger.callHandlers


def _call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
    """Stands for `logging.Logger.callHandlers`."""
    outer = getattr(_local, "logging", False)
    if current_delivery.get() is None or outer:
        _plain_call_handlers(logger, record)
        return
    _local.logging = True
    try:
        _handler.emit(record)  # not `handle`, whose lock all threads would share
        _plain_call_handlers(logger, record)
    finally:
        _local.logging = False
