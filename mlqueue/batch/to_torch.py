"""Data sources for PyTorch. Importing this module needs torch."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["TorchBatches", "as_tensors"]

# By name, so that types can be checked where torch is not installed.
torch: Any = importlib.import_module("torch")
torch_data: Any = importlib.import_module("torch.utils.data")


def as_tensors(batch: Any, pin: bool = False) -> Any:
    """A batch with every array of numbers as a tensor on the same memory; other arrays, as of text, stay.

    An array that may not be written into, or whose byte order or strides torch does not have, is copied first.
    `pin`: into page-locked memory (a copy), for a fast way to a GPU.
    """
    if isinstance(batch, tuple | list):
        return tuple(as_tensors(part, pin) for part in batch)
    if isinstance(batch, dict):
        return {name: as_tensors(part, pin) for name, part in batch.items()}
    if not isinstance(batch, np.ndarray | np.generic) or batch.dtype.kind not in "biufc":
        return batch
    array = np.asarray(batch)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()
    tensor = torch.from_dlpack(array)
    return tensor.pin_memory() if pin else tensor


class TorchBatches(torch_data.IterableDataset):  # type: ignore[misc]
    """Batches of tensors from a data source; iterate over it, or give it to ``DataLoader(ds, batch_size=None)``.

    Each ``iter()`` is the next epoch: `epoch` goes up by one, and with a seed as `shuffle` so does the order
    (:meth:`set_epoch` sets it). In a DataLoader with workers each of them prepares its share of the batches.
    `pin_memory`: None is where CUDA is there, and not in workers (let the DataLoader pin). `kwargs` go to the source's
    ``batch_iterator``: ``shuffle``, ``drop_last``, and so on.
    """

    def __init__(self, source: Any, batch_size: int, *, pin_memory: bool | None = None, **kwargs: Any) -> None:
        self.source, self.batch_size, self.pin_memory, self.kwargs = source, batch_size, pin_memory, kwargs
        self.epoch = int(kwargs.pop("epoch", 0))
        self._batches: Any = None

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next ``iter()`` gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        count = self.source.num_batches(self.batch_size, **self.kwargs)
        if count is None or np.isinf(count):
            raise TypeError("the number of batches of this source is not known, or it never ends.")
        return int(count)

    def __iter__(self) -> Iterator[Any]:
        kwargs = self._arguments()
        self.epoch += 1
        worker = torch_data.get_worker_info()
        if worker is not None and worker.num_workers > 1:
            return self._share(worker.id, worker.num_workers, kwargs)
        self._batches = self.source.batch_iterator(self.batch_size, **kwargs)
        return self._tensors(worker is None)

    def _arguments(self) -> dict[str, Any]:
        """What the source's iterator of the next epoch is asked for with."""
        kwargs = dict(self.kwargs)
        if isinstance(kwargs.get("shuffle"), int) and not isinstance(kwargs["shuffle"], bool):
            kwargs["epoch"] = self.epoch
        return kwargs

    def _tensors(self, may_pin: bool = True) -> Iterator[Any]:
        pin = self.pin_memory if self.pin_memory is not None else may_pin and torch.cuda.is_available()
        return (as_tensors(batch, pin) for batch in self._batches)

    def _share(self, worker: int, workers: int, kwargs: dict[str, Any]) -> Iterator[Any]:
        """Every `workers`-th batch. Only those are read where the source has access by index."""
        shuffle = kwargs.get("shuffle")
        if shuffle is True or not (shuffle is None or isinstance(shuffle, int)):
            raise ValueError(
                "in a DataLoader with several workers `shuffle` has to be a seed (an int): each worker has its own "
                "copy of a generator, and what they draw would not fit together."
            )
        if self.source.is_random_access:
            indices = self.source.batch_indices_iterator(self.batch_size, **kwargs)
            own = itertools.islice(indices, worker, None, workers)
            return (as_tensors(self.source.samples_by_indices_nomapping(part)) for part in own)
        batches = self.source.batch_iterator(self.batch_size, **kwargs)
        return (as_tensors(batch) for batch in itertools.islice(batches, worker, None, workers))

    def state_dict(self) -> dict[str, Any]:
        """The place of the newest iterator (without DataLoader workers); see ``BatchIterator.state_dict``."""
        batches, following = self._batches, self.epoch
        if batches is None:  # it is that of the one that ``iter()`` would give
            batches, following = self.source.batch_iterator(self.batch_size, **self._arguments()), self.epoch + 1
        return {"kind": "torch", "epoch": following, "source": batches.state_dict()}

    def resume(self, state: dict[str, Any]) -> Iterator[Any]:
        """An iterator over the batches that were left when the state was saved; the next ``iter()`` is a new epoch."""
        self.epoch = state["epoch"]
        self._batches = self.source.batch_iterator(self.batch_size, **self.kwargs)
        self._batches.load_state_dict(state["source"])
        return self._tensors()
