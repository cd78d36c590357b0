"""Limits of time: how old a job may be when it starts, and how long it may run."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from typing import Any, Final

import dramatiq.middleware
from dramatiq import Broker
from dramatiq.logging import get_logger
from dramatiq.middleware import SkipMessage, TimeLimitExceeded
from dramatiq.middleware.threading import raise_thread_exception

from ..delivery import Delivery
from ..interrupting import PATIENCE, importing
from ..job import DeadReason
from ..store import Store

#: How often running jobs are compared with their limits, in milliseconds.
INTERVAL_MS: Final = 100

#: The deadline of a thread whose clock does not run; later than any other, and not that of one which was interrupted.
PAUSED: Final = 1e300

#: How long the thread that compares them stays when there are none, in seconds.
LINGER: Final = 10


class AgeLimit(dramatiq.middleware.AgeLimit):
    """Dramatiq's ``max_age`` (ms), by the store's clock at both ends: nobody else's counts."""

    def __init__(self, store: Store, *, max_age: int | None = None) -> None:
        super().__init__(max_age=max_age)
        self.store = store

    def before_process_message(self, broker: Broker, message: Any) -> None:
        """Refuses a job that is too old: it is dead, reason ``expired``."""
        options = broker.get_actor(message.actor_name).options
        max_age = message.options.get("max_age") or options.get("max_age", self.max_age)
        if not max_age or self.store.now() * 1000 - message.message_timestamp < max_age:
            return
        message.fail()
        if isinstance(message, Delivery):
            message.refusal = DeadReason.EXPIRED
        raise SkipMessage(f"the job is older than its max_age of {max_age:,} ms")


class TimeLimit(dramatiq.middleware.TimeLimit):
    """Dramatiq's ``time_limit`` (ms), with no limit by default, that cannot hit a job which has already returned.

    `TimeLimitExceeded` is raised in the job's thread, so it is seen at the next bytecode: a call into C returns first.
    An import ends first, too, up to 30 seconds.
    """

    def __init__(self, *, time_limit: float = float("inf"), interval: int = INTERVAL_MS) -> None:
        super().__init__(time_limit=time_limit, interval=interval)
        self.deadlines = Deadlines(interval / 1000)

    def after_process_boot(self, broker: Broker) -> None:
        """Does nothing: the watching thread starts with the first limit, also in a process of the user's."""

    def before_process_message(self, broker: Broker, message: Any) -> None:
        """Sets the deadline of the job that this thread starts."""
        options = broker.get_actor(message.actor_name).options
        limit = message.options.get("time_limit") or options.get("time_limit", self.time_limit)
        if limit is not None and limit != float("inf"):
            self.deadlines.set(limit / 1000)
            if isinstance(message, Delivery) and message.slot is not None and message.slot.limited:
                message.slot.change(soft=time.monotonic() + limit / 1000, soft_limit=limit / 1000)

    def after_process_message(
        self, broker: Broker, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        """Clears it."""
        self.deadlines.clear()

    after_skip_message = after_process_message

    def pause(self, thread: int) -> Callable[[], None]:
        """Stops the clock of a thread's job; what starts it again."""
        return self.deadlines.pause(thread)

    def prolong(self, thread: int, by: float) -> None:
        """Gives a thread's job so many seconds more."""
        self.deadlines.prolong(thread, by)

    def disarm(self) -> None:
        """The actor call has returned: from here on the limit must not strike. Called in the job's thread."""
        self.deadlines.clear()


class _Pause:
    """A clock that does not run."""

    def __init__(self, left: float) -> None:
        #: What was left, in seconds.
        self.left = left
        #: How many have stopped it.
        self.count = 0


class Deadlines:
    """Threads and when each is to be interrupted."""

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self.logger = get_logger(__name__, type(self))
        self._deadlines: dict[int, float] = {}
        self._paused: dict[int, _Pause] = {}
        # Held while an exception is raised: after clear() has returned, none can come any more.
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._work = threading.Event()

    def set(self, limit: float) -> None:
        """Interrupts this thread `limit` seconds from now."""
        with self._lock:
            self._deadlines[threading.get_ident()] = time.monotonic() + limit
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._run, name="mlqueue-time-limit", daemon=True)
                self._thread.start()
        self._work.set()

    def pause(self, thread: int) -> Callable[[], None]:
        """Stops the clock of a thread; what starts it again, with the time that was left."""
        with self._lock:
            deadline = self._deadlines.get(thread)
            if deadline is None or deadline == float("inf"):
                return lambda: None
            if deadline != PAUSED:
                self._deadlines[thread] = PAUSED
                self._paused[thread] = _Pause(deadline - time.monotonic())
            pause = self._paused[thread]
            pause.count += 1

        def resume() -> None:
            with self._lock:
                pause.count -= 1
                # Another job may run in the thread by now.
                if pause.count == 0 and self._paused.get(thread) is pause:
                    del self._paused[thread]
                    self._deadlines[thread] = time.monotonic() + pause.left

        return resume

    def prolong(self, thread: int, by: float) -> None:
        """Interrupts a thread `by` seconds later; one that has been interrupted stays so."""
        with self._lock:
            if thread in self._paused:
                self._paused[thread].left += by
            elif thread in self._deadlines:
                self._deadlines[thread] += by

    def when(self, thread: int) -> float:
        """When a thread is interrupted (monotonic); infinite: not, or it has been; `PAUSED`: its clock does not run."""
        return self._deadlines.get(thread, float("inf"))

    def clear(self) -> None:
        """Takes the deadline of this thread back, and an interruption that is on its way."""
        thread = threading.get_ident()
        if thread not in self._deadlines:
            return
        with self._lock:
            self._paused.pop(thread, None)
            if self._deadlines.pop(thread, None) is None:
                return
        # Not yet raised, because this thread has not run a bytecode since; or already raised, then this does nothing.
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def _run(self) -> None:
        while self._work.wait(LINGER) or not self._ended():
            threading.Event().wait(self.interval)
            now = time.monotonic()
            with self._lock:
                for thread, deadline in self._deadlines.items():
                    if now >= deadline and (now >= deadline + PATIENCE or not importing(thread)):
                        self._deadlines[thread] = float("inf")
                        self.logger.warning("Time limit exceeded. Raising exception in worker thread %r.", thread)
                        raise_thread_exception(thread, TimeLimitExceeded)
                if not self._deadlines:
                    self._work.clear()

    def _ended(self) -> bool:
        with self._lock:
            if self._deadlines:
                return False
            self._thread = None
            return True
