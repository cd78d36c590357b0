"""What several test modules use: waiting with a deadline, and a proxy that counts what is sent to the store."""

from __future__ import annotations

import collections
import contextlib
import socket
import socketserver
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from importlib import resources
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import dramatiq
import dramatiq.broker
import redis

from mlqueue import MLQ, Settings
from mlqueue.store.scripts import script

T = TypeVar("T")

StartWorker = Callable[..., dramatiq.Worker]


def eventually(look: Callable[[], T], timeout: float = 15.0) -> T:
    """What `look` gives, as soon as it is true."""
    deadline = time.monotonic() + timeout
    while True:
        seen = look()
        if seen:
            return seen
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:g} s; last seen: {seen!r}")
        threading.Event().wait(0.005)


@contextlib.contextmanager
def fresh_app(settings: Settings) -> Iterator[MLQ]:
    before = dramatiq.broker.global_broker
    app = MLQ(f"test-{uuid.uuid4().hex[:12]}", settings=settings)
    try:
        yield app
    finally:
        dramatiq.broker.global_broker = before
        for key in app.client.scan_iter(f"{app.store.root}:*", count=1000):
            app.client.unlink(key)
        app.close()


def children() -> set[int]:
    found: set[int] = set()
    for task in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(int(pid) for pid in task.read_text().split())
    return {pid for pid in found if not is_resource_tracker(pid)}


def is_resource_tracker(pid: int) -> bool:
    """Whether a process is multiprocessing's own, which it starts once and keeps until the program ends."""
    with contextlib.suppress(OSError):
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


class Proxy:
    """Stands before a server, passes everything on, and counts the commands by name."""

    def __init__(self, url: str, listen: str) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.upstream = urlsplit(url)
        proxy = self

        class Connection(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with proxy.connect() as upstream:
                    back = threading.Thread(target=_copy, args=(upstream, self.request), daemon=True)
                    back.start()
                    pending = b""
                    while True:
                        try:
                            data = self.request.recv(65536)
                        except OSError:
                            break
                        if not data:
                            break
                        pending = proxy.count(pending + data)
                        upstream.sendall(data)
                    with contextlib.suppress(OSError):
                        upstream.shutdown(socket.SHUT_RDWR)
                    back.join(5)

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True
            block_on_close = True

        self.server = Server(listen, Connection)
        database = parse_qs(self.upstream.query).get("db", [self.upstream.path.strip("/") or "0"])[0]
        if self.upstream.scheme == "unix":
            database = parse_qs(self.upstream.query).get("db", ["0"])[0]
        user = f"{self.upstream.username or ''}:{self.upstream.password}@" if self.upstream.password else ""
        self.url = f"unix://{user}{listen}?db={database}"

    def connect(self) -> socket.socket:
        if self.upstream.scheme == "unix":
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(unquote(self.upstream.path))
            return upstream
        return socket.create_connection((self.upstream.hostname, self.upstream.port or 6379))

    def count(self, data: bytes) -> bytes:
        """Counts the whole commands in `data`; what is left of one that has not ended."""
        while data[:1] == b"*":
            at = data.find(b"\r\n") + 2
            if at < 2:
                return data
            name = b""
            for index in range(int(data[1 : at - 2])):
                end = data.find(b"\r\n", at)
                if end < 0:
                    return data
                size = int(data[at + 1 : end])
                if len(data) < end + 2 + size + 2:
                    return data
                if index == 0:
                    name = data[end + 2 : end + 2 + size]
                at = end + 2 + size + 2
            self.counts[name.decode().upper()] += 1
            data = data[at:]
        return data

    @property
    def total(self) -> int:
        return sum(number for name, number in self.counts.items() if name not in ("HELLO", "SELECT", "CLIENT"))


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)


@contextlib.contextmanager
def counting_proxy(url: str) -> Iterator[Proxy]:
    """A proxy that counts commands, none of which sends the text of a script: the server has them all."""
    with contextlib.closing(redis.Redis.from_url(url)) as client:
        for file in (resources.files("mlqueue.store") / "lua").iterdir():
            name, _, _ = file.name.partition(".")
            if name != "common" and not name.startswith("part_"):
                client.script_load(script(name).text)
    with tempfile.TemporaryDirectory(prefix="mlq-") as folder:
        proxy = Proxy(url, str(Path(folder) / "proxy.sock"))
        thread = threading.Thread(target=proxy.server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            proxy.server.shutdown()
            proxy.server.server_close()
            thread.join(5)
