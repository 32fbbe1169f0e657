"""Students: their sizes, their initial weights, what decays, and every way of writing and reading them."""

import dataclasses

import pytest
import torch

from networks.clip_students import (
    SPECS,
    StudentConfig,
    StudentSpec,
    build_student,
    decay_groups,
    load_student,
    read_student_yaml,
    student_spec,
    student_state,
)
from utils.config import parse
from utils.errors import UserError
from utils.files import save_tensors

SMALL_VIT = StudentSpec("small", "vit", 32, {"width": 128, "layers": 2, "heads": 2, "patch_size": 16})
SWIN = {"model": "swin_tiny_patch4_window7_224", "drop_path_rate": 0.2}
SMALL_SWIN = StudentSpec(
    "small", "timm", 224, {**SWIN, "embed_dim": 12, "depths": [2, 2, 1], "num_heads": [1, 2, 4], "window_size": 7}
)
# As the published files are laid out; their values.
VIT_YAML = """
MODEL:
  TYPE: CLIP
  NAME: "V_B32"
  EMBED_DIM: 768
  IMAGE_RESOLUTION: 224
  VISION_LAYERS: 12
  VISION_WIDTH: 768
  VISION_PATCH_SIZE: 32
  CONTEXT_LENGTH: 77
  VOCAB_SIZE: 49408
  TRANSFORMER_WIDTH: 768
  TRANSFORMER_HEADS: 12
  TRANSFORMER_LAYERS: 12
"""
SWIN_YAML = """
MODEL:
  TYPE: Unicl
  NAME: "Swin_T"
  DIM_PROJECTION: 768
  IMAGE_ENCODER:
    TYPE: swin
    DROP_PATH_RATE: 0.2
    SWIN: {EMBED_DIM: 96, DEPTHS: [2, 2, 6, 2], NUM_HEADS: [3, 6, 12, 24], WINDOW_SIZE: 7}
  TEXT_ENCODER: {VOCAB_SIZE: 49408, WIDTH: 512, HEADS: 8, LAYERS: 12}
"""


def drawn(spec, dim, seed=0):
    torch.manual_seed(seed)
    return build_student(spec, dim)


def count(weights):
    return sum(weight.numel() for weight in weights)


@pytest.fixture(scope="module")
def vit():
    return drawn(SPECS["vit_b_32"], 768)


def test_the_published_vit_has_its_size_and_its_weights_decay_as_published(vit):
    decayed, kept = decay_groups(vit, 0.05)
    assert count(vit.parameters()) == 88_045_824
    assert (len(decayed["params"]), len(kept["params"]), count(kept["params"])) == (50, 102, 162_048)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    assert any(weight is vit.projection for weight in decayed["params"])
    with torch.device("meta"):
        assert count(build_student(SPECS["vit_b_32"], 512).parameters()) == 87_849_216


def test_the_published_vit_starts_as_clips_constructor_leaves_it(vit):
    visual, block = vit.visual, vit.visual.transformer.resblocks[5]
    stds = {
        "class": (visual.class_embedding, 0.0361),
        "positions": (visual.positional_embedding, 0.0361),
        "projection": (vit.projection, 0.0361),
        "patches": (visual.conv1.weight, 0.0104),
        "attention": (block.attn.in_proj_weight, 0.0255),
        "mlp in": (block.mlp.c_fc.weight, 0.0208),
        "mlp out": (block.mlp.c_proj.weight, 0.0104),
    }
    for name, (weight, std) in stds.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.08 if weight.ndim == 1 else 0.02), name
    assert {module.eps for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-5}
    x = torch.linspace(-3, 3, 7)
    assert torch.allclose(block.mlp.gelu(x), x * torch.sigmoid(1.702 * x))


def test_the_published_swin():
    net = drawn(SPECS["swin_t"], 768)
    assert (count(net.visual.parameters()), net.projection.numel()) == (27_519_354, 589_824)
    drops = [module.drop_prob for module in net.modules() if type(module).__name__ == "DropPath"]
    assert max(drops) == pytest.approx(0.2)
    assert float(net.projection.detach().std()) == pytest.approx(0.02, rel=0.02)
    _, kept = decay_groups(net, 0.05)
    tables = [weight for name, weight in net.named_parameters() if "relative_position_bias_table" in name]
    assert len(tables) == 12 and all(any(weight is table for weight in kept["params"]) for table in tables)


