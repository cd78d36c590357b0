"""``mlqueue migrate``: from this store to another one."""

from __future__ import annotations

import time
from typing import Any, Final

import click

from ..job import State
from ..migration import Migration, Moved
from ..store import Connector, Store
from .call import Call, command
from .opening import open_store

#: How often to say how it goes, in seconds.
SAID_EVERY: Final = 2.0


@command()
@click.option("--to", "to", metavar="URL", required=True, help="The store to move to, as --url takes it.")
@click.option("--to-namespace", metavar="NAME", help="The namespace there [the same].")
@click.option("--follow", is_flag=True, help="Go on moving what comes, until Ctrl-C.")
def migrate(call: Call, to: str, to_namespace: str | None, follow: bool) -> int:
    """Move all jobs of this store to the one at URL, with their results, checkpoints, callbacks and data.

    Both may be in use: jobs that run are waited for, new ones are moved too. It ends when nothing is left here. Stopped
    or killed, it goes on where it was when it is called again. Jobs of an id that another job has there stay here.
    """
    source = open_store(call)
    settings = call.settings_under({"url": to})
    connector = Connector(settings)
    call.closing.callback(connector.close)
    target = Store(connector, to_namespace or source.namespace, settings)
    progress = _Progress(call)
    moved = Migration(source, target, progress.tell).run(follow=follow)
    if call.json:
        call.emit(_facts(moved))
    else:
        call.talk(f"moved {_in_words(moved)} to {target.connector.where}.")
        if moved.kept:
            call.talk(f"{len(moved.kept):,} stay here, another job there has their id: {', '.join(sorted(moved.kept))}")
    return 1 if moved.kept else 0


class _Progress:
    """Says now and then how it goes."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._said_at = time.monotonic()
        self._said = ""

    def tell(self, moved: Moved) -> None:
        if time.monotonic() < self._said_at + SAID_EVERY:
            return
        text = f"moved {_in_words(moved)}" + (f"; {moved.running:,} still run here" if moved.running else "")
        if text != self._said:
            self._call.talk(text)
        self._said_at, self._said = time.monotonic(), text


def _in_words(moved: Moved) -> str:
    states = ", ".join(f"{number:,} {state}" for state, number in sorted(moved.jobs.items()))
    jobs = f"{moved.total:,} job{'' if moved.total == 1 else 's'}{f' ({states})' if states else ''}"
    data = f" and the data of {moved.data:,} key{'' if moved.data == 1 else 's'}" if moved.data else ""
    return jobs + data


def _facts(moved: Moved) -> dict[str, Any]:
    return {
        "jobs": {str(state): moved.jobs.get(state, 0) for state in State if state is not State.RUNNING},
        "callbacks": moved.callbacks,
        "data": moved.data,
        "kept": sorted(moved.kept),
    }


__all__ = ["migrate"]
