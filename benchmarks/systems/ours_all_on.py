"""mlqueue with limits, logs and metrics on: the jobs need slots, of which there are enough, their
logs and metrics are kept and what they use is measured; the jobs are as those of `ours`, and show nothing."""

from __future__ import annotations

import os
import sys
from typing import Any

import mlqueue

name = "mlqueue, all on"
mlq = mlqueue.MLQ("bench-all-on", settings=mlqueue.Settings.load(url=os.environ["BENCH_URL"], limits="gpu=64"))


@mlq.actor(resources={"gpu": 1})
def noop(x: int) -> int:
    return x


def submit_many(n: int) -> None:
    noop.submit_many([(i,) for i in range(n)])


def remaining(client: Any) -> int:
    waiting = client.zcard(f"{mlq.store.root}:s:q:default:noop")
    return int(waiting or sum(len(worker.jobs) for worker in mlq.store.workers()))


def command(processes: int, threads: int) -> list[str]:
    command = [sys.executable, "-m", "mlqueue", "worker", "benchmarks.systems.ours_all_on"]
    return [*command, "--processes", str(processes), "--threads", str(threads)]
