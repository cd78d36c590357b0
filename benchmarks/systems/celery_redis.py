"""Celery with Redis as broker and result backend, at its defaults."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from celery import Celery

name = "Celery"
#: It drains so slowly that fewer jobs show its rate as well.
share = 0.2
app = Celery("bench", broker=os.environ["BENCH_URL"], backend=os.environ["BENCH_URL"])


@app.task
def noop(x: int) -> int:
    return x


@app.task
def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


@app.task
def sleep(seconds: float) -> None:
    time.sleep(seconds)


def submit(n: int) -> None:
    for i in range(n):
        noop.delay(i)


submit_many = None


def submit_url(n: int) -> None:
    for i in range(n):
        fetch.delay(f"https://example.org/images/2026/11/{i:08d}.jpg", {"width": 224, "height": 224, "crop": True})


def one() -> None:
    noop.delay(1).get(timeout=60)


occupy = None


def remaining(client: Any) -> int:
    return int(client.llen("celery") + client.hlen("unacked"))


def command(processes: int, threads: int) -> list[str]:
    # Its processes have one thread each; as many run as the others have threads in all would only slow it down.
    command = [sys.executable, "-m", "celery", "-A", "benchmarks.systems.celery_redis", "worker"]
    return [*command, "-c", str(processes), "--loglevel", "ERROR"]
