"""What all ways to a trainer on another host have in common, on both sides; `tcp` and `through_store` are the ways.

::

    control    worker -> trainer   frames without a body: beats, which lease was begun, that one is left
    orders     trainer -> worker   leases with their requests, sources with their content, what is called off
    data       worker -> trainer   frames with a body: batches, errors

Three roads, because a batch may take seconds where a beat must not wait. What a worker is preparing is told before it
begins, and after unless it begins another, so a batch that ends its worker is blamed, and not the one that was on its
way.

A body is the content of a slot behind its header (see `transport`): arrays, and the description at `place`. The worker
makes it in memory of its own and goes on with the next lease while a thread sends it; few such slots are the
back-pressure. The trainer receives it into its own slot, looks whether it describes arrays inside of it and nothing
else, and only then counts it as there. Who sends anything else is cut off, and what it had goes to others.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import threading
import time
from abc import abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple, TypeVar

from mlqueue.batch import links
from mlqueue.batch import pool_worker as worker
from mlqueue.batch.compression import NAMES, Compression, codecs, unpack
from mlqueue.batch.links import Link, Order, Peer, Report
from mlqueue.batch.transport import HEADER_BYTES, Segment, SlotWriter, TransportError, read_description

__all__ = ["FRAME", "ORDER", "Frame", "Hostile", "OrderRecord", "RemoteDoor", "RemoteLink", "RemotePeer", "readable"]

logger = logging.getLogger("mlqueue.batches")

#: From a worker: kind, how the body is packed, whether its memory is lent; lease, slot, place and length of the
#: description, nanoseconds, and the bytes of the body as they come.
FRAME: Final = struct.Struct("<BB?5xQQQQQQ")
#: To a worker: kind; number, slot, place, length and how, as in `links.Order`; the bytes that follow.
ORDER: Final = struct.Struct("<B7xQQQQQQ")

#: More orders: a lease is called off; so many bytes may be stored for it; that leave is taken back; its batch, whose
#: memory was lent, has been received.
CALLED_OFF, GRANT, TAKEN_BACK, RECEIVED = 8, 9, 10, 20
#: More frames: which lease is being prepared (0: none), and how many bytes one would take in the store.
PREPARING, ASK = 17, 18
#: The last frame, where its connections do not say so; and bytes that say nothing.
BYE, PADDING = 19, 21
#: Frames that have a body.
WITH_BODY: Final = (links.DONE, links.FAILED, links.REFUSED)

#: The longest description of a batch, in bytes.
MAX_DESCRIPTION: Final = 1 << 24
#: The longest request, and the largest source, in bytes.
MAX_REQUEST, MAX_SOURCE = 1 << 30, 1 << 38
#: How many batches a worker has prepared, or is preparing, that are not sent.
MOST_UNSENT: Final = 3
#: How long a worker that leaves waits until all it has prepared is sent, in seconds.
FLUSH: Final = 10.0


class Hostile(PermissionError):
    """A worker has sent what none of ours sends."""


class Frame(NamedTuple):
    """What a worker sends."""

    kind: int
    codec: int = 0
    #: Whether the worker leaves the memory of the body as it is, until it is told that it has been received.
    lent: bool = False
    lease: int = 0
    slot: int = 0
    place: int = 0
    length: int = 0
    nanoseconds: int = 0
    #: Bytes of the body, as it is sent.
    size: int = 0

    def pack(self) -> bytes:
        return FRAME.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> Frame:
        return cls(*FRAME.unpack(data))


class OrderRecord(NamedTuple):
    """What a trainer sends."""

    kind: int
    number: int = 0
    slot: int = 0
    place: int = 0
    length: int = 0
    how: int = 0
    #: Bytes that follow.
    size: int = 0

    def pack(self) -> bytes:
        return ORDER.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> OrderRecord:
        return cls(*ORDER.unpack(data))


def readable() -> list[int]:
    """The numbers of the codecs that can be read here."""
    return list(codecs())


E = TypeVar("E", bound=BaseException)


def bare(error: E) -> E:
    """The error without what it has seen: that would keep memory of batches until the garbage collector comes by."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


# --- the trainer's side ---


P = TypeVar("P", bound="RemotePeer")


