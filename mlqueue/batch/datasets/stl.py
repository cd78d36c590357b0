"""STL-10: colour images of 96 x 96 pixels in ten classes.

5,000 are for training, 8,000 for tests, and 100,000 have no labels.

A. Coates, H. Lee, A. Ng: An analysis of single-layer networks in unsupervised feature learning, 2011.
"""

from __future__ import annotations

import functools
from typing import IO

import numpy as np
import numpy.typing as npt

from mlqueue.batch.datasets import dataset, formats, hdf5
from mlqueue.batch.datasets.hdf5 import DatasetFileError
from mlqueue.batch.datasets.images import H5Dataset, read_labels, required_path
from mlqueue.batch.image.utils import ImageArrayUInt8ToFloat32

__all__ = ["STL", "delete_cache", "fetch_stl"]

_H5_FILENAME = "stl10.h5"
_ROW_SHAPE = (3, 96, 96)
_SOURCE = dataset.DownloadSourceFile(
    "stl10_binary.tar.gz",
    base_url="http://ai.stanford.edu/~acoates/stl10/",  # the digest vouches for it
    sha256="f31fd99273a1acb8609c8db427cebb1de3f71de77758cdc0e22956e1289b9866",
    mirrors=("http://cs.stanford.edu/~acoates/stl10/",),
)
_FOLDER = "stl10_binary/"
_IMAGES = {f"{_FOLDER}{part}_X.bin": part for part in ("train", "test", "unlabeled")}
_LABELS = {f"{_FOLDER}{part}_y.bin": part for part in ("train", "test")}
_CLASS_NAMES = f"{_FOLDER}class_names.txt"
_FOLDS = f"{_FOLDER}fold_indices.txt"


@dataset.fetch_and_convert_dataset([_SOURCE], _H5_FILENAME)
def fetch_stl(source_paths: list[str], target_path: str) -> str:
    """Fetch STL-10 and return the path of its HDF5 file."""
    counts: dict[str, int] = {}
    texts: dict[str, bytes] = {}
    names = {*_IMAGES, *_LABELS, _CLASS_NAMES, _FOLDS}
    with hdf5.creating(target_path, "stl", "STL-10") as group:
        for name, size, file in formats.tar_members(source_paths[0], names):
            if name in _IMAGES:
                counts[_IMAGES[name]] = _write_images(group, _IMAGES[name], name, size, file)
            else:
                texts[name] = formats.read_member(name, size, file)
        for name, part in _LABELS.items():
            stored = np.frombuffer(texts[name], np.uint8).astype(np.int32) - 1  # published as 1 to 10
            group.array(f"{part}_y", formats.check_labels(stored, counts[part], 10, name))
        group.array("class_names", [line.strip() for line in texts[_CLASS_NAMES].splitlines() if line.strip()])
        folds = group.ragged("fold_indices", np.int32)
        for fold in _parse_folds(texts[_FOLDS], counts["train"]):
            folds.append(fold)
    return target_path


def _write_images(group: hdf5.Group, part: str, name: str, size: int, file: IO[bytes]) -> int:
    """Write the images of one member, a block at a time; returns how many there were."""
    count = size // int(np.prod(_ROW_SHAPE))
    rows = (
        group.growing("unl_X_u8", np.uint8, _ROW_SHAPE, count)
        if part == "unlabeled"
        else group.empty(f"{part}_X_u8", np.uint8, (max(1, count), *_ROW_SHAPE))
    )
    for first, block in formats.row_blocks(name, size, file, _ROW_SHAPE):
        upright = np.ascontiguousarray(block.transpose(0, 1, 3, 2))  # published by columns
        if part == "unlabeled":
            rows.append(upright)
        else:
            rows[first : first + len(upright)] = upright
    return count


