"""Slots of shared memory in which batches travel between processes of one host.

A :class:`Segment` is memory that processes share: it has a file descriptor and no name, so there is nothing to collide
with, nothing to run full but memory itself, and nothing left behind however its processes end. A slot is a segment that
carries one batch after another. Who prepares batches fills it through a :class:`SlotWriter`: arrays that were made by
``writer.empty(shape, dtype)`` are in place already, other arrays are copied in. Who uses batches reads them through a
:class:`SlotArena`, which owns the slots, lends them out with the arrays in them, and gets them back when the last of
those arrays is gone.

::

    slot (bytes)      0  the lease that this slot is for, 0 when it was called off     unsigned 64-bit
                      8  the worker that took the lease, 0 while none has              unsigned 64-bit
                     64  the request, then the arrays, each at a multiple of 64, then the description of the batch

The description is JSON: the tree of tuples, lists and dicts, and dtype, shape and place of each array. Nothing is
pickled unless both sides pass functions for it.
"""

from __future__ import annotations

import ast
import ctypes
import json
import math
import mmap
import os
import socket
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mlqueue.batch.errors import BatchError

__all__ = [
    "ALIGNMENT",
    "HEADER_BYTES",
    "Empty",
    "Recycler",
    "Segment",
    "SlotArena",
    "SlotWriter",
    "TransportError",
    "read_description",
    "receive_record",
    "send_record",
]

#: Arrays begin at multiples of this many bytes: a cache line, and the widest vector register.
ALIGNMENT = 64
#: The bytes at the start of a slot that belong to its owner.
HEADER_BYTES = 64
#: The size of a new slot, in bytes; it grows to fit what is written into it.
INITIAL_BYTES = 65536

#: When a slot grows by more than this many bytes, it is asked first whether there is room.
CHECKED_BYTES = 1 << 24

#: Buffers of at least so many bytes are written into the file of a shared constant, so many at a time.
WRITTEN_BYTES, WRITTEN_AT_ONCE = 1 << 20, 1 << 26

#: Descriptions of more bytes are not kept for batches that have the same.
LONGEST_KEPT = 1 << 20

#: Memory of this process that is no array of numpy's: an array of ctypes' c_ubyte.
Memory = Any
#: Makes an array of a shape and dtype, with any content, as ``numpy.empty`` does.
Empty = Callable[[Any, Any], np.ndarray]
#: Pickles an object with protocol 5, giving its buffers to the second argument.
Dump = Callable[[Any, Callable[[Any], None]], bytes]
#: The inverse: the pickle and the buffers.
Load = Callable[[Any, Sequence[Any]], Any]

#: The kinds of dtype that a dtype string says everything about.
_PLAIN_KINDS = "biufcmMSU"


class TransportError(BatchError):
    """A batch could not be carried from one process to another."""


