"""Pools of actors: the batches of the source, in its order, from real workers, whatever happens to those."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import eventually
from test_work_pool import SHUFFLES, assert_same
from worker_processes import Site

from mlqueue import codec
from mlqueue.batch import links, serving
from mlqueue.batch.actor_crew import Desk, Source, Terms, as_bytes
from mlqueue.batch.actor_pool import ActorPool
from mlqueue.batch.crew import BatchCall, Call
from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.errors import SourceFailed, SourceMismatch
from mlqueue.batch.transport import Segment, TransportError
from mlqueue.batch.ways import Doors
from mlqueue.batch.work_pool import WorkerDied, WorkerError
from mlqueue.errors import SigningKeyMissing
from mlqueue.named import NamedSource

#: Weighted samples cannot be drawn in order, and without a seed noise is to differ.
NEEDS_SEED = {"weighted", "mapped with noise", "noisy parts"}
KEY = "a key for the tests of pools"
HERE = Path(__file__).parent


class Bench:
    """A folder of a user, workers that serve its batches, and its module as the trainer has it."""

    def __init__(self, folder, server, **options):
        os.chmod(folder, 0o700)
        self.site = Site(folder, server, **options)
        self.folder = folder
        shutil.copy(HERE / "batch_sources.py", folder / "batch_sources.py")
        self.site.environment |= {"BATCH_TESTS_NAMESPACE": self.site.namespace, "BATCH_TESTS_FOLDER": str(folder)}
        with mock.patch.dict(os.environ, {**self.site.environment, "BATCH_TESTS_TRAINER": "1"}):
            spec = importlib.util.spec_from_file_location("batch_sources", folder / "batch_sources.py")
            self.module = importlib.util.module_from_spec(spec)
            sys.modules["batch_sources"] = self.module  # what its functions are pickled by
            spec.loader.exec_module(self.module)
        self.mlq = self.module.mlq

    def work(self, processes=2, threads=1, **options):
        return self.site.supervise("batch_sources", processes=processes, threads=threads, **options)

    def pool(self, **options):
        return ActorPool(self.mlq, **{"workers": 2, "alone_after": None, **options})

    def marks(self, text):
        return [line for line in self.module.marks() if text in line]

    def jobs(self, queue="batches"):
        """The jobs of places at trainers' that the store knows."""
        return [record.id for record in self.mlq.store.scan(queue=queue) if record.actor.startswith("mlqueue.")]

    def forget(self):
        with contextlib.suppress(FileNotFoundError):
            (self.folder / "marks").unlink()

    def close(self):
        self.mlq.close()
        self.site.close()


@pytest.fixture(scope="module")
def bench(tmp_path_factory, server):
    bench = Bench(tmp_path_factory.mktemp("bench"), server, signing_key=KEY)
    bench.work(queues=["batches"])
    yield bench
    bench.close()


@pytest.fixture(scope="module")
def plain(tmp_path_factory, server):
    """As bench, without a key; one process of four threads."""
    plain = Bench(tmp_path_factory.mktemp("plain"), server)
    plain.work(processes=1, threads=4)
    yield plain
    plain.close()


@pytest.fixture(autouse=True)
def fresh(request):
    for name in {"bench", "plain"} & set(request.fixturenames):
        request.getfixturevalue(name).forget()


@pytest.fixture
def pool(bench):
    sys.modules["batch_sources"] = bench.module
    with bench.pool() as pool:
        yield pool


@pytest.fixture
def pools(bench):
    """By their number of workers."""
    sys.modules["batch_sources"] = bench.module
    with bench.pool(workers=1) as one, bench.pool(workers=2) as two:
        yield {1: one, 2: two}


