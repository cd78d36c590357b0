"""Live: streams of events over HTTP, what they cost others, and records that are answered when they have changed."""

from __future__ import annotations

import contextlib
import json
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dramatiq
import flask
import httpx
import pytest
from hosting import PREFIX, gunicorn, gunicorn_process, mounted, waitress_process
from support import StartWorker, eventually
from werkzeug.serving import make_server

from mlqueue import MLQ, Job, StoreUnavailable, TooManyStreams, codec, current_job, events
from mlqueue.events import hub_of
from mlqueue.job import NewJob, new_id
from mlqueue.web.mount import EXTENSION
from mlqueue.web.streams import Streams

#: How long a test waits for what a stream should tell, in seconds.
PATIENCE = 15.0


class Reader:
    """A client of a stream: what it has been told, event by event."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        #: The id of the last event.
        self.last_id = ""
        self.comments = 0
        self._lines = response.iter_lines()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        kind, data = "message", ""
        for line in self._lines:
            name, _, value = line.partition(": ")
            if line.startswith(":"):
                self.comments += 1
            elif name == "id":
                self.last_id = value
            elif name == "event":
                kind = value
            elif name == "data":
                data = value
            elif not line and data:
                yield kind, json.loads(data)
                kind, data = "message", ""

    def next(self) -> tuple[str, Any]:
        """The next event."""
        return next(iter(self))

    def end(self) -> tuple[str, str]:
        """The last event, before which there may be a progress once more: it may be told again with the end."""
        *before, last = self.states()
        assert {("progress", "running")} >= set(before)
        return last

    def states(self) -> list[tuple[str, str]]:
        """All events to the stream's end: kind and state of each."""
        return [(kind, data.get("state")) for kind, data in self]


@contextlib.contextmanager
def listening(client: httpx.Client, path: str, last_id: str = "", **parameters: Any) -> Iterator[Reader]:
    headers = {"Last-Event-ID": last_id} if last_id else {}
    with client.stream("GET", path, headers=headers, params=parameters) as response:
        assert 200 == response.status_code, response.read()
        yield Reader(response)


