"""Large copies of rows by several threads.

While an iterator makes a batch, whoever asked for the batch waits for it, and other processors may have nothing to do.
Where the rows of a batch are many bytes, a helping thread (or more) therefore copies some of them, part by part. The
thread that asked copies its own and then takes what parts there are left: of a helper that gets no processor it takes
all, so nobody waits for that one. Whether that is faster depends on the machine and on what else it does; a
:class:`Pace` finds out from time to time, and does what was.

Helpers are threads of the process that are made when they are first needed and end with it. Where threads or processes
prepare batches beside the one that trains (pools, ``prefetch``) there are none: see :func:`without_help`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from functools import lru_cache

from mlqueue.errors import SettingsError

__all__ = ["Pace", "pace_of", "processors", "set_threads", "shared", "threads", "without_help"]

#: The setting.
VARIABLE = "MLQUEUE_GATHER_THREADS"
#: So many threads may be asked for, and so many are used where nothing is said and there are as many processors.
MOST_THREADS, USUAL_THREADS = 64, 2
#: Copies of fewer bytes are hardly faster with help: it has to be woken, and waited for.
SHARED_BYTES = 1 << 20
#: Each helper's part is cut into so many. Who asked copies its own at once: each time two threads want Python's global
#: lock, one of them waits, and longer than it takes to copy a hundred kilobytes.
PARTS = 2
#: It has so many bytes more to copy than a helper, who has to be woken first.
HEAD_START = 3 << 16
#: Of so many copies the first ones are made both ways in turn, so often each, to see which takes less time.
PERIOD, TRIALS = 512, 5
#: Help has to take at most this part of the time: it takes that of a second processor, which others may need.
GAIN = 0.9

#: Copies the rows from a first one up to a last one, which is not copied.
Copy = Callable[[int, int], None]

_chosen: int | None = None
_own = threading.local()


def threads() -> int:
    """How many threads copy the rows of one large batch: what :func:`set_threads` said, else MLQUEUE_GATHER_THREADS,
    else two, if this process may use two processors. Raises SettingsError for a value that is not allowed."""
    if _chosen is not None:
        return _chosen
    text = os.environ.get(VARIABLE, "").strip()
    if not text:
        return min(USUAL_THREADS, processors())
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_THREADS):
        raise SettingsError(f"{VARIABLE} is {text!r}; allowed are whole numbers from 1 to {MOST_THREADS}.")
    return int(text)


def set_threads(number: int | None) -> None:
    """Say how many threads copy the rows of one large batch, from the next iterator on: 1 to 64.

    1 does without help, and ends the helping threads. None goes back to what the environment says.
    """
    global _chosen
    if number is not None:
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"number must be an int or None, got {number!r}.")
        if not 1 <= number <= MOST_THREADS:
            raise ValueError(f"number must be from 1 to {MOST_THREADS}, got {number}.")
    _chosen = number
    _team.shrink(threads() - 1)


def processors() -> int:
    """How many processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # type: ignore[unreachable,unused-ignore]


@contextlib.contextmanager
def without_help() -> Iterator[None]:
    """Meanwhile this thread copies by itself: it is one of several that prepare batches, or nobody waits for it."""
    before, _own.alone = getattr(_own, "alone", False), True
    try:
        yield
    finally:
        _own.alone = before


class Shared:
    """A copy of so many rows: those up to `own` by who asked for it, the rest in steps by whoever takes them."""

    __slots__ = ("_copy", "_done", "_left", "_length", "_own", "_step")

    def __init__(self, copy: Copy, length: int, own: int, step: int) -> None:
        self._copy: Copy | None = copy
        self._length, self._own, self._step = length, own, step
        self._left = deque(range(own, length, step))
        # What helpers have done: None, or what was raised.
        self._done: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def make(self, helpers: int) -> None:
        """Make the copy with so many helpers, and return when all of it has been made. Raises what a part raised."""
        left, count, mine = self._left, len(self._left), 0
        _team.ask(self, helpers)
        try:
            self._copy(0, self._own)  # type: ignore[misc]
            while self._take():
                mine += 1
            outcomes = [self._done.get() for _ in range(count - mine)]
        except BaseException:
            left.clear()  # what helpers are at, they end: they keep alive what they write to
            _team.forget(self)
            raise
        self._copy = None  # a helper that comes too late keeps nothing alive
        for failure in outcomes:
            if failure is not None:
                raise failure

    def _take(self) -> bool:
        """Copy the next part; whether there was one."""
        try:
            start = self._left.popleft()
        except IndexError:
            return False
        # Who has taken a part finds the copy there, since it has not been made.
        self._copy(start, min(start + self._step, self._length))  # type: ignore[misc]
        return True

    def help(self) -> None:
        """Take parts as long as there are some."""
        taken = True
        while taken:
            try:
                taken = self._take()
            except BaseException as error:  # noqa: BLE001 - it is raised where the rest is copied
                self._done.put(error)
            else:
                if taken:
                    self._done.put(None)


