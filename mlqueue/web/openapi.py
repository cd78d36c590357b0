"""The OpenAPI document, made from the table of routes, and a page to read it that needs no network and no script."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from http import HTTPStatus
from typing import Any, Final

from flask import Response

from .. import __version__
from ..errors import MLQueueError, StoreError
from ..schema import Schema
from .call import Call
from .operation import JSON, PATHS, TEXT, Answer, Operation, Parameter, operation
from .problems import PROBLEM, PROBLEM_SCHEMA

__all__ = ["document", "show_document", "show_reference"]

#: The security scheme of the API keys.
BEARER: Final = "key"

DESCRIPTION: Final = """\
Jobs for machine-learning workers: submit them, watch them, read their results.

Errors are application/problem+json (RFC 9457); where a route answers text, they are text unless JSON is asked for by
Accept. Options of a job are callback, webhook, delay, priority and tags.
"""


def document(operations: Iterable[Operation], base: str) -> dict[str, Any]:
    """The OpenAPI 3.1 document of these operations, mounted at `base`."""
    components: dict[str, Any] = {"Problem": PROBLEM_SCHEMA}
    paths: dict[str, dict[str, Any]] = {}
    for one in operations:
        path = re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", one.rule)
        paths.setdefault(path, {})[one.method.lower()] = _described(one, components)
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlqueue", "version": __version__, "description": DESCRIPTION},
        "servers": [{"url": base or "/"}],
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {BEARER: {"type": "http", "scheme": "bearer", "bearerFormat": "mlq_<id>_<secret>"}},
        },
    }


def _described(one: Operation, components: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {
        "operationId": one.name,
        "tags": [one.tag],
        "summary": one.summary,
        "responses": {
            **{str(status): _answer(answer, components) for status, answer in one.answers.items()},
            **_errors(one),
        },
        "security": [] if one.scope is None else [{BEARER: [one.scope]}],
    }
    if one.description:
        described["description"] = one.description
    parameters = [_in_path(name) for name in one.path_names] + [_parameter(item) for item in one.parameters]
    if parameters:
        described["parameters"] = parameters
    if one.body:
        content = {kind: {"schema": _referring(schema, components)} for kind, schema in one.body.items()}
        described["requestBody"] = {"required": one.body_required, "content": content}
    return described


def _answer(answer: Answer, components: dict[str, Any]) -> dict[str, Any]:
    described: dict[str, Any] = {"description": answer.description}
    if answer.content:
        described["content"] = {
            kind: {"schema": _referring(schema, components)} for kind, schema in answer.content.items()
        }
    if answer.links:
        described["links"] = {
            name: {"operationId": name, "parameters": dict(parameters)} for name, parameters in answer.links.items()
        }
    if answer.headers:
        described["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()
        }
    return described


def _errors(one: Operation) -> dict[str, Any]:
    """The answers that are errors, by status."""
    by_status: dict[int, list[type[MLQueueError]]] = {}
    for kind in one.all_errors:
        by_status.setdefault(kind.status, []).append(kind)
    described = {}
    for status in sorted(by_status.keys() - one.answers.keys()):
        kinds = by_status[status]
        content: dict[str, Any] = {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}}
        if one.text:
            content[TEXT] = {"schema": {"type": "string"}}
        found: dict[str, Any] = {"description": " ".join(_says(kind) for kind in kinds), "content": content}
        headers = _error_headers(kinds)
        if headers:
            found["headers"] = {name: {"schema": {"type": "string"}} for name in headers}
        described[str(status)] = found
    return described


def _says(kind: type[MLQueueError]) -> str:
    text = " ".join((kind.__doc__ or "").split("\n\n")[0].split())
    return f"{kind.__name__}: {text}"


def _error_headers(kinds: Iterable[type[MLQueueError]]) -> list[str]:
    headers = []
    for kind in kinds:
        if kind.status in (401, 403):
            headers.append("WWW-Authenticate")
        if issubclass(kind, StoreError):
            headers.append("Retry-After")
    return list(dict.fromkeys(headers))


def _in_path(name: str) -> dict[str, Any]:
    schema, text = PATHS[name]
    return {"name": name, "in": "path", "required": True, "description": text, "schema": schema}


def _parameter(item: Parameter) -> dict[str, Any]:
    schema = {"type": "array", "items": item.schema} if item.many else item.schema
    return {"name": item.name, "in": item.place, "required": False, "description": item.description, "schema": schema}


def _referring(schema: Any, components: dict[str, Any]) -> Any:
    """The schema, what it defines moved to the components."""
    if isinstance(schema, Mapping):
        for name, definition in schema.get("$defs", {}).items():
            moved = components.setdefault(name, {})
            if not moved:
                moved.update(_referring(definition, components))
        found = {name: _referring(value, components) for name, value in schema.items() if name != "$defs"}
        if isinstance(found.get("$ref"), str):
            found["$ref"] = found["$ref"].replace("#/$defs/", "#/components/schemas/")
        return found
    return [_referring(item, components) for item in schema] if isinstance(schema, list) else schema


def _document(call: Call) -> dict[str, Any]:
    base = call.url("show_document").removesuffix("/openapi.json")
    return document(call.mount.operations, base)


@operation(
    "GET",
    "/openapi.json",
    scope=None,
    tag="reference",
    answers={200: Answer("The document.", {JSON: {"type": "object"}})},
)
def show_document(call: Call) -> Response:
    """The OpenAPI 3.1 document of these routes."""
    return call.json(_document(call))


STYLE: Final = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { overflow-x: auto; padding: .5rem; border: 1px solid #8886; border-radius: 4px; }
section { border-top: 1px solid #8886; margin-top: 1.5rem; }
h3 { margin-bottom: .25rem; }
table { border-collapse: collapse; }
td, th { text-align: left; vertical-align: top; padding: .15rem .75rem .15rem 0; }
.method { display: inline-block; min-width: 4.5rem; }
nav ul { columns: 2 20rem; padding-left: 1rem; }
"""

