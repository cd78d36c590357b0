"""What runs in a worker process of a :class:`~mlqueue.batch.work_pool.WorkerProcessPool`.

A worker has three connections to the process that owns the pool:

* *setup*, a socket of its own: slots and shared constants arrive there as records with file descriptors;
* *leases*, a pipe that all workers read: a lease names a slot, in which the request lies; any worker may take any;
* *results*, a pipe of its own: the worker says which slot it has filled, or that the work failed.

It marks a slot with its serial number before it begins, so that the owner knows what to do again if it dies. When the
owner dies or closes the pool, the setup connection ends, and the process with it.
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlqueue.batch import gathering, skips
from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.iteration import ChoiceBatch, SeededBatch
from mlqueue.batch.transport import HEADER_BYTES, Segment, SlotWriter, read_description, receive_record

__all__ = ["Key", "main"]

#: On the setup connection: kind, number, place and length of a constant's description.
SETUP = struct.Struct("<B7xQQQ")
SLOT, CONSTANT, FORGET = range(1, 4)
#: On the pipe of leases: the lease, its slot, the bytes of the request.
LEASE = struct.Struct("<QQQ")
#: On a pipe of results: kind, lease, slot, place and length of the description.
RESULT = struct.Struct("<B7xQQQQ")
READY, DONE, FAILED, SKIPPED = range(1, 5)
#: The words of a slot's header.
EXPECTED, CLAIMED = 0, 1

#: Gives the value of the shared constant of a number.
Lookup = Callable[[int], Any]

#: What random numbers are derived from: (entropy, epoch, number of the batch).
Key = tuple[int, int, int]


def load(body: Any, buffers: Iterable[Any] = ()) -> Any:
    """The object of a pickle and its buffers."""
    return pickle.loads(body, buffers=buffers)  # noqa: S301 - from a process of the same program, over its own pipe


def dump(value: Any, keep_buffer: Callable[[Any], Any] | None = None) -> bytes:
    """Pickle a result; classes and functions of the main script travel by value."""
    try:
        return pickle.dumps(value, protocol=5, buffer_callback=keep_buffer)
    except (pickle.PicklingError, AttributeError, TypeError):
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]

        file = io.BytesIO()
        cloudpickle.CloudPickler(file, protocol=5, buffer_callback=keep_buffer).dump(value)
        return file.getvalue()


def constant(number: int) -> Any:
    """The shared constant of this number; what the pickle of a ``SharedConstant`` calls in a worker."""
    lookup: Lookup | None = getattr(_own, "lookup", None)
    if lookup is None and _worker is not None:
        lookup = _worker.constant
    if lookup is None:
        raise RuntimeError("a shared constant can be used in the tasks of its own pool only; pass the value itself.")
    return lookup(number)


_worker: Worker | None = None
_own = threading.local()
_seeding = threading.RLock()


def main(setup: int, leases: int, results: int, serial: int) -> None:
    """Prepare batches until the owner of the pool ends; the arguments are file descriptors and a number."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the owner decides
    _worker = Worker(socket.socket(fileno=setup), leases, results, serial)
    _worker.run()


