"""The user's module of the tests of pools of actors: sources, plain ones and registered ones, and what goes wrong."""

from __future__ import annotations

import os
import random
import signal
import tempfile
import time
from pathlib import Path

import numpy as np

import mlqueue
from mlqueue.batch.actor_pool import ActorPool
from mlqueue.batch.data_source import (
    ArrayDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    FunctionDataSource,
)
from mlqueue.batch.sampling import WeightedSampler

mlq = mlqueue.MLQ(os.environ["BATCH_TESTS_NAMESPACE"])
#: Where the sources of these tests leave marks and look for instructions.
FOLDER = Path(os.environ["BATCH_TESTS_FOLDER"])

N = 203
X = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
Y = np.arange(N, dtype=np.int32)

# Has workers serve the queue of plain sources too.
declared = ActorPool(mlq), ActorPool(mlq, "drained")


@mlq.actor(queue_name="batches")
def other():
    return 7


def arrays(**options):
    return ArrayDataSource([X, Y], **options)


def add_noise(x, y, rng):
    return x + rng.normal(size=x.shape).astype(np.float32), y


def draw_globally(x, y):
    return x + np.random.random(x.shape) + random.random(), y


def scale_in_place(x, y):
    x *= 2
    return x, y


def to_dict(x, y):
    return {"x": x, "y": y}


def ragged(indices):
    return (np.concatenate([np.full(i % 7, i) for i in indices] or [np.zeros(0)]), [f"name {i}" for i in indices])


SOURCES = {
    "arrays": lambda: arrays(),
    "subset, repeated": lambda: arrays(indices=np.arange(3, 90), repeats=3),
    "with indices": lambda: arrays(include_indices=True),
    "dict": lambda: ArrayDataSource({"x": X, "y": Y}),
    "weighted": lambda: arrays(sampler=WeightedSampler(np.arange(1, N + 1))),
    "composite": lambda: CompositeDataSource([arrays(), ArrayDataSource([X[:50]], repeats=-1)]),
    "nested": lambda: CompositeDataSource([arrays(), arrays(indices=np.arange(20, 100))], flatten=False),
    "choice": lambda: ChoiceDataSource([arrays(), ArrayDataSource([X[:50] + 9, Y[:50]])], stratified=True),
    "mapped": lambda: arrays().map(scale_in_place),
    "mapped with noise": lambda: arrays().map(add_noise),
    "noisy parts": lambda: CompositeDataSource([arrays().map(add_noise), arrays().map(add_noise)]),
    "mapped to dicts": lambda: arrays().map(to_dict),
    "ragged, with texts": lambda: FunctionDataSource(ragged, N),
}


@mlq.data_source("any")
def any_source(kind):
    mark(f"made any {kind}")
    return SOURCES[kind]()


@mlq.data_source("wide")
def wide(rows, columns):
    return ArrayDataSource([np.random.default_rng(rows).random((rows, columns))])


@mlq.data_source("drawn")
def drawn():
    return arrays().map(draw_globally)


def mark(text):
    """Appends a line to the marks."""
    fd = os.open(FOLDER / "marks", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, f"{os.getpid()} {text}\n".encode())
    os.close(fd)


def fault_version():
    return "1"


@mlq.data_source("faulty")
def faulty(how, bad=50, seconds=0.0, n=100, batch=5):
    """Rows of their own numbers; what happens with the sample `bad` is `how`."""
    return FunctionDataSource(Fault(how, bad, seconds), n)


class Fault:
    def __init__(self, how, bad, seconds):
        self.how, self.bad, self.seconds = how, bad, seconds

    def __call__(self, indices):
        if self.seconds:
            time.sleep(self.seconds)
        if self.bad in indices:
            self.fail()
        return (np.asarray(indices), np.full(len(indices), os.getpid()))

    def fail(self):
        times = len([line for line in marks() if line.endswith(f"fault {self.how}")])
        mark(f"fault {self.how}")
        if self.how == "raise":
            raise ValueError("sample is cut")
        if self.how == "own error":
            raise OwnError("of ours")
        if self.how == "raise once" and times == 0:
            raise ValueError("not yet")
        if self.how == "kill" or (self.how == "kill once" and times == 0):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "stop once" and times == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.how == "slow once" and times == 0:
            time.sleep(20)


class OwnError(Exception):
    pass


def marks():
    path = FOLDER / "marks"
    return path.read_text().splitlines() if path.exists() else []


def data_version(**kwargs):
    return (FOLDER / "data").read_text()


@mlq.data_source("file", version=data_version)
def file_source():
    mark("made file")
    value = int((FOLDER / "data").read_text())
    return ArrayDataSource([np.full(40, value)])


@mlq.data_source("broken")
def broken():
    if os.environ.get("BATCH_TESTS_TRAINER") != "1":
        raise OSError("the disk is gone")
    return ArrayDataSource([np.arange(10)])


@mlq.data_source("changed")
def changed():
    return ArrayDataSource([np.arange(10)])


if os.environ.get("BATCH_TESTS_TRAINER") != "1":
    # As if the workers ran with older code than the trainer.
    @mlq.data_source("changed")
    def changed_before():
        return ArrayDataSource([np.arange(10) + 1])


# --- whole data sets ---


@mlq.data_source("numbers")
def numbers(n):
    return FunctionDataSource(as_rows, n)


def as_rows(indices):
    return (np.asarray(indices), np.sqrt(np.asarray(indices))[:, None] * np.arange(3))


@mlq.actor(queue_name="batches")
def score(rows, values, seconds=0.0):
    mark(f"scored {rows[0]}")
    time.sleep(seconds)
    return rows, values.sum(axis=1), values.astype(np.float16)


@mlq.actor(queue_name="batches")
def slowly(seconds, rows, values):
    return score.fn(rows, values, seconds)


@mlq.actor(queue_name="batches")
def cut(bad, rows, values):
    """Fails for a sample, while a file says so."""
    if bad in rows and (FOLDER / "cut").exists():
        raise ValueError("sample is cut")
    return score.fn(rows, values)


@mlq.actor(queue_name="batches")
def total(rows, values):
    return rows.sum(), values.sum(axis=0)


@mlq.actor(queue_name="batches")
def values_of(batch):
    return batch["x"] * 2


@mlq.actor(queue_name="batches")
def noisy(rows, values, rng):
    return values + rng.normal(size=values.shape)


@mlq.actor(queue_name="batches")
def odd_ones(rows, values):
    return None if rows[0] % 2 == 0 else rows


@mlq.actor(queue_name="batches")
def texts(rows, values):
    return ", ".join(map(str, rows))


@mlq.actor(queue_name="batches")
def objects(rows, values):
    return np.array([{"row": row} for row in rows])


@mlq.actor(queue_name="batches")
async def asynchronous(rows, values):
    return rows


if os.environ.get("BATCH_TESTS_TRAINER") != "1":

    @mlq.actor(queue_name="batches")
    def only_workers(rows, values):
        return rows + 1

    @mlq.actor(queue_name="batches")
    def other_code(rows, values):
        return rows + 1
else:

    @mlq.actor(queue_name="batches")
    def other_code(rows, values):
        return rows


@mlq.data_source("scratch")
def scratch():
    """Over a file that nobody else sees."""
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/x.npy", X)
        return ArrayDataSource([np.load(f"{folder}/x.npy", mmap_mode="r")])


@mlq.data_source("mapped file")
def mapped_file(path):
    return ArrayDataSource([np.load(path, mmap_mode="r")])
