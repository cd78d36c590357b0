"""What moves jobs between the store and a Worker's threads.

Dramatiq runs one consumer thread for each queue. Here they share one pump: the thread that holds the lead makes a
*turn* for all queues (one script call settles what has been finished and fetches what can be started), the others wait
for what it brings them. When there is nothing to do the leader waits, by ``select``, for two things at once: the
answer to a blocking pop on the doorbells, left outstanding on a connection of its own, and a pipe that finished jobs
write to. So an idle worker polls nothing, and a busy one hears of new jobs while long ones run.

Settles belong to the pump, not to a consumer: with no consumer leading (paused, closed, stopping) the thread that
finishes a job commits it by itself.
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import select
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final, Protocol

import redis

from .delivery import Delivery
from .errors import MLQueueError, StoreError, StoreUnavailable
from .job import DeadReason, JobError
from .store import Held, Settle, Store, Turn
from .store.connection import PASSING, send, translated
from .store.scripts import script
from .store.store import common_of

#: How long a blocking pop stays outstanding, in seconds. A token that is lost with a dead worker costs so much.
SLICE: Final = 5.0

#: The longest and the shortest pause after a turn that could not be made, in seconds.
LONGEST_PAUSE: Final = 1.0
FIRST_PAUSE: Final = 0.02

#: How long a consumer waits for a job while its worker stops, in seconds.
STOPPING_SLICE: Final = 0.05

#: Jobs that last no longer are fetched ahead, in seconds.
TINY: Final = 0.005

#: How much work is fetched ahead, in seconds of the threads' time, and how many jobs at most.
AHEAD: Final = 0.01
MOST_AHEAD: Final = 128

#: How many jobs are seen to be tiny before any is fetched ahead.
SEEN_BEFORE_AHEAD: Final = 16

#: How long a job that was fetched ahead waits for a thread while none ends its job; then it is given back, in seconds.
PARKED: Final = 0.05

#: While threads have work that was fetched ahead, ends of jobs are gathered: for so long, and so many.
GATHER: Final = 0.002
GATHERED: Final = 32

#: How long all threads are busy before the worker's own bell is listened to, in seconds.
ARM_WHEN_FULL: Final = 0.02

#: How long a job must be missing here that the store says is here, until it is given back: an answer may be on its way,
#: in seconds.
STRAYS_AFTER: Final = 10.0

logger = logging.getLogger("mlqueue.pump")


class Crew(Protocol):
    """Who runs the jobs."""

    def free(self, in_hand: int) -> int:
        """How many more jobs can start at once, `in_hand` being fetched; below 0 when more are fetched than can."""

    def take_back(self) -> list[Delivery]:
        """The jobs that no thread has begun: they are no longer the crew's."""


class Pace:
    """How long jobs have run lately, and so how many may be fetched ahead of the threads that are free.

    Usually none, or a short job would wait behind a long one while another worker is idle. Where jobs last no longer
    than a call of the store, a few milliseconds' worth of them are fetched with each call.
    """

    def __init__(self) -> None:
        self.mean = float("inf")
        self._seen = 0

    def ran(self, seconds: float) -> None:
        """A job has run so long."""
        if self._seen == 0 or seconds > 10 * TINY:
            self.mean = seconds
            self._seen = 1
        else:
            self.mean += 0.1 * (seconds - self.mean)
            self._seen += 1

    def ahead(self, threads: int) -> int:
        """How many jobs more than there are free threads may be fetched."""
        if self.mean > TINY or self._seen < SEEN_BEFORE_AHEAD:
            return 0
        return min(MOST_AHEAD, int(threads * AHEAD / max(self.mean, 1e-5)))

    def forget(self) -> None:
        """A job that is not tiny has come: look anew."""
        self._seen = 0
        self.mean = float("inf")


class Unsettled:
    """A settle that the store has not answered yet."""

    __slots__ = ("committed", "sent_alone", "settle")

    def __init__(self, settle: Settle, committed: threading.Event | None = None) -> None:
        self.settle = settle
        #: Set when it has been answered; only where somebody waits for that (``sync_ack``).
        self.committed = committed
        #: Whether it was sent outside the turn that it belongs to, which may have reached the store too.
        self.sent_alone = False


