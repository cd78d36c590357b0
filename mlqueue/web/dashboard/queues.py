"""Queues: what is in them, and what can be done with all of it."""

from __future__ import annotations

from flask import Response

from ...errors import InvalidArguments
from ..auth import ADMIN, READ
from ..operation import operation
from .visit import Visit

__all__ = ["change_queue", "show_queues"]


@operation("GET", "/queues", scope=READ, tag="pages", answers={})
def show_queues(visit: Visit) -> Response:
    """Show the queues."""
    return visit.page("queues", queues=visit.now.queues)


@operation("POST", "/queues", scope=ADMIN, tag="pages", answers={})
def change_queue(visit: Visit) -> Response:
    """Pause, resume or drain one."""
    queue, act = visit.field("queue"), visit.field("act")
    if act == "pause":
        visit.note("pause", queue)
        visit.store.pause(queue, visit.who[:100])
        return visit.go("show_queues", "paused")
    if act == "resume":
        visit.note("resume", queue)
        visit.store.resume(queue)
        return visit.go("show_queues", "resumed")
    if act != "drain":
        raise InvalidArguments(f"act {act!r}: pause, resume or drain.", faults=[("act", "is unknown")])
    if not visit.is_sure():
        question = f"Forget every job that waits in {queue}, scheduled ones too? That cannot be undone."
        return visit.ask_whether_sure(question, "Drain it", {"queue": queue, "act": "drain"}, visit.url("show_queues"))
    visit.note("drain", queue)
    return visit.go("show_queues", "drained", visit.store.flush(queue))
