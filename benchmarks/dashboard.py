"""How fast the pages of the dashboard are with many jobs, as a ratio to GET /healthz, and what open ones cost a drain.

    python benchmarks/dashboard.py [--only pages,drain] [--jobs 100000] [--rounds 40] [--open 50] [--json FILE]

gunicorn with one worker process on loopback: eight threads (gthread), or gevent with `--server gevent`. Pages are asked
for over a connection that is kept, interleaved, and medians taken. The drain is that of benchmarks/queue.py, its own
function, alone and with so many overviews open, in turn; these do as their script does: they follow the overview as a
stream, and where there is none to be had they ask for it every two seconds. They run on this machine: what they take of
its processors counts as theirs. How much that is, with the web server's, is told too: where a drain keeps all
processors busy it takes longer by that part, which unlike its time does not depend on what else the machine does.
Figures are good for ratios within one run.
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
import importlib
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
import redis

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

#: How often an open dashboard asks where it has no stream, in seconds.
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
def process(folder: Path, environ: dict[str, str], *command: str) -> Iterator[int]:
    """A process, which is ended at the end; its number."""
    with (folder / "log").open("ab") as log:
        started = subprocess.Popen([sys.executable, *command], cwd=folder, env=environ, stdout=log, stderr=log)
    try:
        yield started.pid
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
        "jobs, actor and age": "/ui/jobs?actor=work&since=1d",
        "job": f"/ui/jobs/{job_id}",
        "dead letters": "/ui/dead",
        "dead letters, text": "/ui/dead?text=nowhere",
        "dead, one by one": "/ui/dead/letters",
        "queues": "/ui/queues",
        "workers": "/ui/workers",
        "limits": "/ui/limits",
        "functions": "/ui/functions",
        "callbacks": "/ui/callbacks",
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


# Open dashboards


def look(port: int, count: int) -> None:
    """Has so many overviews open until it is ended; says so when each has been sent the page."""
    begun = threading.Semaphore(0)

    def open_one(number: int) -> None:
        time.sleep(EVERY * number / count)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/ui/", headers={"Accept": "text/event-stream"})
        answer = connection.getresponse()
        if answer.status == 200:
            while not answer.readline().startswith(b"data:"):
                pass
            begun.release()
            while answer.readline():
                pass
            raise ConnectionError("a stream has ended")
        answer.read()
        headers = {"X-MLQueue-Again": "1"}
        while True:
            connection.request("GET", "/ui/", headers=headers)
            answer = connection.getresponse()
            answer.read()
            assert answer.status in (200, 304), answer.status
            if "If-None-Match" not in headers:
                begun.release()
            headers["If-None-Match"] = answer.headers["ETag"]
            time.sleep(EVERY)

    for number in range(count):
        threading.Thread(target=open_one, args=(number,), daemon=True).start()
    for _ in range(count):
        begun.acquire()
    print("open", flush=True)
    signal.pause()


@contextlib.contextmanager
def open_dashboards(port: int, count: int) -> Iterator[int]:
    """So many of them, in a process of their own; its number."""
    command = [sys.executable, __file__, "--look", str(port), "--open", str(count)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as looking:
        assert looking.stdout is not None
        assert looking.stdout.readline() == b"open\n"
        try:
            yield looking.pid
        finally:
            assert looking.poll() is None
            looking.kill()


def time_drains(kind: str, jobs: int, rounds: int, count: int) -> dict[str, Any]:
    """How much longer the drain of benchmarks/queue.py takes with so many overviews open."""
    bench = importlib.import_module("benchmarks.queue")
    with bench.server() as url, tempfile.TemporaryDirectory(prefix="mlq-bench-") as name:
        os.environ["BENCH_URL"] = url
        system = importlib.import_module("benchmarks.systems.ours")
        client = redis.Redis.from_url(url)
        port = free_port()
        rates: dict[str, list[float]] = {"alone": [], "watched": []}
        shares: list[float] = []
        with serving(Path(name), kind, url, system.mlq.name, port) as web:
            for number in range(rounds):
                for which in ("alone", "watched") if number % 2 == 0 else ("watched", "alone"):
                    if which == "alone":
                        rates[which].append(bench.drain(system, client, jobs, 2, 8)["drain"])
                        continue
                    with open_dashboards(port, count) as looking:
                        begun, before = time.perf_counter(), processor_seconds(web) + processor_seconds(looking)
                        rates[which].append(bench.drain(system, client, jobs, 2, 8)["drain"])
                        took = processor_seconds(web) + processor_seconds(looking) - before
                        shares.append(took / (time.perf_counter() - begun) / (os.cpu_count() or 1))
        system.mlq.close()
    ratio = statistics.median(rates["alone"]) / statistics.median(rates["watched"])
    share = round(statistics.median(shares), 4)
    return {"jobs": jobs, "open": count, "server": kind, "ratio": round(ratio, 3), "share": share, **rates}


def processor_seconds(pid: int) -> float:
    """The processor time that a process and its children have taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return own + sum(processor_seconds(int(child)) for child in children)


@contextlib.contextmanager
def serving(folder: Path, kind: str, url: str, namespace: str, port: int) -> Iterator[int]:
    """The web server; the number of its process."""
    (folder / "wsgi.py").write_text(WSGI)
    kept = {key: text for key, text in os.environ.items() if not key.startswith(("MLQUEUE_", "REDIS_URL"))}
    environ = kept | {"MLQUEUE_URL": url, "MLQUEUE_NAMESPACE": namespace, "PYTHONPATH": str(HERE.parent)}
    server = ["-m", "gunicorn", "--bind", f"127.0.0.1:{port}", "--keep-alive", "60", "--graceful-timeout", "1"]
    server += ["--threads", "8"] if kind == "gthread" else ["--worker-class", "gevent"]
    server += ["--worker-tmp-dir", str(folder), "--no-control-socket", "wsgi:create_app()"]
    with process(folder, environ, *server) as pid:
        wait_for(port)
        yield pid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="pages,drain")
    parser.add_argument("--server", choices=("gthread", "gevent"), default="gthread")
    parser.add_argument("--jobs", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--open", type=int, default=50)
    parser.add_argument("--drain", type=int, default=20_000, help="jobs of each drain")
    parser.add_argument("--drains", type=int, default=5, help="drains of each kind")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--look", type=int, metavar="PORT", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.look is not None:
        look(chosen.look, chosen.open)
    logging.disable(logging.CRITICAL)
    found: dict[str, Any] = {"jobs": chosen.jobs}
    if "pages" in chosen.only:
        port = free_port()
        with temporary_server() as settings, tempfile.TemporaryDirectory(prefix="mlq-bench-") as name:
            job_id = seed(settings, "bench", chosen.jobs)
            with serving(Path(name), chosen.server, str(settings.url), "bench", port):
                found["pages"] = time_pages(port, job_id, chosen.rounds)
        for page, numbers in found["pages"].items():
            print(f"{page:<20} {numbers['ms']:>8.2f} ms  x{numbers['ratio']:<6} {numbers['bytes']:>8,} bytes")
    if "drain" in chosen.only:
        found["drain"] = drain = time_drains(chosen.server, chosen.drain, chosen.drains, chosen.open)
        print(f"drain of {chosen.drain:,}: x{drain['ratio']:.3f} with {chosen.open} dashboards open ({chosen.server})")
        print(f"  they and the web server took {drain['share']:.1%} of the processors meanwhile")
        for which in ("alone", "watched"):
            print(f"  {which}: {', '.join(f'{rate:,.0f}' for rate in drain[which])} jobs/s")
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