class Pump:
    """One worker incarnation's jobs: fetched, in hand, finished but not settled."""

    def __init__(
        self,
        store: Store,
        *,
        lanes: Callable[[Iterable[str]], list[tuple[str, str]]],
        hello: Callable[[], None],
        deliver: Callable[[Held], Delivery],
        worker_id: str | None = None,
        only_alone: bool = False,
    ) -> None:
        self.store = store
        #: This incarnation: a worker that is started again is another one.
        self.worker = worker_id or uuid.uuid4().hex
        self.crew: Crew | None = None
        self.only_alone = only_alone
        #: Jobs fetched and not settled, by id.
        self.in_hand: dict[str, Delivery] = {}
        self._lanes = lanes
        self._hello = hello
        self._deliver = deliver
        self._condition = threading.Condition()
        self._ready: dict[str, collections.deque[Delivery]] = {}
        self._active: dict[str, int] = {}
        self._leader: int | None = None
        self._unsettled: list[Unsettled] = []
        self._committing = 0
        self._started = False
        #: Whether the store has still to be told which queues and actors this worker has.
        self._unknown = True
        #: Whether the connection of the bells was lost, and with it perhaps what one said.
        self._missed_bells = False
        #: Jobs that the store says are here and are not, with their attempts; and when to look again.
        self._strays: dict[str, int] = {}
        self._strays_at = 0.0
        #: Whether the worker is being drained: turns only settle.
        self.stopping = False
        self._stopping_since = 0.0
        self._wake_read, self._wake_write = _pipe()
        self._asleep = False
        #: Set before the leader is woken: it looks again before it sleeps.
        self._look = False
        self._connection: Any = None
        self._bell: Any = None
        #: What the outstanding pop waits for: nothing, its own bell, or the lanes' bells too.
        self._armed = ""
        self._armed_lanes: list[tuple[str, str]] = []
        #: When the answer to the outstanding pop is overdue, so that nobody can be at the other end.
        self._armed_until = 0.0
        self._tls = False
        self._full_since: float | None = None
        self._ended = False
        #: Jobs that run beside the Worker's threads, by id.
        self.beside: dict[str, Delivery] = {}
        #: Called when callbacks wait to be delivered; None when nobody here does that.
        self.on_callbacks: Callable[[], None] | None = None
        #: Told when a function has been posted or removed. Does not wait.
        self.on_functions: Callable[[], None] | None = None
        #: The job in hand that no other may run beside.
        self._alone: str | None = None
        self._rung = True
        self._hungry = True
        self._due_at: float | None = None
        self._turn_at = 0.0
        self._pending: tuple[tuple[Any, ...], list[Unsettled]] | None = None
        self._pace = Pace()
        #: When a job ended or was fetched last, and since when there is something unsettled.
        self._moved_at = 0.0
        self._unsettled_since = 0.0
        self._pause = FIRST_PAUSE

    # For consumers

    def open(self, queue_name: str) -> None:
        """A consumer of this queue has begun."""
        with self._condition:
            self._ready.setdefault(queue_name, collections.deque())
            self._active[queue_name] = self._active.get(queue_name, 0) + 1
        self.lanes_changed()

    def close(self, queue_name: str) -> None:
        """A consumer of this queue has ended: what it has not handed on goes back."""
        with self._condition:
            left = self._active.get(queue_name, 0) - 1
            if left > 0:
                self._active[queue_name] = left
                return
            self._active.pop(queue_name, None)
            unstarted = list(self._ready.pop(queue_name, ()))
        self.give_back(unstarted)
        if not self._active:
            self.commit()

    def next(self, queue_name: str, timeout: float, prefetch: int) -> Delivery | None:
        """The next job of this queue; None after `timeout` seconds. Never raises for what the store does."""
        begun = time.monotonic()
        thread = threading.current_thread()
        while True:
            deadline = self._deadline(begun, timeout)
            with self._condition:
                if self._is_paused(thread):
                    self._sit_out(queue_name, thread)
                ready = self._ready.get(queue_name)
                if ready:
                    return ready.popleft()
                remaining = deadline - time.monotonic()
                if ready is None or remaining <= 0:
                    if self.crew is not None:
                        self.crew.free(0)  # it looks whether all threads are alive
                    return None
                if self._leader is not None:
                    self._condition.wait(remaining)
                    continue
                self._leader = threading.get_ident()
            try:
                self._lead(queue_name, begun, timeout, thread, prefetch)
            finally:
                with self._condition:
                    self._leader = None
                    self._condition.notify_all()

    def _deadline(self, begun: float, timeout: float) -> float:
        # While the worker stops, its consumer threads look often whether they may end.
        if self.stopping:
            return min(begun + timeout, max(begun, self._stopping_since) + STOPPING_SLICE)
        return begun + timeout

    def _is_paused(self, thread: threading.Thread) -> bool:
        return getattr(thread, "paused", False) and getattr(thread, "running", False)

    def _sit_out(self, queue_name: str, thread: threading.Thread) -> None:
        # Returning None would make Dramatiq's thread close its consumer and sleep for 3 s, twice. Instead it waits
        # here, counted as gone, until it is resumed or stopped.
        self._active[queue_name] -= 1
        self._condition.notify_all()
        try:
            while self._is_paused(thread):
                if self._leader is None and not any(self._active.values()):
                    unstarted = self._take_ready()
                    self._leader = threading.get_ident()
                    self._condition.release()
                    try:
                        self._leave_bells()
                        self.give_back(unstarted)
                        self.commit()
                    finally:
                        self._condition.acquire()
                        self._leader = None
                        self._condition.notify_all()
                thread.paused_event.set()  # type: ignore[attr-defined]
                self._condition.wait(0.05)
        finally:
            self._active[queue_name] += 1
            self._rung = True

    def live_queues(self) -> list[str]:
        """Queues whose consumer is there to take jobs."""
        return [name for name, count in self._active.items() if count > 0]

    # For workers' threads

    def settle(self, delivery: Delivery, settle: Settle, *, wait: bool = False) -> None:
        """Hands over the end of an attempt; returns when it is committed if `wait`, or if nobody leads."""
        entry = Unsettled(settle, threading.Event() if wait else None)
        now = time.monotonic()
        with self._condition:
            if self._forget(delivery) and delivery.begun_at is not None:
                self._pace.ran(now - delivery.begun_at)
            if not self._unsettled:
                self._unsettled_since = now
            self._unsettled.append(entry)
            self._moved_at = now
            led = any(self._active.values())
            quiet = not wait and 1 < len(self._unsettled) < GATHERED and self._backlog() > 0
        if not led:
            self.commit()
            return
        if not quiet:
            self.wake()
        if entry.committed is not None:
            entry.committed.wait()

    def take_beside(self, held: Held) -> Delivery | None:
        """A job that runs beside the Worker's threads; None for one that does already, and for one that cannot be
        decoded, and is dead."""
        try:
            delivery = self._deliver(held)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's alone
            self._bury_undecodable(held, error)
            self.wake()
            return None
        with self._condition:
            present = self.beside.get(held.id)
            if present is not None and present.held.attempt == held.attempt:
                return None  # an answer that came twice
            self.beside[held.id] = delivery
            if held.alone and self._alone is None:
                self._alone = held.id
        return delivery

    def lanes(self) -> list[tuple[str, str]]:
        """The lanes that this worker takes jobs from."""
        return self._lanes(self.live_queues())

    def wake(self) -> None:
        """Makes the leader look again."""
        self._look = True
        if self._asleep:
            try:
                os.write(self._wake_write, b"\0")
            except BlockingIOError:
                pass  # the pipe is full: it will look

    def look_again(self) -> None:
        """There may be room for another job: the leader asks for one."""
        self._rung = True
        self.wake()

    def lanes_changed(self) -> None:
        """There are other lanes to fetch from: an actor has been declared, or a queue's consumer has begun."""
        self._rung = self._unknown = True
        self.wake()

    def commit(self) -> None:
        """Sends what is unsettled outside a turn; returns when the store has it, or when a leader will send it."""
        while True:
            with self._condition:
                # They belong to a turn that was not answered; it is sent again when somebody leads, and finds them
                # settled.
                pending = self._in_doubt()
                batch = pending + self._unsettled
                if not batch:
                    return
                self._unsettled = []
                self._committing += 1
            try:
                self._write_journals(batch)
                refused = self.store.settle([entry.settle for entry in batch])
                for entry in pending:
                    entry.sent_alone = True
                self._answered(batch, refused)
                return
            except StoreError as error:
                logger.warning("%d finished jobs wait to be settled: %s", len(batch), error)
                if not isinstance(error, StoreUnavailable):
                    time.sleep(LONGEST_PAUSE)  # full, or refusing: it did not take its time as one that is away does
                with self._condition:
                    self._unsettled = batch[len(pending) :] + self._unsettled
                    if any(self._active.values()) or self._ended:
                        return
            finally:
                with self._condition:
                    self._committing -= 1
                    self._condition.notify_all()

    def _in_doubt(self) -> list[Unsettled]:
        # A leader may be answered at any moment, so look once.
        pending = self._pending
        return [] if pending is None else [entry for entry in pending[1] if not entry.sent_alone]

    def wait_idle(self) -> None:
        """Returns when no job is in hand and everything that was done is committed."""
        while True:
            with self._condition:
                if not (self.in_hand or self.beside or self._unsettled or self._committing or self._in_doubt()):
                    return
                led = any(self._active.values())
                if led:
                    self._condition.wait(0.05)
            if not led:
                self.commit()
                time.sleep(0.01 if self.in_hand or self.beside else 0)

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        """Returns jobs that did not start to their queues, without a strike."""
        unstarted = list(deliveries)
        with self._condition:
            self._let_go(unstarted)
        if unstarted:
            self.commit()

    def _forget(self, delivery: Delivery) -> bool:
        """A job is in hand no more; whether a thread of the Worker's had it. The lock is held."""
        for jobs in (self.in_hand, self.beside):
            for key in (delivery.held.id, f"{delivery.held.id} {delivery.held.attempt}"):
                if jobs.get(key) is delivery:
                    del jobs[key]
                    return jobs is self.in_hand
        return False

    def _let_go(self, deliveries: Iterable[Delivery]) -> None:
        """Notes that jobs which did not start are to be given back. The lock is held."""
        for delivery in deliveries:
            self._forget(delivery)
            settle = Settle.give_back(delivery.held.id, delivery.held.attempt, common_of(), begun=False)
            self._unsettled.append(Unsettled(settle))

    def _take_ready(self) -> list[Delivery]:
        """What was fetched and handed to no consumer yet, taken out. The lock is held."""
        taken: list[Delivery] = []
        for ready in self._ready.values():
            taken += ready
            ready.clear()
        return taken

    def stop_fetching(self) -> None:
        """From now on turns only settle."""
        with self._condition:
            self._stopping_since = time.monotonic()
            self.stopping = True
            self._rung = True  # the pop that waits for new jobs is to end
            self._condition.notify_all()
        self.wake()

    def begun(self) -> dict[str, int]:
        """The attempts in hand that have begun, by job."""
        return {one.held.id: one.held.attempt for one in self._all_in_hand() if one.begun_at is not None}

    def end(self, *, broken: bool = False) -> None:
        """The worker has stopped: forgets it, and what it still runs goes back without a strike. With a strike when it
        is `broken`: some of these jobs have killed their threads, and would go on killing."""
        self._ended = True
        self.commit()
        if self._started:
            reason, why = ("crash", "a thread of its worker died") if broken else ("drain", "the worker was stopped")
            try:
                self.store.release(self.worker, reason, why, begun=self.begun())
            except StoreError as error:
                logger.warning("worker %s could not be released; its lease will end by itself: %s", self.worker, error)
        self._hang_up()
        if self._connection is not None:
            self._connection.disconnect()
        self._connection = None
        os.close(self._wake_read)
        os.close(self._wake_write)
        self._wake_write = self._wake_read = -1

    # Leading

    def _lead(self, queue_name: str, begun: float, timeout: float, thread: threading.Thread, prefetch: int) -> None:
        while not self._ready.get(queue_name):
            self._look = False
            deadline = self._deadline(begun, timeout)
            if time.monotonic() >= deadline or self._is_paused(thread) or queue_name not in self._active:
                return
            if not self.stopping and self._backlog() and time.monotonic() > self._moved_at + PARKED:
                self._give_back_parked()
            if self._must_turn():
                try:
                    self._turn(prefetch)
                except Exception as error:  # noqa: BLE001 - what escapes here costs 3 s of fetching
                    self._lost(error, deadline)
            else:
                self._sleep(deadline)

    def _must_turn(self) -> bool:
        now = time.monotonic()
        return (
            self._rung
            or (bool(self._unsettled) and not self._gathers(now))
            or self._pending is not None
            or (self._due_at is not None and now >= self._due_at)
            or now >= self._turn_at + SLICE
            or (self._hungry and self._has_room())
        )

    def _backlog(self) -> int:
        """How many jobs are fetched that no thread is free for."""
        return 0 if self.crew is None else max(0, -self.crew.free(len(self.in_hand)))

    def _gathers(self, now: float) -> bool:
        """Whether more ends of jobs are waited for before they are sent: the threads have work meanwhile."""
        return (
            now < self._unsettled_since + GATHER
            and len(self._unsettled) < GATHERED
            and self._backlog() > 0
            and all(entry.committed is None for entry in self._unsettled)
        )

    def _has_room(self) -> bool:
        """Whether it is worth a turn to fetch more: a thread is free, or half of what was fetched ahead is used up."""
        free = self._free()
        return free > 0 and self._backlog() <= free

    def _give_back_parked(self) -> None:
        """No thread has ended its job for a while: what was fetched ahead goes to workers that have time for it."""
        assert self.crew is not None
        parked = self.crew.take_back()
        self._pace.forget()
        with self._condition:
            self._let_go(parked + self._take_ready())
            self._moved_at = time.monotonic()
        self._unsettled_since = 0.0

    def _free(self, prefetch: int = 0) -> int:
        if self.stopping:
            return 0
        if self._alone is not None:
            if self._alone in self.in_hand or self._alone in self.beside:
                return 0
            self._alone = None
        if self.crew is None:
            return max(0, prefetch - len(self.in_hand))
        threads = self.crew.free(0)
        return max(0, threads - len(self.in_hand) + (0 if self.only_alone else self._pace.ahead(threads)))

    def _turn(self, prefetch: int) -> None:
        if self._connection is None:
            self._connection = self.store.connector.connection()
        if self._unknown:
            self._unknown = False  # before it is told: an actor may be declared meanwhile
            try:
                self._hello()
            except BaseException:
                self._unknown = True
                raise
            self._started = True
        if self._pending is None:
            # Under the lock to the end: between the two lists a settle would be in neither.
            with self._condition:
                batch, self._unsettled = self._unsettled, []
                want = self._free(prefetch)
                self._rung = False
                lanes = self._lanes(self.live_queues())
                command = self.store.turn_command(
                    self.worker,
                    uuid.uuid4().hex,
                    want,
                    lanes,
                    [entry.settle for entry in batch],
                    only_alone=self.only_alone,
                    # A pop that waits for other bells than it should is ended by a token on the own bell.
                    poke=self._waits_for_others(lanes, want),
                )
                self._pending = (command, batch)
        else:
            want = self._pending[0][6]
        self._write_journals(self._pending[1], patience=0.0)
        # Sent again, unchanged, until it is answered: the nonce in it makes the store repeat its answer.
        with translated(self.store.connector.where):
            answer = send(self._connection, self._pending[0], script("turn"))
        turn = self.store.read_turn(answer)
        batch = self._pending[1]
        self._pending = None
        self._answered(batch, turn.refused)
        self._took(turn, want)

    def _write_journals(self, batch: list[Unsettled], patience: float | None = None) -> None:
        """Writes what these attempts have shown of themselves: behind their ends it would be refused."""
        journals = [entry.settle.journal for entry in batch if entry.settle.journal is not None]
        if journals:
            journals[0].writer.write_last(journals, patience)
            for entry in batch:
                entry.settle.journal = None

    def _waits_for_others(self, lanes: list[tuple[str, str]], want: int) -> bool:
        if self._armed == "own":
            return want > 0
        return self._armed == "lanes" and (self.stopping or lanes is not self._armed_lanes)

    def _took(self, turn: Turn, want: int) -> None:
        now = time.monotonic()
        self._turn_at = now
        if turn.jobs:
            self._moved_at = now
        self._pause = FIRST_PAUSE
        self._due_at = None if turn.next_due_ms < 0 else now + turn.next_due_ms / 1000
        # Hungry: more is there than this worker had threads for, so it asks again when one is free.
        self._hungry = turn.left
        if not turn.known:
            self._unknown = self._rung = True
        bad: list[tuple[Held, Exception]] = []
        with self._condition:
            for held in turn.jobs:
                try:
                    delivery = self._deliver(held)
                except Exception as error:  # noqa: BLE001 - whatever it is, it is this job's alone
                    bad.append((held, error))
                    continue
                older = self.in_hand.get(held.id)
                if older is not None:
                    # It was taken from this very worker, for its timeout, and runs on.
                    self.in_hand[f"{held.id} {older.held.attempt}"] = older
                self.in_hand[held.id] = delivery
                if held.alone:
                    self._alone = held.id
                self._ready.setdefault(held.queue, collections.deque()).append(delivery)
            if turn.jobs and len(self._ready) > 1:
                self._condition.notify_all()
        for held, why in bad:
            self._bury_undecodable(held, why)
        if turn.callbacks and self.on_callbacks is not None:
            self.on_callbacks()
        if self._missed_bells:
            self._look_at_flags()
            self._strays, self._strays_at = self._missing(), now + STRAYS_AFTER
        elif self._strays and now >= self._strays_at:
            self._give_back_strays()

    def _bury_undecodable(self, held: Held, error: Exception) -> None:
        logger.error("job %s cannot be decoded and is dead: %s", held.id, error)
        settle = Settle.bury(
            held.id,
            held.attempt,
            DeadReason.UNDECODABLE,
            JobError(type=type(error).__name__, message=str(error)),
            common_of(),
        )
        with self._condition:
            self._unsettled.append(Unsettled(settle))

    def _answered(self, batch: list[Unsettled], refused: list[tuple[int, str]]) -> None:
        open_: list[Unsettled] = []
        for index, answer in refused:
            entry = batch[index]
            if answer == "stale":
                if entry.sent_alone:
                    continue
                logger.warning(
                    "attempt %d of job %s was taken over by a later one; what it ended with is dropped",
                    entry.settle.attempt,
                    entry.settle.id,
                )
            elif not self._settled_alone(entry, answer):
                open_.append(entry)
        for entry in batch:
            if entry.committed is not None and entry not in open_:
                entry.committed.set()
        if open_:
            with self._condition:
                self._unsettled.extend(open_)
        if batch:
            with self._condition:
                self._condition.notify_all()

    def _settled_alone(self, entry: Unsettled, answer: str) -> bool:
        """A settle that the store refused is sent once more by itself; then the job is dead as unstorable. False when
        the store could not be asked."""
        settle = entry.settle
        try:
            refused = self.store.settle([settle])
            if not refused or refused[0][1] == "stale":
                return True
            logger.error("job %s could not be settled: %s", settle.id, answer)
            error = JobError(type="", message=f"the store would not take what it ended with: {refused[0][1]}")
            refused = self.store.settle(
                [Settle.bury(settle.id, settle.attempt, DeadReason.UNSTORABLE, error, common_of())],
            )
        except StoreError as failure:
            logger.warning("job %s waits to be settled by itself: %s", settle.id, failure)
            return False
        if refused:
            logger.critical("job %s could not even be buried: %s", settle.id, refused[0][1])
        return True

    def _lost(self, error: Exception, deadline: float) -> None:
        """The store did not answer: drop the connections and wait a little. What was asked stays to be asked."""
        if not isinstance(error, (*PASSING, MLQueueError)):
            logger.critical("unexpected error in a worker's turn; trying again: %s", error, exc_info=error)
        elif self._pause == FIRST_PAUSE:
            logger.warning("the store does not answer; trying again until it does: %s", error)
        self._hang_up()
        if self._connection is not None:
            self._connection.disconnect()
        self._connection = None
        # What the bells have said meanwhile is lost: of lists of functions it hears when it says hello, for the rest it
        # looks.
        self._rung = self._unknown = self._missed_bells = True
        self._turn_at = 0.0
        time.sleep(max(0.0, min(self._pause, deadline - time.monotonic())))
        self._pause = min(self._pause * 2, LONGEST_PAUSE)
        try:
            self.store.connector.reconnect()
        except StoreError as failure:
            logger.debug("reconnect: %s", failure)

    # Sleeping

    def _sleep(self, deadline: float) -> None:
        """Waits until a bell rings, a job is finished, a scheduled job is due, or `deadline`."""
        until = min(deadline, self._turn_at + SLICE)
        if self._due_at is not None:
            until = min(until, self._due_at)
        if self._backlog() and not self.stopping:
            until = min(until, self._moved_at + PARKED)
        try:
            until = min(until, self._arm())
            sources: list[Any] = [self._wake_read]
            if self._armed:
                if self._tls and self._bell.can_read(timeout=0):
                    self._hear()
                    return
                sources.append(self._bell._sock)
            self._asleep = True
            try:
                # What happened before `_asleep` was set has written no byte.
                if self._look:
                    return
                if self._unsettled:
                    if not self._gathers(time.monotonic()):
                        return
                    until = min(until, self._unsettled_since + GATHER)
                readable, _, _ = select.select(sources, [], [], max(0.0, until - time.monotonic()))
            finally:
                self._asleep = False
            if self._wake_read in readable:
                _drain(self._wake_read)
            if len(readable) > (self._wake_read in readable):
                self._hear()
            elif self._armed and time.monotonic() > self._armed_until:
                raise redis.TimeoutError("a pop that was to end after its timeout was not answered")
        except Exception as error:  # noqa: BLE001 - see _lead
            self._lost(error, deadline)

    def _arm(self) -> float:
        """Leaves a blocking pop outstanding; until when it may be left as it is.

        With no thread free it waits for the worker's own bell alone: a token of a lane would be taken in vain. And
        even for that only after a while, since short jobs end sooner.
        """
        if self._armed:
            return float("inf")
        now = time.monotonic()
        if self._free(1) > 0 and not self._hungry:
            self._full_since = None
            lanes = self._lanes(self.live_queues())
        else:
            if self._full_since is None:
                self._full_since = now
            if now < self._full_since + ARM_WHEN_FULL:
                return self._full_since + ARM_WHEN_FULL
            lanes = []
        if self._bell is None:
            self._bell = self.store.connector.connection()
            self._tls = isinstance(self._bell, redis.SSLConnection)
        keys = [self.store.own_bell(self.worker), *map(self.store.bell, lanes)]
        if self.on_callbacks is not None and not self.stopping:
            keys.append(self.store.callback_bell)
        self._bell.send_command("BLPOP", *keys, SLICE)
        self._armed_until = now + SLICE + self.store.settings.socket_timeout
        self._armed = "lanes" if lanes else "own"
        self._armed_lanes = lanes
        return float("inf")

    def _hang_up(self) -> None:
        bell, self._bell = self._bell, None
        self._armed = ""
        if bell is not None:
            bell.disconnect()

    def _leave_bells(self) -> None:
        """Ends the outstanding pop, which nobody will read: it would take bells from workers that could run the job.
        What it has taken already is rung again."""
        if self._armed == "lanes" and self._pending is None:
            # Hanging up alone would not do: until the server has seen that, it gives tokens to who is gone.
            nonce = uuid.uuid4().hex
            command = self.store.turn_command(self.worker, nonce, 0, self._armed_lanes, [], poke=True)
            try:
                self.store.connector.execute(*command, script=script("turn"), patience=0.0)
            except StoreError as error:
                logger.debug("the bells of a paused worker may be heard by nobody: %s", error)
        self._hang_up()

    def _hear(self) -> None:
        """Reads the answer to the outstanding pop."""
        answer = self._bell.read_response()
        self._armed = ""
        if answer is None:
            return
        key, token = answer[0].decode(), answer[1].decode()
        if key == self.store.callback_bell:
            if self.on_callbacks is not None:
                self.on_callbacks()
        elif key != self.store.own_bell(self.worker):
            self._rung = True
        elif token[:1] == "l":
            self.lanes_changed()  # there is a list of functions that this worker may have
        elif token[:1] == "f":
            if self.on_functions is not None:
                self.on_functions()  # one has been posted or removed
        elif token[:1] == "c":
            self._interrupt(token[1:], lambda delivery: delivery.cancel())
        elif token[:1] == "x":
            attempt, total, job_id = token[1:].split(" ", 2)
            self._interrupt(
                job_id,
                lambda delivery: (
                    delivery.extend_to(int(total) / 1000) if delivery.held.attempt == int(attempt) else None
                ),
            )
        elif token[:1] == "t":
            attempt, _, job_id = token[1:].partition(" ")
            self._interrupt(
                job_id,
                lambda delivery: (
                    delivery.interrupt("the job ran longer than its timeout and was given to others")
                    if delivery.held.attempt == int(attempt)
                    else None
                ),
            )

    def _interrupt(self, job_id: str, act: Callable[[Delivery], None]) -> None:
        for delivery in self._all_in_hand():
            if delivery.held.id == job_id:
                act(delivery)

    def _all_in_hand(self) -> list[Delivery]:
        with self._condition:
            return [*self.in_hand.values(), *self.beside.values()]

    def _look_at_flags(self) -> None:
        """What a bell may have said that was lost: looks which jobs in hand are cancelled, or have been taken away."""
        deliveries = self._all_in_hand()
        records = self.store.records([delivery.held.id for delivery in deliveries])
        self._missed_bells = False
        for delivery, record in zip(deliveries, records, strict=True):
            if record is not None and record.attempt == delivery.held.attempt and record.worker == self.worker:
                if record.cancel_requested_at is not None:
                    delivery.cancel()
                if record.extended_by:
                    delivery.extend_to(record.extended_by)
            elif record is not None:
                delivery.interrupt("the job was taken from this worker and given to others")

    def _missing(self) -> dict[str, int]:
        """The jobs, with their attempts, that the store says are here and are not. After a fail-over or a power cut it
        has forgotten the last moment, perhaps that they had ended."""
        held = self.store.held_by(self.worker)
        with self._condition:
            here = {*self.in_hand, *self.beside, *(entry.settle.id for entry in self._unsettled)}
        return {job_id: attempt for job_id, attempt in held.items() if job_id not in here}

    def _give_back_strays(self) -> None:
        before, self._strays = self._strays, {}
        strays = before.items() & self._missing().items()
        if strays:
            logger.warning("the store had forgotten how %d jobs ended; they run again", len(strays))
        with self._condition:
            for job_id, attempt in strays:
                self._unsettled.append(Unsettled(Settle.give_back(job_id, attempt, common_of())))


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    return read, write