class RemoteDoor(Generic[P]):
    """Where workers of other hosts come to a trainer: threads meet them, and the desk, which waits for the bell
    `socket`, lets them in."""

    def __init__(self) -> None:
        self.socket, self._rope = socket.socketpair()
        self.socket.setblocking(False)
        self._ready: deque[P] = deque()

    def accept(self, serial: int) -> P | None:
        """The next one who has come, and has proved who it is; None when there is none."""
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)
        if not self._ready:
            return None
        peer = self._ready.popleft()
        peer.serial = serial
        self._ring()  # there may be more
        return peer

    def _ring(self) -> None:
        with contextlib.suppress(OSError):
            self._rope.send(b"\0")

    def _let_go_bell(self) -> None:
        self._rope.close()
        self.socket.close()

    def _turn_away(self) -> None:
        """Close it for those who were not let in."""
        while self._ready:
            self._ready.popleft().close()
        self._let_go_bell()


class RemotePeer(Peer):
    """A worker on another host. Threads of its own hear what it says; the desk is told by a bell, the `socket`."""

    shares_slots = False
    under_way = MOST_UNSENT - 1
    #: The name of the way.
    road = ""

    def __init__(self, *, pid: int, process: bytes, job: str, host: str, limit: int) -> None:
        bell, self._rope = socket.socketpair()
        super().__init__(0, bell)
        self.pid, self.process, self.job, self.host = pid, process, job, host
        #: The most bytes that a body may have.
        self.limit = limit
        bell.setblocking(False)
        self._rope.setblocking(False)
        self._ringing = threading.Lock()
        self._closed = False
        self._reports: deque[Report] = deque()
        self._ended: Exception | None = None
        #: The leases that it has: slot, and its memory.
        self._held: dict[int, tuple[int, Segment]] = {}
        self._preparing = 0
        self._codec = 0
        self.ring()  # it is known as soon as the desk looks

    @property
    def way(self) -> str:
        name = NAMES.get(self._codec)
        return f"{self.road} with {name}" if name else self.road

    # The desk's; see Peer.

    def read_hello(self, token: bytes) -> bool:
        return True  # it was known before it came to the desk

    def read(self) -> list[Report]:
        with contextlib.suppress(BlockingIOError):
            self.socket.recv(4096)
        reports = []
        while self._reports:
            reports.append(self._reports.popleft())
        if self._ended is not None:
            if not reports:
                raise self._ended
            self.ring()  # for another look
        return reports

    def lease(self, number: int, slot: int, segment: Segment, request: bytes) -> None:
        self._held[number] = slot, segment
        self._order(OrderRecord(links.LEASE, number, slot, size=len(request)), request)

    def source(self, number: int, segment: Segment, place: int, length: int, how: int) -> None:
        content = memoryview(segment.memory)[HEADER_BYTES : place + length]
        self._order(OrderRecord(links.SOURCE, number, 0, place, length, how, len(content)), content)

    def tell(self, kind: int, number: int = 0) -> None:
        if kind != links.SLOT_GONE:  # it has none of our slots
            self._order(OrderRecord(kind, number))

    def call_off(self, lease: int) -> None:
        if lease in self._held:
            self._order(OrderRecord(CALLED_OFF, lease))

    def has_begun(self, lease: int, segment: Segment) -> bool:
        return self._preparing == lease

    def close(self) -> None:
        with self._ringing:
            self._closed = True
            self.socket.close()
            self._rope.close()
        self._cut()

    def let_go(self) -> None:
        super().let_go()
        self._rope.close()

    @abstractmethod
    def _order(self, record: OrderRecord, content: Any = b"") -> None:
        """Send an order, without waiting for anything."""

    @abstractmethod
    def _cut(self) -> None:
        """End all connections with it, without waiting for anything."""

    # For the threads that hear it.

    def announce(self) -> None:
        """Have what was received taken up: here, where the desk lets us. Waking its thread would take longer than that.
        No lock may be held."""
        take_up = self.take_up  # the desk may forget us meanwhile
        if take_up is None:
            self.ring()
        else:
            take_up()

    def ring(self) -> None:
        """Have the desk look."""
        with self._ringing:
            if not self._closed:
                with contextlib.suppress(OSError):
                    self._rope.send(b"\0")

    def end(self, reason: Exception) -> None:
        """It has gone, or has to go."""
        if self._ended is None:
            self._ended = bare(reason if isinstance(reason, OSError | EOFError) else EOFError(str(reason)))
        self.ring()

    def heard(self, frame: Frame) -> None:
        """A frame without a body has come. Raises Hostile."""
        if frame.kind == PREPARING:
            self._preparing = frame.lease
            return
        if frame.kind == links.SKIPPED:
            slot, _ = self._lease_of(frame)
            del self._held[frame.lease]
            self._reports.append(Report(links.SKIPPED, frame.lease, slot, 0, 0, 0))
        elif frame.kind in (links.BEAT, links.LEAVE):
            self._reports.append(Report(frame.kind, 0, 0, 0, 0, 0))
        else:
            raise Hostile(f"a worker on {self.host} has sent a frame of kind {frame.kind}; it is cut off.")
        self.ring()

    def _lease_of(self, frame: Frame) -> tuple[int, Segment]:
        slot, segment = self._held.get(frame.lease, (-1, None))
        if segment is None or slot != frame.slot:
            raise Hostile(f"a worker on {self.host} has answered lease {frame.lease}, which it has not; it is cut off.")
        return slot, segment

    def receive(self, frame: Frame, read_into: Callable[[memoryview], None], throw_away: Callable[[int], None]) -> None:
        """A frame with a body has come, which ``read_into(memory)`` puts where it belongs, or ``throw_away(bytes)``
        where there is no memory for it. :meth:`announce` has it taken up. Raises Hostile, and what these two raise."""
        slot, segment = self._lease_of(frame)
        size = frame.place + frame.length - HEADER_BYTES
        fits = frame.size == size if not frame.codec else 0 < frame.size < size
        if (
            frame.kind not in WITH_BODY
            or frame.place < HEADER_BYTES
            or not 0 < frame.length <= MAX_DESCRIPTION
            or not 0 < size <= self.limit
            or not fits
        ):
            raise Hostile(
                f"a worker on {self.host} has announced a batch of {size:,} bytes (as {frame.size:,}, its description "
                f"{frame.length:,}); allowed are {self.limit:,}, see MLQUEUE_MAX_BATCH_BYTES. It is cut off."
            )
        try:
            segment.grow(HEADER_BYTES + size)
        except TransportError as error:
            throw_away(frame.size)
            writer = SlotWriter(segment)
            writer.begin()
            described = worker.describe_error(error)
            del described["pickled"]
            place, length = writer.write(described)
            frame = frame._replace(kind=links.FAILED, place=place, length=length)
        else:
            target = memoryview(segment.memory)[HEADER_BYTES : HEADER_BYTES + size]
            self._fill(frame, target, read_into)
        self._codec = frame.codec
        self._check(frame, segment)
        del self._held[frame.lease]
        self._reports.append(Report(frame.kind, frame.lease, slot, frame.place, frame.length, frame.nanoseconds))

    def _fill(self, frame: Frame, target: memoryview, read_into: Callable[[memoryview], None]) -> None:
        if not frame.codec:
            read_into(target)
            return
        packed = memoryview(bytearray(frame.size))
        read_into(packed)
        try:
            unpack(frame.codec, packed, target)
        except ValueError as error:
            raise Hostile(f"from a worker on {self.host}: {error}") from None

    def _check(self, frame: Frame, segment: Segment) -> None:
        """Look whether what has come can be read, as far as the one who trains is going to read it."""
        whole = segment.as_bytes()[: frame.place + frame.length]
        try:
            value = read_description(whole, frame.place, frame.length)(whole, None)
            if frame.kind == links.REFUSED:
                expected: dict[str, type] = {"text": str}
            elif frame.kind == links.FAILED:
                expected = {"type": str, "text": str, "traceback": str, "pid": int}
            else:
                return
            if not isinstance(value, dict) or any(
                not isinstance(value.get(key), kind) for key, kind in expected.items()
            ):
                raise TransportError("an error is not described as one.")
        except Exception as error:  # noqa: BLE001 - whatever a hostile description may lead to
            raise Hostile(
                f"a worker on {self.host} has sent what is no batch, and is cut off: {type(error).__name__}: {error}"
            ) from None


