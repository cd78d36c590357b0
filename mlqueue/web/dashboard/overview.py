"""The overview: what is wrong first, then how it fared over the last hour, then what goes on now."""

from __future__ import annotations

from typing import Final

from flask import Response

from ...overview import Now, Trouble, troubles
from ..auth import READ
from ..operation import operation
from .charts import charts_of
from .visit import Visit

__all__ = ["show_overview"]


@operation("GET", "/", scope=READ, tag="pages", answers={})
def show_overview(visit: Visit) -> Response:
    """Show how all stands."""
    now = visit.now
    # For all who see the same it is made once: many have it open.
    key = None if visit.has_signed_in or visit.asked("told") else _key(visit)
    made = visit.dashboard.made.get(key) if key else None
    if made is not None and made[0] is now:
        return Response(made[1], content_type="text/html; charset=utf-8")
    answer = _page(visit, now)
    if key:
        if len(visit.dashboard.made) >= MOST_KEPT:
            visit.dashboard.made.clear()
        visit.dashboard.made[key] = now, answer.get_data()
    return answer


def _key(visit: Visit) -> tuple[str, str, frozenset[str]]:
    """What the page depends on, beside how all stands: where it is, and what may be done."""
    assert visit.principal is not None
    return visit.url("show_overview"), visit.request.host, visit.principal.scopes


def _page(visit: Visit, now: Now) -> Response:
    found = [(trouble, _more(visit, trouble)) for trouble in troubles(now)]
    return visit.page("overview", now=now, troubles=found, charts=charts_of(now.course, now.at))


def _more(visit: Visit, trouble: Trouble) -> str:
    """Where there is more about it."""
    if trouble.about == "waiting":
        return visit.url("list_jobs", queue=trouble.queue, state="queued")
    return visit.url(PAGES[trouble.about])


#: How many overviews are kept: one for each prefix and set of scopes.
MOST_KEPT: Final = 50

#: The pages that show more, by what it is about.
PAGES: Final = {
    "queue": "show_queues",
    "dead": "list_dead_letters",
    "worker": "show_workers",
    "callback": "show_callbacks",
}
