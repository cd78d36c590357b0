"""Every error that mlqueue raises, in one tree.

::

    MLQueueError
    ├── SettingsError            a setting that is unknown or has a value that is not allowed
    ├── InvalidJob               arguments or options that cannot be a job
    │   ├── EncodeError          a value that cannot be sent; carries the path to it
    │   ├── DecodeError          bytes that are not what the codec writes
    │   ├── InvalidArguments     values that do not fit a schema; carries the path to each fault
    │   └── KeyReused            an idempotency key that came with another request before
    ├── JobNotFound              no job has this id (also a KeyError)
    ├── ActorNotFound            no worker has declared this actor (also a KeyError)
    ├── FunctionNotFound         no posted function has this name (also a KeyError)
    ├── JobExists                a unique job was to be rejected, since another one is there; carries its id
    ├── InvalidTransition        the job's state does not allow the move
    ├── StaleAttempt             the job has been taken over by a later attempt
    ├── JobFailed                the awaited job ended dead
    │   └── JobCancelled         the awaited job was cancelled
    ├── WaitCycle                a job waits for one that waits for it
    ├── ResultTimeout            the job did not end in time (also a TimeoutError)
    ├── ResultMissing            the job has no result (not ended, or expired)
    ├── NoCurrentJob             current_job() outside a job
    ├── RequestError             an HTTP request that cannot be read
    │   ├── BodyTooLarge         its body is larger than allowed
    │   ├── UnsupportedBody      its body is of a type that is not taken
    │   └── RangeNotSatisfiable  it asks for a part of a result that is not there
    ├── Unauthorized             an HTTP request without a valid key or login
    ├── Forbidden                an HTTP request whose key or login does not reach so far
    ├── SigningKeyMissing        code was to be sent or loaded, and no signing key is set
    ├── SignatureInvalid         what was sent is not signed by a key that is set here
    ├── TooManyStreams           an HTTP server that has no room for another stream
    ├── StoreError               the store refused a command
    │   ├── StoreUnavailable     the store cannot be reached
    │   ├── StoreFull            the store has no memory or disk left
    │   └── EmbeddedError        the embedded server cannot be started or found
    └── MissingDependency        an optional package is not installed (also an ImportError)

Each class knows the HTTP status and the exit code that it maps to, and its docstring is the message that it shows
when it is raised without one.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import ClassVar

__all__ = [
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
    "MLQueueError",
    "MissingDependency",
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
]


class MLQueueError(Exception):
    """An error in mlqueue."""

    #: The HTTP status that the web part answers with.
    status: ClassVar[int] = 500
    #: The exit code that the command line ends with.
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str | None = None) -> None:
        if message is None:
            message = inspect.cleandoc(type(self).__doc__ or type(self).__name__)
        self.message = message
        super().__init__(message)

    def __str__(self) -> str:
        # KeyError, which some subclasses also are, would show the message's repr.
        return self.message


class SettingsError(MLQueueError, ValueError):
    """A setting is unknown or has a value that is not allowed."""

    exit_code = 2


class InvalidJob(MLQueueError, ValueError):
    """The arguments or options given cannot be a job."""

    status = 422
    exit_code = 2


class EncodeError(InvalidJob):
    """A value cannot be sent."""

    def __init__(self, message: str | None = None, *, path: str = "") -> None:
        super().__init__(message)
        #: Where the value stands, as ``args[0]['x']``; empty when it is the whole.
        self.path = path


class DecodeError(InvalidJob):
    """These bytes are not what mlqueue writes."""

    status = 400


class InvalidArguments(InvalidJob):
    """These values do not fit what is allowed."""

    def __init__(self, message: str | None = None, *, faults: Sequence[tuple[str, str]] = ()) -> None:
        super().__init__(message)
        #: Path (``$.kwargs.lr``) and text of each fault.
        self.faults = tuple(faults)


class KeyReused(InvalidJob):
    """This idempotency key came with another request before."""


class JobNotFound(MLQueueError, KeyError):
    """No job has this id."""

    status = 404
    exit_code = 3

    @classmethod
    def of(cls, job_id: object, namespace: str) -> JobNotFound:
        """The error for an id that the store does not know.

        It may never have existed, it may have expired (``result_ttl``), or it belongs to another namespace.
        """
        return cls(
            f"no job {job_id!r} in {namespace!r}: the id is wrong, the job has expired (result_ttl), "
            "or it belongs to another namespace or store. `mlqueue jobs` lists those that exist."
        )


class ActorNotFound(MLQueueError, KeyError):
    """No worker has declared this actor."""

    status = 404
    exit_code = 3


class FunctionNotFound(MLQueueError, KeyError):
    """No posted function has this name."""

    status = 404
    exit_code = 3


class JobExists(MLQueueError):
    """There is a job with this unique key already."""

    status = 409

    def __init__(self, message: str | None = None, *, job_id: str = "") -> None:
        super().__init__(message)
        #: The id of the job that is there.
        self.job_id = job_id

    @classmethod
    def of(cls, job_id: str) -> JobExists:
        """The error for a job that was rejected because of that one."""
        return cls(
            f"job {job_id} has this unique key; nothing was submitted. Wait for it, cancel it, or submit with "
            "unique_policy='return' to get it instead, or 'replace' to end it.",
            job_id=job_id,
        )


class InvalidTransition(MLQueueError):
    """The job's state does not allow this move."""

    status = 409


