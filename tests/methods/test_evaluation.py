"""Which epoch counts and which split is looked at, with networks that are only numbers."""

import pytest
import torch

from methods.core.evaluation import Report, evaluate, one_by_one
from tests.processes import together, told
from utils.ranks import ALONE

# r_mean of each epoch's network: on validation epoch 2 is best (and 4 as good), on test epoch 5.
VAL = {1: 10.0, 2: 40.0, 3: 20.0, 4: 40.0, 5: 30.0}
TEST = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 50.0, 6: 6.0}


def run(select, visited=range(1, 6), networks=(0,), epochs=6, split="test", trace=(), ranks=ALONE):
    """The report, and each look at a split as (network, epoch, split)."""
    looks = []

    def train_one(number, watch):
        state = {"epoch": torch.zeros(()), "network": torch.tensor(float(number))}
        for epoch in range(1, epochs + 1):
            state["epoch"].fill_(epoch)  # in place, as an optimiser does
            watch(epoch, state)
        return state

    def score(state, part):
        epoch, network = int(state["epoch"]), int(state["network"])
        looks.append((network, epoch, part))
        value = (VAL if part == "val" else TEST).get(epoch, 0.0)
        return {"tr@1": value / 2 + network, "r_mean": value + network}

    return evaluate(
        one_by_one(train_one), score, networks, epochs, select, "r_mean", visited, split, trace, ranks
    ), looks


def test_last_looks_once():
    report, looks = run("last")
    assert looks == [(0, 6, "test")]
    assert report.metrics == report.last == {"tr@1": [3.0], "r_mean": [6.0]}
    assert report.protocol == {"networks": 1, "epochs": 6, "select": "last", "chosen_epochs": [6]}


def test_val_chooses_on_validation_and_looks_at_test_at_the_end():
    """Once for the last epoch and once for the one that counts (the first of two equal ones)."""
    report, looks = run("val")
    assert looks == [(0, epoch, "val") for epoch in range(1, 6)] + [(0, 6, "test"), (0, 2, "test")]
    assert report.metrics["r_mean"] == [2.0] and report.last == {"tr@1": [3.0], "r_mean": [6.0]}
    assert report.protocol["chosen_epochs"] == [2] and report.protocol["validation_r_mean"] == 40.0


def test_test_is_the_optimistic_one():
    report, looks = run("test")
    assert looks == [(0, epoch, "test") for epoch in (1, 2, 3, 4, 5, 6)], "6 is the last, and was not visited"
    assert report.metrics["r_mean"] == [50.0] and report.last["r_mean"] == [6.0]
    assert report.protocol["select"] == "test" and "validation_r_mean" not in report.protocol


def test_nothing_is_scored_twice_on_a_split():
    """Where the choice is made on the reported split, both of its numbers are known by then."""
    for select, split in (("test", "test"), ("val", "val")):
        report, looks = run(select, visited=range(1, 7), split=split)
        assert looks == [(0, epoch, split) for epoch in range(1, 7)]
        assert report.last["r_mean"] == [6.0 if split == "test" else 0.0]
    report, looks = run("val", epochs=2)  # the last epoch is the best: one look at test tells both
    assert looks == [(0, 1, "val"), (0, 2, "val"), (0, 2, "test")]
    assert report.metrics == report.last


@pytest.mark.parametrize("select", ["val", "test"])
def test_only_visited_epochs_count(select):
    report, looks = run(select, visited={1, 3, 6})
    assert [epoch for _, epoch, part in looks if part == select] == [1, 3, 6]
    assert report.protocol["chosen_epochs"] == [{"val": 3, "test": 6}[select]]


def test_each_network_has_its_own_choice_and_its_own_look():
    report, looks = run("val", networks=(0, 1, 2))
    tested = [(number, epoch, "test") for number in range(3) for epoch in (6, 2)]
    assert [look for look in looks if look[2] == "test"] == tested
    assert report.metrics["r_mean"] == [2.0, 3.0, 4.0] and report.last["r_mean"] == [6.0, 7.0, 8.0]
    assert report.protocol["networks"] == 3
    assert report.protocol["validation_r_mean"] == 41.0
    mean, std = report.mean_std()["r_mean"]
    assert (mean, std) == (3.0, pytest.approx((2 / 3) ** 0.5))  # population


