"""The rows of image–text pairs in configs/vldd/ are what the papers and their scripts say."""

import re

import pytest
import torch

from tests.conftest import TINY, works
from tests.test_configs import ROOT, VERBS, read
from utils.config import flat

# Row, then the paper's figures, tr@1/5/10 and ir@1/5/10. VLDD published the settings of one row; all have them.
VLDD = """
flickr_100   9.9 ± 0.3 / 28.3 ± 0.5 / 39.1 ± 0.7   4.7 ± 0.2 / 15.7 ± 0.5 / 24.6 ± 1.0
flickr_200   10.2 ± 0.8 / 28.7 ± 1.0 / 41.9 ± 1.9  4.6 ± 0.9 / 16.0 ± 1.6 / 25.5 ± 2.6
flickr_500   13.3 ± 0.6 / 32.8 ± 1.8 / 46.8 ± 0.8  6.6 ± 0.3 / 20.2 ± 1.2 / 30.0 ± 2.1
flickr_1000  13.3 ± 1.0 / 31.5 ± 1.9 / 43.7 ± 2.5  7.9 ± 0.8 / 21.2 ± 1.6 / 34.4 ± 2.0
coco_100     2.5 ± 0.3 / 10.0 ± 0.5 / 15.7 ± 0.4   1.3 ± 0.1 / 5.4 ± 0.3 / 9.5 ± 0.5
coco_200     3.3 ± 0.2 / 11.9 ± 0.6 / 19.4 ± 1.2   1.7 ± 0.1 / 6.5 ± 0.4 / 12.3 ± 0.8
coco_500     5.0 ± 0.4 / 17.2 ± 1.3 / 26.0 ± 1.9   2.5 ± 0.5 / 8.9 ± 0.7 / 15.8 ± 1.5
coco_1000    6.8 ± 0.4 / 21.9 ± 1.2 / 31.0 ± 1.5   3.3 ± 0.1 / 11.9 ± 0.5 / 22.1 ± 0.9
""".strip().splitlines()
# LoRS's six scripts: pairs, pairs a step, bound of start epochs, rates of pixels (and texts) and of the similarity,
# its rank and alpha, outer steps, steps between evaluations; then the figures, as RepBlend's tables 1 and 2 quote them.
LORS = """
lors_flickr_100   99 20 2  100  10 10 3    3000  50  11.8 ± 0.2 / 35.8 ± 0.6 / 49.2 ± 0.5  8.3 ± 0.2 / 24.1 ± 0.2 / 35.1 ± 0.3
lors_flickr_200  199 20 2 1000  10  5 1    3000  50  14.5 ± 0.5 / 38.7 ± 0.5 / 53.4 ± 0.5  8.6 ± 0.3 / 25.3 ± 0.2 / 36.6 ± 0.3
lors_flickr_500  499 40 3 1000 100 20 0.01 3000 300  15.5 ± 0.7 / 39.8 ± 0.4 / 53.7 ± 0.3  10.0 ± 0.2 / 28.9 ± 0.7 / 41.6 ± 0.6
lors_coco_100     99 20 2 1000   5 10 1    3000  50  3.3 ± 0.2 / 12.2 ± 0.3 / 19.6 ± 0.3   1.8 ± 0.1 / 7.1 ± 0.2 / 12.2 ± 0.2
lors_coco_200    199 20 2 1000  50 20 1    2000  50  4.3 ± 0.1 / 14.2 ± 0.3 / 22.6 ± 0.2   2.4 ± 0.1 / 9.3 ± 0.2 / 15.5 ± 0.2
lors_coco_500    499 30 2 5000 500 40 1    3000  50  5.3 ± 0.5 / 18.3 ± 1.5 / 27.9 ± 1.4   2.8 ± 0.2 / 9.9 ± 0.5 / 16.5 ± 0.7
""".strip().splitlines()  # noqa: E501
# RepBlend's two scripts are these with batches of 20, 3000 steps, its two ingredients and fewer evaluations.
REPBLEND = """
repblend_flickr_100  16.2 ± 0.8 / 41.7 ± 0.9 / 55.5 ± 0.4  11.5 ± 0.4 / 32.0 ± 0.7 / 44.5 ± 0.6
repblend_flickr_200  18.6 ± 0.7 / 46.0 ± 0.8 / 60.0 ± 0.6  12.7 ± 0.8 / 34.7 ± 0.6 / 47.6 ± 0.5
repblend_flickr_500  22.5 ± 0.4 / 53.2 ± 0.3 / 66.7 ± 0.3  17.0 ± 0.6 / 42.5 ± 0.5 / 55.9 ± 0.6
repblend_coco_100    5.2 ± 0.5 / 17.9 ± 0.9 / 28.0 ± 0.3   4.1 ± 0.3 / 13.9 ± 0.8 / 22.3 ± 0.5
repblend_coco_200    6.9 ± 0.6 / 21.8 ± 0.9 / 32.3 ± 0.7   6.1 ± 0.8 / 19.3 ± 0.7 / 29.8 ± 0.5
repblend_coco_500    7.0 ± 0.2 / 22.0 ± 0.3 / 32.9 ± 0.6   6.2 ± 0.1 / 19.9 ± 0.3 / 30.6 ± 0.1
""".strip().splitlines()
# PTM-ST's script: of each phase the pairs, first and bound of start epochs and end of the shortcut; then pairs a step,
# rate of the similarity and outer steps of all phases together. We know none of its figures.
PTMST = """
ptmst_flickr_100  99       0    2    5    20  10  2000
ptmst_flickr_200  99,100   0,1  2,3  5,7  20  10  4000
ptmst_flickr_500  200,299  0,1  2,3  5,7  40  10  4000
ptmst_coco_100    99       0    2    5    20  50  2000
ptmst_coco_200    99,100   0,1  2,3  5,7  20  50  4000
ptmst_coco_500    200,299  0,1  2,3  5,7  20  50  4000
""".strip().splitlines()


