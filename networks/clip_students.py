"""Small image encoders that learn a CLIP's joint space (DIME-FM): a trunk, and a linear projection without a bias.

    --student vit_b_32     CLIP's own ViT-B/32 in QuickGELU, from scratch (the published student)
    --student swin_t       Swin-T, stochastic depth 0.2 (the other published one)
    --student timm:NAME    any network of timm, from scratch
    --student vit_tiny     for demonstrations: 32 pixels, two layers, four patches (with 16 it is slow to learn shapes)

`--student_config_file` reads the published yaml files instead. What a student is, without its weights, is a
`StudentSpec`; a saved student has it beside the weights, in a published one it is read off the shapes.
"""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from networks.clip import CLIP_MEAN, CLIP_STD
from networks.weights import load_state
from utils.config import option
from utils.errors import UserError, first_line
from utils.files import load_tensors
from utils.parsing import parse_yaml
from utils.registry import nearest
from utils.rng import seeded

FORMAT = "clip student 1"
_SWIN_TABLES = (".relative_position_index", ".attn_mask")  # which follow from the sizes
_TIMM = "timm:"
_SWIN = "swin_tiny_patch4_window7_224"  # whose settings the options of a Swin replace
# Weights whose names have one of these do not decay, whatever their shape: the published list, in which
# `absolute_pos_embed` is shortened to what timm calls it.
_NO_DECAY = ("positional_embedding", "token_embedding", "pos_embed", "relative_position_bias_table")
# The keys of the published yaml files, by their kind; those of their text towers, which are not built, are passed over.
_VIT_KEYS = ("NAME", "EMBED_DIM", "IMAGE_RESOLUTION", "VISION_LAYERS", "VISION_WIDTH", "VISION_PATCH_SIZE")
_VIT_TEXT = ("CONTEXT_LENGTH", "VOCAB_SIZE", "TRANSFORMER_WIDTH", "TRANSFORMER_HEADS", "TRANSFORMER_LAYERS")
_UNICL_KEYS = ("NAME", "DIM_PROJECTION", "IMAGE_ENCODER")


@dataclass(frozen=True)
class StudentSpec:
    """What a student is made of.

    kind         vit (CLIP's) or timm
    image_size   side of its square images, in pixels
    options      vit: width, layers, heads, patch_size; timm: model, and what its builder takes
    dim          width of the joint space that it is for; 0: any
    """

    name: str
    kind: str
    image_size: int
    options: dict[str, Any] = field(default_factory=dict)
    dim: int = 0


SPECS = {
    "vit_b_32": StudentSpec("vit_b_32", "vit", 224, {"width": 768, "layers": 12, "heads": 12, "patch_size": 32}),
    "swin_t": StudentSpec("swin_t", "timm", 224, {"model": _SWIN, "drop_path_rate": 0.2}),
    "vit_tiny": StudentSpec("vit_tiny", "vit", 32, {"width": 64, "layers": 2, "heads": 4, "patch_size": 16}),
}


@dataclass(frozen=True)
class StudentConfig:
    """Which student."""

    student: str = option("vit_b_32", f"{', '.join(SPECS)}, or timm:NAME for any network of timm (from scratch)")
    student_config_file: str = option("", "published yaml of a student, TYPE CLIP or Unicl, in place of --student")
    student_size: int = option(0, "side of the student's images in pixels; 0: the network's own", low=0)

    def check(self) -> None:
        if self.student_config_file and self.student != "vit_b_32":
            raise UserError(f"--student {self.student} and --student_config_file both name a student; give one")
        if self.student_config_file:
            read_student_yaml(self.student_config_file)
        else:
            _named_spec(self.student)


class ImageStudent(nn.Module):
    """Normalised images (B, 3, S, S) → (B, dim): a trunk (`visual`) and a projection without a bias."""

    mean, std = CLIP_MEAN, CLIP_STD  # as in training, whatever the trunk's published weights were used to

    def __init__(self, visual: nn.Module, projection: Tensor, image_size: int) -> None:
        super().__init__()
        self.visual, self.projection = visual, nn.Parameter(projection)
        self.image_size, (self.width, self.dim) = image_size, projection.shape

    def features(self, pixels: Tensor) -> Tensor:
        """(B, width), in front of the projection."""
        return self.visual(pixels)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.features(pixels) @ self.projection


