"""``mlqueue up``: workers, the HTTP interface and the embedded server in one terminal; or the lines of a Procfile."""

from __future__ import annotations

import functools
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import click

from ..errors import StoreError
from ..foreman import Foreman, Line
from ..processes import place, python_command
from ..settings import Settings
from ..store import Connector, Store
from ..supervisor import environment_under
from . import types
from .call import Call, command
from .opening import namespaces
from .web import HOST, PORT

__all__ = ["FRONT", "STORE", "WORK", "NamespaceOfWorkers", "ours", "run_together", "up"]

#: Where the lines are that run when no modules are named.
PROCFILE: Final = "Procfile"

#: How far the ports of a Procfile's lines are apart, as honcho and foreman have it.
PORT_STEP: Final = 100

#: Who is stopped first: what takes jobs in, then what runs them, then where they are.
FRONT, WORK, STORE = range(3)

#: What runs a command of ours.
OURS: Final = "from mlqueue.cli import main; sys.exit(main(sys.argv[1:]))"

#: How long one look for the workers may take, in seconds.
PATIENCE: Final = 1.0


@command()
@click.argument("modules", metavar="[MODULE...]", nargs=-1)
@click.option("--host", default=HOST, metavar="HOST", help=f"Where the HTTP interface listens [{HOST}].")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=PORT,
    envvar="PORT",
    metavar="PORT",
    help=f"Its port; of a Procfile's lines the first one's [PORT; else {PORT}].",
)
@click.option("--processes", metavar="N", help="How many worker processes [MLQUEUE_PROCESSES; else one per core].")
@click.option("--threads", metavar="N", help="How many jobs each runs at a time [MLQUEUE_THREADS; else 8].")
@click.option(
    "--job-timeout", type=types.duration, metavar="DURATION", help="Give back jobs that run for longer [never]."
)
def up(
    call: Call,
    modules: tuple[str, ...],
    host: str,
    port: int,
    processes: str | None,
    threads: str | None,
    job_timeout: float | None,
) -> int:
    """Run workers, the HTTP interface and the embedded server in one terminal.

    The workers are for the actors of these modules. Without a MODULE it runs the lines of the Procfile in this folder.
    What crashes is started again. SIGTERM or Ctrl-C stops all of it, in order; a second one at once.
    """
    settings = call.settings_under({"processes": processes, "threads": threads})
    if not modules:
        lines = _lines_of(_read_procfile(), port)
    else:
        beside = NamespaceOfWorkers(call, settings)
        web = ["web", "--host", host, "--port", str(port)]
        lines = [beside.behind("web", FRONT, web), ours("worker", WORK, "worker", *modules)]
        if job_timeout is not None:
            lines.append(beside.behind("reaper", WORK, ["reaper", "--timeout", str(job_timeout)]))
    return run_together(call, settings, lines)


def run_together(call: Call, settings: Settings, lines: Sequence[Line]) -> int:
    """Runs processes until they are stopped, and the embedded server beneath them where it is the store."""
    if settings.url is None:
        lines = [ours("server", STORE, "server"), *lines]
    environment = environment_under(settings)
    # The commands of a Procfile are those of this installation.
    folders = [str(Path(sys.executable).parent), environment.get("PATH", os.defpath)]
    environment["PATH"] = os.pathsep.join(folders)
    return Foreman(lines, environment=environment, drain=settings.drain).run()


def ours(name: str, stage: int, *words: str) -> Line:
    """A line that runs a command of ours."""
    return Line(name=name, stage=stage, command=python_command(OURS, *words))


class NamespaceOfWorkers:
    """Which namespace the workers serve that are started beside: their modules say it, and only they import these."""

    def __init__(self, call: Call, settings: Settings) -> None:
        self._settings = settings
        self._given = settings.namespace
        self._connector = Connector(settings)
        self._began = time.time()
        call.closing.callback(self._connector.close)

    def behind(self, name: str, stage: int, words: Sequence[str]) -> Line:
        """A line of ours that is started when it is known."""
        return Line(name=name, stage=stage, command=functools.partial(self._command, words))

    def _command(self, words: Sequence[str]) -> Sequence[str] | None:
        if self._given is None:
            self._look()
        return None if self._given is None else python_command(OURS, *words, "--namespace", self._given)

    def _look(self) -> None:
        try:
            found = [name for name in namespaces(self._connector)[0] if self._has_workers(name)]
        except StoreError:
            return  # it has not been started yet
        finally:
            # The embedded server is not to stay for us.
            self._connector.close()
        if len(found) == 1:
            self._given = found[0]

    def _has_workers(self, name: str) -> bool:
        workers = Store(self._connector, name, self._settings).workers()
        return any(
            worker.info.get("place") == place() and worker.info.get("started_at", 0) >= self._began
            for worker in workers
        )


def _read_procfile() -> dict[str, str]:
    """The lines of the Procfile here, by name."""
    path = Path(PROCFILE)
    if not path.exists():
        raise click.UsageError(
            "name the modules that declare your actors, `mlqueue up tasks`, or write a Procfile into this folder.",
            click.get_current_context(),
        )
    found = dict(re.findall(r"^([A-Za-z0-9_-]+):[ \t]*(\S.*?)[ \t]*$", path.read_text(), re.MULTILINE))
    if not found:
        raise click.UsageError(f"{path.resolve()} has no line of the form `web: command`.", click.get_current_context())
    return found


def _lines_of(commands: dict[str, str], port: int) -> list[Line]:
    """The lines of a Procfile, each with a port of its own."""
    return [
        Line(
            name=name,
            command=text,
            stage=FRONT if name == "web" else WORK,
            environment={"PORT": str(port + PORT_STEP * number)},
        )
        for number, (name, text) in enumerate(commands.items())
    ]
