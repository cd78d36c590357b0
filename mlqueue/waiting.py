"""Waiting for jobs: one bell for each process and store, which every wait of the process shares.

A waiter registers the bell with the job, in the script that also looks whether the job has ended; so the end cannot
slip in between. Of the threads that wait, one (the leader) blocks on the bell and tells the others what it hears.
Coroutines are served by a thread of their own, which waits like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Final

from .errors import StoreError
from .job import State
from .store import Store
from .store.connection import shut, translated

#: How long the leader blocks at most before it looks around, in seconds.
SLICE: Final = 5.0

#: How long the thread that serves coroutines stays when none waits, in seconds.
LINGER: Final = 10.0

#: How long a waiter trusts that a bell will ring, before it registers and looks again, in seconds. A server that was
#: killed may have lost the bell of the last second.
LOOK_AGAIN: Final = 5.0


class Subscription:
    """What one waiter has heard of one job."""

    def __init__(self, job_id: str, notify: Callable[[], None] | None = None) -> None:
        self.job_id = job_id
        #: How often the bell rang for the job.
        self.rings = 0
        #: How the job ended, as the bell told: the state's letter and the result, if it is small; None before.
        self.end: bytes | None = None
        self.notify = notify


class Bell:
    """Hears of the jobs that this process waits for."""

    def __init__(self, store: Store) -> None:
        # The store owns the bell (see `bell_of`), not the other way round.
        self._store = weakref.proxy(store)
        self.name = uuid.uuid4().hex
        self._condition = threading.Condition()
        self._subscriptions: dict[str, list[Subscription]] = {}
        self._led = False
        self._connection: Any = None
        self._server: threading.Thread | None = None
        self._asynchronous = 0
        self._closings = 0

    def subscribe(self, job_id: str, notify: Callable[[], None] | None = None) -> Subscription:
        """Begins to listen for a job; `notify` is called in some thread at each ring."""
        subscription = Subscription(job_id, notify)
        with self._condition:
            self._subscriptions.setdefault(job_id, []).append(subscription)
            if notify is not None:
                self._asynchronous += 1
                self._ensure_server()
                self._condition.notify_all()
        return subscription

    def unsubscribe(self, subscription: Subscription) -> None:
        """Ends it."""
        with self._condition:
            left = self._subscriptions[subscription.job_id]
            left.remove(subscription)
            if not left:
                del self._subscriptions[subscription.job_id]
            if subscription.notify is not None:
                self._asynchronous -= 1

    def wait(self, subscription: Subscription, rings: int, deadline: float) -> bool:
        """Waits until the bell has rung more than `rings` times for the job, or `deadline` (monotonic)."""
        closings = self._closings
        while True:
            with self._condition:
                if subscription.rings > rings:
                    return True
                remaining = deadline - time.monotonic()
                if remaining <= 0 or self._closings != closings:
                    return False
                if self._led:
                    self._condition.wait(remaining)
                    continue
                self._led = True
            try:
                self._listen(remaining)
            finally:
                with self._condition:
                    self._led = False
                    self._condition.notify_all()

    def _listen(self, remaining: float) -> None:
        """Blocks on the bell until it rings once, and tells whom it concerns."""
        closings = self._closings
        try:
            with translated(self._store.connector.where):
                if self._connection is None:
                    self._connection = self._store.connector.connection()
                if self._closings != closings:
                    self._drop()
                    return
                self._connection.send_command(
                    "BLPOP",
                    self._store.own_bell(self.name),
                    max(0.001, min(remaining, SLICE, self._store.settings.socket_timeout / 2)),
                )
                answer = self._connection.read_response()
        except StoreError:
            if self._closings != closings:
                self._drop()
                return
            # The caller looks again by itself before long; a call that cannot reach the store says so then.
            self._drop()
            time.sleep(min(remaining, 0.1))
            return
        except BaseException:
            # Interrupted with an answer outstanding: the next one would read it as its own.
            self._drop()
            raise
        if answer is not None:
            self._tell(answer[1])

    def _tell(self, token: bytes) -> None:
        name, _, end = token.partition(b" ")
        job_id = name.decode()
        with self._condition:
            heard = list(self._subscriptions.get(job_id, ()))
            for subscription in heard:
                subscription.rings += 1
                subscription.end = end or subscription.end
            self._condition.notify_all()
        for subscription in heard:
            if subscription.notify is not None:
                subscription.notify()

    def poke(self, subscription: Subscription) -> None:
        """Has who waits look up, as if the bell had rung for its job."""
        with self._condition:
            subscription.rings += 1
            self._condition.notify_all()
        # The leader hears of it from the bell alone.
        with contextlib.suppress(StoreError):
            self._store.connector.execute("RPUSH", self._store.own_bell(self.name), subscription.job_id, patience=0)

    def close(self) -> None:
        """Ends the wait that is under way, and lets the connection go. The bell can be used again."""
        with self._condition:
            self._closings += 1
            self._condition.notify_all()
            if self._led:
                if self._connection is not None:
                    shut(self._connection)
                self._condition.wait_for(lambda: not self._led, timeout=1)
            if not self._led:
                self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()

    def _ensure_server(self) -> None:
        if self._server is None or not self._server.is_alive():
            self._server = threading.Thread(target=self._serve, name="mlqueue-bell", daemon=True)
            self._server.start()

    def _serve(self) -> None:
        """Leads, as long as coroutines wait."""
        nothing = Subscription("")
        closings = self._closings
        while True:
            with self._condition:
                if not self._asynchronous and self._closings == closings:
                    self._condition.wait(LINGER)
                if not self._asynchronous:
                    self._server = None
                    return
                closings = self._closings
            try:
                self.wait(nothing, 0, time.monotonic() + SLICE)
            except ReferenceError:
                return  # the store is gone, and whoever waited with it


_lock = threading.Lock()


def bell_of(store: Store) -> Bell:
    """The bell of a store in this process; a forked child gets its own."""
    bell: Bell | None = store.__dict__.get("_bell")
    if bell is None or store.__dict__["_bell_pid"] != os.getpid():
        with _lock:
            bell = store.__dict__.get("_bell")
            if bell is None or store.__dict__["_bell_pid"] != os.getpid():
                bell = Bell(store)
                store.__dict__["_bell"] = bell
                store.__dict__["_bell_pid"] = os.getpid()
    return bell


def close_bell(store: Store) -> None:
    """Lets the connection of a store's bell go; the next wait takes another."""
    bell: Bell | None = store.__dict__.get("_bell")
    if bell is not None and store.__dict__["_bell_pid"] == os.getpid():
        bell.close()