class Worker:
    """The loop of a worker process, and what it has been given."""

    def __init__(self, setup: socket.socket, leases: int, results: int, serial: int) -> None:
        self._setup, self._leases, self._results, self._serial = setup, leases, results, serial
        self._arrived = threading.Condition()
        self._writers: dict[int, SlotWriter] = {}
        self._segments: dict[int, tuple[Segment, int, int]] = {}  # of constants: segment, place, length
        self._constants: dict[int, Any] = {}

    def run(self) -> None:
        threading.Thread(target=self._listen, name="mlqueue-batch-setup", daemon=True).start()
        self._send(READY, 0, 0)
        while record := os.read(self._leases, LEASE.size):
            lease, slot, length = LEASE.unpack(record)
            self._take(lease, slot, length)

    def _listen(self) -> None:
        try:
            while True:
                record, fd = receive_record(self._setup, SETUP.size)
                kind, number, place, length = SETUP.unpack(record)
                with self._arrived:
                    if kind == SLOT and fd is not None:
                        self._writers[number] = SlotWriter(Segment.attach(fd), dump)
                    elif kind == CONSTANT and fd is not None:
                        self._segments[number] = Segment.attach(fd), place, length
                    else:
                        self._segments.pop(number, None)
                        self._constants.pop(number, None)
                    self._arrived.notify()
        except (EOFError, OSError):
            # The owner has ended or let go of this pool: nobody waits for what is being prepared.
            os._exit(0)

    def _take(self, lease: int, slot: int, length: int) -> None:
        writer = self._wait_for(self._writers, slot)
        segment = writer.segment
        segment.cover(HEADER_BYTES + length)
        segment.set_word(CLAIMED, self._serial)
        if segment.word(EXPECTED) != lease:
            self._send(SKIPPED, lease, slot)
            return
        try:
            self._send(DONE, lease, slot, *fill(writer, length, self.constant))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it belongs to whoever waits for the batch
            self._send(FAILED, lease, slot, *fill_error(writer, length, error))

    def _send(self, kind: int, lease: int, slot: int, place: int = 0, length: int = 0) -> None:
        try:
            os.write(self._results, RESULT.pack(kind, lease, slot, place, length))
        except BrokenPipeError:
            os._exit(0)

    def _wait_for(self, things: dict[int, Any], number: int) -> Any:
        if number not in things:
            # It is on its way: the owner sends it before the lease that needs it.
            with self._arrived:
                self._arrived.wait_for(lambda: number in things)
        return things[number]

    def constant(self, number: int) -> Any:
        """The value of a shared constant, made once in this process."""
        if number not in self._constants:
            paths, self._constants[number] = load_constant(*self._wait_for(self._segments, number))
            # What has been added to the owner's path of modules since this process began.
            sys.path.extend(path for path in paths if path not in sys.path)
        return self._constants[number]


def load_constant(segment: Segment, place: int, length: int) -> tuple[list[str], Any]:
    """The owner's path of modules, and the value of a shared constant that is described at `place` of its segment."""
    whole = segment.as_private_bytes()
    paths, body, buffers = read_description(whole, place, length)(whole, constant_parts)
    return paths, load(body, buffers)


def fill(writer: SlotWriter, length: int, lookup: Lookup) -> tuple[int, int]:
    """Do what the request of `length` bytes in a slot says, and put the result behind it: place and length of its
    description."""
    end = HEADER_BYTES + length
    request = load(writer.segment.memory[HEADER_BYTES:end])
    writer.begin(end)
    return writer.write(perform(request, lookup, writer.empty))


def fill_error(writer: SlotWriter, length: int, error: BaseException) -> tuple[int, int]:
    """As :func:`fill`, with an error in the place of the result."""
    writer.begin(HEADER_BYTES + length)
    return writer.write(describe_error(error))


def seeding() -> threading.RLock:
    """Held while a batch is prepared with code of the user's: it may draw from the global random generators, which are
    seeded for each batch."""
    return _seeding


@contextlib.contextmanager
def own_generators() -> Iterator[None]:
    """Meanwhile the global random generators are this thread's alone, to be seeded for a batch by :func:`seed_global`.
    They are put back after it."""
    import random

    with seeding():
        states = np.random.get_state(), random.getstate()
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


@contextlib.contextmanager
def in_place_of_a_worker(lookup: Lookup) -> Iterator[None]:
    """Meanwhile this thread does work of worker processes, and no other does."""
    with own_generators():
        before, _own.lookup = getattr(_own, "lookup", None), lookup
        try:
            yield
        finally:
            _own.lookup = before


def _begin_anew() -> None:
    """In a forked process, where no thread but the forking one is left."""
    global _seeding
    _seeding = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def constant_parts(body: Any, buffers: Sequence[Any]) -> tuple[list[str], bytes, Sequence[Any]]:
    """The path of modules, the pickle and the buffers of a shared constant."""
    paths, pickled = load(body)
    return paths, pickled, buffers


