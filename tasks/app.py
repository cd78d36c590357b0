"""The app that the tasks belong to: one namespace of jobs, in a module of its own so that every actor can import it."""

from __future__ import annotations

import mlqueue

mlq = mlqueue.MLQ("digits")
