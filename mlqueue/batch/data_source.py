"""Data sources: where mini-batches come from.

::

    ds = ArrayDataSource([train_X, train_y])
    for batch_X, batch_y in ds.batch_iterator(batch_size=64, shuffle=12345):
        ...

:class:`ArrayDataSource` reads arrays and whatever looks like one; :class:`FunctionDataSource`,
:class:`CallableDataSource` and :class:`IteratorDataSource` ask functions and iterators; :class:`CompositeDataSource`
draws from several sources in step, :class:`ChoiceDataSource` from one of several at a time; :class:`MapDataSource`
applies a function. What ``shuffle`` may be is said in :mod:`mlqueue.batch.order`.
"""

from __future__ import annotations

import importlib
import inspect
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlqueue.batch.caching import MemoryCache, open_cache_file, write_cache_file
from mlqueue.batch.iteration import (
    BatchIterator,
    ChoiceBatch,
    ReplayIterator,
    SeededBatch,
    as_structure,
    noise_generator,
    trim_parts,
)
from mlqueue.batch.iterators import (
    ArrayIterator,
    ChoiceIterator,
    CompositeIterator,
    FullBatches,
    GatherIterator,
    KeyedIterator,
    StratifiedIterator,
    TupleIterator,
)
from mlqueue.batch.iterators import state_of as state_of
from mlqueue.batch.order import Shuffle, StreamShuffle, as_shuffle, check_batch_size, member_seed
from mlqueue.batch.reduction import batch_map_concat, batch_map_mean
from mlqueue.batch.rows import as_rows, is_array_like, reader, rows_into
from mlqueue.batch.sampling import (
    AbstractSampler,
    IndexIterator,
    StandardSampler,
    SubsetSampler,
    check_shard,
    num_batches,
)
from mlqueue.batch.stages import TakeIterator, filtered, prefetched, rebatched
from mlqueue.errors import MissingDependency

__all__ = [
    "AbstractDataSource",
    "ArrayDataSource",
    "CacheDataSource",
    "CallableDataSource",
    "ChoiceBatch",
    "ChoiceDataSource",
    "CompositeDataSource",
    "FunctionDataSource",
    "IteratorDataSource",
    "MapDataSource",
    "RandomAccessDataSource",
    "StageDataSource",
    "TakeDataSource",
    "batch_map_concat",
    "batch_map_mean",
    "coerce_data_source",
]

#: A mini-batch: a tuple (or a dict) of arrays, possibly nested.
Batch = Any
#: What :meth:`samples_by_indices` takes: an int array, a sequence of them (composite), or a ChoiceBatch.
IndexBatch = Any
#: Samples read at a time to fill a cache file.
FILL = 256
#: Makes an array that is to be filled, as ``numpy.empty`` does: ``empty(shape, dtype)``.
Empty = Callable[[Any, Any], np.ndarray]