class TestBatches:
    @pytest.mark.parametrize("how", ["by name", "pickled"])
    def test_every_kind_of_source_gives_its_own_batches_in_its_order(self, bench, pool, how):
        for kind, make in bench.module.SOURCES.items():
            ds = bench.module.any_source(kind=kind) if how == "by name" else make()
            for name, shuffle in SHUFFLES.items():
                if name == "in order" and kind in NEEDS_SEED:
                    continue
                expected = itertools.islice(make().batch_iterator(16, shuffle=shuffle()), 14)
                with pool.parallel_data_source(ds, 6).batch_iterator(16, shuffle=shuffle()) as batches:
                    for one, other in itertools.zip_longest(expected, itertools.islice(batches, 14)):
                        assert_same(one, other)
        made = bench.marks("made any arrays")
        assert len({line for line in made if not line.startswith(f"{os.getpid()} ")}) <= 2
        assert len(made) <= 3, "once in each process"

    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def test_any_source_size_buffer_seed_and_number_of_workers(self, bench, pools, data):
        pool = pools[data.draw(st.sampled_from([1, 2]), "workers")]
        kind = data.draw(st.sampled_from(sorted(set(bench.module.SOURCES) - {"weighted"})))
        size, ahead = data.draw(st.integers(1, 70)), data.draw(st.integers(1, 30))
        seeds = st.integers(0, 9) if kind in NEEDS_SEED else st.none() | st.integers(0, 9)
        seed, most = data.draw(seeds), data.draw(st.integers(1, 40))
        copy = data.draw(st.booleans())
        expected = itertools.islice(bench.module.SOURCES[kind]().batch_iterator(size, shuffle=seed), most)
        ds = pool.parallel_data_source(bench.module.any_source(kind=kind), ahead, copy=copy)
        with ds.batch_iterator(size, shuffle=seed) as batches:
            for one, other in itertools.zip_longest(expected, itertools.islice(batches, most)):
                assert_same(one, other)

    def test_batches_are_arrays_of_ones_own_or_views_until_the_next(self, bench, pool):
        ds = bench.module.any_source(kind="arrays")
        kept = list(pool.parallel_data_source(ds).batch_iterator(50))
        for (x, y), (a, b) in zip(kept, ds.batch_iterator(50), strict=True):
            np.testing.assert_array_equal(x, a)
            np.testing.assert_array_equal(y, b)
            x += 1
        views = pool.parallel_data_source(bench.module.SOURCES["mapped"](), copy=False).batch_iterator(50)
        x, _ = next(views)
        with pytest.raises(ValueError, match="read-only"):
            x += 1
        views.close()

    def test_what_is_drawn_from_the_global_generators_depends_on_the_batch_alone(self, bench, pool):
        ds = bench.module.drawn()
        first = list(pool.parallel_data_source(ds).batch_iterator(10, shuffle=3))
        with bench.pool(workers=1) as other:
            again = list(other.parallel_data_source(ds).batch_iterator(10, shuffle=3))
        for one, two in zip(first, again, strict=True):
            assert_same(one, two)
        assert len({float(x[0, 0]) for x, _ in first}) > 15

    def test_a_state_resumes_in_another_pool_and_without_one(self, bench, pool):
        ds = bench.module.any_source(kind="mapped with noise")
        expected = list(ds.batch_iterator(16, shuffle=5))
        with pool.parallel_data_source(ds).batch_iterator(16, shuffle=5) as batches:
            for number in range(4):
                assert_same(expected[number], next(batches))
            state = batches.state_dict()
        with pool.parallel_data_source(ds, 3).batch_iterator(16, shuffle=5) as batches:
            batches.load_state_dict(state)
            assert_same(expected[4:], list(batches))
        serial = ds.batch_iterator(16, shuffle=5)
        serial.load_state_dict(state)
        assert_same(expected[4:], list(serial))

    def test_many_epochs_need_no_more_slots_and_no_more_descriptors_than_few(self, bench, pool):
        def descriptors(pid):
            found = 0
            for link in Path(f"/proc/{pid}/fd").glob("*"):
                with contextlib.suppress(OSError):
                    found += "memfd" in os.readlink(link)
            return found

        for epoch in range(150):
            source = bench.module.any_source(kind="mapped")  # each epoch another one, which is the same to workers
            batches = pool.parallel_data_source(source, 6).batch_iterator(30, shuffle=1, epoch=epoch)
            for _ in itertools.islice(batches, epoch % 8):
                pass
            del batches
        desk = pool._crew.desk
        eventually(lambda: not desk.leases)
        assert len(desk.arena.slots) <= 24
        pids = [os.getpid(), *(place.peer.pid for place in desk.places.values())]
        # Two for each slot; each source has two as well, as long as it is there.
        assert eventually(lambda: max(map(descriptors, pids)) < 100)

    def test_work_ahead_is_bounded_by_the_buffer(self, bench, pool):
        ds = pool.parallel_data_source(bench.module.faulty(how="none", n=500), 7)
        before = pool.stats().prepared
        with ds.batch_iterator(5) as batches:
            next(batches)
            eventually(lambda: pool.stats().prepared - before == 8)
            threading.Event().wait(0.1)
            assert pool.stats().prepared - before == 8

    def test_several_trainers_share_the_workers(self, bench, pool):
        ds = bench.module.drawn()
        expected = list(pool.parallel_data_source(ds).batch_iterator(20, shuffle=1))
        with bench.pool() as other, bench.pool() as third:
            iterators = [each.parallel_data_source(ds).batch_iterator(20, shuffle=1) for each in (other, third)]
            pool_given = list(pool.parallel_data_source(ds).batch_iterator(20, shuffle=1))
            for given_ in (pool_given, list(iterators[0]), list(iterators[1])):
                assert_same(expected, given_)


