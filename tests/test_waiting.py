"""Waiting for jobs: results, errors, events, awaiting."""

from __future__ import annotations

import asyncio
import threading
import time
import traceback

import dramatiq
import pytest
from support import StartWorker

import mlqueue
from mlqueue import MLQ, JobEvent, JobFailed, ResultTimeout, State, current_job
from mlqueue.testing import drain


def test_a_result_that_is_there_is_given_at_once_also_with_a_timeout_of_nought(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> list[int]:
        return [1]

    job = work.submit()
    drain(mlq)
    assert (job.result(), job.result(timeout=0), job.wait(0), job.done, job.exception(0)) == (
        [1],
        [1],
        True,
        True,
        None,
    )


def test_a_failed_job_raises_with_the_traceback_of_the_worker(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def divides_by_zero(n: int) -> float:
        return n / 0

    job = divides_by_zero.submit(1)
    drain(mlq)
    with pytest.raises(JobFailed) as caught:
        job.result(timeout=0)
    error = caught.value
    assert str(error) == f"job {job.id} is dead (failed): ZeroDivisionError: division by zero"
    assert (error.job_id, error.reason, error.error_type) == (job.id, "failed", "builtins.ZeroDivisionError")
    assert "return n / 0" in error.remote_traceback
    shown = "".join(traceback.format_exception(error))
    assert "The traceback in the worker:" in shown
    assert "return n / 0" in shown
    assert repr(job.exception(0)) == repr(error)


def test_an_error_whose_text_cannot_be_made_is_still_an_error(mlq: MLQ) -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    @mlq.actor(max_retries=0)
    def fails(how: str) -> None:
        if how == "odd":
            raise Odd
        if how == "surrogate":
            raise ValueError("\ud800")
        raise ValueError("x" * 100_000)

    jobs = [fails.submit(how) for how in ("odd", "surrogate", "long")]
    drain(mlq)
    messages = [error.message if (error := job.record.error) else None for job in jobs]
    assert messages == ["<str() of it raised RuntimeError>", "\\ud800", "x" * 8192]


def test_a_timeout_says_where_the_job_stands_and_that_no_worker_is_there(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    _, job = work.submit(), work.submit()
    with pytest.raises(ResultTimeout) as caught:
        job.result(timeout=0.01)
    assert str(caught.value) == (
        f"job {job.id} is queued, 1 job ahead of it after 0.01 s; it goes on. Wait again, or longer. "
        "No worker is alive: start one with `mlqueue worker MODULE`."
    )
    assert isinstance(caught.value, TimeoutError)
    assert job.wait(0.01) is False
    with pytest.raises(ResultTimeout):
        job.exception(timeout=0.01)


def test_a_timeout_while_the_job_runs_says_so(mlq: MLQ, worker: dramatiq.Worker) -> None:
    inside, go_on = threading.Event(), threading.Event()

    @mlq.actor
    def work() -> int:
        inside.set()
        assert go_on.wait(10)
        return 1

    job = work.submit()
    assert inside.wait(10)
    with pytest.raises(ResultTimeout, match=r"is running after 0.01 s; it goes on. Wait again, or longer.$"):
        job.result(timeout=0.01)
    go_on.set()
    assert job.result(timeout=10) == 1


@pytest.mark.parametrize("timeout", [-1, "1", float("nan"), True])
def test_a_timeout_that_is_none_is_refused(mlq: MLQ, timeout: float) -> None:
    @mlq.actor
    def work() -> None: ...

    with pytest.raises(mlqueue.InvalidJob, match="timeout="):
        work.submit().result(timeout=timeout)


def test_a_wait_hears_of_the_end_at_once_and_asks_no_more_than_needed(mlq: MLQ, worker: dramatiq.Worker) -> None:
    inside, go_on = threading.Event(), threading.Event()
    ended: list[float] = []

    @mlq.actor
    def work() -> float:
        inside.set()
        assert go_on.wait(10)
        return time.monotonic()

    job = work.submit()
    assert inside.wait(10)
    watched = []
    watch = mlq.store.watch
    mlq.store.watch = lambda *a, **k: watched.append(1) or watch(*a, **k)  # type: ignore[method-assign, func-returns-value]
    waiters = [
        threading.Thread(target=lambda: ended.append(time.monotonic()) if job.wait(10) else None) for _ in range(8)
    ]
    for waiter in waiters:
        waiter.start()
    threading.Event().wait(0.3)
    go_on.set()
    for waiter in waiters:
        waiter.join(10)
    assert len(ended) == 8
    assert max(ended) - job.result(timeout=0) < 0.5
    assert len(watched) <= 17


def test_a_wait_ends_when_the_job_is_cancelled_or_forgotten(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    cancelled, forgotten = work.submit(), work.submit()
    seen: dict[str, object] = {}

    def wait_for(job: mlqueue.Job[None]) -> None:
        try:
            seen[job.id] = job.wait(10)
        except mlqueue.JobNotFound as error:
            seen[job.id] = type(error)

    waiters = [threading.Thread(target=wait_for, args=(job,)) for job in (cancelled, forgotten)]
    for waiter in waiters:
        waiter.start()
    threading.Event().wait(0.1)
    assert cancelled.cancel() is State.QUEUED
    mlq.store.remove([forgotten.id])
    for waiter in waiters:
        waiter.join(5)
    assert seen == {cancelled.id: True, forgotten.id: mlqueue.JobNotFound}
    with pytest.raises(mlqueue.JobCancelled, match="was cancelled"):
        cancelled.result(timeout=0)


def test_a_waiter_whose_connection_is_cut_hears_of_the_end_all_the_same(mlq: MLQ, worker: dramatiq.Worker) -> None:
    inside, go_on = threading.Event(), threading.Event()

    @mlq.actor
    def work() -> str:
        inside.set()
        assert go_on.wait(10)
        return "well"

    job = work.submit()
    assert inside.wait(10)
    results: list[str] = []
    waiter = threading.Thread(target=lambda: results.append(job.result(timeout=15)))
    waiter.start()
    threading.Event().wait(0.1)
    mlq.client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    go_on.set()
    waiter.join(15)
    assert results == ["well"]


def test_a_dead_job_can_be_retried_and_waited_for_again(mlq: MLQ) -> None:
    fail = [True]

    @mlq.actor(max_retries=0)
    def work() -> str:
        if fail[0]:
            raise ValueError
        return "well"

    job = work.submit()
    drain(mlq)
    assert job.done
    fail[0] = False
    job.retry()
    assert job.state is State.QUEUED
    drain(mlq)
    assert job.result(timeout=0) == "well"
    assert job.record.attempt == 2
    with pytest.raises(mlqueue.InvalidTransition, match="is succeeded"):
        job.retry()


# Events


def test_events_tell_of_states_and_progress_to_the_end(mlq: MLQ, start_worker: StartWorker) -> None:
    said = threading.Semaphore(0)

    @mlq.actor
    def work() -> None:
        for n in range(3):
            assert said.acquire(timeout=10)
            current_job().progress(n, f"step {n}")
        assert said.acquire(timeout=10)

    job = work.submit()
    events: list[JobEvent] = []
    for event in job.events(timeout=20):
        events.append(event)
        if event.state is State.QUEUED:
            start_worker()
        else:
            said.release()
    assert [(event.kind, event.state, event.progress, event.note) for event in events] == [
        ("state", "queued", None, None),
        ("state", "running", None, None),
        ("progress", "running", 0, "step 0"),
        ("progress", "running", 1, "step 1"),
        ("progress", "running", 2, "step 2"),
        ("state", "succeeded", 2, "step 2"),
    ]
    assert [event.attempt for event in events] == [0, 1, 1, 1, 1, 1]


def test_events_of_an_ended_job_are_its_end_and_a_timeout_ends_those_of_another(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    ended = work.submit()
    drain(mlq)
    assert [(event.kind, event.state) for event in ended.events()] == [("state", State.SUCCEEDED)]
    waiting = work.submit()
    assert [event.state for event in waiting.events(timeout=0.05)] == [State.QUEUED]


# On the event loop


def test_two_hundred_awaits_at_once_end(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def square(n: int) -> int:
        return n * n

    start_worker(threads=4)

    async def main() -> list[int]:
        jobs = [square.submit(n) for n in range(200)]
        async with asyncio.timeout(20):
            return await asyncio.gather(*jobs)

    assert asyncio.run(main()) == [n * n for n in range(200)]


def test_the_loop_goes_on_while_a_job_is_awaited_and_asyncios_timeout_bounds_it(
    mlq: MLQ, worker: dramatiq.Worker
) -> None:
    go_on = threading.Event()

    @mlq.actor
    def work() -> str:
        assert go_on.wait(10)
        return "well"

    async def main() -> tuple[str, float]:
        job = work.submit()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await job
        task = asyncio.ensure_future(job)
        await asyncio.sleep(0.02)
        assert not task.done()
        go_on.set()
        begun = time.monotonic()
        return await task, time.monotonic() - begun

    result, taken = asyncio.run(main())
    assert result == "well"
    assert taken < 0.5


def test_an_awaited_job_that_fails_raises(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor(max_retries=0)
    def fails() -> None:
        raise ValueError("no")

    async def main() -> None:
        await fails.submit()

    with pytest.raises(JobFailed, match="ValueError: no"):
        asyncio.run(main())


def test_blocking_calls_on_the_event_loop_raise_and_say_what_to_write(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    async def main() -> None:
        job = work.submit()
        for call in (job.result, job.wait, job.exception, lambda: list(job.events())):
            with pytest.raises(mlqueue.MLQueueError, match="write `await job` there"):
                call()

    asyncio.run(main())


def test_a_closed_app_can_be_used_again(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    job = work.submit()
    drain(mlq)
    assert job.result(timeout=0) == 1
    mlq.close()
    assert job.result(timeout=0) == 1
    assert not work.submit().wait(0.01)
