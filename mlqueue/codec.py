"""Values to bytes and back: MessagePack, with arrays, and never pickle.

What can be sent: None, bool, int, float, str, bytes, list, dict, NumPy arrays of any dtype but object, NumPy scalars,
``datetime`` (aware and naive), ``date`` and ``timedelta``. What comes back is the same, with these exceptions:

* a tuple comes back as a list, a bytearray or memoryview as bytes;
* an instance of a subclass (IntEnum, StrEnum, OrderedDict, a named tuple, numpy.str_) comes back as its base;
* an array comes back read-only, as a view on the message's bytes (``array.copy()`` is writable), in the order that it
  had if that was C or Fortran order, else in C order;
* the time zone of an aware datetime comes back as its offset from UTC;
* the keys of a dict may be anything of the above that is hashable, but not tuples.

The bytes: a value without large arrays is one MessagePack object, readable by any MessagePack library, with these
extension types (all integers little-endian)::

    1  array      u16 length of the header, the header, zeros up to a multiple of 16, the elements
    2  array      u16 length of the header, the header; the elements stand behind the object
    3  scalar     u16 length of the header, the header, the element
    4  integer    beyond 64 bits: two's complement
    5  datetime   ISO 8601, with an offset if it is aware
    6  date       ISO 8601
    7  timedelta  i32 days, u32 seconds, u32 microseconds

The header of an array is the MessagePack of ``[dtype, "C" or "F", shape]``, for type 2 with the elements' offset as a
fourth item; that of a scalar is the dtype. A dtype is NumPy's text for it (``"<f4"``), ``[dtype, shape]`` for a
sub-array, or ``[itemsize, names, offsets, dtypes]`` for a record, with the
titles of its fields as a fifth item if they have any.

A value with large arrays is a frame: the byte C1 (which no MessagePack object begins with), ``MQ1``, the u32 length of
the object, the object, and behind it the elements of the large arrays, each at a multiple of 64 from the frame's
start. So a large array is copied once when it is written, and not at all when it is read.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
import re
import struct
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from enum import Enum
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import msgpack

from .errors import DecodeError, EncodeError

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "Raw",
    "decode",
    "decode_call",
    "encode",
    "encode_call",
    "encode_fields",
    "raw_of",
]

#: How many lists and dicts may stand within each other.
MAX_DEPTH = 64

#: How many bytes an encoded value may have when the caller sets no bound of its own: 16 MiB.
MAX_BYTES = 16 * 2**20

#: How many bytes an integer may have: 8192 bits, enough for seeds, states of generators and ids of any kind.
MAX_INT_BYTES = 1024

#: Arrays of at least so many bytes stand behind the object; smaller ones are not worth a frame.
SEGMENT_BYTES = 4096


def encode(value: object, *, path: str = "", max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of `value`.

    `path` is what the value is called in errors (``result``). Raises :class:`EncodeError`, which names the path to
    what cannot be sent (``result['x'][0]``), when there is something of another type in it, when it is nested deeper
    than :data:`MAX_DEPTH`, and when the bytes would be more than `max_bytes`.
    """
    if type(value) is bytes and SEGMENT_BYTES <= len(value) <= max_bytes - _BLOB.size and len(value) < 2**32:
        return _BLOB.pack(_BLOB_BYTE, len(value)) + value
    return _encode(value, path, None, max_bytes)


def encode_call(
    args: Sequence[object],
    kwargs: Mapping[str, object],
    options: Mapping[str, object] | None = None,
    *,
    max_bytes: int = MAX_BYTES,
) -> bytes:
    """The bytes of ``[args, kwargs]``, or of ``[args, kwargs, options]`` when there are options, for
    :func:`decode_call`. Errors speak of ``args[0]`` and ``kwargs['lr']``."""
    if options:
        return _encode([list(args), dict(kwargs), dict(options)], "", ("args", "kwargs", "options"), max_bytes)
    return _encode([list(args), dict(kwargs)], "", ("args", "kwargs"), max_bytes)


def encode_fields(fields: Mapping[str, object], *, max_bytes: int = MAX_BYTES) -> bytes:
    """The bytes of a dict. Errors speak of its values by their keys: ``args[0]`` rather than ``['args'][0]``."""
    return _encode(dict(fields), "", tuple(fields), max_bytes)


