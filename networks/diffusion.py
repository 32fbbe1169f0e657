"""A latent diffusion model in diffusers' format: autoencoder, denoiser, text encoder, noise schedule.

    encode      image → latent z, 0.18215 times the autoencoder's own (the model's scaling factor)
    prompts     captions → what guides the denoiser; beyond the encoder's 77 tokens in chunks, or cut off
    synthesize  image-to-image from a latent: z_τ = √ᾱ_τ z + √(1 − ᾱ_τ) ε, then denoise with guidance
                ε̂ = ε_neg + g (ε_pos − ε_neg)

Chance comes from one CPU generator an image, so an image is the same alone or in a batch (up to rounding) and starts
from the same noise on every device. Source: Stable Diffusion (Rombach et al., CVPR 2022) and its img2img pipeline.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.tiny import tiny_diffusion
from networks.weights import check_index, from_folder_or_hub, load_transformer, quiet_transformers
from utils.errors import UserError
from utils.files import atomic_folder, digest, file_digest, read_json
from utils.rng import seeded

TINY = "tiny"
PARTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
SCHEDULERS = {"pndm": "PNDMScheduler", "ddim": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler"}
_TEXTS = 64  # chunks of text a forward pass


def open_model(source: str, cache_dir: Path | str, flag: str = "model") -> str:
    """What `load_model` takes: a folder for "tiny" and for folders, a hub id as it is.

    "tiny" is built once below `cache_dir`. UserError naming `--flag` for a folder that is none, or lacks a part.
    """
    if source == TINY:
        return str(tiny_diffusion(cache_dir))
    folder = Path(source).expanduser()
    if folder.is_dir():
        lacking = [part for part in PARTS if not (folder / part).is_dir()]
        if lacking:
            raise UserError(f"--{flag} {source} lacks {', '.join(lacking)}; it must be a whole diffusers pipeline")
        return str(folder)
    if not is_hub_id(source):
        raise UserError(f"no model folder at {source}; --{flag} takes a diffusers pipeline's folder or hub id, or tiny")
    return source


def autoencoder_digest(source: str) -> str:
    """A digest by which one autoencoder is told from another: of its weights and scaling, or of a hub id."""
    folder = Path(source) / "vae"
    if not folder.is_dir():
        return digest("hub", source)
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".safetensors", ".bin")]
    scaling = [
        read_json(path, "autoencoder's config").get("scaling_factor") for path in files if path.suffix == ".json"
    ]
    return digest("folder", scaling, [file_digest(path) for path in files if path.suffix != ".json"])


def model_digest(source: str) -> str:
    """A digest by which one model is told from another: of the files of all its parts, or of a hub id."""
    folder = Path(source)
    if not folder.is_dir():
        return digest("hub", source)
    files = [path for part in PARTS for path in sorted((folder / part).iterdir()) if path.is_file()]
    found = {path.parent for path in files if path.suffix == ".safetensors"}  # what diffusers takes before .bin
    files = [path for path in files if path.suffix != ".bin" or path.parent not in found]
    return digest("folder", [(path.relative_to(folder).as_posix(), file_digest(path)) for path in files])


def is_hub_id(source: str) -> bool:
    """Whether `source` has the form of a name on the model hub, `owner/name`; else it can only be a folder."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None


def denoising_steps(strength: float, num_steps: int) -> int:
    """How many of `num_steps` image-to-image takes at `strength`; PNDM evaluates the denoiser once more.

    UserError where there is none: the result would be the decoded latent itself.
    """
    count = min(int(num_steps * strength), num_steps)
    if count < 1:
        raise UserError(
            f"--strength {strength:g} of {num_steps} steps leaves none to take; give at least --strength "
            f"{_share(num_steps):g} or more steps"
        )
    return count


def _share(num_steps: int) -> float:
    """The smallest strength in hundredths that takes a step."""
    return next(cent / 100 for cent in range(1, 101) if int(num_steps * (cent / 100)) >= 1)


