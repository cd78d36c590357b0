"""``mlqueue functions``: the functions that have been posted to the workers."""

from __future__ import annotations

import dataclasses
from typing import Final

import click

from ..errors import FunctionNotFound
from ..functions import Functions
from .call import Call, command
from .opening import open_store
from .text import ago, on_terminal, table

#: The exit code for a call without a command.
USAGE: Final = 2


@command()
def ls(call: Call) -> None:
    """List the functions, in the order in which they run: name, size, age, and why a worker could not load it."""
    functions = Functions(open_store(call)).list()
    if call.json:
        for one in functions:
            call.emit(dataclasses.asdict(one), one_line=True)
        return
    rows = [(one.name, f"{one.size:,} B", ago(one.posted_at), one.error or "") for one in functions]
    call.write(table(("name", "size", "posted", "error"), rows))
    if not functions and on_terminal():
        call.talk("no function has been posted; mlq.register_function(fn) does that.")


@command()
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
def remove(call: Call, names: tuple[str, ...]) -> int:
    """Take functions from all workers. What was sent cannot be sent again: it is to be signed anew."""
    functions = Functions(open_store(call))
    code = 0
    for name in dict.fromkeys(names):
        try:
            functions.remove(name)
        except FunctionNotFound as error:
            call.report(error)
            code = code or error.exit_code
            continue
        if call.json:
            call.emit({"name": name, "state": "removed"}, one_line=True)
        else:
            call.write(f"{name}\tremoved\n")
    return code


SUBCOMMANDS: Final = {"ls": ls, "remove": remove}


@command(cls=click.Group, commands=SUBCOMMANDS, invoke_without_command=True)
def functions(call: Call) -> int | None:
    """Posted functions: list and remove them.

    They are posted by mlq.register_function(fn), or over HTTP, and signed with MLQUEUE_SIGNING_KEY.
    """
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return USAGE
    return None


__all__ = ["functions"]
