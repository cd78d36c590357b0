"""A proxy of our own between workers and their server that makes a network's faults on order.

It reads both directions of the protocol, so it knows which answer belongs to which command: the answer to a chosen
script can be lost after the server has carried it out, which is the fault that a plain cut of a connection hardly ever
hits. Besides it can cut all connections, leave them half open (nobody answers, nobody hangs up) and delay answers.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from mlqueue.store.scripts import script

#: The scripts whose runs are known by name.
SCRIPTS = {script(name).sha: name for name in ("enqueue", "turn", "settle", "beat", "sweep", "release", "touch")}

#: Whether the answer to this command is to be lost: the command's name (a script's, or the server's in capitals), its
#: parts, and the answer as `parse` gives it.
Choice = Callable[[str, list[bytes], Any], bool]


def an_enqueue(name: str, parts: list[bytes], answer: Any) -> bool:
    """Jobs were created."""
    return name == "enqueue" and not isinstance(answer, Exception)


def a_fetch(name: str, parts: list[bytes], answer: Any) -> bool:
    """Jobs were given out."""
    return name == "turn" and isinstance(answer, list) and bool(answer[3])


def a_finish(name: str, parts: list[bytes], answer: Any) -> bool:
    """Ends of jobs were written."""
    if isinstance(answer, Exception):
        return False
    # EVALSHA sha 1 root, then for a turn: worker nonce want lease flags number-of-lanes lanes... settles...
    return name == "settle" or (name == "turn" and len(parts) > 10 + 2 * int(parts[9]))


class FaultProxy:
    """Listens on a TCP port of this machine and passes everything on to the server of `url`.

    `url` is what clients are to use. The counts say what has been done to them.
    """

    def __init__(self, url: str) -> None:
        self.upstream = urlsplit(url)
        #: Answers lost so far.
        self.eaten = 0
        #: Seconds that each answer is held back.
        self.delay = 0.0
        self._choice: Choice | None = None
        self._every = 1
        self._left: float = 0
        self._seen = 0
        self._blackhole = False
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._closed = False
        port = self._listener.getsockname()[1]
        user = f"{self.upstream.username or ''}:{self.upstream.password}@" if self.upstream.password else ""
        database = parse_qs(self.upstream.query).get("db", [self.upstream.path.strip("/")])[0]
        if self.upstream.scheme == "unix":
            database = parse_qs(self.upstream.query).get("db", ["0"])[0]
        self.url = f"redis://{user}127.0.0.1:{port}/{database or 0}"
        self._thread = threading.Thread(target=self._accept, name="fault-proxy", daemon=True)
        self._thread.start()

    def eat(self, choice: Choice, *, times: float = float("inf"), every: int = 1) -> None:
        """From now on the answers that `choice` is true of get lost, and their connections are cut: of those the
        first, then each `every`-th, at most `times`."""
        with self._lock:
            self._choice, self._left, self._every, self._seen = choice, times, every, 0

    def heal(self) -> None:
        """From now on everything is passed on; connections that hang stay so."""
        with self._lock:
            self._choice = None
            self._blackhole = False
            self.delay = 0.0

    def hang(self, *, new: bool = False) -> int:
        """Leaves every connection half open; with `new` those that are made from now on too. How many there were."""
        with self._lock:
            self._blackhole = new
            links = list(self._links)
            for link in links:
                link.silent = True
        return len(links)

    def hang_waiting(self, command: str) -> int:
        """Leaves those connections half open whose client waits for the answer to such a command; how many."""
        with self._lock:
            links = [link for link in self._links if link.waits_for(command)]
            for link in links:
                link.silent = True
        return len(links)

    def cut_all(self) -> int:
        """Resets all connections; how many there were."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.cut()
        return len(links)

    def close(self) -> None:
        """Ends everything."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(5)
        self.cut_all()
        deadline = time.monotonic() + 5
        while self._links and time.monotonic() < deadline:
            time.sleep(0.01)

    def _accept(self) -> None:
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                upstream = self._connect()
            except OSError:
                client.close()
                continue
            with self._lock:
                link = _Link(self, client, upstream)
                link.silent = self._blackhole
                self._links.add(link)
            link.start()

    def _connect(self) -> socket.socket:
        if self.upstream.scheme == "unix":
            upstream = socket.socket(socket.AF_UNIX)
            try:
                upstream.connect(unquote(self.upstream.path))
            except OSError:
                upstream.close()
                raise
            return upstream
        return socket.create_connection((self.upstream.hostname, self.upstream.port or 6379))

    def _is_lost(self, name: str, parts: list[bytes], answer: Any) -> bool:
        with self._lock:
            if self._choice is None or self._left <= 0 or not self._choice(name, parts, answer):
                return False
            self._seen += 1
            if (self._seen - 1) % self._every:
                return False
            self._left -= 1
            self.eaten += 1
            return True

    def _ended(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)


class _Link:
    """One client's connection and its twin to the server."""

    def __init__(self, proxy: FaultProxy, client: socket.socket, upstream: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.upstream = upstream
        #: Whether it is half open: what comes is read and forgotten.
        self.silent = False
        self._commands: collections.deque[tuple[str, list[bytes]]] = collections.deque()
        self._running = 2
        self._lock = threading.Lock()

    def start(self) -> None:
        for target in (self._up, self._down):
            threading.Thread(target=self._run, args=(target,), name="fault-proxy", daemon=True).start()

    def waits_for(self, command: str) -> bool:
        """Whether the answer to such a command is outstanding."""
        return any(name == command for name, _ in list(self._commands))

    def cut(self) -> None:
        """Both sides see it at once, the client as a reset."""
        with contextlib.suppress(OSError):
            self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        for side in (self.client, self.upstream):
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)

    def _run(self, pump: Callable[[], None]) -> None:
        try:
            with contextlib.suppress(OSError):
                pump()
        finally:
            self.cut()
            with self._lock:
                self._running -= 1
                last = not self._running
            if last:
                self.client.close()
                self.upstream.close()
                self.proxy._ended(self)

    def _up(self) -> None:
        pending = b""
        while data := self.client.recv(262_144):
            if self.silent:
                continue
            pending += data
            end = 0
            while (parsed := parse(pending, end)) is not None:
                parts, end = parsed
                self._commands.append((_name(parts), parts))
            # Whole commands only: what is in the air when the link goes silent has not been sent.
            self.upstream.sendall(pending[:end])
            pending = pending[end:]

    def _down(self) -> None:
        pending = b""
        while data := self.upstream.recv(262_144):
            if self.silent:
                continue
            pending += data
            end = 0
            while (parsed := parse(pending, end)) is not None:
                answer, end = parsed
                name, parts = self._commands.popleft()
                if self.proxy._is_lost(name, parts, answer):
                    return
            if not end:
                continue
            if self.proxy.delay:
                time.sleep(self.proxy.delay)
            if not self.silent:
                self.client.sendall(pending[:end])
            pending = pending[end:]


