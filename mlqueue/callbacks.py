"""Callbacks: the URL that is fetched when a job has ended."""

from __future__ import annotations

from typing import Any

import dramatiq

from .store.records import CALLBACK, CALLBACKS


def deliver() -> None:
    """Fetches the URL of the job that this one is about."""
    raise NotImplementedError


def callback_actor(broker: Any) -> dramatiq.Actor[Any, Any]:
    """The actor that delivers callbacks."""
    return dramatiq.Actor(
        deliver, broker=broker, actor_name=CALLBACK, queue_name=CALLBACKS, priority=0, options={"max_retries": 10}
    )


__all__ = ["callback_actor"]
