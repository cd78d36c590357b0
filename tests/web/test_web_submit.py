"""Submitting over HTTP: messages, actors, many at once; options, idempotency, waiting, and what is refused."""

from __future__ import annotations

import base64
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, Literal, TypedDict

import numpy as np
import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, bearer, mounted
from support import StartWorker, eventually

from mlqueue import MLQ, Result, State, codec
from mlqueue.keys import ApiKeys
from mlqueue.message import LISTENER
from mlqueue.web import keys as key_auth

JSON = {"Accept": "application/json"}


def faults(response: Any) -> list[str]:
    return [fault["path"] for fault in response.json["errors"]]


def publish(mlq: MLQ) -> None:
    """Has the store know the actors, as when a worker has started and gone: their jobs wait."""
    queues = {name: actor.queue_name for name, actor in mlq.broker.actors.items()}
    mlq.store.start_worker("gone", {}, queues, mlq.broker.published)
    mlq.store.release("gone", "drain", "")


@pytest.fixture
def web_only(mlq: MLQ) -> MLQ:
    """The namespace of `mlq` in a process that has no task code."""
    other = MLQ(mlq.name, settings=mlq.settings)
    try:
        yield other
    finally:
        other.close()


# Messages


def test_a_message_is_posted_and_its_id_is_the_answer(mlq: MLQ, client: FlaskClient) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={"msg": {"arg1": 6, "arg2": 3}})
    assert (202, "text/plain; charset=utf-8") == (answer.status_code, answer.content_type)
    assert f"{PREFIX}/jobs/{answer.text}" == answer.location
    record = mlq.job(answer.text).record
    assert (LISTENER, "default", State.QUEUED, None) == (record.actor, record.queue, record.state, record.result_ttl)
    assert {"arg1": 6, "arg2": 3} == mlq.get_job(answer.text)["msg"]


def test_the_record_is_the_answer_when_json_is_asked_for(mlq: MLQ, client: FlaskClient) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={"msg": 1, "functions": ["double"]}, headers=JSON)
    assert (202, "queued", ["double"], 0) == (
        answer.status_code,
        answer.json["state"],
        answer.json["functions"],
        answer.json["position"],
    )
    assert {"self": answer.location, "cancel": f"{answer.location}/cancel"} == answer.json["links"]


def test_options_of_a_job_are_set_and_no_others_can_be(mlq: MLQ, client: FlaskClient) -> None:
    options = {"callback": "http://localhost:9/x", "delay": 60, "priority": -5, "tags": ["a", "b"], "queue_timeout": 9}
    answer = client.post(f"{PREFIX}/jobs", json={"msg": 1, **options}, headers=JSON)
    assert (202, "scheduled", -5, ["a", "b"], 9) == (
        answer.status_code,
        answer.json["state"],
        answer.json["priority"],
        answer.json["tags"],
        answer.json["queue_timeout"],
    )
    assert "http://localhost:9/x" == mlq.job(answer.json["id"]).record.callback
    for name in ("pipe_target", "on_success", "on_failure", "group_completion_uuid", "throws", "max_retries", "job_id"):
        refused = client.post(f"{PREFIX}/jobs", json={"msg": 1, name: "x"}, headers=JSON)
        assert (422, [f"$.{name}"]) == (refused.status_code, faults(refused))


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "$.msg"),
        ({"msg": 1, "callback": "ftp://x/"}, "$.callback"),
        ({"msg": 1, "callback": 7}, "$.callback"),
        ({"msg": 1, "functions": "double"}, "$.functions"),
        ({"msg": 1, "functions": ["ok", 5]}, "$.functions[1]"),
        ({"msg": 1, "delay": -1}, "$.delay"),
        ({"msg": 1, "queue_timeout": 0}, "$.queue_timeout"),
        ({"msg": 1, "hard_time_limit": 0.5}, "$.hard_time_limit"),
        ({"msg": 1, "priority": 1.5}, "$.priority"),
        ({"msg": 1, "tags": ["x" * 101]}, "$.tags[0]"),
        ([1], "$"),
        ("text", "$"),
        ({"msg": "\ud800"}, "$.msg"),
    ],
)
def test_a_body_that_does_not_fit_is_refused_with_the_path(client: FlaskClient, body: Any, path: str) -> None:
    answer = client.post(f"{PREFIX}/jobs", json=body, headers=JSON)
    assert (422, "application/problem+json", [path]) == (answer.status_code, answer.content_type, faults(answer))
    assert 422 == answer.json["status"]


