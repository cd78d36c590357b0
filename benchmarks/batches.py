"""How fast mini-batches come: mlqueue.batch, BatchUp and torch's DataLoader on the same data in one run.

::

    pip install 'mlqueue[batch]' batchup torch pillow      # torch: a build for the processor will do
    python -P benchmarks/batches.py                           # all of it; makes 20,000 JPEG files, 30 minutes
    python -P benchmarks/batches.py --quick memory parallel   # parts: see PARTS

(-P, because of the queue.py that lies beside it.)

Every figure is the median over rounds; in a round each competitor runs once, in turn, so that what else the machine
does meets all of them. A competitor that is not installed is left out. "x" columns are ratios: more is better for us.
"""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Run as a script, this file's folder comes first: it would hide the standard library's `queue` behind a file of ours.
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import signal
import socket
import statistics
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from itertools import chain, islice
from typing import Any

import numpy as np

from mlqueue.batch import data_source, sampling, work_pool

try:
    import batchup.data_source
    import batchup.sampling
    import batchup.work_pool
except ImportError:
    batchup = None

SAMPLES, FEATURES = 60_000, 784
BATCH_SIZES = (64, 256, 1024)
#: So many epochs of arrays in memory at a time.
EPOCHS = 5
SIDE = 224
#: Batches ahead in the parallel loaders: torch's default with two workers (prefetch_factor=2).
AHEAD = 4
WORKERS = 2

Rate = Callable[[], float]


def memory_arrays() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.random((SAMPLES, FEATURES), np.float32), rng.integers(0, 10, SAMPLES).astype(np.int32)


