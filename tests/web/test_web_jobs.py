"""Jobs over HTTP: lists and their pages, records, cancelling, retrying, attempts, callbacks."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from flask.testing import FlaskClient
from hosting import PREFIX
from support import StartWorker, eventually

from mlqueue import MLQ, State
from mlqueue.web import call

JOBS = f"{PREFIX}/jobs"


def ids(answer: Any) -> list[str]:
    return [job["id"] for job in answer.json["jobs"]]


# Lists


def test_jobs_are_listed_newest_first_and_filtered(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor(queue_name="other")
    def work() -> None: ...

    first, second, third = mlq.post(1), mlq.post(2, tags=["x"], delay=60), work.submit().id
    mlq.job(first).cancel()
    for query, expected in {
        "": [third, second, first],
        "?state=queued": [third],
        "?state=scheduled&state=cancelled": [second, first],
        "?actor=work": [third],
        "?queue=other": [third],
        "?tag=x": [second],
        "?since=0": [third, second, first],
        f"?since={time.time() + 60:.0f}": [],
        "?until=1000": [],
        "?limit=1&state=cancelled": [first],
    }.items():
        assert expected == ids(client.get(JOBS + query)), query


def test_pages_are_stable_while_jobs_come_and_go(mlq: MLQ, client: FlaskClient) -> None:
    posted = [mlq.post(number, tags=["mine"]) for number in range(25)][::-1]
    seen: list[str] = []
    where: str | None = f"{JOBS}?limit=10&tag=mine"
    pages = 0
    while where:
        answer = client.get(where)
        seen += ids(answer)
        where = answer.json["next"]
        assert (f'<{where}>; rel="next"' if where else None) == answer.headers.get("Link")
        pages += 1
        mlq.post("new", tags=["mine"])
        mlq.store.remove([posted[-pages]])
    assert posted[:20] == seen[:20]
    assert set(seen) <= set(posted)
    assert 3 == pages


@pytest.mark.parametrize(
    ("query", "path"),
    [
        ("state=lost", "?state"),
        ("limit=0", "?limit"),
        ("limit=1001", "?limit"),
        ("limit=ten", "?limit"),
        ("limit=1&limit=2", "?limit"),
        ("cursor=-1", "?cursor"),
        ("cursor=99999999999999999999", "?cursor"),
        ("since=nan", "?since"),
        ("since=-5", "?since"),
        ("since=9" + "9" * 400, "?since"),
        ("actor=", "?actor"),
        ("tag=" + "x" * 201, "?tag"),
        ("stat=dead", "?stat"),
    ],
)
def test_a_filter_that_says_nothing_is_refused_not_ignored(client: FlaskClient, query: str, path: str) -> None:
    answer = client.get(f"{JOBS}?{query}")
    assert (422, [path]) == (answer.status_code, [fault["path"] for fault in answer.json["errors"]])


@pytest.mark.parametrize("query", ["actor=%00", "tag=%ff", "queue=a%3Ab", "actor=%F0%9F%98%80", "tag=*", "actor={x}"])
def test_strange_names_are_names(client: FlaskClient, query: str) -> None:
    assert (200, []) == ((answer := client.get(f"{JOBS}?{query}")).status_code, ids(answer))


# One


def test_a_record_has_its_place_its_links_and_no_arguments(mlq: MLQ, client: FlaskClient) -> None:
    first, second = mlq.post("secret"), mlq.post("secret", tags=["t"])
    answer = client.get(f"{JOBS}/{second}")
    record = answer.json
    assert (200, "queued", 1, ["t"], []) == (
        answer.status_code,
        *(record[name] for name in ("state", "position", "tags", "attempts")),
    )
    assert {"self": f"{JOBS}/{second}", "cancel": f"{JOBS}/{second}/cancel"} == record["links"]
    assert "secret" not in answer.text
    assert ("no-store", "nosniff") == (answer.headers["Cache-Control"], answer.headers["X-Content-Type-Options"])
    assert 0 == client.get(f"{JOBS}/{first}").json["position"]


def test_prefer_wait_waits_for_the_end_of_a_job(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    go = threading.Event()

    @mlq.actor
    def slow() -> dict[str, int]:
        go.wait(20)
        return {"n": 1}

    job = slow.submit()
    start_worker()
    early = client.get(f"{JOBS}/{job.id}", headers={"Prefer": "wait=0"})
    assert early.json["state"] in ("queued", "running")
    threading.Timer(0.1, go.set).start()
    answer = client.get(f"{JOBS}/{job.id}", headers={"Prefer": "wait=20"})
    assert ("succeeded", {"n": 1}, "wait=20") == (
        answer.json["state"],
        answer.json["result"],
        answer.headers["Preference-Applied"],
    )
    assert f"{JOBS}/{job.id}/result" == answer.json["links"]["result"]


def test_how_long_to_wait_is_bounded(mlq: MLQ, client: FlaskClient) -> None:
    mount = client.application.extensions["mlqueue"]["mlqueue"]
    object.__setattr__(mount, "max_wait", 0.05)
    job_id = mlq.post(1)
    answer = client.get(f"{JOBS}/{job_id}", headers={"Prefer": "wait=999999999"})
    assert ("queued", "wait=0.05") == (answer.json["state"], answer.headers["Preference-Applied"])


def test_a_server_that_does_one_thing_at_a_time_waits_less(
    mlq: MLQ, client: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call.MOST_ALONE < 30  # gunicorn's sync worker is killed then, and nobody is answered
    monkeypatch.setattr(call, "MOST_ALONE", 0.05)
    job_id = mlq.post(1)
    for threads, told in ((False, "wait=0.05"), (True, "wait=1")):
        answer = client.get(
            f"{JOBS}/{job_id}", headers={"Prefer": "wait=1"}, environ_overrides={"wsgi.multithread": threads}
        )
        assert ("queued", told) == (answer.json["state"], answer.headers["Preference-Applied"])


@pytest.mark.parametrize(
    "prefer", ["wait", "wait=", "wait=x", "wait=-1", "wait=1.5s", "respond-async", "x" * 10_000, "wait=" + "9" * 50]
)
def test_a_preference_that_is_none_is_left_aside(mlq: MLQ, client: FlaskClient, prefer: str) -> None:
    object.__setattr__(client.application.extensions["mlqueue"]["mlqueue"], "max_wait", 0.01)
    assert 200 == client.get(f"{JOBS}/{mlq.post(1)}", headers={"Prefer": prefer}).status_code


# Steering


@pytest.mark.parametrize("how", ["delete", "post"])
def test_a_job_that_waits_is_cancelled_and_can_be_retried(mlq: MLQ, client: FlaskClient, how: str) -> None:
    job_id = mlq.post(1)

    def cancel() -> Any:
        return client.delete(f"{JOBS}/{job_id}") if how == "delete" else client.post(f"{JOBS}/{job_id}/cancel")

    assert (200, "cancelled") == ((answer := cancel()).status_code, answer.json["state"])
    assert f"{JOBS}/{job_id}/retry" == answer.json["links"]["retry"]
    assert 200 == cancel().status_code  # again: it is
    again = client.post(f"{JOBS}/{job_id}/retry")
    assert (202, "queued") == (again.status_code, again.json["state"])
    refused = client.post(f"{JOBS}/{job_id}/retry")
    assert (409, "InvalidTransition") == (refused.status_code, refused.json["code"])


def test_a_running_job_is_told_of_its_cancelling(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    begun = threading.Event()

    @mlq.actor
    def slow() -> None:
        begun.set()
        while True:
            threading.Event().wait(0.01)  # an exception is raised in Python code alone

    job = slow.submit()
    start_worker()
    begun.wait(10)
    answer = client.post(f"{JOBS}/{job.id}/cancel")
    assert (202, True) == (answer.status_code, answer.json["cancel_requested_at"] is not None)
    eventually(lambda: mlq.job(job.id).state is State.CANCELLED)


def test_a_running_job_gets_more_time(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    begun, go = threading.Event(), threading.Event()

    @mlq.actor(time_limit=1000)
    def slow() -> bool:
        begun.set()
        return go.wait(10)

    job = slow.submit()
    early = client.post(f"{JOBS}/{job.id}/extend", json={"seconds": 60})
    assert (409, "InvalidTransition") == (early.status_code, early.json["code"])
    start_worker()
    begun.wait(10)
    answer = client.post(f"{JOBS}/{job.id}/extend", json={"seconds": 60})
    assert (200, 60.0) == (answer.status_code, answer.json["extended_by"])
    for wrong in ({}, {"seconds": 0}, {"seconds": "60"}):
        assert 422 == client.post(f"{JOBS}/{job.id}/extend", json=wrong).status_code
    go.set()
    assert job.result(10) is True


def test_what_has_ended_is_not_cancelled(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    @mlq.actor
    def work() -> int:
        return 1

    job = work.submit()
    start_worker()
    assert 1 == job.result(10)
    answer = client.delete(f"{JOBS}/{job.id}")
    assert (409, "InvalidTransition") == (answer.status_code, answer.json["code"])
    assert State.SUCCEEDED is mlq.job(job.id).state


def test_attempts_that_failed_are_listed_with_their_errors(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor(max_retries=1, min_backoff=1)
    def bad(n: int) -> None:
        raise ValueError(f"no {n}")

    job = bad.submit(3)
    start_worker()
    job.wait(10)
    attempts = client.get(f"{JOBS}/{job.id}/attempts").json["attempts"]
    assert [(1, "failed", "no 3"), (2, "failed", "no 3")] == [
        (one["attempt"], one["outcome"], one["error"]["message"]) for one in attempts
    ]
    assert "in bad" in attempts[0]["error"]["traceback"]


def test_a_callback_is_delivered_again(mlq: MLQ, client: FlaskClient) -> None:
    job_id = mlq.post(1, callback="http://localhost:9/x")
    early = client.post(f"{JOBS}/{job_id}/callbacks/redeliver")
    assert (409, "InvalidTransition") == (early.status_code, early.json["code"])
    mlq.job(job_id).cancel()
    answer = client.post(f"{JOBS}/{job_id}/callbacks/redeliver", json={"url": "http://localhost:9/y"})
    assert (202, "http://localhost:9/y", "pending") == (
        answer.status_code,
        answer.json["callback"],
        answer.json["callback_state"],
    )
    for url in ("ftp://x", "http://user:pw@x/", "", 5):
        assert 422 == client.post(f"{JOBS}/{job_id}/callbacks/redeliver", json={"url": url}).status_code, url
