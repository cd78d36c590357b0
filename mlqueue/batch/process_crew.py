"""The crew of a pool of processes; :mod:`mlqueue.batch.pool_worker` is what runs in them.

A process that dies is replaced. The lease it had marked as its own is given out again, and so are those that nobody had
marked, since it may have held one of them; a slot that somebody may still read about in the pipe is called off and
used again only when it has been answered. So each result is taken once, whoever prepares it and however often.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing.spawn
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import numpy as np

from mlqueue.batch import pool_worker as worker
from mlqueue.batch.crew import BatchCall, Crew, How, Work, check_owner, closed_error
from mlqueue.batch.errors import BatchError
from mlqueue.batch.pickling import pickle_code
from mlqueue.batch.transport import HEADER_BYTES, Segment, SlotArena, SlotWriter, send_record

__all__ = ["ProcessCrew", "SharedConstant", "WorkerDied", "WorkerError"]

#: How often a batch is tried whose worker process dies.
MOST_TRIES = 3
#: How many slots workers read about, or fill, at most; further work waits.
MOST_SLOTS = 64
#: While more slots than this are in use, results are copied out of theirs as they come. Each takes two descriptors.
CROWDED = 96
#: How many worker processes in a row may end before they have begun.
MOST_FALSE_STARTS = 3


class WorkerError(BatchError):
    """A worker process raised an exception that cannot be brought here; its class and text are in the message."""


class WorkerDied(BatchError):
    """A worker process died."""


class SharedConstant:
    """A value that every worker process of a pool makes once, from memory that they share.

    Given among the arguments of a task it arrives there as the value. numpy arrays in it are not copied for each
    worker. What the value was when this was made is what workers see.
    """

    def __init__(self, number: int, pickled: bytes, buffers: list[Any], owner: object = None) -> None:
        self.number = number
        self._pickled, self._owner = pickled, owner
        self.segment = Segment.create()
        writer = SlotWriter(self.segment)
        paths = [path for path in sys.path if isinstance(path, str)]
        #: Place and length of the description in the segment.
        self.place, self.length = writer.write_pickle(pickle.dumps((paths, pickled)), buffers)
        self._places = writer.last_places

    def holds(self, pickled: bytes, buffers: list[Any]) -> bool:
        """Whether this is the value of that pickle and those buffers."""
        if pickled != self._pickled or len(buffers) != len(self._places):
            return False
        whole = self.segment.as_bytes()
        return all(
            memoryview(buffer).nbytes == size
            and same_bytes(np.frombuffer(buffer, np.uint8), whole[place : place + size])
            for buffer, (place, size) in zip(buffers, self._places, strict=True)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        asking = getattr(_sending, "owner", None)
        if asking is not None and asking is not self._owner:  # whose workers would wait for it, and for ever
            raise RuntimeError(
                "a shared constant can be used in the tasks of its own pool only; pass the value itself, or what "
                "shared_constant() of this pool gives."
            )
        return worker.constant, (self.number,)


#: `owner`: for whose workers this thread pickles something.
_sending = threading.local()


@contextlib.contextmanager
def sending_for(owner: object) -> Iterator[None]:
    """Meanwhile this thread pickles for the workers of this owner."""
    before, _sending.owner = getattr(_sending, "owner", None), owner
    try:
        yield
    finally:
        _sending.owner = before


def same_bytes(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two uint8 arrays of one length are equal; without temporary memory of their size."""
    words = len(a) // 8 * 8
    a64, b64 = a[:words].view(np.uint64), b[:words].view(np.uint64)
    step = 32768  # 256 kB, which stay in the cache
    return all(
        np.array_equal(a64[start : start + step], b64[start : start + step]) for start in range(0, len(a64), step)
    ) and np.array_equal(a[words:], b[words:])


class Lease:
    """A piece of work that has been given out."""

    __slots__ = ("copied", "done", "error", "filled", "here", "number", "request", "slots", "tries", "value", "work")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.done = False
        self.here = False  # whether it is done by whoever asks for the result
        self.error: BaseException | None = None
        self.value: Any = None  # where it was copied early
        self.copied = False
        self.number = 0
        self.request = b""
        self.slots: set[int] = set()  # those that name it
        self.filled: tuple[int, int, int, bool] | None = None  # slot, place, length, whether it failed
        self.tries = 0


