"""Faults of the server, and of the way to it; records and clocks that are wrong."""

from __future__ import annotations

import contextlib
import ctypes.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
import redis
from harness import ACTORS, LONG, PATIENCE, Entry, Fleet, Report, Worker, wait_for
from proxy import FaultProxy, a_fetch, a_finish, an_enqueue, fault_proxy
from servers import OwnServer

from mlqueue import DeadReason, EncodeError, InvalidJob, Settings, State, StoreFull, StoreUnavailable, codec
from mlqueue.job import NewJob, new_id
from mlqueue.store.connection import translate

pytestmark = pytest.mark.faults

RETRIES = (
    ACTORS
    + """

@mlq.actor(max_retries=1, min_backoff=1500, max_backoff=1500)
def fails_once():
    tell("start")
    if mlqueue.current_job().retries == 0:
        raise ValueError("not yet")
    tell("end")
    return attempt()


@mlq.actor(max_retries=1, min_backoff=50, max_backoff=50)
def raises_late(seconds):
    tell("start")
    if attempt() == 1:
        time.sleep(seconds)
        raise ValueError("not yet")
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def submits(delay):
    tell("start")
    later = quiet.with_options(delay=delay).submit()
    mlqueue.current_job().progress(later.id)
    tell("end")
    return attempt()
"""
)


MakeFleet = Callable[..., Fleet]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[MakeFleet]:
    """Makes fleets, which are ended with the test."""
    with contextlib.ExitStack() as stack:

        def make(server: Settings, **options: Any) -> Fleet:
            one = Fleet(tmp_path / "fleet", server, **options)
            stack.callback(one.close)
            return one

        yield make


@pytest.fixture
def proxy(server: Settings) -> Iterator[FaultProxy]:
    """A proxy before the server of the session."""
    assert server.url
    with fault_proxy(server.url) as one:
        yield one


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Callable[..., OwnServer]]:
    """Makes servers that a test may hurt."""
    with contextlib.ExitStack() as stack:

        def make(**options: str | int) -> OwnServer:
            one = OwnServer(tmp_path / "server", **options)
            stack.callback(one.close)
            return one.start()

        yield make


def at(url: str, **settings: Any) -> Settings:
    return Settings.load({}, url=url, **settings)


class Submitter:
    """A thread that submits all the time; what it was told exists, and how often it was told that nothing does."""

    def __init__(self, fleet: Fleet, *, actor: str = "work", args: tuple[Any, ...] = (0.01,), pause: float = 0.01):
        self.jobs: list[Any] = []
        self.attempted = 0
        #: Errors, and how long it took to raise each, in seconds.
        self.errors: list[tuple[Exception, float]] = []
        self._enough = threading.Event()
        self._work = fleet, actor, args, pause
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        fleet, actor, args, pause = self._work
        while not self._enough.wait(pause):
            self.attempted += 1
            begun = time.monotonic()
            try:
                self.jobs.append(fleet.submit(actor, *args))
            except Exception as error:
                self.errors.append((error, time.monotonic() - begun))

    def stop(self) -> list[Any]:
        self._enough.set()
        self._thread.join()
        return self.jobs


def only_first_attempts(fleet: Fleet, report: Report, jobs: list[Any]) -> None:
    """No job began more often than once. (One that was fetched ahead and given back has a later attempt.)"""
    for record in fleet.records(jobs):
        if record is None:
            continue
        starts = len(fleet.ledger.of(record.id, "start"))
        if starts > 1 or record.crashes or record.stalls:
            report.note(f"{record.id}: {starts} starts, {record.crashes} crashes, {record.stalls} stalls")


# Answers that get lost (F12-F14)


def test_an_enqueue_whose_answer_is_lost_creates_one_job(server: Settings, proxy: FaultProxy, fleet: MakeFleet) -> None:
    here = fleet(at(proxy.url))
    worker = here.worker(processes=1, threads=8)
    count = 2000 if LONG else 200
    # Each submit loses its first answer, and is sent again: by then most jobs have been run.
    proxy.eat(an_enqueue, every=2)
    jobs = [here.submit("work") for _ in range(count)]
    messages = [dramatiq.Message("default", "work", (), {}, {}, message_id=new_id()) for _ in range(1200)]
    here.mlq.broker.enqueue_many(messages)
    assert proxy.eaten == count + 3
    proxy.heal()
    jobs += [message.message_id for message in messages]

    here.wait_drained()
    assert sum(number.number for number in here.mlq.store.counts() if number.actor == "work") == len(jobs)
    report = here.audit("enqueue_answers_lost", jobs)
    only_first_attempts(here, report, jobs)
    report.finish()
    assert (report.ok, report.duplicated_runs) == (len(jobs), 0)
    worker.stop()


