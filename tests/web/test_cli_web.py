"""`mlqueue web`, `up` and `consumer`: who may come in, what is served, what ends when, and that nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from command import Folder, a_folder
from support import children, eventually

from mlqueue import foreman
from mlqueue.client import Client
from mlqueue.foreman import Foreman, Line

#: The user's module: a listener, and actors that may be called over HTTP.
JOBS = """
import time
import mlqueue

mlq = mlqueue.MLQ("shop")


@mlq.actor(http=True)
def double(x: int) -> int:
    return 2 * x


@mlq.actor(http=True)
def sleeps(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


def multiply(msg, utils):
    return msg["arg1"] * msg["arg2"]


mlq.create_listener(multiply)
"""

#: The two servers of `mlqueue web`.
SERVERS = [pytest.param((), id="gevent"), pytest.param(("--threaded",), id="threads")]

PATIENCE = 20.0


@pytest.fixture
def folder() -> Iterator[Folder]:
    with a_folder() as folder:
        (folder.path / "jobs.py").write_text(JOBS)
        yield folder


@pytest.fixture(scope="module")
def shared() -> Iterator[Folder]:
    """One folder for the tests that end nothing, and count only what is theirs."""
    with a_folder() as folder:
        folder.environ |= {"MLQUEUE_MAX_MESSAGE_BYTES": "3M", "MLQUEUE_SERVER_GRACE": "60"}
        yield folder


@pytest.fixture(scope="module")
def cooperative(shared: Folder) -> Iterator[Program]:
    """`mlqueue web` with gevent."""
    with running(shared, "web", "--port", "0", "--namespace", "shop") as web:
        yield web


@pytest.fixture(scope="module")
def threaded(shared: Folder) -> Iterator[Program]:
    """`mlqueue web` with threads."""
    with running(shared, "web", "--port", "0", "--namespace", "shop", "--threaded") as web:
        yield web


@pytest.fixture(params=["cooperative", "threaded"], ids=["gevent", "threads"])
def web(request: pytest.FixtureRequest, cooperative: Program, threaded: Program) -> Program:
    """Either of them."""
    return cooperative if request.param == "cooperative" else threaded


class Program:
    """A command of ours in a process of its own, and what it says."""

    def __init__(self, folder: Folder, *words: str, **options: Any) -> None:
        self.process = folder.spawn(*words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in iter(stream.readline, b""):
                self.said += line.decode(errors="replace")

    def says(self, pattern: str, timeout: float = PATIENCE) -> re.Match[str]:
        """Waits until it has said something."""

        def found() -> re.Match[str] | None:
            match = re.search(pattern, self.said)
            assert match or self.process.poll() is None, self.said
            return match

        try:
            match = eventually(found, timeout)
        except AssertionError as error:
            raise AssertionError(f"it has not said {pattern!r}:\n{self.said}") from error
        assert match is not None
        return match

    @property
    def url(self) -> str:
        return self.says(r"serving \w+ at (http://\S+)")[1]

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def insist(self, number: signal.Signals) -> int:
        """Sends a signal until it has ended: one that follows too soon counts as the echo of the one before."""
        deadline = time.monotonic() + PATIENCE
        while self.process.poll() is None and time.monotonic() < deadline:
            self.send(number)
            threading.Event().wait(0.3)
        return self.ends()

    def ends(self, timeout: float = PATIENCE) -> int:
        """Waits for its end; the exit code."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended:\n{self.said}") from None
        self._reader.join()
        return code

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._reader.join()


@contextlib.contextmanager
def running(folder: Folder, *words: str, **options: Any) -> Iterator[Program]:
    program = Program(folder, *words, **options)
    try:
        yield program
    finally:
        program.close()


def descendants(pid: int) -> list[int]:
    """The processes below one, whatever their groups."""
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found + [below for child in found for below in descendants(child)]


