"""`Call`: a request in hand, as the operations get it, and the ways to answer."""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

from flask import Request, Response, current_app, url_for

from ..app import MLQ
from ..errors import InvalidArguments
from ..schema import check
from ..store import Store
from ..store.store import SeenKey
from .auth import Principal, refuse_unknown, who
from .mount import Mount
from .operation import JSON, TEXT, Operation
from .streams import is_alone

#: The longest header of those that are looked at, in characters.
MAX_HEADER: Final = 4096

#: How long an answer may wait where the server does one thing at a time, in seconds: gunicorn's sync worker, which
#: answers nobody else meanwhile, is killed with the request when it says nothing for 30 s.
MOST_ALONE: Final = 20.0

#: Under how many prefixes that a server has put in front of the app it remembers where its routes are.
MOST_ROOTS: Final = 16


class Call:
    """A request that may do what it asks for."""

    def __init__(self, operation: Operation, mount: Mount, request: Request, around: Mapping[str, Any]) -> None:
        self.operation = operation
        self.mount = mount
        self.request = request
        #: Who asks.
        self.principal: Principal | None = None
        #: The key that he came with, where this process remembers it: the store is to look whether it is so still.
        self.unconfirmed: SeenKey | None = None
        #: What the prefix has between < and >: links have it too.
        self.around = around

    @property
    def mlq(self) -> MLQ:
        return self.mount.mlq

    @property
    def store(self) -> Store:
        return self.mount.mlq.store

    def url(self, name: str, **values: Any) -> str:
        """The path of another operation of this mount."""
        return url_for(f"{self.mount.name}.{name}", **{**self.around, **values})

    @functools.cached_property
    def jobs_url(self) -> str:
        """The path of the jobs: that of one is this, a slash and its id, which needs no quoting."""
        if self.around or current_app.url_default_functions:
            return self.url("list_jobs")
        # Nothing but what the server has put in front of the app can change it.
        root = self.request.environ.get("SCRIPT_NAME", "")
        known = self.mount.jobs_urls
        if root not in known and len(known) < MOST_ROOTS:
            known[root] = self.url("list_jobs")
        return known.get(root) or self.url("list_jobs")

    def confirm(self) -> None:
        """Asks the store now about a key that this process only remembers. Raises `Unauthorized`."""
        if self.unconfirmed is not None:
            self.unconfirmed = None
            if who(self.mount.hooks, self.request) is None:
                raise refuse_unknown(self.mount.hooks, self.request)

    def take_unconfirmed(self) -> SeenKey | None:
        """The key that the caller now has the store look at, if there is one."""
        seen, self.unconfirmed = self.unconfirmed, None
        return seen

    # What is asked for

    @property
    def wants_json(self) -> bool:
        """Whether the answer is JSON: always, but on MLQ's text routes, where ``Accept`` names it before text."""
        return not self.operation.text or prefers_json(self.request)

    def query(self) -> dict[str, Any]:
        """The parameters of the query, checked; those that were not given are not there."""
        declared = {parameter.name: parameter for parameter in self.operation.parameters if parameter.place == "query"}
        given: dict[str, Any] = {}
        for name, values in self.request.args.lists():
            parameter = declared.get(name)
            if parameter is None:
                known = ", ".join(declared) or "none"
                text = f"is not known here; known are {known}"
            elif len(values) > 1 and not parameter.many:
                text = "is given several times; once is allowed"
            else:
                read = [_from_text(parameter.schema, value, f"?{name}") for value in values]
                given[name] = read if parameter.many else read[0]
                continue
            raise InvalidArguments(f"?{name[:100]} {text}.", faults=[(f"?{name[:100]}", text)])
        return given

    @property
    def wait(self) -> float:
        """How long the answer may wait for the end of a job, in seconds: ``Prefer: wait=N``, bounded."""
        match = re.search(
            r"(?:^|[,;\s])wait\s*=\s*\"?(\d{1,9})\"?", self.request.headers.get("Prefer", "")[:MAX_HEADER]
        )
        seconds = min(float(match[1]), self.mount.max_wait) if match else 0.0
        return seconds if seconds <= MOST_ALONE or not is_alone(self.request.environ) else MOST_ALONE

    @contextlib.contextmanager
    def waiting(self) -> Iterator[float]:
        """How long to wait within; 0 where so many wait already that nobody else would be answered."""
        seconds = self.wait
        if not seconds or not self.mount.waits.acquire(blocking=False):
            yield 0.0
            return
        try:
            yield seconds
        finally:
            self.mount.waits.release()

    # Answers

    def json(self, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """An answer in JSON; see `dump`."""
        return self.encoded_json(dump(value), status, headers)

    def encoded_json(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """An answer in JSON that is encoded already."""
        return _response(body, JSON, status, headers)

    def text(self, text: str, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
        """An answer in text."""
        return _response(text.encode("utf-8", "backslashreplace"), f"{TEXT}; charset=utf-8", status, headers)


def prefers_json(request: Request) -> bool:
    """Whether ``Accept`` names JSON before, or rather than, text. ``*/*`` and nothing at all mean text."""
    for kind, quality in request.accept_mimetypes:
        if quality > 0 and kind.lower() in (JSON, "application/problem+json"):
            return True
        if quality > 0 and kind.lower() in ("text/plain", "text/*"):
            return False
    return False


def dump(value: Any) -> bytes:
    """A value as JSON. What comes from a job goes through `mlqueue.values.plain` before."""
    return _ENCODER.encode(value).encode("utf-8", "backslashreplace")


_ENCODER: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _response(body: bytes, kind: str, status: int, headers: Mapping[str, str] | None) -> Response:
    # Answers are for the one who asked, and nothing that a browser should guess about.
    fields = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", **(headers or {})}
    return Response(body, status, fields, content_type=kind)


def _from_text(schema: Any, text: str, path: str) -> Any:
    """The value that a text in a query stands for."""
    value: Any = text
    kind = schema.get("type")
    if kind in ("integer", "number") and re.fullmatch(r"-?\d{1,18}(\.\d{0,9})?", text):
        value = int(text) if text.lstrip("-").isdigit() else float(text)
    elif kind == "boolean" and text in ("true", "false"):
        value = text == "true"
    return check(schema, value, path)


__all__ = ["Call", "dump", "prefers_json"]
