"""mlqueue, with jobs that show something of themselves: each prints a line, logs a message and two metrics."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import mlqueue

name = "mlqueue, showing"
mlq = mlqueue.MLQ("bench-showing", url=os.environ["BENCH_URL"])
log = logging.getLogger("bench")


@mlq.actor
def noop(x: int) -> int:
    print("job", x)
    log.warning("job %d", x)
    mlqueue.current_job().log_metrics(x, loss=0.5, accuracy=0.9)
    return x


def submit_many(n: int) -> None:
    noop.submit_many([(i,) for i in range(n)])


def remaining(client: Any) -> int:
    waiting = client.zcard(f"{mlq.store.root}:s:q:default:noop")
    return int(waiting or sum(len(worker.jobs) for worker in mlq.store.workers()))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.systems.ours_showing"]
    return [*command, "--processes", str(processes), "--threads", str(threads)]
