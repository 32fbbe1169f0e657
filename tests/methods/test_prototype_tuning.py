"""Fine-tuning: what is learned from, the loss, the schedule, checkpoints, and runs that are killed."""

import contextlib
import copy
import json
import signal
from dataclasses import dataclass, replace
from itertools import islice

import pytest
import torch

from data.catalogue import CatalogueConfig, build_catalogue
from data.metadata import read_metadata
from methods.prototype_files import Manifest
from methods.prototype_latents import encoded, moments
from methods.prototype_learning import Batch, Checkpoints, Learner, Pictures, learn
from methods.prototype_tuning import TuneConfig, denoising_loss, sample_latents, tune
from networks.diffusion import load_model, open_model
from utils.config import option, section
from utils.errors import RunError, UserError
from utils.folders import folder_digests
from utils.run import Run, RunConfig

TINY = TuneConfig(
    model="tiny",
    resolution=16,
    random_flip=False,
    train_batch_size=4,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    checkpointing_steps=2,
    validation_epochs=0,
)


@dataclass(frozen=True)
class Command:
    method: str = option("vlcp", "the system")
    run: RunConfig = section(RunConfig)
    tune: TuneConfig = section(TuneConfig)


@dataclass(frozen=True)
class World:
    """20 drawn images of 16 pixels and their captions, a tiny model, and the folder of caches."""

    catalogue: object
    captions: dict
    model: object

    def pictures(self, **options) -> Pictures:
        files = [file for names in self.catalogue.train for file in names]
        paths, root = [self.catalogue.train_root / file for file in files], self.catalogue.train_root
        plain = {"size": 16, "centre": True, "flip": False, "threads": 1}
        return Pictures(paths, [self.captions[file] for file in files], root, **plain | options)


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    catalogue = build_catalogue(CatalogueConfig(dataset="toy", toy_images=20, toy_size=16, cache_dir=cache))
    captions = read_metadata(catalogue.train_root, catalogue)
    return World(catalogue, captions, load_model(open_model("tiny", cache)))


@pytest.fixture
def model(world):
    """The tiny model, whose denoiser may be changed."""
    return replace(world.model, unet=copy.deepcopy(world.model.unet).requires_grad_(True))


@pytest.fixture
def tuned(world, monkeypatch):
    """tuned(folder, cfg, die=None) fine-tunes; `die`: killed just before it logs that step. Resumes what is there."""
    log = Run.log

    def run(folder, cfg=TINY, die=None):
        def deadly(self, step, **numbers):
            if step == die:
                raise KeyboardInterrupt
            log(self, step, **numbers)

        monkeypatch.setattr(Run, "log", deadly)
        opened = Run(folder, Command(run=RunConfig(device="cpu", resume=folder.exists()), tune=cfg), "buffer", "x")
        try:
            return tune(cfg, world.catalogue, world.captions, folder, opened)
        except KeyboardInterrupt:
            return None

    return run


def one_batch(world, seed=0) -> Batch:
    return next(iter(world.pictures().batches(seed, "x", range(1), 8, 8, 1000)))


def test_every_image_is_seen_once_an_epoch(world):
    pictures = world.pictures()
    assert pictures.steps_per_epoch(8) == 3
    batches = list(pictures.batches(0, "x", range(6), 8, 8, 1000))
    assert [len(batch) for batch in batches] == [8, 8, 4] * 2
    first, second = ([text for batch in batches[i : i + 3] for text in batch.texts] for i in (0, 3))
    assert sorted(first) == sorted(second) == sorted(world.captions.values()) and first != second
    later = next(iter(pictures.batches(0, "x", range(4, 6), 8, 8, 1000)))
    assert later.texts == batches[4].texts
    for name in ("images", "posterior", "noise", "times"):
        assert torch.equal(getattr(later, name), getattr(batches[4], name))
    assert not torch.equal(batches[4].noise, batches[3].noise)


