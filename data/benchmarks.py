"""The labelled data sets that a CLIP is judged on: ELEVATER's twenty, ImageNet and its relatives, and any of one's own.

A named set is looked for below `--data_path`, in a folder of its name or as its archive unpacks there; `folder` and
`csv` are anybody's; `toy` is drawn. Classes are known by the names of folders (of ImageNet: WordNet names) or by the
numbers that the set itself has, never by their place in a list of somebody else's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch

from data.benchmark_files import ArrayPictures, FilePictures, Listing, Splits, from_folders, from_tables
from data.benchmark_sets import LAYOUTS, by_wordnet
from data.catalogue import CatalogueConfig, build_catalogue
from data.subsets import wordnet_labels
from utils.config import option
from utils.errors import UserError
from utils.registry import nearest
from utils.scores import METRICS, MULTI

OWN = ("folder", "csv", "toy")


@dataclass(frozen=True)
class Benchmark:
    """A published data set.

    name      as ELEVATER's config files are called; `ident`: its id there
    classes   how many; `sizes`: images of train, val and test, 0 where there is no such split
    metric    one of utils.scores
    prompts   how many templates it is published with
    listed    whether a published list names its classes in the order of its numbers
    crop      whether the middle of an image is taken; else all of it is squeezed into the square
    wordnet   whether its classes are ImageNet's
    """

    name: str
    ident: str
    classes: int
    sizes: tuple[int, int, int]
    metric: str = "accuracy"
    prompts: int = 1
    listed: bool = False
    crop: bool = True
    wordnet: bool = False
    places: tuple[str, ...] = ()


_PER_CLASS = "mean-per-class"
ELEVATER = (
    Benchmark("caltech101", "caltech-101", 102, (3060, 0, 6084), _PER_CLASS, 34, listed=True),
    Benchmark("cifar10", "cifar-10", 10, (50000, 0, 10000), prompts=18),
    Benchmark("cifar100", "cifar-100", 100, (50000, 0, 10000), prompts=18),
    Benchmark("country211", "country211", 211, (31650, 10550, 21100), prompts=5, listed=True),
    Benchmark("dtd", "dtd", 47, (1880, 1880, 1880), prompts=8),
    Benchmark("eurosat-clip", "eurosat_clip", 10, (5000, 5000, 5000), prompts=3, listed=True),
    Benchmark("fer2013", "fer-2013", 7, (28709, 3589, 3589), prompts=6),
    Benchmark("fgvc-aircraft-2013b", "fgvc-aircraft-2013b-variants102", 100, (3334, 3333, 3333), _PER_CLASS, prompts=2),
    Benchmark("flower102", "oxford-flower-102", 102, (1020, 1020, 6149), _PER_CLASS, listed=True),
    Benchmark("food101", "food-101", 101, (75750, 0, 25250)),
    Benchmark("gtsrb", "gtsrb", 43, (26640, 12569, 12630), prompts=3, listed=True),
    Benchmark("hateful-memes", "hateful-memes", 2, (8500, 0, 500), "roc_auc"),
    Benchmark("kitti-distance", "kitti-distance", 4, (6347, 423, 711), listed=True, crop=False),
    Benchmark("mnist", "mnist", 10, (60000, 0, 10000)),
    Benchmark("oxford-iiit-pets", "oxford-iiit-pets", 37, (3680, 0, 3669), _PER_CLASS),
    Benchmark("patchcamelyon", "patch-camelyon", 2, (262144, 32768, 32768), listed=True),
    Benchmark("rendered-sst2", "rendered-sst2", 2, (6920, 827, 1821)),
    Benchmark("resisc45-clip", "resisc45_clip", 45, (3150, 3150, 25200), prompts=18),
    Benchmark("stanfordcar", "stanford-cars", 196, (8144, 0, 8041), prompts=8),
    Benchmark("voc2007classification", "voc-2007-classification", 20, (2501, 2510, 4952), MULTI),
)
IMAGENET = Benchmark("imagenet-1k", "imagenet-1k", 1000, (1281167, 0, 50000), prompts=80, wordnet=True)
_V2 = ("imagenetv2-matched-frequency-format-val", "ImageNetV2-matched-frequency")
ROBUSTNESS = (
    Benchmark("imagenetv2", "imagenetv2", 1000, (0, 0, 10000), prompts=80, wordnet=True, places=_V2),
    Benchmark("imagenet-a", "imagenet-a", 200, (0, 0, 7500), prompts=80, wordnet=True),
    Benchmark("imagenet-r", "imagenet-r", 200, (0, 0, 30000), prompts=80, wordnet=True),
    Benchmark("imagenet-sketch", "imagenet-sketch", 1000, (0, 0, 50889), prompts=80, wordnet=True, places=("sketch",)),
    Benchmark("objectnet", "objectnet", 113, (0, 0, 18574), prompts=80),
)
GROUPS = {"elevater": ELEVATER, "robustness": ROBUSTNESS}
_KNOWN = {spelt: one for one in (*ELEVATER, IMAGENET, *ROBUSTNESS) for spelt in (one.ident, one.name)}


@dataclass(frozen=True)
class BenchmarkConfig:
    """What a CLIP is judged on, and where it is."""

    dataset: tuple[str, ...] = option(
        ("imagenet-1k",),
        "data sets: ELEVATER's names or ids, imagenet-1k, imagenetv2 and its like; elevater (all 20), robustness (all "
        "5); folder, csv, toy; or what --method vlcp knows, such as nette or npz",
        aliases=("ds",),
    )
    data_path: str = option(
        "",
        "folder of the data sets, each in a folder of its name or as its archive unpacks; of a single one also its own",
        aliases=("dataroot",),
        free=True,
    )
    metric: str = option("", "another metric than the set's", choices=("", *METRICS, MULTI))
    toy_images: int = option(600, "training images of the toy set", low=6)
    toy_size: int = option(32, "side of the toy set's images in pixels", low=16)
    cache_dir: str = option("cache", "folder of what is computed once, such as features", free=True)
    workers: int = option(0, "threads that read images; 0 is one a core", low=0, aliases=("num_workers",), free=True)

    def check(self) -> None:
        if not self.names:
            raise UserError("--dataset names nothing; give at least one data set")

    def idle(self) -> dict[str, str]:
        return {} if "toy" in self.names else dict.fromkeys(("toy_images", "toy_size"), "--dataset toy")

    @property
    def names(self) -> tuple[str, ...]:
        """The data sets, groups opened, each as we spell it; UserError for what nobody knows."""
        found: dict[str, None] = {}
        for word in self.dataset:
            # Published commands name a config file.
            name = Path(word).stem if word.endswith(".yaml") else word
            found |= dict.fromkeys([one.name for one in GROUPS[name]] if name in GROUPS else [_spelt(name)])
        return tuple(found)

    @property
    def threads(self) -> int:
        """`workers`, counted."""
        return self.workers or os.cpu_count() or 1


class LabelledSet:
    """A data set's classes and splits, each read when it is asked for.

    name      as we spell it; `published`: the table's row of it, None for one's own
    metric    one of utils.scores
    classes   what label k is called in the set: a folder's name, a WordNet name
    words     the same as words for prompts: underlines gone, of WordNet names the first synonym
    notes     what a reader of its numbers should know
    """

    def __init__(self, name: str, splits: Splits, metric: str, published: Benchmark | None = None) -> None:
        self.name, self.published, self.splits = name, published, splits
        self.split = cache(self._split)
        self.notes: list[str] = []
        test = self.split("test")
        self.classes = test.classes
        several = test.labels.ndim == 2
        self.metric = metric or (published.metric if published else MULTI if several else "accuracy")
        if several != (self.metric == MULTI):
            takes = "one label each" if several else "several labels each (parted by semicolons in a table)"
            raise UserError(f"{name} cannot be scored by {self.metric}; its images would need {takes}")
        if self.metric == "roc_auc" and len(self.classes) != 2:
            raise UserError(f"{name} cannot be scored by roc_auc, which takes two classes; it has {len(self.classes)}")

    @property
    def words(self) -> tuple[str, ...]:
        labels = wordnet_labels() if self.wordnet else {}
        return tuple(labels.get(name, name.replace("_", " ")).split(",")[0] for name in self.classes)

    @property
    def wordnet(self) -> bool:
        """Whether classes are ImageNet's, by their WordNet names."""
        return set(self.classes) <= set(wordnet_labels())

    @property
    def crop(self) -> bool:
        return self.published is None or self.published.crop

    def _split(self, split: str) -> Listing:
        if split not in self.splits:
            raise UserError(f"{self.name} has no {split} images here; a probe needs train beside test")
        found = self.splits[split]()
        if not len(found.pictures) or not found.classes:
            raise UserError(
                f"{self.name} has no {split} images of any class here; unpack it again, or correct its tables"
            )
        for odd in found.labels.aminmax() if found.labels.ndim == 1 else ():
            if not 0 <= int(odd) < len(found.classes):
                raise UserError(
                    f"{self.name} has a {split} image of class {int(odd)}; its {len(found.classes)} count from 0"
                )
        if split != "test" and found.classes != self.classes:
            odd = sorted({*found.classes} ^ {*self.classes}) or ["their order"]
            raise UserError(f"{self.name}: classes of {split} and test differ, such as {odd[0]}; they must be equal")
        self._count(split, found)
        if found.note and (said := f"{self.name}: {found.note}") not in self.notes:
            self.notes.append(said)
        return found

    def _count(self, split: str, found: Listing) -> None:
        """Note where a set is not as large as published: its numbers cannot be compared then."""
        if self.published is None:
            return
        size = self.published.sizes[("train", "val", "test").index(split)]
        for count, known, what in (
            (len(found.pictures), size, f"{split} images"),
            (len(found.classes), self.published.classes, "classes"),
        ):
            if count != known:
                self.notes.append(f"{self.name} has {count:,} {what} here; published are {known:,}")


