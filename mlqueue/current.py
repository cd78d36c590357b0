"""The job that runs here, seen from inside: `current_job()`."""

from __future__ import annotations

import math
import numbers
import time
import uuid
from collections.abc import Iterable, Iterator, Sized
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Final, TypeVar

from . import codec
from .data import Data
from .delivery import Delivery, HandBack, current_delivery
from .errors import InvalidJob, NoCurrentJob
from .job import positive
from .store.records import decode_slots

if TYPE_CHECKING:
    from .broker import StoreBroker

T = TypeVar("T")

#: The largest checkpoint, in bytes.
MAX_CHECKPOINT: Final = 2**31

#: How often `CurrentJob.track` reports, in seconds.
TRACK_INTERVAL: Final = 0.02


#: The longest name of a metric, in characters.
MAX_METRIC: Final = 200


class CurrentJob:
    """The job in hand. Valid while it runs; got by `current_job()`."""

    def __init__(self, broker: StoreBroker, delivery: Delivery) -> None:
        self._broker = broker
        self._delivery = delivery

    @property
    def id(self) -> str:
        """The job's id."""
        return self._delivery.held.id

    @property
    def attempt(self) -> int:
        """1 when the job runs for the first time; more after a crash, a retry, or when it was given back unstarted."""
        return self._delivery.held.attempt

    @property
    def retries(self) -> int:
        """How often it was put back after an error of its own."""
        return self._delivery.held.retries

    @property
    def actor_name(self) -> str:
        """The name of its actor."""
        return self._delivery.held.actor

    @property
    def queue_name(self) -> str:
        """The name of its queue."""
        return self._delivery.held.queue

    @property
    def parent(self) -> str | None:
        """The id of the job that submitted it, or None."""
        return self._delivery.held.parent or None

    @property
    def slots(self) -> dict[str, tuple[int, ...]]:
        """The slots of each resource that the job holds, numbered from 0: ``{"gpu": (1,)}``. Of ``gpu`` they are what
        ``CUDA_VISIBLE_DEVICES`` is to be. Empty for a job whose actor needs none."""
        packed = self._delivery.held.slots
        return decode_slots(packed) if packed else {}

    @property
    def stopping(self) -> bool:
        """Whether the worker is being drained: save a checkpoint and return (None), and the job goes back to its
        queue without a strike. After the drain time the process is killed."""
        if self._broker.stopping:
            self._delivery.saw_stopping = True
            return True
        return False

    @property
    def cancelled(self) -> bool:
        """Whether somebody has asked to cancel this job: whatever it returns, it ends cancelled. `Cancelled` is raised
        in it as well; this is for who catches that, or runs long in C."""
        return self._delivery.cancel_requested

    def progress(self, value: object, note: str | None = None) -> None:
        """Reports progress. A number stays a number, anything else is kept as text (1,000 characters).

        The first report is written at once, later ones are gathered for 50 ms, and the last one always arrives. It is
        never an error in the job: what cannot be written is logged.
        """
        self._broker.progress.report(self._delivery, value, note)

    def log_metrics(self, step: float, /, **values: float) -> None:
        """Keeps values of metrics at a step: ``job.log_metrics(epoch, loss=0.1, accuracy=0.97)``.

        They are kept with the job, for `Job.metrics`, and written a few times a second, the last of them before the
        job's end. Of each metric so many values are kept as the settings' ``metric_points`` says, over its whole
        course, and the newest. Where an attempt begins again at an earlier step, what an earlier one had from there on
        is replaced. What cannot be written is logged, and no error in the job; what is no number is.
        """
        if not _is_real(step) or not math.isfinite(step):
            raise InvalidJob(f"log_metrics(step={step!r}): a step is a number, such as that of the epoch.")
        checked = {}
        for name, value in values.items():
            item = getattr(value, "item", None)
            number = item() if callable(item) and getattr(value, "ndim", None) == 0 else value
            if not _is_real(number) or not 0 < len(name) <= MAX_METRIC or not name.isprintable():
                raise InvalidJob(
                    f"log_metrics({name[:MAX_METRIC]}={value!r}): a metric is a number, its name has at most "
                    f"{MAX_METRIC} characters that can be printed. Of an array log what you want to see of it, such as "
                    "its mean."
                )
            checked[name] = float(number)
        if checked:
            try:
                self._broker.journals.open(self._delivery).log_metrics(float(step), checked)
            except ValueError as error:
                raise InvalidJob(f"log_metrics: {error}. Have several jobs, or fewer metrics.") from None

    def track(self, items: Iterable[T], total: int | None = None, note: str | None = None) -> Iterator[T]:
        """Yields the items and reports percent done. `total` is taken from ``len(items)`` when it has one."""
        if total is None:
            total = len(items) if isinstance(items, Sized) else None
        reported_at, reported, done = 0.0, 0, 0
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - reported_at >= TRACK_INTERVAL or done == total:
                reported_at, reported = now, done
                self.progress(min(100.0, 100 * done / total) if total else done, note)
        if done != reported:
            self.progress(min(100.0, 100 * done / total) if total else done, note)

    def save_checkpoint(self, value: object) -> None:
        """Keeps a value (anything the codec carries, arrays included, of any size) until the job succeeds.

        A later attempt, after a crash, a retry or a drain, gets it from `load_checkpoint`. Raises `EncodeError` for a
        value that cannot be kept and `StaleAttempt` when this attempt no longer holds the job.
        """
        data = codec.encode(value, path="checkpoint", max_bytes=MAX_CHECKPOINT)
        held = self._delivery.held
        if self._broker.store.save_checkpoint(held.id, held.attempt, data, uuid.uuid4().hex[:12]):
            self._delivery.cancel()

    def load_checkpoint(self) -> Any:
        """What `save_checkpoint` kept last in this or an earlier attempt, or None. Arrays in it are read-only."""
        data = self._broker.store.load_checkpoint(self.id)
        return None if data is None else codec.decode(data)

    def store_data(self, data: str | bytes, key: str | None = None, expiry: float | timedelta | None = None) -> str:
        """Keeps text or bytes for other jobs of this namespace; the key (one is made when None).

        `expiry` in seconds; without it they are kept for ever.
        """
        return Data(self._broker.store).put(data, key, expiry)

    def fetch_data(self, key: str) -> bytes | None:
        """What some job kept under `key`, as bytes; None when there is nothing."""
        return Data(self._broker.store).get(key)

    def extend(self, seconds: float | timedelta) -> None:
        """Gives this attempt so much more time: its ``time_limit``, ``hard_time_limit`` and ``job_timeout`` (that of a
        reaper, too) are over that much later. Raises `StaleAttempt` when it no longer holds the job."""
        held = self._delivery.held
        total = self._broker.store.extend(held.id, positive(seconds, "extend"), attempt=held.attempt)
        self._delivery.extend_to(total)

    def hand_back(self) -> None:
        """Ends this attempt here and gives the job back to its queue, without a strike. Does not return."""
        raise HandBack

    def __repr__(self) -> str:
        return f"<CurrentJob {self.id} {self.actor_name} attempt {self.attempt}>"


def _is_real(value: object) -> bool:
    """Whether it is a number that a float can stand for."""
    try:
        return isinstance(value, numbers.Real) and isinstance(float(value), float)
    except OverflowError:
        return False


def current_job() -> CurrentJob:
    """The job that this code runs in. Raises `NoCurrentJob` outside an actor that a worker runs."""
    delivery = current_delivery.get()
    if delivery is None:
        raise NoCurrentJob
    if delivery.context is None:
        delivery.context = CurrentJob(delivery.broker, delivery)
    context: CurrentJob = delivery.context
    return context
