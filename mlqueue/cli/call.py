"""`Call`: what every command is called with - the store it speaks to, and the ways to answer.

A command is made with `command`, which gives it the options that all have. It gets the `Call` as its first argument and
returns its exit code, or None for 0.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from ..app import DEFAULT_NAMESPACE
from ..errors import EmbeddedError
from ..settings import Settings
from ..store import Connector, Store
from .namespaces import the_only_namespace
from .text import one_line
from .values import plain

F = TypeVar("F", bound=Callable[..., Any])

#: The options that every command has, before or behind its name.
COMMON_OPTIONS: Final = ("--namespace", "--url", "--json")

#: What is in the embedded server's folder once it has run there.
TRACES: Final = ("appendonlydir", "server.json")


class Call:
    """One call of the command line."""

    def __init__(self, *, json: bool = False) -> None:
        #: Whether to answer with JSON.
        self.json = json
        #: ``--namespace`` and ``--url``; None where they were not given.
        self.namespace: str | None = None
        self.url: str | None = None
        self._connector: Connector | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings, under what the options say."""
        options = {"url": self.url, "namespace": self.namespace}
        return Settings.load(**{name: value for name, value in options.items() if value is not None})

    def store(self, *, start: bool = False) -> Store:
        """The store of the namespace. The embedded server is started where it ran before; where it never did, only
        if `start`: a look at a folder leaves nothing behind in it."""
        self._connector = connector = Connector(self.settings)
        if not start:
            _refuse_virgin_folder(connector)
        namespace = self.settings.namespace or the_only_namespace(connector) or DEFAULT_NAMESPACE
        return Store(connector, namespace, self.settings)

    def close(self) -> None:
        """Closes the connections."""
        if self._connector is not None:
            self._connector.close()

    # Answers

    def emit(self, value: object) -> None:
        """Data, as a line of JSON on stdout (on a terminal, of several lines)."""
        indent = 2 if sys.stdout.isatty() else None
        self.write(json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent) + "\n")

    def write(self, data: str | bytes) -> None:
        """Data, as they are, on stdout. Text is UTF-8 whatever the locale says."""
        sys.stdout.flush()
        sys.stdout.buffer.write(data.encode() if isinstance(data, str) else data)
        sys.stdout.buffer.flush()

    def talk(self, text: str) -> None:
        """A line for the person at the terminal, on stderr. With ``--json`` there is none."""
        if not self.json:
            click.echo(f"mlqueue: {one_line(text)}", err=True)


def _refuse_virgin_folder(connector: Connector) -> None:
    server = connector.embedded
    if server is None or server.status() is not None:
        return
    if not any(Path(server.home, name).exists() for name in TRACES):
        raise EmbeddedError(
            f"there is no store here: no MLQUEUE_URL is set, and no embedded server has ever run in {server.home}. "
            "`mlqueue submit`, `mlqueue worker` and `mlqueue server` start one; or change to the project's folder, or "
            "give --url."
        )


def _remember(ctx: click.Context, parameter: click.Parameter, value: object) -> None:
    call = ctx.find_object(Call)
    if call is not None and parameter.name is not None and value not in (None, False):
        setattr(call, parameter.name, value)


def common_options(function: F) -> F:
    """Gives a command the options that all have. They are kept in the `Call`, wherever they stand."""
    for option in reversed(
        (
            click.option(
                "--namespace",
                metavar="NAME",
                expose_value=False,
                callback=_remember,
                help="The namespace of the jobs [MLQUEUE_NAMESPACE; else the only one in the store].",
            ),
            click.option(
                "--url",
                metavar="URL",
                expose_value=False,
                callback=_remember,
                help="The store: redis://, rediss://, unix://, or `none` for the embedded server [MLQUEUE_URL].",
            ),
            click.option(
                "--json",
                is_flag=True,
                expose_value=False,
                callback=_remember,
                # Before --version, which answers at once.
                is_eager=True,
                help="Answer with JSON.",
            ),
        )
    ):
        function = option(function)
    return function


def command(**options: Any) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a function a command."""

    def make(function: Callable[..., int | None]) -> click.Command:
        settings = {"help_option_names": ["-h", "--help"]}
        return click.command(context_settings=settings, **options)(common_options(click.pass_obj(function)))

    return make


__all__ = ["COMMON_OPTIONS", "Call", "command", "common_options"]
