"""Limits: how many slots there are of what jobs need; and why a job waits."""

from __future__ import annotations

from typing import Annotated, Any, Final, TypedDict

from flask import Response

from ..errors import InvalidArguments
from ..limits import MAX_CAPACITY, Limit, check_limit
from ..schema import Limits as Bounds
from ..schema import schema_of
from ..why import Why, why
from .auth import ADMIN, READ
from .body import read_body
from .call import Call
from .operation import JSON, Answer, operation

__all__ = ["explain_job", "list_limits", "set_limit", "unset_limit"]

LIMIT: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "description": "The resource, or `@` and the name of an actor."},
        "capacity": {"type": "integer", "description": "How many slots there are."},
        "used": {"type": "integer", "description": "How many are in use."},
        "source": {
            "type": "string",
            "enum": ["hand", "worker", "default"],
            "description": "Who said so: somebody, the settings or actors of workers, or nobody (one slot).",
        },
        "held_by": {
            "type": "object",
            "additionalProperties": {"type": "string"},
            "description": "The id of the job that holds each slot in use.",
        },
    },
    "required": ["name", "capacity", "used", "source", "held_by"],
}
LIMITS: Final = {"type": "object", "properties": {"limits": {"type": "array", "items": LIMIT}}, "required": ["limits"]}
CAPACITY: Final = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "capacity": {"type": "integer"}},
    "required": ["name", "capacity"],
}


class Capacity(TypedDict):
    """How many slots a limit is to have."""

    capacity: Annotated[int, "How many slots there are.", Bounds(ge=0, le=MAX_CAPACITY)]


@operation("GET", "/limits", scope=READ, tag="limits", answers={200: Answer("The limits, by name.", {JSON: LIMITS})})
def list_limits(call: Call) -> Response:
    """List limits: how many slots there are of each resource, and which jobs hold them."""
    return call.json({"limits": [_shown(limit) for limit in call.mlq.limits.list()]})


@operation(
    "PUT",
    "/limits/<limit>",
    scope=ADMIN,
    tag="limits",
    body={JSON: Capacity},
    answers={200: Answer("It has so many slots now.", {JSON: CAPACITY})},
)
def set_limit(call: Call, limit: str) -> Response:
    """Set how many slots a resource has, or with `@` and its name an actor.

    Jobs that wait for it start at once, if there are more now. Jobs that run go on, whatever their number.
    """
    capacity: int = read_body(call)["capacity"]
    call.mlq.limits.set(_name(limit), capacity)
    return call.json({"name": limit, "capacity": capacity})


@operation(
    "DELETE",
    "/limits/<limit>",
    scope=ADMIN,
    tag="limits",
    errors=(InvalidArguments,),
    answers={200: Answer("It has so many slots now.", {JSON: CAPACITY})},
)
def unset_limit(call: Call, limit: str) -> Response:
    """Forget what was set of a limit: what the settings of workers or the actor say counts again, or 1."""
    return call.json({"name": limit, "capacity": call.mlq.limits.unset(_name(limit))})


@operation("GET", "/jobs/<job_id>/why", scope=READ, tag="jobs", answers={200: Answer("Why.", {JSON: schema_of(Why)})})
def explain_job(call: Call, job_id: str) -> Response:
    """Say in one sentence why a job does not run: what it waits for, and which jobs hold that."""
    return call.json(why(call.store, job_id).asdict())


def _name(limit: str) -> str:
    if not limit.isprintable():
        fault = "has characters that cannot be printed"
        raise InvalidArguments(f"limit: the name {fault}.", faults=[("limit", fault)])
    return check_limit(limit)


def _shown(limit: Limit) -> dict[str, Any]:
    return {
        "name": limit.name,
        "capacity": limit.capacity,
        "used": limit.used,
        "source": limit.source,
        "held_by": dict(limit.held_by),
    }