def student_spec(cfg: StudentConfig) -> StudentSpec:
    """The student that the flags name; UserError for one that does not exist."""
    if cfg.student_config_file:
        spec, passed = read_student_yaml(cfg.student_config_file)
        if passed:
            print(f"{cfg.student_config_file}: the text tower is the teacher's; passed over: {passed}", file=sys.stderr)
    else:
        spec = _named_spec(cfg.student)
    return dataclasses.replace(spec, image_size=cfg.student_size) if cfg.student_size else spec


def _named_spec(name: str) -> StudentSpec:
    if name.startswith(_TIMM):
        return _timm_spec(name)
    if name not in SPECS:
        raise UserError(f"unknown student '{name}'{nearest(name, SPECS)}; known: {', '.join(SPECS)}, timm:NAME")
    return SPECS[name]


def _timm_spec(name: str) -> StudentSpec:
    import timm

    model = name.removeprefix(_TIMM)
    if model.split(".")[0] not in timm.list_models():
        raise UserError(f"--student {name}: timm has no '{model}'{nearest(model, timm.list_models())}")
    about = timm.get_pretrained_cfg(model)
    return StudentSpec(name, "timm", about.input_size[-1] if about else 224, {"model": model})


def read_student_yaml(path: Path | str) -> tuple[StudentSpec, str]:
    """The student of a published yaml file, and the names of its keys that are for a text tower."""
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"no student config at {path}") from None
    except ValueError as error:
        raise UserError(f"student config {path} is not valid YAML ({first_line(error)})") from None
    try:
        model = dict(tree["MODEL"])
        kind = model.pop("TYPE")
        if kind not in ("CLIP", "Unicl"):
            raise UserError(f"student config {path}: MODEL.TYPE is {kind}, not CLIP or Unicl")
        spec = _vit_of_yaml(model) if kind == "CLIP" else _swin_of_yaml(model)
    except KeyError as error:
        raise UserError(f"student config {path} lacks the key {error.args[0]}") from None
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"student config {path} has a value of another kind ({first_line(error)})") from None
    known = (_VIT_KEYS, _VIT_TEXT) if kind == "CLIP" else (_UNICL_KEYS, ("TEXT_ENCODER",))
    for key in model.keys() - {*known[0], *known[1]}:
        raise UserError(f"student config {path}: unknown key MODEL.{key}{nearest(key, (*known[0], *known[1]))}")
    return spec, ", ".join(key for key in known[1] if key in model)


