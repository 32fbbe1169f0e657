"""A frozen CLIP: images and sentences → one joint space. DIME-FM's teacher, its text tower, and a row to compare with.

Of the transformers library (a folder, a hub id or a published name) or of open_clip (`open_clip:ARCHITECTURE:TAG`, a
file in place of the tag). Embeddings are what the towers give behind their projections: in float32, not normalised.
Source: CLIP (Radford et al., ICML 2021).
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from networks.diffusion import TINY, is_hub_id
from networks.tiny import tiny_clip
from networks.weights import (
    NO_CODE,
    from_cache_or_hub,
    from_folder_or_hub,
    load_state,
    load_transformer,
    quiet_transformers,
    read_state,
)
from utils.errors import UserError
from utils.files import digest
from utils.registry import nearest
from utils.rng import seeded

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
HUB_IDS = {
    "ViT-B/32": "openai/clip-vit-base-patch32",
    "ViT-B/16": "openai/clip-vit-base-patch16",
    "ViT-L/14": "openai/clip-vit-large-patch14",
    "ViT-L/14@336px": "openai/clip-vit-large-patch14-336",
}
_PUBLISHED = HUB_IDS | {name.replace("/", "-"): source for name, source in HUB_IDS.items()}
_OPEN_CLIP = "open_clip:"
# What two tokenizers that differ hardly agree on: case, digits, marks, accents, other alphabets, a long word.
_PROBE = "Two  CAFÉS' doors, no. 1902 – it's naïve & 漢字! antidisestablishmentarianism <b>red</b>"


class Clip(ABC):
    """A CLIP, frozen and in evaluation mode.

    name          where it is from
    net           the network, on its device and in its precision
    dim           width of the joint space
    image_size    side of the square images it takes, in pixels; mean, std: what these are normalised by
    logit_scale   what it multiplies cosines by
    """

    def __init__(
        self,
        name: str,
        net: Any,
        tokenizer: Any,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Sequence[Any],
    ) -> None:
        """settings   what the network does that its weights do not tell, for the fingerprint"""
        self.name, self.net, self.tokenizer = name, net.eval().requires_grad_(False), tokenizer
        self.image_size, self.mean, self.std = image_size, tuple(mean), tuple(std)
        self._settings = list(settings)

    @cached_property
    def dim(self) -> int:
        return self.texts(["a"]).shape[1]

    @property
    def logit_scale(self) -> float:
        return float(self.net.logit_scale.detach().float().exp())

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that determines the embeddings: weights, as they are stored, settings and tokenizer."""
        kind = [type(self.net).__name__, self.image_size, self.mean, self.std, self._settings]
        tokens = self.tokens([_PROBE])["input_ids"][0].tolist()
        weights = sorted(self.net.named_parameters(), key=lambda named: named[0])
        return digest("clip 1", kind, tokens, [name for name, _ in weights], *(value.float() for _, value in weights))

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Clip:
        """Move it there, and into that precision; returns self."""
        if dtype != torch.float32:
            _ = self.fingerprint  # kept from here on: that of rounded weights would be another
        self.net.to(device, dtype)
        return self

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, dim) float32, on the network's device, of normalised images (B, 3, S, S)."""
        weight = next(self.net.parameters())
        return self.embed_images(pixels.to(weight.device, weight.dtype)).float()

    @torch.no_grad()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings (B, dim) float32, on the network's device, of sentences; one too long is cut, its end kept."""
        device = next(self.net.parameters()).device
        if not sentences:
            return torch.zeros(0, self.dim, device=device)
        return self.embed_texts({name: value.to(device) for name, value in self.tokens(sentences).items()}).float()

    @abstractmethod
    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """The text tower's inputs, (B, L) each, of which `input_ids` is one."""

    @abstractmethod
    def embed_images(self, pixels: Tensor) -> Tensor:
        """`images` without a change of device or precision; with a graph, where the network learns."""

    @abstractmethod
    def embed_texts(self, tokens: dict[str, Tensor]) -> Tensor:
        """Embeddings (B, dim) of what `tokens` gave, on the network's device; with a graph, where it learns."""


class TransformersClip(Clip):
    """A `CLIPModel` of the transformers library."""

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        limit = self.net.config.text_config.max_position_embeddings
        options = {"padding": "longest", "truncation": True, "max_length": limit, "return_tensors": "pt"}
        found = self.tokenizer(list(sentences), **options)
        return {name: found[name] for name in ("input_ids", "attention_mask")}

    def embed_images(self, pixels: Tensor) -> Tensor:
        return _embeddings(self.net.get_image_features(pixel_values=pixels))

    def embed_texts(self, tokens: dict[str, Tensor]) -> Tensor:
        return _embeddings(self.net.get_text_features(**tokens))


