"""Posted functions and webhooks over HTTP, by the client and by the command: who may, and what is refused."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from command import Folder, a_folder
from flask.testing import FlaskClient
from hosting import PREFIX, bearer, mounted
from receivers import Receiver, receiver
from support import StartWorker, eventually, fresh_app
from werkzeug.serving import make_server

from mlqueue import MLQ, PostedFunction, Settings, SignatureInvalid, SigningKeyMissing, sign_function
from mlqueue.client import Client
from mlqueue.job import CallbackState
from mlqueue.keys import ApiKeys
from mlqueue.web import keys as key_auth
from mlqueue.webhooks import EVENTS, Webhook

KEY = "the-signing-key-of-these-tests"
CONSUMER = f"{PREFIX}/consumer"
JSON = {"Accept": "application/json"}


@pytest.fixture
def server(server: Settings) -> Settings:
    """The server of the session, with a signing key, and webhooks that may go to this machine."""
    return dataclasses.replace(server, signing_key=KEY, callback_allow="loopback")


@pytest.fixture
def hook() -> Iterator[Receiver]:
    with receiver() as server:
        yield server


def doubled(msg: Any, utils: Any) -> Any:
    return 2 * msg


class Sings:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    def __call__(self, msg: Any, utils: Any) -> None: ...


def signed(mlq: MLQ, function: Any = doubled, name: str = "doubled", key: str = KEY, **changed: Any) -> dict[str, Any]:
    """What sign_function gives, with members changed afterwards."""
    body: dict[str, Any] = json.loads(sign_function(function, key, name=name, namespace=mlq.name))
    return {**body, **changed}


def test_a_signed_function_is_posted_runs_and_is_removed_by_its_name_or_the_same_body(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker
) -> None:
    start_worker()
    body = signed(mlq)
    answer = client.post(CONSUMER, json=body)
    assert (answer.status_code, answer.text) == (201, "doubled")
    job_id = client.post(f"{PREFIX}/jobs", json={"msg": 21, "functions": ["doubled"]}).text
    assert mlq.job(job_id).result(15) == 42
    (listed,) = client.get(f"{PREFIX}/functions").json["functions"]
    assert (listed["name"], listed["serial"], listed["error"]) == ("doubled", body["serial"], None)
    assert listed["size"] == len(base64.b64decode(body["code"]))
    assert client.delete(CONSUMER, json=body).text == "doubled"
    assert client.get(f"{PREFIX}/functions").json == {"functions": []}
    assert client.post(CONSUMER, json=signed(mlq), headers=JSON).json["name"] == "doubled"
    assert client.delete(f"{CONSUMER}?name=doubled", headers=JSON).json == {"name": "doubled"}
    gone = client.delete(CONSUMER, json={"name": "doubled"})
    assert (gone.status_code, "no function 'doubled'" in gone.text) == (404, True)
    nameless = client.delete(CONSUMER)
    assert (nameless.status_code, '{"name": ...}' in nameless.text) == (422, True)


def test_unsigned_altered_expired_replayed_and_removed_ones_are_refused_and_never_unpickled(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_worker()
    canary, other = tmp_path / "sang", base64.b64encode(cloudpickle.dumps(Sings(tmp_path / "sang"))).decode()
    body = signed(mlq, Sings(canary), "bird")
    refused = {
        "unsigned": {**body, "signature": base64.b64encode(bytes(32)).decode()},
        "by another key": signed(mlq, Sings(canary), "bird", key="another-key-than-the-right-one"),
        "with other code": {**signed(mlq, name="bird"), "code": other},
        "under another name": {**body, "name": "other"},
        "with another time": {**body, "time": body["time"] + 5},
        "with another serial": {**body, "serial": body["serial"] + 5},
        "for another namespace": json.loads(sign_function(Sings(canary), KEY, name="bird", namespace="elsewhere")),
    }
    for what, one in refused.items():
        answer = client.post(CONSUMER, json=one, headers=JSON)
        assert (403, "SignatureInvalid") == (answer.status_code, answer.json["code"]), what
        assert f"sign_function(fn, key, namespace={mlq.name!r})" in answer.json["detail"]
    later = time.time() + 301
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: later)
        answer = client.post(CONSUMER, json=body)
    assert (403, True) == (answer.status_code, "300 s are allowed" in answer.text)
    assert client.get(f"{PREFIX}/functions").json == {"functions": []}
    assert not canary.exists()
    # It would have sung: the same body in time is taken.
    assert client.post(CONSUMER, json=body).status_code == 201
    eventually(canary.exists)
    canary.rmdir()
    for what in ("replayed", "removed"):
        answer = client.post(CONSUMER, json=body)
        assert (403, True) == (answer.status_code, "has been posted or removed" in answer.text), what
        if what == "replayed":
            client.delete(CONSUMER, json={"name": "bird"})
    eventually(lambda: "bird" not in mlq.broker.functions)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"code": "%"}, "$.code"),
        ({"serial": 0}, "$.serial"),
        ({"serial": 2**60}, "$.serial"),
        ({"time": "now"}, "$.time"),
        ({"name": ""}, "$.name"),
        ({"signature": None}, "$.signature"),
        ({"more": 1}, "$.more"),
    ],
    ids=str,
)
def test_a_body_of_another_shape_is_refused_with_the_path(
    mlq: MLQ, client: FlaskClient, change: dict[str, Any], path: str
) -> None:
    answer = client.post(CONSUMER, json={**signed(mlq), **change}, headers=JSON)
    assert (422, path) == (answer.status_code, answer.json["errors"][0]["path"])


def test_jsonpickle_is_no_body_at_all(client: FlaskClient) -> None:
    answer = client.post(CONSUMER, json={"py/reduce": [{"py/function": "os.system"}, {"py/tuple": ["true"]}]})
    assert answer.status_code == 422


def test_it_needs_a_scope_of_its_own(mlq: MLQ, keys: ApiKeys) -> None:
    client = mounted(mlq, key_auth(mlq)).test_client()
    for scopes in ("submit", "read", "submit,read"):
        assert client.post(CONSUMER, json=signed(mlq), headers=bearer(keys, scopes)).status_code == 403
        assert client.delete(CONSUMER, json={"name": "doubled"}, headers=bearer(keys, scopes)).status_code == 403
    assert client.post(CONSUMER, json=signed(mlq)).status_code == 401
    assert client.post(CONSUMER, json=signed(mlq), headers=bearer(keys, "functions")).status_code == 201
    assert client.get(f"{PREFIX}/functions", headers=bearer(keys, "read")).status_code == 200
    assert client.delete(CONSUMER, json={"name": "doubled"}, headers=bearer(keys, "admin")).status_code == 200


def test_without_a_signing_key_it_is_off_for_everybody(server: Settings) -> None:
    with fresh_app(dataclasses.replace(server, signing_key=None)) as mlq:
        client = mounted(mlq, allow_anonymous=True).test_client()
        for answer in (client.post(CONSUMER, json=signed(mlq)), client.delete(CONSUMER, json={"name": "doubled"})):
            assert (403, True) == (answer.status_code, "MLQUEUE_SIGNING_KEY" in answer.text)


@pytest.fixture
def remote(mlq: MLQ) -> Iterator[Client]:
    server = make_server("127.0.0.1", 0, mounted(mlq, allow_anonymous=True), threaded=True)
    import threading

    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.port}{PREFIX}", patience=1) as client:
            yield client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_client_posts_lists_and_removes(mlq: MLQ, remote: Client, start_worker: StartWorker) -> None:
    start_worker()
    posted = remote.register_function(doubled, KEY, namespace=mlq.name)
    assert isinstance(posted, PostedFunction)
    assert remote.job(remote.post(4, functions=["doubled"])).result(15) == 8
    assert remote.functions() == mlq.functions()
    with pytest.raises(SignatureInvalid):
        remote.register_function(doubled, "another-key-than-the-right-one", namespace=mlq.name)
    with pytest.raises(SignatureInvalid):
        remote.register_function(doubled, KEY)
    assert [remote.remove_function("doubled"), remote.remove_function("doubled")] == [True, False]


# Webhooks


def test_a_webhook_is_asked_for_over_http_as_a_url_or_with_its_events(
    mlq: MLQ, client: FlaskClient, start_worker: StartWorker, hook: Receiver
) -> None:
    mlq.actor(lambda: 5, actor_name="work", http=True, webhook=Webhook(hook.url, ["started"]))
    start_worker()
    plain = client.post(f"{PREFIX}/actors/work", json={"webhook": hook.url}).json["id"]
    chosen = {"url": hook.url, "events": ["completed", "progress"], "progress_every": 1}
    record = client.post(f"{PREFIX}/actors/work", json={"webhook": chosen}, headers={"Prefer": "wait=10"}).json
    declared = client.post(f"{PREFIX}/actors/work").json["id"]
    eventually(lambda: len(hook.calls) == 3)
    kinds = {call.job_id: call.event["type"] for call in hook.calls}
    assert kinds == {plain: "job.completed", record["id"]: "job.completed", declared: "job.started"}
    assert record["webhook"] == {"url": hook.url, "events": ["progress", "completed"], "progress_every": 1.0}
    eventually(lambda: client.get(f"{PREFIX}/jobs/{plain}").json["webhook_state"] == "delivered")
    shown = client.get(f"{PREFIX}/jobs/{plain}").json
    assert [tried["event"] for tried in shown["callback_attempts"]] == ["completed"]
    again = client.post(f"{PREFIX}/jobs/{plain}/callbacks/redeliver", json={"webhook": hook.url})
    assert again.status_code == 202
    eventually(lambda: len(hook.of(plain)) == 2)


@pytest.mark.parametrize(
    "webhook",
    ["ftp://x", 5, {"events": ["started"]}, {"url": "http://x.example", "events": ["ended"]}, {"url": "http://u@x/"}],
    ids=str,
)
def test_what_cannot_be_a_webhook_is_422(client: FlaskClient, webhook: Any) -> None:
    answer = client.post(f"{PREFIX}/jobs", json={"msg": 1, "webhook": webhook}, headers=JSON)
    assert (422, True) == (answer.status_code, answer.json["errors"][0]["path"].startswith("$.webhook"))


def test_the_client_asks_for_webhooks(mlq: MLQ, remote: Client, start_worker: StartWorker, hook: Receiver) -> None:
    start_worker()
    mlq.register_function(doubled)
    asked = Webhook(hook.url, list(EVENTS), 2)
    job = remote.job(remote.post(1, functions=["doubled"], webhook=asked))
    assert job.result(15) == 2
    eventually(lambda: job.record.webhook_state is CallbackState.DELIVERED and len(hook.calls) == 2)
    assert job.record.webhook == asked
    job.redeliver(webhook=hook.url)
    eventually(lambda: len(hook.calls) == 3)


# The command


@pytest.fixture(scope="module")
def folder() -> Iterator[Folder]:
    with a_folder() as folder:
        yield folder


def test_the_command_lists_and_removes_functions_and_asks_for_webhooks(folder: Folder) -> None:
    mlq = MLQ("commands", settings=Settings.load({}, home=folder.home, signing_key=KEY))
    folder.environ["MLQUEUE_NAMESPACE"] = "commands"
    try:
        mlq.register_function(doubled)
        (line,) = folder("functions", "ls", "--json").lines
        assert (line["name"], line["error"]) == ("doubled", None)
        assert folder("functions", "ls").text.startswith("doubled\t")
        refused = folder("functions", "remove", "nobody", "doubled")
        assert (3, True, "doubled\tremoved\n") == (refused.code, "no function 'nobody'" in refused.err, refused.text)
        assert mlq.functions() == []
        assert folder("functions").code == 2
        posted = folder("post", "1", "--webhook", "http://127.0.0.1:9/hook", "--json").json["id"]
        submitted = folder("submit", "work", "--webhook", "http://127.0.0.1:9/hook", "--json").json["id"]
        for job_id in (posted, submitted):
            assert mlq.job(job_id).record.webhook == Webhook("http://127.0.0.1:9/hook")
        assert "webhook     http://127.0.0.1:9/hook  (completed, failed, cancelled;" in folder("show", posted).text
    finally:
        mlq.close()


def test_a_missing_key_is_told_to_who_posts(server: Settings) -> None:
    with fresh_app(dataclasses.replace(server, signing_key=None)) as mlq, pytest.raises(SigningKeyMissing):
        mlq.register_function(doubled)
