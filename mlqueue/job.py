"""What a job is: its states and legal moves, the record that the store keeps of it, and its result.

Nothing here talks to the store; `mlqueue.store` reads and writes these, `mlqueue.handle.Job` is what users hold.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from collections.abc import Mapping
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final, NamedTuple, TypeGuard

from .errors import InvalidJob, JobNotFound
from .webhooks import Webhook

__all__ = [
    "MOVES",
    "Attempt",
    "DeadReason",
    "JobError",
    "JobRecord",
    "LogLine",
    "Metric",
    "NewJob",
    "Point",
    "Result",
    "SavedCheckpoint",
    "State",
    "Usage",
    "check_id",
    "id_in",
    "new_id",
]


class State(StrEnum):
    """Where a job stands. `mlqueue.job.MOVES` has the legal moves."""

    #: Waiting for a worker that can run it.
    QUEUED = "queued"
    #: Waiting for its time: a delay, or the backoff before a retry.
    SCHEDULED = "scheduled"
    #: In the hands of a worker.
    RUNNING = "running"
    #: Ended well; the result is kept for ``result_ttl``.
    SUCCEEDED = "succeeded"
    #: Ended for good without success: see `DeadReason`. Kept until it is retried or removed.
    DEAD = "dead"
    #: Ended because somebody cancelled it.
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Whether the job moves no further by itself."""
        return self in ENDED


#: The states that a job does not leave by itself.
ENDED: Final = frozenset({State.SUCCEEDED, State.DEAD, State.CANCELLED})

#: The legal moves. The scripts in ``store/lua`` check them; ``common.lua`` has the table with attempt and cancelling.
MOVES: Final[Mapping[State, frozenset[State]]] = {
    State.QUEUED: frozenset({State.RUNNING, State.CANCELLED, State.DEAD}),
    State.SCHEDULED: frozenset({State.QUEUED, State.CANCELLED}),
    State.RUNNING: frozenset(
        {State.SUCCEEDED, State.SCHEDULED, State.QUEUED, State.DEAD, State.CANCELLED},
    ),
    State.SUCCEEDED: frozenset(),
    State.DEAD: frozenset({State.QUEUED}),
    State.CANCELLED: frozenset({State.QUEUED}),
}


class DeadReason(StrEnum):
    """Why a job is dead."""

    #: It raised, and its retries were used up.
    FAILED = "failed"
    #: It ended its worker's process ``max_crashes`` times.
    CRASHED = "crashed"
    #: Its worker or its machine was lost ``max_stalls`` times.
    STALLED = "stalled"
    #: It was older than ``max_age`` when its turn came, or had not begun within its ``queue_timeout``.
    EXPIRED = "expired"
    #: Its message or its options are not what a job has.
    UNDECODABLE = "undecodable"
    #: The store would not take what it ended with.
    UNSTORABLE = "unstorable"
    #: A middleware refused it.
    REJECTED = "rejected"
    #: Workers of its queue are alive, and none has had its function in time.
    UNKNOWN_FUNCTION = "unknown_function"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobError:
    """An error as the worker saw it."""

    #: The qualified name of the exception's class, such as ``builtins.ValueError``.
    type: str
    #: ``str()`` of the exception.
    message: str
    #: The formatted traceback, its frames in the worker; empty when nothing was raised.
    traceback: str = ""

    @property
    def text(self) -> str:
        """The error as a traceback ends: ``ValueError: no such file``."""
        kind = self.type.removeprefix("builtins.")
        return f"{kind}: {self.message}" if kind and self.message else kind or self.message


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an attempt used, as its worker measured it. Attempts of less than a tenth of a second are not measured."""

    #: Seconds of processor time. Where the job ran `alone` those of its whole process, the threads and libraries that
    #: it used included; else those of the thread that ran it, and None where that is not known: of an async actor, and
    #: while it runs.
    cpu_seconds: float | None
    #: The most memory that the process had while the job ran, in bytes, whoever of several jobs took it.
    peak_memory: int | None
    #: The most memory of GPUs that the process was seen to have, in bytes; None without nvidia-ml-py or a GPU.
    gpu_memory: int | None
    #: Whether no other job ran in the process meanwhile.
    alone: bool


@dataclasses.dataclass(frozen=True, slots=True)
class LogLine:
    """A line of a job's log, or a message of several lines."""

    #: Its place among those of the job, from 0 on.
    number: int
    #: When it was written; Unix seconds, by the worker's clock.
    at: float
    #: The attempt that wrote it.
    attempt: int
    #: ``stdout``, ``stderr``, or ``logging``.
    stream: str
    #: The name of the level of what was logged: ``WARNING``; None for the other two.
    level: str | None
    text: str


