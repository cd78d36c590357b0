"""The scripts as the server gets them: first line of the file (its flags), then what all share, then its body."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import NamedTuple


class Script(NamedTuple):
    name: str
    text: bytes
    sha: bytes


@functools.cache
def script(name: str) -> Script:
    """The script of ``lua/<name>.lua``."""
    folder = resources.files(__package__) / "lua"
    flags, _, body = (folder / f"{name}.lua").read_text("utf-8").partition("\n")
    # The shared part goes onto one chunk of text before the body, so that its locals are the body's upvalues.
    text = "\n".join((flags, (folder / "common.lua").read_text("utf-8"), body)).encode()
    return Script(name, text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())
