"""The scripts as the server gets them: the file's first line (its flags), what it shares with others, its body."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from typing import Final, NamedTuple

#: How the line begins in which a script names the parts that it needs beside ``common.lua``.
PARTS: Final = "-- parts: "


class Script(NamedTuple):
    name: str
    text: bytes
    sha: bytes


@functools.cache
def script(name: str) -> Script:
    """The script of ``lua/<name>.lua``."""
    folder = resources.files(__package__) / "lua"
    flags, _, body = (folder / f"{name}.lua").read_text("utf-8").partition("\n")
    parts = ["common"]
    if body.startswith(PARTS):
        parts += [f"part_{part}" for part in body.partition("\n")[0].removeprefix(PARTS).split()]
    # One chunk of text: the locals of the parts are known in the body.
    text = "\n".join([flags, *((folder / f"{part}.lua").read_text("utf-8") for part in parts), body]).encode()
    return Script(name, text, hashlib.sha1(text, usedforsecurity=False).hexdigest().encode())
