"""Pools: the batches of the source, in its order, whoever prepares them and whatever happens to who does."""

import contextlib
import gc
import itertools
import json
import os
import random
import re
import select
import signal
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from mlqueue.batch import process_crew, work_pool
from mlqueue.batch.crew import ThreadCrew
from mlqueue.batch.data_source import (
    ArrayDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    FunctionDataSource,
    IteratorDataSource,
    RandomAccessDataSource,
)
from mlqueue.batch.errors import StateError
from mlqueue.batch.sampling import WeightedSampler
from mlqueue.batch.transport import HEADER_BYTES
from mlqueue.batch.work_pool import WorkerDied, WorkerError, WorkerProcessPool, WorkerThreadPool

N = 203
X = np.arange(N * 4, dtype=np.float32).reshape(N, 4)
Y = np.arange(N, dtype=np.int32)
DEADLINE = 60


@pytest.fixture(scope="module")
def processes():
    with WorkerProcessPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def threads():
    with WorkerThreadPool(2) as pool:
        yield pool


@pytest.fixture(params=["threads", "processes"])
def pool(request):
    return request.getfixturevalue(request.param)


def arrays(**options):
    return ArrayDataSource([X, Y], **options)


def add_noise(x, y, rng):
    return x + rng.normal(size=x.shape).astype(np.float32), y


def scale_in_place(x, y):
    x *= 2
    return x, y


def as_it_is(*batch):
    return batch


def to_dict(x, y):
    return {"x": x, "y": y}


def ragged(indices):
    return (np.concatenate([np.full(i % 7, i) for i in indices] or [np.zeros(0)]), [f"name {i}" for i in indices])


class Nodes:
    """An array-like of a user, which counts on being asked with ints, slices or 1-D int arrays."""

    def __len__(self):
        return N

    def __getitem__(self, index):
        return X[index] * 3


SOURCES = {
    "arrays": lambda: arrays(),
    "subset, repeated": lambda: arrays(indices=np.arange(3, 90), repeats=3),
    "with indices": lambda: arrays(include_indices=True),
    "dict": lambda: ArrayDataSource({"x": X, "y": Y}),
    "array-like": lambda: ArrayDataSource([Nodes(), Y]),
    "weighted": lambda: arrays(sampler=WeightedSampler(np.arange(1, N + 1))),
    "composite": lambda: CompositeDataSource([arrays(), ArrayDataSource([X[:50]], repeats=-1)]),
    "nested": lambda: CompositeDataSource([arrays(), arrays(indices=np.arange(20, 100))], flatten=False),
    "choice": lambda: ChoiceDataSource([arrays(), ArrayDataSource([X[:50] + 9, Y[:50]])], stratified=True),
    "mapped": lambda: arrays().map(scale_in_place),
    "mapped with noise": lambda: arrays().map(add_noise),
    "mapped to dicts": lambda: arrays().map(to_dict),
    "ragged, with texts": lambda: FunctionDataSource(ragged, N),
}
SHUFFLES = {
    "in order": lambda: None,
    "seed": lambda: 12345,
    "RandomState": lambda: np.random.RandomState(7),
    "Generator": lambda: np.random.default_rng(7),
}


def assert_same(a, b):
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = tuple(a.values()), tuple(b.values())
    if isinstance(a, tuple | list):
        assert len(a) == len(b)
        assert type(a) is type(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, np.ndarray):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


def assert_same_batches(expected, actual):
    sentinel = object()
    for a, b in itertools.zip_longest(expected, actual, fillvalue=sentinel):
        assert a is not sentinel
        assert b is not sentinel
        assert_same(a, b)


def worker_pids(pool):
    return [handle.process.pid for handle in pool._crew._workers.values()]


