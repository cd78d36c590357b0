"""Posted functions: who gets them, what is never unpickled, and what becomes of those that cannot be loaded."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from support import StartWorker, eventually, fresh_app
from worker_processes import Site

import mlqueue
from mlqueue import (
    MLQ,
    DeadReason,
    FunctionNotFound,
    InvalidJob,
    JobFailed,
    Settings,
    SignatureInvalid,
    SigningKeyMissing,
    State,
    functions,
    loading,
    sign_function,
)
from mlqueue.functions import PURPOSE, Functions, read_signed
from mlqueue.signing import Keyring
from mlqueue.store.functions import FunctionStore, StoredFunction

KEY, OLD = "the-signing-key-of-these-tests", "the-key-that-was-before-it"


@pytest.fixture
def server(server: Settings) -> Settings:
    """The server of the session, with a signing key."""
    return dataclasses.replace(server, signing_key=KEY)


@pytest.fixture
def other(mlq: MLQ) -> Iterator[MLQ]:
    """Another app of the same namespace, as another process has it."""
    app = MLQ(mlq.name, settings=mlq.settings)
    yield app
    app.close()


def run(app: MLQ, msg: Any = None, **options: Any) -> Any:
    """Posts a message; what its job gives."""
    return app.job(app.post(msg, **options)).result(timeout=15)


def doubled(msg: Any, utils: Any) -> Any:
    return 2 * msg


def known(app: MLQ, name: str, workers: int = 1) -> None:
    """Waits until so many workers have said that they have a function."""
    eventually(lambda: sum(name in worker.info.get("functions", ()) for worker in app.store.workers()) == workers)


# Who gets them


def test_a_function_reaches_workers_that_were_there_before_and_those_that_come_later(
    mlq: MLQ, other: MLQ, start_worker: StartWorker
) -> None:
    before = start_worker()
    posted = mlq.register_function(lambda msg, utils: msg + 1, "plus")
    assert (posted.name, posted.error) == ("plus", None)
    known(mlq, "plus")
    assert run(mlq, 41, functions=["plus"]) == 42
    assert run(mlq, 1) == 2
    before.stop(timeout=10_000)
    start_worker(other)
    assert run(mlq, 5, functions=["plus"]) == 6


def test_it_reaches_real_workers_of_several_processes_and_one_that_is_started_anew(
    tmp_path: Path, server: Settings
) -> None:
    site = Site(tmp_path, server, signing_key=KEY)
    try:
        supervised = site.supervise(processes=2, threads=1)
        # The workers do not have this module: what is of it is sent with its code.
        cloudpickle.register_pickle_by_value(sys.modules[__name__])
        try:
            site.mlq.register_function(says_its_process)
        finally:
            cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
        known(site.mlq, "says_its_process", 2)
        pid = run(site.mlq, functions=["says_its_process"])
        assert pid in supervised.ready_pids()
        os.kill(pid, 9)
        supervised.wait_ready(3)
        known(site.mlq, "says_its_process", 2)
        assert site.mlq.remove_function("says_its_process")
        known(site.mlq, "says_its_process", 0)
        supervised.stop()
    finally:
        site.close()


def says_its_process(msg: Any, utils: Any) -> int:
    import os

    return os.getpid()


def test_the_bell_tells_and_nobody_waits_for_the_next_look(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(dataclasses.replace(server, lease=3600.0)) as app:
        worker = start_worker(app)
        eventually(lambda: app.broker.pump is not None and loaded_by(app).ready)
        begun = time.monotonic()
        app.register_function(doubled)
        assert run(app, 4, functions=["doubled"]) == 8
        assert time.monotonic() - begun < 5
        worker.stop(timeout=10_000)


def loaded_by(app: MLQ) -> loading.LoadedFunctions:
    return app._listeners._posted


def test_a_bell_that_was_missed_is_made_up_for(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(dataclasses.replace(server, lease=0.9)) as app:
        worker = start_worker(app, helper=True)
        assert app.broker.pump is not None
        app.broker.pump.on_functions = None
        app.register_function(doubled)
        assert run(app, 4, functions=["doubled"]) == 8
        worker.stop(timeout=10_000)


def test_own_functions_run_first_then_posted_ones_in_the_order_of_their_posting(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    ran: list[str] = []
    mlq.register_function(lambda msg, utils: "b", "b")
    mlq.register_function(lambda msg, utils: "a", "a")
    mlq.register_function(lambda msg, utils: "new b", "b")  # keeps its place

    def own(msg: Any, utils: Any) -> str:
        ran.append("own")
        return "own"

    mlq._listeners.add(own)
    start_worker()
    assert run(mlq) == "a"
    assert ran == ["own"]
    assert run(mlq, functions=["a", "b"]) == "new b"
    assert mlq.broker.functions == ("own", "b", "a")
    assert [one.name for one in mlq.functions()] == ["b", "a"]


def test_a_function_of_the_program_goes_before_a_posted_one_of_its_name(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.register_function(lambda msg, utils: "posted", "doubled")
    mlq._listeners.add(doubled)
    start_worker()
    assert [run(mlq, 2), run(mlq, 2, functions=["doubled"])] == [4, 4]


def test_posting_again_replaces_and_removing_takes_away(mlq: MLQ, start_worker: StartWorker) -> None:
    start_worker()
    for factor in (2, 3):
        mlq.register_function(lambda msg, utils, factor=factor: factor * msg, "times")
        eventually(lambda factor=factor: run(mlq, 5, functions=["times"]) == 5 * factor)
    assert mlq.remove_function("times")
    assert not mlq.remove_function("times")
    assert mlq.functions() == []
    eventually(lambda: mlq.broker.functions == ())
    job = mlq.job(mlq.post(5, functions=["times"]))
    mlq.register_function(doubled, "times")
    assert job.result(15) == 10


def test_a_job_does_not_run_what_was_replaced_or_removed_before_it_was_posted(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    go_on = threading.Event()
    unpickle = loading._unpickle
    start_worker()
    mlq.register_function(lambda msg, utils: "old", "f")
    assert run(mlq, functions=["f"]) == "old"

    def slowly(item: StoredFunction) -> Any:
        assert go_on.wait(10)
        return unpickle(item)

    monkeypatch.setattr(loading, "_unpickle", slowly)  # as when it imports much
    mlq.register_function(lambda msg, utils: "new", "f")
    jobs = [mlq.job(mlq.post(1, functions=["f"])), mlq.job(mlq.post(1))]
    eventually(lambda: any(job.state is not State.QUEUED for job in jobs))
    assert not any(job.done for job in jobs)
    go_on.set()
    assert [job.result(15) for job in jobs] == ["new", "new"]
    for turn in range(10):
        mlq.remove_function("f")
        removed = mlq.job(mlq.post(1, functions=["f"]))
        mlq.register_function(lambda msg, utils, turn=turn: turn, "f")
        assert removed.result(15) == turn


def test_no_job_is_taken_before_the_posted_functions_are_there(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job for all functions must not miss the posted ones because its worker has just begun."""
    import threading

    go_on = threading.Event()
    unpickle = loading._unpickle

    def slowly(item: StoredFunction) -> Any:
        assert go_on.wait(10)
        return unpickle(item)

    monkeypatch.setattr(loading, "_unpickle", slowly)
    mlq.register_function(lambda msg, utils: "posted", "posted")
    mlq._listeners.add(lambda msg, utils: "own")
    mlq.actor(lambda: "actor", actor_name="work")
    start_worker()
    job = mlq.job(mlq.post(1))
    assert mlq.submit("work").result(15) == "actor"  # which has nothing to wait for
    assert not job.done
    go_on.set()
    assert job.result(15) == "posted"