class WorkerHandle:
    """The owner's side of one worker process."""

    def __init__(self, serial: int, leases: int, env: dict[str, str]) -> None:
        self.serial = serial
        self.began = False
        #: The place, in the order of all that was given out, of the last that it has answered.
        self.reached = 0
        self.setup, theirs = socket.socketpair()
        self.results, results = os.pipe()
        paths, path_writer = os.pipe()
        fds = (theirs.fileno(), leases, results)
        command = [multiprocessing.spawn.get_executable(), "-P", "-c", worker.BOOTSTRAP]
        try:
            self.process = subprocess.Popen(
                [*map(os.fsdecode, command), *map(str, (*fds, serial, paths))],
                stdin=subprocess.DEVNULL,
                pass_fds=(*fds, paths),
                env=env,
            )
        finally:
            theirs.close()
            os.close(results)
            os.close(paths)
        try:
            with os.fdopen(path_writer, "w", encoding="utf-8") as pipe:
                json.dump([[os.path.abspath(path) for path in sys.path if isinstance(path, str)], sys.argv], pipe)  # noqa: PTH100
        except BrokenPipeError:
            pass  # it has died, which is seen where results are read

    def tell(self, kind: int, number: int, place: int = 0, length: int = 0, fd: int | None = None) -> None:
        """Send a setup record."""
        try:
            send_record(self.setup, worker.SETUP.pack(kind, number, place, length), fd)
        except OSError:
            pass  # it has died, which is seen where results are read

    def end(self) -> None:
        """End the process, if it has not ended, and close the connections to it."""
        self.setup.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(1)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        os.close(self.results)


