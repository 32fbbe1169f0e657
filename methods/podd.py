"""PoDD: Distilling Datasets Into Less Than One Image (Shul, Horwitz and Hoshen, TMLR 2025, arXiv 2403.12040).

Learn one poster P (C, H, W) for a whole data set. Networks train on its patches, S x S crops at a fixed grid; classes
share pixels where patches overlap, so that fewer pixels than one image a class will do.

Order     Classes lie on a grid, alike beside alike (PoCO, poster_order.py): by the distances of their names' features.
Labels    A patch is labelled by the areas that classes own, or by a map A learned beside the poster (PoDDL,
          poster_labels.py).
Learn     RaT-BPTT (Feng et al., ICLR 2024). A fresh network θ_0 trains on patches with Adam, s steps without a graph:
              θ_{t+1} = Adam(θ_t, ∂ℓ/∂θ),   ℓ = CE(f(A(P_b); θ), y_b)
          and M = `window` steps more, through which the loss on a batch of real images is differentiated:
              L = CE(f(A(X); θ_{s+M}), Y)
          s is drawn anew each epoch (`--cctype 2`; poster_window.py has the other kinds). Its gradient is cut at twice
          a running mean of its norm; outer Adam moves the poster, the label map and, with `--train_lr`, the inner rate.

The window is replayed backwards, one step's graph at a time (`--mode exact`); `--mode unroll` keeps all graphs, as
released. Both gradients are the same up to rounding, to which Adam's first steps are very sensitive: weights whose true
gradient is 0 move by noise. In float32 either mode is right to some percent only (tests/benchmarks/poster.py).

Where the released code differs from the paper or cannot be: its fixed labels are the class that owns most of a patch
(`--label_mode area` has the paper's shares); its label map forgets some classes (`--label_shape reference`); it saved
by the loss on training images (`--select train`), while here held-out images choose; one gradient that was not finite
ended all, while here that step changes nothing (`--patience`); it could not resume.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from data import build_images
from data.images import ImageData
from data.zca import ZCA
from methods.core.classification import fresh_stack
from methods.core.compiled import Batch, Kernels, Parts
from methods.core.gallery import KeepConfig
from methods.core.inner import Draw, Params, StepLoss, hypergradient
from methods.core.judging import check_classes, check_whitening
from methods.core.matching import on_host
from methods.core.outer import outer_loop
from methods.core.pieces import summed
from methods.core.precision import SpeedConfig, numbers
from methods.core.replay import Replay, ReplayConfig
from methods.core.segments import ONE, Share
from methods.core.stack import Stack
from methods.core.stepping import StepConfig, StepJudge
from methods.poster import Poster, PosterConfig, continue_poster, start_poster
from methods.poster_files import FORMAT, LoadedPoster, load_poster
from methods.poster_gallery import PosterGallery
from methods.poster_judging import Eval, InnerConfig, PosterCommand, at_hand, evaluate, home, recorded
from methods.poster_layout import Layout, plan
from methods.poster_order import Order, OrderConfig, class_order, load_order
from methods.poster_outer import PosterOuterConfig, RealBatches
from methods.poster_window import WindowConfig, Windows
from networks import has_batch_norm
from utils.config import flat, option, section
from utils.errors import UserError
from utils.files import digest
from utils.ranks import open_ranks
from utils.rng import derive_seed, draw_seed
from utils.run import Run, RunConfig, pick_device, read_log

WHITENING = "zca.safetensors"  # in the run folder


@dataclass(frozen=True)
class ShowConfig(KeepConfig):
    """What a distillation leaves behind, and where."""

    save_dir: str = option("", "run folder (empty: runs/podd/<name>)", aliases=("outdir",), free=True)
    select: str = option(
        "val",
        "which step is distilled_best.pt: best on val, on test, by the loss on train (as released), or last",
        choices=("val", "test", "train", "last"),
    )
    init_from: str = option(
        "",
        "start from this distilled file or published poster; a run's id is looked for in checkpoints/",
        aliases=("load_poster_run_name",),
    )
    draw: bool = option(True, "write pictures at each evaluation", free=True)

    @property
    def start(self) -> Path:
        """The file of `init_from`; where there is none, the one to name in an error."""
        named = Path(self.init_from)
        published = Path("checkpoints") / f"{self.init_from}_poster.pt"
        return named if named.exists() or (named.suffix and not published.exists()) else published


@dataclass(frozen=True)
class Buffer(PosterCommand):
    """Find out which class goes where on the poster."""

    run: RunConfig = section(RunConfig)
    order: OrderConfig = section(OrderConfig)
    buffer_path: str = option("", "folder of the order (empty: runs/podd/<name>/buffers)", free=True)


@dataclass(frozen=True)
class Distill(PosterCommand):
    """Learn one poster that trains networks as the real images do."""

    run: RunConfig = section(RunConfig)
    order: OrderConfig = section(OrderConfig)
    poster: PosterConfig = section(PosterConfig)
    inner: InnerConfig = section(InnerConfig)
    replay: ReplayConfig = section(ReplayConfig)
    speed: SpeedConfig = section(SpeedConfig)
    window: WindowConfig = section(WindowConfig)
    outer: PosterOuterConfig = section(PosterOuterConfig)
    judge: StepConfig = section(StepConfig)
    show: ShowConfig = section(ShowConfig)

    def check(self) -> None:
        if self.show.select == "val" and not self.data.holdout:
            raise UserError("--select val needs held-out images; give --holdout 0.1, or --select train (as released)")
        if self.judge.select_step == "val" and not self.data.holdout:
            raise UserError("--select_step val needs held-out images; give --holdout 0.1, or --select_step last")
        if self.window.ddtype == "curriculum" and self.window.cctype == 1 and not self.outer.test_freq:
            raise UserError("--cctype 1 moves the window by the loss of evaluations; give --test_freq, such as 10")

    def idle(self) -> dict[str, str]:
        return self.replay.idle_with(self.outer.mode)


__all__ = ["CONFIGS", "buffer", "distill", "evaluate", "recorded"]  # the verbs; poster_judging.py has the last two

CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}
SHARED = ("distill", "eval")  # verbs that several processes may share


def buffer(cfg: Buffer) -> None:
    """Write `order.json`: the grid of classes, and the encoder whose features decided it."""
    data = build_images(at_hand(cfg.data), "cpu")
    cfg.grid.check_classes(len(data.classes))
    run = Run(cfg.buffer_path or home(cfg) / "buffers", cfg, "buffer", "--buffer_path")
    order = _order(cfg, data, run)
    order.save(run.folder / "order.json", data.classes)
    print("\n".join(order.lines(data.classes)))
    print(f"{order.source} order by {order.encoder} in {run.folder}/order.json")


@numbers("float32")
def distill(cfg: Distill) -> None:
    """Learn the poster; `distilled_<step>.pt` at every evaluation, `distilled_best.pt` by validation accuracy.

    Under torchrun the processes share the fresh networks of each step, and those that judge.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _learn(cfg, Run(cfg.show.save_dir or home(cfg), cfg, "distill", "--save_dir", ranks))


