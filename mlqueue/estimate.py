"""When a waiting job will start, as it seems from how long jobs have run so far.

The jobs before it in its queue, and what is left of those that run now, are divided among the places (threads) of the
workers that live, serve its queue and know its actor. Assumed is that each takes as long as attempts of its actor took
on average since they are counted; that these workers have no other queue's jobs to do; that none with a higher priority
comes, none is cancelled, and no limit but the number of threads holds any up.
"""

from __future__ import annotations

from .job import State
from .store import Store
from .store.store import Waiting

__all__ = ["estimated_start", "start_of"]


def estimated_start(store: Store, job_id: str) -> float | None:
    """When a job will start, in Unix seconds of the store's clock: for a scheduled one when it is due. None for one
    that has started, where no worker can run it, and where some actor's jobs have never run. Raises `JobNotFound`."""
    return start_of(store.waiting(job_id))


def start_of(waiting: Waiting) -> float | None:
    """As `estimated_start`, from what the store knows."""
    if waiting.state is State.SCHEDULED:
        return max(waiting.due_at, waiting.now)
    if waiting.state is not State.QUEUED:
        return None
    workers = [
        worker
        for worker in waiting.workers
        if waiting.queue in worker.info.get("queues", ()) and waiting.actor in worker.info.get("actors", ())
    ]
    places: int = sum(worker.info["threads"] for worker in workers)
    if not places:
        return None
    known = {actor for worker in workers for actor in worker.info["actors"]}
    ahead = {actor: number for actor, number in waiting.ahead.items() if actor in known}
    running = [job for worker in workers for job in worker.jobs]
    if sum(ahead.values()) < places - len(running):
        return waiting.now
    if any(actor not in waiting.means for actor in (*ahead, *(actor for actor, _ in running))):
        return None
    work = sum(number * waiting.means[actor] for actor, number in ahead.items())
    work += sum(max(0.0, waiting.means[actor] - (waiting.now - started)) for actor, started in running)
    return waiting.now + work / places
