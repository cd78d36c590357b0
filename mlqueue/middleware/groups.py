"""Callbacks of Dramatiq's groups, counted by the store: each child once, the callbacks exactly once."""

from __future__ import annotations

from typing import Any

import dramatiq.middleware
from dramatiq import Broker, Message
from dramatiq.rate_limits import RateLimiterBackend

from ..delivery import Delivery
from ..store import Store


class GroupCallbacks(dramatiq.middleware.GroupCallbacks):
    """Notes on the delivery which group a job completes; the settle counts it and creates the callbacks."""

    def __init__(self, store: Store, *, barrier_ttl: int = 7 * 86_400_000) -> None:
        super().__init__(_Openings(store), barrier_ttl=barrier_ttl)

    def after_process_message(
        self, broker: Broker, message: Any, *, result: Any = None, exception: BaseException | None = None
    ) -> None:
        """Notes the group of a job that has ended well."""
        uuid = message.options.get("group_completion_uuid")
        callbacks = message.options.get("group_completion_callbacks")
        if exception is not None or message.failed or not uuid or not callbacks or not isinstance(message, Delivery):
            return
        new_job = broker.new_job  # type: ignore[attr-defined]
        jobs = [new_job(Message(**callback), parent=message.held.id) for callback in callbacks]
        message.group = (uuid, jobs)


class _Openings(RateLimiterBackend):
    """What a group's `run` needs of a rate limiter's backend: to say how many children there will be."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def add(self, key: str, value: int, ttl: int) -> bool:
        return self.store.open_group(key, value, ttl / 1000)