def _parse_folds(text: bytes, n_train: int) -> list[npt.NDArray[np.int32]]:
    try:
        folds = [np.array(line.split(), np.int64) for line in text.splitlines() if line.strip()]
    except (ValueError, OverflowError) as error:
        raise dataset.BadSourceFile(f"{_FOLDS} holds something else than numbers: {error}") from error
    for number, fold in enumerate(folds):
        if not (fold.min() >= 0 and fold.max() < n_train):
            raise dataset.BadSourceFile(f"{_FOLDS}: fold {number} goes beyond the {n_train} training images")
    return [fold.astype(np.int32) for fold in folds]


def delete_cache() -> None:
    """Remove the converted file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class STL(H5Dataset):
    """STL-10, fetched at first use.

    ``train_X``, ``val_X`` and ``test_X`` are float32 (n, 3, 96, 96) from ``val_lower`` to ``val_upper``; ``unl_X``
    are the images without labels; ``*_X_u8`` are the bytes they come from; ``*_y`` are (n,) int32, indices into
    ``class_names``. ``tr_folds`` are the published folds, int32 arrays of indices into the training set.

    Parameters
    ----------
    n_val_folds:
        The last that many folds are the validation set, in their order, and the rest of the training set is trained
        on; 0 or None for none. The published folds overlap: with more than one, a sample that is in two of them
        comes twice.
    val_lower, val_upper:
        The ends of the range of the float32 values.
    """

    def __init__(self, n_val_folds: int | None = 1, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        super().__init__(required_path(fetch_stl, "STL-10"))
        labels = read_labels(self._file, "/stl/train_y")
        self.test_y = read_labels(self._file, "/stl/test_y")
        self.class_names = dataset.classnames_from_h5(self._file.read("/stl/class_names"))
        self.tr_folds = [np.asarray(fold, np.int32) for fold in self._file.read("/stl/fold_indices")]
        self._stored_train = self._images("/stl/train_X_u8", _ROW_SHAPE, len(labels))
        self.test_X_u8 = self._images("/stl/test_X_u8", _ROW_SHAPE, len(self.test_y))
        self.unl_X_u8 = self._file.rows("/stl/unl_X_u8")
        if self.unl_X_u8.shape[1:] != _ROW_SHAPE:
            raise DatasetFileError(f"{self.path} holds images without labels of the shape {self.unl_X_u8.shape}")
        self._range = (val_lower, val_upper)
        self._val = _validation_indices(self.tr_folds, n_val_folds)
        kept = np.ones(len(labels), bool)
        kept[self._val] = False
        self._train = np.flatnonzero(kept)
        self.train_y, self.val_y = labels[self._train], labels[self._val]

    @functools.cached_property
    def train_X_u8(self) -> npt.NDArray[np.uint8] | hdf5.StoredRows:  # noqa: N802 - BatchUp's name
        """The training images, uint8: in memory, but rows of the file without a validation set."""
        return self._stored_train.take(self._train) if len(self._val) else self._stored_train

    @functools.cached_property
    def val_X_u8(self) -> npt.NDArray[np.uint8]:  # noqa: N802
        """The validation images, uint8, in memory."""
        return self._stored_train.take(self._val)

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
        """The test images, float32, read from the file by the row."""
        return ImageArrayUInt8ToFloat32(self.test_X_u8, *self._range)

    @functools.cached_property
    def unl_X(self) -> ImageArrayUInt8ToFloat32:  # noqa: N802
        """The images without labels, float32, read from the file by the row."""
        return ImageArrayUInt8ToFloat32(self.unl_X_u8, *self._range)


def _validation_indices(folds: list[npt.NDArray[np.int32]], n_val_folds: int | None) -> npt.NDArray[np.int32]:
    n_val_folds = 0 if n_val_folds is None else n_val_folds
    if isinstance(n_val_folds, bool) or not isinstance(n_val_folds, int | np.integer):
        raise TypeError(f"n_val_folds must be a number of folds or None, not {n_val_folds!r}")
    if not 0 <= n_val_folds <= len(folds):
        raise ValueError(f"n_val_folds must be from 0 to {len(folds)}, the number of folds, not {n_val_folds}")
    chosen = folds[len(folds) - int(n_val_folds) :]
    return np.concatenate(chosen) if chosen else np.empty(0, np.int32)
