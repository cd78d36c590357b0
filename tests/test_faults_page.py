"""The table of faults names tests that there are, and every fault test."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "explanation" / "faults.md"


def defined(files: str) -> set[str]:
    return {name for path in TESTS.glob(files) for name in re.findall(r"^ *def (test_\w+)\(", path.read_text(), re.M)}


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert named - defined("**/test_*.py") == set()


def test_every_fault_test_is_on_the_page() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE.read_text()))
    assert defined("faults/test_*.py") - named == set()
