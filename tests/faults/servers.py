"""A server of the test's own, that may be stopped, killed, filled up and made read-only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import redis

from mlqueue.embedded import find_binary

#: How long a server may take to start or to end, in seconds.
PATIENCE = 30.0


class OwnServer:
    """A server with an append-only file in `folder`; `options` are further ones of its command line."""

    def __init__(self, folder: Path, **options: str | int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.options: dict[str, str | int] = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": str(folder),
            "save": "",
            "appendonly": "yes",
            # With "everysec" a kill -9 may lose what was acknowledged while the disk was slow.
            "appendfsync": "always",
            "maxmemory-policy": "noeviction",
        }
        self.options |= {name.replace("_", "-"): value for name, value in options.items()}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> OwnServer:
        """Returns when it answers."""
        command = self.command()
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return self
            except redis.RedisError:
                assert self._process.poll() is None, (self.folder / "log").read_text()
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.01)

    def command(self) -> list[str]:
        command = [str(find_binary(os.environ.get("MLQUEUE_SERVER_BIN"))[0])]
        for name, value in self.options.items():
            command += [f"--{name}", str(value)]
        return command

    def client(self) -> redis.Redis:
        return redis.Redis(port=self.port, socket_timeout=10)

    def signal(self, signum: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(signum)

    def end(self, signum: signal.Signals) -> None:
        """Sends the signal, and waits until it has ended."""
        self.signal(signum)
        assert self._process is not None
        self._process.wait(PATIENCE)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.end(signal.SIGKILL)