class OpenClip(Clip):
    """A network of open_clip."""

    def tokens(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        return {"input_ids": self.tokenizer(list(sentences))}

    def embed_images(self, pixels: Tensor) -> Tensor:
        return self.net.encode_image(pixels)

    def embed_texts(self, tokens: dict[str, Tensor]) -> Tensor:
        return self.net.encode_text(tokens["input_ids"])


def load_clip(
    source: str,
    cache_dir: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    flag: str = "teacher",
) -> Clip:
    """The CLIP of a folder, a hub id, a published name (ViT-L/14), `open_clip:ARCHITECTURE:TAG` (or a file in place of
    the tag), or "tiny", which is made below `cache_dir` with random weights.

    UserError naming `--flag` where it is not to be had.
    """
    with seeded(0):  # some versions draw a network before they load it
        if source.startswith(_OPEN_CLIP):
            return _load_open_clip(source, flag).to(device, dtype)
        place = str(tiny_clip(cache_dir)) if source == TINY else _PUBLISHED.get(source, source)
        return _load_transformers(source, place, flag).to(device, dtype)


def _load_transformers(name: str, place: str, flag: str) -> Clip:
    folder = Path(place).expanduser()
    if not folder.is_dir() and not is_hub_id(place):
        raise UserError(
            f"no CLIP at {place}{nearest(name, HUB_IDS)}; --{flag} takes a CLIPModel's folder or hub id, "
            f"{', '.join(HUB_IDS)}, open_clip:ARCHITECTURE:TAG or tiny"
        )
    place = str(folder) if folder.is_dir() else place

    def load(local: bool) -> Clip:
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        kind = CLIPConfig.get_config_dict(place, local_files_only=local)[0].get("model_type")
        if kind != "clip":
            raise ValueError(f"its config says model_type {kind}, not clip")
        net: Any = load_transformer(CLIPModel, place, local)
        with quiet_transformers(bars=not local):
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local, **NO_CODE)
        parts = (net.config.text_config, net.config.vision_config)
        keys = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "eos_token_id")
        settings = [getattr(part, key, None) for part in parts for key in keys]
        return TransformersClip(name, net, tokenizer, parts[1].image_size, *_normalisation(place, local), settings)

    remedy = f"pass --{flag} FOLDER or --{flag} tiny"
    return from_folder_or_hub(load, place, "CLIP", f"the weights of {place}", remedy)


def _normalisation(place: str, local: bool) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std beside the weights; CLIP's, where nothing is said of them."""
    from transformers import CLIPImageProcessor

    try:
        said, _ = CLIPImageProcessor.get_image_processor_dict(place, local_files_only=local)
    except OSError:
        said = {}
    return said.get("image_mean", CLIP_MEAN), said.get("image_std", CLIP_STD)


def _embeddings(output: Any) -> Tensor:
    """A tensor in version 4 of the transformers library; since 5 it comes in an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _load_open_clip(source: str, flag: str) -> Clip:
    import open_clip

    name, _, weights = source.removeprefix(_OPEN_CLIP).partition(":")
    if name not in open_clip.list_models():
        raise UserError(f"--{flag} {source}: open_clip has no '{name}'{nearest(name, open_clip.list_models())}")
    published = open_clip.get_pretrained_cfg(name, weights)
    file = Path(weights).expanduser()
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not published and not file.is_file():
        raise UserError(
            f"--{flag} {source}: '{weights}' is neither a file nor a tag of {name}{nearest(weights, tags)}; "
            f"its tags: {', '.join(tags) or 'none'}"
        )
    if not published:
        state = {key.removeprefix("module."): value for key, value in read_state(file, flag).items()}
        with _quiet():  # it warns of weights drawn by chance
            net = open_clip.create_model(name, pretrained_hf=False)
        load_state(net, state, str(file))
        return _open_clip(source, net, name)

    def load(local: bool) -> Clip:
        path = _cached(published) if local else open_clip.download_pretrained(published)
        # The tag says what its weights were trained with; the architecture's own settings may say otherwise.
        said = {key: published[key] for key in ("mean", "std") if key in published}
        net = open_clip.create_model(
            name, str(path), force_quick_gelu=published.get("quick_gelu", False), force_preprocess_cfg=said
        )
        return _open_clip(source, net, name)

    what, remedy = f"the weights of {source}", f"pass --{flag} {_OPEN_CLIP}{name}:FILE or --{flag} tiny"
    return from_cache_or_hub(load, what, remedy)


def _open_clip(source: str, net: Any, name: str) -> Clip:
    import open_clip

    about = net.visual.preprocess_cfg
    sides = {about["size"]} if isinstance(about["size"], int) else {*about["size"]}
    if len(sides) > 1:
        raise UserError(f"{source} takes images of {about['size']} pixels; only square ones are supported")
    settings = [name, sorted({type(part).__name__ for part in net.modules()})]
    return OpenClip(source, net, open_clip.get_tokenizer(name), *sides, about["mean"], about["std"], settings)


@contextmanager
def _quiet() -> Iterator[None]:
    """Within the block no library logs anything short of errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _cached(published: dict[str, Any]) -> str:
    """The file of a tag in the local cache; FileNotFoundError where it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from open_clip.constants import HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME

    repo, _, file = published.get("hf_hub", "").rpartition("/")
    names = [file, f"{file.rpartition('.')[0]}.safetensors"] if file else [HF_SAFE_WEIGHTS_NAME, HF_WEIGHTS_NAME]
    for path in (try_to_load_from_cache(repo, each) for each in names if repo):
        if isinstance(path, str):
            return path
    raise FileNotFoundError(repo)