def decode(data: bytes | memoryview, *, max_values: int | None = None) -> Any:
    """The value that :func:`encode` made `data` of.

    Whatever bytes it gets, it raises nothing but :class:`DecodeError`, executes nothing, and needs memory in
    proportion to their length: up to ninety times as much for what is nothing but empty dicts. Where that is too much,
    `max_values` bounds how many items and members lists and dicts have, all in all, before they are built.
    """
    if type(data) is not bytes:
        data = memoryview(data).cast("B")
    try:
        if max_values is not None:
            _check_count(data, max_values)
        if len(data) > MAX_DEPTH:
            if data[0] == _FRAME_BYTE:
                return _decode_frame(data)
            if data[0] == _BLOB_BYTE and _BLOB.unpack_from(data)[1] == len(data) - _BLOB.size:
                return bytes(data[_BLOB.size :])
            _check(data)
        return msgpack.unpackb(data, ext_hook=_decode_ext, strict_map_key=False, timestamp=3)
    except _MALFORMED as error:
        what = str(error) or type(error).__name__
        raise DecodeError(
            f"{len(data)} bytes are not a value that mlqueue wrote ({what}). They were damaged, or another program "
            "or a newer mlqueue wrote them."
        ) from error


def decode_call(data: bytes | memoryview) -> tuple[list[Any], dict[str, Any], dict[str, Any]]:
    """The args, kwargs and options that :func:`encode_call` made `data` of (no options: an empty dict). Raises
    :class:`DecodeError` if it is none."""
    call = decode(data)
    if type(call) is list and 2 <= len(call) <= 3:
        args, kwargs, options = call if len(call) == 3 else (*call, {})
        if type(args) is list and _is_named(kwargs) and _is_named(options):
            return args, kwargs, options
    raise DecodeError(
        f"{len(data)} bytes are a value, but not the args, kwargs and options of a call: "
        "[[...], {'name': ...}, {'name': ...}]."
    )


def _is_named(value: object) -> bool:
    return type(value) is dict and (not value or all(type(name) is str for name in value))


# Encoding. msgpack's C code does the work and calls _Packing.default() for what it does not know. Only when it fails is
# the value walked in Python, to say where and why.


class _Refused(TypeError):
    """A value cannot be sent; the text says why and what to send instead."""


class _TooBig(ValueError):
    """The arrays of a value have more bytes than are allowed."""


#: What packing raises for a value that cannot be sent.
_UNPACKABLE = (TypeError, ValueError, OverflowError, RecursionError, BufferError, MemoryError)


def _encode(value: object, path: str, names: Collection[str] | None, max_bytes: int) -> bytes:
    try:
        packing = _idle.pop()
    except IndexError:
        packing = _Packing()
    packing.budget = max_bytes
    try:
        head: bytes = packing.pack(value)
        if len(head) > _IDLE_BYTES:
            del packing.pack  # and with it the buffer, twice as large as what was packed; they hold each other
        if len(head) > MAX_DEPTH and _containers(head) > MAX_DEPTH:
            _check_structure(head)
        if packing.has_tuples:
            # A tuple as a key would be packed as a list, which no dict could be built with again.
            msgpack.unpackb(head, strict_map_key=False, ext_hook=_ignore_ext)
            packing.has_tuples = False
    except _TooBig:
        raise _size_error(value, path, names, None, max_bytes) from None
    except _UNPACKABLE as error:
        raise _fault(value, path, names, error) from None
    if packing.segments:
        return packing.frame(head, value, path, names, max_bytes)
    if len(head) > max_bytes:
        raise _size_error(value, path, names, len(head), max_bytes)
    if len(head) <= _IDLE_BYTES:
        _idle.append(packing)
    return head


#: Packers that are ready for use: making one costs twice what packing a small message does. One that failed, or whose
#: buffer has grown, is not put back. Taking one out keeps threads, and what a signal interrupts, out of each other's.
_idle: list[_Packing] = []
_IDLE_BYTES = 64 * 2**10

# What is nothing but bytes (a model, an image) is written and read with one copy; msgpack makes two and more.
_BLOB = struct.Struct(">BI")
_BLOB_BYTE = 0xC6

_FRAME_BYTE = 0xC1
_FRAME = struct.Struct("<4sI")
_FRAME_MAGIC = b"\xc1MQ1"
_FRAME_ALIGNMENT = 64

_ARRAY, _SEGMENT, _SCALAR, _INTEGER, _DATETIME, _DATE, _TIMEDELTA = range(1, 8)

