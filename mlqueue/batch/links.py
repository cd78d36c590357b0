"""How batches travel between a trainer and the actors that prepare them.

A trainer listens (:class:`HostListener`) and has a :class:`Peer` for each worker that has come; a worker has a
:class:`Link`, made from the address that its job carries. Both speak of leases and slots only: who
prepares a batch is given a place to write it (``link.place``), and says that it is there (``link.deliver``). How the
bytes get from that place into the trainer's slot is the business of the pair of classes.

The pair that is here (:class:`HostPeer`, :class:`HostLink`) is for workers on the trainer's host: the place *is* the
slot, a segment of shared memory whose descriptor is passed over a unix socket, and nothing has to be moved. The pairs
for other hosts build on `remote`; `ways` opens all that there are, and takes the first that works.

The socket has no name in any file system (where the system is Linux) and the segments have none at all, so nothing is
left of either, however trainer and workers end. Both sides look who the other is: the same user (SO_PEERCRED), and the
worker has the token that its job carries.
"""

from __future__ import annotations

import os
import secrets
import select
import shutil
import socket
import struct
import sys
import tempfile
import threading
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mlqueue.batch.pool_worker import CLAIMED, EXPECTED
from mlqueue.batch.transport import HEADER_BYTES, Segment, SlotWriter, receive_record, send_record

__all__ = ["HostLink", "HostListener", "HostPeer", "Link", "Order", "Peer", "Report"]

#: What a worker says first: token, its process, process id, the id of its job (UTF-8, padded with zeros).
HELLO = struct.Struct("<32s16sQ128s")
#: Every other record: kind, and five numbers.
RECORD = struct.Struct("<B7xQQQQQ")

# To a worker: welcome (its number), a slot (number; descriptor), a source (number, place, length, kind; descriptor),
# the end of either, a lease (number, slot, length of the request), and that no more leases come.
WELCOME, SLOT, SLOT_GONE, SOURCE, SOURCE_GONE, LEASE, END = range(1, 8)
# To a trainer: a batch is there, or failed, or was not begun, or will not be prepared here (lease, slot, place, length,
# nanoseconds); the worker lives; it wants to leave.
DONE, FAILED, SKIPPED, REFUSED, BEAT, LEAVE = range(11, 17)

#: For how long a worker waits to be rid of what it has to say, in seconds, until the trainer counts as gone.
SEND_WITHIN = 10

#: This process, among all that there are or were. A fork is told from its parent by the process id.
PROCESS = uuid.uuid4().bytes


class Report(NamedTuple):
    """What a worker has told."""

    kind: int
    lease: int
    slot: int
    place: int
    length: int
    nanoseconds: int


class Order(NamedTuple):
    """What a trainer has told."""

    kind: int
    #: Of the lease or source.
    number: int = 0
    slot: int = 0
    place: int = 0
    length: int = 0
    #: How a source travels.
    how: int = 0
    fd: int | None = None


# --- the trainer's side ---


class Peer(ABC):
    """A worker that has come to a trainer. Its methods are called with the crew's lock held; `read` raises OSError or
    EOFError when the worker has gone, the others leave that to `read`."""

    #: How many leases it has, as a rule, that it has prepared, and that are on their way.
    under_way = 0
    #: Whether the worker writes into our slots itself, maybe when it has been cut off too.
    shares_slots = True
    #: The name of its host; empty where that is ours.
    host = ""
    #: Has what was received from it taken up by the thread that calls this; the desk sets it, for a worker it knows.
    take_up: Callable[[], None] | None = None

    def __init__(self, serial: int, connection: socket.socket) -> None:
        self.serial = serial
        self.socket = connection
        #: Process id, process and job, once it has said who it is.
        self.pid = 0
        self.process = b""
        self.job = ""
        self._buffer = b""

    @property
    @abstractmethod
    def way(self) -> str:
        """How its batches travel, as users see it."""

    @abstractmethod
    def read_hello(self, token: bytes) -> bool:
        """Whether it has said who it is. Raises PermissionError when it is not one of ours, and as `read` does."""

    @abstractmethod
    def read(self) -> list[Report]:
        """What it has told since. Does not wait."""

    @abstractmethod
    def lease(self, number: int, slot: int, segment: Segment, request: bytes) -> None:
        """Have it prepare what the request says, in this slot."""

    @abstractmethod
    def source(self, number: int, segment: Segment, place: int, length: int, how: int) -> None:
        """Tell it of a source, which is described in a segment."""

    @abstractmethod
    def tell(self, kind: int, number: int = 0) -> None:
        """Tell it something that needs no more than a number."""

    @abstractmethod
    def has_begun(self, lease: int, segment: Segment) -> bool:
        """Whether it has begun to prepare this lease, and is not done with it; `segment` is the slot of it."""

    def has_died(self, silent: bool) -> bool:
        """Whether, as it is let go of, it counts as ended rather than out of reach; `silent`: for want of a sign."""
        return True

    def call_off(self, lease: int) -> None:  # noqa: B027 - it need not be told
        """The lease that it has is needed no more."""

    def let_go(self) -> None:
        """In a fork of the trainer: close what it has got of the connection."""
        self.socket.close()

    def ring(self) -> None:  # noqa: B027 - where there are no threads that hear it, its socket says so
        """Have the desk's thread look."""

    def close(self) -> None:
        """Cut the connection. What the worker still writes goes nowhere."""
        self.socket.close()


