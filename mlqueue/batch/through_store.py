"""The way to a trainer on another host through the store, where nothing else leads to it.

::

    {prefix}:in                         list     what workers tell, each with its id in front (see `remote`)
    {prefix}:alive                      string   there as long as the trainer listens
    {prefix}:o:{worker}                 list     orders to a worker
    {prefix}:d:{worker}:{lease}:{n}     string   part n of a batch
    {prefix}:s:{worker}:{source}:{n}    string   part n of a source

Parts are of a megabyte and travel as they are, straight from the memory of one process into that of the other: no
client library copies them. Each is deleted as it is read; keys expire by themselves (`TTL`) when nobody comes for them,
so that nothing stays of a trainer or a worker that was killed. The connections are of this way alone, so that batches
hold up no command of the queue but on the server itself.

The trainer keeps to a budget of bytes in the store. A lease comes with leave to store as much as the largest batch so
far had, where the budget has room for it; a worker that has no leave, or a larger batch, asks, and waits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import struct
import threading
import time
from collections import deque
from functools import partial
from typing import Any, Final

import redis

from mlqueue.batch import links
from mlqueue.batch.parts import TTL, GoneError, call, delete_parts, hands_on, pop, push, raw, read_parts, write_parts
from mlqueue.batch.remote import (
    ASK,
    BYE,
    FRAME,
    GRANT,
    ORDER,
    TAKEN_BACK,
    WITH_BODY,
    Frame,
    Hostile,
    OrderRecord,
    RemoteDoor,
    RemoteLink,
    RemotePeer,
    readable,
    source_segment,
)
from mlqueue.batch.transport import TransportError
from mlqueue.errors import StoreError
from mlqueue.store.connection import Connector, shut

__all__ = ["StoreDoor", "StoreLink"]

logger = logging.getLogger("mlqueue.batches")

#: For how long a trainer counts as there without a sign, and how often it gives one, in seconds.
ALIVE: Final = 15.0
SIGN: Final = 4.0
#: How long a worker waits for a trainer to listen, in seconds.
LISTENS: Final = 1.0
#: How long a worker waits to be welcomed, in seconds.
WELCOMED: Final = 5.0

#: What a worker says first: token, its process, process id, job and host.
HELLO: Final = struct.Struct("<32s16sQ128s64s")
#: The length of the id of a worker.
ID: Final = 16

#: Tells a trainer something, as long as there is one: nothing stays behind that nobody will read.
TELL: Final = """
if redis.call("EXISTS", KEYS[1]) == 0 then return 0 end
redis.call("RPUSH", KEYS[2], ARGV[1])
redis.call("PEXPIRE", KEYS[2], ARGV[2])
return 1
"""

#: How long the store may take to answer the trainer that waits for what workers tell, in seconds.
ANSWERS: Final = 3.0

#: What goes wrong with a connection to a store.
ERRORS: Final = (OSError, EOFError, StoreError, redis.RedisError)


# --- the trainer's side ---


class StoreDoor(RemoteDoor["StorePeer"]):
    """Where workers come through the store. `socket` is the bell that the desk waits for.

    A thread reads what they tell, one sends them orders, one fetches their batches; when the store cannot be reached,
    all of them are taken for gone, and are asked for anew.
    """

    def __init__(self, connector: Connector, prefix: str, budget: int, limit: int) -> None:
        super().__init__()
        self.token = secrets.token_bytes(32)
        self._connector, self._prefix, self._limit = connector, prefix, limit
        self.budget = budget
        self._lock = threading.Lock()
        self._news = threading.Condition(self._lock)
        self._peers: dict[bytes, StorePeer] = {}
        #: All that have come, as long as a list of orders may be there for them: when.
        self._came: dict[bytes, float] = {}
        #: The sources that they were sent.
        self._sources: dict[bytes, list[int]] = {}
        self._orders: deque[tuple[StorePeer, OrderRecord, Any]] = deque()
        self._fetches: deque[tuple[StorePeer, Frame]] = deque()
        #: Bytes that workers have leave to store: by worker and lease.
        self._leave: dict[tuple[bytes, int], int] = {}
        #: What workers that were let go had leave to store, and may have stored since.
        self._doubtful: set[tuple[bytes, int]] = set()
        #: When leases were sent: by worker and lease, as long as they are not answered.
        self._sent: dict[tuple[bytes, int], int] = {}
        self._count = 0
        #: Those who have asked for it: peer, lease, bytes.
        self._asking: deque[tuple[StorePeer, int, int]] = deque()
        self._largest = 0
        self._connections: dict[str, Any] = {}
        self._closed = False
        self._threads = [
            threading.Thread(target=run, name=f"mlqueue-batch-store-{name}", daemon=True)
            for name, run in (("in", self._listen), ("out", self._send), ("data", self._fetch))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def address(self) -> dict[str, Any]:
        """Its entry of the address that jobs carry."""
        return {"store": {"prefix": self._prefix, "token": self.token, "codecs": readable(), "limit": self._limit}}

    # What workers tell

    def _listen(self) -> None:
        pause = 0.1
        while not self._closed:
            try:
                with self._connected("in") as connection:
                    connection._sock.settimeout(ANSWERS)
                    self._bound_budget(connection)
                    pause = 0.1
                    self._read_on(connection)
            except ERRORS as error:
                self._lose_all(error)  # what had been taken and not received would be waited for in vain
                with self._news:
                    self._news.wait_for(lambda: self._closed, pause)
                pause = min(2 * pause, 2.0)
        with contextlib.suppress(*ERRORS):
            self._sweep()

    def _read_on(self, connection: Any) -> None:
        told, key = 0.0, f"{self._prefix}:in"
        while not self._closed:
            now = time.monotonic()
            if now - told > SIGN:
                told = now
                call(connection, ("SET", f"{self._prefix}:alive", 1, "PX", int(ALIVE * 1000)))
            for item in pop(connection, key):
                self._take(item)

    def _bound_budget(self, connection: Any) -> None:
        """The budget is no more than half of what the server has room for."""
        with contextlib.suppress(redis.ResponseError, KeyError, ValueError):
            connection.send_command("INFO", "memory")
            lines = connection.read_response().decode().splitlines()
            told = dict(line.split(":", 1) for line in lines if ":" in line)
            most, used = int(told["maxmemory"]), int(told["used_memory"])
            if most and (most - used) // 2 < self.budget:
                logger.warning(
                    "the store for batches has room for %d more bytes of its maxmemory of %d; batches take half of "
                    "that at most, not the %d of MLQUEUE_BATCHES_STORE_BYTES.",
                    most - used,
                    most,
                    self.budget,
                )
                self.budget = max(0, (most - used) // 2)

    def _take(self, item: bytes) -> None:
        worker_id, content = item[:ID], item[ID:]
        peer = self._peers.get(worker_id)
        if len(content) == HELLO.size:
            self._welcome(worker_id, content)
            return
        if peer is None or len(content) != FRAME.size:
            return  # of one who was let go, or of a stranger
        frame = Frame.unpack(content)
        try:
            if frame.kind in WITH_BODY or frame.kind == BYE:
                with self._news:
                    self._fetches.append((peer, frame))
                    self._news.notify_all()
            elif frame.kind == ASK:
                self._ask(peer, frame.lease, frame.size)
            else:
                if frame.kind == links.SKIPPED:
                    self._used(peer, frame.lease)
                peer.heard(frame)
        except Hostile as error:
            peer.end(error)

    def _welcome(self, worker_id: bytes, content: bytes) -> None:
        token, process, pid, job, host = HELLO.unpack(content)
        if not secrets.compare_digest(token, self.token) or worker_id in self._peers:
            logger.warning("a stranger has spoken to a pool of actors through the store.")
            return
        texts = [text.rstrip(b"\0").decode(errors="replace") for text in (job, host)]
        peer = StorePeer(self, worker_id, pid=pid, process=process, job=texts[0], host=texts[1], limit=self._limit)
        now = time.monotonic()
        with self._lock:
            self._peers[worker_id] = peer
            for one in [one for one, at in self._came.items() if one not in self._peers and now - at > 2 * TTL]:
                del self._came[one]
                self._sources.pop(one, None)
                self._doubtful -= {key for key in self._doubtful if key[0] == one}
            self._came[worker_id] = now
        peer.tell(links.WELCOME)
        self._ready.append(peer)
        self._ring()

    def _lose_all(self, error: Exception) -> None:
        with self._lock:
            peers = list(self._peers.values())
        if peers and not self._closed:
            logger.warning("batches cannot travel through the store: %s", error)
        for peer in peers:
            peer.end(EOFError(str(error)))

    # Orders to workers

    def order(self, peer: StorePeer, record: OrderRecord, content: Any) -> None:
        """Send an order; waits for nothing."""
        with self._news:
            if record.kind == links.LEASE:
                self._count += 1
                self._sent[peer.id, record.number] = self._count
                # Who asks comes first.
                leave = 0 if self._asking else self._give_leave(peer.id, record.number, self._largest)
                record = record._replace(place=leave)
            self._orders.append((peer, record, content))
            self._news.notify_all()

    def _send(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._orders or self._closed)
                if self._closed:
                    return
            try:
                with self._connected("out") as connection:
                    self._send_on(connection)
            except ERRORS as error:
                self._lose_all(error)
                with self._news:
                    self._orders.clear()

    def _send_on(self, connection: Any) -> None:
        apart = hands_on(connection)
        while True:
            with self._news:
                self._news.wait_for(lambda: self._orders or self._closed)
                if self._closed:
                    return
                waiting, self._orders = self._orders, deque()
            by_worker: dict[bytes, list[bytes]] = {}
            for peer, record, content in waiting:
                if record.kind == links.SOURCE:
                    if record.size > self.budget:
                        peer.end(
                            EOFError(
                                f"a source of {record.size:,} bytes does not go through the store, of which batches "
                                f"may take {self.budget:,}: give it a name (@mlq.data_source)."
                            )
                        )
                        continue
                    self._sources.setdefault(peer.id, []).append(record.number)
                    write_parts(raw(connection), self._key("s", peer.id, record.number), content, apart=apart)
                    content = b""
                by_worker.setdefault(peer.id, []).append(record.pack() + bytes(content))
            for worker_id, items in by_worker.items():
                push(connection, self._key("o", worker_id), items)

    # Batches

    def _fetch(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._fetches or self._closed)
                if self._closed:
                    return
            try:
                with self._connected("data") as connection:
                    self._fetch_on(connection)
            except ERRORS as error:
                self._lose_all(error)
                with self._news:
                    self._fetches.clear()
                    if not self._closed:  # else it is deleted in the end
                        self._leave.clear()  # what is there expires

    def _fetch_on(self, connection: Any) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._fetches or self._closed)
                if self._closed:
                    return
                peer, frame = self._fetches.popleft()
            key = self._key("d", peer.id, frame.lease)
            try:
                if frame.kind == BYE:
                    peer.end(EOFError("the worker has left."))
                    continue
                if peer.gone:
                    delete_parts(connection, key)
                else:
                    read_into = partial(read_parts, raw(connection), key)
                    peer.receive(frame, read_into, partial(self._throw_away, connection, key))
                    peer.announce()
            except Hostile as error:
                peer.end(error)  # what it has stored is deleted when it is let go
                return  # what was asked for ahead is still to come over this connection
            except GoneError:
                peer.missed(frame)  # it had expired: this process was stopped, or the store lost it
            self._used(peer, frame.lease)
            with self._lock:
                self._largest = max(self._largest, frame.size)

    def _throw_away(self, connection: Any, key: str, size: int) -> None:
        delete_parts(connection, key)

    def _key(self, kind: str, worker_id: bytes, number: int | None = None) -> str:
        key = f"{self._prefix}:{kind}:{worker_id.decode()}"
        return key if number is None else f"{key}:{number}"

    # The budget; its methods are called with the lock held

    def _give_leave(self, worker_id: bytes, lease: int, size: int) -> int:
        """How many bytes a worker may store for a lease, without asking."""
        if not size or sum(self._leave.values()) + size > self.budget:
            return 0
        self._leave[worker_id, lease] = size
        return size

    def _ask(self, peer: StorePeer, lease: int, size: int) -> None:
        with self._lock:
            self._leave.pop((peer.id, lease), None)
            if sum(self._leave.values()) + size > self.budget:
                self._take_back(peer, self._sent.get((peer.id, lease), 0))
            self._asking.append((peer, lease, size))
            self._answer()

    def _take_back(self, peer: StorePeer, since: int) -> None:
        """What a worker has leave to store for leases that it was sent later: it sends in order, so it would
        wait for the room that it holds itself."""
        for worker_id, lease in list(self._leave):
            if worker_id == peer.id and self._sent.get((worker_id, lease), 0) > since:
                del self._leave[worker_id, lease]
                self._orders.append((peer, OrderRecord(TAKEN_BACK, lease), b""))
        self._news.notify_all()

    def _used(self, peer: StorePeer, lease: int) -> None:
        """Nothing of this lease is in the store any more."""
        with self._lock:
            self._leave.pop((peer.id, lease), None)
            self._sent.pop((peer.id, lease), None)
            self._answer()

    def _answer(self) -> None:
        while self._asking:
            peer, lease, size = self._asking[0]
            if not peer.gone:
                may = size <= self.budget
                if may and not self._give_leave(peer.id, lease, size):
                    return  # until some of what is there has been read
                self._orders.append(
                    (peer, OrderRecord(GRANT, lease, place=size if may else 0, length=self.budget), b"")
                )
                self._news.notify_all()
            self._asking.popleft()

    # The end

    def forget(self, peer: StorePeer) -> None:
        """It has gone: what it has stored is deleted, or expires."""
        with self._news:
            self._peers.pop(peer.id, None)
            for sent in [one for one in self._sent if one[0] == peer.id]:
                del self._sent[sent]
            leases = [lease for worker_id, lease in self._leave if worker_id == peer.id]
            self._doubtful |= {(peer.id, lease) for lease in leases}
            self._fetches.extend((peer, Frame(links.DONE, lease=lease)) for lease in leases)
            self._news.notify_all()

    @contextlib.contextmanager
    def _connected(self, name: str) -> Any:
        connection = self._connector.connection()
        with self._lock:
            self._connections[name] = connection
            closed = self._closed
        try:
            if closed:
                raise EOFError("the pool is closed.")
            yield connection
        finally:
            with self._lock:
                self._connections.pop(name, None)
            connection.disconnect()

    def let_go(self) -> None:
        """Close what a fork has got of it."""
        self._let_go_bell()
        for connection in list(self._connections.values()):
            if connection._sock is not None:
                connection._sock.close()

    def close(self) -> None:
        """Listen no more."""
        with self._news:
            self._closed = True
            self._news.notify_all()
            for connection in self._connections.values():
                shut(connection)

    def join(self) -> None:
        """Wait until it is closed, and nothing of it is left in the store."""
        for thread in self._threads:
            thread.join(10)
        self._turn_away()

    def _sweep(self) -> None:
        """Nothing stays in the store; what a worker is still writing expires."""
        for thread in self._threads[1:]:
            thread.join(5)
        with self._lock:
            parts = [self._key("d", worker_id, lease) for worker_id, lease in {*self._leave, *self._doubtful}]
            parts += [self._key("s", one, number) for one, numbers in self._sources.items() for number in numbers]
        connection = self._connector.connection()
        try:
            lists = [self._key("o", worker_id) for worker_id in self._came]
            call(connection, ("UNLINK", f"{self._prefix}:in", f"{self._prefix}:alive", *lists))
            for key in parts:
                delete_parts(connection, key)
        finally:
            connection.disconnect()


class StorePeer(RemotePeer):
    """A worker that has come through the store."""

    road = "the store"

    def __init__(self, door: StoreDoor, worker_id: bytes, **more: Any) -> None:
        super().__init__(**more)
        self.id = worker_id
        self._door = door
        #: Whether it has been let go.
        self.gone = False

    def _order(self, record: OrderRecord, content: Any = b"") -> None:
        if not self.gone:
            self._door.order(self, record, content)

    def missed(self, frame: Frame) -> None:
        """A batch was not there any more."""
        self.heard(frame._replace(kind=links.SKIPPED))

    def _cut(self) -> None:
        if not self.gone:
            self._order(OrderRecord(links.END))
            self.gone = True
            self._door.forget(self)


# --- the worker's side ---


class StoreLink(RemoteLink):
    """The way to a trainer through the store. Raises OSError when no trainer answers there."""

    def __init__(self, entry: dict[str, Any], job_id: str, connector: Connector, compress: bool) -> None:
        super().__init__([int(number) for number in entry["codecs"]] if compress else [], int(entry["limit"]))
        self.where = connector.where
        self._prefix = entry["prefix"]
        self._id = secrets.token_hex(ID // 2).encode()
        self._orders_key = f"{self._prefix}:o:{self._id.decode()}"
        self._records: deque[tuple[OrderRecord, Any]] = deque()
        self._leave: dict[int, int] = {}
        self._telling = threading.Lock()
        self._opened: list[Any] = []
        process = links.PROCESS[:8] + os.getpid().to_bytes(8, "little")
        host = socket.gethostname().encode()[:64]
        try:
            for _ in range(3):
                self._opened.append(connector.connection())
            self._out, self._in, self._data = self._opened
            self._apart = hands_on(self._data)
            hello = HELLO.pack(entry["token"], process, os.getpid(), job_id.encode()[:128], host)
            begun = time.monotonic()
            while not self._push(hello):
                if time.monotonic() - begun > LISTENS:
                    raise OSError("no trainer listens at the store any more")
                time.sleep(0.05)  # one that has just begun is about to
            deadline = time.monotonic() + WELCOMED
            while not self._records:
                self._read_orders()
                [there] = call(self._out, ("EXISTS", f"{self._prefix}:alive"))
                if not self._records and (not there or time.monotonic() > deadline):
                    raise OSError("the trainer does not answer through the store")
        except ERRORS as error:
            self._disconnect()
            raise OSError(str(error)) from error
        self._records.popleft()
        self._start()

    def _push(self, content: bytes) -> bool:
        """Tell the trainer something; whether there is one."""
        keys = f"{self._prefix}:alive", f"{self._prefix}:in"
        with self._telling:
            [told] = call(self._out, ("EVAL", TELL, 2, *keys, self._id + content, int(TTL * 1000)))
        return bool(told)

    def _read_orders(self) -> None:
        for item in pop(self._in, self._orders_key):
            self._records.append((OrderRecord.unpack(item[: ORDER.size]), item[ORDER.size :]))

    def _next_order(self) -> tuple[OrderRecord, Any]:
        while True:
            with contextlib.ExitStack() as stack:
                stack.enter_context(as_broken())
                while not self._records:
                    self._read_orders()
                record, content = self._records.popleft()
                if record.kind == links.SOURCE:
                    return record, source_segment(record, partial(self._read_source, record.number))
            if record.kind == GRANT:
                with self._news:
                    self._leave[record.number] = record.place or -record.length
                    self._news.notify_all()
                continue
            if record.kind == TAKEN_BACK:
                self._leave.pop(record.number, None)
                continue
            if record.kind == links.LEASE and record.place:
                self._leave[record.number] = record.place
            return record, content

    def _read_source(self, number: int, target: memoryview) -> None:
        read_parts(raw(self._in), f"{self._prefix}:s:{self._id.decode()}:{number}", target)

    def _tell(self, frame: Frame) -> None:
        if frame.kind == links.SKIPPED:
            self._leave.pop(frame.lease, None)
        with as_broken():
            alive = self._push(frame.pack())
        if not alive:
            error = ConnectionAbortedError("the trainer gives no sign of life")
            self._break(error)
            raise error

    def _send(self, frame: Frame, body: Any, *, measure: bool) -> float:
        allowed = self._leave.pop(frame.lease, 0)
        if allowed < frame.size:
            self._tell(Frame(ASK, lease=frame.lease, size=frame.size))
            with self._news:
                self._news.wait_for(lambda: frame.lease in self._leave or self._broken or self._closing)
                allowed = self._leave.pop(frame.lease, 0)
        if allowed < frame.size:
            if allowed < 0:
                raise TransportError(
                    f"a batch of {frame.size:,} bytes does not go through the store, of which the trainer's batches "
                    f"may take {-allowed:,}: raise MLQUEUE_BATCHES_STORE_BYTES for the trainer, or make its batches "
                    "smaller."
                )
            raise EOFError("the trainer has gone.")
        begun, key = time.perf_counter(), f"{self._prefix}:d:{self._id.decode()}:{frame.lease}"
        with as_broken():
            write_parts(raw(self._data), key, body, apart=self._apart)
        seconds = time.perf_counter() - begun
        try:
            self._tell(frame)
        except OSError:
            with contextlib.suppress(*ERRORS):
                delete_parts(self._data, key)
            raise
        return seconds

    def _cut(self) -> None:
        # Not the one for data: the thread that sends deletes what nobody will read.
        for connection in self._opened[:2]:
            shut(connection)

    def _disconnect(self) -> None:
        for connection in self._opened:
            connection.disconnect()

    def _part(self) -> None:
        self._push(Frame(BYE).pack())

    def close(self) -> None:
        super().close()
        self._disconnect()


@contextlib.contextmanager
def as_broken() -> Any:
    """What goes wrong with the store breaks the connection to the trainer."""
    try:
        yield
    except (EOFError, StoreError, redis.RedisError, TransportError, GoneError) as error:
        raise ConnectionAbortedError(str(error) or "a part of a source is gone") from error
