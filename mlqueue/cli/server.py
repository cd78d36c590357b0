"""``mlqueue server``: the embedded server of this folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import click

from ..embedded import EmbeddedServer, ServerStatus
from ..errors import EmbeddedError, SettingsError
from .call import Call, command
from .text import clean, duration, iso


@command()
@click.option("--status", is_flag=True, help="Show what runs, and exit; 4 when nothing does.")
@click.option("--stop", is_flag=True, help="Stop the server, whoever uses it.")
@click.option("--mend", is_flag=True, help="Go back to what was before its file was damaged; a copy is kept.")
def server(call: Call, status: bool, stop: bool, mend: bool) -> int:
    """Run the embedded server of this folder in the foreground, until Ctrl-C.

    Rarely needed: whoever needs it starts it, and it stops when nobody does.
    """
    given = [name for name, on in (("--status", status), ("--stop", stop), ("--mend", mend)) if on]
    if len(given) > 1:
        raise click.UsageError(f"{' and '.join(given)} were given; choose one.", click.get_current_context())
    embedded = _embedded(call)
    if status:
        return _show_status(call, embedded)
    if stop:
        stopped = embedded.stop()
        call.talk(f"the server in {embedded.home} {'has stopped' if stopped else 'does not run'}.")
        if call.json:
            call.emit({"stopped": stopped, "home": str(embedded.home)})
        return 0
    if mend:
        _mend(call, embedded)
        return 0
    return embedded.run_foreground(lambda found: _say_ready(call, found))


def _embedded(call: Call) -> EmbeddedServer:
    settings = call.settings
    if settings.url is not None:
        raise SettingsError(
            f"the store is {settings.masked_url} ({settings.sources['url']}), so the embedded server is not in use. "
            "Unset the URL, or say --url none."
        )
    return EmbeddedServer(
        settings.home, binary=settings.server_bin, durability=settings.durability, grace=settings.server_grace
    )


def _show_status(call: Call, embedded: EmbeddedServer) -> int:
    found = embedded.status()
    if found is None:
        raise EmbeddedError(f"no server runs in {embedded.home}. The first process that needs it starts it.")
    if call.json:
        call.emit(_facts(found))
        return 0
    clients = "no answer" if found.clients is None else found.clients
    facts = {
        "home": found.home,
        "url": found.url,
        "server": f"{found.binary} {found.version}",
        "pid": f"{found.pid} (keeper {found.keeper_pid or 'none'})",
        "started": f"{iso(found.started_at)}",
        "clients": clients,
    }
    call.write("".join(f"{name:<9}{clean(value)}\n" for name, value in facts.items()))
    return 0


def _mend(call: Call, embedded: EmbeddedServer) -> None:
    mended = embedded.mend()
    if mended.copy is None:
        call.talk(f"the files in {embedded.home} are whole.")
    else:
        call.talk(f"the last {mended.lost:,} bytes of changes were cut off; what was there is in {mended.copy}.")
    if call.json:
        call.emit({"lost": mended.lost, "copy": None if mended.copy is None else str(mended.copy)})


def _say_ready(call: Call, found: ServerStatus) -> None:
    if call.json:
        call.emit(_facts(found))
    grace = duration(call.settings.server_grace)
    call.talk(f"the server in {found.home} is up (version {found.version}, pid {found.pid}).")
    call.talk(f"Ctrl-C ends this command; while other processes use the server, it stays until {grace} after the last.")


def _facts(found: ServerStatus) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"home": str(found.home)}


__all__ = ["server"]
