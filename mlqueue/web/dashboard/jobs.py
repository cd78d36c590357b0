"""The list of jobs: filters, pages, and what is done to many."""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any, Final
from urllib.parse import urlencode

from flask import Response

from ... import codec
from ...errors import InvalidTransition, JobNotFound, MLQueueError
from ...job import JobRecord, State
from ..auth import READ, SUBMIT
from ..operation import operation
from .visit import Visit

__all__ = ["change_jobs", "list_jobs"]

#: How many jobs a page shows.
PAGE: Final = 50

#: How many jobs a search looks at, and for how many seconds, until it says so and offers to go on; and how many it
#: reads at a time.
LOOKS: Final = 500
LOOKS_FOR: Final = 0.05
BATCH: Final = 50

#: Arguments of more bytes are not searched, and of an error's message so many are.
MOST_BYTES: Final = 2**16
MOST_OF_ERROR: Final = 1000

#: How many of the jobs that one has submitted are known.
MOST_CHILDREN: Final = 1000

#: What `since` may be: names of ages, in seconds.
AGES: Final = {"5m": 300, "1h": 3600, "6h": 21600, "1d": 86400, "7d": 604800}

#: What the address of a view has.
VIEW: Final = ("actor", "queue", "tag", "since", "text", "state", "until", "cursor")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A page of jobs."""

    jobs: list[JobRecord]
    #: Where the next one begins.
    cursor: int | None
    #: How many were looked at, where a text was searched for.
    looked: int = 0


@operation("GET", "/jobs", scope=READ, tag="pages", answers={})
def list_jobs(visit: Visit) -> Response:
    """List jobs, newest first."""
    text = visit.asked("text")
    if re.fullmatch(r"[A-Za-z0-9._-]{8,128}", text) and visit.store.records([text])[0] is not None:
        return visit.go("show_job", job_id=text)
    states = [State(name) for name in visit.request.args.getlist("state") if name in set(State)]
    names = {name: visit.asked(name) for name in ("actor", "queue", "tag")}
    age = visit.asked("since")
    filters: dict[str, Any] = {name: value for name, value in names.items() if value}
    if states:
        filters["states"] = states
    if age in AGES:
        filters["since"] = time.time() - AGES[age]
    if (until := visit.number("until")) is not None:
        filters["until"] = until
    cursor = visit.number("cursor")
    found = _search(visit, text, filters, cursor) if text else _page(visit, filters, cursor)
    asked = [*names.items(), ("since", age if age in AGES else ""), ("text", text)]
    asked += [("state", state) for state in states]
    kept = [(name, value) for name, value in asked if value]
    return visit.page(
        "jobs",
        found=found,
        states=states,
        names=names,
        age=age,
        ages=list(AGES),
        text=text,
        cursor=cursor,
        errors=_errors(visit, found.jobs),
        link=lambda **more: _link(visit, kept, more),
        is_filtered=bool(kept),
    )


def _link(visit: Visit, kept: list[tuple[str, str]], more: dict[str, Any]) -> str:
    """The address of the list with other filters; None takes one away."""
    query = [(name, value) for name, value in kept if name not in more]
    query += [(name, value) for name, value in more.items() if value is not None]
    return f"{visit.jobs_url}?{urlencode(query)}" if query else visit.jobs_url


def _page(visit: Visit, filters: dict[str, Any], cursor: int | None) -> Found:
    page = visit.store.page(**filters, cursor=cursor, limit=PAGE)
    return Found(jobs=page.jobs, cursor=page.cursor)


def _search(visit: Visit, text: str, filters: dict[str, Any], cursor: int | None) -> Found:
    """Jobs that have a text somewhere; nothing has an index of that, so the newest are looked at, some at a time."""
    if text.startswith("parent:"):
        return _children(visit, text.removeprefix("parent:").strip(), cursor or 0)
    jobs: list[JobRecord] = []
    looked, wanted, until = 0, text.casefold(), time.monotonic() + LOOKS_FOR
    while True:
        page = visit.store.page(**filters, cursor=cursor, limit=BATCH)
        looked += len(page.jobs)
        jobs += _having(visit, page.jobs, wanted)
        cursor = page.cursor
        if cursor is None or len(jobs) >= PAGE or looked >= LOOKS or time.monotonic() >= until:
            return Found(jobs=jobs, cursor=cursor, looked=looked)


def _children(visit: Visit, job_id: str, skip: int) -> Found:
    """The jobs that a job has submitted, the newest first."""
    ids, _ = visit.store.children(job_id, MOST_CHILDREN)
    found = visit.store.records(ids[skip : skip + PAGE])
    jobs = [record for record in found if record is not None]
    return Found(jobs=jobs, cursor=skip + PAGE if len(ids) > skip + PAGE else None, looked=len(ids))


def _having(visit: Visit, records: list[JobRecord], wanted: str) -> list[JobRecord]:
    texts = visit.store.texts([record.id for record in records], MOST_BYTES, MOST_OF_ERROR)
    found = []
    for record, item in zip(records, texts, strict=True):
        if item is None:
            continue
        body, error = item
        parts: list[Any] = [record.id, record.actor, record.queue, record.progress_note]
        parts += [*record.tags, record.progress, record.dead_reason, error.text]
        if visit.sees_values:
            parts += [record.short_result, _arguments(body)]
        if any(wanted in str(part).casefold() for part in parts if part is not None):
            found.append(record)
    return found


def _arguments(body: bytes) -> str:
    """The arguments of a job as text, where these can be read."""
    try:
        args, kwargs, _ = codec.decode_call(body)
    except MLQueueError:
        return ""
    return f"{args} {kwargs}"


def _errors(visit: Visit, records: list[JobRecord]) -> dict[str, str]:
    """Why jobs are dead, on a line each."""
    dead = [record.id for record in records if record.state is State.DEAD]
    found = zip(dead, visit.store.died(dead), strict=True)
    return {one: died.error.text.strip().partition("\n")[0] for one, died in found if died is not None}


@operation("POST", "/jobs", scope=SUBMIT, tag="pages", answers={})
def change_jobs(visit: Visit) -> Response:
    """Cancel or retry those that were selected."""
    ids, act = visit.request.form.getlist("id")[:1000], visit.field("act")
    view: dict[str, Any] = visit.view(VIEW)
    if not ids:
        return visit.go("list_jobs", "nothing", **view)
    if act == "retry":
        visit.note("retry", ", ".join(ids))
        return visit.go("list_jobs", "retried", sum(_retried(visit, job_id) for job_id in ids), **view)
    visit.note("cancel", ", ".join(ids))
    return visit.go("list_jobs", "cancelled", sum(_cancelled(visit, job_id) for job_id in ids), **view)


def _cancelled(visit: Visit, job_id: str) -> bool:
    try:
        return not visit.store.cancel(job_id).ended
    except JobNotFound:
        return False  # it has been forgotten since


def _retried(visit: Visit, job_id: str) -> bool:
    try:
        visit.store.retry(job_id)
    except (JobNotFound, InvalidTransition):
        return False  # of those that were selected some cannot be
    return True