def open_benchmark(cfg: BenchmarkConfig, name: str, alone: bool = True) -> LabelledSet:
    """The data set of that name; UserError where it is not to be found, or not whole.

    alone   whether it is the only one of a command, so that --data_path may be its own folder
    """
    if name == "toy":
        return LabelledSet(name, _toy(cfg), cfg.metric)
    root, one = Path(cfg.data_path).expanduser(), _KNOWN.get(name)
    if not cfg.data_path and name != "digits":  # which scikit-learn brings along
        raise UserError(f"no folder for {name}; give --data_path, where it is (or try --dataset toy)")
    if cfg.data_path and not root.exists():
        raise UserError(f"no folder {root}; correct --data_path")
    if one is not None:
        return LabelledSet(name, _published(root, one, alone), cfg.metric, one)
    if name == "folder":
        return LabelledSet(name, _own(from_folders(root), root, "<class>/... or test/<class>/..."), cfg.metric)
    if name == "csv":
        return LabelledSet(name, _own(from_tables(root), root, "test.csv, or name the table itself"), cfg.metric)
    return LabelledSet(name, _catalogued(cfg, name), cfg.metric)


def _spelt(name: str) -> str:
    if name in _KNOWN:
        return _KNOWN[name].name
    if name in OWN:
        return name
    try:
        CatalogueConfig(dataset=name).source  # noqa: B018  refuses names that nobody knows
    except UserError:
        known = (*_KNOWN, *GROUPS, *OWN)
        raise UserError(
            f"unknown dataset '{name}'{nearest(name, known)}; known: {', '.join(one.name for one in ELEVATER)}, "
            f"imagenet-1k, {', '.join(one.name for one in ROBUSTNESS)}, elevater, robustness, {', '.join(OWN)}"
        ) from None
    return name


