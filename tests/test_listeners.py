"""MLQ's listeners: which functions run, what they get and return, and the process that they run in."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.servers import OwnServer
from listening import Program, listening
from support import StartWorker, eventually, fresh_app
from worker_processes import ROOT, Site

from mlqueue import (
    MLQ,
    DeadReason,
    InvalidJob,
    JobFailed,
    JobNotFound,
    Result,
    ResultTimeout,
    Settings,
    State,
    WaitCycle,
    current_job,
    listeners,
    outliving,
)
from mlqueue.listeners import split

PROGRAMS = Path(__file__).with_name("programs")
PAGE = ROOT / "docs/porting-from-mlq.md"

Utils = dict[str, Any]


@pytest.fixture
def app(mlq: MLQ) -> Iterator[MLQ]:
    with listening(mlq):
        yield mlq


def run(app: MLQ, msg: Any = None, **options: Any) -> Any:
    """Posts a message; what its job gives."""
    return app.job(app.post(msg, **options)).result(timeout=15)


# Which functions run


def test_all_functions_run_in_order_of_registration_and_the_last_ones_value_is_the_result(app: MLQ) -> None:
    seen: list[str] = []

    def first(msg: Any, utils: Utils) -> str:
        seen.append("first")
        return "of the first"

    def second(msg: Any, utils: Utils) -> str:
        seen.append("second")
        return "of the second"

    app.create_listener(first)
    app.create_listener(second)
    assert run(app) == "of the second"
    assert seen == ["first", "second"]


def test_the_functions_named_run_in_the_order_of_the_list(app: MLQ) -> None:
    seen: list[str] = []

    def add(name: str) -> None:
        def function(msg: Any, utils: Utils) -> str:
            seen.append(name)
            return name

        function.__name__ = name
        app.create_listener(function)

    for name in ("a", "b", "c, d|e"):
        add(name)
    assert run(app, functions=["c, d|e", "a"]) == "a"
    assert run(app, functions=["b"]) == "b"
    assert seen == ["c, d|e", "a", "b"]


def test_when_one_raises_the_later_ones_do_not_run_and_the_job_is_dead_once(app: MLQ) -> None:
    seen: list[str] = []

    def good(msg: Any, utils: Utils) -> None:
        seen.append("good")

    def bad(msg: Any, utils: Utils) -> None:
        seen.append("bad")
        raise ValueError("no")

    def later(msg: Any, utils: Utils) -> None:
        seen.append("later")

    for function in (good, bad, later):
        app.create_listener(function)
    job_id = app.post("x")
    with pytest.raises(JobFailed, match="ValueError: no") as caught:
        app.job(job_id).result(timeout=15)
    assert caught.value.reason == DeadReason.FAILED
    assert seen == ["good", "bad"]
    assert [record.id for record in app.jobs(state="dead").jobs] == [job_id]
    assert app.job(job_id).record.attempt == 1


def test_a_function_of_the_same_name_replaces_the_first_and_keeps_its_place(app: MLQ) -> None:
    def define(value: int) -> Callable[..., int]:
        def listener(msg: Any, utils: Utils) -> int:
            return value

        return listener

    def last(msg: Any, utils: Utils) -> int:
        return 10 + run(app, functions=["listener"])

    app.create_listener(define(1))
    app.create_listener(last)
    assert run(app, functions=["last"]) == 11
    app.create_listener(define(2))
    assert run(app) == 12


def test_a_removed_function_runs_no_more_and_its_jobs_wait(app: MLQ) -> None:
    def one(msg: Any, utils: Utils) -> int:
        return 1

    def two(msg: Any, utils: Utils) -> int:
        return 2

    app.create_listener(one)
    app.create_listener(two)
    assert run(app) == 2
    assert app.remove_listener(two) is True
    assert app.remove_listener(two) is False
    assert app.remove_listener("three") is False
    waits = app.post("x", functions=["two"])
    assert run(app) == 1
    assert app.job(waits).state is State.QUEUED
    assert app.remove_listener("one") is True
    idle = app.post("y")
    app.create_listener(two)
    assert app.job(waits).result(timeout=15) == 2
    assert app.job(idle).result(timeout=15) == 2


def test_a_job_that_meets_no_function_any_more_goes_back_without_a_strike(app: MLQ) -> None:
    def one(msg: Any, utils: Utils) -> int:
        return current_job().attempt

    app.create_listener(one)
    app._listeners._functions = {}  # taken away, and the store has not heard of it yet
    job = app.job(app.post("x", functions=["one"]))
    eventually(lambda: job.record.attempt >= 2)
    app.create_listener(one)
    assert job.result(timeout=15) >= 2
    assert (job.record.crashes, job.record.stalls, job.record.retries) == (0, 0, 0)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda msg: None, r"write it as def <lambda>\(msg, utils\)"),
        (lambda msg, utils, more: None, "cannot be called"),
        (3, "it must be a function"),
    ],
    ids=["one parameter", "three", "an int"],
)
def test_what_cannot_be_a_listener_is_refused_at_once(mlq: MLQ, function: Any, text: str) -> None:
    with pytest.raises(InvalidJob, match=text):
        mlq.create_listener(function)
    with pytest.raises(InvalidJob, match="threads=0"):
        mlq.create_listener(threads=0)
    assert mlq.broker.worker is None


def test_a_function_may_be_async(app: MLQ) -> None:
    async def other(msg: Any, utils: Utils) -> Any:
        await asyncio.sleep(0)
        return msg

    async def waits(msg: Any, utils: Utils) -> Any:
        assert current_job().id == utils["full_message"]["id"]
        child = utils["post"]("child", functions=["other"])
        return {"awaited": await app.job(child), "blocked": await asyncio.to_thread(utils["block_until_result"], child)}

    app.create_listener(other)
    app.create_listener(waits)
    assert run(app, functions=["waits"]) == {"awaited": "child", "blocked": "child"}


def test_create_listener_works_inside_a_running_event_loop(app: MLQ) -> None:
    async def main() -> Any:
        assert app.create_listener(lambda msg, utils: msg * 2) is True
        return await app.job(app.post(21))

    assert asyncio.run(main()) == 42


def test_a_second_call_adds_to_the_listener_that_works_already(app: MLQ) -> None:
    def one(msg: Any, utils: Utils) -> int:
        return 1

    def two(msg: Any, utils: Utils) -> int:
        return 2

    job_id = app.post("x", functions=["two"])
    assert app.create_listener() is True
    worker = app.broker.worker
    assert app.create_listener(one) is True
    assert run(app) == 1
    assert app.create_listener(two) is True
    assert app.job(job_id).result(timeout=15) == 2
    assert app.broker.worker is worker


def test_as_many_jobs_run_at_a_time_as_there_are_threads(app: MLQ) -> None:
    together = threading.Barrier(3, timeout=15)
    app.create_listener(lambda msg, utils: together.wait() >= 0, threads=3)
    jobs = [app.job(app.post(number)) for number in range(3)]
    assert [job.result(timeout=15) for job in jobs] == [True] * 3


# What they return


@pytest.mark.parametrize(
    ("value", "short", "full"),
    [
        (("done", b"png"), "done", b"png"),
        (["done", {"a": 1}], "done", {"a": 1}),
        ((None, 5), None, 5),
        ([None, 5], None, 5),
        ((True, [1, 2]), True, [1, 2]),
        ([True, False], True, False),
        ((0.9, 3), 0.9, 3),
        ([0.9, "x"], 0.9, "x"),
        ((np.float32(0.5), b"x"), 0.5, b"x"),
        (("x" * 2000, 1), "x" * 1000, 1),
        ([1, 2], None, [1, 2]),
        ([1.5, np.float32(2)], None, [1.5, np.float32(2)]),
        ((b"a", b"b"), None, (b"a", b"b")),
        (([1], 2), None, ([1], 2)),
        (("a", "b", "c"), None, ("a", "b", "c")),
        (("a",), None, ("a",)),
        ([], None, []),
        ({"a": 1, "b": 2}, None, {"a": 1, "b": 2}),
        ("ab", "ab", "ab"),
        (b"ab", None, b"ab"),
        ("x" * 1001, None, "x" * 1001),
        (7, 7, 7),
        (None, None, None),
        (Result(short="s", full="f"), "s", "f"),
    ],
    ids=lambda value: f"{type(value).__name__} {str(value)[:16]}",
)
def test_what_a_function_returns_is_split_only_when_it_is_a_pair_of_short_and_full(
    value: object, short: object, full: object
) -> None:
    result = Result.of(split(value))
    assert (result.short, result.full) == (short, full)
    assert type(result.short) is type(short)


def test_a_full_result_may_be_bytes_of_any_size(app: MLQ) -> None:
    full = bytes(range(256)) * 40_000
    app.create_listener(lambda msg, utils: ("10 MB", full))
    job_id = app.post("x")
    assert app.job(job_id).result(timeout=30) == full
    assert app.get_job(job_id)["short_result"] == "10 MB"
    assert app.get_job(job_id)["result"] == full


# What they get


def test_the_full_message_is_the_dict_as_it_stands_when_the_function_starts(app: MLQ) -> None:
    seen: list[dict[str, Any]] = []

    def first(msg: Any, utils: Utils) -> None:
        seen.append(utils["full_message"])
        utils["update_progress"](30)

    def second(msg: Any, utils: Utils) -> None:
        seen.append(utils["full_message"])

    app.create_listener(first)
    app.create_listener(second)
    job_id = app.post({"a": 1}, functions=["first", "second"], callback="http://127.0.0.1:1/")
    app.job(job_id).result(timeout=15)
    assert set(seen[0]) == set(app.get_job(job_id))
    assert (seen[0]["id"], seen[0]["msg"], seen[0]["functions"]) == (job_id, {"a": 1}, ["first", "second"])
    assert [message["progress"] for message in seen] == [0, 30]
    assert seen[0]["callback"] == "http://127.0.0.1:1/"


def test_progress_is_a_number_or_a_text_and_never_an_error_in_the_job(app: MLQ) -> None:
    class Odd:
        def __str__(self) -> str:
            return "odd" * 1000

    written: list[object] = []

    def listener(msg: Any, utils: Utils) -> None:
        for value in (1, 2.5, Odd(), [3], None, np.int64(7)):
            utils["update_progress"](value)
            written.append(eventually(lambda: app.get_job(utils["full_message"]["id"])["progress"] != before()))
            shown.append(app.get_job(utils["full_message"]["id"])["progress"])

    shown: list[object] = [0]

    def before() -> object:
        return shown[-1]

    app.create_listener(listener)
    run(app)
    assert shown[1:] == [1, 2.5, ("odd" * 1000)[:1000], "[3]", "None", 7]


def test_of_many_reports_the_last_one_arrives(app: MLQ) -> None:
    def listener(msg: Any, utils: Utils) -> None:
        for value in range(1000):
            utils["update_progress"](value)

    app.create_listener(listener)
    job_id = app.post("x")
    app.job(job_id).result(timeout=15)
    assert app.job(job_id).record.progress == 999


def test_data_is_kept_under_the_name_of_the_queue_as_bytes(app: MLQ) -> None:
    keys: list[str] = []

    def listener(msg: Any, utils: Utils) -> Any:
        made = utils["store_data"](b"bytes")
        named = utils["store_data"]("text", key="mine")
        passing = utils["store_data"]("gone soon", key="short", expiry=0.05)
        keys.extend([made, named, passing])
        seen = [utils["fetch_data"](key) for key in (made, named, passing, "unknown")]
        eventually(lambda: utils["fetch_data"]("short") is None)
        return seen

    app.create_listener(listener)
    assert run(app) == [b"bytes", b"text", b"gone soon", None]
    assert keys[1:] == ["mine", "short"]
    assert len(keys[0]) >= 16
    assert app.store.get_data("mine") == b"text"
    stranger = MLQ(app.name + "2", settings=app.settings)
    try:
        assert stranger.store.get_data("mine") is None
    finally:
        stranger.close()


def test_a_job_that_a_job_posts_knows_its_parent(app: MLQ) -> None:
    def parent(msg: Any, utils: Utils) -> str:
        child: str = utils["post"]("child", None, ["child"])
        return child

    def child(msg: Any, utils: Utils) -> None: ...

    app.create_listener(parent)
    app.create_listener(child)
    job_id = app.post("x", functions=["parent"])
    posted = app.job(job_id).result(timeout=15)
    assert app.job(posted).record.parent == job_id
    assert app.get_job(posted)["functions"] == ["child"]


# Waiting for another job


def test_one_worker_waits_for_a_job_of_its_own_and_gets_the_short_result_or_else_the_full_one(app: MLQ) -> None:
    def parent(msg: Any, utils: Utils) -> Any:
        posted = [utils["post"](text, functions=["child"]) for text in ("pair", "bytes")]
        before = utils["post"]("pair", functions=["child"])
        utils["block_until_result"](before)
        return [utils["block_until_result"](job_id) for job_id in (*posted, before)]

    def child(msg: Any, utils: Utils) -> Any:
        return ("short", b"full") if msg == "pair" else b"full only"

    app.create_listener(parent)
    app.create_listener(child)
    assert run(app, functions=["parent"]) == ["short", b"full only", "short"]


def test_waiting_raises_for_a_job_that_failed_or_is_unknown_or_an_ancestor_or_takes_too_long(app: MLQ) -> None:
    raised: list[type] = []

    def parent(msg: Any, utils: Utils) -> None:
        later = utils["post"]("later", delay=60)
        for job_id, error in (
            (utils["post"]("x", functions=["fails"]), JobFailed),
            ("unknown", JobNotFound),
            (utils["post"](utils["full_message"]["id"], functions=["child"]), JobFailed),
        ):
            with pytest.raises(error):
                utils["block_until_result"](job_id)
        with pytest.raises(ResultTimeout):
            utils["block_until_result"](later, timeout=0.05)

    def fails(msg: Any, utils: Utils) -> None:
        raise ValueError

    def child(msg: Any, utils: Utils) -> None:
        try:
            utils["block_until_result"](msg)
        except Exception as error:
            raised.append(type(error))
            raise

    for function in (parent, fails, child):
        app.create_listener(function)
    run(app, functions=["parent"])
    assert raised == [WaitCycle]


# Functions that nobody has


def test_a_job_for_a_function_that_no_worker_has_blocks_nothing_and_runs_as_soon_as_one_has_it(app: MLQ) -> None:
    def one(msg: Any, utils: Utils) -> int:
        return 1

    def two(msg: Any, utils: Utils) -> int:
        return 2

    app.create_listener(one)
    waits = [app.job(app.post("x", functions=["one", "two"])) for _ in range(3)]
    assert run(app, functions=["one"]) == 1
    assert [job.state for job in waits] == [State.QUEUED] * 3
    began = time.time()
    app.create_listener(two)
    assert [job.result(timeout=15) for job in waits] == [2, 2, 2]
    assert waits[0].record.started_at - began < 1  # type: ignore[operator]


@pytest.fixture
def short_patience(server: Settings) -> Iterator[MLQ]:
    """An app whose workers may do without a function for 0.2 s, and are swept often."""
    settings = Settings.load({}, url=server.url, function_timeout=0.2, sweep_interval=0.05)
    with fresh_app(settings) as app:
        yield app


def test_a_job_whose_function_no_live_worker_has_had_in_time_is_dead(short_patience: MLQ) -> None:
    app = short_patience
    job_id = app.post("x", functions=["known", "unknown"])
    other = app.post("x", functions=["known"])
    reaper = app.create_reaper()  # it sweeps
    with listening(app):
        app.create_listener(lambda msg, utils: 1)
        sweeps = app.store.connector.execute
        eventually(lambda: sweeps("HGET", f"{app.store.root}:sweep", "last"))
        with pytest.raises(JobFailed, match=r"functions known, unknown for 0\.2 s") as caught:
            app.job(job_id).result(timeout=15)
        assert caught.value.reason == DeadReason.UNKNOWN_FUNCTION
        assert app.get_job(job_id)["progress"] == -1
        app.job(other).wait(15)
        assert app.job(other).state is State.DEAD
        record = app.job(job_id).record
        assert record.finished_at - record.created_at >= 0.2  # type: ignore[operator]
    reaper.stop()


def test_with_no_worker_alive_a_job_for_a_function_waits_for_ever(short_patience: MLQ) -> None:
    app = short_patience
    job = app.job(app.post("x", functions=["unknown"]))
    reaper = app.create_reaper()
    last = f"{app.store.root}:sweep"
    seen = {eventually(lambda: app.store.connector.execute("HGET", last, "last"))}
    began = time.monotonic()
    while time.monotonic() < began + 0.6 or len(seen) < 5:
        seen.add(app.store.connector.execute("HGET", last, "last"))
        threading.Event().wait(0.01)
    assert job.state is State.QUEUED
    reaper.stop()


# Stopping and starting


def test_shutdown_ends_with_the_job_in_hand_and_takes_no_other_and_create_listener_works_again(app: MLQ) -> None:
    started, go = threading.Event(), threading.Event()

    def listener(msg: Any, utils: Utils) -> Any:
        started.set()
        go.wait(15)
        return msg

    app.create_listener(listener)
    jobs = [app.job(app.post(number)) for number in range(3)]
    assert started.wait(15)
    app.shutdown()
    assert app.join(0.1) is False
    go.set()
    assert app.join(15) is True
    assert [job.state for job in jobs] == [State.SUCCEEDED, State.QUEUED, State.QUEUED]
    app.create_listener()
    assert [job.result(timeout=15) for job in jobs] == [0, 1, 2]


def test_shutdown_stops_the_listener_of_this_process_only(app: MLQ, server: Settings) -> None:
    other = MLQ(app.name, settings=server)
    try:
        with listening(other):
            for one, name in ((app, "app"), (other, "other")):
                one.create_listener(lambda msg, utils, name=name: name)
            app.shutdown()
            assert app.join(15)
            assert [run(app) for _ in range(5)] == ["other"] * 5
    finally:
        other.close()


def test_a_function_may_shut_its_own_listener_down(app: MLQ) -> None:
    def listener(msg: Any, utils: Utils) -> str:
        app.shutdown()
        return "last words"

    app.create_listener(listener)
    job, left = app.job(app.post("x")), app.job(app.post("y"))
    assert job.result(timeout=15) == "last words"
    assert app.join(15)
    assert left.state is State.QUEUED


def test_a_listener_that_is_created_while_the_last_one_stops_follows_it(app: MLQ) -> None:
    started, go = threading.Event(), threading.Event()

    def listener(msg: Any, utils: Utils) -> Any:
        started.set()
        go.wait(15)
        return msg

    app.create_listener(listener)
    first, second = app.job(app.post(1)), app.job(app.post(2))
    assert started.wait(15)
    app.shutdown()
    assert app.create_listener(listener) is True
    go.set()
    assert (first.result(timeout=15), second.result(timeout=15)) == (1, 2)
    app.shutdown()
    assert app.join(15)
    assert app.broker.worker is None


def test_closing_the_app_ends_its_listener(server: Settings, mlq: MLQ) -> None:
    app = MLQ(mlq.name, settings=server)
    app.create_listener(lambda msg, utils: msg)
    assert run(app, 3) == 3
    app.close()
    assert app.broker.worker is None
    assert app.join(0)


def test_where_a_worker_runs_already_a_function_is_only_added(mlq: MLQ, start_worker: StartWorker) -> None:
    worker = start_worker()
    mlq.create_listener(lambda msg, utils: "there")
    assert run(mlq) == "there"
    assert mlq.broker.worker is worker
    mlq.shutdown()
    assert mlq.join(1)
    assert run(mlq) == "there"


def test_in_a_process_of_mlqueue_worker_a_function_is_only_added(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "works_already", True)
    assert mlq.create_listener(lambda msg, utils: 1) is True
    assert mlq.broker.worker is None
    assert len(mlq.broker.functions) == 1
    assert mlq.join(0)


def test_in_a_process_of_the_dramatiq_command_a_function_is_only_added(
    mlq: MLQ, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "dramatiq.cli", sys)
    assert mlq.create_listener(lambda msg, utils: 1) is True
    assert mlq.broker.worker is None


def test_a_listener_that_was_stopped_stays_stopped(app: MLQ) -> None:
    app.create_listener(lambda msg, utils: 1)
    app.shutdown()
    assert app.join(15)
    before = threading.active_count()

    @app.actor(queue_name="later")
    def later() -> int:
        return 2

    assert threading.active_count() == before
    app.create_listener()
    assert later.submit().result(timeout=15) == 2


# Processes


@pytest.fixture
def site(server: Settings, tmp_path: Path) -> Iterator[Site]:
    """A folder and a namespace for programs."""
    found = Site(tmp_path, server)
    yield found
    found.close()


@pytest.fixture
def start(site: Site) -> Iterator[Callable[..., Program]]:
    """Starts programs; the text ``LISTEN`` in one is a listener that sleeps for as long as its message says."""
    programs: list[Program] = []

    def begin(text: str) -> Program:
        programs.append(Program(site, textwrap.dedent(text).replace("LISTEN", LISTEN)))
        return programs[-1]

    yield begin
    for program in programs:
        program.close()


LISTEN = """
import time
from mlqueue.queue import MLQ
mlq = MLQ()
def sleeps(msg, utils):
    utils["update_progress"](1)
    time.sleep(msg)
    return "slept"
