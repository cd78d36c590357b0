"""A job: how it stands, what it went through, what it was given, what it gave, and why it waits."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from flask import Response
from markupsafe import Markup

from ... import codec
from ...errors import MLQueueError
from ...estimate import estimated_start
from ...handle import Job
from ...job import JobRecord, LogLine, Point, SavedCheckpoint, State
from ...store.chunks import BodyReference
from ...store.store import StoredFile
from ...why import why
from ..auth import READ, SUBMIT
from ..operation import operation
from ..results import DECLARED
from .charts import Path, curve
from .values import Shown, described
from .visit import Visit

__all__ = ["cancel_job", "redeliver_callback", "retry_job", "show_job"]

#: Values of more bytes are not decoded for a page; and checkpoints, which are read for it.
MOST_BYTES: Final = 4 * 2**20
MOST_OF_CHECKPOINT: Final = 2**16

#: How many lines of a log, and how many characters of them, a page begins with: the newest ones.
LINES: Final = 300
CHARACTERS: Final = 30_000

#: How many points all curves of a page have together, and how many one has at least and at most.
POINTS: Final = 4000
FEWEST: Final = 20
MOST: Final = 200

#: How many of the jobs that it submitted are shown.
CHILDREN: Final = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stretch:
    """A time that a job spent waiting or running."""

    #: ``wait``, ``run``, ``good``, ``bad`` or ``gone``: a class for its colour.
    kind: str
    text: str
    begin: float
    end: float
    #: More, such as the error; and where it ran.
    detail: str = ""
    where: str = ""
    #: The checkpoint that it began from.
    resumed: SavedCheckpoint | None = None
    #: In parts of a hundred of the whole: where it begins, and how long it is.
    left: float = 0.0
    width: float = 0.0

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.begin


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a job was called with; empty where it cannot be read."""

    #: By the names of the parameters, where these are known; else by their place.
    args: list[tuple[str, Shown]]
    kwargs: list[tuple[str, Shown]]
    options: dict[str, Any]
    #: Why there is nothing.
    fault: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gave:
    """What a job ended with."""

    size: int
    #: ``image``, ``audio``, ``video``, ``value`` or ``large``.
    kind: str
    value: Shown | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Waits:
    """Why a job waits, and for how long it will, as it seems."""

    text: Markup
    #: In seconds from now; None when nobody can say.
    left: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """A metric."""

    name: str
    path: Path
    #: How many points are kept of it, and the step of the first and of the last.
    count: int
    first: float
    last: float
    #: Its newest value.
    value: float


@operation("GET", "/jobs/<job_id>", scope=READ, tag="pages", answers={})
def show_job(visit: Visit, job_id: str) -> Response:
    """Show a job."""
    record = visit.store.record(job_id)
    hosts = {
        worker.id: f"{worker.info.get('host', '?')}, pid {worker.info.get('pid', '?')}" for worker in visit.now.workers
    }
    children, count = visit.store.children(job_id, CHILDREN)
    lines, following = _log(visit, job_id)
    return visit.page(
        "job",
        job=record,
        timeline=list(_timeline(record, hosts)),
        given=_given(visit, record) if visit.sees_values else None,
        gave=_gave(visit, record) if visit.sees_values else None,
        checkpoint=_checkpoint(visit, record),
        waits=_waits(visit, record),
        worker=hosts.get(record.worker or ""),
        children=[child for child in visit.store.records(children) if child is not None],
        child_count=count,
        curves=list(_curves(visit, job_id)),
        lines=lines,
        following=following,
    )


def _names(visit: Visit, actor: str) -> list[str]:
    """The names of an actor's parameters, as far as somebody has told them."""
    data = visit.store.published(actor)
    parameters = codec.decode(data)["parameters"] if data else []
    return [parameter["name"] for parameter in parameters if parameter["kind"] in ("any", "positional")]


