"""The handwritten digits that scikit-learn ships: 1,797 images of 8x8 pixels, from the UCI repository.

Source: "Optical Recognition of Handwritten Digits", E. Alpaydin and C. Kaynak, the test part. Nothing is downloaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import sklearn.datasets
from numpy.typing import NDArray

#: Height and width of an image in pixels.
SIDE = 8
CLASSES = 10

#: How many images are kept for the test; they are never trained on.
TEST_IMAGES = 360

#: The seed of the split. It is no argument of the training, so that all trainings are measured on the same images.
SPLIT_SEED = 20


class Digits(NamedTuple):
    """The images, float32 of shape (n, 8, 8) from 0 (paper) to 1 (ink), and their labels, int64 of shape (n,)."""

    train_images: NDArray[np.float32]
    train_labels: NDArray[np.int64]
    test_images: NDArray[np.float32]
    test_labels: NDArray[np.int64]


def load_digits() -> Digits:
    """The digits, parted into 1,437 for training and 360 for the test; the same in every process."""
    found: Any = sklearn.datasets.load_digits()
    images = scaled(found.images)
    labels = found.target.astype(np.int64)
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    test, train = order[:TEST_IMAGES], order[TEST_IMAGES:]
    return Digits(images[train], labels[train], images[test], labels[test])


def scaled(images: NDArray[Any]) -> NDArray[np.float32]:
    """Images as the data set has them (0 to 16) as the network takes them: float32 from 0 to 1."""
    return (np.asarray(images) / 16).astype(np.float32)


def with_shifts(images: NDArray[np.float32], labels: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """The images and each of them shifted by one pixel in the eight directions: nine times as many."""
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    moved = [padded[:, down : down + SIDE, right : right + SIDE] for down in range(3) for right in range(3)]
    return np.concatenate(moved), np.tile(labels, len(moved))
