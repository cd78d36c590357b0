"""Queues, workers, and health: for who looks after it, and for what restarts processes and routes requests."""

from __future__ import annotations

import time
from typing import Any, Final

from flask import Response

from ..errors import StoreError
from .auth import ANYBODY, READ, who
from .call import Call
from .operation import JSON, TEXT, Answer, operation
from .problems import RETRY_AFTER

__all__ = ["answer_health", "answer_readiness", "list_queues", "list_workers"]

#: How long the store is tried for, until this process is not ready, in seconds.
PATIENCE: Final = 1.0

#: What is told of a worker, of all that it says of itself.
TOLD: Final = ("host", "pid", "started_at", "threads", "queues", "actors", "functions", "python")

COUNTS: Final = {"type": "object", "additionalProperties": {"type": "integer"}}
QUEUES: Final = {
    "type": "object",
    "properties": {
        "queues": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string"},
                    "counts": {**COUNTS, "description": "Jobs by state."},
                    "actors": {"type": "object", "additionalProperties": COUNTS, "description": "The same, by actor."},
                    "workers": {"type": "integer", "description": "Processes that take jobs from it."},
                    "oldest_waiting": {
                        "type": ["number", "null"],
                        "description": "For how many seconds the job has waited that is there longest.",
                    },
                },
                "required": ["name", "counts", "actors", "workers", "oldest_waiting"],
            },
        }
    },
    "required": ["queues"],
}
WORKERS: Final = {
    "type": "object",
    "properties": {
        "workers": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "string"},
                    "lease_left": {
                        "type": "number",
                        "description": "Seconds until it counts as lost, if it is silent.",
                    },
                    "jobs": {"type": "array", "items": {"type": "string"}, "description": "The ids of those it runs."},
                },
                "required": ["id", "lease_left", "jobs"],
            },
        }
    },
    "required": ["workers"],
}
READY: Final = {
    "type": "object",
    "properties": {
        "ready": {"type": "boolean"},
        "store": {"type": "object", "description": "Whether it answers, and how long that takes in seconds."},
        "workers": {"type": "integer"},
        "oldest_waiting": {"type": ["number", "null"]},
    },
    "required": ["ready"],
}


@operation("GET", "/queues", scope=READ, tag="operations", answers={200: Answer("The queues.", {JSON: QUEUES})})
def list_queues(call: Call) -> Response:
    """List the queues: how many jobs are in which state, how long the oldest waits, and how many workers serve it."""
    oldest, served = call.store.oldest(), _served(call)
    queues: dict[str, dict[str, Any]] = {}
    for name in served:
        queues[name] = _queue(name, served, oldest)
    for count in call.store.counts():
        queue = queues.setdefault(count.queue, _queue(count.queue, served, oldest))
        for counts in (queue["counts"], queue["actors"].setdefault(count.actor, {})):
            counts[str(count.state)] = counts.get(str(count.state), 0) + count.number
    return call.json({"queues": [queues[name] for name in sorted(queues)]})


def _queue(name: str, served: dict[str, int], oldest: dict[str, float]) -> dict[str, Any]:
    return {
        "name": name,
        "counts": {},
        "actors": {},
        "workers": served.get(name, 0),
        "oldest_waiting": oldest.get(name),
    }


def _served(call: Call) -> dict[str, int]:
    """How many workers serve each queue."""
    served: dict[str, int] = {}
    for worker in call.store.workers():
        for name in worker.info.get("queues", ()):
            served[name] = served.get(name, 0) + 1
    return served


@operation("GET", "/workers", scope=READ, tag="operations", answers={200: Answer("The workers.", {JSON: WORKERS})})
def list_workers(call: Call) -> Response:
    """List the worker processes that are alive: where they run, what they serve, and the jobs in their hands."""
    found = []
    for worker in call.store.workers():
        told = {name: worker.info.get(name) for name in TOLD}
        found.append({"id": worker.id, **told, "lease_left": worker.lease_left, "jobs": list(worker.jobs)})
    return call.json({"workers": found})


@operation(
    "GET",
    "/healthz",
    scope=None,
    tag="operations",
    text=True,
    answers={200: Answer("This process answers.", {TEXT: {"type": "string", "const": "ok"}})},
)
def answer_health(call: Call) -> Response:
    """Say that this web process is alive, whatever the store does."""
    return call.text("ok")


@operation(
    "GET",
    "/readyz",
    scope=None,
    tag="operations",
    answers={200: Answer("It can take jobs.", {JSON: READY}), 503: Answer("It cannot: no store.", {JSON: READY})},
)
def answer_readiness(call: Call) -> Response:
    """Say whether this web process can take jobs: whether the store answers.

    Who may read is told of workers and waiting jobs, too.
    """
    begun = time.perf_counter()
    try:
        call.store.connector.execute("PING", patience=PATIENCE)
        took = time.perf_counter() - begun
        principal = who(call.mount.hooks, call.request) if call.mount.hooks else ANYBODY
        found: dict[str, Any] = {"ready": True}
        if principal is not None and principal.may(READ):
            waited = call.store.oldest()
            found["store"] = {"ok": True, "seconds": round(took, 6)}
            found["workers"] = len(call.store.workers())
            found["oldest_waiting"] = max(waited.values(), default=None)
        return call.json(found)
    except StoreError:
        return call.json({"ready": False, "store": {"ok": False}}, 503, {"Retry-After": RETRY_AFTER})
