"""Teachers: networks that know the classes already, from a file, from torchvision, or trained here and kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.augment import random_flip
from data.photographs import IMAGENET_STATS
from methods.core.photo_augment import normalised, random_crops
from methods.core.photo_students import ScheduledLoop, accuracy, decayed, whole_batches
from methods.core.photos import Batches, Photos
from networks.pretrained import PUBLISHED, build_architecture, load_architecture
from utils.config import option
from utils.errors import UserError
from utils.files import check_written, digest, load_tensors, save_tensors
from utils.rng import derive_seed, generator, seeded

FORMAT = 1  # of a teacher trained here; what has none is of the first
TRAIN = "train"
SAVE_EVERY = 60.0  # seconds between two notes of how far a teacher's training has come
RATE, DECAY, BATCH, CROP = 0.001, 0.01, 64, (0.25, 1.0)
CHANCE = 0.1  # a teacher that is not this share of the way from chance to all right knows other classes than ours


@dataclass(frozen=True)
class TeacherConfig:
    """The teacher of --protocol rded."""

    arch_name: str = option(
        "resnet18", "its network, as torchvision names it, or resnet18_modified, conv3 …", aliases=("arch-name",)
    )
    teacher: str = option(
        "",
        "its weights: a file, torchvision, or train: on all real training images, once (empty: torchvision's for "
        "the 1000 classes of ImageNet, else train)",
    )
    teacher_epochs: int = option(60, "epochs of --teacher train", low=1)
    teacher_check: bool = option(True, "refuse a teacher that is hardly better than chance on the test images")

    def idle(self) -> dict[str, str]:
        return {} if self.teacher in ("", TRAIN) else {"teacher_epochs": "--teacher train"}


@dataclass
class Teacher:
    """A network that labels images for students.

    source    where its weights are from
    accuracy  in % of the test photographs
    """

    net: nn.Module
    arch: str
    source: str
    accuracy: float


def open_teacher(
    cfg: TeacherConfig,
    size: int,
    resize: int,
    idents: Sequence[str],
    train: Callable[[], Photos],
    test: Photos,
    cache_dir: Path | str,
    seed: int,
    device: torch.device,
    rows: Sequence[int] | None = None,
) -> Teacher:
    """The teacher that a config asks for, tried on the test photographs.

    size, resize  pixels a side of what it sees; of the short side before the middle is cut out
    idents   the classes, in our order
    train    gives all real training photographs; asked only where the teacher must be trained
    rows     where our classes are among the 1000 of ImageNet, for torchvision's weights

    UserError for weights that do not fit, or know the classes in another order.
    """
    source = cfg.teacher or (PUBLISHED if len(idents) == 1000 and rows is not None else TRAIN)
    if source == TRAIN:
        folder = Path(cache_dir) / "teachers"
        path = train_teacher(cfg.arch_name, train(), size, resize, idents, cfg.teacher_epochs, folder, seed, device)
    else:
        path = source
    net = load_teacher(cfg.arch_name, path, size, idents, rows).to(device)
    found = teacher_accuracy(net, test, size, resize, device)
    if cfg.teacher_check:
        _check(found, 100 / len(idents), cfg, path, source == TRAIN)
    return Teacher(net, cfg.arch_name, "trained here" if source == TRAIN else str(source), found)


def _check(found: float, chance: float, cfg: TeacherConfig, path: Path | str, ours: bool) -> None:
    if found >= chance + CHANCE * (100 - chance):
        return
    about, remedy = f"the teacher {path}", "give another --teacher"
    cause = "; its classes are probably in another order than ours (sorted folders), or its images differ"
    if ours:
        about, cause = f"the teacher trained here for {cfg.teacher_epochs} epochs", ""
        remedy = "raise --teacher_epochs"
    raise UserError(
        f"{about} gets {found:.1f} % of the test images right, and chance {chance:.1f} %{cause}; {remedy}, or "
        "--teacher_check false to use it all the same"
    )


def load_teacher(
    arch: str, source: Path | str, size: int, idents: Sequence[str], rows: Sequence[int] | None = None
) -> nn.Module:
    """The network `arch` with the weights in a file, or torchvision's, in evaluation mode and with our classes.

    A file that names its classes (as those trained here) is put in our order; another must be in it. Of torchvision's
    1000 classes those of `rows` are kept. UserError where names or shapes do not fit, or a class is missing.
    """
    if str(source) == PUBLISHED:
        if rows is None:
            raise UserError("--teacher torchvision knows the classes of ImageNet only; give a file, or train")
        return load_architecture(arch, PUBLISHED, size, len(idents), rows)
    found = {} if str(source).endswith(".safetensors") else load_tensors(source, "teacher")
    known = found.get("classes", [])
    if known:
        remedy = "train it anew or give another"
        check_written(source, found, FORMAT, ("model",), f"the teacher {source} is damaged", remedy)
        missing = [ident for ident in idents if ident not in known]
        if missing:
            raise UserError(f"the teacher {source} does not know the class '{missing[0]}'; it knows {len(known)}")
        rows = [known.index(ident) for ident in idents]
    return load_architecture(arch, str(source), size, len(idents), rows if known else None)


def teacher_accuracy(net: nn.Module, test: Photos, size: int, resize: int, device: torch.device) -> float:
    """Percentage of the photographs that a teacher gets right."""
    squares = Batches(test.squares(size, resize), test.labels, device)
    return accuracy(net.to(device), squares, _prepared)


def train_teacher(
    arch: str,
    train: Photos,
    size: int,
    resize: int,
    idents: Sequence[str],
    epochs: int,
    folder: Path,
    seed: int,
    device: torch.device,
) -> Path:
    """The file of a teacher trained on all these photographs, as it was trained before or trained now.

    AdamW, 0.001 down a cosine to 0, decay 0.01, batch 64; crops of a quarter of the square or more, and flips. The file
    holds `model`, `classes` and how it was made. A training that is killed goes on from its last note.
    """
    about = {"arch": arch, "size": size, "resize": resize, "classes": list(idents), "epochs": epochs, "seed": seed}
    path = folder / f"{arch}_{size}_{digest(about, train.content())[:16]}.pth"
    partial, last = path.with_suffix(".part.pt"), time.monotonic()
    if path.is_file():
        partial.unlink(missing_ok=True)  # a kill after the last epoch left it
        return path
    torch_seed = derive_seed(seed, "teacher", arch)
    with seeded(torch_seed):
        net = build_architecture(arch, size, len(idents)).to(device)
    squares = Batches(train.squares(resize), train.labels, device)
    loop = _loop(net, squares, size, epochs, torch_seed)
    if partial.is_file():
        loop.load_state_dict(load_tensors(partial, "unfinished teacher", remedy="remove it"))

    def note(epoch: int) -> None:
        nonlocal last
        if epoch < epochs and time.monotonic() - last > SAVE_EVERY:
            save_tensors(partial, loop.state_dict())
            last = time.monotonic()

    def batches(epoch: int) -> Iterator[tuple[Tensor, torch.Generator]]:
        rng = generator(torch_seed, "epoch", epoch)
        return ((rows, rng) for rows in whole_batches(len(train), BATCH, rng, net))

    loop.fit(batches, note, f"teacher {arch}")
    state: dict[str, Any] = {name: value.cpu() for name, value in net.state_dict().items()}
    save_tensors(path, {"format": FORMAT, "model": state, **about})
    partial.unlink(missing_ok=True)
    return path


def _loop(net: nn.Module, squares: Batches, size: int, epochs: int, seed: int) -> ScheduledLoop:
    def losses(batch: tuple[Tensor, torch.Generator]) -> Iterator[Tensor]:
        rows, rng = batch
        images = random_flip(random_crops(squares.images(rows), size, CROP, rng), rng)
        yield F.cross_entropy(net(_prepared(images)), squares.labels[rows.to(squares.device)])

    def rate(epoch: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))

    optimizer = torch.optim.AdamW(decayed(net, DECAY), lr=RATE)
    return ScheduledLoop(net, optimizer, rate, epochs, seed, losses)


def _prepared(images: Tensor) -> Tensor:
    return normalised(images, IMAGENET_STATS)
