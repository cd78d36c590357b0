"""What a user of MLQ finds again: the calls that post jobs and look at them, and the dict that shows a job."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pytest
from listening import listening
from support import StartWorker, eventually, fresh_app

import mlqueue
import mlqueue.queue
from mlqueue import MLQ, InvalidJob, JobNotFound, Settings, SettingsError, State, StoreUnavailable
from mlqueue.job import NewJob, new_id
from mlqueue.message import LISTENER

#: What the dict of a job has.
KEYS = {
    "id",
    "timestamp",
    "worker",
    "processing_started",
    "processing_finished",
    "progress",
    "short_result",
    "result",
    "callback",
    "retries",
    "functions",
    "msg",
}


@pytest.fixture
def app(mlq: MLQ) -> Iterator[MLQ]:
    with listening(mlq):
        yield mlq


def ended(app: MLQ, job_id: str) -> dict[str, Any]:
    app.job(job_id).wait(15)
    return app.get_job(job_id)


# Making one


def test_the_old_import_gives_the_same_class() -> None:
    assert mlqueue.queue.MLQ is mlqueue.MLQ


def test_host_and_port_go_before_the_url_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLQUEUE_URL", "redis://elsewhere:1/0")
    assert MLQ("app", "localhost", 6380, 3).settings.url == "redis://localhost:6380/3"
    assert MLQ("app").settings.url == "redis://elsewhere:1/0"
    assert MLQ("app", url="redis://there/2").settings.url == "redis://there/2"


def test_the_arguments_may_be_given_by_the_names_that_they_have_in_mlq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLQUEUE_NAMESPACE", "elsewhere")
    mlq = MLQ(q_name="app", redis_host="localhost", redis_port=6380, redis_db=3)
    assert (mlq.name, mlq.settings.url) == ("app", "redis://localhost:6380/3")
    with pytest.raises(SettingsError, match="both a name"):
        MLQ("app", q_name="other")


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ({"redis_port": 6380}, "redis://localhost:6380/0"),
        ({"redis_port": 6379}, "redis://localhost:6379/0"),
        ({"redis_db": 2}, "redis://localhost:6379/2"),
        ({"redis_host": "there"}, "redis://there:6379/0"),
        ({"redis_host": "::1", "redis_port": 6380}, "redis://[::1]:6380/0"),
        ({"redis_host": "[::1]"}, "redis://[::1]:6379/0"),
    ],
    ids=str,
)
def test_a_port_or_a_database_alone_is_not_passed_over(given: dict[str, Any], url: str) -> None:
    assert MLQ("app", **given).settings.url == url


@pytest.mark.parametrize("host", ["redis://localhost:6379", "", b"localhost"], ids=repr)
def test_what_is_no_host_is_refused_with_the_cure(host: Any) -> None:
    with pytest.raises(SettingsError, match=r"redis_host=.* url='redis://localhost:6379/0'"):
        MLQ("app", host)


@pytest.mark.parametrize("call", ["post", "get_job", "create_listener", "create_reaper"])
def test_where_nothing_listens_the_error_says_where_and_what_to_do(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLQUEUE_COMMAND_TIMEOUT", "0")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mlq = MLQ("app", "localhost", port, 0)
    arguments = ["x"] if call in ("post", "get_job") else []
    with pytest.raises(StoreUnavailable, match=f"redis://localhost:{port}/0 cannot be reached") as caught:
        getattr(mlq, call)(*arguments)
    assert "Is it running" in str(caught.value)
    assert "host and port" in str(caught.value)
    mlq.close()


# Posting


def test_post_returns_an_id_at_once_that_is_time_ordered_and_unguessable(mlq: MLQ) -> None:
    ids = [mlq.post(number) for number in range(50)]
    assert sorted(set(ids)) == ids
    for job_id in ids:
        assert isinstance(job_id, str)
        assert len(job_id) == 32
        assert int(job_id, 16) >> 76 & 0xF == 7
    assert len({job_id[16:] for job_id in ids}) == 50


@pytest.mark.parametrize(
    "msg",
    [
        None,
        True,
        -7,
        1.5,
        "text",
        "",
        b"\x00\xff",
        [1, [2, {"a": b"b"}]],
        {"my_data": 1234, "nested": {"x": None}},
        datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
        np.arange(6, dtype=np.float32).reshape(2, 3),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_message_of_any_kind_arrives_as_it_was(app: MLQ, msg: Any) -> None:
    seen = []

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        seen.append((msg, utils["full_message"]["msg"]))

    app.create_listener(listener)
    job = ended(app, app.post(msg))
    assert job["progress"] == 100
    for arrived in (*seen[0], job["msg"]):
        assert type(arrived) is type(msg)
        np.testing.assert_equal(arrived, msg)


def test_jobs_run_in_the_order_in_which_they_were_posted(app: MLQ) -> None:
    ids = [app.post(number) for number in range(30)]
    seen: list[int] = []
    app.create_listener(lambda msg, utils: seen.append(msg))
    ended(app, ids[-1])
    assert seen == list(range(30))


def test_the_options_of_submit_may_be_given(app: MLQ) -> None:
    seen: list[str] = []
    later = app.post("later", delay=0.3)
    assert app.job(later).state is State.SCHEDULED
    urgent = [app.post("b", priority=5), app.post("a", priority=-5, tags=["night"])]
    assert [record.id for record in app.jobs(tag="night").jobs] == [urgent[1]]
    app.create_listener(lambda msg, utils: seen.append(msg))
    ended(app, later)
    assert seen == ["a", "b", "later"]


def test_what_is_posted_is_kept_for_ever_unless_it_says_otherwise(mlq: MLQ) -> None:
    assert mlq.job(mlq.post(1)).record.result_ttl is None
    assert mlq.job(mlq.post(1, result_ttl=60)).record.result_ttl == 60


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"functions": "my_func"}, r"functions=\['my_func'\]"),
        ({"functions": []}, "a list of 1 to 100 names"),
        ({"functions": [len]}, "a list of 1 to 100 names"),
        ({"functions": 5}, r"give a list of names: functions=\[5\]"),
        ({"callback": "ftp://x"}, "callback='ftp://x'"),
        ({"dealy": 3}, "did you mean delay"),
        ({"result_ttl": "long"}, "result_ttl"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_cannot_be_posted_is_refused_with_the_cure(mlq: MLQ, given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidJob, match=text):
        mlq.post("x", **given)
    assert mlq.job_count() == 0


# The dict


def test_the_dict_of_a_job_that_waits(mlq: MLQ) -> None:
    before = time.time()
    job_id = mlq.post({"a": 1}, callback="http://127.0.0.1:1/done", functions=["one", "two"])
    job = mlq.get_job(job_id)
    assert set(job) == KEYS
    assert before - 1 < job.pop("timestamp") < time.time() + 1
    assert job == {
        "id": job_id,
        "worker": None,
        "processing_started": None,
        "processing_finished": None,
        "progress": None,
        "short_result": None,
        "result": None,
        "callback": "http://127.0.0.1:1/done",
        "retries": 0,
        "functions": ["one", "two"],
        "msg": {"a": 1},
    }
    assert mlq.get_result(job_id) == mlq.get_job(job_id)


def test_the_dict_of_a_job_while_it_runs_and_when_it_has_ended(app: MLQ) -> None:
    go, reported = threading.Event(), threading.Event()

    def listener(msg: Any, utils: dict[str, Any]) -> str:
        reported.wait(15)
        utils["update_progress"](40)
        go.wait(15)
        return "done"

    app.create_listener(listener)
    job_id = app.post("x")
    eventually(lambda: app.job(job_id).state is State.RUNNING)
    running = app.get_job(job_id)
    assert running["progress"] == 0
    assert isinstance(running["worker"], str)
    assert isinstance(running["processing_started"], float)
    assert (running["processing_finished"], running["result"], running["functions"]) == (None, None, None)
    reported.set()
    eventually(lambda: app.get_job(job_id)["progress"] == 40)
    assert app.get_job(job_id)["result"] is None
    go.set()
    job = ended(app, job_id)
    assert (job["progress"], job["result"], job["short_result"]) == (100, "done", "done")
    assert job["processing_started"] <= job["processing_finished"] <= time.time() + 1
    assert job["worker"] == running["worker"]


def test_the_dict_of_a_job_that_failed_has_the_errors_text_and_when(app: MLQ) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> None:
        raise ValueError("first line\nsecond line")

    app.create_listener(listener)
    job = ended(app, app.post("x"))
    assert job["progress"] == -1
    assert job["result"] == "ValueError: first line\nsecond line"
    assert job["short_result"] == "ValueError: first line"
    assert job["processing_finished"] >= job["processing_started"]
    assert job["retries"] == 0


def test_the_result_of_a_failure_is_never_empty(app: MLQ) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> None:
        raise AssertionError

    app.create_listener(listener)
    job = ended(app, app.post("x"))
    assert (job["short_result"], job["result"]) == ("AssertionError", "AssertionError")


def test_retries_are_counted(app: MLQ) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> int:
        if utils["full_message"]["retries"] < 2:
            raise ValueError
        return 7

    app.create_listener(listener)
    job = ended(app, app.post("x", max_retries=2, min_backoff=1, max_backoff=2))
    assert (job["retries"], job["result"]) == (2, 7)


def test_the_dict_of_a_cancelled_job_is_no_success(mlq: MLQ) -> None:
    job_id = mlq.post("x")
    mlq.job(job_id).cancel()
    job = mlq.get_job(job_id)
    assert (job["progress"], job["result"]) == (-1, "cancelled")
    assert job["processing_finished"] is not None


def test_the_dict_of_another_actors_job_has_its_name_and_arguments(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def add(a: int, b: int = 0) -> int:
        return a + b

    start_worker()
    job = add.submit(1, b=2)
    assert job.result(timeout=15) == 3
    assert mlq.get_job(job.id)["msg"] == {"actor": "add", "args": [1], "kwargs": {"b": 2}}
    assert mlq.get_job(job.id)["result"] == 3


def test_a_job_whose_message_cannot_be_decoded_can_be_looked_at(app: MLQ) -> None:
    job_id = new_id()
    app.store.submit([NewJob(id=job_id, queue="default", actor=LISTENER, body=b"\xc1garbage")])
    app.create_listener(lambda msg, utils: 1)
    job = ended(app, job_id)
    assert (job["progress"], job["msg"]) == (-1, None)
    assert "DecodeError" in job["result"]


@pytest.mark.parametrize("call", ["get_job", "get_result", "get_progress"])
def test_an_unknown_id_is_a_404_and_a_key_error(mlq: MLQ, call: str) -> None:
    for job_id in ("nope", "", 1, None, "\ud800"):
        with pytest.raises(JobNotFound) as caught:
            getattr(mlq, call)(job_id)
        assert f"no job {job_id!r} in" in str(caught.value)
        assert isinstance(caught.value, KeyError)
        assert caught.value.status == 404


def test_results_that_are_false_are_results(app: MLQ) -> None:
    app.create_listener(lambda msg, utils: msg)
    for value in (0, "", False, None, []):
        job = ended(app, app.post(value))
        assert (job["progress"], job["result"]) == (100, value)


# The text of the progress


def test_the_text_of_the_progress_follows_the_state_and_not_the_number(app: MLQ) -> None:
    step = threading.Semaphore(0)

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        for value in (None, 12, 100, -1, "nearly", 0.5):
            if value is not None:
                utils["update_progress"](value)
            step.acquire(timeout=15)
        if msg == "bad":
            raise ValueError

    job_id = app.post("good")
    assert app.get_progress(job_id) == "[queued; not started]"
    assert app.get_progress(app.post("later", delay=60)) == "[queued; not started]"
    app.create_listener(listener)
    for text in ("[started]", "12", "100", "-1", "nearly", "0.5"):
        eventually(lambda text=text: app.get_progress(job_id) == text)
        assert app.job(job_id).state is State.RUNNING
        step.release()
    eventually(lambda: app.get_progress(job_id) == "[completed]")
    bad = app.post("bad")
    step.release(6)
    eventually(lambda: app.get_progress(bad) == "[failed]")


def test_the_text_of_a_cancelled_job(mlq: MLQ) -> None:
    job_id = mlq.post("x")
    mlq.job(job_id).cancel()
    assert mlq.get_progress(job_id) == "[cancelled]"


# Counting, and whose jobs are whose


def test_jobs_are_counted_until_they_have_ended(app: MLQ) -> None:
    assert app.job_count() == 0
    go = threading.Event()

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        go.wait(15)
        if msg == "fails":
            raise ValueError

    app.post("later", delay=60)
    ids = [app.post("runs"), app.post("fails"), app.post("waits", callback="http://127.0.0.1:1/")]
    assert app.job_count() == 4
    app.create_listener(listener)
    eventually(lambda: app.job(ids[0]).state is State.RUNNING)
    assert app.job_count() == 4
    go.set()
    ended(app, ids[-1])
    assert app.job_count() == 1


def test_a_name_that_is_the_beginning_of_another_one_is_another_name(mlq: MLQ, server: Settings) -> None:
    with fresh_app(server) as other:
        longer = MLQ(mlq.name + "-more", settings=server)
        try:
            ids = {app: app.post(app.name) for app in (mlq, longer, other)}
            seen: list[str] = []
            with listening(longer):
                longer.create_listener(lambda msg, utils: seen.append(msg))
                ended(longer, ids[longer])
            assert seen == [longer.name]
            assert (mlq.job_count(), longer.job_count(), other.job_count()) == (1, 0, 1)
            for app, stranger in ((mlq, longer), (longer, mlq), (other, mlq)):
                with pytest.raises(JobNotFound):
                    app.get_job(ids[stranger])
            longer.post("again")
            mlq.broker.flush_all()
            assert (mlq.job_count(), longer.job_count()) == (0, 1)
        finally:
            for key in longer.client.scan_iter(f"{longer.store.root}:*"):
                longer.client.unlink(key)
            longer.close()