@contextlib.contextmanager
def serving(app: flask.Flask) -> Iterator[httpx.Client]:
    """A server of threads in this process."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    server.daemon_threads = True  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.server_port}{PREFIX}", timeout=PATIENCE) as client:
            yield client
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def streams_of(app: flask.Flask) -> Streams:
    found: Streams = app.extensions[EXTENSION]["mlqueue"].streams
    return found


@pytest.fixture
def app(mlq: MLQ) -> flask.Flask:
    return mounted(mlq, allow_anonymous=True, heartbeat=0.2)


@pytest.fixture
def client(app: flask.Flask) -> Iterator[httpx.Client]:
    """A client of a server whose streams say every 0.2 s that they are there."""
    with serving(app) as found:
        yield found
        eventually(lambda: not len(streams_of(app)))


class Steps:
    """A job that does one thing after the other, when it is told."""

    def __init__(self, mlq: MLQ) -> None:
        self.go = threading.Semaphore(0)

        @mlq.actor(max_retries=0)
        def stepwise(steps: int) -> int:
            for step in range(steps):
                assert self.go.acquire(timeout=PATIENCE)
                current_job().progress(step, f"step {step}")
            assert self.go.acquire(timeout=PATIENCE)
            return steps

        self.submit: Callable[[int], Job[int]] = stepwise.submit


@pytest.fixture
def steps(mlq: MLQ, worker: dramatiq.Worker) -> Steps:
    return Steps(mlq)


def waiting_job(mlq: MLQ) -> Job[Any]:
    """A job that nobody runs."""
    return mlq.submit("nobody_knows_it", queue_name="default")


# The stream of a job


def test_a_stream_begins_with_the_record_tells_every_change_and_ends_with_the_job(
    mlq: MLQ, client: httpx.Client, steps: Steps
) -> None:
    job = steps.submit(2)
    with listening(client, f"/jobs/{job.id}/events") as reader:
        kind, record = reader.next()
        assert ("snapshot", job.id, f"{PREFIX}/jobs/{job.id}") == (kind, record["id"], record["links"]["self"])
        if record["state"] == "queued":
            assert "running" == reader.next()[1]["state"]
        for step in range(2):
            steps.go.release()
            kind, data = reader.next()
            assert ("progress", job.id, "default", "stepwise", "running", 1, step, f"step {step}") == (
                kind,
                *(data[name] for name in ("id", "queue", "actor", "state", "attempt", "progress", "progress_note")),
            )
        steps.go.release()
        assert ("state", "succeeded") == reader.end()
        assert {
            "content-type": "text/event-stream",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            "x-content-type-options": "nosniff",
        }.items() <= dict(reader.response.headers).items()


def test_the_stream_of_a_job_that_has_ended_is_its_record(mlq: MLQ, client: httpx.Client) -> None:
    job = waiting_job(mlq)
    job.cancel()
    with listening(client, f"/jobs/{job.id}/events") as reader:
        assert [("snapshot", "cancelled")] == reader.states()


def test_what_a_client_missed_follows_and_after_the_end_it_need_not_come_again(
    mlq: MLQ, client: httpx.Client, steps: Steps
) -> None:
    job = steps.submit(3)
    path = f"/jobs/{job.id}/events"
    with listening(client, path) as reader:
        steps.go.release()
        assert ("progress", 0) in ((kind, data["progress"]) for kind, data in reader)
    steps.go.release()
    eventually(lambda: job.progress == 1)
    waiting_job(mlq)  # of no concern
    with listening(client, path, reader.last_id) as again:
        assert ("progress", 1) == (lambda kind, data: (kind, data["progress"]))(*again.next())
        steps.go.release(2)
        assert ("state", "succeeded") == again.end()
    with listening(client, path, reader.last_id) as late:
        assert ("state", "succeeded") == late.end()
    assert 204 == client.get(path, headers={"Last-Event-ID": again.last_id}).status_code


@pytest.mark.parametrize("how", ["too old", "too many"])
def test_where_events_may_be_missing_there_is_a_gap_and_the_record(
    mlq: MLQ, client: httpx.Client, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = waiting_job(mlq)
    path = f"/jobs/{job.id}/events"
    with listening(client, path) as reader:
        reader.next()
    waiting_job(mlq)
    job.cancel()
    if how == "too old":
        mlq.client.xtrim(f"{mlq.store.root}:ev", maxlen=1, approximate=False)
    else:
        monkeypatch.setattr("mlqueue.web.live.MOST_SEARCHED", 1)
    with listening(client, path, reader.last_id) as again:
        assert [("gap", None), ("snapshot", "cancelled")] == again.states()


def test_a_stream_whose_events_are_lost_ends_and_the_client_gets_the_record(mlq: MLQ, client: httpx.Client) -> None:
    job = waiting_job(mlq)
    path = f"/jobs/{job.id}/events"
    with listening(client, path) as reader:
        reader.next()
        mlq.client.delete(f"{mlq.store.root}:evl")
        mlq.store.listen(60, 60)
        assert [] == reader.states()
    with listening(client, path, reader.last_id) as again:
        assert [("gap", None), ("snapshot", "queued")] == [
            (kind, data.get("state")) for kind, data in (again.next(), again.next())
        ]


def test_a_job_that_is_forgotten_ends_its_stream(mlq: MLQ, client: httpx.Client) -> None:
    job = waiting_job(mlq)
    with listening(client, f"/jobs/{job.id}/events") as reader:
        reader.next()
        mlq.store.remove([job.id])
        assert [("removed", "queued")] == reader.states()


def test_a_silent_stream_says_that_it_is_there(mlq: MLQ, client: httpx.Client) -> None:
    job = waiting_job(mlq)
    with listening(client, f"/jobs/{job.id}/events") as reader:
        reader.next()
        threading.Timer(0.7, job.cancel).start()
        reader.states()
        assert reader.comments >= 2


def test_a_stream_ends_in_time_and_its_client_comes_again(
    mlq: MLQ, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its key is looked at again then."""
    monkeypatch.setattr("mlqueue.web.live.LIFE", 0.1)
    job = waiting_job(mlq)
    with listening(client, f"/jobs/{job.id}/events") as reader:
        assert [("snapshot", "queued")] == reader.states()


