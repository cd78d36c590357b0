"""Errors as answers: application/problem+json (RFC 9457), made from the one tree of errors.

MLQ's text routes answer text, unless JSON is asked for.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, Final

from flask import Request, Response
from werkzeug.exceptions import HTTPException

from ..errors import (
    BodyTooLarge,
    EncodeError,
    InvalidArguments,
    JobExists,
    JobFailed,
    MLQueueError,
    RangeNotSatisfiable,
    RequestError,
    StoreError,
    TooManyStreams,
    UnsupportedBody,
)
from .call import dump, prefers_json
from .operation import TEXT, Operation

#: The media type of an error.
PROBLEM: Final = "application/problem+json"

#: What an error's body is, in the OpenAPI document.
PROBLEM_SCHEMA: Final = {
    "type": "object",
    "description": "An error (RFC 9457).",
    "properties": {
        "type": {"type": "string", "description": "A URI that names the kind of error."},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "What was got, what is allowed, and what to do."},
        "code": {"type": "string", "description": "The class of the error in Python."},
        "errors": {
            "type": "array",
            "description": "Faults in what was sent, each with the path to it.",
            "items": {
                "type": "object",
                "properties": {"path": {"type": "string"}, "detail": {"type": "string"}},
                "required": ["path", "detail"],
            },
        },
        "job_id": {"type": "string"},
        "reason": {"type": "string"},
        "error_type": {"type": "string"},
        "remote_traceback": {"type": "string"},
    },
    "required": ["type", "title", "status", "detail", "code"],
}

#: When to try again, in seconds, after the store could not be reached or had no room, or there were too many streams.
RETRY_AFTER: Final = "2"

#: Errors of ours for those that Werkzeug raises when a body is read.
BODY_ERRORS: Final[dict[int, type[MLQueueError]]] = {
    400: RequestError,
    408: RequestError,
    413: BodyTooLarge,
    415: UnsupportedBody,
}


def answer_of(error: MLQueueError, operation: Operation, request: Request) -> Response:
    """The response that an error turns into."""
    if operation.text and not prefers_json(request):
        response = Response(f"{error.message}\n", error.status, content_type=f"{TEXT}; charset=utf-8")
    else:
        response = Response(dump(problem(error)), error.status, content_type=PROBLEM)
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    if isinstance(error, StoreError | TooManyStreams):
        response.headers["Retry-After"] = RETRY_AFTER
    if isinstance(error, RangeNotSatisfiable):
        response.headers["Content-Range"] = f"bytes */{error.size}"
    return response


def problem(error: MLQueueError) -> dict[str, Any]:
    """The members of a problem."""
    name = type(error).__name__
    found: dict[str, Any] = {
        "type": f"urn:mlqueue:error:{name}",
        "title": HTTPStatus(error.status).phrase,
        "status": error.status,
        "detail": error.message,
        "code": name,
    }
    if isinstance(error, InvalidArguments):
        found["errors"] = [{"path": path, "detail": text} for path, text in error.faults]
    elif isinstance(error, EncodeError) and error.path:
        found["errors"] = [{"path": f"$.{error.path}", "detail": error.message}]
    elif isinstance(error, JobExists):
        found["job_id"] = error.job_id
    elif isinstance(error, JobFailed):
        found |= {
            "job_id": error.job_id,
            "reason": error.reason,
            "error_type": error.error_type,
            "remote_traceback": error.remote_traceback,
        }
    return found


def too_large(max_body: int) -> BodyTooLarge:
    """The error for a body of more bytes."""
    return BodyTooLarge(
        f"the body has more than the {max_body:,} bytes that are taken here (create_blueprint(max_body=...)). Put "
        "what is large where the workers can read it, and send its path."
    )


def of_werkzeug(error: HTTPException, max_body: int) -> MLQueueError | None:
    """The error of ours for one that Werkzeug raised while a body was read; None for another one."""
    kind = BODY_ERRORS.get(error.code or 0)
    if kind is None or error.response is not None:
        return None
    if kind is BodyTooLarge:
        return too_large(max_body)
    return kind(f"the body cannot be read: {error.description}")


__all__ = ["PROBLEM", "PROBLEM_SCHEMA", "answer_of", "of_werkzeug", "problem", "too_large"]
