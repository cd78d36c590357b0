"""What a job shows of itself: its log and its metrics, read once or followed as server-sent events."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from flask import Response

from ..errors import InvalidArguments, JobNotFound, StoreError, TooManyStreams
from ..events import Listener, hub_of
from ..following import PLACE, MetricsReader, read_log
from ..job import LogLine
from ..schema import schema_of
from ..store.events import UNHEARD
from ..values import plain
from .auth import READ
from .call import Call
from .live import EVENTS, HEARTBEAT, LIFE
from .live import _frame_of as frame_of
from .live import _opening as opening
from .operation import JSON, TEXT, Answer, Parameter, operation

__all__ = ["read_logs", "read_metrics"]

#: How many lines are answered at most, and with an event.
LINES: Final = 1000

FOLLOW: Final = Parameter(
    "follow",
    "query",
    {"type": "boolean", "default": False},
    "Whether to stream it as server-sent events, to the job's end.",
)

LINES_OF_LOG: Final = {
    "type": "object",
    "properties": {
        "lines": {"type": "array", "items": schema_of(LogLine)},
        "next": {"type": "integer", "description": "What `first` is to be for the lines behind these."},
        "ended": {"type": "boolean", "description": "Whether the job has ended, and these are its last lines."},
    },
    "required": ["lines", "next", "ended"],
}

METRICS: Final = {
    "type": "object",
    "properties": {
        "metrics": {
            "type": "object",
            "additionalProperties": {
                "type": "array",
                "items": {"type": "array", "minItems": 3, "maxItems": 3},
                "description": "Step, value and time (Unix seconds) of each point, oldest first.",
            },
        },
        "whole": {
            "type": "boolean",
            "description": "Whether these are all points, in the place of those that are known; else they come behind.",
        },
        "attempt": {"type": "integer", "description": "The attempt that logged metrics last; 0 when none has."},
        "next": {"type": "string", "description": "What `after` is to be for the points behind these."},
        "ended": {"type": "boolean", "description": "Whether the job has ended."},
    },
    "required": ["metrics", "whole", "attempt", "next", "ended"],
}


@operation(
    "GET",
    "/jobs/<job_id>/logs",
    scope=READ,
    tag="live",
    parameters=(
        Parameter(
            "first", "query", {"type": "integer", "minimum": 0, "maximum": 2**53}, "The number of the first line."
        ),
        Parameter("tail", "query", {"type": "integer", "minimum": 1, "maximum": 2**31}, "The last so many lines."),
        FOLLOW,
        Parameter(
            "Last-Event-ID",
            "header",
            {"type": "string", "pattern": r"^\d{1,15}$"},
            "The id of the last event that the client has heard, of a stream that it had before.",
        ),
    ),
    answers={
        200: Answer(
            "The lines.",
            {JSON: LINES_OF_LOG, TEXT: {"type": "string"}, EVENTS: {"type": "string"}},
        ),
        204: Answer("The job has ended, and the client has heard of it: it need not come again."),
    },
    errors=(TooManyStreams,),
)
def read_logs(call: Call, job_id: str) -> Response:
    """Read what a job has printed and logged.

    Its last lines, as far as they are kept; with `first` those from a number on, at most 1,000: `next` leads on. As
    text where `Accept` asks for that. With `follow` a stream: events `logs` with such an object each, then `end`.
    """
    given = call.query()
    if "first" in given and "tail" in given:
        raise InvalidArguments("?first and ?tail exclude each other.", faults=[("?tail", "is given beside ?first")])
    first = -given["tail"] if "tail" in given else given.get("first", 0)
    if given.get("follow"):
        heard = _last_heard(call, str.isdecimal)
        reader = _Lines(call, job_id, int(heard[:15]) if heard else first)
        return _stream(call, job_id, "logs", reader.read, again=bool(heard))
    limit = None if "tail" in given else LINES
    lines, following, ended = read_log(call.store, job_id, first, limit)
    if call.request.accept_mimetypes.best_match([JSON, TEXT]) == TEXT:
        return call.text("".join(f"{line.text}\n" for line in lines))
    return call.json(_shown_lines(lines, following, ended))


@operation(
    "GET",
    "/jobs/<job_id>/metrics",
    scope=READ,
    tag="live",
    parameters=(
        Parameter(
            "after", "query", {"type": "string", "pattern": rf"^{PLACE.pattern}$"}, "Points behind those; from `next`."
        ),
        FOLLOW,
        Parameter(
            "Last-Event-ID",
            "header",
            {"type": "string", "pattern": rf"^{PLACE.pattern}$"},
            "The id of the last event that the client has heard, of a stream that it had before.",
        ),
    ),
    answers={
        200: Answer("The points.", {JSON: METRICS, EVENTS: {"type": "string"}}),
        204: Answer("The job has ended, and the client has heard of it: it need not come again."),
    },
    errors=(TooManyStreams,),
)
def read_metrics(call: Call, job_id: str) -> Response:
    """Read the metrics that a job has logged.

    Of each metric as many points as are kept, over its whole course; with `after` those behind that place, unless a
    later attempt has begun again. With `follow` a stream: events `metrics` with such an object each, then `end`.
    """
    given = call.query()
    heard = _last_heard(call, PLACE.fullmatch) if given.get("follow") else ""
    reader = _Points(call, job_id, heard or given.get("after", ""))
    if given.get("follow"):
        return _stream(call, job_id, "metrics", reader.read, again=bool(heard))
    return call.json(reader.read()[1])


def _last_heard(call: Call, fits: Callable[[str], object]) -> str:
    given = call.request.headers.get("Last-Event-ID", "")
    if given and not (given.isascii() and fits(given)):
        fault = "is none of the ids that events of this stream have"
        raise InvalidArguments(
            f"Last-Event-ID {fault}; send the `id` of the last one that was heard, or leave it out.",
            faults=[("Last-Event-ID", fault)],
        )
    return given


#: What is read of a job at a time: an event's id, what it says, whether there is something new, whether that was all.
Part = tuple[str, dict[str, Any], bool, bool]


class _Lines:
    """The lines of a log, part by part."""

    def __init__(self, call: Call, job_id: str, first: int) -> None:
        self._call = call
        self._job_id = job_id
        self._first = first

    def read(self) -> Part:
        """What is new."""
        lines, self._first, ended = read_log(self._call.store, self._job_id, self._first, LINES)
        return str(self._first), _shown_lines(lines, self._first, ended), bool(lines), ended


class _Points:
    """The points of metrics, part by part."""

    def __init__(self, call: Call, job_id: str, place: str) -> None:
        self._reader = MetricsReader(call.store, job_id, place)

    def read(self) -> Part:
        """What is new."""
        part = self._reader.read()
        found = {
            "metrics": {
                name: [[point.step, plain(point.value), point.at] for point in points]
                for name, points in part.points.items()
            },
            "whole": part.whole,
            "attempt": part.attempt,
            "next": self._reader.place,
            "ended": part.ended,
        }
        return self._reader.place, found, bool(part.points), part.ended


def _shown_lines(lines: Iterable[LogLine], following: int, ended: bool) -> dict[str, Any]:
    return {"lines": [dataclasses.asdict(line) for line in lines], "next": following, "ended": ended}


# Streams


def _stream(call: Call, job_id: str, kind: str, read: Callable[[], Part], *, again: bool) -> Response:
    call.store.record(job_id, full=False)  # a 404 goes before everything
    stream = call.mount.streams.admit(call.request.environ)
    listener = stream.listen(hub_of(call.store), job_id)
    first = read()
    if again and first[3] and not first[2]:
        stream.close()
        return Response(status=204, headers={"Cache-Control": "no-store"})
    return stream.answer(itertools.chain(opening([]), _parts(listener, kind, first, read, call.mount.heartbeat)))


def _parts(listener: Listener, kind: str, part: Part, read: Callable[[], Part], heartbeat: float) -> Iterator[bytes]:
    over = time.monotonic() + LIFE
    while True:
        event_id, found, is_new, ended = part
        if is_new:
            yield frame_of(kind, event_id, found)
        if ended:
            yield frame_of("end", event_id, {})
            return
        # Behind a full part there may be more at once.
        if len(found.get("lines", ())) < LINES:
            yield from _until_told(listener, kind, over, heartbeat)
        if listener.cut_off or time.monotonic() >= over:
            return  # it comes again
        try:
            part = read()
        except (StoreError, JobNotFound):
            return


def _until_told(listener: Listener, kind: str, over: float, heartbeat: float) -> Iterator[bytes]:
    """Heartbeats, until there is something to be read."""
    while not listener.cut_off and time.monotonic() < over:
        events = listener.take(heartbeat)
        if any(event.kind in (kind, "state", "removed", UNHEARD) for event in events):
            return
        yield HEARTBEAT
