"""How labelled images are judged: `eval.py` for image classification, and what it shares with the verbs before it.

Whatever made the images, they are scored alike: fresh networks are trained on them and classify the test images.
`core/classification.py` holds the protocols; here are the sources (files of distilled images, random real images,
coresets, all real images) and the checks that a file fits the data at hand. Every row of distilled or chosen images
also says what it gains over random ones under the same recipe (DD-Ranking, arXiv 2505.13300).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data import build_images, published_name
from data.dsa import STRATEGY, augment, crop_scale_rotate, parse_strategy
from data.images import ImageData, ImagesConfig
from data.zca import ZCA
from methods.core.classification import AccuracyConfig, AccuracyJudge, RealSet
from methods.core.coresets import DEFINITIONS, CoresetConfig
from methods.core.evaluation import Report
from methods.core.image_protocols import PROTOCOLS, Augment, pool
from methods.core.judging import (
    FullConfig,
    add_gain,
    at_best_rate,
    check_classes,
    check_whitening,
    mean_accuracy,
    random_rows,
    warn_of_whitening,
)
from methods.core.precision import numbers
from methods.core.report import results_table
from methods.core.results import as_record, as_row, recorded_options, write_result
from methods.image_coresets import ImageCoresets
from methods.image_experts import open_experts, whitening
from methods.image_files import LoadedImages, load_images
from methods.image_gallery import METRICS, refresh_page
from methods.images import ImageSet
from networks import build_network, is_network, list_networks
from utils.config import flat, option, section
from utils.errors import UserError
from utils.metrics import augmentation_robustness, improvement
from utils.ranks import ALONE, Ranks, open_ranks
from utils.registry import nearest
from utils.rng import derive_seed, generator, seeded
from utils.run import SetupConfig, pick_device


@dataclass(frozen=True)
class NetworkConfig:
    """The network, and how images are augmented in front of it."""

    model: str = option("ConvNet", "network of the experts and students, such as ConvNetD4W64 or ResNet18")
    dsa: bool = option(
        True,
        "differentiable siamese augmentation; false: crop, scale or rotate each image, as DC did, and as released "
        "nothing at all in the inner loop",
    )
    dsa_strategy: str = option(STRATEGY, "operations of --dsa, joined by _; none for none")

    def check(self) -> None:
        parse_strategy(self.dsa_strategy)
        if not is_network(self.model):
            raise UserError(f"unknown --model '{self.model}'{nearest(self.model, list_networks())}")

    def augment(self) -> Augment | None:
        """What happens to a batch before a network sees it."""
        if not self.dsa:
            return crop_scale_rotate
        ops = parse_strategy(self.dsa_strategy)
        return (lambda images, rng: augment(images, ops, rng)) if ops else None


@dataclass(frozen=True)
class ImageCommand:
    """What each verb has to know of labelled images: which, and which network meets them."""

    method: str = option("mtt", "the system")
    data: ImagesConfig = section(ImagesConfig)
    net: NetworkConfig = section(NetworkConfig)


@dataclass(frozen=True)
class JudgeConfig(AccuracyConfig):
    """How a set of images is judged, and by which networks."""

    eval_mode: str = option("S", "networks that judge: S the model, M many, W D A P N kinds of ConvNet, C, B")


@dataclass(frozen=True)
class SourceConfig(FullConfig, CoresetConfig):
    """What eval.py judges."""

    source: tuple[str, ...] = option(
        ("random", "distilled"),
        "what to judge",
        aliases=("data",),
        choices=("distilled", "random", *DEFINITIONS, "full"),
    )
    distilled: tuple[str, ...] = option(
        (), "distilled file, or published image tensors (empty: runs/<method>/<name>/distilled_best.pt)"
    )
    label_files: tuple[str, ...] = option((), "labels of published images (empty: labels_… beside images_…)")
    ipc: int = option(0, "random and coreset images a class (0: as many as the distilled file has)", low=0)
    syn_lr: float = option(0.0, "rate on distilled images (0: the learned one, else 0.01)", low=0)
    random_lrs: tuple[float, ...] = option(
        (0.001, 0.005, 0.01, 0.05, 0.1), "rates on random images and on each coreset, of which the best counts", above=0
    )
    robust: bool = option(False, "also judge without augmentation: DD-Ranking's score ars, which weighs both")
    networks: tuple[str, ...] = option((), "networks to train (empty: the pool that --eval_mode names)")
    save_dir: str = option("", "folder of the results (empty: beside the distilled file)")

    def check(self) -> None:
        if not self.source:
            raise UserError(f"--data names nothing; choose from distilled, random, {', '.join(DEFINITIONS)}, full")
        if self.real and not self.random_lrs:
            raise UserError("--random_lrs names no rate; give one, such as 0.01")
        unknown = [name for name in self.networks if not is_network(name)]
        if unknown:
            raise UserError(f"unknown network '{unknown[0]}'{nearest(unknown[0], list_networks())}")

    def idle(self) -> dict[str, str]:
        found = {} if {"random", "distilled"} <= {*self.source} else {"robust": "--data random distilled"}
        found |= {} if "distilled" in self.source else {"syn_lr": "--data distilled"}
        return found | ({} if self.real else {"ipc": "--data random or a coreset"}) | self.idle_for(self.source)

    @property
    def coresets(self) -> list[str]:
        return [name for name in DEFINITIONS if name in self.source]

    @property
    def real(self) -> list[str]:
        """What takes a few real images of each class."""
        return [*(["random"] if "random" in self.source else []), *self.coresets]


@dataclass(frozen=True)
class Eval(ImageCommand):
    """Train fresh networks on distilled, random or full data, or on coresets, and report their accuracy."""

    run: SetupConfig = section(SetupConfig)
    judge: JudgeConfig = section(JudgeConfig)
    source: SourceConfig = section(SourceConfig)

    def check(self) -> None:
        rate = PROTOCOLS[self.judge.protocol].lr
        if rate is not None and self.source.syn_lr not in (0, rate):
            raise UserError(
                f"--protocol {self.judge.protocol} trains on every set at {rate:g}, never at --syn_lr "
                f"{self.source.syn_lr:g}; leave one of them out"
            )


@numbers("float32")
def evaluate(cfg: Eval) -> None:
    """Judge sets of images by the accuracy of fresh networks trained on them; print a table and write result.json.

    Under torchrun the processes share the networks.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _evaluate(cfg, ranks)