@pytest.mark.parametrize("what", [a_fetch, a_finish])
def test_a_turn_whose_answer_is_lost_neither_doubles_nor_holds_up_a_job(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet, what: Any
) -> None:
    here = fleet(at(proxy.url))
    worker = here.worker(processes=2, threads=4)
    proxy.eat(what, every=3)
    jobs = []
    for _ in range(5000 if LONG else 300):
        jobs.append(here.submit("work", 0.002))
        if len(jobs) % 20 == 0:
            threading.Event().wait(0.02)
    # Long before any lease of 30 s ends: nothing waits for that.
    here.wait_drained(25)
    eaten = proxy.eaten
    assert eaten > 10
    proxy.heal()
    report = here.audit(f"answers_lost_{what.__name__}", jobs)
    only_first_attempts(here, report, jobs)
    report.finish()
    assert (report.ok, report.duplicated_runs) == (len(jobs), 0)
    worker.stop()


# Connections (F15, F16)


def test_a_storm_of_resets_loses_nothing_and_ends_with_the_last_one(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet
) -> None:
    here = fleet(at(proxy.url))
    worker = here.worker(processes=2, threads=4)
    submitter = Submitter(here)
    cut = 0
    ends = time.monotonic() + (30 if LONG else 5)
    while time.monotonic() < ends:
        threading.Event().wait(0.1)
        cut += proxy.cut_all()
    jobs = submitter.stop()
    last = here.submit("work")
    jobs.append(last)
    begun = time.monotonic()
    assert last.wait(15), here.logs() + str(here.mlq.store.counts()) + str(here.mlq.store.workers())
    resumed = time.monotonic() - begun
    here.wait_drained()
    assert submitter.errors == []
    assert cut > 50
    report = here.audit("reset_storm", jobs)
    only_first_attempts(here, report, jobs)
    report.max_recovery_s = round(resumed, 3)
    report.finish()
    assert resumed < 5
    worker.stop()


def test_half_open_connections_are_given_up_within_the_socket_timeout(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet
) -> None:
    here = fleet(at(proxy.url), socket_timeout=1.0)
    worker = here.worker(processes=2, threads=4)
    jobs, longest = [here.submit("work") for _ in range(20)], 0.0
    for _ in range(10 if LONG else 3):
        assert proxy.hang() > 3
        hung = time.monotonic()
        new = [here.submit("work", 0.01) for _ in range(20)]
        jobs += new
        for job in new:
            assert job.wait(30)
        longest = max(longest, time.monotonic() - hung)
    here.wait_drained()
    report = here.audit("half_open", jobs)
    only_first_attempts(here, report, jobs)
    report.max_recovery_s = round(longest, 3)
    report.finish()
    assert longest < 10
    worker.stop()


def test_a_half_open_bell_is_given_up_though_turns_are_answered(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet
) -> None:
    here = fleet(at(proxy.url), socket_timeout=1.0)
    worker = here.worker(processes=1, threads=4)
    jobs = [here.submit("work")]
    assert jobs[0].wait(PATIENCE)
    assert wait_for(lambda: proxy.hang_waiting("BLPOP"))
    # The turn at the end of a slice finds what comes now; after that the bell is another one, and heard at once.
    jobs.append(here.submit("work"))
    assert jobs[-1].wait(15)
    begun = time.monotonic()

    def is_quick() -> bool:
        threading.Event().wait(0.05)
        jobs.append(here.submit("work"))
        sent = time.monotonic()
        assert jobs[-1].wait(15)
        return time.monotonic() - sent < 0.5

    wait_for(lambda: all(is_quick() for _ in range(3)), 30)
    here.wait_drained()
    report = here.audit("half_open_bell", jobs)
    report.max_recovery_s = round(time.monotonic() - begun, 3)
    report.finish()
    worker.stop()


