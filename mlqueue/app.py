"""`MLQ`: the store, the broker and the actors of one namespace, built from settings."""

from __future__ import annotations

import difflib
import inspect
import weakref
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from datetime import datetime, timedelta
from typing import Any, Final, Generic, ParamSpec, Protocol, TypeVar, cast, overload

import dramatiq
import dramatiq.broker
import redis
from dramatiq import Message
from dramatiq.middleware import Middleware

from .broker import StoreBroker
from .calls import call_actor
from .data import Data
from .dead_letters import DeadLetters
from .errors import FunctionNotFound, InvalidJob, SettingsError
from .functions import DEFAULT_NAMESPACE, Functions, PostedFunction
from .handle import Job
from .job import State, check_id, id_in, new_id, seconds, timestamp
from .limits import Limits, check_keys
from .listeners import QUEUE, Listeners
from .message import LISTENER, OPTION_CHECKS, check_options
from .named import BATCHES, NamedSource, serving_actor
from .posted import job_dict, progress_text
from .reaper import Reaper
from .settings import Settings, server_url
from .store import Connector, Page, Store
from .webhooks import Webhook

P = ParamSpec("P")
R = TypeVar("R")

#: What `Actor.submit` takes as options rather than as arguments of the actor, unless the actor has a parameter of
#: that name.
SUBMIT_OPTIONS: Final = frozenset(
    {
        "delay",
        "eta",
        "job_id",
        "tags",
        "priority",
        "result_ttl",
        "max_crashes",
        "max_stalls",
        "job_timeout",
        "queue_timeout",
        "hard_time_limit",
        "callback",
        "webhook",
        "concurrency_key",
        "fair_by",
        "unique_key",
        "unique_for",
        "unique_policy",
    }
)

_instances: weakref.WeakValueDictionary[int, MLQ] = weakref.WeakValueDictionary()
_made = 0


def instances() -> list[MLQ]:
    """The apps of this process that are alive, in the order of their making."""
    return [app for _, app in sorted(_instances.items())]


class Actor(dramatiq.Actor[P, R]):
    """A Dramatiq actor whose jobs are `Job`s: `submit` beside Dramatiq's `send`, which gives a Message."""

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        self._signature = inspect.signature(fn)
        taken = {
            name
            for name, parameter in self._signature.parameters.items()
            if parameter.kind not in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        }
        self._submit_options = SUBMIT_OPTIONS - taken
        self._positional = _positional_counts(self._signature)
        super().__init__(fn, **options)

    def message_with_options(self, *, args: tuple[Any, ...] = (), kwargs: Any = None, **options: Any) -> Message[R]:
        """A message for this actor, its id time-ordered."""
        if isinstance(options.get("webhook"), Webhook):
            options["webhook"] = options["webhook"].asdict()
        for name in ("on_failure", "on_success"):
            if isinstance(options.get(name), dramatiq.Actor):
                options[name] = options[name].actor_name
        return Message(
            queue_name=self.queue_name,
            actor_name=self.actor_name,
            args=args,
            kwargs=kwargs or {},
            options=options,
            message_id=new_id(),
        )

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Submits a job with these arguments. It exists in the store when this returns.

        ``delay`` (seconds), ``eta``, ``job_id``, ``tags``, ``priority``, ``result_ttl``, ``max_crashes``,
        ``max_stalls``, ``job_timeout``, ``queue_timeout``, ``hard_time_limit`` (seconds), ``callback`` (a URL),
        ``webhook`` (a URL or a `Webhook`), ``concurrency_key``, ``fair_by``, ``unique_key``, ``unique_for`` and
        ``unique_policy`` among the keywords are options of the job, unless the actor has a parameter of that name;
        where a type checker should see both, use `with_options`. With a unique key the job may be one that is there
        already. Raises `InvalidJob` for arguments that the actor does not take, `EncodeError` for values that cannot be
        sent, `JobExists` for a unique job that is to be rejected, `StoreUnavailable`.
        """
        options = {name: kwargs.pop(name) for name in self._submit_options.intersection(kwargs)}
        return BoundOptions(self, options).submit(*args, **kwargs)

    def submit_many(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]], **options: Any) -> list[Job[R]]:
        """Submits many jobs, some hundred in one call of the store. Each call is a tuple of positional or a dict of
        keyword arguments; `options` as for `with_options`, but ``job_id``."""
        check_option_names(options, self.broker)
        return BoundOptions(self, options).submit_many(calls)

    def with_options(
        self,
        *,
        delay: float | timedelta | None = None,
        eta: float | datetime | None = None,
        job_id: str | None = None,
        tags: Iterable[str] = (),
        priority: int | None = None,
        **options: Any,
    ) -> BoundOptions[P, R]:
        """This actor with options for the jobs to come: ``train.with_options(delay=60).submit(0.1)``.

        Parameters:
          delay: Seconds until the job may start, by the store's clock.
          eta: When it may start: Unix seconds or an aware datetime.
          job_id: Its id. Submitting an id that exists already creates nothing and gives the job that exists.
          tags: Texts to find it by.
          priority: Lower runs first; from -1,000 to 1,000. The actor's own when None.
          options: Any further option of Dramatiq's messages (``max_retries``, ``time_limit`` ...) or of ours.
        """
        check_option_names(options, self.broker)
        labels = (tags if isinstance(tags, str) else tuple(tags)) or None  # a str is refused with the others
        given = {"delay": delay, "eta": eta, "job_id": job_id, "tags": labels, "priority": priority}
        return BoundOptions(self, {**{name: value for name, value in given.items() if value is not None}, **options})

    def check_arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Raises `InvalidJob` when the function does not take these arguments."""
        if not kwargs and len(args) in self._positional:
            return  # most calls; binding costs more than all else that is checked here
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidJob(f"{self.actor_name}{self._signature}: {error}.") from None


