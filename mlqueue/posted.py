"""Jobs as MLQ shows them: the dict of ``get_job`` and the text of ``get_progress``."""

from __future__ import annotations

from typing import Any, Final

from .errors import InvalidJob
from .job import DeadReason, JobRecord, Result, State
from .message import LISTENER, decode_body
from .store import Store
from .store.store import Outcome

__all__ = ["failure_text", "job_dict", "progress_text"]

#: The texts of states that say all; a running job's is what it reported.
PROGRESS_TEXTS: Final = {
    State.QUEUED: "[queued; not started]",
    State.SCHEDULED: "[queued; not started]",
    State.SUCCEEDED: "[completed]",
    State.DEAD: "[failed]",
    State.CANCELLED: "[cancelled]",
}


def job_dict(store: Store, job_id: str) -> dict[str, Any]:
    """All that MLQ's users know of a job. Times are UTC in Unix seconds, or None. Raises `JobNotFound`.

    ``progress`` is None (not started), 0 (started), what the job reported, 100 (done) or -1 (failed or cancelled).
    After a failure ``result`` is the error's text, and ``short_result`` the first line of it. ``msg`` is what was
    posted; for a job of another actor a dict of its name and arguments.
    """
    record, body, outcome = store.details(job_id)
    short, full = _results(outcome)
    return {
        "id": record.id,
        "timestamp": record.created_at,
        "worker": record.worker,
        "processing_started": record.started_at,
        "processing_finished": record.finished_at,
        "progress": _progress(record),
        "short_result": short,
        "result": full,
        "callback": record.callback,
        "retries": _retries(record, store.settings.max_stalls),
        "functions": list(record.functions) or None,
        "msg": _msg(record.actor, body),
    }


def progress_text(record: JobRecord) -> str:
    """How far a job is. It follows the state: one that reported 100 is not thereby ended."""
    text = PROGRESS_TEXTS.get(record.state)
    if text is None:
        text = "[started]" if record.progress is None else str(record.progress)
    return text


def _retries(record: JobRecord, max_stalls: int) -> int:
    """How often it was started anew, whatever for. The crash or the loss that it died of has started nothing."""
    counted = record.retries + record.crashes + record.stalls + record.timeouts
    lost = record.stalls >= (max_stalls if record.max_stalls is None else record.max_stalls)
    died_of_it = record.dead_reason is DeadReason.CRASHED or (record.dead_reason is DeadReason.STALLED and lost)
    return counted - 1 if died_of_it and counted else counted


def _progress(record: JobRecord) -> int | float | str | None:
    if record.state in (State.QUEUED, State.SCHEDULED):
        return None
    if record.state is State.RUNNING:
        return 0 if record.progress is None else record.progress
    return 100 if record.state is State.SUCCEEDED else -1


def failure_text(outcome: Outcome) -> str:
    """What stands in place of the result of a job that ended without one. Never empty, whatever the exception's own
    text is: programs wait `while not job["result"]`."""
    if outcome.state is State.CANCELLED:
        return "cancelled"
    return (outcome.error.text.strip() if outcome.error else "") or outcome.reason


def _results(outcome: Outcome) -> tuple[Any, Any]:
    if outcome.result is not None:
        return outcome.result.short, outcome.result.full
    if not outcome.state.ended:
        return None, None
    text = failure_text(outcome)
    return text.splitlines()[0][: Result.MAX_SHORT], text


def _msg(actor: str, body: bytes | memoryview) -> Any:
    try:
        args, kwargs, _ = decode_body(body)
    except InvalidJob:
        return None  # the job is dead, undecodable; its error says what is wrong
    if actor == LISTENER and len(args) == 1 and not kwargs:
        return args[0]
    return {"actor": actor, "args": args, "kwargs": kwargs}
