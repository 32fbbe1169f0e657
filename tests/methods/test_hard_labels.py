"""The protocol with hard labels: its published figures, that it learns, and that a seed settles everything."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from data.augment import random_flip
from data.photographs import IMAGENET_STATS
from methods.core.evaluation import evaluate, one_by_one
from methods.core.hard_labels import HardConfig, HardLabels, epochs_of
from methods.core.photo_augment import draw_mix, draw_tint, normalised, random_crops, tinted
from methods.core.photo_students import StudentConfig, preset_size
from tests.methods.stripes import stripes
from utils.errors import UserError
from utils.rng import derive_seed, generator, seeded

CPU = torch.device("cpu")
SMALL = HardConfig(net_type="convnet", depth=2, width=0.125)
QUICK = StudentConfig(size=16, epochs=12, batch_size=12, lr=0.05)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    return stripes(root / "train", 12), stripes(root / "test", 20, seed=1, what="test")


def students(sets, student=QUICK, cfg=SMALL, classes=3, ipc=12, dataset="imagenet", seed=0):
    return HardLabels(student, cfg, sets[0], {"test": sets[1]}, classes, ipc, seed, CPU, dataset)


@pytest.mark.parametrize(
    ("ipc", "epochs", "of_100"),
    [
        (1, 3000, 2000),
        (10, 2000, 1300),
        (20, 1500, 1000),
        (50, 1500, 1000),
        (70, 1000, 600),
        (100, 1000, 600),
        (200, 1000, 600),
        (500, 500, 300),
        (1000, 300, 200),
    ],
)
def test_epochs_by_images_a_class(ipc, epochs, of_100):
    assert epochs_of(ipc, 10) == epochs
    assert epochs_of(ipc, 100) == of_100


def test_mosaics_count_as_several_images():
    assert epochs_of(10, 10, factor=2) == 1500
    assert epochs_of(50, 10, factor=3) == 500
    assert epochs_of(50, 10, factor=3, cap=128) == 1000


def test_published_recipe(sets):
    ours = students(sets, StudentConfig(), HardConfig(), classes=10, ipc=10)
    assert (ours.epochs, ours.batch, ours.size, ours.resize) == (2000, 64, 224, 224)
    assert (ours.recipe.lr, ours.recipe.momentum, ours.recipe.weight_decay) == ({"net": 0.01}, 0.9, 5e-4)
    assert (ours.recipe.milestones, ours.recipe.gamma) == ((1333, 1666), 0.2)
    assert sorted(ours.visited) == list(range(20, 2001, 20))
    assert ours.mix_p == 1 and not ours.plain
    assert ours.protocol["network"] == "resnet_ap-10" and ours.protocol["parameters"] == 4_910_922
    many = students(sets, StudentConfig(), HardConfig(), classes=200, ipc=10)
    assert (many.recipe.lr, many.recipe.weight_decay, many.batch) == ({"net": 0.1}, 1e-4, 128)
    given = students(sets, StudentConfig(lr=0.2, wd=0.0, batch_size=7), HardConfig(), classes=200)
    assert (given.recipe.lr, given.recipe.weight_decay, given.batch) == ({"net": 0.2}, 0, 7)


def test_cifar_has_rules_of_its_own(sets):
    ours = students(sets, StudentConfig(), HardConfig(), classes=10, ipc=10, dataset="cifar10")
    assert (ours.epochs, ours.visited, ours.size, ours.mix_p) == (1000, {1000}, 32, 0.5)
    assert ours.protocol["augmentation"] == "cutmix (α 1, 50% of batches)"
    images, rng = torch.rand(4, 3, 32, 32), torch.Generator().manual_seed(0)
    assert torch.equal(ours._augmented(images, rng), ours.prepared(images))
    mean = torch.tensor([0.4914, 0.4822, 0.4465])[:, None, None].expand(3, 32, 32)
    assert ours.prepared(mean).abs().max() < 1e-6
    assert not students(sets, StudentConfig(), HardConfig(dsa=False), dataset="cifar10").plain


def test_sizes_by_data_set():
    assert [preset_size(name, 10) for name in ("imagenet", "tiny_imagenet", "cifar100", "toy")] == [224, 64, 32, 64]
    assert preset_size("imagenet", 10, ("conv5", "conv5")) == 128
    assert preset_size("imagenet", 1000, ("conv6", "conv6")) == 224


def test_students_learn(sets):
    ours = students(sets)
    report = evaluate(one_by_one(ours.train), ours.score, [0, 1], ours.epochs, "test", "acc", ours.visited)
    assert min(report.metrics["acc"]) > 80
    assert all(best >= last for best, last in zip(report.metrics["acc"], report.last["acc"], strict=True))
    assert ours.score(ours.train(0, lambda epoch, state: None), "train")["acc"] > 80


def test_a_seed_settles_everything(sets):
    brief = replace(QUICK, epochs=2)
    seen = []
    first = students(sets, brief).train(0, lambda epoch, state: seen.append(epoch))
    assert seen == [1, 2]
    again, other, foreign = (
        students(sets, brief).train(0, lambda *_: None),
        students(sets, brief).train(1, lambda *_: None),
        students(sets, brief, seed=1).train(0, lambda *_: None),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first["classifier.weight"], state["classifier.weight"]) for state in (other, foreign))
    # A student is the same whichever were trained before it.
    ours = students(sets, brief)
    ours.train(0, lambda *_: None)
    second = ours.train(1, lambda *_: None)
    assert all(torch.equal(other[name], second[name]) for name in other)


def test_training_written_out(sets):
    """The published loop, line by line: crop, flip, colours, normalisation, CutMix; a rate that falls after epochs."""
    ours = students(sets, replace(QUICK, epochs=6))
    found = ours.train(0, lambda *_: None)
    with seeded(derive_seed(0, "student", 0)):
        net = ours.fresh()
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for epoch in range(6):
        optimizer.param_groups[0]["lr"] = [0.05, 0.05, 0.05, 0.05, 0.01, 0.002][epoch]
        rng = generator(0, "student", 0, "epoch", epoch)
        for rows in torch.randperm(36, generator=rng).split(12):
            images, labels = ours.photos.squares(16)[rows] / 255, ours.photos.labels[rows]
            images = random_flip(random_crops(images, 16, (0.5, 1.0), rng), rng)
            images = normalised(tinted(images, draw_tint(12, rng)), IMAGENET_STATS)
            torch.rand((), generator=rng)  # whether to mix: always
            mix = draw_mix("cutmix", 1.0, 12, 16, rng)
            logits = net(mix(images))
            own, other = F.cross_entropy(logits, labels), F.cross_entropy(logits, labels[mix.order])
            optimizer.zero_grad()
            (mix.share * own + (1 - mix.share) * other).backward()
            optimizer.step()
    assert all(torch.allclose(found[name], value, atol=1e-6) for name, value in net.state_dict().items())


def test_how_often_batches_are_mixed(sets, monkeypatch):
    mixed = []
    monkeypatch.setattr("methods.core.hard_labels.draw_mix", lambda *given: mixed.append(1) or draw_mix(*given))
    ours = students(sets, cfg=replace(SMALL, mix_p=0.25, dsa=True))
    net, rng = ours.fresh(), torch.Generator().manual_seed(0)
    for _ in range(200):
        ours._loss(net, torch.arange(4), rng)
    assert 35 < len(mixed) < 65
    mixed.clear()
    students(sets, cfg=replace(SMALL, mix_p=0.0))._loss(net, torch.arange(4), rng)
    assert not mixed


def test_the_last_epoch_is_always_tested(sets):
    """So that the best of the tests is never worse than the last epoch."""
    ours = students(sets, replace(QUICK, epochs=350))
    assert len(ours.visited) == 117 and {3, 348, 350} < ours.visited


def test_labels_are_mixed_as_the_images(sets):
    """The loss of a batch is that of its two labels, each by its share of the pixels."""
    ours = students(sets, cfg=replace(SMALL, dsa=True))
    net, rows = ours.fresh(), torch.arange(8)
    found = ours._loss(net, rows, torch.Generator().manual_seed(5))
    rng = torch.Generator().manual_seed(5)
    images = ours.prepared(ours.source.images(rows))
    torch.rand((), generator=rng)
    mix = draw_mix("cutmix", 1.0, 8, 16, rng)
    logits, labels = net(mix(images)), sets[0].labels[:8]
    wanted = mix.share * F.cross_entropy(logits, labels) + (1 - mix.share) * F.cross_entropy(logits, labels[mix.order])
    assert torch.allclose(found, wanted)


def test_mixing_by_the_published_flags():
    assert StudentConfig().mixing == ("cutmix", 1.0)
    assert StudentConfig(mixup="cut", cutmix=0.5).mixing == ("cutmix", 0.5)
    assert StudentConfig(mixup="vanilla").mixing[0] == "none"
    assert StudentConfig(mix_type="mixup", mixup="0.4").mixing == ("mixup", 0.4)
    for wrong in ("cutout", "0", "nan", "inf"):
        with pytest.raises(UserError, match="--mixup takes cut, vanilla or a number"):
            StudentConfig(mixup=wrong).check()


def test_options_that_do_nothing_are_named():
    assert HardConfig(net_type="densenet").idle().keys() >= {"depth", "norm_type", "width", "batch_syn_max"}
    assert "width" in HardConfig(net_type="resnet").idle() and "width" not in HardConfig().idle()
    assert StudentConfig(mix_type="mixup").idle() == {"cutmix": "--mix_type cutmix"}
    with pytest.raises(UserError, match=r"--mix_p is 1\.5"):
        HardConfig(mix_p=1.5).check()
