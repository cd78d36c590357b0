"""``mlqueue dead``: the dead letters."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from ..dead_letters import MAX_PAGE, DeadLetters
from ..errors import InvalidJob, InvalidTransition
from ..job import DeadReason, JobRecord
from . import types
from .call import Call, command
from .look import lines
from .opening import open_store
from .steer import each
from .text import ago, error_text, iso, on_terminal, table
from .values import from_text, list_from_text, object_from_text

F = TypeVar("F", bound=Callable[..., Any])

#: The exit code for a call without a command.
USAGE: Final = 2


def filters(function: F) -> F:
    """Gives a command the options that say which dead letters are meant."""
    for option in reversed(
        (
            click.option("--actor", metavar="NAME", help="Those of this actor."),
            click.option(
                "--reason",
                type=click.Choice([str(reason) for reason in DeadReason], case_sensitive=False),
                help="Those that died for this reason.",
            ),
            click.option("--queue", metavar="NAME", help="Those of this queue."),
            click.option(
                "--older-than",
                type=types.duration,
                metavar="DURATION",
                help="Those that died so long ago or longer: 30, 15m, 2h, 7d.",
            ),
            click.option("--newer-than", type=types.duration, metavar="DURATION", help="Those that died since then."),
            click.option("--text", metavar="TEXT", help="Those with this in the error or its traceback, in any case."),
        )
    ):
        function = option(function)
    return function


def _letters(call: Call) -> DeadLetters:
    return DeadLetters(open_store(call))


@command()
@filters
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="How many at most.")
@click.option("--cursor", metavar="CURSOR", help="Where to go on; the last page says it.")
def ls(call: Call, limit: int, cursor: str | None, **given: Any) -> None:
    """List dead letters, the latest death first.

    A table on a terminal; elsewhere lines of id, reason, actor, queue, time of death and error, parted by tabs. With
    --json a line of JSON each.
    """
    letters = _letters(call)
    found: list[JobRecord] = []
    while True:
        page = letters.list(cursor=cursor, limit=min(MAX_PAGE, limit - len(found)), **given)
        found += page.letters
        cursor = page.cursor
        if cursor is None or len(found) >= limit:
            break
    if call.json:
        for record in found:
            call.emit(record.asdict(), one_line=True)
    else:
        call.write(table(("id", "reason", "actor", "queue", "died", "error"), map(_row, found)))
        if not found and on_terminal():
            call.talk("no dead letter" + (" like that." if any(value is not None for value in given.values()) else "."))
    if cursor is not None:
        call.more(cursor)


def _row(record: JobRecord) -> tuple[str, ...]:
    died = ago(record.finished_at) if on_terminal() else iso(record.finished_at)
    error = error_text(record.error) if record.error else ""
    return record.id, str(record.dead_reason), record.actor, record.queue, died, error


@command()
@click.argument("job_id", metavar="ID")
def show(call: Call, job_id: str) -> None:
    """Show a dead letter: message, options, error with its traceback, attempts with their workers and times."""
    letter = _letters(call).show(job_id)
    message = {"args": letter.args, "kwargs": letter.kwargs, "options": letter.options}
    if call.json:
        call.emit({**letter.record.asdict(), **message, "msg": letter.msg})
    else:
        call.write("".join(f"{line}\n" for line in lines(letter.record, message)))


@command()
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that the filters let through.")
@filters
@click.option("--args", "args", metavar="JSON", help="Another list of arguments, for one letter.")
@click.option("--kwargs", "kwargs", metavar="JSON", help="Other keyword arguments, as one JSON object, for one letter.")
@click.option("--msg", metavar="JSON", help="Another message, for one letter that was posted for MLQ listeners.")
def requeue(
    call: Call,
    job_ids: tuple[str, ...],
    everything: bool,
    args: str | None,
    kwargs: str | None,
    msg: str | None,
    **given: Any,
) -> int:
    """Put dead letters back at the end of their queues, their counts at nought.

    Prints the ids of those that were. With --args, --kwargs or --msg these take the place of what was sent.
    """
    _check_choice(job_ids, everything, given)
    changes = _changes(args, kwargs, msg)
    if changes and len(job_ids) != 1:
        raise click.UsageError(
            "--args, --kwargs and --msg change one letter: give its id.", click.get_current_context()
        )
    letters = _letters(call)

    def put_back(job_id: str) -> str:
        letters.requeue(job_id, **changes)
        return "queued"

    if not everything:
        return each(call, job_ids, put_back)
    _say(call, letters.requeue_all(**given), "queued")
    return 0


def _changes(args: str | None, kwargs: str | None, msg: str | None) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    if args is not None:
        changes["args"] = list_from_text("--args", args)
    if kwargs is not None:
        changes["kwargs"] = object_from_text("--kwargs", kwargs)
    if msg is not None:
        changes["msg"] = from_text(msg)
        if changes["msg"] is None:
            raise InvalidJob("--msg null: for a message that is null say --args '[null]'.")
    return changes


@command()
@click.argument("job_ids", metavar="[ID]...", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All that the filters let through.")
@filters
def purge(call: Call, job_ids: tuple[str, ...], everything: bool, **given: Any) -> int:
    """Forget dead letters. They cannot be brought back but from an export."""
    _check_choice(job_ids, everything, given)
    letters = _letters(call)

    def forget(job_id: str) -> str:
        if not letters.purge(job_id):
            letters.show(job_id)  # says why not
            raise InvalidTransition(f"job {job_id} has just been put back or forgotten by somebody else.")
        return "purged"

    if not everything:
        return each(call, job_ids, forget)
    gone = letters.purge_all(**given)
    if call.json:
        call.emit({"purged": gone})
    else:
        call.write(f"{gone}\n")
    return 0


def _check_choice(job_ids: tuple[str, ...], everything: bool, given: dict[str, Any]) -> None:
    if bool(job_ids) == everything:
        raise click.UsageError("name dead letters by their ids, or give --all.", click.get_current_context())
    if job_ids and any(value is not None for value in given.values()):
        raise click.UsageError("filters go with --all, not with ids.", click.get_current_context())


def _say(call: Call, job_ids: list[str], outcome: str) -> None:
    for job_id in job_ids:
        if call.json:
            call.emit({"id": job_id, "state": outcome}, one_line=True)
        else:
            call.write(f"{job_id}\t{outcome}\n")


@command()
@click.argument("file", default="-")
@filters
def export(call: Call, file: str, **given: Any) -> None:
    """Write dead letters to FILE (- is stdout) as JSON Lines, from which `import` makes them again.

    They stay where they are.
    """
    letters = _letters(call)
    try:
        count = letters.export(call if file == "-" else file, **given)
    except OSError as error:
        raise InvalidJob(f"{file} cannot be written ({error.strerror or error}); try another FILE.") from None
    if file != "-":
        call.talk(f"wrote {count:,} dead letter{'' if count == 1 else 's'} to {file}")
        if call.json:
            call.emit({"exported": count})


@command()
@click.argument("file")
def import_(call: Call, file: str) -> None:
    """Make dead letters of what `export` wrote to FILE (- is stdin).

    Prints the ids, each with what came of it: created, or exists (a job of that id is there, and stays as it is).
    """
    letters = DeadLetters(open_store(call, start=True))
    try:
        created, skipped = letters.import_(sys.stdin.buffer if file == "-" else file)
    except OSError as error:
        raise InvalidJob(f"{file} cannot be read ({error.strerror or error}).") from None
    _say(call, created, "created")
    _say(call, skipped, "exists")


SUBCOMMANDS: Final = {
    "ls": ls,
    "show": show,
    "requeue": requeue,
    "purge": purge,
    "export": export,
    "import": import_,
}


@command(cls=click.Group, commands=SUBCOMMANDS, invoke_without_command=True)
def dead(call: Call) -> int | None:
    """Dead letters: list, show, put back, forget, export and import them.

    A dead letter is a job that has ended for good without success. It is kept until it is put back or forgotten
    (MLQUEUE_DEAD_TTL).
    """
    ctx = click.get_current_context()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return USAGE
    return None


__all__ = ["dead"]
