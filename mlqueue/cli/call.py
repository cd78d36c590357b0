"""`Call`: what every command is called with - the options that all have, the settings, and the ways to answer.

A command is made with `command`, which gives it the options that all have. It gets the `Call` as its first argument and
returns its exit code, or None for 0.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final, TypeVar

import click

from ..errors import JobFailed, MLQueueError, SettingsError
from ..settings import Settings, server_url
from .text import on_terminal, one_line
from .values import plain

F = TypeVar("F", bound=Callable[..., Any])

#: The options that every command has, before or behind its name.
COMMON_OPTIONS: Final = ("--namespace", "--url", "--json")

#: How help is asked for.
HELP: Final = {"help_option_names": ["-h", "--help"]}


class Call:
    """One call of the command line."""

    def __init__(self, *, json: bool = False) -> None:
        #: Whether to answer with JSON.
        self.json = json
        #: ``--namespace`` and ``--url``; None where they were not given.
        self.namespace: str | None = None
        self.url: str | None = None
        #: ``--redis_host`` and ``--redis_port``, which MLQ's commands have; None where they were not given.
        self.redis_host: str | None = None
        self.redis_port: int | None = None
        #: What is closed when the command has ended.
        self.closing = contextlib.ExitStack()

    @functools.cached_property
    def settings(self) -> Settings:
        """The settings, under what the options say."""
        return self.settings_under({})

    def settings_under(self, options: Mapping[str, object]) -> Settings:
        """The settings, under these options (None: not given) and the ones that all commands have."""
        given = {"url": self._given_url(), "namespace": self.namespace, **options}
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return Settings.load(**chosen)

    def _given_url(self) -> str | None:
        if self.redis_host is None and self.redis_port is None:
            return self.url
        if self.url is not None:
            raise SettingsError(f"both --url ({self.url}) and --redis_host or --redis_port were given: choose one.")
        return server_url(self.redis_host, self.redis_port)

    # Answers

    def dumps(self, value: object, *, indent: int | None = None) -> str:
        """A value as JSON, see `mlqueue.cli.values`."""
        return json.dumps(plain(value), ensure_ascii=False, allow_nan=False, indent=indent) + "\n"

    def emit(self, value: object, *, one_line: bool = False) -> None:
        """Data, as JSON on stdout; on a terminal of several lines, unless it is one of many."""
        self.write(self.dumps(value, indent=2 if on_terminal() and not one_line else None))

    def write(self, data: str | bytes) -> None:
        """Data, as they are, on stdout. Text is UTF-8 whatever the locale says."""
        sys.stdout.flush()
        sys.stdout.buffer.write(data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data)
        sys.stdout.buffer.flush()

    def talk(self, text: str) -> None:
        """A line for the person at the terminal, on stderr. With ``--json`` there is none."""
        if not self.json:
            click.echo(f"mlqueue: {one_line(text)}", err=True)

    def more(self, cursor: int | str) -> None:
        """Says where the next page begins."""
        if self.json:
            click.echo(json.dumps({"cursor": cursor}), err=True)
        else:
            self.talk(f"there are more: --cursor {cursor}")

    def report(self, error: MLQueueError) -> None:
        """An error, on one line of stderr."""
        message, details = error.message, {}
        if isinstance(error, JobFailed):
            details = {
                "job_id": error.job_id,
                "reason": error.reason,
                "error_type": error.error_type,
                "remote_traceback": error.remote_traceback,
            }
            if error.remote_traceback and not self.json:
                message = f"{message} (`mlqueue show {error.job_id}` has the traceback)"
        self.report_as(type(error).__name__, message, error.exit_code, details)

    def report_as(self, kind: str, message: str, code: int, details: Mapping[str, Any] | None = None) -> None:
        """An error of this kind, on one line of stderr; with ``--json`` as an object."""
        if self.json:
            error = {"type": kind, "message": message, "exit_code": code, **(details or {})}
            click.echo(json.dumps({"error": error}), err=True)
        else:
            click.echo(f"mlqueue: {one_line(message)}", err=True)

    @contextlib.contextmanager
    def logging(self, style: str = "mlqueue: %(message)s", level: str | None = None) -> Iterator[None]:
        """Has what the library logs within appear on stderr. As talk, unless a `level` is given: then it is a log."""
        logger = logging.getLogger("mlqueue")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(style))
        before = logger.handlers[:], logger.level
        logger.handlers = [handler]
        logger.setLevel(level or (logging.ERROR if self.json else logging.INFO))
        try:
            yield
        finally:
            logger.handlers = before[0]
            logger.setLevel(before[1])


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
                help="The store: redis://, rediss://, unix://, redis+sentinel://, redis+cluster://, or `none` for the "
                "embedded server [MLQUEUE_URL].",
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


def redis_options(function: F, *, hidden: bool = False) -> F:
    """Gives a command the flags by which MLQ's commands were told where the store is; in its help, unless `hidden`."""
    for option in (
        click.option(
            "--redis_port",
            type=click.IntRange(1, 65535),
            metavar="PORT",
            expose_value=False,
            callback=_remember,
            hidden=hidden,
            help="The store's port, as MLQ took it [6379].",
        ),
        click.option(
            "--redis_host",
            metavar="HOST",
            expose_value=False,
            callback=_remember,
            hidden=hidden,
            help="The store's host, as MLQ took it; --url goes further [localhost].",
        ),
    ):
        function = option(function)
    return function


def command(
    cls: type[click.Command] = click.Command, **attributes: Any
) -> Callable[[Callable[..., int | None]], click.Command]:
    """Makes a function a command; `attributes` are further arguments of its class."""

    def make(function: Callable[..., int | None]) -> click.Command:
        @functools.wraps(function)
        def with_call(*args: Any, **kwargs: Any) -> int | None:
            return function(click.get_current_context().find_object(Call), *args, **kwargs)

        if not any(option.name == "redis_host" for option in getattr(with_call, "__click_params__", ())):
            with_call = redis_options(with_call, hidden=True)
        return click.command(cls=cls, context_settings=HELP, **attributes)(common_options(with_call))

    return make


__all__ = ["COMMON_OPTIONS", "HELP", "Call", "command", "common_options", "redis_options"]
