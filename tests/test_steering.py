"""What happens to jobs beside their own work: timeouts bound, lanes unserved, answers and bells lost, strikes."""

from __future__ import annotations

import asyncio
import multiprocessing
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from support import StartWorker, eventually

from mlqueue import MLQ, JobCancelled, State, current_job
from mlqueue.job import DeadReason
from mlqueue.store import Held, Store, Turn
from mlqueue.store.scripts import script


class Crew:
    """A worker's hands: its turns, without its threads."""

    def __init__(self, store: Store, *lanes: tuple[str, str]) -> None:
        self.store = store
        self.id = uuid.uuid4().hex
        self.lanes = lanes
        self.hello()

    def hello(self) -> None:
        self.store.start_worker(self.id, {"functions": [], "function_queues": ["default"]}, {})

    def turn(self, want: int = 1, nonce: str | None = None) -> Turn:
        command = self.store.turn_command(self.id, nonce or uuid.uuid4().hex, want, self.lanes, [])
        return self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))

    def crash(self) -> dict[str, str]:
        outcomes = self.store.release(self.id, "crash", "killed")
        self.hello()
        return outcomes

    def waits(self, held: Held, target: str, nonce: str = "n") -> list[Held]:
        return self.store.await_job(
            (held.id, held.attempt), target, "bell", worker=self.id, nonce=nonce, may_start=True, lanes=self.lanes
        ).jobs


@pytest.fixture
def store(mlq: MLQ) -> Store:
    return mlq.store


def test_a_list_of_functions_is_known_as_long_as_a_job_waits_to_be_run_alone(mlq: MLQ, store: Store) -> None:
    mlq.post("x", functions=["f"])
    crew = Crew(store, store.lane("default", "mlqueue.listener", ["f"]))
    for _ in range(2):
        assert len(crew.turn().jobs) == 1
        crew.crash()
    store.sweep("s", 0)
    assert [functions for _, _, functions in store.function_lanes()] == [("f",)]


def test_a_delayed_job_of_unknown_functions_waits_its_time_from_when_it_is_due(mlq: MLQ, store: Store) -> None:
    Crew(store)
    early, late = mlq.post("early", functions=["größe"]), mlq.post("late", functions=["größe"], delay=0.01)
    client, root = store.connector.client, store.root
    eventually(lambda: store.sweep("s", 0) and mlq.job(late).state is State.QUEUED)
    hour_ago = (int(time.time()) - 3600) * 1000
    for job_id in (early, late):
        client.hset(f"{root}:j:{job_id}", "t", hour_ago)
    client.hset(f"{root}:unserved", "default:mlqueue.listener|gr%C3%B6%C3%9Fe", hour_ago)
    eventually(lambda: store.sweep("s", 0) and mlq.job(early).state is State.DEAD)
    record = mlq.job(early).record
    assert record.dead_reason is DeadReason.UNKNOWN_FUNCTION
    assert "größe" in str(record.error and record.error.message)
    assert mlq.job(late).state is State.QUEUED


def test_a_longer_timeout_does_not_take_a_shorter_one_away(mlq: MLQ, store: Store) -> None:
    job = mlq.submit("work")
    crew = Crew(store, store.lane("default", "work"))
    crew.turn()
    store.bind_timeout("short", 1, 5, 60)
    before = store.connector.client.zscore(f"{store.root}:late", job.id)
    store.bind_timeout("long", 300, 5, 60)
    assert before == store.connector.client.zscore(f"{store.root}:late", job.id)


def test_who_only_waits_takes_the_strike_when_nobody_else_ran(mlq: MLQ, store: Store) -> None:
    waiter, other = mlq.submit("work"), mlq.submit("elsewhere")
    crew = Crew(store, store.lane("default", "work"))
    for crashes in (1, 2, 3):
        [held] = crew.turn().jobs
        assert crew.waits(held, other.id) == []
        crew.crash()
        assert waiter.record.crashes == crashes
    assert waiter.record.dead_reason is DeadReason.CRASHED


def test_an_answer_that_was_lost_gives_no_later_attempt(mlq: MLQ, store: Store) -> None:
    waiter, target = mlq.submit("work"), mlq.submit("other")
    crew = Crew(store, store.lane("default", "work"), store.lane("default", "other"))
    [held] = crew.turn().jobs
    assert held.id == waiter.id
    assert [(job.id, job.attempt) for job in crew.waits(held, target.id, "lost")] == [(target.id, 1)]
    store.release(crew.id, "stall", "partition")
    crew.hello()
    nonce = uuid.uuid4().hex
    assert {(job.id, job.attempt) for job in crew.turn(2, nonce).jobs} == {(waiter.id, 2), (target.id, 2)}
    assert crew.waits(held, target.id, "lost") == []
    # The same of a turn.
    store.release(crew.id, "stall", "partition")
    crew.hello()
    assert {job.attempt for job in crew.turn(2).jobs} == {3}
    assert crew.turn(2, nonce).jobs == []


