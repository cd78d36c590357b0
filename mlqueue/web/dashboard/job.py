"""A job: how it stands, what it went through, what it was given, what it gave, and why it waits."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Final

from flask import Response

from ... import codec
from ...errors import MLQueueError
from ...handle import Job
from ...job import JobRecord, State
from ...store.store import StoredFile
from ..auth import READ, SUBMIT
from ..operation import operation
from ..results import DECLARED
from . import others
from .values import Shown, described
from .visit import Visit

__all__ = ["cancel_job", "redeliver_callback", "retry_job", "show_job"]

#: Values of more bytes are not decoded for a page.
MOST_BYTES: Final = 4 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """A time that a job spent waiting or running."""

    #: ``wait``, ``run``, ``good``, ``bad`` or ``gone``: a class for its colour.
    kind: str
    text: str
    begin: float
    end: float
    #: More, such as the error.
    detail: str = ""
    #: In parts of a hundred of the whole: where it begins, and how long it is.
    left: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a job was called with; empty where it cannot be read."""

    #: By the names of the parameters, where these are known; else by their place.
    args: list[tuple[str, Shown]]
    kwargs: list[tuple[str, Shown]]
    options: dict[str, Any]
    #: Why there is nothing.
    fault: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gave:
    """What a job ended with."""

    size: int
    #: ``image``, ``audio``, ``video``, ``value`` or ``large``.
    kind: str
    value: Shown | None = None


@operation("GET", "/jobs/<job_id>", scope=READ, tag="pages", answers={})
def show_job(visit: Visit, job_id: str) -> Response:
    """Show a job."""
    [found] = visit.store.records_and_bodies([job_id])
    record = visit.store.record(job_id)  # raises, where there is none
    body = found[1] if found is not None else b""
    return visit.page(
        "job",
        job=record,
        timeline=list(_timeline(record)),
        given=_given(body, _names(visit, record.actor)) if visit.sees_values else None,
        gave=_gave(visit, record) if visit.sees_values else None,
        reasons=list(_reasons(visit, record)),
        worker=next((worker for worker in visit.now.workers if worker.id == record.worker), None),
        metrics=others.loadable(visit, "metrics", job_id),
        logs=others.loadable(visit, "logs", job_id),
    )


def _names(visit: Visit, actor: str) -> list[str]:
    """The names of an actor's parameters, as far as somebody has told them."""
    data = visit.store.published(actor)
    parameters = codec.decode(data)["parameters"] if data else []
    return [parameter["name"] for parameter in parameters if parameter["kind"] in ("any", "positional")]


def _given(body: bytes | memoryview, names: list[str]) -> Given:
    if len(body) > MOST_BYTES:
        return Given(args=[], kwargs=[], options={}, fault=f"{len(body):,} bytes: too many to be shown here.")
    try:
        args, kwargs, options = codec.decode_call(body)
    except MLQueueError as error:
        return Given(args=[], kwargs=[], options={}, fault=f"It cannot be read: {error.message}")
    return Given(
        args=[
            (names[place] if place < len(names) else str(place + 1), described(value))
            for place, value in enumerate(args)
        ],
        kwargs=[(name, described(value)) for name, value in kwargs.items()],
        options=options,
    )


def _gave(visit: Visit, record: JobRecord) -> Gave | None:
    if record.state is not State.SUCCEEDED:
        return None
    try:
        return _value_of(visit.store.open_result(record.id), record)
    except MLQueueError:
        return None  # it has been removed


def _value_of(file: StoredFile, record: JobRecord) -> Gave:
    declared = DECLARED.get((record.content_type or "").partition(";")[0].strip().lower(), "")
    kind = declared.partition("/")[0]
    if kind in ("image", "audio", "video"):
        return Gave(size=file.size, kind=kind)
    if file.size > MOST_BYTES:
        return Gave(size=file.size, kind="large")
    return Gave(size=file.size, kind="value", value=described(codec.decode(file.read(file.size))))


# What it went through


def _timeline(record: JobRecord) -> Iterator[Stretch]:
    """What it went through, each with its place on a line from its creation to its end, or now."""
    stretches = list(_stretches(record))
    if not stretches:
        return
    begin, end = stretches[0].begin, stretches[-1].end
    whole = max(end - begin, 1e-6)
    for stretch in stretches:
        left, width = 100 * (stretch.begin - begin) / whole, 100 * stretch.seconds / whole
        yield dataclasses.replace(stretch, left=round(left, 2), width=round(width, 2))


