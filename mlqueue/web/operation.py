"""`Operation`: one route, with all that is to be known of it - its scope, what it takes, what it answers.

The routes, the check of scopes, the OpenAPI document and the tests over all routes are made from it. A module declares
its operations with `operation`, and `mlqueue.web.table` lists them.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from ..errors import (
    BodyTooLarge,
    Forbidden,
    InvalidArguments,
    JobNotFound,
    MLQueueError,
    RequestError,
    StoreFull,
    StoreUnavailable,
    Unauthorized,
    UnsupportedBody,
)
from ..schema import Schema, schema_of

if TYPE_CHECKING:
    from flask import Response


JSON: Final = "application/json"
TEXT: Final = "text/plain"
MSGPACK: Final = "application/msgpack"
MULTIPART: Final = "multipart/form-data"

#: What stands in a rule between < and >, and what it may be.
PATHS: Final[Mapping[str, tuple[Schema, str]]] = {
    "job_id": ({"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"}, "The id of a job."),
    "actor": ({"type": "string", "minLength": 1, "maxLength": 200}, "The name of an actor."),
    "limit": (
        {"type": "string", "minLength": 2, "maxLength": 100},
        "The name of a limit: a resource, or `@` and the name of an actor.",
    ),
    "extension": (
        {"type": "string", "pattern": "^[A-Za-z0-9]{1,12}$"},
        "The extension of a file: says of which type the bytes of a result are.",
    ),
}

Function: TypeAlias = "Callable[..., Response]"


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is no error."""

    description: str
    #: The schema of the body by media type; empty for no body.
    content: Mapping[str, Schema] = dataclasses.field(default_factory=dict)
    #: Headers that matter: name and description.
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    #: Where the answer leads: for the name of an operation, where what its path needs stands in the answer.
    links: Mapping[str, Mapping[str, str]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Parameter:
    """What a request carries in its query or its headers."""

    name: str
    #: ``query`` or ``header``.
    place: str
    schema: Schema
    description: str
    #: Whether it may be given several times, as a list.
    many: bool = False


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """A route. Calling it is the business of `mlqueue.web.blueprint`."""

    method: str
    #: Flask's rule, below the blueprint's prefix.
    rule: str
    function: Function
    #: The scope that it asks for; None for a route that anybody may use.
    scope: str | None
    #: By status.
    answers: Mapping[int, Answer]
    parameters: Sequence[Parameter]
    #: What the body may be, by media type; empty where none is taken.
    body: Mapping[str, Any]
    #: Whether a body must be there.
    body_required: bool
    #: What it may raise beside what follows from the rest.
    errors: Sequence[type[MLQueueError]]
    #: Whether it has the store look at the API key in the call that it makes anyway; see `Call.take_unconfirmed`.
    confirms_keys: bool
    #: Whether it answers text unless JSON is asked for, as MLQ's routes do.
    text: bool
    tag: str

    @property
    def name(self) -> str:
        """Its endpoint, and its operationId."""
        return self.function.__name__

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (inspect.getdoc(self.function) or "").partition("\n")[0]

    @property
    def description(self) -> str:
        """What follows it."""
        return (inspect.getdoc(self.function) or "").partition("\n")[2].strip()

    @property
    def path_names(self) -> tuple[str, ...]:
        """The names in the rule."""
        return tuple(re.findall(r"<(?:\w+:)?(\w+)>", self.rule))

    @property
    def all_errors(self) -> list[type[MLQueueError]]:
        """What it may raise."""
        found: list[type[MLQueueError]] = [*self.errors]
        if self.scope is not None:
            found += [Unauthorized, Forbidden, StoreUnavailable]
        if "job_id" in self.path_names:
            found += [JobNotFound, StoreUnavailable]
        if self.body:
            found += [RequestError, BodyTooLarge, UnsupportedBody, InvalidArguments]
        if self.parameters or "extension" in self.path_names:
            found += [InvalidArguments]
        if self.method != "GET" and self.scope is not None:
            found += [StoreFull]
        return list(dict.fromkeys(found))


def operation(
    method: str,
    rule: str,
    *,
    scope: str | None,
    answers: Mapping[int, Answer],
    tag: str,
    parameters: Sequence[Parameter] = (),
    body: Mapping[str, Any] | None = None,
    body_required: bool = True,
    errors: Sequence[type[MLQueueError]] = (),
    confirms_keys: bool = False,
    text: bool = False,
) -> Callable[[Function], Operation]:
    """Makes a function an operation. It is called with the `Call` and what the rule has between < and >, and gives a
    response; its docstring is the documentation: a line, and what follows it.

    `body` has, for each media type that is taken, a type hint or a schema.
    """

    def declare(function: Function) -> Operation:
        unknown = set(re.findall(r"<(?:\w+:)?(\w+)>", rule)) - PATHS.keys()
        if unknown:
            raise TypeError(f"{rule}: PATHS does not say what {', '.join(unknown)} may be")
        return Operation(
            method=method,
            rule=rule,
            function=function,
            scope=scope,
            answers=answers,
            parameters=parameters,
            body={kind: as_schema(shape) for kind, shape in (body or {}).items()},
            body_required=body_required,
            errors=errors,
            confirms_keys=confirms_keys,
            text=text,
            tag=tag,
        )

    return declare


def as_schema(shape: Any) -> Schema:
    """A schema, or that of a type hint."""
    return shape if isinstance(shape, Mapping) else schema_of(shape)


__all__ = [
    "JSON",
    "MSGPACK",
    "MULTIPART",
    "PATHS",
    "TEXT",
    "Answer",
    "Operation",
    "Parameter",
    "as_schema",
    "operation",
]
