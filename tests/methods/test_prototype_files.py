"""Files of prototypes: ours, the released code's, and the manifest."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.catalogue import Catalogue, Kind
from methods.prototype_files import (
    ExchangeConfig,
    Manifest,
    Prototypes,
    export_published,
    import_published,
    load_prototypes,
    published_paths,
    published_text,
    save_prototypes,
)
from tests.conftest import rewrite
from utils.errors import UserError

IDENTS = {"n02": "tench, Tinca tinca", "n01": "church", "n03": "chain saw"}
# What float32 can hold: the smallest and the largest, both zeros, and a third.
EDGES = torch.tensor([1e-45, -3.4028235e38, 0.0, -0.0, 1 / 3, 16777217.0, 0.18215, -1e-7])


def catalogue(idents=IDENTS, dataset="imagenet"):
    kinds = tuple(Kind(ident, label) for ident, label in dict(idents).items())
    return Catalogue("nette", dataset, kinds, Path(), Path(), (), (), "", "", 1)


def pairs(ident="n01", k=2, inputs="a" * 64, seed=0):
    latents = torch.randn(k, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    latents[0].view(-1)[:8] = EDGES
    return Prototypes(
        ident,
        IDENTS[ident],
        latents,
        [f'a "{ident}" \\ {{{number}}} ü, as seen' for number in range(k)],
        [f"{ident}/{number}.png" for number in range(k)],
        [[("red", 3), ("big", 1)]] * k,
        [f"{ident}/{number}.png" for number in range(k + 2)],
        [*range(k), 0, -1],
        [f"{ident}/{number}.png" for number in range(k)],
        inputs,
    )


def same(one, other):
    assert torch.equal(one.latents.view(torch.int32), other.latents.view(torch.int32))  # bit for bit
    assert {**vars(one), "latents": 0} == {**vars(other), "latents": 0}


class TestOurs:
    def test_they_come_back(self, tmp_path):
        save_prototypes(tmp_path, pairs())
        found = load_prototypes(tmp_path, "n01")
        same(found, pairs())
        assert found.members == [["n01/0.png", "n01/2.png"], ["n01/1.png"]] and found.sizes == [2, 1]
        assert found.inliers.tolist() == [True, True, True, False]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["n01.json", "n01.safetensors"]

    def test_halves_do_not_mix(self, tmp_path):
        """Killed between its two files, then asked for as before: the old text does not go with the new latents."""
        save_prototypes(tmp_path, pairs())
        old = (tmp_path / "n01.json").read_text()
        save_prototypes(tmp_path, pairs(inputs="b" * 64, seed=1))
        (tmp_path / "n01.json").write_text(old)
        with pytest.raises(UserError, match="do not belong together"):
            load_prototypes(tmp_path, "n01")

    @pytest.mark.parametrize(
        "change, told",
        [
            ({"format": 99}, "newer format"),
            ({"format": None}, "no file of prototypes"),
            ({"texts": ["one"]}, "do not belong together"),
            ({"clusters": [1]}, "do not belong together"),
            ({"clusters": [None, 0, 0, 0]}, "no file of prototypes"),
            ({"texts": [1, "two"]}, "no file of prototypes"),
            ({"words": 3}, "no file of prototypes"),
            ({"surprise": 3}, "no file of prototypes"),
        ],
    )
    def test_other_files(self, change, told, tmp_path):
        save_prototypes(tmp_path, pairs())
        path = tmp_path / "n01.json"
        rewrite(path, lambda known: known | change)
        with pytest.raises(UserError, match=told) as error:
            load_prototypes(tmp_path, "n01")
        assert "\n" not in str(error.value) and str(path) in str(error.value)

    def test_damaged_latents(self, tmp_path):
        save_prototypes(tmp_path, pairs())
        path = tmp_path / "n01.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
        told = r"prototypes .*n01\.safetensors cannot be read .*--stages prototypes makes it anew"
        with pytest.raises(UserError, match=told):
            load_prototypes(tmp_path, "n01")


class TestPublished:
    @pytest.fixture
    def files(self, tmp_path):
        everything = [pairs(ident, seed=number) for number, ident in enumerate(IDENTS)]
        return export_published(tmp_path, iter(everything), "nette", 2, 0.7, 30, 1)

    def test_names_and_contents(self, files, tmp_path):
        image, text = files
        assert image == tmp_path / "nette-ipc2-0.7-30-kmexpand1.json"
        assert text == tmp_path / "nette_text" / "text_2_0.7_30.json"
        assert published_paths(tmp_path, "cifar10", 10, 1, 20, 10)[0].name == "cifar10-ipc10-1.0-20-kmexpand10.json"
        latents, texts = json.loads(image.read_text()), json.loads(text.read_text())
        assert list(latents) == list(texts) == list(IDENTS)
        for number, ident in enumerate(IDENTS):
            assert texts[ident] == pairs(ident).texts
            assert torch.equal(torch.tensor(latents[ident]), pairs(ident, seed=number).latents)

    def test_there_and_back_is_exact(self, files):
        found = list(import_published(*files, catalogue(), 4))
        assert [one.ident for one in found] == list(IDENTS)
        for number, one in enumerate(found):
            known = pairs(one.ident, seed=number)
            same(one, Prototypes(one.ident, known.label, known.latents, known.texts))
            assert one.members == [[], []] and one.inliers.tolist() == []

    def test_none(self, tmp_path):
        image, text = export_published(tmp_path, [], "nette", 1, 0.7, 30, 1)
        assert json.loads(image.read_text()) == json.loads(text.read_text()) == {}

    def test_a_failure_leaves_no_half(self, tmp_path):
        def failing():
            yield pairs()
            raise UserError("no more")

        with pytest.raises(UserError, match="no more"):
            export_published(tmp_path, failing(), "nette", 1, 0.7, 30, 1)
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    def test_classes_go_by_name(self, files):
        """Whatever order the data set has; and CIFAR's by any spelling of theirs."""
        image, text = files
        turned = catalogue(dict(reversed(IDENTS.items())))
        assert [one.label for one in import_published(image, text, turned, 2)] == list(IDENTS.values())
        for path in files:
            known = json.loads(path.read_text())
            path.write_text(json.dumps({"aquarium fish": known["n01"], "apples": known["n02"]}))
        fish = catalogue({"apple": "apple", "aquarium_fish": "aquarium fish"}, "cifar100")
        assert [one.ident for one in import_published(image, text, fish, 2)] == ["aquarium_fish", "apple"]

    def test_one_class_at_a_time(self, files):
        """The first class is there although the file breaks off in the last."""
        image, text = files
        image.write_text(image.read_text()[:-20])
        found = import_published(image, text, catalogue(), 2)
        assert [next(found).ident, next(found).ident] == ["n02", "n01"]
        with pytest.raises(UserError, match="cut short or not JSON"):
            next(found)

    def test_an_empty_caption_becomes_the_label(self, files):
        known = json.loads(files[1].read_text())
        known["n03"] = ["", "a caption"]
        files[1].write_text(json.dumps(known))
        assert list(import_published(*files, catalogue(), 2))[2].texts == ["chain saw", "a caption"]

    def refused(self, files, ipc=2, which=0, **changes):
        path = files[which]
        known = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({ident: value for ident, value in known.items() if value is not None}))
        with pytest.raises(UserError) as error:
            list(import_published(*files, catalogue(), ipc))
        assert "\n" not in str(error.value) and str(path) in str(error.value)
        return str(error.value)

    @pytest.mark.parametrize("which", [0, 1], ids=["image", "text"])
    def test_other_classes(self, files, which):
        assert "no prototypes of 1 of 3 classes, the first is n01" in self.refused(files, which=which, n01=None)
        assert "has class 'n04', which the data set lacks" in self.refused(files, which=which, n04=[])

    def test_a_class_twice(self, files):
        files[1].write_text(files[1].read_text()[:-1] + ', "n01": ["a"]}')
        with pytest.raises(UserError, match="has class 'n01' twice"):
            list(import_published(*files, catalogue(), 2))

    @pytest.mark.parametrize("which", [0, 1], ids=["image", "text"])
    def test_other_numbers_of_prototypes(self, files, which):
        message = self.refused(files, which=which, n01=json.loads(files[which].read_text())["n01"][:1])
        assert f"n01 has {2 - (which == 0)} prototypes in" in message and f"but {2 - (which == 1)} in" in message

    @pytest.mark.parametrize("ipc", [1, 3])
    def test_images_that_are_no_multiple(self, files, ipc):
        assert f"2 prototypes of class n02, and --ipc {ipc} is no multiple" in self.refused(files, ipc, 1)

    def test_no_prototypes(self, files):
        assert "0 prototypes of class n02" in self.refused(files, 2, 1, n02=[])

    @pytest.mark.parametrize(
        "wrong, told",
        [
            (math.nan, "not finite"),
            (math.inf, "not finite"),
            (1e39, "not finite"),  # in float32
            (None, "not numbers alone"),
            ("1.5", "not numbers alone"),
            ([1.0], "of rows that differ in length"),
        ],
    )
    def test_what_is_no_number(self, files, wrong, told):
        latents = torch.zeros(2, 4, 2, 2).tolist()
        latents[1][3][0][1] = wrong
        message = self.refused(files, n01=latents)
        assert "prototype 1 of class n01 is" in message and told in message

    @pytest.mark.parametrize("shape", [(2, 3, 2, 2), (2, 4, 4), (2, 4, 0, 2)])
    def test_other_shapes(self, files, shape):
        assert "not (4, height, width)" in self.refused(files, n01=torch.zeros(shape).tolist())

    def test_another_size_than_the_first(self, files):
        assert "is (4, 3, 2), the first (4, 2, 2)" in self.refused(files, n03=torch.zeros(2, 4, 3, 2).tolist())

    def test_captions_that_are_none(self, files):
        assert "prototype 1 of class n01 is no text" in self.refused(files, which=1, n01=["a", 3])

    def test_another_name(self, files, tmp_path):
        """The released commands write by the data set's name and read by the subset's."""
        with pytest.raises(UserError, match=r"did you mean .*nette-ipc2-0\.7-30-kmexpand1\.json"):
            list(import_published(tmp_path / "imagenet-ipc2-0.7-30-kmexpand1.json", files[1], catalogue(), 2))
        with pytest.raises(UserError, match="no image prototypes at"):
            list(import_published(tmp_path / "nowhere" / "x.json", files[1], catalogue(), 2))

    def test_where_the_captions_are(self, files, tmp_path, monkeypatch):
        image, text = files
        assert published_text(image, "") == text
        assert published_text(image, "nette_text/text_2_0.7_30.json") == text  # seen from beside the images
        monkeypatch.chdir(tmp_path)
        assert published_text(Path("nette-ipc2-0.7-30-kmexpand1.json"), "") == text.relative_to(tmp_path)
        with pytest.raises(UserError, match=r"no captions of .*looked for other\.json.*--text_prototype"):
            published_text(image, "other.json")
        with pytest.raises(UserError, match=r"no captions of mine\.json; name their file by --text_prototype"):
            published_text(Path("mine.json"), "")

    def test_options_that_nothing_reads(self):
        assert ExchangeConfig().idle() == {"text_prototype": "--prototype_path"}
        assert ExchangeConfig(save_prototype_path="a", prototype_path="b").idle() == {}


