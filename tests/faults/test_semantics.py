"""Faults of what jobs do: storms of exceptions, waits that meet crashes, delays across restarts."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from harness import ACTORS, LONG, QUIET, Fleet, own_server, send, server_pid, wait_for

from mlqueue import Settings, State
from mlqueue.job import DeadReason

pytestmark = pytest.mark.faults

MORE_ACTORS = (
    ACTORS
    + '''

class Rude(Exception):
    def __str__(self):
        raise RuntimeError("no")


@mlq.actor(max_retries=0)
def raises(kind):
    tell("start")
    if kind == "base":
        raise BaseException("base")
    if kind == "interrupt":
        raise KeyboardInterrupt
    if kind == "exit":
        raise SystemExit(3)
    if kind == "huge":
        raise ValueError("x" * 10_000_000)
    if kind == "deep":
        def recurse():
            recurse()
        recurse()
    if kind == "group":
        raise ExceptionGroup("some", [ValueError(str(i)) for i in range(20_000)])
    if kind == "surrogate":
        raise ValueError("\\ud800")
    raise Rude


@mlq.actor(max_retries=0)
def leaf(seconds=0.0):
    tell("start")
    time.sleep(seconds)
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def flow(depth, width, seconds=0.0):
    """Waits for `width` children at each of `depth` levels."""
    tell("start")
    if depth == 0:
        tell("end")
        return mlqueue.Result(attempt(), 1)
    children = [flow.submit(depth - 1, width, seconds) for _ in range(width)]
    time.sleep(seconds)
    total = 1 + sum(child.result(timeout=300) for child in children)
    tell("end")
    return mlqueue.Result(attempt(), total)


@mlq.actor(max_retries=0)
def awaits_poison(kind, child):
    tell("start")
    try:
        mlq.submit("poison", kind, job_id=child).result(timeout=300)
    except mlqueue.JobFailed as error:
        tell("end")
        return mlqueue.Result(attempt(), error.reason)
'''
)


def test_a_storm_of_exceptions_of_all_kinds_harms_nobody(server: Settings, tmp_path: Path) -> None:
    kinds = ["base", "interrupt", "exit", "huge", "deep", "group", "surrogate", "rude"]
    here = Fleet(tmp_path / "fleet", server, actors=MORE_ACTORS)
    try:
        worker = here.worker(processes=1, threads=4)
        jobs, expected = [], {}
        for i in range(400 if LONG else 104):
            bad = here.submit("raises", kinds[i % len(kinds)])
            expected[bad.id] = (DeadReason.FAILED, "")
            jobs += [bad, here.submit("leaf")]
        wait_for(lambda: here.unfinished() == 0, 60, worker.log)
        report = here.audit("exception_storm", jobs, dead=expected)
        for record in here.records(expected):
            if record.error is None or len(record.error.traceback) > 40_000 or len(record.error.message) > 10_000:
                report.note(f"{record.id}: {record.error and len(record.error.traceback)} characters of traceback")
        if len(worker.pids()) != 1:
            report.note(f"{len(worker.pids())} processes")
        worker.stop()
        report.finish()
    finally:
        here.close()


def test_nested_waits_end_though_their_workers_are_killed(server: Settings, tmp_path: Path) -> None:
    here = Fleet(tmp_path / "fleet", server, actors=MORE_ACTORS, max_stalls=50, max_crashes=50)
    try:
        worker = here.worker(processes=2, threads=1)
        jobs = [here.submit("flow", 4, 1, 0.05) for _ in range(200 if LONG else 40)]
        for _ in range(4):
            done = sum(record.state.ended for record in here.records(jobs))
            pids = [pid for pid in worker.pids()[-2:] if here.ledger.running(pid)]
            if pids:
                send(signal.SIGKILL, pids[:1])
            wait_for(
                lambda done=done: sum(record.state.ended for record in here.records(jobs)) > min(done, len(jobs) - 1),
                60,
                worker.log,
            )
        wait_for(lambda: here.unfinished() == 0, 120, worker.log)
        report = here.audit("nested_waits_under_kill", jobs)
        for job in jobs:
            if job.result(timeout=0) != 5:
                report.note(f"{job.id} gave {job.result(timeout=0)}")
        worker.stop()
        report.finish()
    finally:
        here.close()


def test_a_poison_job_that_is_awaited_is_dead_alone_and_who_waited_hears_of_it(
    server: Settings, tmp_path: Path
) -> None:
    here = Fleet(tmp_path / "fleet", server, actors=MORE_ACTORS)
    try:
        worker = here.worker(processes=1, threads=1)
        job = here.submit("awaits_poison", "kill", "poison-1")
        wait_for(lambda: here.unfinished() == 0, 60, worker.log)
        report = here.audit("awaited_poison", [job, "poison-1"], dead={"poison-1": (DeadReason.CRASHED, "")})
        parent, child = here.records([job, "poison-1"])
        told = job.result(timeout=0)
        if (parent.state, parent.crashes, told) != (State.SUCCEEDED, 0, "crashed"):
            report.note(f"who waited: {parent.state}, {parent.crashes} crashes, {told}")
        if child.crashes != 3:
            report.note(f"the poison job had {child.crashes} crashes")
        worker.stop()
        report.finish()
    finally:
        here.close()


def test_delayed_jobs_are_punctual_across_restarts_of_server_and_workers(tmp_path: Path) -> None:
    count = 5000 if LONG else 600
    with own_server(server_grace=30) as settings:
        here = Fleet(tmp_path / "fleet", settings, actors=MORE_ACTORS)
        try:
            worker = here.worker(processes=1, threads=8)
            jobs = {}
            begun = time.time()
            for _ in range(count):
                delay = random.uniform(0.5, 12)
                job = here.mlq.submit("leaf", delay=delay)
                jobs[job.id] = time.time() + delay
            # The server dies; whoever needs it starts it again. Then the workers.
            send(signal.SIGKILL, [server_pid(settings)])
            wait_for(lambda: here.unfinished() is not None)
            worker.kill_all()
            down = time.time()
            worker = here.worker(processes=1, threads=8)
            up = time.time()
            wait_for(lambda: here.unfinished() == 0, 60, worker.log)
            report = here.audit("delayed_across_restarts", list(jobs))
            report.longest_s = 0.0
            for job_id, due in jobs.items():
                starts = here.ledger.of(job_id, "start")
                if len(starts) == 2 and starts[0].t <= down:
                    continue  # it ran when its worker was killed, or its end did not reach the server
                if len(starts) != 1:
                    report.note(f"{job_id}: {len(starts)} starts")
                    continue
                # What was due while nobody worked starts when somebody does.
                late = starts[0].t - (up if begun <= due <= up and starts[0].t >= down else due)
                report.longest_s = max(report.longest_s, late)
                if late > (1 if QUIET else 5) or starts[0].t < due - 0.05:
                    report.note(f"{job_id}: {late:+.2f} s")
            worker.stop()
            report.finish()
        finally:
            here.close(forget=False)
