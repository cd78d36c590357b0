"""Async actors: Dramatiq's event loop, in a thread that does not keep the host's process alive."""

from __future__ import annotations

import threading

import dramatiq.middleware
from dramatiq import Broker, Worker
from dramatiq.asyncio import EventLoopThread, get_event_loop_thread, set_event_loop_thread

_lock = threading.Lock()
_users = 0


class AsyncIO(dramatiq.middleware.AsyncIO):
    """Dramatiq's middleware, but that a program which embeds a Worker and fails does not hang at its end, and that the
    workers of several brokers in a process share the one event loop that there is."""

    def before_worker_boot(self, broker: Broker, worker: Worker) -> None:
        """Starts the event loop, unless there is one."""
        global _users
        with _lock:
            _users += 1
            present = get_event_loop_thread()
            if present is not None and present.is_alive():
                return
            thread = EventLoopThread(self.logger)
            thread.daemon = True
            thread.start(timeout=10)
            set_event_loop_thread(thread)

    def after_worker_shutdown(self, broker: Broker, worker: Worker) -> None:
        """Stops the event loop when no other worker uses it."""
        global _users
        with _lock:
            _users -= 1
            thread = get_event_loop_thread()
            if _users or thread is None:
                return
            set_event_loop_thread(None)
            thread.stop()