def _name(parts: list[bytes]) -> str:
    command = parts[0].upper().decode()
    if command == "EVALSHA":
        return SCRIPTS.get(parts[1], command)
    if command == "EVAL":
        return SCRIPTS.get(hashlib.sha1(parts[1]).hexdigest().encode(), command)
    return command


class Refusal(Exception):
    """An error that the server answered with."""


def parse(data: bytes, at: int) -> tuple[Any, int] | None:
    """The value of the protocol (version 2) that begins at `at`, and where it ends; None when it is not whole yet."""
    line_end = data.find(b"\r\n", at)
    if line_end < 0:
        return None
    kind, line, at = data[at : at + 1], data[at + 1 : line_end], line_end + 2
    if kind == b":":
        return int(line), at
    if kind == b"+":
        return line, at
    if kind == b"-":
        return Refusal(line.decode(errors="replace")), at
    size = int(line)
    if size < 0:
        return None if kind not in b"$*" else (None, at)
    if kind == b"$":
        return (data[at : at + size], at + size + 2) if len(data) >= at + size + 2 else None
    if kind != b"*":
        raise ValueError(f"no value of protocol 2: {kind!r}")
    items = []
    for _ in range(size):
        parsed = parse(data, at)
        if parsed is None:
            return None
        item, at = parsed
        items.append(item)
    return items, at


@contextlib.contextmanager
def fault_proxy(url: str) -> Iterator[FaultProxy]:
    """A proxy before the server of `url`, until the end of the block."""
    proxy = FaultProxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