class HostPeer(Peer):
    """A worker on this host: it writes into the slots themselves."""

    def __init__(self, serial: int, connection: socket.socket) -> None:
        super().__init__(serial, connection)
        connection.setblocking(False)
        self._slots: set[int] = set()  # whose descriptor it has

    @property
    def way(self) -> str:
        return "shared memory"

    def read_hello(self, token: bytes) -> bool:
        self._receive()
        if len(self._buffer) < HELLO.size:
            return False
        given, self.process, self.pid, job = HELLO.unpack(self._buffer[: HELLO.size])
        self._buffer = self._buffer[HELLO.size :]
        if not secrets.compare_digest(given, token) or not is_same_user(self.socket):
            raise PermissionError("a stranger has connected to the socket of a pool of actors.")
        self.job = job.rstrip(b"\0").decode()
        self.tell(WELCOME, self.serial)
        return True

    def _receive(self) -> None:
        try:
            data = self.socket.recv(65536)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        self._buffer += data

    def read(self) -> list[Report]:
        self._receive()
        whole = len(self._buffer) // RECORD.size * RECORD.size
        records, self._buffer = self._buffer[:whole], self._buffer[whole:]
        return [Report(*fields) for fields in RECORD.iter_unpack(records)]

    def lease(self, number: int, slot: int, segment: Segment, request: bytes) -> None:
        end = HEADER_BYTES + len(request)
        segment.grow(end)
        segment.memory[HEADER_BYTES:end] = request
        segment.set_word(CLAIMED, 0)
        segment.set_word(EXPECTED, number)
        if slot not in self._slots:
            self._slots.add(slot)
            self._send(SLOT, slot, fd=segment.fd)
        self._send(LEASE, number, slot, 0, len(request))

    def source(self, number: int, segment: Segment, place: int, length: int, how: int) -> None:
        self._send(SOURCE, number, 0, place, length, how, fd=segment.fd)

    def tell(self, kind: int, number: int = 0) -> None:
        if kind != SLOT_GONE or number in self._slots:
            self._slots.discard(number)
            self._send(kind, number)

    def has_begun(self, lease: int, segment: Segment) -> bool:
        return segment.word(CLAIMED) == self.serial

    def _send(self, kind: int, *numbers: int, fd: int | None = None) -> None:
        fields = (*numbers, *[0] * (5 - len(numbers)))
        try:
            send_record(self.socket, RECORD.pack(kind, *fields), fd)
        except OSError:
            # It has died, or has read nothing for so long that it may count as dead.
            try:
                self.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has gone; `read` says so


class HostListener:
    """Where workers of this host come to a trainer."""

    def __init__(self) -> None:
        self.token = secrets.token_bytes(32)
        self._folder: str | None = None
        name = f"mlqueue-batches-{secrets.token_hex(16)}"
        if sys.platform == "linux":
            self._name = "\0" + name  # abstract: it goes with the last process that has it open
        else:
            self._folder = tempfile.mkdtemp(prefix="mlqueue-")  # only its owner may enter it
            self._name = str(Path(self._folder) / "socket")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(self._name)
        self.socket.listen(128)
        self.socket.setblocking(False)

    @property
    def address(self) -> dict[str, Any]:
        """What a job has to carry for its worker to come here: an entry for each way."""
        return {"host": {"socket": self._name.encode(), "token": self.token}}

    def accept(self, serial: int) -> HostPeer | None:
        """The next one who has come; None when there is none."""
        try:
            connection, _ = self.socket.accept()
        except (BlockingIOError, ConnectionAbortedError):
            return None
        return HostPeer(serial, connection)

    def let_go(self) -> None:
        """Close what a fork has got of it."""
        self.socket.close()

    def join(self) -> None:
        """Wait until it is closed."""

    def close(self) -> None:
        self.socket.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


