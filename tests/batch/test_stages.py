"""What goes beyond BatchUp: stages, caches, mixing, padding, sources of samples, policies for errors."""

from __future__ import annotations

import gc
import io
import itertools
import json
import pickle
import tarfile
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlqueue.batch.collate import collate, pad, pad_collate
from mlqueue.batch.data_source import (
    ArrayDataSource,
    CallableDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    FunctionDataSource,
    IteratorDataSource,
)
from mlqueue.batch.errors import BatchError, SampleError, StateError, TooManySkips
from mlqueue.batch.mixing import mix
from mlqueue.batch.sources import (
    ImageFolder,
    SampleDataSource,
    image_folder,
    iterable_source,
    parquet_source,
    read_image,
    table_source,
    webdataset_source,
)
from mlqueue.errors import MLQueueError


def source(n, start=0, **kwargs):
    y = np.arange(start, start + n)
    return ArrayDataSource([y[:, None] * np.ones(2, np.float32), y], **kwargs)


def labels(batches, part=1):
    return [batch[part].tolist() for batch in batches]


def odd(x, y):
    return y % 2 == 1


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name == "mlqueue-prefetch"]


# -- stages ---------------------------------------------------------------------------------------------------------


def test_filter_and_rebatch():
    ds = source(20).filter(odd)
    assert labels(ds.batch_iterator(4)) == [[1, 3], [5, 7], [9, 11], [13, 15], [17, 19]]
    assert ds.num_samples() is None
    assert labels(ds.rebatch().batch_iterator(4)) == [[1, 3, 5, 7], [9, 11, 13, 15], [17, 19]]
    assert labels(ds.rebatch().batch_iterator(4, drop_last=True)) == [[1, 3, 5, 7], [9, 11, 13, 15]]
    assert labels(source(7).rebatch(5).batch_iterator(3)) == [[0, 1, 2], [3, 4, 5], [6]]
    whole = source(6).filter(lambda x, y: y[0] != 2)
    assert labels(whole.batch_iterator(2)) == [[0, 1], [4, 5]]
    assert list(source(6).filter(lambda x, y: y > 9).batch_iterator(2)) == []
    with pytest.raises(TypeError, match="one for each of its 2 samples"):
        next(source(6).filter(lambda x, y: y).batch_iterator(2))
    mapping = ArrayDataSource({"y": np.arange(6)}).filter(lambda batch: batch["y"] > 1).rebatch()
    assert [batch["y"].tolist() for batch in mapping.batch_iterator(3)] == [[2, 3, 4], [5]]


