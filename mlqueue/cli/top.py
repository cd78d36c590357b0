"""``mlqueue top``: how all stands, in the terminal, drawn anew every second or two."""

from __future__ import annotations

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import click

from ..errors import MissingDependency, StoreError
from ..job import JobRecord, State
from ..overview import Now, read_now, troubles
from ..store import Store
from ..store.store import Moment
from . import types
from .call import Call, command
from .opening import open_store
from .pools import POOL_HEAD, pool_rows
from .text import ago, clean, duration, error_text, on_terminal, progress
from .values import plain

__all__ = ["EVERY", "follow", "top"]

#: How often all is read, in seconds, unless told otherwise.
EVERY: Final = 2.0

#: How many jobs are shown where nothing else was asked for.
LATEST: Final = 20

#: Heights of a little chart, lowest first, and how many of them it has.
BLOCKS: Final = "▁▂▃▄▅▆▇█"
WIDTH: Final = 40

#: Columns of numbers.
NUMBERS: Final = {"queued", "running", "dead", "oldest", "workers", "memory", "CPU", "restarts", *POOL_HEAD[2:-1]}

#: What each state is shown in.
COLOURS: Final = {
    State.QUEUED: "yellow",
    State.SCHEDULED: "magenta",
    State.RUNNING: "blue",
    State.SUCCEEDED: "green",
    State.DEAD: "red",
    State.CANCELLED: "bright_black",
}


@command()
@click.option(
    "--every", type=types.duration, default=EVERY, show_default=True, metavar="DURATION", help="How often it is drawn."
)
@click.option("--once", is_flag=True, help="Draw it once and end.")
def top(call: Call, every: float, once: bool) -> None:
    """Watch queues, workers and the latest jobs, until Ctrl-C: the overview of the dashboard, in the terminal.

    It needs rich (pip install 'mlqueue[terminal]'). Where stdout is no terminal it is drawn once. With --json it is a
    line of JSON instead, each time.
    """
    store = open_store(call)
    follow(call, store, every, lambda: store.page(limit=LATEST).jobs, once=once or not (on_terminal() or call.json))


def follow(
    call: Call, store: Store, every: float, jobs: Callable[[], Sequence[JobRecord]], *, once: bool = False
) -> None:
    """Shows how all stands, and those jobs, until Ctrl-C; only `once` where that is asked for."""
    if call.json:
        while True:
            call.emit(_plain(read_now(store), jobs()), one_line=True)
            if once:
                return
            time.sleep(max(every, 0.05))
    if once or not on_terminal():
        _rich("console").Console(file=sys.stdout).print(_picture(store, read_now(store), jobs()))
        return
    try:
        _draw(store, every, jobs)
    except KeyboardInterrupt:
        pass  # that is how it ends


def _draw(store: Store, every: float, jobs: Callable[[], Sequence[JobRecord]]) -> None:
    with _rich("live").Live(screen=True, auto_refresh=False) as live:
        while True:
            try:
                picture = _picture(store, read_now(store), jobs())
            except StoreError as error:
                picture = _rich("text").Text(f"the store does not answer: {clean(error.message)}", style="red")
            live.update(picture, refresh=True)
            time.sleep(max(every, 0.05))


def _rich(name: str) -> Any:
    """A module of rich. Raises `MissingDependency`."""
    try:
        import rich.console
        import rich.live
        import rich.table
        import rich.text
    except ImportError as error:
        raise MissingDependency(
            "mlqueue top needs rich, which is not installed: pip install 'mlqueue[terminal]'. `mlqueue top --json` "
            "and `mlqueue stats` go without it."
        ) from error
    return getattr(rich, name)


def _plain(now: Now, jobs: Sequence[JobRecord]) -> dict[str, Any]:
    return {
        "counts": {str(state): number for state, number in now.counts.items()},
        "troubles": [trouble.text for trouble in troubles(now)],
        "queues": [
            {
                "name": queue.name,
                "counts": {str(state): number for state, number in queue.counts.items()},
                "workers": queue.workers,
                "oldest_waiting": queue.oldest,
                "paused": queue.paused is not None,
            }
            for queue in now.queues
        ],
        "workers": [
            {**dataclasses.asdict(worker), "info": {"host": worker.info.get("host"), "pid": worker.info.get("pid")}}
            for worker in now.workers
        ],
        "pools": [{"id": run, **plain(pool)} for run, pool in sorted(now.pools.items())],
        "jobs": [record.asdict() for record in jobs],
    }


# The picture