def test_features_are_in_front_of_the_projection_and_what_is_frozen_is_in_no_group():
    net = drawn(SMALL_VIT, 24).eval()
    pixels = torch.randn(3, 3, 32, 32)
    assert net.features(pixels).shape == (3, 128) and net(pixels).shape == (3, 24)
    assert torch.allclose(net(pixels), net.features(pixels) @ net.projection)
    total = len(list(net.parameters()))
    net.projection.requires_grad_(False)
    assert sum(len(group["params"]) for group in decay_groups(net, 0.1)) == total - 1


def test_the_demonstrations_student_is_small_enough_for_any_machine():
    assert count(drawn(SPECS["vit_tiny"], 64).parameters()) == 153_856


def test_any_network_of_timm_at_any_size():
    cfg, _ = parse(StudentConfig, "distill", ["--student", "timm:resnet10t", "--student_size", "32"])
    spec = student_spec(cfg)
    net = drawn(spec, 16).eval()
    assert net.image_size == 32 and net(torch.randn(2, 3, 32, 32)).shape == (2, 16)
    assert net.mean == (0.48145466, 0.4578275, 0.40821073)


def test_published_yaml_files(tmp_path, capsys):
    (tmp_path / "vit.yaml").write_text(VIT_YAML)
    (tmp_path / "swin.yaml").write_text(SWIN_YAML)
    spec, passed = read_student_yaml(tmp_path / "vit.yaml")
    assert spec == dataclasses.replace(SPECS["vit_b_32"], name="V_B32", dim=768)
    assert passed.split(", ")[0] == "CONTEXT_LENGTH" and len(passed.split(", ")) == 5
    cfg, _ = parse(StudentConfig, "distill", ["--student_config_file", str(tmp_path / "swin.yaml")])
    assert capsys.readouterr().err == ""
    spec = student_spec(cfg)
    assert "the text tower is the teacher's; passed over: TEXT_ENCODER" in capsys.readouterr().err
    assert count(drawn(spec, 768).visual.parameters()) == 27_519_354
    with pytest.raises(UserError, match="student Swin_T is for a joint space of width 768; the teacher's is 512"):
        build_student(spec, 512)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("TYPE: CLIP", "TYPE: CLAP", "MODEL.TYPE is CLAP, not CLIP or Unicl"),
        ("VISION_WIDTH: 768", "", "lacks the key VISION_WIDTH"),
        ("VISION_WIDTH: 768", "VISION_WIDTH: wide", "value of another kind"),
        ("VOCAB_SIZE", "VOCAB_SISE", "unknown key MODEL.VOCAB_SISE.*VOCAB_SIZE"),
        ("MODEL:", "MODEL: [", "is not valid YAML"),
        ("MODEL:", "NODEL:", "lacks the key MODEL"),
    ],
)
def test_a_yaml_file_that_is_not_one_is_refused(tmp_path, old, new, message):
    path = tmp_path / "student.yaml"
    path.write_text(VIT_YAML.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_student_yaml(path)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--student", "vit_b_33"], r"unknown student 'vit_b_33' \(did you mean 'vit_b_32'\?\); known: .*timm:NAME"),
        (["--student", "timm:resnet10x"], r"--student timm:resnet10x: timm has no 'resnet10x' \(did you mean"),
        (["--student", "swin_t", "--student_config_file", "x.yaml"], "both name a student; give one"),
        (["--student_config_file", "nowhere.yaml"], r"no student config at nowhere\.yaml"),
    ],
)
def test_flags_that_name_no_student(argv, message):
    with pytest.raises(UserError, match=message):
        parse(StudentConfig, "distill", argv)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            dataclasses.replace(SMALL_VIT, image_size=40),
            "cuts images into 16 pixels; --student_size must be a multiple",
        ),
        (StudentSpec("odd", "vit", 32, {"width": 100, "layers": 1, "heads": 3, "patch_size": 16}), "cannot be built"),
        (
            dataclasses.replace(SMALL_SWIN, options=SWIN | {"depths": 4}),
            "timm cannot build small for images of 224",
        ),
    ],
)
def test_what_cannot_be_built_is_told_in_one_line(spec, message):
    with pytest.raises(UserError, match=message):
        build_student(spec, 8)


@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_SWIN], ids=["vit", "swin"])
def test_a_saved_student_is_the_same_again(spec, tmp_path):
    net = drawn(spec, 24).eval()
    save_tensors(tmp_path / "student.pt", student_state(net, spec, {"teacher": "tiny"}))
    before = torch.random.get_rng_state()
    again, same, note = load_student(tmp_path / "student.pt")
    assert torch.equal(before, torch.random.get_rng_state())
    assert (same, note, again.training) == (spec, {"teacher": "tiny"}, False)
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    assert torch.equal(again(pixels), net(pixels))


