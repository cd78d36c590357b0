"""A file server with ranges and entity tags, that cuts, refuses and waits when it is told to."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from mlqueue.batch.datasets.dataset import DownloadSourceFile

#: Serve contents as the files of shipped sources (the fixture ``publish``).
Publish = Callable[[Sequence[DownloadSourceFile], Sequence[bytes]], None]


@dataclass(kw_only=True)
class Fault:
    """What is wrong with one answer."""

    #: Answer with this status and nothing else.
    status: int | None = None
    #: Send this many bytes of the body, then cut the connection.
    cut_after: int | None = None
    #: Answer a range from this many bytes before its start.
    shifted: int = 0
    #: Answer only when this event is set.
    until: threading.Event | None = None


@dataclass
class Request:
    path: str
    range: str | None
    if_range: str | None
    status: int


@dataclass
class FileServer:
    """Serves ``files`` (name -> bytes) at ``url``."""

    files: dict[str, bytes] = field(default_factory=dict)
    #: Faults for the next requests of a name, the first first.
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    ranges: bool = True
    etags: bool = True
    lengths: bool = True
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        files = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                with contextlib.suppress(ConnectionError):  # who asked has given up
                    files._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = False
        self._server.block_on_close = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}/"

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def __enter__(self) -> FileServer:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/")
        faults = self.faults.get(name)
        fault = faults.pop(0) if faults else Fault()
        asked, if_range = handler.headers.get("Range"), handler.headers.get("If-Range")
        note = Request(name, asked, if_range, 0)
        self.requests.append(note)
        if fault.until is not None and not fault.until.wait(20):
            fault.status = 500
        content = self.files.get(name)
        if fault.status is not None or content is None:
            note.status = fault.status or 404
            handler.send_error(note.status)
            return
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        start = max(0, self._start(asked, if_range, etag) - fault.shifted)
        if start >= len(content) and start:
            note.status = 416
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        note.status = 206 if start else 200
        body = content[start:]
        handler.send_response(note.status)
        if start:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if self.etags:
            handler.send_header("ETag", etag)
        if self.lengths:
            handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body if fault.cut_after is None else body[: fault.cut_after])

    def _start(self, asked: str | None, if_range: str | None, etag: str) -> int:
        if not self.ranges or asked is None or (if_range is not None and if_range != etag):
            return 0
        match = re.fullmatch(r"bytes=(\d+)-", asked)
        assert match is not None, asked
        return int(match[1])
