"""What the workers import that run the searches of `grid_search.py`."""

from __future__ import annotations

import mlqueue

mlq = mlqueue.MLQ("benchmark-search")
