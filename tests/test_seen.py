"""What jobs show of themselves: metrics and logs, kept with the job, followed live."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import itertools
import logging
import os
import sys
import threading
import time
import warnings
from typing import Any

import dramatiq
import numpy as np
import pytest
from support import StartWorker, eventually, fresh_app

import mlqueue
from mlqueue import MLQ, JobFailed, Settings, State, current_job, journal
from mlqueue.capture import _Tee
from mlqueue.store.shown import HEAD, POINT, Series, decode_points
from mlqueue.testing import drain, eager


def texts(job: mlqueue.Job[Any]) -> list[str]:
    return [line.text for line in job.logs()]


def values(job: mlqueue.Job[Any], name: str) -> list[tuple[float, float]]:
    return [(point.step, point.value) for point in job.metrics().get(name, [])]


@pytest.fixture
def shows(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many jobs each call of the store was about that wrote what jobs show."""
    calls: list[int] = []
    show = mlq.store.show

    def counting(showings: Any, patience: float | None = None) -> Any:
        calls.append(len(showings))
        return show(showings, patience)

    monkeypatch.setattr(mlq.store, "show", counting)
    return calls


# Metrics


def test_metrics_are_kept_with_the_job_and_the_last_are_there_when_it_has_ended(
    mlq: MLQ, worker: dramatiq.Worker, shows: list[int]
) -> None:
    @mlq.actor
    def work() -> None:
        for step in range(500):
            current_job().log_metrics(step, loss=1 / (1 + step), accuracy=np.float32(step / 500))

    begun = time.time()
    job = work.submit()
    assert job.wait(10)
    found = job.metrics()
    assert ["accuracy", "loss"] == list(found)
    assert [(step, 1 / (1 + step)) for step in range(500)] == values(job, "loss")
    assert all(type(point.step) is int for point in found["loss"])
    times = [point.at for point in found["loss"]]
    assert sorted(set(times)) == times
    assert begun <= times[0] <= times[-1] <= time.time()
    assert len(shows) < 5


def test_a_long_series_is_thinned_and_shows_the_whole_course(server: Settings) -> None:
    with fresh_app(dataclasses.replace(server, metric_points=100)) as app:

        @app.actor
        def work(steps: int) -> None:
            for step in range(steps):
                current_job().log_metrics(step, loss=-step)

        jobs = [work.submit(steps) for steps in (100, 101, 12_345)]
        drain(app)
        whole, thinned, long = (values(job, "loss") for job in jobs)
    assert [(step, -step) for step in range(100)] == whole
    assert [(step, -step) for step in range(0, 101, 2)] == thinned
    assert 50 <= len(long) <= 100
    assert ((0, 0), (12_344, -12_344)) == (long[0], long[-1])
    gaps = {later - earlier for (earlier, _), (later, _) in itertools.pairwise(long[:-1])}
    assert {128} == gaps or {256} == gaps


@pytest.mark.parametrize("most", [2, 3, 10, 11])
def test_a_series_has_its_newest_value_and_no_more_points_than_it_may(most: int) -> None:
    series, stored = Series(most), b""
    for step in range(300):
        series.add(step, step, step)
        if step % 7 == 0:
            head, kept, more = series.to_write()
            stored = head + stored[HEAD.size : HEAD.size + kept] + more
            series.written(well=True)
            steps = [point.step for point in decode_points(stored)]
            assert len(steps) <= most
            assert (0, step) == (steps[0], steps[-1])
            assert sorted(set(steps)) == steps
            # Gone on with by another attempt it is the same.
            assert len(steps) == len(Series(most, stored))
    again = Series(most, stored)
    again.restart(150)
    assert all(step < 150 for step, _, _ in POINT.iter_unpack(bytes(again._points)))


