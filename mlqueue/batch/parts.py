"""Batches and sources in parts of a megabyte through a store, straight from the memory of one process into that of
another; and the lists by which both sides of `through_store` tell each other of them.

What is large bypasses redis-py, which copies it several times over: it is written to and read from the socket of its
connection.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable
from typing import Any, Final

import redis

from mlqueue.batch.remote import Hostile
from mlqueue.errors import StoreError

__all__ = ["GoneError", "call", "delete_parts", "hands_on", "pop", "push", "raw", "read_parts", "write_parts"]

#: The bytes of a part.
PART: Final = 1 << 20
#: How many parts are asked for ahead.
ASKED_AHEAD: Final = 4
#: For how long a key stays when nobody comes for it, in seconds.
TTL: Final = 60.0
#: How many keys are deleted at once.
AT_ONCE: Final = 64

#: How long one waits for the store to say something, in seconds, and how much is taken at once.
WAIT: Final = 1
MOST_AT_ONCE: Final = 255

#: Keeps a part in the memory of this server alone: not in its append-only file, of which batches would take far more
#: than all else together, nor in that of its replicas. What a server that takes over has not got is prepared anew.
PUT: Final = b"redis.set_repl(redis.REPL_NONE) return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"
#: The commands for it up to the content: that way, and where the server keeps all to itself.
SET_HEAD: Final = b"*5\r\n$3\r\nSET\r\n$%d\r\n%s\r\n$%d\r\n"
PUT_HEAD: Final = b"*6\r\n$4\r\nEVAL\r\n$%d\r\n%s\r\n$1\r\n1\r\n$%%d\r\n%%s\r\n$%%d\r\n" % (len(PUT), PUT)


class GoneError(Exception):
    """A part is not there any more."""


def write_parts(connection: socket.socket, key: str, body: Any, ttl: float = TTL, *, apart: bool = True) -> None:
    """Store `body` in parts under the keys ``{key}:0``, ``{key}:1`` ... Raises StoreError when the store refuses one,
    OSError when the connection breaks; it is of no use after either.

    `apart`: Keep it out of the server's append-only file and its replicas; False where it has neither (`hands_on`).
    """
    whole = memoryview(body).cast("B")
    count = parts_of(len(whole))
    milliseconds = str(int(ttl * 1000)).encode()
    head, end = (PUT_HEAD, b"") if apart else (SET_HEAD, b"$2\r\nPX\r\n")
    tail = b"\r\n%s$%d\r\n%s\r\n" % (end, len(milliseconds), milliseconds)
    for number in range(count):
        part = whole[number * PART : (number + 1) * PART]
        name = f"{key}:{number}".encode()
        send_all(connection, head % (len(name), name, len(part)), more=True)
        send_all(connection, part, more=True)
        send_all(connection, tail, more=number < count - 1)
    answers = Answers(connection)
    for _ in range(count):
        answer = answers.line()
        if answer != b"+OK":
            raise StoreError(f"the store takes no batch: {answer[1:].decode(errors='replace')}")


def hands_on(connection: Any) -> bool:
    """Whether the server of a connection of redis-py hands on what is written to it: to a file, or to replicas. A
    script that keeps it from doing so takes it twice as long as a mere SET."""
    try:
        connection.send_command("INFO")
        told = dict(line.split(":", 1) for line in connection.read_response().decode().splitlines() if ":" in line)
    except redis.ResponseError:
        return True  # we may not ask
    return told.get("aof_enabled") != "0" or told.get("connected_slaves") != "0"


def read_parts(connection: socket.socket, key: str, target: memoryview) -> None:
    """Read what :func:`write_parts` has stored into `target`, and delete it. Raises GoneError when a part is not there,
    Hostile when one has not its size, OSError when the connection breaks."""
    count = parts_of(len(target))
    answers = Answers(connection)
    asked = 0
    gone = False
    for number in range(count):
        while asked < min(count, number + ASKED_AHEAD):
            name = f"{key}:{asked}".encode()
            send_all(connection, b"*2\r\n$6\r\nGETDEL\r\n$%d\r\n%s\r\n" % (len(name), name))
            asked += 1
        part = target[number * PART : (number + 1) * PART]
        gone |= not answers.bulk_into(part)
    if gone:
        raise GoneError


def delete_parts(connection: Any, key: str) -> None:
    """Delete what is there of one key, over a connection of redis-py."""
    at = 0
    while call(connection, ("UNLINK", *[f"{key}:{number}" for number in range(at, at + AT_ONCE)]))[0]:
        at += AT_ONCE


def parts_of(size: int) -> int:
    return -(-size // PART)


def send_all(connection: socket.socket, data: Any, *, more: bool = False) -> None:
    plain = not hasattr(connection, "pending")  # TLS takes no flags
    connection.sendall(data, getattr(socket, "MSG_MORE", 0) if more and plain else 0)


class Answers:
    """What a store says, read as it comes."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ahead = b""

    def line(self) -> bytes:
        """The next line, without its end."""
        while b"\r\n" not in self._ahead:
            if len(self._ahead) > PART:
                raise EOFError("the store does not speak its protocol.")
            self._ahead += self._some(4096)
        line, _, self._ahead = self._ahead.partition(b"\r\n")
        return line

    def _some(self, size: int) -> bytes:
        data = self._connection.recv(size)
        if not data:
            raise EOFError("the store has closed the connection.")
        return data

    def bulk_into(self, target: memoryview) -> bool:
        """A string that fills `target`; False when there is none."""
        line = self.line()
        if line == b"$-1":
            return False
        if line[:1] != b"$":
            raise StoreError(f"the store gives no batch: {line[1:].decode(errors='replace')}")
        if int(line[1:]) != len(target):
            raise Hostile(f"a part of a batch has {int(line[1:]):,} bytes, not {len(target):,}; its worker is cut off.")
        done = min(len(target), len(self._ahead))
        target[:done] = self._ahead[:done]
        self._ahead = self._ahead[done:]
        flags = 0 if hasattr(self._connection, "pending") else socket.MSG_WAITALL
        while done < len(target):
            got = self._connection.recv_into(target[done:], 0, flags)
            if not got:
                raise EOFError("the store has closed the connection.")
            done += got
        while len(self._ahead) < 2:
            self._ahead += self._some(4096)
        self._ahead = self._ahead[2:]
        return True