def _evaluate(cfg: Eval, ranks: Ranks) -> None:
    source = cfg.source
    paths = source.distilled or (str(home(cfg) / "distilled_best.pt"),)
    names = source.networks or tuple(pool(cfg.judge.eval_mode, cfg.net.model))
    with ranks.in_turn():
        loaded, data, coresets = _open(cfg, paths, names, ranks)
    judges = [Judging(cfg, data, loaded, name, coresets, ranks) for name in names]
    judged = [judge.rows(f"{judge.network}, " if len(names) > 1 else "") for judge in judges]
    rows = [row for part in judged for row in part]
    if not ranks.first:
        return
    print(results_table([as_row(row) for row in rows], METRICS, "images"))
    # Full data has a recipe of its own, whichever is asked for.
    about = min((row["protocol"] for row in rows), key=lambda found: found["protocol"] != cfg.judge.protocol)
    print(
        f"protocol {about['protocol']} ({about['about']}), {about['networks']} networks of {', '.join(names)}, accuracy"
        " on test in %; gain: points over random images at their best rate; lrs, ars: DD-Ranking's scores x 100"
    )
    for kind in source.coresets:
        print(f"{kind}: {'; '.join(coresets.about(kind).values())}")
    home_folder = Path(paths[0]).parent
    folder = Path(source.save_dir or home_folder / "eval" / f"{cfg.judge.protocol}-{'-'.join(names)[:80]}")
    print(f"written to {write_result(folder, rows, flat(cfg))}")
    refresh_page(home_folder)


def _open(
    cfg: Eval, paths: Sequence[str], names: Sequence[str], ranks: Ranks
) -> tuple[LoadedImages | None, ImageData, ImageCoresets | None]:
    """The distilled set, the data, and what chooses coresets; UserError where they do not fit each other."""
    source, experts = cfg.source, None
    loaded = load_images(paths, source.label_files) if Path(paths[0]).exists() or "distilled" in source.source else None
    if source.needs_experts(source.source):
        experts = open_experts(source.buffer_path or home(cfg) / "buffers", cfg, max_experts=1)
    whitened = whitening(cfg, experts.folder) if experts else None
    if loaded and loaded.zca:
        whitened = ZCA.from_state(loaded.zca).to(ranks.device)
    data = build_images(cfg.data, ranks.device, whitened)
    if loaded is not None:
        loaded = _fitted(paths, loaded, data)
        warn_of_whitening(paths[0], loaded.meta, cfg.data)
    for name in names:  # a network that does not take these images is told now, not after the first row's hours
        fresh_network(name, data, 0)
    coresets = ImageCoresets(data, fresh_network(cfg.net.model, data, 0), experts, source) if source.coresets else None
    if coresets:
        coresets.check(source.coresets, cfg)
    data.decode(*("train", "test") if ranks.world > 1 else ())
    return loaded, data, coresets


