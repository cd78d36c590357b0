"""Giving back jobs that run too long: a timeout bound to a whole namespace, for as long as somebody wants it.

Every supervisor and listener sweeps already, for workers that are lost and timeouts of jobs' own (``job_timeout``). A
reaper binds a timeout to all jobs that have none, and sweeps too, so that it also works where no worker lives.
"""

from __future__ import annotations

import dataclasses
import threading
import uuid
from datetime import timedelta
from typing import Final

from .errors import InvalidJob
from .heartbeat import Beater
from .job import seconds
from .store import Store

__all__ = ["Reaper"]

#: How long the store has to hear of a reaper's end, in seconds. If it does not the bond ends by itself after a lease.
PATIENCE: Final = 5.0


class Reaper:
    """A background thread that has every job given back to its queue when it has run for longer than `job_timeout`.

    It acts then whether the job's worker lives or not: the old attempt can write no more, and `Cancelled` is raised in
    it. All by the store's clock.

    Parameters:
      store: The store of the namespace.
      interval: Seconds between two looks, at most; the store is swept more often where the settings say so.
      job_timeout: Seconds. A job's own timeout goes before it, and of several reapers' the shortest counts.
      max_retries: How often a job is given back; then it is dead, reason ``stalled``.
    """

    def __init__(
        self,
        store: Store,
        *,
        interval: float | timedelta = 60.0,
        job_timeout: float | timedelta = 300.0,
        max_retries: int = 5,
    ) -> None:
        pause = _positive(interval, "the interval")
        self.job_timeout = _positive(job_timeout, "job_timeout")
        if isinstance(max_retries, bool) or not isinstance(max_retries, int) or max_retries < 0:
            raise InvalidJob(f"max_retries={max_retries!r}: it must be an int, 0 or more.")
        self.max_retries = max_retries
        settings = store.settings
        swept = dataclasses.replace(settings, sweep_interval=max(0.05, min(pause, settings.sweep_interval)))
        self._store = Store(store.connector, store.namespace, swept)
        self._id = uuid.uuid4().hex
        self._stopped = threading.Event()
        self._beater = Beater(self._store, self._bind_again)

    def start(self) -> None:
        """Begins: when this returns the timeout is bound, to running jobs too. Raises `StoreUnavailable`."""
        self._bind()
        self._beater.start()

    def stop(self) -> None:
        """Ends it: no timeout is bound to the jobs any more. May be called again."""
        if not self._stopped.is_set():
            self._stopped.set()
            self._beater.order(lambda: self._store.unbind_timeout(self._id))
        self._beater.close(PATIENCE)

    def _bind_again(self) -> list[str]:
        """Called by the beater when leases are to be renewed: so is the bond, which holds as long as one. It beats for
        no worker."""
        if not self._stopped.is_set():
            self._bind()
        return []

    def _bind(self) -> None:
        self._store.bind_timeout(self._id, self.job_timeout, self.max_retries, self._store.settings.lease)


def _positive(value: float | timedelta, name: str) -> float:
    number = seconds(value, name)
    if not number:
        raise InvalidJob(f"{name} is {value!r}: it must be more than 0 seconds.")
    return number