def _stretches(record: JobRecord) -> Iterator[Stretch]:
    now, at, first = time.time(), record.created_at, True
    for attempt in record.attempts:
        if attempt.started_at > at:
            yield Stretch(kind="wait", text=_waited(first), begin=at, end=attempt.started_at)
        detail = attempt.error.text.partition("\n")[0] if attempt.error else ""
        yield Stretch(
            kind="bad",
            text=f"Attempt {attempt.attempt}: {attempt.outcome}",
            begin=max(attempt.started_at, at),
            end=max(attempt.ended_at, at),
            detail=detail,
        )
        at, first = max(attempt.ended_at, at), False
    last = record.attempts[-1].attempt if record.attempts else 0
    if record.attempt > last and record.started_at is not None and record.started_at >= at - 0.001:
        yield Stretch(kind="wait", text=_waited(first), begin=at, end=max(at, record.started_at))
        at = max(at, record.started_at)
        end = max(at, record.finished_at or now)
        text = f"Attempt {record.attempt}"
        if record.has_checkpoint and record.attempt > 1:
            text += ", resumed from its checkpoint"
        kind = "run" if not record.state.ended else "good" if record.state is State.SUCCEEDED else "gone"
        yield Stretch(kind=kind, text=f"{text}: {record.state}", begin=at, end=end)
    elif not record.state.ended:
        yield Stretch(kind="wait", text="Waits" if first else "Waits for its next attempt", begin=at, end=max(at, now))
    elif record.finished_at is not None and record.finished_at > at + 0.001:
        yield Stretch(kind="wait", text=f"Waited, then {record.state}", begin=at, end=record.finished_at)


def _waited(first: bool) -> str:
    return "Waited for a worker" if first else "Waited for its next attempt"


# Why it waits


def _reasons(visit: Visit, record: JobRecord) -> Iterator[str]:
    """Why a job does not run, in words, as far as that is known."""
    if record.state is State.RUNNING and record.waits_for:
        yield f"It waits for the job {record.waits_for}."
    if record.state is State.SCHEDULED and record.due_at is not None:
        yield "It is due later: " + ("a retry after an error." if record.retries else "it was submitted with a delay.")
    if record.state is not State.QUEUED:
        return
    queue = next((queue for queue in visit.now.queues if queue.name == record.queue), None)
    if queue is not None and queue.paused is not None:
        yield f"The queue {record.queue} is paused."
    serving = [worker for worker in visit.now.workers if record.queue in worker.info.get("queues", ())]
    if not serving:
        yield f"No worker serves the queue {record.queue}."
    elif not any(record.actor in worker.info.get("actors", ()) for worker in serving) and not record.functions:
        yield f"No worker of the queue {record.queue} knows the actor {record.actor}."
    if record.crashes >= 2:
        yield "Processes died with it: it waits to be run with no other job beside it."
    if record.position:
        yield f"{record.position:,} job{'s are' if record.position > 1 else ' is'} ahead of it."
    elif serving:
        yield "It is next, as soon as a worker has a free thread."


# What can be done


@operation("POST", "/jobs/<job_id>/cancel", scope=SUBMIT, tag="pages", answers={})
def cancel_job(visit: Visit, job_id: str) -> Response:
    """Cancel it."""
    visit.note("cancel", job_id)
    return visit.go("show_job", "cancelled", int(not visit.store.cancel(job_id).ended), job_id=job_id)


@operation("POST", "/jobs/<job_id>/retry", scope=SUBMIT, tag="pages", answers={})
def retry_job(visit: Visit, job_id: str) -> Response:
    """Put it back into its queue."""
    visit.note("retry", job_id)
    visit.store.retry(job_id)
    return visit.go("show_job", "retried", 1, job_id=job_id)


@operation("POST", "/jobs/<job_id>/redeliver", scope=SUBMIT, tag="pages", answers={})
def redeliver_callback(visit: Visit, job_id: str) -> Response:
    """Have its callback delivered again."""
    visit.note("redeliver", job_id)
    Job(visit.store, job_id).redeliver()
    return visit.go("show_job", "redelivered", job_id=job_id)
