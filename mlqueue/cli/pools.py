"""How pools that have batches prepared are shown: a line for each trainer, that says who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

__all__ = ["POOL_HEAD", "pool_rows"]

#: The columns. Rates and shares are those of the last seconds; "again" counts the batches that were given out again.
POOL_HEAD: Final = ("queue", "trainer", "waits", "workers", "idle", "batches/s", "MB/s", "ready", "again", "by")


def pool_rows(pools: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each pool of ``Store.pools``."""
    for pool in pools.values():
        lately = pool["lately"]
        seconds = max(1e-3, lately["seconds"])
        yield (
            pool["queue"],
            f"{pool['host']}/{pool['pid']}",
            f"{lately['trainer_waited'] / seconds:.0%}",
            str(pool["workers"]),
            f"{lately['workers_waited'] / seconds / max(1, pool['workers']):.0%}",
            f"{lately['given'] / seconds:.1f}",
            f"{lately['bytes'] / seconds / 1e6:,.0f}",
            f"{pool['ready']} of {pool['ready'] + pool['outstanding']}",
            str(pool["retries"]),
            pool["transport"],
        )
