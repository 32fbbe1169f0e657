"""What every eval.py of labelled images compares with, and which files it refuses."""

from types import SimpleNamespace

import pytest
import torch

from data import build_images
from data.images import ImagesConfig
from methods.core.evaluation import Report
from methods.core.judging import add_gain, at_best_rate, check_classes, check_whitening, random_rows, warn_of_whitening
from tests.processes import together, told
from utils.errors import UserError

TABLE = {"val": {0.1: 40.0, 0.2: 60.0, 0.3: 60.0}, "test": {0.1: 70.0, 0.2: 30.0, 0.3: 10.0}}


def judged(asked):
    def judge(rate, scout, split):
        asked.append((rate, scout, split))
        return Report({"acc": [TABLE[split][rate]] * (1 if scout else 3)})

    return judge


def test_random_rows():
    train = build_images(ImagesConfig(dataset="digits", train_limit=9), "cpu")["train"]
    counts = [9, 0, 3, *[1] * 7]
    rows, again, other = (random_rows(train, counts, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.bincount(train.labels[rows], minlength=10).tolist() == counts and len(rows.unique()) == 19
    assert torch.equal(rows, again) and not torch.equal(rows, other)
    assert train.labels[rows].tolist() == sorted(train.labels[rows].tolist())


@pytest.mark.parametrize("held_out, split, best", [(True, "val", 0.2), (False, "test", 0.1)])
def test_the_best_rate(held_out, split, best):
    """Of two that are as good the first."""
    asked = []
    report = at_best_rate(judged(asked), (0.1, 0.2, 0.3), held_out)
    assert asked == [(rate, True, split) for rate in (0.1, 0.2, 0.3)] + [(best, False, "test")]
    assert report.metrics["acc"] == [TABLE["test"][best]] * 3
    assert report.protocol == {"rates": [0.1, 0.2, 0.3], "rate_chosen_on": split}


def test_one_rate_needs_no_scout():
    asked = []
    at_best_rate(judged(asked), (0.3,), True)
    assert asked == [(0.3, False, "test")]


@pytest.mark.parametrize("world", [2, 4])
def test_several_processes_try_rates_of_their_own(world):
    def work(ranks):
        asked = []
        report = at_best_rate(judged(asked), (0.1, 0.2, 0.3), True, ranks)
        own = [(rate, True, "val") for rate in (0.1, 0.2, 0.3)[ranks.rank :: ranks.world]]
        assert asked == [*own, (0.2, False, "test")] and report.protocol["rates"] == [0.1, 0.2, 0.3]

    done = together(work, world)
    assert [end.rc for end in done] == [0] * world, told(done)


def test_gain_is_network_by_network():
    ours, random = Report({"acc": [50.0, 40.0]}), Report({"acc": [30.0, 45.0]})
    add_gain(ours, random)
    assert ours.metrics["gain"] == [20.0, -5.0] and "gain" not in random.metrics


def test_files_of_other_data(capsys):
    data = SimpleNamespace(name="digits", classes=("a", "b"), zca=None)
    check_classes("made.pt", {"classes": ["a", "b"]}, data, "--dataset")
    check_classes("published.pt", {}, data, "--dataset")
    with pytest.raises(
        UserError, match=r"made\.pt is of the classes d, e, f, …, digits has a, b; give the --dataset that"
    ):
        check_classes("made.pt", {"classes": list("defg")}, data, "--dataset")
    white = SimpleNamespace(name="digits", classes=("a", "b"), zca=SimpleNamespace(digest="1"))
    check_whitening("made.pt", {"zca": "1"}, white)
    check_whitening("published.pt", {}, white)
    for noted, here, what in (("1", data, "a"), ("2", white, "another"), (None, white, "no")):
        with pytest.raises(UserError, match=f"made with {what} whitening"):
            check_whitening("made.pt", {"zca": noted, "step": 1}, here)
    warn_of_whitening("made.pt", {"zca": "1"}, ImagesConfig(zca=True))
    warn_of_whitening("published.pt", {}, ImagesConfig(zca=True, holdout=0))
    assert not capsys.readouterr().out
    warn_of_whitening("published.pt", {}, ImagesConfig(zca=True))
    assert "published.pt notes no whitening" in capsys.readouterr().out
