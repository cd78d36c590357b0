"""Iterators that change a stream of batches: rebatch, filter, take, prefetch, record.

They work on any iterator over batches; a state can be saved if that iterator's can.
"""

from __future__ import annotations

import collections
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from mlqueue.batch import gathering
from mlqueue.batch.errors import StateError
from mlqueue.batch.iteration import BatchIterator, as_structure, batch_length, check_state, trim_batch
from mlqueue.batch.iterators import state_of

__all__ = ["FilterIterator", "PrefetchIterator", "RebatchIterator", "TakeIterator", "join_batches", "slice_batch"]


def slice_batch(batch: Any, start: int, stop: int) -> Any:
    """Some samples of a batch, in the same structure."""
    if isinstance(batch, tuple):
        return tuple(slice_batch(part, start, stop) for part in batch)
    if isinstance(batch, dict):
        return {name: slice_batch(part, start, stop) for name, part in batch.items()}
    return batch[start:stop]


def join_batches(batches: list[Any]) -> Any:
    """Batches of the same structure, one behind the other."""
    first = batches[0]
    if isinstance(first, tuple):
        return tuple(join_batches(list(parts)) for parts in zip(*batches, strict=True))
    if isinstance(first, dict):
        return {name: join_batches([batch[name] for batch in batches]) for name in first}
    if isinstance(first, list):
        return [sample for batch in batches for sample in batch]
    return np.concatenate(batches, axis=0)


def select(batch: Any, mask: np.ndarray) -> Any:
    """The samples of a batch for which a mask holds."""
    if isinstance(batch, tuple):
        return tuple(select(part, mask) for part in batch)
    if isinstance(batch, dict):
        return {name: select(part, mask) for name, part in batch.items()}
    if isinstance(batch, list):
        return [sample for sample, kept in zip(batch, mask, strict=True) if kept]
    return np.asarray(batch)[mask]


