"""All ways between a trainer and the workers that prepare its batches: what a trainer offers, and what a worker takes.

The trainer opens a door for each way that may work (`Doors`); the address that its jobs carry has an entry for each. A
worker tries them in their order, what is fastest in front (`connect`): memory that is shared, on the trainer's host;
TCP; the store. Nobody has to say which hosts there are: a way that leads nowhere is found out by trying, and the log
says why.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from mlqueue.batch.links import HostLink, HostListener, Link, Peer
from mlqueue.batch.tcp import TcpDoor, TcpLink, trainer_tls
from mlqueue.batch.through_store import StoreDoor, StoreLink
from mlqueue.settings import Settings, parse_endpoint
from mlqueue.store.connection import Connector
from mlqueue.storeurl import parse_store_url

__all__ = ["Doors", "connect", "open_doors"]

logger = logging.getLogger("mlqueue.batches")

#: Which way a worker took to each of the last trainers, so that it is said once.
_taken: dict[str, str] = {}
#: Of so many trainers.
MOST_TAKEN: Final = 64


class Door(Protocol):
    """Where workers come to a trainer, by one way."""

    #: What can be read from when somebody has come.
    socket: socket.socket

    @property
    def address(self) -> dict[str, Any]: ...

    def accept(self, serial: int) -> Peer | None: ...

    def let_go(self) -> None: ...

    def close(self) -> None: ...

    def join(self) -> None: ...


class Doors:
    """Those that a trainer has opened. `token` is what workers of its own host show."""

    def __init__(self, doors: Sequence[Door], token: bytes = b"") -> None:
        self._doors = list(doors)
        self.token = token

    @property
    def sockets(self) -> list[socket.socket]:
        """What can be read from when somebody has come."""
        return [door.socket for door in self._doors]

    @property
    def address(self) -> dict[str, Any]:
        """What a job has to carry for its worker to come here: an entry for each way."""
        return {way: entry for door in self._doors for way, entry in door.address.items()}

    def accept(self, fd: int, serial: int) -> Peer | None:
        """The next one who has come to the socket of this descriptor; None when there is none."""
        for door in self._doors:
            if door.socket.fileno() == fd:
                return door.accept(serial)
        return None

    def let_go(self) -> None:
        """Close what a fork has got of them."""
        for door in self._doors:
            door.let_go()

    def close(self) -> None:
        """Let nobody in any more."""
        for door in self._doors:
            door.close()

    def join(self) -> None:
        """Wait until they are closed, and nothing is left of them."""
        for door in self._doors:
            door.join()


def open_doors(settings: Settings, connector: Connector, root: str) -> Doors:
    """Open the doors of a trainer. Raises OSError when it cannot listen where the settings say, and ssl.SSLError for
    certificates that are none.

    `connector` and `root`: the store of the jobs, and what all its keys begin with.
    """
    ways = settings.batches_ways.split(",")
    doors: list[Door] = []
    token = b""
    try:
        for way in ways:
            if way == "host":
                host = HostListener()
                token = host.token
                doors.append(host)
            elif way == "tcp":
                doors += _open_tcp(settings)
            elif _may_store(settings):
                prefix = f"{root}:batches:{secrets.token_hex(8)}"
                budget, limit = settings.batches_store_bytes, settings.max_batch_bytes
                doors.append(StoreDoor(_connector(settings, connector), prefix, budget, limit))
    except BaseException:
        for door in doors:
            door.close()
        for door in doors:
            door.join()
        raise
    return Doors(doors, token)


def _open_tcp(settings: Settings) -> list[Door]:
    bind = settings.batches_bind
    if not settings.signing_keys:
        if bind is not None:
            logger.warning(
                "nobody is let in at MLQUEUE_BATCHES_BIND=%s: that needs MLQUEUE_SIGNING_KEY, the same secret for "
                "trainer and workers, for example the output of: python -c 'import secrets; "
                "print(secrets.token_urlsafe(32))'",
                bind,
            )
        return []
    towards_store = address_towards_store(settings)
    host, port = (parse_endpoint(bind) or ("", 0)) if bind is not None else (towards_store, 0)
    if host is None:
        return []  # who has no way to a store over the network is on this host
    tls = trainer_tls(settings)
    told: list[tuple[str, int]] = []
    if settings.batches_advertise is not None:
        name, advertised = parse_endpoint(settings.batches_advertise) or ("", 0)
        told = [(name or socket.gethostname(), advertised)]
    elif host in ("", "0.0.0.0", "::"):  # noqa: S104 - as the settings say
        told = [(name, 0) for name in (towards_store, socket.gethostname()) if name]
    try:
        return [TcpDoor(settings, host, port, told, tls)]
    except OSError as error:
        if bind is not None:
            raise OSError(error.errno, f"MLQUEUE_BATCHES_BIND={bind}: {error.strerror or error}") from error
        logger.warning("no worker can come by TCP: %s cannot be listened at: %s", host, error)
        return []


def address_towards_store(settings: Settings) -> str | None:
    """The address of this host on the network that the store is reached by; None where it is reached by none."""
    found = store_endpoint(settings.url)
    if found is None:
        return None
    try:
        family, kind, _, _, address = socket.getaddrinfo(*found, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError:
        return None


def store_endpoint(url: str | None) -> tuple[str, int] | None:
    """Host and port of a store, or of one who knows where it is; None for one that is on this host by its nature."""
    if url is None or urlsplit(url).scheme == "unix":
        return None
    parsed = parse_store_url(url)
    if parsed.nodes:
        return parsed.nodes[0]
    parts = urlsplit(parsed.base)
    return parts.hostname or "localhost", parts.port or 6379


def _may_store(settings: Settings) -> bool:
    """Whether there may be workers that reach nothing but the store: not where that is of this host alone."""
    asked = settings.sources["batches_ways"] != "default"
    return asked or settings.batches_store is not None or store_endpoint(settings.url) is not None


def _connector(settings: Settings, connector: Connector) -> Connector:
    """The store of the batches."""
    if settings.batches_store is None:
        return connector
    return Connector(replace(settings, url=settings.batches_store), connector.root)


def connect(address: dict[str, Any], job_id: str, settings: Settings, connector: Connector) -> Link | None:
    """The best way to the trainer at an address; None where there is none, or no trainer any more."""
    reasons: list[str] = []
    trainer = str(next((entry.get("token") for entry in address.values()), b""))
    for way in settings.batches_ways.split(","):
        entry = address.get(way)
        if entry is None:
            continue
        try:
            if way == "host":
                link: Link = HostLink(entry["socket"], entry["token"], job_id)
                shown = "shared memory"
            elif way == "tcp":
                by_tcp = TcpLink(entry, job_id, settings)
                link, shown = by_tcp, f"TCP to {by_tcp.where}"
            else:
                compress = settings.batches_compress == "auto"
                through = StoreLink(entry, job_id, _connector(settings, connector), compress)
                link, shown = through, f"the store ({through.where})"
        except OSError as error:
            reasons.append(f"{way}: {error}")
            continue
        _say(trainer, shown, reasons)
        return link
    if "tcp" not in address and "tcp" in settings.batches_ways:
        reasons.append("tcp: the trainer offers none, for want of MLQUEUE_SIGNING_KEY or of an address (BATCHES_BIND)")
    # A trainer that has ended leaves jobs behind that nobody can do anything for, which is as it should be.
    logger.info(
        "no batches are prepared for job %s: its trainer has ended, or no way leads to it (%s).",
        job_id,
        "; ".join(reasons),
    )
    return None


def _say(trainer: str, shown: str, reasons: list[str]) -> None:
    """Tell once for each trainer how batches go to it."""
    if _taken.get(trainer) == shown:
        return
    while len(_taken) >= MOST_TAKEN:
        _taken.pop(next(iter(_taken)), None)
    _taken[trainer] = shown
    why = f", because not by {'; '.join(reasons)}" if reasons else ""
    logger.info("process %d brings batches to a trainer by %s%s", os.getpid(), shown, why)
