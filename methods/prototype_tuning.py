"""The fine-tuning stage of `--method vlcp`: a latent diffusion model learns the data set's images and captions.

    L = E ‖ε − ε_θ(z_t, t, c)‖²,   z_0 = 0.18215 · sample(E(x)),   z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε

with t uniform over the schedule and c the text encoder's states of the caption, cut at its 77 tokens. Only the denoiser
learns; the moving average of its weights is what is kept, as in the text-to-image example of the diffusers library,
whose flags these are. The published commands tune at 512 pixels, but at 32 for CIFAR, whose images are then encoded at
512; here `--resolution` is 512 throughout.

The offline model `tiny` comes with an autoencoder of random weights. `--vae_steps` trains it first, to redraw images
through latents that are nearly certain (a trace of a Kullback–Leibler term), and sets its scaling factor so that
latents have unit variance, as Stable Diffusion's have.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data.catalogue import Catalogue
from methods.prototype_files import Manifest
from methods.prototype_latents import encoded, moments
from methods.prototype_learning import Batch, Checkpoints, Learner, Pictures, learn, to_signed
from networks.diffusion import LatentModel, load_model, open_model
from utils.config import option
from utils.errors import UserError
from utils.files import atomic_folder
from utils.folders import check_folder, folder_digests, remove_made
from utils.pictures import save_grid
from utils.rng import generator
from utils.run import Run

HALVES = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
MODEL, ENCODED = "model", "encoded"  # the folders of the tuned model, and of what it learns from, in the run's
_PICTURED = 8  # classes on a validation sheet, unless prompts are given
_MEASURED = 512  # images whose latents set a scaling factor
_KL = 1e-6  # weight of the autoencoder's second term, as for Stable Diffusion's
_GUIDANCE, _STEPS = 7.5, 50  # of a validation sheet


@dataclass(frozen=True)
class TuneConfig:
    """How the diffusion model is fine-tuned."""

    model: str = option(
        "benjamin-paine/stable-diffusion-v1-5",
        "diffusion model to begin with: a hub id, a diffusers pipeline's folder, or tiny, which needs no download",
        aliases=("pretrained_model_name_or_path",),
    )
    resolution: int = option(512, "side of the images it learns, in pixels", low=8)
    center_crop: bool = option(True, "cut the square from an image's middle, else anywhere")
    random_flip: bool = option(True, "mirror half of the images")
    train_batch_size: int = option(8, "images that go through the network at once", low=1)
    gradient_accumulation_steps: int = option(4, "such batches a step of the optimiser", low=1)
    num_train_epochs: int = option(8, "times that every image is learned from", low=1)
    max_train_steps: int = option(0, "steps of the optimiser instead of epochs (0: by epochs)", low=0)
    learning_rate: float = option(1e-5, "rate of AdamW", above=0)
    lr_scheduler: str = option("constant", "how the rate changes", choices=SCHEDULES)
    lr_warmup_steps: int = option(0, "steps over which it rises to its value", low=0)
    max_grad_norm: float = option(1.0, "shorten gradients to this norm (0: never)", low=0)
    snr_gamma: float = option(0.0, "bound the weight of nearly clean images (min-SNR); 5 is usual (0: off)", low=0)
    use_ema: bool = option(True, "keep the moving average of the weights, else the last weights")
    mixed_precision: str = option("no", "precision of the forward pass; fp16 needs a GPU", choices=tuple(HALVES))
    cache_latents: bool = option(
        False, "encode images and captions once, to files that go when the tuning ends (centre crops only)"
    )
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory", free=True)
    checkpointing_steps: int = option(500, "steps between checkpoints", low=1, free=True)
    checkpoints_total_limit: int = option(2, "checkpoints kept (0: all)", low=0, free=True)
    validation_epochs: int = option(2, "epochs between two sheets of drawn pictures (0: none)", low=0, free=True)
    validation_prompts: str = option(
        "", "prompts of the sheet, with | between them (empty: a caption of each of the first classes)", free=True
    )
    vae_steps: int = option(0, "train the autoencoder first for so many steps (0: leave it as it is)", low=0)
    vae_lr: float = option(5e-4, "rate of the autoencoder", above=0)
    vae_batch_size: int = option(8, "images a step of the autoencoder", low=1)

    def check(self) -> None:
        if self.resolution % 8:
            raise UserError(f"--resolution is {self.resolution}; it must be a multiple of 8, such as 512")
        if self.cache_latents and not self.center_crop:
            raise UserError(
                "--cache_latents encodes each image once, and --center_crop false cuts it elsewhere each time; leave "
                "one of them out"
            )

    def idle(self) -> dict[str, str]:
        found = {} if self.vae_steps else dict.fromkeys(("vae_lr", "vae_batch_size"), "--vae_steps")
        if self.lr_scheduler == "constant":
            found["lr_warmup_steps"] = "an --lr_scheduler that warms up, such as constant_with_warmup"
        if not self.validation_epochs:
            found["validation_prompts"] = "--validation_epochs"
        return found

    @property
    def batch(self) -> int:
        """Images a step of the optimiser."""
        return self.train_batch_size * self.gradient_accumulation_steps


def tune(cfg: TuneConfig, catalogue: Catalogue, captions: dict[str, str], folder: Path, run: Run) -> Path:
    """Fine-tune on the captioned training images; the pipeline folder `folder`/model that comes of it.

    captions   `<class>/<file>` → text; images without one are left out
    A run that was killed goes on from its last checkpoint and ends in the same files; one that ended is not repeated.
    UserError for images or a precision that cannot be, RunError where the loss is not finite.
    """
    target = folder / MODEL
    if target.is_dir():
        print(f"the model is tuned already: {target}")
        return target
    check_model(cfg, folder, catalogue.cache_dir, run.device)
    files = [file for names in catalogue.train for file in names if file in captions]
    if not files:
        raise UserError("no training image has a caption; caption them first")
    pictures = Pictures(
        [catalogue.train_root / file for file in files],
        [captions[file] for file in files],
        catalogue.train_root,
        cfg.resolution,
        cfg.center_crop,
        cfg.random_flip,
        catalogue.threads,
    )
    model = load_model(open_model(cfg.model, catalogue.cache_dir), run.device)
    logged = _autoencoder(cfg, pictures, model, folder, run) if cfg.vae_steps else None
    _denoiser(cfg, pictures, model, folder, run, logged, _prompts(cfg, catalogue, captions))
    model.save(target, lambda made: Manifest(folder).record(MODEL, files=folder_digests(made)))
    remove_made(folder / ENCODED)
    return target


def check_model(cfg: TuneConfig, folder: Path, cache_dir: str, device: torch.device) -> None:
    """UserError now, not after hours of captioning, for a model or a precision that cannot be had, unless `folder` has
    the tuned model already."""
    if (folder / MODEL).is_dir():
        return
    if HALVES[cfg.mixed_precision] is torch.float16 and device.type == "cpu":
        raise UserError("--mixed_precision fp16 needs a GPU; give --mixed_precision no (or bf16) on the CPU")
    load_model(open_model(cfg.model, cache_dir), device, parts=("tokenizer", "scheduler"))


def _denoiser(
    cfg: TuneConfig,
    pictures: Pictures,
    model: LatentModel,
    folder: Path,
    run: Run,
    logged: int | None,
    prompts: list[str],
) -> None:
    """Train the model's denoiser, whose lines in the log follow those with the checksum `logged`; it ends with the
    weights to keep."""
    model.unet.requires_grad_(True)
    if cfg.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
    per_epoch = pictures.steps_per_epoch(cfg.batch)
    noise = model.noise()
    learner = Learner(
        model.unet,
        functools.partial(denoising_loss, model, noise, gamma=cfg.snr_gamma),
        cfg.max_train_steps or cfg.num_train_epochs * per_epoch,
        cfg.train_batch_size,
        cfg.learning_rate,
        cfg.max_grad_norm,
        cfg.lr_scheduler,
        cfg.lr_warmup_steps,
        cfg.use_ema,
        HALVES[cfg.mixed_precision],
    )

    def look(step: int) -> None:
        epoch, rest = divmod(step, per_epoch)
        if cfg.validation_epochs and not rest and epoch % cfg.validation_epochs == 0:
            _sheet(model, learner, prompts, cfg.resolution, run.seed, folder / "sheets" / f"epoch_{epoch:03d}.png")

    times, known = noise.config.num_train_timesteps, None
    if cfg.cache_latents:
        half = HALVES[cfg.mixed_precision]
        halved = torch.autocast(model.device.type, half, enabled=half is not None)
        known = encoded(pictures, model, folder / ENCODED, halved)
    checkpoints = Checkpoints(folder / "checkpoints", "denoiser", cfg.checkpointing_steps, cfg.checkpoints_total_limit)
    learn(
        learner,
        lambda steps: pictures.batches(run.seed, "tuning", steps, cfg.batch, model.factor, times, known),
        checkpoints,
        run,
        "fine-tuning",
        "loss",
        cfg.vae_steps,
        logged,
        look,
    )
    learner.settle().requires_grad_(False)


def denoising_loss(model: LatentModel, noise: object, batch: Batch, gamma: float = 0.0) -> Tensor:
    """How far the denoiser is from telling the noise in noised latents (or their velocity, if that is its target).

    gamma   weight of an image min(SNR, γ) / SNR instead of 1, where it is above 0
    """
    times = batch.times.to(model.device)
    with torch.no_grad():
        if batch.encoded is None:
            found, states = moments(model, to_signed(batch.images, model.device)), model.embed(batch.texts)
        else:
            found, states = (part.to(model.device) for part in batch.encoded)
        latents = sample_latents(found, batch.posterior) * model.vae.config.scaling_factor
    added = batch.noise.to(model.device)
    predicted = model.unet(noise.add_noise(latents, added, times), times, states).sample
    velocity = noise.config.prediction_type == "v_prediction"
    goal = noise.get_velocity(latents, added, times) if velocity else added
    loss = F.mse_loss(predicted.float(), goal.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if gamma:
        kept = noise.alphas_cumprod.to(model.device)[times]
        ratio = kept / (1 - kept)
        loss = loss * ratio.clamp(max=gamma) / (ratio + 1 if velocity else ratio)
    return loss.mean()


def sample_latents(found: Tensor, posterior: Tensor) -> Tensor:
    """Unscaled latents (B, 4, h, w) of these `moments`, drawn with this noise."""
    mean, spread = found.chunk(2, 1)
    return mean + spread * posterior.to(mean)


def _autoencoder(cfg: TuneConfig, pictures: Pictures, model: LatentModel, folder: Path, run: Run) -> int | None:
    """Train the model's autoencoder, or take the one that this run has trained already, where it is as it was; the
    checksum of what the log says of it."""
    from diffusers import AutoencoderKL

    target, manifest = folder / "autoencoder", Manifest(folder)
    checkpoints = Checkpoints(folder / "checkpoints", "autoencoder", cfg.checkpointing_steps, 1)
    if not target.is_dir():
        model.vae.requires_grad_(True)
        learner = Learner(
            model.vae,
            functools.partial(redrawing_loss, model),
            cfg.vae_steps,
            cfg.vae_batch_size,
            cfg.vae_lr,
            cfg.max_grad_norm,
            "cosine",
            cfg.vae_steps // 10,
            weight_decay=0.0,
        )
        learn(
            learner,
            lambda steps: pictures.batches(run.seed, "autoencoder", steps, cfg.vae_batch_size, model.factor, 1),
            checkpoints,
            run,
            "autoencoder",
            "vae_loss",
        )
        model.vae.register_to_config(scaling_factor=_scaling_factor(model, pictures))
        with atomic_folder(target) as temporary:
            model.vae.save_pretrained(temporary)
            manifest.record("autoencoder", files=folder_digests(temporary), log=run.log_sum(cfg.vae_steps))
    else:
        made = manifest.section("autoencoder").get("files", {})
        check_folder(target, made, "restore it, or begin anew in another folder")
        named = model.vae.config.get("_name_or_path", "")
        model.vae = AutoencoderKL.from_pretrained(target).to(model.device)
        model.vae.register_to_config(_name_or_path=named)  # else its file would tell where it was trained
    model.vae.eval().requires_grad_(False)
    checkpoints.clear()
    return manifest.section("autoencoder").get("log")


def redrawing_loss(model: LatentModel, batch: Batch) -> Tensor:
    """Mean squared error of images drawn from their own latents, and a trace of how far these are from normal."""
    images = to_signed(batch.images, model.device)
    found = model.vae.encode(images).latent_dist
    redrawn = model.vae.decode(found.mean + found.std * batch.posterior.to(model.device)).sample
    return F.mse_loss(redrawn, images) + _KL * found.kl().mean()


@torch.no_grad()
def _scaling_factor(model: LatentModel, pictures: Pictures) -> float:
    """What latents are multiplied by to have unit variance over the training images."""
    step = max(1, len(pictures.files) // _MEASURED)
    rows = list(range(0, len(pictures.files), step))[:_MEASURED]
    found = [
        model.vae.encode(to_signed(torch.stack([pictures.read(row) for row in rows[i : i + 16]]), model.device))
        for i in range(0, len(rows), 16)
    ]
    return round(1 / float(torch.cat([part.latent_dist.mean for part in found]).std()), 5)


def _prompts(cfg: TuneConfig, catalogue: Catalogue, captions: dict[str, str]) -> list[str]:
    """What a validation sheet shows."""
    given = [prompt.strip() for prompt in cfg.validation_prompts.split("|") if prompt.strip()]
    first = (next((captions[file] for file in names if file in captions), None) for names in catalogue.train)
    return given or [text for text in first if text is not None][:_PICTURED]


def _sheet(model: LatentModel, learner: Learner, prompts: list[str], resolution: int, seed: int, path: Path) -> None:
    """Draw each prompt from pure noise with the weights that would be kept now."""
    if learner.ema is not None:
        learner.ema.store(learner.params)
        learner.ema.copy_to(learner.params)
    learner.net.eval()
    side = resolution // model.factor
    images = []
    for prompt in prompts:
        embeds, negative, _ = model.prompts([prompt], "", "truncate")
        rng = generator(seed, "sheet", prompt)
        image, _ = model.synthesize(torch.zeros(1, 4, side, side), embeds, negative, [rng], 1.0, _GUIDANCE, _STEPS)
        images.append(image)
    learner.net.train()
    if learner.ema is not None:
        learner.ema.restore(learner.params)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_grid(path, torch.cat(images), per_row=4, scale_each=False)
