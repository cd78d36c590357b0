"""What a worker process runs that a supervisor has spawned: it imports the user's modules and works for their app.

Supervisor and child share a socket. On it the supervisor sends one line, the order (`Order`), and then nothing, unless
the child is to retire (`RETIRE`); that the socket ends says that the supervisor is gone. The child sends lines of JSON,
each with ``event``:

``app``      the modules are imported; the namespace, the settings of its store, queues and actors
``ready``    the worker has started
``limited``  the first job begins for which this process may have to be killed: its board is to be looked at
``failed``   it cannot boot; what to tell the user
``bye``      the worker has been stopped in order; why, and how many jobs it ran. Without it, an end is a crash
"""

from __future__ import annotations

import ctypes
import dataclasses
import faulthandler
import functools
import importlib
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import dramatiq
from dramatiq.middleware import Middleware

from . import listeners
from .app import MLQ, instances
from .board import Board
from .broker import StoreBroker
from .errors import MLQueueError, SettingsError, StoreError
from .heartbeat import dump_settings
from .processes import in_forks, resident_bytes

__all__ = ["EXIT_BOOT", "EXIT_BROKEN", "EXIT_RECYCLE", "RETIRE", "Order", "module_name"]

logger = logging.getLogger("mlqueue.worker")

#: Exit codes (of sysexits.h) of a child that could not boot, that lost a thread, and that wants to be replaced.
EXIT_BOOT: Final = 78
EXIT_BROKEN: Final = 70
EXIT_RECYCLE: Final = 75

#: What the supervisor sends a child that is to take no more jobs, and to end when those in hand have.
RETIRE: Final = b"retire\n"

#: How often a child looks at its memory, its threads, and what there is to do, in seconds.
LOOK_INTERVAL: Final = 0.5

#: How long a child that takes only jobs to be run alone waits for one, in seconds.
IDLE_LIMIT: Final = 2.0

#: prctl's option: the signal that this process gets when the thread that spawned it ends.
PR_SET_PDEATHSIG: Final = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Order:
    """What a supervisor tells a child."""

    #: Its place in the supervisor's row, from 1 on; for its log.
    number: int
    #: The worker incarnation that it is.
    worker: str
    #: The supervisor's process id.
    supervisor: int
    #: What to import, as the user typed it.
    modules: list[str]
    #: Which app to work for, where the modules have several.
    namespace: str | None
    threads: int
    #: The queues to serve; None for all.
    queues: list[str] | None
    max_jobs: int | None
    #: In bytes.
    max_rss: int | None
    #: Whether it takes only jobs to be run alone, and ends when there are none.
    only_alone: bool
    #: How long jobs have to end before their process is killed, in seconds; None for what the app's settings say.
    kill_grace: float | None = None
    #: The descriptor of the board on which it writes what it has in hand; None for none.
    board: int | None = None
    log_level: str


def main() -> None:
    """Runs a child. The one argument is the descriptor of the socket."""
    die_with_parent()
    channel = Channel(int(sys.argv[1]))
    order = channel.read_order()
    if order is None or os.getppid() != order.supervisor:
        os._exit(0)
    faulthandler.enable()
    name = f"worker {order.number}"
    logging.basicConfig(level=order.log_level, format=f"%(asctime)s [{name}] %(levelname)s %(name)s: %(message)s")
    child = Child(order, channel)
    channel.watch(child.on_supervisor_lost, child.retire)
    sys.exit(child.run())


def die_with_parent() -> None:
    """Has the kernel kill this process when its supervisor ends, even one that holds the GIL. Linux only."""
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        except (OSError, AttributeError) as error:
            logger.debug("prctl: %s", error)


class Channel:
    """This process's end of the socket."""

    def __init__(self, fd: int) -> None:
        # Programs that jobs start must not hold it open.
        os.set_inheritable(fd, False)
        self._socket = socket.socket(fileno=fd)
        self._lock = threading.Lock()

    def read_order(self) -> Order | None:
        """The supervisor's order; None when it is gone."""
        line = b""
        while not line.endswith(b"\n"):
            data = self._socket.recv(65_536)
            if not data:
                return None
            line += data
        return Order(**json.loads(line))

    def send(self, event: str, **fields: Any) -> None:
        """Tells the supervisor something. When it is gone, nobody needs to know."""
        line = json.dumps({"event": event, **fields}).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError as error:
            logger.debug("the supervisor cannot be told: %s", error)

    def watch(self, on_lost: Any, on_retire: Any) -> None:
        """Calls `on_lost` in a thread when the supervisor is gone, `on_retire` when it says anything."""

        def wait() -> None:
            try:
                while self._socket.recv(4096):
                    on_retire()
            except OSError as error:
                logger.debug("the supervisor's socket: %s", error)
            on_lost()

        threading.Thread(target=wait, name="mlqueue-supervisor-watch", daemon=True).start()


