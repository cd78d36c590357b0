"""A worker's program with nothing of its own: it runs what is posted to the workers of ``MLQUEUE_NAMESPACE``.

``mlqueue consumer`` runs it where no modules are named and a signing key is set; so does
``mlqueue worker mlqueue.listening``.
"""

from __future__ import annotations

from .app import MLQ

__all__ = ["mlq"]

mlq = MLQ()
