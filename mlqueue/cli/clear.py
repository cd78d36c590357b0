"""``mlqueue clear``: forgetting jobs, of one namespace."""

from __future__ import annotations

import sys

import click

from ..job import State
from ..store import Store
from ..store.store import NOT_RUNNING
from . import types
from .call import Call, command, redis_options
from .opening import open_store


@command()
@click.option(
    "--state",
    "states",
    multiple=True,
    type=click.Choice([str(state) for state in NOT_RUNNING], case_sensitive=False),
    help="Jobs in this state. May be repeated [all].",
)
@click.option(
    "--older-than",
    type=types.duration,
    metavar="DURATION",
    help="Jobs that ended, or, if they wait, were created so long ago: 30, 15m, 2h, 7d.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@redis_options
def clear(call: Call, states: tuple[str, ...], older_than: float | None, yes: bool) -> int:
    """Forget jobs that do not run, with their results: those of one namespace, all of them or some.

    Without --state and --older-than the data go too that jobs keep for each other. Asks on a terminal, unless --yes is
    given; elsewhere --yes is needed. Prints how many were forgotten.
    """
    if not yes and not sys.stdin.isatty():
        raise click.UsageError(
            "there is no terminal to ask on; give --yes if these jobs are to be forgotten", click.get_current_context()
        )
    store = open_store(call)
    chosen = [State(name.lower()) for name in states] or None
    if not yes and not click.confirm(_question(store, chosen, older_than), err=True):
        call.talk("nothing was forgotten.")
        return 1
    _forget(call, store, chosen, older_than)
    return 0


@command()
@redis_options
def clear_all(call: Call) -> None:
    """Forget all jobs that do not run, without asking: MLQ's word for `clear --yes`. Only those of one namespace."""
    _forget(call, open_store(call), None, None)


def _question(store: Store, states: list[State] | None, older_than: float | None) -> str:
    if older_than is not None:
        which = "the jobs of that age"
    else:
        number = sum(count.number for count in store.counts() if count.state in (states or NOT_RUNNING))
        which = f"{number:,} job{'' if number == 1 else 's'}"
    in_states = f" ({', '.join(states)})" if states else ""
    return f"Forget {which}{in_states} of {store.namespace!r}?"


def _forget(call: Call, store: Store, states: list[State] | None, older_than: float | None) -> None:
    gone = store.clear(states, older_than)
    if call.json:
        call.emit({"forgotten": gone})
    else:
        call.write(f"{gone}\n")


__all__ = ["clear", "clear_all"]
