"""The way to a trainer on another host by TCP.

A worker makes two connections, one for control and orders, one for data (see `remote`). On each of them, both sides
prove that they have the signing key before anything else is said (all numbers little-endian)::

    trainer -> worker   CHALLENGE   magic, 32 random bytes
    worker -> trainer   HELLO       32 random bytes, session, which connection, process, pid, job, host, signature
    trainer -> worker   VERDICT     whether it is welcome, signature

The signatures are HMACs, with a key derived for this purpose alone, over the token of the job, both random numbers and
the HELLO; who signs is part of it, so that nothing can be sent back to where it is from. The token binds them to this
trainer: another one with the same key, at the same port later, is not mistaken for it. What follows is neither signed
nor encrypted; where the network is not to be trusted, both are the business of TLS.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from mlqueue.batch import links
from mlqueue.batch.channel import Channel
from mlqueue.batch.remote import (
    FRAME,
    MAX_REQUEST,
    MAX_SOURCE,
    ORDER,
    PADDING,
    PREPARING,
    RECEIVED,
    WITH_BODY,
    Frame,
    Hostile,
    OrderRecord,
    RemoteDoor,
    RemoteLink,
    RemotePeer,
    bare,
    readable,
    source_segment,
)
from mlqueue.batch.transport import HEADER_BYTES, Segment
from mlqueue.errors import SignatureInvalid
from mlqueue.settings import Settings
from mlqueue.signing import SIZE, Keyring

__all__ = ["TcpDoor", "TcpLink", "trainer_tls"]

logger = logging.getLogger("mlqueue.batches")

#: What the key is derived for.
PURPOSE: Final = "batches between hosts"

#: The version of what is spoken stands in it.
MAGIC: Final = b"mlqueue-batch-1\n"
CHALLENGE: Final = struct.Struct("<16s32s")
HELLO: Final = struct.Struct("<32s16sB7x16sQ128s64s")
VERDICT: Final = struct.Struct(f"<B7x{SIZE}s")
CONTROL, DATA = 0, 1
WELCOME, STRANGER = 1, 2

#: How long both may take to prove who they are, in seconds.
HANDSHAKE: Final = 5.0
#: Batches of fewer bytes are copied on their way: that takes less time than to wait for word that they have arrived.
LENT: Final = 1 << 18
#: Orders of so many bytes are sent in one piece, with what they carry.
TOGETHER: Final = 1 << 16
#: What a worker is preparing need not be known before it dies, and waking the trainer for it takes longer than to read
#: it: so the trainer is woken for so many bytes of control, or their end. What is urgent comes with as many behind it.
PADDED: Final = 4096
#: How long connecting may take, in seconds.
CONNECT: Final = 3.0
#: How many that have connected may be proving who they are at a time; further ones are let go at once.
MOST_UNKNOWN: Final = 64
#: For how long the address of a trainer that could not be reached is not tried again, in seconds.
AVOIDED: Final = 15.0

#: How connections end to a host that has not gone as far as is known; the worker may still be there.
UNREACHABLE: Final = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.EHOSTDOWN)


class Hello(NamedTuple):
    """Who a worker is."""

    nonce: bytes
    #: The same on both of its connections.
    session: bytes
    connection: int
    process: bytes
    pid: int
    job: bytes
    host: bytes


# --- the trainer's side ---


def trainer_tls(settings: Settings) -> ssl.SSLContext | None:
    """How a trainer speaks TLS; None where it does not."""
    if settings.batches_tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=settings.batches_tls_ca)
    context.load_cert_chain(settings.batches_tls_cert, settings.batches_tls_key)
    if settings.batches_tls_ca is not None:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def worker_tls(settings: Settings) -> ssl.SSLContext | None:
    """How a worker speaks TLS; None where it does not."""
    if settings.batches_tls_ca is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=settings.batches_tls_ca)
    if settings.batches_tls_cert is not None:
        context.load_cert_chain(settings.batches_tls_cert, settings.batches_tls_key)
    return context


class TcpDoor(RemoteDoor["TcpPeer"]):
    """Where workers of other hosts come to a trainer, by TCP.

    Parameters:
      settings: Those of the trainer; they have a signing key.
      host: The address to listen at; empty for all that there are.
      port: The port, 0 for any that is free.
      tls: How it speaks TLS; None where it does not.
      told: What workers are to connect to instead, as hosts and ports (0: that of this door).
    """

    def __init__(
        self,
        settings: Settings,
        host: str,
        port: int,
        told: Sequence[tuple[str, int]],
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.token = secrets.token_bytes(32)
        self._keyring = Keyring.of(settings, PURPOSE)
        self._tls = tls
        self._limit = settings.max_batch_bytes
        self._listening = listen(host, port)
        self._listening.settimeout(1.0)  # where closing it does not wake the thread
        address = self._listening.getsockname()
        self._told = [(name, number or address[1]) for name, number in told] or [address[:2]]
        super().__init__()  # not before it listens, which may fail
        self._lock = threading.Lock()
        self._unknown: set[socket.socket] = set()
        self._halves: dict[bytes, tuple[Hello, Channel]] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="mlqueue-batch-door", daemon=True)
        self._thread.start()
        logger.info("workers of other hosts may bring batches to %s", " or ".join(f"{h}:{p}" for h, p in self._told))

    @property
    def address(self) -> dict[str, Any]:
        """Its entry of the address that jobs carry."""
        return {
            "tcp": {
                "addresses": [list(pair) for pair in self._told],
                "token": self.token,
                "tls": self._tls is not None,
                "codecs": readable(),
                "limit": self._limit,
                "lent": True,
                "padded": PADDED,
            }
        }

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError as error:
                if self._closed:
                    return
                if not isinstance(error, TimeoutError):
                    time.sleep(0.05)  # out of descriptors, as a rule
                continue
            with self._lock:
                full = self._closed or len(self._unknown) >= MOST_UNKNOWN
                if not full:
                    self._unknown.add(connection)
            if full:
                connection.close()
                continue
            threading.Thread(target=self._meet, args=(connection,), name="mlqueue-batch-meet", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        """Find out who has connected, in a thread of its own."""
        made: Channel | None = None
        secured: socket.socket = connection
        try:
            where = connection.getpeername()[0]
            connection.settimeout(HANDSHAKE)
            if self._tls is not None:
                secured = self._tls.wrap_socket(connection, server_side=True)
            channel = Channel(secured, timeout=HANDSHAKE)
            hello = self._prove(channel)
            if hello is None:
                logger.warning("somebody at %s has connected who has not our signing key, or is no worker.", where)
            else:
                made = channel
                channel.without_deadline()
        except (OSError, EOFError, ValueError) as error:
            logger.debug("a connection came to nothing: %s", error)
        finally:
            with self._lock:
                self._unknown.discard(connection)
            if made is None:
                secured.close()
        if made is not None and hello is not None:
            self._pair(hello, made)

    def _prove(self, channel: Channel) -> Hello | None:
        nonce = secrets.token_bytes(32)
        channel.write(CHALLENGE.pack(MAGIC, nonce))
        body = channel.read(HELLO.size)
        signature = channel.read(SIZE)
        hello = Hello(*HELLO.unpack(body))
        try:
            self._keyring.verify(signature, b"worker", self.token, nonce, body)
        except SignatureInvalid:
            channel.write(VERDICT.pack(STRANGER, bytes(SIZE)))
            return None
        channel.write(VERDICT.pack(WELCOME, self._keyring.sign(b"trainer", self.token, hello.nonce, nonce, body)))
        return hello

    def _pair(self, hello: Hello, channel: Channel) -> None:
        """Of two connections of one worker, one peer is made."""
        with self._lock:
            other = self._halves.pop(hello.session, None)
            if other is None and not self._closed:
                for session in list(self._halves)[: max(0, len(self._halves) - MOST_UNKNOWN)]:
                    self._halves.pop(session)[1].close()  # its other half has not come for long
                self._halves[hello.session] = hello, channel
                return
            if other is None or self._closed or {other[0].connection, hello.connection} != {CONTROL, DATA}:
                for each in (channel, *([other[1]] if other else [])):
                    each.close()
                return
            control, data = (other[1], channel) if hello.connection == DATA else (channel, other[1])
            self._ready.append(TcpPeer(hello, control, data, self._limit))
        self._ring()

    def let_go(self) -> None:
        """Close what a fork has got of it."""
        self._let_go_bell()
        for each in (self._listening, *self._unknown):
            each.close()
        for _, channel in list(self._halves.values()):
            channel.socket.close()

    def close(self) -> None:
        """Listen no more. Threads that are under way end by themselves."""
        with self._lock:
            self._closed = True
            for connection in self._unknown:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            for _, channel in self._halves.values():
                channel.close()
            self._halves.clear()
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listening.close()

    def join(self) -> None:
        """Wait until it is closed."""
        self._thread.join()
        self._turn_away()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError."""
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    both = not host and socket.has_dualstack_ipv6()
    family, _, _, _, address = next((one for one in found if one[0] == socket.AF_INET6), found[0]) if both else found[0]
    return socket.create_server(address[:2], family=family, dualstack_ipv6=both and family == socket.AF_INET6)


