"""Operations over HTTP: dead letters, queues, workers, health."""

from __future__ import annotations

import json
from typing import Any

import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, bearer, mounted
from support import StartWorker, eventually

from mlqueue import MLQ, State
from mlqueue.keys import ApiKeys
from mlqueue.web import keys as key_auth

DEAD = f"{PREFIX}/dead"


@pytest.fixture
def letters(mlq: MLQ, start_worker: StartWorker) -> list[str]:
    """The ids of three dead letters, the latest death first."""

    @mlq.actor(max_retries=0)
    def bad(n: int) -> None:
        raise ValueError(f"no digit {n}")

    @mlq.actor(max_retries=0, queue_name="other")
    def worse(n: int) -> None:
        raise KeyError(n)

    jobs = []
    worker = start_worker(threads=1)
    for actor, n in ((bad, 1), (bad, 2), (worse, 3)):
        jobs.append(actor.submit(n))
        jobs[-1].wait(10)
    worker.stop()
    return [job.id for job in reversed(jobs)]


def ids(answer: Any) -> list[str]:
    return [record["id"] for record in answer.json["dead"]]


def test_dead_letters_are_listed_filtered_and_paged(client: FlaskClient, letters: list[str]) -> None:
    for query, expected in {
        "": letters,
        "?actor=bad": letters[1:],
        "?queue=other": letters[:1],
        "?reason=crashed": [],
        "?text=digit%202": [letters[1]],
        "?older_than=3600": [],
        "?newer_than=3600": letters,
    }.items():
        assert expected == ids(client.get(DEAD + query)), query
    page = client.get(f"{DEAD}?limit=2")
    assert (letters[:2], letters[2:]) == (ids(page), ids(client.get(page.json["next"])))
    assert "ValueError" in client.get(f"{DEAD}?actor=bad").json["dead"][0]["error"]["type"]
    for query in ("reason=bored", "cursor=x", "cursor=1", "limit=0", "colour=red"):
        assert 422 == client.get(f"{DEAD}?{query}").status_code, query


def test_a_dead_letter_is_shown_with_what_was_sent(mlq: MLQ, client: FlaskClient, letters: list[str]) -> None:
    answer = client.get(f"{DEAD}/{letters[0]}")
    assert ([3], {}, "dead", "failed") == (
        answer.json["args"],
        answer.json["kwargs"],
        answer.json["record"]["state"],
        answer.json["record"]["dead_reason"],
    )
    assert 404 == client.get(f"{DEAD}/{mlq.post(1)}").status_code


def test_a_dead_letter_is_put_back_with_other_arguments(mlq: MLQ, client: FlaskClient, letters: list[str]) -> None:
    answer = client.post(f"{DEAD}/{letters[0]}/requeue", json={"args": [4]})
    assert (202, "queued") == (answer.status_code, answer.json["state"])
    assert [4] == mlq.get_job(letters[0])["msg"]["args"]
    assert 409 == client.post(f"{DEAD}/{letters[0]}/requeue").status_code
    assert 202 == client.post(f"{DEAD}/{letters[1]}/requeue").status_code
    for body in ({"msg": 1}, {"args": "x"}, {"options": {"pipe_target": {}}}, {"kwargs": []}):
        assert 422 == client.post(f"{DEAD}/{letters[2]}/requeue", json=body).status_code, body
    assert State.DEAD is mlq.job(letters[2]).state


def test_many_are_put_back_by_ids_or_by_filters(mlq: MLQ, client: FlaskClient, letters: list[str]) -> None:
    assert [letters[2]] == client.post(f"{DEAD}/requeue", json={"ids": [letters[2], "nope"]}).json["requeued"]
    assert [letters[1]] == client.post(f"{DEAD}/requeue", json={"actor": "bad"}).json["requeued"]
    assert [letters[0]] == client.post(f"{DEAD}/requeue", json={"all": True}).json["requeued"]
    assert 3 == mlq.job_count()


