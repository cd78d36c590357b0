"""Writing the progress of running jobs: the first report at once, later ones gathered, the last with the job's end."""

from __future__ import annotations

import logging
import threading
import time
from typing import Final

from . import codec
from .delivery import Delivery
from .errors import StoreError
from .store import Store

#: How long reports are gathered after some were written, in seconds.
GATHER: Final = 0.05

#: The longest text that is kept of a value or a note, in characters.
MAX_TEXT: Final = 1000

logger = logging.getLogger("mlqueue.progress")


class ProgressWriter:
    """Writes progress for the jobs of one process. What it writes is never an error in the job."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._dirty: dict[str, tuple[Delivery, bytes, str]] = {}
        self._writing: dict[str, tuple[Delivery, bytes, str]] = {}
        self._seen: set[tuple[str, int]] = set()
        self._work = threading.Event()
        self._written_at = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def report(self, delivery: Delivery, value: object, note: str | None) -> None:
        """Notes the progress of a job. Numbers stay numbers, anything else becomes text."""
        encoded = codec.encode(plain_value(value))
        text = "" if note is None else str(note)[:MAX_TEXT].encode("utf-8", "replace").decode()
        key = (delivery.held.id, delivery.held.attempt)
        with self._lock:
            first = key not in self._seen
            self._seen.add(key)
            if not first:
                self._dirty[delivery.held.id] = (delivery, encoded, text)
                self._ensure_thread()
        if first:
            self._write([(delivery, encoded, text)])
        else:
            self._work.set()

    def take(self, delivery: Delivery) -> tuple[bytes, str] | None:
        """The report of a job that has not been written yet: its end takes it along."""
        if not self._seen:
            return None
        with self._lock:
            self._seen.discard((delivery.held.id, delivery.held.attempt))
            # One that is being written may come too late: the end takes it along too.
            pending = self._dirty.pop(delivery.held.id, None) or self._writing.get(delivery.held.id)
        return None if pending is None else (pending[1], pending[2])

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._work.set()

    def _ensure_thread(self) -> None:
        if self._closed or self._thread is None or not self._thread.is_alive():
            self._closed = False
            thread = threading.Thread(target=self._run, name="mlqueue-progress", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread can be started now; the end takes the last report along
                logger.warning("progress waits to be written: %s", error)
            else:
                self._thread = thread

    def _run(self) -> None:
        while not self._closed:
            self._work.wait()
            self._work.clear()
            # Wait for more reports, not for an event: this is the gathering. After a pause a report goes out at once.
            threading.Event().wait(max(0.0, self._written_at + GATHER - time.monotonic()))
            with self._lock:
                self._writing, self._dirty = self._dirty, {}
            if self._writing:
                self._write(list(self._writing.values()))
            with self._lock:
                self._writing = {}

    def _write(self, batch: list[tuple[Delivery, bytes, str]]) -> None:
        self._written_at = time.monotonic()
        items = [(delivery.held.id, delivery.held.attempt, value, note) for delivery, value, note in batch]
        try:
            answers = self._store.touch(items)
        except StoreError as error:
            logger.warning("progress of %d jobs was not written: %s", len(batch), error)
            return
        for (delivery, _, _), answer in zip(batch, answers, strict=True):
            if answer == 0:
                logger.warning(
                    "attempt %d of job %s was taken over by a later one; its progress is dropped",
                    delivery.held.attempt,
                    delivery.held.id,
                )
            elif answer == 2:
                delivery.cancel()


def plain_value(value: object) -> int | float | str | None:
    """What is kept of a progress value: a number as it is, anything else as text of at most 1,000 characters."""
    if isinstance(value, bool):
        return int(value)
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return float(value)
    item = getattr(value, "item", None)
    if callable(item) and getattr(value, "ndim", None) == 0:
        return plain_value(item())  # a NumPy scalar
    return str(value)[:MAX_TEXT].encode("utf-8", "replace").decode()
