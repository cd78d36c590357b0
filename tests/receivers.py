"""Receivers of callbacks: servers that answer as they are told, well or badly, and note what they are asked."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import gzip
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

#: What a receiver does with a connection whose request it has read: a status to answer with, or something worse.
Answer = int | Callable[["Receiver", socket.socket], None]


@dataclasses.dataclass(frozen=True)
class Call:
    """A request as it came in."""

    #: Path and query, as sent.
    target: str
    headers: dict[str, str]
    at: float
    method: str = "GET"
    body: bytes = b""

    @property
    def query(self) -> dict[str, str]:
        return {name: values[-1] for name, values in parse_qs(urlsplit(self.target).query, True).items()}

    @property
    def event(self) -> dict[str, Any]:
        """What a webhook has told."""
        found: dict[str, Any] = json.loads(self.body)
        return found

    @property
    def job_id(self) -> str:
        return str(self.event["data"]["job_id"]) if self.body else self.query.get("job_id", "")

    @property
    def told(self) -> tuple[str, str]:
        """What was told of the job: success and short result."""
        return self.query["success"], self.query["short_result"]


class Receiver:
    """A server on a free port of `host`: the k-th call for a job gets the k-th answer, further ones the last."""

    def __init__(
        self, *answers: Answer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.answers = answers or (200,)
        self.calls: list[Call] = []
        self.closing = threading.Event()
        self.tls = tls
        self._seen: collections.Counter[str] = collections.Counter()
        self._lock = threading.Lock()
        self._listener = socket.create_server((host, port), family=family, backlog=512)
        self.port: int = self._listener.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        self.url = f"{'https' if tls else 'http'}://{name}:{self.port}/hook"
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(connection,), daemon=True)
            with self._lock:
                thread.start()
                self._threads.append(thread)

    def _serve(self, connection: socket.socket) -> None:
        # Who called may hang up whenever it likes.
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            stack.enter_context(connection).settimeout(10)
            if self.tls is not None:
                connection = stack.enter_context(self.tls.wrap_socket(connection, server_side=True))
            call = self._read(connection)
            if call is None:
                return
            job = call.job_id
            with self._lock:
                self.calls.append(call)
                answer = self.answers[min(self._seen[job], len(self.answers) - 1)]
                self._seen[job] += 1
            if isinstance(answer, int):
                head = f"HTTP/1.1 {answer} Because\r\nContent-Length: 2\r\nRetry-After: 3600\r\n\r\nok"
                connection.sendall(head.encode())
            else:
                answer(self, connection)

    def _read(self, connection: socket.socket) -> Call | None:
        data = b""
        while b"\r\n\r\n" not in data:
            got = connection.recv(65536)
            if not got:
                return None
            data += got
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        while len(body) < int(headers.get("Content-Length", 0)):
            got = connection.recv(65536)
            if not got:
                return None
            body += got
        method, target, _ = first.split(" ")
        return Call(target, headers, time.time(), method, body)

    def of(self, job_id: str) -> list[Call]:
        """The calls for a job."""
        with self._lock:
            return [call for call in self.calls if call.job_id == job_id]

    def close(self) -> None:
        self.closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        while self._threads:
            self._threads.pop().join(10)


@contextlib.contextmanager
def receiver(
    *answers: Answer, host: str = "127.0.0.1", port: int = 0, tls: ssl.SSLContext | None = None
) -> Iterator[Receiver]:
    server = Receiver(*answers, host=host, port=port, tls=tls)
    try:
        yield server
    finally:
        server.close()


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
        return port


def answers(status: int, **headers: str) -> Answer:
    """A status, with these headers and no other."""
    lines = [
        f"HTTP/1.1 {status} Because",
        "Content-Length: 0",
        *(f"{k.replace('_', '-')}: {v}" for k, v in headers.items()),
    ]

    def answer(receiver: Receiver, connection: socket.socket) -> None:
        connection.sendall("\r\n".join([*lines, "", ""]).encode())

    return answer


# Bad answers


def hangs(receiver: Receiver, connection: socket.socket) -> None:
    """Says nothing."""
    receiver.closing.wait()


def drips(receiver: Receiver, connection: socket.socket) -> None:
    """A byte of an endless status line now and then."""
    connection.sendall(b"HTTP/1.1 200 ")
    _drip(receiver, connection)


def drips_headers(receiver: Receiver, connection: socket.socket) -> None:
    """A byte of an endless header now and then."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Drip: ")
    _drip(receiver, connection)


def drips_body(receiver: Receiver, connection: socket.socket) -> None:
    """A whole head, and then a byte of an endless body now and then."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n")
    _drip(receiver, connection)


def _drip(receiver: Receiver, connection: socket.socket) -> None:
    while not receiver.closing.wait(0.02):
        connection.sendall(b"x")


def hangs_up(receiver: Receiver, connection: socket.socket) -> None:
    """Closes the connection without an answer."""


def hangs_up_in_the_head(receiver: Receiver, connection: socket.socket) -> None:
    """Closes the connection in the middle of the status line."""
    connection.sendall(b"HTTP/1.")


def speaks_something_else(receiver: Receiver, connection: socket.socket) -> None:
    """Sends back, as no HTTP, what it was sent."""
    connection.sendall(receiver.calls[-1].target.encode() + b"\r\n\r\n")


def floods(receiver: Receiver, connection: socket.socket) -> None:
    """Ten gigabytes of body."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000000\r\n\r\n")
    block = bytes(2**20)
    while not receiver.closing.is_set():
        connection.sendall(block)


def floods_headers(receiver: Receiver, connection: socket.socket) -> None:
    """A header without an end."""
    connection.sendall(b"HTTP/1.1 200 OK\r\nX-Flood: ")
    block = b"x" * 2**20
    while not receiver.closing.is_set():
        connection.sendall(block)


@functools.cache
def bomb() -> bytes:
    return gzip.compress(bytes(50 * 2**20), compresslevel=1)


def bombs(receiver: Receiver, connection: socket.socket) -> None:
    """A body that would be large if it were decoded."""
    body = bomb()
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body))
    connection.sendall(body)


def redirects_to(url: str) -> Answer:
    """Sends the caller elsewhere."""

    def redirect(receiver: Receiver, connection: socket.socket) -> None:
        connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {url}\r\nContent-Length: 0\r\n\r\n".encode())

    return redirect
