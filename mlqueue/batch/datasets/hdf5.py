"""Rows of an HDF5 file, read when they are asked for.

PyTables takes an array of integers for the coordinates of points, not for rows, and refuses repeated ones; its nodes
cannot be sent to another process. :class:`StoredRows` is what a mini-batch needs instead: an array-like, known by the
path of its file, whose rows are gathered in any order, repeats included, and that opens the file anew wherever it
arrives. (For nodes that you have opened yourself there is :mod:`mlqueue.batch.rows`; the lock is the same.)
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from mlqueue.batch import rows
from mlqueue.errors import MissingDependency, MLQueueError

__all__ = ["DatasetFileError", "HDF5File", "StoredRows", "creating"]

#: Rows not asked for are read along when that saves a call and costs at most this many bytes.
_GAP_BYTES = 1 << 16


def _new_lock() -> None:
    rows.HDF5_LOCK = threading.RLock()


# A child forked while another thread was reading would wait for ever.
os.register_at_fork(after_in_child=_new_lock)

#: The files that have been opened in this process, for the end of it.
_opened: weakref.WeakSet[HDF5File] = weakref.WeakSet()


@functools.cache
def _close_at_exit() -> None:
    """Close what is still open before PyTables does so with a warning: exit functions run last in, first out."""
    atexit.register(_close_opened)


def _close_opened() -> None:
    for file in list(_opened):
        file.close()


class DatasetFileError(MLQueueError, RuntimeError):
    """The file of a data set is damaged or of another layout."""


class HDF5File:
    """An HDF5 file, opened for reading at the first use, once in each process.

    It can be pickled (by its path). :meth:`close` gives the file up until the next use; it is given up too when the
    object is collected.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        #: The absolute path of the file.
        self.path = os.path.abspath(path)  # noqa: PTH100 - text, for messages and pickles
        self._handles: dict[int, Any] = {}
        self._finalizer = weakref.finalize(self, _close_own, self._handles)

    def __repr__(self) -> str:
        return f"HDF5File({self.path!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return HDF5File, (self.path,)

    def node(self, name: str) -> Any:
        """The node ``name`` (``/mnist/train_y``). To be used while :meth:`reading`."""
        try:
            return self._handle().get_node(name)
        except _tables().NoSuchNodeError as error:
            raise DatasetFileError(
                f"{self.path} has no {name}: it is cut short or of another data set. Remove it and fetch it again"
            ) from error

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Hold the lock under which nodes are read."""
        with rows.HDF5_LOCK:
            yield

    def rows(self, name: str, dtype: npt.DTypeLike | None = None) -> StoredRows:
        """The array ``name``, read lazily."""
        return StoredRows(self, name, dtype)

    def read(self, name: str) -> Any:
        """All of the array ``name``; of a ragged one (VLArray) a list of its rows."""
        with self.reading():
            return self.node(name).read()

    def close(self) -> None:
        """Give up this process's handle; the next use opens the file again."""
        _close_own(self._handles)

    def _handle(self) -> Any:
        handle = self._handles.get(os.getpid())
        if handle is None:
            tables = _tables()
            try:
                handle = tables.open_file(self.path, mode="r")
            except (tables.HDF5ExtError, OSError) as error:
                reason = str(error).strip().rpartition("\n")[2]  # before it there may be a trace of the library's calls
                raise DatasetFileError(
                    f"{self.path} cannot be opened as HDF5: {reason}. Where it is damaged, delete it (of a data set "
                    "`mlqueue datasets rm` does): it is made anew when it is used."
                ) from error
            self._handles[os.getpid()] = handle
            _opened.add(self)
            _close_at_exit()
        return handle


def _close_own(handles: dict[int, Any]) -> None:
    # A handle inherited through fork stays: its state belongs to the parent.
    handle = handles.pop(os.getpid(), None)
    if handle is not None and handle.isopen:
        with rows.HDF5_LOCK:
            handle.close()


