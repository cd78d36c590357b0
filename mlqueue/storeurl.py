"""The URL of a store: of one server, of the one that Sentinels watch, or of a cluster.

``redis://host:port/db``, ``unix:///path``, ``redis+sentinel://host:port,host:port/service/db`` and
``redis+cluster://host:port,host:port``; with ``rediss`` for TLS. User, password and the parameters behind ``?`` are for
the servers with the data; those for Sentinels have names that begin with ``sentinel_``.
"""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from typing import Final

__all__ = ["ALLOWED", "StoreUrl", "parse_store_url"]

#: What may be given, for errors.
ALLOWED: Final = (
    "allowed are redis://host:port/db, unix:///path/to/socket?db=0, redis+sentinel://host:port,host:port/service/db "
    "and redis+cluster://host:port,host:port, with rediss for TLS"
)

#: The ports of those whose URL names none.
SENTINEL_PORT: Final = 26379
SERVER_PORT: Final = 6379

#: What follows the scheme in a URL of several servers.
SENTINEL: Final = "sentinel"
CLUSTER: Final = "cluster"

#: A host, or an IPv6 address in brackets, and a port.
NODE: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%]+\]|[^\[\]:@/\s]+)(?::(?P<port>[0-9]{1,5}))?")


@dataclass(frozen=True)
class StoreUrl:
    """A URL, taken apart."""

    #: Empty for one server, else ``sentinel`` or ``cluster``.
    kind: str
    #: A URL for redis-py. Of several servers its host is the first of `nodes`, to be replaced by who holds the data.
    base: str
    #: The Sentinels, or some servers of the cluster: hosts and ports.
    nodes: tuple[tuple[str, int], ...] = ()
    #: The name under which the Sentinels know the server.
    service: str = ""
    #: Parameters for connections to Sentinels, without the ``sentinel_`` of their names.
    sentinel: tuple[tuple[str, str], ...] = ()


def parse_store_url(text: str) -> StoreUrl:
    """Takes a URL apart. Raises ValueError for one that is not allowed; its text goes behind "is"."""
    if "://" not in text:
        raise ValueError(f"no URL; {ALLOWED}")
    scheme, _, rest = text.partition("://")
    name, plus, kind = scheme.partition("+")
    if name in ("redis", "rediss") and (kind in (SENTINEL, CLUSTER) if plus else True):
        return _several(name, kind, rest) if plus else _single(text)
    if scheme == "unix":
        return _single(text)
    raise ValueError(f"a URL of scheme {_scheme(text)!r}, which is not supported; {ALLOWED}")


def _scheme(text: str) -> str:
    try:
        return urllib.parse.urlsplit(text).scheme
    except ValueError:
        return ""


def _single(text: str) -> StoreUrl:
    try:
        parts = urllib.parse.urlsplit(text)
        parts.port  # noqa: B018 - reading it checks it
    except ValueError:
        # The reason that urlsplit gives may quote a part of the password.
        raise ValueError(
            f"no valid URL: its port is no number up to 65535, or a character in its user or password has to be "
            f"percent-encoded (urllib.parse.quote); {ALLOWED}"
        ) from None
    if parts.scheme == "unix":
        if not parts.path.startswith("/"):
            raise ValueError("a URL without the socket's absolute path; allowed is unix:///path/to/socket?db=0")
    elif not re.fullmatch(r"(?:/[0-9]*)?", parts.path):
        raise ValueError(f"a URL whose path is not the number of a database; {ALLOWED}")
    return StoreUrl("", text)


def _several(name: str, kind: str, rest: str) -> StoreUrl:
    place, _, query = rest.partition("#")[0].partition("?")
    place, _, path = place.partition("/")
    credentials, at, hosts = place.rpartition("@")
    nodes = tuple(_node(host, SENTINEL_PORT if kind == SENTINEL else SERVER_PORT) for host in hosts.split(","))
    service, database = _path(kind, path)
    parameters = urllib.parse.parse_qsl(query, keep_blank_values=True)
    sentinel = tuple((key.removeprefix("sentinel_"), value) for key, value in parameters if key.startswith("sentinel_"))
    unknown = [key for key, _ in sentinel if key not in ("username", "password")]
    if unknown:
        raise ValueError(
            f"a URL with the parameter sentinel_{unknown[0]}; there are sentinel_username, sentinel_password"
        )
    if sentinel and kind != SENTINEL:
        raise ValueError(f"a URL with parameters for Sentinels, but of a cluster; {ALLOWED}")
    kept = urllib.parse.urlencode([item for item in parameters if not item[0].startswith("sentinel_")])
    host, port = nodes[0]
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    base = f"{name}://{credentials}{at}{where}/{database}{'?' if kept else ''}{kept}"
    return StoreUrl(kind, _single(base).base, nodes, service, sentinel)


def _node(text: str, default: int) -> tuple[str, int]:
    match = NODE.fullmatch(text)
    port = int(match["port"] or default) if match else 0
    if match is None or not 0 < port < 2**16:
        # Not quoted: it may be the half of a password with an @ or a / that nobody encoded.
        raise ValueError(
            "a URL whose hosts are not host:port,host:port, or with a character in its user or password that has to be "
            f"percent-encoded (urllib.parse.quote); {ALLOWED}"
        )
    return match["host"].strip("[]"), port


def _path(kind: str, path: str) -> tuple[str, str]:
    """Service and database."""
    if kind == CLUSTER:
        if path not in ("", "0"):
            raise ValueError(f"a URL of a cluster with a path, which it has not; {ALLOWED}")
        return "", "0"
    service, _, database = path.partition("/")
    if not service or not re.fullmatch(r"[0-9]*", database):
        raise ValueError(
            "a URL whose path is not the name of the Sentinels' service and the number of a database, as in "
            f"/mymaster/0; {ALLOWED}"
        )
    return urllib.parse.unquote(service), database or "0"
