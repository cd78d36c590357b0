"""Large batches are gathered by several threads: with the very results, and the errors, of one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from mlqueue.batch import data_source, gathering, rows, transport
from mlqueue.batch.work_pool import WorkerThreadPool
from mlqueue.errors import SettingsError
from mlqueue.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
X = np.arange(1000 * 300, dtype=np.int32).reshape(1000, 300)
#: Seconds within which everything here has happened.
PATIENCE = 20


@pytest.fixture
def team():
    """Two threads; no helper is there before, nor after."""
    end_helpers()
    gathering.set_threads(2)
    yield
    end_helpers()
    gathering.set_threads(None)


def end_helpers():
    gathering.set_threads(1)
    for thread in helpers():
        thread.join(PATIENCE)


@pytest.fixture
def always_helped(team, monkeypatch):
    """Batches of any size are shared by three threads, whatever takes less time."""
    monkeypatch.setattr(rows, "REUSED_BYTES", 1)
    monkeypatch.setattr(rows, "RECYCLER", transport.Recycler())
    monkeypatch.setattr(gathering, "SHARED_BYTES", 1)
    monkeypatch.setattr(gathering, "HEAD_START", 0)
    monkeypatch.setattr(gathering, "Pace", HelpedPace)
    gathering._pace.cache_clear()
    gathering.set_threads(3)
    yield
    gathering._pace.cache_clear()


class HelpedPace(gathering.Pace):
    def __call__(self, copy, length):
        gathering.shared(copy, length, self._nbytes, self._helpers)


def helpers():
    return [thread for thread in threading.enumerate() if thread.name == "mlqueue-gather"]


@pytest.mark.parametrize("shuffle", [None, 5])
@pytest.mark.parametrize("copy", [True, False])
def test_batches_are_those_of_one_thread(always_helped, shuffle, copy):
    gathering.set_threads(1)
    ds = data_source.ArrayDataSource([X, X[:, :7].copy()], repeats=2)
    expected = [[part.copy() for part in batch] for batch in ds.batch_iterator(64, shuffle)]
    gathering.set_threads(3)
    seen = 0
    for batch, wanted in zip(ds.batch_iterator(64, shuffle, copy=copy), expected, strict=True):
        seen += 1
        for got, part in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(part, got)
            assert got.flags.writeable is copy
    assert seen == 32
    assert len(helpers()) == (0 if not copy and shuffle is None else 2)  # views need no copying


def test_every_part_is_copied_once_by_whoever_is_free(team):
    """The helper takes part: this thread waits in its own until the helper has begun one."""
    begun, copied = threading.Barrier(2), []

    def copy(start, stop):
        if not copied:
            begun.wait(PATIENCE)
        copied.append((start, stop, threading.current_thread().name))

    gathering.shared(copy, 10, 1 << 40, 1)
    parts = sorted((start, stop) for start, stop, _ in copied)
    assert [start for start, _ in parts] == [0, *(stop for _, stop in parts[:-1])]
    assert parts[-1][1] == 10
    assert len({name for *_, name in copied}) == 2


def test_who_asked_copies_all_where_the_helper_gets_no_turn(team):
    busy, free, copied = threading.Event(), threading.Event(), []

    def hold(start, stop):
        if threading.current_thread().name == "mlqueue-gather":
            busy.set()
            free.wait(PATIENCE)
        else:
            busy.wait(PATIENCE)

    holding = threading.Thread(target=gathering.shared, args=(hold, 3, 1 << 40, 1))
    holding.start()
    assert busy.wait(PATIENCE)
    for _ in range(5):
        gathering.shared(lambda start, stop: copied.append(threading.get_ident()), 10, 1 << 40, 1)
    assert set(copied) == {threading.get_ident()}
    assert not free.is_set()
    assert gathering._team._calls.qsize() <= 1  # calls do not pile up
    free.set()
    holding.join(PATIENCE)


@pytest.mark.parametrize("where", ["mlqueue-gather", "MainThread"])
def test_an_exception_arrives_from_wherever_it_was_raised(team, where):
    begun = threading.Barrier(2)

    def copy(start, stop):
        begun.wait(PATIENCE)  # each has one of the two parts
        if threading.current_thread().name == where:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        gathering.shared(copy, 2, 1 << 40, 1)
    done = []
    gathering.shared(lambda start, stop: done.append(stop - start), 16, 1 << 40, 1)
    assert sum(done) == 16


def test_memory_is_not_lent_again_while_a_helper_writes_to_it(always_helped, monkeypatch):
    """Interrupted while the helper is still at it, the iterator goes on with other memory."""
    gathering.set_threads(2)
    ds = data_source.ArrayDataSource([X], repeats=2)
    batches = ds.batch_iterator(100, shuffle=1, copy=False)
    expected = [batch[0].copy() for batch in ds.batch_iterator(100, shuffle=1)]
    first = next(batches)[0]
    np.testing.assert_array_equal(expected[0], first)
    place = first.__array_interface__["data"][0]
    writing, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def interrupted(copy, length, nbytes, helpers):
        def part(start, stop):
            if threading.current_thread().name == "mlqueue-gather":
                writing.set()
                go_on.wait(PATIENCE)
                copy(start, stop)
                ended.set()
            else:
                writing.wait(PATIENCE)
                raise KeyboardInterrupt

        real(part, length, nbytes, helpers)

    real = gathering.shared
    monkeypatch.setattr(gathering, "shared", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    monkeypatch.setattr(gathering, "shared", real)
    after = next(batches)[0]
    assert after.__array_interface__["data"][0] != place
    kept = after.copy()
    go_on.set()
    assert ended.wait(PATIENCE)
    np.testing.assert_array_equal(kept, after)
    np.testing.assert_array_equal(expected[2], after)


def test_a_forked_process_has_helpers_of_its_own(always_helped):
    ds = data_source.ArrayDataSource([X])
    expected = sum(int(batch[0][:, 0].sum()) for batch in ds.batch_iterator(100, shuffle=1))
    assert len(helpers()) == 2
    child = os.fork()
    if child == 0:
        signal.alarm(PATIENCE)  # ends it
        same = sum(int(batch[0][:, 0].sum()) for batch in ds.batch_iterator(100, shuffle=1)) == expected
        os._exit(0 if same and len(helpers()) == 2 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_a_program_ends_with_its_helpers_at_work():
    code = (
        "import numpy as np\n"
        "from mlqueue.batch import data_source, gathering\n"
        "gathering.set_threads(2)\n"
        "ds = data_source.ArrayDataSource([np.ones((5000, 500), np.float32)], repeats=-1)\n"
        "for number, batch in enumerate(ds.batch_iterator(1000, shuffle=1)):\n"
        "    if number == 9:\n"
        "        break\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")


def test_help_is_used_where_it_takes_less_time_and_tried_again(monkeypatch):
    monkeypatch.setattr(gathering, "PERIOD", 20)
    monkeypatch.setattr(gathering, "TRIALS", 3)
    clock, cost, shared = [0.0], {"alone": 1.0, "helped": 0.5}, []

    def helped(copy, length, nbytes, helpers):
        shared.append(length)
        clock[0] += cost["helped"]

    def alone(start, stop):
        assert (start, stop) == (0, 7)
        clock[0] += cost["alone"]

    monkeypatch.setattr(gathering.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(gathering, "shared", helped)
    pace = gathering.Pace(1, 1)
    for _ in range(20):
        pace(alone, 7)
    assert len(shared) == 3 + 14
    cost["helped"] = 0.96  # not worth a second processor
    for _ in range(20):
        pace(alone, 7)
    assert len(shared) == 17 + 3


def test_threads_that_prepare_batches_side_by_side_have_no_help(always_helped):
    def task():
        return next(data_source.ArrayDataSource([X]).batch_iterator(100, shuffle=1))[0][0, 0]

    with WorkerThreadPool(2) as pool:
        assert len(list(pool.work_stream([(task,)] * 4))) == 4
    with data_source.ArrayDataSource([X]).prefetch(2).batch_iterator(100, shuffle=1) as batches:
        assert len(list(batches)) == 10
    assert helpers() == []
    with gathering.without_help():
        task()
    assert helpers() == []
    task()
    assert len(helpers()) == 2


def test_the_number_of_threads(monkeypatch):
    monkeypatch.delenv(gathering.VARIABLE, raising=False)
    monkeypatch.setattr(gathering, "processors", lambda: 8)
    assert gathering.threads() == 2
    monkeypatch.setattr(gathering, "processors", lambda: 1)
    assert gathering.threads() == 1
    monkeypatch.setenv(gathering.VARIABLE, "4")
    assert gathering.threads() == 4
    gathering.set_threads(3)
    try:
        assert gathering.threads() == 3
    finally:
        gathering.set_threads(None)
    for wrong in ("0", "65", "many", "1.5"):
        monkeypatch.setenv(gathering.VARIABLE, wrong)
        with pytest.raises(SettingsError, match="MLQUEUE_GATHER_THREADS"):
            gathering.threads()
        with pytest.raises(SettingsError, match="MLQUEUE_GATHER_THREADS"):
            Settings.load({gathering.VARIABLE: wrong})
    for number, error in ((0, ValueError), (65, ValueError), (True, TypeError), ("2", TypeError)):
        with pytest.raises(error, match="number must be"):
            gathering.set_threads(number)