class Point(NamedTuple):
    """A value of a metric."""

    step: int | float
    value: float
    #: When it was logged; Unix seconds, by the worker's clock.
    at: float


class Metric(NamedTuple):
    """A value of a metric, with the metric's name: as `Job.metrics` yields them while it follows."""

    name: str
    step: int | float
    value: float
    at: float


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SavedCheckpoint:
    """A checkpoint of a job, without its contents."""

    #: The attempt that saved it.
    attempt: int
    #: When; Unix seconds, by the server's clock.
    saved_at: float
    #: Bytes.
    size: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """A start of a job that did not end in success."""

    #: 1 for the first start.
    attempt: int
    #: The incarnation of the worker that ran it.
    worker: str
    #: When it was started and when it was given up; Unix seconds, by the server's clock.
    started_at: float
    ended_at: float
    #: ``failed``, ``crashed``, ``stalled``, or the reason for which the job was buried.
    outcome: str
    error: JobError | None
    #: How a limit of time ended it: ``interrupted`` (an exception was raised in it) or ``killed`` (with its process);
    #: None when none did.
    stage: str | None = None
    #: What it used; None where it was not measured.
    usage: Usage | None = None
    #: The checkpoint that it began from; None when there was none, or one that was imported.
    resumed_from: SavedCheckpoint | None = None


class CallbackState(StrEnum):
    """How the callback of a job stands."""

    #: The job has ended; it is to be delivered, or tried again.
    PENDING = "pending"
    #: The receiver has answered 2xx.
    DELIVERED = "delivered"
    #: It was given up: refused, or tried as often as it may be.
    FAILED = "failed"


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class CallbackAttempt:
    """A try to deliver a callback."""

    #: When it began; Unix seconds.
    at: float
    #: How long it took, in seconds.
    seconds: float
    #: The HTTP status of the answer; None when there was none.
    status: int | None
    #: What went wrong; empty when it was delivered.
    error: str
    #: The incarnation of the worker that tried.
    worker: str
    #: Of which event a webhook told; empty for the callback.
    event: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """What an actor returns to part a short result from a full one.

    ``short`` is what fits a status line or a callback's URL: None, a bool, a number or a text of at most 1,000
    characters. ``full`` is any value that the codec carries (see `mlqueue.codec`), bytes of any size included;
    ``content_type`` is the media type of those bytes. An actor that returns anything else gives its full result, and
    the short result is the same where it qualifies, else None.
    """

    short: bool | int | float | str | None = None
    full: Any = None
    content_type: str | None = None

    #: The longest text that is a short result.
    MAX_SHORT = 1000

    @classmethod
    def of(cls, value: object) -> Result:
        """The result that an actor's return value stands for."""
        if isinstance(value, Result):
            value._check()
            return value
        return cls(short=value if cls._qualifies(value) else None, full=value)  # type: ignore[arg-type]

    @classmethod
    def _qualifies(cls, value: object) -> bool:
        if isinstance(value, str):
            return len(value) <= cls.MAX_SHORT
        return value is None or isinstance(value, bool | int | float)

    def _check(self) -> None:
        if not self._qualifies(self.short):
            got = f"a str of {len(self.short)} characters" if isinstance(self.short, str) else type(self.short).__name__
            raise InvalidJob(
                f"Result(short=...): got {got}; a short result is None, a bool, a number or a str of at most "
                f"{self.MAX_SHORT:,} characters. Put the rest into Result(full=...)."
            )
        if self.content_type is not None and not _CONTENT_TYPE.fullmatch(self.content_type):
            raise InvalidJob(
                f"Result(content_type={self.content_type!r}): not a media type; write it as 'image/png' or "
                "'text/csv; charset=utf-8'."
            )


