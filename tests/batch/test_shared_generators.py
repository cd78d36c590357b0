"""What a generator that several sources share gives to each of them, and other places where BatchUp's way is followed
to the letter: functions of callables that draw when they are called, lists as parts of batches, trimming by index."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from mlqueue import MLQ
from mlqueue.batch.actor_pool import ActorPool
from mlqueue.batch.data_source import (
    ArrayDataSource,
    CallableDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    FunctionDataSource,
    IteratorDataSource,
    RandomAccessDataSource,
    batch_map_concat,
    batch_map_mean,
)
from mlqueue.batch.identity import version_of
from mlqueue.batch.sampling import (
    StandardSampler,
    SubsetSampler,
    WeightedSampler,
    WeightedSubsetSampler,
    num_batches,
)
from mlqueue.batch.work_pool import WorkerThreadPool, WorkStream
from mlqueue.named import NamedSource

N = 12


def drawing(batch_size, shuffle):
    """An iterator over batches whose order is drawn when it is asked for, not at its first batch."""
    order = shuffle.permutation(N)
    return ((order[start : start + batch_size],) for start in range(0, N, batch_size))


def array(n=N, **options):
    return ArrayDataSource([np.arange(n)], **options)


def listed(batches):
    return [[np.asarray(part).tolist() for part in batch] for batch in batches]


def test_a_callable_is_called_when_its_iterator_is_asked_for():
    rng = np.random.RandomState(1)
    batches = CallableDataSource(drawing).batch_iterator(5, shuffle=rng)
    expected = np.random.RandomState(1)
    order = expected.permutation(N)
    assert rng.get_state()[2] == expected.get_state()[2]
    assert np.concatenate([batch for (batch,) in batches]).tolist() == order.tolist()
    with pytest.raises(TypeError, match="wrong"):
        CallableDataSource(drawing).batch_iterator(5, shuffle=rng, wrong=1)


def first_draws(kind):
    """The orders of (array, callable) from seed 4, as BatchUp draws them: callables are called before members are
    drawn from, and those within another source only when that one is drawn from."""
    rng = np.random.RandomState(4)
    if kind == "choice":
        called, rounds = rng.permutation(N), rng.permutation(2)
        return rng.permutation(N), called, rounds
    if kind == "nested":
        return rng.permutation(N), rng.permutation(N), None
    called = rng.permutation(N)
    return rng.permutation(N), called, None


@pytest.mark.parametrize("kind", ["flat", "nested", "choice"])
def test_members_draw_from_a_shared_generator_in_the_order_of_batchup(kind):
    call = CallableDataSource(drawing)
    of_array, of_call, rounds = first_draws(kind)
    if kind == "choice":
        batches = list(ChoiceDataSource([array(), call]).batch_iterator(N, shuffle=np.random.RandomState(4)))
        got = {int(member): batch[0].tolist() for member, batch in zip(rounds, batches, strict=False)}
        assert got == {0: of_array.tolist(), 1: of_call.tolist()}
        return
    ds = CompositeDataSource([array(), call if kind == "flat" else call.map(lambda x: [x])])
    rng = np.random.RandomState(4)
    batches = ds.batch_iterator(5, shuffle=rng)
    assert rng.get_state()[2] == np.random.RandomState(4).get_state()[2]
    assert next(batches)[0].tolist() == of_array[:5].tolist()
    rest = np.concatenate([batch[1] for batch in batches])
    assert rest.tolist() == of_call[5:].tolist()


@pytest.mark.parametrize("seen", range(4))
@pytest.mark.parametrize("swapped", [False, True])
def test_a_composite_with_a_callable_resumes_with_the_generator_that_they_share(seen, swapped):
    def source():
        members = [array(repeats=3), CallableDataSource(drawing)]
        return CompositeDataSource(members[::-1] if swapped else members)

    rng = np.random.RandomState(7)
    batches = source().batch_iterator(5, shuffle=rng)
    for _ in range(seen):
        next(batches)
    state = batches.state_dict()
    rest, after = listed(batches), rng.randint(1 << 30)
    other = np.random.RandomState(99)
    resumed = source().batch_iterator(5, shuffle=other)
    resumed.load_state_dict(state)
    assert listed(resumed) == rest
    assert other.randint(1 << 30) == after


class Texts:
    """An array-like that gives lists, of arrays of different lengths."""

    def __init__(self, n):
        self.values = [np.arange(1 + i % 4) for i in range(n)]

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index] if isinstance(index, int | slice) else [self.values[i] for i in index]


def test_a_list_within_a_batch_is_a_part_with_a_value_for_each_sample():
    ds = ArrayDataSource([Texts(7), np.arange(7)])
    assert ds.batch_map_mean(lambda texts, numbers: float(len(numbers)), 3, shuffle=1) == (1.0,)
    pair = CompositeDataSource([ds, array(5)])
    for texts, numbers, others in pair.batch_iterator(4, shuffle=np.random.RandomState(1)):
        assert len(texts) == len(numbers) == len(others)
        assert [len(text) for text in texts] == [1 + i % 4 for i in numbers]
    whole = [text.tolist() for texts, _ in ds.rebatch(read=2).batch_iterator(3) for text in texts]
    assert whole == [text.tolist() for text in Texts(7).values]
    (long, numbers), *_ = ds.filter(lambda texts, numbers: numbers > 4).batch_iterator(7)
    assert ([text.tolist() for text in long], numbers.tolist()) == ([[0, 1], [0, 1, 2]], [5, 6])
    for parts in ([np.int64(3), np.int64(4)], [None, None], [b"abc", b"d"], ["abc", "d"]):
        batches = [(parts, np.arange(2))]
        assert batch_map_mean(lambda parts, numbers: 2.0, batches) == (1.0,)


def test_lists_as_batches_of_members_are_structure_in_what_is_not_flattened():
    batches = [[np.arange(6), np.arange(6)], [np.arange(2), np.arange(2)]]
    ds = CompositeDataSource([array().map(lambda x: [x, -x]), IteratorDataSource(iter(batches))], flatten=False)
    got = list(ds.batch_iterator(6))
    assert [[len(part) for part in inner] for batch in got for inner in batch] == [[6, 6], [6, 6], [2, 2], [2, 2]]
    assert batch_map_mean(lambda *_: 1.0, got) == (2 / 8,)
    rebatched = array().map(lambda x: [x, -x]).rebatch(read=3).batch_iterator(4)
    assert [[len(part) for part in batch] for batch in rebatched] == [[4, 4]] * 3


@pytest.mark.parametrize("flatten", [False, True])
def test_batches_by_index_are_trimmed_as_those_of_an_iteration(flatten):
    def parts(batch):
        return [part.tolist() for part in (batch if flatten else [inner for part in batch for inner in part])]

    ds = CompositeDataSource([array(indices=np.arange(5, 12)), array()], flatten)
    assert parts(ds.samples_by_indices([np.arange(3), slice(0, 2)])) == [[5, 6], [0, 1]]
    assert parts(ds.samples_by_indices_nomapping([np.arange(3), slice(0, 2)])) == [[0, 1], [0, 1]]
    ragged = CompositeDataSource(ds.datasets, flatten, trim=False)
    assert parts(ragged.samples_by_indices([np.arange(3), slice(0, 2)])) == [[5, 6, 7], [0, 1]]


def test_a_map_that_leaves_samples_out_gives_the_same_with_and_without_a_pool():
    ds = CompositeDataSource([array().map(lambda x: (x[x % 3 > 0],)), array()])
    serial = listed(ds.batch_iterator(4, shuffle=5))
    assert all(len(one) == len(other) for one, other in serial)
    assert sum(len(one) for one, _ in serial) == N - 4
    with WorkerThreadPool(2) as pool:
        assert listed(pool.parallel_data_source(ds).batch_iterator(4, shuffle=5)) == serial


@pytest.mark.parametrize("include", [False, True])
def test_a_mask_of_bools_names_the_samples_that_it_marks(include):
    ds = array(include_indices=include)
    for mask in (np.arange(N) > 8, (np.arange(N) > 8).tolist()):
        assert [part.tolist() for part in ds.samples_by_indices_nomapping(mask)] == [[9, 10, 11]] * (1 + include)
    with pytest.raises(IndexError, match="a mask of 12 bools; got bool of shape"):
        ds.samples_by_indices_nomapping(np.array([True, False]))
    with pytest.raises(IndexError, match=r"1-D ints, .* got float64"):
        ds.samples_by_indices_nomapping(np.array([1.0]))


@pytest.mark.parametrize("make", [array, lambda **options: FunctionDataSource(lambda x: x, N, **options)])
def test_indices_within_a_batch_may_be_written_into_too(make):
    def source():
        return make(include_indices=True, repeats=2)

    expected = listed(source().batch_iterator(5, shuffle=3))
    batches = source().batch_iterator(5, shuffle=3)
    seen = []
    for place, (indices, values) in enumerate(batches):
        seen.append([indices.tolist(), values.tolist()])
        indices += 1
        values += 1
        resumed = source().batch_iterator(5, shuffle=3)
        resumed.load_state_dict(batches.state_dict())
        assert listed(resumed) == expected[place + 1 :]
    assert seen == expected


@pytest.mark.parametrize("shuffle", [None, 1])
def test_a_map_function_writes_into_its_batch_whoever_reads_the_result_only(shuffle):
    def doubled(x):
        x *= 2
        return (x,)

    ds = array()
    for composed in (ds.map(doubled), CompositeDataSource([ds.map(doubled), ds])):
        seen = [part.copy() for part, *_ in composed.batch_iterator(5, shuffle=shuffle, copy=False)]
        assert sorted(np.concatenate(seen)) == list(range(0, 2 * N, 2))
    assert ds.data[0].tolist() == list(range(N))


def test_an_argument_that_partial_has_given_already_stays():
    def noise(x, rng):
        return (rng.randint(1000, size=len(x)),)

    ds = array().map(partial(noise, rng=np.random.RandomState(3)))
    assert next(ds.batch_iterator(5))[0].tolist() == np.random.RandomState(3).randint(1000, size=5).tolist()


def test_num_samples_of_a_choice_asks_its_members_as_it_is_asked():
    assert ChoiceDataSource([CallableDataSource(drawing, lambda: 7), array()]).num_samples() == 7 + N


def test_samplers_have_their_length():
    samplers = [
        StandardSampler(3),
        SubsetSampler(np.arange(3)),
        WeightedSampler(np.ones(3)),
        WeightedSubsetSampler(np.ones(3), np.arange(3)),
    ]
    assert [sampler.length for sampler in samplers] == [3] * 4


def test_batches_that_cannot_be_counted_are_refused():
    with pytest.raises(ZeroDivisionError, match="batch_size must be at least 1, got 0"):
        num_batches(3, 0)
    with pytest.raises(ValueError, match="endless"):
        num_batches(np.inf, 3)


def test_results_and_arguments_that_batchup_takes_and_refuses():
    batches = [(np.arange(3),), (np.arange(2),)]
    lists = batch_map_concat(lambda x: (x.tolist(), x), batches)
    assert [part.tolist() for part in lists] == [[0, 1, 2, 0, 1]] * 2
    assert batch_map_concat(lambda x: (), batches) == ()
    with pytest.raises(ValueError, match="without dimensions"):
        batch_map_concat(lambda x: (x.sum(),), batches)
    with pytest.raises(TypeError, match="got a single int64"):
        batch_map_concat(lambda x: x.sum(), batches)
    with pytest.raises(TypeError, match=r"prepend_args must be a tuple .* got a str: .*\(x,\)"):
        batch_map_concat(lambda a, x: x, batches, prepend_args="a")
    assert len(batch_map_concat(lambda x: x, batches, n_batches=3 / 2)[0]) == 5
    assert len(batch_map_concat(lambda x: x, batches, n_batches=1.0)[0]) == 3


def test_a_stream_is_made_of_a_pool():
    with WorkerThreadPool(np.int64(1)) as pool:
        stream = WorkStream(worker_pool=pool, task_generator=[[abs, (-3,)], (abs, (-4,))], task_buffer_size=2)
        assert list(stream.retrieve_iter()) == [3, 4]
        with pytest.raises(TypeError, match="worker_pool must be a pool"):
            WorkStream(3, [])


def test_a_shard_of_a_named_source_is_of_another_version_than_the_whole_and_than_others():
    named = NamedSource("numbers", lambda n: array(n))
    source, sources = named(n=N), {"numbers": named}
    parts = [source, named(n=N), source.shard(0, 2), source.shard(1, 2), source.shard(0, 3)]
    versions = [version_of(part, sources) for part in parts]
    assert versions[0] == versions[1]
    assert len(set(versions)) == 4


def test_a_factory_that_makes_no_source_is_told_of():
    with pytest.raises(TypeError, match=r"'numbers' returned a list, not a data source"):
        NamedSource("numbers", lambda: [1, 2])()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retries": -1}, "retries must be an int, 0 or more; got -1"),
        ({"retries": "2"}, "retries must be an int, 0 or more; got '2'"),
        ({"stragglers": "3"}, "stragglers must be a number above 1 .* got '3'"),
    ],
)
def test_terms_of_an_actor_pool_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ActorPool(MLQ("terms"), **options)


def noisy(x, *more, rng):
    return (x, *more, rng.integers(1 << 40, size=len(x)))


@pytest.mark.parametrize("seed", [7, np.random.SeedSequence(7), None])
def test_maps_over_a_map_that_draws_leave_its_numbers_as_they_are_with_a_pool(seed):
    ds = array().map(noisy).map(lambda x, noise: (x, noise)).map(noisy)
    for source in (ds, CompositeDataSource([ds, ds]), ChoiceDataSource([ds, ds]).map(noisy)):
        rng = (lambda: seed) if seed is not None else (lambda: np.random.RandomState(1))
        serial = listed(source.batch_iterator(5, shuffle=rng()))
        with WorkerThreadPool(2) as pool:
            assert listed(pool.parallel_data_source(source).batch_iterator(5, shuffle=rng())) == serial


@pytest.mark.parametrize("shuffle", [7, np.random.RandomState(7)])
def test_maps_one_within_the_other_draw_different_numbers(shuffle):
    for source in (array().map(noisy).map(noisy), CompositeDataSource([array().map(noisy)]).map(noisy)):
        _, inner, outer = next(source.batch_iterator(N, shuffle=shuffle))
        assert not np.intersect1d(inner, outer).size


def failing(*batch):
    raise ArithmeticError("of ours")


@pytest.mark.parametrize("nested", [False, True])
def test_an_error_in_a_batch_of_any_structure_is_raised_where_the_batch_would_be(nested):
    choice = ChoiceDataSource([array().map(noisy), array()])
    ds = CompositeDataSource([choice, array()] if nested else [array(), choice]).map(failing)
    with WorkerThreadPool(1) as pool:
        batches = pool.parallel_data_source(ds).batch_iterator(5, shuffle=1)
        for number in range(3):
            with pytest.raises(ArithmeticError, match="of ours") as raised:
                next(batches)
            assert f"batch {number} (sample indices [" in raised.value.__notes__[0]


def test_an_index_batch_of_the_users_own_does_not_hide_the_error():
    class Cursor:
        def __array__(self, *_):
            raise RuntimeError("no array")

        def __len__(self):
            return 2

    class Remote(RandomAccessDataSource):
        def batch_indices_iterator(self, batch_size, **_):
            return iter([Cursor()])

        def samples_by_indices_nomapping(self, indices):
            raise ArithmeticError("of ours")

    with WorkerThreadPool(1) as pool, pytest.raises(ArithmeticError, match="of ours") as raised:
        next(pool.parallel_data_source(Remote(4)).batch_iterator(2))
    assert "sample indices in a Cursor" in raised.value.__notes__[0]
