"""`Mount`: a blueprint where it is registered. All the state that there is, in ``app.extensions["mlqueue"]``."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence

from flask import current_app, request

from ..app import MLQ
from .auth import Hook
from .operation import Operation
from .streams import Streams

#: The key in ``app.extensions``. What is there is a dict of mounts by the name of their blueprint.
EXTENSION = "mlqueue"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mount:
    """What the routes of one registered blueprint work with."""

    #: The blueprint's name in this app, those of blueprints around it included.
    name: str
    mlq: MLQ
    #: Who say who asks, in order; empty where everybody may do everything.
    hooks: Sequence[Hook]
    #: Origins whose pages may read answers.
    cors_origins: Sequence[str]
    #: The largest body, in bytes.
    max_body: int
    #: How long ``Prefer: wait`` may wait, in seconds.
    max_wait: float
    #: The routes that it has.
    operations: Sequence[Operation]
    #: One for each request that may wait at a time.
    waits: threading.BoundedSemaphore
    #: The open streams.
    streams: Streams
    #: How long a stream may be silent, in seconds.
    heartbeat: float
    #: The path of the jobs, by the prefix that the server has put in front of the app.
    jobs_urls: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def max_values(self) -> int:
        """How many values (items, members) a body may have: each takes some 50 to 90 bytes of memory, whatever it takes
        in the body, and all of them are to take no more than twice what the body may."""
        return max(1000, self.max_body // 48)


def mount_of_request() -> Mount:
    """The mount that the current request came to."""
    mount: Mount = current_app.extensions[EXTENSION][request.blueprint]
    return mount


__all__ = ["EXTENSION", "Mount", "mount_of_request"]
