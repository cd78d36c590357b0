"""Worker processes that are killed, stopped and blocked: nothing acknowledged is lost, no job has two outcomes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from harness import ACTORS, LONG, QUIET, MakeFleet, is_alive, own_server, send, server_pid, tree, wait_for

from mlqueue import DeadReason, State

pytestmark = pytest.mark.faults

LINUX = sys.platform == "linux"

#: The longest that a job whose process was killed may wait until it runs again, in seconds.
RECOVERY = 1.0 if QUIET else 15.0


def kill(pid: int) -> tuple[float, int]:
    """Kills a process; when, and which."""
    at = time.time()
    os.kill(pid, signal.SIGKILL)
    return at, pid


# Children are killed


def test_a_child_killed_20_times_during_2000_jobs_loses_none_and_the_other_child_never_stops(fleet: MakeFleet) -> None:
    kills = 100 if LONG else 20
    each = 100
    here = fleet()
    worker = here.worker(processes=2, threads=8)
    other = worker.wait_seat(2, 1)
    jobs, faults = [], []
    for round_ in range(kills):
        victim = worker.wait_seat(1, round_ + 1)
        jobs += [here.submit("work", 0.03) for _ in range(each)]
        wait_for(lambda victim=victim: here.ledger.running(victim) or not here.unfinished(), what=here.logs)
        faults.append(kill(victim))
    here.wait_drained()

    report = here.audit("kill -9 of a child", jobs, faults=faults).finish()
    assert report.ok == kills * each
    assert report.recovered >= kills
    assert report.max_recovery_s is not None
    assert report.max_recovery_s < RECOVERY
    assert worker.pids(2) == [other]
    assert is_alive(other)
    assert not [record for record in here.records(jobs) if record is not None and record.stalls]
    worker.stop()


def test_children_killed_at_random_moments_while_they_run_jobs_of_no_length(fleet: MakeFleet) -> None:
    # Between a fetch and a start, between an end and its settle, while they boot.
    kills = 60 if LONG else 12
    here = fleet()
    worker = here.worker(processes=2, threads=4)
    chance = random.Random(3)
    jobs: list[Any] = []
    stop = threading.Event()

    def produce() -> None:
        while not stop.is_set():
            jobs.append(here.submit("quiet"))

    producer = threading.Thread(target=produce)
    producer.start()
    faults = []
    try:
        for _ in range(kills):
            stop.wait(chance.uniform(0.1, 0.6))
            children = [pid for pid in tree(worker.pid)[1:] if is_alive(pid)]
            if children:
                faults.append(kill(chance.choice(children)))
    finally:
        stop.set()
        producer.join()
    here.wait_drained()

    report = here.audit("kill -9 of children at random", jobs, faults=faults).finish()
    assert report.ok == len(jobs)
    worker.stop()


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("exit", "exit code 3"),
        ("segfault", "killed by signal 11 (SIGSEGV)"),
        ("kill", "killed by signal 9 (SIGKILL)"),
    ],
)
def test_a_job_that_kills_its_process_is_dead_after_three_starts_and_no_other_is(
    fleet: MakeFleet, kind: str, told: str
) -> None:
    here = fleet()
    worker = here.worker(processes=2, threads=8)
    innocents = [here.submit("work", 0.3) for _ in range(16)]
    here.wait_started(*innocents)
    culprit = here.submit("poison", kind)
    innocents += [here.submit("work", 0.1) for _ in range(183)]
    wait_for(lambda: culprit.state.ended, what=here.logs)
    here.wait_drained()

    report = here.audit(f"poison: {kind}", [*innocents, culprit], dead=[culprit]).finish()
    assert (report.ok, report.dead_lettered) == (199, 1)
    record = culprit.record
    assert (record.state, record.dead_reason) == (State.DEAD, DeadReason.CRASHED)
    assert len(here.ledger.of(culprit, "start")) == record.crashes == 3
    assert told in record.error.message
    assert [told in past.error.message for past in record.attempts] == [True, True, True]
    # Nobody runs again but for a process that died below it.
    for innocent in here.records(innocents):
        assert innocent is not None
        assert innocent.attempt >= 1 + innocent.crashes
    worker.stop()


def test_many_poison_jobs_at_once_take_nobody_with_them(fleet: MakeFleet) -> None:
    number = 12 if LONG else 4
    here = fleet()
    worker = here.worker(processes=2, threads=8)
    innocents, culprits = [], []
    for index in range(number):
        innocents += [here.submit("work", 0.1) for _ in range(25)]
        culprits.append(here.submit("poison", ("exit", "segfault", "kill")[index % 3]))
    wait_for(lambda: all(job.state.ended for job in culprits), 120, here.logs)
    here.wait_drained()

    report = here.audit("many poison jobs", [*innocents, *culprits], dead=culprits).finish()
    assert (report.ok, report.dead_lettered) == (len(innocents), number)
    assert [len(here.ledger.of(job, "start")) for job in culprits] == [3] * number
    worker.stop()


#: A thread dies after, or before its job was settled.
FRAGILE = """

