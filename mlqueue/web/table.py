"""The one table of all routes."""

from __future__ import annotations

from typing import Final

from . import actors, dead, health, jobs, limits, live, metrics, mlq, openapi, results, seen, submit
from .operation import Operation

__all__ = ["OPERATIONS"]

#: Every route of the blueprint. Whoever adds one adds it here; scopes, OpenAPI and tests follow.
OPERATIONS: Final[tuple[Operation, ...]] = (
    submit.post_job,
    submit.submit_jobs,
    submit.submit_job,
    actors.list_actors,
    jobs.list_jobs,
    jobs.show_job,
    jobs.delete_job,
    jobs.cancel_job,
    jobs.extend_job,
    jobs.retry_job,
    jobs.list_attempts,
    jobs.redeliver_callback,
    limits.explain_job,
    limits.list_limits,
    limits.set_limit,
    limits.unset_limit,
    results.read_result,
    results.read_result_as,
    mlq.count_jobs,
    mlq.read_progress,
    mlq.read_short_result,
    mlq.add_consumer,
    mlq.remove_consumer,
    mlq.list_functions,
    live.stream_job_events,
    live.stream_all_events,
    seen.read_logs,
    seen.read_metrics,
    dead.list_dead_letters,
    dead.export_dead_letters,
    dead.requeue_dead_letters,
    dead.purge_dead_letters,
    dead.show_dead_letter,
    dead.requeue_dead_letter,
    dead.purge_dead_letter,
    health.list_queues,
    health.list_workers,
    health.answer_health,
    health.answer_readiness,
    metrics.show_metrics,
    openapi.show_document,
    openapi.show_reference,
)
