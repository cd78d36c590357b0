"""Waiting for jobs inside jobs: a worker is never held up by it, cycles are errors, limits hold."""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from dramatiq.middleware import TimeLimitExceeded
from support import StartWorker, eventually

from mlqueue import (
    MLQ,
    Cancelled,
    Job,
    JobCancelled,
    JobFailed,
    JobNotFound,
    ResultTimeout,
    State,
    StoreUnavailable,
    WaitCycle,
    current_job,
    delivery,
)
from mlqueue.job import new_id
from mlqueue.middleware import timing


def test_a_chain_of_fifty_nested_waits_ends_with_one_thread(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def link(depth: int) -> int:
        return 1 + link.submit(depth - 1).result(timeout=30) if depth else 1

    start_worker(threads=1)
    assert link.submit(50).result(timeout=30) == 51


def test_a_chain_of_nested_waits_in_async_actors_ends_with_one_thread(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    async def link(depth: int) -> int:
        return 1 + int(await link.submit(depth - 1)) if depth else 1

    start_worker(threads=1)
    assert link.submit(20).result(timeout=30) == 21


def test_an_async_actor_awaits_several_at_once(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def leaf(number: int) -> int:
        return number

    @mlq.actor
    async def gathers() -> list[int]:
        return list(await asyncio.gather(*(leaf.submit(i) for i in range(5))))

    start_worker(threads=1)
    job = gathers.submit()
    assert job.result(timeout=30) == [0, 1, 2, 3, 4]
    assert job.record.waits_for is None


def test_result_on_the_event_loop_says_await(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def leaf() -> None: ...

    @mlq.actor(max_retries=0)
    async def asks() -> None:
        leaf.submit().result()

    start_worker(threads=1)
    with pytest.raises(JobFailed, match="await job"):
        asks.submit().result(timeout=30)


def test_the_awaited_job_runs_ahead_of_a_backlog(mlq: MLQ, start_worker: StartWorker) -> None:
    order: list[str] = []

    @mlq.actor
    def note(name: str) -> None:
        order.append(name)

    @mlq.actor
    def parent() -> None:
        for i in range(3):
            note.submit(f"backlog {i}")
        note.submit("child").result(timeout=30)

    jobs = [parent.submit()]
    start_worker(threads=1)
    jobs[0].result(timeout=30)
    eventually(lambda: len(order) == 4)
    assert order[0] == "child"


def test_jobs_that_wait_for_one_that_runs_elsewhere_lend_their_places(mlq: MLQ, start_worker: StartWorker) -> None:
    other = MLQ(mlq.name, settings=mlq.settings)
    release = threading.Event()

    @other.actor(queue_name="elsewhere")
    def far() -> str:
        # It needs the place of the one that waits for it.
        release.wait(30)
        return str(other.submit("near").result(timeout=30))

    @mlq.actor
    def near() -> str:
        return "near"

    @mlq.actor
    def parent() -> str:
        return str(mlq.submit("far", queue_name="elsewhere").result(timeout=30))

    start_worker(threads=1)
    job = parent.submit()
    bystander = near.submit()
    assert bystander.result(timeout=30) == "near"
    assert job.state is State.RUNNING
    far_worker = start_worker(other, threads=1)
    release.set()
    assert job.result(timeout=30) == "near"
    far_worker.stop()
    other.close()


def test_a_job_that_ended_before_the_call_gives_its_result(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def early() -> str:
        return "early"

    @mlq.actor
    def late(job_id: str) -> Any:
        return mlq.job(job_id).result(timeout=30)

    start_worker(threads=1)
    first = early.submit()
    first.result(timeout=30)
    assert late.submit(first.id).result(timeout=30) == "early"


def test_two_jobs_that_wait_for_each_other_are_a_cycle_at_once(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def waits(other: str) -> str:
        eventually(lambda: mlq.job(other).state is State.RUNNING)
        try:
            mlq.job(other).result(timeout=30)
        except WaitCycle as error:
            return str(error)
        except JobFailed:
            return "the other failed"
        return "well"

    start_worker(threads=2)
    ids = [new_id(), new_id()]
    begun = time.monotonic()
    jobs = [waits.with_options(job_id=one).submit(other) for one, other in (ids, ids[::-1])]
    results = sorted(job.result(timeout=30) for job in jobs)
    assert "well" in results
    told = next(result for result in results if result != "well")
    assert "Neither would ever go on" in told
    assert all(job_id in told for job_id in ids)
    assert time.monotonic() - begun < 15


def test_waiting_for_itself_or_for_an_ancestor_is_a_cycle(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def itself() -> None:
        mlq.job(current_job().id).result(timeout=30)

    @mlq.actor(max_retries=0)
    def grandchild(ancestor: str) -> None:
        mlq.job(ancestor).result(timeout=30)

    @mlq.actor(max_retries=0)
    def child(ancestor: str) -> str:
        return grandchild.submit(ancestor).id

    @mlq.actor(max_retries=0)
    def parent(gate: str) -> str:
        job = child.submit(current_job().id)
        eventually(lambda: job.state is State.SUCCEEDED and mlq.job(job.result()).done)
        return job.result()

    start_worker(threads=3)
    with pytest.raises(JobFailed, match="WaitCycle"):
        itself.submit().result(timeout=30)
    last = parent.submit("").result(timeout=30)
    with pytest.raises(JobFailed, match="is an ancestor of it"):
        mlq.job(last).result(timeout=30)


@pytest.mark.parametrize("end", ["dead", "cancelled", "unknown", "timeout"])
def test_what_a_waiting_job_gets_instead_of_a_result(mlq: MLQ, start_worker: StartWorker, end: str) -> None:
    gate = threading.Event()

    @mlq.actor(max_retries=0)
    def other() -> None:
        gate.wait(30)
        if end == "dead":
            raise ValueError("broken")

    @mlq.actor(max_retries=0)
    def parent() -> str:
        job: Job[Any] = other.submit()
        if end == "unknown":
            job = Job(mlq.store, new_id())
        if end == "cancelled":
            job.cancel()
        if end != "timeout":
            gate.set()
        try:
            job.result(timeout=0.2 if end == "timeout" else 30)
        except (JobFailed, JobNotFound, ResultTimeout) as error:
            return type(error).__name__
        return "a result"

    start_worker(threads=1)
    job = parent.submit()
    expected = {"dead": "JobFailed", "cancelled": "JobCancelled", "unknown": "JobNotFound", "timeout": "ResultTimeout"}
    assert job.result(timeout=30) == expected[end]
    gate.set()


def test_an_awaited_job_has_its_own_context_and_its_own_limits(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(time_limit=60_000)
    def child() -> str:
        return current_job().id

    @mlq.actor(time_limit=60_000)
    def parent() -> list[str]:
        own = current_job().id
        job = child.submit()
        return [own, current_job().id, job.id, job.result(timeout=30), current_job().id]

    start_worker(threads=1)
    job = parent.submit()
    own, before, child_id, inside, after = job.result(timeout=30)
    assert (own, before, after) == (job.id, job.id, job.id)
    assert child_id == inside != own
    assert mlq.job(child_id).record.parent == job.id


@pytest.mark.parametrize("counts", [False, True])
def test_the_time_waited_counts_against_the_limit_only_if_asked(
    mlq: MLQ, start_worker: StartWorker, counts: bool
) -> None:
    @mlq.actor
    def slow() -> None:
        time.sleep(0.8)

    @mlq.actor(time_limit=400, waits_count=counts, max_retries=0)
    def parent() -> str:
        slow.submit().result(timeout=30)
        return "within its limit"

    start_worker(threads=2)
    job = parent.submit()
    if counts:
        with pytest.raises(JobFailed) as caught:
            job.result(timeout=30)
        assert caught.value.error_type.endswith(TimeLimitExceeded.__name__)
    else:
        assert job.result(timeout=30) == "within its limit"


def test_the_limit_goes_on_where_it_was_when_the_wait_ends(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def slow() -> None:
        time.sleep(0.3)

    @mlq.actor(time_limit=300, max_retries=0)
    def parent() -> None:
        slow.submit().result(timeout=30)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            time.sleep(0.01)

    start_worker(threads=2)
    with pytest.raises(JobFailed, match="TimeLimitExceeded"):
        parent.submit().result(timeout=10)


def test_a_waiting_job_hears_of_its_cancelling_at_once(mlq: MLQ, start_worker: StartWorker) -> None:
    gate = threading.Event()

    @mlq.actor
    def child() -> str:
        gate.wait(30)
        return "child"

    @mlq.actor
    def parent() -> None:
        child.submit().result()

    start_worker(threads=1)
    job = parent.submit()
    waits_for = eventually(lambda: job.record.waits_for)
    begun = time.monotonic()
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert time.monotonic() - begun < 4  # the bell's slice is 5 s
    assert job.record.cancel_stage == "raised"
    gate.set()
    # What it waited for goes on.
    assert mlq.job(waits_for).result(timeout=10) == "child"


def test_a_scheduled_job_is_run_by_who_waits_for_it_when_it_is_due(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def later() -> str:
        return "later"

    @mlq.actor
    def parent() -> str:
        return later.with_options(delay=0.3).submit().result(timeout=30)

    start_worker(threads=1)
    assert parent.submit().result(timeout=30) == "later"


def test_many_parents_wait_for_many_children_with_two_threads(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def leaf(number: int) -> int:
        return number

    @mlq.actor
    def parent(number: int) -> int:
        return sum(job.result(timeout=60) for job in [leaf.submit(number + i) for i in range(3)])

    start_worker(threads=2)
    jobs = parent.submit_many([(i,) for i in range(40)])
    assert [job.result(timeout=60) for job in jobs] == [3 * i + 3 for i in range(40)]
    assert {(count.state, count.actor, count.number) for count in mlq.store.counts()} == {
        (State.SUCCEEDED, "leaf", 120),
        (State.SUCCEEDED, "parent", 40),
    }


def test_a_worker_that_stops_leaves_no_thread_and_gives_back_what_it_ran_beside(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    gate = threading.Event()

    @mlq.actor
    def child() -> None:
        gate.wait(30)

    @mlq.actor
    def parent() -> None:
        child.submit().result()

    worker = start_worker(threads=1)
    job = parent.submit()
    waits_for = eventually(lambda: job.record.waits_for)
    eventually(lambda: mlq.job(waits_for).state is State.RUNNING)
    stopper = threading.Thread(target=worker.stop, kwargs={"timeout": 20_000})
    stopper.start()
    gate.set()
    stopper.join(20)
    assert not stopper.is_alive()
    assert (job.state, mlq.job(waits_for).state) == (State.SUCCEEDED, State.SUCCEEDED)


# Cancelling a running job


def loops(seen: list[str], note: str = "begun") -> None:
    seen.append(note)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.005)
    seen.append("not stopped")


def test_a_running_job_that_is_cancelled_gets_cancelled_raised_in_it(mlq: MLQ, start_worker: StartWorker) -> None:
    seen: list[Any] = []

    @mlq.actor(max_retries=3)
    def works() -> None:
        try:
            loops(seen)
        except Exception:
            seen.append("swallowed")
        finally:
            seen.append(("cleaned up", current_job().cancelled))

    start_worker(threads=1)
    job = works.submit()
    eventually(lambda: seen)
    begun = time.monotonic()
    assert job.cancel() is State.RUNNING
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert time.monotonic() - begun < 3
    assert seen == ["begun", ("cleaned up", True)]
    record = job.record
    assert (record.state, record.cancel_stage, record.retries) == (State.CANCELLED, "raised", 0)
    # The thread is well and takes the next one.
    after = works.submit()
    eventually(lambda: len(seen) == 3)
    after.cancel()
    eventually(lambda: after.done)


@pytest.fixture
def slow_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a module that imports another one, which takes 0.3 s in lines of Python, or so many ms as asked."""
    steps = getattr(request, "param", 300)
    name = f"slow_{uuid.uuid4().hex}"
    (tmp_path / f"{name}.py").write_text(f"begun = True\nimport {name}_too\ndone = True\n")
    (tmp_path / f"{name}_too.py").write_text(f"import time\nfor _ in range({steps}):\n    time.sleep(0.001)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)
    sys.modules.pop(f"{name}_too", None)


@pytest.mark.parametrize("by", ["cancel", "time limit"])
def test_an_import_is_not_broken_off(mlq: MLQ, start_worker: StartWorker, slow_import: str, by: str) -> None:
    seen: list[str] = []

    @mlq.actor(max_retries=0, time_limit=100 if by == "time limit" else None)
    def works() -> None:
        importlib.import_module(slow_import)
        loops(seen, "imported")

    start_worker(threads=1)
    job = works.submit()
    if by == "cancel":
        eventually(lambda: hasattr(sys.modules.get(slow_import), "begun"))
        job.cancel()
        with pytest.raises(JobCancelled):
            job.result(timeout=10)
        assert "raised" == job.record.cancel_stage
    else:
        with pytest.raises(JobFailed, match="TimeLimitExceeded"):
            job.result(timeout=10)
    assert sys.modules[slow_import].done
    assert "not stopped" not in seen


@pytest.mark.parametrize("slow_import", [9000], indirect=True, ids=["9 s"])
@pytest.mark.parametrize("by", ["cancel", "time limit"])
def test_an_import_that_does_not_end_is_broken_off_in_the_end(
    mlq: MLQ, start_worker: StartWorker, slow_import: str, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "PATIENCE", 0.05)
    monkeypatch.setattr(timing, "PATIENCE", 0.05)

    @mlq.actor(max_retries=0, time_limit=50 if by == "time limit" else None)
    def works() -> None:
        importlib.import_module(slow_import)

    start_worker(threads=1)
    job = works.submit()
    if by == "cancel":
        eventually(lambda: hasattr(sys.modules.get(slow_import), "begun"))
        job.cancel()
    with pytest.raises(JobCancelled if by == "cancel" else JobFailed):
        job.result(timeout=10)
    assert slow_import not in sys.modules


def test_an_async_job_that_is_cancelled_is_stopped_where_it_awaits(mlq: MLQ, start_worker: StartWorker) -> None:
    seen: list[str] = []

    @mlq.actor
    async def works() -> None:
        seen.append("begun")
        try:
            await asyncio.sleep(30)
        finally:
            seen.append("cleaned up")

    start_worker(threads=1)
    job = works.submit()
    eventually(lambda: seen)
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert seen == ["begun", "cleaned up"]
    assert job.record.cancel_stage == "raised"


@pytest.mark.parametrize("how", ["returns", "raises", "retries"])
def test_a_job_that_ends_by_itself_after_its_cancelling_is_cancelled_too(
    mlq: MLQ, start_worker: StartWorker, how: str
) -> None:
    begun, gate = threading.Event(), threading.Event()

    @mlq.actor(max_retries=2 if how == "retries" else 0)
    def works() -> str:
        begun.set()
        try:
            while not current_job().cancelled:
                gate.wait(0.005)
            gate.wait(0.05)
        except Cancelled:
            pass
        if how != "returns":
            raise ValueError(how)
        return "a result"

    start_worker(threads=1)
    job = works.submit()
    assert begun.wait(10)
    job.cancel()
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert (job.state, job.record.cancel_stage, job.short_result) == (State.CANCELLED, "ended", None)


def test_waiting_and_scheduled_jobs_that_are_cancelled_never_run(mlq: MLQ, start_worker: StartWorker) -> None:
    ran: list[str] = []

    @mlq.actor
    def works(name: str) -> None:
        ran.append(name)

    waiting, scheduled = works.submit("waiting"), works.with_options(delay=0.05).submit("scheduled")
    assert (waiting.cancel(), scheduled.cancel()) == (State.QUEUED, State.SCHEDULED)
    start_worker(threads=1)
    works.submit("last").result(timeout=10)
    later = works.with_options(delay=0.1).submit("later")
    later.result(timeout=10)
    assert ran == ["last", "later"]
    assert {job.record.cancel_stage for job in (waiting, scheduled)} == {"waiting"}
    with pytest.raises(JobCancelled):
        waiting.result(timeout=0)


def test_a_fetched_job_that_is_cancelled_before_its_thread_begins_never_runs(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    class CancelsLate(dramatiq.Middleware):
        def before_process_message(self, broker: Any, message: Any) -> None:
            if mlq.job(message.message_id).cancel() is State.RUNNING:
                eventually(lambda: message.cancel_requested)

    @mlq.actor
    def works() -> None:
        ran.append("ran")

    mlq.broker.add_middleware(CancelsLate())
    start_worker(threads=2)
    job = works.submit()
    with pytest.raises(JobCancelled):
        job.result(timeout=10)
    assert ran == []


def test_cancelled_cannot_strike_the_next_job_of_the_thread(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def short() -> str:
        return "well"

    start_worker(threads=1)
    # Each is cancelled at about its end: some before, some within, some after.
    jobs = [short.submit() for _ in range(150)]
    for job in jobs[::2]:
        job.cancel()
    ended = [eventually(lambda job=job: job.done and job.record) for job in jobs]
    assert {record.state for record in ended[1::2]} == {State.SUCCEEDED}
    assert {record.state for record in ended[::2]} <= {State.SUCCEEDED, State.CANCELLED}
    assert [record.attempts for record in ended if record.attempts] == []


def test_a_job_may_cancel_itself(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def gives_up(how: str) -> None:
        if how == "raises":
            raise Cancelled("not worth it")
        mlq.job(current_job().id).cancel()
        loops([])

    start_worker(threads=1)
    for how in ("raises", "cancels"):
        with pytest.raises(JobCancelled):
            gives_up.submit(how).result(timeout=10)


def test_a_job_that_was_cancelled_runs_when_it_is_retried(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def works() -> str:
        return "well"

    job = works.submit()
    job.cancel()
    job.retry()
    start_worker(threads=1)
    assert job.result(timeout=10) == "well"
    assert job.record.cancel_stage is None


# The store's side


def test_a_lost_answer_that_handed_a_job_over_is_given_again(mlq: MLQ, start_worker: StartWorker) -> None:
    lost = 0
    real: Callable[..., Any] = mlq.store._run

    def loses(name: str, *args: Any) -> Any:
        nonlocal lost
        answer = real(name, *args)
        if name == "await" and answer[2] and lost < 1:
            lost += 1
            raise StoreUnavailable("the answer was lost")
        return answer

    mlq.store._run = loses  # type: ignore[method-assign]

    @mlq.actor
    def child() -> str:
        return "child"

    @mlq.actor(max_retries=1, min_backoff=10, max_backoff=20)
    def parent(job_id: str) -> Any:
        return mlq.job(job_id).result(timeout=30)

    @mlq.actor
    def first() -> str:
        job = child.submit()
        return parent.submit(job.id).id

    second = first.submit()
    start_worker(threads=1)
    job = mlq.job(second.result(timeout=30))
    assert job.result(timeout=30) == "child"
    assert lost == 1 or job.record.retries == 0
