"""GET /metrics: what Prometheus reads is what has happened, counted by the store once a call and within bounds."""

from __future__ import annotations

import dataclasses
import re
import time
import uuid
from importlib import resources
from typing import Any

import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, ROOT, mounted
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from receivers import receiver
from support import StartWorker, eventually, fresh_app

from mlqueue import MLQ, Retry, Settings, codec, current_job
from mlqueue.batch.actor_crew import PoolStats
from mlqueue.job import JobError, NewJob, Result, new_id
from mlqueue.store import Held, Settle, Store
from mlqueue.store.events import BOUNDS
from mlqueue.store.scripts import script
from mlqueue.store.store import common_of, encode_result
from mlqueue.testing import drain

ERROR = JobError(type="", message="no")


def families(client: FlaskClient) -> dict[str, Metric]:
    """The metrics by name, read as Prometheus reads them."""
    answer = client.get(f"{PREFIX}/metrics")
    assert (200, "text/plain; version=0.0.4; charset=utf-8") == (answer.status_code, answer.headers["Content-Type"])
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def values(client: FlaskClient, name: str, *labels: str) -> dict[tuple[str, ...], float]:
    """The values of a metric by these labels."""
    return {
        tuple(sample.labels[label] for label in labels): sample.value
        for sample in families(client)[name].samples
        if sample.name in (name, f"{name}_total")
    }


def histogram(client: FlaskClient, name: str, actor: str) -> tuple[list[float], float, float]:
    """Numbers by bucket (each with those below it), sum and count of an actor."""
    samples = [sample for sample in families(client)[name].samples if sample.labels.get("actor") == actor]
    buckets = [sample.value for sample in samples if sample.name.endswith("_bucket")]
    [total] = [sample.value for sample in samples if sample.name.endswith("_sum")]
    [count] = [sample.value for sample in samples if sample.name.endswith("_count")]
    return buckets, total, count


class Hand:
    """A worker's side of the store, without a worker."""

    def __init__(self, store: Store, actor: str = "work") -> None:
        self.store = store
        self.actor = actor
        self.name = uuid.uuid4().hex
        store.start_worker(self.name, {"queues": ["default"]}, {})

    def submit(self, number: int = 1, **more: Any) -> list[str]:
        jobs = [NewJob(id=new_id(), queue="default", actor=self.actor, body=b"", **more) for _ in range(number)]
        self.store.submit(jobs)
        return [job.id for job in jobs]

    def turn(self, want: int = 0, *settles: Settle) -> list[Held]:
        lanes = [self.store.lane("default", self.actor)]
        command = self.store.turn_command(self.name, uuid.uuid4().hex, want, lanes, settles)
        turn = self.store.read_turn(self.store.connector.execute(*command, script=script("turn")))
        assert [] == turn.refused
        return turn.jobs

    def field(self, job_id: str, name: str, value: int) -> None:
        self.store.connector.execute("HSET", f"{self.store.root}:j:{job_id}", name, value)


@pytest.fixture
def hand(mlq: MLQ) -> Hand:
    return Hand(mlq.store)


def finish(held: Held) -> Settle:
    return Settle.finish(held.id, held.attempt, encode_result(Result.of(None)), common_of())


# What is counted


def test_ends_retries_and_jobs_are_counted_by_actor(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=2, min_backoff=1, max_backoff=2)
    def third_time() -> None:
        if current_job().attempt < 3:
            raise Retry(delay=0)

    @mlq.actor(max_retries=0)
    def fails() -> None:
        raise ValueError("no")

    jobs = [third_time.submit() for _ in range(4)] + [fails.submit() for _ in range(3)]
    third_time.with_options(delay=3600).submit().cancel()
    waiting = third_time.with_options(delay=3600).submit()
    start_worker()
    assert all(job.wait(10) for job in jobs)
    ends = values(client, "mlqueue_jobs_ended", "actor", "state", "reason")
    assert {
        ("third_time", "succeeded", ""): 4,
        ("third_time", "cancelled", ""): 1,
        ("fails", "dead", "failed"): 3,
    } == ends
    assert {("third_time",): 8} == values(client, "mlqueue_job_retries", "actor")
    assert {
        ("default", "third_time", "scheduled"): 1,
        ("default", "third_time", "succeeded"): 4,
        ("default", "third_time", "cancelled"): 1,
        ("default", "fails", "dead"): 3,
    } == values(client, "mlqueue_jobs", "queue", "actor", "state")
    assert (0, 12, 3) == (
        values(client, "mlqueue_queue_length", "queue")["default",],
        histogram(client, "mlqueue_job_run_seconds", "third_time")[2],
        histogram(client, "mlqueue_job_run_seconds", "fails")[2],
    )
    assert {(): 1} == values(client, "mlqueue_workers")
    assert {("default",): 1} == values(client, "mlqueue_queue_workers", "queue")
    assert 0 < values(client, "mlqueue_store_latency_seconds")[()] < 1
    waiting.cancel()


