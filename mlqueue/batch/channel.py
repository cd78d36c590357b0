"""Connections between hosts: bytes in, bytes out, straight from and into memory, with or without TLS.

Where the system can, what is sent is not copied at all: its pages are lent to the connection (:meth:`Channel.lend`).
What is received is copied once, into the memory that it is for.

One thread may read from a :class:`Channel` while another writes to it. OpenSSL's connections are not for two threads at
a time; with TLS each call is therefore one that does not wait, under a lock, and the waiting is done outside.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import socket
import ssl
import struct
import sys
import termios
import threading
import time
from typing import Any, Final

__all__ = ["Channel"]

#: How many bytes are asked for at once. Many, since each call has to wait for Python's global lock when it returns.
PIECE: Final = 1 << 22
#: Who waits for much is woken when there are so many bytes, not at each packet: waking takes the sender, in whose time
#: packets of the same host arrive, longer than copying them.
WAKE: Final = 1 << 18
#: How many bytes are read ahead of what was asked for.
AHEAD: Final = 4096
#: How long what was sent may stay unacknowledged, until the connection counts as broken; in seconds.
UNHEARD: Final = 10.0
#: The congestion control that every Linux has, and that does nothing but what TCP has to.
PLAIN: Final = b"reno"
IDLE: Final = (ssl.SSLWantReadError, ssl.SSLWantWriteError)


class Channel:
    """A connected TCP socket, which belongs to it from now on."""

    def __init__(self, connection: socket.socket, *, timeout: float | None = None) -> None:
        self.socket = connection
        self._tls = isinstance(connection, ssl.SSLSocket)
        self._lock = threading.Lock()  # of the TLS connection
        self._ahead = memoryview(b"")
        self._woken_at = 1
        #: Whether :meth:`lend` can be used.
        self.lends = sys.platform == "linux" and not self._tls
        self._deadline = None if timeout is None else time.monotonic() + timeout
        tune(connection)
        connection.settimeout(0.0 if self._tls else timeout)

    def without_deadline(self) -> None:
        """From now on reads and writes take as long as they take; before, `timeout` seconds in all."""
        self._deadline = None
        if not self._tls:
            self.socket.settimeout(None)

    # --- reading ---

    def read(self, size: int) -> bytes:
        """So many bytes, few of them. Raises EOFError at the end of the connection, OSError when it breaks."""
        data = bytearray(size)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, target: memoryview) -> None:
        """Fill `target`. What is large arrives there without a copy in between."""
        done = self._take_ahead(target)
        while done < len(target):
            left = target[done:]
            if len(left) < AHEAD:
                self._read_ahead(AHEAD)
                done += self._take_ahead(left)
            elif self._wake_later(len(left)):
                done += self._receive(left[: min(PIECE, len(left) - WAKE)], wait_all=True)
            else:
                done += self._receive(left[:PIECE], wait_all=True)

    def _wake_later(self, left: int) -> bool:
        """Have the system wake us when there is much, unless little is left, for which we would wait in vain."""
        later = left > 2 * WAKE
        return self.wake_for(WAKE if later else 1) and later

    def wake_for(self, least: int) -> bool:
        """Have the system wake who reads only for so many bytes, or for the end; whether it can do that."""
        can = sys.platform == "linux" and not self._tls
        if can and least != self._woken_at:
            self._woken_at = least
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
        return can

    def _take_ahead(self, target: memoryview) -> int:
        size = min(len(self._ahead), len(target))
        target[:size] = self._ahead[:size]
        self._ahead = self._ahead[size:]
        return size

    def _read_ahead(self, size: int) -> None:
        data = memoryview(bytearray(size))
        self._ahead = data[: self._receive(data, wait_all=False)]

    def _receive(self, target: memoryview, *, wait_all: bool) -> int:
        got = 0
        if not self._tls:
            if self._deadline is not None:
                self.socket.settimeout(max(0.001, self._deadline - time.monotonic()))
            got = self.socket.recv_into(target, 0, socket.MSG_WAITALL if wait_all else 0)
        while self._tls:
            try:
                with self._lock:
                    got = self.socket.recv_into(target)
                break
            except IDLE as error:
                self._wait(error)
        if not got:
            raise EOFError("the other side of the connection has ended.")
        return got

    # --- writing; one thread at a time ---

    def write(self, *parts: Any) -> None:
        """Send all bytes of these parts. Raises OSError when the connection breaks."""
        views = [memoryview(part).cast("B") for part in parts]
        for view in views[:-1]:
            self._send_all(view, more=True)
        self._send_all(views[-1], more=False)

    def _send_all(self, view: memoryview, *, more: bool) -> None:
        if not self._tls:
            self.socket.sendall(view, getattr(socket, "MSG_MORE", 0) if more else 0)
            return
        done = 0
        while done < len(view):
            try:
                with self._lock:
                    done += self.socket.send(view[done : done + 65536])
            except IDLE as error:
                self._wait(error)

    def lend(self, head: Any, fd: int, place: int, size: int) -> None:
        """Send `head`, and `size` bytes of a file of memory behind it, from `place` on. Raises OSError when the
        connection breaks.

        They are not copied, and may not be written to before the other side has said that it has received them: that
        it has acknowledged them is not enough, since on the same host its system reads the same pages. Only where
        :attr:`lends` is true.
        """
        self._send_all(memoryview(head).cast("B"), more=True)
        end = place + size
        while place < end:
            sent = os.sendfile(self.socket.fileno(), fd, place, end - place)
            if not sent:
                raise OSError(f"a file of memory ends at byte {place:,}, not {end:,}.")
            place += sent

    def write_now(self, view: memoryview) -> int:
        """Send what can be sent without waiting; how many bytes."""
        done = 0
        with contextlib.suppress(BlockingIOError, *IDLE):
            while done < len(view):
                if self._tls:
                    with self._lock:
                        done += self.socket.send(view[done : done + 65536])
                else:
                    done += self.socket.send(view[done:], socket.MSG_DONTWAIT)
        return done

    def unsent(self) -> int:
        """How many bytes of what was written the other side has not acknowledged; 0 where the system does not tell."""
        return unacknowledged(self.socket)

    # --- both ---

    def _wait(self, error: ssl.SSLError) -> None:
        left = None if self._deadline is None else self._deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("the other side of the connection takes too long.")
        poll = select.poll()
        poll.register(self.socket, select.POLLIN if isinstance(error, ssl.SSLWantReadError) else select.POLLOUT)
        poll.poll(None if left is None else left * 1000)

    def shut(self) -> None:
        """End the connection: whoever reads from it or writes to it is told. Any thread may do it."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self.socket, socket.SHUT_RDWR)  # of TLS the connection below it

    def close(self) -> None:
        """Let go of it; the thread that reads does it, when it has ended."""
        self.shut()
        with contextlib.suppress(OSError):
            self.socket.close()


def tune(connection: socket.socket) -> None:
    """Small records go at once, and a peer that cannot be reached any more is noticed.

    Within a host no line is shared with others: a congestion control that spaces packets out, as BBR does, would only
    take time.
    """
    options: list[tuple[int, str, Any]] = [
        (socket.IPPROTO_TCP, "TCP_NODELAY", 1),
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", 4),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", 2),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", 3),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", int(UNHEARD * 1000)),
    ]
    if is_within_host(connection):
        options.append((socket.IPPROTO_TCP, "TCP_CONGESTION", PLAIN))
    for level, name, value in options:
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                connection.setsockopt(level, getattr(socket, name), value)


def is_within_host(connection: socket.socket) -> bool:
    """Whether both ends have the same address."""
    try:
        return connection.family != socket.AF_UNIX and connection.getpeername()[0] == connection.getsockname()[0]
    except OSError:
        return False  # it has ended


def unacknowledged(connection: socket.socket) -> int:
    """The bytes in the send queue of a TCP socket (Linux); 0 elsewhere."""
    try:
        told = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, b"\0" * 4)
        return int(struct.unpack("i", told)[0])
    except (OSError, AttributeError):
        return 0
