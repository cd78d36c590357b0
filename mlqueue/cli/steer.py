"""``mlqueue cancel``, ``retry`` and ``extend``: several jobs at once, each with its own outcome."""

from __future__ import annotations

from collections.abc import Callable

import click

from ..errors import MLQueueError, StoreError
from ..job import State, positive
from . import types
from .call import Call, command
from .opening import open_store


@command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
def cancel(call: Call, job_ids: tuple[str, ...]) -> int:
    """Cancel jobs. One that waits never runs; one that runs is told, and ends cancelled whatever it returns.

    Prints each id with what came of it: cancelled, cancelling (it runs still), or the state in which it had ended.
    """
    store = open_store(call)

    def act(job_id: str) -> str:
        was = store.cancel(job_id)
        if was is State.RUNNING:
            return "cancelling"
        return str(was if was.ended else State.CANCELLED)

    return each(call, job_ids, act)


@command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
def retry(call: Call, job_ids: tuple[str, ...]) -> int:
    """Put dead or cancelled jobs back into their queues, their counts at nought.

    Prints the ids of those that were.
    """
    store = open_store(call)

    def act(job_id: str) -> str:
        store.retry(job_id)
        return str(State.QUEUED)

    return each(call, job_ids, act)


@command()
@click.argument("job_ids", metavar="ID...", nargs=-1, required=True)
@click.option("--by", type=types.duration, metavar="DURATION", required=True, help="How much more: 30, 10m, 2h.")
def extend(call: Call, job_ids: tuple[str, ...], by: float) -> int:
    """Give running jobs more time: all limits of the attempts that run are over that much later.

    Prints each id with running; how much it was given in all, `mlqueue show` says.
    """
    seconds = positive(by, "--by")
    store = open_store(call)

    def act(job_id: str) -> str:
        store.extend(job_id, seconds)
        return str(State.RUNNING)

    return each(call, job_ids, act)


def each(call: Call, job_ids: tuple[str, ...], act: Callable[[str], str]) -> int:
    """Does something to each job; one that it cannot be done to holds up none of the others. The exit code is that of
    the first error."""
    code = 0
    for job_id in dict.fromkeys(job_ids):
        try:
            outcome = act(job_id)
        except StoreError:
            raise
        except MLQueueError as error:
            call.report(error)
            code = code or error.exit_code
            continue
        if call.json:
            call.emit({"id": job_id, "state": outcome}, one_line=True)
        else:
            call.write(f"{job_id}\t{outcome}\n")
    return code


__all__ = ["cancel", "each", "extend", "retry"]
