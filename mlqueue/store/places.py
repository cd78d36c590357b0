"""Where the server is that takes our commands, when a fail-over or a resharding may move it.

A connection asks anew each time it is opened, so there is no map that could be out of date: a server that went away
breaks the connection, one that was demoted or has given our keys away says so (`MISPLACED`), and either way the next
connection leads to the one that has them. All keys of a namespace are in one slot of a cluster, so one server is all
that a namespace needs at a time; scripts and blocking pops go over the same connections as anything else.

An ASK is not followed but waited out: it says that the slot is on its way, key by key, and a script that ran on the
other side would miss the keys that have not arrived. The key that the scripts name never exists, so from the beginning
of the move to its end each of them is turned away before it runs.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

import redis
from redis.connection import ConnectionPool, parse_url
from redis.crc import key_slot
from redis.exceptions import AskError, ClusterDownError, NoPermissionError, ReadOnlyError, TryAgainError

from ..storeurl import SENTINEL, StoreUrl

#: What a server says that is not, or not now, the one for our keys.
MISPLACED: Final = (ReadOnlyError, AskError, ClusterDownError, TryAgainError)

Address = tuple[str, int]


class Place:
    """The server of several that has our keys.

    Parameters:
      url: Where to ask.
      options: For connections, as redis-py takes them: timeouts and the like.
      root: What all our keys begin with; empty where any server of a cluster will do.
    """

    def __init__(self, url: StoreUrl, options: dict[str, Any], root: str = "") -> None:
        given = parse_url(url.base)
        self._plain: dict[str, Any] = {key: value for key, value in given.items() if key not in ("host", "port")}
        self._kind: type[Any] = self._plain.pop("connection_class", redis.Connection)
        self._options = options
        self._url = url
        self._slot = key_slot(root.encode()) if root else None
        self._lock = threading.Lock()
        #: Whom to ask, the one that answered last before the others.
        self._known: list[Address] = list(url.nodes)

    def pool(self) -> ConnectionPool:
        """A pool whose connections lead there."""
        base: Any = self._kind
        locate = self.locate

        class Following(base):  # type: ignore[misc]
            """A connection that asks where to go when it is opened."""

            def _connect(self) -> Any:
                self.host, self.port = locate()
                return super()._connect()

        host, port = self._url.nodes[0]
        return ConnectionPool(connection_class=Following, host=host, port=port, **self._plain, **self._options)

    def locate(self) -> Address:
        """Where it is now. Raises redis-py's ConnectionError when nobody knows."""
        with self._lock:
            known = list(self._known)
        reasons = []
        for address in known:
            try:
                with self._asking(address) as connection:
                    found = self._ask(connection, address)
            except (redis.RedisError, OSError) as error:
                reasons.append(f"{address[0]}:{address[1]}: {error}")
                continue
            if found is not None:
                self._remember(address)
                return found
            reasons.append(f"{address[0]}:{address[1]} does not know it")
        raise redis.ConnectionError(f"nobody says where {self._what()} is ({'; '.join(reasons)})")

    def doubt(self) -> None:
        """What was said last led nowhere: somebody else is asked first, who may know better."""
        with self._lock:
            self._known.append(self._known.pop(0))

    def masters(self) -> list[Address]:
        """All servers with data of their own."""
        if self._url.kind == SENTINEL:
            return [self.locate()]
        for address in list(self._known):
            with contextlib.suppress(redis.RedisError, OSError), self._asking(address) as connection:
                return list(dict.fromkeys(place for _, _, place in self._shards(connection, address)))
        raise redis.ConnectionError(f"nobody says where {self._what()} is")

    @contextlib.contextmanager
    def connected_to(self, address: Address) -> Iterator[Any]:
        """A connection to one of `masters`."""
        connection = self._kind(host=address[0], port=address[1], **self._plain, **self._options)
        try:
            connection.connect()
            yield connection
        finally:
            connection.disconnect()

    def _what(self) -> str:
        return f"the master of {self._url.service!r}" if self._url.kind == SENTINEL else "our part of the cluster"

    def _remember(self, address: Address) -> None:
        with self._lock:
            if self._known[0] != address:
                self._known = [address, *(other for other in self._known if other != address)]

    @contextlib.contextmanager
    def _asking(self, address: Address) -> Iterator[Any]:
        if self._url.kind != SENTINEL:
            with self.connected_to(address) as connection:
                yield connection
            return
        # A Sentinel has users of its own and no databases; TLS is as that of the servers.
        own = dict(self._url.sentinel)
        shared = {key: value for key, value in self._plain.items() if key.startswith("ssl")}
        connection = self._kind(host=address[0], port=address[1], **{**shared, **own, **self._options})
        try:
            connection.connect()
            yield connection
        finally:
            connection.disconnect()

    def _ask(self, connection: Any, address: Address) -> Address | None:
        if self._url.kind == SENTINEL:
            connection.send_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._url.service)
            found = connection.read_response()
            return None if found is None else self._checked((found[0].decode(), int(found[1])))
        for first, last, place in self._shards(connection, address):
            if self._slot is None or first <= self._slot <= last:
                return place
        return None

    def _shards(self, connection: Any, asked: Address) -> list[tuple[int, int, Address]]:
        """The slots of a cluster and who has them. Whom we learn of may be asked later, when those of the URL are
        gone."""
        connection.send_command("CLUSTER", "SLOTS")
        shards = []
        for first, last, *nodes in connection.read_response():
            # A server that does not know its own address leaves it out.
            places = [((node[0] or b"").decode() or asked[0], int(node[1])) for node in nodes]
            places = [(asked[0] if host == "?" else host, port) for host, port in places]
            shards.append((int(first), int(last), places[0]))
            with self._lock:
                self._known += [place for place in places if place not in self._known]
        return shards

    def _checked(self, address: Address) -> Address:
        """Sentinels name the old master until they have agreed on the new one."""
        with self.connected_to(address) as connection:
            connection.send_command("ROLE")
            # A user who may not ask hears of it by the first write.
            with contextlib.suppress(NoPermissionError):
                if connection.read_response()[0] != b"master":
                    raise redis.ConnectionError(f"{address[0]}:{address[1]} is no master any more")
        return address
