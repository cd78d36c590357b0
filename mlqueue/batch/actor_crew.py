"""The crew of a pool of actors: leases, and the workers that take them; :mod:`mlqueue.batch.serving` runs in those.

Work that is given out is a lease. It waits until a worker has room for it, and is sent there with a slot; the worker
answers its leases in their order. Who has been silent for too long counts as stalled: what it holds is given to others
as well, in other slots, and the first answer counts. Who has gone loses what it held; what it had begun is a strike
against that batch, since the batch may have been the reason.

Two threads of the trainer's keep this going while the trainer trains: the `Desk`'s, which alone reads what workers
tell, and that of the `Staff`, which alone speaks with the store: it sees to it that workers come.
"""

from __future__ import annotations

import atexit
import heapq
import itertools
import logging
import os
import select
import statistics
import threading
import time
import uuid
import weakref
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Literal

import numpy as np

from mlqueue import codec
from mlqueue.batch import links, serving, storage
from mlqueue.batch import pool_worker as worker
from mlqueue.batch.applied import Applied
from mlqueue.batch.bell import Bell
from mlqueue.batch.crew import BatchCall, Call, Crew, How, Work, closed_error
from mlqueue.batch.data_source import AbstractDataSource
from mlqueue.batch.errors import BatchSkipped, SourceMismatch
from mlqueue.batch.links import Peer, Report
from mlqueue.batch.pickling import pickle_code
from mlqueue.batch.process_crew import WorkerDied, same_bytes
from mlqueue.batch.requests import PURPOSE, encode_request, load_signed, rebuild_error
from mlqueue.batch.transport import Segment, SlotArena, SlotWriter, TransportError, read_description
from mlqueue.batch.ways import Doors
from mlqueue.errors import SigningKeyMissing
from mlqueue.named import NamedSource, Reference
from mlqueue.signing import Keyring

__all__ = ["ActorCrew", "Desk", "PoolStats", "Source", "Terms"]

logger = logging.getLogger("mlqueue.batches")

#: A batch that has ended so many workers is not tried again, unless the policy says so.
MOST_DEATHS: Final = 2
#: A worker is sent leases ahead for about so many seconds of work: it must not wait for the trainer between two.
AHEAD: Final = 0.02
#: How many it holds at least and at most.
FEWEST_AHEAD, MOST_AHEAD = 2, 16
#: Where it holds no more than so many, one takes long enough that a worker with nothing to do takes it over.
FEW_AHEAD: Final = 4
#: A worker that has been stalled for so many times the lease is cut off.
CUT_OFF_AFTER: Final = 5
#: How long a source may be refused by all workers that are there until that is an error, in seconds.
REFUSED_FOR: Final = 2.0
#: While more slots than this are in use, batches are copied out of theirs as they come. Each takes two descriptors.
CROWDED: Final = 96
#: How many different reasons of workers that refuse a source are told.
MOST_REASONS: Final = 8
#: How long somebody who has connected may take to say who it is, in seconds.
HELLO_WITHIN: Final = 5.0

