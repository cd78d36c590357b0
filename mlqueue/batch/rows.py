"""Reading rows (samples) out of anything like an array.

An array-like is only ever asked with an int, a slice, or a 1-D int array. Nodes of HDF5 files, which cannot be asked
for rows in any order or for a row twice, are read through :class:`HDF5Rows`: it sorts, reads runs as slices, works
from several threads (one at a time), and can be sent to another process, where it opens the file again.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlqueue.batch import gathering
from mlqueue.batch.transport import Recycler

__all__ = ["Gatherer", "HDF5Rows", "as_rows", "is_array_like", "lender", "mapped_root", "reader"]

#: Only one thread at a time may be inside the HDF5 library as PyTables uses it.
HDF5_LOCK = threading.RLock()

#: Batches of an array of at least so many bytes are put into memory that is used again.
REUSED_BYTES = 1 << 19
#: Copies of more bytes at once go past the caches, out of which whoever asked for the batch would read it next.
COPIED_AT_ONCE = 1 << 20
#: For all iterators of this process: the next one finds what the one before has left.
RECYCLER = Recycler()

Span = slice | np.ndarray
Reader = Callable[[Any], Any]


class Run(Protocol):
    """What :class:`Gatherer` has to know of :class:`~mlqueue.batch.sampling.Run`."""

    @property
    def order(self) -> np.ndarray | None: ...


def is_array_like(x: Any) -> bool:
    """Whether x has a length and can be indexed, and is neither text nor a dict."""
    return hasattr(x, "__len__") and hasattr(x, "__getitem__") and not isinstance(x, str | bytes | dict)


def as_rows(x: Any) -> Any:
    """x itself, or an :class:`HDF5Rows` around it when it is a node of PyTables or a dataset of h5py."""
    if isinstance(x, HDF5Rows):
        return x
    tables, h5py = sys.modules.get("tables"), sys.modules.get("h5py")
    if tables is not None and isinstance(x, tables.Leaf):
        return HDF5Rows(x, x._v_file.filename, x._v_pathname, "tables")
    if h5py is not None and isinstance(x, h5py.Dataset):
        return HDF5Rows(x, x.file.filename, x.name, "h5py")
    return x


def mapped_root(array: np.ndarray) -> np.memmap[Any, Any] | None:
    """The memory map of a file in which an array lies; None where it lies in none."""
    base: Any = array
    while isinstance(base, np.ndarray):
        if isinstance(base, np.memmap) and not isinstance(base.base, np.ndarray):
            is_open: bool = base.filename is not None  # else the result of an operation with one
            return base if is_open else None
        base = base.base
    return None


def reader(x: Any) -> Reader:
    """A function that gives the rows of x for a slice or a 1-D int array, never as a view of x."""
    x = as_rows(x)
    if isinstance(x, np.memmap):
        x = x.view(np.ndarray)
    if not isinstance(x, np.ndarray) and hasattr(x, "__dlpack__"):
        x = from_dlpack(x)
    if type(x) is np.ndarray:
        return _array_reader(x)
    if hasattr(x, "oindex"):  # zarr, whose plain [] with an array means points, not rows
        return lambda span: x[span] if isinstance(span, slice | int) else x.oindex[span]
    if isinstance(x, HDF5Rows):
        return x.__getitem__
    if isinstance(x, list | tuple):
        return _sequence_reader(x)
    return lambda span: _own(x, x[span])


def lender(x: Any) -> Reader:
    """Like :func:`reader`, for one who is done with the rows of one call before the next: they may not be written into,
    are views of x where they are in order, and lie in the same memory every time where they are not."""
    plain = x.view(np.ndarray) if isinstance(x, np.memmap) else x
    if not (type(plain) is np.ndarray and plain.ndim and plain.flags.c_contiguous) or plain.dtype.hasobject:
        return reader(x)
    return Lender(plain)


class Lender:
    """Lends rows of a plain array; see :func:`lender`."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array.view()
        self._array.flags.writeable = False
        self._slot = np.empty((0, *array.shape[1:]), array.dtype)

    def slot(self, length: int) -> np.ndarray:
        """The memory that is lent, for so many rows."""
        if length > len(self._slot):
            self._slot = RECYCLER.empty((length, *self._array.shape[1:]), self._array.dtype)
        return self._slot[:length]

    def withdraw(self, length: int) -> np.ndarray:
        """The memory that is lent, for so many rows, which nobody else is lent until :meth:`restore`."""
        slot = self.slot(length)
        self._slot = slot[:0]
        return slot

    def restore(self, slot: np.ndarray) -> None:
        """Lend again what was withdrawn. Where that is left out, there will be other memory."""
        self._slot = slot

    def __call__(self, span: Any) -> Any:
        if type(span) is not np.ndarray:
            return self._array[span]
        rows = rows_into(self._array, self._array.take, span, lambda shape, dtype: self.slot(shape[0]))
        lent: np.ndarray = rows.view()
        lent.flags.writeable = False
        return lent