def alive(pids: list[int]) -> list[int]:
    """Those of these processes that are there, and are no zombies."""
    there = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                there.append(pid)
    return there


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


# Who may come in


def test_without_keys_everybody_on_this_machine_is_served_under_its_own_names(web: Program) -> None:
    with httpx.Client(base_url=web.url) as client:
        assert ("ok", 200) == ((answer := client.get("/healthz")).text, answer.status_code)
        assert 202 == client.post("/jobs", json={"msg": 1}).status_code
        foreign = client.get("/jobs", headers={"Host": "shop.evil.test"})
        assert (400, "application/problem+json") == (foreign.status_code, foreign.headers["Content-Type"])
        assert "localhost, 127.0.0.1, [::1]" in foreign.json()["detail"]
        assert "mlqueue key new" in foreign.json()["detail"]
        assert 403 == client.post("/jobs", json={"msg": 1}, headers={"Sec-Fetch-Site": "cross-site"}).status_code
        assert (404, 405) == (client.get("/nothing").status_code, client.put("/jobs").status_code)
        assert client.get("/", follow_redirects=True).text.startswith("<!doctype html>")


def test_an_address_that_others_reach_is_refused_without_keys_and_served_with_them(folder: Folder) -> None:
    refused = folder("web", "--host", "0.0.0.0", "--port", "0", "--threaded")
    assert 2 == refused.code
    assert "mlqueue key new --scope submit,read" in refused.err
    key = folder("key", "new", "--scope", "submit,read", "--namespace", "shop").text.strip()
    with running(folder, "web", "--host", "0.0.0.0", "--port", "0", "--namespace", "shop") as web:
        url = web.url.replace("0.0.0.0", "127.0.0.1")
        with httpx.Client(base_url=url) as client:
            nobody = client.get("/jobs")
            assert (401, 'Bearer realm="mlqueue"') == (nobody.status_code, nobody.headers["WWW-Authenticate"])
            assert 200 == client.get("/jobs", headers={"Authorization": f"Bearer {key}"}).status_code
            assert 200 == client.get("/healthz", headers={"Host": "example.com"}).status_code


def test_the_port_is_that_of_the_environment_and_one_that_is_taken_is_an_error(folder: Folder) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folder.environ["PORT"] = str(port)
        refused = folder("web", "--threaded")
        assert (2, True) == (refused.code, f"nothing can listen at 127.0.0.1, port {port}" in refused.err), refused
    with running(folder, "web", "--threaded") as web:
        assert f"http://127.0.0.1:{port}" == web.url


def test_a_wrong_host_is_an_error(folder: Folder) -> None:
    refused = folder("web", "--host", "no.such.host.invalid", "--threaded")
    assert (2, True) == (refused.code, "no.such.host.invalid" in refused.err)


def test_without_flask_the_error_names_the_cure(folder: Folder) -> None:
    code = (
        "import sys; sys.modules['flask'] = None; from mlqueue.cli import main; sys.exit(main(['web', '--threaded']))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder.path, env=folder.environ, capture_output=True, text=True, check=False
    )
    assert (2, True) == (run.returncode, "pip install 'mlqueue[web]'" in run.stderr), run.stderr


# What is served


