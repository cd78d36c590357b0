"""`Now`: how a namespace stands, read in a few calls that cost the same for a hundred jobs and for a million.

The overview of the dashboard and ``mlqueue top`` are made of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any, Final

from .job import JobRecord, State
from .store import Store, WorkerInfo
from .store.store import Count, Moment, Paused

#: Of how many running jobs the records are read.
MOST_SHOWN: Final = 100

#: How long a job may wait until that is something to look at, in seconds.
LONG_WAIT: Final = 300.0

#: What counts as lately, in seconds.
LATELY: Final = 900.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Queue:
    """A queue."""

    name: str
    #: Jobs by state, and the same of each actor.
    counts: dict[State, int]
    actors: dict[str, dict[State, int]]
    #: Workers that take jobs from it.
    workers: int
    #: For how many seconds the oldest job has waited.
    oldest: float | None
    paused: Paused | None

    @property
    def waiting(self) -> int:
        """Jobs that could start now."""
        return self.counts.get(State.QUEUED, 0)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in it, and nothing to be said of it."""
        return self.paused is None and not any(self.counts.values())

    @property
    def is_deserted(self) -> bool:
        """Whether jobs wait, and nobody will run them."""
        return self.workers == 0 and bool(self.waiting + self.counts.get(State.SCHEDULED, 0))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Now:
    """How a namespace stands."""

    #: When that was, by the clock of this process.
    at: float
    counts: dict[State, int]
    queues: list[Queue]
    workers: list[WorkerInfo]
    #: Records of running jobs, by id; of some of them, where there are many.
    running: dict[str, JobRecord]
    course: list[Moment]
    #: The pools that have batches prepared, by run; see ``Store.publish_pool``.
    pools: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def total(self) -> int:
        """All jobs that there are."""
        return sum(self.counts.values())

    def lately(self, name: str) -> int:
        """How much a number of the course has grown lately."""
        if not self.course:
            return 0
        newest = self.course[-1]
        before = next((m for m in self.course if m.at_ms >= newest.at_ms - LATELY * 1000), newest)
        return max(0, int(getattr(newest, name)) - int(getattr(before, name)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trouble:
    """Something that is wrong, or may be."""

    #: ``bad`` or ``warn``.
    level: str
    text: str
    #: What it is about: ``queue``, ``dead``, ``worker``, ``callback`` or ``waiting``.
    about: str
    #: The queue, where it is about one.
    queue: str = ""


def read_now(store: Store) -> Now:
    """How it stands now."""
    # One that was released while somebody beat for it is known by its name alone, for a moment.
    workers = [worker for worker in store.workers() if worker.info or worker.jobs]
    ids = [job for worker in workers for job in worker.jobs][:MOST_SHOWN]
    running = {record.id: record for record in store.records(ids) if record is not None}
    counts: dict[State, int] = {}
    found = store.counts()
    for count in found:
        counts[count.state] = counts.get(count.state, 0) + count.number
    queues = _queues(found, store.oldest(), workers, store.paused())
    return Now(
        at=time.time(),
        counts=counts,
        queues=queues,
        workers=workers,
        running=running,
        course=store.course(),
        pools=store.pools(),
    )


def _queues(
    counts: list[Count], oldest: dict[str, float], workers: list[WorkerInfo], paused: dict[str, Paused]
) -> list[Queue]:
    serving: dict[str, int] = {}
    for worker in workers:
        for name in worker.info.get("queues", ()):
            serving[name] = serving.get(name, 0) + 1
    by_state: dict[str, dict[State, int]] = {}
    by_actor: dict[str, dict[str, dict[State, int]]] = {}
    for count in counts:
        states = by_state.setdefault(count.queue, {})
        states[count.state] = states.get(count.state, 0) + count.number
        by_actor.setdefault(count.queue, {}).setdefault(count.actor, {})[count.state] = count.number
    return [
        Queue(
            name=name,
            counts=by_state.get(name, {}),
            actors=dict(sorted(by_actor.get(name, {}).items())),
            workers=serving.get(name, 0),
            oldest=oldest.get(name),
            paused=paused.get(name),
        )
        for name in sorted({*by_state, *serving, *paused})
    ]


def troubles(now: Now) -> Iterator[Trouble]:
    """What is wrong, the worst first."""
    for queue in now.queues:
        if queue.is_deserted:
            waiting = queue.waiting + queue.counts.get(State.SCHEDULED, 0)
            text = f"No worker serves the queue {queue.name}: {_jobs(waiting)} wait{'s' if waiting == 1 else ''}."
            yield Trouble(level="bad", text=text, about="queue", queue=queue.name)
    dead = now.lately("dead")
    if dead:
        text = f"{_jobs(dead)} died in the last {LATELY / 60:.0f} minutes."
        yield Trouble(level="bad", text=text, about="dead")
    crashes = now.lately("crashes")
    if crashes:
        text = f"{crashes:,} attempt{'s' if crashes > 1 else ''} ended with a crash or a lost worker in the last "
        yield Trouble(level="bad", text=f"{text}{LATELY / 60:.0f} minutes.", about="worker")
    undelivered = now.lately("undelivered")
    if undelivered:
        text = f"{undelivered:,} callback{'s' if undelivered > 1 else ''} could not be delivered lately."
        yield Trouble(level="warn", text=text, about="callback")
    for queue in now.queues:
        if queue.paused is not None:
            text = f"The queue {queue.name} is paused."
            yield Trouble(level="warn", text=text, about="queue", queue=queue.name)
        elif queue.oldest is not None and queue.oldest > LONG_WAIT and queue.workers:
            text = f"The oldest job in {queue.name} has waited for {queue.oldest / 60:,.0f} minutes."
            yield Trouble(level="warn", text=text, about="waiting", queue=queue.name)


def _jobs(number: int) -> str:
    return f"{number:,} job{'' if number == 1 else 's'}"


__all__ = ["Now", "Queue", "Trouble", "read_now", "troubles"]
