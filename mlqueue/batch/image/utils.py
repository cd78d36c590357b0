"""Images stored in 8 bits, read as floating point."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mlqueue.batch.rows import as_rows

__all__ = ["ImageArrayUInt8ToFloat32"]


class ImageArrayUInt8ToFloat32:
    """A read-only array of float32 over one of uint8: 0 becomes ``val_lower`` and 255 ``val_upper``.

    Values are converted when they are indexed, so that the whole needs no more memory than its bytes. Indexing gives
    a new array each time, whatever the index, and so does ``np.asarray``, which converts everything.

    Parameters
    ----------
    arr_u8:
        Any array-like of uint8: it has ``__len__`` and ``__getitem__`` and, best, ``shape`` (a numpy array, a memory
        map, a node of an HDF5 file).
    val_lower, val_upper:
        The ends of the range of the values, by default 0 and 1.
    """

    def __init__(self, arr_u8: Any, val_lower: float = 0.0, val_upper: float = 1.0) -> None:
        #: The array-like of uint8 underneath.
        self.arr_u8 = arr_u8
        #: What is added to each scaled value, float32.
        self.offset = np.float32(val_lower)
        #: What each byte is multiplied with, float32.
        self.scale = np.float32((val_upper - val_lower) / 255.0)
        #: float32, whatever is underneath.
        self.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array underneath; ``AttributeError`` when it has none."""
        return tuple(self.arr_u8.shape)

    @property
    def ndim(self) -> int:
        """The number of dimensions of the array underneath; ``AttributeError`` when it has no shape."""
        return len(self.shape)

    def __len__(self) -> int:
        return len(self.arr_u8)

    def __repr__(self) -> str:
        upper = self.offset + self.scale * np.float32(255)
        return f"{type(self).__name__}({self.arr_u8!r}, {self.offset:g}, {upper:g})"

    def __getitem__(self, index: Any) -> Any:
        return self._convert(as_rows(self.arr_u8)[index])

    def take(
        self, indices: npt.ArrayLike, axis: int = 0, out: npt.NDArray[Any] | None = None, mode: str = "raise"
    ) -> npt.NDArray[np.float32]:
        """The rows ``indices``, as ``numpy.take`` along axis 0: into ``out`` (float32) when it is given."""
        if axis != 0:
            raise ValueError(f"take gathers rows, along axis 0, not {axis}; index instead")
        if hasattr(self.arr_u8, "take"):
            rows = self.arr_u8.take(indices, axis=0, mode=mode)
        else:
            rows = as_rows(self.arr_u8)[_resolve(np.asarray(indices), len(self), mode)]
        converted: npt.NDArray[np.float32] = self._convert(rows, out)
        return converted

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            raise ValueError("the values are converted, which makes a new array; copy=False cannot be had")
        everything: npt.NDArray[Any] = np.asarray(self[:])
        return everything if dtype is None else everything.astype(dtype, copy=False)

    def _convert(self, values: Any, out: npt.NDArray[Any] | None = None) -> Any:
        # One pass that casts as it multiplies and one in place: the same roundings as values.astype(float32) * scale
        # + offset, without its two temporary arrays.
        result = np.multiply(values, self.scale, out=out, dtype=np.float32)
        if self.offset != 0:
            if np.ndim(result) == 0 and out is None:
                return result + self.offset
            result += self.offset
        return result


def _resolve(indices: npt.NDArray[Any], length: int, mode: str) -> npt.NDArray[Any]:
    """``indices`` as ``numpy.take`` understands them in ``mode``."""
    if mode == "clip":
        indices = np.clip(indices, 0, length - 1)
    return indices % length if mode == "wrap" else indices
