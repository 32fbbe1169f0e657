"""The latent diffusion model: what its parts give, chance by image, what is refused."""

import shutil

import pytest
import torch
from torch import nn

from networks.diffusion import PARTS, LatentModel, denoising_steps, load_model, open_model
from networks.tiny import WORDS, tiny_diffusion
from utils.errors import UserError

NEGATIVE = "cartoon, anime, painting"
LONG = "a red circle on a blue square " * 25  # 175 words


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return open_model("tiny", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def model(folder) -> LatentModel:
    return load_model(folder)


@pytest.fixture(scope="module")
def latents(model) -> torch.Tensor:
    return torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.1


def chances(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def made(model, latents, texts, seeds, strength=0.7, guidance=10.0, steps=10, scheduler="", negative=NEGATIVE):
    """Images and flags of latents and texts."""
    embeds, against, _ = model.prompts(texts, negative)
    return model.synthesize(latents, embeds, against, chances(*seeds), strength, guidance, steps, scheduler)


@pytest.fixture
def seen(model):
    """What denoiser and decoder are given: `seen["unet"]` of (images, timestep), `seen["vae"]` of latents."""
    record = {"unet": [], "vae": []}
    decode = model.vae.decode

    def spy(latents, *args, **kwargs):
        record["vae"].append(latents)
        return decode(latents, *args, **kwargs)

    def encode(*args, **kwargs):
        raise AssertionError("an image was encoded")

    handle = model.unet.register_forward_pre_hook(lambda _, args: record["unet"].append((len(args[0]), int(args[1]))))
    model.vae.decode, old = spy, model.vae.encode
    model.vae.encode = encode
    yield record
    handle.remove()
    model.vae.decode, model.vae.encode = decode, old


def test_the_tiny_model_is_that_of_the_specification(model):
    sizes = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("vae", "unet")}
    assert sizes == {"vae": 67_231, "unet": 253_364}
    # 22,496 with the 90 entries of an alphabet; ours has the words too.
    text = sum(p.numel() for p in model.text_encoder.parameters())
    assert text == 22_496 + 32 * (len(model.tokenizer) - 90)
    assert not any(p.requires_grad for p in model.unet.parameters()) and not model.vae.training


def test_the_tiny_autoencoder_begins_with_the_mean_colours_of_squares(model):
    rng = torch.Generator().manual_seed(0)
    images = nn.functional.interpolate(torch.rand(4, 3, 2, 2, generator=rng) * 2 - 1, size=64)
    latents = model.encode(images)
    assert torch.allclose(latents[:, :3] / (8 * 0.18215), nn.functional.avg_pool2d(images, 8), atol=0.1)
    redrawn = model.decode(latents) * 2 - 1
    inner = (slice(None), slice(None), slice(12, 52), slice(12, 52))  # the edge is blended with nothing
    assert nn.functional.mse_loss(redrawn[inner], images[inner]) < 0.1 * images.var()


def test_the_tiny_tokenizer_has_a_token_for_each_word_and_letters_for_the_rest(model):
    assert len(model.tokenizer("the dog.").input_ids) == 5
    assert {len(model.tokenizer(word).input_ids) for word in WORDS} == {3}
    for text in ("A zebra's 3 hind-legs (brown/white); 100% real?", "ünïcode 狗 🙂 #", ""):
        ids = model.tokenizer(text).input_ids
        assert ids[0] == model.tokenizer.bos_token_id and max(ids) < len(model.tokenizer)
    assert model.tokenizer.decode(model.tokenizer("Zebra-crossing, 12!").input_ids[1:-1]).split() == [
        *("zebra", "-", "crossing", ",", "1", "2", "!")
    ]


def test_the_tiny_model_is_made_once_and_everywhere_the_same(folder, tmp_path):
    torch.rand(7)  # whatever chance was used before
    parent = tiny_diffusion(tmp_path)
    files = [path.relative_to(parent).as_posix() for path in parent.rglob("*.safetensors")]
    assert {file.split("/")[0] for file in files} == {"unet", "vae", "text_encoder"}
    for file in files:
        before = parent.joinpath(file).stat().st_mtime_ns
        assert tiny_diffusion(tmp_path).joinpath(file).stat().st_mtime_ns == before
        assert parent.joinpath(file).read_bytes() == (tmp_path / folder / file).read_bytes()


def test_the_noise_schedule_is_scaled_linear(model):
    signal = model.noise().alphas_cumprod[[0, 499, 681, 701, 999]]
    assert signal.tolist() == pytest.approx([0.99915, 0.27767, 0.09464, 0.08192, 0.00466], abs=6e-6)


def test_no_sampler_clips_latents_as_if_they_were_pixels(model):
    assert model.sampler("ddim").config.clip_sample is False
    assert not any(model.sampler(name).config.get("thresholding") for name in ("pndm", "ddim", "dpm"))


def test_steps_by_strength():
    wanted = {0.02: 1, 0.3: 15, 0.5: 25, 0.58: 28, 0.7: 35, 0.75: 37, 0.8: 40, 1.0: 50}
    assert {strength: denoising_steps(strength, 50) for strength in wanted} == wanted
    for strength in (0.0, 0.01):
        with pytest.raises(UserError, match=r"leaves none to take; give at least --strength 0\.02"):
            denoising_steps(strength, 50)


@pytest.mark.parametrize(
    "scheduler, strength, count, first",
    [("ddim", 0.02, 1, 1), ("ddim", 0.3, 15, 281), ("ddim", 0.7, 35, 681), ("pndm", 0.7, 36, 701), ("", 0.7, 36, 701)],
)
def test_what_the_denoiser_is_asked(model, latents, seen, scheduler, strength, count, first):
    made(model, latents[:1], ["a red circle"], [0], strength, 10.0, 50, scheduler)
    assert [images for images, _ in seen["unet"]] == [2] * count  # with the caption and with the negative prompt
    assert seen["unet"][0][1] == first and len(seen["vae"]) == 1


def test_without_guidance_the_denoiser_is_asked_once(model, latents, seen):
    first, _ = made(model, latents[:2], ["a red circle"] * 2, [0, 1], guidance=1.0)
    assert [images for images, _ in seen["unet"]] == [2] * len(seen["unet"])  # one an image
    other, _ = made(model, latents[:2], ["a red circle"] * 2, [0, 1], guidance=1.0, negative="a dog")
    assert torch.equal(first, other)


@pytest.mark.parametrize("scheduler", ["pndm", "ddim", "dpm"])
def test_an_image_is_the_same_alone_and_in_a_batch(model, latents, seen, scheduler):
    texts = ["a red circle", "a large blue square on grey", "a ring"]
    made(model, latents, texts, [5, 6, 7], scheduler=scheduler)
    for index in (2, 0, 1):
        made(model, latents[index : index + 1], [texts[index]], [5 + index], scheduler=scheduler)
    together, *alone = (given * model.vae.config.scaling_factor for given in seen["vae"])
    assert (together - torch.cat([alone[1], alone[2], alone[0]])).abs().max() < 1e-4
    assert together.std(dim=0).min() > 1e-3  # and the images differ from each other


def test_what_an_image_depends_on(model, latents):
    base, flags = made(model, latents[:1], ["a red circle"], [1])
    assert base.shape == (1, 3, 64, 64) and base.min() >= 0 and base.max() <= 1 and base.dtype == torch.float32
    assert flags == [False]
    assert torch.equal(base, made(model, latents[:1], ["a red circle"], [1])[0])
    for change in (
        {"seeds": [2]},
        {"texts": ["a blue square"]},
        {"latents": latents[1:2]},
        {"negative": "a dog"},
        {"guidance": 5.0},
        {"scheduler": "ddim"},
    ):
        given = {"latents": latents[:1], "texts": ["a red circle"], "seeds": [1]} | change
        assert (made(model, **given)[0] - base).abs().max() > 1e-4, change


def test_no_step_is_refused_before_anything_runs(model, latents, seen):
    with pytest.raises(UserError, match=r"--strength 0\.05 of 10 steps"):
        made(model, latents[:1], ["a"], [0], strength=0.05)
    assert seen == {"unet": [], "vae": []}


def test_one_chunk_is_what_the_pipeline_makes_of_a_prompt(model):
    texts = ["a red circle", "the dog sits near a big tree."]  # the first is shorter than the negative
    embeds, negative, counts = model.prompts(texts, NEGATIVE)
    pipeline = model._pipeline(model.sampler())
    wanted, against = pipeline.encode_prompt(texts, "cpu", 1, True, [NEGATIVE] * 2)
    assert torch.equal(embeds, wanted) or torch.allclose(embeds, wanted, atol=1e-6)
    assert torch.allclose(negative, against, atol=1e-6)
    assert embeds.shape == negative.shape == (2, 77, 32) and counts == [5, 10]


def test_long_prompts_are_chunked_or_cut(model, latents):
    embeds, negative, counts = model.prompts([LONG], NEGATIVE)
    assert counts == [175 + 2] and embeds.shape == negative.shape == (1, 3 * 77, 32)
    cut, _, cut_counts = model.prompts([LONG], NEGATIVE, "truncate")
    assert cut.shape == (1, 77, 32) and cut_counts == counts
    assert torch.allclose(embeds[:, :77], cut, atol=1e-6)
    assert torch.allclose(model.embed([LONG]), cut, atol=1e-6)
    # Each chunk is embedded as a prompt of its own: here the words 151 to 175.
    last = " ".join(LONG.split()[150:])
    assert torch.allclose(embeds[:, 154:], model.embed([last]), atol=1e-6)
    # The negative ends in empty prompts.
    assert torch.allclose(negative[:, :77], model.embed([NEGATIVE]), atol=1e-6)
    assert torch.allclose(negative[:, 77:154], model.embed([""]), atol=1e-6)
    images, _ = made(model, latents[:1], [LONG], [0], steps=2)
    assert images.isfinite().all()
    # And a negative that is longer than the caption.
    embeds, negative, _ = model.prompts(["a ring"], LONG)
    assert embeds.shape == negative.shape == (1, 3 * 77, 32)


def test_encoding_takes_the_mode_or_draws_by_image(model):
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mode = model.encode(images)
    assert mode.shape == (3, 4, 8, 8) and mode.dtype == torch.float32 and model.factor == 8
    posterior = model.vae.encode(images).latent_dist
    assert torch.allclose(mode, posterior.mean * 0.18215)
    sample = model.encode(images, chances(1, 2, 3))
    noise = (sample / 0.18215 - posterior.mean) / posterior.std
    assert torch.allclose(noise[1], torch.randn(4, 8, 8, generator=chances(2)[0]), atol=1e-3)
    assert torch.allclose(sample[2:], model.encode(images[2:], chances(3)), atol=1e-5)
    decoded = model.decode(mode)
    assert decoded.shape == images.shape and decoded.min() >= 0 and decoded.max() <= 1


def test_a_model_is_saved_whole_and_read_back(model, latents, tmp_path, monkeypatch):
    model.save(tmp_path / "model")
    again = load_model(open_model(str(tmp_path / "model"), tmp_path))
    inputs = (latents[:1], ["a red circle"], [1])
    assert torch.equal(made(model, *inputs)[0], made(again, *inputs)[0])
    nn.init.zeros_(again.unet.conv_out.weight)
    again.save(tmp_path / "model")  # in place of the first
    again = load_model(str(tmp_path / "model"), parts=("unet",))
    assert not again.unet.conv_out.weight.any() and again.vae is None

    from diffusers import StableDiffusionPipeline

    def broken(*args, **kwargs):
        raise RuntimeError("no")

    monkeypatch.setattr(StableDiffusionPipeline, "save_pretrained", broken)
    with pytest.raises(RuntimeError):
        model.save(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not load_model(str(tmp_path / "model"), parts=("unet",)).unet.conv_out.weight.any()


def test_only_the_parts_asked_for_are_read(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "unet")
    model = load_model(str(tmp_path / "some"), dtype=torch.bfloat16, parts=("vae",))
    assert model.encode(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 8, 8)
    assert model.vae.dtype == torch.bfloat16 and model.unet is model.text_encoder is model.tokenizer is None
    with pytest.raises(UserError, match=r"--model .*some lacks unet; it must be a whole diffusers pipeline"):
        open_model(str(tmp_path / "some"), tmp_path)
    with pytest.raises(UserError, match=r"model folder .*some cannot be loaded"):
        load_model(str(tmp_path / "some"))


def test_weights_that_are_not_to_be_had(folder, tmp_path):
    with pytest.raises(UserError, match=r"no model folder at \./nowhere"):
        open_model("./nowhere", tmp_path)
    source = open_model("benjamin-paine/stable-diffusion-v1-5", tmp_path)
    with pytest.raises(UserError, match="the weights of benjamin-paine/stable-diffusion-v1-5 are not here"):
        load_model(source, parts=("vae",))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(UserError, match=r"model folder .*broken cannot be loaded"):
        load_model(str(broken), parts=("unet",))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_lack_one_are_refused_not_drawn(folder, tmp_path, part):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, tmp_path / "model")
    file = next((tmp_path / "model" / part).glob("*.safetensors"))
    state = load_file(file)
    state.pop(sorted(state)[0])
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="lack"):
        load_model(str(tmp_path / "model"), parts=(part,))


