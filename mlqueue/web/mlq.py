"""What else MLQ's users know: counts and texts, and what became of POST /consumer."""

from __future__ import annotations

from typing import NoReturn

from flask import Response

from ..errors import Forbidden
from ..posted import progress_text
from ..values import plain
from .auth import READ, SUBMIT
from .call import Call
from .operation import Answer, operation
from .results import NO_RESULT
from .shapes import text_or

__all__ = ["add_consumer", "count_jobs", "read_progress", "read_short_result", "remove_consumer"]


@operation(
    "GET",
    "/jobs/count",
    scope=READ,
    tag="mlq",
    text=True,
    answers={200: Answer("The number.", text_or({"type": "integer"}, "The number."))},
)
def count_jobs(call: Call) -> Response:
    """Count the jobs that have not ended: queued, scheduled and running ones."""
    count = call.mlq.job_count()
    return call.json(count) if call.wants_json else call.text(str(count))


@operation(
    "GET",
    "/jobs/<job_id>/progress",
    scope=READ,
    tag="mlq",
    text=True,
    answers={
        200: Answer(
            "How far it is.",
            text_or(
                {"type": ["number", "string", "null"], "description": "What the job reported last."},
                "`[queued; not started]`, `[started]`, what it reported, `[completed]`, `[failed]` or `[cancelled]`.",
            ),
        )
    },
)
def read_progress(call: Call, job_id: str) -> Response:
    """Read how far a job is."""
    record = call.store.record(job_id, full=False)
    return call.json(plain(record.progress)) if call.wants_json else call.text(progress_text(record))


@operation(
    "GET",
    "/jobs/<job_id>/short_result",
    scope=READ,
    tag="mlq",
    text=True,
    answers={
        200: Answer(
            "The short result.",
            text_or(
                {"type": ["number", "string", "boolean", "null"], "description": "null while there is none."},
                "`[no result]` before the end; the first line of the error after a failure.",
            ),
        )
    },
)
def read_short_result(call: Call, job_id: str) -> Response:
    """Read the short result of a job."""
    record = call.store.record(job_id, full=False)
    if call.wants_json:
        return call.json(plain(record.short_result))
    return call.text(record.short_text if record.state.ended else NO_RESULT)


def _refuse() -> NoReturn:
    raise Forbidden(
        "functions are not taken over HTTP: whoever may post one may run anything on every worker. Register it in the "
        "worker's own program, mlq.create_listener(fn), and start that with `mlqueue worker MODULE`."
    )


@operation("POST", "/consumer", scope=SUBMIT, tag="mlq", text=True, answers={})
def add_consumer(call: Call) -> Response:
    """Refused: functions are registered in the worker's own program, by `mlq.create_listener(fn)`."""
    _refuse()


@operation("DELETE", "/consumer", scope=SUBMIT, tag="mlq", text=True, answers={})
def remove_consumer(call: Call) -> Response:
    """Refused, as POST /consumer is."""
    _refuse()
