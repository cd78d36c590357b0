"""The server of ``mlqueue web`` where gevent is installed: a greenlet for each connection, thousands of them.

A client that dribbles its request is cut off in time, and a body that nobody read is not waited for. The process has
been patched by gevent before anything else was imported: see `mlqueue.cli.web`.
"""

from __future__ import annotations

import io
import logging
import signal
import socket
import sys
import time
from http.client import HTTPException
from typing import Any, Final

import gevent
import gevent.event
import gevent.pool
from gevent.pywsgi import Input, WSGIHandler, WSGIServer

from .standalone import BODY_TIME, HEAD_TIME, KEEP_ALIVE, MAX_CONNECTIONS, MAX_HEAD, RATE, App

__all__ = ["CooperativeServer"]

logger = logging.getLogger("mlqueue.web")

#: How long a client may take to take a part of an answer, in seconds.
SEND_TIME: Final = 120.0

#: A body that nobody has read to its end is read, so that the client gets the answer, if no more than this is left of
#: it; else the connection is closed.
MOST_DISCARDED: Final = 64 * 2**10

#: How often it is looked whether all requests are answered, at the end, in seconds.
LOOK: Final = 0.02

#: The answer to a request that has not arrived in time.
TOO_LATE: Final = b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"

#: The answer to one whose head is larger than allowed.
TOO_MUCH: Final = b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


class CooperativeServer:
    """Serves an app on a socket.

    Parameters:
      app: The app.
      listener: The socket, listening.
      drain: How long requests in hand may take to be answered after a signal, in seconds.
    """

    def __init__(self, app: App, listener: socket.socket, drain: float) -> None:
        self._drain = drain
        self._stopping = gevent.event.Event()
        self._at_once = gevent.event.Event()
        self._server = _Server(listener, app, spawn=gevent.pool.Pool(MAX_CONNECTIONS), log=None, error_log=logger)
        self._server.handlers = set()

    def run(self) -> None:
        """See `mlqueue.web.standalone.Server`."""
        watchers = [gevent.signal_handler(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)]
        self._server.start()
        try:
            self._stopping.wait()
            self._server.close()
            deadline = time.monotonic() + self._drain
            while self._in_hand() and time.monotonic() < deadline and not self._at_once.wait(LOOK):
                pass
        finally:
            self._server.stop(timeout=0)
            for watcher in watchers:
                watcher.cancel()

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._at_once.set()
        self._server.draining = True
        self._stopping.set()

    def _in_hand(self) -> bool:
        return any(handler.is_busy for handler in self._server.handlers)


class _TooMuch(ValueError):
    """The head of a request is larger than allowed."""


class _Patient(io.RawIOBase):
    """What a client sends, as long as it does so in time: else it raises TimeoutError."""

    def __init__(self, sock: Any) -> None:
        self._socket = sock
        #: Whether no request has begun.
        self.idle = True
        #: Whether something did not arrive in time: there will be no other request.
        self.late = False
        self._deadline = 0.0
        self._most = MAX_HEAD

    def rest(self, seconds: float) -> None:
        """The next request may begin within so many seconds."""
        self.idle, self._deadline, self._most = True, time.monotonic() + seconds, MAX_HEAD

    def expect_body(self) -> None:
        """The head is there, the body comes. The app bounds how large it is."""
        self.idle, self._deadline, self._most = False, time.monotonic() + BODY_TIME, sys.maxsize

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size: int | None = None
        remaining = self._deadline - time.monotonic()
        if remaining > 0 and not self.late:
            with gevent.Timeout(remaining, False):
                size = self._socket.recv_into(buffer)
        if size is None:
            self.late = True
            raise TimeoutError("the request has not arrived in time")
        if self.idle and size:
            self.idle, self._deadline = False, time.monotonic() + HEAD_TIME
        self._deadline += size / RATE
        self._most -= size
        if self._most < 0:
            raise _TooMuch
        return size


class _Body(Input):  # type: ignore[misc]
    """The body of a request, of which not much is read that nobody wants."""

    #: Whether all of it has been read, so that another request may follow.
    over = True

    def _discard(self) -> None:
        if self.chunked_input:
            self.over = self.chunk_length == 0
            return
        left = (self.content_length or 0) - self.position
        # A client that expects to be asked for it has not sent it.
        self.over = left <= MOST_DISCARDED and (not left or self.socket is None)
        if self.over:
            super()._discard()


class _Handler(WSGIHandler):  # type: ignore[misc]
    """A connection."""

    rfile: Any
    wsgi_input: Any

    def __init__(self, sock: Any, address: Any, server: Any) -> None:
        super().__init__(sock, address, server)
        sock.settimeout(SEND_TIME)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rfile.close()
        self.patient = _Patient(sock)
        self.rfile = io.BufferedReader(self.patient)
        self._has_served = self._streams = False

    @property
    def is_busy(self) -> bool:
        """Whether a request is in hand that will be answered some time: an endless stream is none."""
        return not self.patient.idle and not self._streams

    def handle(self) -> None:
        self.server.handlers.add(self)
        try:
            super().handle()
        finally:
            self.server.handlers.discard(self)

    def handle_one_request(self) -> Any:
        self._streams = False
        self.patient.rest(KEEP_ALIVE if self._has_served else HEAD_TIME)
        went = super().handle_one_request()
        if went is not True or self.patient.late or self.server.draining or not self.wsgi_input.over:
            return None if went is True else went
        self.patient.idle = self._has_served = True
        return True

    def get_environ(self) -> dict[str, Any]:
        environ: dict[str, Any] = super().get_environ()
        given = self.wsgi_input
        body = _Body(given.rfile, given.content_length, socket=given.socket, chunked_input=given.chunked_input)
        self.wsgi_input = environ["wsgi.input"] = body
        environ["wsgi.input_terminated"] = True
        # So that a stream can be ended under the hands of a client that does not read it.
        environ["mlqueue.socket"] = self.socket
        self.patient.expect_body()
        return environ

    def start_response(self, status: str, headers: list[tuple[str, str]], exc_info: Any = None) -> Any:
        self._streams = any(
            name.lower() == "content-type" and value.startswith("text/event-stream") for name, value in headers
        )
        return super().start_response(status, headers, exc_info)

    def _handle_client_error(self, ex: BaseException) -> Any:
        if isinstance(ex, TimeoutError):
            return "408", TOO_LATE
        if isinstance(ex, _TooMuch | HTTPException):
            return "431", TOO_MUCH
        if isinstance(ex, OSError):
            return None  # the client has gone
        return super()._handle_client_error(ex)

    def log_error(self, msg: str, *args: object) -> None:
        """Of what clients send that is no HTTP."""
        logger.info("%.300r", msg % args if args else msg)


class _Server(WSGIServer):  # type: ignore[misc]
    handler_class = _Handler
    #: The connections that there are.
    handlers: set[_Handler]
    draining = False
