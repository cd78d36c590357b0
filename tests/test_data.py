"""Data that jobs and programs keep for each other, and clearing a namespace of jobs and data."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import dramatiq
import pytest
from support import eventually

from mlqueue import MLQ, InvalidJob, JobNotFound, Settings, State, StoreError, codec, current_job
from mlqueue.job import DeadReason, JobRecord, NewJob, new_id
from mlqueue.store.records import CALLBACKS, pack_dead, quote
from mlqueue.store.store import CHUNK, REMOVE_BATCH
from mlqueue.testing import drain

SIZES = [0, 1, 100, CHUNK, CHUNK + 1, 2 * CHUNK + 5]


def keys(mlq: MLQ) -> set[str]:
    found = mlq.client.scan_iter(f"{mlq.store.root}:*", count=1000)
    return {key.decode().removeprefix(mlq.store.root + ":") for key in found}


# Putting and getting


@pytest.mark.parametrize("size", SIZES)
def test_data_of_any_size_come_back_as_they_were(mlq: MLQ, size: int) -> None:
    value = (b"\0\xffab" * (size // 4 + 1))[:size]
    key = mlq.data.put(value)
    assert mlq.data.get(key) == value
    assert mlq.data.put(b"other", key) == key
    assert mlq.data.get(key) == b"other"
    assert mlq.data.put(value, key) == key
    assert mlq.data.get(key) == value
    assert {-1} == {mlq.client.pttl(f"{mlq.store.root}:{name}") for name in keys(mlq)}
    assert mlq.data.delete(key) is True
    assert mlq.data.delete(key) is False
    assert mlq.data.get(key) is None
    assert set() == keys(mlq)


def test_text_is_kept_as_utf_8_and_keys_may_be_any_text(mlq: MLQ) -> None:
    for key in ("a", "ü{1}:*?[x]", "a:b", "a b\n", "\U0001f600" * 512, "data", "datas"):
        assert mlq.data.put(f"text of {key} ä", key) == key
        assert mlq.data.get(key) == f"text of {key} ä".encode()
    assert mlq.data.get("a:") is None


def test_a_key_is_made_where_none_is_given(mlq: MLQ) -> None:
    one, two = mlq.data.put("1"), mlq.data.put("2")
    assert one != two
    assert (mlq.data.get(one), mlq.data.get(two)) == (b"1", b"2")


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("", "a str of 1 to 512 characters; got 0 characters"),
        ("a" * 513, "got 513 characters"),
        (5, "got a int"),
        (b"a", "got a bytes"),
        ("\ud800", "the key of data: a text with a lone surrogate"),
    ],
    ids=["empty", "long", "int", "bytes", "surrogate"],
)
def test_a_key_that_cannot_be_is_refused(mlq: MLQ, key: Any, said: str) -> None:
    for act in (lambda: mlq.data.put("x", key), lambda: mlq.data.get(key), lambda: mlq.data.delete(key)):
        with pytest.raises(InvalidJob, match=said):
            act()
    assert set() == keys(mlq)


@pytest.mark.parametrize(
    ("data", "expiry", "said"),
    [
        ({"a": 1}, None, "data of type dict cannot be kept; give a str or bytes"),
        (None, None, "data of type NoneType cannot be kept"),
        ("\udcff", None, "data: a text with a lone surrogate"),
        ("x", -1, "expiry=-1: a duration"),
        ("x", "7d", "expiry='7d': a duration"),
    ],
    ids=str,
)
def test_data_that_cannot_be_kept_are_refused(mlq: MLQ, data: Any, expiry: Any, said: str) -> None:
    with pytest.raises(InvalidJob, match=said):
        mlq.data.put(data, "k", expiry)
    assert mlq.data.get("k") is None


def test_data_have_a_bound_and_the_error_says_what_to_do(server: Settings, mlq: MLQ) -> None:
    small = MLQ(mlq.name, settings=dataclasses.replace(server, max_data_bytes=5))
    try:
        small.data.put("ä" * 2 + "x", "k")
        with pytest.raises(
            InvalidJob, match=r"data of 6 bytes cannot be kept; allowed are 5 \(MLQUEUE_MAX_DATA_BYTES\)"
        ):
            small.data.put("ä" * 3, "k")
        assert mlq.data.get("k") == "ääx".encode()
    finally:
        small.close()
    assert Settings.load({}).max_data_bytes == 512 * 2**20


@pytest.mark.parametrize("size", [10, CHUNK + 1])
def test_data_go_when_their_time_is_over_with_all_that_belongs_to_them(mlq: MLQ, size: int) -> None:
    mlq.data.put(b"x" * size, "kept", expiry=600)
    mlq.data.put(b"x" * size, "brief", expiry=timedelta(milliseconds=20))
    eventually(lambda: mlq.data.get("brief") is None)
    mlq.data.put(b"again", "brief", expiry=600)
    # What came in its place has its own time: none.
    mlq.data.put(b"y" * size, "brief")
    assert mlq.data.get("brief") == b"y" * size
    assert mlq.data.delete("brief")
    assert {key.partition(":")[0] for key in keys(mlq)} == {"data", "datas"}
    for key in keys(mlq) - {"datas"}:
        assert 500_000 < mlq.client.pttl(f"{mlq.store.root}:{key}") <= 600_000, key


def test_no_namespace_sees_the_data_of_another(server: Settings) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    apps = [MLQ(text, settings=server) for text in (name, name + "2", name[:-1] + "*", name + ":data")]
    try:
        for number, app in enumerate(apps):
            app.data.put(f"of {number}", "k")
        assert [b"of 0", b"of 1", b"of 2", b"of 3"] == [app.data.get("k") for app in apps]
        assert apps[0].data.delete("k")
        assert [None, b"of 1", b"of 2", b"of 3"] == [app.data.get("k") for app in apps]
    finally:
        for app in apps:
            app.clear()
            app.close()


def test_who_reads_while_another_replaces_gets_one_of_both_whole(mlq: MLQ) -> None:
    values = [bytes([letter]) * size for letter, size in ((97, CHUNK + 7), (98, 3), (99, 2 * CHUNK), (100, CHUNK + 7))]
    mlq.data.put(values[0], "k")
    over = threading.Event()

    def replace() -> None:
        for turn in range(24):
            mlq.data.put(values[turn % 4], "k")
        over.set()

    writer = threading.Thread(target=replace)
    writer.start()
    seen = set()
    while not over.is_set():
        found = mlq.data.get("k")
        assert found in values
        seen.add(found[:1])
    writer.join(10)
    assert len(seen) > 1


def test_data_that_something_else_has_broken_are_an_error_and_no_endless_look(mlq: MLQ) -> None:
    mlq.data.put(b"x" * (CHUNK + 1), "k")
    [chunk] = [key for key in keys(mlq) if key.endswith(":1")]
    mlq.client.unlink(f"{mlq.store.root}:{chunk}")
    with pytest.raises(StoreError, match="a part of the data under 'k' is gone"):
        mlq.data.get("k")
    assert mlq.data.delete("k")


def test_a_job_and_a_program_share_their_data(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def work(key: str) -> str:
        job = current_job()
        text = job.fetch_data(key)
        assert text is not None
        return job.store_data(text.upper(), "out", expiry=60)

    job = work.submit(mlq.data.put("hello"))
    drain(mlq)
    assert mlq.data.get(job.result(timeout=0)) == b"HELLO"


def test_a_job_that_stores_too_much_fails_with_what_is_allowed(server: Settings, mlq: MLQ) -> None:
    small = MLQ(mlq.name, settings=dataclasses.replace(server, max_data_bytes=5))

    @small.actor(max_retries=0)
    def work() -> None:
        current_job().store_data("123456")

    try:
        job = work.submit()
        drain(small)
        assert "allowed are 5" in str(job.exception(timeout=0))
    finally:
        small.close()


# Clearing


@pytest.fixture
def full(mlq: MLQ) -> Iterator[dict[str, str]]:
    """A job in each state, and data. The running one ends with the test."""
    begun, go = threading.Event(), threading.Event()

    @mlq.actor
    def work() -> str:
        return "x" * 1000

    @mlq.actor(max_retries=0)
    def boom() -> None:
        raise ValueError("always")

    @mlq.actor
    def run() -> None:
        begun.set()
        go.wait(20)

    ids = {"succeeded": work.submit().id, "dead": boom.submit().id}
    drain(mlq)
    running = run.submit()
    mlq.broker.supervise(uuid.uuid4().hex)
    worker = dramatiq.Worker(mlq.broker, worker_threads=1)
    worker.start()
    begun.wait(10)
    ids |= {"queued": work.submit().id, "scheduled": work.with_options(delay=3600, tags=["later"]).submit().id}
    cancelled = work.submit()
    cancelled.cancel()
    ids |= {"cancelled": cancelled.id, "running": running.id}
    mlq.data.put("kept", "k")
    mlq.data.put(b"x" * (CHUNK + 1), "large")
    try:
        assert {state: mlq.job(job_id).state for state, job_id in ids.items()} == {state: state for state in ids}
        yield ids
    finally:
        go.set()
        worker.stop()


def left(mlq: MLQ, ids: dict[str, str]) -> set[str]:
    return {state for state, job_id in ids.items() if mlq.store.records([job_id])[0] is not None}


def test_everything_that_does_not_run_is_forgotten_and_the_data_too(mlq: MLQ, full: dict[str, str]) -> None:
    assert mlq.clear() == 5
    assert {"running"} == left(mlq, full)
    assert (None, None) == (mlq.data.get("k"), mlq.data.get("large"))
    assert mlq.clear() == 0
    forgotten = [job_id for state, job_id in full.items() if state != "running"]
    assert [] == [key for key in keys(mlq) if any(job_id in key for job_id in forgotten)]
    shared = {"sched", "exp", "dead", "late", "tag", "data", "datas", "s"}
    assert set() == shared & {key.partition(":")[0] for key in keys(mlq)}


@pytest.mark.parametrize("states", [["dead"], [State.QUEUED, "scheduled"], ["succeeded", "cancelled"]], ids=str)
def test_only_the_states_that_are_named_are_forgotten(mlq: MLQ, full: dict[str, str], states: list[Any]) -> None:
    assert mlq.clear(states) == len(states)
    assert set(full) - {str(state) for state in states} == left(mlq, full)
    assert mlq.data.get("k") == b"kept"


def test_one_state_may_be_named_alone(mlq: MLQ) -> None:
    job = mlq.submit("train")
    assert mlq.clear("dead") == 0
    assert mlq.clear(State.QUEUED) == 1
    with pytest.raises(JobNotFound):
        _ = job.state


def test_the_age_is_that_of_the_end_or_of_what_waits(mlq: MLQ) -> None:
    now = time.time()

    def bury(created: float, died: float) -> str:
        job = NewJob(id=new_id(), queue="default", actor="train", body=codec.encode_call([], {}))
        record = JobRecord(
            id=job.id,
            state=State.DEAD,
            queue="default",
            actor="train",
            created_at=now - created,
            finished_at=now - died,
            dead_reason=DeadReason.FAILED,
        )
        mlq.store.import_dead([pack_dead(job, record)])
        return job.id

    long_ago, just_now = bury(7200, 7000), bury(7200, 10)
    waiting = mlq.submit("train")
    mlq.client.hset(f"{mlq.store.root}:j:{waiting.id}", "t", round((now - 7200) * 1000))
    young = mlq.submit("train")
    mlq.data.put("kept", "k")
    assert mlq.clear(older_than=timedelta(hours=3)) == 0
    assert mlq.clear("succeeded", older_than=3600) == 0
    assert mlq.clear(older_than=3600) == 2
    assert {just_now, young.id} == {record.id for record in mlq.jobs().jobs}
    with pytest.raises(JobNotFound):
        mlq.job(long_ago)
    assert mlq.data.get("k") == b"kept"


@pytest.mark.parametrize(
    ("states", "older_than", "said"),
    [
        ("running", None, "a job that runs is not forgotten; cancel it first"),
        (["dead", "lost"], None, "the states are queued, scheduled"),
        (None, "7d", "older_than='7d': a duration"),
        (None, -1, "older_than=-1: a duration"),
    ],
    ids=str,
)
def test_what_cannot_be_cleared_is_refused(mlq: MLQ, states: Any, older_than: Any, said: str) -> None:
    mlq.submit("train")
    with pytest.raises(InvalidJob, match=said):
        mlq.clear(states, older_than)
    assert mlq.job_count() == 1


def test_clearing_goes_on_until_all_are_forgotten(mlq: MLQ) -> None:
    jobs = [
        NewJob(id=new_id(), queue=f"q{i % 3}", actor="a", body=b"x", priority=i % 5 - 2)
        for i in range(2 * REMOVE_BATCH + 10)
    ]
    mlq.store.submit(jobs)
    for i in range(REMOVE_BATCH + 10):
        mlq.data.put("x", f"k{i}")
    assert mlq.clear() == len(jobs)
    assert (0, []) == (mlq.job_count(), [key for key in keys(mlq) if key.startswith("data")])


def test_names_that_begin_alike_or_look_like_patterns_are_not_touched(server: Settings) -> None:
    name = f"test-{uuid.uuid4().hex[:8]}"
    # Each of them, as a pattern or as the beginning of a name, would take others along.
    names = [name, name + "2", name[:-1], "*", name[:-1] + "?", f"[{name}]", name + "}:x", f"{name}:j:", "mlq:{" + name]
    apps = [MLQ(text, settings=server) for text in names]
    try:
        jobs = []
        for app in apps:
            jobs.append(app.submit("train"))
            app.data.put("kept", "k")
        for number, app in enumerate(apps):
            assert app.clear() == 1
            assert [1] * (len(apps) - number - 1) == [other.job_count() for other in apps[number + 1 :]]
            assert [b"kept"] * (len(apps) - number - 1) == [other.data.get("k") for other in apps[number + 1 :]]
    finally:
        for app in apps:
            for key in keys(app):
                app.client.unlink(f"{app.store.root}:{key}")
            app.close()


def test_jobs_that_come_while_it_clears_stay(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(3):
        mlq.submit("train")
    remove = mlq.store.remove
    late = []

    def remove_later(job_ids: Any, **rest: Any) -> int:
        late.append(mlq.submit("train").id)
        return remove(job_ids, **rest)

    monkeypatch.setattr(mlq.store, "remove", remove_later)
    assert mlq.clear("queued") == 3
    assert late == [record.id for record in mlq.jobs().jobs]


def test_what_is_put_back_while_it_clears_stays(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    job = mlq.submit("train")
    job.cancel()
    remove = mlq.store.remove

    def remove_later(job_ids: Any, **rest: Any) -> int:
        if job.state is State.CANCELLED:
            job.retry()
        return remove(job_ids, **rest)

    monkeypatch.setattr(mlq.store, "remove", remove_later)
    assert mlq.clear("cancelled") == 0
    assert job.state is State.QUEUED


def test_callbacks_that_wait_are_forgotten_with_their_jobs(mlq: MLQ) -> None:
    job = mlq.submit("train", callback="http://example.com/")
    job.cancel()
    assert len(mlq.store.page(queue=CALLBACKS).jobs) == 1
    assert mlq.clear("dead") == 0
    assert len(mlq.store.page(queue=CALLBACKS).jobs) == 1
    assert mlq.clear() == 1
    assert [] == mlq.store.page(queue=CALLBACKS).jobs


def test_a_key_of_data_is_quoted_in_the_store(mlq: MLQ) -> None:
    mlq.data.put("x", "a:b*")
    assert f"data:{quote('a:b*')}" in keys(mlq)
