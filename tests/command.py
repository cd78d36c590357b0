"""The command in a folder with an embedded server of its own, as tests call it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from mlqueue.cli import main
from mlqueue.embedded import EmbeddedServer

ROOT = Path(__file__).parent.parent

#: Seconds that anything here may take.
DEADLINE = 20.0


class Ran(NamedTuple):
    """How a call of the command went."""

    code: int
    out: bytes
    err: str

    @property
    def text(self) -> str:
        return self.out.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> Any:
        return json.loads(self.err.splitlines()[-1])["error"]


class Folder:
    """A folder with an embedded server of its own, and the command in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / ".mlqueue"
        kept = {name: text for name, text in os.environ.items() if not name.startswith(("MLQUEUE_", "REDIS_URL"))}
        self.environ = kept | {
            "MLQUEUE_HOME": str(self.home),
            "MLQUEUE_SERVER_GRACE": "20",
            "PYTHONPATH": str(ROOT),
            "COLUMNS": "100",
            "TERM": "xterm",
        }

    def spawn(self, *args: str, **options: Any) -> subprocess.Popen[bytes]:
        """The command as a process."""
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        # Unbuffered, so that a line can be read first and the rest by communicate().
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "mlqueue", *args],
            cwd=self.path,
            env=self.environ,
            bufsize=0,
            **streams,
        )

    def process(self, *args: str, stdin: bytes = b"") -> Ran:
        """Runs the command as a process."""
        process = self.spawn(*args, stdin=subprocess.PIPE)
        out, err = process.communicate(stdin, timeout=DEADLINE)
        return Ran(process.returncode, out, err.decode())

    def __call__(self, *args: str) -> Ran:
        """Runs the command in this process: where a process of its own would add nothing."""
        out, err = io.TextIOWrapper(io.BytesIO(), "utf-8"), io.TextIOWrapper(io.BytesIO(), "utf-8")
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            for name in [name for name in os.environ if name.startswith(("MLQUEUE_", "REDIS_URL"))]:
                patch.delenv(name)
            for name, value in self.environ.items():
                patch.setenv(name, value)
            patch.chdir(self.path)
            code = main(args)
            out.flush()
            err.flush()
        return Ran(code, out.buffer.getvalue(), err.buffer.getvalue().decode())  # type: ignore[attr-defined]

    def submit(self, *args: str) -> str:
        """Submits a job; its id."""
        ran = self("submit", *args)
        assert (0, 1) == (ran.code, len(ran.text.split())), ran
        return ran.text.strip()

    def close(self) -> None:
        """Stops the server, if one runs."""
        EmbeddedServer(self.home).stop()


@contextlib.contextmanager
def a_folder() -> Iterator[Folder]:
    """A new folder, in which no server runs yet."""
    with tempfile.TemporaryDirectory(prefix="mlq-cli-") as path:
        folder = Folder(Path(path))
        try:
            yield folder
        finally:
            folder.close()