def test_a_worker_without_the_key_takes_none(server: Settings, start_worker: StartWorker, canary: Canary) -> None:
    with fresh_app(server) as app:
        app.register_function(doubled)
        keyless = MLQ(app.name, settings=dataclasses.replace(server, signing_key=None))
        keyless.actor(lambda: 1, actor_name="work")
        worker = start_worker(keyless)
        job = app.job(app.post(4, functions=["doubled"]))
        assert app.submit("work").result(15) == 1
        assert not job.done
        with pytest.raises(SigningKeyMissing, match="MLQUEUE_SIGNING_KEY"):
            keyless.register_function(doubled)
        worker.stop(timeout=10_000)
        keyless.close()


# What is never unpickled


class Canary:
    """Code whose unpickling makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.code: bytes = cloudpickle.dumps(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    @property
    def sang(self) -> bool:
        """Whether it was unpickled."""
        return self.path.exists()


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "sang")


def signed(
    app: MLQ, code: bytes, *, name: str = "bird", serial: int = 0, key: str = KEY, namespace: str = ""
) -> StoredFunction:
    ring = Keyring(Settings(signing_key=key).signing_keys, PURPOSE)
    return functions._signed(ring, namespace or app.name, name, serial or functions._now(), code)


def put(app: MLQ, item: StoredFunction) -> None:
    """Straight into the store, as who can write to it may."""
    assert FunctionStore(app.store).put(item, uuid.uuid4().hex) == 0


def test_the_canary_sings_when_it_is_signed(mlq: MLQ, start_worker: StartWorker, canary: Canary) -> None:
    """Else the tests below would show nothing."""
    start_worker()
    put(mlq, signed(mlq, canary.code))
    eventually(lambda: canary.sang)


def unsigned(app: MLQ, canary: Canary) -> StoredFunction:
    return signed(app, canary.code)._replace(signature=b"")


def with_other_code(app: MLQ, canary: Canary) -> StoredFunction:
    return signed(app, cloudpickle.dumps(doubled))._replace(code=canary.code)


def under_another_name(app: MLQ, canary: Canary) -> StoredFunction:
    return signed(app, canary.code, name="other")._replace(name="bird")


def with_another_serial(app: MLQ, canary: Canary) -> StoredFunction:
    item = signed(app, canary.code)
    return item._replace(serial=item.serial + 1)


def with_another_time(app: MLQ, canary: Canary) -> StoredFunction:
    item = signed(app, canary.code)
    return item._replace(time=item.time + 1)


def for_another_namespace(app: MLQ, canary: Canary) -> StoredFunction:
    return signed(app, canary.code, namespace="elsewhere")


def by_another_key(app: MLQ, canary: Canary) -> StoredFunction:
    return signed(app, canary.code, key=OLD)


def for_another_purpose(app: MLQ, canary: Canary) -> StoredFunction:
    item = signed(app, canary.code)
    ring = Keyring((KEY,), "data source")
    return item._replace(signature=ring.sign(*functions._parts(app.name, item)))


FORGED = [
    unsigned,
    with_other_code,
    under_another_name,
    with_another_serial,
    with_another_time,
    for_another_namespace,
    by_another_key,
    for_another_purpose,
]


@pytest.mark.parametrize("forge", FORGED)
def test_what_is_forged_in_the_store_is_an_error_on_its_record_and_is_never_unpickled(
    mlq: MLQ, other: MLQ, start_worker: StartWorker, canary: Canary, forge: Callable[[MLQ, Canary], StoredFunction]
) -> None:
    before = start_worker()
    eventually(lambda: loaded_by(mlq).ready)
    put(mlq, forge(mlq, canary))
    eventually(lambda: mlq.functions()[0].error)
    assert "signature" in str(mlq.functions()[0].error)
    with pytest.raises(JobFailed, match="'bird' could not be loaded by this worker"):
        run(mlq, functions=["bird"])
    mlq.actor(lambda: "alive", actor_name="work")
    assert mlq.submit("work").result(15) == "alive"
    before.stop(timeout=10_000)
    start_worker(other)
    with pytest.raises(JobFailed, match="signature"):
        run(mlq, functions=["bird"])
    assert not canary.sang


@pytest.mark.parametrize("forge", FORGED)
def test_what_is_forged_is_not_taken_over_the_door(
    mlq: MLQ, canary: Canary, forge: Callable[[MLQ, Canary], StoredFunction]
) -> None:
    with pytest.raises(SignatureInvalid):
        Functions(mlq.store).take(*forge(mlq, canary))
    assert mlq.functions() == []


@pytest.mark.parametrize("away", [-301, 301])
def test_what_was_signed_long_ago_or_is_of_the_future_is_not_taken(
    mlq: MLQ, canary: Canary, away: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    then = time.time() + away
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: then)
        item = signed(mlq, canary.code)
    with pytest.raises(SignatureInvalid, match="300 s are allowed"):
        Functions(mlq.store).take(*item)


def test_at_rest_signature_and_serial_count_and_not_age(
    mlq: MLQ, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        then = time.time() - 10**7
        patch.setattr(time, "time", lambda: then)
        item = signed(mlq, cloudpickle.dumps(lambda msg, utils: "old and good"))
    put(mlq, item)
    start_worker()
    assert run(mlq, functions=["bird"]) == "old and good"


def test_what_was_taken_once_is_not_taken_again_nor_what_was_signed_before_it(mlq: MLQ) -> None:
    taken = Functions(mlq.store)
    first, second = signed(mlq, b"1"), signed(mlq, b"2")
    taken.take(*second)
    for item in (second, first):
        with pytest.raises(SignatureInvalid, match="has been posted or removed"):
            taken.take(*item)
    taken.remove("bird")
    for item in (second, first):
        with pytest.raises(SignatureInvalid, match="has been posted or removed"):
            taken.take(*item)
    with pytest.raises(FunctionNotFound):
        taken.remove("bird")
    taken.take(*signed(mlq, b"3", serial=functions._now() + 10**6))


def test_a_removal_also_ends_what_was_signed_and_not_yet_sent(mlq: MLQ) -> None:
    put(mlq, signed(mlq, b"1"))
    kept_back = signed(mlq, b"2")  # after it, so that it could take its place
    assert kept_back.serial > mlq.functions()[0].serial
    eventually(lambda: functions._now() > kept_back.serial + 50_000)
    mlq.remove_function("bird")
    with pytest.raises(SignatureInvalid):
        Functions(mlq.store).take(*kept_back)


def put_back(app: MLQ, name: str, data: bytes) -> None:
    """Old bytes put back by somebody who can write to the store, and workers that are told of it."""
    app.client.hset(f"{app.store.root}:pf", name, data)
    app.client.incr(f"{app.store.root}:pfv")


@pytest.mark.parametrize("end", ["replaced", "removed"])
def test_what_was_replaced_or_removed_is_not_unpickled_when_it_is_put_back(
    server: Settings, start_worker: StartWorker, canary: Canary, end: str
) -> None:
    with fresh_app(dataclasses.replace(server, lease=0.9)) as app:
        worker = start_worker(app, helper=True)
        put(app, signed(app, canary.code))
        eventually(lambda: canary.sang)
        data = app.client.hget(f"{app.store.root}:pf", "bird")
        if end == "replaced":
            app.register_function(doubled, "bird")
        else:
            app.remove_function("bird")
        eventually(lambda: loaded_by(app)._version == FunctionStore(app.store).version())
        canary.path.rmdir()
        # With the count of serials as it is, and turned back, too: a worker remembers what it has seen.
        put_back(app, "bird", data)
        eventually(lambda: loaded_by(app)._version == FunctionStore(app.store).version())
        app.client.hset(f"{app.store.root}:pfs", "bird", 1)
        app.client.incr(f"{app.store.root}:pfv")
        eventually(lambda: loaded_by(app)._version == FunctionStore(app.store).version())
        assert not canary.sang
        worker.stop(timeout=10_000)


def test_a_worker_that_comes_later_refuses_what_is_older_than_the_serial_that_is_kept(
    mlq: MLQ, start_worker: StartWorker, canary: Canary
) -> None:
    put(mlq, signed(mlq, canary.code))
    data = mlq.client.hget(f"{mlq.store.root}:pf", "bird")
    mlq.remove_function("bird")
    put_back(mlq, "bird", data)
    start_worker()
    eventually(lambda: mlq.functions()[0].error)
    assert "put an old one back" in str(mlq.functions()[0].error)
    assert not canary.sang


def test_what_is_no_function_at_all_in_the_store_harms_nobody(mlq: MLQ, start_worker: StartWorker) -> None:
    mlq.client.hset(f"{mlq.store.root}:pf", "bird", b"\xc1garbage")
    mlq.client.incr(f"{mlq.store.root}:pfv")
    mlq.register_function(doubled)
    start_worker()
    assert run(mlq, 2, functions=["doubled"]) == 4
    assert [one.name for one in mlq.functions()] == ["doubled"]


def test_keys_are_changed_without_a_gap(server: Settings, start_worker: StartWorker) -> None:
    with fresh_app(dataclasses.replace(server, signing_key=OLD)) as app:
        app.register_function(doubled)
        changed = MLQ(app.name, settings=dataclasses.replace(server, signing_key=f"{KEY},{OLD}"))
        worker = start_worker(changed)
        assert run(app, 2, functions=["doubled"]) == 4
        app.register_function(lambda msg, utils: -msg, "negative")
        assert run(app, 2, functions=["negative"]) == -2
        worker.stop(timeout=10_000)
        changed.close()


# What cannot be loaded


class Exits:
    def __reduce__(self) -> tuple[Any, ...]:
        return sys.exit, (3,)


class NeedsModule:
    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("a_module_that_is_not_here",)


def needs_three(a: Any, b: Any, c: Any) -> None: ...


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (cloudpickle.dumps(Exits()), "SystemExit: 3"),
        (cloudpickle.dumps(NeedsModule()), "ModuleNotFoundError: No module named 'a_module_that_is_not_here'"),
        (cloudpickle.dumps(needs_three), "cannot be called with the message and a dict"),
        (cloudpickle.dumps(5), "it must be a function"),
        (b"no pickle", "UnpicklingError"),
    ],
    ids=["exits", "module", "signature", "number", "bytes"],
)
def test_what_cannot_be_loaded_fails_the_jobs_that_name_it_and_no_others(
    mlq: MLQ, start_worker: StartWorker, code: bytes, error: str
) -> None:
    put(mlq, signed(mlq, code))
    mlq.register_function(doubled)
    start_worker()
    with pytest.raises(JobFailed, match="'bird' could not be loaded by this worker") as caught:
        run(mlq, 1, functions=["bird"])
    assert error in str(caught.value)
    assert caught.value.reason == DeadReason.FAILED
    assert run(mlq, 2) == 4
    bad, good = mlq.functions()
    assert error in str(bad.error)
    assert (good.name, good.error) == ("doubled", None)
    mlq.register_function(lambda msg, utils: "mended", "bird")
    assert mlq.functions()[0].error is None
    eventually(lambda: loaded_by(mlq).usable().keys() == {"bird", "doubled"})
    assert run(mlq, 1, functions=["bird"]) == "mended"


def test_with_nothing_but_functions_that_cannot_be_loaded_jobs_for_all_wait(
    mlq: MLQ, start_worker: StartWorker
) -> None:
    put(mlq, signed(mlq, b"no pickle"))
    start_worker()
    job = mlq.job(mlq.post(1))
    with pytest.raises(JobFailed):
        run(mlq, 1, functions=["bird"])
    assert (job.done, job.record.attempt) == (False, 0)
    assert "waits for a worker that has listener functions; none of queue default does." in str(job.why())


# What may be posted


@pytest.mark.parametrize(
    ("function", "name", "text"),
    [
        (needs_three, None, "cannot be called"),
        (5, None, "it must be a function"),
        (lambda msg, utils: None, None, "Give one"),
        (doubled, "", "1 to 200 characters"),
        (doubled, "x" * 201, "1 to 200 characters"),
        (doubled, "a\nb", "1 to 200 characters"),
    ],
)
def test_what_cannot_be_posted_is_refused_at_once(mlq: MLQ, function: Any, name: str | None, text: str) -> None:
    for post in (mlq.register_function, lambda fn, name: sign_function(fn, KEY, name=name)):
        with pytest.raises(InvalidJob, match=text):
            post(function, name)  # type: ignore[operator]


def test_what_refers_to_something_that_cannot_be_sent_says_so(mlq: MLQ) -> None:
    import threading

    lock = threading.Lock()

    def guarded(msg: Any, utils: Any) -> None:
        with lock:
            return

    with pytest.raises(InvalidJob, match="Make or open that within the function"):
        mlq.register_function(guarded)


def test_code_has_a_bound(server: Settings) -> None:
    with fresh_app(dataclasses.replace(server, max_message_bytes=2048)) as app:
        big = os.urandom(4096)
        with pytest.raises(InvalidJob, match="2,048 are allowed"):
            app.register_function(lambda msg, utils: big, "big")


def test_sign_function_gives_json_with_name_code_time_and_signature(mlq: MLQ, start_worker: StartWorker) -> None:
    text = sign_function(doubled, f"{KEY},{OLD}", namespace=mlq.name)
    given = json.loads(text)
    assert set(given) == {"name", "serial", "time", "code", "signature"}
    assert len(base64.b64decode(given["signature"])) == 32
    item = read_signed(text)
    Functions(mlq.store).take(item["name"], item["serial"], item["time"], item["code"], item["signature"])
    start_worker()
    assert run(mlq, 3, functions=["doubled"]) == 6


def test_the_store_takes_a_function_that_is_sent_twice_because_an_answer_was_lost(mlq: MLQ) -> None:
    kept, item = FunctionStore(mlq.store), signed(mlq, b"1")
    assert [kept.put(item, "nonce"), kept.put(item, "nonce"), kept.put(item, "other")] == [0, 0, item.serial]


def test_there_is_a_most_of_functions(mlq: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["mlqueue.store.functions"], "MOST", 2)
    for name in ("a", "b"):
        mlq.register_function(doubled, name)
    with pytest.raises(mlqueue.StoreFull, match="functions remove"):
        mlq.register_function(doubled, "c")
    mlq.register_function(doubled, "b")
    mlq.remove_function("a")
    mlq.register_function(doubled, "c")
