"""Where the time of one job goes, from submit to result: the moments of its way, seen from both processes.

    python benchmarks/way.py [--jobs 500]

A worker process of one thread and a submitter on one server, as in benchmarks/queue.py; each notes on the machine's
monotonic clock when it passes a point. Prints the median of each stretch, and of the longest tenth.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [str(HERE.parent), *(path for path in sys.path if Path(path or ".").resolve() != HERE)]

#: The points, in order, and what happens up to each.
POINTS = {
    "submit returns": "the submitter encodes the job and sends it; the store creates it and rings",
    "the worker hears": "the bell wakes the worker's leading thread",
    "the turn is answered": "a call: the store starts the job and hands it over",
    "the job begins": "the leader passes it to a thread of Dramatiq's, which decodes it and runs the hooks",
    "the job has ended": "the actor's function, its result encoded, the hooks after it",
    "the leader has it": "the thread hands the end over and wakes the leader",
    "the end is stored": "a call: the store settles the job and rings the submitter",
    "the result is there": "the bell wakes the submitter, which decodes the result (before the leader is answered)",
}


def note(points: list[tuple[str, float]], name: str) -> None:
    points.append((name, time.monotonic()))


def after(function: Callable[..., Any], seen: Callable[[Any], None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        value = function(*args, **kwargs)
        seen(value)
        return value

    return call


def work(url: str) -> None:
    """The worker's side, until its standard input ends; then it prints what it has noted."""
    import dramatiq

    import mlqueue
    from mlqueue.pump import Pump

    points: list[tuple[str, float]] = []
    mlq = mlqueue.MLQ("way", url=url)

    @mlq.actor
    def noop(number: int) -> int:
        note(points, "the job begins")
        return number

    real_turn = Pump._turn

    def turn(pump: Pump, prefetch: int) -> None:
        if pump._unsettled:
            note(points, "the leader has it")
        real_turn(pump, prefetch)
        note(points, "the turn is answered" if pump.in_hand else "the end is stored")

    Pump._turn = turn  # type: ignore[method-assign]
    Pump._hear = after(Pump._hear, lambda _: note(points, "the worker hears"))  # type: ignore[method-assign]
    real_settle = Pump.settle

    def settle(pump: Pump, *args: Any, **kwargs: Any) -> None:
        note(points, "the job has ended")
        real_settle(pump, *args, **kwargs)

    Pump.settle = settle  # type: ignore[method-assign]
    worker = dramatiq.Worker(mlq.broker, worker_threads=1)
    worker.start()
    print("ready", flush=True)
    sys.stdin.read()
    worker.stop()
    print(json.dumps(points), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=500)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.worker)
        return
    import mlqueue
    from benchmarks.queue import server

    with server() as url:
        process = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), "--worker", url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(HERE.parent)},
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        mlq = mlqueue.MLQ("way", url=url)
        ways: list[dict[str, float]] = []
        for number in range(options.jobs + 20):
            # Long enough that each finds the worker asleep.
            time.sleep(0.02)
            begun = time.monotonic()
            job = mlq.submit("noop", number)
            returned = time.monotonic()
            job.result(timeout=60)
            ways.append({"begun": begun, "submit returns": returned, "the result is there": time.monotonic()})
        out, _ = process.communicate("", timeout=60)
        mlq.close()
    seen = sorted(json.loads(out.splitlines()[-1]), key=lambda point: point[1])
    place(ways[20:], seen)
    show(ways[20:])


def place(ways: list[dict[str, float]], seen: list[tuple[str, float]]) -> None:
    """Gives each job the worker's points that lie in its time; the end may be stored just after the result is there."""
    at = 0
    for way in ways:
        while at < len(seen) and seen[at][1] < way["begun"]:
            at += 1
        for name, moment in seen[at : at + 12]:
            if moment < way["begun"] + 0.02:
                way.setdefault(name, moment)


def show(ways: list[dict[str, float]]) -> None:
    whole = [way for way in ways if all(point in way for point in POINTS)]
    total = [1000 * (way["the result is there"] - way["begun"]) for way in whole]
    print(f"{len(whole)} of {len(ways)} jobs seen whole; submit to result: {statistics.median(total):.2f} ms")
    print("| up to | ms since submit began | this stretch, ms | slowest tenth, ms | what happens |")
    print("|---|---|---|---|---|")
    before = "begun"
    for point, what in POINTS.items():
        since = statistics.median(1000 * (way[point] - way["begun"]) for way in whole)
        stretches = sorted(1000 * (way[point] - way[before]) for way in whole)
        slow = stretches[int(len(stretches) * 0.9)]
        print(f"| {point} | {since:.2f} | {statistics.median(stretches):+.2f} | {slow:+.2f} | {what} |")
        before = point


if __name__ == "__main__":
    main()
