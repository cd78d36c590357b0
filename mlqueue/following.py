"""Reading what a job shows of itself while it goes on showing: its log, and its metrics."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

from .job import LogLine, Metric, Point
from .store import Store
from .waiting import changes

__all__ = ["PLACE", "MetricsPart", "MetricsReader", "follow_log", "follow_metrics", "read_log"]

#: How many lines are read with one call.
LINES: Final = 1000

#: What a place in the metrics looks like: attempt, and time of the last point that is known.
PLACE: Final = re.compile(r"\d{1,10}-\d{1,11}(\.\d{1,9})?")


def read_log(store: Store, job_id: str, first: int = 0, limit: int | None = None) -> tuple[list[LogLine], int, bool]:
    """The lines of a log from number `first` on (below 0: the last so many), at most `limit`; the number behind them;
    and whether these are the last, since the job has ended. Raises `JobNotFound`."""
    lines: list[LogLine] = []
    while True:
        left = LINES if limit is None else min(LINES, limit - len(lines))
        part = store.log(job_id, first, left)
        lines += part.lines
        first = part.next
        if len(part.lines) < left or len(lines) == limit:
            return lines, first, part.ended and len(part.lines) < left


def follow_log(store: Store, job_id: str, first: int = 0, timeout: float | None = None) -> Iterator[LogLine]:
    """The lines of a log, those to come too, until the job has ended or `timeout` seconds have passed."""
    for _ in changes(store, job_id, timeout):
        lines, first, _ = read_log(store, job_id, first)
        yield from lines


class MetricsPart(NamedTuple):
    """What is new of the metrics of a job."""

    #: The points by the metric's name, oldest first.
    points: dict[str, list[Point]]
    #: Whether these are all that there are, in the place of those that are known: a later attempt has begun again.
    whole: bool
    #: The attempt that logged metrics last; 0 when none has.
    attempt: int
    #: Whether the job has ended: there will be no more.
    ended: bool


class MetricsReader:
    """Reads the metrics of a job, each point once.

    Parameters:
      place: Where an earlier one stood (`place`); empty to read all.
    """

    def __init__(self, store: Store, job_id: str, place: str = "") -> None:
        self._store = store
        self._job_id = job_id
        attempt, _, at = place.partition("-")
        self._attempt, self._at = (int(attempt), float(at)) if place else (0, 0.0)
        self._read = bool(place)

    @property
    def place(self) -> str:
        """What another one begins behind."""
        return f"{self._attempt}-{self._at!r}"

    def read(self) -> MetricsPart:
        """What is new since the last time. Raises `JobNotFound`."""
        shown = self._store.metrics(self._job_id, self._at)
        whole = not self._read or (shown.attempt != self._attempt and self._at > 0)
        if whole and self._at > 0:
            shown = self._store.metrics(self._job_id)
        self._attempt, self._read = shown.attempt, True
        self._at = max([self._at, *(points[-1].at for points in shown.points.values() if points)])
        points = {name: found for name, found in shown.points.items() if found}
        return MetricsPart(points, whole, shown.attempt, shown.ended)


def follow_metrics(store: Store, job_id: str, timeout: float | None = None) -> Iterator[Metric]:
    """The values of all metrics, those to come too, in the order in which they were logged. Those of an earlier attempt
    that a later one replaces have been told of before."""
    at = 0.0
    for _ in changes(store, job_id, timeout):
        shown = store.metrics(job_id, at)
        new = [Metric(name, *point) for name, points in shown.points.items() for point in points]
        for metric in sorted(new, key=lambda one: one.at):
            at = metric.at
            yield metric