mlq.create_listener(sleeps)
"""


def post_and_wait(site: Site, msg: Any) -> Any:
    """Posts a job; it, when it runs."""
    job = site.mlq.job(site.mlq.post(msg))
    eventually(lambda: job.progress == 1)
    return job


def test_the_programs_of_mlqs_readme_run_as_they_are_written(tmp_path: Path) -> None:
    server = OwnServer(tmp_path / "server").start()
    site = Site(tmp_path, Settings.load({}, url=server.url))
    producer, worker = (
        Program(site, (PROGRAMS / name).read_text().replace("6379", str(server.port)))
        for name in ("producer.py", "worker.py")
    )
    try:
        assert producer.ends() == 0, producer.log() + worker.log()
        assert producer.log().split() == ["2468"]
        assert worker.process.poll() is None
        worker.send(signal.SIGTERM)
        assert worker.ends() == 0, worker.log()
    finally:
        producer.close()
        worker.close()
        site.close()
        server.close()


def test_the_page_about_porting_shows_these_programs_and_others_that_run(
    site: Site, start: Callable[..., Program]
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert [(PROGRAMS / name).read_text() for name in ("producer.py", "worker.py")] == blocks[:2]
    assert len(blocks) == 4
    for block in blocks[2:]:
        program = start(block.replace('"photos"', repr(site.namespace)))
        assert program.ends() == 0, program.log()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_job_in_hand_end_and_takes_no_other(
    site: Site, start: Callable[..., Program], signum: signal.Signals
) -> None:
    program = start("LISTEN\nprint('main has ended')")
    program.says("main has ended")
    job = post_and_wait(site, 0.7)
    left = site.mlq.job(site.mlq.post(0))
    program.send(signum)
    assert program.ends() == 0, program.log()
    assert job.result(timeout=0) == "slept"
    assert (left.state, left.record.attempt) == (State.QUEUED, 0)
    assert "Traceback" not in program.log()


def test_after_the_main_program_jobs_may_use_pools_threads_and_processes(
    site: Site, start: Callable[..., Program]
) -> None:
    program = start("""
        import asyncio, multiprocessing, threading
        from mlqueue.queue import MLQ
        mlq = MLQ()
        def pools(msg, utils):
            from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
            with ThreadPoolExecutor(2) as pool:
                first = sum(pool.map(abs, [-1, -2]))
            fork = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(1, mp_context=fork) as pool:
                second = pool.submit(abs, -4).result()
            process = fork.Process(target=print)
            process.start()
            process.join(10)
            stopped = fork.Process(target=threading.Event().wait)
            stopped.start()
            stopped.terminate()
            stopped.join(10)
            return [first, second, process.exitcode, stopped.exitcode]
        async def awaits(msg, utils):
            return await asyncio.to_thread(abs, -7)
        async def main():
            mlq.create_listener(pools)
            mlq.create_listener(awaits)
        asyncio.run(main())
        print("main has ended")
    """)
    program.says("main has ended")
    assert run(site.mlq, functions=["pools"]) == [3, 4, 0, -15], program.log()
    assert run(site.mlq, functions=["awaits"]) == 7, program.log()
    program.send(signal.SIGTERM)
    assert program.ends() == 0, program.log()


def test_a_signal_ends_a_main_program_that_runs_still_too(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        LISTEN
        try:
            print("up")
            time.sleep(60)
        finally:
            print("cleaned up")
    """)
    program.says("up")
    job = post_and_wait(site, 0.5)
    program.send(signal.SIGTERM)
    assert program.ends() == 0, program.log()
    assert "cleaned up" in program.log()
    assert job.result(timeout=0) == "slept"


