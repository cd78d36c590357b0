"""The overview: what is wrong first, then how it fared over the last hour, then what goes on now."""

from __future__ import annotations

from typing import Final

from flask import Response

from ...overview import Trouble, troubles
from ..auth import READ
from ..operation import operation
from .charts import charts_of
from .visit import Visit

__all__ = ["show_overview"]

#: The pages that show more, by what it is about.
PAGES: Final = {
    "queue": "show_queues",
    "dead": "list_dead_letters",
    "worker": "show_workers",
    "callback": "show_callbacks",
}


@operation("GET", "/", scope=READ, tag="pages", answers={})
def show_overview(visit: Visit) -> Response:
    """Show how all stands."""
    now = visit.now
    found = [(trouble, _more(visit, trouble)) for trouble in troubles(now)]
    return visit.page("overview", now=now, troubles=found, charts=charts_of(now.course, now.at))


def _more(visit: Visit, trouble: Trouble) -> str:
    """Where there is more about it."""
    if trouble.about == "waiting":
        return visit.url("list_jobs", queue=trouble.queue, state="queued")
    return visit.url(PAGES[trouble.about])
