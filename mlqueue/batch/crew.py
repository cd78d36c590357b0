"""Crews: the workers of a pool, and how work reaches them. The crew of threads is here.

A crew takes work (:class:`Call` or :class:`BatchCall`), gives a lease for each piece at once, and its result when
asked. It knows nothing of order; that is the business of :mod:`mlqueue.batch.work_pool`.
"""

from __future__ import annotations

import os
import pickle
import queue
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from mlqueue.batch import gathering
from mlqueue.batch import pool_worker as worker
from mlqueue.batch.iteration import ChoiceBatch, SeededBatch
from mlqueue.batch.pickling import pickle_code
from mlqueue.batch.transport import Empty, Recycler, with_arrays

__all__ = ["BatchCall", "Call", "Crew", "How", "ThreadCrew", "Work", "closed_error"]

How = Literal["lend", "copy", "view"]

#: About how many bytes a crew of threads keeps, between passes, of what its batches took.
MOST_IDLE = 1 << 28


class Call:
    """A function to be called by a worker."""

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None):
        self.function, self.args, self.kwargs = function, args, kwargs or {}

    def run(self) -> Any:
        """Do it here."""
        return self.function(*self.args, **self.kwargs)

    def encode(self) -> bytes:
        """The request to a worker process."""
        return pickle_code(("call", self.function, self.args, self.kwargs), whole=True)[0]

    def __str__(self) -> str:
        return f"the task {getattr(self.function, '__qualname__', self.function)!s}"


class BatchCall:
    """A batch to be prepared by a worker: the samples of `source` that `index_batch` names.

    `source` is a data source, or a :class:`SharedConstant` of one. `key` is what the worker's global random generators
    are seeded from; its last part is the number of the batch. `empty` makes the arrays where a thread prepares it.
    """

    __slots__ = ("empty", "index_batch", "key", "source")

    def __init__(self, source: Any, index_batch: Any, key: worker.Key, empty: Empty = np.empty) -> None:
        self.source, self.index_batch, self.key, self.empty = source, index_batch, key, empty

    def run(self) -> Any:
        """Do it here."""
        return worker.gather(self.source, self.index_batch, self.empty)

    def encode(self) -> bytes:
        """The request to a worker process."""
        index = self.index_batch
        if type(index) is np.ndarray and index.dtype.kind in "iu" and index.ndim == 1:
            # What most are; to pickle the array takes five times as long.
            return pickle.dumps(("rows", self.source.number, index.dtype.str, index.tobytes(), self.key), 5)
        request = ("batch", self.source.number, self.index_batch, self.key)
        return pickle.dumps(request, 5) if is_plain(self.index_batch) else pickle_code(request, whole=True)[0]

    def __str__(self) -> str:
        return f"batch {self.key[2]} (sample indices {shown(self.index_batch)})"


def shown(index_batch: Any) -> str:
    """The indices of the first source in an index batch, to be read. Of an index batch of the user's own, whatever can
    be said: this describes errors, and must not raise another."""
    while True:
        if isinstance(index_batch, ChoiceBatch | SeededBatch):
            index_batch = index_batch.sample_indices
        elif isinstance(index_batch, tuple | list) and index_batch and not isinstance(index_batch[0], int | np.integer):
            index_batch = index_batch[0]
        else:
            break
    try:
        return np.array2string(np.asarray(index_batch), threshold=16)
    except Exception:  # noqa: BLE001 - it may be anything
        return f"in a {type(index_batch).__name__}"


def is_plain(index_batch: Any) -> bool:
    """Whether every worker can unpickle it: there is nothing of the user's own in it."""
    kind = type(index_batch)
    if kind in (tuple, list, ChoiceBatch, SeededBatch):
        return all(is_plain(part) for part in index_batch)
    return kind in (np.ndarray, int) and not getattr(index_batch, "dtype", np.dtype(int)).hasobject


Work = Call | BatchCall


