"""The formats that data sets are published in, read without trust.

Every reader takes a file that may be cut, damaged or made to harm, and either returns arrays of the right shape or
raises :class:`~mlqueue.batch.datasets.dataset.BadSourceFile`. Archives are never unpacked to disk: their members are
read by name as they go by, so that names, links and permissions in them mean nothing. Pickles are read by an
unpickler that knows arrays of numbers and plain containers and calls nothing else.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import importlib
import io
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mlqueue.batch.datasets.dataset import BadSourceFile
from mlqueue.errors import MissingDependency

__all__ = [
    "check_labels",
    "load_pickle",
    "matlab_arrays",
    "read_idx",
    "read_member",
    "row_blocks",
    "tar_members",
]

#: The most that one IDX file, pickle or text member may hold when it is unpacked; the largest of these data sets has
#: 0.6 GB (a hostile archive can unpack to a thousand times its size).
MAX_BYTES = 1 << 30

_BLOCK_BYTES = 1 << 24


@contextlib.contextmanager
def _damage_in(path: str) -> Iterator[None]:
    """What the libraries raise for cut and damaged files, as one error."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, tarfile.TarError, zlib.error, struct.error, pickle.UnpicklingError) as error:
        raise BadSourceFile(f"{Path(path).name} is cut or damaged: {error}. Fetch it again") from error


def read_idx(path: str, ndim: int) -> npt.NDArray[np.uint8]:
    """The array of a gzip-compressed IDX file (the format of MNIST) of bytes.

    Parameters
    ----------
    path:
        The file.
    ndim:
        How many dimensions it must have: 3 for images (n, height, width), 1 for labels.
    """
    with _damage_in(path), gzip.open(path, "rb") as file:
        zero, kind, dimensions = struct.unpack(">HBB", file.read(4))
        if (zero, kind, dimensions) != (0, 8, ndim):
            raise BadSourceFile(
                f"{Path(path).name} is no IDX file of bytes with {ndim} dimensions: it starts with "
                f"{zero:04x} {kind:02x} {dimensions:02x}, expected 0000 08 {ndim:02x}"
            )
        shape = struct.unpack(f">{ndim}I", file.read(4 * ndim))
        size = int(np.prod(shape, dtype=object))
        if not 0 < size <= MAX_BYTES:
            raise BadSourceFile(f"{Path(path).name} says it holds an array of {shape}, which is empty or too large")
        data = file.read(size)
        if len(data) != size or file.read(1):
            raise BadSourceFile(f"{Path(path).name} does not hold the {size} bytes that its header says")
    return np.frombuffer(data, np.uint8).reshape(shape)


def tar_members(path: str, names: set[str]) -> Iterator[tuple[str, int, IO[bytes]]]:
    """The members ``names`` of a gzip-compressed tar: (name, size in bytes, open file), in the order of the archive.

    Every one of ``names`` must be there, once, as a plain file. Members are read on the way through, so that an
    archive of gigabytes is decompressed once; whatever else is in it is passed over.
    """
    missing = set(names)
    # As a stream: a seek, even one byte back, would decompress the archive from its start again.
    with (
        _damage_in(path),
        gzip.open(path, "rb") as unpacked,
        tarfile.open(fileobj=unpacked, mode="r|", bufsize=_BLOCK_BYTES) as archive,
    ):
        for member in archive:
            name = member.name.removeprefix("./")
            if name not in names:
                continue
            if name not in missing or not member.isreg() or member.issparse():
                raise BadSourceFile(f"{Path(path).name} holds {name} twice, or not as a plain file")
            file = archive.extractfile(member)
            assert file is not None
            missing.remove(name)
            yield name, member.size, file
        while unpacked.read(_BLOCK_BYTES):  # the checksum comes last
            pass
    if missing:
        raise BadSourceFile(f"{Path(path).name} lacks {', '.join(sorted(missing))}")


def read_member(name: str, size: int, file: IO[bytes]) -> bytes:
    """All bytes of one of :func:`tar_members`."""
    if size > MAX_BYTES:
        raise BadSourceFile(f"{name} says it holds {size} bytes; at most {MAX_BYTES} are read")
    return _read_exactly(name, size, file)


def _read_exactly(name: str, size: int, file: IO[bytes]) -> bytes:
    with _damage_in(name):
        data = file.read(size)
    if len(data) != size:
        raise BadSourceFile(f"{name} is cut after {len(data)} of {size} bytes")
    return data