class TestTasks:
    def test_results_come_in_order_and_of_any_kind(self, bench, pool):
        with pool.work_stream(((lambda i=i: {"i": i, "set": {i}}),) for i in range(20)) as stream:
            assert [{"i": i, "set": {i}} for i in range(20)] == list(stream)

    def test_a_shared_constant_is_sent_once(self, bench, pool):
        table = np.arange(1000)
        shared = pool.shared_constant(table)
        tasks = [(lambda constant, i: float(constant[i]), (shared, i)) for i in range(10)]
        assert [float(i) for i in range(10)] == list(pool.work_stream(tasks))

    def test_an_error_is_raised_where_the_result_would_be(self, bench, pool):
        with pool.work_stream([(len, ("ab",)), (int, ("x",)), (len, ("abc",))]) as stream:
            assert 2 == next(stream)
            with pytest.raises(ValueError, match="invalid literal"):
                next(stream)
            assert 3 == next(stream)


class TestErrors:
    def numbers(self, bench, pool, how, **options):
        """The first samples of the batches of 5 that come, errors in their place."""
        batches = pool.parallel_data_source(bench.module.faulty(how=how, **options)).batch_iterator(5)
        found = []
        while True:
            try:
                found.append(int(next(batches)[0][0]))
            except StopIteration:
                return found
            except Exception as error:
                found.append(error)

    def test_an_exception_is_raised_in_its_place_with_the_sample_indices(self, bench, pool):
        found = self.numbers(bench, pool, "raise")
        error = found.pop(10)
        assert [*range(0, 50, 5), *range(55, 100, 5)] == found
        assert isinstance(error, ValueError)
        assert "sample is cut" in str(error)
        assert "sample indices [50 51 52 53 54]" in "".join(error.__notes__)
        assert "in fail" in "".join(error.__notes__)

    def test_an_error_of_the_users_own_class_comes_as_itself_where_a_key_is_set(self, bench, pool):
        error = self.numbers(bench, pool, "own error")[10]
        assert isinstance(error, bench.module.OwnError)

    def test_skip_leaves_the_batch_out_and_counts_it(self, bench):
        with bench.pool(errors="skip") as pool:
            assert [*range(0, 50, 5), *range(55, 100, 5)] == self.numbers(bench, pool, "raise")
            assert 1 == pool.stats().skipped

    def test_retry_prepares_it_again(self, bench):
        with bench.pool(errors="retry") as pool:
            assert [*range(0, 100, 5)] == self.numbers(bench, pool, "raise once")
            assert 1 == pool.stats().retries
            assert isinstance(self.numbers(bench, pool, "raise")[10], ValueError)
            assert 3 == len(bench.marks("fault raise")) - len(bench.marks("fault raise once"))

    def test_a_batch_whose_worker_dies_is_prepared_by_another(self, bench, pool):
        before = pool.stats().retries
        assert [*range(0, 100, 5)] == self.numbers(bench, pool, "kill once")
        assert pool.stats().retries > before

    def test_a_batch_that_ends_two_workers_is_an_error(self, bench):
        with bench.pool() as pool:
            found = self.numbers(bench, pool, "kill")
            assert isinstance(found[10], WorkerDied)
            assert "sample indices [50 51 52 53 54]" in str(found[10])
            assert [*range(0, 50, 5), *range(55, 100, 5)] == found[:10] + found[11:]
            assert 2 == len(bench.marks("fault kill"))

    def test_a_worker_that_is_stopped_delays_by_a_lease_not_more(self, bench):
        with bench.pool(lease=0.4) as pool:
            begun = time.monotonic()
            assert [*range(0, 100, 5)] == self.numbers(bench, pool, "stop once")
            assert time.monotonic() - begun < 5
        for line in bench.marks("fault stop once"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(line.split()[0]), signal.SIGCONT)

    def test_a_straggler_is_prepared_twice_where_that_is_asked_for(self, bench):
        with bench.pool(stragglers=20, lease=0.4) as pool:
            begun = time.monotonic()
            assert [*range(0, 100, 5)] == self.numbers(bench, pool, "slow once", seconds=0.01)
            assert time.monotonic() - begun < 10
        for line in bench.marks("fault slow once")[:1]:
            os.kill(int(line.split()[0]), signal.SIGKILL)  # it sleeps, and would hold up the tests that follow

    def test_a_source_that_cannot_be_made_is_an_error(self, bench, pool):
        with mock.patch.dict(os.environ, {"BATCH_TESTS_TRAINER": "1"}):
            ds = bench.module.broken()
        with pytest.raises(SourceFailed, match="OSError: the disk is gone"):
            next(pool.parallel_data_source(ds).batch_iterator(5))

    def test_a_source_of_which_workers_have_another_version_is_an_error(self, bench, pool):
        with pytest.raises(SourceMismatch, match="'changed' is of version"):
            next(pool.parallel_data_source(bench.module.changed()).batch_iterator(5))

    def test_a_source_is_made_again_when_its_version_changes(self, bench, pool):
        for value in (1, 2, 2, 1):
            (bench.folder / "data").write_text(str(value))
            ds = pool.parallel_data_source(bench.module.file_source())
            assert {value} == {int(v) for (batch,) in ds.batch_iterator(5) for v in batch}