@pytest.mark.parametrize("path", ["/jobs/nope/events", "/jobs/nope/events?x=1"])
def test_there_is_no_stream_of_a_job_that_there_is_not(client: httpx.Client, path: str) -> None:
    assert 404 == client.get(path).status_code


@pytest.mark.parametrize("given", ["x", "1", "1-", "-1", "1-2-3", "9" * 20 + "-0", "$"])
@pytest.mark.parametrize("path", ["/events", "/jobs/nope/events"])
def test_an_id_of_no_event_is_refused(client: httpx.Client, path: str, given: str) -> None:
    answer = client.get(path, headers={"Last-Event-ID": given})
    assert (422, "Last-Event-ID") == (answer.status_code, answer.json()["errors"][0]["path"])


# The stream of all jobs


def test_all_jobs_are_told_or_those_that_are_asked_for(
    mlq: MLQ, client: httpx.Client, start_worker: StartWorker
) -> None:
    @mlq.actor
    def one() -> None:
        pass

    @mlq.actor
    def two() -> None:
        pass

    with contextlib.ExitStack() as stack:
        everything, ends, of_two, elsewhere = (
            stack.enter_context(listening(client, "/events", **asked))
            for asked in ({}, {"state": ["succeeded", "dead"]}, {"actor": "two"}, {"queue": "elsewhere"})
        )
        jobs = [one.submit().id, two.submit().id]
        start_worker()
        assert sorted(jobs * 3) == sorted(everything.next()[1]["id"] for _ in range(6))
        assert [(job, "succeeded") for job in sorted(jobs)] == sorted(
            (lambda data: (data["id"], data["state"]))(ends.next()[1]) for _ in jobs
        )
        assert [(jobs[1], state) for state in ("queued", "running", "succeeded")] == [
            (lambda data: (data["id"], data["state"]))(of_two.next()[1]) for _ in range(3)
        ]
        mlq.submit("nobody_knows_it", queue_name="elsewhere")
        assert "elsewhere" == elsewhere.next()[1]["queue"]


def test_a_client_of_all_jobs_that_was_away_misses_none_or_is_told_so(mlq: MLQ, client: httpx.Client) -> None:
    with listening(client, "/events") as reader:
        first = waiting_job(mlq)
        assert first.id == reader.next()[1]["id"]
    missed = [waiting_job(mlq).id for _ in range(3)]
    with listening(client, "/events", reader.last_id) as again:
        assert missed == [again.next()[1]["id"] for _ in missed]
        new = waiting_job(mlq)
        assert new.id == again.next()[1]["id"]
    mlq.client.xtrim(f"{mlq.store.root}:ev", maxlen=1, approximate=False)
    with listening(client, "/events", reader.last_id) as late:
        assert ("gap", {"last_event_id": reader.last_id}) == late.next()
        assert new.id == late.next()[1]["id"]


@pytest.mark.parametrize("asked", [{"state": "gone"}, {"tag": "x"}, {"actor": ""}])
def test_a_filter_that_is_not_known_is_refused(client: httpx.Client, asked: dict[str, str]) -> None:
    assert 422 == client.get("/events", params=asked).status_code


# How many there may be


def test_beyond_the_limit_a_stream_is_refused_and_others_are_answered(mlq: MLQ) -> None:
    app = mounted(mlq, allow_anonymous=True, max_streams=2, heartbeat=60.0)
    job = waiting_job(mlq)
    path = f"/jobs/{job.id}/events"
    with serving(app) as client:
        with listening(client, path) as reader, listening(client, "/events"):
            reader.next()
            for other in (path, "/events"):
                refused = client.get(other)
                assert (503, "TooManyStreams", "2") == (
                    refused.status_code,
                    refused.json()["code"],
                    refused.headers["Retry-After"],
                )
            assert "ok" == client.get("/healthz").text
            etag = client.get(f"/jobs/{job.id}").headers["ETag"]
            threading.Timer(0.1, job.cancel).start()
            answer = client.get(f"/jobs/{job.id}", headers={"If-None-Match": etag, "Prefer": "wait=10"})
            assert "cancelled" == answer.json()["state"]

        def two() -> list[int]:
            with client.stream("GET", "/events") as one, client.stream("GET", "/events") as other:
                return [one.status_code, other.status_code]

        # Their clients have gone; no heartbeat has told so yet.
        for _ in range(3):
            eventually(lambda: [200, 200] == two())


