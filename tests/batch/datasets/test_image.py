"""Bytes as floating point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tables
from hypothesis import given
from hypothesis import strategies as st

from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32

IMAGES = np.random.default_rng(3).integers(0, 256, (40, 3, 6, 6), dtype=np.uint8)
RANGES = [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0), (-0.5, 0.5)]


@pytest.mark.parametrize(("lower", "upper"), RANGES)
def test_every_byte_becomes_its_place_in_the_range(lower: float, upper: float) -> None:
    every = np.arange(256, dtype=np.uint8)
    values = ImageArrayUInt8ToFloat32(every, lower, upper)[:]
    assert values.dtype == np.float32
    scale = np.float32((upper - lower) / 255.0)
    np.testing.assert_array_equal(values, every.astype(np.float32) * scale + np.float32(lower))
    assert (values[0], values[255]) == (lower, upper)
    assert np.all(np.diff(values) > 0)


def test_it_looks_like_an_array() -> None:
    images = ImageArrayUInt8ToFloat32(IMAGES, -1, 1)
    assert (len(images), images.shape, images.ndim, images.dtype) == (40, IMAGES.shape, 4, np.float32)
    assert images.arr_u8 is IMAGES
    assert (images.scale, images.offset) == (np.float32(2 / 255), -1)
    whole = np.asarray(images)
    np.testing.assert_array_equal(whole, images[:])
    assert np.asarray(images, dtype=np.float64).dtype == np.float64
    with pytest.raises(ValueError, match="copy=False"):
        np.asarray(images, copy=False)
    assert "-1, 1)" in repr(images)


@pytest.mark.parametrize(
    "index",
    [3, -1, (2, 1, 0, 5), slice(3, 9), [1, 1, 0], np.array([4, 2]), (slice(None), 1), ..., IMAGES[:, 0, 0, 0] > 99],
)
def test_every_index_gives_new_float32_values(index: object) -> None:
    images = ImageArrayUInt8ToFloat32(IMAGES, -1, 1)
    got = images[index]
    expected = IMAGES[index].astype(np.float32) * images.scale + images.offset  # type: ignore[index]
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    if np.ndim(got):
        got[...] = 7  # the caller's own
        np.testing.assert_array_equal(images[index], expected)


@given(st.lists(st.integers(-60, 60)), st.sampled_from(["raise", "clip", "wrap"]), st.booleans())
def test_take_is_numpys(numbers: list[int], mode: str, offers_take: bool) -> None:
    class Rows:
        """An array-like that has no take of its own."""

        def __len__(self) -> int:
            return len(IMAGES)

        def __getitem__(self, index: object) -> np.ndarray:
            return IMAGES[index]  # type: ignore[index]

    images = ImageArrayUInt8ToFloat32(IMAGES if offers_take else Rows(), -1, 1)
    index = np.array(numbers, dtype=np.int64)
    out = np.empty((len(index), *IMAGES.shape[1:]), np.float32)
    try:
        expected = np.asarray(ImageArrayUInt8ToFloat32(IMAGES, -1, 1)[:]).take(index, axis=0, mode=mode)  # type: ignore[call-overload]
    except IndexError:
        with pytest.raises(IndexError):
            images.take(index, mode=mode)
        return
    assert np.take(images, index, axis=0, out=out, mode=mode) is out  # type: ignore[call-overload]
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(images.take(index, mode=mode), expected)


def test_take_gathers_rows_only() -> None:
    with pytest.raises(ValueError, match="axis 0"):
        ImageArrayUInt8ToFloat32(IMAGES).take([0], axis=1)


def test_what_is_underneath_need_not_have_a_shape() -> None:
    class Rows:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: object) -> np.ndarray:
            return IMAGES[index]  # type: ignore[index]

    images = ImageArrayUInt8ToFloat32(Rows())
    assert len(images) == 40
    np.testing.assert_array_equal(images[2:4], ImageArrayUInt8ToFloat32(IMAGES)[2:4])
    with pytest.raises(AttributeError):
        _ = images.shape


def test_a_node_of_pytables_underneath_is_mini_batched_by_rows(tmp_path: Path) -> None:
    with tables.open_file(tmp_path / "x.h5", "w") as file:
        node = file.create_array(file.root, "x", IMAGES)
        images = ImageArrayUInt8ToFloat32(node, -1, 1)
        expected = ImageArrayUInt8ToFloat32(IMAGES, -1, 1)
        index = np.array([7, 3, 7])
        np.testing.assert_array_equal(images[index], expected[index])
        np.testing.assert_array_equal(images.take(index), expected[index])
        batches = ArrayDataSource([images, np.arange(40)]).batch_iterator(7, shuffle=np.random.RandomState(1))
        for x, numbers in batches:
            np.testing.assert_array_equal(x, expected[numbers])