class TestManifest:
    def test_sections(self, tmp_path):
        manifest = Manifest(tmp_path)
        assert manifest.section("data") == {} and not manifest.path.exists()
        manifest.record("data", classes=["n01"], size=3)
        manifest.record("images", folder="images")
        manifest.record("data", size=4)
        again = Manifest(tmp_path)
        assert again.section("data") == {"classes": ["n01"], "size": 4} and again.section("model") == {}
        assert json.loads(again.path.read_text())["format"] == 1 and again.folder == tmp_path

    def test_it_is_found_from_below(self, tmp_path, monkeypatch):
        Manifest(tmp_path).record("data", size=3)
        below = tmp_path / "images" / "n01" / "n01-image0-0.png"
        below.parent.mkdir(parents=True)
        for place in (tmp_path, tmp_path / "images", tmp_path / "images" / "n01"):
            assert Manifest.find(place).section("data") == {"size": 3}
        assert Manifest.find(below) is None
        monkeypatch.chdir(tmp_path / "images")
        assert Manifest.find(".").folder == tmp_path

    @pytest.mark.parametrize("text", ["[]", "{}", '{"format": "x"}', '{"format": 1, "data": 3}', "{"])
    def test_it_is_no_manifest(self, text, tmp_path):
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(UserError, match=r"manifest\.json is"):
            Manifest(tmp_path).section("data")

    def test_it_is_newer(self, tmp_path):
        (tmp_path / "manifest.json").write_text('{"format": 2}')
        with pytest.raises(UserError, match="newer than this 1; update"):
            Manifest(tmp_path).section("data")
