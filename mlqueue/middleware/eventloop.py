"""Async actors: Dramatiq's event loop, in a thread that does not keep the host's process alive."""

from __future__ import annotations

import dramatiq.middleware
from dramatiq import Broker, Worker
from dramatiq.asyncio import EventLoopThread, set_event_loop_thread


class AsyncIO(dramatiq.middleware.AsyncIO):
    """Dramatiq's middleware, but that a program which embeds a Worker and fails does not hang at its end."""

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Starts the event loop."""
        thread = EventLoopThread(self.logger)
        thread.daemon = True
        thread.start(timeout=10)
        set_event_loop_thread(thread)
