"""MTT: Dataset Distillation by Matching Training Trajectories (Cazenavette et al., CVPR 2022, arXiv 2203.11932).

Learn a few images of each class so that a network trained on them alone classifies real images well.

Experts   Train K networks on the real images with plain SGD and keep their weights after every epoch: θ*_0, θ*_1, …
Student   Start from θ*_t of a random expert, t < max_start_epoch; take `syn_steps` steps of SGD on the learned images X
              θ ← θ − α ∂ℓ/∂θ,   ℓ = CE(f(A(X_b); θ), y_b)
          with a differentiable augmentation A (DSA, data/dsa.py) and a learned rate α.
Match     After them the student should stand where the expert stood `expert_epochs` later:
              L = ‖θ_N − θ*_t+M‖² / ‖θ*_t − θ*_t+M‖²
          Its gradient goes back through all steps to the pixels and to α.
Textures  (`--texture`) X are canvases that go on at their opposite edges; each step sees random windows of them.

What later papers add, each an option:
  FTD    `buffer.py --rho_max 0.01 --alpha 0.3`   experts by GSAM, whose way is flat;  `--ema_decay` averages the images
  TESLA  `--mode detached`, `--labels teacher`    an approximate gradient; labels from the segment's target
  DATM   `--labels learned`, `--min_start_epoch`, `--Sequential_Generation`, `--threshold`, `--pix_init
         samples_predicted_correctly`             learned labels, and a window of start epochs that widens

Where the released code differs from the paper or cannot be: its `--res` was ignored, its remainder of experts lost, its
texture command crashed (canvases start as noise here), and it chose and reported on the test set (`--select test`);
here a share of the training images is held out, never trained on, and chooses (`--holdout`, `--select val`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch.nn.functional as F
from torch import Generator, Tensor

from data import build_images
from data.images import ImageData
from data.zca import ANEW
from methods.core.classification import AccuracyJudge, RealSet, accuracy
from methods.core.compiled import Kernels, Parts
from methods.core.experts import ClassExpertConfig, train_class_experts
from methods.core.gallery import Gallery, KeepConfig
from methods.core.image_protocols import pool
from methods.core.inner import Draw, InnerSGD, Params
from methods.core.matching import MatchConfig, match
from methods.core.outer import OuterConfig, outer_loop
from methods.core.precision import Speed, SpeedConfig, numbers
from methods.core.published import export_published
from methods.core.replay import Replay, ReplayConfig
from methods.core.segments import Segments
from methods.core.store import TrajectoryStore
from methods.core.training import partition
from methods.core.trajectories import (
    Place,
    Segment,
    Trajectories,
    check_trajectories,
    draw_place,
    trajectories_digest,
)
from methods.image_experts import (
    WHITENING,
    Finished,
    check_same_data,
    leaf,
    open_experts,
    whitening,
    without_graph,
)
from methods.image_files import FORMAT
from methods.image_gallery import MANY, image_gallery
from methods.image_judging import Eval, ImageCommand, JudgeConfig, evaluate, fresh_network, home, recorded
from methods.images import SyntheticConfig, SyntheticImages, start_images
from networks import has_batch_norm
from networks.flat import FlatModule
from networks.layers import wide
from utils.config import flat, option, section
from utils.errors import UserError
from utils.ranks import one_process, open_ranks
from utils.rng import derive_seed, generator
from utils.run import Run, RunConfig, pick_device, read_log


@dataclass(frozen=True)
class RealConfig:
    """How the experts meet the real images."""

    buffer_path: str = option("", "folder of the trajectories (empty: runs/mtt/<name>/buffers)", free=True)
    lr_teacher: float = option(0.01, "rate of the experts", above=0)
    batch_size_test: int = option(512, "images a batch when scoring", low=1, free=True)
    export: str = option("", "write a finished buffer in the published layout to this folder, and stop", free=True)
    save_interval: int = option(10, "experts in a file of --export", low=1, free=True)


@dataclass(frozen=True)
class ClassMatchConfig(MatchConfig):
    """The inner loop, and the segments that it has to follow."""

    syn_steps: int = option(20, "inner steps N on the learned images", low=1)
    expert_epochs: int = option(3, "epochs M of the expert that they stand for", low=1)
    max_start_epoch: int = option(25, "start epochs are below this", low=1)
    min_start_epoch: int = option(0, "and not below this", low=0)
    Sequential_Generation: bool = option(False, "let the last start epoch grow from --current_max_start_epoch (DATM)")
    current_max_start_epoch: int = option(
        0, "start epochs are below this at first, with --Sequential_Generation", low=0
    )
    expansion_end_epoch: int = option(0, "outer step at which they reach --max_start_epoch", low=0)
    load_all: bool = option(False, "keep all trajectories in memory", free=True)

    def check(self) -> None:
        first = self.current_max_start_epoch if self.Sequential_Generation else self.max_start_epoch
        if not self.min_start_epoch < first <= self.max_start_epoch:
            raise UserError(
                f"start epochs from {self.min_start_epoch} to below {first} (in the end {self.max_start_epoch}): "
                "they must be at least one, and not grow fewer"
            )
        if first < self.max_start_epoch and not self.expansion_end_epoch:
            raise UserError(
                "--Sequential_Generation with --expansion_end_epoch 0 has grown before it begins: give the step at "
                f"which start epochs reach {self.max_start_epoch}, or leave both out"
            )

    def idle(self) -> dict[str, str]:
        growing = ("current_max_start_epoch", "expansion_end_epoch")
        return {} if self.Sequential_Generation else dict.fromkeys(growing, "--Sequential_Generation")

    def starts_below(self, step: int) -> int:
        """The bound of start epochs at an outer step."""
        if not self.Sequential_Generation or step >= self.expansion_end_epoch:
            return self.max_start_epoch
        first = self.current_max_start_epoch
        return min(self.max_start_epoch, first + int((self.max_start_epoch - first) * step / self.expansion_end_epoch))


@dataclass(frozen=True)
class ClassOuterConfig(OuterConfig):
    """How long the outer loop runs and how often it looks up."""

    iterations: int = option(5000, "outer steps", aliases=("Iteration",), low=0, free=True)


@dataclass(frozen=True)
class ShowConfig(KeepConfig):
    """What a distillation leaves behind, and where."""

    save_dir: str = option("", "run folder (empty: runs/mtt/<name>)", aliases=("log_dir",), free=True)
    select: str = option(
        "val",
        "which step is distilled_best.pt: best on val, on test (as released), or last",
        choices=("val", "test", "last"),
    )
    draw: bool = option(True, "write picture grids at each evaluation (fewer than 50 images a class)", free=True)
    force_save: bool = option(False, "write them for 50 and more too", free=True)


@dataclass(frozen=True)
class Buffer(ImageCommand):
    """Train experts on labelled images and keep their weights, epoch by epoch."""

    run: RunConfig = section(RunConfig)
    expert: ClassExpertConfig = section(ClassExpertConfig)
    speed: SpeedConfig = section(SpeedConfig)
    real: RealConfig = section(RealConfig)

    def check(self) -> None:
        if self.speed.channels_last and self.expert.together > 1:
            raise UserError("--channels_last is for experts one by one; leave it out, or --together")


@dataclass(frozen=True)
class Distill(ImageCommand):
    """Learn a few images of each class whose training follows the experts."""

    run: RunConfig = section(RunConfig)
    match: ClassMatchConfig = section(ClassMatchConfig)
    replay: ReplayConfig = section(ReplayConfig)
    speed: SpeedConfig = section(SpeedConfig)
    images: SyntheticConfig = section(SyntheticConfig)
    outer: ClassOuterConfig = section(ClassOuterConfig)
    judge: JudgeConfig = section(JudgeConfig)
    show: ShowConfig = section(ShowConfig)

    def check(self) -> None:
        if self.images.texture and self.data.zca:
            raise UserError(
                "--zca mixes all pixels of an image, and windows of a canvas have no fixed ones; leave one out"
            )
        if self.show.select == "val" and not self.data.holdout and self.outer.eval_it:
            raise UserError(
                "--select val needs held-out images; give --holdout 0.1, or --select test (as released) or last"
            )

    def idle(self) -> dict[str, str]:
        return self.replay.idle_with(self.match.mode)

    @property
    def split(self) -> str:
        """What the set is judged on while it is learned."""
        return "val" if self.data.holdout and self.show.select != "test" else "test"


__all__ = ["CONFIGS", "buffer", "distill", "evaluate", "recorded"]  # the verbs; image_judging.py has the last two

CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}
SHARED = ("buffer", "distill", "eval")  # verbs that several processes may share


@numbers("float32")
def buffer(cfg: Buffer) -> None:
    """Train the experts; their weights after every epoch go to `<buffer_path>/<dataset>/<model>/`. Under torchrun the
    processes train different ones."""
    folder = Path(cfg.real.buffer_path or home(cfg) / "buffers") / leaf(cfg)
    if cfg.real.export:
        one_process("buffer.py --export")
        count = export_published(TrajectoryStore.open(folder), Path(cfg.real.export), cfg.real.save_interval)
        print(f"{count} experts written to {cfg.real.export}")
        return
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _train(cfg, Run(folder, cfg, "buffer", "--buffer_path", ranks))


def _train(cfg: Buffer, run: Run) -> None:
    speed = cfg.speed.on(run.device)
    with run.ranks.in_turn():
        data = build_images(cfg.data, run.device, whitening(cfg, run.folder, ANEW))
        data.decode("train")  # photographs: a damaged one is told before there is anything to resume
        fingerprint, zca = data.fingerprint(), data.zca
    run.check_same(fingerprint)
    net = fresh_network(cfg.net.model, data, run.seed)
    cfg.speed.lay_out(net, cfg.net.model)
    shapes = {"net": FlatModule(net).shapes}
    real, silent = RealSet(data["train"], cfg.real.lr_teacher, cfg.net.augment()), not run.ranks.first
    store = TrajectoryStore.begin(run.folder, shapes, cfg.expert.store_dtype, flat(cfg), run.resumed, silent)

    def batches(expert: int, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        rng = generator(run.seed, "expert", expert, "epoch", epoch)
        for rows in partition(len(real), cfg.expert.batch_size_train, rng):
            yield real.batch(rows, rng)

    @numbers("float32")
    def score(logits: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return {"acc": accuracy(logits, data["val"], cfg.real.batch_size_test)} if cfg.data.holdout else {}

    run.pin(training_set=fingerprint)
    if zca is not None and run.ranks.first and not (run.folder / WHITENING).exists():
        zca.save(run.folder / WHITENING)
    with speed.numbers():
        train_class_experts(net, batches, score, store, cfg.expert, cfg.real.lr_teacher, run, speed.forward)
    print(f"{store.count} experts in {run.folder}")


@numbers("float32")
def distill(cfg: Distill) -> None:
    """Learn the images; `distilled_<step>.pt` at every evaluation, `distilled_best.pt` by validation accuracy.

    Under torchrun the processes share the segments of each step, and the networks that judge.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        run = Run(cfg.show.save_dir or home(cfg), cfg, "distill", "--save_dir", ranks)
        speed = cfg.speed.on(run.device)
        root = cfg.match.buffer_path or home(cfg) / "buffers"
        with ranks.in_turn():
            experts = open_experts(root, cfg, cfg.match.max_files, cfg.match.max_experts)
            data = build_images(cfg.data, run.device, whitening(cfg, experts.folder))
            net = FlatModule(fresh_network(cfg.net.model, data, run.seed))
            cfg.speed.lay_out(net.net, cfg.net.model)
            _check_experts(experts, cfg, data, net)
            names = _judges(cfg, data)
            images = _start(cfg, run, data, Finished(experts, net, run.device))
            data.decode(*("train", cfg.split) if ranks.world > 1 else ())
        segments = _segments(cfg, run, experts)
        gallery = _gallery(cfg, run, data, images, experts, segments.count)
        judge = AccuracyJudge(data, cfg.judge, derive_seed(run.seed, "judge"), ranks)

        def evaluate_step(step: int) -> float:
            known = images.image_set(judge.augment(cfg.net.augment()))
            what = {name: f"step {step}, {name}," for name in names}
            reports = {name: judge.sets(lambda number: known, name, cfg.split, label) for name, label in what.items()}
            first = reports[names[0]]
            first.metrics |= {f"acc/{name}": report.metrics["acc"] for name, report in list(reports.items())[1:]}
            gallery.scored(step, first, cfg.split)
            return float(step) if cfg.show.select == "last" else first.mean_std()["acc"][0]

        run.pin(training_set=data.fingerprint(), expert_set=trajectories_digest(experts))
        outer_step, plan = _outer_step(cfg, run, speed, segments, net, images), cfg.outer.plan(segments.count)
        outer_loop(outer_step, images, plan, run, evaluate_step, gallery.keep)
        if skipped := sum("skipped" in row for row in read_log(run.folder)):
            print(f"{skipped} of {cfg.outer.iterations} steps ended above --threshold and changed nothing")
        what = "textures" if cfg.images.texture else "images"
        print(f"{len(images.images)} {what} in {run.folder}/distilled_best.pt; look at {run.folder}/report.html")


