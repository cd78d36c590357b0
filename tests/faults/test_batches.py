"""Batches prepared by workers that are killed, stopped and cut off from their store: each comes once, in order, the
same as without workers; and nothing is left of trainers that are killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from harness import LONG, PATIENCE, Fleet, MakeFleet, Worker, is_alive, own_server, send, server_pid, tree, wait_for

pytestmark = pytest.mark.faults

SOURCES = """
import os, pathlib, time
import numpy as np
import mlqueue
from mlqueue.batch.data_source import FunctionDataSource

mlq = mlqueue.MLQ({namespace!r})
FOLDER = pathlib.Path(__file__).parent


class Rows:
    def __init__(self, seconds):
        self.seconds = seconds

    def __call__(self, indices):
        time.sleep(self.seconds)
        return np.asarray(indices), np.sqrt(np.asarray(indices))[:, None] * np.arange(500)


def noise(rows, values, rng):
    return rows, values + rng.normal(size=values.shape)


@mlq.data_source("rows")
def rows(n, seconds=0.0):
    return FunctionDataSource(Rows(seconds), n).map(noise)
"""

#: Trains on one epoch: each batch is compared with that of the source itself, and noted. It goes on where the state
#: says; the state and the note are one write.
TRAINER = r"""
import json, os, pathlib, sys
import numpy as np
from jobs import FOLDER, mlq, rows
from mlqueue.batch.actor_pool import ActorPool

samples, seconds, lease, workers = json.loads(sys.argv[1])
place = FOLDER / "place"
with ActorPool(mlq, workers=workers, errors="retry", retries=50, lease=lease, alone_after=None) as pool:
    batches = pool.parallel_data_source(rows(n=samples, seconds=seconds), 12).batch_iterator(4, shuffle=7)
    serial = rows(n=samples).batch_iterator(4, shuffle=7)
    used = []
    if place.exists():
        state, used = json.loads(place.read_text())
        batches.load_state_dict(state)
        serial.load_state_dict({name: value for name, value in state.items() if name != "pool"})
    with (FOLDER / "sockets").open("a") as file:
        file.write(pool._crew.desk.listener.address["host"]["socket"].decode().replace("\0", "@") + "\n")
    (FOLDER / "begun").touch()
    for batch in batches:
        for one, other in zip(batch, next(serial), strict=True):
            np.testing.assert_array_equal(one, other)
        used += batch[0].tolist()
        new = FOLDER / "place.new"
        if len(used) % 40 == 0:
            new.write_text(json.dumps([batches.state_dict(), used]))
            new.replace(place)
            (FOLDER / "count").write_text(str(len(used)))
    assert next(serial, None) is None
    print(json.dumps([sorted(used) == list(range(samples)), len(used), vars(pool.stats())]))
"""


@pytest.fixture
def fleet(fleet: MakeFleet) -> MakeFleet:
    """Those that prepare batches of these sources."""
    return partial(fleet, actors=SOURCES)


def train(here: Fleet, batches: int, seconds: float = 0.002, lease: float = 0.5, workers: int = 2) -> Any:
    """Starts a trainer; returns when it has begun."""
    begun = here.folder / "begun"
    begun.unlink(missing_ok=True)
    process = here.program(TRAINER, json.dumps([batches * 4, seconds, lease, workers]))
    wait_for(lambda: begun.exists() or process.poll() is not None)
    return process


def finish(process: subprocess.Popen[bytes], batches: int) -> dict[str, Any]:
    """Waits for the end of a trainer; what its pool counted."""
    out, err = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 0, err.decode()
    whole, used, stats = json.loads(out)
    assert (whole, used) == (True, batches * 4)
    print("\n" + json.dumps(stats), flush=True)
    counted: dict[str, Any] = stats
    return counted


def used(here: Fleet) -> int:
    try:
        return int((here.folder / "count").read_text() or 0)
    except FileNotFoundError:
        return 0


def assert_nothing_left(here: Fleet, *workers: Worker) -> None:
    """No job, no socket, no shared memory and no descriptor of it, a moment after the end of a trainer."""

    sockets = (here.folder / "sockets").read_text().split()
    assert sockets

    def left() -> list[str]:
        found = [str(path) for path in Path("/dev/shm").glob("*mlqueue*")]
        found += [line for line in Path("/proc/net/unix").read_text().splitlines() if line.split()[-1] in sockets]
        found += [key.decode() for key in here.mlq.client.scan_iter(f"{here.mlq.store.root}:[jbrex]:*", count=1000)]
        found += ["pools"] if here.mlq.client.ttl(f"{here.mlq.store.root}:pools") == -1 else []
        for worker in workers:
            for pid in tree(worker.pid):
                for link in Path(f"/proc/{pid}/fd").glob("*"):
                    try:
                        if "mlqueue-batch" in os.readlink(link):
                            found.append(f"{pid}: {os.readlink(link)}")
                    except OSError:
                        pass
        return found

    wait_for(lambda: not left(), what=left)


def test_workers_killed_every_half_second(fleet: MakeFleet) -> None:
    batches = 5000 if LONG else 700
    here = fleet()
    worker = here.worker(processes=3, threads=1)
    trainer = train(here, batches, 0.015, workers=3)
    chance, killed = random.Random(5), 0
    while trainer.poll() is None:
        time.sleep(0.5)
        alive = [pid for pid in worker.pids() if is_alive(pid)]
        if alive:
            send(signal.SIGKILL, [chance.choice(alive)])
            killed += 1
    stats = finish(trainer, batches)
    assert killed >= 10
    assert stats["retries"] > 0
    assert_nothing_left(here, worker)
    worker.stop()


def test_stopped_workers_a_lost_supervisor_and_a_restarted_store(fleet: MakeFleet) -> None:
    batches = 5000 if LONG else 1400
    with own_server() as store:
        here = fleet(store=store)
        first, second = here.worker(processes=2, threads=1), here.worker(processes=2, threads=1)
        trainer = train(here, batches, 0.012, workers=2)
        wait_for(lambda: used(here) > batches // 10)
        for number in range(10 if LONG else 2):
            victims = [pid for pid in first.pids() + second.pids() if is_alive(pid)][:2]
            send(signal.SIGSTOP, victims)
            begun, at = time.monotonic(), used(here)
            # Now and then for so long that they are cut off, which is after five leases, and go on after that.
            until = begun + (3.5 if number % 2 else 0)
            wait_for(
                lambda at=at, until=until: (
                    (used(here) > at + 60 and time.monotonic() > until) or trainer.poll() is not None
                )
            )
            send(signal.SIGCONT, victims)
        os.kill(server_pid(store), signal.SIGKILL)
        at = used(here)
        wait_for(lambda: used(here) > at + 60 or trainer.poll() is not None)
        first.kill_all()
        finish(trainer, batches)
        assert_nothing_left(here, second)
        second.stop()


def test_a_trainer_that_is_killed_goes_on_with_the_batch_that_it_had_not_used(fleet: MakeFleet) -> None:
    batches = 1000 if LONG else 400
    here = fleet()
    worker = here.worker(processes=2, threads=1)
    for part in range(1, 4):
        trainer = train(here, batches, 0.004)
        wait_for(lambda part=part, trainer=trainer: used(here) > part * batches or trainer.poll() is not None)
        send(signal.SIGKILL, [trainer.pid])
        trainer.wait()
        assert_nothing_left(here, worker)
    finish(train(here, batches, 0.0), batches)
    assert_nothing_left(here, worker)
    worker.stop()
