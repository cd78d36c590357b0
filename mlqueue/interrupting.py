"""Raising an exception in the thread of a job, but not while that imports something.

An import that is broken off leaves modules half made, and what is written in C, as most of numpy and torch is, cannot
be imported a second time in a process: all later jobs there would fail. So an interruption waits until the import is
done.
"""

from __future__ import annotations

import sys
from typing import Final

__all__ = ["LOOK_EVERY", "PATIENCE", "importing"]

#: For how many seconds at most an interruption waits: what is imported may be a program that runs for hours.
PATIENCE: Final = 30.0
#: How often it is looked whether the import is done, in seconds.
LOOK_EVERY: Final = 0.02

#: The file that the functions of the import system name.
_IMPORTS: Final = "<frozen importlib._bootstrap>"


def importing(thread: int) -> bool:
    """Whether a thread is in the midst of an import."""
    frame = sys._current_frames().get(thread)
    while frame is not None and frame.f_code.co_filename != _IMPORTS:
        frame = frame.f_back
    return frame is not None
