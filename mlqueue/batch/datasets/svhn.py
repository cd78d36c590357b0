"""SVHN: Street View House Numbers, colour images of 32 x 32 pixels.

73,257 are for training, 26,032 for tests, and 531,131 are extra.

Y. Netzer and others: Reading digits in natural images with unsupervised feature learning, 2011.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mlqueue.batch.datasets import dataset, formats, hdf5
from mlqueue.batch.datasets.images import H5Dataset, ImageDataset, read_labels, required_path
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32

__all__ = ["SVHN", "SVHNExtra", "delete_cache", "fetch_svhn_extra", "fetch_svhn_train_test"]

_H5_SVHN_FILENAME = "svhn_train_test.h5"
_H5_EXTRA_FILENAME = "svhn_extra.h5"
_ROW_SHAPE = (3, 32, 32)
_BASE_URL = "http://ufldl.stanford.edu/housenumbers/"  # this host serves them over http; the digests vouch for them
_SVHN_SOURCES = [
    dataset.DownloadSourceFile(
        "train_32x32.mat",
        base_url=_BASE_URL,
        sha256="435e94d69a87fde4fd4d7f3dd208dfc32cb6ae8af2240d066de1df7508d083b8",
    ),
    dataset.DownloadSourceFile(
        "test_32x32.mat",
        base_url=_BASE_URL,
        sha256="cdce80dfb2a2c4c6160906d0bd7c68ec5a99d7ca4831afa54f09182025b6a75b",
    ),
]
_EXTRA_SOURCES = [
    dataset.DownloadSourceFile(
        "extra_32x32.mat",
        base_url=_BASE_URL,
        sha256="a133a4beb38a00fcdda90c9489e0c04f900b660ce8a316a5e854838379a71eb3",
    )
]
_ROWS_PER_WRITE = 8192


@dataset.fetch_and_convert_dataset(_SVHN_SOURCES, _H5_SVHN_FILENAME)
def fetch_svhn_train_test(source_paths: list[str], target_path: str) -> str:
    """Fetch SVHN's training and test sets and return the path of their HDF5 file."""
    with hdf5.creating(target_path, "svhn", "SVHN") as group:
        for part, path in zip(("train", "test"), source_paths, strict=True):
            images, labels = _read(path)
            group.array(f"{part}_X_u8", np.ascontiguousarray(images))
            group.array(f"{part}_y", labels)
    return target_path


@dataset.fetch_and_convert_dataset(_EXTRA_SOURCES, _H5_EXTRA_FILENAME)
def fetch_svhn_extra(source_paths: list[str], target_path: str) -> str:
    """Fetch SVHN's extra set and return the path of its HDF5 file."""
    images, labels = _read(source_paths[0])
    with hdf5.creating(target_path, "svhn", "SVHN extra") as group:
        rows = group.growing("extra_X_u8", np.uint8, _ROW_SHAPE, len(images))
        for start in range(0, len(images), _ROWS_PER_WRITE):
            rows.append(np.ascontiguousarray(images[start : start + _ROWS_PER_WRITE]))
        group.growing("extra_y", np.int32, (), len(labels)).append(labels)
    return target_path


def _read(path: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """Images (n, 3, 32, 32), a view, and labels (n,); the file holds (32, 32, 3, n) and says 10 for zero."""
    stored, labels = formats.matlab_arrays(path, "X", "y")
    if stored.ndim == 3:  # MATLAB drops a last dimension of one
        stored = stored[..., np.newaxis]
    if stored.shape[:3] != (32, 32, 3) or stored.dtype != np.uint8 or not stored.size:
        raise dataset.BadSourceFile(f"X: expected uint8 of (32, 32, 3, n), found {stored.dtype} of {stored.shape}")
    images = stored.transpose(3, 2, 0, 1)
    checked = formats.check_labels(labels.reshape(-1), len(images), 11, "y")
    checked[checked == 10] = 0
    return images, checked


def delete_cache() -> None:
    """Remove the converted files, that of the extra set too."""
    dataset.delete_dataset_cache(_H5_SVHN_FILENAME, _H5_EXTRA_FILENAME)


class SVHN(ImageDataset):
    """House numbers, cut to the digit, fetched at first use.

    ``train_X`` (73257 - ``n_val``, 3, 32, 32), ``val_X`` (``n_val``, ...) and ``test_X`` (26032, ...) are float32 from
    ``val_lower`` to ``val_upper``; ``*_X_u8`` are the bytes they come from; ``*_y`` are (n,) int32, the digits.

    Raises :class:`~mlqueue.batch.datasets.dataset.DatasetUnavailable`, a ``RuntimeError``, when it cannot be fetched.
    """

    def __init__(self, n_val: int | None = 10000, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        path = required_path(fetch_svhn_train_test, "SVHN")
        super().__init__(path, "svhn", _ROW_SHAPE, n_val, val_lower, val_upper)


class SVHNExtra(H5Dataset):
    """The extra house numbers, easier ones: ``X`` (531131, 3, 32, 32) float32, ``X_u8`` its bytes, ``y`` (n,) int32.

    Images stay in the file, compressed, and are read by the row.
    """

    def __init__(self, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        super().__init__(required_path(fetch_svhn_extra, "SVHN's extra set"))
        self.y = read_labels(self._file, "/svhn/extra_y")
        self.X_u8 = self._images("/svhn/extra_X_u8", _ROW_SHAPE, len(self.y))
        self.X = ImageArrayUInt8ToFloat32(self.X_u8, val_lower, val_upper)