class StoredRows:
    """An array in an HDF5 file whose rows are read when they are indexed.

    It is indexed by an integer, a slice, an array of integers (rows in that order, repeats allowed) or a mask of
    booleans, and by a tuple of such an index and more for the further dimensions. Each gives a new numpy array.

    Parameters
    ----------
    file:
        The file, or its path.
    name:
        The array in it, as ``/mnist/train_X_u8``.
    dtype:
        What to give its values as; by default what is stored.
    """

    def __init__(self, file: HDF5File | str | os.PathLike[str], name: str, dtype: npt.DTypeLike | None = None) -> None:
        self.file = file if isinstance(file, HDF5File) else HDF5File(file)
        self.name = name
        with self.file.reading():
            node = self.file.node(name)
            self._stored = np.dtype(node.dtype)
            #: The shape of the whole array.
            self.shape: tuple[int, ...] = tuple(int(n) for n in node.shape)
        #: The type of the values.
        self.dtype = self._stored if dtype is None else np.dtype(dtype)
        self._gap = _GAP_BYTES // max(1, self._stored.itemsize * int(np.prod(self.shape[1:])))

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.file, self.name, self.dtype)

    def __repr__(self) -> str:
        return f"StoredRows({self.file.path!r}, {self.name!r}, shape={self.shape}, dtype={self.dtype})"

    @property
    def ndim(self) -> int:
        """The number of dimensions."""
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return self._getitem_tuple(index)
        if index is Ellipsis or index is None:
            return np.asarray(self)[index]
        if isinstance(index, slice):
            return self._slice(index)
        if isinstance(index, SupportsIndex) and not isinstance(index, np.ndarray | bool | np.bool_):
            return self._row(int(index))
        return self.take(_as_row_numbers(index, len(self)))

    def take(
        self, indices: npt.ArrayLike, axis: int = 0, out: npt.NDArray[Any] | None = None, mode: str = "raise"
    ) -> npt.NDArray[Any]:
        """The rows ``indices``, as ``numpy.take`` along axis 0: into ``out`` when it is given.

        ``mode`` is ``raise`` (an ``IndexError`` for what is out of bounds; negative ones count from the end),
        ``clip`` or ``wrap``.
        """
        if axis != 0:
            raise ValueError(f"take gathers rows, along axis 0, not {axis}; index instead")
        asked = np.asarray(indices)
        flat = _in_bounds(asked.reshape(-1), len(self), mode)
        shape = asked.shape + self.shape[1:]
        if out is None:
            out = np.empty(shape, self.dtype)
        elif out.shape != shape:
            raise ValueError(f"out has the shape {out.shape}, expected {shape}")
        if asked.ndim == 1:
            self._gather(flat, out)
        else:
            gathered = np.empty((len(flat), *self.shape[1:]), self.dtype)
            self._gather(flat, gathered)
            out[...] = gathered.reshape(shape)
        return out

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("the array is read from a file, which makes a new one; copy=False cannot be had")
        everything = self._slice(slice(None))
        return everything if dtype is None else everything.astype(dtype, copy=False)

    def _getitem_tuple(self, index: tuple[Any, ...]) -> Any:
        if not index or index[0] is Ellipsis or index[0] is None or len(index) > self.ndim:
            return np.asarray(self)[index]
        first, rest = index[0], index[1:]
        if np.ndim(first) > 1:
            return np.asarray(self)[index]
        chosen = self[first]
        if chosen.ndim < self.ndim:  # one row
            return chosen[rest]
        # Several arrays of indices pair up, as in numpy.
        return chosen[(slice(None) if isinstance(first, slice) else np.arange(len(chosen)), *rest)]

    def _row(self, number: int) -> Any:
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} is out of bounds: there are {len(self)}")
        number %= len(self)
        return self._read(number, number + 1)[0]

    def _slice(self, index: slice) -> npt.NDArray[Any]:
        start, stop, step = index.indices(len(self))
        count = len(range(start, stop, step))
        if count == 0:
            return np.empty((0, *self.shape[1:]), self.dtype)
        if step > 0:
            return self._read(start, stop, step)
        # PyTables reads forwards only.
        last = start + (count - 1) * step
        return self._read(last, start + 1, -step)[::-1].copy()

    def _read(self, start: int, stop: int, step: int = 1) -> npt.NDArray[Any]:
        with self.file.reading():
            block: npt.NDArray[Any] = self.file.node(self.name).read(start, stop, step)
        return block.astype(self.dtype, copy=False)

    def _gather(self, numbers: npt.NDArray[np.intp], out: npt.NDArray[Any]) -> None:
        """Fill ``out`` with the rows ``numbers``: sorted, near ones in one read, repeats read once."""
        if not len(numbers):
            return
        order = np.argsort(numbers, kind="stable")
        ascending = numbers[order]
        breaks = np.flatnonzero(np.diff(ascending) > self._gap + 1) + 1
        starts, stops = [0, *breaks.tolist()], [*breaks.tolist(), len(numbers)]
        with self.file.reading():
            node = self.file.node(self.name)
            for start, stop in zip(starts, stops, strict=True):
                first = int(ascending[start])
                block = node.read(first, int(ascending[stop - 1]) + 1)
                out[order[start:stop]] = block[ascending[start:stop] - first]


