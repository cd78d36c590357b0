"""Samplers: who is drawn, how often, in which order, and what is refused."""

from __future__ import annotations

import itertools
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlqueue.batch.errors import StateError
from mlqueue.batch.order import KEYED_ABOVE, KeyedPermutation, as_shuffle
from mlqueue.batch.sampling import (
    AbstractSampler,
    Shard,
    StandardSampler,
    SubsetSampler,
    WeightedSampler,
    WeightedSubsetSampler,
    num_batches,
)

SHUFFLES = {
    "seed": lambda: 11,
    "sequence": lambda: np.random.SeedSequence(11),
    "RandomState": lambda: np.random.RandomState(11),
    "Generator": lambda: np.random.default_rng(11),
    "MT19937": lambda: np.random.Generator(np.random.MT19937(11)),
    "Philox": lambda: np.random.Generator(np.random.Philox(11)),
}


def batches_of(sampler, batch_size, shuffle, **kwargs):
    if shuffle is None:
        return sampler.in_order_indices_batch_iterator(batch_size, **kwargs)
    return sampler.shuffled_indices_batch_iterator(batch_size, shuffle, **kwargs)


def test_num_batches_rounds_up():
    assert [num_batches(n, 4) for n in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        num_batches(3, 0)


@given(
    length=st.integers(1, 12),
    repeats=st.integers(1, 4),
    batch_size=st.integers(1, 20),
    shuffle=st.sampled_from([None, *SHUFFLES]),
    subset=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_every_epoch_is_a_permutation_and_only_the_last_batch_is_short(length, repeats, batch_size, shuffle, subset):
    indices = np.arange(length) * 3 + 1
    sampler = SubsetSampler(indices, repeats) if subset else StandardSampler(length, repeats)
    batches = list(batches_of(sampler, batch_size, shuffle and SHUFFLES[shuffle]()))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= batch_size
    epochs = np.concatenate(batches).reshape(repeats, length)
    expected = indices if subset else np.arange(length)
    for epoch in epochs:
        assert sorted(epoch) == sorted(expected)
    if shuffle is None:
        assert (epochs == expected).all()
    assert sampler.num_indices_generated() == length * repeats


def test_the_stream_of_several_epochs_is_the_documented_one():
    def in_order(length, repeats, batch_size, first):
        batches = batches_of(StandardSampler(length, repeats), batch_size, None)
        return [batch.tolist() for batch, _ in zip(batches, range(first), strict=False)]

    assert in_order(5, 2, 2, 9) == [[0, 1], [2, 3], [4, 0], [1, 2], [3, 4]]
    assert in_order(2, 3, 5, 9) == [[0, 1, 0, 1, 0], [1]]
    assert in_order(3, -1, 4, 2) == [[0, 1, 2, 0], [1, 2, 0, 1]]
    assert in_order(3, 1, 10, 9) == [[0, 1, 2]]
    assert in_order(0, 3, 2, 9) == []


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng], ids=["RandomState", "Generator"])
def test_a_callers_generator_gives_its_own_permutations_and_one_more_after_several_epochs(make):
    ours, plain = make(5), make(5)
    drawn = np.concatenate(list(batches_of(StandardSampler(7, 3), 4, ours)))
    assert (drawn == np.concatenate([plain.permutation(7) for _ in range(3)])).all()
    plain.permutation(7)
    assert ours.permutation(50).tolist() == plain.permutation(50).tolist()
    once = np.concatenate(list(batches_of(SubsetSampler([4, 2, 9]), 2, ours)))
    assert once.tolist() == plain.permutation([4, 2, 9]).tolist()
    assert ours.permutation(50).tolist() == plain.permutation(50).tolist()


def test_true_is_numpys_global_state():
    np.random.seed(3)
    expected = np.random.permutation(6).tolist()
    np.random.seed(3)
    assert next(batches_of(StandardSampler(6), 6, True)).tolist() == expected


def test_nothing_is_drawn_before_the_first_batch():
    rng = np.random.RandomState(1)
    batches = batches_of(StandardSampler(5), 2, rng)
    rng.permutation(9)
    other = np.random.RandomState(1)
    other.permutation(9)
    assert next(batches).tolist() == other.permutation(5)[:2].tolist()


def test_a_seed_gives_every_epoch_an_order_of_its_own_that_can_be_asked_for():
    whole = np.concatenate(list(batches_of(StandardSampler(20, 3), 5, 7))).reshape(3, 20)
    assert len({tuple(epoch) for epoch in whole}) == 3
    for number, epoch in enumerate(whole):
        again = np.concatenate(list(batches_of(StandardSampler(20), 5, np.int64(7), epoch=number)))
        assert again.tolist() == epoch.tolist()
    assert list(map(list, batches_of(StandardSampler(20), 20, 8))) != [whole[0].tolist()]
    assert next(batches_of(StandardSampler(20), 20, 0)).tolist() != list(range(20))