class TcpPeer(RemotePeer):
    """A worker that has come by TCP."""

    road = "TCP"

    def __init__(self, hello: Hello, control: Channel, data: Channel, limit: int) -> None:
        super().__init__(
            pid=hello.pid,
            process=hello.process,
            job=_padded_text(hello.job),
            host=_padded_text(hello.host),
            limit=limit,
        )
        self._control, self._data = control, data
        self._outbox = Outbox(control, self._cut)
        self._over = threading.Lock()
        self._open = 2
        self._unreachable = False
        self._reason: Exception | None = None
        for run, channel in ((self._hear, control), (self._fetch, data)):
            threading.Thread(target=self._guard, args=(run, channel), name="mlqueue-batch-peer", daemon=True).start()

    def _guard(self, run: Any, channel: Channel) -> None:
        gone = True
        try:
            run()
        except EOFError:
            gone = channel is self._data  # after its last word there may be batches on the way
        except Exception as error:  # noqa: BLE001 - whatever it is, this worker is of no use any more
            self._unreachable |= isinstance(error, OSError) and error.errno in UNREACHABLE
            self._reason = self._reason or bare(error)
        if gone:
            self._cut()
        channel.close()
        with self._over:
            self._open -= 1
            over = not self._open
        if over:  # all that it has said has been heard
            self.end(self._reason or EOFError("the worker has gone."))

    def _hear(self) -> None:
        while True:
            frame = Frame.unpack(self._control.read(FRAME.size))
            if frame.kind != PADDING:
                self.heard(frame)
                continue
            if frame.size > PADDED:
                raise Hostile(f"a worker on {self.host} has sent padding of {frame.size:,} bytes; it is cut off.")
            self._control.read(frame.size)
            self._control.wake_for(PADDED)  # it pads what is urgent

    def _fetch(self) -> None:
        while True:
            frame = Frame.unpack(self._data.read(FRAME.size))
            if frame.kind not in WITH_BODY:
                raise Hostile(f"a worker on {self.host} has sent a frame of kind {frame.kind}; it is cut off.")
            self.receive(frame, self._data.read_into, self._throw_away)
            if frame.lent:
                self._outbox.put(OrderRecord(RECEIVED, frame.lease).pack(), now=False)
            self.announce()

    def _throw_away(self, size: int) -> None:
        scratch = memoryview(bytearray(min(size, 1 << 20)))
        while size:
            part = scratch[: min(size, len(scratch))]
            self._data.read_into(part)
            size -= len(part)

    def has_died(self, silent: bool) -> bool:
        return not silent and not self._unreachable

    def tell(self, kind: int, number: int = 0) -> None:
        if kind == links.END:
            self._outbox.wait_no_more()  # it leaves when it knows that all it has sent was received
        super().tell(kind, number)

    def _order(self, record: OrderRecord, content: Any = b"") -> None:
        self._outbox.put(record.pack(), content)

    def _cut(self) -> None:
        self._control.shut()
        self._data.shut()
        self._outbox.close()

    def let_go(self) -> None:
        super().let_go()
        self._control.socket.close()
        self._data.socket.close()