from mlqueue.broker import StoreConsumer


@mlq.actor(max_retries=0)
def breaks(before, times=1):
    tell("start")
    name = mlqueue.current_job().id
    settle = StoreConsumer.ack

    def ack(self, message):
        if message.message_id != name or not before:
            settle(self, message)
        if message.message_id == name:
            raise SystemExit

    if attempt() <= times:
        StoreConsumer.ack = ack
    tell("end")
    return attempt()
"""


@pytest.mark.parametrize("before", [False, True])
def test_a_worker_thread_that_dies_takes_its_child_with_it(fleet: MakeFleet, before: bool) -> None:
    here = fleet(actors=ACTORS + FRAGILE, drain=2.0)
    worker = here.worker(processes=1, threads=8)
    jobs = [here.submit("work", 0.05) for _ in range(100)]
    here.wait_started(jobs[0])
    broken = here.submit("breaks", before)
    jobs += [here.submit("work", 0.05) for _ in range(100)]
    worker.wait_seat(1, 2)
    here.wait_drained()

    report = here.audit(f"a thread dies {'before' if before else 'after'} the settle", [*jobs, broken]).finish()
    assert report.ok == 201
    assert (broken.record.attempt, broken.record.crashes) == (1 + before, before)
    assert worker.lines("broken")
    # The others had the time to end: only what was fetched and had not started went back.
    assert [len(here.ledger.of(job, "start")) for job in jobs] == [1] * 200
    assert not [record for record in here.records(jobs) if record is not None and record.crashes + record.stalls]
    worker.stop()


def test_a_job_that_kills_its_thread_each_time_is_dead_after_three_starts(fleet: MakeFleet) -> None:
    here = fleet(actors=ACTORS + FRAGILE, drain=2.0)
    worker = here.worker(processes=1, threads=4)
    culprit = here.submit("breaks", True, times=1000)
    jobs = [here.submit("work", 0.05) for _ in range(100)]
    wait_for(lambda: culprit.state.ended, what=here.logs)
    here.wait_drained()

    report = here.audit("a job that kills its thread", [*jobs, culprit], dead=[culprit]).finish()
    assert (report.ok, report.dead_lettered) == (100, 1)
    record = culprit.record
    assert (record.dead_reason, record.attempt, record.crashes) == (DeadReason.CRASHED, 3, 3)
    assert "a thread of its worker died" in record.error.message
    worker.stop()


# The supervisor is killed


def test_children_of_a_killed_supervisor_end_and_the_next_one_runs_everything(fleet: MakeFleet) -> None:
    rounds = 20 if LONG else 4
    here = fleet()
    jobs, slowest = [], 0.0
    for _ in range(rounds):
        worker = here.worker(processes=2, threads=4)
        jobs += [here.submit("work", 0.02) for _ in range(75)]
        sleepers = [here.submit("first_takes", 600) for _ in range(2)]
        jobs += sleepers
        here.wait_started(*sleepers)
        if LINUX:
            # Nothing else can start in its child from here on.
            jobs.append(here.submit("holds_gil", 600, first_only=True))
            here.wait_started(jobs[-1])
        pids = tree(worker.pid)[1:]
        at, _ = kill(worker.pid)
        worker.process.wait()
        wait_for(lambda pids=pids: not any(map(is_alive, pids)), 5, here.logs)
        slowest = max(slowest, time.time() - at)
    worker = here.worker(processes=2, threads=4)
    # None waits for the end of a lease: the next supervisor sees that these processes are gone.
    here.wait_drained(here.mlq.settings.lease * 0.7)

    report = here.audit("kill -9 of the supervisor", jobs)
    report.longest_s = round(slowest, 3)
    report.finish()
    assert report.ok == len(jobs)
    assert report.recovered >= 2 * rounds
    # Nobody is blamed for it.
    assert not [record for record in here.records(jobs) if record is not None and record.crashes]
    worker.stop()


#: Submits until it has tried so often, and writes down what was acknowledged.
PRODUCER = """
import os, sys, threading
import jobs
from mlqueue.errors import StoreError

