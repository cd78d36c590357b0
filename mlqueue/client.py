"""Jobs over HTTP, as if the store were here: for notebooks and programs that reach the web server and nothing else.

::

    from mlqueue.client import Client

    client = Client("https://example.com/api", key="mlq_...")
    job = client.submit("train", 0.1, epochs=10)
    for event in job.events():
        print(event.state, event.progress)
    weights = job.result()      # arrays and bytes come back as they were returned

The server is `mlqueue web`, or any app that mounts the blueprint. What it raises is raised here, as in
`mlqueue.errors`; that it cannot be reached is `StoreUnavailable`, after the request has been made again for a while.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, Generic, Literal, TypeVar, cast, overload
from urllib.parse import parse_qs, urlsplit

from . import codec
from .client_events import Follow, Watch, number
from .client_http import BROKEN, Transport
from .errors import (
    FunctionNotFound,
    InvalidJob,
    InvalidTransition,
    JobFailed,
    ResultMissing,
    ResultTimeout,
    StoreUnavailable,
)
from .files import replacing
from .functions import DEFAULT_NAMESPACE, PostedFunction, read_signed, sign_function
from .handle import JobEvent, check_tail, events_of, refuse_on_event_loop
from .job import (
    Attempt,
    CallbackAttempt,
    CallbackState,
    DeadReason,
    JobError,
    JobRecord,
    LogLine,
    Metric,
    Point,
    Result,
    SavedCheckpoint,
    State,
    Usage,
    new_id,
    positive,
    seconds,
    timestamp,
)
from .limits import Limit
from .notebook import Bar
from .store import Page
from .webhooks import Webhook
from .why import Why

__all__ = ["Client", "Job"]

R_co = TypeVar("R_co", covariant=True)
T = TypeVar("T")

#: The media type of a result as the store keeps it: nothing is lost.
ENCODED: Final = "application/vnd.mlqueue.value"

#: Options of a job among the keywords of `Client.submit`: those that may be chosen over HTTP.
OPTIONS: Final = frozenset(
    {"callback", "delay", "hard_time_limit", "priority", "queue_timeout", "tags", "webhook"}
    | {"concurrency_key", "fair_by", "unique_key", "unique_for", "unique_policy"}
)

#: How many jobs one request submits.
BULK: Final = 500

#: How long one request waits for the end of a job, in seconds; for a coroutine, which may be cancelled, less.
WAIT: Final = 25.0
ASYNC_WAIT: Final = 5.0

#: Pauses between two looks at a job where the server does not wait, in seconds.
FIRST_LOOK: Final = 0.1
LONGEST_LOOK: Final = 2.0

#: How much of a result is read at a time, in bytes.
BLOCK: Final = 2**18


class Client:
    """The jobs of one namespace, over HTTP.

    Parameters:
      url: Where the server has its routes: ``http://localhost:5000`` of `mlqueue web`, or the prefix of a blueprint.
      key: An API key, which `mlqueue key new` prints. None where the server asks for none.
      timeout: How long the server may take for an answer, in seconds.
      patience: How long a request is made again while the server cannot be reached, in seconds.
    """

    def __init__(
        self,
        url: str,
        key: str | None = None,
        *,
        timeout: float | timedelta = 30.0,
        patience: float | timedelta = 30.0,
    ) -> None:
        self._http = Transport(url, key, seconds(timeout, "timeout") or 30.0, seconds(patience, "patience") or 0.0)

    def submit(self, actor_name: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Submits a job of an actor that is declared with ``http=True``. It exists when this returns.

        ``callback``, ``webhook``, ``delay``, ``queue_timeout`` and ``hard_time_limit`` (seconds), ``priority``,
        ``tags``, ``concurrency_key``, ``fair_by``, ``unique_key``, ``unique_for`` and ``unique_policy`` among the
        keywords are options of the job; where the actor has parameters of these names, `submit_many` tells them apart.
        Raises `InvalidArguments` with the path to what the actor does not take, `ActorNotFound`, `Forbidden`,
        `JobExists`, `EncodeError` ...
        """
        options = {name: kwargs.pop(name) for name in OPTIONS.intersection(kwargs)}
        body = {**_options(options), "args": list(args), "kwargs": kwargs}
        return Job(self, self._create(self._http.path("actors", actor_name), body)["id"])

    def submit_many(
        self, actor_name: str, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], **options: Any
    ) -> list[Job[Any]]:
        """Submits many jobs of an actor, some hundred with each request. Each call is a tuple of positional or a dict
        of keyword arguments; `options` are those of all the jobs."""
        chosen = {"actor": actor_name, **_options(options)}
        asked = [
            {**chosen, "kwargs": dict(call)} if isinstance(call, Mapping) else {**chosen, "args": list(call)}
            for call in calls
        ]
        jobs: list[Job[Any]] = []
        for start in range(0, len(asked), BULK):
            made = self._create("/jobs/bulk", {"jobs": asked[start : start + BULK]})
            jobs += [Job(self, item["id"]) for item in made["jobs"]]
        return jobs

    def post(
        self, msg: Any, callback: str | None = None, functions: Iterable[str] | None = None, **options: Any
    ) -> str:
        """Posts a message for MLQ's listeners, and returns the job's id; as `MLQ.post`. `job` makes a `Job` of it."""
        if isinstance(functions, str):
            raise InvalidJob(f"functions={functions!r}: give a list of names: functions=[{functions!r}].")
        names = None if functions is None else list(functions)
        body = {"msg": msg, "functions": names, **_options({**options, "callback": callback})}
        made: str = self._create("/jobs", body)["id"]
        return made

    def register_function(
        self, fn: Callable[..., Any], key: str, name: str | None = None, *, namespace: str = DEFAULT_NAMESPACE
    ) -> PostedFunction:
        """Signs a function with the signing key of the workers, and posts it to all of them; as
        `MLQ.register_function`. `namespace` is that of the server: it is signed, too."""
        signed = read_signed(sign_function(fn, key, name=name, namespace=namespace))
        made = self._http.json("POST", "/consumer", body=codec.encode_fields(signed, max_bytes=2**31), again=False)
        return _made(PostedFunction, made)

    def remove_function(self, name: str) -> bool:
        """Takes a posted function from all workers; whether it was there."""
        headers = {"Content-Type": "application/json"}
        try:
            body = json.dumps({"name": name}).encode()
            self._http.json("DELETE", "/consumer", body=body, headers=headers, again=False)
        except FunctionNotFound:
            return False
        return True

    def functions(self) -> list[PostedFunction]:
        """The functions that have been posted, in the order in which they run."""
        return [_made(PostedFunction, item) for item in self._http.json("GET", "/functions")["functions"]]

    def _create(self, path: str, body: Mapping[str, Any]) -> Any:
        encoded = codec.encode_fields(body, max_bytes=2**31)
        return self._http.json("POST", path, body=encoded, headers={"Idempotency-Key": new_id()})

    def job(self, job_id: str) -> Job[Any]:
        """The job of this id. Raises `JobNotFound` when there is none."""
        job: Job[Any] = Job(self, job_id)
        _ = job.record
        return job

    def jobs(
        self,
        *,
        state: State | str | Iterable[State | str] | None = None,
        actor: str | None = None,
        queue: str | None = None,
        tag: str | None = None,
        since: float | datetime | None = None,
        until: float | datetime | None = None,
        cursor: int | None = None,
        limit: int = 50,
    ) -> Page:
        """A page of records, newest first; as `MLQ.jobs`."""
        states = [state] if isinstance(state, str) else None if state is None else list(state)
        path = self._http.path(
            "jobs",
            state=states and [str(one) for one in states],
            actor=actor,
            queue=queue,
            tag=tag,
            since=timestamp(since, "since"),
            until=timestamp(until, "until"),
            cursor=cursor,
            limit=limit,
        )
        page = self._http.json("GET", path)
        following = parse_qs(urlsplit(page["next"] or "").query).get("cursor")
        return Page([_record_of(item) for item in page["jobs"]], int(following[0]) if following else None)

    def wait(self, jobs: Iterable[Job[Any] | str], timeout: float | timedelta | None = None) -> bool:
        """Waits until all these jobs (or ids) have ended, well or not; False when `timeout` seconds pass first."""
        deadline = _deadline(timeout)
        handles = [Job(self, job) if isinstance(job, str) else job for job in jobs]
        return all(job.wait(_remaining(deadline)) for job in handles)

    def limits(self) -> list[Limit]:
        """The limits; as `mlq.limits.list`."""
        found = self._http.json("GET", self._http.path("limits"))["limits"]
        return [_made(Limit, members) for members in found]

    def set_limit(self, name: str, capacity: int | None) -> int:
        """Sets how many slots a resource has, or with ``@`` and its name an actor; None: what settings or the actor
        say. How many it has now. Needs the scope admin."""
        path = self._http.path("limits", name)
        if capacity is None:
            answer = self._http.json("DELETE", path)
        else:
            headers = {"Content-Type": "application/json"}
            answer = self._http.json("PUT", path, body=json.dumps({"capacity": capacity}).encode(), headers=headers)
        slots: int = answer["capacity"]
        return slots

    def close(self) -> None:
        """Closes the connections that are open. The client may be used again."""
        self._http.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Client of {self._http.url}>"


