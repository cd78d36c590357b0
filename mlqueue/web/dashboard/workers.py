"""Workers: what each process does and takes, and how it is asked to end."""

from __future__ import annotations

import itertools

from flask import Response

from ...errors import InvalidArguments
from ...store import WorkerInfo
from ..auth import ADMIN, READ
from ..operation import operation
from .visit import Visit

__all__ = ["ask_worker", "show_workers"]


@operation("GET", "/workers", scope=READ, tag="pages", answers={})
def show_workers(visit: Visit) -> Response:
    """Show the worker processes."""
    rows = sorted(visit.now.workers, key=lambda worker: (*_group(worker), worker.vitals.get("seat", 0), worker.id))
    groups = [(key, list(members)) for key, members in itertools.groupby(rows, key=_group)]
    return visit.page("workers", groups=groups, running=visit.now.running)


def _group(worker: WorkerInfo) -> tuple[str, int]:
    """Where it runs: the host, and the supervisor (0: none)."""
    return str(worker.info.get("host", "?")), int(worker.vitals.get("supervisor", 0))


@operation("POST", "/workers", scope=ADMIN, tag="pages", answers={})
def ask_worker(visit: Visit) -> Response:
    """Ask a worker to end."""
    worker, act = visit.field("worker"), visit.field("act")
    if act not in ("drain", "stop"):
        raise InvalidArguments(f"act {act!r}: a worker drains or stops.", faults=[("act", "is unknown")])
    visit.note(f"{act} worker", worker)
    return visit.go("show_workers", "asked" if visit.store.ask_worker(worker, act) else "nothing")