def wait_until_gone(pid):
    """Wait for the end of a process that is not a child of this one."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], DEADLINE)[0])
    finally:
        os.close(fd)


def open_fds():
    return len(os.listdir("/proc/self/fd"))


def pool_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("mlqueue-batch")]


class TestSameBatchesAsTheSource:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("source", SOURCES)
    def test_in_every_order(self, pool, source, shuffle):
        if source == "weighted" and shuffle == "in order":
            pytest.skip("a weighted sampler has no order")
        if source == "mapped with noise" and shuffle == "in order":
            pytest.skip("without a seed the noise is to differ")
        ds = SOURCES[source]()
        expected = ds.batch_iterator(17, shuffle=SHUFFLES[shuffle]())
        actual = pool.parallel_data_source(ds, 5).batch_iterator(17, shuffle=SHUFFLES[shuffle]())
        assert_same_batches(itertools.islice(expected, 40), itertools.islice(actual, 40))

    @pytest.mark.parametrize("buffer", [1, 2, 3, 20, 300])
    @pytest.mark.parametrize("batch_size", [1, 64, 1000])
    @pytest.mark.parametrize("source", ["arrays", "mapped"])
    def test_whatever_the_buffer(self, pool, buffer, batch_size, source):
        ds = SOURCES[source]()
        parallel = pool.parallel_data_source(ds, buffer)
        assert_same_batches(ds.batch_iterator(batch_size, shuffle=1), parallel.batch_iterator(batch_size, shuffle=1))

    def test_the_global_state_is_drawn_from_as_the_source_would(self, pool):
        np.random.seed(3)
        expected = list(arrays().batch_iterator(10, shuffle=True))
        after = np.random.random()
        np.random.seed(3)
        actual = list(pool.parallel_data_source(arrays(), 5).batch_iterator(10, shuffle=True))
        assert np.random.random() == after
        assert_same_batches(expected, actual)

    def test_options_are_passed_on(self, pool):
        parallel = pool.parallel_data_source(arrays(), 5)
        assert len(list(parallel.batch_iterator(50, drop_last=True))) == 4
        assert_same_batches(
            arrays().batch_iterator(50, shuffle=1, epoch=3), parallel.batch_iterator(50, shuffle=1, epoch=3)
        )
        with pytest.raises(TypeError, match="shufle"):
            parallel.batch_iterator(50, shufle=1)

    def test_shards_are_those_of_the_source(self, pool):
        parts = [pool.parallel_data_source(arrays(), 5).shard(rank, 3) for rank in range(3)]
        seen = np.concatenate([y for part in parts for _, y in part.batch_iterator(16, shuffle=5)])
        assert sorted(seen.tolist()) == list(range(N))

    def test_it_counts_maps_and_averages_as_the_source(self, pool):
        parallel = pool.parallel_data_source(arrays(), 5)
        assert (parallel.num_samples(), parallel.num_batches(50), parallel.is_random_access) == (N, 5, False)
        assert_same_batches(arrays().map(to_dict).batch_iterator(50), parallel.map(to_dict).batch_iterator(50))
        assert parallel.batch_map_mean(lambda x, y: y.sum(), 50)[0] == Y.mean()

    def test_an_empty_source_has_no_batches(self, pool):
        assert list(pool.parallel_data_source(ArrayDataSource([X[:0]]), 5).batch_iterator(4)) == []

    def test_several_iterators_of_one_pool_take_turns(self, pool):
        one, other = pool.parallel_data_source(arrays(), 3), pool.parallel_data_source(arrays().map(scale_in_place), 4)
        pairs = zip(one.batch_iterator(7, shuffle=1), other.batch_iterator(7, shuffle=2), strict=True)
        expected = zip(
            arrays().batch_iterator(7, shuffle=1),
            arrays().map(scale_in_place).batch_iterator(7, shuffle=2),
            strict=True,
        )
        assert_same_batches(expected, pairs)

    def test_several_threads_iterate_at_once(self, pool):
        failures = []

        def iterate(seed):
            try:
                parallel = pool.parallel_data_source(arrays().map(scale_in_place), 3)
                for epoch in range(5):
                    assert_same_batches(
                        arrays().map(scale_in_place).batch_iterator(9, shuffle=seed, epoch=epoch),
                        parallel.batch_iterator(9, shuffle=seed, epoch=epoch),
                    )
            except BaseException as error:
                failures.append(error)

        consumers = [threading.Thread(target=iterate, args=(seed,)) for seed in range(4)]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join(DEADLINE)
        assert failures == []

    @pytest.mark.parametrize("library", ["memmap", "h5py", "tables"])
    def test_arrays_in_files_are_opened_by_the_workers(self, processes, tmp_path, library):
        path = str(tmp_path / "data")
        if library == "memmap":
            X.tofile(path)
            array, close = np.memmap(path, np.float32, "r", shape=X.shape), lambda: None
        elif library == "h5py":
            h5py = pytest.importorskip("h5py")
            with h5py.File(path, "w") as file:
                file.create_dataset("x", data=X)
            file = h5py.File(path, "r")
            array, close = file["x"], file.close
        else:
            tables = pytest.importorskip("tables")
            with tables.open_file(path, "w") as file:
                file.create_array("/", "x", obj=X)
            file = tables.open_file(path, "r")
            array, close = file.root.x, file.close
        try:
            ds = ArrayDataSource([array, Y]).map(as_it_is)
            actual = processes.parallel_data_source(ds, 5).batch_iterator(20, shuffle=1)
            assert_same_batches(arrays().batch_iterator(20, shuffle=1), actual)
            if library == "memmap":
                _, buffers = process_crew.pickle_code(ds)
                assert sum(buffer.nbytes for buffer in buffers) < X.nbytes
        finally:
            close()


def global_noise(x, y):
    return (np.random.normal(size=3), np.array([random.random()]), y)


class TestRandomNumbers:
    def test_global_generators_give_the_same_whoever_prepares_the_batch(self, processes):
        ds = arrays().map(global_noise)
        first = list(processes.parallel_data_source(ds, 5).batch_iterator(20, shuffle=3))
        with WorkerProcessPool(3) as other:
            second = list(other.parallel_data_source(ds, 2).batch_iterator(20, shuffle=3))
            third = list(other.parallel_data_source(ds, 2).batch_iterator(20, shuffle=3, epoch=1))
        assert_same_batches(first, second)
        values = [float(batch[k][0]) for batch in first + third for k in (0, 1)]
        assert len(set(values)) == len(values)

    def test_without_a_seed_every_pass_differs(self, processes):
        parallel = processes.parallel_data_source(arrays().map(global_noise), 5)
        passes = [[float(noise[0]) for noise, _, _ in parallel.batch_iterator(20)] for _ in range(2)]
        assert len(set(passes[0] + passes[1])) == 22

    def test_a_generator_in_the_same_state_gives_the_same_noise(self, processes):
        parallel = processes.parallel_data_source(arrays().map(global_noise), 5)
        one, other = (list(parallel.batch_iterator(20, shuffle=np.random.RandomState(5))) for _ in range(2))
        assert_same_batches(one, other)


class TestMemory:
    big = staticmethod(lambda: ArrayDataSource([np.random.default_rng(0).random((400, 3000))]))
    mapped = staticmethod(lambda: TestMemory.big().map(as_it_is))

    @pytest.fixture(params=["big", "mapped"])
    def source(self, request):
        return getattr(self, request.param)()

    def test_batches_are_the_callers_own(self, pool, source):
        expected = list(self.big().batch_iterator(16, shuffle=1))
        kept = []
        for (x,) in pool.parallel_data_source(source, 3).batch_iterator(16, shuffle=1):
            kept.append((x.copy(), x))
        for (expected_x,), (copy, x) in zip(expected, kept, strict=True):
            np.testing.assert_array_equal(expected_x, x)
            x += 1
            np.testing.assert_array_equal(copy + 1, x)

    def test_views_are_valid_until_the_next_batch(self, pool, source):
        expected = self.big().batch_iterator(16, shuffle=1)
        actual = pool.parallel_data_source(source, 3, copy=False).batch_iterator(16, shuffle=1)
        for (a,), (b,) in zip(expected, actual, strict=True):
            np.testing.assert_array_equal(a, b)
            assert not b.flags.writeable

    def test_what_a_function_has_given_can_still_be_written_by_whoever_has_it(self, threads):
        kept = {"x": np.zeros(3), "more": [np.ones(2), "text"]}
        ds = FunctionDataSource(lambda indices: kept, 4)
        (given,) = threads.parallel_data_source(ds, copy=False).batch_iterator(4)
        assert not given["x"].flags.writeable
        assert not given["more"][0].flags.writeable
        kept["x"] += 1
        assert given["x"].tolist() == [1, 1, 1]

    def test_memory_is_used_again(self):
        with WorkerProcessPool(2) as pool:
            arena = pool._crew._arena
            parallel = pool.parallel_data_source(self.mapped(), 3)
            for epoch in range(12):
                for _ in parallel.batch_iterator(16, shuffle=1, epoch=epoch):
                    pass
            # Those ahead, those lent, and one that is being read.
            assert 1 <= len(arena.slots) <= 3 + arena.most_lent + 1

    @pytest.mark.parametrize("make", [WorkerThreadPool, WorkerProcessPool])
    def test_batches_outlive_the_pool(self, make, source):
        with make(1) as pool:
            (x,) = next(pool.parallel_data_source(source, 1).batch_iterator(400))
        np.testing.assert_array_equal(self.big().data[0], x)

    def test_functions_that_ask_for_it_fill_the_batch_in_place(self, pool):
        made = []

        def grey(x, y, empty):
            out = empty((len(x), 1000), np.float32)
            out[:] = x.mean(axis=1, keepdims=True)
            made.append(out)
            return out, y

        parallel = pool.parallel_data_source(arrays().map(grey), 3)
        for (a, b), (x, y) in zip(parallel.batch_iterator(50), arrays().batch_iterator(50), strict=True):
            np.testing.assert_array_equal(np.repeat(x.mean(axis=1, keepdims=True), 1000, axis=1), a)
            np.testing.assert_array_equal(y, b)


class TestGroups:
    """Small batches that threads gather together."""

    def test_they_grow_from_one_to_a_bounded_size_and_only_of_plain_arrays(self, threads):
        sizes = partial(work_pool.group_sizes, crew=threads._crew, ahead=4)
        small = ArrayDataSource([np.zeros((10, 100_000), np.uint8), np.zeros((10, 25_000), np.int32)])
        assert sizes(small, 2) == [1, 2, 4, 10]  # of 4 MB
        assert sizes(small, 15) == sizes(small, 5_000_000) == [1]
        assert sizes(arrays(), 1)[-1] == work_pool.MOST_GROUPED
        assert sizes(ArrayDataSource([Nodes()]), 2) == sizes(small.map(scale_in_place), 2) == [1]

    def test_what_is_under_way_is_bounded_whatever_the_buffer(self, threads):
        ds = arrays(repeats=-1)
        for buffer in (1, 500):
            with threads.parallel_data_source(ds, buffer).batch_iterator(5, shuffle=1) as batches:
                for _ in range(1000):
                    next(batches)
                ahead = batches._drawing._drawn - batches.given
                assert ahead <= max(buffer, 2 * threads._crew.workers * work_pool.MOST_GROUPED) + work_pool.MOST_GROUPED

    def test_a_batch_that_is_kept_stays_as_it_was_while_others_take_its_neighbours_place(self):
        x = np.arange(4000 * 250, dtype=np.float32).reshape(4000, 250)
        with WorkerThreadPool(2) as pool:
            expected = ArrayDataSource([x], repeats=20).batch_iterator(40, shuffle=2)
            kept = []
            given = pool.parallel_data_source(ArrayDataSource([x], repeats=20), 4).batch_iterator(40, shuffle=2)
            for number, ((a,), (b,)) in enumerate(zip(expected, given, strict=True)):
                np.testing.assert_array_equal(a, b)
                if number % 37 == 0:
                    kept.append((a[3:9].copy(), b[3:9]))
                else:
                    b[:] = -1
            del a, b
        for a, b in kept:
            np.testing.assert_array_equal(a, b)


class TestRows:
    """Rows of numpy arrays, which a pool of processes gathers by threads of this one."""

    @pytest.mark.parametrize("source", ["arrays", "weighted", "dict", "composite", "nested", "choice"])
    def test_no_process_is_asked(self, source):
        with WorkerProcessPool(2) as pool:
            list(itertools.islice(pool.parallel_data_source(SOURCES[source](), 3).batch_iterator(20, shuffle=1), 30))
            assert not pool._crew._arena.slots
            assert not pool._crew._constants

    @pytest.mark.parametrize("source", ["array-like", "mapped", "ragged, with texts"])
    def test_what_runs_a_users_code_is_for_processes(self, source):
        with WorkerProcessPool(2) as pool:
            before = pool_threads()
            next(pool.parallel_data_source(SOURCES[source](), 3).batch_iterator(20, shuffle=1))
            assert pool_threads() == before
            assert pool._crew._arena.slots

    def test_objects_are_for_processes(self):
        with WorkerProcessPool(1) as pool:
            ds = ArrayDataSource([np.array([{"a": 1}, None, "b"], dtype=object)])
            ((x,),) = pool.parallel_data_source(ds).batch_iterator(3)
            assert x.tolist() == [{"a": 1}, None, "b"]
            assert pool._crew._arena.slots

    def test_they_come_while_all_processes_are_busy(self, tmp_path):
        go = tmp_path / "go"

        def wait(indices):
            deadline = time.monotonic() + DEADLINE
            while not go.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            return (indices,)

        with WorkerProcessPool(1) as pool:
            slow = pool.parallel_data_source(FunctionDataSource(wait, 2)).batch_iterator(1)
            assert_same_batches(arrays().batch_iterator(50), pool.parallel_data_source(arrays(), 3).batch_iterator(50))
            go.touch()
            assert [indices.tolist() for (indices,) in slow] == [[0], [1]]

    def test_a_later_pass_sees_what_was_changed(self):
        data = np.zeros((50, 4))
        with WorkerProcessPool(1) as pool:
            parallel = pool.parallel_data_source(ArrayDataSource([data]), 3)
            assert all((x == 0).all() for (x,) in parallel.batch_iterator(10))
            data[49, 3] = 7
            assert [x.max() for (x,) in parallel.batch_iterator(10)] == [0, 0, 0, 0, 7]

    def test_there_are_no_more_threads_than_processors(self):
        with WorkerProcessPool(3) as pool:
            next(pool.parallel_data_source(arrays(), 3).batch_iterator(20))
            assert len(pool._threads._threads) == min(3, len(os.sched_getaffinity(0)))


def doubled_here(x, y):
    return x * 2, y, np.array([os.getpid()])


EVENTS = {"begun": threading.Event(), "go": threading.Event()}


def events_first(indices):
    EVENTS["begun"].set()
    EVENTS["go"].wait(DEADLINE)
    return (np.zeros((len(indices), 100_000)),)


def slow_noise(x, y):
    first = np.random.normal(size=3)
    time.sleep(0.005)  # another thread runs
    return first, np.random.normal(size=3), y


class Interrupted:
    """An array-like that is interrupted when it is first read."""

    def __init__(self, marker):
        self.marker = marker

    def __len__(self):
        return 6

    def __getitem__(self, index):
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.marker, os.O_CREAT | os.O_EXCL))
            raise KeyboardInterrupt
        return np.asarray(index)


def test_a_shared_constant_of_another_pool_is_refused(processes):
    # Its number is another constant's there, or nobody's, which workers would wait for.
    with WorkerProcessPool(1) as other:
        constant = other.shared_constant([1, 2])
        assert list(other.work_stream([(len, (constant,))])) == [2]
        with pytest.raises(RuntimeError, match="of its own pool only"):
            next(processes.work_stream([(len, (constant,))]))
        ds = ArrayDataSource([X]).map(partial(shared_rows, constant))
        with pytest.raises(RuntimeError, match="of its own pool only"):
            processes.parallel_data_source(ds).batch_iterator(10)
    assert list(processes.work_stream([(len, ("abc",))])) == [3]


@pytest.mark.parametrize("mapped", [False, True])
def test_arrays_of_a_class_of_their_own_stay_what_they_are(pool, mapped):
    hidden = np.ma.masked_array(Y, Y % 3 == 0)
    records = np.rec.fromarrays([Y, X[:, 0]], names="y,x")
    ds = ArrayDataSource([hidden, records])
    if mapped:
        ds = ds.map(as_it_is)
    for y, record in pool.parallel_data_source(ds, 3).batch_iterator(20, shuffle=2):
        assert (np.ma.getmaskarray(y) == (y.data % 3 == 0)).all()
        assert (record.y == y.data).all()


class TestHelpWhileStarting:
    """Whoever asks for batches prepares them, until a process has begun."""

    @pytest.fixture
    def go(self, monkeypatch, tmp_path):
        """A function that lets processes begin, which wait until then."""
        path = tmp_path / "go"
        waiting = f"import os, time\nwhile not os.path.exists({str(path)!r}): time.sleep(0.001)\n"
        monkeypatch.setattr(process_crew.worker, "BOOTSTRAP", waiting + process_crew.worker.BOOTSTRAP)
        return path.touch

    @pytest.fixture
    def stack(self):
        with contextlib.ExitStack() as stack:
            yield stack

    @pytest.fixture
    def helped(self, go):
        with WorkerProcessPool(2, help_while_starting=True) as pool:
            yield pool

    @pytest.mark.parametrize("shuffle", ["seed", "RandomState"])
    @pytest.mark.parametrize(
        "source", ["array-like", "mapped", "mapped with noise", "mapped to dicts", "ragged, with texts"]
    )
    @pytest.mark.parametrize("copy", [True, False])
    def test_the_batches_are_those_of_the_source(self, helped, source, shuffle, copy):
        ds = SOURCES[source]()
        expected = ds.batch_iterator(17, shuffle=SHUFFLES[shuffle]())
        actual = helped.parallel_data_source(ds, 5, copy=copy).batch_iterator(17, shuffle=SHUFFLES[shuffle]())
        assert_same_batches(expected, actual)
        assert not any(handle.began for handle in helped._crew._workers.values())

    def test_processes_take_over_when_they_have_begun(self, helped, go):
        batches = helped.parallel_data_source(arrays(repeats=-1).map(doubled_here), 3).batch_iterator(10)
        expected = arrays(repeats=-1).batch_iterator(10)
        pids = []
        deadline = time.monotonic() + DEADLINE
        for (x, y), (doubled, labels, pid) in zip(expected, batches, strict=False):
            np.testing.assert_array_equal(x * 2, doubled)
            np.testing.assert_array_equal(y, labels)
            pids.append(int(pid[0]))
            if len(pids) == 5:
                go()
            if len(set(pids)) == 3 or time.monotonic() > deadline:
                break
        assert set(pids) == {os.getpid(), *worker_pids(helped)}
        first = next(number for number, pid in enumerate(pids) if pid != os.getpid())
        assert first >= 5
        assert os.getpid() not in pids[first + 3 :]  # of those before, some may have been begun here

    def test_the_global_generators_are_as_in_processes_and_untouched_here(self, helped, processes):
        ds = arrays().map(global_noise)
        expected = list(processes.parallel_data_source(ds, 5).batch_iterator(20, shuffle=3))
        np.random.seed(1)
        random.seed(1)
        assert_same_batches(expected, helped.parallel_data_source(ds, 5).batch_iterator(20, shuffle=3))
        drawn = np.random.random(), random.random()
        np.random.seed(1)
        random.seed(1)
        assert drawn == (np.random.random(), random.random())

    def test_several_threads_that_ask_help_one_after_the_other(self):
        # The global generators of numpy and Python are seeded for a batch, and there is one of each.
        inside = threading.Event()

        def ask():
            with process_crew.worker.in_place_of_a_worker(lambda number: number):
                inside.set()

        asking = threading.Thread(target=ask)
        with process_crew.worker.in_place_of_a_worker(lambda number: -number):
            asking.start()
            with process_crew.worker.in_place_of_a_worker(lambda number: 2 * number):  # as a pool within a pool does
                assert process_crew.worker.constant(4) == 8
            assert process_crew.worker.constant(4) == -4
            assert not inside.wait(0.1)
        assert inside.wait(DEADLINE)
        asking.join()

    def test_the_source_is_as_it_was_when_the_iterator_was_made(self, helped):
        data = np.zeros((20, 2))
        batches = helped.parallel_data_source(ArrayDataSource([data]).map(as_it_is), 2).batch_iterator(10)
        data[:] = 1
        assert [x.max() for (x,) in batches] == [0, 0]

    def test_an_error_says_where_it_was_and_the_rest_comes(self, helped):
        batches = helped.parallel_data_source(ArrayDataSource([Unreadable(), Y]), 4).batch_iterator(20)
        next(batches)
        with pytest.raises(KeyError, match="no picture 25") as info:
            next(batches)
        notes = "\n".join(info.value.__notes__)
        assert "Raised in this process, before its workers had begun, by batch 1 (sample indices [20" in notes
        assert "__getitem__" in notes
        assert not any(module in notes for module in ("pool_worker.py", "process_crew.py"))
        assert len(list(batches)) == 9

    def test_an_interrupted_batch_can_be_asked_for_again(self, helped, tmp_path):
        ds = ArrayDataSource([Interrupted(str(tmp_path / "marker"))]).map(as_it_is)
        batches = helped.parallel_data_source(ds, 2).batch_iterator(3)
        with pytest.raises(KeyboardInterrupt):
            next(batches)
        assert [x.tolist() for (x,) in batches] == [[0, 1, 2], [3, 4, 5]]
        assert helped._crew._arena.busy == 2  # the requests; what was interrupted has left its slot

    def test_shared_constants_in_the_source(self, helped):
        constant = helped.shared_constant({"x": X})
        ds = FunctionDataSource(partial(shared_rows, constant), 20)
        batches = helped.parallel_data_source(ds, 2).batch_iterator(8)
        np.testing.assert_array_equal(np.concatenate([x for (x,) in batches]), X[:20])
        with pytest.raises(RuntimeError, match="tasks of its own pool only"):
            process_crew.worker.constant(constant.number)

    def test_tasks_are_left_to_processes(self, helped, go):
        stream = helped.work_stream([(os.getpid,)] * 3)
        go()
        assert os.getpid() not in list(stream)

    def test_when_a_process_has_ended_nothing_more_is_done_here(self, monkeypatch):
        monkeypatch.setattr(process_crew.worker, "BOOTSTRAP", "raise SystemExit(7)")
        with WorkerProcessPool(2, help_while_starting=True) as pool:
            for handle in list(pool._crew._workers.values()):
                handle.process.wait(DEADLINE)
            with pytest.raises(WorkerDied, match="exit code 7 before it had"):
                next(pool.parallel_data_source(arrays().map(doubled_here), 2).batch_iterator(10))

    def test_a_pool_that_is_closed_while_a_batch_is_prepared_says_so(self, helped):
        begun, go = EVENTS["begun"], EVENTS["go"]
        begun.clear()
        go.clear()
        raised = []

        def wait():
            try:
                next(helped.parallel_data_source(FunctionDataSource(events_first, 10)).batch_iterator(5))
            except RuntimeError as error:
                raised.append(str(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert begun.wait(DEADLINE)
        helped.close()
        go.set()
        waiting.join(DEADLINE)
        assert not waiting.is_alive()
        assert "the pool is closed" in raised[0]

    @pytest.mark.parametrize("pools", [1, 2])
    def test_two_that_ask_at_once_do_not_share_the_global_generators(self, helped, stack, pools):
        expected, given = {}, {}
        other = helped if pools == 1 else stack.enter_context(WorkerProcessPool(1, help_while_starting=True))

        def iterate(seed):
            parallel = (helped if seed == 1 else other).parallel_data_source(arrays().map(slow_noise), 3)
            given[seed] = list(parallel.batch_iterator(50, shuffle=seed))

        for seed in (1, 2):
            iterate(seed)
        expected.update(given)
        consumers = [threading.Thread(target=iterate, args=(seed,)) for seed in (1, 2)]
        for consumer in consumers:
            consumer.start()
        for consumer in consumers:
            consumer.join(DEADLINE)
        for seed in (1, 2):
            assert_same_batches(expected[seed], given[seed])

    def test_a_function_may_make_such_a_pool_of_its_own(self, helped):
        def inner(indices):
            with WorkerProcessPool(1, help_while_starting=True) as pool:
                return next(pool.parallel_data_source(arrays().map(scale_in_place)).batch_iterator(len(indices)))

        (batch,) = helped.parallel_data_source(FunctionDataSource(inner, 5)).batch_iterator(5)
        assert_same(next(arrays().map(scale_in_place).batch_iterator(5)), batch)

    def test_a_source_is_kept_for_help_no_longer_than_it_is_needed(self, helped):
        for _ in range(3):
            next(helped.parallel_data_source(arrays().map(as_it_is), 3).batch_iterator(10))
            gc.collect()
        assert 1 <= len(helped._crew._known) <= 2  # the one before was let go of when there was next to do
        helped.close()
        assert not helped._crew._known

    def test_nothing_is_left_of_what_was_done_here(self, helped):
        parallel = helped.parallel_data_source(arrays().map(scale_in_place), 3)
        for epoch in range(5):
            list(parallel.batch_iterator(10, shuffle=1, epoch=epoch))
        arena = helped._crew._arena
        # Requests that no process has read about yet keep their slots; there are not more than that.
        assert len(arena.slots) <= process_crew.MOST_SLOTS + 3 + arena.most_lent + 1


class TestResume:
    @pytest.mark.parametrize("shuffle", SHUFFLES)
    @pytest.mark.parametrize("source", ["subset, repeated", "weighted", "composite", "choice", "mapped with noise"])
    @pytest.mark.parametrize("at", [0, 1, 8])
    def test_from_any_batch_at_another_number_of_workers(self, processes, threads, source, shuffle, at):
        if source == "weighted" and shuffle == "in order":
            pytest.skip("a weighted sampler has no order")
        ds = SOURCES[source]()
        one = processes.parallel_data_source(ds, 6).batch_iterator(10, shuffle=SHUFFLES[shuffle]())
        for _ in itertools.islice(one, at):
            pass
        state = json.loads(json.dumps(one.state_dict()))
        left = list(itertools.islice(one, 12))
        with WorkerThreadPool(3) as three:
            other = three.parallel_data_source(ds, 2).batch_iterator(10, shuffle=SHUFFLES[shuffle]())
            next(other)
            other.load_state_dict(state)
            got = list(itertools.islice(other, 5))
            again = json.loads(json.dumps(other.state_dict()))
        serial = ds.batch_iterator(10, shuffle=SHUFFLES[shuffle]())
        serial.load_state_dict({name: value for name, value in again.items() if name != "pool"})
        got += itertools.islice(serial, 7)
        assert_same_batches(left, got)

    def test_from_a_state_of_the_source_itself(self, pool):
        serial = arrays().batch_iterator(10, shuffle=4)
        next(serial)
        parallel = pool.parallel_data_source(arrays(), 5).batch_iterator(10, shuffle=4)
        parallel.load_state_dict(serial.state_dict())
        assert_same_batches(serial, parallel)

    def test_at_the_end_nothing_is_left(self, pool):
        one = pool.parallel_data_source(arrays(), 5).batch_iterator(10, shuffle=4)
        list(one)
        other = pool.parallel_data_source(arrays(), 5).batch_iterator(10, shuffle=4)
        other.load_state_dict(one.state_dict())
        assert list(other) == []

    def test_global_noise_goes_on(self, processes):
        parallel = processes.parallel_data_source(arrays().map(global_noise), 3)
        one, other = parallel.batch_iterator(20, shuffle=3), parallel.batch_iterator(20, shuffle=3)
        next(one)
        other.load_state_dict(one.state_dict())
        assert_same_batches(one, other)

    def test_a_long_pass_can_be_saved_anywhere(self, threads, monkeypatch):
        monkeypatch.setattr(work_pool, "ANCHOR_EVERY", 8)
        rng = np.random.RandomState(1)
        one = threads.parallel_data_source(arrays(repeats=4), 5).batch_iterator(3, shuffle=rng)
        for _ in itertools.islice(one, 211):
            pass
        before = rng.get_state()[1].tolist()
        state = one.state_dict()
        assert rng.get_state()[1].tolist() == before
        # Those before it have been let go, but the last; there are 8 batches from one to the next.
        assert len(one._drawing.anchors) <= 2 + (one._drawing._drawn - one.given) // 8
        left = list(one)
        serial = arrays(repeats=4).batch_iterator(3, shuffle=np.random.RandomState(9))
        serial.load_state_dict({name: value for name, value in state.items() if name != "pool"})
        assert_same_batches(left, serial)

    def test_a_source_without_states_says_so(self, pool):
        class Own(RandomAccessDataSource):
            def samples_by_indices_nomapping(self, indices):
                return (Y[indices],)

            def batch_indices_iterator(self, batch_size, **kwargs):
                return iter(np.split(np.arange(20), 4))

        parallel = pool.parallel_data_source(Own(20), 2).batch_iterator(5)
        assert next(parallel)[0].tolist() == [0, 1, 2, 3, 4]
        with pytest.raises(StateError, match="cannot be saved"):
            parallel.state_dict()


class Unreadable:
    def __len__(self):
        return N

    def __getitem__(self, index):
        if 25 in np.atleast_1d(index):
            raise KeyError("no picture 25")
        return X[index]


class TwoArguments(Exception):
    def __init__(self, one, two):
        super().__init__(one)


class TestErrors:
    def test_a_bad_batch_raises_with_the_workers_traceback_and_its_indices_and_iteration_goes_on(self, pool):
        batches = pool.parallel_data_source(ArrayDataSource([Unreadable(), Y]), 4).batch_iterator(10)
        assert [next(batches)[1][0], next(batches)[1][0]] == [0, 10]
        with pytest.raises(KeyError, match="no picture 25") as info:
            next(batches)
        notes = "\n".join(info.value.__notes__)
        assert "by batch 2 (sample indices [20 21 22 23 24 25 26 27 28 29])" in notes
        text = notes if pool._crew.workers and "traceback there" in notes else str(info.getrepr())
        assert "__getitem__" in text
        assert [batch[1][0] for batch in batches] == list(range(30, N, 10))

    def test_an_exception_that_cannot_be_brought_here_is_described(self, processes):
        def fail():
            raise TwoArguments("first", "second")

        with pytest.raises(WorkerError, match="TwoArguments: first") as info:
            next(processes.work_stream([(fail,)]))
        assert "in fail" in "\n".join(info.value.__notes__)

    def test_even_leaving_the_process_is_an_exception(self, processes):
        with pytest.raises(SystemExit):
            next(processes.work_stream([(sys.exit, (3,))]))
        assert next(processes.work_stream([(pow, (2, 3))])) == 8

    def test_what_cannot_be_sent_raises_here(self, processes):
        with pytest.raises(TypeError, match="pickle"):
            list(processes.work_stream([(print, (threading.Lock(),))]))

    @pytest.mark.parametrize("ds", [IteratorDataSource(iter([])), [X], None])
    def test_only_sources_with_access_by_index(self, pool, ds):
        with pytest.raises(TypeError):
            pool.parallel_data_source(ds)

    @pytest.mark.parametrize("number", [0, -1, 1.5, True, None])
    def test_numbers_are_checked(self, threads, number):
        with pytest.raises((ValueError, TypeError), match="must be"):
            WorkerThreadPool(number)
        with pytest.raises((ValueError, TypeError), match="must be"):
            WorkerProcessPool(number)
        with pytest.raises((ValueError, TypeError), match="must be"):
            threads.parallel_data_source(arrays(), number)
        with pytest.raises((ValueError, TypeError), match="must be"):
            threads.work_stream([], number)

    def test_errors_of_the_indices_come_after_the_batches_before_them(self, pool):
        class Broken(RandomAccessDataSource):
            def samples_by_indices_nomapping(self, indices):
                return (indices,)

            def batch_indices_iterator(self, batch_size, **kwargs):
                yield np.arange(3)
                raise OSError("the list is cut")

        batches = pool.parallel_data_source(Broken(3), 2).batch_iterator(3)
        assert next(batches)[0].tolist() == [0, 1, 2]
        with pytest.raises(OSError, match="the list is cut"):
            next(batches)
        assert list(batches) == []


def die_once(marker, sample):
    def function(x, y):
        if sample in y:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return x * 2, y, np.array([os.getpid()])

    return function


class TestDeath:
    @pytest.mark.parametrize("workers", [1, 2])
    def test_the_batches_of_a_dead_worker_are_prepared_again(self, tmp_path, workers):
        with WorkerProcessPool(workers) as pool:
            before = worker_pids(pool)
            ds = arrays().map(die_once(str(tmp_path / "marker"), 77))
            batches = list(pool.parallel_data_source(ds, 8).batch_iterator(5, shuffle=2))
            assert (tmp_path / "marker").exists()
            after = worker_pids(pool)
        assert len(after) == workers
        assert len(set(before) & set(after)) == workers - 1
        expected = arrays().batch_iterator(5, shuffle=2)
        for (x, y), (doubled, labels, _) in zip(expected, batches, strict=True):
            np.testing.assert_array_equal(x * 2, doubled)
            np.testing.assert_array_equal(y, labels)

    def test_workers_killed_over_and_over_lose_and_double_nothing(self):
        ds = FunctionDataSource(lambda indices: (indices, np.sqrt(np.arange(20_000)) + indices[0]), 2000)
        rng, killed = random.Random(5), 0
        with WorkerProcessPool(2) as pool:
            for copy in (True, False):
                seen = []
                for number, (indices, _) in enumerate(
                    pool.parallel_data_source(ds, 7, copy=copy).batch_iterator(10, shuffle=3)
                ):
                    seen += indices.tolist()
                    if number % 40 == 20:
                        # One that has begun: a pool gives up when three in a row die before that.
                        begun = [each.process.pid for each in pool._crew._workers.values() if each.began]
                        if begun:
                            os.kill(rng.choice(begun), signal.SIGKILL)
                            killed += 1
                assert sorted(seen) == list(range(2000))
            assert len(worker_pids(pool)) == 2
        assert killed >= 3

    def test_a_batch_that_kills_its_worker_three_times_is_an_error_and_the_rest_comes(self, processes):
        def deadly(x, y):
            if 25 in y:
                os.kill(os.getpid(), signal.SIGKILL)
            return x, y

        batches = processes.parallel_data_source(arrays().map(deadly), 4).batch_iterator(10)
        got = [int(next(batches)[1][0]) for _ in range(2)]
        with pytest.raises(WorkerDied, match=r"batch 2 \(sample indices .* 3 times: it was ended by SIGKILL"):
            next(batches)
        got += [int(y[0]) for _, y in batches]
        assert got == [0, 10, *range(30, N, 10)]

    def test_a_worker_killed_while_idle_is_replaced(self, processes):
        assert next(processes.work_stream([(pow, (2, 2))])) == 4
        for pid in worker_pids(processes):
            os.kill(pid, signal.SIGKILL)
        assert list(processes.work_stream([(pow, (2, n)) for n in range(5)])) == [1, 2, 4, 8, 16]

    def test_workers_that_cannot_begin_are_an_error(self, monkeypatch):
        monkeypatch.setattr(process_crew.worker, "BOOTSTRAP", "raise SystemExit(7)")
        with WorkerProcessPool(2) as pool:
            for _ in range(3):
                with pytest.raises(WorkerDied, match="exit code 7 before it had"):
                    next(pool.work_stream([(pow, (2, 2))]))
            monkeypatch.undo()
            assert next(pool.work_stream([(pow, (2, 2))])) == 4

    def test_workers_end_when_their_owner_is_killed(self):
        program = """
        import time
        from mlqueue.batch.work_pool import WorkerProcessPool
        pool = WorkerProcessPool(2)
        stream = pool.work_stream([(time.sleep, (3600,)), (pow, (2, 2))])
        print(*[handle.process.pid for handle in pool._crew._workers.values()], flush=True)
        next(stream)
        """
        with run(program) as process:
            pids = [int(pid) for pid in process.stdout.readline().split()]
            assert len(pids) == 2
            process.kill()
            process.wait(DEADLINE)
        assert all(wait_until_gone(pid) for pid in pids)


@contextlib.contextmanager
def run(program):
    """A Python process that runs a program from a file."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def output_of(program):
    with run(program) as process:
        out, err = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, err
        assert err == ""
        return out


