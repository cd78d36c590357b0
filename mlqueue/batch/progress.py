"""A progress bar of rich where one of tqdm is expected.

``progress_iter_func=tqdm.tqdm`` needs nothing from here; for rich give :func:`rich_progress`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from mlqueue.errors import MissingDependency

__all__ = ["rich_progress"]


def rich_progress(
    iterable: Iterable[Any], total: int | None = None, leave: bool = False, desc: str = "batches", console: Any = None
) -> Iterator[Any]:
    """Go through `iterable` with a progress bar of rich; called as tqdm is.

    `total`: the number of items, None when it is not known. `leave`: keep the bar when it is done. `console`: the
    ``rich.console.Console`` to draw on.
    """
    try:
        from rich.progress import Progress
    except ImportError as error:
        raise MissingDependency("rich_progress needs rich: pip install rich") from error
    with Progress(transient=not leave, console=console) as progress:
        task = progress.add_task(desc, total=total)
        for item in iterable:
            yield item
            progress.advance(task)
