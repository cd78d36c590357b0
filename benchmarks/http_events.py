"""How long an event takes from `current_job().progress()` in a worker to the client of a stream of events over HTTP.

    python benchmarks/http_events.py [--reports 200]

A worker process, gunicorn with threads or with gevent, and the client, each a process of its own, with a store on
loopback TCP. The job reports the time with each value, more slowly than reports are gathered.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `http` and `queue`.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import http.client
import importlib
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator

#: What the worker and gunicorn run.
APP = """
import time
import flask
import mlqueue
from mlqueue.web import create_blueprint

mlq = mlqueue.MLQ("bench")


@mlq.actor
def reports(number, pause):
    for n in range(number):
        time.sleep(pause)
        mlqueue.current_job().progress(n, str(time.time()))


def create_app():
    app = flask.Flask("bench")
    app.register_blueprint(create_blueprint(mlq, allow_anonymous=True))
    return app
"""

#: How long the job pauses before each report, in seconds: longer than reports are gathered.
PAUSE = 0.06

#: Arguments of gunicorn, by what is measured.
SERVERS = {"gthread": ["--threads", "8"], "gevent": ["--worker-class", "gevent"]}


@contextlib.contextmanager
def running(folder: Path, url: str, *words: str) -> Iterator[None]:
    """A process beside this one, which is stopped at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env={**os.environ, "MLQUEUE_URL": url, "MLQUEUE_LOG_LEVEL": "WARNING", "PYTHONPATH": str(HERE.parent)},
        start_new_session=True,
    )
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def get(port: int, path: str) -> http.client.HTTPResponse:
    """The answer to a request, as soon as there is a server."""
    deadline = time.monotonic() + 20
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def latencies(port: int, job_id: str) -> list[float]:
    """How long each report of a job took to the client of its stream, in ms."""
    took, event = [], ""
    with get(port, f"/jobs/{job_id}/events") as response:
        for line in response:
            now = time.time()
            name, _, value = line.decode().rstrip("\n").partition(": ")
            if name == "event":
                event = value
            elif name == "data" and event == "progress":
                took.append(1000 * (now - float(json.loads(value)["progress_note"])))
    return took[1:]  # the first one makes connections


def event_latency(reports: int = 200) -> dict[str, dict[str, float]]:
    """Median and 99th percentile in ms, by server."""
    from mlqueue import MLQ

    found = {}
    with (
        importlib.import_module("benchmarks.queue").server() as url,
        tempfile.TemporaryDirectory() as name,
        contextlib.closing(MLQ("bench", url=url)) as mlq,
    ):
        folder = Path(name)
        (folder / "events_app.py").write_text(APP)
        with running(folder, url, "mlqueue", "worker", "events_app", "--processes", "1"):
            for server, arguments in SERVERS.items():
                with socket.create_server(("127.0.0.1", 0)) as free:
                    port = int(free.getsockname()[1])
                words = ("--bind", f"127.0.0.1:{port}", "--log-level", "error", *arguments, "events_app:create_app()")
                with running(folder, url, "gunicorn", *words):
                    get(port, "/healthz").close()
                    took = sorted(latencies(port, mlq.submit("reports", reports, PAUSE, queue_name="default").id))
                found[server] = {"median": statistics.median(took), "p99": took[int(len(took) * 0.99)]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=200)
    for server, ms in event_latency(parser.parse_args().reports).items():
        print(f"progress() to the client of a stream, {server}: median {ms['median']:.1f} ms, p99 {ms['p99']:.1f} ms")


if __name__ == "__main__":
    main()