def test_a_server_that_does_one_thing_at_a_time_has_no_streams(mlq: MLQ) -> None:
    client = mounted(mlq, allow_anonymous=True).test_client()
    answer = client.get(f"{PREFIX}/events")
    assert 503 == answer.status_code
    assert "one thing at a time" in answer.json["detail"]
    assert "mlqueue-events" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [({}, 0), ({"wsgi.multithread": True}, 2), ({"wsgi.multithread": True, "werkzeug.socket": None}, 100)],
)
def test_how_many_streams_there_may_be_follows_from_the_server(environ: dict[str, Any], expected: int) -> None:
    streams = Streams(None)
    admitted = [streams.admit(environ) for _ in range(expected)]
    with pytest.raises(TooManyStreams):
        streams.admit(environ)
    assert expected == len(streams) == len(admitted)
    del admitted
    assert 0 == len(streams)


def test_with_gevent_there_may_be_many_streams_but_never_more_than_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gevent.monkey", SimpleNamespace(is_module_patched=lambda name: True))
    for files, expected in ((100_000, 800), (resource.RLIM_INFINITY, 800), (1000, 800), (500, 400)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, files=files: (files, files))
        streams = Streams(None)
        admitted = [streams.admit({}) for _ in range(expected)]
        with pytest.raises(TooManyStreams):
            streams.admit({})
        assert expected == len(admitted)


def test_an_answer_that_nobody_reads_leaves_no_stream(mlq: MLQ) -> None:
    app = mounted(mlq, allow_anonymous=True, max_streams=1)
    client = app.test_client()
    assert 200 == client.head(f"{PREFIX}/events").status_code
    for _ in range(3):
        client.get(f"{PREFIX}/events").close()
    assert (0, 0) == (len(streams_of(app)), len(hub_of(mlq.store)))


