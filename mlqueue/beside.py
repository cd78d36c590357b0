"""Running jobs beside a Worker's threads: jobs that running jobs wait for, and callbacks.

A job that waits for another one would hold the thread that the other needs. So the other, if it waits in a queue of
this worker, is handed over to the waiting one and run in a thread of its own; and while a job waits for one that runs
elsewhere, or cannot run here, its place is lent: one thread more takes jobs from the queue.

Callbacks are jobs too, of a queue of their own, which the Worker's threads do not take: a receiver that does not answer
delays no job.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any, Final, cast

import dramatiq
from dramatiq.worker import WorkerThread

from .delivery import Delivery
from .errors import MLQueueError, StoreError
from .pump import Pump, WorkQueue
from .store import Held

#: How many jobs may run beside the threads of a worker because others wait for them. A chain of waits has so many links
#: within one process.
MOST_BESIDE: Final = 512

#: How many callbacks a worker delivers at a time: to four receivers that hang, as many as one is given
#: (`mlqueue.callbacks.MOST_OF_HOST`).
MOST_CALLBACKS: Final = 32

#: How often `Beside.join` looks, in seconds.
JOIN_INTERVAL: Final = 0.02

#: The pause after a call that the store did not take, in seconds.
RETRY_PAUSE: Final = 0.5

logger = logging.getLogger("mlqueue.beside")


class Beside:
    """The threads beside those of one Worker."""

    def __init__(self, broker: Any, pump: Pump, worker: dramatiq.Worker) -> None:
        self._broker = broker
        self._pump = pump
        self._worker = worker
        self._lock = threading.Condition()
        self._threads: set[threading.Thread] = set()
        self._waited_for = 0
        self._callbacks = 0
        self._claiming = False
        self._claim_again = False
        self._stopping = self._closed = False
        #: How many places are lent.
        self.lent = 0

    # Jobs that are waited for

    @property
    def worker(self) -> str:
        """The incarnation of the worker."""
        return self._pump.worker

    def lanes(self) -> list[tuple[str, str]]:
        """The lanes that a job here may be handed over from; none when no more can run beside."""
        with self._lock:
            # Also while the worker stops: the job in hand ends when what it waits for has.
            if self._closed or self._waited_for >= MOST_BESIDE:
                return []
        return self._pump.lanes()

    def run(self, held: Held) -> None:
        """Runs a job that was handed over, in a thread of its own."""
        delivery = self._pump.take_beside(held)
        if delivery is None:
            return
        with self._lock:
            self._waited_for += 1
        self._spawn(delivery, self._ended_waited_for)

    def _ended_waited_for(self) -> None:
        with self._lock:
            self._waited_for -= 1

    def recover(self, ask: Callable[[], list[Held]]) -> None:
        """Runs what the store may have handed over in an answer that did not arrive: asks until it does."""

        def until_answered() -> None:
            while not self._closed:
                try:
                    handed_over = ask()
                except StoreError:
                    self._pause()
                except MLQueueError:
                    return
                else:
                    for held in handed_over:
                        self.run(held)
                    return

        self._start(threading.Thread(target=until_answered, name="mlqueue-recover", daemon=True))

    @contextlib.contextmanager
    def lend(self) -> Iterator[None]:
        """Within, one thread more takes jobs from the worker's queue."""
        with self._lock:
            if self._stopping or self.lent >= MOST_BESIDE:
                thread = None
            else:
                self.lent += 1
                thread = WorkerThread(
                    broker=self._broker,
                    consumers=self._worker.consumers,
                    work_queue=self._worker.work_queue,
                    worker_timeout=self._worker.worker_timeout,
                )
                thread.name = "mlqueue-lent"
        if thread is None:
            yield
            return
        self._start(thread)
        self._pump.look_again()
        try:
            yield
        finally:
            with self._lock:
                self.lent -= 1
            thread.stop()
            cast(WorkQueue, self._worker.work_queue).nudge()  # it looks up, and ends

    # Callbacks

    def callbacks_waiting(self) -> None:
        """There may be callbacks to deliver. Returns at once."""
        with self._lock:
            self._claim_again = True
            if self._claiming or self._stopping or self._callbacks >= MOST_CALLBACKS:
                return
            self._claiming = True
        try:
            self._start(threading.Thread(target=self._claim, name="mlqueue-callbacks", daemon=True))
        except RuntimeError as error:  # no thread can be started now
            logger.warning("callbacks wait to be delivered: %s", error)
            with self._lock:
                self._claiming = False

    def _claim(self) -> None:
        nonce = uuid.uuid4().hex
        while True:
            with self._lock:
                room = MOST_CALLBACKS - self._callbacks
                if self._stopping or room <= 0 or not self._claim_again:
                    self._claiming = False
                    return
                self._claim_again = False
            try:
                claimed = self._pump.store.claim_callbacks(self._pump.worker, nonce, room)
            except StoreError as error:
                logger.warning("callbacks wait to be delivered: %s", error)
                self._claim_again = True  # with the same nonce: what the store may have handed over is not lost
                self._pause()
                continue
            nonce = uuid.uuid4().hex
            if not claimed:
                self._pump.look_again()  # the bell may have rung for one that is not due yet: a turn says when it is
            for held in claimed:
                delivery = self._pump.take_beside(held)
                if delivery is not None:
                    with self._lock:
                        self._callbacks += 1
                    self._spawn(delivery, self._ended_callback)
            if len(claimed) == room:
                self._claim_again = True

    def _ended_callback(self) -> None:
        with self._lock:
            self._callbacks -= 1
            again = self._claim_again
        if again:
            self.callbacks_waiting()

    # Threads

    def stop(self) -> None:
        """Takes no more; what runs goes on."""
        with self._lock:
            self._stopping = True
            self._lock.notify_all()

    def join(self, patience: float, callbacks: float) -> None:
        """Waits until all has ended: jobs for at most `patience` seconds, callbacks for at most `callbacks`."""
        begun = time.monotonic()
        with self._lock:
            while True:
                self._threads = {thread for thread in self._threads if thread.is_alive()}
                # In hand is what the threads of lent places still run: the Worker knows nothing of them.
                jobs = self._waited_for or self._pump.in_hand
                limit = patience if jobs else min(patience, callbacks) if self._callbacks else callbacks
                left = begun + limit - time.monotonic()
                if not self._threads or left <= 0:
                    break
                self._lock.wait(min(left, JOIN_INTERVAL))
            self._closed = True

    def _pause(self) -> None:
        with self._lock:
            if not self._stopping:
                self._lock.wait(RETRY_PAUSE)

    def _start(self, thread: threading.Thread) -> None:
        with self._lock:
            self._threads = {one for one in self._threads if one.is_alive()} | {thread}
            thread.start()

    def _spawn(self, delivery: Delivery, ended: Callable[[], None]) -> None:
        def process() -> None:
            try:
                # A worker's thread that is not started: only its way to process a message is used.
                runner = WorkerThread(
                    broker=self._broker,
                    consumers={delivery.queue_name: _Settling(self._broker, self._pump)},  # type: ignore[dict-item]
                    work_queue=_Uncounted(),  # type: ignore[arg-type]
                    worker_timeout=1000,
                )
                runner.process_message(delivery)
            finally:
                ended()

        try:
            self._start(threading.Thread(target=process, name=f"mlqueue-beside-{delivery.actor_name}", daemon=True))
        except RuntimeError as error:  # no thread can be started now
            logger.warning("job %s goes back to its queue: %s", delivery.held.id, error)
            ended()
            self._pump.give_back([delivery])


class _Settling:
    """Where a thread here puts a job that it has run: it is settled as a consumer does it."""

    def __init__(self, broker: Any, pump: Pump) -> None:
        self._broker = broker
        self._pump = pump

    def post_process_message(self, delivery: Delivery) -> None:
        """Settles the job."""
        signal = "nack" if delivery.failed else "ack"
        self._broker.emit_before(signal, delivery)
        self._broker.settle(self._pump, delivery)
        self._broker.emit_after(signal, delivery)


class _Uncounted:
    """Stands for the queue that a job did not come from."""

    def task_done(self) -> None: ...


__all__ = ["Beside"]
