"""The functions of MLQ's listeners: those that were posted, and those that workers have of their own."""

from __future__ import annotations

import collections
import dataclasses
from urllib.parse import unquote

from flask import Response

from ...functions import Functions, PostedFunction
from ..auth import READ
from ..operation import operation
from .visit import Visit

__all__ = ["show_functions"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A function as the page shows it."""

    name: str
    #: How many workers have it.
    workers: int
    #: None for one that stands in the program of a worker.
    posted: PostedFunction | None


@operation("GET", "/functions", scope=READ, tag="pages", answers={})
def show_functions(visit: Visit) -> Response:
    """Show the functions of MLQ's listeners, and which of them could not be loaded."""
    posted = {one.name: one for one in Functions(visit.store).list()}
    having: collections.Counter[str] = collections.Counter()
    for worker in visit.now.workers:
        having.update(unquote(name) for name in worker.info.get("functions", ()))
    names = [*posted, *sorted(set(having) - set(posted))]
    rows = [Row(name=name, workers=having[name], posted=posted.get(name)) for name in names]
    return visit.page("functions", rows=rows)
