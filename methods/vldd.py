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
  `--text_dropout`              each batch's captions go through the frozen text encoder with its own dropout on, while
                                experts train; by default embeddings are computed once, without
Ours alone: pairs are selected on validation, where the reference selects and reports on the test set.

Later papers in the same frame, each by options of its own that go with all others:
  LoRS        `--sim_type lowrank --loss_type WBCE --mini_batches consecutive` learns which image belongs to which text
              (lors.py); `--merge_loss_branches` weighs the branches by the way that the expert went; `--mode detached`
              is its gradient
  AMD         `--independent_starts`: θ_img and θ_txt begin at epochs drawn apart; `--pair_init kmeans`
  PTM-ST      `--num_pairs 60 40 --max_start_epoch 2 3`: phases; `--shortcut 5 7`: straight ways (core/shortcut.py);
              `--ema_decay 0.99`: the average of the set
  RepBlend    `--image_trainable false --image_projection`: two heads on frozen trunks are all that is matched, so that
              images are encoded once an outer step; `--blend 1`: their features and the embeddings are mixed
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Generator, Tensor

from methods.core.compiled import Batch, Kernels, Parts
from methods.core.experts import ExpertConfig, ExpertTask, train_experts
from methods.core.gallery import KeepConfig
from methods.core.inner import Draw, InnerSGD, Params
from methods.core.matching import MatchConfig, match, on_host
from methods.core.outer import OuterConfig, outer_loop
from methods.core.precision import Speed, SpeedConfig, numbers
from methods.core.published import export_published
from methods.core.replay import Replay, ReplayConfig
from methods.core.retrieval import Corpus, Judge, JudgeConfig
from methods.core.segments import Segments
from methods.core.shortcut import Shortcut
from methods.core.store import TrajectoryStore
from methods.core.trajectories import (
    Place,
    Segment,
    Trajectories,
    check_trajectories,
    draw_place,
    trajectories_digest,
)
from methods.lors import BOUNDED, LossConfig, contrastive_loss, judged_loss
from methods.pair_blending import Blending, blending
from methods.pair_coresets import joint_features
from methods.pair_experts import inputs, leaf, open_experts
from methods.pair_files import FORMAT
from methods.pair_gallery import pair_gallery
from methods.pair_judging import Eval, PairCommand, evaluate, home, open_corpus, recorded
from methods.pairs import PairsConfig, Phase, SyntheticPairs, start_pairs
from networks.text import LSA
from networks.towers import Towers
from utils.config import flat, option, section
from utils.errors import UserError
from utils.files import file_digest
from utils.ranks import one_process, open_ranks
from utils.rng import derive_seed, generator
from utils.run import Run, RunConfig, pick_device, read_log

EPOCHS = ("all", "one")
BATCHES = ("random", "consecutive")


@dataclass(frozen=True)
class StudentLossConfig(LossConfig):
    """The contrastive loss, and how students see it."""

    student_logit_scale: str = option(
        "exp", "exp: 1/temperature; log: ln(1/temperature), as released", choices=("exp", "log")
    )


@dataclass(frozen=True)
class RealConfig:
    """How the experts meet the real pairs."""

    buffer_path: str = option("", "folder of the trajectories (empty: runs/vldd/<name>/buffers)", free=True)
    lr_teacher_img: float = option(0.1, "rate of the image tower", above=0)
    lr_teacher_txt: float = option(0.1, "rate of the text head", above=0)
    expert_captions: str = option("all", "an epoch: every caption, or every image with one of its", choices=EPOCHS)
    text_dropout: bool = option(
        False, "embed captions anew in each batch, the frozen text encoder's own dropout on, as released"
    )
    temperature: float = option(0.07, "cosines are divided by it, as in CLIP", above=0)
    batch_size_test: int = option(128, "images a batch when scoring", low=1, free=True)
    export: str = option("", "write a finished buffer in the published layout to this folder, and stop", free=True)


