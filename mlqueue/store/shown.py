"""What jobs show of themselves while they run, as the store keeps it: lines of a log, metrics, what an attempt used.

The points of a metric lie behind each other as three doubles each, so that the script which adds some needs only to
join bytes. `Series` is the worker's side of one: it keeps the number of points bounded.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgpack

from ..job import LogLine, Point

#: What lies before the points of a metric: how many values have one point, and how many values there were.
HEAD: Final = struct.Struct("<IQ")

#: A point: step, value, time.
POINT: Final = struct.Struct("<ddd")

#: The letters of the streams; what was logged has the name of its level instead.
STREAMS: Final = {"o": "stdout", "e": "stderr"}


class Series:
    """The points of one metric, at most `most` of them: when there are more, every second one goes, and from then on
    only every second (fourth, eighth ...) value has a point of its own. The newest one is always there.
    """

    __slots__ = ("_count", "_most", "_points", "_stride", "_written")

    def __init__(self, most: int, stored: bytes = b"") -> None:
        self._most = max(2, most)
        self._stride, self._count = HEAD.unpack_from(stored) if stored else (1, 0)
        self._points = bytearray(stored[HEAD.size :])
        #: How many bytes of the points the store has.
        self._written = len(self._points)

    def __len__(self) -> int:
        return len(self._points) // POINT.size

    def add(self, step: float, value: float, at: float) -> None:
        """Adds a value."""
        if self._count and (self._count - 1) % self._stride:
            self._cut(len(self) - 1)  # it was the newest one, and no more
        elif len(self) >= self._most:
            self._thin()
        self._points += POINT.pack(step, value, at)
        self._count += 1

    def restart(self, step: float) -> None:
        """A later attempt goes on at `step`: what an earlier one had from there on goes."""
        length = len(self)
        while length and POINT.unpack_from(self._points, (length - 1) * POINT.size)[0] >= step:
            length -= 1
        if length < len(self):
            self._cut(length)
            self._count = (length - 1) * self._stride + 1 if length else 0

    @property
    def newest(self) -> float:
        """The time of the newest point; 0 when there is none."""
        return POINT.unpack_from(self._points, len(self._points) - POINT.size)[2] if self._points else 0.0

    @property
    def is_written(self) -> bool:
        """Whether the store has all of it."""
        return self._written == len(self._points)

    def to_write(self) -> tuple[bytes, int, bytes]:
        """Its head, how many bytes of what the store has stay, and what comes behind them."""
        return HEAD.pack(self._stride, self._count), self._written, bytes(self._points[self._written :])

    def written(self, well: bool) -> None:
        """What `to_write` gave has been written, or it is not known whether."""
        self._written = len(self._points) if well else 0

    def _cut(self, length: int) -> None:
        del self._points[length * POINT.size :]
        self._written = min(self._written, len(self._points))

    def _thin(self) -> None:
        kept = [self._points[at : at + POINT.size] for at in range(0, len(self._points), 2 * POINT.size)]
        self._points = bytearray().join(kept)
        self._stride *= 2
        self._written = 0


class Showing(NamedTuple):
    """What is written of one job with one call."""

    id: str
    attempt: int
    #: The number of the first of `lines` among those of this attempt.
    first: int
    #: Time (Unix ms), kind and text of each. The kind is ``o`` (stdout), ``e`` (stderr) or the name of a level.
    lines: Sequence[tuple[int, str, str]]
    #: By name; see `Series.to_write`.
    metrics: Mapping[str, tuple[bytes, int, bytes]]
    #: See `records.pack_usage`; empty when there is nothing new.
    usage: bytes


def pack_showings(showings: Sequence[Showing]) -> list[bytes]:
    """Each as show.lua takes it."""
    # One packer for all: that of `pack` is made anew for each call.
    packed = msgpack.Packer(use_bin_type=False, unicode_errors="backslashreplace").pack
    return [
        packed(
            [
                one.id,
                one.attempt,
                one.first,
                [packed([at, one.attempt, kind, text]) for at, kind, text in one.lines],
                [part for name, parts in one.metrics.items() for part in (name, *parts)],
                one.usage or False,
            ]
        )
        for one in showings
    ]


def decode_line(number: int, data: bytes) -> LogLine:
    """A line of a log; its number is not kept with it."""
    at, attempt, kind, text = msgpack.unpackb(data, raw=True)
    name = kind.decode(errors="replace")
    stream = STREAMS.get(name)
    level = None if stream else name
    return LogLine(number, at / 1000, attempt, stream or "logging", level, text.decode("utf-8", "replace"))


def decode_points(data: bytes) -> list[Point]:
    """The points of a metric, oldest first. Steps that are whole numbers are ints."""
    return [Point(_step(step), value, at) for step, value, at in POINT.iter_unpack(data[HEAD.size :])]


def _step(step: float) -> int | float:
    return int(step) if step.is_integer() and math.isfinite(step) else step


class ShownLines(NamedTuple):
    """Lines of a job's log."""

    lines: list[LogLine]
    #: The number of the line behind them.
    next: int
    #: Whether the job has ended: then there are no more behind the last.
    ended: bool


class ShownMetrics(NamedTuple):
    """The metrics of a job."""

    #: The points of each by its name, oldest first.
    points: dict[str, list[Point]]
    #: The attempt that logged metrics last; 0 when none has.
    attempt: int
    ended: bool


__all__ = [
    "Series",
    "Showing",
    "ShownLines",
    "ShownMetrics",
    "decode_line",
    "decode_points",
    "pack_showings",
]
