"""How posters are judged: `eval.py --method podd`, and what it shares with the verbs before it.

Fresh networks train on a poster's patches for a number of steps, just as the inner loop trained them, and classify the
test images (`core/stepping.py`). Real images are put to the same test: as many whole ones as have no more pixels, and
posters of them that are cut likewise. The poster's row says what it gains over the former.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data import build_images, published_name
from data.images import ImageData, ImagesConfig
from data.zca import ZCA
from methods.core.classification import AccuracyConfig, AccuracyJudge, RealSet, TrainingSet, fresh_stack
from methods.core.evaluation import Report
from methods.core.inner import Inner, InnerAdam, InnerSGD
from methods.core.judging import (
    FullConfig,
    add_gain,
    at_best_rate,
    check_classes,
    check_whitening,
    random_rows,
    warn_of_whitening,
)
from methods.core.precision import numbers
from methods.core.report import results_table
from methods.core.results import (
    as_record,
    as_row,
    distilled_path,
    noted_config,
    protocols_of,
    recorded_options,
    write_result,
)
from methods.core.stepping import StepConfig, StepJudge
from methods.poster import PatchConfig, Poster, PosterConfig, PosterSet, check_fit, real_canvas
from methods.poster_files import LoadedPoster, load_poster
from methods.poster_gallery import columns, refresh_page
from methods.poster_labels import fixed_labels
from methods.poster_layout import GridConfig, Layout, plan
from methods.poster_order import OrderConfig, class_order
from networks import is_network, list_networks
from utils.config import flat, option, section, with_default
from utils.errors import UserError
from utils.metrics import format_bytes
from utils.ranks import ALONE, Ranks, open_ranks
from utils.registry import nearest
from utils.rng import derive_seed, generator
from utils.run import SetupConfig, pick_device

# Where the published commands expect their data, seen from the folder they run in.
_PLACES = {
    "CIFAR10": ("dataset/{typed}", "dataset"),
    "CIFAR100": ("dataset/{typed}", "dataset"),
    "CUB200": ("datasets/CUB200", "dataset/CUB200"),
    "Tiny": (
        "tiny-imagenet-200/tiny-imagenet-200",
        "tiny-imagenet-200",
        "datasets/tiny-imagenet-200/tiny-imagenet-200",
        "datasets/tiny-imagenet-200",
    ),
}
_NETWORKS = {  # as PoDD spells them
    "convnet": "ConvNet",
    "convnet2": "ConvNetNN",
    "convnet4": "ConvNetD4",
    "convnetw": "ConvNetW128x2",
    "convnetw4": "ConvNetD4W128x2",
    "convnetw2": "ConvNetW128x2BN",
}


@dataclass(frozen=True)
class PosterImagesConfig(ImagesConfig):
    """The labelled images that a poster stands for."""

    dataset: str = with_default("cifar10", ImagesConfig, "dataset")
    zca_kind: str = with_default("podd", ImagesConfig, "zca_kind")


def at_hand(cfg: ImagesConfig) -> ImagesConfig:
    """The config with its folder found: in --data_path the one called after the data set, if there is one; without
    --data_path the first that exists of those where the published commands expect it."""
    published = published_name(cfg.dataset)
    if published not in _PLACES:
        return cfg
    if cfg.data_path:
        inside = (Path(cfg.data_path) / name for name in (cfg.dataset, published))
        found = next((path for path in inside if path.is_dir()), None)
    else:
        found = next(
            (path for place in _PLACES[published] if (path := Path(place.format(typed=cfg.dataset))).is_dir()), None
        )
    return cfg if found is None else replace(cfg, data_path=str(found))


@dataclass(frozen=True)
class PosterNetworkConfig:
    """The network that trains on a poster."""

    model: str = option("convnet", f"{', '.join(_NETWORKS)}, or such as ConvNetD4W64 or ResNet18", aliases=("arch",))

    def check(self) -> None:
        _check_network("--model", self.model)

    @property
    def name(self) -> str:
        """As networks/ spells it."""
        return network_name(self.model)


def network_name(typed: str) -> str:
    """A network's name as networks/ spells it; PoDD's own names, in lower case, are known, too."""
    return _NETWORKS.get(typed, typed)


def _check_network(flag: str, typed: str) -> None:
    if not is_network(network_name(typed)):
        raise UserError(f"unknown {flag} '{typed}'{nearest(typed, [*_NETWORKS, *list_networks()])}")


@dataclass(frozen=True)
class InnerConfig:
    """How networks are trained on a poster, while it is learned and when it is judged."""

    inner_optim: str = option("Adam", "inner optimiser", choices=("Adam", "SGD"))
    decay: bool = option(False, "SGD: a fifth of the rate from inner step 200 on, and from 600 on when judged")

    def idle(self) -> dict[str, str]:
        return {} if self.inner_optim == "SGD" else {"decay": "--inner_optim SGD"}

    def optimiser(self, lr: Any) -> Inner:
        """The inner loop's, at this rate: a number, or a tensor whose gradient is asked for."""
        return self._at(lr, 200)

    def optimiser_when_judged(self, lr: float) -> Inner:
        return self._at(lr, 600)

    def _at(self, lr: Any, milestone: int) -> Inner:
        if self.inner_optim == "Adam":
            return InnerAdam(lr)
        return InnerSGD(lr, 0.9, 5e-4, (milestone,) if self.decay else (), gamma=0.2)