class AbstractDataSource:
    """A source of mini-batches. A subclass has to have :meth:`batch_iterator`, and :meth:`num_samples` if it can."""

    #: How workers know the source, where a factory with a name has made it (``MLQ.data_source``).
    reference: Any = None

    @property
    def is_random_access(self) -> bool:
        """Whether samples can be had by index, so that worker pools can prepare batches."""
        return False

    def num_samples(self, **kwargs: Any) -> float | int | None:
        """The number of samples that an iteration gives: an int, ``numpy.inf``, or None when it is not known."""
        raise NotImplementedError(f"{type(self).__name__} has no num_samples()")

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        """The number of batches that an iteration gives: an int, ``numpy.inf``, or None when it is not known."""
        n = self.num_samples(**kwargs)
        if n is None or np.isinf(n):
            return n
        return int(n) // batch_size if kwargs.get("drop_last") else num_batches(int(n), batch_size)

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> Iterator[Batch]:
        """An iterator over mini-batches of `batch_size` samples."""
        raise NotImplementedError(f"{type(self).__name__} has no batch_iterator()")

    def map(self, fn: Callable[..., Batch]) -> MapDataSource:
        """A source that gives ``fn(*batch)`` for every batch; see :class:`MapDataSource`."""
        return MapDataSource(self, fn)

    def filter(self, predicate: Callable[..., Any]) -> StageDataSource:
        """A source with the samples for which ``predicate(*batch)`` holds.

        `predicate` returns a 1-D array of bools, one for each sample, or one bool for the batch. Batches become
        shorter; :meth:`rebatch` fills them up again.
        """
        check_function(predicate, "filter")
        return StageDataSource(self, partial(filtered, predicate=predicate), counted=False)

    def rebatch(self, read: int | None = None) -> StageDataSource:
        """A source that gives batches of exactly the size asked for (but the last), whatever sizes this one gives.

        `read`: the batch size to ask this source for; the same where it is None.
        """
        return StageDataSource(self, partial(rebatched, read=None if read is None else check_batch_size(read)))

    def prefetch(self, n: int = 2) -> StageDataSource:
        """A source whose iterators prepare up to `n` batches ahead, in a thread."""
        if operator.index(n) < 1:
            raise ValueError(f"at least one batch has to be prepared ahead, got {n}.")
        return StageDataSource(self, partial(prefetched, size=n), batched=True)

    def take(self, n: int) -> TakeDataSource:
        """A source that ends after `n` samples."""
        return TakeDataSource(self, n)

    def zip(self, *others: AbstractDataSource) -> CompositeDataSource:
        """A source that draws from this one and the others in step; see :class:`CompositeDataSource`."""
        return CompositeDataSource([self, *others])

    def cache(self, path: str | Path | None = None, key: str = "") -> CacheDataSource | ArrayDataSource:
        """A source that keeps the samples: in memory, each when it is first read, or in the HDF5 file `path`.

        In memory, the source has to have access by index and not to be made of several. The file is written now, whole,
        with the samples in the order in which this source gives them, unless it exists; the new source reads from it.
        `key` is kept in it and says what it holds: with another key BatchError is raised rather than other data given.
        """
        return CacheDataSource(self) if path is None else cached_in_file(self, Path(path), key)

    def as_torch(self, batch_size: int, **kwargs: Any) -> Any:
        """This source as a ``torch.utils.data.IterableDataset`` of batches of tensors.

        Give it to a ``DataLoader(ds, batch_size=None)``, or iterate over it; `kwargs` and the rest are explained at
        ``mlqueue.batch.to_torch.TorchBatches``.
        """
        try:
            to_torch = importlib.import_module("mlqueue.batch.to_torch")
        except ImportError as error:
            raise MissingDependency("as_torch() needs PyTorch: pip install torch") from error
        return to_torch.TorchBatches(self, batch_size, **kwargs)

    def batch_map_concat(
        self,
        func: Callable[..., Any],
        batch_size: int,
        progress_iter_func: Callable[..., Any] | None = None,
        n_batches: int | None = None,
        prepend_args: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[np.ndarray, ...] | None:
        """Apply `func` to every batch and join what it returns; see :func:`batch_map_concat`.

        `kwargs` go to :meth:`batch_iterator`. An endless source needs `n_batches` (else ValueError).
        """
        total = self._total_batches(batch_size, n_batches, kwargs)
        batches = self.batch_iterator(batch_size, **kwargs)
        return batch_map_concat(func, batches, progress_iter_func, n_batches, prepend_args, total=total)

    def batch_map_mean(
        self,
        func: Callable[..., Any],
        batch_size: int,
        progress_iter_func: Callable[..., Any] | None = None,
        sum_axis: int | tuple[int, ...] | None = None,
        n_batches: int | None = None,
        prepend_args: tuple[Any, ...] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | None:
        """Apply `func` to every batch and average what it returns; see :func:`batch_map_mean`.

        `kwargs` go to :meth:`batch_iterator`. An endless source needs `n_batches` (else ValueError).
        """
        total = self._total_batches(batch_size, n_batches, kwargs)
        batches = self.batch_iterator(batch_size, **kwargs)
        return batch_map_mean(func, batches, progress_iter_func, sum_axis, n_batches, prepend_args, total=total)

    def _total_batches(self, batch_size: int, n_batches: int | None, kwargs: dict[str, Any]) -> int | None:
        if n_batches is not None:
            return n_batches
        total = self.num_batches(batch_size, **kwargs)
        if total is not None and np.isinf(total):
            raise ValueError("this source never ends: give n_batches, the number of batches to process.")
        return None if total is None else int(total)


class RandomAccessDataSource(AbstractDataSource):
    """A source of `length` samples that can be had by index. A subclass has to have `samples_by_indices_nomapping`.

    `indices`: the samples to use (1-D ints, or a mask of bools); all where it is None. `repeats`: how often to go
    through them; -1 is for ever. `sampler`: draws the samples instead (then without the former two).
    `include_indices`: batches begin with the indices of their samples.
    """

    def __init__(
        self,
        length: int,
        indices: Any = None,
        repeats: int = 1,
        sampler: AbstractSampler | None = None,
        include_indices: bool = False,
    ) -> None:
        if sampler is not None:
            if indices is not None or repeats != 1:
                raise ValueError("give either a sampler, or indices and repeats: a sampler has both of its own.")
        elif indices is not None:
            sampler = SubsetSampler(indices, repeats)
        else:
            sampler = StandardSampler(length, repeats)
        check = getattr(sampler, "check_length", None)
        if check is not None:
            check(length)
        self.length = length
        self.sampler = sampler
        self.include_indices = include_indices

    @property
    def is_random_access(self) -> bool:
        return True

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.sampler.num_indices_generated()

    def samples_by_indices_nomapping(self, indices: IndexBatch) -> Batch:
        """The samples at these absolute indices, as a batch."""
        raise NotImplementedError(f"{type(self).__name__} has no samples_by_indices_nomapping()")

    def samples_by_indices(self, indices: IndexBatch) -> Batch:
        """The samples at these positions among those that the sampler knows (`indices` of the constructor)."""
        return self.samples_by_indices_nomapping(self.sampler.map_indices(indices))

    def batch_indices_iterator(
        self, batch_size: int, shuffle: Any = None, *, epoch: int = 0, drop_last: bool = False
    ) -> BatchIterator:
        """An iterator over the indices of mini-batches: 1-D int arrays, of absolute indices.

        `epoch`: the number of the first epoch, on which the order depends where `shuffle` is a seed. `drop_last`:
        leave the last batch out if it is short. Nothing is drawn from `shuffle` before the first batch.
        """
        indices = sampled_indices(self.sampler, check_batch_size(batch_size), as_shuffle(shuffle), epoch)
        return FullBatches(indices, batch_size) if drop_last else indices

    def batch_iterator(  # type: ignore[override]
        self, batch_size: int, shuffle: Any = None, *, epoch: int = 0, drop_last: bool = False, copy: bool = True
    ) -> BatchIterator:
        """An iterator over mini-batches; the arguments are those of :meth:`batch_indices_iterator`.

        ``copy=False`` says that each batch is only read, and before the next one is asked for; a source that can save
        work then does.
        """
        indices = self.batch_indices_iterator(batch_size, shuffle, epoch=epoch, drop_last=drop_last)
        return GatherIterator(indices, self.samples_by_indices_nomapping)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> Any:
        """The part `rank` of `world_size` parts of every epoch, as a source.

        The parts have no sample in common and together have all; where the number of samples is not a multiple of
        `world_size` the first parts have one more. ``drop_last=True`` leaves those over out, ``pad=True`` fills up
        with the first samples of the epoch: then all parts are equal. Every part has to be given the same `shuffle`:
        a seed, or generators of the same state.
        """
        part = check_shard(rank, world_size, drop_last, pad)
        for_shard = getattr(self.sampler, "for_shard", None)
        if for_shard is None:
            raise TypeError(f"a {type(self.sampler).__name__} cannot be sharded: it has no for_shard(shard).")
        return self._with_sampler(for_shard(part))

    def _with_sampler(self, sampler: AbstractSampler) -> RandomAccessDataSource:
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.sampler = sampler
        return other


class ArrayDataSource(RandomAccessDataSource):
    """A source over arrays, or anything that looks like one, of equal length.

    `data`: a list of array-likes (with ``__len__`` and ``__getitem__`` for a slice and a 1-D int array); batches are
    tuples with a part of each. Or a dict of them; batches are dicts. HDF5 nodes of PyTables and h5py, memory maps and
    zarr arrays will do. The parts of a batch are copies, that may be written into.
    """

    def __init__(
        self,
        data: list[Any] | Mapping[str, Any],
        indices: Any = None,
        repeats: int = 1,
        sampler: AbstractSampler | None = None,
        include_indices: bool = False,
    ) -> None:
        length = common_length(data)
        super().__init__(length, indices, repeats, sampler, include_indices)
        if include_indices and isinstance(data, Mapping) and "indices" in data:
            raise ValueError("include_indices=True needs the name 'indices', which data has already; rename that.")
        self.data = data
        self._make_readers()

    def _make_readers(self) -> None:
        data = self.data
        self._names = list(data) if isinstance(data, Mapping) else None
        self._arrays = list(data.values() if isinstance(data, Mapping) else data)
        self._readers = [reader(array) for array in self._arrays]

    def __getstate__(self) -> dict[str, Any]:
        derived = ("_readers", "_names", "_arrays")
        state = {name: value for name, value in self.__dict__.items() if name not in derived}
        data = self.data
        if isinstance(data, Mapping):
            state["data"] = {name: as_rows(array) for name, array in data.items()}
        else:
            state["data"] = [as_rows(array) for array in data]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._make_readers()

    def samples_by_indices_nomapping(self, indices: Any) -> Batch:
        """The samples at `indices`: an int, a slice, or 1-D ints."""
        if not isinstance(indices, slice):  # which arrays read faster
            indices = as_positions(indices, self.length)
        parts = [read(indices) for read in self._readers]
        if self.include_indices:
            parts.insert(0, own_indices(indices, self.length))
        return self._as_batch(parts)

    def _as_batch(self, parts: list[Any]) -> Batch:
        if self._names is None:
            return tuple(parts)
        return dict(zip(["indices", *self._names] if self.include_indices else self._names, parts, strict=True))

    def samples_into(self, indices: Any, empty: Empty) -> Batch:
        """The same as :meth:`samples_by_indices_nomapping`, in arrays that ``empty(shape, dtype)`` makes."""
        if not self._is_plain():
            return self.samples_by_indices_nomapping(indices)
        parts = [
            rows_into(array, read, indices, empty) for array, read in zip(self._arrays, self._readers, strict=True)
        ]
        if self.include_indices:
            parts.insert(0, own_indices(indices, self.length))
        return self._as_batch(parts)

    def batch_iterator(  # type: ignore[override]
        self, batch_size: int, shuffle: Any = None, *, epoch: int = 0, drop_last: bool = False, copy: bool = True
    ) -> BatchIterator:
        """An iterator over mini-batches; the arguments are those of :meth:`batch_indices_iterator`.

        ``copy=False`` gives arrays that cannot be written and are valid until the next batch: of arrays in memory,
        views where they are read in order, and one piece of memory used over and over where they are shuffled.
        """
        indices = self.batch_indices_iterator(batch_size, shuffle, epoch=epoch, drop_last=drop_last)
        if isinstance(indices, IndexIterator) and self._names is None and not self.include_indices and self._is_plain():
            return ArrayIterator(indices, batch_size, self._arrays, lend=not copy)
        return GatherIterator(indices, self.samples_by_indices_nomapping)

    def _is_plain(self) -> bool:
        return type(self).samples_by_indices_nomapping is ArrayDataSource.samples_by_indices_nomapping


class FunctionDataSource(RandomAccessDataSource):
    """A source of `length` samples that a function reads: ``fn(indices)`` gives the batch for a 1-D int array.

    `length` may be anything up to 2**62: with a seed as `shuffle`, no array of that length is ever held (a RandomState
    or a Generator draws a whole permutation, of 8 bytes a sample). `fn` has to return a tuple or a dict (a lone array
    becomes a tuple of one); the other arguments are those of :class:`RandomAccessDataSource`.
    """

    def __init__(
        self,
        fn: Callable[[np.ndarray], Batch],
        length: int,
        indices: Any = None,
        repeats: int = 1,
        sampler: AbstractSampler | None = None,
        include_indices: bool = False,
    ) -> None:
        super().__init__(operator.index(length), indices, repeats, sampler, include_indices)
        self.fn = check_function(fn, "a FunctionDataSource")

    def samples_by_indices_nomapping(self, indices: Any) -> Batch:
        indices = as_positions(indices, self.length)
        batch = as_batch(self.fn(own_indices(indices, self.length)))
        if not self.include_indices:
            return batch
        indices = own_indices(indices, self.length)
        return {"indices": indices, **batch} if isinstance(batch, dict) else (indices, *batch)


class CallableDataSource(AbstractDataSource):
    """A source whose batches come from ``batch_iterator_fn(batch_size, **kwargs)``, an iterator over batches.

    `kwargs` are those that :meth:`batch_iterator` is called with (``shuffle`` among them). `num_samples_fn`: a number
    (int or ``numpy.inf``), a function of `kwargs` that gives it, or None when it is not known.
    """

    def __init__(self, batch_iterator_fn: Callable[..., Iterator[Batch]], num_samples_fn: Any = None) -> None:
        if not (num_samples_fn is None or callable(num_samples_fn)):
            num_samples_fn = check_num_samples(num_samples_fn, "num_samples_fn")
        self.batch_iterator_fn = batch_iterator_fn
        self.num_samples_fn = num_samples_fn

    def num_samples(self, **kwargs: Any) -> float | int | None:
        if callable(self.num_samples_fn):
            n: float | int | None = self.num_samples_fn(**kwargs)
            return n
        return self.num_samples_fn  # type: ignore[no-any-return]

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        """An iterator over what the function gives, which is called now. Resumed, the function is called again and what
        was seen skipped, unless its iterator has state_dict() and load_state_dict() of its own."""
        iterator = self.unbegun_iterator(batch_size, **kwargs)
        iterator.begin()
        return iterator

    def unbegun_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        """The same, but the function is called at the first batch, or by ``begin()``."""
        shuffle = kwargs.get("shuffle")
        known = None if shuffle is None or (isinstance(shuffle, int) and shuffle is not True) else as_shuffle(shuffle)
        return TupleIterator(ReplayIterator(lambda: self.batch_iterator_fn(batch_size, **kwargs), known))


class IteratorDataSource(AbstractDataSource):
    """A source over one iterator of batches, which can be gone through once; the batch size is the iterator's own.

    `n_samples`: their number, ``numpy.inf``, or None when it is not known.
    """

    def __init__(self, batch_iter: Iterator[Batch], n_samples: float | int | None = None) -> None:
        self.batch_iter = batch_iter
        self.n_samples = None if n_samples is None else check_num_samples(n_samples, "n_samples")

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.n_samples

    def batch_iterator(self, batch_size: int | None = None, **kwargs: Any) -> BatchIterator:
        """The iterator, whatever the arguments. To resume it in another process, give that a fresh one."""
        return TupleIterator(ReplayIterator(lambda: self.batch_iter))


class CompositeDataSource(AbstractDataSource):
    """Draws a batch from each of several sources at every step, until the first of them ends.

    `flatten`: join the members' tuples into one (else a batch is a tuple of batches). `trim`: cut the members' batches
    to the shortest of the step. Members share a generator given as `shuffle`; from a seed each is given one of its own.
    """

    def __init__(self, datasets: Sequence[AbstractDataSource], flatten: bool = True, trim: bool = True) -> None:
        self.datasets = [check_source(ds) for ds in datasets]
        self.flatten, self.trim = flatten, trim

    @property
    def is_random_access(self) -> bool:
        return all(ds.is_random_access for ds in self.datasets)

    def num_samples(self, **kwargs: Any) -> float | int | None:
        known = [n for n in (ds.num_samples(**kwargs) for ds in self.datasets) if n is not None]
        # Of a member that does not know, it can only be said that the others end no later than this.
        return min(known) if len(known) == len(self.datasets) and known else None

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        counts = [ds.num_batches(batch_size, **kwargs) for ds in self.datasets]
        known = [count for count in counts if count is not None]
        return min(known) if len(known) == len(counts) and known else None

    def samples_by_indices_nomapping(self, indices: Sequence[IndexBatch]) -> Batch:
        """The batch for a sequence of index batches (absolute indices), one for each member."""
        return self._gather("samples_by_indices_nomapping", indices)

    def samples_by_indices(self, indices: Sequence[IndexBatch]) -> Batch:
        """The batch for a sequence of index batches (positions among each sampler's samples), one for each member."""
        return self._gather("samples_by_indices", indices)

    def samples_into(self, indices: Sequence[IndexBatch], empty: Empty) -> Batch:
        """The same as :meth:`samples_by_indices_nomapping`, in arrays that ``empty(shape, dtype)`` makes."""
        self._check_indices(indices)
        parts = [samples_into(ds, part, empty) for ds, part in zip(self.datasets, indices, strict=True)]
        return self._join(trim_parts(parts) if self.trim else parts)

    def _gather(self, method: str, indices: Sequence[IndexBatch]) -> Batch:
        self._check_indices(indices)
        parts = [getattr(ds, method)(part) for ds, part in zip(self.datasets, indices, strict=True)]
        return self._join(trim_parts(parts) if self.trim else parts)

    def _check_indices(self, indices: Sequence[IndexBatch]) -> None:
        need_random_access(self)
        if len(indices) != len(self.datasets):
            raise ValueError(
                f"there are {len(self.datasets)} members, but {len(indices)} index batches; give one each."
            )

    def _join(self, parts: list[Batch]) -> Batch:
        if not self.flatten:
            return tuple([as_structure(part) for part in parts])
        if parts and all(isinstance(part, dict) for part in parts):
            return merged(parts)
        return tuple(array for part in parts for array in parts_of(part))

    def batch_indices_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        """An iterator over tuples of index batches, one for each member, cut to the shortest."""
        need_random_access(self)
        members = open_members(self.datasets, "batch_indices_iterator", batch_size, kwargs)
        return CompositeIterator(members, trim=True, join=tuple)

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        members = open_members(self.datasets, "batch_iterator", batch_size, kwargs)
        return CompositeIterator(members, trim=self.trim, join=self._join)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> CompositeDataSource:
        """A composite of the members' parts; see :meth:`RandomAccessDataSource.shard`."""
        parts = [shard_of(ds, rank, world_size, drop_last, pad) for ds in self.datasets]
        return CompositeDataSource(parts, self.flatten, self.trim)


class ChoiceDataSource(AbstractDataSource):
    """Draws every batch from one of several sources.

    In order, the members take turns; shuffled, each round has the members in a new order; it ends as soon as a member
    whose turn it is has no more. With ``stratified=True``, and if all members end, every member is gone through to
    its end, its batches spread evenly (in order) or at random (shuffled) over the whole.
    """

    def __init__(self, datasets: Sequence[AbstractDataSource], stratified: bool = False) -> None:
        self.datasets = [check_source(ds) for ds in datasets]
        if not self.datasets:
            raise ValueError("a ChoiceDataSource needs at least one member.")
        self.stratified = stratified

    @property
    def is_random_access(self) -> bool:
        return all(ds.is_random_access for ds in self.datasets)

    def num_samples(self, **kwargs: Any) -> float | int | None:
        """The sum over the members that know theirs. Not stratified, an iteration may end before."""
        return sum(n for n in (ds.num_samples(**kwargs) for ds in self.datasets) if n is not None)

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        kwargs.setdefault("shuffle", None)
        counts = [ds.num_batches(batch_size, **kwargs) for ds in self.datasets]
        known = [count for count in counts if count is not None]
        if len(known) < len(counts):
            return None
        if self._visits_all(self._member_batches(batch_size, kwargs)):
            return sum(known)
        shortest = min(known)
        if np.isinf(shortest):
            return shortest
        # Shuffled, the round in which it ends has a random order.
        return None if as_shuffle(kwargs.get("shuffle")) else int(shortest) * len(known) + known.index(shortest)

    def _member_batches(self, batch_size: int, kwargs: dict[str, Any]) -> list[float | int | None]:
        counts = []
        for ds in self.datasets:
            count, n = ds.num_batches(batch_size, **kwargs), ds.num_samples(**kwargs)
            if n is not None and np.isinf(n):
                count = n
            elif n is not None and count is None:
                # An estimate will do: what comes beyond it, or does not come, is dealt with.
                count = num_batches(int(n), batch_size)
            counts.append(count)
        return counts

    def _visits_all(self, counts: list[float | int | None]) -> bool:
        return self.stratified and not any(count is not None and np.isinf(count) for count in counts)

    def samples_by_indices_nomapping(self, indices: ChoiceBatch) -> Batch:
        """The batch for a :class:`ChoiceBatch` of absolute indices."""
        return self._gather("samples_by_indices_nomapping", indices)

    def samples_by_indices(self, indices: ChoiceBatch) -> Batch:
        """The batch for a :class:`ChoiceBatch` of positions among the sampler's samples."""
        return self._gather("samples_by_indices", indices)

    def samples_into(self, indices: ChoiceBatch, empty: Empty) -> Batch:
        """The same as :meth:`samples_by_indices_nomapping`, in arrays that ``empty(shape, dtype)`` makes."""
        self._check_indices(indices)
        return samples_into(self.datasets[indices.ds_index], indices.sample_indices, empty)

    def _check_indices(self, indices: ChoiceBatch) -> None:
        need_random_access(self)
        if not isinstance(indices, ChoiceBatch):
            raise TypeError(f"a ChoiceDataSource takes a ChoiceBatch(sample_indices, ds_index), got {indices!r}.")

    def _gather(self, method: str, indices: ChoiceBatch) -> Batch:
        self._check_indices(indices)
        return getattr(self.datasets[indices.ds_index], method)(indices.sample_indices)

    def batch_indices_iterator(self, batch_size: int, shuffle: Any = None, **kwargs: Any) -> BatchIterator:
        """An iterator over :class:`ChoiceBatch`."""
        need_random_access(self)
        return self._iterator("batch_indices_iterator", batch_size, {"shuffle": shuffle, **kwargs}, ChoiceBatch)

    def batch_iterator(self, batch_size: int, shuffle: Any = None, **kwargs: Any) -> BatchIterator:
        return self._iterator("batch_iterator", batch_size, {"shuffle": shuffle, **kwargs}, None)

    def _iterator(
        self, method: str, batch_size: int, kwargs: dict[str, Any], wrap: Callable[[Any, int], Any] | None
    ) -> BatchIterator:
        members = open_members(self.datasets, method, batch_size, kwargs)
        shuffle, epoch = as_shuffle(kwargs["shuffle"]), kwargs.get("epoch", 0)
        counts = self._member_batches(batch_size, kwargs) if self.stratified else []
        if not self._visits_all(counts):
            return ChoiceIterator(members, shuffle, epoch, wrap)
        if any(count is None for count in counts):
            raise TypeError(
                "stratified=True needs to know how many samples each member has, and member "
                f"{counts.index(None)} does not; give its num_samples, or stratified=False."
            )
        sure = [
            ds.is_random_access and ds.num_batches(batch_size, **member_kwargs(kwargs, number)) is not None
            for number, ds in enumerate(self.datasets)
        ]
        expected = [int(count) for count in counts if count is not None]
        return StratifiedIterator(members, shuffle, epoch, wrap, expected, sure)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> ChoiceDataSource:
        """A choice of the members' parts; see :meth:`RandomAccessDataSource.shard`."""
        parts = [shard_of(ds, rank, world_size, drop_last, pad) for ds in self.datasets]
        return ChoiceDataSource(parts, self.stratified)


class MapDataSource(AbstractDataSource):
    """Applies a function to every batch: ``fn(*batch)``, or ``fn(batch)`` where batches are dicts.

    The function gets arrays of its own, that it may write into, and returns the new batch. If it has a parameter named
    ``rng`` it is given the batch's own ``numpy.random.Generator``, derived from the shuffle's seed (or generator), the
    epoch and the number of the batch: the same whoever prepares the batch, and when. `seed`: what to derive it from
    instead; without it an iteration in order draws anew each time. With a worker pool the function runs in the workers.
    """

    def __init__(self, source: AbstractDataSource, fn: Callable[..., Batch], seed: int | None = None) -> None:
        self.source, self.fn, self.seed = check_source(source), check_function(fn, "map"), seed
        self._takes_rng, self._takes_empty = takes(fn, "rng"), takes(fn, "empty")

    @property
    def is_random_access(self) -> bool:
        return self.source.is_random_access

    @property
    def is_random(self) -> bool:
        """Whether the function takes a generator."""
        return self._takes_rng

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.source.num_samples(**kwargs)

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        return self.source.num_batches(batch_size, **kwargs)

    def samples_by_indices_nomapping(self, indices: IndexBatch) -> Batch:
        return self._gather("samples_by_indices_nomapping", indices)

    def samples_by_indices(self, indices: IndexBatch) -> Batch:
        return self._gather("samples_by_indices", indices)

    def samples_into(self, indices: IndexBatch, empty: Empty) -> Batch:
        """The same as :meth:`samples_by_indices_nomapping`; a function with a parameter ``empty`` is given that, to
        make the arrays that it returns: ``empty(shape, dtype)``."""
        return self._gather("samples_by_indices_nomapping", indices, empty)

    def _gather(self, method: str, indices: IndexBatch, empty: Empty = np.empty) -> Batch:
        need_random_access(self)
        key = None
        if self._takes_rng and isinstance(indices, SeededBatch):  # else the key is that of a source within
            indices, key = indices
        return self.apply(getattr(self.source, method)(indices), key, empty)

    def apply(self, batch: Batch, key: tuple[int, int, int] | None = None, empty: Empty = np.empty) -> Batch:
        """What the function makes of a batch. `key`: what its generator is derived from; None draws a new one."""
        extra: dict[str, Any] = {"empty": empty} if self._takes_empty else {}
        if self._takes_rng:
            extra["rng"] = np.random.default_rng(self.seed) if key is None else noise_generator(key)
        return as_structure(self.fn(batch, **extra) if isinstance(batch, dict) else self.fn(*batch, **extra))

    def batch_indices_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        """The source's index batches; as :class:`SeededBatch` where the function takes a generator."""
        need_random_access(self)
        indices = self.source.batch_indices_iterator(batch_size, **kwargs)  # type: ignore[attr-defined]
        return self._keyed(indices, kwargs, SeededBatch) if self._takes_rng else indices

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        # Its arrays are the function's own, to write into, whatever is done with those that it returns.
        given = {name: value for name, value in kwargs.items() if name != "copy"}
        batches = open_iterator(self.source, "batch_iterator", batch_size, given)
        return self._keyed(batches, kwargs, self.apply) if self._takes_rng else KeyedIterator(batches, None, self.apply)

    def _keyed(self, batches: Any, kwargs: dict[str, Any], apply: Callable[[Any, Any], Any]) -> KeyedIterator:
        shuffle = as_shuffle(self.seed if self.seed is not None else kwargs.get("shuffle"))
        epoch = kwargs.get("epoch", 0)
        fixed = not isinstance(shuffle, StreamShuffle)
        depth = random_depth(self.source)
        return KeyedIterator(batches, lambda: (noise_entropy(shuffle, depth), epoch), apply, fixed)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> MapDataSource:
        """The mapped part of the source; see :meth:`RandomAccessDataSource.shard`."""
        return MapDataSource(shard_of(self.source, rank, world_size, drop_last, pad), self.fn, self.seed)


class StageDataSource(AbstractDataSource):
    """A source whose batches go through a stage of :mod:`mlqueue.batch.stages`: filter, rebatch or prefetch.

    `counted`: whether it gives as many samples as the source; `batched`: and in the same batches.
    """

    def __init__(
        self,
        source: AbstractDataSource,
        stage: Callable[..., BatchIterator],
        counted: bool = True,
        batched: bool = False,
    ) -> None:
        self.source, self.stage, self.counted, self.batched = check_source(source), stage, counted, batched

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.source.num_samples(**kwargs) if self.counted else None

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        if self.batched:
            return self.source.num_batches(batch_size, **kwargs)
        return super().num_batches(batch_size, **kwargs)

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        kwargs.pop("copy", None)  # a stage may hold several batches of the source at a time
        return self.stage(self.source, check_batch_size(batch_size), kwargs)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> StageDataSource:
        """The stage over a part of the source; see :meth:`RandomAccessDataSource.shard`."""
        part = shard_of(self.source, rank, world_size, drop_last, pad)
        return StageDataSource(part, self.stage, self.counted, self.batched)


class TakeDataSource(AbstractDataSource):
    """The first `n` samples that an iteration over a source gives."""

    def __init__(self, source: AbstractDataSource, n: int) -> None:
        self.source, self.n = check_source(source), operator.index(n)
        if self.n < 0:
            raise ValueError(f"the number of samples to take must not be negative, got {n}.")

    @property
    def is_random_access(self) -> bool:
        return self.source.is_random_access

    def num_samples(self, **kwargs: Any) -> float | int | None:
        n = self.source.num_samples(**kwargs)
        return n if n is None else min(n, self.n)

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        # Batches of composites and choices may be short in the middle, and those taken then be more.
        return super().num_batches(batch_size, **kwargs) if sampled_root(self) else None

    def samples_by_indices_nomapping(self, indices: IndexBatch) -> Batch:
        return self.source.samples_by_indices_nomapping(indices)  # type: ignore[attr-defined]

    def samples_by_indices(self, indices: IndexBatch) -> Batch:
        return self.source.samples_by_indices(indices)  # type: ignore[attr-defined]

    def samples_into(self, indices: IndexBatch, empty: Empty) -> Batch:
        """The same as :meth:`samples_by_indices_nomapping`, in arrays that ``empty(shape, dtype)`` makes."""
        return samples_into(self.source, indices, empty)

    def batch_indices_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        need_random_access(self)
        return self._taken(self.source.batch_indices_iterator, batch_size, kwargs)  # type: ignore[attr-defined]

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        return self._taken(self.source.batch_iterator, batch_size, kwargs)

    def _taken(self, open_iterator: Callable[..., Any], batch_size: int, kwargs: dict[str, Any]) -> BatchIterator:
        drop_last = kwargs.pop("drop_last", False)
        taken = TakeIterator(open_iterator(batch_size, **kwargs), self.n)
        return FullBatches(taken, batch_size) if drop_last else taken


class CacheDataSource(AbstractDataSource):
    """Keeps the samples of a random access source in memory, each from its first reading on."""

    def __init__(self, source: AbstractDataSource) -> None:
        self.source = check_source(source)
        root = sampled_root(source)
        if root is None:
            raise TypeError(
                f"a {type(source).__name__} cannot be cached in memory: that needs a source with access by index, not "
                "made of several, without a random map. Cache its members, cache before the map, or give a path."
            )
        self._root, self._cache = root, MemoryCache(root.length)

    def num_batches(self, batch_size: int, **kwargs: Any) -> float | int | None:
        return self.source.num_batches(batch_size, **kwargs)

    @property
    def is_random_access(self) -> bool:
        return True

    def num_samples(self, **kwargs: Any) -> float | int | None:
        return self.source.num_samples(**kwargs)

    def samples_by_indices_nomapping(self, indices: Any) -> Batch:
        read = self.source.samples_by_indices_nomapping  # type: ignore[attr-defined]
        return self._cache.get(np.asarray(as_positions(indices, self._root.length), np.intp), read)

    def samples_by_indices(self, indices: Any) -> Batch:
        return self.samples_by_indices_nomapping(self._root.sampler.map_indices(indices))

    def batch_indices_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        indices: BatchIterator = self.source.batch_indices_iterator(batch_size, **kwargs)  # type: ignore[attr-defined]
        return indices

    def batch_iterator(self, batch_size: int, **kwargs: Any) -> BatchIterator:
        return GatherIterator(self.batch_indices_iterator(batch_size, **kwargs), self.samples_by_indices_nomapping)

    def shard(self, rank: int, world_size: int, drop_last: bool = False, pad: bool = False) -> CacheDataSource:
        """The cache of a part of the source; see :meth:`RandomAccessDataSource.shard`."""
        return CacheDataSource(shard_of(self.source, rank, world_size, drop_last, pad))


def coerce_data_source(x: Any) -> AbstractDataSource:
    """A data source for x: x itself if it is one; a non-empty list or tuple (or a dict) of array-likes becomes an
    :class:`ArrayDataSource`, an iterator an :class:`IteratorDataSource`, a function a :class:`CallableDataSource`.

    Raises ValueError for an empty sequence, TypeError for anything else.
    """
    if isinstance(x, AbstractDataSource):
        return x
    if isinstance(x, list | tuple | dict):
        if not x:
            raise ValueError(f"an empty {type(x).__name__} has no data; give at least one array.")
        for name, part in x.items() if isinstance(x, dict) else enumerate(x):
            if not is_array_like(part):
                raise TypeError(f"element {name!r} is not like an array: a {type(part).__name__}.")
        return ArrayDataSource(x if isinstance(x, dict) else list(x))
    if isinstance(x, Iterator):
        return IteratorDataSource(x)
    if callable(x):
        return CallableDataSource(x)
    raise TypeError(
        "a data source is made of a data source, a list, tuple or dict of arrays, an iterator over batches, or a "
        f"function that gives one; got a {type(x).__name__}"
        + (": put it into a list, [x]." if isinstance(x, np.ndarray) else ".")
    )


def sampled_indices(sampler: AbstractSampler, batch_size: int, shuffle: Shuffle | None, epoch: int) -> BatchIterator:
    """A sampler's batches of indices, with a place that can be saved whatever the sampler."""
    takes_epoch = hasattr(sampler, "for_shard")
    if shuffle is None:
        if takes_epoch:
            own: BatchIterator = sampler.in_order_indices_batch_iterator(batch_size, epoch)  # type: ignore
            return own
        return ReplayIterator(lambda: sampler.in_order_indices_batch_iterator(batch_size))
    if takes_epoch:
        return sampler.shuffled_indices_batch_iterator(batch_size, shuffle, epoch)  # type: ignore
    rng = shuffle.for_user(epoch)
    return ReplayIterator(lambda: sampler.shuffled_indices_batch_iterator(batch_size, rng), as_shuffle(rng))


def sampled_root(ds: AbstractDataSource) -> RandomAccessDataSource | None:
    """The source by whose indices a chain of maps (none of them random) and takes is read; None for anything else."""
    while not isinstance(ds, RandomAccessDataSource):
        if isinstance(ds, TakeDataSource) or (isinstance(ds, MapDataSource) and not ds.is_random):
            ds = ds.source
        else:
            return None
    return ds


def cached_in_file(ds: AbstractDataSource, path: Path, key: str) -> ArrayDataSource:
    arrays = open_cache_file(path, key)
    if arrays is None:
        n = ds.num_samples()
        if n is not None and np.isinf(n):
            raise ValueError("an endless source cannot be cached in a file; take(n) some of it.")
        write_cache_file(path, ds.batch_iterator(FILL), key)
        arrays = open_cache_file(path, key)
    assert arrays is not None
    return ArrayDataSource(arrays)


def common_length(data: Any) -> int:
    """The length that all arrays of a list or a dict have."""
    if not isinstance(data, list | Mapping):
        raise TypeError(
            f"data must be a list (or a dict) of arrays, got a {type(data).__name__}: "
            + ("write list(x)." if isinstance(data, tuple) else "put it into a list, [x].")
        )
    if not data:
        raise IndexError("data is empty; give at least one array.")
    named = list(data.items()) if isinstance(data, Mapping) else list(enumerate(data))
    lengths = []
    for name, array in named:
        if not is_array_like(array):
            raise TypeError(f"data[{name!r}] is not like an array (it needs a length and []): {type(array).__name__}.")
        try:
            lengths.append(len(array))
        except TypeError as error:  # an array without dimensions
            raise TypeError(f"data[{name!r}] has no length, so it has no samples: {error}.") from error
        if lengths[-1] != lengths[0]:
            raise ValueError(
                f"the arrays must be of equal length, but data[{named[0][0]!r}] has {lengths[0]} samples and "
                f"data[{name!r}] has {lengths[-1]}."
            )
    return lengths[0]


def as_positions(indices: Any, length: int) -> Any:
    """What a source of this length is asked for, as an int, or as 1-D ints where it was a list, a slice or a mask of
    bools."""
    if isinstance(indices, slice):
        return np.arange(*indices.indices(length))
    given = np.asarray(indices)
    kind = given.dtype.kind
    if kind in "iu":
        return given if given.ndim else operator.index(given[()])
    if kind == "b" and given.shape == (length,):
        return np.flatnonzero(given)
    if not given.size and given.ndim == 1:
        return np.empty(0, np.intp)
    raise IndexError(
        f"samples are asked for by an int, a slice, 1-D ints, or a mask of {length} bools; got {given.dtype} of shape "
        f"{given.shape}."
    )


def own_indices(indices: Any, length: int) -> Any:
    """The indices of a batch's samples as a part of that batch, to be written into like the others."""
    if isinstance(indices, slice):
        return as_positions(indices, length)
    return indices.copy() if isinstance(indices, np.ndarray) else indices


def check_source(ds: Any) -> AbstractDataSource:
    if not isinstance(ds, AbstractDataSource):
        raise TypeError(f"a data source is needed, got a {type(ds).__name__}; coerce_data_source() makes one.")
    return ds


def check_function(fn: Any, name: str) -> Callable[..., Any]:
    if not callable(fn):
        raise TypeError(f"{name} needs a function of a batch, got {fn!r:.80}.")
    return fn  # type: ignore[no-any-return]


def check_num_samples(n: Any, name: str) -> float | int:
    """A number of samples: an int (or a float that is one), or infinity."""
    if isinstance(n, int | np.integer) and not isinstance(n, bool):
        return int(n)
    if isinstance(n, float | np.floating) and (np.isposinf(n) or float(n).is_integer()):
        return np.inf if np.isposinf(n) else int(n)
    raise TypeError(f"{name} must be an int, numpy.inf or None, got {n!r}.")


def need_random_access(ds: AbstractDataSource) -> None:
    if not ds.is_random_access:
        raise TypeError(f"this {type(ds).__name__} has no access by index: not all it is made of has.")


def member_kwargs(kwargs: dict[str, Any], number: int) -> dict[str, Any]:
    """What an iterator over the members of a source passes on to one of them."""
    if "shuffle" not in kwargs:
        return kwargs
    return {**kwargs, "shuffle": member_seed(kwargs["shuffle"], number)}


def open_members(
    datasets: Sequence[AbstractDataSource], method: str, batch_size: int, kwargs: dict[str, Any]
) -> list[Any]:
    """Iterators over the members of a source, by this method of theirs."""
    check_batch_size(batch_size)
    return [open_iterator(ds, method, batch_size, member_kwargs(kwargs, number)) for number, ds in enumerate(datasets)]


def open_iterator(ds: AbstractDataSource, method: str, batch_size: int, kwargs: dict[str, Any]) -> Any:
    """An iterator over a source that another one is made of: no function of the user's is called before the first
    batch, as in BatchUp, since it may draw from a generator that the sources share."""
    if method == "batch_iterator" and type(ds).batch_iterator is CallableDataSource.batch_iterator:
        return ds.unbegun_iterator(batch_size, **kwargs)  # type: ignore[attr-defined]
    return getattr(ds, method)(batch_size, **kwargs)


def shard_of(ds: AbstractDataSource, rank: int, world_size: int, drop_last: bool, pad: bool) -> AbstractDataSource:
    shard = getattr(ds, "shard", None)
    if shard is None:
        raise TypeError(f"a {type(ds).__name__} cannot be sharded: it has no access by index.")
    part: AbstractDataSource = shard(rank, world_size, drop_last, pad)
    return part


def as_batch(result: Any) -> Batch:
    if isinstance(result, list):
        return tuple(result)
    return result if isinstance(result, tuple | dict) else (result,)


def parts_of(batch: Batch) -> Sequence[Any]:
    if not isinstance(batch, tuple | list):
        raise TypeError(
            f"a CompositeDataSource with flatten=True joins tuples, got a {type(batch).__name__}; make all members "
            "give dicts or all give tuples, or use flatten=False."
        )
    return batch


def merged(parts: list[dict[str, Any]]) -> dict[str, Any]:
    joined: dict[str, Any] = {}
    for part in parts:
        twice = joined.keys() & part.keys()
        if twice:
            raise ValueError(f"two members have the name {sorted(twice)[0]!r}; rename one or use flatten=False.")
        joined.update(part)
    return joined


def takes(fn: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name that can be given by it."""
    try:
        parameter = inspect.signature(fn).parameters.get(name)
    except (TypeError, ValueError):
        return False
    if isinstance(fn, partial) and name in fn.keywords:
        return False  # it is given one already
    return parameter is not None and parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)


def samples_into(ds: AbstractDataSource, indices: IndexBatch, empty: Empty) -> Batch:
    """The samples at absolute indices, in arrays made by `empty` where the source can do so."""
    into = getattr(ds, "samples_into", None)
    return ds.samples_by_indices_nomapping(indices) if into is None else into(indices, empty)  # type: ignore[attr-defined]


def random_depth(ds: AbstractDataSource) -> int:
    """Over how many random maps, one within the other, a map of this source is."""
    members = ds.datasets if isinstance(ds, CompositeDataSource | ChoiceDataSource) else ()
    within = [getattr(ds, "source", None), *members]
    depths = [random_depth(inner) for inner in within if isinstance(inner, AbstractDataSource)]
    return (isinstance(ds, MapDataSource) and ds.is_random) + max(depths, default=0)


def noise_entropy(shuffle: Shuffle | None, depth: int = 0) -> int:
    """What map functions' generators are derived from; anew each time without a shuffle. `depth`: tells the maps apart
    that are one within the other, which would else be given the same numbers."""
    if shuffle is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    entropy = shuffle.noise_entropy()
    if not depth:
        return entropy
    return int(np.random.SeedSequence(entropy, spawn_key=(depth,)).generate_state(1, np.uint64)[0])