def test_epochs_on_the_way_are_reported_too():
    """And need no second look, whichever counts."""
    for select in ("last", "val", "test"):
        report, looks = run(select, trace=(2, 5, 6))
        traced = {name: values for name, values in report.metrics.items() if name not in report.last}
        assert traced == {
            **{"tr@1@2": [1.0], "r_mean@2": [2.0], "tr@1@5": [25.0], "r_mean@5": [50.0]},
            **{"tr@1@6": [3.0], "r_mean@6": [6.0]},
        }
        assert report.metrics["r_mean"] == [{"last": 6.0, "val": 2.0, "test": 50.0}[select]]
        assert len(looks) == len({*looks}) == {"last": 3, "val": 8, "test": 6}[select]


def test_training_images_may_choose():
    report, looks = run("train", trace=(2,))
    assert [look for look in looks if look[2] == "train"] == [(0, epoch, "train") for epoch in range(1, 6)]
    assert report.protocol["chosen_epochs"] == [5] and report.metrics["r_mean"] == [50.0]
    assert report.protocol["training_r_mean"] == 50.0 and report.protocol["training_tr@1"] == 25.0


@pytest.mark.parametrize("select", ["last", "val", "test"])
@pytest.mark.parametrize("world, numbers", [(2, (0, 1, 2)), (3, (5, 4, 9)), (4, (0, 1, 2))])
def test_several_processes_report_what_one_does(select, world, numbers, tmp_path):
    """Each trains its own networks, no other, and some none; the report is the same in all."""
    wanted, all_looks = run(select, networks=numbers, trace=(1, 4))

    def work(ranks):
        report, looks = run(select, networks=numbers, trace=(1, 4), ranks=ranks)
        own = numbers[ranks.rank :: ranks.world]
        assert looks == [look for look in all_looks if look[0] in own] and report == wanted

    done = together(work, world)
    assert [end.rc for end in done] == [0] * world, told(done)


def test_another_split_can_be_reported():
    """While distilling, pairs are judged on validation alone."""
    for select in ("last", "val", "test"):
        assert {part for _, _, part in run(select, split="val")[1]} == {"val"}


@pytest.mark.parametrize(
    "six, mean",
    [
        # LoRS on Flickr30K and COCO with 100, 200 and 500 pairs: IR@1/5/10, TR@1/5/10.
        ((8.3, 24.1, 35.1, 11.8, 35.8, 49.2), 27.38),
        ((8.6, 25.3, 36.6, 14.5, 38.7, 53.4), 29.52),
        ((10.0, 28.9, 41.6, 15.5, 39.8, 53.7), 31.58),
        ((1.8, 7.1, 12.2, 3.3, 12.2, 19.6), 9.37),
        ((2.4, 9.3, 15.5, 4.3, 14.2, 22.6), 11.38),
        ((2.8, 9.9, 16.5, 5.3, 18.3, 27.9), 13.45),
    ],
)
def test_r_mean_of_published_rows(six, mean, monkeypatch):
    from utils import metrics

    values = [dict(zip((1, 5, 10), half, strict=True)) for half in (six[:3], six[3:])]  # texts ask first
    monkeypatch.setattr(metrics, "_recall", lambda ranks, ks: values.pop(0))
    result = metrics.retrieval_recall(torch.eye(2), torch.eye(2), torch.arange(2))
    assert result["r_mean"] == pytest.approx(mean, abs=0.0051)
    assert result["ir@5"] == six[1] and result["tr@1"] == six[3]


def test_report_of_one_network():
    assert Report({"r_mean": [7.0]}).mean_std() == {"r_mean": (7.0, 0.0)}
