"""Sources over samples that are read one at a time: data sets of torch and Hugging Face, folders of images, tables.

What stands in the way of reading a sample is dealt with by a policy: see :class:`SampleDataSource`.
"""

from __future__ import annotations

import importlib
import io
import os
import tarfile
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlqueue.batch import skips
from mlqueue.batch.collate import collate as stack_samples
from mlqueue.batch.data_source import CallableDataSource, RandomAccessDataSource, as_positions, own_indices
from mlqueue.batch.errors import SampleError, TooManySkips
from mlqueue.batch.order import check_batch_size
from mlqueue.batch.rows import HDF5Rows, as_rows, from_the_front
from mlqueue.errors import MissingDependency

__all__ = [
    "ImageFolder",
    "ParquetRows",
    "SampleDataSource",
    "SkippedSample",
    "TableDataSource",
    "image_folder",
    "iterable_source",
    "parquet_source",
    "read_image",
    "table_source",
    "webdataset_source",
]

#: Of the files of a folder, so many are looked at to see whether another host has the same.
LOOKED_AT = 64
#: The endings of files that are taken for images.
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True)
class SkippedSample:
    """A sample that was left out because it could not be read."""

    #: Its position in the source.
    index: int
    #: The class and the text of the exception.
    error: str


class SampleDataSource(RandomAccessDataSource):
    """Batches of the samples of anything with ``__len__`` and ``__getitem__(int)``: a map-style Dataset of torch, a
    Dataset of Hugging Face, a sequence, a class of your own. Neither package is imported.

    `collate`: makes a batch of a list of samples; the default stacks tuples, dicts or lone values, and
    :func:`~mlqueue.batch.collate.pad_collate` pads what is ragged. Where the data set has ``__getitems__(indices)`` it
    is asked for a whole batch at once, unless `errors` is other than ``"raise"``.

    `errors`: what to do when a sample cannot be read (an ``Exception``): ``"raise"`` a
    :class:`~mlqueue.batch.errors.SampleError` with its index; ``"retry"`` it `retries` times, then raise; ``"skip"`` it
    after `retries` tries: the batch is then shorter, and the sample is noted in :attr:`skipped`, also when workers of a
    pool read it. More than `max_skips` skipped samples, or a batch of which
    none is left, raise :class:`~mlqueue.batch.errors.TooManySkips`. The other arguments are those of
    :class:`~mlqueue.batch.data_source.RandomAccessDataSource`.
    """

    def __init__(
        self,
        samples: Any,
        collate: Callable[[list[Any]], Any] = stack_samples,
        errors: str = "raise",
        retries: int | None = None,
        max_skips: int | None = None,
        **kwargs: Any,
    ) -> None:
        if errors not in ("raise", "skip", "retry"):
            raise ValueError(f"errors must be 'raise', 'skip' or 'retry', got {errors!r}.")
        for name, number in (("retries", retries), ("max_skips", max_skips)):
            if number is not None and number < 0:
                raise ValueError(f"{name} must not be negative, got {number}.")
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise TypeError(
                f"samples need a length and [], which a {type(samples).__name__} has not; what can only be iterated "
                "over is read by iterable_source()."
            )
        super().__init__(len(samples), **kwargs)
        self.samples, self.collate, self.errors, self.max_skips = samples, collate, errors, max_skips
        self.retries = retries if retries is not None else 2 if errors == "retry" else 0
        #: The samples that could not be read, each once, in the order in which that was seen.
        self.skipped: list[SkippedSample] = []
        self._lock = threading.Lock()
        self._number = skips.register(self)

    def __getstate__(self) -> dict[str, Any]:
        # What was skipped is known to the source here; a copy, as those in workers, begins with nothing.
        return {**{name: value for name, value in self.__dict__.items() if name != "_lock"}, "skipped": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def samples_by_indices_nomapping(self, indices: Any) -> Any:
        wanted = [int(index) for index in np.atleast_1d(as_positions(indices, self.length))]
        if self.errors == "raise" and not self.retries and hasattr(self.samples, "__getitems__"):
            return self._batch(self.samples.__getitems__(wanted), wanted)
        read = [(index, sample) for index in wanted for sample in self._read(index)]
        if wanted and not read:
            raise TooManySkips(f"none of the {len(wanted)} samples of a batch could be read: {self.skipped[-1].error}")
        return self._batch([sample for _, sample in read], [index for index, _ in read])

    def _batch(self, samples: list[Any], indices: list[int]) -> Any:
        batch = self.collate(samples)
        if not self.include_indices:
            return tuple(batch) if isinstance(batch, list) else batch
        numbers = np.array(indices, np.intp)
        return {"indices": numbers, **batch} if isinstance(batch, dict) else (numbers, *batch)

    def _read(self, index: int) -> list[Any]:
        """The sample, in a list; an empty one where it was skipped."""
        for attempt in range(1, self.retries + 2):
            try:
                return [self.samples[index]]
            except Exception as error:
                if attempt <= self.retries:
                    continue
                if self.errors != "skip":
                    raise SampleError(
                        f"sample {index} could not be read (tries: {attempt}): {type(error).__name__}: {error}. "
                        "errors='skip' leaves such samples out.",
                        index=index,
                        attempts=attempt,
                    ) from error
                self._skip(index, attempt, error)
        return []

    def _skip(self, index: int, attempts: int, error: Exception) -> None:
        text = f"{type(error).__name__}: {error}"
        skips.note(self._number, index, text)
        self.note_skipped(index, text, attempts, error)

    def note_skipped(self, index: int, error: str, attempts: int = 0, cause: Exception | None = None) -> None:
        """Adds a sample to `skipped`, unless it is there. Raises `TooManySkips` when there are too many."""
        with self._lock:
            if all(skipped.index != index for skipped in self.skipped):
                self.skipped.append(SkippedSample(index, error))
            if self.max_skips is not None and len(self.skipped) > self.max_skips:
                raise TooManySkips(
                    f"{len(self.skipped)} samples could not be read, more than max_skips={self.max_skips}; the last "
                    f"was sample {index}: {error}",
                    index=index,
                    attempts=attempts,
                ) from cause


class ImageFolder:
    """The images below a folder whose sub-folders are the classes: samples (image, class).

    ``images[i]`` is (uint8 array of shape (3, height, width), np.int32 class). `size`: (height, width) to which images
    are scaled; without it they keep their own. `read`: a function of a path that gives the image instead.
    Attributes: `paths`, `y` (int32), `class_names` (sorted). Reading needs Pillow.
    """

    def __init__(
        self,
        root: str | Path,
        size: tuple[int, int] | None = None,
        read: Callable[[Path], Any] | None = None,
        suffixes: Sequence[str] = IMAGE_SUFFIXES,
    ) -> None:
        if size is not None and (np.shape(size) != (2,) or min(size) < 1):
            raise ValueError(f"size must be (height, width), both at least 1, got {size!r}.")
        self.root, self.size, self._reader = Path(root), size, read
        self.class_names = sorted(folder.name for folder in self.root.iterdir() if folder.is_dir())
        endings = tuple(suffix.lower() for suffix in suffixes)
        self.paths: list[Path] = []
        labels: list[int] = []
        for label, name in enumerate(self.class_names):
            files = sorted(path for path in (self.root / name).rglob("*") if path.name.lower().endswith(endings))
            self.paths += files
            labels += [label] * len(files)
        if not self.paths:
            raise ValueError(
                f"there is no image in {self.root}: it has to have a folder for each class, with files that end in "
                f"{', '.join(endings)}."
            )
        self.y = np.array(labels, np.int32)

    def __getstate__(self) -> dict[str, Any]:
        # The paths alone, and those below the folder without it; whoever reads may have another working directory.
        root = str(self.root.absolute())
        names = [str(path.absolute()).removeprefix(root + os.sep) for path in self.paths]
        return {**self.__dict__, "root": root, "paths": names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.root = Path(state["root"])
        self.paths = [self.root / name for name in state["paths"]]

    def backing_files(self) -> list[str]:
        """Some of the files, evenly spread: by them another host sees whether it has the same folder."""
        places = np.linspace(0, len(self.paths) - 1, min(LOOKED_AT, len(self.paths)))
        return [str(self.paths[round(place)]) for place in places]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Any, np.int32]:
        path = self.paths[index]
        image = read_image(path, self.size) if self._reader is None else self._reader(path)
        return image, self.y[index]


def image_folder(root: str | Path, size: tuple[int, int], **kwargs: Any) -> SampleDataSource:
    """A source over an :class:`ImageFolder`: batches (uint8 (n, 3, height, width), int32 (n,)).

    `kwargs` go to :class:`SampleDataSource` (``errors="skip"`` ...).
    """
    return SampleDataSource(ImageFolder(root, size), **kwargs)


def read_image(path: str | Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image file as a uint8 array of shape (3, height, width), RGB. `size`: (height, width) to scale it to."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise MissingDependency("reading images needs Pillow: pip install pillow") from error
    # Read at once: Pillow asks for a file piece by piece, and threads wait for Python's global lock after each.
    content = io.BytesIO(Path(path).read_bytes())
    try:
        opened = Image.open(content)
    except UnidentifiedImageError:
        raise UnidentifiedImageError(f"{path} is no image that Pillow can read.") from None
    with opened as image:
        if size is not None:
            # Decodes a JPEG at a fraction of its size where that is enough; does nothing for other formats.
            image.draft("RGB", (size[1], size[0]))
        pixels = image if image.mode == "RGB" else image.convert("RGB")
        if size is not None and pixels.size != (size[1], size[0]):
            pixels = pixels.resize((size[1], size[0]), Image.Resampling.BILINEAR)
        return np.ascontiguousarray(np.asarray(pixels).transpose(2, 0, 1))


class TableDataSource(RandomAccessDataSource):
    """Batches of the rows of a table, a record array or anything that gives rows with named fields.

    `columns`: the names to take; all where it is None. Batches are dicts of arrays.
    """

    def __init__(self, rows: Any, columns: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(len(rows), **kwargs)
        self.rows = as_rows(rows)
        names = list(self.rows.dtype.names or ())
        self.columns = names if columns is None else list(columns)
        unknown = [name for name in self.columns if name not in names]
        if unknown or not names:
            raise ValueError(f"the table has no column {unknown[:1] or ''}; it has {names}.")

    def samples_by_indices_nomapping(self, indices: Any) -> Any:
        indices = as_positions(indices, self.length)
        rows = self.rows[np.asarray(indices, np.intp)]
        batch = {name: np.ascontiguousarray(rows[name]) for name in self.columns}
        return {"indices": own_indices(indices, self.length), **batch} if self.include_indices else batch


def table_source(path: str | Path, table: str, columns: Sequence[str] | None = None, **kwargs: Any) -> TableDataSource:
    """A source over a table of an HDF5 file: a Table of PyTables, or an h5py dataset with fields.

    `table`: its place in the file, as ``/train/samples``. The file is read a batch at a time.
    """
    try:
        import tables
    except ImportError as error:
        raise MissingDependency("HDF5 files need PyTables: pip install tables") from error
    with tables.open_file(str(path), "r") as file:
        rows = HDF5Rows(file.get_node(table), str(path), table, "tables")
    rows.close()
    return TableDataSource(rows, columns, **kwargs)


class ParquetRows:
    """Rows of a Parquet file by number: ``rows[int array]`` gives a pyarrow Table. The row group read last is kept."""

    def __init__(self, path: str | Path, columns: Sequence[str] | None = None) -> None:
        self.path, self.columns = Path(path), None if columns is None else list(columns)
        metadata = need_pyarrow("pyarrow.parquet").read_metadata(self.path)
        names = metadata.schema.to_arrow_schema().names
        unknown = [name for name in self.columns or () if name.split(".")[0] not in names]
        if unknown:
            raise ValueError(f"{self.path} has no column {unknown[0]!r}; it has {', '.join(map(repr, names))}.")
        #: The names of the columns in which the file says that values are missing.
        self.with_missing = columns_with_missing(metadata)
        groups = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(groups, dtype=np.int64)])
        self._kept: tuple[int, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "path": self.path.absolute(), "_kept": None}

    def backing_files(self) -> list[str]:
        """The file."""
        return [str(self.path)]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, indices: Any) -> Any:
        indices = np.asarray(indices, np.intp)
        if not indices.size:
            return self._group(0).slice(0, 0)
        indices = from_the_front(indices, len(self))
        group_of = np.searchsorted(self._starts, indices, side="right") - 1
        groups = np.unique(group_of)
        parts = [self._group(int(g)).take(indices[group_of == g] - self._starts[g]) for g in groups]
        if len(parts) == 1:
            return parts[0]
        # The parts have the rows sorted by group; put them back into the order asked for.
        places = np.empty(len(indices), np.intp)
        places[np.argsort(group_of, kind="stable")] = np.arange(len(indices))
        return need_pyarrow().concat_tables(parts).take(places)

    def _group(self, number: int) -> Any:
        kept = self._kept
        if kept is None or kept[0] != number:
            with need_pyarrow("pyarrow.parquet").ParquetFile(self.path) as file:
                kept = self._kept = (number, file.read_row_group(number, columns=self.columns))
        return kept[1]