def test_errors_of_mlqs_routes_are_text_unless_json_is_asked_for(client: FlaskClient) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={})
    assert (422, "text/plain; charset=utf-8") == (answer.status_code, answer.content_type)
    assert "$.msg is missing" in answer.text


@pytest.mark.parametrize("body", [b"", b"{", b'{"msg": NaN}', b'{"msg": 1} x', b"\xff\xfe", b'{"msg": 1e', b"\x00"])
def test_what_is_not_json_is_400(client: FlaskClient, body: bytes) -> None:
    answer = client.post(f"{PREFIX}/jobs", data=body, content_type="application/json")
    assert 400 == answer.status_code
    assert ("the body is not JSON: " if body else "the body is empty; send application/json") in answer.text


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "application/xml", "x"])
def test_another_content_type_is_415_and_says_which_are_taken(client: FlaskClient, kind: str | None) -> None:
    answer = client.post(f"{PREFIX}/jobs", data=b'{"msg": 1}', content_type=kind)
    assert 415 == answer.status_code
    assert "application/json, application/msgpack, multipart/form-data" in answer.text


def test_a_message_may_be_messagepack_with_bytes_and_arrays(mlq: MLQ, client: FlaskClient) -> None:
    array = np.arange(6.0).reshape(2, 3)
    for kind in ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"):
        body = codec.encode({"msg": {"image": b"\x89PNG", "at": datetime(2026, 1, 1, tzinfo=UTC), "array": array}})
        answer = client.post(f"{PREFIX}/jobs", data=body, content_type=kind)
        found = mlq.get_job(answer.text)["msg"]
        assert (b"\x89PNG", datetime(2026, 1, 1, tzinfo=UTC)) == (found["image"], found["at"])
        assert np.array_equal(array, found["array"])


@pytest.mark.parametrize("body", [b"", b"\xc1", b"\x81\xa3msg", b"\xdd\xff\xff\xff\xff", b"\xdf\x00\x0f\xff\xff\x01"])
def test_what_is_not_messagepack_is_400(client: FlaskClient, body: bytes) -> None:
    assert 400 == client.post(f"{PREFIX}/jobs", data=body, content_type="application/msgpack").status_code


def test_a_message_may_be_a_file_in_a_form(mlq: MLQ, client: FlaskClient) -> None:
    form = {"msg": (io.BytesIO(b"\x89PNG\r\n"), "digit.png"), "functions": ["a", "b"], "priority": "3"}
    answer = client.post(f"{PREFIX}/jobs", data=form)
    job = mlq.get_job(answer.text)
    assert (b"\x89PNG\r\n", ["a", "b"], 3) == (job["msg"], job["functions"], mlq.job(answer.text).record.priority)


def test_a_form_without_a_boundary_or_with_a_part_twice_is_refused(client: FlaskClient) -> None:
    assert 400 == client.post(f"{PREFIX}/jobs", data=b"x", content_type="multipart/form-data").status_code
    form = {"msg": [(io.BytesIO(b"1"), "a"), (io.BytesIO(b"2"), "b")]}
    answer = client.post(f"{PREFIX}/jobs", data=form, headers=JSON)
    assert (422, ["$.msg"]) == (answer.status_code, faults(answer))


# Actors


class Point(TypedDict):
    x: float
    y: float