def load_model(
    source: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    parts: Sequence[str] = PARTS,
    safety: bool = False,
) -> LatentModel:
    """The `parts` of a model, frozen, in evaluation mode and on `device`; nothing else is read.

    source   from `open_model`
    safety   with the model's safety checker; UserError where it has none
    UserError where the weights are not here and the hub is out of reach, or are damaged.
    """
    wanted = [*parts, *(("safety_checker", "feature_extractor") if safety else ())]

    def load(local: bool) -> dict[str, Any]:
        with _quiet(bars=not local):
            return {part: _LOADERS[part](source, local) for part in wanted}

    remedy = "pass the folder of a diffusers pipeline, or tiny"
    if safety and Path(source).is_dir() and not (Path(source) / "safety_checker").is_dir():
        raise UserError(f"the model {source} has no safety checker; leave the checker off")
    with seeded(0):  # some versions draw a network before they load it
        loaded = from_folder_or_hub(load, source, "model", f"the weights of {source}", remedy)
    with _quiet():  # it calls for another way of choosing a precision, which text encoders lack
        for net in (part for part in loaded.values() if isinstance(part, nn.Module)):
            net.eval().requires_grad_(False).to(device, dtype)
    model = LatentModel(source=source, device=torch.device(device), dtype=dtype, **loaded)
    if model.unet is not None and model.text_encoder is not None:
        wanted, given = model.unet.config.cross_attention_dim, model.text_encoder.config.hidden_size
        if wanted != given or model.unet.config.in_channels != 4:
            raise UserError(f"the model {source} is not of the kind of Stable Diffusion 1 and 2; take one that is")
    return model


@dataclass
class LatentModel:
    """The parts of a model that were asked for; the others are None.

    Images are (B, 3, S, S); latents (B, 4, S/8, S/8), scaled. What comes back of both is on the CPU, in float32;
    embeddings of texts stay on the device, in the model's precision.
    """

    source: str
    device: torch.device
    dtype: torch.dtype
    vae: Any = None
    unet: Any = None
    text_encoder: Any = None
    tokenizer: Any = None
    scheduler: Any = None
    safety_checker: Any = None
    feature_extractor: Any = None

    @property
    def factor(self) -> int:
        """Pixels a latent, along each side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def limit(self) -> int:
        """Tokens that the text encoder reads at once, the marks of begin and end among them: 77."""
        return min(self.tokenizer.model_max_length, self.text_encoder.config.max_position_embeddings)

    @torch.no_grad()
    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents of images from -1 to 1: the posterior's mode, or a sample with one CPU generator an image."""
        posterior = self.vae.encode(images.to(self.device, self.dtype)).latent_dist
        latents = posterior.mean.float().cpu()
        if generators is not None:
            noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
            latents = latents + posterior.std.float().cpu() * noise
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images from 0 to 1 of latents."""
        latents = latents.to(self.device, self.dtype) / self.vae.config.scaling_factor
        return (self.vae.decode(latents).sample.float().cpu() / 2 + 0.5).clamp(0, 1)

    def prompts(self, texts: Sequence[str], negative: str, long: str = "chunk") -> tuple[Tensor, Tensor, list[int]]:
        """Embeddings (B, L, E) of texts, as many of `negative`, and the tokens of each text, both marks included.

        long   of texts beyond the encoder's limit: "chunk" embeds them in pieces, one after another; "truncate" cuts
        L is the encoder's limit times the most chunks that a text, or the negative, has; the others end in empty
        chunks. So what a text gives depends on the longest beside it: give those alone that must not.
        """
        bodies = self._bodies([*texts, negative], long)
        counts = [len(body) + 2 for body in self._bodies(texts, "chunk")]
        chunks = max(1, *(-(-len(body) // (self.limit - 2)) for body in bodies))
        embedded = self._embed(bodies, chunks)
        return embedded[:-1], embedded[-1:].repeat(len(texts), 1, 1), counts

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings (B, 77, E) of texts cut at the encoder's limit, as a denoiser is trained on."""
        return self._embed(self._bodies(texts, "truncate"), 1)

    def _bodies(self, texts: Sequence[str], long: str) -> list[list[int]]:
        """Token ids of texts without the marks of begin and end."""
        with quiet_transformers():
            ids = self.tokenizer(list(texts), add_special_tokens=False).input_ids if texts else []
        return [body if long == "chunk" else body[: self.limit - 2] for body in ids]

    @torch.no_grad()
    def _embed(self, bodies: Sequence[Sequence[int]], chunks: int) -> Tensor:
        """(B, chunks * limit, E): each chunk has marks of its own, as the encoder was trained."""
        limit, tokenizer = self.limit, self.tokenizer
        rows = []
        for body in bodies:
            for start in range(0, chunks * (limit - 2), limit - 2):
                row = [tokenizer.bos_token_id, *body[start : start + limit - 2], tokenizer.eos_token_id]
                rows.append(row + [tokenizer.pad_token_id] * (limit - len(row)))
        ids = torch.tensor(rows, device=self.device)
        states = torch.cat([self.text_encoder(part).last_hidden_state for part in ids.split(_TEXTS)])
        return states.reshape(len(bodies), chunks * limit, -1)

    def synthesize(
        self,
        latents: Tensor,
        embeds: Tensor,
        negative: Tensor,
        generators: Sequence[torch.Generator],
        strength: float,
        guidance: float,
        steps: int,
        scheduler: str = "",
    ) -> tuple[Tensor, list[bool]]:
        """Images (B, 3, S, S) from 0 to 1, and which of them the safety checker flags (none without one).

        latents     (B, 4, S/8, S/8) to begin from
        embeds      (B, L, E) and `negative` the same, from `prompts`
        generators  B of the CPU; a flagged image is black, to be made again with another one
        guidance    g; up to 1 there is none, and a step is one evaluation of the denoiser an image, not two
        scheduler   pndm, ddim or dpm; the model's own where it is empty
        """
        denoising_steps(strength, steps)
        with _quiet():
            pipeline = self._pipeline(self.sampler(scheduler))
            result = pipeline(
                image=latents.to(self.device, self.dtype),
                prompt_embeds=embeds.to(self.device, self.dtype),
                negative_prompt_embeds=negative.to(self.device, self.dtype),
                generator=list(generators),
                strength=strength,
                guidance_scale=guidance,
                num_inference_steps=steps,
                output_type="pt",
            )
        flags = result.nsfw_content_detected
        return result.images.float().cpu(), [bool(flag) for flag in flags or [False] * len(latents)]

    def sampler(self, name: str = "") -> Any:
        """A scheduler of the model's noise schedule, by a name of `SCHEDULERS`; the model's own kind where empty."""
        import diffusers

        kind = getattr(diffusers, SCHEDULERS[name]) if name else type(self.scheduler)
        with _quiet():
            # Latents are not bounded as pixels are; configs of schedulers that never clip do not say so.
            return kind.from_config(self.scheduler.config, **({"clip_sample": False} if name == "ddim" else {}))

    def noise(self) -> Any:
        """The model's noise schedule for training: `.alphas_cumprod`, `.add_noise`, `.config.prediction_type`."""
        from diffusers import DDPMScheduler

        with _quiet():
            return DDPMScheduler.from_config(self.scheduler.config)

    def save(self, folder: Path | str, note: Callable[[Path], object] = lambda made: None) -> None:
        """Write all parts as one pipeline folder of diffusers, whole or not at all; `note` sees it before it gets its
        name."""
        from diffusers import StableDiffusionPipeline

        with _quiet(), atomic_folder(folder) as temporary:
            pipeline = StableDiffusionPipeline(**self._parts(self.scheduler))
            pipeline.save_pretrained(temporary)
            note(temporary)

    def _pipeline(self, scheduler: Any) -> Any:
        from diffusers import StableDiffusionImg2ImgPipeline

        pipeline = StableDiffusionImg2ImgPipeline(**self._parts(scheduler))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def _parts(self, scheduler: Any) -> dict[str, Any]:
        parts = {part: getattr(self, part) for part in PARTS} | {"scheduler": scheduler}
        parts |= {"safety_checker": self.safety_checker, "feature_extractor": self.feature_extractor}
        return parts | {"requires_safety_checker": self.safety_checker is not None}


