"""Jobs that have to be ended by killing their process: those that run too long, or were told to end and do not.

A supervisor knows them from outside the interpreter, so that a call into C which holds the GIL cannot hide one: until
when a job may run stands on the board of its process (`mlqueue.board`) from its start on; whether it was cancelled,
taken away or prolonged the store says, which is asked about jobs that may be killed, and about no others.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NamedTuple

from .board import Board, Entry
from .store import Standing

__all__ = ["LOOK_INTERVAL", "Doom", "Watch"]

#: How often boards are looked at, in seconds.
LOOK_INTERVAL: Final = 0.2

#: How long a store that does not answer is waited for when a job may be killed: it may have been prolonged, in seconds.
LAST_LOOK: Final = 1.0

Attempt = tuple[str, int]


class Doom(NamedTuple):
    """A job for which its process is to be killed."""

    job_id: str
    attempt: int
    #: Why, as it is told on the record.
    why: str


class _Seen(NamedTuple):
    """What the store has said of an attempt."""

    #: When it was asked (monotonic).
    at: float
    extended_by: float
    #: Since when the job was to end (monotonic), and why; infinite when it is not.
    asked_at: float
    asked_why: str


class Watch:
    """The jobs of one worker process that may have to be killed. `dooms` is called by one thread, `ask` by another."""

    def __init__(self, board: Board) -> None:
        self._board = board
        #: Replaced as a whole, since both threads use it.
        self._seen: dict[Attempt, _Seen] = {}

    @property
    def idle(self) -> bool:
        """Whether there has never been such a job."""
        return not self._board.limited

    def dooms(self, now: float) -> list[Doom]:
        """The jobs for which the process is to be killed now."""
        found = []
        for entry in self._limited():
            why = self._why(entry, self._seen.get((entry.job_id, entry.attempt)), now)
            if why:
                found.append(Doom(entry.job_id, entry.attempt, why))
        return found

    def has_due(self, now: float) -> bool:
        """Whether the store should be asked at once: the time of a job is over, unless it was prolonged."""
        limited = ((entry, self._seen.get((entry.job_id, entry.attempt))) for entry in self._limited())
        return any(over <= now for entry, seen in limited for over, _ in self._ends(entry, seen))

    def ask(self, standing: Callable[[Sequence[Attempt]], list[Standing]]) -> None:
        """Asks the store how jobs stand that may have to be killed; nothing when there is none."""
        now = time.monotonic()
        asked = [
            (entry.job_id, entry.attempt) for entry in self._limited() if entry.grace < math.inf or entry.hard <= now
        ]
        answers = standing(asked) if asked else []
        self._seen = {
            attempt: self._learn(now, answer, self._seen.get(attempt))
            for attempt, answer in zip(asked, answers, strict=True)
        }

    def _learn(self, now: float, answer: Standing, before: _Seen | None) -> _Seen:
        asked_at, why = math.inf, ""
        if not answer.held:
            # Taken back for its timeout, or given to others: since when is not known, but since the last look.
            asked_at, why = now, "it was taken from its worker"
            if before is not None and before.asked_why == why:
                asked_at = before.asked_at
        elif answer.cancelled_for is not None:
            asked_at, why = now - answer.cancelled_for, "it was cancelled"
        return _Seen(now, answer.extended_by, asked_at, why)

    def _limited(self) -> list[Entry]:
        return [entry for entry in self._board.entries() if entry.limited]

    def _why(self, entry: Entry, seen: _Seen | None, now: float) -> str:
        """Why a job is to be ended now; empty when it is not."""
        if seen is not None and now >= seen.asked_at + entry.grace:
            return f"{seen.asked_why} and had not ended {entry.grace:g} s later; its process was killed"
        looked_at = -math.inf if seen is None else seen.at
        for over, limit in self._ends(entry, seen):
            if now >= over and (looked_at >= over or now >= over + LAST_LOOK):
                return f"it ran longer than {limit}; its process was killed"
        return ""

    def _ends(self, entry: Entry, seen: _Seen | None) -> Iterator[tuple[float, str]]:
        """When its process is to be killed for what it says itself (monotonic), and what that limit is."""
        # That it was prolonged from elsewhere its process may not have heard.
        more = max(0.0, seen.extended_by - entry.extended_by) if seen is not None else 0.0
        yield entry.hard + more, f"its hard_time_limit of {entry.hard_limit:g} s"
        yield (
            entry.soft + entry.grace + more,
            f"its time_limit of {entry.soft_limit:g} s, by more than {entry.grace:g} s",
        )