class TestEnd:
    def test_a_closed_pool_leaves_nothing(self):
        gc.collect()
        fds, shm, threads_before = open_fds(), set(os.listdir("/dev/shm")), threading.active_count()
        with WorkerProcessPool(2) as pool:
            parallel = pool.parallel_data_source(arrays().map(as_it_is), 4)
            batches = parallel.batch_iterator(10)
            kept = next(batches)
            assert_same(kept, next(pool.parallel_data_source(arrays(), 4).batch_iterator(10)))
            pids = worker_pids(pool)
            constant = pool.shared_constant(X)
        with WorkerThreadPool(2) as thread_pool:
            next(thread_pool.parallel_data_source(arrays(), 4).batch_iterator(10))
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        assert threading.active_count() == threads_before
        assert set(os.listdir("/dev/shm")) == shm
        assert kept[1].tolist() == list(range(10))
        del pool, thread_pool, parallel, batches, constant
        gc.collect()
        assert open_fds() == fds

    def test_an_iterator_that_is_dropped_ends_its_work_at_once_not_when_garbage_is_collected(self):
        gc.disable()
        try:
            with WorkerThreadPool(1) as pool:
                batches = pool.parallel_data_source(arrays(), 4).batch_iterator(10, shuffle=1)
                next(batches)
                gone = weakref.ref(batches)
                del batches
                assert gone() is None
        finally:
            gc.enable()

    def test_work_given_out_while_the_pool_is_closed_is_answered(self, monkeypatch):
        crew = ThreadCrew(2)
        inbox = crew._inbox

        class Closing:
            """Another thread closes the crew just before work is put in."""

            def put(self, lease):
                monkeypatch.setattr(crew, "_inbox", inbox)
                crew.close()
                inbox.put(None)  # one that a thread has not seen yet
                inbox.put(lease)

        monkeypatch.setattr(crew, "_inbox", Closing())
        with pytest.raises(RuntimeError, match="the pool is closed"):
            crew.result(crew.submit(work_pool.Call(pow, (2, 2))))
        assert inbox.get_nowait() is None

    def test_a_dropped_pool_leaves_nothing(self):
        pool, thread_pool = WorkerProcessPool(2), WorkerThreadPool(2)
        assert next(pool.work_stream([(pow, (2, 2))])) == next(thread_pool.work_stream([(pow, (2, 2))])) == 4
        pids, workers = worker_pids(pool), thread_pool._crew._threads
        del pool, thread_pool
        gc.collect()
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)
        for thread in workers:
            thread.join(DEADLINE)
            assert not thread.is_alive()

    def test_a_pool_is_closed_while_its_workers_are_busy(self):
        pool = WorkerProcessPool(2)
        stream = pool.work_stream([(time.sleep, (3600,))] * 3)
        raised = []

        def wait():
            try:
                next(stream)
            except RuntimeError as error:
                raised.append(str(error))

        waiting = threading.Thread(target=wait)
        waiting.start()
        begun = time.monotonic()
        pool.close()
        waiting.join(DEADLINE)
        assert not waiting.is_alive()
        assert "closed" in raised[0]
        assert time.monotonic() - begun < DEADLINE

    @pytest.mark.parametrize("make", [WorkerThreadPool, WorkerProcessPool])
    @pytest.mark.parametrize("source", ["arrays", "mapped"])
    def test_a_closed_pool_says_so(self, make, source):
        pool = make(1)
        parallel = pool.parallel_data_source(SOURCES[source](), 2)
        batches = parallel.batch_iterator(10)
        pool.close()
        pool.close()
        with pytest.raises(RuntimeError, match="closed"):
            list(batches)
        with pytest.raises(RuntimeError, match="closed"):
            parallel.batch_iterator(10)
        with pytest.raises(RuntimeError, match="closed"):
            list(pool.work_stream([(pow, (2, 2))]))

    @pytest.mark.parametrize("end", ["close", "drop", "with"])
    def test_work_ends_with_its_iterator(self, pool, tmp_path, end):
        log = tmp_path / "log"
        go = tmp_path / "go"

        def write(indices):
            with open(log, "a") as file:
                file.write(f"{indices[0]}\n")
            deadline = time.monotonic() + DEADLINE
            while not go.exists() and time.monotonic() < deadline:
                time.sleep(0.001)
            return (indices,)

        batches = pool.parallel_data_source(FunctionDataSource(write, 1000), 20).batch_iterator(1)
        if end == "close":
            batches.close()
            assert list(batches) == []
        elif end == "with":
            with batches:
                pass
        else:
            reference = weakref.ref(batches)
            del batches
            gc.collect()
            assert reference() is None
        go.touch()
        # Twenty tasks were submitted. Those that a worker had in hand when the work ended may still write, also while
        # another worker serves what comes next; no other one begins.
        for _ in range(3):
            list(pool.work_stream([(pow, (2, 2))] * 8))
            begun = log.read_text().split() if log.exists() else []
            assert len(begun) <= pool._crew.workers

    def test_a_script_needs_no_main_guard_and_may_have_classes_and_lambdas(self):
        out = output_of("""
        import os, warnings
        warnings.simplefilter("error")
        import numpy as np
        from mlqueue.batch.data_source import ArrayDataSource
        from mlqueue.batch.work_pool import WorkerProcessPool

        class Images:
            def __len__(self):
                return 10
            def __getitem__(self, index):
                return OFFSET + np.asarray(index)

        class Answer:
            def __init__(self, value):
                self.value = value

        OFFSET = 100
        pool = WorkerProcessPool(2)
        ds = ArrayDataSource([Images()]).map(lambda x: (x, x * 2))
        print([b.tolist() for _, b in pool.parallel_data_source(ds).batch_iterator(4)])
        print([a.value for a in pool.work_stream([(Answer, (n,)) for n in range(3)])])
        print(next(pool.work_stream([(os.getpid,)])) != os.getpid())
        """)
        assert out.splitlines() == ["[[200, 202, 204, 206], [208, 210, 212, 214], [216, 218]]", "[0, 1, 2]", "True"]

    @pytest.mark.parametrize("kind", ["Process", "Thread"])
    def test_a_pool_is_not_for_forked_processes(self, kind):
        out = output_of(f"""
        import os, sys, warnings
        import numpy as np
        from mlqueue.batch.data_source import ArrayDataSource
        from mlqueue.batch.work_pool import Worker{kind}Pool
        pool = Worker{kind}Pool(1)
        parallel = pool.parallel_data_source(ArrayDataSource([np.arange(3)]))
        warnings.simplefilter("ignore")
        pid = os.fork()
        if pid == 0:
            for use in (lambda: pool.work_stream([(pow, (2, 2))]), lambda: parallel.batch_iterator(3)):
                try:
                    next(use())
                except RuntimeError as error:
                    print(error, flush=True)
            del pool, parallel
            sys.exit(0)
        os.waitpid(pid, 0)
        print(next(pool.work_stream([(pow, (2, 2))])), next(parallel.batch_iterator(3))[0].tolist())
        """)
        kind = {"Process": "processes", "Thread": "threads"}[kind]
        error = f"a pool of {kind} belongs to the process that made it; make one after the fork."
        assert out.splitlines() == [error, error, "4 [0, 1, 2]"]

    def test_what_was_begun_before_a_fork_is_the_owners(self):
        out = output_of("""
        import fcntl, os, termios, threading, time, warnings
        import numpy as np
        from mlqueue.batch import process_crew
        from mlqueue.batch.data_source import FunctionDataSource
        from mlqueue.batch.work_pool import WorkerProcessPool, WorkerThreadPool
        go = threading.Event()
        def wait(indices):
            go.wait(10)
            return (indices,)
        threads, processes = WorkerThreadPool(1), WorkerProcessPool(1, help_while_starting=True)
        task = processes.work_stream([(pow, (2, 2))])
        sources = threads.parallel_data_source(FunctionDataSource(wait, 3), 3), processes.parallel_data_source(
            FunctionDataSource(lambda indices: (indices,), 3), 3)
        batches = [source.batch_iterator(1) for source in sources]
        # Until the process has begun, and has answered all four: nobody has read of it.
        (results,), size = processes._crew._workers, 5 * process_crew.worker.RESULT.size
        deadline = time.monotonic() + 10
        while int.from_bytes(fcntl.ioctl(results, termios.FIONREAD, bytes(4)), "little") < size:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        warnings.simplefilter("ignore")
        pid = os.fork()
        if pid == 0:
            for each in batches:
                try:
                    next(each)
                except RuntimeError as error:
                    print(error, flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
        go.set()
        print(next(task), [[rows.tolist() for (rows,) in each] for each in batches])
        """)
        error = "a pool of {} belongs to the process that made it; make one after the fork."
        given = [[0], [1], [2]]
        assert out.splitlines() == [error.format("threads"), error.format("processes"), f"4 {[given, given]}"]

    def test_importing_needs_numpy_only(self):
        out = output_of("""
        import sys
        import mlqueue.batch.work_pool
        print({name.partition(".")[0] for name in sys.modules} & {"joblib", "cloudpickle", "tables", "h5py", "torch"})
        """)
        assert out.strip() == "set()"


