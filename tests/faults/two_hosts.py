"""Two hosts on this one: network namespaces with a router between them, which can be cut and made slow. Needs root."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis
from harness import Fleet
from servers import OwnServer

from mlqueue import Settings

#: The addresses: of the first host, of the router on both sides, of the second host.
FIRST, ROUTER_A, ROUTER_B, SECOND = "10.213.1.1", "10.213.1.2", "10.213.2.2", "10.213.2.1"


class Unavailable(Exception):
    """Why there can be no two hosts here."""


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"`{' '.join(command)}`: {done.stderr.strip()}")


class TwoHosts:
    """`first` and `second` are the names of the namespaces; the router has one of its own."""

    def __init__(self) -> None:
        tag = secrets.token_hex(3)
        self.first, self.second, self.router = (f"mlq-{tag}-{name}" for name in ("first", "second", "router"))
        self._tag = tag

    def open(self) -> None:
        if os.geteuid() != 0:
            raise Unavailable("network namespaces need root")
        if shutil.which("ip") is None:
            raise Unavailable("there is no `ip` (iproute2)")
        for name in (self.first, self.second, self.router):
            run("ip", "netns", "add", name)
            self.within(name, "ip", "link", "set", "lo", "up")
        sides = ((self.first, "a", FIRST, ROUTER_A), (self.second, "b", SECOND, ROUTER_B))
        for host, side, address, router in sides:
            ends = f"m{self._tag}{side}", f"r{self._tag}{side}"
            run("ip", "link", "add", ends[0], "netns", host, "type", "veth", "peer", ends[1], "netns", self.router)
            for where, end, own in ((host, ends[0], address), (self.router, ends[1], router)):
                self.within(where, "ip", "address", "add", f"{own}/24", "dev", end)
                self.within(where, "ip", "link", "set", end, "up")
            self.within(host, "ip", "route", "add", "default", "via", router)
        self.heal()

    def within(self, host: str, *command: str) -> None:
        run("ip", "netns", "exec", host, *command)

    def heal(self) -> None:
        self._forward("1")

    def cut(self) -> None:
        """From now on every packet between the hosts is lost, and nobody is told."""
        self._forward("0")

    def _forward(self, value: str) -> None:
        self.within(self.router, "sh", "-c", f"echo {value} > /proc/sys/net/ipv4/ip_forward")

    def slow_down(self, rate: str) -> None:
        """Let through so much from the second host to the first, as ``40mbit``."""
        device = f"r{self._tag}a"
        self.within(
            self.router,
            "tc",
            "qdisc",
            "add",
            "dev",
            device,
            "root",
            "tbf",
            "rate",
            rate,
            "burst",
            "64kb",
            "latency",
            "50ms",
        )

    def close(self) -> None:
        for name in (self.first, self.second, self.router):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


class HostServer(OwnServer):
    """A store on the first host, which this process reaches by a socket in its folder."""

    def __init__(self, folder: Path, host: str) -> None:
        self.path = folder / "s"
        super().__init__(folder, bind=f"127.0.0.1 {FIRST}", protected_mode="no", unixsocket=self.path, appendfsync="no")
        self.host = host
        self.settings = Settings.load({}, url=f"unix://{self.path}")
        #: As processes of both hosts reach it.
        self.url = f"redis://{FIRST}:{self.port}/0"

    def command(self) -> list[str]:
        return ["ip", "netns", "exec", self.host, *super().command()]

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.path), socket_timeout=10)


class FleetOfTwo(Fleet):
    """A fleet whose processes run on the host that `host` names when they are started."""

    def __init__(self, folder: Path, server: HostServer, **options: Any) -> None:
        super().__init__(folder, server.settings, **options)
        self.environment["MLQUEUE_URL"] = server.url
        self.host = server.host
        self.port = server.port

    def _popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            ["ip", "netns", "exec", self.host, sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

    @contextlib.contextmanager
    def on(self, host: str) -> Iterator[None]:
        before, self.host = self.host, host
        try:
            yield
        finally:
            self.host = before


def connections(pid: int, *ports: int) -> list[str]:
    """The TCP connections of a process's namespace that are established, but for those with one of these ports."""
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, ours, theirs, state, *_ = line.split()
        if state == "01" and not {int(end.rpartition(":")[2], 16) for end in (ours, theirs)} & set(ports):
            found.append(line)
    return found
