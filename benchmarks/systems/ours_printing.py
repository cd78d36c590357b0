"""mlqueue, with jobs that print a line and log a message as those of `ours_showing` do, of which nothing is kept."""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import mlqueue

name = "mlqueue, printing"
mlq = mlqueue.MLQ("bench-printing", settings=mlqueue.Settings.load(url=os.environ["BENCH_URL"], job_logs=None))
log = logging.getLogger("bench")


@mlq.actor
def noop(x: int) -> int:
    print("job", x)
    log.warning("job %d", x)
    return x


def submit_many(n: int) -> None:
    noop.submit_many([(i,) for i in range(n)])


def remaining(client: Any) -> int:
    waiting = client.zcard(f"{mlq.store.root}:s:q:default:noop")
    return int(waiting or sum(len(worker.jobs) for worker in mlq.store.workers()))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.systems.ours_printing"]
    return [*command, "--processes", str(processes), "--threads", str(threads)]