def test_pools_that_prepare_batches_are_there_until_they_have_been_silent_for_long(
    mlq: MLQ, client: FlaskClient
) -> None:
    told = {**vars(PoolStats(given=7, trainer_waited=1.5)), "queue": "batches"}
    mlq.store.publish_pool("lives", codec.encode(told))
    mlq.client.hset(f"{mlq.store.root}:pools", "killed", codec.encode([mlq.store.now() - 60, codec.encode(told)]))
    assert {("batches", "lives"): 7} == values(client, "mlqueue_batch_given", "queue", "pool")
    assert {("batches", "lives"): 1.5} == values(client, "mlqueue_batch_trainer_wait_seconds", "queue", "pool")
    assert ["lives"] == list(mlq.store.pools())
    assert 0 < mlq.client.ttl(f"{mlq.store.root}:pools") <= 15


def test_lost_workers_and_timeouts_are_counted_by_what_was_lost(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    hand.submit(3, job_timeout=3600.0)
    jobs = hand.turn(3)
    for held in jobs[:2]:
        hand.field(held.id, "t", 1)
        hand.field(held.id, "u", 1)
        mlq.client.zadd(f"{mlq.store.root}:late", {held.id: 1})
    mlq.store.sweep("s", 0)
    mlq.store.release(hand.name, "crash", "SIGKILL")
    other = Hand(mlq.store)
    other.turn(3)
    mlq.store.release(other.name, "stall", "lost")
    assert ({("work",): 2}, {("work",): 1}, {("work",): 3}) == tuple(
        values(client, f"mlqueue_job_{what}", "actor") for what in ("timeouts", "crashes", "stalls")
    )
    # No attempt has ended by itself, and a job that was put back at once waits from nobody knows when.
    assert "mlqueue_job_run_seconds_count" not in client.get(f"{PREFIX}/metrics").text
    assert 3 == histogram(client, "mlqueue_job_wait_seconds", "work")[2]


def test_callbacks_are_counted_by_what_became_of_the_try(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(dataclasses.replace(server, callback_allow="loopback")) as app, receiver(404) as refuses:
        client = mounted(app, allow_anonymous=True).test_client()

        @app.actor
        def work() -> None:
            pass

        worker = start_worker(app)
        jobs = [work.with_options(callback=refuses.url).submit() for _ in range(2)]
        eventually(lambda: {"failed"} == {job.record.callback_state for job in jobs})
        worker.stop()
        assert {("failed",): 2} == values(client, "mlqueue_callback_tries", "outcome")
        # They are jobs too, but nobody's.
        assert {("work", "succeeded"): 2} == values(client, "mlqueue_jobs_ended", "actor", "state")
        assert {"work"} == {sample.labels["actor"] for sample in families(client)["mlqueue_job_wait_seconds"].samples}


# Times


def test_a_time_is_in_the_bucket_of_its_bound(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    """At the bound, and above it: by the server's clock, so the bounds are far from what a test takes."""
    now = int(time.time() * 1000)
    expected = [0] * (len(BOUNDS) + 1)
    for seconds, bucket in ((0.0, 0), (20, 7), (59, 8), (61, 9), (86399, 14), (86401, 15), (10**7, 15)):
        [job_id] = hand.submit()
        hand.field(job_id, "t", now - int(seconds * 1000))
        [held] = hand.turn(1)
        hand.field(job_id, "u", now - int(seconds * 1000))
        hand.turn(0, finish(held))
        for n in range(bucket, len(expected)):
            expected[n] += 1
    for name in ("mlqueue_job_wait_seconds", "mlqueue_job_run_seconds"):
        buckets, total, count = histogram(client, name, "work")
        assert (expected, 7) == (buckets, count)
        assert abs(total - (20 + 59 + 61 + 86399 + 86401 + 10**7)) < 5


def test_a_job_waits_since_it_was_due_or_was_put_back_by_hand(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    long_ago = 1_000_000_000_000
    ids = hand.submit(3)
    for job_id in ids:
        hand.field(job_id, "t", long_ago)
    hand.field(ids[0], "d", int(time.time() * 1000) - 40)
    mlq.store.cancel(ids[1])
    mlq.store.retry(ids[1])
    for _ in range(3):
        hand.turn(1)
    buckets, _, count = histogram(client, "mlqueue_job_wait_seconds", "work")
    assert (3, 2, 2) == (count, buckets[-2], buckets[4])


def test_the_oldest_of_a_queue_counts_from_when_it_was_due(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    now = int(time.time() * 1000)
    early = hand.submit(2)[0]
    hand.field(early, "t", now - 1_000_000)
    hand.field(early, "d", now - 30_000)
    [oldest] = values(client, "mlqueue_queue_oldest_seconds", "queue").values()
    assert 29.9 < oldest < 40
    assert 29.9 < client.get(f"{PREFIX}/readyz").json["oldest_waiting"] < 40
    assert 29.9 < client.get(f"{PREFIX}/queues").json["queues"][0]["oldest_waiting"] < 40


def test_the_bounds_of_buckets_are_the_same_in_lua_and_in_python() -> None:
    text = (resources.files("mlqueue.store") / "lua" / "part_counts.lua").read_text("utf-8")
    found = re.search(r"bounds = bounds or \{([\d, \n]+), math.huge \}", text)
    assert found is not None
    assert [int(1000 * bound) for bound in BOUNDS] == [int(number) for number in found[1].split(",")]


def test_every_metric_stands_in_the_how_to_with_kind_and_labels(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    mlq.client.hset(
        f"{mlq.store.root}:m",
        mapping={"e:a:s": 1, "y:a": 1, "x:a": 1, "z:a": 1, "o:a": 1, "c:d": 1, "w:a:10": 1, "r:a:inf": 1},
    )
    hand.submit()
    mlq.store.publish_pool("lives", codec.encode({**vars(PoolStats()), "queue": "batches"}))
    found = {
        sample.name.removesuffix("_bucket"): (family.type, set(sample.labels) - {"le"})
        for family in families(client).values()
        for sample in family.samples
        if not (family.type == "histogram" and sample.name.endswith(("_sum", "_count")))
    }
    told = {}
    for line in (ROOT / "docs/howto/metrics.md").read_text().splitlines():
        match = re.match(r"\| `(mlqueue_\w+)` \| (\w+) \|([^|]*)\|", line)
        if match:
            told[match[1]] = (match[2], set(re.findall(r"`(\w+)`", match[3])))
    assert found == told


# Bounds and costs


def test_there_is_a_bound_to_how_many_counters_there_are(mlq: MLQ, client: FlaskClient, hand: Hand) -> None:
    key = f"{mlq.store.root}:m"
    hand.submit(2)
    first, second = hand.turn(2)
    hand.turn(0, finish(first))
    mlq.client.hset(key, mapping={f"x:actor{n}": 1 for n in range(20_000)})
    size = mlq.client.hlen(key)
    hand.turn(0, finish(second))
    new = Hand(mlq.store, "new")
    new.submit()
    new.turn(0, *[finish(held) for held in new.turn(1)])
    assert size == mlq.client.hlen(key)
    assert {("work",): 2} == values(client, "mlqueue_jobs_ended", "actor")


def test_counters_cost_as_many_commands_for_many_jobs_as_for_one(mlq: MLQ, hand: Hand) -> None:
    hand.submit(41)
    held = hand.turn(41)
    hand.turn(0, finish(held[40]))

    def commands(*settles: Settle) -> int:
        """How often the counters' hash was read, by a turn with these."""
        before = reads()
        hand.turn(0, *settles)
        return reads() - before

    def reads() -> int:
        stats: dict[str, Any] = mlq.client.info("commandstats")
        return int(stats["cmdstat_hmget"]["calls"])

    # Each settle reads its record once, the turn its worker's.
    assert 1 + 1 + 1 == commands(finish(held[0]))
    assert 39 + 1 + 1 == commands(*[finish(one) for one in held[1:40]])


@pytest.mark.parametrize("name", ['a"b\\c\nd', "train: é", "x" * 200])
def test_names_of_actors_are_written_as_prometheus_reads_them(mlq: MLQ, client: FlaskClient, name: str) -> None:
    @mlq.actor(actor_name=name)
    def work() -> None:
        pass

    work.submit()
    drain(mlq)
    assert {(name,): 1} == values(client, "mlqueue_jobs_ended", "actor")
