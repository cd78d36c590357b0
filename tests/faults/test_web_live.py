"""F30: thousands of clients that listen, some of which do not read, and what that costs everybody else."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from harness import LONG, QUIET, wait_for
from web.hosting import PREFIX, gunicorn_process

from mlqueue import MLQ, codec
from mlqueue.job import NewJob, Result, new_id
from mlqueue.store import Held, Settle
from mlqueue.store.scripts import script
from mlqueue.store.store import common_of, encode_result

pytestmark = pytest.mark.faults

#: How many listen to one job each, to all jobs, and to all jobs without reading anything.
OF_JOBS, OF_ALL, SLOW = (9_750, 50, 200) if LONG else (1_950, 10, 40)

#: How many jobs those listen to.
JOBS = 10

#: How many other jobs come meanwhile, at a time and so often, and the name of their actor: their events are so many and
#: so long that no buffer of a connection holds them.
FLOOD, TIMES, LONG_NAME = 500, 10, "of_no_concern" * 100

#: What runs apart from the test, which measures meanwhile: all clients. It says when all of them listen, and in the end
#: what they have heard.
CLIENTS = """
import asyncio, json, re, resource, socket, sys

port, prefix, jobs, of_jobs, of_all, slow, last = json.loads(sys.argv[1])
resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
listening = 0


async def connect(path, read=None, last_id=""):
    global listening
    sock = socket.socket()
    if read is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, read)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    request = f"GET {prefix}{path} HTTP/1.1\\r\\nHost: localhost\\r\\n{last_id}\\r\\n".encode()
    await asyncio.get_running_loop().sock_sendall(sock, request)
    data = b""
    while b"retry:" not in data:
        data += await asyncio.get_running_loop().sock_recv(sock, 65536)
        assert b" 200 " in data[:20], data[:300]
    listening += 1
    return sock, data


async def hear(path, until, gate):
    async with gate:
        sock, data = await connect(path)
    events, times = data.count(b"event:"), 1
    while True:
        try:
            more = await asyncio.get_running_loop().sock_recv(sock, 65536)
        except ConnectionResetError:
            more = b""
        events += (data[-5:] + more).count(b"event:")
        data = data[-4000:] + more
        if until in data:
            sock.close()
            return events, times
        if not more:
            # Cut off, for being too slow: it goes on behind what it has heard.
            sock.close()
            last_id = re.findall(rb"id: ([0-9-]+)\\n", data)[-1].decode()
            sock, data = await connect(path, last_id=f"Last-Event-ID: {last_id}\\r\\n")
            times += 1


async def ignore(gate):
    async with gate:
        sock, _ = await connect("/events", 2048)
    await done.wait()
    # Whatever was on its way, and then the end.
    try:
        async with asyncio.timeout(20):
            while await asyncio.get_running_loop().sock_recv(sock, 2**20):
                pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    finally:
        sock.close()
    return True


async def main():
    global done
    gate, done = asyncio.Semaphore(50), asyncio.Event()
    succeeded = b'"state":"succeeded"'
    paths = [f"/jobs/{jobs[n % len(jobs)]}/events" for n in range(of_jobs)]
    readers = [asyncio.create_task(hear(path, succeeded, gate)) for path in paths]
    readers += [asyncio.create_task(hear("/events", last.encode(), gate)) for n in range(of_all)]
    others = [asyncio.create_task(ignore(gate)) for n in range(slow)]
    while listening < of_jobs + of_all + slow:
        await asyncio.sleep(0.05)
        for task in readers + others:
            if task.done():
                task.result()
    print("listening", flush=True)
    heard = await asyncio.gather(*readers)
    done.set()
    cut = await asyncio.gather(*others)
    print(json.dumps({
        "again": sum(times - 1 for _, times in heard),
        "fewest": min(events for events, _ in heard[:of_jobs]),
        "fewest_of_all": min(events for events, _ in heard[of_jobs:]),
        "cut": sum(cut),
    }), flush=True)


asyncio.run(main())
"""


@pytest.fixture
def many_files() -> Iterator[None]:
    """Each connection is an open file; the server has this limit from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * (OF_JOBS + OF_ALL + SLOW)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted) if hard < 0 else min(wanted, hard), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