def perform(request: tuple[Any, ...], constant: Lookup, empty: Callable[..., np.ndarray]) -> Any:
    """Do what a request says.

    ``("call", fn, args, kwargs)``, ``("batch", constant, index batch, key)``, or the short form of the latter for most
    index batches, ``("rows", constant, dtype, bytes, key)``.
    """
    with gathering.without_help():
        return _perform(request, constant, empty)


def _perform(request: tuple[Any, ...], constant: Lookup, empty: Callable[..., np.ndarray]) -> Any:
    kind, *rest = request
    if kind == "call":
        function, args, kwargs = rest
        return function(*args, **kwargs)
    if kind == "rows":
        number, dtype, content, key = rest
        index_batch: Any = np.frombuffer(bytearray(content), dtype)
    else:
        number, index_batch, key = rest
    source = constant(number)
    if not is_pure(source):
        seed_global(seeded_key(index_batch) or key)
    with skips.collected() as noted:
        batch = gather(source, index_batch, empty)
    return skips.joined(batch, noted)


def gather(source: Any, index_batch: Any, empty: Callable[..., np.ndarray]) -> Any:
    """The samples of a source, in arrays made by `empty` where the source can do so."""
    into = getattr(source, "samples_into", None)
    return source.samples_by_indices_nomapping(index_batch) if into is None else into(index_batch, empty)


def is_pure(source: Any) -> bool:
    """Whether a source only takes rows of numpy arrays, so that no code of the user's runs."""
    if type(source) is not ArrayDataSource:
        return False
    arrays = source.data.values() if isinstance(source.data, Mapping) else source.data
    return all(type(array) in (np.ndarray, np.memmap) and not array.dtype.hasobject for array in arrays)


def seeded_key(index_batch: Any) -> Key | None:
    """The key of the first SeededBatch in an index batch."""
    if isinstance(index_batch, SeededBatch):
        return index_batch.key
    if isinstance(index_batch, ChoiceBatch):
        return seeded_key(index_batch.sample_indices)
    if isinstance(index_batch, tuple | list):
        for part in index_batch:
            if isinstance(part, tuple | list) and (key := seeded_key(part)) is not None:
                return key
    return None


def seed_global(key: Key) -> None:
    """Seed the global generators of numpy and of Python for one batch, so that it is the same whoever prepares it."""
    # Imported here: a worker is sooner ready.
    import hashlib
    import random

    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    np.random.seed(np.frombuffer(digest, np.uint32))
    random.seed(digest)


def describe_error(error: BaseException) -> dict[str, Any]:
    """What the owner needs to raise the error: itself if it can be pickled, its name, its text, its traceback."""
    # The frames of this module say nothing to anybody.
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    pickled: bytes | None = None
    try:
        pickled = dump(error)
        if type(load(pickled)) is not type(error):
            pickled = None
    except Exception:  # noqa: BLE001 - an exception class may do anything when it is copied
        pickled = None
    return {
        "pickled": None if pickled is None else np.frombuffer(pickled, np.uint8),
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "text": safe_text(error),
        "traceback": "".join(traceback.format_exception(type(error), error, trace)),
        "pid": os.getpid(),
        "host": socket.gethostname(),
    }


def safe_text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - __str__ is the user's
        return "(its text cannot be shown)"


#: What ``python -c`` runs to become a worker: the path of modules comes first, because mlqueue may lie on it. Imports
#: leave nothing for the garbage collector, which would look through all of it several times.
BOOTSTRAP = """
import gc, json, os, sys
gc.disable()
setup, leases, results, serial, paths = map(int, sys.argv[1:6])
with os.fdopen(paths, "rb") as pipe:
    sys.path[:], sys.argv[:] = json.load(pipe)
from mlqueue.batch.pool_worker import main
gc.enable()
main(setup, leases, results, serial)
"""