#: Nothing runs on the page, and nothing is loaded: the style stands in it, and is known by its hash.
PAGE_POLICY: Final = (
    "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'self'; style-src "
    f"'sha256-{base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()}'"
)


@operation(
    "GET",
    "/docs",
    scope=None,
    tag="reference",
    answers={200: Answer("The page.", {"text/html": {"type": "string"}})},
)
def show_reference(call: Call) -> Response:
    """This reference, as a page that needs no network."""
    response = Response(_page(_document(call), call.url("show_document")), content_type="text/html; charset=utf-8")
    response.headers["Content-Security-Policy"] = PAGE_POLICY
    response.headers["X-Content-Type-Options"] = "nosniff"
    response.headers["Cache-Control"] = "no-cache"
    return response


def _page(found: Mapping[str, Any], source: str) -> str:
    operations = [(path, method, one) for path, methods in found["paths"].items() for method, one in methods.items()]
    by_tag: dict[str, list[tuple[str, str, Any]]] = {}
    for item in operations:
        by_tag.setdefault(item[2]["tags"][0], []).append(item)
    contents = "".join(
        f"<h2>{escape(tag)}</h2><ul>{''.join(_entry(*item) for item in items)}</ul>" for tag, items in by_tag.items()
    )
    sections = "".join(_section(*item, found["servers"][0]["url"]) for items in by_tag.values() for item in items)
    schemas = "".join(
        f'<section id="schema-{escape(name)}"><h3>{escape(name)}</h3>{_pre(schema)}</section>'
        for name, schema in found["components"]["schemas"].items()
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mlqueue {escape(found['info']['version'])}</title><style>{STYLE}</style></head><body>"
        f"<h1>mlqueue {escape(found['info']['version'])}</h1><p>{escape(found['info']['description'])}</p>"
        f'<p>As a document for programs: <a href="{escape(source)}">openapi.json</a></p>'
        f"<nav>{contents}</nav><main>{sections}<h2>Schemas</h2>{schemas}</main></body></html>"
    )


def _entry(path: str, method: str, one: Mapping[str, Any]) -> str:
    name = escape(one["operationId"])
    return (
        f'<li><a href="#{name}"><code class="method">{method.upper()}</code> <code>{escape(path)}</code></a> '
        f"{escape(one['summary'])}</li>"
    )


def _section(path: str, method: str, one: Mapping[str, Any], base: str) -> str:
    scope = one["security"][0][BEARER][0] if one["security"] else ""
    url = escape(base.rstrip("/") + path)
    parts = [
        f'<section id="{escape(one["operationId"])}"><h3><code>{method.upper()} {url}</code></h3>',
        f"<p>{escape(one['summary'])}</p>",
    ]
    if one.get("description"):
        parts.append(f"<p>{escape(one['description'])}</p>")
    parts.append(f"<p>Scope: {escape(scope)}.</p>" if scope else "<p>For everybody.</p>")
    if one.get("parameters"):
        parts.append(_table(("parameter", "in", "", ""), map(_row, one["parameters"])))
    for kind, body in one.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>Body, <code>{escape(kind)}</code>:</p>{_pre(body['schema'])}")
    answers = [
        (status, HTTPStatus(int(status)).phrase, answer["description"], ", ".join(answer.get("content", {})))
        for status, answer in one["responses"].items()
    ]
    parts.append(_table(("answer", "", "", "as"), answers))
    return "".join(parts) + "</section>"


def _row(parameter: Mapping[str, Any]) -> tuple[str, ...]:
    return parameter["name"], parameter["in"], json.dumps(parameter["schema"]), parameter["description"]


def _table(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _pre(schema: Schema) -> str:
    return f"<pre>{escape(json.dumps(schema, indent=2, ensure_ascii=False))}</pre>"