class Team:
    """The helping threads of a process."""

    def __init__(self) -> None:
        #: What there is to help with. Only the last, so that who comes too late for one is in time for the next.
        self.task: Shared | None = None
        self._calls: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whether to look at the task, or to end
        self._size = 0
        self._changing = threading.RLock()

    def ask(self, shared: Shared, helpers: int) -> None:
        """Have up to so many helpers look at a copy; those that have not answered the last call will."""
        if self._size < helpers:
            self._grow(helpers)
        self.task = shared
        for _ in range(min(helpers, self._size) - self._calls.qsize()):
            self._calls.put(True)

    def forget(self, shared: Shared) -> None:
        """There is nothing to help with."""
        if self.task is shared:
            self.task = None

    def _grow(self, size: int) -> None:
        with self._changing:
            while self._size < size:
                thread = threading.Thread(target=self._help, name="mlqueue-gather", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # no more threads are to be had, or the program is ending: it works without
                self._size += 1

    def shrink(self, size: int) -> None:
        """End helpers until there are no more than so many."""
        with self._changing:
            while self._size > size:
                self._size -= 1
                self._calls.put(False)

    def _help(self) -> None:
        while self._calls.get():
            task = self.task
            if task is not None:
                task.help()
            del task


_team = Team()


def _begin_anew() -> None:
    """In a forked process, where no thread but the forking one is left."""
    global _team
    _team = Team()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def shared(copy: Copy, length: int, nbytes: int, helpers: int) -> None:
    """Copy `length` rows, of `nbytes` bytes together, with up to so many helpers; raises what ``copy`` raises.

    After an exception of the thread that asked (KeyboardInterrupt, say) a helper may still write: give the memory to
    nobody else as long as something holds `copy`.
    """
    own = length // (helpers + 1) + HEAD_START * length // max(1, nbytes)
    own = min(own, length - 1)
    Shared(copy, length, own, -(-(length - own) // (helpers * PARTS))).make(helpers)


class Pace:
    """How copies of one size are made fastest, alone or with help: of :data:`PERIOD` copies the first few are timed."""

    def __init__(self, nbytes: int, helpers: int) -> None:
        self._nbytes, self._helpers = nbytes, helpers
        #: Whether the last trial was for help.
        self.helped = False
        self._number = 0
        self._took: tuple[list[float], list[float]] = [], []

    def __call__(self, copy: Copy, length: int) -> None:
        """Copy `length` rows, all of those that a batch has."""
        number = self._number
        self._number = (number + 1) % PERIOD
        if number < 2 * TRIALS:
            self._try(number, copy, length)
        elif self.helped:
            shared(copy, length, self._nbytes, self._helpers)
        else:
            copy(0, length)

    def _try(self, number: int, copy: Copy, length: int) -> None:
        if number == 0:
            self._took = [], []
        begun = time.perf_counter()
        if number % 2:
            shared(copy, length, self._nbytes, self._helpers)
        else:
            copy(0, length)
        self._took[number % 2].append(time.perf_counter() - begun)
        if number == 2 * TRIALS - 1:
            alone, helped = self._took
            # Where several threads iterate at once some may be missing.
            self.helped = bool(alone and helped) and _middle(helped) < GAIN * _middle(alone)


def _middle(times: list[float]) -> float:
    return sorted(times)[len(times) // 2]


@lru_cache(64)
def _pace(kind: str, nbytes: int, helpers: int) -> Pace:
    """One for all iterators over batches of one size, so that each of them need not find out again."""
    return Pace(nbytes, helpers)


def pace_of(kind: str, nbytes: int) -> Pace | None:
    """How this thread makes copies of a kind (a name) and size; None where it makes them alone."""
    if nbytes < SHARED_BYTES or getattr(_own, "alone", False):
        return None
    number = threads()
    return None if number == 1 else _pace(kind, nbytes, number - 1)
