"""The reaper: jobs that run too long are given back, whether their workers live or not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from listening import listening
from support import StartWorker, eventually, fresh_app
from worker_processes import ROOT, Site

from mlqueue import MLQ, Cancelled, DeadReason, InvalidJob, JobFailed, Settings, State, current_job
from mlqueue.store import Held

#: How often the reapers here look, in seconds.
OFTEN = 0.05


@pytest.fixture
def app(mlq: MLQ) -> Iterator[MLQ]:
    with listening(mlq):
        yield mlq


def is_late(app: MLQ) -> int:
    """How many running jobs have a timeout."""
    number: int = app.store.connector.execute("ZCARD", f"{app.store.root}:late")
    return number


def test_without_a_reaper_no_job_has_a_timeout(app: MLQ) -> None:
    go = threading.Event()
    app.create_listener(lambda msg, utils: go.wait(15))
    job = app.job(app.post("x"))
    eventually(lambda: job.state is State.RUNNING)
    assert is_late(app) == 0
    go.set()
    assert job.result(timeout=15) is True


def test_a_job_that_runs_too_long_is_given_back_though_its_worker_lives(app: MLQ) -> None:
    ended: list[type[BaseException] | None] = []

    def listener(msg: Any, utils: dict[str, Any]) -> int:
        attempt = current_job().attempt
        try:
            while attempt == 1:
                time.sleep(0.005)
        except BaseException as error:
            ended.append(type(error))
            raise
        return attempt

    reaper = app.create_reaper(call_how_often=OFTEN, job_timeout=0.3)
    app.create_listener(listener)
    job_id = app.post("x")
    assert app.job(job_id).result(timeout=15) == 2
    assert eventually(lambda: ended) == [Cancelled]  # it may hear of it after the other one's end
    job = app.get_job(job_id)
    assert (job["retries"], job["progress"], job["result"]) == (1, 100, 2)
    record = app.job(job_id).record
    assert (record.timeouts, record.crashes, record.stalls) == (1, 0, 0)
    first = record.attempts[0]
    assert first.error is not None
    assert "longer than its timeout of 0.3 s" in first.error.message
    assert 0.299 <= first.ended_at - first.started_at < 10
    reaper.stop()


def test_another_worker_takes_it_over_and_what_the_old_attempt_writes_is_refused(app: MLQ, server: Settings) -> None:
    stuck, taken_over = threading.Event(), threading.Event()

    def listener(msg: Any, utils: dict[str, Any]) -> str:
        if current_job().attempt > 1:
            taken_over.set()
            utils["update_progress"]("of the second")
            return "of the second"
        stuck.set()
        while True:
            try:
                taken_over.wait(15)  # nothing stops this one
                break
            except Cancelled:
                pass
        utils["update_progress"]("of the first")
        return "of the first"

    other = MLQ(app.name, settings=server)
    try:
        with listening(other):
            app.create_listener(listener)
            job = app.job(app.post("x"))
            assert stuck.wait(15)
            other.create_listener(listener)
            reaper = other.create_reaper(call_how_often=OFTEN, job_timeout=0.3)
            assert job.result(timeout=15) == "of the second"
            app.shutdown()
            assert app.join(15)  # and with it the first attempt
            assert job.result() == "of the second"
            assert job.progress == "of the second"
            assert job.record.attempt == 2
            reaper.stop()
    finally:
        other.close()


def test_a_job_that_ran_before_the_reaper_came_is_bound_too(app: MLQ) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> int:
        while current_job().attempt == 1:
            time.sleep(0.005)
        return current_job().attempt

    app.create_listener(listener)
    job = app.job(app.post("x"))
    eventually(lambda: job.state is State.RUNNING)
    app.create_reaper(call_how_often=OFTEN, job_timeout=timedelta(milliseconds=200))
    assert is_late(app) == 1
    assert job.result(timeout=15) == 2


def test_after_so_many_times_it_is_a_dead_letter_reason_stalled(app: MLQ) -> None:
    starts: list[int] = []

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        starts.append(current_job().attempt)
        while True:
            time.sleep(0.005)

    app.create_reaper(call_how_often=OFTEN, job_timeout=0.1, max_retries=2)
    app.create_listener(listener)
    job_id = app.post("x")
    with pytest.raises(JobFailed, match="longer than its timeout") as caught:
        app.job(job_id).result(timeout=15)
    assert caught.value.reason == DeadReason.STALLED
    assert starts == [1, 2, 3]
    job = app.get_job(job_id)
    assert (job["retries"], job["progress"]) == (2, -1)
    assert job["processing_finished"] is not None
    assert [record.id for record in app.jobs(state="dead").jobs] == [job_id]


def test_a_reaper_that_is_stopped_binds_nothing_any_more(app: MLQ) -> None:
    app.create_listener(lambda msg, utils: time.sleep(msg))
    reaper = app.create_reaper(call_how_often=OFTEN, job_timeout=0.3)
    sweeper = app.create_reaper(call_how_often=OFTEN, job_timeout=3600)
    before = app.job(app.post(0.6))
    eventually(lambda: before.state is State.RUNNING)
    reaper.stop()
    reaper.stop()
    assert app.store.connector.execute("HLEN", f"{app.store.root}:reapers") == 1
    assert before.result(timeout=15) is None
    assert before.record.attempt == 1
    sweeper.stop()
    assert app.store.connector.execute("EXISTS", f"{app.store.root}:reapers") == 0
    after = app.job(app.post(0.1))
    eventually(lambda: after.state is State.RUNNING)
    assert is_late(app) == 0


def test_closing_the_app_stops_its_reapers(mlq: MLQ, server: Settings) -> None:
    app = MLQ(mlq.name, settings=server)
    app.create_reaper(job_timeout=5)
    app.close()
    assert mlq.store.connector.execute("EXISTS", f"{mlq.store.root}:reapers") == 0


def test_the_bond_of_a_reaper_whose_process_has_gone_ends_after_a_lease(server: Settings) -> None:
    with fresh_app(Settings.load({}, url=server.url, lease=0.3)) as app:
        reaper = app.create_reaper(call_how_often=OFTEN, job_timeout=5)
        bond = f"{app.store.root}:reapers"
        first = app.store.connector.execute("HVALS", bond)
        eventually(lambda: app.store.connector.execute("HVALS", bond) != first)  # it is renewed
        reaper._stopped.set()  # as if it had gone: it is renewed no more, and not ended either
        late = app.store.now() + 0.3
        eventually(lambda: app.store.now() > late)
        jobs = _fetch(app, "w")
        assert len(jobs) == 1
        assert is_late(app) == 0


def test_a_jobs_own_timeout_goes_before_and_max_stalls_is_its_bound(app: MLQ) -> None:
    starts: list[int] = []

    @app.actor(job_timeout=0.1, max_stalls=1)
    def slow() -> None:
        starts.append(current_job().attempt)
        while True:
            time.sleep(0.005)

    @app.actor
    def fast() -> str:
        time.sleep(0.4)
        return "done"

    app.create_reaper(call_how_often=OFTEN, job_timeout=3600)
    app.create_listener(threads=2)
    job, other = slow.submit(), fast.submit()
    with pytest.raises(JobFailed) as caught:
        job.result(timeout=15)
    assert caught.value.reason == DeadReason.STALLED
    assert starts == [1, 2]
    assert other.result(timeout=15) == "done"
    assert other.record.attempt == 1


def test_a_workers_own_helper_acts_on_the_timeout_of_an_actor(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(Settings.load({}, url=server.url, sweep_interval=OFTEN)) as app:

        @app.actor(job_timeout=0.2)
        def slow() -> int:
            while current_job().attempt == 1:
                time.sleep(0.005)
            return current_job().attempt

        worker = start_worker(app, helper=True)
        assert slow.submit().result(timeout=15) == 2
        worker.stop()


def test_of_several_reapers_the_shortest_timeout_counts(app: MLQ) -> None:
    app.create_reaper(call_how_often=OFTEN, job_timeout=3600, max_retries=9)
    app.create_reaper(call_how_often=OFTEN, job_timeout=0.1, max_retries=0)
    app.create_reaper(call_how_often=OFTEN, job_timeout=1800, max_retries=9)

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        while True:
            time.sleep(0.005)

    app.create_listener(listener)
    with pytest.raises(JobFailed, match=r"timeout of 0\.1 s"):
        app.job(app.post("x")).result(timeout=15)


def test_the_clock_of_the_process_does_not_matter(app: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    def listener(msg: Any, utils: dict[str, Any]) -> int:
        while msg == "late" and current_job().attempt == 1:
            time.sleep(0.005)
        return current_job().attempt

    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + 7200)
    app.create_reaper(call_how_often=OFTEN, job_timeout=0.3)
    app.create_listener(listener)
    assert app.job(app.post("in time")).result(timeout=15) == 1
    assert app.job(app.post("late")).result(timeout=15) == 2
    monkeypatch.setattr(time, "time", lambda: real() - 7200)
    assert app.job(app.post("in time")).result(timeout=15) == 1
    assert app.job(app.post("late")).result(timeout=15) == 2


def test_a_reaper_alone_gives_back_the_jobs_of_workers_that_are_lost(server: Settings) -> None:
    with fresh_app(Settings.load({}, url=server.url, lease=0.3)) as app:
        app.create_reaper(call_how_often=OFTEN, job_timeout=3600)
        (held,) = _fetch(app, "lost")
        job = app.job(held.id)
        assert job.state is State.RUNNING
        eventually(lambda: job.state is State.QUEUED)
        assert app.get_job(held.id)["retries"] == 1


def _fetch(app: MLQ, worker: str) -> list[Held]:
    """Has a worker that nobody beats for take a job."""
    app.post("x")
    app.store.start_worker(worker, {}, {})
    command = app.store.turn_command(worker, "nonce", 1, [app.store.lane("default", "mlqueue.listener")], [])
    app.store._run("count")  # the connection is there
    return app.store.read_turn(app.store.connector.execute(*command)).jobs


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"job_timeout": 0}, "job_timeout is 0: it must be more than 0"),
        ({"job_timeout": "5m"}, "job_timeout='5m'"),
        ({"call_how_often": 0}, "the interval is 0"),
        ({"max_retries": -1}, "max_retries=-1"),
        ({"max_retries": True}, "max_retries=True"),
    ],
    ids=str,
)
def test_what_a_reaper_cannot_do_is_refused(mlq: MLQ, given: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidJob, match=text):
        mlq.create_reaper(**given)


# The command


@pytest.fixture
def site(server: Settings, tmp_path: Path) -> Iterator[Site]:
    found = Site(tmp_path, server)
    yield found
    found.close()


def command(site: Site, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "mlqueue", "reaper", "--namespace", site.namespace, *words],
        cwd=site.folder,
        env=site.environment | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_the_command_gives_jobs_back_until_a_signal(site: Site, signum: signal.Signals) -> None:
    mlq = site.mlq

    def listener(msg: Any, utils: dict[str, Any]) -> None:
        while True:
            time.sleep(0.005)

    job = mlq.job(mlq.post("x"))
    with command(site, "--interval", "50ms", "--timeout", "300ms", "--retries", "1") as process, listening(mlq):
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert f"jobs of {site.namespace} that run for longer than 0.3s go back" in line
            mlq.create_listener(listener)
            with pytest.raises(JobFailed, match=r"timeout of 0\.3 s"):
                job.result(timeout=15)
            assert mlq.get_job(job.id)["retries"] == 1
            process.send_signal(signum)
            assert process.wait(15) == 0
        finally:
            process.kill()
    assert mlq.store.connector.execute("EXISTS", f"{mlq.store.root}:reapers") == 0


def test_the_command_refuses_a_timeout_of_nothing(site: Site) -> None:
    site.mlq.post("x")
    with command(site, "--timeout", "0") as process:
        assert process.wait(15) == 2
        assert process.stderr is not None
        assert "it must be more than 0 seconds" in process.stderr.read()
