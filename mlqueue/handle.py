"""`Job`: what a user holds of a job. A future with progress, from any process that can reach the store."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Generator, Iterable, Iterator
from datetime import timedelta
from typing import Any, Generic, Literal, Protocol, TypeVar, cast, overload

from . import codec
from .errors import InvalidJob, JobCancelled, JobFailed, MLQueueError, ResultTimeout
from .estimate import estimated_start
from .following import follow_log, follow_metrics, read_log
from .job import JobError, JobRecord, LogLine, Metric, Point, Result, State, positive, seconds
from .message import check_options
from .nested import await_end, wait_end
from .notebook import Bar
from .store import Store
from .store.store import Outcome
from .waiting import changes
from .why import Why, why

R_co = TypeVar("R_co", covariant=True)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class JobEvent:
    """A change of a job, as `Job.events` yields it."""

    #: ``state`` or ``progress``.
    kind: str
    state: State
    #: What the job reported last; None before it has.
    progress: int | float | str | None
    note: str | None
    #: Which start of the job this is.
    attempt: int


class Look(Protocol):
    """What somebody who looked at a job saw of it: as `JobRecord`."""

    @property
    def state(self) -> State: ...

    @property
    def attempt(self) -> int: ...

    @property
    def progress(self) -> int | float | str | None: ...

    @property
    def progress_note(self) -> str | None: ...


def events_of(looks: Iterable[Look]) -> Iterator[JobEvent]:
    """The changes of a job from one look to the next; the first has its state."""
    last: tuple[State, int] | None = None
    shown: tuple[object, object] = (None, None)
    for look in looks:
        if (look.progress, look.progress_note) != shown:
            shown = (look.progress, look.progress_note)
            if last is not None and not look.state.ended:
                yield _event("progress", look)
        if (look.state, look.attempt) != last:
            last = (look.state, look.attempt)
            yield _event("state", look)


def _event(kind: str, look: Look) -> JobEvent:
    return JobEvent(kind=kind, state=look.state, progress=look.progress, note=look.progress_note, attempt=look.attempt)


def check_tail(tail: int) -> int:
    """How many of the last lines of a log are asked for, checked."""
    if not isinstance(tail, int) or isinstance(tail, bool) or tail < 1:
        raise InvalidJob(f"logs(tail={tail!r}): how many of the last lines is an int, 1 or more; None is all.")
    return tail


def refuse_on_event_loop(method: str) -> None:
    """Raises `MLQueueError` in a coroutine, where this method of a job would block all others."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise MLQueueError(f"Job.{method}() would block the event loop; write `await job` there.")


