"""CIFAR-10: 60,000 colour images of 32 x 32 pixels in ten classes.

A. Krizhevsky: Learning multiple layers of features from tiny images, 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlqueue.batch.datasets import dataset, formats, hdf5
from mlqueue.batch.datasets.images import ImageDataset, required_path

__all__ = ["CIFAR10", "delete_cache", "fetch_cifar10"]

_H5_FILENAME = "cifar10.h5"
_ROW_SHAPE = (3, 32, 32)
_SOURCE = dataset.DownloadSourceFile(
    "cifar-10-python.tar.gz",
    base_url="https://www.cs.toronto.edu/~kriz/",
    sha256="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
)
_FOLDER = "cifar-10-batches-py/"
_TRAIN = [f"{_FOLDER}data_batch_{number}" for number in range(1, 6)]
_TEST = f"{_FOLDER}test_batch"
_CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataset.fetch_and_convert_dataset([_SOURCE], _H5_FILENAME)
def fetch_cifar10(source_paths: list[str], target_path: str) -> str:
    """Fetch CIFAR-10 and return the path of its HDF5 file."""
    batches = read_batches(source_paths[0], {*_TRAIN, _TEST})
    parts = {"train": [batches[name] for name in _TRAIN], "test": [batches[_TEST]]}
    with hdf5.creating(target_path, "cifar10", "CIFAR-10") as group:
        for part, content in parts.items():
            images = [images_of(batch, part) for batch in content]
            labels = [
                formats.check_labels(batch.get("labels"), len(of), 10, f"the {part} labels")
                for batch, of in zip(content, images, strict=True)
            ]
            group.array(f"{part}_X_u8", np.concatenate(images))
            group.array(f"{part}_y", np.concatenate(labels))
    return target_path


def read_batches(path: str, names: set[str]) -> dict[str, dict[str, Any]]:
    """The pickled dictionaries ``names`` in the archive at ``path``."""
    batches = {}
    for name, size, file in formats.tar_members(path, names):
        batch = formats.load_pickle(formats.read_member(name, size, file), name)
        if not isinstance(batch, dict):
            raise dataset.BadSourceFile(f"{name} holds a {type(batch).__name__}, expected a dictionary")
        batches[name] = batch
    return batches


def images_of(batch: dict[str, Any], what: str) -> npt.NDArray[np.uint8]:
    """The images of one pickled dictionary, as (n, 3, 32, 32)."""
    data = batch.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,) or not len(data):
        found = f"{data.dtype} of {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise dataset.BadSourceFile(f"the {what} images: expected 'data' to be uint8 of (n, 3072), found {found}")
    return data.reshape(-1, *_ROW_SHAPE)


def delete_cache() -> None:
    """Remove the converted file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class CIFAR10(ImageDataset):
    """The ten classes, fetched at first use.

    ``train_X`` (50000 - ``n_val``, 3, 32, 32), ``val_X`` (``n_val``, ...) and ``test_X`` (10000, ...) are float32 from
    ``val_lower`` to ``val_upper``; ``*_X_u8`` are the bytes they come from; ``*_y`` are (n,) int32, indices into
    ``class_names``.

    Raises :class:`~mlqueue.batch.datasets.dataset.DatasetUnavailable`, a ``RuntimeError``, when it cannot be fetched.
    """

    def __init__(self, n_val: int | None = 10000, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        super().__init__(required_path(fetch_cifar10, "CIFAR-10"), "cifar10", _ROW_SHAPE, n_val, val_lower, val_upper)
        self.class_names = list(_CLASS_NAMES)
