"""Unique jobs: of one key there is one, however many submit it and whoever is killed meanwhile."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support import StartWorker, eventually
from worker_processes import ROOT

from mlqueue import MLQ, InvalidJob, InvalidTransition, JobExists, Settings, State, current_job
from mlqueue.job import new_id
from mlqueue.store.scripts import script


def test_fifty_submits_of_one_key_at_once_give_one_job(mlq: MLQ) -> None:
    @mlq.actor
    def work(n: int) -> int:
        return n

    together = threading.Barrier(50)

    def submit(n: int) -> str:
        together.wait(10)
        return work.submit(n, unique_key="the one").id

    with ThreadPoolExecutor(50) as pool:
        ids = set(pool.map(submit, range(50)))
    assert [*ids] == [record.id for record in mlq.jobs().jobs]
    assert "the one" == mlq.job(ids.pop()).record.unique_key


def test_a_key_belongs_to_the_actor_and_may_be_made_of_the_arguments(mlq: MLQ) -> None:
    @mlq.actor(unique_key=lambda path, size=1: f"{path} {size}")
    def resize(path: str, size: int = 1) -> None: ...

    @mlq.actor(unique_key=lambda path: f"{path} 1")
    def other(path: str) -> None: ...

    first = resize.submit("a")
    assert first == resize.submit("a", 1) == resize.submit("a", size=1)
    assert first.id == resize.send("a").message_id
    assert 3 == len({first, resize.submit("b"), other.submit("a")})
    assert first == resize.submit("c", unique_key="a 1")
    assert first != resize.submit("a", unique_key=None)
    [one, two, three] = resize.submit_many([("x",), ("y",), ("x",)])
    assert (one, True) == (three, one != two)


def test_who_submits_by_name_gives_the_keys_that_the_actor_makes(
    mlq: MLQ, server: Settings, start_worker: StartWorker
) -> None:
    gate = threading.Event()

    @mlq.actor(queue_name="here", unique_key=lambda n: f"n {n}", fair_by=lambda n: "me")
    def work(n: int) -> None:
        gate.wait(10)

    start_worker()
    elsewhere = MLQ(mlq.name, settings=server)  # without the actor's code
    try:
        eventually(lambda: elsewhere.store.queue_of("work") == "here")
        for given, missing in ({}, "fair_by"), ({"fair_by": None}, "unique_key"):
            for queue in {}, {"queue_name": "here"}:
                with pytest.raises(InvalidJob, match=f"the {missing} of a job of work is made of its arguments"):
                    elsewhere.submit("work", 1, **given, **queue)
        assert [] == mlq.jobs().jobs
        job = mlq.submit("work", 1)
        assert job == elsewhere.submit("work", 1, fair_by="you", unique_key="n 1")
        assert job != elsewhere.submit("work", 1, fair_by=None, unique_key=None)
    finally:
        elsewhere.close()
        gate.set()


def test_a_job_is_unique_while_it_waits_until_it_has_ended_or_for_a_time(mlq: MLQ, start_worker: StartWorker) -> None:
    gate = threading.Event()

    @mlq.actor(max_retries=0)
    def work(fails: bool = False) -> None:
        gate.wait(10)
        if fails:
            raise ValueError

    def same(first: Any, **options: Any) -> bool:
        return bool(work.submit(unique_key="k", **options) == first)

    start_worker(threads=1)
    job = work.submit(unique_key="k")
    eventually(lambda: job.state is State.RUNNING)
    assert same(job)
    assert same(job, unique_for=60)
    waits = work.submit(unique_key="k", unique_for="queued")
    assert waits != job
    assert same(waits, unique_for="queued")
    gate.set()
    waits.result(timeout=10)
    assert same(waits, unique_for=60)
    assert not same(waits, unique_for=0.001)
    dead = work.submit(True, unique_key="k2")
    assert dead.wait(10)
    assert work.submit(unique_key="k2", unique_for=60) != dead


def test_another_job_is_rejected_with_the_id_of_the_one_that_is_there(mlq: MLQ) -> None:
    @mlq.actor(unique_policy="reject")
    def work(n: int) -> None: ...

    job = work.submit(1, unique_key="k")
    with pytest.raises(JobExists, match=rf"job {job.id} has this unique key; nothing was submitted") as raised:
        work.submit(2, unique_key="k")
    assert (job.id, 409) == (raised.value.job_id, raised.value.status)
    with pytest.raises(JobExists):
        work.with_options(unique_key="new").submit_many([(1,), (2,)])
    assert 1 == len(mlq.jobs().jobs)


def test_another_job_takes_the_place_of_the_one_that_is_there(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(unique_policy="replace")
    def work(n: int) -> int:
        while n == 2 and not current_job().cancelled:
            time.sleep(0.001)
        return n

    jobs = [work.submit(n, unique_key="k") for n in range(3)]
    assert [State.CANCELLED, State.CANCELLED, State.QUEUED] == [job.state for job in jobs]
    start_worker(threads=2)
    eventually(lambda: jobs[2].state is State.RUNNING)
    last = work.submit(3, unique_key="k")
    assert 3 == last.result(timeout=10)
    assert jobs[2].wait(10)
    assert ("cancelled", "raised") == (jobs[2].state, jobs[2].record.cancel_stage)
    assert last.id != work.submit(4, unique_key="k").id


@pytest.mark.parametrize("over_http", [False, True])
def test_of_a_job_that_another_one_takes_the_place_of_is_told(mlq: MLQ, over_http: bool) -> None:
    @mlq.actor(unique_policy="replace", callback="http://127.0.0.1:9/", webhook="http://127.0.0.1:9/")
    def work(n: int) -> int:
        return n

    first = work.submit(1, unique_key="k")
    if over_http:
        message = work.message_with_options(args=(2,), unique_key="k")
        [second] = mlq.broker.enqueue_once([(message, None)], "", b"", 10, wants_record=True).ids
    else:
        second = work.submit(2, unique_key="k").id
    record = first.record
    assert (record.state, record.cancel_stage) == (State.CANCELLED, "waiting")
    assert (record.callback_state, record.webhook_state) == ("pending", "pending")
    assert mlq.job(second).state is State.QUEUED


def test_a_dead_job_is_not_put_back_beside_another_one_of_its_key(mlq: MLQ, start_worker: StartWorker) -> None:
    @mlq.actor(max_retries=0)
    def work(fails: bool) -> None:
        if fails:
            raise ValueError

    worker = start_worker()
    dead = work.submit(True, unique_key="k")
    dead.wait(10)
    worker.stop(timeout=10_000)
    other = work.submit(False, unique_key="k")
    with pytest.raises(InvalidTransition, match=rf"job {other.id} has its unique key now"):
        dead.retry()
    assert 0 == mlq.store.retry_dead([dead.id]).count(True)
    other.cancel()
    dead.retry()
    assert dead == work.submit(False, unique_key="k")


def test_a_key_goes_with_its_job(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None: ...

    work.submit(unique_key="k")
    assert 1 == mlq.clear()
    assert [] == [key for key in mlq.client.scan_iter(f"{mlq.store.root}:*") if b":uk:" in key]


@pytest.mark.parametrize("option", ["unique_key", "fair_by", "concurrency_key", "tags", "functions"])
def test_half_a_character_is_no_key(mlq: MLQ, option: str) -> None:
    value: Any = "\ud800" if option not in ("tags", "functions") else ["\ud800"]
    with pytest.raises(InvalidJob, match=f"option {option}="):
        mlq.submit("work", **{option: value}) if option != "functions" else mlq.post(1, functions=value)


def test_what_cannot_be_unique_is_refused(mlq: MLQ) -> None:
    @mlq.actor(result_ttl=60)
    def work() -> None: ...

    for options, message in (
        ({"unique_key": ""}, "a text of 1 to 200"),
        ({"unique_key": "k", "unique_for": "ever"}, "'queued', 'active' or a number"),
        ({"unique_key": "k", "unique_policy": "ask"}, "'return', 'reject' or 'replace'"),
        ({"unique_key": "k", "unique_for": 61}, r"kept for 60 s only after its end \(result_ttl\)"),
    ):
        with pytest.raises(InvalidJob, match=message):
            work.submit(**options)
    assert work.submit(unique_key="k", unique_for=60)


def test_a_submit_that_was_answered_in_vain_may_be_sent_again(mlq: MLQ) -> None:
    @mlq.actor(unique_policy="reject")
    def work() -> None: ...

    job_id = new_id()
    for _ in range(2):  # the same id: the answer to the first was lost
        assert job_id == work.submit(unique_key="k", job_id=job_id).id


# Processes that are killed

SUBMITTER = """
import os, sys, itertools
sys.path.append({root!r})
import mlqueue

