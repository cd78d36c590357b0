"""Values in and out: JSON from the command line, and JSON of values (see `mlqueue.values`)."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from ..errors import InvalidJob
from ..values import is_array, plain


def from_text(text: str) -> Any:
    """What an argument of the command line stands for: JSON where it is JSON, else the text itself."""
    try:
        return json.loads(text, parse_constant=_not_json)
    except RecursionError:
        raise InvalidJob("an argument of this command is JSON that is nested too deeply to be sent.") from None
    except ValueError:
        return text


def list_from_text(option: str, text: str) -> list[Any]:
    """The list that an option stands for, as JSON."""
    value = from_text(text)
    if not isinstance(value, list):
        raise InvalidJob(f"{option} {_but(text, value)}; it must be a list, such as '[0.1, \"a\"]'.")
    return value


def object_from_text(option: str, text: str) -> dict[str, Any]:
    """The dict that an option stands for, as JSON."""
    value = from_text(text)
    if not isinstance(value, dict):
        raise InvalidJob(f"{option} {_but(text, value)}; it must be an object, such as '{{\"epochs\": 10}}'.")
    return value


def short(text: str) -> str:
    """A text of the command line as errors quote it."""
    return json.dumps(text if len(text) <= 60 else text[:57] + "...", ensure_ascii=False)


def _but(text: str, value: object) -> str:
    return f"{short(text)} is {'not JSON' if value == text else f'JSON, but a {type(value).__name__}'}"


def _not_json(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity, which Python would take


__all__ = ["from_text", "is_array", "list_from_text", "object_from_text", "plain", "short"]
