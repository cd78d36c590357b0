"""Who may do what: keys, the host's own login, scopes on every route, names apart, and pages of other sites."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Iterator
from typing import Any

import flask
import pytest
from command import a_folder
from flask.testing import FlaskClient
from hosting import PREFIX, bearer, mounted
from support import fresh_app

from mlqueue import MLQ, Settings, State, codec
from mlqueue.errors import InvalidJob, SettingsError
from mlqueue.keys import SCOPES, ApiKeys
from mlqueue.store import Connector
from mlqueue.web import Principal
from mlqueue.web import keys as key_auth
from mlqueue.web.operation import Operation
from mlqueue.web.table import OPERATIONS

#: Routes that anybody may use: health, and what everybody may read who has the package.
OPEN = {"answer_health", "answer_readiness", "show_document", "show_reference"}

VALUES = {"job_id": "nope", "actor": "nope", "extension": "png"}

EVERY = pytest.mark.parametrize("one", OPERATIONS, ids=lambda one: one.name)


@pytest.fixture
def guarded(mlq: MLQ) -> FlaskClient:
    return mounted(mlq, key_auth(mlq)).test_client()


@pytest.fixture(scope="module")
def shared(server: Settings) -> Iterator[tuple[ApiKeys, FlaskClient]]:
    """Keys and a client of one namespace for all that is asked of every route."""
    with fresh_app(server) as app:
        app.store.connector.execute("PING")  # its connection is none that a test leaves behind
        yield ApiKeys(app.store), mounted(app, key_auth(app)).test_client()


def call(client: FlaskClient, one: Operation, headers: dict[str, str] | None = None) -> Any:
    path = one.rule
    for name, value in VALUES.items():
        path = path.replace(f"<{name}>", value)
    return client.open(f"{PREFIX}{path}", method=one.method, headers=headers)


# Every route


def test_the_table_is_the_url_map(app: flask.Flask) -> None:
    """So that no route can be forgotten in it, and by the tests over it."""
    told = {(one.method, PREFIX + one.rule, f"mlqueue.{one.name}") for one in OPERATIONS}
    found = {
        (method, rule.rule, rule.endpoint)
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.endpoint != "static"
    }
    assert told == found


def test_every_route_but_those_for_everybody_asks_for_a_scope() -> None:
    assert OPEN == {one.name for one in OPERATIONS if one.scope is None}
    assert {one.scope for one in OPERATIONS} - {None} == set(SCOPES)


@EVERY
def test_without_a_valid_key_every_route_is_401(shared: tuple[ApiKeys, FlaskClient], one: Operation) -> None:
    """F34."""
    keys, guarded = shared
    token, key = keys.new("admin")
    keys.revoke(key.id)
    other = keys.new("admin")[0]
    wrong = {
        "none": None,
        "revoked": f"Bearer {token}",
        "another secret": f"Bearer {other[:-1]}{'A' if other[-1] != 'A' else 'B'}",
        "another id": f"Bearer mlq_{key.id}_{other.rpartition('_')[2]}",
        "empty": "Bearer ",
        "no text of a key": "Bearer x",
        "basic": "Basic YTpi",
        "long": "Bearer " + "x" * 5000,
        "with a newline": "Bearer \x00\x01",
    }
    for name, value in wrong.items():
        answer = call(guarded, one, None if value is None else {"Authorization": value})
        if one.name in OPEN:
            assert answer.status_code < 400
            continue
        assert 401 == answer.status_code, name
        assert 'Bearer realm="mlqueue"' == answer.headers["WWW-Authenticate"]
        assert answer.content_type in ("application/problem+json", "text/plain; charset=utf-8")


@EVERY
def test_a_key_that_was_just_right_and_is_revoked_is_401_on_every_route(
    shared: tuple[ApiKeys, FlaskClient], one: Operation
) -> None:
    """F34: also where the process remembers the key."""
    keys, guarded = shared
    if one.name in OPEN:
        return
    token, key = keys.new("admin")
    headers = {"Authorization": f"Bearer {token}"}
    for _ in range(2):
        assert 401 != call(guarded, one, headers).status_code
    keys.revoke(key.id)
    for _ in range(2):
        assert 401 == call(guarded, one, headers).status_code


@EVERY
def test_with_too_small_a_scope_every_route_is_403(shared: tuple[ApiKeys, FlaskClient], one: Operation) -> None:
    """F34."""
    keys, guarded = shared
    if one.scope is None:
        return
    others = [scope for scope in ("submit", "read") if scope != one.scope]
    for count in range(1, len(others) + 1):
        for scopes in itertools.combinations(others, count):
            answer = call(guarded, one, bearer(keys, ",".join(scopes)))
            assert f"`mlqueue key new --scope {one.scope}`" in answer.text
            assert (403, True) == (answer.status_code, one.scope in answer.headers["WWW-Authenticate"]), scopes


@EVERY
def test_with_its_scope_and_with_admin_every_route_is_answered(
    shared: tuple[ApiKeys, FlaskClient], one: Operation
) -> None:
    keys, guarded = shared
    for scope in {one.scope or "read", "admin"}:
        answer = call(guarded, one, bearer(keys, scope))
        refused = one.name in ("add_consumer", "remove_consumer")
        assert (403 if refused else answer.status_code) == answer.status_code
        assert answer.status_code not in (401, 405, 500), scope
        assert "WWW-Authenticate" not in answer.headers


@EVERY
def test_options_needs_no_key_and_tells_nothing_but_methods(
    shared: tuple[ApiKeys, FlaskClient], one: Operation
) -> None:
    _, guarded = shared
    path = one.rule.replace("<job_id>", "nope").replace("<actor>", "nope").replace("<extension>", "png")
    answer = guarded.open(PREFIX + path, method="OPTIONS")
    assert (200, b"") == (answer.status_code, answer.data)
    assert one.method in answer.headers["Allow"]


# Keys


def test_a_key_is_kept_as_its_hash(mlq: MLQ, keys: ApiKeys) -> None:
    token, key = keys.new("read", label="the page")
    secret = token.rpartition("_")[2]
    stored = b"".join(mlq.client.hgetall(f"{mlq.store.root}:keys").values())
    assert (True, False) == (token.startswith(f"mlq_{key.id}_"), secret.encode() in stored)
    assert [("the page", ("read",))] == [(item.label, item.scopes) for item in keys.list()]
    assert secret not in repr(keys.list())


def test_a_revoked_key_is_refused_at_once(keys: ApiKeys, guarded: FlaskClient) -> None:
    token, key = keys.new("read")
    headers = {"Authorization": f"Bearer {token}"}
    assert 200 == guarded.get(f"{PREFIX}/jobs", headers=headers).status_code
    assert (True, False) == (keys.revoke(key.id), keys.revoke(key.id))
    assert 401 == guarded.get(f"{PREFIX}/jobs", headers=headers).status_code


def test_with_a_key_that_is_remembered_and_revoked_nothing_is_told_or_done(
    mlq: MLQ, keys: ApiKeys, guarded: FlaskClient
) -> None:
    token, key = keys.new("read,submit")
    headers = {"Authorization": f"Bearer {token}"}
    path = guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers).location
    etag = guarded.get(path, headers=headers).headers["ETag"]
    once = {**headers, "Idempotency-Key": "one"}
    assert 202 == guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=once).status_code
    keys.revoke(key.id)
    asked = [
        lambda more: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers | more),
        lambda more: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=once | more),
        lambda more: guarded.post(f"{PREFIX}/jobs", json={"mgs": 1}, headers=headers | more),
        lambda more: guarded.post(f"{PREFIX}/jobs", data=b"[", content_type="application/json", headers=headers | more),
        lambda more: guarded.post(f"{PREFIX}/jobs/bulk", json={"jobs": [{"msg": 1}]}, headers=headers | more),
        lambda more: guarded.post(f"{PREFIX}/actors/nope", json={}, headers=headers | more),
        lambda more: guarded.get(path, headers=headers | more),
        lambda more: guarded.get(f"{path}x", headers=headers | more),
    ]
    with in_memory(guarded, token, key.id, "read"):
        assert 401 == guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers).status_code
    for number, ask in enumerate(asked):
        for more in ({}, {"Accept": "application/json"}, {"Prefer": "wait=60"}, {"If-None-Match": etag}):
            with in_memory(guarded, token, key.id):
                assert 401 == ask(more).status_code, (number, more)
    assert 2 == mlq.job_count()


@contextlib.contextmanager
def in_memory(client: FlaskClient, token: str, key_id: str, *scopes: str) -> Iterator[None]:
    """Has the process remember a key that is not, or no longer, there."""
    [mount] = client.application.extensions["mlqueue"].values()
    remembered = mount.hooks[0]._keys._remembered
    digest = hashlib.sha256(token.rpartition("_")[2].encode()).digest()
    remembered[key_id] = codec.encode([digest, list(scopes or ("read", "submit")), "", 0.0])
    yield
    remembered.clear()


def test_a_request_costs_one_call_of_the_store_with_a_key_too(
    mlq: MLQ, keys: ApiKeys, guarded: FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = bearer(keys, "read,submit")
    path = guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers).location
    mlq.job(path.rpartition("/")[2]).cancel()  # of one that waits the start is estimated, which is a call more
    calls = []
    execute = Connector.execute
    monkeypatch.setattr(
        Connector, "execute", lambda self, *args, **more: calls.append(1) or execute(self, *args, **more)
    )
    record = {**headers, "Accept": "application/json"}
    for status, ask in (
        (202, lambda: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers)),
        (202, lambda: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=record)),
        (202, lambda: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=record | {"Idempotency-Key": "k"})),
        (202, lambda: guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=record | {"Idempotency-Key": "k"})),
        (200, lambda: guarded.get(path, headers=headers)),
    ):
        calls.clear()
        assert (status, 1) == (ask().status_code, len(calls))


def test_a_key_is_for_one_namespace(mlq: MLQ, server: Settings, guarded: FlaskClient) -> None:
    with fresh_app(server) as other:
        headers = bearer(ApiKeys(other.store), "admin")
        assert 401 == guarded.get(f"{PREFIX}/jobs", headers=headers).status_code
        client = mounted(other, key_auth(other)).test_client()
        assert 200 == client.get(f"{PREFIX}/jobs", headers=headers).status_code


@pytest.mark.parametrize("scopes", ["", "write", "read write", [], ["read", "x"]])
def test_a_scope_that_is_none_is_refused(keys: ApiKeys, scopes: Any) -> None:
    with pytest.raises(InvalidJob, match="submit, read, functions, admin"):
        keys.new(scopes)


# The host's own login


def test_the_hosts_login_says_who_may_what(mlq: MLQ) -> None:
    users = {"ann": ["read", "submit"], "bob": {"read"}, "eve": None, "root": "admin", "new": (), "no": False}

    def login(request: flask.Request) -> Any:
        return users.get(request.headers.get("X-User", ""))

    client = mounted(mlq, login).test_client()

    def statuses(user: str) -> list[int]:
        headers = {"X-User": user}
        return [
            client.get(f"{PREFIX}/jobs", headers=headers).status_code,
            client.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers).status_code,
            client.post(f"{PREFIX}/dead/purge", json={"all": True}, headers=headers).status_code,
        ]

    assert {
        "ann": [200, 202, 403],
        "bob": [200, 403, 403],
        "root": [200, 202, 200],
        "eve": [401, 401, 401],
        "new": [403, 403, 403],
        "no": [401, 401, 401],
        "nobody": [401, 401, 401],
    } == {user: statuses(user) for user in [*users, "nobody"]}
    refused = client.get(f"{PREFIX}/jobs")
    assert ('Session realm="mlqueue"', True) == (
        refused.headers["WWW-Authenticate"],
        "log in" in refused.json["detail"],
    )


def test_keys_and_the_hosts_login_stand_beside_each_other(mlq: MLQ, keys: ApiKeys) -> None:
    client = mounted(
        mlq, [key_auth(mlq), lambda request: ["read"] if "X-User" in request.headers else None]
    ).test_client()
    headers: list[dict[str, str]] = [{}, {"X-User": "ann"}, bearer(keys, "read"), {"Authorization": "Bearer x"}]
    assert [401, 200, 200, 401] == [client.get(f"{PREFIX}/jobs", headers=one).status_code for one in headers]


def test_a_hook_may_name_who_asks(mlq: MLQ) -> None:
    def login(request: flask.Request) -> Principal:
        return Principal(request.headers["X-User"], frozenset({"submit"}))

    client = mounted(mlq, login).test_client()
    ids = [
        client.post(f"{PREFIX}/jobs", json={"msg": 1}, headers={"Idempotency-Key": "k", "X-User": user}).text
        for user in ("ann", "bob", "ann")
    ]
    assert (ids[0], True) == (ids[2], ids[0] != ids[1])


@pytest.mark.parametrize("found", ["everything", ["read", "x"], 5, True])
def test_a_hook_that_returns_something_else_is_an_error_not_a_yes(
    mlq: MLQ, found: Any, caplog: pytest.LogCaptureFixture
) -> None:
    answer = mounted(mlq, lambda request: found).test_client().get(f"{PREFIX}/jobs")
    assert ["GET /q/jobs: SettingsError"] == [": ".join(text.split(": ")[:2]) for text in caplog.messages]
    assert (500, "SettingsError") == (answer.status_code, answer.json["code"])
    assert "submit, read, functions, admin" in answer.json["detail"]


def test_a_hook_may_redirect_to_the_hosts_login(mlq: MLQ) -> None:
    def login(request: flask.Request) -> None:
        flask.abort(flask.redirect("/login"))

    answer = mounted(mlq, login).test_client().get(f"{PREFIX}/jobs")
    assert (302, "/login") == (answer.status_code, answer.location)


@pytest.mark.parametrize("auth", [5, "keys", ["read"]])
def test_what_is_no_hook_is_refused(mlq: MLQ, auth: Any) -> None:
    with pytest.raises(SettingsError, match="auth="):
        mounted(mlq, auth)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"max_body": -1}, "max_body=-1: give an int, 1 or more"),
        ({"max_body": "1M"}, "max_body='1M': give an int"),
        ({"max_waits": 1.5}, "max_waits=1.5: give an int, 0 or more"),
        ({"max_streams": True}, "max_streams=True: give an int"),
        ({"max_wait": -1}, "max_wait=-1: give seconds, 0 or more"),
        ({"max_wait": float("nan")}, "max_wait=nan: give seconds"),
        ({"heartbeat": 0}, "heartbeat=0: give seconds, 0.001 or more"),
    ],
    ids=str,
)
def test_what_is_no_bound_is_refused(mlq: MLQ, given: dict[str, Any], told: str) -> None:
    with pytest.raises(SettingsError, match=re.escape(told)):
        mounted(mlq, allow_anonymous=True, **given)


# Names apart


def test_jobs_of_another_name_are_404_whatever_the_names(server: Settings) -> None:
    """F35."""
    with fresh_app(server) as first:
        names = [f"{first.name}{end}" for end in ("", "b", "*", ":b", "}x", "\u00fc", "%3A", "/../b", ".s", "{a}")]
        apps = [first, *(MLQ(name, settings=server) for name in names[1:])]
        try:
            ids = [app.post(app.name) for app in apps]
            for own, app in enumerate(apps):
                client = mounted(app, allow_anonymous=True).test_client()
                for number, job_id in enumerate(ids):
                    statuses = {
                        client.get(f"{PREFIX}/jobs/{job_id}{end}").status_code
                        for end in ("", "/progress", "/short_result", "/result", "/result.png", "/attempts")
                    }
                    assert {200 if number == own else 404} == statuses
                assert [ids[own]] == [job["id"] for job in client.get(f"{PREFIX}/jobs").json["jobs"]]
            # What changes something, last.
            client = mounted(apps[0], allow_anonymous=True).test_client()
            for job_id in ids[1:]:
                asked = [client.delete(f"{PREFIX}/jobs/{job_id}"), client.delete(f"{PREFIX}/dead/{job_id}")]
                for end in ("cancel", "extend", "retry", "callbacks/redeliver"):
                    body = {"seconds": 1} if end == "extend" else None
                    asked.append(client.post(f"{PREFIX}/jobs/{job_id}/{end}", json=body))
                asked.append(client.post(f"{PREFIX}/dead/{job_id}/requeue"))
                assert {404} == {answer.status_code for answer in asked}
            assert [1] * len(apps) == [app.job_count() for app in apps]
            assert {State.QUEUED} == {app.job(job_id).state for app, job_id in zip(apps, ids, strict=True)}
        finally:
            for app in apps[1:]:
                for key in app.client.scan_iter(f"{app.store.root.replace('*', '[*]')}:*", count=1000):
                    app.client.unlink(key)
                app.close()


@pytest.mark.parametrize(
    "job_id", ["..", "%2e%2e%2fx", "a b", "x" * 129, "x" * 3000, "%00", "a;b", "\u00fc", "{a}", "*"]
)
def test_what_is_no_id_is_404(client: FlaskClient, job_id: str) -> None:
    for end in ("", "/result", "/progress", "/attempts"):
        assert 404 == client.get(f"{PREFIX}/jobs/{job_id}{end}").status_code


# Pages of other sites


FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "null"},
    {"Origin": "http://localhost:81"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site", "Origin": "http://other.localhost"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "http://localhost"},
]


@pytest.mark.parametrize("headers", FOREIGN)
def test_a_page_of_another_site_can_change_nothing(mlq: MLQ, client: FlaskClient, headers: dict[str, str]) -> None:
    job_id = mlq.post(1)
    for one in OPERATIONS:
        if one.method != "GET":
            path = one.rule.replace("<job_id>", job_id).replace("<actor>", "nope")
            assert 403 == client.open(PREFIX + path, method=one.method, headers=headers).status_code, one.name
    form = {"msg": "1"}
    kind = "multipart/form-data"
    assert 403 == client.post(f"{PREFIX}/jobs", data=form, headers=headers, content_type=kind).status_code
    assert (1, State.QUEUED) == (mlq.job_count(), mlq.job(job_id).state)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Origin": "http://localhost"},
        {"Sec-Fetch-Site": "same-origin", "Origin": "https://proxied"},
        {"Sec-Fetch-Site": "none"},
    ],
)
def test_the_hosts_own_pages_and_programs_can(client: FlaskClient, headers: dict[str, str]) -> None:
    assert 202 == client.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers).status_code


def test_a_page_that_sends_a_key_can(keys: ApiKeys, guarded: FlaskClient) -> None:
    headers = {**bearer(keys, "submit"), "Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
    answer = guarded.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=headers)
    # The browser does not let that page read the answer, unless its origin is listed.
    assert (202, None) == (answer.status_code, answer.headers.get("Access-Control-Allow-Origin"))


def test_listed_origins_may_read_answers_and_others_may_not(mlq: MLQ, keys: ApiKeys) -> None:
    client = mounted(mlq, key_auth(mlq), cors_origins=["https://app.example"]).test_client()
    asked = {**bearer(keys, "read"), "Origin": "https://app.example"}
    answer = client.get(f"{PREFIX}/jobs", headers=asked)
    assert ("https://app.example", "Origin") == (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"])
    assert "Access-Control-Allow-Credentials" not in answer.headers
    preflight = client.options(f"{PREFIX}/jobs", headers={"Origin": "https://app.example"})
    assert ("https://app.example", True, True) == (
        preflight.headers["Access-Control-Allow-Origin"],
        "Idempotency-Key" in preflight.headers["Access-Control-Allow-Headers"],
        "POST" in preflight.headers["Access-Control-Allow-Methods"],
    )
    for origin in ("https://evil.example", "https://app.example.evil", "null"):
        answer = client.get(f"{PREFIX}/jobs", headers={**asked, "Origin": origin})
        assert (200, "Origin") == (answer.status_code, answer.headers["Vary"])
        assert "Access-Control-Allow-Origin" not in answer.headers
    # What is refused can be read as well: a page must be able to tell a wrong key from a wrong URL.
    refused = client.get(f"{PREFIX}/jobs", headers={"Origin": "https://app.example"})
    assert (401, "https://app.example") == (refused.status_code, refused.headers["Access-Control-Allow-Origin"])


def test_a_listed_origin_does_not_profit_from_a_cookie(mlq: MLQ) -> None:
    asked = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
    login = mounted(mlq, lambda request: ["submit"], cors_origins=["https://app.example"]).test_client()
    assert 403 == login.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=asked).status_code
    everybody = mounted(mlq, allow_anonymous=True, cors_origins=["https://app.example"]).test_client()
    assert 202 == everybody.post(f"{PREFIX}/jobs", json={"msg": 1}, headers=asked).status_code
    assert 1 == mlq.job_count()


@pytest.mark.parametrize("origin", ["*", "app.example", "https://app.example/", "null", 5])
def test_an_origin_that_is_none_is_refused(mlq: MLQ, origin: Any) -> None:
    with pytest.raises(SettingsError, match="cors_origins"):
        mounted(mlq, allow_anonymous=True, cors_origins=[origin])


# The command


def test_keys_are_made_listed_and_revoked_by_the_command(server: Settings) -> None:
    with a_folder() as folder, fresh_app(server) as app:
        folder.environ |= {"MLQUEUE_URL": str(server.url), "MLQUEUE_NAMESPACE": app.name}
        client = mounted(app, key_auth(app)).test_client()
        made = folder("key", "new", "--scope", "submit,read", "--label", "the shop")
        token = made.text.strip()
        assert (0, True) == (made.code, re.fullmatch(r"mlq_[0-9a-f]{12}_[\w-]{43}", token) is not None)
        headers = {"Authorization": f"Bearer {token}"}
        assert 200 == client.get(f"{PREFIX}/jobs", headers=headers).status_code
        [listed] = folder("key", "ls", "--json").lines
        assert ("the shop", ["submit", "read"]) == (listed["label"], listed["scopes"])
        assert (token.split("_")[1], False) == (listed["id"], token.rpartition("_")[2] in str(listed))
        assert listed["id"] in folder("key", "ls").text
        assert "revoked" in folder("key", "revoke", listed["id"]).text
        assert 401 == client.get(f"{PREFIX}/jobs", headers=headers).status_code
        assert 3 == folder("key", "revoke", listed["id"]).code
        assert [2, 2, 2] == [
            folder("key", "new", "--scope", "write").code,
            folder("key", "revoke", token).code,
            folder("key").code,
        ]
        assert {"key", "id", "scopes"} <= set(folder("key", "new", "--scope", "admin", "--json").json)
