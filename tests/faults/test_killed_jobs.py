"""Jobs that never end, among many that do: their processes are killed, and nobody beside them is blamed."""

from __future__ import annotations

import pytest
from harness import ACTORS, LONG, MakeFleet, wait_for

from mlqueue import DeadReason, State

pytestmark = pytest.mark.faults

DEAF = '''

@mlq.actor(max_retries=0)
def deaf():
    """Heeds nothing that is raised in it."""
    tell("start")
    while True:
        try:
            while True:
                sum(range(1000))
        except BaseException:
            pass
'''


def test_jobs_that_never_end_are_killed_and_those_beside_them_end_without_a_strike(fleet: MakeFleet) -> None:
    rounds = 10 if LONG else 2
    here = fleet(actors=ACTORS + DEAF, kill_grace=0.5)
    worker = here.worker(processes=2, threads=8)
    innocents, overdue, cancelled = [], [], []
    for _ in range(rounds):
        innocents += [here.submit("work", 0.1) for _ in range(50)]
        overdue.append(here.submit("holds_gil", 600, hard_time_limit=1.0, max_stalls=1))
        cancelled.append(here.submit("deaf"))
        innocents += [here.submit("work", 0.05) for _ in range(50)]
    for job in cancelled:
        wait_for(lambda job=job: job.state is not State.QUEUED, what=here.logs)
        job.cancel()
    wait_for(lambda: all(job.state.ended for job in [*overdue, *cancelled]), 120, here.logs)
    here.wait_drained(120)

    report = here.audit("jobs that never end", [*innocents, *overdue], dead=overdue).finish()
    assert (report.ok, report.dead_lettered) == (100 * rounds, rounds)
    for job in overdue:
        record = job.record
        assert (record.dead_reason, record.timeouts) == (DeadReason.STALLED, 1)
        assert {(past.outcome, past.stage) for past in record.attempts} == {("stalled", "killed")}
    assert {(job.record.state, job.record.cancel_stage) for job in cancelled} <= {
        (State.CANCELLED, "killed"),
        (State.CANCELLED, "lost"),  # beside one that was killed meanwhile
        (State.CANCELLED, "waiting"),
    }
    strikes = {
        (record.crashes, record.stalls, record.timeouts, record.attempts)
        for record in here.records(innocents)
        if record is not None
    }
    assert strikes == {(0, 0, 0, ())}
    worker.stop()
