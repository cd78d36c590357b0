"""The heartbeat from outside: the beater's thread, and the helper process of one who embeds a Worker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from worker_processes import ROOT, Site, is_alive, wait_for

from mlqueue import Settings, State
from mlqueue.errors import StoreUnavailable
from mlqueue.heartbeat import Beater, HeartbeatHelper, dump_settings, in_words, load_settings
from mlqueue.processes import _entry, _entry_of_ps, born, is_gone, is_stopped, place, resident_bytes
from mlqueue.store import Store
from mlqueue.store.store import Sweep

#: Embeds a worker, as a user's web app may: its jobs are those of the site's module.
HOST = """
import sys, time
sys.path.append({root!r})
import dramatiq, jobs
worker = dramatiq.Worker(jobs.mlq.broker, worker_threads=2)
worker.start()
print("started", flush=True)
for line in sys.stdin:
    if line.strip() == "stop":
        worker.stop(timeout=2000)
        print("stopped", flush=True)
    else:
        exec(line)
        print("done", flush=True)
"""


@pytest.fixture
def site(tmp_path: Path, server: Settings) -> Iterator[Site]:
    made = Site(tmp_path, server, lease=1.5)
    yield made
    made.close()


class Host:
    """A process that embeds a worker."""

    def __init__(self, site: Site) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOST.format(root=str(ROOT))],
            cwd=site.folder,
            env=site.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "started\n"

    @property
    def helper(self) -> int:
        """The process id of its helper."""
        (pid,) = wait_for(lambda: helpers_of(self.process.pid))
        return pid

    def tell(self, line: str, answer: str = "done") -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == answer + "\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()


@pytest.fixture
def host(site: Site) -> Iterator[Host]:
    made = Host(site)
    yield made
    made.close()


def helpers_of(pid: int) -> list[int]:
    table = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="], text=True)
    rows = [line.split(maxsplit=2) for line in table.splitlines()]
    return [int(row[0]) for row in rows if int(row[1]) == pid and "mlqueue.heartbeat" in row[2]]


# The helper process


def test_the_jobs_of_a_killed_host_are_released_at_once(site: Site, host: Host) -> None:
    # Time for the helper to have started, so that the lease is not what releases.
    job = site.submit("first_waits", 60)
    site.wait_started(job)
    time.sleep(0.5)
    helper = host.helper
    host.process.kill()
    killed_at = time.monotonic()
    wait_for(lambda: site.record(job).state is State.QUEUED)
    assert time.monotonic() - killed_at < 1
    record = site.record(job)
    assert (record.crashes, record.stalls) == (1, 0)
    assert "ended without stopping" in record.attempts[0].error.message
    wait_for(lambda: not is_alive(helper), 5)
    assert site.mlq.store.workers() == []


def test_a_forked_process_that_keeps_the_pipe_open_hides_nothing(site: Site, host: Host) -> None:
    host.tell("import os; pid = os.fork(); pid or (time.sleep(20), os._exit(0)); open('forked', 'w').write(str(pid))")
    job = site.submit("first_waits", 60)
    site.wait_started(job)
    time.sleep(0.5)
    host.process.kill()
    wait_for(lambda: site.record(job).state is State.QUEUED, 2)
    assert site.record(job).crashes == 1
    os.kill(int((site.folder / "forked").read_text()), signal.SIGKILL)


def test_a_host_that_holds_the_gil_for_three_leases_keeps_its_job(site: Site, host: Host) -> None:
    job = site.submit("holds_gil", 5)
    job.result(timeout=10)
    assert len(site.events(job, "start")) == site.record(job).attempt == 1


def test_a_stopped_host_loses_its_jobs_when_its_lease_ends(site: Site, host: Host) -> None:
    job = site.submit("work", 2)
    site.wait_started(job)
    host.process.send_signal(signal.SIGSTOP)
    # The helper sweeps, too.
    wait_for(lambda: site.record(job).state is State.QUEUED, 5)
    assert (site.record(job).stalls, site.record(job).crashes) == (1, 0)
    host.process.send_signal(signal.SIGCONT)
    wait_for(lambda: site.record(job).state is State.SUCCEEDED)
    assert site.record(job).attempt == 2


def test_a_worker_that_is_stopped_leaves_nothing(site: Site, host: Host) -> None:
    job = site.submit("work")
    job.result(timeout=5)
    helper = host.helper
    host.tell("stop", "stopped")
    assert not is_alive(helper)
    assert helpers_of(host.process.pid) == []
    assert site.mlq.store.workers() == []


def test_a_helper_that_is_killed_is_no_zombie_and_another_takes_over(site: Site, host: Host) -> None:
    helper = host.helper
    os.kill(helper, signal.SIGKILL)
    (another,) = wait_for(lambda: [pid for pid in helpers_of(host.process.pid) if pid != helper])
    assert is_alive(another)
    assert subprocess.run(["ps", "-p", str(helper)], capture_output=True).returncode == 1
    job = site.submit("holds_gil", 3)
    job.result(timeout=10)
    assert site.record(job).attempt == 1


def test_a_stop_of_the_whole_service_leaves_the_helper_to_its_host(site: Site, host: Host) -> None:
    helper = host.helper
    time.sleep(0.3)  # it is deaf before it has imported anything
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(helper, signum)
    time.sleep(0.2)
    assert is_alive(helper)


def test_a_helper_without_its_store_is_quiet_and_ends_with_its_host(tmp_path: Path) -> None:
    settings = Settings(url=f"unix://{tmp_path}/nowhere.sock", lease=0.3, command_timeout=0.2)
    program = (
        f"import sys; sys.path.append({str(ROOT)!r})\n"
        "from mlqueue import Settings\n"
        "from mlqueue.heartbeat import HeartbeatHelper, load_settings\n"
        "from mlqueue.store import Connector, Store\n"
        f"settings = Settings(url={settings.url!r}, lease=0.3, command_timeout=0.2)\n"
        "helper = HeartbeatHelper(Store(Connector(settings), 'x', settings), 'w')\n"
        "helper.start()\n"
        "print(helper._process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    helper = int(process.stdout.readline())
    assert "the store does not answer" in process.stderr.readline()
    process.kill()
    wait_for(lambda: not is_alive(helper), 6)
    assert "Traceback" not in process.communicate()[1]


def test_stop_is_harmless_in_a_forked_child_and_when_repeated(site: Site) -> None:
    helper = HeartbeatHelper(site.mlq.store, "w")
    helper.start()
    process = helper._process
    assert process is not None
    helper._owner += 1
    helper.stop()
    assert process.poll() is None
    helper._owner -= 1
    helper.stop()
    helper.stop()
    assert process.poll() == 0


def test_the_helper_imports_neither_numpy_nor_what_the_user_has() -> None:
    program = f"import sys; sys.path.append({str(ROOT)!r}); import mlqueue.heartbeat; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", program], text=True).split()
    assert not {"numpy", "flask", "click", "mlqueue.batch"} & set(loaded)


# The beater's thread


class FakeStore:
    """A store that notes what it is asked."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.beaten: list[list[str]] = []
        self.released: list[tuple[str, str]] = []
        self.sweeps = 0
        self.down = False

    def _check(self) -> None:
        if self.down:
            raise StoreUnavailable

    def beat(self, workers: list[str]) -> int:
        self._check()
        self.beaten.append(workers)
        return 7

    def release(self, worker: str, reason: str, detail: str, **known: object) -> dict[str, str]:
        self._check()
        self.released.append((worker, reason))
        return {"j": "queued"}

    def sweep(self, sweeper: str, elected_for: float) -> Sweep:
        self._check()
        self.sweeps += 1
        return Sweep(True, 30.0, {})


