"""JSON Schemas of type hints, and values checked against them.

A worker publishes the schema of each actor that is declared with ``http=True``, so that a web process, which has none
of its code, can refuse a call that the actor would not take. The subset of JSON Schema (2020-12) used here: ``type``,
``enum``, ``const``, ``anyOf``, ``minimum``, ``maximum``, ``minLength``, ``maxLength``, ``pattern``, ``minItems``,
``maxItems``, ``items``, ``prefixItems``, ``properties``, ``required``, ``additionalProperties``, ``$ref`` into
``$defs``, ``contentEncoding: base64`` for bytes, and of ``format`` ``date-time``, ``date``, and, of our own,
``seconds`` (a timedelta) and ``ndarray``. What else a schema has (``title``, ``default`` ...) is for readers.

`check` gives the value as the actor is to get it: base64 has become bytes, and an ISO text a datetime, where the schema
says so. Values that are that already (from MessagePack) pass.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import enum
import inspect
import math
import re
import types
import typing
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, Final, NamedTuple

from .errors import InvalidArguments, InvalidJob

__all__ = ["Limits", "Schema", "bind", "check", "schema_of", "signature_of"]

Schema = Mapping[str, Any]

#: How many faults of one value are told.
MOST_FAULTS: Final = 20


class Limits(NamedTuple):
    """Bounds for ``Annotated[int, Limits(ge=1)]``. Those of annotated_types and msgspec.Meta have these names too, and
    are understood as well."""

    ge: float | None = None
    le: float | None = None
    #: Of a text or a list.
    min_length: int | None = None
    max_length: int | None = None
    pattern: str | None = None


#: The keyword of each limit, for a number or a text, and for a list.
KEYWORDS: Final = {
    "ge": ("minimum", ""),
    "le": ("maximum", ""),
    "min_length": ("minLength", "minItems"),
    "max_length": ("maxLength", "maxItems"),
    "pattern": ("pattern", ""),
}

#: Hints that stand for themselves.
PLAIN: Final[Mapping[Any, Schema]] = {
    None: {"type": "null"},
    types.NoneType: {"type": "null"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    str: {"type": "string"},
    bytes: {"type": "string", "contentEncoding": "base64"},
    datetime: {"type": "string", "format": "date-time"},
    date: {"type": "string", "format": "date"},
    timedelta: {"type": "number", "format": "seconds"},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
    object: {},
}

#: Generic types that arrive as a list, and as a dict.
LISTS: Final = ("list", "Sequence", "MutableSequence", "Iterable", "Collection")
DICTS: Final = ("dict", "Mapping", "MutableMapping")


# Schemas of hints


def schema_of(hint: Any) -> dict[str, Any]:
    """The schema of a type hint. Raises `TypeError` for one that no JSON stands for."""
    definitions: dict[str, Any] = {}
    schema = _Describe(definitions)(hint)
    return {**schema, "$defs": definitions} if definitions else schema


class _Describe:
    """Makes schemas; those of classes with fields are gathered in `definitions` and referred to."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self.definitions = definitions
        self.named: dict[str, Any] = {}

    def __call__(self, hint: Any) -> dict[str, Any]:
        if isinstance(hint, Hashable) and hint in PLAIN:
            return dict(PLAIN[hint])
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is typing.Annotated:
            return self._annotated(arguments)
        if origin in (typing.Required, typing.NotRequired):
            return self(arguments[0])
        if origin is typing.Literal:
            return {"enum": _literals(arguments)}
        if origin in (typing.Union, types.UnionType):
            return self._union(arguments)
        if origin is tuple:
            return self._tuple(arguments)
        name = getattr(origin or hint, "__name__", "")
        if (origin or hint).__module__ == "numpy" and name == "ndarray":
            return {"format": "ndarray"}
        if name in LISTS:
            return {"type": "array", "items": self(arguments[0])} if arguments else {"type": "array"}
        if name in DICTS:
            return self._mapping(arguments)
        if isinstance(hint, typing.NewType):
            return self(hint.__supertype__)
        return self._class(hint)

    def _annotated(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        schema = self(arguments[0])
        for extra in arguments[1:]:
            if isinstance(extra, str):
                schema["description"] = extra
            for name, keywords in KEYWORDS.items():
                keyword = keywords[schema.get("type") == "array"]
                limit = getattr(extra, name, None)
                if keyword and isinstance(limit, int | float | str):
                    schema[keyword] = limit
        return schema

    def _union(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        parts = [self(argument) for argument in arguments]
        simple = [part["type"] for part in parts if part.keys() == {"type"} and isinstance(part["type"], str)]
        if {} in parts:
            return {}
        return {"type": simple} if len(simple) == len(parts) else {"anyOf": parts}

    def _tuple(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return {"type": "array", "items": self(arguments[0])}
        items = [self(argument) for argument in arguments if argument != ()]
        bounds = {"minItems": len(items), "maxItems": len(items)}
        return {"type": "array", **({"prefixItems": items} if items else {}), **bounds}

    def _mapping(self, arguments: tuple[Any, ...]) -> dict[str, Any]:
        if not arguments:
            return {"type": "object"}
        if arguments[0] not in (str, Any):
            raise TypeError(f"the keys of a JSON object are texts, not {arguments[0]}")
        values = self(arguments[1])
        return {"type": "object", "additionalProperties": values} if values else {"type": "object"}

    def _class(self, hint: Any) -> dict[str, Any]:
        if isinstance(hint, type) and issubclass(hint, enum.Enum):
            values = _literals(hint)
            kinds = {type(value) for value in values}
            kind = PLAIN.get(next(iter(kinds))) if len(kinds) == 1 else None
            return {**(kind or {}), "enum": values}
        if typing.is_typeddict(hint):
            return self._fields(hint, hint.__required_keys__, {})
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            fields = dataclasses.fields(hint)
            required = {
                field.name
                for field in fields
                if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            }
            return self._fields(hint, required, {field.name: field.default for field in fields})
        raise TypeError(
            f"{getattr(hint, '__qualname__', hint)!r} has no form in JSON; take None, bool, int, float, str, bytes, "
            "datetime, date, timedelta, list, tuple, dict, Literal, an Enum, a TypedDict, a dataclass (which arrives "
            "as a dict), numpy.ndarray or Any"
        )

    def _fields(self, hint: Any, required: Iterable[str], defaults: Mapping[str, Any]) -> dict[str, Any]:
        name = self._name_of(hint)
        if name not in self.definitions:
            self.definitions[name] = {}  # it may contain itself
            hints = typing.get_type_hints(hint, include_extras=True)
            wrappers = {field: typing.get_origin(kind) for field, kind in hints.items()}
            # Of annotations that are texts the class itself has not seen these.
            required = {*required, *(field for field in hints if wrappers[field] is typing.Required)}
            required -= {field for field in hints if wrappers[field] is typing.NotRequired}
            properties = {field: self(kind) for field, kind in hints.items() if wrappers[field] is not typing.ClassVar}
            for field, schema in properties.items():
                _add_default(schema, defaults.get(field, dataclasses.MISSING))
            self.definitions[name] = {
                "type": "object",
                "properties": properties,
                "required": [field for field in properties if field in required],
                "additionalProperties": False,
            }
        return {"$ref": f"#/$defs/{name}"}

    def _name_of(self, hint: Any) -> str:
        """The class's name; with its module's where another class has that one."""
        name: str = hint.__name__
        if self.named.setdefault(name, hint) is not hint:
            name = f"{hint.__module__}.{hint.__qualname__}".translate(str.maketrans("<>", "__"))
        return name


def _literals(values: Iterable[Any]) -> list[Any]:
    """The values of a Literal or an Enum, which JSON must have."""
    found = [value.value if isinstance(value, enum.Enum) else value for value in values]
    for value in found:
        if not (
            value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        ):
            raise TypeError(f"the value {value!r} has no form in JSON")
    return found


def _add_default(schema: dict[str, Any], default: Any) -> None:
    if isinstance(default, float) and not math.isfinite(default):
        return
    if default is None or (isinstance(default, bool | int | float | str) and not isinstance(default, enum.Enum)):
        schema["default"] = default


def signature_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The signature of a function as it is published: its parameters in order, and their schemas.

    ::

        {"parameters": [{"name", "kind", "schema", "required"}], "$defs": {...}, "description": "..."}

    `kind` is ``positional`` (only), ``any``, ``keyword`` (only), ``args`` or ``kwargs``. Raises `InvalidJob` for a
    parameter whose hint has no form in JSON, and for hints that cannot be resolved.
    """
    name = getattr(function, "__name__", "the function")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, AttributeError) as error:
        raise InvalidJob(
            f"actor(http=True): the type hints of {name} cannot be resolved ({error}). Import what they name at the "
            "top of the module, outside of `if TYPE_CHECKING:`."
        ) from None
    definitions: dict[str, Any] = {}
    describe = _Describe(definitions)
    parameters = []
    for parameter in inspect.signature(function).parameters.values():
        try:
            schema = describe(hints.get(parameter.name, Any))
        except TypeError as error:
            raise InvalidJob(f"actor(http=True): parameter {parameter.name} of {name}: {error}.") from None
        _add_default(schema, parameter.default)
        required = parameter.default is parameter.empty
        parameters.append(
            {"name": parameter.name, "kind": _KINDS[parameter.kind], "schema": schema, "required": required}
        )
    published: dict[str, Any] = {"parameters": parameters}
    if definitions:
        published["$defs"] = definitions
    if function.__doc__:
        published["description"] = inspect.cleandoc(function.__doc__)[:2000]
    return published


_KINDS: Final = {
    inspect.Parameter.POSITIONAL_ONLY: "positional",
    inspect.Parameter.POSITIONAL_OR_KEYWORD: "any",
    inspect.Parameter.KEYWORD_ONLY: "keyword",
    inspect.Parameter.VAR_POSITIONAL: "args",
    inspect.Parameter.VAR_KEYWORD: "kwargs",
}


# Values against schemas


def check(schema: Schema, value: Any, path: str = "$") -> Any:
    """The value, converted where the schema asks for it. Raises `InvalidArguments` with the path to each fault."""
    checker = _Checker(schema.get("$defs", {}))
    checked = checker(schema, value, path)
    checker.report()
    return checked


def bind(signature: Schema, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call, checked against what `signature_of` gave and converted.

    Raises `InvalidArguments` with paths such as ``$.args[0]`` and ``$.kwargs.lr``.
    """
    checker = _Checker(signature.get("$defs", {}))
    parameters = signature["parameters"]
    places = [item for item in parameters if item["kind"] in ("positional", "any")]
    more = next((item for item in parameters if item["kind"] == "args"), None)
    named = {item["name"]: item for item in parameters if item["kind"] in ("any", "keyword")}
    others = next((item for item in parameters if item["kind"] == "kwargs"), None)
    bound_args: list[Any] = []
    for index, value in enumerate(args):
        parameter = places[index] if index < len(places) else more
        if parameter is None:
            checker.fault(f"$.args[{index}]", f"is one too many: there are {len(places)} positional arguments")
            break
        bound_args.append(checker(parameter["schema"], value, f"$.args[{index}]"))
    taken = {item["name"] for item in places[: len(args)]}
    bound_kwargs: dict[str, Any] = {}
    for name, value in kwargs.items():
        parameter = named.get(name, others)
        if parameter is None:
            known = ", ".join(sorted(named)) or "none"
            checker.fault(_member("$.kwargs", name), f"is no parameter of the actor; it has {known}")
        elif name in taken:
            checker.fault(_member("$.kwargs", name), "is given twice: it is one of args, too")
        else:
            bound_kwargs[name] = checker(parameter["schema"], value, _member("$.kwargs", name))
    for parameter in parameters:
        name, kind = parameter["name"], parameter["kind"]
        given = name in taken or (name in kwargs and kind != "positional")
        if parameter["required"] and kind not in ("args", "kwargs") and not given:
            where = "$.args" if kind == "positional" else _member("$.kwargs", name)
            checker.fault(where, f"is missing: the actor needs {name}")
    checker.report()
    return bound_args, bound_kwargs


class _Checker:
    """Checks values against schemas, and gathers what is wrong with them."""

    def __init__(self, definitions: Mapping[str, Schema]) -> None:
        self.definitions = definitions
        self.faults: list[tuple[str, str]] = []

    def fault(self, path: str, text: str) -> None:
        if len(self.faults) < MOST_FAULTS:
            self.faults.append((path, text))

    def report(self) -> None:
        """Raises `InvalidArguments` if there were faults."""
        if self.faults:
            first = f"{self.faults[0][0]} {self.faults[0][1]}."
            rest = f" ({len(self.faults) - 1} more)" if len(self.faults) > 1 else ""
            raise InvalidArguments(first + rest, faults=self.faults)

    def __call__(self, schema: Schema, value: Any, path: str) -> Any:
        if not schema:
            return value
        reference = schema.get("$ref")
        if reference is not None:
            return self(self.definitions[reference.rpartition("/")[2]], value, path)
        if "anyOf" in schema:
            return self._any_of(schema, value, path)
        if "enum" in schema or "const" in schema:
            return self._enum(schema, value, path)
        kind = schema.get("type")
        if kind is None:
            return self._array(value, path) if schema.get("format") == "ndarray" else value
        if isinstance(kind, list):
            return self._any_of({"anyOf": [{**schema, "type": one} for one in kind]}, value, path)
        return _TYPES[kind](self, schema, value, path)

    def _any_of(self, schema: Schema, value: Any, path: str) -> Any:
        before, parts, gathered = self.faults, [], []
        # Each is tried once: what is nested would else be looked at twice as often with each level.
        for part in self._parts(schema):
            self.faults = []
            checked = self(part, value, path)
            if not self.faults:
                self.faults = before
                return checked
            parts.append(part)
            gathered.append(self.faults)
        self.faults = before
        # The one that came furthest is what was meant: its fault is the deepest, or it is the only one for such values.
        closest = max(gathered, key=lambda faults: len(faults[0][0]))
        told = len(closest[0][0]) > len(path)
        of_kind = [faults for part, faults in zip(parts, gathered, strict=True) if _is_for(part, value)]
        if not told and len(of_kind) == 1:
            closest, told = of_kind[0], True
        if told:
            for fault in closest:
                self.fault(*fault)
        else:
            self.fault(path, f"is {_what(value)}; allowed is {' or '.join(map(_name, parts))}")
        return value

    def _parts(self, schema: Schema) -> Iterator[Schema]:
        """The schemas of which one is to fit, none of them again one of several."""
        while "$ref" in schema:
            schema = self.definitions[schema["$ref"].rpartition("/")[2]]
        if "anyOf" in schema:
            for part in schema["anyOf"]:
                yield from self._parts(part)
        elif isinstance(schema.get("type"), list) and "enum" not in schema:
            yield from ({**schema, "type": one} for one in schema["type"])
        else:
            yield schema

    def _enum(self, schema: Schema, value: Any, path: str) -> Any:
        allowed = [schema["const"]] if "const" in schema else schema["enum"]
        if value is None or isinstance(value, str | int | float):
            for one in allowed:
                if one == value and isinstance(one, bool) == isinstance(value, bool):
                    return one
        self.fault(path, f"is {_what(value)}; allowed is {', '.join(map(_short, allowed))}")
        return value

    def _array(self, value: Any, path: str) -> Any:
        if not (hasattr(value, "dtype") and hasattr(value, "tobytes")):
            self.fault(path, f"is {_what(value)}; allowed is an array, which only a MessagePack body can carry")
        return value

    def _null(self, schema: Schema, value: Any, path: str) -> Any:
        if value is not None:
            self.fault(path, f"is {_what(value)}; allowed is null")
        return value

    def _boolean(self, schema: Schema, value: Any, path: str) -> Any:
        if not isinstance(value, bool):
            self.fault(path, f"is {_what(value)}; allowed is true or false")
        return value

    def _integer(self, schema: Schema, value: Any, path: str) -> Any:
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if not isinstance(value, int) or isinstance(value, bool):
            self.fault(path, f"is {_what(value)}; allowed is a whole number")
            return value
        return self._bounded(schema, value, path)

    def _number(self, schema: Schema, value: Any, path: str) -> Any:
        if schema.get("format") == "seconds" and isinstance(value, timedelta):
            return value
        if not isinstance(value, int | float) or isinstance(value, bool):
            self.fault(path, f"is {_what(value)}; allowed is a number")
            return value
        try:
            number = float(self._bounded(schema, value, path))
            return timedelta(seconds=number) if schema.get("format") == "seconds" else number
        except (OverflowError, ValueError):
            self.fault(path, f"is {_what(value)}, which is too large for a number")
            return value

    def _bounded(self, schema: Schema, value: Any, path: str) -> Any:
        if value < schema.get("minimum", -math.inf) or value > schema.get("maximum", math.inf):
            low, high = schema.get("minimum"), schema.get("maximum")
            allowed = " and ".join(
                words
                for words in (low is not None and f"at least {low:,}", high is not None and f"at most {high:,}")
                if words
            )
            self.fault(path, f"is {_what(value)}; allowed is {allowed}")
        return value

    def _string(self, schema: Schema, value: Any, path: str) -> Any:
        if schema.get("contentEncoding") == "base64":
            return self._bytes(value, path)
        if "format" in schema and schema["format"] in _MOMENTS:
            return self._moment(schema["format"], value, path)
        if not isinstance(value, str):
            self.fault(path, f"is {_what(value)}; allowed is a text")
            return value
        low, high = schema.get("minLength", 0), schema.get("maxLength", math.inf)
        if not low <= len(value) <= high:
            self.fault(path, f"is {len(value):,} characters long; allowed are {_between(low, high)}")
        elif "pattern" in schema and not re.search(schema["pattern"], value):
            self.fault(path, f"is {_what(value)}; allowed is what matches {schema['pattern']}")
        return value

    def _bytes(self, value: Any, path: str) -> Any:
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            try:
                return base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError):
                pass
        self.fault(
            path,
            f"is {_what(value)}; allowed are bytes: base64 in JSON, or as they are in a MessagePack or multipart body",
        )
        return value

    def _moment(self, kind: str, value: Any, path: str) -> Any:
        wanted, example = _MOMENTS[kind]
        if isinstance(value, wanted):
            return value
        if isinstance(value, str):
            try:
                return wanted.fromisoformat(value)
            except ValueError:
                pass
        self.fault(path, f"is {_what(value)}; allowed is ISO 8601: {example}")
        return value

    def _list(self, schema: Schema, value: Any, path: str) -> Any:
        if not isinstance(value, list | tuple):
            self.fault(path, f"is {_what(value)}; allowed is a list")
            return value
        low, high = schema.get("minItems", 0), schema.get("maxItems", math.inf)
        if not low <= len(value) <= high:
            self.fault(path, f"has {len(value):,} items; allowed are {_between(low, high)}")
            return value
        prefix, items = schema.get("prefixItems", ()), schema.get("items")
        if not prefix and not items:
            return value
        checked = []
        for index, item in enumerate(value):
            part = prefix[index] if index < len(prefix) else items
            checked.append(self(part, item, f"{path}[{index}]") if part else item)
        return checked

    def _object(self, schema: Schema, value: Any, path: str) -> Any:
        if not isinstance(value, dict):
            self.fault(path, f"is {_what(value)}; allowed is an object")
            return value
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
        checked = {}
        for name, item in value.items():
            part = properties.get(name, others)
            if part is False:
                known = ", ".join(properties) or "none"
                self.fault(_member(path, name), f"is not known here; known are {known}")
            else:
                checked[name] = self(part, item, _member(path, name)) if isinstance(part, Mapping) else item
        for name in schema.get("required", ()):
            if name not in value:
                self.fault(_member(path, name), "is missing")
        return checked


_TYPES: Final[Mapping[str, Callable[[_Checker, Schema, Any, str], Any]]] = {
    "null": _Checker._null,
    "boolean": _Checker._boolean,
    "integer": _Checker._integer,
    "number": _Checker._number,
    "string": _Checker._string,
    "array": _Checker._list,
    "object": _Checker._object,
}

#: What the values are that a type refuses for no other reason than what they are.
_PYTHON: Final[Mapping[str, type | tuple[type, ...]]] = {
    "integer": (int, float),
    "number": (int, float),
    "string": str,
    "array": (list, tuple),
    "object": dict,
}

_MOMENTS: Final[Mapping[str, tuple[Any, str]]] = {
    "date-time": (datetime, "2026-01-31T12:00:00+00:00"),
    "date": (date, "2026-01-31"),
}

_NAMES: Final = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "an object",
}


def _is_for(schema: Schema, value: Any) -> bool:
    """Whether a schema is for values like this one, and has refused it for how long, how large or what it is."""
    kind = schema.get("type")
    kinds = _PYTHON.get(kind, ()) if isinstance(kind, str) and "enum" not in schema else ()
    return isinstance(value, kinds) and not isinstance(value, bool)


def _name(schema: Schema) -> str:
    """What a schema allows, in words."""
    if "enum" in schema:
        return ", ".join(map(_short, schema["enum"]))
    if schema.get("format") in _MOMENTS:
        return f"a {schema['format']}"
    if "contentEncoding" in schema:
        return "bytes"
    return _NAMES.get(schema.get("type", ""), "an array" if schema.get("format") == "ndarray" else "an object")


def _what(value: Any) -> str:
    """A value in words: what it is, and what it says where that is short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {_short(value)}"
        case str():
            return f"the text {_short(value)}"
        case bytes():
            return f"{len(value):,} bytes"
        case list() | tuple():
            return f"a list of {len(value):,} items"
        case dict():
            return f"an object with {len(value):,} members"
    return f"a {type(value).__name__}"


def _short(value: Any) -> str:
    if isinstance(value, int) and value.bit_length() > 200:
        return f"of {value.bit_length():,} bits"  # to write it out would take long
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _between(low: float, high: float) -> str:
    if high == math.inf:
        return f"at least {low:,}"
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _member(path: str, name: object) -> str:
    text = str(name)
    return f"{path}.{text}" if text.isidentifier() and len(text) <= 100 else f"{path}[{_short(name)}]"
