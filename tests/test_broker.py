"""What works of Dramatiq on this broker: plain actors, with Dramatiq's own options and compositions."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import dramatiq
import pytest
from dramatiq.errors import QueueJoinTimeout, QueueNotFound
from dramatiq.middleware import SkipMessage, TimeLimitExceeded
from dramatiq.rate_limits import ConcurrentRateLimiter, WindowRateLimiter
from dramatiq.rate_limits.backends import RedisBackend
from dramatiq.results.errors import ResultFailure, ResultMissing, ResultTimeout
from support import StartWorker, eventually

import mlqueue
from mlqueue import MLQ, DeadReason, State
from mlqueue.testing import drain

# Results


def test_a_plain_actor_runs_and_its_message_gives_the_result(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def add(a: int, b: int) -> int:
        return a + b

    assert add.send(1, 2).get_result(block=True, timeout=10_000) == 3
    assert add(1, 2) == 3


def test_a_message_without_a_result_raises_what_dramatiq_raises(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker, max_retries=0)
    def fails() -> None:
        raise ValueError("no")

    message = fails.send()
    with pytest.raises(ResultMissing):
        message.get_result()
    with pytest.raises(ResultTimeout):
        message.get_result(block=True, timeout=20)
    drain(mlq)
    with pytest.raises(ResultFailure) as failure:
        message.get_result(block=True)
    assert (failure.value.orig_exc_type, failure.value.orig_exc_msg) == ("ValueError", "no")


def test_a_result_of_none_is_a_result(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def nothing() -> None: ...

    message = nothing.send()
    drain(mlq)
    assert message.get_result() is None


# Retries


def test_a_job_that_raises_is_retried_max_retries_times_and_then_dead(mlq: MLQ, worker: dramatiq.Worker) -> None:
    attempts = []

    @dramatiq.actor(broker=mlq.broker, max_retries=2, min_backoff=1, max_backoff=5)
    def fails() -> None:
        attempts.append(mlqueue.current_job().attempt)
        raise ValueError(f"attempt {len(attempts)}")

    job = mlq.job(fails.send().message_id)
    assert job.wait(10)
    record = job.record
    assert attempts == [1, 2, 3]
    assert (record.state, record.dead_reason, record.retries, record.attempt) == (State.DEAD, DeadReason.FAILED, 2, 3)
    assert [attempt.error and attempt.error.message for attempt in record.attempts] == [
        "attempt 1",
        "attempt 2",
        "attempt 3",
    ]


def test_a_retry_waits_in_the_store_for_its_backoff(mlq: MLQ, worker: dramatiq.Worker) -> None:
    failed = threading.Event()

    @dramatiq.actor(broker=mlq.broker, min_backoff=600_000)
    def fails() -> None:
        failed.set()
        raise ValueError

    job = mlq.job(fails.send().message_id)
    assert failed.wait(10)
    record = eventually(lambda: job.record if job.state is State.SCHEDULED else None)
    assert record is not None
    assert record.due_at is not None
    assert 600 <= record.due_at - record.created_at <= 1210  # Dramatiq's jitter


def test_retry_when_decides(mlq: MLQ) -> None:
    seen = []

    def only_twice(retries: int, exception: BaseException) -> bool:
        seen.append((retries, str(exception)))
        return retries < 2

    @dramatiq.actor(broker=mlq.broker, retry_when=only_twice, max_retries=0)
    def fails() -> None:
        raise ValueError("again")

    fails.send()
    assert [record.attempt for record in drain(mlq)] == [3]
    assert seen == [(0, "again"), (1, "again"), (2, "again")]


def test_what_an_actor_throws_is_not_retried(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker, throws=(KeyError, ValueError), max_retries=5)
    def fails() -> None:
        raise ValueError("expected")

    fails.send()
    (record,) = drain(mlq)
    assert (record.state, record.attempt) == (State.DEAD, 1)


def test_raising_retry_sets_the_delay(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker, min_backoff=3_600_000)
    def in_milliseconds() -> int:
        if mlqueue.current_job().attempt == 1:
            raise dramatiq.Retry(delay=30)
        return 1

    @dramatiq.actor(broker=mlq.broker, min_backoff=3_600_000)
    def in_seconds() -> int:
        if mlqueue.current_job().attempt == 1:
            raise mlqueue.Retry(delay=0.03)
        return 2

    assert in_milliseconds.send().get_result(block=True) == 1
    assert in_seconds.send().get_result(block=True) == 2


def test_when_retries_are_exhausted_the_named_actor_gets_the_message(mlq: MLQ) -> None:
    told: list[tuple[str, dict[str, Any]]] = []

    @dramatiq.actor(broker=mlq.broker)
    def exhausted(message: dict[str, Any], info: dict[str, Any]) -> None:
        told.append((message["message_id"], info))

    @dramatiq.actor(broker=mlq.broker, max_retries=1, on_retry_exhausted="exhausted")
    def fails() -> None:
        raise ValueError

    message = fails.send()
    drain(mlq)
    assert told == [(message.message_id, {"retries": 1, "max_retries": 1})]


# Callbacks, pipelines, groups


def test_on_success_and_on_failure_are_sent_with_the_end_of_the_job(mlq: MLQ) -> None:
    told: list[tuple[str, str, Any]] = []

    @dramatiq.actor(broker=mlq.broker)
    def well(message: dict[str, Any], result: Any) -> None:
        told.append(("well", message["message_id"], result))

    @dramatiq.actor(broker=mlq.broker)
    def badly(message: dict[str, Any], error: Any) -> None:
        told.append(("badly", message["message_id"], error))

    @dramatiq.actor(broker=mlq.broker, max_retries=0, on_success="well", on_failure="badly")
    def divide(a: int, b: int) -> float:
        return a / b

    good, bad = divide.send(1, 2), divide.send(1, 0)
    drain(mlq)
    assert told == [
        ("well", good.message_id, 0.5),
        ("badly", bad.message_id, {"type": "ZeroDivisionError", "message": "division by zero"}),
    ]


def test_a_pipeline_passes_on_the_full_result(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def make(n: int) -> Any:
        return mlqueue.Result(short="made", full={"n": n, "png": b"\x89PNG"}, content_type="image/png")

    @dramatiq.actor(broker=mlq.broker)
    def read(made: Any) -> Any:
        return [made["n"], made["png"]]

    pipe = make.message(7) | read.message_with_options()
    assert pipe.run().get_result(block=True, timeout=10_000) == [7, b"\x89PNG"]
    assert pipe.completed
    assert list(pipe.get_results()) == [{"n": 7, "png": b"\x89PNG"}, [7, b"\x89PNG"]]


def test_the_next_job_of_a_pipeline_is_created_by_the_settle_of_the_one_before(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def first() -> int:
        return 1

    @dramatiq.actor(broker=mlq.broker, queue_name="later")
    def second(n: int) -> int:
        return n

    pipe = (first.message() | second.message_with_options()).run()
    calls = []
    create = mlq.store.submit
    mlq.store.submit = lambda jobs: calls.append(jobs) or create(jobs)  # type: ignore[method-assign, func-returns-value]
    drain(mlq, ["default"])
    assert calls == []
    record = mlq.job(pipe.messages[1].message_id).record
    assert (record.state, record.parent) == (State.QUEUED, pipe.messages[0].message_id)


def test_a_pipeline_may_ignore_results_and_delay_its_steps(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def first() -> int:
        return 1

    @dramatiq.actor(broker=mlq.broker)
    def second() -> float:
        return time.monotonic()

    begun = time.monotonic()
    pipe = first.message() | second.message_with_options(pipe_ignore=True, delay=150)
    assert pipe.run().get_result(block=True) - begun >= 0.15


def test_a_group_gathers_results_and_calls_back_once(mlq: MLQ, start_worker: StartWorker) -> None:
    called = []
    done = threading.Event()

    @dramatiq.actor(broker=mlq.broker)
    def square(n: int) -> int:
        return n * n

    @dramatiq.actor(broker=mlq.broker)
    def finished(what: str) -> None:
        called.append(what)
        done.set()

    start_worker(threads=4)
    group = dramatiq.group([square.message(n) for n in range(20)], broker=mlq.broker)
    group.add_completion_callback(finished.message("all"))
    group.run()
    group.wait(timeout=10_000)
    assert list(group.get_results()) == [n * n for n in range(20)]
    assert done.wait(10)
    mlq.broker.join("default", timeout=10_000)
    assert called == ["all"]


def test_a_group_calls_back_once_when_a_child_runs_twice(mlq: MLQ, start_worker: StartWorker) -> None:
    called = []
    inside, go_on = threading.Event(), threading.Event()

    @dramatiq.actor(broker=mlq.broker)
    def child(slow: bool) -> None:
        if slow and mlqueue.current_job().attempt == 1:
            inside.set()
            assert go_on.wait(10)

    @dramatiq.actor(broker=mlq.broker)
    def finished() -> None:
        called.append(1)

    start_worker(threads=4)
    children = [child.message(n == 0) for n in range(3)]
    group = dramatiq.group(children, broker=mlq.broker)
    group.add_completion_callback(finished.message())
    group.run()
    assert inside.wait(10)
    # As the sweep does with a worker that was stopped for long: the job is another's, the first call goes on.
    assert mlq.broker.pump is not None
    mlq.store.release(mlq.broker.pump.worker, "stall", "no heartbeat")
    group.wait(timeout=10_000)
    go_on.set()
    mlq.broker.join("default", timeout=10_000)
    assert mlq.broker.worker is not None
    mlq.broker.worker.join()
    assert called == [1]
    assert mlq.job(children[0].message_id).record.attempt == 2


def test_a_group_whose_child_is_dead_does_not_call_back(mlq: MLQ) -> None:
    called = []

    @dramatiq.actor(broker=mlq.broker, max_retries=0)
    def child(n: int) -> None:
        assert n

    @dramatiq.actor(broker=mlq.broker)
    def finished() -> None:
        called.append(1)

    group = dramatiq.group([child.message(n) for n in range(3)], broker=mlq.broker)
    group.add_completion_callback(finished.message())
    group.run()
    drain(mlq)
    assert called == []


# Time


def test_a_time_limit_ends_a_job_in_an_embedded_worker(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker, time_limit=100, max_retries=0)
    def spins() -> None:
        while True:
            threading.Event().wait(0.005)

    job = mlq.job(spins.send().message_id)
    assert job.wait(10)
    error = job.record.error
    assert error is not None
    assert error.type.endswith(TimeLimitExceeded.__name__)


def test_a_time_limit_ends_an_async_job(mlq: MLQ, worker: dramatiq.Worker) -> None:
    cleaned_up = threading.Event()

    @mlq.actor(time_limit=100, max_retries=0)
    async def sleeps() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned_up.set()

    job = sleeps.submit()
    assert isinstance(job.exception(10), mlqueue.JobFailed)
    assert cleaned_up.is_set()


def test_a_time_limit_does_not_strike_a_job_that_has_returned(
    mlq: MLQ, worker: dramatiq.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = mlq.store.write_chunks

    def slowly(*args: Any) -> None:
        deadline = time.monotonic() + 0.4
        while time.monotonic() < deadline:
            threading.Event().wait(0.01)
        write(*args)

    monkeypatch.setattr(mlq.store, "write_chunks", slowly)

    @dramatiq.actor(broker=mlq.broker, time_limit=100, max_retries=0)
    def returns_much() -> bytes:
        return bytes(5_000_000)

    assert len(returns_much.send().get_result(block=True)) == 5_000_000


def test_a_time_limit_of_one_job_does_not_follow_the_thread_into_the_next(mlq: MLQ, start_worker: StartWorker) -> None:
    @dramatiq.actor(broker=mlq.broker, time_limit=150, max_retries=0)
    def quick(fail: bool) -> None:
        if fail:
            raise ValueError

    @dramatiq.actor(broker=mlq.broker, max_retries=0)
    def slow() -> bool:
        return threading.Event().wait(0.5) or True

    start_worker(threads=1)
    for fail in (True, False):
        quick.send(fail)
        assert slow.send().get_result(block=True) is True


def test_a_job_older_than_max_age_is_dead_as_expired_by_the_clock_of_the_server(
    mlq: MLQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dramatiq.actor(broker=mlq.broker, max_age=60_000)
    def work() -> None: ...

    old, young = work.send(), work.send()
    now = int(mlq.client.time()[0]) * 1000
    mlq.client.hset(f"{mlq.store.root}:j:{old.message_id}", "t", now - 61_000)
    # This machine's clock being an hour ahead makes no difference.
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 3600)
    drain(mlq)
    monkeypatch.undo()
    record = mlq.job(old.message_id).record
    assert (record.state, record.dead_reason) == (State.DEAD, DeadReason.EXPIRED)
    assert mlq.job(young.message_id).state is State.SUCCEEDED


def test_a_delay_may_be_years_and_a_short_one_is_not_held_up_by_it(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def work(n: int) -> int:
        return n

    year = 366 * 86_400_000
    far = [work.send_with_options(args=(n,), delay=2 * year) for n in range(50)]
    begun = time.monotonic()
    near = work.send_with_options(args=(1,), delay=200)
    assert near.get_result(block=True) == 1
    assert 0.2 <= time.monotonic() - begun < 1.5
    record = mlq.job(far[0].message_id).record
    assert record.state is State.SCHEDULED
    assert record.due_at is not None
    assert abs(record.due_at - record.created_at - 2 * year / 1000) < 1


def test_an_eta_option_is_heeded(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def work() -> float:
        return time.time()

    due = time.time() + 0.2
    message = work.message_with_options(eta=int(due * 1000))
    mlq.broker.enqueue(message)
    assert message.get_result(block=True) >= due - 0.01


# Order, limits, skipping


def test_lower_priorities_run_first_over_the_whole_queue(mlq: MLQ) -> None:
    order: list[str] = []

    @dramatiq.actor(broker=mlq.broker, priority=10)
    def low(n: int) -> None:
        order.append(f"low {n}")

    @dramatiq.actor(broker=mlq.broker)
    def normal(n: int) -> None:
        order.append(f"normal {n}")

    @mlq.actor(priority=-5)
    def urgent(n: int) -> None:
        order.append(f"urgent {n}")

    for n in range(3):
        low.send(n)
        normal.send(n)
        urgent.send(n)
    urgent.with_options(priority=20).submit(9)
    drain(mlq)
    assert order == [*(f"{name} {n}" for name in ("urgent", "normal", "low") for n in range(3)), "urgent 9"]


def test_dramatiqs_rate_limiters_work_over_our_client(mlq: MLQ) -> None:
    backend = RedisBackend(client=mlq.client)
    mutex = ConcurrentRateLimiter(backend, f"{mlq.name}-mutex", limit=1)
    ran = []

    @dramatiq.actor(broker=mlq.broker)
    def limited(n: int) -> None:
        with mutex.acquire():
            ran.append(n)

    with mutex.acquire():
        limited.send(1)
        with pytest.raises(dramatiq.RateLimitExceeded), mutex.acquire():
            pass
    drain(mlq)
    assert ran == [1]
    window = WindowRateLimiter(backend, f"{mlq.name}-window", limit=2, window=60)
    allowed = []
    for _ in range(3):
        with window.acquire(raise_on_failure=False) as got:
            allowed.append(got)
    assert allowed == [True, True, False]


def test_a_job_over_its_rate_limit_is_retried(mlq: MLQ, worker: dramatiq.Worker) -> None:
    mutex = ConcurrentRateLimiter(RedisBackend(client=mlq.client), f"{mlq.name}-mutex", limit=1)

    @dramatiq.actor(broker=mlq.broker, min_backoff=5, max_backoff=10, max_retries=None)
    def limited() -> int:
        with mutex.acquire():
            return mlqueue.current_job().attempt

    with mutex.acquire():
        message = limited.send()
        eventually(lambda: mlq.job(message.message_id).record.retries)
    assert message.get_result(block=True) > 1


def test_a_job_that_a_middleware_skips_succeeds_or_is_dead_as_rejected(mlq: MLQ) -> None:
    class Picky(dramatiq.Middleware):
        def before_process_message(self, broker: dramatiq.Broker, message: Any) -> None:
            if message.args[0] == "fail":
                message.fail()
            if message.args[0] != "run":
                raise SkipMessage("not today")

    mlq.broker.add_middleware(Picky())
    ran = []

    @dramatiq.actor(broker=mlq.broker)
    def work(what: str) -> None:
        ran.append(what)

    messages = [work.send(what) for what in ("run", "skip", "fail")]
    drain(mlq)
    records = [mlq.job(message.message_id).record for message in messages]
    assert ran == ["run"]
    assert [(record.state, record.dead_reason) for record in records] == [
        (State.SUCCEEDED, None),
        (State.SUCCEEDED, None),
        (State.DEAD, DeadReason.REJECTED),
    ]


# Queues


def test_join_returns_when_every_job_has_ended_running_and_scheduled_ones_included(
    mlq: MLQ, worker: dramatiq.Worker
) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def work(n: int) -> None: ...

    messages = [work.send_with_options(args=(n,), delay=100 if n % 2 else None) for n in range(20)]
    mlq.broker.join("default", timeout=10_000)
    assert {State.SUCCEEDED} == {mlq.job(message.message_id).state for message in messages}


def test_join_times_out_as_dramatiq_does(mlq: MLQ, worker: dramatiq.Worker) -> None:
    inside, go_on = threading.Event(), threading.Event()

    @dramatiq.actor(broker=mlq.broker)
    def blocks() -> None:
        inside.set()
        assert go_on.wait(10)

    blocks.send()
    assert inside.wait(10)
    with pytest.raises(QueueJoinTimeout):
        mlq.broker.join("default", timeout=50)
    go_on.set()
    mlq.broker.join("default", timeout=10_000)


def test_flush_forgets_what_waits_in_one_queue_and_flush_all_in_every_one(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def here() -> None: ...

    @dramatiq.actor(broker=mlq.broker, queue_name="there")
    def there() -> None: ...

    done = here.send()
    drain(mlq)
    waiting = [here.send(), here.send_with_options(delay=10_000), there.send(), there.send()]
    mlq.broker.flush("default")
    with pytest.raises(mlqueue.JobNotFound):
        mlq.job(waiting[0].message_id)
    with pytest.raises(mlqueue.JobNotFound):
        mlq.job(waiting[1].message_id)
    assert [mlq.job(message.message_id).state for message in waiting[2:]] == ["queued", "queued"]
    mlq.broker.flush_all()
    assert [record.id for record in mlq.jobs().jobs] == [done.message_id]


def test_consuming_an_undeclared_queue_raises_what_dramatiq_raises(mlq: MLQ) -> None:
    with pytest.raises(QueueNotFound):
        mlq.broker.consume("nowhere")


def test_enqueuing_the_same_message_again_creates_nothing(mlq: MLQ) -> None:
    @dramatiq.actor(broker=mlq.broker)
    def work() -> None: ...

    message = work.message()
    for _ in range(3):
        mlq.broker.enqueue(message)
    assert [record.id for record in mlq.jobs().jobs] == [message.message_id]


# A guest in the host's process


def test_the_global_encoder_is_not_touched_and_the_global_broker_only_when_there_is_none(mlq: MLQ) -> None:
    import dramatiq.broker as module

    assert isinstance(dramatiq.get_encoder(), dramatiq.JSONEncoder)
    assert module.global_broker is mlq.broker
    other = MLQ("other", settings=mlq.settings)
    assert module.global_broker is mlq.broker
    other.close()


def test_an_actor_declared_again_by_the_same_module_and_name_replaces_the_first(mlq: MLQ) -> None:
    def declare(answer: int) -> mlqueue.Actor[[], int]:
        @mlq.actor
        def cell() -> int:
            return answer

        return cell

    first = declare(1)
    declare(2)
    job = first.submit()
    drain(mlq)
    assert job.result(timeout=0) == 2


def test_another_actor_of_the_same_name_is_refused(mlq: MLQ) -> None:
    @mlq.actor(actor_name="work")
    def one() -> None: ...

    with pytest.raises(ValueError, match="'work' is already registered"):

        @mlq.actor(actor_name="work")
        def other() -> None: ...


def test_names_with_braces_colons_and_spaces_stay_apart(server: mlqueue.Settings) -> None:
    one, other = MLQ("a", settings=server), MLQ("a}:j:{b", settings=server)
    for app in (one, other):

        @app.actor(actor_name="über {work}:1|x", queue_name="a.b-c")
        def work() -> str:
            return "done"

    jobs = [app.submit("über {work}:1|x") for app in (one, other)]
    drain(other)
    assert [job.state for job in jobs] == ["queued", "succeeded"]
    assert [record.actor for record in other.jobs().jobs] == ["über {work}:1|x"]
    for app in (one, other):
        for key in app.client.scan_iter(f"{app.store.root}:*"):
            app.client.unlink(key)
        app.close()