class Job(Bar, Generic[R_co]):
    """A job in the store. Holds its id only: every property asks the store anew (`record` asks for all at once)."""

    def __init__(self, store: Store, job_id: str) -> None:
        self._store = store
        #: The job's id.
        self.id = job_id

    @property
    def record(self) -> JobRecord:
        """Everything that the store knows of the job. Raises `JobNotFound`."""
        return self._store.record(self.id)

    @property
    def state(self) -> State:
        """Where the job stands. Raises `JobNotFound`."""
        return self._brief().state

    @property
    def progress(self) -> int | float | str | None:
        """What the job reported last; None before it has."""
        return self._brief().progress

    @property
    def position(self) -> int | None:
        """How many jobs are ahead of it in its queue (0: it is next); None unless it is queued."""
        return self._brief().position

    @property
    def estimated_start(self) -> float | None:
        """When the job will start, as it seems from how long jobs have run so far: Unix seconds, by the store's clock.
        None for one that has started, and where it cannot be told: no worker can run it, or one of the jobs before it
        is of an actor that has never run. What is assumed, `mlqueue.estimate` says."""
        return estimated_start(self._store, self.id)

    @property
    def short_result(self) -> bool | int | float | str | None:
        """The short result; None while there is none. Does not load the full one."""
        return self._brief().short_result

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state.ended

    def _look(self) -> JobRecord:
        record = self._brief()
        waits = record.state in (State.QUEUED, State.SCHEDULED)
        return dataclasses.replace(record, estimated_start=self.estimated_start) if waits else record

    def _brief(self) -> JobRecord:
        return self._store.record(self.id, full=False)

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Waits until the job has ended; False when `timeout` seconds pass first."""
        refuse_on_event_loop("wait")
        return wait_end(self._store, self.id, seconds(timeout, "timeout")) is not None

    def result(self, timeout: float | timedelta | None = None) -> R_co:
        """Waits for the job and returns its full result.

        Raises `JobFailed` (with the worker's traceback in ``remote_traceback`` and in its notes) when it is dead,
        `JobCancelled`, `ResultTimeout` after `timeout` seconds (None: waits for ever), `JobNotFound`.

        Inside a job it may be called too: the worker runs the other one meanwhile, or further jobs. There it raises
        `WaitCycle` for a job that waits for this one, or is an ancestor of it.
        """
        return cast(R_co, self.full_result(timeout).full)

    def full_result(self, timeout: float | timedelta | None = None) -> Result:
        """As `result`, but the whole `Result`: short, full and content type."""
        refuse_on_event_loop("result")
        end = wait_end(self._store, self.id, seconds(timeout, "timeout"))
        if end is None:
            raise self._timed_out(timeout)
        if end[:1] == b"s" and len(end) > 1:
            return Result(*codec.decode(end[1:]))  # small enough to have come with the news
        return self._open(self._store.outcome(self.id))

    def exception(self, timeout: float | timedelta | None = None) -> JobFailed | None:
        """Waits for the job; what `result` would raise, or None when it succeeded."""
        if not self.wait(timeout):
            raise self._timed_out(timeout)
        outcome = self._store.outcome(self.id)
        return None if outcome.state is State.SUCCEEDED else self._failure(outcome)

    def events(self, timeout: float | timedelta | None = None) -> Iterator[JobEvent]:
        """Yields the job's changes, from how it stands now to its end; the last event has an ended state.

        Changes that follow each other faster than they are read are yielded as one. Stops after `timeout` seconds.
        """
        refuse_on_event_loop("events")
        return events_of(self._brief() for _ in changes(self._store, self.id, seconds(timeout, "timeout")))

    @overload
    def metrics(self, *, follow: Literal[False] = False) -> dict[str, list[Point]]: ...

    @overload
    def metrics(self, *, follow: Literal[True], timeout: float | timedelta | None = None) -> Iterator[Metric]: ...

    def metrics(
        self, *, follow: bool = False, timeout: float | timedelta | None = None
    ) -> dict[str, list[Point]] | Iterator[Metric]:
        """What the job has logged with `CurrentJob.log_metrics`: the points (step, value, at) of each metric by its
        name, oldest first. Of long series every second, fourth ... value is kept.

        With `follow` yields the values (name, step, value, at) that there are, and those to come, until the job has
        ended or `timeout` seconds have passed.
        """
        if not follow:
            return self._store.metrics(self.id).points
        refuse_on_event_loop("metrics")
        return follow_metrics(self._store, self.id, seconds(timeout, "timeout"))

    @overload
    def logs(self, *, follow: Literal[False] = False, tail: int | None = None) -> list[LogLine]: ...

    @overload
    def logs(
        self, *, follow: Literal[True], tail: int | None = None, timeout: float | timedelta | None = None
    ) -> Iterator[LogLine]: ...

    def logs(
        self, *, follow: bool = False, tail: int | None = None, timeout: float | timedelta | None = None
    ) -> list[LogLine] | Iterator[LogLine]:
        """What the job has printed and logged, as far as it is kept: its last lines, at most `tail` of them.

        With `follow` yields those, and those to come, until the job has ended or `timeout` seconds have passed.
        """
        first = 0 if tail is None else -check_tail(tail)
        if not follow:
            return read_log(self._store, self.id, first)[0]
        refuse_on_event_loop("logs")
        return follow_log(self._store, self.id, first, seconds(timeout, "timeout"))

    def why(self) -> Why:
        """Why the job does not run: ``str()`` of it is a sentence. Raises `JobNotFound`."""
        return why(self._store, self.id)

    def cancel(self) -> State:
        """Asks for the end of the job: one that waits never runs; a running one is told. The state it was in."""
        return self._store.cancel(self.id)

    def extend(self, seconds: float | timedelta) -> None:
        """Gives the running job so much more time: ``time_limit``, ``hard_time_limit`` and ``job_timeout`` of this
        attempt are over that much later. Raises `InvalidTransition` for a job that does not run."""
        self._store.extend(self.id, positive(seconds, "extend"))

    def redeliver(self, url: str | None = None, *, webhook: str | None = None) -> None:
        """Has the callback of the ended job delivered again, and its webhook told of its end again.

        With `url` or `webhook` that one alone, to this URL. Raises `InvalidTransition` for a job that has not ended or
        has neither.
        """
        check_options({"callback": url, "webhook": webhook})
        self._store.redeliver(self.id, url or "", webhook or "")

    def retry(self) -> None:
        """Puts a dead or cancelled job back into its queue. Raises `InvalidTransition` for any other."""
        self._store.retry(self.id)

    def __await__(self) -> Generator[Any, None, R_co]:
        return self._await().__await__()

    async def _await(self) -> R_co:
        await await_end(self._store, self.id)
        outcome = await asyncio.to_thread(self._store.outcome, self.id)
        return cast(R_co, self._open(outcome).full)

    def _open(self, outcome: Outcome) -> Result:
        if outcome.result is None:
            raise self._failure(outcome)
        return outcome.result

    def _failure(self, outcome: Outcome) -> JobFailed:
        if outcome.state is State.CANCELLED:
            return JobCancelled(f"job {self.id} was cancelled.", job_id=self.id, reason="cancelled")
        error = outcome.error or JobError(type="", message="")
        return JobFailed(
            f"job {self.id} is dead ({outcome.reason}): {error.text}",
            job_id=self.id,
            reason=outcome.reason,
            error_type=error.type,
            remote_traceback=error.traceback,
        )

    def _timed_out(self, timeout: float | timedelta | None) -> ResultTimeout:
        record = self._brief()
        workers = "" if self._store.workers() else " No worker is alive: start one with `mlqueue worker MODULE`."
        return ResultTimeout(
            f"job {self.id} is {record.state}{record.ahead} after {seconds(timeout, 'timeout'):g} s; it goes on. "
            f"Wait again, or longer.{workers}"
        )

    def __repr__(self) -> str:
        return f"<Job {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and (self.id, self._store.root) == (other.id, other._store.root)

    def __hash__(self) -> int:
        return hash((self.id, self._store.root))


__all__ = ["Job", "JobEvent"]
