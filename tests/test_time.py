"""Limits of time that need no process to be killed: how long a job may wait, and more time for one that runs."""

from __future__ import annotations

import contextlib
import threading
import time
from datetime import timedelta

import pytest
from support import StartWorker, eventually

from mlqueue import (
    MLQ,
    Cancelled,
    DeadReason,
    InvalidJob,
    InvalidTransition,
    JobFailed,
    StaleAttempt,
    State,
    current_job,
)
from mlqueue.testing import drain


def sweep(mlq: MLQ) -> dict[str, str]:
    return mlq.store.sweep("test", 0).released


def hurry(mlq: MLQ) -> list[str]:
    """The jobs whose queue timeout runs."""
    return [job_id.decode() for job_id in mlq.client.zrange(f"{mlq.store.root}:qt", 0, -1)]


# How long a job may wait


def test_a_job_that_has_not_begun_in_time_is_dead_though_no_worker_is_there(mlq: MLQ) -> None:
    @mlq.actor(queue_timeout=timedelta(milliseconds=50))
    def work() -> None: ...

    job = work.submit()
    patient = work.submit(queue_timeout=3600)
    assert job.record.queue_timeout == 0.05
    eventually(lambda: sweep(mlq) and job.state is State.DEAD)
    record = job.record
    assert (record.dead_reason, record.attempt) == (DeadReason.EXPIRED, 0)
    assert record.error is not None
    assert record.error.message == "it has not begun within its queue_timeout of 0.05 s"
    with pytest.raises(JobFailed, match=r"dead \(expired\)"):
        job.result(timeout=1)
    assert (patient.state, hurry(mlq)) == (State.QUEUED, [patient.id])
    assert [letter.id for letter in mlq.dead_letters.list(reason="expired").letters] == [job.id]


def test_its_time_is_over_before_a_worker_comes(mlq: MLQ, start_worker: StartWorker) -> None:
    ran: list[int] = []

    @mlq.actor
    def work(n: int) -> None:
        ran.append(n)

    late = [work.submit(n, queue_timeout=0.02) for n in range(3)]
    last = work.submit(3, queue_timeout=60)
    threading.Event().wait(0.03)
    start_worker()
    last.result(timeout=10)
    assert ran == [3]
    # By the worker's turn; nobody has swept.
    assert {job.record.dead_reason for job in late} == {DeadReason.EXPIRED}
    assert hurry(mlq) == []


@pytest.mark.parametrize("in_turn", [False, True])
def test_a_job_whose_time_is_over_keeps_nobody_from_a_slot(mlq: MLQ, start_worker: StartWorker, in_turn: bool) -> None:
    go = threading.Event()
    mlq.limits.set("gpu", 2)

    @mlq.actor(resources={"gpu": 2}, **({"fair_by": lambda: "me"} if in_turn else {}))
    def large() -> None: ...

    @mlq.actor(resources={"gpu": 1})
    def small(waits: bool) -> None:
        go.wait(10 if waits else 0)

    start_worker(threads=2)
    first = small.submit(True)
    eventually(lambda: first.state is State.RUNNING)
    late = large.submit(queue_timeout=0.05)  # it comes first, and the slot that is free waits with it
    eventually(lambda: mlq.store.now() > late.record.created_at + 0.05)
    small.submit(False).result(timeout=5)
    # By the worker's turn; nobody has swept.
    assert (State.DEAD, DeadReason.EXPIRED) == (late.state, late.record.dead_reason)
    go.set()
    first.result(timeout=10)


def test_who_waits_for_a_job_does_not_start_it_late(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="elsewhere", priority=5)
    def inner() -> int:
        return 1

    @mlq.actor(max_retries=0)
    def outer(job_id: str) -> str:
        key = f"{mlq.store.root}:j:{job_id}"
        mlq.client.hset(key, "U", 1)
        mlq.client.zadd(f"{mlq.store.root}:qt", {job_id: 1})
        with pytest.raises(JobFailed):
            mlq.job(job_id).result(timeout=10)
        return "dead"

    child = inner.submit(queue_timeout=60)
    job = outer.submit(child.id)
    start_worker(queues={"default"}, threads=1)
    eventually(lambda: job.state is State.RUNNING)
    eventually(lambda: sweep(mlq) or child.state is State.DEAD)
    assert job.result(timeout=10) == "dead"


