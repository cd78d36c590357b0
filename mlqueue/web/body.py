"""Reading the body of a request: JSON, MessagePack or multipart, bounded in bytes, values and depth, and checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from .. import codec
from ..errors import DecodeError, InvalidArguments, RequestError, UnsupportedBody
from ..schema import Schema, check
from .call import Call
from .operation import JSON, MSGPACK, MULTIPART
from .problems import too_large

__all__ = ["as_argument", "from_json", "read_body"]

#: Other names of the media types that are taken.
SYNONYMS: Final = {"application/x-msgpack": MSGPACK, "application/vnd.msgpack": MSGPACK}

#: How many lists and objects may stand within each other.
MAX_DEPTH: Final = codec.MAX_DEPTH

#: A text in JSON, or the rest where it has no end. Possessive: it never looks at a byte twice.
_TEXT: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z)', re.DOTALL)


def read_body(call: Call) -> Any:
    """The body, as the operation's schema for its media type has it; None when there is none and there need not be.

    Raises `UnsupportedBody`, `RequestError` for what cannot be parsed, `InvalidArguments` with the path to each fault;
    Werkzeug raises its error for one that is too large.
    """
    request, shapes = call.request, call.operation.body
    kind = SYNONYMS.get(request.mimetype, request.mimetype)
    if not kind and not call.operation.body_required and not request.content_length:
        return None
    schema = shapes.get(kind)
    if schema is None:
        raise UnsupportedBody(
            f"Content-Type: {request.mimetype[:100] or 'there is none'}; send {', '.join(shapes)}"
            f"{', such as -H `Content-Type: application/json`' if JSON in shapes else ''}."
        )
    if kind == MULTIPART:
        return check(schema, _multipart(call, schema))
    data = request.get_data(cache=False)
    if request.content_length is None and len(data) >= call.mount.max_body:
        raise too_large(call.mount.max_body)  # Werkzeug cuts a body without a length off there
    if not data:
        if not call.operation.body_required:
            return None
        raise RequestError(f"the body is empty; send {', '.join(shapes)}.")
    value = _msgpack(data, call.mount.max_values) if kind == MSGPACK else from_json(data, call.mount.max_values)
    return check(schema, value)


def from_json(data: bytes, max_values: int) -> Any:
    """The value of a JSON text. Raises `RequestError` and, when it is too deep or has too many values,
    `InvalidArguments`."""
    if _tokens(data) > max_values and _has_more_values(data, max_values):
        _refuse(f"has more than {max_values:,} values", "Send large arrays as bytes, or in a MessagePack body")
    try:
        value = json.loads(data, parse_constant=_not_json)
    except RecursionError:
        _refuse_depth()
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {str(error)[:200]}.") from None
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH:
        _check_depth(value)
    return value


def _tokens(data: bytes) -> int:
    """As many as the values in a JSON text, or more."""
    return data.count(b",") + data.count(b"[") + data.count(b"{")


def _has_more_values(data: bytes, most: int) -> bool:
    """Whether there are more, those in texts not counted. Gathers nothing, and stops as soon as it knows."""
    seen, place = 0, 0
    for text in _TEXT.finditer(data):
        seen += _tokens(data[place : text.start()])
        place = text.end()
        if seen > most:
            return True
    return seen + _tokens(data[place:]) > most


def _not_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            part
            for item in level
            if isinstance(item, list | dict)
            for part in (item.values() if isinstance(item, dict) else item)
            if isinstance(part, list | dict)
        ]
        if not level:
            return
    _refuse_depth()


def _refuse_depth() -> NoReturn:
    _refuse(f"has more than {MAX_DEPTH} lists and objects within each other", "Flatten it, or send it as text")


def _refuse(fault: str, cure: str) -> NoReturn:
    raise InvalidArguments(f"the body {fault}. {cure}.", faults=[("$", fault)])


def _msgpack(data: bytes, max_values: int) -> Any:
    try:
        return codec.decode(data, max_values=max_values)
    except DecodeError as error:
        raise RequestError(f"the body is not MessagePack that can be taken: {error.message}") from None


def _multipart(call: Call, schema: Schema) -> dict[str, Any]:
    """The members that the parts of a form are. A part with a file's name is bytes, or JSON if that is its type;
    another one is a text, or what its schema asks for."""
    request = call.request
    if not request.mimetype_params.get("boundary"):
        raise RequestError("the body is multipart/form-data without a boundary in its Content-Type.")
    definitions = schema.get("$defs", {})
    properties = resolved(schema, definitions).get("properties", {})
    found: dict[str, Any] = {}
    for name, texts in request.form.lists():
        part = properties.get(name, {})
        if _is_list(part):
            found[name] = texts
        else:
            found[name] = as_argument(_only(name, texts), part, definitions)
    for name, files in request.files.lists():
        file = _only(name, [*([found[name]] if name in found else []), *files])
        data = file.stream.read()
        found[name] = from_json(data, call.mount.max_values) if file.mimetype == JSON else data
    return found


def as_argument(value: Any, schema: Schema, definitions: Mapping[str, Schema]) -> Any:
    """What a part of a form stands for: a text is a text where its schema allows one, and JSON elsewhere."""
    if not isinstance(value, str) or not schema:
        return value
    schema = resolved(schema, definitions)
    parts = [resolved(part, definitions) for part in schema.get("anyOf", (schema,))]
    kinds = {kind for part in parts for kind in _kinds(part)}
    if "string" in kinds:
        return value
    try:
        return json.loads(value, parse_constant=_not_json)
    except (ValueError, RecursionError):
        return value  # the check says what is allowed


def resolved(schema: Schema, definitions: Mapping[str, Schema]) -> Schema:
    """The schema, or the one that it refers to."""
    return definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _kinds(schema: Schema) -> list[str]:
    if "enum" in schema:
        return ["string"] if any(isinstance(value, str) for value in schema["enum"]) else []
    kind = schema.get("type", [])
    return kind if isinstance(kind, list) else [kind]


def _is_list(schema: Schema) -> bool:
    return any("array" in _kinds(part) for part in schema.get("anyOf", (schema,)))


def _only(name: str, values: list[Any]) -> Any:
    if len(values) > 1:
        raise InvalidArguments(
            f"the part {name[:100]!r} is there {len(values)} times; once is allowed.",
            faults=[(f"$.{name[:100]}", "is given several times")],
        )
    return values[0]
