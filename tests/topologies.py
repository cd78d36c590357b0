"""Servers that fail over: one with a replica and Sentinels that watch them, and a cluster. Real ones."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import redis
from faults.servers import PATIENCE, OwnServer
from support import eventually

from mlqueue.embedded import find_binary

#: What the Sentinels call the server.
SERVICE = "jobs"

#: After how many milliseconds of silence a server counts as lost.
DOWN_AFTER = 500


class SentinelServer(OwnServer):
    """A Sentinel that watches one server."""

    def __init__(self, folder: Path, watched: OwnServer, quorum: int, *lines: str) -> None:
        super().__init__(folder)
        self.configuration = folder / "sentinel.conf"
        self.configuration.write_text(
            "\n".join(
                [
                    f"port {self.port}",
                    "bind 127.0.0.1",
                    f"dir {folder}",
                    f"sentinel monitor {SERVICE} 127.0.0.1 {watched.port} {quorum}",
                    f"sentinel down-after-milliseconds {SERVICE} {DOWN_AFTER}",
                    f"sentinel failover-timeout {SERVICE} 3000",
                    *lines,
                    "",
                ]
            )
        )

    def command(self) -> list[str]:
        binary = find_binary(os.environ.get("MLQUEUE_SERVER_BIN"))[0]
        return [str(binary), str(self.configuration), "--sentinel"]


class Sentinels:
    """A master, a replica, and some who watch them. `options` are further ones of the two servers."""

    def __init__(self, folder: Path, count: int = 1, **options: str | int) -> None:
        self._stack = contextlib.ExitStack()
        self.folder = folder
        with contextlib.ExitStack() as stack:
            options = {"repl_diskless_sync_delay": 0, **options}
            self.first = stack.enter_context(contextlib.closing(OwnServer(folder / "first", **options).start()))
            self.second = stack.enter_context(
                contextlib.closing(
                    OwnServer(folder / "second", replicaof=f"127.0.0.1 {self.first.port}", **options).start()
                )
            )
            self.sentinels = [
                stack.enter_context(
                    contextlib.closing(
                        SentinelServer(folder / f"sentinel-{number}", self.first, count // 2 + 1).start()
                    )
                )
                for number in range(count)
            ]
            hosts = ",".join(f"127.0.0.1:{one.port}" for one in self.sentinels)
            self.url = f"redis+sentinel://{hosts}/{SERVICE}/0"
            self.wait_ready()
            self._stack = stack.pop_all()

    def ask(self, *command: Any) -> Any:
        """What the last of the Sentinels answers; the first may be hurt."""
        return raw(self.sentinels[-1], "SENTINEL", *command)

    def master_port(self) -> int:
        return int(self.ask("GET-MASTER-ADDR-BY-NAME", SERVICE)[1])

    def wait_ready(self) -> None:
        """Until the replica follows, and all Sentinels know it and each other: else they could not agree."""

        def ready() -> bool:
            seen = [
                dict(zip(found[::2], found[1::2], strict=True))
                for found in (raw(one, "SENTINEL", "MASTER", SERVICE) for one in self.sentinels)
            ]
            with self.second.client() as client:
                following = client.info("replication").get("master_link_status") == "up"
            return following and all(
                int(one[b"num-slaves"]) == 1 and int(one[b"num-other-sentinels"]) == len(self.sentinels) - 1
                for one in seen
            )

        eventually(ready, PATIENCE)

    def fail_over(self) -> None:
        """Has them change places, both living; returns when the Sentinels say so."""
        before = self.master_port()

        def asked() -> bool:
            with contextlib.suppress(redis.ResponseError):  # one is under way, or the replica is not good yet
                self.ask("FAILOVER", SERVICE)
                return True
            return False

        eventually(asked, PATIENCE)
        eventually(lambda: self.master_port() != before, PATIENCE)

    def close(self) -> None:
        self._stack.close()


class Cluster:
    """Three servers with data, of which the first has all slots but two, and a replica of that."""

    def __init__(self, folder: Path, **options: str | int) -> None:
        self._stack = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.nodes = [
                stack.enter_context(contextlib.closing(_node(folder / f"node-{number}", **options).start()))
                for number in range(4)
            ]
            self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes[:3])
            self._join()
            self._stack = stack.pop_all()

    def _join(self) -> None:
        first = self.nodes[0]
        for node in self.nodes[1:]:
            raw(node, "CLUSTER", "MEET", "127.0.0.1", first.port, first.options["cluster-port"])
        for node, slots in zip(self.nodes, ((0, 16381), (16382, 16382), (16383, 16383)), strict=False):
            raw(node, "CLUSTER", "ADDSLOTSRANGE", *slots)
        for epoch, node in enumerate(self.nodes, 1):
            with contextlib.suppress(redis.ResponseError):  # it has one by now
                raw(node, "CLUSTER", "SET-CONFIG-EPOCH", epoch)
        # Only whom it knows can a replica follow.
        eventually(lambda: all(self.known(node) == 4 for node in self.nodes), PATIENCE)
        raw(self.nodes[3], "CLUSTER", "REPLICATE", self.id_of(first))
        self.wait_ready()

    def known(self, node: OwnServer) -> int:
        return int(_info(node)["cluster_known_nodes"])

    def id_of(self, node: OwnServer) -> str:
        found: bytes = raw(node, "CLUSTER", "MYID")
        return found.decode()

    def wait_ready(self) -> None:
        """Until all say that the cluster is whole, and the replica follows."""

        def ready() -> bool:
            with self.nodes[3].client() as client:
                following = client.info("replication").get("master_link_status") == "up"
            return following and all(_info(node)["cluster_state"] == "ok" for node in self.nodes)

        eventually(ready, PATIENCE)

    def fail_over(self) -> None:
        """Has the replica take over from the first, both living."""
        raw(self.nodes[3], "CLUSTER", "FAILOVER")
        eventually(lambda: self.is_master(self.nodes[3]), PATIENCE)

    def is_master(self, node: OwnServer) -> bool:
        with node.client() as client:
            return client.info("replication")["role"] == "master"

    def close(self) -> None:
        self._stack.close()


def _node(folder: Path, **options: str | int) -> OwnServer:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return OwnServer(
        folder,
        cluster_enabled="yes",
        cluster_config_file="nodes.conf",
        cluster_node_timeout=1500,
        cluster_port=port,
        repl_diskless_sync_delay=0,
        **options,
    )


def raw(server: OwnServer, *command: Any) -> Any:
    """The answer to a command as the server gave it."""
    connection = redis.Connection(port=server.port, protocol=2, socket_timeout=10)
    try:
        connection.send_command(*command)
        return connection.read_response()
    finally:
        connection.disconnect()


def _info(server: OwnServer) -> dict[str, str]:
    text = raw(server, "CLUSTER", "INFO").decode()
    return dict(line.split(":", 1) for line in text.split("\r\n") if ":" in line)
