"""Pictures of digits as people make them: found, cut out and scaled; and refused in words where there is none."""

from __future__ import annotations

import io
from typing import Any

import dramatiq.broker
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

_global_broker = dramatiq.broker.global_broker
from tasks.data import load_digits  # noqa: E402
from tasks.pictures import image_of  # noqa: E402

dramatiq.broker.global_broker = _global_broker  # the app has taken a place that belongs to other tests


def drawn(digit: NDArray[Any], kind: str = "PNG", *, dark: bool = False, margin: int = 0, scale: int = 20) -> bytes:
    """A picture of a digit, black on white unless it is the other way round."""
    ink = np.pad(np.kron(digit, np.ones((scale, scale))), margin)
    file = io.BytesIO()
    Image.fromarray((255 * (ink if dark else 1 - ink)).astype(np.uint8)).save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def digits() -> NDArray[Any]:
    return load_digits().test_images[:40]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dark": True},
        {"margin": 90},
        {"scale": 4},
        {"kind": "JPEG"},
        {"kind": "WEBP"},
        {"kind": "GIF"},
        {"kind": "BMP"},
    ],
    ids=str,
)
def test_a_digit_is_found_whatever_the_picture(digits: NDArray[Any], options: dict[str, Any]) -> None:
    found = np.stack([image_of(drawn(digit, **options)) for digit in digits])
    assert ((40, 8, 8), np.float32) == (found.shape, found.dtype)
    assert found.min() >= 0
    assert found.max() <= 1
    # They are moved into the middle, by half a pixel at most, and that blurs them.
    moved = [np.stack([np.roll(digits, shift, axis=2), digits]).mean(axis=0) for shift in (-1, 0, 1)]
    distance = np.min([np.abs(found - image).mean(axis=(1, 2)) for image in moved], axis=0)
    assert np.median(distance) < 0.08


def test_what_is_transparent_is_paper() -> None:
    picture = Image.new("RGBA", (100, 100), (0, 0, 0, 0))
    picture.paste((0, 0, 0, 255), (45, 10, 55, 90))
    file = io.BytesIO()
    picture.save(file, "PNG")
    found = image_of(file.getvalue())
    assert found[:, 3:5].min() > 0.4
    assert 0 == found[:, :3].max() == found[:, 5:].max()


def blank(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (width, height), 255).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("picture", "text"),
    [
        (b"", "these 0 bytes are no picture; send PNG, JPEG"),
        (b"<svg/>", "these 6 bytes are no picture"),
        (blank(64, 64), "the picture is empty"),
        (blank(5000, 5000), "a picture of 5000 x 5000 pixels"),
        (blank(64, 64)[:-20], "are no picture|the picture is empty"),
    ],
)
def test_what_is_no_digit_is_refused_in_words(picture: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        image_of(picture)
