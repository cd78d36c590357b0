"""What running jobs show of themselves, on its way to the store: lines of their logs, metrics, what they use.

It is gathered by time, so that a job that prints a million lines makes four calls of the store a second, and written at
the latest before the end of its job is: the pump has it written before it settles.
"""

from __future__ import annotations

import collections
import itertools
import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Collection, Mapping
from typing import Any, Final

from .delivery import Delivery
from .errors import StoreError, StoreUnavailable
from .store import Store
from .store.shown import Series, Showing

#: How long is gathered after something was written, in seconds. So much a process that is killed takes with it.
GATHER: Final = 0.25

#: How long nothing is written after the store would not take it, in seconds.
PAUSE: Final = 1.0

#: How long the thread stays when there is nothing to write, in seconds.
LINGER: Final = 1.0

#: The longest line that is kept, in characters.
MAX_LINE: Final = 8192

#: Of so many parts a line is put together, in any case.
MOST_PARTS: Final = 100

#: How many bytes of the log a line has beside its text, about.
AROUND: Final = 20

#: How many metrics a job has at most.
MOST_METRICS: Final = 100

#: How many bytes of one job go with a call.
PART: Final = 2**20

logger = logging.getLogger("mlqueue.journal")


class Journal:
    """What one attempt has shown and the store does not have yet. Any thread may add to it.

    Of lines it holds as many bytes as the store keeps: what it drops would be dropped there.

    Parameters:
      log_bytes: How much is kept of its log; 0 for nothing.
      points: How many points of each metric.
    """

    def __init__(self, writer: JournalWriter, delivery: Delivery, log_bytes: int, points: int) -> None:
        self.writer = writer
        self._held = delivery.held
        self._process = delivery.process
        # It has this journal: in a circle of references each job would wait for the garbage collector.
        self._delivery = weakref.ref(delivery)
        #: Whether its log is kept.
        self.keeps_log = log_bytes > 0
        self._log_bytes = log_bytes
        self._most_points = points
        # What is printed by a destructor may come in the middle of anything, in this thread.
        self._lock = threading.RLock()
        #: Time, stream or level, and text of each line; packed when they are sent.
        self._lines: collections.deque[tuple[int, str, str]] = collections.deque()
        self._size = 0
        self._first = 0
        self._sent = 0
        #: By stream the parts of the line that has not ended.
        self._partial: dict[str, list[str]] = {}
        self._series: dict[str, Series] | None = None
        #: The metrics that this attempt has logged.
        self._own: set[str] = set()
        self._logged_at = 0.0
        self._usage = b""
        self._usage_sent = b""
        self._in_flight = self._is_dirty = self._closed = False

    # What the job shows

    def write(self, kind: str, text: str) -> None:
        """Adds what was written to ``o`` (stdout) or ``e`` (stderr). Of a line that goes back to its beginning, as
        progress bars do, the last state is kept."""
        with self._lock:
            parts = self._partial.setdefault(kind, [])
            parts.append(text)
            if "\n" in text:
                *lines, rest = "".join(parts).split("\n")
                for line in lines:
                    self._add(kind, _last_state(line.rstrip("\r")))
                parts[:] = [_begun(rest)] if rest else []
            elif len(parts) >= MOST_PARTS or len(text) > MAX_LINE:
                parts[:] = [_begun("".join(parts))]

    def log(self, level: str, text: str) -> None:
        """Adds a message that was logged."""
        with self._lock:
            self._add(level, text)

    def _add(self, kind: str, text: str) -> None:
        if self._closed:
            return
        self._lines.append((time.time_ns() // 1_000_000, kind, text if len(text) <= MAX_LINE else text[:MAX_LINE]))
        self._size += AROUND + len(self._lines[-1][2])
        while self._size > self._log_bytes and len(self._lines) > 1:
            self._forget_line()
        self._touched()

    def _forget_line(self) -> None:
        self._size -= AROUND + len(self._lines.popleft()[2])
        self._first += 1

    def log_metrics(self, step: float, values: Mapping[str, float]) -> None:
        """Adds values of metrics. Raises `ValueError` for one metric too many."""
        if os.getpid() != self._process:
            return  # a process that the job has forked: nobody would send it, and the lock may be held for ever
        with self._lock:
            if self._series is None:
                self._series = self._load()
            new = [name for name in values if name not in self._series]
            if len(self._series) + len(new) > MOST_METRICS:
                raise ValueError(f"{new[0]!r} is one metric too many: a job has at most {MOST_METRICS}")
            if self._closed:
                return
            # Later than any other, so that who follows knows by the time what is new.
            self._logged_at = max(time.time(), math.nextafter(self._logged_at, math.inf))
            for name, value in values.items():
                series = self._series.setdefault(name, Series(self._most_points))
                if name not in self._own:
                    self._own.add(name)
                    series.restart(step)
                series.add(step, value, self._logged_at)
            self._touched()

    def _load(self) -> dict[str, Series]:
        """The metrics that earlier attempts have logged."""
        held = self._held
        if held.attempt == 1:
            return {}
        try:
            stored = self.writer.store.stored_metrics(held.id)
        except StoreError as error:
            logger.warning("the metrics of earlier attempts of job %s are lost: %s", held.id, error)
            return {}
        found = {name: Series(self._most_points, data) for name, data in stored.items()}
        self._logged_at = max((series.newest for series in found.values()), default=0.0)
        return found

    def note_usage(self, packed: bytes) -> None:
        """Notes what the attempt has used so far."""
        with self._lock:
            self._usage = packed
            self._touched()

    def _touched(self) -> None:
        if not self._is_dirty and not self._closed:
            self._is_dirty = True
            self.writer.add(self)

    # The writer's side

    def end(self) -> bool:
        """The attempt has ended, and shows nothing more. Whether there is something to be written before its end is."""
        with self._lock:
            for kind, parts in self._partial.items():
                rest = _begun("".join(parts)).strip("\r") if parts else ""
                if rest:
                    self._add(kind, rest)
            self._partial.clear()
            self._closed = True
            self.writer.forget(self)  # what is left goes with the end
            return self._in_flight or self._has_more()

    def _has_more(self) -> bool:
        return (
            bool(self._lines)
            or self._usage != self._usage_sent
            or (self._series is not None and not all(one.is_written for one in self._series.values()))
        )

    def send(self) -> Showing | None:
        """What is to be written next, and is on its way from now on; None when there is nothing. `answered` says what
        became of it."""
        with self._lock:
            self._is_dirty = False
            if not self._has_more():
                return None
            lines = list(self._lines)
            if self._size > PART:
                sizes = itertools.accumulate(AROUND + len(line[2]) for line in lines)
                lines = lines[: sum(1 for _ in itertools.takewhile(lambda size: size <= PART, sizes)) + 1]
            metrics = {}
            for name, series in (self._series or {}).items():
                if not series.is_written:
                    metrics[name] = series.to_write()
                    series.written(well=True)
            usage = self._usage if self._usage != self._usage_sent else b""
            self._sent, self._in_flight = self._first + len(lines), True
            return Showing(self._held.id, self._held.attempt, self._first, lines, metrics, usage)

    def answered(self, showing: Showing, answer: int | str | None) -> bool:
        """What `send` gave was answered so by the store; None when it was not answered. Whether there is more."""
        with self._lock:
            self._in_flight = False
            if answer in (1, 2):
                if self._first + len(self._lines) == self._sent:
                    self._forget_lines()
                while self._lines and self._first < self._sent:
                    self._forget_line()
                self._usage_sent = showing.usage or self._usage_sent
            elif answer == 0:
                self._refused()
            else:
                # Of a series whose end is not known the whole is written the next time.
                for name in showing.metrics:
                    (self._series or {})[name].written(well=False)
                if answer is not None:
                    logger.warning("what job %s shows of itself was not written: %s", showing.id, answer)
                    self._drop()
            more = self._has_more()
            if answer is None or more:
                self._touched()
        if answer == 2 and (delivery := self._delivery()) is not None:
            delivery.cancel()
        return more

    def _refused(self) -> None:
        if not self._closed:
            logger.warning(
                "attempt %d of job %s was taken over by a later one; its log and metrics are dropped",
                self._held.attempt,
                self._held.id,
            )
        self._closed = True
        self._drop()

    def _forget_lines(self) -> None:
        self._first += len(self._lines)
        self._lines.clear()
        self._size = 0

    def _drop(self) -> None:
        self._forget_lines()
        self._usage = self._usage_sent
        if self._closed:
            for series in (self._series or {}).values():
                series.written(well=True)


def _last_state(line: str) -> str:
    """What stands there of a line that went back to its beginning."""
    return line.rpartition("\r")[2] if "\r" in line else line


def _begun(line: str) -> str:
    """The beginning of a line, as far as it is needed when it goes on."""
    if "\r" in line:
        line = _last_state(line.rstrip("\r")) + ("\r" if line.endswith("\r") else "")
    return line[:MAX_LINE]


class JournalWriter:
    """Writes the journals of the jobs of one process. What it cannot write is no error in a job."""

    def __init__(self, store: Store) -> None:
        self.store = store
        # As that of a journal.
        self._lock = threading.RLock()
        # Held while something is on its way: what is sent later arrives later.
        self._sending = threading.Lock()
        # Of any thread, without a lock: each change is one of the interpreter's.
        self._dirty: dict[Journal, None] = {}
        self._work = threading.Event()
        self._written_at = 0.0
        self._pause_until = 0.0
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, delivery: Delivery) -> Journal:
        """The journal of a job in hand."""
        with self._lock:
            if delivery.journal is None:
                settings = self.store.settings
                delivery.journal = Journal(
                    self, delivery, delivery.broker.log_bytes_of(delivery), settings.metric_points
                )
            journal: Journal = delivery.journal
            return journal

    def add(self, journal: Journal) -> None:
        """A journal has something to be written."""
        self._dirty[journal] = None
        if self._thread is None or self._closed or not self._thread.is_alive():
            with self._lock:
                self._ensure_thread()
        if not self._work.is_set():
            self._work.set()

    def forget(self, journal: Journal) -> None:
        """Of a journal that has ended nothing is to be written here."""
        self._dirty.pop(journal, None)

    def write_last(self, journals: Collection[Journal], patience: float | None = None) -> None:
        """Writes all that attempts have shown that have ended. Raises `StoreUnavailable`, and may be called again."""
        left = list(journals)
        while left:
            left = self._write(left, patience)

    def close(self) -> None:
        """Ends the thread."""
        self._closed = True
        self._work.set()

    def _ensure_thread(self) -> None:
        if self._closed or self._thread is None or not self._thread.is_alive():
            self._closed = False
            thread = threading.Thread(target=self._run, name="mlqueue-journal", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread can be started now; it is written before the job's end
                logger.warning("what jobs show of themselves waits to be written: %s", error)
            else:
                self._thread = thread

    def _run(self) -> None:
        while not self._closed:
            if not self._work.wait(LINGER) and self._is_over():
                return
            self._work.clear()
            # Wait for more, not for an event: this is the gathering. After a pause it goes out at once.
            until = max(self._written_at + GATHER, self._pause_until)
            threading.Event().wait(max(0.0, until - time.monotonic()))
            journals = list(self._dirty)
            for journal in journals:
                self.forget(journal)
            try:
                self._write(journals)
            except StoreError as error:
                self._pause_until = time.monotonic() + PAUSE
                logger.warning("what %d jobs show of themselves waits to be written: %s", len(journals), error)

    def _is_over(self) -> bool:
        with self._lock:
            # In this order: whoever adds one looks for the thread behind that.
            thread, self._thread = self._thread, None
            if self._dirty:
                self._thread = thread
            return self._thread is None

    def _write(self, journals: Collection[Journal], patience: float | None = None) -> list[Journal]:
        """Writes the next part of each; those that have more."""
        with self._sending:
            sent: list[tuple[Journal, Showing]] = []
            for journal in journals:
                showing = journal.send()
                if showing is not None:
                    sent.append((journal, showing))
            if not sent:
                return []
            left: list[Journal] = []
            answers: list[Any] = [None] * len(sent)
            try:
                answers = self.store.show([showing for _, showing in sent], patience)
            except StoreUnavailable:
                raise
            except StoreError as error:
                # It would not take it now or later, and what comes is more of it.
                answers = [str(error)] * len(sent)
            finally:
                self._written_at = time.monotonic()
                for (journal, showing), answer in zip(sent, answers, strict=True):
                    if journal.answered(showing, answer):
                        left.append(journal)
        return left


__all__ = ["Journal", "JournalWriter"]