def test_an_actor_is_called_by_a_process_that_has_none_of_its_code(
    mlq: MLQ, web_only: MLQ, start_worker: StartWorker
) -> None:
    @mlq.actor(http=True, queue_name="maths", priority=7, tags=["sum"], result_ttl=60)
    def add(a: int, b: int = 2) -> int:
        """Adds."""
        return a + b

    start_worker()
    client = mounted(web_only, allow_anonymous=True).test_client()
    eventually(lambda: client.get(f"{PREFIX}/actors").json["actors"])
    answer = client.post(f"{PREFIX}/actors/add", json={"args": [40]}, headers={"Prefer": "wait=10"})
    assert (200, 42, "succeeded") == (answer.status_code, answer.json["result"], answer.json["state"])
    assert ("maths", 7, ["sum"], 60) == tuple(answer.json[name] for name in ("queue", "priority", "tags", "result_ttl"))
    assert answer.headers["Preference-Applied"] == "wait=10"
    [listed] = client.get(f"{PREFIX}/actors").json["actors"]
    assert ("add", "maths", "Adds.", f"{PREFIX}/actors/add") == tuple(
        listed[name] for name in ("name", "queue", "description", "url")
    )
    assert [("a", True), ("b", False)] == [(item["name"], item["required"]) for item in listed["parameters"]]