class TestCode:
    def test_without_a_key_a_plain_source_is_refused_and_one_with_a_name_is_served(self, plain):
        with plain.pool() as pool:
            with pytest.raises(SigningKeyMissing, match=r"_KEY.*@mlq.data_source.*ArrayDataSource has none"):
                pool.parallel_data_source(ArrayDataSource([np.arange(5)])).batch_iterator(2)
            with pytest.raises(SigningKeyMissing):
                pool.work_stream([(len, ("ab",))])
            ds = plain.module.any_source(kind="mapped with noise")
            given_ = pool.parallel_data_source(ds).batch_iterator(20, shuffle=1)
            assert_same(list(ds.batch_iterator(20, shuffle=1)), list(given_))
            error = TestErrors().numbers(plain, pool, "own error")[10]
            assert isinstance(error, WorkerError)
            assert "OwnError: of ours" in str(error)

    def test_a_worker_with_another_key_loads_nothing(self, bench):
        pool = bench.pool()
        pool._crew._keys = ("another key of the tests",)
        with pool, pytest.raises(SourceMismatch, match="signature"):
            next(pool.parallel_data_source(ArrayDataSource([np.arange(5)])).batch_iterator(2))


class TestWorkers:
    def test_a_worker_with_many_threads_has_one_place_at_a_trainers(self, plain):
        with plain.pool(workers=3) as pool:
            ds = plain.module.drawn()
            assert len(list(pool.parallel_data_source(ds).batch_iterator(5, shuffle=1))) == 41
            assert 1 == pool.stats().workers

    def test_a_drained_worker_goes_without_a_retry(self, bench):
        first = bench.work(processes=1, queues=["drained"])
        second = bench.work(processes=1, queues=["drained"], ready=False)
        with bench.pool(queue_name="drained", workers=1) as pool:
            source = bench.module.faulty(how="none", seconds=0.05, n=200)
            batches = pool.parallel_data_source(source).batch_iterator(5)
            found = [int(next(batches)[0][0])]
            second.wait_ready(1)
            first.stop()
            found += [int(batch[0]) for batch, _ in batches]
            assert [*range(0, 200, 5)] == found
            assert 0 == pool.stats().retries
        second.stop()

    def test_without_workers_the_trainer_prepares_them_itself(self, bench, caplog):
        state = np.random.get_state()[1].copy()
        with bench.pool(queue_name="nobody", alone_after=0.6) as pool:
            ds = bench.module.any_source(kind="mapped with noise")
            begun = time.monotonic()
            given_ = list(pool.parallel_data_source(ds).batch_iterator(50, shuffle=2))
            assert time.monotonic() - begun < 2 * 0.6 + 1, "its patience is spent once, not for each batch"
            assert_same(list(ds.batch_iterator(50, shuffle=2)), given_)
            assert 5 == pool.stats().here
            assert "mlqueue worker MODULE" in caplog.text
            assert bench.jobs("nobody")
        np.testing.assert_array_equal(state, np.random.get_state()[1])
        assert [] == bench.jobs("nobody")

    def test_other_jobs_of_a_worker_have_their_turn(self, bench):
        with bench.pool(slice=0.3) as pool:
            source = bench.module.faulty(how="none", seconds=0.05, n=2000)
            batches = pool.parallel_data_source(source).batch_iterator(5)
            next(batches)
            job = bench.mlq.submit("other", queue_name="batches")
            count = sum(1 for _ in itertools.takewhile(lambda _: not job.state.ended, batches))
            assert 7 == job.result(timeout=1)
            assert count < 100
            batches.close()


