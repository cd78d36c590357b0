"""Samples that another process has skipped, made known to the source that the user holds.

Sources that may skip have an id, which their copies in workers share. What one of those skips while it prepares a batch
goes back beside the batch, as an array of bytes, which every way that batches travel can carry.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

__all__ = ["collected", "detached", "joined", "note", "register"]

#: The name beside which the skips of a batch stand.
KEY: Final = "mlqueue: skipped samples"

Noted = dict[str, list[tuple[int, str]]]

_local = threading.local()
_sources: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()


def register(source: Any) -> str:
    """Makes a source known; its id. It has to have ``note_skipped(index, error)``."""
    number = os.urandom(16).hex()
    _sources[number] = source
    return number


def note(number: str, index: int, error: str) -> None:
    """Notes that the source of this id has skipped a sample, for the batch that this thread prepares."""
    noted: Noted | None = getattr(_local, "noted", None)
    if noted is not None:
        noted.setdefault(number, []).append((index, error))


@contextlib.contextmanager
def collected() -> Iterator[Noted]:
    """Within, what this thread notes is kept: a batch is prepared for another process."""
    noted: Noted = {}
    _local.noted = noted
    try:
        yield noted
    finally:
        _local.noted = None


def joined(batch: Any, noted: Noted) -> Any:
    """A batch together with what was skipped for it."""
    return {KEY: np.frombuffer(json.dumps(noted).encode(), np.uint8), "batch": batch} if noted else batch


def detached(result: Any) -> Any:
    """The batch of what `joined` gave; the sources are told of what was skipped. Raises what they raise."""
    if type(result) is not dict or KEY not in result:
        return result
    for number, items in json.loads(result[KEY].tobytes()).items():
        if (source := _sources.get(number)) is not None:
            for index, error in items:
                source.note_skipped(index, error)
    return result["batch"]
