"""Samplers: which samples go into which mini-batch.

:class:`StandardSampler` and :class:`SubsetSampler` visit every sample once an epoch; :class:`WeightedSampler` and
:class:`WeightedSubsetSampler` draw with replacement, in proportion to weights, for ever. The ``shuffle_rng`` arguments
take whatever :mod:`mlqueue.batch.order` lists.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from mlqueue.batch.errors import StateError
from mlqueue.batch.iteration import BatchIterator, check_state
from mlqueue.batch.order import (
    Indexable,
    KeyedPermutation,
    Shuffle,
    StreamShuffle,
    as_shuffle,
    check_batch_size,
    check_int,
)

__all__ = [
    "AbstractSampler",
    "KeyedPermutation",
    "Shard",
    "StandardSampler",
    "SubsetSampler",
    "WeightedSampler",
    "WeightedSubsetSampler",
    "num_batches",
]

Span = slice | np.ndarray


class Run(NamedTuple):
    """Batches of the full size that lie one behind the other in an epoch."""

    #: The indices (1-D ints) of the epoch in their order; None where its places are its indices.
    order: np.ndarray | None
    #: The place where the first of the batches begins, and that where the last one ends.
    start: int
    stop: int


class ZeroBatchSize(ValueError, ZeroDivisionError):
    """A batch size of 0, which BatchUp answers with a ZeroDivisionError."""


def num_batches(n: int, batch_size: int) -> int:
    """The number of batches of at most `batch_size` samples that `n` samples fill: n / batch_size, rounded up.

    Raises ValueError where `batch_size` is below 1 (for 0 one that is a ZeroDivisionError too) or `n` is endless.
    """
    if batch_size < 1:
        kind = ValueError if batch_size else ZeroBatchSize
        raise kind(f"batch_size must be at least 1, got {batch_size}.")
    if not math.isfinite(n):
        raise ValueError(f"n={n}: an endless source has no number of batches; give that of the samples to use.")
    return int(-(-n // batch_size))


class Shard(NamedTuple):
    """One of several parts of every epoch: the samples at places rank, rank + world_size, ... of the epoch's order."""

    rank: int = 0
    world_size: int = 1
    #: What happens to the n % world_size samples left over: "keep" (some parts have one more), "drop" or "pad" (with
    #: the first samples of the epoch).
    remainder: str = "keep"

    def length(self, n: int) -> int:
        """How many of the epoch's `n` samples this part has."""
        if self.remainder == "drop" or n == 0:
            return n // self.world_size
        if self.remainder == "pad":
            return -(-n // self.world_size)
        return (n - self.rank + self.world_size - 1) // self.world_size


WHOLE = Shard()


class AbstractSampler:
    """Decides which samples go into which batch. A subclass has to have the methods that raise NotImplementedError."""

    def num_indices_generated(self) -> float | int | None:
        """How many indices a stream has: an int, ``numpy.inf``, or None when that is not known."""
        raise NotImplementedError(f"{type(self).__name__} has no num_indices_generated()")

    def map_indices(self, indices: Any) -> Any:
        """The absolute indices for positions among the samples that this sampler knows."""
        return indices

    def in_order_indices_batch_iterator(self, batch_size: int) -> Iterator[np.ndarray]:
        """Batches of absolute indices, 1-D int arrays, in order."""
        raise NotImplementedError(f"{type(self).__name__} has no in_order_indices_batch_iterator()")

    def shuffled_indices_batch_iterator(self, batch_size: int, shuffle_rng: Any) -> Iterator[np.ndarray]:
        """Batches of absolute indices, 1-D int arrays, in random order."""
        raise NotImplementedError(f"{type(self).__name__} has no shuffled_indices_batch_iterator()")

    def check_length(self, length: int) -> None:
        """Raise ValueError when this sampler cannot serve a source of `length` samples."""


class IndexIterator(BatchIterator):
    """Batches of indices: 1-D int arrays."""

    def __next__(self) -> np.ndarray:
        span = self.next_span()
        return np.arange(span.start, span.stop, span.step) if isinstance(span, slice) else span

    @abstractmethod
    def next_span(self) -> Span:
        """The next batch of indices; a slice (with start, stop and step) where they are in order."""

    def whole_batches(self) -> Run | None:
        """The batches that are next, to be cut by the caller, who says by :meth:`move_to` how far that went before
        anything else is asked; None where they have to be asked for one by one."""
        return None

    def move_to(self, place: int) -> None:
        """The batches before this place of the last :meth:`whole_batches` have been given."""


class StandardSampler(AbstractSampler):
    """Visits all of `length` samples once in each of `repeats` epochs; -1 is for ever.

    The epochs are laid end to end and then cut into batches, so a batch may hold the end of one epoch and the start of
    the next; only the last batch of all may be short.
    """

    def __init__(self, length: int, repeats: int = 1, *, shard: Shard = WHOLE) -> None:
        self.length = operator.index(length)
        self.repeats = check_repeats(repeats)
        self.shard = shard
        if self.length < 0:
            raise ValueError(f"length must not be negative, got {length}.")
        if self.repeats == -1 and self.shard.length(self.length) == 0:
            raise ValueError("repeats=-1 on an empty source would never give a batch; give repeats=1.")

    def num_indices_generated(self) -> float | int:
        return np.inf if self.repeats == -1 else self.shard.length(self.length) * self.repeats

    def in_order_indices_batch_iterator(self, batch_size: int, epoch: int = 0) -> IndexIterator:
        return self._stream(batch_size, None, epoch)

    def shuffled_indices_batch_iterator(self, batch_size: int, shuffle_rng: Any, epoch: int = 0) -> IndexIterator:
        return self._stream(batch_size, as_shuffle(shuffle_rng), epoch)

    def _stream(self, batch_size: int, shuffle: Shuffle | None, epoch: int) -> IndexIterator:
        return EpochStream(self.length, batch_size, self.repeats, shuffle, epoch, self.shard)

    def check_length(self, length: int) -> None:
        if self.length > length:
            raise ValueError(f"the sampler is for {self.length} samples, but the source has {length}.")

    def for_shard(self, shard: Shard) -> StandardSampler:
        """The sampler of one part of every epoch."""
        return StandardSampler(self.length, self.repeats, shard=nest(self.shard, shard))


class SubsetSampler(AbstractSampler):
    """Visits the samples at `indices` once in each of `repeats` epochs, like :class:`StandardSampler`.

    `indices`: a 1-D sequence of ints in any order, repeated as you like, or a mask of bools, one a sample.
    """

    def __init__(self, indices: Any, repeats: int = 1, *, shard: Shard = WHOLE) -> None:
        self.indices, self._mask_length = subset_indices(indices)
        self.length = len(self.indices)
        self.repeats = check_repeats(repeats)
        self.shard = shard
        if self.repeats == -1 and self.shard.length(len(self.indices)) == 0:
            raise ValueError("repeats=-1 on an empty subset would never give a batch; give repeats=1.")

    def num_indices_generated(self) -> float | int:
        return np.inf if self.repeats == -1 else self.shard.length(len(self.indices)) * self.repeats

    def map_indices(self, indices: Any) -> Any:
        return self.indices[indices]

    def in_order_indices_batch_iterator(self, batch_size: int, epoch: int = 0) -> IndexIterator:
        return self._stream(batch_size, None, epoch)

    def shuffled_indices_batch_iterator(self, batch_size: int, shuffle_rng: Any, epoch: int = 0) -> IndexIterator:
        return self._stream(batch_size, as_shuffle(shuffle_rng), epoch)

    def _stream(self, batch_size: int, shuffle: Shuffle | None, epoch: int) -> IndexIterator:
        return EpochStream(self.indices, batch_size, self.repeats, shuffle, epoch, self.shard)

    def check_length(self, length: int) -> None:
        check_subset(self.indices, self._mask_length, length)

    def for_shard(self, shard: Shard) -> SubsetSampler:
        """The sampler of one part of every epoch."""
        return SubsetSampler(self.indices, self.repeats, shard=nest(self.shard, shard))


class WeightedSampler(AbstractSampler):
    """Draws samples for ever, with replacement, each with a probability in proportion to its weight.

    `weights`: 1-D, one a sample, finite, not negative, not all 0. A draw takes O(log n).
    """

    def __init__(self, weights: Any, *, shard: Shard = WHOLE) -> None:
        self.weights, self.cumulative = normalised_weights(weights)
        self.length = len(self.weights)
        self.shard = shard

    def num_indices_generated(self) -> float:
        return np.inf

    def in_order_indices_batch_iterator(self, batch_size: int, epoch: int = 0) -> IndexIterator:
        raise NotImplementedError(
            f"a {type(self).__name__} draws at random and has no order; give `shuffle` (True, a seed or a generator)."
        )

    def shuffled_indices_batch_iterator(self, batch_size: int, shuffle_rng: Any, epoch: int = 0) -> IndexIterator:
        return WeightedStream(self.cumulative, None, batch_size, need_shuffle(shuffle_rng, self), epoch, self.shard)

    def check_length(self, length: int) -> None:
        if len(self.weights) != length:
            raise ValueError(f"the sampler has {len(self.weights)} weights, but the source has {length} samples.")

    def for_shard(self, shard: Shard) -> WeightedSampler:
        """The sampler of one of several streams of draws: a share of every batch drawn."""
        return WeightedSampler(self.weights, shard=nest(self.shard, shard))

    @staticmethod
    def class_balancing_sample_weights(y: Any, n_classes: int | None = None) -> np.ndarray:
        """Weights (float64, as long as `y`, sum 1) with which every class present is drawn equally often.

        `y`: 1-D, the class of each sample, ints from 0 on (below `n_classes` where that is given).
        """
        labels = class_labels(y, n_classes)
        counts = np.bincount(labels)
        present = np.count_nonzero(counts)
        per_class = np.zeros(len(counts))
        np.divide(1.0, counts * present, out=per_class, where=counts > 0)
        weights: np.ndarray = per_class[labels]
        return weights

    @classmethod
    def class_balancing_sampler(cls, y: Any, n_classes: int | None = None) -> WeightedSampler:
        """A sampler that draws every class present equally often; see :meth:`class_balancing_sample_weights`."""
        return WeightedSampler(cls.class_balancing_sample_weights(y, n_classes))


class WeightedSubsetSampler(AbstractSampler):
    """Draws from the samples at `indices`, for ever, as :class:`WeightedSampler` does.

    `sub_weights`: one for each of `indices`.
    """

    def __init__(self, sub_weights: Any, indices: Any, *, shard: Shard = WHOLE) -> None:
        self.indices, self._mask_length = subset_indices(indices)
        if len(sub_weights) != len(self.indices):
            raise ValueError(
                f"there are {len(sub_weights)} weights for {len(self.indices)} indices; give one for each."
            )
        self.sub_weights, self.cumulative = normalised_weights(sub_weights)
        self.length = len(self.indices)
        self.shard = shard

    def num_indices_generated(self) -> float:
        return np.inf

    def map_indices(self, indices: Any) -> Any:
        return self.indices[indices]

    def in_order_indices_batch_iterator(self, batch_size: int, epoch: int = 0) -> IndexIterator:
        raise NotImplementedError(
            f"a {type(self).__name__} draws at random and has no order; give `shuffle` (True, a seed or a generator)."
        )

    def shuffled_indices_batch_iterator(self, batch_size: int, shuffle_rng: Any, epoch: int = 0) -> IndexIterator:
        shuffle = need_shuffle(shuffle_rng, self)
        return WeightedStream(self.cumulative, self.indices, batch_size, shuffle, epoch, self.shard)

    def check_length(self, length: int) -> None:
        check_subset(self.indices, self._mask_length, length)

    def for_shard(self, shard: Shard) -> WeightedSubsetSampler:
        """The sampler of one of several streams of draws: a share of every batch drawn."""
        return WeightedSubsetSampler(self.sub_weights, self.indices, shard=nest(self.shard, shard))

    @staticmethod
    def class_balancing_sampler(y: Any, indices: Any, n_classes: int | None = None) -> WeightedSubsetSampler:
        """A sampler over the samples at `indices` that draws every class present among them equally often.

        `y`: 1-D, the class of each sample of the whole source.
        """
        chosen, _ = subset_indices(indices)
        weights = WeightedSampler.class_balancing_sample_weights(np.asarray(y)[chosen], n_classes)
        return WeightedSubsetSampler(weights, chosen)


class EpochStream(IndexIterator):
    """Epochs laid end to end and cut into batches.

    `samples`: their number, or the array of their indices.
    """

    def __init__(
        self,
        samples: int | np.ndarray,
        batch_size: int,
        repeats: int,
        shuffle: Shuffle | None,
        epoch: int,
        shard: Shard,
    ) -> None:
        self._samples = samples
        self._n = samples if isinstance(samples, int) else len(samples)
        self._length = shard.length(self._n)
        self._batch_size = check_batch_size(batch_size)
        check_agreement(shuffle, shard)
        self._repeats, self._shuffle, self._first_epoch, self._shard = repeats, shuffle, check_epoch(epoch), shard
        self._epoch = self._first_epoch - 1  # the epoch that is under way
        self._order: Indexable | None = None  # of that epoch; None while its places are its indices
        self._begins_with: list[int] | None = None  # its first indices, which tell an order that is drawn differently
        self._position = self._length  # in that epoch
        self._rng_before: Any = None  # the state of a caller's generator before that epoch's order was drawn
        self._done = False

    def next_span(self) -> Span:
        stop = self._position + self._batch_size
        if self._epoch < self._first_epoch:
            self._begin_epoch()
            stop = self._position + self._batch_size
        if stop > self._length:
            return self._straddle()
        start, self._position = self._position, stop
        return self._span(start, stop)

    def whole_batches(self) -> Run | None:
        if self._shard.world_size > 1:
            return None
        if self._epoch < self._first_epoch:
            self._begin_epoch()
        batches = (self._length - self._position) // self._batch_size
        if not batches or not (self._order is None or type(self._order) is np.ndarray):
            return None
        return Run(self._order, self._position, self._position + batches * self._batch_size)

    def move_to(self, place: int) -> None:
        self._position = place

    def _straddle(self) -> Span:
        """The end of an epoch and the start of the next, or of several."""
        parts: list[Span] = []
        wanted = self._batch_size
        while wanted:
            taken = min(wanted, self._length - self._position)
            if taken:
                parts.append(self._span(self._position, self._position + taken))
                self._position += taken
                wanted -= taken
            # The next order is drawn as soon as an epoch ends in here: BatchUp does, and what a generator that
            # several sources share gives to each of them depends on it.
            if self._position == self._length and not self._begin_epoch():
                break
        if not parts:
            raise StopIteration
        return parts[0] if len(parts) == 1 else np.concatenate([as_indices(part) for part in parts])

    def _begin_epoch(self) -> bool:
        """Draw the order of the next epoch; False when there is none."""
        if self._done:
            return False
        if self._repeats == -1 or self._epoch + 1 < self._first_epoch + self._repeats:
            self._draw(self._epoch + 1)
            return True
        self._done = True
        if self._repeats > 1 and isinstance(self._shuffle, StreamShuffle):
            # BatchUp draws one order more after the last of several epochs, and a program ported from it is to see
            # the same orders in its next pass.
            self._shuffle.permutation(self._samples, self._epoch + 1)
        return False

    def _draw(self, epoch: int) -> None:
        if self._shuffle is None:
            self._order = None if isinstance(self._samples, int) else self._samples
        else:
            self._rng_before = saved_rng(self._shuffle)
            self._order = self._shuffle.permutation(self._samples, epoch)
        self._epoch, self._position = epoch, 0
        # Now: parts of it are handed out, and somebody may write into them.
        self._begins_with = None if self._order is None else [int(index) for index in self._order[0:4]]

    def _span(self, start: int, stop: int) -> Span:
        """The indices at these places (of this part) of the epoch under way."""
        rank, world_size, _ = self._shard
        places = slice(start, stop, 1)
        if world_size > 1:
            places = slice(rank + start * world_size, rank + (stop - 1) * world_size + 1, world_size)
            if places.stop > self._n:
                return self._padded(places)
        if self._order is None:
            return places
        # An array of the sampler's own is not handed out, lest somebody write into it.
        return self._order[places].copy() if self._order is self._samples else self._order[places]

    def _padded(self, places: slice) -> np.ndarray:
        wrapped = np.arange(places.start, places.stop, places.step) % self._n
        if isinstance(self._order, KeyedPermutation):
            return self._order.at(wrapped)
        return wrapped if self._order is None else np.asarray(self._order)[wrapped]

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "epochs",
            "samples": self._n,
            "batch_size": self._batch_size,
            "repeats": self._repeats,
            "shard": list(self._shard),
            "first_epoch": self._first_epoch,
            "epoch": self._epoch,
            "position": self._position,
            "done": self._done,
            "rng": None if self._shuffle is None else self._shuffle.get_state(),
            "rng_before": self._rng_before,
            "begins_with": self._begins_with,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(
            state,
            "epochs",
            samples=self._n,
            batch_size=self._batch_size,
            repeats=self._repeats,
            shard=list(self._shard),
        )
        if (self._shuffle is None) != (state["rng"] is None):
            raise StateError(
                "the state was saved " + ("in order" if state["rng"] is None else "shuffled") + ", this iterator is "
                "not; give the same `shuffle` as when the state was saved."
            )
        self._first_epoch, self._epoch, self._position = state["first_epoch"], state["epoch"], state["position"]
        self._done = state["done"]
        if self._epoch >= self._first_epoch:
            self._redraw(state)
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng"])

    def _redraw(self, state: dict[str, Any]) -> None:
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng_before"])
        self._draw(state["epoch"])
        self._position = state["position"]
        if self._begins_with != state["begins_with"]:
            raise StateError(
                f"epoch {self._epoch} began with the samples {state['begins_with']} when the state was saved, and now "
                f"with {self._begins_with}: another version of numpy, or other indices. Use those of then."
            )


class WeightedStream(IndexIterator):
    """Batches of draws with replacement, for ever. `indices`: what the draws stand for; None for themselves."""

    def __init__(
        self,
        cumulative: np.ndarray,
        indices: np.ndarray | None,
        batch_size: int,
        shuffle: Shuffle,
        epoch: int,
        shard: Shard,
    ) -> None:
        self._cumulative, self._indices, self._shard = cumulative, indices, shard
        self._batch_size = check_batch_size(batch_size)
        check_agreement(shuffle, shard)
        self._shuffle, self._epoch = shuffle, check_epoch(epoch)
        self._draws = shuffle.draws(self._epoch)

    def next_span(self) -> np.ndarray:
        rank, world_size, _ = self._shard
        drawn = self._draws.draw(self._cumulative, self._batch_size * world_size)
        if world_size > 1:
            drawn = drawn[rank * self._batch_size : (rank + 1) * self._batch_size]
        return drawn if self._indices is None else self._indices[drawn]

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "draws",
            "samples": len(self._cumulative),
            "batch_size": self._batch_size,
            "shard": list(self._shard),
            "epoch": self._epoch,
            "rng": self._shuffle.get_state(),
            "draws": self._draws.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "draws", samples=len(self._cumulative), batch_size=self._batch_size, shard=list(self._shard))
        self._shuffle.set_state(state["rng"])
        self._epoch = state["epoch"]
        self._draws = self._shuffle.draws(self._epoch)
        self._draws.set_state(state["draws"])