def _start(cfg: Distill, run: Run, data: ImageData, finished: Finished) -> SyntheticImages:
    """The images before any step."""
    if cfg.images.texture and not cfg.images.pix_init:
        print("note: canvases start as noise; --pix_init real lays them out of real images")
    augment = cfg.net.augment() if cfg.net.dsa else None
    return start_images(data, cfg.images, run.rng("init"), augment, finished)


def _segments(cfg: Distill, run: Run, experts: Trajectories) -> Segments:
    """What each step follows."""

    def place(step: int, rng: Generator) -> Place:
        below, first = cfg.match.starts_below(step), cfg.match.min_start_epoch
        return draw_place(experts, rng, below, cfg.match.expert_epochs, first)

    segments = Segments(run, cfg.match.segments, place)
    if segments.count > 1 and cfg.images.label_kind == "teacher":
        raise UserError(
            f"--labels teacher takes the labels of each step from its one segment, and there are {segments.count}; "
            "give --segments 1, or --labels hard or learned"
        )
    return segments


def _outer_step(
    cfg: Distill, run: Run, speed: Speed, segments: Segments, net: FlatModule, images: SyntheticImages
) -> Callable[[int], dict[str, float]]:
    def loss(params: Params, pixels: Tensor, labels: Tensor) -> Tensor:
        with speed.forward():
            logits = net(params["net"], pixels)
        return F.cross_entropy(wide(logits), labels)

    step_loss = Parts(images.batch, Kernels(loss))
    replay = Replay(cfg.replay, cfg.match.mode, run.device)
    if cfg.outer.iterations:
        net.net.train()
        rehearsed = images.draws(Generator().manual_seed(0), cfg.match.syn_steps)
        loop = step_loss, {"net": net.flatten()}, rehearsed, InnerSGD(images.lr), images.leaves
        with speed.numbers():
            print(replay.plan(*loop, cfg.outer.iterations, loops=segments.own))

    def follow(segment: Segment, draws: Sequence[Draw]) -> dict[str, float]:
        if cfg.images.label_kind == "teacher":
            images.relabel(without_graph(net, segment.target["net"], images.images).softmax(1))
        net.net.train()
        with speed.numbers():
            return match(step_loss, images, segment, draws, cfg.match.mode, replay=replay)

    def draws() -> list[Draw]:
        return images.draws(run.rng("draws"), cfg.match.syn_steps)

    return lambda step: segments.follow(step, images.leaves, draws, follow)