class Job(Bar, Generic[R_co]):
    """A job behind a web server: as `mlqueue.Job`, each property asks the server anew."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self._http = client._http
        #: The job's id.
        self.id = job_id

    @property
    def record(self) -> JobRecord:
        """Everything that is known of the job. Raises `JobNotFound`."""
        return _record_of(self._http.json("GET", self._path()))

    def _look(self) -> JobRecord:
        return self.record

    @property
    def state(self) -> State:
        """Where the job stands. Raises `JobNotFound`."""
        return self.record.state

    @property
    def progress(self) -> int | float | str | None:
        """What the job reported last; None before it has."""
        return self.record.progress

    @property
    def position(self) -> int | None:
        """How many jobs are ahead of it in its queue (0: it is next); None unless it is queued."""
        return self.record.position

    @property
    def estimated_start(self) -> float | None:
        """When the job will start, as it seems from how long jobs have run so far; as `mlqueue.Job.estimated_start`."""
        return self.record.estimated_start

    @property
    def short_result(self) -> bool | int | float | str | None:
        """The short result; None while there is none. Does not load the full one."""
        return self.record.short_result

    @property
    def done(self) -> bool:
        """Whether the job has ended, well or not."""
        return self.state.ended

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Waits until the job has ended; False when `timeout` seconds pass first."""
        refuse_on_event_loop("wait")
        return self._wait(_deadline(timeout)).state.ended

    def result(self, timeout: float | timedelta | None = None) -> R_co:
        """Waits for the job and returns its full result, as the actor returned it.

        Raises `JobFailed` (with the worker's traceback in ``remote_traceback`` and in its notes) when it is dead,
        `JobCancelled`, `ResultTimeout` after `timeout` seconds (None: waits for ever), `JobNotFound`.
        """
        return cast(R_co, self.full_result(timeout).full)

    def full_result(self, timeout: float | timedelta | None = None) -> Result:
        """As `result`, but the whole `Result`: short, full and content type."""
        refuse_on_event_loop("result")
        return self._open(self._ended(timeout))

    def download(self, path: str | Path, timeout: float | timedelta | None = None) -> int:
        """Waits for the job and writes its full result to a file, whole or not at all, without holding it in memory:
        bytes and text as they are, an array as .npy, anything else as JSON. How many bytes.

        A download that is interrupted goes on where it was. Raises as `result`.
        """
        refuse_on_event_loop("download")
        self._check(self._ended(timeout))
        with replacing(Path(path)) as file:
            return self._download(file.write)

    def exception(self, timeout: float | timedelta | None = None) -> JobFailed | None:
        """Waits for the job; what `result` would raise, or None when it succeeded."""
        refuse_on_event_loop("exception")
        try:
            self._check(self._ended(timeout))
        except JobFailed as failure:
            return failure
        return None

    def events(self, timeout: float | timedelta | None = None) -> Iterator[JobEvent]:
        """Yields the job's changes, from how it stands now to its end; the last event has an ended state.

        They come over a stream, which is opened again where it ended when it breaks; from a server without streams, or
        behind a proxy that holds them back, the job is asked for every now and then. Stops after `timeout` seconds.
        """
        refuse_on_event_loop("events")
        return events_of(Watch(self._http, self._path(), _deadline(timeout)))

    @overload
    def metrics(self, *, follow: Literal[False] = False) -> dict[str, list[Point]]: ...

    @overload
    def metrics(self, *, follow: Literal[True], timeout: float | timedelta | None = None) -> Iterator[Metric]: ...

    def metrics(
        self, *, follow: bool = False, timeout: float | timedelta | None = None
    ) -> dict[str, list[Point]] | Iterator[Metric]:
        """What the job has logged with `CurrentJob.log_metrics`; as `mlqueue.Job.metrics`."""
        if not follow:
            return _points_of(self._http.json("GET", self._path("metrics")))
        refuse_on_event_loop("metrics")
        return self._new_metrics(_deadline(timeout))

    def _new_metrics(self, deadline: float | None) -> Iterator[Metric]:
        at = 0.0
        for part in Follow(self._http, self.id, "metrics", deadline):
            found = _points_of(part)
            new = [Metric(name, *point) for name, points in found.items() for point in points if point.at > at]
            for metric in sorted(new, key=lambda one: one.at):
                at = metric.at
                yield metric

    @overload
    def logs(self, *, follow: Literal[False] = False, tail: int | None = None) -> list[LogLine]: ...

    @overload
    def logs(
        self, *, follow: Literal[True], tail: int | None = None, timeout: float | timedelta | None = None
    ) -> Iterator[LogLine]: ...

    def logs(
        self, *, follow: bool = False, tail: int | None = None, timeout: float | timedelta | None = None
    ) -> list[LogLine] | Iterator[LogLine]:
        """What the job has printed and logged, as far as it is kept; as `mlqueue.Job.logs`."""
        begin = {} if tail is None else {"tail": check_tail(tail)}
        if follow:
            refuse_on_event_loop("logs")
            parts = Follow(self._http, self.id, "logs", _deadline(timeout), begin)
            return (LogLine(**line) for part in parts for line in part.get("lines", ()))
        lines: list[LogLine] = []
        while True:
            part = self._http.json("GET", self._http.path("jobs", self.id, "logs", **begin))
            lines += [LogLine(**line) for line in part["lines"]]
            if "tail" in begin or not part["lines"]:
                return lines
            begin = {"first": part["next"]}

    def why(self) -> Why:
        """Why the job does not run; as `mlqueue.Job.why`."""
        found = self._http.json("GET", self._path("why"))
        return _made(Why, found, held_by=tuple(found["held_by"]))

    def cancel(self) -> State:
        """Asks for the end of the job: one that waits never runs; a running one is told. The state that it is in then:
        ``running`` until it has been told, ``cancelled``, or the one in which it had ended before."""
        try:
            return _record_of(self._http.json("POST", self._path("cancel"))).state
        except InvalidTransition:
            return self.state

    def extend(self, seconds: float | timedelta) -> None:
        """Gives the running job so much more time, as `mlqueue.Job.extend` does. Raises `InvalidTransition` for one
        that does not run."""
        body = json.dumps({"seconds": positive(seconds, "extend")}).encode()
        headers = {"Content-Type": "application/json"}
        self._http.json("POST", self._path("extend"), body=body, headers=headers, again=False)

    def redeliver(self, url: str | None = None, *, webhook: str | None = None) -> None:
        """Has the callback of the ended job delivered again, and its webhook told of its end again.

        With `url` or `webhook` that one alone, to this URL. Raises `InvalidTransition` for a job that has not ended or
        has neither.
        """
        headers = {"Content-Type": "application/json"}
        given = {"url": url, "webhook": webhook}
        body = json.dumps({name: value for name, value in given.items() if value is not None}).encode()
        self._http.json("POST", self._path("callbacks", "redeliver"), body=body, headers=headers, again=False)

    def retry(self) -> None:
        """Puts a dead or cancelled job back into its queue. Raises `InvalidTransition` for any other."""
        self._http.json("POST", self._path("retry"), again=False)

    def __await__(self) -> Generator[Any, None, R_co]:
        return self._await().__await__()

    async def _await(self) -> R_co:
        over = threading.Event()
        try:
            return cast(R_co, await _in_thread(lambda: self._open(self._wait(None, over)).full))
        finally:
            over.set()

    # How it is done

    def _path(self, *parts: str) -> str:
        return self._http.path("jobs", self.id, *parts)

    def _wait(self, deadline: float | None, over: threading.Event | None = None) -> JobRecord:
        """The record, as soon as the job has ended, `deadline` (monotonic) is reached, or `over` is set."""
        pause = FIRST_LOOK
        while True:
            left = _remaining(deadline)
            longest = WAIT if over is None else ASYNC_WAIT
            wait = int(longest if left is None else min(longest, left))
            headers = {"Prefer": f"wait={wait}"} if wait else None
            response = self._http.request("GET", self._path(), headers=headers, read=wait + self._http.timeout)
            record = _record_of(json.loads(response.data))
            left = _remaining(deadline)
            if record.state.ended or left == 0 or (over is not None and over.is_set()):
                return record
            if "Preference-Applied" not in response.headers:
                # So many wait already that the server answers at once; or less than a second is left.
                time.sleep(pause if left is None else min(pause, left))
                pause = min(pause * 1.5, LONGEST_LOOK)

    def _ended(self, timeout: float | timedelta | None) -> JobRecord:
        record = self._wait(_deadline(timeout))
        if record.state.ended:
            return record
        raise ResultTimeout(
            f"job {self.id} is {record.state}{record.ahead} after {seconds(timeout, 'timeout'):g} s; it goes on. "
            "Wait again, or longer."
        )

    def _check(self, record: JobRecord) -> None:
        """Raises what a job that did not succeed ended with."""
        if record.state is not State.SUCCEEDED:
            self._http.request("GET", self._path("result"), accept=ENCODED)  # the answer is the error
            raise ResultMissing(f"job {self.id} was put back when its result was asked for; wait for it again.")

    def _open(self, record: JobRecord) -> Result:
        self._check(record)
        encoded = bytearray()
        self._download(encoded.extend, accept=ENCODED)
        return Result(record.short_result, codec.decode(bytes(encoded)), record.content_type)

    def _download(self, write: Callable[[bytes], object], accept: str = "*/*") -> int:
        """Passes the result on in parts; where a connection breaks it goes on behind what has come."""
        got, etag, size, broken = 0, "", -1, 0
        while got != size:
            headers = {"Range": f"bytes={got}-", "If-Range": etag} if got else {}
            response = self._http.request("GET", self._path("result"), accept=accept, headers=headers, stream=True)
            try:
                if got and response.status != 206:
                    raise ResultMissing(f"the result of job {self.id} changed while it was read; read it again.")
                etag = response.headers.get("ETag", "")
                if not etag:
                    raise ResultMissing(f"job {self.id} has no result; look at its record.")
                size = got + int(response.headers["Content-Length"])
                for part in response.stream(BLOCK):
                    write(part)
                    got += len(part)
            except BROKEN as error:
                broken += 1
                if broken > 1 + got // BLOCK:
                    raise StoreUnavailable(f"the result of job {self.id} breaks off after {got:,} bytes.") from error
            finally:
                response.close()
        return got

    def __repr__(self) -> str:
        return f"<Job {self.id} at {self._http.url}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Job) and (self.id, self._http.url) == (other.id, other._http.url)

    def __hash__(self) -> int:
        return hash((self.id, self._http.url))