# --- the worker's side ---


class RemoteLink(Link):
    """The way to a trainer on another host. Batches are made in memory of this process, and sent by a thread."""

    def __init__(self, allowed: list[int], limit: int) -> None:
        #: The most bytes that the trainer takes as a batch.
        self._limit = limit
        self._lock = threading.RLock()
        #: Told of orders, and of what else changes; of batches to be sent; of memory that is free. One lock, so that
        #: nobody is woken in vain: that takes as long as a small message.
        self._news = threading.Condition(self._lock)
        self._outgoing = threading.Condition(self._lock)
        self._room = threading.Condition(self._lock)
        self._orders: deque[Order] = deque()
        self._requests: dict[int, bytes] = {}
        self._called_off: set[int] = set()
        #: The lease that the trainer was last told to be prepared here.
        self._told = 0
        self._free: list[SlotWriter] = []
        self._using: dict[int, SlotWriter] = {}
        self._made = 0
        self._unsent: deque[tuple[Frame, SlotWriter]] = deque()
        #: By lease: those whose memory is still being read, though it was sent.
        self._lent: dict[int, SlotWriter] = {}
        self._sending = False
        self._broken: BaseException | None = None
        self._closing = False
        self._compression = Compression(allowed)
        self._threads: list[threading.Thread] = []

    def _start(self) -> None:
        """To be called when the trainer has been reached."""
        for run, name in ((self._hear, "hear"), (self._send_all, "send")):
            thread = threading.Thread(target=run, name=f"mlqueue-batch-{name}", daemon=True)
            self._threads.append(thread)
            thread.start()

    # What a way has to do

    @abstractmethod
    def _next_order(self) -> tuple[OrderRecord, Any]:
        """Wait for the next order, and give it with its bytes; those of a source in a segment. Raises OSError or
        EOFError when there is no trainer any more."""

    @abstractmethod
    def _tell(self, frame: Frame) -> None:
        """Send a frame without a body; any thread. Raises OSError."""

    @abstractmethod
    def _send(self, frame: Frame, body: Any, *, measure: bool) -> float:
        """Send a frame with its body; how many seconds it took to arrive, where that is to be measured."""

    def _may_lend(self, size: int) -> bool:
        """Whether a body of so many bytes is to be sent by :meth:`_lend`."""
        return False

    def _lend(self, frame: Frame, segment: Segment, *, measure: bool) -> float:
        """As :meth:`_send`, for the body behind the header of a segment, which stays as it is until the trainer says
        that it has received it."""
        raise NotImplementedError

    def _part(self) -> None:
        """Say that nothing more comes, where the end of the connections does not."""

    @abstractmethod
    def _cut(self) -> None:
        """End all connections."""

    # The link

    def receive(self, timeout: float) -> Order | None:
        with self._news:
            self._news.wait_for(lambda: self._orders or self._broken, timeout)
            if self._orders:
                return self._orders.popleft()
            self._raise_broken()
        return None

    def claim(self, order: Order) -> bytes | None:
        with self._news:
            request = self._requests.pop(order.number)
            called_off = order.number in self._called_off
            self._called_off.discard(order.number)
        if called_off:
            self._tell_preparing(0)
            return None
        self._tell_preparing(order.number)
        return request

    def _tell_preparing(self, lease: int) -> None:
        if lease != self._told:
            self._told = lease
            self._tell(Frame(PREPARING, lease=lease))

    def place(self, order: Order) -> SlotWriter:
        writer = self._using.get(order.number)
        if writer is None:
            with self._news:
                self._room.wait_for(lambda: self._free or self._made < MOST_UNSENT or self._broken)
                self._raise_broken()
                if self._free:
                    writer = self._free.pop()
                else:
                    self._made += 1
                    writer = SlotWriter(Segment.create())
                self._using[order.number] = writer
        writer.begin()
        return writer

    def deliver(self, kind: int, order: Order, place: int = 0, length: int = 0, nanoseconds: int = 0) -> None:
        frame = Frame(kind, lease=order.number, slot=order.slot, place=place, length=length, nanoseconds=nanoseconds)
        if kind == links.SKIPPED:
            self._tell(frame)
            return
        with self._news:
            self._raise_broken()
            self._called_off.discard(order.number)
            self._unsent.append((frame, self._using.pop(order.number)))
            self._outgoing.notify_all()
            goes_on = bool(self._orders) and self._orders[0].kind == links.LEASE
        if not goes_on:  # else the trainer is told of the next at once, which says the same
            self._tell_preparing(0)

    def tell(self, kind: int) -> None:
        self._tell(Frame(kind))

    def close(self) -> None:
        """Wait until what was prepared is sent, unless the trainer has gone; and let go."""
        deadline = time.monotonic() + FLUSH
        with self._news:
            while (self._unsent or self._sending or self._lent) and not self._broken and time.monotonic() < deadline:
                self._room.wait(0.2)
                with contextlib.suppress(OSError):
                    self._tell(Frame(links.BEAT))
            self._closing = True
            self._notify_everybody()
        if not self._broken:
            with contextlib.suppress(Exception):
                self._part()
        self._cut()
        for thread in self._threads:
            thread.join()
        unsent = [writer for _, writer in self._unsent]
        for writer in [*self._free, *self._using.values(), *self._lent.values(), *unsent]:
            writer.segment.close()
        self._free.clear()
        self._using.clear()
        self._lent.clear()
        self._unsent.clear()
        while self._orders:
            order = self._orders.popleft()
            if order.fd is not None:
                os.close(order.fd)

    def _raise_broken(self) -> None:
        if self._broken is not None:
            raise EOFError(f"the trainer cannot be reached any more: {self._broken}")

    def _break(self, error: BaseException) -> None:
        with self._news:
            if self._broken is None:
                self._broken = bare(error)
            self._notify_everybody()
        self._cut()

    def _notify_everybody(self) -> None:
        for condition in (self._news, self._outgoing, self._room):
            condition.notify_all()

    # The threads

    def _hear(self) -> None:
        try:
            while True:
                record, content = self._next_order()
                with self._news:
                    self._obey(record, content)
        except BaseException as error:  # noqa: BLE001 - whoever waits is told
            self._break(error)

    def _obey(self, record: OrderRecord, content: Any) -> None:
        fd = None
        if record.kind == CALLED_OFF:
            self._called_off.add(record.number)
            if record.number not in self._requests:
                self._called_off.discard(record.number)  # it was begun already
            return
        if record.kind == RECEIVED:
            self._give_back(record.number)
            return
        if record.kind == links.LEASE:
            self._requests[record.number] = bytes(content)
        elif record.kind == links.SOURCE:
            fd = os.dup(content.fd)
            content.close()
        self._orders.append(Order(record.kind, record.number, record.slot, record.place, record.length, record.how, fd))
        self._news.notify_all()

    def _send_all(self) -> None:
        try:
            while True:
                with self._news:
                    self._outgoing.wait_for(lambda: self._unsent or self._closing or self._broken)
                    if self._closing or self._broken:
                        return
                    frame, writer = self._unsent.popleft()
                    self._sending = True
                    self._lent[frame.lease] = writer
                lent = False
                try:
                    lent = self._send_body(frame, writer)
                finally:
                    with self._news:
                        self._sending = False
                        if not lent:
                            self._give_back(frame.lease)
                        if not self._unsent and not self._lent:
                            self._room.notify_all()  # :meth:`close` waits for that
        except BaseException as error:  # noqa: BLE001 - whoever waits is told
            self._break(error)

    def _give_back(self, lease: int) -> None:
        """The memory of a batch that was sent can be used for another."""
        writer = self._lent.pop(lease, None)
        if writer is not None:
            self._free.append(writer)
            self._room.notify()

    def _send_body(self, frame: Frame, writer: SlotWriter) -> bool:
        """Whether its memory is lent, until the trainer says that it has been received."""
        try:
            return self._send_whole(frame, writer)
        except TransportError as error:
            # It is for whoever waits for the batch: no other worker can do better.
            described = worker.describe_error(error)
            del described["pickled"]
            writer.begin()
            place, length = writer.write(described)
            return self._send_whole(frame._replace(kind=links.FAILED, place=place, length=length), writer)

    def _send_whole(self, frame: Frame, writer: SlotWriter) -> bool:
        body = memoryview(writer.segment.memory)[HEADER_BYTES : frame.place + frame.length]
        if len(body) > self._limit or frame.length > MAX_DESCRIPTION:
            raise TransportError(
                f"a batch of {len(body):,} bytes, of them {frame.length:,} to describe it, does not travel to another "
                f"host; allowed are {self._limit:,} (MLQUEUE_MAX_BATCH_BYTES of the trainer) and {MAX_DESCRIPTION:,}."
            )
        measure = self._compression.is_probing(len(body))
        codec, packed = self._compression.pack(body)
        lent = packed is body and self._may_lend(len(body))
        frame = frame._replace(codec=codec, lent=lent, size=len(packed))
        if lent:
            seconds = self._lend(frame, writer.segment, measure=measure)
        else:
            seconds = self._send(frame, packed, measure=measure)
        if measure:
            self._compression.note(body, seconds)
        return lent


def source_segment(record: OrderRecord, read_into: Callable[[memoryview], None]) -> Segment:
    """The content of a source that follows its order, as the segment that workers of the trainer's host would have."""
    if not record.place >= HEADER_BYTES or record.size != record.place + record.length - HEADER_BYTES:
        raise TransportError("the description of a source lies outside of it.")
    segment = Segment.create(HEADER_BYTES + record.size)
    try:
        read_into(memoryview(segment.memory)[HEADER_BYTES : HEADER_BYTES + record.size])
        return segment
    except BaseException:
        segment.close()
        raise
