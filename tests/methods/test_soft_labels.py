"""The protocol with a teacher's labels: its published figures, that it learns, and its teachers."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from data.augment import random_boxes, random_flip
from data.photographs import IMAGENET_STATS
from methods.core import soft_labels, teachers
from methods.core.evaluation import evaluate, one_by_one
from methods.core.photo_augment import draw_bands, draw_mix, normalised, resized_crops, shuffle_bands
from methods.core.photo_students import StudentConfig, decayed
from methods.core.photos import Photos
from methods.core.soft_labels import SoftConfig, SoftLabels, auto_batch, rate_factor, soft_loss
from methods.core.teachers import Teacher, TeacherConfig, load_teacher, open_teacher, train_teacher
from networks import build_network
from networks.pretrained import build_architecture
from tests.methods.stripes import IDENTS, stripes
from utils.errors import UserError
from utils.rng import derive_seed, generator, seeded

CPU = torch.device("cpu")
QUICK = StudentConfig(size=16, epochs=10, batch_size=12, lr=0.01)
CONV = SoftConfig(stud_name="conv2")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("stripes")
    return stripes(root / "train", 12), stripes(root / "test", 20, seed=1, what="test")


@pytest.fixture(scope="module")
def taught(sets, tmp_path_factory):
    """The file of a trained teacher."""
    return train_teacher("conv2", sets[0], 16, 16, IDENTS, 12, tmp_path_factory.mktemp("teachers"), 0, CPU)


@pytest.fixture(scope="module")
def teacher(taught):
    return Teacher(load_teacher("conv2", taught, 16, IDENTS), "conv2", "trained here", 100.0)


def students(sets, teacher, student=QUICK, cfg=CONV, ipc=12, classes=3, dataset="imagenet"):
    return SoftLabels(student, cfg, sets[0], {"test": sets[1]}, classes, ipc, 0, CPU, teacher, dataset)


def untrained(arch="conv3", size=32, classes=10):
    return Teacher(build_architecture(arch, size, classes), arch, "nowhere", 0.0)


def test_rates():
    found = [rate_factor(epoch, 300) for epoch in (0, 75, 150, 225, 300)]
    assert found == pytest.approx([1, 0.9619, 0.8536, 0.6913, 0.5], abs=5e-5)
    assert [rate_factor(epoch, 300, cosine=False) for epoch in (0, 150, 300)] == [1, 0.5, 0]


@pytest.mark.parametrize(("temperature", "wanted"), [(1, 0.243574), (4, 0.042258), (20, 0.001913)])
def test_loss(temperature, wanted):
    student, teacher = torch.tensor([[1.0, 0, 0]]), torch.tensor([[2.0, 0, -2]])
    assert soft_loss(student, teacher, temperature).item() == pytest.approx(wanted, abs=1e-6)
    both = soft_loss(student.repeat(3, 1), teacher.repeat(3, 1), temperature)
    assert both.item() == pytest.approx(wanted, abs=1e-6)  # the mean over images


@pytest.mark.parametrize(
    ("dataset", "classes", "batches"),
    [
        ("imagenet", 10, (10, 50, 100)),
        ("cifar100", 100, (20, 100, 200)),
        ("imagenet", 1000, (20, 100, 200)),
        ("tiny_imagenet", 200, (100, 100, 100)),
    ],
)
def test_published_batches(dataset, classes, batches):
    assert tuple(auto_batch(ipc, classes, dataset) for ipc in (1, 10, 50)) == batches
    assert tuple(auto_batch(ipc, classes, dataset, strict=True) for ipc in (1, 10, 50)) == batches


def test_batches_that_were_never_published():
    assert [auto_batch(ipc, 10, "imagenet") for ipc in (5, 20, 100, 1300)] == [10, 50, 100, 100]
    assert auto_batch(1, 3, "imagenet") == 3
    with pytest.raises(UserError, match=r"no batch for 100 images a class.*give --batch_size"):
        auto_batch(100, 10, "imagenet", strict=True)


def test_published_recipe(sets):
    ours = students(sets, untrained(size=224), StudentConfig(), SoftConfig(), classes=10)
    assert (ours.epochs, ours.size, ours.resize) == (300, 224, 256)
    assert (ours.temperature, ours.lr, ours.decay) == (20, 0.001, 0.01)
    assert sorted(ours.visited) == [250, 260, 270, 280, 290, 300]
    cfg = StudentConfig(epochs=500, mix_type="mixup")
    longer = students(sets, untrained(), cfg, CONV, classes=10, dataset="cifar10")
    assert sorted(longer.visited) == list(range(410, 501, 10))
    assert (longer.temperature, longer.size) == (4, 32)
    sgd = students(sets, untrained(), StudentConfig(), replace(CONV, sgd=True), classes=10, dataset="cifar10")
    assert (sgd.lr, sgd.decay) == (0.1, 1e-4)
    same = students(sets, untrained(classes=100), StudentConfig(), SoftConfig("conv3"), 10, 100, "cifar100")
    assert (same.batch, same.lr) == (25, 0.002)
    assert students(sets, untrained(), StudentConfig(), SoftConfig("mobilenet_v2"), 10, 10, "cifar10").lr == 0.0025
    rates = {"resnet50": 0.001, "conv6": 0.001, "efficientnet_b0": 0.002, "vgg11": 0.0005, "swin_v2_t": 0.0001}
    assert {name: soft_labels.adamw_rate(name) for name in rates} == rates
    assert [soft_labels.tested_size(size) for size in (224, 128, 64, 32, 20)] == [256, 144, 72, 32, 20]


def test_only_matrices_decay():
    net = build_architecture("resnet18", 64, 10)
    some, others = decayed(net, 0.01)
    assert (some["weight_decay"], others["weight_decay"]) == (0.01, 0)
    assert all(part.ndim > 1 for part in some["params"]) and all(part.ndim == 1 for part in others["params"])
    assert len(some["params"]) + len(others["params"]) == len(list(net.parameters()))


def test_whole_square_images_are_only_flipped(sets, teacher):
    ours = students(sets, teacher, replace(QUICK, epochs=1))
    rows = torch.arange(36)
    plain = ours.prepared(ours.photos.squares(16).float() / 255)
    found = ours.augmented(rows, torch.Generator().manual_seed(0))
    flipped = [torch.allclose(image, other.flip(2), atol=1e-5) for image, other in zip(found, plain, strict=True)]
    kept = [torch.allclose(image, other, atol=1e-5) for image, other in zip(found, plain, strict=True)]
    assert all(a or b for a, b in zip(flipped, kept, strict=True)) and 8 < sum(flipped) < 28
    mosaic = students(sets, teacher, replace(QUICK, epochs=1, factor=2))
    assert not torch.allclose(mosaic.augmented(rows, torch.Generator().manual_seed(0)), found, atol=0.1)
    assert "2 × 2 bands shuffled" in mosaic.protocol["augmentation"]


@pytest.mark.parametrize("sgd", [False, True])
def test_training_written_out(sets, teacher, sgd):
    """The published loop, line by line: bands, crop, flip, normalisation, CutMix, and a teacher who sees the same."""
    epochs, cfg = 4, replace(CONV, sgd=sgd, cos=not sgd)
    ours = students(sets, teacher, replace(QUICK, epochs=epochs, factor=2), cfg)
    found = ours.train(0, lambda *_: None)
    with seeded(derive_seed(0, "student", 0)):
        net = ours.fresh()
    matrices = [part for part in net.parameters() if part.ndim > 1]
    others = {"params": [part for part in net.parameters() if part.ndim == 1], "weight_decay": 0.0}
    if sgd:
        groups = [{"params": matrices, "weight_decay": 1e-4}, others]
        optimizer = torch.optim.SGD(groups, 0.01, momentum=0.9)
    else:
        groups = [{"params": matrices, "weight_decay": 0.01}, others]
        optimizer = torch.optim.AdamW(groups, 0.01, betas=(0.9, 0.999))
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            falling = 1 - epoch / epochs if sgd else 0.5 * (1 + math.cos(math.pi * epoch / (2 * epochs)))
            group["lr"] = 0.01 * falling
        rng = generator(0, "student", 0, "epoch", epoch)
        for rows in torch.randperm(36, generator=rng).split(12):
            images, bands = ours.photos.squares(16)[rows] / 255, draw_bands(12, 2, rng)
            boxes = random_boxes(torch.tensor([[16, 16]] * 12), rng, (0.5, 1.0))
            images = random_flip(resized_crops(shuffle_bands(images, bands), boxes, 16), rng)
            images = draw_mix("cutmix", 1.0, 12, 16, rng)(normalised(images, IMAGENET_STATS))
            wanted = F.softmax(teacher.net(images) / 20, 1)
            loss = F.kl_div(F.log_softmax(net(images) / 20, 1), wanted, reduction="batchmean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in net.state_dict().items())
    assert not teacher.net.training


def test_brief_trainings_are_tested_at_their_end(sets, teacher):
    found = [sorted(students(sets, teacher, replace(QUICK, epochs=epochs)).visited) for epochs in (1, 4, 7, 23)]
    assert found == [[1], [4], [7], [20, 23]]


def test_images_are_tested_with_a_margin_cut_off(sets, teacher, monkeypatch):
    """As Resize(256), CenterCrop(224), by students and teachers alike."""
    seen, squares = [], Photos.squares
    monkeypatch.setattr(
        Photos, "squares", lambda self, *given: seen.append((self.what, *given)) or squares(self, *given)
    )
    ours = students(sets, untrained("conv2", 21, 3), replace(QUICK, size=21))
    ours.accuracy(ours.fresh(), "test")
    teachers.teacher_accuracy(ours.fresh(), sets[1], 21, 24, CPU)
    assert seen == [("test", 21, 24)] * 2


def test_students_learn_from_a_teacher(sets, teacher):
    ours = students(sets, teacher)
    report = evaluate(one_by_one(ours.train), ours.score, [0], ours.epochs, "last", "acc", ours.visited)
    assert report.metrics["acc"][0] > 80
    first, again = (students(sets, teacher, replace(QUICK, epochs=2)).train(1, lambda *_: None) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_compat_moves_the_statistics_twice(sets, teacher):
    brief = replace(QUICK, epochs=1)
    counted = [
        students(sets, teacher, brief, replace(CONV, compat_rded=compat)).train(0, lambda *_: None)
        for compat in (False, True)
    ]
    assert [int(state["features.1.num_batches_tracked"]) for state in counted] == [3, 6]


def test_parts_of_a_batch_make_the_same_step(sets, teacher):
    """Where no norm looks at the batch."""

    class Plain(SoftLabels):
        def fresh(self) -> nn.Module:
            return build_network("ConvNetD2W8", 16, 3)

    def train(parts):
        given = (sets[0], {"test": sets[1]}, 3, 12, 0, CPU, teacher)
        cfg = replace(CONV, re_accum_steps=parts, sgd=True)
        return Plain(replace(QUICK, epochs=2, lr=0.1), cfg, *given).train(0, lambda *_: None)

    whole, cut = train(1), train(5)
    assert all(torch.allclose(whole[name], cut[name], atol=1e-5) for name in whole)


def test_a_last_image_alone_joins_a_batch(sets, teacher):
    ours = students(sets, teacher, replace(QUICK, epochs=1, batch_size=35))
    assert [len(rows) for rows, _ in ours.batches(0, 0, 35, ours.fresh())] == [36]
    assert [len(rows) for rows, _ in ours.batches(0, 0, 35, build_network("ConvNetD2W8", 16, 3))] == [35, 1]


def test_a_teacher_is_trained_once_and_tried(sets, tmp_path, monkeypatch):
    cfg = TeacherConfig(arch_name="conv2", teacher_epochs=12)
    given = (16, 16, IDENTS, lambda: sets[0], sets[1], tmp_path, 0, CPU)
    found = open_teacher(cfg, *given)
    assert found.accuracy > 80 and found.source == "trained here" and not found.net.training
    monkeypatch.setattr(teachers, "_loop", None)  # nothing is trained any more
    assert open_teacher(cfg, *given).accuracy == found.accuracy
    (path,) = (tmp_path / "teachers").iterdir()
    assert path.suffix == ".pth"


def test_a_teacher_with_the_wrong_order_is_refused(sets, taught, tmp_path):
    state = torch.load(taught, weights_only=True)
    torch.save({"model": state["model"]}, tmp_path / "nameless.pth")
    turned = stripes(tmp_path / "turned", 12, seed=2)
    turned.labels = (turned.labels + 1) % 3
    cfg = TeacherConfig(arch_name="conv2", teacher=str(tmp_path / "nameless.pth"))
    given = (16, 16, IDENTS, lambda: sets[0], turned, tmp_path, 0, CPU)
    with pytest.raises(UserError, match="classes are probably in another order"):
        open_teacher(cfg, *given)
    assert open_teacher(replace(cfg, teacher_check=False), *given).accuracy < 40


def test_a_teacher_that_was_trained_too_briefly(sets, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "accuracy", lambda *_: 34.0)
    cfg = TeacherConfig(arch_name="conv2", teacher_epochs=1)
    with pytest.raises(UserError, match=r"trained here for 1 epochs gets 34\.0 %.*raise --teacher_epochs"):
        open_teacher(cfg, 16, 16, IDENTS, lambda: sets[0], sets[1], tmp_path, 0, CPU)


def test_classes_are_found_by_their_names(sets, taught):
    images = torch.randn(4, 3, 16, 16)
    plain = load_teacher("conv2", taught, 16, IDENTS)(images)
    assert torch.allclose(load_teacher("conv2", taught, 16, ["down", "across"])(images), plain[:, [2, 0]], atol=1e-6)
    with pytest.raises(UserError, match="does not know the class 'red'; it knows 3"):
        load_teacher("conv2", taught, 16, ["red"])
    with pytest.raises(UserError, match="knows the classes of ImageNet only"):
        load_teacher("resnet18", "torchvision", 64, IDENTS)


def test_a_teachers_training_goes_on_after_a_kill(sets, taught, tmp_path, monkeypatch):
    monkeypatch.setattr(teachers, "SAVE_EVERY", -1.0)
    real, saved = teachers.save_tensors, []

    def killed(path, state):
        real(path, state)
        saved.append(path)
        if len(saved) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(teachers, "save_tensors", killed)
    given = ("conv2", sets[0], 16, 16, IDENTS, 12, tmp_path, 0, CPU)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(*given)
    path = train_teacher(*given)
    assert len(saved) == 5 + 6 + 1 and [file.name for file in tmp_path.iterdir()] == [path.name]
    found, wanted = (torch.load(file, weights_only=True) for file in (path, taught))
    assert all(torch.equal(found["model"][name], wanted["model"][name]) for name in wanted["model"])
    assert found["classes"] == IDENTS
