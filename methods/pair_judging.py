"""How pairs are judged: `eval.py` for image–text data, and what it shares with the verbs before it.

Whatever made the pairs, they are scored alike: fresh towers are trained on them and asked for the captions of test
images and for the images of test captions. `core/retrieval.py` holds the protocols, `pair_sources.py` what there is to
judge. `--compare` and `--cross` put several sets, or several pairs of towers, into one table (`pair_compare.py`).
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from data.captions import DataConfig
from methods.core.coresets import CoresetConfig
from methods.core.evaluation import Report
from methods.core.precision import numbers
from methods.core.report import results_table
from methods.core.results import as_record, as_row, recorded_options, write_result
from methods.core.retrieval import PROTOCOLS, Corpus, Judge, JudgeConfig
from methods.core.trunk import TrunkConfig, with_trunk
from methods.lors import LossConfig, judged_loss
from methods.pair_compare import compared, overview, rank, write_comparison
from methods.pair_coresets import PairCoresets
from methods.pair_experts import open_experts, slug
from methods.pair_gallery import refresh_page
from methods.pair_sources import (
    CORESETS,
    REAL,
    Entry,
    Learned,
    PairRecipe,
    SourceConfig,
    check_alike,
    check_fit,
    list_entries,
    named_file,
    random_sets,
    read_learned,
    real_counts,
    tower_pair,
)
from networks.towers import TowerConfig
from utils.config import flat, option, peek, section
from utils.errors import UserError
from utils.ranks import Ranks, open_ranks
from utils.rng import derive_seed
from utils.run import SetupConfig, pick_device


@dataclass(frozen=True)
class PairCommand:
    """What each verb has to know of image–text data: which, and which towers meet it."""

    method: str = option("vldd", "the system")
    data: DataConfig = section(DataConfig)
    towers: TowerConfig = section(TowerConfig)
    trunk: TrunkConfig = section(TrunkConfig)


@dataclass(frozen=True)
class Eval(PairCommand):
    """Train fresh networks on distilled, random, chosen or full data and report their retrieval recall."""

    run: SetupConfig = section(SetupConfig)
    loss: LossConfig = section(LossConfig)
    judge: JudgeConfig = section(JudgeConfig)
    source: SourceConfig = section(SourceConfig)
    coresets: CoresetConfig = section(CoresetConfig)

    def idle(self) -> dict[str, str]:
        return self.coresets.idle_for(self.source.data)


@numbers("float32")
def evaluate(cfg: Eval) -> None:
    """Judge what `--data` asks for by the recall of fresh networks; print a table and write result.json.

    With `--compare` or `--cross` also comparison.md, comparison.csv and a page. Under torchrun the processes share the
    networks.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _evaluate(cfg, ranks)


def _evaluate(cfg: Eval, ranks: Ranks) -> None:
    source, device = cfg.source, ranks.device
    files = [named_file(text) for text in source.compare]
    path = files[0][1] if files else Path(source.distilled or home(cfg) / "distilled_best.pt")
    files = files or ([("distilled", path)] if path.exists() or "distilled" in source.data else [])
    learned = [read_learned(*file, device) for file in files]
    check_alike(learned)
    coresets = _chooser(cfg, learned, ranks)
    entries = list_entries(source, cfg.loss, learned, coresets, cfg.run.seed)
    if source.cross:
        worlds = [_other_towers(cfg, *tower_pair(pair)) for pair in source.cross]
        with ranks.in_turn():
            for world in worlds:  # what does not fit is told now, not after the first row's hours
                _check_texts(world, learned, Corpus(world.data, world.towers, device))
        for world in worlds:
            Bench(world, learned, ranks)
    else:
        worlds = [cfg]
    records = [record for world in worlds for record in Bench(world, learned, ranks).records(entries)]
    if not ranks.first:
        return
    about = records[0]["protocol"]
    how = f"protocol {about['protocol']} ({about['about']}), {about['networks']} networks of "
    # Written before anything is printed: whoever reads the output may have left during the hours that this took.
    if source.comparing:
        place = write_comparison(Path(source.save_dir or home(cfg) / "compare"), records, flat(cfg))
        print(overview(records))
        print(f"{how}{', '.join(source.cross) or _towers(cfg)}, recall on test in %")
        print(f"written to {place}; look at {place / 'report.html'}")
        return
    towers = f"{slug(cfg.towers.image_encoder)}-{slug(cfg.towers.text_encoder)}"
    folder = Path(source.save_dir or path.parent / "eval" / f"{cfg.judge.protocol}-{towers}")
    written = write_result(folder, records, flat(cfg))
    refresh_page(path.parent)
    print(results_table([as_row(record) for record in records]))
    for record in records:
        if "about" in record:
            print(f"{record['name']}: {record['about']}")
    print(f"{how}{cfg.towers.image_encoder} + {cfg.towers.text_encoder}, recall on test in %")
    print(f"written to {written}")