def test_ctrl_c_ends_an_event_loop_and_then_the_listener(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        import asyncio
        async def main():
            exec('''LISTEN''', {})
            print("up")
            await asyncio.sleep(60)
        asyncio.run(main())
    """)
    program.says("up")
    job = post_and_wait(site, 0.5)
    program.send(signal.SIGINT)
    program.ends()
    assert "KeyboardInterrupt" in program.log()
    assert job.result(timeout=0) == "slept"


def test_a_main_program_may_catch_ctrl_c_as_always(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        LISTEN
        try:
            print("up")
            mlq.job(mlq.post(0.3)).result()
            print("result")
            time.sleep(60)
        except KeyboardInterrupt:
            print("caught")
        print("joined", mlq.join())
    """)
    program.says("result")
    program.send(signal.SIGINT)
    assert program.ends() == 0, program.log()
    assert program.log().split()[-3:] == ["caught", "joined", "True"]


def test_a_second_signal_gives_the_job_back_at_once(site: Site, start: Callable[..., Program]) -> None:
    program = start("LISTEN\nprint('joined', mlq.join())")
    job = post_and_wait(site, 60)
    program.send(signal.SIGTERM)
    threading.Event().wait(0.4)  # a signal that follows at once is the first one's echo
    program.send(signal.SIGTERM)
    # On a machine that is busy the handlers may be gone by then: it ends at once all the same.
    code = program.ends()
    assert code in (0, -signal.SIGTERM), program.log()
    assert code or "joined True" in program.log()
    record = eventually(lambda: (found := job.record).state is State.QUEUED and found)
    assert (record.crashes, record.stalls, record.retries) == (0, 0, 0)