def touch(batch: Any) -> None:
    """Read from every page of the arrays of a batch, as whoever trains on it would."""
    for array in batch:
        flat = (array.numpy() if hasattr(array, "numpy") else array).reshape(-1)
        flat[:: max(1, 4096 // flat.itemsize)].sum()


def rate(
    batches: Iterator[Any],
    most: int | None = None,
    use: Callable[[Any], None] | None = None,
    within: float = math.inf,
) -> float:
    """Batches a second; of the first so many, and of so many seconds at most."""
    begun, count, lasted = time.perf_counter(), 0, 0.0
    for batch in batches:
        if use is not None:
            use(batch)
        count += 1
        lasted = time.perf_counter() - begun
        if count == most or lasted > within:
            break
    return count / lasted


@contextlib.contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in what takes longer: a loader may wait for ever for a worker that has died."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"no answer within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compare(competitors: dict[str, Rate], rounds: int) -> dict[str, float]:
    """The median rate of each, measured in turn, after a round that does not count."""
    rates: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(rounds + 1):
        for name, measure in competitors.items():
            value = measure()
            if number:
                rates[name].append(value)
    return {name: statistics.median(values) for name, values in rates.items()}


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n## {title}\n", flush=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(shown(row.get(name, "")) for name in names) + " |", flush=True)


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return str(value)


# --- one thread, arrays in memory ---


def random_state() -> np.random.RandomState:
    return np.random.RandomState(1)


def in_order() -> None:
    return None


def epochs(ds: Any, batch_size: int, shuffle: Callable[[], Any], **kwargs: bool) -> Rate:
    """The rate over so many epochs one after the other, as a training has them: the first one finds a processor that
    was idle, and memory that others have used."""

    def measure() -> float:
        passes = (ds.batch_iterator(batch_size, shuffle=shuffle(), **kwargs) for _ in range(EPOCHS))
        return rate(chain.from_iterable(passes))

    return measure


def bare_loop(arrays: tuple[np.ndarray, np.ndarray], batch_size: int, shuffled: bool) -> Rate:
    """The least there is to do: the rows into one array that is used over and over."""
    slots = [np.empty((batch_size, *array.shape[1:]), array.dtype) for array in arrays]

    def measure() -> float:
        order = np.random.RandomState(1).permutation(SAMPLES) if shuffled else None
        begun, count = time.perf_counter(), 0
        for start in list(range(0, SAMPLES - batch_size + 1, batch_size)) * EPOCHS:
            for array, slot in zip(arrays, slots, strict=True):
                if order is None:
                    np.copyto(slot, array[start : start + batch_size])
                else:
                    np.take(array, order[start : start + batch_size], axis=0, out=slot, mode="clip")
            count += 1
        return count / (time.perf_counter() - begun)

    return measure


def memory(options: argparse.Namespace) -> None:
    arrays = memory_arrays()
    ours, rows = data_source.ArrayDataSource(list(arrays)), []
    theirs = batchup.data_source.ArrayDataSource(list(arrays)) if batchup else None
    for shuffled in (True, False):
        for batch_size in BATCH_SIZES:
            shuffle = random_state if shuffled else in_order
            competitors = {"mlqueue": epochs(ours, batch_size, shuffle)}
            competitors["copy=False"] = epochs(ours, batch_size, shuffle, copy=False)
            competitors["bare numpy"] = bare_loop(arrays, batch_size, shuffled)
            if theirs is not None:
                competitors["BatchUp"] = epochs(theirs, batch_size, shuffle)
            found = compare(competitors, options.rounds * 3)
            row: dict[str, Any] = {"order": "shuffled" if shuffled else "in order", "batch": batch_size, **found}
            row["x bare numpy"] = found["mlqueue"] / found["bare numpy"]
            row["copy=False x bare numpy"] = found["copy=False"] / found["bare numpy"]
            if theirs is not None:
                row["x BatchUp"] = found["mlqueue"] / found["BatchUp"]
            rows.append(row)
    table(f"Arrays in memory, one thread, {SAMPLES:,} x {FEATURES} float32: batches/s", rows)
    if theirs is not None:
        print(f"\nGeometric mean: {geometric_mean([row['x BatchUp'] for row in rows]):.2f} x BatchUp")
    print(f"Geometric mean: {geometric_mean([row['x bare numpy'] for row in rows]):.2f} x bare numpy")


# --- two threads, arrays in memory ---


def bare_threads(arrays: tuple[np.ndarray, np.ndarray], batch_size: int) -> Rate:
    """The least there is to do for two threads: each takes every other group of batches into arrays of its own, over
    and over, and hands nothing to anybody."""
    group = max(1, (1 << 22) // (batch_size * FEATURES * 4)) * batch_size
    slots = [[[np.empty((group, *a.shape[1:]), a.dtype) for a in arrays] for _ in range(2)] for _ in range(WORKERS)]

    def measure() -> float:
        begun = time.perf_counter()
        order = np.random.RandomState(1).permutation(SAMPLES)

        def work(worker: int) -> None:
            starts = range(worker * group, SAMPLES - group + 1, WORKERS * group)
            for number, start in enumerate(list(starts) * EPOCHS):
                for array, slot in zip(arrays, slots[worker][number % 2], strict=True):
                    np.take(array, order[start : start + group], axis=0, out=slot, mode="clip")

        workers = [threading.Thread(target=work, args=(worker,)) for worker in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return EPOCHS * (SAMPLES // group) * (group // batch_size) / (time.perf_counter() - begun)

    return measure


def threads(options: argparse.Namespace) -> None:
    arrays, rows = memory_arrays(), []
    ours = data_source.ArrayDataSource(list(arrays))
    theirs = batchup.data_source.ArrayDataSource(list(arrays)) if batchup else None
    with work_pool.WorkerThreadPool(WORKERS) as pool:
        parallel = pool.parallel_data_source(ours, 2 * AHEAD)
        for batch_size in BATCH_SIZES:
            competitors = {"2 threads": epochs(parallel, batch_size, random_state)}
            competitors["one"] = epochs(ours, batch_size, random_state)
            competitors["bare numpy, 2 threads"] = bare_threads(arrays, batch_size)
            if theirs is not None:
                competitors["BatchUp, one"] = epochs(theirs, batch_size, random_state)
            found = compare(competitors, options.rounds * 3)
            row: dict[str, Any] = {"batch": batch_size, **found, "x one": found["2 threads"] / found["one"]}
            row["x bare numpy"] = found["2 threads"] / found["bare numpy, 2 threads"]
            if theirs is not None:
                row["x BatchUp"] = found["2 threads"] / found["BatchUp, one"]
            rows.append(row)
    table("Arrays in memory, shuffled, two prefetching threads: batches/s", rows)


# --- two workers: arrays in memory, JPEG files, pure Python ---


def make_images(folder: Path, count: int) -> list[str]:
    """`count` JPEG files of 224 x 224, as large as photographs are: smooth colours with some noise on them."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    paths = [str(folder / f"{number:06}.jpg") for number in range(count)]
    missing = [path for path in paths if not os.path.exists(path)]  # noqa: PTH110
    for path in missing:
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((SIDE, SIDE), Image.BICUBIC)
        noisy = np.clip(np.asarray(coarse, np.int16) + rng.integers(-12, 13, (SIDE, SIDE, 3)), 0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(path, quality=85)
    return paths


def decode(path: str) -> np.ndarray:
    from PIL import Image

    # Read at once, as mlqueue's own sources do: Pillow would ask for the file piece by piece, and threads wait for
    # Python's global lock after each.
    with Image.open(io.BytesIO(Path(path).read_bytes())) as image:
        return np.asarray(image)


class MemoryTask:
    """Rows of arrays."""

    batch_size, most = 256, None

    def __init__(self, images: list[str]) -> None:
        self.arrays = memory_arrays()
        self.length = SAMPLES

    def load(self, indices: Any) -> tuple[np.ndarray, ...]:
        return tuple(array[indices] for array in self.arrays)

    def source(self) -> Any:
        return data_source.ArrayDataSource(list(self.arrays))


class PicturesTask:
    """Rows of an array of pictures."""

    batch_size, most, dtype = 64, 100, np.uint8

    def __init__(self, images: list[str]) -> None:
        self.length = 1000
        self.arrays = (np.random.default_rng(0).integers(0, 256, (self.length, 3, SIDE, SIDE), np.uint8),)
        if self.dtype is not np.uint8:
            self.arrays = (self.arrays[0].astype(self.dtype),)

    def load(self, indices: Any) -> tuple[np.ndarray, ...]:
        return (self.arrays[0][indices],)

    def source(self) -> Any:
        return data_source.ArrayDataSource(list(self.arrays), repeats=10)


class FloatPicturesTask(PicturesTask):
    dtype = np.float32


class JPEGTask:
    """Images decoded to uint8."""

    batch_size, most = 64, 60

    def __init__(self, images: list[str]) -> None:
        self.images, self.length = images, len(images)

    def load(self, indices: Any, empty: Any = np.empty) -> tuple[np.ndarray, ...]:
        out = empty((len(indices), SIDE, SIDE, 3), np.uint8)
        for row, index in enumerate(indices):
            out[row] = decode(self.images[index])
        return (out,)

    def source(self) -> Any:
        # A function's batch can be made in place only by a map: the indices are the source, the images what it maps to.
        return data_source.ArrayDataSource([np.arange(self.length)]).map(self.load)


class FloatTask(JPEGTask):
    """Images decoded to float32 from 0 to 1."""

    def load(self, indices: Any, empty: Any = np.empty) -> tuple[np.ndarray, ...]:
        out = empty((len(indices), SIDE, SIDE, 3), np.float32)
        for row, index in enumerate(indices):
            np.multiply(decode(self.images[index]), np.float32(1 / 255), out=out[row])
        return (out,)


class PythonTask:
    """Something that only Python does: hashes of words, which holds the global lock."""

    batch_size, most = 64, 150

    def __init__(self, images: list[str]) -> None:
        self.length = 20_000

    def load(self, indices: Any) -> tuple[np.ndarray, ...]:
        out = np.empty((len(indices), 64), np.float32)
        for row, index in enumerate(indices):
            value, values = int(index) + 1, []
            for _ in range(400):
                value = (value * 1103515245 + 12345) & 0x7FFFFFFF
                values.append(value)
            out[row] = values[-64:]
        return (out,)

    def source(self) -> Any:
        return data_source.ArrayDataSource([np.arange(self.length)]).map(self.load)


TASKS = {
    "memory": MemoryTask,
    "pictures uint8": PicturesTask,
    "pictures float32": FloatPicturesTask,
    "JPEG to uint8": JPEGTask,
    "JPEG to float32": FloatTask,
    "pure Python": PythonTask,
}


class BatchUpView:
    """The task as an array-like, which is how BatchUp reads files."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.length

    def __getitem__(self, indices: Any) -> np.ndarray:
        return self.task.load(indices)[0]


class TorchView:
    """The task as a Dataset whose items are batches."""

    def __init__(self, task: Any) -> None:
        self.task = task

    def __len__(self) -> int:
        return self.task.length

    def __getitem__(self, indices: list[int]) -> tuple[np.ndarray, ...]:
        return self.task.load(np.asarray(indices))


def open_loader(name: str, task: Any, closing: contextlib.ExitStack) -> Callable[[int], Iterator[Any]] | None:
    """A function that gives an epoch's shuffled batches; None when the competitor is not installed."""
    size = task.batch_size
    if name in POOLS:
        pool = closing.enter_context(POOLS[name]())
        parallel = pool.parallel_data_source(task.source(), AHEAD)
        return lambda epoch: parallel.batch_iterator(size, shuffle=1, epoch=epoch)
    if name == "bare threads":
        executor = closing.enter_context(ThreadPoolExecutor(WORKERS))
        return lambda epoch: bare_window(executor, task, epoch)
    if name == "mlqueue, one":
        source = task.source()
        return lambda epoch: source.batch_iterator(size, shuffle=1, epoch=epoch)
    if name == "BatchUp processes":
        if batchup is None:
            return None

        theirs = batchup.work_pool.WorkerProcessPool(WORKERS)
        arrays = list(task.arrays) if hasattr(task, "arrays") else [BatchUpView(task)]
        old = theirs.parallel_data_source(batchup.data_source.ArrayDataSource(arrays), AHEAD)
        return lambda epoch: old.batch_iterator(size, shuffle=np.random.RandomState(epoch))
    try:
        import torch.utils.data as torch_data
    except ImportError:
        return None
    view = TorchView(task)
    sampler = torch_data.BatchSampler(torch_data.RandomSampler(view), size, drop_last=False)
    loader = torch_data.DataLoader(
        view, sampler=sampler, batch_size=None, num_workers=WORKERS, prefetch_factor=2, persistent_workers=True
    )
    return lambda epoch: iter(loader)


POOLS: dict[str, Callable[[], Any]] = {
    "mlqueue processes": lambda: work_pool.WorkerProcessPool(WORKERS),
    "mlqueue threads": lambda: work_pool.WorkerThreadPool(WORKERS),
    "mlqueue processes, helped": lambda: work_pool.WorkerProcessPool(WORKERS, help_while_starting=True),
}
LOADERS = ("mlqueue processes", "mlqueue threads", "mlqueue, one", "BatchUp processes", "torch")


def bare_window(executor: ThreadPoolExecutor, task: Any, epoch: int) -> Iterator[Any]:
    """The least there is to do for two threads: the batches in order, so many ahead, each in memory of its own."""
    order = np.random.RandomState(epoch).permutation(task.length)
    starts, ahead = iter(range(0, task.length, task.batch_size)), deque[Any]()
    try:
        while True:
            for start in islice(starts, AHEAD - len(ahead)):
                ahead.append(executor.submit(task.load, order[start : start + task.batch_size]))
            if not ahead:
                return
            yield ahead.popleft().result()
    finally:
        for each in ahead:
            each.cancel()
        wait(ahead)


def parallel(options: argparse.Namespace) -> None:
    images, rows = make_images(options.images_folder, options.images), []
    costs: list[dict[str, Any]] = []
    for task_name, make_task in TASKS.items():
        if task_name.startswith("pictures") or task_name not in (options.tasks or TASKS):
            continue  # pictures are for the pool of actors
        task = make_task(images)
        with contextlib.ExitStack() as closing:
            loaders = {name: open_loader(name, task, closing) for name in (*LOADERS, "bare threads")}
            epochs = iter(range(1_000_000))

            def measure(loader: Any, task: Any = task, epochs: Any = epochs) -> Rate:
                def once() -> float:
                    batches = loader(next(epochs))
                    touch(next(batches))  # the first batch is another table
                    found = rate(batches, task.most, touch) * task.batch_size
                    # What is ahead belongs to this round, not to the next competitor's.
                    if hasattr(batches, "close"):
                        batches.close()
                    else:
                        drain(batches)
                    return found

                return once

            found = compare({name: measure(each) for name, each in loaders.items() if each}, options.rounds)
            row: dict[str, Any] = {"task": task_name, **found}
            for name in ("mlqueue processes", "mlqueue threads"):
                if "torch" in found:
                    row[f"{name} x torch"] = found[name] / found["torch"]
            row["mlqueue threads x bare"] = found["mlqueue threads"] / found["bare threads"]
            rows.append(row)
            cost = {name: processor_cost(each(next(epochs)), task) for name, each in loaders.items() if each}
            costs.append({"task": task_name, **cost})
            loaders.clear()
    table(f"Two workers, {AHEAD} batches ahead, every page touched: samples/s", rows)
    table("The same: processor time of all processes for one sample, in microseconds", costs)


# --- batches prepared by workers of the queue ---


@contextlib.contextmanager
def actor_workers(processes: int = WORKERS, *, on_disk: bool = True, **settings: str) -> Iterator[Any]:
    """A throw-away store, worker processes, and the module of their sources as this process has it; all of them with
    these settings. `on_disk`: whether the store writes an append-only file, as the embedded server does."""
    from mlqueue.testing import temporary_server

    here = str(Path(__file__).resolve().parent / "sources")
    with temporary_server() as server:
        given = {"url": str(server.url), **settings}
        os.environ |= {f"MLQUEUE_{name.upper()}": value for name, value in given.items()}
        sys.path.insert(0, here)
        sys.modules.setdefault("batches", sys.modules[__name__])
        import actor_sources

        if not on_disk:
            actor_sources.mlq.client.config_set("appendonly", "no")
        command = [sys.executable, "-m", "mlqueue", "worker", "actor_sources", "--processes", str(processes)]
        path = os.pathsep.join([here, *[entry for entry in sys.path if entry]])
        with tempfile.TemporaryFile() as log:
            worker = subprocess.Popen(
                [*command, "--threads", "1"], env={**os.environ, "PYTHONPATH": path}, stdout=log, stderr=log, cwd=here
            )
            try:
                while len(actor_sources.mlq.store.workers()) < processes and worker.poll() is None:
                    time.sleep(0.05)
                yield actor_sources
            finally:
                worker.terminate()
                worker.wait()
                actor_sources.mlq.close()
                del sys.modules["actor_sources"]
                for name in given:
                    del os.environ[f"MLQUEUE_{name.upper()}"]


#: The tasks whose batches are large: 9.6 and 38.5 MB.
LARGE = ("pictures uint8", "pictures float32", "JPEG to uint8", "JPEG to float32")


def actors(options: argparse.Namespace) -> None:
    from mlqueue.batch.actor_pool import ActorPool

    images, rows = make_images(options.images_folder, options.images), []
    with actor_workers() as module:
        for task_name, make_task in TASKS.items():
            if options.tasks and task_name not in options.tasks:
                continue
            task = make_task(images)
            named = module.task_source(name=task_name, folder=str(options.images_folder), count=options.images)
            with contextlib.ExitStack() as closing:
                # The others fork, so they do it before there is a thread of ours.
                runs = {
                    name: Run(name, task, closing, options)
                    for name in ("torch", "BatchUp processes")
                    if is_there(name.split()[0])
                }
                pool = closing.enter_context(ActorPool(module.mlq, workers=WORKERS, alone_after=None))
                parallel = pool.parallel_data_source(named, AHEAD)
                for name in ("mlqueue threads", "mlqueue processes"):
                    runs[name] = Run(name, task, closing, options)
                runs["actors"] = Run("actors", task, closing, options, parallel)
                found = compare(runs, options.rounds)
            row: dict[str, Any] = {"task": task_name, **found}
            for other in ("torch", "BatchUp processes"):
                if other in found:
                    row[f"x {other}"] = found["actors"] / found[other]
            rows.append(row)
            print(f"{task_name}: {', '.join(f'{name} {shown(value)}' for name, value in found.items())}", flush=True)
        table(f"Two worker processes of the queue, {AHEAD} batches ahead, every page touched: batches/s", rows)
        with ActorPool(module.mlq, workers=WORKERS, alone_after=None) as pool:
            single = single_batches(pool, module, options)
        table("One batch, in milliseconds", [single])
        table("Required, and found", list(requirements(rows, single)))


class Run:
    """One round of a loader's, of bounded time. A loader that fails is made again, twice; then it has no figure."""

    def __init__(
        self, name: str, task: Any, closing: contextlib.ExitStack, options: argparse.Namespace, ours: Any = None
    ) -> None:
        self._name, self._task, self._closing, self._seconds, self._ours = name, task, closing, options.seconds, ours
        self._epochs, self._failures = iter(range(1_000_000)), 0
        self._loader: Any = None
        self()  # its workers are there now

    def __call__(self) -> float:
        while self._failures < 3:
            try:
                return self._measure()
            except (RuntimeError, OSError) as error:  # TimeoutError is one; torch's and BatchUp's are others
                self._failures += 1
                self._loader = None
                print(f"{self._name}: {type(error).__name__}: {str(error)[:200]}; tried again", file=sys.stderr)
        return math.nan

    def _measure(self) -> float:
        with bounded(10 * self._seconds):
            if self._loader is None:
                self._loader = self._open()
            batches = self._loader(next(self._epochs))
            touch(next(batches))  # the first batch is another table
            found = rate(batches, self._task.most, touch, self._seconds)
            finish(batches)
            return found

    def _open(self) -> Any:
        if self._ours is not None:
            return lambda epoch: self._ours.batch_iterator(self._task.batch_size, shuffle=1, epoch=epoch)
        return open_loader(self._name, self._task, self._closing)


def is_there(name: str) -> bool:
    """Whether a competitor is installed."""
    return batchup is not None if name == "BatchUp" else importlib.util.find_spec(name) is not None


def requirements(rows: list[dict[str, Any]], single: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was to be reached, and what was."""

    def of(other: str, tasks: Any = TASKS) -> list[float]:
        ratios = [row.get(f"x {other}", math.nan) for row in rows if row["task"] in tasks]
        return [ratio for ratio in ratios if not math.isnan(ratio)]

    for text, found, bound, at_most in (
        ("least of all cells, x torch", min(of("torch"), default=math.nan), 1.0, False),
        ("geometric mean of all cells, x torch", geometric_mean(of("torch")), 1.3, False),
        ("least of large batches, x BatchUp", min(of("BatchUp processes", LARGE), default=math.nan), 3.0, False),
        ("an empty batch, x BatchUp's", single["empty"] / single.get("BatchUp, nearly empty", math.nan), 1.0, True),
        ("hand-over of 9.6 MB, x memcpy", single["hand-over of 9.6 MB"] / single["memcpy of it"], 2.0, True),
        ("first batch after 2 s idle, ms", single["first of 64 pictures after 2 s idle"], 20.0, True),
    ):
        good = found <= bound if at_most else found >= bound
        yield {"what": text, "required": f"{'at most' if at_most else 'at least'} {bound:g}", "found": found, "": good}


def single_batches(pool: Any, module: Any, options: argparse.Namespace) -> dict[str, Any]:
    """What does not depend on the preparing."""
    rate(pool.parallel_data_source(module.empty_source(length=500)).batch_iterator(1))
    row: dict[str, Any] = {}
    row["empty"] = 1e3 / rate(pool.parallel_data_source(module.empty_source(length=5000)).batch_iterator(1))
    if batchup:
        theirs = batchup.work_pool.WorkerProcessPool(WORKERS)
        arrays = [np.zeros((5000, 1))]
        old = theirs.parallel_data_source(batchup.data_source.ArrayDataSource(arrays), 20)
        with bounded(60):
            row["BatchUp, nearly empty"] = 1e3 / rate(old.batch_iterator(1))
    source = module.task_source(name="pictures uint8", folder=str(options.images_folder), count=options.images)
    first, hand_over = [], []
    rate(pool.parallel_data_source(source, 6).batch_iterator(64), 12)  # the workers are back, and have made the source
    for _ in range(max(5, options.rounds)):
        time.sleep(2)
        begun = time.perf_counter()
        batches = pool.parallel_data_source(source, 6).batch_iterator(64, shuffle=1)
        next(batches)
        first.append(time.perf_counter() - begun)
        time.sleep(0.5)  # until all are ready
        for _ in range(3):
            begun = time.perf_counter()
            next(batches)
            hand_over.append(time.perf_counter() - begun)
        batches.close()
    block, target = np.ones(64 * 3 * SIDE * SIDE, np.uint8), np.zeros(64 * 3 * SIDE * SIDE, np.uint8)
    copies = []
    for _ in range(50):
        begun = time.perf_counter()
        np.copyto(target, block)
        copies.append(time.perf_counter() - begun)
    row["first of 64 pictures after 2 s idle"] = statistics.median(first) * 1e3
    row["hand-over of 9.6 MB"] = statistics.median(hand_over) * 1e3
    row["memcpy of it"] = statistics.median(copies) * 1e3
    return row


# --- the same, between hosts ---

#: How the ways between hosts are chosen here, where all is one host.
ROADS = {
    "TCP": {"batches_ways": "tcp", "batches_bind": "127.0.0.1"},
    "the store": {"batches_ways": "store"},
    "the store, nothing on disk": {"batches_ways": "store"},
}
#: Bytes of a batch of 64 pictures.
BATCH_BYTES = 64 * 3 * SIDE * SIDE


#: Sends blocks of so many bytes to a port, as long as somebody takes them.
SENDER = """
import socket, sys
port, size = map(int, sys.argv[1:])
block = memoryview(bytearray(size))
with socket.create_connection(("127.0.0.1", port)) as connection:
    while True:
        connection.sendall(block)
"""


@contextlib.contextmanager
def bare_tcp(target: np.ndarray) -> Iterator[Rate]:
    """The least there is to do: a process sends blocks over a connection, which are received into an array."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        command = [sys.executable, "-c", SENDER, str(listening.getsockname()[1]), str(target.nbytes)]
        sender = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        connection, _ = listening.accept()
    view = memoryview(target)

    def measure() -> float:
        begun, count = 0.0, 50
        for number in range(count + 5):
            if number == 5:  # what had been sent ahead is gone
                begun = time.perf_counter()
            got = 0
            while got < len(view):
                got += connection.recv_into(view[got:], 0, socket.MSG_WAITALL)
        return count / (time.perf_counter() - begun)

    try:
        with connection:
            yield measure
    finally:
        sender.kill()
        sender.wait()


def network(options: argparse.Namespace) -> None:
    """What it takes to move a batch that costs nothing to prepare, over loopback TCP and through the store."""
    import redis

    from mlqueue.batch.actor_pool import ActorPool

    block, target = np.ones(BATCH_BYTES, np.uint8), np.zeros(BATCH_BYTES, np.uint8)
    rows = []
    for road, settings in ROADS.items():
        secret = {"signing_key": "a key for benchmarks alone", "batches_compress": "off"}
        with (
            actor_workers(1, on_disk="nothing" not in road, **settings, **secret) as module,
            bare_tcp(target) as bare,
            ActorPool(module.mlq, workers=1, alone_after=None) as pool,
        ):
            source = module.blank_source(length=64 * 60)

            def batches(ahead: int, pool: Any = pool, source: Any = source) -> Rate:
                def measure() -> float:
                    given = pool.parallel_data_source(source, ahead).batch_iterator(64)
                    for _ in range(10):
                        next(given)
                    return rate(given)

                return measure

            def copies() -> float:
                begun = time.perf_counter()
                for _ in range(50):
                    np.copyto(target, block)
                return 50 / (time.perf_counter() - begun)

            clients = {"redis-py": redis.Redis.from_url(module.mlq.settings.url), "our client": module.mlq.client}
            content = block.tobytes()

            def set_and_get(client: Any, content: bytes = content) -> float:
                begun = time.perf_counter()
                for _ in range(10):
                    client.set("benchmark", content)
                    client.get("benchmark")
                client.delete("benchmark")
                return 10 / (time.perf_counter() - begun)

            competitors = {
                "memcpy": copies,
                "bare TCP": bare,
                # As it comes, and as mlqueue uses it, which packs large values without a copy.
                **{f"{name} SET + GET": partial(set_and_get, client) for name, client in clients.items()},
                road: batches(2),
                "8 ahead": batches(8),
                "1 ahead": batches(1),
            }
            found = {name: 1e3 / value for name, value in compare(competitors, options.rounds).items()}
            assert pool.stats().transport == road.partition(",")[0], pool.stats()
            row: dict[str, Any] = {"way": road, "ms": found.pop(road), **found}
            row["x memcpy"] = row["ms"] / row["memcpy"]
            row["x bare TCP"] = row["ms"] / row["bare TCP"]
            for name in clients:
                row[f"{name} x"] = row[f"{name} SET + GET"] / row["ms"]
            clients["redis-py"].close()
            rows.append(row)
    table(f"A batch of {BATCH_BYTES / 1e6:.1f} MB between processes, as between hosts: milliseconds a batch", rows)


def processor_cost(batches: Any, task: Any) -> float:
    """The processor time of all processes for one sample, in microseconds; it hardly depends on what else runs."""
    for _ in range(2 * AHEAD):  # as much is ahead at the end as at the beginning
        touch(next(batches))
    begun, count = processor_time(), 0
    for batch in batches:
        touch(batch)
        count += 1
        if count == 30:
            break
    cost = (processor_time() - begun) / count / task.batch_size * 1e6
    finish(batches)
    return cost


def drain(batches: Any) -> None:
    """Take what torch's workers have ahead: they have no other end of an epoch."""
    iterator = getattr(batches, "_sampler_iter", None)
    if iterator is not None:
        batches._sampler_iter = iter(())  # no more is given out
        for _ in batches:
            pass


# --- the first batch, and memory ---


def first(options: argparse.Namespace) -> None:
    make_images(options.images_folder, options.images)
    rows = []
    for task_name in options.tasks or TASKS:
        for name in ("mlqueue processes, helped", *LOADERS):
            runs = []
            for _ in range(options.rounds):
                command = [sys.executable, "-P", __file__, "--one", name, task_name, "--images", str(options.images)]
                command += ["--images-folder", str(options.images_folder)]
                try:
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, timeout=60)
                except subprocess.TimeoutExpired:
                    print(f"{name}, {task_name}: no answer within 60 s", file=sys.stderr)
                    continue
                if done.returncode == 0 and done.stdout.strip():
                    runs.append(json.loads(done.stdout.splitlines()[-1]))
            if runs:
                median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                rows.append({"task": task_name, "loader": name, **median})
    table("Time to the first batch, in ms, and the memory of all processes (PSS, and all shared memory), in MB", rows)


def one(name: str, task_name: str, images: list[str]) -> None:
    """In a process of its own: time to the first batch of the first and of later epochs, and memory."""
    task = TASKS[task_name](images)
    if name == "torch":
        with contextlib.suppress(ImportError):  # its import is not what is measured
            import torch.utils.data  # noqa: F401
    shared_before = shared_memory()
    with contextlib.ExitStack() as closing:
        begun = time.perf_counter()
        loader = open_loader(name, task, closing)
        if loader is None:
            return
        batches = loader(0)
        touch(next(batches))
        cold = time.perf_counter() - begun
        rate(batches, 3 * AHEAD, touch)
        later = []
        for epoch in range(1, 4):
            finish(batches)
            time.sleep(0.05)
            begun = time.perf_counter()
            batches = loader(epoch)
            touch(next(batches))
            later.append(time.perf_counter() - begun)
            rate(batches, 3 * AHEAD, touch)
        held = next(batches)
        time.sleep(0.5)  # for the loader to get as far ahead as it may
        touch(held)
        memory = pss() + shared_memory() - shared_before
        print(json.dumps({"first": cold * 1e3, "later": statistics.median(later) * 1e3, "memory": memory / 1e6}))
        sys.stdout.flush()
        finish(batches)


def finish(batches: Any) -> None:
    if hasattr(batches, "close"):
        batches.close()
    else:
        drain(batches)


def family() -> set[int]:
    """The numbers of this process and of all that descend from it."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rsplit(")", 1)[1].split()[1])
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def processor_time() -> float:
    """The seconds of processor time that those of the family which live have had (Linux)."""
    total = 0
    for pid in family():
        for schedule in Path(f"/proc/{pid}/task").glob("*/schedstat"):
            with contextlib.suppress(OSError):
                total += int(schedule.read_text().split()[0])
    return total / 1e9


def pss() -> int:
    """The proportional set size, in bytes, of the family, without memory that is shared by a file (Linux)."""
    total = 0
    for pid in family():
        with contextlib.suppress(OSError):
            fields = dict(line.split(":") for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
            total += (int(fields["Pss"].split()[0]) - int(fields["Pss_Shmem"].split()[0])) * 1024
    return total


def shared_memory() -> int:
    """The bytes of shared memory that this machine has (Linux). What is on its way between processes is often mapped by
    none of them, and belongs to a loader all the same."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * 1024
    return 0


# --- weighted drawing ---


def weighted(options: argparse.Namespace) -> None:
    weights = np.random.default_rng(0).random(1_000_000)
    rows = []
    for batch_size in BATCH_SIZES:

        def draw(sampler: Any, batches: int, batch_size: int = batch_size) -> Rate:
            def measure() -> float:
                drawn = sampler.shuffled_indices_batch_iterator(batch_size, np.random.RandomState(1))
                next(drawn)
                return rate(drawn, batches)

            return measure

        competitors = {"mlqueue": draw(sampling.WeightedSampler(weights), 2000)}
        if batchup:
            competitors["BatchUp"] = draw(batchup.sampling.WeightedSampler(weights), 20)
        found = compare(competitors, options.rounds)
        row: dict[str, Any] = {"batch": batch_size, **found}
        if batchup:
            row["x BatchUp"] = found["mlqueue"] / found["BatchUp"]
        rows.append(row)
    table("Weighted drawing from 1,000,000 samples: batches/s", rows)


PARTS = {
    "memory": memory,
    "threads": threads,
    "parallel": parallel,
    "actors": actors,
    "network": network,
    "first": first,
    "weighted": weighted,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"some of {', '.join(PARTS)}; all without")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help="of the parts parallel, first and actors, else all")
    parser.add_argument("--seconds", type=float, default=5.0, help="of a round with the pool of actors, at most")
    parser.add_argument("--images", type=int, default=20_000, help="how many JPEG files")
    parser.add_argument(
        "--images-folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "mlqueue-benchmark-images",
        help="kept there",
    )
    parser.add_argument("--quick", action="store_true", help="3 rounds, 4,000 files")
    parser.add_argument("--one", nargs=2, metavar=("LOADER", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.images = 3, 4000
    if options.one:
        one(*options.one, make_images(options.images_folder, options.images))
        return
    unknown = set(options.parts) - set(PARTS)
    if unknown:
        parser.error(f"no part {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}.")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Python {sys.version.split()[0]}, numpy {np.__version__}, {cores} cores, load {os.getloadavg()[0]:.1f}")
    for name in options.parts or PARTS:
        PARTS[name](options)


if __name__ == "__main__":
    main()
