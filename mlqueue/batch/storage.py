"""Files that data sources read, and whether they are of the same version on another host.

A source over a memory map, a node of an HDF5 file, a Parquet file or a folder of files is sent to a worker as the path,
never as what is in the file. Whether the file there is the one that is meant is told by a :class:`Stamp`: its size, and
a checksum of its beginning, its end, and of pieces spread evenly in between (of all of it, up to a megabyte). That
takes one read of some 250 kB whatever the size of the file. The time of the last change is not compared between hosts,
because copies of a data set have times of their own; but a file whose time, size or inode has changed is read anew, and
counts as another version of the source for whoever has it open.

A file that was changed in a few bytes at places that are not looked at has the same stamp. Where files are edited in
place, say which version they are of: ``MLQ.data_source(name, version=...)``.
"""

from __future__ import annotations

import hashlib
import socket
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from mlqueue.batch.data_source import AbstractDataSource
from mlqueue.batch.rows import HDF5Rows, as_rows, mapped_root

__all__ = [
    "Seen",
    "Stamp",
    "backing",
    "changed",
    "difference",
    "files_of",
    "host_name",
    "look",
    "missing",
    "stamp",
    "stamps",
]

#: A file of at most so many bytes is read as a whole.
WHOLE: Final = 1 << 20
#: Of a larger one: so many bytes of its beginning and of its end, and so many pieces of so many bytes in between.
END, PIECES, PIECE = 1 << 16, 30, 1 << 12
#: Checksums are kept for so many files, the last used.
KEPT: Final = 4096
#: Lists and dicts of more elements than this hold samples, not arrays that could lie in files.
MOST_PARTS: Final = 100


class Stamp(NamedTuple):
    """Which version of a file it is."""

    path: str
    size: int
    #: When it was last changed, in nanoseconds, as the host says where the stamp was made.
    modified: int
    #: The checksum, 16 bytes.
    probe: bytes


class Seen(NamedTuple):
    """How a file of this host was found, to see at little cost whether it has been touched since."""

    path: str
    size: int
    modified: int
    inode: int


def host_name() -> str:
    """The name of this host, as error messages have it."""
    return socket.gethostname()


def stamp(path: str) -> Stamp:
    """The stamp of a file. Raises OSError where it is missing or cannot be read."""
    return _stamp(look(path))


def stamps(paths: Iterable[str]) -> list[Stamp]:
    """The stamps of files; where there is none on the disk, as of an HDF5 file that is held in memory, one of size -1,
    which is not compared."""
    found = []
    for path in paths:
        try:
            found.append(stamp(path))
        except OSError:
            found.append(Stamp(path, -1, 0, b""))
    return found


def look(path: str) -> Seen:
    """How a file is now. Raises OSError where it is missing."""
    found = Path(path).stat()
    return Seen(path, found.st_size, found.st_mtime_ns, found.st_ino)


_stamps: OrderedDict[Seen, Stamp] = OrderedDict()
_lock = threading.Lock()


def _stamp(seen: Seen) -> Stamp:
    with _lock:
        known = _stamps.get(seen)
        if known is not None:
            _stamps.move_to_end(seen)
            return known
    made = Stamp(seen.path, seen.size, seen.modified, _probe(seen))
    with _lock:
        _stamps[seen] = made
        while len(_stamps) > KEPT:
            _stamps.popitem(last=False)
    return made


def _probe(seen: Seen) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    with Path(seen.path).open("rb") as file:
        for start, length in _pieces(seen.size):
            file.seek(start)
            digest.update(file.read(length))
    return digest.digest()


def _pieces(size: int) -> Iterator[tuple[int, int]]:
    """Where to read: place and length."""
    if size <= WHOLE:
        yield 0, size
        return
    yield 0, END
    for number in range(1, PIECES + 1):
        yield size * number // (PIECES + 1), PIECE
    yield size - END, END


def difference(meant: Stamp, trainer: str, path: str | None = None) -> str | None:
    """Why this host's file (at `path`, or at the path of the stamp) is not the one that is meant; None where it is.

    `trainer`: the name of the host on which the stamp was made.
    """
    path = meant.path if path is None else path
    try:
        here = stamp(path)
    except OSError as error:
        return missing(path, error)
    if (here.size, here.probe) == (meant.size, meant.probe):
        return None
    what = "other content" if here.size == meant.size else f"{here.size:,} bytes, not {meant.size:,}"
    where = meant.path if meant.path == path else f"{meant.path} there"
    return (
        f"host {host_name()} has another version of {path} than the trainer's host {trainer} ({where}): {what}. Copy "
        "the file, or mount the same storage on both."
    )


def missing(path: str, error: OSError) -> str:
    """What is said of a file that this host does not have, or may not read."""
    return (
        f"host {host_name()} cannot read {path}, which the data source needs: {error.strerror or error}. Mount the "
        "storage there, or copy the file to that path."
    )


def changed(files: Iterable[Seen]) -> bool:
    """Whether one of these files of this host has been touched since, or is gone."""
    for seen in files:
        try:
            if look(seen.path) != seen:
                return True
        except OSError:
            return True
    return False


def files_of(source: Any) -> list[str]:
    """The paths of the files that a data source reads, each once, in the order in which they stand in it.

    Found are memory maps, nodes of HDF5 files, and what has a method ``backing_files()`` that gives paths, in data
    sources and in their members, maps and arrays.
    """
    found: dict[str, None] = {}
    _collect(source, found, set())
    return list(found)


def _collect(value: Any, found: dict[str, None], seen: set[int]) -> None:
    if id(value) in seen:
        return
    seen.add(id(value))
    paths = backing(value)
    if paths is not None:
        found.update(dict.fromkeys(paths))
    elif isinstance(value, list | tuple) and len(value) <= MOST_PARTS:
        for part in value:
            _collect(part, found, seen)
    elif isinstance(value, dict) and len(value) <= MOST_PARTS:
        for part in value.values():
            _collect(part, found, seen)
    elif isinstance(value, AbstractDataSource) or type(value).__module__.startswith("mlqueue.batch."):
        for part in list(getattr(value, "__dict__", {}).values()):
            _collect(part, found, seen)


def backing(value: Any) -> list[str] | None:
    """The files in which a value's content lies; None where it lies in none, or in its parts'."""
    if isinstance(value, np.ndarray):
        root = mapped_root(value)
        return None if root is None else [absolute(str(root.filename))]
    rows = as_rows(value)
    if isinstance(rows, HDF5Rows):
        rows.flush()
        return [absolute(rows.filename)]
    own = getattr(type(value), "backing_files", None)
    return None if own is None else [absolute(path) for path in own(value)]


def absolute(path: str) -> str:
    """The path from the root on: whoever opens it may have another working directory."""
    return str(Path(path).absolute())
