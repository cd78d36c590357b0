"""Huey with Redis and results, at its defaults but for the number of workers (it pops a job before it runs it)."""

from __future__ import annotations

import os
import sys
from typing import Any

from huey import RedisHuey

name = "Huey"
huey = RedisHuey("bench", url=os.environ["BENCH_URL"])


@huey.task()
def noop(x: int) -> int:
    return x


@huey.task()
def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


def submit(n: int) -> None:
    for i in range(n):
        noop(i)


submit_many = None


def submit_url(n: int) -> None:
    for i in range(n):
        fetch(f"https://example.org/images/2026/11/{i:08d}.jpg", {"width": 224, "height": 224, "crop": True})


def one() -> None:
    noop(1).get(blocking=True, timeout=60)


occupy = None


def remaining(client: Any) -> int:
    return int(client.llen("huey.redis.bench"))


def command(processes: int, threads: int) -> list[str]:
    # One consumer process with threads: it has no supervisor for several; two run in one shell command.
    one = f"{sys.executable} -m huey.bin.huey_consumer benchmarks.systems.huey_redis.huey -w {threads} -k thread -q"
    return ["bash", "-c", "trap 'kill $(jobs -p); wait' TERM; " + f"{one} & " * processes + "wait"]
