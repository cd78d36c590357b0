"""The iterators that data sources give: each knows how to save its place and go back to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from mlqueue.batch.errors import StateError
from mlqueue.batch.iteration import BatchIterator, as_structure, batch_length, check_state, trim_parts
from mlqueue.batch.order import Shuffle
from mlqueue.batch.rows import Gatherer
from mlqueue.batch.sampling import IndexIterator, saved_rng


class FullBatches(BatchIterator):
    """Leaves the last batch out if it is short."""

    def __init__(self, batches: BatchIterator, batch_size: int) -> None:
        self._batches, self._batch_size = batches, batch_size

    def __next__(self) -> Any:
        batch = next(self._batches)
        if batch_length(batch) < self._batch_size:
            raise StopIteration
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)


class GatherIterator(BatchIterator):
    """Batches gathered by a function, one for each batch of indices."""

    def __init__(self, indices: BatchIterator, gather: Callable[[Any], Any]) -> None:
        self._indices, self._gather = indices, gather

    def __next__(self) -> Any:
        return self._gather(next(self._indices))

    def state_dict(self) -> dict[str, Any]:
        return self._indices.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._indices.load_state_dict(state)


class ArrayIterator(BatchIterator):
    """Batches of an ArrayDataSource of `arrays`: read as slices where they are in order.

    `lend`: they are only read, and before the next one is asked for.
    """

    def __init__(self, indices: IndexIterator, batch_size: int, arrays: list[Any], lend: bool) -> None:
        self._indices, self._size = indices, batch_size
        self._gatherers = [Gatherer(array, batch_size, lend) for array in arrays]
        # Most batches are cut here out of an epoch's order, which takes the least time; the place is told afterwards.
        self._order: np.ndarray | None = None
        self._place = self._stop = 0
        self._cutting = False
        self._gather: list[Callable[[Any], Any]] = []

    def __next__(self) -> tuple[Any, ...]:
        start = self._place
        stop = start + self._size
        if stop > self._stop:
            return self._go_on()
        self._place = stop
        order = self._order
        span = slice(start, stop) if order is None else order[start:stop]
        return tuple([gather(span) for gather in self._gather])

    def _go_on(self) -> tuple[Any, ...]:
        self._tell()
        run = self._indices.whole_batches()
        if run is None:
            span = self._indices.next_span()
            return tuple([gatherer(span) for gatherer in self._gatherers])
        self._order, self._place, self._stop = run
        self._cutting = True
        self._gather = [gatherer.of(run) for gatherer in self._gatherers]
        return next(self)

    def _tell(self) -> None:
        if self._cutting:
            self._indices.move_to(self._place)
        self._place = self._stop = 0
        self._cutting, self._order = False, None

    def state_dict(self) -> dict[str, Any]:
        self._tell()
        return self._indices.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._tell()
        self._indices.load_state_dict(state)


class TupleIterator(BatchIterator):
    """Batches given by a user, in which a list counts as a tuple."""

    def __init__(self, batches: BatchIterator) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return as_structure(next(self._batches))

    def begin(self) -> None:
        self._batches.begin()

    def state_dict(self) -> dict[str, Any]:
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)

    def close(self) -> None:
        self._batches.close()


class SeveralIterators(BatchIterator):
    """What iterators over the members of a source have in common."""

    def __init__(self, members: list[Any]) -> None:
        self._members = members
        self._begun = False

    def _begin_members(self) -> None:
        """At the first batch: functions of members are called, for all before any is drawn from."""
        self._begun = True
        for member in self._members:
            if isinstance(member, BatchIterator):
                member.begin()

    def _member_states(self) -> list[Any]:
        return [state_of(member) for member in self._members]

    def _load_members(self, states: list[Any]) -> None:
        if len(states) != len(self._members):
            raise StateError(f"the state was saved with {len(states)} members, this source has {len(self._members)}.")
        self._begun = False
        for member, state in zip(self._members, states, strict=True):
            member.load_state_dict(state)

    def close(self) -> None:
        for member in self._members:
            close = getattr(member, "close", None)
            if close is not None:
                close()


class CompositeIterator(SeveralIterators):
    """A batch from each member at every step."""

    def __init__(self, members: list[Any], trim: bool, join: Callable[[list[Any]], Any]) -> None:
        super().__init__(members)
        self._trim, self._join = trim, join

    def __next__(self) -> Any:
        if not self._members:
            raise StopIteration
        if not self._begun:
            self._begin_members()
        parts = [next(member) for member in self._members]
        return self._join(trim_parts(parts) if self._trim else parts)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "composite", "members": self._member_states()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "composite")
        self._load_members(state["members"])


class ChoiceIterator(SeveralIterators):
    """Members in turn, or in rounds of random order, until one whose turn it is has no more."""

    def __init__(
        self, members: list[Any], shuffle: Shuffle | None, epoch: int, wrap: Callable[[Any, int], Any] | None
    ) -> None:
        super().__init__(members)
        self._shuffle, self._epoch, self._wrap = shuffle, epoch, wrap
        self._round: list[int] = []
        self._rounds = self._place = 0
        self._done = False

    def __next__(self) -> Any:
        if self._done:
            raise StopIteration
        if not self._begun:
            self._begin_members()
        if self._place == len(self._round):
            self._begin_round()
        member = self._round[self._place]
        try:
            batch = next(self._members[member])
        except StopIteration:
            self._done = True
            raise
        self._place += 1
        return batch if self._wrap is None else self._wrap(batch, member)

    def _begin_round(self) -> None:
        n = len(self._members)
        if self._shuffle is None:
            self._round = list(range(n))
        else:
            # One epoch may have any number of rounds: a seed's orders are told apart by both numbers.
            drawn = self._shuffle.permutation(n, (self._epoch << 32) + self._rounds)
            self._round = [int(member) for member in drawn[0:n]]
        self._rounds, self._place = self._rounds + 1, 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "choice",
            "members": self._member_states(),
            "round": list(self._round),
            "rounds": self._rounds,
            "place": self._place,
            "done": self._done,
            "epoch": self._epoch,
            "rng": None if self._shuffle is None else self._shuffle.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "choice")
        self._load_members(state["members"])
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng"])
        self._round, self._rounds, self._place = list(state["round"]), state["rounds"], state["place"]
        self._done, self._epoch = state["done"], state["epoch"]


class StratifiedIterator(SeveralIterators):
    """All batches of all members, spread evenly or at random.

    `counts`: how many each is expected to give; `sure`: whether it will give exactly as many.
    """

    def __init__(
        self,
        members: list[Any],
        shuffle: Shuffle | None,
        epoch: int,
        wrap: Callable[[Any, int], Any] | None,
        counts: list[int],
        sure: list[bool],
    ) -> None:
        super().__init__(members)
        self._unsure = [member for member, is_sure in enumerate(sure) if not is_sure]
        self._shuffle, self._epoch, self._wrap, self._counts = shuffle, epoch, wrap, counts
        self._schedule: np.ndarray | None = None
        self._rng_before: Any = None  # the state of a caller's generator before the schedule was drawn
        self._place = 0

    def __next__(self) -> Any:
        if not self._begun:
            self._begin_members()
        if self._schedule is None:
            self._rng_before = None if self._shuffle is None else saved_rng(self._shuffle)
            self._schedule = self._draw_schedule()
        while True:
            if self._place < len(self._schedule):
                member = int(self._schedule[self._place])
            elif self._place < len(self._schedule) + len(self._unsure):
                member = self._unsure[self._place - len(self._schedule)]
            else:
                raise StopIteration
            try:
                batch = next(self._members[member])
            except StopIteration:
                self._place += 1
                continue
            self._place += self._place < len(self._schedule)
            return batch if self._wrap is None else self._wrap(batch, member)

    def _draw_schedule(self) -> np.ndarray:
        members = np.repeat(np.arange(len(self._counts)), self._counts)
        if self._shuffle is not None:
            self._shuffle.shuffle(members, self._epoch)
            return members
        # In as many steps as the longest member has batches; of n batches, number k comes at the step k * steps / n.
        steps = max(self._counts, default=0)
        at = [-(-np.arange(count) * steps // count) for count in self._counts if count]
        spread: np.ndarray = members[np.lexsort((members, np.concatenate(at)))] if at else members
        return spread

    def state_dict(self) -> dict[str, Any]:
        return {
            "kind": "stratified",
            "members": self._member_states(),
            "counts": list(self._counts),
            "began": self._schedule is not None,
            "place": self._place,
            "epoch": self._epoch,
            "rng": None if self._shuffle is None else self._shuffle.get_state(),
            "rng_before": self._rng_before,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "stratified", counts=list(self._counts))
        self._place, self._epoch, self._schedule = state["place"], state["epoch"], None
        if state["began"]:
            if self._shuffle is not None:
                self._shuffle.set_state(state["rng_before"])
            self._rng_before, self._schedule = state["rng_before"], self._draw_schedule()
        self._load_members(state["members"])
        if self._shuffle is not None:
            self._shuffle.set_state(state["rng"])


class KeyedIterator(BatchIterator):
    """``apply(batch, key)`` for every batch; key is (entropy, epoch, number), or None where there is no `begin`.

    `fixed`: whether `begin` may be called at any time before the first batch. Where the entropy comes from the state
    of a caller's generator it may not: members of a composite draw from that one after the other, and are told apart by
    it.
    """

    def __init__(
        self,
        batches: Any,
        begin: Callable[[], tuple[int, int]] | None,
        apply: Callable[[Any, Any], Any],
        fixed: bool = True,
    ) -> None:
        self._batches, self._begin, self._apply, self._fixed = batches, begin, apply, fixed
        self._stream: tuple[int, int] | None = None
        self._number = 0

    def __next__(self) -> Any:
        if self._begin is None:
            return self._apply(next(self._batches), None)
        if self._stream is None:
            self._stream = self._begin()
        batch = next(self._batches)
        key = (*self._stream, self._number)
        self._number += 1
        return self._apply(batch, key)

    def state_dict(self) -> dict[str, Any]:
        inner: dict[str, Any] = state_of(self._batches)
        if self._begin is None:
            return inner
        if self._stream is None and self._fixed:
            self._stream = self._begin()
        stream = None if self._stream is None else list(self._stream)
        return {"kind": "map", "source": inner, "stream": stream, "number": self._number}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._begin is None:
            self._batches.load_state_dict(state)
            return
        check_state(state, "map")
        self._batches.load_state_dict(state["source"])
        stream, self._number = state["stream"], state["number"]
        self._stream = None if stream is None else (stream[0], stream[1])

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


def state_of(iterator: Any) -> Any:
    state_dict = getattr(iterator, "state_dict", None)
    if state_dict is None:
        raise StateError(f"a {type(iterator).__name__} cannot be saved: it has no state_dict().")
    return state_dict()
