"""Towers: published sizes, what learns, what is drawn again, weights from files, LoRA."""

import pickle
import time

import pytest
import torch
from torch import nn

from networks import towers as module
from networks import weights
from networks.flat import FlatModule
from networks.heads import LoRALinear, ProjectionHead
from networks.towers import TowerConfig, build_image_tower, build_towers
from utils.config import options_of
from utils.errors import UserError
from utils.rng import seeded


def config(encoder="ConvNetD2W4", **options):
    return TowerConfig(image_encoder=encoder, **{"image_pretrained": False} | options)


def count(net):
    return sum(weight.numel() for weight in net.parameters())


@pytest.mark.parametrize(
    ("name", "size", "parameters", "width"),
    [
        ("nfnet", 32, 32_769_488, 2304),
        ("nf_resnet50", 32, 25_557_032, 1000),
        ("nf_regnet", 32, 10_223_984, 1000),
        ("vit", 224, 5_717_416, 1000),
        ("vit_tiny", 224, 5_717_416, 1000),
        ("resnet50", 32, 23_508_032, 2048),
        ("resnet18", 32, 11_176_512, 512),
        ("resnet18_gn", 32, 11_176_512, 512),
        ("mobilenetv3_small_050", 32, None, 1024),
        ("ConvNetD3W64", 32, 76_032, 1024),
        ("mlp", 16, 114_944, 128),
    ],
)
def test_published_sizes(name, size, parameters, width):
    with torch.device("meta"):  # shapes without values
        tower = build_image_tower(config(name), size, 0)
    assert tower.width == width
    assert parameters is None or count(tower) == parameters


def test_clip_tower():
    with torch.device("meta"):
        tower = build_image_tower(config("clip"), 64, 0)
    assert tower.width == 512 and count(tower) == 87_849_216


def test_outputs():
    assert build_image_tower(config("vit", image_output="features"), 32, 0).width == 192
    assert build_image_tower(config("resnet18", image_output="logits"), 32, 0).width == 1000
    with pytest.raises(UserError, match="no classes"):
        build_image_tower(config(image_output="logits"), 32, 0)


def test_head_sizes_and_order():
    with torch.device("meta"):
        heads = {(i, o): ProjectionHead(i, o) for i in (768, 512) for o in (2304, 1000)}
    assert {key: count(head) for key, head in heads.items()} == {
        (768, 2304): 7_087_104,
        (768, 1000): 1_772_000,
        (512, 2304): 6_497_280,
        (512, 1000): 1_516_000,
    }
    shapes = [tuple(weight.shape) for weight in ProjectionHead(3, 2).parameters()]
    assert shapes == [(2, 3), (2,), (2, 2), (2,), (2,), (2,)]


def test_head_is_the_published_formula():
    head, x = ProjectionHead(5, 4, dropout=0.3).eval(), torch.randn(2, 5)
    w1, b1, w2, b2, scale, shift = head.parameters()
    h = x @ w1.T + b1
    gelu = h * 0.5 * (1 + torch.erf(h / 2**0.5))
    y = gelu @ w2.T + b2 + h
    y = (y - y.mean(1, keepdim=True)) / (y.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt() * scale + shift
    assert torch.allclose(head(x), y, atol=1e-6)


@pytest.fixture
def batch():
    return torch.randn(3, 3, 8, 8), torch.randn(3, 6)


def build(cfg, seed=1, size=8):
    return build_towers(cfg, 6, size, seed)


def test_functional_equals_modules(batch):
    towers = build(config(dropout=0.5))
    images, texts = batch
    assert list(towers.flat) == ["img", "txt"]
    with seeded(3):
        u, v = towers.functional(towers.flatten(), images, texts)
    with seeded(3):
        assert torch.equal(u, towers.embed_images(images)) and torch.equal(v, towers.embed_texts(texts))
    assert u.shape == v.shape == (3, towers.width)
    assert torch.allclose(u.norm(dim=1), torch.ones(3)) and torch.allclose(v.norm(dim=1), torch.ones(3))
    other = build(config(dropout=0.5), seed=2)
    with seeded(3):
        assert torch.equal(other.functional(towers.flatten(), images, texts)[0], u)
    other.load(towers.flatten())
    with seeded(3):
        assert torch.equal(other.embed_images(images), u)


def test_joint_width(batch):
    towers = build(config(joint_width=7))
    assert towers.width == 7 and towers.embed_images(batch[0]).shape == towers.embed_texts(batch[1]).shape == (3, 7)
    assert towers.flat["img"].shapes[-1] == ("joint.bias", (7,))


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder": "ConvNetD2W4BN", "joint_width": 5},
        {"image_trainable": False, "joint_width": 5},
        {"encoder": "vit_tiny", "lora_rank": 2, "joint_width": 5},
    ],
)
def test_seed_decides_and_renew_repeats_it(options):
    cfg, size = config(**options), 32 if "encoder" in options else 8
    one, same, other = build(cfg, 1, size), build(cfg, 1, size), build(cfg, 2, size)
    assert equal(one, same) and not equal(one, other)
    with torch.no_grad():
        for weight in (w for w in one.parameters() if w.requires_grad):
            weight.add_(1)
        one.embed_images(torch.randn(4, 3, size, size))  # moves running statistics
    assert equal(one.renew(2), other)
    state = torch.random.get_rng_state()
    one.renew(1)
    assert equal(one, same) and torch.equal(state, torch.random.get_rng_state())


