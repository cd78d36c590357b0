"""What our own worker processes run: `mlqueue worker tasks`. Written as a user writes theirs.

Importing this package declares every actor; a worker imports it, and so may a program that submits jobs.
"""

from __future__ import annotations

from .app import mlq
from .inference import classify_digit, predict_digits
from .training import train_digits

__all__ = ["classify_digit", "mlq", "predict_digits", "train_digits"]