@given(
    n=st.integers(0, 30),
    read=st.integers(1, 9),
    batch_size=st.integers(1, 9),
    seen=st.integers(0, 12),
    taken=st.integers(0, 40),
    shuffle=st.sampled_from([None, 4]),
)
@settings(max_examples=80, deadline=None)
def test_stages_resume_to_what_was_left(n, read, batch_size, seen, taken, shuffle):
    ds = source(n).filter(odd).rebatch(read).take(taken).prefetch(3)

    def start():
        return ds.batch_iterator(batch_size, shuffle=shuffle)

    with start() as started, start() as resumed, start() as whole:
        everything = labels(whole)
        for _ in itertools.islice(started, seen):
            pass
        next(resumed, None)
        resumed.load_state_dict(json.loads(json.dumps(started.state_dict())))
        again = json.loads(json.dumps(resumed.state_dict()))
        assert labels(resumed) == everything[seen:]
        resumed.load_state_dict(again)
        assert labels(resumed) == everything[seen:]
        assert labels(started) == everything[seen:]
    flat = [y for batch in everything for y in batch]
    assert len(flat) == min(n // 2, taken)
    assert all(len(batch) == batch_size for batch in everything[:-1])


def test_take_keeps_access_by_index():
    ds = source(9).take(5)
    assert ds.is_random_access
    assert ds.num_samples() == 5
    assert [b.tolist() for b in ds.batch_indices_iterator(3)] == [[0, 1, 2], [3, 4]]
    assert labels(ds.batch_iterator(3, drop_last=True)) == [[0, 1, 2]]
    assert source(3, repeats=-1).take(7).batch_map_concat(lambda x, y: y, 3)[0].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert len(np.unique(source(50).take(8).batch_map_concat(lambda x, y: y, 3, shuffle=1)[0])) == 8


def test_zip_is_a_composite():
    assert labels(source(3).zip(source(3, 10)).batch_iterator(2), 3) == [[10, 11], [12]]


def test_prefetching_prepares_ahead_and_no_further():
    made = []

    def batches(batch_size):
        for number in range(20):
            made.append(number)
            yield (np.array([number]),)

    with CallableDataSource(batches).prefetch(3).batch_iterator(1) as iterator:
        assert made == []
        assert next(iterator)[0] == 0
        wait_for(lambda: len(made) == 5)  # one given, three ready, one in hand
        assert not made[5:]
        assert [batch[0].item() for batch in iterator] == list(range(1, 20))
        assert next(iterator, None) is None
    assert prefetch_threads() == []


def test_a_prefetching_thread_ends_with_its_iterator_however_that_ends():
    endless = source(3, repeats=-1).prefetch(2)
    iterator = endless.batch_iterator(2)
    next(iterator)
    assert len(prefetch_threads()) == 1
    iterator.close()
    assert prefetch_threads() == []
    assert next(iterator, None) is None
    dropped = endless.batch_iterator(2)
    next(dropped)
    del dropped
    gc.collect()
    wait_for(lambda: not prefetch_threads())


def test_an_error_arrives_where_the_batch_is_asked_for():
    def fail(x, y):
        if 4 in y:
            raise ZeroDivisionError("four")
        return (y,)

    iterator = source(9).map(fail).prefetch(8).batch_iterator(2)
    assert [next(iterator)[0].tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ZeroDivisionError, match="four") as caught:
        next(iterator)
    assert any(entry.name == "fail" for entry in caught.traceback)
    assert next(iterator, None) is None


def test_what_cannot_be_saved_says_so():
    class Permuter:
        def permutation(self, n):
            return np.arange(n)

    with source(5).prefetch(2).batch_iterator(2, shuffle=Permuter()) as iterator:
        next(iterator)
        with pytest.raises(StateError, match="cannot be saved"):
            iterator.state_dict()


# -- caches ---------------------------------------------------------------------------------------------------------


def test_prefetching_changes_no_number_of_batches():
    choice = ChoiceDataSource([source(11), source(11)], stratified=True).prefetch()
    assert choice.num_batches(10) == len(list(choice.batch_iterator(10))) == 4
    assert choice.shard(0, 2).num_batches(10) == 2


def test_a_mask_marks_samples_whatever_the_source(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"y": np.arange(6)}), tmp_path / "p.parquet")
    mask = np.array([False, True, False, True, True, False])
    for ds in (
        source(6),
        source(6).cache(),
        SampleDataSource([(0, y) for y in range(6)]),
        FunctionDataSource(lambda indices: (indices, indices), 6),
    ):
        assert ds.samples_by_indices(mask)[1].tolist() == [1, 3, 4]
        assert ds.samples_by_indices(slice(1, 5, 2))[1].tolist() == [1, 3]
    rows = parquet_source(tmp_path / "p.parquet")
    assert rows.samples_by_indices(mask)["y"].tolist() == [1, 3, 4]
    assert rows.samples_by_indices([])["y"].tolist() == []
    assert rows.samples_by_indices(-1)["y"].tolist() == [5]
    with pytest.raises(IndexError, match="6 rows"):
        rows.samples_by_indices([6])


