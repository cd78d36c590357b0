"""Durations, times and scopes as options take them. Each is a function that click calls with the text of the option."""

from __future__ import annotations

import re
import time
from datetime import datetime

import click

from ..settings import parse_duration


def duration(text: str | float) -> float:
    """Seconds of a duration: ``1.5``, ``500ms``, ``30s``, ``5m``, ``2h``, ``30d``."""
    found = parse_duration(str(text))
    if found is None:
        raise click.BadParameter(
            f"{text!r} is no duration; write seconds (1.5), or a number with ms, s, m, h or d (500ms, 2h)."
        )
    return found


def scope(text: str | float) -> str | float:
    """How long a unique key holds: ``queued``, ``active``, or seconds."""
    found = parse_duration(str(text))
    if text in ("queued", "active"):
        return text
    if not found:
        raise click.BadParameter(f"{text!r} is neither queued nor active nor a duration of more than 0 (30, 10m, 2h).")
    return found


def moment(text: str | float) -> float:
    """Unix seconds of a time: how long ago (``10m``, ``2h``), ISO 8601 (local where it names no zone), or ``@`` and
    Unix seconds."""
    found = parse_duration(str(text))
    if found is not None:
        return max(0.0, time.time() - found)
    if match := re.fullmatch(r"@(\d{1,10}(?:\.\d{0,9})?)", str(text), re.ASCII):
        return float(match[1])
    try:
        return max(0.0, datetime.fromisoformat(str(text)).astimezone().timestamp())
    except (ValueError, OverflowError, OSError):
        raise click.BadParameter(
            f"{text!r} is no time; write how long ago (10m, 2h, 3d), an ISO time (2026-01-31T12:00, local unless it "
            "names a zone), or @ and Unix seconds."
        ) from None


__all__ = ["duration", "moment", "scope"]
