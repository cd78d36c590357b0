"""Where MLQ had its class: ``from mlqueue.queue import MLQ``. It is `mlqueue.MLQ`."""

from __future__ import annotations

from .app import MLQ

__all__ = ["MLQ"]
