"""Events of jobs as the store keeps them while somebody listens, and the counters that it keeps always."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import msgpack

from .. import codec
from ..errors import MLQueueError
from ..job import CallbackState, DeadReason, State
from .records import CALLBACK_STATES, STATES, unquote

#: The kind of an entry that says that nobody listened before it.
UNHEARD: Final = "-"

#: The kinds that those are told of alone who listen to the job itself: its log and its metrics have something new.
OF_JOB: Final = ("logs", "metrics")

#: The upper bounds of the buckets of histograms, in seconds; part_counts.lua has the same in ms.
BOUNDS: Final = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0, 14400.0, 43200.0, 86400.0)

#: What an event's id looks like: the store's clock in ms, and a number.
ID: Final = re.compile(r"\d{1,19}-\d{1,19}")


class Event(NamedTuple):
    """A change of a job. Names are those of its record."""

    #: Where it stands among the others; see `place`.
    event_id: str
    #: ``state``, ``progress``, ``callback`` (a try to deliver it was made, or is to be), ``removed`` (the job was
    #: forgotten before its end), ``logs`` or ``metrics`` (there are more); `UNHEARD` for no change of a job.
    kind: str
    id: str = ""
    queue: str = ""
    actor: str = ""
    state: State = State.QUEUED
    attempt: int = 0
    #: A text is cut at some 250 bytes; so is the note.
    progress: int | float | str | None = None
    progress_note: str | None = None
    dead_reason: DeadReason | None = None
    cancel_requested: bool = False
    #: Of an event ``callback``.
    callback_state: CallbackState | None = None

    @property
    def at(self) -> float:
        """When it happened, by the store's clock in Unix seconds."""
        return place(self.event_id)[0] / 1000


def place(event_id: str) -> tuple[int, int]:
    """What an event's id is sorted by."""
    milliseconds, _, number = event_id.partition("-")
    return int(milliseconds), int(number)


def decode_event(event_id: bytes, fields: Mapping[bytes, bytes]) -> Event:
    """An entry of the stream. One that is none of ours stands for what cannot be known."""
    try:
        return _decode(event_id.decode(), fields)
    except (ValueError, KeyError, TypeError, AttributeError, MLQueueError):
        return Event(event_id.decode(), UNHEARD)


def _decode(event_id: str, fields: Mapping[bytes, bytes]) -> Event:
    item: list[Any] = msgpack.unpackb(fields[b"e"], raw=True)
    kind = item[0].decode()
    if kind == UNHEARD:
        return Event(event_id, kind)
    _, job_id, letter, queue, actor, attempt, value, note, reason, cancel, callback = item
    return Event(
        event_id=event_id,
        kind=kind,
        id=job_id.decode(),
        queue=unquote(queue),
        actor=unquote(actor),
        state=STATES[letter],
        attempt=attempt,
        progress=codec.decode(value) if value else None,
        progress_note=note.decode(errors="ignore") or None,
        dead_reason=DeadReason(reason.decode()) if reason else None,
        cancel_requested=cancel,
        callback_state=CALLBACK_STATES.get(callback),
    )


@dataclasses.dataclass(slots=True)
class Histogram:
    """How long something took."""

    #: How often, by the bucket that the time falls into: its upper bound in `BOUNDS`, infinity for the last one.
    buckets: dict[float, int] = dataclasses.field(default_factory=dict)
    #: All times together, in seconds.
    total: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class Counters:
    """What the store has counted since it is there."""

    #: Ends by actor, state and reason (empty but for dead jobs).
    ends: dict[tuple[str, State, str], int] = dataclasses.field(default_factory=dict)
    #: By actor: how long jobs waited for their start, and how long attempts ran.
    waits: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    runs: dict[str, Histogram] = dataclasses.field(default_factory=dict)
    #: By actor.
    crashes: dict[str, int] = dataclasses.field(default_factory=dict)
    stalls: dict[str, int] = dataclasses.field(default_factory=dict)
    timeouts: dict[str, int] = dataclasses.field(default_factory=dict)
    retries: dict[str, int] = dataclasses.field(default_factory=dict)
    #: Tries to deliver callbacks: how the callback stood after them.
    callbacks: dict[CallbackState, int] = dataclasses.field(default_factory=dict)


def decode_counters(fields: Mapping[bytes, bytes]) -> Counters:
    """The counters, from their hash."""
    found = Counters()
    simple = {b"x": found.crashes, b"z": found.stalls, b"o": found.timeouts, b"y": found.retries}
    times = {b"w": found.waits, b"r": found.runs}
    for name, value in fields.items():
        what, _, rest = name.partition(b":")
        if what == b"c":
            found.callbacks[CALLBACK_STATES[rest]] = int(value)
            continue
        quoted, _, detail = rest.partition(b":")
        actor = unquote(quoted)
        if what == b"e":
            letter, _, reason = detail.partition(b":")
            found.ends[actor, STATES[letter], reason.decode()] = int(value)
        elif what in simple:
            simple[what][actor] = int(value)
        elif what in times:
            histogram = times[what].setdefault(actor, Histogram())
            if detail == b"sum":
                histogram.total = int(value) / 1000
            else:
                histogram.buckets[float(detail) / 1000] = int(value)
    return found


__all__ = [
    "BOUNDS",
    "ID",
    "OF_JOB",
    "UNHEARD",
    "Counters",
    "Event",
    "Histogram",
    "decode_counters",
    "decode_event",
    "place",
]
