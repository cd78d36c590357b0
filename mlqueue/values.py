"""Values as JSON, for people and for programs that know no MessagePack.

What JSON has no form for is an object with one key that begins with ``$``::

    bytes                 {"$bytes": "aGVsbG8="}                                         base64
    array, NumPy scalar   {"$ndarray": {"dtype": "<f4", "shape": [2, 3], "data": "..."}} elements in C order, base64
    datetime, date        {"$datetime": "2026-01-31T12:00:00+00:00"}, {"$date": "2026-01-31"}
    timedelta             {"$timedelta": 1.5}                                            seconds
    nan, inf, -inf        {"$float": "nan"}
    dict with other keys  {"$dict": [[key, value], ...]}

NumPy's bools, integers and floats of up to 64 bits are plain numbers.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any

#: The kinds (``dtype.kind``) of NumPy's scalars that are numbers of JSON.
NUMBERS = "biuf"


def plain(value: Any) -> Any:
    """The value as something that ``json.dumps(allow_nan=False)`` takes."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$float": str(float(value))}
    if isinstance(value, bytes | bytearray | memoryview):
        return {"$bytes": _base64(value)}
    if isinstance(value, datetime):
        return {"$datetime": value.isoformat()}
    if isinstance(value, date):
        return {"$date": value.isoformat()}
    if isinstance(value, timedelta):
        return {"$timedelta": value.total_seconds()}
    if is_array(value):
        return _numpy(value)
    if isinstance(value, Mapping):
        return _mapping(value)
    if isinstance(value, Sequence):
        return [plain(item) for item in value]
    raise TypeError(f"a {type(value).__name__} has no form in JSON")  # nothing that the codec carries


def is_array(value: object) -> bool:
    """Whether it is an array or a scalar of NumPy, which need not be imported to know it."""
    return hasattr(value, "dtype") and hasattr(value, "tobytes")


def _numpy(value: Any) -> Any:
    # A scalar cannot be written to; an array of shape () can.
    is_scalar = value.shape == () and not hasattr(value, "__setitem__")
    if is_scalar and value.dtype.kind in NUMBERS and value.dtype.itemsize <= 8:
        return plain(value.item())
    dtype = value.dtype.str if value.dtype.names is None else value.dtype.descr
    return {"$ndarray": {"dtype": plain(dtype), "shape": list(value.shape), "data": _base64(value.tobytes("C"))}}


def _mapping(value: Mapping[Any, Any]) -> Any:
    if all(isinstance(key, str) for key in value):
        return {key: plain(item) for key, item in value.items()}
    return {"$dict": [[plain(key), plain(item)] for key, item in value.items()]}


def _base64(data: bytes | bytearray | memoryview) -> str:
    return base64.b64encode(data).decode()


__all__ = ["is_array", "plain"]
