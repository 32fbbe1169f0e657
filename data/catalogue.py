"""Classes and their image files, known by the names of folders and never by their place in a list.

A catalogue is made, and whatever is wrong with its folders told, before any network is loaded. Images are used from
where they are: `train/<class>/...` and `val/<class>/...` (or test). Sets that are arrays become such folders once
(`data/unpacked.py`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from data.class_names import CIFAR, cifar_class
from data.images import ImagesConfig
from data.photographs import class_files, class_folders, tiny_tests
from data.sources import FETCHED
from data.subsets import ALL, LISTS, SUBSETS, TINY, subset_classes, wordnet_labels, wordnet_names
from data.unpacked import ARRAYS, drawn, unpacked
from utils.config import option
from utils.errors import UserError
from utils.files import digest
from utils.registry import nearest

if TYPE_CHECKING:
    from data.cache import ImageFiles

# What is typed → the subset's name.
SPECS = {"nette": "imagenette", "woof": "imagewoof", **{name: name for name in LISTS}, "imagenet1k": ALL}
SPECS |= {name: name for name in SUBSETS if name not in SPECS.values()}
_SETS = ("imagenet", "tiny_imagenet", "folder", "toy", *CIFAR, *(name for name in ARRAYS if name not in CIFAR))
_ALSO = {
    **dict.fromkeys(("tiny", "tinyimagenet", "tiny_imagenet_200"), "tiny_imagenet"),
    **{"imagenette": "nette", "imagenet_nette": "nette", "imagewoof": "woof", "imagenet_woof": "woof"},
    **{"imageidc": "idc", "imagenet_100": "imagenet100", "imagenet_1k": "imagenet1k"},
}


@dataclass(frozen=True)
class CatalogueConfig:
    """Classes of images: which, by what names, and where their files are."""

    dataset: str = option(
        "imagenet",
        "imagenet (see --spec), tiny_imagenet, cifar10, cifar100, folder (any train/<class>), npz, svhn, mnist, "
        "fashionmnist, digits or toy; the last two need no files",
        aliases=("d",),
    )
    spec: str = option(
        "",
        "classes of ImageNet: nette, woof, idc, imagenet100, imagenet1k or another subset; without it every folder of "
        "train, by its WordNet name",
    )
    data_path: str = option(
        "",
        "folder that holds train/<class>/... and val/<class>/... (or test), or that train folder; for npz the file",
        aliases=("data_dir", "train_data_dir", "image-folder"),
        free=True,
    )
    label_file_path: str = option(
        "", "file of the classes to use, a line each: a folder's name, or that, a tab and the label to write in prompts"
    )
    nclass: int = option(0, "use only so many classes, the first of their list; 0 is all", low=0)
    download: bool = option(False, "fetch CIFAR, SVHN and MNIST sets into --data_path if they are not there", free=True)
    train_limit: int = option(0, "use only the first images of each class, so many, for a quick trial; 0 is all", low=0)
    toy_images: int = option(240, "training images of the toy set", low=12)
    toy_size: int = option(64, "side of the toy set's images in pixels", low=16)
    cache_dir: str = option("cache", "folder for unpacked and decoded images", free=True)
    workers: int = option(
        0, "threads that read images; 0 is one a core", low=0, aliases=("num_workers", "j"), free=True
    )

    def check(self) -> None:
        self.source  # noqa: B018  refuses names that nobody knows

    def idle(self) -> dict[str, str]:
        name = self.source[0]
        found = {} if name == "toy" else dict.fromkeys(("toy_images", "toy_size"), "--dataset toy")
        found |= {"data_path": "a data set that has files"} if name in ("toy", "digits") else {}
        return found | ({} if name in FETCHED else {"download": "a data set of torchvision's, such as cifar10"})

    @property
    def source(self) -> tuple[str, str]:
        """The data set and, of ImageNet, the list of classes, as we spell them; UserError for unknown names."""
        name, spec = (_spelt(text) for text in (self.dataset, self.spec))
        if name in SPECS:
            if spec not in ("", name):
                raise UserError(f"--dataset {self.dataset} and --spec {self.spec} differ; leave out one of them")
            return "imagenet", name
        if name not in _SETS:
            known = (*_SETS, *SPECS)
            raise UserError(f"unknown dataset '{self.dataset}'{nearest(name, known)}; known: {', '.join(_SETS)}")
        if spec == name and name != "imagenet":
            return name, ""  # published commands name CIFAR twice
        if spec and spec not in SPECS:
            known = (*SPECS, *_SETS)
            raise UserError(f"unknown --spec '{self.spec}'{nearest(spec, known)}; known: {', '.join(SPECS)}")
        if spec and name != "imagenet":
            raise UserError(f"--spec {self.spec} lists classes of ImageNet, not of {name}; leave it out")
        return name, spec

    @property
    def listed(self) -> str:
        """The list of classes, or the data set where it has one only, such as woof or cifar10."""
        name, spec = self.source
        return spec or name

    @property
    def row(self) -> str:
        """The classes, as the name of a run's folder has them, such as woof or imagenet100_10."""
        return self.listed if self.nclass in (0, _list_length(*self.source)) else f"{self.listed}_{self.nclass}"

    @property
    def threads(self) -> int:
        """`workers`, counted."""
        return self.workers or os.cpu_count() or 1


