"""Waiting for a job inside another one, without holding up the worker that both need.

The waiting job is handed the other one, where that waits in a queue of its own worker, and it is run beside (see
`mlqueue.beside`); else the waiting job's place is lent. The store sees who waits for whom, so that a cycle is an error
at once, in every process.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

from .beside import Beside
from .delivery import Delivery, current_delivery
from .errors import JobNotFound, StoreError, WaitCycle
from .job import State
from .store import Held, Store
from .waiting import LOOK_AGAIN, Bell, Subscription, bell_of, listening_async, wait_for_async, wait_for_end

__all__ = ["await_end", "wait_end"]


def wait_end(store: Store, job_id: str, timeout: float | None = None) -> bytes | None:
    """As `mlqueue.waiting.wait_for_end`, wherever it is called.

    Raises `WaitCycle` inside a job for which the other one waits, and `Cancelled` inside one that is cancelled.
    """
    delivery, beside = _place(store)
    if delivery is None:
        return wait_for_end(store, job_id, timeout)
    if beside is None:
        with _off_the_clock(delivery):
            return wait_for_end(store, job_id, timeout)
    with _Wait(store, delivery, beside, job_id) as wait:
        return wait.until_ended(timeout)


async def await_end(store: Store, job_id: str) -> None:
    """As `mlqueue.waiting.wait_for_async`, wherever it is called."""
    delivery, beside = _place(store)
    if delivery is None:
        await wait_for_async(store, job_id)
        return
    if beside is None:
        with _off_the_clock(delivery):
            await wait_for_async(store, job_id)
        return
    wait = _Wait(store, delivery, beside, job_id)
    try:
        await wait.until_ended_async()
    finally:
        await asyncio.shield(asyncio.to_thread(wait.close))


def _place(store: Store) -> tuple[Delivery | None, Beside | None]:
    """The job that this code runs in, and the threads beside its own where the awaited one can be run: that is one of
    the same namespace."""
    delivery = current_delivery.get()
    if delivery is None or delivery.process != os.getpid():
        return None, None  # a process that a job has forked has not its worker
    broker = delivery.broker
    return delivery, broker.beside if broker.store.root == store.root else None


@contextlib.contextmanager
def _off_the_clock(delivery: Delivery) -> Iterator[None]:
    """Within, the time limit of the job does not run, unless its actor asks for that."""
    resume = delivery.broker.pause_time_limit(delivery)
    try:
        yield
    finally:
        resume()


class _Wait:
    """One job waiting for another."""

    def __init__(self, store: Store, delivery: Delivery, beside: Beside, job_id: str) -> None:
        self._store = store
        self._delivery = delivery
        self._beside = beside
        self._job_id = job_id
        self._nonce = uuid.uuid4().hex
        self._asking = threading.Lock()
        self._closed = False
        self._bell: Bell = bell_of(store)
        self._stack = contextlib.ExitStack()
        self._lent: contextlib.AbstractContextManager[None] | None = None
        delivery.waits += 1
        self._stack.enter_context(_off_the_clock(delivery))

    def __enter__(self) -> _Wait:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def until_ended(self, timeout: float | None) -> bytes | None:
        """See `mlqueue.waiting.wait_for_end`."""
        deadline = float("inf") if timeout is None else time.monotonic() + timeout
        subscription = self._bell.subscribe(self._job_id)
        self._stack.callback(self._bell.unsubscribe, subscription)
        with self._delivery.waiting(functools.partial(self._wake, subscription)):
            while True:
                self._delivery.check_interrupt()
                rings = subscription.rings
                if self._ask().ended:
                    subscription.end = b""
                    break
                if time.monotonic() >= deadline:
                    break
                self._bell.wait(subscription, rings, min(deadline, time.monotonic() + LOOK_AGAIN))
                if subscription.end is not None:
                    break
        # What came in the last moment has only woken it.
        self._delivery.check_interrupt()
        return subscription.end

    def _wake(self, subscription: Subscription) -> None:
        self._bell.poke(subscription)

    async def until_ended_async(self) -> None:
        """See `mlqueue.waiting.wait_for_async`."""
        with listening_async(self._bell, self._job_id) as (subscription, rung):
            while True:
                rung.clear()
                if (await asyncio.to_thread(self._ask)).ended:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(rung.wait(), LOOK_AGAIN)
                if subscription.end is not None:
                    return

    def close(self) -> None:
        """Ends it: the job waits no longer."""
        held = self._delivery.held
        # A question that is under way, in another thread, ends first.
        with self._asking:
            self._closed = True
            try:
                self._give_back()
                self._stack.close()
            finally:
                self._delivery.waits -= 1
        if self._delivery.waits == 0:
            with contextlib.suppress(StoreError):
                self._store.stop_awaiting((held.id, held.attempt))

    def _ask(self) -> State:
        """How the other job stands. If it can be run here, it is."""
        with self._asking:
            return State.CANCELLED if self._closed else self._ask_now()

    def _ask_now(self) -> State:
        held = self._delivery.held
        lanes = self._beside.lanes()
        ask = functools.partial(
            self._store.await_job,
            (held.id, held.attempt),
            self._job_id,
            self._bell.name,
            worker=self._beside.worker,
            nonce=self._nonce,
            may_start=bool(lanes),
            lanes=lanes,
        )
        try:
            awaited = ask()
            for job in awaited.jobs:
                self._beside.run(job)
        except (JobNotFound, WaitCycle):
            raise
        except BaseException:
            # No answer, or struck by a limit in the middle of it: the store may have handed the job over.
            self._beside.recover(lambda: _handed_over(ask))
            raise
        if awaited.jobs:
            self._nonce = uuid.uuid4().hex
            self._give_back()
        elif not awaited.state.ended and self._lent is None and awaited.worker != self._beside.worker:
            self._lent = self._beside.lend()
            self._lent.__enter__()
        return awaited.state

    def _give_back(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.__exit__(None, None, None)


def _handed_over(ask: Any) -> list[Held]:
    jobs: list[Held] = ask().jobs
    return jobs