@dataclass(frozen=True)
class PosterCommand:
    """What each verb has to know: which images, which network meets them, and the plan of the poster."""

    method: str = option("podd", "the system")
    data: PosterImagesConfig = section(PosterImagesConfig)
    net: PosterNetworkConfig = section(PosterNetworkConfig)
    grid: GridConfig = section(GridConfig)


@dataclass(frozen=True)
class SourceConfig(FullConfig):
    """What eval.py judges."""

    source: tuple[str, ...] = option(
        ("random", "distilled"),
        "what to judge: the poster, whole real images of no more pixels, posters of real images, all real images",
        aliases=("data",),
        choices=("distilled", "random", "crops", "full"),
    )
    distilled: str = option(
        "", "distilled file, or a published <run>_poster.pt (empty: runs/podd/<name>/distilled_best.pt)"
    )
    random_lrs: tuple[float, ...] = option(
        (0.0003, 0.001, 0.003), "rates on random images and on posters of them, of which the best counts", above=0
    )
    networks: tuple[str, ...] = option((), "networks to train (empty: --model)")
    save_dir: str = option("", "folder of the results (empty: beside the distilled file)")

    def check(self) -> None:
        if not self.source:
            raise UserError("--source names nothing; choose from distilled, random, crops, full")
        if self.real and not self.random_lrs:
            raise UserError("--random_lrs names no rate; give one, such as 0.001")
        for name in self.networks:
            _check_network("network", name)

    def idle(self) -> dict[str, str]:
        found = {} if self.real else {"random_lrs": "--source random or crops"}
        full = dict.fromkeys(("full_epochs", "full_lr", "full_batch"), "--source full")
        return found | ({} if "full" in self.source else full)

    @property
    def real(self) -> list[str]:
        """What takes a few real images."""
        return [name for name in ("random", "crops") if name in self.source]


@dataclass(frozen=True)
class Eval(PosterCommand):
    """Train fresh networks on a poster, on as many pixels of real images, or on all of these; report accuracies."""

    run: SetupConfig = section(SetupConfig)
    order: OrderConfig = section(OrderConfig)
    patch: PatchConfig = section(PatchConfig)
    inner: InnerConfig = section(InnerConfig)
    judge: StepConfig = section(StepConfig)
    source: SourceConfig = section(SourceConfig)


@numbers("float32")
def evaluate(cfg: Eval) -> None:
    """Judge a poster by the accuracy of fresh networks trained on it; print a table and write result.json."""
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _evaluate(cfg, ranks)


