"""How fresh networks are trained when they judge labelled images: which networks (pools), how long, at what rates and
which epoch counts (protocols), and what happens to the images on the way (augmentations)."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from data.dsa import STRATEGY, augment, crop_scale_rotate, parse_strategy
from data.images import ImageData
from methods.core.training import Recipe
from utils.errors import UserError
from utils.rng import draw_seed, seeded

Augment = Callable[[Tensor, torch.Generator], Tensor]  # images (B, C, H, W) and a CPU generator → images

POOLS: dict[str, tuple[str, ...]] = {
    "M": ("ConvNet", "AlexNet", "VGG11", "ResNet18_AP", "ResNet18"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
    "B": ("ConvNet", "ConvNetBN", "ResNet18", "ResNet18BN", "AlexNet", "VGG11", "ResNet18_AP"),
}


def pool(letter: str, model: str) -> list[str]:
    """The networks that judge what was distilled with `model`, by the letter of the published `--eval_mode`.

    S the model itself, without its batch norm; M architectures, W widths, D depths, A activations, P pools, N norms of
    ConvNets; C the model and ConvNet; B (or BN) DATM's list; any other letter the model as it is.
    """
    if letter == "S":
        plain = re.split("-?bn", model, maxsplit=1, flags=re.IGNORECASE)[0]
        return [plain]  # as released: what follows BN in the name is cut as well
    if letter == "C":
        return list(dict.fromkeys([model, "ConvNet"]))
    return list(POOLS.get("B" if letter == "BN" else letter, (model,)))


@dataclass(frozen=True)
class EvalProtocol:
    """How fresh networks are trained on a set, and which of their epochs counts.

    epochs      as told to the program; `bare` where images are not augmented (0: the same)
    extra       epochs that released code trains beyond what it is told
    late        whether the rate falls as released: after epoch index epochs // 2 + 1, where a new optimiser begins
                without momentum; otherwise half-way, momentum kept
    lr          of every set (None: the set's own)
    augment     of a set when none is named: `own` or one of AUGMENTATIONS
    stride      epochs between two looks, of hard and of soft labels, where an epoch is selected
    """

    about: str
    epochs: int = 1000
    bare: int = 0
    extra: int = 0
    late: bool = False
    batch: int = 256
    lr: float | None = None
    select: str = "last"
    augment: str = "own"
    stride: tuple[int, int] = (1, 1)

    def recipe(self, lr: float, epochs: int, momentum: float, decay: float) -> Recipe:
        """SGD on a set for `epochs` as told to the program."""
        cut = epochs // 2 + 2 if self.late else epochs // 2
        milestones = (cut,) if cut else ()
        return Recipe({"net": lr}, epochs + self.extra, momentum, decay, milestones, reset_momentum=self.late)

    def visited(self, epochs: int, soft: bool) -> set[int]:
        """The epochs (counted from 1) at which a network is scored for selection."""
        if self.select == "last":
            return {epochs}
        stride = self.stride[soft]
        return set(range(stride, epochs + 1, stride)) or {epochs}


PROTOCOLS = {
    "clean": EvalProtocol("last epoch; rate × 0.1 half-way"),
    "mtt": EvalProtocol(
        "last epoch, one more than told; momentum lost where the rate falls, as released", extra=1, late=True
    ),
    "dc_bench": EvalProtocol(
        "DC-BENCH: rate 0.01, 1000 epochs augmented, else 300; last epoch, as released",
        bare=300,
        extra=1,
        late=True,
        lr=0.01,
        augment="none",
    ),
    "dd_ranking": EvalProtocol("DD-Ranking: best epoch ON TEST, as released", select="test", stride=(10, 20)),
}

AUGMENTATIONS = ("none", "dsa", "crop_scale_rotate", "cifar_aug", "imagenet_aug", "autoaug", "randaug")


def build_augment(name: str, data: ImageData) -> Augment | None:
    """One of AUGMENTATIONS for a data set. UserError where DC-BENCH's own cannot be: whitened images have no bytes.

    `cifar_aug`, `imagenet_aug`, `autoaug` and `randaug` are DC-BENCH's: images are made bytes again, one draw of
    torchvision's transforms serves the whole batch, and the result is normalised; `cifar_aug` then removes a square.
    """
    if name == "none":
        return None
    if name == "crop_scale_rotate":
        return crop_scale_rotate
    if name == "dsa":
        ops = parse_strategy(STRATEGY)
        return lambda images, rng: augment(images, ops, rng)
    if data.zca is not None:
        raise UserError(f"--eval_aug {name} works on bytes, which whitened images are not; take none, dsa or own")
    from torchvision import transforms

    crop_and_flip = [transforms.RandomCrop(data.size, padding=4), transforms.RandomHorizontalFlip()]
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4, hue=0.2)
    policy = transforms.AutoAugmentPolicy.CIFAR10 if data.size <= 32 else transforms.AutoAugmentPolicy.IMAGENET
    steps = {
        "cifar_aug": crop_and_flip,
        "imagenet_aug": [*crop_and_flip, jitter],
        "autoaug": [transforms.AutoAugment(policy)],
        "randaug": [transforms.RandAugment(num_ops=1)],
    }
    change = transforms.Compose(steps[name])
    mean, std = (torch.tensor(values, device=data.device).view(-1, 1, 1) for values in (data.mean, data.std))

    def apply(images: Tensor, rng: torch.Generator) -> Tensor:
        # Bytes are cut down, not rounded, as released.
        pixels = ((images * std + mean).clamp(0, 1) * 255).to(torch.uint8)
        with seeded(draw_seed(rng)):  # torchvision draws from torch's own chance
            pixels = change(pixels)
        changed = (pixels / 255.0 - mean) / std
        return _without_square(changed, rng) if name == "cifar_aug" else changed

    return apply


def _without_square(images: Tensor, rng: torch.Generator, side: int = 16) -> Tensor:
    """The images with one square of zeros, at one place for all; what reaches beyond the edge removes nothing."""
    images, reach = images.clone(), side // 2
    row, column = (int(torch.randint(size, (), generator=rng)) for size in images.shape[2:])
    images[:, :, max(0, row - reach) : row + reach, max(0, column - reach) : column + reach] = 0
    return images