def check_epoch(epoch: Any) -> int:
    """The number of an epoch, as an int."""
    number = check_int(epoch, "epoch")
    if number < 0:
        raise ValueError(f"epoch must not be negative, got {epoch}: the first one is 0.")
    return number


def as_indices(span: Span) -> np.ndarray:
    """A batch of indices as a 1-D int array."""
    return np.arange(span.start, span.stop, span.step) if isinstance(span, slice) else span


def saved_rng(shuffle: Shuffle) -> Any:
    """The state of a shuffle; None for an object that has none (which state_dict() will say)."""
    try:
        return shuffle.get_state()
    except StateError:
        return None


def check_repeats(repeats: Any) -> int:
    """The number of epochs as an int: at least 1, or -1 for ever."""
    if isinstance(repeats, bool) or not isinstance(repeats, int | np.integer):
        raise TypeError(f"repeats must be an int, at least 1, or -1 for ever; got {repeats!r}.")
    if repeats < 1 and repeats != -1:
        raise ValueError(f"repeats must be at least 1, or -1 for ever; got {repeats}.")
    return int(repeats)


def check_shard(rank: Any, world_size: Any, drop_last: bool, pad: bool) -> Shard:
    """The part `rank` of `world_size`."""
    rank, world_size = operator.index(rank), operator.index(world_size)
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank must be 0 to world_size - 1; got rank {rank} of world_size {world_size}.")
    if drop_last and pad:
        raise ValueError("drop_last=True leaves the samples that are over out, pad=True fills up; give one of them.")
    return Shard(rank, world_size, "drop" if drop_last else "pad" if pad else "keep")