def _given(visit: Visit, record: JobRecord) -> Given:
    try:
        body = visit.store.body(record.id)
        reference = BodyReference.of(body)
        size = len(body) if reference is None else reference.size
        if size > MOST_BYTES:
            return Given(args=[], kwargs=[], options={}, fault=f"{size:,} bytes: too many to be shown here.")
        args, kwargs, options = codec.decode_call(visit.store.whole_body(record.id, body))
    except MLQueueError as error:
        return Given(args=[], kwargs=[], options={}, fault=f"It cannot be read: {error.message}")
    names = _names(visit, record.actor)
    return Given(
        args=[
            (names[place] if place < len(names) else str(place + 1), described(value))
            for place, value in enumerate(args)
        ],
        kwargs=[(name, described(value)) for name, value in kwargs.items()],
        options=options,
    )


def _gave(visit: Visit, record: JobRecord) -> Gave | None:
    if record.state is not State.SUCCEEDED:
        return None
    try:
        return _value_of(visit.store.open_result(record.id), record)
    except MLQueueError:
        return None  # it has been removed


def _value_of(file: StoredFile, record: JobRecord) -> Gave:
    declared = DECLARED.get((record.content_type or "").partition(";")[0].strip().lower(), "")
    kind = declared.partition("/")[0]
    if kind in ("image", "audio", "video"):
        return Gave(size=file.size, kind=kind)
    if file.size > MOST_BYTES:
        return Gave(size=file.size, kind="large")
    return Gave(size=file.size, kind="value", value=described(codec.decode(file.read(file.size))))


def _checkpoint(visit: Visit, record: JobRecord) -> Shown | None:
    """What its next attempt would begin with; None where there is none, or it is not to be seen."""
    if not record.has_checkpoint or not visit.sees_values:
        return None
    data = visit.store.load_checkpoint(record.id, MOST_OF_CHECKPOINT)
    if data is None:
        return None
    try:
        return described(codec.decode(data))
    except MLQueueError:
        return None


# What it shows of itself


