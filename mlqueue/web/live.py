"""Live: what happens to jobs as server-sent events, and records that are answered when they have changed.

A stream begins with the job as it stands, goes on with every change, and ends after the job's end. A client that was
away comes again with the id of the last event that it heard, and has what it missed; where that is not known any more
an event ``gap`` says so. Heartbeats keep proxies from cutting a silent stream. Each stream takes a thread of a server
that has threads (a greenlet of gevent's costs next to nothing), so their number is bounded (`mlqueue.web.streams`):
beyond it a client asks again and again, with ``Prefer: wait`` and the ETag of the record that it has.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from flask import Response

from ..errors import InvalidArguments, StoreError, TooManyStreams
from ..events import Filter, Hub, Listener, hub_of
from ..job import JobRecord, State
from ..store.events import ID, OF_JOB, UNHEARD, Event, place
from .auth import READ
from .call import Call, dump
from .operation import Answer, Parameter, operation
from .records import shown

__all__ = ["EVENTS", "etag_of", "stream_all_events", "stream_job_events", "wait_for_change"]

#: The media type of a stream.
EVENTS: Final = "text/event-stream"

#: How long a client waits until it comes again, in milliseconds.
RETRY: Final = 2000

#: How long a stream lasts, in seconds: the client comes again, and its key is looked at again.
LIFE: Final = 3600.0

#: How many events are searched for those of a job that its client missed; behind more of them it gets the record.
MOST_SEARCHED: Final = 5000

#: What says nothing, but that the stream is there.
HEARTBEAT: Final = b":\n\n"

#: How long a request that waits for a change trusts that it hears of it, in seconds, before it looks.
LOOK_AGAIN: Final = 5.0

LAST_EVENT_ID: Final = Parameter(
    "Last-Event-ID",
    "header",
    {"type": "string", "pattern": rf"^{ID.pattern}$"},
    "The id of the last event that the client has heard: those behind it follow. Browsers send it by themselves.",
)
NAME: Final = {"type": "string", "minLength": 1, "maxLength": 200}


# Operations


@operation(
    "GET",
    "/jobs/<job_id>/events",
    scope=READ,
    tag="live",
    parameters=(LAST_EVENT_ID,),
    answers={
        200: Answer("The events.", {EVENTS: {"type": "string"}}),
        204: Answer("The job has ended, and the client has heard of it: it need not come again."),
    },
    errors=(TooManyStreams,),
)
def stream_job_events(call: Call, job_id: str) -> Response:
    """Stream the events of a job, to its end.

    First `snapshot`, the record; then `state` and `progress` with the job's id, queue, actor, state, attempt, progress,
    progress_note, dead_reason, cancel_requested and the time (`at`); `logs` and `metrics` when there are more of them;
    `removed` when it is forgotten before its end.
    With `Last-Event-ID` those behind that one, and no snapshot; where some may be missing, `gap` and a snapshot.
    """
    heard = _last_heard(call)
    call.store.record(job_id, full=False)  # a 404 goes before everything
    stream = call.mount.streams.admit(call.request.environ)
    listener = stream.listen(hub_of(call.store), job_id)
    record, newest = call.store.snapshot(job_id)
    missed = _missed_of_job(hub_of(call.store), job_id, heard) if heard else None
    if missed is None:
        begin = [_frame_of("gap", heard, {"last_event_id": heard})] if heard else []
        begin.append(_frame_of("snapshot", newest, shown(call, record)))
    elif record.state.ended and not missed:
        stream.close()
        return Response(status=204, headers={"Cache-Control": "no-store"})
    else:
        begin = [_frame(event) for event in missed]
        newest = max([newest, *(event.event_id for event in missed)], key=place) if missed else newest
    life = () if record.state.ended else _live_of_job(listener, newest, call.mount.heartbeat)
    return stream.answer(itertools.chain(_opening(begin), life))


@operation(
    "GET",
    "/events",
    scope=READ,
    tag="live",
    parameters=(
        Parameter(
            "state",
            "query",
            {"type": "string", "enum": [str(state) for state in State]},
            "Of jobs that are in this state then.",
            many=True,
        ),
        Parameter("actor", "query", NAME, "Of jobs of this actor."),
        Parameter("queue", "query", NAME, "Of jobs in this queue."),
        LAST_EVENT_ID,
    ),
    answers={200: Answer("The events.", {EVENTS: {"type": "string"}})},
    errors=(TooManyStreams,),
)
def stream_all_events(call: Call) -> Response:
    """Stream the events of all jobs, from now on.

    They are as those of `GET /jobs/{job_id}/events`, and `callback` (with callback_state) when one was tried. With
    `Last-Event-ID` first those that were missed; `gap` where some may be missing: then read what you need anew.
    """
    given, heard = call.query(), _last_heard(call)
    wanted = Filter(states=given.get("state", ()), actor=given.get("actor"), queue=given.get("queue"))
    stream = call.mount.streams.admit(call.request.environ)
    hub = hub_of(call.store)
    listener = stream.listen(hub, None, wanted)
    # The first of them now: what may fail does so before the answer has begun.
    missed = _from_first(hub.since(heard)) if heard else iter(())
    begin = [] if heard else [f"id: {listener.position}\n\n".encode()]
    live = _live_of_all(listener, missed, heard or listener.position, call.mount.heartbeat)
    return stream.answer(itertools.chain(_opening(begin), live))


def _last_heard(call: Call) -> str:
    given = call.request.headers.get("Last-Event-ID", "")
    if given and not ID.fullmatch(given):
        fault = "is none of the ids that events have"
        raise InvalidArguments(
            f"Last-Event-ID {fault}; send the `id` of the last one that was heard, or leave it out.",
            faults=[("Last-Event-ID", fault)],
        )
    return given


def _from_first(events: Iterator[Event]) -> Iterator[Event]:
    first = list(itertools.islice(events, 1))
    return itertools.chain(first, events)


def _missed_of_job(hub: Hub, job_id: str, heard: str) -> list[Event] | None:
    """The events of a job behind one; None where that is not known, or too long ago."""
    missed = []
    for number, event in enumerate(hub.since(heard)):
        if event.kind == UNHEARD or number >= MOST_SEARCHED:
            return None
        if event.id == job_id:
            missed.append(event)
    return missed


# What streams are made of


def _opening(frames: Iterable[bytes]) -> Iterator[bytes]:
    yield b"".join([f"retry: {RETRY}\n\n".encode(), *frames])


def _live_of_job(listener: Listener, heard: str, heartbeat: float) -> Iterator[bytes]:
    """The events of a job behind one, to its end."""
    for events in _batches(listener, heard, heartbeat):
        frames = []
        for event in events:
            if event.kind == UNHEARD:
                return  # it comes again, and gets the record
            frames.append(_frame(event))
            if event.kind == "removed" or (event.kind == "state" and event.state.ended):
                yield b"".join(frames)
                return
        yield b"".join(frames) or HEARTBEAT


def _live_of_all(listener: Listener, missed: Iterator[Event], heard: str, heartbeat: float) -> Iterator[bytes]:
    try:
        for event in missed:
            heard = event.event_id
            if event.kind not in OF_JOB and listener.filter.passes(event):
                yield _frame(event)
    except StoreError:
        return  # it comes again
    for events in _batches(listener, heard, heartbeat):
        yield b"".join(_frame(event) for event in events) or HEARTBEAT


def _batches(listener: Listener, heard: str, heartbeat: float) -> Iterator[list[Event]]:
    """What is handed to a listener, behind an event, until it is cut off or the stream's life is over; nothing when
    there was nothing for `heartbeat` seconds."""
    over, last = time.monotonic() + LIFE, place(heard)
    while not listener.cut_off and time.monotonic() < over:
        events = [event for event in listener.take(heartbeat) if place(event.event_id) > last]
        if not listener.cut_off:
            yield events


@functools.lru_cache(maxsize=4096)
def _frame(event: Event) -> bytes:
    """An event on its way; the same for all who listen."""
    if event.kind == UNHEARD:
        return _frame_of("gap", event.event_id, {"last_event_id": event.event_id})
    data = {
        "id": event.id,
        "queue": event.queue,
        "actor": event.actor,
        "state": str(event.state),
        "attempt": event.attempt,
        "progress": event.progress,
        "progress_note": event.progress_note,
        "dead_reason": None if event.dead_reason is None else str(event.dead_reason),
        "cancel_requested": event.cancel_requested,
        "at": event.at,
    }
    if event.callback_state is not None:
        data["callback_state"] = str(event.callback_state)
    return _frame_of(event.kind, event.event_id, data)


def _frame_of(kind: str, event_id: str, data: Mapping[str, Any]) -> bytes:
    return f"id: {event_id}\nevent: {kind}\ndata: ".encode() + dump(data) + b"\n\n"


# Without a stream


def etag_of(body: bytes) -> str:
    """What tells a record, in JSON, from what it was before, as an ETag."""
    return f'W/"{hashlib.sha256(body).hexdigest()[:32]}"'


def wait_for_change(call: Call, job_id: str, seconds: float) -> JobRecord | None:
    """The record of a job, once it is another one than the client has (If-None-Match); None when it is the same after
    `seconds`."""
    deadline = time.monotonic() + seconds
    listener = hub_of(call.store).listen(job_id) if seconds else None
    try:
        while True:
            record = call.store.record(job_id)
            if not call.request.if_none_match.contains_weak(etag_of(dump(shown(call, record)))[3:-1]):
                return record
            remaining = deadline - time.monotonic()
            if listener is None or remaining <= 0 or listener.cut_off:
                return None
            listener.take(min(remaining, LOOK_AGAIN))
    finally:
        if listener is not None:
            listener.close()
