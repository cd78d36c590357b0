"""HTTP for `mlqueue.client`: requests that are made again where that is safe, and errors of our own tree.

A connection that breaks, a server that restarts, a store that is away for a moment: the request is made again for a
while. What creates something carries an ``Idempotency-Key``, so that it is created once; what may not be made twice is
made again only if it cannot have arrived.
"""

from __future__ import annotations

import contextlib
import email.message
import inspect
import json
import os
import random
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlencode, urlsplit

from . import errors
from .errors import (
    BodyTooLarge,
    EncodeError,
    Forbidden,
    InvalidArguments,
    JobExists,
    JobFailed,
    JobNotFound,
    MissingDependency,
    MLQueueError,
    RequestError,
    SettingsError,
    StoreUnavailable,
    Unauthorized,
)

try:
    import urllib3
    from urllib3.exceptions import ConnectTimeoutError, HTTPError, LocationParseError, NewConnectionError
except ImportError as error:
    raise MissingDependency(
        "mlqueue.client needs urllib3, which is not installed: pip install 'mlqueue[client]'."
    ) from error

__all__ = ["BROKEN", "JSON", "MSGPACK", "PROBLEM", "Transport"]

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
PROBLEM: Final = "application/problem+json"

#: What a broken connection raises, while an answer is read too.
BROKEN: Final = (HTTPError, OSError)

#: The statuses after which the same request may go well: the server, or one before it, says that it cannot now.
PASSING: Final = frozenset({429, 502, 503, 504})

#: Pauses between two tries, in seconds: the first, and the longest.
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 2.0

#: How long connecting may take, in seconds.
CONNECTING: Final = 10.0

#: How many connections are kept open for the threads of a program.
CONNECTIONS: Final = 32

#: How much of an answer that is no error of ours is shown, in characters.
SHOWN: Final = 200


class Transport:
    """Makes requests of one server. May be used by any number of threads, and by processes that are forked."""

    def __init__(self, url: str, key: str | None, timeout: float, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise SettingsError(
                f"url={url!r}: give the address under which the server has its routes, such as http://localhost:5000 "
                "or https://example.com/api."
            )
        if parts.username or parts.password:
            raise SettingsError("url=: it has a user or a password; give an API key instead: Client(url, key=...).")
        self.url = url.rstrip("/")
        self._headers = {"User-Agent": "mlqueue"}
        if key is not None:
            if not key.isascii() or not key.isprintable() or " " in key:
                raise SettingsError("key=: this is no API key; `mlqueue key new` prints one, mlq_<id>_<secret>.")
            self._headers["Authorization"] = f"Bearer {key}"
        self.timeout = timeout
        self.patience = patience
        self._pool: urllib3.PoolManager | None = None
        self._pid = 0

    def path(self, *parts: str, **query: Any) -> str:
        """The path of a resource; values of the query may be lists, and None leaves one out."""
        pairs = [
            (name, item)
            for name, value in query.items()
            if value is not None
            for item in (value if isinstance(value, list | tuple) else [value])
        ]
        return "/".join(["", *(quote(part, safe="") for part in parts)]) + (f"?{urlencode(pairs)}" if pairs else "")

    def json(self, method: str, path: str, **options: Any) -> Any:
        """The answer to a request, which is JSON; `options` as for `request`."""
        response = self.request(method, path, **options)
        try:
            return json.loads(response.data)
        except ValueError:
            self._refuse(response, "it answered something that is no JSON")

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        accept: str = JSON,
        again: bool = True,
        read: float | None = None,
        patience: float | None = None,
        stream: bool = False,
    ) -> urllib3.BaseHTTPResponse:
        """The answer to a request, if it is none of an error.

        Parameters:
          body: MessagePack, unless the headers say what else.
          accept: Media types; the one of errors is added, unless it is anything.
          again: Whether the request may arrive twice.
          read: How long the server may be silent, in seconds; the client's timeout when None.
          patience: How long it is made again, in seconds; the client's when None.
          stream: Leave the body of the answer to be read, and closed, by the caller.
        """
        # Who takes anything gets texts as texts, and so errors too.
        accepted = accept if accept == "*/*" else f"{accept}, {PROBLEM};q=0.1"
        kind = {} if body is None else {"Content-Type": MSGPACK}
        sent = {**self._headers, **kind, "Accept": accepted, **(headers or {})}
        timeout = urllib3.Timeout(connect=min(CONNECTING, self.timeout), read=self.timeout if read is None else read)
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        pause = FIRST_PAUSE
        while True:
            least = 0.0
            try:
                response = self._pools().request(
                    method,
                    self.url + path,
                    body=body,
                    headers=sent,
                    timeout=timeout,
                    retries=False,
                    redirect=False,
                    preload_content=not stream,
                )
            except LocationParseError as error:
                raise SettingsError(f"url={self.url!r}: {error}.") from None
            except BROKEN as error:
                failure: MLQueueError = self._unreachable(error)
                if not again and not isinstance(error, NewConnectionError | ConnectTimeoutError):
                    raise failure from error
            else:
                if 200 <= response.status < 300 or response.status == 304:
                    return response
                failure = self._error_of(response)
                if response.status not in PASSING or not (again or response.status == 429):
                    raise failure
                least = _retry_after(response)
            rest = max(pause * random.uniform(0.75, 1.25), least)
            if time.monotonic() + rest >= deadline:
                raise failure
            time.sleep(rest)
            pause = min(pause * 2, LONGEST_PAUSE)

    def close(self) -> None:
        """Closes connections that are open."""
        if self._pool is not None and self._pid == os.getpid():
            self._pool.clear()

    def _pools(self) -> urllib3.PoolManager:
        if self._pool is None or self._pid != os.getpid():
            self._pool, self._pid = urllib3.PoolManager(num_pools=1, maxsize=CONNECTIONS), os.getpid()
        return self._pool

    # Errors

    def _unreachable(self, error: Exception) -> StoreUnavailable:
        return StoreUnavailable(
            f"{self.url} does not answer: {_in_words(error)}. Is the server running (`mlqueue web`, or the app that "
            "has the blueprint), and is the address right?"
        )

    def _error_of(self, response: urllib3.BaseHTTPResponse) -> MLQueueError:
        """The error that an answer stands for."""
        try:
            data = response.data
        except BROKEN as error:
            return self._unreachable(error)
        finally:
            response.close()
        if _media_type(response) == PROBLEM:
            with contextlib.suppress(ValueError, TypeError, KeyError):
                return _error_of_problem(json.loads(data))
        return self._stranger(response, data)

    def _stranger(self, response: urllib3.BaseHTTPResponse, data: bytes) -> MLQueueError:
        """An answer of something else than our routes: a proxy, another app, another path."""
        status, text = response.status, " ".join(data.decode("utf-8", "replace").split())[:SHOWN]
        where = f"{self.url} answered {status}"
        if status in (301, 302, 303, 307, 308):
            return RequestError(
                f"{where}, a redirect to {response.headers.get('Location', 'nowhere')}; they are not followed, since "
                "the key would go with it. Give the address that it leads to as url."
            )
        kind = _BY_STATUS.get(status, StoreUnavailable if status in PASSING else MLQueueError)
        cure = " Is url the prefix under which the blueprint is mounted?" if status in (404, 405) else ""
        return kind(f"{where}: {text or response.reason or 'nothing else'}.{cure}")

    def _refuse(self, response: urllib3.BaseHTTPResponse, what: str) -> NoReturn:
        raise RequestError(
            f"{self.url}: {what} ({_media_type(response) or 'of no type'}, {len(response.data):,} bytes). Is url the "
            "prefix under which the blueprint is mounted?"
        )


