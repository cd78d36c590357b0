"""Limits: jobs wait for slots without costing anything, in turn, and whoever is killed gives his back."""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import StartWorker, counting_proxy, eventually, fresh_app
from worker_processes import Site, wait_for

from mlqueue import MLQ, InvalidJob, Job, Limit, Retry, Settings, SettingsError, State, current_job
from mlqueue.job import new_id
from mlqueue.message import LISTENER
from mlqueue.store.scripts import script
from mlqueue.testing import eager

#: How soon a job is to start when a slot is free for it, in seconds.
SOON = 0.05


class Diary:
    """What jobs have done, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, Any]] = []
        self.lock = threading.Lock()

    def note(self, what: str, about: Any) -> None:
        with self.lock:
            self.lines.append((what, about))

    def all(self, what: str) -> list[Any]:
        return [about for kind, about in self.lines if kind == what]

    @property
    def most_at_once(self) -> int:
        now = most = 0
        for kind, _ in self.lines:
            now += {"start": 1, "end": -1}.get(kind, 0)
            most = max(most, now)
        return most


@pytest.fixture
def diary() -> Diary:
    return Diary()


def ended(jobs: list[Job[Any]], timeout: float = 15.0) -> list[Any]:
    return [job.result(timeout=timeout) for job in jobs]


# One after the other


def test_jobs_that_need_the_one_gpu_run_one_after_the_other(mlq: MLQ, start_worker: StartWorker, diary: Diary) -> None:
    @mlq.actor(resources={"gpu": 1})
    def train(n: int) -> dict[str, tuple[int, ...]]:
        diary.note("start", n)
        time.sleep(0.005)
        diary.note("end", n)
        return current_job().slots

    @mlq.actor
    def other(n: int) -> dict[str, tuple[int, ...]]:
        return current_job().slots

    start_worker(threads=4)
    jobs = train.submit_many([(n,) for n in range(20)])
    assert [{}] * 4 == ended(other.submit_many([(n,) for n in range(4)]))
    assert [{"gpu": (0,)}] * 20 == [{name: tuple(slots) for name, slots in result.items()} for result in ended(jobs)]
    assert (1, list(range(20))) == (diary.most_at_once, diary.all("start"))
    for job in jobs:
        assert (1, 0) == (job.record.attempt, job.record.retries)
    [limit] = mlq.limits.list()
    assert ("gpu", 1, "default", 0) == (limit.name, limit.capacity, limit.source, limit.used)


def test_as_many_run_as_there_are_slots_each_with_its_own(mlq: MLQ, start_worker: StartWorker) -> None:
    release = threading.Event()

    @mlq.actor(resources={"gpu": 1})
    def train() -> dict[str, tuple[int, ...]]:
        release.wait(10)
        return current_job().slots

    start_worker(threads=4)
    jobs = [train.submit() for _ in range(4)]
    running = eventually(lambda: [job for job in jobs if job.state is State.RUNNING])
    assert [jobs[0]] == running
    mlq.limits.set("gpu", 3)
    eventually(lambda: mlq.limits.get("gpu").used == 3)  # type: ignore[union-attr]
    assert [(0,), (1,), (2,)] == [job.record.slots["gpu"] for job in jobs[:3]]
    assert {"0": jobs[0].id, "1": jobs[1].id, "2": jobs[2].id} == mlq.limits.get("gpu").held_by  # type: ignore[union-attr]
    assert ({}, State.QUEUED) == (jobs[3].record.slots, jobs[3].state)
    release.set()
    ended(jobs)
    mlq.limits.set("gpu", 0)
    stays = train.submit()
    assert not stays.wait(0.2)
    assert 1 == mlq.limits.unset("gpu")
    ended([stays])


def test_a_slot_that_is_free_is_taken_by_another_worker_within_50_ms(
    mlq: MLQ, server: Settings, start_worker: StartWorker
) -> None:
    @mlq.actor(queue_name="one", resources={"gpu": 1})
    def first() -> None:
        time.sleep(0.06)

    @mlq.actor(queue_name="two", resources={"gpu": 1})
    def second() -> None:
        time.sleep(0.06)

    start_worker(threads=1, queues={"one"})
    twin = MLQ(mlq.name, settings=server)
    for actor in (first, second):
        twin.actor(actor.fn, actor_name=actor.actor_name, queue_name=actor.queue_name, resources={"gpu": 1})
    worker = start_worker(twin, threads=1, queues={"two"})
    try:
        jobs = [first.submit()]
        eventually(lambda: jobs[0].state is not State.QUEUED)  # else the other worker might be up before this one
        jobs += [second.submit(), *(actor.submit() for _ in range(7) for actor in (first, second))]
        ended(jobs)
    finally:
        worker.stop(timeout=10_000)
        twin.close()
    records = sorted((job.record for job in jobs), key=lambda record: record.started_at or 0)
    gaps = [(later.started_at or 0) - (one.finished_at or 0) for one, later in itertools.pairwise(records)]
    assert min(gaps) >= 0
    assert statistics.median(gaps) < SOON, gaps
    # A worker that is called and does not come within 100 ms, on a busy machine, loses its turn.
    in_order = sum(job.id == record.id for job, record in zip(jobs, records, strict=True))
    assert in_order > len(jobs) / 2, "who ends a job has taken the next one"


def test_waiting_for_a_slot_asks_the_store_nothing(mlq: MLQ, server: Settings, start_worker: StartWorker) -> None:
    with counting_proxy(server.url) as proxy, fresh_app(Settings.load({}, url=proxy.url)) as app:
        release = threading.Event()

        @app.actor(resources={"gpu": 1})
        def train() -> None:
            release.wait(20)

        worker = start_worker(app, threads=4)
        jobs = [train.submit() for _ in range(3)]
        eventually(lambda: jobs[0].state is State.RUNNING)
        threading.Event().wait(0.3)
        before = proxy.total
        threading.Event().wait(1.0)
        asked = proxy.total - before
        release.set()
        ended(jobs)
        worker.stop(timeout=10_000)
    assert asked <= 2


def test_a_job_that_needs_more_is_not_passed_by_for_ever(mlq: MLQ, start_worker: StartWorker, diary: Diary) -> None:
    mlq.limits.set("gpu", 2)

    @mlq.actor(resources={"gpu": 1})
    def small(n: int) -> None:
        diary.note("small", n)
        time.sleep(0.02)

    @mlq.actor(resources={"gpu": 2})
    def large() -> list[int]:
        diary.note("large", None)
        return sorted(current_job().slots["gpu"])

    jobs: list[Job[Any]] = [small.submit(n) for n in range(4)]
    jobs.append(large.submit())
    jobs += [small.submit(n) for n in range(4, 20)]
    start_worker(threads=4)
    assert [0, 1] == ended(jobs)[4]
    assert 4 <= [kind for kind, _ in diary.lines].index("large") <= 6


def test_a_job_that_needs_more_than_there_is_waits_and_holds_up_nobody(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(resources={"gpu": 2})
    def large() -> None: ...

    @mlq.actor(resources={"gpu": 1})
    def small() -> None: ...

    start_worker()
    waits = large.submit()
    ended([small.submit() for _ in range(3)])
    assert f"job {waits.id} waits for 2 of gpu, which has 1 slot; `mlqueue limit gpu 2` raises that." == str(
        waits.why()
    )
    mlq.limits.set("gpu", 2)
    ended([waits])


def test_a_job_whose_actor_may_not_run_now_keeps_no_slots_from_others(mlq: MLQ, start_worker: StartWorker) -> None:
    together = threading.Barrier(2, timeout=10)

    @mlq.actor(resources={"gpu": 2}, concurrency=1)
    def pair() -> None: ...

    @mlq.actor(resources={"gpu": 1})
    def single() -> None:
        together.wait()

    mlq.limits.set("gpu", 2)
    mlq.limits.set("@pair", 0)
    waits = pair.submit()
    start_worker(threads=2)
    first = single.submit()
    eventually(lambda: first.state is State.RUNNING)
    # One slot is free: fewer than the pair lacks, but it could not run with two.
    ended([first, single.submit()])
    assert waits.state is State.QUEUED
    mlq.limits.set("@pair", 1)
    ended([waits])


# Every way out of running


def ways(mlq: MLQ) -> dict[str, Any]:
    gate = threading.Event()

    def fail() -> None:
        raise ValueError("no")

    def again() -> None:
        if current_job().attempt == 1:
            raise Retry(delay=60)

    def give_back() -> None:
        if current_job().attempt == 1:
            current_job().hand_back()

    def until_cancelled() -> None:
        while True:
            time.sleep(0.001)

    def long() -> None:
        gate.wait(0.3 if current_job().attempt == 1 else 0)

    return {
        "fails": (fail, {"max_retries": 0}),
        "is tried again later": (again, {"max_retries": 1}),
        "is given back": (give_back, {}),
        "is cancelled": (until_cancelled, {}),
        "runs too long": (long, {"job_timeout": 0.1}),
    }


@pytest.mark.parametrize("way", ["fails", "is tried again later", "is given back", "is cancelled", "runs too long"])
def test_the_slot_is_free_whichever_way_the_job_ends(mlq: MLQ, start_worker: StartWorker, way: str) -> None:
    function, options = ways(mlq)[way]
    job = mlq.actor(function, actor_name="first", resources={"gpu": 1}, **options).submit()

    @mlq.actor(resources={"gpu": 1})
    def train() -> dict[str, Any]:
        return {name: list(slots) for name, slots in current_job().slots.items()}

    start_worker(threads=2)
    if way == "is cancelled":
        eventually(lambda: job.state is State.RUNNING)
        following = train.submit()
        job.cancel()
    elif way == "runs too long":
        eventually(lambda: job.state is State.RUNNING)
        following = train.submit()
        eventually(lambda: mlq.store.sweep("test", 0).released or job.record.timeouts)
    else:
        following = train.submit()
    assert {"gpu": [0]} == following.result(timeout=10)
    eventually(lambda: mlq.limits.get("gpu").used == 0)  # type: ignore[union-attr]


def test_what_a_broken_record_held_is_found_by_the_sweep(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.client.hset(f"{mlq.store.root}:lim:s:gpu", "0", "nobody 1")
    mlq.client.sadd(f"{mlq.store.root}:lim:used", "gpu")

    @mlq.actor(resources={"gpu": 1})
    def train() -> None: ...

    start_worker()
    job = train.submit()
    assert not job.wait(0.2)
    mlq.store.sweep("test", 0)
    ended([job])


# By actor and key


def test_so_many_jobs_of_an_actor_run_at_a_time(mlq: MLQ, start_worker: StartWorker, diary: Diary) -> None:
    @mlq.actor(concurrency=2)
    def fetch(n: int) -> dict[str, Any]:
        diary.note("start", n)
        time.sleep(0.01)
        diary.note("end", n)
        return dict(current_job().slots)

    start_worker(threads=6)
    assert [{}] * 12 == ended(fetch.submit_many([(n,) for n in range(12)]))
    assert 2 == diary.most_at_once
    assert [("@fetch", 2, "worker")] == [(one.name, one.capacity, one.source) for one in mlq.limits.list()]
    mlq.limits.set("@fetch", 4)
    ended(fetch.submit_many([(n,) for n in range(12)]))
    assert 2 < diary.most_at_once <= 4


def test_so_many_jobs_of_each_key_run_at_a_time(mlq: MLQ, start_worker: StartWorker, diary: Diary) -> None:
    both = threading.Barrier(2, timeout=10)

    @mlq.actor(concurrency=1, concurrency_key=lambda site, n: site)
    def fetch(site: str, n: int) -> None:
        diary.note(f"start {site}", n)
        if n == 0:
            both.wait()  # the first of each run at the same time
        time.sleep(0.005)
        diary.note(f"end {site}", n)

    start_worker(threads=4)
    jobs = fetch.submit_many([(site, n) for n in range(5) for site in ("a", "b/c")])
    ended(jobs)
    assert ("a", "b/c") == (jobs[0].record.concurrency_key, jobs[1].record.concurrency_key)
    for site in ("a", "b/c"):
        mine = [line for line in diary.lines if line[0].endswith(f" {site}")]
        assert [(f"{kind} {site}", n) for n in range(5) for kind in ("start", "end")] == mine


def test_a_limit_of_keys_that_nobody_holds_is_opened_to_who_waits(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(concurrency=1, concurrency_key=lambda site: site)
    def fetch(site: str) -> str:
        return site

    mlq.limits.set("@fetch", 0)
    job = fetch.submit("a")
    start_worker()
    eventually(lambda: mlq.store.connector.client.smembers(f"{mlq.store.root}:park"))
    mlq.limits.set("@fetch", 1)
    assert "a" == job.result(timeout=3)  # sooner than a worker looks by itself


def test_more_at_a_time_declared_by_a_later_worker_is_told_to_who_waits(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(concurrency=1)
    def fetch() -> str:
        return "done"

    mlq.store.declare_limits({}, {"fetch": ({}, 0)})
    job = fetch.submit()
    mlq.broker.actors["fetch"].options["concurrency"] = 0
    start_worker()
    eventually(lambda: mlq.store.connector.client.smembers(f"{mlq.store.root}:park"))
    mlq.store.declare_limits({}, {"fetch": ({}, 2)})
    assert "done" == job.result(timeout=3)


# In turn


def test_one_persons_fifty_jobs_do_not_hold_up_anothers_one(mlq: MLQ, start_worker: StartWorker, diary: Diary) -> None:
    @mlq.actor(resources={"gpu": 1}, fair_by=lambda who, n: who)
    def train(who: str, n: int) -> None:
        diary.note(who, n)

    jobs = train.submit_many([("ann", n) for n in range(50)])
    jobs += [train.submit("bob", 0), train.submit("cid", 0), train.submit("cid", 1)]
    assert "bob" == jobs[50].record.fair_by
    start_worker(threads=3)
    ended(jobs)
    order = [who for who, _ in diary.lines]
    assert ["ann", "bob", "cid", "ann", "cid"] == order[:5]
    assert list(range(50)) == diary.all("ann")


def test_a_turn_may_be_that_of_a_tag_and_priorities_hold_within_it(
    mlq: MLQ, start_worker: StartWorker, diary: Diary
) -> None:
    @mlq.actor(concurrency=1, fair_by="tag:user=")
    def work(n: int) -> None:
        diary.note("start", n)

    jobs = [work.submit(1, tags=["user=ann"]), work.submit(2, tags=["user=ann", "urgent"], priority=-5)]
    jobs += [work.submit(3, tags=["x", "user=bob"]), work.submit(4)]
    assert ["user=ann", "user=ann", "user=bob", None] == [job.record.fair_by for job in jobs]
    start_worker(threads=1)
    ended(jobs)
    assert diary.all("start").index(2) < diary.all("start").index(1)
    assert diary.all("start").index(3) < diary.all("start").index(1)


def test_jobs_with_a_key_do_not_stand_behind_those_without_one_that_wait_in_turn(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    let_go = threading.Event()

    @mlq.actor(concurrency=1, fair_by=lambda who: who)
    def fetch(who: str) -> str:
        assert who != "holder" or let_go.wait(20)
        return who

    holder = fetch.submit("holder")
    start_worker(threads=2)
    eventually(lambda: holder.state is State.RUNNING)
    waits = fetch.submit("ann")
    assert "bob" == fetch.with_options(concurrency_key="a.example").submit("bob").result(timeout=5)
    assert waits.state is State.QUEUED
    let_go.set()
    assert "ann" == waits.result(timeout=5)


def test_groups_that_a_version_with_one_ring_has_left_take_their_turns(mlq: MLQ, start_worker: StartWorker) -> None:
    """Their jobs have waited, have gone, or have been joined since; whoever looks for the next one comes to an end."""

    @mlq.actor(concurrency=1, fair_by=lambda who: who)
    def fetch(who: str) -> str:
        return who

    keyed = fetch.with_options(concurrency_key="a.example")
    jobs = [keyed.submit("ann"), fetch.submit("bob")]
    ring, keyed_ring = (f"{mlq.store.root}:fair:{letter}:default:{fetch.actor_name}|@" for letter in "tk")
    client = mlq.store.connector.client
    [(group, turn)] = client.zrange(keyed_ring, 0, -1, withscores=True)
    client.zadd(ring, {group: turn, group.replace(b"ann", b"gone"): turn - 1})
    client.delete(keyed_ring)
    start_worker(threads=1)
    assert ["ann", "bob"] == ended(jobs)
    assert ["ann", "bob"] == ended([keyed.submit("ann"), fetch.submit("bob")])
    assert [] == [*client.scan_iter(f"{ring}*"), *client.scan_iter(f"{keyed_ring}*")]


def test_posted_jobs_take_turns_too(mlq: MLQ, start_worker: StartWorker) -> None:
    told: list[Any] = []

    def listen(msg: Any, utils: Any) -> Any:
        told.append(msg)
        return msg

    posted = [mlq.post(f"ann {n}", fair_by="ann") for n in range(5)] + [mlq.post("bob", fair_by="bob")]
    mlq.create_listener(listen)
    try:
        eventually(lambda: all(mlq.job(one).done for one in posted))
    finally:
        mlq.shutdown()
        mlq.join()
    assert (set(told), "bob") == ({*(f"ann {n}" for n in range(5)), "bob"}, told[1])


# Jobs that wait for others


def test_a_job_lends_its_slot_to_the_one_that_it_waits_for(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(resources={"gpu": 1})
    def train(depth: int) -> list[int]:
        mine = list(current_job().slots["gpu"])
        return mine + (train.submit(depth - 1).result(timeout=20) if depth else [])

    @mlq.actor(resources={"gpu": 1})
    async def several() -> int:
        return sum(len(part) for part in await asyncio.gather(train.submit(0), train.submit(0)))

    start_worker(threads=2)
    before = time.monotonic()
    assert [0, 0, 0, 0] == train.submit(3).result(timeout=20)
    assert 2 == several.submit().result(timeout=20)
    assert [0, 0] == train.submit(1).result(timeout=20)
    assert time.monotonic() - before < 4.0, "somebody waited until it looked again"
    eventually(lambda: mlq.limits.get("gpu").used == 0)  # type: ignore[union-attr]


def test_a_slot_is_lent_to_a_job_that_another_worker_runs(
    mlq: MLQ, server: Settings, start_worker: StartWorker
) -> None:
    @mlq.actor(queue_name="there", resources={"gpu": 1})
    def child() -> list[int]:
        return list(current_job().slots["gpu"])

    @mlq.actor(queue_name="here", resources={"gpu": 1})
    def parent() -> list[int]:
        return child.submit().result(timeout=20)

    @mlq.actor(queue_name="there", resources={"gpu": 1})
    def stranger() -> None: ...

    running = threading.Event()

    @mlq.actor(queue_name="here", resources={"gpu": 1})
    def slow_parent() -> list[int]:
        running.wait(10)
        return child.submit().result(timeout=20)

    start_worker(threads=1, queues={"here"})
    twin = MLQ(mlq.name, settings=server)
    for actor in (child, stranger):
        twin.actor(actor.fn, actor_name=actor.actor_name, queue_name=actor.queue_name, resources={"gpu": 1})
    worker = start_worker(twin, threads=1, queues={"there"})
    try:
        assert [0] == parent.submit().result(timeout=20)
        waits = slow_parent.submit()
        eventually(lambda: waits.state is State.RUNNING)
        before_it = stranger.submit()  # stands before the child, and cannot have the slot
        running.set()
        assert [0] == waits.result(timeout=20)
        ended([before_it])
    finally:
        worker.stop(timeout=10_000)
        twin.close()


def test_jobs_that_run_at_once_in_a_test_have_slots_too(mlq: MLQ) -> None:
    @mlq.actor(resources={"gpu": 1}, fair_by=lambda depth: "me")
    def train(depth: int) -> list[int]:
        mine = list(current_job().slots["gpu"])
        return mine + (train.submit(depth - 1).result(timeout=10) if depth else [])

    with eager(mlq):
        assert [0, 0] == train.submit(1).result(timeout=10)


# Why


def test_why_says_what_a_job_waits_for(mlq: MLQ, start_worker: StartWorker) -> None:
    release = threading.Event()

    @mlq.actor(resources={"gpu": 1})
    def train() -> None:
        release.wait(10)

    @mlq.actor(concurrency=1)
    def fetch() -> None:
        release.wait(10)

    job = train.submit()
    assert ("no_worker", f"job {job.id} waits for a worker: none is alive; `mlqueue worker MODULE` starts some.") == (
        job.why().reason,
        str(job.why()),
    )
    start_worker(threads=2, queues={"default"})
    eventually(lambda: job.state is State.RUNNING)
    assert f"job {job.id} runs since " in str(job.why())
    second = train.submit()
    why = eventually(lambda: second.why().reason == "limit" and second.why())
    assert str(why).startswith(f"job {second.id} waits for gpu, held by job {job.id} since ")
    assert ("gpu", (job.id,)) == (why.limit, why.held_by)
    first, third = fetch.submit(), fetch.submit()
    eventually(lambda: first.state is State.RUNNING)
    assert f"job {third.id} waits for the limit of @fetch, held by job {first.id} since " in str(third.why())
    assert "unknown_actor" == mlq.submit("nobody_knows").why().reason
    elsewhere = mlq.submit("train", queue_name="elsewhere").why()
    assert "serves queue elsewhere; those that are alive serve default" in str(elsewhere)
    later = train.submit(delay=3600)
    assert ("scheduled", True) == (later.why().reason, "is scheduled for " in str(later.why()))
    assert "(in 60 min)" in str(later.why())
    release.set()
    ended([job])
    assert "has ended: it is succeeded since " in str(job.why())


def test_why_says_how_many_jobs_come_first(mlq: MLQ, start_worker: StartWorker) -> None:
    release = threading.Event()

    @mlq.actor
    def work() -> None:
        release.wait(10)

    start_worker(threads=1)
    jobs = [work.submit() for _ in range(4)]
    eventually(lambda: jobs[0].state is State.RUNNING)
    assert f"job {jobs[3].id} waits: 2 jobs are before it in queue default." == str(jobs[3].why())
    assert f"job {jobs[2].id} waits: 1 job is before it in queue default." == str(jobs[2].why())
    assert f"job {jobs[1].id} is the next of queue default; all 1 threads" in str(jobs[1].why())
    release.set()
    ended(jobs)


def a_worker(mlq: MLQ, *actors: str, functions: tuple[str, ...] = ()) -> str:
    """What the store knows of a worker that takes nothing by itself; its id."""
    worker = new_id()
    info = {"queues": ["default"], "actors": list(actors), "functions": list(functions), "threads": 2}
    mlq.store.start_worker(worker, info, {})
    return worker


def takes(mlq: MLQ, worker: str, actor: str, number: int = 1) -> None:
    """Has a worker take so many jobs of an actor."""
    lanes = [mlq.store.lane("default", actor)]
    answer = mlq.store.connector.execute(
        *mlq.store.turn_command(worker, new_id(), number, lanes, []), script=script("turn")
    )
    assert number == len(mlq.store.read_turn(answer).jobs)


def test_why_says_how_many_jobs_come_before_one_that_waits_for_a_limit(mlq: MLQ, start_worker: StartWorker) -> None:
    release = threading.Event()

    @mlq.actor(resources={"gpu": 1})
    def train() -> None:
        release.wait(10)

    start_worker(threads=2)
    jobs = [train.submit() for _ in range(4)]
    eventually(lambda: jobs[0].state is State.RUNNING)
    held = f" waits for gpu, held by job {jobs[0].id} since "
    assert [held in str(job.why()) for job in jobs[1:]] == [True, True, True]
    told = [str(job.why()).partition("; ")[2] for job in jobs[1:]]
    assert told == ["", "1 job is before it in queue default.", "2 jobs are before it in queue default."]
    # Where jobs take turns, their place in the queue does not say when theirs is.
    turned = train.with_options(fair_by="ann").submit()
    assert turned.position == 3
    assert held in str(turned.why())
    assert ";" not in str(turned.why())
    release.set()
    ended([*jobs, turned])


def test_why_says_that_a_queue_is_paused(mlq: MLQ) -> None:
    job = mlq.submit("work")
    a_worker(mlq, "work")
    for who, by in (("ann", " by ann"), ("", "")):
        mlq.store.pause("default", who)
        assert "paused" == job.why().reason
        assert str(job.why()).startswith(f"job {job.id} waits: queue default is paused{by} since ")
        mlq.store.resume("default")
    assert "next" == job.why().reason


def test_why_names_the_function_that_no_worker_has(mlq: MLQ) -> None:
    for_all, one = mlq.job(mlq.post(1)), mlq.job(mlq.post(1, functions=["count", "greet, twice"]))
    a_worker(mlq, "work", functions=("count",))
    for job in (for_all, one):
        assert "unknown_actor" == job.why().reason
        assert "waits for a worker that has listener functions; none of queue default does." in str(job.why())
    a_worker(mlq, LISTENER, functions=("count",))
    assert "next" == for_all.why().reason
    assert "waits for a worker that has the function greet, twice; none has." in str(one.why())
    a_worker(mlq, LISTENER, functions=("greet%2C%20twice", "count"))
    assert "behind" == one.why().reason


def test_why_says_that_a_job_is_to_run_alone(mlq: MLQ) -> None:
    job = mlq.submit("work")
    for _ in range(2):
        worker = a_worker(mlq, "work")
        takes(mlq, worker, "work")
        mlq.store.release(worker, "crash", "killed")
    a_worker(mlq, "work")
    assert "alone" == job.why().reason
    assert "is to run with no other job beside it, since 2 processes have died with it." in str(job.why())


def test_why_names_three_of_many_holders_and_says_how_many_more(mlq: MLQ) -> None:
    mlq.actor(lambda: None, actor_name="work", resources={"gpu": 1})
    mlq.broker.tell_limits()
    mlq.limits.set("gpu", 5)
    jobs = [mlq.submit("work") for _ in range(6)]
    worker = a_worker(mlq, "work")
    takes(mlq, worker, "work", 5)
    why = jobs[5].why()
    assert ("limit", {job.id for job in jobs[:5]}) == (why.reason, set(why.held_by))
    assert str(why).endswith(" and 2 more.")
    assert 3 == str(why).count(" since ")


def test_why_says_what_a_running_job_waits_for_and_that_one_failed(mlq: MLQ, start_worker: StartWorker) -> None:
    release = threading.Event()

    @mlq.actor
    def inner() -> None:
        release.wait(10)

    @mlq.actor
    def outer() -> None:
        inner.submit(job_id="inner").result()

    @mlq.actor(max_retries=1)
    def fails() -> None:
        raise Retry(delay=60)

    start_worker(threads=3)
    job, failed = outer.submit(), fails.submit()
    eventually(lambda: job.record.waits_for)
    assert str(job.why()).endswith(", and waits for job inner.")
    job.cancel()
    assert ", and has been told to end" in str(job.why())
    eventually(lambda: failed.state is State.SCHEDULED)
    assert str(failed.why()).endswith("s): it failed, and is tried again.")
    release.set()
    assert job.wait(10)


# What is no limit


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resources": {"gpu": 0}}, "needs from 1 to 10,000 slots of gpu"),
        ({"resources": ["gpu"]}, "give names and numbers"),
        ({"resources": {"@gpu": 1}}, "no name of a resource"),
        ({"concurrency": 0}, "give a number from 1"),
        ({"unique_key": "x"}, "would be that of all its jobs"),
        ({"concurrency_key": "x"}, "would be that of all its jobs"),
        ({"unique_policy": "ask"}, "'return', 'reject' or 'replace'"),
        ({"unique_for": -1}, "'queued', 'active' or a number"),
    ],
)
def test_what_an_actor_cannot_have_is_refused(mlq: MLQ, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidJob, match=message):
        mlq.actor(lambda: None, actor_name="wrong", **options)


def test_what_no_limit_can_be_is_refused(mlq: MLQ) -> None:
    for name, capacity in (("", 1), ("@", 1), ("x" * 101, 1), ("a\nb", 1), ("gpu", -1), ("gpu", True), ("gpu", 10_001)):
        with pytest.raises(InvalidJob, match="limit "):
            mlq.limits.set(name, capacity)

    @mlq.actor(fair_by=lambda x: 3)
    def turns(x: int) -> None: ...

    with pytest.raises(InvalidJob, match="the fair_by of actor turns is a int"):
        turns.submit(1)

    @mlq.actor(unique_key=lambda x: "x" * x)
    def long(x: int) -> None: ...

    for length in (0, 201):
        with pytest.raises(InvalidJob, match=f"unique_key of actor long is a text of {length} characters; a text of 1"):
            long.submit(length)
    assert "x" * 200 == long.submit(200).record.unique_key

    @mlq.actor(unique_key=lambda y: y)
    def one(x: int) -> None: ...

    with pytest.raises(InvalidJob, match="the unique_key of actor one could not be made: TypeError"):
        one.submit(x=1)
    with pytest.raises(InvalidJob, match=r"set on the actor: @actor\(resources="):
        turns.with_options(resources={"gpu": 1}, fair_by="x").submit(1)


def test_the_settings_say_how_many_there_are_until_somebody_does(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(Settings.load({}, url=server.url, home=server.home, limits="gpu=3, big box=2")) as app:
        app.actor(lambda: None, actor_name="train", resources={"gpu": 1, "tape": 1}, concurrency=5)
        worker = start_worker(app)
        told = eventually(lambda: {one.name: (one.capacity, one.source) for one in app.limits.list()})
        expected = {"gpu": (3, "worker"), "big box": (2, "worker"), "tape": (1, "default"), "@train": (5, "worker")}
        assert expected == told
        app.limits.set("gpu", 1)
        assert Limit(name="gpu", capacity=1, source="hand", held_by={}) == app.limits.get("gpu")
        worker.stop(timeout=10_000)
    for text in ("gpu", "gpu=x", "gpu=1,,", "@train=2", "gpu=10001", "=1"):
        with pytest.raises(SettingsError, match="allowed is gpu=2,licence=5"):
            Settings.load({"MLQUEUE_LIMITS": text})


# Processes that are killed

GPU = """
import json, os, pathlib, time
import mlqueue

