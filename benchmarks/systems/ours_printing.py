"""mlqueue, with jobs that print a line and log a message as those of `ours_showing` do, of which nothing is kept."""

from __future__ import annotations

import logging
import os

import mlqueue
from benchmarks.systems.variant import parts

name = "mlqueue, printing"
mlq = mlqueue.MLQ("bench-printing", settings=mlqueue.Settings.load(url=os.environ["BENCH_URL"], job_logs=None))
log = logging.getLogger("bench")


@mlq.actor
def noop(x: int) -> int:
    print("job", x)
    log.warning("job %d", x)
    return x


submit_many, remaining, command = parts(mlq, noop, __name__)
