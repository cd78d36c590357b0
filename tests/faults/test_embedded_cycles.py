"""The embedded server under kill -9, again and again, while clients submit all the time.

Whoever needs the store starts it again: workers and clients do so at the same moment, and one of them wins.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import ACTORS, LONG, PATIENCE, Fleet, Worker, is_alive, send, tree, wait_for

from mlqueue import Settings
from mlqueue.embedded import EmbeddedServer, ServerStatus

pytestmark = pytest.mark.faults

CYCLES = int(os.environ.get("FAULTS_CYCLES", "60" if LONG else "10"))

#: How long a cycle goes on after everything works again, in seconds.
WORK = (0.05, 0.4)

#: A client: what it was told exists is in a file before it goes on. Its id says which of its submits that was.
CLIENT = """
import os, sys, time
import mlqueue
from jobs import mlq, work

acknowledged, failed = (os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT) for name in ("acknowledged", "failed"))
attempted = os.open("attempted", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
number = 0
while not os.path.exists("enough"):
    os.write(attempted, b".")
    number += 1
    try:
        if number % 25 == 0:
            job = work.submit(0.2)
        elif number % 25 == 10:
            job = work.with_options(delay=0.2).submit()
        else:
            job = work.submit()
    except mlqueue.StoreError as error:
        os.write(failed, f"{error}\\n".encode())
    else:
        os.write(acknowledged, f"{job.id}\\n".encode())
    time.sleep(0.02)
mlq.close()
"""


class Place:
    """A folder with an embedded server, a worker and clients that are killed and started again."""

    def __init__(self, folder: Path, durability: str) -> None:
        self.home = folder / "home"
        settings = Settings.load(
            {}, home=self.home, durability=durability, server_grace=2.0, lease=5.0, max_stalls=10**6
        )
        self.fleet = Fleet(folder / "fleet", settings, actors=ACTORS)
        self.server = EmbeddedServer(self.home)
        self.worker: Worker | None = None
        self.clients: list[subprocess.Popen[bytes]] = []
        #: Processes that have to be gone. Forgotten when they are: their numbers come again.
        self.killed: set[int] = set()

    def start_clients(self, count: int = 2) -> None:
        self.clients = [self.fleet.program(CLIENT) for _ in range(count)]

    def kill(self, pids: list[int]) -> None:
        send(signal.SIGKILL, pids)
        self.killed.update(pids)

    def wait_gone(self) -> None:
        """Waits until none of what was killed is there."""
        wait_for(lambda: not any(map(is_alive, self.killed)), 10)
        self.killed.clear()

    def status(self) -> ServerStatus:
        return wait_for(self.server.status)

    def servers(self) -> list[int]:
        """Processes whose current folder is the server's, which is how a server of any program is known."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if Path(os.readlink(entry / "cwd")) == self.home:
                    found.append(int(entry.name))
        return found

    def keepers(self) -> list[int]:
        """Processes that have the folder in their command line."""
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes()
                if b"_keeper.py" in words and os.fsencode(self.home) in words:
                    found.append(int(entry.name))
        return found

    def lines(self, name: str) -> list[str]:
        path = self.fleet.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def wait_more(self) -> float:
        """Waits until a client has been told of another job, and that job has run; how long that took, in seconds."""
        begun = time.monotonic()
        known = len(self.lines("acknowledged"))
        newest = wait_for(lambda: self.lines("acknowledged")[known:], PATIENCE, self.fleet.logs)[0]
        wait_for(lambda: self.fleet.ledger.of(newest, "end"), PATIENCE, self.fleet.logs)
        return time.monotonic() - begun

    def close(self) -> None:
        (self.fleet.folder / "enough").touch()
        self.fleet.close(forget=False)
        self.server.stop(PATIENCE)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> Iterator[Place]:
    # A short path, since the socket is in there.
    with tempfile.TemporaryDirectory(prefix="mlq-", ignore_cleanup_errors=True) as folder:
        one = Place(Path(folder).resolve(), request.getfixturevalue("durability"))
        try:
            yield one
        finally:
            one.close()


def kill_supervisor(place: Place) -> None:
    """Its children end by themselves, and another one goes on."""
    assert place.worker is not None
    supervisor, *children = tree(place.worker.pid)
    place.kill([supervisor])
    place.killed.update(children)
    place.worker.process.wait()
    wait_for(lambda: not any(map(is_alive, children)), 10)
    place.worker = place.fleet.worker(processes=1, threads=4, ready=False)


def kill_everything(place: Place) -> None:
    """Worker, clients, keeper and server, at the same moment; then all are started at the same moment."""
    assert place.worker is not None
    status = place.status()
    pids = [*tree(place.worker.pid), *(client.pid for client in place.clients), status.pid]
    if status.keeper_pid is not None:
        pids.append(status.keeper_pid)
    random.shuffle(pids)
    place.kill(pids)
    for process in (place.worker.process, *place.clients):
        process.wait()
    place.worker = place.fleet.worker(processes=1, threads=4, ready=False)
    place.start_clients()


def kill_server(place: Place) -> None:
    """The server alone: its keeper sees it and goes, and whoever needs the store starts it again."""
    place.kill([place.status().pid])


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("durability", [pytest.param("everysec", marks=pytest.mark.faults_long), "always"])
@pytest.mark.parametrize("fault", [kill_supervisor, kill_everything, kill_server])
def test_no_acknowledged_job_is_lost_and_no_process_is_left(place: Place, fault: object, durability: str) -> None:
    assert callable(fault)
    name = f"embedded_{fault.__name__}_{durability}"
    place.worker = place.fleet.worker(processes=1, threads=4)
    place.start_clients()
    place.wait_more()
    longest = 0.0
    for _ in range(CYCLES):
        threading.Event().wait(random.uniform(*WORK))
        fault(place)
        longest = max(longest, place.wait_more())
        # The news of the job may have been on its way when the server was killed.
        assert len(wait_for(place.servers)) == 1, "two servers on one folder"
        assert len(wait_for(place.keepers)) == 1, "two keepers of one folder"
        place.wait_gone()

    (place.fleet.folder / "enough").touch()
    for client in place.clients:
        assert client.wait(PATIENCE) == 0, client.stderr.read() if client.stderr else ""
    place.fleet.wait_drained()
    acknowledged = place.lines("acknowledged")
    attempted = sum(map(len, place.lines("attempted")))
    report = place.fleet.audit(name, acknowledged, attempted=attempted)
    report.max_recovery_s = round(longest, 3)
    # A client that cannot reach the store waits for longer than all of this takes.
    for error in place.lines("failed"):
        report.note(f"a submit failed: {error}")
    report.finish()
    assert len(acknowledged) > 5 * CYCLES

    # When nobody needs it any more the server goes too.
    place.worker.stop()
    place.fleet.mlq.close()
    wait_for(lambda: not place.servers() and not place.keepers(), 20)
    place.wait_gone()


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("durability", ["everysec"])
def test_those_who_start_at_the_same_moment_share_one_server(place: Place, durability: str) -> None:
    for round_ in range(CYCLES if LONG else 3):
        place.start_clients(2)
        place.worker = place.fleet.worker(processes=1, threads=2, ready=False)
        # Each of them has been told of jobs, so each has found a server; there is one.
        place.wait_more()
        wait_for(lambda: place.status().clients)
        assert len(place.servers()) == len(place.keepers()) == 1, round_
        status = place.status()
        place.worker.kill_all()
        place.kill([*(client.pid for client in place.clients), status.pid, status.keeper_pid or status.pid])
        for client in place.clients:
            client.wait()
        place.wait_gone()
        assert place.servers() == []
    place.fleet.worker(processes=1, threads=4)
    place.fleet.wait_drained()
    acknowledged = place.lines("acknowledged")
    report = place.fleet.audit("embedded_two_starters", acknowledged, attempted=sum(map(len, place.lines("attempted"))))
    report.finish()
