"""Submitting: a message for MLQ's listeners, the call of an actor, many of either at once.

A request that comes again with the same ``Idempotency-Key`` creates nothing: the script that creates the jobs keeps the
key with their ids, for a day. Only the options of `mlqueue.web.shapes.Options` may be chosen here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from dramatiq import Message
from flask import Response

from .. import codec
from ..app import message_options
from ..errors import ActorNotFound, EncodeError, Forbidden, InvalidArguments, JobExists, JobNotFound, KeyReused
from ..job import new_id
from ..listeners import QUEUE
from ..message import LISTENER, OPTION_CHECKS
from ..schema import bind, check
from ..store.store import Submitted
from ..waiting import wait_for
from .auth import SUBMIT
from .body import as_argument, from_json, read_body
from .call import Call
from .operation import JSON, MSGPACK, MULTIPART, TEXT, Answer, Parameter, as_schema, operation
from .records import shown
from .results import send_result, with_result
from .shapes import ID_TEXT, OPTIONS, RECORD, Post, Submit

#: For how long an idempotency key is kept, in seconds.
KEY_HOLDS: Final = 86400.0

#: The longest idempotency key, in characters.
MAX_KEY: Final = 255

#: How many jobs one request submits at most: they are created by one call of the store.
MAX_BULK: Final = 500

IDEMPOTENCY_KEY: Final = Parameter(
    "Idempotency-Key",
    "header",
    {"type": "string", "minLength": 1, "maxLength": MAX_KEY},
    "Makes the request one that may be sent again: for a day the same key with the same request creates nothing, and "
    "answers with the jobs of the first.",
)
PREFER: Final = Parameter(
    "Prefer",
    "header",
    {"type": "string"},
    "`wait=N` waits up to N seconds for the end of the job, and answers 200 with the result when it comes in time.",
)

LOCATION: Final = {
    "Location": "Where the record of the job is.",
    "Idempotent-Replayed": "true, when the Idempotency-Key has come before.",
}

ACCEPTED: Final = Answer("The job exists; this is its record.", {JSON: RECORD}, LOCATION)
WAITED: Final = Answer("The job has ended within the time to wait.", {JSON: RECORD}, LOCATION)


#: The schemas of what a bulk request has in it.
_POST: Final = as_schema(Post)
_SUBMIT: Final = as_schema(Submit)


class Chosen(NamedTuple):
    """A job as it is asked for."""

    actor: str
    queue: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: What the actor declares for its jobs.
    defaults: Mapping[str, Any]
    #: What the request says.
    options: Mapping[str, Any]


@operation(
    "POST",
    "/jobs",
    scope=SUBMIT,
    tag="jobs",
    text=True,
    confirms_keys=True,
    parameters=(IDEMPOTENCY_KEY, PREFER),
    body={JSON: Post, MSGPACK: Post, MULTIPART: Post},
    errors=(KeyReused, JobNotFound, JobExists),
    answers={
        202: Answer("The job exists; this is its id, or its record.", {TEXT: ID_TEXT, JSON: RECORD}, LOCATION),
        200: Answer(
            "It has ended within the time to wait: its result, or its record.", {TEXT: {}, JSON: RECORD}, LOCATION
        ),
    },
)
def post_job(call: Call) -> Response:
    """Post a message for MLQ's listeners.

    The body is `{"msg": ..., "callback"?: url, "functions"?: [names]}` and the options. In a form (multipart/form-data)
    each part is a member; a file is bytes.
    """
    return _answer(call, [_posted(read_body(call))])


@operation(
    "POST",
    "/actors/<actor>",
    scope=SUBMIT,
    tag="actors",
    confirms_keys=True,
    parameters=(IDEMPOTENCY_KEY, PREFER),
    body={JSON: Submit, MSGPACK: Submit, MULTIPART: {"type": "object"}},
    body_required=False,
    errors=(KeyReused, ActorNotFound, JobNotFound, JobExists),
    answers={202: ACCEPTED, 200: WAITED},
)
def submit_job(call: Call, actor: str) -> Response:
    """Submit a job of an actor that is declared with `http=True`.

    The body is `{"args"?: [...], "kwargs"?: {...}}` and the options. In a form (multipart/form-data) each part is an
    argument of its name: a file is bytes, a text what the actor's type hint says. A part named `json`, of type
    application/json, is a body as above that the other parts add to.
    """
    published = _published(call, actor)
    if call.request.mimetype == MULTIPART:
        body = _from_form(read_body(call), published, call.mount.max_values)
    else:
        body = read_body(call) or {}
    return _answer(call, [_called(call, actor, body, published)])


BULK: Final = {
    "type": "object",
    "properties": {
        "jobs": {
            "type": "array",
            "minItems": 1,
            "maxItems": MAX_BULK,
            "description": "Each a body as POST /jobs takes it, or one as POST /actors/{actor} does, with the member "
            "`actor`.",
            "items": {"type": "object"},
        }
    },
    "required": ["jobs"],
    "additionalProperties": False,
}

BULK_ANSWER: Final = {
    "type": "object",
    "properties": {
        "jobs": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"id": {"type": "string"}, "url": {"type": "string"}},
                "required": ["id", "url"],
            },
        }
    },
    "required": ["jobs"],
}


@operation(
    "POST",
    "/jobs/bulk",
    scope=SUBMIT,
    tag="jobs",
    confirms_keys=True,
    parameters=(IDEMPOTENCY_KEY,),
    body={JSON: BULK, MSGPACK: BULK},
    errors=(KeyReused, ActorNotFound, JobNotFound, JobExists),
    answers={202: Answer("The jobs exist; in the order of the request.", {JSON: BULK_ANSWER})},
)
def submit_jobs(call: Call) -> Response:
    """Submit many jobs at once: all of them, or none.

    The body is `{"jobs": [...]}` with up to 500 jobs: `{"msg": ...}` or `{"actor": name, "args"?, "kwargs"?}`, each
    with its options.
    """
    published: dict[str, dict[str, Any]] = {}
    chosen = []
    for index, item in enumerate(read_body(call)["jobs"]):
        with _within(f"$.jobs[{index}]"):
            if "actor" in item:
                actor = check({"type": "string", "minLength": 1, "maxLength": 200}, item["actor"], "$.actor")
                if actor not in published:
                    published[actor] = _published(call, actor)
                body = check(_SUBMIT, {name: value for name, value in item.items() if name != "actor"})
                chosen.append(_called(call, actor, body, published[actor]))
            else:
                chosen.append(_posted(check(_POST, item)))
    submitted = _enqueue(call, chosen)
    jobs = [{"id": job_id, "url": f"{call.jobs_url}/{job_id}"} for job_id in submitted.ids]
    return call.json({"jobs": jobs}, 202, _replayed(submitted))


# What is asked for


def _posted(body: Mapping[str, Any]) -> Chosen:
    options = {**_options(body), "functions": body.get("functions")}
    return Chosen(LISTENER, QUEUE, (body["msg"],), {}, {"result_ttl": None}, options)


def _called(call: Call, actor: str, body: Mapping[str, Any], published: Mapping[str, Any]) -> Chosen:
    args, kwargs = bind(published, body.get("args", ()), body.get("kwargs", {}))
    options = _options(body)
    if actor not in call.mlq.broker.actors:
        for name in published.get("keys", ()):
            if name not in options:
                text = f"is made of the arguments by a function of the actor {actor}, which is not here; give it"
                raise InvalidArguments(f"$.{name} {text}.", faults=[(f"$.{name}", text)])
    return Chosen(actor, published["queue"], args, kwargs, published["defaults"], options)


def _options(body: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: body[name] for name in OPTIONS if body.get(name) is not None}
    for name in given.keys() & OPTION_CHECKS.keys():
        allows, allowed = OPTION_CHECKS[name]
        if not allows(given[name]):
            raise InvalidArguments(f"$.{name} must be {allowed}.", faults=[(f"$.{name}", f"must be {allowed}")])
    return given


def _published(call: Call, actor: str) -> dict[str, Any]:
    """What a worker has told of an actor. Raises `ActorNotFound`, and `Forbidden` for one that is not for HTTP."""
    data = call.store.published(actor) or call.mlq.broker.published.get(actor)
    if data is not None:
        return _decoded(data)
    if call.store.queue_of(actor) is not None:
        raise Forbidden(
            f"the actor {actor!r} may not be called over HTTP; declare it with @mlq.actor(http=True), if it should, "
            "and start its workers anew."
        )
    raise ActorNotFound(
        f"no worker has declared an actor {actor!r} with http=True; GET {call.url('list_actors')} lists those that "
        "may be called. A worker tells of its actors when it starts."
    )


@functools.lru_cache(maxsize=64)
def _decoded(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = codec.decode(data)
    return found


def _from_form(parts: Mapping[str, Any], published: Mapping[str, Any], max_values: int) -> dict[str, Any]:
    """The body that a form stands for."""
    given = dict(parts)
    called = given.pop("json", {})
    if isinstance(called, str):
        called = from_json(called.encode(), max_values)
    body = check(_SUBMIT, called)
    parameters = {item["name"]: item["schema"] for item in published["parameters"]}
    kwargs = {
        name: as_argument(value, parameters.get(name, {}), published.get("$defs", {})) for name, value in given.items()
    }
    return {**body, "kwargs": {**body.get("kwargs", {}), **kwargs}}


@contextlib.contextmanager
def _within(path: str) -> Iterator[None]:
    """Faults within are told with the path to here."""
    try:
        yield
    except InvalidArguments as error:
        faults = [(path + fault.removeprefix("$"), text) for fault, text in error.faults]
        raise InvalidArguments(f"{path}: {error.message}", faults=faults) from None


# Creating it


def _enqueue(call: Call, chosen: Sequence[Chosen], *, wants_record: bool = False) -> Submitted:
    """Creates the jobs, unless they have been."""
    key = _idempotency_key(call)
    fingerprint = _fingerprint(call, chosen) if key else b""
    messages = [_message(one) for one in chosen]
    try:
        return call.mlq.broker.enqueue_once(
            messages, key, fingerprint, KEY_HOLDS, seen=call.take_unconfirmed(), wants_record=wants_record
        )
    except KeyReused:
        raise KeyReused(
            "this Idempotency-Key came with another request within the last day. Send each request with a key of its "
            "own, and the same key only to send the same request again."
        ) from None
    except EncodeError as error:
        if chosen[0].actor == LISTENER and len(chosen) == 1:
            # The message that was posted is the one argument of the listener.
            path = error.path.replace("args[0]", "msg", 1)
            raise EncodeError(error.message.replace("args[0]", "msg"), path=path) from None
        raise


def _message(chosen: Chosen) -> tuple[Message[Any], int | None]:
    options, delay, _ = message_options(chosen.options)
    message: Message[Any] = Message(
        queue_name=chosen.queue,
        actor_name=chosen.actor,
        args=tuple(chosen.args),
        kwargs=dict(chosen.kwargs),
        options={**chosen.defaults, **options},
        message_id=new_id(),
    )
    return message, delay


def _idempotency_key(call: Call) -> str:
    """The request's key, as the store has it: everybody has keys of his own. Empty when there is none."""
    given = call.request.headers.get("Idempotency-Key")
    if given is None:
        return ""
    # The draft has it between quotation marks, most who use it do not.
    key = given.strip()
    key = key[1:-1] if len(key) > 1 and key[0] == key[-1] == '"' else key
    if not re.fullmatch(rf"[\x20-\x7e]{{1,{MAX_KEY}}}", key):
        fault = f"is no text of 1 to {MAX_KEY} printable ASCII characters"
        raise InvalidArguments(f"Idempotency-Key {fault}; a UUID is a good one.", faults=[("Idempotency-Key", fault)])
    whose = call.principal.name if call.principal else ""
    return hashlib.sha256(f"{whose}\n{key}".encode()).hexdigest()


