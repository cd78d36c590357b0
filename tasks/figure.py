"""The picture that a training ends with: its learning curve and the confusion matrix."""

from __future__ import annotations

import io
import itertools
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from .data import CLASSES


def draw(history: list[dict[str, Any]], labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> bytes:
    """A PNG of 1,100 x 480 pixels. `history` has a dict with ``epoch``, ``loss`` and ``accuracy`` for each epoch."""
    # A Figure of its own rather than pyplot, whose figures are shared by all threads of the worker.
    figure = Figure(figsize=(11, 4.8), dpi=100, layout="constrained")
    curve, matrix = figure.subplots(1, 2)
    _draw_curve(curve, history)
    _draw_matrix(matrix, labels, predicted)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _draw_curve(axes: Any, history: list[dict[str, Any]]) -> None:
    epochs = [entry["epoch"] for entry in history]
    axes.plot(epochs, [entry["accuracy"] for entry in history], color="tab:blue", label="accuracy on the test images")
    axes.set(xlabel="epoch", ylabel="accuracy", title="Learning curve")
    loss = axes.twinx()
    loss.plot(epochs, [entry["loss"] for entry in history], color="tab:orange", label="loss on the training images")
    loss.set(ylabel="loss", yscale="log")
    starts = [now["epoch"] for before, now in itertools.pairwise(history) if now["attempt"] != before["attempt"]]
    for number, epoch in enumerate(starts):
        axes.axvline(epoch - 0.5, color="gray", linestyle=":", label=None if number else "resumed from the checkpoint")
    lines = [*axes.get_lines(), *loss.get_lines()]
    shown = [line for line in lines if not line.get_label().startswith("_")]
    axes.legend(shown, [line.get_label() for line in shown], loc="center right")


def _draw_matrix(axes: Any, labels: NDArray[np.int64], predicted: NDArray[np.int64]) -> None:
    counts = np.zeros((CLASSES, CLASSES), dtype=int)
    np.add.at(counts, (labels, predicted), 1)
    axes.imshow(counts, cmap="Blues")
    axes.set(xlabel="predicted", ylabel="digit", title="Confusion matrix", xticks=range(CLASSES), yticks=range(CLASSES))
    for digit, guess in zip(*np.nonzero(counts), strict=True):
        shade = "white" if counts[digit, guess] > counts.max() / 2 else "black"
        axes.text(guess, digit, counts[digit, guess], ha="center", va="center", color=shade)