def test_a_model_of_another_kind_is_refused(folder, tmp_path):
    import json

    shutil.copytree(folder, tmp_path / "model")
    config = tmp_path / "model" / "unet" / "config.json"
    values = json.loads(config.read_text()) | {"cross_attention_dim": 64}
    from diffusers import UNet2DConditionModel

    UNet2DConditionModel.from_config(values).save_pretrained(config.parent)
    with pytest.raises(UserError, match="not of the kind of Stable Diffusion 1 and 2"):
        load_model(str(tmp_path / "model"), parts=PARTS)


def test_the_libraries_say_nothing(tmp_path, capfd):
    model = load_model(open_model("tiny", tmp_path))
    made(model, torch.zeros(1, 4, 8, 8), [LONG], [0], steps=2, scheduler="ddim")
    model.noise()
    model.save(tmp_path / "model")
    assert capfd.readouterr() == ("", "")


@pytest.fixture(scope="module")
def guarded(folder, tmp_path_factory) -> str:
    """The tiny model with a safety checker that flags what it is shown."""
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    checker = StableDiffusionSafetyChecker(CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=16))
    nn.init.constant_(checker.concept_embeds_weights, -1.0)
    nn.init.constant_(checker.special_care_embeds_weights, 2.0)
    source = tmp_path_factory.mktemp("guarded") / "model"
    shutil.copytree(folder, source)
    checker.save_pretrained(source / "safety_checker")
    extractor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    extractor.save_pretrained(source / "feature_extractor")
    return str(source)


def test_the_safety_checker_reports_what_it_flags(folder, guarded, latents):
    model = load_model(guarded, safety=True)
    images, flags = made(model, latents[:2], ["a ring"] * 2, [0, 1], steps=2)
    assert flags == [True, True] and not images.any()
    nn.init.constant_(model.safety_checker.concept_embeds_weights, 2.0)
    images, flags = made(model, latents[:2], ["a ring"] * 2, [0, 1], steps=2)
    assert flags == [False, False] and images.std() > 0.01
    # Off unless asked for; and a model without one cannot be asked.
    assert load_model(guarded, parts=("vae",)).safety_checker is None
    with pytest.raises(UserError, match="has no safety checker; leave the checker off"):
        load_model(folder, safety=True)