def raw(connection: Any) -> socket.socket:
    """The socket of a connection of redis-py, which has nothing of an answer left to read.

    From now on the kernel sees to its timeout: with one of Python's, each call would move no more than is there, and
    wait for the global lock again.
    """
    found: socket.socket = connection._sock
    timeout = found.gettimeout()
    if timeout is not None and not hasattr(found, "pending"):
        limit = struct.pack("ll", int(timeout), int(timeout % 1 * 1e6))
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            found.setsockopt(socket.SOL_SOCKET, option, limit)
        found.settimeout(None)
        if found.family == socket.AF_UNIX:  # of TCP the kernel sees to it
            found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * PART)
    return found


def call(connection: Any, *commands: tuple[Any, ...]) -> list[Any]:
    """What the store answers to these commands, sent at once."""
    connection.send_packed_command(connection.pack_commands(commands))
    return [connection.read_response() for _ in commands]


def push(connection: Any, key: str, items: Iterable[bytes]) -> None:
    """Put items at the end of a list that does not stay for ever."""
    call(connection, ("RPUSH", key, *items), ("PEXPIRE", key, int(TTL * 1000)))


def pop(connection: Any, key: str) -> list[bytes]:
    """What is in a list, waited for for a while."""
    # Not BLMPOP, which takes several at once: it was seen to be answered neither in time nor at all.
    connection.send_command("BLPOP", key, WAIT)
    first = connection.read_response()
    if first is None:
        return []
    [more] = call(connection, ("LPOP", key, MOST_AT_ONCE))
    return [first[1], *(more or ())]