def published(net, spec, module):
    """A checkpoint in the layout, and under the names, of the published code."""
    weights = {}
    for name, value in net.state_dict().items():
        if spec.kind == "vit":
            name = "visual.proj" if name == "projection" else name
        else:  # there a stage ends in what timm begins the next one with, and what follows from sizes is kept too
            name = "image_projection" if name == "projection" else name.replace("visual.", "image_encoder.")
            for stage in (1, 2):
                name = name.replace(f"layers.{stage}.downsample", f"layers.{stage - 1}.downsample")
        weights[f"module.{name}" if module else name] = value
    if spec.kind == "timm":
        weights["image_encoder.layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
        weights["image_encoder.layers.0.blocks.1.attn_mask"] = torch.zeros(64, 49, 49)
    return {"epoch": 100, "image_state_dict": weights, "best_loss": 1e7, "img_optimizer_state_dict": {"state": {}}}


@pytest.mark.parametrize("module", [False, True])
@pytest.mark.parametrize("spec", [SMALL_VIT, SMALL_SWIN], ids=["vit", "swin"])
def test_a_published_checkpoint_is_recognised_by_its_shapes(spec, module, tmp_path):
    net = drawn(spec, 24).eval()
    torch.save(published(net, spec, module), tmp_path / "checkpoint.pth.tar")
    again, _, note = load_student(tmp_path / "checkpoint.pth.tar")
    pixels = torch.randn(2, 3, spec.image_size, spec.image_size)
    assert torch.equal(again(pixels), net(pixels)) and note == {}


def vit_without(name, **changed):
    state = published(drawn(SMALL_VIT, 24), SMALL_VIT, False)
    state["image_state_dict"].pop(name, None)
    return state["image_state_dict"] | changed


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: vit_without("visual.ln_post.bias"), "lacks 'visual.ln_post.bias'"),
        (lambda: vit_without("visual.proj"), r"lacks its projection \(visual.proj or image_projection\)"),
        (lambda: vit_without("", **{"token_embedding.weight": torch.zeros(3)}), "has 'token_embedding.weight', which"),
        (lambda: vit_without("", **{"visual.ln_pre.bias": torch.zeros(3)}), r"'visual.ln_pre.bias' of shape \(3,\)"),
        (lambda: vit_without("", **{"visual.conv1.weight": torch.zeros(3)}), "is no ViT or Swin of this kind"),
        (
            lambda: {"state_dict": {}, "conv1.weight": torch.zeros(2, 1)},
            r"begins with 'conv1.weight' \(2, 1\); it is no",
        ),
        (lambda: {"epoch": 3}, "holds no tensors"),
        (lambda: torch.zeros(3), "holds Tensor, not a student"),
        (lambda: {"format": "poster 1"}, "is of the format 'poster 1'"),
    ],
)
def test_a_checkpoint_of_another_architecture_names_the_first_tensor_that_does_not_fit(state, message, tmp_path):
    torch.save(state(), tmp_path / "student.pt")
    with pytest.raises(UserError, match=message):
        load_student(tmp_path / "student.pt")


def test_our_own_file_is_as_strict(tmp_path):
    net = drawn(SMALL_VIT, 24)
    other = dataclasses.replace(SMALL_VIT, options=SMALL_VIT.options | {"layers": 3})
    save_tensors(tmp_path / "student.pt", student_state(net, other, {}))
    with pytest.raises(
        UserError, match=r"student\.pt lacks 'visual\.transformer\.resblocks\.2\.ln_1\.weight' \(128,\)"
    ):
        load_student(tmp_path / "student.pt")
    with pytest.raises(UserError, match="no student at"):
        load_student(tmp_path / "nothing.pt")


def test_biases_of_keys_stay_where_they_are():
    """Their gradient is zero: without the hook that says so, in float64, it is rounding and nothing else."""
    net = build_student(SPECS["vit_tiny"], 8).double()
    bias = net.visual.transformer.resblocks[0].attn.in_proj_bias
    size = net.image_size
    pixels = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    net(pixels).square().sum().backward()
    queries, keys, values = bias.grad.chunk(3)
    assert not keys.any() and queries.abs().max() > 1e-6 and values.abs().max() > 1e-6
    bias._backward_hooks.clear()
    bias.grad = None
    net(pixels).square().sum().backward()
    noise = bias.grad.chunk(3)[1].abs().max()
    assert noise < 1e-12 * values.abs().max() and torch.allclose(bias.grad.chunk(3)[0], queries)
