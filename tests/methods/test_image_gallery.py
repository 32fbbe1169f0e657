"""What a distillation of images leaves to look at: grids, published tensors, and a page that says what is learned."""

import base64
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import build_images
from data.images import ImagesConfig
from methods.core.evaluation import Report
from methods.core.results import as_record, write_result
from methods.image_files import FORMAT, load_images
from methods.image_gallery import image_gallery, label_text, refresh_page, save_grids
from methods.images import SyntheticConfig, SyntheticImages
from methods.mtt import Distill
from utils.config import flat

NAMES = ("ant", "bee", "cat & dog")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """`sets(channels, zca)`: random pictures of 6 x 6 in three classes; zca may be a kind of whitening."""
    folder, rng = tmp_path_factory.mktemp("npz"), np.random.default_rng(0)

    def make(channels=3, zca=False):
        images, labels = rng.integers(0, 256, (30, 6, 6, channels), dtype=np.uint8), np.arange(30) % 3
        arrays = {"train_images": images, "train_labels": labels, "test_images": images[:3], "test_labels": labels[:3]}
        np.savez(folder / "set.npz", classes=np.array(NAMES), **arrays)
        white = {"zca": bool(zca), "zca_kind": zca if isinstance(zca, str) else "mtt"}
        cfg = ImagesConfig(dataset="npz", data_path=f"{folder}/set.npz", holdout=0, cache_dir=f"{folder}/c", **white)
        return build_images(cfg, "cpu"), cfg

    return make


@pytest.fixture
def gallery(sets, open_run):
    """`gallery(channels, zca, draw, ...)`: two images a class, with options of SyntheticConfig, and their gallery."""

    def make(channels=3, zca=False, draw=True, ema=0.0, labels="hard", **options):
        data, cfg = sets(channels, zca)
        images = SyntheticConfig(ipc=2, ema_decay=ema, labels=labels, **options)
        side = 6 * (images.canvas_size if images.texture else 1)
        start = torch.arange(3).repeat_interleave(2)
        start = start if labels == "hard" else torch.randn(6, 3)
        pixels = torch.randn(6, channels, side, side, generator=torch.Generator().manual_seed(3))
        learned = SyntheticImages(pixels, start, 6, images)
        whitening = {} if data.zca is None else {"zca": data.zca.state()}
        meta = noted(cfg, images, data)
        run = open_run()
        return learned, data, image_gallery(run, data, learned.state_dict, meta, draw, lambda: whitening)

    return make


def noted(cfg, images, data):
    """What a distilled file notes of its making, as far as a gallery reads it."""
    config = flat(Distill(data=cfg, images=images))
    meta = {"format": FORMAT, "config": config, "classes": list(data.classes), "labels": images.label_kind}
    return meta | {"mean": data.mean, "std": data.std, "zca": None if data.zca is None else data.zca.digest}


def report(value):
    return Report({"acc": [value - 1, value + 1]})