def row_blocks(
    name: str, size: int, file: IO[bytes], row_shape: tuple[int, ...]
) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """The rows of uint8 in one of :func:`tar_members`, some megabytes at a time: (number of the first row, block)."""
    row_bytes = int(np.prod(row_shape))
    total, left_over = divmod(size, row_bytes)
    if left_over or not total:
        raise BadSourceFile(f"{name} holds {size} bytes, not a multiple of {row_bytes} (rows of {row_shape})")
    per_block = max(1, _BLOCK_BYTES // row_bytes)
    for first in range(0, total, per_block):
        count = min(per_block, total - first)
        data = _read_exactly(name, count * row_bytes, file)
        yield first, np.frombuffer(data, np.uint8).reshape(count, *row_shape)


def matlab_arrays(path: str, *names: str) -> tuple[npt.NDArray[Any], ...]:
    """The numeric arrays ``names`` of a MATLAB file (.mat, version 5)."""
    try:
        loadmat = importlib.import_module("scipy.io").loadmat
    except ImportError as error:
        raise MissingDependency(
            "SciPy, which reads MATLAB files, is not installed; run `pip install 'mlqueue[datasets]'`"
        ) from error
    try:
        content = loadmat(path, variable_names=names)
    except Exception as error:  # scipy raises what its parser stumbles over: TypeError, IndexError, ...
        raise BadSourceFile(f"{Path(path).name} cannot be read as a MATLAB file: {error!r}. Fetch it again") from error
    arrays = []
    for name in names:
        array = content.get(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "uif":
            raise BadSourceFile(f"{Path(path).name} holds no array of numbers called {name}")
        arrays.append(array)
    return tuple(arrays)


def check_labels(labels: Any, count: int, n_classes: int, what: str) -> npt.NDArray[np.int32]:
    """``labels`` as (count,) int32, each in 0 to ``n_classes`` - 1."""
    try:
        array = np.asarray(labels)
    except (ValueError, OverflowError) as error:  # a list of lists of different lengths, an integer beyond 64 bits
        raise BadSourceFile(f"{what}: expected {count} integer labels: {error}") from error
    if array.shape != (count,) or array.dtype.kind not in "ui":
        raise BadSourceFile(f"{what}: expected {count} integer labels, found {array.dtype} of the shape {array.shape}")
    if count and not (array.min() >= 0 and array.max() < n_classes):
        raise BadSourceFile(f"{what}: labels run from {array.min()} to {array.max()}, allowed are 0 to {n_classes - 1}")
    return array.astype(np.int32)


def load_pickle(data: bytes, what: str) -> Any:
    """A pickle that holds nothing but containers, numbers, text and arrays of numbers.

    No name in it is looked up: those that numpy's own pickles use (of numpy 1 and 2, of Python 2 and 3) stand for
    functions of this module, which check what they are given and build the array from its bytes; any other name is an
    error. Text of Python 2 arrives as str (latin-1).
    """
    try:
        return _resolve(_ArrayUnpickler(io.BytesIO(data), encoding="latin1").load())
    except BadSourceFile:
        raise
    except Exception as error:  # a hostile pickle can make the unpickler raise nearly anything
        raise BadSourceFile(f"{what} is no pickle of arrays and plain containers: {error!r}") from error


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN_NAMES.get((module, name))
        if found is None:
            raise BadSourceFile(
                f"the pickle asks for {module}.{name}: it is not a data set's, and nothing of it was run"
            )
        return found


class _Dtype:
    """What a pickled ``numpy.dtype`` becomes: a simple number's type, or an error."""

    def __init__(self, text: Any, align: Any = False, copy: Any = True) -> None:
        if not isinstance(text, str) or text.lstrip("<>|=") not in _NUMBER_TYPES:
            raise BadSourceFile(f"the pickle holds an array of {text!r}; allowed are arrays of numbers")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        if order not in ("<", ">", "|", "="):
            raise BadSourceFile(f"the pickle holds an array with the byte order {order!r}")
        if order != "|":
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """What a pickled ``numpy.ndarray`` becomes until :func:`_resolve` puts the array in its place."""

    def __init__(self) -> None:
        self.array: npt.NDArray[Any] | None = None

    def __setstate__(self, state: Any) -> None:
        _version, shape, dtype, fortran, raw = state
        self.array = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    if isinstance(raw, str):  # bytes of Python 2
        raw = raw.encode("latin1")
    if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes | bytearray):
        raise BadSourceFile("the pickle holds an array that is not one of numbers")
    return np.frombuffer(raw, dtype.dtype).reshape(tuple(int(n) for n in shape), order="F" if order == "F" else "C")


def _reconstruct(kind: Any, shape: Any, type_code: Any) -> _Array:
    return _Array()


def _frombuffer(raw: Any, dtype: Any, shape: Any, order: Any) -> npt.NDArray[Any]:
    return _array(raw, dtype, shape, order)


def _scalar(dtype: Any, raw: Any) -> Any:
    return _array(raw, dtype, (), "C")[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Bytes as Python 3 writes them into pickles that Python 2 can read."""
    if codecs.lookup(encoding).name != "iso8859-1":
        raise BadSourceFile(f"the pickle asks for the encoding {encoding!r}")
    return text.encode("latin1")


def _resolve(value: Any, done: dict[int, Any] | None = None) -> Any:
    """The arrays themselves in place of their stand-ins; keys as str; tuples as lists."""
    done = {} if done is None else done
    if isinstance(value, _Array):
        if value.array is None:
            raise BadSourceFile("the pickle holds an array without content")
        return value.array
    if isinstance(value, dict | list | tuple):
        # Each container once: a few bytes can refer to one container a million times, or to itself.
        if id(value) not in done:
            done[id(value)] = None
            done[id(value)] = (
                {_text(key): _resolve(item, done) for key, item in value.items()}
                if isinstance(value, dict)
                else [_resolve(item, done) for item in value]
            )
        return done[id(value)]
    if value is None or isinstance(value, str | bytes | int | float | np.ndarray | np.generic):
        return value
    raise BadSourceFile(f"the pickle holds a {type(value).__name__}")


def _text(key: Any) -> Any:
    return key.decode("latin1") if isinstance(key, bytes) else key


_NUMBER_TYPES = frozenset(["b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"])

#: The names in numpy's pickles, and what stands for them here.
_KNOWN_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("_codecs", "encode"): _encode,
    **{
        (f"numpy.{core}.{module}", name): stand_in
        for core in ("core", "_core")
        for module, name, stand_in in (
            ("multiarray", "_reconstruct", _reconstruct),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}