def note(name, text):
    fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, text.encode() + b"\\n")
    os.close(fd)

def produce():
    while os.path.getsize("tried") < int(sys.argv[1]):
        note("tried", "")
        try:
            job = jobs.work.submit(0.002)
        except StoreError as error:
            note("refused", str(error))
        else:
            note("acknowledged", job.id)

note("tried", "")
threads = [threading.Thread(target=produce) for _ in range(2)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize("durability", ["everysec", "always"])
def test_every_id_that_was_returned_runs_though_all_processes_and_the_server_are_killed(
    fleet: MakeFleet, durability: str
) -> None:
    cycles, submits = (60, 20_000) if LONG else (5, 2_000)
    with own_server(durability=durability) as store:
        here = fleet(store=store)
        tried, chance = here.folder / "tried", random.Random(7)
        tried.touch()
        for cycle in range(cycles):
            worker = here.worker(processes=2, threads=4)
            producer = here.program(PRODUCER, str(submits))
            goal = submits * (cycle + 1) // (cycles + 1)
            wait_for(lambda goal=goal: tried.stat().st_size >= goal, what=here.logs)
            threading.Event().wait(chance.uniform(0, 0.2))
            # All at once, or the server before or after the others.
            server = server_pid(store)
            steps = [lambda worker=worker: worker.kill_all(), lambda server=server: send(signal.SIGKILL, [server])]
            if cycle % 2:
                steps.reverse()
            if cycle % 3:
                steps.append(lambda producer=producer: send(signal.SIGKILL, [producer.pid]))
            for step in steps:
                step()
            if cycle % 3:
                producer.wait()
        producers = [here.program(PRODUCER, str(submits))]
        worker = here.worker(processes=2, threads=4)
        for program in [*producers, *here._programs]:
            wait_for(lambda program=program: program.poll() is not None, 120, here.logs)
        here.wait_drained(120)

        ids = (here.folder / "acknowledged").read_text().split()
        report = here.audit(f"kill -9 of everything, {durability}", ids, attempted=tried.stat().st_size).finish()
        assert report.ok == len(ids) == len(set(ids)) >= submits * 0.9
        worker.stop()
        here.close()


# Processes that are stopped, or do not answer

#: Each waits, for a second attempt or (a stopped process) for its own to be over, and then ends in its own way.
ZOMBIES = """

@mlq.actor(max_retries=3, min_backoff=50, max_backoff=100)
def zombie(way):
    tell("start")
    mine = attempt()
    current = mlqueue.current_job()
    current.progress(0.5, f"attempt {{mine}}")
    until = time.monotonic() + 60
    while mine == 1 and time.monotonic() < until and not pathlib.Path("resumed").exists():
        time.sleep(0.02)
    try:
        current.progress(mine, f"end of attempt {{mine}}")
        tell("progressed")
    except mlqueue.MLQueueError as error:
        tell("refused:" + type(error).__name__)
    if mine == 1 and way == "fail":
        tell("raised")
        raise ValueError("of the first attempt")
    tell("end")
    return mine
"""


def test_what_a_stopped_worker_reports_after_its_lease_is_refused(fleet: MakeFleet) -> None:
    rounds = 5 if LONG else 2
    jobs: list[Any] = []
    here = fleet(actors=ACTORS + ZOMBIES, lease=1.0, sweep_interval=0.3)
    worker = here.worker(processes=2, threads=8)
    for _ in range(rounds):
        now = [here.submit("zombie", way) for way in ("return", "fail") for _ in range(4)]
        jobs += now
        first = here.wait_started(*now)
        stopped = first[0].pid
        theirs = [job for job, entry in zip(now, first, strict=True) if entry.pid == stopped]
        os.kill(stopped, signal.SIGSTOP)
        here.wait_started(*theirs, attempt=2)
        for job in theirs:
            assert job.result(timeout=60) == 2
        before = [job.record for job in theirs]
        (here.folder / "resumed").touch()
        os.kill(stopped, signal.SIGCONT)
        done = ("end", "raised")
        wait_for(
            lambda theirs=theirs, done=done: all(
                any(entry.attempt == 1 and entry.event in done for entry in here.ledger.of(job)) for job in theirs
            ),
            what=here.logs,
        )
        wait_for(lambda: len(worker.lines("was taken over by a later one")) >= 1, what=here.logs)
        here.wait_drained()
        wait_for(lambda: not here.mlq.store.connector.client.keys(f"{here.mlq.store.root}:h:*"), what=here.logs)
        assert [job.record for job in theirs] == before
        for record in before:
            assert (record.state, record.attempt, record.stalls) == (State.SUCCEEDED, 2, 1)
            assert (record.crashes, record.retries, record.progress) == (0, 0, 2)
        (here.folder / "resumed").unlink()

    report = here.audit("SIGSTOP past the lease, then SIGCONT", jobs).finish()
    assert report.ok == len(jobs)
    worker.stop()


def test_c_calls_that_hold_the_gil_for_three_leases_run_once(fleet: MakeFleet) -> None:
    lease = 1.0
    here = fleet(lease=lease, sweep_interval=0.3)
    worker = here.worker(processes=2, threads=2)
    jobs = [here.submit("holds_gil", 3.2 * lease) for _ in range(2)]
    here.wait_drained()
    report = here.audit("the GIL held for three leases", jobs).finish()
    assert (report.ok, report.duplicated_runs) == (2, 0)
    assert [(record.attempt, record.stalls) for record in here.records(jobs) if record] == [(1, 0)] * 2
    worker.stop()


@pytest.mark.parametrize("last", ["server", "workers", "supervisor"])
def test_no_live_worker_loses_a_job_when_everything_stands_still_for_three_leases(fleet: MakeFleet, last: str) -> None:
    lease = 2.0
    with own_server() as store:
        here = fleet(store=store, lease=lease, sweep_interval=0.5)
        worker = here.worker(processes=2, threads=4)
        jobs = [here.submit("work", 3 * lease + 3) for _ in range(6)]
        here.wait_started(*jobs)
        supervisor, *children = tree(worker.pid)
        groups = {"supervisor": [supervisor], "workers": children, "server": [server_pid(store)]}
        order = [*(name for name in groups if name != last), last]
        for name in order:
            send(signal.SIGSTOP, groups[name])
        threading.Event().wait(3 * lease)
        for name in order:
            send(signal.SIGCONT, groups[name])
            threading.Event().wait(0.3)
        here.wait_drained()
        report = here.audit(f"all stopped for three leases, the {last} last to go on", jobs).finish()
        assert (report.ok, report.recovered, report.duplicated_runs) == (6, 0, 0)
        assert [(record.attempt, record.stalls) for record in here.records(jobs) if record] == [(1, 0)] * 6
        worker.stop()
        here.close()


# Told to stop


def test_workers_that_are_told_to_stop_during_load_end_in_order(fleet: MakeFleet) -> None:
    rounds = 20 if LONG else 4
    here = fleet(drain=10)
    jobs, slowest = [], 0.0
    for round_ in range(rounds):
        worker = here.worker(processes=2, threads=4)
        jobs += [here.submit("work", 0.02) for _ in range(75)]
        long = [here.submit("patient", 30 if round_ < rounds - 1 else 0.1) for _ in range(2)]
        here.wait_started(long[0])
        begun = time.monotonic()
        worker.signal(signal.SIGINT if round_ % 2 else signal.SIGTERM)
        assert worker.wait() == 0
        slowest = max(slowest, time.monotonic() - begun)
        assert not worker.lines("CRITICAL"), worker.log()
        for job in long:
            assert job.state in (State.QUEUED, State.SUCCEEDED)
            if job.state is State.QUEUED:
                job.cancel()
            else:
                jobs.append(job)
        assert here.mlq.store.workers() == []
    worker = here.worker(processes=2, threads=4)
    here.wait_drained()

    report = here.audit("SIGTERM during load", jobs)
    report.longest_s = round(slowest, 3)
    report.finish()
    assert (report.ok, report.duplicated_runs, report.recovered) == (len(jobs), 0, 0)
    assert slowest < 10 + 2
    for record in here.records(jobs):
        assert record is not None
        assert (record.crashes, record.stalls) == (0, 0)
    worker.stop()


def test_a_second_signal_gives_running_jobs_back_at_once(fleet: MakeFleet) -> None:
    here = fleet()
    jobs = []
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        worker = here.worker(processes=2, threads=4)
        now = [here.submit("first_takes", 600) for _ in range(5)]
        jobs += now
        here.wait_started(*now)
        worker.signal(first)
        worker.wait_line("draining")
        threading.Event().wait(0.4)  # sooner it would be the first one's echo
        begun = time.monotonic()
        worker.signal(second)
        assert worker.wait() == 130
        assert time.monotonic() - begun < 5
        for record in here.records(now):
            assert record is not None
            assert (record.state, record.crashes, record.stalls) == (State.QUEUED, 0, 0)
    worker = here.worker(processes=2, threads=4)
    here.wait_drained()
    report = here.audit("a second SIGTERM", jobs).finish()
    assert (report.ok, report.recovered) == (10, 10)
    worker.stop()


# For long


def resident(pids: list[int]) -> int:
    """The memory of processes, in KiB."""
    told = subprocess.run(
        ["ps", "-o", "rss=", "-p", ",".join(map(str, pids))], capture_output=True, text=True, check=False
    )
    return sum(map(int, told.stdout.split()))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


@pytest.mark.skipif(not LONG, reason="takes minutes: `make faults-long`")
@pytest.mark.skipif(not LINUX, reason="counts in /proc")
def test_mixed_load_with_a_kill_every_ten_seconds_leaves_memory_descriptors_and_keys_flat(fleet: MakeFleet) -> None:
    minutes = float(os.environ.get("FAULTS_SOAK_MINUTES", "5"))
    here = fleet(result_ttl=20, lease=5, drain=5)
    worker = here.worker(processes=2, threads=4)
    chance = random.Random(11)
    client, keys = here.mlq.client, f"{here.mlq.store.root}:*"
    samples: list[dict[str, int]] = []
    faults, attempted, ended = [], 0, 0
    batch: list[Any] = []
    begun = last_kill = time.monotonic()
    while time.monotonic() < begun + 60 * minutes:
        batch = [here.submit("quiet", chance.choice((0, 0, 0.01, 0.1))) for _ in range(30)]
        batch += [here.submit("fails", chance.randrange(3)) for _ in range(5)]
        batch += [here.submit("quiet", 0.01, delay=chance.uniform(0, 0.5)) for _ in range(5)]
        attempted += len(batch)
        if time.monotonic() > last_kill + 10:
            last_kill = time.monotonic()
            children = [pid for pid in tree(worker.pid)[1:] if is_alive(pid)]
            if children:
                faults.append(kill(chance.choice(children)))
        here.wait_drained()
        records = here.records(batch)
        assert [record.state for record in records if record is not None] == [State.SUCCEEDED] * len(batch)
        ended += len(records)
        samples.append(
            {
                "keys": sum(1 for _ in client.scan_iter(keys, count=1000)),
                "memory": int(client.info("memory")["used_memory"]),
                "supervisor": resident([worker.pid]),
                "descriptors": descriptors(worker.pid),
                "server": int(client.info("clients")["connected_clients"]),
            }
        )
    # Gone with their time to live: what stays is what a worker has.
    wait_for(lambda: sum(1 for _ in client.scan_iter(keys, count=1000)) < 40, 120)
    report = here.audit("soak", batch[:0], attempted=attempted, faults=faults)
    report.acknowledged = report.ok = ended
    report.finish()
    early, late = samples[len(samples) // 4], samples[-1]
    print({"early": early, "late": late, "kills": len(faults)})
    assert late["descriptors"] <= early["descriptors"] + 4
    assert late["server"] <= early["server"] + 4
    assert late["supervisor"] <= early["supervisor"] * 1.2 + 5_000
    assert late["keys"] <= early["keys"] * 1.5 + 500
    worker.stop()
