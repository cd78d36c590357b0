"""Jobs for which their process is killed: by a supervisor, in worker processes, with jobs that nothing else ends."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from worker_processes import Site, is_alive, wait_for

from mlqueue import DeadReason, Settings, State
from mlqueue.board import SLOTS, Board, Entry
from mlqueue.errors import InvalidTransition
from mlqueue.overdue import LAST_LOOK, Watch
from mlqueue.store import Standing

MakeSite = Callable[..., Site]

STUBBORN = '''
@mlq.actor(max_retries=0, kill=True, max_stalls=1)
def stubborn(seconds, how="python"):
    """Does not end when it is told to."""
    tell("start")
    while True:
        try:
            if how == "gil":
                ctypes.PyDLL(None).sleep(int(seconds))
            while True:
                time.sleep(0.01)
        except BaseException as error:
            tell("told", error=type(error).__name__)


@mlq.actor(max_retries=0, time_limit=300)
def first_takes_all():
    """Its first attempt does not end when it is told to."""
    tell("start")
    while mlqueue.current_job().attempt == 1:
        try:
            while True:
                time.sleep(0.01)
        except BaseException as error:
            tell("told", error=type(error).__name__)
    return mlqueue.current_job().attempt


@mlq.actor(max_retries=0)
def first_goes_on():
    return first_takes_all()


@mlq.actor(max_retries=0, time_limit=500, hard_time_limit=0.7)
def prolongs(by):
    tell("start")
    mlqueue.current_job().extend(by)
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        time.sleep(0.01)
    return mlqueue.current_job().attempt
'''


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[MakeSite]:
    made: list[Site] = []

    def make(**settings: object) -> Site:
        made.append(Site(tmp_path, server, **settings))
        module = tmp_path / "jobs.py"
        module.write_text(module.read_text() + STUBBORN)
        return made[-1]

    yield make
    for one in made:
        one.close()


# Too long


def test_a_job_over_its_hard_time_limit_has_its_process_killed_though_it_holds_the_gil(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=2)
    beside = here.submit("first_waits", 60)
    (other,) = here.wait_started(beside)
    job = here.submit("holds_gil", 60, hard_time_limit=0.5, max_stalls=1)
    (first,) = here.wait_started(job)
    (again,) = here.wait_started(job, attempt=2)

    assert 0.4 < again["at"] - first["at"] < 4
    assert first["pid"] == other["pid"] != again["pid"]
    assert not is_alive(first["pid"])
    wait_for(lambda: here.record(job).state is State.DEAD, 10, here.logs)
    record = here.record(job)
    assert (record.dead_reason, record.timeouts, record.attempt) == (DeadReason.STALLED, 1, 2)
    assert [(past.outcome, past.stage) for past in record.attempts] == [("stalled", "killed")] * 2
    assert "longer than its hard_time_limit of 0.5 s; its process was killed" in record.error.message
    # The one beside it is not blamed.
    assert beside.result(timeout=10) >= 2
    record = here.record(beside)
    assert (record.crashes, record.stalls, record.timeouts, record.attempts) == (0, 0, 0, ())
    assert supervised.lines("is killed (pid")
    assert not supervised.lines("starts again in")
    supervised.stop()


@pytest.mark.faults
@pytest.mark.parametrize("timeout", [None, 0.5])
def test_a_limit_that_is_not_heeded_kills_after_the_grace(site: MakeSite, timeout: float | None) -> None:
    here = site(kill_grace=0.5, sweep_interval=0.1)
    # With a timeout the store takes it back, and the attempt that nobody waits for any more is ended.
    supervised = here.supervise(processes=2, threads=1)
    job = here.submit("first_takes_all" if timeout is None else "first_goes_on", job_timeout=timeout)
    (first,) = here.wait_started(job)
    assert job.result(timeout=15) == 2
    wait_for(lambda: not is_alive(first["pid"]), 10, here.logs)
    wait_for(lambda: here.record(job).attempts[0].stage == "killed", 10, here.logs)

    assert here.events(job, "told")[0]["error"] == ("TimeLimitExceeded" if timeout is None else "Cancelled")
    record = here.record(job)
    assert (record.timeouts, record.crashes, record.attempts[0].outcome) == (1, 0, "stalled")
    if timeout is None:
        assert "its time_limit of 0.3 s, by more than 0.5 s; its process was killed" in record.attempts[0].error.message
    else:
        assert "its timeout of 0.5 s" in record.attempts[0].error.message
    supervised.stop()


@pytest.mark.faults
def test_a_time_limit_that_is_heeded_kills_nobody(site: MakeSite) -> None:
    here = site(kill_grace=0.3)
    (here.folder / "heeds.py").write_text(
        "from jobs import *\n"
        "@mlq.actor(max_retries=0, time_limit=200)\n"
        "def heeds():\n"
        "    for _ in range(100):\n"
        "        time.sleep(0.01)\n"
    )
    supervised = here.supervise("heeds", processes=1, threads=1)
    job = here.submit("heeds")
    wait_for(lambda: here.record(job).state.ended, 10, here.logs)
    record = here.record(job)
    assert (record.dead_reason, record.attempts[0].stage) == (DeadReason.FAILED, "interrupted")
    assert "TimeLimitExceeded" in record.error.type
    assert here.submit("work", 1.0).result(timeout=10)
    assert not supervised.lines("is killed")
    supervised.stop()


# Cancelled


@pytest.mark.parametrize("how", ["python", pytest.param("gil", marks=pytest.mark.faults)])
def test_a_cancelled_job_that_does_not_end_has_its_process_killed_and_one_beside_it_goes_back(
    site: MakeSite, how: str
) -> None:
    here = site(kill_grace=0.5)
    supervised = here.supervise(processes=1, threads=2)
    beside = here.submit("first_waits", 60)
    here.wait_started(beside)
    job = here.submit("stubborn", 60, how)
    (first,) = here.wait_started(job)
    job.cancel()
    wait_for(lambda: here.record(job).state.ended, 15, here.logs)

    record = here.record(job)
    assert (record.state, record.cancel_stage, record.attempt) == (State.CANCELLED, "killed", 1)
    assert not is_alive(first["pid"])
    assert beside.result(timeout=10) == 2
    record = here.record(beside)
    assert (record.crashes, record.stalls, record.attempts) == (0, 0, ())
    supervised.stop()


@pytest.mark.faults
def test_without_a_grace_only_jobs_of_actors_that_say_so_are_killed(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=2)
    job = here.submit("work", 2.0)
    (event,) = here.wait_started(job)
    job.cancel()
    wait_for(lambda: here.record(job).state.ended, 15, here.logs)
    assert here.record(job).cancel_stage == "raised"
    assert supervised.ready_pids() == [event["pid"]]
    assert is_alive(event["pid"])
    supervised.stop()


# Prolonged


def test_a_job_prolongs_all_its_limits(site: MakeSite) -> None:
    here = site(sweep_interval=0.05)
    supervised = here.supervise(processes=1, threads=1)
    job = here.submit("prolongs", 30, job_timeout=0.9)
    assert job.result(timeout=15) == 1
    assert here.record(job).extended_by == 30
    too_short = here.submit("prolongs", 0.01, max_stalls=1)
    wait_for(lambda: here.record(too_short).state.ended, 15, here.logs)
    assert here.record(too_short).attempts[0].stage == "interrupted"
    supervised.stop()


@pytest.mark.faults
def test_a_job_that_holds_the_gil_is_prolonged_from_elsewhere(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=1)
    job = here.submit("holds_gil", 3, hard_time_limit=1.5)
    (event,) = here.wait_started(job)
    job.extend(60)
    job.result(timeout=15)
    assert here.record(job).attempt == 1
    assert is_alive(event["pid"])
    supervised.stop()


def test_only_a_job_that_runs_can_be_prolonged(site: MakeSite) -> None:
    here = site()
    job = here.submit("work")
    with pytest.raises(InvalidTransition, match="is queued; only a running job can be prolonged"):
        job.extend(1)


# Who had begun


def test_a_job_that_had_not_begun_gets_no_strike(site: MakeSite) -> None:
    here = site()
    (here.folder / "tiny.py").write_text(
        "from jobs import *\n"
        "@mlq.actor(max_retries=0)\ndef tiny():\n    pass\n"
        "@mlq.actor(max_retries=0)\ndef dies():\n    tell('start')\n    time.sleep(0.02)\n    os._exit(3)\n"
    )
    # Tiny jobs are fetched ahead, and with them one that ends the process.
    calls = [here.submit("tiny") for _ in range(400)]
    culprit = here.submit("dies", max_crashes=1)
    calls += [here.submit("tiny") for _ in range(200)]
    supervised = here.supervise("tiny", processes=1, threads=1)
    wait_for(lambda: all(here.record(job).state.ended for job in [*calls, culprit]), 20, here.logs)

    assert here.record(culprit).dead_reason is DeadReason.CRASHED
    assert here.record(culprit).attempt == 1
    records = [here.record(job) for job in calls]
    assert {(record.state, record.crashes) for record in records} == {(State.SUCCEEDED, 0)}
    assert max(record.attempt for record in records) == 2  # some had been fetched
    supervised.stop()


# The board


def test_a_board_tells_another_process_what_has_begun_and_until_when_it_may_run() -> None:
    ours = Board.create()
    assert ours.fd is not None
    theirs = Board(ours.fd)
    told: list[bool] = []
    ours.on_limited = lambda: told.append(theirs.limited)
    assert theirs.begun() == {}

    first = ours.begin(Entry("a" * 128, 1))
    second = ours.begin(Entry("b", 2, hard=5.0, hard_limit=3.0))
    assert first is not None
    assert second is not None
    assert told == [True]
    assert theirs.begun() == {"a" * 128: 1, "b": 2}
    second.prolong(1.0, 1.0)
    assert theirs.entries()[1] == Entry("b", 2, hard=6.0, hard_limit=3.0, extended_by=1.0)
    first.end()
    second.end()
    second.change(hard=9.0)
    assert [entry.limited for entry in theirs.entries()] == [False, False]
    # Their ends may not have reached the store: they are there until another needs the place.
    assert theirs.begun() == {"a" * 128: 1, "b": 2}
    ours.begin(Entry("c", 1))
    assert theirs.begun() == {"a" * 128: 1, "c": 1}
    ours.close_fd()


def test_a_board_that_is_full_says_that_it_does_not_know() -> None:
    board = Board.create()
    slots = [board.begin(Entry(f"job-{number}", 1)) for number in range(SLOTS)]
    assert None not in slots
    assert len(board.begun() or ()) == SLOTS
    assert board.begin(Entry("more", 1)) is None
    assert board.begun() is None
    board.close_fd()


def test_an_entry_that_is_half_written_is_none() -> None:
    board = Board.create()
    board.begin(Entry("job", 1))
    board._memory[64 + 10] ^= 1
    assert board.entries() == []
    board.close_fd()


# What the store says


def test_a_store_that_does_not_answer_delays_a_kill_for_a_second() -> None:
    board = Board.create()
    now = time.monotonic()
    board.begin(Entry("job", 1, hard=now + 5, hard_limit=5.0))
    watch = Watch(board)
    assert watch.dooms(now + 4.9) == []
    assert watch.dooms(now + 5 + LAST_LOOK / 2) == []
    assert watch.has_due(now + 5.01)
    [doom] = watch.dooms(now + 5 + LAST_LOOK)
    assert (doom.job_id, doom.attempt) == ("job", 1)
    board.close_fd()


@pytest.mark.parametrize(
    ("standing", "dies_after"),
    [
        (Standing(True, None, 0.0), math.inf),
        (Standing(True, 0.0, 0.0), 2.0),
        (Standing(True, 1.5, 0.0), 0.5),
        (Standing(False, None, 0.0), 2.0),
    ],
)
def test_who_was_told_to_end_has_the_grace(standing: Standing, dies_after: float) -> None:
    board = Board.create()
    board.begin(Entry("job", 1, grace=2.0))
    watch = Watch(board)
    asked: list[Sequence[tuple[str, int]]] = []

    def ask(attempts: Sequence[tuple[str, int]]) -> list[Standing]:
        asked.append(attempts)
        return [standing] * len(attempts)

    now = time.monotonic()
    watch.ask(ask)
    assert asked == [[("job", 1)]]
    assert not watch.dooms(now + min(dies_after, 1e6) - 0.3)
    assert bool(watch.dooms(now + min(dies_after, 1e6) + 0.3)) == (dies_after < math.inf)
    board.close_fd()


def test_the_store_is_not_asked_about_jobs_without_a_limit() -> None:
    board = Board.create()
    board.begin(Entry("job", 1))
    watch = Watch(board)
    assert watch.idle
    board.begin(Entry("limited", 1, hard=time.monotonic() + 60, hard_limit=60.0))
    assert not watch.idle
    watch.ask(lambda attempts: pytest.fail(f"asked about {attempts}"))
    board.close_fd()