def test_a_memory_cache_reads_every_sample_once():
    reads = []

    def expensive(index, x, y):
        reads.extend(index.tolist())
        return {"x": x, "y": y}

    ds = source(12, include_indices=True, indices=np.arange(1, 11), repeats=2).map(expensive).cache()
    for epoch in range(3):
        seen = np.concatenate([b["y"] for b in ds.batch_iterator(4, shuffle=1, epoch=epoch)])
        assert sorted(seen) == sorted([*range(1, 11)] * 2)
    assert sorted(reads) == list(range(1, 11))
    batch = next(ds.batch_iterator(4))
    batch["x"][:] = 99
    assert next(ds.batch_iterator(4))["x"].max() == 4
    assert ds.samples_by_indices(np.array([0]))["y"].tolist() == [1]
    assert ds.num_samples() == 20
    copy = pickle.loads(pickle.dumps(source(12).cache()))
    assert labels(copy.shard(1, 2).batch_iterator(3)) == [[1, 3, 5], [7, 9, 11]]


def test_a_cache_refuses_what_it_cannot_keep():
    for ds in (
        IteratorDataSource(iter([])),
        CompositeDataSource([source(2)]),
        source(3).map(lambda x, y, rng: (x,)),
        source(3).filter(odd),
    ):
        with pytest.raises(TypeError, match="cannot be cached in memory"):
            ds.cache()
    ragged = source(6).map(lambda x, y: (np.zeros((len(y), y[0])),)).cache()
    iterator = ragged.batch_iterator(2)
    next(iterator)
    with pytest.raises(BatchError, match="one shape and dtype"):
        next(iterator)
    # One sample of three, which numpy would put in the place of all.
    skipping = SampleDataSource(Flaky([0, 2]), errors="skip").cache()
    with pytest.raises(BatchError, match=r"was given 1 samples for 3 indices.*in a file"):
        next(skipping.batch_iterator(3))


def test_a_file_cache_is_written_once_and_read_again(tmp_path):
    pytest.importorskip("tables")
    path = tmp_path / "deep" / "cache.h5"
    calls = []

    def expensive(x, y):
        calls.append(len(y))
        return {"image": x, "label": y.astype(np.int32)}

    ds = source(600).filter(odd).map(expensive)
    cached = ds.cache(path, key="v1")
    n_calls = len(calls)
    again = ds.cache(path, key="v1")
    assert len(calls) == n_calls
    for one in (cached, again, pickle.loads(pickle.dumps(again))):
        batches = list(one.batch_iterator(64, shuffle=2))
        assert sorted(np.concatenate([b["label"] for b in batches])) == list(range(1, 600, 2))
        assert all((b["image"][:, 1] == b["label"]).all() for b in batches)
        assert batches[0]["label"].dtype == np.int32
        for rows in one.data.values():
            rows.close()
    with pytest.raises(BatchError, match="key 'v1', not 'v2'"):
        ds.cache(path, key="v2")
    assert labels(ArrayDataSource([np.arange(4)]).cache(tmp_path / "t.h5").batch_iterator(3), 0) == [[0, 1, 2], [3]]


def test_a_file_cache_that_fails_leaves_nothing(tmp_path):
    pytest.importorskip("tables")

    def fail(x, y):
        if y[0] > 300:
            raise OSError("disk gone")
        return (x,)

    with pytest.raises(OSError, match="disk gone"):
        source(900).map(fail).cache(tmp_path / "c.h5")
    with pytest.raises(ValueError, match="endless"):
        source(3, repeats=-1).cache(tmp_path / "c.h5")
    with pytest.raises(BatchError, match="nothing to cache"):
        source(0).cache(tmp_path / "c.h5")
    with pytest.raises(TypeError, match="dtype object"):
        ArrayDataSource([np.array(["a", 1], object)]).cache(tmp_path / "c.h5")
    assert list(tmp_path.iterdir()) == []


# -- mixing ---------------------------------------------------------------------------------------------------------


