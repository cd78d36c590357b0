"""Functions applied to whole data sets by workers: each sample once, in order, and a run that ended goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from support import eventually
from test_actor_pool import KEY, Bench
from test_work_pool import assert_same

from mlqueue import codec
from mlqueue.batch import actor_crew
from mlqueue.batch.data_source import ArrayDataSource, FunctionDataSource
from mlqueue.batch.errors import BatchError, SourceMismatch, StateError
from mlqueue.batch.kept import KeptRun
from mlqueue.errors import SigningKeyMissing


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    bench = Bench(tmp_path_factory.mktemp("inference"), server, signing_key=KEY)
    bench.work(queues=["batches"])
    yield bench
    bench.close()


@pytest.fixture(autouse=True)
def fresh(bench):
    bench.forget()
    (bench.folder / "cut").unlink(missing_ok=True)
    sys.modules["batch_sources"] = bench.module


@pytest.fixture
def pool(bench):
    with bench.pool() as pool:
        yield pool


def scored(bench):
    """The first samples of the batches that workers have done, in the order in which they did."""
    return [int(line.rpartition(" ")[2]) for line in bench.marks(" scored ")]


class Bar:
    """Called as tqdm is; notes what it is told. Stops with an error after so many batches."""

    def __init__(self, stop=None):
        self.seen, self.total, self.leave, self.stop = 0, None, None, stop

    def __call__(self, batches, total, leave):
        self.total, self.leave = total, leave
        for batch in batches:
            yield batch
            self.seen += 1
            if self.seen == self.stop:
                raise KeyboardInterrupt


class TestMap:
    @pytest.mark.parametrize("how", ["actor", "name", "function"])
    @pytest.mark.parametrize("shuffle", [None, 7])
    def test_results_are_those_of_the_source_itself_in_its_order(self, bench, pool, how, shuffle):
        ds = bench.module.numbers(n=203)
        actor = {"actor": bench.module.score, "name": "score", "function": lambda x, y: (x, y.sum(axis=1), y)}[how]
        found = pool.map_concat(ds, actor, 10, shuffle=shuffle)
        expected = ds.batch_map_concat(actor if how == "function" else bench.module.score.fn, 10, shuffle=shuffle)
        assert_same(expected, found)
        assert all(type(array) is np.ndarray and array.flags.writeable for array in found)

    def test_sources_without_a_name_and_dicts(self, bench, pool):
        ds = ArrayDataSource({"x": np.arange(50.0), "y": np.arange(50)})
        [found] = pool.map_concat(ds, bench.module.values_of, 7)
        np.testing.assert_array_equal(2 * np.arange(50.0), found)

    def test_a_mean_is_that_of_the_source_bit_for_bit(self, bench, pool):
        ds = bench.module.numbers(n=203)
        assert_same(ds.batch_map_mean(bench.module.total.fn, 10), pool.map_mean(ds, bench.module.total, 10))
        expected = ds.batch_map_mean(lambda x, y: y, 10, sum_axis=0, shuffle=3)
        assert_same(expected, pool.map_mean(ds, lambda x, y: y, 10, sum_axis=0, shuffle=3))

    def test_a_generator_of_each_batch_gives_the_same_every_time(self, bench, pool):
        ds = bench.module.numbers(n=50)
        one, other = (pool.map_concat(ds, "noisy", 10, shuffle=4) for _ in range(2))
        assert_same(one, other)
        alone = ds.map(lambda rows, values, rng: (bench.module.noisy.fn(rows, values, rng),))
        assert_same(alone.batch_map_concat(lambda x: x, 10, shuffle=4), one)

    def test_some_batches_arguments_and_a_bar(self, bench, pool):
        bar, ds = Bar(), bench.module.numbers(n=203)
        rows, *_ = pool.map_concat(ds, "slowly", 10, prepend_args=(0.0,), n_batches=5, progress_iter_func=bar)
        np.testing.assert_array_equal(np.arange(50), rows)
        assert (5, 5, False) == (bar.seen, bar.total, bar.leave)
        assert 5 == len(scored(bench)), "no batch is done that nobody wants"

    def test_batches_may_give_nothing(self, bench, pool):
        ds = bench.module.numbers(n=25)
        [rows] = pool.map_concat(ds, bench.module.odd_ones, 5)
        np.testing.assert_array_equal([*range(5, 10), *range(15, 20)], rows)
        assert pool.map_concat(ds, lambda x, y: None, 5) is None
        assert pool.map_mean(ds, lambda x, y: None, 5) is None
        assert pool.map_concat(ds, "score", 5, n_batches=0) is None

    def test_an_actor_that_only_workers_have(self, bench, pool):
        [rows] = pool.map_concat(bench.module.numbers(n=25), "only_workers", 5)
        np.testing.assert_array_equal(np.arange(25) + 1, rows)

    def test_without_workers_it_is_done_here(self, bench):
        with bench.pool(queue_name="nobody", alone_after=0.1) as pool:
            [rows, *_] = pool.map_concat(bench.module.numbers(n=25), bench.module.score, 5)
            np.testing.assert_array_equal(np.arange(25), rows)
            with pytest.raises(BatchError, match="'only_workers' is not declared here"):
                pool.map_concat(bench.module.numbers(n=25), "only_workers", 5)

    def test_a_worker_that_is_killed_costs_nothing(self, bench, pool):
        def kill(batches, total, leave):
            for number, batch in enumerate(batches):
                yield batch
                if number == 10:
                    os.kill(int(bench.marks(" scored ")[-1].split()[0]), signal.SIGKILL)

        rows, *_ = pool.map_concat(
            bench.module.numbers(n=400), "slowly", 10, prepend_args=(0.002,), progress_iter_func=kill
        )
        np.testing.assert_array_equal(np.arange(400), rows)

    def test_without_a_key_names_are_served_and_code_is_not(self, bench, monkeypatch):
        with bench.pool() as pool:
            monkeypatch.setattr(pool._crew, "_keys", ())
            [rows, *_] = pool.map_concat(bench.module.numbers(n=25), "score", 5)
            np.testing.assert_array_equal(np.arange(25), rows)
            with pytest.raises(SigningKeyMissing):
                pool.map_concat(bench.module.numbers(n=25), lambda x, y: x, 5)


class TestErrors:
    def test_an_exception_is_raised_with_the_sample_indices(self, bench, pool):
        (bench.folder / "cut").touch()
        with pytest.raises(ValueError, match="sample is cut") as raised:
            pool.map_concat(bench.module.numbers(n=50), "cut", 5, prepend_args=(22,))
        assert "sample indices [20 21 22 23 24]" in "".join(raised.value.__notes__)

    def test_what_cannot_be_joined_is_an_error_of_its_batch(self, bench, pool):
        ds = bench.module.numbers(n=10)
        with pytest.raises(TypeError, match=r"must return arrays.* got a str"):
            pool.map_concat(ds, "texts", 5)
        with pytest.raises(TypeError, match="cannot travel in a batch"):
            pool.map_concat(ds, "objects", 5)
        with pytest.raises(ValueError, match="sum_axis"):
            pool.map_mean(ds, lambda x, y: x.sum(), 5, sum_axis=0)

    def test_what_is_no_function_for_batches_is_refused_here(self, bench, pool):
        ds = bench.module.numbers(n=10)
        with pytest.raises(TypeError, match="is async"):
            pool.map_concat(ds, bench.module.asynchronous, 5)
        with pytest.raises(TypeError, match="or a function is needed, got a int"):
            pool.map_concat(ds, 3, 5)
        with pytest.raises(ValueError, match="never ends"):
            pool.map_concat(ArrayDataSource([np.arange(5)], repeats=-1), "score", 5)

    @pytest.mark.parametrize(
        ("name", "message"), [("nowhere", "no actor 'nowhere'"), ("other_code", "has other code in this worker")]
    )
    def test_an_actor_that_workers_lack_or_have_in_another_version(self, bench, pool, monkeypatch, name, message):
        monkeypatch.setattr(actor_crew, "REFUSED_FOR", 0.1)
        with pytest.raises(SourceMismatch, match=message):
            pool.map_concat(bench.module.numbers(n=10), name, 5)


class TestResume:
    def run(self, bench, pool, folder, stop=None, actor="slowly", n=400, batch_size=10, **options):
        bar = Bar(stop)
        ended = pytest.raises(KeyboardInterrupt) if stop else contextlib.nullcontext()
        options = {"prepend_args": (0.0,), "batch_buffer_size": 4, **options}
        with ended:
            return bar, pool.map_concat(
                bench.module.numbers(n=n), actor, batch_size, resume=folder, progress_iter_func=bar, **options
            )
        return bar, None

    @pytest.mark.parametrize("shuffle", [None, 7])
    def test_a_run_that_was_stopped_goes_on_where_it_was(self, bench, pool, tmp_path, shuffle):
        for stop in (3, 17, 18):
            self.run(bench, pool, tmp_path / "run", stop, shuffle=shuffle)
        bar, found = self.run(bench, pool, tmp_path / "run", shuffle=shuffle)
        done = scored(bench)
        expected = bench.module.numbers(n=400).batch_map_concat(bench.module.score.fn, 10, shuffle=shuffle)
        assert_same(expected, tuple(map(np.asarray, found)))
        assert (40, 40) == (bar.seen, bar.total), "those of before are counted"
        assert len(done) <= 40 + 3 * 4, "only what was under way is done again"
        assert all(not array.flags.writeable for array in found)
        np.testing.assert_array_equal(expected[1], np.load(tmp_path / "run" / "1.npy"))

    def test_a_run_that_has_ended_is_given_again(self, bench, pool, tmp_path):
        _, first = self.run(bench, pool, tmp_path / "run")
        done = len(scored(bench))
        with bench.pool(queue_name="nobody", alone_after=None) as idle:
            _, again = self.run(bench, idle, tmp_path / "run")
        assert_same(tuple(map(np.asarray, first)), tuple(map(np.asarray, again)))
        assert done == len(scored(bench)) == 40

    def test_a_batch_that_failed_is_done_again(self, bench, pool, tmp_path):
        (bench.folder / "cut").touch()
        with pytest.raises(ValueError, match="sample is cut"):
            self.run(bench, pool, tmp_path / "run", actor="cut", prepend_args=(205,))
        with pytest.raises(ValueError, match="sample is cut"):
            self.run(bench, pool, tmp_path / "run", actor="cut", prepend_args=(205,))
        before = set(scored(bench))
        (bench.folder / "cut").unlink()
        bench.forget()
        _, (rows, *_) = self.run(bench, pool, tmp_path / "run", actor="cut", prepend_args=(205,))
        np.testing.assert_array_equal(np.arange(400), rows)
        assert min(scored(bench)) == 200
        assert set(range(0, 200, 10)) <= before

    def test_a_mean_goes_on_too(self, bench, pool, tmp_path):
        ds = bench.module.numbers(n=203)
        with pytest.raises(KeyboardInterrupt):
            list(pool.map_mean(ds, "total", 10, resume=tmp_path / "run", progress_iter_func=Bar(7)))
        found = pool.map_mean(ds, "total", 10, resume=tmp_path / "run")
        assert_same(ds.batch_map_mean(bench.module.total.fn, 10), found)
        assert_same(found, pool.map_mean(ds, "total", 10, resume=tmp_path / "run"))

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"batch_size": 20}, "batch size: 10 then, 20 now"),
            ({"n": 401}, r"source: numbers\(n=400\) then, numbers\(n=401\) now"),
            ({"shuffle": 7}, "order: its own then, shuffle=7 now"),
            ({"n_batches": 7}, "number of batches: all then, 7 now"),
            ({"prepend_args": (0.001,)}, "prepend_args: "),
            ({"actor": "cut"}, "function: slowly then, cut now"),
        ],
    )
    def test_a_run_of_something_else_is_refused(self, bench, pool, tmp_path, changed, told):
        self.run(bench, pool, tmp_path / "run", 3)
        with pytest.raises(StateError, match=told):
            self.run(bench, pool, tmp_path / "run", **changed)
        assert 400 == len(self.run(bench, pool, tmp_path / "run")[1][0])

    def test_data_that_have_changed_are_refused(self, bench, pool, tmp_path):
        kinds = {
            "in memory": lambda x: ArrayDataSource([x]),
            "mapped": lambda x: np.save(tmp_path / "x.npy", x) or bench.module.mapped_file(path=f"{tmp_path}/x.npy"),
            "by a function": lambda x: FunctionDataSource(
                (lambda indices: (np.sin(indices),)) if x[0] else (lambda indices: (np.cos(indices),)), 400
            ),
        }
        for kind, make in kinds.items():
            for value in (0, 0, 1):
                ds = make(np.full(400, value))
                refused = (
                    pytest.raises(StateError, match="version of the source") if value else contextlib.nullcontext()
                )
                with refused:
                    pool.map_concat(ds, lambda x: x, 50, resume=tmp_path / kind)

    def test_what_was_written_behind_the_last_save_is_cut_off(self, bench, pool, tmp_path):
        self.run(bench, pool, tmp_path / "run", 11)
        with (tmp_path / "run" / "0.npy").open("ab") as file:
            file.write(b"half a bat")
        _, (rows, *_) = self.run(bench, pool, tmp_path / "run")
        np.testing.assert_array_equal(np.arange(400), rows)

    def test_a_folder_that_is_damaged_or_in_use_is_refused(self, bench, pool, tmp_path):
        self.run(bench, pool, tmp_path / "run", 11)
        with KeptRun(tmp_path / "other", {}), pytest.raises(BatchError, match="another process writes"):
            self.run(bench, pool, tmp_path / "other")
        os.truncate(tmp_path / "run" / "1.npy", 150)
        with pytest.raises(StateError, match=r"1\.npy is cut short"):
            self.run(bench, pool, tmp_path / "run")
        (tmp_path / "run" / "1.npy").unlink()
        with pytest.raises(StateError, match=r"1\.npy is gone"):
            self.run(bench, pool, tmp_path / "run")
        (tmp_path / "run" / "run").write_bytes(b"nothing")
        with pytest.raises(StateError, match="cannot be read"):
            self.run(bench, pool, tmp_path / "run")

    def test_results_of_another_kind_are_refused(self, bench, pool, tmp_path):
        ds = bench.module.numbers(n=20)
        with pytest.raises(ValueError, match="return the same from every batch"):
            pool.map_concat(ds, lambda x, y: x.astype("f4") if x[0] else x, 5, resume=tmp_path / "dtypes")
        with pytest.raises(ValueError, match="2 results for the batches before, and 1"):
            pool.map_concat(ds, lambda x, y: x if x[0] else (x, y), 5, resume=tmp_path / "numbers")

    def test_every_kind_of_array_is_kept(self, pool, tmp_path):
        records = np.zeros(30, [("x", "f4", (2,)), ("t", "M8[s]"), ("name", "U5")])
        records["x"], records["name"] = np.arange(60).reshape(30, 2), "ä"
        ds = ArrayDataSource([records, np.zeros((30, 0)), np.arange(30).astype("m8[D]")])
        found = pool.map_concat(ds, lambda *parts: parts, 7, resume=tmp_path / "run")
        again = pool.map_concat(ds, lambda *parts: parts, 7, resume=tmp_path / "run")
        for expected, one, other in zip(ds.data, found, again, strict=True):
            assert expected.dtype == one.dtype == other.dtype
            np.testing.assert_array_equal(expected, one)
            np.testing.assert_array_equal(expected, other)


#: Does all of it, and prints what it has.
TRAINER = """
import json, sys
import batch_sources as module
from mlqueue.batch import kept
from mlqueue.batch.actor_pool import ActorPool
kept.SAVE_EVERY = 0.05
with ActorPool(module.mlq, workers=2, alone_after=None) as pool:
    rows, *_ = pool.map_concat(module.numbers(n=3000), "slowly", 10, resume="run", prepend_args=(0.01,))
print(json.dumps(rows.tolist()))
"""


def test_a_trainer_that_is_killed_goes_on_each_sample_once(bench):
    environment = {**bench.site.environment, "BATCH_TESTS_TRAINER": "1"}

    def start():
        return subprocess.Popen(
            [sys.executable, "-c", TRAINER], cwd=bench.folder, env=environment, stdout=subprocess.PIPE
        )

    def kept():
        with contextlib.suppress(FileNotFoundError):
            return codec.decode((bench.folder / "run" / "run").read_bytes())["batches"]
        return 0

    with start() as trainer:
        assert eventually(lambda: kept() > 20 or trainer.poll() is not None)
        trainer.kill()
    done = kept()
    assert 20 < done < 300
    bench.forget()
    with start() as trainer:
        rows = json.loads(trainer.communicate(timeout=60)[0])
    assert list(range(3000)) == rows
    # What the workers had begun for the one that was killed may stand there twice.
    assert set(scored(bench)) == set(range(10 * done, 3000, 10)), "it goes on where it was"
