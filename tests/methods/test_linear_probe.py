"""The linear probe: the search's toys, the split, the layer against torch's own, and what it must not touch."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.core import linear_probe
from methods.core.linear_probe import (
    DECAYS,
    Features,
    Heads,
    ProbeConfig,
    decay_search,
    few_shots,
    fit_heads,
    probe,
    search_split,
)
from utils.config import idle_options
from utils.errors import RunError, UserError

CPU = torch.device("cpu")
QUICK = ProbeConfig(probe_lrs=(1e-3, 1e-1), search_epochs=2, probe_epochs=4)


def best_decay(score: Callable[[int], float]) -> int:
    """The index into DECAYS that the search ends at."""
    search = decay_search()
    index = next(search)
    while True:
        try:
            index = search.send(score(index))
        except StopIteration as end:
            return end.value[0]


def clusters(count, seed, classes=3, width=6, spread=1.0):
    """Features around a direction of each class, in turn."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    return Features(3 * torch.eye(width)[labels] + spread * torch.randn(count, width, generator=rng), labels)


def searched(score):
    """Where the search looks, and what it returns."""
    places = []

    def look(index):
        places.append(index)
        return score(index)

    return places, best_decay(look)


def test_the_grid():
    assert len(DECAYS) == 97 and DECAYS[0] == 1e-6 and DECAYS[96] == pytest.approx(1e6)


def test_the_search_goes_from_coarse_to_fine():
    places, best = searched(lambda i: 100 - abs(i - 37))
    assert places == [0, 16, 32, 48, 64, 80, 96, 24, 40, 36, 44, 34, 38, 35, 37]
    assert best == 37 and DECAYS[best] == pytest.approx(0.04217, abs=1e-5)


@pytest.mark.parametrize("value", [50.0, 0.0, -math.inf])  # the published program ends at -1 where all scores are 0
def test_of_equal_scores_the_first_stays(value):
    places, best = searched(lambda i: value)
    assert places == [0, 16, 32, 48, 64, 80, 96, 8, 4, 2, 1] and best == 0


def test_the_search_stays_on_the_grid():
    places, best = searched(lambda i: i)
    assert best == 96 and max(places) == 96 and len(set(places)) == len(places)


@pytest.mark.parametrize(("per_class", "held"), [(1, 1), (2, 1), (5, 1), (10, 2), (20, 4), (35, 7), (50, 10)])
def test_the_first_fifth_of_each_class_is_held_out(per_class, held):
    labels = torch.arange(3 * per_class) % 3
    learn, val = search_split(labels)
    assert val.tolist() == list(range(3 * held)) and learn.tolist() == list(range(3 * held, 3 * per_class))


def test_a_large_class_takes_part_with_its_first_images(monkeypatch):
    monkeypatch.setattr(linear_probe, "SEARCH_LIMIT", 10)
    learn, val = search_split(torch.tensor([0] * 30 + [1] * 5))
    assert val.tolist() == [0, 1, 30] and learn.tolist() == [*range(2, 10), *range(31, 35)]


def test_images_of_several_classes_are_held_out_until_each_has_a_fifth():
    # Class 0 has 6 images (2 wanted), class 1 has 2 (1 wanted), class 2 has 1; image 4 has none.
    labels = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]).bool()
    learn, val = search_split(labels)
    assert val.tolist() == [0, 1, 5] and learn.tolist() == [2, 3, 4, 6]
    # Image 0 is of class 1 alone, which image 1 does for already when class 0 has had its turn, as at ELEVATER's.
    learn, val = search_split(torch.tensor([[0, 1], [1, 1]]).bool())
    assert val.tolist() == [1] and learn.tolist() == [0]


def test_few_shots_are_drawn_of_each_class():
    labels = torch.arange(60) % 3
    drawn = few_shots(labels, 5, 0)
    assert torch.bincount(labels[drawn]).tolist() == [5, 5, 5]
    assert torch.equal(drawn, few_shots(labels, 5, 0)) and not torch.equal(drawn, few_shots(labels, 5, 1))
    assert len(few_shots(labels, 100, 0)) == 60


