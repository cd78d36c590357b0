"""Readers of published formats: right for true files, an error and nothing else for cut, damaged and hostile ones."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import published
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st

from mlqueue.batch.datasets import formats
from mlqueue.batch.datasets.dataset import BadSourceFile

RNG = np.random.default_rng(2)
IMAGES = RNG.integers(0, 256, (5, 28, 28), dtype=np.uint8)
#: Without the time, which would be part of the names of tests.
packed = partial(gzip.compress, mtime=0)
CIFAR = {"data": RNG.integers(0, 256, (3, 3072), dtype=np.uint8), "labels": [3, 0, 9], "batch_label": ["a", "b"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file"


class TestIdx:
    def test_images_and_labels(self, file: Path) -> None:
        file.write_bytes(published.idx(IMAGES))
        np.testing.assert_array_equal(formats.read_idx(str(file), 3), IMAGES)
        file.write_bytes(published.idx(np.arange(7)))
        np.testing.assert_array_equal(formats.read_idx(str(file), 1), np.arange(7))

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (published.idx(IMAGES)[:-30], "cut or damaged"),
            (published.idx(IMAGES)[:5], "cut or damaged"),
            (b"", "cut or damaged"),
            (b"<html>not found</html>", "cut or damaged"),
            (published.idx(np.arange(7)), "no IDX file of bytes with 3 dimensions"),
            (packed(struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28) + IMAGES[:4].tobytes()), "does not hold"),
            (packed(struct.pack(">HBB3I", 0, 8, 3, 5, 28, 28) + IMAGES.tobytes() + b"x"), "does not hold"),
            (packed(struct.pack(">HBB3I", 0, 8, 3, *[2**32 - 1] * 3)), "too large"),
            (packed(struct.pack(">HBB3I", 0, 8, 3, 0, 28, 28)), "empty"),
            (packed(struct.pack(">HBB3I", 0, 13, 3, 5, 28, 28) + bytes(99)), "no IDX file of bytes"),
        ],
    )
    def test_anything_else_is_an_error(self, file: Path, content: bytes, message: str) -> None:
        file.write_bytes(content)
        with pytest.raises(BadSourceFile, match=message):
            formats.read_idx(str(file), 3)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_one_changed_byte_never_gives_other_content(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        content = bytearray(published.idx(IMAGES))
        place = data.draw(st.integers(10, len(content) - 1))  # after gzip's header, parts of which mean nothing
        content[place] ^= data.draw(st.integers(1, 255))
        path = tmp_path_factory.getbasetemp() / "changed.gz"
        path.write_bytes(content)
        try:
            got = formats.read_idx(str(path), 3)
        except BadSourceFile:
            return
        np.testing.assert_array_equal(got, IMAGES)  # a bit that fills up the last byte means nothing


class TestPickle:
    def test_what_python_2_wrote(self) -> None:
        data = published.python2_pickle(CIFAR)
        got = formats.load_pickle(data, "batch")
        assert got.keys() == CIFAR.keys()
        np.testing.assert_array_equal(got["data"], CIFAR["data"])
        assert got["labels"] == CIFAR["labels"]
        assert got["batch_label"] == CIFAR["batch_label"]

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # numpy.core, numpy's old name for its inside
    def test_the_python_2_pickle_of_these_tests_is_a_true_one(self) -> None:
        got = pickle.loads(published.python2_pickle(CIFAR), encoding="latin1")
        np.testing.assert_array_equal(got["data"], CIFAR["data"])
        assert got["labels"] == CIFAR["labels"]

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    @pytest.mark.parametrize("dtype", ["u1", "<i4", ">i8", "<f4", "?"])
    def test_what_python_3_writes(self, protocol: int, dtype: str) -> None:
        array = np.arange(24).reshape(2, 3, 4).astype(dtype)
        content = {
            b"data": array,
            "columns": np.asfortranarray(array[0]),
            "scalar": array[1, 1, 1],
            "rest": [None, 1.5, "text", b"bytes", (1, 2)],
        }
        got = formats.load_pickle(pickle.dumps(content, protocol=protocol), "batch")
        np.testing.assert_array_equal(got["data"], array)
        assert got["data"].dtype == array.dtype
        np.testing.assert_array_equal(got["columns"], array[0])
        assert got["scalar"] == array[1, 1, 1]
        assert got["rest"] == [None, 1.5, "text", b"bytes", [1, 2]]

    def test_code_in_a_pickle_is_not_run(self, tmp_path: Path) -> None:
        class Hostile:
            def __reduce__(self) -> tuple[object, ...]:
                return os.mkdir, (str(tmp_path / "owned"),)

        for content in (Hostile(), {"data": Hostile()}, [np.array([Hostile()], dtype=object)]):
            with pytest.raises(BadSourceFile, match=r"asks for posix.mkdir|allowed are arrays of numbers"):
                formats.load_pickle(pickle.dumps(content), "batch")
        assert not (tmp_path / "owned").exists()

    @pytest.mark.parametrize(
        "data",
        [
            b"cbuiltins\neval\n(V1\ntR.",
            b"cnumpy.core.multiarray\nfromfile\n(V/etc/passwd\ntR.",
            b"cnumpy\nload\n(V/etc/passwd\ntR.",
            b"\x80\x04\x8c\x05numpy\x8c\x0cdtype.__init__\x93.",
            b"cnumpy\nndarray\n(I1000000000000\ntR.",
            b"cnumpy\ndtype\n(VO\ntR.",
            b"c_codecs\nencode\n(Vx\nVrot13\ntR.",
            b"cnumpy.core.multiarray\n_reconstruct\n(NNNtR.",
            b"P1\n.",
            b"\x82\x01.",
            b"garbage",
            b"",
            pickle.dumps({"data": np.zeros(3, dtype=[("a", "u1")])}),
            pickle.dumps({"data": np.array(["text"])}),
            pickle.dumps({"data": np.zeros(3, dtype="M8[s]")}),
            pickle.dumps({1, 2}),
            published.python2_pickle(CIFAR)[:-100],
            # an array whose bytes are fewer than its shape
            published.python2_pickle({"data": np.zeros((2, 3), np.uint8)}).replace(
                b"J\x02\0\0\0", b"J\xff\xff\xff\x7f"
            ),
        ],
        ids=range(18),
    )
    def test_anything_else_is_an_error(self, data: bytes) -> None:
        with pytest.raises(BadSourceFile):
            formats.load_pickle(data, "batch")

    def test_containers_that_refer_to_themselves_or_to_each_other_cost_nothing(self) -> None:
        level: list[object] = []
        for _ in range(40):
            level = [level] * 10  # ten to the forty leaves
        assert isinstance(formats.load_pickle(pickle.dumps(level), "batch"), list)
        own: list[object] = []
        own.append(own)
        assert formats.load_pickle(pickle.dumps(own), "batch") == [None]

    def test_an_array_referred_to_twice_is_there_twice(self) -> None:
        array = np.arange(3)
        one, two = formats.load_pickle(pickle.dumps([array, array]), "batch")
        np.testing.assert_array_equal(one, array)
        np.testing.assert_array_equal(two, array)


class TestTar:
    NAMES = frozenset({"set/a", "set/b"})

    def read(self, file: Path) -> dict[str, bytes]:
        return {
            name: formats.read_member(name, size, member)
            for name, size, member in formats.tar_members(str(file), set(self.NAMES))
        }

    def test_members_come_by_name_and_the_rest_is_passed_over(self, file: Path) -> None:
        members = {"set/other": b"?" * 5000, "./set/b": b"second", "set/a": b"x" * 100_000}
        file.write_bytes(published.tar(members))
        assert self.read(file) == {"set/a": b"x" * 100_000, "set/b": b"second"}

    def test_hostile_members_touch_nothing(self, file: Path, tmp_path: Path) -> None:
        outside = tmp_path / "outside"
        outside.write_bytes(b"mine")
        escape = tarfile.TarInfo("../escaped")
        absolute = tarfile.TarInfo(str(tmp_path / "absolute"))
        link = tarfile.TarInfo("set")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path)
        device = tarfile.TarInfo("set/dev")
        device.type = tarfile.CHRTYPE
        hostile = [(info, b"") for info in (escape, absolute, link, device)]
        file.write_bytes(published.tar({"set/a": b"1", "set/b": b"2"}, hostile))
        assert self.read(file) == {"set/a": b"1", "set/b": b"2"}
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "outside"]
        assert outside.read_bytes() == b"mine"

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
    def test_a_wanted_member_must_be_a_plain_file(self, file: Path, kind: bytes) -> None:
        info = tarfile.TarInfo("set/a")
        info.type, info.linkname = kind, "/etc/passwd"
        file.write_bytes(published.tar({"set/b": b"2"}, [(info, b"")]))
        with pytest.raises(BadSourceFile, match="not as a plain file"):
            self.read(file)

    def test_a_member_twice_is_an_error(self, file: Path) -> None:
        file.write_bytes(published.tar({"set/a": b"1", "set/b": b"2"}, [(tarfile.TarInfo("set/a"), b"other")]))
        with pytest.raises(BadSourceFile, match="set/a twice"):
            self.read(file)

    def test_a_missing_member_is_named(self, file: Path) -> None:
        file.write_bytes(published.tar({"set/a": b"1"}))
        with pytest.raises(BadSourceFile, match="lacks set/b"):
            self.read(file)

    @pytest.mark.parametrize("keep", [0, 5, 200, -700, -12])
    def test_a_cut_archive_is_an_error(self, file: Path, keep: int) -> None:
        noise = np.random.default_rng(0).bytes(60_000)
        file.write_bytes(published.tar({"set/a": noise, "set/b": noise})[:keep])
        with pytest.raises(BadSourceFile):
            self.read(file)

    @settings(max_examples=40, deadline=None)
    @given(st.data())
    def test_one_changed_byte_never_gives_other_content(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        members = {"set/a": b"1" * 700, "set/b": bytes(range(256))}
        content = bytearray(published.tar(members))
        place = data.draw(st.integers(10, len(content) - 1))
        content[place] ^= data.draw(st.integers(1, 255))
        path = tmp_path_factory.getbasetemp() / "changed.tar.gz"
        path.write_bytes(content)
        try:
            got = self.read(path)
        except BadSourceFile:
            return
        assert got == members  # a bit that fills up the last byte means nothing

    def test_a_wrong_checksum_is_noticed_though_it_comes_after_the_last_member(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(formats, "_BLOCK_BYTES", 512)
        content = bytearray(published.tar({"set/a": b"1", "set/b": b"2"}))
        content[-8] ^= 1
        file.write_bytes(content)
        with pytest.raises(BadSourceFile, match="CRC"):
            self.read(file)

    def test_a_member_that_is_too_large_is_not_read(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "MAX_BYTES", 1000)
        file.write_bytes(published.tar({"set/a": bytes(1001), "set/b": b""}))
        with pytest.raises(BadSourceFile, match="at most 1000"):
            self.read(file)

    def test_rows_come_in_blocks(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(formats, "_BLOCK_BYTES", 1024)
        rows = RNG.integers(0, 256, (25, 10, 10), dtype=np.uint8)
        file.write_bytes(published.tar({"set/a": rows.tobytes(), "set/b": b"x" * 150}))
        for name, size, member in formats.tar_members(str(file), set(self.NAMES)):
            if name == "set/a":
                blocks = list(formats.row_blocks(name, size, member, (10, 10)))
                assert [first for first, _ in blocks] == [0, 10, 20]
                np.testing.assert_array_equal(np.concatenate([block for _, block in blocks]), rows)
            else:
                with pytest.raises(BadSourceFile, match="not a multiple of 100"):
                    list(formats.row_blocks(name, size, member, (10, 10)))


class TestMatlab:
    def test_arrays_by_name(self, file: Path) -> None:
        buffer = io.BytesIO()
        scipy.io.savemat(buffer, {"X": IMAGES, "y": [[1.0], [2.0]], "text": "words"})
        file.write_bytes(buffer.getvalue())
        x, y = formats.matlab_arrays(str(file), "X", "y")
        np.testing.assert_array_equal(x, IMAGES)
        np.testing.assert_array_equal(y, [[1], [2]])
        for name in ("z", "text"):
            with pytest.raises(BadSourceFile, match=f"no array of numbers called {name}"):
                formats.matlab_arrays(str(file), name)

    @pytest.mark.parametrize("keep", [0, 60, 200, -40])
    def test_a_cut_file_is_an_error(self, file: Path, keep: int) -> None:
        images = RNG.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
        file.write_bytes(published.matlab(images, np.arange(4))[:keep])
        with pytest.raises(BadSourceFile, match=r"cannot be read as a MATLAB file|no array of numbers"):
            formats.matlab_arrays(str(file), "X", "y")


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1],
        [0, 1, 10],
        [0, -1, 2],
        [0.5, 1, 2],
        [[0], [1], [2]],
        None,
        ["a", "b", "c"],
        [[1], [1, 2], 3],
        [1, 2, 2**70],
    ],
)
def test_labels_that_do_not_fit_are_an_error(labels: object) -> None:
    with pytest.raises(BadSourceFile, match="digits"):
        formats.check_labels(labels, 3, 10, "digits")


def test_labels_become_int32() -> None:
    labels = formats.check_labels(np.array([0, 9, 3], np.uint8), 3, 10, "digits")
    assert labels.dtype == np.int32
    assert labels.tolist() == [0, 9, 3]
