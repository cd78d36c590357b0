"""mlqueue.testing: what users test their own code with."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import dramatiq
import dramatiq.broker
import pytest
from dramatiq.brokers.stub import StubBroker
from receivers import receiver
from support import fresh_app

import mlqueue
from mlqueue import MLQ, Settings, State
from mlqueue.job import CallbackState
from mlqueue.testing import drain, eager, isolated, temporary_app, temporary_server


def test_a_temporary_app_runs_on_a_server_of_its_own_that_is_gone_afterwards() -> None:
    before = dramatiq.broker.global_broker
    with temporary_app() as mlq:

        @mlq.actor
        def double(n: int) -> int:
            return 2 * n

        job = double.submit(21)
        drain(mlq)
        assert job.result(timeout=0) == 42
        home = mlq.settings.home
        socket = mlq.client.connection_pool.connection_kwargs["path"]
        assert home is not None
        assert Path(socket).exists()
    assert not Path(socket).exists()
    assert not Path(home).exists()
    assert dramatiq.broker.global_broker is before


def test_the_environment_does_not_reach_a_temporary_app(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLQUEUE_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("MLQUEUE_MAX_RETRIES", "17")
    with temporary_app("mine", lease=7) as mlq:
        assert mlq.client.ping()
        assert (mlq.name, mlq.settings.max_retries, mlq.settings.lease) == ("mine", 3, 7.0)


def test_two_temporary_servers_do_not_see_each_other() -> None:
    with temporary_server() as one, temporary_server() as other:
        assert one.url != other.url


def test_an_isolated_app_leaves_its_own_store_alone_and_returns_to_it(server: Settings, mlq: MLQ) -> None:
    @mlq.actor
    def add(a: int, b: int) -> int:
        return a + b

    outside = add.submit(1, 2)
    with isolated(mlq):
        inside = add.submit(3, 4)
        assert [record.id for record in drain(mlq)] == [inside.id]
        with pytest.raises(mlqueue.JobNotFound):
            _ = outside.state
    assert outside.state is State.QUEUED
    with pytest.raises(mlqueue.JobNotFound):
        _ = inside.state


def test_drain_runs_jobs_their_children_and_their_retries_without_waiting_for_the_backoff(mlq: MLQ) -> None:
    seen = []

    @mlq.actor(max_retries=2, min_backoff=3_600_000)
    def flaky(n: int) -> int:
        seen.append((n, mlqueue.current_job().attempt))
        if mlqueue.current_job().attempt < 3:
            raise ValueError(n)
        child.submit(n)
        return n

    @mlq.actor
    def child(n: int) -> int:
        return -n

    flaky.submit(1)
    flaky.with_options(delay=3600).submit(2)
    ended = drain(mlq, timeout=20)
    assert [(1, 1), (1, 2), (1, 3)] == [item for item in seen if item[0] == 1]
    assert [(2, 1), (2, 2), (2, 3)] == [item for item in seen if item[0] == 2]
    assert sorted((record.actor, record.short_result) for record in ended) == [
        ("child", -2),
        ("child", -1),
        ("flaky", 1),
        ("flaky", 2),
    ]
    assert {State.SUCCEEDED} == {record.state for record in ended}
    assert drain(mlq) == []


def test_drain_gives_dead_jobs_too_in_the_order_of_their_end(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def may_fail(fail: bool) -> None:
        if fail:
            raise ValueError("told to")

    jobs = may_fail.submit_many([(True,), (False,), (True,)])
    ended = drain(mlq)
    assert [(job.id, state) for job, state in zip(jobs, ["dead", "succeeded", "dead"], strict=True)] == [
        (record.id, record.state) for record in ended
    ]


def test_drain_delivers_callbacks_and_their_retries(server: Settings) -> None:
    with fresh_app(dataclasses.replace(server, callback_allow="loopback")) as mlq, receiver(500, 200) as hook:

        @mlq.actor
        def work(n: int) -> int:
            return n

        jobs = [work.submit(n, callback=hook.url) for n in range(3)]
        drain(mlq)
        told = [(job.record.callback_state, len(job.record.callback_attempts)) for job in jobs]
        assert told == [(CallbackState.DELIVERED, 2)] * 3
        assert drain(mlq) == []


def test_drain_takes_one_queue_and_leaves_jobs_of_unknown_actors_and_if_told_those_with_a_delay(mlq: MLQ) -> None:
    @mlq.actor
    def here() -> None: ...

    @mlq.actor(queue_name="other")
    def there() -> None: ...

    left = [there.submit(), mlq.submit("nobody_knows"), here.with_options(delay=3600).submit()]
    ran = here.submit()
    assert [record.id for record in drain(mlq, ["default"], delayed=False)] == [ran.id]
    assert [job.state for job in left] == ["queued", "queued", "scheduled"]


def test_drain_says_what_is_left_when_its_time_is_over(mlq: MLQ) -> None:
    go_on = threading.Event()

    @mlq.actor
    def stuck() -> None:
        go_on.wait(30)

    stuck.submit()
    threading.Timer(1.0, go_on.set).start()
    with pytest.raises(mlqueue.ResultTimeout, match="1 running of stuck in default"):
        drain(mlq, timeout=0.3)


def test_drain_refuses_an_unknown_queue_and_a_process_with_a_worker(mlq: MLQ, worker: dramatiq.Worker) -> None:
    with pytest.raises(mlqueue.InvalidJob, match="has one already"):
        drain(mlq)
    worker.stop()
    with pytest.raises(mlqueue.InvalidJob, match="queues=nowhere"):
        drain(mlq, ["nowhere"])


def test_eager_submit_runs_the_job_in_this_thread_and_leaves_its_record(mlq: MLQ) -> None:
    ran_in = []

    @mlq.actor
    def add(a: int, b: int) -> int:
        job = mlqueue.current_job()
        ran_in.append(threading.current_thread())
        job.progress(50, "half")
        return a + b

    with eager(mlq):
        job = add.submit(1, 2)
        assert ran_in == [threading.current_thread()]
        record = job.record
    assert (record.state, record.short_result, record.progress, record.attempt) == (State.SUCCEEDED, 3, 50, 1)
    queued = add.submit(1, 2)
    assert queued.state is State.QUEUED


def test_eager_runs_retries_at_once_and_keeps_the_error_of_a_job_that_fails(mlq: MLQ) -> None:
    attempts = []

    @mlq.actor(max_retries=2, min_backoff=3_600_000)
    def fails() -> None:
        attempts.append(mlqueue.current_job().attempt)
        raise LookupError("nothing there")

    with eager(mlq):
        job = fails.submit()
    assert attempts == [1, 2, 3]
    with pytest.raises(mlqueue.JobFailed, match="LookupError: nothing there"):
        job.result(timeout=0)


def test_eager_runs_what_a_job_submits_and_the_pipeline_it_stands_in(mlq: MLQ) -> None:
    @mlq.actor
    def outer(n: int) -> int:
        me = mlqueue.current_job().id
        inner_result = add.submit(n, 1).result(timeout=0)
        assert mlqueue.current_job().id == me
        return inner_result

    @mlq.actor
    def add(a: int, b: int) -> int:
        return a + b

    @mlq.actor
    async def increment(n: int) -> int:
        return n + 1

    with eager(mlq):
        assert outer.submit(4).result(timeout=0) == 5
        pipe = dramatiq.pipeline(
            [add.message(1, 2), *(increment.message_with_options() for _ in range(2))], broker=mlq.broker
        )
        assert pipe.run().get_result() == 5


def test_eager_leaves_jobs_with_a_delay_scheduled(mlq: MLQ) -> None:
    @mlq.actor
    def later() -> int:
        return 1

    with eager(mlq):
        job = later.with_options(delay=3600).submit()
        assert job.state is State.SCHEDULED
    drain(mlq)
    assert job.result(timeout=0) == 1


def test_an_eager_job_whose_message_cannot_be_read_is_dead(mlq: MLQ) -> None:
    @mlq.actor
    def add(a: int) -> int:
        return a

    job = add.submit(1)
    mlq.client.hset(f"{mlq.store.root}:j:{job.id}", "b", b"\xc1")
    with eager(mlq):
        assert add.submit(2).result(timeout=0) == 2
        assert job.record.dead_reason == "undecodable"


def test_an_actor_on_a_stub_broker_is_tested_as_dramatiq_says() -> None:
    broker = StubBroker()
    done = []

    @dramatiq.actor(broker=broker)
    def work(n: int) -> None:
        done.append(n)
        with pytest.raises(mlqueue.NoCurrentJob):
            mlqueue.current_job()

    worker = dramatiq.Worker(broker, worker_timeout=100)
    worker.start()
    try:
        work.send(1)
        broker.join(work.queue_name)
        worker.join()
    finally:
        worker.stop()
        broker.close()
    assert done == [1]


def test_importing_mlqueue_does_not_import_its_testing_helpers() -> None:
    code = "import sys, mlqueue; sys.exit('mlqueue.testing' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": os.getcwd()}).returncode == 0