def test_a_mixture_keeps_the_proportions():
    members = [source(5, 0, repeats=-1), source(5, 100, repeats=-1), source(5, 200, repeats=-1)]
    ds = mix(members, [1, 3, 0])
    in_order = [int(y[0]) // 100 for y in labels(itertools.islice(ds.batch_iterator(2), 40))]
    assert in_order.count(0) == 10
    assert in_order.count(1) == 30
    for length in range(1, 40):  # at every time, not in the end alone
        assert abs(in_order[:length].count(0) - length / 4) <= 1
    drawn = [int(y[0]) // 100 for y in labels(itertools.islice(ds.batch_iterator(2, shuffle=7), 800))]
    assert drawn.count(2) == 0
    assert abs(drawn.count(1) - 600) < 4 * np.sqrt(800 * 3 / 16)
    assert ds.num_samples() == np.inf


def test_a_mixture_stops_with_the_first_or_with_all():
    members = [source(4), source(10, 100)]
    first = labels(mix(members, [1, 1]).batch_iterator(2))
    assert first == [[0, 1], [100, 101], [2, 3], [102, 103]]
    for shuffle in (None, 5):
        seen = mix(members, [1, 1], stop="all").batch_map_concat(lambda x, y: y, 3, shuffle=shuffle)[0]
        assert sorted(seen) == [*range(4), *range(100, 110)]
    assert mix(members, [1, 1], stop="all").num_batches(3) == 6
    indices = list(mix(members, [1, 2]).batch_indices_iterator(2, shuffle=3))
    gathered = [mix(members, [1, 2]).samples_by_indices_nomapping(batch) for batch in indices]
    assert labels(gathered) == labels(mix(members, [1, 2]).batch_iterator(2, shuffle=3))
    shards = [mix(members, [1, 2], "all").shard(rank, 2).batch_iterator(2) for rank in range(2)]
    assert sorted(y for part in shards for batch in part for y in batch[1]) == [*range(4), *range(100, 110)]
    for arguments, message in [
        (([1],), "1 weights for 2 sources"),
        (([1, 1], "never"), "'first' or 'all'"),
        (([1, 0], "all"), "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            mix(members, *arguments)


# -- collate and pad ------------------------------------------------------------------------------------------------


def test_collate_stacks_tuples_dicts_and_lone_values():
    pairs = collate([(np.zeros(2), 1), (np.ones(2), 2)])
    assert [part.tolist() for part in pairs] == [[[0, 0], [1, 1]], [1, 2]]
    assert collate([{"a": 1}, {"a": 2}])["a"].tolist() == [1, 2]
    assert collate([3, 4])[0].tolist() == [3, 4]
    with pytest.raises(ValueError, match="pad them"):
        collate([np.zeros(2), np.zeros(3)])
    with pytest.raises(ValueError, match="different names"):
        collate([{"a": 1}, {"b": 2}])
    with pytest.raises(ValueError, match="at least one"):
        collate([])


@given(st.lists(st.lists(st.integers(-9, 9), max_size=7), min_size=1, max_size=6), st.integers(1, 4))
def test_padding_keeps_every_value_in_its_place(rows, multiple_of):
    padded, lengths = pad([np.array(row, np.int16) for row in rows], value=-100, multiple_of=multiple_of)
    assert padded.shape[1] % multiple_of == 0
    assert padded.shape[1] - max(map(len, rows)) < multiple_of
    assert padded.dtype == np.int16
    for row, out, length in zip(rows, padded, lengths, strict=True):
        assert out[:length].tolist() == row
        assert (out[length:] == -100).all()


def test_padding_of_whole_samples():
    samples = [(np.ones((2, 3)), 7), (np.ones((4, 3)), 8)]
    tokens, lengths, label = pad_collate(value=0, max_length=3)(samples)
    assert tokens.shape == (2, 3, 3)
    assert tokens[0, 2].tolist() == [0, 0, 0]
    assert lengths.tolist() == [2, 3]
    assert label.tolist() == [7, 8]
    batch = pad_collate()([{"t": [1, 2], "y": 0}, {"t": [3], "y": 1}])
    assert {name: part.tolist() for name, part in batch.items()} == {
        "t": [[1, 2], [3, 0]],
        "t_length": [2, 1],
        "y": [0, 1],
    }
    assert len(pad_collate(lengths=False)(samples)) == 2
    assert pickle.loads(pickle.dumps(pad_collate(5)))([([1], 0)])[0].tolist() == [[1]]
    for wrong in ([], [np.zeros((2, 3)), np.zeros((2, 4))], [np.float64(3)]):
        with pytest.raises(ValueError, match=r"nothing to pad|first axis"):
            pad(wrong)


# -- sources of samples ---------------------------------------------------------------------------------------------


class Ragged:
    def __len__(self):
        return 10

    def __getitem__(self, index):
        assert type(index) is int
        return np.full(index % 3 + 1, index), index


class Flaky:
    """Fails on some samples: for ever, or `times` times."""

    def __init__(self, bad, times=10**9):
        self.left = dict.fromkeys(bad, times)
        self.calls = 0

    def __len__(self):
        return 12

    def __getitem__(self, index):
        self.calls += 1
        if self.left.get(index, 0):
            self.left[index] -= 1
            raise OSError(f"file {index} is cut")
        return (index,)


def test_any_map_style_dataset_is_a_source():
    ds = SampleDataSource(Ragged(), pad_collate(-1), include_indices=True)
    batches = list(ds.batch_iterator(4, shuffle=1))
    assert sorted(np.concatenate([batch[0] for batch in batches])) == list(range(10))
    for index, padded, lengths, y in batches:
        assert index.tolist() == y.tolist()
        assert lengths.tolist() == [i % 3 + 1 for i in y]
        assert (padded.max(axis=1) == y).all()

    class Whole(Ragged):
        def __getitems__(self, indices):
            return [(index * 2,) for index in indices]

    assert SampleDataSource(Whole()).batch_map_concat(lambda y: y, 4)[0].tolist() == list(range(0, 20, 2))


def test_a_sample_that_cannot_be_read_raises_with_its_index():
    iterator = SampleDataSource(Flaky([5])).batch_iterator(4)
    next(iterator)
    with pytest.raises(SampleError, match=r"sample 5 could not be read .*OSError: file 5 is cut") as caught:
        next(iterator)
    assert isinstance(caught.value, MLQueueError)
    assert isinstance(caught.value.__cause__, OSError)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (copy.index, copy.attempts, str(copy)) == (5, 1, str(caught.value))


def test_samples_are_retried():
    flaky = Flaky([5, 7], times=2)
    assert len(SampleDataSource(flaky, errors="retry").batch_map_concat(lambda y: y, 4)[0]) == 12
    assert flaky.calls == 16
    with pytest.raises(SampleError, match=r"tries: 3") as caught:
        SampleDataSource(Flaky([5], times=3), errors="retry").batch_map_concat(lambda y: y, 4)
    assert caught.value.attempts == 3


def test_samples_are_skipped_counted_and_listed():
    ds = SampleDataSource(Flaky([5, 7]), errors="skip", include_indices=True)
    for _ in range(2):
        index, y = ds.batch_map_concat(lambda index, y: (index, y), 4)
        assert y.tolist() == index.tolist() == [i for i in range(12) if i not in (5, 7)]
    assert [(skipped.index, skipped.error) for skipped in ds.skipped] == [
        (5, "OSError: file 5 is cut"),
        (7, "OSError: file 7 is cut"),
    ]
    with pytest.raises(TooManySkips, match="more than max_skips=1"):
        SampleDataSource(Flaky([5, 7]), errors="skip", max_skips=1).batch_map_concat(lambda y: y, 4)
    with pytest.raises(TooManySkips, match="none of the 2 samples"):
        SampleDataSource(Flaky([4, 5]), errors="skip").batch_map_concat(lambda y: y, 2)
    with pytest.raises(ValueError, match="'raise', 'skip' or 'retry'"):
        SampleDataSource(Flaky([]), errors="ignore")


def test_an_image_folder(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(["cat", "dog"]):
        for number in range(3):
            folder = tmp_path / name / f"part{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.full((6 + number, 8, 3), 100 * label + 20, np.uint8)
            image.fromarray(pixels).save(folder / f"{number}.png")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    folder = ImageFolder(tmp_path)
    assert folder.class_names == ["cat", "dog"]
    assert folder.y.tolist() == [0, 0, 0, 1, 1, 1]
    assert {folder[i][0].shape for i in range(6)} == {(3, 6, 8), (3, 7, 8), (3, 8, 8)}
    X, y = next(image_folder(tmp_path, (5, 4)).batch_iterator(6, shuffle=1))
    assert (X.shape, X.dtype, y.dtype) == ((6, 3, 5, 4), np.uint8, np.int32)
    assert ((100 * y + 20)[:, None, None, None] == X).all()
    (tmp_path / "dog" / "z.jpg").write_bytes(b"not a jpeg")
    ds = image_folder(tmp_path, (5, 4), errors="skip")
    assert len(ds.batch_map_concat(lambda X, y: y, 4)[0]) == 6
    assert "UnidentifiedImageError" in ds.skipped[0].error
    assert "z.jpg is no image" in ds.skipped[0].error
    grey = image.fromarray(np.full((4, 4), 77, np.uint8))
    grey.save(tmp_path / "grey.png")
    assert (read_image(tmp_path / "grey.png") == np.full((3, 4, 4), 77)).all()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image"):
        ImageFolder(tmp_path / "empty")


def test_a_table_of_an_hdf5_file(tmp_path):
    tables = pytest.importorskip("tables")
    rows = np.zeros(50, [("x", "f4", (3,)), ("y", "i4"), ("name", "S4")])
    rows["y"] = np.arange(50)
    rows["x"] = rows["y"][:, None]
    with tables.open_file(str(tmp_path / "t.h5"), "w") as file:
        file.create_table("/train", "samples", rows, createparents=True)
    ds = table_source(tmp_path / "t.h5", "/train/samples", ["y", "x"], include_indices=True)
    seen = []
    for batch in pickle.loads(pickle.dumps(ds)).batch_iterator(8, shuffle=1):
        assert list(batch) == ["indices", "y", "x"]
        assert (batch["x"] == batch["y"][:, None]).all()
        assert batch["indices"].tolist() == batch["y"].tolist()
        seen += batch["y"].tolist()
    assert sorted(seen) == list(range(50))
    with pytest.raises(ValueError, match="no column"):
        table_source(tmp_path / "t.h5", "/train/samples", ["z"])


def test_a_parquet_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    y = np.arange(100)
    x = pa.FixedSizeListArray.from_arrays(pa.array(np.repeat(y, 3).astype(np.float32)), 3)
    table = pa.table({"y": y, "x": x, "text": [f"t{i}" for i in y]})
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=17)
    ds = parquet_source(tmp_path / "p.parquet", include_indices=True)
    seen = []
    for batch in pickle.loads(pickle.dumps(ds)).batch_iterator(13, shuffle=3):
        assert batch["y"].tolist() == batch["indices"].tolist()
        assert batch["x"].shape == (len(batch["y"]), 3)
        assert (batch["x"] == batch["y"][:, None]).all()
        assert batch["text"].tolist() == [f"t{i}" for i in batch["y"]]
        batch["y"][:] = 0
        seen += batch["indices"].tolist()
    assert sorted(seen) == list(range(100))
    with pytest.raises(ValueError, match="no column 'texts'; it has 'y', 'x', 'text'"):
        parquet_source(tmp_path / "p.parquet", ["y", "texts"])
    missing = pa.table({"n": [None, 1, 2, 3], "b": [True, False, True, None], "whole": [1, 2, 3, 4]})
    parquet.write_table(missing, tmp_path / "m.parquet", row_group_size=2)
    for batch in parquet_source(tmp_path / "m.parquet").batch_iterator(2):
        assert [part.dtype for part in batch.values()] == [np.float64, object, np.int64]
    columns = parquet_source(tmp_path / "p.parquet", ["text"])
    assert list(next(columns.batch_iterator(4))) == ["text"]


def add(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def test_webdataset_shards(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for number in range(3):
                add(tar, f"d/{shard}{number}.seg.npy", np.full(2, number, np.uint8).tobytes())
                add(tar, f"d/{shard}{number}.cls", str(number).encode())

    def decode(sample):
        assert sample["__key__"].startswith("d/")
        return np.frombuffer(sample["seg.npy"], np.uint8), int(sample["cls"])

    ds = webdataset_source([tmp_path / "0.tar", tmp_path / "1.tar"], decode)
    for _ in range(2):
        batches = list(ds.batch_iterator(4))
        assert labels(batches) == [[0, 1, 2, 0], [1, 2]]
        assert batches[0][0].tolist() == [[0, 0], [1, 1], [2, 2], [0, 0]]
    whole = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[:1500])
    with pytest.raises(tarfile.ReadError):
        list(webdataset_source(tmp_path / "cut.tar", decode).batch_iterator(4))


def test_what_is_wrong_is_said_where_it_is_given(tmp_path):
    with pytest.raises(ValueError, match="epoch must not be negative, got -1"):
        source(4).batch_iterator(2, shuffle=1, epoch=-1)
    with pytest.raises(TypeError, match=r"got a ndarray: put it into a list, \[x\]"):
        ArrayDataSource(np.zeros(3))
    for make in (source(4).map, source(4).filter, lambda fn: FunctionDataSource(fn, 3)):
        with pytest.raises(TypeError, match="needs a function of a batch, got 3"):
            make(3)
    with pytest.raises(ValueError, match="retries must not be negative"):  # which once left all samples out
        SampleDataSource([1], errors="retry", retries=-1)
    with pytest.raises(TypeError, match=r"iterable_source\(\)"):
        SampleDataSource(iter([1]))
    with pytest.raises(ValueError, match=r"size must be \(height, width\)"):
        image_folder(tmp_path, 3)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        next(iterable_source([1]).batch_iterator(0))
    once = iterable_source(i for i in range(5))
    assert len(list(once.batch_iterator(2))) == 3
    with pytest.raises(ValueError, match="can be gone through once"):
        next(once.batch_iterator(2))
    with pytest.raises(ValueError, match="one has 1, another 2"):
        collate([(1,), (1, 2)])
    with pytest.raises(ValueError, match="max_length must not be negative"):
        pad([np.arange(3)], max_length=-1)
    with pytest.raises(ValueError, match="which the samples have already"):
        pad_collate()([{"x": np.arange(2), "x_length": 7}])


def test_another_file_is_no_cache(tmp_path):
    tables = pytest.importorskip("tables")
    (tmp_path / "text").write_text("text")
    with tables.open_file(str(tmp_path / "x.h5"), "w") as file:
        file.create_array("/", "samples", np.arange(3))
    for name in ("text", "x.h5", "."):
        with pytest.raises(BatchError, match="is no cache file"):
            source(4).cache(tmp_path / name)


def test_any_iterable_of_samples_is_a_source():
    class Stream:
        epoch = None

        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([{"y": 10 * self.epoch + i} for i in range(5)])

    ds = iterable_source(Stream(), num_samples=5)
    assert [b["y"].tolist() for b in ds.batch_iterator(2, epoch=3)] == [[30, 31], [32, 33], [34]]
    assert [b["y"].tolist() for b in ds.batch_iterator(2, drop_last=True)] == [[0, 1], [2, 3]]
    started = ds.batch_iterator(2)
    next(started)
    resumed = ds.batch_iterator(2)
    resumed.load_state_dict(started.state_dict())
    assert [b["y"].tolist() for b in resumed] == [[2, 3], [4]]
    with pytest.raises(ValueError, match="cannot be shuffled"):
        next(ds.batch_iterator(2, shuffle=1))
    assert ChoiceDataSource([ds]).num_samples() == 5
