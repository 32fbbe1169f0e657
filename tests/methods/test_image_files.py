"""Files of distilled images: our own, and the tensors that others publish."""

import os
import pickle

import pytest
import torch

from data.zca import fit_zca
from methods.image_files import FORMAT, as_targets, load_images, publish
from methods.images import SyntheticConfig, SyntheticImages
from utils.errors import UserError

IMAGES = torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))
HARD = torch.arange(3).repeat_interleave(2)
LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(**files):
    """Each tensor in a file of its name; the names of those of images."""
    for name, value in files.items():
        torch.save(value, f"{name}.pt")
    return [f"{name}.pt" for name in files if "images" in name]


def own(kind="hard", **changes):
    """A distilled file of ours, parts of it changed (None: left out), and the set that it was made of."""
    start = {"hard": HARD, "teacher": LOGITS.softmax(1), "learned": LOGITS}[kind]
    images = SyntheticImages(IMAGES, start, 4, SyntheticConfig(ipc=2, labels=kind, lr_teacher=0.03, ema_decay=0.5))
    with torch.no_grad():
        images.images += 1  # so that the average is something else
    state = images.state_dict() | {"meta": {"format": FORMAT, "labels": kind, "step": 7}} | changes
    torch.save({name: part for name, part in state.items() if part is not None}, "distilled.pt")
    return images


class TestOwn:
    @pytest.mark.parametrize("kind", ["hard", "teacher", "learned"])
    def test_it_holds_what_was_judged(self, kind):
        judged = own(kind).image_set(None)
        found = load_images(["distilled.pt"])
        assert torch.equal(found.images, judged.images) and torch.equal(found.labels, judged.labels)
        assert found.labels.dtype == judged.labels.dtype and found.soft == (kind != "hard")
        assert found.lr == judged.lr and found.meta["step"] == 7 and found.zca == {}

    def test_the_average_is_the_product(self):
        images = own()
        assert torch.equal(load_images(["distilled.pt"]).images, images.average)
        own(average=None)
        assert torch.equal(load_images(["distilled.pt"]).images, images.images.detach())

    def test_a_whitening_comes_along(self):
        zca = fit_zca(torch.rand(40, 3, 4, 4))
        own(zca=zca.state())
        found = load_images(["distilled.pt"]).zca
        assert torch.equal(found["mean"], zca.mean) and torch.equal(found["matrix"], zca.matrix)

    def test_logits_that_look_like_probabilities(self):
        """What the file says of its labels counts, not what they look like."""
        looks = torch.eye(3)[HARD]
        own("learned", labels=looks)
        assert torch.equal(load_images(["distilled.pt"]).labels, looks.softmax(1))

    @pytest.mark.parametrize(
        "changes",
        [
            {"images": None, "average": None},
            {"labels": None},
            {"lr": None},
            {"meta": None},
            {"meta": 3},
            {"meta": {}},
            {"meta": {"format": "new", "labels": "hard"}},
            {"meta": {"format": 1}},
            {"labels": HARD[:5]},
            {"labels": "hard"},
            {"average": IMAGES[0]},
            {"average": [1, 2]},
            {"lr": torch.ones(2)},
        ],
    )
    def test_files_of_something_else(self, changes):
        own(**changes)
        with pytest.raises(UserError, match=r"distilled\.pt is no file of distilled images"):
            load_images(["distilled.pt"])

    @pytest.mark.parametrize("kind, part", [("hard", "average"), ("learned", "labels")])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, kind, part, value):
        broken = {"average": IMAGES, "labels": LOGITS}[part].clone()
        broken[2, 1] = value
        own(kind, **{part: broken})
        with pytest.raises(UserError, match=r"are empty or not finite; take an earlier distilled file"):
            load_images(["distilled.pt"])

    @pytest.mark.parametrize("rate", [0.0, -0.01, float("nan"), float("inf")])
    def test_rates(self, rate):
        own(lr=torch.tensor(rate))
        with pytest.raises(UserError, match=f"its learned rate is {rate:g}"):
            load_images(["distilled.pt"])

    def test_a_newer_format(self):
        own(meta={"format": FORMAT + 1, "labels": "hard"})
        with pytest.raises(UserError, match=f"format {FORMAT + 1}, newer than this {FORMAT}; update the toolkit"):
            load_images(["distilled.pt"])

    def test_labels_of_its_own_are_not_replaced(self):
        own()
        save(labels=HARD)
        with pytest.raises(UserError, match="has its own labels; leave out --label_files"):
            load_images(["distilled.pt"], ["labels.pt"])


