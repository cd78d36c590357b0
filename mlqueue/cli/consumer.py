"""``mlqueue consumer``: MLQ's word for workers, with the HTTP interface and the reaper beside them if asked for."""

from __future__ import annotations

from typing import Final

import click

from . import types
from .call import Call, command, redis_options
from .up import FRONT, WORK, NamespaceOfWorkers, ours, run_together
from .web import HOST, PORT

__all__ = ["consumer"]

#: What workers run that are for posted functions alone.
LISTENING: Final = "mlqueue.listening"


@command()
@click.argument("modules", metavar="[MODULE...]", nargs=-1)
@click.option("--server", is_flag=True, help="Serve the HTTP interface, too.")
@click.option("--server_address", default=HOST, metavar="HOST", help=f"Where it listens [{HOST}].")
@click.option(
    "--server_port",
    type=click.IntRange(0, 65535),
    default=PORT,
    envvar="PORT",
    metavar="PORT",
    help=f"Its port [PORT; else {PORT}].",
)
@click.option("--reaper", is_flag=True, help="Give back jobs that run too long.")
@click.option("--reaper_interval", type=types.duration, default=60, metavar="DURATION", help="How often it looks [60].")
@click.option(
    "--reaper_timeout", type=types.duration, default=300, metavar="DURATION", help="How long a job may run [300]."
)
@click.option("--reaper_retries", type=click.IntRange(0), default=5, metavar="N", help="How often it goes back [5].")
@redis_options
def consumer(
    call: Call,
    modules: tuple[str, ...],
    server: bool,
    server_address: str,
    server_port: int,
    reaper: bool,
    reaper_interval: float,
    reaper_timeout: float,
    reaper_retries: int,
) -> int:
    """Run workers for the listeners and actors of these modules, as MLQ's command did.

    Without modules, where MLQUEUE_SIGNING_KEY is set, workers for the functions that are posted. Each part is a process
    of its own; they are stopped together.
    """
    settings = call.settings
    if settings.signing_keys:
        modules = modules or (LISTENING,)
    if not modules and not server and not reaper:
        raise click.UsageError(
            "name the modules that call mlq.create_listener(fn) or declare actors, `mlqueue consumer tasks`; or say "
            "--server or --reaper for these alone. Workers for posted functions need none, but MLQUEUE_SIGNING_KEY.",
            click.get_current_context(),
        )
    beside = NamespaceOfWorkers(call, settings) if modules else None
    lines = [ours("worker", WORK, "worker", *modules)] if modules else []
    wanted = []
    if server:
        wanted.append(("web", FRONT, ["web", "--host", server_address, "--port", str(server_port)]))
    if reaper:
        options = ["--interval", str(reaper_interval), "--timeout", str(reaper_timeout)]
        wanted.append(("reaper", WORK, ["reaper", *options, "--retries", str(reaper_retries)]))
    for name, stage, words in wanted:
        lines.append(ours(name, stage, *words) if beside is None else beside.behind(name, stage, words))
    return run_together(call, settings, lines)