def test_squares_are_cut_and_mirrored(world, tmp_path):
    from PIL import Image

    Image.linear_gradient("L").resize((8, 8)).resize((8, 24)).save(tmp_path / "tall.png")  # darker above
    whole = torch.tensor(list(Image.open(tmp_path / "tall.png").tobytes())).reshape(24, 8)
    base = {"files": [tmp_path / "tall.png"], "texts": [""], "root": tmp_path, "size": 8, "threads": 1}
    centred = Pictures(**base, centre=True, flip=False)
    assert torch.equal(centred.read(0, (0.0, 0.0, 0.0))[1], whole[8:16])
    anywhere = Pictures(**base, centre=False, flip=False)
    assert torch.equal(anywhere.read(0, (0.0, 0.0, 0.9))[0], whole[:8])
    assert torch.equal(anywhere.read(0, (0.999, 0.999, 0.9))[0], whole[16:])
    drawn = replace(world.pictures(), flip=True)
    assert torch.equal(drawn.read(0, (0.5, 0.5, 0.4)), drawn.read(0, (0.5, 0.5, 0.6)).flip(-1))
    assert drawn.read(0).shape == (3, 16, 16) and replace(drawn, size=24).read(0).shape == (3, 24, 24)


def test_the_loss_is_that_of_the_told_noise(world, model):
    batch, noise = one_batch(world), model.noise()
    noise.register_to_config(prediction_type="epsilon")
    assert noise.alphas_cumprod[[0, 499, 681, 701, 999]].tolist() == pytest.approx(
        [0.99915, 0.27767, 0.09464, 0.08192, 0.00466], abs=1e-5
    )
    with torch.no_grad():
        found = model.vae.encode(batch.images / 127.5 - 1).latent_dist
        latents = 0.18215 * (found.mean + found.std * batch.posterior)
        kept = noise.alphas_cumprod[batch.times].view(-1, 1, 1, 1)
        noised = kept.sqrt() * latents + (1 - kept).sqrt() * batch.noise
        told = model.unet(noised, batch.times, model.embed(batch.texts)).sample
        each = (told - batch.noise).square().mean(dim=(1, 2, 3))
        assert float(denoising_loss(model, noise, batch)) == pytest.approx(float(each.mean()), rel=1e-5)
        ratio = (kept / (1 - kept)).flatten()
        bounded = (each * (5 / ratio).clamp(max=1)).mean()
        assert float(denoising_loss(model, noise, batch, 5.0)) == pytest.approx(float(bounded), rel=1e-5)
        velocity = kept.sqrt() * batch.noise - (1 - kept).sqrt() * latents
        noise.register_to_config(prediction_type="v_prediction")
        each = (told - velocity).square().mean(dim=(1, 2, 3))
        assert float(denoising_loss(model, noise, batch)) == pytest.approx(float(each.mean()), rel=1e-5)
        bounded = (each * ratio.clamp(max=5) / (ratio + 1)).mean()  # this target weighs images by SNR + 1 itself
        assert float(denoising_loss(model, noise, batch, 5.0)) == pytest.approx(float(bounded), rel=1e-5)


def test_latents_are_scaled_as_the_model_says(world, model):
    """An autoencoder that was trained here has a factor of its own; img2img and prototypes go by it, too."""
    batch, vae = one_batch(world), copy.deepcopy(model.vae)
    with torch.no_grad():
        usual = denoising_loss(model, model.noise(), batch)
        vae.register_to_config(scaling_factor=2 * 0.18215)
        doubled = denoising_loss(replace(model, vae=vae), model.noise(), batch)
        vae.quant_conv = torch.nn.Sequential(vae.quant_conv, Twice())
        vae.register_to_config(scaling_factor=0.18215)
        twice = denoising_loss(replace(model, vae=vae), model.noise(), batch)
    assert float(doubled) == pytest.approx(float(twice), rel=1e-5) != pytest.approx(float(usual), rel=1e-3)


class Twice(torch.nn.Module):
    """Twice the mean and the spread of a posterior."""

    def forward(self, moments):
        mean, logvar = moments.chunk(2, dim=1)
        return torch.cat([2 * mean, logvar + 2 * torch.tensor(2.0).log()], dim=1)


def learner(world, model, part=8, **options) -> Learner:
    loss = lambda batch: denoising_loss(model, noise, batch)  # noqa: E731
    noise, plain = model.noise(), {"steps": 8, "lr": 1e-3, "max_grad_norm": 1.0}
    return Learner(model.unet, loss, part=part, **plain | options)


