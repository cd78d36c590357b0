"""From one store to another: everything arrives, once, whoever is killed on the way, while both are in use."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from faults.servers import OwnServer
from support import eventually, fresh_app

import mlqueue
from mlqueue import MLQ, InvalidTransition, JobNotFound, Settings, SettingsError, State, codec
from mlqueue.job import NewJob
from mlqueue.migration import Migration
from mlqueue.store.chunks import CHUNK
from mlqueue.testing import drain

LARGE = b"0123456789" * (CHUNK // 10) * 2


@pytest.fixture(scope="module")
def other_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    with contextlib.closing(OwnServer(tmp_path_factory.mktemp("target"), appendfsync="no").start()) as server:
        yield server


@pytest.fixture
def target(mlq: MLQ, other_server: OwnServer) -> Iterator[MLQ]:
    """The same namespace in another store."""
    before = dramatiq.broker.global_broker
    app = MLQ(mlq.name, settings=Settings.load({}, url=other_server.url))
    yield app
    dramatiq.broker.global_broker = before
    for key in app.client.scan_iter(f"{app.store.root}:*", count=1000):
        app.client.unlink(key)
    app.close()


def declare(app: MLQ) -> dict[str, Any]:
    @app.actor(actor_name="double", max_retries=0)
    def double(value: int) -> int:
        return 2 * value

    @app.actor(actor_name="size_of", max_retries=0)
    def size_of(data: bytes) -> int:
        return len(data)

    @app.actor(actor_name="echo", max_retries=0)
    def echo(data: bytes) -> bytes:
        return data

    @app.actor(actor_name="fails", max_retries=0)
    def fails() -> None:
        raise ValueError("no")

    @app.actor(actor_name="resumes", max_retries=1, min_backoff=3_600_000, max_backoff=3_600_000)
    def resumes() -> bytes | None:
        job = mlqueue.current_job()
        if job.attempt == 1:
            job.save_checkpoint(LARGE)
            raise ValueError("later")
        return bytes(job.load_checkpoint()[:10])

    return {actor.actor_name: actor for actor in (double, size_of, echo, fails, resumes)}


@contextlib.contextmanager
def worker_of(app: MLQ, threads: int = 2) -> Iterator[dramatiq.Worker]:
    app.broker.supervise(uuid.uuid4().hex)
    worker = dramatiq.Worker(app.broker, worker_threads=threads)
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(timeout=10_000)


def keys_of(app: MLQ, pattern: str = "*") -> list[str]:
    root = app.store.root
    return sorted(
        key.decode().removeprefix(f"{root}:") for key in app.client.scan_iter(f"{root}:{pattern}", count=1000)
    )


def migrate(source: MLQ, target: MLQ, **options: Any) -> Any:
    return Migration(source.store, target.store).run(**options)


class TestWhatArrives:
    def test_jobs_of_every_state_with_all_that_belongs_to_them(self, mlq: MLQ, target: MLQ) -> None:
        actors = declare(mlq)
        done = actors["echo"].with_options(tags=["a", "b"]).submit(LARGE)
        small = actors["double"].submit(4)
        dead = actors["fails"].submit()
        waits = actors["resumes"].submit()
        run_until_retry(mlq)
        queued = actors["size_of"].submit(LARGE)
        later = actors["double"].with_options(delay=3600, priority=3).submit(7)
        cancelled = actors["double"].submit(1)
        cancelled.cancel()
        jobs = (done, small, dead, waits, queued, later, cancelled)
        before = {job.id: record_of(mlq, job.id) for job in jobs}

        moved = migrate(mlq, target)

        assert moved.jobs == {
            State.SUCCEEDED: 2,
            State.DEAD: 1,
            State.SCHEDULED: 2,
            State.QUEUED: 1,
            State.CANCELLED: 1,
        }
        assert {job.id: record_of(target, job.id) for job in jobs} == before
        assert target.job(done.id).result(timeout=1) == LARGE
        assert target.job(small.id).result(timeout=1) == 8
        assert [record.id for record in target.store.scan(tag="b")] == [done.id]
        assert [letter.id for letter in target.dead_letters] == [dead.id]
        assert target.dead_letters.show(dead.id).error.message == "no"
        declare(target)
        drain(target)
        results = [target.job(job.id).result(timeout=1) for job in (queued, later, waits)]
        assert results == [len(LARGE), 14, LARGE[:10]]
        with pytest.raises(JobNotFound):
            _ = mlq.job(done.id).state

    def test_nothing_of_them_stays(self, mlq: MLQ, target: MLQ) -> None:
        actors = declare(mlq)
        actors["echo"].submit(LARGE)
        actors["resumes"].submit()
        run_until_retry(mlq)
        actors["size_of"].submit(LARGE)
        mlq.data.put(LARGE, "big")
        migrate(mlq, target)
        assert [key for key in keys_of(mlq) if not key.startswith(("seq", "m", "shelves", "w", "bell", "sweep"))] == [
            "actors"
        ]
        # Nor a trace at the other end, but of what is there.
        assert keys_of(target, "mig*") == []
        assert {target.client.ttl(f"{target.store.root}:{key}") for key in keys_of(target, "x:*")} == {-1}

    def test_results_expire_when_they_would_have(self, mlq: MLQ, target: MLQ) -> None:
        actors = declare(mlq)
        job = actors["double"].with_options(result_ttl=3600).submit(1)
        drain(mlq)
        due = mlq.client.zscore(f"{mlq.store.root}:exp", job.id)
        migrate(mlq, target)
        assert target.client.zscore(f"{target.store.root}:exp", job.id) == due

    def test_jobs_keep_their_order_over_lanes_and_priorities(self, mlq: MLQ, target: MLQ) -> None:
        jobs = [
            NewJob(
                id=f"j{n}", queue="default", actor=("a", "b", "c")[n % 3], body=b"\x92\x90\x80", priority=(n % 4) - 2
            )
            for n in range(250)
        ]
        mlq.store.submit(jobs)
        positions = {job.id: mlq.store.record(job.id).position for job in jobs}
        migrate(mlq, target)
        assert {job.id: target.store.record(job.id).position for job in jobs} == positions

    def test_data_and_idempotency_keys_and_api_keys(self, mlq: MLQ, target: MLQ) -> None:
        actors = declare(mlq)
        mlq.data.put(LARGE, "large")
        mlq.data.put("short", "for a while", expiry=600)
        target.data.put("newer", "in both")
        mlq.data.put("older", "in both")
        ids = mlq.broker.enqueue_once([(actors["double"].message(3), None)], "once", b"print", 600).ids
        mlq.client.hset(f"{mlq.store.root}:keys", "k1", "secret")
        migrate(mlq, target)
        assert (target.data.get("large"), target.data.get("in both")) == (LARGE, b"newer")
        assert 500 < target.client.ttl(f"{target.store.root}:data:for%20a%20while") <= 600
        declare(target)
        again = target.broker.enqueue_once(
            [(target.broker.get_actor("double").message(3), None)], "once", b"print", 600
        )
        assert (ids, False) == (again.ids, again.new)
        assert target.client.hget(f"{target.store.root}:keys", "k1") == b"secret"

    def test_unique_keys_turns_limits_and_queue_timeouts(self, mlq: MLQ, target: MLQ) -> None:
        actor = declare(mlq)["double"]
        first = actor.with_options(unique_key="k", queue_timeout=600).submit(1)
        ended = actor.with_options(unique_key="j", unique_for=600).submit(2)
        drain(mlq)
        turns = [actor.with_options(fair_by=user).submit(n) for n, user in enumerate("aab")]
        only = actor.with_options(unique_key="k", queue_timeout=600, delay=300).submit(3)
        hurried = actor.with_options(queue_timeout=600).submit(4)
        mlq.limits.set("gpu", 3)
        migrate(mlq, target)
        assert keys_of(mlq, "uk:*") == keys_of(mlq, "fair:[gt]:*") == keys_of(mlq, "qt") == []
        assert {job.decode() for job in target.client.zrange(f"{target.store.root}:qt", 0, -1)} == {only.id, hurried.id}
        assert {limit.name: limit.capacity for limit in target.limits.list()} == {"gpu": 3}
        there = declare(target)["double"]
        assert there.with_options(unique_key="k").submit(5).id == only.id != first.id
        assert there.with_options(unique_key="j", unique_for=600).submit(5).id == ended.id
        drain(target)
        assert [target.job(job.id).result(timeout=1) for job in (*turns, only, hurried)] == [0, 2, 4, 6, 8]
        assert keys_of(target, "qt") == []

    def test_another_namespace_in_the_same_store(self, mlq: MLQ, server: Settings) -> None:
        job = declare(mlq)["size_of"].submit(LARGE)
        with fresh_app(server) as renamed:
            migrate(mlq, renamed)
            declare(renamed)
            drain(renamed)
            assert renamed.job(job.id).result(timeout=1) == len(LARGE)

    def test_jobs_whose_id_is_taken_stay(self, mlq: MLQ, target: MLQ) -> None:
        for app in (mlq, target):
            declare(app)["size_of"].with_options(job_id="order").submit(LARGE if app is mlq else b"")
        moved = migrate(mlq, target)
        assert moved.kept == {"order"}
        for app in (mlq, target):
            drain(app)
        assert (mlq.job("order").result(timeout=1), target.job("order").result(timeout=1)) == (len(LARGE), 0)
        assert keys_of(mlq, "mig*") == ["mig:id"]


def run_until_retry(app: MLQ) -> None:
    """Runs what waits; the one that fails waits for its backoff then."""
    with worker_of(app):
        eventually(lambda: count(app, "resumes", State.SCHEDULED) == 1)
        eventually(lambda: not any(one.state in (State.QUEUED, State.RUNNING) for one in app.store.counts()))


def record_of(app: MLQ, job_id: str) -> dict[str, Any]:
    fields = app.store.record(job_id).asdict()
    return {name: value for name, value in fields.items() if name != "position"}


class TestWhileBothAreInUse:
    def test_running_jobs_are_waited_for_and_so_are_those_that_they_wait_for(self, mlq: MLQ, target: MLQ) -> None:
        begun, go_on = threading.Event(), threading.Event()

        @mlq.actor(max_retries=0)
        def parent() -> int:
            begun.set()
            assert go_on.wait(20)
            return child.submit().result(timeout=20) + 1

        @mlq.actor(max_retries=0)
        def child() -> int:
            return 41

        with worker_of(mlq):
            job = parent.submit()
            assert begun.wait(10)
            migration = threading.Thread(target=migrate, args=(mlq, target))
            migration.start()
            go_on.set()
            migration.join(20)
        assert not migration.is_alive()
        assert target.job(job.id).result(timeout=1) == 42
        assert len(list(target.store.scan())) == 2

    def test_a_group_whose_children_end_on_both_sides_completes_once(self, mlq: MLQ, target: MLQ) -> None:
        begun, go_on, completed = threading.Event(), threading.Event(), []
        for app in (mlq, target):
            groups_of(app, begun, go_on, completed)
        here = mlq.broker
        group = dramatiq.group(
            [here.get_actor("slow").message(), *[here.get_actor("quick").message() for _ in range(3)]], broker=here
        )
        group.add_completion_callback(here.get_actor("complete").message())
        with worker_of(mlq, threads=1):
            group.run()
            assert begun.wait(10)
            migration = threading.Thread(target=migrate, args=(mlq, target))
            migration.start()
            # The quick ones have gone; they end there, and the slow one here.
            with worker_of(target):
                eventually(lambda: count(target, "quick", State.SUCCEEDED) == 3)
                go_on.set()
                migration.join(20)
                assert not migration.is_alive()
                eventually(lambda: completed)
                eventually(lambda: count(target, "complete", State.SUCCEEDED) == 1)
        assert completed == [1]

    def test_whoever_waits_is_told_that_the_job_is_gone(self, mlq: MLQ, target: MLQ) -> None:
        job = declare(mlq)["double"].submit(1)
        errors: list[Exception] = []

        def wait() -> None:
            try:
                job.result(timeout=20)
            except Exception as error:
                errors.append(error)

        waiter = threading.Thread(target=wait)
        waiter.start()
        eventually(lambda: mlq.client.hexists(f"{mlq.store.root}:j:{job.id}", "W"))
        migrate(mlq, target)
        waiter.join(10)
        assert isinstance(errors[0], JobNotFound)

    def test_a_callback_that_waits_goes_with_its_job(self, mlq: MLQ, target: MLQ) -> None:
        job = declare(mlq)["double"].with_options(callback="https://example.com/done").submit(1)
        job.cancel()
        assert migrate(mlq, target).callbacks == 1
        for app, waiting in ((mlq, 0), (target, 1)):
            assert app.client.zcard(f"{app.store.root}:s:q:mlqueue.callbacks:mlqueue.callback") == waiting
        assert target.job(job.id).record.callback_state == "pending"


def groups_of(app: MLQ, begun: threading.Event, go_on: threading.Event, completed: list[int]) -> None:
    @app.actor(actor_name="slow", max_retries=0)
    def slow() -> None:
        begun.set()
        assert go_on.wait(20)

    @app.actor(actor_name="quick", max_retries=0)
    def quick() -> None: ...

    @app.actor(actor_name="complete", max_retries=0)
    def complete() -> None:
        completed.append(1)


def count(app: MLQ, actor: str, state: State) -> int:
    return sum(one.number for one in app.store.counts() if (one.actor, one.state) == (actor, state))


class TestWhoMigrates:
    def test_does_so_alone(self, mlq: MLQ, target: MLQ, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("mlqueue.migration.LOCK", 0.2)
        mlq.client.set(f"{mlq.store.root}:mig:own", "somebody")
        with pytest.raises(InvalidTransition, match="somebody else migrates"):
            migrate(mlq, target)

    def test_cannot_move_a_store_to_itself(self, mlq: MLQ) -> None:
        with pytest.raises(SettingsError, match="the two stores are one"):
            migrate(mlq, mlq)

    @pytest.mark.parametrize("after", ["out", "chunks", "in", "done"])
    def test_and_is_stopped_anywhere_goes_on_where_he_was(
        self, mlq: MLQ, target: MLQ, monkeypatch: pytest.MonkeyPatch, after: str
    ) -> None:
        actors = declare(mlq)
        jobs = [actors["size_of"].submit(LARGE), *[actors["double"].submit(n) for n in range(3)]]
        broken = Breaking(mlq.store, target.store, after)
        with pytest.raises(RuntimeError):
            broken.run()
        declare(target)
        drain(target)  # what has arrived may run, and be forgotten, before the rest comes
        target.store.clear()
        gone = {job.id for job in jobs if job.id not in {record.id for record in mlq.store.scan()}}
        done = after in ("in", "done")
        migrate(mlq, target)
        drain(target)
        left = {record.id for record in target.store.scan()}
        assert left == ({job.id for job in jobs} - gone if done else {job.id for job in jobs})
        assert keys_of(target, "mig*") == []

    def test_may_be_killed(self, mlq: MLQ, target: MLQ, server: Settings, tmp_path: Path) -> None:
        jobs = [
            NewJob(id=f"j{n}", queue="default", actor="notes", body=codec.encode_call([n], {}), tags=("t",))
            for n in range(1200)
        ]
        mlq.store.submit(jobs)
        ran: list[int] = []
        target.actor(ran.append, actor_name="notes")
        with worker_of(target):
            command = [sys.executable, "-m", "mlqueue", "migrate", "--namespace", mlq.name]
            command += ["--url", str(mlq.settings.url), "--to", str(target.settings.url)]
            for kills in range(1, 3):
                with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
                    try:
                        eventually(lambda least=400 * kills - 300: ended(target) > least, 30)
                    finally:
                        process.send_signal(signal.SIGKILL)
                mlq.client.delete(f"{mlq.store.root}:mig:own")  # it would expire
            last = subprocess.run(command, capture_output=True, text=True, timeout=60)
            assert last.returncode == 0, last.stderr
            eventually(lambda: ended(target) == len(jobs))
        assert sorted(ran) == list(range(len(jobs)))
        assert list(mlq.store.scan()) == []


class Breaking(Migration):
    """One who is stopped after a step."""

    def __init__(self, source: Any, target: Any, after: str) -> None:
        super().__init__(source, target)
        self._after = after

    def _run(self, store: Any, name: str, *args: Any) -> Any:
        answer = super()._run(store, name, *args)
        if name == f"migrate_{self._after}":
            raise RuntimeError
        return answer

    def _copy_chunks(self, job_id: str, what: str, number: int) -> None:
        super()._copy_chunks(job_id, what, number)
        if self._after == "chunks":
            raise RuntimeError


def ended(app: MLQ) -> int:
    return sum(one.number for one in app.store.counts() if one.state.ended)