#: Errors for answers that are none of ours, by status.
_BY_STATUS: Final[dict[int, type[MLQueueError]]] = {
    400: RequestError,
    401: Unauthorized,
    403: Forbidden,
    404: RequestError,
    405: RequestError,
    413: BodyTooLarge,
}


def _error_of_problem(members: Mapping[str, Any]) -> MLQueueError:
    """The error that the server raised."""
    kind = getattr(errors, str(members.get("code")), None)
    text = str(members["detail"])
    if not (inspect.isclass(kind) and issubclass(kind, MLQueueError)):
        status = members.get("status")
        kind = JobNotFound if status == 404 else _BY_STATUS.get(int(status or 0), MLQueueError)
        return kind(text)
    if issubclass(kind, InvalidArguments):
        faults = [(str(fault["path"]), str(fault["detail"])) for fault in members.get("errors", ())]
        return kind(text, faults=faults)
    if issubclass(kind, EncodeError):
        paths = [str(fault["path"]) for fault in members.get("errors", ())]
        return kind(text, path=paths[0].removeprefix("$.") if paths else "")
    if issubclass(kind, JobExists):
        return kind(text, job_id=str(members.get("job_id", "")))
    if issubclass(kind, JobFailed):
        names = ("job_id", "reason", "error_type", "remote_traceback")
        return kind(text, **{name: str(members[name]) for name in names if name in members})
    return kind(text)


def _media_type(response: urllib3.BaseHTTPResponse) -> str:
    message = email.message.Message()
    message["Content-Type"] = response.headers.get("Content-Type", "")
    return message.get_content_type() if message["Content-Type"] else ""


def _retry_after(response: urllib3.BaseHTTPResponse) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() and len(text) < 6 else 0.0


def _in_words(error: Exception) -> str:
    """What went wrong, without what urllib3 says around it."""
    cause = error.__cause__ or error.__context__ or error
    text = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(error)
    return text.rstrip(".") or type(error).__name__
