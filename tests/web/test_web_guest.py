"""The blueprint is a guest: an app with its own login, error pages, hooks and JSON mounts it twice and stays itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from typing import Any

import flask
import pytest
from flask.json.provider import DefaultJSONProvider
from flask.testing import FlaskClient
from hosting import PREFIX, ROOT, bearer, mounted
from support import fresh_app

from mlqueue import MLQ, Settings
from mlqueue.errors import SettingsError
from mlqueue.keys import ApiKeys
from mlqueue.testing import temporary_server
from mlqueue.web import create_blueprint
from mlqueue.web import keys as key_auth


class ShoutingJSON(DefaultJSONProvider):
    """A host's own JSON: all that it answers is in capitals."""

    def response(self, *args: Any, **kwargs: Any) -> flask.Response:
        return flask.Response(super().response(*args, **kwargs).get_data(as_text=True).upper())


def host() -> flask.Flask:
    """An old app with habits of its own."""
    app = flask.Flask("host")
    app.config.update(SECRET_KEY="x", MAX_CONTENT_LENGTH=100, MAX_FORM_MEMORY_SIZE=50)
    app.json = ShoutingJSON(app)
    app.extensions["other"] = "kept"

    @app.before_request
    def count() -> None:
        app.extensions["seen"] = app.extensions.get("seen", 0) + 1

    @app.after_request
    def sign(response: flask.Response) -> flask.Response:
        response.headers["X-Host"] = "yes"
        return response

    @app.errorhandler(404)
    def lost(error: Exception) -> Any:
        return "the host's 404", 404

    @app.errorhandler(422)
    def unprocessable(error: Exception) -> Any:
        return "the host's 422", 422

    @app.errorhandler(Exception)
    def broken(error: Exception) -> Any:
        return "the host's page for anything", 500

    @app.get("/")
    def home() -> Any:
        return {"user": flask.session.get("user")}

    @app.post("/login")
    def login() -> Any:
        flask.session["user"] = flask.request.form["user"]
        return "", 204

    @app.get("/broken")
    def raises() -> Any:
        raise RuntimeError("oh")

    @app.post("/upload")
    def upload() -> Any:
        return str(len(flask.request.get_data()))

    return app


def check_host(client: FlaskClient) -> None:
    """The host's own tests."""
    assert b'{"USER":NULL}' == client.get("/").data.strip()
    assert 204 == client.post("/login", data={"user": "ann"}).status_code
    assert b'{"USER":"ANN"}' == client.get("/").data.strip()
    for path in ("/nowhere", "/jobs", "/healthz"):
        assert (404, "the host's 404") == (client.get(path).status_code, client.get(path).text)
    assert (500, "the host's page for anything") == (client.get("/broken").status_code, client.get("/broken").text)
    assert "50" == client.post("/upload", data=b"x" * 50).text
    assert 500 == client.post("/upload", data=b"x" * 101).status_code  # its own handler has the 413
    assert "yes" == client.get("/").headers["X-Host"]
    assert "yes" == client.get("/nowhere").headers["X-Host"]


def test_the_hosts_own_tests_pass_without_and_with_two_blueprints(mlq: MLQ, server: Settings) -> None:
    check_host(host().test_client())
    app = host()
    with fresh_app(server) as other:
        session = create_blueprint(mlq, lambda request: ["read", "submit"] if flask.session.get("user") else None)
        app.register_blueprint(session, url_prefix="/one")
        app.register_blueprint(create_blueprint(other, key_auth(other), name="second"), url_prefix="/deep/two")
        check_host(app.test_client())
        client = app.test_client()
        assert 401 == client.get("/one/jobs").status_code
        client.post("/login", data={"user": "ann"})
        # Its JSON is ours, the bounds of a body too; the host's hooks see the request as any other.
        before = app.extensions["seen"]
        answer = client.post("/one/jobs", json={"msg": "x" * 200}, headers={"Accept": "application/json"})
        assert (202, "queued", before + 1) == (answer.status_code, answer.json["state"], app.extensions["seen"])
        assert ("yes", True) == (answer.headers["X-Host"], answer.data.startswith(b'{"id":"'))
        assert (1, 0) == (mlq.job_count(), other.job_count())
        headers = bearer(ApiKeys(other.store), "submit,read")
        second = client.post("/deep/two/jobs", json={"msg": 2}, headers=headers)
        assert f"/deep/two/jobs/{second.text}" == second.location
        assert (1, 1) == (mlq.job_count(), other.job_count())
        # The session of the one is nothing to the other.
        assert 401 == client.get("/deep/two/jobs").status_code