def test_an_attempt_that_begins_again_replaces_what_an_earlier_one_had_from_there_on(mlq: MLQ) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> None:
        job = current_job()
        for step in range(10) if job.attempt == 1 else range(6, 12):
            job.log_metrics(step, loss=step + 100 * job.attempt)
        if job.attempt == 1:
            job.log_metrics(0, only_once=1)
            raise ValueError("once")

    job = work.submit()
    drain(mlq)
    expected = [(step, step + (100 if step < 6 else 200)) for step in range(12)]
    assert expected == values(job, "loss")
    assert [(0, 1)] == values(job, "only_once")
    times = [point.at for point in job.metrics()["loss"]]
    assert sorted(set(times)) == times


def test_metrics_are_followed_live(mlq: MLQ, worker: dramatiq.Worker) -> None:
    go_on = threading.Event()

    @mlq.actor
    def work() -> None:
        job = current_job()
        job.log_metrics(0, loss=1.0, accuracy=0.0)
        job.log_metrics(1, loss=0.5)
        assert go_on.wait(10)
        job.log_metrics(2, loss=0.25)

    job = work.submit()
    following = job.metrics(follow=True, timeout=20)
    first = [next(following)[:3] for _ in range(3)]
    assert [("accuracy", 0, 0.0), ("loss", 0, 1.0)] == sorted(first[:2])
    assert ("loss", 1, 0.5) == first[2]
    assert job.state is State.RUNNING
    go_on.set()
    assert [("loss", 2, 0.25)] == [metric[:3] for metric in following]


@pytest.mark.parametrize(
    ("step", "given", "said"),
    [
        ("1", {"loss": 1.0}, "a step is a number"),
        (float("nan"), {"loss": 1.0}, "a step is a number"),
        (1, {"loss": "low"}, "a metric is a number"),
        (1, {"loss": np.zeros(3)}, "such as its mean"),
        (1, {"x" * 201: 1}, "at most 200 characters"),
        (1, {f"m{n}": n for n in range(101)}, "a job has at most 100"),
    ],
)
def test_what_is_no_metric_is_an_error_in_the_job(mlq: MLQ, step: Any, given: dict[str, Any], said: str) -> None:
    @mlq.actor(max_retries=0)
    def work() -> None:
        current_job().log_metrics(step, **given)

    job = work.submit()
    drain(mlq)
    with pytest.raises(JobFailed, match=said):
        job.result(timeout=0)
    assert {} == job.metrics()


