"""The offline teacher: its loss by hand, its chance by step, and what it learns."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from methods.clip_teacher import (
    Learner,
    TeacherConfig,
    contrastive_loss,
    read_pairs,
    shape_accuracy,
    train_teacher,
)
from networks.clip import load_clip
from tests.conftest import contents
from utils.errors import RunError, UserError

TINY = TeacherConfig(teacher="tiny", teacher_images=40, teacher_epochs=3, teacher_batch=16)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


def test_the_loss_of_different_sentences_is_clips():
    scores = torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own = torch.arange(5)
    clips = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
    torch.testing.assert_close(contrastive_loss(scores, torch.tensor([7, 3, 9, 0, 1])), clips)


def test_equal_sentences_are_right_for_each_others_images():
    scores = torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64)
    e = math.e
    first, last = math.log(2 * e + 1) - 1, math.log(2 + e**2) - 2
    found = contrastive_loss(scores, torch.tensor([4, 4, 8]))
    assert found.item() == pytest.approx((2 * first + last) / 3)
    # The least that it can be: even chances of the two, and certainty of the third.
    certain = contrastive_loss(scores * 1e3, torch.tensor([4, 4, 8]))
    assert certain.item() == pytest.approx(2 / 3 * math.log(2))


def test_toy_pairs_are_named_and_captioned(cache):
    pairs = read_pairs(TINY, 32, cache)
    assert pairs.images.shape == (40, 3, 32, 32) and len(set(pairs.sentences)) == len(pairs.sentences)
    names = [pairs.sentences[i] for i in pairs.named.tolist()]
    assert names[:6] == [f"a photo of a {n}." for n in ("circle", "square", "triangle", "ring", "cross", "star")]
    assert names[6:12] == names[:6]
    captions = [pairs.sentences[i] for i in pairs.captioned.tolist()]
    assert not set(captions) & set(names) and ("ring" in captions[3].lower() or "hoop" in captions[3].lower())


def folder_of_pairs(root: Path, captions: bool) -> Path:
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / "train" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.png")
    if captions:
        line = {"file_name": "cat/1.png", "text": "a cat asleep"}
        (root / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    return root


def test_pairs_of_a_folder(cache, tmp_path):
    cfg = TeacherConfig(teacher_pairs=str(folder_of_pairs(tmp_path / "set", True)), teacher_batch=6)
    pairs = read_pairs(cfg, 32, cache)
    assert pairs.sentences == ["a photo of a cat.", "a photo of a dog.", "a cat asleep"]
    assert pairs.named.tolist() == [0, 0, 0, 1, 1, 1] and pairs.captioned.tolist() == [0, 2, 0, 1, 1, 1]
    bare = TeacherConfig(teacher_pairs=str(folder_of_pairs(tmp_path / "bare", False)), teacher_batch=6)
    assert read_pairs(bare, 32, cache).sentences == pairs.sentences[:2]
    assert read_pairs(bare, 32, cache).digest != pairs.digest


def test_a_killed_run_ends_in_the_same_files(cache, open_run, monkeypatch):
    train_teacher(TINY, open_run("whole"), cache)
    step, calls = Learner.step, []

    def dying(learner):
        if learner.done == calls[-1]:
            raise KeyboardInterrupt
        return step(learner)

    for name, last in (("killed", 0), ("killed", 3), ("killed", 5)):  # two steps an epoch, and a checkpoint
        calls.append(last)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Learner, "step", dying)
            train_teacher(TINY, open_run(name, resume=last > 0), cache)
    run = open_run("killed", resume=True)
    folder = train_teacher(TINY, run, cache)
    whole, killed = (contents(folder.parents[1] / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys() and "teacher/model.safetensors" in whole
    assert [n for n in whole if whole[n] != killed[n] and not n.endswith(".pt")] == []  # .pt: names of temporary files
    before = contents(run.folder)
    assert train_teacher(TINY, run, cache) == folder and contents(run.folder) == before  # nothing is done twice


def test_the_trained_teacher_is_a_folder_as_any_other(cache, open_run):
    run = open_run("run", seed=1)
    folder = train_teacher(TINY, run, cache)
    began, found = load_clip("tiny", cache), load_clip(str(folder), cache)
    assert found.fingerprint != began.fingerprint and found.dim == began.dim and found.mean == began.mean
    assert found.tokens(["a red ring"])["input_ids"].tolist() == began.tokens(["a red ring"])["input_ids"].tolist()
    losses = [json.loads(line)["teacher_loss"] for line in (run.folder / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_what_cannot_be_is_refused(cache, open_run):
    with pytest.raises(UserError, match="trains the tiny CLIP, not ViT-L/14; add --teacher tiny"):
        train_teacher(TeacherConfig(), open_run("large"), cache)
    with pytest.raises(UserError, match="--teacher_batch is 64, and toy has 40 images"):
        train_teacher(TeacherConfig(teacher="tiny", teacher_images=40), open_run("few"), cache)
    hot = TeacherConfig(teacher="tiny", teacher_images=40, teacher_batch=16, teacher_lr=1e30)
    with pytest.raises(RunError, match=r"teacher, step \d+: the loss is not finite; lower --teacher_lr"):
        train_teacher(hot, open_run("hot"), cache)
    assert set(TeacherConfig(teacher_pairs="x").idle()) == {"teacher_images"}


def test_other_pairs_are_refused(cache, open_run, tmp_path):
    run = open_run("run")
    learner = Learner(load_clip("tiny", cache), read_pairs(TINY, 32, cache), TINY, 0)
    state = learner.state_dict()
    cfg = TeacherConfig(teacher="tiny", teacher_pairs=str(folder_of_pairs(tmp_path / "set", True)), teacher_batch=4)
    (run.folder / "checkpoints").mkdir()
    torch.save(state, run.folder / "checkpoints/teacher_00000002.pt")
    with pytest.raises(UserError, match=r"does not fit this run .it learned from other pairs"):
        train_teacher(cfg, run, cache)


def test_it_learns_the_shapes(cache, open_run):
    """Zero-shot on 300 drawn shapes that it has not seen, of which a sixth are right by chance."""
    cfg = TeacherConfig(teacher="tiny", teacher_images=600, teacher_epochs=15, teacher_batch=50)
    folder = train_teacher(cfg, open_run("learned"), cache)
    before, after = (shape_accuracy(load_clip(name, cache)) for name in ("tiny", str(folder)))
    assert before < 30 and after > 60