def _positional_counts(signature: inspect.Signature) -> range:
    """How many positional arguments alone a function takes."""
    kinds = inspect.Parameter
    parameters = list(signature.parameters.values())
    if any(item.kind is kinds.KEYWORD_ONLY and item.default is kinds.empty for item in parameters):
        return range(0)
    positional = [item for item in parameters if item.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    needed = sum(item.default is kinds.empty for item in positional)
    return range(needed, len(positional) + 1)


class BoundOptions(Generic[P, R]):
    """An actor with options for its next jobs; made by `Actor.with_options`."""

    def __init__(self, actor: Actor[P, R], options: dict[str, Any]) -> None:
        self._actor = actor
        self._options = options

    def submit(self, *args: P.args, **kwargs: P.kwargs) -> Job[R]:
        """Submits a job; see `Actor.submit`."""
        broker = cast(StoreBroker, self._actor.broker)
        message, delay = self._message(args, kwargs)
        return Job(broker.store, broker.enqueue(message, delay=delay).message_id)

    def submit_many(self, calls: Iterable[tuple[Any, ...] | Mapping[str, Any]]) -> list[Job[R]]:
        """Submits many jobs; see `Actor.submit_many`."""
        if "job_id" in self._options:
            raise InvalidJob("submit_many(job_id=...): an id belongs to one job; submit them one by one.")
        broker = cast(StoreBroker, self._actor.broker)
        messages, delay = [], None
        for index, call in enumerate(calls):
            args, kwargs = _as_call(call, index)
            message, delay = self._message(args, kwargs)
            messages.append(message)
        return [Job(broker.store, message.message_id) for message in broker.enqueue_many(messages, delay=delay)]

    def _message(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Message[R], int | None]:
        self._actor.check_arguments(args, kwargs)
        options, delay, job_id = message_options(self._options) if self._options else ({}, None, None)
        message = self._actor.message_with_options(args=args, kwargs=dict(kwargs), **options)
        if job_id is not None:
            object.__setattr__(message, "message_id", check_id(job_id))
        return message, delay


def check_option_names(names: Iterable[str], broker: dramatiq.Broker) -> None:
    """Raises `InvalidJob` for a name that is no option of a job."""
    _refuse_unknown(names, SUBMIT_OPTIONS | set(OPTION_CHECKS) | set(broker.actor_options), "a job")


def check_actor_options(options: Mapping[str, Any], broker: dramatiq.Broker) -> None:
    """Raises `InvalidJob` for a name that is no option of an actor, and for a priority that is none."""
    _refuse_unknown(options, {"actor_name", "queue_name", "priority", *broker.actor_options}, "an actor")
    check_options({name: options[name] for name in ("priority",) if name in options})


def _refuse_unknown(names: Iterable[str], known: Set[str], whose: str) -> None:
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(sorted(known))}."
            raise InvalidJob(
                f"{name} is no option of {whose}; {hint} An option that a middleware of yours reads belongs into its "
                "actor_options."
            )