def test_parts_of_a_batch_count_by_their_images(world, model):
    """8 images in parts of 3, 3 and 2 give the gradient of 8 at once."""
    batch, other = one_batch(world), replace(model, unet=copy.deepcopy(model.unet))
    losses = [learner(world, whose, part).step(batch) for whose, part in ((model, 8), (other, 3))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    # As a whole: how a convolution sums, and so the last digits of its small gradients, follows its batch.
    one, two = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (model.unet, other.unet))
    assert float((one - two).norm()) < 1e-3 * float(one.norm())


def test_the_average_forgets_as_it_should(world, model):
    """Decay min(0.9999, (1 + k) / (10 + k)), k counted from 0."""
    averaged, batch = learner(world, model, average=True, max_grad_norm=0.0), one_batch(world)
    assert [round(averaged.ema.get_decay(k), 3) for k in (100, 813, 3250)] == [0.917, 0.989, 0.997]
    assert averaged.ema.get_decay(10**6) == 0.9999
    expected = averaged.params[0].detach().clone()
    for k in range(4):
        averaged.step(batch)
        decay = 0.0 if k == 0 else (1 + k) / (10 + k)
        expected = decay * expected + (1 - decay) * averaged.params[0].detach()
    torch.testing.assert_close(averaged.ema.shadow_params[0], expected)
    last = averaged.params[0].detach().clone()
    assert not torch.equal(averaged.settle().conv_in.weight, last)
    torch.testing.assert_close(averaged.params[0].detach(), expected)


@pytest.mark.parametrize(
    ("schedule", "warmup", "rates"),
    [
        ("constant", 0, [1, 1, 1, 1]),
        ("constant_with_warmup", 2, [0, 0.5, 1, 1]),
        ("linear", 0, [1, 0.75, 0.5, 0.25]),
        ("cosine", 0, [1, 0.853553, 0.5, 0.146447]),
    ],
)
def test_rates_follow_the_schedule(schedule, warmup, rates):
    net = torch.nn.Linear(1, 1)
    found = Learner(net, None, steps=4, part=1, lr=1.0, max_grad_norm=0.0, schedule=schedule, warmup=warmup)
    for rate in rates:
        assert found.schedule.get_last_lr() == [pytest.approx(rate, abs=1e-6)]
        found.optimizer.step()
        found.schedule.step()


def test_a_model_learns_and_is_a_whole_pipeline(world, tuned, tmp_path):
    from diffusers import StableDiffusionPipeline

    cfg = replace(TINY, max_train_steps=40, checkpointing_steps=15, vae_steps=6, validation_epochs=6)
    folder = tuned(tmp_path / "run", cfg)
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(46))
    assert sum("vae_loss" in row for row in rows) == 6 and sum("loss" in row for row in rows) == 40
    # 40 steps are 13 epochs of three; the sheet draws a caption of each class.
    assert [path.name for path in sorted((tmp_path / "run" / "sheets").iterdir())] == ["epoch_006.png", "epoch_012.png"]
    saved = [path.name for path in sorted((tmp_path / "run" / "checkpoints").iterdir())]
    assert saved == ["denoiser_00000030.pt", "denoiser_00000040.pt"]
    # Noted before the folder has its name: nothing can be damaged in between that would be believed.
    assert Manifest(tmp_path / "run").section("model") == {"files": folder_digests(folder)}
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    state = torch.load(tmp_path / "run" / "checkpoints" / saved[-1], weights_only=True)
    for value, average in zip(pipeline.unet.parameters(), state["ema"]["shadow_params"], strict=True):
        assert torch.equal(value, average)
    after = load_model(str(folder))
    began, ended = (
        sum(float(denoising_loss(replace(after, unet=net), after.noise(), one_batch(world, seed))) for seed in range(4))
        for net in (world.model.unet, after.unet)
    )
    assert ended < 0.95 * began
    latents = after.encode(torch.stack([world.pictures().read(row) for row in range(20)]) / 127.5 - 1)
    assert float(latents.std()) == pytest.approx(1, abs=1e-3)
    before = contents(tmp_path / "run")
    assert tuned(tmp_path / "run", cfg) == folder and contents(tmp_path / "run") == before  # nothing is done twice


