"""Durations and times as options take them."""

from __future__ import annotations

import re
import time
from datetime import datetime
from typing import Final

import click

UNITS: Final = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def _seconds(text: str) -> float | None:
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{0,9})?|\.\d{1,9})\s*([a-z]*)", text.strip().lower(), re.ASCII)
    return float(match[1]) * UNITS[match[2]] if match and match[2] in UNITS else None


class Duration(click.ParamType):
    """A duration in seconds: ``1.5``, ``500ms``, ``30s``, ``5m``, ``2h``, ``30d``."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        found = _seconds(str(value))
        if found is None:
            self.fail(f"{value!r} is no duration; write seconds (1.5), or a number with ms, s, m, h or d.", param, ctx)
        return found


class Moment(click.ParamType):
    """A time: how long ago (``10m``, ``2h``), ISO 8601 (local where it names no zone), or ``@`` and Unix seconds."""

    name = "time"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Unix seconds."""
        text = str(value)
        found = _seconds(text)
        if found is not None:
            return time.time() - found
        if match := re.fullmatch(r"@(\d{1,10}(?:\.\d{0,9})?)", text, re.ASCII):
            return float(match[1])
        try:
            return datetime.fromisoformat(text).astimezone().timestamp()
        except (ValueError, OverflowError, OSError):
            self.fail(
                f"{text!r} is no time; write how long ago (10m, 2h, 3d), an ISO time (2026-01-31T12:00, in local time "
                "unless it names a zone), or @ and Unix seconds.",
                param,
                ctx,
            )


__all__ = ["Duration", "Moment"]