@dataclass(frozen=True)
class PairMatchConfig(MatchConfig):
    """The inner loop on pairs, and the segment that it has to follow."""

    mini_batch_size: int = option(100, "learned pairs an inner step (more than there are: all)", low=1)
    mini_batches: str = option(
        "random", "pairs of each step: random ones, or consecutive slices of one order (LoRS)", choices=BATCHES
    )
    max_start_epoch: tuple[int, ...] = option((2,), "start epochs are below this (several: of each phase)", low=1)
    min_start_epoch: tuple[int, ...] = option((0,), "and not below this (several: of each phase)", low=0)
    shortcut: tuple[int, ...] = option(
        (), "straight ways from epoch 0 to this one in place of the experts' own (several: of each phase)", low=1
    )
    independent_starts: bool = option(False, "the two branches draw their start epochs apart (AMD)")
    merge_loss_branches: bool = option(False, "one gap of both branches together (LoRS on COCO)")
    blend: float = option(
        0.0, "mix features with weights from Beta(blend, blend) (RepBlend: 1; 0: do not)", aliases=("alpha_2",), low=0
    )

    def span(self, phase: int) -> tuple[int, int, int | None]:
        """max_start_epoch, min_start_epoch and shortcut (None: the experts' own way) of a phase."""
        values = (self.max_start_epoch, self.min_start_epoch, self.shortcut or (None,))
        return tuple(own[min(phase, len(own) - 1)] for own in values)


@dataclass(frozen=True)
class ShowConfig(KeepConfig):
    """What a distillation leaves behind, and where."""

    save_dir: str = option("", "run folder (empty: runs/vldd/<name>)", free=True)
    draw: bool = option(True, "write picture grids and nearest captions at each evaluation", free=True)


@dataclass(frozen=True)
class Buffer(PairCommand):
    """Train experts on captioned images and keep their weights, epoch by epoch."""

    run: RunConfig = section(RunConfig)
    expert: ExpertConfig = section(ExpertConfig)
    speed: SpeedConfig = section(SpeedConfig)
    real: RealConfig = section(RealConfig)

    def check(self) -> None:
        if not self.real.text_dropout:
            return
        if self.towers.text_encoder.lower() in LSA:
            raise UserError(f"--text_encoder {self.towers.text_encoder} has no dropout; leave out --text_dropout")
        if self.towers.text_cache:
            raise UserError("--text_dropout embeds captions anew, and --text_cache has them ready; leave out one")


@dataclass(frozen=True)
class Distill(PairCommand):
    """Learn a few image–text pairs whose training follows the experts."""

    run: RunConfig = section(RunConfig)
    loss: StudentLossConfig = section(StudentLossConfig)
    match: PairMatchConfig = section(PairMatchConfig)
    replay: ReplayConfig = section(ReplayConfig)
    speed: SpeedConfig = section(SpeedConfig)
    pairs: PairsConfig = section(PairsConfig)
    outer: OuterConfig = section(OuterConfig)
    judge: JudgeConfig = section(JudgeConfig)
    show: ShowConfig = section(ShowConfig)

    def check(self) -> None:
        phases = len(self.pairs.num_pairs)
        for name in ("max_start_epoch", "min_start_epoch", "shortcut"):
            if not (given := getattr(self.match, name)) and name != "shortcut":
                raise UserError(f"--{name} names no number; give one, or one for each phase")
            if len(given) > 1 and len(given) != phases:
                raise UserError(
                    f"--{name} has {len(given)} numbers, --num_pairs {phases}: give one for each phase, or one for all"
                )
        if self.loss.loss_type in BOUNDED and self.pairs.sim_type != "identity" and not self.loss.clamp_similarity:
            raise UserError(
                f"--loss_type {self.loss.loss_type} needs targets in [0, 1], which a learned similarity leaves: give "
                "--clamp_similarity, or --loss_type WBCE, which takes any"
            )

    def idle(self) -> dict[str, str]:
        found = {} if self.pairs.sim_type != "identity" else {"clamp_similarity": "--sim_type full or lowrank"}
        return found | self.replay.idle_with(self.match.mode)


__all__ = ["CONFIGS", "buffer", "distill", "evaluate", "recorded"]  # the verbs; pair_judging.py has the last two

CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}
SHARED = ("buffer", "distill", "eval")  # verbs that several processes may share


@numbers("float32")
def buffer(cfg: Buffer) -> None:
    """Train the experts; their weights after every epoch go to `<buffer_path>/<dataset>/<image>/<text>/`. Under
    torchrun the processes train different ones."""
    folder = Path(cfg.real.buffer_path or home(cfg) / "buffers") / leaf(cfg)
    if cfg.real.export:
        one_process("buffer.py --export")
        count = export_published(TrajectoryStore.open(folder), Path(cfg.real.export))
        print(f"{count} experts written to {cfg.real.export}")
        return
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _train(cfg, Run(folder, cfg, "buffer", "--buffer_path", ranks))


