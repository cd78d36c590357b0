"""Events of all jobs of a namespace: one hub for each process and store, which every listener of the process shares.

While somebody listens, the scripts that change jobs append an event to a stream of the store (part_events.lua). The hub
says that somebody does, reads the stream over one connection, and hands each event to the listeners that it concerns.
It never waits for one of them: a listener that does not take what was handed to it is cut off. It comes again, and has
what it missed read to it from the stream.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from typing import Any, Final

from .errors import StoreError
from .job import State
from .store import Store
from .store.connection import shut, translated
from .store.events import OF_JOB, UNHEARD, Event, place

#: For how long the store tells of changes, in seconds, after a hub has said that somebody listens; and how often it
#: says so.
HOLDS: Final = 60.0
RENEWED: Final = 20.0

#: How long events are kept when nobody listens any more, in seconds.
KEEPS: Final = 3600.0

#: How long a hub blocks at most before it looks around, in seconds.
SLICE: Final = 5.0

#: How long a hub goes on when nobody listens, in seconds: pages are loaded anew.
LINGER: Final = 10.0

#: How long a hub pauses when the store cannot be reached, in seconds.
PAUSE: Final = 0.5

#: How many events are read at once.
BATCH: Final = 500

#: How many events a listener may be behind.
MOST_BEHIND: Final = 2000

logger = logging.getLogger("mlqueue.events")


class Filter:
    """Which events a listener wants; everything where nothing is said."""

    __slots__ = ("_actor", "_queue", "_states")

    def __init__(
        self, *, states: Collection[State | str] = (), actor: str | None = None, queue: str | None = None
    ) -> None:
        self._states = frozenset(State(state) for state in states)
        self._actor = actor
        self._queue = queue

    def passes(self, event: Event) -> bool:
        """Whether it is one of them. That events are missing concerns everybody."""
        return event.kind == UNHEARD or (
            (not self._states or event.state in self._states)
            and (self._actor is None or event.actor == self._actor)
            and (self._queue is None or event.queue == self._queue)
        )


class Listener:
    """What was handed to one who listens. Made by `Hub.listen`; whoever has it closes it."""

    __slots__ = ("__weakref__", "_events", "_hub", "_on_cut", "cut_off", "filter", "job_id", "position")

    def __init__(self, hub: Hub, job_id: str | None, wanted: Filter, on_cut: Callable[[], None] | None) -> None:
        self._hub = hub
        # A queue of whatever concurrency there is: gevent puts its own in the module's place.
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._on_cut = on_cut
        #: The job that it listens to; None for all of them.
        self.job_id = job_id
        self.filter = wanted
        #: The newest event that the hub had seen when it began: those behind it are handed on.
        self.position = ""
        #: Whether it was too far behind, or the hub was closed: nothing comes any more.
        self.cut_off = False

    def take(self, timeout: float) -> list[Event]:
        """The events that are there, oldest first; if there is none those that come within `timeout` seconds. None at
        all when it was cut off."""
        taken = []
        with contextlib.suppress(queue.Empty):
            event = self._events.get(timeout=max(timeout, 0.0))
            while event is not None:
                taken.append(event)
                event = self._events.get_nowait()
        return [] if self.cut_off else taken

    def close(self) -> None:
        """Ends it. It may be called again, from any thread."""
        self._hub.forget(self)

    def hand(self, event: Event) -> None:
        """Adds an event; the hub's side."""
        if self._events.qsize() >= MOST_BEHIND:
            self._hub.forget(self)
            self.cut()
        else:
            self._events.put(event)

    def cut(self) -> None:
        """Ends it from the hub's side."""
        self.cut_off = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._events.get_nowait()
        self._events.put(None)
        if self._on_cut is not None:
            self._on_cut()