def check_agreement(shuffle: Shuffle | None, shard: Shard) -> None:
    """Raise where parts could not but be shuffled differently."""
    if shard.world_size > 1 and isinstance(shuffle, StreamShuffle) and shuffle.rng is np.random:
        raise ValueError(
            "shuffle=True is numpy's global state, of which every process has its own: the parts would not fit "
            "together. Give all of them the same seed, as shuffle=12345."
        )


def nest(outer: Shard, inner: Shard) -> Shard:
    """A part of a part."""
    if outer.world_size == 1:
        return inner
    if outer.remainder != "keep" or inner.remainder != "keep":
        raise ValueError("a shard with drop_last or pad cannot be sharded again; give the whole world_size at once.")
    return Shard(outer.rank + outer.world_size * inner.rank, outer.world_size * inner.world_size)


def subset_indices(indices: Any) -> tuple[np.ndarray, int | None]:
    """Indices as a 1-D int array of our own, and the length of the mask that they were given as (None for indices)."""
    given = np.asarray(indices)
    if given.ndim != 1:
        raise ValueError(f"indices must be 1-D, got {given.ndim} dimensions.")
    if given.dtype == np.bool_:
        return np.flatnonzero(given), len(given)
    if given.size == 0:
        return np.empty(0, np.intp), None
    if not np.issubdtype(given.dtype, np.integer):
        raise TypeError(f"indices must be ints or a mask of bools, got {given.dtype}.")
    return given.astype(np.intp), None


