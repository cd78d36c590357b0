"""What a data source is and of which version, as texts that are the same in every process: by them a run that goes on
sees whether it has the data that it was begun with."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from typing import Any, Final

import numpy as np

from mlqueue import codec
from mlqueue.batch import storage
from mlqueue.batch.data_source import AbstractDataSource
from mlqueue.batch.rows import HDF5Rows, as_rows, mapped_root
from mlqueue.named import NamedSource, Reference, code_digest

__all__ = ["name_of", "version_of"]

#: An array of at most so many bytes is read as a whole; of a larger one so many rows, evenly spread.
WHOLE: Final = 1 << 23
ROWS: Final = 1024
#: Of longer lists so many elements are looked at.
MOST_PARTS: Final = 100

Named = Mapping[str, NamedSource[..., Any]]


def name_of(source: AbstractDataSource) -> str:
    """A name for a source: its own with the arguments of the factory, else its class."""
    reference = getattr(source, "reference", None)
    if not isinstance(reference, Reference):
        return type(source).__name__
    given = codec.decode(reference.kwargs)
    return f"{reference.name}({', '.join(f'{name}={value!r:.60}' for name, value in sorted(given.items()))})"


def version_of(value: Any, named: Named) -> str:
    """A text that differs where the data, or the code that reads them, are known to differ.

    Of a source with a name it is its version, the code of its factory, and the stamps of its files. Of any other it is
    made of its members and settings, the code of its functions, and its arrays: their content, or 1,024 rows of those
    above 8 MB. A value of another kind counts as its class.
    """
    digest = hashlib.blake2b(digest_size=12)
    _feed(digest, value, named, set())
    return digest.hexdigest()


def _feed(digest: Any, value: Any, named: Named, seen: set[int]) -> None:
    def tell(*parts: object) -> None:
        digest.update(repr((type(value).__qualname__, *parts)).encode() + b"\0")

    if value is None or isinstance(value, bool | int | float | complex | str | bytes | np.generic):
        tell(value)
        return
    if id(value) in seen:
        tell("again")
        return
    seen.add(id(value))
    reference = getattr(value, "reference", None)
    if isinstance(reference, Reference) and reference.name in named:
        version = named[reference.name].version(reference.kwargs)
        tell(reference.name, reference.kwargs, version, _stamps(storage.files_of(value)))
        # A shard has the name of its source, of which workers read the same samples, but not the same results.
        _feed(digest, getattr(value, "sampler", None), named, seen)
        return
    files = storage.backing(value)
    if files is not None:
        tell(_place(value), _stamps(files))
    elif isinstance(value, np.ndarray):
        tell(value.dtype.str, value.shape)
        digest.update(b"" if value.dtype.hasobject else _rows(value).tobytes())
    else:
        parts = _parts(value)
        if parts is None:
            tell(code_digest(value) if callable(value) else "")
        else:
            tell(list(parts))
            for part in parts.values():
                _feed(digest, part, named, seen)


def _parts(value: Any) -> dict[Any, Any] | None:
    """What a value is made of; None where that is not known."""
    if isinstance(value, list | tuple):
        places = {round(place) for place in np.linspace(0, len(value) - 1, min(len(value), MOST_PARTS))}
        return {"length": len(value), **{place: value[place] for place in sorted(places)}}
    if isinstance(value, dict):
        return value
    if isinstance(value, functools.partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    if isinstance(value, AbstractDataSource) or type(value).__module__.startswith("mlqueue.batch."):
        # What begins with _ is made of the rest, or is of this process; what was skipped is no part of the data.
        kept = {name for name in vars(value) if not name.startswith("_")} - {"reference", "skipped"}
        return {name: vars(value)[name] for name in sorted(kept)}
    return None


def _stamps(paths: list[str]) -> list[tuple[int, bytes]]:
    return [(stamp.size, stamp.probe) for stamp in storage.stamps(paths)]


def _place(value: Any) -> tuple[Any, ...]:
    """Where in its file an array lies."""
    if isinstance(value, np.ndarray):
        root = mapped_root(value)
        assert root is not None
        offset = root.offset + value.__array_interface__["data"][0] - root.__array_interface__["data"][0]
        return value.dtype.str, value.shape, value.strides, offset
    rows = as_rows(value)
    return (rows.path, rows.shape, str(rows.dtype)) if isinstance(rows, HDF5Rows) else ()


def _rows(array: np.ndarray) -> np.ndarray:
    if array.nbytes <= WHOLE or not array.ndim:
        return array
    rows: np.ndarray = array[np.linspace(0, len(array) - 1, min(len(array), ROWS)).astype(np.intp)]
    return rows