class Hub:
    """Reads the events of a store for all listeners of this process. Runs as long as there are any."""

    def __init__(self, store: Store) -> None:
        # The store owns the hub (see `hub_of`), not the other way round.
        self._store = weakref.proxy(store)
        self._lock = threading.RLock()
        self._of_job: dict[str, set[Listener]] = {}
        self._of_all: set[Listener] = set()
        self._thread: threading.Thread | None = None
        self._connection: Any = None
        self._position = ""
        self._idle_since = 0.0
        self._closings = 0

    def __len__(self) -> int:
        """How many listen."""
        return len(self._of_all) + sum(len(listeners) for listeners in self._of_job.values())

    def listen(
        self, job_id: str | None = None, wanted: Filter | None = None, on_cut: Callable[[], None] | None = None
    ) -> Listener:
        """Begins to listen, to one job or to all: no event is missed from now on. `on_cut` is called, in some thread,
        when the listener is cut off. Raises `StoreUnavailable`."""
        listener = Listener(self, job_id, wanted or Filter(), on_cut)
        with self._lock:
            self._of_all.add(listener) if job_id is None else self._of_job.setdefault(job_id, set()).add(listener)
        try:
            if not self._runs():
                # Not under the lock: nobody else has to wait for a store that does not answer.
                self._start(self._store.listen(HOLDS, KEEPS))
        except BaseException:
            self.forget(listener)
            raise
        listener.position = self._position
        return listener

    def _runs(self) -> bool:
        with self._lock:
            return self._thread is not None and self._thread.is_alive()

    def _start(self, newest: str) -> None:
        with self._lock:
            if not self._runs():
                self._position = newest
                self._thread = threading.Thread(target=self._run, name="mlqueue-events", daemon=True)
                self._thread.start()

    def forget(self, listener: Listener) -> None:
        """Hands nothing more to a listener."""
        with self._lock:
            if listener.job_id is None:
                self._of_all.discard(listener)
                return
            listeners = self._of_job.get(listener.job_id, set())
            listeners.discard(listener)
            if not listeners:
                self._of_job.pop(listener.job_id, None)

    def since(self, after: str) -> Iterator[Event]:
        """The events behind one, as far as they go. Where some may be missing there is one of the kind `UNHEARD`."""
        while True:
            events, whole = self._store.events(after, BATCH)
            if not whole:
                yield Event(after, UNHEARD)
            yield from events
            if len(events) < BATCH:
                return
            after = events[-1].event_id

    def close(self) -> None:
        """Cuts off who listens, and lets the connection go. The hub can be used again."""
        with self._lock:
            self._closings += 1
            thread = self._thread
            self._cut_all()
            if self._connection is not None:
                shut(self._connection)
        if thread is not None and thread is not threading.current_thread():
            thread.join(SLICE)

    def _cut_all(self) -> None:
        for listener in [*self._of_all, *self._of_all_jobs()]:
            self.forget(listener)
            listener.cut()

    # In the hub's own thread

    def _run(self) -> None:
        closings = self._closings
        renew_at = time.monotonic() + RENEWED
        try:
            while not self._is_over(closings):
                try:
                    if time.monotonic() >= renew_at:
                        self._renew()
                        renew_at = time.monotonic() + RENEWED
                    self._read(closings)
                except StoreError as error:
                    self._drop()
                    if self._closings == closings:
                        logger.info("events wait for the store: %s", error)
                        renew_at = 0.0  # it may have forgotten that somebody listens
                        time.sleep(PAUSE)
        except ReferenceError:
            pass  # the store is gone, and whoever listened with it
        finally:
            self._end()

    def _is_over(self, closings: int) -> bool:
        """Whether nobody listens any more. Then the next one who does finds no thread."""
        with self._lock:
            now = time.monotonic()
            if self._of_all or self._of_job:
                self._idle_since = now
            over = self._closings != closings or now - self._idle_since > LINGER
            if over:
                self._end()
            return over

    def _end(self) -> None:
        """Once a thread has ended, another one may use the connection's place."""
        with self._lock:
            if self._thread is threading.current_thread():
                self._drop()
                self._thread = None
                self._cut_all()  # nobody, when all is in order

    def _renew(self) -> None:
        newest = self._store.listen(HOLDS, KEEPS)
        if place(newest) < place(self._position):
            # Another stream, by a clock that was put back.
            self._position = newest
            self._hand_on(Event(newest, UNHEARD))

    def _read(self, closings: int) -> None:
        """Waits for events, and hands them on."""
        store = self._store
        with translated(store.connector.where):
            if self._connection is None:
                self._connection = store.connector.connection()
            if self._closings != closings:
                return
            wait = min(SLICE, store.settings.socket_timeout / 2)
            self._connection.send_command(*store.next_events_command(self._position, wait, BATCH))
            answer = self._connection.read_response()
        if not answer:
            return
        events = store.read_events(answer[0][1])
        if len(events) == BATCH:
            self._catch_up()
        for event in events:
            self._hand_on(event)
        self._position = events[-1].event_id

    def _catch_up(self) -> None:
        """There may be so many events that some went before they were read."""
        _, whole = self._store.events(self._position, 1)
        if not whole:
            self._hand_on(Event(self._position, UNHEARD))
        time.sleep(0)  # with gevent: the others' turn

    def _hand_on(self, event: Event) -> None:
        with self._lock:
            of_job = self._of_all_jobs() if event.kind == UNHEARD else self._of_job.get(event.id, ())
            concerned = [*of_job, *(() if event.kind in OF_JOB else self._of_all)]
        for listener in concerned:
            if listener.filter.passes(event):
                listener.hand(event)

    def _of_all_jobs(self) -> list[Listener]:
        return [listener for listeners in self._of_job.values() for listener in listeners]

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.disconnect()


_lock = threading.Lock()


def hub_of(store: Store) -> Hub:
    """The hub of a store in this process; a forked child gets its own."""
    hub: Hub | None = store.__dict__.get("_hub")
    if hub is None or store.__dict__["_hub_pid"] != os.getpid():
        with _lock:
            hub = store.__dict__.get("_hub")
            if hub is None or store.__dict__["_hub_pid"] != os.getpid():
                hub = Hub(store)
                store.__dict__["_hub_pid"] = os.getpid()
                store.__dict__["_hub"] = hub
    return hub


def close_hub(store: Store) -> None:
    """Cuts off all who listen in this process, and lets the connection go; the next one takes another."""
    hub: Hub | None = store.__dict__.get("_hub")
    if hub is not None and store.__dict__["_hub_pid"] == os.getpid():
        hub.close()


__all__ = ["Filter", "Hub", "Listener", "close_hub", "hub_of"]