def beat_with(store: FakeStore, living: list[str]) -> tuple[Beater, list[int]]:
    waiting: list[int] = []
    beater = Beater(store, lambda: list(living), on_waiting=waiting.append)  # type: ignore[arg-type]
    beater.start()
    return beater, waiting


def test_beats_come_three_times_a_lease_and_sweeps_at_their_interval() -> None:
    store = FakeStore(Settings(lease=0.6, sweep_interval=0.3))
    beater, waiting = beat_with(store, ["a", "b"])
    time.sleep(1.0)
    assert beater.close(1)
    assert 4 <= len(store.beaten) <= 6
    assert 3 <= store.sweeps <= 5
    assert store.beaten[0] == ["a", "b"]
    assert set(waiting) == {7}


def test_a_release_is_at_once_and_survives_an_outage() -> None:
    store = FakeStore(Settings())
    beater, _ = beat_with(store, [])
    told = threading.Event()
    beater.release("a", "crash", "x", lambda outcomes: told.set())
    assert told.wait(0.5)
    store.down = True
    beater.release("b", "drain", "x")
    time.sleep(0.2)
    store.down = False
    assert beater.close(3)
    assert store.released == [("a", "crash"), ("b", "drain")]
    assert store.beaten == []


def test_the_beater_gives_up_when_the_store_stays_away() -> None:
    store = FakeStore(Settings())
    store.down = True
    beater, _ = beat_with(store, ["a"])
    beater.release("a", "crash", "x")
    beater.close(0.1)
    wait_for(lambda: not beater._thread.is_alive(), 3)


def test_settings_travel(site: Site) -> None:
    store = site.mlq.store
    assert isinstance(store, Store)
    there = load_settings(dump_settings(store))
    assert there == Settings.load(site.environment)
    assert in_words({"1": "queued", "2": "gone", "3": "dead"}) == "job 1 back in its queue; job 3 dead"


# What the system knows of processes


def test_the_state_of_a_process() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        then = born(process.pid)
        assert then is not None
        assert not is_stopped(process.pid)
        assert not is_gone(process.pid, then)
        assert is_gone(process.pid, "another time")
        process.send_signal(signal.SIGSTOP)
        wait_for(lambda: is_stopped(process.pid))
        by_ps = _entry_of_ps(process.pid)
        assert by_ps is not None
        assert by_ps.state == "T"
        assert str(time.localtime().tm_year) in by_ps.born
    finally:
        process.kill()
    wait_for(lambda: is_gone(process.pid, then))  # a zombie is gone
    assert born(process.pid) is None
    process.wait()
    assert is_gone(process.pid, then)
    assert _entry(process.pid) is None
    assert _entry_of_ps(process.pid) is None


def test_this_process_and_its_place() -> None:
    assert place() == place()
    assert place().count("/") == 2
    size = resident_bytes()
    assert size is not None
    assert 2**20 < size < 2**36
    assert uuid.UUID(place().split("/")[1]) if sys.platform == "linux" else True
