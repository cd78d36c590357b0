"""`Streams`: how many streams are open at a time, and what ends one from outside.

A stream is an answer that goes on for as long as its client listens. The server's thread that sends it may hang in a
client that does not read: then its connection is shut from outside, which ends that. What a server lets us have of the
connection differs; where there is nothing, a slow client keeps its thread until the server's own time limit.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

from flask import Response

from ..errors import TooManyStreams
from ..events import Filter, Hub, Listener

__all__ = ["Stream", "Streams", "is_alone"]

#: How many streams a process has with gevent, unless told otherwise: fewer than the thousand connections that
#: gunicorn's worker has.
MOST_OF_GEVENT: Final = 800

#: How many with threads: of how many the server has, nothing is said to an app. Two leave some even of waitress' four.
MOST_OF_THREADS: Final = 2

#: How many in Flask's own server, which has a thread for each request.
MOST_OF_DEVELOPMENT: Final = 100

#: Where servers put the connection of a request in its environ: gunicorn, Werkzeug, `mlqueue web`.
CONNECTIONS: Final = ("gunicorn.socket", "werkzeug.socket", "mlqueue.socket")


class Streams:
    """The open streams of a mount in this process.

    Parameters:
      limit: How many there may be; None: as many as the server of a request can do with.
    """

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        # Streams are discarded where the last reference goes, which may be anywhere.
        self._lock = threading.RLock()
        self._open: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._pid = os.getpid()
        self._look_at = 0.0

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, environ: Mapping[str, Any]) -> Stream:
        """A new stream, for a request. Raises `TooManyStreams`."""
        limit = min(_limit_of(environ) if self._limit is None else self._limit, _most_files())
        stream = Stream(self, _connection_of(environ))
        with self._lock:
            if self._pid != os.getpid():
                self._open, self._pid = weakref.WeakSet(), os.getpid()
            if len(self._open) >= limit:
                self._drop_deserted()
            if len(self._open) >= limit:
                raise TooManyStreams(_refusal(limit))
            self._open.add(stream)
        return stream

    def _drop_deserted(self) -> None:
        """Of some the client may have gone: a silent stream learns of that by its next heartbeat, which is late for who
        loads a page anew. A look costs some 20 us for each, so it is not made again at once."""
        if time.monotonic() < self._look_at:
            return
        self._look_at = time.monotonic() + len(self._open) / 5000
        for stream in list(self._open):
            if stream.client_has_gone():
                stream.end()
                self._open.discard(stream)

    def discard(self, stream: Stream) -> None:
        """It is over."""
        with self._lock:
            self._open.discard(stream)


class Stream:
    """A stream, which servers iterate over and close. Without a reference to it, it is closed too."""

    __slots__ = ("__weakref__", "_connection", "_listener", "_parts", "_streams", "over")

    def __init__(self, streams: Streams, connection: Any) -> None:
        self._streams = streams
        self._connection = connection
        self._listener: Listener | None = None
        self._parts: Iterator[bytes] = iter(())
        #: Set when it is ended from outside: for parts that wait for something else than a listener.
        self.over = threading.Event()

    def listen(self, hub: Hub, job_id: str | None, wanted: Filter | None = None) -> Listener:
        """Begins to listen; the listener is closed with the stream."""
        self._listener = hub.listen(job_id, wanted, on_cut=_weakly(self.shut))
        return self._listener

    def answer(self, parts: Iterator[bytes]) -> Response:
        """The answer that has these parts."""
        self._parts = parts
        response = Response(self, content_type="text/event-stream")
        response.headers["Cache-Control"] = "no-store"
        response.headers["X-Content-Type-Options"] = "nosniff"
        # nginx would gather it, and pass nothing on for minutes.
        response.headers["X-Accel-Buffering"] = "no"
        return response

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._parts)

    def close(self) -> None:
        """Ends it: it is the listener's and the parts' end, too."""
        self._streams.discard(self)
        if self._listener is not None:
            self._listener.close()

    def __del__(self) -> None:
        self.close()

    def client_has_gone(self) -> bool:
        """Whether the client has closed the connection, as far as the server lets us see it."""
        try:
            with _copy_of(self._connection) as copy:
                poll = select.poll()
                poll.register(copy, select.POLLIN)
                return bool(poll.poll(0)) and not copy.recv(1, socket.MSG_PEEK)
        except ConnectionError:
            return True  # it had not read everything
        except (OSError, ValueError):
            return False

    def end(self) -> None:
        """Ends it from outside: who sends it stops waiting."""
        self.over.set()
        if self._listener is not None:
            self._listener.close()
            self._listener.cut()

    def shut(self) -> None:
        """Ends the connection, under the hands of whoever sends over it."""
        with contextlib.suppress(OSError, ValueError), _copy_of(self._connection) as copy:
            copy.shutdown(socket.SHUT_RDWR)


def _is_cooperative() -> bool:
    """Whether gevent has replaced what blocks: then each request has a greenlet."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def is_alone(environ: Mapping[str, Any]) -> bool:
    """Whether the server of a request does one thing at a time."""
    return not environ.get("wsgi.multithread") and not _is_cooperative()


def _limit_of(environ: Mapping[str, Any]) -> int:
    """How many streams the server of a request can do with."""
    if _is_cooperative():
        return MOST_OF_GEVENT
    if is_alone(environ):
        return 0
    return MOST_OF_DEVELOPMENT if "werkzeug.socket" in environ else MOST_OF_THREADS


def _most_files() -> int:
    """Each stream is an open file; the process needs some for others."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if files == resource.RLIM_INFINITY else files * 4 // 5


def _refusal(limit: int) -> str:
    if limit == 0:
        return (
            "there are no streams here: this server does one thing at a time, or is told so (max_streams=0 of "
            "create_blueprint). Ask for the record with `Prefer: wait=N` and `If-None-Match`; or run the server with "
            "threads, or better gevent."
        )
    return (
        f"there are {limit} streams already, as many as may be open at a time (max_streams of create_blueprint), so "
        "that others are answered too. Try again later, or ask for the record, with `Prefer: wait=N` and "
        "`If-None-Match`."
    )


def _connection_of(environ: Mapping[str, Any]) -> Any:
    """What stands for the connection of a request; None where the server keeps it to itself, or has others on it."""
    if str(environ.get("SERVER_PROTOCOL", "")).startswith("HTTP/2"):
        return None
    for name in CONNECTIONS:
        if name in environ:
            return environ[name]
    return getattr(environ.get("wsgi.input"), "rfile", None)  # of gevent's server


@contextlib.contextmanager
def _copy_of(connection: Any) -> Iterator[socket.socket]:
    """Another socket of a connection; the server's own is in somebody else's hands. Raises OSError or ValueError."""
    fileno = getattr(connection, "fileno", None)
    if fileno is None:
        raise ValueError("the connection is not known")
    copy = socket.socket(fileno=os.dup(fileno()))
    try:
        yield copy
    finally:
        copy.close()


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    reference = weakref.WeakMethod(method)

    def call() -> None:
        found = reference()
        if found is not None:
            found()

    return call