Policy = Literal["raise", "skip", "retry"]


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an `ActorPool` was asked for; its documentation has them all."""

    workers: int
    errors: Policy = "raise"
    retries: int = 2
    lease: float = 2.0
    linger: float = 5.0
    slice: float = 10.0
    alone_after: float | None = 5.0
    stragglers: float | None = None


@dataclass
class PoolStats:
    """How the work of a pool goes; see `ActorPool.stats`."""

    #: Batches (groups of small ones count as one) that workers have prepared, and that were taken.
    prepared: int = 0
    given: int = 0
    #: The bytes of those that were prepared.
    bytes: int = 0
    #: Leases given out again: after a worker that had gone or stalled, an error that is retried, a straggler.
    retries: int = 0
    #: Copies that came after the first and were dropped.
    dropped: int = 0
    #: Batches left out (policy skip), and prepared by the trainer itself for want of workers.
    skipped: int = 0
    here: int = 0
    #: Seconds for which the trainer has waited for batches, and workers that were there for work (added up).
    trainer_waited: float = 0.0
    workers_waited: float = 0.0
    #: Seconds that workers have spent on preparing (added up).
    preparing: float = 0.0
    #: As it is now: workers that are there, leases given out or waiting, batches ready to be taken.
    workers: int = 0
    outstanding: int = 0
    ready: int = 0
    #: How the batches travel.
    transport: str = ""


class Lease:
    """A piece of work that has been given out."""

    __slots__ = (
        "deaths",
        "done",
        "error",
        "failures",
        "filled",
        "here",
        "holders",
        "number",
        "ready",
        "request",
        "value",
        "waiting",
        "work",
    )

    def __init__(self, number: int, work: Work, request: bytes) -> None:
        self.number, self.work, self.request = number, work, request
        self.done = False
        self.here = False
        self.error: BaseException | None = None
        self.value: Any = None
        #: Slot, place and length of the batch, once it is there.
        self.filled: tuple[int, int, int] | None = None
        #: The slot with each worker (by its serial number) that has the lease.
        self.holders: dict[int, int] = {}
        self.deaths = self.failures = 0
        #: Whether it is among those that wait for a worker with room.
        self.waiting = False
        self.ready = threading.Lock()
        self.ready.acquire()


@dataclass(eq=False)
class Place:
    """What the desk knows of a worker that has come."""

    peer: Peer
    heard: float
    #: Whether it has said who it is.
    known: bool = False
    stalled: bool = False
    leaving: bool = False
    #: The leases that it has not answered, in order: the slot of each, and when it was sent.
    held: dict[int, tuple[int, float]] = field(default_factory=dict)
    #: The sources that it has been told of, and that it cannot prepare batches of.
    sources: set[int] = field(default_factory=set)
    refuses: set[int] = field(default_factory=set)
    idle_since: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether it may be given work."""
        return self.known and not self.stalled and not self.leaving


class Source:
    """A source, or a shared constant, as workers are told of it; the segment holds what they need to make it."""

    def __init__(self, number: int, value: Any, described: dict[str, Any], how: int) -> None:
        #: The source itself, for what is prepared here.
        self.number, self.value, self.how = number, value, how
        self.segment = Segment.create()
        self.place, self.length = SlotWriter(self.segment).write(described)

    def holds(self, described: dict[str, Any], how: int) -> bool:
        """Whether it was made of the same."""
        if how != self.how:
            return False
        own = read_description(self.segment.as_bytes(), self.place, self.length)(self.segment.as_bytes(), None)
        return same_content({**own, "signature": None}, {**described, "signature": None})

    def __reduce__(self) -> tuple[Any, ...]:
        return serving.constant, (self.number,)


def same_content(a: Any, b: Any) -> bool:
    """Whether two descriptions of sources are equal."""
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return len(a) == len(b) and same_bytes(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_content(value, b[name]) for name, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same_content, a, b))
    return bool(a == b)


def as_bytes(content: Any) -> np.ndarray:
    """Bytes, or the raw buffer of an array, as what can travel in a batch."""
    return np.frombuffer(content, np.uint8) if memoryview(content).nbytes else np.empty(0, np.uint8)


def stamped(paths: list[str]) -> bytes:
    """Files as workers are told of them: this host, and what tells whether theirs are of the same version."""
    return codec.encode([storage.host_name(), [list(stamp) for stamp in storage.stamps(paths)]])