_HEADER_LENGTH = struct.Struct("<H")
_ARRAY_ALIGNMENT = 16
_TIMEDELTA_FIELDS = struct.Struct("<iII")


class _Packing:
    """A packer, and what it gathers while it packs one value: the elements of large arrays."""

    __slots__ = ("budget", "has_tuples", "offset", "pack", "segments")

    def __init__(self) -> None:
        # strict_types: subclasses of what msgpack knows (numpy.float64, IntEnum, a tuple) come to default().
        self.pack = msgpack.Packer(default=self.default, strict_types=True, buf_size=4096).pack
        self.budget = MAX_BYTES
        self.has_tuples = False
        self.offset = 0
        self.segments: list[memoryview] = []

    def default(self, value: object) -> object:
        """What msgpack shall pack in place of a value that it does not know."""
        if type(value) is tuple:
            self.has_tuples = True
            return list(value)
        numpy = _numpy_if_imported()
        if numpy is not None and isinstance(value, numpy.ndarray):
            return self._array(value, numpy)
        packable = _packable(value)
        if type(packable) is list:
            self.has_tuples = True
        return packable

    def _array(self, value: np.ndarray[Any, Any], numpy: ModuleType) -> msgpack.ExtType:
        header = _array_header(value, numpy)
        # Before the elements are copied: an array that is broadcast from one element can be larger than the memory.
        self.budget -= value.nbytes
        if self.budget < 0:
            raise _TooBig
        elements = _elements(value, header[1], numpy)
        if elements.nbytes < SEGMENT_BYTES:
            packed = _with_length(header)
            return msgpack.ExtType(_ARRAY, packed + _padding(len(packed), _ARRAY_ALIGNMENT) + elements)
        packed = _with_length([*header, self.offset])
        self.segments.append(elements)
        self.offset += elements.nbytes + len(_padding(elements.nbytes, _FRAME_ALIGNMENT))
        return msgpack.ExtType(_SEGMENT, packed)

    def frame(self, head: bytes, value: object, path: str, names: Collection[str] | None, max_bytes: int) -> bytes:
        """The bytes of the whole: the object that was packed, and the large arrays behind it."""
        size = _segments_start(len(head)) + self.offset
        if size > max_bytes:
            raise _size_error(value, path, names, size, max_bytes)
        parts: list[bytes | memoryview] = [_FRAME.pack(_FRAME_MAGIC, len(head)), head]
        parts.append(_padding(_FRAME.size + len(head), _FRAME_ALIGNMENT))
        for segment in self.segments:
            parts += [segment, _padding(segment.nbytes, _FRAME_ALIGNMENT)]
        return b"".join(parts)


def _padding(length: int, alignment: int) -> bytes:
    return bytes(-length % alignment)


def _segments_start(head_length: int) -> int:
    length = _FRAME.size + head_length
    return length + -length % _FRAME_ALIGNMENT


def _with_length(header: object) -> bytes:
    packed: bytes = msgpack.packb(header)
    if len(packed) > 0xFFFF:
        raise _Refused("an array whose dtype takes more than 64 KiB to describe cannot be sent; send fewer fields.")
    return _HEADER_LENGTH.pack(len(packed)) + packed


def _numpy_if_imported() -> ModuleType | None:
    # No array can exist before NumPy is imported, and importing it takes longer than most programs that only submit
    # jobs run. Another thread may be in the middle of the import: then the module has no ndarray yet.
    numpy = sys.modules.get("numpy")
    return numpy if numpy is not None and hasattr(numpy, "generic") else None


def _packable(value: Any) -> object:
    """What `value`, of a type that msgpack does not know and not an array, is packed as. Raises _Refused."""
    if isinstance(value, str):
        return str.__str__(value)  # str(value) of a str that is also an Enum would be its name
    if isinstance(value, bytes):
        return bytes(memoryview(value))
    numpy = _numpy_if_imported()
    if numpy is not None and isinstance(value, numpy.generic):
        return _scalar(value)
    if isinstance(value, int):
        return _integer(int.__int__(value))
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple)):
        return list(value)
    if isinstance(value, datetime):
        return msgpack.ExtType(_DATETIME, _datetime_text(value).encode())
    if isinstance(value, date):
        return msgpack.ExtType(_DATE, date.isoformat(value).encode())
    if isinstance(value, timedelta):
        return msgpack.ExtType(_TIMEDELTA, _TIMEDELTA_FIELDS.pack(value.days, value.seconds, value.microseconds))
    raise _Refused(_refusal(value))