class Gatherer:
    """Gives batches of rows of x, most of them of `length`, as fast as they can be had: of a plain array in the same
    memory over and over (`lend`), or in memory that is used again when nobody has the batch any more. Else as
    :func:`lender` and :func:`reader` do."""

    def __init__(self, x: Any, length: int, lend: bool) -> None:
        plain = x.view(np.ndarray) if isinstance(x, np.memmap) else x
        self._array: np.ndarray | None = None
        if type(plain) is np.ndarray and plain.ndim and plain.flags.c_contiguous and not plain.dtype.hasobject:
            self._array = plain
        self._length, self._lend = length, lend
        self._read = lender(x) if lend else reader(x)
        self._large = self._array is not None and length * plain[:1].nbytes >= REUSED_BYTES

    def __call__(self, span: Span) -> Any:
        """The rows at a slice, or at 1-D ints."""
        array = self._array
        if array is None or self._lend or not self._large:
            return self._read(span)
        if type(span) is np.ndarray:
            return rows_into(array, self._read, span, RECYCLER.empty)
        part = array[span]
        rows = RECYCLER.empty(part.shape, part.dtype)
        rows[...] = part
        return rows

    def of(self, run: Run) -> Reader:
        """What gives the batches of a run: for parts of its order, or for slices where it has none."""
        array = self._array
        if array is None or not len(array):
            return self._read
        if run.order is None:
            return self._read if self._lend else self._copies(array)
        # take() copies through a buffer unless it may clip. So what is allowed is told here, for all batches at once.
        if run.order.min() < 0 or run.order.max() >= len(array):
            return self._read
        return self._takes(array)

    def _shape(self, array: np.ndarray) -> tuple[int, ...]:
        return self._length, *array.shape[1:]

    def _copies(self, array: np.ndarray) -> Reader:
        if not self._large:
            return lambda span: array[span].copy()
        empty = RECYCLER.maker(self._shape(array), array.dtype)
        pace, length = self._pace("copy", array), self._length
        step = rows_at_once(length, array[:1].nbytes)

        def copy(span: Any) -> np.ndarray:
            rows = empty()
            copy_rows(rows, array[span], step)
            return rows

        def share(span: Any) -> np.ndarray:
            rows, given = empty(), array[span]

            def copy_part(start: int, stop: int) -> None:
                copy_rows(rows[start:stop], given[start:stop], step)

            pace(copy_part, length)  # type: ignore[misc]
            return rows

        return copy if pace is None else share

    def _pace(self, kind: str, array: np.ndarray) -> gathering.Pace | None:
        return gathering.pace_of(kind, self._length * array[:1].nbytes) if self._large else None

    def _takes(self, array: np.ndarray) -> Reader:
        take, pace = array.take, self._pace("take", array)
        if isinstance(self._read, Lender):
            return self._lends(array, self._read) if pace is None else self._lends_shared(array, self._read, pace)
        if not self._large:
            return lambda index: take(index, 0)
        empty = RECYCLER.maker(self._shape(array), array.dtype)

        def gather(index: np.ndarray) -> np.ndarray:
            rows = empty()
            take(index, 0, rows, "clip")
            return rows

        def share(index: np.ndarray) -> np.ndarray:
            rows = empty()
            take_shared(pace, take, index, rows)  # type: ignore[arg-type]
            return rows

        return gather if pace is None else share

    def _lends(self, array: np.ndarray, lender: Lender) -> Reader:
        take, slot = array.take, lender.slot(self._length)
        lent = slot.view()
        lent.flags.writeable = False

        def lend(index: np.ndarray) -> np.ndarray:
            take(index, 0, slot, "clip")
            return lent

        return lend

    def _lends_shared(self, array: np.ndarray, lender: Lender, pace: gathering.Pace) -> Reader:
        take, length = array.take, self._length

        def lend(index: np.ndarray) -> np.ndarray:
            # Withdrawn, because after an exception in here a helper may still write to it.
            slot = lender.withdraw(length)
            take_shared(pace, take, index, slot)
            lender.restore(slot)
            lent = slot.view()
            lent.flags.writeable = False
            return lent

        return lend


