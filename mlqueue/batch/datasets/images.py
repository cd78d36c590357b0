"""What the data sets of labelled images have in common: a training set, part of it for validation, and a test set."""

from __future__ import annotations

import functools
import os
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from mlqueue.batch.datasets.dataset import DatasetFetch, DatasetUnavailable
from mlqueue.batch.datasets.hdf5 import DatasetFileError, HDF5File, StoredRows
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32

__all__ = ["H5Dataset", "ImageDataset", "read_labels", "required_path", "split_point"]


class H5Dataset:
    """A data set in an HDF5 file, which is opened when something is read and given up by :meth:`close`.

    It is a context manager, and reading after a close opens the file again.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = HDF5File(path)

    @property
    def path(self) -> str:
        """The absolute path of the HDF5 file."""
        return self._file.path

    def close(self) -> None:
        """Give up the open file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _images(self, name: str, row_shape: tuple[int, ...], count: int) -> StoredRows:
        rows = self._file.rows(name)
        if rows.shape != (count, *row_shape) or rows.dtype != np.uint8:
            raise DatasetFileError(
                f"{self.path} holds {name} as {rows.dtype} of the shape {rows.shape}, expected uint8 of "
                f"{(count, *row_shape)}: it is cut short or of another data set. Remove it and fetch it again"
            )
        return rows


class ImageDataset(H5Dataset):
    """Images in 8 bits with one label each.

    ``train_X``, ``val_X`` and ``test_X`` are array-likes of float32, converted from the bytes in ``*_X_u8`` as they
    are indexed; ``train_y``, ``val_y`` and ``test_y`` are (n,) int32 arrays. Training and validation images are read
    into memory when they are first used; test images, and training images without a validation set, stay in the
    file and are read by the row.

    Parameters
    ----------
    path, group:
        The HDF5 file and the group in it.
    row_shape:
        The shape of one image, (channels, height, width).
    n_val:
        How many samples, the last of the training set, are the validation set; 0 or None for none.
    val_lower, val_upper:
        The ends of the range of the float32 values.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        group: str,
        row_shape: tuple[int, int, int],
        n_val: int | None,
        val_lower: float,
        val_upper: float,
    ) -> None:
        super().__init__(path)
        self._group = group
        self._row_shape = row_shape
        labels = read_labels(self._file, f"/{group}/train_y")
        self._n_train = split_point(len(labels), n_val)
        self._stored_train = self._images(f"/{group}/train_X_u8", row_shape, len(labels))
        self.train_y, self.val_y = labels[: self._n_train], labels[self._n_train :]
        self.test_y = read_labels(self._file, f"/{group}/test_y")
        self.test_X_u8: Any = self._images(f"/{group}/test_X_u8", row_shape, len(self.test_y))
        self._range = (val_lower, val_upper)

    @functools.cached_property
    def train_X_u8(self) -> Any:  # noqa: N802 - BatchUp's name
        """The training images, uint8."""
        return self._stored_train[: self._n_train] if len(self.val_y) else self._stored_train

    @functools.cached_property
    def val_X_u8(self) -> Any:  # noqa: N802
        """The validation images, uint8."""
        return self._stored_train[self._n_train :]

    @functools.cached_property
    def train_X(self) -> ImageArrayUInt8ToFloat32:  # noqa: N802
        """The training images, float32."""
        return ImageArrayUInt8ToFloat32(self.train_X_u8, *self._range)

    @functools.cached_property
    def val_X(self) -> ImageArrayUInt8ToFloat32:  # noqa: N802
        """The validation images, float32."""
        return ImageArrayUInt8ToFloat32(self.val_X_u8, *self._range)

    @functools.cached_property
    def test_X(self) -> ImageArrayUInt8ToFloat32:  # noqa: N802
        """The test images, float32."""
        return ImageArrayUInt8ToFloat32(self.test_X_u8, *self._range)

    def _split(self, labels: npt.NDArray[np.int32]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Further labels of the training set: (those for training, those for validation)."""
        return labels[: self._n_train], labels[self._n_train :]


def required_path(fetch: DatasetFetch, title: str) -> str:
    """The path of the converted file; :class:`DatasetUnavailable`, a ``RuntimeError``, names the data set."""
    try:
        return fetch.require()
    except DatasetUnavailable as failure:
        raise DatasetUnavailable(f"could not load {title}: {failure}") from failure


def split_point(n_samples: int, n_val: int | None) -> int:
    """The number of training samples when the last ``n_val`` of ``n_samples`` validate."""
    n_val = 0 if n_val is None else n_val
    if isinstance(n_val, bool) or not isinstance(n_val, int | np.integer):
        raise TypeError(f"n_val must be a number of samples or None, not {n_val!r}")
    if not 0 <= n_val <= n_samples:
        raise ValueError(f"n_val must be from 0 to {n_samples}, the size of the training set, not {n_val}")
    return n_samples - int(n_val)


def read_labels(file: HDF5File, name: str) -> npt.NDArray[np.int32]:
    """The labels ``name``, whatever integers they are stored as, as (n,) int32."""
    labels = np.asarray(file.read(name))
    if labels.size != len(labels):
        raise DatasetFileError(f"{file.path} holds {name} with the shape {labels.shape}, expected one label a row")
    return labels.reshape(-1).astype(np.int32, copy=False)
