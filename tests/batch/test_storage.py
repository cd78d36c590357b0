"""Sources on shared storage: sent as paths, compared on each host, refused with host and path where they differ.

A host of its own is a worker with a working directory of its own: ``/proc/self/cwd/x`` is one path, and another file in
each of them.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
from support import eventually
from test_actor_pool import HERE, KEY, Bench
from test_work_pool import assert_same
from worker_processes import Site

from mlqueue.batch import actor_crew, sources, storage
from mlqueue.batch.data_source import ArrayDataSource, CompositeDataSource, FunctionDataSource
from mlqueue.batch.errors import SourceFailed, SourceMismatch
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32
from mlqueue.batch.pickling import pickle_code
from mlqueue.batch.pool_worker import load

HOST = socket.gethostname()
SAME_PATH = "/proc/self/cwd"
X = np.arange(40_000, dtype=np.float32).reshape(2000, 20)

pytestmark = pytest.mark.skipif(not Path(SAME_PATH).exists(), reason="there is no /proc")


class TestStamp:
    def change(self, path, place):
        with path.open("rb+") as file:
            file.seek(place, os.SEEK_SET if place >= 0 else os.SEEK_END)
            file.write(b"?")

    @pytest.mark.parametrize("size", [0, 1, 1000, storage.WHOLE, storage.WHOLE + 1, 10_000_000])
    def test_a_copy_has_the_stamp_but_for_its_time(self, tmp_path, size):
        one, other = tmp_path / "one", tmp_path / "other"
        one.write_bytes(np.random.default_rng(1).bytes(size))
        shutil.copy(one, other)
        os.utime(other, (1, 1))
        first, second = storage.stamp(str(one)), storage.stamp(str(other))
        assert (first.size, first.probe) == (second.size, second.probe) == (size, first.probe)
        assert first.modified != second.modified
        assert storage.difference(first, "here", str(other)) is None

    @pytest.mark.parametrize(("size", "place"), [(1000, 500), (10_000_000, 0), (10_000_000, -1), (10_000_000, 5161290)])
    def test_what_is_changed_where_it_looks_is_seen(self, tmp_path, size, place):
        path = tmp_path / "x"
        path.write_bytes(bytes(size))
        before = storage.stamp(str(path))
        self.change(path, place)
        told = storage.difference(before, "tower")
        assert f"host {HOST} has another version of {path} than the trainer's host tower" in told
        assert "other content" in told

    def test_a_file_that_is_missing_or_of_another_size_is_named_with_the_host(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(bytes(2000))
        before = storage.stamp(str(path))
        os.truncate(path, 1999)
        assert "1,999 bytes, not 2,000" in storage.difference(before, "tower")
        path.unlink()
        assert f"host {HOST} cannot read {path}, which" in storage.difference(before, "tower")
        assert "No such file" in storage.difference(before, "tower")

    def test_a_file_that_is_touched_counts_as_changed(self, tmp_path):
        path = tmp_path / "x"
        path.write_bytes(b"12")
        seen = [storage.look(str(path))]
        assert not storage.changed(seen)
        os.utime(path, (1, 1))
        assert storage.changed(seen)
        path.unlink()
        assert storage.changed(seen)


#: Files that tests have opened.
opened = []


@pytest.fixture(autouse=True)
def closed_in_the_end():
    yield
    while opened:
        opened.pop().close()


def files(folder, library):
    """A source over files below a folder, and their paths."""
    folder = str(folder)
    if library == "memmap":
        np.save(f"{folder}/x.npy", X)
        return ArrayDataSource([np.load(f"{folder}/x.npy", mmap_mode="r")]), [f"{folder}/x.npy"]
    if library == "part of a map":
        np.save(f"{folder}/x.npy", X)
        return ArrayDataSource([np.asarray(np.load(f"{folder}/x.npy", mmap_mode="r")[100:1900])]), [f"{folder}/x.npy"]
    if library == "images":
        image = pytest.importorskip("PIL.Image")
        for number in range(30):
            path = Path(folder) / "images" / "ab"[number % 2] / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.fromarray(np.full((4, 5, 3), number, np.uint8)).save(path)
        ds = sources.image_folder(f"{folder}/images", (4, 5))
        return ds, [str(path) for path in ds.samples.paths]
    if library == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"x": X[:, 0]}), f"{folder}/x.parquet")
        return sources.parquet_source(f"{folder}/x.parquet"), [f"{folder}/x.parquet"]
    if library == "h5py":
        h5py = pytest.importorskip("h5py")
        with h5py.File(f"{folder}/x.h5", "w") as file:
            file.create_dataset("x", data=X)
        opened.append(h5py.File(f"{folder}/x.h5", "r"))
        return ArrayDataSource([opened[-1]["x"]]), [f"{folder}/x.h5"]
    tables = pytest.importorskip("tables")
    with tables.open_file(f"{folder}/x.h5", "w") as file:
        file.create_array("/", "x", obj=(X % 256).astype(np.uint8))
    opened.append(tables.open_file(f"{folder}/x.h5", "r"))
    return ArrayDataSource([ImageArrayUInt8ToFloat32(opened[-1].root.x)]), [f"{folder}/x.h5"]


LIBRARIES = ["memmap", "part of a map", "images", "parquet", "h5py", "tables"]


class TestByPath:
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_what_lies_in_files_travels_as_their_paths(self, tmp_path, monkeypatch, library):
        monkeypatch.chdir(tmp_path)
        ds, paths = files(".", library)
        absolute = [os.path.abspath(path) for path in paths]
        by_path = {}
        mapped = CompositeDataSource([ds.map(lambda *parts: parts), ds], flatten=False)
        body, buffers = pickle_code(
            mapped, by_path=lambda part: by_path.update(dict.fromkeys(storage.backing(part) or ()))
        )
        assert absolute == list(by_path) == storage.files_of(mapped)
        assert len(body) + sum(buffer.nbytes for buffer in buffers) < 8000
        expected = list(mapped.batch_iterator(100))
        monkeypatch.chdir("/")  # whoever loads it has another working directory
        monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
        for one, other in zip(expected, load(body, buffers).batch_iterator(100), strict=True):
            assert_same(one, other)

    def test_what_would_be_wrong_by_path_travels_by_value(self, tmp_path):
        path = str(tmp_path / "x.npy")
        np.save(path, X)
        shared, own = np.load(path, mmap_mode="r+"), np.load(path, mmap_mode="r")
        for array in (shared[:1000], own[::2], own[3:4], own[:, 3:5]):
            body, buffers = pickle_code(array)
            assert len(body) + sum(buffer.nbytes for buffer in buffers) > array.nbytes
            np.testing.assert_array_equal(array, load(body, buffers))
        Path(path).unlink()
        body, buffers = pickle_code(own)
        np.testing.assert_array_equal(X, load(body, buffers))

    def test_parts_of_a_map_have_their_place(self, tmp_path):
        path = str(tmp_path / "x.npy")
        for order in (X, np.asfortranarray(X)):
            np.save(path, order)
            whole = np.load(path, mmap_mode="r")
            part = whole[500:] if order is X else whole[:, 5:]
            for array in (whole, part, part.view(np.ndarray), part.T):
                body, buffers = pickle_code(array)
                assert len(body) + sum(buffer.nbytes for buffer in buffers) < 2000
                loaded = load(body, buffers)
                assert type(array) is type(loaded)
                assert array.strides == loaded.strides
                np.testing.assert_array_equal(array, loaded)


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    bench = Bench(tmp_path_factory.mktemp("storage"), server, signing_key=KEY)
    bench.workers = bench.work(queues=["batches"])
    yield bench
    bench.close()


@pytest.fixture
def here(bench, tmp_path, monkeypatch):
    """The trainer's host: its working directory."""
    sys.modules["batch_sources"] = bench.module
    bench.forget()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(actor_crew, "REFUSED_FOR", 0.1)
    yield tmp_path
    for name in ("x.npy", "x.h5", "x.parquet"):
        (bench.folder / name).unlink(missing_ok=True)
    shutil.rmtree(bench.folder / "images", ignore_errors=True)


