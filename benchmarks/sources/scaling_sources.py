"""What the workers import that prepare batches for `scaling.py`."""

from __future__ import annotations

import numpy as np

import mlqueue
from mlqueue.batch.data_source import ArrayDataSource

mlq = mlqueue.MLQ("benchmark-scaling")


@mlq.data_source("images")
def images(n: int) -> ArrayDataSource:
    """Random pixels, as images of 224 x 224 in 8 bits have them."""
    return ArrayDataSource([np.random.default_rng(0).integers(0, 256, (n, 3, 224, 224), np.uint8)])
