"""Dramatiq's results API over the store: ``message.get_result()`` and all that builds on it."""

from __future__ import annotations

import time
from typing import Any

from dramatiq import Message
from dramatiq.results import ResultBackend
from dramatiq.results.backend import DEFAULT_TIMEOUT
from dramatiq.results.errors import ResultFailure, ResultMissing, ResultTimeout

from ..errors import JobNotFound
from ..job import State
from ..store import Store
from ..waiting import wait_for


class StoreBackend(ResultBackend):
    """Reads the results of jobs. Writing them is not its business: the settle that ends a job stores its result."""

    def __init__(self, store: Store) -> None:
        super().__init__(namespace=store.namespace)
        self.store = store

    def get_result(self, message: Message[Any], *, block: bool = False, timeout: int | None = None) -> Any:
        """The full result of a message's job. `timeout` in milliseconds, 10 s when None.

        Raises Dramatiq's ResultMissing, ResultTimeout, and ResultFailure for a job that is dead or cancelled.
        """
        try:
            if block:
                self._wait(message, (DEFAULT_TIMEOUT if timeout is None else timeout) / 1000)
            outcome = self.store.outcome(message.message_id)
        except JobNotFound:
            raise ResultMissing(message) from None
        if not outcome.state.ended:
            raise ResultMissing(message)
        if outcome.result is not None:
            return outcome.result.full
        if outcome.state is State.CANCELLED:
            raise ResultFailure("the job was cancelled", "JobCancelled", "")
        kind = outcome.error.type.removeprefix("builtins.") if outcome.error else ""
        text = outcome.error.message if outcome.error else outcome.reason
        raise ResultFailure(f"actor raised {kind}: {text}", kind, text)

    def _wait(self, message: Message[Any], timeout: float) -> None:
        """Waits for a job, also for one that does not exist yet: a pipeline's later ones are created by the earlier."""
        deadline = time.monotonic() + timeout
        pause = 0.005
        while True:
            try:
                if wait_for(self.store, message.message_id, max(0.0, deadline - time.monotonic())):
                    return
            except JobNotFound:
                if time.monotonic() + pause < deadline:
                    time.sleep(pause)
                    pause = min(2 * pause, 0.1)
                    continue
            raise ResultTimeout(message)

    def store_result(self, message: Message[Any], result: Any, ttl: int) -> None:
        """Does nothing: see the class."""

    def store_exception(self, message: Message[Any], exception: Exception, ttl: int) -> None:
        """Does nothing: see the class."""
