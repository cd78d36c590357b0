"""What `watch` shows: bars on a terminal, lines elsewhere, JSON where it was asked for."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from typing import Any, Final, Protocol

from ..job import JobRecord, State
from .call import Call
from .text import ago, cut, duration, error_text, one_line, progress

#: How wide a bar is, in characters: at least, at most; and what of a line is not bar (id, state, progress).
NARROW, WIDE, BESIDE = 8, 24, 72

#: The shortest time between two lines about the progress of one job, in seconds.
LINE_EVERY: Final = 1.0

#: What moves the cursor to the start of a line, n lines up; what clears from there on; what switches the wrapping of
#: long lines off and on (a wrapped line would be two to clear).
UP, CLEAR, NO_WRAP, WRAP = "\r\x1b[{}A", "\x1b[J", "\x1b[?7l", "\x1b[?7h"


class Screen(Protocol):
    """Where jobs are shown."""

    def show(self, records: Sequence[JobRecord]) -> None:
        """Shows how the jobs stand now."""

    def close(self) -> None:
        """Nothing is shown any more."""


def screen_for(call: Call) -> Screen:
    """The screen for this call."""
    if call.json:
        return Events(call)
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return Bars()
    return Lines()


class Bars:
    """A bar for each job, drawn anew over the last ones."""

    def __init__(self) -> None:
        self._drawn = 0

    def show(self, records: Sequence[JobRecord]) -> None:
        """Draws the bars; of more jobs than fit, those that have not ended."""
        width, height = shutil.get_terminal_size()
        room = max(1, height - 2)
        shown = list(records)
        if len(shown) > room and any(not record.state.ended for record in shown):
            shown = [record for record in shown if not record.state.ended]
        lines = [cut(bar(record, width), width - 1) for record in shown[:room]]
        if len(lines) < len(records):
            ended = sum(record.state.ended for record in records)
            lines.append(f"{len(records)} jobs, {ended} of them ended")
        if all(record.state.ended for record in records):
            lines = [cut(outcome(record), width - 1) for record in records]
        back = UP.format(self._drawn) if self._drawn else "\r"
        sys.stderr.write(back + CLEAR + NO_WRAP + "\n".join(lines) + WRAP + "\n")
        sys.stderr.flush()
        self._drawn = len(lines)

    def close(self) -> None:
        """Leaves the last bars where they are."""


class Lines:
    """A line for each change, for logs."""

    def __init__(self) -> None:
        self._states: dict[str, tuple[object, ...]] = {}
        self._progress: dict[str, tuple[object, float]] = {}

    def show(self, records: Sequence[JobRecord]) -> None:
        """Writes what has changed since the last time; progress once a second at most."""
        for record in records:
            state = (record.state, record.attempt, record.cancel_requested_at)
            reported = (record.progress, record.progress_note)
            last, when = self._progress.get(record.id, (None, 0.0))
            changed = state != self._states.get(record.id)
            if changed or (reported != last and time.monotonic() >= when + LINE_EVERY):
                self._states[record.id] = state
                self._progress[record.id] = reported, time.monotonic()
                sys.stderr.write((outcome(record) if record.state.ended else line(record)) + "\n")
        sys.stderr.flush()

    def close(self) -> None:
        """Nothing to do."""


class Events:
    """A line of JSON for each change, on stdout."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._shown: dict[str, dict[str, Any]] = {}

    def show(self, records: Sequence[JobRecord]) -> None:
        """Writes what has changed since the last time."""
        for record in records:
            event = self._event(record)
            if event != self._shown.get(record.id):
                self._shown[record.id] = event
                self._call.emit(event, one_line=True)

    @staticmethod
    def _event(record: JobRecord) -> dict[str, Any]:
        names = ["id", "state", "attempt", "position", "progress", "progress_note"]
        if record.state.ended:
            names += ["short_result", "dead_reason", "error"]
        values = record.asdict()
        return {name: values[name] for name in names}

    def close(self) -> None:
        """Nothing to do."""


def bar(record: JobRecord, width: int) -> str:
    """A job's bar for a screen of this width: id, state, bar, progress."""
    if record.state.ended:
        return outcome(record)
    value = record.progress
    percent = float(value) if isinstance(value, int | float) and 0 <= value <= 100 else 0.0
    size = max(NARROW, min(WIDE, width - BESIDE))
    full = round(size * percent / 100)
    return f"{record.id}  {status(record):<10} [{'#' * full}{'-' * (size - full)}] {progress(record)}".rstrip()


def line(record: JobRecord) -> str:
    """How a job stands, as a line."""
    return f"{record.id} {status(record)} {progress(record)}".rstrip()


def status(record: JobRecord) -> str:
    """The state of a job, with what belongs to it: its position, when it is due, its attempt."""
    if record.state is State.QUEUED and record.position is not None:
        return f"queued, {f'{record.position:,} ahead' if record.position else 'next'}"
    if record.state is State.SCHEDULED:
        return f"scheduled, due {ago(record.due_at)}"
    if record.state is State.RUNNING:
        extras = [f"attempt {record.attempt}"] if record.attempt > 1 else []
        extras += ["to be cancelled"] if record.cancel_requested_at else []
        return ", ".join(["running", *extras])
    return str(record.state)


def outcome(record: JobRecord) -> str:
    """How a job ended, as a line."""
    took = ""
    if record.started_at is not None and record.finished_at is not None:
        took = f" after {duration(max(0.0, record.finished_at - record.started_at))}"
    if record.state is State.SUCCEEDED:
        short = "" if record.short_result is None else f": {one_line(record.short_result)}"
        return f"{record.id} succeeded{took}{short}"
    if record.state is State.DEAD:
        why = f": {error_text(record.error)}" if record.error else ""
        return f"{record.id} dead ({record.dead_reason}){took}{why} (`mlqueue show {record.id}` has more)"
    return f"{record.id} {record.state}{took}"


__all__ = ["Screen", "outcome", "screen_for", "status"]
