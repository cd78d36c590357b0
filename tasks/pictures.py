"""Pictures of digits, as people upload or draw them, made into what the network was trained on."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from .data import SIDE

#: What is opened; the other decoders that there are stay closed.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

#: The most pixels that a picture may have.
MOST_PIXELS = 4096 * 4096

#: How much of the range from paper to ink there must be between the darkest and the lightest pixel.
LEAST_CONTRAST = 0.15

#: From which share of the ink on a pixel belongs to the digit.
INK = 0.3

#: The data set counts ink in blocks of so many pixels by so many.
BLOCK = 4


def image_of(picture: bytes) -> NDArray[np.float32]:
    """The digit in a picture (PNG, JPEG, WebP, GIF or BMP): shape (8, 8), from 0 (paper) to 1 (ink).

    Dark on light or light on dark, anywhere in the picture, of any size. It is cut out, scaled to the full height and
    put into the middle, as the digits of the data set are. Raises ValueError for what is no picture, or an empty one.
    """
    ink = _ink(_gray(picture))
    rows, columns = np.nonzero(ink.max(axis=1) > INK)[0], np.nonzero(ink.max(axis=0) > INK)[0]
    digit = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    side = SIDE * BLOCK
    scale = side / max(digit.shape)
    height, width = (max(1, round(length * scale)) for length in digit.shape)
    scaled = Image.fromarray((255 * digit).astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
    canvas = np.zeros((side, side), np.float32)
    top, left = (side - height) // 2, (side - width) // 2
    canvas[top : top + height, left : left + width] = np.asarray(scaled, np.float32) / 255
    blocks: NDArray[np.float32] = canvas.reshape(SIDE, BLOCK, SIDE, BLOCK).mean(axis=(1, 3))
    return blocks


def _gray(picture: bytes) -> NDArray[np.float32]:
    """The picture from 0 (black) to 1 (white), on white where it is transparent."""
    try:
        with Image.open(io.BytesIO(picture), formats=FORMATS) as opened:
            if opened.width * opened.height > MOST_PIXELS:
                raise ValueError(f"a picture of {opened.width} x {opened.height} pixels: 4096 x 4096 are the most.")
            colours = opened.convert("RGBA")
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"these {len(picture):,} bytes are no picture; send {', '.join(FORMATS)}.") from error
    paper = Image.new("RGBA", colours.size, "white")
    gray: NDArray[np.float32] = np.asarray(Image.alpha_composite(paper, colours).convert("L"), np.float32)
    return gray / np.float32(255)


def _ink(gray: NDArray[np.float32]) -> NDArray[np.float32]:
    """The picture from 0 (paper) to 1 (ink): the paper is what most of its border is."""
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    ink = 1 - gray if np.median(border) > 0.5 else gray
    low, high = float(ink.min()), float(ink.max())
    if high - low < LEAST_CONTRAST:
        raise ValueError("the picture is empty: draw or upload one digit, dark on light or light on dark.")
    scaled: NDArray[np.float32] = (ink - low) / np.float32(high - low)
    return scaled
