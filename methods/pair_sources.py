"""What can be judged as image–text pairs: files of learned ones, random real ones, coresets, and all there are.

Each is an `Entry` of one list, and says itself how networks are to learn from it: a learned set by what its file notes
(loss, temperature, clamping, learned rates), real pairs by the flags. Random pairs under a set's own recipe are what it
is compared with: their number, loss, rates and phases are the set's, their similarity is the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.captions import DataConfig
from methods.core.retrieval import PROTOCOLS, Corpus, PairSet
from methods.lors import BOUNDED, LossConfig
from methods.pair_coresets import PairCoresets
from methods.pair_files import read_phases
from networks.towers import TowerConfig
from utils.config import option, options_of
from utils.errors import UserError
from utils.rng import generator

CORESETS = ("herding", "kcenter", "forgetting")
REAL = ("random", *CORESETS)
KINDS = ("distilled", *REAL, "full")
REAL_RATE = 0.1  # of both towers on real pairs, where no flag says otherwise
FLOAT = 4  # bytes


@dataclass(frozen=True)
class SourceConfig:
    """What eval.py judges."""

    data: tuple[str, ...] = option(("distilled",), "what to judge, in this order", choices=KINDS)
    distilled: str = option(
        "", "file of learned pairs (empty: runs/vldd/<name>/distilled_best.pt)", aliases=("ckpt_path",)
    )
    compare: tuple[str, ...] = option(
        (), "[NAME=]FILE ...: files of learned pairs side by side, each with its own loss and rates"
    )
    cross: tuple[str, ...] = option((), "IMAGE+TEXT ...: judge with each of these pairs of towers in turn")
    num_pairs: int = option(
        0, "pairs of a random set or a coreset (0: as many as the distilled file has)", aliases=("num_queries",), low=0
    )
    syn_lr_img: float = option(0.0, "rate of the image tower on pairs (0: the learned one, real: 0.1)", low=0)
    syn_lr_txt: float = option(0.0, "rate of the text head on pairs (0: the learned one, real: 0.1)", low=0)
    full_epochs: int = option(10, "epochs on the full data", low=1)
    full_lr: float = option(0.1, "both rates on the full data", above=0)
    full_batch: int = option(128, "real pairs a batch on the full data", low=1)
    full_captions: str = option(
        "all", "an epoch of full data is every caption, or one an image", choices=("all", "one")
    )
    save_dir: str = option("", "folder of the results (empty: beside the distilled file; runs/vldd/<name>/compare)")

    def check(self) -> None:
        if not self.data:
            raise UserError(f"--data names nothing; choose from {', '.join(KINDS)}")
        if self.compare and self.distilled:
            raise UserError("--compare takes the place of --distilled; give all files to --compare")
        if self.compare and "distilled" not in self.data:
            raise UserError("--compare needs distilled among --data, for which its files stand")
        names = [name for name, _ in map(named_file, self.compare)]
        for kind, found in (("set", names), ("pair of towers", self.cross), ("word of --data", self.data)):
            for name in found:
                if found.count(name) > 1:
                    remedy = "; tell them apart by --compare NAME=FILE" if kind == "set" else ""
                    raise UserError(f"the {kind} '{name}' is named twice{remedy}")
        for name in {*names} & {*REAL, "full"}:
            raise UserError(f"a set cannot be called '{name}', as real data is; give it another --compare NAME=FILE")
        for pair in self.cross:
            tower_pair(pair)

    @property
    def comparing(self) -> bool:
        """Whether there is a table of several sets or towers to be made."""
        return bool(self.compare or self.cross)


def named_file(text: str) -> tuple[str, Path]:
    """`NAME=FILE` in its two parts; a file without a name is called after its run folder, or after itself."""
    name, equals, file = text.partition("=")
    if not equals or Path(text).is_file():
        path = Path(text)
        return (path.parent.name if path.stem.startswith("distilled") else "") or path.stem, path
    if not name.strip() or not file.strip():
        raise UserError(f"--compare takes FILE or NAME=FILE, not '{text}'")
    return name.strip(), Path(file.strip())


def tower_pair(text: str) -> tuple[str, str]:
    """The image and the text encoder that `IMAGE+TEXT` names."""
    image, _, words = text.partition("+")
    if not image or not words or "+" in words:
        raise UserError(f"--cross takes IMAGE+TEXT, such as nf_resnet50+bert, not '{text}'")
    return image, words


@dataclass(frozen=True)
class PairRecipe:
    """How networks learn from a set of pairs: the loss, and of each phase how many pairs and both rates."""

    loss: LossConfig
    sizes: tuple[int, ...]
    lr_img: tuple[float, ...]
    lr_txt: tuple[float, ...]

    @property
    def count(self) -> int:
        return sum(self.sizes)

    def on_real(self, protocol: str) -> PairRecipe:
        """The same for real pairs. Recipes that only differ in what makes no difference to them become equal."""
        img, txt = (tuple(float(f"{rate:.6g}") for rate in rates) for rates in (self.lr_img, self.lr_txt))
        txt = img if PROTOCOLS[protocol].rates == "image" else txt
        return replace(self, loss=replace(self.loss, clamp_similarity=False), lr_img=img, lr_txt=txt)

    def phases(self, images: Tensor, texts: Tensor) -> list[PairSet]:
        """Real pairs as training sets, one a phase; their similarity is the identity."""
        rates = [{"img": img, "txt": txt} for img, txt in zip(self.lr_img, self.lr_txt, strict=True)]
        parts = zip(images.split(self.sizes), texts.split(self.sizes), rates, strict=True)
        return [PairSet(pixels, embedded, None, lr) for pixels, embedded, lr in parts]

    def as_words(self) -> dict[str, str]:
        rates = [f"{img:.3g} / {txt:.3g}" for img, txt in zip(self.lr_img, self.lr_txt, strict=True)]
        return {
            "loss": self.loss.loss_type + (", S clamped" if self.loss.clamp_similarity else ""),
            "temperature": f"{self.loss.temperature:g}",
            "rates, image / text": ", ".join(rates),
            "pairs a phase": ", ".join(map(str, self.sizes)),
        }


@dataclass(frozen=True)
class Learned:
    """A distilled file, read.

    noted   the config and more that it notes; empty for LoRS's own
    bytes   of pixels, embeddings, similarity (as stored) and the two rates of each phase, as float32
    """

    name: str
    path: Path
    phases: list[PairSet]
    noted: dict[str, Any]
    bytes: int

    @property
    def config(self) -> dict[str, Any]:
        return self.noted.get("config", {})

    @property
    def count(self) -> int:
        return sum(len(phase.images) for phase in self.phases)


def read_learned(name: str, path: Path, device: torch.device) -> Learned:
    """The set in a file; UserError where there is none."""
    saved, noted = read_phases(path)
    sets, floats = [phase.pair_set(device) for phase in saved], sum(phase.floats() for phase in saved)
    return Learned(name, path, sets, noted, FLOAT * floats)


@dataclass(frozen=True)
class Entry:
    """One thing to judge.

    kind     one of KINDS
    recipe   how networks learn from it; None for full data, which has a recipe of its own
    sets     corpus, network number → the phases to train on, one after another
    about    what should be said about it
    """

    name: str
    kind: str
    recipe: PairRecipe | None = None
    sets: Callable[[Corpus, int], Sequence[PairSet]] | None = None
    about: str = ""
    learned: Learned | None = None

    def size(self, corpus: Corpus) -> int:
        """How many pairs; of full data how many images."""
        return corpus["train"].num_images if self.recipe is None else self.recipe.count

    def bytes(self, corpus: Corpus, image_size: int) -> int:
        """What it takes to keep it: pixels and embeddings as float32, and what is learned beside them."""
        if self.learned:
            return self.learned.bytes
        texts = len(corpus["train"].captions) if self.recipe is None else self.recipe.count
        return FLOAT * (self.size(corpus) * 3 * image_size**2 + texts * corpus.text_width)


def list_entries(
    source: SourceConfig, loss: LossConfig, learned: Sequence[Learned], coresets: PairCoresets | None, seed: int
) -> list[Entry]:
    """What `--data` asks for, in that order.

    learned    what `distilled` stands for; the real sets are as large as these, or as `num_pairs`
    coresets   what chooses; None where none is asked for
    """
    counts, entries = real_counts(source, learned), []
    for kind in source.data:
        if kind == "full":
            entries.append(Entry(kind, kind))
        elif kind == "distilled":
            entries += [_learned_entry(part, source, loss) for part in learned]
        else:
            for count in counts:
                name = kind if len(counts) == 1 else f"{kind}, {count} pairs"
                entries.append(_real_entry(name, kind, count, source, loss, coresets, seed))
    return entries


def real_counts(source: SourceConfig, learned: Sequence[Learned]) -> list[int]:
    """How many pairs random sets and coresets have: `num_pairs`, or the number of every learned set."""
    return [source.num_pairs] if source.num_pairs else list(dict.fromkeys(part.count for part in learned)) or [100]


def _learned_entry(found: Learned, source: SourceConfig, loss: LossConfig) -> Entry:
    if source.compare:  # each set has its own; of a single one the flags know already, and may say otherwise
        own = {name: found.config[name] for name in options_of(LossConfig) if name in found.config}
        loss = replace(loss, **own)
    img, txt = (
        tuple(given or phase.lr[group] for phase in found.phases)
        for group, given in (("img", source.syn_lr_img), ("txt", source.syn_lr_txt))
    )
    sizes = tuple(len(phase.images) for phase in found.phases)
    sets = [_prepared(found, phase, loss, lr) for phase, *lr in zip(found.phases, img, txt, strict=True)]
    return Entry(found.name, "distilled", PairRecipe(loss, sizes, img, txt), lambda *_: sets, learned=found)


def _prepared(found: Learned, phase: PairSet, loss: LossConfig, lr: Sequence[float]) -> PairSet:
    """A phase as it is trained on; UserError where the loss cannot take its similarity."""
    matrix = phase.similarity
    if matrix is not None and loss.clamp_similarity:
        matrix = matrix.clamp(0, 1)
    if matrix is not None and loss.loss_type in BOUNDED and (matrix.min() < 0 or matrix.max() > 1):
        low, high = float(matrix.min()), float(matrix.max())
        raise UserError(
            f"{loss.loss_type} needs a similarity within 0 and 1, and that of {found.path} goes from {low:.3g} to "
            f"{high:.3g}; give --clamp_similarity, or another --loss_type"
        )
    return replace(phase, similarity=matrix, lr=dict(zip(("img", "txt"), lr, strict=True)))


def _real_entry(
    name: str,
    kind: str,
    count: int,
    source: SourceConfig,
    loss: LossConfig,
    coresets: PairCoresets | None,
    seed: int,
) -> Entry:
    rates = source.syn_lr_img or REAL_RATE, source.syn_lr_txt or REAL_RATE
    recipe = PairRecipe(replace(loss, clamp_similarity=False), (count,), *((rate,) for rate in rates))
    if kind == "random":
        return Entry(name, kind, recipe, partial(random_sets, recipe, seed), "new ones for each network")

    chosen = cache(partial(coresets.pairs, kind, count))

    def sets(corpus: Corpus, number: int) -> list[PairSet]:
        return _real_sets(recipe, corpus, *chosen())

    return Entry(name, kind, recipe, sets, coresets.about(kind))


def random_sets(recipe: PairRecipe, seed: int, corpus: Corpus, number: int) -> list[PairSet]:
    """Random real pairs for a network: equal ones wherever seed, number and count are."""
    return _real_sets(recipe, corpus, *corpus.random_pairs(recipe.count, generator(seed, "random pairs", number)))


def _real_sets(recipe: PairRecipe, corpus: Corpus, images: Tensor, captions: Tensor) -> list[PairSet]:
    return recipe.phases(corpus["train"].eval_images(images), corpus.texts("train", captions))


# --- what does not fit -----------------------------------------------------------------------------------------------


def check_alike(learned: Sequence[Learned]) -> None:
    """UserError where files were made of other data, or with another text encoder, than the first that says so."""
    noting = [part for part in learned if part.config]
    for part in noting[1:]:
        first = noting[0]
        for name in ("dataset", "image_size", "train_limit", "toy_images", "text_encoder"):
            here, there = (found.config.get(name) for found in (part, first))
            if here != there and (name != "toy_images" or first.config.get("dataset") == "toy"):
                raise UserError(
                    f"{part.path} was made with {name} {here}, {first.path} with {there}; compare what was made alike"
                )
        prints = [found.noted.get("text_fingerprint") for found in (part, first)]
        if all(prints) and prints[0] != prints[1]:
            raise UserError(
                f"{part.path} was made with another {part.config.get('text_encoder')} than {first.path}: weights, "
                "vocabulary or training captions differ; compare what was made alike"
            )


def check_fit(found: Learned, data: DataConfig, towers: TowerConfig, corpus: Corpus, where: str = "") -> None:
    """UserError where a set is not of this image size, text width or text encoder.

    where   which pair of towers this is about, where there are several
    """
    path, image_size = found.path, data.image_size
    size, width = found.phases[0].images.shape[-1], found.phases[0].texts.shape[1]
    if size != image_size:
        raise UserError(f"{path} holds images of {size} px, but --image_size is {image_size}; use {size}")
    if width != corpus.text_width:
        raise UserError(
            f"{where}{path} holds texts {width} wide, but {towers.text_encoder} gives {corpus.text_width}; "
            "use a text encoder of the same width"
        )
    made_with, here = found.noted.get("text_fingerprint"), corpus.text_fingerprint
    same_name = towers.text_encoder == found.config.get("text_encoder")
    if same_name and made_with and here and made_with != here:
        raise UserError(
            f"{where}{path} was made with another {towers.text_encoder}: its weights, vocabulary or training captions "
            "differ; use the annotations and weights that it was made with"
        )