def wait_for(store: Store, job_id: str, timeout: float | None = None) -> bool:
    """Waits until a job has ended; False when `timeout` seconds pass first. Raises `JobNotFound`."""
    return wait_for_end(store, job_id, timeout) is not None


def wait_for_end(store: Store, job_id: str, timeout: float | None = None) -> bytes | None:
    """As `wait_for`, but how the job ended as far as the bell told it (see `Subscription.end`), or b""; None when
    `timeout` seconds pass first."""
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    bell = bell_of(store)
    subscription = bell.subscribe(job_id)
    try:
        while True:
            rings = subscription.rings
            if store.watch(job_id, bell.name).ended:
                return b""
            if time.monotonic() >= deadline:
                return None
            bell.wait(subscription, rings, min(deadline, time.monotonic() + LOOK_AGAIN))
            if subscription.end is not None:
                return subscription.end
    finally:
        bell.unsubscribe(subscription)


@contextlib.contextmanager
def listening_async(bell: Bell, job_id: str) -> Iterator[tuple[Subscription, asyncio.Event]]:
    """A subscription for a coroutine, and the event that is set at each ring."""
    loop = asyncio.get_running_loop()
    rung = asyncio.Event()

    def notify() -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody waits any more
            loop.call_soon_threadsafe(rung.set)

    subscription = bell.subscribe(job_id, notify)
    try:
        yield subscription, rung
    finally:
        bell.unsubscribe(subscription)


async def wait_for_async(store: Store, job_id: str) -> None:
    """Waits until a job has ended while the event loop goes on; ``asyncio.timeout`` bounds it. Raises `JobNotFound`."""
    bell = bell_of(store)
    with listening_async(bell, job_id) as (_, rung):
        while True:
            rung.clear()
            state = await asyncio.to_thread(store.watch, job_id, bell.name)
            if state.ended:
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(rung.wait(), LOOK_AGAIN)


def changes(store: Store, job_id: str, timeout: float | None = None) -> Iterator[State]:
    """Yields a job's state now and after each ring, until it has ended or `timeout` seconds have passed."""
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    bell = bell_of(store)
    subscription = bell.subscribe(job_id)
    try:
        while True:
            rings = subscription.rings
            state = store.watch(job_id, bell.name, every_change=True)
            yield state
            if state.ended or time.monotonic() >= deadline:
                return
            bell.wait(subscription, rings, min(deadline, time.monotonic() + LOOK_AGAIN))
    finally:
        bell.unsubscribe(subscription)


__all__ = ["Bell", "bell_of", "changes", "close_bell", "wait_for", "wait_for_async"]
