"""What the variants of mlqueue that are measured have in common: one actor, `noop`, under options or settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import mlqueue


def parts(
    mlq: mlqueue.MLQ, noop: Any, module: str
) -> tuple[Callable[[int], None], Callable[[Any], int], Callable[..., Any]]:
    """`submit_many`, `remaining` and `command` of a system (benchmarks/queue.py), for an actor of a module."""

    def submit_many(n: int) -> None:
        noop.submit_many([(i,) for i in range(n)])

    def remaining(client: Any) -> int:
        waiting = client.zcard(f"{mlq.store.root}:s:q:default:noop")
        return int(waiting or sum(len(worker.jobs) for worker in mlq.store.workers()))

    def command(processes: int, threads: int) -> list[str]:
        command = [sys.executable, "-m", "mlqueue", "worker", module]
        return [*command, "--processes", str(processes), "--threads", str(threads)]

    return submit_many, remaining, command
