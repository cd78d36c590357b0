"""Helpers for testing code that uses mlqueue: a throw-away server, and jobs that run inside the test.

Nothing is faked: jobs are records on a real (embedded) server, and run through the broker and its middleware, so that
what cannot be sent, what is retried and what a job leaves behind is what it would be in production. Plain context
managers, so they serve any test framework. With pytest::

    import pytest
    from mlqueue.testing import drain, eager, isolated

    from myproject.jobs import mlq, train        # mlq = mlqueue.MLQ("vision")

    @pytest.fixture(autouse=True)
    def throw_away_server():
        with isolated(mlq):
            yield

    def test_training_reports_its_accuracy():
        job = train.submit(0.1, epochs=2)
        drain(mlq)
        assert job.result().startswith("accuracy")

    def test_training_is_resumed():
        with eager(mlq):
            assert train.submit(0.1, epochs=2).result()

An actor's function is called directly where no queue is to take part: ``train(0.1, epochs=2)``, or ``train.fn``. Actors
declared on Dramatiq's StubBroker run as Dramatiq's documentation says; they know no `current_job`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import platform
import tempfile
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, cast
from unittest import mock

import dramatiq
import dramatiq.broker
from dramatiq.broker import Consumer, MessageProxy
from dramatiq.worker import ConsumerThread, WorkerThread

from .app import MLQ
from .broker import StoreBroker
from .delivery import Delivery, current_delivery
from .embedded import EmbeddedServer
from .errors import InvalidJob, ResultTimeout
from .events import close_hub
from .job import ENDED, JobRecord, State, seconds
from .message import from_job
from .middleware import AsyncIO
from .pump import Pump
from .settings import Settings
from .store import Connector, Store
from .store.records import CALLBACK, CALLBACKS
from .store.store import Count
from .waiting import close_bell

__all__ = ["drain", "eager", "isolated", "temporary_app", "temporary_server"]

#: How often `drain` looks whether something is left, in seconds.
LOOK_INTERVAL: Final = 0.005

#: How long a throw-away server outlives a test process that was killed, in seconds.
GRACE: Final = 2.0

#: How long jobs that still run have, in milliseconds, when the worker of a test is stopped.
STOP_PATIENCE_MS: Final = 5_000


@contextlib.contextmanager
def temporary_server(**settings: Any) -> Iterator[Settings]:
    """Starts an embedded server in a folder of its own; gives settings with its URL. Both are gone at the end.

    `settings` are further settings by name. The environment is not looked at, so that a test does not depend on it.
    Starting one takes about a tenth of a second: for many tests start one for all, and give each test an app with a
    name of its own: ``MLQ(name, settings=server)``.
    """
    with tempfile.TemporaryDirectory(prefix="mlqueue-", ignore_cleanup_errors=True) as folder:
        given = Settings.load({}, **{"home": Path(folder) / "home", "server_grace": GRACE, **settings, "url": None})
        server = EmbeddedServer(
            given.home, binary=given.server_bin, durability=given.durability, grace=given.server_grace
        )
        try:
            yield Settings.load({}, **{**settings, "home": given.home, "url": server.ensure()})
        finally:
            try:
                server.stop()
            finally:
                server.release()


@contextlib.contextmanager
def temporary_app(name: str = "test", **settings: Any) -> Iterator[MLQ]:
    """An app on a throw-away server of its own (see `temporary_server`); all of it is gone at the end.

    ::

        with temporary_app() as mlq:
            @mlq.actor
            def double(n: int) -> int:
                return 2 * n
            job = double.submit(21)
            drain(mlq)
            assert job.result() == 42

    Dramatiq's global broker is afterwards what it was before.
    """
    before = dramatiq.broker.global_broker
    with temporary_server(**settings) as server:
        app = MLQ(name, settings=server)
        try:
            yield app
        finally:
            _stop_worker(app.broker)
            app.close()
            dramatiq.broker.global_broker = before


@contextlib.contextmanager
def isolated(*apps: MLQ, **settings: Any) -> Iterator[None]:
    """Has apps that exist, with the actors declared on them, use a throw-away server within the ``with`` block.

    So the module of an application needs no change to be tested: whatever store its `MLQ` was made for is not touched,
    and is used again afterwards. `settings` are those of the server; the apps keep their own.
    """
    with temporary_server(**settings) as server, contextlib.ExitStack() as stack:
        for app in apps:
            if app.broker.worker is not None:
                raise InvalidJob(f"{app!r} has a running worker: isolate it before the worker starts.")
            stack.enter_context(_redirected(app.store, server))
            stack.callback(_stop_worker, app.broker)
        yield


@contextlib.contextmanager
def _redirected(store: Store, server: Settings) -> Iterator[None]:
    close_bell(store)
    close_hub(store)
    connector = Connector(server)
    with mock.patch.object(store, "connector", connector):
        try:
            yield
        finally:
            close_bell(store)
            close_hub(store)
            connector.close()


def drain(
    mlq: MLQ,
    queues: Iterable[str] | None = None,
    *,
    timeout: float | timedelta = 60.0,
    threads: int = 1,
    delayed: bool = True,
) -> list[JobRecord]:
    """Runs the jobs that wait, with an embedded worker in this process, until none is left.

    Jobs that these jobs submit run too, callbacks are delivered, and retries of both are not waited for. Jobs of actors
    that this app does not declare are left as they are. Gives the records of the jobs that ended meanwhile, in the
    order of their end; a job that failed is among them (state ``dead``), and no error here.

    Parameters:
      mlq: The app.
      queues: Queues to take jobs from; all that are declared when None.
      timeout: Seconds after which `ResultTimeout` names what is left.
      threads: How many jobs run at a time. With 1 they run in the order in which they wait.
      delayed: Whether jobs submitted with a delay or eta run now. If not they stay scheduled.
    """
    broker, store = mlq.broker, mlq.store
    if broker.worker is not None:
        raise InvalidJob("drain() runs a worker of its own, and this process has one already: stop that one first.")
    limit = seconds(timeout, "timeout") or 0.0
    names = None if queues is None else set(queues)
    if names is not None and not names <= set(broker.queues):
        unknown = ", ".join(sorted(names - set(broker.queues)))
        raise InvalidJob(f"queues={unknown}: no actor of this app uses it; those in use: {', '.join(broker.queues)}.")
    ended_before = {record.id: record.attempt for record in store.scan(states=tuple(ENDED))}
    # With an incarnation that was chosen for it the worker starts no process to beat for it: its turns renew the lease.
    with mock.patch.object(broker, "_worker_id", uuid.uuid4().hex):
        worker = dramatiq.Worker(broker, queues=names, worker_threads=threads, worker_timeout=100)
        worker.start()
        try:
            served = names or set(broker.queues)
            _wait_until_drained(broker, served, delayed, limit)
        finally:
            worker.stop(timeout=STOP_PATIENCE_MS)
    ended = [record for record in store.scan(states=tuple(ENDED)) if ended_before.get(record.id) != record.attempt]
    return sorted(ended, key=lambda record: (record.finished_at or 0.0, record.id))


def _wait_until_drained(broker: StoreBroker, queues: Collection[str], delayed: bool, limit: float) -> None:
    deadline = time.monotonic() + limit
    while True:
        left = [
            count
            for count in broker.store.counts()
            if not count.state.ended and count.actor in broker.actors and count.queue in queues
        ]
        if all(count.state is State.SCHEDULED for count in left):
            seen, hastened = _hasten(broker, queues, delayed=delayed) if left else (0, 0)
            callbacks = 0 if hastened else _hasten_callbacks(broker.store)
            # Of those counted some may have become due, and be on their way, when they are looked at.
            if seen == sum(count.number for count in left) and not hastened and not callbacks:
                return
            left = left or [Count(State.QUEUED, CALLBACKS, CALLBACK, callbacks)]
            if broker.pump is not None:
                broker.pump.lanes_changed()  # to have it look at once
        if time.monotonic() >= deadline:
            what = ", ".join(f"{count.number} {count.state} of {count.actor} in {count.queue}" for count in left)
            raise ResultTimeout(f"drain: after {limit:g} s there are jobs left: {what}. They stay in the store.")
        time.sleep(LOOK_INTERVAL)


def _hasten(broker: StoreBroker, queues: Collection[str], *, delayed: bool) -> tuple[int, int]:
    """Makes scheduled jobs due: those that are retried, and if `delayed` those that never ran. How many scheduled jobs
    there are, and how many of them were made due."""
    store = broker.store
    scheduled = [
        record
        for record in store.scan(states=(State.SCHEDULED,))
        if record.actor in broker.actors and record.queue in queues
    ]
    due = {record.id: 0 for record in scheduled if delayed or record.attempt}
    if due:
        store.connector.client.zadd(f"{store.root}:sched", due, xx=True)
    return len(scheduled), len(due)


def _hasten_callbacks(store: Store) -> int:
    """Makes callbacks due that are tried again later; how many there are that have not been delivered or given up."""
    records = store.page(states=tuple(set(State) - ENDED), queue=CALLBACKS, limit=1000).jobs
    due = {record.id: 0 for record in records if record.state is State.SCHEDULED}
    if due:
        store.connector.client.zadd(f"{store.root}:sched", due, xx=True)
    return len(records)


@contextlib.contextmanager
def eager(mlq: MLQ) -> Iterator[None]:
    """Within the block ``submit`` (``send``, ``run`` of a pipeline ...) returns when the job has ended.

    The job is created in the store, fetched, run in the calling thread through all middleware, and settled, so that its
    record and its result are there at once, as is what it caused: later jobs of a pipeline, callbacks, and its retries,
    whose backoff is not waited for. An error in the job is the job's: ``job.result()`` raises it.

    * Jobs submitted with a delay or eta stay scheduled; `drain` runs them.
    * A job that is submitted by another one runs in a thread of its own while the outer one waits; one that is
      submitted by an async actor runs when that has ended.
    * What waited already runs too, in its turn. Middleware that hooks into the start of workers or threads is not told.
    """
    broker = mlq.broker
    runner = _Eager(broker)
    create = broker._create

    def create_and_run(messages: Sequence[dramatiq.Message[Any]], delay: int | None) -> list[dramatiq.Message[Any]]:
        created = create(messages, delay)
        runner.run(created)
        return created

    loop = AsyncIO()
    loop.before_worker_boot(broker, cast(Any, None))
    try:
        with mock.patch.object(broker, "_create", create_and_run):
            yield
    finally:
        runner.close()
        loop.after_worker_shutdown(broker, cast(Any, None))


class _Eager:
    """Fetches jobs and runs them, in the thread that asks for it."""

    def __init__(self, broker: StoreBroker) -> None:
        self._broker = broker
        self._fetching = threading.Lock()
        self._pump = Pump(
            broker.store,
            lanes=lambda _: broker._lanes(broker.queues),
            hello=self._hello,
            deliver=lambda held: Delivery(from_job(held), held, broker),
        )

    def run(self, created: Sequence[dramatiq.Message[Any]] = ()) -> None:
        """Runs what waits, until nothing is left but jobs with a delay."""
        if getattr(self._broker._local, "settling", None) is not None:
            return  # a hook has enqueued this: it exists when the job that is being settled is
        outer = current_delivery.get()
        if outer is None:
            self._run_all()
        elif not _on_event_loop():
            if outer.held.slots:
                self._lend(outer, created)
            # On this thread's stack it would take the outer job's limits and context from it.
            with ThreadPoolExecutor(1, "mlqueue-eager") as executor:
                executor.submit(self._run_all).result()
            if outer.held.slots:
                self._broker.store.stop_awaiting((outer.held.id, outer.held.attempt))

    def close(self) -> None:
        self._pump.end()

    def _lend(self, outer: Delivery, created: Sequence[dramatiq.Message[Any]]) -> None:
        """The jobs that a job has just submitted run while it waits: they may need the slots that it holds."""
        for message in created:
            self._broker.store.await_job(
                (outer.held.id, outer.held.attempt),
                message.message_id,
                "eager",
                worker=self._pump.worker,
                nonce="",
                may_start=False,
                lanes=[],
            )

    def _run_all(self) -> None:
        while True:
            delivery, scheduled = self._fetch()
            if delivery is not None:
                self._process(delivery)
            elif not scheduled or not _hasten(self._broker, self._broker.queues, delayed=False)[1]:
                return

    def _fetch(self) -> tuple[Delivery | None, bool]:
        pump = self._pump
        with self._fetching:
            while True:
                # One more than those whose calls wait for this one.
                pump._turn(len(pump.in_hand) + 1)
                for ready in pump._ready.values():
                    if ready:
                        return ready.popleft(), True
                if not pump._unsettled:
                    return None, pump._due_at is not None
                pump.commit()  # a job that could not be decoded is dead; look for another one

    def _process(self, delivery: Delivery) -> None:
        broker, timeout = self._broker, 100
        work_queue = cast(Any, _Counted())
        consumer = ConsumerThread(
            broker=broker, queue_name=delivery.queue_name, prefetch=1, work_queue=work_queue, worker_timeout=timeout
        )
        consumer.consumer = _Settling(broker, self._pump)
        thread = WorkerThread(
            broker=broker,
            consumers={delivery.queue_name: consumer},
            work_queue=work_queue,
            worker_timeout=timeout,
        )
        thread.process_message(delivery)  # here: neither thread is started

    def _hello(self) -> None:
        info = {"host": platform.node(), "pid": os.getpid(), "started_at": time.time(), "threads": 1}
        queues = {name: actor.queue_name for name, actor in self._broker.actors.items()}
        self._broker.tell_limits()
        broker = self._broker
        broker.store.start_worker(self._pump.worker, info, queues, broker.published, broker.key_functions)


class _Settling(Consumer):
    """Commits what a job ended with."""

    def __init__(self, broker: StoreBroker, pump: Pump) -> None:
        self._broker = broker
        self._pump = pump

    def ack(self, message: MessageProxy) -> None:
        self._broker.settle(self._pump, cast(Delivery, message))

    nack = ack


class _Counted:
    """What a worker's thread needs of the queue that its jobs come from."""

    def task_done(self) -> None: ...


def _on_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _stop_worker(broker: StoreBroker) -> None:
    if broker.worker is not None:
        broker.worker.stop(timeout=STOP_PATIENCE_MS)
