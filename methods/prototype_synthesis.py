"""From prototypes to images: each pair (latent mean, caption) guides the diffusion model from a noised start.

    z_τ = √ᾱ_τ · μ + √(1 − ᾱ_τ) · ε,   then denoise with   ε̂ = ε_neg + g (ε_pos − ε_neg)

τ follows from `strength`, so at 0.7 the mean tells layout and colour, and the caption the rest. Each image has its own
noise, by class, prototype and round: it is the same alone, in a batch, in another order, or after a killed run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.prototype_files import Prototypes
from networks.diffusion import LatentModel, denoising_steps
from utils.config import option
from utils.errors import RunError, UserError
from utils.files import atomic
from utils.pictures import png_bytes, to_uint8
from utils.progress import progress
from utils.rng import generator

TRIES = 5  # for an image that the safety checker flags
_SIDES = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64, "imagenet1k": 224}  # as published; else 256


@dataclass(frozen=True)
class SynthesisConfig:
    """How images are made of prototypes."""

    strength: float = option(0.7, "share of the noise schedule that an image starts from", aliases=("s",), above=0)
    guidance_scale: float = option(10.0, "weight of the caption against the negative prompt", aliases=("g",), low=1)
    num_inference_steps: int = option(50, "steps of the whole schedule, of which `strength` are taken", low=1)
    scheduler: str = option("", "sampler (empty: the model's own)", choices=("", "pndm", "ddim", "dpm"))
    negative_prompt: str = option("cartoon, anime, painting", "what images should not look like")
    prompt_template: str = option("{caption}", "the prompt; {caption} and {label} stand for a prototype's")
    long_prompt: str = option(
        "chunk", "captions beyond the text encoder's 77 tokens: in chunks, or cut off", choices=("chunk", "truncate")
    )
    synthesis_batch: int = option(1, "images made at once", low=1)
    output_size: int = option(0, "side of the images (0: 32 for CIFAR, 64 for Tiny, 224 for ImageNet-1K, 256)", low=0)
    safety_checker: bool = option(False, "make images anew that the model's safety checker flags")

    def check(self) -> None:
        if self.strength > 1:
            raise UserError(f"--strength is {self.strength}; it is a share of the noise schedule, such as 0.7")
        denoising_steps(self.strength, self.num_inference_steps)
        if 0 < self.output_size < 8:
            raise UserError(f"--output_size is {self.output_size}; give 8 pixels or more")
        try:
            self.prompt_template.format(caption="a dog", label="dog")
        except (KeyError, IndexError, ValueError):
            raise UserError(
                f"--prompt_template '{self.prompt_template}' may hold {{caption}} and {{label}} only"
            ) from None
        if "{" not in self.prompt_template:
            raise UserError(f"--prompt_template '{self.prompt_template}' lacks {{caption}}: all prompts would be equal")

    def side(self, name: str) -> int:
        """Of the images of the data set `name`, in pixels."""
        return self.output_size or _SIDES.get(name, 256)

    def prompts(self, prototypes: Prototypes) -> list[str]:
        """One a prototype."""
        return [self.prompt_template.format(caption=text, label=prototypes.label) for text in prototypes.texts]


@dataclass(frozen=True)
class Planned:
    """One image: the number of its prototype, its round, its file."""

    prototype: int
    round: int
    path: Path


def planned(folder: Path, prototypes: Prototypes, ipc: int) -> list[Planned]:
    """The `ipc` images of a class in order: each prototype once, then each once more with other noise, and so on.

    UserError unless `ipc` is a multiple of the number of prototypes.
    """
    count = len(prototypes.texts)
    if ipc % count:
        raise UserError(
            f"class {prototypes.ident} has {count} prototypes, and --ipc {ipc} is no multiple of that; give such as "
            f"--ipc {ipc + count - ipc % count}"
        )
    place = folder / prototypes.ident
    # The dash keeps prototype 1, round 10 and prototype 11, round 0 apart.
    return [
        Planned(number, again, place / f"{prototypes.ident}-image{number}-{again}.png")
        for again in range(ipc // count)
        for number in range(count)
    ]


def missing(plan: list[Planned], batch: int) -> Iterator[list[Planned]]:
    """The batches of a plan of which an image is not there yet. A batch is always made whole: what shares a batch
    shares its rounding."""
    for start in range(0, len(plan), batch):
        part = plan[start : start + batch]
        if not all(image.path.exists() for image in part):
            yield part


class Synthesis:
    """Makes the images of one class after another and writes them as PNG files; those that are there stay.

    model    with all its parts
    name     of the data set, which tells the size of images
    flagged  how many images the safety checker has turned down so far
    """

    def __init__(self, model: LatentModel, cfg: SynthesisConfig, name: str, seed: int) -> None:
        self.model, self.cfg, self.side, self.seed = model, cfg, cfg.side(name), seed
        self.flagged = 0

    def __call__(self, folder: Path, prototypes: Prototypes, ipc: int, bar: progress) -> int:
        """Write what is missing of a class's `ipc` images; how many were made."""
        plan, made = planned(folder, prototypes, ipc), 0
        bar.update(sum(image.path.exists() for image in plan))
        for part in missing(plan, self.cfg.synthesis_batch):
            wanted = [image for image in part if not image.path.exists()]
            for image, pixels in zip(part, self._images(prototypes, part), strict=True):
                if image in wanted:
                    with atomic(image.path) as temporary:
                        temporary.write_bytes(png_bytes(pixels))
            made += len(wanted)
            bar.update(len(wanted))
        return made

    def _images(self, prototypes: Prototypes, part: list[Planned]) -> list[Tensor]:
        """Pixels (3, side, side) uint8 of each."""
        texts = self.cfg.prompts(prototypes)
        # One by one: a long caption in the batch must not lengthen, and so change, what guides the others.
        prompts = [
            self.model.prompts([texts[image.prototype]], self.cfg.negative_prompt, self.cfg.long_prompt)
            for image in part
        ]
        found: list[Tensor | None] = [None] * len(part)
        for attempt in range(TRIES):
            pending = [index for index, image in enumerate(found) if image is None]
            for length in sorted({prompts[index][0].shape[1] for index in pending}):
                alike = [index for index in pending if prompts[index][0].shape[1] == length]
                images, flags = self.model.synthesize(
                    prototypes.latents[[part[index].prototype for index in alike]],
                    torch.cat([prompts[index][0] for index in alike]),
                    torch.cat([prompts[index][1] for index in alike]),
                    [self._chance(prototypes.ident, part[index], attempt) for index in alike],
                    self.cfg.strength,
                    self.cfg.guidance_scale,
                    self.cfg.num_inference_steps,
                    self.cfg.scheduler,
                )
                self.flagged += sum(flags)
                for index, image, flag in zip(alike, resized(images, self.side), flags, strict=True):
                    found[index] = None if flag else image
            if all(image is not None for image in found):
                return found
        image = part[found.index(None)]
        raise RunError(
            f"the safety checker flags {image.path.name} under {TRIES} seeds (its caption: "
            f"{texts[image.prototype][:80]}); leave the checker off, or change --seed"
        )

    def _chance(self, ident: str, image: Planned, attempt: int) -> torch.Generator:
        again = (attempt,) if attempt else ()
        return generator(self.seed, "synthesis", ident, image.prototype, image.round, *again)


def resized(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, S, S) from 0 to 1 as pixels (B, 3, side, side) uint8, by an antialiased bicubic filter."""
    pixels = to_uint8(images)
    if pixels.shape[-1] == side:
        return pixels
    return F.interpolate(pixels, (side, side), mode="bicubic", antialias=True)
