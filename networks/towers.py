"""The two towers of an image–text model: a backbone for images, a projection head for frozen sentence embeddings.

    u = normalise(image(x))        image: trainable, pretrained, without an image projection
    v = normalise(text(y))         text: Dropout and LayerNorm around a two-layer residual map of an embedding y (D,)

Source: VLDD (Wu et al., TMLR 2024), whose names for the backbones are kept; widths are read from the networks. With
`lora_rank` the backbone is frozen and only W = W₀ + (α/r) B A moves (Hu et al., ICLR 2022). With `image_projection`
images have a head as texts do; on a frozen backbone the two heads are all that learns (RepBlend, arXiv 2505.14705).

Trajectories record trainable weights alone, so whatever is frozen must be the same in every network that shares them:
frozen weights without a file, and the A of every LoRA, are drawn from one fixed seed, not from the network's own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from networks import build_network
from networks.flat import FlatModule
from networks.heads import LoRALinear, ProjectionHead
from networks.layers import wide
from networks.weights import (
    from_cache_or_hub,
    from_folder_or_hub,
    load_state,
    load_transformer,
    read_state,
)
from utils.config import option
from utils.errors import UserError, first_line
from utils.registry import nearest
from utils.rng import derive_seed, seeded

# Published names → timm's, and what VLDD took from each: pooled features, or the logits of 1000 ImageNet classes.
TIMM_NAMES = {
    "nfnet": ("nfnet_l0", "features"),
    "nf_resnet50": ("nf_resnet50", "logits"),
    "nf_regnet": ("nf_regnet_b1", "logits"),
    "vit": ("vit_tiny_patch16_224", "logits"),
    "vit_tiny": ("vit_tiny_patch16_224", "logits"),
    "resnet18": ("resnet18", "features"),
    "resnet18_gn": ("resnet18", "features"),
    "resnet50": ("resnet50", "features"),
}
CLIP = "openai/clip-vit-base-patch32"
Blend = Callable[[Tensor], Tensor]  # (B, width) → the same, each row mixed with others
FROZEN_SEED = 0  # of all that is frozen and random; one for all networks (see above)


@dataclass(frozen=True)
class TowerConfig:
    """The networks: which, from which weights, how wide, and which of their weights learn."""

    image_encoder: str = option(
        "nfnet", f"{', '.join(TIMM_NAMES)}, clip, ConvNet (ConvNetD3W64BN, …), mlp, any other timm name, a CLIP folder"
    )
    image_pretrained: bool = option(True, "published image weights, for the networks that have any (ConvNets do not)")
    image_weights: str = option("", "state dict of the image network, .pt or .safetensors, in place of published ones")
    image_output: str = option(
        "auto", "what the image tower gives; auto: as published", choices=("auto", "features", "logits")
    )
    image_trainable: bool = option(True, "whether the image tower learns; its projection head always does")
    image_projection: bool = option(
        False, "a projection head on images too, as on texts (RepBlend)", aliases=("only_has_image_projection",)
    )
    text_encoder: str = option("bert", "bert, distilbert, clip, tfidf (no download), a local folder or a hub id")
    text_pretrained: bool = option(True, "published text weights; false: the same network with fixed random weights")
    text_weights: str = option("", "state dict, or folder, of the text encoder in place of published weights")
    text_pooling: str = option(
        "cls", "sentence embedding of a BERT-like encoder: first token, or mean over tokens", choices=("cls", "mean")
    )
    text_dim: int = option(256, "width of tfidf embeddings, at most", low=1)
    text_cache: str = option("", "folder with published {dataset}_{text_encoder}_[train_]text_embed.npz files")
    dropout: float = option(0.1, "dropout probability of the projection heads", low=0)
    joint_width: int = option(
        0, "joint width E, by a last linear layer (or the head) of the image tower; 0: its own width", low=0
    )
    lora_rank: int = option(0, "rank of LoRA in the frozen image network; 0: off, all of it learns", low=0)
    lora_alpha: float = option(4.0, "LoRA's scale is lora_alpha / lora_rank", above=0)
    lora_targets: tuple[str, ...] = option(("qkv", "proj"), "linear layers with one of these in their name get LoRA")

    def check(self) -> None:
        if self.dropout >= 1:
            raise UserError(f"--dropout is {self.dropout}; it must be less than 1")
        if self.lora_rank and not self.image_trainable:
            raise UserError("--lora_rank trains the image tower; drop it, or drop --image_trainable false")
        if self.lora_rank and not self.lora_targets:
            raise UserError("--lora_rank needs --lora_targets, parts of the names of linear layers")


class ImageTower(nn.Module):
    """(B, 3, H, W) → (B, width): a trunk and, where asked for, one linear layer or a projection head.

    A trunk in which nothing learns stays in evaluation mode, so its BatchNorm statistics stay too, and what it makes of
    an image stays: `encode` computes that once, and all else begins with what `encode` gave.
    """

    def __init__(self, trunk: nn.Module, joint: nn.Module, trunk_width: int, width: int) -> None:
        super().__init__()
        self.trunk, self.joint, self.trunk_width, self.width = trunk, joint, trunk_width, width
        self.frozen = not _learns(trunk)

    def encode(self, images: Tensor) -> Tensor:
        """Features (B, F) of images (B, 3, H, W) where the trunk is frozen; where it learns, the images themselves."""
        return self.trunk(images) if self.frozen else images

    def forward(self, encoded: Tensor, blend: Blend | None = None) -> Tensor:
        features = encoded if self.frozen else self.trunk(encoded)
        return self.joint(features if blend is None else blend(features))

    def train(self, mode: bool = True) -> ImageTower:
        super().train(mode)
        if self.frozen:
            self.trunk.eval()
        return self


class Towers(nn.Module):
    """An image tower and a text head into one space of width E, and both as functions of flat weight vectors.

    flat   group → FlatModule: `img` (where any of it learns) and `txt`
    """

    def __init__(
        self,
        image: ImageTower,
        text: ProjectionHead,
        start: dict[str, Tensor],
        draw: Callable[[int], dict[str, Tensor]],
    ) -> None:
        """start   what `renew` goes back to; draw(seed) what it draws again: parts of the state dict"""
        super().__init__()
        self.image, self.text, self.width = image, text, image.width
        towers = {"img": image, "txt": text}
        self.flat = {group: FlatModule(tower) for group, tower in towers.items() if _learns(tower)}
        self.frozen_trunk = image.frozen
        self._start, self._draw = start, draw

    def encode(self, images: Tensor) -> Tensor:
        """Of images (B, 3, H, W) what stays while the towers learn: a frozen trunk's features, else the images."""
        return self.image.encode(images)

    def embed_encoded(self, encoded: Tensor) -> Tensor:
        """What `encode` gave → (B, E), rows of length 1, with the modules' own weights."""
        return F.normalize(wide(self.image(encoded)), dim=-1)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, E), rows of length 1, with the modules' own weights."""
        return self.embed_encoded(self.encode(images))

    def embed_texts(self, texts: Tensor) -> Tensor:
        """Sentence embeddings (B, D) → (B, E), rows of length 1, with the modules' own weights."""
        return F.normalize(wide(self.text(texts)), dim=-1)

    def functional(
        self, params: dict[str, Tensor], encoded: Tensor, texts: Tensor, blend: Blend | None = None
    ) -> tuple[Tensor, Tensor]:
        """Both embeddings (B, E), rows of length 1, with the weights of `params`: group → flat vector.

        encoded   what `encode` gave
        blend     what happens to the trunk's features and to the sentence embeddings, in front of the heads
        """
        image = self.flat["img"](params["img"], encoded, blend) if "img" in self.flat else self.image(encoded, blend)
        text = self.flat["txt"](params["txt"], texts if blend is None else blend(texts))
        return F.normalize(wide(image), dim=-1), F.normalize(wide(text), dim=-1)

    def flatten(self) -> dict[str, Tensor]:
        """A copy of the current trainable weights: group → flat vector."""
        return {group: flat.flatten() for group, flat in self.flat.items()}

    def load(self, params: dict[str, Tensor]) -> None:
        """Write flat vectors into the modules, for ordinary training and evaluation."""
        for group, flat in self.flat.items():
            flat.load(params[group])

    def renew(self, seed: int) -> Towers:
        """Make these what `build_towers` gives for `seed`, without reading any weights again; returns self."""
        self.load_state_dict(self._start | self._draw(seed), strict=False)
        return self


