"""Measure, and write the table of docs/benchmarks.md: `make bench`.

    python -m tests.benchmarks                      every group, some minutes
    python -m tests.benchmarks --only recall outer  these; the document keeps the rows of the others
    python -m tests.benchmarks --quick              tiny sizes, to see that all of it runs; printed, not written

A run replaces the rows that it measured in the section of its device, and nothing else of the document. A benchmark
that fails ends the run, and what was measured before it is kept.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.benchmarks.table import NOT_RUN, TITLES, Row, Scale, environment, merged, show
from utils.files import write_text

# Group → the module whose `rows(scale)` measures it, all of them in `make bench`.
GROUPS = ("hypergradient", "compiled", "outer", "loading", "reading", "recall", "experts", "processes")
DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"
ON_GPU = (  # what waits for a GPU, while none was at hand
    ("hypergradient", "ConvNetD3, NFNet-l0 and ViT-tiny at 224 px, projection heads: time of exact to unroll", 1.25, 0),
    ("compiled", "MTT, ConvNetD3, 10 images, 50 steps: time of --compile to eager", 0.33, 0),
    ("outer", "VLDD, NFNet-l0, 224 px, 8 steps of 20 pairs: share of the matmul rate, %", 0, 35),
    ("experts", "throughput of experts to that of synthetic tensors in memory", 0, 0.9),
    ("processes", "experts of two processes to one, throughput", 0, 1.7),
    ("recall", "recall@K at COCO size to the similarity product alone, time", 1.5, 0),
)


def waiting() -> list[Row]:
    """The rows of a GPU, not run."""
    limits = [f"at most {most:g}" if most else f"at least {least:g}" for _, _, most, least in ON_GPU]
    note = "no GPU at hand"
    return [Row(row[0], row[1], NOT_RUN, "", limit, None, note) for row, limit in zip(ON_GPU, limits, strict=True)]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=GROUPS, metavar="GROUP", help=", ".join(GROUPS))
    parser.add_argument("--device", choices=tuple(TITLES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: printed, and written only where --out says")
    parser.add_argument("--out", type=Path, help="the document (docs/benchmarks.md)")
    args = parser.parse_args(words)
    path, scale, where = args.out or DOCUMENT, Scale(args.device, args.quick), environment(args.device)
    print(where)
    for group in args.only:
        begin = time.perf_counter()
        print(f"\n== {group}", flush=True)
        rows = []
        for row in importlib.import_module(f"tests.benchmarks.{group}").rows(scale):
            show([row])
            rows.append(row)
        print(f"({time.perf_counter() - begin:.0f} s)", flush=True)
        if args.out or not args.quick:
            record(path, args.device, rows, where)


def record(path: Path, device: str, rows: Sequence[Row], where: str) -> None:
    """Put rows into the document; where it has no figures of a GPU, what waits for one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = merged(path.read_text(encoding="utf-8") if path.exists() else "# Benchmarks\n", device, rows, where)
    if f"\n## {TITLES['cuda']}\n" not in text:
        text = merged(text, "cuda", waiting(), "")
    write_text(path, text)


if __name__ == "__main__":
    main()
