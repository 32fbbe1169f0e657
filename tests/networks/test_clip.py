"""A CLIP from every source, without a download: what it gives, what it is told by, what is said of one that fails."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch

from networks.clip import CLIP_MEAN, CLIP_STD, load_clip
from networks.tiny import tiny_clip
from utils.errors import UserError
from utils.files import save_tensors, save_vectors

TEXTS = ["a large red circle on white.", "Two  CAFÉS' doors", "漢字 & naïve"]
SMALL = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clip(cache):
    return load_clip("tiny", cache)


@pytest.fixture
def small(monkeypatch):
    """open_clip knows one more architecture, which is small."""
    published = open_clip.factory.get_model_config
    monkeypatch.setattr(open_clip, "list_models", lambda: ["ViT-S-16", "ViT-B-32"])
    monkeypatch.setattr(
        open_clip.factory, "get_model_config", lambda name: dict(SMALL) if name == "ViT-S-16" else published(name)
    )


def pixels(count=3, size=32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_embeddings_are_projected_plain_float32_and_frozen(clip):
    images, texts = clip.images(pixels()), clip.texts(TEXTS)
    assert images.shape == texts.shape == (3, clip.dim) and images.dtype == texts.dtype == torch.float32
    assert clip.net(pixel_values=pixels(), **clip.tokens(TEXTS)).image_embeds.allclose(
        torch.nn.functional.normalize(images, dim=-1), atol=1e-6
    )
    assert not images.requires_grad and not any(weight.requires_grad for weight in clip.net.parameters())
    assert not torch.allclose(images.norm(dim=-1), torch.ones(3))
    assert (clip.image_size, clip.mean, clip.std) == (32, CLIP_MEAN, CLIP_STD)
    assert clip.logit_scale == pytest.approx(14.285, abs=0.01)
    assert clip.texts([]).shape == (0, clip.dim)


def test_an_embedding_does_not_hang_on_its_company(clip):
    together = clip.texts([*TEXTS, "a " * 60])
    for row, text in enumerate(TEXTS):
        assert torch.allclose(clip.texts([text])[0], together[row], atol=1e-5)


def test_a_long_sentence_keeps_its_end_token(clip):
    long = "red circle " * 60
    tokens = clip.tokens([long, "red"])["input_ids"]
    end = clip.net.config.text_config.eos_token_id
    assert tokens.shape == (2, 77) and tokens[0, -1] == end and (tokens[0] == end).sum() == 1
    # So it is read where it ends, behind all of its beginning.
    net, want = clip.net, tokens[:1]
    states = net.text_model(input_ids=want).last_hidden_state[:, -1]
    assert torch.allclose(clip.texts([long]), net.text_projection(states), atol=1e-5)
    assert not torch.allclose(clip.texts([long]), clip.texts(["blue square " * 60]))


def test_no_letter_ends_a_sentence(clip):
    end = clip.net.config.text_config.eos_token_id
    assert (clip.tokens(["naïve 漢字 ☃ ~^` red"])["input_ids"] == end).sum() == 1
    assert not torch.allclose(clip.texts(["☃ red"]), clip.texts(["☃ blue"]))


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: SimpleNamespace(pooler_output=value)])
def test_both_kinds_of_return_of_the_library(clip, wrap, monkeypatch):
    """Version 4 of the transformers library gives a tensor, version 5 an object."""
    want = torch.arange(6.0).reshape(2, 3)
    monkeypatch.setattr(clip.net, "get_image_features", lambda **inputs: wrap(want))
    monkeypatch.setattr(clip.net, "get_text_features", lambda **inputs: wrap(want))
    assert torch.equal(clip.images(pixels(2)), want) and torch.equal(clip.texts(["a", "b"]), want)


def test_a_copy_is_told_by_the_same_fingerprint_and_any_change_by_another(clip, cache, tmp_path):
    shutil.copytree(tiny_clip(cache), tmp_path / "copy")
    copy = load_clip(str(tmp_path / "copy"), cache)
    assert copy.fingerprint == clip.fingerprint and torch.equal(copy.texts(TEXTS), clip.texts(TEXTS))
    assert load_clip("tiny", cache, dtype=torch.bfloat16).fingerprint == clip.fingerprint
    with torch.no_grad():
        copy.net.visual_projection.weight[0, 0] += 1
    shutil.copytree(tmp_path / "copy", tmp_path / "weights")
    copy.net.save_pretrained(tmp_path / "weights")
    shutil.copytree(tmp_path / "copy", tmp_path / "views")
    settings = tmp_path / "views" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.48145466", "0.5"))
    shutil.copytree(tmp_path / "copy", tmp_path / "config")
    settings = tmp_path / "config" / "config.json"
    settings.write_text(settings.read_text().replace("quick_gelu", "gelu"))
    names = ("weights", "views", "config")
    prints = {load_clip(str(tmp_path / name), cache).fingerprint for name in names}
    assert len(prints | {clip.fingerprint}) == 4


def test_another_precision_comes_back_as_float32(cache, clip):
    half = load_clip("tiny", cache, dtype=torch.bfloat16)
    assert next(half.net.parameters()).dtype == torch.bfloat16
    assert half.images(pixels()).dtype == half.texts(TEXTS).dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(half.texts(TEXTS), clip.texts(TEXTS)).min() > 0.999


def test_it_learns_where_it_is_told_to(cache):
    clip = load_clip("tiny", cache)
    clip.net.requires_grad_(True)
    score = (clip.embed_images(pixels()) * clip.embed_texts(clip.tokens(TEXTS))).sum()
    score.backward()
    assert all(weight.grad is not None for name, weight in clip.net.named_parameters() if name != "logit_scale")


def test_a_folder_without_image_settings_has_clips(cache, tmp_path):
    shutil.copytree(tiny_clip(cache), tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    assert load_clip(str(tmp_path / "bare"), cache).mean == CLIP_MEAN


def test_the_tiny_clip_tells_energies_whatever_the_colours(clip):
    """Before any training: a disc and its negative have the same energies of waves, and a stripe has others."""
    middle = (torch.arange(32) - 15.5) / 16
    disc = (middle[:, None] ** 2 + middle**2 < 0.4).float()
    stripe = (middle.abs() < 0.3).float().expand(32, 32)
    shapes = torch.stack([disc, -disc, stripe])[:, None].expand(3, 3, 32, 32)
    state = clip.net.vision_model(pixel_values=shapes.contiguous()).last_hidden_state[:, 0, -45:]
    distance = torch.cdist(state, state)
    assert distance[0, 1] < 0.3 * distance[0, 2]


def test_open_clip_reads_a_local_file_strictly_and_silently(small, cache, tmp_path, capfd):
    net = open_clip.create_model("ViT-S-16").eval()
    state = {f"module.{name}": value for name, value in net.state_dict().items()}
    save_tensors(tmp_path / "epoch_3.pt", {"epoch": 3, "name": "run", "state_dict": state})
    source = f"open_clip:ViT-S-16:{tmp_path / 'epoch_3.pt'}"
    capfd.readouterr()
    clip = load_clip(source, cache)
    assert capfd.readouterr() == ("", "")
    assert (clip.name, clip.dim, clip.image_size, clip.mean) == (source, 24, 32, CLIP_MEAN)
    assert clip.logit_scale == pytest.approx(14.285, abs=0.01)
    with torch.no_grad():
        assert torch.equal(clip.images(pixels()), net.encode_image(pixels()))
        assert torch.equal(clip.texts(TEXTS), net.encode_text(open_clip.tokenize(TEXTS)))
    tokens = clip.tokens(["red circle " * 60])["input_ids"]
    assert tokens.shape == (1, 77) and tokens[0, -1] == 49407
    half = load_clip(source, cache, dtype=torch.bfloat16)
    assert half.fingerprint == clip.fingerprint
    assert torch.nn.functional.cosine_similarity(half.images(pixels()), clip.images(pixels())).min() > 0.999
    assert torch.nn.functional.cosine_similarity(half.texts(TEXTS), clip.texts(TEXTS)).min() > 0.999

    del state["module.visual.ln_post.bias"]
    save_tensors(tmp_path / "epoch_3.pt", state)
    with pytest.raises(UserError, match=r"epoch_3\.pt lacks 'visual\.ln_post\.bias' \(64,\); it is of another network"):
        load_clip(source, cache)


def test_a_tag_of_open_clip_is_found_in_the_local_cache_and_brings_its_settings(small, cache, monkeypatch):
    from huggingface_hub import constants

    kept = Path(constants.HF_HUB_CACHE) / "models--owner--small"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    net = open_clip.create_model("ViT-S-16", force_quick_gelu=True).eval()
    save_vectors(kept / "snapshots" / "abc" / "open_clip_model.safetensors", net.state_dict())
    tag = {"hf_hub": "owner/small/", "quick_gelu": True, "mean": (0.1, 0.2, 0.3), "std": (0.5, 0.5, 0.5)}
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag_: tag if tag_ == "drawn" else {})
    clip = load_clip("open_clip:ViT-S-16:drawn", cache)
    assert (clip.mean, clip.std) == (tag["mean"], tag["std"])
    with torch.no_grad():
        assert torch.equal(clip.images(pixels()), net.encode_image(pixels()))
    plain = open_clip.create_model("ViT-S-16").eval()
    plain.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert not torch.equal(clip.images(pixels()), plain.encode_image(pixels())), "QuickGELU is the tag's"


def test_open_clip_names_that_do_not_exist(small, cache):
    with pytest.raises(UserError, match=r"--rows open_clip:ViT-B-33:x: open_clip has no 'ViT-B-33' \(did you mean"):
        load_clip("open_clip:ViT-B-33:x", cache, flag="rows")
    with pytest.raises(UserError, match=r"'laion2b' is neither a file nor a tag of ViT-B-32.*its tags: .*openai"):
        load_clip("open_clip:ViT-B-32:laion2b", cache)


def test_what_is_not_here_is_told_in_one_line(cache, tmp_path):
    with pytest.raises(UserError, match=r"the weights of openai/clip-vit-large-patch14 are not here .*--teacher tiny"):
        load_clip("ViT-L/14", cache)
    with pytest.raises(UserError, match="the weights of openai/clip-vit-base-patch32 are not here"):
        load_clip("ViT-B-32", cache)
    with pytest.raises(UserError, match=r"weights of open_clip:ViT-B-32:openai are not here .*open_clip:ViT-B-32:FILE"):
        load_clip("open_clip:ViT-B-32:openai", cache)
    with pytest.raises(UserError, match=r"no CLIP at ViT/L/14 \(did you mean 'ViT-L/14'\?\); --teacher takes"):
        load_clip("ViT/L/14", cache)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"CLIP folder .*empty cannot be loaded"):
        load_clip(str(tmp_path / "empty"), cache)


def test_a_folder_of_another_architecture_names_the_first_tensor(cache, tmp_path):
    shutil.copytree(tiny_clip(cache), tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"projection_dim": 64', '"projection_dim": 48'))
    with pytest.raises(UserError, match=r"its text_projection\.weight has shape \(64, 64\), not \(48, 64\)"):
        load_clip(str(tmp_path / "other"), cache)
    config.write_text(config.read_text().replace('"model_type": "clip"', '"model_type": "bert"'))
    with pytest.raises(UserError, match="its config says model_type bert, not clip"):
        load_clip(str(tmp_path / "other"), cache)