@pytest.fixture
def new_desk():
    """Opens desks of two places, whose workers are made here, by hand."""
    made = []

    def open_desk(lease=0.1, **terms):
        listener = links.HostListener()
        made.append(Desk(Terms(workers=2, lease=lease, **terms), (), Doors([listener], listener.token)))
        return made[-1]

    yield open_desk
    for each in made:
        each.close()


class Hand:
    """A worker whose every step is the test's."""

    def __init__(self, desk):
        with mock.patch.object(links, "PROCESS", uuid.uuid4().bytes):  # each as if in a process of its own
            host = desk.listener.address["host"]
            self.link = links.HostLink(host["socket"], host["token"], "job")

    def order(self, timeout=5):
        """The next lease."""
        while (order := self.link.receive(timeout)) is not None and order.kind == links.SOURCE:
            os.close(order.fd)
        assert order is not None
        assert order.kind == links.LEASE
        return order

    def fill(self, order, value):
        """Prepares what an order says, if it still may: 100,000 bytes of one value. Where its description is."""
        if self.link.claim(order) is None:
            return None
        writer = self.link.place(order)
        array = writer.empty(100_000, np.uint8)
        array[:] = value
        return writer.write((array,))

    def answer(self, order, value):
        self.link.deliver(links.DONE, order, *self.fill(order, value))


def give(desk, source=None):
    """A lease for nothing in particular."""
    return desk.give_out(Call(len, ("ab",)) if source is None else BatchCall(source, np.arange(2), (1, 0, 0)), b"do it")


def read(desk, lease):
    assert lease.ready.acquire(timeout=5)
    with desk.lock:
        return desk.arena.read(*lease.filled, "view")[0]