def test_what_a_worker_reports_after_a_partition_longer_than_its_lease_is_refused(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet
) -> None:
    here = fleet(server, lease=1.5, socket_timeout=0.5, command_timeout=1.0)
    usual = here.environment
    here.environment = usual | {"MLQUEUE_URL": proxy.url}
    cut_off = here.worker(processes=1, threads=2)
    here.environment = usual
    jobs = [here.submit("first_takes", 8.0) for _ in range(2)]
    here.wait_started(*jobs)
    other = here.worker(processes=1, threads=2)
    proxy.hang(new=True)
    began = time.time()
    again = here.wait_started(*jobs, attempt=2, timeout=20)
    assert {entry.pid for entry in again} == {*other.pids()}
    for job in jobs:
        assert job.result(timeout=PATIENCE) == 2
    # It works on, and hears only then that it has lost them.
    wait_for(lambda: sum(entry.pid in cut_off.pids() for entry in here.ledger.of(event="end")) == 2)
    proxy.heal()
    wait_for(lambda: len(cut_off.lines("was taken over by a later one")) == 2)
    # And it is one of the workers again.
    other.stop()
    more = [here.submit("quiet") for _ in range(10)]
    here.wait_drained()
    report = here.audit("partition", [*jobs, *more])
    for record in here.records(jobs):
        if (record.attempt, record.stalls, record.crashes) != (2, 1, 0):
            report.note(f"{record.id}: attempt {record.attempt}, {record.stalls} stalls, {record.crashes} crashes")
    report.max_recovery_s = round(max(entry.t for entry in again) - began, 3)
    report.finish()
    assert report.duplicated_runs == 2
    cut_off.stop()


# The server


def check_outage(here: Fleet, submitter: Submitter, worker: Worker, name: str, timeout: float) -> Report:
    """After an outage everything goes on by itself."""
    back = time.monotonic()
    sure = here.submit("work")
    assert sure.wait(PATIENCE)
    recovered = time.monotonic() - back
    jobs = [*submitter.stop(), sure]
    here.wait_drained()
    for error, took in submitter.errors:
        assert isinstance(error, StoreUnavailable), error
        assert "cannot be reached" in str(error)
        assert took < timeout
    report = here.audit(name, jobs, attempted=submitter.attempted + 1)
    only_first_attempts(here, report, jobs)
    report.max_recovery_s = round(recovered, 3)
    report.finish()
    assert len(worker.pids()) == 2, "a child was replaced"
    assert recovered < 15
    return report


@pytest.mark.parametrize("how", [signal.SIGKILL, *([signal.SIGTERM] if LONG else [])], ids=lambda how: how.name)
def test_a_server_that_is_away_for_ten_seconds_costs_nothing_but_the_time(
    own_server: Callable[..., OwnServer], fleet: MakeFleet, how: signal.Signals
) -> None:
    server = own_server()
    # The lease is shorter than the outage.
    here = fleet(at(server.url), actors=RETRIES, command_timeout=2.0, lease=6.0)
    worker = here.worker(processes=2, threads=4)
    submitter = Submitter(here)
    running = [here.submit("quiet", seconds) for seconds in (5.0, 12.0)]
    # One raises while nobody can be asked for its retry, others are due then.
    raising = here.submit("raises_late", 4.0)
    delayed = [here.submit("quiet", delay=seconds) for seconds in (3.0, 6.0, 14.0)]
    here.wait_started(*running, raising)
    wait_for(lambda: len(submitter.jobs) > 50)
    server.end(how)
    began = time.monotonic()
    wait_for(lambda: len(submitter.errors) >= 3)
    threading.Event().wait(max(0.0, 10 - (time.monotonic() - began)))
    server.start()
    # A connection that was being made took no longer than its time-out, and a call ends with the last try.
    check_outage(here, submitter, worker, f"server_away_10s_{how.name}", timeout=5.0)
    for job in running:
        assert job.wait(PATIENCE)
        record = here.records([job])[0]
        assert (record.state, record.attempt, record.stalls, record.crashes) == (State.SUCCEEDED, 1, 0, 0)
        assert len(here.ledger.of(job, "start")) == 1
    here.wait_drained()
    report = here.audit("server_away_10s_retry_and_delays", [raising, *delayed])
    only_first_attempts(here, report, delayed)
    report.finish()
    retried = here.records([raising])[0]
    assert (retried.state, retried.attempt, retried.retries, retried.stalls) == (State.SUCCEEDED, 2, 1, 0)
    worker.stop()