def test_values_that_are_no_numbers_of_json_are_kept(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        current_job().log_metrics(0.5, loss=float("nan"), best=float("inf"), flag=True, step=7)

    job = work.submit()
    drain(mlq)
    assert [(0.5, float("inf"))] == values(job, "best")
    assert [(0.5, 1.0)] == values(job, "flag")
    assert [(0.5, 7.0)] == values(job, "step")
    assert np.isnan(job.metrics()["loss"][0].value)


def test_metrics_that_cannot_be_written_are_no_error_in_the_job(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(showings: Any, patience: float | None = None) -> Any:
        raise mlqueue.StoreFull

    monkeypatch.setattr(mlq.store, "show", refuse)

    @mlq.actor
    def work() -> int:
        current_job().log_metrics(1, loss=1)
        print("printed")
        return 1

    job = work.submit()
    drain(mlq)
    assert 1 == job.result(timeout=0)


def test_a_store_that_is_away_for_a_while_costs_nothing_that_was_shown(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    start_worker()
    monkeypatch.setattr(journal, "PAUSE", 0.05)
    show, away, asked = mlq.store.show, threading.Event(), threading.Event()
    away.set()

    def away_at_first(showings: Any, patience: float | None = None) -> Any:
        asked.set()
        if away.is_set():
            raise mlqueue.StoreUnavailable
        return show(showings, patience)

    monkeypatch.setattr(mlq.store, "show", away_at_first)

    @mlq.actor
    def work() -> None:
        for step in range(5):
            current_job().log_metrics(step, loss=step)
            print("step", step)

    job = work.submit()
    assert asked.wait(10)
    assert not job.wait(0.3)  # its end waits for what goes before it
    away.clear()
    assert job.wait(10)
    assert [(step, step) for step in range(5)] == values(job, "loss")
    assert [f"step {step}" for step in range(5)] == texts(job)


def test_what_a_stale_attempt_shows_is_refused(mlq: MLQ, start_worker: StartWorker) -> None:
    worker = start_worker()
    go_on = threading.Event()

    @mlq.actor(max_retries=0)
    def work() -> None:
        if current_job().attempt == 1:
            with contextlib.suppress(mlqueue.Cancelled):
                go_on.wait(20)
            current_job().log_metrics(7, loss=7)
            print("stale")
        else:
            current_job().log_metrics(1, loss=1)
            print("fresh")

    job = work.submit()
    eventually(lambda: job.state is State.RUNNING)
    mlq.store.release(job.record.worker or "", "stall", "a test")
    eventually(lambda: job.done)
    go_on.set()
    worker.stop()
    assert [(1, 1)] == values(job, "loss")
    assert ["fresh"] == texts(job)


def test_all_that_a_job_has_shown_goes_with_it(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        current_job().log_metrics(1, loss=1)
        print("printed")

    job = work.submit()
    drain(mlq)
    keys = {f"{mlq.store.root}:{kind}:{job.id}".encode() for kind in ("lg", "me")}
    assert keys <= set(mlq.client.keys(f"{mlq.store.root}:*"))
    mlq.store.remove([job.id])
    assert [] == [key for key in mlq.client.keys(f"{mlq.store.root}:*") if job.id.encode() in key]
    with pytest.raises(mlqueue.JobNotFound):
        job.logs()
    with pytest.raises(mlqueue.JobNotFound):
        job.metrics()


# Logs


def test_what_a_job_prints_and_logs_is_kept_line_by_line(
    mlq: MLQ, start_worker: StartWorker, capfd: pytest.CaptureFixture[str]
) -> None:
    start_worker()
    logger = logging.getLogger("of.the.user")

    @mlq.actor
    def work() -> None:
        print("one\ntwo")
        print("a", end="")
        print("b", file=sys.stderr)
        print("c")
        sys.stdout.writelines(["d\n", "e\n"])
        logger.warning("careful: %s", "näh")
        print("no end", end="")

    begun = time.time()
    job = work.submit()
    assert job.wait(10)
    found = job.logs()
    assert [
        ("stdout", None, "one"),
        ("stdout", None, "two"),
        ("stderr", None, "b"),
        ("stdout", None, "ac"),
        ("stdout", None, "d"),
        ("stdout", None, "e"),
        ("logging", "WARNING", "of.the.user: careful: näh"),
        ("stdout", None, "no end"),
    ] == [(line.stream, line.level, line.text) for line in found]
    assert list(range(len(found))) == [line.number for line in found]
    assert {1} == {line.attempt for line in found}
    assert all(begun - 0.01 <= line.at <= time.time() for line in found)


def test_output_goes_on_to_where_it_went(
    mlq: MLQ, start_worker: StartWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    @mlq.actor
    def work() -> bool:
        print("to both")
        return sys.stdout.writable() and sys.stdout.encoding is not None

    before = sys.stdout, sys.stderr, logging.Logger.callHandlers
    worker = start_worker()
    assert isinstance(sys.stdout, _Tee)
    job = work.submit()
    assert job.result(timeout=10)
    worker.stop()
    assert before == (sys.stdout, sys.stderr, logging.Logger.callHandlers)
    assert "to both\n" in capsys.readouterr().out
    assert ["to both"] == texts(job)


def test_jobs_that_run_beside_each_other_have_logs_of_their_own(mlq: MLQ, start_worker: StartWorker) -> None:
    barrier = threading.Barrier(3)

    @mlq.actor
    def work(name: str) -> None:
        for n in range(20):
            barrier.wait(10)
            print(name, n)
            logging.getLogger("test").error("%s logs %d", name, n)

    @mlq.actor
    async def coroutine(name: str) -> None:
        for n in range(20):
            barrier.wait(10)
            print(name, n)
            logging.getLogger("test").error("%s logs %d", name, n)

    start_worker(threads=3)
    jobs = {"a": work.submit("a"), "b": work.submit("b"), "c": coroutine.submit("c")}
    for name, job in jobs.items():
        assert job.wait(20)
        assert [text for n in range(20) for text in (f"{name} {n}", f"test: {name} logs {n}")] == texts(job)


def test_a_thread_of_a_job_has_its_log_when_it_has_its_context(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        def say(text: str) -> None:
            print(text)

        for target, text in ((contextvars.copy_context().run, "with"), (lambda fn, text: fn(text), "without")):
            thread = threading.Thread(target=target, args=(say, text))
            thread.start()
            thread.join()

    job = work.submit()
    drain(mlq)
    assert ["with"] == texts(job)


def test_a_message_that_a_handler_prints_is_there_once(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        logger = logging.getLogger("noisy")
        handler = logging.StreamHandler(sys.stderr)
        logger.addHandler(handler)
        logger.propagate = False
        logger.error("once\nin two lines")
        logger.removeHandler(handler)

    job = work.submit()
    drain(mlq)
    assert ["noisy: once\nin two lines"] == texts(job)


def test_the_host_s_logging_is_as_without_a_worker(
    mlq: MLQ, start_worker: StartWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    start_worker()
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:

        @mlq.actor
        def work() -> int:
            logging.getLogger("host").warning("with no handler at all")
            return len(root.handlers)

        job = work.submit()
        assert 0 == job.result(timeout=10)
    finally:
        root.handlers = handlers
    assert "with no handler at all" in capsys.readouterr().err
    assert "host: with no handler at all" in texts(job)


def test_of_a_progress_bar_its_last_state_is_kept(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        for percent in range(101):
            sys.stderr.write(f"\r{percent}%|")
        sys.stderr.write("\n")
        print("unix\r")
        print("almost\rdone", end="\r")
        print("at last")

    job = work.submit()
    drain(mlq)
    assert ["100%|", "unix", "at last"] == texts(job)


def test_the_traceback_of_a_job_that_fails_is_in_its_log(mlq: MLQ) -> None:
    @mlq.actor(max_retries=0)
    def work() -> None:
        print("before")
        raise ValueError("why it failed")

    job = work.submit()
    drain(mlq)
    first, last = job.logs()
    assert ("before", "ERROR") == (first.text, last.level)
    assert "ValueError: why it failed" in last.text


def test_a_log_is_bounded_and_has_its_end(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(dataclasses.replace(server, job_logs=10_000)) as app:

        @app.actor
        def loud(lines: int) -> None:
            for n in range(lines):
                print(f"line {n}")
            print("x" * 100_000)
            print("the end")

        @app.actor
        def slow() -> None:
            for part in range(4):
                for n in range(150):
                    print(f"line {150 * part + n}")
                eventually(lambda after=150 * part + 149: app.store.log(current_job().id, -1).next == after + 1)

        worker = start_worker(app)
        jobs = [loud.submit(50_000), slow.submit()]
        assert all(job.wait(30) for job in jobs)
        worker.stop()
        size = sum(map(len, app.client.lrange(f"{app.store.root}:lg:{jobs[0].id}", 0, -1)))
        lines = jobs[0].logs()
        last = jobs[1].logs()
        tail = jobs[1].logs(tail=3)
    assert size <= 10_000
    assert (50_001, "the end", 8192) == (lines[-1].number, lines[-1].text, len(lines[-2].text))
    assert list(range(lines[0].number, 50_002)) == [line.number for line in lines]
    assert [f"line {line.number}" for line in last] == [line.text for line in last]
    assert (599, True) == (last[-1].number, 200 < len(last) < 600)
    assert last[-3:] == tail


def test_logs_of_all_attempts_are_kept(mlq: MLQ) -> None:
    @mlq.actor(max_retries=1, min_backoff=1, max_backoff=2)
    def work() -> None:
        print("attempt", current_job().attempt)
        if current_job().attempt == 1:
            raise ValueError

    job = work.submit()
    drain(mlq)
    found = [(line.number, line.attempt, line.text) for line in job.logs() if line.stream == "stdout"]
    assert [(1, "attempt 1"), (2, "attempt 2")] == [item[1:] for item in found]
    assert found[0][0] < found[1][0]


def test_logs_are_followed_live(mlq: MLQ, start_worker: StartWorker) -> None:
    start_worker()
    go_on = threading.Event()

    @mlq.actor
    def work() -> None:
        print("one")
        print("two")
        assert go_on.wait(10)
        print("three")

    job = work.submit()
    following = job.logs(follow=True, timeout=20)
    assert ["one", "two"] == [next(following).text for _ in range(2)]
    assert job.state is State.RUNNING
    go_on.set()
    assert ["three"] == [line.text for line in following]
    assert ["two", "three"] == [line.text for line in job.logs(follow=True, tail=2)]


def test_a_tight_loop_makes_few_calls(mlq: MLQ, start_worker: StartWorker, shows: list[int]) -> None:
    start_worker()

    @mlq.actor
    def work() -> float:
        begun = time.monotonic()
        n = 0
        while time.monotonic() < begun + 1:
            print("line", n)
            current_job().log_metrics(n, n=n)
            n += 1
        return n

    job = work.submit()
    assert 1000 < job.result(timeout=10)
    assert len(shows) < 12


@pytest.mark.parametrize(
    ("setting", "option", "chosen", "kept"),
    [
        (2**18, None, None, True),
        (None, None, None, False),
        (2**18, False, None, False),
        (None, True, None, True),
        (None, True, False, False),
        (2**18, False, True, True),
    ],
)
def test_logs_are_kept_where_that_is_switched_on(
    server: Settings, setting: int | None, option: bool | None, chosen: bool | None, kept: bool
) -> None:
    with fresh_app(dataclasses.replace(server, job_logs=setting)) as app:

        @app.actor(**({} if option is None else {"job_logs": option}))
        def work() -> None:
            print("printed")
            current_job().log_metrics(1, loss=1)

        job = (work if chosen is None else work.with_options(job_logs=chosen)).submit()
        drain(app)
        assert (["printed"] if kept else []) == texts(job)
        assert [(1, 1)] == values(job, "loss")


def test_jobs_run_eagerly_show_themselves_too(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        current_job().log_metrics(1, loss=1)

    with eager(mlq):
        job = work.submit()
    assert [(1, 1)] == values(job, "loss")


def test_jobs_that_show_nothing_cost_no_call(mlq: MLQ, shows: list[int]) -> None:
    @mlq.actor
    def work() -> None:
        pass

    work.submit_many([()] * 100)
    drain(mlq)
    assert [] == shows
    assert "mlqueue-journal" not in {thread.name for thread in threading.enumerate()}


def test_ends_of_many_jobs_share_a_call(mlq: MLQ, start_worker: StartWorker, shows: list[int]) -> None:
    start_worker()

    @mlq.actor
    def work(n: int) -> None:
        print("job", n)
        current_job().log_metrics(n, n=n)

    jobs = work.submit_many([(n,) for n in range(300)])
    for n, job in enumerate(jobs):
        assert job.wait(10)
        assert ([f"job {n}"], [(n, n)]) == (texts(job), values(job, "n"))
    assert len(shows) < 200


def test_a_process_that_a_job_forks_does_no_harm(mlq: MLQ) -> None:
    @mlq.actor
    def work() -> None:
        print("parent")
        pid = os.fork()
        if pid == 0:
            print("child")
            os._exit(0)
        os.waitpid(pid, 0)
        print("parent again")

    job = work.submit()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of a fork with threads
        drain(mlq)
    assert ["parent", "parent again"] == texts(job)
