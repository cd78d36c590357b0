"""Jobs: list them, look at one, steer it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Final, NotRequired, TypedDict
from urllib.parse import urlencode

from flask import Response

from ..errors import InvalidTransition, JobNotFound
from ..estimate import estimated_start
from ..handle import Job
from ..job import Attempt, JobRecord, State
from ..schema import Limits, schema_of
from ..waiting import wait_for
from .auth import READ, SUBMIT
from .body import read_body
from .call import Call, dump
from .live import etag_of, wait_for_change
from .operation import JSON, Answer, Parameter, operation
from .records import shown
from .results import with_result
from .shapes import RECORD, RECORD_ANSWER
from .submit import PREFER

__all__ = [
    "LIMIT",
    "TIMES",
    "cancel_job",
    "delete_job",
    "extend_job",
    "list_attempts",
    "list_jobs",
    "redeliver_callback",
    "retry_job",
    "show_job",
]

NAME: Final = {"type": "string", "minLength": 1, "maxLength": 200}
TIME: Final = {"type": "number", "minimum": 0, "maximum": 1e10}

LIMIT: Final = Parameter(
    "limit", "query", {"type": "integer", "minimum": 1, "maximum": 1000, "default": 50}, "How many a page has at most."
)
TIMES: Final = (
    Parameter("since", "query", TIME, "Created then or later; Unix seconds."),
    Parameter("until", "query", TIME, "Created then or before; Unix seconds."),
)

PAGE: Final = {
    "type": "object",
    "properties": {
        "jobs": {"type": "array", "items": RECORD},
        "next": {"type": ["string", "null"], "description": "Where the next page is; null after the last."},
    },
    "required": ["jobs", "next"],
}


@operation(
    "GET",
    "/jobs",
    scope=READ,
    tag="jobs",
    parameters=(
        Parameter(
            "state", "query", {"type": "string", "enum": [str(state) for state in State]}, "In this state.", many=True
        ),
        Parameter("actor", "query", NAME, "Of this actor."),
        Parameter("queue", "query", NAME, "In this queue."),
        Parameter("tag", "query", NAME, "With this tag."),
        *TIMES,
        LIMIT,
        Parameter(
            "cursor", "query", {"type": "integer", "minimum": 0, "maximum": 2**53}, "Where a page begins; from `next`."
        ),
    ),
    answers={200: Answer("A page of records.", {JSON: PAGE}, {"Link": "The next page."})},
)
def list_jobs(call: Call) -> Response:
    """List jobs, newest first.

    Pages are stable while jobs come and go: `next` (also in the Link header) leads on from where this one ends.
    """
    given = call.query()
    page = call.mlq.jobs(
        state=given.get("state"),
        actor=given.get("actor"),
        queue=given.get("queue"),
        tag=given.get("tag"),
        since=given.get("since"),
        until=given.get("until"),
        cursor=given.get("cursor"),
        limit=given.get("limit", 50),
    )
    following, headers = next_page(call, "list_jobs", page.cursor)
    return call.json({"jobs": [shown(call, record) for record in page.jobs], "next": following}, headers=headers)


def next_page(call: Call, name: str, cursor: object | None) -> tuple[str | None, dict[str, str]]:
    """Where the next page of a listing is, and the header that says so."""
    if cursor is None:
        return None, {}
    asked = [(key, value) for key, value in call.request.args.items(multi=True) if key != "cursor"]
    url = f"{call.url(name)}?{urlencode([*asked, ('cursor', str(cursor))])}"
    return url, {"Link": f'<{url}>; rel="next"'}


@operation(
    "GET",
    "/jobs/<job_id>",
    scope=READ,
    tag="jobs",
    confirms_keys=True,
    parameters=(
        PREFER,
        Parameter("If-None-Match", "header", {"type": "string"}, "The ETag of what the client has."),
    ),
    answers={
        200: replace(RECORD_ANSWER, headers={"ETag": "Names how it stands."}),
        304: Answer("It is as the client has it."),
    },
)
def show_job(call: Call, job_id: str) -> Response:
    """Show the record of a job.

    With its position in the queue, when it will start as it seems, its attempts, and links to what can be done.
    `Prefer: wait=N` waits up to N seconds for its end, and then has a small result in it. With `If-None-Match` it is
    304 as long as it is what the client has, and the wait is for any change.
    """
    environ = call.request.environ
    if "HTTP_PREFER" not in environ and "HTTP_IF_NONE_MATCH" not in environ:
        seen = call.take_unconfirmed()
        record = call.store.record(job_id) if seen is None else call.store.record_for(job_id, seen)
        body = dump(shown(call, record))
        return call.encoded_json(_with_estimate(call, record, body), headers={"ETag": etag_of(body)})
    call.confirm()
    return _show_later(call, job_id)


def _show_later(call: Call, job_id: str) -> Response:
    """When it has ended or changed, or as it is after the time to wait."""
    record: JobRecord | None
    with call.waiting() as seconds:
        if call.request.if_none_match:
            record = wait_for_change(call, job_id, seconds)
        else:
            if seconds:
                wait_for(call.store, job_id, seconds)
            record = call.store.record(job_id)
    headers = {"Preference-Applied": f"wait={seconds:g}"} if seconds else {}
    if record is None:
        etag = call.request.if_none_match.to_header()
        return Response(status=304, headers={**headers, "ETag": etag, "Cache-Control": "no-store"})
    body = dump(shown(call, record))
    headers["ETag"] = etag_of(body)
    if seconds and record.state.ended:
        body = dump(with_result(call, record))
    return call.encoded_json(_with_estimate(call, record, body), headers=headers)


def _with_estimate(call: Call, record: JobRecord, body: bytes) -> bytes:
    """With the time when it will start as it seems, which is not among what the ETag stands for: it is another one each
    time."""
    if record.state in (State.QUEUED, State.SCHEDULED):
        with contextlib.suppress(JobNotFound):
            return dump({**shown(call, record), "estimated_start": estimated_start(call.store, record.id)})
    return body


CANCEL_ANSWERS: Final[Mapping[int, Answer]] = {
    200: Answer("It is cancelled.", {JSON: RECORD}),
    202: Answer("It runs still, and has been told.", {JSON: RECORD}),
}


@operation(
    "POST", "/jobs/<job_id>/cancel", scope=SUBMIT, tag="jobs", answers=CANCEL_ANSWERS, errors=(InvalidTransition,)
)
def cancel_job(call: Call, job_id: str) -> Response:
    """Cancel a job.

    One that waits never runs; one that runs is told, and ends cancelled whatever it returns. 409 when it has ended
    already.
    """
    return _cancel(call, job_id)


@operation("DELETE", "/jobs/<job_id>", scope=SUBMIT, tag="jobs", answers=CANCEL_ANSWERS, errors=(InvalidTransition,))
def delete_job(call: Call, job_id: str) -> Response:
    """Cancel a job; the same as POST /jobs/{job_id}/cancel."""
    return _cancel(call, job_id)


def _cancel(call: Call, job_id: str) -> Response:
    was = call.store.cancel(job_id)
    if was in (State.SUCCEEDED, State.DEAD):
        raise InvalidTransition(f"job {job_id} is {was}: it has ended, and cannot be cancelled any more.")
    record = call.store.record(job_id)
    return call.json(shown(call, record), 200 if record.state.ended else 202)


@operation(
    "POST",
    "/jobs/<job_id>/retry",
    scope=SUBMIT,
    tag="jobs",
    answers={202: Answer("It is queued again.", {JSON: RECORD})},
    errors=(InvalidTransition,),
)
def retry_job(call: Call, job_id: str) -> Response:
    """Put a dead or cancelled job back into its queue, its counts at nought."""
    call.store.retry(job_id)
    return call.json(shown(call, call.store.record(job_id)), 202)


class Extension(TypedDict):
    """How much more time a job gets."""

    seconds: Annotated[float, "So much later its limits are over.", Limits(ge=0.001, le=1e9)]


@operation(
    "POST",
    "/jobs/<job_id>/extend",
    scope=SUBMIT,
    tag="jobs",
    body={JSON: Extension},
    answers={200: Answer("It has more time.", {JSON: RECORD})},
    errors=(InvalidTransition,),
)
def extend_job(call: Call, job_id: str) -> Response:
    """Give a running job more time.

    Its time_limit, hard_time_limit and job_timeout are over so much later. 409 when it does not run.
    """
    Job(call.store, job_id).extend(read_body(call)["seconds"])
    return call.json(shown(call, call.store.record(job_id)))


ATTEMPTS: Final = {
    "type": "object",
    "properties": {"attempts": {"type": "array", "items": schema_of(Attempt)}},
    "required": ["attempts"],
}


@operation(
    "GET",
    "/jobs/<job_id>/attempts",
    scope=READ,
    tag="jobs",
    answers={200: Answer("The attempts, oldest first.", {JSON: ATTEMPTS})},
)
def list_attempts(call: Call, job_id: str) -> Response:
    """List the attempts of a job that did not succeed: worker, times, outcome and error of each."""
    return call.json({"attempts": call.store.record(job_id).asdict()["attempts"]})


class Redelivery(TypedDict):
    """Where a callback is to be delivered, or a webhook to be told of the end."""

    url: NotRequired[Annotated[str | None, "The URL of the callback, if it is another than the job's own."]]
    webhook: NotRequired[Annotated[str | None, "The URL of the webhook, if it is another than the job's own."]]


@operation(
    "POST",
    "/jobs/<job_id>/callbacks/redeliver",
    scope=SUBMIT,
    tag="jobs",
    body={JSON: Redelivery},
    body_required=False,
    answers={202: Answer("It is to be delivered.", {JSON: RECORD})},
    errors=(InvalidTransition,),
)
def redeliver_callback(call: Call, job_id: str) -> Response:
    """Have the callback of a job that has ended delivered again, and its webhook told of the end again.

    With a URL in the body the one of both that it is for, to this URL.
    """
    body: dict[str, Any] = read_body(call) or {}
    Job(call.store, job_id).redeliver(body.get("url"), webhook=body.get("webhook"))
    return call.json(shown(call, call.store.record(job_id)), 202)
