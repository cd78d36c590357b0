"""Batches prepared on another host, whose link is cut for 20 seconds: each comes once, in order, bit for bit as without
workers, and nothing is left on either host."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import LONG, PATIENCE, Worker, is_alive, send, wait_for
from test_batches import SOURCES, assert_nothing_left, finish, train, used
from two_hosts import FIRST, FleetOfTwo, HostServer, TwoHosts, Unavailable, connections

pytestmark = pytest.mark.faults

KEY = "a key of two hosts that nobody else has"
#: For how long the link is cut, in seconds.
CUT = 20.0

MORE_SOURCES = (
    SOURCES
    + """

@mlq.data_source("ramps")
def ramps(n):
    return FunctionDataSource(lambda indices: (np.asarray(indices), np.tile(np.arange(40_000), (len(indices), 1))), n)
"""
)

#: Compares batches of any size, order and buffer with those of the source itself.
PROPERTIES = r"""
import itertools, json, random, sys
import numpy as np
from jobs import mlq, ramps, rows
from mlqueue.batch.actor_pool import ActorPool

chance, count = random.Random(11), int(sys.argv[1])
with ActorPool(mlq, workers=2, alone_after=None) as pool:
    for number in range(count):
        n, size, ahead, seed = (chance.randrange(1, most) for most in (400, 90, 12, 9))
        source = rows(n=n) if number % 3 else ramps(n=min(n, 60))
        expected = source.batch_iterator(size, shuffle=seed)
        with pool.parallel_data_source(source, ahead).batch_iterator(size, shuffle=seed) as given:
            for one, other in itertools.zip_longest(expected, given):
                for a, b in zip(one, other, strict=True):
                    assert a.dtype == b.dtype
                    np.testing.assert_array_equal(a, b)
    print(json.dumps(vars(pool.stats())))
