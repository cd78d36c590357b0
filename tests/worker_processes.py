"""For tests of worker processes: a throw-away store, a supervisor in a process of its own, and what its jobs do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import dramatiq
import dramatiq.broker

from mlqueue import MLQ, Settings

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent

#: What the user's module of these tests holds. Each start and end of a job is a line of the file `events`.
MODULE = '''
import ctypes, json, os, pathlib, signal, time
import mlqueue

mlq = mlqueue.MLQ({namespace!r})
EVENTS = pathlib.Path(__file__).with_name("events")


def tell(event, **more):
    job = mlqueue.current_job()
    line = json.dumps(dict(event=event, job=job.id, attempt=job.attempt, pid=os.getpid(), at=time.time(), **more))
    fd = os.open(EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, line.encode() + b"\\n")
    os.close(fd)


@mlq.actor(max_retries=0)
def work(seconds=0.0):
    tell("start")
    time.sleep(seconds)
    tell("end")
    return os.getpid()


@mlq.actor(max_retries=0)
def first_waits(seconds):
    """Its first attempt takes long, later ones no time."""
    tell("start")
    time.sleep(seconds if mlqueue.current_job().attempt == 1 else 0)
    tell("end")
    return mlqueue.current_job().attempt


@mlq.actor(max_retries=0)
def holds_gil(seconds):
    tell("start")
    ctypes.PyDLL(None).sleep(seconds)
    tell("end")


@mlq.actor(max_retries=0)
def poison(how="kill"):
    tell("start")
    if how == "exit":
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


@mlq.actor(max_retries=0)
def patient():
    """Works until its worker is stopped."""
    tell("start")
    while not mlqueue.current_job().stopping:
        time.sleep(0.01)
    tell("stopping")


@mlq.actor(max_retries=0)
def grows(size):
    tell("start")
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])
    time.sleep(1.5)
    tell("end")


@mlq.actor(max_retries=0)
def forks():
    """Forks a process and ends it as multiprocessing does."""
    tell("start")
    pid = os.fork()
    if pid == 0:
        while True:
            time.sleep(1)
    time.sleep(0.1)
    os.kill(pid, signal.SIGTERM)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
'''

PROGRAM = """
import logging, sys
sys.path.append({root!r})
from mlqueue import Settings
from mlqueue.supervisor import Supervisor
logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s: %(message)s")
sys.exit(Supervisor({modules!r}, Settings.load(), **{options!r}).run())
"""


def wait_for(condition: Callable[[], T], timeout: float = 10.0, what: Callable[[], str] = lambda: "") -> T:
    """What `condition` gives, as soon as it gives something true."""
    deadline = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < deadline, f"not within {timeout} s: {what()}"
        time.sleep(0.01)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    try:
        return "Z" not in subprocess.check_output(["ps", "-o", "state=", "-p", str(pid)], text=True)
    except subprocess.CalledProcessError:
        return False


class Site:
    """A user's folder with a module of jobs, a namespace of its own, and supervisors running there."""

    def __init__(self, folder: Path, server: Settings, **settings: Any) -> None:
        self.folder = folder
        self.namespace = settings.pop("namespace", f"test-{uuid.uuid4().hex[:8]}")
        #: All of it, as the processes have it.
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("MLQUEUE_") and name != "REDIS_URL"
        }
        given = {"url": server.url} if server.url else {"home": server.home}
        self.environment |= {f"MLQUEUE_{name.upper()}": str(value) for name, value in (given | settings).items()}
        self._global_broker = dramatiq.broker.global_broker
        self.mlq = MLQ(self.namespace, settings=Settings.load(self.environment))
        (folder / "jobs.py").write_text(MODULE.format(namespace=self.namespace))
        self._running: list[subprocess.Popen[bytes]] = []

    def supervise(self, *modules: str, ready: bool = True, **options: Any) -> Supervised:
        """Starts a supervisor, and waits until its children work."""
        log = self.folder / f"log-{len(self._running)}"
        program = PROGRAM.format(root=str(ROOT), modules=list(modules) or ["jobs"], options=options)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-c", program],
                cwd=self.folder,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._running.append(process)
        supervised = Supervised(process, log)
        if ready:
            supervised.wait_ready(options.get("processes", 1))
        return supervised

    def submit(self, actor: str, *args: Any, **kwargs: Any) -> Any:
        return self.mlq.submit(actor, *args, **kwargs)

    def record(self, job: Any) -> Any:
        return self.mlq.store.record(job.id)

    def events(self, job: Any = None, event: str | None = None) -> list[dict[str, Any]]:
        """What jobs have told, oldest first."""
        path = self.folder / "events"
        lines = path.read_bytes().splitlines() if path.exists() else []
        told = [json.loads(line) for line in lines]
        return [
            item
            for item in told
            if (job is None or item["job"] == job.id) and (event is None or item["event"] == event)
        ]

    def wait_started(self, *jobs: Any, attempt: int = 1, timeout: float = 10.0) -> list[dict[str, Any]]:
        """Waits until each job has started so often; the events."""

        def found() -> list[dict[str, Any]]:
            starts = {item["job"]: item for item in self.events(event="start") if item["attempt"] == attempt}
            return [starts[job.id] for job in jobs] if all(job.id in starts for job in jobs) else []

        return wait_for(found, timeout, self.logs)

    def logs(self) -> str:
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("log-*")))

    def close(self) -> None:
        for process in self._running:
            if process.poll() is None:
                process.kill()
            process.wait()
        for key in self.mlq.client.scan_iter(f"{self.mlq.store.root}:*", count=1000):
            self.mlq.client.unlink(key)
        self.mlq.close()
        dramatiq.broker.global_broker = self._global_broker


class Supervised:
    """A supervisor's process."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log_path = log

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log().splitlines() if text in line]

    def ready_pids(self) -> list[int]:
        return [int(line.rpartition("pid ")[2].rstrip(")")) for line in self.lines(" is ready after ")]

    def wait_ready(self, count: int, timeout: float = 15.0) -> list[int]:
        wait_for(lambda: len(self.ready_pids()) >= count, timeout, self.log)
        return self.ready_pids()

    def wait_line(self, text: str, timeout: float = 10.0) -> str:
        return wait_for(lambda: self.lines(text), timeout, self.log)[0]

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def wait(self, timeout: float = 10.0) -> int:
        wait_for(lambda: self.process.poll() is not None, timeout, self.log)
        return self.process.returncode

    def stop(self, codes: Sequence[int] = (0,)) -> None:
        self.signal(signal.SIGTERM)
        assert self.wait() in codes, self.log()
