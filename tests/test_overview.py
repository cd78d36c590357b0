"""What is kept and asked for the sake of those who look: how the namespace fared, paused queues, workers that are asked
to end, what was done by whom."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import StartWorker, eventually
from worker_processes import Site, is_alive, wait_for

from mlqueue import MLQ, Settings, State, codec
from mlqueue.job import NewJob
from mlqueue.overview import read_now, troubles
from mlqueue.processes import _seconds, usage
from mlqueue.store.store import MOST_ACTS


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[Site]:
    site = Site(tmp_path, server, lease=1.5, sweep_interval=0.2, drain=1.0)
    yield site
    site.close()


# What is read for pages


def test_who_waits_for_a_limit_is_told(mlq: MLQ, start_worker: StartWorker) -> None:
    gate = threading.Event()

    @mlq.actor(resources={"gpu": 1})
    def train() -> None:
        gate.wait(10)

    @mlq.actor(concurrency=1)
    def load() -> None:
        gate.wait(10)

    assert {} == mlq.store.parked()
    jobs = [train.submit() for _ in range(3)] + [load.submit(concurrency_key="a") for _ in range(2)]
    start_worker(threads=8)
    eventually(lambda: len(mlq.store.parked()) == 2)
    expected = {"gpu": [("default", "train", 2, jobs[1].id)], "@load/a": [("default", "load", 1, jobs[4].id)]}
    assert expected == mlq.store.parked()
    gate.set()
    for job in jobs:
        job.result(10)
    assert {} == mlq.store.parked()


def test_what_jobs_died_of_and_what_there_is_to_search_in_them_is_bounded(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def fails(text: str) -> None:
        raise ValueError(text)

    job, waiting = fails.submit("é" * 5000), mlq.submit("nobody", "needle")
    start_worker()
    eventually(lambda: job.state is State.DEAD)
    died, other, none = mlq.store.died([job.id, waiting.id, "gone"], 100)
    assert died is not None
    assert ("fails", "failed", "builtins.ValueError", "é" * 50) == (
        died.actor,
        died.reason,
        died.error.type,
        died.error.message,
    )
    assert (None, None) == (other, none)
    assert died.at == mlq.store.record(job.id).finished_at
    large, small, none = mlq.store.texts([job.id, waiting.id, "gone"], 1000, 7)
    assert large is not None
    assert small is not None
    assert (b"", "ééé\ufffd") == (large[0], large[1].message)
    assert b"needle" in small[0]
    assert None is none


def test_a_job_knows_the_latest_of_those_that_it_submitted(mlq: MLQ) -> None:
    parent = mlq.submit("a")
    ids = [f"child-{number}" for number in range(1005)]
    mlq.store.submit([NewJob(id=one, queue="default", actor="b", body=b"", parent=parent.id) for one in ids])
    mlq.store.submit([NewJob(id=ids[0], queue="default", actor="b", body=b"", parent=parent.id)])  # it is there
    assert ([ids[-1], ids[-2]], 1000) == mlq.store.children(parent.id, 2)
    mlq.store.submit([NewJob(id="orphan", queue="default", actor="b", body=b"", parent="gone")])
    assert 0 == mlq.client.exists(f"{mlq.store.root}:ch:gone")


# How it fared


def course_key(mlq: MLQ) -> str:
    return f"{mlq.store.root}:course"


def test_the_sweep_notes_how_the_namespace_fares_once_a_stretch(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def work(fail: bool = False) -> None:
        if fail:
            raise ValueError("no")

    jobs = [work.submit(), work.submit(), work.submit(fail=True)]
    start_worker()
    eventually(lambda: all(job.state.ended for job in jobs))
    mlq.submit("unknown", queue_name="elsewhere")
    mlq.submit("unknown", queue_name="elsewhere", delay=60)
    for _ in range(5):
        mlq.store.sweep("me", 5)
    found = mlq.store.course()
    assert 1 <= len(found) <= 2
    newest = found[-1]
    assert (1, 1, 0, 2, 1) == (newest.queued, newest.scheduled, newest.running, newest.succeeded, newest.dead)
    assert (3, 3) == (newest.waits, newest.runs)


def test_of_these_notes_a_bounded_number_is_kept(mlq: MLQ) -> None:
    for _ in range(260):
        mlq.client.hset(f"{mlq.store.root}:sweep", "course", 0)
        mlq.store.sweep("me", 5)
    assert 250 == mlq.client.llen(course_key(mlq))


def test_broken_counters_do_not_stop_the_sweep(mlq: MLQ) -> None:
    mlq.client.set(f"{mlq.store.root}:m", "no hash")
    assert mlq.store.sweep("me", 5).elected


def test_what_is_wrong_is_told_the_worst_first(mlq: MLQ) -> None:
    mlq.submit("a", queue_name="left")
    mlq.store.pause("held")
    now = read_now(mlq.store)
    assert [("bad", "queue", "left"), ("warn", "queue", "held")] == [(t.level, t.about, t.queue) for t in troubles(now)]


# Paused queues


def test_of_a_paused_queue_nothing_is_started_until_it_is_resumed(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="slow")
    def slow() -> str:
        return "slow"

    @mlq.actor
    def fast() -> str:
        return "fast"

    start_worker()
    assert "slow" == slow.submit().result(10)
    mlq.store.pause("slow", "ann")
    held, other = slow.submit(), fast.submit()
    assert "fast" == other.result(10)
    assert "fast" == fast.submit().result(10)
    assert State.QUEUED is held.state
    assert "ann" == mlq.store.paused()["slow"].who
    mlq.store.resume("slow")
    assert {} == mlq.store.paused()
    assert "slow" == held.result(10)


def test_a_worker_that_starts_later_heeds_a_pause_too(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="slow")
    def slow() -> str:
        return "slow"

    @mlq.actor
    def fast() -> str:
        return "fast"

    mlq.store.pause("slow")
    mlq.store.pause("other")
    held = slow.submit()
    start_worker()
    assert "fast" == fast.submit().result(10)
    assert State.QUEUED is held.state
    mlq.store.resume("other")
    assert State.QUEUED is held.state
    mlq.store.resume("slow")
    assert "slow" == held.result(10)


def test_one_who_waits_for_a_job_of_a_paused_queue_does_not_start_it(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(queue_name="slow")
    def child() -> int:
        return 7

    @mlq.actor
    def parent() -> Any:
        return child.submit().result(20)

    mlq.store.pause("slow")
    job = parent.submit()
    start_worker(threads=1)
    eventually(lambda: mlq.store.record(job.id).waits_for)
    waited_for = mlq.store.record(job.id).waits_for
    assert waited_for is not None
    assert State.QUEUED is mlq.store.record(waited_for).state
    mlq.store.resume("slow")
    assert 7 == job.result(10)


def test_a_pause_is_kept_as_it_was_made(mlq: MLQ) -> None:
    mlq.store.pause("a: b|%", "ann")
    since = mlq.store.paused()["a: b|%"].since
    mlq.store.pause("a: b|%", "bob")
    assert (since, "ann") == mlq.store.paused()["a: b|%"]


# Workers


def test_workers_are_measured_and_one_that_drains_is_replaced_when_its_job_has_ended(site: Site) -> None:
    supervised = site.supervise(processes=1, threads=2)
    [worker] = eventually(lambda: [w for w in site.mlq.store.workers() if w.vitals and w.info])
    assert worker.vitals["rss"] > 2**20
    assert (1, 0) == (worker.vitals["seat"], worker.vitals["restarts"])
    assert supervised.process.pid == worker.vitals["supervisor"]
    # Longer than the drain time: a drain waits for it all the same.
    job = site.submit("work", 2.5)
    site.wait_started(job)
    assert site.mlq.store.ask_worker(worker.id, "drain")
    eventually(lambda: [w.asked for w in site.mlq.store.workers()] == ["drain"])
    supervised.wait_line("is asked to drain")
    later = site.submit("work")
    assert worker.info["pid"] == job.result(10)
    assert worker.info["pid"] != later.result(10)
    assert 1 == site.record(job).attempt
    [other] = eventually(lambda: [w for w in site.mlq.store.workers() if w.vitals and w.id != worker.id])
    assert (1, 1, "") == (other.vitals["seat"], other.vitals["restarts"], other.asked)
    supervised.stop()


def test_a_worker_that_is_stopped_leaves_its_place_empty_and_the_last_one_ends_the_supervisor(site: Site) -> None:
    supervised = site.supervise(processes=2, threads=1)
    # Its supervisor beats for a worker before that says who it is.
    eventually(lambda: sum(bool(one.info) for one in site.mlq.store.workers()) == 2)
    first, second = site.mlq.store.workers()
    job = site.submit("first_waits", 60)
    [start] = site.wait_started(job)
    holder, idle = (first, second) if start["pid"] == first.info["pid"] else (second, first)
    site.mlq.store.ask_worker(holder.id, "stop")
    # Its job has the drain time, goes back, and is another's.
    assert 2 == job.result(20)
    wait_for(lambda: not is_alive(holder.info["pid"]))
    assert [idle.id] == [worker.id for worker in site.mlq.store.workers()]
    site.mlq.store.ask_worker(idle.id, "stop")
    assert 0 == supervised.wait(), supervised.log()
    assert 2 == len(supervised.lines("its place stays empty"))


def test_a_worker_that_is_not_there_is_not_asked(mlq: MLQ) -> None:
    assert not mlq.store.ask_worker("nobody", "stop")
    assert 0 == mlq.client.exists(f"{mlq.store.root}:w:nobody")


def test_a_beat_for_a_worker_that_was_released_leaves_nothing(mlq: MLQ) -> None:
    mlq.store.tend(["gone"], {"gone": {"rss": 1}})
    assert 0 == mlq.client.exists(f"{mlq.store.root}:w:gone")


def test_what_a_process_takes_is_measured() -> None:
    mine = usage(os.getpid())
    assert mine is not None
    assert mine.rss > 2**20
    assert mine.cpu > 0
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert usage(ended.pid) is None


@pytest.mark.parametrize(
    ("clock", "seconds"), [("0:01.50", 1.5), ("02:03", 123.0), ("1:02:03", 3723.0), ("2-01:00:00", 176400.0)]
)
def test_times_are_read_as_ps_writes_them(clock: str, seconds: float) -> None:
    assert seconds == _seconds(clock)


# What was done by whom


def test_what_was_done_is_kept_newest_first_and_bounded(mlq: MLQ) -> None:
    for number in range(MOST_ACTS + 5):
        mlq.store.note_act("ann", "cancel", str(number))
    assert [str(MOST_ACTS + 4), str(MOST_ACTS + 3)] == [act.what for act in mlq.store.acts(limit=2)]
    assert MOST_ACTS == len(mlq.store.acts(limit=2 * MOST_ACTS))
    assert str(MOST_ACTS) == mlq.store.acts(start=4, limit=1)[0].what


# In the terminal


def run(mlq: MLQ, *words: str) -> str:
    """What a command of the command line prints."""
    code = "import sys; from mlqueue.cli import main; sys.exit(main())"
    options = ("--namespace", mlq.name, "--url", str(mlq.settings.url))
    done = subprocess.run(
        [sys.executable, "-c", code, *words, *options],
        env=os.environ | {"COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout


def test_top_shows_queues_workers_and_jobs(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def work(fail: bool = False) -> None:
        if fail:
            raise ValueError("no \x1b[31mway [red]")

    jobs = [work.submit(), work.submit(fail=True)]
    start_worker()
    eventually(lambda: all(job.state.ended for job in jobs))
    mlq.submit("lonely", queue_name="audio")
    shown = run(mlq, "top", "--once")
    for text in (mlq.name, "1 dead", "No worker serves the queue audio: 1 job waits.", "lonely", "no worker", "idle"):
        assert text in shown, text
    assert jobs[0].id in shown
    assert "ValueError: no [31mway [red]" in shown
    assert "\x1b[31m" not in shown
    listed = run(mlq, "jobs", "--watch", "--actor", "lonely")
    assert jobs[0].id not in listed
    assert "lonely" in listed
    told = json.loads(run(mlq, "top", "--once", "--json"))
    assert 1 == told["counts"]["dead"]
    assert "audio" in [queue["name"] for queue in told["queues"]]


def test_top_shows_the_pools_that_have_batches_prepared_and_how_those_travel(mlq: MLQ) -> None:
    assert "TRAINER" not in run(mlq, "top", "--once").upper()
    told = {"queue": "batches", "host": "node", "pid": 77, "workers": 2, "ready": 3, "outstanding": 17, "retries": 5}
    told["lately"] = {"seconds": 4.0, "given": 48, "bytes": 8_000_000, "trainer_waited": 1.0, "workers_waited": 4.0}
    mlq.store.publish_pool("run", codec.encode({**told, "transport": "shared memory"}))
    rows = [line.split() for line in run(mlq, "top", "--once").splitlines() if "node/77" in line]
    assert [["batches", "node/77", "25%", "2", "50%", "12.0", "2", "3", "of", "20", "5", "shared", "memory"]] == rows
    [pool] = json.loads(run(mlq, "top", "--once", "--json"))["pools"]
    assert ("run", 77, "shared memory") == (pool["id"], pool["pid"], pool["transport"])