def _train(cfg: Buffer, run: Run) -> None:
    speed = cfg.speed.on(run.device)
    scored = ["val"] if cfg.expert.eval_freq else []
    with run.ranks.in_turn():
        corpus = open_corpus(cfg, run.device, "train", *scored)
        towers = corpus.towers(cfg.data.image_size, derive_seed(run.seed, "towers"))
        cfg.speed.lay_out(towers.image.trunk, cfg.towers.image_encoder)
        found = inputs(cfg, corpus, towers)
        if cfg.real.text_dropout:
            corpus.check_dropout()
    run.check_same(found)
    shapes = {group: part.shapes for group, part in towers.flat.items()}
    silent = not run.ranks.first
    store = TrajectoryStore.begin(run.folder, shapes, cfg.expert.store_dtype, flat(cfg), run.resumed, silent)

    def loss_fn(batch: tuple[Tensor, Tensor, None]) -> Tensor:
        images, texts, _ = batch
        with speed.forward():
            u, v = towers.embed_images(images), towers.embed_texts(texts)
        return contrastive_loss(u @ v.T / cfg.real.temperature)

    def batches(expert: int, epoch: int) -> Iterable[tuple[Tensor, Tensor, None]]:
        chance = "expert", expert, "epoch", epoch
        dropout = derive_seed(run.seed, *chance, "text") if cfg.real.text_dropout else None
        rng = generator(run.seed, *chance)
        return corpus.epoch(cfg.expert.batch_size_train, rng, cfg.real.expert_captions, dropout)

    @numbers("float32")
    def score() -> dict[str, float]:
        return corpus.recall(towers, "val", cfg.real.batch_size_test)

    def prepare() -> None:
        if cfg.real.text_dropout:
            corpus["train"].decode(training=True)
        else:
            corpus.ready("train", training=True)
        corpus.ready(*scored)

    task = ExpertTask(
        net=towers,
        flat=towers.flat,
        renew=towers.renew,
        batches=batches,
        loss_fn=loss_fn,
        score=score,
        prepare=prepare,
    )
    rates = {"img": cfg.real.lr_teacher_img, "txt": cfg.real.lr_teacher_txt}
    run.pin(**found)
    with speed.numbers():
        train_experts(task, store, cfg.expert, rates, run)
    print(f"{store.count} experts in {run.folder}")