@dataclass(frozen=True)
class Kind:
    """A class: its folder's name, such as n01440764, and the words for it in prompts, such as 'tench, Tinca tinca'."""

    ident: str
    label: str


@dataclass(frozen=True)
class Catalogue:
    """The classes of a data set in order, and the image files of each.

    name        the list of classes, or the data set
    train       of each class its training images, sorted: paths below `train_root`, such as 'n01440764/1.JPEG'
    test        of each class its test images, below `test_root`; empty where there are none, for which see `need_test`
    untested    why there are none
    cache_dir   where the digest of the images is remembered
    threads     that read them
    """

    name: str
    dataset: str
    kinds: tuple[Kind, ...]
    train_root: Path
    test_root: Path
    train: tuple[tuple[str, ...], ...]
    test: tuple[tuple[str, ...], ...]
    untested: str
    cache_dir: str
    threads: int

    @property
    def root(self) -> Path:
        """The folder that holds the train folder."""
        return self.train_root.parent

    def train_paths(self, k: int) -> list[Path]:
        """The training images of class k."""
        return [self.train_root / name for name in self.train[k]]

    def test_paths(self, k: int) -> list[Path]:
        """The test images of class k."""
        return [self.test_root / name for name in self.test[k]]

    def need_test(self) -> None:
        """UserError where there are no test images of every class."""
        if self.untested:
            raise UserError(self.untested)

    def class_number(self, name: str) -> int | None:
        """The class whose folder is called `name`, or None; CIFAR's in other spellings too, as `cifar_class` has it."""
        return self._numbers.get(name, self._numbers.get(_class_of(self.dataset, name)))

    def fingerprint(self) -> str:
        """A digest of the classes and of the training images, their names and bytes; equal for equal data anywhere."""
        return digest([(kind.ident, kind.label) for kind in self.kinds], self.train, self._images.content())

    def check_images(self) -> None:
        """UserError for a training image that cannot be decoded."""
        self._images.check()

    @cached_property
    def _images(self) -> ImageFiles:
        from data.cache import ImageFiles

        files = [path for k in range(len(self.kinds)) for path in self.train_paths(k)]
        folder = Path(self.cache_dir) / "images"
        return ImageFiles(files, 1, folder, self.threads, "train", self.train_root, flag="--data_path")

    @cached_property
    def _numbers(self) -> dict[str | None, int]:
        numbers = {_class_of(self.dataset, kind.ident): k for k, kind in enumerate(self.kinds)}
        return numbers | {kind.ident: k for k, kind in enumerate(self.kinds)}


def build_catalogue(cfg: CatalogueConfig) -> Catalogue:
    """The classes that `cfg` names, and their files; UserError for whatever is wrong with either.

    A data set or a list that is published has its own order and needs a folder for each class; others in train are
    passed over. Otherwise each folder is a class, in the order of their names or of --label_file_path.
    """
    name, spec = cfg.source
    published, train, test = _place(cfg, name, spec)
    folders: dict[str, Path] = {}
    for folder, path in class_folders(train).items():
        known = _class_of(name, folder)
        if known in folders:
            raise UserError(f"folders {folders[known].name} and {folder} of {train} are one class, {known}; merge them")
        if known is not None:
            folders[known] = path
    listed = published or _all_folders(cfg, name, train, list(folders))
    chosen = _chosen(cfg, listed, bool(published), train)
    _check_folders(cfg, chosen, list(folders), train)
    kinds = tuple(Kind(folders[ident].name, label) for ident, label in chosen.items())
    files = _below(train, class_files({ident: folders[ident] for ident in chosen}), len(kinds))
    files = tuple(names[: cfg.train_limit or None] for names in files)
    try:
        tests, untested = _tests(name, list(folders), list(chosen), test), ""
    except UserError as error:
        tests, untested = (), str(error)
    return Catalogue(spec or name, name, kinds, train, test, files, tests, untested, cfg.cache_dir, cfg.threads)