@contextmanager
def _quiet(bars: bool = False) -> Iterator[None]:
    """Within the block diffusers says nothing, as errors that it logs it raises too, and transformers nothing short of
    errors; `bars` leaves those of downloads."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        with quiet_transformers(bars):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _network(kind: str, part: str) -> Callable[[str, bool], Any]:
    def load(source: str, local: bool) -> Any:
        import diffusers

        check_index(Path(source) / part)
        options = {"subfolder": part, "local_files_only": local, "output_loading_info": True}
        net, report = getattr(diffusers, kind).from_pretrained(source, **options)
        # diffusers itself only warns of these, and draws them by chance.
        for name in sorted(report["missing_keys"]):
            raise ValueError(f"its {part} lacks {name}")
        return net

    return load


def _text_encoder(source: str, local: bool) -> Any:
    from transformers import CLIPTextModel

    return load_transformer(CLIPTextModel, source, local, subfolder="text_encoder")


def _tokenizer(source: str, local: bool) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", local_files_only=local)


def _scheduler(source: str, local: bool) -> Any:
    import diffusers

    config = diffusers.DDPMScheduler.load_config(source, subfolder="scheduler", local_files_only=local)
    return getattr(diffusers, config["_class_name"]).from_config(config)


def _safety_checker(source: str, local: bool) -> Any:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    return load_transformer(StableDiffusionSafetyChecker, source, local, subfolder="safety_checker")


def _feature_extractor(source: str, local: bool) -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor.from_pretrained(source, subfolder="feature_extractor", local_files_only=local)


_LOADERS: dict[str, Callable[[str, bool], Any]] = {
    "vae": _network("AutoencoderKL", "vae"),
    "unet": _network("UNet2DConditionModel", "unet"),
    "text_encoder": _text_encoder,
    "tokenizer": _tokenizer,
    "scheduler": _scheduler,
    "safety_checker": _safety_checker,
    "feature_extractor": _feature_extractor,
}
