"""Batches through a store of several servers, one of which takes over from another in the middle: each comes once, in
order, and nothing is left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Fleet, wait_for
from test_batches import SOURCES, finish, train, used
from topologies import Cluster, Sentinels

from mlqueue import Settings
from mlqueue.store.connection import Connector

pytestmark = pytest.mark.faults

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
