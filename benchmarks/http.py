"""How fast the HTTP interface is, as a ratio to a bare Flask route that does one Redis call, in the same run.

    python benchmarks/http.py [--seconds 3] [--rounds 3] [--connections 8] [--json FILE]

gunicorn, one gthread worker of eight threads each, on loopback with connections that are kept; one server without
persistence. The bare app answers POST /jobs with one RPUSH and GET /jobs/<id> with one HGETALL, both in JSON; ours
answers POST with the job's id, or with its record where JSON is asked for. Rounds are interleaved and medians taken.
Figures are good for ratios within one run, not for comparison between machines.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `http` behind this file.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

#: The apps: what everybody has, ours for everybody, ours with a key.
APPS = """
import os
import flask
import redis
from mlqueue import MLQ
from mlqueue.web import create_blueprint, keys

RECORD = {"id": "x" * 32, "state": "queued", "queue": "default", "actor": "bare", "created_at": 1.0}


def bare():
    app = flask.Flask("bare")
    client = redis.Redis.from_url(os.environ["MLQUEUE_URL"])

    @app.post("/jobs")
    def post():
        body = flask.request.get_json()
        client.rpush("bare:queue", str(body))
        return flask.jsonify(id=RECORD["id"]), 202

    @app.get("/jobs/<job_id>")
    def get(job_id):
        found = client.hgetall("bare:" + job_id)
        return flask.jsonify({key.decode(): value.decode() for key, value in found.items()})

    client.hset("bare:" + RECORD["id"], mapping={key: str(value) for key, value in RECORD.items()})
    return app


def ours():
    app = flask.Flask("ours")
    app.register_blueprint(create_blueprint(MLQ("bench"), allow_anonymous=True))
    return app


def ours_with_keys():
    app = flask.Flask("ours")
    mlq = MLQ("bench")
    app.register_blueprint(create_blueprint(mlq, keys(mlq)))
    return app
"""

NAMES = ("bare", "ours", "ours_with_keys")
BODY = b'{"msg": {"arg1": 6, "arg2": 3}}'


def load(name: str) -> Any:
    """Another file of this folder, as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The servers


class Served(NamedTuple):
    """A server, by its port and the process id of its master."""

    port: int
    pid: int

    def processor(self) -> float:
        """The processor time that its processes have used, in seconds."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        ticks = 0
        for pid in (str(self.pid), *children):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def gunicorn(folder: Path, app: str, url: str) -> Iterator[Served]:
    """A server for one of the apps."""
    (folder / "apps.py").write_text(APPS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["--bind", f"127.0.0.1:{port}", "--worker-class", "gthread", "--threads", "8", "--log-level", "error"]
    # The control socket is new in gunicorn 25.
    if "control" in subprocess.run([sys.executable, "-m", "gunicorn", "--help"], capture_output=True, text=True).stdout:
        words.append("--no-control-socket")
    process = subprocess.Popen(
        [sys.executable, "-m", "gunicorn", *words, f"apps:{app}()"],
        cwd=folder,
        env={**os.environ, "MLQUEUE_URL": url, "PYTHONPATH": str(HERE.parent)},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"{app} does not listen")
            time.sleep(0.02)
        yield Served(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)


# The load


def rate(port: int, request: bytes, status: int, seconds: float, connections: int) -> float:
    """Requests a second, each connection sending the next one when it has the answer."""
    counts = [0] * connections
    begin = threading.Barrier(connections + 1)
    over = threading.Event()

    def work(number: int) -> None:
        with socket.create_connection(("127.0.0.1", port), 10) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            begin.wait()
            while not over.is_set():
                connection.sendall(request)
                answer = connection.recv(65_536)
                head, _, body = answer.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                while len(body) < length:
                    body += connection.recv(65_536)
                if int(head[9:12]) != status:
                    raise AssertionError(answer.decode())
                counts[number] += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(connections)]
    for thread in threads:
        thread.start()
    begin.wait()
    begun = time.perf_counter()
    time.sleep(seconds)
    over.set()
    took = time.perf_counter() - begun
    for thread in threads:
        thread.join()
    return sum(counts) / took


def requests_of(app: str, port: int, key: str) -> dict[str, tuple[bytes, int]]:
    """What is sent: the request and the status that answers it."""
    more = f"Authorization: Bearer {key}\r\n" if app == "ours_with_keys" else ""
    head = f"Host: localhost\r\n{more}"
    kind = f"Content-Type: application/json\r\nContent-Length: {len(BODY)}\r\n\r\n"
    post, record = (
        f"POST /jobs HTTP/1.1\r\n{head}{accept}{kind}".encode() + BODY
        for accept in ("Accept: text/plain\r\n", "Accept: application/json\r\n")
    )
    get = f"GET /jobs/{json.loads(exchange(port, record))['id']} HTTP/1.1\r\n{head}\r\n".encode()
    return {"POST /jobs": (post, 202), "POST /jobs, record": (record, 202), "GET /jobs/<id>": (get, 200)}


def exchange(port: int, request: bytes) -> bytes:
    """The body of the answer to one request."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        answer = b"".join(iter(lambda: connection.recv(65_536), b""))
    return answer.partition(b"\r\n\r\n")[2]


def measure(seconds: float, rounds: int, connections: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """By request and app: medians of requests a second, and of the web processes' own microseconds a request."""
    rates: dict[str, dict[str, list[float]]] = {}
    costs: dict[str, dict[str, list[float]]] = {}
    with load("queue").server() as url, tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        from mlqueue import MLQ
        from mlqueue.keys import ApiKeys

        mlq = MLQ("bench", url=url)
        stack.callback(mlq.close)
        key, _ = ApiKeys(mlq.store).new("submit,read")
        served = {app: stack.enter_context(gunicorn(folder, app, url)) for app in NAMES}
        sent = {app: requests_of(app, served[app].port, key) for app in NAMES}
        for _ in range(rounds):
            for request in sent["bare"]:
                for app in NAMES:
                    data, status = sent[app][request]
                    rate(served[app].port, data, status, 0.3, connections)
                    before = served[app].processor()
                    got = rate(served[app].port, data, status, seconds, connections)
                    cost = (served[app].processor() - before) / (got * seconds) * 1e6
                    rates.setdefault(request, {}).setdefault(app, []).append(got)
                    costs.setdefault(request, {}).setdefault(app, []).append(cost)
    return medians(rates), medians(costs)


def medians(found: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {app: statistics.median(values) for app, values in apps.items()} for name, apps in found.items()}


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    """A table: the apps, and the ratio of each to the bare one."""
    print(f"{title:<22}{'bare':>10}{'ours':>10}{'ratio':>8}{'with key':>10}{'ratio':>8}")
    for request, values in found.items():
        bare = values["bare"]
        columns = "".join(f"{values[app]:>10,.0f}{values[app] / bare:>8.2f}" for app in NAMES[1:])
        print(f"{request:<22}{bare:>10,.0f}{columns}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="how long each measurement takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rates, costs = measure(options.seconds, options.rounds, options.connections)
    show("requests a second", rates)
    show("processor µs a request", costs)
    result: dict[str, Any] = {"rates": rates, "costs": costs}
    if (HERE / "http_events.py").exists():
        result["event_latency"] = load("http_events").event_latency()
        print("from job.progress() to the client of a stream:", result["event_latency"])
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