def test_the_time_counts_from_when_the_job_is_due(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    job = work.submit(delay=0.2, queue_timeout=3600)
    before = time.time()
    [(_, over)] = mlq.client.zrange(f"{mlq.store.root}:qt", 0, -1, withscores=True)
    assert before + 3599 < over / 1000 < before + 3602
    drain(mlq)
    assert job.result() == 1
    assert hurry(mlq) == []


def test_a_job_that_has_begun_may_take_its_time(mlq: MLQ) -> None:
    @mlq.actor(max_retries=1, min_backoff=1)
    def work() -> int:
        if current_job().attempt == 1:
            raise ValueError
        return current_job().attempt

    job = work.submit(queue_timeout=0.5)
    drain(mlq)
    assert job.result() == 2


def test_its_time_begins_anew_when_it_is_retried_by_hand(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    job = work.submit(queue_timeout=0.02)
    eventually(lambda: sweep(mlq))
    assert hurry(mlq) == []
    job.retry()
    assert hurry(mlq) == [job.id]
    eventually(lambda: sweep(mlq))
    assert job.record.dead_reason is DeadReason.EXPIRED


@pytest.mark.parametrize("wrong", [0, -1, "1h", True])
@pytest.mark.parametrize("name", ["queue_timeout", "hard_time_limit"])
def test_what_is_no_time_is_refused(mlq: MLQ, name: str, wrong: object) -> None:
    @mlq.actor
    def work() -> None: ...

    with pytest.raises(InvalidJob, match=name):
        work.submit(**{name: wrong})  # type: ignore[call-arg]
    with pytest.raises(InvalidJob, match=name):
        mlq.actor(**{"actor_name": "other", name: wrong})(lambda: None)


# More time


def test_a_time_limit_is_prolonged_from_within_and_from_elsewhere(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(time_limit=400, max_retries=0)
    def work(by: float) -> str:
        if by:
            current_job().extend(timedelta(seconds=by))
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            time.sleep(0.005)
        return "done"

    start_worker(threads=3)
    within, elsewhere, short = work.submit(30), work.submit(0), work.submit(0)
    eventually(lambda: elsewhere.state is State.RUNNING)
    elsewhere.extend(30)
    assert within.result(timeout=10) == elsewhere.result(timeout=10) == "done"
    assert short.exception(timeout=10) is not None
    record = short.record
    assert [(past.outcome, past.stage) for past in record.attempts] == [("failed", "interrupted")]
    assert (within.record.extended_by, elsewhere.record.extended_by) == (30.0, 30.0)


def test_a_timeout_is_prolonged(mlq: MLQ, start_worker: StartWorker) -> None:
    go = threading.Event()

    @mlq.actor(job_timeout=0.2)
    def work() -> int:
        go.wait(10)
        return current_job().attempt

    job = work.submit()
    start_worker()
    eventually(lambda: job.state is State.RUNNING)
    job.extend(60)
    time.sleep(0.25)
    assert sweep(mlq) == {}
    mlq.client.zadd(f"{mlq.store.root}:late", {job.id: 1})  # as a reaper does that is bound later
    assert sweep(mlq) == {}
    go.set()
    assert job.result(timeout=10) == 1


def test_an_attempt_that_has_lost_its_job_cannot_prolong_it(mlq: MLQ, start_worker: StartWorker) -> None:
    raised: list[BaseException] = []
    begun = threading.Event()

    @mlq.actor(max_retries=0)
    def work() -> int:
        job = current_job()
        if job.attempt == 1:
            deadline = time.monotonic() + 15
            with contextlib.suppress(Cancelled):  # which comes once the worker has heard that the job is another's
                begun.set()
                while time.monotonic() < deadline:
                    time.sleep(0.005)
            try:
                job.extend(5)
            except StaleAttempt as error:
                raised.append(error)
        return job.attempt

    job = work.submit(job_timeout=0.01)
    start_worker()
    assert begun.wait(10)
    eventually(lambda: sweep(mlq))
    assert job.result(timeout=10) > 1
    eventually(lambda: raised)
    assert "was not prolonged" in str(raised[0])
    with pytest.raises(InvalidTransition, match="is succeeded"):
        job.extend(5)
    for wrong in (0, -1, True):
        with pytest.raises(InvalidJob, match="extend="):
            job.extend(wrong)
