"""Limits: how many slots there are, which jobs hold them, and which wait for them."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping
from typing import Final

from flask import Response

from ...errors import InvalidArguments
from ...job import JobRecord
from ...limits import Limit
from ...store.store import Parked
from ..auth import ADMIN, READ
from ..operation import operation
from .visit import Visit

__all__ = ["change_limit", "show_limits"]

#: How many limits a page shows, and how many holders of each: a concurrency key is a limit of its own while jobs run.
MOST: Final = 100
HOLDERS: Final = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Held:
    """A job that holds slots of a limit."""

    job_id: str
    slots: int
    #: None where it was forgotten meanwhile.
    record: JobRecord | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A limit as the page shows it."""

    limit: Limit
    #: Its first holders, those that were started first at the top.
    held: list[Held]
    parked: list[Parked]

    @property
    def left(self) -> int:
        """How many holders are not shown."""
        return len(set(self.limit.held_by.values())) - len(self.held)

    @property
    def waiting(self) -> int:
        """How many jobs wait for it, as far as is known."""
        return sum(lane.number for lane in self.parked)

    @property
    def can_be_set(self) -> bool:
        """Whether it has a number of its own: that of a concurrency key is its actor's."""
        return "/" not in self.limit.name


@operation("GET", "/limits", scope=READ, tag="pages", answers={})
def show_limits(visit: Visit) -> Response:
    """Show who holds which limit, and who waits for it."""
    limits, parked = visit.mlq.limits.list(), visit.store.parked()
    # Those that somebody waits for first, then those in use.
    limits.sort(key=lambda limit: (limit.name not in parked, not limit.held_by, limit.name))
    slots = [collections.Counter(limit.held_by.values()) for limit in limits[:MOST]]
    ids = list(dict.fromkeys(job_id for counter in slots for job_id in list(counter)[:HOLDERS]))
    records = dict(zip(ids, visit.store.records(ids), strict=True))
    shown = zip(limits[:MOST], slots, strict=True)
    rows = [_row(limit, counter, records, parked.get(limit.name, [])) for limit, counter in shown]
    return visit.page("limits", rows=rows, left=len(limits) - len(rows))


def _row(limit: Limit, slots: Mapping[str, int], records: Mapping[str, JobRecord | None], parked: list[Parked]) -> Row:
    held = [Held(job_id=one, slots=slots[one], record=records[one]) for one in list(slots)[:HOLDERS]]
    held.sort(key=lambda one: one.record.started_at or 0.0 if one.record is not None else 0.0)
    return Row(limit=limit, held=held, parked=parked)


@operation("POST", "/limits", scope=ADMIN, tag="pages", answers={})
def change_limit(visit: Visit) -> Response:
    """Set how many slots a limit has, or have settings and actors say so again."""
    name, act = visit.field("limit"), visit.field("act")
    if act == "unset":
        visit.note("unset limit", name)
        return visit.go("show_limits", "limit", visit.mlq.limits.unset(name))
    text = visit.field("capacity")
    if act != "set" or not text.isascii() or not text.isdecimal():
        raise InvalidArguments(f"capacity {text!r}: give a number.", faults=[("capacity", "is no number")])
    visit.note("set limit", f"{name} to {text}")
    visit.mlq.limits.set(name, int(text[:9]))
    return visit.go("show_limits", "limit", int(text[:9]))
