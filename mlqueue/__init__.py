"""mlqueue: a task framework for machine learning on Dramatiq.

::

    import mlqueue

    mlq = mlqueue.MLQ("vision")

    @mlq.actor
    def train(lr: float, epochs: int) -> str:
        for epoch in mlqueue.current_job().track(range(epochs)):
            ...
        return "accuracy 0.97"

    job = train.submit(0.1, epochs=10)     # a worker runs it: mlqueue worker MODULE
    job.result(timeout=60)
"""

from __future__ import annotations

from .app import MLQ, Actor, instances
from .current import CurrentJob, current_job
from .delivery import HandBack, Retry
from .errors import (
    DecodeError,
    EmbeddedError,
    EncodeError,
    InvalidJob,
    InvalidTransition,
    JobCancelled,
    JobFailed,
    JobNotFound,
    MissingDependency,
    MLQueueError,
    NoCurrentJob,
    ResultMissing,
    ResultTimeout,
    SettingsError,
    StaleAttempt,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from .handle import Job, JobEvent
from .job import DeadReason, JobRecord, Result, State
from .settings import Settings

__version__ = "0.1.0"

__all__ = [
    "MLQ",
    "Actor",
    "CurrentJob",
    "DeadReason",
    "DecodeError",
    "EmbeddedError",
    "EncodeError",
    "HandBack",
    "InvalidJob",
    "InvalidTransition",
    "Job",
    "JobCancelled",
    "JobEvent",
    "JobFailed",
    "JobNotFound",
    "JobRecord",
    "MLQueueError",
    "MissingDependency",
    "NoCurrentJob",
    "Result",
    "ResultMissing",
    "ResultTimeout",
    "Retry",
    "Settings",
    "SettingsError",
    "StaleAttempt",
    "State",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "current_job",
    "instances",
]