class _ParquetDataSource(RandomAccessDataSource):
    def __init__(self, rows: ParquetRows, **kwargs: Any) -> None:
        super().__init__(len(rows), **kwargs)
        self.rows = rows

    def samples_by_indices_nomapping(self, indices: Any) -> Any:
        indices = as_positions(indices, self.length)
        table = self.rows[np.atleast_1d(indices)]
        names = table.column_names
        batch = {name: column_array(table.column(name), name in self.rows.with_missing) for name in names}
        return {"indices": own_indices(indices, self.length), **batch} if self.include_indices else batch


def parquet_source(path: str | Path, columns: Sequence[str] | None = None, **kwargs: Any) -> RandomAccessDataSource:
    """A source over a Parquet file: batches are dicts with an array for each of `columns` (all where it is None).

    Columns of fixed-size lists become 2-D arrays, text and ragged lists arrays of objects. One row group is held at a
    time: shuffling a file of many row groups reads each of them again and again, so write it with few, or cache it.
    """
    return _ParquetDataSource(ParquetRows(path, columns), **kwargs)


def columns_with_missing(metadata: Any) -> set[str]:
    """The columns of a file of which some row group counts missing values."""
    chunks = [
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    ]
    return {chunk.path_in_schema for chunk in chunks if chunk.statistics is not None and chunk.statistics.null_count}


