"""What came of faults, counted, and docs/faults.md."""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy
import torch

from tests.faults.campaign import BAD, FAULTS, GOOD
from utils.files import write_text

DOCUMENT = Path(__file__).parents[2] / "docs" / "faults.md"
Row = tuple[str, str, str, str]  # method, verb, kind, result


def table(rows: Iterable[Row]) -> str:
    """Markdown: a line for each method, verb and kind, and their sum."""
    counts = Counter(rows)
    lines = ["| method | verb | kind | injected | " + " | ".join((*GOOD, *BAD)) + " |"]
    lines.append("|---|---|---|" + "--:|" * (1 + len(GOOD) + len(BAD)))
    keys = sorted({row[:3] for row in counts}, key=lambda key: (key[0], key[1], FAULTS.index(key[2])))
    for key in keys:
        numbers = [counts[(*key, result)] for result in (*GOOD, *BAD)]
        lines.append(f"| {' | '.join(key)} | {sum(numbers)} | {' | '.join(str(number or '') for number in numbers)} |")
    totals = Counter(row[3] for row in counts.elements())
    sums = " | ".join(f"**{totals[result]}**" for result in (*GOOD, *BAD))
    return "\n".join([*lines, f"| **all** | | | **{sum(totals.values())}** | {sums} |"])


def collect(paths: Sequence[Path]) -> list[tuple[int, str, Row]]:
    """Seed, name and row of every fault in files that `--rows` wrote; a fault that was done again counts once."""
    found = {}
    for path in paths:
        for line in path.read_text(encoding="utf-8").splitlines():
            seed, name, *row = line.split("\t")[:6]
            found[seed, name] = (int(seed), name, tuple(row))
    return list(found.values())
