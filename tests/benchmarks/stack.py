"""What training several networks side by side costs, beside training them one after another.

    python -m tests.benchmarks.stack

Rows are K networks on batches of B images, a step of each. `one by one` is the time of K single steps in ms; the others
are ratios to it, less than 1 being faster: `stack` as Stack decides by itself; `vmap` one call for all networks;
`grouped` the same with the convolutions of all networks written as one grouped convolution; `SGD` K ordinary modules
with torch.optim.SGD. On a GPU `streams` gives each network a stream, and the peak memory of `stack` follows.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from methods.core.stack import Stack, StackTrainer
from methods.core.training import Recipe
from networks import build_network
from tests.benchmarks.timing import in_turns

CASES = [("ConvNet", 32, 10), ("ConvNet", 32, 32), ("ConvNet", 32, 256), ("ConvNetD2W16", 16, 10)]
RECIPE = Recipe({"net": 0.01}, 1, momentum=0.9, weight_decay=5e-4)


def grouped_step(stack: Stack, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient (K, P) of a ConvNet stack by grouped convolutions and norms."""
    count, batch = images.shape[:2]
    leaf = weights.detach().requires_grad_()
    parts = leaf.split(stack.flat.sizes, 1)
    named = {name: part.view(count, *shape) for (name, shape), part in zip(stack.flat.shapes, parts, strict=True)}
    hidden = images.transpose(0, 1).flatten(1, 2)  # (B, K C, H, W)
    for index, layer in enumerate(stack.net.features):
        weight, bias = (named.get(f"features.{index}.{which}") for which in ("weight", "bias"))
        if isinstance(layer, nn.Conv2d):
            hidden = F.conv2d(hidden, weight.flatten(0, 1), bias.flatten(), padding=layer.padding, groups=count)
        elif isinstance(layer, nn.GroupNorm):
            hidden = F.group_norm(hidden, count * layer.num_groups, weight.flatten(), bias.flatten())
        elif not isinstance(layer, nn.Flatten):
            hidden = layer(hidden)
    hidden = hidden.reshape(batch, count, -1).transpose(0, 1)
    logits = torch.baddbmm(named["classifier.bias"][:, None], hidden, named["classifier.weight"].transpose(1, 2))
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / batch
    return torch.autograd.grad(loss, leaf)[0]


def ways(name: str, size: int, batch: int, count: int, device: str) -> dict[str, Callable[[], object]]:
    """What is timed, by name: one step of all networks, in different ways."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(count, batch, 3, size, size, generator=rng).to(device)
    labels = torch.randint(10, (count, batch), generator=rng).to(device)

    def trainer(vectorised: bool | None, members: slice) -> StackTrainer:
        stack = Stack(build_network(name, size, 10).to(device), vectorised)
        seeds = list(range(count))[members]
        return StackTrainer(stack, stack.draw(seeds), RECIPE, seeds)

    singles = [trainer(None, slice(k, k + 1)) for k in range(count)]
    streams = [torch.cuda.Stream() for _ in range(count)] if device == "cuda" else []
    chosen, vmap, by_hand = (trainer(vectorised, slice(None)) for vectorised in (None, True, None))
    modules = [build_network(name, size, 10).to(device) for _ in range(count)]
    optimizers = [torch.optim.SGD(net.parameters(), 0.01, 0.9, weight_decay=5e-4) for net in modules]

    def one_by_one() -> None:
        for k, single in enumerate(singles):
            single._step((images[k : k + 1], labels[k : k + 1]))

    def ordinary() -> None:
        for k, (net, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(net(images[k]), labels[k]).backward()
            optimizer.step()

    def in_streams() -> None:
        for k, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                singles[k]._step((images[k : k + 1], labels[k : k + 1]))

    def grouped() -> None:
        grads = grouped_step(by_hand.stack, by_hand.weights, images, labels)
        by_hand.weights.add_(grads, alpha=-0.01)

    found = {"one by one": one_by_one, "stack": lambda: chosen._step((images, labels))}
    found |= {"vmap": lambda: vmap._step((images, labels)), "grouped": grouped, "SGD": ordinary}
    return found | ({"streams": in_streams} if streams else {})


def again(work: Callable[[], object], times: int) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(times):
            work()

    return repeated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    print(f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    cases = CASES if args.device == "cuda" else [case for case in CASES if case[2] < 256]
    for name, size, batch in cases:
        print(f"\n{name}, {size} px, B = {batch}")
        for place, count in enumerate(args.counts):
            timed = ways(name, size, batch, count, args.device)
            steps = 20 if args.device == "cuda" or size < 32 else 1
            found = in_turns({way: again(work, steps) for way, work in timed.items()}, args.repeats, args.device)
            if not place:
                print(f"{'K':>4}{'one by one':>12}" + "".join(f"{way:>10}" for way in list(timed)[1:]))
            row = f"{count:4}{found['one by one'].seconds / steps * 1e3:12.2f}"
            row += "".join(f"{found[way].ratio:10.2f}" for way in list(timed)[1:])
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                timed["stack"]()
                row += f"{torch.cuda.max_memory_allocated() / 2**20:10.0f} MB"
            print(row, flush=True)


if __name__ == "__main__":
    main()
