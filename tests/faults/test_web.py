"""Web processes that are killed in the middle of requests, and clients that do to them what they can."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness import LONG, PATIENCE, QUIET, Fleet, Report, send, tree, wait_for

from mlqueue import MLQueueError, Settings
from mlqueue.client import Client
from mlqueue.web.standalone import HEAD_TIME

pytestmark = pytest.mark.faults


@pytest.fixture
def fleet(tmp_path: Path, server: Settings) -> Iterator[Fleet]:
    fleet = Fleet(tmp_path / "fleet", server)
    yield fleet
    fleet.close()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


# F4

#: What gunicorn serves: each request takes a while before and after it is carried out; no moment of it is spared.
APP = """
import random, time
import flask
from mlqueue import MLQ
from mlqueue.web import create_blueprint


def create_app():
    app = flask.Flask("web")
    app.register_blueprint(create_blueprint(MLQ({namespace!r}), allow_anonymous=True))
    inner = app.wsgi_app

    def slowly(environ, start_response):
        time.sleep(random.random() * 0.03)
        answer = inner(environ, start_response)
        time.sleep(random.random() * 0.03)
        return answer

    app.wsgi_app = slowly
    return app
"""


class Gunicorn:
    """gunicorn with two worker processes, on one port whenever it is started."""

    def __init__(self, fleet: Fleet) -> None:
        (fleet.folder / "web.py").write_text(APP.format(namespace=fleet.namespace))
        self.fleet = fleet
        self.port = free_port()
        self.log = fleet.folder / "gunicorn.log"
        self.start()

    def start(self) -> None:
        words = ["--bind", f"127.0.0.1:{self.port}", "--workers", "2", "--worker-class", "gthread", "--threads", "4"]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gunicorn", *words, "--no-control-socket", "web:create_app()"],
                cwd=self.fleet.folder,
                env=self.fleet.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def workers(self) -> list[int]:
        return tree(self.process.pid)[1:]

    def kill_worker(self) -> None:
        send(signal.SIGKILL, random.sample(self.workers() or [0], 1))

    def kill_all(self) -> None:
        send(signal.SIGKILL, tree(self.process.pid))
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill_all()


def test_every_post_that_was_answered_has_one_job_though_web_processes_are_killed(fleet: Fleet) -> None:
    """F4."""
    posts, kills = (20_000, 100) if LONG else (1_000, 10)
    report = Report(test="web_killed_in_posts")
    web = Gunicorn(fleet)
    answered: dict[int, str] = {}
    over = threading.Event()

    def post(number: int) -> None:
        # The client makes the request again, with the same key, until it is answered.
        answered[number] = client.post({"number": number})

    def kill() -> None:
        for count in itertools.count(1):
            # Spread over the posts: the next one is due when so many are answered.
            wait_for(lambda due=count * posts // (kills + 1): len(answered) >= due or over.is_set())
            if over.is_set():
                return
            if count % 5 == 0:
                web.kill_all()
                web.start()
            else:
                web.kill_worker()
            report.notes.append("killed")

    try:
        with Client(f"http://127.0.0.1:{web.port}", patience=PATIENCE) as client, ThreadPoolExecutor(8) as threads:
            wait_for(lambda: reaches(client))
            killer = threading.Thread(target=kill)
            killer.start()
            futures = [threads.submit(post, number) for number in range(posts)]
            for future in futures:
                try:
                    future.result(2 * PATIENCE)
                except MLQueueError as error:
                    report.note(f"a post failed: {error}")
            over.set()
            killer.join()
    finally:
        web.close()
    assert len(report.notes) >= kills, report
    report.notes.clear()
    report.attempted, report.acknowledged = posts, len(answered)
    found = Counter()
    cursor = None
    while True:
        page = fleet.mlq.jobs(limit=1000, cursor=cursor)
        for record in page.jobs:
            number = fleet.mlq.get_job(record.id)["msg"]["number"]
            found[number] += 1
            report.ok += answered.get(number) == record.id
        cursor = page.cursor
        if cursor is None:
            break
    report.lost = sum(found[number] == 0 for number in answered)
    report.duplicated_outcomes = sum(count - 1 for count in found.values())
    report.finish()
    assert (posts, posts) == (report.acknowledged, report.ok)


def reaches(client: Client) -> bool:
    with contextlib.suppress(MLQueueError):
        client.jobs(limit=1)
        return True
    return False


# F33

#: How many connections do each of these things.
EACH = 400 if LONG else 50

#: How long a server may take to be rid of a client, in seconds.
RID = HEAD_TIME + 10


class Web:
    """`mlqueue web`, in a process of its own."""

    def __init__(self, fleet: Fleet, *options: str) -> None:
        self.log = fleet.folder / f"web-{'-'.join(options)}.log"
        command = ["-m", "mlqueue", "web", "--port", "0", "--namespace", fleet.namespace, *options]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                cwd=fleet.folder,
                env=fleet.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        found = wait_for(lambda: re.search(r" at (http://127\.0\.0\.1:(\d+)) ", self.log.read_text()), PATIENCE)
        self.url, self.port = found[1], int(found[2])

    def memory(self) -> int:
        """Its resident memory, in bytes."""
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


POST = b"POST /jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

#: What a hostile connection sends first, and then a byte at a time.
DRIBBLES = {
    "nothing": b"",
    "a request line": b"GET /hea",
    "headers": b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: ",
    "a body": POST + b"Content-Length: 9000\r\n\r\n",
    "chunks": POST + b"Transfer-Encoding: chunked\r\n\r\n2000\r\n",
}


async def dribbles(port: int, begin: bytes) -> float:
    """Sends a byte a second until the server has had enough; for how long that was."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    begun = time.monotonic()
    try:
        writer.write(begin)
        while time.monotonic() - begun < 3 * RID:
            if begin:
                writer.write(b"x")
            with contextlib.suppress(TimeoutError):
                if not await asyncio.wait_for(reader.read(65_536), 1):
                    break
    except OSError:
        pass
    finally:
        writer.transport.abort()
    return time.monotonic() - begun


