"""The HTTP interface alone: the app and the servers of ``mlqueue web``.

An app of your own mounts the blueprint and has a server already. This is for who has none: one process, one port, the
routes at its root.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final, Protocol
from urllib.parse import quote

import flask
from flask import Response, url_for
from werkzeug.exceptions import HTTPException, InternalServerError, SecurityError

from ..app import MLQ
from ..keys import ApiKeys
from .auth import keys
from .blueprint import create_blueprint
from .call import dump
from .dashboard import create_dashboard
from .problems import PROBLEM

__all__ = ["AccessLog", "Server", "create_app", "is_loopback", "listen", "needs_keys"]

logger = logging.getLogger("mlqueue.web")

#: The names by which a browser on this machine reaches it; another one would be a page of elsewhere whose name leads
#: here.
LOCAL_NAMES: Final = ("localhost", "127.0.0.1", "[::1]")

#: Paths that are asked for all the time, by what watches the process.
PROBES: Final = ("/healthz", "/readyz")

#: How long a client may say nothing between two requests, in seconds.
KEEP_ALIVE: Final = 75.0

#: How long the head of a request may take to arrive, and how long its body, in seconds; a body has a second more for
#: each `RATE` bytes of it that have arrived.
HEAD_TIME: Final = 20.0
BODY_TIME: Final = 20.0
RATE: Final = 1000

#: How large the head of a request may be, in bytes.
MAX_HEAD: Final = 64 * 2**10

#: How many connections there may be, and how many more wait to be accepted.
MAX_CONNECTIONS: Final = 10_000
BACKLOG: Final = 1024

App = Callable[[dict[str, Any], Any], Iterable[bytes]]


class Server(Protocol):
    """A server of one of the kinds that there are."""

    def run(self) -> None:
        """Serves until SIGTERM or SIGINT, and then until the requests in hand are answered; a second one ends these."""


# The app


def create_app(mlq: MLQ, *, anonymous: bool, **options: Any) -> flask.Flask:
    """The app: the blueprint at its root, the dashboard beside it, and nothing else but the errors of paths that there
    are not. A browser that comes to the root is led to the dashboard.

    Parameters:
      mlq: The namespace.
      anonymous: Everybody may do everything, from this machine; else the API keys of the namespace count.
      options: Those of `create_blueprint`.
    """
    app = flask.Flask("mlqueue.web", static_folder=None)
    auth = None if anonymous else keys(mlq)
    app.register_blueprint(create_blueprint(mlq, auth, allow_anonymous=anonymous, **options))
    streams = options.get("max_streams")
    dashboard = create_dashboard(mlq, auth, allow_anonymous=anonymous, max_streams=streams)
    app.register_blueprint(dashboard, url_prefix="/dashboard")
    if anonymous:
        app.config["TRUSTED_HOSTS"] = list(LOCAL_NAMES)
    app.add_url_rule("/", "root", lambda: flask.redirect(url_for("mlqueue_dashboard.show_overview")))
    app.register_error_handler(HTTPException, _problem)
    return app


def _problem(error: HTTPException) -> Any:
    """An error that is none of the blueprint's: no such path, a method that it does not take, a bug."""
    if error.response is not None:
        return error.response
    status = error.code or InternalServerError.code
    detail = error.description
    if isinstance(error, SecurityError):
        detail = (
            f"{detail} As long as there are no API keys this server is there for this machine, by the names "
            f"{', '.join(LOCAL_NAMES)}: call it by one of them, or make a key (`mlqueue key new`) and start it anew."
        )
    members = {"type": "about:blank", "title": error.name, "status": status, "detail": detail}
    response = Response(dump(members), status, content_type=PROBLEM)
    for name, value in error.get_headers():
        if name not in ("Content-Type", "Content-Length"):
            response.headers[name] = value
    return response


def needs_keys(mlq: MLQ) -> bool:
    """Whether the namespace has API keys: then they are asked for."""
    return bool(ApiKeys(mlq.store).list())


# Addresses


def is_loopback(host: str) -> bool:
    """Whether a host, by name or address, is this machine for itself alone. Raises OSError for a name nobody knows."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return all(ipaddress.ip_address(str(item[4][0]).partition("%")[0]).is_loopback for item in found)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there; port 0 is any that is free. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    with contextlib.ExitStack() as undo:
        undo.callback(listener.close)
        # A server that has just ended leaves connections that nobody needs any more, and that hold the port.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        undo.pop_all()
    return listener


# Requests in hand, and the log of those that were


class AccessLog:
    """An app around another that logs each request on one line when its answer is over.

    A query may hold what is nobody's business, so the path alone is logged.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        begun = time.perf_counter()
        answer = _Answer(environ, begun)

        def starting(status: str, headers: Any, *error: Any) -> Any:
            answer.status = status[:3]
            return start_response(status, headers, *error)

        answer.begin(self._app(environ, starting))
        return answer


class _Answer:
    """An answer on its way, which is logged when it is closed."""

    def __init__(self, environ: dict[str, Any], begun: float) -> None:
        self.status = "000"
        self._environ = environ
        self._begun = begun
        self._size = 0
        self._answer: Iterable[bytes] = ()
        self._parts: Iterator[bytes] = iter(())

    def begin(self, answer: Iterable[bytes]) -> None:
        """This is what it is made of."""
        self._answer, self._parts = answer, iter(answer)

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        part = next(self._parts)
        self._size += len(part)
        return part

    def close(self) -> None:
        """Servers call it, however the answer ended."""
        close = getattr(self._answer, "close", None)
        if close is not None:
            close()
        path = self._environ.get("PATH_INFO", "")
        logger.log(
            logging.DEBUG if path in PROBES else logging.INFO,
            '%s "%s %s" %s %d %.1fms',
            self._environ.get("REMOTE_ADDR", "-"),
            self._environ["REQUEST_METHOD"],
            # Not as the server decoded it: no line break gets into the log.
            quote(path.encode("latin-1")),
            self.status,
            self._size,
            1000 * (time.perf_counter() - self._begun),
        )
