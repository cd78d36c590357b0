"""``mlqueue jobs``, ``show`` and ``stats``: what there is."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import click

from .. import codec
from ..errors import MLQueueError
from ..estimate import estimated_start
from ..job import Attempt, CallbackAttempt, JobRecord, SavedCheckpoint, State
from ..store import Store, WorkerInfo
from ..store.chunks import BodyReference
from . import types
from .call import Call, command
from .live import status
from .opening import open_store
from .pools import POOL_HEAD, pool_rows
from .text import ago, clean, clean_lines, cut, duration, error_text, iso, on_terminal, progress, table, usage_text
from .top import EVERY, follow
from .values import plain

#: How many jobs are asked of the store at once.
PAGE = 500

#: How much of a job's arguments is shown to a person, in characters.
ARGUMENTS = 500


@command()
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([str(state) for state in State], case_sensitive=False),
    help="Jobs in this state. May be repeated.",
)
@click.option("--actor", metavar="NAME", help="Jobs of this actor.")
@click.option("--queue", metavar="NAME", help="Jobs of this queue.")
@click.option("--tag", metavar="TEXT", help="Jobs that carry this tag.")
@click.option(
    "--since",
    type=types.moment,
    metavar="TIME",
    help="Created then or later: 10m (ago), 2026-01-31T12:00, @UNIX_SECONDS.",
)
@click.option("--until", type=types.moment, metavar="TIME", help="Created then or earlier.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
@click.option("--cursor", type=click.IntRange(0), help="Where to go on; the last page says it.")
@click.option("--watch", is_flag=True, help="Show them, with queues and workers, again and again: see `mlqueue top`.")
def jobs(
    call: Call,
    states: tuple[str, ...],
    actor: str | None,
    queue: str | None,
    tag: str | None,
    since: float | None,
    until: float | None,
    limit: int,
    cursor: int | None,
    watch: bool,
) -> None:
    """List jobs, newest first.

    A table on a terminal; elsewhere lines of id, state, actor, queue, created, progress, parted by tabs. With --json a
    line of JSON each.
    """
    store = open_store(call)
    chosen = [State(name.lower()) for name in states] or list(State)
    filters: dict[str, Any] = {
        "states": chosen,
        "actor": actor,
        "queue": queue,
        "tag": tag,
        "since": since,
        "until": until,
    }
    if watch:
        follow(call, store, EVERY, lambda: store.page(**filters, cursor=cursor, limit=limit).jobs)
        return
    found: list[JobRecord] = []
    while True:
        page = store.page(**filters, cursor=cursor, limit=min(PAGE, limit - len(found)))
        found += page.jobs
        cursor = page.cursor
        if cursor is None or len(found) >= limit:
            break
    if call.json:
        for record in found:
            call.emit(record.asdict(), one_line=True)
    else:
        call.write(table(("id", "state", "actor", "queue", "created", "progress"), map(_row, found)))
        if not found and on_terminal():
            call.talk(f"no job{' like that' if _is_filtered(filters) else ''} in {store.namespace!r}.")
    if cursor is not None:
        call.more(cursor)


def _is_filtered(filters: dict[str, Any]) -> bool:
    return any(value is not None for name, value in filters.items() if name != "states") or set(
        filters["states"]
    ) != set(State)


def _row(record: JobRecord) -> tuple[str, ...]:
    people = on_terminal()
    state = str(record.state) if record.dead_reason is None or not people else f"dead ({record.dead_reason})"
    created = ago(record.created_at) if people else iso(record.created_at)
    return record.id, state, record.actor, record.queue, created, progress(record)


@command()
@click.argument("job_id", metavar="ID")
def show(call: Call, job_id: str) -> None:
    """Show all that is known of a job: record, arguments, error with its traceback, attempts."""
    store = open_store(call)
    record = replace(store.record(job_id), estimated_start=estimated_start(store, job_id))
    call_of = _arguments(store, job_id)
    if call.json:
        call.emit({**record.asdict(), **call_of})
    else:
        call.write("".join(f"{line}\n" for line in lines(record, call_of)))


def _arguments(store: Store, job_id: str) -> dict[str, Any]:
    body = store.body(job_id)
    reference = BodyReference.of(body)
    if reference is not None:
        return {"args": [f"<{reference.size:,} bytes>"], "kwargs": {}}
    try:
        args, kwargs, _ = codec.decode_call(body)
    except MLQueueError:
        # An undecodable job is one of those that are looked at.
        return {"args": None, "kwargs": None}
    return {"args": args, "kwargs": kwargs}


def lines(record: JobRecord, call_of: dict[str, Any]) -> Iterator[str]:
    """All that is known of a job, for a person: its record and its message (``args``, ``kwargs``, ``options``)."""
    for name, value in _facts(record, call_of):
        if value not in (None, ""):
            yield f"{name:<12}{clean(value)}"
    if record.error is not None and record.error.traceback:
        yield "\n" + clean_lines(record.error.traceback)
    if record.attempts:
        yield "\nattempts that did not succeed"
        for attempt in record.attempts:
            yield f"{attempt.attempt:>4}  {_attempt(attempt)}"
    if record.callback_attempts:
        yield "\ntries to deliver the callback and the webhook" if record.webhook else "\ntries to deliver the callback"
        for number, tried in enumerate(record.callback_attempts, 1):
            yield f"{number:>4}  {_callback_attempt(tried)}"


def _facts(record: JobRecord, call_of: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield "id", record.id
    yield "state", f"dead ({record.dead_reason})" if record.dead_reason else status(record)
    yield "actor", record.actor
    yield "queue", record.queue
    yield "arguments", _call_text(call_of)
    yield "options", ", ".join(f"{name}={_value(value)}" for name, value in (call_of.get("options") or {}).items())
    yield "functions", ", ".join(record.functions)
    yield "priority", record.priority or None
    yield "tags", ", ".join(record.tags)
    yield "parent", record.parent
    yield "waits for", record.waits_for
    yield "slots", ", ".join(f"{name} {' '.join(map(str, slots))}" for name, slots in record.slots.items())
    yield "limited by", record.concurrency_key
    yield "turn of", record.fair_by
    yield "unique", record.unique_key
    yield "callback", record.callback and f"{record.callback}  ({record.callback_state or 'when it has ended'})"
    if record.webhook is not None:
        events = f"{', '.join(record.webhook.events)}; {record.webhook_state or 'nothing told yet'}"
        yield "webhook", f"{record.webhook.url}  ({events})"
    yield "progress", progress(record)
    for name, moment in (
        ("created", record.created_at),
        ("due", record.due_at),
        ("started", record.started_at),
        ("finished", record.finished_at),
    ):
        yield name, moment and f"{iso(moment)}  ({ago(moment)})"
    yield "starts", record.estimated_start and f"about {ago(record.estimated_start)}"
    yield "worker", record.worker
    yield "used", record.usage and usage_text(record.usage)
    counts = {"attempt": record.attempt, "retries": record.retries, "crashes": record.crashes, "stalls": record.stalls}
    counts["timeouts"] = record.timeouts
    yield "counts", ", ".join(f"{name} {number}" for name, number in counts.items() if number)
    yield "timeout", record.job_timeout and duration(record.job_timeout)
    yield "begins in", record.queue_timeout and duration(record.queue_timeout)
    yield "prolonged", f"by {duration(record.extended_by)}" if record.extended_by else None
    yield "cancelled", record.cancel_stage
    yield "checkpoint", "yes" if record.has_checkpoint else None
    yield "resumed", record.resumed_from and _saved(record.resumed_from)
    yield "result", _result_text(record)
    yield "kept", None if record.result_ttl is None else f"{duration(record.result_ttl)} after its end"
    yield "error", error_text(record.error) if record.error else None


def _saved(saved: SavedCheckpoint) -> str:
    return f"from the checkpoint of attempt {saved.attempt}, saved {ago(saved.saved_at)}"


def _result_text(record: JobRecord) -> str | None:
    if record.state is not State.SUCCEEDED:
        return None
    kind = f" ({record.content_type})" if record.content_type else ""
    if record.short_result is None:
        return f"see `mlqueue result {record.id}`{kind}"
    return f"{record.short_result}{kind}"


def _call_text(call_of: dict[str, Any]) -> str:
    if call_of["args"] is None:
        return "(not readable)"
    parts = [_value(item) for item in call_of["args"]]
    parts += [f"{name}={_value(item)}" for name, item in call_of["kwargs"].items()]
    return cut(", ".join(parts), ARGUMENTS)


def _value(value: Any) -> str:
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if hasattr(value, "shape"):
        return f"<array {value.dtype} {value.shape}>"
    return repr(value)


def _attempt(attempt: Attempt) -> str:
    why = f": {error_text(attempt.error)}" if attempt.error else ""
    took = duration(max(0.0, attempt.ended_at - attempt.started_at))
    stage = f" ({attempt.stage})" if attempt.stage else ""
    used = f", used {usage_text(attempt.usage)}" if attempt.usage else ""
    saved = attempt.resumed_from
    used += f", resumed from the checkpoint of attempt {saved.attempt}" if saved else ""
    ended = f"{iso(attempt.started_at)}  {attempt.outcome}{stage} after {took} on {attempt.worker}"
    return clean(f"{ended}{used}{why}")


def _callback_attempt(tried: CallbackAttempt) -> str:
    status = tried.status if tried.status is not None else "no answer"
    event = f"{tried.event}  " if tried.event else ""
    error = f": {tried.error}" if tried.error else ""
    return clean(f"{iso(tried.at)}  {event}{status} after {duration(tried.seconds)}{error}")


@command()
def stats(call: Call) -> None:
    """Count jobs, and list the workers: by state, queue and actor; with the jobs that each worker holds. And the pools
    that have batches prepared."""
    store = open_store(call)
    counts = store.counts()
    workers = store.workers()
    pools = store.pools()
    states: Counter[State] = Counter()
    for count in counts:
        states[count.state] += count.number
    if call.json:
        call.emit(
            {
                "store": store.connector.where,
                "namespace": store.namespace,
                "states": {str(state): states[state] for state in State},
                "counts": [count._asdict() | {"state": str(count.state)} for count in counts],
                "workers": [_worker(worker) for worker in workers],
                "pools": [{"id": run, **plain(pool)} for run, pool in sorted(pools.items())],
            }
        )
        return
    call.write(f"store      {clean(store.connector.where)}\nnamespace  {clean(store.namespace)}\n\n")
    call.write(table(("state", "jobs"), [(state, states[state]) for state in State], people=True))
    if counts:
        by_lane: dict[tuple[str, str], Counter[State]] = {}
        for count in counts:
            by_lane.setdefault((count.queue, count.actor), Counter())[count.state] += count.number
        rows = [(*lane, *(numbers[state] for state in State)) for lane, numbers in sorted(by_lane.items())]
        call.write("\n" + table(("queue", "actor", *State), rows, people=True))
    _write_workers(call, workers)
    if pools:
        call.write("\n" + table(POOL_HEAD, list(pool_rows(pools)), people=True))


def _write_workers(call: Call, workers: list[WorkerInfo]) -> None:
    if not workers:
        call.write("\nno worker is alive: start one with `mlqueue worker MODULE`\n")
        return
    rows = [
        (
            worker.id,
            worker.info.get("host", ""),
            worker.info.get("pid", ""),
            f"{len(worker.jobs)} of {worker.info.get('threads', '?')}",
            ",".join(worker.info.get("queues", ())),
            duration(max(0.0, time.time() - worker.info.get("started_at", time.time()))),
            " ".join(worker.jobs),
        )
        for worker in workers
    ]
    call.write("\n" + table(("worker", "host", "pid", "busy", "queues", "up", "jobs"), rows, people=True))


def _worker(worker: WorkerInfo) -> dict[str, Any]:
    info: dict[str, Any] = plain(worker.info)
    return {"id": worker.id, "lease_left": worker.lease_left, "jobs": list(worker.jobs), **info}


__all__ = ["jobs", "lines", "show", "stats"]
