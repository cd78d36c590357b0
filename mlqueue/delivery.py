"""A job in the hands of a worker: Dramatiq's message proxy, and what the ack will make of it.

Everything that happens to the job between fetch and ack is noted here, and frozen into one `Settle` by `verdict`: its
result (encoded inside the actor call), a retry that a middleware asked for, jobs that hooks enqueued, its progress.
"""

from __future__ import annotations

import contextvars
import functools
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

import dramatiq
from dramatiq import Message, MessageProxy
from dramatiq.middleware import SkipMessage
from dramatiq.middleware.shutdown import Shutdown

from .job import DeadReason, JobError, NewJob, Result, seconds
from .store import Held, Settle
from .store.store import StoredResult, common_of, encode_result

#: The longest traceback that is kept, in characters: its end says what happened.
MAX_TRACEBACK: Final = 32_768

#: The longest text of an error that is kept.
MAX_ERROR: Final = 8_192

#: The delivery whose actor call or hooks run in this context; async actors see it too.
current_delivery: contextvars.ContextVar[Delivery | None] = contextvars.ContextVar("mlqueue_delivery", default=None)


class HandBack(BaseException):
    """Raised in a job to give it back to its queue without a strike."""


class Retry(dramatiq.Retry):
    """Raised in a job to have it retried, `delay` seconds from now; with None after the usual backoff."""

    def __init__(self, message: str = "", delay: float | timedelta | None = None) -> None:
        pause = seconds(delay, "delay")
        super().__init__(message, delay=None if pause is None else round(pause * 1000))


class Delivery(MessageProxy):
    """A message in hand, with what is to become of it."""

    def __init__(self, message: Message[Any], held: Held, broker: Any) -> None:
        super().__init__(message)
        self.held = held
        self.broker = broker
        #: What the actor call returned, encoded; None until it has.
        self.result: StoredResult | None = None
        #: Seconds until the retry that a middleware asked for; None when none did.
        self.retry_delay: float | None = None
        #: Jobs that hooks enqueued after the call; they are created by the settle, or never.
        self.spawned: list[NewJob] = []
        #: The group that this job completes, and its callbacks.
        self.group: tuple[str, list[NewJob]] | None = None
        #: Progress that has not been written yet: encoded value and note.
        self.progress: tuple[bytes, str] | None = None
        #: Why a middleware refused it before it ran.
        self.refusal: DeadReason | None = None
        self.skipped = False
        #: When a thread began with it (monotonic); None while it waits for one.
        self.begun_at: float | None = None
        #: Whether the actor call has begun: an actor that calls another one directly stores no result for it.
        self.entered = False
        #: Whether the job goes back to its queue: nothing that hooks do because it "succeeded" is of any effect.
        self.handed_back = False
        #: Whether the job has looked at ``stopping`` and seen it True.
        self.saw_stopping = False
        self.cancel_requested = threading.Event()
        #: The data for `CurrentJob`, made when the job first asks.
        self.context: Any = None

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
            return Settle.give_back(job_id, attempt, common_of(self.progress))
        if not failed and self.retry_delay is not None:
            return Settle.reschedule(job_id, attempt, self.retry_delay, self.error(), common)
        if not failed and self.skipped:
            return Settle.finish(job_id, attempt, encode_result(Result()), common)
        if not failed and self.result is not None and exception is None:
            return Settle.finish(job_id, attempt, self.result, common)
        return Settle.bury(job_id, attempt, self._reason(), self.error(), common)

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
            value = fn(*args, **kwargs)
        except HandBack:
            # Not passed on: Dramatiq would log it as a failure, and Retries count it.
            delivery.handed_back = True
            return None
        finally:
            disarm()
        if value is None and delivery.saw_stopping:
            delivery.handed_back = True
            return None
        result = Result.of(value)
        keep(delivery, result)
        return result.full

    return call


__all__ = ["Delivery", "HandBack", "Retry", "current_delivery", "describe", "storing"]
