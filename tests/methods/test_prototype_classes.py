"""Pairs of prototypes, class by class, by an encoder that only shrinks images."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torchvision import transforms

from data.catalogue import CatalogueConfig, Kind, build_catalogue
from methods.prototype_classes import COMPAT, PrototypeConfig, class_prototypes, find_prototypes
from methods.prototype_texts import TextConfig
from tests.conftest import contents
from utils.config import options_of
from utils.errors import RunError, UserError

COLOURS = {"ant": [(250, 20, 20), (20, 20, 250)], "bee": [(20, 250, 20), (250, 250, 20)]}
NAMES = {(250, 20, 20): "red", (20, 20, 250): "blue", (20, 250, 20): "green", (250, 250, 20): "yellow"}
EACH = 12
CFG = PrototypeConfig(ipc=2, size=16, batch_size=5)
TEXTS = TextConfig()


class Shrinker:
    """An autoencoder of sorts: three channels are the image's, an eighth of its size; the fourth is their mean."""

    def __init__(self):
        self.seen, self.loads, self.fail_after = [], 0, 1 << 30

    def load(self):
        self.loads += 1
        return self

    def encode(self, images, generators=None):
        if len(self.seen) >= self.fail_after:
            raise KeyboardInterrupt
        assert images.dtype == torch.float32 and images.abs().max() <= 1
        self.seen.append(images)
        small = F.avg_pool2d(images, 8)
        latents = torch.cat([small, small.mean(1, keepdim=True)], 1)
        if generators is not None:
            latents = latents + 0.1 * torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators])
        return latents

    @property
    def count(self):
        return sum(map(len, self.seen))