class Child:
    """A worker process from its boot to its end."""

    def __init__(self, order: Order, channel: Channel) -> None:
        self.order = order
        self.channel = channel
        self.app: MLQ | None = None
        self.jobs = JobCount(order.max_jobs, self._wake)
        self._terminated = False
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)

    def run(self) -> int:
        """Boots, works, stops; the exit code."""
        try:
            self.app = self._boot()
            worker = self._start(self.app)
        except BaseException as error:  # noqa: BLE001 - a module may raise anything, SystemExit too
            code = error.exit_code if isinstance(error, MLQueueError) else 1
            self.channel.send("failed", text=explain(error), exit_code=code)
            return EXIT_BOOT
        self.channel.send("ready")
        reason = self._work(self.app.broker, worker)
        logger.info("stopping: %s", reason)
        self._stop(self.app, worker)
        self.channel.send("bye", reason=reason, ran=self.jobs.count)
        return {"recycle": EXIT_RECYCLE, "broken": EXIT_BROKEN}.get(reason, 0)

    def retire(self) -> None:
        """Takes no more jobs, and ends when those in hand have. Called in another thread."""
        self.jobs.reached.set()
        if self.app is not None and self.app.broker.pump is not None:
            self.app.broker.pump.stop_fetching()
        self._wake()

    def on_supervisor_lost(self) -> None:
        """Gives the jobs back at once and ends the process, whatever it is doing. Called in another thread."""
        logger.critical("the supervisor is gone; this process ends")
        try:
            if self.app is not None:
                # Else it would fetch, as long as it lives, the jobs that it gives back.
                pump = self.app.broker.pump
                if pump is not None:
                    pump.stop_fetching()
                begun = None if pump is None else pump.begun()
                self.app.store.release(self.order.worker, "stall", "the supervisor of its worker was lost", begun=begun)
        except (StoreError, OSError) as error:
            logger.error("the jobs could not be given back; they will be when the lease ends: %s", error)
        finally:
            os._exit(1)

    def _boot(self) -> MLQ:
        sys.path.insert(0, str(Path.cwd()))
        listeners.works_already = True
        for typed in self.order.modules:
            import_typed(typed)
        return choose_app(instances(), self.order.namespace, self.order.modules)

    def _start(self, app: MLQ) -> dramatiq.Worker:
        broker, queues = app.broker, self.order.queues
        check_queues(broker, queues)
        self._handle_signals()
        board = None if self.order.board is None else Board(self.order.board)
        if board is not None:
            board.close_fd()
            board.on_limited = functools.partial(self.channel.send, "limited")
        broker.supervise(self.order.worker, only_alone=self.order.only_alone, board=board)
        if self.order.kill_grace is not None:
            broker.kill_grace = self.order.kill_grace
        broker.add_middleware(self.jobs)
        self.channel.send(
            "app",
            namespace=app.name,
            settings=dump_settings(app.store),
            queues=sorted(queues or broker.queues),
            actors=sorted(broker.actors),
        )
        broker.emit_after("process_boot")
        worker = dramatiq.Worker(broker, queues=set(queues) if queues else None, worker_threads=self.order.threads)
        worker.start()
        return worker

    def _work(self, broker: StoreBroker, worker: dramatiq.Worker) -> str:
        """Returns when the worker is to stop: why."""
        idle_since = time.monotonic()
        while True:
            busy = broker.pump is not None and bool(broker.pump.in_hand)
            now = time.monotonic()
            if busy:
                idle_since = now
            if self._terminated:
                return "drain"
            # The broker counts its threads when it fetches, which may be a while.
            if broker.broken.is_set() or not all(thread.is_alive() for thread in worker.workers):
                broker.broken.set()
                return "broken"
            if self.order.only_alone and now > idle_since + IDLE_LIMIT:
                return "idle"
            if self._is_used_up():
                self._let_jobs_end(broker)
                return "drain" if self._terminated else "recycle"
            self._sleep()

    def _is_used_up(self) -> bool:
        if self.jobs.reached.is_set():
            logger.info("%d jobs have run, max_jobs is %s; or it was asked to", self.jobs.count, self.order.max_jobs)
            return True
        size = resident_bytes() if self.order.max_rss is not None else None
        if size is None or self.order.max_rss is None or size <= self.order.max_rss:
            return False
        logger.info("%d MiB of memory are in use, max_rss is %d MiB", size >> 20, self.order.max_rss >> 20)
        return True

    def _let_jobs_end(self, broker: StoreBroker) -> None:
        """Nobody is in a hurry: running jobs see that the worker is stopping, and may go on as long as they like. Were
        they given back, one that takes much memory would be started again for ever."""
        pump = broker.pump
        if pump is None:
            return
        pump.stop_fetching()
        while pump.in_hand and not self._terminated and not broker.broken.is_set():
            self._sleep()

    def _stop(self, app: MLQ, worker: dramatiq.Worker) -> None:
        worker.stop(timeout=round(app.settings.drain * 1000))
        app.broker.close()

    def _sleep(self) -> None:
        readable, _, _ = select.select([self._wake_read], [], [], LOOK_INTERVAL)
        if readable:
            os.read(self._wake_read, 4096)

    def _wake(self) -> None:
        try:
            os.write(self._wake_write, b"\0")
        except BlockingIOError:
            pass  # it is awake

    def _handle_signals(self) -> None:
        signals = (signal.SIGTERM, signal.SIGINT)
        for signum in signals:
            signal.signal(signum, self._on_signal)

        def reset() -> None:
            for signum in signals:
                signal.signal(signum, signal.SIG_DFL)

        # Processes that jobs fork are not ours to drain: multiprocessing's terminate() must end them.
        in_forks(reset, signals)

    def _on_signal(self, signum: int, frame: object) -> None:
        # More than one may come: a platform that stops all processes of a container, and then the supervisor.
        self._terminated = True
        self._wake()


