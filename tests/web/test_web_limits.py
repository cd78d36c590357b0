"""Limits, unique jobs and reasons over HTTP, by hand and by the client."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, bearer, mounted
from support import StartWorker, eventually
from test_client import serving

from mlqueue import MLQ, InvalidArguments, JobExists, State
from mlqueue.client import Client
from mlqueue.keys import ApiKeys
from mlqueue.web import keys as key_auth

LIMITS = f"{PREFIX}/limits"


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def train(mlq: MLQ, start_worker: StartWorker, gate: threading.Event) -> Any:
    """An actor that needs a GPU, and a worker that knows it."""

    @mlq.actor(resources={"gpu": 1}, http=True, unique_key=lambda n: f"n {n}")
    def train(n: int) -> int:
        gate.wait(10)
        return n

    start_worker(threads=2)
    eventually(lambda: mlq.store.published("train"))
    return train


def test_limits_are_shown_set_and_forgotten(client: FlaskClient, mlq: MLQ, train: Any, gate: threading.Event) -> None:
    first, second = train.submit(1), train.submit(2)
    eventually(lambda: first.state is State.RUNNING)
    shown = {"name": "gpu", "capacity": 1, "used": 1, "source": "default", "held_by": {"0": first.id}}
    assert [shown] == client.get(LIMITS).json["limits"]
    why = client.get(f"{PREFIX}/jobs/{second.id}/why").json
    assert (second.id, "limit", "gpu", [first.id]) == (why["job_id"], why["reason"], why["limit"], why["held_by"])
    assert why["text"].startswith(f"job {second.id} waits for gpu, held by job {first.id} since ")
    assert {"gpu": [0]} == client.get(f"{PREFIX}/jobs/{first.id}").json["slots"]
    assert {"name": "gpu", "capacity": 2} == client.put(f"{LIMITS}/gpu", json={"capacity": 2}).json
    eventually(lambda: second.state is State.RUNNING)
    assert {"name": "gpu", "capacity": 1} == client.delete(f"{LIMITS}/gpu").json
    assert 5 == client.put(f"{LIMITS}/@train", json={"capacity": 5}).json["capacity"]
    assert 5 == mlq.limits.get("@train").capacity  # type: ignore[union-attr]
    for body in ({"capacity": -1}, {"capacity": "2"}, {"capacity": 10_001}, {}, {"capacity": 1, "n": 1}):
        assert 422 == client.put(f"{LIMITS}/gpu", json=body).status_code, body
    assert 422 == client.delete(f"{LIMITS}/{'x' * 102}").status_code
    assert 404 == client.get(f"{PREFIX}/jobs/nobody/why").status_code


def test_limits_are_set_by_the_scope_admin_alone(mlq: MLQ, keys: ApiKeys) -> None:
    client = mounted(mlq, auth=key_auth(mlq)).test_client()
    submit, read, admin = (bearer(keys, scope) for scope in ("submit", "read", "admin"))
    assert [403, 200, 200] == [client.get(LIMITS, headers=who).status_code for who in (submit, read, admin)]
    put = [client.put(f"{LIMITS}/gpu", json={"capacity": 2}, headers=who).status_code for who in (submit, read, admin)]
    assert [403, 403, 200] == put
    assert [403, 403, 200] == [client.delete(f"{LIMITS}/gpu", headers=who).status_code for who in (submit, read, admin)]


def test_a_unique_job_is_answered_with_the_one_that_is_there(client: FlaskClient, mlq: MLQ, train: Any) -> None:
    body = {"args": [1], "unique_key": "k", "fair_by": "ann"}
    first = client.post(f"{PREFIX}/actors/train", json=body)
    assert (202, "k", "ann") == (first.status_code, first.json["unique_key"], first.json["fair_by"])
    again = client.post(f"{PREFIX}/actors/train", json=body, headers={"Idempotency-Key": "a"})
    assert (202, first.json["id"]) == (again.status_code, again.json["id"])
    replayed = client.post(f"{PREFIX}/actors/train", json=body, headers={"Idempotency-Key": "a"})
    assert (first.json["id"], "true") == (replayed.json["id"], replayed.headers["Idempotent-Replayed"])
    refused = client.post(f"{PREFIX}/actors/train", json={**body, "unique_policy": "reject"})
    assert (409, "JobExists", first.json["id"]) == (refused.status_code, refused.json["code"], refused.json["job_id"])
    many = {
        "jobs": [{"actor": "train", **body, "unique_key": "new"}, {"actor": "train", **body, "unique_policy": "reject"}]
    }
    for headers in ({}, {"Idempotency-Key": "b"}):
        assert 409 == client.post(f"{PREFIX}/jobs/bulk", json=many, headers=headers).status_code
    assert 1 == len(mlq.jobs().jobs), "all of them, or none"
    for wrong in ({"unique_for": "ever"}, {"unique_for": 0}, {"unique_policy": "ask"}, {"fair_by": ""}):
        assert 422 == client.post(f"{PREFIX}/actors/train", json={**body, **wrong}).status_code, wrong


def test_a_key_that_a_function_makes_which_is_not_here_must_be_given(mlq: MLQ, train: Any) -> None:
    del mlq.broker.actors["train"]  # as in a web process without the workers' code
    client = mounted(mlq, allow_anonymous=True).test_client()
    refused = client.post(f"{PREFIX}/actors/train", json={"args": [1]})
    assert (422, "$.unique_key") == (refused.status_code, refused.json["errors"][0]["path"])
    assert 202 == client.post(f"{PREFIX}/actors/train", json={"args": [1], "unique_key": "n 1"}).status_code
    mlq.broker.actors["train"] = train


def test_the_client_has_limits_reasons_and_unique_jobs(mlq: MLQ, train: Any) -> None:
    with serving(mounted(mlq, allow_anonymous=True)) as url, Client(url + PREFIX) as client:
        job = client.submit("train", 1)
        assert job == client.submit("train", 1)
        with pytest.raises(JobExists) as raised:
            client.submit("train", 2, unique_key="n 1", unique_policy="reject")
        assert job.id == raised.value.job_id
        other = client.submit("train", 2)
        eventually(lambda: job.state is State.RUNNING)
        assert {"gpu": (0,)} == job.record.slots
        eventually(lambda: other.why().reason == "limit")
        assert (job.id,) == other.why().held_by
        [limit] = client.limits()
        assert ("gpu", 1, 1) == (limit.name, limit.capacity, limit.used)
        assert (2, 1) == (client.set_limit("gpu", 2), client.set_limit("gpu", None))
        with pytest.raises(InvalidArguments):
            client.set_limit("gpu", -1)
