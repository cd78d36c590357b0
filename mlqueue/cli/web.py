"""``mlqueue web``: the HTTP interface of a namespace, in one process."""

from __future__ import annotations

import importlib
import importlib.util
import os
import resource
import socket
import sys
from typing import Any, Final

import click

from ..app import MLQ
from ..errors import MissingDependency, MLQueueError, SettingsError
from ..processes import python_command
from .call import Call, command, redis_options
from .opening import open_store

__all__ = ["CannotListen", "web"]

#: Where it listens, unless told otherwise.
HOST: Final = "127.0.0.1"
PORT: Final = 5000

#: How many requests may wait for the end of a job at a time, and how many streams of events there may be: with others
#: fewer than there are connections.
MAX_WAITS: Final = 5000
MAX_STREAMS: Final = 4000

#: How many files, connections among them, it asks the system for.
MAX_FILES: Final = 65_536

#: What runs in place of this process where gevent is installed: gevent has to replace what blocks before anything else
#: is imported. Not ``os`` and ``subprocess``: its os.close() closes later, which whoever starts processes (the embedded
#: server) cannot do with.
PATCHED: Final = (
    "from gevent import monkey; monkey.patch_all(os=False, subprocess=False, signal=False); "
    "from mlqueue.cli import main; sys.exit(main(sys.argv[1:]))"
)


class CannotListen(MLQueueError):
    """There is no listening at this host and port."""

    exit_code = 2


@command()
@click.option("--host", default=HOST, metavar="HOST", help=f"Where to listen; 0.0.0.0 is everywhere [{HOST}].")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=PORT,
    envvar="PORT",
    metavar="PORT",
    help=f"The port; 0 is any that is free [PORT; else {PORT}].",
)
@click.option(
    "--threaded", is_flag=True, help="A thread for each request, as without gevent: no streams, clients ask again."
)
@redis_options
def web(call: Call, host: str, port: int, threaded: bool) -> int:
    """Serve the HTTP interface of a namespace, until SIGTERM or Ctrl-C.

    Without API keys (`mlqueue key new`) it serves everybody, but listens on this machine only. Once there are keys, it
    asks for them.
    """
    cooperative = not threaded and importlib.util.find_spec("gevent") is not None
    if cooperative and not _is_patched():
        _start_anew(call, ["--host", host, "--port", str(port)])
    store = open_store(call, start=True)
    standalone = _part("standalone")
    mlq = MLQ(store.namespace, settings=call.settings)
    call.closing.callback(mlq.close)
    with call.logging("%(asctime)s [web] %(levelname)s %(name)s: %(message)s", call.settings.log_level):
        anonymous = not standalone.needs_keys(mlq)
        if anonymous:
            _refuse_open_door(host, standalone)
        listener = _listen(host, port, standalone)
        _raise_limit()
        server = _server(standalone, mlq, listener, anonymous, cooperative)
        call.talk(
            f"serving {store.namespace} at http://{_address(listener)} ({'anybody here' if anonymous else 'with keys'}"
            f"{'' if cooperative else '; threads, no streams'}; {store.connector.where})."
        )
        server.run()
    return 0


def _server(standalone: Any, mlq: MLQ, listener: socket.socket, anonymous: bool, cooperative: bool) -> Any:
    drain = mlq.settings.drain
    # What can be a job can be sent.
    max_body = mlq.settings.max_message_bytes
    options: dict[str, Any] = {"anonymous": anonymous, "max_body": max_body}
    if cooperative:
        app = standalone.create_app(mlq, **options, max_waits=MAX_WAITS, max_streams=MAX_STREAMS)
        return _part("cooperative").CooperativeServer(standalone.AccessLog(app), listener, drain)
    threads = _part("threaded")
    app = standalone.create_app(mlq, **options, max_waits=threads.THREADS // 2, max_streams=0)
    return threads.ThreadedServer(standalone.AccessLog(app), listener, drain, max_body=max_body)


def _part(name: str) -> Any:
    """A module of `mlqueue.web`, which needs packages that a worker does not."""
    try:
        return importlib.import_module(f"mlqueue.web.{name}")
    except MissingDependency:
        raise
    except ImportError as error:
        raise MissingDependency(f"mlqueue web: {error}. Install what it needs: pip install 'mlqueue[web]'.") from error


# Before it serves


def _is_patched() -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("socket"))


def _start_anew(call: Call, options: list[str]) -> None:
    """Has this process be the same command in an interpreter in which nothing blocks but what gevent knows of."""
    common = ["--json"] if call.json else []
    for name in ("namespace", "url", "redis_host", "redis_port"):
        value = getattr(call, name)
        common += [f"--{name}", str(value)] if value is not None else []
    call.closing.close()
    sys.stdout.flush()
    sys.stderr.flush()
    words = python_command(PATCHED, "web", *options, *common)
    os.execv(words[0], words)  # noqa: S606


def _refuse_open_door(host: str, standalone: Any) -> None:
    try:
        if standalone.is_loopback(host):
            return
    except OSError as error:
        raise CannotListen(f"--host {host}: {error.strerror or error}. 127.0.0.1 is this machine alone.") from None
    raise SettingsError(
        f"--host {host} can be reached from other machines, and there is no API key: everybody could submit jobs and "
        "read results. Make a key, `mlqueue key new --scope submit,read`, and start this again; or leave --host out "
        "to serve this machine alone."
    )


def _listen(host: str, port: int, standalone: Any) -> socket.socket:
    try:
        listener: socket.socket = standalone.listen(host, port)
        return listener
    except OSError as error:
        raise CannotListen(
            f"nothing can listen at {host}, port {port} ({error.strerror or error}). Choose another --port, or end "
            "what listens there."
        ) from None


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _raise_limit() -> None:
    """Each connection is an open file, and many systems allow a process a thousand."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
