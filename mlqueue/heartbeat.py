"""Signs of life that do not depend on the worker's interpreter: a job that holds the GIL is not taken for dead.

`Beater` is the thread that renews leases, releases the jobs of the dead and takes part in the sweep of expired leases.
A supervisor runs one for its children. A process that has no supervisor (it embeds a Worker, or is run by the
``dramatiq`` CLI) gets a small process beside it for that: `HeartbeatHelper` starts it, `main` is what it runs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import random
import select
import signal
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from .board import Board
from .errors import StoreError
from .processes import interpreter_command, is_stopped
from .settings import Settings
from .store import Connector, Store

__all__ = ["Beater", "HeartbeatHelper", "dump_settings", "load_settings"]

logger = logging.getLogger("mlqueue.heartbeat")

#: How many times in a lease it is renewed.
BEATS_PER_LEASE: Final = 3

#: The shortest pause between two sweeps, in seconds.
SHORTEST_SWEEP: Final = 0.2

#: How much longer than a sweep's interval a sweeper stays elected, and the longest that it does, in seconds. After the
#: elected one has died the next must come before the store takes the gap (5 s) for a failure of its own.
ELECTED_LONGER: Final = 1.0
LONGEST_ELECTION: Final = 4.5

#: How long after the end of an election the others come, at random, in seconds.
ELECTION_JITTER: Final = (0.02, 0.2)

#: How often jobs are looked at that may have to be killed, in seconds.
WATCH_INTERVAL: Final = 1.0

#: The pause after a call that the store did not take, in seconds.
RETRY_PAUSE: Final = 0.5

#: How often a helper looks whether its parent is there, in seconds.
LOOK_INTERVAL: Final = 0.5

#: How long a helper tries to release its dead parent's jobs, in seconds.
LAST_WORDS: Final = 3.0

#: How long a helper has to end when it is told to, in seconds.
STOP_PATIENCE: Final = 2.0

#: The shortest and the longest pause before a helper that died is started again, in seconds.
RESTART_PAUSES: Final = (0.2, 30.0)

#: A helper ends with its host. A stop of a whole service signals both, and the host has jobs to finish first.
IGNORED: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

#: What the host writes to its helper when its worker has been stopped in order.
GOODBYE: Final = b"q"


class Beater:
    """A thread that looks after workers, in the store, from outside their interpreters.

    Parameters:
      store: The store of their namespace.
      living: Gives the workers whose leases are to be renewed now. Called in this thread.
      on_waiting: Told after each beat how many jobs wait to be run alone.
      watch: Called every second, in this thread; it may call the store.
      vitals: Measures what the processes of workers take; see `mlqueue.store.store.WorkerInfo`. Called in this thread.
      on_asked: Told of each worker of which something is asked, and what, again with every beat.
    """

    def __init__(
        self,
        store: Store,
        living: Callable[[], Iterable[str]],
        *,
        on_waiting: Callable[[int], None] = lambda count: None,
        watch: Callable[[], None] | None = None,
        vitals: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
        on_asked: Callable[[str, str], None] = lambda worker, what: None,
    ) -> None:
        self.store = store
        self._living = living
        self._on_waiting = on_waiting
        self._watch = watch
        self._watch_at = 0.0
        self._vitals = vitals
        self._on_asked = on_asked
        self._id = uuid.uuid4().hex
        self._condition = threading.Condition()
        self._orders: deque[Callable[[], None]] = deque()
        self._closing = False
        self._give_up_at = math.inf
        self._answering = True
        self._beat_at = self._sweep_at = 0.0
        self._thread = threading.Thread(target=self._run, name="mlqueue-beater", daemon=True)

    def start(self) -> None:
        """Begins."""
        self._thread.start()

    def order(self, action: Callable[[], None]) -> None:
        """Runs an action in this thread as soon as possible, again until the store has taken it."""
        with self._condition:
            self._orders.append(action)
            self._condition.notify_all()

    def release(
        self,
        worker: str,
        reason: str,
        detail: str,
        told: Callable[[dict[str, str]], None] = lambda outcomes: None,
        *,
        begun: Mapping[str, int] | None = None,
        dooms: Mapping[str, tuple[int, str]] | None = None,
    ) -> None:
        """Has the jobs of a worker that is gone released; `told` gets what became of each, in this thread. `begun` and
        `dooms` as for `Store.release`."""
        self.order(lambda: told(self.store.release(worker, reason, detail, begun=begun, dooms=dooms)))

    def watch_now(self) -> None:
        """Has `watch` called as soon as possible."""
        with self._condition:
            self._watch_at = 0.0
            self._condition.notify_all()

    def close(self, timeout: float) -> bool:
        """Carries out what was ordered and ends; False when that took longer than `timeout` seconds."""
        with self._condition:
            self._closing = True
            self._give_up_at = time.monotonic() + timeout
            self._condition.notify_all()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            if not self._carry_out():
                if time.monotonic() > self._give_up_at:
                    return
                pause = RETRY_PAUSE
            elif self._closing:
                return
            else:
                pause = self._look_after()
            with self._condition:
                if self._answering:
                    self._condition.wait_for(lambda: self._orders or self._closing or self._watch_is_due(), pause)
            if not self._answering:
                time.sleep(pause)

    def _carry_out(self) -> bool:
        """Does what was ordered, in order; False when the store does not take it now."""
        while True:
            with self._condition:
                if not self._orders:
                    return True
                action = self._orders[0]
            if not self._ask(action):
                return False
            with self._condition:
                self._orders.popleft()

    def _look_after(self) -> float:
        """Beats and sweeps if it is time to; how long there is nothing to do, in seconds."""
        now = time.monotonic()
        if now >= self._beat_at:
            beaten = self._ask(self._beat)
            self._beat_at = now + (self.store.settings.lease / BEATS_PER_LEASE if beaten else RETRY_PAUSE)
        if now >= self._sweep_at and not self._ask(self._sweep):
            self._sweep_at = time.monotonic() + RETRY_PAUSE
        if self._watch is not None and self._watch_is_due():
            self._watch_at = time.monotonic() + WATCH_INTERVAL
            self._ask(self._watch)
        due = min(self._beat_at, self._sweep_at, math.inf if self._watch is None else self._watch_at)
        return max(0.0, due - time.monotonic())

    def _watch_is_due(self) -> bool:
        return self._watch is not None and time.monotonic() >= self._watch_at

    def _beat(self) -> None:
        workers = list(self._living())
        if workers and self._vitals is None:
            self._on_waiting(self.store.beat(workers))
        elif workers and self._vitals is not None:
            tended = self.store.tend(workers, self._vitals())
            self._on_waiting(tended.waiting_alone)
            for worker, what in tended.asked.items():
                self._on_asked(worker, what)

    def _sweep(self) -> None:
        interval = self.store.settings.sweep_interval
        swept = self.store.sweep(self._id, min(interval + ELECTED_LONGER, LONGEST_ELECTION))
        wait = interval if swept.wait is None else swept.wait
        pause = min(max(wait, SHORTEST_SWEEP), interval) if swept.elected else wait + random.uniform(*ELECTION_JITTER)
        self._sweep_at = time.monotonic() + pause
        if swept.released:
            logger.warning("taken from workers without a sign of life, or given up: %s", in_words(swept.released))

    def _ask(self, action: Callable[[], None]) -> bool:
        """Runs something that calls the store; whether the store has answered."""
        try:
            action()
        except StoreError as error:
            if self._answering:
                logger.warning("the store does not answer; trying again until it does: %s", error)
            self._answering = False
            return False
        except Exception as error:  # noqa: BLE001 - this thread must go on, or live workers lose their jobs
            logger.error("unexpected %s while looking after workers: %s", type(error).__name__, error)
        else:
            if not self._answering:
                logger.info("the store answers again")
        self._answering = True
        return True


def in_words(outcomes: dict[str, str]) -> str:
    """What became of released jobs, for a line of the log."""
    fates = {
        "queued": "back in its queue",
        "isolated": "back in its queue, to be run alone",
        "dead": "dead",
        "cancelled": "cancelled",
    }
    told = [f"job {job} {fates.get(fate, fate)}" for job, fate in outcomes.items() if fate != "gone"]
    return "; ".join(told) or "no job"


class HeartbeatHelper:
    """Starts and stops the process that beats for a worker of this process.

    The helper has a pipe from this process and knows its id: when either says that this process is gone, it releases
    the worker's jobs at once, and ends.
    """

    def __init__(self, store: Store, worker: str, board: Board | None = None) -> None:
        self._store = store
        self._worker = worker
        self._board = board
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="mlqueue-heartbeat", daemon=True)

    def start(self) -> None:
        """Starts it, and again whenever it should die."""
        self._spawn()
        self._thread.start()

    def stop(self) -> None:
        """Ends it, without a release: whoever stops a worker in order does that. In a forked child nothing is done."""
        if os.getpid() != self._owner or self._stopping.is_set():
            return
        with self._lock:
            self._stopping.set()
            process = self._process
        if process is not None:
            _write(process, GOODBYE)
        self._thread.join(STOP_PATIENCE)
        if process is not None and self._thread.is_alive():
            process.kill()
        self._thread.join()

    def _spawn(self) -> None:
        board = None if self._board is None else self._board.fd
        order = {
            "settings": dump_settings(self._store),
            "namespace": self._store.namespace,
            "worker": self._worker,
            "parent": self._owner,
            "board": board,
        }
        with self._lock:
            self._process = None
            if self._stopping.is_set():
                return
            try:
                process = subprocess.Popen(
                    interpreter_command("mlqueue.heartbeat", ignoring=IGNORED),
                    bufsize=0,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=() if board is None else (board,),
                    start_new_session=True,
                )
            except OSError as error:
                logger.warning("the heartbeat of this worker cannot be started: %s", error)
                return
            self._process = process
        # The URL may hold a password, so not as an argument, which everybody can see.
        _write(process, json.dumps(order).encode() + b"\n", close=False)

    def _watch(self) -> None:
        """Waits for the helper, so that it is no zombie, and starts another when it died by itself."""
        pause, longest = RESTART_PAUSES
        while True:
            process, code = self._process, None
            started = time.monotonic()
            if process is not None:
                code = process.wait()
                _write(process, b"")
            if self._stopping.is_set():
                return
            if time.monotonic() > started + longest:
                pause = RESTART_PAUSES[0]
            if process is not None:
                logger.warning("the heartbeat of this worker ended (exit code %s); starting another", code)
            if self._stopping.wait(pause):
                return
            pause = min(2 * pause, longest)
            self._spawn()


def _write(process: subprocess.Popen[bytes], data: bytes, *, close: bool = True) -> None:
    assert process.stdin is not None
    with contextlib.suppress(OSError, ValueError):
        process.stdin.write(data)
    if close:
        with contextlib.suppress(OSError):
            process.stdin.close()


def dump_settings(store: Store) -> dict[str, Any]:
    """The settings of a store in use, as JSON has values, for another process."""
    settings = store.settings
    values = {
        setting.name: getattr(settings, setting.name)
        for setting in dataclasses.fields(settings)
        if setting.name != "sources"
    }
    embedded = store.connector.embedded
    # Found from the current folder, which may be another one there.
    home = embedded.home if embedded is not None else settings.home
    values["home"] = None if home is None else str(home)
    return values


def load_settings(values: dict[str, Any]) -> Settings:
    """The settings that another process dumped."""
    return Settings(**values)


# What the helper process runs


def main() -> None:
    """Beats for the parent's worker until the parent says goodbye, or is gone."""
    logging.raiseExceptions = False
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s [heartbeat] %(levelname)s %(name)s: %(message)s")
    line = _read_line()
    if line is not None:
        _serve(json.loads(line))


