"""Samples to batches: stacking, and padding what is ragged."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np

__all__ = ["collate", "pad", "pad_collate"]


def collate(samples: Sequence[Any]) -> Any:
    """A batch of samples, which are tuples (or lists), dicts, or lone values; their parts are stacked along axis 0.

    Tuples give a tuple of arrays, dicts a dict, lone values a tuple of one array. Raises ValueError where a part has
    different shapes: :func:`pad_collate` is for those.
    """
    return assemble(samples, lambda parts, _: stack(parts))


def pad_collate(
    value: Any = 0, multiple_of: int = 1, max_length: int | None = None, lengths: bool = True
) -> Callable[[Sequence[Any]], Any]:
    """A collate function that pads the parts of different lengths (axis 0) of a batch with `value`.

    `multiple_of`, `max_length`: see :func:`pad`. `lengths`: each part that is padded is followed by the lengths that
    its samples had (1-D int64), under the name ``<name>_length`` in a dict. A part is padded if it has axes: scalars
    are stacked.
    """
    return partial(_pad_samples, options=(value, multiple_of, max_length), with_lengths=lengths)


def pad(
    arrays: Iterable[Any], value: Any = 0, multiple_of: int = 1, max_length: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One array of shape (n, longest, ...) from n arrays of shapes (length, ...), and their lengths (n, int64).

    `longest` is rounded up to a multiple of `multiple_of`; arrays longer than `max_length` are cut to it. The places
    behind an array hold `value`. Raises ValueError where the other axes differ.
    """
    parts = [np.asarray(array) for array in arrays]
    if not parts:
        raise ValueError("there is nothing to pad: give at least one array.")
    if max_length is not None and max_length < 0:
        raise ValueError(f"max_length must not be negative, got {max_length}.")
    if multiple_of < 1:
        raise ValueError(f"multiple_of must be at least 1, got {multiple_of}.")
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1 or any(part.ndim == 0 for part in parts):
        raise ValueError(f"only the first axis may differ; got the shapes {sorted({part.shape for part in parts})}.")
    parts = [part[:max_length] for part in parts]
    lengths = np.array([len(part) for part in parts], np.int64)
    longest = -(-int(lengths.max()) // multiple_of) * multiple_of
    out = np.full((len(parts), longest, *shapes.pop()), value, np.result_type(*parts))
    for row, part in zip(out, parts, strict=True):
        row[: len(part)] = part
    return out, lengths


def stack(parts: Sequence[Any]) -> np.ndarray:
    arrays = [np.asarray(part) for part in parts]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise ValueError(
            f"the samples have different shapes, {sorted(shapes)[:4]}, and cannot be stacked; pad them: "
            "collate=pad_collate(), or make them alike in the source."
        )
    return np.stack(arrays)


def assemble(samples: Sequence[Any], join: Callable[[list[Any], Any], Any]) -> Any:
    """Take samples apart, join each part, and put the batch together. `join` is told the name of the part too."""
    if not samples:
        raise ValueError("a batch of no samples has no shape; give at least one.")
    first = samples[0]
    if isinstance(first, dict):
        for sample in samples:
            if sample.keys() != first.keys():
                raise ValueError(f"the samples have different names: {sorted(first)} and {sorted(sample)}.")
        return {name: join([sample[name] for sample in samples], name) for name in first}
    if isinstance(first, tuple | list):
        for sample in samples:
            if not isinstance(sample, tuple | list) or len(sample) != len(first):
                parts = len(sample) if isinstance(sample, tuple | list) else f"a {type(sample).__name__}"
                raise ValueError(f"the samples must have as many parts each: one has {len(first)}, another {parts}.")
        return tuple(join(list(parts), number) for number, parts in enumerate(zip(*samples, strict=True)))
    return (join(list(samples), 0),)


def _pad_samples(samples: Sequence[Any], options: tuple[Any, int, int | None], with_lengths: bool) -> Any:
    def join(parts: list[Any], _: Any) -> list[np.ndarray]:
        if np.ndim(parts[0]) == 0:
            return [stack(parts)]
        padded, lengths = pad(parts, *options)
        return [padded, lengths] if with_lengths else [padded]

    batch = assemble(samples, join)
    if isinstance(batch, dict):
        names = {name: [name, f"{name}_length"] for name in batch}
        taken = [name for name, parts in batch.items() if len(parts) == 2 and f"{name}_length" in batch]
        if taken:
            raise ValueError(
                f"the lengths of {taken[0]!r} need the name '{taken[0]}_length', which the samples have already; "
                "rename that, or pad_collate(lengths=False)."
            )
        return {label: part for name in batch for label, part in zip(names[name], batch[name], strict=False)}
    return tuple(part for parts in batch for part in parts)