class Stage(BatchIterator):
    """An iterator over what another one gives."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches: Any = batches

    def close(self) -> None:
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class FilterIterator(Stage):
    """The samples for which ``predicate(*batch)`` (``predicate(batch)`` for dicts) holds.

    It returns an array of bools, one a sample, or one bool for the whole batch; batches left empty are not given.
    """

    def __init__(self, batches: Iterator[Any], predicate: Callable[..., Any]) -> None:
        super().__init__(batches)
        self._predicate = predicate

    def __next__(self) -> Any:
        while True:
            batch = as_structure(next(self._batches))
            kept = np.asarray(self._predicate(batch) if isinstance(batch, dict) else self._predicate(*batch))
            if kept.dtype != np.bool_ or kept.ndim > 1 or (kept.ndim and len(kept) != batch_length(batch)):
                raise TypeError(
                    "a filter must return a bool for the batch, or an array of bools, one for each of its "
                    f"{batch_length(batch)} samples; got {kept.dtype} of shape {kept.shape}."
                )
            if kept.all():
                return batch
            if kept.ndim and kept.any():
                return select(batch, kept)

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "filter", "source": state_of(self._batches)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "filter")
        self._batches.load_state_dict(state["source"])


class TakeIterator(Stage):
    """The first `n` samples; works on index batches as well."""

    def __init__(self, batches: Iterator[Any], n: int) -> None:
        super().__init__(batches)
        self._left = n

    def __next__(self) -> Any:
        if not self._left:
            raise StopIteration
        batch = next(self._batches)
        if batch_length(batch) > self._left:
            batch = trim_batch(batch, self._left)
        self._left -= batch_length(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"kind": "take", "source": state_of(self._batches), "left": self._left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "take")
        self._batches.load_state_dict(state["source"])
        self._left = state["left"]


class RebatchIterator(Stage):
    """The same samples in batches of `batch_size`, whatever sizes they come in; only the last one may be short."""

    def __init__(self, batches: Iterator[Any], batch_size: int, drop_last: bool) -> None:
        super().__init__(batches)
        self._batch_size, self._drop_last = batch_size, drop_last
        self._rest: Any = None  # what is left of the batch that was cut last
        self._used = 0  # how much of that batch was given
        self._before: Any = None  # the place of the source before that batch

    def __next__(self) -> Any:
        parts: list[Any] = []
        wanted = self._batch_size
        while wanted:
            if self._rest is None and not self._read():
                break
            n = batch_length(self._rest) - self._used
            taken = min(n, wanted)
            parts.append(slice_batch(self._rest, self._used, self._used + taken))
            wanted -= taken
            self._used += taken
            if taken == n:
                self._rest, self._used = None, 0
        if not parts or (wanted and self._drop_last):
            raise StopIteration
        return parts[0] if len(parts) == 1 else join_batches(parts)

    def _read(self) -> bool:
        try:
            self._before = state_of(self._batches)
        except StateError:
            self._before = None
        self._rest, self._used = as_structure(next(self._batches, None)), 0
        return self._rest is not None

    def state_dict(self) -> dict[str, Any]:
        before = state_of(self._batches) if self._rest is None else self._before
        if before is None:
            state_of(self._batches)  # raises, saying why
        return {"kind": "rebatch", "source": before, "used": self._used, "batch_size": self._batch_size}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "rebatch", batch_size=self._batch_size)
        self._batches.load_state_dict(state["source"])
        self._rest, self._used = None, 0
        if state["used"]:
            # The batch that was cut is read again.
            if not self._read():
                raise StateError("the batch that was being cut when the state was saved does not come any more.")
            self._used = state["used"]


class Channel:
    """What a prefetching thread and its iterator share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.ready: collections.deque[tuple[Any, Any]] = collections.deque()
        self.error: BaseException | None = None
        self.ended = False  # nothing more will be put
        self.closed = False  # nothing more will be asked for

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.ready.clear()
            self.changed.notify_all()

    def put(self, item: tuple[Any, Any]) -> bool:
        """Wait for a free place; False when the iterator was closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or len(self.ready) < self.size)
            if not self.closed:
                self.ready.append(item)
                self.changed.notify_all()
            return not self.closed

    def end(self, error: BaseException | None) -> None:
        with self.changed:
            self.error, self.ended = error, True
            self.changed.notify_all()


class PrefetchIterator(Stage):
    """Prepares up to `size` batches ahead in a thread, which begins with the first ``next()``.

    It ends with the iteration, with :meth:`close`, and when the iterator is dropped. A state is that of the batches
    given, not of those prepared.
    """

    def __init__(self, batches: Iterator[Any], size: int) -> None:
        super().__init__(batches)
        self._size = size
        self._channel: Channel | None = None
        self._thread: threading.Thread | None = None
        self._state: Any = None
        self._finished = False

    def __next__(self) -> Any:
        if self._finished:
            raise StopIteration
        if self._channel is None:
            self._start()
        channel = self._channel
        assert channel is not None
        with channel.changed:
            channel.changed.wait_for(lambda: channel.ready or channel.ended or channel.closed)
            if channel.ready:
                batch, self._state = channel.ready.popleft()
                channel.changed.notify_all()
                return batch
        self._finished = True
        if channel.error is not None:
            raise channel.error
        raise StopIteration

    def _start(self) -> None:
        self._state = saved(self._batches)
        self._channel = Channel(self._size)
        self._thread = threading.Thread(
            target=fill, args=(self._channel, self._batches), name="mlqueue-prefetch", daemon=True
        )
        self._thread.start()
        weakref.finalize(self, self._channel.close)

    def state_dict(self) -> dict[str, Any]:
        state = self._state
        if self._channel is None:
            state = state_of(self._batches)
        if state is None:
            raise StateError("the source that is prefetched cannot be saved; see what its own state_dict() says.")
        return {"kind": "prefetch", "source": state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        check_state(state, "prefetch")
        self._stop()
        self._batches.load_state_dict(state["source"])
        self._channel, self._finished = None, False

    def _stop(self) -> None:
        if self._channel is not None and self._thread is not None:
            self._channel.close()
            self._thread.join()

    def close(self) -> None:
        """End the thread (after the batch that it is preparing)."""
        self._finished = True
        self._stop()
        super().close()


def saved(batches: Any) -> Any:
    try:
        return state_of(batches)
    except StateError:
        return None


def fill(channel: Channel, batches: Iterator[Any]) -> None:
    """What the prefetching thread does. It knows the channel, but not the iterator, which can thus be dropped."""
    error: BaseException | None = None
    try:
        with gathering.without_help():  # whoever takes the batches goes on meanwhile
            for batch in batches:
                if not channel.put((batch, saved(batches))):
                    break
    except BaseException as raised:  # noqa: BLE001  it is raised where the batch is asked for
        error = raised
    channel.end(error)


class RecordIterator(Stage):
    """Gives the batches on and, when it has come to the end, hands all of them over."""

    def __init__(self, batches: Iterator[Any], keep: Callable[[list[Any]], None]) -> None:
        super().__init__(batches)
        self._keep, self._seen = keep, list[Any]()
        self._whole = True

    def __next__(self) -> Any:
        try:
            batch = next(self._batches)
        except StopIteration:
            if self._whole:
                self._keep(self._seen)
                self._whole = False
            raise
        if self._whole:
            self._seen.append(copied(batch))
        return batch

    def state_dict(self) -> dict[str, Any]:
        inner: dict[str, Any] = state_of(self._batches)
        return inner

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches.load_state_dict(state)
        self._whole, self._seen = False, []


def copied(batch: Any) -> Any:
    """A batch that shares no memory with this one."""
    if isinstance(batch, tuple):
        return tuple(copied(part) for part in batch)
    if isinstance(batch, dict):
        return {name: copied(part) for name, part in batch.items()}
    return list(batch) if isinstance(batch, list) else np.array(batch)


def filtered(source: Any, batch_size: int, kwargs: dict[str, Any], predicate: Callable[..., Any]) -> BatchIterator:
    return FilterIterator(source.batch_iterator(batch_size, **kwargs), predicate)


def rebatched(source: Any, batch_size: int, kwargs: dict[str, Any], read: int | None) -> BatchIterator:
    drop_last = kwargs.pop("drop_last", False)
    return RebatchIterator(source.batch_iterator(read or batch_size, **kwargs), batch_size, drop_last)


def prefetched(source: Any, batch_size: int, kwargs: dict[str, Any], size: int) -> BatchIterator:
    return PrefetchIterator(source.batch_iterator(batch_size, **kwargs), size)
