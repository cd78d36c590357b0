"""Every kind of source gives the same batches in order, in threads and in processes, and each resumes the other."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mlqueue.batch.collate import pad_collate
from mlqueue.batch.data_source import ArrayDataSource, ChoiceDataSource, CompositeDataSource, FunctionDataSource
from mlqueue.batch.errors import TooManySkips
from mlqueue.batch.mixing import mix
from mlqueue.batch.sources import SampleDataSource, parquet_source, table_source
from mlqueue.batch.work_pool import WorkerProcessPool, WorkerThreadPool


class Flaky:
    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index in (4, 20):
            raise OSError("cut short")
        return np.arange(index % 3 + 1), index


def noisy(x, y, rng):
    return x + rng.random(x.shape), y


def doubled(indices):
    return indices * 2, indices


def tree(batch):
    if isinstance(batch, dict):
        return {name: tree(part) for name, part in batch.items()}
    return [tree(part) for part in batch] if isinstance(batch, tuple | list) else np.asarray(batch).tolist()


def sources(folder):
    tables = pytest.importorskip("tables")
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table({"y": list(range(50)), "t": ["a"] * 50}), folder / "x.parquet", row_group_size=20)
    with tables.open_file(str(folder / "x.h5"), "w") as file:
        file.create_table("/", "rows", np.zeros(50, [("x", "f4"), ("y", "i4")]))
    long = ArrayDataSource([np.arange(50.0)[:, None], np.arange(50)], repeats=2)
    short = ArrayDataSource([np.arange(30.0)[:, None], np.arange(30)])
    either = ChoiceDataSource([long, short], stratified=True)
    return {
        "map": long.map(noisy),
        "take": long.take(37),
        "cache": short.cache(),
        "mix": mix([long, short], [1, 2], "all"),
        "skip": SampleDataSource(Flaky(), pad_collate(), errors="skip", include_indices=True),
        "parquet": parquet_source(folder / "x.parquet", include_indices=True),
        "table": table_source(folder / "x.h5", "/rows", include_indices=True),
        "function": FunctionDataSource(doubled, 1000),
        "composite": CompositeDataSource([long.map(noisy), either.map(noisy)]),
        "dict": ArrayDataSource({"a": np.arange(50)}, include_indices=True),
        "shard": long.shard(1, 3),
    }


@pytest.mark.parametrize("make_pool", [WorkerThreadPool, WorkerProcessPool])
def test_batches_are_those_of_the_source_and_states_fit_both(make_pool, tmp_path):
    with make_pool(2) as pool:
        for name, ds in sources(tmp_path).items():
            parallel = pool.parallel_data_source(ds)
            for make in (lambda: 7, lambda: np.random.RandomState(7)):
                expected = [tree(batch) for batch in itertools.islice(ds.batch_iterator(4, shuffle=make()), 15)]
                with parallel.batch_iterator(4, shuffle=make()) as batches:
                    given = [tree(batch) for batch in itertools.islice(batches, 3)]
                    state = batches.state_dict()
                    given += [tree(batch) for batch in itertools.islice(batches, 12)]
                assert given == expected, name
                resumed = ds.batch_iterator(4, shuffle=make())
                resumed.load_state_dict(state)
                assert [tree(batch) for batch in itertools.islice(resumed, 12)] == expected[3:], name


def test_what_workers_skip_is_known_to_the_source_here():
    for pool in (WorkerThreadPool(2), WorkerProcessPool(2)):
        with pool:
            source = SampleDataSource(Flaky(), pad_collate(), errors="skip")
            for epoch in range(2):
                batches = list(pool.parallel_data_source(source).batch_iterator(8, shuffle=epoch))
                assert sum(len(y) for *_, y in batches) == 38
            assert sorted((skipped.index, skipped.error) for skipped in source.skipped) == [
                (4, "OSError: cut short"),
                (20, "OSError: cut short"),
            ]


def test_too_many_skips_of_several_workers_together_are_an_error_here():
    with WorkerProcessPool(2) as pool:
        source = SampleDataSource(Flaky(), pad_collate(), errors="skip", max_skips=1)
        with pytest.raises(TooManySkips, match="2 samples could not be read, more than max_skips=1"):
            list(pool.parallel_data_source(source).batch_iterator(8))