def shared_sum(constant, n):
    return float(constant["x"].sum()) + n


def shared_rows(constant, indices):
    return (constant["x"][indices],)


def address_of(array):
    return array.flags.owndata


class TestWorkStream:
    def test_results_come_in_the_order_of_the_tasks(self, pool):
        def slow(n):
            time.sleep(0.002 * (n % 3))
            return n

        assert list(pool.work_stream([(slow, (n,)) for n in range(30)], 7)) == list(range(30))

    def test_the_three_forms_of_a_task(self, pool):
        tasks = [(dict,), (divmod, (17, 5)), (sorted, ([1, 3, 2],), {"reverse": True})]
        assert list(pool.work_stream(tasks).retrieve_iter()) == [{}, (3, 2), [3, 2, 1]]

    def test_retrieve_gives_none_at_the_end_and_a_none_result_can_be_told_from_it(self, pool):
        stream = pool.work_stream([(pow, (2, 2)), (print,), (pow, (2, 3))])
        assert [stream.retrieve() for _ in range(5)] == [4, None, 8, None, None]
        assert list(pool.work_stream([(print,), (print,)])) == [None, None]

    @pytest.mark.parametrize("task", [pow, (), (1, (2,)), (pow, (1,), {}, 4), [1, (2,)]])
    def test_other_tasks_are_refused_when_their_turn_comes(self, pool, task):
        stream = pool.work_stream([(pow, (2, 2)), task, (pow, (2, 3))])
        assert next(stream) == 4
        with pytest.raises(TypeError, match="a task is a tuple"):
            next(stream)

    def test_tasks_are_drawn_only_as_far_as_the_buffer(self, pool):
        drawn = []
        stream = pool.work_stream(((pow, (2, drawn.append(n) or n)) for n in itertools.count()), 5)
        assert len(drawn) == 5
        assert [next(stream), next(stream)] == [1, 2]
        assert len(drawn) == 7

    def test_after_an_error_the_rest_comes_and_the_buffer_stays_full(self, pool):
        drawn = []
        tasks = [(divmod, (6, n)) for n in (1, 0, 2, 0, 3)]
        stream = pool.work_stream((drawn.append(n) or task for n, task in enumerate(tasks)), 2)
        assert stream.retrieve() == (6, 0)
        with pytest.raises(ZeroDivisionError):
            stream.retrieve()
        assert len(drawn) == 4
        assert next(stream) == (3, 0)
        with pytest.raises(ZeroDivisionError):
            next(stream)
        assert list(stream) == [(2, 0)]

    def test_large_arguments_and_results_travel(self, pool):
        big = np.random.default_rng(1).random(300_000)
        for result in pool.work_stream([(np.negative, (big,))] * 3, 2):
            np.testing.assert_array_equal(-big, result)
            assert result.flags.writeable

    def test_more_tasks_than_slots(self, processes):
        one = processes.work_stream([(pow, (n, 2)) for n in range(500)], 400)
        other = processes.work_stream([(divmod, (n, n % 2)) for n in range(300)], 300)
        for n in range(300):  # while the results of the other fill all slots there are
            if n % 2:
                assert next(other) == (n, 0)
            else:
                with pytest.raises(ZeroDivisionError):
                    next(other)
        assert list(one) == [n * n for n in range(500)]
        crew = processes._crew
        assert len(crew._arena.slots) <= process_crew.CROWDED + process_crew.MOST_SLOTS + crew._arena.most_lent


