"""What one outer step of PoDD costs at the published CIFAR-10 settings: memory, time, and where the time goes.

    python -m tests.benchmarks.poster
    python -m tests.benchmarks.poster --full      # on a CPU: some ten minutes more

Settings are the defaults of `distill.py --method podd`, which are the published command's: ConvNet of width 128, 96
patches of 32 px, a window of 60 after 0 to 140 steps, 5,000 real images. On a GPU everything is measured as it is; on a
CPU windows and batches are smaller, and lines marked "extrapolated" are straight lines through what was measured.

Peak memory is that of a process of its own: on a CPU (Linux) what was resident at most, less what was before the step;
on a GPU what its allocator gave out. Predictions are M (2.82 MiB b + 24 bytes P) for M unrolled steps on b patches with
P weights, and 12 bytes P a step beside a single graph for their replay. Times on a CPU are seconds of computing, not of
waiting for a core.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from methods.core.stack import Stack
from methods.podd import Distill, PosterStep, RealBatches
from methods.poster import start_poster
from methods.poster_layout import plan
from methods.poster_window import Windows
from networks import build_network
from tests.benchmarks.table import environment
from tests.benchmarks.timing import seconds
from utils.rng import generator

MIB = 2**20
PATCH_GRAPH = 2.82 * MIB  # of a step that is differentiated, a patch of 32 px
REAL_GRAPH = 1.5 * MIB  # of the loss, a real image of 32 px
MARGIN = 4 * 2**30  # bytes that are left free
FEW = 10  # real images where the inner loop is measured and their own graph should not count
PUBLISHED = 3.45  # seconds an outer step, on a V100
MEAN_START = 70  # steps before the window, in the mean


class Outer:
    """One outer step at the published settings, on real images that are noise, in an epoch of ten steps.

    real    images a step
    chunk   those whose graph is in memory at once
    model   another network
    """

    def __init__(self, mode: str, real: int, chunk: int, device: str, model: str = "") -> None:
        cfg = Distill()
        cfg = replace(cfg, outer=replace(cfg.outer, mode=mode, batch_size=real, real_chunk=chunk))
        shape = SimpleNamespace(channels=3, size=32, device=torch.device(device))
        layout = plan(cfg.grid, shape.size, torch.arange(10).view(2, 5))
        self.poster = start_poster(shape, layout, cfg.poster, generator(0, "init"))
        self.stack = Stack(build_network(model or cfg.net.name, shape.size, 10).to(device))
        self.step, self.device = PosterStep(self.stack, self.poster, cfg), device
        self.optimizer = cfg.outer.plan(10, Windows(cfg.window, 0, 10, {})).optimizer(self.poster.param_groups())
        self.real = RealBatches({"train": _Noise(10 * real, device)}, cfg.outer, 0, 10)

    def __call__(self, before: int, length: int, batch: tuple[Tensor, Tensor]) -> None:
        """Fill the poster's gradient; always the same chance."""
        self.poster.poster.grad = None
        rngs: dict[str, torch.Generator] = {}
        run = SimpleNamespace(rng=lambda name: rngs.setdefault(name, generator(0, name)))
        self.step((before, length), *batch, run)

    @property
    def graph(self) -> float:
        """Bytes of a differentiated step's graph, as predicted."""
        return PATCH_GRAPH * self.poster.batch_size + 24 * self.stack.flat.size

    def real_loss(self, batch: tuple[Tensor, Tensor]) -> Callable[[], object]:
        """The loss of fresh weights on real images, and its gradient, when called."""
        weights = self.stack.draw([0])[0].requires_grad_()
        return lambda: torch.autograd.grad(self.step.real_loss(weights, *batch), weights)

    def double(self) -> Outer:
        """The same in float64, from the same weights."""
        single = self.stack
        self.stack = Stack(copy.deepcopy(single.net).double())
        self.stack.draw = lambda seeds: single.draw(seeds).double()
        self.poster.poster = self.poster.poster.detach().double().requires_grad_()
        self.poster._labels, self.real.train.pixels = self.poster._labels.double(), self.real.train.pixels.double()
        self.step = PosterStep(self.stack, self.poster, self.step.cfg)
        return self