def _vit_of_yaml(model: dict[str, Any]) -> StudentSpec:
    dim, size, layers, width, patch = (int(model[key]) for key in _VIT_KEYS[1:])
    for key, number in zip(_VIT_KEYS[1:], (dim, size, layers, width, patch), strict=True):
        if number < 1:
            raise ValueError(f"{key} is {number}")
    options = {"width": width, "layers": layers, "heads": width // 64, "patch_size": patch}
    return StudentSpec(str(model["NAME"]), "vit", size, options, dim)


def _swin_of_yaml(model: dict[str, Any]) -> StudentSpec:
    encoder = model["IMAGE_ENCODER"]
    if encoder["TYPE"] != "swin":
        raise ValueError(f"IMAGE_ENCODER.TYPE is {encoder['TYPE']}, not swin")
    swin, options = encoder["SWIN"], {"model": _SWIN, "drop_path_rate": float(encoder["DROP_PATH_RATE"])}
    options |= {"embed_dim": int(swin["EMBED_DIM"]), "window_size": int(swin["WINDOW_SIZE"])}
    options |= {key.lower(): [int(number) for number in swin[key]] for key in ("DEPTHS", "NUM_HEADS")}
    return StudentSpec(str(model["NAME"]), "timm", 224, options, int(model["DIM_PROJECTION"]))


def build_student(spec: StudentSpec, dim: int) -> ImageStudent:
    """The student of a joint space of width `dim`, in training mode, with weights drawn by torch's global chance.

    UserError where there is none.
    """
    if spec.dim and spec.dim != dim:
        raise UserError(f"student {spec.name} is for a joint space of width {spec.dim}; the teacher's is {dim}")
    return _build_vit(spec, dim) if spec.kind == "vit" else _build_timm(spec, dim)


def _build_vit(spec: StudentSpec, dim: int) -> ImageStudent:
    """CLIP's vision transformer; class token, positions and projection are drawn from N(0, 1 / width)."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    patch = spec.options["patch_size"]
    if spec.image_size % patch:
        raise UserError(f"student {spec.name} cuts images into {patch} pixels; --student_size must be a multiple of it")
    shape = {"image_size": spec.image_size, "mlp_ratio": 4.0, "output_dim": dim, **spec.options}
    try:
        visual = VisionTransformer(act_layer=QuickGELU, **shape)
    except (ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"student {spec.name} cannot be built with {spec.options} ({first_line(error)})") from None
    for block in visual.transformer.resblocks:
        block.attn.in_proj_bias.register_hook(_but_keys)
    projection, visual.proj = visual.proj.detach(), None
    return ImageStudent(visual, projection, spec.image_size)


def _but_keys(gradient: Tensor) -> Tensor:
    """The gradient (3 width,) of the biases of queries, keys and values, that of keys exactly 0, as it is on paper.

    One number added to all of a query's scores is nothing to their softmax. Left to rounding, Adam would enlarge the
    noise to steps of full size, which differ from machine to machine and teach nothing.
    """
    queries, keys, values = gradient.chunk(3)
    return torch.cat([queries, torch.zeros_like(keys), values])


def _build_timm(spec: StudentSpec, dim: int) -> ImageStudent:
    import timm

    options = dict(spec.options)
    name = options.pop("model")
    about = timm.get_pretrained_cfg(name)
    if about and about.fixed_input_size and about.input_size[-1] != spec.image_size:
        options["img_size"] = spec.image_size
    try:
        visual = timm.create_model(name, num_classes=0, **options)
        with torch.no_grad():
            width = visual.eval()(torch.zeros(1, 3, spec.image_size, spec.image_size)).shape[1]
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UserError(
            f"timm cannot build {spec.name} for images of {spec.image_size} pixels ({first_line(error)})"
        ) from None
    projection = nn.init.trunc_normal_(torch.empty(width, dim), std=0.02)
    return ImageStudent(visual.train(), projection, spec.image_size)


def decay_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The optimizer's groups: weights that decay, and vectors, biases and positions, which do not."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, weight in net.named_parameters():
        if weight.requires_grad:
            plain = weight.ndim <= 1 or name.endswith("bias") or any(part in name for part in _NO_DECAY)
            (kept if plain else decayed).append(weight)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def student_state(net: ImageStudent, spec: StudentSpec, note: dict[str, Any]) -> dict[str, Any]:
    """A student as tensors and plain values, for `save_tensors`; `note`: of its teacher and its training."""
    return {
        "format": FORMAT,
        "spec": dataclasses.asdict(spec),
        "dim": net.dim,
        "note": note,
        "student": net.state_dict(),
    }


def load_student(
    path: Path | str, device: torch.device | str = "cpu"
) -> tuple[ImageStudent, StudentSpec, dict[str, Any]]:
    """A student of ours or a published one, in evaluation mode, with its spec and note ({} of a published one).

    UserError for any other file, naming the first tensor that does not fit.
    """
    state = load_tensors(path, "student")
    if not isinstance(state, dict):
        raise UserError(f"student {path} holds {type(state).__name__}, not a student")
    note: dict[str, Any] = {}
    if "format" in state:
        if re.fullmatch(r"clip student \d+", str(state["format"])) and state["format"] != FORMAT:
            raise UserError(f"{path} is of format {state['format']!r}, newer than '{FORMAT}'; update the toolkit")
        if state["format"] != FORMAT:
            raise UserError(f"student {path} is of the format '{state['format']}', not '{FORMAT}'; it is no student")
        spec, note, dim, weights = _noted(state, f"student {path}")
    elif {"student", "optimizer"} <= state.keys():
        raise UserError(f"{path} is a checkpoint of a run, not a student; give student.pt, which is beside it")
    else:
        spec, dim, weights = _published(state, f"student {path}")
    with seeded(0):  # what is drawn here is not kept, nor should anything else's chance hang on it
        net = build_student(spec, dim)
    load_state(net, weights, f"student {path}")
    return net.to(device).eval(), spec, note


def _noted(state: dict[str, Any], where: str) -> tuple[StudentSpec, dict[str, Any], int, dict[str, Tensor]]:
    """Spec, note, width of the joint space and weights of a student of ours."""
    try:
        spec, note, dim, weights = StudentSpec(**state["spec"]), state["note"], state["dim"], state["student"]
        whole = {"patch_size"} if spec.kind == "vit" else {"model"}
        if not whole <= spec.options.keys() or not (isinstance(note, dict) and isinstance(weights, dict)):
            raise TypeError
        return spec, note, int(dim), weights
    except (KeyError, TypeError, AttributeError, ValueError):
        raise UserError(f"{where} is damaged: it lacks parts of a student; restore or train it again") from None


def _published(state: dict[str, Any], where: str) -> tuple[StudentSpec, int, dict[str, Tensor]]:
    """Spec, width of the joint space and weights, under our names, of a published checkpoint."""
    inner = state.get("image_state_dict", state)
    found = {
        str(name).removeprefix("module."): value
        for name, value in (inner if isinstance(inner, dict) else {}).items()
        if isinstance(value, Tensor)
    }
    try:
        if "visual.conv1.weight" in found:
            spec, rename = _vit_of_shapes(found), _vit_name
        elif "image_encoder.patch_embed.proj.weight" in found:
            spec, rename = _swin_of_shapes(found), _swin_name
        else:
            raise ValueError
    except (ValueError, TypeError, IndexError):
        first = next(iter(found), "")
        about = f"begins with '{first}' {tuple(found[first].shape)}" if found else "holds no tensors"
        raise UserError(f"{where} {about}; it is no ViT or Swin of this kind") from None
    weights = {rename(name): value for name, value in found.items() if not name.endswith(_SWIN_TABLES)}
    projection = weights.get("projection")
    if projection is None or projection.ndim != 2:
        raise UserError(f"{where} lacks its projection (visual.proj or image_projection); it is of another network")
    return spec, projection.shape[1], weights


def _vit_of_shapes(weights: dict[str, Tensor]) -> StudentSpec:
    """CLIP's vision transformer with these weights, of heads 64 wide; where it has none, `load_state` tells."""
    width, _, _, patch = weights["visual.conv1.weight"].shape
    places = len(weights.get("visual.positional_embedding", torch.zeros(2))) - 1
    options = {"width": width, "layers": _count(weights, r"visual\.transformer\.resblocks\.(\d+)\.")}
    options |= {"heads": max(1, width // 64), "patch_size": patch}
    return StudentSpec("published ViT", "vit", patch * max(1, math.isqrt(places)), options)


def _swin_of_shapes(weights: dict[str, Tensor]) -> StudentSpec:
    """The Swin with these weights, at the published 224 pixels, in evaluation mode only."""
    layers = range(_count(weights, r"image_encoder\.layers\.(\d+)\."))
    at = "image_encoder.layers.{}.blocks.0.attn.relative_position_bias_table"
    tables = [weights.get(at.format(layer), torch.zeros(169, 3)).shape for layer in layers]
    options: dict[str, Any] = {"model": _SWIN, "embed_dim": len(weights["image_encoder.patch_embed.proj.weight"])}
    options["depths"] = [_count(weights, rf"image_encoder\.layers\.{layer}\.blocks\.(\d+)\.") for layer in layers]
    options["num_heads"] = [heads for _, heads in tables]
    options["window_size"] = (math.isqrt(tables[0][0]) + 1) // 2
    return StudentSpec("published Swin", "timm", 224, options)


def _count(weights: dict[str, Tensor], pattern: str) -> int:
    """One more than the highest number that a name has where the pattern has its group."""
    return max((int(found[1]) + 1 for name in weights if (found := re.match(pattern, name))), default=0)


def _vit_name(name: str) -> str:
    return "projection" if name == "visual.proj" else name


def _swin_name(name: str) -> str:
    """timm has the patches merged where a stage begins, Swin's own code where one ends."""
    if name == "image_projection":
        return "projection"
    name = re.sub(r"^image_encoder\.", "visual.", name)
    return re.sub(r"layers\.(\d+)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
