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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import MLQ, Actor, instances
    from .current import CurrentJob, current_job
    from .data import Data
    from .dead_letters import DeadLetter, DeadLetters, DeadPage
    from .delivery import Cancelled, HandBack, Retry
    from .errors import (
        ActorNotFound,
        BodyTooLarge,
        DecodeError,
        EmbeddedError,
        EncodeError,
        Forbidden,
        FunctionNotFound,
        InvalidArguments,
        InvalidJob,
        InvalidTransition,
        JobCancelled,
        JobExists,
        JobFailed,
        JobNotFound,
        KeyReused,
        MissingDependency,
        MLQueueError,
        NoCurrentJob,
        RangeNotSatisfiable,
        RequestError,
        ResultMissing,
        ResultTimeout,
        SettingsError,
        SignatureInvalid,
        SigningKeyMissing,
        StaleAttempt,
        StoreError,
        StoreFull,
        StoreUnavailable,
        TooManyStreams,
        Unauthorized,
        UnsupportedBody,
        WaitCycle,
    )
    from .functions import PostedFunction, sign_function
    from .handle import Job, JobEvent
    from .job import DeadReason, JobRecord, LogLine, Metric, Point, Result, State, Usage
    from .limits import Limit, Limits
    from .settings import Settings
    from .webhooks import Webhook
    from .why import Why

__version__ = "0.1.0"

__all__ = [
    "MLQ",
    "Actor",
    "ActorNotFound",
    "BodyTooLarge",
    "Cancelled",
    "CurrentJob",
    "Data",
    "DeadLetter",
    "DeadLetters",
    "DeadPage",
    "DeadReason",
    "DecodeError",
    "EmbeddedError",
    "EncodeError",
    "Forbidden",
    "FunctionNotFound",
    "HandBack",
    "InvalidArguments",
    "InvalidJob",
    "InvalidTransition",
    "Job",
    "JobCancelled",
    "JobEvent",
    "JobExists",
    "JobFailed",
    "JobNotFound",
    "JobRecord",
    "KeyReused",
    "Limit",
    "Limits",
    "LogLine",
    "MLQueueError",
    "Metric",
    "MissingDependency",
    "NoCurrentJob",
    "Point",
    "PostedFunction",
    "RangeNotSatisfiable",
    "RequestError",
    "Result",
    "ResultMissing",
    "ResultTimeout",
    "Retry",
    "Settings",
    "SettingsError",
    "SignatureInvalid",
    "SigningKeyMissing",
    "StaleAttempt",
    "State",
    "StoreError",
    "StoreFull",
    "StoreUnavailable",
    "TooManyStreams",
    "Unauthorized",
    "UnsupportedBody",
    "Usage",
    "WaitCycle",
    "Webhook",
    "Why",
    "current_job",
    "instances",
    "sign_function",
]

#: Where each public name lives. A name is imported when it is first used, so that `mlqueue.batch` needs no more than
#: NumPy, and a command no more than what it does.
_HOMES = {
    "app": (
        "MLQ",
        "Actor",
        "instances",
    ),
    "current": (
        "CurrentJob",
        "current_job",
    ),
    "data": ("Data",),
    "dead_letters": (
        "DeadLetter",
        "DeadLetters",
        "DeadPage",
    ),
    "delivery": (
        "Cancelled",
        "HandBack",
        "Retry",
    ),
    "errors": (
        "ActorNotFound",
        "BodyTooLarge",
        "DecodeError",
        "EmbeddedError",
        "EncodeError",
        "Forbidden",
        "FunctionNotFound",
        "InvalidArguments",
        "InvalidJob",
        "InvalidTransition",
        "JobCancelled",
        "JobExists",
        "JobFailed",
        "JobNotFound",
        "KeyReused",
        "MissingDependency",
        "MLQueueError",
        "NoCurrentJob",
        "RangeNotSatisfiable",
        "RequestError",
        "ResultMissing",
        "ResultTimeout",
        "SettingsError",
        "SignatureInvalid",
        "SigningKeyMissing",
        "StaleAttempt",
        "StoreError",
        "StoreFull",
        "StoreUnavailable",
        "TooManyStreams",
        "Unauthorized",
        "UnsupportedBody",
        "WaitCycle",
    ),
    "functions": (
        "PostedFunction",
        "sign_function",
    ),
    "handle": (
        "Job",
        "JobEvent",
    ),
    "job": (
        "DeadReason",
        "JobRecord",
        "LogLine",
        "Metric",
        "Point",
        "Result",
        "State",
        "Usage",
    ),
    "limits": (
        "Limit",
        "Limits",
    ),
    "settings": ("Settings",),
    "webhooks": ("Webhook",),
    "why": ("Why",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