# What goes out and comes in


def _options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a job as the routes take them."""
    options = {name: value for name, value in given.items() if value is not None}
    for name in options:
        if name not in OPTIONS:
            raise InvalidJob(
                f"{name} is no option that may be chosen over HTTP; these are {', '.join(sorted(OPTIONS))}."
            )
    for name in ("delay", "queue_timeout", "hard_time_limit"):
        if name in options:
            options[name] = seconds(options[name], name)
    if "webhook" in options:
        options["webhook"] = Webhook.of(options["webhook"]).asdict()
    if isinstance(options.get("unique_for"), timedelta):
        options["unique_for"] = seconds(options["unique_for"], "unique_for")
    if "tags" in options:
        if isinstance(options["tags"], str):
            raise InvalidJob(f"tags={options['tags']!r}: give a list of texts: tags=[{options['tags']!r}].")
        options["tags"] = list(options["tags"])
    return options


def _points_of(part: Mapping[str, Any]) -> dict[str, list[Point]]:
    """The points of each metric in an answer."""
    return {
        name: [Point(step, number(value), at) for step, value, at in points]
        for name, points in part.get("metrics", {}).items()
    }


#: Fields of a record, and what makes their values of JSON.
_FIELDS: Final[Mapping[str, Callable[[Any], Any]]] = {
    "state": State,
    "dead_reason": DeadReason,
    "callback_state": CallbackState,
    "webhook_state": CallbackState,
    "webhook": Webhook.of,
    "tags": tuple,
    "functions": tuple,
    "slots": lambda slots: {name: tuple(numbers) for name, numbers in slots.items()},
    "error": lambda value: _made(JobError, value),
    "usage": lambda value: _made(Usage, value),
    "resumed_from": lambda value: _made(SavedCheckpoint, value),
    "attempts": lambda values: tuple(
        _made(
            Attempt,
            value,
            error=value.get("error") and _made(JobError, value["error"]),
            usage=value.get("usage") and _made(Usage, value["usage"]),
            resumed_from=value.get("resumed_from") and _made(SavedCheckpoint, value["resumed_from"]),
        )
        for value in values
    ),
    "callback_attempts": lambda values: tuple(_made(CallbackAttempt, value) for value in values),
}


def _record_of(members: Mapping[str, Any]) -> JobRecord:
    """The record that JSON stands for. What a newer server adds is left out."""
    changed = {name: make(members[name]) for name, make in _FIELDS.items() if members.get(name) is not None}
    return _made(JobRecord, {name: number(value) for name, value in members.items()}, **changed)


def _made(kind: type[T], members: Mapping[str, Any], **changed: Any) -> T:
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{**{name: value for name, value in members.items() if name in names}, **changed})


# Time


def _deadline(timeout: float | timedelta | None) -> float | None:
    limit = seconds(timeout, "timeout")
    return None if limit is None else time.monotonic() + limit


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


async def _in_thread(function: Callable[[], T]) -> T:
    """What a function returns that blocks. In a thread of its own that is left alone when the coroutine is cancelled:
    an executor's would be waited for at the end of the program."""
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(act: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            act(value)

    def run() -> None:
        try:
            act, value = outcome.set_result, cast(Any, function())
        except BaseException as error:  # noqa: BLE001 - it is raised where it is awaited
            act, value = cast(Any, outcome.set_exception), error
        try:
            loop.call_soon_threadsafe(settle, act, value)
        except RuntimeError:
            return  # the loop has been closed: nobody waits

    threading.Thread(target=run, name="mlqueue-client", daemon=True).start()
    return await outcome
