"""The data sets that are shipped, by name."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from pathlib import Path

from mlqueue.batch.datasets.dataset import DatasetFetch
from mlqueue.errors import MLQueueError

__all__ = ["CATALOGUE", "Entry", "UnknownDataset", "find"]


class UnknownDataset(MLQueueError, KeyError):
    """No data set has this name."""

    exit_code = 2


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One data set."""

    #: What it is called on the command line.
    name: str
    #: What it is called elsewhere.
    title: str
    #: Its module in :mod:`mlqueue.batch.datasets`.
    module: str
    #: Its class in that module.
    class_name: str
    #: Its fetch function in that module.
    fetch_name: str
    #: What is downloaded, in megabytes, roughly.
    download_mb: int

    @property
    def fetch(self) -> DatasetFetch:
        """The fetch function."""
        function = getattr(importlib.import_module(f"mlqueue.batch.datasets.{self.module}"), self.fetch_name)
        assert isinstance(function, DatasetFetch)
        return function

    @property
    def path(self) -> Path:
        """Where the converted file is, or will be."""
        return Path(self.fetch.target_path)


CATALOGUE: dict[str, Entry] = {
    name: Entry(
        name=name, title=title, module=module, class_name=class_name, fetch_name=fetch_name, download_mb=download_mb
    )
    for name, title, module, class_name, fetch_name, download_mb in (
        ("mnist", "MNIST", "mnist", "MNIST", "fetch_mnist", 12),
        ("fashion_mnist", "Fashion-MNIST", "fashion_mnist", "FashionMNIST", "fetch_fashion_mnist", 31),
        ("cifar10", "CIFAR-10", "cifar10", "CIFAR10", "fetch_cifar10", 170),
        ("cifar100", "CIFAR-100", "cifar100", "CIFAR100", "fetch_cifar100", 169),
        ("svhn", "SVHN", "svhn", "SVHN", "fetch_svhn_train_test", 246),
        ("svhn_extra", "SVHN's extra set", "svhn", "SVHNExtra", "fetch_svhn_extra", 1329),
        ("stl", "STL-10", "stl", "STL", "fetch_stl", 2640),
        ("usps", "USPS", "usps", "USPS", "usps_data", 10),
    )
}


def find(name: str) -> Entry:
    """The data set called ``name``, where ``-`` is as good as ``_`` and case does not count."""
    entry = CATALOGUE.get(name.lower().replace("-", "_"))
    if entry is None:
        near = difflib.get_close_matches(name.lower(), CATALOGUE, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(CATALOGUE)}."
        raise UnknownDataset(f"no data set is called {name!r}. {hint}")
    return entry
