"""Every error of :mod:`mlqueue.batch` that is not plain misuse (a ``ValueError`` or ``TypeError``).

::

    MLQueueError
    └── BatchError
        ├── StateError       a saved state does not fit the iterator, or there is none to save
        ├── SourceFailed     a worker could not make a data source
        ├── SourceMismatch   no worker has the data source, or its files, or all have another version of them
        ├── BatchSkipped     a batch was left out (policy skip); iterators go on to the next
        └── SampleError      a sample could not be read; carries its index
            └── TooManySkips more samples than allowed could not be read
"""

from __future__ import annotations

from mlqueue.errors import MLQueueError

__all__ = ["BatchError", "BatchSkipped", "SampleError", "SourceFailed", "SourceMismatch", "StateError", "TooManySkips"]


class BatchError(MLQueueError):
    """A mini-batch could not be prepared."""


class StateError(BatchError, ValueError):
    """The saved state does not fit this iterator."""


class SourceFailed(BatchError):
    """A data source could not be made."""


class SourceMismatch(BatchError):
    """No worker can prepare batches of this data source: the text says what each host lacks."""


class BatchSkipped(BatchError):
    """A batch was left out because it could not be prepared."""


class SampleError(BatchError):
    """A sample could not be read."""

    def __init__(self, message: str | None = None, *, index: int = -1, attempts: int = 1) -> None:
        super().__init__(message)
        #: The position of the sample in its source; -1 when it is not known.
        self.index = index
        #: How often reading it was tried.
        self.attempts = attempts

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions are rebuilt from their positional arguments, which would lose the two that are not.
        return _sample_error, (type(self), self.message, self.index, self.attempts)


class TooManySkips(SampleError):
    """More samples than allowed could not be read."""


def _sample_error(cls: type[SampleError], message: str, index: int, attempts: int) -> SampleError:
    return cls(message, index=index, attempts=attempts)