class Judging:
    """One network's verdict on all that is asked for."""

    def __init__(
        self,
        cfg: Eval,
        data: ImageData,
        loaded: LoadedImages | None,
        network: str,
        coresets: ImageCoresets | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.cfg, self.data, self.loaded, self.network, self.coresets = cfg, data, loaded, network, coresets
        self.ranks, self.judge = ranks, AccuracyJudge(data, cfg.judge, derive_seed(cfg.run.seed, "eval"), ranks)
        self.augment = self.judge.augment(cfg.net.augment())
        self.ipc = self._ipc()

    def rows(self, prefix: str) -> list[dict[str, Any]]:
        """A record of each thing asked for, in that order; of learned and chosen data with its gain, where random is
        known."""
        asked = dict.fromkeys(self.cfg.source.source)
        # The gain needs the others first.
        reports = {name: getattr(self, name)() for name in ("random", "full") if name in asked}
        reports |= {name: self.coreset(name) for name in asked if name in DEFINITIONS}
        if "distilled" in asked:
            reports["distilled"] = self.distilled()
        if "random" in reports:
            self._compare(reports)
        sizes = dict.fromkeys(asked, self.ipc * len(self.data.classes))
        sizes |= {"distilled": 0 if self.loaded is None else len(self.loaded.images)}
        sizes |= {"full": len(self.data["train"])} if "full" in asked else {}
        return [as_record(name, sizes[name], reports[name]) | {"name": prefix + name} for name in asked]

    def distilled(self, hard: bool = False) -> Report:
        """Of the distilled set; `hard`: with the likeliest class of a soft label in its place."""
        found = self.loaded
        labels = found.labels.argmax(1) if hard else found.labels
        lr = self.cfg.source.syn_lr or found.lr or 0.01
        known = self._set(found.images, labels, lr)
        return self.judge.sets(lambda number: known, self.network, label=f"distilled{', hard' if hard else ''},")

    def random(self) -> Report:
        """Of as many random real images, new ones for each network, at the best of the rates."""
        return self._at_best_rate("random", self._random)

    def coreset(self, kind: str) -> Report:
        """Of as many real images chosen by herding, kcenter or forgetting, at the best of the same rates."""
        train, rows = self.data["train"], self.coresets.rows(kind, self.ipc)
        report = self._at_best_rate(kind, lambda number, lr: RealSet(train, lr, self.augment, rows))
        report.protocol |= self.coresets.about(kind)
        return report

    def _at_best_rate(self, name: str, source: Callable[[int, float], RealSet]) -> Report:
        """Of what source(network number, lr) gives.

        One network tries the rates, on validation where there is a hold-out and otherwise on test, which favours real
        images; in DD-Ranking's own protocol each network does, on test.
        """
        fixed, label = self.judge.protocol.lr, f"{name},"
        rates = self.cfg.source.random_lrs if fixed is None else (fixed,)
        if self.cfg.judge.protocol == "dd_ranking":
            return self.judge.searched(functools.partial(source, lr=rates[0]), self.network, "test", rates, label)
        one = AccuracyJudge(self.data, replace(self.cfg.judge, num_eval=1), self.judge.seed)

        def judged(lr: float, scout: bool, split: str) -> Report:
            judge = one if scout else self.judge
            return judge.sets(functools.partial(source, lr=lr), self.network, split, f"{label} rate {lr:g},")

        return at_best_rate(judged, rates, bool(self.cfg.data.holdout), self.ranks)

    def full(self) -> Report:
        """Of all real training images."""
        source = self.cfg.source
        augment = self.cfg.net.augment()
        return self.judge.full(self.network, source.full_epochs, source.full_batch, source.full_lr, augment)

    def _set(self, images: Tensor, labels: Tensor, lr: float) -> ImageSet:
        device, meta = self.data.device, self.loaded.meta if self.loaded else {}
        config = meta.get("config", {})
        samples = config.get("canvas_samples", 1) if config.get("texture") else 0
        return ImageSet(images.to(device), labels.to(device), lr, self.data.size, self.augment, samples)

    def _random(self, number: int, lr: float) -> RealSet:
        rng, train = generator(self.cfg.run.seed, "random images", number), self.data["train"]
        return RealSet(train, lr, self.augment, random_rows(train, [self.ipc] * len(self.data.classes), rng))

    def _ipc(self) -> int:
        """Real images a class; UserError where a class has fewer."""
        own = 1 if self.loaded is None else max(1, len(self.loaded.images) // len(self.data.classes))
        ipc = self.cfg.source.ipc or own
        if self.cfg.source.real:
            least = min(len(self.data["train"].indices_of(label)) for label in range(len(self.data.classes)))
            if least < ipc:
                raise UserError(f"a class has {least} training images, fewer than --ipc {ipc}")
        return ipc

    def _compare(self, reports: dict[str, Report]) -> None:
        """Add to reports what each gains over random images, and to the distilled one its score, with full data."""
        random = reports["random"]
        for name in {"distilled", *DEFINITIONS} & reports.keys():
            add_gain(reports[name], random)
        if "distilled" not in reports:
            return
        distilled = reports["distilled"]
        if "full" in reports:
            hard = self.distilled(hard=True) if self.loaded.soft else distilled
            own, real = mean_accuracy(distilled), mean_accuracy(reports["full"])
            distilled.metrics["lrs"] = [100 * improvement(real, mean_accuracy(hard), own, mean_accuracy(random))["lrs"]]
        if self.cfg.source.robust:
            plain = replace(self.cfg, judge=replace(self.cfg.judge, eval_aug="none"))
            bare = Judging(plain, self.data, self.loaded, self.network, ranks=self.ranks)
            four = (mean_accuracy(report) for report in (distilled, random, bare.distilled(), bare.random()))
            distilled.metrics["ars"] = [100 * augmentation_robustness(*four)]


def recorded(argv: Sequence[str]) -> dict[str, object]:
    """The data and network that the distilled file of this eval.py command was made with, if it notes any."""
    return recorded_options(argv, "mtt", lambda early: _row(**early), (ImagesConfig, NetworkConfig))


def fresh_network(name: str, data: ImageData, seed: int) -> nn.Module:
    """A network for these images, its weights from `seed`."""
    with seeded(seed):
        return build_network(name, data.size, len(data.classes), data.channels).to(data.device)


def home(cfg: Any) -> Path:
    return Path("runs") / cfg.method / (cfg.run.name or _row(cfg.data.dataset, cfg.data.subset))


def _row(dataset: str = "CIFAR10", subset: str = "imagenette", **_: str) -> str:
    name = published_name(dataset)
    return f"{name}_{subset}" if name == "ImageNet" else name


def _fitted(paths: Sequence[str], loaded: LoadedImages, data: ImageData) -> LoadedImages:
    """The loaded set, its labels filled in; UserError where it is not of these classes, channels, size or whitening."""
    classes, (count, channels, height, width) = len(data.classes), loaded.images.shape
    where, labels = paths[0], loaded.labels
    if not len(labels):
        if count % classes:
            raise UserError(f"{where} has {count} images and no labels, which is no multiple of {classes} classes")
        labels = torch.arange(classes).repeat_interleave(count // classes)
    wide = labels.shape[1] if labels.dim() == 2 else int(labels.max()) + 1
    if (labels.dim() == 2 and wide != classes) or wide > classes or labels.min() < 0:
        raise UserError(f"{where} has labels for {wide} classes, {data.name} has {classes}")
    check_classes(where, loaded.meta, data, "--dataset (and --subset)")
    canvas = loaded.meta.get("config", {}).get("texture", False)
    if channels != data.channels or height != width or (height != data.size and not canvas) or height < data.size:
        raise UserError(
            f"{where} holds images of {channels} x {height} x {width}, {data.name} is {data.channels} x {data.size} x "
            f"{data.size}; give the --dataset and --res that it was made with"
        )
    check_whitening(where, loaded.meta, data)
    if loaded.lr is None:
        print(f"no learned rate beside {where}: 0.01 is used unless --syn_lr says otherwise")
    return LoadedImages(loaded.images, labels, loaded.lr, loaded.meta, loaded.zca)