def test_a_connection_serves_many_requests_in_their_order(web: Program) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        ids = []
        body = b'{"msg": 1}'
        post = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        # Pipelined: all of them before the first is answered; one body comes in chunks.
        connection.sendall(
            b"GET /jobs/count HTTP/1.1\r\nHost: localhost\r\n\r\n"
            + (post + b"Content-Length: %d\r\n\r\n" % len(body) + body) * 3
            + post
            + b"Transfer-Encoding: chunked\r\n\r\n5\r\n"
            + body[:5]
            + b"\r\n5\r\n"
            + body[5:]
            + b"\r\n0\r\n\r\n"
            + b"GET /jobs/count HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        )
        with connection.makefile("rb") as answers:
            for _ in range(6):
                status, text = read_answer(answers)
                ids.append((status, text))
            assert b"" == answers.read()
    assert [200, 202, 202, 202, 202, 200] == [status for status, _ in ids]
    assert 4 == int(ids[-1][1]) - int(ids[0][1])


def read_answer(stream: Any) -> tuple[int, str]:
    status = int(stream.readline().split()[1])
    length = 0
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return status, stream.read(length).decode()


def test_a_body_that_is_too_large_is_refused_before_it_is_sent(web: Program) -> None:
    host, port = web.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(
            b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 10000000000\r\n\r\n" + b" " * 1000
        )
        with connection.makefile("rb") as answers:
            assert 413 == read_answer(answers)[0]
            assert b"" == answers.read()  # and nobody waits for the rest
    with httpx.Client(base_url=web.url) as client:
        # The bound is that of a message.
        assert 202 == client.post("/jobs", json={"msg": "x" * 2_900_000}).status_code
        assert 413 == client.post("/jobs", json={"msg": "x" * 3_200_000}).status_code


def test_hundreds_wait_at_once_and_others_are_answered(cooperative: Program) -> None:
    host, port = cooperative.url.removeprefix("http://").split(":")
    with httpx.Client(base_url=cooperative.url) as client, contextlib.ExitStack() as stack:
        job_id = client.post("/jobs", json={"msg": 1}).text
        ask = f"GET /jobs/{job_id} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=30\r\n\r\n".encode()
        waiters = [stack.enter_context(socket.create_connection((host, int(port)), 20)) for _ in range(200)]
        for waiter in waiters:
            waiter.sendall(ask)
        assert "ok" == client.get("/healthz").text
        assert 200 == client.delete(f"/jobs/{job_id}").status_code
        for waiter in waiters:
            with waiter.makefile("rb") as answers:
                status, text = read_answer(answers)
            assert (200, "cancelled") == (status, json.loads(text)["state"])


def test_the_access_log_has_a_line_for_each_request_and_nothing_of_its_query(cooperative: Program) -> None:
    host, port = cooperative.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(b"GET /jobs/a%0Ab?token=secret HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        while connection.recv(4096):
            pass
    line = cooperative.says(r'(.*)"GET /jobs/a%0Ab" 404 \d+ \d+\.\d+ms\n')
    assert "INFO mlqueue.web: 127.0.0.1" in line[1]
    assert "secret" not in cooperative.said


def test_the_client_uses_its_connection_again_and_arrays_come_and_go(cooperative: Program) -> None:
    import numpy as np

    with Client(cooperative.url) as client:
        job = client.job(client.post({"image": np.zeros((500, 500))}))
        for _ in range(5):
            assert "queued" == job.state
        connections = [path for path in Path("/proc/self/fd").iterdir() if is_connected(path, cooperative.url)]
        assert 1 == len(connections)


def is_connected(path: Path, url: str) -> bool:
    """Whether a descriptor of this process is a connection to the server at a URL."""
    with contextlib.suppress(OSError):
        if not os.readlink(path).startswith("socket:"):
            return False
        copy = socket.socket(fileno=os.dup(int(path.name)))
        with copy:
            return copy.family == socket.AF_INET and f"http://127.0.0.1:{copy.getpeername()[1]}" == url
    return False


# Streams


def stream_of(url: str, job_id: str) -> socket.socket:
    """A connection over which a stream of events has begun."""
    host, port = url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), 10)
    connection.sendall(f"GET /jobs/{job_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    heard = b""
    while b"event: snapshot" not in heard:
        heard += connection.recv(65_536)
    return connection


def test_streams_need_no_thread_and_no_connection_to_the_store_each_and_end_with_the_server(folder: Folder) -> None:
    with running(folder, "web", "--port", "0", "--namespace", "shop") as web, contextlib.ExitStack() as stack:
        with Client(web.url) as client:
            job_id = client.post(1)
        streams = [stack.enter_context(stream_of(web.url, job_id)) for _ in range(100)]
        connected = folder("--json", "server", "--status").json["clients"]
        assert connected < 40
        begun = time.monotonic()
        web.send(signal.SIGTERM)
        for stream in streams:
            with contextlib.suppress(ConnectionResetError):
                while stream.recv(65_536):
                    pass
        assert 0 == web.ends()
        assert time.monotonic() - begun < 5


def test_the_server_of_threads_has_no_streams_and_clients_ask_again(threaded: Program) -> None:
    with Client(threaded.url) as client:
        job = client.job(client.post(1))
        refused = httpx.get(f"{threaded.url}/jobs/{job.id}/events")
        assert (503, "TooManyStreams") == (refused.status_code, refused.json()["code"])
        states = []
        for event in job.events(timeout=PATIENCE):
            states.append(event.state)
            if event.state == "queued":
                job.cancel()
        assert ["queued", "cancelled"] == states


# Its end


@pytest.mark.parametrize("server", SERVERS)
def test_a_signal_lets_requests_in_hand_be_answered_and_waits_for_nobody_else(
    folder: Folder, server: tuple[str, ...]
) -> None:
    with running(folder, "web", "--port", "0", "--namespace", "shop", *server) as web:
        host, port = web.url.removeprefix("http://").split(":")
        with (
            socket.create_connection((host, int(port)), 20) as idle,
            httpx.Client(base_url=web.url, timeout=20) as client,
        ):
            idle.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert idle.recv(4096)
            job_id = client.post("/jobs", json={"msg": 1}).text
            answers: list[httpx.Response] = []
            waiter = threading.Thread(
                target=lambda: answers.append(client.get(f"/jobs/{job_id}", headers={"Prefer": "wait=20"}))
            )
            waiter.start()
            time.sleep(0.2)
            web.send(signal.SIGTERM)
            time.sleep(0.1)
            assert 0 == folder("cancel", job_id, "--namespace", "shop").code
            waiter.join()
            assert [(200, "cancelled")] == [(answer.status_code, answer.json()["state"]) for answer in answers]
            assert 0 == web.ends()


@pytest.mark.parametrize("server", SERVERS)
def test_a_second_signal_ends_it_at_once(folder: Folder, server: tuple[str, ...]) -> None:
    with running(folder, "web", "--port", "0", "--namespace", "shop", *server) as web:
        host, port = web.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 20) as waiter, httpx.Client(base_url=web.url) as client:
            job_id = client.post("/jobs", json={"msg": 1}).text
            waiter.sendall(f"GET /jobs/{job_id} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=60\r\n\r\n".encode())
            time.sleep(0.3)
            begun = time.monotonic()
            web.insist(signal.SIGINT)
            assert time.monotonic() - begun < 5


