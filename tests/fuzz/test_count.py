"""How many cases there are."""

from __future__ import annotations

import importlib
from pathlib import Path

from tests.fuzz import cases


def test_there_are_cases_enough() -> None:
    """The long forms together try at least 24,750 cases; each of them asserts its own count."""
    for path in Path(__file__).parent.glob("test_*.py"):
        importlib.import_module(f"tests.fuzz.{path.stem}")
    print(f"{sum(cases.DECLARED.values()):,} cases of {len(cases.DECLARED)} properties")
    assert sum(cases.DECLARED.values()) >= 24_750
