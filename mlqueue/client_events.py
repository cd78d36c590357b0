"""Watching a job over HTTP, for `mlqueue.client`: by a stream of server-sent events, or by asking now and then.

A stream may break: it is opened again behind the last event that was heard. It may also be refused (so many are open
already; a server of threads has none), or held back by a proxy that gathers it: then the job is asked for instead.
"""

from __future__ import annotations

import codecs
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Final, Generic, NamedTuple, TypeVar

from .client_http import BROKEN, Transport
from .errors import JobNotFound, MLQueueError, RequestError, Unauthorized
from .job import State

__all__ = ["Follow", "Watch", "messages", "number"]

STREAM: Final = "text/event-stream"

#: How long a stream may be silent, in seconds: the server lets it hear something more often.
SILENCE: Final = 45.0

#: How often a stream may break, one time after the other and with nothing heard, until the job is asked for instead.
FAILURES: Final = 2

#: The events that tell how the job stands.
TOLD: Final = ("snapshot", "state", "progress")

#: How long one request waits for a change, in seconds.
WAIT: Final = 25.0

#: Pauses between two looks where the server does not wait, in seconds: the first, and the longest. They grow while
#: nothing changes.
FIRST_LOOK: Final = 0.2
LONGEST_LOOK: Final = 2.0

#: The longest line of a stream, in characters.
LONGEST_LINE: Final = 2**20


class Look(NamedTuple):
    """How a job stood at a moment."""

    state: State
    attempt: int
    progress: Any
    progress_note: str | None


class Message(NamedTuple):
    """A server-sent event."""

    #: Its name: ``state``, ``progress`` ...
    event: str
    data: str
    #: What to ask for the following ones with; empty when it has none.
    id: str


T = TypeVar("T")