class JobCount(Middleware):
    """Counts the jobs that have run, and stops the fetching of more when they are enough."""

    def __init__(self, most: int | None, wake: Any) -> None:
        self.count = 0
        self.reached = threading.Event()
        self._most = most
        self._wake = wake
        self._lock = threading.Lock()

    def after_process_message(
        self, broker: Any, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        """One more."""
        with self._lock:
            self.count += 1
            if self._most is None or self.count != self._most:
                return
        if broker.pump is not None:
            broker.pump.stop_fetching()
        self.reached.set()
        self._wake()


def module_name(typed: str) -> str:
    """The name to import for what a user typed: ``tasks``, ``pkg.mod``, ``pkg.mod:mlq``, ``tasks.py``, ``pkg/mod.py``.

    For a path the folder from which its name counts is put on ``sys.path``: the current one, unless the file lies
    outside, or on a path that cannot be a name.
    """
    name = typed.partition(":")[0]
    if "/" not in name and not (name.endswith(".py") and Path(name).exists()):
        return name
    path = Path(name.rstrip("/")).resolve()
    try:
        parts = path.relative_to(Path.cwd()).with_suffix("").parts
    except ValueError:
        parts = ()
    if parts and all(part.isidentifier() for part in parts):
        return ".".join(parts)
    sys.path.insert(0, str(path.parent))
    return path.stem


def import_typed(typed: str) -> None:
    """Imports what a user typed. Raises `SettingsError` where there is no such module; what its code raises passes."""
    name = module_name(typed)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Not a module that theirs imports.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        typed_path = "/" in typed or typed.endswith(".py")
        missing = f"there is no {typed}" if typed_path else f"No module named {error.name!r}"
        raise SettingsError(
            f"{missing}, seen from {Path.cwd()}{'' if typed_path else ', nor is one installed'}. Give the module that "
            "declares your actors, as `tasks`, `package.module` or `tasks.py`, and start this in the folder that it "
            "is imported from."
        ) from None


def choose_app(apps: Sequence[MLQ], namespace: str | None, modules: Sequence[str]) -> MLQ:
    """The app to work for: the one with actors, or the one of that namespace."""
    where = " ".join(modules)
    if not apps:
        raise SettingsError(
            f"{where}: no mlqueue app is made there. Make one, `mlq = mlqueue.MLQ()`, above the actors, keep it in a "
            "variable of the module, and declare the actors with `@mlq.actor`."
        )
    found = [app for app in apps if app.broker.actors] or list(apps)
    if namespace is not None:
        found = [app for app in found if app.name == namespace]
        if not found:
            made = ", ".join(sorted({repr(app.name) for app in apps}))
            raise SettingsError(f"{where}: no app of the namespace {namespace!r} is made there; there are {made}.")
    names = sorted({app.name for app in found})
    if len(names) > 1:
        raise SettingsError(
            f"{where}: several apps are made there, {', '.join(map(repr, names))}, and a worker serves one. Choose it: "
            f"--namespace {names[0]}"
        )
    if len(found) > 1:
        raise SettingsError(
            f"{where}: {len(found)} apps of the namespace {names[0]!r} have actors, and a worker serves one. Make one "
            "MLQ() in a module of its own and import it where actors are declared."
        )
    return found[0]


def check_queues(broker: StoreBroker, queues: Sequence[str] | None) -> None:
    """Raises `SettingsError` for a queue that no actor declares: nothing would ever come from it."""
    unknown = sorted(set(queues or ()) - set(broker.queues))
    if unknown:
        raise SettingsError(
            f"--queues: no actor declares {', '.join(map(repr, unknown))}; declared are "
            f"{', '.join(map(repr, sorted(broker.queues))) or 'none'}."
        )


def explain(error: BaseException) -> str:
    """What to tell the user of a boot that failed: a sentence for our own errors, else the traceback of their code."""
    if isinstance(error, MLQueueError):
        return str(error)
    frame = error.__traceback__
    ours = (__file__, importlib.__file__)
    while frame is not None and (
        frame.tb_frame.f_code.co_filename in ours or frame.tb_frame.f_code.co_filename.startswith("<frozen importlib")
    ):
        frame = frame.tb_next
    return "".join(traceback.format_exception(type(error), error, frame)).rstrip()