def test_the_job_of_a_listener_that_is_killed_goes_back(site: Site, start: Callable[..., Program]) -> None:
    program = start("LISTEN")
    job = post_and_wait(site, 60)
    program.send(signal.SIGKILL)
    eventually(lambda: job.state is State.QUEUED)
    assert site.mlq.get_job(job.id)["retries"] == 1
    assert site.mlq.get_progress(job.id) == "[queued; not started]"


def test_shutdown_ends_a_process_whose_main_program_has_ended(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        from mlqueue.queue import MLQ
        def main():
            mlq = MLQ()
            mlq.create_listener(lambda msg, utils: mlq.shutdown())
        main()
    """)
    run(site.mlq)
    assert program.ends() == 0, program.log()


def test_a_main_program_that_fails_keeps_its_exit_code(site: Site, start: Callable[..., Program]) -> None:
    # What is registered later runs earlier: before the main thread is held.
    program = start("""
        import threading
        LISTEN
        threading._register_atexit(lambda: print("main has ended"))
        raise SystemExit(3)
    """)
    program.says("main has ended")
    assert run(site.mlq, 0) == "slept"
    program.send(signal.SIGTERM)
    assert program.ends() == 3, program.log()


def test_a_signal_right_after_the_first_job_ends_it_well(site: Site, start: Callable[..., Program]) -> None:
    """The main program may still be starting the listener then: the handler is there before the worker is."""
    job = site.mlq.job(site.mlq.post(0))
    for _ in range(5):
        program = start("LISTEN\nmlq.join()")
        assert job.result(timeout=15) == "slept"
        program.send(signal.SIGTERM)
        assert program.ends() == 0, program.log()
        job = site.mlq.job(site.mlq.post(0))


def test_handlers_of_the_users_stay(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        import signal
        signal.signal(signal.SIGTERM, lambda *_: print("mine"))
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        LISTEN
        print("up")
    """)
    program.says("up")
    program.send(signal.SIGINT)
    program.send(signal.SIGTERM)
    program.says("mine")
    assert run(site.mlq, 0) == "slept"


