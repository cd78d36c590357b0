"""Keeping samples that were expensive to read: in memory, or in an HDF5 file.

A cache file is an HDF5 file (read through PyTables) with an array for each part of a sample, ``/samples/part0`` and so
on; their names, where samples are dicts, are in the attribute ``names`` (JSON) of ``/samples``. It is written beside
its final name and renamed, so that it exists whole or not at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mlqueue.batch.errors import BatchError
from mlqueue.batch.iteration import batch_length
from mlqueue.batch.rows import HDF5Rows
from mlqueue.errors import MissingDependency

__all__ = ["MemoryCache", "open_cache_file", "write_cache_file"]


class MemoryCache:
    """Samples by index, each read once. Filled from any number of threads; a copy in another process starts empty."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._lock = threading.Lock()
        self._names: list[str] | None = None
        self._arrays: list[np.ndarray] | None = None
        self._filled = np.zeros(length, np.bool_)

    def __getstate__(self) -> dict[str, Any]:
        return {"length": self._length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["length"])  # type: ignore[misc]

    def get(self, indices: np.ndarray, read: Callable[[np.ndarray], Any]) -> Any:
        """The samples at these indices, as arrays of the caller's own; those not yet here come from `read`."""
        missing = np.unique(indices[~self._filled[indices]])
        if missing.size or self._arrays is None:
            self._keep(missing, read(missing))
        assert self._arrays is not None
        parts = [array.take(indices, 0) for array in self._arrays]
        return tuple(parts) if self._names is None else dict(zip(self._names, parts, strict=True))

    def _keep(self, indices: np.ndarray, batch: Any) -> None:
        names, parts = parts_of(batch)
        if any(len(part) != len(indices) for part in parts):
            raise BatchError(
                f"a cache in memory was given {min(map(len, parts))} samples for {len(indices)} indices, and cannot "
                "tell which are missing: cache before what leaves samples out, or in a file, cache(path)."
            )
        with self._lock:
            if self._arrays is None:
                self._arrays = [np.empty((self._length, *part.shape[1:]), part.dtype) for part in parts]
                self._names = names
            for array, part in zip(self._arrays, parts, strict=True):
                if part.shape[1:] != array.shape[1:] or part.dtype != array.dtype:
                    raise BatchError(
                        f"a cache needs samples of one shape and dtype: got {part.dtype} {part.shape[1:]} after "
                        f"{array.dtype} {array.shape[1:]}. Pad the samples before (see mlqueue.batch.collate)."
                    )
                array[indices] = part
            # Last, so that no other thread takes what is not there yet.
            self._filled[indices] = True


def parts_of(batch: Any) -> tuple[list[str] | None, list[np.ndarray]]:
    """The arrays of a batch, and their names where it is a dict."""
    names = list(batch) if isinstance(batch, dict) else None
    parts = list(batch.values() if isinstance(batch, dict) else batch)
    for part in parts:
        if isinstance(part, tuple | dict):
            raise TypeError("nested batches cannot be cached; cache the members, or flatten.")
    return names, [np.asarray(part) for part in parts]


def write_cache_file(path: Path, batches: Iterator[Any], key: str) -> int:
    """Write all batches into a cache file; gives the number of samples."""
    # Imported here, because every worker process imports this module, and that one many others.
    import tempfile

    tables = need_tables()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    os.close(handle)
    n = 0
    try:
        with tables.open_file(name, "w") as file:
            nodes: list[Any] = []
            for batch in batches:
                names, parts = parts_of(batch)
                if not nodes:
                    nodes = [append_node(tables, file, number, part) for number, part in enumerate(parts)]
                    file.root.samples._v_attrs.names = json.dumps(names)
                for node, part in zip(nodes, parts, strict=True):
                    node.append(part)
                n += batch_length(batch)
            if not nodes:
                raise BatchError("there is nothing to cache: the source gave no batch.")
            file.root.samples._v_attrs.key = key
        Path(name).replace(path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
    return n


def append_node(tables: Any, file: Any, number: int, part: np.ndarray) -> Any:
    if part.dtype.hasobject or part.dtype.kind == "U":
        raise TypeError(
            f"part {number} of the batch is of dtype {part.dtype}, which a cache file cannot hold; "
            "make numbers or bytes of it before (a map), or cache in memory."
        )
    atom = tables.Atom.from_dtype(np.dtype((part.dtype, ())))
    return file.create_earray("/samples", f"part{number}", atom, (0, *part.shape[1:]), createparents=True)


def open_cache_file(path: Path, key: str) -> list[Any] | dict[str, Any] | None:
    """The arrays of a cache file, or None where there is none; BatchError when it belongs to something else."""
    if not path.exists():
        return None
    tables = need_tables()
    if not (path.is_file() and tables.is_hdf5_file(str(path))):
        raise no_cache(path)
    with tables.open_file(str(path), "r") as file:
        samples = file.root.samples if "samples" in file.root else None
        if samples is None or "key" not in samples._v_attrs:
            raise no_cache(path)
        written = str(samples._v_attrs.key)
        if written != key:
            raise BatchError(
                f"the cache file {path} was written with the key {written!r}, not {key!r}: delete it, or "
                "give another path."
            )
        names = json.loads(str(samples._v_attrs.names))
        nodes = [getattr(samples, f"part{number}") for number in range(samples._v_nchildren)]
        rows = [HDF5Rows(node, str(path), node._v_pathname, "tables") for node in nodes]
    for part in rows:
        part.close()
    return rows if names is None else dict(zip(names, rows, strict=True))


def no_cache(path: Path) -> BatchError:
    return BatchError(f"{path} is no cache file, it was made by something else: give another path.")


def need_tables() -> Any:
    try:
        import tables
    except ImportError as error:
        raise MissingDependency("HDF5 files need PyTables: pip install tables") from error
    return tables