def test_a_killed_run_ends_in_the_same_files(tuned, tmp_path):
    cfg = replace(
        TINY,
        max_train_steps=5,
        vae_steps=5,
        random_flip=True,
        center_crop=False,
        lr_scheduler="cosine",
        lr_warmup_steps=2,
        snr_gamma=5.0,
        max_grad_norm=0.5,
        gradient_checkpointing=True,
    )
    tuned(tmp_path / "whole", cfg)
    for step in (1, 4, 5, 8):  # in the autoencoder, before its end, at the denoiser's first step, after its second
        assert tuned(tmp_path / "killed", cfg, die=step) is None
    tuned(tmp_path / "killed", cfg)
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert whole.keys() == killed.keys()
    states = [name for name in whole if name.endswith(".pt")]  # these hold the names of temporary files
    assert [name for name in whole if whole[name] != killed[name] and name not in ("config.yaml", *states)] == []
    for name in states:
        one, two = (torch.load(tmp_path / run / name, weights_only=True) for run in ("whole", "killed"))
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("harm", ["autoencoder/diffusion_pytorch_model.safetensors", "log.jsonl"])
def test_an_autoencoder_that_was_damaged_is_told(tuned, tmp_path, harm):
    """Its weights would be in the model, and what the log says of it on the page."""
    cfg = replace(TINY, max_train_steps=3, vae_steps=2)
    assert tuned(tmp_path / "x", cfg, die=2) is None
    data = bytearray((tmp_path / "x" / harm).read_bytes())
    data[data.index(b"0.") + 2 if harm == "log.jsonl" else -1] ^= 1
    (tmp_path / "x" / harm).write_bytes(data)
    with pytest.raises(UserError, match=rf"{harm} is damaged.*restore it, or"):
        tuned(tmp_path / "x", cfg)


@pytest.mark.parametrize("half", ["no", "bf16"])
def test_what_encoders_say_can_be_kept(tuned, tmp_path, half):
    """The loss of each step is that of encoding anew, up to rounding; what was kept is gone in the end."""
    cfg = replace(TINY, max_train_steps=7, random_flip=True, vae_steps=2, mixed_precision=half)
    for name, kept in (("anew", False), ("kept", True)):
        tuned(tmp_path / name, replace(cfg, cache_latents=kept))
    anew, kept = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("anew", "kept")
    )
    for one, other in zip(kept, anew, strict=True):
        assert one == pytest.approx(other, rel=1e-3 if half == "no" else 0.02)  # AdamW's first steps raise rounding
    assert not (tmp_path / "kept" / "encoded").exists()


