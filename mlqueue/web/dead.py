"""Dead letters: list, show, put back, forget, export them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Final, NotRequired, TypedDict

from flask import Response

from ..dead_letters import DeadFilters
from ..errors import InvalidArguments, InvalidTransition
from ..job import DeadReason
from ..schema import Limits
from ..values import plain
from .auth import ADMIN, READ
from .body import read_body
from .call import Call
from .jobs import LIMIT, NAME, next_page
from .operation import JSON, MSGPACK, Answer, Parameter, operation
from .records import shown
from .shapes import RECORD

__all__ = [
    "export_dead_letters",
    "list_dead_letters",
    "purge_dead_letter",
    "purge_dead_letters",
    "requeue_dead_letter",
    "requeue_dead_letters",
    "show_dead_letter",
]

#: The media type of an export: a line of JSON for each.
LINES: Final = "application/x-ndjson"

AGE: Final = {"type": "number", "minimum": 0, "maximum": 1e10}
REASON: Final = {"type": "string", "enum": [str(reason) for reason in DeadReason]}

FILTERS: Final = (
    Parameter("actor", "query", NAME, "Of this actor."),
    Parameter("reason", "query", REASON, "Dead for this reason."),
    Parameter("queue", "query", NAME, "Of this queue."),
    Parameter("older_than", "query", AGE, "Dead for so many seconds or longer."),
    Parameter("newer_than", "query", AGE, "Dead for so many seconds at most."),
    Parameter("text", "query", NAME, "With this in the error's type, message or traceback, in any case."),
)

PAGE: Final = {
    "type": "object",
    "properties": {
        "dead": {"type": "array", "items": RECORD},
        "next": {"type": ["string", "null"], "description": "Where the next page is; null after the last."},
    },
    "required": ["dead", "next"],
}

LINKS: Final = {
    name: {"job_id": "$response.body#/dead/0/id"}
    for name in ("show_dead_letter", "requeue_dead_letter", "purge_dead_letter")
}


@operation(
    "GET",
    "/dead",
    scope=READ,
    tag="dead letters",
    parameters=(
        *FILTERS,
        LIMIT,
        Parameter(
            "cursor",
            "query",
            {"type": "string", "pattern": "^[0-9]{1,15}:[A-Za-z0-9._-]{1,128}$"},
            "Where a page begins; from `next`.",
        ),
    ),
    answers={
        200: Answer("A page of records, the latest death first.", {JSON: PAGE}, {"Link": "The next page."}, LINKS)
    },
)
def list_dead_letters(call: Call) -> Response:
    """List dead letters: jobs that have ended for good without success, the latest death first."""
    given = call.query()
    page = call.mlq.dead_letters.list(cursor=given.pop("cursor", None), limit=given.pop("limit", 50), **given)
    following, headers = next_page(call, "list_dead_letters", page.cursor)
    return call.json({"dead": [shown(call, record) for record in page.letters], "next": following}, headers=headers)


LETTER: Final = {
    "type": "object",
    "properties": {
        "record": RECORD,
        "args": {"type": ["array", "null"], "description": "What was sent; null where it cannot be read."},
        "kwargs": {"type": ["object", "null"]},
        "options": {"type": ["object", "null"]},
    },
    "required": ["record", "args", "kwargs", "options"],
}


@operation(
    "GET",
    "/dead/<job_id>",
    scope=READ,
    tag="dead letters",
    answers={200: Answer("The record, and what was sent.", {JSON: LETTER})},
)
def show_dead_letter(call: Call, job_id: str) -> Response:
    """Show a dead letter: its record with error and attempts, and its message."""
    letter = call.mlq.dead_letters.show(job_id)
    return call.json(
        {
            "record": shown(call, letter.record),
            "args": plain(letter.args),
            "kwargs": plain(letter.kwargs),
            "options": plain(letter.options),
        }
    )


class Edit(TypedDict):
    """What is to be sent instead. Options stay what they were."""

    args: NotRequired[Annotated[list[Any] | None, "Instead of all positional arguments."]]
    kwargs: NotRequired[Annotated[dict[str, Any] | None, "Instead of all arguments by name."]]
    msg: NotRequired[Annotated[Any, "Instead of the message, for MLQ's listeners."]]


@operation(
    "POST",
    "/dead/<job_id>/requeue",
    scope=ADMIN,
    tag="dead letters",
    body={JSON: Edit, MSGPACK: Edit},
    body_required=False,
    answers={202: Answer("It is queued again.", {JSON: RECORD})},
    errors=(InvalidTransition,),
)
def requeue_dead_letter(call: Call, job_id: str) -> Response:
    """Put a dead letter back into its queue, its counts at nought; with other arguments where the body has some."""
    edit = read_body(call) or {}
    call.mlq.dead_letters.requeue(job_id, edit.get("args"), edit.get("kwargs"), edit.get("msg"))
    return call.json(shown(call, call.store.record(job_id)), 202)


@operation(
    "DELETE",
    "/dead/<job_id>",
    scope=ADMIN,
    tag="dead letters",
    answers={204: Answer("It is forgotten.")},
)
def purge_dead_letter(call: Call, job_id: str) -> Response:
    """Forget a dead letter: its record, its message and its error."""
    if not call.mlq.dead_letters.purge(job_id):
        call.mlq.dead_letters.show(job_id)  # raises, unless it has died just now
        call.mlq.dead_letters.purge(job_id)
    return Response(status=204)


Id = Annotated[str, Limits(min_length=1, max_length=128)]
Name = Annotated[str, Limits(min_length=1, max_length=200)]
Age = Annotated[float, Limits(ge=0, le=1e10)]


class Chosen(TypedDict, total=False):
    """Which dead letters are meant: those of these ids, or those that fit all filters."""

    ids: Annotated[list[Id], Limits(min_length=1, max_length=1000)]
    all: Annotated[bool, "True, with no filter, means every one."]
    actor: Name
    reason: DeadReason
    queue: Name
    older_than: Age
    newer_than: Age
    text: Name


def _filters(chosen: dict[str, Any]) -> DeadFilters:
    """The filters of a body. Raises `InvalidArguments` for one that says nothing: that must not mean everything."""
    filters: Any = {name: value for name, value in chosen.items() if name != "all"}
    if "ids" in chosen and len(chosen) > 1:
        fault = "stands beside filters; give ids, or filters"
        raise InvalidArguments(f"$.ids {fault}.", faults=[("$.ids", fault)])
    if not chosen.get("ids") and bool(filters) == bool(chosen.get("all")):
        fault = 'says not which are meant: give ids, filters, or {"all": true} alone for every one'
        raise InvalidArguments(f"the body {fault}.", faults=[("$", fault)])
    return filters  # type: ignore[no-any-return]


@operation(
    "POST",
    "/dead/requeue",
    scope=ADMIN,
    tag="dead letters",
    body={JSON: Chosen},
    answers={
        200: Answer(
            "Those that were put back.",
            {
                JSON: {
                    "type": "object",
                    "properties": {"requeued": {"type": "array", "items": {"type": "string"}}},
                    "required": ["requeued"],
                }
            },
        )
    },
)
def requeue_dead_letters(call: Call) -> Response:
    """Put many dead letters back into their queues: by ids, or by filters."""
    chosen = read_body(call)
    filters = _filters(chosen)
    letters = call.mlq.dead_letters
    back = letters.requeue_many(chosen["ids"]) if "ids" in chosen else letters.requeue_all(**filters)
    return call.json({"requeued": back})


@operation(
    "POST",
    "/dead/purge",
    scope=ADMIN,
    tag="dead letters",
    body={JSON: Chosen},
    answers={
        200: Answer(
            "How many were forgotten.",
            {JSON: {"type": "object", "properties": {"purged": {"type": "integer"}}, "required": ["purged"]}},
        )
    },
)
def purge_dead_letters(call: Call) -> Response:
    """Forget many dead letters: by ids, or by filters."""
    chosen = read_body(call)
    filters = _filters(chosen)
    letters = call.mlq.dead_letters
    gone = letters.purge(chosen["ids"]) if "ids" in chosen else letters.purge_all(**filters)
    return call.json({"purged": gone})


@operation(
    "GET",
    "/dead/export",
    scope=READ,
    tag="dead letters",
    parameters=FILTERS,
    answers={200: Answer("A line of JSON for each.", {LINES: {"type": "string"}})},
)
def export_dead_letters(call: Call) -> Response:
    """Export dead letters as JSON Lines, with all that is needed to import them: `mlqueue dead import`."""
    lines = call.mlq.dead_letters.lines(**call.query())
    first = next(lines, None)  # what cannot be reached is an answer, as long as nothing has been sent
    response = Response(_encoded(first, lines), content_type=LINES)
    response.headers["Content-Disposition"] = "attachment; filename=dead-letters.jsonl"
    response.headers["Cache-Control"] = "no-store"
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def _encoded(first: str | None, rest: Iterator[str]) -> Iterator[bytes]:
    if first is not None:
        yield first.encode()
        for line in rest:
            yield line.encode()