def _integer(value: int) -> object:
    if -(2**63) <= value < 2**64:
        return value
    length = value.bit_length() // 8 + 1
    if length > MAX_INT_BYTES:
        raise _Refused(
            f"an int of {value.bit_length()} bits cannot be sent, {8 * MAX_INT_BYTES - 1} are the most; "
            "send it as bytes: value.to_bytes(...)."
        )
    return msgpack.ExtType(_INTEGER, value.to_bytes(length, "little", signed=True))


def _datetime_text(value: datetime) -> str:
    if type(value) is datetime:
        return value.isoformat()
    # A subclass may hold more than a datetime can: the nanoseconds of a pandas.Timestamp, or its NaT.
    text = str(value.isoformat())
    try:
        same = bool(datetime.fromisoformat(text) == value)
    except ValueError:
        same = False
    if not same:
        raise _Refused(
            f"{_a(value)} that is no moment in whole microseconds cannot be sent ({text}); send a datetime.datetime, "
            "or numpy.datetime64(value)."
        )
    return text


def _scalar(value: np.generic) -> msgpack.ExtType:
    return msgpack.ExtType(_SCALAR, _scalar_header(value.dtype) + value.tobytes())


@functools.lru_cache(maxsize=256)
def _scalar_header(dtype: np.dtype[Any]) -> bytes:
    return _with_length(_dtype_description(dtype))


def _array_header(value: np.ndarray[Any, Any], numpy: ModuleType) -> list[object]:
    if type(value) not in (numpy.ndarray, numpy.memmap, numpy.recarray):
        # A masked array, one with a unit of measure: what makes it special would be lost without a word.
        raise _Refused(_refusal(value))
    order = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    description = _dtype_description(value.dtype)
    if value.size and not value.itemsize:
        raise _Refused(f"an array of dtype {value.dtype}, whose elements have no bytes, cannot be sent.")
    return [description, order, list(value.shape)]


def _elements(value: np.ndarray[Any, Any], order: object, numpy: ModuleType) -> memoryview:
    """The elements as bytes: a view on the array where it lies in one piece, else a copy."""
    if not value.nbytes:
        return memoryview(b"")
    flat = numpy.asarray(value, order=order).reshape(-1, order=order)
    return memoryview(flat.view(numpy.uint8))  # as bytes: buffers know no datetime64


@functools.lru_cache(maxsize=256)
def _dtype_description(dtype: np.dtype[Any]) -> object:
    if dtype.kind == "T":
        raise _Refused("an array of numpy.dtypes.StringDType cannot be sent; send value.astype(str).")
    if dtype.hasobject:
        raise _Refused(
            f"an array of Python objects (dtype {dtype}) cannot be sent; give it a dtype that says what it holds, "
            "such as value.astype(float) or value.astype(str), or send value.tolist()."
        )
    description = _describe(dtype)
    try:
        same = bool(_build_dtype(description) == dtype)
    except (TypeError, ValueError):
        same = False
    if not same:
        # One of another package, as bfloat16 of ml_dtypes: NumPy calls it raw bytes.
        raise _Refused(
            f"an array of dtype {dtype} cannot be sent, only NumPy's own dtypes can; "
            f"send value.view('u{dtype.itemsize}') and the dtype's name, or value.astype('f4')."
        )
    return description


def _describe(dtype: np.dtype[Any]) -> object:
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return [_describe(base), list(shape)]
    if dtype.fields is not None and dtype.names is not None:
        fields = [dtype.fields[name] for name in dtype.names]
        offsets = [field[1] for field in fields]
        description: list[object] = [
            dtype.itemsize,
            list(dtype.names),
            offsets,
            [_describe(field[0]) for field in fields],
        ]
        titles = [field[2] if len(field) > 2 else None for field in fields]
        return [*description, titles] if any(titles) else description
    return dtype.str


def _ignore_ext(code: int, payload: bytes) -> None:
    return None


# Saying why a value cannot be sent.


def _fault(value: object, path: str, names: Collection[str] | None, error: BaseException) -> EncodeError:
    """The error for a value that could not be packed."""
    for trail, part in _walk(value, names):
        if len(trail) > MAX_DEPTH:
            where = _path(path, trail[:3], names) + "..."
            return EncodeError(
                f"{where}: more than {MAX_DEPTH} lists and dicts within each other, or one that contains itself, "
                "cannot be sent; flatten it, or send it as text or bytes.",
                path=where,
            )
        reason = _reason(part)
        if reason:
            where = _path(path, trail, names)
            return EncodeError(f"{where or 'the value'}: {reason}", path=where)
    return EncodeError(f"{path or 'the value'} cannot be sent: {error}.", path=path)


