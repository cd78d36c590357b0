"""Fixtures: one real server for the session, a namespace for each test, and a look for what tests leave behind."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
import time
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path

import dramatiq
import pytest
from support import StartWorker, children, fresh_app

from mlqueue import MLQ, Settings
from mlqueue.testing import temporary_server

#: How long what a test has stopped may take to be gone, in seconds.
PATIENCE = 5.0

#: Threads that end by themselves when nobody has needed them for a while.
LINGERING = ("mlqueue-time-limit",)


# A shell has what it runs in the background ignore Ctrl-C, and so would every process that a test starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Where tests run in several processes each has a server of its own: some kill its connections, or fill its memory.
if os.environ.get("TEST_URLS"):
    urls = os.environ["TEST_URLS"].split()
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.environ["MLQUEUE_URL"] = urls[number % len(urls)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What was logged may hold a text that is no Unicode, but only that goes between the processes."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def server() -> Iterator[Settings]:
    """Settings for the server of the session: that of MLQUEUE_URL where it is set, else an embedded one."""
    url = os.environ.get("MLQUEUE_URL")
    if url:
        yield Settings.load({}, url=url)
        return
    with temporary_server() as settings:
        yield settings


@pytest.fixture
def mlq(server: Settings) -> Iterator[MLQ]:
    """An app with a namespace that no other test has."""
    with fresh_app(server) as app:
        yield app


@pytest.fixture
def start_worker(mlq: MLQ) -> Iterator[StartWorker]:
    """Starts workers in this process, which are stopped at the end. They have no helper process unless asked for."""
    workers: list[dramatiq.Worker] = []

    def start(
        app: MLQ = mlq, *, threads: int = 2, queues: set[str] | None = None, helper: bool = False
    ) -> dramatiq.Worker:
        if not helper:
            app.broker.supervise(uuid.uuid4().hex)
        worker = dramatiq.Worker(app.broker, worker_threads=threads, queues=queues)
        worker.start()
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if worker.broker.worker is worker:  # type: ignore[attr-defined]
            worker.stop(timeout=10_000)


@pytest.fixture
def worker(mlq: MLQ, start_worker: StartWorker) -> dramatiq.Worker:
    """A worker with two threads, for the actors that the test declares on `mlq`."""
    return start_worker()


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(LINGERING)}


def sockets() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:"):
                found.add(target)
    return found


@pytest.fixture(autouse=True)
def no_global_broker(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test's first app is Dramatiq's global broker, whatever tests before it have made."""
    monkeypatch.setattr(dramatiq.broker, "global_broker", None)


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fails a test after which there is a thread, a child process or a socket that was not there before."""
    before = threads(), children(), sockets()
    yield
    deadline = time.monotonic() + PATIENCE
    while True:
        gc.collect(0)
        left = threads() - before[0], children() - before[1], sockets() - before[2]
        if not any(left):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"left behind: threads {left[0]}, processes {left[1]}, sockets {left[2]}")
        gc.collect()
        threading.Event().wait(0.02)