def check_subset(indices: np.ndarray, mask_length: int | None, length: int) -> None:
    """Raise where a subset does not fit a source of `length` samples."""
    if mask_length is not None and mask_length != length:
        raise ValueError(f"the mask has {mask_length} places, but the source has {length} samples; give one for each.")
    if indices.size and not (-length <= indices.min() and indices.max() < length):
        raise IndexError(
            f"indices go from {indices.min()} to {indices.max()}, but the source has {length} samples "
            f"(allowed: {-length} to {length - 1})."
        )


def normalised_weights(weights: Any) -> tuple[np.ndarray, np.ndarray]:
    """Weights as float64 of sum 1, and their cumulative sums, the last of which is 1."""
    given = np.array(weights, np.float64)
    if given.ndim != 1:
        raise ValueError(f"weights must be 1-D, got {given.ndim} dimensions.")
    if not (np.isfinite(given).all() and (given >= 0).all()):
        raise ValueError("weights must be finite and not negative.")
    total = given.sum()
    if not total > 0:
        raise ValueError("at least one weight must be above 0: with a sum of 0 there is nothing to draw.")
    given /= total
    cumulative = given.cumsum()
    cumulative /= cumulative[-1]
    return given, cumulative


def need_shuffle(shuffle_rng: Any, sampler: AbstractSampler) -> Shuffle:
    shuffle = as_shuffle(shuffle_rng)
    if shuffle is None:
        raise NotImplementedError(f"a {type(sampler).__name__} draws at random; give a seed or a generator.")
    return shuffle


def class_labels(y: Any, n_classes: int | None) -> np.ndarray:
    labels = np.asarray(y)
    if labels.ndim != 1:
        raise ValueError(f"y must be 1-D, the class of each sample; got {labels.ndim} dimensions.")
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"y must hold ints, the classes; got {labels.dtype}.")
    if labels.size and labels.min() < 0:
        raise ValueError(f"classes must not be negative, got {labels.min()}.")
    if n_classes is not None and labels.size and labels.max() >= n_classes:
        raise ValueError(f"y holds the class {labels.max()}, but n_classes is {n_classes}.")
    return labels
