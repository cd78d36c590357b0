"""The codec: what is sent comes back, what cannot be sent is named, and bytes of elsewhere do no harm."""

from __future__ import annotations

import dataclasses
import datetime as dt
import enum
import math
import os
import pathlib
import resource
import struct
import subprocess
import sys
import threading
import uuid
import zoneinfo
from collections import OrderedDict, namedtuple
from typing import Any

import msgpack
import numpy as np
import pytest
from dramatiq.errors import DecodeError as DramatiqDecodeError
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from mlqueue import codec
from mlqueue.codec import MAX_DEPTH, decode, decode_call, encode, encode_call, encode_fields
from mlqueue.encoder import MessageEncoder
from mlqueue.errors import DecodeError, EncodeError

# A busy machine is no fault of the codec.
settings.register_profile("codec", deadline=None)
settings.load_profile("codec")


def same(one: Any, other: Any) -> bool:
    """Equal in type and value to the last bit; NaN equals NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    if isinstance(one, np.generic):
        return one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, float):
        return struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dt.datetime):
        return one == other and one.utcoffset() == other.utcoffset()
    return bool(one == other)


offsets = st.timedeltas(dt.timedelta(hours=-23), dt.timedelta(hours=23)).map(
    lambda offset: dt.timezone(dt.timedelta(seconds=round(offset.total_seconds())))
)
keys = (
    st.text(max_size=5)
    | st.binary(max_size=5)
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.none()
    | st.dates()
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**200), 2**200)
    | st.floats()
    | st.text()
    | st.binary()
    | st.datetimes()
    | st.datetimes(dt.datetime(2, 1, 1), dt.datetime(9998, 1, 1), timezones=offsets)
    | st.dates()
    | st.timedeltas()
)
plain_dtypes = (
    hnp.boolean_dtypes()
    | hnp.integer_dtypes(endianness="?")
    | hnp.unsigned_integer_dtypes(endianness="?")
    | hnp.floating_dtypes(endianness="?")
    | hnp.complex_number_dtypes(endianness="?")
    | hnp.datetime64_dtypes(endianness="?")
    | hnp.timedelta64_dtypes(endianness="?")
    | hnp.unicode_string_dtypes(endianness="?")
    | hnp.byte_string_dtypes()
)
dtypes = plain_dtypes | hnp.array_dtypes(plain_dtypes, allow_subarrays=True) | hnp.nested_dtypes(plain_dtypes)
arrays = hnp.arrays(dtypes, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
values = st.recursive(
    leaves | arrays,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=20,
)


class Color(enum.IntEnum):
    RED = 1


class Optimizer(str, enum.Enum):  # noqa: UP042 - the kind whose str() is its name
    SGD = "sgd"


class Plain(enum.Enum):
    A = 1


@dataclasses.dataclass
class Config:
    lr: float


Pair = namedtuple("Pair", "left right")


class TestWhatIsSentComesBack:
    @given(values)
    def test_of_any_nesting(self, value: Any) -> None:
        assert same(decode(encode(value)), value)

    @given(st.lists(values, max_size=3), st.dictionaries(st.text(max_size=5), values, max_size=3))
    def test_as_a_call(self, args: list[Any], kwargs: dict[str, Any]) -> None:
        got_args, got_kwargs, got_options = decode_call(encode_call(tuple(args), kwargs, kwargs))
        assert same(got_args, args)
        assert same(got_kwargs, kwargs)
        assert same(got_options, kwargs)
        assert decode_call(encode_call([], {})) == ([], {}, {})

    @pytest.mark.parametrize(
        "value",
        [
            2**63 - 1,
            2**63,
            2**64 - 1,
            2**64,
            -(2**63),
            -(2**63) - 1,
            2**8191 - 1,
            -(2**8190),
            math.inf,
            -math.inf,
            -0.0,
        ],
    )
    def test_numbers_at_the_edges(self, value: Any) -> None:
        assert same(decode(encode(value)), value)

    def test_a_generators_state_with_its_integers_of_128_bits(self) -> None:
        state = np.random.default_rng(2**100).bit_generator.state
        assert decode(encode(state)) == state

    def test_tuples_as_lists(self) -> None:
        assert decode(encode((1, (2, [(), {"x": (3,)}])))) == [1, [2, [[], {"x": [3]}]]]

    def test_bytearray_and_memoryview_as_bytes(self) -> None:
        got = decode(encode([bytearray(b"a"), memoryview(b"b"), memoryview(np.arange(2, dtype="u1"))]))
        assert got == [b"a", b"b", b"\x00\x01"]
        assert [type(item) for item in got] == [bytes] * 3

    def test_subclasses_as_their_base(self) -> None:
        value = [
            Color.RED,
            Optimizer.SGD,
            OrderedDict(a=1),
            Pair(1, 2),
            np.str_("a\0"),
            np.bytes_(b"b\0"),
            {Color.RED: 2},
        ]
        got = decode(encode(value))
        assert got == [1, "sgd", {"a": 1}, [1, 2], "a\0", b"b\0", {1: 2}]
        assert [type(item) for item in got] == [int, str, dict, list, str, bytes, dict]

    def test_keys_that_are_no_texts(self) -> None:
        moment = dt.datetime(2024, 1, 2, 3, tzinfo=dt.UTC)
        value = {1: "a", 1.5: "b", b"k": "c", None: "d", False: "e", moment: "f", np.int8(7): "g", 2**70: "h"}
        assert decode(encode(value)) == value

    def test_a_time_zone_as_its_offset(self) -> None:
        moment = dt.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo("Europe/Paris"))
        got = decode(encode(moment))
        assert (got, got.utcoffset()) == (moment, dt.timedelta(hours=2))

    def test_a_subclass_of_datetime_that_holds_no_more_than_one(self) -> None:
        class Moment(dt.datetime):
            pass

        assert decode(encode(Moment(2024, 1, 1))) == dt.datetime(2024, 1, 1)

    def test_a_timestamp_that_another_language_wrote(self) -> None:
        moment = dt.datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=dt.UTC)
        assert decode(msgpack.packb(msgpack.Timestamp.from_datetime(moment))) == moment

    def test_small_values_as_messagepack_that_anybody_reads(self) -> None:
        value = {"args": [1, "a", b"b", None, 1.5], "kwargs": {"x": [True]}}
        assert msgpack.unpackb(encode(value)) == value

    def test_bytes_of_any_size(self) -> None:
        for size in (0, 4095, 4096, 70_000):
            data = encode(b"x" * size)
            assert msgpack.unpackb(data) == decode(data) == decode(memoryview(data)) == b"x" * size
            assert type(decode(memoryview(data))) is bytes
            with pytest.raises(DecodeError):
                decode(data[:-1])
            with pytest.raises(DecodeError):
                decode(data + b"x")
            with pytest.raises(EncodeError):
                encode(b"x" * size, max_bytes=size)

    def test_of_many_threads_at_once(self) -> None:
        failures: list[object] = []

        def work(number: int) -> None:
            for _ in range(300):
                value = [number, np.arange(number * 300), (number, {"x": np.float32(number)})]
                args, _, _ = decode_call(encode_call(value, {}))
                if not (args[0] == number and len(args[1]) == number * 300 and args[2][1]["x"] == number):
                    failures.append(args)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_after_an_error(self) -> None:
        with pytest.raises(EncodeError):
            encode([np.zeros(5000), (1, 2), {3}])
        assert decode(encode([1])) == [1]


class TestArrays:
    @given(arrays)
    def test_of_every_dtype_and_shape(self, array: Any) -> None:
        got = decode(encode(array))
        assert same(got, array)
        assert not got.flags.writeable
        assert got.flags.aligned

    @given(arrays, st.randoms())
    def test_in_any_order_of_memory(self, array: Any, random: Any) -> None:
        axes = list(range(array.ndim))
        random.shuffle(axes)
        for view in (
            np.asfortranarray(array) if array.ndim else array,
            array.transpose(axes),
            array[..., ::-2][..., :1] if array.ndim else array,
        ):
            assert same(decode(encode(view)), np.asarray(view, order="C"))

    @pytest.mark.parametrize("size", [3, 300])
    def test_keep_fortran_order(self, size: int) -> None:
        array = np.asfortranarray(np.random.default_rng(0).random((size, size)))
        got = decode(encode([array, array.T]))
        assert [(item.flags.f_contiguous, item.flags.c_contiguous) for item in got] == [(True, False), (False, True)]
        np.testing.assert_array_equal(got[0], array)
        np.testing.assert_array_equal(got[1], array.T)

    def test_large_ones_are_views_on_the_message(self) -> None:
        data = encode({"w": np.arange(100_000.0), "b": [np.ones(3000, ">i2"), np.zeros((700, 3), "M8[ns]", order="F")]})
        message = np.frombuffer(data, "u1")
        got = decode(data)
        for array in (got["w"], *got["b"]):
            assert np.shares_memory(array, message)
            assert array.flags.aligned
            assert not array.flags.writeable
        assert got["b"][1].dtype == "M8[ns]"

    def test_of_a_writable_buffer_are_read_only_too(self) -> None:
        data = memoryview(bytearray(encode(np.arange(10_000))))
        assert not decode(data).flags.writeable
        np.testing.assert_array_equal(decode(data), np.arange(10_000))

    @given(arrays.filter(lambda array: array.size))
    def test_scalars_keep_their_dtype(self, array: Any) -> None:
        scalar = array.flat[0]
        if isinstance(scalar, (np.generic, np.ndarray)) and not isinstance(scalar, (str, bytes)):
            assert same(decode(encode(scalar)), scalar)

    @pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.uint8, np.bool_, np.complex128])
    def test_scalars_of_everyday(self, kind: Any) -> None:
        got = decode(encode({"x": [kind(1)]}))["x"][0]
        assert (type(got), got) == (kind, kind(1))

    def test_records_keep_padding_offsets_and_sub_arrays(self) -> None:
        for dtype in (
            np.dtype([("a", "i1"), ("b", "<f8"), ("c", "U3")], align=True),
            np.dtype({"names": ["a", "b"], "formats": ["<i4", ">u2"], "offsets": [4, 6], "itemsize": 20}),
            np.dtype([(("the title", "name"), "f4"), ("untitled", "f4")]),
            np.dtype([("image", "u1", (4, 5)), ("meta", [("label", "S7"), ("when", "M8[us]")], (2,))]),
        ):
            got = decode(encode(np.zeros((3, 600), dtype)))
            assert (got.dtype, got.shape) == (dtype, (3, 600))

    def test_memmaps_and_record_arrays_as_plain_ones(self, tmp_path: pathlib.Path) -> None:
        mapped = np.memmap(tmp_path / "x", dtype="i4", mode="w+", shape=(2000,))
        mapped[:] = np.arange(2000)
        records = np.rec.array([(1, 2.0)], dtype=[("a", "i4"), ("b", "f8")])
        got = decode(encode([mapped, records]))
        assert [type(item) for item in got] == [np.ndarray] * 2
        np.testing.assert_array_equal(got[0], np.arange(2000))
        assert got[1].tolist() == [(1, 2.0)]

    def test_broadcast_from_one_element_are_refused_before_they_are_copied(self) -> None:
        endless = np.broadcast_to(np.float64(1), (2**30, 2**10))
        with pytest.raises(EncodeError, match=r"x\[1\].*8192\.0 GiB"):
            encode([1, endless], path="x")

    def test_need_no_numpy_until_there_is_one(self) -> None:
        # An empty package in place of ours, so that nothing but the codec is looked at.
        program = (
            "import sys, types; package = types.ModuleType('mlqueue'); sys.modules['mlqueue'] = package\n"
            f"package.__path__ = [{str(pathlib.Path(codec.__file__).parent)!r}]\n"
            "from mlqueue.codec import decode, encode; decode(encode([1, (2,), {'a': 1.5}]))\n"
            "assert not {'numpy', 'dramatiq', 'redis'} & set(sys.modules), 'heavy'\n"
            f"print(decode(bytes.fromhex('{encode(np.arange(3)).hex()}')).sum())"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == ("3", "")


class TestWhatCannotBeSent:
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ({1, 2}, r"a set cannot be sent; send a list: sorted\(value\), or list\(value\)"),
            (frozenset(), r"a frozenset cannot be sent; send a list"),
            (object(), r"an object cannot be sent; send its data as a dict"),
            (Config(0.1), r"Config cannot be sent; send dataclasses\.asdict\(value\)"),
            (pathlib.Path("x"), r"Path cannot be sent; send str\(value\)"),
            (uuid.UUID(int=1), r"a uuid\.UUID cannot be sent; send str\(value\)"),
            (Plain.A, r"Plain cannot be sent; send its value: value\.value"),
            (dt.time(1), r"a datetime\.time cannot be sent; send value\.isoformat\(\)"),
            (range(3), r"a range cannot be sent; send list\(value\)"),
            (iter([1]), r"a list_iterator cannot be sent; send list\(value\)"),
            (os.environ, r"cannot be sent; send dict\(value\)"),
            (ValueError("x"), r"a ValueError cannot be sent; send its text: str\(value\)"),
            (1j, r"a complex cannot be sent; send numpy\.complex128\(value\)"),
            (len, r"cannot be sent; send its data"),
            (2**8191, r"an int of 8192 bits cannot be sent, 8191 are the most"),
            ("a\ud800", r"a text with a lone surrogate \('\\ud800' at 1\) cannot be sent"),
            (memoryview(b"abcd")[::2], r"a memoryview that is not contiguous cannot be sent; send bytes\(value\)"),
            (np.array([object()]), r"an array of Python objects \(dtype object\) cannot be sent.*value\.tolist\(\)"),
            (np.zeros(2, [("a", "O")]), r"an array of Python objects"),
            (np.array(["a"], np.dtypes.StringDType()), r"StringDType cannot be sent; send value\.astype\(str\)"),
            (np.zeros(2, []), r"whose elements have no bytes"),
            (np.ma.array([1], mask=[True]), r"MaskedArray cannot be sent; send value\.filled"),
            ({(1, 2): 3}, r"a tuple cannot be the key of a dict that is sent \(\(1, 2\)\)"),
            ({frozenset(): 3}, r"a frozenset cannot be the key"),
            ({pathlib.Path("x"): 3}, r"in its key .*Path cannot be sent; send str\(value\)"),
            ({"\ud800": 3}, r"in its key .*a text with a lone surrogate"),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
    )
    def test_is_named_with_its_path_and_a_cure(self, value: Any, message: str) -> None:
        with pytest.raises(EncodeError, match=message) as caught:
            encode_call([1, {"x": [(0, value)]}], {"y": 1})
        assert caught.value.path == "args[1]['x'][0][1]"
        assert str(caught.value).startswith("args[1]['x'][0][1]: ")
        with pytest.raises(EncodeError, match=message) as caught:
            encode_call([1], {"lr": {2: value}})
        assert caught.value.path == "kwargs['lr'][2]"
        with pytest.raises(EncodeError, match=message) as caught:
            encode_call([1], {}, {"tags": value})
        assert caught.value.path == "options['tags']"
        with pytest.raises(EncodeError, match="^result: .*" + message) as caught:
            encode(value, path="result")
        assert caught.value.path == "result"
        with pytest.raises(EncodeError, match="^the value: .*" + message) as caught:
            encode(value)
        assert caught.value.path == ""

    def test_in_a_dict_of_fields_is_named_by_its_field(self) -> None:
        with pytest.raises(EncodeError) as caught:
            encode_fields({"queue": "q", "args": [{3}]})
        assert caught.value.path == "args[0]"

    def test_long_keys_are_shortened_in_the_path(self) -> None:
        with pytest.raises(EncodeError) as caught:
            encode({"k" * 1000: {1}})
        assert len(caught.value.path) < 70

    def test_moments_finer_than_a_datetime(self) -> None:
        class Fine(dt.datetime):
            def isoformat(self, *args: Any) -> str:
                return "2024-01-01T00:00:00.000001"

        class NaT(dt.datetime):
            def isoformat(self, *args: Any) -> str:
                return "NaT"

        for kind in (Fine, NaT):
            with pytest.raises(EncodeError, match=r"no moment in whole microseconds.*datetime64"):
                encode([kind(2024, 1, 1)])

    def test_dtypes_of_other_packages(self) -> None:
        class Stranger:
            kind, hasobject, subdtype, fields, names, str, itemsize = "V", False, None, None, None, "<V2", 2

            def __str__(self) -> str:
                return "bfloat16"

        with pytest.raises(codec._Refused, match=r"dtype bfloat16 cannot be sent.*value.view\('u2'\)"):
            codec._dtype_description(Stranger())

    @pytest.mark.parametrize("wrap", [lambda x: [x], lambda x: (x,), lambda x: {"a": x}, lambda x: OrderedDict(a=x)])
    def test_too_many_levels(self, wrap: Any) -> None:
        value: Any = 0
        for _ in range(MAX_DEPTH):
            value = wrap(value)
        decode(encode(value))
        with pytest.raises(
            EncodeError, match=r"result\[.*\.\.\.: more than 64 lists and dicts within each other"
        ) as caught:
            encode(wrap(value), path="result")
        assert caught.value.path.startswith("result[")

    def test_a_list_that_contains_itself(self) -> None:
        endless: list[Any] = [1]
        endless.append({"again": endless})
        with pytest.raises(EncodeError, match="or one that contains itself"):
            encode(endless)

    def test_wide_values_are_not_deep(self) -> None:
        value = [[{"a": []}] for _ in range(5000)]
        assert decode(encode(value)) == value

    def test_more_bytes_than_allowed(self) -> None:
        with pytest.raises(
            EncodeError, match=r"args\[1\]\['b'\].*15\.0 KiB, more than 9999 bytes, .*max_message_bytes"
        ):
            encode_call([b"a", {"a": b"a" * 4000, "b": b"a" * 11_300}], {}, max_bytes=9999)
        with pytest.raises(EncodeError, match=r"^result: .*the largest part is result\[0\] with 78\.1 KiB"):
            encode([np.zeros(10_000), np.zeros(20)], path="result", max_bytes=50_000)
        with pytest.raises(EncodeError, match=r"78\.2 KiB, more than 78\.1 KiB"):
            encode([np.zeros(10_000)], max_bytes=80_010)
        assert len(encode([np.zeros(10_000)], max_bytes=81_000)) <= 81_000
        assert len(encode(b"a" * 95, max_bytes=97)) == 97
        with pytest.raises(EncodeError):
            encode(b"a" * 96, max_bytes=97)


def ext(code: int, payload: bytes) -> bytes:
    return struct.pack(">BIb", 0xC9, len(payload), code) + payload


def array_ext(header: Any, data: bytes = b"", code: int = 1) -> bytes:
    packed = msgpack.packb(header)
    payload = struct.pack("<H", len(packed)) + packed
    return ext(code, payload + (bytes(-len(payload) % 16) if code == 1 else b"") + data)


def frame(head: bytes, tail: bytes) -> bytes:
    start = struct.pack("<4sI", b"\xc1MQ1", len(head)) + head
    return start + bytes(-len(start) % 64) + tail


SEEDS = [
    encode([1, {"a": [1.5, None, True, "text", b"bytes"]}]),
    encode({"a": np.arange(12.0).reshape(3, 4), "b": np.zeros(3, "M8[s]"), "c": np.array(["x"])}),
    encode([np.arange(2000, dtype="f4"), np.zeros((3, 900), [("a", "i1"), ("b", "u2", (2,))], order="F")]),
    encode([dt.datetime(2024, 1, 1, tzinfo=dt.UTC), dt.date(2024, 1, 1), dt.timedelta(1, 2, 3), 2**100, np.float16(1)]),
    encode_call([np.bool_(1), np.void(b"abc"), np.datetime64("2024-01-01")], {"k": (1, 2)}),
    b"\x91" * 70 + b"\xc0",
]


def must_do_no_harm(data: bytes) -> None:
    try:
        value = decode(data)
    except DecodeError:
        return
    repr(type(value))


class TestBytesOfElsewhere:
    @given(st.binary(max_size=200))
    @example(b"")
    @example(b"\xc1")
    @example(b"\xc1MQ1")
    @example(b"\xd6\xff\xff\xff\xff\xff")
    @settings(max_examples=500)
    def test_any_bytes(self, data: bytes) -> None:
        must_do_no_harm(data)

    @given(
        st.sampled_from(SEEDS),
        st.lists(st.tuples(st.integers(0), st.binary(max_size=3), st.integers(0, 3)), max_size=4),
    )
    @settings(max_examples=1500)
    def test_mutated_messages(self, seed: bytes, edits: list[tuple[int, bytes, int]]) -> None:
        data = seed
        for position, new, length in edits:
            position %= len(data) + 1
            data = data[:position] + new + data[position + length :]
        must_do_no_harm(data)

    @given(st.sampled_from(SEEDS), st.integers(0))
    def test_messages_cut_off(self, seed: bytes, length: int) -> None:
        with pytest.raises(DecodeError):
            decode(seed[: length % len(seed)])

    @given(st.integers(-128, 127), st.binary(max_size=60))
    @settings(max_examples=500)
    def test_any_extension(self, code: int, payload: bytes) -> None:
        must_do_no_harm(ext(code, payload))

    headers = st.recursive(
        st.integers()
        | st.text("<>|=UVSOMmfciub0123456789[]ns,", max_size=8)
        | st.sampled_from(["<f4", "|V0", "C", "O"]),
        lambda inner: st.lists(inner, max_size=4),
    )

    @given(headers, st.binary(max_size=32), st.sampled_from([1, 2, 3]))
    @settings(max_examples=1000)
    def test_any_header_of_an_array(self, header: Any, data: bytes, code: int) -> None:
        try:
            packed = array_ext(header, data, code)
        except OverflowError:
            return
        must_do_no_harm(packed)
        must_do_no_harm(frame(packed, data))

    @pytest.mark.parametrize(
        "header",
        [
            ["O", "C", [1]],
            ["<f4,O", "C", [1]],
            ["|O8", "C", [1]],
            ["(2,2)<f4", "C", [1]],
            ["float32", "C", [2]],
            ["<f4", "K", [2]],
            ["<f4", "C", [3]],
            ["<f4", "C", [1]],
            ["<f4", "C", [-1, -2]],
            ["<f4", "C", [2.0]],
            ["<f4", "C", [True, 2]],
            ["<f4", "C", [2**63, 2**63]],
            ["<f4", "C", 2],
            ["<f4", "C", [1] * 63 + [1, 1, 2]],
            ["|V0", "C", [10**18]],
            ["<U0", "C", [3]],
            [["<f4", [0]], "C", [5]],
            [[8, ["a", "a"], [0, 4], ["<f4", "<f4"]], "C", [1]],
            [[8, ["a", "b"], [0, 8], ["<f4", "<f4"]], "C", [1]],
            [[8, ["a"], [0, 4], ["<f4", "<f4"]], "C", [1]],
            [[8, [1], [0], ["<f8"]], "C", [1]],
            [[8, ["a"], [0], ["|O8"]], "C", [1]],
            [["<f4", [2**40, 2**40]], "C", [1]],
            ["<f4", "C"],
            "<f4",
        ],
        ids=str,
    )
    def test_arrays_that_are_none(self, header: Any) -> None:
        with pytest.raises(DecodeError, match="bytes are not a value that mlqueue wrote"):
            decode(array_ext(header, bytes(8)))

    def test_elements_that_are_not_in_the_frame(self) -> None:
        for offset in (1, 64, 2**63, -8, 0.0, None, True):
            with pytest.raises(DecodeError):
                decode(frame(array_ext(["<f8", "C", [1], offset], code=2), bytes(8)))
        assert decode(frame(array_ext(["<f8", "C", [1], 0], code=2), bytes(8))).tolist() == [0.0]
        with pytest.raises(DecodeError):
            decode(array_ext(["<f8", "C", [1], 0], code=2))

    @pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 500, 1030, 100_000])
    @pytest.mark.parametrize("level", [b"\x91", b"\x81\x01", b"\xdc\x00\x01", b"\xdf\x00\x00\x00\x01\x01"])
    def test_too_many_levels(self, level: bytes, levels: int) -> None:
        with pytest.raises(DecodeError, match="more than 64 lists and dicts within each other"):
            decode(level * levels + b"\x00")

    def test_as_many_levels_as_allowed(self) -> None:
        for level in (b"\x91", b"\x81\x01"):
            decode(level * MAX_DEPTH + b"\x00")
            decode(level * (MAX_DEPTH - 1) + b"\x92\x00" + msgpack.packb(b"\x91" * 9000))

    def test_lists_that_claim_more_than_there_is_take_no_memory(self) -> None:
        claim = b"\xdd" + (10_000_000).to_bytes(4, "big")
        data = claim * 60 + bytes(10_000_000)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(DecodeError, match="cut off"):
            decode(data)
        more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        assert more * (1 if sys.platform == "darwin" else 1024) < 100_000_000

    def test_keys_that_cannot_be_hashed(self) -> None:
        for key in (b"\x90", b"\x80", array_ext(["<f4", "C", [0]])):
            with pytest.raises(DecodeError):
                decode(b"\x81" + key + b"\x00")

    def test_integers_beyond_the_bound(self) -> None:
        with pytest.raises(DecodeError):
            decode(ext(4, b"\x7f" * 1025))

    def test_bytes_after_the_value(self) -> None:
        with pytest.raises(DecodeError):
            decode(b"\x01\x02")

    def test_a_value_that_is_no_call(self) -> None:
        for value in (1, [], [[], {}, 1], [{}, []], [[], {1: 2}], [[], {}, {1: 2}], [[], {}, {}, {}], {"args": []}):
            with pytest.raises(DecodeError, match=r"but not the args, kwargs and options of a call"):
                decode_call(encode(value))


class TestMessageEncoder:
    def test_carries_a_message_of_dramatiq(self) -> None:
        message = {"queue_name": "q", "actor_name": "a", "args": (np.arange(3),), "kwargs": {"x": b"1"}, "options": {}}
        got = MessageEncoder().decode(MessageEncoder().encode(message))
        assert got["args"][0].tolist() == [0, 1, 2]
        assert (got["kwargs"], got["queue_name"]) == ({"x": b"1"}, "q")

    def test_names_the_argument_that_cannot_be_sent(self) -> None:
        with pytest.raises(EncodeError, match=r"^args\[0\]\['x'\]: a set"):
            MessageEncoder().encode({"args": ({"x": {1}},), "kwargs": {}})

    def test_bounds_the_size(self) -> None:
        with pytest.raises(EncodeError, match="200 bytes"):
            MessageEncoder(max_bytes=100).encode({"args": [b"a" * 200]})

    def test_raises_the_error_that_dramatiq_handles(self) -> None:
        for data in (b"\xc1", b"{}", b"\x01"):
            with pytest.raises(DramatiqDecodeError):
                MessageEncoder().decode(data)