def test_a_server_that_stands_still_for_three_leases_takes_no_job_from_a_live_worker(
    own_server: Callable[..., OwnServer], fleet: MakeFleet
) -> None:
    server = own_server()
    here = fleet(at(server.url), command_timeout=2.0, socket_timeout=1.0, lease=2.0)
    worker = here.worker(processes=2, threads=4)
    submitter = Submitter(here)
    running = [here.submit("quiet", 10.0) for _ in range(4)]
    here.wait_started(*running)
    server.signal(signal.SIGSTOP)
    threading.Event().wait(6.5)
    server.signal(signal.SIGCONT)
    check_outage(here, submitter, worker, "server_stopped_3_leases", timeout=6.0)
    for job in running:
        assert job.wait(PATIENCE)
    for record in here.records(running):
        assert (record.state, record.attempt, record.stalls, record.crashes) == (State.SUCCEEDED, 1, 0, 0)
    worker.stop()


def test_a_server_out_of_memory_refuses_new_jobs_and_ends_those_it_has(
    own_server: Callable[..., OwnServer], fleet: MakeFleet
) -> None:
    server = own_server()
    with server.client() as client:
        used = client.info("memory")["used_memory"]
        client.config_set("maxmemory", used + 12_000_000)
    actors = ACTORS + (
        "\n\n@mlq.actor(max_retries=0)\ndef carries(text, seconds):\n    tell('start')\n    time.sleep(seconds)\n"
        "    mlqueue.current_job().progress(0.5)\n    mlqueue.current_job().progress(1)\n"
        "    tell('end')\n    return attempt()\n"
    )
    here = fleet(at(server.url), actors=actors, lease=3.0)
    worker = here.worker(processes=1, threads=4)
    running = [here.submit("carries", "", 6.0) for _ in range(4)]
    here.wait_started(*running)
    jobs, refused = list(running), 0
    begun = time.monotonic()
    while refused < 3:
        try:
            jobs.append(here.submit("carries", "x" * 10_000, 0.0))
        except StoreFull:
            refused += 1
        assert time.monotonic() - begun < PATIENCE
    with server.client() as client:
        # What connections need goes up and down: from here on it is full without a doubt.
        client.config_set("maxmemory", client.info("memory")["used_memory"] - 2_000_000)
    took_at = time.monotonic()
    with pytest.raises(StoreFull, match="maxmemory"):
        here.submit("work")
    assert time.monotonic() - took_at < 2  # at once: it does not pass by itself
    # A worker that comes to a full server helps too.
    other = here.worker(processes=1, threads=4)
    here.wait_drained()
    report = here.audit("out_of_memory", jobs, attempted=len(jobs) + refused + 1)
    only_first_attempts(here, report, jobs)
    report.finish()
    assert len(jobs) > 200
    assert {entry.pid for entry in here.ledger.of(event="start")} == {*worker.pids(), *other.pids()}
    with server.client() as client:
        client.config_set("maxmemory", used + 100_000_000)
    assert here.submit("quiet").result(timeout=PATIENCE) == 1
    worker.stop()
    other.stop()


def test_a_master_that_is_read_only_for_four_seconds_costs_nothing(
    own_server: Callable[..., OwnServer], fleet: MakeFleet
) -> None:
    server = own_server()
    here = fleet(at(server.url), command_timeout=1.5)
    worker = here.worker(processes=2, threads=4)
    submitter = Submitter(here)
    wait_for(lambda: len(submitter.jobs) > 30)
    # Due while nothing can be written; of the retries some fall there too.
    delayed = [here.submit("work", delay=0.5 * number) for number in range(1, 12)]
    retried = [here.submit("fails", 3) for _ in range(20)]
    running = [here.submit("quiet", 3.0) for _ in range(4)]
    with server.client() as client:
        client.replicaof("127.0.0.1", 1)
        threading.Event().wait(4)
        client.replicaof("NO", "ONE")
    check_outage(here, submitter, worker, "read_only_4s", timeout=4.0)
    assert submitter.errors
    here.wait_drained()
    report = here.audit("read_only_4s_delayed", [*delayed, *running])
    only_first_attempts(here, report, [*delayed, *running])
    report.finish()
    for record in here.records(retried):
        starts = len(here.ledger.of(record.id, "start"))
        assert (record.state, record.retries, starts) == (State.SUCCEEDED, 3, 4)
    worker.stop()


