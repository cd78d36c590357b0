"""A job in the hands of a worker: Dramatiq's message proxy, and what the ack will make of it.

Everything that happens to the job between fetch and ack is noted here, and frozen into one `Settle` by `verdict`: its
result (encoded inside the actor call), a retry that a middleware asked for, jobs that hooks enqueued, its progress.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Final

import dramatiq
from dramatiq import Message, MessageProxy
from dramatiq.middleware import SkipMessage, TimeLimitExceeded
from dramatiq.middleware.shutdown import Shutdown
from dramatiq.middleware.threading import Interrupt, raise_thread_exception

from .board import Slot
from .interrupting import LOOK_EVERY, PATIENCE, importing
from .job import DeadReason, JobError, NewJob, Result, seconds
from .store import Held, Settle
from .store.chunks import BodyReference
from .store.store import StoredResult, common_of, encode_result

#: The longest traceback that is kept, in characters: its end says what happened.
MAX_TRACEBACK: Final = 32_768

#: The longest text of an error that is kept.
MAX_ERROR: Final = 8_192

#: The delivery whose actor call or hooks run in this context; async actors see it too.
current_delivery: contextvars.ContextVar[Delivery | None] = contextvars.ContextVar("mlqueue_delivery", default=None)


class HandBack(BaseException):
    """Raised in a job to give it back to its queue without a strike, to be run again in `delay` seconds."""

    def __init__(self, delay: float = 0.0) -> None:
        super().__init__()
        self.delay = delay


class Cancelled(Interrupt):
    """Raised in a running job when it is cancelled, and in one that has been taken from its worker. A BaseException:
    ``except Exception`` does not catch it. It is seen at the next line of Python: a call into C ends first, and so does
    an import, up to 30 seconds."""


class Retry(dramatiq.Retry):
    """Raised in a job to have it retried, `delay` seconds from now; with None after the usual backoff."""

    def __init__(self, message: str = "", delay: float | timedelta | None = None) -> None:
        pause = seconds(delay, "delay")
        super().__init__(message, delay=None if pause is None else round(pause * 1000))


class Delivery(MessageProxy):
    """A message in hand, with what is to become of it."""

    # Most of these stay as they are here in most jobs, so they cost no time where a delivery is made.

    #: What the actor call returned, encoded; None until it has.
    result: StoredResult | None = None
    #: Seconds until the retry that a middleware asked for; None when none did.
    retry_delay: float | None = None
    #: The group that this job completes, and its callbacks.
    group: tuple[str, list[NewJob]] | None = None
    #: Progress that has not been written yet: encoded value and note.
    progress: tuple[bytes, str] | None = None
    #: Why a middleware refused it before it ran.
    refusal: DeadReason | None = None
    skipped = False
    #: When a thread began with it (monotonic); None while it waits for one.
    begun_at: float | None = None
    #: Whether the actor call has begun: an actor that calls another one directly stores no result for it.
    entered = False
    #: Whether the job goes back to its queue: nothing that hooks do because it "succeeded" is of any effect.
    handed_back = False
    #: And when it is to be run again, in seconds from then.
    hand_back_delay = 0.0
    #: Whether the job has looked at ``stopping`` and seen it True.
    saw_stopping = False
    #: Whether somebody has asked to cancel it.
    cancel_requested = False
    #: Why `Cancelled` is to be raised in the job; empty when it is not.
    interrupt_reason = ""
    #: Whether it was, and the job heeded it: nothing that hooks do because it "succeeded" is of any effect.
    heeded = False
    #: How many jobs it waits for now.
    waits = 0
    #: The thread that runs it.
    thread: int | None = None
    #: Called, in whatever thread, when the job is to look up from its waiting for another job.
    wake_waiting: Callable[[], None] | None = None
    #: Where its supervisor sees that it has begun, and how long it may run; None when nobody looks there.
    slot: Slot | None = None
    #: By how many seconds its limits were prolonged, and of that what has been made known.
    extended_by = 0.0
    #: What the job shows of itself (`mlqueue.journal`), made when it first does.
    journal: Any = None
    #: Where the clocks stood when it began (`mlqueue.usage`); None before.
    clocks: Any = None
    #: The data for `CurrentJob`, made when the job first asks.
    context: Any = None

    _prolonged_by = 0.0
    _running_in: int | None = None

    def __init__(self, message: Message[Any], held: Held, broker: Any) -> None:
        super().__init__(message)
        self.takes(message)
        self.held = held
        self.broker = broker
        #: Jobs that hooks enqueued after the call; they are created by the settle, or never.
        self.spawned: list[NewJob] = []
        #: The process that it was delivered to: one that the job forks is another.
        self.process = os.getpid()
        # Held while an exception is raised: after `_leave` none can come any more.
        self._interrupting = threading.Lock()

    def takes(self, message: Message[Any]) -> None:
        """Its message, or the whole of it: what was in chunks has been fetched."""
        self._message = message
        # Dramatiq and its middleware ask for these some twenty times a job; through the proxy each costs a call.
        self.message_id = message.message_id
        self.queue_name = message.queue_name
        self.actor_name = message.actor_name
        self.args = message.args
        self.kwargs = message.kwargs
        self.options = message.options

    def __str__(self) -> str:
        # What Dramatiq logs of a message has its arguments in full.
        reference = BodyReference.of(self.held.body)
        return str(self._message) if reference is None else f"{self.actor_name}(<{reference.size:,} bytes>)"

    def cancel(self) -> None:
        """Somebody has asked to cancel the job. Called in any thread."""
        self.cancel_requested = True
        self.interrupt("the job was cancelled")

    def interrupt(self, reason: str) -> None:
        """Has `Cancelled` raised in the job: at once if it runs, else when it begins. Called in any thread."""
        with self._interrupting:
            if self.interrupt_reason:
                return
            self.interrupt_reason = reason
            wake = self.wake_waiting
            if wake is None and self._running_in is not None and not self._strike(PATIENCE):
                try:
                    threading.Thread(target=self._strike_later, name="mlqueue-interrupt", daemon=True).start()
                except RuntimeError:  # there are no more threads to be had
                    self._strike(0)
        if wake is not None:
            wake()

    def _strike(self, patience: float) -> bool:
        """Raises `Cancelled` in the job's thread, if it does not import something just now, or has long enough."""
        assert self._running_in is not None
        if patience > 0 and importing(self._running_in):
            return False
        raise_thread_exception(self._running_in, Cancelled)
        return True

    def _strike_later(self) -> None:
        until = time.monotonic() + PATIENCE
        done = False
        while not done:
            threading.Event().wait(LOOK_EVERY)
            with self._interrupting:
                # Who waits now has seen the reason before.
                done = (
                    self._running_in is None or self.wake_waiting is not None or self._strike(until - time.monotonic())
                )

    def extend_to(self, total: float) -> None:
        """Its limits are over `total` seconds later than they were at its start. Called in any thread."""
        with self._interrupting:
            self.extended_by = max(total, self.extended_by)
            if self._running_in is not None:
                self._prolong()

    def _prolong(self) -> None:
        by, self._prolonged_by = self.extended_by - self._prolonged_by, self.extended_by
        if by > 0:
            self.broker.prolong_time_limit(self, by)
            if self.slot is not None:
                self.slot.prolong(by, self.extended_by)

    def check_interrupt(self) -> None:
        """Raises `Cancelled` if that was asked for."""
        if self.interrupt_reason:
            raise Cancelled(self.interrupt_reason)

    @contextlib.contextmanager
    def waiting(self, wake: Callable[[], None]) -> Iterator[None]:
        """Within, an interruption calls `wake` instead of raising; who waits looks with `check_interrupt`."""
        with self._interrupting:
            self.wake_waiting = wake
        try:
            yield
        finally:
            with self._interrupting:
                self.wake_waiting = None

    def _enter(self) -> None:
        with self._interrupting:
            self._running_in = threading.get_ident()
            if self.extended_by:
                self._prolong()
        self.check_interrupt()

    def _leave(self) -> None:
        with self._interrupting:
            thread, self._running_in = self._running_in, None
            if self.slot is not None:
                self.slot.end()
            if self.interrupt_reason and thread is not None:
                # One that has not been seen yet must not strike what comes after the job.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)

    def error(self) -> JobError:
        """What went wrong, as it is kept on the record."""
        exception = self._exception
        if exception is None:
            return JobError(type="", message="the worker's thread ended without storing a result")
        return describe(exception)

    def verdict(self) -> Settle:
        """The settle of this attempt. Called by ack and nack, in the worker's thread, before the exception is
        cleared."""
        job_id, attempt = self.held.id, self.held.attempt
        exception, failed = self._exception, self.failed
        common = common_of(self.progress, self.spawned, self.group)
        if self.handed_back or isinstance(exception, Shutdown):
            # Whatever Retries has made of it: the worker ends, the job has not failed.
            return Settle.give_back(job_id, attempt, common_of(self.progress), delay=self.hand_back_delay)
        if self.heeded or isinstance(exception, Cancelled):
            return Settle.cancelled(job_id, attempt, common_of(self.progress))
        if not failed and self.retry_delay is not None:
            return Settle.reschedule(job_id, attempt, self.retry_delay, self.error(), common, stage=self._stage())
        if not failed and self.skipped:
            return Settle.finish(job_id, attempt, encode_result(Result()), common)
        if not failed and self.result is not None and exception is None:
            return Settle.finish(job_id, attempt, self.result, common)
        return Settle.bury(job_id, attempt, self._reason(), self.error(), common, stage=self._stage())

    def _stage(self) -> str:
        return "interrupted" if isinstance(self._exception, TimeLimitExceeded) else ""

    def _reason(self) -> DeadReason:
        if self.refusal is not None:
            return self.refusal
        if isinstance(self._exception, SkipMessage):
            return DeadReason.REJECTED
        return DeadReason.FAILED