class Segment:
    """Growable memory that is shared by passing its file descriptor, `fd`.

    A growth of the file in another process shows here after :meth:`cover`. Arrays over the memory keep the mapping that
    they were made from alive, also after :meth:`close`.
    """

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        #: The bytes that are mapped here.
        self.size = size
        self.memory = mmap.mmap(fd, size)
        self._words = memoryview(self.memory)[:HEADER_BYTES].cast("Q")

    @classmethod
    def create(cls, size: int = INITIAL_BYTES) -> Segment:
        """A new segment, filled with zeros. Raises TransportError when there is no room for it."""
        fd = _anonymous_file()
        try:
            _allocate(fd, 0, size)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> Segment:
        """The segment of another process, whose descriptor came through :func:`receive_record`."""
        return cls(fd, os.fstat(fd).st_size)

    def grow(self, size: int) -> None:
        """Make at least `size` bytes usable here. Raises TransportError when there is no room for them."""
        if size <= self.size:
            return
        present = os.fstat(self.fd).st_size
        if size > present:
            # A little more than asked for, so that batches of slightly different sizes do not grow it every time.
            present = _round_up(size + max(size >> 5, INITIAL_BYTES), mmap.PAGESIZE)
            _allocate(self.fd, os.fstat(self.fd).st_size, present)
        self._map(present)

    def write(self, content: memoryview, place: int) -> None:
        """Put bytes at `place`, at the end of the file or before it. They are mapped here by :meth:`cover` or a growth.

        Raises TransportError when there is no room for them.
        """
        _check_room(os.fstat(self.fd).st_size, place + content.nbytes)
        done = 0
        try:
            while done < content.nbytes:
                done += os.pwrite(self.fd, content[done : done + WRITTEN_AT_ONCE], place + done)
        except OSError as error:
            raise _no_room(place + content.nbytes, str(error.strerror)) from error

    def cover(self, size: int) -> None:
        """Map at least `size` bytes, to which another process has grown the segment."""
        if size > self.size:
            self._map(os.fstat(self.fd).st_size)
            if size > self.size:
                raise TransportError(f"a batch ends at byte {size} of a segment of {self.size} bytes.")

    def _map(self, size: int) -> None:
        if size > self.size:
            self.memory = mmap.mmap(self.fd, size)
            self._words = memoryview(self.memory)[:HEADER_BYTES].cast("Q")
            self.size = size

    def word(self, number: int) -> int:
        """The 64-bit word at place `number` of the header."""
        return self._words[number]

    def set_word(self, number: int, value: int) -> None:
        """Set the 64-bit word at place `number` of the header."""
        self._words[number] = value

    def as_bytes(self) -> np.ndarray:
        """The whole of it as a uint8 array, new at every call, which keeps the mapping alive."""
        return np.frombuffer(self.memory, np.uint8)

    def as_private_bytes(self) -> np.ndarray:
        """As :meth:`as_bytes`, but what is written to it is seen in this process only."""
        return np.frombuffer(mmap.mmap(self.fd, self.size, access=mmap.ACCESS_COPY), np.uint8)

    def close(self) -> None:
        """Close the descriptor. The memory is let go with the last array over it."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            self.close()


def _anonymous_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("mlqueue-batch", os.MFD_CLOEXEC)
    # Elsewhere a file without a name: its pages are in the page cache, and shared all the same. (The module imports
    # many others, which would take each worker process some milliseconds.)
    import tempfile  # type: ignore[unreachable,unused-ignore]

    with tempfile.TemporaryFile(prefix="mlqueue-batch-") as file:  # type: ignore[unreachable,unused-ignore]
        return os.dup(file.fileno())


def _allocate(fd: int, present: int, size: int) -> None:
    """Make the file that has `present` bytes one of `size` bytes."""
    # Now, because a page that cannot be had later is a SIGBUS. The kernel would rather end a process than refuse.
    _check_room(present, size)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(fd, 0, size)
        else:
            # A hole would be filled only when it is written to.
            for place in range(present, size, CHECKED_BYTES):  # type: ignore[unreachable,unused-ignore]
                os.pwrite(fd, bytes(min(CHECKED_BYTES, size - place)), place)
    except OSError as error:
        raise _no_room(size, str(error.strerror)) from error


def _check_room(present: int, size: int) -> None:
    room = memory_room() if size - present > CHECKED_BYTES else None
    if room is not None and size - present > room:
        raise _no_room(size, f"{room:,} bytes are free")


def _no_room(size: int, reason: str) -> TransportError:
    return TransportError(
        f"there is no memory for a slot of {size:,} bytes ({reason}); lower batch_buffer_size or the batch size, or "
        "give the machine or container more memory."
    )


def memory_room() -> int | None:
    """How many bytes can be had: of the machine, and of the control group (version 2); None where neither is known."""
    known = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                known.append(int(line.split()[1]) * 1024)
    except OSError:
        pass
    group = Path("/sys/fs/cgroup")
    try:
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(stat["inactive_file"])
        known.append(int((group / "memory.max").read_text()) - used)
    except (OSError, ValueError, KeyError):
        pass  # no such group, or no limit ("max")
    return min(known, default=None)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def send_record(connection: socket.socket, record: bytes, fd: int | None = None) -> None:
    """Send a record of a length that the other side knows, and a file descriptor with it."""
    sent = socket.send_fds(connection, [record], [] if fd is None else [fd])
    if sent < len(record):
        connection.sendall(record[sent:])


def receive_record(connection: socket.socket, length: int) -> tuple[bytes, int | None]:
    """The next record, and the file descriptor that came with it. Raises EOFError when the other side has ended."""
    record, fds, _, _ = socket.recv_fds(connection, length, 1)
    while record and len(record) < length:
        more = connection.recv(length - len(record))
        if not more:
            break
        record += more
    if len(record) < length:
        for fd in fds:
            os.close(fd)
        raise EOFError("the other side of the connection has ended.")
    return record, fds[0] if fds else None


class SlotWriter:
    """Fills a slot with one batch.

    ``begin()`` starts a batch, ``empty(shape, dtype)`` makes arrays in the slot, ``write(batch)`` puts the rest in and
    describes it.
    """

    def __init__(self, segment: Segment, dump: Dump | None = None) -> None:
        self.segment = segment
        self._dump = dump
        self._cursor = HEADER_BYTES
        #: Place and length of each buffer of the last :meth:`write_pickle`.
        self.last_places: list[tuple[int, int]] = []
        self._made: list[tuple[int, int, int]] = []  # address, bytes and place of each array that empty() made

    def begin(self, start: int = HEADER_BYTES) -> None:
        """Start a batch behind the first `start` bytes of the slot, over what was there."""
        self._cursor = start
        self._made.clear()

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        """An array of `shape` and `dtype` in the slot, its content undefined; returned arrays need no copy.

        Arrays with Python objects in them cannot be shared: those come from ``numpy.empty``.
        """
        dtype = np.dtype(dtype)
        if dtype.hasobject:
            return np.empty(shape, dtype)
        shape = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
        nbytes = dtype.itemsize
        for length in shape:
            nbytes *= int(length)
        place = self._reserve(nbytes)
        array: np.ndarray = np.ndarray(shape, dtype, self.segment.memory, place)
        self._made.append((array.__array_interface__["data"][0], nbytes, place))
        return array

    def write(self, batch: Any) -> tuple[int, int]:
        """Put `batch` into the slot; gives place and length (bytes) of its description, for :meth:`SlotArena.read`.

        A batch is made of arrays, numbers, texts, None, and tuples, lists and dicts with text keys. Anything else is
        pickled, or raises TypeError where no `dump` was given.
        """
        return self._put(_encode(self._describe(batch)))

    def _reserve(self, nbytes: int) -> int:
        place = _round_up(self._cursor, ALIGNMENT)
        if place + nbytes > self.segment.size:
            self.segment.grow(place + nbytes)
        self._cursor = place + nbytes
        return place

    def _describe(self, node: Any) -> tuple[Any, ...]:
        kind = type(node)
        if kind is np.ndarray:
            dtype = _dtype_text(node.dtype)
            if dtype is not None:
                return ("a", dtype, node.shape, self._place_of(node))
        elif kind is tuple or kind is list:
            return ("t" if kind is tuple else "l", tuple([self._describe(part) for part in node]))
        elif kind is dict and all(type(name) is str for name in node):
            return ("d", tuple(node), tuple([self._describe(part) for part in node.values()]))
        elif node is None or kind in (bool, int, float, str):
            return ("v", json.dumps(node))
        elif isinstance(node, np.generic):
            dtype = _dtype_text(node.dtype)
            if dtype is not None:
                return ("s", dtype, self._place_of(np.asarray(node)))
        return self._pickled(node)

    def _place_of(self, array: np.ndarray) -> int:
        if self._made and array.flags.c_contiguous:
            address, nbytes = array.__array_interface__["data"][0], array.nbytes
            for start, length, place in self._made:
                if start <= address and address + nbytes <= start + length:
                    return int(place + address - start)
        place = self._reserve(array.nbytes)
        np.copyto(np.ndarray(array.shape, array.dtype, self.segment.memory, place), array)
        return place

    def _pickled(self, node: Any) -> tuple[Any, ...]:
        if self._dump is None:
            raise TypeError(
                f"a {type(node).__name__} cannot travel in a batch; use arrays, numbers, texts, None, and tuples, "
                "lists and dicts of them."
            )
        buffers: list[Any] = []
        body = self._dump(node, buffers.append)
        return ("p", tuple([self._put(content) for content in [body, *(buffer.raw() for buffer in buffers)]]))

    def _put(self, content: Any) -> tuple[int, int]:
        size = memoryview(content).nbytes
        place = self._reserve(size)
        self.segment.memory[place : place + size] = content
        return place, size

    def write_pickle(self, body: bytes, buffers: Sequence[Any]) -> tuple[int, int]:
        """As :meth:`write`, for one object that the caller has pickled: its pickle and the buffers beside it."""
        places = [self._put(body), *map(self._write_buffer, buffers)]
        self.last_places = places[1:]
        description = _encode(("p", tuple(places)))
        place = _round_up(self._cursor, ALIGNMENT)
        self.segment.write(memoryview(description), place)  # not by growing: nothing more comes
        self.segment.cover(place + len(description))
        return place, len(description)

    def _write_buffer(self, buffer: Any) -> tuple[int, int]:
        """Put a buffer into the slot; a large one into its file, which saves a page fault for every 4 kB."""
        content = memoryview(buffer).cast("B")
        if content.nbytes < WRITTEN_BYTES:
            return self._put(content)
        place = _round_up(self._cursor, ALIGNMENT)
        self.segment.write(content, place)
        self._cursor = place + content.nbytes
        return place, content.nbytes


@lru_cache(maxsize=512)  # a slot has mostly the same arrays at the same places
def _encode(description: tuple[Any, ...]) -> bytes:
    return json.dumps(description, separators=(",", ":")).encode()


def _dtype_text(dtype: np.dtype[Any]) -> str | None:
    """A text that says all about a dtype; None when there is none, or when it holds references."""
    if dtype.kind in _PLAIN_KINDS:
        return dtype.str if dtype.metadata is None else None
    if dtype.kind == "V" and not dtype.hasobject and (dtype.names is not None or dtype.type is np.void):
        return repr(np.lib.format.dtype_to_descr(dtype))
    return None


def _dtype_of(text: str) -> np.dtype[Any]:
    if text[0] in "[('\"":
        dtype: np.dtype[Any] = np.lib.format.descr_to_dtype(ast.literal_eval(text))
    else:
        dtype = np.dtype(text)
    if dtype.hasobject:
        raise TransportError(f"a batch has an array of {text!r}: Python objects do not travel in arrays.")
    return dtype


#: Makes a batch of the whole slot (uint8), and of the buffers of pickles that `load` takes.
Plan = Callable[[np.ndarray, "Load | None"], Any]


def read_description(whole: np.ndarray, place: int, length: int) -> Plan:
    """How to make the batch that :meth:`SlotWriter.write` described at `place` of the slot `whole` (uint8)."""
    description = whole[place : place + length].tobytes()
    return _plan(description) if length <= LONGEST_KEPT else _compile(json.loads(description))


@lru_cache(maxsize=512)  # most batches have the description of one before
def _plan(description: bytes) -> Plan:
    return _compile(json.loads(description))


def _compile(node: list[Any]) -> Plan:
    kind, *rest = node
    match kind:
        case "a":
            return _array_plan(_dtype_of(rest[0]), tuple(rest[1]), rest[2])
        case "s":
            scalar = _array_plan(_dtype_of(rest[0]), (), rest[1])
            return lambda slot, load: scalar(slot, load)[()]
        case "t":
            parts = [_compile(part) for part in rest[0]]
            return lambda slot, load: tuple([part(slot, load) for part in parts])
        case "l":
            items = [_compile(part) for part in rest[0]]
            return lambda slot, load: [item(slot, load) for item in items]
        case "d":
            names, values = rest[0], [_compile(part) for part in rest[1]]
            return lambda slot, load: {name: value(slot, load) for name, value in zip(names, values, strict=True)}
        case "v":
            value = json.loads(rest[0])
            return lambda slot, load: value
        case _:
            return lambda slot, load: _unpickle(slot, load, rest[0])


def _array_plan(dtype: np.dtype[Any], shape: tuple[int, ...], place: int) -> Plan:
    # NumPy itself looks neither for negative numbers nor for products that overflow: it would read any memory.
    if not all(isinstance(number, int) and number >= 0 for number in (*shape, place)):
        raise TransportError(f"a batch has an array of shape {shape} at {place}.")
    end = place + math.prod(shape) * dtype.itemsize

    def plan(slot: np.ndarray, load: Load | None) -> Any:
        if end > slot.nbytes:
            raise TransportError(f"a batch has an array that ends at byte {end:,} of {slot.nbytes:,}.")
        return np.ndarray(shape, dtype, slot, place)

    return plan


def _unpickle(slot: np.ndarray, load: Load | None, places: list[list[int]]) -> Any:
    if load is None:
        raise TransportError("the batch holds a pickle, and this side reads none.")
    body, *buffers = [slot[place : place + size] for place, size in places]
    return load(body, buffers)


class SlotArena:
    """The slots of whoever uses the batches: a free list, and those that are lent.

    `take` gives a slot to be filled. When it is filled, `read` gives the batch in one of three ways:

    * ``"lend"``: the arrays lie in the slot and are the caller's own, writable and valid as long as they live. The slot
      comes back by itself when the last of them is gone. No byte is copied.
    * ``"copy"``: the arrays are copies; the slot is free at once.
    * ``"view"``: the arrays lie in the slot, cannot be written, and are valid until the caller says `release`.
    """

    def __init__(self, announce: Callable[[int, Segment], None], *, most_lent: int = 4, small: int = 65536) -> None:
        #: Called with number and segment of every new slot, so that those who fill it can be told.
        self._announce = announce
        #: While this many slots are lent, further batches are copied.
        self.most_lent = most_lent
        #: Batches of fewer bytes than this are copied, which is cheaper than keeping count.
        self.small = small
        self.slots: dict[int, Segment] = {}
        self._free: list[int] = []
        self._lent: dict[int, weakref.ref[np.ndarray]] = {}
        # Filled by callbacks of the garbage collector, in any thread and at any moment: it needs no lock.
        self._returned: deque[int] = deque()
        self._last = -1

    @property
    def lent(self) -> int:
        """How many slots are lent out with the arrays in them."""
        self._collect()
        return len(self._lent)

    @property
    def busy(self) -> int:
        """How many slots are neither free nor lent: they are being filled, or wait to be read."""
        self._collect()
        return len(self.slots) - len(self._free) - len(self._lent)

    @property
    def free(self) -> int:
        """How many slots can be taken without making one."""
        self._collect()
        return len(self._free)

    def take(self) -> tuple[int, Segment]:
        """Number and segment of a free slot; a new one when none is free."""
        self._collect()
        if self._free:
            # The one that was used last, because it is most likely in the processor's cache.
            number = self._free.pop()
        else:
            self._last += 1
            number = self._last
            self.slots[number] = Segment.create()
            self._announce(number, self.slots[number])
        return number, self.slots[number]

    def release(self, number: int) -> None:
        """Put a slot back on the free list."""
        if number in self.slots:
            self._free.append(number)

    def discard(self, number: int) -> None:
        """Forget a slot that somebody may still write to."""
        self.slots.pop(number).close()

    def read(
        self, number: int, place: int, length: int, how: Literal["lend", "copy", "view"], load: Load | None = None
    ) -> Any:
        """The batch in slot `number`, whose description lies at `place`; see the class for `how`.

        After ``"lend"`` and ``"copy"`` the slot takes care of itself.
        """
        segment = self.slots[number]
        segment.cover(place + length)
        whole = segment.as_bytes()
        plan = read_description(whole, place, length)
        if how == "view":
            whole.flags.writeable = False
            return plan(whole, load)
        if how == "lend" and place >= self.small and self.lent < self.most_lent:
            give_back = self._returned.append  # not self: the arena may go before the arrays do
            self._lent[number] = weakref.ref(whole, lambda _: give_back(number))
            return plan(whole, load)
        try:
            return _owned(plan(whole, None if load is None else lambda body, buffers: load(body, _owned(buffers))))
        finally:
            self.release(number)

    def _collect(self) -> None:
        while self._returned:
            number = self._returned.popleft()
            if self._lent.pop(number, None) is not None:
                self.release(number)

    def close(self) -> None:
        """Let go of all slots. Arrays that are lent stay valid."""
        for segment in self.slots.values():
            segment.close()
        self.slots.clear()
        self._free.clear()
        self._lent.clear()


def _owned(node: Any) -> Any:
    """The same batch, with copies of the arrays."""
    return with_arrays(node, np.ndarray.copy)


def with_arrays(node: Any, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """The same batch, with what `change` gives for each of its arrays."""
    kind = type(node)
    if kind is np.ndarray:
        return change(node)
    if kind is tuple or kind is list:
        return kind([with_arrays(part, change) for part in node])
    if kind is dict:
        return {name: with_arrays(part, change) for name, part in node.items()}
    return node


class Watch(weakref.ref[np.ndarray]):
    """Knows when an array has gone, and which memory it lay in."""

    __slots__ = ("memory",)
    memory: Memory


class Recycler:
    """Memory of this process for batches, used again when the last array over it is gone.

    Fresh memory costs a page fault for every 4 kB, which for large batches takes longer than filling them.
    """

    def __init__(self, most_idle: int = 1 << 26) -> None:
        #: About how many bytes are kept while nobody uses them; at the least, two blocks.
        self.most_idle = most_idle
        # Changed by callbacks of the garbage collector, in any thread and at any moment: no step needs a lock.
        self._free: deque[Memory] = deque()
        self._in_use: dict[int, Watch] = {}

    def empty(self, shape: Any, dtype: Any) -> np.ndarray:
        """An array of `shape` and `dtype` with any content, like ``numpy.empty``. May be called by any thread."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize if isinstance(shape, tuple) else 0
        if nbytes < INITIAL_BYTES or dtype.hasobject:
            return np.empty(shape, dtype)
        return self.maker(shape, dtype)()

    def maker(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], np.ndarray]:
        """A function that gives such arrays of always the same shape and dtype, not small, without Python objects."""
        nbytes = math.prod(shape) * dtype.itemsize
        in_use, take, give_back, ndarray = self._in_use, self._take, self._give_back, np.ndarray

        def make() -> np.ndarray:
            memory = take(nbytes)
            # All arrays that are made of this one keep it alive. (Were the memory an array, they would keep that.)
            array: np.ndarray = ndarray(shape, dtype, memory)
            watch = Watch(array, give_back)
            watch.memory = memory
            in_use[id(watch)] = watch
            return array

        return make

    def _take(self, nbytes: int) -> Memory:
        for _ in range(len(self._free)):
            try:
                memory = self._free.pop()  # what was used last is most likely in the processor's cache
            except IndexError:
                break
            if nbytes <= len(memory) <= 2 * nbytes:
                return memory
            self._free.appendleft(memory)
        return (ctypes.c_ubyte * nbytes).from_buffer(np.empty(nbytes, np.uint8).data)

    def _give_back(self, watch: weakref.ref[np.ndarray]) -> None:
        assert isinstance(watch, Watch)
        del self._in_use[id(watch)]
        self._free.append(watch.memory)
        while len(self._free) > max(2, self.most_idle // len(watch.memory)):
            try:
                self._free.popleft()
            except IndexError:
                break
