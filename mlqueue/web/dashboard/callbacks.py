"""Callbacks: those that are to be delivered, and how those of the latest jobs went."""

from __future__ import annotations

from typing import Final

from flask import Response

from ...job import JobRecord, State
from ...store.records import CALLBACKS
from ..auth import READ
from ..operation import operation
from .visit import Visit

__all__ = ["show_callbacks"]

#: Of how many of the latest jobs the callbacks are shown.
LATEST: Final = 100

ENDED: Final = tuple(state for state in State if state.ended)


@operation("GET", "/callbacks", scope=READ, tag="pages", answers={})
def show_callbacks(visit: Visit) -> Response:
    """Show the callbacks."""
    waiting = visit.store.page(queue=CALLBACKS, limit=LATEST).jobs
    latest = visit.store.page(states=ENDED, limit=LATEST).jobs
    ids = dict.fromkeys([*(record.parent for record in waiting if record.parent), *(record.id for record in latest)])
    found: list[JobRecord] = [
        record
        for record in visit.store.records(list(ids), full=True)
        if record is not None and record.callback is not None
    ]
    return visit.page("callbacks", jobs=found, latest=LATEST)