def test_kept_latents_are_those_of_each_picture_and_its_mirror(world, model, tmp_path):
    pictures = world.pictures(flip=True)
    known = encoded(pictures, model, tmp_path / "encoded", contextlib.nullcontext())
    for batch in pictures.batches(0, "x", range(3), 8, 8, 1000):
        (mean, spread), noise = moments(model, batch.images / 127.5 - 1).chunk(2, 1), model.noise()
        torch.testing.assert_close(sample_latents(torch.cat([mean, spread], 1), torch.zeros(())), mean)
        (other,) = (
            later
            for later in pictures.batches(0, "x", range(3), 8, 8, 1000, known)
            if later.texts == batch.texts and later.images is None
        )
        torch.testing.assert_close(other.encoded[0], torch.cat([mean, spread], 1), rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            assert float(denoising_loss(model, noise, other)) == pytest.approx(
                float(denoising_loss(model, noise, batch)), rel=1e-4
            )
        assert [len(part) for part in other.split(3)] == [len(part) for part in batch.split(3)]


def test_damaged_kept_latents_are_made_anew(world, model, tmp_path, capsys):
    def again():
        encoded(world.pictures(flip=True), model, tmp_path / "encoded", contextlib.nullcontext())
        return capsys.readouterr().out

    assert "note" not in again() and "note" not in again()
    good = contents(tmp_path)
    for name, at in (("encoded/moments.npy", -7), ("encoded/states.npy", 30), ("digests_of_encoded.json", 40)):
        data = bytearray(good[name])
        data[at] ^= 1
        (tmp_path / name).write_bytes(data)
        said = again()
        assert "the pictures are encoded anew" in said and (name in said or name == "digests_of_encoded.json")
        assert contents(tmp_path) == good


def test_a_killed_run_with_kept_latents(tuned, tmp_path):
    cfg = replace(TINY, max_train_steps=5, random_flip=True, cache_latents=True)
    tuned(tmp_path / "whole", cfg)
    assert tuned(tmp_path / "killed", cfg, die=3) is None and (tmp_path / "killed" / "encoded").is_dir()
    tuned(tmp_path / "killed", cfg)
    assert contents(tmp_path / "whole" / "model") == contents(tmp_path / "killed" / "model")


def test_a_signal_is_heard_after_the_step(tuned, tmp_path, monkeypatch):
    cfg, step = replace(TINY, max_train_steps=5), Learner.step
    tuned(tmp_path / "whole", cfg)
    calls = []

    def told(self, batch):
        calls.append(1)
        if len(calls) in (2, 4):
            signal.raise_signal(signal.SIGINT)
        return step(self, batch)

    monkeypatch.setattr(Learner, "step", told)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert [tuned(tmp_path / "cut", cfg) is None for _ in range(3)] == [True, True, False]
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(calls) == 5  # none was taken twice
    assert contents(tmp_path / "whole" / "model") == contents(tmp_path / "cut" / "model")
    logs = [(tmp_path / name / "log.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


def test_sheets_leave_the_training_as_it_is(tuned, tmp_path):
    """They are drawn with the averaged weights, which are not those that learn on."""
    plain = replace(TINY, max_train_steps=4, validation_prompts="a red circle")  # an epoch has three
    found = [tuned(tmp_path / str(every), replace(plain, validation_epochs=every)) for every in (0, 1)]
    assert len(list((tmp_path / "1/sheets").iterdir())) == 1
    one, two = (contents(folder / "unet") for folder in found)
    assert one == two


def test_the_last_checkpoints_are_kept(tmp_path):
    net = torch.nn.Linear(1, 1)
    found = Learner(net, None, steps=9, part=1, lr=1.0, max_grad_norm=0.0)
    for limit, kept in ((1, [9]), (2, [8, 9]), (0, [7, 8, 9])):
        checkpoints = Checkpoints(tmp_path / str(limit), "denoiser", 1, limit)
        (tmp_path / str(limit)).mkdir()
        for step in (7, 8, 9):
            torch.nn.init.constant_(net.weight, step)
            checkpoints.save(step, found)
        assert [step for step, _ in checkpoints.found()] == kept
        torch.nn.init.zeros_(net.weight)
        assert checkpoints.restore(found) == 9 and net.weight.item() == 9


def test_a_loss_that_is_not_finite_names_its_step(world, tmp_path):
    net = torch.nn.Linear(1, 1)
    run = Run(tmp_path, Command(run=RunConfig(device="cpu")), "buffer", "x")
    losses = iter([1.0, 1.0, float("nan")])
    found = Learner(net, lambda batch: net.weight.sum() * 0 + next(losses), 5, 8, 1e-3, 1.0)
    checkpoints, batches = (
        Checkpoints(tmp_path / "checkpoints", "x", 2, 2),
        lambda steps: islice([batch] * 9, len(steps)),
    )
    batch = one_batch(world)
    with pytest.raises(RunError, match=r"part x, step 3: the loss is not finite.*checkpoint, of step 2"):
        learn(found, lambda steps: (item for item in batches(steps)), checkpoints, run, "part x", "loss")
    assert [step for step, _ in checkpoints.found()] == [2]


def test_what_cannot_be_is_refused(world, tuned, tmp_path):
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        tuned(tmp_path / "half", replace(TINY, mixed_precision="fp16"))
    with pytest.raises(UserError, match="--cache_latents encodes each image once, and --center_crop false"):
        replace(TINY, cache_latents=True, center_crop=False).check()
    with pytest.raises(UserError, match="--resolution is 20"):
        replace(TINY, resolution=20).check()
    run = Run(tmp_path / "mute", Command(run=RunConfig(device="cpu")), "buffer", "x")
    with pytest.raises(UserError, match="no training image has a caption"):
        tune(TINY, world.catalogue, {}, tmp_path / "mute", run)
    told = replace(TINY, lr_warmup_steps=3).idle()
    assert (
        "lr_warmup_steps" in told
        and "vae_lr" in told
        and "lr_warmup_steps" not in replace(TINY, lr_scheduler="cosine", vae_steps=1).idle()
    )


def test_half_precision_is_close(world, model):
    batch, other = one_batch(world), replace(model, unet=copy.deepcopy(model.unet))
    losses = [learner(world, whose, half=half).step(batch) for whose, half in ((model, None), (other, torch.bfloat16))]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)
    assert all(value.dtype == torch.float32 for value in other.unet.parameters())
