"""What the workers import that prepare batches for `batches.py`: each of its tasks as a source with a name."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mlqueue
from mlqueue.batch.data_source import ArrayDataSource, FunctionDataSource

if "batches" not in sys.modules:
    # By its path: beside it lies a queue.py, which must not be found before Python's own.
    spec = importlib.util.spec_from_file_location("batches", Path(__file__).resolve().parents[1] / "batches.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules["batches"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["batches"])
batches: Any = sys.modules["batches"]

mlq = mlqueue.MLQ("benchmark-batches")


@mlq.data_source("task")
def task_source(name: str, folder: str, count: int) -> Any:
    return batches.TASKS[name](batches.make_images(Path(folder), count) if "JPEG" in name else []).source()


def blank_pictures(rows: Any, empty: Any = np.empty) -> tuple[np.ndarray, ...]:
    return (empty((len(rows), 3, batches.SIDE, batches.SIDE), np.uint8),)


@mlq.data_source("blank")
def blank_source(length: int) -> Any:
    """Pictures that nobody paints: what they cost is to move them."""
    return ArrayDataSource([np.arange(length)]).map(blank_pictures)


@mlq.data_source("empty")
def empty_source(length: int) -> Any:
    return FunctionDataSource(lambda indices: (np.zeros(1),), length)
