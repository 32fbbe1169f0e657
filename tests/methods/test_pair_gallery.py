"""The files that a distillation leaves: the best pairs, their captions, results that never replace another."""

import json

import pytest
import torch
from PIL import Image

from methods.core.evaluation import Report
from methods.core.results import as_record, write_result
from methods.pair_gallery import nearest_captions, pair_gallery, refresh_page
from methods.pairs import PairsConfig, start_pairs
from tests.methods.conftest import load_pairs

CONFIG = {name: 0 for name in ("image_size", "num_pairs", "syn_steps", "expert_epochs", "max_start_epoch", "seed")}
CONFIG |= {name: 0.1 for name in ("lr_img", "lr_txt", "lr_lr", "temperature")}
CONFIG |= {name: name for name in ("dataset", "image_encoder", "text_encoder", "loss_type", "mode")}

JUDGED = {"protocol": "clean", "image_encoder": "nfnet", "text_encoder": "bert"}  # what a row was judged by


@pytest.fixture
def gallery(corpus, open_run):
    """`gallery(draw)`: five pairs and their gallery."""

    def make(draw=True):
        pairs = start_pairs(corpus, PairsConfig(num_pairs=(5,)), 16, torch.Generator().manual_seed(0))
        meta = {"format": 1, "config": CONFIG, "mean": [0.5] * 3, "std": [0.25] * 3}
        return pairs.phases[0], pair_gallery(open_run(), corpus, pairs.published, meta, draw)

    return make


def report(value):
    return Report({"r_mean": [value - 1, value + 1]})


def test_the_best_file_is_the_best_step(gallery):
    pairs, found = gallery(draw=False)
    steps = {0: (5.0, True), 2: (9.0, True), 4: (7.0, False)}
    folder, kept = found.run.folder, {}
    for step, (score, best) in steps.items():
        with torch.no_grad():
            pairs.images += 1
        kept[step] = pairs.images.detach().clone()
        found.scored(step, report(score))
        found.keep(step, best)
    for step, images in kept.items():
        (saved,), meta = load_pairs(folder / f"distilled_{step}.pt", torch.device("cpu"))
        assert torch.equal(saved.images, images)
        assert meta["step"] == step and meta["validation"]["r_mean"] == [steps[step][0], 1.0]
    (saved,), meta = load_pairs(folder / "distilled_best.pt", torch.device("cpu"))
    assert meta["step"] == 2 and torch.equal(saved.images, kept[2])
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["val_r_mean"] for row in log] == [5.0, 9.0, 7.0]
    assert not list(folder.glob("*.png")) and (folder / "report.html").stat().st_size > 1000


def test_without_evaluations_the_latest_is_the_best(gallery):
    _, found = gallery(draw=False)
    for step in (0, 6):
        found.keep(step, False)
    meta = load_pairs(found.run.folder / "distilled_best.pt", torch.device("cpu"))[1]
    assert meta["step"] == 6 and "validation" not in meta


def test_pictures_and_sentences(gallery, corpus):
    pairs, found = gallery()
    found.keep(3, False)
    folder = found.run.folder
    with Image.open(folder / "synthetic_images_3.png") as grid:  # five pictures, enlarged four times
        assert grid.width >= 5 * 64 and grid.height >= 64
    assert (folder / "clipped_synthetic_images_3_std_2.5.png").exists()
    sentences = (folder / "synthetic_sentences_3.txt").read_text(encoding="utf-8").splitlines()
    assert sentences == nearest_captions(corpus, pairs.texts.detach()) and len(sentences) == 5


def test_the_page_is_made_anew_with_later_evaluations(gallery):
    _, found = gallery()
    found.scored(0, report(5.0))
    found.keep(0, True)
    folder = found.run.folder
    before = (folder / "report.html").read_text(encoding="utf-8")
    about = {"protocol": "clean", "about": "epoch chosen on validation"}
    rows = [as_record("distilled", 5, Report({"tr@1": [12.34]}, about))]
    write_result(folder / "eval" / "clean", rows, JUDGED)
    refresh_page(folder)
    after = (folder / "report.html").read_text(encoding="utf-8")
    assert "12.3" in after and "12.3" not in before and "epoch chosen on validation" in after
    refresh_page(folder / "eval")  # no run of distill.py
    assert not (folder / "eval" / "report.html").exists()


@pytest.mark.parametrize("chunk", [7, 480, 65536])
def test_nearest_captions_are_those_of_the_greatest_cosine(corpus, chunk):
    texts = torch.randn(6, 16, generator=torch.Generator().manual_seed(2))
    every, expected = corpus.texts("train", slice(None)), []
    for text in texts:
        cosines = [float(torch.nn.functional.cosine_similarity(text, other, 0)) for other in every]
        expected.append(corpus["train"].captions[max(range(480), key=cosines.__getitem__)])
    assert nearest_captions(corpus, texts, chunk) == expected
    own = nearest_captions(corpus, 3 * every[[4, 100]], chunk)  # length plays no part
    assert own == [corpus["train"].captions[i] for i in (4, 100)]