def build_towers(
    cfg: TowerConfig, text_width: int, image_size: int, seed: int, device: torch.device | str = "cpu"
) -> Towers:
    """Towers for (B, 3, image_size, image_size) images and (B, text_width) sentence embeddings, in training mode.

    All that is neither loaded nor frozen is drawn from `seed`. UserError for an unknown network or weights that are
    not to be had.
    """
    image = build_image_tower(cfg, image_size, seed)
    text = _draw_head(cfg, text_width, image.width, seed)
    drawn = cfg.image_trainable and not cfg.lora_rank and not (cfg.image_weights or _is_published(cfg))

    def draw(seed: int) -> dict[str, Tensor]:
        parts: dict[str, nn.Module] = {"text": _draw_head(cfg, text_width, image.width, seed)}
        if drawn:
            parts["image"] = build_image_tower(cfg, image_size, seed)
        elif _learns(image.joint):
            parts["image.joint"] = _draw_joint(cfg, image.trunk_width, seed)
        return {f"{at}.{name}": value for at, part in parts.items() for name, value in part.state_dict().items()}

    # Of a trunk that is not drawn by chance, a copy of what training changes.
    fixed = {name for name, weight in image.named_parameters() if not weight.requires_grad}
    state = {} if drawn else {name: value for name, value in image.state_dict().items() if name not in fixed}
    start = {f"image.{name}": value.clone() for name, value in state.items() if name.startswith("trunk.")}
    return Towers(image, text, start, draw).to(device)


