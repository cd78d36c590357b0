"""A server that is lost in mid-load, with a replica to take over: of a Sentinel's master, and of a cluster's part."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Fleet, tree
from test_store_faults import Submitter
from topologies import Cluster, Sentinels

from mlqueue import Settings

pytestmark = pytest.mark.faults

#: How long submits and workers may be without a server, in seconds.
COMMAND_TIMEOUT = 30

Make = Callable[..., Fleet]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Make]:
    with contextlib.ExitStack() as stack:

        def make(url: str, **options: Any) -> Fleet:
            settings = Settings.load({}, url=url)
            one = Fleet(tmp_path / "fleet", settings, lease=2, command_timeout=COMMAND_TIMEOUT, **options)
            stack.callback(one.close, forget=False)
            return one

        yield make


class Killer:
    """A thread that kills a worker's child again and again (F1)."""

    def __init__(self, supervisor: int) -> None:
        self.faults: list[tuple[float, int]] = []
        self._supervisor = supervisor
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._enough.wait(random.uniform(0.5, 1.5)):
            victims = [pid for pid in tree(self._supervisor) if pid != self._supervisor]
            if victims:
                pid = random.choice(victims)
                self.faults.append((time.time(), pid))
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def stop(self) -> list[tuple[float, int]]:
        self._enough.set()
        self._thread.join()
        return self.faults


def hurt(here: Fleet, name: str, lose: Callable[[], None]) -> None:
    """Load, workers' processes killed all the time, and a server lost in the middle of it: all jobs run, once."""
    worker = here.worker(processes=2, threads=4)
    submitters = [Submitter(here, args=(0.02,), pause=0.005) for _ in range(2)]
    killer = Killer(worker.process.pid)
    go_on(submitters, 100)
    before = [len(submitter.jobs) for submitter in submitters]
    lose()
    go_on(submitters, 100)
    faults = killer.stop()
    jobs = [job for submitter in submitters for job in submitter.stop()]
    assert [error for submitter in submitters for error in submitter.errors] == []
    here.wait_drained(90)
    submit_again(here, [job for one, at in zip(submitters, before, strict=True) for job in one.jobs[at - 2 : at + 2]])
    report = here.audit(name, jobs, faults=faults)
    # What the lost server knew and its successor did not was done again.
    report.finish()
    assert (report.lost, report.ok, len(faults) > 0) == (0, len(jobs), True)
    worker.stop()


def submit_again(here: Fleet, last: list[Any]) -> None:
    """Replication is asynchronous: of what was acknowledged in the last moment the successor may not know. Submitted
    again, as docs/explanation/fail-over.md says, it is there once."""
    for job, record in zip(last, here.records(last), strict=True):
        if record is None:
            here.mlq.submit("work", 0.02, job_id=job.id)
    here.wait_drained(90)


def go_on(submitters: list[Submitter], number: int) -> None:
    goals = [len(submitter.jobs) + number for submitter in submitters]
    deadline = time.monotonic() + 60
    while any(len(one.jobs) < goal for one, goal in zip(submitters, goals, strict=True)):
        assert time.monotonic() < deadline, [one.errors for one in submitters]
        threading.Event().wait(0.02)


def test_sentinels_replace_a_master_that_is_killed_in_mid_load(tmp_path: Path, fleet: Make) -> None:
    with contextlib.closing(Sentinels(tmp_path / "servers", 3)) as servers:
        here = fleet(servers.url)

        def lose() -> None:
            servers.first.end(signal.SIGKILL)

        hurt(here, "sentinel_master_killed", lose)
        assert servers.master_port() == servers.second.port


def test_sentinels_of_which_one_is_lost_too_replace_a_master_that_hangs(tmp_path: Path, fleet: Make) -> None:
    with contextlib.closing(Sentinels(tmp_path / "servers", 3)) as servers:
        here = fleet(servers.url, socket_timeout=2)

        def lose() -> None:
            servers.sentinels[0].end(signal.SIGKILL)
            servers.first.signal(signal.SIGSTOP)

        hurt(here, "sentinel_master_hangs", lose)
        assert servers.master_port() == servers.second.port


def test_a_cluster_replaces_a_server_that_is_killed_in_mid_load(tmp_path: Path, fleet: Make) -> None:
    with contextlib.closing(Cluster(tmp_path / "servers")) as servers:
        here = fleet(servers.url)

        def lose() -> None:
            servers.nodes[0].end(signal.SIGKILL)

        hurt(here, "cluster_server_killed", lose)
        assert servers.is_master(servers.nodes[3])