class TestPublished:
    def test_mtt(self):
        """Float images and int labels, as autograd held them; no rate."""
        paths = save(images_best=IMAGES.double().requires_grad_(), labels_best=HARD.flip(0).int())
        found = load_images(paths)
        assert torch.equal(found.images, IMAGES) and not found.images.requires_grad
        assert found.labels.dtype == torch.long and torch.equal(found.labels, HARD.flip(0))
        assert (found.lr, found.meta, found.zca, found.soft) == (None, {}, {}, False)

    def test_other_steps_have_their_own_labels(self):
        save(images_best=IMAGES, labels_best=HARD, labels_500=HARD.flip(0), images_500=IMAGES)
        assert torch.equal(load_images(["images_500.pt"]).labels, HARD.flip(0))

    def test_tesla(self):
        """Labels of a teacher: probabilities, taken as they are."""
        shares = LOGITS.softmax(1)
        found = load_images(save(images_best=IMAGES, labels_best=shares))
        assert torch.equal(found.labels, shares) and found.soft

    @pytest.mark.parametrize("name", ["labels_best", "ema_labels_best"])
    def test_ftd(self, name):
        """Averaged images beside the learned ones."""
        save(images_best=IMAGES + 1, ema_images_best=IMAGES, **{name: HARD.flip(0)})
        found = load_images(["ema_images_best.pt"])
        assert torch.equal(found.images, IMAGES) and torch.equal(found.labels, HARD.flip(0))

    @pytest.mark.parametrize("rate", [torch.tensor(0.07), torch.tensor([0.07], requires_grad=True), 0.07])
    def test_datm(self, rate):
        """Labels are logits, and the rate has a file."""
        found = load_images(save(images_best=IMAGES, labels_best=LOGITS.requires_grad_(), lr_best=rate))
        assert torch.equal(found.labels, LOGITS.detach().softmax(1)) and found.lr == pytest.approx(0.07)

    def test_several_files_are_one_set(self):
        """As Tiny with 50 images a class comes."""
        paths = save(images_a=IMAGES[:2], labels_a=HARD[:2], images_b=IMAGES[2:], labels_b=HARD[2:])
        found = load_images(paths)
        assert torch.equal(found.images, IMAGES) and torch.equal(found.labels, HARD)
        found = load_images(paths[::-1])
        assert torch.equal(found.images, IMAGES[[2, 3, 4, 5, 0, 1]]) and found.labels.tolist() == [1, 1, 2, 2, 0, 0]

    def test_labels_by_name(self):
        save(pixels=IMAGES, first=HARD[:4], second=HARD[4:])
        assert torch.equal(load_images(["pixels.pt"], ["first.pt", "second.pt"]).labels, HARD)

    def test_named_labels_win(self):
        save(images_best=IMAGES, labels_best=HARD, other=HARD.flip(0))
        assert torch.equal(load_images(["images_best.pt"], ["other.pt"]).labels, HARD.flip(0))

    def test_without_labels(self):
        assert len(load_images(save(images_best=IMAGES)).labels) == 0
        assert len(load_images(save(tensor_of_images=IMAGES)).labels) == 0

    def test_what_we_publish_comes_back(self, tmp_path):
        for kind, labels in (("hard", HARD), ("teacher", LOGITS.softmax(1)), ("learned", LOGITS)):
            publish(tmp_path / kind, IMAGES, labels, torch.tensor(0.3))
            found = load_images([tmp_path / kind / "images_best.pt"])
            assert torch.equal(found.images, IMAGES) and found.lr == pytest.approx(0.3)
            assert torch.equal(found.labels, as_targets(labels, kind == "learned"))

    @pytest.mark.parametrize(
        "files, says",
        [
            ({"labels_best": HARD[:5]}, "labels_best.pt and the like hold 5 labels for 6 images"),
            ({"labels_best": HARD.view(1, 2, 3)}, "labels_best.pt holds no tensor of labels"),
            ({"labels_best": torch.tensor(3)}, "labels_best.pt holds no tensor of labels"),
            ({"labels_best": [0, 0, 1, 1, 2, 2]}, "labels_best.pt holds no tensor of labels"),
            ({"labels_best": LOGITS / 0}, "labels_best.pt: its labels are empty or not finite"),
            ({"images_best": IMAGES / 0}, "images_best.pt: its images are empty or not finite"),
            ({"images_best": IMAGES[:0]}, "images_best.pt: its images are empty or not finite"),
            ({"images_best": IMAGES[0]}, "neither a distilled file nor a tensor of images"),
            ({"images_best": [IMAGES]}, "neither a distilled file nor a tensor of images"),
            ({"images_best": {"weight": IMAGES}}, "images_best.pt is no file of distilled images"),
            ({"lr_best": torch.tensor(-0.5)}, "lr_best.pt: its learned rate is -0.5"),
            ({"lr_best": torch.tensor(float("nan"))}, "lr_best.pt: its learned rate is nan"),
            ({"lr_best": torch.ones(2)}, "lr_best.pt holds no learned rate"),
            ({"lr_best": {"lr": 0.1}}, "lr_best.pt holds no learned rate"),
        ],
    )
    def test_what_does_not_fit(self, files, says):
        save(**{"images_best": IMAGES, "labels_best": HARD} | files)
        with pytest.raises(UserError, match=says):
            load_images(["images_best.pt"])

    @pytest.mark.parametrize("part", [{"images_b": IMAGES[:, :, 1:]}, {"labels_b": LOGITS}])
    def test_files_that_do_not_belong_together(self, part):
        save(**{"images_a": IMAGES, "labels_a": HARD, "images_b": IMAGES, "labels_b": HARD} | part)
        with pytest.raises(UserError, match=r"_b\.pt holds .* they do not belong together"):
            load_images(["images_a.pt", "images_b.pt"])

    def test_two_files_of_ours_are_no_set(self):
        own()
        with pytest.raises(UserError, match=r"distilled\.pt is neither a distilled file nor a tensor of images"):
            load_images(["distilled.pt", "distilled.pt"])