def _curves(visit: Visit, job_id: str) -> Iterator[Curve]:
    """The metrics that it has logged."""
    points = visit.store.metrics(job_id).points if visit.sees_values else {}
    most = max(FEWEST, min(MOST, POINTS // max(1, len(points))))
    for name, found in points.items():
        if found:
            path = curve([(point.step, point.value) for point in _thinned(found, most)])
            first, last = found[0].step, found[-1].step
            yield Curve(name=name, path=path, count=len(found), first=first, last=last, value=found[-1].value)


def _thinned(points: Sequence[Point], most: int) -> Sequence[Point]:
    step = -(-len(points) // most)
    return points if step == 1 else [*points[:-1:step], points[-1]]


def _log(visit: Visit, job_id: str) -> tuple[list[LogLine], int]:
    """The newest lines of its log, and the number of the line behind them."""
    if not visit.sees_values:
        return [], 0
    found = visit.store.log(job_id, -LINES, LINES)
    lines: list[LogLine] = []
    left = CHARACTERS
    for line in reversed(found.lines):
        left -= len(line.text)
        if left < 0 and lines:
            break
        lines.insert(0, line)
    return lines, found.next


# What it went through


def _timeline(record: JobRecord, hosts: dict[str, str]) -> Iterator[Stretch]:
    """What it went through, each with its place on a line from its creation to its end, or now."""
    stretches = list(_stretches(record, hosts))
    if not stretches:
        return
    begin, end = stretches[0].begin, stretches[-1].end
    whole = max(end - begin, 1e-6)
    for stretch in stretches:
        left, width = 100 * (stretch.begin - begin) / whole, 100 * stretch.seconds / whole
        yield dataclasses.replace(stretch, left=round(left, 2), width=round(width, 2))


def _stretches(record: JobRecord, hosts: dict[str, str]) -> Iterator[Stretch]:
    now, at, first = time.time(), record.created_at, True
    for attempt in record.attempts:
        if attempt.started_at > at:
            yield Stretch(kind="wait", text=_waited(first), begin=at, end=attempt.started_at)
        detail = attempt.error.text.partition("\n")[0] if attempt.error else ""
        yield Stretch(
            kind="bad",
            text=f"Attempt {attempt.attempt}: {attempt.outcome}",
            begin=max(attempt.started_at, at),
            end=max(attempt.ended_at, at),
            detail=detail,
            resumed=attempt.resumed_from,
            where=hosts.get(attempt.worker, f"worker {attempt.worker[:8]}"),
        )
        at, first = max(attempt.ended_at, at), False
    last = record.attempts[-1].attempt if record.attempts else 0
    if record.attempt > last and record.started_at is not None and record.started_at >= at - 0.001:
        yield Stretch(kind="wait", text=_waited(first), begin=at, end=max(at, record.started_at))
        at = max(at, record.started_at)
        end = max(at, record.finished_at or now)
        kind = "run" if not record.state.ended else "good" if record.state is State.SUCCEEDED else "gone"
        where = hosts.get(record.worker, f"worker {record.worker[:8]}") if record.worker else ""
        text = f"Attempt {record.attempt}: {record.state}"
        yield Stretch(kind=kind, text=text, begin=at, end=end, where=where, resumed=record.resumed_from)
    elif not record.state.ended:
        yield Stretch(kind="wait", text="Waits" if first else "Waits for its next attempt", begin=at, end=max(at, now))
    elif record.finished_at is not None and record.finished_at > at + 0.001:
        yield Stretch(kind="wait", text=f"Waited, then {record.state}", begin=at, end=record.finished_at)


def _waited(first: bool) -> str:
    return "Waited for a worker" if first else "Waited for its next attempt"


# Why it waits


def _waits(visit: Visit, record: JobRecord) -> Waits | None:
    """Why a job does not run, or not go on; None when nothing keeps it."""
    if record.state.ended or (record.state is State.RUNNING and record.waits_for is None):
        return None
    reason = why(visit.store, record.id)
    known = {*reason.held_by, *([record.waits_for] if record.waits_for else [])}
    text = "It " + reason.text.removeprefix(f"job {record.id} ")
    starts = None if record.state is State.RUNNING else estimated_start(visit.store, record.id)
    left = None if starts is None else max(0.0, starts - visit.store.now())
    return Waits(text=_sentence(visit, text, known), left=left)


def _sentence(visit: Visit, text: str, known: set[str]) -> Markup:
    """A sentence as markup: what is to be typed stands out, and jobs are links."""
    parts = []
    for part in re.split(r"(`[^`]*`|\bjob [A-Za-z0-9._-]*[A-Za-z0-9_-])", text):
        kind, _, name = part.partition(" ")
        if part.startswith("`"):
            parts.append(Markup("<code>{}</code>").format(part[1:-1]))
        elif kind == "job" and name in known:
            url = visit.url("show_job", job_id=name)
            short = name if len(name) <= 16 else f"{name[:8]}…{name[-6:]}"
            parts.append(Markup('job <a class="id" href="{}" title="{}">{}</a>').format(url, name, short))
        else:
            parts.append(Markup("{}").format(part))
    return Markup("").join(parts)


# What can be done


@operation("POST", "/jobs/<job_id>/cancel", scope=SUBMIT, tag="pages", answers={})
def cancel_job(visit: Visit, job_id: str) -> Response:
    """Cancel it."""
    visit.note("cancel", job_id)
    return visit.go("show_job", "cancelled", int(not visit.store.cancel(job_id).ended), job_id=job_id)


@operation("POST", "/jobs/<job_id>/retry", scope=SUBMIT, tag="pages", answers={})
def retry_job(visit: Visit, job_id: str) -> Response:
    """Put it back into its queue."""
    visit.note("retry", job_id)
    visit.store.retry(job_id)
    return visit.go("show_job", "retried", 1, job_id=job_id)


@operation("POST", "/jobs/<job_id>/redeliver", scope=SUBMIT, tag="pages", answers={})
def redeliver_callback(visit: Visit, job_id: str) -> Response:
    """Have its callback delivered again."""
    visit.note("redeliver", job_id)
    Job(visit.store, job_id).redeliver()
    return visit.go("show_job", "redelivered", job_id=job_id)