# Jobs that are wrong

WRONG = (
    ACTORS
    + """

@mlq.actor(max_retries=0)
def returns_what_cannot_be_sent():
    tell("start")
    return {{"rows": [1, object()]}}


@mlq.actor(max_retries=0)
def cannot_be_settled():
    tell("start")
    mlq.client.set(f"{{mlq.store.root}}:r:{{mlqueue.current_job().id}}", "not a hash")
    return "x" * 500
"""
)


def test_a_job_that_is_wrong_ends_alone_with_a_clear_reason_and_nothing_waits_for_it(
    server: Settings, fleet: MakeFleet
) -> None:
    here = fleet(server, actors=WRONG)
    worker = here.worker(processes=1, threads=3)

    with pytest.raises(EncodeError) as refused:
        here.submit("work", [0.0, {"x": object()}])
    assert "object" in str(refused.value)
    assert refused.value.path == "args[0][1]['x']"
    with pytest.raises(InvalidJob, match="priority"):
        here.submit("work", priority=100_000)

    unknown = here.submit("nobody_knows_me")
    bodies = {
        "throws": codec.encode([[], {}, {"throws": "ValueError"}]),
        "max_retries": codec.encode([[], {}, {"max_retries": "many"}]),
        "time_limit": codec.encode([[], {}, {"time_limit": [1]}]),
        "no codec's bytes": b"\xc1\xff\x00garbage",
        "no call": codec.encode({"a": 1}),
        "no body": b"",
    }
    good, expected = [], {}
    for body in bodies.values():
        job = NewJob(id=new_id(), queue="default", actor="work", body=body)
        here.mlq.store.submit([job])
        expected[job.id] = (DeadReason.UNDECODABLE, "")
        good += [here.submit("work", 0.01) for _ in range(10)]
    wrong = here.submit("returns_what_cannot_be_sent")
    expected[wrong.id] = (DeadReason.FAILED, "result['rows'][1]")
    good += [here.submit("work", 0.01) for _ in range(10)]
    refused_by_store = here.submit("cannot_be_settled")
    expected[refused_by_store.id] = (DeadReason.UNSTORABLE, "WRONGTYPE")
    good += [here.submit("work", 0.01) for _ in range(10)]

    begun = time.monotonic()
    wait_for(lambda: here.unfinished() == 1, 30, here.logs)
    took = time.monotonic() - begun
    report = here.audit("wrong_jobs", [*good, *expected], dead=expected)
    only_first_attempts(here, report, [*good, *expected])
    for record in here.records(expected):
        reason, words = expected[record.id]
        if record.dead_reason is not reason or not record.error.message or words not in record.error.message:
            report.note(f"{record.id}: {record.dead_reason}, {record.error}")
    report.finish()
    assert (report.ok, report.dead_lettered) == (len(good), len(expected))
    assert took < 10
    assert (unknown.state, unknown.position) == (State.QUEUED, 0)
    assert worker.pids() == worker.pids(1)[:1], "the child was replaced"
    worker.stop()
    assert unknown.state is State.QUEUED


def test_a_job_that_the_store_refuses_while_it_can_hardly_be_reached_ends_all_the_same(
    server: Settings, proxy: FaultProxy, fleet: MakeFleet
) -> None:
    here = fleet(at(proxy.url), actors=WRONG, command_timeout=0.5)
    worker = here.worker(processes=1, threads=3)
    # What the store refused is sent again by itself, and the answers to that are lost.
    proxy.eat(lambda name, parts, answer: name == "settle")
    wrong = here.submit("cannot_be_settled")
    good = [here.submit("work", 0.01) for _ in range(10)]
    worker.wait_line("waits to be settled by itself")
    proxy.heal()
    here.wait_drained(20)
    report = here.audit("refused_and_out_of_reach", [*good, wrong], dead=[wrong])
    only_first_attempts(here, report, [*good, wrong])
    report.finish()
    assert here.records([wrong])[0].dead_reason is DeadReason.UNSTORABLE
    worker.stop()


# Clocks that are wrong (F21)

FAKETIME = next(
    (
        str(path)
        for folder in ("/usr/lib", "/usr/lib64", "/usr/local/lib", "/opt/homebrew/lib")
        for path in sorted(Path(folder).glob("**/faketime/libfaketime.so.1"))
    ),
    ctypes.util.find_library("faketime"),
)