class TestShared:
    def test_a_shared_constant_arrives_as_the_value(self, pool):
        constant = pool.shared_constant({"x": X})
        tasks = [(shared_sum, (constant, n)) for n in range(4)]
        assert list(pool.work_stream(tasks)) == [float(X.sum()) + n for n in range(4)]

    def test_its_arrays_lie_in_shared_memory(self, processes):
        constant = processes.shared_constant(np.zeros(100_000))
        assert list(processes.work_stream([(address_of, (constant,))] * 2)) == [False, False]
        assert len(work_pool.Call(address_of, (constant,)).encode()) < 500

    def test_new_values_at_old_addresses_are_never_mixed_up(self, processes):
        for value in range(12):
            ds = ArrayDataSource([np.full((5, 3), value)]).map(as_it_is)
            (x,) = next(processes.parallel_data_source(ds, 2).batch_iterator(5))
            assert (x == value).all()
            del ds
            gc.collect()

    def test_a_source_that_was_changed_is_sent_again_and_else_not(self, processes):
        data = np.zeros((50_000, 4))
        parallel = processes.parallel_data_source(ArrayDataSource([data]).map(as_it_is), 3)
        assert all((x == 0).all() for (x,) in parallel.batch_iterator(10_000))
        shared = parallel._shared
        assert all((x == 0).all() for (x,) in parallel.batch_iterator(10_000))
        assert parallel._shared is shared
        data[49_999, 3] = 7
        assert [x.max() for (x,) in parallel.batch_iterator(10_000)] == [0, 0, 0, 0, 7]
        assert parallel._shared is not shared

    def test_workers_forget_what_nobody_uses(self, processes):
        constant = processes.shared_constant(np.zeros(1000))
        number = constant.number
        list(processes.work_stream([(address_of, (constant,))] * 4))
        del constant
        gc.collect()
        # Workers hear of it beside their tasks, so it may take them a few.
        deadline = time.monotonic() + DEADLINE
        while any(number in known for known in processes.work_stream([(_known_constants,)] * 8)):
            assert time.monotonic() < deadline

    def test_it_serves_its_own_pool_only(self, processes):
        constant = processes.shared_constant(5)
        with WorkerThreadPool(1) as other:
            function, args = constant.__reduce__()
            with pytest.raises(RuntimeError, match="tasks of its own pool"):
                next(other.work_stream([(function, args)]))

    def test_a_slot_that_is_called_off_is_skipped(self, processes):
        """A worker that reads about a slot after its lease was called off leaves it alone."""
        crew = processes._crew
        list(processes.work_stream([(pow, (2, 2))] * 4))
        blocker = [crew.submit(work_pool.Call(time.sleep, (0.05,))) for _ in range(2)]
        lease = crew.submit(work_pool.Call(pow, (2, 5)))
        (slot,) = lease.slots
        request = bytes(crew._arena.slots[slot].memory[HEADER_BYTES : HEADER_BYTES + len(lease.request)])
        crew.abandon([lease])
        for each in blocker:
            assert crew.result(each) is None
        assert next(processes.work_stream([(pow, (3, 2))])) == 9
        assert request == lease.request
        deadline = time.monotonic() + DEADLINE
        while crew._arena.busy and time.monotonic() < deadline:
            next(processes.work_stream([(pow, (3, 2))]))
        assert crew._arena.busy == 0


def _known_constants():
    return sorted(sys.modules["mlqueue.batch.pool_worker"]._worker._constants)


class TestDocumentation:
    def test_every_example_of_the_page_runs(self):
        page = Path(__file__).parents[2] / "docs" / "batch" / "pools.md"
        examples = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
        assert len(examples) == 5
        output_of("import warnings; warnings.simplefilter('error')\n" + "\n".join(examples))
