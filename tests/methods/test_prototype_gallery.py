"""What a distillation into prototypes leaves to look at: sheets of what was drawn and what it came from, and a page."""

import io
import json
import re

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from methods import prototype_gallery
from methods.prototype_files import Manifest, Prototypes
from methods.prototype_gallery import PrototypeGallery, columns, judged_by, refresh_page, table_row
from methods.prototype_judging import Eval
from methods.prototype_pictures import _CAPTION, _TEXT, _font, _wrapped, excerpt, noted, save_grid
from methods.vlcp import Distill
from utils.config import flat

CONFIG = flat(Distill()) | {"dataset": "folder", "ipc": 2}
GREY, FRAME = (214, 214, 212), (47, 95, 208)
LEFT = 28  # of the first tile


def paint(path, size, seed):
    """Noise; the same for the same seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3)).astype(np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def pixels(path):
    return np.array(Image.open(path).convert("RGB"))


def enlarged(picture, factor):
    return picture.repeat(factor, 0).repeat(factor, 1)


def inside(picture):
    """Without its rim, of which white lines and frames take some."""
    return picture[6:-6, 6:-6]


@pytest.fixture
def toys(tmp_path):
    """`toys(side, real, ident, k, ipc)`: a gallery and the prototypes of a class of 12 images, one of them an outlier;
    image 4 is nearest to the first mean, and image 6 has the first caption."""

    def make(side=32, real=(32, 32), ident="n1", k=2, ipc=2, root=True, folder="run"):
        files = [f"{ident}/{number}.png" for number in range(12)]
        for number, file in enumerate(files):
            paint(tmp_path / "train" / file, real, number)
        clusters = [number % k for number in range(11)] + [-1]
        images = tmp_path / folder / "images"
        for number in range(ipc):
            paint(images / ident / f"{ident}-image{number % k}-{number // k}.png", (side, side), 100 + number)
        found = Prototypes(
            ident,
            "tench, Tinca tinca",
            torch.zeros(k, 4, 2, 2),
            ["a red fish in the grass"] * k,
            [files[(6 + number) % 11] for number in range(k)],
            [[("red", 5), ("gras", 2), ("net", 1)]] * k,
            files,
            clusters,
            [files[(4 + number) % 11] for number in range(k)],
        )
        train = tmp_path / "train" if root else None
        return PrototypeGallery(tmp_path / folder, images, train, CONFIG | {"ipc": ipc}), found

    return make


def sheet(gallery, found):
    gallery.add(found)
    path = gallery.folder / "sheets" / f"{found.ident}.png"
    return pixels(path), noted(path, "ends")


def top_of(picture, tile):
    """The row of a sheet at which a tile (side, side, 3) begins in the first column."""
    side = len(tile)
    for top in range(len(picture) - side + 1):
        found = picture[top : top + side, LEFT : LEFT + side]
        if np.array_equal(inside(found), inside(tile)):
            return top
    raise AssertionError("not on the sheet")


class TestSheet:
    @pytest.mark.parametrize(("side", "factor"), [(32, 8), (64, 4), (100, 2), (128, 2), (256, 1)])
    def test_small_images_become_blocks_and_nothing_is_smoothed(self, toys, tmp_path, side, factor):
        gallery, found = toys(side, (side, side))
        picture, ends = sheet(gallery, found)
        whole = side * factor
        drawn, real = (tmp_path / name for name in ("run/images/n1/n1-image0-0.png", "train/n1/4.png"))
        top = top_of(picture, enlarged(pixels(drawn), factor))
        second = picture[top : top + whole, LEFT + whole + 16 :][:, :whole]
        assert np.array_equal(inside(second), inside(enlarged(pixels(real), factor)))
        assert len(ends) == 2 and top + whole < ends[0] and ends[1] < len(picture)
        if factor > 1:
            third = picture[top : top + whole // 2, LEFT + 2 * (whole + 16) :][:, : whole // 2]
            assert np.array_equal(inside(third), inside(enlarged(pixels(tmp_path / "train/n1/6.png"), factor // 2)))

    def test_photographs_are_cut_to_their_middle_and_shrunk(self, toys, tmp_path):
        gallery, found = toys(256, (400, 300))
        picture, _ = sheet(gallery, found)
        top = top_of(picture, pixels(tmp_path / "run/images/n1/n1-image0-0.png"))
        square = Image.open(tmp_path / "train/n1/4.png").crop((50, 0, 350, 300)).resize((256, 256), Image.LANCZOS)
        shown = picture[top : top + 256, LEFT + 272 : LEFT + 528]
        assert np.array_equal(inside(shown), inside(np.array(square)))

    def test_whose_caption_it_is_has_a_frame(self, toys):
        picture, _ = sheet(*toys())
        top = np.argwhere((picture == FRAME).all(-1) & (np.arange(picture.shape[1]) > LEFT + 2 * 272))[0][0]
        framed = (picture[top + 64, LEFT + 544 : LEFT + 544 + 384] == FRAME).all(-1)
        assert framed[1:5].all() and framed[123:127].all() and not framed[135:].any()

    def test_pictures_that_cannot_be_read_are_grey(self, toys, tmp_path):
        gallery, found = toys()
        (tmp_path / "train/n1/4.png").unlink()
        (tmp_path / "train/n1/6.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
        (tmp_path / "run/images/n1/n1-image0-0.png").write_bytes(b"")
        (tmp_path / "run/images/n1/n1-image1-0.png").unlink()
        picture, ends = sheet(gallery, found)
        grey = (picture == GREY).all(-1)
        across = np.flatnonzero(grey[: ends[0]].any(0))
        assert across.min() == LEFT + 1 and across.max() > LEFT + 2 * 272
        assert grey[ends[0] :, : LEFT + 256].any()
        gallery.finish()

    def test_several_images_of_a_prototype_share_its_tile(self, toys, tmp_path):
        gallery, found = toys(64, (64, 64), ipc=8)
        picture, ends = sheet(gallery, found)
        assert len(ends) == 2
        top = top_of(picture, enlarged(pixels(tmp_path / "run/images/n1/n1-image0-0.png"), 2))
        for number, (down, right) in enumerate([(0, 0), (0, 128), (128, 0), (128, 128)]):
            part = picture[top + down : top + down + 128, LEFT + right : LEFT + right + 128]
            own = enlarged(pixels(tmp_path / f"run/images/n1/n1-image0-{number}.png"), 2)
            assert np.array_equal(inside(part), inside(own))

    def test_published_prototypes_have_image_and_caption_only(self, toys):
        gallery, found = toys()
        wide, _ = sheet(gallery, found)
        bare = Prototypes(found.ident, found.label, found.latents, found.texts)
        narrow, ends = sheet(gallery, bare)
        assert wide.shape[1] - narrow.shape[1] == 256 + 3 * 128 + 2 * 16 and len(ends) == 2

    def test_without_the_training_images_there_are_no_columns_for_them(self, toys, monkeypatch):
        kept = []
        monkeypatch.setattr(prototype_gallery, "save_sheet", lambda *args: kept.append(args))
        gallery, found = toys(root=False)
        gallery.add(found)
        shown = kept[0][3][0]
        assert not shown.members and shown.note == "6 images · caption of 6.png"

    def test_what_is_said(self, toys, monkeypatch):
        kept = []
        monkeypatch.setattr(prototype_gallery, "save_sheet", lambda *args: kept.append(args))
        gallery, found = toys()
        found.text_files[1] = ""
        gallery.add(found)
        _, title, subtitle, (first, second) = kept[0]
        assert title == "tench, Tinca tinca"
        assert subtitle == "n1 · 12 training images, 1 of them an outlier · 2 prototypes"
        assert first.words == [("red", 5, True), ("gras", 2, False), ("net", 1, False)]  # as a word, not within one
        assert first.note == "6 images · caption of 6.png (framed)"
        assert second.note == "5 images · the label, for want of a caption" and second.source is None
        assert [file.stem for file in first.members] == ["4", "6", "0", "2", "8", "10"]

    def test_others_of_a_large_cluster_are_spread_over_it(self):
        members = [f"{number:03d}" for number in range(100)]
        chosen = prototype_gallery._spread(members, ["050", "001"])
        assert chosen[:2] == ["050", "001"] and len(set(chosen)) == 7
        assert int(chosen[-1]) > 70 and chosen[2:] == sorted(chosen[2:])
        assert prototype_gallery._spread(["7"], ["7", ""]) == ["7"]

    def test_equal_inputs_give_equal_bytes(self, toys):
        written = []
        for folder in ("one", "two"):
            gallery, found = toys(folder=folder)
            gallery.add(found)
            gallery.finish()
            paths = [gallery.folder / name for name in ("sheets/n1.png", "images.png", "report.html")]
            written.append([path.read_bytes() for path in paths])
        assert written[0] == written[1]

    def test_many_prototypes_have_smaller_tiles(self, toys):
        gallery, found = toys(k=21, ipc=21)
        gallery.add(Prototypes(found.ident, found.label, found.latents, found.texts))
        picture = pixels(gallery.folder / "sheets/n1.png")
        top_of(picture, enlarged(pixels(gallery.images / "n1/n1-image0-0.png"), 4))


class TestWords:
    def test_lines_are_as_wide_as_the_column(self):
        text = " ".join(f"word{number}" for number in range(200))
        lines = _wrapped(text, _TEXT, _CAPTION, 1000)
        assert " ".join(lines) == text
        assert all(_font(_TEXT).getlength(line) <= _CAPTION for line in lines)
        assert all(_font(_TEXT).getlength(f"{line} word99") > _CAPTION for line in lines[:-1])

    def test_an_ellipsis_ends_what_is_cut(self):
        cut = _wrapped("a long caption of many words " * 30, _TEXT, _CAPTION, 3)
        assert len(cut) == 3 and cut[-1].endswith("…") and _font(_TEXT).getlength(cut[-1]) <= _CAPTION
        assert _wrapped("short", _TEXT, _CAPTION, 1) == ["short"]

    def test_a_word_wider_than_the_column_is_shortened(self):
        first, *_ = _wrapped("x" * 300 + " y", _TEXT, _CAPTION, 4)
        assert first.endswith("…") and _font(_TEXT).getlength(first) <= _CAPTION


class TestGrid:
    def test_classes_beside_each_other_as_far_as_a_screen_goes(self, tmp_path):
        files = {number: [tmp_path / f"{number}-{place}.png" for place in range(12)] for number in range(30)}
        for place in range(12):
            paint(tmp_path / f"0-{place}.png", (32, 32), place)
        shown = {}
        for ipc in (1, 4, 12):
            save_grid(tmp_path / "grid.png", [(f"class {number}", files[number][:ipc]) for number in files])
            height, width, _ = pixels(tmp_path / "grid.png").shape
            shown[ipc] = noted(tmp_path / "grid.png", "classes")
            assert height <= 1400 and width <= 1700
        assert shown == {1: 30, 4: 20, 12: 5}


class TestPage:
    def test_what_is_on_it(self, toys, tmp_path):
        gallery, found = toys()
        gallery.add(found)
        buffers = Manifest(tmp_path / "run" / "buffers")
        buffers.record("model", path="x", base="tiny")
        buffers.record("captions", count=1200, by="given")
        rows = [{"step": step, "vae_loss": 1.0 / (1 + step)} for step in range(5)]
        rows += [{"step": step, "loss": 1.0, "lr": 1e-5} for step in range(5, 2000)]
        (buffers.folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        text = gallery.finish().read_text()
        assert "2 images from prototypes" in text and "folder · 1 classes · 2 a class" in text
        assert "Loss of the denoiser" in text and "Loss of the autoencoder" in text
        assert "tiny, tuned" in text and "1,200, given" in text and "sheets/n1.png" in text
        assert text.count("data:image/png") == 2 and "all images" in text

    def test_a_model_that_was_not_tuned_here_has_no_curves(self, toys):
        gallery, found = toys()
        gallery.config["diffusion_checkpoints_path"] = "tiny"
        (gallery.folder / "buffers").mkdir()
        (gallery.folder / "buffers" / "log.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
        gallery.add(found)
        assert "Loss of" not in gallery.finish().read_text()

    def test_of_many_classes_the_first_are_shown_and_the_others_named(self, toys, monkeypatch):
        monkeypatch.setattr(prototype_gallery, "SHEETS", 2)
        for ident in ("n1", "n2", "n3", "n4", "n5"):
            made, found = toys(ident=ident)
            if ident == "n1":
                gallery = made
            gallery.add(found)
        text = gallery.finish().read_text()
        assert text.count("data:image/png") == 3 and "in sheets: n3.png, n4.png and 1 more" in text

    def test_large_sheets_are_cut_after_a_row(self, toys):
        gallery, found = toys(k=6, ipc=6)
        _, ends = sheet(gallery, found)
        path = gallery.folder / "sheets" / "n1.png"
        data, shown, rows = excerpt(path, 0.85)
        part = pixels(io.BytesIO(data))
        assert (shown, rows) == (4, 6) and len(part) == ends[3]
        assert np.array_equal(part, pixels(path)[: ends[3]])
        assert excerpt(path, 9.0) == (path.read_bytes(), 6, 6) and excerpt(path, 0.01)[1] == 1
        assert "sheets/n1.png, the first 4 of 6 prototypes" in gallery.finish().read_text()

    def test_the_bytes_of_a_page_are_bounded(self, toys, monkeypatch):
        monkeypatch.setattr(prototype_gallery, "BYTES", 1000)
        gallery, found = toys()
        gallery.add(found)
        _, second = toys(ident="n2")
        gallery.add(second)
        assert "in sheets: n2.png" in gallery.finish().read_text()


def record(name, value, split="test", **more):
    pair = {"mean": value, "std": 1.0, "values": [value]}
    protocol = {"protocol": "minimax", "about": "as published", "n": 3, "what": "x"}
    return {"name": name, "size": 20, "metrics": {"last": pair, f"best on {split}": pair}, "protocol": protocol} | more


class TestResults:
    def test_evaluations_come_onto_the_page(self, toys):
        gallery, found = toys()
        gallery.add(found)
        first = gallery.finish().read_text()
        folder = gallery.folder
        (folder / "config.yaml").write_text(yaml.safe_dump({"method": "vlcp", "distill": gallery.config}))
        Manifest(folder).record("prototypes", classes=["n1"])
        refresh_page(folder)
        assert (folder / "report.html").read_text() == first
        place = folder / "eval" / "minimax"
        place.mkdir(parents=True)
        rows = [record("distilled", 45.25), record("full", 81.5)]
        (place / "result.json").write_text(json.dumps({"rows": rows, "config": flat(Eval()) | {"dataset": "folder"}}))
        refresh_page(folder)
        text = (folder / "report.html").read_text()
        assert "45.2" in text and "81.5" in text and "best on test" in text and "minimax: as published" in text
        assert len(re.findall("class=reference", text)) == 1

    def test_what_is_no_run_stays_as_it_is(self, tmp_path):
        refresh_page(tmp_path)
        Manifest(tmp_path).record("prototypes", classes=["n1"])
        (tmp_path / "sheets").mkdir()
        for text in ("{method: vldd, distill: {}}", "[1]", "{", "{method: vlcp, buffer: {}}"):
            (tmp_path / "config.yaml").write_text(text)
            refresh_page(tmp_path)
        assert not (tmp_path / "report.html").exists()

    def test_columns_are_those_that_rows_have(self):
        assert columns([record("distilled", 1.0)]) == ("last", "best on test", "n")
        both = [record("distilled", 1.0), record("random", 1.0, "val")]
        assert columns(both) == ("last", "best on test", "best on val", "n")

    def test_full_data_do_not_compete_whatever_else_their_name_says(self):
        named = {name: table_row(record(name, 1.0)) for name in ("full", "resnet18, full", "full, rded", "distilled")}
        assert [row.reference for row in named.values()] == [True, True, True, False]
        assert named["full"].words == {"n": "3"}

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({}, "minimax, resnet_ap"),
            ({"dataset": "cifar10"}, "rded, resnet18"),
            ({"stud_name": ["conv3", "resnet18_modified"]}, "rded"),
            ({"protocol": "minimax", "dataset": "cifar10", "ipc": 10}, "minimax, resnet_ap, 10 a class"),
            ({"epochs": 300, "tag": "mine"}, "minimax, resnet_ap, 300 epochs, mine"),
        ],
    )
    def test_how_evaluations_are_told_apart(self, given, said):
        assert judged_by(json.loads(json.dumps(flat(Eval()))) | {"dataset": "folder"} | given) == said