class TestTargets:
    @pytest.mark.parametrize(
        "labels, expected",
        [
            ([1, 0], [1, 0]),
            ([1.0, 0.0], [1, 0]),
            ([[0.25, 0.75], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]),
            ([[1, 0], [0, 1]], [[1.0, 0.0], [0.0, 1.0]]),
            ([[2.0, 2.0]], [[0.5, 0.5]]),  # no probabilities
            ([[1.5, -0.5]], [[0.8808, 0.1192]]),  # a sum of one does not make them any
        ],
    )
    def test_what_labels_are_follows_from_their_numbers(self, labels, expected):
        found = as_targets(torch.tensor(labels))
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=0)


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


class TestDamage:
    @pytest.mark.parametrize("name", ["images_best.pt", "labels_best.pt", "lr_best.pt"])
    @pytest.mark.parametrize("kind", ["cut", "empty", "text", "pickle", "torch pickle"])
    def test_every_file_is_named_and_nothing_is_run(self, name, kind):
        save(images_best=IMAGES, labels_best=HARD, lr_best=torch.tensor(0.1))
        with open(name, "rb") as file:
            half = file.read()[:300]
        if kind == "torch pickle":
            torch.save({"images": Harm()}, name)
        else:
            content = {"cut": half, "empty": b"", "text": b"no tensors here", "pickle": pickle.dumps(Harm(), 2)}[kind]
            with open(name, "wb") as file:
                file.write(content)
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            load_images(["images_best.pt"])
        assert not os.path.exists("harmed")

    def test_no_file(self):
        save(images_best=IMAGES)
        with pytest.raises(UserError, match="no distilled file at none"):
            load_images(["none.pt"])
        with pytest.raises(UserError, match="no labels at none"):
            load_images(["images_best.pt"], ["none.pt"])
