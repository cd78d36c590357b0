"""mlqueue, with jobs that show something of themselves: each prints a line, logs a message and two metrics."""

from __future__ import annotations

import logging
import os

import mlqueue
from benchmarks.systems.variant import parts

name = "mlqueue, showing"
mlq = mlqueue.MLQ("bench-showing", url=os.environ["BENCH_URL"])
log = logging.getLogger("bench")


@mlq.actor
def noop(x: int) -> int:
    print("job", x)
    log.warning("job %d", x)
    mlqueue.current_job().log_metrics(x, loss=0.5, accuracy=0.9)
    return x


submit_many, remaining, command = parts(mlq, noop, __name__)