# Together


def test_up_runs_everything_restarts_what_dies_and_stops_in_order(folder: Folder) -> None:
    port = free_port()
    with running(folder, "up", "jobs", "--port", str(port), "--processes", "1", "--job-timeout", "1h") as up:
        up.says(rf"web +\| mlqueue: serving shop at http://127.0.0.1:{port} ")
        up.says(r"reaper +\| mlqueue: jobs of shop that run for longer than 60m")
        with Client(f"http://127.0.0.1:{port}", patience=15) as client:
            assert 42 == client.submit("double", 21).result(timeout=15)
            assert 18 == client.job(client.post({"arg1": 6, "arg2": 3})).result(timeout=15)
            [web] = [pid for pid in descendants(up.process.pid) if b"monkey" in cmdline(pid)]
            os.kill(web, signal.SIGKILL)
            assert 44 == client.submit("double", 22).result(timeout=15)
        up.says(r"mlqueue \| web died \(killed by signal 9 \(SIGKILL\)\); it starts again in 0\.\d s")
        everything = descendants(up.process.pid)
        assert len(everything) >= 5
        up.send(signal.SIGTERM)
        assert 0 == up.ends()
        ends = re.findall(r"mlqueue \| (\w+) has ended", up.said)
        assert ("web", "server", {"worker", "reaper"}) == (ends[0], ends[-1], set(ends[1:-1])), up.said
        eventually(lambda: not alive(everything))
    assert "\x1b[" not in up.said
    assert 4 == folder("server", "--status").code