@pytest.mark.parametrize("length", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_keyed_permutation_is_one(length):
    permutation = KeyedPermutation(length, seed=3, epoch=1)
    values = permutation[0:length]
    assert len(permutation) == length
    assert sorted(values.tolist()) == list(range(length))
    assert permutation[length - 1] == values[-1]
    assert permutation[0:length:3].tolist() == values[::3].tolist()
    assert permutation.at(np.array([0, 0])).tolist() == [values[0]] * 2


def test_a_keyed_permutation_looks_drawn():
    length, keys = 1000, 400
    orders = np.array([KeyedPermutation(length, seed=key)[0:length] for key in range(keys)])
    # Each place holds each tenth of the values equally often, over keys: chi-square with 9 degrees of freedom,
    # for 1000 places; their mean is 9 with a standard error of 0.13.
    counts = np.array([np.bincount(orders[:, place] // 100, minlength=10) for place in range(length)])
    chi = ((counts - keys / 10) ** 2 / (keys / 10)).sum(axis=1)
    assert abs(chi.mean() - 9) < 0.7
    assert chi.max() < 45
    # Neighbours are not correlated, nor is the order with that of the next epoch.
    pairs = np.corrcoef(orders[:, :-1].ravel(), orders[:, 1:].ravel())[0, 1]
    assert abs(pairs) < 0.01
    epochs = np.corrcoef(orders[0], KeyedPermutation(length, seed=0, epoch=1)[0:length])[0, 1]
    assert abs(epochs) < 0.15


def test_a_billion_samples_are_shuffled_without_an_index_of_that_length():
    n = 10**9
    tracemalloc.start()
    try:
        batches = batches_of(StandardSampler(n, shard=Shard(3, 1000)), 4096, 42)
        part = np.concatenate([next(batches) for _ in range(20)])
        whole = batches_of(StandardSampler(n), 1024, 42)
        first = np.concatenate([next(whole) for _ in range(100)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20e6
    assert n > KEYED_ABOVE
    assert len(np.unique(part)) == len(part)
    assert 0 <= part.min() < n / 1000
    assert n - n / 1000 < part.max() < n
    assert part[:100].tolist() == first[3::1000][:100].tolist() + part[len(first[3::1000]) : 100].tolist()
    # Resuming far inside costs nothing either.
    state = whole.state_dict()
    state["position"] = n - 1500
    whole.load_state_dict(state)
    assert [len(batch) for batch in whole] == [1024, 476]


@given(
    n=st.integers(0, 40),
    world_size=st.integers(1, 7),
    batch_size=st.integers(1, 9),
    shuffle=st.sampled_from([None, *SHUFFLES]),
    epoch=st.integers(0, 3),
    keyed=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_shards_are_disjoint_complete_and_equal(n, world_size, batch_size, shuffle, epoch, keyed):
    def part(rank, remainder):
        sampler = StandardSampler(n, shard=Shard(rank, world_size, remainder))
        with pytest.MonkeyPatch.context() as patch:
            if keyed:
                patch.setattr("mlqueue.batch.order.KEYED_ABOVE", 3)
            batches = list(batches_of(sampler, batch_size, shuffle and SHUFFLES[shuffle](), epoch=epoch))
        indices = [int(index) for batch in batches for index in batch]
        assert len(indices) == sampler.num_indices_generated()
        return indices

    keep = [part(rank, "keep") for rank in range(world_size)]
    assert sorted(itertools.chain(*keep)) == list(range(n))
    assert max(map(len, keep)) - min(map(len, keep)) <= 1
    drop = [part(rank, "drop") for rank in range(world_size)]
    assert {len(indices) for indices in drop} == {n // world_size}
    assert len(set(itertools.chain(*drop))) == n // world_size * world_size
    pad = [part(rank, "pad") for rank in range(world_size)]
    assert {len(indices) for indices in pad} == {-(-n // world_size)}
    assert set(itertools.chain(*pad)) == set(range(n))
    # All are parts of one order: the one that a single process sees.
    whole = [None] * n
    for rank, indices in enumerate(keep):
        whole[rank::world_size] = indices
    with pytest.MonkeyPatch.context() as patch:
        if keyed:
            patch.setattr("mlqueue.batch.order.KEYED_ABOVE", 3)
        single = batches_of(StandardSampler(n), batch_size, shuffle and SHUFFLES[shuffle](), epoch=epoch)
        assert whole == [int(index) for batch in single for index in batch]


def test_shards_of_shards_are_parts_of_the_whole():
    sampler = StandardSampler(29)
    parts = [
        np.concatenate(list(batches_of(sampler.for_shard(Shard(a, 2)).for_shard(Shard(b, 3)), 4, 1)))
        for a in range(2)
        for b in range(3)
    ]
    assert sorted(np.concatenate(parts)) == list(range(29))
    with pytest.raises(ValueError, match="cannot be sharded again"):
        sampler.for_shard(Shard(0, 2, "drop")).for_shard(Shard(0, 2))


@pytest.mark.parametrize(
    ("kind", "shuffle"),
    [
        (kind, shuffle)
        for kind in ("standard", "subset", "weighted", "weighted subset")
        for shuffle in (None, *SHUFFLES)
        if shuffle or not kind.startswith("weighted")  # those have no order
    ],
)
def test_resumed_after_any_number_of_batches_the_rest_is_the_same(kind, shuffle):
    weights = np.random.RandomState(0).rand(7)
    sampler = {
        "standard": StandardSampler(7, 3),
        "subset": SubsetSampler([5, 1, 4, 4, 0, 2, 9], 3),
        "weighted": WeightedSampler(weights),
        "weighted subset": WeightedSubsetSampler(weights, np.arange(7) + 20),
    }[kind]

    def start():
        return batches_of(sampler, 3, shuffle and SHUFFLES[shuffle](), epoch=2)

    def rest(batches):
        return [batch.tolist() for batch, _ in zip(batches, range(8), strict=False)]

    for seen in range(8):
        never_stopped = start()
        for _ in range(seen):
            next(never_stopped, None)
        state = json.loads(json.dumps(never_stopped.state_dict()))
        expected = rest(never_stopped)
        resumed = start()
        if seen % 2:
            next(resumed)  # where it stood before does not matter
        resumed.load_state_dict(state)
        # The second resume, before anything was drawn, is where others lose count.
        again = start()
        again.load_state_dict(json.loads(json.dumps(resumed.state_dict())))
        assert rest(again) == expected
        if shuffle in (None, "seed", "sequence"):
            assert rest(resumed) == expected


def test_a_state_of_other_arguments_is_refused():
    state = batches_of(StandardSampler(10), 3, 5).state_dict()
    for other, what in [
        (batches_of(StandardSampler(11), 3, 5), "samples 10"),
        (batches_of(StandardSampler(10), 4, 5), "batch_size 3"),
        (batches_of(StandardSampler(10, 2), 3, 5), "repeats 1"),
        (batches_of(StandardSampler(10), 3, 6), "shuffle=5"),
        (batches_of(StandardSampler(10), 3, None), "saved shuffled"),
        (batches_of(StandardSampler(10), 3, np.random.RandomState(5)), "another kind of shuffle"),
        (batches_of(WeightedSampler(np.ones(10)), 3, 5), "of kind 'epochs'"),
    ]:
        with pytest.raises(StateError, match=what):
            other.load_state_dict(state)
    began = batches_of(SubsetSampler([1, 2, 3, 4]), 3, 5)
    next(began)
    with pytest.raises(StateError, match="other indices"):
        batches_of(SubsetSampler([1, 2, 3, 5]), 3, 5).load_state_dict(began.state_dict())

    class Permuter:
        def permutation(self, n):
            return np.arange(n)[::-1]

    backwards = batches_of(StandardSampler(3), 3, Permuter())
    assert next(backwards).tolist() == [2, 1, 0]
    with pytest.raises(StateError, match="no state that can be saved"):
        backwards.state_dict()


@pytest.mark.parametrize("make", [np.random.RandomState, np.random.default_rng], ids=["RandomState", "Generator"])
def test_weighted_draws_are_those_of_choice(make):
    weights = np.random.RandomState(3).rand(500)
    ours, plain = make(9), make(9)
    batches = batches_of(WeightedSampler(weights * 7), 33, ours)
    for _ in range(20):
        assert next(batches).tolist() == plain.choice(500, size=33, p=weights / weights.sum()).tolist()


def test_weighted_draws_follow_the_weights_and_never_draw_what_weighs_nothing():
    weights = np.array([0.0, 1.0, 0.0, 2.0, 5.0, 0.0])
    batches = batches_of(WeightedSampler(weights), 20_000, 1)
    counts = np.bincount(next(batches), minlength=6)
    assert counts[[0, 2, 5]].tolist() == [0, 0, 0]
    # Four standard deviations of a binomial count.
    expected = weights / 8 * 20_000
    assert (abs(counts - expected) <= 4 * np.sqrt(expected * (1 - weights / 8))).all()
    subset = batches_of(WeightedSubsetSampler([1, 0, 3], [7, 8, 9]), 1000, 1)
    assert set(next(subset).tolist()) == {7, 9}


def test_a_custom_object_with_choice_alone_draws_too():
    class Chooser:
        def permutation(self, n):
            raise AssertionError

        def choice(self, n, size, p):
            assert n == 4
            assert p == pytest.approx([0.1, 0.2, 0.3, 0.4])
            return np.full(size, 2)

    assert next(batches_of(WeightedSampler([1, 2, 3, 4]), 3, Chooser())).tolist() == [2, 2, 2]


def test_shards_of_a_weighted_sampler_share_one_stream_of_draws():
    sampler = WeightedSampler(np.arange(1, 9))
    whole = batches_of(sampler, 12, 4)
    parts = [batches_of(sampler.for_shard(Shard(rank, 3)), 4, 4) for rank in range(3)]
    for _ in range(3):
        assert next(whole).tolist() == list(itertools.chain(*(next(part).tolist() for part in parts)))


def test_class_balancing():
    y = np.array([0, 0, 0, 1, 4, 4])
    weights = WeightedSampler.class_balancing_sample_weights(y)
    assert weights == pytest.approx([1 / 9] * 3 + [1 / 3] + [1 / 6] * 2)
    assert WeightedSampler.class_balancing_sample_weights(y, n_classes=5) == pytest.approx(weights)
    drawn = next(batches_of(WeightedSampler.class_balancing_sampler(y, n_classes=9), 9000, 2))
    assert np.bincount(y[drawn])[[0, 1, 4]] / 9000 == pytest.approx([1 / 3] * 3, abs=0.03)
    subset = WeightedSubsetSampler.class_balancing_sampler(y, np.array([0, 3, 1]))
    drawn = next(batches_of(subset, 9000, 2))
    assert set(drawn.tolist()) == {0, 1, 3}
    assert (drawn == 3).mean() == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="class 4, but n_classes is 4"):
        WeightedSampler.class_balancing_sampler(y, n_classes=4)
    with pytest.raises(ValueError, match="negative"):
        WeightedSampler.class_balancing_sampler([-1, 0])
    with pytest.raises(TypeError, match="ints"):
        WeightedSampler.class_balancing_sampler([0.0, 1.0])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: StandardSampler(5, 0), ValueError, "repeats must be at least 1, or -1"),
        (lambda: StandardSampler(5, -2), ValueError, "got -2"),
        (lambda: StandardSampler(5, 1.5), TypeError, "repeats must be an int"),
        (lambda: StandardSampler(0, -1), ValueError, "empty source"),
        (lambda: StandardSampler(-1), ValueError, "negative"),
        (lambda: SubsetSampler([], -1), ValueError, "empty subset"),
        (lambda: SubsetSampler([[1]]), ValueError, "1-D"),
        (lambda: SubsetSampler([0.5]), TypeError, "ints or a mask"),
        (lambda: WeightedSampler([0, 0]), ValueError, "above 0"),
        (lambda: WeightedSampler([1, -1]), ValueError, "not negative"),
        (lambda: WeightedSampler([1, np.nan]), ValueError, "finite"),
        (lambda: WeightedSampler([[1.0]]), ValueError, "1-D"),
        (lambda: WeightedSubsetSampler([1.0], [1, 2]), ValueError, "1 weights for 2 indices"),
        (lambda: WeightedSampler([1]).in_order_indices_batch_iterator(2), NotImplementedError, "shuffle"),
        (lambda: WeightedSubsetSampler([1], [0]).in_order_indices_batch_iterator(2), NotImplementedError, "shuffle"),
        (lambda: StandardSampler(5).in_order_indices_batch_iterator(0), ValueError, "at least 1"),
        (lambda: StandardSampler(5).in_order_indices_batch_iterator(-3), ValueError, "at least 1"),
        (lambda: StandardSampler(5).in_order_indices_batch_iterator(2.0), TypeError, "must be an int"),
        (lambda: StandardSampler(5).shuffled_indices_batch_iterator(2, "yes"), TypeError, "shuffle must be"),
        (lambda: StandardSampler(5).shuffled_indices_batch_iterator(2, -4), ValueError, "negative"),
        (lambda: AbstractSampler().num_indices_generated(), NotImplementedError, "num_indices_generated"),
        (lambda: KeyedPermutation(0, 1), ValueError, "1 to 2"),
    ],
)
def test_misuse_is_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_mask_is_understood_and_the_callers_indices_are_not_aliased():
    indices = np.array([3, 1])
    sampler = SubsetSampler(indices)
    batch = next(batches_of(sampler, 2, None))
    batch[:] = 99
    indices[:] = 77
    assert next(batches_of(sampler, 2, None)).tolist() == [3, 1]
    assert next(batches_of(SubsetSampler([True, False, True]), 2, None)).tolist() == [0, 2]
    assert sampler.map_indices(np.array([1, 0])).tolist() == [1, 3]
    assert as_shuffle(False) is None
    assert as_shuffle(np.True_) is not None