def test_an_actor_without_http_is_403_and_an_unknown_one_404(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor
    def secret() -> None: ...

    publish(mlq)
    answers = [client.post(f"{PREFIX}/actors/{name}", json={}) for name in ("secret", "nowhere", LISTENER)]
    assert [403, 404] == [answer.status_code for answer in answers[:2]]
    assert answers[2].status_code in (403, 404)
    assert "@mlq.actor(http=True)" in answers[0].json["detail"]
    assert 0 == mlq.job_count()


def test_an_actor_that_is_no_longer_for_http_is_refused_once_its_worker_has_started_anew(
    mlq: MLQ, web_only: MLQ
) -> None:
    client = mounted(web_only, allow_anonymous=True).test_client()

    def work() -> None: ...

    mlq.actor(http=True)(work)
    publish(mlq)
    assert 202 == client.post(f"{PREFIX}/actors/work", json={}).status_code
    mlq.actor(work)
    publish(mlq)
    assert 403 == client.post(f"{PREFIX}/actors/work", json={}).status_code


@pytest.mark.parametrize(
    ("body", "path"),
    [
        ({}, "$.kwargs.name"),
        ({"args": ["a", 1, 2]}, "$.args[2]"),
        ({"args": [1]}, "$.args[0]"),
        ({"args": ["a"], "kwargs": {"name": "b"}}, "$.kwargs.name"),
        ({"kwargs": {"name": "a", "size": 3}}, "$.kwargs.size"),
        ({"kwargs": {"name": "a", "count": "3"}}, "$.kwargs.count"),
        ({"kwargs": {"name": "a", "count": True}}, "$.kwargs.count"),
        ({"kwargs": {"name": "a", "points": [{"x": 1, "y": 2}, {"x": 1}]}}, "$.kwargs.points[1].y"),
        ({"kwargs": {"name": "a", "points": [{"x": 1, "y": 2, "z": 3}]}}, "$.kwargs.points[0].z"),
        ({"kwargs": {"name": "a", "mode": "medium"}}, "$.kwargs.mode"),
        ({"kwargs": {"name": "a", "image": "not base64!"}}, "$.kwargs.image"),
        ({"kwargs": {"name": "a", "at": "yesterday"}}, "$.kwargs.at"),
        ({"args": {}}, "$.args"),
        ({"argument": []}, "$.argument"),
    ],
)
def test_arguments_that_the_actor_would_not_take_are_refused_with_the_path(
    mlq: MLQ, client: FlaskClient, body: Any, path: str
) -> None:
    @mlq.actor(http=True)
    def work(
        name: str,
        count: int = 1,
        *,
        points: list[Point] | None = None,
        mode: Literal["fast", "slow"] = "fast",
        image: bytes = b"",
        at: datetime | None = None,
    ) -> None: ...

    publish(mlq)
    answer = client.post(f"{PREFIX}/actors/work", json=body)
    assert (422, "application/problem+json") == (answer.status_code, answer.content_type)
    assert path in faults(answer)
    assert 0 == mlq.job_count()


def test_bytes_and_times_arrive_as_such_from_json_messagepack_and_forms(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor(http=True)
    def look(image: bytes, at: datetime | None = None, top: int = 1, ratio: float = 0.5) -> None: ...

    publish(mlq)
    png, at = b"\x89PNG\r\n\x1a\n", datetime(2026, 1, 31, 12, tzinfo=UTC)
    encoded = {"image": base64.b64encode(png).decode(), "at": at.isoformat(), "top": 3.0, "ratio": 1}
    asked: list[dict[str, Any]] = [
        {"json": {"kwargs": encoded}},
        {
            "data": codec.encode({"kwargs": {"image": png, "at": at, "top": 3, "ratio": 1}}),
            "content_type": "application/msgpack",
        },
        {"data": {"image": (io.BytesIO(png), "digit.png"), "at": at.isoformat(), "top": "3", "ratio": "1"}},
        {
            "data": {
                "image": (io.BytesIO(png), "a"),
                "json": f'{{"kwargs": {{"at": "{at.isoformat()}", "top": 3, "ratio": 1}}}}',
            }
        },
    ]
    for one in asked:
        answer = client.post(f"{PREFIX}/actors/look", **one)
        assert 202 == answer.status_code, answer.text
        sent = mlq.get_job(answer.json["id"])["msg"]["kwargs"]
        assert {"image": png, "at": at, "top": 3, "ratio": 1.0} == sent
        assert (int, float) == (type(sent["top"]), type(sent["ratio"]))


def test_options_of_an_actors_job_stand_beside_its_arguments(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor(http=True, tags=["default"])
    def wait(delay: float) -> None: ...

    publish(mlq)
    answer = client.post(f"{PREFIX}/actors/wait", json={"kwargs": {"delay": 2}, "delay": 60, "tags": ["mine"]})
    assert ("scheduled", ["mine"]) == (answer.json["state"], answer.json["tags"])
    assert {"delay": 2.0} == mlq.get_job(answer.json["id"])["msg"]["kwargs"]


def test_a_hint_that_no_json_stands_for_is_refused_where_the_actor_is_declared(mlq: MLQ) -> None:
    with pytest.raises(ValueError, match=r"parameter image of bad: 'BytesIO' has no form in JSON"):

        @mlq.actor(http=True)
        def bad(image: io.BytesIO) -> None: ...


# Waiting


def test_prefer_wait_answers_with_the_result_of_a_message_as_text(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    mlq.create_listener(lambda msg, utils: msg["arg1"] * msg["arg2"])
    answer = client.post(f"{PREFIX}/jobs", json={"msg": {"arg1": 6, "arg2": 3}}, headers={"Prefer": "wait=10"})
    assert (200, "18", "application/json") == (answer.status_code, answer.text, answer.content_type)


def test_who_waited_in_vain_is_told_where_the_job_is(mlq: MLQ, client: FlaskClient) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={"msg": 1}, headers={"Prefer": "wait=0, respond-async"})
    assert (202, None) == (answer.status_code, answer.headers.get("Preference-Applied"))


def test_so_many_may_wait_and_one_more_is_answered_at_once(mlq: MLQ, start_worker: StartWorker) -> None:
    go = threading.Event()

    @mlq.actor(http=True)
    def slow() -> str:
        go.wait(20)
        return "done"

    app = mounted(mlq, allow_anonymous=True, max_waits=1)
    start_worker()
    with ThreadPoolExecutor(1) as pool:
        wait = {"Prefer": "wait=20"}
        first = pool.submit(lambda: app.test_client().post(f"{PREFIX}/actors/slow", json={}, headers=wait))
        eventually(lambda: mlq.jobs(state="running").jobs)
        mount = app.extensions["mlqueue"]["mlqueue"]
        eventually(lambda: mount.waits._value == 0)
        second = app.test_client().post(f"{PREFIX}/jobs", json={"msg": 1}, headers=wait)
        assert (202, None) == (second.status_code, second.headers.get("Preference-Applied"))
        go.set()
        assert (200, "done") == (first.result().status_code, first.result().json["result"])


def test_a_job_that_fails_while_it_is_waited_for_says_so(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor(http=True, max_retries=0)
    def bad() -> None:
        raise ValueError("no such digit")

    start_worker()
    answer = client.post(f"{PREFIX}/actors/bad", json={}, headers={"Prefer": "wait=10"})
    assert (200, "dead", "no such digit") == (answer.status_code, answer.json["state"], answer.json["error"]["message"])
    assert "result" not in answer.json


def test_a_large_result_is_not_part_of_the_record(mlq: MLQ, client: FlaskClient, start_worker: StartWorker) -> None:
    @mlq.actor(http=True)
    def large() -> Result:
        return Result("short", bytes(100_000))

    start_worker()
    answer = client.post(f"{PREFIX}/actors/large", json={}, headers={"Prefer": "wait=10"})
    assert ("short", True) == (answer.json["short_result"], "result" not in answer.json)
    assert 100_000 == len(client.get(answer.json["links"]["result"]).data)


# Idempotency


def posted(client: FlaskClient, key: str, body: Any, **headers: str) -> Any:
    return client.post(f"{PREFIX}/jobs", json=body, headers={"Idempotency-Key": key, **headers})


def test_the_same_key_with_the_same_request_gives_the_same_job(mlq: MLQ, client: FlaskClient) -> None:
    first = posted(client, "one", {"msg": {"a": 1}, "tags": ["x"]})
    # However it is written: in another order, with the key between quotation marks, with spaces.
    second = posted(client, '"one"', {"tags": ["x"], "msg": {"a": 1}})
    assert (202, 202, first.text) == (first.status_code, second.status_code, second.text)
    assert (None, "true") == tuple(answer.headers.get("Idempotent-Replayed") for answer in (first, second))
    assert 1 == mlq.job_count()
    assert first.text != posted(client, "two", {"msg": {"a": 1}, "tags": ["x"]}).text


def test_the_same_key_with_another_request_is_422(mlq: MLQ, client: FlaskClient) -> None:
    posted(client, "one", {"msg": 1})
    for body in ({"msg": 2}, {"msg": 1, "priority": 1}, {"msg": 1, "functions": ["f"]}):
        answer = posted(client, "one", body, Accept="application/json")
        assert (422, "KeyReused") == (answer.status_code, answer.json["code"])
    assert 1 == mlq.job_count()


@pytest.mark.parametrize("key", ["", " ", "x" * 256, "caf\u00e9"])
def test_a_key_that_is_none_is_refused(client: FlaskClient, key: str) -> None:
    assert 422 == posted(client, key, {"msg": 1}).status_code


def test_a_replay_gives_the_job_as_it_is_now_and_waits_for_it(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    @mlq.actor(http=True)
    def add(a: int) -> int:
        return a + 1

    publish(mlq)
    once = {"Idempotency-Key": "one"}
    first = client.post(f"{PREFIX}/actors/add", json={"args": [1]}, headers=once)
    start_worker()
    second = client.post(f"{PREFIX}/actors/add", json={"args": [1]}, headers={**once, "Prefer": "wait=10"})
    assert (200, first.json["id"], 2) == (second.status_code, second.json["id"], second.json["result"])


def test_a_key_is_forgotten_after_its_time(mlq: MLQ, client: FlaskClient) -> None:
    first = posted(client, "one", {"msg": 1})
    [name] = mlq.client.keys(f"{mlq.store.root}:once:*")
    assert 86_000_000 < mlq.client.pttl(name) <= 86_400_000
    mlq.client.pexpire(name, 0)
    second = posted(client, "one", {"msg": 2})
    assert (202, True) == (second.status_code, first.text != second.text)


def test_everybody_has_keys_of_his_own(mlq: MLQ, keys: ApiKeys) -> None:
    client = mounted(mlq, key_auth(mlq)).test_client()
    one, other = (bearer(keys, "submit") for _ in range(2))
    ids = [
        client.post(f"{PREFIX}/jobs", json={"msg": 1}, headers={**who, "Idempotency-Key": "one"}).text
        for who in (one, other, one)
    ]
    assert (ids[0], True) == (ids[2], ids[0] != ids[1])


def test_fifty_at_once_with_one_key_make_one_job(mlq: MLQ, app: Any) -> None:
    """F29."""
    barrier = threading.Barrier(50)

    def post(number: int) -> Any:
        barrier.wait(20)
        return posted(app.test_client(), "one", {"msg": 1})

    with ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(post, range(50)))
    assert {202} == {answer.status_code for answer in answers}
    assert 1 == len({answer.text for answer in answers}) == mlq.job_count()
    assert 49 == sum("Idempotent-Replayed" in answer.headers for answer in answers)


def test_a_hundred_keys_each_twice_at_once_with_two_bodies_make_a_hundred_jobs(mlq: MLQ, app: Any) -> None:
    """F29: of two requests with one key and two bodies one wins, and the other is told."""

    def post(number: int) -> Any:
        return posted(app.test_client(), f"key {number // 2}", {"msg": number})

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(post, range(200)))
    for one, other in zip(answers[::2], answers[1::2], strict=True):
        assert [202, 422] == sorted([one.status_code, other.status_code])
    assert 100 == mlq.job_count()


# Many at once


def test_many_jobs_are_submitted_by_one_request(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor(http=True)
    def add(a: int) -> int:
        return a + 1

    publish(mlq)
    jobs = [{"msg": 1}, {"actor": "add", "args": [2], "priority": 4}, {"msg": 3, "delay": 60}]
    answer = client.post(f"{PREFIX}/jobs/bulk", json={"jobs": jobs}, headers={"Idempotency-Key": "all"})
    ids = [job["id"] for job in answer.json["jobs"]]
    assert [(LISTENER, "queued", 0), ("add", "queued", 4), (LISTENER, "scheduled", 0)] == [
        (record.actor, str(record.state), record.priority) for record in map(mlq.store.record, ids)
    ]
    again = client.post(f"{PREFIX}/jobs/bulk", json={"jobs": jobs}, headers={"Idempotency-Key": "all"})
    assert (202, answer.json, 3) == (again.status_code, again.json, mlq.job_count())


def test_of_many_jobs_all_are_submitted_or_none(mlq: MLQ, client: FlaskClient) -> None:
    @mlq.actor(http=True)
    def add(a: int) -> int:
        return a + 1

    publish(mlq)
    for jobs, path in (
        ([{"msg": 1}, {"actor": "add", "args": ["x"]}], "$.jobs[1].args[0]"),
        ([{"msg": 1}, {"msg": 2, "on_success": "add"}], "$.jobs[1].on_success"),
        ([{"actor": 5}], "$.jobs[0].actor"),
        ([{"msg": 1}] * 501, "$.jobs"),
        ([], "$.jobs"),
    ):
        answer = client.post(f"{PREFIX}/jobs/bulk", json={"jobs": jobs})
        assert (422, [path]) == (answer.status_code, faults(answer))
    assert 404 == client.post(f"{PREFIX}/jobs/bulk", json={"jobs": [{"msg": 1}, {"actor": "nobody"}]}).status_code
    assert 0 == mlq.job_count()