def _read_line() -> bytes | None:
    """The parent's order; None when it died before it gave one. Not a byte more is read than that."""
    line = b""
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        line += byte
    return line


def _serve(order: dict[str, Any]) -> None:
    settings = load_settings(order["settings"])
    store = Store(Connector(settings), order["namespace"], settings)
    worker, parent = order["worker"], order["parent"]
    board = None if order["board"] is None else Board(order["board"])
    beater = Beater(store, lambda: [] if is_stopped(parent) else [worker])
    beater.start()
    if _wait_for_end(parent):
        return

    def told(outcomes: dict[str, str]) -> None:
        if outcomes:
            logger.warning("process %d ended without stopping its worker: %s", parent, in_words(outcomes))

    begun = None if board is None else board.begun()
    beater.release(worker, "crash", "its process ended without stopping its worker", told, begun=begun)
    beater.close(LAST_WORDS)


def _wait_for_end(parent: int) -> bool:
    """Returns when the parent's worker has ended: whether the parent said goodbye."""
    sources = [0]
    while os.getppid() == parent:
        readable, _, _ = select.select(sources, [], [], LOOK_INTERVAL)
        if not readable:
            continue
        data = os.read(0, 64)
        if GOODBYE in data:
            return True
        if not data:
            # Its end of the pipe is closed: at its death, just before it ceases to be the parent; or by a program that
            # closes all descriptors, and lives.
            sources = []
            _wait_until(lambda: os.getppid() != parent, LOOK_INTERVAL)
    return False


def _wait_until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