mlq = mlqueue.MLQ({namespace!r})
policy, path = sys.argv[1:]
out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
print("ready", flush=True)
for n in itertools.count():
    try:
        job = mlq.submit("work", n, unique_key="k", unique_policy=policy)
    except mlqueue.JobExists as error:
        os.write(out, f"exists {{error.job_id}}\\n".encode())
    else:
        os.write(out, f"got {{job.id}}\\n".encode())
"""


@pytest.mark.parametrize("policy", ["return", "reject", "replace"])
def test_a_key_has_one_job_when_those_who_submit_are_killed(
    mlq: MLQ, server: Settings, tmp_path: Path, policy: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MLQUEUE_")}
    environment |= {"MLQUEUE_URL": server.url} if server.url else {"MLQUEUE_HOME": str(server.home)}
    program = SUBMITTER.format(root=str(ROOT), namespace=mlq.name)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, policy, str(tmp_path / f"told-{n}")],
            env=environment,
            stdout=subprocess.PIPE,
        )
        for n in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert b"ready\n" == process.stdout.readline()
    for process in processes:
        time.sleep(random.uniform(0.05, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait(10)
        assert process.stdout is not None
        process.stdout.close()
    records = [record for page in [mlq.jobs(limit=1000)] for record in page.jobs]
    active = [record.id for record in mlq.jobs(state=[State.QUEUED, State.SCHEDULED, State.RUNNING]).jobs]
    told = [line.split() for n in range(3) for line in (tmp_path / f"told-{n}").read_text().splitlines()]
    assert 1 == len(active)
    assert len(told) > 10
    if policy == "replace":
        assert len(records) > 3
        assert {State.CANCELLED} == {record.state for record in records if record.id not in active}
        assert {"got"} == {kind for kind, _ in told}
    else:
        assert active == [record.id for record in records]
        assert {active[0]} == {job_id for _, job_id in told}
        # Of the one that got it the first line may be missing: it was killed before it wrote it.
        assert (1 if policy == "reject" else len(told)) >= [kind for kind, _ in told].count("got")


@pytest.mark.parametrize("policy", ["return", "reject", "replace"])
def test_a_job_whose_worker_was_killed_is_still_the_only_one(mlq: MLQ, policy: str) -> None:
    mlq.actor(lambda: None, actor_name="work")
    worker = new_id()
    job = mlq.submit("work", unique_key="k")
    mlq.store.start_worker(worker, {}, {})
    command = mlq.store.turn_command(worker, new_id(), 1, [mlq.store.lane("default", "work")], [])
    from_store = mlq.store.connector.execute(*command, script=script("turn"))
    assert 1 == len(mlq.store.read_turn(from_store).jobs)
    if policy == "replace":
        later = mlq.submit("work", unique_key="k", unique_policy=policy)
        assert (State.RUNNING, State.QUEUED) == (job.state, later.state)
        assert {job.id: "cancelled"} == mlq.store.release(worker, "crash", "killed")
        assert (State.CANCELLED, later) == (job.state, mlq.submit("work", unique_key="k"))
        return
    for _ in range(2):
        if policy == "return":
            assert job == mlq.submit("work", unique_key="k", unique_policy=policy)
        else:
            with pytest.raises(JobExists, match=job.id):
                mlq.submit("work", unique_key="k", unique_policy=policy)
        mlq.store.release(worker, "crash", "killed")  # the second round: it waits to be run again
    assert (State.QUEUED, 1) == (job.state, job.record.crashes)
