"""Applying a function to every batch and joining, or averaging, what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from mlqueue.batch.iteration import batch_length

__all__ = ["batch_map_concat", "batch_map_mean"]

Progress = Callable[..., Any]


def batch_map_concat(
    func: Callable[..., Any],
    batch_iter: Iterator[Any],
    progress_iter_func: Progress | None = None,
    n_batches: int | None = None,
    prepend_args: tuple[Any, ...] | None = None,
    *,
    total: int | None = None,
) -> tuple[np.ndarray, ...] | None:
    """Apply `func` to every batch and concatenate what it returns along axis 0.

    `func(*prepend_args, *batch)` (the batch as one argument where it is a dict) returns an array, a tuple or list of
    arrays, or None for a batch to be left out. `progress_iter_func(iterator, total=, leave=False)`: tqdm, or anything
    that is called like it. `n_batches`: stop after so many; the iterator then stands just behind them.

    Returns a tuple with one array for each that `func` returns; None when nothing was returned at all.
    Raises TypeError for another kind of result, ValueError when batches give different numbers of arrays or 0-d ones.
    """
    parts: list[list[np.ndarray]] | None = None
    for _, results in _results(func, batch_iter, progress_iter_func, n_batches, prepend_args, total):
        arrays = [as_array(result) for result in results]
        if parts is None:
            parts = [[] for _ in arrays]
        same_number(len(parts), len(arrays))
        for part, array in zip(parts, arrays, strict=True):
            part.append(array)
    return tuple(np.concatenate(part, axis=0) for part in parts) if parts is not None else None


def batch_map_mean(
    func: Callable[..., Any],
    batch_iter: Iterator[Any],
    progress_iter_func: Progress | None = None,
    sum_axis: int | tuple[int, ...] | None = None,
    n_batches: int | None = None,
    prepend_args: tuple[Any, ...] | None = None,
    *,
    total: int | None = None,
) -> tuple[Any, ...] | None:
    """Apply `func` to every batch and average what it returns over all samples.

    `func` returns, for its batch, the **sum** over the samples (a number or an array), or a tuple or list of such, or
    None; with `sum_axis` it returns values a sample, that are summed over that axis. The sums are added in float64 and
    divided by the number of samples; batches for which it returned None count too. The other arguments are those of
    :func:`batch_map_concat`. Returns a tuple of float64, numbers or arrays; None when nothing was returned at all.
    """
    sums: list[np.ndarray] = []
    n_samples = 0
    for batch, results in _results(func, batch_iter, progress_iter_func, n_batches, prepend_args, total, nones=True):
        n_samples += batch_length(batch)
        if results is None:
            continue
        terms = [as_sum(result, sum_axis) for result in results]
        if not sums:
            sums = [np.zeros_like(term) for term in terms]
        same_number(len(sums), len(terms))
        sums = [so_far + term for so_far, term in zip(sums, terms, strict=True)]
    return tuple(np.float64(s / n_samples) if s.ndim == 0 else s / n_samples for s in sums) if sums else None


def _results(
    func: Callable[..., Any],
    batches: Iterator[Any],
    progress: Progress | None,
    n_batches: int | None,
    prepend_args: tuple[Any, ...] | None,
    total: int | None,
    nones: bool = False,
) -> Iterator[tuple[Any, Any]]:
    """Each batch with the results of func as a sequence; those that are None only where `nones` asks for them."""
    first = as_first(prepend_args)
    if n_batches is not None:
        if not n_batches >= 0:
            raise ValueError(f"n_batches must not be negative, got {n_batches}.")
        # A part of a batch counts as one: what is asked for may be the number of samples over the batch size.
        most = None if np.isinf(n_batches) else math.ceil(n_batches)
        batches, total = islice(batches, most), most
    if progress is not None:
        batches = progress(batches, total=total, leave=False)
    for batch in batches:
        result = func(*first, batch) if isinstance(batch, dict) else func(*first, *batch)
        if result is None:
            if nones:
                yield batch, None
        elif isinstance(result, tuple | list):
            yield batch, result
        elif isinstance(result, np.generic) and not nones:
            raise TypeError(
                f"the function must return arrays, a tuple of them, or None; got a single {type(result).__name__}."
            )
        else:
            yield batch, (result,)


def as_first(prepend_args: tuple[Any, ...] | None) -> tuple[Any, ...]:
    """The arguments before those of the batch. Raises TypeError for anything but a tuple or None."""
    if prepend_args is None or isinstance(prepend_args, tuple):
        return prepend_args or ()
    raise TypeError(
        f"prepend_args must be a tuple of the arguments to give first, got a {type(prepend_args).__name__}: "
        "for a single one write (x,)."
    )


def as_array(result: Any) -> np.ndarray:
    """A result that is to be joined with those of other batches. Raises TypeError or ValueError where it cannot be."""
    if isinstance(result, list):
        result = np.asarray(result)
    if not isinstance(result, np.ndarray | np.generic):
        raise TypeError(f"the function must return arrays, a tuple of them, or None; got a {type(result).__name__}.")
    if not isinstance(result, np.ndarray) or result.ndim == 0:
        raise ValueError(
            f"the function returned a single {result.dtype} without dimensions, which cannot be concatenated; return "
            "an array with a row for each sample, or use batch_map_mean."
        )
    return result


def as_sum(result: Any, axis: int | tuple[int, ...] | None) -> np.ndarray:
    """The sum over the samples of a batch, as float64. Raises TypeError, or ValueError, for what is none."""
    if not isinstance(result, np.ndarray | np.generic | int | float):
        raise TypeError(
            f"the function must return numbers or arrays, a tuple of them, or None; got a {type(result).__name__}."
        )
    if axis is not None:
        if np.ndim(result) == 0:
            raise ValueError(
                f"sum_axis={axis} needs an array with a value for each sample, but the function returned a number; "
                "return the values, or the sum without sum_axis."
            )
        return np.asarray(np.sum(result, axis=axis, dtype=np.float64))
    return np.array(result, np.float64)


def same_number(before: int, now: int) -> None:
    """Raises ValueError unless batches give the same number of results."""
    if before != now:
        raise ValueError(f"the function returned {before} results for the batches before, and {now} for this one.")