class _Told(ABC, Generic[T]):
    """What a server tells of a job, over streams as long as there are any, else by asking: to the end of that, or to
    `deadline` (monotonic)."""

    def __init__(self, http: Transport, deadline: float | None) -> None:
        self._http = http
        self._deadline = deadline

    def __iter__(self) -> Iterator[T]:
        failures = 0
        while failures < FAILURES and not self._is_over():
            failures += 1
            try:
                for item in self._listen():
                    failures = 0
                    yield item
                    if self._is_last(item):
                        return
            except _NoStream:
                break
        yield from self._ask()

    def _is_over(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _left(self, most: float) -> float:
        return most if self._deadline is None else max(0.01, min(most, self._deadline - time.monotonic()))

    @abstractmethod
    def _is_last(self, item: T) -> bool: ...

    @abstractmethod
    def _listen(self) -> Iterator[T]:
        """What a stream tells, until it ends. Raises `_NoStream` when there is none."""

    @abstractmethod
    def _ask(self) -> Iterator[T]:
        """The same, asked for again and again."""


class Watch(_Told[Look]):
    """How a job stands, each time that it changes: from now to its end, or to `deadline` (monotonic)."""

    def __init__(self, http: Transport, path: str, deadline: float | None) -> None:
        super().__init__(http, deadline)
        self._path = path
        self._last_id = ""

    def _is_last(self, item: Look) -> bool:
        return item.state.ended

    def _listen(self) -> Iterator[Look]:
        response = open_stream(self._http, f"{self._path}/events", self._last_id, self._left(SILENCE))
        try:
            for message in messages(iter(lambda: response.read1(65_536), b"")):
                self._last_id = message.id or self._last_id
                if message.event in TOLD:
                    yield _look_of(json.loads(message.data))
                if self._is_over():
                    return
        except (*BROKEN, ValueError, KeyError):
            return  # it is opened again
        finally:
            response.close()

    def _ask(self) -> Iterator[Look]:
        """What the record tells, asked for again and again."""
        pause, etag = FIRST_LOOK, ""
        while True:
            wait = int(self._left(WAIT)) if etag else 0
            headers = {"Prefer": f"wait={wait}", "If-None-Match": etag} if wait else {}
            response = self._http.request("GET", self._path, headers=headers, read=wait + self._http.timeout)
            if response.status != 304:
                pause, etag = FIRST_LOOK, response.headers.get("ETag", "")
                look = _look_of(json.loads(response.data))
                yield look
                if look.state.ended:
                    return
            if self._is_over():
                return
            if (wait and "Preference-Applied" not in response.headers) or not etag:
                # So many wait already that the server answers at once.
                time.sleep(self._left(pause))
                pause = min(1.3 * pause, LONGEST_LOOK)


class Follow(_Told[dict[str, Any]]):
    """What a job shows of itself, part by part: to its end, or to `deadline` (monotonic).

    Parameters:
      what: ``logs`` or ``metrics``.
      begin: What the first request asks for (``tail``).
    """

    def __init__(
        self, http: Transport, job_id: str, what: str, deadline: float | None, begin: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(http, deadline)
        self._job_id = job_id
        self._what = what
        self._begin = dict(begin or {})
        #: What goes on behind what has come: ``next`` of the last part.
        self._next: Any = None

    def _is_last(self, item: dict[str, Any]) -> bool:
        return bool(item["ended"])

    def _listen(self) -> Iterator[dict[str, Any]]:
        response = open_stream(
            self._http,
            self._http.path("jobs", self._job_id, self._what, follow="true", **({} if self._next else self._begin)),
            "" if self._next is None else str(self._next),
            self._left(SILENCE),
        )
        try:
            for message in messages(iter(lambda: response.read1(65_536), b"")):
                if message.event == self._what:
                    part = json.loads(message.data)
                    self._next = part["next"]
                    yield part
                elif message.event == "end":
                    yield {"ended": True}
                if self._is_over():
                    return
        except (*BROKEN, ValueError, KeyError):
            return  # it is opened again
        finally:
            response.close()

    def _ask(self) -> Iterator[dict[str, Any]]:
        pause = FIRST_LOOK
        name = "first" if self._what == "logs" else "after"
        while True:
            asked = self._begin if self._next is None else {name: self._next}
            part: dict[str, Any] = self._http.json("GET", self._http.path("jobs", self._job_id, self._what, **asked))
            pause = FIRST_LOOK if part["next"] != self._next else min(1.3 * pause, LONGEST_LOOK)
            self._next = part["next"]
            yield part
            if part["ended"] or self._is_over():
                return
            time.sleep(self._left(pause))


def open_stream(http: Transport, path: str, last_id: str, silence: float) -> Any:
    """The answer that is a stream of events, those behind `last_id`. Raises `_NoStream` when there is none."""
    headers = {"Last-Event-ID": last_id} if last_id else {}
    try:
        response = http.request("GET", path, accept=STREAM, headers=headers, patience=0.0, read=silence, stream=True)
    except (JobNotFound, Unauthorized):
        raise
    except MLQueueError as error:
        raise _NoStream from error
    if not response.headers.get("Content-Type", "").startswith(STREAM):
        response.close()
        raise _NoStream
    return response


class _NoStream(Exception):
    """The server has no stream for us."""


def messages(parts: Iterator[bytes]) -> Iterator[Message]:
    """The events of a stream, as they come in (HTML Living Standard, 9.2.6)."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    pending = ""
    event, data, last_id = "", [], ""
    for part in parts:
        # A line may end in CR, LF or both; ours never end in CR alone.
        *lines, pending = (pending + decode(part)).split("\n")
        if len(pending) > LONGEST_LINE:
            raise RequestError("a line of the stream of events has no end; is there a server of mlqueue at this url?")
        for line in lines:
            name, _, value = line.rstrip("\r").partition(":")
            value = value.removeprefix(" ")
            if name == "event":
                event = value
            elif name == "data":
                data.append(value)
            elif name == "id":
                last_id = value
            elif not line.rstrip("\r"):
                if data:
                    yield Message(event or "message", "\n".join(data), last_id)
                event, data = "", []


def _look_of(told: dict[str, Any]) -> Look:
    """How the job stands, as an event or its record tells it."""
    return Look(State(told["state"]), told["attempt"], number(told["progress"]), told["progress_note"])


def number(value: Any) -> Any:
    """A value of JSON that may be a number for which that has no form (see `mlqueue.values`)."""
    return float(value["$float"]) if isinstance(value, dict) and value.keys() == {"$float"} else value