def test_frozen_is_the_same_in_every_network():
    cfg = config("ConvNetD2W4BN", image_trainable=False, joint_width=5)
    one, other = build(cfg, 1), build(cfg, 2)
    assert list(one.flat) == ["txt"] and equal(one.image, other.image)
    before = {name: value.clone() for name, value in one.image.state_dict().items()}
    one.train().functional(one.flatten(), one.encode(torch.randn(4, 3, 8, 8)), torch.randn(4, 6))
    after = one.image.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "no statistics drift"


# LoRA


def test_lora_sizes_and_start():
    for rank in (1, 3):
        with torch.device("meta"):
            tower = build_image_tower(config("vit_tiny", lora_rank=rank, lora_targets=("qkv",)), 224, 0)
        assert FlatModule(tower).size == 9_216 * rank
    plain = build_image_tower(config("vit_tiny", image_trainable=False), 32, 0)
    lora = build_image_tower(config("vit_tiny", lora_rank=4), 32, 0)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(plain(plain.encode(images)), lora(images)), "B is zero"
    names = [name.rsplit(".", 1)[1] for name, _ in FlatModule(lora).shapes]
    assert set(names) == {"A", "B"} and len(names) == 12 * 2 * 2


def test_lora_gauge_is_shared_and_trunk_frozen():
    cfg = config("vit_tiny", lora_rank=2)
    one, other = build(cfg, 1, 32), build(cfg, 2, 32)
    assert torch.equal(one.flatten()["img"], other.flatten()["img"])
    assert not torch.equal(one.flatten()["txt"], other.flatten()["txt"])
    firsts = [module.A for module in one.image.modules() if isinstance(module, LoRALinear)]
    assert not torch.equal(firsts[0], firsts[2]), "each layer has its own A"


def test_lora_linear():
    linear = nn.Linear(4, 3)
    lora = LoRALinear(linear, rank=2, alpha=6.0)
    nn.init.normal_(lora.B)
    x = torch.randn(5, 4)
    full = linear.weight + 3.0 * lora.B @ lora.A
    assert torch.allclose(lora(x), x @ full.T + linear.bias, atol=1e-5)
    assert torch.allclose(lora.weight, full)


def test_lora_without_a_target():
    with pytest.raises(UserError, match="no linear layer of ConvNetD2W4"):
        build_image_tower(config(lora_rank=2), 8, 0)


@pytest.mark.parametrize("name", ["vit_tiny", "clip"])
def test_attention_has_second_derivatives(name, tmp_path):
    if name == "clip":
        name = str(tiny_clip(tmp_path))
    tower = build_image_tower(config(name, lora_rank=1, lora_targets=("q",)), 32, 0)
    flat = FlatModule(tower)
    vector = flat.flatten().requires_grad_()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(flat(vector, images).square().sum(), vector, create_graph=True)
    assert torch.autograd.grad(gradient.square().sum(), images)[0].abs().sum() > 0


# Weights


def tiny_clip(folder, **options):
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    net = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, projection_dim=6, image_size=16, patch_size=8))
    net.save_pretrained(folder)
    return folder


def test_clip_folder_loads_and_stretches(tmp_path):
    cfg = config(str(tiny_clip(tmp_path)), image_pretrained=True)
    one, other = build_image_tower(cfg, 16, 1), build_image_tower(cfg, 32, 2)
    assert equal(one, other) and one.width == 6
    assert other(torch.zeros(1, 3, 32, 32)).shape == (1, 6)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_weights_from_a_file(tmp_path, suffix):
    import timm
    from safetensors.torch import save_file

    published = timm.create_model("resnet18")  # has a classifier, which the tower lacks
    path = tmp_path / f"weights{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(published.state_dict(), path)
    tower = build_image_tower(config("resnet18", image_weights=str(path)), 32, 5)
    published.fc = nn.Identity()
    assert equal(tower.trunk, published)


def test_weights_of_a_vit_of_another_size(tmp_path):
    import timm

    published = timm.create_model("vit_tiny_patch16_224")
    torch.save({"state_dict": published.state_dict()}, tmp_path / "vit.pth")
    cfg = config("vit_tiny", image_weights=str(tmp_path / "vit.pth"))
    tower = build_image_tower(cfg, 64, 5)
    assert torch.equal(tower.trunk.head.weight, published.head.weight)
    assert tower.trunk.pos_embed.shape == (1, 17, 192)