def pair_row(name: str, figures: str = "") -> tuple[dict, dict, dict]:
    """The settings of the three verbs of a row of image–text pairs, after what all of them have in common."""
    file = ROOT / "configs" / "vldd" / f"{name}.yaml"
    buffer, distill, evaluate = (flat(read(file, verb)) for verb in VERBS)
    header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    tr, ir = re.split(r"\s{2,}", figures) if figures else ("", "")
    paper = f"Paper: tr@1/5/10 {tr}; ir@1/5/10 {ir}" if figures else "Paper: not known to us"
    assert re.search(re.escape(paper) + "[.,]", "\n".join(header))
    assert "# Ours: not run: needs the images, pretrained weights and a GPU." in header
    data, count = name.split("_")[-2:]
    assert f"{'COCO' if data == 'coco' else 'Flickr30K'}, {count} pairs" in header[0]
    for found in (buffer, distill, evaluate):
        assert (found["dataset"], found["image_size"]) == (data, 224)
        assert (found["image_encoder"], found["text_encoder"]) == ("nfnet", "bert")
    assert (buffer["num_experts"], buffer["train_epochs"], buffer["temperature"]) == (20, 10, 0.07)
    assert (buffer["lr_teacher_img"], buffer["lr_teacher_txt"], buffer["no_aug"]) == (0.1, 0.1, False)
    assert (distill["lr_teacher_img"], distill["lr_teacher_txt"], distill["momentum"]) == (0.1, 0.1, 0.5)
    assert (distill["syn_steps"], distill["expert_epochs"], distill["lr_lr"]) == (8, 1, 0.01)
    assert (distill["pix_init"], distill["txt_init"], distill["pair_init"]) == ("real", "real", "random")
    assert (evaluate["num_eval"], evaluate["data"]) == (5, ["random", "distilled"])
    assert evaluate["protocol"] == distill["protocol"] == ("vldd" if name == f"{data}_{count}" else "lors")
    return buffer, distill, evaluate


@pytest.mark.parametrize("row", VLDD, ids=lambda row: row.split()[0])
def test_a_row_of_vldd(row: str):
    name, figures = row.split(maxsplit=1)
    _, distill, _ = pair_row(name, figures)
    assert distill["num_pairs"] == [int(name.split("_")[1])]
    assert (distill["max_start_epoch"], distill["lr_img"], distill["lr_txt"]) == ([2], 1000, 1000)
    assert (distill["mode"], distill["sim_type"], distill["loss_type"]) == ("exact", "identity", "InfoNCE")


@pytest.mark.parametrize("row", LORS, ids=lambda row: row.split()[0])
def test_a_row_of_lors(row: str):
    name, *words, figures = row.split(maxsplit=10)
    pairs, batch, below, lr, lr_sim, rank, alpha, steps, every = map(float, words)
    _, distill, _ = pair_row(name, figures)
    assert (distill["num_pairs"], distill["max_start_epoch"]) == ([pairs], [below])
    assert (distill["mini_batch_size"], distill["mini_batches"]) == (batch, "consecutive")
    assert (distill["lr_img"], distill["lr_txt"], distill["lr_sim"]) == (lr, lr, lr_sim)
    assert (distill["sim_type"], distill["sim_rank"], distill["alpha"]) == ("lowrank", rank, alpha)
    assert (distill["iterations"], distill["eval_it"]) == (steps, every)
    assert (distill["mode"], distill["loss_type"], distill["clamp_similarity"]) == ("detached", "WBCE", False)
    assert distill["merge_loss_branches"] == ("coco" in name)
    apart = name == "lors_coco_500"
    assert (distill["temperature"], distill["no_aug"]) == ((0.1, True) if apart else (0.07, False))
    assert (distill["image_projection"], distill["blend"], distill["ema_decay"]) == (False, 0, 0)
    assert distill["shortcut"] == []


