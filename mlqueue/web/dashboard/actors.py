"""Submitting: the actors that may be called over HTTP, and a form for each, made from its signature."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from flask import Response

from ... import codec
from ...errors import ActorNotFound, InvalidArguments
from ..auth import READ, SUBMIT
from ..body import as_argument, from_json, resolved
from ..call import Call
from ..operation import operation
from ..submit import submit_call
from ..submit import submit_job as submitting
from .visit import Visit

__all__ = ["list_actors", "show_actor", "submit_job"]


class Field(NamedTuple):
    """A field of a form, for a parameter."""

    name: str
    #: ``text``, ``number``, ``choice``, ``file`` or ``json``.
    kind: str
    required: bool
    #: What it holds when nobody has written anything.
    default: str
    choices: list[str]
    #: What may be written.
    hint: str
    step: str = "any"


@operation("GET", "/actors", scope=READ, tag="pages", answers={})
def list_actors(visit: Visit) -> Response:
    """List the actors."""
    found = {**visit.mlq.broker.published, **visit.store.all_published()}
    return visit.page("actors", actors=[(name, codec.decode(data)) for name, data in sorted(found.items())])


@operation("GET", "/actors/<actor>", scope=READ, tag="pages", answers={})
def show_actor(visit: Visit, actor: str) -> Response:
    """Show the form of an actor."""
    published = _published(visit, actor)
    return visit.page("actor", actor=actor, published=published, fields=_fields(published), given={}, faults={})


def _published(visit: Visit, actor: str) -> dict[str, Any]:
    data = visit.store.published(actor) or visit.mlq.broker.published.get(actor)
    if data is None:
        raise ActorNotFound(f"no worker has declared an actor {actor!r} with http=True.")
    published: dict[str, Any] = codec.decode(data)
    return published


def _fields(published: Mapping[str, Any]) -> list[Field]:
    definitions = published.get("$defs", {})
    return [_field(item, definitions) for item in published["parameters"] if item["kind"] in ("any", "keyword")]


def _field(parameter: Mapping[str, Any], definitions: Mapping[str, Any]) -> Field:
    schema = resolved(parameter["schema"], definitions)
    default = parameter["schema"].get("default", schema.get("default"))
    written = "" if default is None else default if isinstance(default, str) else json.dumps(default)
    options = [resolved(part, definitions) for part in schema.get("anyOf", (schema,))]
    kinds = {part.get("type") for part in options if part.get("type") != "null"}
    choices = [str(value) for part in options for value in part.get("enum", ())]
    step = "any"
    if choices:
        kind = "choice"
    elif kinds == {"boolean"}:
        kind, choices = "choice", ["true", "false"]
    elif kinds and kinds <= {"integer", "number"}:
        kind, step = "number", "1" if kinds == {"integer"} else "any"
    elif any(part.get("format") == "binary" or "contentEncoding" in part for part in options):
        kind = "file"
    else:
        kind = "text" if kinds == {"string"} else "json"
    hint = schema.get("description") or ("JSON" if kind == "json" else "")
    return Field(parameter["name"], kind, bool(parameter["required"]), written, choices, hint, step)


@operation("POST", "/actors/<actor>", scope=SUBMIT, tag="pages", answers={})
def submit_job(visit: Visit, actor: str) -> Response:
    """Submit a job."""
    published = _published(visit, actor)
    form = visit.request.form
    call = Call(submitting, visit.mount, visit.request, {})
    call.principal = visit.principal
    visit.note("submit", actor)
    try:
        job_id = submit_call(call, actor, _body(visit, published))
    except InvalidArguments as error:
        given = {name: form.get(name, "") for name in form}
        faults = {path.rpartition("kwargs.")[2].removeprefix("$."): text for path, text in error.faults}
        fields = _fields(published)
        return visit.page("actor", 422, actor=actor, published=published, fields=fields, given=given, faults=faults)
    return visit.go("show_job", "submitted", job_id=job_id)


def _body(visit: Visit, published: Mapping[str, Any]) -> dict[str, Any]:
    """What the form asks for; a field that was left as empty as it was says nothing."""
    form, files = visit.request.form, visit.request.files
    definitions, schemas = published.get("$defs", {}), {p["name"]: p["schema"] for p in published["parameters"]}
    kwargs: dict[str, Any] = {}
    for field in _fields(published):
        text, file = form.get(f"arg.{field.name}", ""), files.get(f"arg.{field.name}")
        if file is not None and file.filename:
            kwargs[field.name] = file.stream.read()
        elif text and field.kind == "json":
            kwargs[field.name] = from_json(text.encode(), visit.mount.max_values)
        elif text or (field.required and field.kind == "text"):
            kwargs[field.name] = as_argument(text, schemas[field.name], definitions)
    body: dict[str, Any] = {"kwargs": kwargs}
    for name in ("delay", "priority"):
        if form.get(name):
            body[name] = as_argument(form[name], {"type": "number"}, {})
    if form.get("tags"):
        body["tags"] = [tag.strip() for tag in form["tags"].split(",") if tag.strip()]
    if form.get("callback"):
        body["callback"] = form["callback"]
    return body