mlq = mlqueue.MLQ({namespace!r})
EVENTS = pathlib.Path(__file__).with_name("gpu-events")


@mlq.actor(max_retries=0, resources={{"gpu": 1}}, fair_by=lambda n, who: who)
def train(n, who):
    job = mlqueue.current_job()
    for event in ("start", "end"):
        line = json.dumps([event, n, job.attempt, os.getpid(), list(job.slots["gpu"])])
        fd = os.open(EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode() + b"\\n")
        os.close(fd)
        time.sleep(0.02 if event == "start" else 0)
"""


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[Site]:
    one = Site(tmp_path, server)
    yield one
    one.close()


def test_a_hundred_jobs_on_one_slot_over_four_processes_whose_holder_is_killed_five_times(site: Site) -> None:
    (site.folder / "gpu.py").write_text(GPU.format(namespace=site.namespace))
    site.supervise("gpu", processes=4, threads=2)
    # By name, so it has no options of the actor's; and one that is killed often has to be run by somebody all the same.
    jobs = [site.mlq.submit("train", n, "me", fair_by=f"user {n % 3}", max_crashes=50) for n in range(100)]
    killed: list[str] = []
    while len(killed) < 5:
        time.sleep(random.uniform(0.05, 0.2))
        limit = site.mlq.limits.get("gpu")
        for job_id in limit.held_by.values() if limit else ():
            record = site.mlq.store.record(job_id)
            worker = next((one for one in site.mlq.store.workers() if one.id == record.worker), None)
            if record.state is State.RUNNING and worker is not None and job_id in worker.jobs:
                os.kill(worker.info["pid"], signal.SIGKILL)
                killed.append(job_id)
    assert wait_for(lambda: all(job.done for job in jobs), 60, site.logs)
    records = [job.record for job in jobs]
    assert [] == [(record.dead_reason, record.error) for record in records if record.state is not State.SUCCEEDED]
    assert {0} == {record.retries for record in records}
    crashes = sum(record.crashes for record in records)
    assert 1 <= crashes <= 5
    lines = [line.split('"', 2)[1] for line in (site.folder / "gpu-events").read_text().splitlines()]
    # A start behind a start is that of a job whose holder was killed.
    doubled = sum(before == after == "start" for before, after in itertools.pairwise(lines))
    assert doubled <= crashes
    assert 100 <= lines.count("end") <= 100 + crashes
    wait_for(lambda: site.mlq.limits.get("gpu").used == 0)  # type: ignore[union-attr]
