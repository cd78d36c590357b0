"""Batches whose store changes places with another, is killed, or is killed and started again, in the middle: each comes
once, in order, the same as without workers, and nothing is left."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Fleet, Worker, wait_for
from servers import OwnServer
from test_batches import SOURCES, finish, train, used
from topologies import Cluster, Sentinels

from mlqueue import Settings
from mlqueue.store.connection import Connector

pytestmark = pytest.mark.faults

Popen = subprocess.Popen[bytes]

BATCHES = 600


@pytest.fixture(params=["sentinels", "cluster"])
def servers(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Sentinels | Cluster]:
    make = {"sentinels": Sentinels, "cluster": Cluster}[request.param]
    with contextlib.closing(make(tmp_path / "servers")) as made:
        yield made


@pytest.mark.parametrize("apart", [False, True], ids=["in the store of the jobs", "in a store of their own"])
def test_batches_through_servers_that_change_places(
    servers: Sentinels | Cluster, tmp_path: Path, server: Settings, apart: bool
) -> None:
    """Who knows where the keys are, is asked again after it."""
    given = {"batches_store": servers.url, "lease": 2, "command_timeout": 30}
    jobs = server if apart else Settings.load({}, url=servers.url)
    if not apart:
        del given["batches_store"]
    here = Fleet(tmp_path / "fleet", jobs, actors=SOURCES, **given)
    try:
        here.environment["MLQUEUE_BATCHES_WAYS"] = "store"
        worker = here.worker(processes=2, threads=1)
        here.environment["MLQUEUE_BATCHES_WAYS"] = "host,store"  # the trainer notes its socket
        trainer = train(here, BATCHES, 0.01)
        wait_for(lambda: used(here) > BATCHES or trainer.poll() is not None)
        assert trainer.poll() is None
        servers.fail_over()
        stats = finish(trainer, BATCHES)
        assert stats["transport"] == "the store"
        assert worker.lines("brings batches to a trainer by the store (redis+")
        assert stats["here"] == 0
        with contextlib.closing(Connector(Settings.load({}, url=servers.url), here.mlq.store.root)) as connector:
            wait_for(lambda: not [key for keys in connector.scan(f"{connector.root}:batches:*", 1000) for key in keys])
        worker.stop()
    finally:
        here.close(forget=apart)


#: How batches travel as between hosts, and what the trainer's pool calls it.
WAYS = {"tcp": "TCP", "store": "the store"}


@contextlib.contextmanager
def between_hosts(folder: Path, way: str, url: str) -> Iterator[tuple[Fleet, Worker, Popen]]:
    """A fleet, its worker and a trainer, that have no way to each other but this one."""
    given = {"lease": 2, "command_timeout": 30, "signing_key": "a key that both have", "batches_bind": "127.0.0.1"}
    here = Fleet(folder, Settings.load({}, url=url), actors=SOURCES, **given)
    try:
        here.environment["MLQUEUE_BATCHES_WAYS"] = way
        worker = here.worker(processes=2, threads=1)
        here.environment["MLQUEUE_BATCHES_WAYS"] = f"host,{way}"  # the trainer notes its socket
        yield here, worker, train(here, BATCHES, 0.01)
        worker.stop()
    finally:
        here.close(forget=False)


def until(here: Fleet, trainer: Popen, samples: int) -> None:
    """Returns when the trainer has used so many."""
    wait_for(lambda: used(here) >= samples or trainer.poll() is not None, what=here.logs)
    assert trainer.poll() is None, trainer.communicate()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("keeps", [True, False], ids=["with its file", "without one"])
def test_batches_while_their_store_is_killed_and_started_again(tmp_path: Path, way: str, keeps: bool) -> None:
    """By TCP they flow on meanwhile. What a store without a file has lost is prepared anew, and workers come again."""
    store = OwnServer(tmp_path / "store", **({} if keeps else {"appendonly": "no"}))
    with contextlib.closing(store.start()), between_hosts(tmp_path / "fleet", way, store.url) as (here, _, trainer):
        for part in (1, 2, 3):
            until(here, trainer, part * BATCHES)
            store.end(signal.SIGKILL)
            if way == "tcp":
                until(here, trainer, used(here) + 80)
            store.start()
        stats = finish(trainer, BATCHES)
        assert (WAYS[way], 0) == (stats["transport"], stats["here"])
        assert way == "tcp" or stats["retries"] > 0, "what was on its way through the store was prepared anew"
        with store.client() as client:
            wait_for(lambda: not [*client.scan_iter(f"{here.mlq.store.root}:batches:*", count=1000)])


@pytest.mark.parametrize("way", WAYS)
def test_batches_while_a_server_is_killed_and_another_takes_over(
    servers: Sentinels | Cluster, tmp_path: Path, way: str
) -> None:
    """What it had of batches is prepared anew."""
    with between_hosts(tmp_path / "fleet", way, servers.url) as (here, _, trainer):
        until(here, trainer, BATCHES)
        lost = servers.first if isinstance(servers, Sentinels) else servers.nodes[0]
        lost.end(signal.SIGKILL)
        stats = finish(trainer, BATCHES)
        assert (WAYS[way], 0) == (stats["transport"], stats["here"])
        assert way == "tcp" or stats["retries"] > 0, "what was on its way through the store was prepared anew"
        with contextlib.closing(Connector(Settings.load({}, url=servers.url), here.mlq.store.root)) as connector:
            wait_for(lambda: not [key for keys in connector.scan(f"{connector.root}:batches:*", 1000) for key in keys])
