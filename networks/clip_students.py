"""Small image encoders that learn a CLIP's joint space (DIME-FM): a trunk, and a linear projection without a bias.

    --student vit_b_32     CLIP's own ViT-B/32 in QuickGELU, from scratch (the published student)
    --student swin_t       Swin-T, stochastic depth 0.2 (the other published one)
    --student timm:NAME    any network of timm, from scratch
    --student vit_tiny     32 pixels, two layers: for demonstrations

`--student_config_file` reads the published yaml files instead. What a student is, without its weights, is a
`StudentSpec`; a saved student has it beside the weights, in a published one it is read off the shapes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from networks.clip import CLIP_MEAN, CLIP_STD
from networks.weights import first_line, load_state
from utils.config import option
from utils.errors import UserError
from utils.files import load_tensors
from utils.registry import nearest

FORMAT = "clip student 1"
_TIMM = "timm:"
_SWIN = "swin_tiny_patch4_window7_224"  # whose settings the options of a Swin replace
# Names that weight decay passes over, whatever their shape; published. (timm's `pos_embed` is in none but its own.)
_NO_DECAY = ("positional_embedding", "token_embedding", "pos_embed", "relative_position_bias_table")


@dataclass(frozen=True)
class StudentSpec:
    """What a student is made of.

    kind         vit (CLIP's) or timm
    image_size   side of its square images, in pixels
    options      vit: width, layers, heads, patch_size; timm: model, and what its builder takes
    """

    name: str
    kind: str
    image_size: int
    options: dict[str, Any] = field(default_factory=dict)


SPECS = {
    "vit_b_32": StudentSpec("vit_b_32", "vit", 224, {"width": 768, "layers": 12, "heads": 12, "patch_size": 32}),
    "swin_t": StudentSpec("swin_t", "timm", 224, {"model": _SWIN, "drop_path_rate": 0.2}),
    "vit_tiny": StudentSpec("vit_tiny", "vit", 32, {"width": 64, "layers": 2, "heads": 4, "patch_size": 8}),
}


@dataclass(frozen=True)
class StudentConfig:
    """Which student."""

    student: str = option("vit_b_32", f"{', '.join(SPECS)}, or timm:NAME for any network of timm (from scratch)")
    student_config_file: str = option(
        "", "published yaml of a student (MODEL.TYPE CLIP or Unicl), in place of --student"
    )
    student_size: int = option(0, "side of the student's images in pixels; 0: the network's own", low=0)

    def check(self) -> None:
        if self.student_config_file and self.student != "vit_b_32":
            raise UserError(f"--student {self.student} and --student_config_file both name a student; give one")
        student_spec(self)


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
        spec = read_student_yaml(cfg.student_config_file)[0]
    elif cfg.student.startswith(_TIMM):
        spec = _timm_spec(cfg.student)
    elif cfg.student in SPECS:
        spec = SPECS[cfg.student]
    else:
        raise UserError(
            f"unknown student '{cfg.student}'{nearest(cfg.student, SPECS)}; known: {', '.join(SPECS)}, timm:NAME"
        )
    return dataclasses.replace(spec, image_size=cfg.student_size) if cfg.student_size else spec


def _timm_spec(name: str) -> StudentSpec:
    import timm

    model = name.removeprefix(_TIMM)
    if model.split(".")[0] not in timm.list_models():
        raise UserError(f"--student {name}: timm has no '{model}'{nearest(model, timm.list_models())}")
    about = timm.get_pretrained_cfg(model)
    return StudentSpec(name, "timm", about.input_size[-1] if about else 224, {"model": model})


def read_student_yaml(path: Path | str) -> tuple[StudentSpec, int]:
    """The student of a published yaml file, and the width of the joint space that it names."""
    try:
        model = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["MODEL"]
        kind = model["TYPE"]
        if kind == "CLIP":
            width = int(model["VISION_WIDTH"])
            options = {"width": width, "layers": int(model["VISION_LAYERS"]), "heads": width // 64}
            options["patch_size"] = int(model["VISION_PATCH_SIZE"])
            return StudentSpec(str(model["NAME"]), "vit", int(model["IMAGE_RESOLUTION"]), options), int(
                model["EMBED_DIM"]
            )
        swin = model["IMAGE_ENCODER"]["SWIN"]
        options = {"model": _SWIN, "drop_path_rate": float(model["IMAGE_ENCODER"]["DROP_PATH_RATE"])}
        options |= {"embed_dim": int(swin["EMBED_DIM"]), "window_size": int(swin["WINDOW_SIZE"])}
        options |= {"depths": list(swin["DEPTHS"]), "num_heads": list(swin["NUM_HEADS"])}
        return StudentSpec(str(model["NAME"]), "timm", 224, options), int(model["DIM_PROJECTION"])
    except OSError:
        raise UserError(f"no student config at {path}") from None
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"student config {path} cannot be read ({first_line(error)})") from None


def build_student(spec: StudentSpec, dim: int) -> ImageStudent:
    """The student with fresh weights, drawn by torch's global chance; UserError where it cannot be built."""
    if spec.kind == "vit":
        return _build_vit(spec, dim)
    return _build_timm(spec, dim)


def _build_vit(spec: StudentSpec, dim: int) -> ImageStudent:
    """CLIP's vision transformer; class token, positions and projection are drawn from N(0, 1 / width)."""
    from open_clip.transformer import QuickGELU, VisionTransformer

    visual = VisionTransformer(
        image_size=spec.image_size, mlp_ratio=4.0, output_dim=dim, act_layer=QuickGELU, **spec.options
    )
    projection, visual.proj = visual.proj.detach(), None
    return ImageStudent(visual, projection, spec.image_size)


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
    if isinstance(state, dict) and state.get("format") == FORMAT:
        spec, note, dim, weights = StudentSpec(**state["spec"]), state["note"], state["dim"], state["student"]
    else:
        spec, dim, weights = _published(state, path)
        note = {}
    net = build_student(spec, dim)
    load_state(net, weights, f"student {path}")
    return net.to(device).eval(), spec, note


def _published(state: Any, path: Path | str) -> tuple[StudentSpec, int, dict[str, Tensor]]:
    raise UserError(f"student {path} is no student")
