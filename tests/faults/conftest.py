"""Fixtures of the fault tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness import Fleet, MakeFleet

from mlqueue import Settings


@pytest.fixture
def fleet(tmp_path: Path, server: Settings) -> Iterator[MakeFleet]:
    """Makes fleets on the server of the session, or on that of `store`, which are ended with the test."""
    made: list[Fleet] = []

    def make(*, store: Settings = server, **options: Any) -> Fleet:
        made.append(Fleet(tmp_path / f"site-{len(made)}", store, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()