@pytest.mark.parametrize("row", REPBLEND, ids=lambda row: row.split()[0])
def test_a_row_of_repblend(row: str):
    """It is LoRS's row and what RepBlend adds: nothing else differs."""
    name, figures = row.split(maxsplit=1)
    verbs = pair_row(name, figures)
    lors = [flat(read(ROOT / "configs/vldd" / f"{name.replace('repblend', 'lors')}.yaml", verb)) for verb in VERBS]
    heads = {"image_projection": True, "image_trainable": False}
    every = 300 if name == "repblend_flickr_500" else 150
    distilled = heads | {"blend": 1.0, "mini_batch_size": 20, "iterations": 3000, "eval_it": every}
    for found, start, added in zip(verbs, lors, (heads, distilled, heads), strict=True):
        assert found == start | added


@pytest.mark.parametrize("row", PTMST, ids=lambda row: row.split()[0])
def test_a_row_of_ptm_st(row: str):
    name, *words = row.split()
    pairs, first, below, shortcut = ([int(part) for part in word.split(",")] for word in words[:4])
    batch, lr_sim, steps = map(int, words[4:])
    buffer, distill, _ = pair_row(name)
    assert (distill["num_pairs"], distill["shortcut"]) == (pairs, shortcut)
    assert (distill["min_start_epoch"], distill["max_start_epoch"]) == (first, below)
    assert sum(pairs) == int(name.split("_")[2]) - 1  # a full similarity of each phase fits into the pair that is left
    assert sum(count**2 for count in pairs) < 3 * 224 * 224 + 768
    assert (distill["mini_batch_size"], distill["mini_batches"]) == (batch, "consecutive")
    assert (distill["lr_img"], distill["lr_txt"], distill["lr_sim"]) == (1000, 1000, lr_sim)
    assert (distill["sim_type"], distill["loss_type"], distill["mode"]) == ("full", "WBCE", "detached")
    assert (distill["ema_decay"], distill["iterations"], distill["eval_it"]) == (0.99, steps, 50)
    assert (distill["no_aug"], distill["merge_loss_branches"], distill["blend"]) == (True, False, 0)
    assert max(shortcut) <= buffer["train_epochs"]


def test_each_row_of_pairs_is_in_a_table_above():
    known = {row.split()[0] for row in (*VLDD, *LORS, *REPBLEND, *PTMST)}
    files = {file.stem for file in (ROOT / "configs/vldd").glob("*.yaml")}
    assert {name for name in files if "_mini_" not in name and not name.startswith("best_")} == known


@pytest.mark.parametrize(
    "name, fewer",
    [
        ("lors_coco_500", ("--num_pairs", "12", "--sim_rank", "4", "--lr_sim", "5")),
        ("repblend_coco_500", ("--num_pairs", "12", "--sim_rank", "4", "--lr_sim", "5")),
        ("ptmst_flickr_500", ("--num_pairs", "6", "8", "--shortcut", "2", "3", "--lr_sim", "1")),
    ],
)
def test_a_row_runs_scaled_down(name: str, fewer: tuple[str, ...], tmp_path, monkeypatch: pytest.MonkeyPatch):
    """With drawn pictures, small towers and few pairs, all that makes up the row stays on."""
    monkeypatch.chdir(tmp_path)
    row = ("--config", ROOT / f"configs/vldd/{name}.yaml", *TINY, "--device", "cpu")
    works("buffer", *row, "--num_experts", 1, "--train_epochs", 3, "--batch_size_train", 50)
    judged = ("--num_eval", 1, "--epoch_eval_train", 2)
    works("distill", *row, *fewer, *judged, "--mini_batch_size", 5, "--iterations", 4)
    works("eval", *row, *judged, "--data", "distilled")
    first, last = (torch.load(f"runs/vldd/{name}/distilled_{step}.pt", weights_only=True) for step in (0, 4))
    for part in ("image", "text", "similarity_mat"):
        assert not torch.equal(first[part], last[part])
    assert (list(last["syn_lr_img"].shape), last.get("phases")) == (([2], [6, 8]) if "ptmst" in name else ([], None))