class TestRaces:
    """What a worker does that is late, by workers that are made by hand."""

    def test_a_worker_that_was_cut_off_writes_into_no_slot_that_is_used_again(self, new_desk):
        desk = new_desk(lease=0.05)
        late = Hand(desk)
        leases = [give(desk), give(desk)]
        # It has not said a word, and its orders are still on their way when the trainer has given up the batches.
        eventually(lambda: desk.stats.retries >= 2 and not desk.places)
        desk.abandoned.extend(leases)
        desk.wake()
        eventually(lambda: not desk.leases)
        orders = [late.order(), late.order()]
        begun = [order for order in orders if late.link.claim(order) is not None]
        assert begun, "this is what must do no harm"
        held = [give(desk), give(desk)]
        fresh = Hand(desk)
        for value in (3, 5):
            fresh.answer(fresh.order(), value)
        for order in begun:
            late.link.place(order).empty(100_000, np.uint8)[:] = 77
        assert [{3}, {5}] == [set(read(desk, lease).tolist()) for lease in held]
        late.link.close()
        fresh.link.close()

    def test_workers_that_are_silent_keep_no_place_from_others(self, new_desk):
        desk = new_desk(lease=0.3)
        silent = [Hand(desk), Hand(desk)]
        lease = give(desk)
        eventually(lambda: [place.stalled for place in desk.places.values()] == [True, True])
        other = Hand(desk)
        other.answer(other.order(), 9)
        assert {9} == set(read(desk, lease).tolist())
        for hand in (*silent, other):
            hand.link.close()

    def test_what_one_worker_loses_and_a_silent_one_has_goes_to_a_third(self, new_desk):
        desk = new_desk(lease=1)
        silent = Hand(desk)
        lease = give(desk)
        assert lease.number == silent.order().number
        eventually(lambda: all(place.stalled for place in desk.places.values()))
        second = Hand(desk)
        assert lease.number == second.order().number
        second.link.close()
        third = Hand(desk)
        order = third.order(timeout=2)  # before the silent one is cut off
        third.answer(order, 4)
        assert {4} == set(read(desk, lease).tolist())
        silent.link.close()
        third.link.close()

    def test_what_no_worker_can_take_holds_up_nothing_else(self, new_desk):
        desk = new_desk(lease=5)
        refused, wanted = (
            SimpleNamespace(number=number, segment=Segment.create(), place=0, length=0, how=1) for number in (1, 2)
        )
        hand = Hand(desk)
        leases = [give(desk, refused), give(desk, refused), give(desk, wanted)]
        for order in (hand.order(), hand.order()):
            assert hand.link.claim(order)
            hand.link.deliver(links.REFUSED, order, *hand.link.place(order).write({"text": "not here"}))
        assert leases[2].number == hand.order(timeout=1).number, "before the others are given up"
        hand.link.close()

    def test_what_waits_behind_a_long_batch_goes_to_a_worker_that_has_nothing_to_do(self, new_desk):
        desk = new_desk(lease=5)
        busy = Hand(desk)
        long, behind = give(desk), give(desk)
        first = busy.order()
        assert (long.number, True) == (first.number, busy.link.claim(first) is not None)
        free = Hand(desk)
        order = free.order()
        assert behind.number == order.number
        second = busy.order()
        assert (behind.number, None) == (second.number, busy.link.claim(second))
        busy.link.deliver(links.SKIPPED, second)
        free.answer(order, 6)
        assert {6} == set(read(desk, behind).tolist())
        assert 0 == desk.stats.retries
        busy.link.close()
        free.link.close()

    def test_a_lease_for_which_there_is_no_memory_is_an_error_and_the_next_is_not(self, new_desk):
        desk = new_desk(lease=5)
        hand = Hand(desk)
        eventually(lambda: any(place.known for place in desk.places.values()))
        with mock.patch.object(desk.arena, "take", side_effect=TransportError("there is no memory")):
            poor = give(desk)
        assert "there is no memory" in str(poor.error)
        lease = give(desk)
        hand.answer(hand.order(), 1)
        assert {1} == set(read(desk, lease).tolist())
        hand.link.close()

    def test_what_was_to_be_prepared_by_the_trainer_goes_to_a_worker_when_that_was_interrupted(self, new_desk):
        desk = new_desk(lease=5)
        lease = give(desk)
        lease.here = True
        hand = Hand(desk)
        eventually(lambda: any(place.known for place in desk.places.values()))
        with desk.lock:
            desk.take_back(lease)
        hand.answer(hand.order(), 2)
        assert {2} == set(read(desk, lease).tolist())
        hand.link.close()

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_desk_that_has_failed_says_so_and_lets_nobody_wait(self, new_desk):
        desk = new_desk(lease=0.1)
        lease = give(desk)
        with mock.patch.object(desk, "_look", side_effect=LookupError("a fault of ours")):
            assert lease.ready.acquire(timeout=5)
        assert isinstance(lease.error, LookupError)
        with pytest.raises(RuntimeError, match="the pool has failed"):
            give(desk)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_desk_fails_with_what_another_thread_met_that_took_up_what_a_worker_told(self, new_desk):
        desk = new_desk(lease=60)
        lease = give(desk)
        hand = Hand(desk)
        [place] = eventually(lambda: [place for place in desk.places.values() if place.known])
        with mock.patch.object(desk, "_read", side_effect=LookupError("a fault of ours")):
            with desk.lock:  # else the desk may have it, and nothing be taken up
                desk._take_up(place)
            assert lease.ready.acquire(timeout=5)
        assert isinstance(lease.error, LookupError)
        with pytest.raises(RuntimeError, match="the pool has failed"):
            give(desk)
        hand.link.close()

    def test_a_desk_that_is_closed_rings_at_nobody_elses_descriptor(self, new_desk):
        desk = new_desk()
        desk.close()
        pipes = [os.pipe() for _ in range(12)]  # they take the numbers that have become free
        desk.wake()
        assert [] == select.select([reader for reader, _ in pipes], [], [], 0)[0]
        for fd in itertools.chain(*pipes):
            os.close(fd)

    def test_a_pool_that_is_dropped_while_its_lock_is_held_closes_without_a_wait(self, bench):
        pool = bench.pool(queue_name="nobody")
        desk = pool._crew.desk
        with desk.lock:
            del pool  # as the garbage collector may do, in any thread at any moment
            gc.collect()
        eventually(lambda: desk.closed)

    def test_a_source_that_was_let_go_while_its_place_goes_on_is_made_again(self):
        made = []

        def factory():
            made.append(ArrayDataSource([np.arange(4)]))
            return made[-1]

        source = NamedSource("it", factory)
        kwargs = codec.encode({})
        described = {
            "name": "it",
            "kwargs": as_bytes(kwargs),
            "version": source.version(kwargs),
            "files": as_bytes(codec.encode(["here", []])),
        }
        sent = Source(1, None, described, serving.NAMED)
        worker = serving.Serving(mock.Mock(), {"it": source}, {}, (), mock.Mock())
        worker._obey(links.Order(links.SOURCE, 1, 0, sent.place, sent.length, sent.how, os.dup(sent.segment.fd)))
        assert worker.constant(1) is worker.constant(1)
        [only] = made
        gone = weakref.ref(only)
        made.clear()
        del only
        serving.shelf.drop()
        worker.tidy()
        assert gone() is None
        assert worker.constant(1) is made[0]
        worker.close()
        serving.shelf.drop()


