"""Schemas of type hints, and values checked against them; a JSON Schema library is the judge."""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, Literal, NewType, NotRequired, Optional, Required, TypedDict, Union

import jsonschema_rs
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlqueue.errors import InvalidArguments, InvalidJob
from mlqueue.schema import Limits, bind, check, schema_of, signature_of


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Size(enum.IntEnum):
    SMALL = 1
    LARGE = 2


class Point(TypedDict):
    x: float
    y: float
    label: NotRequired[str]


class Loose(TypedDict, total=False):
    name: Required[str]
    count: int


@dataclass
class Tree:
    value: int
    children: list[Tree] = field(default_factory=list)
    note: str | None = None


UserId = NewType("UserId", int)

HINTS: list[tuple[Any, Any]] = [
    (None, {"type": "null"}),
    (bool, {"type": "boolean"}),
    (int, {"type": "integer"}),
    (float, {"type": "number"}),
    (str, {"type": "string"}),
    (Any, {}),
    (object, {}),
    (list, {"type": "array"}),
    (dict, {"type": "object"}),
    (list[int], {"type": "array", "items": {"type": "integer"}}),
    (Sequence[str], {"type": "array", "items": {"type": "string"}}),
    (tuple[int, ...], {"type": "array", "items": {"type": "integer"}}),
    (
        tuple[int, str],
        {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "string"}], "minItems": 2, "maxItems": 2},
    ),
    (tuple[()], {"type": "array", "minItems": 0, "maxItems": 0}),
    (dict[str, int], {"type": "object", "additionalProperties": {"type": "integer"}}),
    (Mapping[str, Any], {"type": "object"}),
    (int | None, {"type": ["integer", "null"]}),
    (Optional[str], {"type": ["string", "null"]}),  # noqa: UP045
    (Union[int, str, None], {"type": ["integer", "string", "null"]}),  # noqa: UP007
    (list[int] | None, {"anyOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
    (Any | None, {}),
    (Literal["a", 1, None], {"enum": ["a", 1, None]}),
    (Colour, {"type": "string", "enum": ["red", "blue"]}),
    (Size, {"type": "integer", "enum": [1, 2]}),
    (Literal[Colour.RED], {"enum": ["red"]}),
    (UserId, {"type": "integer"}),
    (
        Annotated[int, "how many", Limits(ge=1, le=9)],
        {"type": "integer", "description": "how many", "minimum": 1, "maximum": 9},
    ),
    (Annotated[list[int], Limits(min_length=1)], {"type": "array", "items": {"type": "integer"}, "minItems": 1}),
    (Annotated[str, Limits(min_length=1, pattern="^a")], {"type": "string", "minLength": 1, "pattern": "^a"}),
    (Annotated[str, Limits(max_length=3)] | None, {"anyOf": [{"type": "string", "maxLength": 3}, {"type": "null"}]}),
    (bytes, {"type": "string", "contentEncoding": "base64"}),
    (datetime, {"type": "string", "format": "date-time"}),
    (np.ndarray, {"format": "ndarray"}),
    (npt.NDArray[np.float32], {"format": "ndarray"}),
]


@pytest.mark.parametrize(("hint", "schema"), HINTS, ids=lambda value: str(value)[:40])
def test_a_hint_has_its_schema(hint: Any, schema: Any) -> None:
    assert schema == schema_of(hint)
    json.dumps(schema)


def test_classes_with_fields_are_objects_that_may_contain_themselves() -> None:
    assert {
        "type": "object",
        "properties": {"x": {"type": "number"}, "y": {"type": "number"}, "label": {"type": "string"}},
        "required": ["x", "y"],
        "additionalProperties": False,
    } == schema_of(Point)["$defs"]["Point"]
    assert ["name"] == schema_of(Loose)["$defs"]["Loose"]["required"]
    tree = schema_of(Tree)
    assert {"$ref": "#/$defs/Tree"} == tree["$defs"]["Tree"]["properties"]["children"]["items"]
    assert ["value"] == tree["$defs"]["Tree"]["required"]
    value = {"value": 1, "children": [{"value": 2, "children": [{"value": 3}]}]}
    assert value == check(tree, value)
    with pytest.raises(InvalidArguments) as raised:
        check(tree, {"value": 1, "children": [{"value": 2, "children": [{"value": "x"}]}]})
    assert "$.children[0].children[0].value" == raised.value.faults[0][0]


class Raw(enum.Enum):
    BYTES = b"x"


@pytest.mark.parametrize(
    "hint", [Raw, Literal[b"x"], set, set[int], complex, dict[int, str], list[set], type, st.SearchStrategy, len]
)
def test_what_has_no_form_in_json_has_no_schema(hint: Any) -> None:
    with pytest.raises(TypeError):
        schema_of(hint)


def test_hints_that_cannot_be_resolved_are_refused_with_the_cure() -> None:
    def work(value: Unknown) -> None:  # type: ignore[name-defined] # noqa: F821
        ...

    with pytest.raises(InvalidJob, match="Import what they name"):
        signature_of(work)


# Against a library


SCHEMAS = st.sampled_from(
    [hint for hint, schema in HINTS if "format" not in schema and "contentEncoding" not in schema]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-10, 10)
    | st.floats(-10, 10)
    | st.sampled_from(["", "a", "abc", "abcd", "red", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["x", "y", "label", "name", "count", "value", "children"]), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(hint=SCHEMAS | st.sampled_from([Point, Loose, Tree, list[Point], Point | None]), value=VALUES)
def test_what_is_accepted_is_what_the_schema_says(hint: Any, value: Any) -> None:
    schema = schema_of(hint)
    valid = jsonschema_rs.is_valid(schema, value)
    if valid:
        assert value == check(schema, value)
    else:
        with pytest.raises(InvalidArguments) as raised:
            check(schema, value)
        assert raised.value.faults


# Conversions


def test_values_become_what_the_hint_says() -> None:
    for hint, value, expected in (
        (bytes, "aGVsbG8=", b"hello"),
        (bytes, b"hello", b"hello"),
        (bytes | None, None, None),
        (datetime, "2026-01-31T12:00:00+00:00", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        (datetime, "2026-01-31T12:00:00Z", datetime(2026, 1, 31, 12, tzinfo=UTC)),
        (date, "2026-01-31", date(2026, 1, 31)),
        (timedelta, 1.5, timedelta(seconds=1.5)),
        (float, 1, 1.0),
        (int, 2.0, 2),
        (list[bytes], ["aGVsbG8="], [b"hello"]),
        (dict[str, float], {"a": 1}, {"a": 1.0}),
        (int | float, 1, 1),
    ):
        found = check(schema_of(hint), value)
        assert (expected, type(expected)) == (found, type(found)), hint
    array = np.arange(3)
    assert array is check(schema_of(np.ndarray), array)
    for hint, value in (
        (bytes, "no base64!"),
        (bytes, 5),
        (datetime, "yesterday"),
        (timedelta, "1"),
        (timedelta, 1e300),
        (float, 10**400),
        (np.ndarray, [1, 2]),
        (Literal["a"], array),
        (list[int], array),
        (int, float("inf")),
        (str, b"bytes"),
    ):
        with pytest.raises(InvalidArguments):
            check(schema_of(hint), value)


class Chain(TypedDict, total=False):
    value: int
    next: Chain | None


def test_what_is_nested_is_looked_at_once_however_deep_its_fault_is() -> None:
    """A level that looked twice would take a thousand years at this depth."""
    value: dict[str, Any] = {"value": "no number"}
    for _ in range(60):
        value = {"next": value}
    with pytest.raises(InvalidArguments, match=r"\$(\.next){60}\.value is the text 'no number'; allowed is a whole"):
        check(schema_of(Chain | None), value)


def test_a_fault_says_what_was_got_and_what_is_allowed() -> None:
    for hint, value, text in (
        (int, "x", "$ is the text 'x'; allowed is a whole number."),
        (int | None, "x", "$ is the text 'x'; allowed is a whole number or null."),
        (Annotated[int, Limits(ge=1, le=9)], 10, "$ is the number 10; allowed is at least 1 and at most 9."),
        (Literal["fast", "slow"], "medium", "$ is the text 'medium'; allowed is 'fast', 'slow'."),
        (Annotated[str, Limits(max_length=3)], "four", "$ is 4 characters long; allowed are 0 to 3."),
        (list[int], {}, "$ is an object with 0 members; allowed is a list."),
        # Where one of several is for such values, it says what is wrong with this one.
        (Annotated[str, Limits(max_length=3)] | None, "four", "$ is 4 characters long; allowed are 0 to 3."),
        (Annotated[str, Limits(pattern="^a")] | None, "b", "$ is the text 'b'; allowed is what matches ^a."),
        (Annotated[list[int], Limits(min_length=1)] | str | None, [], "$ has 0 items; allowed are at least 1."),
        (Annotated[float, Limits(ge=0)] | None, -1, "$ is the number -1; allowed is at least 0."),
        (Annotated[float, Limits(ge=0)] | None, True, "$ is true; allowed is a number or null."),
        (Annotated[float, Limits(ge=0)] | Literal["now"] | None, -1, "$ is the number -1; allowed is at least 0."),
        (float | Literal["now"] | None, "x", "$ is the text 'x'; allowed is a number or 'now' or null."),
        (list[float | Literal["now"]] | None, ["x"], "$[0] is the text 'x'; allowed is a number or 'now'."),
        (int, 10**1000, None),
        (bool, 10**5000, "$ is the number of 16,610 bits; allowed is true or false."),
    ):
        if text is None:
            check(schema_of(hint), value)
            continue
        with pytest.raises(InvalidArguments) as raised:
            check(schema_of(hint), value)
        assert text == raised.value.message


def test_only_so_many_faults_are_told() -> None:
    with pytest.raises(InvalidArguments) as raised:
        check(schema_of(list[int]), ["x"] * 1000)
    assert (20, True) == (len(raised.value.faults), "(19 more)" in raised.value.message)


# Calls


def test_arguments_are_bound_as_python_would(recwarn: pytest.WarningsRecorder) -> None:
    def work(a: int, /, b: float, *rest: int, c: str = "c", **others: bool) -> None:
        """Works.

        Hard.
        """

    signature = signature_of(work)
    assert "Works.\n\nHard." == signature["description"]
    assert ["positional", "any", "args", "keyword", "kwargs"] == [item["kind"] for item in signature["parameters"]]
    assert ([1, 2.0, 3], {"c": "x", "d": True}) == bind(signature, [1, 2, 3], {"c": "x", "d": True})
    assert ([1], {"b": 2.0}) == bind(signature, [1], {"b": 2})
    for args, kwargs, path in (
        ([], {}, "$.args"),
        ([1], {}, "$.kwargs.b"),
        ([1, 2], {"b": 2}, "$.kwargs.b"),
        ([1, 2, "x"], {}, "$.args[2]"),
        ([1, 2], {"d": 1}, "$.kwargs.d"),
        ([1, 2], {"c": None}, "$.kwargs.c"),
    ):
        with pytest.raises(InvalidArguments) as raised:
            bind(signature, args, kwargs)
        assert path == raised.value.faults[0][0]


def test_a_name_given_by_keyword_to_a_positional_only_parameter_is_refused() -> None:
    def work(a: int, /) -> None: ...

    with pytest.raises(InvalidArguments):
        bind(signature_of(work), [], {"a": 1})
