"""A function applied to every batch of a data source where the batches are prepared: in the workers of a pool.

What it returns is checked there, so that an error names the batch and has the worker's traceback, and travels as a
batch does: arrays as their bytes, nothing pickled.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mlqueue import codec
from mlqueue.batch.data_source import AbstractDataSource, MapDataSource
from mlqueue.batch.errors import BatchError
from mlqueue.batch.iteration import batch_length
from mlqueue.batch.reduction import as_array, as_sum
from mlqueue.named import code_digest

__all__ = ["Applied", "BatchFunction", "function_of"]


class BatchFunction:
    """What is done with each batch: ``fn(*first, *batch)``, of which arrays are to be joined or sums to be added.

    Called with a batch it gives ``(number of samples, results)``: a list of arrays, or None where the function returned
    None.

    Parameters:
      fn: The function; None where only workers have it.
      name: The actor whose function it is, by which workers find it; None where the function itself is sent.
      first: What it is given before the arrays of the batch.
      sums: Whether results are sums over the samples (or values to be summed over `axis`), not arrays to be joined.
      axis: What results are summed over, as ``numpy.sum`` has it.
    """

    def __init__(
        self,
        fn: Callable[..., Any] | None,
        name: str | None,
        *,
        first: Sequence[Any] = (),
        sums: bool = False,
        axis: int | Sequence[int] | None = None,
    ) -> None:
        self.fn, self.name, self.first, self.sums = fn, name, tuple(first), sums
        self.axis: int | tuple[int, ...] | None = axis if isinstance(axis, int | None) else tuple(axis)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the function: a map asks it for ``rng`` and ``empty``."""
        return inspect.Signature() if self.fn is None else inspect.signature(self.fn)

    @property
    def version(self) -> str:
        """What is the same for the same code, that of decorators too; empty where the code is not here."""
        layers, layer = [], self.fn
        while layer is not None:
            layers.append(code_digest(layer))
            layer = getattr(layer, "__wrapped__", None)
        return "/".join(layers)

    def described(self) -> bytes:
        """What a worker needs to know of it, for the function of an actor."""
        more = {"first": list(self.first), "sums": self.sums, "axis": self.axis}
        return codec.encode([self.name, self.version, more], path="prepend_args")

    def __call__(self, *batch: Any, **given: Any) -> tuple[int, list[np.ndarray] | None]:
        if self.fn is None:
            raise BatchError(f"no worker prepares batches, and the actor {self.name!r} is not declared here.")
        length = batch_length(batch)
        result = self.fn(*self.first, *batch, **given)
        if result is None:
            return length, None
        results = result if isinstance(result, tuple | list) else (result,)
        return length, [as_sum(part, self.axis) if self.sums else as_array(part) for part in results]


def function_of(actor: Any) -> Callable[..., Any]:
    """An actor's function as it was declared: the app has it store its result, which is nothing for batches."""
    function: Callable[..., Any] = vars(actor.fn).get("__wrapped__", actor.fn)
    return function


class Applied(MapDataSource):
    """The source of what a :class:`BatchFunction` gives for each batch of another."""

    def __init__(self, source: AbstractDataSource, function: BatchFunction) -> None:
        super().__init__(source, function)
        self.function = function