def test_a_listener_of_another_thread_works_and_leaves_signals_alone_until_main_has_ended(
    site: Site, start: Callable[..., Program]
) -> None:
    program = start("""
        import signal, threading
        text = '''LISTEN'''
        thread = threading.Thread(target=exec, args=(text, {}))
        thread.start()
        thread.join()
        print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)
    """)
    program.says("True")
    job = post_and_wait(site, 0.3)
    program.send(signal.SIGTERM)
    assert program.ends() == 0, program.log()
    assert job.result(timeout=0) == "slept"


def test_without_pythons_own_hook_a_thread_keeps_the_process(site: Site, start: Callable[..., Program]) -> None:
    program = start("""
        import concurrent.futures.process, concurrent.futures.thread, threading
        del threading._register_atexit
        LISTEN
    """)
    if not outliving.FORBIDS_THREADS:  # else the process is held before it comes to that
        program.says("End the program with mlq.join()")
    assert run(site.mlq, 0) == "slept"
    program.send(signal.SIGTERM)
    assert program.ends() == 0, program.log()


def test_a_module_that_only_has_listeners_is_one_for_mlqueue_worker(site: Site) -> None:
    (site.folder / "listeners_only.py").write_text(
        f"import asyncio, os\nfrom mlqueue.queue import MLQ\nmlq = MLQ({site.namespace!r})\n"
        "def where(msg, utils): return os.getpid()\n"
        "async def main(): assert mlq.create_listener(where) is True\n"
        "asyncio.run(main())\nmlq.join()\n"
    )
    early = site.mlq.job(site.mlq.post("x", functions=["where"]))
    supervised = site.supervise("listeners_only", processes=2, threads=1)
    pids = supervised.ready_pids()
    assert early.result(timeout=15) in supervised.wait_ready(2)
    assert {run(site.mlq) for _ in range(3)} <= set(pids)
    supervised.stop()
