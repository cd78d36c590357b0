"""For fault tests: worker trees that are hurt, a ledger that knows nothing of mlqueue, and a checker of the two.

Each actor of `ACTORS` appends ``job,attempt,pid,t,event`` lines to the ledger with one write to a file opened with
O_APPEND, so that a line is there or is not, whatever happens to the process after it. What the store says at the end
is checked against that (`Fleet.audit`), and the counts are printed as one line of JSON.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import dramatiq
import dramatiq.broker

from mlqueue import MLQ, JobRecord, Settings, State
from mlqueue.embedded import EmbeddedServer
from mlqueue.testing import temporary_server

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent.parent

#: Whether the sizes are those of `make faults-long`.
LONG = os.environ.get("FAULTS_LONG", "") not in ("", "0")

#: Whether the machine has nothing else to do, so that times may be judged.
QUIET = os.getloadavg()[0] < 0.5 * (os.cpu_count() or 1)

#: How long anything may take, in seconds, before it counts as hanging. Machines that run tests are busy.
PATIENCE = 60.0

#: The user's module. `work` tells of its outcome through a callback, which the store creates together with the outcome:
#: two callbacks of one job are two outcomes.
ACTORS = '''
import ctypes, os, pathlib, signal, time
import mlqueue

mlq = mlqueue.MLQ({namespace!r})
LEDGER = pathlib.Path(__file__).with_name("ledger")


def tell(event, job=None, attempt=None):
    current = mlqueue.current_job()
    line = f"{{job or current.id}},{{attempt or current.attempt}},{{os.getpid()}},{{time.time():.6f}},{{event}}\\n"
    fd = os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, line.encode())
    os.close(fd)


def attempt():
    return mlqueue.current_job().attempt


@mlq.actor(max_retries=0)
def told(data, result):
    tell("outcome:" + mlqueue.current_job().id, data["message_id"], result)


@mlq.actor(max_retries=0, on_success="told")
def work(seconds=0.0):
    tell("start")
    time.sleep(seconds)
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def quiet(seconds=0.0):
    """As work, without a callback."""
    tell("start")
    time.sleep(seconds)
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def first_takes(seconds):
    """Its first attempt takes long, later ones no time."""
    tell("start")
    time.sleep(seconds if attempt() == 1 else 0)
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def holds_gil(seconds, first_only=False):
    tell("start")
    if attempt() == 1 or not first_only:
        ctypes.PyDLL(None).usleep(int(seconds * 1e6))
    tell("end")
    return attempt()


@mlq.actor(max_retries=3, min_backoff=50, max_backoff=100)
def fails(times):
    """Fails so often, then succeeds."""
    tell("start")
    if mlqueue.current_job().retries < times:
        raise ValueError("not yet")
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def patient(seconds):
    """Works that long, or until its worker is stopped: then it saves where it is, and is handed back."""
    tell("start")
    done = mlqueue.current_job().load_checkpoint() or 0
    while done < seconds / 0.02:
        time.sleep(0.02)
        done += 1
        if mlqueue.current_job().stopping:
            mlqueue.current_job().save_checkpoint(done)
            tell("saved")
            mlqueue.current_job().hand_back()
    tell("end")
    return attempt()


@mlq.actor(max_retries=0)
def poison(kind):
    tell("start")
    if kind == "exit":
        os._exit(3)
    if kind == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), signal.SIGKILL)
'''


def wait_for(look: Callable[[], T], timeout: float = PATIENCE, what: Callable[[], object] = lambda: "") -> T:
    """What `look` gives, as soon as it gives something true."""
    deadline = time.monotonic() + timeout
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s; last seen: {found!r} {what()}"
        threading.Event().wait(0.005)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there, and no zombie."""
    state = subprocess.run(["ps", "-o", "state=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return state.strip() not in ("", "Z")


def tree(pid: int) -> list[int]:
    """A process and its descendants, parents first. For their end by pid."""
    listed = subprocess.run(["ps", "-e", "-o", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    children = collections.defaultdict(list)
    for line in listed.splitlines():
        child, parent = map(int, line.split())
        children[parent].append(child)
    found = [pid]
    for one in found:
        found += children[one]
    return found


def send(signum: signal.Signals, pids: Iterable[int]) -> None:
    """Sends a signal to processes, whoever of them is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)


@contextlib.contextmanager
def own_server(**settings: Any) -> Iterator[Settings]:
    """A throw-away embedded server, that may be killed: settings under which it is found by its folder, and so started
    again by whoever needs it."""
    with temporary_server(**settings) as found:
        yield Settings.load({}, **{**settings, "home": found.home, "url": None})


def server_pid(settings: Settings) -> int:
    """The process id of the embedded server, as soon as it has one."""
    server = EmbeddedServer(settings.home)
    return wait_for(server.status).pid


class Entry(NamedTuple):
    """A line of the ledger."""

    job: str
    attempt: int
    pid: int
    t: float
    event: str


class Ledger:
    """The ledger, read on as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._entries: list[Entry] = []
        self._read = 0
        self._part = b""

    def entries(self) -> list[Entry]:
        """All that has been written."""
        if self.path.exists():
            with self.path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
            self._read += len(data)
            *lines, self._part = (self._part + data).split(b"\n")
            for line in lines:
                job, attempt, pid, t, event = line.decode().split(",")
                self._entries.append(Entry(job, int(attempt), int(pid), float(t), event))
        return self._entries

    def of(self, job: Any = None, event: str | None = None) -> list[Entry]:
        """The entries of a job (or its id), and of a kind."""
        wanted = getattr(job, "id", job)
        return [
            entry
            for entry in self.entries()
            if (wanted is None or entry.job == wanted) and (event is None or entry.event == event)
        ]

    def running(self, pid: int) -> list[Entry]:
        """What has started in a process and not ended there."""
        begun: dict[tuple[str, int], Entry] = {}
        for entry in self.entries():
            if entry.pid == pid:
                if entry.event == "start":
                    begun[entry.job, entry.attempt] = entry
                else:
                    begun.pop((entry.job, entry.attempt), None)
        return list(begun.values())


@dataclasses.dataclass(kw_only=True)
class Report:
    """What a fault test has counted."""

    test: str
    #: Submits that were tried, and those that returned an id.
    attempted: int = 0
    acknowledged: int = 0
    #: Jobs that succeeded, by a run that the ledger has.
    ok: int = 0
    #: Acknowledged jobs that the store does not know, or that succeeded without a run.
    lost: int = 0
    #: Jobs that ran to their end more than once: allowed, at least once is what is promised.
    duplicated_runs: int = 0
    #: Jobs with more than one outcome.
    duplicated_outcomes: int = 0
    #: Whatever else should not be: see `notes`.
    unexpected: int = 0
    #: Jobs that succeeded after an attempt that did not end.
    recovered: int = 0
    #: Jobs that are dead, as they should be.
    dead_lettered: int = 0
    #: Callbacks that were delivered, that are on the record as failed, and calls beyond one for each try on the record:
    #: allowed, at least once is what is promised.
    callbacks_delivered: int = 0
    callbacks_failed: int = 0
    callbacks_repeated: int = 0
    #: The longest time from a fault to the next start of a job that it hit, in seconds; None where none was hit.
    max_recovery_s: float | None = None
    #: Where a test bounds how long something takes, the longest that it took, in seconds.
    longest_s: float | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def note(self, text: str) -> None:
        """Counts something unexpected."""
        self.unexpected += 1
        if len(self.notes) < 10:
            self.notes.append(text)

    def finish(self) -> Report:
        """Prints the counts, and fails for what must be 0."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "notes" or value}
        line = json.dumps(values)
        print("\n" + line, flush=True)
        if "FAULTS_REPORT" in os.environ:
            with open(os.environ["FAULTS_REPORT"], "a") as file:
                file.write(line + "\n")
        assert (self.lost, self.duplicated_outcomes, self.unexpected) == (0, 0, 0), line
        return self


class Worker:
    """A `mlqueue worker`: the supervisor's process, and its children."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log_path = log

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log().splitlines() if text in line]

    def pids(self, seat: int | None = None) -> list[int]:
        """The process ids of the children that have become ready, in that order; those of one seat."""
        found = self.lines(" is ready after ")
        if seat is not None:
            found = [line for line in found if f"worker {seat} is ready" in line]
        return [int(line.rpartition("pid ")[2].rstrip(")")) for line in found]

    def wait_ready(self, count: int, timeout: float = PATIENCE) -> list[int]:
        """Waits until so many children have become ready since the start."""
        wait_for(lambda: len(self.pids()) >= count, timeout, self.log)
        return self.pids()

    def wait_seat(self, seat: int, count: int, timeout: float = PATIENCE) -> int:
        """Waits until so many children have become ready in a seat; the last of them."""
        wait_for(lambda: len(self.pids(seat)) >= count, timeout, self.log)
        return self.pids(seat)[-1]

    def wait_line(self, text: str, timeout: float = PATIENCE) -> str:
        return wait_for(lambda: self.lines(text), timeout, self.log)[0]

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code."""
        wait_for(lambda: self.process.poll() is not None, timeout, self.log)
        return self.process.returncode

    def stop(self) -> None:
        self.signal(signal.SIGTERM)
        assert self.wait() == 0, self.log()

    def kill_all(self) -> None:
        """kill -9 of all of it at once: stopped first, so that none sees another end."""
        pids = tree(self.pid)
        send(signal.SIGSTOP, pids)
        send(signal.SIGKILL, reversed(pids))
        self.process.wait()
        wait_for(lambda: not any(map(is_alive, pids)))

    def close(self) -> None:
        if self.process.poll() is None:
            self.kill_all()


class Fleet:
    """A user's folder with a module of actors, a namespace of its own, its ledger, and what runs there.

    `server` says where the store is: by its URL, or by the folder of an embedded one (`own_server`). `settings` are
    those of workers and producers, by name.
    """

    def __init__(self, folder: Path, server: Settings, *, actors: str = ACTORS, **settings: Any) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)
        self.namespace = f"faults-{uuid.uuid4().hex[:8]}"
        self.ledger = Ledger(folder / "ledger")
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith("MLQUEUE_") and name not in ("REDIS_URL", "PYTHONPATH")
        }
        given: dict[str, Any] = {"url": server.url} if server.url else {"home": server.home, **_given(server)}
        given |= settings
        self.environment |= {f"MLQUEUE_{name.upper()}": str(value) for name, value in given.items()}
        self.environment["PYTHONPATH"] = str(ROOT)
        (folder / "jobs.py").write_text(actors.format(namespace=self.namespace))
        self._global_broker = dramatiq.broker.global_broker
        self.mlq = MLQ(self.namespace, settings=Settings.load(self.environment))
        self._workers: list[Worker] = []
        self._programs: list[subprocess.Popen[bytes]] = []

    # What runs

    def worker(self, *options: str, processes: int = 2, threads: int = 8, ready: bool = True) -> Worker:
        """Starts `mlqueue worker jobs`; returns when its children work."""
        command = ["-m", "mlqueue", "worker", "jobs", "--processes", str(processes), "--threads", str(threads)]
        log = self.folder / f"worker-{len(self._workers)}.log"
        with log.open("wb") as output:
            process = self._popen([*command, *options], stdout=output, stderr=output)
        worker = Worker(process, log)
        self._workers.append(worker)
        if ready:
            worker.wait_ready(processes)
        return worker

    def program(self, code: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Starts another Python program in the folder; what it prints can be read."""
        process = self._popen(["-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self._programs.append(process)
        return process

    def _popen(self, arguments: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

    def close(self, *, forget: bool = True) -> None:
        """Ends all that was started here, and removes what it left in the store unless that goes as a whole."""
        for worker in self._workers:
            worker.close()
        for program in self._programs:
            if program.poll() is None:
                send(signal.SIGKILL, tree(program.pid))
            program.wait()
            for pipe in (program.stdout, program.stderr):
                if pipe is not None:
                    pipe.close()
        with contextlib.suppress(Exception):
            for key in () if not forget else self.mlq.client.scan_iter(f"{self.mlq.store.root}:*", count=1000):
                self.mlq.client.unlink(key)
        self.mlq.close()
        dramatiq.broker.global_broker = self._global_broker

    def logs(self) -> str:
        return "\n".join(worker.log()[-20_000:] for worker in self._workers)

    # Jobs

    def submit(self, actor: str, *args: Any, **options: Any) -> Any:
        return self.mlq.submit(actor, *args, **options)

    def records(self, jobs: Iterable[Any]) -> list[JobRecord | None]:
        """The records of jobs, or of their ids, whole."""
        ids = [getattr(job, "id", job) for job in jobs]
        found: list[JobRecord | None] = []
        for at in range(0, len(ids), 200):
            found += self.mlq.store.records(ids[at : at + 200], full=True)
        return found

    def wait_started(self, *jobs: Any, attempt: int = 1, timeout: float = PATIENCE) -> list[Entry]:
        """Waits until each job has started so often; these starts."""

        def found() -> list[Entry]:
            starts = {entry.job: entry for entry in self.ledger.of(event="start") if entry.attempt == attempt}
            return [starts[job.id] for job in jobs] if all(job.id in starts for job in jobs) else []

        return wait_for(found, timeout, self.logs)

    def unfinished(self) -> int:
        """How many jobs have not ended, callbacks included."""
        return sum(count.number for count in self.mlq.store.counts() if not count.state.ended)

    def wait_drained(self, timeout: float = PATIENCE) -> None:
        """Waits until every job has ended."""
        deadline = time.monotonic() + timeout
        while self.unfinished():
            left = [(count.actor, str(count.state), count.number) for count in self.mlq.store.counts()]
            assert time.monotonic() < deadline, f"not within {timeout:g} s: {left}\n{self.logs()}"
            threading.Event().wait(0.05)

    # The checker

    def audit(
        self,
        test: str,
        jobs: Iterable[Any],
        *,
        attempted: int | None = None,
        dead: Collection[Any] = (),
        faults: Sequence[tuple[float, int]] = (),
        callbacks: bool | None = None,
    ) -> Report:
        """Checks what the store says of acknowledged jobs against the ledger.

        Parameters:
          test: What the report is called.
          jobs: The jobs that were acknowledged, or their ids. All have ended.
          attempted: How many submits were tried; as many as `jobs` when None.
          dead: Those that are to be dead.
          faults: When (Unix seconds) which process was ended, for the time until its jobs started again.
          callbacks: Whether to expect one callback of each job that succeeded; when None, of those of actor `work`.
        """
        ids = [getattr(job, "id", job) for job in jobs]
        doomed = {getattr(job, "id", job) for job in dead}
        report = Report(test=test, attempted=attempted or len(ids), acknowledged=len(ids))
        by_job: dict[str, list[Entry]] = collections.defaultdict(list)
        for entry in self.ledger.entries():
            by_job[entry.job].append(entry)
        for job_id, record in zip(ids, self.records(ids), strict=True):
            self._check_job(report, job_id, record, by_job[job_id], doomed, callbacks)
        report.max_recovery_s = longest_recovery(by_job.values(), faults)
        return report

    def _check_job(
        self,
        report: Report,
        job_id: str,
        record: JobRecord | None,
        entries: list[Entry],
        doomed: Collection[str],
        callbacks: bool | None,
    ) -> None:
        starts = collections.Counter(entry.attempt for entry in entries if entry.event == "start")
        ends = collections.Counter(entry.attempt for entry in entries if entry.event == "end")
        outcomes = {entry.event for entry in entries if entry.event.startswith("outcome:")}
        if record is None:
            report.lost += 1
            report.notes.append(f"{job_id}: no record")
            return
        twice = [attempt for attempt, number in starts.items() if number > 1]
        if twice:
            report.note(f"{job_id}: attempts {twice} started more than once")
        if sum(ends.values()) > 1:
            report.duplicated_runs += 1
        if starts and max(starts) > record.attempt:
            report.note(f"{job_id}: attempt {max(starts)} ran, the record knows {record.attempt}")
        late = record.finished_at is not None and any(
            entry.t > record.finished_at + 0.01 for entry in entries if entry.event == "start"
        )
        if len(outcomes) > 1 or late:
            report.duplicated_outcomes += 1
            report.notes.append(f"{job_id}: outcomes {outcomes}, started after its end: {late}")
        if record.state is State.SUCCEEDED:
            expects_one = record.actor == "work" if callbacks is None else callbacks
            if job_id in doomed:
                report.note(f"{job_id} succeeded")
            elif not ends[record.attempt]:
                report.lost += 1
                report.notes.append(f"{job_id} succeeded at attempt {record.attempt} without a run: {entries}")
            elif record.short_result != record.attempt:
                report.note(f"{job_id}: the result is of attempt {record.short_result}, not of {record.attempt}")
            elif expects_one and len(outcomes) != 1:
                report.note(f"{job_id} succeeded, and told {len(outcomes)} times")
            else:
                report.ok += 1
                report.recovered += any(not ends[attempt] for attempt in starts)
        elif record.state is State.DEAD and job_id in doomed:
            report.dead_lettered += 1
        else:
            report.note(f"{job_id} is {record.state} ({record.dead_reason}): {record.error}")


#: Makes a fleet; see the fixture.
MakeFleet = Callable[..., Fleet]


def longest_recovery(jobs: Iterable[list[Entry]], faults: Sequence[tuple[float, int]]) -> float | None:
    """The longest time from the end of a process to the next start of a job that it was running."""
    ended = {pid: t for t, pid in faults}
    longest: float | None = None
    for entries in jobs:
        done = {entry.attempt for entry in entries if entry.event == "end"}
        starts = sorted((entry for entry in entries if entry.event == "start"), key=lambda entry: entry.attempt)
        for hit, again in itertools.pairwise(starts):
            if hit.pid in ended and hit.attempt not in done:
                longest = max(longest or 0.0, round(again.t - ended[hit.pid], 3))
    return longest


def _given(settings: Settings) -> dict[str, Any]:
    """The settings that were given as arguments, but for those that say where the store is."""
    return {
        described.name: getattr(settings, described.name)
        for described in settings.describe()
        if described.source == "argument" and described.name not in ("url", "home")
    }