def cells(path, side, upscale, count, per_row=10):
    """The pictures of a grid, (3, side, side) uint8 each; a block of pixels must be of one colour."""
    grid, big, found = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1), side * upscale, []
    columns = min(per_row, count)
    assert grid.shape == (3, -(-count // columns) * (big + 2) + 2, columns * (big + 2) + 2)
    for index in range(count):
        top, left = 2 + index // columns * (big + 2), 2 + index % columns * (big + 2)
        picture = grid[:, top : top + big, left : left + big]
        small = picture[:, ::upscale, ::upscale]
        assert torch.equal(small.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2), picture)
        found.append(small)
    return found


def stretched(image):
    low, high = image.min(), image.max()
    return ((image - low) / (high - low) * 255 + 0.5).to(torch.uint8).expand(3, -1, -1)


def shown(page):
    """The pictures on a page, as (3, H, W)."""
    parts = page.split('src="data:image/png;base64,')[1:]
    images = [Image.open(io.BytesIO(base64.b64decode(part.split('"')[0]))).convert("RGB") for part in parts]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


class TestFiles:
    def test_what_is_made(self, gallery):
        _, _, found = gallery()
        found.scored(0, report(40.0))
        found.keep(0, True)
        names = {path.name for path in found.run.folder.iterdir()} - {"config.yaml", ".lock"}
        assert names == {
            *("distilled_0.pt", "distilled_best.pt", "images_best.pt", "labels_best.pt", "lr_best.pt"),
            *("log.jsonl", "report.html", "synthetic_images_0.png", "clipped_synthetic_images_0_std_2.5.png"),
            *("card_best.json", "pictures_best"),
        }

    def test_the_card_and_the_pictures_are_of_the_best(self, gallery):
        images, data, found = gallery(zca=True)
        for step, score in ((0, 5.0), (2, 9.0), (4, 7.0)):
            with torch.no_grad():
                images.images += 0.1
                images.lr["net"] += 1
            found.scored(step, report(score))
            found.keep(step, step < 4)
        folder = found.run.folder
        card = json.loads((folder / "card_best.json").read_text())
        assert (card["step"], card["validation"]["acc"], card["classes"]) == (2, [9.0, 1.0], list(NAMES))
        assert card["lr"] == pytest.approx(2.01) and card["zca"] == data.zca.digest
        assert card["config"]["dsa_strategy"] == "color_crop_cutout_flip_scale_rotate"
        paths = sorted((folder / "pictures_best").rglob("*.png"))
        assert [str(path.relative_to(folder / "pictures_best")) for path in paths] == [
            f"000{label}/000{number}.png" for label in range(3) for number in range(2)
        ]
        best = torch.load(folder / "images_best.pt", weights_only=True)
        drawn = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in paths])
        assert torch.equal(drawn, data.pictures(best)) and drawn.float().std() > 10
        plain = torch.load(folder / "images_zca_best.pt", weights_only=True)
        torch.testing.assert_close(data.zca.whiten(plain), best, rtol=1e-3, atol=1e-3)

    @pytest.mark.parametrize("options", [{}, {"ema": 0.5}, {"labels": "learned"}, {"labels": "teacher"}])
    def test_published_tensors_are_the_best_file(self, gallery, options):
        images, _, found = gallery(draw=False, **options)
        if options.get("labels") == "teacher":
            images.relabel(torch.rand(6, 3).softmax(1))
        for step, score in ((0, 5.0), (2, 9.0), (4, 7.0)):
            with torch.no_grad():
                images.images += 1
            images.project()
            found.scored(step, report(score))
            found.keep(step, step < 4)
        folder = found.run.folder
        best, published = (load_images([folder / name]) for name in ("distilled_best.pt", "images_best.pt"))
        third = load_images([folder / "distilled_2.pt"])
        assert best.meta["step"] == 2 and best.meta["validation"] == {"acc": [9.0, 1.0]}
        for other in (published, third):
            assert torch.equal(best.images, other.images) and torch.equal(best.labels, other.labels)
            assert best.lr == other.lr
        assert not torch.equal(best.images, load_images([folder / "distilled_4.pt"]).images)
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        assert [row["val_acc"] for row in log] == [5.0, 9.0, 7.0]

    def test_only_the_best_file_carries_the_whitening(self, gallery):
        _, data, found = gallery(zca=True, draw=False)
        found.keep(0, True)
        folder = found.run.folder
        best, step = (load_images([folder / f"distilled_{name}.pt"]) for name in ("best", 0))
        assert torch.equal(best.zca["matrix"], data.zca.matrix) and step.zca == {}
        assert best.meta["zca"] == step.meta["zca"] == data.zca.digest

    def test_no_grids_unless_asked(self, gallery):
        _, _, found = gallery(draw=False, texture=True)
        found.keep(0, True)
        assert not list(found.run.folder.glob("*.png")) and (found.run.folder / "report.html").exists()


