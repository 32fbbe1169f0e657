"""What a poster leaves to look at: pictures in which people see what is learned, an animation, and one page."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from data import build_images
from data.images import ImagesConfig
from methods import poster_pictures
from methods.core.evaluation import Report
from methods.core.results import as_record, write_result
from methods.podd import Distill
from methods.poster import Poster, PosterConfig, real_canvas
from methods.poster_files import FORMAT, load_poster
from methods.poster_gallery import PosterGallery, columns, refresh_page
from methods.poster_layout import Grid, GridConfig, plan
from methods.poster_pictures import (
    animation,
    class_map,
    drawn,
    label_picture,
    named,
    read_poster,
    save_poster,
    scale_of,
    top_shares,
    visible,
)
from utils.config import flat
from utils.errors import UserError
from utils.pictures import png_bytes

NAMES = ("ant", "bee", "cat & dog", "three_toed-woodpecker")
# Two patches and two class areas each way, none of which overlap.
GRID = GridConfig(16, 16, patch_num_x=2, patch_num_y=2, poster_class_num_x=2, poster_class_num_y=2)
ORDER = torch.tensor([[2, 0], [1, 3]])


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """`sets(channels, zca_kind)`: random pictures of 8 x 8 in four classes, with shapes; no kind is no whitening."""
    folder = tmp_path_factory.mktemp("npz")

    def make(channels=3, zca_kind=""):
        rng = np.random.default_rng(0)
        shapes = rng.integers(0, 200, (40, 2, 2, channels)).repeat(4, 1).repeat(4, 2)
        images = (shapes + rng.integers(0, 56, (40, 8, 8, channels))).astype(np.uint8)
        labels = np.arange(40) % 4
        arrays = {"train_images": images, "train_labels": labels, "test_images": images[:4], "test_labels": labels[:4]}
        np.savez(folder / "set.npz", classes=np.array(NAMES), **arrays)
        kind = {"zca": True, "zca_kind": zca_kind} if zca_kind else {}
        cfg = ImagesConfig(dataset="npz", data_path=f"{folder}/set.npz", holdout=0, cache_dir=f"{folder}/c", **kind)
        return build_images(cfg, "cpu"), cfg

    return make


@pytest.fixture
def gallery(sets, open_run):
    """`gallery(channels, zca_kind, train_y, draw, name)`: a poster of noise and its gallery."""

    def make(channels=3, zca_kind="podd", train_y=True, draw=True, name="run"):
        (data, cfg), recipe = sets(channels, zca_kind), PosterConfig(train_y=train_y)
        layout = plan(GRID, 8, ORDER)
        label_map = torch.eye(4)[ORDER].permute(2, 0, 1) if train_y else None
        canvas = torch.randn(channels, 16, 16, generator=torch.Generator().manual_seed(3))
        poster, run = Poster(canvas, label_map, layout, recipe), open_run(name)
        command = Distill(data=cfg, grid=GRID, poster=recipe)
        meta = {"format": FORMAT, "config": flat(command), "classes": list(data.classes), "order": ORDER.tolist()}
        meta |= {"mean": data.mean, "std": data.std, "zca": None if data.zca is None else data.zca.digest}
        whitening = {} if data.zca is None else {"zca": data.zca.state()}
        return poster, data, PosterGallery(run, data, poster.product, meta, layout, lambda: whitening, draw)

    return make


def report(value):
    return Report({"acc": [value - 1, value + 1], "acc@300": [value - 2, value - 1], "loss": [2.0, 2.5]})


def change(poster, seed):
    with torch.no_grad():
        poster.poster += 0.5 * torch.randn(poster.poster.shape, generator=torch.Generator().manual_seed(seed))


def pixels(path):
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)


def frames(data):
    """Each frame (3, H, W) of a GIF and how long it is shown, in milliseconds."""
    image, found = Image.open(io.BytesIO(data)), []
    for number in range(image.n_frames):
        image.seek(number)
        found.append((torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1), image.info["duration"]))
    return found


def saved(folder, canvases):
    """Files of some canvases."""
    paths = [folder / f"poster_{number}.png" for number in range(len(canvases))]
    for path, canvas in zip(paths, canvases, strict=True):
        save_poster(path, canvas)
    return paths


class TestVisible:
    @pytest.mark.parametrize("channels", [1, 3])
    def test_whitened_images_come_back(self, sets, channels):
        data, _ = sets(channels, "podd")
        layout, chance = plan(GRID, 8, ORDER), torch.Generator()
        poster = real_canvas(data, layout, chance.manual_seed(0))
        seen = visible(poster, layout.patches, data.zca, data.mean, data.std)
        assert seen.shape == (channels, 16, 16)
        other, _ = sets(channels)  # the same images, normalised
        plain = real_canvas(other, layout, chance.manual_seed(0))
        plain = visible(plain, layout.patches, None, other.mean, other.std)
        for ours, real in zip(layout.patches.cut(seen), layout.patches.cut(plain), strict=True):
            both = torch.stack([ours.flatten(), real.flatten()])
            assert both.corrcoef()[0, 1] > 0.999
        both = torch.stack([layout.patches.cut(poster)[0].flatten(), layout.patches.cut(plain)[0].flatten()])
        assert both.corrcoef()[0, 1] < 0.95  # as networks see it, it is something else

    def test_normalisation_and_the_other_whitening_are_undone_exactly(self, sets):
        layout = plan(GRID, 8, ORDER)
        plain = torch.rand(3, 16, 16)
        data, _ = sets(3, "mtt")
        white = layout.patches.blend(data.zca.whiten(layout.patches.cut(plain)))
        seen = visible(white, layout.patches, data.zca, data.mean, data.std)
        torch.testing.assert_close(seen, plain, rtol=1e-3, atol=1e-3)
        data, _ = sets(3)
        normal = (plain - torch.tensor(data.mean).view(3, 1, 1)) / torch.tensor(data.std).view(3, 1, 1)
        torch.testing.assert_close(visible(normal, layout.patches, None, data.mean, data.std), plain)

    @pytest.mark.parametrize("count", [(3, 2), (6, 2), (5, 1)])
    def test_tall_grids_keep_all_rows(self, sets, count):
        data, _ = sets(1, "mtt")
        grid = Grid((20, 9), (8, 8), count) if count[1] > 1 else Grid((20, 8), (8, 8), count)
        plain = torch.arange(20.0)[None, :, None].expand(1, 20, grid.canvas[1]) / 20
        white = grid.blend(data.zca.whiten(grid.cut(plain)))
        assert white.shape == plain.shape
        # Patches of the blended whole differ from the whitened ones where they overlap, but rows stay where they were.
        seen = visible(white, grid, data.zca, data.mean, data.std)
        assert seen.shape == plain.shape
        middle = seen[0].mean(1)
        assert torch.stack([middle, plain[0, :, 0]]).corrcoef()[0, 1] > 0.9

    def test_four_deviations(self):
        canvas = torch.randn(3, 40, 40)
        canvas[0, 0, 0], canvas[1, 3, 3] = 1e3, -1e3
        assert scale_of(canvas)[1] == pytest.approx(float(canvas.mean() + 4 * canvas.std(correction=0)), rel=1e-5)
        picture = drawn(canvas)
        assert picture[0, 0, 0] == 255 and picture[1, 3, 3] == 0
        narrow = torch.rand(1, 5, 5)
        assert scale_of(narrow) == (float(narrow.min()), float(narrow.max()))
        picture = drawn(narrow)
        assert picture.shape == (3, 5, 5) and (picture.min(), picture.max()) == (0, 255)
        assert torch.equal(picture[0], picture[2]) and drawn(torch.ones(1, 2, 2)).dtype == torch.uint8

    def test_small_posters_are_enlarged_and_found_again(self, tmp_path):
        canvas = 0.02 * torch.randn(3, 60, 153)
        save_poster(tmp_path / "poster.png", canvas)
        large = pixels(tmp_path / "poster.png")
        assert large.shape == (3, 420, 1071)
        small, (low, high) = read_poster(tmp_path / "poster.png")
        assert torch.equal(small.repeat_interleave(7, 1).repeat_interleave(7, 2), large)
        assert (low, high) == scale_of(canvas)
        assert (low + small / 255 * (high - low) - canvas.clamp(low, high)).abs().max() <= 0.51 * (high - low) / 255

    @pytest.mark.parametrize("harm", ["cut", "flipped", "of somebody else"])
    def test_a_damaged_picture_is_named(self, tmp_path, harm):
        save_poster(tmp_path / "poster_3.png", torch.randn(3, 30, 50))
        data = (tmp_path / "poster_3.png").read_bytes()
        flipped = data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 4]) + data[len(data) // 2 + 1 :]
        other = png_bytes(torch.zeros(3, 30, 50, dtype=torch.uint8))
        found = {"cut": data[:-300], "flipped": flipped, "of somebody else": other}[harm]
        (tmp_path / "poster_3.png").write_bytes(found)
        with pytest.raises(
            UserError, match=r"poster_3\.png is damaged \(.*\); restore it, or remove it to go on without it"
        ):
            read_poster(tmp_path / "poster_3.png")


class TestAnimation:
    layout = plan(GRID, 8, ORDER)

    def test_one_frame_a_picture_to_one_scale(self, tmp_path):
        pattern = torch.rand(1, 16, 16).expand(3, 16, 16) - 0.5
        shown = frames(animation(saved(tmp_path, [pattern * size for size in (1, 2, 4)]), self.layout, NAMES))
        assert len(shown) == 4
        spread = [float(frame.float().std()) for frame, _ in shown[:3]]
        assert spread[1] == pytest.approx(2 * spread[0], rel=0.1)  # a palette has 128 colours
        assert spread[2] == pytest.approx(2 * spread[1], rel=0.1)
        longest = max(duration for _, duration in shown[:3])
        assert shown[3][1] >= 5 * longest
        assert not torch.equal(shown[3][0], shown[2][0])  # names the classes

    def test_no_more_frames_than_a_page_can_carry(self, tmp_path, monkeypatch):
        monkeypatch.setattr(poster_pictures, "FRAMES", 4)
        canvases = [torch.full((1, 16, 16), 0.0) for _ in range(11)]
        for number, canvas in enumerate(canvases):
            canvas[:, :, :8] = number
        shown = frames(animation(saved(tmp_path, canvases), self.layout, NAMES))
        tones = [int(frame[0, 0, 0]) for frame, _ in shown[:-1]]
        assert tones == pytest.approx([255 * place / 10 for place in (0, 3, 7, 10)], abs=3)

    def test_many_classes_are_named_in_quarters(self, tmp_path):
        cfg = GridConfig(304, 152, 10, 5, 20, 10, class_area_width=16, class_area_height=16)
        layout = plan(cfg, 64, torch.arange(200).view(10, 20))
        canvas = torch.randn(3, 152, 304)
        shown = frames(animation(saved(tmp_path, [canvas]), layout, [f"class {number}" for number in range(200)]))
        assert len(shown) == 5 and len({frame.shape for frame, _ in shown}) == 1

    def test_large_posters_make_small_frames(self, tmp_path):
        layout = plan(GridConfig(1211, 608, 40, 20, 2, 2), 64, ORDER)
        paths = saved(tmp_path, [torch.zeros(1, 608, 1211)])
        assert paths[0].stat().st_size < 1e6
        first = frames(animation(paths, layout, NAMES))[0][0]
        assert first.shape == (3, 203, 404)


class TestNames:
    def test_each_name_is_in_its_area(self):
        layout, canvas = plan(GRID, 8, ORDER), torch.full((3, 120, 120), 128, dtype=torch.uint8)
        bare = named(canvas, layout, [""] * 4)
        for label, name in enumerate(NAMES):
            texts = [name if number == label else "" for number in range(4)]
            rows, across = (named(canvas, layout, texts) != bare).any(0).nonzero(as_tuple=True)
            row, column = (label == ORDER).nonzero()[0].tolist()
            assert len(rows) > 50
            assert 60 * row <= rows.min() and rows.max() < 60 * row + 60
            assert 60 * column <= across.min() and across.max() < 60 * column + 60

    def test_letters_are_light_on_dark_whatever_is_below(self):
        layout = plan(GRID, 8, ORDER)
        for tone in (0, 255):
            picture = named(torch.full((3, 240, 240), tone, dtype=torch.uint8), layout, NAMES)
            letters = picture[0, 30:90, 30:90]
            assert (letters > 230).any() and (letters < 30).any()

    def test_two_hundred_classes_have_room(self):
        cfg = GridConfig(610, 302, 60, 30, 20, 10)
        layout = plan(cfg, 32, torch.arange(200).view(10, 20))
        picture = class_map(torch.zeros(3, 302, 610, dtype=torch.uint8), layout, [NAMES[3]] * 200)
        assert picture.shape == (3, 4 * 302, 4 * 610)

    def test_names_are_wrapped_and_then_shortened(self):
        short, long = (poster_pictures._fitted([[NAMES[3]]], (50, width))[0] for width in (400, 75))
        assert short[0] == "three toed-woodpecker" and long[0] == "three toed-\nwoodpecker" and long[1] < short[1]
        cut, _ = poster_pictures._fitted([[NAMES[3]]], (24, 40))[0]
        assert cut.split("\n")[0] == "three" and len(cut.split("\n")) == 2
        assert poster_pictures._fitted([["Chrysanthemum"]], (24, 40))[0][0].endswith("…")
        assert poster_pictures._fitted([["Chrysanthemum"]], (24, 10))[0][0] == ""

    def test_one_long_name_does_not_make_all_small(self):
        sizes = [size for _, size in poster_pictures._fitted([["ant"]] * 9 + [["x" * 30]], (60, 120))]
        assert len(set(sizes[:9])) == 1 and sizes[0] > 2 * sizes[9]


class TestLabels:
    def test_shares(self):
        label_map = torch.zeros(4, 1, 3)
        label_map[2, 0, 0], label_map[1, 0, 1], label_map[3, 0, 1] = 0.5, 3.0, 1.0
        shares, tops = top_shares(label_map)
        assert shares.tolist() == [[1.0, 0.75, 0.0]] and tops[0, :2].tolist() == [2, 1]

    def test_less_certain_cells_are_paler(self):
        label_map = torch.zeros(4, 1, 3)
        label_map[:, 0, 0], label_map[:, 0, 1] = torch.tensor([1.0, 0, 0, 0]), torch.tensor([0.4, 0.2, 0.2, 0.2])
        picture = label_picture(label_map, NAMES)
        side = picture.shape[1]
        assert picture.shape == (3, side, 3 * side) and side >= poster_pictures.NAMED
        sure, unsure, none = (picture[:, 8, 8 + place * side].float() for place in range(3))
        assert unsure.mean() > sure.mean() + 20
        assert (sure.max() - sure.min()) > (unsure.max() - unsure.min()) > 0
        assert none.max() == none.min()

    def test_large_maps_stay_small_pictures(self):
        assert label_picture(torch.rand(4, 40, 100), NAMES).shape == (3, 40 * 26, 100 * 26)


class TestFiles:
    def test_what_is_made(self, gallery):
        _, _, found = gallery()
        found.scored(0, report(40.0))
        found.keep(0, True)
        names = {path.name for path in found.run.folder.iterdir()} - {"config.yaml", ".lock"}
        assert names == {
            *("distilled_0.pt", "distilled_best.pt", "best_poster.pt", "best_label.pt", "card_best.json"),
            *("poster_0.png", "poster.png", "poster_raw.png", "poster_classes.png", "labels.png", "progress.gif"),
            *("log.jsonl", "report.html"),
        }

    def test_fixed_labels_and_no_pictures_unless_asked(self, gallery):
        poster, _, found = gallery(train_y=False, draw=False)
        for step in (0, 2):
            change(poster, step)
            found.keep(step, True)
        found.finish()
        names = {path.name for path in found.run.folder.iterdir()}
        assert not names & {"best_label.pt", "labels.png", "progress.gif", "poster_2.png"}
        assert {"poster_0.png", "poster.png"} <= names  # the page shows them
        page = (found.run.folder / "report.html").read_text()
        assert page.count("data:image/png") == 4 and "fixed, majority" in page

    def test_the_best_is_what_is_published_and_shown(self, gallery):
        poster, data, found = gallery(zca_kind="podd")
        for step, score in ((0, 5.0), (2, 9.0), (4, 7.0)):
            change(poster, step)
            found.scored(step, report(score))
            found.keep(step, step < 4)
        folder = found.run.folder
        published, second = load_poster(folder / "best_poster.pt"), load_poster(folder / "distilled_2.pt")
        assert torch.equal(published.poster, second.poster) and torch.equal(published.label_map, second.label_map)
        assert not torch.equal(published.poster, load_poster(folder / "distilled_4.pt").poster)
        assert (folder / "poster.png").read_bytes() == (folder / "poster_2.png").read_bytes()
        assert (folder / "poster.png").read_bytes() != (folder / "poster_4.png").read_bytes()
        best, second = load_poster(folder / "distilled_best.pt"), load_poster(folder / "distilled_2.pt")
        assert torch.equal(best.zca["matrix"], data.zca.matrix) and second.zca == {}
        card = json.loads((folder / "card_best.json").read_text())
        assert (card["step"], card["validation"]["acc"], card["lr"]) == (2, [9.0, 1.0], pytest.approx(0.001))
        assert card["ipc"] == 1.0 and card["order"] == ORDER.tolist()

    def test_raw_is_as_networks_see_it(self, gallery):
        poster, _, found = gallery(channels=1)
        found.keep(0, True)
        raw, _ = read_poster(found.run.folder / "poster_raw.png")
        assert torch.equal(raw, drawn(poster.poster.detach()))
        plain, _ = read_poster(found.run.folder / "poster.png")
        assert not torch.equal(raw, plain)

    def test_the_animation_has_each_evaluation_in_order(self, gallery):
        poster, _, found = gallery()
        for step in (0, 2, 10):
            change(poster, step)
            found.scored(step, report(50.0 - step))
            found.keep(step, step == 0)
        assert len(frames((found.run.folder / "progress.gif").read_bytes())) == 2
        found.finish()
        folder = found.run.folder
        shown = (folder / "progress.gif").read_bytes()
        paths = [folder / f"poster_{step}.png" for step in (0, 2, 10)]
        assert shown == animation(paths, found.layout, NAMES) and len(frames(shown)) == 4

    def test_a_resumed_run_ends_with_the_same_animation(self, gallery):
        shown = []
        for name, steps in (("whole", (0, 2, 4)), ("resumed", (0, 2, 4, 9, 2, 4))):
            poster, _, found = gallery(name=name)
            for step in steps:
                with torch.no_grad():
                    poster.poster.copy_(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(step)))
                found.keep(step, step == 2)
            found.finish()
            shown.append((found.run.folder / "progress.gif").read_bytes())
        assert shown[0] == shown[1]


class TestPage:
    def test_before_and_after_labels_and_budget(self, gallery):
        poster, _, found = gallery()
        for step in (0, 2):
            change(poster, step)
            found.scored(step, report(30.0 + step))
            found.run.log(step, loss=2.0, grad_norm=0.5, warmup=7)
            found.keep(step, True)
        page = (found.run.folder / "report.html").read_text()
        assert page.count("data:image/png") == 5 and page.count("data:image/gif") == 1
        for text in ("16 × 16 pixels", "1.00 images a class", "before distillation", "after step 2", "mean top share"):
            assert text in page
        for title in ("Outer loss", "Accuracy while distilling", "Gradient norm", "Inner steps before the window"):
            assert title in page
        assert "100.0%" in page and "4 of 4" in page
        assert f"{4 * (3 * 16 * 16 + 4 * 4):,}" in page  # poster and labels, in bytes

    def test_the_page_is_made_anew_with_later_evaluations(self, gallery):
        _, _, found = gallery()
        found.keep(0, True)
        folder, config = found.run.folder, {"eval_steps": [300, 1000], "select_step": "last"}
        protocol = {"protocol": "steps", "about": "1000 steps", "what": "real posters"}
        scores = {"acc": [41.25], "acc@1000": [41.25], "acc@300": [33.75], "gain": [7.0], "loss": [1.0]}
        rows = [as_record("distilled <1>", 256, Report(scores, protocol=protocol))]
        write_result(folder / "eval" / "first", rows, config)
        refresh_page(folder)
        page = (folder / "report.html").read_text()
        assert "distilled &lt;1&gt;" in page and "33.8" in page and "real posters" in page and "pixels" in page
        assert columns(rows) == ("acc", "gain", "acc@300", "acc@1000")

    def test_other_folders_are_left_alone(self, tmp_path):
        refresh_page(tmp_path)
        torch.save({"images": torch.zeros(1)}, tmp_path / "distilled_best.pt")
        refresh_page(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["distilled_best.pt"]
