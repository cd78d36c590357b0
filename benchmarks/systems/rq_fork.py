"""RQ at its defaults: a fork for each job."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import redis
import rq

name = "RQ"
#: It drains so slowly that fewer jobs show its rate as well.
share = 0.05
queue = rq.Queue(connection=redis.Redis.from_url(os.environ["BENCH_URL"]))


def noop(x: int) -> int:
    return x


def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


def submit(n: int) -> None:
    for i in range(n):
        queue.enqueue("benchmarks.systems.rq_fork.noop", i)


submit_many = None


def submit_url(n: int) -> None:
    for i in range(n):
        url = f"https://example.org/images/2026/11/{i:08d}.jpg"
        queue.enqueue("benchmarks.systems.rq_fork.fetch", url, {"width": 224, "height": 224, "crop": True})


def one() -> None:
    job = queue.enqueue("benchmarks.systems.rq_fork.noop", 1)
    while job.latest_result(timeout=60) is None:
        time.sleep(0)


occupy = None


def remaining(client: Any) -> int:
    return int(client.llen("rq:queue:default") + client.zcard("rq:wip:default"))


def command(processes: int, threads: int) -> list[str]:
    # A process runs one job at a time, whatever `threads` says.
    url = os.environ["BENCH_URL"]
    return [sys.executable, "-m", "rq.cli", "worker-pool", "-u", url, "-n", str(processes), "--logging-level", "ERROR"]
