"""What else MLQ's users know: counts and texts, and functions that are posted to the workers."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Final, TypedDict

from flask import Response

from ..errors import FunctionNotFound, InvalidArguments, SignatureInvalid, SigningKeyMissing
from ..functions import MAX_NAME, Functions, PostedFunction, keyring
from ..posted import progress_text
from ..schema import Limits, schema_of
from ..values import plain
from .auth import FUNCTIONS, READ
from .body import read_body
from .call import Call
from .operation import JSON, MSGPACK, TEXT, Answer, Parameter, operation
from .results import NO_RESULT
from .shapes import text_or

__all__ = ["add_consumer", "count_jobs", "list_functions", "read_progress", "read_short_result", "remove_consumer"]


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


class Signed(TypedDict):
    """A function as `mlqueue.sign_function` has signed it."""

    name: Annotated[str, Limits(min_length=1, max_length=MAX_NAME)]
    serial: Annotated[int, "Higher than that of what was posted under the name before.", Limits(ge=1, le=2**53)]
    time: Annotated[int, "When it was signed; Unix seconds.", Limits(ge=0, le=1e10)]
    code: Annotated[bytes, "The function, as cloudpickle has it."]
    signature: Annotated[bytes, "Of all that and the namespace, under a key of the workers."]


#: The same, or its name alone.
NAMED: Final = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 1, "maxLength": MAX_NAME}},
    "required": ["name"],
}

FUNCTION: Final = schema_of(PostedFunction)
FUNCTION_LIST: Final = {
    "type": "object",
    "properties": {"functions": {"type": "array", "items": FUNCTION["$defs"]["PostedFunction"]}},
    "required": ["functions"],
}
NAME_TEXT: Final = {"type": "string", "description": "The name of the function."}


@operation(
    "POST",
    "/consumer",
    scope=FUNCTIONS,
    tag="mlq",
    text=True,
    body={JSON: Signed, MSGPACK: Signed},
    answers={201: Answer("It is posted: its name, or what is known of it.", {TEXT: NAME_TEXT, JSON: FUNCTION})},
    errors=(SigningKeyMissing, SignatureInvalid),
)
def add_consumer(call: Call) -> Response:
    """Post a function to all workers, those included that start later.

    The body is what `mlqueue.sign_function(fn, key)` gives. It is refused where no signing key is set, when it was
    signed by another one, five minutes ago or before, or was sent before. Here nothing of it is unpickled.
    """
    keyring(call.mlq.settings)  # where it is off it is off for everybody, whatever he sends
    function = Functions(call.store).take(*_parts(read_body(call)))
    if not call.wants_json:
        return call.text(function.name, 201)
    return call.json(dataclasses.asdict(function), 201)


def _parts(body: dict[str, Any]) -> tuple[str, int, int, bytes, bytes]:
    return body["name"], body["serial"], body["time"], body["code"], body["signature"]


@operation(
    "DELETE",
    "/consumer",
    scope=FUNCTIONS,
    tag="mlq",
    text=True,
    parameters=(Parameter("name", "query", NAME_TEXT, "Its name, for who cannot send a body with DELETE."),),
    body={JSON: NAMED, MSGPACK: NAMED},
    body_required=False,
    answers={200: Answer("It is removed: its name.", {TEXT: NAME_TEXT, JSON: NAMED})},
    errors=(SigningKeyMissing, FunctionNotFound),
)
def remove_consumer(call: Call) -> Response:
    """Take a posted function from all workers.

    The body is `{"name": ...}`, or the one that it was posted with. It cannot be posted with that again.
    """
    keyring(call.mlq.settings)
    name = (read_body(call) or call.query()).get("name")
    if name is None:
        raise InvalidArguments(
            'the name of the function is missing; send {"name": ...} as JSON, or ?name=... behind the path.',
            faults=[("$.name", "is missing")],
        )
    Functions(call.store).remove(name)
    return call.json({"name": name}) if call.wants_json else call.text(name)


@operation(
    "GET",
    "/functions",
    scope=READ,
    tag="mlq",
    answers={200: Answer("The functions, in the order in which they run.", {JSON: FUNCTION_LIST})},
)
def list_functions(call: Call) -> Response:
    """List the posted functions: name, serial, times and size of each, and why a worker could not load it."""
    return call.json({"functions": [dataclasses.asdict(one) for one in Functions(call.store).list()]})
