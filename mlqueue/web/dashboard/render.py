"""The templates, in an environment of their own: nothing of the host's Jinja reaches them, and nothing of ours it."""

from __future__ import annotations

import functools
import hashlib
import math
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import jinja2
from markupsafe import Markup, escape

from ...job import JobRecord, State
from .charts import curve, spark
from .values import described

__all__ = ["FILES", "VERSION", "duration", "template"]

FOLDER: Final = Path(__file__).resolve().parent

#: The files that browsers get, by name.
FILES: Final = {path.name: path for path in sorted((FOLDER / "static").iterdir()) if path.is_file()}

#: Stands in their addresses, so that browsers may keep them for ever.
VERSION: Final = hashlib.sha256(b"".join(path.read_bytes() for path in FILES.values())).hexdigest()[:12]


@functools.cache
def template(name: str) -> jinja2.Template:
    """The template of a page."""
    return _environment().get_template(f"{name}.html")


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "ago": ago,
        "bytes": size,
        "clock": clock,
        "duration": duration,
        "number": number,
        "moment": moment,
        "sentence": sentence,
        "described": described,
    }
    environment.globals |= {
        "State": State,
        "VERSION": VERSION,
        "curve": curve,
        "eta": eta,
        "percent": percent,
        "reported": reported,
        "spark": spark,
    }
    return environment


# How things are written


def number(value: float) -> str:
    """A number for a person."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:,.1f}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{int(value):,}"


def sentence(text: str) -> Markup:
    """The text of an error as a sentence: what is to be typed stands out."""
    parts = f"{text[:1].upper()}{text[1:]}".split("`")
    if len(parts) % 2 == 0:
        return escape("`".join(parts))  # one that nothing closes
    marked = (Markup("<code>{}</code>").format(part) if at % 2 else escape(part) for at, part in enumerate(parts))
    return Markup("").join(marked)


def duration(seconds: float | None) -> str:
    """A duration: ``0.4 s``, ``12 s``, ``3 min 5 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds is None:
        return "–"
    seconds = max(0.0, seconds)
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for unit, letter, smaller, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= unit:
            rest = whole % unit // smaller
            return f"{whole // unit} {letter}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"


def ago(at: float | None) -> Markup:
    """How long ago a moment was, with the moment itself."""
    if at is None:
        return Markup("–")
    age = time.time() - at
    text = f"{_coarse(age)} ago" if age >= 0 else f"in {_coarse(-age)}"
    return _time(at, "just now" if 0 <= age < 1.5 else text)


def _coarse(seconds: float) -> str:
    return " ".join(duration(round(seconds) if seconds >= 1 else seconds).split()[:2])


def moment(at: float | None) -> Markup:
    """A moment."""
    if at is None:
        return Markup("–")
    when = datetime.fromtimestamp(at, UTC)
    return _time(at, when.strftime("%Y-%m-%d %H:%M:%S") + f".{when.microsecond // 100_000}")


def clock(at: float) -> str:
    """The time of day of a moment."""
    return datetime.fromtimestamp(at, UTC).strftime("%H:%M:%S")


def _time(at: float, text: str) -> Markup:
    iso = datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    return Markup('<time datetime="{}" title="{}">{}</time>').format(iso, iso.replace("+00:00", " UTC"), escape(text))


def size(number_of_bytes: float) -> str:
    """A number of bytes."""
    value, unit = float(number_of_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def percent(record: JobRecord) -> float | None:
    """What a job reported, where that is a part of a hundred."""
    value = record.progress
    if record.state is State.SUCCEEDED and isinstance(value, int | float):
        return 100.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value) if 0 <= value <= 100 else None


def reported(record: JobRecord) -> str:
    """What a job reported, as text."""
    value: Any = record.progress
    if value is None:
        text = ""
    elif isinstance(value, str):
        text = value
    else:
        text = f"{value:.3g} %" if abs(value) < 1000 else f"{value:g}"
    return " · ".join(part for part in (text, record.progress_note or "") if part)


def eta(record: JobRecord) -> float | None:
    """How long a running job has to go, in seconds, if it goes on as it has; None when nobody can say."""
    done = percent(record)
    if record.state is not State.RUNNING or record.started_at is None or not done or done < 1:
        return None
    return (time.time() - record.started_at) * (100 - done) / done