def draw(path, colour, seed, shape=(20, 28)):
    rng = np.random.default_rng(seed)
    pixels = np.array(colour) + rng.integers(-9, 9, (*shape, 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder train of two classes, each of two colours in turn."""
    monkeypatch.chdir(tmp_path)
    for ident, colours in COLOURS.items():
        for number in range(EACH):
            draw(tmp_path / "train" / ident / f"{number:02}.png", colours[number % 2], number)
    return tmp_path


def classes(place, **changes):
    return build_catalogue(CatalogueConfig(dataset="folder", data_path=str(place), workers=1, **changes))


def captions_of(catalogue):
    """Each names its colour, which is what tells one cluster of a class from the other."""
    return {
        file: f"The {kind.ident} {NAMES[COLOURS[kind.ident][number % 2]]} as seen on a day."
        for kind, files in zip(catalogue.kinds, catalogue.train, strict=True)
        for number, file in enumerate(files)
    }


def made(place, model=None, cfg=CFG, texts=TEXTS, catalogue=None, captions=None, folder="run", seed=0, name="model"):
    catalogue = catalogue or classes(place)
    captions = captions_of(catalogue) if captions is None else captions
    model = model or Shrinker()
    return list(class_prototypes(cfg, texts, catalogue, captions, place / folder, seed, name, model.load))


def equal(one, other):
    plain = [{**vars(found), "latents": found.latents.tolist()} for found in (one, other)]
    return plain[0] == plain[1]


class TestPairs:
    def test_each_colour_is_a_cluster(self, place):
        model = Shrinker()
        found = made(place, model, replace(CFG, contamination=0.0))
        assert [(one.ident, one.label) for one in found] == [(ident, ident) for ident in COLOURS]
        latents = torch.cat(model.seen)
        for number, one in enumerate(found):
            own = F.avg_pool2d(latents[number * EACH : (number + 1) * EACH], 8)
            own = torch.cat([own, own.mean(1, keepdim=True)], 1)
            assert one.files == [f"{one.ident}/{i:02}.png" for i in range(EACH)] and one.sizes == [6, 6]
            for k, (latent, members) in enumerate(zip(one.latents, one.members, strict=True)):
                rows = [one.files.index(file) for file in members]
                assert len({row % 2 for row in rows}) == 1  # one colour
                assert torch.equal(latent.flatten(), own[rows].flatten(1).double().mean(0).float())
                nearest = (own[rows] - latent).square().flatten(1).sum(1).argmin()
                assert one.nearest[k] == members[nearest]
                colour = NAMES[COLOURS[one.ident][rows[0] % 2]]
                assert colour in one.texts[k] and one.words[k][0] == (colour, 6) and one.text_files[k] in members
        assert found[0].latents.shape == (2, 4, 2, 2) and found[0].latents.dtype == torch.float32

    def test_images_are_squashed_as_torchvision_does(self, place):
        """Not cropped: spec and published code resize to a square."""
        model = Shrinker()
        made(place, model, catalogue=classes(place, nclass=1))
        squash = transforms.Compose(
            [transforms.Resize((16, 16)), transforms.ToTensor(), transforms.Normalize(0.5, 0.5)]
        )
        images = [squash(Image.open(file)) for file in sorted((place / "train" / "ant").iterdir())]
        assert torch.allclose(torch.cat(model.seen), torch.stack(images), atol=1e-6)
        assert [len(batch) for batch in model.seen] == [5, 5, 2]

    def test_an_outlier_is_in_no_cluster(self, place):
        draw(place / "train" / "ant" / "05.png", (255, 255, 255), 5)
        captions = captions_of(classes(place))
        captions["ant/05.png"] = "white " * 50
        found = made(place, captions=captions)[0]
        assert not found.inliers[5] and int(found.inliers.sum()) == 10  # two of twelve go at 0.1
        assert "ant/05.png" not in str(found.members) and "white" not in str(found.words) + str(found.texts)
        kept = made(place, cfg=replace(CFG, contamination=0.0), captions=captions)[0]
        assert kept.inliers.all() and "white" in str(kept.words)

    def test_a_medoid_is_a_member(self, place):
        model = Shrinker()
        means, medoids = made(place), made(place, model, replace(CFG, medoid=True), folder="other")
        for mean, medoid in zip(means, medoids, strict=True):
            assert mean.members == medoid.members and mean.nearest == medoid.nearest and mean.texts == medoid.texts
            for latent, file in zip(medoid.latents, medoid.nearest, strict=True):
                image = torch.cat(model.seen)[[*COLOURS].index(medoid.ident) * EACH + medoid.files.index(file)]
                assert torch.equal(latent[:3], F.avg_pool2d(image, 8))

    def test_images_without_captions(self, place):
        catalogue = classes(place)
        some = {file: text for file, text in captions_of(catalogue).items() if file in ("ant/04.png", "ant/01.png")}
        ant, bee = made(place, captions=some, cfg=replace(CFG, contamination=0.0))
        assert sorted(ant.text_files) == ["ant/01.png", "ant/04.png"] and ant.sizes == [6, 6]
        assert bee.texts == ["bee", "bee"] and bee.text_files == ["", ""]

    def test_the_caption_nearest_to_the_mean_stands_in(self, place):
        catalogue = classes(place)
        same = dict.fromkeys(captions_of(catalogue), "it is the same")
        for one in made(place, captions=same):
            assert one.text_files == one.nearest and one.words == [[], []]


class TestGoingOn:
    def test_a_killed_run_ends_as_an_uninterrupted_one(self, place):
        whole, killed, resumed = Shrinker(), Shrinker(), Shrinker()
        straight = made(place, whole, folder="whole")
        killed.fail_after = 4  # within the second class
        with pytest.raises(KeyboardInterrupt):
            made(place, killed)
        assert [path.stem for path in (place / "run" / "prototypes").glob("*.json")] == ["ant"]
        again = made(place, resumed)
        assert whole.count == 2 * EACH and resumed.count == EACH and whole.loads == resumed.loads == 1
        assert all(map(equal, again, straight))
        assert contents(place / "run") == contents(place / "whole")

    def test_what_is_there_is_not_made_again(self, place):
        first = made(place)
        before = {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")}
        model = Shrinker()
        assert all(map(equal, made(place, model), first)) and model.loads == 0
        assert {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*")} == before

    @pytest.mark.parametrize(
        "changes, encoded",
        [
            (dict(cfg=replace(CFG, ipc=3)), 0),
            (dict(cfg=replace(CFG, contamination=0.2)), 0),
            (dict(cfg=replace(CFG, medoid=True)), 0),
            (dict(texts=TextConfig(threshold=0.3)), 0),
            (dict(seed=1), 0),
            (dict(cfg=replace(CFG, size=24)), 2 * EACH),
            (dict(cfg=replace(CFG, latent="sample")), 2 * EACH),
            (dict(cfg=replace(CFG, keep_latents="float16")), 2 * EACH),
            (dict(name="another model"), 2 * EACH),
        ],
    )
    def test_only_what_depends_on_a_change_is_made_anew(self, place, changes, encoded):
        first, model = made(place), Shrinker()
        again = made(place, model, **changes)
        assert model.count == encoded
        assert all(one.inputs != other.inputs for one, other in zip(first, again, strict=True))
        assert all(map(equal, again, made(place, folder="fresh", **changes)))

    def test_a_sample_is_an_image_s_own(self, place):
        """Named after its file and the seed: in whichever batch, and never one that another seed drew."""

        def noise(**options):
            model = Shrinker()
            made(place, model, cfg=replace(CFG, **{"latent": "sample"} | options.pop("cfg", {})), **options)
            names = [f"{options.get('folder', 'run')}/latents/{ident}.safetensors" for ident in COLOURS]
            return model.count, torch.cat([load_file(name)["latents"] for name in names])

        mode = noise(cfg={"latent": "mode"}, folder="mode")[1]
        count, first = noise()
        assert count == 2 * EACH and len({round(row[0, 0, 0].item(), 4) for row in first - mode}) == 2 * EACH
        assert torch.equal(noise(cfg={"batch_size": 4}, folder="fours")[1], first)
        count, other = noise(seed=1)  # where the first ones are
        assert count == 2 * EACH and (other != first).all()

    def test_a_changed_image_or_caption_concerns_its_class(self, place):
        def alike(some, others):
            return [one.inputs == other.inputs for one, other in zip(some, others, strict=True)]

        first, model = made(place), Shrinker()
        draw(place / "train" / "bee" / "03.png", (200, 200, 200), 99)
        second = made(place, model)
        assert model.count == EACH and alike(first, second) == [True, False]
        captions = captions_of(classes(place)) | {"ant/00.png": "Another caption."}
        assert alike(second, made(place, model, captions=captions)) == [False, True] and model.count == EACH

    def test_a_class_depends_on_no_other(self, place):
        first, model = made(place, catalogue=classes(place, nclass=1)), Shrinker()
        again = made(place, model)
        assert equal(first[0], again[0]) and model.count == EACH

    def test_damaged_files_are_made_anew(self, place):
        first = made(place)
        for path in ("latents/ant.safetensors", "prototypes/ant.json"):
            (place / "run" / path).write_bytes(b"{")
        assert all(map(equal, made(place), first))

    def test_batches_do_not_matter(self, place):
        assert all(map(equal, made(place), made(place, cfg=replace(CFG, batch_size=12), folder="other")))


class TestLatents:
    def test_samples_have_chance_of_their_own(self, place):
        sample = replace(CFG, latent="sample")
        first, mode = made(place, cfg=sample), made(place, folder="mode")
        assert not torch.equal(first[0].latents, mode[0].latents)
        others = made(place, cfg=replace(sample, batch_size=3), catalogue=classes(place, nclass=1), folder="other")
        assert equal(others[0], first[0])
        assert not torch.equal(first[0].latents, made(place, cfg=sample, seed=1, folder="seed")[0].latents)

    def test_half_of_the_size(self, place):
        """Rounded before they are used, so that a run that reads them goes on as the one that wrote them."""
        half = replace(CFG, keep_latents="float16")
        first = made(place, cfg=half)
        whole = made(place, folder="whole")
        sizes = [(place / run / "latents" / "ant.safetensors").stat().st_size for run in ("run", "whole")]
        assert sizes[1] - sizes[0] == EACH * 4 * 2 * 2 * 2
        assert 0 < (first[0].latents - whole[0].latents).abs().max() < 1e-3
        for path in (place / "run" / "prototypes").iterdir():
            path.unlink()
        model = Shrinker()
        assert all(map(equal, made(place, model, half), first)) and model.loads == 0

    def test_not_kept(self, place):
        none = made(place, cfg=replace(CFG, keep_latents="none"))
        assert not (place / "run" / "latents").exists()
        assert all(map(equal, none, made(place, folder="kept")))

    def test_numbers_that_are_none(self, place):
        model = Shrinker()
        model.encode = lambda images, chance: torch.full((len(images), 4, 2, 2), torch.nan)
        with pytest.raises(RunError, match="latents of class ant are not finite; encode them with --dtype float32"):
            made(place, model)
        assert not (place / "run").exists()


class TestTooFew:
    def test_told_before_anything_is_encoded(self, place):
        model, cfg = Shrinker(), replace(CFG, ipc=13)
        told = r"class ant has 12 training images, fewer than --ipc 13 \(as 2 of 2 classes have\); lower --ipc, or give"
        with pytest.raises(UserError, match=told):
            class_prototypes(cfg, TEXTS, classes(place), {}, place / "run", 0, "model", model.load)
        assert model.loads == 0

    def test_told_once_outliers_are_out(self, place):
        """How many that will be is known before."""
        told = r"class ant has 10 of its 12 training images left once outliers are out, fewer than --ipc 12 \(as 2 of 2"
        model, cfg = Shrinker(), replace(CFG, ipc=12)
        with pytest.raises(UserError, match=told):
            class_prototypes(cfg, TEXTS, classes(place), {}, place / "run", 0, "model", model.load)
        assert model.loads == 0

    @pytest.mark.parametrize(
        "ipc, contamination, count", [(12, 0.0, 12), (12, 0.1, 6), (20, 0.1, 10), (50, 0.0, 10), (13, 0.1, 1)]
    )
    def test_shared_by_a_divisor(self, place, ipc, contamination, count):
        cfg = replace(CFG, ipc=ipc, contamination=contamination, few_images="share")
        (found,) = made(place, cfg=cfg, catalogue=classes(place, nclass=1))
        assert len(found.texts) == len(found.latents) == count and ipc % count == 0 and min(found.sizes) > 0

    def points(self, *values):
        latents = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 4, 2, 2)
        return Kind("n01", "tench"), tuple(f"n01/{i:02}.png" for i in range(len(values))), latents

    def test_copies_of_an_image(self):
        many = self.points(*[1.0, 2.0, 3.0] * 4)
        cfg = replace(CFG, ipc=4, contamination=0.0)
        told = r"class n01 \(tench\) has 3 different images of 12 left for its clusters, fewer than --ipc 4"
        with pytest.raises(UserError, match=told):
            find_prototypes(*many, {}, cfg, TEXTS, 0)
        found = find_prototypes(*many, {}, replace(cfg, few_images="share"), TEXTS, 0)
        assert found.sizes in ([4, 8], [8, 4])

    def test_one_image(self):
        found = find_prototypes(*self.points(5.0), {}, replace(CFG, ipc=1), TEXTS, 0)
        assert found.latents.flatten().tolist() == [5.0] * 16 and found.members == [["n01/00.png"]]

    def test_too_few_to_tell_outliers(self, place, capsys):
        for number in range(10, EACH):
            (place / "train" / "bee" / f"{number}.png").unlink()
        made(place)
        told = "note: 1 of 2 classes have no more than 10 training images (the first is bee), too few to tell"
        assert told in capsys.readouterr().out
        made(place, cfg=replace(CFG, contamination=0.0))
        assert "note" not in capsys.readouterr().out


class TestOptions:
    @pytest.mark.parametrize(
        "change, told",
        [({"contamination": 0.6}, "--contamination is 0.6; at most half"), ({"size": 500}, "--size 500 .* give 504")],
    )
    def test_impossible(self, change, told):
        with pytest.raises(UserError, match=told):
            replace(CFG, **change).check()

    def test_the_published_way_names_options(self):
        known = options_of(PrototypeConfig) | options_of(TextConfig)
        assert len(COMPAT) == 5
        for name, value in COMPAT.items():
            assert known[name].read(value, name) == value
