"""The Dramatiq broker over the store: enqueue is one script, the ack is the commit.

There are no delay queues (scheduled jobs wait in the store) and no dead-letter queues (a dead job is a state). What a
middleware enqueues after the actor call, a retry included, is noted on the delivery and created by the settle.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

import dramatiq
from dramatiq import Message, MessageProxy
from dramatiq.broker import Broker, Consumer
from dramatiq.errors import QueueJoinTimeout
from dramatiq.middleware import Middleware, SkipMessage
from dramatiq.results import Results

from . import capture, codec
from .beside import Beside
from .board import Board, Entry
from .callbacks import callback_actor
from .delivery import Delivery, current_delivery, describe, storing
from .errors import InvalidJob, MLQueueError, ResultMissing, StoreError
from .events import close_hub
from .heartbeat import HeartbeatHelper
from .job import DeadReason, NewJob, Result
from .journal import JournalWriter
from .limits import check_actor, key_functions, key_of, takes_turns
from .message import LIFTED, LISTENER, check_options, from_job, to_job
from .middleware import TimeLimit, default_middleware
from .middleware.results import StoreBackend
from .processes import born, place
from .progress import ProgressWriter
from .pump import Pump, WorkQueue
from .schema import signature_of
from .settings import Settings
from .store import Settle, Store
from .store.chunks import BodyReference
from .store.records import CALLBACK, CALLBACKS, quote
from .store.store import LOG_BYTES, SeenKey, Submitted, common_of, encode_result
from .usage import Meter
from .waiting import close_bell
from .webhooks import Webhook

logger = logging.getLogger("mlqueue.broker")

#: The options that are checked when an actor is declared, as they are of a job.
DECLARED: Final = frozenset(
    {
        "callback",
        "hard_time_limit",
        "job_timeout",
        "kill",
        "max_age",
        "max_backoff",
        "max_crashes",
        "max_retries",
        "max_stalls",
        "min_backoff",
        "queue_timeout",
        "result_ttl",
        "tags",
        "time_limit",
    }
)

#: Actor options of ours; the others are Dramatiq's.
OWN_OPTIONS: Final = frozenset(
    {
        "sync_ack",
        "tags",
        "max_crashes",
        "max_stalls",
        "job_timeout",
        "queue_timeout",
        "hard_time_limit",
        "kill",
        "callback",
        "webhook",
        "waits_count",
        "http",
        "job_logs",
    }
    | {"resources", "concurrency", "concurrency_key", "fair_by", "unique_key", "unique_for", "unique_policy"}
)

#: How long a job with ``kill=True`` has to end before its process is killed, in seconds, where no setting says.
DEFAULT_GRACE: Final = 10.0

#: Those of them about which jobs are the same, that a job may have too.
KEY_OPTIONS: Final = frozenset({"concurrency_key", "fair_by", "unique_key", "unique_for", "unique_policy"})

#: How often worker threads are counted that are still alive, in seconds.
COUNT_THREADS_EVERY: Final = 0.5

#: How often `StoreBroker.join` looks, in seconds.
JOIN_INTERVAL: Final = 0.02


class StoreBroker(Broker):
    """A Dramatiq broker over a `Store`.

    Parameters:
      store: Where the jobs are.
      settings: The settings in use.
      middleware: All middleware, instead of the default list.
      worker_id: The incarnation that a worker of this broker takes, where its supervisor has chosen it (and sends its
        heartbeat); None for a worker that gets a helper process for that.
      only_alone: Whether a worker of this broker takes only jobs that are to run alone.
    """

    def __init__(
        self,
        store: Store,
        settings: Settings,
        *,
        middleware: list[Middleware] | None = None,
        worker_id: str | None = None,
        only_alone: bool = False,
    ) -> None:
        self.store = store
        self.settings = settings
        self.progress = ProgressWriter(store)
        self.journals = JournalWriter(store)
        self.meter = Meter(lambda delivery, packed: self.journals.open(delivery).note_usage(packed))
        self._captures = False
        self.pump: Pump | None = None
        #: The threads beside those of this broker's worker; None while there is none.
        self.beside: Beside | None = None
        #: The functions that listeners here run, by name.
        self.functions: tuple[str, ...] = ()
        #: Those of them that run when a job names none.
        self.functions_for_all: tuple[str, ...] = ()
        #: Called when a worker of this broker begins, with its pump, and when it has ended.
        self.on_worker: Callable[[Pump], None] | None = None
        self.on_worker_end: Callable[[], None] | None = None
        #: What web processes are told of the actors that are declared with ``http=True``.
        self.published: dict[str, bytes] = {}
        self.worker: dramatiq.Worker | None = None
        #: Where jobs in hand are written down for who looks after this process; None while nobody does.
        self.board: Board | None = None
        #: How long a cancelled or overdue job has to end before its process is killed; None for those only whose actors
        #: say so.
        self.kill_grace = settings.kill_grace
        #: How long the jobs of a worker that is stopped may go on, in seconds.
        self.patience = settings.drain
        self._stopping_since = 0.0
        #: Set when a worker's thread has died; its process should drain and end.
        self.broken = threading.Event()
        self._worker_id = worker_id
        self._only_alone = only_alone
        self._helper: HeartbeatHelper | None = None
        self._warned = False
        self._local = threading.local()
        self._hooked: list[Middleware] = []
        self._hooks: dict[str, list[Any]] = {}
        self._lane_cache: dict[tuple[str, ...], list[tuple[str, str]]] = {}
        self._function_lanes: list[tuple[str, str, tuple[str, ...]]] = []
        self._internal: dict[str, Any] = {}
        #: The functions by which actors make keys of the arguments, by actor and option.
        self.key_functions: dict[str, dict[str, Callable[..., Any]]] = {}
        if middleware is None:
            middleware = default_middleware(store, settings)
        super().__init__(middleware)
        self.queues = {}
        self.actor_options |= OWN_OPTIONS
        self._internal[CALLBACK] = callback_actor(self)

    # Dramatiq's face

    def declare_actor(self, actor: Any) -> None:
        """Declares an actor; its function stores its result when a worker calls it."""
        if actor.queue_name == CALLBACKS:
            actor.fn = storing(actor.fn, self._keep_result, self._disarm)
            return  # no Worker is to have a consumer for it
        if actor.options.get("webhook") is not None:
            actor.options["webhook"] = Webhook.of(actor.options["webhook"]).asdict()
        for name in ("job_timeout", "queue_timeout", "hard_time_limit", "result_ttl"):
            if isinstance(actor.options.get(name), timedelta):
                actor.options[name] = actor.options[name].total_seconds()
        check_options({name: actor.options[name] for name in DECLARED.intersection(actor.options)})
        check_actor(actor.actor_name, actor.options)
        functions = key_functions(actor.options)
        given = {name: actor.options[name] for name in KEY_OPTIONS.intersection(actor.options) - functions.keys()}
        check_options(given)
        self.emit_before("declare_actor", actor)
        self.declare_queue(actor.queue_name)
        self.published.pop(actor.actor_name, None)
        if actor.options.get("http"):
            self.published[actor.actor_name] = self._publish(actor)
        actor.fn = storing(actor.fn, self._keep_result, self._disarm)
        self.actors[actor.actor_name] = actor
        self.key_functions.pop(actor.actor_name, None)
        if functions:
            self.key_functions[actor.actor_name] = functions
        self._lane_cache.clear()
        if self.pump is not None:
            self.pump.lanes_changed()
        self.emit_after("declare_actor", actor)

    def _publish(self, actor: Any) -> bytes:
        """Its signature and what it declares for its jobs, for who submits by name; see `Store.published`."""
        functions = key_functions(actor.options)
        defaults = {name: value for name, value in actor.options.items() if name in LIFTED and name not in functions}
        described = {
            "queue": actor.queue_name,
            "defaults": {**defaults, "priority": actor.priority},
            **({"keys": sorted(functions)} if functions else {}),
            **signature_of(actor.fn),
        }
        return codec.encode(described, path=f"actor {actor.actor_name}")

    def get_actor(self, actor_name: str) -> Any:
        """The actor of this name, our own included. Raises Dramatiq's ActorNotFound."""
        return self._internal.get(actor_name) or super().get_actor(actor_name)

    def declare_queue(self, queue_name: str) -> None:
        """Declares a queue; one that is declared already is left as it is."""
        if queue_name not in self.queues:
            self.emit_before("declare_queue", queue_name)
            self.queues[queue_name] = None
            self.emit_after("declare_queue", queue_name)

    def consume(self, queue_name: str, prefetch: int = 1, timeout: int = 30_000) -> Consumer:
        """A consumer of a queue. `timeout` in milliseconds."""
        if queue_name not in self.queues:
            raise dramatiq.errors.QueueNotFound(queue_name)
        if self.pump is None:
            self.pump = self._new_pump()
        return StoreConsumer(self, self.pump, queue_name, prefetch, timeout / 1000)

    def enqueue(self, message: Message[Any], *, delay: int | None = None) -> Message[Any]:
        """Puts a message into its queue; `delay` in milliseconds.

        An id that the store has already is left as it is. What this returns has the id of another job where that stays
        the only one with its unique key; where it is rejected then, `JobExists` is raised. Called by a middleware after
        an actor call, the message is created together with that job's end; for the job in hand it asks for a retry.
        """
        settling: Delivery | None = getattr(self._local, "settling", None)
        given: object = message  # what Dramatiq's hooks pass here as a message may be its proxy
        self.emit_before("enqueue", message, delay)
        if settling is not None and settling is given:
            settling.retry_delay = (delay or 0) / 1000
        else:
            [message] = self._create([message], delay)
        self.emit_after("enqueue", message, delay)
        return message

    def enqueue_many(self, messages: Sequence[Message[Any]], *, delay: int | None = None) -> list[Message[Any]]:
        """Puts messages into their queues, some hundred in one call of the store; `delay` in milliseconds. Returns them
        as `enqueue` does."""
        for message in messages:
            self.emit_before("enqueue", message, delay)
        created = self._create(messages, delay)
        for message in created:
            self.emit_after("enqueue", message, delay)
        return created

    def enqueue_once(
        self,
        messages: Sequence[tuple[Message[Any], int | None]],
        key: str,
        fingerprint: bytes,
        holds: float,
        *,
        seen: SeenKey | None = None,
        wants_record: bool = False,
    ) -> Submitted:
        """Puts messages, each with its delay in milliseconds, into their queues; see `Store.submit_once`."""
        for message, delay in messages:
            self.emit_before("enqueue", message, delay)
        jobs = [self.new_job(message, delay=delay) for message, delay in messages]
        submitted = self.store.submit_once(jobs, key, fingerprint, holds, seen=seen, wants_record=wants_record)
        for message, delay in messages:
            self.emit_after("enqueue", message, delay)
        return submitted

    def _create(self, messages: Sequence[Message[Any]], delay: int | None) -> list[Message[Any]]:
        settling: Delivery | None = getattr(self._local, "settling", None)
        current = settling or current_delivery.get()
        parent = None if current is None else current.held.id
        jobs = [self.new_job(message, delay=delay, parent=parent) for message in messages]
        if settling is not None:
            settling.spawned.extend(jobs)
        elif any(job.unique_key is not None for job in jobs):
            ids = self.store.submit_unique(jobs)
            return [
                message if message.message_id == job_id else dataclasses.replace(message, message_id=job_id)
                for message, job_id in zip(messages, ids, strict=True)
            ]
        else:
            self.store.submit(jobs)
        return list(messages)

    def new_job(self, message: Message[Any], *, delay: float | None = None, parent: str | None = None) -> NewJob:
        """The job that a message stands for, with what its actor declares; `delay` in milliseconds."""
        defaults: dict[str, Any] = {}
        actor = self.actors.get(message.actor_name)
        if actor is not None:
            defaults = {name: value for name, value in actor.options.items() if name in LIFTED}
            defaults["priority"] = actor.priority
            for name, function in self.key_functions.get(message.actor_name, {}).items():
                # One that came with the job goes before it.
                defaults[name] = (
                    None
                    if name in message.options
                    else key_of(message.actor_name, name, function, message.args, message.kwargs)
                )
        if parent is not None:
            defaults["parent"] = parent
        job = to_job(message, self.settings, delay=None if delay is None else delay / 1000, defaults=defaults)
        return self.store.stashed(job)

    def flush(self, queue_name: str) -> None:
        """Forgets the jobs of a queue that wait."""
        self.store.flush(queue_name)

    def flush_all(self) -> None:
        """Forgets all jobs that wait, of every queue of this namespace."""
        self.store.flush()

    def join(self, queue_name: str, *, timeout: int | None = None) -> None:
        """Waits until every job of a queue has ended: queued, scheduled and running ones count as unfinished.

        `timeout` in milliseconds; raises Dramatiq's QueueJoinTimeout after it.
        """
        deadline = None if timeout is None else time.monotonic() + timeout / 1000
        while any(count.queue == queue_name and not count.state.ended for count in self.store.counts()):
            if deadline is not None and time.monotonic() >= deadline:
                raise QueueJoinTimeout(queue_name)
            time.sleep(JOIN_INTERVAL)

    def close(self) -> None:
        """Ends the background threads of this broker and its connections."""
        self.progress.close()
        self.journals.close()
        self.meter.close()
        close_bell(self.store)
        close_hub(self.store)
        self.store.connector.close()

    # Hooks. Dramatiq calls each hook of each middleware by name; most do nothing, so only those that do are called.

    def _hooks_of(self, signal: str) -> list[Any]:
        if self._hooked != self.middleware:
            self._hooked = list(self.middleware)
            self._hooks = {}
        hooks = self._hooks.get(signal)
        if hooks is None:
            idle = getattr(Middleware, signal, None)
            hooks = self._hooks[signal] = [
                hook
                for middleware in self.middleware
                if getattr(hook := getattr(middleware, signal), "__func__", hook) is not idle
                and not self._stores_itself(middleware, signal)
            ]
        return hooks

    def _stores_itself(self, middleware: Middleware, signal: str) -> bool:
        # The actor call and the settle store results of ours; the middleware is there for who looks for it.
        return (
            isinstance(middleware, Results)
            and isinstance(middleware.backend, StoreBackend)
            and signal in ("after_process_message", "after_skip_message", "after_nack")
        )

    def emit_before(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Calls the ``before_`` hooks in order."""
        if signal == "process_message":
            self._local.settling = None
            delivery = args[0] if isinstance(args[0], Delivery) else None
            current_delivery.set(delivery)
            if delivery is not None:
                delivery.begun_at = time.monotonic()
                delivery.thread = threading.get_ident()
                if BodyReference.of(delivery.held.body) is not None:
                    self._fetch_arguments(delivery)
                if self.board is not None:
                    self._write_down(self.board, delivery)
                if delivery.held.queue != CALLBACKS:
                    self.meter.begin(delivery)
        elif signal == "worker_boot":
            self._before_worker_boot(args[0])
        elif signal == "worker_shutdown":
            self._before_worker_shutdown(args[0])
        name = "before_" + signal
        for hook in self._hooks_of(name):
            try:
                hook(self, *args, **kwargs)
            except dramatiq.middleware.MiddlewareError:
                raise
            except Exception:
                self.logger.critical("Unexpected failure in %s of %r.", name, hook, exc_info=True)

    def emit_after(self, signal: str, *args: Any, **kwargs: Any) -> None:
        """Calls the ``after_`` hooks in reverse order."""
        if signal in ("process_message", "skip_message") and isinstance(args[0], Delivery):
            delivery = args[0]
            delivery.skipped = signal == "skip_message"
            current_delivery.set(None)
            self._local.settling = delivery
        elif signal == "worker_shutdown":
            self._join_beside()
        name = "after_" + signal
        for hook in reversed(self._hooks_of(name)):
            try:
                hook(self, *args, **kwargs)
            except Exception:
                self.logger.critical("Unexpected failure in %s of %r.", name, hook, exc_info=True)
        if signal == "worker_boot":
            self._after_worker_boot()
        elif signal == "worker_shutdown":
            self._after_worker_shutdown(args[0])

    def _fetch_arguments(self, delivery: Delivery) -> None:
        """In the thread that runs the job: gets arguments and options that are in chunks. A job without them is dead,
        as one is that cannot be decoded; one that the store does not give now goes back."""
        held = delivery.held
        try:
            delivery.takes(from_job(held, self.store.whole_body(held.id, held.body)))
        except StoreError as error:
            delivery.handed_back = True
            raise SkipMessage(str(error)) from error
        except (InvalidJob, ResultMissing) as error:
            delivery.fail()
            delivery.refusal = DeadReason.UNDECODABLE
            raise SkipMessage(str(error)) from error

    # Ends of attempts

    def _keep_result(self, delivery: Delivery, result: Result) -> None:
        """Inside the actor call: encodes the result and writes its chunks, if it is large."""
        stored = encode_result(result, self.settings.max_result_bytes)
        if stored.chunks:
            self.store.write_chunks(delivery.held.id, f"r{delivery.held.attempt}", stored.chunks)
            stored = stored._replace(chunks=())
        delivery.result = stored

    def _write_down(self, board: Board, delivery: Delivery) -> None:
        """Before a job begins: from here on it may be the reason of whatever happens to this process."""
        held = delivery.held
        if held.queue == CALLBACKS:
            return
        actor = self.actors.get(held.actor)
        options = {} if actor is None else actor.options
        limit = delivery.options.get("hard_time_limit", options.get("hard_time_limit"))
        kill = delivery.options.get("kill", options.get("kill"))
        may_be_killed = kill or (kill is None and self.kill_grace is not None)
        if limit is None and not may_be_killed:
            delivery.slot = board.begin_unlimited(held.id, held.attempt)
            return
        entry = Entry(held.id, held.attempt)
        if limit is not None:
            entry.hard, entry.hard_limit = time.monotonic() + limit, limit
        if may_be_killed:
            entry.grace = DEFAULT_GRACE if self.kill_grace is None else self.kill_grace
        delivery.slot = board.begin(entry)
        if entry.limited and self._helper is not None and not self._warned:
            self._warned = True
            logger.warning(
                "job %s: hard_time_limit and kill need a supervisor, which kills a process and starts another; this "
                "one has none, and is not killed. Run the job under `mlqueue worker`",
                held.id,
            )

    def prolong_time_limit(self, delivery: Delivery, by: float) -> None:
        """Gives a job that runs `by` seconds more until its time limit strikes."""
        for item in self.middleware:
            if isinstance(item, TimeLimit) and delivery.thread is not None:
                item.prolong(delivery.thread, by)

    def pause_time_limit(self, delivery: Delivery) -> Callable[[], None]:
        """Stops the clock of a job's time limit, unless it asks that waiting counts; what starts it again."""
        actor = self.get_actor(delivery.actor_name)
        counts = delivery.options.get("waits_count", actor.options.get("waits_count", False))
        if delivery.thread is None or counts:
            return lambda: None
        resumes = [item.pause(delivery.thread) for item in self.middleware if isinstance(item, TimeLimit)]
        self._tell_soft_limit(delivery)

        def resume_all() -> None:
            for resume in resumes:
                resume()
            self._tell_soft_limit(delivery)

        return resume_all

    def _tell_soft_limit(self, delivery: Delivery) -> None:
        if delivery.slot is None or delivery.thread is None:
            return
        for item in self.middleware:
            # Of one that has struck the time stays: its grace runs.
            if isinstance(item, TimeLimit) and (when := item.deadlines.when(delivery.thread)) < float("inf"):
                delivery.slot.change(soft=when)

    def log_bytes_of(self, delivery: Delivery) -> int:
        """How much of the log of a job is kept, in bytes."""
        actor, kept = self.actors.get(delivery.actor_name), self.settings.job_logs
        if actor is None:
            return 0  # a callback
        chosen = delivery.options.get("job_logs", actor.options.get("job_logs"))
        return (kept or 0) if chosen is None else (kept or LOG_BYTES) if chosen else 0

    def _disarm(self) -> None:
        """In the thread of an actor call that has ended: no time limit may strike from here on."""
        for middleware in self.middleware:
            if isinstance(middleware, TimeLimit):
                middleware.disarm()

    def settle(self, pump: Pump, delivery: Delivery) -> None:
        """Ends the attempt: the verdict is frozen here, before Dramatiq clears the exception."""
        self._local.settling = None
        if delivery.slot is not None:
            delivery.slot.end()
        delivery.progress = self.progress.take(delivery)
        actor = self.actors.get(delivery.actor_name)
        self.meter.end(delivery, None if actor is None else actor.fn)
        try:
            settle = delivery.verdict()
        except Exception as error:
            # Escaping from here it would be logged and forgotten, and the job would run for ever.
            logger.exception("the end of job %s cannot be written; it is dead", delivery.held.id)
            settle = Settle.bury(
                delivery.held.id, delivery.held.attempt, DeadReason.UNSTORABLE, describe(error), common_of()
            )
        if delivery.journal is not None and delivery.journal.end():
            settle.journal = delivery.journal
        delivery.context = None  # else each would keep the other until the garbage is collected
        wait = actor is not None and bool(actor.options.get("sync_ack"))
        if isinstance(threading.current_thread(), dramatiq.worker.ConsumerThread):
            wait = False
        pump.settle(delivery, settle, wait=wait)

    # Workers

    def supervise(self, worker_id: str, *, only_alone: bool = False, board: Board | None = None) -> None:
        """Has the next worker of this broker take an incarnation that its supervisor has chosen, and beats for.

        `only_alone`: it takes only jobs that are to run alone. `board`: where it writes down what it has in hand.
        """
        self._worker_id = worker_id
        self._only_alone = only_alone
        self.board = board

    def _new_pump(self) -> Pump:
        return Pump(
            self.store,
            lanes=self._lanes,
            hello=self._hello,
            deliver=lambda held: Delivery(from_job(held), held, self),
            only_alone=self._only_alone,
            worker_id=self._worker_id,
        )

    def _lanes(self, queues: Iterable[str]) -> list[tuple[str, str]]:
        """The lanes that a worker can take jobs from: every actor it knows, in every queue that it serves."""
        names = tuple(sorted(queues))
        lanes = self._lane_cache.get(names)
        if lanes is None:
            actors = sorted(name for name in self.actors if name != LISTENER or self.functions_for_all)
            lanes = [self.store.lane(queue, actor) for queue in names for actor in actors]
            turns = [name for name in actors if takes_turns(self.actors[name].options)]
            lanes += [self.store.lane(queue, actor, turns=True) for queue in names for actor in turns]
            known, served, quoted = set(self.functions), set(map(quote, names)), set(map(quote, self.actors))
            lanes += [
                (queue, lane)
                for queue, lane, functions in self._function_lanes
                if queue in served and known.issuperset(functions) and lane.partition("|")[0] in quoted
            ]
            self._lane_cache[names] = lanes = list(dict.fromkeys(lanes))
        return lanes

    def _hello(self) -> None:
        if self.pump is None:
            return
        info = {
            "host": platform.node(),
            "pid": os.getpid(),
            # So that a supervisor that starts later sees whether this process is gone.
            "place": place(),
            "born": born(os.getpid()),
            "started_at": time.time(),
            "threads": self.worker.worker_threads if self.worker else 0,
            "queues": sorted(self.pump.live_queues()) if self.pump else [],
            "actors": sorted(self.actors),
            "functions": sorted(map(quote, self.functions)),
            "for_all": bool(self.functions_for_all),
            "function_queues": sorted(map(quote, self.pump.live_queues())),
            "supervised": self._worker_id is not None,
            "python": platform.python_version(),
            "argv": sys.argv[:8],
        }
        queues = {name: actor.queue_name for name, actor in self.actors.items()}
        self.tell_limits()  # before it fetches any: else it would run more than may be
        self.store.start_worker(self.pump.worker, info, queues, self.published, self.key_functions)
        # After that: from then on it is told of new ones.
        if self.pump.on_functions is not None:
            self.pump.on_functions()
        self._function_lanes = self.store.function_lanes()
        self._lane_cache = {}

    def tell_limits(self) -> None:
        """Makes known what jobs of the actors here need, and what the settings say that there is of it."""
        options = {name: actor.options for name, actor in self.actors.items()}
        self.store.declare_limits(
            self.settings.capacities,
            {name: (given.get("resources") or {}, given.get("concurrency")) for name, given in options.items()},
        )

    def _before_worker_boot(self, worker: dramatiq.Worker) -> None:
        self.worker = worker
        self.broken.clear()
        chosen = any(actor.options.get("job_logs") for actor in self.actors.values())
        if (chosen or self.settings.job_logs is not None) and not self._captures:
            self._captures = True
            capture.install()
        self.pump = self._new_pump()
        worker.work_queue = WorkQueue(self.pump)  # type: ignore[assignment]
        self.beside = Beside(self, self.pump, worker)
        self.pump.on_callbacks = self.beside.callbacks_waiting
        self.pump.crew = _Threads(worker, self.beside, self.broken)
        if self.on_worker is not None:
            self.on_worker(self.pump)
        # Where jobs go that were submitted by name before any worker had declared their actor.
        self.declare_queue("default")
        if self._worker_id is None:
            self.board = Board.create()
            self._helper = HeartbeatHelper(self.store, self.pump.worker, self.board)
            self._helper.start()

    def _after_worker_boot(self) -> None:
        if self.pump is not None and isinstance(self.pump.crew, _Threads):
            self.pump.crew.booted = True

    def _before_worker_shutdown(self, worker: dramatiq.Worker) -> None:
        self._stopping_since = time.monotonic()
        if self.beside is not None:
            self.beside.stop()
        if self.pump is not None:
            self.pump.stop_fetching()
            if isinstance(self.pump.crew, _Threads):
                self.pump.crew.booted = False
        queue = worker.work_queue
        if isinstance(queue, WorkQueue):
            queue.stop(worker.worker_threads)

    def _join_beside(self) -> None:
        """What runs beside the Worker's threads ends, before the event loop does, and all that its jobs may need."""
        beside, self.beside = self.beside, None
        if beside is not None:
            left = max(0.0, self._stopping_since + self.patience - time.monotonic())
            beside.join(left, min(max(left, 1.0), self.settings.callback_timeout + 1))

    def _after_worker_shutdown(self, worker: dramatiq.Worker) -> None:
        # Left in place, the stopped worker's own middleware would start a consumer for the next queue that is declared.
        self.middleware = [item for item in self.middleware if getattr(item, "worker", None) is not worker]
        pump, self.pump, self.worker = self.pump, None, None
        if self._captures:
            self._captures = False
            capture.uninstall()
        if self.on_worker_end is not None:
            self.on_worker_end()
        if self._helper is not None:
            # Before the worker is released: a beat after that would make it known again.
            self._helper.stop()
            self._helper = None
            if self.board is not None:
                self.board.close_fd()
        self.board = None
        if pump is not None:
            pump.end(broken=self.broken.is_set())

    def forget_parents_worker(self) -> None:
        """In a process that was forked: the worker, its threads and what they had in hand are those of the parent."""
        self.pump = self.beside = self.worker = self._helper = self.board = None

    def give_up(self) -> None:
        """Gives back at once what the worker of this process runs, without a strike. The process is about to end."""
        if self._helper is not None:
            self._helper.stop()
        if self.pump is not None:
            self.pump.stop_fetching()
            try:
                self.store.release(self.pump.worker, "drain", "the worker was stopped at once")
            except MLQueueError as error:
                logger.warning("jobs could not be given back; they will be when the lease ends: %s", error)

    @property
    def stopping(self) -> bool:
        """Whether the worker of this process is being drained."""
        return self.pump is not None and self.pump.stopping


class StoreConsumer(Consumer):
    """One queue's end of the pump."""

    def __init__(self, broker: StoreBroker, pump: Pump, queue_name: str, prefetch: int, timeout: float) -> None:
        self.broker = broker
        self.pump = pump
        self.queue_name = queue_name
        self.prefetch = prefetch
        self.timeout = timeout
        self._open = True
        pump.open(queue_name)

    def __next__(self) -> Delivery | None:
        return self.pump.next(self.queue_name, self.timeout, self.prefetch)

    def ack(self, message: MessageProxy) -> None:
        """Ends the attempt as its verdict says: success, a retry, or failure when no result was stored."""
        self.broker.settle(self.pump, message)  # type: ignore[arg-type]

    def nack(self, message: MessageProxy) -> None:
        """Ends the attempt as dead."""
        self.broker.settle(self.pump, message)  # type: ignore[arg-type]

    def requeue(self, messages: Iterable[MessageProxy]) -> None:
        """Gives jobs that did not start back to their queues."""
        try:
            self.pump.give_back(message for message in messages if isinstance(message, Delivery))
        except MLQueueError as error:
            logger.warning("jobs could not be given back; they will be when the lease ends: %s", error)

    def close(self) -> None:
        """Closes this consumer; what it has fetched and not handed on goes back."""
        if self._open:
            self._open = False
            try:
                self.pump.close(self.queue_name)
            except MLQueueError as error:
                logger.warning("jobs could not be given back; they will be when the lease ends: %s", error)


class _Threads:
    """A Worker's threads, as those who run the jobs of its pump."""

    def __init__(self, worker: dramatiq.Worker, beside: Beside, broken: threading.Event) -> None:
        self.worker = worker
        self.beside = beside
        self.broken = broken
        #: Whether all threads have been made, and none has been told to end.
        self.booted = False
        self._alive = worker.worker_threads
        self._counted_at = 0.0

    def free(self, in_hand: int) -> int:
        """How many more jobs can start at once, `in_hand` being fetched; below 0 when more are fetched than can."""
        now = time.monotonic()
        if self.booted and now > self._counted_at + COUNT_THREADS_EVERY:
            self._counted_at = now
            self._alive = sum(thread.is_alive() for thread in self.worker.workers)
            if self._alive < self.worker.worker_threads and not self.broken.is_set():
                logger.critical(
                    "%d of %d worker threads have died; this worker takes no more jobs and should be restarted",
                    self.worker.worker_threads - self._alive,
                    self.worker.worker_threads,
                )
                self.broken.set()
        return 0 if self.broken.is_set() else self._alive + self.beside.lent - in_hand

    def take_back(self) -> list[Delivery]:
        """The jobs that no thread has begun, taken out of the Worker's queue."""
        queue = self.worker.work_queue
        return queue.take_all() if isinstance(queue, WorkQueue) else []


__all__ = ["LISTENER", "StoreBroker", "StoreConsumer"]