def message_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], int | None, str | None]:
    """Options as `submit` takes them, as options of a message, delay in milliseconds, and id."""
    rest = dict(options)
    delay = seconds(rest.pop("delay", None), "delay")
    eta = timestamp(rest.pop("eta", None), "eta")
    job_id = rest.pop("job_id", None)
    if delay is not None and eta is not None:
        raise InvalidJob("both delay and eta were given: one of them says when the job may start.")
    if eta is not None:
        rest["eta"] = round(eta * 1000)
    if rest.get("webhook") is not None:
        rest["webhook"] = Webhook.of(rest["webhook"]).asdict()
    for name in ("result_ttl", "job_timeout", "queue_timeout", "hard_time_limit"):
        if rest.get(name) is not None:
            rest[name] = seconds(rest[name], name)
    if isinstance(rest.get("unique_for"), timedelta):
        rest["unique_for"] = seconds(rest["unique_for"], "unique_for")
    if "tags" in rest:
        if isinstance(rest["tags"], str):
            raise InvalidJob(f"tags={rest['tags']!r}: give a list of texts: tags=[{rest['tags']!r}].")
        rest["tags"] = list(rest["tags"])
    return rest, None if delay is None else round(delay * 1000), job_id


def _as_call(call: object, index: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(call, Mapping):
        return (), dict(call)
    if isinstance(call, tuple | list):
        return tuple(call), {}
    raise InvalidJob(
        f"submit_many: call {index} is a {type(call).__name__}; each is a tuple of positional or a dict of keyword "
        f"arguments: ({call!r},)."
    )


class ActorDecorator(Protocol):
    """What `MLQ.actor` with options gives."""

    @overload
    def __call__(self, fn: Callable[P, Awaitable[R]]) -> Actor[P, R]: ...

    @overload
    def __call__(self, fn: Callable[P, R]) -> Actor[P, R]: ...


class MLQ:
    """A namespace of jobs: declare its actors, submit jobs, look at them.

    Nothing is connected or started before the first use. Without a URL the store is the embedded server of this
    folder (see `mlqueue.embedded`), started when there is none.

    Parameters:
      name: The namespace: jobs of one are seen by its workers and by no others. ``MLQUEUE_NAMESPACE``, or ``default``.
      q_name: The same, by the word that MLQ has for it.
      redis_host, redis_port, redis_db: A Redis or Valkey server, as MLQ took it; goes before any URL. Where some are
        given the others are ``localhost``, 6379 and 0.
      url: ``redis://``, ``rediss://`` or ``unix://``; goes before ``MLQUEUE_URL`` and ``REDIS_URL``.
      settings: All settings, instead of those of the environment.
      middleware: All Dramatiq middleware, instead of the default list.
    """

    def __init__(
        self,
        name: str | None = None,
        redis_host: str | None = None,
        redis_port: int | None = None,
        redis_db: int | None = None,
        *,
        q_name: str | None = None,
        url: str | None = None,
        settings: Settings | None = None,
        middleware: list[Middleware] | None = None,
    ) -> None:
        if q_name is not None:
            if name is not None:
                raise SettingsError(f"both a name ({name!r}) and a q_name ({q_name!r}) were given: give one of them.")
            name = q_name
        if (redis_host, redis_port, redis_db) != (None, None, None):
            given = server_url(redis_host, redis_port, redis_db)
            if url is not None:
                raise SettingsError(f"both a host and port ({given}) and a url ({url!r}) were given: give one of them.")
            url = given
        if settings is None:
            settings = Settings.load() if url is None else Settings.load(url=url)
        elif url is not None:
            raise SettingsError("both settings and a url were given: Settings.load(url=...) makes settings with it.")
        #: The settings in use.
        self.settings = settings
        #: The namespace.
        self.name = name or settings.namespace or DEFAULT_NAMESPACE
        #: The store of the jobs.
        self.store = Store(Connector(settings), self.name, settings)
        #: The Dramatiq broker.
        self.broker = StoreBroker(self.store, settings, middleware=middleware)
        self._listeners = Listeners(self.broker, post=self.post, get_job=self.get_job)
        self._reapers: list[Reaper] = []
        if settings.signing_keys:
            call_actor(self.broker)
        #: The data sources that `data_source` has registered, by name.
        self.sources: dict[str, NamedSource[..., Any]] = {}
        # A guest: the host's own global broker stays.
        if dramatiq.broker.global_broker is None:
            dramatiq.set_broker(self.broker)
        global _made
        _made += 1
        _instances[_made] = self

    @overload
    def actor(self, fn: Callable[P, Awaitable[R]], /, **options: Any) -> Actor[P, R]: ...

    @overload
    def actor(self, fn: Callable[P, R], /, **options: Any) -> Actor[P, R]: ...

    @overload
    def actor(
        self,
        fn: None = None,
        /,
        *,
        actor_name: str | None = None,
        queue_name: str = "default",
        priority: int = 0,
        **options: Any,
    ) -> ActorDecorator: ...

    def actor(self, fn: Any = None, /, **options: Any) -> Any:
        """Declares a function as an actor: ``@mlq.actor`` or ``@mlq.actor(queue_name="train", max_retries=3)``.

        Takes every option of ``dramatiq.actor``, with Dramatiq's names and units (milliseconds), and of ours:
        ``result_ttl`` (seconds for which the result is kept, None for ever), ``tags``, ``max_crashes``,
        ``max_stalls``, ``job_timeout`` (seconds after which a running attempt is given up and the job started anew),
        ``queue_timeout`` (seconds within which it is to begin, else it is dead), ``hard_time_limit`` (seconds after
        which the process that runs it is killed), ``kill`` (whether its process is killed when it is cancelled or runs
        too long and does not end),
        ``waits_count`` (whether the time for which it waits for other jobs counts against its ``time_limit``),
        ``sync_ack``; of limits ``resources`` (what a job needs: ``{"gpu": 1}``), ``concurrency`` (how many run at a
        time; with a ``concurrency_key`` of each), ``fair_by`` (jobs of each value have their turn); ``unique_key``,
        ``unique_for`` and ``unique_policy`` (of which there is one job). These keys may be functions of the arguments
        that give a text. Declared again from the same module, as by a notebook's cell that is run
        again, it replaces the actor of that name.
        """

        if fn is not None and not callable(fn):
            raise InvalidJob(
                f"mlq.actor({fn!r}): an actor is a function. Write @mlq.actor, or @mlq.actor(max_retries=3)."
            )
        check_actor_options(options, self.broker)

        def declare(function: Callable[..., Any]) -> Actor[Any, Any]:
            name = options.get("actor_name") or function.__name__
            present = self.broker.actors.get(name)
            if present is not None and _is_same(present.fn, function):
                del self.broker.actors[name]
            declared: Actor[Any, Any] = dramatiq.actor(function, broker=self.broker, actor_class=Actor, **options)  # type: ignore[call-overload]
            return declared

        return declare if fn is None else declare(fn)

    def data_source(
        self, name: str, *, version: str | Callable[..., object] | None = None, queue_name: str = BATCHES
    ) -> Callable[[Callable[P, R]], NamedSource[P, R]]:
        """Registers the factory of a data source under a name: ``@mlq.data_source("train")``.

        Workers of `queue_name` that import it prepare its batches for a `mlqueue.batch.actor_pool.ActorPool`, without
        being sent any code: each process makes the source once, and lets go of it when it has not been used for a
        while. Trainer and worker compare the code of the factory and `version`, a text, or a function of the
        factory's arguments whose value changes with the data, as the time of a file. The factory takes keyword
        arguments of values that the codec carries. Registered again, the name means the later one.
        """

        def register(factory: Callable[P, R]) -> NamedSource[P, R]:
            named = NamedSource(name, factory, version)
            self.sources[name] = named
            serving_actor(self, queue_name)
            return named

        return register

    def submit(self, actor_name: str, /, *args: Any, **kwargs: Any) -> Job[Any]:
        """Submits a job by the name of its actor, whose code need not be here.

        Keywords as for `Actor.submit`; besides ``queue_name``, for an actor that no worker has declared yet (its
        jobs go to ``default`` without it). What is kept on the record (``result_ttl``, ``max_crashes`` ...)
        is as given here, whatever the actor declares elsewhere. Keys that the actor makes of the arguments
        (``unique_key`` ...) have to be given where its function is not: workers tell of that when they start, and
        `InvalidJob` is raised then.
        """
        actor = self.broker.actors.get(actor_name)
        if isinstance(actor, Actor) and "queue_name" not in kwargs:
            job: Job[Any] = actor.submit(*args, **kwargs)
            return job
        chosen = kwargs.pop("queue_name", None)
        declared, keys = (None, []) if actor is not None and chosen else self.store.declared(actor_name)
        options = {name: kwargs.pop(name) for name in SUBMIT_OPTIONS.intersection(kwargs)}
        if actor is None:
            check_keys(actor_name, keys, options)
        return Job(self.store, self._enqueue(actor_name, chosen or declared or "default", args, kwargs, options))

    def _enqueue(
        self, actor_name: str, queue_name: str, args: tuple[Any, ...], kwargs: dict[str, Any], given: Mapping[str, Any]
    ) -> str:
        options, delay, job_id = message_options(given)
        message: Message[Any] = Message(
            queue_name=queue_name,
            actor_name=actor_name,
            args=args,
            kwargs=kwargs,
            options=options,
            message_id=new_id() if job_id is None else check_id(job_id),
        )
        return self.broker.enqueue(message, delay=delay).message_id

    def job(self, job_id: str) -> Job[Any]:
        """The job of this id. Raises `JobNotFound` when there is none."""
        self.store.record(id_in(self.name, job_id), full=False)
        return Job(self.store, job_id)

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
        """A page of records, newest first. ``page.cursor`` gives the next; pages are stable while jobs come and go.

        `since` and `until` bound the time of creation: Unix seconds or aware datetimes.
        """
        if not 1 <= limit <= 1000:
            raise InvalidJob(f"limit={limit!r}: a page has from 1 to 1,000 jobs.")
        return self.store.page(
            states=_states(state),
            actor=actor,
            queue=queue,
            tag=tag,
            since=timestamp(since, "since"),
            until=timestamp(until, "until"),
            cursor=cursor,
            limit=limit,
        )

    @property
    def dead_letters(self) -> DeadLetters:
        """The jobs that have ended for good without success: to be listed, mended, put back, forgotten, exported."""
        return DeadLetters(self.store)

    @property
    def limits(self) -> Limits:
        """How many slots there are of what jobs need, and who holds them."""
        return Limits(self.store)

    @property
    def data(self) -> Data:
        """Texts and bytes that jobs and programs of this name keep for each other."""
        return Data(self.store)

    def clear(
        self,
        states: State | str | Iterable[State | str] | None = None,
        older_than: float | timedelta | None = None,
    ) -> int:
        """Forgets jobs of this name that do not run: their records, results and all; how many.

        Parameters:
          states: Those in these states only; all but running ones when None.
          older_than: Those only that ended, or, if they wait, were created, so many seconds ago or before.

        With neither, the `data` of this name goes too. Jobs that run go on, those that are submitted meanwhile stay.
        """
        chosen = None if states is None else _states(states)
        if chosen is not None and State.RUNNING in chosen:
            raise InvalidJob("clear(states='running'): a job that runs is not forgotten; cancel it first.")
        return self.store.clear(chosen, seconds(older_than, "older_than"))

    @property
    def client(self) -> redis.Redis:
        """The redis-py client in use, as for Dramatiq's rate limiters' backend. Starts the embedded server."""
        return self.store.connector.client

    # What MLQ has

    def post(
        self, msg: Any, callback: str | None = None, functions: Iterable[str] | None = None, **options: Any
    ) -> str:
        """Posts a job for the listeners of this name, and returns its id at once. First in, first out.

        Parameters:
          msg: What the listeners get: anything that the codec carries, arrays and datetimes included.
          callback: A URL that is fetched when the job has ended.
          functions: The names of the functions that are to run, in this order; all that the worker has when None. It
            waits for a worker that has them all.
          options: As for `Actor.submit`: ``delay``, ``eta``, ``priority``, ``tags``, ``max_retries`` (0 without it),
            ``result_ttl`` (for ever without it) ...
        """
        if functions is not None and (isinstance(functions, str) or not isinstance(functions, Iterable)):
            raise InvalidJob(f"functions={functions!r}: give a list of names: functions=[{functions!r}].")
        check_option_names(options, self.broker)
        names = None if functions is None else list(functions)
        given = {"result_ttl": None, **options, "callback": callback or None, "functions": names}
        return self._enqueue(LISTENER, QUEUE, (msg,), {}, given)

    def get_job(self, job_id: str) -> dict[str, Any]:
        """All that is known of a job, as MLQ's dict: see `mlqueue.posted.job_dict`. Raises `JobNotFound`."""
        return job_dict(self.store, id_in(self.name, job_id))

    def get_result(self, job_id: str) -> dict[str, Any]:
        """The same as `get_job`."""
        return self.get_job(job_id)

    def get_progress(self, job_id: str) -> str:
        """How far a job is, as text: ``[queued; not started]``, ``[started]``, what it reported, ``[completed]``,
        ``[failed]``, ``[cancelled]``. Raises `JobNotFound`."""
        return progress_text(self.store.record(id_in(self.name, job_id), full=False))

    def job_count(self) -> int:
        """How many jobs of this name have not ended yet."""
        return sum(count.number for count in self.store.counts() if not count.state.ended)

    def create_listener(self, fn: Callable[..., Any] | None = None, *, threads: int = 1) -> bool:
        """Adds a function to those that run posted jobs, and starts a worker in this process. Returns True at once.

        The function is called with the message and a dict: ``fn(msg, utils)``; it may be ``async``. Another call adds
        another function; one of the same name replaces the first. The worker runs `threads` jobs at a time, those of
        actors that this process declares too. The process goes on after the end of its main program, until `shutdown`
        or a signal (SIGTERM, Ctrl-C). Under `mlqueue worker` the function is only added: that works already.
        """
        if fn is not None:
            self._listeners.add(fn)
        self._listeners.start(threads)
        return True

    def remove_listener(self, fn: Callable[..., Any] | str) -> bool:
        """Takes a function, or the one of this name, from those that run posted jobs here; whether it was there."""
        return self._listeners.remove(fn)

    def register_function(self, fn: Callable[..., Any], name: str | None = None) -> PostedFunction:
        """Posts a function to all workers of this name, those included that start later: it runs posted jobs there as
        if their program had called `create_listener` with it, behind their own.

        One of the same `name` (the function's own without it) is replaced. It travels as cloudpickle has it, signed
        with ``MLQUEUE_SIGNING_KEY``; workers without that key take none. A function of a module travels as the name of
        that, which the workers need then. Raises `SigningKeyMissing`, `InvalidJob`.
        """
        return Functions(self.store).register(fn, name)

    def remove_function(self, name: str) -> bool:
        """Takes a posted function from all workers; whether it was there. It cannot be sent again: only signed anew."""
        try:
            Functions(self.store).remove(name)
        except FunctionNotFound:
            return False
        return True

    def functions(self) -> list[PostedFunction]:
        """The functions that have been posted, in the order in which they run."""
        return Functions(self.store).list()

    def shutdown(self) -> None:
        """Stops the worker of this process that `create_listener` started: it ends with the job in hand, and takes no
        other. Returns at once; `join` waits for the end. Afterwards `create_listener` starts another."""
        self._listeners.stop()

    def join(self, timeout: float | timedelta | None = None) -> bool:
        """Waits until the worker that `create_listener` started has ended: by `shutdown`, or by a signal where this is
        the main thread. False when `timeout` seconds pass first; True, too, where there is none."""
        return self._listeners.join(seconds(timeout, "timeout"))

    def create_reaper(
        self, call_how_often: float | timedelta = 60, job_timeout: float | timedelta = 300, max_retries: int = 5
    ) -> Reaper:
        """Has every job given back to its queue when it runs for longer than `job_timeout` seconds, whether its worker
        lives or not; after `max_retries` times it is dead, reason ``stalled``. A job's own timeout goes before it.

        It looks every `call_how_often` seconds at least, in a background thread, until ``stop()`` of what this returns
        is called, or `close`.
        """
        reaper = Reaper(self.store, interval=call_how_often, job_timeout=job_timeout, max_retries=max_retries)
        reaper.start()
        self._reapers.append(reaper)
        return reaper

    def close(self) -> None:
        """Stops listeners (the job in hand has the settings' ``drain`` to end) and reapers, closes connections and
        background threads. Any other worker of this process is stopped first, by who started it."""
        self._listeners.stop(self.settings.drain)
        self._listeners.join()
        for reaper in self._reapers:
            reaper.stop()
        self._reapers.clear()
        self.broker.close()

    def __repr__(self) -> str:
        return f"<MLQ {self.name!r} on {self.store.connector.where}>"


def _is_same(present: Any, function: Any) -> bool:
    return (present.__module__, present.__qualname__) == (function.__module__, function.__qualname__)


def _states(given: State | str | Iterable[State | str] | None) -> tuple[State, ...]:
    if given is None:
        return tuple(State)
    names = [given] if isinstance(given, str) else list(given)
    try:
        return tuple(State(name) for name in names)
    except ValueError:
        allowed = ", ".join(State)
        raise InvalidJob(f"state={given!r}: the states are {allowed}.") from None


__all__ = ["MLQ", "Actor", "BoundOptions", "instances"]
