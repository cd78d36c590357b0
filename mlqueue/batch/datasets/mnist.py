"""MNIST: 70,000 handwritten digits of 28 x 28 pixels.

Y. LeCun, L. Bottou, Y. Bengio, P. Haffner: Gradient-based learning applied to document recognition, 1998.
"""

from __future__ import annotations

import os

import numpy as np

from mlqueue.batch.datasets import dataset, formats, hdf5
from mlqueue.batch.datasets.images import ImageDataset, required_path

__all__ = ["MNIST", "MNISTBase", "delete_cache", "fetch_mnist"]

_H5_FILENAME = "mnist.h5"
_GROUP = "mnist"
_ROW_SHAPE = (1, 28, 28)
_MIRRORS = ("https://storage.googleapis.com/cvdf-datasets/mnist/", "http://yann.lecun.com/exdb/mnist/")
_SOURCES = [
    dataset.DownloadSourceFile(
        name, base_url="https://ossci-datasets.s3.amazonaws.com/mnist/", sha256=sha256, mirrors=_MIRRORS
    )
    for name, sha256 in (
        ("train-images-idx3-ubyte.gz", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1-ubyte.gz", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3-ubyte.gz", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1-ubyte.gz", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    )
]


@dataset.fetch_and_convert_dataset(_SOURCES, _H5_FILENAME)
def fetch_mnist(source_paths: list[str], target_path: str) -> str:
    """Fetch MNIST and return the path of its HDF5 file."""
    return convert_idx(source_paths, target_path, "MNIST")


def convert_idx(source_paths: list[str], target_path: str, title: str) -> str:
    """Convert four IDX files (training images and labels, test images and labels) of 28 x 28 and ten classes."""
    with hdf5.creating(target_path, _GROUP, title) as group:
        for part, images_path, labels_path in (("train", *source_paths[:2]), ("test", *source_paths[2:])):
            images = formats.read_idx(images_path, 3)
            if images.shape[1:] != _ROW_SHAPE[1:]:
                raise dataset.BadSourceFile(
                    f"{title}: the {part} images have the shape {images.shape[1:]}, not 28 x 28"
                )
            labels = formats.check_labels(
                formats.read_idx(labels_path, 1), len(images), 10, f"the {part} labels of {title}"
            )
            group.array(f"{part}_X_u8", np.expand_dims(images, 1))
            group.array(f"{part}_y", labels)
    return target_path


def delete_cache() -> None:
    """Remove the converted file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class MNISTBase(ImageDataset):
    """A data set of MNIST's format in the HDF5 file ``h5_path``; images are (1, 28, 28), classes 0 to 9."""

    def __init__(
        self,
        h5_path: str | os.PathLike[str],
        n_val: int | None = 10000,
        val_lower: float = 0.0,
        val_upper: float = 1.0,
    ) -> None:
        super().__init__(h5_path, _GROUP, _ROW_SHAPE, n_val, val_lower, val_upper)


class MNIST(MNISTBase):
    """The handwritten digits, fetched at first use.

    ``train_X`` (60000 - ``n_val``, 1, 28, 28), ``val_X`` (``n_val``, ...) and ``test_X`` (10000, ...) are float32 from
    ``val_lower`` (paper) to ``val_upper`` (ink); ``*_X_u8`` are the bytes they come from; ``*_y`` are (n,) int32, the
    digits. See :class:`~mlqueue.batch.datasets.images.ImageDataset` for what is in memory when.

    Raises :class:`~mlqueue.batch.datasets.dataset.DatasetUnavailable`, a ``RuntimeError``, when it cannot be fetched.
    """

    def __init__(self, n_val: int | None = 10000, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        super().__init__(required_path(fetch_mnist, "MNIST"), n_val, val_lower, val_upper)
