"""What eval.py judges of class images: folders of distilled ones, and real ones of the same budget in their place.

A distilled set is any folder with a folder of images for each class, found by the class's name. Against it stand as
many real images a class: drawn at random, chosen by herding, or those nearest to the centres of k-means (medoids); and
all of them. Whatever is judged, label k is the k-th class in the sorted order of folder names, as torchvision and the
published teachers have it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.photographs import SUFFIXES
from methods.core.coresets import herding
from methods.prototype_files import Manifest, load_prototypes
from utils.cluster import nearest_to_centres
from utils.errors import UserError
from utils.files import load_vectors
from utils.registry import nearest
from utils.rng import derive_seed, generator

if TYPE_CHECKING:
    from data.catalogue import Catalogue

Files = list[list[Path]]  # of each class
SOURCES = {
    "random": "real images drawn anew for each repeat",
    "herding": "the real images whose mean follows that of their class (Welling, ICML 2009)",
    "medoid": "the real images nearest to the k-means centres of their class",
    "distilled": "the images given",
    "full": "all real training images",
}
SELECTIONS = ("random", "drawn")


class RealImages:
    """The training images of a catalogue, class by class in the sorted order of the folders' names.

    holdout    share of each class's images, drawn by the seed, that is in `held` and not in `kept`; 0 holds out none
    features   (class, files of that class) → (n, F) float: what herding and k-means compare
    places     where the classes are in the catalogue

    What is drawn for a class depends on its name, never on which other classes there are.
    """

    def __init__(
        self, catalogue: Catalogue, seed: int, holdout: float, features: Callable[[str, list[Path]], Tensor]
    ) -> None:
        places = sorted(range(len(catalogue.kinds)), key=lambda place: catalogue.kinds[place].ident)
        self.places, self.idents = places, [catalogue.kinds[place].ident for place in places]
        self.seed, self.features = seed, features
        self._chosen: dict[tuple[str, int], Files] = {}
        self.kept: Files = []
        self.held: Files = []
        for place, ident in zip(places, self.idents, strict=True):
            files = catalogue.train_paths(place)
            count = max(1, round(holdout * len(files))) if holdout else 0
            if count and count == len(files):
                raise UserError(f"--holdout {holdout:g} takes all {len(files)} training images of {ident}; lower it")
            order = torch.randperm(len(files), generator=generator(seed, "holdout", ident)).tolist()
            apart = {*order[:count]}
            self.held.append([files[i] for i in sorted(apart)])
            self.kept.append([file for i, file in enumerate(files) if i not in apart])

    def check(self, ipc: int) -> None:
        """UserError where a class has fewer than `ipc` images."""
        least = min(range(len(self.kept)), key=lambda label: len(self.kept[label]))
        if len(self.kept[least]) < ipc:
            count = len(self.kept[least])
            raise UserError(
                f"class {self.idents[least]} has {count} real training images, fewer than --ipc {ipc}; lower --ipc, or "
                "judge only distilled and full"
            )

    def random(self, ipc: int, number: int) -> Files:
        """`ipc` images of each class, other ones for each `number`."""
        return [
            drawn(files, ipc, generator(self.seed, "random images", number, ident))
            for ident, files in zip(self.idents, self.kept, strict=True)
        ]

    def chosen(self, kind: str, ipc: int) -> Files:
        """`ipc` images of each class by `herding`, or as the medoids (`medoid`) of k-means, in the order chosen."""
        if (kind, ipc) not in self._chosen:
            found = []
            for ident, files in zip(self.idents, self.kept, strict=True):
                features = self.features(ident, files)
                if kind == "herding":
                    rows = herding(features, ipc)
                else:
                    rows = nearest_to_centres(features, ipc, derive_seed(self.seed, "medoids", ident))
                found.append([files[row] for row in rows.tolist()])
            self._chosen[kind, ipc] = found
        return self._chosen[kind, ipc]


def drawn(files: Sequence[Path], count: int, rng: torch.Generator) -> list[Path]:
    """`count` distinct files, in their own order."""
    rows = torch.randperm(len(files), generator=rng)[:count].sort().values
    return [files[row] for row in rows.tolist()]


def labels_of(files: Files) -> Tensor:
    """(N,) long: the class of each file, class by class."""
    return torch.arange(len(files)).repeat_interleave(torch.tensor([len(some) for some in files]))


def image_folder(path: Path | str) -> Path:
    """The folder of class folders that is meant by that folder, or by the folder of a run that made it."""
    if not Manifest(path).path.is_file():
        return Path(path)
    noted = Path(Manifest(path).section("images").get("path", ""))
    return noted if noted.name and noted.is_dir() else Path(path) / "images"


def latent_features(run: Path, ident: str, names: Sequence[str]) -> Tensor:
    """(n, F) float32: the latents that distill.py left of images such as 'n01440764/1.JPEG' of the class `ident`."""
    remedy = "run distill.py with --keep_latents float32 first, or take --coreset_features raw"
    found = load_vectors(run / "latents" / f"{ident}.safetensors", "latents", remedy)["latents"]
    known = {name: row for row, name in enumerate(load_prototypes(run / "prototypes", ident).files)}
    missing = [name for name in names if name not in known]
    if missing or len(known) != len(found):
        raise UserError(f"the latents of {run} are of other images, none of {(missing or [ident])[0]}; {remedy}")
    return found[[known[name] for name in names]].float().flatten(1)


def distilled_files(
    folder: Path, idents: Sequence[str], spared: Sequence[str] = (), ident_of: Callable[[str], str | None] | None = None
) -> tuple[Files, str]:
    """The images in a folder for each of the classes `idents` (sorted), and what is to be said of it, if anything.

    spared     names of further classes, whose folders are passed over
    ident_of   the class of a folder, None for one of no class; without it the folder's name

    Class folders are found by name; those of RDED, 00000, 00001 and so on, are taken to be the classes in sorted order.
    UserError for a folder that is missing, without an image, or of a class that nobody asked for.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of distilled images at {folder}; run distill.py first, or name one: --distilled")
    places = [entry for entry in sorted(folder.iterdir()) if entry.is_dir() and entry.name[0] != "."]
    found = {(ident_of and ident_of(entry.name)) or entry.name: entry for entry in places}
    if len(found) < len(places):
        raise UserError(f"two folders of {folder} are of one class; merge them")
    if not found:
        raise UserError(f"{folder} holds no class folders; a distilled set has a folder of images for each class")
    note, numbers = "", [f"{label:05d}" for label in range(len(idents))]
    if list(found) == numbers and not {*idents} & {*found}:
        found = dict(zip(idents, found.values(), strict=True))
        note = f"{folder} numbers its classes; {numbers[0]} is taken to be {idents[0]}, {numbers[-1]} {idents[-1]}"
    missing = [ident for ident in idents if ident not in found]
    strange = [name for name in found if name not in idents and name not in spared]
    if missing:
        more = f"; it has {strange[0]}{nearest(strange[0], missing)}" if strange else ""
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(idents)} classes, such as {missing[0]}{more}; class folders "
            "are found by name: give the --dataset, --spec and --nclass that it was made with"
        )
    if strange:
        raise UserError(
            f"{folder} has {len(strange)} folders of other classes, such as {strange[0]}; move them away, or give the "
            "--dataset, --spec and --nclass that it was made with"
        )
    files = [images_below(found[ident]) for ident in idents]
    empty = [ident for ident, some in zip(idents, files, strict=True) if not some]
    if empty:
        raise UserError(f"{found[empty[0]]} holds no images; finish the distillation, or leave that class out")
    return files, note


def images_below(folder: Path) -> list[Path]:
    """Every image in a folder and below it, sorted by name; hidden files are none."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def selected(files: Files, ipc: int, slct_type: str, idents: Sequence[str], seed: int, number: int) -> Files:
    """`ipc` distilled images of each class: with `random` the first ones, as in the released code, with `drawn` any.

    UserError where a class has fewer.
    """
    for ident, some in zip(idents, files, strict=True):
        if len(some) < ipc:
            raise UserError(
                f"{some[0].parent} has {len(some)} images of class {ident}, fewer than --ipc {ipc}; distil more of "
                "them, or lower --ipc"
            )
    if slct_type == "random":
        return [some[:ipc] for some in files]
    return [
        drawn(some, ipc, generator(seed, "distilled images", number, ident))
        for ident, some in zip(idents, files, strict=True)
    ]
