"""The job seen from inside: progress, checkpoints, draining, data."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import dramatiq
import numpy as np
import pytest
from support import StartWorker, eventually

import mlqueue
from mlqueue import MLQ, JobFailed, NoCurrentJob, State, current_job
from mlqueue.testing import drain


def test_there_is_no_current_job_outside_of_one(mlq: MLQ) -> None:
    with pytest.raises(NoCurrentJob, match="works inside an actor"):
        current_job()

    @mlq.actor
    def work() -> None:
        with pytest.raises(NoCurrentJob):
            current_job()

    work()


def test_a_job_knows_who_it_is(mlq: MLQ) -> None:
    seen: list[Any] = []

    @mlq.actor(queue_name="own", max_retries=1)
    def child() -> None:
        job = current_job()
        seen.append((job.id, job.attempt, job.retries, job.actor_name, job.queue_name, job.parent))
        assert current_job() is job
        if job.attempt == 1:
            raise ValueError

    @mlq.actor
    def parent() -> str:
        return child.submit().id

    job = parent.submit()
    drain(mlq)
    child_id = job.result(timeout=0)
    assert seen == [(child_id, 1, 0, "child", "own", job.id), (child_id, 2, 1, "child", "own", job.id)]
    assert mlq.job(child_id).record.parent == job.id


def test_an_actor_that_calls_another_one_directly_is_still_the_current_job(mlq: MLQ) -> None:
    @mlq.actor
    def inner() -> str:
        return current_job().actor_name

    @mlq.actor
    def outer() -> str:
        return inner() + "!"

    job = outer.submit()
    drain(mlq)
    assert job.result(timeout=0) == "outer!"


def test_a_thread_of_a_finished_job_can_do_no_harm(mlq: MLQ) -> None:
    kept = []

    @mlq.actor
    def work() -> int:
        kept.append(current_job())
        return 1

    job = work.submit()
    drain(mlq)
    with pytest.raises(mlqueue.StaleAttempt):
        kept[0].save_checkpoint(1)
    kept[0].progress(99)
    assert (job.state, job.progress) == (State.SUCCEEDED, None)


# Progress


@pytest.fixture
def touches(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    touch = mlq.store.touch

    def counting(items: Any) -> list[int]:
        calls.append(len(items))
        return touch(items)

    monkeypatch.setattr(mlq.store, "touch", counting)
    return calls


def test_the_first_report_is_written_at_once_later_ones_are_gathered_and_the_last_arrives(
    mlq: MLQ, worker: dramatiq.Worker, touches: list[int]
) -> None:
    first: list[Any] = []

    @mlq.actor
    def work() -> None:
        job = current_job()
        job.progress(0, "begun")
        first.append(mlq.job(job.id).progress)
        for n in range(1, 1001):
            job.progress(n / 10, f"step {n}")

    job = work.submit()
    assert job.wait(10)
    assert first == [0]
    assert len(touches) < 10
    record = job.record
    assert (record.progress, record.progress_note) == (100.0, "step 1000")


def test_progress_is_seen_while_the_job_runs(mlq: MLQ, worker: dramatiq.Worker) -> None:
    go_on = threading.Event()

    @mlq.actor
    def work() -> None:
        current_job().progress(1)
        current_job().progress(2, "two")
        assert go_on.wait(10)

    job = work.submit()
    eventually(lambda: job.progress == 2)
    assert job.state is State.RUNNING
    go_on.set()
    assert job.wait(10)


def test_the_progress_of_a_job_that_fails_is_kept(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def work() -> None:
        for n in range(5):
            current_job().progress(n)
        raise ValueError

    job = work.submit()
    drain(mlq)
    assert (job.state, job.progress) == (State.DEAD, 4)


@pytest.mark.parametrize(
    ("reported", "kept"),
    [
        (3, 3),
        (0.25, 0.25),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (True, 1),
        ("loading", "loading"),
        (10**30, str(10**30)),
        ([1, 2], "[1, 2]"),
        ("x" * 5000, "x" * 1000),
        ("\ud800", "?"),
    ],
)
def test_numbers_stay_numbers_and_anything_else_becomes_text(mlq: MLQ, reported: object, kept: object) -> None:
    @mlq.actor
    def work() -> None:
        current_job().progress(reported)

    job = work.submit()
    drain(mlq)
    assert (type(job.progress), job.progress) == (type(kept), kept)


def test_progress_that_cannot_be_written_is_no_error_in_the_job(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(items: Any) -> list[int]:
        raise mlqueue.StoreFull

    monkeypatch.setattr(mlq.store, "touch", refuse)

    @mlq.actor
    def work() -> int:
        current_job().progress(1)
        return 1

    job = work.submit()
    drain(mlq)
    assert job.result(timeout=0) == 1


def test_track_yields_the_items_and_reports_percent(mlq: MLQ) -> None:
    seen: list[str] = []

    @mlq.actor
    def sized() -> None:
        seen.extend(current_job().track(["a", "b", "c", "d"], note="letters"))

    @mlq.actor
    def unsized(total: int | None) -> None:
        def numbers() -> Iterator[int]:
            yield from range(10)

        for _ in current_job().track(numbers(), total):
            pass

    jobs = [sized.submit(), unsized.submit(None), unsized.submit(20)]
    drain(mlq)
    assert seen == ["a", "b", "c", "d"]
    assert jobs[0].progress == 100.0
    assert jobs[0].record.progress_note == "letters"
    assert [job.progress for job in jobs[1:]] == [10, 50.0]


# Checkpoints


def test_a_checkpoint_survives_a_retry_and_is_dropped_on_success(mlq: MLQ) -> None:
    loaded: list[Any] = []

    @mlq.actor(max_retries=2)
    def train() -> str:
        job = current_job()
        state = job.load_checkpoint()
        loaded.append(state)
        job.save_checkpoint({"epoch": job.attempt, "w": np.full(3, job.attempt)})
        if job.attempt < 3:
            raise ValueError
        return "done"

    job = train.submit()
    drain(mlq)
    assert job.result(timeout=0) == "done"
    assert loaded[0] is None
    assert [state["epoch"] for state in loaded[1:]] == [1, 2]
    np.testing.assert_array_equal(np.full(3, 2), loaded[2]["w"])
    assert not job.record.has_checkpoint
    assert list(mlq.client.scan_iter(f"{mlq.store.root}:ck:*")) == []


def test_a_checkpoint_survives_a_crash(mlq: MLQ, start_worker: StartWorker) -> None:
    saved, go_on = threading.Event(), threading.Event()

    @mlq.actor
    def train() -> Any:
        job = current_job()
        if job.attempt == 1:
            job.save_checkpoint([1, 2, 3])
            saved.set()
            assert go_on.wait(10)
            return "too late"
        return job.load_checkpoint()

    start_worker(threads=2)
    job = train.submit()
    assert saved.wait(10)
    assert job.record.has_checkpoint
    assert mlq.broker.pump is not None
    mlq.store.release(mlq.broker.pump.worker, "crash", "killed by signal 9")
    assert job.result(timeout=10) == [1, 2, 3]
    go_on.set()
    mlq.broker.worker.join()  # type: ignore[union-attr]
    assert job.result(timeout=0) == [1, 2, 3]
    assert (job.record.attempt, job.record.crashes) == (2, 1)


def test_a_checkpoint_may_have_twenty_megabytes_and_leaves_nothing(mlq: MLQ) -> None:
    big = np.random.default_rng(1).integers(0, 255, 20_000_000, dtype=np.uint8)
    same = []

    @mlq.actor(max_retries=1)
    def train() -> None:
        job = current_job()
        if job.attempt == 1:
            job.save_checkpoint(np.zeros(9_000_000, np.uint8))
            job.save_checkpoint({"w": big})
            raise ValueError
        same.append(bool((job.load_checkpoint()["w"] == big).all()))

    train.submit()
    drain(mlq)
    assert same == [True]
    assert list(mlq.client.scan_iter(f"{mlq.store.root}:x:*")) == []


def test_a_checkpoint_that_cannot_be_kept_is_an_error_with_its_path(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def train() -> None:
        current_job().save_checkpoint({"model": object()})

    job = train.submit()
    drain(mlq)
    with pytest.raises(JobFailed, match=r"EncodeError: checkpoint\['model'\]"):
        job.result(timeout=0)


# Draining


def test_a_job_that_sees_the_worker_stop_saves_returns_and_goes_back_without_a_strike(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    running = threading.Event()

    @mlq.actor
    def train() -> str | None:
        job = current_job()
        epoch = job.load_checkpoint() or 0
        while epoch < 1_000_000:
            epoch += 1
            running.set()
            if job.attempt == 2:
                return f"resumed at {epoch}"
            if job.stopping:
                job.save_checkpoint(epoch)
                return None
            threading.Event().wait(0.005)
        return "never"

    worker = start_worker()
    job = train.submit()
    assert running.wait(10)
    begun = time.monotonic()
    worker.stop()
    assert time.monotonic() - begun < 2
    record = job.record
    assert (record.state, record.attempt, record.has_checkpoint) == (State.QUEUED, 1, True)
    assert (record.crashes, record.stalls, record.retries, record.attempts) == (0, 0, 0, ())
    start_worker()
    result = job.result(timeout=10)
    assert result is not None
    assert result.startswith("resumed at ")
    assert result != "resumed at 1"


def test_a_job_that_does_not_look_ends_as_ever_while_the_worker_stops(mlq: MLQ, start_worker: StartWorker) -> None:
    running = threading.Event()

    @mlq.actor
    def work() -> None:
        running.set()
        threading.Event().wait(0.2)

    worker = start_worker()
    job = work.submit()
    assert running.wait(10)
    worker.stop()
    assert job.state is State.SUCCEEDED


def test_hand_back_ends_the_attempt_without_a_strike(mlq: MLQ, worker: dramatiq.Worker) -> None:
    after = []

    @mlq.actor(max_retries=0)
    def work() -> int:
        job = current_job()
        if job.attempt < 3:
            job.hand_back()
            after.append("not reached")
        return job.attempt

    @mlq.actor(max_retries=0)
    async def async_work() -> int:
        job = current_job()
        if job.attempt < 3:
            raise mlqueue.HandBack
        return job.attempt

    jobs = [work.submit(), async_work.submit()]
    assert [job.result(timeout=10) for job in jobs] == [3, 3]
    assert after == []
    assert [(job.record.retries, job.record.crashes, job.record.stalls) for job in jobs] == [(0, 0, 0)] * 2


# Data, cancelling


def test_jobs_keep_data_for_each_other(mlq: MLQ) -> None:
    found: list[bytes | None] = []

    @mlq.actor
    def put() -> list[str]:
        job = current_job()
        return [
            job.store_data("text: ä"),
            job.store_data(b"\0\xff", key="my key:{1}"),
            job.store_data("gone", "short", expiry=0.001),
        ]

    @mlq.actor
    def get(keys: list[str]) -> None:
        for key in [*keys, "unknown"]:
            found.append(current_job().fetch_data(key))

    keys = put.submit()
    drain(mlq)
    eventually(lambda: mlq.store.get_data("short") is None)
    get.submit(keys.result(timeout=0))
    drain(mlq)
    assert keys.result(timeout=0)[1:] == ["my key:{1}", "short"]
    assert found == ["text: ä".encode(), b"\0\xff", None, None]


def test_data_of_a_wrong_type_is_refused(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def put() -> None:
        current_job().store_data({"a": 1})  # type: ignore[arg-type]

    job = put.submit()
    drain(mlq)
    with pytest.raises(JobFailed, match="give a str or bytes"):
        job.result(timeout=0)


def test_a_running_job_hears_that_it_is_cancelled_and_ends_cancelled(mlq: MLQ, worker: dramatiq.Worker) -> None:
    running = threading.Event()

    @mlq.actor
    def work() -> str:
        running.set()
        while not current_job().cancelled:
            threading.Event().wait(0.005)
        return "returned"

    job = work.submit()
    assert running.wait(10)
    assert job.cancel() is State.RUNNING
    assert job.wait(10)
    assert job.state is State.CANCELLED
    with pytest.raises(mlqueue.JobCancelled):
        job.result(timeout=0)