def _gallery(
    cfg: Distill, run: Run, data: ImageData, images: SyntheticImages, experts: Trajectories, segments: int
) -> Gallery:
    def zca() -> dict[str, object]:
        return {} if data.zca is None else {"zca": data.zca.state()}

    few = cfg.images.ipc < MANY or cfg.show.force_save
    meta = _meta(cfg, data, experts, segments)
    return image_gallery(run, data, images.state_dict, meta, cfg.show.draw and few, zca, cfg.show.keep)


def _judges(cfg: Distill, data: ImageData) -> list[str]:
    """The networks that judge; UserError, before anything is trained, where one does not take these images."""
    names = pool(cfg.judge.eval_mode, cfg.net.model)
    for name in names if cfg.outer.eval_it else ():
        fresh_network(name, data, 0)
    return names


def _check_experts(experts: Trajectories, cfg: Distill, data: ImageData, flat_net: FlatModule) -> None:
    """UserError unless the trajectories are of this network on this data, and long enough."""
    check_same_data(experts, cfg, data)
    for name in ("dsa", "dsa_strategy") if isinstance(experts, TrajectoryStore) else ():
        was = experts.config.get(name, getattr(cfg.net, name))
        if was != getattr(cfg.net, name):
            print(f"note: the experts had --{name} {was}, not {getattr(cfg.net, name)}: students see images otherwise")
    if has_batch_norm(flat_net.net):
        print(f"note: {cfg.net.model} has batch norm, whose running statistics are no part of a trajectory")
    span = cfg.match.max_start_epoch, cfg.match.expert_epochs, cfg.match.min_start_epoch
    check_trajectories(experts, {"net": flat_net.shapes}, *span)
    if cfg.match.load_all:
        experts.preload()


def _meta(cfg: Distill, data: ImageData, experts: Trajectories, segments: int) -> dict[str, object]:
    """What a distilled file notes, so that it evaluates the same tomorrow and elsewhere."""
    return {
        "format": FORMAT,
        "config": flat(cfg) | {"segments": segments},
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "zca": None if data.zca is None else data.zca.digest,
        "labels": cfg.images.label_kind,
        "experts": experts.config if isinstance(experts, TrajectoryStore) else None,  # published ones note nothing
    }