def rows_at_once(length: int, row_bytes: int) -> int:
    """How many of so many rows to copy at once: each time as many, up to :data:`COPIED_AT_ONCE` bytes and a row."""
    parts = min(length, -(-length * row_bytes // COPIED_AT_ONCE))
    return -(-length // max(1, parts))


def copy_rows(rows: np.ndarray, given: np.ndarray, step: int) -> None:
    """Copy as many rows as there are into others, so many at once."""
    for start in range(0, len(rows), step):
        rows[start : start + step] = given[start : start + step]


def take_shared(pace: gathering.Pace, take: Callable[..., Any], index: np.ndarray, rows: np.ndarray) -> None:
    """The rows that an array's ``take`` gives, which exist, into others, with help where that pays."""

    def take_part(start: int, stop: int) -> None:
        take(index[start:stop], 0, rows[start:stop], "clip")

    pace(take_part, len(index))


def from_dlpack(x: Any) -> Any:
    """A tensor of another library, in the memory of the CPU, as an array on that memory; x itself where it is not."""
    try:
        return np.from_dlpack(x)
    except (BufferError, RuntimeError, TypeError, ValueError):
        return x


def _array_reader(array: np.ndarray) -> Reader:
    # take() is the fastest, but it would copy the whole of an array that is not contiguous first.
    if array.flags.c_contiguous and array.ndim:
        take = array.take
        return lambda span: take(span, 0) if type(span) is np.ndarray else _copy(array[span])
    return lambda span: _copy(array[span])


def rows_into(x: Any, read: Reader, index: np.ndarray, empty: Callable[[Any, Any], np.ndarray]) -> Any:
    """The rows of x at a 1-D int array, in an array that ``empty(shape, dtype)`` makes where x allows it."""
    # Subclasses (masked arrays, recarrays) have more to them than their numbers.
    if not (type(x) in (np.ndarray, np.memmap) and x.ndim and not x.dtype.hasobject):
        return read(index)
    if index.size and (index.min() < 0 or index.max() >= len(x)):
        return read(index)
    out = empty((len(index), *x.shape[1:]), x.dtype)
    # take() with out= copies through a buffer unless it may clip; and copies the whole of an array with gaps.
    if x.flags.c_contiguous:
        np.take(x, index, axis=0, out=out, mode="clip")
    else:
        out[...] = x[index]
    return out


def _sequence_reader(sequence: Any) -> Reader:
    def read(span: Any) -> Any:
        if isinstance(span, slice):
            return np.asarray(sequence[span])
        if np.ndim(span) == 0:
            return sequence[int(span)]
        return np.asarray([sequence[index] for index in span.tolist()])

    return read


def _copy(rows: Any) -> Any:
    return rows.copy() if isinstance(rows, np.ndarray) and rows.base is not None else rows


def _own(x: Any, rows: Any) -> Any:
    """The rows as an array that may be written into: a copy where a user's class gave a view of its own."""
    if isinstance(rows, np.ndarray) and (not rows.flags.writeable or rows.base is not None):
        return rows.copy()
    return rows


class HDF5Rows:
    """Rows of a node of a PyTables file or of an h5py dataset, in any order and repeated as you like.

    Attributes: `shape`, `dtype`, `ndim`; ``len()``; indexing by an int, a slice, or a 1-D int array gives numpy
    arrays. Pickled, it is the file's name and the node's; the file is opened again (read only) at the first read.
    """

    def __init__(self, node: Any, filename: str, path: str, library: str) -> None:
        self._node, self.filename, self.path, self.library = node, filename, path, library
        self.shape, self.dtype = tuple(node.shape), node.dtype
        self._closing: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.flush()
        # Whoever opens it may have another working directory.
        return {**self.__dict__, "filename": str(Path(self.filename).absolute()), "_node": None, "_closing": None}

    def flush(self) -> None:
        """Have the file hold what was written to it through this node's library."""
        with HDF5_LOCK, contextlib.suppress(Exception):
            (self._node._v_file if self.library == "tables" else self._node.file).flush()

    def close(self) -> None:
        """Let the node go, and close the file if it was opened here; the next read opens it again."""
        self._node = None
        if self._closing is not None:
            self._closing()

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return int(self.shape[0])

    def _open(self) -> Any:
        if self._node is None:
            library = importlib.import_module(self.library)
            if self.library == "tables":
                file = library.open_file(self.filename, "r")
                self._node = file.get_node(self.path)
            else:
                file = library.File(self.filename, "r")
                self._node = file[self.path]
            self._closing = weakref.finalize(self, file.close)
        return self._node

    def __getitem__(self, index: Any) -> Any:
        with HDF5_LOCK:
            node = self._open()
            if isinstance(index, np.ndarray) and index.ndim == 1:
                return self._read(node, index)
            if isinstance(index, slice) and (index.step or 1) < 0:
                return self._read(node, np.arange(len(self))[index])
            return node[index]

    def _read(self, node: Any, index: np.ndarray) -> np.ndarray:
        if index.dtype == np.bool_:
            index = np.flatnonzero(index)
        if not index.size:
            empty: np.ndarray = node[0:0]
            return empty
        index = from_the_front(index, len(self))
        wanted, places = np.unique(index, return_inverse=True)
        rows = read_sorted(node, wanted, self.shape[1:], self.dtype)
        return rows if np.array_equal(wanted, index) else rows.take(places, 0)


def from_the_front(index: np.ndarray, length: int) -> np.ndarray:
    """Indices of so many rows, at least one of them, with those that count from the end told from the beginning."""
    index = np.where(index < 0, index + length, index)
    if index.min() < 0 or index.max() >= length:
        raise IndexError(f"indices go from {index.min()} to {index.max()}, but there are {length} rows.")
    return index


def read_sorted(node: Any, wanted: np.ndarray, row_shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The rows at `wanted` (ascending, each once), each run of neighbours as one slice."""
    starts = np.flatnonzero(np.diff(wanted, prepend=wanted[0] - 2) > 1)
    stops = np.append(starts[1:], len(wanted))
    if len(starts) == 1:
        rows: np.ndarray = np.asarray(node[int(wanted[0]) : int(wanted[-1]) + 1])
        return rows
    out = np.empty((len(wanted), *row_shape), dtype)
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        out[start:stop] = node[int(wanted[start]) : int(wanted[stop - 1]) + 1]
    return out
