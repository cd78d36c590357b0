"""A Dramatiq Worker on this broker: fetching, settling, pausing, stopping, dying."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from dramatiq.worker import ConsumerThread
from support import Proxy, StartWorker, children, counting_proxy, eventually, fresh_app

import mlqueue
from mlqueue import MLQ, DeadReason, Settings, State, codec, pump
from mlqueue.job import NewJob, new_id

ROOT = Path(__file__).parent.parent


@pytest.fixture
def proxy(server: Settings) -> Iterator[Proxy]:
    assert server.url is not None
    if server.url.startswith("rediss://"):
        pytest.skip("the proxy that counts cannot read TLS")
    with counting_proxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def counted(proxy: Proxy) -> Iterator[MLQ]:
    """An app whose commands the proxy counts."""
    with fresh_app(Settings.load({}, url=proxy.url)) as app:
        yield app


class Gate:
    """Where jobs of a test wait until they are let through."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()

    def enter(self) -> None:
        self.entered.release()
        assert self._open.wait(20)

    def wait_for(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self.entered.acquire(timeout=10)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


# Round trips


def test_a_submit_is_one_round_trip_and_four_hundred_at_once_are_one_too(counted: MLQ, proxy: Proxy) -> None:
    @counted.actor
    def work(n: int) -> None: ...

    work.submit(0)  # connects, and loads the script
    before = proxy.total
    work.submit(1)
    assert proxy.total - before == 1
    before = proxy.total
    work.submit_many([(n,) for n in range(400)])
    assert proxy.total - before == 1


def test_from_submit_to_a_small_result_a_client_sends_three_commands(
    counted: MLQ, proxy: Proxy, server: Settings, start_worker: StartWorker
) -> None:
    direct = MLQ(counted.name, settings=server)
    try:
        for app in (counted, direct):
            app.actor(lambda n: n, actor_name="work")
        start_worker(direct)
        for n in (None, 0, 7, "x" * 40):
            assert counted.submit("work", n).result(timeout=10) == n  # connects, and loads the scripts
        before = proxy.total
        assert counted.broker.actors["work"].submit("short").result(timeout=10) == "short"
        # submit, watch, and the pop; the bell brings the result. A worker that was faster than the watch makes it two
        # and a reading.
        assert proxy.total - before <= 3
        large = "x" * 1000
        assert counted.broker.actors["work"].submit(large).result(timeout=10) == large
    finally:
        if direct.broker.worker is not None:
            direct.broker.worker.stop(timeout=10_000)
        direct.close()


def test_draining_a_queue_takes_well_under_one_round_trip_a_job(
    counted: MLQ, proxy: Proxy, start_worker: StartWorker
) -> None:
    @counted.actor
    def work(n: int) -> int:
        return n

    work.submit_many([(n,) for n in range(1000)])
    before = proxy.total
    worker = start_worker(counted, threads=8)
    counted.broker.join("default", timeout=20_000)
    joins = (proxy.total - before) / 1000
    worker.stop()
    assert joins < 0.7


def test_an_idle_worker_sends_at_most_one_command_a_second(
    counted: MLQ, proxy: Proxy, start_worker: StartWorker
) -> None:
    for n in range(6):
        counted.actor(lambda: None, actor_name=f"work{n}", queue_name=f"queue{n}")
    start_worker(counted, threads=4)
    counted.submit("work3").result(timeout=10)
    quiet = threading.Event()
    eventually(lambda: _is_quiet(proxy, quiet))
    before, seconds = proxy.total, 6.0
    quiet.wait(seconds)
    assert proxy.total - before <= seconds


def _is_quiet(proxy: Proxy, clock: threading.Event) -> bool:
    before = proxy.total
    clock.wait(0.3)
    return proxy.total == before


def test_submit_to_result_takes_milliseconds_while_all_threads_but_one_run_long_jobs(
    mlq: MLQ, start_worker: StartWorker, gate: Gate
) -> None:
    @mlq.actor
    def long() -> None:
        gate.enter()

    @mlq.actor
    def short(n: int) -> int:
        return n

    start_worker(threads=3)
    long.submit_many([(), ()])
    gate.wait_for(2)
    taken = []
    for n in range(100):
        begun = time.perf_counter()
        assert short.submit(n).result(timeout=10) == n
        taken.append(time.perf_counter() - begun)
        if n % 10 == 0:
            threading.Event().wait(0.05)  # so that the worker falls asleep
    assert sorted(taken)[50] < 0.02
    assert max(taken) < 0.5


def test_a_job_that_ends_makes_room_at_once_for_one_that_waits(mlq: MLQ, start_worker: StartWorker, gate: Gate) -> None:
    @mlq.actor
    def long() -> None:
        gate.enter()

    @mlq.actor
    def short() -> float:
        return time.monotonic()

    start_worker(threads=1)
    long.submit()
    gate.wait_for(1)
    waiting = short.submit()
    threading.Event().wait(0.1)  # long enough for the worker to listen to its own bell alone
    freed = time.monotonic()
    gate.open()
    assert waiting.result(timeout=10) - freed < 0.5
    threading.Event().wait(0.05)  # it sleeps again, and must listen to all bells
    begun = time.monotonic()
    assert short.submit().result(timeout=10) - begun < 0.5


# Many queues, queues that come later


def test_six_queues_in_one_worker_lose_nothing(mlq: MLQ, start_worker: StartWorker) -> None:
    for q in range(6):
        mlq.actor(lambda n: n, actor_name=f"work{q}", queue_name=f"queue{q}")
    messages: list[dramatiq.Message[Any]] = [
        dramatiq.Message(f"queue{q}", f"work{q}", (n,), {}, {}, message_id=new_id())
        for q in range(6)
        for n in range(300)
    ]
    worker = start_worker(threads=8)
    mlq.broker.enqueue_many(messages)
    for q in range(6):
        mlq.broker.join(f"queue{q}", timeout=20_000)
    worker.join()
    counts = {(count.state, count.queue): count.number for count in mlq.store.counts()}
    assert counts == {(State.SUCCEEDED, f"queue{q}"): 300 for q in range(6)}
    assert all(thread.is_alive() for thread in worker.workers)


def test_a_worker_takes_the_queues_that_it_is_told_and_no_others(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="one")
    def one() -> int:
        return 1

    @mlq.actor(queue_name="two")
    def two() -> int:
        return 2

    worker = start_worker(queues={"one"})
    left, ran = two.submit(), one.submit()
    assert ran.result(timeout=10) == 1
    assert left.state is State.QUEUED
    assert list(worker.consumers) == ["one"]


def test_an_actor_declared_while_the_worker_is_idle_is_served_at_once(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor
    def first() -> int:
        return 1

    assert first.submit().result(timeout=10) == 1
    for number in range(3):
        threading.Event().wait(0.05)  # the worker is asleep
        begun = time.monotonic()
        mlq.actor(lambda: 2, actor_name=f"same queue {number}")
        threading.Event().wait(0.05)  # it has looked, and sleeps again
        assert mlq.submit(f"same queue {number}").result(timeout=10) == 2
        mlq.actor(lambda: 3, actor_name=f"new queue {number}", queue_name=f"new{number}")
        threading.Event().wait(0.05)
        assert mlq.submit(f"new queue {number}").result(timeout=10) == 3
        assert time.monotonic() - begun < 1.0


# Pause, resume, join


def test_pausing_commits_what_has_ended_and_takes_nothing_new(mlq: MLQ, start_worker: StartWorker, gate: Gate) -> None:
    @mlq.actor
    def work() -> None:
        gate.enter()

    worker = start_worker(threads=2)
    running = work.submit_many([(), ()])
    gate.wait_for(2)
    begun = time.monotonic()
    pausing = threading.Thread(target=worker.pause)
    pausing.start()
    eventually(lambda: all(thread.paused for thread in worker.workers))
    gate.open()
    pausing.join(10)
    assert time.monotonic() - begun < 2.5
    for job in running:
        assert job.wait(2)
    later = work.submit()
    assert not later.wait(0.3)
    assert later.state is State.QUEUED
    begun = time.monotonic()
    worker.resume()
    assert later.wait(10)
    assert time.monotonic() - begun < 2.0


def test_a_paused_worker_leaves_new_jobs_to_another_one_at_once(
    server: Settings, mlq: MLQ, start_worker: StartWorker
) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    paused = start_worker()
    assert work.submit().result(timeout=10) == 1
    other = MLQ(mlq.name, settings=server)
    other.actor(lambda: 2, actor_name="work")
    start_worker(other)
    threading.Event().wait(0.2)  # both sleep; the one that is paused has waited longer for the bell
    try:
        for _ in range(3):
            paused.pause()
            begun = time.monotonic()
            assert work.submit().result(timeout=10) == 2
            assert time.monotonic() - begun < 3.0  # a bell that is lost costs 5 s
            paused.resume()
            threading.Event().wait(0.03)  # both sleep again
    finally:
        paused.resume()
        other.broker.worker.stop()  # type: ignore[union-attr]
        other.close()


def test_worker_join_returns_after_the_commit(
    mlq: MLQ, worker: dramatiq.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, ran = vars(pump)["send"], []

    def slow(*args: Any) -> Any:
        threading.Event().wait(0.02)
        return send(*args)

    monkeypatch.setattr(pump, "send", slow)

    @mlq.actor
    def work(n: int) -> int:
        ran.append(n)
        return n

    for round_ in range(1, 4):
        jobs = work.submit_many([(n,) for n in range(20)])
        eventually(lambda done=20 * round_: len(ran) == done)  # type: ignore[misc]
        worker.join()
        assert {State.SUCCEEDED} == {job.state for job in jobs}


def test_what_happens_while_the_pump_lies_down_wakes_it(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []

    def hello() -> None:
        mlq.store.start_worker(alone.worker, {}, {})
        told.append(1)
        if len(told) == 2:
            alone.stop_fetching()

    def disturbed() -> float:
        monkeypatch.setattr(alone, "_arm", arm)
        until = arm()
        alone.lanes_changed()  # after it has looked, before it sleeps
        return until

    alone = pump.Pump(mlq.store, lanes=lambda queues: [], hello=hello, deliver=lambda held: pytest.fail("no job"))
    arm = alone._arm
    alone.open("default")
    monkeypatch.setattr(alone, "_arm", disturbed)
    begun = time.monotonic()
    assert alone.next("default", 20, 1) is None
    assert len(told) == 2
    assert time.monotonic() - begun < 2
    alone.close("default")
    alone.end()


def test_the_error_of_a_failed_job_is_kept_when_the_commit_comes_later(
    mlq: MLQ, worker: dramatiq.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    @mlq.actor(max_retries=0)
    def fails(n: int) -> None:
        raise ValueError(f"number {n}")

    jobs = fails.submit_many([(n,) for n in range(50)])
    errors = [job.exception(10) for job in jobs]
    assert [f"ValueError: number {n}" for n in range(50)] == [str(error).partition("(failed): ")[2] for error in errors]


def test_sync_ack_returns_after_the_commit(mlq: MLQ, worker: dramatiq.Worker) -> None:
    acked: dict[str, State] = {}

    class Observer(dramatiq.Middleware):
        def after_ack(self, broker: dramatiq.Broker, message: Any) -> None:
            acked[message.message_id] = mlq.job(message.message_id).state

    mlq.broker.add_middleware(Observer())

    @mlq.actor(sync_ack=True)
    def work() -> None: ...

    jobs = work.submit_many([() for _ in range(20)])
    eventually(lambda: len(acked) == 20)
    assert acked == {job.id: State.SUCCEEDED for job in jobs}


# Stopping


def test_a_stopping_worker_fetches_nothing_more_and_gives_back_what_did_not_start(
    mlq: MLQ, start_worker: StartWorker, gate: Gate
) -> None:
    ran = []

    @mlq.actor
    def work(n: int) -> None:
        ran.append(n)
        gate.enter()

    worker = start_worker(threads=2)
    jobs = work.submit_many([(n,) for n in range(20)])
    gate.wait_for(2)
    stopping = threading.Thread(target=worker.stop)
    stopping.start()
    eventually(lambda: mlq.broker.stopping)
    gate.open()
    stopping.join(10)
    assert sorted(ran) == [0, 1]
    assert [job.state for job in jobs] == ["succeeded"] * 2 + ["queued"] * 18
    assert {job.record.crashes + job.record.stalls + job.record.retries for job in jobs} == {0}
    assert [job.position for job in jobs[2:]] == list(range(18))


def test_what_was_fetched_and_did_not_start_goes_back_with_its_attempt_not_lowered(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    ran = []

    @mlq.actor
    def work() -> None:
        ran.append(1)

    worker = start_worker(threads=2)
    for thread in worker.workers:
        thread.pause()  # consumers go on fetching, for threads that take nothing
        assert thread.paused_event.wait(10)
    job = work.submit()
    eventually(lambda: job.state is State.RUNNING)
    worker.stop()
    record = job.record
    assert ran == []
    assert (record.state, record.attempt, record.stalls, record.crashes) == (State.QUEUED, 1, 0, 0)


def test_a_job_that_is_told_of_the_shutdown_goes_back_without_a_strike(mlq: MLQ, start_worker: StartWorker) -> None:
    running = threading.Event()

    @mlq.actor(notify_shutdown=True, max_retries=0, on_failure="told")
    def work() -> None:
        running.set()
        while True:
            threading.Event().wait(0.005)

    @mlq.actor
    def told(*args: Any) -> None: ...

    worker = start_worker()
    job = work.submit()
    assert running.wait(10)
    worker.stop()
    record = job.record
    assert (record.state, record.retries, record.crashes, record.stalls) == (State.QUEUED, 0, 0, 0)
    assert [record.id for record in mlq.jobs().jobs] == [job.id]


def test_a_worker_can_be_started_and_stopped_again_and_again(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def work(n: int) -> int:
        return n

    for n in range(3):
        worker = start_worker()
        assert work.submit(n).result(timeout=10) == n
        begun = time.monotonic()
        worker.stop()
        assert time.monotonic() - begun < 1.0
    assert mlq.store.workers() == []


def test_a_queue_declared_after_the_stop_starts_no_consumer(mlq: MLQ, start_worker: StartWorker) -> None:
    worker = start_worker()
    worker.stop()
    before = list(worker.consumers)
    mlq.broker.declare_queue("after")
    assert list(worker.consumers) == before
    assert not [thread for thread in threading.enumerate() if isinstance(thread, ConsumerThread)]


def test_stopping_is_quick_with_many_queues_and_a_long_worker_timeout(mlq: MLQ) -> None:
    for n in range(6):
        mlq.actor(lambda: None, actor_name=f"work{n}", queue_name=f"queue{n}")
    mlq.broker.supervise(new_id())
    worker = dramatiq.Worker(mlq.broker, worker_threads=2, worker_timeout=30_000)
    worker.start()
    assert mlq.submit("work1").result(timeout=10) is None
    begun = time.monotonic()
    worker.stop()
    assert time.monotonic() - begun < 1.5


def test_an_embedded_worker_has_a_helper_process_that_ends_with_it(mlq: MLQ, start_worker: StartWorker) -> None:
    before = children()

    @mlq.actor
    def work() -> int:
        return 1

    worker = start_worker(helper=True)
    assert work.submit().result(timeout=10) == 1
    assert len(eventually(lambda: children() - before)) == 1
    worker.stop()
    eventually(lambda: children() <= before)


# What is wrong


def test_an_option_of_a_wrong_type_off_the_wire_makes_that_job_dead_and_harms_no_other(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    @mlq.actor(max_retries=0)
    def fails() -> None:
        raise ValueError

    worker = start_worker(threads=1)
    bodies = [codec.encode([[], {}, {"throws": "ValueError"}]), b"\xc1", codec.encode("no call"), b""]
    bad = [NewJob(id=new_id(), queue="default", actor="fails", body=body) for body in bodies]
    mlq.store.submit(bad)
    after = fails.submit()
    assert after.wait(10)
    records = [mlq.job(job.id).record for job in bad]
    assert [(record.state, record.dead_reason) for record in records] == [(State.DEAD, DeadReason.UNDECODABLE)] * 4
    assert records[0].error is not None
    assert "throws='ValueError'" in records[0].error.message
    assert after.record.dead_reason is DeadReason.FAILED
    assert worker.workers[0].is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_worker_thread_that_dies_is_seen_and_the_worker_takes_no_more(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0, throws="not a class")  # isinstance() in Dramatiq's own code ends the thread
    def kills_its_thread() -> None:
        raise ValueError("the cause")

    @mlq.actor
    def work() -> None: ...

    worker = start_worker(threads=2)
    job = kills_its_thread.submit()
    assert job.wait(10)
    assert (job.state, job.record.dead_reason) == (State.DEAD, DeadReason.FAILED)
    assert mlq.broker.broken.wait(4)
    assert sum(thread.is_alive() for thread in worker.workers) == 1
    later = work.submit()
    assert not later.wait(0.2)
    assert later.state is State.QUEUED


def test_a_result_that_the_store_will_not_take_makes_the_job_dead_as_unstorable_and_no_other(
    mlq: MLQ, start_worker: StartWorker, gate: Gate
) -> None:
    @mlq.actor
    def work(n: int) -> str:
        gate.enter()
        return "x" * 500

    start_worker(threads=3)
    jobs = work.submit_many([(n,) for n in range(3)])
    gate.wait_for(3)
    mlq.client.set(f"{mlq.store.root}:r:{jobs[1].id}", "not a hash")
    gate.open()
    assert all(job.wait(10) for job in jobs)
    assert [job.state for job in jobs] == ["succeeded", "dead", "succeeded"]
    assert jobs[1].record.dead_reason is DeadReason.UNSTORABLE


def test_jobs_are_settled_and_new_ones_fetched_after_the_connection_was_cut(
    mlq: MLQ, worker: dramatiq.Worker, gate: Gate
) -> None:
    @mlq.actor
    def work(n: int) -> int:
        if n == 0:
            gate.enter()
        return n

    assert work.submit(1).result(timeout=10) == 1
    running = work.submit(0)
    gate.wait_for(1)
    for kind in ("normal", "pubsub"):
        mlq.client.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
    gate.open()
    assert running.result(timeout=10) == 0
    assert work.submit(2).result(timeout=10) == 2
    assert running.record.attempt == 1


def test_a_turn_whose_answer_was_lost_is_asked_again_and_loses_and_repeats_nothing(
    mlq: MLQ, worker: dramatiq.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    send, calls, ran = vars(pump)["send"], [], []

    def lossy(connection: Any, command: Any, script: Any = None) -> Any:
        answer = send(connection, command, script)
        calls.append(command)
        if len(calls) % 3 == 0:
            raise redis.ConnectionError("cut after the server had it")
        return answer

    @mlq.actor
    def work(n: int) -> int:
        ran.append(n)
        return n

    monkeypatch.setattr(pump, "send", lossy)
    jobs = work.submit_many([(n,) for n in range(60)])
    assert [job.result(timeout=20) for job in jobs] == list(range(60))
    monkeypatch.undo()
    assert sorted(ran) == list(range(60))
    assert {job.record.attempt for job in jobs} == {1}


# The dramatiq command

MODULE = """
import os, time
import mlqueue
from mlqueue import Settings

mlq = mlqueue.MLQ({name!r}, settings=Settings.load({{}}, url={url!r}))

@mlq.actor(queue_name="one")
def add(a, b):
    return [a + b, os.getpid()]

@mlq.actor(queue_name="two")
def never():
    return "ran"

@mlq.actor(queue_name="one")
def hold():
    job = mlqueue.current_job()
    job.progress(os.getpid())
    if job.attempt == 1:
        time.sleep(60)
    return job.attempt
"""


@contextlib.contextmanager
def dramatiq_command(mlq: MLQ, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    (folder / "jobs_of_the_test.py").write_text(MODULE.format(name=mlq.name, url=mlq.settings.url))
    command = [sys.executable, "-m", "dramatiq", "jobs_of_the_test", "-p", "2", "-t", "2", "-Q", "one"]
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder)))}
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, start_new_session=True)
    assert process.stderr is not None
    reader = threading.Thread(target=process.stderr.read)
    reader.start()
    try:
        yield process
        process.terminate()
        process.wait(20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)
        reader.join(10)
        process.stderr.close()


def test_the_dramatiq_command_is_a_worker_and_a_child_killed_has_its_jobs_recovered(mlq: MLQ, tmp_path: Path) -> None:
    with dramatiq_command(mlq, tmp_path) as process:
        left = mlq.submit("never", queue_name="two")
        jobs = [mlq.submit("add", n, 1, queue_name="one") for n in range(50)]
        assert [job.result(timeout=30)[0] for job in jobs] == [n + 1 for n in range(50)]
        assert left.state is State.QUEUED
        held = mlq.submit("hold")
        pid = eventually(lambda: held.progress)
        assert isinstance(pid, int)
        assert pid != process.pid
        killed_at = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        # Long before the lease of 30 s ends. (The command itself stops its other children when one dies.)
        eventually(lambda: held.state is State.QUEUED or held.record.crashes)
        assert time.monotonic() - killed_at < 10
        assert held.record.crashes == 1


def test_no_worker_thread_needs_the_code_of_a_job_that_waits(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor
    def known() -> int:
        return 1

    unknown = mlq.submit("unknown", queue_name="default")
    assert [known.submit().result(timeout=10) for _ in range(5)] == [1] * 5
    assert unknown.state is State.QUEUED
    assert unknown.position == 0


def test_mlqueue_exports_nothing_that_starts_a_worker_by_itself(mlq: MLQ) -> None:
    mlqueue.instances()
    assert mlq.broker.worker is None
    assert mlq.broker.pump is None


def test_tiny_jobs_are_fetched_ahead_and_leave_when_a_long_one_comes_before_them(
    mlq: MLQ, start_worker: StartWorker, gate: Gate
) -> None:
    other = MLQ(mlq.name, settings=mlq.settings)
    try:
        for app in (mlq, other):
            app.actor(lambda: None, actor_name="tiny")
            app.actor(gate.enter, actor_name="long", max_retries=0)
        start_worker(threads=1)
        for job in mlq.broker.actors["tiny"].submit_many([()] * 300):
            assert job.wait(10)
        long = mlq.submit("long")
        tiny = mlq.broker.actors["tiny"].submit_many([()] * 30)
        gate.wait_for(1)
        # Those that stand behind the long job in its worker go to one that has time for them.
        start_worker(other, threads=1)
        for job in tiny:
            assert job.wait(10)
        assert long.state is State.RUNNING
        gate.open()
        assert long.wait(10)
        assert {(0, 0, 0)} == {(r.crashes, r.stalls, r.retries) for job in tiny for r in [job.record]}
    finally:
        gate.open()
        if other.broker.worker is not None:
            other.broker.worker.stop(timeout=10_000)
        other.close()


def test_jobs_are_fetched_ahead_only_after_many_that_were_tiny() -> None:
    pace = pump.Pace()
    assert pace.ahead(8) == 0
    for _ in range(pump.SEEN_BEFORE_AHEAD - 1):
        pace.ran(0.0001)
    assert pace.ahead(8) == 0
    pace.ran(0.0001)
    assert pace.ahead(8) == pump.MOST_AHEAD
    for _ in range(100):
        pace.ran(0.004)
    assert 0 < pace.ahead(1) <= 3
    pace.ran(1.0)
    assert pace.ahead(8) == 0
    for _ in range(1000):
        pace.ran(pump.TINY * 1.5)
    assert pace.ahead(8) == 0
    pace.forget()
    assert pace.ahead(8) == 0
