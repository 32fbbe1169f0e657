"""Where eval.py finds what it judges: the classes, the folders of distilled images, and the run they came from.

Three ways lead there. The commands of this toolkit name a run (`--name`) or folders (`--distilled`); Minimax's commands
name the distilled training images and the real data (`--imagenet_dir SYN REAL`); RDED's a data set by its own name and
a folder that is looked for below its experiments (`--subset`, `--syn-data-path`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.catalogue import CatalogueConfig
from methods.core.results import LOCAL
from methods.core.teachers import TeacherConfig
from methods.prototype_files import Manifest
from methods.prototype_sources import SELECTIONS, SOURCES, image_folder
from utils.config import option, options_of, peek
from utils.errors import UserError

# RDED's name → data set and its classes
SUBSETS = {
    "imagenet-1k": ("imagenet", "imagenet1k"),
    "imagenet-100": ("imagenet", "imagenet100"),
    "imagenet-nette": ("imagenet", "nette"),
    "imagenet-woof": ("imagenet", "woof"),
    "cifar10": ("cifar10", ""),
    "cifar100": ("cifar100", ""),
    "tinyimagenet": ("tiny_imagenet", ""),
}
_SOFT = ("imagenet1k", "cifar10", "cifar100", "tiny_imagenet")  # what VLCP judges by RDED's protocol
PROTOCOLS = ("minimax", "rded")


@dataclass(frozen=True)
class InputConfig:
    """What eval.py judges, and where it is."""

    source: tuple[str, ...] = option(
        ("random", "distilled"),
        "what to judge: distilled images, as many real ones (random, herding, k-means medoids), all real ones",
        aliases=("data",),
        choices=tuple(SOURCES),
    )
    distilled: tuple[str, ...] = option(
        (), "folders of distilled images, one a generation seed (empty: images of runs/vlcp/<name>)"
    )
    imagenet_dir: tuple[str, ...] = option(
        (), "as Minimax has it: folder of distilled images and folder of the data set; the latter alone will do"
    )
    syn_data_path: str = option(
        "",
        "as RDED has it: folder of distilled images, itself or below ./exp/<subset>_<arch>_f<factor>_...",
        aliases=("syn-data-path",),
    )
    subset: str = option(
        "", "the data set by RDED's name; takes the place of --dataset and --spec", choices=("", *SUBSETS)
    )
    mipc: int = option(300, "part of the folder's name below which RDED looks for --syn-data-path", low=1)
    num_crop: int = option(5, "part of that folder's name, too", aliases=("num-crop",), low=1)
    slct_type: str = option(
        "random",
        "which --ipc of a class's distilled images: random, as released the first ones by name; drawn, others for each "
        "repeat",
        aliases=("s",),
        choices=SELECTIONS,
    )
    coreset_features: str = option(
        "raw",
        "what herding and k-means compare: raw pixels, or latent, which distill.py left",
        choices=("raw", "latent"),
    )
    tag: str = option("", "part of the results folder's name")
    save_dir: str = option("", "folder of the results (empty: in the folder eval of the run that is judged)", free=True)

    def check(self) -> None:
        if not self.source:
            raise UserError(f"--data names nothing; choose from {', '.join(SOURCES)}")
        if len(self.imagenet_dir) > 2:
            raise UserError(
                f"--imagenet_dir names {len(self.imagenet_dir)} folders; it takes that of the distilled images and "
                "that of the data set; several distilled sets are named by --distilled"
            )
        ways = {"distilled": self.distilled, "imagenet_dir": self.imagenet_dir[1:], "syn_data_path": self.syn_data_path}
        named = [f"--{name}" for name, value in ways.items() if value]
        if len(named) > 1:
            raise UserError(f"{' and '.join(named)} both name distilled images; keep one")
        if "/" in self.tag or "\\" in self.tag:
            raise UserError(f"--tag {self.tag} is part of a folder's name and takes no slash")

    def idle(self) -> dict[str, str]:
        found = {} if "distilled" in self.source else {"slct_type": "--data distilled"}
        found |= {} if {"herding", "medoid"} & {*self.source} else {"coreset_features": "--data herding or medoid"}
        return found | ({} if self.syn_data_path else dict.fromkeys(("mipc", "num_crop"), "--syn-data-path"))


@dataclass(frozen=True)
class Inputs:
    """What was found: the data's config, the folders of distilled images, and the run's folder."""

    data: CatalogueConfig
    folders: tuple[Path, ...]
    home: Path


def data_of(data: CatalogueConfig, cfg: InputConfig) -> CatalogueConfig:
    """The data's config once `--subset` and `--imagenet_dir` have had their say; UserError where they contradict it."""
    if cfg.subset:
        if data.source not in (CatalogueConfig().source, SUBSETS[cfg.subset]):
            typed = f"--dataset {data.dataset}" + (f" --spec {data.spec}" if data.spec else "")
            raise UserError(f"--subset {cfg.subset} is not {typed}; leave one of them out")
        dataset, spec = SUBSETS[cfg.subset]
        data = replace(data, dataset=dataset, spec=spec)
        place = Path("data") / cfg.subset  # where RDED expects it
        if not data.data_path and (place / "train").is_dir():
            data = replace(data, data_path=str(place))
    if cfg.imagenet_dir:
        if data.data_path not in ("", cfg.imagenet_dir[-1]):
            raise UserError(f"--data_path {data.data_path} and --imagenet_dir {cfg.imagenet_dir[-1]} differ; keep one")
        data = replace(data, data_path=cfg.imagenet_dir[-1])
    return data