def _as_row_numbers(index: Any, length: int) -> npt.NDArray[Any]:
    numbers = np.asarray(index)
    if numbers.dtype == np.bool_:
        if numbers.shape != (length,):
            raise IndexError(f"a mask of rows has the shape ({length},), not {numbers.shape}")
        return np.flatnonzero(numbers)
    return numbers.astype(np.intp) if numbers.size == 0 else numbers


def _in_bounds(numbers: npt.NDArray[Any], length: int, mode: str) -> npt.NDArray[np.intp]:
    if numbers.size and not np.issubdtype(numbers.dtype, np.integer):
        raise IndexError(f"rows are numbered by integers, not {numbers.dtype}")
    found = numbers.astype(np.intp, copy=False)
    if mode == "clip":
        return np.clip(found, 0, length - 1)
    if mode == "wrap":
        return found % length
    if mode != "raise":
        raise ValueError(f"mode must be 'raise', 'clip' or 'wrap', not {mode!r}")
    if found.size and not (-length <= found.min() and found.max() < length):
        wrong = found[(found < -length) | (found >= length)][0]
        raise IndexError(f"row {wrong} is out of bounds: there are {length}")
    return np.where(found < 0, found + length, found)


@contextlib.contextmanager
def creating(path: str, group: str, title: str) -> Iterator[Group]:
    """A new HDF5 file with one group, to be written; closed at the end."""
    tables = _tables()
    with rows.HDF5_LOCK, tables.open_file(path, mode="w", title=title) as file:
        yield Group(file, file.create_group(file.root, group, title))


class Group:
    """A group of a file being written."""

    def __init__(self, file: Any, node: Any) -> None:
        self._file = file
        self._node = node

    def array(self, name: str, values: Any) -> None:
        """Write a whole array, uncompressed."""
        self._file.create_array(self._node, name, values)

    def empty(self, name: str, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Any:
        """An uncompressed array to be filled by slices."""
        atom = _tables().Atom.from_dtype(np.dtype(dtype))
        return self._file.create_array(self._node, name, atom=atom, shape=shape)

    def growing(self, name: str, dtype: npt.DTypeLike, row_shape: tuple[int, ...], expected: int) -> Any:
        """A compressed array of rows to be appended to (``append(rows)``)."""
        tables = _tables()
        return self._file.create_earray(
            self._node,
            name,
            tables.Atom.from_dtype(np.dtype(dtype)),
            (0, *row_shape),
            filters=tables.Filters(complevel=9, complib="blosc"),
            expectedrows=expected,
        )

    def ragged(self, name: str, dtype: npt.DTypeLike) -> Any:
        """Rows of different lengths to be appended to (``append(row)``)."""
        return self._file.create_vlarray(self._node, name, _tables().Atom.from_dtype(np.dtype(dtype)))


def _tables() -> Any:
    try:
        return importlib.import_module("tables")
    except ImportError as error:
        raise MissingDependency(
            "PyTables, which reads and writes the files of data sets, is not installed; "
            "run `pip install 'mlqueue[datasets]'`"
        ) from error