def _fingerprint(call: Call, chosen: Sequence[Chosen]) -> bytes:
    """What tells a request from others: all that is asked for, however it was written."""
    digest = hashlib.sha256()
    for one in chosen:
        options = {"actor": one.actor, **one.options}
        most = call.mlq.settings.max_message_bytes
        encoded = codec.encode_call(one.args, dict(sorted(one.kwargs.items())), options, max_bytes=most)
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.digest()


# Answering


def _answer(call: Call, chosen: Sequence[Chosen]) -> Response:
    wants_json = call.wants_json
    submitted = _enqueue(call, chosen, wants_record=wants_json)
    [job_id] = submitted.ids
    headers = {"Location": f"{call.jobs_url}/{job_id}", **_replayed(submitted)}
    with call.waiting() as seconds:
        ended = bool(seconds) and wait_for(call.store, job_id, seconds)
    if seconds:
        headers["Preference-Applied"] = f"wait={seconds:g}"
    if not wants_json:
        return send_result(call, job_id, headers=headers) if ended else call.text(job_id, 202, headers)
    if ended:
        return call.json(with_result(call, call.store.record(job_id)), 200, headers)
    record = call.store.record(job_id) if seconds or submitted.record is None else submitted.record
    return call.json(shown(call, record), 202, headers)


def _replayed(submitted: Submitted) -> dict[str, str]:
    return {} if submitted.new else {"Idempotent-Replayed": "true"}


def submit_call(call: Call, actor: str, body: Mapping[str, Any]) -> str:
    """Submits the call of an actor that `body` asks for, as `submit_job` does; the id of the job."""
    return _enqueue(call, [_called(call, actor, check(_SUBMIT, body), _published(call, actor))]).ids[0]


__all__ = ["post_job", "submit_call", "submit_job", "submit_jobs"]