def describe(exception: BaseException) -> JobError:
    """An exception as it is kept on a job's record."""
    lines = traceback.format_exception(exception)
    text = "".join(lines)
    if len(text) > MAX_TRACEBACK:
        text = "[...]\n" + text[-MAX_TRACEBACK:]
    kind = type(exception)
    try:
        message = str(exception)
    except Exception as error:  # noqa: BLE001 - a user's __str__ may do anything
        message = f"<str() of it raised {type(error).__name__}>"
    return JobError(
        type=f"{kind.__module__}.{kind.__qualname__}",
        message=_clean(message[:MAX_ERROR]),
        traceback=_clean(text),
    )


def _clean(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def storing(
    fn: Callable[..., Any], keep: Callable[[Delivery, Result], None], disarm: Callable[[], None]
) -> Callable[..., Any]:
    """The actor's function, wrapped so that in a worker its result is encoded inside the call, where an error is the
    job's error. Called anywhere else it is the bare function. `disarm` is called as soon as the function has ended: a
    time limit that struck later would end the worker's thread."""

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        delivery = current_delivery.get()
        if delivery is None or delivery.entered:
            return fn(*args, **kwargs)
        delivery.entered = True
        try:
            try:
                delivery._enter()
                value = fn(*args, **kwargs)
            finally:
                delivery._leave()
                disarm()
        except HandBack as back:
            # Not passed on: Dramatiq would log it as a failure, and Retries count it.
            delivery.handed_back, delivery.hand_back_delay = True, back.delay
            return None
        except Cancelled:
            # It may have struck in the middle of the two.
            delivery._leave()
            disarm()
            delivery.heeded = True
            return None
        if value is None and delivery.saw_stopping:
            delivery.handed_back = True
            return None
        result = Result.of(value)
        keep(delivery, result)
        return result.full

    return call


__all__ = ["Cancelled", "Delivery", "HandBack", "Retry", "current_delivery", "describe", "storing"]