def _evaluate(cfg: Eval, ranks: Ranks) -> None:
    source = cfg.source
    path = Path(source.distilled or home(cfg) / "distilled_best.pt")
    loaded = load_poster(path) if path.exists() or "distilled" in source.source else None
    names = [network_name(name) for name in source.networks] or [cfg.net.name]
    with ranks.in_turn():
        whitened = ZCA.from_state(loaded.zca).to(ranks.device) if loaded and loaded.zca else None
        data = build_images(at_hand(cfg.data), ranks.device, whitened)
        layout = _layout(cfg, path, loaded, data) if loaded or "crops" in source.source else None
        if "crops" in source.source:  # a patch without a label is told now
            fixed_labels(layout, cfg.patch.label_mode)
        for name in names:  # a network that does not take these images is told now, not after the first row's hours
            fresh_stack(name, data)
        data.decode(*("train", "test") if ranks.world > 1 else ())
    judges = [Judging(cfg, data, layout, loaded, name, ranks) for name in names]
    rows = [row for judge in judges for row in judge.rows(f"{judge.network}, " if len(names) > 1 else "")]
    if not ranks.first:
        return
    print(results_table([as_row(row) for row in rows], columns(rows), "pixels"))
    print(
        f"{protocols_of(rows)}. {cfg.judge.num_eval} networks of {', '.join(names)}, accuracy on test in %; gain: "
        "points over random images at their best rate"
    )
    for row in rows:
        print(f"{row['name']}: {row['protocol']['what']}")
    default = path.parent / "eval" / f"{cfg.judge.looks[-1]}-steps-{'-'.join(names)[:80]}"
    print(f"written to {write_result(Path(source.save_dir or default), rows, flat(cfg))}")
    refresh_page(path.parent)


