"""How fast the pages of the dashboard are with many jobs, as a ratio to GET /healthz, and what open ones cost a drain.

    python benchmarks/dashboard.py [--jobs 100000] [--rounds 40] [--open 50] [--drain 20000] [--json FILE]

gunicorn, one gthread worker of eight threads, on loopback with a connection that is kept; requests are interleaved and
medians taken. The open dashboards ask for the overview every two seconds, as their script does, from this machine: what
they take of its processors counts as theirs. Figures are good for ratios within one run.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `http` behind http.py.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import http.client
import json
import logging
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import dramatiq

from mlqueue import MLQ, Settings
from mlqueue.testing import temporary_server

WSGI = """
import flask
from mlqueue import MLQ
from mlqueue.web import create_blueprint, create_dashboard

def create_app():
    app, mlq = flask.Flask("bench"), MLQ()
    app.register_blueprint(create_blueprint(mlq, allow_anonymous=True), url_prefix="/api")
    app.register_blueprint(create_dashboard(mlq, allow_anonymous=True), url_prefix="/ui")
    return app
"""

JOBS = """
import mlqueue

mlq = mlqueue.MLQ()


@mlq.actor(queue_name="drain")
def nothing() -> None:
    pass
"""

#: How often an open dashboard asks, in seconds.
EVERY = 2.0


def seed(settings: Settings, namespace: str, count: int) -> str:
    """As many jobs: four of ten done, two dead, three waiting, one scheduled; the id of one."""
    mlq = MLQ(namespace, settings=settings)
    mlq.broker.supervise(uuid.uuid4().hex)

    @mlq.actor(max_retries=0)
    def work(number: int, fail: bool = False) -> int:
        if fail:
            raise ValueError(f"row {number} of table {number % 7} is broken")
        return number

    for start in range(0, count * 6 // 10, 1000):
        work.submit_many([(number, number % 3 == 0) for number in range(start, start + 1000)], tags=["old"])
    worker = dramatiq.Worker(mlq.broker, worker_threads=4)
    worker.start()
    while sum(item.number for item in mlq.store.counts() if not item.state.ended):
        time.sleep(0.2)
    worker.stop()
    work.submit_many([(number,) for number in range(count * 3 // 10)])
    work.submit_many([(number,) for number in range(count // 10)], delay=86400)
    job_id = mlq.jobs(state="dead", limit=1).jobs[0].id
    mlq.close()
    return job_id


@contextlib.contextmanager
def process(folder: Path, environ: dict[str, str], *command: str) -> Iterator[None]:
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen([sys.executable, *command], cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        yield
    finally:
        started.send_signal(signal.SIGTERM)
        started.wait(60)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def get(connection: http.client.HTTPConnection, path: str) -> tuple[float, int]:
    """How long an answer took, in ms, and how many bytes it has."""
    begun = time.perf_counter()
    connection.request("GET", path)
    answer = connection.getresponse()
    size = len(answer.read())
    assert answer.status == 200, (path, answer.status)
    return (time.perf_counter() - begun) * 1000, size


def time_pages(port: int, job_id: str, rounds: int) -> dict[str, dict[str, float]]:
    paths = {
        "healthz": "/api/healthz",
        "overview": "/ui/",
        "jobs": "/ui/jobs",
        "jobs, dead": "/ui/jobs?state=dead",
        "jobs, tag": "/ui/jobs?tag=old",
        "jobs, text": "/ui/jobs?text=nowhere",
        "job": f"/ui/jobs/{job_id}",
        "dead letters": "/ui/dead",
        "queues": "/ui/queues",
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    times: dict[str, list[float]] = {name: [] for name in paths}
    sizes: dict[str, int] = {}
    for number in range(rounds + 2):
        for name, path in paths.items():
            took, sizes[name] = get(connection, path)
            if number >= 2:
                times[name].append(took)
        time.sleep(0.03)
    connection.close()
    least = statistics.median(times["healthz"])
    return {
        name: {
            "ms": round(statistics.median(found), 2),
            "p95": round(sorted(found)[int(len(found) * 0.95)], 2),
            "ratio": round(statistics.median(found) / least, 1),
            "bytes": sizes[name],
        }
        for name, found in times.items()
    }


def time_drain(mlq: MLQ, count: int) -> float:
    """How long the workers take for so many jobs that wait, in seconds."""
    mlq.store.pause("drain")
    waiting: list[Any] = [() for _ in range(count)]
    for start in range(0, count, 1000):
        mlq.broker.enqueue_many(
            [
                dramatiq.Message(queue_name="drain", actor_name="nothing", args=(), kwargs={}, options={})
                for _ in waiting[start : start + 1000]
            ]
        )
    begun = time.perf_counter()
    mlq.store.resume("drain")
    while any(item.number for item in mlq.store.counts() if item.queue == "drain" and not item.state.ended):
        time.sleep(0.02)
    return time.perf_counter() - begun


@contextlib.contextmanager
def open_dashboards(port: int, count: int) -> Iterator[None]:
    over = threading.Event()

    def look(number: int) -> None:
        over.wait(EVERY * number / count)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        while not over.is_set():
            get(connection, "/ui/")
            over.wait(EVERY)
        connection.close()

    threads = [threading.Thread(target=look, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--open", type=int, default=50)
    parser.add_argument("--drain", type=int, default=20_000)
    parser.add_argument("--drains", type=int, default=3)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    logging.disable(logging.CRITICAL)
    namespace, port = "bench", free_port()
    with temporary_server() as settings, tempfile.TemporaryDirectory(prefix="mlq-bench-") as name:
        folder = Path(name)
        (folder / "wsgi.py").write_text(WSGI)
        (folder / "jobs.py").write_text(JOBS)
        job_id = seed(settings, namespace, chosen.jobs)
        kept = {key: text for key, text in os.environ.items() if not key.startswith(("MLQUEUE_", "REDIS_URL"))}
        environ = kept | {
            "MLQUEUE_URL": str(settings.url),
            "MLQUEUE_NAMESPACE": namespace,
            "PYTHONPATH": str(HERE.parent),
        }
        server = ("-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--threads", "8", "--keep-alive", "60")
        with process(folder, environ, *server, "--worker-tmp-dir", name, "--no-control-socket", "wsgi:create_app()"):
            mlq = MLQ(namespace, settings=settings)
            wait_for(port)
            found: dict[str, Any] = {"jobs": chosen.jobs, "pages": time_pages(port, job_id, chosen.rounds)}
            for page, numbers in found["pages"].items():
                print(f"{page:<14} {numbers['ms']:>8.2f} ms  x{numbers['ratio']:<6} {numbers['bytes']:>8,} bytes")
            worker = ("-m", "mlqueue", "worker", "jobs", "--processes", "1", "--threads", "4", "--queues", "drain")
            if chosen.drain:
                with process(folder, environ, *worker):
                    time_drain(mlq, 2000)
                    alone, watched = [], []
                    for _ in range(chosen.drains):
                        alone.append(time_drain(mlq, chosen.drain))
                        with open_dashboards(port, chosen.open):
                            time.sleep(1)
                            watched.append(time_drain(mlq, chosen.drain))
                    ratio = statistics.median(watched) / statistics.median(alone)
                    found["drain"] = {"alone": alone, "watched": watched, "open": chosen.open, "ratio": round(ratio, 3)}
                    print(f"drain of {chosen.drain:,}: x{ratio:.3f} with {chosen.open} dashboards open", alone, watched)
            mlq.close()
    if chosen.json:
        chosen.json.parent.mkdir(parents=True, exist_ok=True)
        chosen.json.write_text(json.dumps(found, indent=2) + "\n")


def wait_for(port: int) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            get(http.client.HTTPConnection("127.0.0.1", port, timeout=5), "/api/healthz")
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


if __name__ == "__main__":
    main()