def _drain(fd: int) -> None:
    try:
        os.read(fd, 4096)
    except BlockingIOError:
        pass


class WorkQueue:
    """The queue between a Worker's consumers and its threads: first in, first out, since the store has put the jobs
    in order. Its `join` also waits until what was done is committed."""

    def __init__(self, pump: Pump) -> None:
        self._pump = pump
        self._items: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._done = threading.Condition()
        self._stopping = False
        self.unfinished_tasks = 0

    def put(self, item: Any) -> None:
        with self._done:
            self.unfinished_tasks += 1
        self._items.put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        item = self._items.get(block, min(timeout or 0.05, 0.05) if self._stopping else timeout)
        while item is None and not block:
            item = self._items.get(block)
        if item is None:
            raise queue.Empty
        return item

    def take_all(self) -> list[Any]:
        """The messages that no thread has begun, taken out."""
        taken = []
        try:
            while True:
                taken.append(self.get_nowait().message)
                self.task_done()
        except queue.Empty:
            return taken

    def get_nowait(self) -> Any:
        return self.get(block=False)

    def task_done(self) -> None:
        with self._done:
            self.unfinished_tasks -= 1
            if not self.unfinished_tasks:
                self._done.notify_all()

    def join(self) -> None:
        with self._done:
            while self.unfinished_tasks:
                self._done.wait()
        self._pump.wait_idle()

    def nudge(self) -> None:
        """Has one thread that waits for a job look up."""
        self._items.put(None)

    def stop(self, threads: int) -> None:
        """Lets threads that wait for a job look up at once, and often."""
        self._stopping = True
        for _ in range(threads):
            self.nudge()


__all__ = ["Pump", "WorkQueue"]