class Crew(ABC):
    """Workers of one kind."""

    def __init__(self, workers: int) -> None:
        #: How many there are.
        self.workers = workers

    @property
    def empty(self) -> Empty:
        """What makes the arrays of batches where the workers share the memory of this process."""
        return np.empty

    @abstractmethod
    def share(self, value: Any, earlier: Any = None) -> Any:
        """The value as it has to be named in work, so that it is sent to each worker once.

        `earlier`: what this gave before; given again as long as it is still equal to the value.
        """

    @abstractmethod
    def submit(self, work: Work) -> Any:
        """Give out work; gives the lease."""

    @abstractmethod
    def result(self, lease: Any, how: How = "lend") -> Any:
        """Wait for the work and give its result, or raise what it raised; once for each lease.

        `how`: see :class:`~mlqueue.batch.transport.SlotArena`; after "view" the caller says `release`.
        """

    @abstractmethod
    def release(self, lease: Any) -> None:
        """Let go of a result that was taken as a view."""

    @abstractmethod
    def abandon(self, leases: Iterable[Any]) -> None:
        """End work whose results nobody waits for: what has not begun does not begin. Takes no lock."""

    @abstractmethod
    def close(self) -> None:
        """End all work and all workers. Work that is given out later raises RuntimeError."""


class ThreadLease:
    """Work given out to a thread."""

    __slots__ = ("cancelled", "error", "ready", "value", "work")

    def __init__(self, work: Work) -> None:
        self.work: Work | None = work
        self.cancelled = False
        self.value: Any = None
        self.error: BaseException | None = None
        self.ready = threading.Lock()
        self.ready.acquire()


Inbox = queue.SimpleQueue["ThreadLease | None"]


class ThreadCrew(Crew):
    """Threads of this process. Results are handed over as they are."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self._recycler = Recycler(MOST_IDLE)
        self._inbox: Inbox = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work_in_thread, args=(self._inbox,), name=f"mlqueue-batch-{n}", daemon=True)
            for n in range(threads)
        ]
        for thread in self._threads:
            thread.start()
        self._closed, self._pid = threading.Event(), os.getpid()
        self._stop = weakref.finalize(self, _stop_threads, self._inbox, threads)

    @property
    def empty(self) -> Empty:
        return self._recycler.empty

    def share(self, value: Any, earlier: Any = None) -> Any:
        return value

    def submit(self, work: Work) -> ThreadLease:
        if self._closed.is_set():
            raise closed_error()
        check_owner(self._pid, "threads")
        lease = ThreadLease(work)
        self._inbox.put(lease)
        if self._closed.is_set():  # meanwhile, by another thread
            self._call_off()
        return lease

    def result(self, lease: ThreadLease, how: How = "lend") -> Any:
        check_owner(self._pid, "threads")
        with lease.ready:  # which KeyboardInterrupt does not leave taken
            pass
        if lease.error is not None:
            raise lease.error
        return with_arrays(lease.value, read_only) if how == "view" else lease.value

    def release(self, lease: ThreadLease) -> None:
        pass

    def abandon(self, leases: Iterable[ThreadLease]) -> None:
        for lease in leases:
            lease.cancelled = True

    def _call_off(self) -> None:
        """Answer what has not begun."""
        ends = 0
        while True:
            try:
                lease = self._inbox.get_nowait()
            except queue.Empty:
                break
            if lease is None:
                ends += 1
            else:
                lease.error = closed_error()
                lease.ready.release()
        _stop_threads(self._inbox, ends)

    def close(self) -> None:
        self._closed.set()
        self._call_off()
        self._stop()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()


def _work_in_thread(inbox: Inbox) -> None:
    with gathering.without_help():
        _work_alone(inbox)


def _work_alone(inbox: Inbox) -> None:
    while (lease := inbox.get()) is not None:
        work, lease.work = lease.work, None
        if not lease.cancelled and work is not None:
            try:
                lease.value = work.run()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is asked for
                lease.error = error
                error.add_note(f"Raised in a worker thread by {work}.")
        lease.ready.release()
        del lease, work


def _stop_threads(inbox: Inbox, threads: int) -> None:
    for _ in range(threads):
        inbox.put(None)


def read_only(array: np.ndarray) -> np.ndarray:
    """A view that cannot be written."""
    view = array.view()
    view.flags.writeable = False
    return view


def check_owner(pid: int, kind: str) -> None:
    """Raise RuntimeError in a process that a pool was not made in."""
    if os.getpid() != pid:
        raise RuntimeError(f"a pool of {kind} belongs to the process that made it; make one after the fork.")


def closed_error() -> RuntimeError:
    """What using a closed pool raises."""
    return RuntimeError("the pool is closed; make a new one, or leave its `with` block later.")