def read_label_file(path: Path | str) -> dict[str, tuple[int, str]]:
    """A list of classes: what each line has before its first tab → the line's number, and what it has after that."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"no label file {path}; correct --label_file_path") from None
    except IsADirectoryError:
        raise UserError(f"--label_file_path {path} is a folder; name the file in it") from None
    except UnicodeDecodeError as error:
        raise UserError(f"label file {path} is not UTF-8 text ({error}); save it as such") from None
    found: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        name, _, rest = line.partition("\t")
        name, label = name.strip(), rest.partition("\t")[0].strip()
        if name in found:
            raise UserError(f"line {number} of {path} repeats '{name}' of line {found[name][0]}; remove one")
        if name:
            found[name] = number, label
    if not found:
        raise UserError(f"label file {path} is empty; it needs a line for each class, or leave it out")
    return found


def _spelt(name: str) -> str:
    name = name.lower().replace("-", "_")
    return _ALSO.get(name, name)


def _class_of(dataset: str, name: str) -> str | None:
    """What a folder's class is called, or None for a folder that is no class of the set."""
    return cifar_class(dataset, name) if dataset in CIFAR else name


def _place(cfg: CatalogueConfig, name: str, spec: str) -> tuple[dict[str, str], Path, Path]:
    """The published classes, ident → label, in order (none where folders decide), and the folders train and test."""
    if name == "toy":
        root, classes = drawn(cfg.cache_dir, cfg.toy_images, cfg.toy_size)
        return classes, root / "train", root / "val"
    if name in ARRAYS and not (name in CIFAR and _train_root(cfg).is_dir()):
        # A side, so that oblong images are not refused; unpacked are the images as they came.
        side = 8 if name == "npz" else 0
        source = ImagesConfig(dataset=name, data_path=cfg.data_path, download=cfg.download, res=side)
        root, classes = unpacked(source, cfg.cache_dir)
        return classes, root / "train", root / "val"
    if not cfg.data_path:
        raise UserError("no folder of images; give --data_path, where train/<class>/... is (or try --dataset toy)")
    train = _train_root(cfg)
    if name == "tiny_imagenet" and not train.is_dir():
        train = Path(cfg.data_path) / "tiny-imagenet-200" / "train"
    # ImageNet's own test folder has no classes.
    parts = ("test", "val") if name == "folder" else ("val", "test")
    test = next((train.parent / part for part in parts if (train.parent / part).is_dir()), train.parent / "val")
    return _published(name, spec), train, test


def _list_length(name: str, spec: str) -> int:
    """How many classes a published list has; 0 where folders decide."""
    if name in CIFAR:
        return len(CIFAR[name])
    return len(TINY) if name == "tiny_imagenet" else len(subset_classes(SPECS[spec])[0]) if spec else 0


def _published(name: str, spec: str) -> dict[str, str]:
    if name in CIFAR:
        return {ident: ident.replace("_", " ") for ident in CIFAR[name]}
    if name == "folder" or (name == "imagenet" and not spec):
        return {}
    ids = TINY if name == "tiny_imagenet" else subset_classes(SPECS[spec])[0]
    wnids = wordnet_names()[0]
    return {wnids[number]: wordnet_labels()[wnids[number]] for number in ids}


def _train_root(cfg: CatalogueConfig) -> Path:
    """The train folder in --data_path, or that folder itself."""
    path = Path(cfg.data_path)
    inner = path / "train"
    # A folder train in a folder train is CIFAR-100's class of that name, unless it has classes itself.
    if path.name == "train" and not (inner.is_dir() and any(entry.is_dir() for entry in os.scandir(inner))):
        return path
    return inner