"""


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    made = TwoHosts()
    try:
        made.open()
        yield made
    except Unavailable as reason:
        pytest.skip(f"two hosts by network namespaces are not possible here: {reason}")
    finally:
        made.close()


Open = Callable[..., FleetOfTwo]


@pytest.fixture
def site(hosts: TwoHosts, tmp_path: Path) -> Iterator[Open]:
    """Makes a fleet over both hosts, with its store on the first."""
    store = HostServer(tmp_path / "store", hosts.first).start()
    made: list[FleetOfTwo] = []

    def make(**settings: Any) -> FleetOfTwo:
        made.append(FleetOfTwo(tmp_path / f"site-{len(made)}", store, actors=MORE_SOURCES, signing_key=KEY, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()
    store.close()


#: What leaves only one way between the hosts: TCP is taken by itself, unless the trainer listens where it cannot be
#: reached.
SETTINGS = {"TCP": {}, "the store": {"batches_bind": "127.0.0.1"}}


def workers_on(here: FleetOfTwo, host: str, processes: int = 2) -> Worker:
    with here.on(host):
        return here.worker(processes=processes, threads=1)


def assert_no_trace(here: FleetOfTwo, *workers: Worker) -> None:
    assert_nothing_left(here, *workers)

    def left() -> list[str]:
        found = [key.decode() for key in here.mlq.client.scan_iter(f"{here.mlq.store.root}:batches:*", count=1000)]
        return found + [line for worker in workers for line in connections(worker.pid, here.port)]

    wait_for(lambda: not left(), what=left)


@pytest.mark.parametrize("way", sorted(SETTINGS))
def test_batches_of_another_host_are_those_of_the_source(hosts: TwoHosts, site: Open, way: str) -> None:
    here = site(**SETTINGS[way])
    worker = workers_on(here, hosts.second)
    done = here.program(PROPERTIES, str(60 if LONG else 20))
    out, err = done.communicate(timeout=4 * PATIENCE)
    assert done.returncode == 0, err.decode()
    stats = json.loads(out)
    assert stats["transport"].startswith(way)
    assert (stats["here"], stats["retries"]) == (0, 0)
    expected = f"TCP to {FIRST}:" if way == "TCP" else "the store (redis://"
    worker.wait_line(f"brings batches to a trainer by {expected}")
    worker.wait_line("because not by host: ")
    assert_quiet_end(here, worker)


def assert_quiet_end(here: FleetOfTwo, worker: Worker) -> None:
    (here.folder / "sockets").write_text("@none")
    assert_no_trace(here, worker)
    worker.stop()


@pytest.mark.parametrize(
    "way", [way if way == "TCP" else pytest.param(way, marks=pytest.mark.faults_long) for way in sorted(SETTINGS)]
)
def test_a_link_that_is_cut_for_20_seconds_while_workers_are_killed(hosts: TwoHosts, site: Open, way: str) -> None:
    batches = 4000 if LONG else 1000
    here = site(**SETTINGS[way])
    worker = workers_on(here, hosts.second)
    trainer = train(here, batches, 0.008)
    for round_ in range(2 if LONG else 1):
        wait_for(lambda round_=round_: used(here) > (1 + round_) * batches // 2 or trainer.poll() is not None)
        kill_one(worker)
        hosts.cut()
        time.sleep(CUT)  # what the test is about
        during = used(here)
        hosts.heal()
        wait_for(lambda during=during: used(here) > during + 100 or trainer.poll() is not None)
        kill_one(worker)
    stats = finish(trainer, batches)
    assert stats["transport"].startswith(way)
    assert stats["retries"] > 0
    assert_no_trace(here, worker)
    worker.stop()


def test_workers_of_both_hosts_go_on_alone_while_the_link_is_cut(hosts: TwoHosts, site: Open) -> None:
    batches = 5000 if LONG else 2500
    here = site()
    near, far = workers_on(here, hosts.first, 1), workers_on(here, hosts.second, 1)
    trainer = train(here, batches, 0.02)

    def ways() -> list[str]:
        return [told["transport"] for told in here.mlq.store.pools().values()]

    wait_for(lambda: ways() == ["TCP, shared memory"], what=ways)
    hosts.cut()
    at = used(here)
    begun = time.monotonic()
    wait_for(lambda: used(here) > at + 400 or trainer.poll() is not None)
    assert time.monotonic() - begun < CUT, "the worker that is there goes on"
    wait_for(lambda: ways() == ["shared memory"], what=ways)
    time.sleep(max(0.0, begun + CUT - time.monotonic()))
    hosts.heal()
    wait_for(lambda: ways() == ["TCP, shared memory"] or trainer.poll() is not None, what=ways)
    assert trainer.poll() is None, "the other host came back in time"
    finish(trainer, batches)
    assert_no_trace(here, near, far)
    near.stop()
    far.stop()


@pytest.mark.faults_long  # it waits until the store forgets the parts of batches by itself
def test_a_trainer_that_is_killed_leaves_nothing_on_the_other_host(hosts: TwoHosts, site: Open) -> None:
    for way in sorted(SETTINGS):
        here = site(**SETTINGS[way])
        worker = workers_on(here, hosts.second)
        trainer = train(here, 1000, 0.002)
        wait_for(lambda here=here, trainer=trainer: used(here) > 200 or trainer.poll() is not None)
        send(signal.SIGKILL, [trainer.pid])
        trainer.wait()
        wait_for(lambda here=here, worker=worker: not connections(worker.pid, here.port))
        # What went through the store expires.
        wait_for(lambda here=here: not list(here.mlq.client.scan_iter(f"{here.mlq.store.root}:batches:*")), 90)
        finish(train(here, 1000, 0.0), 1000)
        assert_no_trace(here, worker)
        worker.stop()


def test_on_a_slow_link_batches_are_compressed(hosts: TwoHosts, site: Open) -> None:
    try:
        hosts.slow_down("80mbit")
    except Unavailable as reason:
        pytest.skip(f"the link cannot be made slow: {reason}")
    here = site()
    worker = workers_on(here, hosts.second, 1)
    done = here.program(SLOW)
    out, err = done.communicate(timeout=PATIENCE)
    assert done.returncode == 0, err.decode()
    assert json.loads(out)["transport"] in ("TCP with lz4", "TCP with zstd")
    assert worker.lines("batches go to the trainer compressed with")
    assert_quiet_end(here, worker)


SLOW = r"""
import json
import numpy as np
from jobs import mlq, ramps
from mlqueue.batch.actor_pool import ActorPool

with ActorPool(mlq, workers=1, alone_after=None) as pool:
    with pool.parallel_data_source(ramps(n=100), 6).batch_iterator(5) as batches:
        for rows, values in batches:
            np.testing.assert_array_equal(values, np.tile(np.arange(40_000), (len(rows), 1)))
        print(json.dumps(vars(pool.stats())))
"""


def kill_one(worker: Worker) -> None:
    alive = [pid for pid in worker.pids() if is_alive(pid)]
    if alive:
        send(signal.SIGKILL, alive[:1])


def test_the_way_between_two_hosts_can_be_cut(hosts: TwoHosts) -> None:
    """The tests above would show nothing if it could not."""

    def reaches() -> bool:
        # Nobody listens at port 9: a host that is reached refuses.
        code = f"import errno, socket, sys; s = socket.socket(); s.settimeout(1); found = s.connect_ex(({FIRST!r}, 9))"
        command = [
            "ip",
            "netns",
            "exec",
            hosts.second,
            sys.executable,
            "-c",
            f"{code}; sys.exit(found != errno.ECONNREFUSED)",
        ]
        return subprocess.run(command, check=False).returncode == 0

    assert reaches()
    hosts.cut()
    assert not reaches()
    hosts.heal()
    assert reaches()
