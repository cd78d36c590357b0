"""Pages that show what another part of the HTTP interface has, where it has it: limits, functions, schedules; and what
was noted of changes.

Each looks up its route in the table of operations by its path: where there is none there is no page, and no link to it.
"""

from __future__ import annotations

import json
from typing import Any, Final

from flask import Response

from ...errors import InvalidArguments
from ..auth import ADMIN, READ
from ..call import Call
from ..operation import Operation, operation
from ..table import OPERATIONS
from .values import described
from .visit import Visit

__all__ = ["LOADED", "loadable", "show_acts", "show_functions", "show_limits", "show_schedules"]

#: The operations that read something, by their rule.
READING: Final = {operation.rule: operation for operation in OPERATIONS if operation.method == "GET"}

#: What of a job the pages load besides, by what it is: the metrics that it logged, and its log.
OF_A_JOB: Final = {
    what: READING[f"/jobs/<job_id>/{what}"] for what in ("metrics", "logs") if f"/jobs/<job_id>/{what}" in READING
}
LOADED: Final = tuple(OF_A_JOB.values())

#: How many notes a page shows.
PAGE: Final = 100


def loadable(visit: Visit, what: str, job_id: str) -> str | None:
    """Where `what` of a job is loaded from; None where nothing tells it."""
    return visit.url(OF_A_JOB[what].name, job_id=job_id) if what in OF_A_JOB else None


@operation("GET", "/limits", scope=READ, tag="pages", answers={})
def show_limits(visit: Visit) -> Response:
    """Show who holds which limit, and what is parked."""
    return _listing(visit, "Limits", "/limits")


@operation("GET", "/functions", scope=READ, tag="pages", answers={})
def show_functions(visit: Visit) -> Response:
    """Show the functions of MLQ's listeners."""
    return _listing(visit, "Functions", "/functions")


@operation("GET", "/schedules", scope=READ, tag="pages", answers={})
def show_schedules(visit: Visit) -> Response:
    """Show what is run again and again."""
    return _listing(visit, "Schedules", "/schedules")


def _listing(visit: Visit, title: str, rule: str) -> Response:
    reading = READING.get(rule)
    if reading is None:
        raise InvalidArguments(f"there are no {title.lower()} here.", faults=[(rule, "is not there")])
    rows = _rows(_answer(visit, reading))
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[described(row.get(name)) for name in names] for row in rows]
    return visit.page("listing", title=title, names=names, rows=cells)


def _answer(visit: Visit, reading: Operation) -> Any:
    """What an operation answers to who asks here."""
    call = Call(reading, visit.mount, visit.request, {})
    call.principal = visit.principal
    return json.loads(reading.function(call).get_data())


def _rows(answer: Any) -> list[dict[str, Any]]:
    """The first list of objects in an answer; an object of objects counts as one, by name."""
    values = answer.values() if isinstance(answer, dict) else [answer]
    for value in values:
        if isinstance(value, list) and all(isinstance(item, dict) for item in value):
            return value
    for value in values:
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            return [{"name": name, **item} for name, item in value.items()]
    return []


@operation("GET", "/acts", scope=ADMIN, tag="pages", answers={})
def show_acts(visit: Visit) -> Response:
    """Show who has changed what."""
    start = min(visit.number("from") or 0, 10_000)
    acts = visit.store.acts(start, PAGE + 1)
    return visit.page("acts", acts=acts[:PAGE], start=start, following=start + PAGE if len(acts) > PAGE else None)
