"""Rows of an HDF5 file, by every index, against the same rows of a numpy array."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tables
from hypothesis import given, settings
from hypothesis import strategies as st

from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.datasets import hdf5
from mlqueue.batch.datasets.hdf5 import DatasetFileError, HDF5File, StoredRows
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32

N = 211
IMAGES = np.random.default_rng(1).integers(0, 256, (N, 3, 8, 8), dtype=np.uint8)
LABELS = np.arange(N, dtype=np.int32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hdf5") / "set.h5"
    with hdf5.creating(str(path), "set", "a test") as group:
        group.array("plain", IMAGES)
        group.growing("packed", np.uint8, IMAGES.shape[1:], N).append(IMAGES)
        group.array("labels", LABELS)
        ragged = group.ragged("ragged", np.int32)
        ragged.append([1, 2, 3])
        ragged.append([4])
    return path


@pytest.fixture(params=["plain", "packed"])
def rows(path: Path, request: pytest.FixtureRequest) -> StoredRows:
    return StoredRows(path, f"/set/{request.param}")


def test_it_looks_like_an_array(rows: StoredRows) -> None:
    assert (len(rows), rows.shape, rows.ndim, rows.dtype) == (N, IMAGES.shape, 4, np.uint8)
    np.testing.assert_array_equal(np.asarray(rows), IMAGES)
    assert np.asarray(rows, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(rows, copy=False)
    assert "/set/p" in repr(rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(-N, N - 1), max_size=80), st.sampled_from(["plain", "packed"]), st.sampled_from([0, 3000]))
def test_rows_in_any_order_and_repeated(path: Path, numbers: list[int], name: str, gap: int) -> None:
    rows = StoredRows(path, f"/set/{name}")
    rows._gap = gap
    index = np.array(numbers, dtype=np.int64)
    np.testing.assert_array_equal(rows[index], IMAGES[index])
    out = np.empty((len(index), *IMAGES.shape[1:]), np.uint8)
    assert np.take(rows, index, axis=0, out=out) is out
    np.testing.assert_array_equal(out, IMAGES[index])


@settings(max_examples=60, deadline=None)
@given(st.slices(N))
def test_slices(path: Path, index: slice) -> None:
    rows = StoredRows(path, "/set/plain")
    got = rows[index]
    np.testing.assert_array_equal(got, IMAGES[index])
    got[...] = 0  # it is the caller's own


@pytest.mark.parametrize(
    "index",
    [
        5,
        -1,
        np.int64(7),
        np.array(3),
        [3, 1, 1],
        [],
        LABELS % 2 == 0,
        np.array([[1, 2], [3, 3]]),
        ...,
        (4, 1),
        (slice(2, 9), 1),
        (np.array([5, 2, 5]), slice(None), slice(None), slice(None)),
        (np.array([5, 2, 5]), ..., 3),
        (np.array([5, 2]), np.array([0, 2])),
        (..., 0),
        (np.array([[5, 2]]), 0),
        (slice(3, 0, -1), slice(1, 3), 2, 5),
        (1, 2, 3, 4),
    ],
    ids=str,
)
def test_every_other_index_means_what_it_means_to_numpy(rows: StoredRows, index: object) -> None:
    got, expected = rows[index], IMAGES[index]  # type: ignore[index]
    np.testing.assert_array_equal(got, expected)
    assert np.shape(got) == np.shape(expected)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (N, f"row {N} is out of bounds: there are {N}"),
        (-N - 1, "out of bounds"),
        (np.array([0, N]), f"row {N} is out of bounds"),
        (np.array([0.5]), "numbered by integers, not float64"),
        (np.ones(3, bool), "mask"),
    ],
)
def test_what_is_out_of_bounds_is_an_error(rows: StoredRows, index: object, message: str) -> None:
    with pytest.raises(IndexError, match=message):
        rows[index]


def test_take_clips_and_wraps_as_numpy_does(rows: StoredRows) -> None:
    index = np.array([-5, 3, N + 4, 2 * N])
    for mode in ("clip", "wrap"):
        np.testing.assert_array_equal(rows.take(index, mode=mode), IMAGES.take(index, axis=0, mode=mode))
    with pytest.raises(ValueError, match="mode"):
        rows.take(index, mode="bend")
    with pytest.raises(ValueError, match="axis 0"):
        rows.take(index, axis=1)
    with pytest.raises(ValueError, match="out has the shape"):
        rows.take(np.array([1]), out=np.empty((2, 3, 8, 8), np.uint8))


def test_values_may_be_given_as_another_type(path: Path) -> None:
    rows = StoredRows(path, "/set/labels", np.float32)
    for got in (rows[3:5], rows[np.array([3, 4])], np.asarray(rows)[3:5]):
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, [3.0, 4.0])
    assert rows[3] == 3


def test_mini_batches_of_stored_rows_are_those_of_arrays(rows: StoredRows) -> None:
    stored = ArrayDataSource([ImageArrayUInt8ToFloat32(rows), LABELS], repeats=3)
    in_memory = ArrayDataSource([ImageArrayUInt8ToFloat32(IMAGES), LABELS], repeats=3)
    for shuffle in (None, 5):
        count = 0
        for (x, y), (expected_x, expected_y) in zip(
            stored.batch_iterator(50, shuffle=shuffle), in_memory.batch_iterator(50, shuffle=shuffle), strict=True
        ):
            np.testing.assert_array_equal(x, expected_x)
            np.testing.assert_array_equal(y, expected_y)
            count += len(y)
        assert count == 3 * N


def test_ragged_arrays_are_lists(path: Path) -> None:
    assert [row.tolist() for row in HDF5File(path).read("/set/ragged")] == [[1, 2, 3], [4]]


def test_threads_read_one_file(rows: StoredRows) -> None:
    wrong: list[int] = []

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            index = rng.integers(0, N, 20)
            if not np.array_equal(rows[index], IMAGES[index]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert wrong == []


def _sum_of(rows: StoredRows, index: np.ndarray, answers: object) -> None:
    answers.put(int(rows[index].sum()))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "method",
    [
        "spawn",
        pytest.param(
            "fork", marks=pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
        ),  # Python 3.12 and later warn of threads
    ],
)
def test_rows_work_in_another_process_while_their_file_is_open_here(rows: StoredRows, method: str) -> None:
    index = np.array([9, 3, 3, 200])
    assert rows[0].shape == IMAGES.shape[1:]
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_sum_of, args=(rows, index, answers))
    process.start()
    assert answers.get(timeout=30) == IMAGES[index].sum()
    process.join(30)
    assert process.exitcode == 0
    answers.close()
    answers.join_thread()
    np.testing.assert_array_equal(rows[index], IMAGES[index])


def test_pickled_rows_share_their_file_and_are_the_same(path: Path) -> None:
    file = HDF5File(path)
    one, other = pickle.loads(pickle.dumps((file.rows("/set/plain"), file.rows("/set/labels", np.int64))))
    assert one.file is other.file
    np.testing.assert_array_equal(one[2:4], IMAGES[2:4])
    assert other.dtype == np.int64


def test_a_closed_file_is_opened_again_by_the_next_use(path: Path) -> None:
    before = len(tables.file._open_files.handlers)
    file = HDF5File(path)
    rows = file.rows("/set/plain")
    assert len(tables.file._open_files.handlers) == before + 1
    file.close()
    assert len(tables.file._open_files.handlers) == before
    np.testing.assert_array_equal(rows[1], IMAGES[1])
    assert len(tables.file._open_files.handlers) == before + 1
    del rows, file
    assert len(tables.file._open_files.handlers) == before


def test_a_file_still_open_when_the_program_ends_is_closed_without_a_word(path: Path) -> None:
    program = (
        f"from mlqueue.batch.datasets.hdf5 import StoredRows\nrows = StoredRows({str(path)!r}, '/set/labels')\n"
        "assert rows[3] == 3\n"
    )
    answer = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert (answer.stdout, answer.stderr) == ("", "")


def test_a_file_that_is_no_hdf5_or_lacks_the_array_is_an_error(path: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DatasetFileError, match=r"damaged.h5 cannot be opened as HDF5: .*datasets rm") as told:
        StoredRows(damaged, "/set/plain")
    assert "\n" not in str(told.value)  # no trace of the calls within HDF5
    with pytest.raises(DatasetFileError, match="cannot be opened"):
        StoredRows(tmp_path / "missing.h5", "/set/plain")
    with pytest.raises(DatasetFileError, match="has no /set/other"):
        StoredRows(path, "/set/other")


def test_relative_paths_survive_a_change_of_folder(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    rows = StoredRows(path.name, "/set/labels")
    rows.file.close()
    monkeypatch.chdir(os.sep)
    assert rows[7] == 7
