"""``mlqueue limit`` and ``why``: how many slots there are, and what a job waits for."""

from __future__ import annotations

import click

from ..errors import InvalidJob
from ..limits import Limit, Limits, check_capacity
from ..why import why as why_of
from .call import Call, command
from .opening import open_store
from .text import on_terminal, table


@command()
@click.argument("name", required=False)
@click.argument("capacity", required=False, metavar="[N]")
@click.option("--unset", is_flag=True, help="Forget what was set: what settings or the actor say counts again.")
def limit(call: Call, name: str | None, capacity: str | None, unset: bool) -> None:
    """Set how many jobs that need NAME run at a time, or show the limits.

    NAME is a resource (`gpu`: @actor(resources={"gpu": 1})), or @ and an actor's name (`@train`). Without N the limit
    is shown; without NAME all are, with the jobs that hold their slots. Jobs that run go on, whatever their number.
    """
    if capacity is None and not unset:
        _show(call, name)
        return
    if name is None:
        raise click.UsageError("--unset needs the NAME of a limit; `mlqueue limit` lists them")
    if capacity is not None and unset:
        raise click.UsageError("give either a number or --unset")
    limits = Limits(open_store(call, start=True))
    if unset:
        slots = limits.unset(name)
    else:
        slots = check_capacity(int(capacity) if capacity and capacity.isdecimal() else capacity, name)
        limits.set(name, slots)
    if call.json:
        call.emit({"name": name, "capacity": slots})
    else:
        call.write(f"{name}\t{slots}\n")


def _show(call: Call, name: str | None) -> None:
    found = [one for one in Limits(open_store(call)).list() if name in (None, one.name)]
    if name is not None and not found:
        raise InvalidJob(f"limit {name!r}: nobody has spoken of it; `mlqueue limit {name} N` sets it.")
    if call.json:
        for one in found:
            call.emit(_plain(one), one_line=True)
        return
    rows = [(one.name, one.used, one.capacity, one.source, " ".join(sorted(one.held_by.values()))) for one in found]
    call.write(table(("limit", "used", "of", "set by", "held by"), rows))
    if not found and on_terminal():
        call.talk("there is no limit; `mlqueue limit gpu 1` sets one, @actor(resources={'gpu': 1}) makes jobs need it.")


def _plain(one: Limit) -> dict[str, object]:
    held = dict(one.held_by)
    return {"name": one.name, "capacity": one.capacity, "used": one.used, "source": one.source, "held_by": held}


@command()
@click.argument("job_id", metavar="ID")
def why(call: Call, job_id: str) -> None:
    """Say in one sentence why a job does not run.

    It waits for a slot that other jobs hold, for its time, for those before it, or for a worker that knows its actor.
    """
    reason = why_of(open_store(call), job_id)
    if call.json:
        call.emit(reason.asdict())
    else:
        call.write(f"{reason}\n")


__all__ = ["limit", "why"]
