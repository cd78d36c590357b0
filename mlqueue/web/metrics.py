"""`GET /metrics`: how the namespace fares, in the text format of Prometheus.

All of it comes from the store, so every web process says the same, and none has to be scraped but one; counters go on
when processes are started anew. That leaves nothing to do for a client library, which is made to add up what one
process has seen: the format itself is three kinds of lines.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from flask import Response

from ..job import CallbackState
from ..store.events import BOUNDS, Histogram
from .auth import READ
from .call import Call
from .operation import Answer, operation

__all__ = ["show_metrics"]

#: The media type of the format; what Prometheus asks for first is answered with it too.
CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

#: What became of a try to deliver a callback.
TRIES: Final = {
    CallbackState.DELIVERED: "delivered",
    CallbackState.FAILED: "failed",
    CallbackState.PENDING: "tried_again",
}

#: A value of a metric: its labels, and the number.
Sample = tuple[Mapping[str, str], float]


@operation(
    "GET",
    "/metrics",
    scope=READ,
    tag="operations",
    answers={200: Answer("The metrics.", {"text/plain": {"type": "string"}})},
)
def show_metrics(call: Call) -> Response:
    """Show metrics for Prometheus.

    Jobs, queues and workers as they are now; counters and histograms of ends, waiting, running, crashes and callbacks
    since the store is there. Every web process of a namespace says the same.
    """
    response = Response("".join(_lines(call)), content_type=CONTENT_TYPE)
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _lines(call: Call) -> Iterator[str]:
    begun = time.perf_counter()
    call.store.connector.execute("PING")
    latency = time.perf_counter() - begun
    yield from _jobs(call)
    yield from _workers(call)
    yield from _counters(call)
    yield from _pools(call)
    yield from _metric("mlqueue_store_latency_seconds", "gauge", "How long the store took to answer.", [({}, latency)])


def _jobs(call: Call) -> Iterator[str]:
    counts = call.store.counts()
    jobs = [
        ({"queue": count.queue, "actor": count.actor, "state": str(count.state)}, float(count.number))
        for count in counts
    ]
    length: dict[str, float] = {count.queue: 0.0 for count in counts}
    for count in counts:
        length[count.queue] += count.number if count.state == "queued" else 0
    yield from _metric("mlqueue_jobs", "gauge", "Jobs that are in a state now.", jobs)
    yield from _metric("mlqueue_queue_length", "gauge", "Jobs that wait to be run.", _by("queue", length))
    waited = _by("queue", dict.fromkeys(length, 0.0) | call.store.oldest())
    yield from _metric("mlqueue_queue_oldest_seconds", "gauge", "How long the oldest waiting job has waited.", waited)


def _workers(call: Call) -> Iterator[str]:
    workers = call.store.workers()
    serving: dict[str, float] = {}
    for worker in workers:
        for queue in worker.info.get("queues", ()):
            serving[queue] = serving.get(queue, 0.0) + 1
    yield from _metric("mlqueue_workers", "gauge", "Worker processes that are alive.", [({}, float(len(workers)))])
    yield from _metric("mlqueue_queue_workers", "gauge", "Those that take jobs from a queue.", _by("queue", serving))


def _counters(call: Call) -> Iterator[str]:
    found = call.store.counters()
    ends = [
        ({"actor": actor, "state": str(state), "reason": reason}, float(number))
        for (actor, state, reason), number in sorted(found.ends.items())
    ]
    tries = _by("outcome", {TRIES[state]: number for state, number in found.callbacks.items()})
    yield from _metric("mlqueue_jobs_ended_total", "counter", "Jobs that ended in a state; dead ones by reason.", ends)
    for name, text, numbers in (
        ("mlqueue_job_retries_total", "Attempts that failed and were followed by another.", found.retries),
        ("mlqueue_job_crashes_total", "Attempts whose process died.", found.crashes),
        ("mlqueue_job_stalls_total", "Attempts whose worker or host was lost.", found.stalls),
        ("mlqueue_job_timeouts_total", "Attempts that ran longer than they may.", found.timeouts),
    ):
        yield from _metric(name, "counter", text, _by("actor", numbers))
    yield from _metric("mlqueue_callback_tries_total", "counter", "Tries to call back, by outcome.", tries)
    yield from _histogram("mlqueue_job_wait_seconds", "How long jobs waited since they could be run.", found.waits)
    yield from _histogram("mlqueue_job_run_seconds", "How long attempts ran that ended by themselves.", found.runs)


#: What the pools that prepare batches tell of themselves: metric, kind, text, and the name of the number.
POOLS: Final = (
    ("mlqueue_batch_workers", "gauge", "Workers that prepare batches for a pool.", "workers"),
    ("mlqueue_batch_outstanding", "gauge", "Batches that are being prepared or wait for a worker.", "outstanding"),
    ("mlqueue_batch_ready", "gauge", "Batches that are ready and not taken.", "ready"),
    ("mlqueue_batch_prepared_total", "counter", "Batches that workers have prepared.", "prepared"),
    ("mlqueue_batch_given_total", "counter", "Batches that the trainer has taken.", "given"),
    ("mlqueue_batch_bytes_total", "counter", "Bytes of the batches that workers have prepared.", "bytes"),
    ("mlqueue_batch_retries_total", "counter", "Batches that were given out again.", "retries"),
    ("mlqueue_batch_skipped_total", "counter", "Batches that were left out.", "skipped"),
    ("mlqueue_batch_here_total", "counter", "Batches that the trainer had to prepare itself.", "here"),
    ("mlqueue_batch_trainer_wait_seconds_total", "counter", "How long the trainer waited for data.", "trainer_waited"),
    ("mlqueue_batch_worker_wait_seconds_total", "counter", "How long workers waited for leases.", "workers_waited"),
    ("mlqueue_batch_preparing_seconds_total", "counter", "How long workers prepared batches.", "preparing"),
)


def _pools(call: Call) -> Iterator[str]:
    pools = call.store.pools()
    for name, kind, text, number in POOLS:
        samples = [({"queue": pool["queue"], "pool": run}, float(pool[number])) for run, pool in sorted(pools.items())]
        yield from _metric(name, kind, text, samples)


# The format


def _by(label: str, numbers: Mapping[str, float]) -> list[Sample]:
    return [({label: value}, float(number)) for value, number in sorted(numbers.items())]


def _metric(name: str, kind: str, text: str, samples: Iterable[Sample]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} {kind}\n"
    for labels, value in samples:
        yield _sample(name, labels, value)


def _histogram(name: str, text: str, by_actor: Mapping[str, Histogram]) -> Iterator[str]:
    yield f"# HELP {name} {text}\n# TYPE {name} histogram\n"
    for actor, histogram in sorted(by_actor.items()):
        below = 0
        for bound in (*BOUNDS, math.inf):
            below += histogram.buckets.get(bound, 0)
            yield _sample(f"{name}_bucket", {"actor": actor, "le": _number(bound)}, below)
        yield _sample(f"{name}_sum", {"actor": actor}, histogram.total)
        yield _sample(f"{name}_count", {"actor": actor}, below)


def _sample(name: str, labels: Mapping[str, str], value: float) -> str:
    shown = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{shown}}} {_number(value)}\n" if shown else f"{name} {_number(value)}\n"


def _number(value: float) -> str:
    if value == math.inf:
        return "+Inf"
    return str(int(value)) if value == int(value) else repr(value)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