class StaleAttempt(MLQueueError):
    """This attempt of the job has been taken over by a later one; what it writes is refused."""

    status = 409


class JobFailed(MLQueueError):
    """The job failed."""

    status = 409

    def __init__(
        self,
        message: str | None = None,
        *,
        job_id: str = "",
        reason: str = "failed",
        error_type: str = "",
        remote_traceback: str = "",
    ) -> None:
        super().__init__(message)
        #: The id of the job that failed.
        self.job_id = job_id
        #: Why it ended: one of ``mlqueue.job.DeadReason``'s values, or ``cancelled``.
        self.reason = reason
        #: The qualified name of the exception's class in the worker; empty when none was raised (a crash).
        self.error_type = error_type
        #: The traceback as the worker formatted it; empty when there is none.
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.add_note("The traceback in the worker:\n" + remote_traceback.rstrip())


class JobCancelled(JobFailed):
    """The job was cancelled."""


class WaitCycle(MLQueueError, RuntimeError):
    """A job waits for one that waits for it: neither would ever go on."""

    status = 409

    @classmethod
    def of(cls, chain: list[str]) -> WaitCycle:
        """The error for jobs of which each waits for the next, or is the child of the next."""
        other = chain[-1] if chain[-1] != chain[0] else chain[1]
        return cls(
            f"job {chain[0]} waits for {other}, which is waiting for it or is an ancestor of it: {' -> '.join(chain)}. "
            "Neither would ever go on; have the other one read the result, or submit the rest of the work as a job of "
            "its own."
        )


class ResultTimeout(MLQueueError, TimeoutError):
    """The job did not end in time."""

    status = 504
    exit_code = 5


class ResultMissing(MLQueueError):
    """The job has no result: it has not ended, or the result has expired."""

    status = 404
    exit_code = 3


class NoCurrentJob(MLQueueError, RuntimeError):
    """There is no current job here: current_job() works inside an actor that a worker runs. Call it there, or pass
    what you need as an argument."""


class RequestError(MLQueueError):
    """This request cannot be read."""

    status = 400


class BodyTooLarge(RequestError):
    """The body of this request is larger than allowed."""

    status = 413


class UnsupportedBody(RequestError):
    """The body of this request is of a type that is not taken here."""

    status = 415


class RangeNotSatisfiable(RequestError):
    """This part of the result is not there."""

    status = 416

    def __init__(self, message: str | None = None, *, size: int = 0) -> None:
        super().__init__(message)
        #: How many bytes there are.
        self.size = size


class Unauthorized(MLQueueError):
    """This request has no valid key or login."""

    status = 401


class SigningKeyMissing(MLQueueError):
    """No signing key is set."""

    status = 403
    exit_code = 2


class SignatureInvalid(MLQueueError):
    """What was sent is not signed by a key that is set here."""

    status = 403


class Forbidden(MLQueueError):
    """The key or login of this request does not reach so far."""

    status = 403


class TooManyStreams(MLQueueError):
    """There are as many streams of events here as may be open at a time."""

    status = 503


class StoreError(MLQueueError):
    """The store refused a command."""

    status = 503
    exit_code = 4


class StoreUnavailable(StoreError, ConnectionError):
    """The store cannot be reached."""


class StoreFull(StoreError):
    """The store has no memory or disk left, so nothing was written. Raise its maxmemory, free disk space, or remove
    jobs that nobody needs."""

    status = 507


class EmbeddedError(StoreError):
    """The embedded server cannot be started or found."""


class MissingDependency(MLQueueError, ImportError):
    """An optional package is not installed."""

    exit_code = 2