class Outbox:
    """What is to be sent over a channel, at once where it takes it at once, else by a thread. `failed` is called when
    that is not possible any more.

    What may wait goes with the next that may not, or that may wait too: a message of its own would wake the worker once
    more, in which time it could have sent a part of a batch.
    """

    def __init__(self, channel: Channel, failed: Callable[[], None]) -> None:
        self._channel, self._failed = channel, failed
        self._news = threading.Condition()
        self._parts: deque[memoryview] = deque()
        self._later = b""
        self._may_wait = True
        self._thread: threading.Thread | None = None
        self._closed = False

    def put(self, *parts: Any, now: bool = True) -> None:
        """Send these bytes after those before; waits for nothing. Not `now`: it may wait for others."""
        views = [view for view in (memoryview(part).cast("B") for part in parts) if len(view)]
        with self._news:
            if self._closed:
                return
            if self._may_wait and not now and not self._later:
                self._later = b"".join(views)
                return
            views.insert(0, memoryview(self._later))
            self._later = b""
            if sum(map(len, views)) <= TOGETHER:
                views = [memoryview(b"".join(views))]
            try:
                while views and not self._parts:
                    sent = self._channel.write_now(views[0])
                    views[0] = views[0][sent:]
                    if len(views[0]):
                        break
                    del views[0]
            except OSError:
                self._closed = True
                self._failed()
                return
            self._parts.extend(views)
            if not self._parts:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._send, name="mlqueue-batch-out", daemon=True)
                self._thread.start()
            self._news.notify()

    def wait_no_more(self) -> None:
        """From now on nothing may wait: there are no others that it could go with."""
        with self._news:
            self._may_wait = False

    def _send(self) -> None:
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._parts or self._closed)
                    if self._closed:
                        return
                    part = self._parts[0]
                self._channel.write(part)
                with self._news:
                    if self._parts:
                        self._parts.popleft()
        except OSError:
            self._failed()

    def close(self) -> None:
        """Send no more."""
        with self._news:
            self._closed = True
            self._parts.clear()
            self._news.notify()


