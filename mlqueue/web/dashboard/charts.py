"""Charts as SVG: paths in a box that the page stretches; what is written on them stands beside, as text."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final

from ...store.store import Moment

__all__ = ["Chart", "Path", "charts_of", "curve", "spark"]

#: The box that paths are drawn in.
WIDTH: Final = 600
HEIGHT: Final = 100

#: What the charts of the overview show, in seconds; and after which gap nothing is drawn between two points.
SPAN: Final = 3600
GAP: Final = 60

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Path:
    """A line, and the area below it."""

    line: str
    area: str
    #: The points for who looks closer: ``t,v t,v``.
    points: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A chart of the overview."""

    name: str
    #: A class for its colour.
    kind: str
    unit: str
    #: The newest value; None where there is none.
    value: float | None
    #: The top of its scale.
    top: float
    path: Path


def charts_of(course: Sequence[Moment], now: float) -> list[Chart]:
    """The charts of the last hour."""
    recent = [moment for moment in course if moment.at_ms / 1000 >= now - SPAN - GAP]
    return [
        _chart("Throughput", "good", "jobs / min", _rate(recent, lambda m: m.succeeded), now),
        _chart("Waiting", "wait", "jobs", _gauge(recent, lambda m: m.queued), now),
        _chart("Running", "run", "jobs", _gauge(recent, lambda m: m.running), now),
        _chart("Failures", "bad", "attempts / min", _rate(recent, lambda m: m.dead + m.retries), now),
    ]


def _gauge(course: Sequence[Moment], value: Callable[[Moment], float]) -> Points:
    return [(moment.at_ms / 1000, float(value(moment))) for moment in course]


def _rate(course: Sequence[Moment], value: Callable[[Moment], float]) -> Points:
    """How much a number grew, a minute."""
    found = []
    for before, after in itertools.pairwise(course):
        seconds = (after.at_ms - before.at_ms) / 1000
        if 0 < seconds <= GAP:
            found.append((after.at_ms / 1000, max(0.0, value(after) - value(before)) * 60 / seconds))
    return found


def _chart(name: str, kind: str, unit: str, points: Points, now: float) -> Chart:
    top = nice(max((value for _, value in points), default=0))
    path = _path(points, now - SPAN, now, 0, top, gap=GAP)
    value = points[-1][1] if points and points[-1][0] > now - 2 * GAP else None
    return Chart(name=name, kind=kind, unit=unit, value=value, top=top, path=path)


def nice(value: float) -> float:
    """The next round number: 1, 2 or 5 times a power of ten; 1 at least."""
    if value <= 1:
        return 1
    power = 10 ** math.floor(math.log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value))


def curve(points: Points) -> Path:
    """A curve that fills its box."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    low, high = _bounds([y for _, y in finite])
    first, last = _bounds([x for x, _ in finite])
    return _path(finite, first, last, low, high)


def spark(values: Sequence[float]) -> Path:
    """Values one after another."""
    return curve(list(enumerate(values)))


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values, default=0), max(values, default=1)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _path(points: Points, first: float, last: float, low: float, high: float, gap: float = math.inf) -> Path:
    line: list[str] = []
    area: list[str] = []
    stretch: list[tuple[float, float]] = []

    def end() -> None:
        if stretch:
            steps = " ".join(f"{x:.1f},{y:.1f}" for x, y in stretch)
            # A point alone is seen too.
            line.append(f"M{steps}" + (" h1" if len(stretch) == 1 else ""))
            area.append(f"M{stretch[0][0]:.1f},{HEIGHT} L{steps} L{stretch[-1][0]:.1f},{HEIGHT} Z")
            stretch.clear()

    before = -math.inf
    for x, y in points:
        if x < first:
            continue
        if x - before > gap:
            end()
        stretch.append(((x - first) / (last - first) * WIDTH, HEIGHT - (y - low) / (high - low) * HEIGHT))
        before = x
    end()
    told = " ".join(f"{x:.10g},{y:.4g}" for x, y in points if x >= first)
    return Path(line=" ".join(line), area=" ".join(area), points=told, low=low, high=high)