class _Noise:
    """Real images, as far as their cost goes."""

    def __init__(self, count: int, device: str) -> None:
        self.pixels = torch.randn(count, 3, 32, 32, generator=generator(0, "real")).to(device)
        self.labels = (torch.arange(count) % 10).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, rows: Tensor) -> Tensor:
        return self.pixels[rows.to(self.pixels.device)]


def alone(job: dict[str, Any]) -> dict[str, float]:
    """`measure` of a job in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.poster", "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{job} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(job: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak bytes of one job: a window of the inner loop, or the loss on real images."""
    device = job["device"]
    torch.set_num_threads(job["threads"])
    outer = Outer(job["mode"], job["real"], job["chunk"], device)
    batch = outer.real.batch(0)
    outer.real_loss(tuple(part[:FEW] for part in batch))()  # the library's own buffers are not ours to count
    work = functools.partial(outer, 0, job["window"], batch) if "window" in job else outer.real_loss(batch)
    if device == "cuda":
        work()  # the kernels are chosen now
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, spent = torch.cuda.memory_allocated(), seconds(work, device)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before, spent = _resident("VmRSS"), seconds(work, device)
        peak = _resident("VmHWM") - before
    if "save" in job:
        torch.save(outer.poster.poster.grad.cpu(), job["save"])
    return {"seconds": spent, "peak": peak}


