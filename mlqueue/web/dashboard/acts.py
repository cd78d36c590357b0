"""What was noted of changes: who has changed what, and when."""

from __future__ import annotations

from typing import Final

from flask import Response

from ..auth import ADMIN
from ..operation import operation
from .visit import Visit

__all__ = ["show_acts"]

#: How many notes a page shows.
PAGE: Final = 100


@operation("GET", "/acts", scope=ADMIN, tag="pages", answers={})
def show_acts(visit: Visit) -> Response:
    """Show who has changed what."""
    start = min(visit.number("from") or 0, 10_000)
    acts = visit.store.acts(start, PAGE + 1)
    return visit.page("acts", acts=acts[:PAGE], start=start, following=start + PAGE if len(acts) > PAGE else None)
