"""Mixing sources: every batch from one of them, each as often as its weight says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlqueue.batch.data_source import AbstractDataSource, ChoiceDataSource, open_members
from mlqueue.batch.iteration import BatchIterator, check_state
from mlqueue.batch.iterators import SeveralIterators
from mlqueue.batch.order import Shuffle, as_shuffle
from mlqueue.batch.sampling import normalised_weights

__all__ = ["MixDataSource", "mix"]


def mix(datasets: Sequence[AbstractDataSource], weights: Any, stop: str = "first") -> MixDataSource:
    """A source whose batches come from `datasets` in proportion to `weights`; see :class:`MixDataSource`."""
    return MixDataSource(datasets, weights, stop)


class MixDataSource(ChoiceDataSource):
    """Draws every batch from one of several sources, each as often as its weight says.

    Shuffled, the source of a batch is drawn at random; in order, it is the one that is furthest behind its share.
    `weights`: one a source, not negative. `stop`: ``"first"`` ends when a source that is to give a batch has no more;
    ``"all"`` goes on with the others until all have ended.
    """

    def __init__(self, datasets: Sequence[AbstractDataSource], weights: Any, stop: str = "first") -> None:
        super().__init__(datasets)
        self.weights, self._cumulative = normalised_weights(weights)
        if len(self.weights) != len(self.datasets):
            raise ValueError(f"there are {len(self.weights)} weights for {len(self.datasets)} sources; give one each.")
        if stop not in ("first", "all"):
            raise ValueError(f"stop must be 'first' or 'all', got {stop!r}.")
        if stop == "all" and not self.weights.all():
            raise ValueError("with stop='all' every weight must be above 0: else that source would never end.")
        self.stop = stop

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        counts = [ds.num_batches(batch_size, **kwargs) for ds in self.datasets]
        known = [count for count in counts if count is not None]
        return sum(known) if self.stop == "all" and len(known) == len(counts) else None

    def num_samples(self, **kwargs: Any) -> float | int | None:
        counts = [ds.num_samples(**kwargs) for ds in self.datasets]
        known = [count for count in counts if count is not None]
        if self.stop == "all":
            return sum(known) if len(known) == len(counts) else None
        # Where one source ends, so does the mixture, but after how many samples of the others depends on the draws.
        return np.inf if len(known) == len(counts) and all(np.isinf(count) for count in known) else None

    def _iterator(
        self, method: str, batch_size: int, kwargs: dict[str, Any], wrap: Callable[[Any, int], Any] | None
    ) -> BatchIterator:
        members = open_members(self.datasets, method, batch_size, kwargs)
        shuffle = as_shuffle(kwargs["shuffle"])
        return MixIterator(members, self.weights, shuffle, kwargs.get("epoch", 0), wrap, self.stop == "all")

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> MixDataSource:
        """The mixture of the sources' parts; see ``RandomAccessDataSource.shard``."""
        parts = super().shard(rank, world_size, drop_last, pad).datasets
        return MixDataSource(parts, self.weights, self.stop)


class MixIterator(SeveralIterators):
    """A batch at a time from a member drawn by weight."""

    def __init__(
        self,
        members: list[Any],
        weights: np.ndarray,
        shuffle: Shuffle | None,
        epoch: int,
        wrap: Callable[[Any, int], Any] | None,
        to_the_end: bool,
    ) -> None:
        super().__init__(members)
        self._weights, self._shuffle, self._epoch, self._wrap = weights, shuffle, epoch, wrap
        self._to_the_end = to_the_end
        self._draws = None if shuffle is None else shuffle.draws(epoch)
        self._given = np.zeros(len(members), np.int64)
        self._ended = np.zeros(len(members), np.bool_)
        self._done = False

    def __next__(self) -> Any:
        if not self._begun:
            self._begin_members()
        while not self._done:
            member = self._next_member()
            try:
                batch = next(self._members[member])
            except StopIteration:
                self._ended[member] = True
                self._done = not self._to_the_end or bool(self._ended.all())
                continue
            self._given[member] += 1
            return batch if self._wrap is None else self._wrap(batch, member)
        raise StopIteration

    def _next_member(self) -> int:
        weights = np.where(self._ended, 0.0, self._weights)
        weights /= weights.sum()
        if self._draws is None:
            behind = weights * (self._given[~self._ended].sum() + 1) - self._given
            return int(np.where(weights > 0, behind, -np.inf).argmax())
        cumulative = weights.cumsum()
        return int(self._draws.draw(cumulative / cumulative[-1], 1)[0])

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "mix",
            "members": self._member_states(),
            "given": self._given.tolist(),
            "ended": self._ended.tolist(),
            "done": self._done,
            "epoch": self._epoch,
            "rng": None if self._shuffle is None else self._shuffle.get_state(),
            "draws": None if self._draws is None else self._draws.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "mix")
        self._load_members(state["members"])
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng"])
            self._draws = self._shuffle.draws(state["epoch"])
            self._draws.set_state(state["draws"])
        self._given = np.array(state["given"], np.int64)
        self._ended = np.array(state["ended"], np.bool_)
        self._done, self._epoch = state["done"], state["epoch"]
