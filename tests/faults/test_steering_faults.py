"""Webhooks and unique jobs under kill -9: nothing is lost, each event has one id, each key one job."""

from __future__ import annotations

import collections
import itertools
import math
import operator
import random
import signal
import socket
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from harness import LONG, Fleet, MakeFleet, Worker, send, wait_for
from receivers import Receiver, receiver

from mlqueue import JobRecord, State, Webhook
from mlqueue.job import CallbackState
from mlqueue.webhooks import new_secret, verify

pytestmark = pytest.mark.faults


def kill_children(worker: Worker, *seats: int) -> None:
    """kill -9 of worker processes, and waits until others are in their places."""
    ready = len(worker.pids())
    send(signal.SIGKILL, [worker.pids(seat)[-1] for seat in seats])
    worker.wait_ready(ready + len(seats))


# Webhooks


def all_told(here: Fleet, jobs: Sequence[Any]) -> list[JobRecord]:
    """The records of jobs, when each of their starts and ends has been delivered."""
    records = [record for record in here.records(jobs) if record is not None]
    assert len(records) == len(jobs)
    delivered = (sum(not tried.error for tried in record.callback_attempts) for record in records)
    return records if all(map(operator.ge, delivered, (record.attempt + 1 for record in records))) else []


def test_webhooks_of_workers_that_are_killed_while_they_deliver_tell_each_event_with_one_id(fleet: MakeFleet) -> None:
    count, kills = (1000, 40) if LONG else (150, 8)
    secret = new_secret()
    here = fleet(callback_allow="loopback", callback_timeout=10, webhook_secret=secret, lease=1, sweep_interval=0.25)
    answering = threading.Semaphore(0)

    def takes_a_while(receiver: Receiver, connection: socket.socket) -> None:
        answering.release()
        receiver.closing.wait(0.1)
        connection.sendall(b"HTTP/1.1 204 No Content\r\n\r\n")

    with receiver(takes_a_while) as hook:
        worker = here.worker(processes=2, threads=8)
        webhook = Webhook(hook.url, events=["started", "completed"])
        jobs = [here.submit("quiet", webhook=webhook, max_crashes=1000) for _ in range(count)]
        for kill in range(kills):
            while answering.acquire(blocking=False):
                pass
            if not answering.acquire(timeout=10):
                break  # all of them have been delivered
            if kill == kills // 2:
                worker.kill_all()
                worker = here.worker(processes=2, threads=8)
            else:
                kill_children(worker, 1, 2)
        assert kill >= 3
        here.wait_drained()
        records = wait_for(lambda: all_told(here, jobs), 120, here.logs)
        calls = list(hook.calls)

    report = here.audit("webhooks_of_killed_senders", jobs, callbacks=False)
    told: dict[str, dict[str, set[tuple[str, int]]]] = collections.defaultdict(lambda: collections.defaultdict(set))
    for call in calls:
        event = verify(call.headers, call.body, secret, tolerance=3600)
        happened = event["type"], event["data"]["attempt"]
        told[call.job_id][call.headers["webhook-id"]].add(happened)
    for record in records:
        expected = {("job.started", attempt + 1) for attempt in range(record.attempt)}
        expected.add(("job.completed", record.attempt))
        by_id = told[record.id]
        if not expected <= set().union(*by_id.values()):
            report.lost += 1
            report.notes.append(f"{record.id}: {dict(by_id)} of {expected}, {record.callback_attempts}")
        # An event has one id, and an id one event, however often it was sent.
        if len(by_id) != len(expected) or any(len(events) > 1 for events in by_id.values()):
            report.note(f"{record.id}: {dict(by_id)}")
        if record.webhook_state is not CallbackState.DELIVERED:
            report.note(f"{record.id}: {record.webhook_state} after {record.callback_attempts}")
        report.callbacks_delivered += len(expected)
    report.callbacks_repeated = len(calls) - sum(len(by_id) for by_id in told.values())
    report.finish()
    assert report.callbacks_repeated > 0, "no process was killed while it delivered"


# Unique jobs

#: Submits jobs of five keys as fast as the store takes them, and writes down what each submit gave.
SUBMIT = """
import itertools, os, sys, time
import mlqueue
from jobs import mlq

policy, path = sys.argv[1:]
out = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
for n in itertools.count():
    key = f"key {n % 5}"
    try:
        job_id = mlq.submit("quiet", 0.02, unique_key=key, unique_policy=policy, max_crashes=1000).id
    except mlqueue.JobExists as error:
        job_id = error.job_id
    os.write(out, f"{job_id} {key}\\n".encode())
    time.sleep(0.02 if policy == "replace" else 0.003)  # of those that are replaced, too, some are to end well
"""


def all_jobs(here: Fleet) -> list[JobRecord]:
    """The records of all jobs, in the order of their creation."""
    found, cursor = [], None
    while True:
        page = here.mlq.jobs(limit=1000, cursor=cursor)
        found += page.jobs
        cursor = page.cursor
        if cursor is None:
            return found[::-1]


@pytest.mark.parametrize("policy", ["return", "reject", "replace"])
def test_a_key_has_one_job_though_workers_and_those_who_submit_are_killed(
    fleet: MakeFleet, tmp_path: Path, policy: str
) -> None:
    here = fleet(lease=2, sweep_interval=0.25)
    worker = here.worker(processes=2, threads=4)
    out = tmp_path / "told"
    programs = [here.program(SUBMIT, policy, str(out)) for _ in range(3)]
    wait_for(lambda: out.exists() and out.stat().st_size > 0)
    for kill in range(20 if LONG else 4):
        threading.Event().wait(random.uniform(0.05, 0.3))
        wait_for(lambda: any(record.state is State.RUNNING for record in all_jobs(here)))
        kill_children(worker, 1 + kill % 2)
        programs[kill % 3].kill()
        programs[kill % 3] = here.program(SUBMIT, policy, str(out))
    size = out.stat().st_size
    wait_for(lambda: out.stat().st_size > size)
    for program in programs:
        program.kill()
        program.wait()
    here.wait_drained()

    records = all_jobs(here)
    ended_well = [record.id for record in records if record.state is State.SUCCEEDED]
    report = here.audit(f"unique_{policy}", ended_well, attempted=len(out.read_text().splitlines()))
    keys = {record.id: record.unique_key for record in records}
    for line in out.read_text().splitlines():
        job_id, _, key = line.partition(" ")
        if keys.get(job_id) != key:
            report.lost += 1
            report.notes.append(f"{line}: {keys.get(job_id)}")
    by_key = collections.defaultdict(list)
    for record in records:
        by_key[record.unique_key].append(record)
    for ones in by_key.values():
        if ones[-1].state is not State.SUCCEEDED:
            report.note(f"the last one of its key is {ones[-1].state}: {ones[-1]}")
        for one, other in itertools.pairwise(ones):
            ended = one.finished_at or math.inf
            well = ended <= other.created_at if one.state is State.SUCCEEDED else ended >= other.created_at
            if not well:
                report.note(f"{other.id} came beside {one.id}, which ended as {one.state} {one.finished_at}")
    report.finish()
    assert len(by_key) == 5
    assert report.ok > 20
    if policy != "replace":  # there the next one takes the place of a job that was in hand
        assert report.recovered > 0, "no worker was killed with a job in hand"
    assert any(record.state is State.CANCELLED for record in records) == (policy == "replace")