def copy(path, bench):
    there = bench.folder / os.path.relpath(path, SAME_PATH)
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, there)
    return there


class TestHosts:
    @pytest.mark.parametrize("library", LIBRARIES)
    def test_a_file_that_a_host_lacks_is_named_and_one_that_it_has_is_read(self, bench, here, library):
        ds, paths = files(SAME_PATH, library)
        with bench.pool() as pool:
            with pytest.raises(SourceMismatch) as raised:
                next(pool.parallel_data_source(ds).batch_iterator(100))
            assert f"host {HOST} cannot read {paths[0]}" in str(raised.value)
        for path in paths:
            copy(path, bench)
        with bench.pool() as pool:
            for one, other in zip(
                ds.batch_iterator(100, shuffle=1),
                pool.parallel_data_source(ds).batch_iterator(100, shuffle=1),
                strict=True,
            ):
                assert_same(one, other)
        with open(bench.folder / os.path.relpath(paths[-1], SAME_PATH), "ab") as file:
            file.write(b"more")
        with (
            bench.pool() as pool,
            pytest.raises(SourceMismatch, match=f"host {HOST} has another version of {paths[-1]}"),
        ):
            next(pool.parallel_data_source(ds).batch_iterator(100))
        assert 2 == len(bench.workers.ready_pids()), "no worker has died of it"

    def test_a_source_with_a_name_is_compared_by_its_files(self, bench, here):
        path = f"{SAME_PATH}/x.npy"
        np.save(path, X)
        ds = bench.module.mapped_file(path=path)
        missing = rf"host {HOST} cannot read .*{path}.*No such file"
        with bench.pool() as pool, pytest.raises(SourceMismatch, match=missing):
            next(pool.parallel_data_source(ds).batch_iterator(100))
        copy(path, bench)
        with bench.pool() as pool:
            [batch] = next(pool.parallel_data_source(ds).batch_iterator(100))
            np.testing.assert_array_equal(X[:100], batch)
        np.save(bench.folder / "x.npy", X + 1)
        with bench.pool() as pool, pytest.raises(SourceMismatch, match="other content"):
            next(pool.parallel_data_source(ds).batch_iterator(100))

    def test_files_that_a_factory_makes_for_itself_are_not_compared(self, bench, here):
        ds = bench.module.scratch()
        with bench.pool() as pool:
            assert_same(list(ds.batch_iterator(50)), list(pool.parallel_data_source(ds).batch_iterator(50)))

    def test_a_file_that_is_replaced_is_read_anew(self, bench, here):
        path = f"{SAME_PATH}/x.npy"
        with bench.pool() as pool:
            for value in (1, 2):
                np.save(path, np.full((2000, 20), value))
                new = copy(path, bench).with_name("new")
                shutil.copy(path, new)
                new.replace(bench.folder / "x.npy")
                ds = ArrayDataSource([np.load(path, mmap_mode="r")])
                [batch] = next(pool.parallel_data_source(ds).batch_iterator(10))
                assert {value} == set(batch.ravel().tolist())

    def test_a_file_that_goes_while_it_is_read_is_an_error_of_its_batch(self, bench, here):
        ds, paths = files(SAME_PATH, "images")
        for path in paths:
            copy(path, bench)
        with bench.pool() as pool:
            batches = pool.parallel_data_source(ds, 1).batch_iterator(10)
            next(batches)
            gone = ds.samples.paths[25]
            (bench.folder / os.path.relpath(gone, SAME_PATH)).unlink()
            next(batches)
            with pytest.raises(Exception, match=f"sample 25 could not be read.*{gone}") as raised:
                next(batches)
            assert f"of host {HOST}" in "".join(raised.value.__notes__)

    def test_a_factory_that_fails_for_another_reason_names_the_host(self, bench, here, monkeypatch):
        monkeypatch.setenv("BATCH_TESTS_TRAINER", "1")
        with bench.pool() as pool, pytest.raises(SourceFailed, match=f"on host {HOST}: OSError: the disk is gone"):
            next(pool.parallel_data_source(bench.module.broken()).batch_iterator(5))

    @pytest.mark.faults
    def test_hosts_that_have_the_file_prepare_what_others_cannot(
        self, bench, here, tmp_path_factory, server, monkeypatch
    ):
        monkeypatch.setattr(actor_crew, "REFUSED_FOR", 30.0)
        np.save(f"{SAME_PATH}/x.npy", X)
        ds = ArrayDataSource([np.load(f"{SAME_PATH}/x.npy", mmap_mode="r")]).map(
            lambda x: (x, np.full(len(x), os.getpid()))
        )
        folder = tmp_path_factory.mktemp("other-host")
        other = Site(folder, server, namespace=bench.site.namespace, signing_key=KEY)
        try:
            shutil.copy(HERE / "batch_sources.py", folder)
            shutil.copy(f"{SAME_PATH}/x.npy", folder)
            names = ("BATCH_TESTS_NAMESPACE", "BATCH_TESTS_FOLDER")
            other.environment |= {name: bench.site.environment[name] for name in names}
            workers = other.supervise("batch_sources", processes=1, threads=1, queues=["batches"])
            with bench.pool(workers=1) as pool:
                for number, (rows, pid) in enumerate(pool.parallel_data_source(ds).batch_iterator(100)):
                    np.testing.assert_array_equal(X[100 * number : 100 * number + 100], rows)
                    assert {workers.ready_pids()[0]} == set(pid.tolist())
            eventually(lambda: not bench.jobs())
        finally:
            for process in other._running:
                process.kill()
                process.wait()
            other.mlq.close()


def test_what_a_source_reads_is_found_wherever_it_stands(tmp_path):
    class Shards:
        def __init__(self, paths):
            self.paths = paths

        def backing_files(self):
            return self.paths

        def __len__(self):
            return 3

        def __getitem__(self, index):
            return index

    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        np.save(path, X)
    ds = CompositeDataSource(
        [
            ArrayDataSource({"x": np.load(f"{paths[0]}.npy", mmap_mode="r")[:5], "y": np.arange(5)}).map(len).take(3),
            sources.SampleDataSource(Shards(paths)),
            FunctionDataSource(len, 5),
        ]
    )
    assert [f"{paths[0]}.npy", *paths] == storage.files_of(ds)
