"""USPS: 9,298 handwritten digits of 16 x 16 pixels, from envelopes.

J. Hull: A database for handwritten text recognition research, 1994; in the HDF5 file that BatchUp's author made.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np

from mlqueue.batch.datasets import dataset
from mlqueue.batch.datasets.hdf5 import DatasetFileError, StoredRows
from mlqueue.batch.datasets.images import H5Dataset, read_labels, required_path, split_point

__all__ = ["USPS", "delete_cache", "usps_data"]

_H5_FILENAME = "usps.h5"
_ROW_SHAPE = (1, 16, 16)
_SOURCE = dataset.DownloadSourceFile(
    "usps.h5",
    url="https://github.com/Britefury/usps_dataset/raw/master/usps.h5",
    sha256="ba768d9a9b11e79b31c1e40130647c4fc04e6afc1fb41a0d4b9f1176065482b4",
    mirrors=("https://raw.githubusercontent.com/Britefury/usps_dataset/master/",),
)


@dataset.fetch_and_convert_dataset([_SOURCE], _H5_FILENAME)
def usps_data(source_paths: list[str], target_path: str) -> str:
    """Fetch USPS and return the path of its HDF5 file."""
    os.replace(source_paths[0], target_path)  # noqa: PTH105
    return target_path


def delete_cache() -> None:
    """Remove the file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class USPS(H5Dataset):
    """The digits, fetched at first use.

    ``train_X`` (7291 - ``n_val``, 1, 16, 16), ``val_X`` (``n_val``, ...) and ``test_X`` (2007, ...) are float32;
    ``*_y`` are (n,) int32, the digits. ``n_val`` samples, the last of the training set, are the validation set; 0 or
    None for none. Training and validation images are read into memory when they are first used; test images, and
    training images without a validation set, are read from the file by the row.

    Raises :class:`~mlqueue.batch.datasets.dataset.DatasetUnavailable`, a ``RuntimeError``, when it cannot be fetched.
    """

    def __init__(self, n_val: int | None = 729) -> None:
        super().__init__(required_path(usps_data, "USPS"))
        labels = read_labels(self._file, "/usps/train_y")
        self._n_train = split_point(len(labels), n_val)
        self._stored_train = self._digits("/usps/train_X", len(labels))
        self.train_y, self.val_y = labels[: self._n_train], labels[self._n_train :]
        self.test_y = read_labels(self._file, "/usps/test_y")
        self.test_X = self._digits("/usps/test_X", len(self.test_y))

    @functools.cached_property
    def train_X(self) -> Any:  # noqa: N802 - BatchUp's name
        """The training images, float32."""
        return self._stored_train[: self._n_train] if len(self.val_y) else self._stored_train

    @functools.cached_property
    def val_X(self) -> Any:  # noqa: N802
        """The validation images, float32."""
        return self._stored_train[self._n_train :]

    def _digits(self, name: str, count: int) -> StoredRows:
        rows = self._file.rows(name, np.float32)
        if rows.shape != (count, *_ROW_SHAPE):
            raise DatasetFileError(
                f"{self.path} holds {name} of the shape {rows.shape}, expected {(count, *_ROW_SHAPE)}"
            )
        return rows
