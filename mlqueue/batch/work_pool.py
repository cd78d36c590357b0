"""Pools of workers that prepare mini-batches, or do other work, in parallel.

::

    with WorkerThreadPool(2) as pool:
        ds = pool.parallel_data_source(ArrayDataSource([images, labels]).map(augment))
        for x, y in ds.batch_iterator(64, shuffle=12345):
            ...

Which pool: :class:`WorkerThreadPool` where the time is spent in code that lets go of Python's global lock (numpy,
Pillow, reading files), :class:`WorkerProcessPool` where it is spent in Python itself. Both give the batches that the
source itself gives, in its order: the indices are drawn by the process that iterates, the workers only gather. Rows of
numpy arrays, with no function to apply, are gathered by threads in both: processes would need the arrays a second time.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain, repeat
from typing import Any, Generic, Literal, Self, TypeVar

import numpy as np

from mlqueue.batch import skips
from mlqueue.batch.crew import BatchCall, Call, Crew, ThreadCrew
from mlqueue.batch.data_source import (
    AbstractDataSource,
    ChoiceDataSource,
    CompositeDataSource,
    need_random_access,
    noise_entropy,
    state_of,
)
from mlqueue.batch.errors import BatchSkipped
from mlqueue.batch.gathering import processors
from mlqueue.batch.iteration import BatchIterator
from mlqueue.batch.order import as_shuffle, at_least_one
from mlqueue.batch.pool_worker import is_pure
from mlqueue.batch.process_crew import ProcessCrew, SharedConstant, WorkerDied, WorkerError
from mlqueue.batch.sampling import IndexIterator

__all__ = [
    "AbstractWorkerPool",
    "ParallelDataSource",
    "ParallelIterator",
    "SharedConstant",
    "WorkStream",
    "WorkerDied",
    "WorkerError",
    "WorkerProcessPool",
    "WorkerThreadPool",
]

#: Small batches of plain arrays are gathered together, up to about so many bytes, and parted when they are given: by
#: threads, and by actors, which are called off one group at a time and so do not go beyond the buffer.
THREAD_GROUP_BYTES = 1 << 22
ACTOR_GROUP_BYTES = 1 << 20
#: So many at most, however small they are.
MOST_GROUPED = 64
#: Every so many batches the place of the index iterator is noted, so that a state can be made for any batch.
ANCHOR_EVERY = 128

T = TypeVar("T", Call, BatchCall)


class AbstractWorkerPool:
    """What both pools have in common. A pool is a context manager; it ends its workers when closed or dropped."""

    def __init__(self, crew: Crew) -> None:
        self._crew = crew

    def shared_constant(self, x: Any) -> Any:
        """A stand-in for `x` among the arguments of tasks: `x` is then sent to every worker once, not with each task.

        With threads it is `x`. With processes it is a :class:`SharedConstant`: the workers get `x` as it was when this
        was called, and numpy arrays in it lie in memory that all of them share.
        """
        return self._crew.share(x)

    def work_stream(self, task_generator: Iterable[Any], task_buffer_size: int = 20) -> WorkStream:
        """Do the tasks of an iterable in parallel; see :class:`WorkStream`."""
        return WorkStream(self, task_generator, task_buffer_size)

    def parallel_data_source(
        self, ds: AbstractDataSource, batch_buffer_size: int = 20, *, copy: bool = True
    ) -> ParallelDataSource:
        """A data source whose batches are those of `ds`, prepared by the workers; see :class:`ParallelDataSource`."""
        return ParallelDataSource(ds, batch_buffer_size, self, copy=copy)

    def _crew_for(self, ds: AbstractDataSource) -> Crew:
        """The workers that prepare the batches of a source."""
        return self._crew

    def close(self) -> None:
        """End the workers and what they do; nothing of the pool is left afterwards. Batches that were given stay."""
        self._crew.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class WorkerThreadPool(AbstractWorkerPool):
    """A pool of threads. `processes`: their number, at least 1 (named as in the other pool)."""

    def __init__(self, processes: int = 1) -> None:
        super().__init__(ThreadCrew(at_least_one(processes, "processes")))


class WorkerProcessPool(AbstractWorkerPool):
    """A pool of processes. `processes`: their number, at least 1.

    The processes are started afresh, so a pool may be made in a program with threads, and a script needs no
    ``if __name__ == "__main__"``. Functions and classes of the main script, lambdas and closures are sent by value.
    Batches come back in memory that is shared, without being pickled. A process that dies is replaced and its batches
    are prepared again; a batch whose process dies three times raises :class:`WorkerDied`. Needs joblib.

    `help_while_starting`: as long as no process has begun (Python and numpy take a fifth of a second), whoever asks for
    a batch prepares it: the first ones come as soon as without a pool. Not for functions that must not run in this
    process, because they take memory that they keep, or may end it.

    The rows of a source that is nothing but numpy arrays are gathered by as many threads of this process (no more than
    it has processors). That is faster, and the arrays, which the processes would have to share, are there once.
    """

    _crew: ProcessCrew

    def __init__(self, processes: int = 1, *, help_while_starting: bool = False) -> None:
        super().__init__(ProcessCrew(at_least_one(processes, "processes"), help_while_starting))
        self._threads: ThreadCrew | None = None
        self._making = threading.Lock()

    def _crew_for(self, ds: AbstractDataSource) -> Crew:
        if not takes_rows(ds):
            return self._crew
        with self._making:
            self._crew.check_usable()
            if self._threads is None:
                self._threads = ThreadCrew(min(self._crew.workers, processors()))
            return self._threads

    def close(self) -> None:
        try:
            super().close()
        finally:
            with self._making:
                if self._threads is not None:
                    self._threads.close()


class Window(Generic[T]):
    """Work of an iterator, given out up to `size` pieces ahead, and its results in order."""

    def __init__(self, crew: Crew, work: Iterator[T], size: int, how: Literal["lend", "view"] = "lend") -> None:
        self._crew, self._size, self._how = crew, size, how
        self._work: Iterator[T] = work
        self._leases: deque[Any] = deque()
        self._seen: Any = None  # the lease whose result is in use as a view
        self._failure: BaseException | None = None
        self._ended = False
        self._fill()

    def _fill(self) -> None:
        while not self._ended and len(self._leases) < self._size:
            try:
                work = next(self._work)
            except StopIteration:
                self._ended = True
            except BaseException as error:  # noqa: BLE001 - raised when the results before it have been taken
                self._failure, self._ended = error, True
            else:
                self._leases.append(self._crew.submit(work))

    def take(self) -> Any:
        """The next result, or StopIteration. After an exception of one piece of work, the next call goes on."""
        if self._seen is not None:
            self._crew.release(self._seen)
            self._seen = None
        if not self._leases:
            failure, self._failure = self._failure, None
            raise StopIteration if failure is None else failure
        lease = self._leases[0]
        try:
            result = self._crew.result(lease, self._how)
        except KeyboardInterrupt:
            raise  # it was the waiting that was interrupted, not the work
        except BaseException:
            self._leases.popleft()
            self._fill()
            raise
        self._leases.popleft()
        if self._how == "view":
            self._seen = lease
        self._fill()
        return skips.detached(result)

    def close(self) -> None:
        """End the work that has been given out."""
        self._ended = True
        leases = [*self._leases] if self._seen is None else [*self._leases, self._seen]
        self._leases.clear()
        self._seen = self._failure = None
        self._crew.abandon(leases)


class WorkStream(Iterator[Any]):
    """The results of tasks that a pool does in parallel, in the order of the tasks.

    A task is a tuple ``(function,)``, ``(function, args)`` or ``(function, args, kwargs)``. Up to `task_buffer_size`
    tasks (at least 1) are under way or done and not yet taken. An exception in a task is raised where its result would
    have been given; the next call goes on with the task after it.
    """

    def __init__(
        self, worker_pool: AbstractWorkerPool, task_generator: Iterable[Any], task_buffer_size: int = 20
    ) -> None:
        if not isinstance(worker_pool, AbstractWorkerPool):
            raise TypeError(f"worker_pool must be a pool of workers, got a {type(worker_pool).__name__}.")
        size = at_least_one(task_buffer_size, "task_buffer_size")
        self._window = Window(worker_pool._crew, map(as_call, task_generator), size)

    def __next__(self) -> Any:
        return self._window.take()

    def retrieve(self) -> Any:
        """The next result; waits for it. None when there is none left (iterate, to tell that from a result None)."""
        return next(self, None)

    def retrieve_iter(self) -> Iterator[Any]:
        """An iterator over the results that are left: this stream itself."""
        return self

    def close(self) -> None:
        """End the work: tasks that have not begun do not begin."""
        self._window.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_window"):
            self._window.close()


class ParallelDataSource(AbstractDataSource):
    """The batches of a data source, prepared by the workers of a pool, in the source's own order.

    `ds`: a source with access by index (else TypeError). `batch_buffer_size`: how many batches are prepared ahead, at
    least 1. `pool`: one of the pools. `copy`: batches are arrays of your own, to write into and to keep;
    ``copy=False`` gives arrays that cannot be written and are valid until the next batch.

    The processes of a pool see the source as it is when :meth:`batch_iterator` is called.
    """

    def __init__(
        self, ds: AbstractDataSource, batch_buffer_size: int, pool: AbstractWorkerPool, *, copy: bool = True
    ) -> None:
        if not isinstance(pool, AbstractWorkerPool):
            raise TypeError(f"pool must be a pool of workers, got a {type(pool).__name__}.")
        if not isinstance(ds, AbstractDataSource):
            raise TypeError(f"ds must be a data source, got a {type(ds).__name__}; coerce_data_source() makes one.")
        need_random_access(ds)
        self.ds, self.pool, self.copy = ds, pool, copy
        self.batch_buffer_size = at_least_one(batch_buffer_size, "batch_buffer_size")
        self._shared: Any = None

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.ds.num_samples(**kwargs)

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        return self.ds.num_batches(batch_size, **kwargs)

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> ParallelIterator:
        """An iterator over the batches that ``ds.batch_iterator(batch_size, **kwargs)`` would give.

        The first batches are being prepared when this returns. ``copy`` goes before that of this source.
        """
        return self.resume(None, batch_size, **kwargs)

    def resume(
        self, state: dict[str, Any] | None, batch_size: int, most: int | None = None, **kwargs: Any
    ) -> ParallelIterator:
        """As :meth:`batch_iterator`, at once from a state on (None: from the beginning), without what comes before.

        `most`: no batch is prepared beyond this number, counted from the beginning.
        """
        how: Literal["lend", "view"] = "lend" if kwargs.pop("copy", self.copy) else "view"
        crew = self.pool._crew_for(self.ds)
        self._shared = crew.share(self.ds, self._shared)
        return ParallelIterator(self, crew, batch_size, kwargs, how, state, most)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> ParallelDataSource:
        """One part of every epoch, prepared by the same pool; see ``RandomAccessDataSource.shard``."""
        part = self.ds.shard(rank, world_size, drop_last, pad)  # type: ignore[attr-defined]
        return ParallelDataSource(part, self.batch_buffer_size, self.pool, copy=self.copy)


class Drawing:
    """The index batches of an iterator, drawn as work for a crew. It knows nothing of the iterator, which so ends with
    the last reference to it.

    `groups`: how many batches are gathered together, first and from then on; the last of them for all that follow.
    """

    def __init__(
        self, indices: Any, number: int, batch_size: int, groups: Sequence[int], most: int | None = None
    ) -> None:
        self.indices, self._drawn, self._most = indices, number, most
        self._batch_size, self._groups = batch_size, groups
        #: Of the groups under way: the numbers of samples; None where the batch is given as it comes.
        self.sizes: deque[list[int] | None] = deque()
        #: Number of a batch, and the state of the indices before it.
        self.anchors: deque[tuple[int, Any]] = deque()

    def calls(self, shared: Any, stream: tuple[int, int], empty: Any) -> Iterator[BatchCall]:
        """The work, in order."""
        failure: BaseException | None = None
        for wanted in chain(self._groups, repeat(self._groups[-1])):
            number, sizes = self._drawn, None
            joined = self._cut(wanted) if wanted > 1 else None
            if joined is not None:
                sizes = [self._batch_size] * (len(joined) // self._batch_size)
            else:
                indices: list[Any] = []
                try:
                    while len(indices) < wanted:
                        indices.append(self._draw())
                except BaseException as error:  # noqa: BLE001 - raised behind what was drawn before
                    failure = error
                if indices:
                    joined = indices[0] if len(indices) == 1 else np.concatenate(indices)
                    sizes = None if wanted == 1 else [len(part) for part in indices]
            if joined is not None:
                self.sizes.append(sizes)
                yield BatchCall(shared, joined, (*stream, number), empty)
            if failure is not None:
                break
        if failure is not None and not isinstance(failure, StopIteration):
            raise failure

    def _cut(self, wanted: int) -> np.ndarray | None:
        """The indices of up to so many batches at once, where they lie one behind the other."""
        if not isinstance(self.indices, IndexIterator):
            return None
        self._note()
        run = self.indices.whole_batches()
        if run is None:
            return None
        most = wanted if self._most is None else min(wanted, self._most - self._drawn)
        stop = min(run.stop, run.start + most * self._batch_size)
        if stop <= run.start:
            return None
        self.indices.move_to(stop)
        self._drawn += (stop - run.start) // self._batch_size
        return np.arange(run.start, stop) if run.order is None else run.order[run.start : stop].copy()

    def _note(self) -> None:
        """Note the place, if it is time."""
        if not self.anchors or self._drawn - self.anchors[-1][0] >= ANCHOR_EVERY:
            save = getattr(self.indices, "state_dict", None)
            self.anchors.append((self._drawn, None if save is None else quiet_state(save)))

    def _draw(self) -> Any:
        self._note()
        if self._drawn == self._most:
            raise StopIteration
        index_batch = next(self.indices)
        self._drawn += 1
        return index_batch


class ParallelIterator(BatchIterator):
    """The iterator of a :class:`ParallelDataSource`.

    Its states are those of the source's own iterator, so either can be resumed from the other's. After an exception in
    one batch, ``next`` goes on with the batch after it. Closed or dropped, its work ends.
    """

    def __init__(
        self,
        source: ParallelDataSource,
        crew: Crew,
        batch_size: int,
        kwargs: dict[str, Any],
        how: Literal["lend", "view"],
        state: dict[str, Any] | None = None,
        most: int | None = None,
    ) -> None:
        self._source, self._crew, self._batch_size, self._kwargs = source, crew, batch_size, kwargs
        self._how, self._most = how, most
        self._shared = source._shared
        self._shuffle = as_shuffle(kwargs.get("shuffle"))
        self._stream = noise_entropy(self._shuffle), int(kwargs.get("epoch", 0))
        self._closed = False
        if state is None:
            self._start(self._make_indices(), 0)
        else:
            self._start_from(state)

    @property
    def given(self) -> int:
        """How many batches lie behind: those that were given, left out, or raised."""
        return self._given

    def _make_indices(self) -> Any:
        return self._source.ds.batch_indices_iterator(self._batch_size, **self._kwargs)  # type: ignore[attr-defined]

    def _start(self, indices: Any, number: int) -> None:
        self._given = number
        self._parts: deque[Any] = deque()  # batches of a group that are to be given
        crew, ahead = self._crew, self._source.batch_buffer_size
        groups = group_sizes(self._source.ds, self._batch_size, crew, ahead)
        self._drawing = Drawing(indices, number, self._batch_size, groups, self._most)
        calls = self._drawing.calls(self._shared, self._stream, crew.empty)
        # What is given out at a time is small, but each worker needs some of it and something to go on with.
        size = max(ahead // groups[-1], 2 * crew.workers) if groups[-1] > 1 else ahead
        self._window = Window(crew, calls, size, self._how)

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        while not self._parts:
            try:
                self._parts.extend(self._take())
            except BatchSkipped:
                continue  # it has been told of, and counts as given
        self._given += 1
        return self._parts.popleft()

    def _take(self) -> list[Any]:
        try:
            batch = self._window.take()
        except (StopIteration, KeyboardInterrupt):
            raise
        except BaseException:
            if self._drawing.sizes:  # else it was the indices that could not be drawn
                sizes = self._drawing.sizes.popleft()
                self._given += 1 if sizes is None else len(sizes)
            raise
        sizes = self._drawing.sizes.popleft()
        return [batch] if sizes is None else part_batch(batch, sizes)

    def state_dict(self) -> dict[str, Any]:
        return self.state_at(self._given)

    def state_at(self, given: int) -> dict[str, Any]:
        """The place behind so many batches: not before that of the last state that was asked for."""
        anchors = self._drawing.anchors
        while len(anchors) > 1 and anchors[1][0] <= given:
            anchors.popleft()
        number, anchor = anchors[0]
        if anchor is None:
            state_of(self._drawing.indices)  # raises, saying what is missing
        state = self._state_after(anchor, given - number)
        return {**state, "pool": {"stream": list(self._stream), "number": given}}

    def _state_after(self, anchor: Any, skipped: int) -> dict[str, Any]:
        """The state of the indices so many batches behind an anchor: drawn again, with the generator put back after."""
        before = None if self._shuffle is None else self._shuffle.get_state()
        try:
            indices = self._make_indices()
            indices.load_state_dict(anchor)
            for _ in range(skipped):
                next(indices)
            state: dict[str, Any] = indices.state_dict()
            return state
        finally:
            if self._shuffle is not None:
                self._shuffle.set_state(before)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_from(state)

    def _start_from(self, state: dict[str, Any]) -> None:
        indices = self._make_indices()
        indices.load_state_dict({name: value for name, value in state.items() if name != "pool"})
        if hasattr(self, "_window"):
            self._window.close()
        own = state.get("pool")
        if own is not None:
            self._stream = own["stream"][0], own["stream"][1]
        self._start(indices, 0 if own is None else own["number"])

    def close(self) -> None:
        """End the iteration, and the work for it: batches that have not been begun are not begun."""
        self._closed = True
        self._window.close()

    def __del__(self) -> None:
        if hasattr(self, "_window"):
            self._window.close()


def group_sizes(ds: AbstractDataSource, batch_size: int, crew: Crew, ahead: int) -> list[int]:
    """How many batches of a source are best gathered at once, first and from then on: several where they are small and
    nothing else is done."""
    if not is_pure(ds):
        return [1]
    arrays = ds.data.values() if isinstance(ds.data, Mapping) else ds.data  # type: ignore[attr-defined]
    batch_bytes = max(1, sum(array.nbytes // max(1, len(array)) for array in arrays) * batch_size)
    if isinstance(crew, ThreadCrew):
        # Threads wait for each other each time one of them begins or ends something, so it should take a while. The
        # first batches come one by one, to be there soon.
        size = min(THREAD_GROUP_BYTES // batch_bytes, MOST_GROUPED)
        return [1 << step for step in range(size.bit_length() - 1)] + [max(1, size)]
    return [max(1, min(ahead // (2 * crew.workers), ACTOR_GROUP_BYTES // batch_bytes))]


def takes_rows(ds: AbstractDataSource) -> bool:
    """Whether a source only takes rows of numpy arrays, or is made of such."""
    if type(ds) in (CompositeDataSource, ChoiceDataSource):
        return all(map(takes_rows, ds.datasets))  # type: ignore[attr-defined]
    return is_pure(ds)


def part_batch(batch: Any, sizes: list[int]) -> list[Any]:
    """The batches of these numbers of samples that were gathered as one tuple or dict of arrays."""
    ends = list(accumulate(sizes))
    spans = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    if isinstance(batch, dict):
        return [{name: array[span] for name, array in batch.items()} for span in spans]
    return [tuple([array[span] for array in batch]) for span in spans]


def quiet_state(save: Callable[[], Any]) -> Any:
    """A state, or None where there is none to save, which matters only if one is asked for."""
    try:
        return save()
    except Exception:  # noqa: BLE001 - asked for again, and raised, by state_dict()
        return None


def as_call(task: Any) -> Call:
    """The work of a task tuple."""
    if not isinstance(task, tuple | list) or not 1 <= len(task) <= 3 or not callable(task[0]):
        raise TypeError(
            f"a task is a tuple (function,), (function, args) or (function, args, kwargs); got {task!r:.200}."
        )
    return Call(*task)
