"""Actors that may be called over HTTP, with what they take."""

from __future__ import annotations

from typing import Any, Final

from flask import Response

from .. import codec
from .auth import READ
from .call import Call
from .operation import JSON, Answer, operation

__all__ = ["list_actors"]

ACTOR: Final = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "queue": {"type": "string"},
        "description": {"type": ["string", "null"]},
        "url": {"type": "string"},
        "parameters": {"type": "array", "items": {"type": "object"}},
    },
    "required": ["name", "queue", "url", "parameters"],
}
ACTORS: Final = {"type": "object", "properties": {"actors": {"type": "array", "items": ACTOR}}, "required": ["actors"]}

LINKS: Final = {"submit_job": {"actor": "$response.body#/actors/0/name"}}


@operation(
    "GET", "/actors", scope=READ, tag="actors", answers={200: Answer("The actors.", {JSON: ACTORS}, links=LINKS)}
)
def list_actors(call: Call) -> Response:
    """List the actors that may be called: those that workers have declared with `http=True`.

    Each with its parameters in order: name, kind, schema (JSON Schema) and whether it is required.
    """
    found = {**call.mlq.broker.published, **call.store.all_published()}
    return call.json({"actors": [_shown(call, name, codec.decode(data)) for name, data in sorted(found.items())]})


def _shown(call: Call, name: str, published: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "queue": published["queue"],
        "description": published.get("description"),
        "url": call.url("submit_job", actor=name),
        "parameters": published["parameters"],
        **({"$defs": published["$defs"]} if "$defs" in published else {}),
    }
