"""What differs for the tests of mini-batches."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def nothing_left_behind() -> None:
    """Here tests share worker pools over a module, which are there between tests. What pools leave behind when they
    are closed or dropped has tests of its own (`TestEnd` in test_work_pool.py)."""