class TestGrids:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_each_picture_in_its_own_range(self, gallery, channels):
        images, _, found = gallery(channels)
        found.keep(3, False)
        pictures = cells(found.run.folder / "synthetic_images_3.png", 6, 4, 6)
        for picture, image in zip(pictures, images.images.detach(), strict=True):
            assert torch.equal(picture, stretched(image))

    def test_clipped(self, sets, tmp_path):
        data, _ = sets(1)
        images = torch.zeros(2, 1, 6, 6)
        images[0, 0, 0, 0], images[1, 0, 2] = 100.0, 1.0
        save_grids(tmp_path, 0, images, data)
        plain, clipped = (
            cells(tmp_path / name, 6, 4, 2)
            for name in ("synthetic_images_0.png", "clipped_synthetic_images_0_std_2.5.png")
        )
        assert torch.equal(clipped[1], plain[1])  # nothing to cut
        reach = 2.5 * float(images.std()) + float(images.mean())
        assert reach < 100 and torch.equal(clipped[0], stretched(images[0].clamp(max=reach)))

    def test_the_average_is_shown(self, gallery):
        images, _, found = gallery(ema=0.5)
        with torch.no_grad():
            images.images.copy_(torch.randn(6, 3, 6, 6))
        found.keep(1, False)
        pictures = cells(found.run.folder / "synthetic_images_1.png", 6, 4, 6)
        assert all(torch.equal(a, stretched(b)) for a, b in zip(pictures, images.average, strict=True))

    def test_whitening_is_undone(self, gallery):
        images, data, found = gallery(zca=True)
        real = data["train"].pixels.whole()[:6]
        with torch.no_grad():
            images.images.copy_(data["train"].images(torch.arange(6)))
        found.keep(0, True)
        folder = found.run.folder
        pictures = cells(folder / "dewhitened_images_0.png", 6, 4, 6)
        for picture, image in zip(pictures, real, strict=True):
            assert (picture.int() - stretched(image.float()).int()).abs().max() <= 1
        cells(folder / "clipped_dewhitened_images_0_std_2.5.png", 6, 4, 6)
        raw = cells(folder / "synthetic_images_0.png", 6, 4, 6)
        assert torch.equal(raw[0], stretched(images.images.detach()[0]))
        page = shown((folder / "report.html").read_text(encoding="utf-8"))
        for index in (0, 2, 4):  # before and after, in turn
            assert (page[index].int() - real[index // 2].int()).abs().max() <= 1

    @pytest.mark.parametrize("channels", [1, 3])
    def test_textures_go_on_at_their_edges(self, gallery, channels):
        """Three by three: what is beside the border between tiles is what is at the other side of a tile."""
        _, _, found = gallery(channels, texture=True, canvas_size=2)
        found.keep(0, True)
        tiled = cells(found.run.folder / "textures_0.png", 36, 1, 6, per_row=5)
        clipped = cells(found.run.folder / "clipped_synthetic_images_0_std_2.5.png", 12, 4, 6)
        for picture, once in zip(tiled, clipped, strict=True):
            assert (picture[:, 12:24, 12:24].int() - once.int()).abs().max() <= 1
            for border in (12, 24):
                assert torch.equal(picture[:, :12, border - 1 : border + 1], picture[:, :12, [11, 0]])
                assert torch.equal(picture[:, border - 1 : border + 1, :12], picture[:, [11, 0], :12])

    def test_large_pictures_are_not_enlarged(self, sets, tmp_path):
        data, _ = sets()
        save_grids(tmp_path, 0, torch.randn(12, 3, 65, 65), data)
        assert Image.open(tmp_path / "synthetic_images_0.png").size == (10 * 67 + 2, 2 * 67 + 2)


class TestPage:
    def test_what_it_says(self, gallery):
        images, data, found = gallery()
        found.run.log(0, loss=0.9, lr_net=0.01)
        found.scored(0, report(40.0))
        found.keep(0, True)
        page = (found.run.folder / "report.html").read_text(encoding="utf-8")
        for text in (
            "6 distilled images",
            "npz · ConvNet · 2 a class",
            *("ant", "bee", "cat &amp; dog"),
            "expert_epochs",
        ):
            assert text in page
        assert "Matching loss" in page and "Learned inner rate" in page and "Accuracy while distilling" in page
        pictures = shown(page)
        expected = data.pictures(images.images, fit=True)
        assert len(pictures) == 12 and all(torch.equal(pictures[2 * i], expected[i]) for i in range(6))

    def test_soft_labels_in_words(self):
        state = {"labels": torch.tensor([[0.62, 0.18, 0.2], [0.0, 1.0, 0.0]])}
        meta = {"labels": "teacher", "classes": list(NAMES)}
        assert label_text(state, meta, torch.tensor([1, 0])) == ["bee 100%, ant 0%", "ant 62%, cat & dog 20%"]
        state["labels"] = (state["labels"] + 1e-9).log()
        assert label_text(state, meta | {"labels": "learned"}, torch.tensor([0])) == ["ant 62%, cat & dog 20%"]
        assert label_text({"labels": torch.tensor([2, 0])}, meta, torch.tensor([0, 1])) == ["cat & dog", "ant"]

    def test_before_and_after(self, gallery):
        images, data, found = gallery(ema=0.5)
        before = data.pictures(images.average, fit=True)
        found.keep(0, True)
        with torch.no_grad():
            images.images += 2
        images.project()
        found.keep(5, True)
        pictures = shown((found.run.folder / "report.html").read_text(encoding="utf-8"))
        after = data.pictures(images.average, fit=True)
        assert torch.equal(pictures[0], before[0]) and torch.equal(pictures[1], after[0])
        assert not torch.equal(before, after)

    def test_whitened_as_podd_does_it_shows_each_image_around_its_own_middle(self, gallery):
        _, _, found = gallery(zca="podd")
        found.keep(0, True)
        written = found.run.folder / "report.html"
        first = shown(written.read_text(encoding="utf-8"))
        assert all(abs(picture.float().mean() - 127.5) < 8 and picture.float().std() > 25 for picture in first)
        refresh_page(found.run.folder)
        assert all(map(torch.equal, first, shown(written.read_text(encoding="utf-8"))))

    @pytest.mark.parametrize("zca", [False, True, "podd"])
    def test_it_is_made_anew_with_later_evaluations(self, gallery, zca):
        _, _, found = gallery(1, zca=zca)
        found.scored(0, report(5.0))
        found.keep(0, True)
        folder = found.run.folder
        before = (folder / "report.html").read_text(encoding="utf-8")
        about = {"protocol": "clean", "about": "last epoch counts"}
        rows = [as_record("distilled", 6, Report({"acc": [12.34], "gain": [3.21], "lrs": [27.77]}, about))]
        write_result(folder / "eval" / "clean-ConvNet", rows, {"protocol": "clean"})
        refresh_page(folder)
        after = (folder / "report.html").read_text(encoding="utf-8")
        for number in ("12.3", "3.2", "27.8", "last epoch counts"):
            assert number in after and number not in before.split("data:image")[0]
        pictures = zip(shown(before), shown(after), strict=True)  # from the file alone, the same pictures
        assert all((a.int() - b.int()).abs().max() <= 1 for a, b in pictures)

    def test_other_folders_are_left_alone(self, gallery, tmp_path):
        _, _, found = gallery()
        found.keep(0, True)
        (found.run.folder / "distilled_0.pt").unlink()
        before = (found.run.folder / "report.html").read_bytes()
        refresh_page(found.run.folder)
        assert (found.run.folder / "report.html").read_bytes() == before
        refresh_page(tmp_path / "elsewhere")
        for name in ("distilled_0.pt", "distilled_best.pt"):
            torch.save(torch.zeros(2), tmp_path / name)
        refresh_page(tmp_path)
        assert not (tmp_path / "report.html").exists()

    def test_many_images_are_sampled_from_all_classes(self, sets, open_run):
        data, cfg = sets()
        images = SyntheticConfig(ipc=30)
        learned = SyntheticImages(torch.randn(90, 3, 6, 6), torch.arange(3).repeat_interleave(30), 6, images)
        meta = noted(cfg, images, data)
        image_gallery(open_run(), data, learned.state_dict, meta, False, dict).keep(0, True)
        (page,) = open_run("run", resume=True).folder.glob("report.html")
        text = page.read_text(encoding="utf-8")
        assert len(shown(text)) == 2 * 40 and all(text.count(name) >= 13 for name in ("ant", "bee", "cat &amp; dog"))