def _picture(store: Store, now: Now, jobs: Sequence[JobRecord]) -> Any:
    parts = [
        _head(store, now),
        *_troubles(now),
        _course(now),
        "",
        _queues(now),
        "",
        _workers(now),
        "",
        *_pools(now),
        _jobs(store, jobs),
    ]
    return _rich("console").Group(*[part for part in parts if part is not None])


def _head(store: Store, now: Now) -> Any:
    text = _rich("text").Text()
    text.append(f"{clean(store.namespace)}  ", style="bold")
    for state in State:
        text.append(f"{now.counts.get(state, 0):,} {state}  ", style=COLOURS[state])
    return text


def _troubles(now: Now) -> list[Any]:
    make, styles = _rich("text").Text, {"bad": "red", "warn": "yellow"}
    return [make(f"! {clean(trouble.text)}", style=styles[trouble.level]) for trouble in troubles(now)]


def _course(now: Now) -> Any:
    """Throughput and waiting over the last hour; None where nothing is known of it."""
    if len(now.course) < 2:
        return None
    text = _rich("text").Text()
    for name, values, style in (
        ("ended/min", _rates(now.course), "green"),
        ("waiting", [float(moment.queued) for moment in now.course], "yellow"),
    ):
        text.append(f"{name} {values[-1]:,.0f} ")
        text.append(f"{_blocks(values)}  ", style=style)
    return text


def _rates(course: Sequence[Moment]) -> list[float]:
    """How many jobs succeeded, a minute, between each two."""
    return [
        max(0, after.succeeded - before.succeeded) * 60_000 / max(1, after.at_ms - before.at_ms)
        for before, after in itertools.pairwise(course)
    ]


def _blocks(values: Sequence[float]) -> str:
    """A little chart of values: each place is the greatest of those that fall into it."""
    size = max(1, -(-len(values) // WIDTH))
    tops = [max(values[at : at + size]) for at in range(0, len(values), size)]
    highest = max(tops) or 1.0
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(value / highest * (len(BLOCKS) - 1) + 0.5))] for value in tops)


def _table(*columns: str) -> Any:
    table = _rich("table").Table(box=None, pad_edge=False, header_style="bold bright_black", expand=False)
    for name in columns:
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=True, overflow="ellipsis")
    return table


def _row(table: Any, *cells: Any) -> None:
    """Adds a row: texts are no markup, and nothing in them that a terminal would obey."""
    make = _rich("text").Text
    table.add_row(*[cell if isinstance(cell, make) else make(clean(cell)) for cell in cells])


def _queues(now: Now) -> Any:
    table = _table("queue", "queued", "running", "dead", "oldest", "workers", "")
    for queue in now.queues:
        numbers = [f"{queue.counts.get(state, 0):,}" for state in (State.QUEUED, State.RUNNING, State.DEAD)]
        oldest = "" if queue.oldest is None else duration(queue.oldest)
        note = "paused" if queue.paused else "no worker" if queue.is_deserted else ""
        _row(table, queue.name, *numbers, oldest, queue.workers, note)
    return table


def _workers(now: Now) -> Any:
    table = _table("host", "pid", "memory", "CPU", "restarts", "does")
    for worker in now.workers:
        vitals = worker.vitals
        told = ("", "", "")
        if vitals:
            told = (f"{vitals['rss'] / 2**20:,.0f}M", f"{100 * vitals['cpu']:.0f}%", str(vitals["restarts"]))
        jobs = [now.running[job_id] for job_id in worker.jobs if job_id in now.running]
        does = ", ".join(f"{record.actor} {progress(record)}".strip() for record in jobs) or "idle"
        _row(table, worker.info.get("host", "?"), worker.info.get("pid", "?"), *told, does)
    return table


def _pools(now: Now) -> list[Any]:
    """The pools that have batches prepared, and how those travel; nothing where there are none."""
    if not now.pools:
        return []
    table = _table(*POOL_HEAD)
    for row in pool_rows(now.pools):
        _row(table, *row)
    return [table, ""]


def _jobs(store: Store, jobs: Sequence[JobRecord]) -> Any:
    table = _table("state", "job", "actor", "queue", "created", "how it is")
    dead = store.records([record.id for record in jobs if record.state is State.DEAD])
    errors = {record.id: error_text(record.error) for record in dead if record is not None and record.error}
    for record in jobs:
        state = _rich("text").Text(str(record.state), style=COLOURS[record.state])
        how = errors.get(record.id) or progress(record)
        _row(table, state, record.id, record.actor, record.queue, ago(record.created_at), how)
    return table
