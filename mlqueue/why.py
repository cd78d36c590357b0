"""Why a job does not run, in one sentence: `Job.why`, ``mlqueue why``, ``GET /jobs/<id>/why``."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any, Final

from .job import JobRecord, State
from .message import LISTENER
from .store import Store
from .store.records import quote
from .store.store import WorkerInfo

__all__ = ["Why", "why"]

#: How many jobs that hold a slot are named.
NAMED: Final = 3


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Why:
    """Why a job does not run; ``str()`` of it is the sentence."""

    job_id: str
    #: ``ended``, ``running``, ``scheduled``; of one that is queued ``no_worker`` (serves its queue), ``unknown_actor``
    #: (to those who do), ``paused`` (its queue is), ``limit``, ``alone`` (it is to run alone), ``behind`` (others come
    #: first) or ``next``.
    reason: str
    #: The sentence.
    text: str
    #: The limit that has no room for it, and the jobs that hold the slots of that.
    limit: str | None = None
    held_by: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.text

    def asdict(self) -> dict[str, Any]:
        """It as plain values, for JSON."""
        return {**dataclasses.asdict(self), "held_by": list(self.held_by)}


def why(store: Store, job_id: str) -> Why:
    """Why a job does not run. Raises `JobNotFound`."""
    record = store.record(job_id)
    if record.state is State.QUEUED:
        return _queued(store, record)
    if record.state is State.SCHEDULED:
        return _why(record, "scheduled", _scheduled(store, record))
    if record.state is State.RUNNING:
        return _why(record, "running", _running(store, record))
    return _why(record, "ended", _ended(record))


def _why(record: JobRecord, reason: str, text: str, **more: Any) -> Why:
    return Why(job_id=record.id, reason=reason, text=f"job {record.id} {text}.", **more)


def _queued(store: Store, record: JobRecord) -> Why:
    workers = store.workers()
    serving = [worker for worker in workers if record.queue in worker.info.get("queues", ())]
    knowing = [worker for worker in serving if _knows(worker, record)]
    if not workers:
        return _why(record, "no_worker", "waits for a worker: none is alive; `mlqueue worker MODULE` starts some")
    if not serving:
        queues = sorted({queue for worker in workers for queue in worker.info.get("queues", ())})
        served = f"; those that are alive serve {', '.join(queues)}" if queues else ""
        return _why(record, "no_worker", f"waits for a worker that serves queue {record.queue}{served}")
    if not knowing:
        what = f"knows the actor {record.actor}" if record.actor != LISTENER else "has listener functions"
        return _why(record, "unknown_actor", f"waits for a worker that {what}; none of queue {record.queue} does")
    missing = [name for name in record.functions if not any(_has(worker, name) for worker in knowing)]
    if missing:
        return _why(record, "unknown_actor", f"waits for a worker that has the function {missing[0]}; none has")
    paused = store.paused().get(record.queue)
    if paused is not None:
        by = f" by {paused.who}" if paused.who else ""
        text = f"waits: queue {record.queue} is paused{by} since {_ago(store, paused.since)}"
        return _why(record, "paused", text)
    lacking = store.lacking(record.id)
    if lacking:
        return _limited(store, record, *lacking[0])
    if record.crashes >= 2:
        text = f"is to run with no other job beside it, since {record.crashes} processes have died with it"
        return _why(record, "alone", text)
    threads = sum(worker.info.get("threads", 0) for worker in knowing)
    busy = f"all {threads} threads of the workers that know it may be busy" if threads else "the workers may be busy"
    if record.position:
        return _why(record, "behind", f"waits: {_before(record)}")
    return _why(record, "next", f"is the next of queue {record.queue}; {busy}")


def _before(record: JobRecord) -> str:
    verb = "job is" if record.position == 1 else "jobs are"
    return f"{record.position} {verb} before it in queue {record.queue}"


def _knows(worker: WorkerInfo, record: JobRecord) -> bool:
    if record.actor == LISTENER and not record.functions and not worker.info.get("for_all", True):
        return False  # it has none, or none that could be loaded
    return record.actor in worker.info.get("actors", ())


def _has(worker: WorkerInfo, function: str) -> bool:
    # Workers tell of their functions quoted, as lanes have them.
    return quote(function) in worker.info.get("functions", ())


def _limited(store: Store, record: JobRecord, name: str, number: int, most: int, holders: Mapping[str, float]) -> Why:
    what = name if not name.startswith("@") else f"the limit of {name}"
    more = {"limit": name, "held_by": tuple(holders)}
    if number > most:
        slots = "slot" if most == 1 else "slots"
        text = f"waits for {number} of {what}, which has {most} {slots}; `mlqueue limit {name} {number}` raises that"
        return _why(record, "limit", text, **more)
    needs = what if number == 1 else f"{number} slots of {what}"
    since = sorted(holders.items(), key=lambda item: item[1])
    held = ", ".join(f"job {job_id} since {_ago(store, at)}" for job_id, at in since[:NAMED])
    rest = f" and {len(since) - NAMED} more" if len(since) > NAMED else ""
    # Where jobs take turns, the place in the queue does not say who comes first.
    before = f"; {_before(record)}" if record.position and record.fair_by is None else ""
    return _why(record, "limit", f"waits for {needs}, held by {held}{rest}{before}", **more)


def _scheduled(store: Store, record: JobRecord) -> str:
    due = f"{_clock(record.due_at)} (in {_span((record.due_at or 0) - store.now())})"
    if record.retries:
        return f"is scheduled for {due}: it failed, and is tried again"
    return f"is scheduled for {due}"


def _running(store: Store, record: JobRecord) -> str:
    text = f"runs since {_ago(store, record.started_at or 0)}"
    if record.cancel_requested_at is not None:
        text += ", and has been told to end"
    if record.waits_for is not None:
        text += f", and waits for job {record.waits_for}"
    return text


def _ended(record: JobRecord) -> str:
    reason = f" ({record.dead_reason})" if record.dead_reason else ""
    return f"has ended: it is {record.state}{reason} since {_clock(record.finished_at)}"


def _ago(store: Store, at: float) -> str:
    return f"{_clock(at)} ({_span(store.now() - at)})"


def _clock(at: float | None) -> str:
    when = time.localtime(at or 0)
    today = when[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", when)


def _span(seconds: float) -> str:
    """A span of time as people say it."""
    seconds = max(0.0, seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
