"""How pairs are judged: `eval.py` for image–text data, and what it shares with the verbs before it.

Whatever made the pairs, they are scored alike: fresh towers are trained on them and asked for the captions of test
images and for the images of test captions. `core/retrieval.py` holds the protocols; here are the sources (a file of
pairs, random real pairs, all real pairs) and the checks that a file fits the data and towers at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.captions import DataConfig
from methods.core.evaluation import Report
from methods.core.report import results_table
from methods.core.results import as_record, as_row, recorded_options, write_result
from methods.core.retrieval import PROTOCOLS, Corpus, Judge, JudgeConfig, PairSet
from methods.core.trunk import TrunkConfig, with_trunk
from methods.lors import LossConfig, judged_loss
from methods.pair_files import load_pairs
from methods.pair_gallery import refresh_page
from networks.towers import TowerConfig
from utils.config import flat, option, section
from utils.errors import UserError
from utils.rng import derive_seed, generator
from utils.run import SetupConfig, pick_device


@dataclass(frozen=True)
class SourceConfig:
    """What eval.py judges."""

    data: tuple[str, ...] = option(
        ("distilled",), "what to judge, in this order", choices=("distilled", "random", "full")
    )
    distilled: str = option(
        "", "file of learned pairs (empty: runs/vldd/<name>/distilled_best.pt)", aliases=("ckpt_path",)
    )
    num_pairs: int = option(0, "random pairs (0: as many as the distilled file has)", aliases=("num_queries",), low=0)
    syn_lr_img: float = option(0.0, "rate of the image tower on pairs (0: the learned one, random: 0.1)", low=0)
    syn_lr_txt: float = option(0.0, "rate of the text head on pairs (0: the learned one, random: 0.1)", low=0)
    full_epochs: int = option(10, "epochs on the full data", low=1)
    full_lr: float = option(0.1, "both rates on the full data", above=0)
    full_batch: int = option(128, "real pairs a batch on the full data", low=1)
    full_captions: str = option(
        "all", "an epoch of full data is every caption, or one an image", choices=("all", "one")
    )
    save_dir: str = option("", "folder of the results (empty: beside the distilled file)")

    def check(self) -> None:
        if not self.data:
            raise UserError("--data names nothing; choose from distilled, random, full")


@dataclass(frozen=True)
class PairCommand:
    """What each verb has to know of image–text data: which, and which towers meet it."""

    method: str = option("vldd", "the system")
    data: DataConfig = section(DataConfig)
    towers: TowerConfig = section(TowerConfig)
    trunk: TrunkConfig = section(TrunkConfig)


@dataclass(frozen=True)
class Eval(PairCommand):
    """Train fresh networks on distilled, random or full data and report their retrieval recall."""

    run: SetupConfig = section(SetupConfig)
    loss: LossConfig = section(LossConfig)
    judge: JudgeConfig = section(JudgeConfig)
    source: SourceConfig = section(SourceConfig)


def evaluate(cfg: Eval) -> None:
    """Judge distilled, random or full data by the recall of fresh networks; print a table and write result.json."""
    device, source = pick_device(cfg.run.device), cfg.source
    path = Path(source.distilled or home(cfg) / "distilled_best.pt")
    has_pairs = path.exists() or "distilled" in source.data
    pairs, meta = load_pairs(path, device) if has_pairs else (None, {})
    held = sum(len(part.images) for part in pairs or ())
    count = source.num_pairs or held or 100
    splits = {"test", *(["val"] if PROTOCOLS[cfg.judge.protocol].select == "val" else [])}
    corpus = open_corpus(cfg, device, *sorted(splits | ({"train"} if {"random", "full"} & set(source.data) else set())))
    if pairs is not None:
        _check_fit(path, pairs, meta, cfg, corpus)
    if "random" in source.data:
        corpus.random_pairs(count, torch.Generator())  # too many are told now, not after the first row's hours
    judge = Judge(corpus, cfg.judge, cfg.data.image_size, judged_loss(cfg.loss), derive_seed(cfg.run.seed, "eval"))

    def rates(learned: dict[str, float]) -> dict[str, float]:
        return {"img": source.syn_lr_img or learned["img"], "txt": source.syn_lr_txt or learned["txt"]}

    def distilled(network: int) -> list[PairSet]:
        return [dataclasses.replace(part, lr=rates(part.lr)) for part in pairs]

    def random(network: int) -> list[PairSet]:
        images, captions = corpus.random_pairs(count, generator(cfg.run.seed, "random pairs", network))
        real = corpus["train"].eval_images(images), corpus.texts("train", captions)
        return [PairSet(*real, None, rates({"img": 0.1, "txt": 0.1}))]

    full_rates = {"img": source.full_lr, "txt": source.full_lr}
    judges: dict[str, Callable[[], Report]] = {
        "distilled": lambda: judge.pairs(distilled, label="distilled,"),
        "random": lambda: judge.pairs(random, label="random,"),
        "full": lambda: judge.full(source.full_epochs, source.full_batch, full_rates, source.full_captions),
    }
    sizes = {"distilled": held, "random": count}
    if "full" in source.data:
        sizes["full"] = corpus["train"].num_images
    rows = [as_record(name, sizes[name], judges[name]()) for name in source.data]
    print(results_table([as_row(row) for row in rows]))
    about = rows[0]["protocol"]
    nets = f"{about['networks']} networks of {cfg.towers.image_encoder} + {cfg.towers.text_encoder}"
    print(f"protocol {about['protocol']} ({about['about']}), {nets}, recall on test in %")
    towers = f"{slug(cfg.towers.image_encoder)}-{slug(cfg.towers.text_encoder)}"
    folder = Path(source.save_dir or path.parent / "eval" / f"{cfg.judge.protocol}-{towers}")
    print(f"written to {write_result(folder, rows, flat(cfg))}")
    refresh_page(path.parent)


def recorded(argv: Sequence[str]) -> dict[str, object]:
    """The data, towers and loss that the distilled file of this eval.py command was made with, if there is one."""
    kept = (DataConfig, TowerConfig, TrunkConfig, LossConfig)
    found = recorded_options(argv, "vldd", lambda early: early.get("dataset", "flickr"), kept)
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


def _check_fit(path: Path, pairs: list[PairSet], meta: dict, cfg: Eval, corpus: Corpus) -> None:
    size, width = pairs[0].images.shape[-1], pairs[0].texts.shape[1]
    if size != cfg.data.image_size:
        raise UserError(f"{path} holds images of {size} px, but --image_size is {cfg.data.image_size}; use {size}")
    if width != corpus.text_width:
        raise UserError(
            f"{path} holds texts {width} wide, but {cfg.towers.text_encoder} gives {corpus.text_width}; "
            "use a text encoder of the same width"
        )
    made_with, here = meta.get("text_fingerprint"), corpus.text_fingerprint
    same_name = cfg.towers.text_encoder == meta.get("config", {}).get("text_encoder")
    if same_name and made_with and here and made_with != here:
        raise UserError(
            f"{path} was made with another {cfg.towers.text_encoder}: its weights, vocabulary or training captions "
            "differ; use the annotations and weights that it was made with"
        )


def home(cfg: Any) -> Path:
    return Path("runs") / cfg.method / (cfg.run.name or cfg.data.dataset)


def slug(encoder: str) -> str:
    """An encoder's name as one path part; it may be a hub id or a folder."""
    return encoder.strip("/").replace("/", "_")
