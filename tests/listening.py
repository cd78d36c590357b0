"""For tests of MLQ's listeners: an app whose listener needs no helper process, and programs that listen."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator

from support import eventually
from worker_processes import ROOT, Site

from mlqueue import MLQ


@contextlib.contextmanager
def listening(app: MLQ) -> Iterator[MLQ]:
    """An app whose listener starts no helper process, which most tests would only wait for, and is gone at the end."""
    app.broker.supervise(uuid.uuid4().hex)
    try:
        yield app
    finally:
        app.shutdown()
        assert app.join(15)


def _heed_ctrl_c() -> None:
    """In the process to be: tests that a shell runs in the background inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Program:
    """A program of a user's in a process of its own, for the namespace of a site."""

    def __init__(self, site: Site, text: str) -> None:
        path = site.folder / f"program_{uuid.uuid4().hex[:6]}.py"
        path.write_text(text)
        self._log = path.with_suffix(".log")
        more = {"MLQUEUE_NAMESPACE": site.namespace, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        with self._log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(path)],
                cwd=site.folder,
                env=site.environment | more,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_heed_ctrl_c,
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def says(self, text: str, timeout: float = 15.0) -> None:
        """Waits until it has printed a text."""
        eventually(lambda: text in self.log() or self.process.poll() is not None, timeout)
        assert text in self.log(), self.log()

    def send(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def ends(self, timeout: float = 15.0) -> int:
        """Waits until it has ended; its exit code."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it has not ended:\n{self.log()}") from None

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
