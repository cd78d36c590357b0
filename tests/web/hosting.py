"""What several test modules here use: apps with the blueprint, keys, and real servers."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask
import httpx
from support import eventually

from mlqueue import MLQ
from mlqueue.keys import ApiKeys
from mlqueue.web import create_blueprint

ROOT = Path(__file__).resolve().parent.parent.parent

#: Where the blueprint is mounted.
PREFIX = "/q"


def mounted(mlq: MLQ, auth: Any = None, **options: Any) -> flask.Flask:
    """An app with the blueprint at PREFIX."""
    app = flask.Flask("host")
    app.register_blueprint(create_blueprint(mlq, auth, **options), url_prefix=PREFIX)
    return app


def bearer(keys: ApiKeys, scopes: str) -> dict[str, str]:
    """Headers with a new key."""
    return {"Authorization": f"Bearer {keys.new(scopes)[0]}"}


#: What gunicorn serves: an app whose store and namespace are in the environment, with no task code.
WSGI = """
import json
import os
import flask
from mlqueue import MLQ
from mlqueue.web import create_blueprint, keys

def create_app():
    app = flask.Flask("host")
    mlq = MLQ()
    who = {"auth": keys(mlq)} if "WITH_KEYS" in os.environ else {"allow_anonymous": True}
    options = json.loads(os.environ.get("OPTIONS", "{}"))
    blueprint = create_blueprint(mlq, **who, max_body=int(os.environ.get("MAX_BODY", 2**20)), **options)
    app.register_blueprint(blueprint, url_prefix="/q")
    if "USED_BEFORE" in os.environ:
        assert app.test_client().get("/q/jobs").status_code == 200
    return app
"""


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


Process = subprocess.Popen[bytes]


@contextlib.contextmanager
def gunicorn(mlq: MLQ, folder: Path, *arguments: str, **environ: str) -> Iterator[httpx.Client]:
    """A real server process over the namespace of `mlq`, and a client of it."""
    with gunicorn_process(mlq, folder, *arguments, **environ) as (client, _):
        yield client


def gunicorn_process(
    mlq: MLQ, folder: Path, *arguments: str, **environ: str
) -> contextlib.AbstractContextManager[tuple[httpx.Client, Process]]:
    """The same, with the process."""
    port = free_port()
    command = [
        *("gunicorn", "--bind", f"127.0.0.1:{port}", "--log-level", "error", "--limit-request-line", "0"),
        *("--worker-tmp-dir", str(folder), "--no-control-socket", *arguments, "wsgi:create_app()"),
    ]
    return _serving(mlq, folder, port, command, environ)


def waitress_process(
    mlq: MLQ, folder: Path, *arguments: str, **environ: str
) -> contextlib.AbstractContextManager[tuple[httpx.Client, Process]]:
    """The same, of another server."""
    port = free_port()
    command = ["waitress", "--listen", f"127.0.0.1:{port}", *arguments, "--call", "wsgi:create_app"]
    return _serving(mlq, folder, port, command, environ)


@contextlib.contextmanager
def _serving(
    mlq: MLQ, folder: Path, port: int, command: list[str], environ: dict[str, str]
) -> Iterator[tuple[httpx.Client, Process]]:
    (folder / "wsgi.py").write_text(WSGI)
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("MLQUEUE_", "REDIS_URL"))}
    ours = {"MLQUEUE_URL": str(mlq.settings.url), "MLQUEUE_NAMESPACE": mlq.name, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        cwd=folder,
        env={name: text for name, text in (kept | ours | environ).items() if text},
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}{PREFIX}", timeout=20) as client:
            eventually(lambda: answers(client))
            yield client, process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


def answers(client: httpx.Client) -> bool:
    """Whether the server answers."""
    with contextlib.suppress(httpx.TransportError):
        return client.get("/healthz").text == "ok"
    time.sleep(0.01)
    return False


__all__ = ["PREFIX", "bearer", "free_port", "gunicorn", "gunicorn_process", "mounted", "waitress_process"]