class Hand:
    """A worker's side of the store: jobs run, report and end when the test says so."""

    def __init__(self, mlq: MLQ) -> None:
        self.mlq = mlq
        self.name = uuid.uuid4().hex
        mlq.store.start_worker(self.name, {}, {})

    def submit(self, number: int, actor: str) -> list[str]:
        ids = [new_id() for _ in range(number)]
        body = codec.encode_call([], {})
        self.mlq.store.submit([NewJob(id=job_id, queue="default", actor=actor, body=body) for job_id in ids])
        return ids

    def start(self, number: int, actor: str) -> list[Held]:
        store = self.mlq.store
        command = store.turn_command(self.name, uuid.uuid4().hex, number, [store.lane("default", actor)], [])
        return store.read_turn(store.connector.execute(*command, script=script("turn"))).jobs

    def report(self, held: list[Held], value: int) -> None:
        self.mlq.store.touch([(one.id, one.attempt, codec.encode(value), "n" * 200) for one in held])

    def finish(self, held: list[Held]) -> None:
        result = encode_result(Result.of(None))
        self.mlq.store.settle([Settle.finish(one.id, one.attempt, result, common_of()) for one in held])


class Probe:
    """Asks for /healthz all the time, and notes how long that takes."""

    def __init__(self, client: httpx.Client) -> None:
        self.took: list[float] = []
        self._client = client
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Probe:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.02):
            begun = time.perf_counter()
            assert "ok" == self._client.get("/healthz").text
            self.took.append(1000 * (time.perf_counter() - begun))

    @property
    def p50(self) -> float:
        return statistics.median(self.took)

    @property
    def p95(self) -> float:
        return statistics.quantiles(self.took, n=20)[-1]


def memory(pid: int) -> int:
    """What a process takes, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def test_thousands_listen_some_do_not_read_and_others_are_served(
    mlq: MLQ, tmp_path: Path, many_files: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """F30."""
    total = OF_JOBS + OF_ALL + SLOW
    hand = Hand(mlq)
    jobs, [last] = hand.submit(JOBS, "listened_to"), hand.submit(1, "the_last")
    held = hand.start(JOBS, "listened_to")
    options = json.dumps({"max_streams": total})
    arguments = ("-k", "gevent", "--worker-connections", str(total + 500), "--graceful-timeout", "1")
    with gunicorn_process(mlq, tmp_path, *arguments, OPTIONS=options) as (client, process):
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        client.get("/jobs")
        before = memory(int(worker))
        ask = [client.base_url.port, PREFIX, jobs, OF_JOBS, OF_ALL, SLOW, last]
        begun = time.monotonic()
        clients = subprocess.Popen(
            [sys.executable, "-c", CLIENTS, json.dumps(ask)], stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            assert clients.stdout is not None
            with Probe(client) as connecting:
                assert "listening\n" == clients.stdout.readline()
            connected = time.monotonic() - begun
            each = (memory(int(worker)) - before) / total
            refused = client.get("/events")
            assert (503, "TooManyStreams") == (refused.status_code, refused.json()["code"])
            with Probe(client) as busy:
                begun = time.monotonic()
                for value in range(TIMES):
                    hand.report(held, value)
                    hand.submit(FLOOD, LONG_NAME)
                    etag = client.get(f"/jobs/{jobs[0]}").headers["ETag"]
                    waited = client.get(f"/jobs/{jobs[0]}", headers={"If-None-Match": etag, "Prefer": "wait=0"})
                    assert 304 == waited.status_code
                hand.finish(held)
                hand.finish(hand.start(1, "the_last"))
                heard: dict[str, Any] = json.loads(clients.stdout.readline())
                told = time.monotonic() - begun
            assert 0 == clients.wait(10)
        finally:
            clients.kill()
            clients.communicate()
        wait_for(lambda: status_of_stream(client) == 200)
    with capsys.disabled():
        print(
            f"\n{total} streams in {connected:.1f} s, {each / 1024:.0f} KiB each; told in {told:.1f} s; "
            f"healthz p50/p95 {connecting.p50:.1f}/{connecting.p95:.1f} ms while they came, "
            f"{busy.p50:.1f}/{busy.p95:.1f} ms while they were told; {heard}"
        )
    assert SLOW == heard["cut"]
    assert heard["fewest"] >= 1 + TIMES + 1
    assert heard["fewest_of_all"] >= TIMES * (JOBS + FLOOD)
    assert each < 40 * 1024
    assert busy.p50 < (100 if QUIET else 400)


def status_of_stream(client: httpx.Client) -> int:
    with client.stream("GET", "/events") as response:
        return response.status_code