def by_torch(train, vectors, lr, decay, epochs, seed):
    """The slow obvious twin: torch's own layers and optimizer, one at a time."""
    net = nn.Sequential(nn.BatchNorm1d(train.vectors.shape[1], affine=False), nn.Linear(*vectors.shape[::-1]))
    net[1].weight.data.copy_(vectors)
    net[1].bias.data.zero_()
    optimizer = torch.optim.SGD(net.parameters(), lr, momentum=0.9, weight_decay=decay)
    rng = linear_probe.generator(seed, "probe batches")
    loss_of = nn.BCEWithLogitsLoss() if train.labels.ndim == 2 else nn.CrossEntropyLoss()
    for _ in range(epochs):
        for rows in torch.randperm(len(train), generator=rng).split(16):
            labels = train.labels[rows]
            loss = loss_of(net(train.vectors[rows]), labels.float() if labels.ndim == 2 else labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize("several", [False, True])
def test_heads_side_by_side_equal_torchs_one_by_one(several):
    train, test = clusters(50, 0), clusters(20, 1)
    if several:
        train = Features(train.vectors, torch.eye(3)[train.labels].bool() | (torch.arange(50)[:, None] % 5 == 0))
    vectors, lrs, decays = torch.randn(3, 6), [0.1, 0.01, 0.5], [0.0, 0.1, 0.01]
    heads = Heads(3, 3, 6, vectors)
    assert list(fit_heads(heads, train, lrs, decays, 3, 16, 7)) == [1, 2, 3]
    for found, lr, decay in zip(heads.scores(test.vectors), lrs, decays, strict=True):
        expected = by_torch(train, vectors, lr, decay, 3, 7)(test.vectors)
        assert torch.allclose(found, expected, atol=1e-5)


def test_a_last_batch_of_one_joins_the_one_before():
    assert [len(part) for part in linear_probe._batches(torch.arange(33), 16)] == [16, 17]
    assert [len(part) for part in linear_probe._batches(torch.arange(34), 16)] == [16, 16, 2]


def test_the_probe_trains_d_times_c_plus_c_numbers_and_nothing_else():
    encoder = nn.Linear(4, 6)
    with torch.no_grad():
        train, test = (
            Features(encoder(part.vectors), part.labels)
            for part in (clusters(60, 0, width=4), clusters(30, 1, width=4))
        )
    before = [part.clone() for part in (*encoder.parameters(), train.vectors, test.vectors)]
    found = probe(QUICK, train, test, 3, "accuracy", 0, CPU)
    assert found.trained == 6 * 3 + 3
    after = (*encoder.parameters(), train.vectors, test.vectors)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_the_probe_learns_and_repeats():
    train, test = clusters(90, 0), clusters(60, 1)
    found = probe(QUICK, train, test, 3, "accuracy", 0, CPU)
    assert found.score > 85 and found.scores.shape == (60, 3) and found.epoch == 4
    assert found.lr in QUICK.probe_lrs and found.l2 in DECAYS and 22 <= found.trials <= 30 and found.val > 85
    again = probe(QUICK, train, test, 3, "accuracy", 0, CPU)
    assert torch.equal(found.scores, again.scores)


def test_class_vectors_are_the_layers_beginning():
    train, test = clusters(9, 0), clusters(60, 1)
    still = ProbeConfig(no_tuning=True, lr=1e-9, probe_epochs=1)
    found = probe(still, train, test, 3, "accuracy", 0, CPU, vectors=torch.eye(3, 6))
    assert found.score > 80 and found.trials == 0 and math.isnan(found.val)
    assert probe(still, train, test, 3, "accuracy", 0, CPU, vectors=-torch.eye(3, 6)).score < 20


def test_the_last_epoch_is_reported_unless_elevaters_best_on_test_is_asked_for(monkeypatch):
    values = iter([30.0, 80.0, 60.0, 70.0])
    monkeypatch.setattr(linear_probe, "classification_score", lambda *_: next(values))
    cfg = ProbeConfig(no_tuning=True, probe_epochs=4)
    best = probe(cfg, clusters(30, 0), clusters(9, 1), 3, "accuracy", 0, CPU, compat=True)
    assert (best.score, best.epoch) == (80.0, 2)
    values = iter([55.0])  # the test images are looked at once
    last = probe(cfg, clusters(30, 0), clusters(9, 1), 3, "accuracy", 0, CPU)
    assert (last.score, last.epoch) == (55.0, 4)


def test_images_of_several_classes():
    train, test = clusters(90, 0), clusters(60, 1)
    several = [Features(part.vectors, torch.eye(3)[part.labels].bool()) for part in (train, test)]
    assert probe(replace(QUICK, no_tuning=True, probe_epochs=20), *several, 3, "11point_mAP", 0, CPU).score > 85
    assert probe(QUICK, *several, 3, "11point_mAP", 0, CPU).trials >= 22


def test_a_crash_is_no_score(monkeypatch):
    def crash(*_):
        raise MemoryError

    monkeypatch.setattr(linear_probe, "classification_score", crash)
    with pytest.raises(MemoryError):
        probe(QUICK, clusters(30, 0), clusters(9, 1), 3, "accuracy", 0, CPU)


def test_what_diverges_loses_and_where_all_do_it_is_told():
    train, test = clusters(60, 0), clusters(30, 1)
    wild = ProbeConfig(probe_lrs=(1e-2, 1e30), search_epochs=2, probe_epochs=2)
    assert probe(wild, train, test, 3, "accuracy", 0, CPU).lr == 1e-2
    with pytest.raises(RunError, match="all 11 trials of the probe diverged"):
        probe(ProbeConfig(probe_lrs=(1e30,), search_epochs=2), train, test, 3, "accuracy", 0, CPU)
    with pytest.raises(RunError, match="diverged by epoch 2 with --lr 1e"):
        probe(ProbeConfig(no_tuning=True, lr=1e30, probe_epochs=2), train, test, 3, "accuracy", 0, CPU)


def test_what_would_diverge_later_is_not_chosen():
    # On a few steps the weights of such a pair are still numbers, and by luck the best.
    decay = linear_probe.UNSTABLE / 0.1
    heads = Heads(2, 3, 6, torch.eye(3, 6))
    list(fit_heads(heads, clusters(60, 0), [0.1, 0.1], [decay * 0.95, decay * 1.05], 200, 64, 0))
    stable, unstable = heads.weight.norm(dim=(1, 2)).tolist()
    assert stable < 10 < 1e3 < unstable
    asked = []

    def fit(heads, train, lrs, decays, *rest):
        asked.extend(zip(lrs, decays, strict=True))
        return fit_heads(heads, train, lrs, decays, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "fit_heads", fit)
        found = probe(QUICK, clusters(60, 0), clusters(30, 1), 3, "accuracy", 0, CPU)
    assert (
        found.lr * found.l2 < linear_probe.UNSTABLE and max(lr * decay for lr, decay in asked) < linear_probe.UNSTABLE
    )


def test_one_image_a_class_cannot_be_searched_on():
    with pytest.raises(UserError, match="leaves no image to train on in the search"):
        probe(QUICK, clusters(3, 0), clusters(9, 1), 3, "accuracy", 0, CPU)


def test_options_that_do_nothing_are_told():
    assert idle_options(ProbeConfig(lr=0.2)) == ["--lr 0.2 does nothing without --no_tuning"]
    assert idle_options(ProbeConfig(no_tuning=True, search_epochs=3)) == [
        "--search_epochs 3 does nothing without a search (--no_tuning false)"
    ]
    with pytest.raises(UserError, match="--num_shots is 0"):
        ProbeConfig(num_shots=0).check()
    with pytest.raises(UserError, match=r"--lr 0.1 times --l2 100 is 10; from 3.8 on SGD with momentum diverges"):
        ProbeConfig(no_tuning=True, l2=100).check()
