"""Actors and jobs: submitting, options, refusals; and what the record says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dramatiq
import numpy as np
import pytest
from support import eventually

import mlqueue
from mlqueue import MLQ, InvalidJob, Job, Result, Settings, State
from mlqueue.testing import drain

ROOT = Path(__file__).parent.parent

#: What users write; the settings of mypy (strict) are those of pyproject.toml.
API = "tests/typing/api.py"


def test_submit_gives_a_job_that_exists_at_once(mlq: MLQ) -> None:
    @mlq.actor
    def train(lr: float, epochs: int) -> str:
        return f"{epochs} at {lr}"

    job = train.submit(0.1, epochs=3)
    assert (job.state, job.position, job.progress, job.short_result) == (State.QUEUED, 0, None, None)
    record = job.record
    assert (record.actor, record.queue, record.attempt, record.priority) == ("train", "default", 0, 0)
    assert abs(record.created_at - time.time()) < 60
    drain(mlq)
    assert job.result(timeout=0) == "3 at 0.1"
    record = job.record
    assert (record.state, record.attempt, record.short_result) == (State.SUCCEEDED, 1, "3 at 0.1")
    assert record.started_at is not None
    assert record.finished_at is not None
    assert record.created_at <= record.started_at <= record.finished_at


def test_send_stays_dramatiqs_and_an_actor_stays_a_function(mlq: MLQ) -> None:
    @mlq.actor
    def add(a: int, b: int) -> int:
        return a + b

    message = add.send(1, 2)
    assert isinstance(message, dramatiq.Message)
    assert mlq.job(message.message_id).state is State.QUEUED
    assert add(1, 2) == 3


def test_an_async_actor_runs_and_knows_its_job(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor
    async def fetch(n: int) -> list[Any]:
        job = mlqueue.current_job()
        job.progress(n)
        return [n, job.id, job.attempt]

    job = fetch.submit(7)
    assert job.result(timeout=10) == [7, job.id, 1]
    assert job.progress == 7


def test_arrays_and_bytes_arrive_as_they_were_sent(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor
    def scale(image: Any, by: float, *, raw: bytes) -> dict[str, Any]:
        return {"image": image * by, "raw": raw, "when": datetime(2024, 1, 2, tzinfo=UTC)}

    image = np.arange(12, dtype=np.float32).reshape(3, 4)
    result = scale.submit(image, 2.0, raw=b"\0\xff").result(timeout=10)
    np.testing.assert_array_equal(image * 2, result["image"])
    assert result["image"].dtype == np.float32
    assert (result["raw"], result["when"]) == (b"\0\xff", datetime(2024, 1, 2, tzinfo=UTC))


@pytest.mark.parametrize(
    ("returned", "short"),
    [
        (None, None),
        (True, True),
        (3, 3),
        (0.5, 0.5),
        ("text", "text"),
        ("x" * 1000, "x" * 1000),
        ("x" * 1001, None),
        ([1], None),
        (b"b", None),
    ],
)
def test_a_plain_return_value_is_the_full_result_and_short_where_it_qualifies(
    mlq: MLQ, returned: object, short: object
) -> None:
    @mlq.actor
    def work() -> object:
        return returned

    job = work.submit()
    drain(mlq)
    assert (job.result(timeout=0), job.short_result) == (returned, short)


def test_a_result_is_split_only_where_the_actor_says_so(mlq: MLQ) -> None:
    @mlq.actor
    def work(size: int) -> Result:
        return Result(short="0.97", full=b"\x89PNG" + bytes(size), content_type="image/png")

    jobs = [work.submit(size) for size in (0, 1000, 9_000_000)]
    drain(mlq)
    for size, job in zip((0, 1000, 9_000_000), jobs, strict=True):
        full = job.full_result(timeout=0)
        assert (full.short, full.content_type, len(full.full)) == ("0.97", "image/png", size + 4)
        assert job.short_result == "0.97"
        assert job.record.content_type == "image/png"


def test_short_texts_are_shown_without_loading_the_full_result(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> Result:
        return Result(short=1.5, full=bytes(9_000_000))

    job = work.submit()
    drain(mlq)
    for key in mlq.client.scan_iter(f"{mlq.store.root}:x:{job.id}:*"):
        mlq.client.unlink(key)
    assert job.short_result == 1.5
    with pytest.raises(mlqueue.ResultMissing, match="is gone"):
        job.result(timeout=0)


# Options


def test_delay_and_eta_say_when_a_job_may_start(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    now = time.time()
    jobs = [
        work.with_options(delay=60).submit(),
        work.with_options(delay=timedelta(minutes=1)).submit(),
        work.with_options(eta=now + 60).submit(),
        work.with_options(eta=datetime.fromtimestamp(now + 60, UTC)).submit(),
        work.submit(delay=60),  # type: ignore[call-arg]
        mlq.submit("work", delay=60),
        mlq.submit("elsewhere", eta=now + 60),
    ]
    for job in jobs:
        record = job.record
        assert record.state is State.SCHEDULED
        assert record.due_at is not None
        assert abs(record.due_at - now - 60) < 5
        assert record.position is None


def test_a_job_id_makes_a_submit_idempotent(mlq: MLQ) -> None:
    @mlq.actor
    def work(n: int) -> int:
        return n

    named = work.with_options(job_id="epoch-1.night")
    first, second = named.submit(1), named.submit(2)
    assert first == second
    assert first.id == "epoch-1.night"
    drain(mlq)
    assert second.result(timeout=0) == 1
    assert named.submit(3).state is State.SUCCEEDED
    assert len(mlq.jobs().jobs) == 1


def test_tags_and_priority_are_on_the_record_and_jobs_are_found_by_tag(mlq: MLQ) -> None:
    @mlq.actor(tags=["always"], priority=4)
    def work() -> None: ...

    plain = work.submit()
    tagged = work.with_options(tags=["night", "große Läufe"], priority=-2).submit()
    assert (plain.record.tags, plain.record.priority) == (("always",), 4)
    assert (set(tagged.record.tags), tagged.record.priority) == ({"night", "große Läufe"}, -2)
    assert [record.id for record in mlq.jobs(tag="große Läufe").jobs] == [tagged.id]


def test_options_of_dramatiq_and_of_ours_can_be_given_for_one_job(mlq: MLQ) -> None:
    @mlq.actor(max_retries=5, result_ttl=60)
    def fails() -> None:
        raise ValueError

    job = fails.with_options(max_retries=0, result_ttl=timedelta(hours=1), max_crashes=7).submit()
    drain(mlq)
    assert (job.record.attempt, job.record.result_ttl) == (1, 3600.0)
    assert fails.submit().record.result_ttl == 60.0
    assert fails.with_options(result_ttl=None).submit().record.result_ttl is None


def test_an_actor_with_a_parameter_of_an_options_name_gets_it(mlq: MLQ) -> None:
    @mlq.actor
    def wait(delay: float, tags: list[str]) -> list[object]:
        return [delay, tags]

    job = wait.submit(delay=0.5, tags=["x"])
    assert job.state is State.QUEUED
    drain(mlq)
    assert job.result(timeout=0) == [0.5, ["x"]]


def test_submit_many_takes_tuples_and_dicts_and_keeps_the_order(mlq: MLQ) -> None:
    @mlq.actor
    def add(a: int, b: int = 0) -> int:
        return a + b

    jobs = add.with_options(tags=["batch"]).submit_many([(1, 2), {"a": 3}, (4,)])
    drain(mlq)
    assert [job.result(timeout=0) for job in jobs] == [3, 3, 4]
    assert [record.id for record in mlq.jobs(tag="batch").jobs] == [job.id for job in reversed(jobs)]
    assert add.submit_many([]) == []
    assert len(add.submit_many([(n,) for n in range(1200)])) == 1200


def test_nothing_of_a_batch_is_submitted_when_one_call_is_wrong(mlq: MLQ) -> None:
    @mlq.actor
    def add(a: int) -> int:
        return a

    for calls in ([(1,), (1, 2)], [(1,), ({1},)], [(1,), "ab"]):
        with pytest.raises(InvalidJob):
            add.submit_many(calls)  # type: ignore[arg-type]
    assert mlq.jobs().jobs == []


# By name


def test_a_job_is_submitted_by_name_without_the_code_to_the_queue_that_its_worker_declared(
    server: Settings, mlq: MLQ, worker: dramatiq.Worker
) -> None:
    @mlq.actor(queue_name="images")
    def classify(n: int) -> int:
        return n + 1

    eventually(lambda: mlq.store.queue_of("classify"))
    producer = MLQ(mlq.name, settings=server)
    job = producer.submit("classify", 41)
    assert job.record.queue == "images"
    assert job.result(timeout=10) == 42
    producer.close()


def test_a_job_submitted_before_any_worker_has_the_actor_runs_when_one_comes(server: Settings, mlq: MLQ) -> None:
    producer = MLQ(mlq.name, settings=server)
    job = producer.submit("later", 1, tags=["early"])

    @mlq.actor(queue_name="images")
    def later(n: int) -> int:
        return n

    drain(mlq)
    assert job.result(timeout=0) == 1
    assert producer.job(job.id) == job
    producer.close()


# Looking


def test_positions_count_the_jobs_ahead_in_the_queue(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    @mlq.actor
    def other() -> None: ...

    jobs = [work.submit(), other.submit(), work.with_options(priority=-1).submit(), other.submit()]
    assert [job.position for job in jobs] == [1, 2, 0, 3]


def test_jobs_are_equal_by_id_and_namespace(server: Settings, mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    job, other = work.submit(), work.submit()
    assert mlq.job(job.id) == job
    assert job != other
    assert len({job, mlq.job(job.id), other}) == 2
    assert job != job.id
    elsewhere = MLQ("elsewhere", settings=server)
    assert Job(elsewhere.store, job.id) != job
    elsewhere.close()


def test_jobs_are_listed_by_state_actor_and_queue_with_stable_pages(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def work(n: int) -> None:
        assert n % 2

    jobs = work.submit_many([(n,) for n in range(6)])
    drain(mlq)
    assert [record.id for record in mlq.jobs(state="dead").jobs] == [jobs[n].id for n in (4, 2, 0)]
    page = mlq.jobs(limit=4, actor="work", queue="default")
    work.submit(9)
    rest = mlq.jobs(limit=4, actor="work", queue="default", cursor=page.cursor)
    assert [record.id for record in page.jobs + rest.jobs] == [job.id for job in reversed(jobs)]
    with pytest.raises(InvalidJob, match="the states are queued, scheduled"):
        mlq.jobs(state="done")


# Refusals


def test_an_unknown_id_is_not_pending_but_not_found(mlq: MLQ) -> None:
    with pytest.raises(mlqueue.JobNotFound, match="no job 'nothing'"):
        mlq.job("nothing")
    stranger = Job[None](mlq.store, "nothing")
    for ask in (
        lambda: stranger.state,
        lambda: stranger.result(1),
        stranger.cancel,
        stranger.retry,
        stranger.exception,
    ):
        with pytest.raises(mlqueue.JobNotFound):
            ask()
    with pytest.raises(KeyError):
        list(stranger.events())


@pytest.mark.parametrize("job_id", ["", "a b", "a/b", "x" * 129, 7, "ä", "a\n"])
def test_a_bad_job_id_is_refused(mlq: MLQ, job_id: Any) -> None:
    @mlq.actor
    def work() -> None: ...

    with pytest.raises(InvalidJob, match="an id is a str of 1 to 128 letters"):
        work.with_options(job_id=job_id).submit()
    with pytest.raises(InvalidJob, match="an id is a str of 1 to 128 letters"):
        mlq.submit("work", job_id=job_id)
    assert mlq.jobs().jobs == []


def test_arguments_that_the_actor_does_not_take_are_refused_before_anything_is_sent(mlq: MLQ) -> None:
    @mlq.actor
    def train(lr: float) -> None: ...

    with pytest.raises(InvalidJob, match=r"train\(lr: 'float'\).*missing a required argument: 'lr'"):
        train.submit()  # type: ignore[call-arg]
    with pytest.raises(InvalidJob, match="unexpected keyword argument 'rate'"):
        train.submit(0.1, rate=2)  # type: ignore[call-arg]
    assert mlq.jobs().jobs == []


def test_a_value_that_cannot_be_sent_is_named_with_its_path(mlq: MLQ) -> None:
    @mlq.actor
    def work(*args: Any, **kwargs: Any) -> None: ...

    with pytest.raises(mlqueue.EncodeError) as error:
        work.submit([1, {"x": {1, 2}}])
    assert error.value.path == "args[0][1]['x']"
    with pytest.raises(mlqueue.EncodeError) as error:
        work.submit(model=lambda: 0)
    assert error.value.path == "kwargs['model']"
    assert mlq.jobs().jobs == []


def test_a_result_that_cannot_be_kept_fails_that_job_alone_with_the_path(mlq: MLQ, worker: dramatiq.Worker) -> None:
    @mlq.actor(max_retries=0)
    def work(n: int) -> Any:
        return {"values": [n, {n}]} if n == 1 else n

    jobs = work.submit_many([(n,) for n in range(3)])
    assert [jobs[0].result(timeout=10), jobs[2].result(timeout=10)] == [0, 2]
    with pytest.raises(mlqueue.JobFailed, match=r"EncodeError: result\['values'\]\[1\]: a set cannot be sent"):
        jobs[1].result(timeout=10)


def test_a_short_result_that_is_none_fails_the_job(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def work() -> Result:
        return Result(short=[1, 2], full=3)  # type: ignore[arg-type]

    job = work.submit()
    drain(mlq)
    with pytest.raises(mlqueue.JobFailed, match=r"Result\(short=...\): got list"):
        job.result(timeout=0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"delay": -1}, "delay=-1"),
        ({"delay": "soon"}, "delay='soon'"),
        ({"delay": float("nan")}, "delay=nan"),
        ({"eta": datetime(2030, 1, 1)}, "has no time zone"),
        ({"delay": 1, "eta": 2e9}, "both delay and eta"),
        ({"priority": 1001}, "from -1,000 to 1,000"),
        ({"priority": "high"}, "priority='high'"),
        ({"tags": "night"}, r"tags=\['night'\]"),
        ({"tags": [""]}, "1 to 100 characters"),
        ({"result_ttl": -5}, "result_ttl=-5"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": "3"}, "max_retries='3'"),
        ({"time_limit": "1 min"}, "time_limit='1 min'"),
        ({"max_crashes": 0}, "max_crashes=0"),
        ({"throws": ValueError}, "set on the actor"),
        ({"prioritty": 3}, "did you mean priority"),
        ({"xyzzy": 3}, "xyzzy is no option of a job; known are"),
    ],
)
def test_a_wrong_option_is_refused_and_nothing_is_written(mlq: MLQ, options: dict[str, Any], said: str) -> None:
    @mlq.actor
    def work() -> None: ...

    with pytest.raises(InvalidJob, match=said):
        work.with_options(**options).submit()
    with pytest.raises(InvalidJob, match=said):
        work.with_options(**options).submit_many([(), ()])
    assert mlq.jobs().jobs == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_retry": 3}, r"max_retry is no option of an actor; did you mean max_retries\?"),
        ({"xyzzy": 3}, "xyzzy is no option of an actor; known are actor_name, "),
        ({"priority": 5000}, "from -1,000 to 1,000"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"min_backoff": "1 s"}, "a number of milliseconds"),
        ({"time_limit": "1 min"}, "time_limit='1 min'"),
        ({"max_crashes": 0}, "max_crashes=0"),
        ({"tags": "night"}, "a list of texts"),
        ({"result_ttl": -5}, "result_ttl=-5"),
    ],
)
def test_a_wrong_actor_option_is_refused_at_the_declaration(mlq: MLQ, options: dict[str, Any], said: str) -> None:
    before = set(mlq.broker.actors)
    with pytest.raises(InvalidJob, match=said):

        @mlq.actor(**options)
        def work() -> None: ...

    assert before == set(mlq.broker.actors)


def test_an_actor_that_is_no_function_is_refused(mlq: MLQ) -> None:
    with pytest.raises(InvalidJob, match="an actor is a function"):
        mlq.actor(5)  # type: ignore[call-overload]


def test_the_time_for_which_an_actor_keeps_results_may_be_a_timedelta(mlq: MLQ) -> None:
    @mlq.actor(result_ttl=timedelta(hours=1))
    def work() -> None: ...

    assert work.submit().record.result_ttl == 3600


def test_a_page_and_a_store_that_cannot_be_are_refused(server: Settings, mlq: MLQ) -> None:
    with pytest.raises(InvalidJob, match="from 1 to 1,000"):
        mlq.jobs(limit=0)
    with pytest.raises(mlqueue.SettingsError, match="both a host"):
        MLQ("x", "localhost", url="redis://localhost")
    with pytest.raises(mlqueue.SettingsError, match="both settings and a url"):
        MLQ("x", url="redis://localhost", settings=server)


def test_a_store_that_cannot_be_reached_is_an_error_that_names_it() -> None:
    mlq = MLQ("x", settings=Settings.load({}, url="redis://:secret@127.0.0.1:1/0", command_timeout=0.1))

    @mlq.actor
    def work() -> None: ...

    with pytest.raises(mlqueue.StoreUnavailable, match=r"127\.0\.0\.1:1") as error:
        work.submit()
    assert "secret" not in str(error.value)
    mlq.close()
    dramatiq.set_broker(None)  # type: ignore[arg-type]


# Types


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed (extra dev)")
def test_what_users_write_is_checked_by_mypy() -> None:
    done = subprocess.run([sys.executable, "-m", "mypy", API], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith(API)] == []