def cmdline(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def test_a_second_signal_ends_everything_at_once_and_the_job_goes_back(folder: Folder) -> None:
    port = free_port()
    with running(folder, "up", "jobs", "--port", str(port), "--processes", "1") as up:
        up.says("serving shop")
        with Client(f"http://127.0.0.1:{port}") as client:
            job = client.submit("sleeps", 60)
            eventually(lambda: job.state == "running")
        everything = descendants(up.process.pid)
        begun = time.monotonic()
        up.send(signal.SIGINT)
        up.says("worker +\\| .*draining")
        assert 130 == up.insist(signal.SIGINT)
        assert time.monotonic() - begun < 20  # the job would go on, and be waited for, for 25 s
        eventually(lambda: not alive(everything))
    assert "queued" == folder("--json", "show", job.id).json["state"]


@pytest.mark.faults
def test_when_the_foreman_is_killed_all_that_it_started_ends(folder: Folder) -> None:
    with running(folder, "up", "jobs", "--port", str(free_port()), "--processes", "1") as up:
        up.says("serving shop")
        everything = descendants(up.process.pid)
        up.send(signal.SIGKILL)
        up.ends()
        eventually(lambda: not [pid for pid in alive(everything) if b"mlqueue" in cmdline(pid)], 30)


def test_up_without_modules_runs_the_lines_of_the_procfile(folder: Folder) -> None:
    (folder.path / "Procfile").write_text(
        "# the lines\nweb: echo web at $PORT; exec sleep 60\nworker: mlqueue worker jobs --processes 1\n"
        "other: sh -c 'echo other at $PORT; sleep 60'\n"
    )
    with running(folder, "up", "--port", "7000") as up:
        up.says(r"web +\| web at 7000\n")
        up.says(r"other +\| other at 7200\n")
        up.says(r"worker +\| .* is ready")
        everything = descendants(up.process.pid)
        up.send(signal.SIGTERM)
        assert 0 == up.ends()
        eventually(lambda: not alive(everything))
    assert "web" == re.findall(r"mlqueue \| (\w+) has ended", up.said)[0]


def test_up_with_a_module_that_is_not_there_ends(folder: Folder) -> None:
    ran = folder.process("up", "no_such_module", "--processes", "1")
    assert 2 == ran.code
    assert "No module named 'no_such_module'" in ran.text + ran.err
    assert "worker cannot run as it was called; all is stopped" in ran.text + ran.err


def test_up_without_modules_or_a_procfile_says_what_to_do(folder: Folder) -> None:
    refused = folder("up")
    assert (2, True) == (refused.code, "`mlqueue up tasks`, or write a Procfile" in refused.err)
    (folder.path / "Procfile").write_text("no lines\n")
    assert (2, True) == ((refused := folder("up")).code, "has no line of the form" in refused.err)


def test_consumer_without_modules_runs_what_is_posted_to_its_server_signed(folder: Folder) -> None:
    port, key = free_port(), "the-signing-key-of-this-test"
    folder.environ |= {"MLQUEUE_PROCESSES": "1", "MLQUEUE_SIGNING_KEY": key}
    words = ["consumer", "--server", "--server_port", str(port), "--namespace", "shop"]
    with running(folder, *words) as consumer:
        consumer.says(f"serving shop at http://127.0.0.1:{port}")
        with Client(f"http://127.0.0.1:{port}") as client:
            client.register_function(lambda msg, utils: msg["arg1"] * msg["arg2"], key, "multiply", namespace="shop")
            assert 6 == client.job(client.post({"arg1": 2, "arg2": 3})).result(timeout=15)
        consumer.send(signal.SIGTERM)
        assert 0 == consumer.ends()


def test_consumer_without_anything_to_do_says_what_to_do(folder: Folder) -> None:
    refused = folder("consumer")
    assert (2, True) == (refused.code, "`mlqueue consumer tasks`; or say --server or --reaper" in refused.err)


# The foreman


@contextlib.contextmanager
def foreman_of(lines: list[Line]) -> Iterator[tuple[list[int], Path]]:
    """A foreman in a fork of this process; its exit code, when it has ended, and where its output goes."""
    with tempfile.NamedTemporaryFile(prefix="mlq-foreman-") as file:
        pid = os.fork()
        if pid == 0:
            code = 70
            # One that comes when the foreman has just ended by itself changes nothing.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            with contextlib.suppress(BaseException), Path(file.name).open("wb") as output:
                code = Foreman(lines, environment=dict(os.environ), drain=0.1, output=output).run()
            os._exit(code)
        codes: list[int] = []
        try:
            yield codes, Path(file.name)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def test_a_process_that_ends_well_is_not_started_again_and_the_foreman_ends_with_the_last() -> None:
    with foreman_of([Line(name="one", command="echo 1; printf 2"), Line(name="two", command=["echo", "3"])]) as ran:
        eventually(lambda: ran[1].read_text().count("not started again") == 2)
        text = ran[1].read_text()
    assert [0] == ran[0]
    assert {"one     | 1", "one     | 2", "two     | 3"} <= set(text.splitlines())


def test_a_process_that_crashes_is_started_again_later_and_later() -> None:
    with foreman_of([Line(name="bad", command="echo begun; exit 1")]) as ran:
        eventually(lambda: ran[1].read_text().count("it starts again") == 3)
        pauses = re.findall(r"it starts again in ([\d.]+) s", ran[1].read_text())
    assert ["0.2", "0.4", "0.8"] == pauses


def test_a_command_that_was_called_wrongly_ends_all() -> None:
    with foreman_of([Line(name="good", command="sleep 60"), Line(name="wrong", command="echo usage; exit 2")]) as ran:
        eventually(lambda: "good has ended" in ran[1].read_text())
    assert [2] == ran[0]


def test_what_a_process_leaves_behind_ends_with_it(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    command = f"sleep 60 & echo $! > {note}; exit 1"
    with foreman_of([Line(name="messy", command=command)]) as ran:
        eventually(lambda: "died" in ran[1].read_text())
        pid = int(note.read_text())
        eventually(lambda: not alive([pid]))


def test_one_that_does_not_heed_the_signal_is_killed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreman, "MARGIN", 0.2)
    with foreman_of([Line(name="deaf", command="trap '' TERM; echo begun; while :; do sleep 0.1; done")]) as ran:
        eventually(lambda: "begun" in ran[1].read_text())
    # Leaving the block has sent SIGTERM, and waited.
    assert [0] == ran[0]


def test_one_that_takes_two_signals_for_one_is_told_again_when_all_is_to_end_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(foreman, "INSIST", 0.2)
    command = "n=0; trap 'n=$((n+1)); [ $n -lt 3 ] || exit 0' TERM; echo begun; while :; do sleep 0.05; done"
    before = children()
    with foreman_of([Line(name="slow", command=command)]) as ran:
        eventually(lambda: "begun" in ran[1].read_text())
        [pid] = children() - before
        os.kill(pid, signal.SIGTERM)
        threading.Event().wait(foreman.ECHO + 0.1)  # sooner, it would be an echo
        os.kill(pid, signal.SIGTERM)
        eventually(lambda: "slow has ended" in ran[1].read_text())
        assert "killed" not in ran[1].read_text()
    assert [130] == ran[0]


def test_names_have_colours_on_a_terminal_and_none_when_no_color_is_set(folder: Folder) -> None:
    (folder.path / "Procfile").write_text("one: echo hello\n")
    folder.environ["MLQUEUE_URL"] = "redis://nowhere.invalid"  # nothing here needs a store

    def printed() -> str:
        ours, theirs = pty.openpty()
        process = folder.spawn("up", stdout=theirs, stderr=theirs)
        os.close(theirs)
        text = b""
        with contextlib.suppress(OSError):  # the terminal is gone with the last who has it
            while select.select([ours], [], [], PATIENCE)[0] and (part := os.read(ours, 4096)):
                text += part
        os.close(ours)
        assert 0 == process.wait(PATIENCE)
        return text.decode()

    assert re.search("\x1b\\[36mone +\\| \x1b\\[0mhello", printed())
    folder.environ["NO_COLOR"] = "1"
    assert re.search("one +\\| hello", text := printed())
    assert "\x1b[" not in text


# MLQ's programs that need HTTP


PROGRAMS = Path(__file__).parent.parent / "programs"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_lines_of_mlq_run_as_they_are_written_with_consumer_its_word_for_all_of_it(folder: Folder) -> None:
    port = free_port()
    # The lines name port 5001, which somebody else may have: curl is told where that is.
    (folder.path / ".curlrc").write_text(f'connect-to = "localhost:5001:127.0.0.1:{port}"\nsilent\n')
    folder.environ |= {"HOME": str(folder.path), "CURL_HOME": str(folder.path)}
    lines = (PROGRAMS / "curl.sh").read_text().splitlines()
    shutil.copy(PROGRAMS / "multiply.py", folder.path)

    def run(line: str) -> str:
        return subprocess.run(
            ["sh", "-c", line], cwd=folder.path, env=folder.environ, check=True, capture_output=True, timeout=PATIENCE
        ).stdout.decode("latin-1")

    words = ["consumer", "multiply", "--server", "--server_port", str(port), "--reaper", "--reaper_timeout", "600"]
    folder.environ["MLQUEUE_PROCESSES"] = "1"
    with running(folder, *words) as consumer:
        consumer.says("jobs of example_app that run for longer than 10m .* 5 times")
        consumer.says(f"serving example_app at http://127.0.0.1:{port}")
        post, result, as_mp3, with_callback, with_functions = [line for line in lines if line.startswith("curl")]
        job_id = run(post)
        assert re.fullmatch("[0-9a-f]{32}", job_id)
        eventually(lambda: "18" == run(result.replace("ID", job_id)))
        assert "18" == run(as_mp3.replace("ID", job_id))
        assert "http://localhost:5001/some_callback" == folder("--json", "show", run(with_callback)).json["callback"]
        assert ["my_func"] == folder("--json", "show", run(with_functions)).json["functions"]
        consumer.send(signal.SIGTERM)
        assert 0 == consumer.ends()


def test_the_full_workflow_of_mlq_a_flask_app_a_worker_and_a_callback(folder: Folder) -> None:
    for name in ("flask_app.py", "flask_worker.py"):
        shutil.copy(PROGRAMS / name, folder.path)
    port = free_port()
    kept = {"cwd": folder.path, "env": folder.environ | {"PORT": str(port)}, "stdin": subprocess.DEVNULL}
    with (folder.path / "log").open("wb") as log, contextlib.ExitStack() as stack:
        for name in ("flask_app.py", "flask_worker.py"):
            process = subprocess.Popen([sys.executable, name], stdout=log, stderr=log, **kept)  # type: ignore[call-overload]
            stack.callback(process.wait, PATIENCE)
            stack.callback(process.terminate)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as browser:
            eventually(lambda: answers(browser))
            page = browser.post("/process", data={"text": "some words to count"}, follow_redirects=True)
            assert (200, True) == (page.status_code, "processing" in page.text)
            eventually(lambda: "done: 4 words" in browser.get(page.url).text)


def answers(client: httpx.Client) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return client.get("/").status_code == 200
    return False
