"""``mlqueue completion``: what makes a shell complete commands, options, ids of jobs and names of actors.

The shell calls mlqueue back with what has been typed, in the variable `VARIABLE`; `complete` answers. Whatever is wrong
then, no word is completed, and nothing else is seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Final

import click
from click.shell_completion import CompletionItem, get_completion_class

from ..errors import MLQueueError
from ..store import Store
from .call import Call, command
from .group import VARIABLE
from .opening import open_store
from .text import one_line

#: The shells, and where each reads what is printed here.
SHELLS: Final = {
    "bash": 'eval "$(mlqueue completion bash)" in ~/.bashrc',
    "zsh": 'eval "$(mlqueue completion zsh)" in ~/.zshrc',
    "fish": "mlqueue completion fish > ~/.config/fish/completions/mlqueue.fish",
}

#: How many ids are offered, the newest ones.
MOST: Final = 50

#: How long the store may take, in seconds: somebody waits for the next letter.
PATIENCE: Final = 1.0


@command()
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(call: Call, shell: str) -> None:
    """Print what makes SHELL complete mlqueue's commands, options, ids of jobs and names of actors.

    bash and zsh: eval "$(mlqueue completion bash)" in ~/.bashrc (~/.zshrc). fish: mlqueue completion fish >
    ~/.config/fish/completions/mlqueue.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    call.write(kind(root, {}, "mlqueue", VARIABLE).source() + "\n")


def complete(root: click.Group, instruction: str, call: Call) -> int:
    """Answers a shell."""
    shell, _, action = instruction.partition("_")
    kind = get_completion_class(shell)
    if kind is None or action != "complete":
        return 1
    asked = kind(root, {"obj": call}, "mlqueue", VARIABLE)
    with contextlib.suppress(Exception):  # nobody could read it between his words
        words, typed = asked.get_completion_args()
        _know_names(root, words, call)
        for item in asked.get_completions(words, typed):
            click.echo(asked.format_completion(item))
    return 0


def _know_names(root: click.Group, words: Iterable[str], call: Call) -> None:
    """Has the arguments of the command that is typed complete what is in the store."""
    at: click.Command | None = root
    with click.Context(root, obj=call) as ctx:
        for word in words:
            if isinstance(at, click.Group) and not word.startswith("-"):
                at = at.get_command(ctx, word) or at
    for parameter in at.params if at is not None and at is not root else ():
        kind = KINDS.get(parameter.name or "")
        if kind is not None and isinstance(parameter, click.Argument | click.Option):
            parameter.type = Names(kind)


class Names(click.ParamType):  # type: ignore[type-arg] # only newer clicks have it generic
    """Texts of which those in the store are offered."""

    name = "text"

    def __init__(self, names: Callable[[Store], Iterable[tuple[str, str]]]) -> None:
        self._names = names

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Those that begin with what is typed, each with what it is."""
        call = ctx.find_object(Call)
        assert call is not None
        call.settings = call.settings_under({"command_timeout": PATIENCE, "connect_timeout": PATIENCE})
        try:
            found = list(self._names(open_store(call)))
        except MLQueueError:
            return []
        return [CompletionItem(name, help=one_line(text)) for name, text in found if name.startswith(incomplete)]


def _jobs(store: Store) -> Iterable[tuple[str, str]]:
    return [(record.id, f"{record.state} {record.actor}") for record in store.page(limit=MOST).jobs]


def _actors(store: Store) -> Iterable[tuple[str, str]]:
    found = store.connector.execute("HKEYS", f"{store.root}:actors")
    return [(name.decode(), "") for name in sorted(found)]


def _queues(store: Store) -> Iterable[tuple[str, str]]:
    return [(name, "") for name in sorted({count.queue for count in store.counts()})]


#: What is offered for an argument or option of a name.
KINDS: Final[dict[str, Callable[[Store], Iterable[tuple[str, str]]]]] = {
    "job_id": _jobs,
    "job_ids": _jobs,
    "actor": _actors,
    "queue": _queues,
}

__all__ = ["complete", "completion"]
