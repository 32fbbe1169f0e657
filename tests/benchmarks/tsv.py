"""How fast records of a TSV file are read at random, beside a reader that parses the index again for each.

    python -m tests.benchmarks.tsv --rows 200000

Makes a file of 768-wide features (4,100 bytes a record) in a temporary folder; it is warm in memory. The slow reader
does what the published one does for each sample: it reads all of the index as text, goes to the record and reads a
line; it is given a few records only.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from data.feature_files import Features
from data.payloads import read_vector, vector_payload
from data.tsv import TsvFile, TsvWriter

WIDTH = 768


def pack(path: Path, rows: int) -> float:
    """Seconds that packing takes."""
    vectors = np.random.default_rng(0).standard_normal((1000, WIDTH)).astype(np.float32)
    payloads = [vector_payload(vector) for vector in vectors]
    start = time.perf_counter()
    with TsvWriter(path) as writer:
        for row in range(rows):
            writer.add(f"{row:09d}", payloads[row % len(payloads)])
    return time.perf_counter() - start


def read_index_again(path: Path, row: int) -> bytes:
    """One record by a fresh reader: slow and obvious."""
    with open(path.with_suffix(".lineidx"), encoding="utf-8") as file:
        offsets = [int(line) for line in file]
    with open(path, encoding="utf-8") as file:
        file.seek(offsets[row])
        return file.readline().rstrip("\n").split("\t")[1].encode()


def per_row(read: Callable[[Any], object], rows: Sequence[Any]) -> float:
    """Seconds a call, best of three rounds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for row in rows:
            read(row)
        times.append((time.perf_counter() - start) / len(rows))
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--batch", type=int, default=640)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image_00.feat.tsv"
        packing = pack(path, args.rows)
        start = time.perf_counter()
        file = TsvFile(path)
        opening = time.perf_counter() - start
        start = time.perf_counter()
        file.check()
        checking = time.perf_counter() - start
        path.with_suffix(".lineidx").rename(path.with_suffix(".kept"))
        start = time.perf_counter()
        TsvFile(path)
        scanning = time.perf_counter() - start
        path.with_suffix(".kept").rename(path.with_suffix(".lineidx"))

        rows = random.Random(0).sample(range(args.rows), min(20_000, args.rows))
        assert all(file.payload(row) == read_index_again(path, row) for row in rows[:3])
        features = Features([path])
        batches = torch.tensor(rows[: args.batch * 10]).split(args.batch)
        batched = per_row(features.rows, batches) * len(batches) / min(len(rows), args.batch * 10)
        results = [
            ("index read again for each record", per_row(lambda row: read_index_again(path, row), rows[:5])),
            ("index kept: payload", per_row(file.payload, rows)),
            ("index kept: key", per_row(file.key, rows)),
            ("payload and its numbers", per_row(lambda row: read_vector(file.payload(row), ""), rows)),
            (f"Features.rows, batches of {args.batch}", batched),
        ]
        size = path.stat().st_size
    print(f"{args.rows:,} records of {WIDTH} numbers, {size / 1e9:.2f} GB")
    print(f"packed in {packing:.2f} s, opened in {opening * 1e3:.1f} ms, without an index in {scanning:.2f} s", end="")
    print(f", checked whole in {checking:.2f} s ({size / checking / 1e9:.1f} GB/s)")
    print(f"{'':40}{'µs a record':>14}{'ratio':>10}")
    for what, seconds in results:
        print(f"{what:40}{seconds * 1e6:14,.1f}{results[0][1] / seconds:10,.0f}")


if __name__ == "__main__":
    main()
