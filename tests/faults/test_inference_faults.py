"""A function applied to 100,000 samples by workers, while the trainer is killed: each sample once."""

from __future__ import annotations

import json
import signal
import subprocess
from functools import partial

import pytest
from harness import PATIENCE, Fleet, MakeFleet, is_alive, own_server, send, server_pid, wait_for

from mlqueue import codec

pytestmark = pytest.mark.faults

SAMPLES, BATCH = 100_000, 50
#: How long a worker takes for a batch. It is an argument of the function, and so a part of what the run is of.
SECONDS = 0.004

SOURCES = """
import os, pathlib, time
import numpy as np
import mlqueue
from mlqueue.batch.data_source import FunctionDataSource

mlq = mlqueue.MLQ({namespace!r})
DONE = pathlib.Path(__file__).with_name("done")


@mlq.data_source("rows")
def rows(n):
    return FunctionDataSource(lambda indices: (np.asarray(indices), np.sqrt(np.asarray(indices))), n)


@mlq.actor(queue_name="batches")
def predict(seconds, numbers, roots):
    fd = os.open(DONE, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, b"%d\\n" % numbers[0])
    os.close(fd)
    time.sleep(seconds)
    return numbers, np.multiply.outer(roots, np.arange(20.0))
"""

#: Goes on with the run, and checks what it gave.
TRAINER = """
import json, sys
import numpy as np
from jobs import mlq, predict, rows
from mlqueue.batch.actor_pool import ActorPool

samples, batch_size, seconds = json.loads(sys.argv[1])
with ActorPool(mlq, workers=2, lease=0.5, alone_after=None) as pool:
    numbers, values = pool.map_concat(rows(n=samples), predict, batch_size, resume="run", prepend_args=(seconds,))
    np.testing.assert_array_equal(np.arange(samples), numbers)
    np.testing.assert_array_equal(np.multiply.outer(np.sqrt(np.arange(samples)), np.arange(20.0)), values)
    print(json.dumps([len(numbers), vars(pool.stats())]))
"""


@pytest.fixture
def fleet(fleet: MakeFleet) -> MakeFleet:
    """Those that have the source and the actor."""
    return partial(fleet, actors=SOURCES)


def start(here: Fleet) -> subprocess.Popen[bytes]:
    return here.program(TRAINER, json.dumps([SAMPLES, BATCH, SECONDS]))


def finish(process: subprocess.Popen[bytes]) -> None:
    """Waits for the end of a trainer, which had something left to do."""
    out, err = process.communicate(timeout=4 * PATIENCE)
    assert process.returncode == 0, err.decode()
    count, stats = json.loads(out)
    assert count == SAMPLES
    assert stats["prepared"] > 0
    print("\n" + json.dumps(stats), flush=True)


def kept(here: Fleet) -> int:
    """How many batches the folder of the run counts."""
    try:
        return int(codec.decode((here.folder / "run" / "run").read_bytes())["batches"])
    except FileNotFoundError:
        return 0


def done(here: Fleet) -> list[int]:
    """The first samples of the batches that workers have done."""
    path = here.folder / "done"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def places_are_left(here: Fleet) -> None:
    """Waits until the workers have let go of a trainer that is gone."""
    wait_for(lambda: not list(here.mlq.store.scan(queue="batches")))


def test_a_trainer_killed_half_way_goes_on_where_it_was(fleet: MakeFleet) -> None:
    here, half = fleet(), SAMPLES // BATCH // 2
    worker = here.worker(processes=2, threads=1)
    trainer = start(here)
    wait_for(lambda: kept(here) >= half or trainer.poll() is not None)
    send(signal.SIGKILL, [trainer.pid])
    trainer.wait()
    at = kept(here)
    assert half <= at < SAMPLES // BATCH
    places_are_left(here)
    before = len(done(here))
    assert before - at < 800, "no more is lost than was done since the last save, and was under way"
    finish(start(here))
    assert list(range(at * BATCH, SAMPLES, BATCH)) == sorted(done(here)[before:])
    worker.stop()


def test_killed_trainers_workers_and_a_restarted_store(fleet: MakeFleet) -> None:
    with own_server() as store:
        here = fleet(store=store)
        worker = here.worker(processes=3, threads=1)
        batches = SAMPLES // BATCH
        for part in range(1, 5):
            trainer = start(here)
            goal = part * batches // 7
            wait_for(lambda goal=goal, trainer=trainer: kept(here) >= goal // 2 or trainer.poll() is not None)
            send(signal.SIGKILL, [pid for pid in worker.pids() if is_alive(pid)][:1])
            if part == 2:
                send(signal.SIGKILL, [server_pid(store)])
            wait_for(lambda goal=goal, trainer=trainer: kept(here) >= goal or trainer.poll() is not None)
            send(signal.SIGKILL, [trainer.pid])
            trainer.wait()
        finish(start(here))
        worker.stop()
