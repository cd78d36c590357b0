"""Taskiq with its Redis stream broker and results."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

name = "Taskiq"
URL = os.environ["BENCH_URL"]
broker = RedisStreamBroker(url=URL, consumer_id="0").with_result_backend(RedisAsyncResultBackend(redis_url=URL))
_loop: asyncio.AbstractEventLoop | None = None


@broker.task
def noop(x: int) -> int:
    return x


@broker.task
def fetch(url: str, options: dict[str, Any]) -> int:
    return len(url)


def run(coroutine: Any) -> Any:
    global _loop
    if _loop is None:
        _loop = asyncio.new_event_loop()
        _loop.run_until_complete(broker.startup())
    return _loop.run_until_complete(coroutine)


async def _submit(n: int) -> None:
    for i in range(n):
        await noop.kiq(i)


def submit(n: int) -> None:
    run(_submit(n))


submit_many = None


async def _submit_url(n: int) -> None:
    for i in range(n):
        url = f"https://example.org/images/2026/11/{i:08d}.jpg"
        await fetch.kiq(url, {"width": 224, "height": 224, "crop": True})


def submit_url(n: int) -> None:
    run(_submit_url(n))


async def _one() -> None:
    task = await noop.kiq(1)
    await task.wait_result(check_interval=0.0005, timeout=60)


def one() -> None:
    run(_one())


occupy = None


def remaining(client: Any) -> int:
    groups = client.xinfo_groups("taskiq") if client.exists("taskiq") else []
    return int(sum(group["lag"] + group["pending"] for group in groups)) if groups else int(client.xlen("taskiq"))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "taskiq", "worker", "benchmarks.systems.taskiq_redis:broker"]
    return [*command, "-w", str(processes), "--max-threadpool-threads", str(threads), "--log-level", "ERROR"]