class Desk:
    """Where leases are given out and workers come. Used by a crew, and by two threads of its own, which must not keep
    the crew alive."""

    def __init__(self, terms: Terms, keys: tuple[str, ...], doors: Doors) -> None:
        self.terms, self.keys = terms, keys
        self.run = uuid.uuid4().hex[:12]
        self.pid = os.getpid()
        self.lock = threading.RLock()
        self.stats = PoolStats()
        self.closed = False
        #: What ended it, unless it was closed.
        self.failure: BaseException | None = None
        #: What went wrong where another thread has taken up what a worker told.
        self._fault: BaseException | None = None
        #: Called when it has closed; returns when the store has forgotten it.
        self.end_staff: Callable[[], None] = lambda: None
        self._ends = False
        self.listener = doors
        #: Called when workers may be needed.
        self.call_staff: Callable[[], None] = lambda: None
        #: The jobs of workers that have gone without a word: they are not to be started again.
        self.lost_jobs: deque[str] = deque()
        #: The jobs whose workers have come.
        self.come_jobs: deque[str] = deque()
        self.forgotten: deque[int] = deque()  # sources; filled where no lock can be taken
        self.abandoned: deque[Lease] = deque()  # the same
        self.places: dict[int, Place] = {}  # by descriptor
        self._by_serial: dict[int, Place] = {}
        self.leases: dict[int, Lease] = {}
        self._waiting: list[tuple[int, Lease]] = []
        self._numbers = itertools.count(1)
        self._serials = itertools.count(1)
        self.arena = SlotArena(lambda number, segment: None)
        #: When a worker was sent away again.
        self.declined_at = float("-inf")
        #: Since when there is nobody to give work to.
        self.alone_since = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=64)  # that the last batches took
        self._ahead = FEWEST_AHEAD
        self._refused: dict[int, tuple[float, list[str]]] = {}  # sources: since when, and why, of each host
        self._said: set[tuple[str, str]] = set()
        self._looked = time.monotonic()
        self._bell = Bell()
        self._poll = select.poll()
        self._doors = {door.fileno() for door in self.listener.sockets}
        for door in self._doors:
            self._poll.register(door, select.POLLIN)
        self._poll.register(self._bell.reader, select.POLLIN)
        _desks.add(self)
        self._thread = threading.Thread(target=self._keep, name="mlqueue-batch-desk", daemon=True)
        self._thread.start()

    # --- giving out ---

    def give_out(self, work: Work, request: bytes) -> Lease:
        """A lease for a piece of work."""
        with self.lock:
            self.need_open()
            lease = Lease(next(self._numbers), work, request)
            self.leases[lease.number] = lease
            self._sweep()
            self._wait(lease)
            self._dispatch()
            if self._waiting and self.missing():
                self.call_staff()
        return lease

    def need_open(self) -> None:
        """Raises RuntimeError where it is closed, and where something has ended it."""
        if self.failure is not None:
            raise RuntimeError("the pool has failed; make a new one.") from self.failure
        if self.closed:
            raise closed_error()

    def _wait(self, lease: Lease) -> None:
        if not lease.waiting:
            lease.waiting = True
            heapq.heappush(self._waiting, (lease.number, lease))

    def _dispatch(self) -> None:
        """Send what waits to those who have room for it, in order. What none of those can take lets others pass."""
        passed = []
        while self._waiting:
            places = [place for place in self.places.values() if place.is_open and len(place.held) < self._most(place)]
            if not places:
                break
            entry = heapq.heappop(self._waiting)
            lease = entry[1]
            if not lease.done and not lease.here:
                place = self._choose(places, lease)
                if place is None:
                    passed.append(entry)
                    continue
                self._send(lease, place)
            lease.waiting = False
        for entry in passed:
            heapq.heappush(self._waiting, entry)
        if not self._waiting and self._ahead <= FEW_AHEAD:
            self._even_out()

    def _most(self, place: Place) -> int:
        """How many leases a worker is given at a time: those ahead, and what is on its way."""
        return self._ahead + place.peer.under_way

    def _even_out(self) -> None:
        """Give a lease that waits with a worker, behind another one, to a worker that has none."""
        places = [place for place in self.places.values() if place.is_open]
        idle = [place for place in places if not place.held]
        if not idle:
            return
        busiest = max(places, key=lambda place: len(place.held))
        if len(busiest.held) < 2 or not busiest.peer.shares_slots:
            return  # a worker on another host would not see that one is no longer expected
        number, (slot, _) = next(reversed(busiest.held.items()))
        lease, segment = self.leases.get(number), self.arena.slots[slot]
        if lease is None or lease.done or lease.here or len(lease.holders) > 1:
            return
        if busiest.peer.has_begun(number, segment):
            return
        place = self._choose(idle, lease)
        if place is not None:
            segment.set_word(worker.EXPECTED, 0)  # if it begins it just now, both do it, and the first copy counts
            self._send(lease, place)

    @staticmethod
    def _choose(places: list[Place], lease: Lease) -> Place | None:
        source = lease.work.source.number if isinstance(lease.work, BatchCall) else 0
        able = [p for p in places if source not in p.refuses and p.peer.serial not in lease.holders]
        return min(able, key=lambda place: len(place.held), default=None)

    def _send(self, lease: Lease, place: Place) -> None:
        try:
            number, segment = self.arena.take()
        except (TransportError, OSError) as error:  # neither memory nor descriptors are for ever
            self.give_up(lease, error)
            return
        for source in sources_of(lease.work):
            if source.number not in place.sources:
                place.sources.add(source.number)
                place.peer.source(source.number, source.segment, source.place, source.length, source.how)
        try:
            place.peer.lease(lease.number, number, segment, lease.request)
        except TransportError as error:
            self.arena.release(number)
            self.give_up(lease, error)
            return
        now = time.monotonic()
        if not place.held:
            self.stats.workers_waited += now - place.idle_since
        lease.holders[place.peer.serial] = number
        place.held[lease.number] = number, now

    # --- what workers tell; in the desk's own thread ---

    def _keep(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self.failure = error
            raise
        finally:
            self._shut()

    def _run(self) -> None:
        while True:
            ready = self._poll.poll(self.terms.lease * 250)
            with self.lock:
                if self._fault is not None:
                    raise self._fault
                if self._ends:
                    return
                for fd, _ in ready:
                    if fd == self._bell.reader:
                        self._bell.hush()
                    elif fd in self._doors:
                        self._accept(fd)
                    elif fd in self.places:
                        self._read(self.places[fd])
                now = time.monotonic()
                if now - self._looked > self.terms.lease / 4:
                    self._look(now)
                self._sweep()
                self._dispatch()

    def wake(self) -> None:
        """Have the desk's thread look. Takes no lock."""
        self._bell.ring()

    def _take_up(self, place: Place) -> None:
        """What a worker has told, read by the thread that has received it; by ours where the desk is in use."""
        if not self.lock.acquire(blocking=False):
            place.peer.ring()
            return
        try:
            if not self.closed and not self._ends and place.peer.serial in self._by_serial:
                self._read(place)
                self._sweep()
                self._dispatch()
        except BaseException as error:  # noqa: BLE001 - it ends the desk, as if its own thread had met it
            self._fault = error
            self.wake()
        finally:
            self.lock.release()

    def _accept(self, door: int) -> None:
        while (peer := self.listener.accept(door, next(self._serials))) is not None:
            place = Place(peer, time.monotonic())
            self.places[peer.socket.fileno()] = place
            self._poll.register(peer.socket, select.POLLIN)

    def _read(self, place: Place) -> None:
        try:
            if not place.known:
                if not place.peer.read_hello(self.listener.token):
                    return
                self._welcome(place)
            reports = place.peer.read()
        except PermissionError as error:
            logger.warning("%s", error)
            self._drop(place)
            return
        except (OSError, EOFError):
            self._drop(place)
            return
        place.heard = time.monotonic()
        if place.stalled:
            place.stalled = False
            self._note_alone()
        for report in reports:
            self._take(place, report)

    def _welcome(self, place: Place) -> None:
        place.known = True
        place.heard = place.idle_since = time.monotonic()
        self._by_serial[place.peer.serial] = place
        place.peer.take_up = partial(self._take_up, place)
        self.come_jobs.append(place.peer.job)
        self._say_how(place.peer)
        others = [other for other in self.places.values() if other.known and other is not place and not other.leaving]
        # One that refuses a source is on a host that lacks its files, or has other code: another may be of use.
        enough = sum(not other.stalled and not other.refuses for other in others) >= self.terms.workers
        if enough or any(other.peer.process == place.peer.process for other in others):
            # A process prepares one batch at a time: others of its threads would only share its global lock.
            place.leaving = True
            place.peer.tell(links.END)
            self.declined_at = place.heard
        self._note_alone()
        self.call_staff()

    def _say_how(self, peer: Peer) -> None:
        """Tell once for each host how its batches come."""
        if (peer.host, peer.way) not in self._said:
            self._said.add((peer.host, peer.way))
            logger.info("batches come from %s by %s", f"host {peer.host}" if peer.host else "this host", peer.way)

    def _take(self, place: Place, report: Report) -> None:
        if report.kind == links.BEAT:
            return
        if report.kind == links.LEAVE:
            place.leaving = True
            place.peer.tell(links.END)
            self._note_alone()
            self.call_staff()
            return
        place.held.pop(report.lease, None)
        if not place.held:
            place.idle_since = time.monotonic()
        lease = self.leases.get(report.lease)
        if lease is not None:
            lease.holders.pop(place.peer.serial, None)
        if lease is None or lease.done or lease.here:
            self.arena.release(report.slot)
            self.stats.dropped += report.kind == links.DONE
            return
        if report.kind == links.DONE:
            self._fill(lease, report)
        elif report.kind == links.SKIPPED:
            # It was another lease that `abandon`, which takes no lock, has called off in this slot.
            self.arena.release(report.slot)
            if not lease.holders:
                self._wait(lease)
        else:
            described = self.arena.read(report.slot, report.place, report.length, "copy")
            if report.kind == links.REFUSED:
                self._refuse(place, lease, described["text"])
            else:
                self._fail(lease, described)

    def _fill(self, lease: Lease, report: Report) -> None:
        seconds = report.nanoseconds / 1e9
        self._seconds.append(seconds)
        self.stats.prepared += 1
        self.stats.bytes += report.place
        self.stats.preparing += seconds
        if self.stats.prepared % 8 == 1:
            typical = statistics.median(self._seconds)
            self._ahead = min(MOST_AHEAD, max(FEWEST_AHEAD, 1 + int(AHEAD / max(typical, 1e-6))))
        if self.arena.busy > CROWDED:
            lease.value = self.arena.read(report.slot, report.place, report.length, "copy")
        else:
            lease.filled = report.slot, report.place, report.length
        self.finish(lease)

    def finish(self, lease: Lease) -> None:
        """Nobody need prepare it any more."""
        self.leases.pop(lease.number, None)
        self.call_off(lease)
        for serial in list(lease.holders):
            if serial in self._by_serial:
                self._by_serial[serial].peer.call_off(lease.number)
        lease.done = True
        if lease.ready.locked():
            lease.ready.release()

    def call_off(self, lease: Lease) -> None:
        """Workers that have not begun it need not begin. Takes no lock: it may be another lease's slot by now, whose
        worker then skips that, and is sent it again."""
        for slot in list(lease.holders.values()):
            segment = self.arena.slots.get(slot)
            if segment is not None:
                segment.set_word(worker.EXPECTED, 0)

    def take_back(self, lease: Lease) -> None:
        """What was to be prepared here is to be prepared by a worker after all."""
        lease.here = False
        self._wait(lease)
        self.wake()

    def _fail(self, lease: Lease, described: dict[str, Any]) -> None:
        """An exception was raised in preparing it."""
        lease.failures += 1
        if self.terms.errors == "retry" and lease.failures <= self.terms.retries:
            self._again(lease)
            return
        self.give_up(lease, rebuild_error(described, lease.work, self.keys))

    def give_up(self, lease: Lease, error: BaseException) -> None:
        if self.terms.errors == "skip" and isinstance(lease.work, BatchCall):
            self.stats.skipped += 1
            logger.warning("%s is left out: %s: %s", lease.work, type(error).__name__, error)
            skipped = BatchSkipped(str(lease.work))
            skipped.__cause__ = error
            error = skipped
        lease.error = error
        self.finish(lease)

    def _again(self, lease: Lease) -> None:
        self.stats.retries += not lease.waiting
        self._wait(lease)

    def _refuse(self, place: Place, lease: Lease, text: str) -> None:
        """The worker cannot make the source, or another version of it; another worker may."""
        if isinstance(lease.work, BatchCall):
            number = lease.work.source.number
            place.refuses.add(number)
            _, texts = self._refused.setdefault(number, (time.monotonic(), []))
            if text not in texts and len(texts) < MOST_REASONS:
                texts.append(text)
                logger.warning("a worker (process %d) prepares nothing of a source: %s", place.peer.pid, text)
            self._wait(lease)
        else:
            self.give_up(lease, SourceMismatch(text))

    def _drop(self, place: Place, *, silent: bool = False) -> None:
        """The worker has gone, or is cut off; `silent`: because it gives no sign of life."""
        fd = place.peer.socket.fileno()
        self._poll.unregister(fd)
        del self.places[fd]
        place.peer.take_up = None
        place.peer.close()
        self._by_serial.pop(place.peer.serial, None)
        if place.known and not place.leaving:
            self.lost_jobs.append(place.peer.job)
        died = place.peer.has_died(silent)
        for number, (slot, _) in place.held.items():
            begun = place.peer.has_begun(number, self.arena.slots[slot])
            self._discard(slot, place.peer.shares_slots)
            lease = self.leases.get(number)
            if lease is not None:
                self._lose(lease, place, begun and died)
        self._note_alone()
        self.call_staff()

    def _discard(self, slot: int, shared: bool) -> None:
        """Forget the slot of a worker that has gone. One that was only cut off may go on where it was: what it writes
        must never be found among the bytes of another batch, so a slot that it shares is not used again."""
        if not shared:
            self.arena.release(slot)
            return
        self.arena.discard(slot)
        for place in self.places.values():
            place.peer.tell(links.SLOT_GONE, slot)

    def _lose(self, lease: Lease, place: Place, begun: bool) -> None:
        """A worker that had a lease has gone."""
        lease.holders.pop(place.peer.serial, None)
        if begun and not place.leaving:
            lease.deaths += 1
        most = max(MOST_DEATHS, self.terms.retries + 1) if self.terms.errors == "retry" else MOST_DEATHS
        if lease.deaths >= most:
            self.give_up(lease, WorkerDied(f"{lease.work} ended the worker that prepared it {lease.deaths} times."))
        elif not self._is_in_hand(lease):
            self._again(lease)

    def _is_in_hand(self, lease: Lease) -> bool:
        """Whether a worker has it that is not silent."""
        holders = [self._by_serial[serial] for serial in lease.holders if serial in self._by_serial]
        return not all(place.stalled for place in holders)

    # --- what time brings ---

    def _look(self, now: float) -> None:
        # Where this process itself was stopped, nobody else is to blame: what they told since comes first.
        slept = now - self._looked > 2 * self.terms.lease
        self._looked = now
        for place in list(self.places.values()):
            if slept:
                place.heard = now
            silent = now - place.heard
            if (not place.known and silent > HELLO_WITHIN) or silent > CUT_OFF_AFTER * self.terms.lease:
                self._drop(place, silent=True)
            elif place.known and not place.stalled and silent > self.terms.lease:
                self._stall(place)
        if self.terms.stragglers is not None and self._seconds:
            self._help_stragglers(now, self.terms.stragglers * statistics.median(self._seconds))
        self._fail_refused(now)

    def _stall(self, place: Place) -> None:
        logger.warning("a worker (process %d) is silent; its batches are given to others too", place.peer.pid)
        place.stalled = True
        for number in place.held:
            lease = self.leases.get(number)
            if lease is not None and not self._is_in_hand(lease):
                self._again(lease)
        self._note_alone()
        self.call_staff()

    def _help_stragglers(self, now: float, limit: float) -> None:
        """Give what a slow worker holds, and what waits behind that, to those who have nothing to do too."""
        idle = sum(other.known and not other.held and not other.leaving for other in self.places.values())
        for place in self.places.values():
            if not idle or not place.held or now - next(iter(place.held.values()))[1] < limit:
                continue
            for number in place.held:
                lease = self.leases.get(number)
                if lease is not None and len(lease.holders) == 1:
                    self._again(lease)

    def _fail_refused(self, now: float) -> None:
        if not self._refused:
            return
        for lease in [lease for _, lease in self._waiting]:
            if lease.done or not isinstance(lease.work, BatchCall) or lease.work.source.number not in self._refused:
                continue
            number = lease.work.source.number
            since, texts = self._refused[number]
            there = [place for place in self.places.values() if place.known and not place.leaving]
            if there and now - since > REFUSED_FOR and all(number in place.refuses for place in there):
                self.give_up(lease, SourceMismatch(" ".join(texts)))

    def _note_alone(self) -> None:
        if any(place.is_open for place in self.places.values()):
            self.alone_since = float("inf")
        elif self.alone_since == float("inf"):
            self.alone_since = time.monotonic()

    def _sweep(self) -> None:
        """What could not be done where it became known, for want of the lock."""
        while self.abandoned:
            lease = self.abandoned.popleft()
            self.finish(lease)
            if lease.filled is not None:
                self.arena.release(lease.filled[0])
                lease.filled = None
        while self.forgotten:
            number = self.forgotten.popleft()
            self._refused.pop(number, None)
            for place in self.places.values():
                place.refuses.discard(number)
                if number in place.sources:
                    place.sources.discard(number)
                    place.peer.tell(links.SOURCE_GONE, number)

    # --- for the staff ---

    def missing(self) -> int:
        """How many more workers would have something to do."""
        with self.lock:
            if not self.leases:
                return 0
            there = sum(place.is_open and not place.refuses for place in self.places.values())
            return max(0, min(self.terms.workers, max(len(self.leases), 1)) - there)

    def snapshot(self) -> PoolStats:
        """The numbers, with those of now."""
        with self.lock:
            now = time.monotonic()
            known = [place for place in self.places.values() if place.known and not place.leaving]
            idle = sum(now - place.idle_since for place in known if not place.held)
            values = {**vars(self.stats), "workers": len(known), "outstanding": len(self.leases)}
            values["workers_waited"] = self.stats.workers_waited + idle
            values["ready"] = self.arena.busy - sum(len(place.held) for place in self.places.values())
            values["transport"] = ", ".join(sorted({place.peer.way for place in known}))
            return PoolStats(**values)

    def leave(self) -> None:
        """Have it close soon. Takes no lock: it is called where garbage is collected, in any thread."""
        self._ends = True
        self.wake()

    def close(self) -> None:
        """Let all workers go; all that was given out and not taken raises."""
        if os.getpid() != self.pid:
            return
        self.leave()
        self._thread.join()
        self.listener.join()
        self.end_staff()

    def _shut(self) -> None:
        with self.lock:
            self.closed = True
            for place in self.places.values():
                place.peer.take_up = None
                place.peer.close()
            self.places.clear()
            for lease in list(self.leases.values()):
                lease.error = closed_error() if self.failure is None else self.failure
                self.finish(lease)
            self._waiting.clear()
            self.listener.close()
            self.arena.close()
        self.call_staff()


_desks: weakref.WeakSet[Desk] = weakref.WeakSet()


@atexit.register
def _close_at_exit() -> None:
    for desk in list(_desks):
        desk.close()


def _let_go_in_fork() -> None:
    """A forked process, as a data loader's worker, must not hold connections open: when the trainer is killed, their
    end is what its workers see."""
    for desk in _desks:
        if not desk.closed:
            desk.listener.let_go()
            for place in desk.places.values():
                place.peer.let_go()


os.register_at_fork(after_in_child=_let_go_in_fork)


def sources_of(work: Work) -> list[Source]:
    """The sources and shared constants that a piece of work names."""
    if isinstance(work, BatchCall):
        return [work.source]
    return [value for value in (*work.args, *work.kwargs.values()) if isinstance(value, Source)]


class ActorCrew(Crew):
    """The workers that serve a queue of batches."""

    def __init__(
        self,
        terms: Terms,
        keys: tuple[str, ...],
        sources: dict[str, NamedSource[..., Any]],
        open_staff: Callable[[Desk], Callable[[], None]],
        doors: Callable[[], Doors],
    ) -> None:
        super().__init__(terms.workers)
        self._terms, self._keys, self._named, self._open_staff = terms, keys, sources, open_staff
        self._open_doors = doors
        self._desk: Desk | None = None
        self._closed = False
        self._gave_up: float | None = None  # on workers: what the desk's `alone_since` was then
        self._numbers = itertools.count(1)
        self._opening = threading.Lock()

    @property
    def desk(self) -> Desk:
        """The desk, opened with the first use of the pool."""
        if self._closed:
            raise closed_error()
        if self._desk is None:
            with self._opening:
                if self._desk is None:
                    desk = Desk(self._terms, self._keys, self._open_doors())
                    desk.end_staff = self._open_staff(desk)
                    weakref.finalize(self, desk.leave).atexit = False
                    self._desk = desk
        if os.getpid() != self._desk.pid:
            raise RuntimeError("a pool of actors belongs to the process that made it; make one after the fork.")
        return self._desk

    def stats(self) -> PoolStats:
        """How the work goes."""
        return PoolStats() if self._desk is None else self._desk.snapshot()

    def share(self, value: Any, earlier: Any = None) -> Source:
        desk = self.desk
        described, how = self._describe(value)
        if isinstance(earlier, Source) and earlier.holds(described, how):
            earlier.value = value
            return earlier
        if how == serving.PICKLED:
            parts = [described["body"], described["files"], *described["buffers"]]
            signature = Keyring(self._keys, PURPOSE).sign(b"source", *[part.data for part in parts])
            described["signature"] = as_bytes(signature)
        source = Source(next(self._numbers), value, described, how)
        weakref.finalize(source, desk.forgotten.append, source.number).atexit = False
        return source

    def _describe(self, value: Any) -> tuple[dict[str, Any], int]:
        """What workers are told of a source, or of a shared constant, and how it travels."""
        if isinstance(value, Applied) and value.function.name is not None:
            described, how = self._describe(value.source)
            return {**described, "function": as_bytes(value.function.described())}, how
        reference = getattr(value, "reference", None)
        if isinstance(reference, Reference) and reference.name in self._named:
            return {
                "name": reference.name,
                "kwargs": as_bytes(reference.kwargs),
                "version": self._named[reference.name].version(reference.kwargs),
                "files": as_bytes(stamped(storage.files_of(value))),
            }, serving.NAMED
        try:
            Keyring(self._keys, PURPOSE)
        except SigningKeyMissing as error:
            if not isinstance(value, AbstractDataSource):
                raise
            raise SigningKeyMissing(
                f"{error} Or have workers make the source: one that a function registered by "
                f'@mlq.data_source("name") returns is sent as that name (this {type(value).__name__} has none).'
            ) from None
        paths: dict[str, None] = {}
        body, buffers = pickle_code(
            value, refer=self._refer, by_path=lambda part: paths.update(dict.fromkeys(storage.backing(part) or ()))
        )
        return {
            "body": as_bytes(body),
            "buffers": [as_bytes(buffer) for buffer in buffers],
            "files": as_bytes(stamped(list(paths))),
            "signature": None,
        }, serving.PICKLED

    def _refer(self, part: Any) -> Any:
        """How a source that has a name is pickled among the parts of another."""
        reference = getattr(part, "reference", None)
        if not isinstance(reference, Reference) or reference.name not in self._named:
            return NotImplemented
        version, files = self._named[reference.name].version(reference.kwargs), stamped(storage.files_of(part))
        return serving.by_reference, (*reference, version, files)

    def submit(self, work: Work) -> Lease:
        return self.desk.give_out(work, encode_request(work, self._keys))

    def result(self, lease: Lease, how: How = "lend") -> Any:
        if not lease.done:
            self._wait(lease)
        desk = self.desk
        with desk.lock:
            if lease.error is not None:
                raise lease.error
            desk.stats.given += 1
            if lease.filled is None:
                value, lease.value = lease.value, None
            else:
                desk.need_open()
                slot, place, length = lease.filled
                if isinstance(lease.work, Call):
                    how = "copy"
                if how != "view":
                    lease.filled = None  # the arena takes care of the slot
                value = desk.arena.read(slot, place, length, how)
        return self._value_of(value) if isinstance(lease.work, Call) and not lease.here else value

    def _value_of(self, described: dict[str, Any]) -> Any:
        return described["value"] if "value" in described else load_signed(b"value", described, self._keys)

    def _wait(self, lease: Lease) -> None:
        desk, begun = self.desk, time.monotonic()
        # Short, since whoever is waited for in a job may be cancelled.
        while not lease.ready.acquire(timeout=0 if self._gave_up == desk.alone_since else 0.2):
            if self._is_left_alone(begun) and not lease.done:
                self._prepare_here(lease)
                break
        desk.stats.trainer_waited += time.monotonic() - begun

    def _is_left_alone(self, begun: float) -> bool:
        """Whether no worker has come for so long, since the waiting began, that none is waited for any more. Once that
        is so, it is so until one comes."""
        since, patience = self.desk.alone_since, self._terms.alone_after
        if patience is not None and time.monotonic() - max(since, begun) > patience:
            self._gave_up = since
        return self._gave_up == since

    def _prepare_here(self, lease: Lease) -> None:
        """There are no workers: the trainer does it itself, so that it goes on."""
        desk = self.desk
        with desk.lock:
            if lease.done:
                return
            lease.here = True
            if not desk.stats.here:
                logger.warning(
                    "no worker prepares batches, so this process does. Start one: mlqueue worker MODULE, with the "
                    "module that makes the pool, or registers the source."
                )
            desk.stats.here += 1
        try:
            lease.value = self._run_here(lease.work)
        except Exception as error:  # noqa: BLE001 - it is raised where the result is asked for
            error.add_note(f"Raised in this process by {lease.work}.")
            with desk.lock:
                desk.give_up(lease, error)
        except BaseException:  # as Ctrl-C: the batch is not to blame, and is waited for again
            with desk.lock:
                desk.take_back(lease)
            raise
        else:
            with desk.lock:
                desk.finish(lease)

    def _run_here(self, work: Work) -> Any:
        if isinstance(work, Call):
            args = [value.value if isinstance(value, Source) else value for value in work.args]
            kwargs = {name: value.value if isinstance(value, Source) else value for name, value in work.kwargs.items()}
            return work.function(*args, **kwargs)
        source = work.source.value
        if worker.is_pure(source):
            return worker.gather(source, work.index_batch, np.empty)
        with worker.own_generators():
            worker.seed_global(worker.seeded_key(work.index_batch) or work.key)
            return worker.gather(source, work.index_batch, np.empty)

    def release(self, lease: Lease) -> None:
        desk = self._desk
        if desk is None:
            return
        with desk.lock:
            if lease.filled is not None:
                desk.arena.release(lease.filled[0])
                lease.filled = None

    def abandon(self, leases: Iterable[Lease]) -> None:
        desk = self._desk
        if desk is not None and os.getpid() == desk.pid:
            for lease in leases:
                desk.call_off(lease)
                desk.abandoned.append(lease)
            desk.wake()

    def close(self) -> None:
        self._closed = True
        if self._desk is not None:
            self._desk.close()
