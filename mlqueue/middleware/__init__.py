"""Dramatiq's middleware as mlqueue uses it: the default list, and where ours differ from Dramatiq's own."""

from __future__ import annotations

from dramatiq.middleware import Callbacks, Middleware, Pipelines, Retries, ShutdownNotifications
from dramatiq.results import Results

from ..settings import Settings
from ..store import Store
from .eventloop import AsyncIO
from .groups import GroupCallbacks
from .results import StoreBackend
from .timing import AgeLimit, TimeLimit

__all__ = ["AgeLimit", "AsyncIO", "GroupCallbacks", "StoreBackend", "TimeLimit", "default_middleware"]


def default_middleware(store: Store, settings: Settings) -> list[Middleware]:
    """What a broker of ours runs: Dramatiq's defaults with no time limit (ten minutes would end a training), fewer
    retries, results kept, groups' callbacks, and async actors."""
    return [
        AgeLimit(store),
        TimeLimit(),
        ShutdownNotifications(),
        Callbacks(),
        Pipelines(),
        Retries(max_retries=settings.max_retries),
        GroupCallbacks(store),
        AsyncIO(),
        # Exactly this class: a Worker looks for it by its type.
        Results(backend=StoreBackend(store), store_results=True),
    ]
