"""``mlqueue datasets``: which data sets there are, fetching them, where they are, removing them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn, ParamSpec, TypeVar

import click

from mlqueue.batch import config
from mlqueue.batch.datasets import catalogue
from mlqueue.batch.datasets.catalogue import CATALOGUE, Entry
from mlqueue.batch.datasets.dataset import delete_dataset_cache
from mlqueue.errors import MLQueueError

__all__ = ["datasets"]

P = ParamSpec("P")
R = TypeVar("R")


def _telling(command: Callable[P, R]) -> Callable[P, R]:
    """Errors of ours as a message and their exit code."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except MLQueueError as error:
            _fail(str(error), error.exit_code)

    return run


def _fail(message: str, exit_code: int) -> NoReturn:
    click.echo(f"mlqueue: {message}", err=True)
    raise click.exceptions.Exit(exit_code)


@click.group(invoke_without_command=True)
@click.pass_context
def datasets(ctx: click.Context) -> None:
    """Data sets: list, fetch, locate and remove them.

    They are kept in $MLQUEUE_DATA_HOME/data, else where BatchUp kept its own, else in your cache folder.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        raise click.exceptions.Exit(2)


@datasets.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON list, for programs.")
@_telling
def list_datasets(as_json: bool) -> None:
    """List the data sets, and what is here of each."""
    if as_json:
        click.echo(json.dumps([_facts(entry) for entry in CATALOGUE.values()], indent=2))
        return
    for entry in CATALOGUE.values():
        size = _size(entry.path)
        state = (
            f"{_megabytes(size)}  {entry.path}" if size is not None else f"not here, {entry.download_mb} MB to fetch"
        )
        click.echo(f"{entry.name:14} {entry.title:17} {state}")


@datasets.command("fetch")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every data set (some 4.6 GB to download).")
@_telling
def fetch_datasets(names: Sequence[str], everything: bool) -> None:
    """Download and convert data sets; those that are here are left alone.

    A download that was cut goes on from where it was. The paths are printed.
    """
    for entry in _chosen(names, everything):
        click.echo(entry.fetch.require())


@datasets.command("path")
@click.argument("name", required=False)
@_telling
def print_path(name: str | None) -> None:
    """Print the path of a data set, or, without a name, of the folder of them all."""
    if name is None:
        click.echo(config.get_data_dir())
        return
    entry = catalogue.find(name)
    if not entry.path.exists():
        _fail(f"{entry.title} is not here; run `mlqueue datasets fetch {entry.name}`", 3)
    click.echo(entry.path)


@datasets.command("rm")
@click.argument("names", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="Every data set.")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@_telling
def remove_datasets(names: Sequence[str], everything: bool, yes: bool) -> None:
    """Remove data sets, and what unfinished fetches of them have left."""
    chosen = _chosen(names, everything)
    here = [entry for entry in chosen if entry.path.exists()]
    if here and not yes:
        click.confirm(f"Remove {', '.join(str(entry.path) for entry in here)}?", abort=True)
    for entry in chosen:
        size = _size(entry.path)
        delete_dataset_cache(str(entry.path))
        click.echo(f"{entry.name}: " + ("was not here" if size is None else f"removed, {_megabytes(size)}"))


def _chosen(names: Sequence[str], everything: bool) -> list[Entry]:
    if bool(names) == everything:
        raise click.UsageError(f"name data sets ({', '.join(CATALOGUE)}) or give --all")
    return list(CATALOGUE.values()) if everything else [catalogue.find(name) for name in names]


def _facts(entry: Entry) -> dict[str, object]:
    size = _size(entry.path)
    return {
        "name": entry.name,
        "title": entry.title,
        "class": f"mlqueue.batch.datasets.{entry.module}.{entry.class_name}",
        "path": str(entry.path),
        "fetched": size is not None,
        "bytes": size,
        "download_mb": entry.download_mb,
    }


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