def _resident(name: str) -> int:
    """Bytes that this process holds (VmRSS), or held at most (VmHWM)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def free_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return 1024 * int(line.split()[1])


def fits(what: str, needed: float, device: str) -> bool:
    """Whether so many bytes are free; a line that says so where they are not."""
    free = free_bytes(device)
    if needed + MARGIN > free:
        print(f"({what}: about {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free: not measured)")
    return needed + MARGIN <= free


def at(points: dict[int, float], place: int) -> float:
    """A straight line through what was measured, at another place."""
    return float(np.polyval(np.polyfit(list(points), list(points.values()), 1), place))


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|---|{'--:|' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def print_windows(windows: Sequence[int], repeats: int, device: str) -> None:
    """Replay beside plain unrolling: memory, time, and whether the gradients agree."""
    outer = Outer("exact", FEW, FEW, device)
    patches, weights, graph = outer.poster.batch_size, outer.stack.flat.size, outer.graph
    predicted = {"exact": lambda steps: graph + 12 * weights * steps, "unroll": lambda steps: graph * steps}
    found: dict[tuple[str, int], dict[str, float]] = {}
    ratios, differences = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for steps in windows:
            here = [m for m in predicted if fits(f"{m}, window {steps}", _needed(m, steps, found, predicted), device)]
            turns = []
            for _ in range(repeats):
                job = {"window": steps, "real": FEW, "chunk": FEW, "device": device, "threads": torch.get_num_threads()}
                turns.append({m: alone(job | {"mode": m, "save": f"{folder}/{m}"}) for m in here})
            found |= {(m, steps): _median([turn[m] for turn in turns]) for m in here}
            if len(here) == 2:
                ratios[steps] = statistics.median(t["exact"]["seconds"] / t["unroll"]["seconds"] for t in turns)
                ours, oracle = (torch.load(f"{folder}/{m}") for m in ("exact", "unroll"))
                differences[steps] = _difference(ours, oracle)
    last, line = Distill().window.window, {}
    for mode in predicted:
        known = {steps: numbers for (kind, steps), numbers in found.items() if kind == mode}
        if last not in known and len(known) > 1:
            line[mode] = {w: at({s: numbers[w] for s, numbers in known.items()}, last) for w in ("peak", "seconds")}
    measured = [steps for steps in windows if ("unroll", steps) in found]
    rows = [_window_row(steps, found, predicted, ratios, differences) for steps in measured]
    if line:
        found |= {(mode, last): numbers for mode, numbers in line.items()}
        note = " extrapolated" if len(line) == 2 else f" {', '.join(line)} extrapolated"
        rows.append(_window_row(last, found, predicted, {}, {}, "," + note))
    header = ["window", "unroll, MiB", "predicted", "replay, MiB", "predicted", "replay to unroll, memory"]
    header += ["unroll, s", "replay, s", "replay to unroll, time", "difference of gradients"]
    table(f"Inner loop: {patches} patches, {weights:,} weights, {FEW} real images", header, rows)


def print_gradients(model: str, device: str) -> None:
    """How far replay, plain unrolling and either in float64 are from each other.

    The gradient itself is rough in float32, most of all where Adam is fresh: its step, g / (|g| + ε), is steep where a
    gradient is hardly more than rounding, as those of biases before a norm are.
    """
    window, rows = 10, []
    for before in (0, 20):
        grads = {}
        for mode in ("exact", "unroll"):
            for bits in (32, 64):
                outer = Outer(mode, FEW, FEW, device, model)
                outer = outer.double() if bits == 64 else outer
                outer(before, window, outer.real.batch(0))
                grads[mode, bits] = outer.poster.poster.grad.double()
        pairs = [(("exact", 64), ("unroll", 64)), (("exact", 32), ("unroll", 32))]
        pairs += [((mode, 32), ("unroll", 64)) for mode in ("exact", "unroll")]
        rows.append([f"{before}"] + [f"{_difference(grads[a], grads[b]):.1e}" for a, b in pairs])
    header = ["steps before it", "replay and unroll, float64", "replay and unroll, float32"]
    header += ["replay, float32 and float64", "unroll, float32 and float64"]
    table(f"Relative differences of the poster's gradient, {model}, window {window}", header, rows)


def _difference(ours: Tensor, oracle: Tensor) -> float:
    return float((ours - oracle).norm() / oracle.norm())


def _needed(mode: str, steps: int, found: dict, predicted: dict) -> float:
    """Bytes of a window: as predicted, or more where shorter ones took more."""
    known = {window: peak["peak"] for (kind, window), peak in found.items() if kind == mode}
    return max(predicted[mode](steps), at(known, steps) if len(known) > 1 else 0)


def _median(turns: Sequence[dict[str, float]]) -> dict[str, float]:
    return {what: statistics.median(turn[what] for turn in turns) for what in turns[0]}


def _window_row(steps: int, found: dict, predicted: dict, ratios: dict, differences: dict, note: str = "") -> list[str]:
    """One line of the table of windows; a dash for what was not measured."""
    unroll, exact = (found.get((mode, steps)) for mode in ("unroll", "exact"))

    def show(of: dict | None, what: str, form: str, unit: float = 1) -> str:
        return "–" if of is None else format(of[what] / unit, form)

    both = unroll and exact
    time_ratio = ratios.get(steps, exact["seconds"] / unroll["seconds"] if both else 0)
    return [
        f"{steps}{note}",
        show(unroll, "peak", ",.0f", MIB),
        f"{predicted['unroll'](steps) / MIB:,.0f}",
        show(exact, "peak", ",.0f", MIB),
        f"{predicted['exact'](steps) / MIB:,.0f}",
        f"{exact['peak'] / unroll['peak']:.2f}" if both else "–",
        show(unroll, "seconds", ".2f"),
        show(exact, "seconds", ".2f"),
        f"{time_ratio:.2f}" if both else "–",
        f"{differences[steps]:.1e}" if steps in differences else "–",
    ]


def print_real(counts: Sequence[int], device: str) -> None:
    """The loss on real images whole and in pieces."""
    cfg, found = Distill().outer, {}
    for count in counts:
        for chunk in (count, cfg.real_chunk):
            if fits(f"{count} real images in pieces of {chunk}", REAL_GRAPH * chunk, device):
                job = {"mode": "exact", "real": count, "chunk": chunk, "device": device}
                found[count, chunk == count] = alone(job | {"threads": torch.get_num_threads()})
    rows = [[str(count), *_real_row(found, count)] for count in counts]
    known = [count for count in counts if (count, True) in found]
    if cfg.batch_size not in known and len(known) > 1:
        line = {
            (cfg.batch_size, whole): {
                w: at({c: found[c, whole][w] for c in known}, cfg.batch_size) for w in ("peak", "seconds")
            }
            for whole in (True, False)
        }
        rows.append([f"{cfg.batch_size}, extrapolated", *_real_row(line, cfg.batch_size)])
    header = ["real images", "whole, MiB", f"in pieces of {cfg.real_chunk}, MiB", "pieces to whole, memory"]
    table("Loss on real images, and its gradient", [*header, "whole, s", "pieces, s", "pieces to whole, time"], rows)


def _real_row(found: dict, count: int) -> list[str]:
    cells = []
    for what, unit, form in (("peak", MIB, ",.0f"), ("seconds", 1, ".2f")):
        whole, pieces = (found[count, kind][what] / unit if (count, kind) in found else None for kind in (True, False))
        cells += ["–" if value is None else format(value, form) for value in (whole, pieces)]
        cells.append("–" if whole is None else f"{pieces / whole:.2f}")
    return cells


def print_whole(device: str) -> None:
    """One outer step of the published command by replay, but for what comes before its window."""
    cfg, threads = Distill(), torch.get_num_threads()
    step = {"window": cfg.window.window, "real": cfg.outer.batch_size, "chunk": cfg.outer.real_chunk}
    found = alone(step | {"mode": "exact", "device": device, "threads": threads})
    print(
        f"\nWindow and all real images together, by replay: {found['peak'] / MIB:,.0f} MiB, {found['seconds']:.1f} s."
    )


def print_parts(part: float, repeats: int, device: str) -> None:
    """Where an outer step's time goes, at a share `part` of the published numbers of steps and real images."""
    cfg = Distill()
    before, length, real = (round(part * n) for n in (MEAN_START, cfg.window.window, cfg.outer.batch_size))
    outer = Outer("exact", real, cfg.outer.real_chunk, device)
    batch = outer.real.batch(0)
    few = tuple(value[:FEW] for value in batch)
    loss = outer.real_loss(batch)

    def whole() -> None:
        outer(before, length, outer.real.batch(0))
        outer.optimizer.step()

    work = {
        f"all: {before} steps before, {length} in the window, {real} real images": whole,
        "real images drawn and augmented": lambda: outer.real.batch(0),
        "their loss and its gradient": loss,
        "window": lambda: outer(0, length, few),
        "steps before it": lambda: outer(before, 1, few),
        "one step": lambda: outer(0, 1, few),
    }
    if device == "cuda":
        whole()  # the kernels are chosen now
    turns = [{name: seconds(job, device) for name, job in work.items()} for _ in range(repeats)]
    spent = _median(turns)
    spent["steps before it"] -= spent.pop("one step")
    title, total = next(iter(spent.items()))
    rows = [[name, f"{value:.3f}", f"{100 * value / total:.0f}"] for name, value in spent.items()]
    table("Outer step: where its time goes", ["part", "seconds", "% of all"], rows)
    if device != "cuda":
        print("\nThe published command at its full size: needs a GPU.")
        return
    oracle = Outer("unroll", real, cfg.outer.real_chunk, device)
    print(f"\nThe published command, {title}, by replay: {total:.2f} s, beside {PUBLISHED} s (V100).")
    if fits("by unroll", oracle.graph * length, device):
        oracle(before, length, batch)
        spent = seconds(lambda: oracle(before, length, batch), device, repeats)
        print(f"By unroll: {spent:.2f} s.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1, help="of each step")
    parser.add_argument("--windows", type=int, nargs="+", help="inner steps (2 5 10; on a GPU 5 10 20 60)")
    parser.add_argument("--full", action="store_true", help="on a CPU: windows 40 and 60, and all 5,000 real images")
    parser.add_argument(
        "--only", default="", choices=("", "windows", "gradients", "real", "whole", "parts"), help="one table"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--job", default="", help=argparse.SUPPRESS)  # what `alone` asks for
    args = parser.parse_args()
    if args.job:
        print(json.dumps(measure(json.loads(args.job))))
        return
    gpu = args.device == "cuda"
    print(environment(args.device))
    windows = args.windows or ([5, 10, 20, 60] if gpu else [2, 5, 10] + [40, 60] * args.full)
    counts = [5000] if gpu else [500, 1000] + [5000] * args.full
    tables = {
        "windows": lambda: print_windows(windows, args.repeats, args.device),
        "real": lambda: print_real(counts, args.device),
        "whole": lambda: print_whole(args.device) if gpu or args.full else None,
        "gradients": lambda: print_gradients("ConvNet" if gpu else "ConvNetW32", args.device),
        "parts": lambda: print_parts(1 if gpu else 0.1, args.repeats, args.device),
    }
    for name, show in tables.items():
        if args.only in ("", name):
            show()


if __name__ == "__main__":
    main()