def _published(root: Path, one: Benchmark, alone: bool) -> Splits:
    """The splits of a published set, in its own layout, in tables or in folders of classes, the first that is there."""
    layout = LAYOUTS.get(one.name)
    own = [root / word for word in dict.fromkeys((one.name, one.ident, *one.places)) if (root / word).is_dir()]
    for place in (*own, root):
        for wanted in layout.wanted if layout else ():
            if (place / wanted).exists():
                return {split: partial(layout.read, place, place / wanted, split) for split in layout.splits}
    for place in (*own, root) if alone else own:  # folders of classes that lie bare could be those of any set
        found = from_tables(place) or from_folders(place, bare=one.wordnet)
        if found:
            return {split: partial(_by_wordnet, read, place) for split, read in found.items()} if one.wordnet else found
    looked = [*(layout.wanted if layout else ()), f"{one.name}/test/<class>/...", f"{one.name}/test.csv"]
    raise UserError(f"no {one.name} in {root} (looked for {', '.join(looked)}); correct --data_path")


def _by_wordnet(read: Callable[[], Listing], place: Path) -> Listing:
    return by_wordnet(read(), place)


def _own(found: Splits | None, root: Path, wanted: str) -> Splits:
    if not found:
        raise UserError(f"no labelled images in {root} (looked for {wanted}); correct --data_path")
    if "test" not in found:
        raise UserError(f"{root} has training images only; it needs test (or val) beside them")
    return found


def _toy(cfg: BenchmarkConfig) -> Splits:
    """Drawn shapes, which are the classes."""
    from data.toy import SHAPES, captioned_shapes

    def read(split: str) -> Listing:
        images, labels, _ = captioned_shapes(split, cfg.toy_images, cfg.toy_size)
        return Listing(ArrayPictures(images.permute(0, 2, 3, 1).contiguous()), labels, tuple(SHAPES))

    return {split: partial(read, split) for split in ("train", "test")}


def _catalogued(cfg: BenchmarkConfig, name: str) -> Splits:
    """A set that `--method vlcp` knows, by its folders."""
    found = build_catalogue(
        CatalogueConfig(dataset=name, data_path=cfg.data_path, cache_dir=cfg.cache_dir, workers=cfg.workers)
    )
    found.need_test()
    classes = tuple(kind.ident for kind in found.kinds)

    def read(paths: Callable[[int], list[Path]]) -> Listing:
        files = [paths(k) for k in range(len(classes))]
        labels = torch.arange(len(classes)).repeat_interleave(torch.tensor(list(map(len, files))))
        return Listing(FilePictures(file for own in files for file in own), labels, classes)

    return {"train": partial(read, found.train_paths), "test": partial(read, found.test_paths)}