def find_inputs(data: CatalogueConfig, cfg: InputConfig, name: str, experiment: str) -> Inputs:
    """Where all is that a command asks for.

    name         of the run; empty: the data's
    experiment   RDED's name for the folder in ./exp below which it looks for `--syn-data-path`
    """
    data = data_of(data, cfg)
    run = Path("runs/vlcp") / (name or data.row)
    if cfg.syn_data_path:
        folders = [_published(cfg.syn_data_path, experiment)]
    else:
        made = run if Manifest(run).path.is_file() else run / "images"
        folders = list(map(Path, cfg.distilled or cfg.imagenet_dir[:-1] or (made,)))
    known = Manifest.find(folders[0])
    return Inputs(data, tuple(map(image_folder, folders)), run if known is None else known.folder)


def _published(path: str, experiment: str) -> Path:
    """A folder of distilled images as it is, else where RDED looks for it."""
    places = [Path(path), Path("exp") / experiment / path]
    for place in places:
        if place.is_dir():
            return place
    raise UserError(f"no folder of distilled images at {places[0]}, nor at {places[1]}; correct --syn-data-path")


def default_protocol(data: CatalogueConfig, cfg: InputConfig) -> str:
    """The protocol by which VLCP judges these data, or whose command it is."""
    name, spec = data_of(data, cfg).source
    return "rded" if cfg.syn_data_path or (spec or name) in _SOFT else "minimax"


def rded_name(data: CatalogueConfig, cfg: InputConfig) -> str:
    """The data set as RDED's files call it."""
    known = {value: name for name, value in SUBSETS.items()}
    return cfg.subset or known.get(data.source, data.row)


def recorded(argv: Sequence[str]) -> dict[str, Any]:
    """What the distilled images of this eval.py command were made of, if a manifest tells: data, classes, ipc."""
    early = peek(
        argv, ("name", "distilled", "imagenet_dir", "syn-data-path", "dataset", "d", "spec", "subset", "nclass")
    )
    dataset, spec = SUBSETS.get(
        early.get("subset", ""), (early.get("dataset", early.get("d", "")), early.get("spec", ""))
    )
    row = CatalogueConfig(dataset=dataset or CatalogueConfig().dataset, spec=spec, nclass=_whole(early)).row
    name = early.get("name") or (Path(early["config"]).stem if "config" in early else row)
    named = (early.get(way) for way in ("distilled", "imagenet_dir", "syn_data_path"))
    places = [*filter(None, named), Path("runs/vlcp") / name]
    manifest = next(filter(None, map(Manifest.find, map(Path, places))), None)
    if manifest is None:
        return {}
    noted = manifest.section("data")
    found = {key: noted[key] for key in options_of(CatalogueConfig) if key in noted and key not in LOCAL}
    if dataset and noted.get("dataset", dataset) != dataset:
        found = {}  # the command has classes of its own
    for part in ("prototypes", "images"):
        found |= {key: value for key, value in manifest.section(part).items() if key == "ipc"}
    return found


def _whole(early: dict[str, str]) -> int:
    """--nclass; 0 for what is no number, which parsing tells."""
    return int(early["nclass"]) if early.get("nclass", "").isdigit() else 0


def published_teacher(cfg: TeacherConfig, subset: str, classes: int) -> TeacherConfig:
    """The teacher that is asked for; if none is, RDED's file where its commands expect it, if that is there."""
    path = Path("data/pretrain_models") / f"{subset}_{cfg.arch_name}.pth"
    if cfg.teacher:
        return cfg
    if path.is_file():
        return replace(cfg, teacher=str(path))
    if classes != 1000:
        print(f"note: no teacher at {path}; the run has its own, trained once on the real training images")
    return cfg
