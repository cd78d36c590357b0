"""MLQ's endpoints and programs, as they are written in its documentation."""

from __future__ import annotations

import dataclasses
import shlex
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import httpx
import pytest
from flask.testing import FlaskClient
from hosting import PREFIX, free_port, gunicorn
from support import eventually, fresh_app
from werkzeug.serving import make_server

from mlqueue import MLQ, Settings
from mlqueue.web import create_blueprint

JSON = {"Accept": "application/json"}


def multiply(msg: dict[str, int], utils: Any) -> int:
    return msg["arg1"] * msg["arg2"]


def test_counts_and_progress_are_text(mlq: MLQ, client: FlaskClient) -> None:
    assert "0" == client.get(f"{PREFIX}/jobs/count").text
    job_id = client.post(f"{PREFIX}/jobs", json={"msg": 1}).text
    mlq.post(2, delay=60)
    assert ("2", 2) == (client.get(f"{PREFIX}/jobs/count").text, client.get(f"{PREFIX}/jobs/count", headers=JSON).json)
    assert "[queued; not started]" == client.get(f"{PREFIX}/jobs/{job_id}/progress").text
    assert client.get(f"{PREFIX}/jobs/{job_id}/progress", headers=JSON).json is None
    mlq.job(job_id).cancel()
    assert "[cancelled]" == client.get(f"{PREFIX}/jobs/{job_id}/progress").text


def test_progress_follows_the_job(mlq: MLQ, client: FlaskClient) -> None:
    steps: list[str] = []

    def step(msg: object, utils: Any) -> tuple[str, bytes]:
        job_id = utils["full_message"]["id"]
        where = f"{PREFIX}/jobs/{job_id}/progress"
        page = client.application.test_client()
        steps.append(page.get(where).text)
        for value in (50, 100, "nearly"):
            utils["update_progress"](value)
            steps.append(eventually(lambda value=value: (t := page.get(where).text) == str(value) and t))
        return "short", b"full"

    mlq.create_listener(step)
    job_id = client.post(f"{PREFIX}/jobs", json={"msg": 1}).text
    eventually(lambda: client.get(f"{PREFIX}/jobs/{job_id}/progress").text == "[completed]")
    assert ["[started]", "50", "100", "nearly"] == steps
    assert ("short", b"full") == (
        client.get(f"{PREFIX}/jobs/{job_id}/short_result").text,
        client.get(f"{PREFIX}/jobs/{job_id}/result").data,
    )


#: What a listener returns, and its short and its full result.
RESULTS: list[tuple[object, str, bytes]] = [
    (0, "0", b"0"),
    ("", "", b""),
    (False, "False", b"false"),
    (None, "", b"null"),
    ("text", "text", b"text"),
    ([1, 2], "", b"[1,2]"),
    (("s", b"\x00"), "s", b"\x00"),
    ((7, {"a": 1}), "7", b'{"a":1}'),
]


def test_results_are_as_mlq_promised_them(mlq: MLQ, client: FlaskClient) -> None:
    mlq.create_listener(lambda number, utils: RESULTS[number][0])
    ids = [client.post(f"{PREFIX}/jobs", json={"msg": number}).text for number in range(len(RESULTS))]
    for job_id, (value, short, full) in zip(ids, RESULTS, strict=True):
        assert mlq.job(job_id).wait(10)
        found = (
            client.get(f"{PREFIX}/jobs/{job_id}/short_result").text,
            client.get(f"{PREFIX}/jobs/{job_id}/result").data,
        )
        assert (short, full) == found, value


def test_the_short_result_of_a_failure_is_that_of_get_job(mlq: MLQ, client: FlaskClient) -> None:
    def fail(msg: object, utils: Any) -> None:
        raise ValueError(msg) if msg else ValueError

    mlq.create_listener(fail)
    for msg, short in (("one\ntwo", "ValueError: one"), (None, "ValueError")):
        job_id = mlq.post(msg)
        assert mlq.job(job_id).wait(10)
        assert short == mlq.get_job(job_id)["short_result"]
        assert short == client.get(f"{PREFIX}/jobs/{job_id}/short_result").text