class Bench:
    """One pair of towers, which judges sets; equal questions are asked once.

    UserError where a learned set does not fit it, or fewer real pairs are there than asked for.
    """

    def __init__(self, cfg: Eval, learned: Sequence[Learned], ranks: Ranks) -> None:
        self.cfg, source = cfg, cfg.source
        splits = {"test", *(["val"] if PROTOCOLS[cfg.judge.protocol].select == "val" else [])}
        real = source.comparing or {*source.data} - {"distilled"}
        splits |= {"train"} if real else set()
        with ranks.in_turn():
            self.corpus = open_corpus(cfg, ranks.device, *sorted(splits))
            _check_texts(cfg, learned, self.corpus)
            compared_with = [part.count for part in learned] if source.comparing else []
            for count in [*compared_with, *(real_counts(source, learned) if {*REAL} & {*source.data} else [])]:
                self.corpus.random_pairs(count, torch.Generator())
            if ranks.world > 1:
                self.corpus.ready(*sorted(splits))
                self.corpus.ready(*["train"] if "full" in source.data else [], training=True)
        seed = derive_seed(cfg.run.seed, "eval")
        self.judge = Judge(self.corpus, cfg.judge, cfg.data.image_size, judged_loss(cfg.loss), seed, ranks)
        self.random = functools.cache(self._random)

    def records(self, entries: Sequence[Entry]) -> list[dict[str, Any]]:
        """A record of each, in this order; where sets or towers are compared, with what that tells."""
        if not self.cfg.source.comparing:
            return [self._record(entry) for entry in entries]
        found = [self._compared(entry) for entry in entries]
        rank(found)
        return found

    def report(self, entry: Entry) -> Report:
        if entry.kind == "random":
            return self.random(entry.recipe.on_real(self.cfg.judge.protocol))
        if entry.recipe:
            return self._pairs(entry.recipe.loss, functools.partial(entry.sets, self.corpus), entry.name)
        source = self.cfg.source
        rates = dict.fromkeys(("img", "txt"), source.full_lr)
        return self.judge.full(source.full_epochs, source.full_batch, rates, source.full_captions)

    def _random(self, recipe: PairRecipe) -> Report:
        """Of random real pairs, new ones for each network."""
        sets = functools.partial(random_sets, recipe, self.cfg.run.seed, self.corpus)
        return self._pairs(recipe.loss, sets, "random")

    def _pairs(self, loss: LossConfig, sets: Any, label: str) -> Report:
        judge = copy.copy(self.judge)  # the same towers, drawn anew for every network
        judge.loss_fn = judged_loss(loss)
        return judge.pairs(sets, label=f"{label},")

    def _record(self, entry: Entry) -> dict[str, Any]:
        record = as_record(entry.name, entry.size(self.corpus), self.report(entry))
        return record | ({"about": entry.about} if entry.kind in CORESETS else {})

    def _compared(self, entry: Entry) -> dict[str, Any]:
        cfg, pair = self.cfg, _towers(self.cfg)
        random = self.random(entry.recipe.on_real(cfg.judge.protocol)) if entry.recipe else None
        record = compared(entry, self.report(entry), random)
        record |= {"size": entry.size(self.corpus), "bytes": entry.bytes(self.corpus, cfg.data.image_size)}
        return record | {
            "name": f"{entry.name}, {pair}" if cfg.source.cross else entry.name,
            "towers": pair,
            "recipe": self._recipe(entry),
        }

    def _recipe(self, entry: Entry) -> dict[str, str]:
        cfg = self.cfg
        if entry.recipe:
            batch = cfg.judge.batch_train or PROTOCOLS[cfg.judge.protocol].batch
            return entry.recipe.as_words() | {"batch": str(batch)}
        rates = f"{cfg.source.full_lr:g} / {cfg.source.full_lr:g}"
        loss = {"loss": cfg.loss.loss_type, "temperature": f"{cfg.loss.temperature:g}", "rates, image / text": rates}
        return loss | {"batch": str(cfg.source.full_batch)}