def build_image_tower(cfg: TowerConfig, image_size: int, seed: int) -> ImageTower:
    """The image tower of `cfg` for (B, 3, image_size, image_size); `.width` is read from the network."""
    frozen = not cfg.image_trainable
    with seeded(derive_seed(FROZEN_SEED if frozen or cfg.lora_rank else seed, "trunk")):
        trunk = _build_trunk(cfg, image_size)
    # Fused attention has no second derivative, which matching needs.
    for module in trunk.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    width = _probe_width(trunk, cfg.image_encoder, image_size)
    if cfg.lora_rank:
        _add_lora(trunk, cfg)
    learns = cfg.image_trainable or cfg.image_projection
    joint = _draw_joint(cfg, width, seed if learns else FROZEN_SEED).requires_grad_(learns)
    if frozen:
        trunk.requires_grad_(False)
    return ImageTower(trunk, joint, width, cfg.joint_width or width).train()


def _build_trunk(cfg: TowerConfig, image_size: int) -> nn.Module:
    name = cfg.image_encoder
    if _is_ours(name):
        _refuse_logits(cfg)
        trunk = build_network(name, image_size)
        if cfg.image_weights:
            load_state(trunk, read_state(cfg.image_weights, "image_weights"), cfg.image_weights, ("classifier.",))
        return trunk
    if name == "clip" or Path(name).is_dir():
        _refuse_logits(cfg)
        return _ClipTrunk(cfg, image_size)
    return _build_timm(cfg, image_size)


def _is_ours(name: str) -> bool:
    """Whether an image encoder is of this toolkit; a name that timm knows too, such as resnet18, means timm's."""
    return name.lower().startswith("convnet") or name.lower() == "mlp"


def _refuse_logits(cfg: TowerConfig) -> None:
    if cfg.image_output == "logits":
        raise UserError(f"--image_encoder {cfg.image_encoder} has no classes; drop --image_output logits")


def _build_timm(cfg: TowerConfig, image_size: int) -> nn.Module:
    import timm
    from timm.layers import GroupNorm

    name, published = TIMM_NAMES.get(cfg.image_encoder, (cfg.image_encoder, "features"))
    if name.split(".")[0] not in timm.list_models():
        known = [*TIMM_NAMES, "clip", "ConvNet", "mlp", *timm.list_models()]
        raise UserError(
            f"unknown image encoder '{cfg.image_encoder}'{nearest(cfg.image_encoder, known)}; "
            f"published: {', '.join(TIMM_NAMES)}, clip; also ConvNets, mlp and every timm model"
        )
    about = timm.get_pretrained_cfg(name)
    logits = (published if cfg.image_output == "auto" else cfg.image_output) == "logits"
    options: dict = {} if logits else {"num_classes": 0}
    if about and about.fixed_input_size and about.input_size[-1] != image_size:  # one position embedding a patch
        options["img_size"] = image_size
    if cfg.image_encoder == "resnet18_gn":
        options["norm_layer"] = GroupNorm  # 32 groups; no statistics beside the weights
    try:
        if _is_published(cfg) and not cfg.image_weights:
            return _timm_pretrained(name, options)
        trunk = timm.create_model(name, **options)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(f"timm cannot build '{name}' for {image_size} pixels ({first_line(error)})") from None
    if cfg.image_weights:
        state = read_state(cfg.image_weights, "image_weights")
        # What timm itself does to published files: old names, position embeddings of another image size.
        adapt = getattr(sys.modules[type(trunk).__module__], "checkpoint_filter_fn", None)
        heads = (about and about.classifier) or ()
        heads = [f"{head}." for head in ((heads,) if isinstance(heads, str) else heads)]
        load_state(trunk, adapt(state, trunk) if adapt else state, cfg.image_weights, drop=[] if logits else heads)
    return trunk


