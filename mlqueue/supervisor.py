"""The supervisor of ``mlqueue worker``: it keeps worker processes running, and loses no job when one of them dies.

It never imports user code, so nothing of the user's can bring it down. It spawns its children (`mlqueue.child`; never
forks: libraries such as CUDA's do not survive that), beats for them from outside their interpreters, sees at once when
one dies, gives its jobs back and starts another. Which store they use it learns from the first child.

All of it happens in the main thread, woken by signals and by what children say; a `Beater` thread talks to the store,
which may take its time. A child is spawned from the main thread because Linux ends it with the thread that did.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Final

from .board import Board
from .child import RETIRE, Order
from .errors import SettingsError
from .heartbeat import Beater, in_words, load_settings
from .overdue import LOOK_INTERVAL, Doom, Watch
from .processes import Usage, interpreter_command, is_gone, is_stopped, place, usage
from .settings import Settings
from .store import Connector, Store

__all__ = ["Supervisor", "environment_under", "how_it_ended", "restart_pause"]

logger = logging.getLogger("mlqueue.supervisor")

#: The first and the longest pause before a child is started again, in seconds; it doubles with each failure.
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 30.0

#: The longest pause, in seconds, of a child that has worked, until it has failed so often: what it ran waits, and jobs
#: that kill it are bounded by their strikes, while a module that cannot be imported fails for ever.
CRASH_PAUSE: Final = 0.5
CRASHES: Final = 20

#: How long a child must have worked for its failures to be forgotten, in seconds.
HEALTHY_AFTER: Final = 60.0

#: The first and the longest pause before another child for jobs to be run alone, after one that got none, in seconds.
FIRST_ALONE_PAUSE: Final = 1.0
LONGEST_ALONE_PAUSE: Final = 60.0

#: How much longer than the drain time children have for their own end, in seconds.
DRAIN_MARGIN: Final = 2.0

#: How long a child may take to end after it has said goodbye, in seconds.
BYE_MARGIN: Final = 5.0

#: A second signal within so many seconds is the first one's echo: a terminal and a process manager both send one.
ECHO: Final = 0.25

#: How long the store has to take the jobs of the last children back, in seconds.
LAST_RELEASES: Final = 5.0

#: The longest sleep of the main loop, in seconds.
LONGEST_SLEEP: Final = 5.0

#: The exit code when a second signal cut the drain short.
EXIT_INTERRUPTED: Final = 130


@dataclasses.dataclass(eq=False, kw_only=True)
class _Seat:
    """A seat in the row of children, and who has it."""

    number: int
    #: Whether its child takes only jobs to be run alone.
    alone: bool = False
    child: _Child | None = None
    #: Ends without order, one after another.
    failures: int = 0
    #: When to start the next child (monotonic); None for the seat of the extra child, and while there is one.
    due: float | None = None
    #: How many children it has had.
    spawned: int = 0
    #: Whether somebody has asked that it stay empty.
    closed: bool = False


class _Child:
    """A child process, from the outside."""

    def __init__(
        self, seat: _Seat, worker: str, process: subprocess.Popen[bytes], channel: socket.socket, board: Board
    ) -> None:
        self.seat = seat
        self.worker = worker
        self.board = board
        self.watch = Watch(board)
        #: The jobs for which it was killed.
        self.dooms: list[Doom] = []
        self.process = process
        self.channel = channel
        self.spawned_at = time.monotonic()
        #: When its worker had started (monotonic).
        self.ready_at: float | None = None
        #: Whether its app is known, so that it may hold jobs.
        self.known = False
        #: Why it ended, when it did in order: drain, recycle, broken or idle.
        self.bye: str | None = None
        #: How many jobs it ran, when it said so.
        self.ran = 0
        #: Why it could not boot, in the child's words.
        self.failure: str | None = None
        #: Whether we killed it, so that its end is nobody's fault.
        self.killed = False
        #: When it is killed unless it has ended by then (monotonic).
        self.deadline: float | None = None
        #: What somebody has asked of it, when that has been passed on.
        self.asked: str | None = None
        self._received = b""

    @property
    def name(self) -> str:
        return f"worker {self.seat.number}" + (" (for jobs to be run alone)" if self.seat.alone else "")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What it has said since the last call."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while data := self.channel.recv(65_536):
                self._received += data
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            yield json.loads(line)

    def terminate(self) -> None:
        """Asks it to drain."""
        self.process.send_signal(signal.SIGTERM)

    def retire(self) -> None:
        """Asks it to take no more jobs, and to end when those in hand have."""
        with contextlib.suppress(OSError):
            self.channel.sendall(RETIRE)

    def kill(self) -> None:
        """Ends it, and what it has forked."""
        self.killed = True
        self.kill_group()

    def kill_group(self) -> None:
        """Ends what its jobs have started and left behind."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.channel.close()