def _size_error(
    value: object, path: str, names: Collection[str] | None, size: int | None, max_bytes: int
) -> EncodeError:
    largest, largest_size = "", -1
    for trail, part in _walk(value, names):
        part_size = _leaf_size(part)
        if len(trail) <= MAX_DEPTH and part_size > largest_size:
            largest, largest_size = _path(path, trail, names), part_size
    allowed = _bytes_text(max_bytes)
    got = f"more than {allowed}" if size is None else f"{_bytes_text(size)}, more than {allowed},"
    return EncodeError(
        f"{path or largest or 'the value'}: {got} cannot be sent; the largest part is {largest or 'the value'} "
        f"with {_bytes_text(max(largest_size, 0))}. Save the data where the workers can read it and "
        "send its path, or raise the limit (the settings max_message_bytes and max_result_bytes).",
        path=path or largest,
    )


def _walk(root: object, names: Collection[str] | None) -> Iterator[tuple[list[object], object]]:
    """Every part of a value with the keys that lead to it, parents first, and nothing beyond the first that is nested
    too deep. The list of keys is the same one each time."""
    trail: list[object] = []
    if names is None:
        yield trail, root
        entries = _children(root)
    else:
        entries = zip(names, (child for _, child in _children(root)), strict=True)
    stack = [iter(entries)]
    while stack:
        entry = next(stack[-1], None)
        if entry is None:
            stack.pop()
            if trail:
                trail.pop()
            continue
        trail.append(entry[0])
        yield trail, entry[1]
        if len(trail) > MAX_DEPTH:
            return
        stack.append(iter(_children(entry[1])))


def _children(value: object) -> Iterable[tuple[object, object]]:
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    return ()


def _path(path: str, trail: Sequence[object], names: Collection[str] | None) -> str:
    if names is not None and trail:
        path, trail = str(trail[0]), trail[1:]
    return path + "".join(f"[{_short(key)}]" for key in trail)


def _short(key: object) -> str:
    text = repr(key)
    return text if len(text) <= 60 else text[:57] + "..."


def _reason(value: Any) -> str | None:
    """Why `value` itself, not what it contains, cannot be sent; None if it can."""
    try:
        if isinstance(value, dict):
            return _key_reason(value)
        if isinstance(value, str):
            value.encode()
        elif isinstance(value, memoryview) and not value.c_contiguous:
            return "a memoryview that is not contiguous cannot be sent; send bytes(value)."
        elif type(value) is int:
            _integer(value)
        elif value is not None and type(value) not in (bool, float, bytes, bytearray, memoryview, msgpack.ExtType):
            _Packing().default(value)
    except UnicodeEncodeError as error:
        return (
            f"a text with a lone surrogate ({value[error.start]!r} at {error.start}) cannot be sent; for the name of a "
            "file send os.fsencode(value), else mend it where it comes from."
        )
    except _Refused as error:
        return str(error)
    return None


def _key_reason(value: dict[object, object]) -> str | None:
    for key in value:
        if isinstance(key, (tuple, frozenset)):
            return (
                f"{_a(key)} cannot be the key of a dict that is sent ({_short(key)}); send a text as the key, or a "
                "list of pairs: list(value.items())."
            )
        reason = _reason(key)
        if reason:
            return f"in its key {_short(key)}, {reason}"
    return None


def _leaf_size(value: object) -> int:
    if isinstance(value, (str, bytes, bytearray)):
        return len(value)
    nbytes = getattr(value, "nbytes", 0)
    return nbytes if isinstance(nbytes, int) else 0


def _bytes_text(count: int) -> str:
    if count < 10_000:
        return f"{count} bytes"
    for unit in ("KiB", "MiB"):
        if count < 1024**2 * (1 if unit == "KiB" else 1024):
            return f"{count / 1024 ** (1 if unit == 'KiB' else 2):.1f} {unit}"
    return f"{count / 1024**3:.1f} GiB"


