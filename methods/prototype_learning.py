"""How parts of a latent diffusion model learn: batches with their own chance, steps, checkpoints.

All chance of a step (which images, crops, flips, noise, times) comes from CPU generators named after the seed and the
step, so that it is the same on every device and for every size of the parts a batch is cut into, and a run that was
killed anywhere goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data.cache import picture
from methods.core.checkpoints import Checkpoints
from methods.core.training import prefetch
from utils.errors import RunError
from utils.progress import progress
from utils.rng import generator
from utils.run import Run
from utils.stopping import stoppable

_LATEST = "goes on from the last checkpoint"


@dataclass(frozen=True)
class Batch:
    """The images of one step and their chance.

    images     (B, 3, S, S) uint8; None where they are encoded already
    texts      B captions
    posterior  (B, 4, h, w) normal noise that samples the latents
    noise      (B, 4, h, w) normal noise to be told from them
    times      (B,) long, how much of it: steps of the schedule
    encoded    moments (B, 8, h, w) of latents and states (B, 77, E) of texts, where they were found before
    """

    images: Tensor | None
    texts: list[str]
    posterior: Tensor
    noise: Tensor
    times: Tensor
    encoded: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def split(self, size: int) -> Iterator[Batch]:
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            images = None if self.images is None else self.images[part]
            encoded = None if self.encoded is None else (self.encoded[0][part], self.encoded[1][part])
            yield Batch(images, self.texts[part], self.posterior[part], self.noise[part], self.times[part], encoded)


@dataclass(frozen=True)
class Pictures:
    """Captioned images, decoded when they are asked for: the short side resized to `size`, then a square cut out.

    files    paths in order; `texts` their captions
    root     the folder they are in, for error messages
    centre   cut from the middle, else anywhere
    flip     mirror half of them
    """

    files: Sequence[Path]
    texts: Sequence[str]
    root: Path
    size: int
    centre: bool
    flip: bool
    threads: int

    def batches(
        self,
        seed: int,
        name: str,
        steps: range,
        size: int,
        factor: int,
        times: int,
        encoded: Callable[[list[int], list[bool]], tuple[Tensor, Tensor]] | None = None,
    ) -> Iterator[Batch]:
        """The batches of these steps, of `size` images or, at the end of an epoch, fewer.

        factor   pixels a latent; `times` steps of the noise schedule
        encoded  of rows, and whether they are mirrored: what there is in place of images
        """
        per_epoch = self.steps_per_epoch(size)
        with ThreadPoolExecutor(self.threads) as pool:

            def make(step: int) -> Batch:
                epoch, place = divmod(step, per_epoch)
                order = torch.randperm(len(self.files), generator=generator(seed, name, "order", epoch))
                rows = order[place * size : (place + 1) * size].tolist()
                rng = generator(seed, name, "step", step)
                chances = torch.rand(len(rows), 3, generator=rng).tolist()
                extent = (len(rows), 4, self.size // factor, self.size // factor)
                return Batch(
                    torch.stack(list(pool.map(self.read, rows, chances))) if encoded is None else None,
                    [self.texts[row] for row in rows],
                    torch.randn(extent, generator=rng),
                    torch.randn(extent, generator=rng),
                    torch.randint(times, (len(rows),), generator=rng),
                    encoded and encoded(rows, [self.mirrors(chance) for chance in chances]),
                )

            yield from prefetch(make, steps)

    def steps_per_epoch(self, size: int) -> int:
        return math.ceil(len(self.files) / size)

    def read(self, row: int, chance: Sequence[float] = (0.5, 0.5, 1.0)) -> Tensor:
        """An image (3, S, S) uint8; `chance` in [0, 1): where it is cut from, down and across, and whether mirrored."""
        from PIL import Image

        with picture(self.files[row], self.root) as image:
            image = image.convert("RGB")
            width, height = image.size
            short = min(width, height)
            extent = (int(self.size * width / short), int(self.size * height / short))
            if extent != image.size:
                image = image.resize(extent, Image.Resampling.BILINEAR)
            left, top = (
                round((side - self.size) / 2) if self.centre else int(share * (side - self.size + 1))
                for side, share in ((extent[0], chance[1]), (extent[1], chance[0]))
            )
            pixels = np.array(image.crop((left, top, left + self.size, top + self.size)))
        if self.mirrors(chance):
            pixels = pixels[:, ::-1]
        return torch.from_numpy(pixels.copy()).permute(2, 0, 1)

    def mirrors(self, chance: Sequence[float]) -> bool:
        return self.flip and chance[2] < 0.5


def to_signed(images: Tensor, device: torch.device) -> Tensor:
    """uint8 images as an autoencoder takes them: float32 from -1 to 1, on the device."""
    return images.to(device).float() / 127.5 - 1


class Learner:
    """A network that learns: its optimiser, rates and, if asked for, the moving average of its weights.

    loss      of a part of a batch: a scalar, the mean over the part's images
    schedule  one of diffusers' names; `warmup` steps are part of `steps`
    part      images that go through the network at once; gradients of a batch's parts are averaged
    half      precision of the forward pass (None: float32); float16 has its gradients scaled
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Batch], Tensor],
        steps: int,
        part: int,
        lr: float,
        max_grad_norm: float,
        schedule: str = "constant",
        warmup: int = 0,
        average: bool = False,
        half: torch.dtype | None = None,
        weight_decay: float = 0.01,
    ) -> None:
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.net, self.loss, self.steps, self.part, self.half = net, loss, steps, part, half
        self.params, self.max_grad_norm = [p for p in net.parameters() if p.requires_grad], max_grad_norm
        self.device = self.params[0].device
        self.optimizer = torch.optim.AdamW(self.params, lr, betas=(0.9, 0.999), weight_decay=weight_decay, eps=1e-8)
        self.schedule = get_scheduler(schedule, self.optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        self.ema = EMAModel(self.params, decay=0.9999, foreach=True) if average else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half is torch.float16)

    def step(self, batch: Batch) -> float:
        """One step of the optimiser; the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for part in batch.split(self.part):
            with torch.autocast(self.device.type, self.half, enabled=self.half is not None):
                loss = self.loss(part) * (len(part) / len(batch))
            self.scaler.scale(loss).backward()
            total += loss.detach()
        if self.max_grad_norm:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.params, self.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.ema is not None:
            self.ema.step(self.params)
        return float(total)

    def settle(self) -> nn.Module:
        """The network as it is to be kept: with its averaged weights, if there is an average."""
        if self.ema is not None:
            self.ema.copy_to(self.params)
        return self.net

    def state_dict(self) -> dict[str, Any]:
        return {
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.device)


def learn(
    learner: Learner,
    batches: Callable[[range], Iterator[Batch]],
    checkpoints: Checkpoints,
    run: Run,
    what: str,
    logged: str,
    offset: int = 0,
    earlier: int | None = None,
    look: Callable[[int], None] = lambda step: None,
) -> None:
    """Take all steps that are left, from the last checkpoint on; the last state is kept as well.

    logged   name of the loss in the run's log, whose steps begin at `offset`
    earlier  the checksum of the log's lines before them; None where nobody knows
    look     called with the steps taken, after each
    RunError naming the step where the loss is not finite; checkpoints are from before it. A signal ends the training
    after the step that is under way, whose state is kept.
    """
    first = checkpoints.restore(learner)
    run.rewind(offset + first, checkpoints.log_sum if first else earlier)
    learner.net.train()
    with (
        progress(total=learner.steps, initial=first, what=what) as bar,
        closing(batches(range(first, learner.steps))) as source,
        stoppable() as stop,
    ):
        for step, batch in enumerate(source, first + 1):
            rate = learner.schedule.get_last_lr()[0]
            loss = learner.step(batch)
            if not math.isfinite(loss):
                kept = f"{_LATEST}, of step {checkpoints.found()[-1][0]}" if checkpoints.found() else "begins anew"
                raise RunError(f"{what}, step {step}: the loss is not finite; lower the rate; --resume {kept}")
            run.log(offset + step - 1, **{logged: loss, "lr": rate})
            look(step)
            asked = stop.asked
            if asked or checkpoints.due(step) or step == learner.steps:
                checkpoints.save(step, learner, run.log_sum(offset + step))
            if asked:
                stop.end()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
    learner.net.eval()
