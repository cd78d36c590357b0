"""Fashion-MNIST: 70,000 pictures of clothing in MNIST's format.

H. Xiao, K. Rasul, R. Vollgraf: Fashion-MNIST, 2017, https://arxiv.org/abs/1708.07747.
"""

from __future__ import annotations

from mlqueue.batch.datasets import dataset, mnist
from mlqueue.batch.datasets.images import required_path

__all__ = ["FashionMNIST", "delete_cache", "fetch_fashion_mnist"]

_H5_FILENAME = "fashion-mnist.h5"
_MIRRORS = ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",)
_SOURCES = [
    dataset.DownloadSourceFile(
        name,
        base_url="https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        sha256=sha256,
        mirrors=_MIRRORS,
    )
    for name, sha256 in (
        ("train-images-idx3-ubyte.gz", "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84"),
        ("train-labels-idx1-ubyte.gz", "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845"),
        ("t10k-images-idx3-ubyte.gz", "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073"),
        ("t10k-labels-idx1-ubyte.gz", "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5"),
    )
]


@dataset.fetch_and_convert_dataset(_SOURCES, _H5_FILENAME)
def fetch_fashion_mnist(source_paths: list[str], target_path: str) -> str:
    """Fetch Fashion-MNIST and return the path of its HDF5 file."""
    return mnist.convert_idx(source_paths, target_path, "Fashion-MNIST")


def delete_cache() -> None:
    """Remove the converted file."""
    dataset.delete_dataset_cache(_H5_FILENAME)


class FashionMNIST(mnist.MNISTBase):
    """Clothing in ten classes; all else is as in :class:`~mlqueue.batch.datasets.mnist.MNIST`."""

    def __init__(self, n_val: int | None = 10000, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        super().__init__(required_path(fetch_fashion_mnist, "Fashion-MNIST"), n_val, val_lower, val_upper)
