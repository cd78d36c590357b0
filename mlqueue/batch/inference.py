"""A function applied to a whole data set by the workers of a pool: :meth:`ActorPool.map_concat` and ``map_mean``.

The batches are those of the pool's data sources: leases that any worker takes, given again when one dies, each result
taken once and in order. A run may be kept in a folder (:mod:`mlqueue.batch.kept`) and goes on from there.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Generator
from itertools import repeat
from typing import Any

import dramatiq
import numpy as np

from mlqueue.app import MLQ
from mlqueue.batch.applied import Applied, BatchFunction, function_of
from mlqueue.batch.data_source import AbstractDataSource, check_source
from mlqueue.batch.identity import name_of, version_of
from mlqueue.batch.kept import KeptRun
from mlqueue.batch.reduction import as_first, same_number
from mlqueue.batch.work_pool import AbstractWorkerPool, ParallelIterator

__all__ = ["Run", "batch_function"]

logger = logging.getLogger("mlqueue.batches")

Progress = Callable[..., Any]


def batch_function(mlq: MLQ, actor: Any, prepend_args: tuple[Any, ...] | None, **more: Any) -> BatchFunction:
    """The function of an actor (or of the actor of this name), or a function that is sent as it is."""
    first = as_first(prepend_args)
    if isinstance(actor, str):
        declared = mlq.broker.actors.get(actor)
        return BatchFunction(
            None if declared is None else _plain(function_of(declared), actor), actor, first=first, **more
        )
    if isinstance(actor, dramatiq.Actor):
        if mlq.broker.actors.get(actor.actor_name) is not actor:
            raise ValueError(
                f"the actor {actor.actor_name!r} is not one of the pool's app; its workers do not have it."
            )
        return BatchFunction(_plain(function_of(actor), actor.actor_name), actor.actor_name, first=first, **more)
    if callable(actor):
        return BatchFunction(_plain(actor, repr(actor)), None, first=first, **more)
    raise TypeError(f"an actor, the name of one, or a function is needed, got a {type(actor).__name__}.")


def _plain(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(inspect.unwrap(function)):
        raise TypeError(f"{name} is async; workers apply plain functions to batches.")
    return function


class Run:
    """One way through a data set.

    Parameters:
      mlq, pool: An app and its pool of actors.
      source: A data source with access by index.
      function: What is done with each batch.
      batch_size, n_batches, kwargs: As for the source's own ``batch_map_concat``.
      buffer: How many batches are under way at a time.
      progress: ``progress(iterator, total=, leave=False)``, as tqdm.
      folder: Where the run is kept; None for nowhere.
    """

    def __init__(
        self,
        mlq: MLQ,
        pool: AbstractWorkerPool,
        source: AbstractDataSource,
        function: BatchFunction,
        batch_size: int,
        *,
        n_batches: int | None,
        buffer: int,
        progress: Progress | None,
        folder: str | os.PathLike[str] | None,
        kwargs: dict[str, Any],
    ) -> None:
        if n_batches is not None and n_batches < 0:
            raise ValueError(f"n_batches must not be negative, got {n_batches}.")
        self._source, self._function, self._named = check_source(source), function, mlq.sources
        self._batches = pool.parallel_data_source(Applied(source, function), buffer, copy=False)
        self._batch_size, self._most, self._kwargs = batch_size, n_batches, kwargs
        self._progress, self._folder = progress, folder
        self._total = source._total_batches(batch_size, n_batches, kwargs)
        self._sums: list[np.ndarray] | None = None
        self._samples = 0

    def concatenated(self) -> tuple[np.ndarray, ...] | None:
        """What the function gave, joined along axis 0; kept in a folder, as read-only maps of its files."""
        if self._folder is not None:
            with KeptRun(self._folder, self._of()) as kept:
                self._samples = kept.samples
                self._go(kept, kept.append)
                return kept.arrays()
        parts: list[list[np.ndarray]] = []

        def add(arrays: list[np.ndarray]) -> None:
            if not parts:
                parts.extend([] for _ in arrays)
            same_number(len(parts), len(arrays))
            for part, array in zip(parts, arrays, strict=True):
                part.append(array.copy())

        self._go(None, add)
        return tuple([np.concatenate(part, axis=0) for part in parts]) or None

    def mean(self) -> tuple[Any, ...] | None:
        """The sums that the function gave, divided by the number of samples."""
        if self._folder is None:
            self._go(None, self._add_up)
        else:
            with KeptRun(self._folder, self._of()) as kept:
                self._sums, self._samples = kept.sums, kept.samples
                self._go(kept, self._add_up)
        if self._sums is None:
            return None
        return tuple([np.float64(s / self._samples) if s.ndim == 0 else s / self._samples for s in self._sums])

    def _add_up(self, terms: list[np.ndarray]) -> None:
        if self._sums is None:
            self._sums = [np.zeros_like(term) for term in terms]
        same_number(len(self._sums), len(terms))
        self._sums = [so_far + term for so_far, term in zip(self._sums, terms, strict=True)]

    def _go(self, kept: KeptRun | None, add: Callable[[list[np.ndarray]], None]) -> None:
        """Go through what is left, to the end."""
        steps = self._steps(kept, add)
        try:
            for _ in steps if self._progress is None else self._progress(steps, total=self._total, leave=False):
                pass
        finally:
            steps.close()  # a bar that ends early leaves it open

    def _steps(self, kept: KeptRun | None, add: Callable[[list[np.ndarray]], None]) -> Generator[None]:
        """Does a batch at each step, after a step for each that was done before."""
        yield from repeat(None, 0 if kept is None else kept.batches)
        if kept is not None and kept.done:
            return
        state = None if kept is None else kept.state
        with self._batches.resume(state, self._batch_size, self._most, **self._kwargs) as batches:
            if kept is None:
                for length, arrays in batches:
                    self._take(length, arrays, add)
                    yield
                return
            if kept.state is None:
                kept.save(batches.state_dict())  # raises at once where there are no states
            try:
                for length, arrays in batches:
                    self._take(length, arrays, add)
                    self._note(kept, batches)
                    if kept.is_due:
                        kept.save(batches.state_dict())
                    yield
                self._note(kept, batches)
            except BaseException:
                # Also GeneratorExit. What the batch that failed would have given is not there: it is done again.
                self._save_at_last(kept, batches)
                raise
        kept.save(None, done=True)

    def _take(self, length: int, arrays: list[np.ndarray] | None, add: Callable[[list[np.ndarray]], None]) -> None:
        if arrays is not None:
            add(arrays)
        self._samples += length

    def _note(self, kept: KeptRun, batches: ParallelIterator) -> None:
        kept.note(batches.given, self._samples, self._sums)

    def _save_at_last(self, kept: KeptRun, batches: ParallelIterator) -> None:
        try:
            kept.save(batches.state_at(kept.batches))
        except Exception as error:  # noqa: BLE001 - the one that ends the run is the one to be told
            logger.warning("the run in %s goes on from its last save: %s: %s", kept.folder, type(error).__name__, error)

    # --- what it is ---

    def _of(self) -> dict[str, str]:
        """What the run is of, in words: whoever goes on has to have the same."""
        function = self._function
        order = [
            f"{name}={value if isinstance(value, bool | int) else type(value).__name__}"
            for name, value in sorted(self._kwargs.items())
        ]
        return {
            "source": name_of(self._source),
            "version of the source": version_of(self._source, self._named),
            "batch size": str(self._batch_size),
            "number of batches": "all" if self._most is None else str(self._most),
            "order": ", ".join(order) or "its own",
            "function": function.name or getattr(function.fn, "__qualname__", type(function.fn).__name__),
            "version of the function": function.version,
            "prepend_args": version_of(function.first, self._named),
            "results": f"sums, axis {function.axis}" if function.sums else "arrays",
        }
