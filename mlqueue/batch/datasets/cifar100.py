"""CIFAR-100: 60,000 colour images of 32 x 32 pixels in a hundred classes, which form twenty coarse ones.

A. Krizhevsky: Learning multiple layers of features from tiny images, 2009, https://www.cs.toronto.edu/~kriz/cifar.html.
"""

from __future__ import annotations

from typing import Any

from mlqueue.batch.datasets import dataset, formats, hdf5
from mlqueue.batch.datasets.cifar10 import images_of, read_batches
from mlqueue.batch.datasets.images import ImageDataset, read_labels, required_path

__all__ = ["CIFAR100", "delete_cache", "fetch_cifar100"]

_H5_FILENAME = "cifar100.h5"
_ROW_SHAPE = (3, 32, 32)
_SOURCE = dataset.DownloadSourceFile(
    "cifar-100-python.tar.gz",
    base_url="https://www.cs.toronto.edu/~kriz/",
    sha256="85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
)
_FOLDER = "cifar-100-python/"


@dataset.fetch_and_convert_dataset([_SOURCE], _H5_FILENAME)
def fetch_cifar100(source_paths: list[str], target_path: str) -> str:
    """Fetch CIFAR-100 and return the path of its HDF5 file."""
    content = read_batches(source_paths[0], {f"{_FOLDER}{name}" for name in ("train", "test", "meta")})
    meta = content[f"{_FOLDER}meta"]
    fine, coarse = _class_names(meta, "fine_label_names"), _class_names(meta, "coarse_label_names")
    with hdf5.creating(target_path, "cifar100", "CIFAR-100") as group:
        for part in ("train", "test"):
            batch = content[f"{_FOLDER}{part}"]
            images = images_of(batch, part)
            group.array(f"{part}_X_u8", images)
            for name, key, names in (("y", "fine_labels", fine), ("y_coarse", "coarse_labels", coarse)):
                labels = formats.check_labels(batch.get(key), len(images), len(names), f"{key} of {part}")
                group.array(f"{part}_{name}", labels)
        group.array("class_names", fine)
        group.array("class_names_coarse", coarse)
    return target_path


def _class_names(meta: dict[str, Any], key: str) -> list[bytes]:
    names = meta.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str | bytes) for name in names):
        raise dataset.BadSourceFile(f"meta: expected {key!r} to be a list of names, found {names!r:.80}")
    return [name if isinstance(name, bytes) else name.encode("latin1") for name in names]


def delete_cache() -> None:
    """Remove the converted file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class CIFAR100(ImageDataset):
    """The hundred classes, fetched at first use.

    As :class:`~mlqueue.batch.datasets.cifar10.CIFAR10`, and besides ``train_y_coarse``, ``val_y_coarse`` and
    ``test_y_coarse``, (n,) int32, which are indices into ``class_names_coarse``.
    """

    def __init__(self, n_val: int | None = 10000, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        path = required_path(fetch_cifar100, "CIFAR-100")
        super().__init__(path, "cifar100", _ROW_SHAPE, n_val, val_lower, val_upper)
        coarse = read_labels(self._file, "/cifar100/train_y_coarse")
        self.train_y_coarse, self.val_y_coarse = self._split(coarse)
        self.test_y_coarse = read_labels(self._file, "/cifar100/test_y_coarse")
        self.class_names = dataset.classnames_from_h5(self._file.read("/cifar100/class_names"))
        self.class_names_coarse = dataset.classnames_from_h5(self._file.read("/cifar100/class_names_coarse"))
