"""mlqueue with limits, logs and metrics on: the jobs need slots, of which there are enough for all in hand, their
logs and metrics are kept and what they use is measured; the jobs are as those of `ours`, and show nothing."""

from __future__ import annotations

import os

import mlqueue
from benchmarks.systems.variant import parts

name = "mlqueue, all on"
mlq = mlqueue.MLQ("bench-all-on", settings=mlqueue.Settings.load(url=os.environ["BENCH_URL"], limits="gpu=1000"))


@mlq.actor(resources={"gpu": 1})
def noop(x: int) -> int:
    return x


submit_many, remaining, command = parts(mlq, noop, __name__)