def test_an_older_attempt_that_ends_its_wait_does_not_end_that_of_a_later_one(mlq: MLQ, store: Store) -> None:
    waiter, other = mlq.submit("work"), mlq.submit("elsewhere")
    crew = Crew(store, store.lane("default", "work"))
    [old] = crew.turn().jobs
    crew.waits(old, other.id)
    crew.crash()
    [new] = crew.turn().jobs
    crew.waits(new, other.id)
    store.stop_awaiting((old.id, old.attempt))
    assert waiter.record.waits_for == other.id
    store.stop_awaiting((new.id, new.attempt))
    assert waiter.record.waits_for is None


def test_forgetting_what_waits_leaves_callbacks_to_be_delivered(mlq: MLQ, store: Store) -> None:
    job_id = mlq.post("x", callback="http://example.org/")
    mlq.job(job_id).cancel()
    mlq.submit("work")
    assert store.flush() == 1
    [callback] = store.page(queue="mlqueue.callbacks").jobs
    assert callback.parent == job_id


def test_a_second_start_has_reported_nothing_yet(mlq: MLQ, start_worker: StartWorker) -> None:
    seen: list[Any] = []

    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def works() -> None:
        job = current_job()
        seen.append(mlq.job(job.id).progress)
        job.progress(80)
        if job.attempt == 1:
            raise ValueError

    start_worker(threads=1)
    works.submit().result(timeout=20)
    assert seen == [None, None]


def test_the_clock_stands_still_until_the_last_of_several_waits_has_ended(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def sleeps(seconds: float) -> float:
        time.sleep(seconds)
        return seconds

    @mlq.actor(time_limit=500, max_retries=0)
    async def parent() -> list[float]:
        return list(await asyncio.gather(sleeps.submit(0.05), sleeps.submit(1.2)))

    start_worker(threads=3)
    assert parent.submit().result(timeout=20) == [0.05, 1.2]


def test_waits_that_are_given_up_lend_nothing_for_ever(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="never")
    def never() -> None: ...

    @mlq.actor
    async def parent(job_id: str) -> int:
        given_up = 0
        for pause in range(30):
            try:
                await asyncio.wait_for(mlq.job(job_id)._await(), 0.001 * pause)
            except TimeoutError:
                given_up += 1
        return given_up

    start_worker(threads=1, queues={"default"})
    job = parent.submit(never.submit().id)
    assert job.result(timeout=30) == 30
    assert job.record.waits_for is None
    beside = mlq.broker.beside
    assert beside is not None
    eventually(lambda: beside.lent == 0)


def test_a_cancelling_whose_bell_is_lost_is_heard_all_the_same(mlq: MLQ, start_worker: StartWorker) -> None:
    begun = threading.Event()

    @mlq.actor
    def works() -> None:
        begun.set()
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)

    start_worker(threads=1)
    job = works.submit()
    assert begun.wait(10)
    pump = mlq.broker.pump
    assert pump is not None
    eventually(lambda: pump._armed == "own")
    # The connection of the bell breaks just when it rings: the token is gone.
    pump._bell._sock.shutdown(2)
    job.cancel()
    mlq.client.delete(mlq.store.own_bell(pump.worker))
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert job.record.cancel_stage == "raised"


def test_a_job_that_outlives_the_wait_for_it_ends_before_its_worker(mlq: MLQ, start_worker: StartWorker) -> None:
    begun, gate = threading.Event(), threading.Event()

    @mlq.actor
    def child() -> str:
        begun.set()
        gate.wait(20)
        return "well"

    @mlq.actor
    def parent() -> str:
        job = child.submit()
        assert not job.wait(timeout=0.01)
        return job.id

    worker = start_worker(threads=1)
    job = mlq.job(parent.submit().result(timeout=20))
    assert begun.wait(10)
    stopper = threading.Thread(target=worker.stop, kwargs={"timeout": 10_000})
    stopper.start()
    gate.set()
    stopper.join(20)
    assert (job.state, job.record.attempt) == (State.SUCCEEDED, 1)


def test_a_process_that_a_job_forks_waits_without_its_worker(
    mlq: MLQ, start_worker: StartWorker, tmp_path: Path
) -> None:
    @mlq.actor
    def child() -> str:
        return "child"

    @mlq.actor
    def parent() -> str:
        job = child.submit()

        def wait() -> None:
            (tmp_path / "result").write_text(str(mlq.job(job.id).result(timeout=20)))

        process = multiprocessing.get_context("fork").Process(target=wait)
        process.start()
        process.join(20)
        return job.id

    start_worker(threads=2)
    job = mlq.job(parent.submit().result(timeout=30))
    assert job.result(timeout=10) == "child"
    assert (tmp_path / "result").read_text() == "child"