def column_array(column: Any, with_missing: bool = False) -> np.ndarray:
    """A column as an array. `with_missing`: numbers are float64 and bools objects, as they are where one is missing,
    so that all batches are of the same dtype."""
    pa = need_pyarrow()
    if with_missing and pa.types.is_integer(column.type):
        column = column.cast(pa.float64(), safe=False)
    column = column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if pa.types.is_fixed_size_list(column.type):
        flat = column.flatten().to_numpy(zero_copy_only=False)
        return np.array(flat).reshape(len(column), column.type.list_size)
    array = np.array(column.to_numpy(zero_copy_only=False))
    return array.astype(object) if with_missing and array.dtype == np.bool_ else array


def need_pyarrow(module: str = "pyarrow") -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependency("Parquet files need pyarrow: pip install pyarrow") from error


def iterable_source(
    samples: Any, collate: Callable[[list[Any]], Any] = stack_samples, num_samples: Any = None
) -> CallableDataSource:
    """A source over an iterable of samples, gone through anew for each iteration: an IterableDataset of torch or
    Hugging Face, a list, an object with ``__iter__``.

    Where it has ``set_epoch`` that is called with the ``epoch`` of the iteration; ``shuffle`` is refused, as an
    iterable has an order of its own. Resumed, what was seen is read again and skipped. A generator can be gone through
    once.
    """
    return CallableDataSource(_Batched(samples, collate), num_samples)


