"""Worker processes under a supervisor: real processes, real signals."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from worker_processes import ROOT, Site, is_alive, wait_for

from mlqueue import MLQ, DeadReason, State
from mlqueue.child import Order, check_queues, choose_app, module_name
from mlqueue.errors import SettingsError
from mlqueue.settings import Settings
from mlqueue.supervisor import Supervisor, how_it_ended, restart_pause

LINUX = os.path.exists("/proc/self/stat")

MakeSite = Callable[..., Site]


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[MakeSite]:
    made: list[Site] = []

    def make(**settings: Any) -> Site:
        made.append(Site(tmp_path, server, **settings))
        return made[-1]

    yield make
    for one in made:
        one.close()


# A child dies


def test_jobs_of_a_killed_child_run_again_at_once_and_the_other_child_goes_on(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=2, threads=2)
    # Three of four threads are taken: orphans find a free one.
    jobs = [here.submit("first_waits", 60) for _ in range(3)]
    by_pid = collections.defaultdict(list)
    for job, event in zip(jobs, here.wait_started(*jobs), strict=True):
        by_pid[event["pid"]].append(job)
    victim, other = sorted(by_pid, key=lambda pid: -len(by_pid[pid]))
    orphans, (staying,) = by_pid[victim], by_pid[other]
    killed_at = time.time()
    os.kill(victim, signal.SIGKILL)

    again = here.wait_started(*orphans, attempt=2)

    assert max(event["at"] for event in again) - killed_at < 1
    assert {event["pid"] for event in again}.isdisjoint({victim})
    for job in orphans:
        assert job.result(timeout=5) == 2
        record = here.record(job)
        assert (record.crashes, record.stalls, record.attempt) == (1, 0, 2)
        assert record.attempts[0].outcome == "crashed"
        assert "killed by signal 9 (SIGKILL)" in record.attempts[0].error.message
    assert (here.record(staying).state, here.record(staying).attempt) == (State.RUNNING, 1)
    assert set(supervised.wait_ready(3)[:2]) == {victim, other}
    assert is_alive(other)
    assert "starts again in 0.1 s" in supervised.log()


def test_a_child_killed_again_and_again_is_back_within_the_pause(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=1)
    for round_ in range(3):
        pid = supervised.wait_ready(round_ + 1)[-1]
        os.kill(pid, signal.SIGKILL)
    job = here.submit("work")
    assert job.result(timeout=15)
    pauses = [line.rpartition(" in ")[2] for line in supervised.lines("starts again")]
    assert pauses == ["0.1 s", "0.2 s", "0.4 s"]
    supervised.stop()


def test_a_poison_job_is_dead_after_three_starts_and_nobody_else(site: MakeSite) -> None:
    here = site()
    here.supervise(processes=2, threads=4)
    innocents = [here.submit("work", 0.2) for _ in range(10)]
    culprit = here.submit("poison")
    innocents += [here.submit("work", 0.2) for _ in range(10)]

    wait_for(lambda: culprit.state.ended, 20, here.logs)
    for job in innocents:
        job.result(timeout=20)

    record = here.record(culprit)
    assert (record.state, record.dead_reason) == (State.DEAD, DeadReason.CRASHED)
    assert len(here.events(culprit, "start")) == record.attempt == record.crashes == 3
    assert here.mlq.get_job(culprit.id)["retries"] == 2  # what it died of has started it no more
    assert "killed by signal 9 (SIGKILL)" in record.error.message
    assert all(here.record(job).state is State.SUCCEEDED for job in innocents)
    # Each innocent was given out once more for each crash that it was beside, and is blamed only if it had begun.
    for job in innocents:
        record = here.record(job)
        assert 1 + record.crashes <= record.attempt
        assert len(here.events(job, "start")) <= record.attempt


def test_a_job_to_be_run_alone_gets_a_child_though_all_are_busy(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=2)
    long = here.submit("work", 60)
    here.wait_started(long)
    culprit = here.submit("poison", "exit")
    # After two crashes both are to be run alone, and one of them keeps the child.
    wait_for(lambda: culprit.state.ended, 20, here.logs)
    record = here.record(culprit)
    assert (record.dead_reason, record.attempt) == (DeadReason.CRASHED, 3)
    assert "exit code 0" in record.error.message
    here.wait_started(long, attempt=3)
    assert here.record(long).crashes == 2
    assert len(supervised.lines("starting a worker for them")) == 1


def test_a_child_whose_thread_died_is_replaced(site: MakeSite) -> None:
    here = site()
    (here.folder / "fragile.py").write_text(
        "from jobs import mlq, tell\n"
        "from mlqueue.broker import StoreConsumer\n"
        "settle = StoreConsumer.ack\n"
        "def ack(self, message):\n"
        "    settle(self, message)\n"
        "    raise SystemExit\n"
        "@mlq.actor(max_retries=0)\n"
        "def breaks():\n"
        "    tell('start')\n"
        "    StoreConsumer.ack = ack\n"
    )
    supervised = here.supervise("fragile", processes=1, threads=2)
    here.submit("breaks")
    supervised.wait_ready(2, timeout=20)
    assert supervised.lines("broken")
    assert here.submit("work").result(timeout=10)


# A child is stopped, or does not answer


def test_the_jobs_of_a_stopped_child_run_elsewhere_and_it_is_refused(site: MakeSite) -> None:
    here = site(lease=1.0)
    supervised = here.supervise(processes=2, threads=1)
    job = here.submit("first_waits", 2)
    (event,) = here.wait_started(job)
    os.kill(event["pid"], signal.SIGSTOP)
    (again,) = here.wait_started(job, attempt=2)
    assert again["pid"] != event["pid"]
    assert job.result(timeout=5) == 2

    os.kill(event["pid"], signal.SIGCONT)
    wait_for(lambda: [item for item in here.events(job, "end") if item["attempt"] == 1], 10, here.logs)
    supervised.wait_line("was taken over by a later one")

    record = here.record(job)
    assert (record.attempt, record.stalls, record.crashes) == (2, 1, 0)
    assert job.result() == 2
    supervised.stop()


def test_a_job_that_holds_the_gil_for_three_leases_runs_once(site: MakeSite) -> None:
    here = site(lease=1.0)
    here.supervise(processes=2, threads=1)
    job = here.submit("holds_gil", 4)
    job.result(timeout=15)
    assert len(here.events(job, "start")) == here.record(job).attempt == 1
    assert here.record(job).stalls == 0


# Draining


def test_a_drain_lets_jobs_save_and_gives_them_back_without_a_strike(site: MakeSite) -> None:
    here = site(drain=5)
    supervised = here.supervise(processes=2, threads=2)
    short, long = here.submit("work", 1), here.submit("patient")
    here.wait_started(short, long)
    supervised.stop()
    assert here.events(long, "stopping")
    assert here.record(short).state is State.SUCCEEDED
    record = here.record(long)
    assert (record.state, record.crashes, record.stalls, record.attempts) == (State.QUEUED, 0, 0, ())
    assert here.mlq.store.workers() == []


def test_what_still_runs_at_the_end_of_the_drain_goes_back(site: MakeSite) -> None:
    here = site(drain=0.5)
    supervised = here.supervise(processes=2, threads=1)
    jobs = here.submit("work", 60), here.submit("holds_gil", 60)
    here.wait_started(*jobs)
    supervised.stop()
    for job in jobs:
        record = here.record(job)
        assert (record.state, record.crashes, record.stalls) == (State.QUEUED, 0, 0)


def test_a_second_signal_gives_jobs_back_at_once(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=1)
    job = here.submit("work", 60)
    here.wait_started(job)
    supervised.signal(signal.SIGTERM)
    supervised.wait_line("draining")
    supervised.signal(signal.SIGTERM)  # an echo of the first: ignored
    time.sleep(0.5)
    assert supervised.process.poll() is None
    asked = time.monotonic()
    supervised.signal(signal.SIGINT)
    assert supervised.wait() == 130
    assert time.monotonic() - asked < 2
    record = here.record(job)
    assert (record.state, record.crashes, record.stalls) == (State.QUEUED, 0, 0)


def test_processes_that_jobs_fork_end_at_sigterm(site: MakeSite) -> None:
    here = site()
    here.supervise(processes=1, threads=1)
    assert here.submit("forks").result(timeout=10) == -signal.SIGTERM


# The supervisor dies


def test_children_of_a_killed_supervisor_end_and_the_next_one_runs_everything(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=2, threads=1)
    jobs = [here.submit("first_waits", 60), here.submit("holds_gil", 6)]
    if not LINUX:
        del jobs[1]
    here.wait_started(*jobs)
    pids = supervised.ready_pids()
    supervised.signal(signal.SIGKILL)
    supervised.process.wait()
    wait_for(lambda: not any(map(is_alive, pids)), 5, here.logs)

    here.supervise(processes=2, threads=1)
    here.wait_started(*jobs, attempt=2, timeout=5)
    assert jobs[0].result(timeout=5) == 2
    record = here.record(jobs[0])
    assert (record.crashes, record.stalls) == (0, 1)


def test_a_child_that_loses_its_supervisor_gives_its_jobs_back_and_ends(site: MakeSite) -> None:
    # Where the kernel does not kill it first.
    here = site()
    ours, theirs = socket.socketpair()
    program = f"import sys; sys.path.append({str(ROOT)!r}); import mlqueue.child as child; "
    program += "child.die_with_parent = lambda: None; child.main()"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(theirs.fileno())],
        cwd=here.folder,
        env=here.environment,
        pass_fds=(theirs.fileno(),),
        stderr=subprocess.DEVNULL,
    )
    theirs.close()
    order = Order(
        number=1,
        worker="w1",
        supervisor=os.getpid(),
        modules=["jobs"],
        namespace=None,
        threads=1,
        queues=None,
        max_jobs=None,
        max_rss=None,
        only_alone=False,
        log_level="INFO",
    )
    ours.sendall(json.dumps(dataclasses.asdict(order)).encode() + b"\n")
    job = here.submit("work", 60)
    here.wait_started(job)
    ours.close()
    assert process.wait(5) == 1
    record = here.record(job)
    assert (record.state, record.stalls, record.crashes) == (State.QUEUED, 1, 0)


# Boot


def test_modules_that_cannot_be_imported_end_the_supervisor(site: MakeSite) -> None:
    here = site()
    (here.folder / "typo.py").write_text("import mlqueu\n")
    supervised = here.supervise("typo", ready=False, processes=2)
    assert supervised.wait() == 1
    assert supervised.log().count("Traceback") == 1
    assert 'typo.py", line 1' in supervised.log()
    assert "No module named 'mlqueu'" in supervised.log()
    assert "child.py" not in supervised.log()


def test_a_module_that_exits_ends_the_supervisor(site: MakeSite) -> None:
    here = site()
    (here.folder / "entry.py").write_text("import sys\nsys.exit('go away')\n")
    supervised = here.supervise("entry", ready=False, processes=1)
    assert supervised.wait() == 1
    assert "SystemExit: go away" in supervised.log()


def app_named(name: str, server: Settings, *, actors: bool = True) -> MLQ:
    app = MLQ(name, settings=server)
    if actors:
        app.actor(actor_name="act", queue_name="train")(lambda: None)
    return app


def test_the_app_is_the_one_with_actors_or_the_one_that_is_named(mlq: MLQ, server: Settings) -> None:
    one, two, bare = app_named("one", server), app_named("two", server), app_named("bare", server, actors=False)
    assert choose_app([bare, one], None, ["m"]) is one
    assert choose_app([bare], None, ["m"]) is bare
    assert choose_app([one, two], "two", ["m"]) is two


def test_a_worker_that_has_no_one_app_says_why(mlq: MLQ, server: Settings) -> None:
    one, two = app_named("one", server), app_named("two", server)
    with pytest.raises(SettingsError, match=r"m n: no mlqueue app is made there.*mlqueue\.MLQ\(\)"):
        choose_app([], None, ["m", "n"])
    with pytest.raises(SettingsError, match=r"no app of the namespace 'other'.* there are 'one', 'two'"):
        choose_app([one, two], "other", ["m"])
    with pytest.raises(SettingsError, match=r"'one', 'two', and a worker serves one.*--namespace one"):
        choose_app([one, two], None, ["m"])
    with pytest.raises(SettingsError, match="2 apps of the namespace 'one'"):
        choose_app([one, app_named("one", server)], None, ["m"])


def test_a_queue_that_no_actor_declares_is_refused(mlq: MLQ, server: Settings) -> None:
    app = app_named("one", server)
    check_queues(app.broker, None)
    check_queues(app.broker, ["train"])
    with pytest.raises(SettingsError, match="no actor declares 'nowhere'; declared are 'train'"):
        check_queues(app.broker, ["train", "nowhere"])


def test_a_namespace_chooses_among_apps_and_a_path_is_a_module(site: MakeSite) -> None:
    here = site()
    package = here.folder / "pkg"
    package.mkdir()
    (package / "entry.py").write_text(
        "import jobs, mlqueue\nother = mlqueue.MLQ('another')\n@other.actor\ndef act(): pass\n"
    )
    supervised = here.supervise("pkg/entry.py", processes=1, namespace=here.namespace)
    assert here.submit("work").result(timeout=10) == supervised.ready_pids()[0]
    supervised.stop()


def test_names_of_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tasks.py").touch()
    typed = ["tasks", "tasks.training", "pkg.mod:mlq", "tasks.py", "./folder/file.py", "folder/", "odd-name/file.py"]
    expected = ["tasks", "tasks.training", "pkg.mod", "tasks", "folder.file", "folder", "file"]
    assert [module_name(name) for name in typed] == expected


def test_a_supervisor_without_modules_is_refused() -> None:
    with pytest.raises(SettingsError, match="mlqueue worker tasks"):
        Supervisor([], Settings())


def test_pauses_grow_and_those_of_a_child_that_worked_stay_short_for_long() -> None:
    assert [restart_pause(failures, worked=False) for failures in (0, 1, 8, 9, 1000)] == [0.1, 0.2, 25.6, 30, 30]
    assert [restart_pause(failures, worked=True) for failures in (0, 1, 2, 3, 19)] == [0.1, 0.2, 0.4, 0.5, 0.5]
    assert [restart_pause(failures, worked=True) for failures in (20, 21, 26, 1000)] == [0.5, 1.0, 30, 30]


def test_ends_in_words() -> None:
    assert [how_it_ended(code) for code in (-9, 3, -11)] == [
        "killed by signal 9 (SIGKILL)",
        "exit code 3",
        "killed by signal 11 (SIGSEGV)",
    ]


# Recycling


def test_a_child_is_replaced_after_max_jobs_without_a_strike(site: MakeSite) -> None:
    here = site()
    supervised = here.supervise(processes=1, threads=1, max_jobs=3)
    jobs = [here.submit("work") for _ in range(7)]
    pids = [job.result(timeout=15) for job in jobs]
    assert list(collections.Counter(pids).values()) == [3, 3, 1]
    assert all(here.record(job).crashes == here.record(job).stalls == 0 for job in jobs)
    assert not supervised.lines(" died ")
    supervised.stop()


def test_a_child_is_replaced_when_it_takes_much_memory_after_its_job(site: MakeSite) -> None:
    here = site()
    here.supervise(processes=1, threads=1, max_rss=200 * 2**20)
    job = here.submit("grows", 250 * 2**20)
    job.result(timeout=15)
    (event,) = here.events(job, "end")
    assert here.record(job).attempt == 1
    assert here.submit("work").result(timeout=10) != event["pid"]


# Cost


def test_an_idle_supervisor_and_its_child_send_at_most_one_command_a_second(site: MakeSite) -> None:
    here = site()
    here.supervise(processes=1)
    time.sleep(1)
    client = here.mlq.store.connector.client
    seconds = 6.0
    with client.monitor() as monitor:
        time.sleep(seconds)
        over = f"over-{uuid.uuid4().hex}"  # others of this server's users are seen, too
        client.echo(over)
        commands = []
        while over not in (command := monitor.next_command())["command"]:
            if command["client_type"] != "lua" and here.namespace in command["command"]:
                commands.append(command["command"])
    assert 0 < len(commands) <= seconds + 1, commands
