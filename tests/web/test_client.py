"""The client: the jobs of a web server, as if the store were here - also over connections that break."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import inspect
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hosting import PREFIX, ROOT, mounted
from receivers import receiver
from support import StartWorker, eventually, fresh_app
from werkzeug.serving import BaseWSGIServer, make_server

import mlqueue
from mlqueue import (
    MLQ,
    ActorNotFound,
    EncodeError,
    Forbidden,
    InvalidArguments,
    InvalidJob,
    InvalidTransition,
    JobCancelled,
    JobFailed,
    JobNotFound,
    Result,
    ResultTimeout,
    Settings,
    SettingsError,
    State,
    StoreUnavailable,
    Unauthorized,
)
from mlqueue.client import Client, Job
from mlqueue.keys import ApiKeys
from mlqueue.message import decode_body
from mlqueue.web import keys as key_auth

MIB = 2**20


class Front:
    """A WSGI app before another, which does to requests what a test wants: the k-th gets the k-th treatment."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.treatments: list[Callable[[dict[str, Any], Any], Any] | None] = []
        #: Method, path and query of each request.
        self.seen: list[str] = []
        self.headers: list[dict[str, str]] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Any:
        self.seen.append(f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}")
        self.headers.append({name[5:].lower(): value for name, value in environ.items() if name.startswith("HTTP_")})
        treatment = self.treatments.pop(0) if self.treatments else None
        return (treatment or self.app)(environ, start_response)

    # Treatments

    def loses_the_answer(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The request is carried out, but nobody hears of it."""
        for _ in self.app(environ, lambda *_: lambda _: None):
            pass
        return self.cuts(environ, start_response)

    def cuts(self, environ: dict[str, Any], start_response: Any) -> Any:
        """The connection breaks."""
        environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return [b""]

    def cuts_behind(self, size: int, parts: int = 10**9) -> Callable[[dict[str, Any], Any], Any]:
        """The connection breaks behind so many bytes of the answer, or parts of it."""

        def treat(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
            sent = 0
            answer = self.app(environ, start_response)
            for number, part in enumerate(answer, 1):
                yield part[: size - sent]
                sent += len(part)
                if sent >= size or number >= parts:
                    environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
                    answer.close()
                    return

        return treat

    def says(self, status: str, body: bytes = b"", **headers: str) -> Callable[[dict[str, Any], Any], Any]:
        """Something else answers."""

        def treat(environ: dict[str, Any], start_response: Any) -> Any:
            named = [(name.replace("_", "-"), value) for name, value in headers.items()]
            start_response(status, [("Content-Length", str(len(body))), *named])
            return [body]

        return treat


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """A server with a thread for each connection; its URL."""
    server: BaseWSGIServer = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def mlq(server: Settings) -> Iterator[MLQ]:
    """An app with a namespace that no other test has, whose callbacks may go to this machine."""
    with fresh_app(dataclasses.replace(server, callback_allow="loopback")) as app:
        yield app


@pytest.fixture
def front(mlq: MLQ) -> Front:
    return Front(mounted(mlq, allow_anonymous=True, max_body=4 * MIB).wsgi_app)


@pytest.fixture
def client(front: Front) -> Iterator[Client]:
    with serving(front) as url, Client(url + PREFIX, patience=5) as client:
        yield client


@pytest.fixture
def actors(mlq: MLQ, start_worker: StartWorker) -> MLQ:
    """Actors that may be called over HTTP, and a worker for them."""

    @mlq.actor(http=True)
    def echo(value: Any, more: Any = None) -> Any:
        return value if more is None else [value, more]

    @mlq.actor(http=True)
    def add(x: int, y: int = 1) -> int:
        return x + y

    @mlq.actor(http=True, max_retries=0)
    def fails(text: str) -> None:
        raise ValueError(text)

    @mlq.actor(http=True, min_backoff=1, max_backoff=1)
    def goes_on() -> None:
        job = mlqueue.current_job()
        job.save_checkpoint(job.attempt)
        if job.attempt < 3:
            raise ValueError

    @mlq.actor(http=True)
    def makes(size: int) -> Result:
        return Result(short=size, full=np.random.default_rng(1).bytes(size), content_type="image/png")

    @mlq.actor(http=True, max_retries=0)
    def waits() -> str:
        job = mlqueue.current_job()
        job.progress(10, "begun")
        while mlq.data.get("go") is None:
            if job.cancelled:
                return "cancelled"
            threading.Event().wait(0.01)
        job.progress(90, "nearly")
        while mlq.data.get("end") is None:
            threading.Event().wait(0.01)
        return "gone"

    @mlq.actor
    def not_for_http() -> None:
        pass

    start_worker()
    mlq.create_listener(lambda msg, utils: ("short", msg * 2))
    return mlq


# Submitting and results


def test_what_goes_in_and_out_is_exactly_what_was_given(actors: MLQ, client: Client) -> None:
    for value in (
        np.arange(12, dtype=np.float16).reshape(3, 4),
        np.asfortranarray(np.arange(20_000.0).reshape(100, 200)),
        np.array([(1, 2.5)], dtype=[("a", "<i4"), ("b", "<f8")]),
        b"\x00\xff" * 100_000,
        {"nested": [1, None, True, 2.5, "text", b"bytes"], "at": datetime(2026, 1, 31, tzinfo=UTC)},
        float("inf"),
        2**70,
        "",
        None,
    ):
        back = client.submit("echo", value).result(timeout=15)
        assert type(value) is type(back)
        if isinstance(value, np.ndarray):
            assert (value.dtype, value.shape, value.flags.f_contiguous) == (
                back.dtype,
                back.shape,
                back.flags.f_contiguous,
            )
            assert value.tobytes() == back.tobytes()
        else:
            assert value == back


def test_a_message_is_posted_for_listeners(actors: MLQ, client: Client) -> None:
    job_id = client.post({"a": 1}, tags=["mine"], functions=None)
    assert isinstance(job_id, str)
    assert [job_id] == [record.id for record in client.jobs(tag="mine").jobs]
    result = client.job(client.post([1, 2])).full_result(timeout=15)
    assert Result("short", [1, 2, 1, 2]) == result


def test_short_result_and_media_type_come_too(actors: MLQ, client: Client) -> None:
    job = client.submit("makes", size=10)
    assert (10, "image/png") == (lambda result: (result.short, result.content_type))(job.full_result(15))
    assert (10, State.SUCCEEDED, True) == (job.short_result, job.state, job.done)


def test_options_are_those_of_the_job(mlq: MLQ, actors: MLQ, client: Client) -> None:
    job = client.submit(
        "add", 1, delay=timedelta(minutes=1), priority=-3, tags=["a", "b"], callback="http://localhost:9/x",
        queue_timeout=timedelta(hours=1), hard_time_limit=90,
    )  # fmt: skip
    record = mlq.job(job.id).record
    assert (3600.0, {"hard_time_limit": 90.0}) == (record.queue_timeout, decode_body(mlq.store.body(job.id))[2])
    assert (State.SCHEDULED, -3, ("a", "b"), "http://localhost:9/x") == (
        record.state,
        record.priority,
        record.tags,
        record.callback,
    )
    with pytest.raises(InvalidJob, match="max_retries is no option that may be chosen over HTTP"):
        client.submit_many("add", [(1,)], max_retries=1)
    with pytest.raises(InvalidJob, match="give a list"):
        client.submit("add", 1, tags="a")


def test_many_jobs_are_submitted_in_their_order(actors: MLQ, client: Client, front: Front) -> None:
    jobs = client.submit_many("add", [(n,) if n % 2 else {"x": n, "y": 0} for n in range(1001)], tags=["many"])
    assert 3 == sum(request.startswith("POST") for request in front.seen)
    assert client.wait(jobs[-1:], 20)
    assert [n + n % 2 for n in (0, 1, 500, 501, 1000)] == [jobs[n].result(timeout=15) for n in (0, 1, 500, 501, 1000)]


# The same face


def test_it_has_all_that_a_job_at_the_store_has() -> None:
    for name, member in vars(mlqueue.Job).items():
        if name.startswith("_") and name != "__await__":
            continue
        ours = inspect.getattr_static(Job, name)
        assert type(member) is type(ours), name
        if inspect.isfunction(member):
            assert inspect.signature(member).parameters.keys() == inspect.signature(ours).parameters.keys(), name
    for name in ("submit", "post", "job", "jobs"):
        given = inspect.signature(getattr(mlqueue.MLQ, name)).parameters
        assert given.keys() == inspect.signature(getattr(Client, name)).parameters.keys(), name


def test_a_record_is_the_one_of_the_store(mlq: MLQ, actors: MLQ, client: Client) -> None:
    dead = client.submit("fails", "no", tags=["t"], callback="http://localhost:9/x")
    with pytest.raises(JobFailed):
        dead.result(timeout=15)
    eventually(lambda: mlq.job(dead.id).record.callback_attempts)
    mlq.job(dead.id).cancel()
    resumed = client.submit("goes_on")
    for job in (dead, resumed, client.submit("echo", 1), client.submit("echo", 1, delay=60)):
        job.wait(0 if job.state is State.SCHEDULED else 15)
        ours, theirs = job.record, mlq.job(job.id).record
        assert theirs == ours, job
    record = resumed.record
    began = [attempt.resumed_from and attempt.resumed_from.attempt for attempt in (*record.attempts, record)]
    assert [None, 1, 2] == began
    assert ("builtins.ValueError", "no") == (dead.record.attempts[0].error.type, dead.record.error.message)  # type: ignore[union-attr]


def test_pages_lead_on_to_the_last_job(actors: MLQ, client: Client) -> None:
    submitted = [job.id for job in client.submit_many("echo", [(n,) for n in range(7)], tags=["page"], delay=60)]
    found, cursor = [], None
    while True:
        page = client.jobs(tag="page", state=["scheduled", State.QUEUED], cursor=cursor, limit=3)
        found += [record.id for record in page.jobs]
        cursor = page.cursor
        if cursor is None:
            break
    assert submitted[::-1] == found


def test_jobs_are_cancelled_retried_and_waited_for(mlq: MLQ, actors: MLQ, client: Client) -> None:
    running, waiting = client.submit("waits"), client.submit("echo", 1, delay=60)
    eventually(lambda: running.progress == 10)
    assert (State.RUNNING, None) == (running.state, running.position)
    running.extend(timedelta(minutes=1))
    assert 60.0 == running.record.extended_by
    with pytest.raises(InvalidTransition):
        waiting.extend(1)
    # Told, it may have ended by the time that this is answered.
    assert running.cancel() in (State.RUNNING, State.CANCELLED)
    with pytest.raises(JobCancelled):
        running.result(timeout=15)
    assert (State.CANCELLED, State.CANCELLED) == (waiting.cancel(), waiting.cancel())
    assert isinstance(waiting.exception(), JobCancelled)
    waiting.retry()
    assert 1 == waiting.result(timeout=15)
    assert (None, State.SUCCEEDED) == (waiting.exception(), waiting.cancel())
    with pytest.raises(InvalidTransition):
        waiting.retry()


def test_a_callback_is_delivered_again_and_to_another_url(actors: MLQ, client: Client) -> None:
    with receiver() as one, receiver() as other:
        job = client.submit("add", 1, callback=one.url)
        eventually(lambda: 1 == len(one.of(job.id)))
        job.redeliver()
        eventually(lambda: 2 == len(one.of(job.id)))
        job.redeliver(other.url)
        eventually(lambda: 1 == len(other.of(job.id)))
    with pytest.raises(InvalidTransition):
        client.submit("echo", 1, delay=60, callback="http://localhost:9/x").redeliver()


def test_a_timeout_says_where_the_job_stands(client: Client, actors: MLQ) -> None:
    job = client.submit("echo", 1, delay=60)
    assert not job.wait(0.05)
    assert not client.wait([job, job.id], 0.05)
    with pytest.raises(ResultTimeout, match=f"job {job.id} is scheduled after 0.05 s"):
        job.result(timeout=0.05)
    with pytest.raises(ResultTimeout):
        job.exception(timeout=0)


def test_it_waits_though_the_server_has_no_place_for_those_who_wait(mlq: MLQ, actors: MLQ) -> None:
    app = mounted(mlq, allow_anonymous=True, max_waits=1)
    with serving(app) as url, Client(url + PREFIX) as client:
        jobs = [client.submit("waits"), client.submit("waits")]
        done = []
        threads = [threading.Thread(target=lambda job=job: done.append(job.result(timeout=15))) for job in jobs]
        for thread in threads:
            thread.start()
        eventually(lambda: {State.RUNNING} == {job.state for job in jobs})
        mlq.data.put("1", "go")
        mlq.data.put("1", "end")
        for thread in threads:
            thread.join(15)
        assert ["gone", "gone"] == done


# On an event loop


def test_a_job_is_awaited_on_an_event_loop(mlq: MLQ, actors: MLQ, client: Client) -> None:
    async def main() -> list[Any]:
        jobs = [await asyncio.to_thread(client.submit, "add", n) for n in range(5)]
        with pytest.raises(mlqueue.MLQueueError, match="write `await job` there"):
            jobs[0].result()
        with pytest.raises(JobFailed):
            await await_later("fails", "text")
        # One that is given up leaves nothing that is waited for at the end.
        waiting = await asyncio.to_thread(client.submit, "waits")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_awaited(waiting), 0.1)
        for key in ("go", "end"):
            await asyncio.to_thread(mlq.data.put, "1", key)
        return list(await asyncio.gather(*map(_awaited, jobs)))

    async def await_later(*args: Any) -> Any:
        return await (await asyncio.to_thread(client.submit, *args))

    assert [1, 2, 3, 4, 5] == asyncio.run(main())
    eventually(lambda: not any(thread.name == "mlqueue-client" for thread in threading.enumerate()))


async def _awaited(job: Job[Any]) -> Any:
    return await job


# Errors


def test_errors_are_those_that_the_server_raised(actors: MLQ, client: Client) -> None:
    with pytest.raises(InvalidArguments) as raised:
        client.submit("add", "one", z=2)
    assert ["$.args[0]", "$.kwargs.z"] == [path for path, _ in raised.value.faults]
    with pytest.raises(ActorNotFound, match="no worker has declared an actor 'nobody'"):
        client.submit("nobody")
    with pytest.raises(Forbidden, match="http=True"):
        client.submit("not_for_http")
    with pytest.raises(JobNotFound) as missing:
        client.job("0" * 32)
    assert isinstance(missing.value, KeyError)
    with pytest.raises(EncodeError, match=r"args\[0\]\['x'\]") as refused:
        client.submit("echo", {"x": object()})
    assert "args[0]['x']" == refused.value.path
    with pytest.raises(mlqueue.BodyTooLarge):
        client.submit("echo", bytes(5 * MIB))


def test_a_failed_job_raises_with_the_traceback_of_the_worker(actors: MLQ, client: Client) -> None:
    job = client.submit("fails", "boom")
    with pytest.raises(JobFailed, match=r"is dead \(failed\): ValueError: boom") as raised:
        job.result(timeout=15)
    failure = raised.value
    assert (job.id, "failed", "builtins.ValueError") == (failure.job_id, failure.reason, failure.error_type)
    assert "in fails" in failure.remote_traceback
    assert "ValueError: boom" in str(job.exception())


def test_a_key_is_sent_and_what_it_may_not_do_is_an_error(mlq: MLQ, actors: MLQ, keys: ApiKeys) -> None:
    reads, key = keys.new("read")
    with serving(mounted(mlq, key_auth(mlq))) as url:
        with Client(url + PREFIX, reads) as reader, pytest.raises(Forbidden, match="needs the scope submit"):
            reader.submit("add", 1)
        with Client(url + PREFIX, keys.new("submit,read")[0]) as submitter:
            assert 2 == submitter.submit("add", 1).result(timeout=15)
        for wrong in (None, f"mlq_{key.id}_{'x' * 43}"):
            with Client(url + PREFIX, wrong) as nobody, pytest.raises(Unauthorized):
                nobody.jobs()


@pytest.mark.parametrize("url", ["localhost:5000", "ftp://localhost", "http://", "http://a/?b=1", "http://a:b@c", ""])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(SettingsError, match="url"):
        Client(url)


def test_a_key_that_is_none_is_refused() -> None:
    for key in ("two words", "line\nbreak", "ключ"):
        with pytest.raises(SettingsError, match="this is no API key"):
            Client("http://localhost", key)


def test_answers_of_others_are_errors_that_say_so(front: Front, client: Client) -> None:
    front.treatments = [
        front.says("404 Not Found", b"<h1>Not Found</h1>", Content_Type="text/html"),
        front.says("200 OK", b"<h1>Welcome</h1>", Content_Type="text/html"),
        front.says("302 Found", Location="http://elsewhere.test/"),
        front.says("500 Internal Server Error", b"oops"),
        front.says("418 Teapot", b'{"detail": 1}', Content_Type="application/problem+json"),
    ]
    for match in (
        "answered 404: <h1>Not Found</h1>.* Is url the prefix",
        "no JSON \\(text/html, 16 bytes\\)",
        "a redirect to http://elsewhere.test/; they are not followed",
        "answered 500: oops",
        "1",
    ):
        with pytest.raises(mlqueue.MLQueueError, match=match):
            client.jobs()
    assert 5 == len(front.seen)


# Connections that break


def test_a_submit_whose_answers_are_lost_creates_one_job(actors: MLQ, front: Front, client: Client) -> None:
    front.treatments = [front.loses_the_answer, front.loses_the_answer, front.cuts]
    job = client.submit("add", 1, tags=["once"])
    assert [job.id] == [record.id for record in client.jobs(tag="once").jobs]
    assert 1 == len({headers["idempotency_key"] for headers in front.headers[:4]})
    other = client.submit("add", 1, tags=["once"])
    assert job.id != other.id


def test_a_server_that_is_away_for_a_moment_costs_nothing_but_time(front: Front, client: Client, actors: MLQ) -> None:
    front.treatments = [
        front.says("503 Service Unavailable", Retry_After="1"),
        front.says("502 Bad Gateway", b"<html>nginx"),
        front.says("504 Gateway Timeout"),
    ]
    assert 2 == client.submit("add", 1).result(timeout=15)
    front.treatments = [front.cuts, front.says("429 Too Many Requests")]
    assert [] == client.jobs(tag="none").jobs


def test_a_server_that_stays_away_is_an_error_that_says_what_to_do(front: Front) -> None:
    with serving(front) as url, Client(url, patience=0.3) as client:
        front.treatments = [front.says("503 Service Unavailable", b"sorry")] * 100
        with pytest.raises(StoreUnavailable, match="answered 503: sorry"):
            client.jobs()
        assert len(front.seen) > 1
    with Client(url, patience=0.3) as client, pytest.raises(StoreUnavailable, match=r"Connection refused.*mlqueue web"):
        client.jobs()


def test_a_server_that_says_nothing_is_given_up(front: Front) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Client(url, timeout=0.1, patience=0.3) as client, pytest.raises(StoreUnavailable, match="does not answer"):
            client.jobs()


def test_what_may_not_be_done_twice_is_not_tried_twice(mlq: MLQ, actors: MLQ, front: Front, client: Client) -> None:
    job = client.submit("echo", 1, delay=60)
    job.cancel()
    before = len(front.seen)
    front.treatments = [front.loses_the_answer]
    with pytest.raises(StoreUnavailable):
        job.retry()
    assert [f"POST {PREFIX}/jobs/{job.id}/retry"] == front.seen[before:]
    assert 1 == job.result(timeout=15)


def test_a_fork_has_connections_of_its_own(client: Client, actors: MLQ) -> None:
    client.jobs()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):
            client.jobs()
            code = 0
        os._exit(code)
    assert 0 == os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    client.jobs()


# Results in files


def test_a_download_that_is_interrupted_goes_on_where_it_was(
    actors: MLQ, front: Front, client: Client, tmp_path: Path
) -> None:
    job = client.submit("makes", 3 * MIB)
    expected = job.result(timeout=15)
    front.treatments = [None, front.cuts_behind(MIB), front.cuts_behind(MIB // 2)]
    front.headers.clear()
    assert 3 * MIB == job.download(tmp_path / "result.bin")
    assert expected == (tmp_path / "result.bin").read_bytes()
    ranges = [headers.get("range") for headers in front.headers if "range" in headers]
    assert 2 == len(ranges)
    assert all(int(text.removeprefix("bytes=").rstrip("-")) > 0 for text in ranges if text)
    assert [tmp_path / "result.bin"] == list(tmp_path.iterdir())


def test_a_result_is_written_as_what_it_is(actors: MLQ, client: Client, tmp_path: Path) -> None:
    array = np.arange(6.0).reshape(2, 3)
    for value, name in ((b"bytes", "a.bin"), ("täxt", "a.txt"), (array, "a.npy"), ({"a": [1, None]}, "a.json")):
        client.submit("echo", value).download(tmp_path / name, timeout=15)
    assert b"bytes" == (tmp_path / "a.bin").read_bytes()
    assert "täxt" == (tmp_path / "a.txt").read_text("utf-8")
    assert array.tolist() == np.load(tmp_path / "a.npy").tolist()
    assert {"a": [1, None]} == json.loads((tmp_path / "a.json").read_text())


def test_a_download_that_fails_leaves_no_file(actors: MLQ, front: Front, client: Client, tmp_path: Path) -> None:
    failed = client.submit("fails", "no")
    with pytest.raises(JobFailed):
        failed.download(tmp_path / "a", timeout=15)
    job = client.submit("makes", MIB)
    job.wait(15)
    front.treatments = [None, *[front.cuts_behind(10)] * 50]
    with pytest.raises(StoreUnavailable, match="breaks off"):
        job.download(tmp_path / "a")
    assert [] == list(tmp_path.iterdir())


# Events


def gist(events: Any) -> list[tuple[str, str, Any]]:
    """Kind, state and progress of events; of repeated progress the last."""
    return [(event.kind, str(event.state), event.progress) for event in events]


WHOLE = [
    ("state", "running", 10),
    ("progress", "running", 90),
    ("state", "succeeded", 90),
]


def followed(mlq: MLQ, job: Job[Any]) -> list[tuple[str, str, Any]]:
    """The events of a job of `waits` from its first progress on; it goes on when that has been heard of."""
    seen = []
    for event in job.events(timeout=15):
        if event.progress is None:
            continue
        if not seen:
            mlq.data.put("1", "go")
            seen.append(("state", str(event.state), event.progress))
        else:
            mlq.data.put("1", "end")
            seen += gist([event])
    return seen


def test_events_come_over_a_stream_as_those_of_a_job_at_the_store(
    mlq: MLQ, actors: MLQ, front: Front, client: Client
) -> None:
    job = client.submit("waits")
    before = len(front.seen)
    assert WHOLE == followed(mlq, job)
    assert [f"GET {PREFIX}/jobs/{job.id}/events"] == front.seen[before:]
    assert [("state", "succeeded", 90)] == gist(job.events())
    assert gist(mlq.job(job.id).events()) == gist(job.events())


def test_a_stream_that_breaks_is_opened_again_behind_the_last_event(
    mlq: MLQ, actors: MLQ, front: Front, client: Client
) -> None:
    job = client.submit("waits")
    eventually(lambda: job.progress == 10)
    front.headers.clear()
    front.treatments = [front.cuts_behind(10**9, parts=1)] * 2
    assert WHOLE == followed(mlq, job)
    heard = [headers.get("last_event_id") for headers in front.headers]
    assert (None, True) == (heard[0], all(heard[1:])), heard


def test_where_there_are_no_streams_the_job_is_asked_for_and_the_server_waits(mlq: MLQ, actors: MLQ) -> None:
    front = Front(mounted(mlq, allow_anonymous=True, max_streams=0).wsgi_app)
    with serving(front) as url, Client(url + PREFIX) as client:
        job = client.submit("waits")
        assert WHOLE == followed(mlq, job)
        assert len(front.seen) < 10


def test_a_stream_that_is_held_back_is_given_up(
    mlq: MLQ, actors: MLQ, front: Front, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a proxy that gathers an answer until it is whole."""
    monkeypatch.setattr("mlqueue.client_events.SILENCE", 0.2)
    release = threading.Event()

    def holds(environ: dict[str, Any], start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/event-stream")])
        yield b""
        release.wait(10)

    job = client.submit("waits")
    eventually(lambda: job.progress == 10)
    front.treatments = [holds, holds]
    assert WHOLE == followed(mlq, job)
    release.set()


def test_events_stop_in_time_and_of_no_job_there_are_none(mlq: MLQ, actors: MLQ, client: Client) -> None:
    job = client.submit("echo", 1, delay=60)
    assert [("state", "scheduled", None)] == gist(job.events(timeout=0.3))
    with pytest.raises(JobNotFound):
        list(Job(client, "0" * 32).events())
    events = job.events(timeout=15)
    next(events)
    mlq.clear(states="scheduled")
    with pytest.raises(JobNotFound):
        next(events)


# On its own


def test_it_needs_neither_flask_nor_a_server() -> None:
    code = """
import sys
for name in ("flask", "werkzeug", "gevent", "waitress"):
    sys.modules[name] = None
import mlqueue.client
mlqueue.client.Client("http://localhost:9")
assert "mlqueue.web" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)


def test_without_urllib3_the_error_names_the_cure() -> None:
    code = "import sys; sys.modules['urllib3'] = None; import mlqueue.client"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    assert "pip install 'mlqueue[client]'" in run.stderr
