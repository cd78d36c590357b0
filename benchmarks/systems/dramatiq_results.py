"""Dramatiq with its Redis broker and results, at its defaults."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

name = "Dramatiq + Results"
broker = RedisBroker(url=os.environ["BENCH_URL"])
broker.add_middleware(Results(backend=RedisBackend(url=os.environ["BENCH_URL"]), store_results=True))
dramatiq.set_broker(broker)


@dramatiq.actor
def noop(x: int) -> int:
    return x


@dramatiq.actor
def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


@dramatiq.actor
def sleep(seconds: float) -> None:
    time.sleep(seconds)


def submit(n: int) -> None:
    for i in range(n):
        noop.send(i)


submit_many = None


def submit_url(n: int) -> None:
    for i in range(n):
        fetch.send(f"https://example.org/images/2026/11/{i:08d}.jpg", {"width": 224, "height": 224, "crop": True})


def one() -> None:
    noop.send(1).get_result(block=True, timeout=60_000)


def occupy(seconds: float, n: int) -> None:
    for _ in range(n):
        sleep.send(seconds)


def remaining(client: Any) -> int:
    return int(client.hlen("dramatiq:default.msgs"))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "dramatiq", "benchmarks.systems.dramatiq_results"]
    return [*command, "-p", str(processes), "-t", str(threads)]
