"""A frozen CLIP: images and sentences → one joint space. DIME-FM's teacher, its text tower, and a row to compare with.

Of the transformers library (a folder, a hub id or a published name) or of open_clip (`open_clip:ARCHITECTURE:TAG`, a
file in place of the tag). Embeddings are what the towers give behind their projections: in float32, not normalised.
Source: CLIP (Radford et al., ICML 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.diffusion import TINY, is_hub_id
from networks.tiny import tiny_clip
from networks.weights import (
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


class Clip:
    """A CLIP, frozen and in evaluation mode.

    name          where it is from
    net           the network, on its device and in its precision
    dim           width of the joint space
    image_size    side of the square images it takes, in pixels; mean, std: what those are normalised by
    logit_scale   what it multiplies cosines by
    """

    def __init__(
        self,
        name: str,
        net: Any,
        tokens: Callable[[list[str]], dict[str, Tensor]],
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        settings: Any,
    ) -> None:
        """tokens   sentences → the inputs of the text tower; settings: of the network, what its weights do not tell"""
        self.name, self.net, self.tokens, self.image_size = name, net.eval().requires_grad_(False), tokens, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.logit_scale = float(net.logit_scale.detach().float().exp())
        self._settings = settings

    @cached_property
    def dim(self) -> int:
        return self.texts(["a"]).shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all that determines the embeddings: weights as published, settings and tokenizer."""
        tokens = {name: value for name, value in self.tokens([_PROBE]).items() if name == "input_ids"}
        weights = sorted(self.net.named_parameters())
        kind = [type(self.net).__name__, self.image_size, self.mean, self.std, self._settings]
        names = [name for name, _ in weights]
        return digest("clip 1", kind, tokens["input_ids"][0].tolist(), names, *(value.float() for _, value in weights))

    def to(self, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Clip:
        """Move it; another precision than float32 is noted after the fingerprint of the weights as they were."""
        if dtype != torch.float32:
            self.fingerprint  # noqa: B018
        self.net.to(device, dtype)
        return self

    @torch.no_grad()
    def images(self, pixels: Tensor) -> Tensor:
        """Embeddings (B, dim) float32 of normalised images (B, 3, S, S)."""
        weight = next(self.net.parameters())
        return self.embed_images(pixels.to(weight.device, weight.dtype)).float()

    @torch.no_grad()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Embeddings (B, dim) float32 of sentences; of one that is too long, its beginning's."""
        if not sentences:
            return torch.zeros(0, self.dim)
        device = next(self.net.parameters()).device
        return self.embed_texts(
            {name: value.to(device) for name, value in self.tokens(list(sentences)).items()}
        ).float()

    def embed_images(self, pixels: Tensor) -> Tensor:
        """(B, 3, S, S) on the network's device → (B, dim), with a graph where the network learns."""
        return _embeddings(self.net.get_image_features(pixel_values=pixels))

    def embed_texts(self, tokens: dict[str, Tensor]) -> Tensor:
        """What `tokens` gave, on the network's device → (B, dim), with a graph where the network learns."""
        return _embeddings(self.net.get_text_features(**tokens))


class _OpenClip(Clip):
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
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=local)
        text, vision = net.config.text_config, net.config.vision_config
        limit = text.max_position_embeddings

        def tokens(sentences: list[str]) -> dict[str, Tensor]:
            options = {"padding": "longest", "truncation": True, "max_length": limit, "return_tensors": "pt"}
            return {**tokenizer(sentences, **options)}

        keys = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "eos_token_id")
        settings = [[getattr(part, key, None) for key in keys] for part in (text, vision)]
        return Clip(name, net, tokens, vision.image_size, *_normalisation(place, local), settings)

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
        net = open_clip.create_model(name, load_weights=False)
        state = {key.removeprefix("module."): value for key, value in read_state(file, flag).items()}
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


def _open_clip(source: str, net: nn.Module, name: str) -> Clip:
    import open_clip

    tokenizer = open_clip.get_tokenizer(name)
    about = net.visual.preprocess_cfg
    size = about["size"] if isinstance(about["size"], int) else about["size"][0]
    settings = [name, sorted({type(part).__name__ for part in net.modules()})]
    return _OpenClip(
        source, net, lambda texts: {"input_ids": tokenizer(texts)}, size, about["mean"], about["std"], settings
    )


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
