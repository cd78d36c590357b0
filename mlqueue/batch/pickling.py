"""How code and data sources are sent to worker processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from mlqueue.batch.rows import as_rows
from mlqueue.errors import MissingDependency

__all__ = ["pickle_code"]


def pickle_code(
    value: Any, *, whole: bool = False, refer: Callable[[Any], Any] | None = None
) -> tuple[bytes, list[Any]]:
    """Pickle work or a source: functions and classes of the main script, lambdas and closures by value.

    Gives the pickle and the buffers of arrays beside it; with `whole` everything is in the pickle. An open HDF5 node
    and a memory map travel as the name of their file. `refer` says of an object how it is reduced, or NotImplemented.
    """
    try:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependency(
            "a pool of processes needs cloudpickle to send functions: `pip install joblib` brings it; or use a "
            "WorkerThreadPool."
        ) from error
    buffers: list[Any] = []
    file = io.BytesIO()

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            reduced = NotImplemented if refer is None else refer(obj)
            if reduced is NotImplemented:
                reduced = reduce_file(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    keep = None if whole else lambda buffer: buffers.append(buffer.raw())
    Pickler(file, protocol=5, buffer_callback=keep).dump(value)
    return file.getvalue(), buffers


def reduce_file(obj: Any) -> Any:
    """How an array that lives in a file is sent: file and place; NotImplemented for all else."""
    kind = type(obj)
    if kind is np.memmap and obj.filename is not None and obj.mode in ("r", "c") and is_whole_map(obj):
        order = "F" if obj.flags.f_contiguous and not obj.flags.c_contiguous else "C"
        return open_memmap, (str(obj.filename), obj.dtype, obj.mode, obj.offset, obj.shape, order)
    rows = as_rows(obj)
    return NotImplemented if rows is obj else rows.__reduce_ex__(5)


def is_whole_map(array: np.memmap[Any, Any]) -> bool:
    """Whether this is the map itself; a part of one keeps its parent's offset, which would then be wrong."""
    return not isinstance(array.base, np.ndarray) and (array.flags.c_contiguous or array.flags.f_contiguous)


def open_memmap(path: str, dtype: Any, mode: Any, offset: int, shape: Any, order: Any) -> np.ndarray:
    """The memory map of a file."""
    return np.memmap(path, dtype, mode, offset, shape, order)