def _all_folders(cfg: CatalogueConfig, name: str, train: Path, folders: list[str]) -> dict[str, str]:
    """Every folder as a class: ident → label."""
    if name == "folder":
        return {folder: folder.replace("_", " ") for folder in folders}
    labels = wordnet_labels()
    foreign = [folder for folder in folders if folder not in labels]
    if foreign and not cfg.label_file_path:
        raise UserError(
            f"{len(foreign)} of {len(folders)} folders of {train} have no WordNet name of ImageNet's, such as "
            f"{foreign[0]}; give --spec or --label_file_path, or take them as they are by --dataset folder"
        )
    return {folder: labels[folder] for folder in folders if folder in labels}


def _chosen(cfg: CatalogueConfig, listed: dict[str, str], published: bool, train: Path) -> dict[str, str]:
    """The classes to use, ident → label: those of the label file, the first --nclass of them."""
    name, spec = cfg.source
    chosen = listed
    if cfg.label_file_path:
        chosen = _named(cfg, listed, published, train)
    wanted = list(listed if spec else chosen)
    if cfg.nclass > len(wanted):
        raise UserError(f"--nclass is {cfg.nclass}, but {spec or name} has {len(wanted)} classes here; lower it")
    wanted = wanted[: cfg.nclass or None]
    for ident in wanted:
        if ident not in chosen:
            raise UserError(
                f"label file {cfg.label_file_path} lacks {ident} ({listed[ident]}) of --spec {cfg.spec}; add it, or "
                "leave out one of the two"
            )
    return {ident: chosen[ident] for ident in wanted}


def _named(cfg: CatalogueConfig, listed: dict[str, str], published: bool, train: Path) -> dict[str, str]:
    """The label file's classes, in the published order if there is one, else in that of the file."""
    name, spec = cfg.source
    what = f"no class of {spec or name}" if published else f"no folder of {train}"
    named: dict[str, str] = {}
    for text, (number, label) in read_label_file(cfg.label_file_path).items():
        ident = _class_of(name, text)
        where = f"line {number} of {cfg.label_file_path}: '{text}'"
        if ident not in listed:
            raise UserError(f"{where} is {what}{nearest(text, listed)}; correct the line")
        if ident in named:
            raise UserError(f"{where} is {ident}, which came before; remove one")
        named[ident] = label or listed[ident]
    return {ident: named[ident] for ident in listed if ident in named} if published else named


def _check_folders(cfg: CatalogueConfig, chosen: dict[str, str], folders: list[str], train: Path) -> None:
    missing = [ident for ident in chosen if ident not in folders]
    if missing:
        of = cfg.source[1] or cfg.source[0]
        label = chosen[missing[0]]
        known = f" ({label})" if label != missing[0] else ""
        raise UserError(
            f"{len(missing)} of the {len(chosen)} classes of {of} are not in {train}, such as {missing[0]}{known}; it "
            "needs a folder for each class (see --data_path, --spec, --label_file_path)"
        )


def _tests(name: str, folders: list[str], chosen: list[str], test: Path) -> tuple[tuple[str, ...], ...]:
    """Of each class its test images, below `test`; UserError where some class has none."""
    if name == "tiny_imagenet":
        found = [
            (file, chosen.index(folders[label]))
            for file, label in tiny_tests(test.parent, folders)
            if folders[label] in chosen
        ]
    else:
        places = {_class_of(name, folder): path for folder, path in class_folders(test).items()}
        missing = [ident for ident in chosen if ident not in places]
        if missing:
            raise UserError(
                f"{len(missing)} of the {len(chosen)} classes have no folder in {test}, such as {missing[0]}; add test "
                "images (see --data_path)"
            )
        found = class_files({ident: places[ident] for ident in chosen})
    return _below(test, found, len(chosen))


def _below(root: Path, files: list[tuple[Path, int]], classes: int) -> tuple[tuple[str, ...], ...]:
    """Files and their labels → of each class its paths below `root`, with slashes."""
    names: list[list[str]] = [[] for _ in range(classes)]
    start = len(str(root / "_")) - 1
    for file, label in files:
        names[label].append(str(file)[start:].replace(os.sep, "/"))  # four times as fast as `relative_to`
    return tuple(tuple(found) for found in names)
