"""What a run over a data set has given so far, kept in a folder: one that was stopped or killed goes on from there.

::

    folder/
      lock           locked by the run that writes here, by nobody once that has ended
      0.npy 1.npy    what was given, joined along axis 0: one file for each result
      run            what the run is of, and how far it is (codec)

Results are appended to the files; from time to time those are synced to the disk, their headers set, and then `run` is
replaced by one that counts them. Whatever was written behind what `run` counts is cut off by whoever goes on. So a
result is there once, whenever and however the run ended, and no more of it is in memory than one batch.
"""

from __future__ import annotations

import ast
import fcntl
import math
import os
import time
from pathlib import Path
from typing import IO, Any, Final, Self

import numpy as np

from mlqueue import codec
from mlqueue.batch.errors import BatchError, StateError
from mlqueue.batch.reduction import same_number
from mlqueue.errors import DecodeError

__all__ = ["KeptRun"]

#: How often what was given is saved, in seconds; less often where that takes long.
SAVE_EVERY: Final = 1.0
#: At most this part of the time is spent on saving.
MOST_SAVING: Final = 0.1

#: Batches and samples, what they add up to, and the rows in each file.
_Noted = tuple[int, int, list[np.ndarray] | None, list[int]]

#: The version of the layout.
FORMAT: Final = 1


class KeptRun:
    """The folder of a run. A context manager: it is this process's until it is left.

    Parameters:
      folder: Where; made when it is not there.
      of: What the run is of: name and text of each part of that, for the error when it is another one.
    """

    def __init__(self, folder: str | os.PathLike[str], of: dict[str, str]) -> None:
        self.folder, self._of = Path(folder), of
        #: Whether it has come to its end.
        self.done = False
        #: The state of the iterator when it was saved last; None where it never was.
        self.state: dict[str, Any] | None = None
        self._noted: _Noted = 0, 0, None, []
        self._files: list[_Rows] = []
        self._lock: IO[bytes] | None = None
        self._saved, self._took = time.monotonic(), 0.0

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = (self.folder / "lock").open("ab")
        try:
            self._take_lock()
            self._load()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the folder. Saves nothing."""
        for rows in self._files:
            rows.file.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _take_lock(self) -> None:
        assert self._lock is not None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise BatchError(
                f"another process writes the run in {self.folder}; wait for it, or give another folder."
            ) from error

    def _load(self) -> None:
        try:
            found = codec.decode((self.folder / "run").read_bytes())
        except FileNotFoundError:
            return
        except DecodeError as error:
            raise StateError(
                f"{self.folder / 'run'} cannot be read; delete the folder to begin anew. {error}"
            ) from None
        if found["format"] != FORMAT:
            raise StateError(f"the run in {self.folder} is of another version of mlqueue; finish it with that.")
        self._compare(found["of"])
        self.state, self.done = found["state"], found["done"]
        for number, (dtype, shape, rows) in enumerate(found["files"]):
            known = np.lib.format.descr_to_dtype(ast.literal_eval(dtype))
            self._files.append(_Rows.reopen(self._path(number), known, tuple(shape), rows))
        self.note(found["batches"], found["samples"], found["sums"])

    def _compare(self, of: dict[str, str]) -> None:
        differing = [name for name in {**of, **self._of} if of.get(name) != self._of.get(name)]
        if differing:
            told = "; ".join(f"{name}: {of.get(name)} then, {self._of.get(name)} now" for name in differing)
            raise StateError(
                f"the run in {self.folder} was begun with something else ({told}). Give what it was begun with, or "
                "delete the folder to begin anew."
            )

    def _path(self, number: int) -> Path:
        return self.folder / f"{number}.npy"

    # --- what is given ---

    def append(self, arrays: list[np.ndarray]) -> None:
        """Add a batch's results: arrays of the dtypes and row shapes of those before. Else raises ValueError."""
        if not self._files:
            self._files = [_Rows.create(self._path(number), array) for number, array in enumerate(arrays)]
        same_number(len(self._files), len(arrays))
        for number, (rows, array) in enumerate(zip(self._files, arrays, strict=True)):
            if array.dtype != rows.dtype or array.shape[1:] != rows.shape:
                raise ValueError(
                    f"result {number} of this batch is of {array.dtype} {array.shape[1:]} a sample, those before are "
                    f"of {rows.dtype} {rows.shape}; return the same from every batch."
                )
        for rows, array in zip(self._files, arrays, strict=True):
            rows.append(array)

    def note(self, batches: int, samples: int, sums: list[np.ndarray] | None = None) -> None:
        """What was appended is that of so many batches and samples; `sums` is what they add up to."""
        # One assignment: whatever interrupts, it is noted as a whole or not at all.
        self._noted = batches, samples, sums, [rows.rows for rows in self._files]

    @property
    def batches(self) -> int:
        """How many batches lie behind."""
        return self._noted[0]

    @property
    def samples(self) -> int:
        """How many samples they had."""
        return self._noted[1]

    @property
    def sums(self) -> list[np.ndarray] | None:
        """What they add up to."""
        return self._noted[2]

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._saved > max(SAVE_EVERY, self._took / MOST_SAVING)

    def save(self, state: dict[str, Any] | None, *, done: bool = False) -> None:
        """Make what was noted last; `state` is that of the iterator behind it."""
        begun = time.monotonic()
        batches, samples, sums, counted = self._noted
        files = self._files[: len(counted)]
        for rows, count in zip(files, counted, strict=True):
            rows.sync(count)
        told = {
            "format": FORMAT,
            "of": self._of,
            "batches": batches,
            "samples": samples,
            "done": done,
            "state": state,
            "sums": sums,
            "files": [[repr(rows.descr), list(rows.shape), count] for rows, count in zip(files, counted, strict=True)],
        }
        new = self.folder / "run.new"
        with new.open("wb") as file:
            file.write(codec.encode(told))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.folder / "run")
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.state, self.done, self._saved = state, done, time.monotonic()
        self._took = self._saved - begun

    def arrays(self) -> tuple[np.ndarray, ...] | None:
        """All that was given, as read-only maps of the files; None when there was nothing."""
        return tuple([rows.mapped() for rows in self._files]) or None