def _padded_text(data: bytes) -> str:
    return data.rstrip(b"\0").decode(errors="replace")


# --- the worker's side ---

#: Addresses that could not be reached: until when they are not tried.
_avoided: dict[tuple[str, int], float] = {}


class TcpLink(RemoteLink):
    """The way to a trainer by TCP. Raises OSError when it cannot be reached, PermissionError when one of both does not
    trust the other."""

    def __init__(self, entry: dict[str, Any], job_id: str, settings: Settings) -> None:
        allowed = [int(number) for number in entry["codecs"]] if settings.batches_compress == "auto" else []
        super().__init__(allowed, int(entry["limit"]))
        if not settings.signing_keys:
            raise PermissionError("it needs the MLQUEUE_SIGNING_KEY of the trainer, and none is set here")
        keyring = Keyring.of(settings, PURPOSE)
        tls = worker_tls(settings)
        if entry["tls"] and tls is None:
            raise PermissionError("the trainer speaks TLS, and MLQUEUE_BATCHES_TLS_CA is not set here")
        if tls is not None and not entry["tls"]:
            raise PermissionError("MLQUEUE_BATCHES_TLS_CA is set here, and the trainer speaks no TLS")
        session = secrets.token_bytes(16)
        opened: list[Channel] = []
        try:
            for connection in (CONTROL, DATA):
                channel, self.where = reach(entry["addresses"], tls)
                opened.append(channel)
                prove(channel, keyring, entry["token"], session, connection, job_id)
                channel.without_deadline()
        except BaseException:
            for channel in opened:
                channel.close()
            raise
        self._control, self._data = opened
        self._lends = bool(entry.get("lent")) and self._data.lends
        padded = int(entry.get("padded", 0))
        self._padding = Frame(PADDING, size=padded).pack() + bytes(padded) if padded else b""
        self._telling = threading.Lock()
        self._start()

    def _next_order(self) -> tuple[OrderRecord, Any]:
        record = OrderRecord.unpack(self._control.read(ORDER.size))
        if record.kind == links.SOURCE and record.size <= MAX_SOURCE:
            return record, source_segment(record, self._control.read_into)
        if record.size > MAX_REQUEST:
            raise EOFError("the trainer has sent what is no order.")
        return record, self._control.read(record.size) if record.size else b""

    def _tell(self, frame: Frame) -> None:
        padding = b"" if frame.kind == PREPARING else self._padding
        with self._telling:
            self._control.write(frame.pack() + padding)

    def _send(self, frame: Frame, body: Any, *, measure: bool) -> float:
        begun = time.perf_counter()
        self._data.write(frame.pack(), body)
        return self._seconds(begun, measure)

    def _may_lend(self, size: int) -> bool:
        return self._lends and size >= LENT

    def _lend(self, frame: Frame, segment: Segment, *, measure: bool) -> float:
        begun = time.perf_counter()
        self._data.lend(frame.pack(), segment.fd, HEADER_BYTES, frame.size)
        return self._seconds(begun, measure)

    def _seconds(self, begun: float, measure: bool) -> float:
        """How long sending has taken, with the way to the other side where that is to be measured."""
        while measure and self._data.unsent() and time.perf_counter() - begun < 1.0:
            time.sleep(0.0002)
        return time.perf_counter() - begun

    def _cut(self) -> None:
        self._control.shut()
        self._data.shut()

    def close(self) -> None:
        super().close()
        self._control.close()
        self._data.close()