def _timm_pretrained(name: str, options: dict) -> nn.Module:
    import timm
    from huggingface_hub import try_to_load_from_cache

    def load(local: bool) -> nn.Module:
        if not local:
            return timm.create_model(name, pretrained=True, **options)
        # timm always asks the hub first, so the cache is looked up here.
        repo = timm.get_pretrained_cfg(name).hf_hub_id
        paths = (try_to_load_from_cache(repo, file) for file in ("model.safetensors", "pytorch_model.bin"))
        path = next(path for path in paths if isinstance(path, str))
        # Some versions of timm would run what is in a pickled file, so it is read here.
        found = {"file": path} if path.endswith(".safetensors") else {"state_dict": read_state(path, "image_encoder")}
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=found, **options)

    return from_cache_or_hub(
        load, f"pretrained weights of {name}", "pass --image_weights FILE or --image_pretrained false"
    )


class _ClipTrunk(nn.Module):
    """CLIP's vision transformer and its projection: (B, 3, H, W) → (B, E)."""

    def __init__(self, cfg: TowerConfig, image_size: int) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        source = CLIP if cfg.image_encoder == "clip" else cfg.image_encoder
        eager = {"attn_implementation": "eager"}  # as for timm: fused attention has no second derivative
        if cfg.image_pretrained and not cfg.image_weights:
            self.net = from_folder_or_hub(
                lambda local: load_transformer(CLIPVisionModelWithProjection, source, local, **eager),
                source,
                "image encoder",
                f"pretrained CLIP vision weights of {source}",
                "pass --image_weights FILE or --image_pretrained false",
            ).float()
        else:
            # The library's default configuration is that of ViT-B/32.
            shape = CLIPVisionConfig() if source == CLIP else CLIPVisionConfig.from_pretrained(source)
            self.net = CLIPVisionModelWithProjection._from_config(shape, **eager)
        if cfg.image_weights:
            state = read_state(cfg.image_weights, "image_weights")
            # A whole CLIP has a text side, and (in old files) position numbers, that this tower lacks.
            drop = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")
            load_state(self.net, state, cfg.image_weights, drop)
        # Position embeddings are stretched where the images have another size.
        self.options = {} if image_size == self.net.config.image_size else {"interpolate_pos_encoding": True}

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images, **self.options).image_embeds


def _is_published(cfg: TowerConfig) -> bool:
    """Whether the image encoder starts from published weights; those trained from scratch have none."""
    return cfg.image_pretrained and not _is_ours(cfg.image_encoder) and cfg.image_encoder != "resnet18_gn"


def _probe_width(trunk: nn.Module, name: str, image_size: int) -> int:
    weight = next(trunk.parameters())
    try:
        with torch.no_grad():
            output = trunk.eval()(weight.new_zeros(1, 3, image_size, image_size))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UserError(f"{name} cannot take images of {image_size} pixels ({first_line(error)})") from None
    if output.ndim != 2 or output.numel() == 0:
        raise UserError(f"{name} gives an output of shape {tuple(output.shape)} for one image, not one vector")
    return output.shape[1]


def _add_lora(trunk: nn.Module, cfg: TowerConfig) -> None:
    trunk.requires_grad_(False)
    linear = {name: module for name, module in trunk.named_modules() if isinstance(module, nn.Linear)}
    chosen = [name for name in linear if any(part in name for part in cfg.lora_targets)]
    if not chosen:
        raise UserError(
            f"no linear layer of {cfg.image_encoder} has {' or '.join(cfg.lora_targets)} in its name; "
            f"--lora_targets must match some of: {', '.join(list(linear)[:8]) or 'none, it is convolutional'}"
        )
    for name in chosen:
        parent, _, child = name.rpartition(".")
        with seeded(derive_seed(FROZEN_SEED, "lora", name)):
            lora = LoRALinear(linear[name], cfg.lora_rank, cfg.lora_alpha)
        setattr(trunk.get_submodule(parent), child, lora)


def _draw_head(cfg: TowerConfig, text_width: int, width: int, seed: int) -> ProjectionHead:
    with seeded(derive_seed(seed, "text")):
        return ProjectionHead(text_width, width, cfg.dropout)


def _draw_joint(cfg: TowerConfig, width: int, seed: int) -> nn.Module:
    with seeded(derive_seed(seed, "joint")):
        if cfg.image_projection:
            return ProjectionHead(width, cfg.joint_width or width, cfg.dropout)
        return nn.Linear(width, cfg.joint_width) if cfg.joint_width else nn.Identity()


def _learns(module: nn.Module) -> bool:
    return any(weight.requires_grad for weight in module.parameters())