@numbers("float32")
def distill(cfg: Distill) -> None:
    """Learn the pairs; `distilled_<step>.pt` at every evaluation, `distilled_best.pt` by validation recall.

    Under torchrun the processes share the segments of each step, and the networks that judge.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        run = Run(cfg.show.save_dir or home(cfg), cfg, "distill", "--save_dir", ranks)
        speed = cfg.speed.on(run.device)
        root, limits = cfg.match.buffer_path or home(cfg) / "buffers", (cfg.match.max_files, cfg.match.max_experts)
        judged = ["val"] if cfg.outer.eval_it else []
        with ranks.in_turn():
            corpus = open_corpus(cfg, run.device, "train", *judged)
            towers = corpus.towers(cfg.data.image_size, derive_seed(run.seed, "towers"))
            cfg.speed.lay_out(towers.image.trunk, cfg.towers.image_encoder)
            experts = open_experts(root, cfg, corpus, towers, *limits)
            ways = _ways(cfg, experts, towers)
            pairs = _start(cfg, run, corpus, towers, experts)
            corpus.ready(*judged if ranks.world > 1 else ())
        segments = Segments(run, cfg.match.segments, functools.partial(_place, cfg, ways))
        seed = derive_seed(run.seed, "judge")
        judge = Judge(corpus, cfg.judge, cfg.data.image_size, judged_loss(cfg.loss), seed, ranks)
        shown = cfg.show.draw, cfg.show.keep
        gallery = pair_gallery(run, corpus, pairs.published, _meta(cfg, corpus, segments.count), *shown)

        def evaluate_step(step: int) -> float:
            sets = pairs.pair_sets()
            report = judge.pairs(lambda network: sets, "val", f"step {step},")
            gallery.scored(step, report)
            return report.mean_std()["r_mean"][0]

        begun = file_digest(cfg.pairs.resume_from) if cfg.pairs.resume_from else None
        run.pin(**inputs(cfg, corpus, towers), expert_set=trajectories_digest(experts), begun_with=begun)
        outer_step, plan = _outer_step(cfg, run, speed, segments, towers, pairs), cfg.outer.plan(segments.count)
        outer_loop(outer_step, pairs, plan, run, evaluate_step, gallery.keep)
        if skipped := sum("skipped" in row for row in read_log(run.folder)):
            print(f"{skipped} of {cfg.outer.iterations} steps ended above --threshold and changed nothing")
        print(f"{cfg.pairs.total} pairs in {run.folder}/distilled_best.pt; look at {run.folder}/report.html")


def _start(cfg: Distill, run: Run, corpus: Corpus, towers: Towers, experts: Trajectories) -> SyntheticPairs:
    """The pairs before any step."""
    return start_pairs(
        corpus,
        cfg.pairs,
        cfg.data.image_size,
        run.rng("init"),
        lambda: joint_features(corpus, towers, experts),
        cfg.loss.clamp_similarity,
    )


def _place(cfg: Distill, ways: Sequence[Trajectories], step: int, rng: Generator) -> Place:
    """What a step follows: phases share nothing, so they may take turns."""
    number = step % len(ways)
    below, first, _ = cfg.match.span(number)
    return draw_place(ways[number], rng, below, cfg.match.expert_epochs, first, cfg.match.independent_starts)


def _outer_step(
    cfg: Distill, run: Run, speed: Speed, segments: Segments, towers: Towers, pairs: SyntheticPairs
) -> Callable[[int], dict[str, float]]:
    scale = 1 / cfg.loss.temperature
    if cfg.loss.student_logit_scale == "log":
        scale = math.log(scale)

    def batch(phase: Phase, draw: Draw) -> Batch:
        found, blend = phase.batch(draw), blending(draw, cfg.match.blend)
        return found.images, found.texts, found.similarity, *((blend.shares, blend.order) if blend else ())

    def loss(params: Params, images: Tensor, texts: Tensor, similarity: Tensor | None, *mixed: Tensor) -> Tensor:
        blend = Blending(*mixed) if mixed else None
        with speed.forward():
            u, v = towers.functional(params, images, texts, blend)  # (B, E) each, of length one
        return contrastive_loss(scale * u @ v.T, similarity, cfg.loss.loss_type)

    kernels = Kernels(loss)

    def step_loss(phase: Phase) -> Parts:
        return Parts(functools.partial(batch, phase), kernels)

    replay = Replay(cfg.replay, cfg.match.mode, run.device)
    if cfg.outer.iterations:
        phase = max(pairs.phases, key=len)
        draws = phase.draws(Generator().manual_seed(0), cfg.match.syn_steps, cfg.match.mini_batch_size)
        towers.train()
        with speed.numbers(), phase.encoded(towers, draws, speed.forward):
            loop = step_loss(phase), towers.flatten(), draws, InnerSGD(phase.lr), phase.leaves
            print(replay.plan(*loop, cfg.outer.iterations, loops=segments.own))

    def follow(phase: Phase, segment: Segment, draws: Sequence[Draw]) -> dict[str, float]:
        towers.train()
        with speed.numbers(), phase.encoded(towers, draws, speed.forward):
            how = cfg.match.mode, cfg.match.merge_loss_branches, replay
            found = match(step_loss(phase), phase, segment, draws, *how)
        return found | on_host(phase.similarity.bounds())

    def outer_step(step: int) -> dict[str, float]:
        phase = pairs.phases[step % len(pairs.phases)]
        consecutive = cfg.match.mini_batches == "consecutive"
        drawn = (run.rng("draws"), cfg.match.syn_steps, cfg.match.mini_batch_size, consecutive)
        return segments.follow(step, pairs.leaves, lambda: phase.draws(*drawn), functools.partial(follow, phase))

    return outer_step


def _ways(cfg: Distill, experts: Trajectories, towers: Towers) -> list[Trajectories]:
    """What each phase follows: the experts' own ways, or straight ones."""
    wanted, ways = {group: part.shapes for group, part in towers.flat.items()}, []
    straight = functools.cache(functools.partial(Shortcut, experts))  # an expert is measured once for all phases
    for number in range(len(cfg.pairs.num_pairs)):
        below, first, last = cfg.match.span(number)
        ways.append(experts if last is None else straight(last))
        check_trajectories(ways[number], wanted, below, cfg.match.expert_epochs, first)
    return ways


def _meta(cfg: Distill, corpus: Corpus, segments: int) -> dict[str, object]:
    """What a distilled file notes, so that it evaluates the same tomorrow and elsewhere."""
    return {
        "format": FORMAT,
        "config": flat(cfg) | {"segments": segments},
        "mean": corpus.data.mean.flatten().tolist(),
        "std": corpus.data.std.flatten().tolist(),
        "text_fingerprint": corpus.text_fingerprint,
    }