class _Batched:
    def __init__(self, samples: Any, collate: Callable[[list[Any]], Any]) -> None:
        self.samples, self.collate = samples, collate
        self._begun = False

    def __call__(self, batch_size: int, shuffle: Any = None, epoch: int = 0, drop_last: bool = False) -> Iterator[Any]:
        if shuffle is not None and shuffle is not False:
            raise ValueError("this source has an order of its own and cannot be shuffled; shuffle what it is made of.")
        check_batch_size(batch_size)
        if isinstance(self.samples, Generator):
            if self._begun:
                raise ValueError(
                    "a generator can be gone through once; give an object with __iter__ (or a list) instead, which "
                    "each iteration goes through anew."
                )
            self._begun = True
        set_epoch = getattr(self.samples, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
        waiting: list[Any] = []
        for sample in self.samples:
            waiting.append(sample)
            if len(waiting) == batch_size:
                yield self.collate(waiting)
                waiting = []
        if waiting and not drop_last:
            yield self.collate(waiting)


def webdataset_source(
    shards: Sequence[str | Path] | str | Path,
    decode: Callable[[dict[str, Any]], Any],
    collate: Callable[[list[Any]], Any] = stack_samples,
) -> CallableDataSource:
    """A source over tar files in which the files of one sample stand together and share their name up to the first dot.

    `decode` makes a sample of a dict of the files' contents (bytes) by ending, with the common name as ``__key__``:
    ``{"__key__": "0001", "jpg": b"...", "cls": b"7"}``. A tar that is cut short raises
    ``tarfile.ReadError``.
    """
    paths = [Path(shards)] if isinstance(shards, str | Path) else [Path(shard) for shard in shards]
    return iterable_source(_TarSamples(paths, decode), collate)


class _TarSamples:
    def __init__(self, paths: list[Path], decode: Callable[[dict[str, Any]], Any]) -> None:
        self.paths, self.decode = paths, decode

    def __iter__(self) -> Iterator[Any]:
        for path in self.paths:
            for sample in tar_samples(path):
                yield self.decode(sample)


def tar_samples(path: Path) -> Iterator[dict[str, Any]]:
    """The samples of one tar file, as their files' contents by ending."""
    sample: dict[str, Any] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            stem, _, ending = name.partition(".")
            content = tar.extractfile(member) if member.isfile() else None
            if content is None or not ending:
                continue
            key = f"{folder}/{stem}" if folder else stem
            if sample and sample["__key__"] != key:
                yield sample
                sample = {}
            sample["__key__"] = key
            sample[ending.lower()] = content.read()
        # tarfile takes a header that is cut off for the end of the archive; a whole one ends with a block of zeros.
        stream: Any = tar.fileobj
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
            raise tarfile.ReadError(f"{path} is cut short: it does not end as a tar file does. Fetch it again.")
    if sample:
        yield sample