_CONTENT_TYPE: Final = re.compile(r"[\w.+-]+/[\w.+*-]+(\s*;[\x20-\x7e]*)?")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class NewJob:
    """A job as it is given to the store."""

    id: str
    queue: str
    actor: str
    #: Arguments and options, encoded: ``codec.encode([args, kwargs, options])``.
    body: bytes
    #: Lower runs first; from -1,000 to 1,000.
    priority: int = 0
    #: Seconds from now, by the server's clock; None to be queued at once.
    delay: float | None = None
    #: Unix seconds; None to be queued at once.
    eta: float | None = None
    #: Seconds for which record and result are kept after the end; None for ever.
    result_ttl: float | None = None
    #: The job that submitted this one.
    parent: str | None = None
    tags: tuple[str, ...] = ()
    #: The functions that a worker must know to run it (MLQ's listeners); part of the lane.
    functions: tuple[str, ...] = ()
    max_crashes: int | None = None
    max_stalls: int | None = None
    #: A URL to be fetched when it has ended.
    callback: str | None = None
    #: Where it is told of, and what.
    webhook: Webhook | None = None
    #: Seconds after which a running attempt is given up and the job started anew.
    job_timeout: float | None = None
    #: Seconds within which it is to begin, counted from when it is due; afterwards it is dead.
    queue_timeout: float | None = None
    #: With the same key only so many jobs of the actor run at a time as its ``concurrency`` says.
    concurrency_key: str | None = None
    #: Jobs of each value have their turn.
    fair_by: str | None = None
    #: Of the actor's jobs with this key there is one: while it waits (``queued``), until it has ended (``active``), or
    #: for so many seconds; another one is answered with it (``return``), is an error (``reject``) or ends it
    #: (``replace``).
    unique_key: str | None = None
    unique_for: str | float = "active"
    unique_policy: str = "return"

    @property
    def takes_turns(self) -> bool:
        """Whether it is to be told from other jobs of its actor when one is chosen to be started."""
        return self.concurrency_key is not None or self.fair_by is not None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """What the store knows of a job. Times are Unix seconds by the server's clock."""

    id: str
    state: State
    queue: str
    actor: str
    created_at: float
    priority: int = 0
    #: How often it has been started. Never goes down; what an older attempt writes is refused.
    attempt: int = 0
    #: How often it was put back after an error of its own.
    retries: int = 0
    #: How often its worker's process died with it.
    crashes: int = 0
    #: How often its worker or machine was lost.
    stalls: int = 0
    #: When it is due, while it is scheduled.
    due_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    #: The incarnation of the worker that holds it or held it last.
    worker: str | None = None
    #: What it reported last: a number or a text; None before it has.
    progress: int | float | str | None = None
    progress_note: str | None = None
    #: Jobs ahead of it in its queue (0: it is next); None unless it is queued.
    position: int | None = None
    #: When cancelling was asked for.
    cancel_requested_at: float | None = None
    dead_reason: DeadReason | None = None
    error: JobError | None = None
    parent: str | None = None
    tags: tuple[str, ...] = ()
    #: Seconds for which it is kept after its end; None for ever.
    result_ttl: float | None = None
    has_checkpoint: bool = False
    short_result: bool | int | float | str | None = None
    content_type: str | None = None
    #: Attempts that did not succeed, oldest first; at most 50.
    attempts: tuple[Attempt, ...] = ()
    #: The functions that it is for (MLQ's listeners); empty for an actor's job, and where all are to run.
    functions: tuple[str, ...] = ()
    #: How often it was given up because it ran longer than its timeout.
    timeouts: int = 0
    #: Its own timeout in seconds; None when it has none (a reaper may bind one to the namespace).
    job_timeout: float | None = None
    #: Within how many seconds it was to begin; None when it may wait for ever.
    queue_timeout: float | None = None
    #: By how many seconds its running attempt, or the last one, was prolonged.
    extended_by: float = 0.0
    #: Its own ``max_crashes`` and ``max_stalls``; None where the settings' count.
    max_crashes: int | None = None
    max_stalls: int | None = None
    #: The id of the job that it waits for now.
    waits_for: str | None = None
    #: How its cancelling ended it: ``waiting`` (it never ran), ``raised`` (it was stopped), ``ended`` (it had ended by
    #: itself by then), ``killed`` (with its process), ``lost`` (its worker was); None unless it is cancelled.
    cancel_stage: str | None = None
    #: The slots of each resource that it holds, while it runs.
    slots: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    #: What jobs of its actor are limited by, and what they take turns by; None for one that has none.
    concurrency_key: str | None = None
    fair_by: str | None = None
    #: What it is the only one of.
    unique_key: str | None = None
    #: The URL that is fetched when it has ended, and how that stands; with the full record only.
    callback: str | None = None
    callback_state: CallbackState | None = None
    callback_attempts: tuple[CallbackAttempt, ...] = ()
    #: What the last attempt used, or uses; None where that was not measured.
    usage: Usage | None = None
    #: The checkpoint that the last attempt began from; None when there was none, or one that was imported.
    resumed_from: SavedCheckpoint | None = None
    #: When it will start, as it seems, of a job that waits; only where that was asked for (`Job.estimated_start`).
    estimated_start: float | None = dataclasses.field(default=None, compare=False)
    #: Where it is told of and what, and how the latest event stands; with the full record only.
    webhook: Webhook | None = None
    webhook_state: CallbackState | None = None

    @property
    def ahead(self) -> str:
        """How many jobs are ahead of it, as a part of a sentence; empty where there is none."""
        if not self.position:
            return ""
        return f", {self.position:,} job{'' if self.position == 1 else 's'} ahead of it"

    @property
    def short_text(self) -> str:
        """The short result as text, for where it has no type: ``str()`` of it, empty when there is none, and the first
        line of the error when the job is dead."""
        if self.state is State.DEAD:
            text = self.error.text.strip() if self.error is not None else ""
            return (text or str(self.dead_reason or "")).partition("\n")[0][: Result.MAX_SHORT]
        return "" if self.short_result is None else str(self.short_result)

    def asdict(self) -> dict[str, Any]:
        """The record as plain values, for JSON."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}


def _plain(value: object) -> Any:
    if isinstance(value, StrEnum):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return value


_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,128}")


def _is_id(job_id: object) -> TypeGuard[str]:
    return isinstance(job_id, str) and _ID.fullmatch(job_id) is not None


def check_id(job_id: object) -> str:
    """A job's id, checked: 1 to 128 of ``A-Z a-z 0-9 . _ -``."""
    if not _is_id(job_id):
        raise InvalidJob(
            f"job id {job_id!r}: an id is a str of 1 to 128 letters, digits, '.', '_' or '-'. "
            "Leave it out to get one that is unique."
        )
    return job_id


