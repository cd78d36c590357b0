"""Draws what `benchmarks/queue.py --json FILE` has measured: `make bench-plots`.

python benchmarks/plots.py FILE.json docs/images
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

#: Figure, what it shows, whether more is better.
PANELS = [
    ("drain", "drain, 2 processes x 8 threads\n(jobs/s)", True),
    ("drain_t1", "drain, 2 processes x 1 thread\n(jobs/s)", True),
    ("submit", "submit\n(jobs/s)", True),
    ("latency_p50", "submit to result, median\n(ms)", False),
    ("after_idle", "after 2 s of idling, median\n(ms)", False),
    ("bytes_int", "memory of a waiting job\n(bytes)", False),
]


def draw(found: dict[str, Any], folder: Path) -> list[Path]:
    """Writes the plots into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), layout="constrained")
    for axis, (key, title, more) in zip(axes.flat, PANELS, strict=True):
        rows = [(found["titles"][name], medians[key]) for name, medians in found["medians"].items() if key in medians]
        names, values = [name for name, _ in rows], [value for _, value in rows]
        bars = axis.barh(names, values, color=["#0b6e99" if name == "mlqueue" else "#b8c4cc" for name in names])
        axis.bar_label(bars, labels=[f"{value:,.0f}" if value >= 20 else f"{value:.2f}" for value in values], padding=3)
        axis.set_title(f"{title}, {'more' if more else 'less'} is better", fontsize=10)
        axis.margins(x=0.22)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    path = folder / "queue.png"
    figure.savefig(path, dpi=110)
    return [path]


if __name__ == "__main__":
    for path in draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])):
        print(path)
