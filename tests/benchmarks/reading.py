"""What an outer step reads of the experts: bytes and time, from a store of ours and from the published files.

    python -m tests.benchmarks.reading --store_dtype bfloat16

Two layouts with their published numbers, of made-up weights: MTT's files of ten experts of 51 snapshots, and VLDD's of
one expert of 11. The published programs load a file whole, take one segment of each expert in it, then load the next
one (MTT: after ten steps, VLDD: after one); a step needs two snapshots.

Bytes are those that came from the disk, the files having been dropped from the system's cache before each step
(`read_bytes` of /proc/self/io); where that cannot be told, those of the files and tensors asked for. What opening a
folder reads, once a run, is not counted. Published files that are read in place are mapped, of which a system may read
far more than is asked for (read-ahead). Time is with all files in the cache.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from methods.core.published import PublishedTrajectories, export_published, published_name
from methods.core.store import DTYPES, TrajectoryStore
from methods.core.trajectories import Trajectories, draw_place
from tests.benchmarks.table import Row, Scale, environment, judged, show
from tests.benchmarks.timing import in_turns


@dataclass(frozen=True)
class Layout:
    """weights: of each group; a file has `together` experts, of which `files` files are made."""

    name: str
    weights: dict[str, int]
    epochs: int
    together: int
    files: int
    max_start_epoch: int
    expert_epochs: int


def layouts(scale: Scale) -> list[Layout]:
    """The published numbers of snapshots and experts; fewer weights where they would take long to make."""
    conv, towers = scale.of((500, 2_000), (40_000, 1_500_000), (320_010, 3_277_000))
    return [
        Layout("MTT, 10 experts of 51 snapshots a file", {"net": conv}, 50, 10, 2, 20, 2),
        Layout("VLDD, 1 expert of 11 snapshots a file", {"img": 3 * towers // 4, "txt": towers // 4}, 10, 1, 3, 2, 1),
    ]


def build(folder: Path, layout: Layout, dtype: str) -> tuple[TrajectoryStore, Path]:
    """A store, and the same in the published layout."""
    shapes = {group: [("w", [count])] for group, count in layout.weights.items()}
    store, rng = TrajectoryStore.create(folder / "ours", shapes, dtype, {}), torch.Generator().manual_seed(0)
    for expert in range(layout.files * layout.together):
        for epoch in range(layout.epochs + 1):
            store.add(expert, epoch, {g: torch.randn(n, generator=rng) for g, n in layout.weights.items()}, 0, {})
        store.finish(expert)
    export_published(store, folder / "theirs", layout.together)
    return store, folder / "theirs"


def as_published(folder: Path, layout: Layout) -> Iterator[None]:
    """Steps of the published programs: each loads the next file where the last one's experts are used up."""
    order = random.Random(0)
    while True:
        for number in order.sample(range(layout.files), layout.files):
            groups = [torch.load(folder / published_name(group, number)) for group in layout.weights]
            for expert in order.sample(range(layout.together), layout.together):
                start = order.randrange(layout.max_start_epoch)
                for experts in groups:
                    for epoch in (start, start + layout.expert_epochs):
                        torch.cat([weight.reshape(-1) for weight in experts[expert][epoch]])
                yield


def ours(store: Trajectories, layout: Layout) -> Iterator[None]:
    """Steps of this toolkit."""
    rng = torch.Generator().manual_seed(0)
    while True:
        draw_place(store, rng, layout.max_start_epoch, layout.expert_epochs).read()
        yield


def bytes_a_step(steps: Iterator[None], count: int, root: Path) -> float | None:
    """Bytes from the disk a step; None where the system does not say."""
    files, total = [path for path in root.rglob("*") if path.is_file()], 0
    os.sync()  # what is not yet written cannot be dropped
    for _ in range(count):
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = _from_disk()
        next(steps)
        total += _from_disk() - before
    return total / count if total else None


def _from_disk() -> int:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def measured(layout: Layout, dtype: str, device: str = "cpu") -> dict[str, tuple[float, float, str]]:
    """Way → bytes a step, seconds a step and how the bytes were counted."""
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as name:  # a /tmp in memory would read nothing
        store, theirs = build(Path(name), layout, dtype)
        mapped = PublishedTrajectories(theirs, tuple(layout.weights))
        ways: dict[str, Callable[[], Iterator[None]]] = {
            "as published": lambda: as_published(theirs, layout),
            "published files, here": lambda: ours(mapped, layout),
            f"a store of {dtype}": lambda: ours(store, layout),
        }
        count = layout.together * layout.files  # all files once, for the published programs
        found = {way: bytes_a_step(begin(), count, Path(name)) for way, begin in ways.items()}
        how = "from the disk" if None not in found.values() else "asked for"
        if how == "asked for":
            whole = sum(path.stat().st_size for path in theirs.iterdir()) / count
            pair = 2 * sum(layout.weights.values())
            found = dict(zip(ways, (whole, 4 * pair, pair * DTYPES[dtype].itemsize), strict=True))

        def run(begin: Callable[[], Iterator[None]]) -> Callable[[], None]:
            return lambda: [None for _ in zip(range(count), begin(), strict=False)] and None

        times = in_turns({way: run(begin) for way, begin in ways.items()}, 3, device, wall=True)
        return {way: (found[way], times[way].seconds / count, how) for way in ways}


def rows(scale: Scale) -> list[Row]:
    table = []
    for layout in layouts(scale):
        found = measured(layout, "float32")
        (theirs, slow, how), (mapped, _, _), (here, fast, _) = found.values()
        sizes = f"{theirs / 1e6:.2f} MB to {here / 1e6:.2f} MB {how} (published files here: {mapped / 1e6:.2f} MB)"
        times = f"{1e3 * slow:.1f} ms to {1e3 * fast:.1f} ms with the files in memory"
        what = f"{layout.name}: bytes a step as published to those of the store"
        table.append(judged("reading", what, theirs / here, "x", at_least=5, note=f"{sizes}; {times}", form=".1f"))
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store_dtype", default="float32", choices=tuple(DTYPES))
    args = parser.parse_args()
    print(environment("cpu"))
    if args.store_dtype == "float32":
        show(rows(Scale()))
    else:
        for layout in layouts(Scale()):
            for way, (size, time, how) in measured(layout, args.store_dtype).items():
                print(f"{layout.name}, {way}: {size / 1e6:.2f} MB a step {how}, {1e3 * time:.1f} ms")
