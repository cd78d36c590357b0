"""How code and data sources are sent to worker processes."""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np

from mlqueue.batch.rows import as_rows, mapped_root
from mlqueue.errors import MissingDependency

__all__ = ["pickle_code"]

#: A part of a memory map of fewer bytes is sent as its content.
SMALL: Final = 1 << 16


def pickle_code(
    value: Any,
    *,
    whole: bool = False,
    refer: Callable[[Any], Any] | None = None,
    by_path: Callable[[Any], None] | None = None,
) -> tuple[bytes, list[Any]]:
    """Pickle work or a source: functions and classes of the main script, lambdas and closures by value.

    Gives the pickle and the buffers of arrays beside it; with `whole` everything is in the pickle. An open HDF5 node
    and a memory map travel as the name of their file. `refer` says of an object how it is reduced, or NotImplemented.
    `by_path` is called with each object that travels, or may travel, as the name of a file.
    """
    try:
        import cloudpickle  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise MissingDependency(
            "a pool of processes needs cloudpickle to send functions: `pip install joblib` brings it; or use a "
            "WorkerThreadPool."
        ) from error
    importlib.import_module(np.recarray.__module__)  # else the class would be sent by value, and not work there
    buffers: list[Any] = []
    file = io.BytesIO()

    class Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
        def reducer_override(self, obj: Any) -> Any:
            reduced = NotImplemented if refer is None else refer(obj)
            if reduced is NotImplemented:
                reduced = reduce_file(obj)
                if by_path is not None and (reduced is not NotImplemented or not isinstance(obj, np.ndarray)):
                    by_path(obj)
            return super().reducer_override(obj) if reduced is NotImplemented else reduced

    keep = None if whole else lambda buffer: buffers.append(buffer.raw())
    Pickler(file, protocol=5, buffer_callback=keep).dump(value)
    return file.getvalue(), buffers


def reduce_file(obj: Any) -> Any:
    """How an array that lives in a file is sent: file and place; NotImplemented for all else."""
    if isinstance(obj, np.ndarray):
        return _reduce_mapped(obj) if type(obj) in (np.memmap, np.ndarray) else NotImplemented
    rows = as_rows(obj)
    return NotImplemented if rows is obj else (same, (rows,))


def same(rows: Any) -> Any:
    """The rows of an HDF5 file, in the place of the node that they were made of."""
    return rows


def _reduce_mapped(array: np.ndarray) -> Any:
    """A memory map, or a part of one without gaps: what can be written to is sent as it is now, by value."""
    root = mapped_root(array)
    if root is None or not (array.flags.c_contiguous or array.flags.f_contiguous) or array.dtype.hasobject:
        return NotImplemented
    if root.mode not in (("r", "c") if array is root else ("r",)) or (array is not root and array.nbytes < SMALL):
        return NotImplemented
    path = str(Path(str(root.filename)).absolute())
    if not Path(path).exists():  # it was deleted when it had been mapped
        return NotImplemented
    place = array.__array_interface__["data"][0] - root.__array_interface__["data"][0]
    order = "F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C"
    given = (path, array.dtype, root.mode, root.offset + place, array.shape, order)
    return (open_memmap if type(array) is np.memmap else open_array), given


def open_memmap(path: str, dtype: Any, mode: Any, offset: int, shape: Any, order: Any) -> np.ndarray:
    """The memory map of a file."""
    return np.memmap(path, dtype, mode, offset, shape, order)


def open_array(*args: Any) -> np.ndarray:
    """The same, as a plain array."""
    return open_memmap(*args).view(np.ndarray)