def _learn(cfg: Distill, run: Run) -> None:
    speed = cfg.speed.on(run.device)
    start = load_poster(cfg.show.start) if cfg.show.init_from else None
    split = cfg.show.select if cfg.show.select != "last" else "val" if cfg.data.holdout else "test"
    with run.ranks.in_turn():
        data = build_images(at_hand(cfg.data), run.device, _whitening(run, start))
        data.decode("train", split)  # images that cannot be read are told now, not at the first evaluation
        cfg.grid.check_classes(len(data.classes))
        order = _order(cfg, data, run, start)
        layout = plan(cfg.grid, data.size, order.grid)
        stack = fresh_stack(cfg.net.name, data)
        stack.forward = speed.forward
        cfg.speed.lay_out(stack.net, cfg.net.name)
        poster = _begin(cfg, data, layout, run, start)
    print(_budget(layout, poster))
    run.pin(training_set=data.fingerprint(), class_order=digest(order.grid))
    if run.ranks.first:
        order.save(run.folder / "order.json", data.classes)
        if data.zca is not None and not (run.folder / WHITENING).exists():
            data.zca.save(run.folder / WHITENING)
    losses = {row["step"]: row[f"{split}_loss"] for row in read_log(run.folder) if f"{split}_loss" in row}
    epoch_steps = math.ceil(len(data["train"]) / cfg.outer.batch_size)
    windows = Windows(cfg.window, run.seed, epoch_steps, losses)
    real = RealBatches(data, cfg.outer, run.seed, epoch_steps)
    share = Share(run.ranks, cfg.outer.segments)
    step_poster = PosterStep(stack, poster, cfg, share)

    def outer_step(step: int) -> dict[str, float]:
        with speed.numbers():
            return step_poster(windows.at(step), *real.batch(step), run)

    judge, meta = StepJudge(data, cfg.judge, derive_seed(run.seed, "judge"), run.ranks), _meta(cfg, data, order, share)
    shown = cfg.show.draw, cfg.show.keep
    gallery = PosterGallery(run, data, poster.product, meta, layout, _zca(data), *shown)

    def evaluate_step(step: int) -> float:
        known = poster.poster_set(cfg.poster.augment())
        optimiser, batch = cfg.inner.optimiser_when_judged, poster.batch_size
        report = judge.sets(
            lambda number: known, cfg.net.name, optimiser, batch, split, f"step {step},", cfg.poster.augmentation
        )
        gallery.scored(step, report, split)
        found = {name: mean for name, (mean, _) in report.mean_std().items()}
        losses[step] = found["loss"]
        return {"last": float(step), "train": -found["loss"]}.get(cfg.show.select, found["acc"])

    outer = cfg.outer.plan(epoch_steps, windows, share.count)
    if outer.iterations:
        with speed.numbers():
            print(step_poster.plan(windows.at(0), outer.iterations))
    outer_loop(outer_step, poster, outer, run, evaluate_step, gallery.keep)
    if skipped := sum("skipped" in row for row in read_log(run.folder)):
        print(f"{skipped} outer steps had a gradient that was not finite and changed nothing")
    gallery.finish()
    print(f"the poster is in {run.folder}/distilled_best.pt; look at {run.folder}/report.html")


