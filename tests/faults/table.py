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


def document(found: Sequence[tuple[int, str, Row]]) -> None:
    """Write docs/faults.md: how, when and with what the faults were injected, and what came of them."""
    seeds = sorted({seed for seed, _, _ in found})
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numpy {numpy.__version__}"
    rows = [row for _, _, row in found]
    bad = [(seed, name, row[3]) for seed, name, row in found if row[3] in BAD]
    again = "".join(
        f"- {result}: `python -m tests.faults --seed {seed} --again {name}`\n" for seed, name, result in bad
    )
    write_text(
        DOCUMENT,
        _TEXT.format(
            count=len(found),
            seeds=", ".join(map(str, seeds)),
            when=f"{time.strftime('%Y-%m-%d')}, {versions}, {platform.system()}, CPU, one thread",
            bad=f"Ended badly:\n\n{again}" if bad else "None ended badly.\n",
            table=table(rows),
        ),
    )


_TEXT = """# Faults

What becomes of a run that is killed, of a disk that is full, of a file that is damaged: {count} faults, injected into
every command of every method by `python -m tests.faults`, seeds {seeds} ({when}). `make test` injects a few of them,
`make test-all` some hundred.

{bad}
After each fault the command is given again, and every file is compared with that of a run that nobody disturbed: byte
for byte, `.pt` by what it holds. Data and networks are the smallest that have every kind of file; pages (`report.html`)
are not drawn.

| kind | what happens |
|---|---|
| kill | SIGKILL, three times in one run: after a random time, or just before or after some file gets its name |
| stop | SIGINT or SIGTERM, as often and in the same way |
| disk | from a random moment on no file may grow beyond a random size; then there is room again |
| tmpfs | a disk of its own with a few KiB left; then there is room again |
| rights | some file or folder may not be written, or not be read (the command runs as nobody); then it may |
| truncate | some file is cut at a random place, before the command, after a kill at a random file, or when it is done |
| zero | in the same way, a stretch of it is zeroed |
| flip | in the same way, one bit or four of it are flipped; half of the time, as with zero, its date stays as it was |

| what came of it | |
|---|---|
| survived | the command, where need be given again, ended at the same files |
| refused | one line named the file; with what the line advises, or the good file back, it ended at the same files |
| harmless | the same files: what was damaged or forbidden was not read again |
| data | a bit of the user's own images, captions or YAML was another when the command began, and so was the result |
| skipped | this machine does not allow the fault |
| unnamed | refused, but by a line that does not name the file |
| wrong | exit code 0 and other tensors or files |
| traceback | |
| lost | a good file was lost, or the advice did not lead to the result |
| hang | more than two minutes |

A flipped bit in what the user brings is data that nobody can tell from what was meant. Once a run has begun,
`inputs.json` pins its data, and such a change is refused.

{table}
"""
