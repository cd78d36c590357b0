"""mlqueue, as a user would write it: no option on the actor."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import mlqueue

name = "mlqueue"
mlq = mlqueue.MLQ("bench", url=os.environ["BENCH_URL"])


@mlq.actor
def noop(x: int) -> int:
    return x


@mlq.actor
def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


@mlq.actor
def sleep(seconds: float) -> None:
    time.sleep(seconds)


def submit(n: int) -> None:
    for i in range(n):
        noop.submit(i)


def submit_many(n: int) -> None:
    noop.submit_many([(i,) for i in range(n)])


def submit_url(n: int) -> None:
    for i in range(n):
        fetch.submit(f"https://example.org/images/2026/11/{i:08d}.jpg", {"width": 224, "height": 224, "crop": True})


def one() -> None:
    noop.submit(1).result(timeout=60)


def occupy(seconds: float, n: int) -> None:
    for _ in range(n):
        sleep.submit(seconds)


def remaining(client: Any) -> int:
    root = mlq.store.root
    waiting = client.zcard(f"{root}:s:q:default:noop") + client.zcard(f"{root}:s:q:default:fetch")
    return int(waiting or sum(len(worker.jobs) for worker in mlq.store.workers()))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.systems.ours"]
    return [*command, "--processes", str(processes), "--threads", str(threads)]