class PosterStep:
    """One outer step: the loss of a fresh network on real images, differentiated through a window of its training.

    share   of how many networks it is the mean, and which of them are this process's
    """

    def __init__(self, stack: Stack, poster: Poster, cfg: Distill, share: Share = ONE) -> None:
        self.share = share
        self.stack, self.poster, self.cfg, self.augment = stack, poster, cfg, cfg.poster.augment()
        self.kernels = Kernels(self.loss)
        self.replay = Replay(cfg.replay, cfg.outer.mode, poster.poster.device)

    def plan(self, window: tuple[int, int], outer_steps: int) -> str:
        """Decide how inner steps are replayed, and say what the run will take."""
        leaves, step_loss = self._loop((*self.poster.cut(), self.poster.lr))
        before, length = window
        draws = self.poster.draws(torch.Generator().manual_seed(0), before + length)
        start, inner = {"net": self.stack.draw([0])[0]}, self.cfg.inner.optimiser(leaves[2])
        return self.replay.plan(step_loss, start, draws, inner, leaves, outer_steps, length, self.share.own)

    def __call__(self, window: tuple[int, int], images: Tensor, labels: Tensor, run: Run) -> dict[str, float]:
        """Fill `.grad` of what is learned; numbers to log."""
        poster, share, (before, length) = self.poster, self.share, window
        seeds = [draw_seed(run.rng("networks")) for _ in range(share.count)]
        draws = [poster.draws(run.rng("draws"), before + length) for _ in range(share.count)]
        own = zip(seeds[share.slice], draws[share.slice], strict=True)
        numbers = share.mean(poster.leaves, (self._one(*network, length, images, labels) for network in own))
        return numbers | on_host({"grad_norm": poster.clip()}) | {"warmup": before, "window": length}

    def _one(self, seed: int, draws: Sequence[Draw], length: int, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Add the gradient by one fresh network."""
        # Patches are cut once. The inner loop's gradient is gathered on them, and then goes back to the poster at once.
        whole = (*self.poster.cut(), self.poster.lr)
        leaves, step_loss = self._loop(whole)

        def objective(final: Params) -> Tensor:
            return self.real_loss(final["net"], images, labels)

        start = {"net": self.stack.draw([seed])[0]}
        inner, engine = self.cfg.inner.optimiser(leaves[2]), self.replay.engine(step_loss)
        # Where graphs cannot be kept, not even the last one is there while the real images are.
        keep = self.replay.keep if self.replay.keep > 1 else 0
        loss = hypergradient(
            step_loss, start, draws, inner, objective, leaves, self.cfg.outer.mode, length, keep, engine
        )
        learned = [part for part in whole if part.requires_grad]
        torch.autograd.backward(learned, [leaf.grad for leaf in leaves if leaf.requires_grad])
        return on_host({"loss": loss} | ({"lr": leaves[2]} if self.cfg.poster.train_lr else {}))

    def _loop(self, whole: Sequence[Tensor]) -> tuple[list[Tensor], StepLoss]:
        """Leaves that stand for the poster's patches, targets and rate, and the loss of a step on them."""
        leaves = patches, targets, _ = [part.detach().requires_grad_(part.requires_grad) for part in whole]

        def batch(draw: Draw) -> Batch:
            seen = patches[draw.indices]
            if self.augment is not None:
                seen = self.augment(seen, torch.Generator().manual_seed(draw.seed))
            return seen, targets[draw.indices]

        return leaves, Parts(batch, self.kernels)

    def loss(self, params: Params, seen: Tensor, targets: Tensor) -> Tensor:
        """Of an inner step."""
        return soft_cross_entropy(self.stack.alone(params["net"], seen), targets)

    def real_loss(self, weights: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of a network on real images, whose graph is never all in memory."""

        def piece_loss(weights: Tensor, piece: tuple[Tensor, Tensor]) -> Tensor:
            logits = self.stack.alone(weights, piece[0])
            return F.cross_entropy(logits, piece[1], reduction="sum") / len(images)

        # Batch norm would see each piece by itself.
        size = len(images) if has_batch_norm(self.stack.net) else self.cfg.outer.real_chunk
        return summed(piece_loss, weights, zip(images.split(size), labels.split(size), strict=True))


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (B, K) with probabilities (B, K), differentiable in both."""
    return -(targets * logits.log_softmax(1)).sum(1).mean()


def _order(cfg: Buffer | Distill, data: ImageData, run: Run, start: LoadedPoster | None = None) -> Order:
    """Where classes go: as on the poster to start from, as this run began, as buffer.py found, or as asked for."""
    if start is not None and start.meta:
        check_classes(cfg.show.start, start.meta, data, "--dataset")
        return Order(torch.tensor(start.meta["order"]), start.meta["order_encoder"], str(cfg.show.start))
    if run.resumed and (path := run.folder / "order.json").is_file():
        return load_order(path, data.classes)
    found = home(cfg) / "buffers" / "order.json"
    if isinstance(cfg, Distill) and cfg.order.order == "auto" and found.is_file():
        order = load_order(found, data.classes)
        print(f"classes are placed as in {found}, by {order.encoder}; --order text places them anew")
        return order
    grid = cfg.grid.poster_class_num_y, cfg.grid.poster_class_num_x
    return class_order(cfg.order, data.name, data.classes, *grid, cfg.data.cache_dir)


def _begin(cfg: Distill, data: ImageData, layout: Layout, run: Run, start: LoadedPoster | None) -> Poster:
    """The poster before any step: drawn, or that of --init_from."""
    if start is None:
        return start_poster(data, layout, cfg.poster, run.rng("init"))
    check_whitening(cfg.show.start, start.meta, data)
    if start.meta and start.meta["config"]["train_lr"] and not cfg.poster.train_lr:
        print(f"note: {cfg.show.start} learned a rate of {start.lr:.3g}; --train_lr goes on with it")
    return continue_poster(cfg.show.start, start, data, layout, cfg.poster)


def _whitening(run: Run, start: LoadedPoster | None) -> ZCA | None:
    """The whitening that this run, or the poster to start from, began behind: another fit would be another space."""
    if run.resumed and (run.folder / WHITENING).is_file():
        return ZCA.load(run.folder / WHITENING)
    return ZCA.from_state(start.zca) if start is not None and start.zca else None


def _budget(layout: Layout, poster: Poster) -> str:
    """One line on what the poster costs."""
    (height, width), (rows, columns) = layout.patches.canvas, layout.order.shape
    labels = 0 if poster.label_map is None else poster.label_map.numel()
    stored = f"{labels:,} learned label values" if labels else "labels that follow from the layout"
    size = 4 * (poster.poster.numel() + labels)
    return (
        f"poster of {width} x {height} = {layout.pixels:,} pixels, {layout.ipc:.2f} images a class; "
        f"{len(layout.patches)} patches, {columns} x {rows} classes, {stored}; {size:,} bytes"
    )


def _zca(data: ImageData):
    return lambda: {} if data.zca is None else {"zca": data.zca.state()}


def _meta(cfg: Distill, data: ImageData, order: Order, share: Share) -> dict[str, object]:
    """What a distilled file notes, so that it evaluates the same tomorrow and elsewhere."""
    return {
        "format": FORMAT,
        "config": flat(cfg) | {"segments": share.count},
        "classes": list(data.classes),
        "mean": list(data.mean),
        "std": list(data.std),
        "zca": None if data.zca is None else data.zca.digest,
        "order": order.grid.tolist(),
        "order_encoder": order.encoder,
    }