def test_errors_are_the_blueprints_own_and_unknown_urls_the_hosts(mlq: MLQ) -> None:
    app = host()
    app.register_blueprint(create_blueprint(mlq, allow_anonymous=True), url_prefix=PREFIX)
    client = app.test_client()
    for answer in (client.get(f"{PREFIX}/jobs/nope"), client.get(f"{PREFIX}/jobs?limit=x")):
        assert ("application/problem+json", "yes") == (answer.content_type, answer.headers["X-Host"])
    for path in (f"{PREFIX}/nowhere", f"{PREFIX}/jobs/a/b/c", PREFIX):
        assert "the host's 404" == client.get(path).text


def test_state_is_in_extensions_alone(mlq: MLQ) -> None:
    app = host()
    before = dict(app.config), set(app.extensions), dict(app.jinja_env.globals), list(app.before_request_funcs)
    app.register_blueprint(create_blueprint(mlq, allow_anonymous=True), url_prefix=PREFIX)
    assert {"mlqueue"} == set(app.extensions["mlqueue"])
    assert (before[0], before[1] | {"mlqueue"}, before[2]) == (
        dict(app.config),
        set(app.extensions),
        dict(app.jinja_env.globals),
    )
    assert before[3] == list(app.before_request_funcs)
    assert {None} == set(app.error_handler_spec)
    assert isinstance(app.json, ShoutingJSON)


def test_one_blueprint_is_registered_in_several_apps_and_under_several_names(mlq: MLQ) -> None:
    blueprint = create_blueprint(mlq, allow_anonymous=True)
    apps = [flask.Flask("one"), flask.Flask("two")]
    for app in apps:
        app.register_blueprint(blueprint, url_prefix="/a")
        app.register_blueprint(blueprint, url_prefix="/b", name="again")
        client = app.test_client()
        for prefix in ("/a", "/b"):
            location = client.post(f"{prefix}/jobs", json={"msg": 1}).location
            assert location.startswith(f"{prefix}/jobs/")
            assert location == client.get(location).json["links"]["self"]
    assert 4 == mlq.job_count()


def test_links_hold_below_a_parent_blueprint_a_variable_prefix_and_a_proxys_path(mlq: MLQ) -> None:
    app = flask.Flask("host")
    parent = flask.Blueprint("parent", __name__, url_prefix="/p/<tenant>")
    parent.register_blueprint(create_blueprint(mlq, allow_anonymous=True), url_prefix=PREFIX)
    app.register_blueprint(parent)
    client = app.test_client()
    proxied: Any = {"SCRIPT_NAME": "/outer"}
    answer = client.post(f"/p/ann{PREFIX}/jobs", json={"msg": 1}, environ_overrides=proxied)
    assert answer.location.startswith(f"/outer/p/ann{PREFIX}/jobs/")
    assert {"parent.mlqueue"} == set(app.extensions["mlqueue"])
    assert [{"url": f"/p/bob{PREFIX}"}] == client.get(f"/p/bob{PREFIX}/openapi.json").json["servers"]