def test_many_are_forgotten_by_ids_or_by_filters(mlq: MLQ, client: FlaskClient, letters: list[str]) -> None:
    assert {"purged": 1} == client.post(f"{DEAD}/purge", json={"ids": [letters[2], "nope"]}).json
    assert {"purged": 1} == client.post(f"{DEAD}/purge", json={"reason": "failed", "queue": "other"}).json
    assert 204 == client.delete(f"{DEAD}/{letters[1]}").status_code
    assert 404 == client.delete(f"{DEAD}/{letters[1]}").status_code
    assert 0 == mlq.dead_letters.count()


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"ids": []},
        {"all": False},
        {"ids": ["x"], "actor": "bad"},
        {"all": True, "actor": "bad"},
        {"actor": ""},
        [],
        5,
        {"colour": "red"},
    ],
)
def test_a_body_that_says_not_which_means_none(mlq: MLQ, client: FlaskClient, letters: list[str], body: Any) -> None:
    for what in ("requeue", "purge"):
        assert 422 == client.post(f"{DEAD}/{what}", json=body).status_code
    assert 3 == mlq.dead_letters.count()


def test_an_export_can_be_imported(mlq: MLQ, client: FlaskClient, letters: list[str]) -> None:
    answer = client.get(f"{DEAD}/export?actor=bad")
    lines = answer.text.splitlines()
    assert (200, "application/x-ndjson", letters[1:]) == (
        answer.status_code,
        answer.content_type,
        [json.loads(line)["id"] for line in lines],
    )
    mlq.dead_letters.purge_all()
    assert letters[1:] == mlq.dead_letters.import_(lines).created
    assert "" == client.get(f"{DEAD}/export?actor=nobody").text


def test_queues_are_listed_with_counts_workers_and_the_oldest(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor(queue_name="maths")
    def work() -> None: ...

    assert [] == client.get(f"{PREFIX}/queues").json["queues"]
    urgent = work.with_options(priority=-5).submit()
    for number in range(3):
        mlq.post(number)
    old = mlq.post("old", priority=100)
    mlq.client.hset(f"{mlq.store.root}:j:{old}", "t", int((mlq.store.now() - 50) * 1000))
    default, maths = client.get(f"{PREFIX}/queues").json["queues"]
    assert ("default", {"queued": 4}, 0) == (default["name"], default["counts"], default["workers"])
    assert 50 <= default["oldest_waiting"] < 60
    assert {"work": {"queued": 1}} == maths["actors"]
    assert maths["oldest_waiting"] < 20
    start_worker(queues={"maths"})
    urgent.wait(10)
    maths = client.get(f"{PREFIX}/queues").json["queues"][1]
    assert ({"succeeded": 1}, 1, None) == (maths["counts"], maths["workers"], maths["oldest_waiting"])


def test_workers_are_listed_without_their_command_lines(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor
    def work() -> None: ...

    start_worker(threads=3)
    [worker] = eventually(lambda: client.get(f"{PREFIX}/workers").json["workers"])
    assert (3, ["default"], ["work"], []) == tuple(worker[name] for name in ("threads", "queues", "actors", "jobs"))
    assert (True, False) == (0 < worker["lease_left"] <= 30, "argv" in worker)


def test_health_is_ok_and_readiness_tells_more_to_who_may_read(
    mlq: MLQ, keys: ApiKeys, start_worker: StartWorker
) -> None:
    client = mounted(mlq, key_auth(mlq)).test_client()
    assert (200, "ok", "text/plain; charset=utf-8") == (
        (answer := client.get(f"{PREFIX}/healthz")).status_code,
        answer.text,
        answer.content_type,
    )
    assert {"ready": True} == client.get(f"{PREFIX}/readyz").json
    assert {"ready": True} == client.get(f"{PREFIX}/readyz", headers=bearer(keys, "submit")).json
    mlq.post(1)

    @mlq.actor(queue_name="other")
    def work() -> None: ...

    start_worker(queues={"other"})
    headers = bearer(keys, "read")
    told = eventually(lambda: (found := client.get(f"{PREFIX}/readyz", headers=headers).json)["workers"] and found)
    assert (True, True, 1) == (told["ready"], told["store"]["ok"], told["workers"])
    assert 0 <= told["oldest_waiting"] < 20
