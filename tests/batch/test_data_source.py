"""Data sources as BatchUp had them: every sample as often as promised, in the promised order and shape."""

from __future__ import annotations

import itertools
import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlqueue.batch import data_source, rows, transport
from mlqueue.batch.data_source import (
    AbstractDataSource,
    ArrayDataSource,
    CallableDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    FunctionDataSource,
    IteratorDataSource,
    MapDataSource,
    RandomAccessDataSource,
    coerce_data_source,
)
from mlqueue.batch.errors import StateError
from mlqueue.batch.iteration import ChoiceBatch, SeededBatch, batch_length, trim_batch
from mlqueue.batch.mixing import MixDataSource
from mlqueue.batch.sampling import StandardSampler, SubsetSampler, WeightedSampler, WeightedSubsetSampler


def arrays(n, start=0):
    return [np.arange(start, start + n)[:, None] * np.ones(3, np.float32), np.arange(start, start + n)]


def source(n, start=0, **kwargs):
    return ArrayDataSource(arrays(n, start), **kwargs)


def labels(batches, part=1):
    return [batch[part].tolist() for batch in batches]


def tree(batch):
    """A batch as plain values, to compare."""
    if isinstance(batch, dict):
        return {name: tree(part) for name, part in batch.items()}
    return [tree(part) for part in batch] if isinstance(batch, tuple | list) else np.asarray(batch).tolist()


# -- arrays -------------------------------------------------------------------------------------------------------


