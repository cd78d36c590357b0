"""``mlqueue key``: API keys of the HTTP interface."""

from __future__ import annotations

import dataclasses
from typing import Final

import click

from ..errors import InvalidJob, JobNotFound
from ..keys import SCOPES, ApiKeys, check_scopes
from .call import Call, command
from .opening import open_store
from .text import ago, on_terminal, table

#: The exit code for a call without a command.
USAGE: Final = 2


def _scopes(text: str) -> tuple[str, ...]:
    try:
        return check_scopes(text)
    except InvalidJob as error:
        raise click.BadParameter(error.message) from None


@command()
@click.option(
    "--scope",
    "scopes",
    type=_scopes,
    required=True,
    metavar="NAMES",
    help=f"What it is for, parted by commas: {', '.join(SCOPES)} (which includes the others).",
)
@click.option("--label", default="", metavar="TEXT", help="What or whom it is for.")
def new(call: Call, scopes: tuple[str, ...], label: str) -> None:
    """Make a key, and print it. Nobody can show it again: the store keeps its hash alone."""
    token, key = ApiKeys(open_store(call, start=True)).new(scopes, label)
    if call.json:
        call.emit({"key": token, **dataclasses.asdict(key)})
        return
    call.write(token + "\n")
    call.talk(f"key {key.id} ({', '.join(key.scopes)}); it is shown this once. Send it as `Authorization: Bearer KEY`.")


@command()
def ls(call: Call) -> None:
    """List the keys: id, scopes, age and label. What is secret of them is not known here."""
    keys = ApiKeys(open_store(call)).list()
    if call.json:
        for key in keys:
            call.emit(dataclasses.asdict(key), one_line=True)
        return
    rows = [(key.id, ",".join(key.scopes), ago(key.created_at), key.label) for key in keys]
    call.write(table(("id", "scopes", "created", "label"), rows))
    if not keys and on_terminal():
        call.talk("there is no key; `mlqueue key new --scope submit,read` makes one.")


@command()
@click.argument("key_ids", metavar="ID...", nargs=-1, required=True)
def revoke(call: Call, key_ids: tuple[str, ...]) -> int:
    """End keys: they are refused from the next request on. IDs are those that `mlqueue key ls` shows."""
    keys = ApiKeys(open_store(call))
    code = 0
    for key_id in dict.fromkeys(key_ids):
        if keys.revoke(key_id):
            if call.json:
                call.emit({"id": key_id, "state": "revoked"}, one_line=True)
            else:
                call.write(f"{key_id}\trevoked\n")
        else:
            code = code or JobNotFound.exit_code
            call.report_as("KeyNotFound", f"there is no key {key_id}; `mlqueue key ls` lists them.", code)
    return code


SUBCOMMANDS: Final = {"new": new, "ls": ls, "revoke": revoke}


@command(cls=click.Group, commands=SUBCOMMANDS, invoke_without_command=True)
def key(call: Call) -> int | None:
    """API keys of the HTTP interface: make, list and revoke them.

    A key is for one namespace. What it is for is its scopes: submit (submit, cancel and retry jobs), read (look at jobs
    and results), functions (post and remove functions), admin (everything).
    """
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return USAGE
    return None


__all__ = ["key"]
