"""``mlqueue reaper``: gives back jobs that run too long, alone."""

from __future__ import annotations

import contextlib
import queue
import signal
from collections.abc import Iterator
from typing import Final

import click

from ..reaper import Reaper
from . import types
from .call import Call, command
from .opening import open_store
from .text import duration

#: How often it looks whether a signal has come, in seconds: one in the moment before the wait does not end that.
LOOK_INTERVAL: Final = 0.5


@command()
@click.option(
    "--interval", type=types.duration, default=60, metavar="DURATION", help="How often it looks, at least [60]."
)
@click.option("--timeout", type=types.duration, default=300, metavar="DURATION", help="How long a job may run [300].")
@click.option(
    "--retries", type=click.IntRange(0), default=5, metavar="N", help="How often a job goes back until it is dead [5]."
)
def reaper(call: Call, interval: float, timeout: float, retries: int) -> int:
    """Give back jobs that run too long, until SIGTERM or Ctrl-C: they go to their queues again.

    Jobs of lost workers do, too, though `worker` does that already. A job's own job_timeout goes before this timeout.
    """
    store = open_store(call)
    with call.logging("%(asctime)s [reaper] %(levelname)s %(name)s: %(message)s", call.settings.log_level):
        running = Reaper(store, interval=interval, job_timeout=timeout, max_retries=retries)
        with _signals() as signals:
            running.start()
            call.talk(
                f"jobs of {store.namespace} that run for longer than {duration(timeout)} go back to their queues, "
                f"{retries} times at most, until this ends."
            )
            try:
                _first(signals)
            finally:
                running.stop()
    return 0


@contextlib.contextmanager
def _signals() -> Iterator[queue.SimpleQueue[int]]:
    """Within, the signals that end a command arrive in a queue; one of the simple kind, which may be put into from a
    handler."""
    arrived: queue.SimpleQueue[int] = queue.SimpleQueue()
    previous = {
        signum: signal.signal(signum, lambda number, frame: arrived.put(number))
        for signum in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield arrived
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _first(signals: queue.SimpleQueue[int]) -> int:
    """Waits for a signal."""
    while True:
        with contextlib.suppress(queue.Empty):
            return signals.get(timeout=LOOK_INTERVAL)


__all__ = ["reaper"]
