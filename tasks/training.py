"""Training on the digits: progress and a checkpoint each epoch, resumed where an earlier attempt ended. Its batches can
be prepared by other workers; then a checkpoint may also lie between two batches."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

import mlqueue
from mlqueue import codec
from mlqueue.batch.actor_pool import ActorPool
from mlqueue.batch.data_source import ArrayDataSource
from mlqueue.batch.work_pool import ParallelIterator

from . import figure
from .app import mlq
from .data import Digits, load_digits, with_shifts
from .network import Network

#: How long a trained model is kept in the store.
MODEL_TTL = timedelta(days=30)

#: With batches from a pool, a checkpoint is saved every so many seconds, wherever the epoch is then.
SAVE_EVERY = 1.0

#: Where the id of the job is kept that trained a model last.
LATEST_MODEL = "model:latest"


def model_key(job_id: str) -> str:
    """Where the model is kept that a job has trained."""
    return f"model:{job_id}"


@mlq.data_source("digits")
def digits_source() -> ArrayDataSource:
    """The training images, shifted ones among them, and their labels."""
    digits = load_digits()
    return ArrayDataSource(list(with_shifts(digits.train_images, digits.train_labels)))


# A ValueError is a wrong argument, which no retry makes right.
@mlq.actor(queue_name="train", throws=ValueError, http=True)
def train_digits(
    lr: float = 0.02, epochs: int = 50, hidden: int = 256, batch_size: int = 32, seed: int = 1, pool: bool = False
) -> mlqueue.Result | None:
    """Trains a network and keeps it in the store under the job's id, for `predict_digits`.

    The short result is a text such as ``accuracy 0.983``, the full one a PNG with the learning curve and the
    confusion matrix. The same arguments give the same network, however often the training was interrupted. With `pool`
    the batches are prepared by the workers of the queue ``batches``, and an interrupted epoch goes on with the very
    batch that was not used yet.
    """
    if epochs < 1 or hidden < 1 or batch_size < 1 or not lr > 0:
        raise ValueError(f"lr={lr}, epochs={epochs}, hidden={hidden}, batch_size={batch_size}: all must be above 0.")
    job = mlqueue.current_job()
    digits = load_digits()
    training = Training(digits, hidden, seed, job.load_checkpoint())
    if training.epoch:
        job.progress(100 * training.epoch / epochs, f"resumed behind epoch {training.epoch} of {epochs}")
    # The matrices are small and other cores have jobs of their own: one thread of BLAS is the fastest here.
    with threadpool_limits(limits=1), ActorPool(mlq) as actors:
        source = actors.parallel_data_source(digits_source()) if pool else None
        batches: ParallelIterator | None = None
        while training.epoch < epochs:
            if source is None:
                last: dict[str, Any] | None = training.run_epoch(lr, batch_size, job.attempt)
            else:
                if batches is None:
                    batches = source.batch_iterator(batch_size, shuffle=seed, epoch=training.epoch)
                    training.find_place(batches)
                last = training.run_batches(lr, batches, job.attempt, Pause(job))
            job.save_checkpoint(training.state())
            if last is not None:
                batches = None
                note = f"epoch {training.epoch} of {epochs}: loss {last['loss']:.4f}, accuracy {last['accuracy']:.3f}"
                job.progress(100 * training.epoch / epochs, note)
                job.log_metrics(training.epoch, loss=last["loss"], accuracy=last["accuracy"])
            if job.cancelled or job.stopping:
                return None  # a stopping worker's job goes back to its queue and is resumed elsewhere
    job.store_data(codec.encode(training.model()), model_key(job.id), MODEL_TTL)
    job.store_data(job.id, LATEST_MODEL, MODEL_TTL)
    predicted = training.network.probabilities(digits.test_images).argmax(axis=1)
    return mlqueue.Result(
        short=f"accuracy {np.mean(predicted == digits.test_labels):.3f}",
        full=figure.draw(training.history, digits.test_labels, predicted),
        content_type="image/png",
    )


class Pause:
    """Says when an epoch is to be left for a checkpoint."""

    def __init__(self, job: mlqueue.CurrentJob) -> None:
        self._job, self._at = job, time.monotonic() + SAVE_EVERY

    def __call__(self) -> bool:
        return time.monotonic() > self._at or self._job.cancelled or self._job.stopping


class Training:
    """A training between two epochs: the network, the generator of its randomness, and what has happened so far.

    `state` is what `checkpoint` takes: with it a training goes on as if it had never been interrupted.
    """

    def __init__(self, digits: Digits, hidden: int, seed: int, checkpoint: dict[str, Any] | None = None) -> None:
        self.images, self.labels = with_shifts(digits.train_images, digits.train_labels)
        self.digits = digits
        self.generator = np.random.default_rng(seed)
        if checkpoint is None:
            self.network = Network.new(hidden, self.generator)
            #: A dict for each epoch: its number, the attempt that ran it, its loss (training) and accuracy (test).
            self.history: list[dict[str, Any]] = []
        else:
            self.network = Network(checkpoint["parameters"], checkpoint["velocities"])
            self.generator.bit_generator.state = checkpoint["generator"]
            self.history = checkpoint["history"]
        #: Of an epoch that is not over: where its batches are, the sum of the losses so far, and of how many images.
        self.place: dict[str, Any] | None = None if checkpoint is None else checkpoint.get("place")
        self.total: float = 0.0
        self.seen: int = 0
        if self.place is not None:
            self.total, self.seen = self.place["total"], self.place["seen"]

    @property
    def epoch(self) -> int:
        """How many epochs are done."""
        return len(self.history)

    def run_epoch(self, lr: float, batch_size: int, attempt: int) -> dict[str, Any]:
        """Trains on every image once, in a new random order; the epoch's entry in the history."""
        order = self.generator.permutation(len(self.images))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            self._step(self.images[batch], self.labels[batch], lr)
        return self._end_epoch(attempt)

    def find_place(self, batches: ParallelIterator) -> None:
        """Goes to the batch of an epoch that was not used yet when the checkpoint was saved."""
        if self.place is not None:
            batches.load_state_dict(self.place["batches"])

    def run_batches(
        self, lr: float, batches: ParallelIterator, attempt: int, pause: Callable[[], bool]
    ) -> dict[str, Any] | None:
        """Trains on the batches that are left of an epoch; its entry in the history, or None after a pause."""
        for images, labels in batches:
            self._step(images, labels, lr)
            if pause():
                self.place = {"batches": batches.state_dict(), "total": self.total, "seen": self.seen}
                return None
        return self._end_epoch(attempt)

    def _step(self, images: Any, labels: Any, lr: float) -> None:
        self.total += len(images) * self.network.step(images, labels, lr)
        self.seen += len(images)

    def _end_epoch(self, attempt: int) -> dict[str, Any]:
        predicted = self.network.probabilities(self.digits.test_images).argmax(axis=1)
        entry = {
            "epoch": self.epoch + 1,
            "attempt": attempt,
            "loss": self.total / self.seen,
            "accuracy": float(np.mean(predicted == self.digits.test_labels)),
        }
        self.history.append(entry)
        self.place, self.total, self.seen = None, 0.0, 0
        return entry

    def state(self) -> dict[str, Any]:
        """Everything that is needed to go on."""
        return {
            "parameters": self.network.parameters,
            "velocities": self.network.velocities,
            "generator": self.generator.bit_generator.state,
            "history": self.history,
            "place": self.place,
        }

    def model(self) -> dict[str, Any]:
        """What inference needs, and how it came about."""
        return {"parameters": self.network.parameters, "history": self.history}
