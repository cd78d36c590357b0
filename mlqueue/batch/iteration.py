"""Iterators over mini-batches that can be saved and resumed, and the shape of a mini-batch.

A mini-batch is a tuple of arrays with equal first dimension, possibly nested, or a dict of them. A list counts as a
tuple where a batch is expected; within a batch it is a part with a value for each sample, like an array.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np

from mlqueue.batch.errors import StateError
from mlqueue.batch.order import Shuffle

__all__ = ["BatchIterator", "ChoiceBatch", "SeededBatch", "batch_length", "trim_batch"]


class ChoiceBatch(NamedTuple):
    """The index batch of a ChoiceDataSource."""

    #: The index batch of the member that was chosen.
    sample_indices: Any
    #: The number of that member.
    ds_index: int


class SeededBatch(NamedTuple):
    """The index batch of a MapDataSource whose function draws random numbers."""

    #: The index batch of the source that is mapped.
    sample_indices: Any
    #: What the batch's generator is derived from: (entropy, epoch, number of the batch).
    key: tuple[int, int, int]


def batch_length(batch: Any) -> int:
    """The number of samples in a batch or an index batch: that of its first array."""
    batch = as_structure(batch)
    while True:
        if isinstance(batch, ChoiceBatch | SeededBatch):
            batch = batch.sample_indices
        elif isinstance(batch, tuple) and batch:
            batch = batch[0]
        elif isinstance(batch, dict) and batch:
            batch = next(iter(batch.values()))
        else:
            return len(batch)


def trim_batch(batch: Any, length: int) -> Any:
    """The first `length` samples of a batch or an index batch."""
    return _trim(as_structure(batch), length)


def _trim(part: Any, length: int) -> Any:
    if isinstance(part, ChoiceBatch | SeededBatch):
        return part._replace(sample_indices=_trim(part.sample_indices, length))
    if isinstance(part, tuple):
        return tuple(_trim(inner, length) for inner in part)
    if isinstance(part, dict):
        return {name: _trim(inner, length) for name, inner in part.items()}
    return part[:length]


def trim_parts(parts: list[Any]) -> list[Any]:
    """Batches, or index batches, cut to the shortest of them."""
    lengths = [batch_length(part) for part in parts]
    shortest = min(lengths, default=0)
    return [trim_batch(part, shortest) for part in parts] if max(lengths, default=0) > shortest else parts


def as_structure(batch: Any) -> Any:
    """A batch as the tuple that a list stands for; anything else as it is."""
    return tuple(batch) if isinstance(batch, list) else batch


class BatchIterator(ABC, Iterator[Any]):
    """An iterator over mini-batches, or over the indices of mini-batches, whose place can be saved.

    ``load_state_dict(it.state_dict())`` on an iterator that was made with the same arguments, in any process, gives
    the batches that ``it`` had left. A state is made of plain Python values.
    """

    def __iter__(self) -> Self:
        return self

    @abstractmethod
    def __next__(self) -> Any: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """The place of this iterator, to be given to :meth:`load_state_dict`.

        Raises :class:`~mlqueue.batch.errors.StateError` where a source or a shuffle object cannot be saved.
        """

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a place that :meth:`state_dict` gave; raises StateError when it belongs to other arguments."""

    def begin(self) -> None:
        """Call the function that makes the batches, where there is one: sources made of others do so at their first
        batch, for all members before they draw from any."""

    def close(self) -> None:
        """End the iteration: nothing more comes, and what is held (threads, files, buffers) is let go."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def check_state(state: dict[str, Any], kind: str, **expected: Any) -> None:
    """Raise StateError unless the state is of this kind and was saved with these arguments."""
    if not isinstance(state, dict) or "kind" not in state:
        raise StateError(f"a state is the dict that state_dict() gave; got a {type(state).__name__}.")
    if state["kind"] != kind:
        raise StateError(
            f"the state was saved by an iterator of kind {state['kind']!r}, this one is of kind {kind!r}; "
            "build the data source as it was when the state was saved."
        )
    for name, value in expected.items():
        if state.get(name) != value:
            raise StateError(
                f"the state was saved with {name} {state.get(name)!r}, this iterator has {value!r}; give the same "
                "arguments, and the same data, as when the state was saved."
            )


class ReplayIterator(BatchIterator):
    """Batches of an iterator that knows nothing of states: to resume, it is made again and what was seen is skipped.

    `make` gives the iterator; it is called by :meth:`begin`, or at the first batch. If it draws from `shuffle`, that is
    put back to where it was when the iterator was made, and afterwards to where it was when the state was saved. Exact
    when `make` gives the same batches again.
    """

    def __init__(self, make: Callable[[], Iterator[Any]], shuffle: Shuffle | None = None) -> None:
        self._make, self._shuffle = make, shuffle
        self._batches: Iterator[Any] | None = None
        self._rng_state: Any = None
        self._number = 0
        self._closed = False

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        self.begin()
        assert self._batches is not None
        batch = next(self._batches)
        self._number += 1
        return batch

    def begin(self) -> None:
        if self._batches is None and not self._closed:
            self._rng_state = self._save_rng()
            self._batches = iter(self._make())

    def _save_rng(self) -> Any:
        if self._shuffle is None:
            return None
        try:
            return self._shuffle.get_state()
        except StateError:
            return None

    def state_dict(self) -> dict[str, Any]:
        if self._batches is None:
            self._rng_state = None if self._shuffle is None else self._shuffle.get_state()
        own = getattr(self._batches, "state_dict", None)
        if own is not None:
            return {"kind": "own", "number": self._number, "own": own()}
        if self._shuffle is not None and self._rng_state is None:
            self._shuffle.get_state()  # raises, saying what to give instead
        begun = self._batches is not None
        return {
            "kind": "replay",
            "number": self._number,
            "begun": begun,
            "rng": self._rng_state,
            "rng_now": self._save_rng(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if isinstance(state, dict) and state.get("kind") == "own":
            self._batches = iter(self._make())
            own = getattr(self._batches, "load_state_dict", None)
            if own is None:
                raise StateError("the state was saved by an iterator with load_state_dict(), which this one lacks.")
            own(state["own"])
            self._number = state["number"]
            return
        check_state(state, "replay")
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng"])
        self._rng_state, self._batches = state["rng"], None
        if not state["begun"]:
            self._number = 0
            return
        self._batches = iter(self._make())
        for seen in range(state["number"]):
            if next(self._batches, None) is None:
                raise StateError(f"the state was saved after {state['number']} batches, but now only {seen} come.")
        self._number = state["number"]
        if self._shuffle is not None and state["rng_now"] is not None:
            self._shuffle.set_state(state["rng_now"])

    def close(self) -> None:
        self._closed = True
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def noise_generator(key: tuple[int, int, int]) -> np.random.Generator:
    """The generator of one batch for a map function."""
    entropy, epoch, number = key
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy, spawn_key=(epoch, number))))