class TestSeen:
    def test_the_command_line_shows_who_waits_for_whom_as_long_as_the_pool_is_open(self, bench, pool):
        list(pool.parallel_data_source(bench.module.faulty(how="none")).batch_iterator(5))
        [told] = eventually(lambda: [told for told in bench.mlq.store.pools().values() if told["given"] == 20])
        assert (os.getpid(), "batches", "shared memory") == (told["pid"], told["queue"], told["transport"])
        command = [sys.executable, "-m", "mlqueue", "stats", "--namespace", bench.site.namespace]
        run = subprocess.run(
            command,
            cwd=bench.folder,
            env=bench.site.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        assert re.search(r"TRAINER +WAITS +WORKERS +IDLE +BATCHES/S +MB/S +READY +AGAIN +BY", run.stdout)
        assert re.search(rf"batches +\S+/{os.getpid()} +\d+% +\d +\d+% ", run.stdout)
        pool.close()
        assert {} == bench.mlq.store.pools()


class TestEnd:
    def test_nothing_is_left_of_a_pool_that_is_closed_or_dropped(self, bench):
        def look():
            return (
                {thread.name for thread in threading.enumerate() if thread.name.startswith("mlqueue-batch-")},
                {os.readlink(link) for link in Path("/proc/self/fd").glob("*") if link.exists()},
                set(Path("/dev/shm").glob("*mlqueue*")),
            )

        bench.mlq.client.ping()
        with bench.pool() as pool:
            len(list(pool.parallel_data_source(bench.module.any_source(kind="arrays")).batch_iterator(50)))
        gc.collect()
        before = look()
        with bench.pool() as pool:
            batches = pool.parallel_data_source(bench.module.any_source(kind="mapped")).batch_iterator(50)
            next(batches)
        with pytest.raises(RuntimeError, match="the pool is closed"):
            next(batches)
        dropped = bench.pool()
        batches = dropped.parallel_data_source(bench.module.any_source(kind="arrays")).batch_iterator(50)
        next(batches)
        del batches, dropped, pool
        gc.collect()

        def gone():
            gc.collect()
            names, links, files = look()
            return (
                names <= before[0]
                and files <= before[2]
                and not {link for link in links - before[1] if "memfd:mlqueue" in link}
            )

        eventually(gone)
        # Places that have begun end by themselves; their jobs leave no record.
        try:
            eventually(lambda: bench.jobs() == [], 40)
        except AssertionError:
            records = [bench.mlq.job(job_id).record for job_id in bench.jobs()]
            workers = [(worker.id, worker.jobs) for worker in bench.mlq.store.workers()]
            pytest.fail(f"jobs of places are left: {records}; workers: {workers}")

    def test_sources_that_nobody_uses_are_let_go(self):
        shelf = serving.Shelf()
        assert 1 == shelf.get("a", lambda: 1)
        shelf.get("b", lambda: 2)
        shelf._used["a"] -= 100
        shelf.drop(50)
        assert {"b": 2} == shelf._kept
        shelf.drop()