class Judging:
    """One network's verdict on all that is asked for."""

    def __init__(
        self,
        cfg: Eval,
        data: ImageData,
        layout: Layout | None,
        loaded: LoadedPoster | None,
        network: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self.cfg, self.data, self.layout, self.loaded, self.network = cfg, data, layout, loaded, network
        self.ranks, self.seed = ranks, derive_seed(cfg.run.seed, "eval")
        self.augment = cfg.patch.augment()

    def rows(self, prefix: str) -> list[dict[str, Any]]:
        """A record of each thing asked for, in that order; with its gain, where random images are known."""
        asked = list(dict.fromkeys(self.cfg.source.source))
        reports = {name: getattr(self, name)() for name in asked}
        for name in {"distilled", "crops"} & reports.keys() if "random" in reports else ():
            add_gain(reports[name], reports["random"])
        return [as_record(prefix + name, report.protocol["pixels"], report) for name, report in reports.items()]

    def distilled(self) -> Report:
        known = self._cut(self.loaded.poster, self.loaded.label_map)
        report = self._judged(lambda number: known, "distilled,")
        labels = 0 if self.loaded.label_map is None else self.loaded.label_map.numel()
        told = f"and {labels:,} learned label values" if labels else "whose labels follow from the layout"
        return self._noted(report, self.layout.pixels, f"{self.layout.ipc:.2f} images a class, {told}", labels)

    def random(self) -> Report:
        """Of as many whole real images as have no more pixels, new ones for each network, at the best of the rates."""
        classes, count, train = len(self.data.classes), self._count, self.data["train"]
        least = min(len(train.indices_of(label)) for label in range(classes))
        if least < count / classes:
            raise UserError(
                f"a class has {least} training images, too few for the {count} of {classes} classes that have as many "
                "pixels as the poster; leave out --source random, or raise --train_limit"
            )

        def source(number: int, lr: float) -> RealSet:
            rng = generator(self.cfg.run.seed, "random images", number)
            more = torch.randperm(classes, generator=rng)[: count % classes]
            counts = torch.full((classes,), count // classes).index_add(0, more, torch.ones_like(more))
            return RealSet(train, lr, self.augment, random_rows(train, counts.tolist(), rng))

        report = self._at_best_rate("random", source)
        what = f"{count} whole images of {min(count, classes)} classes, others for each network"
        return self._noted(report, count * self.data.size**2, what)

    def crops(self) -> Report:
        """Of posters of real images with labels by the layout, a new one for each network, at the best of the rates."""

        @functools.cache
        def cut(number: int) -> PosterSet:
            rng = generator(self.cfg.run.seed, "real posters", number)
            return self._cut(real_canvas(self.data, self.layout, rng), None)

        report = self._at_best_rate("crops", lambda number, lr: replace(cut(number), lr=lr))
        return self._noted(report, self.layout.pixels, "posters of real images, cut likewise, another for each network")

    def full(self) -> Report:
        """Of all real training images."""
        judge, source = self.cfg.judge, self.cfg.source
        recipe = AccuracyConfig(num_eval=judge.num_eval, batch_size_test=judge.batch_size_test)
        report = AccuracyJudge(self.data, recipe, self.seed, self.ranks).full(
            self.network, source.full_epochs, source.full_batch, source.full_lr, self.augment
        )
        count = len(self.data["train"])
        return self._noted(report, count * self.data.size**2, f"all {count:,} training images")

    def _judged(
        self, source: Callable[[int], TrainingSet], label: str, scout: bool = False, split: str = "test"
    ) -> Report:
        """`scout`: by one network only, of this process alone."""
        cfg = replace(self.cfg.judge, num_eval=1) if scout else self.cfg.judge
        optimiser, patch = self.cfg.inner.optimiser_when_judged, self.cfg.patch
        return StepJudge(self.data, cfg, self.seed, ALONE if scout else self.ranks).sets(
            source, self.network, optimiser, patch.distill_batch_size, split, label, patch.augmentation
        )

    def _at_best_rate(self, name: str, source: Callable[[int, float], TrainingSet]) -> Report:
        def judged(lr: float, scout: bool, split: str) -> Report:
            return self._judged(functools.partial(source, lr=lr), f"{name}, rate {lr:g},", scout, split)

        return at_best_rate(judged, self.cfg.source.random_lrs, bool(self.cfg.data.holdout), self.ranks)

    def _noted(self, report: Report, pixels: int, what: str, labels: int = 0) -> Report:
        size = 4 * (pixels * self.data.channels + labels)  # float32
        report.protocol |= {"pixels": pixels, "bytes": size, "what": f"{what}; {pixels:,} pixels, {format_bytes(size)}"}
        return report

    def _cut(self, poster: Tensor, label_map: Tensor | None) -> PosterSet:
        device, recipe = self.data.device, PosterConfig(**flat(self.cfg.patch))
        label_map = None if label_map is None else label_map.to(device)
        return Poster(poster.to(device), label_map, self.layout, recipe).poster_set(self.augment)

    @property
    def _count(self) -> int:
        """Whole images that have no more pixels than the poster; at least one."""
        grid = self.cfg.grid
        return max(1, grid.poster_width * grid.poster_height // self.data.size**2)


def recorded(argv: Sequence[str]) -> dict[str, object]:
    """What the distilled file of this eval.py command was made with, if it notes any of it.

    A rate that was learned takes the place of the one it began as.
    """
    parts = (PosterImagesConfig, PosterNetworkConfig, GridConfig, OrderConfig, PatchConfig, InnerConfig)
    found = recorded_options(argv, "podd", _row, parts)
    path = distilled_path(argv, "podd", _row)
    return found | ({"inner_lr": load_poster(path).lr} if noted_config(path).get("train_lr") else {})


def _row(early: dict[str, str]) -> str:
    return published_name(early.get("dataset", "cifar10"))


def home(cfg: Any) -> Path:
    return Path("runs") / cfg.method / (cfg.run.name or published_name(cfg.data.dataset))


def _layout(cfg: Eval, path: Path, loaded: LoadedPoster | None, data: ImageData) -> Layout:
    """Where things are on the poster, or on one of real images; UserError where the file does not fit."""
    if loaded is None or not loaded.meta:
        order = class_order(
            cfg.order,
            data.name,
            data.classes,
            cfg.grid.poster_class_num_y,
            cfg.grid.poster_class_num_x,
            cfg.data.cache_dir,
        )
        print(f"classes are placed by {order.encoder} ({order.source})")
        layout = plan(cfg.grid, data.size, order.grid)
    else:
        check_classes(path, loaded.meta, data, "--dataset")
        if loaded.meta["config"].get("res", cfg.data.res) != cfg.data.res:
            raise UserError(f"{path} was made with --res {loaded.meta['config']['res']}, not {cfg.data.res}; give that")
        if any(loaded.meta["config"].get(name, value) != value for name, value in flat(cfg.order).items()):
            print(f"note: {path} has its own order of classes; --order and --order_encoder do nothing")
        layout = plan(cfg.grid, data.size, torch.tensor(loaded.meta["order"]))
    if loaded is not None:
        check_fit(path, loaded, layout, data)
        check_whitening(path, loaded.meta, data)
        warn_of_whitening(path, loaded.meta, cfg.data)
    return layout
