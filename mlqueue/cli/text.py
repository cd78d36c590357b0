"""Texts for people: tables, ages, and nothing that a terminal would obey."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any, Final

from ..job import JobError, JobRecord, Usage

#: Units for ages: seconds from which on it is used, seconds in it, its letter.
UNITS: Final = ((2 * 86400, 86400, "d"), (2 * 3600, 3600, "h"), (120, 60, "m"), (0, 1, "s"))


def clean(text: object) -> str:
    """The text without what a terminal would obey (escapes, carriage returns) and on one line."""
    words = str(text)
    return words if words.isprintable() else "".join(char if char.isprintable() else " " for char in words)


def one_line(text: object) -> str:
    """The text on one line, its runs of white space being one space."""
    return " ".join(clean(text).split())


def clean_lines(text: str) -> str:
    """The text without what a terminal would obey, its lines kept."""
    return "\n".join(clean(line.expandtabs()) for line in text.splitlines())


def cut(text: str, width: int) -> str:
    """The text, cut to so many characters."""
    return text if len(text) <= width else text[: max(0, width - 1)] + "…"


def duration(seconds: float) -> str:
    """A duration as ``45s``, ``12m``, ``3h``, ``4d``; below ten seconds with a digit more."""
    if 0 <= seconds < 9.95:
        return f"{seconds:.1f}s"
    number, letter = next(
        (int(seconds // unit), letter) for least, unit, letter in UNITS if seconds >= least or not least
    )
    return f"{max(0, number)}{letter}"


def ago(moment: float | None) -> str:
    """How long ago a moment was, or in how long it will be; empty for None."""
    if moment is None:
        return ""
    age = time.time() - moment
    return f"{duration(age)} ago" if age >= 0 else f"in {duration(-age)}"


def iso(moment: float | None) -> str:
    """A moment as ISO 8601 in local time with its offset; empty for None."""
    if moment is None:
        return ""
    return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="milliseconds")


def progress(record: JobRecord) -> str:
    """What a job reported last: a number as percent, with its note."""
    value = record.progress
    if value is None:
        shown = ""
    elif isinstance(value, str):
        shown = value
    else:
        shown = f"{value:.3g}%" if abs(value) < 1000 else f"{value:g}"
    return clean(" ".join(part for part in (shown, record.progress_note) if part))


def usage_text(usage: Usage) -> str:
    """What an attempt used."""
    parts = [] if usage.cpu_seconds is None else [f"{duration(usage.cpu_seconds)} of processor time"]
    for what, size in (("memory", usage.peak_memory), ("GPU memory", usage.gpu_memory)):
        parts += [] if size is None else [f"{size / 2**20:,.0f} MiB of {what}"]
    return ", ".join(parts) + ("" if usage.alone else " (beside other jobs)")


def error_text(error: JobError) -> str:
    """An error as Python prints it, on one line."""
    return one_line(error.text)


def on_terminal() -> bool:
    """Whether stdout is read by a person."""
    return sys.stdout.isatty()


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], *, people: bool | None = None) -> str:
    """Rows for a person (aligned, under a head, cut to the terminal) or a program (tab-separated, no head)."""
    cells = [[clean(cell) for cell in row] for row in rows]
    if not (on_terminal() if people is None else people):
        return "".join("\t".join(row) + "\n" for row in cells)
    lines = [[name.upper() for name in head], *cells]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    screen = shutil.get_terminal_size().columns
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "".join(cut(line.rstrip(), screen) + "\n" for line in padded)


__all__ = [
    "ago",
    "clean",
    "clean_lines",
    "cut",
    "duration",
    "error_text",
    "iso",
    "on_terminal",
    "one_line",
    "progress",
    "table",
    "usage_text",
]