class ProcessCrew(Crew):
    """Processes started afresh (never forked), which import nothing of the main script.

    `help_while_starting`: as long as none has begun, whoever asks for a batch prepares it.
    """

    def __init__(self, processes: int, help_while_starting: bool = False) -> None:
        super().__init__(processes)
        self._helping = help_while_starting
        self._known: dict[int, Any] = {}  # values of shared constants, while this process helps
        self._pid, self._owner = os.getpid(), object()
        self._numbers = itertools.count(1)  # of leases
        self._serials = itertools.count(1)  # of workers
        self._constant_numbers = itertools.count(1)
        self._turn = threading.Condition(threading.RLock())
        self._reading = False  # whether a thread waits for results, for itself and the others
        self._leases: dict[int, Lease] = {}  # given out, and not ended
        # Slots that a worker has read about or will: the lease, and which in the order of all that was given out.
        self._in_slot: dict[int, tuple[int, int]] = {}
        self._suspects: set[int] = set()  # those of them that a worker may have read about before it died
        self._orders = itertools.count(1)
        self._waiting: deque[Lease] = deque()  # for a slot
        self._constants: weakref.WeakValueDictionary[int, SharedConstant] = weakref.WeakValueDictionary()
        self._abandoned: deque[Lease] = deque()  # filled where no lock can be taken
        self._forgotten: deque[int] = deque()  # the same
        self._false_starts = 0
        self._poll = select.poll()
        self._lease_reader, self._lease_writer = os.pipe()
        self._workers: dict[int, WorkerHandle] = {}
        self._arena = SlotArena(partial(_announce, self._workers))  # without self, which would then never be dropped
        self._stop = weakref.finalize(
            self, _stop_processes, self._pid, self._workers, self._arena, (self._lease_reader, self._lease_writer)
        )
        for _ in range(processes):
            self._start_worker()

    # --- workers ---

    def _start_worker(self) -> None:
        env = dict(os.environ)
        threads = str(max(1, (os.cpu_count() or 1) // self.workers))
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS"):
            env.setdefault(name, threads)  # else every worker would start a thread for each processor
        handle = WorkerHandle(next(self._serials), self._lease_reader, env)
        for number, segment in self._arena.slots.items():
            handle.tell(worker.SLOT, number, fd=segment.fd)
        for constant in list(self._constants.values()):
            self._tell_constant(handle, constant)
        self._workers[handle.results] = handle
        self._poll.register(handle.results, select.POLLIN)

    @staticmethod
    def _tell_constant(handle: WorkerHandle, constant: SharedConstant) -> None:
        handle.tell(worker.CONSTANT, constant.number, constant.place, constant.length, constant.segment.fd)

    def _replace(self, dead: WorkerHandle) -> None:
        """Put a new process in the place of a dead one, and give out again what it may have held."""
        self._end_help()  # what has ended that one may end this one
        self._poll.unregister(dead.results)
        del self._workers[dead.results]
        dead.end()
        cause = describe_exit(dead.process.returncode)
        self._false_starts = 0 if dead.began else self._false_starts + 1
        again = self._lost_to(dead, cause)
        if self._false_starts >= MOST_FALSE_STARTS:
            for lease in list(self._leases.values()):
                self._fail(lease, f"no worker process can begin: the last one {cause} before it had, see stderr.")
            self._false_starts = 0
            return
        self._start_worker()
        for lease in again:
            self._issue(lease)

    def _lost_to(self, dead: WorkerHandle, cause: str) -> list[Lease]:
        """The leases that have to be given out again, those that the dead worker had marked first."""
        marked, unmarked = [], []
        for slot, (number, _) in sorted(self._in_slot.items(), key=lambda item: item[1]):
            segment, lease = self._arena.slots[slot], self._leases.get(number)
            claimed = segment.word(worker.CLAIMED)
            if claimed == dead.serial:
                self._answered(slot)
                self._arena.release(slot)
                if lease is None:
                    continue
                lease.slots.discard(slot)
                lease.tries += 1
                if lease.tries < MOST_TRIES:
                    marked.append(lease)
                else:
                    self._fail(lease, f"{lease.work} ended its worker process {lease.tries} times: it {cause}.")
            elif claimed == 0:
                self._suspects.add(slot)
                if segment.word(worker.EXPECTED) == number and lease is not None:
                    segment.set_word(worker.EXPECTED, 0)
                    unmarked.append(lease)
        return marked + unmarked

    def _fail(self, lease: Lease, reason: str) -> None:
        if signal.SIGKILL.name in reason:
            reason += " That is most often for want of memory: use fewer processes, or smaller batches."
        lease.error = WorkerDied(reason)
        self._call_off(lease)
        lease.done = True

    # --- work ---

    def share(self, value: Any, earlier: Any = None) -> SharedConstant:
        self.check_usable()
        with sending_for(self._owner):
            pickled, buffers = pickle_code(value)
        if isinstance(earlier, SharedConstant) and earlier.holds(pickled, buffers):
            return earlier
        constant = SharedConstant(next(self._constant_numbers), pickled, buffers, self._owner)
        with self._turn:
            self._constants[constant.number] = constant
            for handle in self._workers.values():
                self._tell_constant(handle, constant)
        weakref.finalize(constant, self._forgotten.append, constant.number).atexit = False
        return constant

    def submit(self, work: Work) -> Lease:
        self.check_usable()
        lease = Lease(work)
        with sending_for(self._owner):
            lease.request = work.encode()
        with self._turn:
            self._sweep()
            while len(self._workers) < self.workers:  # after false starts
                self._start_worker()
            lease.number = next(self._numbers)
            self._leases[lease.number] = lease
            if self._arena.free == 0 and not self._reading:
                self._read_results(0)
            if len(self._in_slot) < MOST_SLOTS and not self._waiting:
                self._issue(lease)
            else:
                self._waiting.append(lease)
        return lease

    def _issue(self, lease: Lease) -> None:
        slot, segment = self._arena.take()
        end = HEADER_BYTES + len(lease.request)
        segment.grow(end)
        segment.memory[HEADER_BYTES:end] = lease.request
        segment.set_word(worker.CLAIMED, 0)
        segment.set_word(worker.EXPECTED, lease.number)
        lease.slots.add(slot)
        self._in_slot[slot] = lease.number, next(self._orders)
        os.write(self._lease_writer, worker.LEASE.pack(lease.number, slot, len(lease.request)))

    def result(self, lease: Lease, how: How = "lend") -> Any:
        with self._turn:
            if not lease.done:
                self.check_usable()  # before anything is read: what a forked process reads its owner does not get
                if lease.here or (self._helping and self._may_help(lease)):
                    self._do_here(lease)
                self._wait_until_done(lease)
            if not lease.copied and lease.error is None:
                return self._read(lease, how)
            if lease.error is not None:
                raise lease.error
            value, lease.value = lease.value, None
            return value

    def _read(self, lease: Lease, how: How) -> Any:
        if lease.filled is None:
            raise closed_error()
        slot, place, length, failed = lease.filled
        if failed:
            how = "copy"
        if how != "view":
            lease.filled = None  # the arena takes care of the slot
        if failed:
            raise rebuild_error(self._arena.read(slot, place, length, how), lease.work)
        return self._arena.read(slot, place, length, how, worker.load)

    def _may_help(self, lease: Lease) -> bool:
        """Whether this process is to prepare a batch: nobody else can yet."""
        if not self._reading:
            self._read_results(0)
        return self._helping and not lease.done and isinstance(lease.work, BatchCall)

    def _end_help(self) -> None:
        self._helping = False
        self._known.clear()

    def _do_here(self, lease: Lease) -> None:
        """Do the work as a worker would. The lock is open meanwhile. After KeyboardInterrupt it can be done again."""
        lease.here = True  # first: called off and not marked, nobody would ever do it
        self._call_off(lease)
        slot, segment = self._arena.take()
        filled: tuple[int, int, bool] | None = None
        self._turn.release()
        try:
            filled = self._fill(segment, lease.request)
        except OSError:
            self.check_usable()  # when it is closed its memory has gone
            raise
        finally:
            self._turn.acquire()
            if filled is None:
                self._arena.release(slot)
            if not (self._helping and self._stop.alive):
                self._known.clear()  # made while the help ended
        self.check_usable()
        lease.filled, lease.done = (slot, *filled), True

    def _fill(self, segment: Segment, request: bytes) -> tuple[int, int, bool]:
        """Place and length of the result's description in a slot, and whether it is an error."""
        segment.grow(HEADER_BYTES + len(request))
        segment.memory[HEADER_BYTES : HEADER_BYTES + len(request)] = request
        writer = SlotWriter(segment, worker.dump)
        try:
            with worker.in_place_of_a_worker(self._value_of):
                return *worker.fill(writer, len(request), self._value_of), False
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 - as in a worker
            trace = error.__traceback__
            error.__traceback__ = trace and trace.tb_next  # without this frame it begins as a worker's does
            return *worker.fill_error(writer, len(request), error), True

    def _value_of(self, number: int) -> Any:
        """The value of a shared constant, as workers have it."""
        try:
            return self._known[number]
        except KeyError:
            constant = self._constants[number]
        _, value = worker.load_constant(constant.segment, constant.place, constant.length)
        self._known[number] = value
        return value

    def _wait_until_done(self, lease: Lease) -> None:
        while not lease.done:
            self.check_usable()
            if self._reading:
                self._turn.wait()
            else:
                self._read_results(None)

    def _read_results(self, timeout_ms: int | None) -> None:
        """Wait for news of any worker. The lock is open meanwhile."""
        self._reading = True
        self._turn.release()
        try:
            ready = self._poll.poll(timeout_ms)
        finally:
            self._turn.acquire()
            self._reading = False
            self._turn.notify_all()
        for fd, _ in ready:
            if fd in self._workers:
                self._read_worker(self._workers[fd])
        while self._waiting and len(self._in_slot) < MOST_SLOTS:
            waiting = self._waiting.popleft()
            if waiting.number in self._leases:
                self._issue(waiting)

    def _read_worker(self, handle: WorkerHandle) -> None:
        records = os.read(handle.results, 64 * worker.RESULT.size)
        if not records:
            self._replace(handle)
        for kind, number, slot, place, length in worker.RESULT.iter_unpack(records):
            if kind == worker.READY:
                handle.began = True
                self._false_starts = 0
                self._end_help()
            else:
                handle.reached = max(handle.reached, self._answered(slot))
                self._take_answer(kind, number, slot, place, length)
        if self._suspects and self._workers:
            self._clear_suspects()

    def _answered(self, slot: int) -> int:
        """Nobody will write to this slot any more. Gives its place in the order of all that was given out."""
        self._suspects.discard(slot)
        return self._in_slot.pop(slot)[1]

    def _clear_suspects(self) -> None:
        """Use the slots again that only a dead worker can have read about.

        Leases are read in order, and a worker answers one before it reads the next: a slot that is behind what every
        worker has answered, and that none has marked, was read about by one that died before it marked it.
        """
        reached = min(handle.reached for handle in self._workers.values())
        for slot in list(self._suspects):
            if self._in_slot[slot][1] < reached and self._arena.slots[slot].word(worker.CLAIMED) == 0:
                self._answered(slot)
                self._arena.release(slot)

    def _take_answer(self, kind: int, number: int, slot: int, place: int, length: int) -> None:
        lease = self._leases.get(number)
        if lease is None or kind == worker.SKIPPED:
            self._arena.release(slot)
            if lease is not None:
                lease.slots.discard(slot)
            return
        lease.slots.discard(slot)
        lease.filled = slot, place, length, kind == worker.FAILED
        self._call_off(lease)
        if self._arena.busy > CROWDED:
            try:
                lease.value, lease.copied = self._read(lease, "copy"), True
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                lease.error = error
        lease.done = True

    def _call_off(self, lease: Lease) -> None:
        """Nobody needs this lease any more: workers that have not begun it skip it."""
        self._leases.pop(lease.number, None)
        for slot in tuple(lease.slots):
            if slot in self._arena.slots:
                self._arena.slots[slot].set_word(worker.EXPECTED, 0)

    def release(self, lease: Lease) -> None:
        with self._turn:
            if lease.filled is not None:
                self._arena.release(lease.filled[0])
                lease.filled = None

    def abandon(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            self._call_off(lease)
            self._abandoned.append(lease)

    def _sweep(self) -> None:
        """What could not be done where it became known, for want of the lock."""
        while self._abandoned:
            lease = self._abandoned.popleft()
            self._call_off(lease)
            self.release(lease)
            lease.done = True
        while self._forgotten:
            number = self._forgotten.popleft()
            self._known.pop(number, None)
            for handle in self._workers.values():
                handle.tell(worker.FORGET, number)

    def check_usable(self) -> None:
        """Raise RuntimeError when it is closed, or another process's."""
        if not self._stop.alive:
            raise closed_error()
        check_owner(self._pid, "processes")

    def close(self) -> None:
        with self._turn:
            self._stop()
            self._end_help()
            for lease in self._leases.values():
                lease.done = True
            self._leases.clear()
            self._waiting.clear()


def _announce(workers: dict[int, WorkerHandle], number: int, segment: Segment) -> None:
    for handle in workers.values():
        handle.tell(worker.SLOT, number, fd=segment.fd)


def _stop_processes(pid: int, workers: dict[int, WorkerHandle], arena: SlotArena, fds: tuple[int, ...]) -> None:
    if os.getpid() != pid:
        return  # a copy in a forked process, which owns none of this
    for handle in workers.values():
        handle.process.terminate()
    for handle in workers.values():
        handle.end()
    workers.clear()
    arena.close()
    for fd in fds:
        os.close(fd)


def describe_exit(code: int | None) -> str:
    """What a process did, from its return code."""
    if code is not None and code < 0:
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"
    return f"ended with exit code {code}"


def rebuild_error(description: dict[str, Any], work: Work) -> BaseException:
    """The exception that a worker described, with its traceback there as a note."""
    error: BaseException | None = None
    if description["pickled"] is not None:
        try:
            error = worker.load(description["pickled"])
        except Exception:  # noqa: BLE001 - an exception class may do anything when it is copied
            error = None
    if not isinstance(error, BaseException):
        error = WorkerError(f"{description['type']}: {description['text']}")
    pid = description["pid"]
    where = "this process, before its workers had begun," if pid == os.getpid() else f"worker process {pid}"
    error.add_note(f"Raised in {where} by {work}.")
    error.add_note("The traceback there:\n" + description["traceback"].rstrip())
    return error
