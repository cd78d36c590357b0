"""The server of ``mlqueue web`` where gevent is not installed: waitress, a thread for each request.

Connections are served by one loop, so that a slow client takes no thread; but an answer that takes its time does. A
stream would keep its thread for ever, so there are none: clients ask again instead.
"""

from __future__ import annotations

import logging
import signal
import socket
import time
from types import FrameType
from typing import Any, Final

from waitress.adjustments import Adjustments
from waitress.channel import HTTPChannel
from waitress.server import TcpWSGIServer

from .standalone import BACKLOG, BODY_TIME, HEAD_TIME, KEEP_ALIVE, MAX_CONNECTIONS, MAX_HEAD, RATE, App

__all__ = ["THREADS", "ThreadedServer"]

#: How many requests are answered at a time.
THREADS: Final = 16

#: How often it is looked for connections to be cut, in seconds.
LOOK: Final = 2.0


class ThreadedServer:
    """Serves an app on a socket.

    Parameters:
      app: The app.
      listener: The socket, listening.
      drain: How long requests in hand may take to be answered after a signal, in seconds.
      max_body: The largest body, in bytes.
    """

    def __init__(self, app: App, listener: socket.socket, drain: float, *, max_body: int) -> None:
        self._drain = drain
        self._stopping: float | None = None
        self._at_once = False
        logging.getLogger("waitress").setLevel(logging.ERROR)  # it warns of each request that waits for a thread
        self._map: dict[int, Any] = {}
        self._server = _Server(
            app,
            self._map,
            _sock=listener,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
            adj=Adjustments(
                sockets=[listener],
                threads=THREADS,
                backlog=BACKLOG,
                connection_limit=MAX_CONNECTIONS,
                channel_timeout=round(KEEP_ALIVE),
                cleanup_interval=round(LOOK),
                max_request_header_size=MAX_HEAD,
                # The app refuses what is a little too large in its own words; it has been buffered by then.
                max_request_body_size=2 * max_body,
                asyncore_use_poll=True,
                ident=None,
                clear_untrusted_proxy_headers=True,
                log_socket_errors=False,
            ),
        )

    def run(self) -> None:
        """See `mlqueue.web.standalone.Server`."""
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            while not self._is_over():
                pause = LOOK if self._stopping is None else 0.02
                self._server.asyncore.loop(timeout=pause, use_poll=True, map=self._map, count=1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._server.task_dispatcher.shutdown(timeout=0)
            self._server.asyncore.close_all(self._map)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self._stopping is None:
            self._stopping = time.monotonic()
        else:
            self._at_once = True
        self._server.pull_trigger()

    def _is_over(self) -> bool:
        if self._stopping is None:
            return False
        self._server.accepting = False
        busy = any(channel.requests or channel.total_outbufs_len for channel in self._server.active_channels.values())
        return not busy or self._at_once or time.monotonic() > self._stopping + self._drain


class _Channel(HTTPChannel):  # type: ignore[misc]
    """A connection that is cut when a request takes too long to arrive."""

    #: When the request that is arriving began, and how much of it is there.
    begun = 0.0
    got = 0

    def received(self, data: bytes) -> bool:
        if self.request is None:
            self.begun, self.got = time.time(), 0
        self.got += len(data)
        return bool(super().received(data))

    def is_late(self, now: float) -> bool:
        """Whether it should have arrived, or begun to where it is the first."""
        request = self.request
        if not self.begun:
            return bool(now > self.creation_time + HEAD_TIME)
        if request is None or self.requests:
            return False
        allowed = BODY_TIME if request.headers_finished else HEAD_TIME
        return bool(now > self.begun + allowed + self.got / RATE)


class _Server(TcpWSGIServer):  # type: ignore[misc]
    channel_class = _Channel

    def maintenance(self, now: float) -> None:
        super().maintenance(now)
        for channel in self.active_channels.values():
            if channel.is_late(now):
                channel.will_close = True
