"""What `mlqueue doctor` sees and `mlqueue repair` mends; what a shell completes; jobs that a worker has no more."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dramatiq
import pytest
from faults.servers import OwnServer
from support import eventually

from mlqueue import MLQ, Settings, State
from mlqueue.doctor import Severity, examine, mend
from mlqueue.store import Connector, Store
from mlqueue.store.chunks import CHUNK
from mlqueue.testing import drain


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    """A server whose configuration the tests change."""
    with contextlib.closing(OwnServer(tmp_path_factory.mktemp("own")).start()) as server:
        yield server


@pytest.fixture
def store(own: OwnServer) -> Iterator[Store]:
    connector = Connector(Settings.load({}, url=own.url))
    yield Store(connector, uuid.uuid4().hex, connector.settings)
    connector.execute("FLUSHDB")
    connector.close()


@contextlib.contextmanager
def config(store: Store, **settings: Any) -> Iterator[None]:
    names = {name.replace("_", "-"): value for name, value in settings.items()}
    before = {name: store.connector.execute("CONFIG", "GET", name)[1] for name in names}
    for name, value in names.items():
        store.connector.execute("CONFIG", "SET", name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            store.connector.execute("CONFIG", "SET", name, value)


def findings(store: Store, check: str) -> list[tuple[Severity, str]]:
    return [(one.severity, one.text) for one in examine(store) if one.check == check]


def severity(store: Store, check: str) -> Severity:
    order = list(Severity)
    return max((one for one, _ in findings(store, check)), key=order.index)


class TestTheDoctor:
    def test_finds_nothing_wrong_with_a_good_server(self, store: Store) -> None:
        assert {one.severity for one in examine(store)} == {Severity.OK}

    def test_sees_that_nothing_reaches_the_disk(self, store: Store) -> None:
        with config(store, appendonly="no"):
            assert findings(store, "persistence") == [
                (Severity.ERROR, "nothing reaches the disk: when the server ends, all jobs are lost")
            ]
            with config(store, save="3600 1"):
                assert severity(store, "persistence") is Severity.WARNING

    def test_sees_that_a_full_server_would_throw_jobs_away(self, store: Store) -> None:
        with config(store, maxmemory_policy="allkeys-lru"):
            assert severity(store, "memory") is Severity.WARNING
            with config(store, maxmemory="1gb"):
                assert severity(store, "memory") is Severity.ERROR

    def test_sees_that_the_server_is_full(self, store: Store) -> None:
        used = store.connector.execute("INFO", "memory").decode().partition("used_memory:")[2].split("\r\n")[0]
        with config(store, maxmemory=int(used) + 100_000):
            assert severity(store, "memory") is Severity.ERROR
        with config(store, maxmemory=1_000_000):
            assert severity(store, "access") is Severity.ERROR

    def test_sees_what_the_user_may_not_do(self, store: Store, own: OwnServer) -> None:
        run = store.connector.execute
        run("ACL", "SETUSER", "poor", "on", ">pass", "~mlq:*", "+@all", "-blpop", "-config", "-info")
        connector = Connector(Settings.load({}, url=own.url.replace("redis://", "redis://poor:pass@")))
        try:
            poor = Store(connector, store.namespace, store.settings)
            [(level, text)] = findings(poor, "access")
            assert (level, "may not wait" in text) == (Severity.ERROR, True)
            assert severity(poor, "persistence") is Severity.WARNING  # INFO is refused
        finally:
            connector.close()

    def test_sees_workers_without_a_sign_of_life_and_jobs_that_nobody_runs(self, store: Store) -> None:
        store.start_worker("gone", {"host": "there", "pid": 7, "queues": ["default"], "actors": ["known"]}, {})
        store.connector.execute("ZADD", f"{store.root}:workers", 1, "gone")
        store.connector.execute("HSET", f"{store.root}:sweep", "last", 1)
        app = MLQ(store.namespace, settings=store.settings)
        try:
            for actor in ("known", "unknown"):
                app.broker.enqueue(dramatiq.Message("default", actor, (), {}, {}))
        finally:
            app.close()
        texts = [text for _, text in findings(store, "workers")]
        assert texts[0] == ("1 gave no sign of life for longer than their lease, and hold 0 jobs: there:7")
        assert texts[1].startswith("nobody has looked after them for ")
        assert texts[2:] == [
            "1 job of unknown waits in queue default; no worker runs it there",
            "0 alive, 0 jobs running, 2 waiting",
        ]

    def test_sees_the_clock_of_the_server(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1_000_000.0
        monkeypatch.setattr("mlqueue.doctor.time.time", lambda: now)
        [(level, text)] = findings(store, "clock")
        assert (level, "ahead of ours" in text) == (Severity.WARNING, True)


class TestRepairing:
    def test_puts_jobs_back_that_nobody_would_find(self, mlq: MLQ) -> None:
        @mlq.actor
        def work(value: int = 0) -> int:
            return value

        jobs = [work.submit(n) for n in range(4)]
        jobs[1].cancel()
        ended = work.submit(9)
        later = work.with_options(delay=3600).submit(5)
        root, run = mlq.store.root, mlq.store.connector.execute
        run("UNLINK", f"{root}:s:q:default:work", f"{root}:s:c:default:work", f"{root}:s:w:default:work")
        # One that runs on a worker that nobody knows.
        run("HSET", f"{root}:j:{ended.id}", "s", "r", "w", "nobody", "k", 1)
        assert severity(mlq.store, "orphans") is Severity.ERROR
        expected = sorted(job.id for job in (*jobs, ended, later))
        assert mend(mlq.store, dry_run=True).put_back == expected
        assert mend(mlq.store).put_back == expected
        assert severity(mlq.store, "orphans") is Severity.OK
        drain(mlq, delayed=False)
        states = [job.state for job in (*jobs, ended, later)]
        done = State.SUCCEEDED
        assert states == [done, State.CANCELLED, done, done, done, State.SCHEDULED]

    def test_removes_keys_that_belong_to_no_job_and_no_others(self, mlq: MLQ) -> None:
        large = b"x" * (CHUNK + 1)

        @mlq.actor(actor_name="work")
        def work(data: bytes) -> bytes:
            return data

        lost, kept = work.submit(large), work.submit(large)
        drain(mlq)
        root, run = mlq.store.root, mlq.store.connector.execute
        mlq.store.stash("somebody", large)  # on its way to a job
        mlq.data.put(large, "data")
        run("UNLINK", f"{root}:j:{lost.id}")
        before = {key.decode() for key in mlq.client.scan_iter(f"{root}:*", count=1000)}
        assert severity(mlq.store, "orphans") is Severity.WARNING
        removed = mend(mlq.store).removed
        assert all(lost.id in key for key in removed)
        assert len(removed) == 5  # its result, and two chunks each of that and of its arguments
        after = {key.decode() for key in mlq.client.scan_iter(f"{root}:*", count=1000)}
        assert {f"{root}:{key}" for key in removed} == before - after
        assert kept.result(timeout=1) == large


def mlqueue(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlqueue", *arguments],
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, **environment},
    )


class TestTheCommands:
    def test_exit_with_a_code_that_says_how_bad_it_is(self, store: Store, own: OwnServer) -> None:
        options = ("--url", own.url, "--namespace", store.namespace)
        good = mlqueue("doctor", *options)
        assert (good.returncode, good.stdout.split()[:2]) == (0, ["server", "ok"])
        with config(store, maxmemory_policy="allkeys-lru"):
            warned = mlqueue("doctor", "--json", *options)
            levels = {one["check"]: one["severity"] for one in map(json.loads, warned.stdout.splitlines())}
            assert warned.returncode == 6
            assert levels["persistence"] == "ok"
        with config(store, appendonly="no"):
            assert mlqueue("doctor", *options).returncode == 7
        nowhere = ("--url", "redis://127.0.0.1:1/0", "--namespace", "x")
        assert mlqueue("doctor", *nowhere, MLQUEUE_COMMAND_TIMEOUT="0.1").returncode == 4

    def test_repair(self, store: Store, own: OwnServer) -> None:
        store.connector.execute("SET", f"{store.root}:b:gone", "x")
        done = mlqueue("repair", "--json", "--url", own.url, "--namespace", store.namespace)
        assert json.loads(done.stdout) == {"removed": ["b:gone"], "put_back": []}


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_prints_what_a_shell_reads(self, shell: str) -> None:
        assert "_MLQUEUE_COMPLETE" in mlqueue("completion", shell).stdout

    def complete(self, words: str, **environment: str) -> list[str]:
        number = str(len(words.split(" ")) - 1)
        done = mlqueue(_MLQUEUE_COMPLETE="bash_complete", COMP_WORDS=words, COMP_CWORD=number, **environment)
        assert done.stderr == ""
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    def test_completes_in_bash(self, tmp_path: Path) -> None:
        command = tmp_path / "mlqueue"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m mlqueue "$@"\n')
        command.chmod(0o755)
        script = """
            eval "$(mlqueue completion bash)"
            COMP_WORDS=(mlqueue dead req) COMP_CWORD=2
            "$(complete -p mlqueue | sed 's/.*-F \\([^ ]*\\).*/\\1/')" mlqueue
            echo "${COMPREPLY[@]}"
        """
        environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "--norc", "-c", script], capture_output=True, text=True, timeout=30, env=environment
        )
        assert (done.stdout, done.stderr) == ("requeue\n", "")

    @pytest.mark.parametrize(
        ("shell", "current", "expected"),
        [
            ("zsh", "2", ["plain", "requeue", "Put dead letters back at the end of their..."]),
            ("fish", "req", ["plain,requeue\tPut dead letters back at the end of their..."]),
        ],
    )
    def test_answers_the_other_shells(self, shell: str, current: str, expected: list[str]) -> None:
        words = "mlqueue dead req" if shell == "zsh" else "mlqueue dead"
        done = mlqueue(_MLQUEUE_COMPLETE=f"{shell}_complete", COMP_WORDS=words, COMP_CWORD=current)
        assert (done.stdout.splitlines(), done.stderr) == (expected, "")

    def test_offers_commands_and_options(self, tmp_path: Path) -> None:
        assert self.complete("mlqueue mig") == ["migrate"]
        assert self.complete("mlqueue dead req") == ["requeue"]
        assert self.complete("mlqueue migrate --to-") == ["--to-namespace"]

    def test_offers_the_ids_of_jobs_and_names_of_actors(self, mlq: MLQ) -> None:
        for name in ("job-0", "job-1"):
            mlq.submit("work", job_id=name, queue_name="default")
        ids = ["job-1", "job-0"]
        mlq.client.hset(f"{mlq.store.root}:actors", "train", "default")
        where = {"MLQUEUE_URL": str(mlq.settings.url), "MLQUEUE_NAMESPACE": mlq.name}
        assert self.complete("mlqueue show job", **where) == ids
        assert self.complete("mlqueue cancel job-0 job-", **where) == ids
        assert self.complete("mlqueue submit tr", **where) == ["train"]

    def test_offers_nothing_where_there_is_no_store(self, tmp_path: Path) -> None:
        assert self.complete("mlqueue show x", MLQUEUE_URL="redis://127.0.0.1:1/0") == []


def test_a_job_that_the_store_thinks_is_here_and_is_not_runs_again(
    mlq: MLQ, worker: dramatiq.Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlqueue.pump.STRAYS_AFTER", 0.05)
    ran: list[int] = []

    @mlq.actor
    def work(value: int) -> None:
        ran.append(value)

    job = work.submit(1)
    assert job.wait(10)
    # As a server that has lost its last moment: it knows of the start, and not of the end.
    root, run, pump = mlq.store.root, mlq.store.connector.execute, mlq.broker.pump
    assert pump is not None
    run("HSET", f"{root}:j:{job.id}", "s", "r", "w", pump.worker)
    run("ZREM", f"{root}:s:s:default:work", job.id)
    run("SADD", f"{root}:h:{pump.worker}", job.id)
    pump._lost(ConnectionError("the server was away"), 0.0)
    pump.wake()
    eventually(lambda: work.submit(2) and ran.count(1) == 2)
    assert eventually(lambda: job.state is State.SUCCEEDED)
    assert job.record.attempt == 2
