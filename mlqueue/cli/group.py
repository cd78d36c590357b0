"""`main`: the group of the commands, and what an error of any of them turns into."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Final, NamedTuple

import click

from .. import __version__
from ..errors import MLQueueError
from .call import HELP, Call, common_options, redis_options

#: The exit code after Ctrl-C: that of a process which ended by SIGINT.
INTERRUPTED: Final = 130
#: The variable by which a shell asks what a word may be (mlqueue.cli.completion).
VARIABLE: Final = "_MLQUEUE_COMPLETE"
#: The exit code for a wrong command line.
USAGE: Final = 2


class Entry(NamedTuple):
    """A command: the module here that has it, and its line in ``mlqueue --help``."""

    module: str
    help: str


#: The commands. The functions have the names given here; modules are imported when their command is called.
COMMANDS: Final[dict[str, Entry]] = {
    "submit": Entry("submit", "Submit a job by the name of its actor."),
    "post": Entry("post", "Post a job for the listeners of a name."),
    "jobs": Entry("look", "List jobs, newest first."),
    "show": Entry("look", "Show all that is known of a job."),
    "watch": Entry("watch", "Watch jobs until they end."),
    "logs": Entry("logs", "Show what a job has printed and logged."),
    "result": Entry("result", "Wait for a job and print its result."),
    "stats": Entry("look", "Count jobs, and list the workers."),
    "top": Entry("top", "Watch queues, workers and the latest jobs."),
    "cancel": Entry("steer", "Cancel jobs."),
    "retry": Entry("steer", "Put dead or cancelled jobs back into their queues."),
    "extend": Entry("steer", "Give running jobs more time."),
    "why": Entry("limit", "Say in one sentence why a job does not run."),
    "limit": Entry("limit", "Set how many jobs that need NAME run at a time, or show the limits."),
    "dead": Entry("dead", "Dead letters: list, show, put back, forget, export and import them."),
    "clear": Entry("clear", "Forget jobs that do not run."),
    "key": Entry("key", "API keys of the HTTP interface: make, list and revoke them."),
    "functions": Entry("functions", "Posted functions: list and remove them."),
    "worker": Entry("worker", "Run worker processes."),
    "reaper": Entry("reaper", "Give back jobs that run too long."),
    "web": Entry("web", "Serve the HTTP interface."),
    "up": Entry("up", "Run workers, the HTTP interface and the embedded server in one terminal."),
    "server": Entry("server", "Run the embedded server of this folder."),
    "datasets": Entry("mlqueue.batch.cli", "Data sets: list, fetch, locate and remove them."),
    "migrate": Entry("migrate", "Move all jobs of this store to the one at URL."),
    "doctor": Entry("doctor", "Look for what is wrong with the store, its server and its workers."),
    "repair": Entry("doctor", "Put jobs back that nobody would find, and remove keys that belong to no job."),
    "completion": Entry(
        "completion", "Print what makes SHELL complete mlqueue's commands, options, ids of jobs and names of actors."
    ),
    "settings": Entry("settings", "Show all settings and where each is from."),
}

#: MLQ's own words, which no list shows.
ALIASES: Final[dict[str, Entry]] = {
    "clear_all": Entry("clear", "Forget all jobs that do not run, without asking."),
    "consumer": Entry("consumer", "Run workers, and the HTTP interface and the reaper with them."),
}


class Group(click.Group):
    """The group, which imports a command when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, or None."""
        entry = COMMANDS.get(cmd_name) or ALIASES.get(cmd_name)
        if entry is None:
            return None
        name = entry.module if "." in entry.module else f"{__package__}.{entry.module}"
        command: click.Command = getattr(importlib.import_module(name), cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, with a hint."""
        if args[0] not in COMMANDS and args[0] not in ALIASES:
            close = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(COMMANDS)}."
            ctx.fail(f"no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The commands for the help, from the table: nothing is imported for it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.help) for name, entry in COMMANDS.items()])


def _version(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        click.echo(json.dumps({"version": __version__}) if ctx.find_object(Call).json else f"mlqueue {__version__}")  # type: ignore[union-attr]
        ctx.exit()


@click.group(
    cls=Group,
    name="mlqueue",
    invoke_without_command=True,
    context_settings=HELP,
    epilog="Exit codes: 0 well, 1 the job failed, 2 usage, 3 not found, 4 store unreachable, 5 timeout, "
    "130 interrupted. The three options above may also stand behind the command.",
)
@common_options
@functools.partial(redis_options, hidden=True)
@click.option("--version", is_flag=True, expose_value=False, callback=_version, help="Show the version and exit.")
@click.pass_context
def cli(ctx: click.Context) -> int | None:
    """Submit machine-learning jobs, run them, look after them.

    Without a URL the store is the embedded server of this folder (.mlqueue here or above), which `submit`, `worker`
    and `server` start.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        return USAGE
    return None


def main(args: Sequence[str] | None = None) -> int:
    """Runs the command with these arguments (those of the process when None) and returns its exit code."""
    words = list(sys.argv[1:] if args is None else args)
    call = Call(json=_wants_json(words))
    asked = os.environ.get(VARIABLE) if args is None else None
    if asked:
        with call.closing:
            return importlib.import_module(f"{__package__}.completion").complete(cli, asked, call)  # type: ignore[no-any-return]
    _never_fail_to_encode()
    try:
        with call.logging():
            try:
                return _run(words, call)
            finally:
                call.closing.close()
                sys.stdout.flush()
    except BrokenPipeError:
        _forget_stdout()
        return 0


def _run(words: list[str], call: Call) -> int:
    try:
        with cli.make_context("mlqueue", words, obj=call) as ctx:
            code = cli.invoke(ctx)
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except (KeyboardInterrupt, click.Abort):
        call.talk("interrupted; jobs that were submitted go on.")
        return INTERRUPTED
    except click.ClickException as error:
        call.report_as(type(error).__name__, _usage_text(error), USAGE)
        return USAGE
    except MLQueueError as error:
        call.report(error)
        return error.exit_code
    except UnicodeEncodeError:
        # A name goes into keys of the store, as UTF-8.
        call.report_as("UsageError", "an argument is not valid UTF-8; check the encoding of the terminal.", USAGE)
        return USAGE


def _usage_text(error: click.ClickException) -> str:
    ctx = getattr(error, "ctx", None)
    message = error.format_message().rstrip(".")
    if isinstance(error, click.BadParameter) and error.param is not None:
        # click names its own class instead of what is allowed.
        allowed = f"a whole number{_range_text(error.param.type)}"
        message = message.replace("a valid integer range", allowed).replace("a valid integer", allowed)
    elif ctx is not None and isinstance(ctx.command, click.Group) and message.startswith("No such command"):
        message = f"{message}; there are {', '.join(ctx.command.list_commands(ctx))}"
    if not message.endswith("?"):
        message += "."
    return f"{message} Try `{ctx.command_path} --help`." if ctx is not None else message


def _range_text(kind: object) -> str:
    low, high = getattr(kind, "min", None), getattr(kind, "max", None)
    if high is not None:
        return f" from {low or 0:,} to {high:,}"
    return "" if low is None else f" of {low:,} or more"


def _wants_json(words: Sequence[str]) -> bool:
    """Whether ``--json`` was given, known before the rest is parsed: an error in that is JSON too."""
    options = words[: words.index("--")] if "--" in words else words
    return "--json" in options


def _never_fail_to_encode() -> None:
    """A terminal whose encoding lacks a character gets its escape, not an error."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _forget_stdout() -> None:
    """The reader has gone (``| head``): what is still buffered must not fail once more when Python ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


__all__ = ["COMMANDS", "cli", "main"]
