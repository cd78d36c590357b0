"""What users write, as a type checker sees it. Never run; a test checks it with mypy, strict.

A line with ``type: ignore`` is one that has to be an error: mypy says so when the comment is not needed.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any, assert_type

import dramatiq

import mlqueue
from mlqueue import (
    CurrentJob,
    DeadLetter,
    DeadPage,
    Job,
    JobEvent,
    JobFailed,
    JobRecord,
    LogLine,
    Metric,
    Point,
    Result,
    State,
    Usage,
)
from mlqueue.testing import drain, eager, isolated, temporary_app

mlq = mlqueue.MLQ("vision")


@mlq.actor
def train(lr: float, epochs: int = 10) -> str:
    job = mlqueue.current_job()
    assert_type(job, CurrentJob)
    for epoch in job.track(range(epochs), note="epochs"):
        assert_type(epoch, int)
        job.progress(100 * epoch / epochs, f"epoch {epoch}")
        job.log_metrics(epoch, loss=0.5, accuracy=1)
        job.save_checkpoint({"epoch": epoch})
        if job.stopping:
            job.hand_back()
    return f"{lr}"


@mlq.actor(queue_name="images", max_retries=5, priority=-1, time_limit=60_000, throws=ValueError, sync_ack=True)
def classify(image: bytes) -> Result:
    return Result(short="cat", full=image, content_type="image/png")


@mlq.actor
async def fetch(url: str) -> bytes:
    return url.encode()


@mlq.actor(actor_name="other")
async def fetch_with_options(url: str) -> int:
    return len(url)


# submit takes what the function takes, and gives a job of what it returns.
assert_type(train.submit(0.1, epochs=3), Job[str])
assert_type(train.submit(0.1).result(timeout=60), str)
assert_type(train(0.1), str)
assert_type(train.submit(0.1).metrics(), dict[str, list[Point]])
assert_type(train.submit(0.1).metrics(follow=True, timeout=5), Iterator[Metric])
assert_type(train.submit(0.1).logs(tail=5), list[LogLine])
assert_type(train.submit(0.1).logs(follow=True), Iterator[LogLine])
assert_type(train.submit(0.1).estimated_start, float | None)
assert_type(train.submit(0.1).record.usage, Usage | None)
assert_type(classify.submit(b"").result(), Result)
assert_type(fetch.submit("http://").result(), bytes)
assert_type(fetch_with_options.submit("http://").result(datetime.timedelta(seconds=1)), int)
assert_type(train.send(0.1), dramatiq.Message[str])
train.submit("much")  # type: ignore[arg-type]
train.submit(0.1, epoch=3)  # type: ignore[call-arg]
train.submit()  # type: ignore[call-arg]

# with_options keeps the types.
later = train.with_options(delay=datetime.timedelta(minutes=1), tags=["night"], priority=3, job_id="one")
assert_type(later.submit(0.1, epochs=3), Job[str])
later.submit(0.1, epochs="three")  # type: ignore[arg-type]
train.with_options(delay="1 minute")  # type: ignore[arg-type]
assert_type(train.submit_many([(0.1,), {"lr": 0.2, "epochs": 3}]), list[Job[str]])
assert_type(later.submit_many([(0.1, 2)]), list[Job[str]])

# By name nothing is known of arguments and results.
assert_type(mlq.submit("elsewhere", 1, 2, x=3), Job[Any])
assert_type(mlq.job("id"), Job[Any])


# Filters of dead letters are known by their names.
assert_type(mlq.dead_letters.list(actor="train", older_than=datetime.timedelta(days=7), limit=10), DeadPage)
assert_type(list(mlq.dead_letters), list[JobRecord])
assert_type(mlq.dead_letters.show("id"), DeadLetter)
assert_type(mlq.dead_letters.requeue_all(reason="failed", text="CUDA"), list[str])
mlq.dead_letters.purge_all(older="7d")  # type: ignore[call-arg]
mlq.dead_letters.count(older_than="7d")  # type: ignore[arg-type]

# Data are texts or bytes, and come back as bytes.
assert_type(mlq.data.put("text", key="k", expiry=60), str)
assert_type(mlq.data.get("k"), bytes | None)
mlq.data.put({"a": 1})  # type: ignore[arg-type]
assert_type(mlq.clear(["dead", State.SUCCEEDED], older_than=datetime.timedelta(days=1)), int)

# MLQ's own calls.
job_id = mlq.post({"a": 1}, "https://example.org/done", ["blur"], delay=3, priority=-1, tags=["night"])
assert_type(job_id, str)
mlq.post("x", functions=[print])  # type: ignore[list-item]
assert_type(mlq.get_job(job_id), dict[str, Any])
assert_type(mlq.get_progress(job_id), str)
assert_type(mlq.job_count(), int)
assert_type(mlq.create_listener(lambda msg, utils: 1, threads=2), bool)
assert_type(mlq.remove_listener("blur"), bool)
assert_type(mlq.join(timeout=datetime.timedelta(seconds=1)), bool)
mlq.create_reaper(job_timeout=datetime.timedelta(minutes=5), max_retries=5).stop()
mlq.job("id").extend(datetime.timedelta(minutes=5))


def look(job: Job[str]) -> None:
    assert_type(job.state, State)
    assert_type(job.record, JobRecord)
    assert_type(job.progress, int | float | str | None)
    assert_type(job.position, int | None)
    assert_type(job.short_result, bool | int | float | str | None)
    assert_type(job.exception(timeout=1), JobFailed | None)
    assert_type(job.wait(1.5), bool)
    assert_type(job.events(), Iterator[JobEvent])
    anything: Job[object] = job  # a job of str is one of object
    anything.cancel()


async def use(job: Job[str]) -> None:
    assert_type(await job, str)


def tested() -> None:
    with temporary_app() as app, eager(app), isolated(mlq):
        assert_type(drain(app, ["default"], timeout=3), list[JobRecord])