def test_unknown_ids_are_404_in_text(client: FlaskClient) -> None:
    for end in ("progress", "short_result", "result", "result.mp3"):
        answer = client.get(f"{PREFIX}/jobs/17/{end}")
        assert (404, "text/plain; charset=utf-8") == (answer.status_code, answer.content_type)
        assert "no job '17'" in answer.text


# With a real server


@pytest.fixture
def served(mlq: MLQ, tmp_path: Path) -> Iterator[Any]:
    with gunicorn(mlq, tmp_path, "--threads", "4") as client:
        yield client


def test_mlqs_curl_lines_run_as_they_are_written(mlq: MLQ, served: Any) -> None:
    mlq.create_listener(lambda msg, utils: multiply(msg, utils) if isinstance(msg, dict) else f"heard {msg}")

    def curl(line: str, **values: str) -> str:
        base = str(served.base_url).rstrip("/").removeprefix("http://")
        words = [word.replace("localhost:5001", base) for word in shlex.split(line)]
        words = [word.replace("ID", values.get("ID", "ID")) if "/jobs/ID" in word else word for word in words]
        run = subprocess.run([words[0], "-sS", *words[1:]], capture_output=True, text=True, check=True, timeout=30)
        return run.stdout

    job_id = curl(
        """curl localhost:5001/jobs -X POST -d '{"msg": {"arg1": 6, "arg2": 3}}' -H 'Content-Type: application/json'"""
    )
    assert mlq.job(job_id).wait(10)
    assert "18" == curl("curl localhost:5001/jobs/ID/result", ID=job_id)
    assert "18" == curl("curl localhost:5001/jobs/ID/result.mp3 --output -", ID=job_id)
    assert "ok" == curl("curl localhost:5001/healthz")
    second = curl(
        "curl localhost:5001/jobs -X POST -H 'Content-Type: application/json' "
        """-d '{"msg": "message", "callback": "http://localhost:5001/some_callback"}'"""
    )
    assert mlq.job(second).wait(10)
    assert "heard message" == curl("curl localhost:5001/jobs/ID/short_result", ID=second)
    third = curl(
        "curl localhost:5001/jobs -X POST -H 'Content-Type: application/json' "
        """-d '{"msg": "message", "functions": ["my_func"]}'"""
    )
    assert "[queued; not started]" == curl("curl localhost:5001/jobs/ID/progress", ID=third)
    assert "1" == curl("curl localhost:5001/jobs/count")
    mlq.create_listener(my_func)
    assert mlq.job(third).wait(10)
    assert "mine: message" == curl("curl localhost:5001/jobs/ID/result", ID=third)


def my_func(msg: str, utils: Any) -> str:
    return f"mine: {msg}"


def test_mlqs_full_workflow_runs(server: Settings) -> None:
    """A Flask app posts a job whose callback is a route of its own, and its page shows how it stands."""
    with fresh_app(dataclasses.replace(server, callback_allow="loopback")) as mlq:
        run_workflow(mlq)


def run_workflow(mlq: MLQ) -> None:
    port = free_port()
    app = flask.Flask("shop")
    app.register_blueprint(create_blueprint(mlq, allow_anonymous=True), url_prefix=PREFIX)
    done: dict[str, str] = {}

    @app.post("/order")
    def order() -> Any:
        callback = flask.url_for("finished", _external=True)
        return mlq.post({"arg1": 6, "arg2": 7}, callback=callback), 202

    @app.get("/finished")
    def finished() -> str:
        assert "1" == flask.request.args["success"]
        done[flask.request.args["job_id"]] = flask.request.args["short_result"]
        return "thanks"

    @app.get("/status/<job_id>")
    def status(job_id: str) -> str:
        return done.get(job_id, "processing")

    server = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as page:
            job_id = page.post("/order").text
            assert "processing" == page.get(f"/status/{job_id}").text
            assert "[queued; not started]" == page.get(f"{PREFIX}/jobs/{job_id}/progress").text
            mlq.create_listener(multiply)
            assert "42" == eventually(lambda: (t := page.get(f"/status/{job_id}").text) != "processing" and t)
            assert "42" == page.get(f"{PREFIX}/jobs/{job_id}/short_result").text
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
