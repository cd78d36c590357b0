"""Small files in the very formats in which the data sets are published."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import scipy.io
import tables


def idx(array: np.ndarray) -> bytes:
    """A gzip-compressed IDX file of bytes."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=1, mtime=0)


def tar(members: dict[str, bytes], extra: list[tuple[tarfile.TarInfo, bytes]] | None = None) -> bytes:
    """A gzip-compressed tar with these files, and before them further members of any kind."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", compresslevel=1) as archive:
        for info, content in extra or []:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def python2_pickle(content: dict[str, object]) -> bytes:
    """A dictionary of arrays of uint8 and of lists of ints or names, as Python 2 and numpy of 2009 pickled it."""
    parts = [b"\x80\x02}("]
    for key, value in content.items():
        parts += [_text(key.encode()), _value(value)]
    return b"".join([*parts, b"u."])


def _value(value: object) -> bytes:
    if isinstance(value, np.ndarray):
        return _array(value)
    assert isinstance(value, list)
    items = [_text(item.encode()) if isinstance(item, str) else b"J" + struct.pack("<i", item) for item in value]
    return b"](" + b"".join(items) + b"e"


def _text(text: bytes) -> bytes:
    return b"T" + struct.pack("<i", len(text)) + text  # BINSTRING, the str of Python 2


def _array(array: np.ndarray) -> bytes:
    assert array.dtype == np.uint8
    shape = b"(" + b"".join(b"J" + struct.pack("<i", n) for n in array.shape) + b"t"
    dtype = b"cnumpy\ndtype\n" + _text(b"u1") + b"K\x00K\x01\x87R(K\x03" + _text(b"|") + b"NNNJ\xff\xff\xff\xff" * 1
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _text(b"b") + b"\x87R"
    return made + b"(K\x01" + shape + dtype + b"\x89" + _text(array.tobytes()) + b"tb"


def matlab(images: np.ndarray, labels: np.ndarray) -> bytes:
    """SVHN's .mat: images (n, 3, 32, 32) stored as (32, 32, 3, n), compressed, and 10 for the digit zero."""
    buffer = io.BytesIO()
    stored = np.where(labels == 0, 10, labels).astype(np.uint8)[:, None]
    scipy.io.savemat(buffer, {"X": images.transpose(2, 3, 1, 0), "y": stored}, do_compression=True)
    return buffer.getvalue()


def stl_binary(images: np.ndarray) -> bytes:
    """STL's binary: each channel by columns."""
    return images.transpose(0, 1, 3, 2).tobytes()


def usps_h5(path: Path, arrays: dict[str, np.ndarray]) -> bytes:
    """The ready-made HDF5 file of USPS."""
    with tables.open_file(path, mode="w") as file:
        group = file.create_group(file.root, "usps", "USPS")
        for name, array in arrays.items():
            file.create_array(group, name, array)
    content = path.read_bytes()
    path.unlink()
    return content
