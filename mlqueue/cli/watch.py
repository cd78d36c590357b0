"""``mlqueue watch``: jobs live, until they end."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Final

import click

from ..errors import JobNotFound, MLQueueError, ResultTimeout
from ..job import JobRecord, State
from ..store import Store
from ..waiting import changes
from . import types
from .call import Call, command
from .live import Screen, screen_for
from .opening import open_store

#: How often all is read again though no job has changed, in seconds: the positions of those that wait do.
REFRESH: Final = 1.0

#: To how many jobs is listened; those beyond are seen at the next REFRESH.
LISTENERS: Final = 50

#: How long a listener listens before it sees whether it is still needed, in seconds.
LISTEN: Final = 0.5

#: The shortest time between two looks, in seconds.
FRAME: Final = 0.05


@command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@click.option(
    "--timeout", type=types.duration, metavar="DURATION", help="How long to watch: 30, 10m, 2h [until the end]."
)
def watch(call: Call, job_ids: tuple[str, ...], timeout: float | None) -> int:
    """Watch jobs until they end: state, position in the queue, progress.

    A live bar each on a terminal's stderr, else a line for each change. Ends with 0 when all succeeded and with 1 when
    one did not. With --json every change is a line of JSON on stdout.
    """
    store = open_store(call)
    records = follow(call, store, list(dict.fromkeys(job_ids)), timeout)
    return 0 if all(record.state is State.SUCCEEDED for record in records) else 1


def follow(call: Call, store: Store, job_ids: Sequence[str], timeout: float | None = None) -> list[JobRecord]:
    """Shows jobs until all have ended; their last records. Raises `JobNotFound`, `ResultTimeout`."""
    _records(store, job_ids)
    screen = screen_for(call)
    rung, over = threading.Event(), threading.Event()
    listeners = [
        threading.Thread(target=_listen, args=(store, job_id, rung, over), name="mlqueue-watch", daemon=True)
        for job_id in job_ids[:LISTENERS]
    ]
    for listener in listeners:
        listener.start()
    try:
        return _show(store, job_ids, timeout, screen, rung)
    except KeyboardInterrupt:
        # Nobody is kept waiting who has asked for the end; they are daemons.
        listeners.clear()
        raise
    finally:
        over.set()
        for listener in listeners:
            # Left alone, one would look into a store that has been closed, which would start it again.
            listener.join()
        screen.close()


def _show(
    store: Store, job_ids: Sequence[str], timeout: float | None, screen: Screen, rung: threading.Event
) -> list[JobRecord]:
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        looked = time.monotonic()
        rung.clear()
        records = _records(store, job_ids)
        screen.show(records)
        left = [record for record in records if not record.state.ended]
        if not left:
            return records
        if looked >= deadline:
            raise ResultTimeout(
                f"{len(left)} of {len(records)} jobs have not ended after {timeout:g} s; they go on. Watch again, or "
                "longer."
            )
        rung.wait(max(0.0, min(REFRESH, deadline - looked)))
        # A job may report a thousand times a second; a person sees twenty.
        time.sleep(max(0.0, min(looked + FRAME, deadline) - time.monotonic()))


def _records(store: Store, job_ids: Sequence[str]) -> list[JobRecord]:
    found = []
    for job_id, record in zip(job_ids, store.records(job_ids), strict=True):
        if record is None:
            raise JobNotFound.of(job_id, store.namespace)
        found.append(record)
    return found


def _listen(store: Store, job_id: str, rung: threading.Event, over: threading.Event) -> None:
    """Rings when the job changes. An error here is one of the main thread too, which looks anyway."""
    try:
        while not over.is_set():
            for state in changes(store, job_id, LISTEN):
                rung.set()
                if state.ended or over.is_set():
                    return
    except MLQueueError:
        rung.set()


__all__ = ["follow", "watch"]