def _towers(cfg: Eval) -> str:
    return f"{cfg.towers.image_encoder}+{cfg.towers.text_encoder}"


def _check_texts(cfg: Eval, learned: Sequence[Learned], corpus: Corpus) -> None:
    for part in learned:
        check_fit(part, cfg.data, cfg.towers, corpus, f"{_towers(cfg)}: " if cfg.source.cross else "")


def _other_towers(cfg: Eval, image: str, text: str) -> Eval:
    """The same with other encoders. Weights that a file gives are of the encoder that they came with, not of others."""
    towers = cfg.towers
    own = {
        "image_weights": towers.image_weights if image == towers.image_encoder else "",
        "text_weights": towers.text_weights if text == towers.text_encoder else "",
    }
    return replace(cfg, towers=replace(towers, image_encoder=image, text_encoder=text, **own))


def _chooser(cfg: Eval, learned: Sequence[Learned], ranks: Ranks) -> PairCoresets | None:
    """What chooses the coresets that are asked for, with the towers of the flags: a coreset is one set for all."""
    kinds = [kind for kind in cfg.source.data if kind in CORESETS]
    if not kinds:
        return None
    with ranks.in_turn():
        corpus = open_corpus(cfg, ranks.device, "train")
        corpus.ready(*["train"] if ranks.world > 1 else [])
    towers = corpus.towers(cfg.data.image_size, derive_seed(cfg.run.seed, "towers"))
    experts = None
    if cfg.coresets.needs_experts(kinds):
        experts = open_experts(cfg.coresets.buffer_path or home(cfg) / "buffers", cfg, corpus, towers)
    chooser = PairCoresets(corpus, towers, experts, cfg.coresets)
    for kind in kinds:
        for count in real_counts(cfg.source, learned):
            chooser.check(kind, count)
    return chooser


def recorded(argv: Sequence[str]) -> dict[str, object]:
    """The data, towers and loss that the distilled file of this eval.py command was made with, if there is one.

    Of several to compare the first counts, for all but the loss, which is each one's own.
    """
    first = peek(argv, ("compare",)).get("compare", "").split(",")[0].strip()  # a list may have commas, too
    kept = (DataConfig, TowerConfig, TrunkConfig, *(() if first else (LossConfig,)))
    file = str(named_file(first)[1]) if first else ""
    found = recorded_options(argv, "vldd", lambda early: early.get("dataset", "flickr"), kept, file)
    found.pop("no_aug", None)  # it said how the pairs began; here it would change how full data is trained on
    return found


def open_corpus(cfg: Any, device: torch.device, *splits: str) -> Corpus:
    """The data set and the towers of a command, the image trunk prepared first where that was asked for.

    The annotations of these `splits` are read, and their images looked for, at once: whatever is missing is told before
    minutes of work.
    """
    towers = with_trunk(cfg.towers, cfg.trunk, cfg.data.image_size, Path(cfg.data.cache_dir), device)
    corpus = Corpus(cfg.data, towers, device)
    for split in splits:
        corpus[split]
    if cfg.towers.text_cache:  # what it lacks (val) is computed, by an encoder that may be missing, or be another
        widths = {split: corpus.embeddings(split).shape[1] for split in ("test", *splits)}
        if len(set(widths.values())) > 1:
            found = ", ".join(f"{split} {width}" for split, width in widths.items())
            raise UserError(f"embeddings of different widths ({found}): --text_cache is of another text encoder")
    return corpus


def home(cfg: Any) -> Path:
    return Path("runs") / cfg.method / (cfg.run.name or cfg.data.dataset)
