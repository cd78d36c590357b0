"""The third pool: batches prepared by workers of the queue, as jobs of a Dramatiq actor.

::

    mlq = mlqueue.MLQ("vision")

    @mlq.data_source("train")
    def train_source(size: int = 224):
        return image_folder("/data/train", size=(size, size)).map(augment)

    with ActorPool(mlq) as pool:
        ds = pool.parallel_data_source(train_source(size=224))
        for x, y in ds.batch_iterator(64, shuffle=12345):
            ...

The workers are any ``mlqueue worker MODULE`` whose module registers the source, on this host or on others. The batches
are those of the source itself, in its order, whoever prepared them and whatever happened to who did.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, Final, get_args

import dramatiq
import numpy as np

from mlqueue import codec
from mlqueue.app import MLQ
from mlqueue.batch.actor_crew import ActorCrew, Desk, Policy, PoolStats, Terms
from mlqueue.batch.data_source import AbstractDataSource
from mlqueue.batch.gathering import processors
from mlqueue.batch.inference import Run, batch_function
from mlqueue.batch.order import at_least_one
from mlqueue.batch.ways import Doors, open_doors
from mlqueue.batch.work_pool import AbstractWorkerPool
from mlqueue.errors import InvalidJob, JobNotFound, StoreError
from mlqueue.job import seconds
from mlqueue.named import BATCHES, actor_name_of, serving_actor

__all__ = ["ActorPool", "PoolStats"]

logger = logging.getLogger("mlqueue.batches")

#: How often the store is told how a pool fares, in seconds.
PUBLISH_EVERY: Final = 2.0
#: Over so many of these are rates averaged.
LATELY: Final = 5
#: How often it is looked whether the jobs that no worker has come for are still there, in seconds.
LOOK_EVERY: Final = 1.0
#: How long the next worker is waited for before another is asked for, in seconds. One by one they are taken by
#: different processes, since the one that has waited longest is woken first.
ONE_BY_ONE: Final = 0.05
#: How long after a worker was sent away another is asked for, in seconds.
AFTER_DECLINE: Final = 1.0
#: How long to wait after an error of the store, in seconds.
AFTER_ERROR: Final = 0.5


class ActorPool(AbstractWorkerPool):
    """A pool of the workers that serve a queue.

    Parameters:
      mlq: The app whose workers prepare batches.
      queue_name: The queue of their jobs.
      workers: How many worker processes at most prepare batches at a time; the number of processors when None.
      errors: What becomes of a batch that cannot be prepared, because an exception is raised, or because two workers
        have died of it: ``"raise"`` it where the batch would be given, ``"skip"`` the batch, or ``"retry"`` it, then
        raise.
      retries: How often, for ``"retry"``; so many workers may die of it besides the first.
      lease: For how long a worker may be silent, in seconds, until its batches are prepared by others too.
      stragglers: A batch that takes so many times the median is given to a second worker as well; None for never.
      linger: How long a worker without work stays, in seconds, until it does other jobs.
      slice: How long one stays that has work: then other jobs of its queues, if any wait, have their turn.
      alone_after: How long the trainer waits for the first worker, in seconds, until it prepares the batches itself;
        None for ever.

    It connects to nothing before its first use. Made in a module that workers import, it also has them serve the queue,
    as `MLQ.data_source` does.
    """

    def __init__(
        self,
        mlq: MLQ,
        queue_name: str = BATCHES,
        *,
        workers: int | None = None,
        errors: Policy = "raise",
        retries: int = 2,
        lease: float | timedelta = 2.0,
        stragglers: float | None = None,
        linger: float | timedelta = 5.0,
        slice: float | timedelta = 10.0,  # noqa: A002 - of time, of which a worker has one at a trainer's
        alone_after: float | timedelta | None = 5.0,
    ) -> None:
        if errors not in get_args(Policy):
            raise ValueError(f"errors must be 'raise', 'skip' or 'retry', got {errors!r}.")
        if not isinstance(mlq, MLQ):
            raise TypeError(f"mlq must be an MLQ, whose workers prepare batches; got a {type(mlq).__name__}.")
        if isinstance(retries, bool) or not isinstance(retries, int | np.integer) or retries < 0:
            raise ValueError(f"retries must be an int, 0 or more; got {retries!r}.")
        if stragglers is not None and not (isinstance(stragglers, int | float | np.number) and stragglers > 1):
            raise ValueError(f"stragglers must be a number above 1 (times the median), or None; got {stragglers!r}.")
        terms = Terms(
            workers=processors() if workers is None else at_least_one(workers, "workers"),
            errors=errors,
            retries=int(retries),
            lease=_above_zero(lease, "lease"),
            linger=_above_zero(linger, "linger"),
            slice=_above_zero(slice, "slice"),
            alone_after=seconds(alone_after, "alone_after"),
            stragglers=stragglers,
        )
        self.mlq, self.queue_name = mlq, queue_name
        if mlq.broker.worker is None:  # a worker that runs takes no further queue for a trainer that is its job
            serving_actor(mlq, queue_name)
        open_staff = partial(_open_staff, mlq, queue_name)
        doors = partial(_open_doors, mlq)
        super().__init__(ActorCrew(terms, mlq.settings.signing_keys, mlq.sources, open_staff, doors))

    def map_concat(
        self,
        source: AbstractDataSource,
        actor: str | dramatiq.Actor[..., Any] | Callable[..., Any],
        batch_size: int,
        *,
        resume: str | os.PathLike[str] | None = None,
        progress_iter_func: Callable[..., Any] | None = None,
        n_batches: int | None = None,
        prepend_args: tuple[Any, ...] | None = None,
        batch_buffer_size: int = 20,
        **kwargs: Any,
    ) -> tuple[np.ndarray, ...] | None:
        """Apply a function to a whole data source in the workers, and join what it returns along axis 0, in order.

        Parameters:
          source: A data source with access by index.
          actor: An actor of this app, or its name: workers that have it call its function, ``fn(*prepend_args,
            *batch)``, with the arrays of each batch (a batch that is a dict is one argument). It returns an array with
            a row for each sample, a tuple or list of arrays, or None for a batch to be left out. A function that is no
            actor is sent as code, which needs a signing key.
          batch_size: Samples in a batch.
          resume: A folder in which results are kept as they come. A run that was stopped or killed goes on where it
            was, each sample once; one that has ended is given again at once. It has to be that of the same source in
            the same version, the same batch size, order and function.
          progress_iter_func: ``tqdm``, or anything that is called like it: ``(iterator, total=, leave=False)``.
          n_batches: Stop after so many.
          prepend_args: What the function is given first: for an actor, values that the codec carries.
          batch_buffer_size: How many batches are under way at a time, at least 1.
          kwargs: For ``source.batch_iterator``: ``shuffle=``, ``epoch=``, ``drop_last=``.

        Returns a tuple with one array for each that the function returns, None when it returned nothing at all. With
        `resume` they are read-only maps of the files in the folder, and no more than the batches under way is in
        memory. Raises what the function raises, with the samples' indices; what was given before is kept. Raises
        StateError where the folder holds a run of something else, BatchError where another process writes it.
        """
        function = batch_function(self.mlq, actor, prepend_args)
        run = Run(
            self.mlq,
            self,
            source,
            function,
            batch_size,
            n_batches=n_batches,
            buffer=batch_buffer_size,
            progress=progress_iter_func,
            folder=resume,
            kwargs=kwargs,
        )
        return run.concatenated()

    def map_mean(
        self,
        source: AbstractDataSource,
        actor: str | dramatiq.Actor[..., Any] | Callable[..., Any],
        batch_size: int,
        *,
        sum_axis: int | tuple[int, ...] | None = None,
        resume: str | os.PathLike[str] | None = None,
        progress_iter_func: Callable[..., Any] | None = None,
        n_batches: int | None = None,
        prepend_args: tuple[Any, ...] | None = None,
        batch_buffer_size: int = 20,
        **kwargs: Any,
    ) -> tuple[Any, ...] | None:
        """Apply a function to a whole data source in the workers, and average what it returns over all samples.

        The function returns, for its batch, the sum over the samples (a number or an array), or a tuple or list of
        such, or None; with `sum_axis` it returns values a sample, that are summed over that axis in the worker. The
        other arguments are those of `map_concat`; with `resume` the folder holds the sums. They are added in float64,
        in the order of the batches, whoever prepared them: the mean is that of ``source.batch_map_mean``, bit for bit.
        Returns a tuple of float64, numbers or arrays; None when nothing was returned at all.
        """
        function = batch_function(self.mlq, actor, prepend_args, sums=True, axis=sum_axis)
        run = Run(
            self.mlq,
            self,
            source,
            function,
            batch_size,
            n_batches=n_batches,
            buffer=batch_buffer_size,
            progress=progress_iter_func,
            folder=resume,
            kwargs=kwargs,
        )
        return run.mean()

    def stats(self) -> PoolStats:
        """How the work goes: what was prepared and given, who waited for whom, how many workers are there."""
        crew: Any = self._crew
        stats: PoolStats = crew.stats()
        return stats


def _above_zero(value: float | timedelta, name: str) -> float:
    given = seconds(value, name)
    if not given:
        raise InvalidJob(f"{name}={value!r}: it must be more than 0 seconds.")
    return given


def _open_doors(mlq: MLQ) -> Doors:
    return open_doors(mlq.settings, mlq.store.connector, mlq.store.root)


def _open_staff(mlq: MLQ, queue_name: str, desk: Desk) -> Callable[[], None]:
    return Staff(mlq, queue_name, desk).close


class Staff:
    """The thread that has workers come to a desk, and tells the store how it fares."""

    def __init__(self, mlq: MLQ, queue_name: str, desk: Desk) -> None:
        self._mlq, self._queue, self._desk = mlq, queue_name, desk
        self._actor = actor_name_of(queue_name)
        self._called = threading.Event()
        self._pending: dict[str, float] = {}  # jobs that no worker has come for: since when
        self._looked = self._published = 0.0
        self._begun = time.time()
        self._course = deque([(time.monotonic(), PoolStats())], maxlen=LATELY)
        desk.call_staff = self._called.set
        self._thread = threading.Thread(target=self._run, name="mlqueue-batch-staff", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        pause = 0.0
        while not self._desk.closed:
            self._called.wait(pause or PUBLISH_EVERY)
            self._called.clear()
            try:
                pause = self._do()
            except Exception as error:  # noqa: BLE001 - whatever it is, the next try may succeed
                logger.warning("workers for batches cannot be asked for: %s: %s", type(error).__name__, error)
                pause = AFTER_ERROR
                time.sleep(pause)
        try:
            self._forget()
        except StoreError as error:
            logger.debug("what a pool has left in the store goes by itself: %s", error)

    def _do(self) -> float:
        """What there is to do; in how many seconds to look again (0: when called)."""
        desk, now = self._desk, time.monotonic()
        while desk.come_jobs:
            self._pending.pop(desk.come_jobs.popleft(), None)
        while desk.lost_jobs:
            self._cancel(desk.lost_jobs[0])
            desk.lost_jobs.popleft()
        if self._pending and now - self._looked > LOOK_EVERY:
            self._looked = now
            found = self._mlq.store.records(list(self._pending))
            gone = [
                job for job, record in zip(self._pending, found, strict=True) if record is None or record.state.ended
            ]
            for job in gone:
                del self._pending[job]
            if gone:
                desk.declined_at = now  # it went to a worker that cannot come here
        if now - self._published > PUBLISH_EVERY:
            self._published = now
            self._publish()
        wanted = desk.missing()
        if not wanted and self._pending:
            self._call_off(now)
        if wanted <= len(self._pending):
            return LOOK_EVERY if self._pending else 0.0
        wait = desk.declined_at + AFTER_DECLINE - now
        newest = max(self._pending.values(), default=0.0)
        if wait <= 0 and now - newest < ONE_BY_ONE:
            wait = newest + ONE_BY_ONE - now
        if wait > 0:
            return wait
        self._ask()
        return ONE_BY_ONE

    def _call_off(self, now: float) -> None:
        """Nobody need come any more: jobs that have waited for a while are taken back."""
        late = [job for job, since in self._pending.items() if now - since > LOOK_EVERY]
        for job in late:
            self._cancel(job)
            del self._pending[job]
        self._mlq.store.remove(late)

    def _ask(self) -> None:
        terms = self._desk.terms
        given = {"lease": terms.lease, "linger": terms.linger, "slice": terms.slice}
        job = self._mlq.submit(self._actor, self._desk.listener.address, given, queue_name=self._queue, result_ttl=0)
        self._pending[job.id] = time.monotonic()

    def _cancel(self, job_id: str) -> None:
        try:
            self._mlq.store.cancel(job_id)
        except JobNotFound:
            pass  # it has ended

    def _publish(self) -> None:
        now, stats = time.monotonic(), self._desk.snapshot()
        then, before = self._course[0]
        self._course.append((now, stats))
        names = ("given", "bytes", "trainer_waited", "workers_waited")
        lately = {"seconds": now - then, **{name: getattr(stats, name) - getattr(before, name) for name in names}}
        more = {"queue": self._queue, "begun": self._begun, "pid": os.getpid(), "host": os.uname().nodename}
        more["lately"] = lately
        self._mlq.store.publish_pool(self._desk.run, codec.encode({**vars(stats), **more}))

    def _forget(self) -> None:
        """Nothing of the pool stays in the store: jobs that have begun end by themselves."""
        store = self._mlq.store
        store.withdraw_pool(self._desk.run)
        for job in [*self._pending, *self._desk.lost_jobs]:
            self._cancel(job)
        store.remove(list(self._pending))

    def close(self) -> None:
        """Wait until the store has forgotten the pool, or cannot be reached."""
        self._called.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(10)