def is_same_user(connection: socket.socket) -> bool:
    """Whether the other side of a unix socket runs as the user of this process, or as root."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True  # type: ignore[unreachable,unused-ignore]  # the socket's folder lets nobody else in
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", credentials)[1] in (os.getuid(), 0)


# --- the worker's side ---


class Link(ABC):
    """A worker's way to a trainer."""

    @abstractmethod
    def receive(self, timeout: float) -> Order | None:
        """The next order; None when none comes within `timeout` seconds. Raises EOFError when the trainer has gone."""

    @abstractmethod
    def claim(self, order: Order) -> bytes | None:
        """The request of a lease, which this worker now begins; None where the trainer no longer needs it."""

    @abstractmethod
    def place(self, order: Order) -> SlotWriter:
        """What puts the batch of a lease where it has to go."""

    @abstractmethod
    def deliver(self, kind: int, order: Order, place: int = 0, length: int = 0, nanoseconds: int = 0) -> None:
        """Say what has become of a lease: the batch is described at `place`."""

    @abstractmethod
    def tell(self, kind: int) -> None:
        """Say something that needs no more words. Raises OSError when the trainer has gone."""

    @abstractmethod
    def close(self) -> None:
        """Cut the connection."""


class HostLink(Link):
    """The way to a trainer on this host: its slots are mapped here."""

    def __init__(self, name: bytes, token: bytes, job_id: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # A trainer that is stopped reads nothing: whoever waits for it to do so could not be stopped either.
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SEND_WITHIN, 0))
        self._sending = threading.Lock()
        self._writers: dict[int, SlotWriter] = {}
        self.serial = 0
        try:
            self._socket.connect(name)
            if not is_same_user(self._socket):
                raise PermissionError("the trainer runs as another user; run workers and trainer as the same one.")
            process = PROCESS[:8] + os.getpid().to_bytes(8, "little")
            self._socket.sendall(HELLO.pack(token, process, os.getpid(), job_id.encode()[:128]))
        except BaseException:
            self._socket.close()
            raise
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)

    def receive(self, timeout: float) -> Order | None:
        while self._poll.poll(round(timeout * 1000)):
            record, fd = receive_record(self._socket, RECORD.size)
            kind, number, slot, place, length, how = RECORD.unpack(record)
            if kind == WELCOME:
                self.serial = number
            elif kind == SLOT and fd is not None:
                segment = Segment.attach(fd)
                self._writers[number] = SlotWriter(segment)
            elif kind == SLOT_GONE:
                self._writers.pop(number).segment.close()
            else:
                return Order(kind, number, slot, place, length, how, fd)
        return None

    def claim(self, order: Order) -> bytes | None:
        segment = self._writers[order.slot].segment
        segment.cover(HEADER_BYTES + order.length)
        segment.set_word(CLAIMED, self.serial)
        if segment.word(EXPECTED) != order.number:
            return None
        return bytes(segment.memory[HEADER_BYTES : HEADER_BYTES + order.length])

    def place(self, order: Order) -> SlotWriter:
        writer = self._writers[order.slot]
        writer.begin()
        return writer

    def deliver(self, kind: int, order: Order, place: int = 0, length: int = 0, nanoseconds: int = 0) -> None:
        self._send(RECORD.pack(kind, order.number, order.slot, place, length, nanoseconds))

    def tell(self, kind: int) -> None:
        self._send(RECORD.pack(kind, 0, 0, 0, 0, 0))

    def _send(self, record: bytes) -> None:
        with self._sending:
            self._socket.sendall(record)

    def close(self) -> None:
        with self._sending:
            self._socket.close()
        for writer in self._writers.values():
            writer.segment.close()
        self._writers.clear()