def test_batches_are_tuples_of_copies_with_the_dtype_of_the_arrays():
    X, y = arrays(7)
    ds = ArrayDataSource([X, y])
    for shuffle in (None, 3):
        for batch in ds.batch_iterator(3, shuffle=shuffle):
            assert isinstance(batch, tuple)
            assert [part.dtype for part in batch] == [X.dtype, y.dtype]
            assert batch[0].shape == (len(batch[1]), 3)
            assert batch[0][:, 0].tolist() == batch[1].tolist()
            assert not np.shares_memory(batch[0], X)
            batch[0][:] = -1
    assert X.min() == 0
    assert labels(ds.batch_iterator(3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert ds.num_samples() == 7
    assert ds.is_random_access


@pytest.mark.parametrize("shuffle", [None, 4, True, "rs", "gen"])
@pytest.mark.parametrize(
    "array",
    [
        lambda X: np.asfortranarray(X),
        lambda X: np.repeat(X, 2, axis=0)[::2],
        lambda X: X[:, ::-1],
        lambda X: X.tolist(),
        lambda X: UserArray(X),
        lambda X: X.astype(object),
        lambda X: X.astype(">f4"),
        lambda X: X.view(np.recarray),
    ],
    ids=["fortran", "gaps", "backwards", "list", "user", "object", "big-endian", "subclass"],
)
def test_array_likes_of_any_kind_give_the_rows(array, shuffle):
    X, y = arrays(11)
    rng = {"rs": np.random.RandomState(0), "gen": np.random.default_rng(0)}.get(shuffle, shuffle)
    seen = []
    for batch_X, batch_y in ArrayDataSource([array(X), y], repeats=2).batch_iterator(4, shuffle=rng):
        assert np.asarray(batch_X, np.float32).tolist() == X[batch_y].tolist()
        seen += batch_y.tolist()
    assert sorted(seen) == sorted(list(range(11)) * 2)


class UserArray:
    """Understands what an array-like may be asked: an int, a slice, a 1-D int array."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, int):
            return self.rows[index]
        if isinstance(index, slice):
            return self.rows[index]
        assert type(index) is np.ndarray
        assert index.ndim == 1
        assert index.dtype.kind == "i"
        return np.array([self.rows[int(i)] for i in index])


def test_a_users_array_that_gives_views_is_not_written_into():
    X = np.zeros((6, 2))
    (batch,) = next(ArrayDataSource([UserArray(X)]).batch_iterator(3))
    batch[:] = 5
    assert not X.any()


def test_a_memory_map_is_read(tmp_path):
    X = np.memmap(tmp_path / "x", np.int16, "w+", shape=(9, 2))
    X[:] = np.arange(18).reshape(9, 2)
    for shuffle in (None, 1):
        parts = [batch for (batch,) in ArrayDataSource([X]).batch_iterator(4, shuffle=shuffle)]
        assert type(parts[0]) is np.ndarray
        assert sorted(np.concatenate(parts)[:, 0].tolist()) == list(range(0, 18, 2))


def test_zarr_like_arrays_are_asked_for_rows():
    class Zarr(UserArray):
        @property
        def oindex(self):
            return UserArray(self.rows)

        def __getitem__(self, index):
            assert isinstance(index, int | slice), "with an array this means points"
            return self.rows[index]

    X, y = arrays(8)
    for batch_X, batch_y in ArrayDataSource([Zarr(X), y]).batch_iterator(3, shuffle=1):
        assert batch_X.tolist() == X[batch_y].tolist()


@pytest.mark.parametrize("library", ["tables", "h5py"])
def test_hdf5_rows_come_in_any_order_and_repeated(tmp_path, library):
    module = pytest.importorskip(library)
    X = np.random.RandomState(0).randint(0, 255, (60, 3, 4, 4)).astype(np.uint8)
    path = str(tmp_path / "x.h5")
    if library == "tables":
        with module.open_file(path, "w") as file:
            file.create_array("/", "X", X)
        file = module.open_file(path)
        node = file.root.X
    else:
        with module.File(path, "w") as file:
            file["X"] = X
        file = module.File(path)
        node = file["X"]
    try:
        ds = ArrayDataSource([node, np.arange(60)], repeats=3)
        for shuffle in (None, 5):
            n = 0
            for batch_X, index in ds.batch_iterator(37, shuffle=shuffle):
                assert (batch_X == X[index]).all()
                n += len(index)
            assert n == 180
        weighted = ArrayDataSource([node, np.arange(60)], sampler=WeightedSampler(np.arange(60.0)))
        batch_X, index = next(weighted.batch_iterator(200, shuffle=1))
        assert (batch_X == X[index]).all()
        copy = pickle.loads(pickle.dumps(ds))
        batch_X, index = next(copy.batch_iterator(10, shuffle=2))
        assert (batch_X == X[index]).all()
        copy.data[0].close()
        assert ds.samples_by_indices_nomapping(np.array([], np.intp))[0].shape == (0, 3, 4, 4)
        assert (ds.samples_by_indices_nomapping(np.array([-1, 0]))[0] == X[[-1, 0]]).all()
        with pytest.raises(IndexError, match="60 rows"):
            ds.samples_by_indices_nomapping(np.array([60]))
    finally:
        file.close()


def test_indices_repeats_include_indices_and_samples_by_indices():
    ds = source(10, start=100, indices=np.array([7, 2, 5]), repeats=2, include_indices=True)
    batches = list(ds.batch_iterator(4))
    assert labels(batches, 0) == [[7, 2, 5, 7], [2, 5]]
    assert labels(batches, 2) == [[107, 102, 105, 107], [102, 105]]
    assert ds.num_samples() == 6
    index, _, y = ds.samples_by_indices(np.array([1, 0]))
    assert (index.tolist(), y.tolist()) == ([2, 7], [102, 107])
    assert ds.samples_by_indices_nomapping(np.array([1, 0]))[2].tolist() == [101, 100]
    assert ds.samples_by_indices_nomapping(slice(None, 3))[0].tolist() == [0, 1, 2]
    assert ds.samples_by_indices_nomapping(slice(8, None))[2].tolist() == [108, 109]
    assert ds.samples_by_indices_nomapping(4)[2] == 104
    assert ds.samples_by_indices_nomapping([4, 1])[2].tolist() == [104, 101]
    mask = np.zeros(10, bool)
    mask[[3, 4]] = True
    assert labels(source(10, indices=mask).batch_iterator(5)) == [[3, 4]]
    assert labels(itertools.islice(source(2, repeats=-1).batch_iterator(3), 2)) == [[0, 1, 0], [1, 0, 1]]
    assert source(2, repeats=-1).num_samples() == np.inf


def test_dict_samples():
    X, y = arrays(5)
    ds = ArrayDataSource({"image": X, "label": y}, include_indices=True)
    batches = list(ds.batch_iterator(3, shuffle=1))
    assert [list(batch) for batch in batches] == [["indices", "image", "label"]] * 2
    assert all((batch["indices"] == batch["label"]).all() for batch in batches)
    doubled = ds.map(lambda batch: {"twice": batch["label"] * 2})
    assert [b["twice"].tolist() for b in doubled.batch_iterator(3)] == [[0, 2, 4], [6, 8]]
    both = CompositeDataSource([ArrayDataSource({"a": y}), ArrayDataSource({"b": y[:4]})])
    assert tree(list(both.batch_iterator(3))) == [{"a": [0, 1, 2], "b": [0, 1, 2]}, {"a": [3], "b": [3]}]
    assert ds.batch_map_concat(lambda batch: batch["label"], 2)[0].tolist() == [0, 1, 2, 3, 4]
    assert ds.batch_map_mean(lambda batch: batch["label"].sum(), 2) == (2.0,)
    with pytest.raises(ValueError, match="'a'"):
        next(CompositeDataSource([ArrayDataSource({"a": y}), ArrayDataSource({"a": y})]).batch_iterator(3))
    with pytest.raises(ValueError, match="'indices'"):
        ArrayDataSource({"indices": y}, include_indices=True)


def test_a_custom_source_and_a_custom_sampler_need_little():
    class Squares(RandomAccessDataSource):
        def samples_by_indices_nomapping(self, indices):
            return (indices**2,)

    class Backwards:
        def num_indices_generated(self):
            return 4

        def in_order_indices_batch_iterator(self, batch_size):
            for start in range(4, 0, -batch_size):
                yield np.arange(start - 1, max(start - batch_size, 0) - 1, -1)

        def shuffled_indices_batch_iterator(self, batch_size, shuffle_rng):
            yield shuffle_rng.permutation(4)

    assert tree(list(Squares(5, repeats=2).batch_iterator(4))) == [[[0, 1, 4, 9]], [[16, 0, 1, 4]], [[9, 16]]]
    ds = Squares(5, sampler=Backwards())
    assert tree(list(ds.batch_iterator(3))) == [[[9, 4, 1]], [[0]]]
    batches = ds.batch_iterator(3)
    next(batches)
    resumed = ds.batch_iterator(3)
    resumed.load_state_dict(batches.state_dict())
    assert tree(list(resumed)) == [[[0]]]
    assert sorted(tree(list(ds.batch_iterator(3, shuffle=5)))[0][0]) == [0, 1, 4, 9]


def test_a_function_serves_a_billion_samples():
    ds = FunctionDataSource(lambda indices: (indices, indices % 7), 10**9)
    parts = [ds.shard(rank, 8).batch_iterator(64, shuffle=3) for rank in range(8)]
    seen = np.concatenate([next(part)[0] for part in parts])
    assert len(np.unique(seen)) == 8 * 64
    assert seen.max() > 5e8
    assert ds.shard(7, 8).num_samples() == 125_000_000
    lone = FunctionDataSource(lambda indices: indices * 2.0, 4, include_indices=True)
    assert tree(list(lone.batch_iterator(4))) == [[[0, 1, 2, 3], [0, 2, 4, 6]]]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ArrayDataSource((np.zeros(3),)), TypeError, "list"),
        (lambda: ArrayDataSource([]), IndexError, "at least one array"),
        (lambda: ArrayDataSource([np.zeros(3), np.zeros(4)]), ValueError, r"data\[0\] has 3 .* data\[1\] has 4"),
        (lambda: ArrayDataSource([np.zeros(3), "abc"]), TypeError, r"data\[1\] is not like an array"),
        (lambda: source(3, repeats=0), ValueError, "repeats"),
        (lambda: source(0, repeats=-1), ValueError, "empty source"),
        (lambda: source(3, indices=[3]), IndexError, "the source has 3 samples"),
        (lambda: source(3, indices=[True, False]), ValueError, "2 places, but the source has 3"),
        (lambda: source(3, sampler=WeightedSampler([1, 2])), ValueError, "2 weights, but the source has 3"),
        (lambda: source(3, sampler=StandardSampler(4)), ValueError, "source has 3"),
        (lambda: source(3, sampler=SubsetSampler([0]), repeats=2), ValueError, "either a sampler"),
        (lambda: source(3, sampler=SubsetSampler([0]), indices=[0]), ValueError, "either a sampler"),
        (lambda: source(3).batch_iterator(2, shufle=True), TypeError, "shufle"),
        (lambda: source(3).batch_indices_iterator(2, shufle=True), TypeError, "shufle"),
        (lambda: source(3).batch_iterator(0), ValueError, "at least 1"),
        (lambda: source(3).batch_iterator(1.5), TypeError, "int"),
        (lambda: source(3, sampler=WeightedSampler([1, 2, 3])).batch_iterator(2), NotImplementedError, "shuffle"),
        (lambda: CompositeDataSource([np.zeros(3)]), TypeError, "coerce_data_source"),
        (lambda: ChoiceDataSource([]), ValueError, "at least one member"),
        (lambda: MapDataSource(np.zeros(3), len), TypeError, "data source is needed"),
        (lambda: AbstractDataSource().num_samples(), NotImplementedError, "num_samples"),
        (lambda: AbstractDataSource().batch_iterator(3), NotImplementedError, "batch_iterator"),
        (lambda: RandomAccessDataSource(3).samples_by_indices([0]), NotImplementedError, "samples_by_indices"),
        (lambda: source(4).shard(2, 2), ValueError, "rank must be 0"),
        (lambda: source(4).shard(0, 2, drop_last=True, pad=True), ValueError, "one of them"),
        (lambda: source(4).take(-1), ValueError, "negative"),
        (lambda: source(4).prefetch(0), ValueError, "at least one"),
    ],
)
def test_misuse_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


# -- functions and iterators --------------------------------------------------------------------------------------


def test_a_callable_is_called_with_the_arguments_and_lists_are_tuples():
    calls = []

    def batches(batch_size, **kwargs):
        calls.append((batch_size, kwargs))
        yield [np.arange(2.0) + 40, np.arange(2)]
        yield [np.arange(2.0) + 45, np.arange(2)]

    ds = CallableDataSource(batches, 4)
    first = next(ds.batch_iterator(5, shuffle=None, other=1))
    assert isinstance(first, tuple)
    assert calls == [(5, {"shuffle": None, "other": 1})]
    assert ds.batch_map_mean(lambda x, _: x.sum(), 2) == (43.0,)
    assert not ds.is_random_access
    assert CallableDataSource(batches).num_samples() is None
    assert CallableDataSource(batches, lambda **kw: 7).num_samples(shuffle=1) == 7
    assert CallableDataSource(batches, np.int64(3)).num_samples() == 3
    assert CallableDataSource(batches, 10.0).num_samples() == 10
    assert CallableDataSource(batches, np.inf).num_samples() == np.inf
    for wrong in (True, "4", 2.5):
        with pytest.raises(TypeError, match="num_samples_fn"):
            CallableDataSource(batches, wrong)


def test_a_resumed_callable_is_called_again_from_the_state_of_its_generator():
    def batches(batch_size, shuffle):
        for _ in range(4):
            yield (shuffle.permutation(5),)

    ds = CallableDataSource(batches)
    started = ds.batch_iterator(5, shuffle=np.random.RandomState(3))
    next(started)
    state = json.loads(json.dumps(started.state_dict()))
    resumed = ds.batch_iterator(5, shuffle=np.random.RandomState(99))
    resumed.load_state_dict(state)
    assert tree(list(resumed)) == tree(list(started))


def test_an_iterator_source_gives_its_iterator_once():
    ds = IteratorDataSource(iter([[np.arange(3)], [np.arange(2)]]), 5)
    assert ds.num_samples() == 5
    assert tree(list(ds.batch_iterator(99, shuffle=True))) == [[[0, 1, 2]], [[0, 1]]]
    assert list(ds.batch_iterator(1)) == []
    with pytest.raises(TypeError, match="n_samples"):
        IteratorDataSource(iter([]), "5")


def test_coerce_data_source():
    X = np.arange(4)
    ds = source(3)
    assert coerce_data_source(ds) is ds
    assert isinstance(coerce_data_source([X, X]), ArrayDataSource)
    assert isinstance(coerce_data_source((X, X)), ArrayDataSource)
    assert isinstance(coerce_data_source({"x": X}), ArrayDataSource)
    assert isinstance(coerce_data_source(iter([(X,)])), IteratorDataSource)
    assert isinstance(coerce_data_source(lambda batch_size: iter([])), CallableDataSource)
    for wrong, error, message in [
        ([], ValueError, "at least one array"),
        ([1, 2], TypeError, "element 0 is not like an array"),
        (["ab"], TypeError, "element 0"),
        (X, TypeError, r"\[x\]"),
        (5, TypeError, "got a int"),
    ]:
        with pytest.raises(error, match=message):
            coerce_data_source(wrong)


# -- composites, choices, maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [None, 7])
def test_batches_that_are_only_read_need_no_copy(shuffle):
    x, y = np.arange(60).reshape(20, 3), np.arange(20)
    ds = data_source.ArrayDataSource([x, y], repeats=2)
    copies = [[part.copy() for part in batch] for batch in ds.batch_iterator(6, shuffle=shuffle)]
    places, lent = set(), []
    for batch in ds.batch_iterator(6, shuffle=shuffle, copy=False):
        assert not any(part.flags.writeable for part in batch)
        places.add(batch[0].__array_interface__["data"][0])
        lent.append([part.copy() for part in batch])
        if shuffle is None and len(lent) == 1:
            assert np.shares_memory(batch[0], x)
    assert tree(lent) == tree(copies)
    assert shuffle is None or len(places) == 1


@pytest.mark.parametrize("shuffle", [None, 3])
def test_memory_of_large_batches_is_used_again_but_never_while_anybody_has_any_part_of_it(shuffle, monkeypatch):
    monkeypatch.setattr(rows, "REUSED_BYTES", 1000)
    monkeypatch.setattr(rows, "RECYCLER", transport.Recycler())
    monkeypatch.setattr(transport, "INITIAL_BYTES", 1000)
    x = np.arange(103 * 300, dtype=np.int32).reshape(103, 300)
    expected = [part.copy() for (part,) in data_source.ArrayDataSource([x], repeats=6).batch_iterator(10, shuffle)]
    held = {
        0: lambda batch: batch,
        2: lambda batch: batch[3:4],
        3: lambda batch: batch[5:].T[7:][::2],
        4: memoryview,
        6: lambda batch: np.frombuffer(batch, np.int32).reshape(batch.shape)[1],
        7: lambda batch: np.from_dlpack(batch)[:1],
    }
    kept, places = [], set()
    for number, (batch,) in enumerate(data_source.ArrayDataSource([x], repeats=6).batch_iterator(10, shuffle)):
        np.testing.assert_array_equal(expected[number], batch)
        places.add(batch.__array_interface__["data"][0])
        if number < 50 and number % 10 in held:
            keep = held[number % 10]
            kept.append((keep(expected[number]), keep(batch)))
        else:
            batch += 1  # it is the caller's
        del batch
    assert len(kept) == 30
    assert len(places) <= len(kept) + 3
    for mine, theirs in kept:
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))
    np.testing.assert_array_equal(np.arange(103 * 300).reshape(103, 300), x)


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize(("indices", "repeats"), [(None, 1), (None, 3), ([5, -1, 3, 3, -40, 7, 0, 2], 5)])
@pytest.mark.parametrize("shuffle", [None, 3])
def test_an_iterator_that_is_saved_between_any_two_batches_gives_what_one_that_is_not_gives(
    copy, indices, repeats, shuffle
):
    def batches():
        ds = data_source.ArrayDataSource([np.arange(41), np.arange(82).reshape(41, 2)], indices, repeats)
        return ds.batch_iterator(4, shuffle, copy=copy)

    expected = [[part.copy() for part in batch] for batch in batches()]
    one, resumed = batches(), batches()
    for batch in expected:
        resumed.load_state_dict(one.state_dict())
        for given_ in (one, resumed):
            assert tree([list(next(given_))]) == tree([batch])
    resumed.load_state_dict(one.state_dict())
    assert next(one, None) is None is next(resumed, None)


def test_an_order_that_a_users_object_draws_may_not_leave_the_array():
    class Outside:
        def permutation(self, x):
            return np.arange(x) + 3

    with pytest.raises(IndexError):
        list(data_source.ArrayDataSource([np.arange(10)]).batch_iterator(2, Outside()))


def test_stages_that_hold_several_batches_are_given_copies():
    ds = data_source.ArrayDataSource([np.arange(24)])
    batches = [batch for (batch,) in ds.prefetch(3).batch_iterator(4, shuffle=1, copy=False)]
    assert sorted(np.concatenate(batches)) == list(range(24))
    mapped = ds.map(lambda x: (x + 1,)).batch_iterator(4, shuffle=1, copy=False)
    assert sorted(np.concatenate([batch for (batch,) in mapped])) == list(range(1, 25))


def test_a_composite_goes_in_step_and_trims_to_the_shortest():
    short, long = source(5), source(9, start=50, repeats=-1)
    batches = list(CompositeDataSource([short, long]).batch_iterator(3))
    assert labels(batches) == [[0, 1, 2], [3, 4]]
    assert labels(batches, 3) == [[50, 51, 52], [53, 54]]
    ragged = list(CompositeDataSource([short, long], trim=False).batch_iterator(3))
    assert labels(ragged, 3) == [[50, 51, 52], [53, 54, 55]]
    nested = next(
        CompositeDataSource([short, CompositeDataSource([long], flatten=False)], flatten=False).batch_iterator(2)
    )
    assert tree(nested)[1][0][1] == [50, 51]
    assert CompositeDataSource([short, long]).num_samples() == 5
    assert CompositeDataSource([short, CallableDataSource(lambda batch_size: iter([]))]).num_samples() is None
    assert list(CompositeDataSource([]).batch_iterator(3)) == []
    assert CompositeDataSource([]).is_random_access


def test_members_of_a_composite_share_a_generator_but_not_a_seed():
    ds = CompositeDataSource([source(40), source(40)])
    rng = np.random.RandomState(2)
    first, second = np.random.RandomState(2).permutation(40), None
    other = np.random.RandomState(2)
    other.permutation(40)
    second = other.permutation(40)
    batch = next(ds.batch_iterator(40, shuffle=rng))
    assert batch[1].tolist() == first.tolist()
    assert batch[3].tolist() == second.tolist()
    for epoch in range(3):
        batch = next(ds.batch_iterator(40, shuffle=2, epoch=epoch))
        assert (batch[1] == batch[3]).mean() < 0.3


def test_composite_random_access():
    ds = CompositeDataSource([source(5), ChoiceDataSource([source(4, 10), source(7, 20)], stratified=True)])
    indices = list(ds.batch_indices_iterator(2, shuffle=1))
    assert all(batch_length(part) == batch_length(batch) for batch in indices for part in batch)
    gathered = [ds.samples_by_indices_nomapping(batch) for batch in indices]
    assert tree(gathered) == tree(list(ds.batch_iterator(2, shuffle=1)))
    with pytest.raises(ValueError, match="2 members, but 1 index batches"):
        ds.samples_by_indices(indices[0][:1])
    mixed = CompositeDataSource([source(3), IteratorDataSource(iter([]))])
    assert not mixed.is_random_access
    with pytest.raises(TypeError, match="no access by index"):
        mixed.batch_indices_iterator(2)
    with pytest.raises(TypeError, match="no access by index"):
        mixed.samples_by_indices([[0], [0]])


def members_of(batches):
    return [batch.ds_index for batch in batches]


def test_a_choice_takes_turns_until_one_ends():
    ds = ChoiceDataSource([source(5), source(9, 100)])
    assert members_of(ds.batch_indices_iterator(2)) == [0, 1, 0, 1, 0, 1]
    assert ds.num_samples() == 14
    rng = np.random.RandomState(5)
    rounds = members_of(ds.batch_indices_iterator(2, shuffle=rng))
    assert all(set(pair) == {0, 1} for pair in zip(rounds[0:6:2], rounds[1:6:2], strict=True))
    assert rounds.count(0) == 3


def test_a_stratified_choice_visits_everything_evenly_spread():
    ds = ChoiceDataSource([source(5), source(9, 100)], stratified=True)
    assert members_of(ds.batch_indices_iterator(2)) == [0, 1, 1, 0, 1, 1, 0, 1]
    assert ds.num_batches(2) == 8
    for shuffle in (None, 4, np.random.default_rng(3)):
        seen = [label for batch in labels(ds.batch_iterator(2, shuffle=shuffle)) for label in batch]
        assert sorted(seen) == [*range(5), *range(100, 109)]
    orders = {tuple(members_of(ds.batch_indices_iterator(2, shuffle=4, epoch=epoch))) for epoch in range(6)}
    assert len(orders) > 1
    endless = ChoiceDataSource([source(3), source(2, repeats=-1)], stratified=True)
    assert members_of(endless.batch_indices_iterator(2)) == [0, 1, 0, 1]


def test_a_stratified_choice_survives_members_that_give_more_or_fewer_batches_than_their_size_says():
    nested = ChoiceDataSource([source(11), source(11, 100)], stratified=True)  # 4 batches of 10, not 3
    ds = ChoiceDataSource([nested, source(10, 200)], stratified=True)
    seen = sorted(ds.batch_map_concat(lambda x, y: y, 10)[0].tolist())
    assert seen == [*range(11), *range(100, 111), *range(200, 210)]
    fewer = ChoiceDataSource([source(30), source(2, 100)])  # ends early
    ds = ChoiceDataSource([fewer, source(4, 200)], stratified=True)
    assert [y for y in np.concatenate([b[1] for b in ds.batch_iterator(2)]) if y >= 200] == [200, 201, 202, 203]
    stated = CallableDataSource(lambda batch_size, **kw: source(20).batch_iterator(batch_size), 4)
    ds = ChoiceDataSource([stated, source(4, 200)], stratified=True)
    assert sorted(np.concatenate([b[1] for b in ds.batch_iterator(2)])) == [*range(20), *range(200, 204)]
    ragged = ChoiceDataSource([source(3), source(3, 10)], stratified=True).take(6)  # of 2, 2, 1 and 1
    ds = ChoiceDataSource([ragged, source(2, 200)], stratified=True)
    assert len(np.concatenate([b[1] for b in ds.batch_iterator(2)])) == 8
    with pytest.raises(TypeError, match="member 0 does not"):
        ChoiceDataSource([CallableDataSource(lambda **kw: iter([])), source(3)], stratified=True).batch_iterator(2)
    empty = ChoiceDataSource([source(0), source(3)], stratified=True)
    assert labels(empty.batch_iterator(2)) == [[0, 1], [2]]


def test_choice_random_access():
    ds = ChoiceDataSource([source(5), source(4, 10, indices=[3, 1])], stratified=True)
    expected = tree(list(ds.batch_iterator(2, shuffle=3)))
    assert [tree(ds.samples_by_indices_nomapping(b)) for b in ds.batch_indices_iterator(2, shuffle=3)] == expected
    assert ds.samples_by_indices(ChoiceBatch(np.array([0]), 1))[1].tolist() == [13]
    with pytest.raises(TypeError, match="ChoiceBatch"):
        ds.samples_by_indices_nomapping(np.array([0]))
    with pytest.raises(TypeError, match="no access by index"):
        ChoiceDataSource([IteratorDataSource(iter([]))]).batch_indices_iterator(2)


def test_a_map_gets_arrays_of_its_own_and_runs_on_random_access_too():
    X, y = arrays(6)

    def shift(batch_X, batch_y):
        batch_X += 1
        return batch_X, batch_y, batch_X[:, 0] * 2

    ds = ArrayDataSource([X, y]).map(shift)
    for batch in ds.batch_iterator(4, shuffle=0):
        assert (batch[2] == (batch[1] + 1) * 2).all()
    assert X.max() == 5
    assert tree(ds.samples_by_indices(np.array([2])))[2] == [6]
    assert ds.num_samples() == 6
    assert [b.tolist() for b in ds.batch_indices_iterator(4)] == [[0, 1, 2, 3], [4, 5]]
    indexed = source(3, include_indices=True).map(lambda index, x, y: (index,))
    assert tree(list(indexed.batch_iterator(2))) == [[[0, 1]], [[2]]]
    assert list(source(2).map(lambda x, y: None).batch_iterator(2)) == [None]


def noisy(x, y, rng):
    return y, rng.random(len(y))


def noise(batches):
    return [batch[1].tolist() for batch in batches]


def test_a_maps_generator_belongs_to_the_batch():
    ds = source(12).map(noisy)
    first = noise(ds.batch_iterator(3, shuffle=1))
    assert len({values[0] for values in first}) == 4
    assert noise(ds.batch_iterator(3, shuffle=1)) == first
    assert noise(ds.batch_iterator(3, shuffle=1, epoch=1)) != first
    assert noise(ds.batch_iterator(3, shuffle=2)) != first
    # By index, in any order, as a pool does it.
    indices = list(ds.batch_indices_iterator(3, shuffle=1))
    assert all(isinstance(batch, SeededBatch) for batch in indices)
    assert (
        noise(ds.samples_by_indices_nomapping(b) for b in reversed(pickle.loads(pickle.dumps(indices))))[::-1] == first
    )
    assert noise(ds.batch_iterator(3)) != noise(ds.batch_iterator(3))
    seeded = MapDataSource(source(12), noisy, seed=5)
    assert noise(seeded.batch_iterator(3)) == noise(seeded.batch_iterator(3))
    rng = np.random.RandomState(0)
    assert noise(ds.batch_iterator(3, shuffle=rng)) != noise(ds.batch_iterator(3, shuffle=rng))
    # Two members that are alike are not given the same noise, whether the state was looked at or not.
    for make in (lambda: 4, lambda: np.random.RandomState(4)):
        pair = CompositeDataSource([ds, ds]).batch_iterator(12, shuffle=make())
        watched = CompositeDataSource([ds, ds]).batch_iterator(12, shuffle=make())
        watched.state_dict()
        batch = next(pair)
        assert batch[1].tolist() != batch[3].tolist()
        assert tree(next(watched)) == tree(batch)
    # In order, where nothing else says what the noise is, the state does.
    started = ds.batch_iterator(3)
    resumed = ds.batch_iterator(3)
    resumed.load_state_dict(started.state_dict())
    assert noise(resumed) == noise(started)


# -- resume, shards, in-place reading ------------------------------------------------------------------------------


def leaf(draw):
    n = draw(st.integers(1, 9))
    kind = draw(st.sampled_from(["all", "subset", "weighted", "weighted subset"]))
    start = draw(st.integers(0, 5)) * 100
    if kind == "weighted":
        return source(n, start, sampler=WeightedSampler(np.arange(1.0, n + 1)))
    if kind == "weighted subset":
        return source(n, start, sampler=WeightedSubsetSampler([1, 3], [0, n - 1]))
    repeats = draw(st.sampled_from([1, 2, 3, -1]))
    if kind == "subset":
        return source(n, start, indices=draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=6)), repeats=repeats)
    return source(n, start, repeats=repeats)


@st.composite
def sources(draw, depth=2):
    kind = draw(st.sampled_from(["leaf", "composite", "choice", "mix", "map", "take"])) if depth else "leaf"
    if kind == "leaf":
        return leaf(draw)
    if kind == "map":
        return draw(sources(depth=depth - 1)).map(tagged)
    if kind == "take":
        return draw(sources(depth=depth - 1)).take(draw(st.integers(0, 20)))
    members = draw(st.lists(sources(depth=depth - 1), min_size=1, max_size=3))
    if kind == "composite":
        return CompositeDataSource(members, flatten=draw(st.booleans()))
    if kind == "mix":
        return MixDataSource(members, np.arange(1, len(members) + 1), draw(st.sampled_from(["first", "all"])))
    known = all(member.num_samples(shuffle=None) is not None for member in members)
    return ChoiceDataSource(members, stratified=known and draw(st.booleans()))


def tagged(*batch, rng):
    return (*batch, rng.integers(1 << 40, size=batch_length(batch)))


RNGS = {
    "seed": lambda: 9,
    "RandomState": lambda: np.random.RandomState(9),
    "Generator": lambda: np.random.default_rng(9),
}


@given(ds=sources(), rng=st.sampled_from(list(RNGS)), batch_size=st.integers(1, 5), seen=st.integers(0, 12))
@settings(max_examples=150, deadline=None)
def test_resumed_is_never_stopped_and_gathered_is_iterated(ds, rng, batch_size, seen):
    def rest(batches):
        return tree(list(itertools.islice(batches, 8)))

    started = ds.batch_iterator(batch_size, shuffle=RNGS[rng]())
    for _ in itertools.islice(started, seen):
        pass
    state = json.loads(json.dumps(started.state_dict()))
    expected = rest(started)

    resumed = ds.batch_iterator(batch_size, shuffle=RNGS[rng]())
    resumed.load_state_dict(state)
    second = json.loads(json.dumps(resumed.state_dict()))
    assert rest(resumed) == expected

    # A pool, which sees indices only, goes on from the state of an iteration without one, and the other way round.
    indices = ds.batch_indices_iterator(batch_size, shuffle=RNGS[rng]())
    indices.load_state_dict(second)
    third = json.loads(json.dumps(indices.state_dict()))
    assert rest(map(ds.samples_by_indices_nomapping, indices)) == expected
    again = ds.batch_iterator(batch_size, shuffle=RNGS[rng]())
    again.load_state_dict(third)
    assert rest(again) == expected


@given(ds=sources(), batch_size=st.integers(1, 5), shuffle=st.sampled_from([4, 5]))
@settings(max_examples=100, deadline=None)
def test_the_number_of_batches_is_the_one_stated(ds, batch_size, shuffle):
    stated = ds.num_batches(batch_size, shuffle=shuffle)
    if stated is not None:
        batches = ds.batch_iterator(batch_size, shuffle=shuffle)
        assert len(list(itertools.islice(batches, 200))) == min(stated, 200)


@given(ds=sources(), batch_size=st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_arrays_made_elsewhere_are_filled_with_the_same(ds, batch_size):
    made = []

    def empty(shape, dtype):
        made.append(np.full(shape, 77, dtype))
        return made[-1]

    for indices in itertools.islice(ds.batch_indices_iterator(batch_size, shuffle=3), 4):
        into = data_source.samples_into(ds, indices, empty)
        assert tree(into) == tree(ds.samples_by_indices_nomapping(indices))


def test_reading_in_place_uses_the_arrays_given():
    made = []

    def empty(shape, dtype):
        made.append(np.empty(shape, dtype))
        return made[-1]

    into = source(9).samples_into(np.array([3, 1]), empty)
    assert [a is b for a, b in zip(into, made, strict=True)] == [True, True]
    with pytest.raises(IndexError):
        source(9).samples_into(np.array([9]), empty)
    assert source(9).samples_into(np.array([-1]), empty)[1].tolist() == [8]
    doubled = source(9).map(lambda x, y, empty: (np.multiply(y, 2, out=empty(y.shape, y.dtype)),))
    (batch,) = doubled.samples_into(np.array([4]), empty)
    assert batch is made[-1]
    assert batch.tolist() == [8]
    assert tree(list(doubled.batch_iterator(9))) == [[list(range(0, 18, 2))]]


@given(n=st.integers(1, 30), world_size=st.integers(1, 5), batch_size=st.integers(1, 6), epoch=st.integers(0, 2))
@settings(max_examples=60, deadline=None)
def test_shards_of_sources_are_disjoint_and_complete_in_every_epoch(n, world_size, batch_size, epoch):
    ds = ChoiceDataSource([source(n).map(lambda x, y: (x, y)), source(4, 100)], stratified=True)
    parts = [
        [y for batch in ds.shard(rank, world_size).batch_iterator(batch_size, shuffle=6, epoch=epoch) for y in batch[1]]
        for rank in range(world_size)
    ]
    assert sorted(itertools.chain(*parts)) == [*range(n), *range(100, 104)]


def test_shards_need_something_they_agree_on():
    with pytest.raises(ValueError, match="shuffle=True"):
        source(4).shard(0, 2).batch_iterator(2, shuffle=True)
    with pytest.raises(TypeError, match="cannot be sharded"):
        CompositeDataSource([IteratorDataSource(iter([]))]).shard(0, 2)


def test_drop_last_leaves_the_short_batch_out():
    assert [len(b[1]) for b in source(7, repeats=2).batch_iterator(4, shuffle=1, drop_last=True)] == [4, 4, 4]
    assert source(7).num_batches(4, drop_last=True) == 1
    assert list(source(3).batch_iterator(4, drop_last=True)) == []


# -- batch_map ----------------------------------------------------------------------------------------------------


def test_map_concat_joins_what_the_function_returns():
    ds = source(11)
    total = []

    def progress(iterator, total, leave):
        assert leave is False
        progress.total = total
        return iterator

    (joined, doubled) = ds.batch_map_concat(lambda k, x, y: [y, x * k], 4, progress, prepend_args=(2,))
    assert joined.tolist() == list(range(11))
    assert doubled[:, 0].tolist() == list(range(0, 22, 2))
    assert progress.total == 3
    skipping = ds.batch_map_concat(lambda x, y: None if 4 in y else y, 4)
    assert skipping[0].tolist() == [0, 1, 2, 3, 8, 9, 10]
    assert ds.batch_map_concat(lambda x, y: None, 4) is None
    assert ds.batch_map_concat(lambda x, y: y, 4, n_batches=0) is None
    batches = source(3, repeats=-1).batch_iterator(2)
    assert data_source.batch_map_concat(lambda x, y: y, batches, n_batches=2)[0].tolist() == [0, 1, 2, 0]
    assert next(batches)[1].tolist() == [1, 2]
    assert total == []


def test_map_concat_processes_every_batch_of_a_choice():
    ds = ChoiceDataSource([source(11), source(11, 100)], stratified=True)
    assert len(ds.batch_map_concat(lambda x, y: y, 10)[0]) == 22
    stated = CallableDataSource(lambda batch_size, **kw: source(20).batch_iterator(batch_size), 4)
    assert len(stated.batch_map_concat(lambda x, y: y, 5)[0]) == 20


def test_map_mean_adds_in_float64_and_leaves_the_functions_arrays_alone():
    X = np.full((1000, 2), 0.1, np.float32)
    ds = ArrayDataSource([X])
    assert ds.batch_map_mean(lambda x: x.sum(dtype=np.float32), 1)[0] == pytest.approx(0.2, rel=1e-7)
    assert ds.batch_map_mean(lambda x: x.astype(float), 7, sum_axis=0)[0] == pytest.approx([0.1, 0.1])
    buffer = np.zeros(1)

    def reuses(x, y):
        buffer[0] = y.sum()
        return buffer

    assert source(6).batch_map_mean(reuses, 2)[0].tolist() == [2.5]
    assert buffer.tolist() == [9]
    for kind in (int, float, np.float32, np.int64):
        (mean,) = source(5).batch_map_mean(lambda x, y, kind=kind: kind(y.sum()), 2)
        assert mean == 2.0
        assert isinstance(mean, np.float64)
    assert source(4).batch_map_mean(lambda x, y: None if 0 in y else y.sum(), 2) == (5 / 4,)
    assert source(4).batch_map_mean(lambda x, y: None, 2) is None
    assert source(4).batch_map_mean(lambda x, y: [y.sum(), x.sum()], 3, n_batches=1) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: source(3).batch_map_concat(lambda x, y: "a", 2), TypeError, "must return arrays"),
        (lambda: source(3).batch_map_concat(lambda x, y: np.array(1), 2), ValueError, "without dimensions"),
        (lambda: source(3, repeats=-1).batch_map_concat(lambda x, y: y, 2), ValueError, "n_batches"),
        (lambda: source(3, repeats=-1).batch_map_mean(lambda x, y: 1, 2), ValueError, "n_batches"),
        (lambda: source(3).batch_map_mean(lambda x, y: "a", 2), TypeError, "must return numbers"),
        (lambda: source(3).batch_map_mean(lambda x, y: 1.0, 2, sum_axis=0), ValueError, "sum_axis=0"),
        (lambda: source(3).batch_map_concat(lambda x, y: y, 2, n_batches=-1), ValueError, "negative"),
        (lambda: source(3).batch_map_concat(lambda x, y: (y,) * len(y), 2), ValueError, "2 results .* 1 for this"),
    ],
)
def test_map_misuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_progress_by_tqdm_and_rich():
    import io

    tqdm = pytest.importorskip("tqdm").tqdm
    console = pytest.importorskip("rich.console").Console(file=io.StringIO(), force_terminal=True)
    from functools import partial

    from mlqueue.batch.progress import rich_progress

    silent = partial(tqdm, file=io.StringIO())
    assert source(5).batch_map_mean(lambda x, y: y.sum(), 2, silent) == (2.0,)
    assert source(5).batch_map_mean(lambda x, y: y.sum(), 2, partial(rich_progress, console=console)) == (2.0,)
    assert "batches" in console.file.getvalue()


def test_trimming_knows_the_structure_of_batches():
    x = np.arange(4)
    batch = ({"a": x, "b": (x, x)}, ChoiceBatch(x, 1), SeededBatch((x, x), (1, 2, 3)))
    cut = trim_batch(batch, 2)
    assert tree(cut[0]) == {"a": [0, 1], "b": [[0, 1], [0, 1]]}
    assert (cut[1].sample_indices.tolist(), cut[1].ds_index) == ([0, 1], 1)
    assert (tree(cut[2].sample_indices), cut[2].key) == ([[0, 1], [0, 1]], (1, 2, 3))
    assert batch_length(cut) == 2


def test_a_state_of_another_source_is_refused():
    composite = CompositeDataSource([source(4), source(4)])
    state = composite.batch_iterator(2, shuffle=1).state_dict()
    with pytest.raises(StateError, match="kind 'composite'"):
        source(4).batch_iterator(2, shuffle=1).load_state_dict(state)
    with pytest.raises(StateError, match="2 members, this source has 3"):
        CompositeDataSource([source(4)] * 3).batch_iterator(2, shuffle=1).load_state_dict(state)
    with pytest.raises(StateError, match="state_dict"):
        source(4).batch_iterator(2).load_state_dict([1])


def test_a_source_can_be_pickled():
    ds = CompositeDataSource([source(5, indices=[1, 2]).map(noisy), ChoiceDataSource([source(3), source(2)])])
    copy = pickle.loads(pickle.dumps(ds))
    assert tree(list(copy.batch_iterator(2, shuffle=1))) == tree(list(ds.batch_iterator(2, shuffle=1)))
