"""MLQ's listeners: functions that run what `MLQ.post` posts, and the worker in this process that they run in.

Underneath it is one actor of Dramatiq's, which calls the functions. Which of them a worker has stands in
`StoreBroker.functions`; a job for a function that this one lacks is in a lane that it does not take jobs from.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import numbers
import os
import queue
import sys
import threading
from collections.abc import Callable, Collection
from datetime import timedelta
from typing import Any, Final

import dramatiq
from dramatiq.asyncio import async_to_sync

from . import outliving
from .broker import LISTENER, StoreBroker
from .current import CurrentJob, current_job
from .delivery import HandBack, current_delivery
from .errors import InvalidJob, StoreUnavailable
from .functions import QUEUE, Function, check_listener, name_of
from .handle import Job
from .job import Result, id_in
from .loading import LoadedFunctions
from .pump import Pump

__all__ = ["QUEUE", "Listeners"]

logger = logging.getLogger("mlqueue.listener")

#: As good as no limit for Dramatiq, in milliseconds.
FOREVER_MS: Final = 10**11

#: How often a listener that finishes its last job looks whether a signal has come, in seconds.
LOOK_INTERVAL: Final = 0.2

#: Whether this process works already, as those of `mlqueue worker` do: there a listener adds its function, and starts
#: nothing.
works_already = False


class Listeners:
    """The functions of one app in this process.

    Parameters:
      broker: The app's.
      post: Its `MLQ.post`, for the functions.
      get_job: Its `MLQ.get_job`.
    """

    def __init__(
        self, broker: StoreBroker, *, post: Callable[..., str], get_job: Callable[[str], dict[str, Any]]
    ) -> None:
        self._broker = broker
        self._post = post
        self._get_job = get_job
        self._lock = threading.Lock()
        # Another one: it is taken while a worker is started, which is done under the first.
        self._naming = threading.Lock()
        #: By name, in order of registration. Replaced as a whole: jobs look without the lock.
        self._functions: dict[str, Function] = {}
        self._posted = LoadedFunctions(broker.store, self._posted_changed)
        broker.on_worker = self._worker_boots
        broker.on_worker_end = self._posted.stop
        self._service: _Service | None = None

    # Functions

    def add(self, function: Function) -> None:
        """Adds a function; one of the same name is replaced, and keeps its place."""
        name = name_of(function)
        check_listener(function, name)
        with self._naming:
            self._functions = {**self._functions, name: function}
            self._changed()

    def remove(self, function: Function | str) -> bool:
        """Takes a function away; whether it was there."""
        name = function if isinstance(function, str) else name_of(function)
        with self._naming:
            left = {key: value for key, value in self._functions.items() if key != name}
            gone = len(left) < len(self._functions)
            self._functions = left
            if gone:
                self._changed()
        return gone

    def _changed(self) -> None:
        # Until the posted ones are loaded, no job is taken that should have them.
        own = self._functions if self._posted.ready else {}
        posted = self._posted if self._posted.ready else None
        self._broker.functions = tuple({**own, **(posted.named() if posted else {})})
        self._broker.functions_for_all = tuple({**own, **(posted.usable() if posted else {})})
        if LISTENER not in self._broker.actors:
            declare = dramatiq.actor(broker=self._broker, actor_name=LISTENER, queue_name=QUEUE, max_retries=0)
            declare(self._run)
        elif (pump := self._broker.pump) is not None:
            pump.lanes_changed()

    def _posted_changed(self) -> None:
        with self._naming:
            self._changed()

    def _worker_boots(self, pump: Pump) -> None:
        """A worker of this process begins: one that may take posted functions needs no other to listen."""
        if self._posted.enabled:
            pump.on_functions = self._posted.look
            self._posted.start(pump.worker)
            self._posted_changed()

    # Jobs

    def _run(self, msg: Any) -> object:
        """The actor: has the functions of the job in hand, or all of them, called in turn."""
        job = current_job()
        delivery = current_delivery.get()
        assert delivery is not None
        if not delivery.held.functions or not self._functions.keys() >= set(delivery.held.functions):
            try:
                self._posted.catch_up()
            except StoreUnavailable:
                raise HandBack from None  # nothing has been done yet
        if delivery.held.functions:
            present = {**self._posted.named(), **self._functions}
            chosen = [present.get(name) for name in delivery.held.functions]
        else:
            # Those of this program first, and in place of posted ones of their names.
            chosen = list({**self._functions, **_without(self._posted.usable(), self._functions)}.values())
        if not chosen or None in chosen:
            raise HandBack  # taken away when the job was on its way here: it waits for a worker that has them
        value = None
        for number, function in enumerate(chosen):
            assert function is not None
            try:
                utils = self._utils(job)
            except StoreUnavailable:
                if number == 0:
                    raise HandBack from None  # nothing has been done yet
                raise
            value = function(msg, utils)
            if inspect.isawaitable(value):
                value = async_to_sync(_awaited)(value)
        return split(value)

    def _utils(self, job: CurrentJob) -> dict[str, Any]:
        return {
            "full_message": self._get_job(job.id),
            "update_progress": job.progress,
            "store_data": job.store_data,
            "fetch_data": job.fetch_data,
            "post": self._post,
            "block_until_result": self._block_until_result,
        }

    def _block_until_result(self, job_id: str, timeout: float | timedelta | None = None) -> Any:
        """The short result of another job if it has one, else the full one, when it has ended."""
        store = self._broker.store
        result = Job[Any](store, id_in(store.namespace, job_id)).full_result(timeout)
        return result.full if result.short is None else result.short

    # The worker

    def start(self, threads: int) -> None:
        """Starts the worker of this process, unless there is one. Raises `StoreUnavailable`."""
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise InvalidJob(f"threads={threads!r}: it must be an int, 1 or more.")
        if works_already or "dramatiq.cli" in sys.modules:  # the command of that name starts a worker, too
            return
        with self._lock:
            if self._service is not None and self._service.process != os.getpid():
                self._service = None
                self._broker.forget_parents_worker()
            if self._service is not None and not self._service.ended.is_set():
                self._service.go_on(threads)
            elif self._broker.worker is None:  # else somebody has started one who stops it, too
                self._broker.store.connector.execute("PING")
                self._service = _Service(self._broker, threads, self._lock)
                self._service.start()

    def stop(self, patience: float | None = None) -> None:
        """Has the worker take no other job, and end with the one in hand; `patience` seconds later in any case.
        Returns at once."""
        with self._lock:
            if self._service is not None:
                self._service.stop(patience)

    def join(self, timeout: float | None = None) -> bool:
        """Waits until the worker has ended; False when `timeout` seconds pass first."""
        service = self._service
        return service is None or outliving.wait(service, timeout)


class _Service:
    """The worker that `create_listener` has started, until it is stopped."""

    def __init__(self, broker: StoreBroker, threads: int, lock: threading.Lock) -> None:
        self.ended = threading.Event()
        self.process = os.getpid()
        self._broker = broker
        self._threads = threads
        self._lock = lock
        #: How long the job in hand may still take, in ms. A simple queue, since a signal's handler puts into it.
        self._orders: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._stopping = self._again = self._signalled = False
        #: What came of starting the worker: None when it runs, else the error.
        self._started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self._worker = self._make()
        self._thread = threading.Thread(target=self._run, name="mlqueue-listener", daemon=True)

    def start(self) -> None:
        # Before the worker takes a job: from then on a signal must find the handler. One that comes now is raised here,
        # in the main program, so the worker is started in the other thread, which that does not cut off half-way.
        outliving.stay(self)
        self._thread.start()
        if (error := self._started.get()) is not None:
            raise error

    # These two are called under the lock.

    def go_on(self, threads: int) -> None:
        """There is to be a worker: another one, where this one is stopping."""
        if self._stopping:
            self._again, self._threads = True, threads

    def stop(self, patience: float | None) -> None:
        self._again = False
        if not self._stopping:
            self._stopping = True
            if self._broker.pump is not None:
                # At once: the job in hand may be the one that calls this, and end before the worker is told.
                self._broker.pump.stop_fetching()
            self._orders.put(FOREVER_MS if patience is None else round(patience * 1000))

    # These are called in the main thread, for a signal.

    def stop_soon(self) -> None:
        self._signalled = True
        self._orders.put(round(self._broker.settings.drain * 1000))

    def give_up(self) -> None:
        logger.warning("stopped again: ending at once; running jobs go back to their queue")
        self._broker.give_up()
        self._end()

    def _make(self) -> dramatiq.Worker:
        return dramatiq.Worker(self._broker, worker_threads=self._threads)

    def _run(self) -> None:
        try:
            self._worker.start()
        except Exception as error:  # noqa: BLE001 - raised where it was started
            self._end()
            self._started.put(error)
            return
        self._started.put(None)
        try:
            while True:
                self._stop_worker(self._orders.get())
                with self._lock:
                    if not self._again or self._signalled:
                        self._end()
                        return
                    self._stopping = self._again = False
                    self._worker = self._make()
                    self._worker.start()
        except Exception:
            logger.exception("the listener has ended")
            self._end()

    def _stop_worker(self, patience_ms: int) -> None:
        self._broker.patience = patience_ms / 1000
        stopped = threading.Event()
        if patience_ms == FOREVER_MS:
            with contextlib.suppress(RuntimeError):  # the program is ending, and starts no threads any more
                threading.Thread(target=self._hear_signal, args=(stopped,), name="mlqueue-drain", daemon=True).start()
        self._worker.stop(timeout=patience_ms)
        stopped.set()

    def _hear_signal(self, stopped: threading.Event) -> None:
        """A signal that comes after `shutdown` bounds what that does not."""
        while not stopped.wait(LOOK_INTERVAL):
            if self._signalled:
                if not stopped.wait(self._broker.settings.drain):
                    self.give_up()
                return

    def _end(self) -> None:
        self.ended.set()
        outliving.leave(self)


def _without(functions: dict[str, Function], names: Collection[str]) -> dict[str, Function]:
    return {name: function for name, function in functions.items() if name not in names}


async def _awaited(value: Any) -> Any:
    return await value


def split(value: object) -> object:
    """What a function returned, as an actor returns it: a pair as a `Result` of short and full, all else as it is."""
    if isinstance(value, tuple | list) and len(value) == 2:
        short = _plain(value[0])
        if isinstance(short, str):
            return Result(short=short[: Result.MAX_SHORT], full=value[1])
        if (short is None or isinstance(short, bool | int | float)) and not _are_numbers(value):
            return Result(short=short, full=value[1])
    return value


def _plain(value: object) -> object:
    """A NumPy scalar as Python's own."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def _are_numbers(value: object) -> bool:
    """Whether it is a list of numbers: coordinates, say, rather than two results."""
    return isinstance(value, list) and all(
        isinstance(item, numbers.Real) and not isinstance(item, bool) for item in value
    )
