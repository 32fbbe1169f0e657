"""Images from prototypes: which there are, noise of their own, what a killed run leaves to do, flagged images."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from methods.prototype_files import Prototypes
from methods.prototype_synthesis import TRIES, Synthesis, SynthesisConfig, missing, planned, resized
from networks.diffusion import load_model, open_model
from utils.errors import RunError, UserError
from utils.progress import progress

SHORT = SynthesisConfig(num_inference_steps=6, strength=0.5, output_size=32)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(open_model("tiny", tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def pairs() -> Prototypes:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.2
    return Prototypes("n1", "dog", latents, ["a red dog", "two dogs on grass", "a very long caption " * 30])


def made(model, pairs, folder: Path, ipc: int = 6, batch: int = 1, seed: int = 0, **options) -> dict[str, bytes]:
    """Every image of a class by its file's name."""
    cfg = SynthesisConfig(**vars(SHORT) | {"synthesis_batch": batch} | options)
    with progress(total=ipc, disable=True) as bar:
        Synthesis(model, cfg, "nette", seed)(folder, pairs, ipc, bar)
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def pixels(folder: Path) -> torch.Tensor:
    import numpy as np

    return torch.stack([torch.from_numpy(np.array(Image.open(path))) for path in sorted(folder.rglob("*.png"))]).int()


def test_each_prototype_once_and_then_again_with_names_that_differ(pairs):
    plan = planned(Path("out"), pairs, 6)
    assert [str(image.path) for image in plan[:4]] == [
        "out/n1/n1-image0-0.png",
        "out/n1/n1-image1-0.png",
        "out/n1/n1-image2-0.png",
        "out/n1/n1-image0-1.png",
    ]
    many = Prototypes("n1", "dog", torch.zeros(12, 4, 1, 1), ["a"] * 12)
    names = [image.path.name for image in planned(Path(), many, 144)]
    assert len(set(names)) == 144  # published names 1|10 and 11|0 are one
    with pytest.raises(UserError, match="3 prototypes, and --ipc 4 is no multiple of that; give such as --ipc 6"):
        planned(Path(), pairs, 4)


def test_images_do_not_depend_on_batch_or_order_or_on_what_was_there(model, pairs, tmp_path):
    whole = made(model, pairs, tmp_path / "one")
    assert len(set(whole.values())) == 6  # rounds have other noise
    batched = made(model, pairs, tmp_path / "four", batch=4)
    assert batched.keys() == whole.keys()
    assert (pixels(tmp_path / "one") - pixels(tmp_path / "four")).abs().max() <= 1  # rounding alone
    for name in ("n1-image2-0.png", "n1-image0-1.png"):
        (tmp_path / "four/n1" / name).unlink()
    assert made(model, pairs, tmp_path / "four", batch=4) == batched
    assert made(model, pairs, tmp_path / "other", seed=1) != whole
    fewer = made(model, pairs, tmp_path / "three", ipc=3)
    assert fewer.items() <= whole.items()


def test_what_is_there_is_not_made_again(model, pairs, tmp_path, monkeypatch):
    whole = made(model, pairs, tmp_path)
    monkeypatch.setattr(model.unet, "forward", None)
    assert made(model, pairs, tmp_path) == whole
    plan = planned(tmp_path, pairs, 6)
    plan[3].path.unlink()
    assert [[image.prototype for image in part] for part in missing(plan, 2)] == [[2, 0]]  # its batch whole


def test_a_long_caption_in_the_batch_does_not_change_the_others(model, pairs, tmp_path):
    alone = Prototypes("n1", "dog", pairs.latents[:2], pairs.texts[:2])
    made(model, alone, tmp_path / "two", ipc=2, batch=3)
    made(model, pairs, tmp_path / "three", ipc=3, batch=3)
    assert (pixels(tmp_path / "two") - pixels(tmp_path / "three")[:2]).abs().max() <= 1


def test_every_option_shows_in_the_image(model, pairs, tmp_path):
    """Of a caption longer than the encoder's 77 tokens."""
    long = Prototypes("n1", "dog", pairs.latents[2:], pairs.texts[2:])
    options = {"negative_prompt": "a dog", "long_prompt": "truncate", "scheduler": "ddim", "guidance_scale": 3.0}
    options |= {"strength": 0.9, "num_inference_steps": 8, "prompt_template": "{label}", "output_size": 64}
    found = [made(model, long, tmp_path / name, ipc=1, **{name: value}) for name, value in options.items()]
    found.append(made(model, long, tmp_path / "none", ipc=1))
    assert len({images["n1-image0-0.png"] for images in found}) == len(options) + 1


def test_the_prompt(pairs):
    assert SynthesisConfig().prompts(pairs)[0] == "a red dog"  # verbatim, as published
    assert SynthesisConfig(prompt_template="{label}: {caption}").prompts(pairs)[0] == "dog: a red dog"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_template": "{captoin}"}, "may hold {caption} and {label} only"),
        ({"prompt_template": "{0}"}, "may hold {caption} and {label} only"),
        ({"prompt_template": "a dog"}, "all prompts would be equal"),
        ({"strength": 1.5}, "--strength is 1.5; it is a share"),
        ({"strength": 0.01}, "leaves none to take"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(UserError) as error:
        SynthesisConfig(**options).check()
    assert message in str(error.value)


def test_sides():
    sides = {"cifar10": 32, "cifar100": 32, "tiny_imagenet": 64, "imagenet1k": 224, "nette": 256, "woof": 256}
    assert {name: SynthesisConfig().side(name) for name in sides} == sides
    assert SynthesisConfig(output_size=48).side("cifar10") == 48
    ramp = torch.linspace(0, 1, 16).expand(1, 3, 16, 16)
    assert resized(ramp, 16)[0, 0, 0].tolist() == [round(value * 255) for value in torch.linspace(0, 1, 16).tolist()]
    assert resized(ramp, 4).shape == (1, 3, 4, 4)


def test_flagged_images_are_made_again_and_never_kept(model, pairs, tmp_path, monkeypatch):
    good = made(model, pairs, tmp_path / "good", ipc=3)
    plain, calls = model.synthesize, []

    def suspicious(latents, *rest):
        images, _ = plain(latents, *rest)
        calls.append(len(latents))
        flag = len(calls) == 2  # the second image's first try
        return (images * 0 if flag else images), [flag] * len(latents)

    monkeypatch.setattr(model, "synthesize", suspicious)
    kept = made(model, pairs, tmp_path / "kept", ipc=3)
    assert len(calls) == 4
    assert [name for name in good if kept[name] != good[name]] == ["n1-image1-0.png"]
    assert all(image.float().std() > 1 for image in pixels(tmp_path / "kept"))  # not the black that a checker gives
    monkeypatch.setattr(model, "synthesize", lambda latents, *rest: (torch.zeros(1, 3, 64, 64), [True]))
    with pytest.raises(RunError, match=f"flags n1-image0-0.png under {TRIES} seeds"):
        made(model, pairs, tmp_path / "none", ipc=3)
    assert not list((tmp_path / "none").rglob("*.png"))