def id_in(namespace: str, job_id: object) -> str:
    """The id of a job that is asked for. Raises `JobNotFound` for what no job can have as an id, None for one."""
    if not _is_id(job_id):
        raise JobNotFound.of(job_id, namespace)
    return job_id


_id_lock = threading.Lock()
_last_id = 0


def new_id() -> str:
    """A new id: a UUID of version 7 as 32 hex digits. Time-ordered, within a process strictly; unguessable."""
    global _last_id
    # 48 bits of milliseconds and 12 of their fraction, then 62 random bits.
    ticks = time.time_ns() * 4096 // 1_000_000
    with _id_lock:
        _last_id = ticks = max(ticks, _last_id + 1)
    milliseconds, fraction = divmod(ticks, 4096)
    random = int.from_bytes(os.urandom(8), "big") >> 2
    return f"{milliseconds << 80 | 0x7 << 76 | fraction << 64 | 0b10 << 62 | random:032x}"


def seconds(value: float | timedelta | None, name: str) -> float | None:
    """A duration given as seconds or timedelta, in seconds; `name` is what the caller calls it."""
    if value is None:
        return None
    number = value.total_seconds() if isinstance(value, timedelta) else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 <= number < 1e11:
        raise InvalidJob(f"{name}={value!r}: a duration is a number of seconds (0 or more) or a timedelta.")
    return float(number)


def positive(value: float | timedelta, name: str) -> float:
    """As `seconds`, of a duration that must not be none."""
    number = seconds(value, name)
    if not number:
        raise InvalidJob(f"{name}={value!r}: it is a number of seconds (more than 0) or a timedelta.")
    return number


def timestamp(value: float | datetime | None, name: str) -> float | None:
    """A point in time given as Unix seconds or an aware datetime, in Unix seconds."""
    if value is None:
        return None
    if isinstance(value, datetime):
        if value.tzinfo is None:
            raise InvalidJob(
                f"{name}={value!r} has no time zone; write datetime(..., tzinfo=timezone.utc) or use .astimezone()."
            )
        return value.timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e11:
        raise InvalidJob(f"{name}={value!r}: a time is a number of Unix seconds or an aware datetime.")
    return float(value)