def test_it_refuses_to_be_registered_unless_it_is_known_who_may_use_it(mlq: MLQ) -> None:
    app = flask.Flask("host")
    blueprint = create_blueprint(mlq)
    with pytest.raises(SettingsError) as raised:
        app.register_blueprint(blueprint, url_prefix=PREFIX)
    for way in ("mlqueue.web.keys(mlq)", "auth=lambda request", "allow_anonymous=True"):
        assert way in str(raised.value)
    assert ({}, {"static"}) == (dict(app.blueprints), set(app.view_functions))
    with pytest.raises(SettingsError, match="either everybody may do everything, or not"):
        create_blueprint(mlq, key_auth(mlq), allow_anonymous=True)
    with pytest.raises(SettingsError, match="give an MLQ"):
        create_blueprint("vision", allow_anonymous=True)  # type: ignore[arg-type]


def test_nothing_is_connected_before_the_first_request(server: Settings) -> None:
    nowhere = Settings.load({}, url="redis://127.0.0.1:1/0", command_timeout=0.1)
    mlq = MLQ("nowhere", settings=nowhere)
    client = mounted(mlq, key_auth(mlq)).test_client()
    assert "ok" == client.get(f"{PREFIX}/healthz").text
    assert 200 == client.get(f"{PREFIX}/openapi.json").status_code


def test_a_store_that_cannot_be_reached_is_503_with_retry_after() -> None:
    mlq = MLQ("nowhere", settings=Settings.load({}, url="redis://user:hunter2@127.0.0.1:1/0", command_timeout=0.1))
    client = mounted(mlq, allow_anonymous=True).test_client()
    asked = [
        client.get(f"{PREFIX}/jobs"),
        client.get(f"{PREFIX}/jobs/x"),
        client.get(f"{PREFIX}/jobs/x/result"),
        client.post(f"{PREFIX}/jobs", json={"msg": 1}),
        client.get(f"{PREFIX}/readyz"),
        mounted(mlq, key_auth(mlq))
        .test_client()
        .get(f"{PREFIX}/jobs", headers={"Authorization": f"Bearer mlq_{'a' * 12}_{'b' * 43}"}),
    ]
    for answer in asked:
        assert (503, "2") == (answer.status_code, answer.headers["Retry-After"]), answer.text
        assert "hunter2" not in answer.text


def test_a_store_that_is_full_is_507_and_what_needs_no_room_goes_on() -> None:
    with temporary_server() as settings, fresh_app(settings) as mlq:
        client = mounted(mlq, allow_anonymous=True).test_client()
        path = client.post(f"{PREFIX}/jobs", json={"msg": 1}).location
        mlq.client.config_set("maxmemory", "1mb")
        for way, body in (("jobs", {"msg": 2}), ("jobs/bulk", {"jobs": [{"msg": 2}]})):
            for headers in ({}, {"Idempotency-Key": "k"}, {"Accept": "application/json"}):
                answer = client.post(f"{PREFIX}/{way}", json=body, headers=headers)
                assert (507, "2") == (answer.status_code, answer.headers["Retry-After"]), answer.text
        assert [200, 200] == [client.get(path).status_code, client.delete(path).status_code]
        # With room again the same request is a new one: nothing was kept of it.
        mlq.client.config_set("maxmemory", "0")
        answer = client.post(f"{PREFIX}/jobs", json={"msg": 2}, headers={"Idempotency-Key": "k"})
        assert (202, None) == (answer.status_code, answer.headers.get("Idempotent-Replayed"))


def test_requests_are_served_by_many_threads_at_once(mlq: MLQ, app: flask.Flask) -> None:
    found: list[int] = []

    def post() -> None:
        with app.test_client() as client:
            found.extend(client.post(f"{PREFIX}/jobs", json={"msg": n}).status_code for n in range(20))

    threads = [threading.Thread(target=post) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ([202] * 160, 160) == (found, mlq.job_count())


def test_flask_is_needed_by_the_web_part_alone_which_says_how_to_get_it() -> None:
    program = (
        "import sys; sys.modules['flask'] = None\n"
        "import mlqueue; mlqueue.MLQ\n"
        "try:\n    import mlqueue.web\nexcept mlqueue.MissingDependency as error:\n    print(error)"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (0, True) == (run.returncode, "pip install 'mlqueue[web]'" in run.stdout), run.stderr