def test_what_fails_after_it_was_admitted_leaves_no_stream(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    app = mounted(mlq, allow_anonymous=True, max_streams=1)
    job = waiting_job(mlq)

    def fails(*args: object) -> None:
        raise StoreUnavailable

    monkeypatch.setattr(mlq.store, "snapshot", fails)
    assert 503 == app.test_client().get(f"{PREFIX}/jobs/{job.id}/events").status_code
    assert (0, 0) == (len(streams_of(app)), len(hub_of(mlq.store)))


def test_a_client_that_does_not_read_is_cut_off_and_holds_up_nobody(
    mlq: MLQ, client: httpx.Client, app: flask.Flask, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "MOST_BEHIND", 50)
    with socket.socket() as slow, listening(client, "/events") as reader:
        stop_reading(slow, client)
        heard = 0
        while len(hub_of(mlq.store)) == 2:
            mlq.store.submit([new_job() for _ in range(20)])
            for _ in range(20):
                reader.next()
            heard += 20
            assert heard < 100_000
        eventually(lambda: 1 == len(streams_of(app)))
        with contextlib.suppress(ConnectionResetError):
            while slow.recv(65536):
                pass
        last = waiting_job(mlq)
        assert last.id == reader.next()[1]["id"]


def stop_reading(slow: socket.socket, client: httpx.Client) -> None:
    """Opens a stream, reads that it is there, and nothing more."""
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.settimeout(PATIENCE)
    slow.connect((client.base_url.host, client.base_url.port))
    slow.sendall(f"GET {PREFIX}/events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head = b""
    while b"retry:" not in head:
        head += slow.recv(100)
    assert b" 200 " in head


def new_job() -> NewJob:
    """One whose events are long: less of them fill the buffers of a connection."""
    return NewJob(id=new_id(), queue="default", actor="nobody_knows_it" * 100, body=codec.encode_call([], {}))


# On real servers


@pytest.mark.parametrize("kind", ["gthread", "gevent", "waitress"])
def test_streams_work_on_every_server(mlq: MLQ, tmp_path: Path, steps: Steps, kind: str) -> None:
    """In an app with no task code; several listen, one goes away, others are answered all the time."""
    server, arguments = {
        "gthread": (gunicorn_process, ("--threads", "8", "--preload")),
        "gevent": (gunicorn_process, ("-k", "gevent")),
        "waitress": (waitress_process, ("--threads", "8")),
    }[kind]
    with server(mlq, tmp_path, *arguments, OPTIONS=OPTIONS) as (client, _):
        job = steps.submit(1)
        path = f"/jobs/{job.id}/events"
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(listening(client, path)) for _ in range(3)]
            everything = stack.enter_context(listening(client, "/events"))
            with listening(client, path) as leaves:
                leaves.next()
            for reader in readers:
                assert "snapshot" == reader.next()[0]
            eventually(lambda: 1 == len([one for one in mlq.client.client_list() if one["cmd"] == "xread"]))
            assert "ok" == client.get("/healthz").text
            steps.go.release(2)
            for reader in readers:
                states = reader.states()
                assert ("state", "succeeded") == states[-1]
                assert ("progress", "running") in states
            assert "ok" == client.get("/healthz").text
            assert any(("state", "succeeded") == (kind_, data["state"]) for kind_, data in everything)


OPTIONS = json.dumps({"heartbeat": 0.2, "max_streams": 6})


def test_a_client_that_does_not_read_gives_its_thread_back(mlq: MLQ, tmp_path: Path) -> None:
    """gunicorn's thread hangs in the connection; nobody else is held up, and the thread is free again."""
    options = json.dumps({"max_streams": 1, "heartbeat": 0.5})
    with gunicorn(mlq, tmp_path, "--threads", "2", OPTIONS=options) as client, socket.socket() as slow:
        stop_reading(slow, client)
        assert 503 == status_of_stream(client)
        deadline = time.monotonic() + 60
        while 503 == status_of_stream(client):
            mlq.store.submit([new_job() for _ in range(500)])
            assert "ok" == client.get("/healthz").text
            assert time.monotonic() < deadline


def status_of_stream(client: httpx.Client) -> int:
    """What who asks for a stream is answered; he leaves at once."""
    with client.stream("GET", "/events") as response:
        return response.status_code


# Without a stream


def test_a_record_that_the_client_has_is_not_sent_again(mlq: MLQ, client: httpx.Client) -> None:
    job = waiting_job(mlq)
    path = f"/jobs/{job.id}"
    first = client.get(path)
    same = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (304, b"", first.headers["ETag"]) == (same.status_code, same.content, same.headers["ETag"])
    job.cancel()
    other = client.get(path, headers={"If-None-Match": first.headers["ETag"]})
    assert (200, "cancelled") == (other.status_code, other.json()["state"])
    assert first.headers["ETag"] != other.headers["ETag"]
    assert 404 == client.get("/jobs/nope", headers={"If-None-Match": first.headers["ETag"]}).status_code


def test_a_record_is_answered_when_it_has_changed(mlq: MLQ, client: httpx.Client, steps: Steps) -> None:
    job = steps.submit(1)
    eventually(lambda: job.state == "running")
    path = f"/jobs/{job.id}"
    etag = client.get(path).headers["ETag"]
    for change in ("progress", "state"):
        threading.Timer(0.2, steps.go.release).start()
        begun = time.monotonic()
        answer = client.get(path, headers={"If-None-Match": etag, "Prefer": "wait=10"})
        assert 0.1 < time.monotonic() - begun < 3
        assert (200, "wait=10") == (answer.status_code, answer.headers["Preference-Applied"])
        etag = answer.headers["ETag"]
        if change == "progress":
            assert (0, "running") == (answer.json()["progress"], answer.json()["state"])
    assert ("succeeded", 1) == (answer.json()["state"], answer.json()["result"])
    begun = time.monotonic()
    unchanged = client.get(path, headers={"If-None-Match": etag, "Prefer": "wait=1"})
    assert (304, etag) == (unchanged.status_code, unchanged.headers["ETag"])
    assert 0.9 < time.monotonic() - begun < 3