def test_renew_goes_back_to_the_file(tmp_path):
    source = build(config("ConvNetD2W4BN"), 9).image.trunk
    torch.save(source.state_dict(), tmp_path / "net.pt")
    towers = build(config("ConvNetD2W4BN", image_weights=str(tmp_path / "net.pt")), 1)
    assert equal(towers.image.trunk, source)
    towers.flat["img"].load(torch.zeros(towers.flat["img"].size))
    towers.embed_images(torch.randn(2, 3, 8, 8))
    assert equal(towers.renew(2).image.trunk, source)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_bad_weight_files_are_one_line(tmp_path):
    good = build(config()).image.trunk.state_dict()
    first = next(iter(good))

    def says(state, name="net.pt", raw=False):
        path = tmp_path / name
        path.write_bytes(state) if raw else torch.save(state, path)
        with pytest.raises(UserError) as caught:
            build(config(image_weights=str(path)))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"'{first}' of shape (2, 2)" in says(good | {first: torch.zeros(2, 2)})
    assert f"lacks '{first}'" in says({name: value for name, value in good.items() if name != first})
    assert "has 'extra'" in says(good | {"extra": torch.zeros(1)})
    assert "no state dict" in says([1, 2])
    assert "cannot be read" in says(b"not a file of tensors", raw=True)
    assert "cannot be read" in says(b"nonsense", "net.safetensors", raw=True)
    assert "cannot be read" in says(pickle.dumps(Harmful(), protocol=2), raw=True)
    with pytest.raises(UserError, match="no weights file"):
        build(config(image_weights=str(tmp_path / "none.safetensors")))


@pytest.mark.parametrize("offline", [True, False])
@pytest.mark.parametrize("name", ["nfnet", "vit", "clip"])
def test_no_hub_is_one_line_at_once(name, offline, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.monotonic()
    with pytest.raises(UserError, match="out of reach; pass --image_weights FILE or --image_pretrained false"):
        build_image_tower(TowerConfig(image_encoder=name), 224, 0)
    assert time.monotonic() - start < 10


def test_cached_weights_are_found(tmp_path, monkeypatch):
    import timm
    from huggingface_hub import constants
    from safetensors.torch import save_file

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(weights, "hub_reachable", lambda: pytest.fail("the hub was asked"))
    published = timm.create_model("resnet18")
    repo = tmp_path / "models--timm--resnet18.a1_in1k"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(published.state_dict(), repo / "snapshots" / ("0" * 40) / "model.safetensors")
    tower = build_image_tower(TowerConfig(image_encoder="resnet18"), 32, 1)
    assert torch.equal(tower.trunk.conv1.weight, published.conv1.weight)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nfnett", "did you mean 'nfnet'"),
        ("resnet500", "did you mean 'resnet"),
        ("vit_base_patch16_dinosaur", "unknown image encoder"),
    ],
)
def test_unknown_names(name, says):
    with pytest.raises(UserError, match=says):
        build_image_tower(config(name), 32, 0)


def test_impossible_configs():
    for bad in ({"dropout": 1.0}, {"lora_rank": 1, "image_trainable": False}, {"lora_rank": 1, "lora_targets": ()}):
        with pytest.raises(UserError):
            config(**bad).check()


def test_every_option_is_read():
    from pathlib import Path

    files = ("towers.py", "text.py", "text_cache.py")
    text = "".join((Path(module.__file__).parent / name).read_text() for name in files)
    assert [name for name in options_of(TowerConfig) if f"cfg.{name}" not in text] == []


def test_clip_folders_that_are_no_image_encoder(tmp_path, capfd):
    """The library would only warn, and draw what is missing by chance."""
    from safetensors.torch import load_file, save_file
    from transformers import CLIPConfig, CLIPModel

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    vision = {"image_size": 16, "patch_size": 8, "projection_dim": 6, **small}
    clip = CLIPConfig(text_config=small, vision_config=vision, projection_dim=6)
    CLIPModel(clip).save_pretrained(tmp_path)
    cfg = TowerConfig(image_encoder=str(tmp_path))
    capfd.readouterr()
    assert build_image_tower(cfg, 16, 0).width == 6
    assert "UNEXPECTED" not in "".join(capfd.readouterr())
    state = load_file(tmp_path / "model.safetensors")
    full = state.pop("visual_projection.weight")
    for damaged, says in (({}, "its weights lack"), ({"visual_projection.weight": full[:, :3].clone()}, "has shape")):
        save_file(state | damaged, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=f"image encoder folder .* cannot be loaded .*{says}"):
            build_image_tower(cfg, 16, 0)