async def floods(port: int) -> int:
    """Sends headers without an end; how many bytes of them until the server has had enough."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    sent, line = 0, b"X-Flood: " + bytes(8000).replace(b"\0", b"x") + b"\r\n"
    with contextlib.suppress(OSError):
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
        while sent < 100 * 2**20:
            writer.write(line)
            await writer.drain()
            sent += len(line)
    writer.transport.abort()
    return sent


async def pipelines(port: int, count: int = 200) -> int:
    """Sends many requests before it reads the first answer; how many it got."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * count)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = await asyncio.wait_for(reader.read(), PATIENCE)
    writer.transport.abort()
    return text.count(b"HTTP/1.1 200 ")


async def honest(port: int, over: asyncio.Event) -> list[float]:
    """An ordinary client, one request after the other; how long each took."""
    took = []
    body = b'{"msg": 1}'
    while not over.is_set():
        begun = time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        answer = await asyncio.wait_for(reader.read(), PATIENCE)
        assert answer.startswith(b"HTTP/1.1 202 "), answer
        took.append(time.monotonic() - begun)
        writer.transport.abort()
        await asyncio.sleep(0.05)
    return took


async def assault(web: Web) -> tuple[list[float], list[float], list[int], list[int]]:
    """All of it at once."""
    over = asyncio.Event()
    client = asyncio.create_task(honest(web.port, over))
    slow = [dribbles(web.port, begin) for begin in DRIBBLES.values() for _ in range(EACH)]
    lasted, flooded, piped = await asyncio.gather(
        asyncio.gather(*slow),
        asyncio.gather(*(floods(web.port) for _ in range(EACH))),
        asyncio.gather(*(pipelines(web.port) for _ in range(EACH // 5))),
    )
    over.set()
    return await client, lasted, flooded, piped


def test_clients_that_dribble_flood_and_pipeline_are_cut_off_and_others_are_served(fleet: Fleet) -> None:
    """F33, against both servers of `mlqueue web`."""
    report = Report(test="web_under_assault")
    with contextlib.ExitStack() as stack:
        webs = [stack.enter_context(contextlib.closing(Web(fleet, *options))) for options in ((), ("--threaded",))]
        before = [web.memory() for web in webs]

        async def both() -> list[tuple[list[float], list[float], list[int], list[int]]]:
            return list(await asyncio.gather(*map(assault, webs)))

        for web, memory, (took, lasted, flooded, piped) in zip(webs, before, asyncio.run(both()), strict=True):
            report.attempted += len(lasted) + len(flooded) + len(piped)
            report.acknowledged += len(took)
            report.longest_s = round(max(report.longest_s or 0.0, *lasted), 1)
            if max(lasted) > RID:
                report.note(f"{web.log.name}: a client that dribbles was served for {max(lasted):.0f} s")
            if max(flooded) > 8 * 2**20:
                report.note(f"{web.log.name}: {max(flooded):,} bytes of headers were taken")
            if set(piped) != {201}:
                report.note(f"{web.log.name}: {set(piped)} of 201 pipelined requests were answered")
            slowest = sorted(took)[int(0.95 * len(took))]
            if slowest > (0.25 if QUIET else 2.5):
                report.note(f"{web.log.name}: other clients waited {slowest:.2f} s")
            if web.memory() - memory > 150 * 2**20:
                report.note(f"{web.log.name}: {(web.memory() - memory) / 2**20:.0f} MiB more of memory")
            if "Traceback" in web.log.read_text():
                report.note(f"{web.log.name}: a traceback in its log: {web.log.read_text()[-2000:]}")
    report.ok = report.acknowledged
    report.finish()
    assert report.ok > 100