def reach(addresses: Sequence[Sequence[Any]], tls: ssl.SSLContext | None) -> tuple[Channel, str]:
    """A channel to the first of these addresses that can be reached, and which it is. Raises OSError."""
    reasons = []
    for host, port in addresses:
        if _avoided.get((host, port), 0.0) > time.monotonic():
            reasons.append(f"{host}:{port} could not be reached a moment ago")
            continue
        try:
            connection = socket.create_connection((host, port), CONNECT)
        except OSError as error:
            _avoided[host, port] = time.monotonic() + AVOIDED
            reasons.append(f"{host}:{port}: {error.strerror or error}")
            continue
        try:
            connection.settimeout(HANDSHAKE)
            secured = tls.wrap_socket(connection, server_hostname=host) if tls is not None else connection
            return Channel(secured, timeout=HANDSHAKE), f"{host}:{port}"
        except (OSError, ValueError) as error:  # ssl.SSLError is one
            connection.close()
            reasons.append(f"{host}:{port}: {error}")
    raise OSError("; ".join(reasons) or "the trainer names no address")


def prove(channel: Channel, keyring: Keyring, token: bytes, session: bytes, connection: int, job_id: str) -> None:
    """Show the trainer who this is, and have it show who it is. Raises PermissionError."""
    try:
        magic, nonce = CHALLENGE.unpack(channel.read(CHALLENGE.size))
        if magic != MAGIC:
            raise PermissionError(f"{channel.socket.getpeername()} is no trainer, or one of another version")
        process = links.PROCESS[:8] + os.getpid().to_bytes(8, "little")
        host = socket.gethostname().encode()[:64]
        hello = Hello(secrets.token_bytes(32), session, connection, process, os.getpid(), job_id.encode()[:128], host)
        body = HELLO.pack(*hello)
        channel.write(body, keyring.sign(b"worker", token, nonce, body))
        verdict, signature = VERDICT.unpack(channel.read(VERDICT.size))
        if verdict != WELCOME:
            raise PermissionError("the trainer refuses us: its MLQUEUE_SIGNING_KEY is another one")
        keyring.verify(signature, b"trainer", token, hello.nonce, nonce, body)
    except EOFError as error:
        raise OSError(str(error)) from None
    except SignatureInvalid:
        raise PermissionError("who listens there has not the MLQUEUE_SIGNING_KEY of this process") from None
