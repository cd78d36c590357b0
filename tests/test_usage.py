"""What attempts use, when a waiting job will start, and how a job is shown in a notebook."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from support import StartWorker, eventually
from worker_processes import Site

from mlqueue import MLQ, Settings, State, current_job
from mlqueue.estimate import start_of
from mlqueue.store.store import BusyWorker, Waiting
from mlqueue.testing import drain

MIB = 2**20


def spin(seconds: float) -> None:
    """Uses so much processor time, in this thread."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass


# Use


def test_a_job_that_runs_alone_is_measured_with_its_threads(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def work() -> None:
        thread = threading.Thread(target=spin, args=(0.15,))
        thread.start()
        spin(0.15)
        thread.join()
        block = bytearray(64 * MIB)
        block[::4096] = b"x" * len(block[::4096])
        del block
        time.sleep(0.05)

    @mlq.actor
    def light() -> None:
        time.sleep(0.35)

    start_worker(threads=1)
    jobs = [light.submit(), work.submit(), light.submit()]
    assert all(job.wait(20) for job in jobs)
    before, heavy, after = (job.record.usage for job in jobs)
    assert before is not None
    assert heavy is not None
    assert after is not None
    assert heavy.alone
    assert 0.29 < (heavy.cpu_seconds or 0) < 3
    assert 0 < (after.peak_memory or 0) < (heavy.peak_memory or 0)
    assert 60 * MIB < (heavy.peak_memory or 0) - (before.peak_memory or 0)
    assert heavy.gpu_memory is None


def test_of_jobs_beside_each_other_each_has_the_time_of_its_thread(mlq: MLQ, start_worker: StartWorker) -> None:
    barrier = threading.Barrier(3)

    @mlq.actor
    def work(seconds: float) -> None:
        barrier.wait(10)
        spin(seconds)
        barrier.wait(10)

    @mlq.actor
    async def coroutine() -> None:
        await asyncio.to_thread(barrier.wait, 10)
        await asyncio.to_thread(barrier.wait, 10)

    start_worker(threads=3)
    jobs = [work.submit(0.2), work.submit(0.01), coroutine.submit()]
    assert all(job.wait(20) for job in jobs)
    busy, idle, other = (job.record.usage for job in jobs)
    assert busy is not None
    assert idle is not None
    assert other is not None
    assert [False] * 3 == [busy.alone, idle.alone, other.alone]
    assert 0.19 < (busy.cpu_seconds or 0) < 2
    assert (idle.cpu_seconds or 0) < 0.15
    assert other.cpu_seconds is None


def test_short_jobs_are_not_measured(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        pass

    job = work.submit()
    drain(mlq)
    assert job.record.usage is None


def test_attempts_that_fail_have_their_own(mlq: MLQ) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> None:
        if current_job().attempt == 1:
            spin(0.3)
            raise ValueError
        time.sleep(0.15)

    job = work.submit()
    drain(mlq)
    record = job.record
    [first] = record.attempts
    assert first.usage is not None
    assert record.usage is not None
    assert 0.25 < (first.usage.cpu_seconds or 0)
    assert (record.usage.cpu_seconds or 0) < 0.25


class FakeNvml(ModuleType):
    """As much of nvidia-ml-py as is used."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.used = [100 * MIB, 300 * MIB, 200 * MIB]

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetComputeRunningProcesses(self, handle: int) -> list[SimpleNamespace]:
        if handle == 1:
            raise self.NVMLError("no permission")
        used = self.used.pop(0) if len(self.used) > 1 else self.used[0]
        return [
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=used),
            SimpleNamespace(pid=os.getpid(), usedGpuMemory=None),
            SimpleNamespace(pid=1, usedGpuMemory=900 * MIB),
        ]


def test_the_memory_of_gpus_is_on_the_record_where_the_driver_says_it(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeNvml()
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr("mlqueue.usage.LOOK", 0.02)
    monkeypatch.setattr("mlqueue.usage.LOOK_AT_GPUS", 0.02)

    @mlq.actor
    def work() -> None:
        eventually(lambda: len(fake.used) == 1)
        time.sleep(0.1)

    start_worker(threads=1)
    job = work.submit()
    assert job.wait(20)
    usage = job.record.usage
    assert usage is not None
    assert 300 * MIB == usage.gpu_memory


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[Site]:
    found = Site(tmp_path, server)
    yield found
    found.close()


SHOWING = """
import os, signal, time
import mlqueue
from jobs import mlq, tell


@mlq.actor(max_retries=0, max_crashes=1)
def shows():
    job = mlqueue.current_job()
    if job.attempt > 1:
        return
    for step in range(1000):
        print("step", step)
        job.log_metrics(step, loss=1 / (1 + step))
        if step == 0:
            tell("start")
        time.sleep(0.01)
"""


def test_a_worker_that_is_killed_takes_the_last_second_with_it_and_no_more(site: Site) -> None:
    (site.folder / "showing.py").write_text(SHOWING)
    site.supervise("showing", threads=1)
    job = site.submit("shows")
    [started] = site.wait_started(job)
    handle = site.mlq.job(job.id)
    eventually(lambda: handle.record.usage)
    steps = [point.step for point in handle.metrics()["loss"]]
    os.kill(started["pid"], signal.SIGKILL)
    killed_at = time.time()
    eventually(lambda: handle.record.crashes == 1 and handle.done)
    points, lines = handle.metrics()["loss"], [line for line in handle.logs() if line.attempt == 1]
    assert len(steps) <= len(points)
    assert killed_at - points[-1].at < 1
    assert killed_at - lines[-1].at < 1
    assert [f"step {n}" for n in range(len(lines))] == [line.text for line in lines]
    [attempt] = handle.record.attempts
    assert attempt.usage is not None
    assert (attempt.usage.peak_memory or 0) > MIB


# When it starts


def worker(threads: int, *jobs: tuple[str, float], queues: tuple[str, ...] = ("q",), actors: str = "ab") -> BusyWorker:
    return BusyWorker({"threads": threads, "queues": list(queues), "actors": list(actors)}, list(jobs))


MEANS = {"a": 10.0, "b": 4.0}


@pytest.mark.parametrize(
    ("ahead", "workers", "wait"),
    [
        ({}, [], None),
        ({}, [worker(2, queues=("other",))], None),
        ({}, [worker(2, actors="b")], None),
        ({}, [worker(2)], 0),
        ({"a": 1}, [worker(2)], 0),
        ({"a": 2}, [worker(2)], 10.0),
        ({"a": 2, "b": 3}, [worker(1), worker(3)], 8.0),
        ({"a": 2, "unknown": 3}, [worker(1)], 20.0),
        ({}, [worker(1, ("a", 94.0))], 4.0),
        ({}, [worker(1, ("b", 50.0))], 0.0),
        ({"b": 1}, [worker(2, ("a", 94.0), ("b", 98.0))], 5.0),
        ({"c": 1}, [worker(1, actors="abc")], None),
        ({}, [worker(1, ("c", 94.0), actors="abc")], None),
    ],
)
def test_the_start_is_estimated_from_the_jobs_ahead_and_the_places(
    ahead: dict[str, int], workers: list[BusyWorker], wait: float | None
) -> None:
    waiting = Waiting(State.QUEUED, 0.0, 100.0, "q", "a", ahead, workers, MEANS)
    assert (None if wait is None else 100.0 + wait) == start_of(waiting)


def test_a_scheduled_job_starts_when_it_is_due_and_others_have_started(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        pass

    job = work.with_options(delay=3600).submit()
    assert abs((job.estimated_start or 0) - time.time() - 3600) < 60
    job.cancel()
    assert job.estimated_start is None


def test_the_estimate_is_near_the_truth(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor
    def work() -> None:
        time.sleep(0.2)

    start_worker(threads=2)
    assert all(job.wait(10) for job in [work.submit() for _ in range(4)])
    jobs = [work.submit() for _ in range(9)]
    eventually(lambda: jobs[1].state is State.RUNNING)
    assert jobs[0].estimated_start is None
    estimated = jobs[8].estimated_start
    assert jobs[8].wait(10)
    assert estimated is not None
    assert abs(estimated - (jobs[8].record.started_at or 0)) < 0.5