class Supervisor:
    """Runs worker processes until it is told to stop.

    Parameters:
      modules: What the children import, as for `mlqueue.child.module_name`.
      settings: The settings; those given as arguments reach the children through their environment.
      processes: How many children; the setting, else one per core.
      threads: How many jobs each runs at a time; the setting when None.
      queues: The queues to serve; None for all that the actors declare.
      max_jobs: After how many jobs a child is replaced; the setting when None.
      max_rss: From how many bytes of memory on a child is replaced; the setting when None.
      namespace: Which app to work for, where the modules make several.
    """

    def __init__(
        self,
        modules: Sequence[str],
        settings: Settings,
        *,
        processes: int | None = None,
        threads: int | None = None,
        queues: Sequence[str] | None = None,
        max_jobs: int | None = None,
        max_rss: int | None = None,
        namespace: str | None = None,
    ) -> None:
        if not modules:
            raise SettingsError("no module to import: name those that declare your actors, `mlqueue worker tasks`.")
        self.settings = settings
        self.modules = list(modules)
        self.threads = threads or settings.threads
        self.queues = list(queues) if queues else None
        self.max_jobs = max_jobs or settings.max_jobs
        self.max_rss = max_rss or settings.max_rss
        self.namespace = namespace
        count = processes or settings.processes or _cores()
        self._seats = [_Seat(number=number, due=0.0) for number in range(1, count + 1)]
        #: The seat of the extra child, which takes only jobs to be run alone.
        self._extra = _Seat(number=count + 1, alone=True)
        self._extra_pause = 0.0
        self._extra_after = 0.0
        self._alone_waiting = False
        #: The workers to beat for, and their process ids; replaced as a whole, since the beater's thread reads it.
        self._living: tuple[tuple[str, int], ...] = ()
        #: Likewise what may have to be killed in each.
        self._watched: tuple[tuple[Watch, str], ...] = ()
        self._store: Store | None = None
        self._beater: Beater | None = None
        self._ever_ready = False
        self._failures: dict[str, None] = {}
        #: The exit codes of what kept children from booting.
        self._boot_codes: set[int] = set()
        self._hopeless: set[int] = set()
        self._stopping_since: float | None = None
        self._exit_code = 0
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)
        #: What the beater's thread has to say to the main thread: counts of jobs that wait to be run alone.
        self._news: collections.deque[int] = collections.deque()
        #: The same, of what is asked of workers.
        self._asked: collections.deque[tuple[str, str]] = collections.deque()
        #: What the children had taken when they were measured last, and when. The beater's thread's own.
        self._measured: dict[str, tuple[float, Usage]] = {}

    def run(self) -> int:
        """Runs in the foreground, in the main thread, until SIGTERM or SIGINT; the exit code.

        0 after a drain, 1 when no child could start, 130 when a second signal cut the drain short.
        """
        logger.info(
            "starting %d worker processes of %d threads for %s (pid %d)",
            len(self._seats),
            self.threads,
            " ".join(self.modules),
            os.getpid(),
        )
        self._selector.register(self._wake_read, selectors.EVENT_READ, self._on_wake)
        with self._signals():
            try:
                while not self._is_over():
                    self._step()
            finally:
                self._end()
        logger.info("done")
        return self._exit_code

    def _step(self) -> None:
        self._start_due()
        for key, _ in self._selector.select(self._pause()):
            key.data()
        for child in self._children():
            if child.process.poll() is not None:
                self._on_exit(child)
            elif dooms := self._dooms(child):
                self._kill_for(child, dooms)
            elif child.deadline is not None and time.monotonic() >= child.deadline:
                logger.warning("%s has not ended in time and is killed", child.name)
                child.deadline = None
                child.kill()

    def _dooms(self, child: _Child) -> list[Doom]:
        """The jobs for which a child is to be killed."""
        if child.watch.idle or child.killed:
            return []
        now = time.monotonic()
        if self._beater is not None and child.known and child.watch.has_due(now):
            self._beater.watch_now()  # it may have been prolonged
        return child.watch.dooms(now)

    def _kill_for(self, child: _Child, dooms: list[Doom]) -> None:
        for doom in dooms:
            logger.warning("%s is killed (pid %d) for job %s: %s", child.name, child.process.pid, doom.job_id, doom.why)
        child.dooms = dooms
        child.kill()

    def _watch(self) -> None:
        """In the beater's thread: asks the store about jobs that may have to be killed."""
        store = self._store
        for watch, worker in self._watched:
            if store is not None and not watch.idle:
                watch.ask(functools.partial(store.standing, worker))

    def _is_over(self) -> bool:
        return self._stopping_since is not None and not self._children()

    def _pause(self) -> float:
        times = [seat.due for seat in self._seats if seat.due is not None]
        times += [child.deadline for child in self._children() if child.deadline is not None]
        if any(not child.watch.idle for child in self._children()):
            times.append(time.monotonic() + LOOK_INTERVAL)
        if self._wants_extra():
            times.append(self._extra_after)
        return max(0.0, min([LONGEST_SLEEP, *(moment - time.monotonic() for moment in times)]))

    def _end(self) -> None:
        """Leaves nothing behind, however the loop ended."""
        for child in self._children():
            child.kill()
            child.process.wait()
            self._on_exit(child)
        if self._beater is not None and not self._beater.close(LAST_RELEASES):
            logger.warning("the store does not answer; the jobs of this worker go back when its lease ends")
        if self._store is not None:
            self._store.connector.close()
        self._selector.close()

    # Signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Has signals wake the main loop, as long as it runs."""
        previous: dict[int, Any] = {}
        signum: int
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            present = signal.getsignal(signum)
            # Ignored by whoever started us (nohup, a shell's background job): that was meant.
            if present is not signal.SIG_IGN or signum in (signal.SIGCHLD, signal.SIGTERM):
                previous[signum] = present
                signal.signal(signum, self._on_signal)
        unblocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, previous)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
            for signum, handler in previous.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
            os.close(self._wake_read)
            os.close(self._wake_write)

    def _on_signal(self, signum: int, frame: object) -> None:
        self._wake(signum)

    def _wake(self, byte: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, bytes([byte]))

    def _on_wake(self) -> None:
        for byte in os.read(self._wake_read, 4096):
            if byte in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                self._on_stop_signal(signal.Signals(byte).name)
        while self._news:
            self._alone_waiting = self._news.popleft() > 0
        while self._asked:
            self._on_asked(*self._asked.popleft())

    def _on_stop_signal(self, name: str) -> None:
        now = time.monotonic()
        if self._stopping_since is None:
            self._stopping_since = now
            self._begin_drain(name)
        elif now > self._stopping_since + ECHO:
            logger.warning("%s again: ending at once; running jobs go back to their queues", name)
            self._exit_code = EXIT_INTERRUPTED
            for child in self._children():
                child.kill()

    def _begin_drain(self, name: str) -> None:
        drain = (self._store or self).settings.drain
        logger.info(
            "%s: draining; running jobs have %g s to end, then they go back to their queues. "
            "The same signal again gives them back at once",
            name,
            drain,
        )
        for seat in self._seats:
            seat.due = None
        for child in self._children():
            child.deadline = time.monotonic() + drain + DRAIN_MARGIN
            # One that still imports has nothing to drain, and simply ends.
            child.killed = not child.known
            child.terminate()

    def _tell_asked(self, worker: str, what: str) -> None:
        """In the beater's thread."""
        self._asked.append((worker, what))
        self._wake(0)

    def _on_asked(self, worker: str, what: str) -> None:
        """Somebody wants a worker to end. It is told with every beat, until it has."""
        child = next((child for child in self._children() if child.worker == worker), None)
        if child is None or child.asked == what or self._stopping_since is not None:
            return
        child.asked = what
        logger.info("%s is asked to %s (pid %d)", child.name, what, child.process.pid)
        if what == "drain":
            child.retire()
        elif what == "stop":
            child.seat.closed = True
            child.deadline = time.monotonic() + (self._store or self).settings.drain + DRAIN_MARGIN
            child.terminate()

    # Children

    def _children(self) -> list[_Child]:
        return [seat.child for seat in (*self._seats, self._extra) if seat.child is not None]

    def _start_due(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.due is not None and now >= seat.due:
                self._spawn(seat)
        if self._wants_extra() and now >= self._extra_after:
            logger.info("jobs wait to be run alone: starting a worker for them")
            self._alone_waiting = False
            self._spawn(self._extra)

    def _wants_extra(self) -> bool:
        # A child with one thread runs every job alone, and takes those first.
        return self._alone_waiting and self._extra.child is None and self._stopping_since is None and self.threads > 1

    def _spawn(self, seat: _Seat) -> None:
        seat.due = None
        seat.spawned += 1
        ours, theirs = socket.socketpair()
        board = Board.create()
        worker = uuid.uuid4().hex
        try:
            process = subprocess.Popen(
                interpreter_command("mlqueue.child", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                pass_fds=[fd for fd in (theirs.fileno(), board.fd) if fd is not None],
                env=environment_under(self.settings),
                # So that a terminal's Ctrl-C reaches the supervisor alone.
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            board.close_fd()
            logger.error("worker %d cannot be spawned: %s", seat.number, error)
            self._schedule(seat, LONGEST_PAUSE)
            return
        finally:
            theirs.close()
        with contextlib.suppress(OSError):  # one that has died already is seen by its exit
            ours.sendall(json.dumps(dataclasses.asdict(self._order(seat, worker, board))).encode() + b"\n")
        board.close_fd()
        ours.setblocking(False)
        seat.child = child = _Child(seat, worker, process, ours, board)
        self._selector.register(ours, selectors.EVENT_READ, functools.partial(self._on_message, child))

    def _order(self, seat: _Seat, worker: str, board: Board) -> Order:
        return Order(
            number=seat.number,
            worker=worker,
            supervisor=os.getpid(),
            modules=self.modules,
            namespace=self.namespace,
            threads=1 if seat.alone else self.threads,
            queues=self.queues,
            max_jobs=None if seat.alone else self.max_jobs,
            max_rss=None if seat.alone else self.max_rss,
            only_alone=seat.alone,
            kill_grace=self.settings.kill_grace,
            board=board.fd,
            log_level=self.settings.log_level,
        )

    def _on_message(self, child: _Child) -> None:
        said = False
        for message in child.messages():
            said = True
            self._on_event(child, message)
        if not said:
            # The end of the socket; that of the process follows.
            with contextlib.suppress(KeyError):
                self._selector.unregister(child.channel)

    def _on_event(self, child: _Child, message: dict[str, Any]) -> None:
        event = message["event"]
        if event == "app":
            child.known = True
            self._open_store(message["namespace"], message["settings"])
            self._count_living()
            logger.info(
                "%s: namespace %s, queues %s, actors %s",
                child.name,
                message["namespace"],
                ", ".join(message["queues"]) or "none",
                ", ".join(message["actors"]) or "none",
            )
        elif event == "ready":
            child.ready_at = time.monotonic()
            self._ever_ready = True
            logger.info("%s is ready after %.1f s (pid %d)", child.name, self._age(child), child.process.pid)
        elif event == "failed":
            child.failure = message["text"]
            self._boot_codes.add(message["exit_code"])
        elif event == "bye":
            child.bye, child.ran = message["reason"], message["ran"]
            child.deadline = time.monotonic() + BYE_MARGIN

    def _age(self, child: _Child) -> float:
        return time.monotonic() - child.spawned_at

    def _on_exit(self, child: _Child) -> None:
        """A child has ended: its jobs go back, and its seat gets another."""
        for message in child.messages():
            self._on_event(child, message)
        with contextlib.suppress(KeyError):
            self._selector.unregister(child.channel)
        child.close()
        if child.bye is None:
            child.kill_group()
        child.seat.child = None
        self._count_living()
        how = how_it_ended(child.process.returncode)
        self._release(child, how)
        if child.failure is not None:
            self._say_failure(child, child.failure)
        elif child.bye is None and not child.killed:
            logger.error("%s died (pid %d): %s", child.name, child.process.pid, how)
        else:
            logger.info("%s has ended (pid %d): %s", child.name, child.process.pid, child.bye or "killed")
        if self._stopping_since is None:
            self._replace(child, how)

    def _release(self, child: _Child, how: str) -> None:
        if self._beater is None or not child.known:
            return
        reason = "drain" if child.killed or child.bye not in (None, "broken") else "crash"
        self._beater.release(
            child.worker,
            reason,
            how,
            functools.partial(self._on_released, child.name),
            begun=child.board.begun(),
            dooms={doom.job_id: (doom.attempt, doom.why) for doom in child.dooms},
        )

    def _on_released(self, name: str, outcomes: dict[str, str]) -> None:
        """In the beater's thread."""
        if outcomes:
            logger.warning("jobs of %s: %s", name, in_words(outcomes))
        if "isolated" in outcomes.values():
            self._tell_waiting(1)

    def _tell_waiting(self, count: int) -> None:
        """In the beater's thread."""
        self._news.append(count)
        self._wake(0)

    def _replace(self, child: _Child, how: str) -> None:
        if child.seat.closed:
            logger.info("%s was asked to stop: its place stays empty", child.name)
            if not self._children() and all(seat.closed for seat in self._seats):
                self._stopping_since = time.monotonic()
        elif child.seat.alone:
            self._replace_extra(child)
        elif child.bye in ("recycle", "drain") or child.dooms:
            child.seat.failures = 0
            child.seat.due = time.monotonic()
        elif child.ready_at is None:
            if not self._ever_ready:
                self._hopeless.add(child.seat.number)
                if len(self._hopeless) == len(self._seats):
                    self._give_up(how)
                    return
            self._schedule(child.seat, restart_pause(child.seat.failures, worked=False))
        else:
            if time.monotonic() - child.ready_at >= HEALTHY_AFTER:
                child.seat.failures = 0
            self._schedule(child.seat, restart_pause(child.seat.failures, worked=True))

    def _replace_extra(self, child: _Child) -> None:
        if child.ran or (child.ready_at is not None and child.bye is None):
            # It got one, or died of one.
            self._extra_pause = 0.0
        else:
            self._extra_pause = min(max(FIRST_ALONE_PAUSE, 2 * self._extra_pause), LONGEST_ALONE_PAUSE)
        self._extra_after = time.monotonic() + max(self._extra_pause, FIRST_PAUSE)

    def _schedule(self, seat: _Seat, pause: float) -> None:
        seat.failures += 1
        seat.due = time.monotonic() + pause
        logger.info("worker %d starts again in %.1f s", seat.number, pause)

    def _say_failure(self, child: _Child, text: str) -> None:
        """Says why a child could not boot; what was said before only in short."""
        if text in self._failures:
            logger.error("%s could not start, for the same reason: %s", child.name, text.splitlines()[-1])
            return
        self._failures[text] = None
        logger.error("%s could not start:\n%s", child.name, text)

    def _give_up(self, how: str) -> None:
        why = "see above" if self._failures else how
        logger.critical("no worker could start (%s): correct that, and start again", why)
        self._exit_code = self._boot_codes.pop() if len(self._boot_codes) == 1 else 1
        self._stopping_since = time.monotonic()
        for seat in self._seats:
            seat.due = None
        for child in self._children():
            child.kill()

    # The store

    def _open_store(self, namespace: str, settings: dict[str, Any]) -> None:
        """Begins to look after the workers of the namespace that the first child has named."""
        if self._store is not None:
            return
        # From here on children work for this one, or not at all.
        self.namespace = namespace
        used = load_settings(settings)
        self._store = store = Store(Connector(used), namespace, used)
        self._beater = beater = Beater(
            store,
            self._beating,
            on_waiting=self._tell_waiting,
            watch=self._watch,
            vitals=self._measure,
            on_asked=self._tell_asked,
        )
        beater.order(functools.partial(release_lost, store))
        beater.start()

    def _count_living(self) -> None:
        known = [child for child in self._children() if child.known]
        self._living = tuple((child.worker, child.process.pid) for child in known)
        self._watched = tuple((child.watch, child.worker) for child in known)

    def _beating(self) -> list[str]:
        """The workers to beat for: a child that is stopped cannot work, and others may have its jobs. In the
        beater's thread."""
        return [worker for worker, pid in self._living if not is_stopped(pid)]

    def _measure(self) -> dict[str, dict[str, Any]]:
        """What each child takes: memory, and the processor since the last look. In the beater's thread."""
        found: dict[str, dict[str, Any]] = {}
        seats = {child.worker: child.seat for child in self._children()}
        measured = {}
        for worker, pid in self._living:
            now, taken, seat = time.monotonic(), usage(pid), seats.get(worker)
            if taken is None or seat is None:
                continue
            measured[worker] = now, taken
            then, before = self._measured.get(worker, (now, taken))
            cpu = (taken.cpu - before.cpu) / (now - then) if now > then else 0.0
            found[worker] = {
                "rss": taken.rss,
                "cpu": round(max(0.0, cpu), 3),
                "seat": seat.number,
                "restarts": seat.spawned - 1,
                "supervisor": os.getpid(),
            }
        self._measured = measured
        return found


def release_lost(store: Store) -> None:
    """Releases workers of this machine whose processes ended with nobody to see it: their supervisor died too."""
    for worker in store.workers():
        info = worker.info
        pid, born_at = info.get("pid"), info.get("born")
        if info.get("place") == place() and isinstance(pid, int) and born_at is not None and is_gone(pid, born_at):
            outcomes = store.release(worker.id, "stall", "its worker was lost together with its supervisor")
            logger.warning("worker %s (pid %d) was lost: %s", worker.id, pid, in_words(outcomes))


def environment_under(settings: Settings) -> dict[str, str]:
    """Ours, with the settings that were given as arguments: a process that has it reads its settings there."""
    environment = dict(os.environ)
    for described in settings.describe():
        if described.source == "argument":
            value = getattr(settings, described.name)
            environment[described.env] = "none" if value is None else str(value)
    return environment


def restart_pause(failures: int, *, worked: bool) -> float:
    """How long to wait, in seconds, before a child is started again that has failed so often before."""
    if not worked:
        return min(FIRST_PAUSE * 2.0 ** min(failures, 20), LONGEST_PAUSE)
    if failures < CRASHES:
        return min(FIRST_PAUSE * 2.0**failures, CRASH_PAUSE)
    return min(CRASH_PAUSE * 2.0 ** min(failures - CRASHES, 20), LONGEST_PAUSE)


def how_it_ended(code: int) -> str:
    """An exit code of `subprocess` in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = "unknown"
    return f"killed by signal {-code} ({name})"


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
