"""Values of jobs as a page shows them: bounded in width and depth, arrays by what they are and how they look."""

from __future__ import annotations

import base64
import dataclasses
import struct
import zlib
from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, Final

from ...values import is_array

__all__ = ["Shown", "described"]

#: How many members, levels and characters are shown.
MOST_ITEMS: Final = 60
DEEPEST: Final = 8
LONGEST: Final = 4000

#: How many points the plot of an array has, and how many pixels its picture, on a side.
POINTS: Final = 240
PIXELS: Final = 96

#: Arrays of more elements are not plotted: all of them would be looked at.
MOST_ELEMENTS: Final = 20_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
    """A value, or a part of one."""

    #: ``text``, ``number``, ``word`` (true, null ...), ``bytes``, ``array``, ``list`` or ``dict``.
    kind: str
    #: What it is in a few words.
    text: str
    #: The members of a list or a dict: name and value.
    items: Sequence[tuple[str, Shown]] = ()
    #: What is not shown of it.
    more: str = ""
    #: The values of an array of one dimension, some of them.
    line: Sequence[float] = ()
    #: An array of two dimensions as a picture: a data: URL.
    picture: str = ""
    #: Least, mean and greatest, of an array of numbers.
    range: str = ""


def described(value: Any, depth: int = 0) -> Shown:
    """How a value is shown."""
    if value is None or isinstance(value, bool):
        return Shown(kind="word", text={None: "null", True: "true", False: "false"}[value])
    if isinstance(value, int | float):
        return Shown(kind="number", text=repr(value)[:LONGEST])
    if isinstance(value, str):
        left = len(value) - LONGEST
        return Shown(kind="text", text=value[:LONGEST], more=f"{left:,} characters more" if left > 0 else "")
    if isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value[:24])
        return Shown(kind="bytes", text=f"{len(value):,} bytes", more=data.hex(" ") + (" …" if len(value) > 24 else ""))
    if isinstance(value, datetime | date):
        return Shown(kind="word", text=value.isoformat())
    if isinstance(value, timedelta):
        return Shown(kind="word", text=str(value))
    if is_array(value):
        return _array(value)
    if isinstance(value, Mapping):
        return _members("dict", [(str(name), item) for name, item in value.items()], depth)
    if isinstance(value, Sequence):
        return _members(
            "list", [(str(index), item) for index, item in enumerate(value[: MOST_ITEMS + 1])], depth, value
        )
    return Shown(kind="word", text=type(value).__name__)


def _members(kind: str, members: list[tuple[str, Any]], depth: int, whole: Sequence[Any] = ()) -> Shown:
    count = len(whole) or len(members)
    text = f"{count:,} item{'' if count == 1 else 's'}"
    if depth >= DEEPEST:
        return Shown(kind=kind, text=text, more="deeper than is shown" if count else "")
    shown = [(name[:200], described(item, depth + 1)) for name, item in members[:MOST_ITEMS]]
    left = count - len(shown)
    return Shown(kind=kind, text=text, items=shown, more=f"{left:,} more" if left > 0 else "")


def _array(value: Any) -> Shown:
    shape = " × ".join(map(str, value.shape)) or "scalar"
    text = f"{value.dtype} array, {shape}"
    if value.dtype.kind not in "biuf" or not 0 < value.size <= MOST_ELEMENTS:
        return Shown(kind="array", text=text, more=str(value)[:LONGEST] if value.size <= 100 else "")
    import numpy as np

    finite = value[np.isfinite(value)] if value.dtype.kind == "f" else value
    told = ""
    if finite.size:
        told = f"from {finite.min():.4g} to {finite.max():.4g}, mean {finite.mean(dtype=np.float64):.4g}"
    if value.size == 1:
        return Shown(kind="array", text=text, more=str(value.reshape(-1)[0]))
    if value.ndim == 1:
        step = -(-value.size // POINTS)
        line = np.nan_to_num(value[::step].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        return Shown(kind="array", text=text, line=line.tolist(), range=told)
    plane = value.reshape(-1, *value.shape[-2:])[0]
    return Shown(kind="array", text=text, picture=_picture(plane), range=told)


def _picture(plane: Any) -> str:
    """An array of two dimensions as a small grey PNG."""
    import numpy as np

    rows, columns = (-(-size // PIXELS) for size in plane.shape)
    small = np.nan_to_num(plane[::rows, ::columns].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = small.min(), small.max()
    grey = ((small - low) / (high - low or 1) * 255).astype(np.uint8)
    height, width = grey.shape
    lines = b"".join(b"\0" + row.tobytes() for row in grey)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(png).decode()