def _a(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return ("an " if name[0] in "aeioAEIO" else "a ") + name


#: What to send instead, by the name of a class (or of one that it derives from).
_INSTEAD = {
    "builtins.set": "a list: sorted(value), or list(value)",
    "builtins.frozenset": "a list: sorted(value), or list(value)",
    "builtins.range": "list(value)",
    "builtins.generator": "list(value)",
    "builtins.complex": "numpy.complex128(value), or [value.real, value.imag]",
    "builtins.function": "the name of something that the worker can look up",
    "builtins.type": "the name of something that the worker can look up",
    "builtins.BaseException": "its text: str(value)",
    "collections.deque": "list(value)",
    "collections.abc.Mapping": "dict(value)",
    "decimal.Decimal": "str(value)",
    "fractions.Fraction": "str(value)",
    "uuid.UUID": "str(value)",
    "numpy.ma.MaskedArray": "value.filled(...), or [value.data, value.mask]",
    "numpy.ma.core.MaskedArray": "value.filled(...), or [value.data, value.mask]",
    "torch.Tensor": "an array: value.numpy(force=True)",
    "pandas.core.frame.DataFrame": "value.to_dict('list'), or value.to_numpy()",
    "pandas.core.series.Series": "value.to_numpy()",
    "pandas.DataFrame": "value.to_dict('list'), or value.to_numpy()",
    "pandas.Series": "value.to_numpy()",
    "PIL.Image.Image": "an array: numpy.asarray(value), or the bytes of its file",
}


def _refusal(value: object) -> str:
    return f"{_a(value)} cannot be sent; send {_instead_of(value)}."


def _instead_of(value: object) -> str:
    for base in type(value).__mro__:
        hint = _INSTEAD.get(f"{base.__module__}.{base.__qualname__}")
        if hint:
            return hint
    kinds: tuple[tuple[bool, str], ...] = (
        (isinstance(value, Enum), "its value: value.value"),
        (isinstance(value, os.PathLike), "str(value)"),
        (isinstance(value, time), "value.isoformat()"),
        (isinstance(value, Mapping), "dict(value)"),
        (hasattr(type(value), "__dataclass_fields__"), "dataclasses.asdict(value)"),
        (hasattr(type(value), "model_dump"), "value.model_dump()"),
        (hasattr(type(value), "__array__"), "numpy.asarray(value)"),
        (isinstance(value, Iterator), "list(value)"),
    )
    for applies, hint in kinds:
        if applies:
            return hint
    return (
        "its data as a dict, list, text, bytes or array, or a path or key with which the worker finds it "
        "(nothing is pickled)"
    )


# Finding what a large value consists of, without reading all of it.


class Raw(NamedTuple):
    """Where the bytes lie that a value is made of."""

    #: ``bytes``, ``text`` (UTF-8) or ``array`` (its elements).
    kind: str
    start: int
    size: int
    #: Of an array.
    dtype: np.dtype[Any] | None = None
    order: str = "C"
    shape: tuple[int, ...] = ()


def raw_of(head: bytes, size: int) -> Raw | None:
    """What the encoding of a value of `size` bytes holds that begins with `head`: 64 KiB of it, or all.

    None for a value that is neither bytes, text nor a large array, and for what is none of ours: `decode` says more.
    """
    try:
        if head[:1] == _FRAME_MAGIC[:1]:
            return _raw_array(head, size)
        kind, offset, length = _RAW_HEADS.get(head[0], ("", 0, 0))
        if 0xA0 <= head[0] <= 0xBF:
            kind, offset, count = "text", 1, head[0] & 0x1F
        else:
            count = int.from_bytes(head[1 : 1 + length], "big")
        return Raw(kind, offset, count) if kind and offset + count == size else None
    except _MALFORMED:
        return None


#: What begins with these bytes: kind, length of the beginning, bytes of it that say how long the rest is.
_RAW_HEADS = {
    0xC4: ("bytes", 2, 1),
    0xC5: ("bytes", 3, 2),
    0xC6: ("bytes", 5, 4),
    0xD9: ("text", 2, 1),
    0xDA: ("text", 3, 2),
    0xDB: ("text", 5, 4),
}


def _raw_array(head: bytes, size: int) -> Raw | None:
    magic, length = _FRAME.unpack_from(head)
    value = msgpack.unpackb(head[_FRAME.size : _FRAME.size + length], ext_hook=msgpack.ExtType)
    if magic != _FRAME_MAGIC or not isinstance(value, msgpack.ExtType) or value.code != _SEGMENT:
        return None
    (description, order, shape, offset), _ = _header(value.data)
    dtype = _build_dtype(description)
    count = math.prod(shape) * dtype.itemsize
    start = _segments_start(length) + offset
    return Raw("array", start, count, dtype, order, tuple(shape)) if start + count <= size else None


# Decoding.

#: What reading bytes that nobody wrote can raise, in msgpack, in NumPy, and below.
_MALFORMED = (
    ValueError,
    TypeError,
    OverflowError,
    LookupError,
    RecursionError,
    MemoryError,
    BufferError,
    struct.error,
    msgpack.UnpackException,
)

#: Bytes of an object up to this length are not looked through before they are read, if they cannot be nested too deep.
_UNCHECKED_BYTES = 4096

#: Bytes of an object are looked through in parts of this length: each is copied.
_LOOKED_AT = 64 * 2**10

#: All bytes but those that begin a list or a dict.
_NO_CONTAINERS = bytes(byte for byte in range(256) if not (0x80 <= byte <= 0x9F or 0xDC <= byte <= 0xDF))


def _check(data: bytes | memoryview) -> None:
    """Raises if it would not be safe to build what `data` describes."""
    if len(data) > _UNCHECKED_BYTES or _containers(data) > MAX_DEPTH:
        _check_structure(data)


def _containers(data: bytes | memoryview) -> int:
    """At least as many as the lists and dicts in `data`, or, where they are too many, in its beginning."""
    count = 0
    for start in range(0, len(data), _LOOKED_AT):
        count += len(bytes(data[start : start + _LOOKED_AT]).translate(None, _NO_CONTAINERS))
        if count > MAX_DEPTH:
            break
    return count


def _check_structure(data: bytes | memoryview) -> None:
    """Raises if the object is cut off or nested too deep. Reads it without building anything: five bytes can claim a
    list of as many items as there are bytes, and msgpack makes room for all of them, at each level, before it finds
    that they are not there."""
    nesting = _nesting()
    unpacker = msgpack.Unpacker(max_buffer_size=len(nesting) + len(data))
    unpacker.feed(nesting)
    unpacker.feed(data)
    try:
        unpacker.skip()
    except msgpack.StackError:
        raise ValueError(f"more than {MAX_DEPTH} lists and dicts within each other") from None
    except msgpack.OutOfData:
        raise ValueError("cut off") from None


def _check_count(data: bytes | memoryview, most: int) -> None:
    """Raises if the lists and dicts of a value have more items than `most`. Each is dropped as soon as it is
    counted."""
    if data[:1] == _FRAME_MAGIC[:1]:
        data = data[_FRAME.size : _FRAME.size + _FRAME.unpack_from(data)[1]]
    if len(data) <= most:
        return
    _check_structure(data)
    left = most

    def count(items: list[object]) -> None:
        nonlocal left
        left -= len(items) + 1
        if left < 0:
            raise ValueError(f"more than {most:,} items in its lists and dicts")

    msgpack.unpackb(
        data,
        raw=True,
        list_hook=count,
        object_pairs_hook=count,
        ext_hook=_ignore_ext,
        strict_map_key=False,
        max_array_len=most,
        max_map_len=most,
    )


@functools.cache
def _nesting() -> bytes:
    """So many beginnings of lists that a value of :data:`MAX_DEPTH` levels within them is the deepest that msgpack's
    stack holds. Its size is not told and differs between versions, so it is found by trying."""

    def too_deep(levels: int) -> bool:
        unpacker = msgpack.Unpacker()
        unpacker.feed(b"\x91" * levels + b"\xc0")
        try:
            unpacker.skip()
        except msgpack.StackError:
            return True
        return False

    if msgpack.Unpacker.__module__ == "msgpack.fallback":
        return b""  # msgpack without its C code: the only bound is the interpreter's
    return b"\x91" * (bisect.bisect_left(range(2**14), True, key=too_deep) - 1 - MAX_DEPTH)


def _decode_frame(data: bytes | memoryview) -> Any:
    view = memoryview(data).toreadonly()
    magic, length = _FRAME.unpack_from(view)
    if magic != _FRAME_MAGIC:
        raise ValueError(f"begins with {magic!r}")
    head = view[_FRAME.size : _FRAME.size + length]
    if len(head) != length:
        raise ValueError("cut off")
    segments = view[_segments_start(length) :]
    _check(head)
    hook = functools.partial(_decode_ext, segments=segments)
    return msgpack.unpackb(head, ext_hook=hook, strict_map_key=False, timestamp=3)


def _decode_ext(code: int, payload: bytes, segments: memoryview | None = None) -> object:
    if code == _ARRAY:
        header, start = _header(payload)
        start += len(_padding(start, _ARRAY_ALIGNMENT))
        return _array(header, memoryview(payload)[start:])
    if code == _SEGMENT and segments is not None:
        (*header, offset), _ = _header(payload)
        if not _are_sizes([offset]):
            raise ValueError(f"an array at {_short(offset)}")
        return _array(header, segments[offset:], cut=True)
    if code == _SCALAR:
        return _scalar_of(payload)
    if code == _INTEGER and len(payload) <= MAX_INT_BYTES:
        return int.from_bytes(payload, "little", signed=True)
    if code == _DATETIME:
        return datetime.fromisoformat(payload.decode("ascii"))
    if code == _DATE:
        return date.fromisoformat(payload.decode("ascii"))
    if code == _TIMEDELTA:
        return timedelta(*_TIMEDELTA_FIELDS.unpack(payload))
    raise ValueError(f"extension type {code} of {len(payload)} bytes")


def _header(payload: bytes) -> tuple[Any, int]:
    (length,) = _HEADER_LENGTH.unpack_from(payload)
    end = _HEADER_LENGTH.size + length
    header = payload[_HEADER_LENGTH.size : end]
    _check(header)
    return msgpack.unpackb(header), end


def _scalar_of(payload: bytes) -> Any:
    import numpy as np

    (length,) = _HEADER_LENGTH.unpack_from(payload)
    end = _HEADER_LENGTH.size + length
    # Few scalars have a record's long header; the others share a handful.
    dtype = _short_scalar_dtype(payload[:end]) if length <= 32 else _build_dtype(_header(payload)[0])
    if dtype.itemsize != len(payload) - end:
        raise ValueError(f"a scalar {dtype} of {len(payload) - end} bytes")
    return np.ndarray((), dtype, buffer=memoryview(payload)[end:])[()]


@functools.lru_cache(maxsize=256)
def _short_scalar_dtype(header: bytes) -> np.dtype[Any]:
    return _build_dtype(_header(header)[0])


def _array(header: Any, elements: memoryview, *, cut: bool = False) -> np.ndarray[Any, Any]:
    import numpy as np

    description, order, shape = header
    if order not in ("C", "F") or not _are_sizes(shape):
        raise ValueError(f"an array of shape {_short(shape)} in order {_short(order)}")
    dtype = _build_dtype(description)
    count = math.prod(shape)
    if count and not dtype.itemsize:
        raise ValueError("an array whose elements have no bytes")
    if cut:
        elements = elements[: count * dtype.itemsize]
    if count * dtype.itemsize != len(elements):
        raise ValueError(f"an array of {_short(shape)} {dtype} in {len(elements)} bytes")
    return np.ndarray(tuple(shape), dtype, buffer=elements, order=order)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


#: NumPy's texts for its own dtypes, and no other of the many that numpy.dtype() accepts.
_DTYPE = re.compile(
    r"[<>|](?:b1|[iu][1248]|f(?:2|4|8|12|16)|c(?:8|16|24|32)|[SUV][0-9]{1,9}"
    r"|[mM]8(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?)"
)


def _build_dtype(description: Any) -> np.dtype[Any]:
    import numpy as np

    match description:
        case str():
            return _named_dtype(description)
        case [base, shape] if _are_sizes(shape):
            return np.dtype((_build_dtype(base), tuple(shape)))
        case [int() as itemsize, [*names], [*offsets], [*dtypes], *titles] if _are_sizes([itemsize, *offsets]):
            if not len(names) == len(offsets) == len(dtypes) or not all(type(name) is str for name in names):
                raise ValueError("a record whose fields are not complete")
            fields: Any = {"names": names, "offsets": offsets, "itemsize": itemsize}
            fields["formats"] = [_build_dtype(dtype) for dtype in dtypes]
            if titles:
                (fields["titles"],) = titles
                if not all(title is None or type(title) is str for title in fields["titles"]):
                    raise ValueError("a field whose title is no text")
            dtype: np.dtype[Any] = np.dtype(fields)
            return dtype
    raise ValueError(f"dtype {_short(description)}")


@functools.lru_cache(maxsize=256)
def _named_dtype(name: str) -> np.dtype[Any]:
    import numpy as np

    if not _DTYPE.fullmatch(name):
        raise ValueError(f"dtype {_short(name)}")
    return np.dtype(name)
