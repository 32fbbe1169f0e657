"""How much time compiled inner steps take beside eager ones: one outer step of MTT, one image a class.

    python -m tests.benchmarks.compiled

ConvNetD3 at 32 px, ten images, as `distill.py --method mtt --compile` does it; what compiling itself takes is in the
note. Batches this small leave a GPU waiting for the next kernel, which a CUDA graph spares it.
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.compiled import Kernels, Parts
from methods.core.inner import InnerSGD, Params
from methods.core.matching import match
from methods.core.precision import numbers
from methods.core.replay import Replay, ReplayConfig
from methods.images import SyntheticConfig, SyntheticImages
from networks import build_network
from networks.flat import FlatModule
from tests.benchmarks.outer import neighbour
from tests.benchmarks.table import NOT_RUN, Row, Scale, environment, judged, show
from tests.benchmarks.timing import Work, in_turns, profile_line

GROUP = "compiled"


@numbers("float32")
def rows(scale: Scale) -> list[Row]:
    net, steps = scale.of("ConvNetD2W8", "ConvNetD3"), scale.of(2, 10, 50)
    what = f"MTT, {net}, 10 images, {steps} steps: time of --compile to eager"
    eager, _ = build(net, steps, False, scale.device)
    begin = time.perf_counter()
    compiled, kernels = build(net, steps, True, scale.device)
    compiled()
    if kernels.why:
        return [Row(GROUP, what, NOT_RUN, note=kernels.why)]
    spent = time.perf_counter() - begin
    found = in_turns({"eager": eager, "compiled": compiled}, scale.of(1, 3, 10), scale.device)
    ours, theirs = (found[way].seconds for way in ("compiled", "eager"))
    note = f"{ours:.3f} s an outer step, {theirs:.3f} s eager; ready after {spent:.0f} s"
    limit = 0.33 if scale.device == "cuda" else None
    row = judged(GROUP, what, found["compiled"].ratio, "x", at_most=limit, note=note)
    return [row.explained(lambda: profile_line(compiled, scale.device))]


def build(model: str, steps: int, compiled: bool, device: str) -> tuple[Work, Kernels]:
    """One outer step, and the kernels of its inner steps; where they are compiled, ready to run."""
    torch.manual_seed(0)
    net = FlatModule(build_network(model, 32, 10).to(device).train())
    pixels, labels = torch.randn(10, 3, 32, 32, device=device), torch.arange(10, device=device)
    images = SyntheticImages(pixels, labels, 32, SyntheticConfig(), None)
    segment, rng = neighbour({"net": net.flatten()}), torch.Generator().manual_seed(0)

    def loss(params: Params, pixels: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(net(params["net"], pixels), labels)

    step_loss = Parts(images.batch, Kernels(loss))
    replay = Replay(ReplayConfig(compile=compiled), "exact", torch.device(device))
    if compiled:
        replay.plan(step_loss, segment.start, images.draws(rng, steps), InnerSGD(images.lr), images.leaves, 1)

    def step() -> None:
        for leaf in images.leaves:
            leaf.grad = None
        match(step_loss, images, segment, images.draws(rng, steps), "exact", replay=replay)

    return step, step_loss.kernels


if __name__ == "__main__":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(environment(device))
    show(rows(Scale(device)))
