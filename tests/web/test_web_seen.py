"""Logs and metrics of jobs over HTTP: read, followed as streams, in the client and on the command line."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest
from command import Folder, Ran
from hosting import mounted
from support import StartWorker, eventually
from test_live import Reader, listening, serving, streams_of

from mlqueue import MLQ, InvalidJob, Job, JobNotFound, Settings, current_job
from mlqueue.client import Client
from mlqueue.testing import drain


@pytest.fixture
def app(mlq: MLQ) -> flask.Flask:
    return mounted(mlq, allow_anonymous=True, heartbeat=0.2)


@pytest.fixture
def client(app: flask.Flask) -> Iterator[httpx.Client]:
    with serving(app) as found:
        yield found
        eventually(lambda: not len(streams_of(app)))


class Shows:
    """An actor that shows something, waits until it may go on, and shows more."""

    def __init__(self, mlq: MLQ) -> None:
        self.go_on = threading.Event()
        go_on = self.go_on

        @mlq.actor
        def shows() -> None:
            job = current_job()
            print("one\ntwo")
            job.log_metrics(0, loss=1.0, best=float("inf"))
            job.log_metrics(1, loss=0.5)
            assert go_on.wait(20)
            print("three")
            job.log_metrics(2, loss=0.25)

        self.submit = shows.submit


@pytest.fixture
def shows(mlq: MLQ) -> Shows:
    return Shows(mlq)


@pytest.fixture
def ended(mlq: MLQ, shows: Shows) -> Job[None]:
    """A job that has shown all."""
    shows.go_on.set()
    job = shows.submit()
    drain(mlq)
    return job


def texts(answer: Any) -> list[str]:
    return [line["text"] for line in answer["lines"]]


def steps(answer: Any) -> dict[str, list[list[Any]]]:
    return {name: [point[:2] for point in points] for name, points in answer["metrics"].items()}


# Read


def test_a_log_is_read_in_parts(client: httpx.Client, ended: Job[None]) -> None:
    path = f"jobs/{ended.id}/logs"
    whole = client.get(path).json()
    assert (["one", "two", "three"], 3, True) == (texts(whole), whole["next"], whole["ended"])
    line = whole["lines"][1]
    assert (1, 1, "stdout", None) == (line["number"], line["attempt"], line["stream"], line["level"])
    assert ["two", "three"] == texts(client.get(path, params={"first": 1}).json())
    assert ["three"] == texts(client.get(path, params={"tail": 1}).json())
    assert ([], 3) == (texts(last := client.get(path, params={"first": 3}).json()), last["next"])
    text = client.get(path, headers={"Accept": "text/plain"})
    assert ("one\ntwo\nthree\n", "text/plain; charset=utf-8") == (text.text, text.headers["Content-Type"])
    assert 422 == client.get(path, params={"first": 1, "tail": 1}).status_code
    assert 404 == client.get("jobs/nope/logs").status_code


def test_metrics_are_read_and_read_on(client: httpx.Client, ended: Job[None]) -> None:
    path = f"jobs/{ended.id}/metrics"
    whole = client.get(path).json()
    assert {"best": [[0, {"$float": "inf"}]], "loss": [[0, 1.0], [1, 0.5], [2, 0.25]]} == steps(whole)
    assert (True, True, 1) == (whole["whole"], whole["ended"], whole["attempt"])
    rest = client.get(path, params={"after": whole["next"]}).json()
    assert ({}, False, whole["next"]) == (rest["metrics"], rest["whole"], rest["next"])
    assert 422 == client.get(path, params={"after": "x"}).status_code
    assert 404 == client.get("jobs/nope/metrics").status_code
    assert 404 == client.get("jobs/nope/metrics", params={"follow": "true"}).status_code


def test_a_later_attempt_is_told_whole(mlq: MLQ, client: httpx.Client) -> None:
    places: list[str] = []

    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> None:
        job = current_job()
        if job.attempt == 1:
            for step in range(3):
                job.log_metrics(step, loss=step)
            eventually(lambda: mlq.job(job.id).metrics())
            places.append(client.get(f"jobs/{job.id}/metrics").json()["next"])
            raise ValueError("once")
        job.log_metrics(1, loss=100)

    job = work.submit()
    drain(mlq)
    rest = client.get(f"jobs/{job.id}/metrics", params={"after": places[0]}).json()
    assert (True, 2, {"loss": [[0, 0.0], [1, 100.0]]}) == (rest["whole"], rest["attempt"], steps(rest))


# Followed


def parts(reader: Reader, number: int) -> list[tuple[str, Any]]:
    return [reader.next() for _ in range(number)]


def test_a_log_is_followed_to_its_end(client: httpx.Client, shows: Shows, start_worker: StartWorker) -> None:
    start_worker()
    job = shows.submit()
    seen: list[str] = []
    with listening(client, f"jobs/{job.id}/logs", follow="true") as reader:
        while len(seen) < 2:
            kind, data = reader.next()
            assert "logs" == kind
            seen += texts(data)
        assert ["one", "two"] == seen
        heard = reader.last_id
        shows.go_on.set()
        *more, (end, _) = list(reader)
    assert ("end", ["three"]) == (end, [text for _, data in more for text in texts(data)])
    # Who was away has what it missed, and who has heard all need not come again.
    with listening(client, f"jobs/{job.id}/logs", heard, follow="true") as reader:
        (_, data), _ = list(reader)
        assert ["three"] == texts(data)
        last_id = reader.last_id
    again = client.get(f"jobs/{job.id}/logs", params={"follow": "true"}, headers={"Last-Event-ID": last_id})
    assert 204 == again.status_code
    wrong = client.get(f"jobs/{job.id}/logs", params={"follow": "true"}, headers={"Last-Event-ID": "x"})
    assert 422 == wrong.status_code


def test_metrics_are_followed_to_their_end(client: httpx.Client, shows: Shows, start_worker: StartWorker) -> None:
    start_worker()
    job = shows.submit()
    eventually(lambda: len(job.metrics().get("loss", ())) == 2)
    with listening(client, f"jobs/{job.id}/metrics", follow="true") as reader:
        kind, data = reader.next()
        assert ("metrics", True, [[0, 1.0], [1, 0.5]]) == (kind, data["whole"], steps(data)["loss"])
        heard = reader.last_id
        shows.go_on.set()
        (_, data), (end, _) = list(reader)
    assert (False, {"loss": [[2, 0.25]]}, "end") == (data["whole"], steps(data), end)
    with listening(client, f"jobs/{job.id}/metrics", heard, follow="true") as reader:
        (_, data), _ = list(reader)
    assert {"loss": [[2, 0.25]]} == steps(data)
    again = client.get(f"jobs/{job.id}/metrics", params={"follow": "true"}, headers={"Last-Event-ID": data["next"]})
    assert 204 == again.status_code


def test_the_events_of_the_job_say_that_there_are_more_and_those_of_all_jobs_do_not(
    client: httpx.Client, shows: Shows, start_worker: StartWorker
) -> None:
    start_worker()
    with listening(client, "events") as of_all:
        job = shows.submit()
        with listening(client, f"jobs/{job.id}/events") as reader:
            shows.go_on.set()
            kinds = [kind for kind, _ in reader]
        others = []
        while not others or others[-1][1]["state"] != "succeeded":
            others.append(of_all.next())
    assert {"logs", "metrics"} <= set(kinds)
    assert {"state"} == {kind for kind, _ in others}


# The client


@pytest.mark.parametrize("streams", [None, 0])
def test_the_client_has_what_the_job_has(
    mlq: MLQ, shows: Shows, start_worker: StartWorker, streams: int | None
) -> None:
    start_worker()
    app = mounted(mlq, allow_anonymous=True, heartbeat=0.2, max_streams=streams)
    with serving(app) as http, Client(str(http.base_url)) as remote:
        here = shows.submit()
        job = remote.job(here.id)
        lines, values = job.logs(follow=True, timeout=20), job.metrics(follow=True, timeout=20)
        assert ["one", "two"] == [next(lines).text for _ in range(2)]
        assert {("best", 0, float("inf")), ("loss", 0, 1.0), ("loss", 1, 0.5)} == {next(values)[:3] for _ in range(3)}
        shows.go_on.set()
        assert ["three"] == [line.text for line in lines]
        assert [("loss", 2, 0.25)] == [metric[:3] for metric in values]
        assert here.logs() == job.logs()
        assert here.logs(tail=2) == job.logs(tail=2)
        assert ["two", "three"] == [line.text for line in job.logs(follow=True, tail=2)]
        assert here.metrics() == job.metrics()
        with pytest.raises(JobNotFound):
            Client(str(http.base_url)).job("nope")
        with pytest.raises(InvalidJob, match="1 or more"):
            job.logs(tail=0)
        eventually(lambda: not len(streams_of(app)))


# The command line


def test_the_command_prints_a_log(mlq: MLQ, ended: Job[None], server: Settings, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.environ |= {"MLQUEUE_URL": server.url} if server.url else {"MLQUEUE_HOME": str(server.home)}

    def logs(job_id: str, *arguments: str) -> Ran:
        return folder("logs", job_id, *arguments, "--namespace", mlq.name)

    assert (0, "one\ntwo\nthree\n") == (logs(ended.id).code, logs(ended.id).text)
    assert "three\n" == logs(ended.id, "-n", "1").text
    assert "one\ntwo\nthree\n" == logs(ended.id, "-f").text
    assert " 1 stdout three\n" in logs(ended.id, "-t").text
    assert [dataclasses.asdict(line) for line in ended.logs()] == logs(ended.id, "--json").lines
    assert 3 == logs("nope").code
