"""VLDD: Vision-Language Dataset Distillation (Wu et al., TMLR 2024, arXiv 2308.07545).

Learn N image–text pairs so that two towers trained on them alone retrieve well among real images and captions. An image
is pixels (3, H, W), a text is one continuous embedding (D,) in the space of a frozen text encoder.

Experts   Train an image tower θ_img and a text head θ_txt on the real pairs with the contrastive loss (InfoNCE)
              L = ½ [CE(Z, diag) + CE(Zᵀ, diag)],   Z = λ u vᵀ,   λ = 1 / 0.07,   u, v of length one
          and keep both weight vectors after every epoch: θ*_0, θ*_1, …
Student   Start from θ*_s of a random expert, s < max_start_epoch; take `syn_steps` steps of SGD on the learned pairs
              θ_img ← θ_img − β_img ∂L/∂θ_img,   θ_txt ← θ_txt − β_txt ∂L/∂θ_txt
Match     After them the student should stand where the expert stood `expert_epochs` later:
              ℓ = Σ_{g ∈ img, txt} ‖θ_g − θ*_g,s+R‖² / ‖θ*_g,s − θ*_g,s+R‖²
          Its gradient goes back through all steps to the pixels, the embeddings, β_img and β_txt.

Where the released code differs from the paper, and the option that gives it:
  `--student_logit_scale log`   the student's λ is ln(1/0.07) = 2.66, its exp having been forgotten
  `--protocol vldd`             the judged networks use β_img for both towers, the last of 51 epochs, no schedule
  `--eval_it 50 --num_eval 5`   but on validation: the reference selects and reports on the test set
Ours alone: caption embeddings are computed once, so the frozen text encoder's own dropout is off while experts train.
LoRS (see lors.py) is `--sim_type lowrank --loss_type WBCE`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.captions import DataConfig
from methods import lors
from methods.core.evaluation import Report
from methods.core.experts import ExpertConfig, ExpertTask, train_experts
from methods.core.inner import MODES, Draw, InnerSGD, Params, hypergradient
from methods.core.outer import OuterConfig, outer_loop
from methods.core.report import results_table
from methods.core.retrieval import PROTOCOLS, Corpus, Judge, JudgeConfig, LossFn, PairSet
from methods.core.trajectories import (
    Trajectories,
    TrajectoryStore,
    check_trajectories,
    export_published,
    gaps,
    open_trajectories,
    sample_segment,
)
from methods.core.trunk import TrunkConfig, with_trunk
from methods.gallery import Gallery, as_record, as_row, refresh_page, write_result
from methods.lors import contrastive_loss
from methods.pairs import FORMAT, PairsConfig, load_pairs, start_pairs
from networks.towers import TowerConfig, Towers
from utils.config import flat, option, options_of, peek, section
from utils.errors import UserError
from utils.files import load_tensors
from utils.rng import derive_seed, generator
from utils.run import Run, RunConfig, SetupConfig, pick_device

EPOCHS = ("all", "one")


@dataclass(frozen=True)
class LossConfig:
    """The contrastive loss, the same for students and for the networks that judge."""

    loss_type: str = option("InfoNCE", "loss on the learned pairs", choices=tuple(lors.LOSSES))
    temperature: float = option(0.07, "cosines are divided by it, as in CLIP; saved with the pairs", above=0)


@dataclass(frozen=True)
class StudentLossConfig(LossConfig):
    """The contrastive loss, and how students see it."""

    student_logit_scale: str = option(
        "exp", "exp: 1/temperature; log: ln(1/temperature), as released", choices=("exp", "log")
    )


@dataclass(frozen=True)
class RealConfig:
    """How the experts meet the real pairs."""

    buffer_path: str = option("", "folder of the trajectories (empty: runs/vldd/<name>/buffers)")
    lr_teacher_img: float = option(0.1, "rate of the image tower", above=0)
    lr_teacher_txt: float = option(0.1, "rate of the text head", above=0)
    expert_captions: str = option("all", "an epoch: every caption, or every image with one of its", choices=EPOCHS)
    temperature: float = option(0.07, "cosines are divided by it, as in CLIP", above=0)
    batch_size_test: int = option(128, "images a batch when scoring", low=1, free=True)
    export: str = option("", "write a finished buffer in the published layout to this folder, and stop", free=True)


@dataclass(frozen=True)
class MatchConfig:
    """The inner loop and the segment that it has to follow."""

    buffer_path: str = option("", "folder of the trajectories, its root or its leaf (empty: runs/vldd/<name>/buffers)")
    syn_steps: int = option(8, "inner steps S on the learned pairs", low=1)
    expert_epochs: int = option(1, "epochs R of the expert that they stand for", low=1)
    max_start_epoch: int = option(2, "start epochs are 0 … this − 1", low=1)
    mini_batch_size: int = option(100, "learned pairs an inner step (more than there are: all)", low=1)
    mode: str = option(
        "exact", "gradient through the inner loop (methods/core/inner.py)", aliases=("grad",), choices=MODES
    )


@dataclass(frozen=True)
class ShowConfig:
    """What a distillation leaves behind, and where."""

    save_dir: str = option("", "run folder (empty: runs/vldd/<name>)")
    draw: bool = option(True, "write picture grids and nearest captions at each evaluation", free=True)


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
class Buffer:
    """Train experts on captioned images and keep their weights, epoch by epoch."""

    method: str = option("vldd", "the system")
    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    towers: TowerConfig = section(TowerConfig)
    trunk: TrunkConfig = section(TrunkConfig)
    expert: ExpertConfig = section(ExpertConfig)
    real: RealConfig = section(RealConfig)


@dataclass(frozen=True)
class Distill:
    """Learn a few image–text pairs whose training follows the experts."""

    method: str = option("vldd", "the system")
    run: RunConfig = section(RunConfig)
    data: DataConfig = section(DataConfig)
    towers: TowerConfig = section(TowerConfig)
    trunk: TrunkConfig = section(TrunkConfig)
    loss: StudentLossConfig = section(StudentLossConfig)
    match: MatchConfig = section(MatchConfig)
    pairs: PairsConfig = section(PairsConfig)
    outer: OuterConfig = section(OuterConfig)
    judge: JudgeConfig = section(JudgeConfig)
    show: ShowConfig = section(ShowConfig)


@dataclass(frozen=True)
class Eval:
    """Train fresh networks on distilled, random or full data and report their retrieval recall."""

    method: str = option("vldd", "the system")
    run: SetupConfig = section(SetupConfig)
    data: DataConfig = section(DataConfig)
    towers: TowerConfig = section(TowerConfig)
    trunk: TrunkConfig = section(TrunkConfig)
    loss: LossConfig = section(LossConfig)
    judge: JudgeConfig = section(JudgeConfig)
    source: SourceConfig = section(SourceConfig)


CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}


def buffer(cfg: Buffer) -> None:
    """Train the experts; their weights after every epoch go to `<buffer_path>/<dataset>/<image>/<text>/`."""
    leaf = Path(cfg.real.buffer_path or _home(cfg) / "buffers") / _leaf(cfg)
    if cfg.real.export:
        count = export_published(TrajectoryStore.open(leaf), Path(cfg.real.export))
        print(f"{count} experts written to {cfg.real.export}")
        return
    run = Run(leaf, cfg, "buffer", "--buffer_path")
    corpus = open_corpus(cfg, run.device, "train", *(["val"] if cfg.expert.eval_freq else []))
    towers = corpus.towers(cfg.data.image_size, derive_seed(run.seed, "towers"))
    shapes = {group: part.shapes for group, part in towers.flat.items()}
    has_store = run.resumed and (leaf / "manifest.json").exists()
    store = (
        TrajectoryStore.open(leaf)
        if has_store
        else TrajectoryStore.create(leaf, shapes, cfg.expert.store_dtype, flat(cfg))
    )

    def loss_fn(batch: tuple[Tensor, Tensor, None]) -> Tensor:
        images, texts, _ = batch
        return contrastive_loss(towers.embed_images(images) @ towers.embed_texts(texts).T / cfg.real.temperature)

    task = ExpertTask(
        net=towers,
        flat=towers.flat,
        renew=towers.renew,
        batches=lambda expert, epoch: corpus.epoch(
            cfg.expert.batch_size_train, generator(run.seed, "expert", expert, "epoch", epoch), cfg.real.expert_captions
        ),
        loss_fn=loss_fn,
        score=lambda: corpus.recall(towers, "val", cfg.real.batch_size_test),
    )
    rates = {"img": cfg.real.lr_teacher_img, "txt": cfg.real.lr_teacher_txt}
    train_experts(task, store, cfg.expert, rates, run)
    print(f"{store.count} experts in {leaf}")


def distill(cfg: Distill) -> None:
    """Learn the pairs; `distilled_<step>.pt` at every evaluation, `distilled_best.pt` by validation recall."""
    run = Run(cfg.show.save_dir or _home(cfg), cfg, "distill", "--save_dir")
    corpus = open_corpus(cfg, run.device, "train", *(["val"] if cfg.outer.eval_it else []))
    towers = corpus.towers(cfg.data.image_size, derive_seed(run.seed, "towers"))
    leaf = _leaf(cfg)  # VLDD's; LoRS has <dataset>/<image>_<text>/<loss>
    places = (str(leaf), f"{leaf.parent.parent}/{leaf.parent.name}_{leaf.name}/*")
    experts = open_trajectories(cfg.match.buffer_path or _home(cfg) / "buffers", tuple(towers.flat), places)
    wanted = {group: part.shapes for group, part in towers.flat.items()}
    check_trajectories(experts, wanted, cfg.match.max_start_epoch, cfg.match.expert_epochs)
    pairs = start_pairs(
        corpus, cfg.pairs, cfg.data.image_size, run.rng("init"), lambda: _joint_features(corpus, towers, experts)
    )
    scale = 1 / cfg.loss.temperature
    if cfg.loss.student_logit_scale == "log":
        scale = math.log(scale)

    def step_loss(params: Params, draw: Draw) -> Tensor:
        batch = pairs.batch(draw)
        u, v = towers.functional(params, batch.images, batch.texts)  # (B, E) each, of length one
        return contrastive_loss(scale * u @ v.T, batch.similarity, cfg.loss.loss_type)

    def outer_step() -> dict[str, float]:
        segment = sample_segment(
            experts, run.rng("experts"), cfg.match.max_start_epoch, cfg.match.expert_epochs, run.device
        )
        draws = pairs.draws(run.rng("draws"), cfg.match.syn_steps, cfg.match.mini_batch_size)
        parts: Params = {}

        def objective(final: Params) -> Tensor:
            parts.update(gaps(final, segment))
            return torch.stack(list(parts.values())).sum()

        towers.train()
        loss = hypergradient(
            step_loss, segment.start, draws, InnerSGD(pairs.lr), objective, pairs.leaves, cfg.match.mode
        )
        branches = {f"loss_{group}": float(part.detach()) for group, part in parts.items()}
        rates = {f"lr_{group}": float(rate.detach()) for group, rate in pairs.lr.items()}
        return {"loss": float(loss), **branches, **rates, "start_epoch": segment.epoch, "expert": segment.expert}

    judge = Judge(corpus, cfg.judge, cfg.data.image_size, judged_loss(cfg.loss), derive_seed(run.seed, "judge"))
    gallery = Gallery(run, corpus, pairs.state_dict, _meta(cfg, corpus), cfg.show.draw)

    def evaluate_step(step: int) -> float:
        report = judge.pairs(lambda network: pairs.pair_set(), "val", f"step {step},")
        gallery.scored(step, report)
        return report.mean_std()["r_mean"][0]

    outer_loop(outer_step, pairs, cfg.outer, run, evaluate_step, gallery.keep)
    print(f"{cfg.pairs.num_pairs} pairs in {run.folder}/distilled_best.pt; look at {run.folder}/report.html")


def evaluate(cfg: Eval) -> None:
    """Judge distilled, random or full data by the recall of fresh networks; print a table and write result.json."""
    device, source = pick_device(cfg.run.device), cfg.source
    path = Path(source.distilled or _home(cfg) / "distilled_best.pt")
    has_pairs = path.exists() or "distilled" in source.data
    pairs, meta = load_pairs(path, device) if has_pairs else (None, {})
    count = source.num_pairs or (len(pairs.images) if pairs is not None else 100)
    splits = {"test", *(["val"] if PROTOCOLS[cfg.judge.protocol].select == "val" else [])}
    corpus = open_corpus(cfg, device, *sorted(splits | ({"train"} if {"random", "full"} & set(source.data) else set())))
    if pairs is not None:
        _check_fit(path, pairs, meta, cfg, corpus)
    if "random" in source.data:
        corpus.random_pairs(count, torch.Generator())  # too many are told now, not after the first row's hours
    judge = Judge(corpus, cfg.judge, cfg.data.image_size, judged_loss(cfg.loss), derive_seed(cfg.run.seed, "eval"))

    def rates(learned: dict[str, float]) -> dict[str, float]:
        return {"img": source.syn_lr_img or learned["img"], "txt": source.syn_lr_txt or learned["txt"]}

    def distilled(network: int) -> PairSet:
        return dataclasses.replace(pairs, lr=rates(pairs.lr))

    def random(network: int) -> PairSet:
        images, captions = corpus.random_pairs(count, generator(cfg.run.seed, "random pairs", network))
        real = corpus["train"].eval_images(images), corpus.texts("train", captions)
        return PairSet(*real, None, rates({"img": 0.1, "txt": 0.1}))

    full_rates = {"img": source.full_lr, "txt": source.full_lr}
    judges: dict[str, Callable[[], Report]] = {
        "distilled": lambda: judge.pairs(distilled, label="distilled,"),
        "random": lambda: judge.pairs(random, label="random,"),
        "full": lambda: judge.full(source.full_epochs, source.full_batch, full_rates, source.full_captions),
    }
    sizes = {"distilled": len(pairs.images) if pairs else 0, "random": count}
    if "full" in source.data:
        sizes["full"] = corpus["train"].num_images
    rows = [as_record(name, sizes[name], judges[name]()) for name in source.data]
    print(results_table([as_row(row) for row in rows]))
    about = rows[0]["protocol"]
    print(f"protocol {about['protocol']} ({about['about']}), {about['networks']} networks, recall on test in %")
    towers = f"{_slug(cfg.towers.image_encoder)}-{_slug(cfg.towers.text_encoder)}"
    folder = Path(source.save_dir or path.parent / "eval" / f"{cfg.judge.protocol}-{towers}")
    print(f"written to {write_result(folder, rows, flat(cfg))}")
    refresh_page(path.parent)


def recorded(argv: Sequence[str]) -> dict[str, object]:
    """The data, towers and loss that the distilled file of this eval.py command was made with, if there is one."""
    early = peek(argv, ("distilled", "ckpt_path", "name", "dataset"))
    row = Path(early["config"]).stem if "config" in early else early.get("dataset", "flickr")
    name = early.get("name") or row
    path = Path(early.get("distilled") or early.get("ckpt_path") or Path("runs/vldd") / name / "distilled_best.pt")
    if not path.is_file():
        return {}
    try:
        config = dict(load_tensors(path, "distilled file", mmap=True)["meta"]["config"])
    except (IndexError, KeyError, TypeError, ValueError, RuntimeError):  # LoRS notes nothing; others are refused later
        return {}
    kept = {name for part in (DataConfig, TowerConfig, TrunkConfig, LossConfig) for name in options_of(part)}
    return {name: value for name, value in config.items() if name in kept}


def open_corpus(cfg: Buffer | Distill | Eval, device: torch.device, *splits: str) -> Corpus:
    """The data set and the towers of a command, the image trunk prepared first where that was asked for.

    The annotations of these `splits` are read, and their images looked for, at once: whatever is missing is told before
    minutes of work.
    """
    towers = with_trunk(cfg.towers, cfg.trunk, cfg.data.image_size, Path(cfg.data.cache_dir), device)
    corpus = Corpus(cfg.data, towers, device)
    for split in splits:
        corpus[split]
    return corpus


def judged_loss(cfg: LossConfig) -> LossFn:
    """The loss of the networks that judge: the true scale 1/temperature, whatever the students had."""
    return lambda u, v, similarity: contrastive_loss(u @ v.T / cfg.temperature, similarity, cfg.loss_type)


def _meta(cfg: Distill, corpus: Corpus) -> dict[str, object]:
    """What a distilled file notes, so that it evaluates the same tomorrow and elsewhere."""
    return {
        "format": FORMAT,
        "config": flat(cfg),
        "mean": corpus.data.mean.flatten().tolist(),
        "std": corpus.data.std.flatten().tolist(),
        "text_fingerprint": corpus.text_fingerprint,
    }


def _check_fit(path: Path, pairs: PairSet, meta: dict, cfg: Eval, corpus: Corpus) -> None:
    size, width = pairs.images.shape[-1], pairs.texts.shape[1]
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


def _joint_features(corpus: Corpus, towers: Towers, experts: Trajectories) -> Tensor:
    """(I, 2E): image and first caption of every training image, as the first expert embeds them at its end."""
    towers.load(experts.read(0, experts.epochs(0)[-1]))
    towers.eval()
    train, rows = corpus["train"], []
    with torch.no_grad():
        for images in torch.arange(train.num_images).split(128):
            first = torch.tensor([train.captions_of[image][0] for image in images.tolist()])
            u = towers.embed_images(train.eval_images(images))
            rows.append(torch.cat([u, towers.embed_texts(corpus.texts("train", first))], dim=1))
    return torch.cat(rows)


def _home(cfg: Buffer | Distill | Eval) -> Path:
    return Path("runs") / cfg.method / (cfg.run.name or cfg.data.dataset)


def _leaf(cfg: Buffer | Distill) -> Path:
    """Where trajectories lie below `buffer_path`, as published."""
    return Path(cfg.data.dataset) / _slug(cfg.towers.image_encoder) / _slug(cfg.towers.text_encoder)


def _slug(encoder: str) -> str:
    """An encoder's name as one path part; it may be a hub id or a folder."""
    return encoder.strip("/").replace("/", "_")
