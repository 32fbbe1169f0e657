"""The table of `make bench`: its rows, and docs/benchmarks.md, where each run replaces the rows that it measured anew.

The document has a section a device (`## CPU`, `## GPU`): on what it was measured, then one table. What is written above
the first of them, or below under another heading, is kept by hand and left as it is.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

COLUMNS = ("group", "what", "figure", "unit", "target", "met", "note")
TITLES = {"cpu": "CPU", "cuda": "GPU"}
LIBRARIES = ("torch", "torchvision", "timm", "transformers")
NOT_RUN = "not run"
_WORDS = {True: "yes", False: "**missed**", None: ""}


@dataclass(frozen=True)
class Row:
    """One line of the table.

    group    the benchmark, as `--only` takes it
    target   what the figure should be (`at most 1.25`), and whether it is (`met`; None where nothing is asked)
    note     one line, with the share of a profile that explains a miss
    """

    group: str
    what: str
    figure: str
    unit: str = ""
    target: str = ""
    met: bool | None = None
    note: str = ""

    def explained(self, why: Callable[[], str]) -> Row:
        """The row with one more note where it is a miss."""
        return self if self.met is not False else replace(self, note="; ".join(filter(None, (self.note, why()))))


@dataclass(frozen=True)
class Scale:
    """How large a benchmark is measured: `quick` only sees that it runs."""

    device: str = "cpu"
    quick: bool = False

    def of(self, quick: Any, cpu: Any, cuda: Any = None) -> Any:
        """The value of this scale; that of a CPU where a GPU has none of its own."""
        if self.quick:
            return quick
        return cuda if self.device == "cuda" and cuda is not None else cpu


def judged(
    group: str,
    what: str,
    value: float,
    unit: str = "",
    at_most: float | None = None,
    at_least: float | None = None,
    note: str = "",
    form: str = ".2f",
) -> Row:
    """A row of a number and the limit that it should keep, judged as it is shown."""
    figure = format(value, form)
    shown = float(figure.replace(",", ""))
    if at_most is not None:
        return Row(group, what, figure, unit, f"at most {at_most:g}", shown <= at_most, note)
    if at_least is not None:
        return Row(group, what, figure, unit, f"at least {at_least:g}", shown >= at_least, note)
    return Row(group, what, figure, unit, note=note)


def markdown(rows: Sequence[Row]) -> str:
    """The table of these rows, header and all; misses are bold."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|--:|---|---|---|---|"]
    for row in rows:
        *texts, met, note = astuple(row)
        cells = [*texts, _WORDS[met], note]
        lines.append(f"| {' | '.join(' '.join(str(cell).replace('|', '/').split()) for cell in cells)} |")
    return "\n".join(lines)


def show(rows: Iterable[Row]) -> None:
    """Print rows as they come."""
    for row in rows:
        asked = f" ({row.target}{': missed' if row.met is False else ''})" if row.target else ""
        print(f"{row.what}: {row.figure} {row.unit}{asked}{'  ' + row.note if row.note else ''}", flush=True)


def parse(text: str) -> list[Row]:
    """The rows of a table that `markdown` wrote."""
    met = {word: value for value, word in _WORDS.items()}
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    return [Row(*row[:5], met[row[5]], row[6]) for row in cells if len(row) == len(COLUMNS) and row != list(COLUMNS)]


def environment(device: str) -> str:
    """One line: hardware, versions and the day."""
    parts = [_processor()]
    if device == "cuda":
        parts.insert(0, torch.cuda.get_device_name())
    parts.append(f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()} of memory")
    parts.append(f"Python {platform.python_version()}")
    parts += [f"{name} {_version(name)}" for name in LIBRARIES]
    return ", ".join([*parts, date.today().isoformat()])


def merged(document: str, device: str, rows: Sequence[Row], where: str) -> str:
    """The document with these rows in the section of this device, in place of those of the same groups.

    where   the `environment` that they were measured in, under which each group is listed (empty: they were not)
    """
    before, section, after = _cut(document, TITLES[device])
    known, measured = {line: groups for line, groups in _environments(section)}, {row.group for row in rows}
    known = {line: [group for group in groups if group not in measured] for line, groups in known.items()}
    if where:
        known[where] = sorted({*known.get(where, ()), *measured})
    kept = [row for row in parse(section) if row.group not in measured]
    together = sorted([*kept, *rows], key=lambda row: row.group)  # stable: the order within a group is its own
    heads = [f"- {', '.join(groups)}: {line}" for line, groups in known.items() if groups]
    text = "\n".join([f"## {TITLES[device]}", "", *heads, *[""] * bool(heads), markdown(together)])
    return "\n\n".join(part.strip("\n") for part in (before, text, after) if part.strip()) + "\n"


def _cut(document: str, title: str) -> tuple[str, str, str]:
    """What comes before the section of this title, the section, and what follows; a new one follows the last device."""
    starts = [match.start() for match in re.finditer(r"^## ", document, re.MULTILINE)] + [len(document)]
    sections = {document[a:].splitlines()[0][3:].strip(): (a, b) for a, b in itertools.pairwise(starts)}
    if title in sections:
        first, last = sections[title]
    else:
        ends = [sections[name][1] for name in TITLES.values() if name in sections]
        first = last = max(ends, default=starts[0])
    return document[:first], document[first:last], document[last:]


def _environments(section: str) -> list[tuple[str, list[str]]]:
    found = re.findall(r"^- ([^:]+): (.*)$", section, re.MULTILINE)
    return [(line, groups.split(", ")) for groups, line in found]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(": ", 1)[1] for line in lines if line.startswith("model name") and ": " in line)
    return next(named, platform.processor() or platform.machine())


def _memory() -> str:
    info = Path("/proc/meminfo")
    if not info.exists():
        return "unknown size"
    return f"{1024 * int(info.read_text().split()[1]) / 2**30:.0f} GiB"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