class _Rows:
    """A .npy file that grows."""

    def __init__(self, file: IO[bytes], path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int) -> None:
        self.file, self.path, self.dtype, self.shape, self.rows = file, path, dtype, shape, rows

    @classmethod
    def create(cls, path: Path, array: np.ndarray) -> _Rows:
        """For rows as those of an array."""
        if array.dtype.hasobject:
            raise TypeError(f"arrays of {array.dtype} hold Python objects, which cannot be kept; return plain arrays.")
        made = cls(path.open("wb+"), path, array.dtype, array.shape[1:], 0)
        made._write_header(0)
        return made

    @classmethod
    def reopen(cls, path: Path, dtype: np.dtype[Any], shape: tuple[int, ...], rows: int) -> _Rows:
        """The file with so many rows; what lies behind them is cut off. Raises StateError where there are fewer."""
        try:
            made = cls(path.open("rb+"), path, dtype, shape, rows)
        except FileNotFoundError:
            raise StateError(f"{path} is gone; delete the folder to begin anew.") from None
        length = made._write_header(rows) + rows * made._row_bytes
        present = os.fstat(made.file.fileno()).st_size
        if present < length:
            made.file.close()
            raise StateError(
                f"{path} is cut short: {present:,} bytes, not {length:,}; delete the folder to begin anew."
            )
        made.file.truncate(length)
        made.file.seek(length)
        return made

    @property
    def descr(self) -> Any:
        """The dtype as .npy files have it."""
        return np.lib.format.dtype_to_descr(self.dtype)

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def _write_header(self, rows: int) -> int:
        """Write it; its length. numpy leaves room in it for any number of rows."""
        self.file.seek(0)
        header = {"descr": self.descr, "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_2_0(self.file, header)
        return self.file.tell()

    def append(self, array: np.ndarray) -> None:
        self.file.write(array.tobytes())
        self.rows += len(array)

    def sync(self, rows: int) -> None:
        """Have the disk hold what was written, and the header count so many rows."""
        self._write_header(rows)
        self.file.seek(0, os.SEEK_END)
        self.file.flush()
        os.fsync(self.file.fileno())

    def mapped(self) -> np.ndarray:
        mapped: np.ndarray = np.load(self.path, mmap_mode="r" if self.rows * self._row_bytes else None)
        mapped.flags.writeable = False
        return mapped