SITE = """
import os, select, time
def shifted(real, offset, unit):
    return lambda: real() + offset * unit
if "CLOCK_OFFSET" in os.environ:
    time.time = shifted(time.time, int(os.environ["CLOCK_OFFSET"]), 1)
    time.time_ns = shifted(time.time_ns, int(os.environ["CLOCK_OFFSET"]), 10**9)
if "FAKETIME" in os.environ:
    # libfaketime's own breaks when the monotonic clock is not faked, and all else breaks when it is.
    time.sleep = lambda seconds: select.select([], [], [], seconds)
"""


def with_clock(here: Fleet, how: str, offset: int) -> dict[str, str]:
    """The environment of processes whose clock is wrong by so many seconds."""
    folder = here.folder / "clock"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(SITE)
    path = {"PYTHONPATH": os.pathsep.join((str(folder), here.environment["PYTHONPATH"]))}
    if how == "faketime":
        return path | {"LD_PRELOAD": str(FAKETIME), "FAKETIME": f"{offset:+d}s", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
    return path | {"CLOCK_OFFSET": str(offset)}


@pytest.mark.parametrize("how", ["faketime", "patched"])
def test_workers_whose_clocks_are_wrong_take_no_job_away_and_are_punctual(
    server: Settings, fleet: MakeFleet, how: str
) -> None:
    if how == "faketime" and FAKETIME is None:
        if os.environ.get("CI"):
            pytest.fail("libfaketime is not installed: apt-get install faketime")
        pytest.skip("libfaketime is not installed")
    here = fleet(server, actors=RETRIES, lease=1.5)
    usual, offsets = here.environment, {}
    for offset in (0, 120, -120):
        here.environment = usual | (with_clock(here, how, offset) if offset else {})
        worker = here.worker(processes=1, threads=4)
        offsets[worker.pids()[0]] = offset
    here.environment = usual

    # Longer than three leases, on all of them.
    long = [here.submit("quiet", 5.0) for _ in range(6)]
    here.wait_started(*long)
    short = [here.submit("quiet", 0.05) for _ in range(60)]
    delayed = [here.submit("quiet", delay=2.0) for _ in range(12)]
    dated = [here.submit("quiet", eta=time.time() + 2.0) for _ in range(6)]
    retried = [here.submit("fails_once") for _ in range(12)]
    posting = [here.submit("submits", 1.5) for _ in range(12)]
    here.wait_drained()
    children = [job.progress for job in posting]

    # Each process has written its own idea of the time.
    entries = here.ledger.entries()
    seen: dict[int, list[float]] = {offset: [] for offset in offsets.values()}
    for number, entry in enumerate(entries):
        offset = offsets.get(entry.pid, 0)
        assert abs(entry.t - offset - time.time()) < 60, "the clock was right"
        seen[offset].append(entry.t)
        entries[number] = Entry(entry.job, entry.attempt, entry.pid, entry.t - offset, entry.event)
    assert all(seen.values()), "a worker ran nothing"

    once = [*long, *short, *delayed, *dated, *posting, *children]
    report = here.audit(f"clocks_wrong_by_120s_{how}", [*once, *retried])
    only_first_attempts(here, report, once)
    for due_in, some in ((2.0, delayed), (1.5, children)):
        for record in here.records(some):
            if not -0.002 <= record.started_at - record.created_at - due_in < 1:
                report.note(f"{record.id} started {record.started_at - record.created_at:.2f} s after its creation")
    for record in here.records(retried):
        first = record.attempts[0]
        pause = record.started_at - first.ended_at
        # Dramatiq takes up to a half off the backoff, at random.
        if record.attempt != 2 or record.stalls or not 0.7 <= pause < 2.5:
            report.note(f"{record.id}: attempt {record.attempt}, retried after {pause:.2f} s")
    report.finish()


# Forks (scenario S)

FORKS = """
import os, sys, time
import dramatiq
from jobs import mlq, work

before = work.submit()  # connected before the fork
parent, pids = os.getpid(), []
for number in range(3):
    pid = os.fork()
    if not pid:
        ids = [work.submit().id for _ in range(30)]
        worker = dramatiq.Worker(mlq.broker, worker_threads=2)
        worker.start()
        with open(f"child-{number}", "w") as file:
            file.write("\\n".join(ids))
        os.rename(f"child-{number}", f"child-{number}.ready")
        while not os.path.exists("enough") and os.getppid() == parent:
            time.sleep(0.01)
        worker.stop()
        os._exit(0)
    pids.append(pid)
ids = [before.id, *(work.submit().id for _ in range(30))]
print("\\n".join(ids), flush=True)
for pid in pids:
    os.waitpid(pid, 0)
"""


def test_forks_of_a_connected_process_neither_share_its_connection_nor_hide_each_others_death(
    server: Settings, fleet: MakeFleet
) -> None:
    here = fleet(server)
    program = here.program(FORKS)
    ready = [here.folder / f"child-{number}.ready" for number in range(3)]
    wait_for(lambda: all(path.exists() for path in ready))
    jobs: list[Any] = [job_id for path in ready for job_id in path.read_text().split()]
    assert program.stdout is not None
    jobs += [program.stdout.readline().decode().strip() for _ in range(31)]
    wait_for(lambda: len(here.mlq.store.workers()) == 3)
    long = here.submit("first_takes", 30)
    (start,) = here.wait_started(long)
    killed = time.time()
    os.kill(start.pid, signal.SIGKILL)
    # A lease is 30 s; its siblings live, and beat for themselves only.
    here.wait_started(long, attempt=2, timeout=20)
    here.wait_drained()
    (here.folder / "enough").touch()
    assert program.wait(PATIENCE) == 0, program.stderr.read() if program.stderr else ""
    report = here.audit("forks", [*jobs, long], faults=[(killed, start.pid)])
    report.finish()
    assert here.records([long])[0].crashes == 1


# A user with few rights (D11)


def advised() -> str:
    """The rights that the error names that a user gets who has too few."""
    error = redis.exceptions.NoPermissionError("NOPERM this user has no permissions to run the 'evalsha' command")
    return "+" + str(translate(error, "the store")).partition("+")[2].partition(" on keys")[0]


#: By the name of the test.
RIGHTS = {"usual": "+@all -@dangerous", "advised": advised()}


@pytest.mark.parametrize("rights", RIGHTS)
def test_a_user_without_dangerous_commands_can_do_everything(
    own_server: Callable[..., OwnServer], fleet: MakeFleet, rights: str
) -> None:
    server = own_server()
    with server.client() as client:
        client.execute_command("ACL", "SETUSER", "jobs", "on", ">secret", "~mlq:*", "&*", *RIGHTS[rights].split())
    here = fleet(at(f"redis://jobs:secret@127.0.0.1:{server.port}/0"), lease=1.5)
    worker = here.worker(processes=2, threads=2)

    jobs = [here.submit("work", 0.01) for _ in range(50)]
    jobs += [here.submit("work", delay=0.3), here.submit("patient", 0.1)]
    retried = here.submit("fails", 2)
    blob = here.submit("quiet", tags=["a"])
    cancelled = here.submit("quiet", delay=60)
    cancelled.cancel()
    running = here.submit("first_takes", 30)
    (start,) = here.wait_started(running)
    os.kill(start.pid, signal.SIGKILL)
    assert running.result(timeout=PATIENCE) == 2
    # The process that was killed may have been running it too.
    assert retried.result(timeout=PATIENCE) >= 3
    doomed = here.submit("fails", 9)
    assert isinstance(doomed.exception(PATIENCE), Exception)
    doomed.retry()
    assert isinstance(doomed.exception(PATIENCE), Exception)
    assert here.mlq.store.remove([doomed.id]) == 1
    assert [record.id for record in here.mlq.jobs(tag="a").jobs] == [blob.id]
    assert cancelled.state is State.CANCELLED
    here.wait_drained()
    wait_for(lambda: len(here.mlq.store.workers()) == 2)
    listed = here.program("import sys; from mlqueue.cli import main; sys.argv[1:] = ['jobs']; main()")
    assert listed.wait(PATIENCE) == 0, listed.stderr.read()
    report = here.audit(f"few_rights_{rights}", [*jobs, blob, running])
    report.finish()
    worker.stop()
    with server.client() as client:
        assert client.execute_command("ACL", "LOG") == []
    assert "NOPERM" not in here.logs()
    assert "no permission" not in here.logs().lower()
