"""DIME-FM: DIstilling Multimodal and Efficient Foundation Models (Sun et al., ICCV 2023, arXiv 2303.18232).

A small image encoder learns the joint space of a large CLIP from images and sentences that have nothing to do with each
other. The large one, the teacher, is run once over both pools (`buffer.py`) and never again. Only the student's image
encoder is trained (`distill.py`); sentences are the teacher's at all times, so what is deployed is the student's image
tower with the teacher's text tower (`eval.py`: zero-shot, linear probe, robustness).

In a batch of B images and N sentences, drawn apart: the teacher's images V and sentences U, the student's images S, all
rows of unit length; a = 100. With KL_T(P ‖ Q) the mean over rows of KL(softmax(P/T) ‖ softmax(Q/T)), without T²:

    L_vl    = KL_T(aVUᵀ ‖ aSUᵀ) + KL_T(aUVᵀ ‖ aUSᵀ)    T = 1    scores of images and sentences, both ways
    L_pvl   = 2 KL_T(aVVᵀ ‖ aSVᵀ)                      T = 3    teacher images in the place of sentences
    L_udist = 2 KL_T(aVVᵀ ‖ aSSᵀ)                      T = 7    distances among images; turns of S do not change it
    loss    = 0.7 L_vl + 0.3 L_pvl + 0 L_udist         the last two where their switches say so

Where the paper and the released code are not of one mind: L_pvl doubles its rows there as if it were symmetric, which
S Vᵀ is not; `--pvl_mode symmetric` has rows and columns. Where that code cannot be right, it is not followed: it breaks
off after the first epoch, resumes nothing, forgets its seed, learns a grey picture for each image that it cannot read,
and computes similarities in half precision, which alone makes a KL of 1e-4 (float16) to 1e-2 (bfloat16). Here they are
float32 whatever `--amp` does elsewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.pools import (
    Features,
    ImagePool,
    PoolsConfig,
    Roles,
    check_aligned,
    check_one_teacher,
    open_features,
    open_images,
    open_texts,
    roles,
)
from methods.clip_batches import Unpaired
from methods.clip_gallery import refresh_page
from methods.clip_inputs import MANIFEST, Buffer, buffer, home, noted_teacher
from methods.clip_judging import Eval, evaluate, recorded
from methods.clip_learning import STUDENT, LearnConfig, Learned, learn
from methods.clip_towers import PUBLISHED_TEACHER
from networks.clip_students import StudentConfig, StudentSpec, build_student, student_spec
from utils.config import idle_options, option, section
from utils.errors import UserError
from utils.ranks import open_ranks
from utils.rng import derive_seed, seeded
from utils.run import Run, RunConfig, pick_device

__all__ = ["CONFIGS", "buffer", "distill", "evaluate", "recorded"]  # clip_inputs.py and clip_judging.py have the others

PVL_MODES = ("rows2", "symmetric")


@dataclass(frozen=True)
class LossConfig:
    """The three terms, their temperatures and weights."""

    t_vl: float = option(1.0, "temperature of the image–sentence term", above=0)
    t_pvl: float = option(3.0, "temperature of the term with teacher images as sentences", above=0)
    t_udist: float = option(7.0, "temperature of the term of distances among images", above=0)
    w_vl_loss: float = option(0.7, "weight of the image–sentence term", low=0)
    w_pvl_loss: float = option(0.3, "weight of the term with teacher images as sentences", low=0)
    w_udist_loss: float = option(0.0, "weight of the term of distances among images", low=0)
    use_pvl_loss: bool = option(False, "add the term with teacher images as sentences")
    use_udist_loss: bool = option(False, "add the term of distances among images; it needs a weight")
    pvl_mode: str = option(
        "rows2", "the former as released, twice its rows, or rows and columns once each", choices=PVL_MODES
    )
    log_scale: float = option(100.0, "what cosines are multiplied by, as CLIP learned it", above=0)

    def check(self) -> None:
        for name in ("pvl", "udist"):
            weight = getattr(self, f"w_{name}_loss")
            if getattr(self, f"use_{name}_loss") and not weight:
                raise UserError(
                    f"--use_{name}_loss with --w_{name}_loss 0 only costs time; give a weight, such as 0.1, or drop it"
                )
        if not self.weights:
            raise UserError("--w_vl_loss is 0 and no other term is switched on, so nothing would be learned")

    def idle(self) -> dict[str, str]:
        found = {} if self.use_pvl_loss else dict.fromkeys(("t_pvl", "w_pvl_loss", "pvl_mode"), "--use_pvl_loss")
        found |= {} if self.use_udist_loss else dict.fromkeys(("t_udist", "w_udist_loss"), "--use_udist_loss")
        return found | ({} if self.w_vl_loss else {"t_vl": "--w_vl_loss above 0"})

    @property
    def weights(self) -> dict[str, float]:
        """Term → weight, of those that count."""
        used = {"vl": True, "pvl": self.use_pvl_loss, "udist": self.use_udist_loss}
        found = {name: getattr(self, f"w_{name}_loss") for name, on in used.items() if on}
        return {name: weight for name, weight in found.items() if weight}


def similarity(x: Tensor, y: Tensor, scale: float = 100.0) -> Tensor:
    """scale · cosines (m, n) of the rows of x (m, d) and y (n, d), in float32 at least; a row of zeros has cosine 0."""
    x, y = (F.normalize(rows if rows.dtype == torch.float64 else rows.float(), dim=1) for rows in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        return scale * x @ y.T


def score_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL_T(teacher ‖ student) of scores (m, n): over each row's softmax, averaged over rows; in nats, not times T²."""
    wanted, found = (F.log_softmax(scores / temperature, 1) for scores in (teacher, student))
    return F.kl_div(found, wanted, reduction="batchmean", log_target=True)


def dime_losses(images: Tensor, texts: Tensor, student: Tensor, cfg: LossConfig) -> dict[str, Tensor]:
    """Each term that counts, by name, and their weighted sum as `loss`.

    images   (B, d) the teacher's image features V, texts (N, d) its sentences' U, student (B, d) S; of any length
    """
    scale, terms = cfg.log_scale, {}
    if "vl" in cfg.weights:
        wanted, found = similarity(images, texts, scale), similarity(student, texts, scale)
        terms["vl"] = score_kl(wanted, found, cfg.t_vl) + score_kl(wanted.T, found.T, cfg.t_vl)
    if "pvl" in cfg.weights:
        wanted, found = similarity(images, images, scale), similarity(student, images, scale)
        rows = score_kl(wanted, found, cfg.t_pvl)
        terms["pvl"] = rows + (rows if cfg.pvl_mode == "rows2" else score_kl(wanted.T, found.T, cfg.t_pvl))
    if "udist" in cfg.weights:  # both matrices are symmetric, so that rows and columns are the same
        wanted, found = similarity(images, images, scale), similarity(student, student, scale)
        terms["udist"] = 2 * score_kl(wanted, found, cfg.t_udist)
    return terms | {"loss": sum(weight * terms[name] for name, weight in cfg.weights.items())}


@dataclass(frozen=True)
class PlaceConfig:
    """Where this command reads and writes."""

    buffer_path: str = option("", "run folder of buffer.py (empty: runs/dimefm/<name>/buffers)", free=True)
    save_dir: str = option("", "run folder (empty: runs/dimefm/<name>)", free=True)
    output_dir: str = option(
        "", "folder for run folders that are named as published, <student>-<teacher>-b<batch>[-<prefix>]-e<epochs>"
    )
    prefix: str = option("", "word in the name of such a run folder")
    teacher: str = option("", "whose features these are, such as ViT-L/14, where buffer.py has not noted it")

    def check(self) -> None:
        if self.save_dir and self.output_dir:
            raise UserError("--save_dir and --output_dir both say where the run goes; give one of them")

    def idle(self) -> dict[str, str]:
        return {} if self.output_dir else {"prefix": "--output_dir"}


@dataclass(frozen=True)
class Distill:
    """Train a small image encoder on a teacher's features of images and of sentences that do not belong together."""

    method: str = option("dimefm", "the system")
    pools: PoolsConfig = section(PoolsConfig)
    run: RunConfig = section(RunConfig)
    place: PlaceConfig = section(PlaceConfig)
    student: StudentConfig = section(StudentConfig)
    loss: LossConfig = section(LossConfig)
    learn: LearnConfig = section(LearnConfig)

    def idle(self) -> dict[str, str]:
        named = roles(self.pools) != Roles()
        return {"buffer_path": f"its {MANIFEST}, in whose place other flags name the files"} if named else {}


CONFIGS = {"buffer": Buffer, "distill": Distill, "eval": Eval}
SHARED = ("distill",)  # verbs that several processes may share


def distill(cfg: Distill) -> None:
    """A student in the run folder, `student.pt`; under torchrun the processes share each batch."""
    with open_ranks(pick_device(cfg.run.device), cfg.learn.local_rank) as ranks:
        inputs, spec = open_inputs(cfg), student_spec(cfg.student)
        folder = run_folder(cfg, spec, inputs.teacher.get("source", ""))
        run = Run(folder, cfg, "distill", "--output_dir" if cfg.place.output_dir else "--save_dir", ranks)
        begun = any(run.folder.glob("checkpoint_*.pt")) or (run.folder / STUDENT).exists()
        run.pin(anew=not begun, **inputs.digests())  # a file that was damaged from the start can be mended
        with seeded(derive_seed(run.seed, "student")):
            net = build_student(spec, inputs.image_feats.dim)
        pools = (inputs.images, inputs.image_feats, inputs.text_feats)
        feed = Unpaired(*pools, cfg.learn.batches, spec.image_size, run.seed, ranks, cfg.pools.threads)
        losses = partial(dime_losses, cfg=cfg.loss)
        learned = learn(cfg.learn, net, spec, feed, losses, run, cfg.pools.bad_images, _note(cfg, inputs))
        if ranks.first:
            _tell(learned, run.folder)
            refresh_page(run.folder)


@dataclass(frozen=True)
class Inputs:
    """What is learned from; `teacher` has source and weights (their digest) of the network whose features these are, as
    far as they are known."""

    images: ImagePool
    image_feats: Features
    text_feats: Features
    teacher: dict[str, Any]

    def digests(self) -> dict[str, str]:
        return {
            "images": self.images.fingerprint(),
            "image_feats": self.image_feats.fingerprint(),
            "text_feats": self.text_feats.fingerprint(),
        }


def open_inputs(cfg: Distill) -> Inputs:
    """Images, features and their teacher, from flags or as buffer.py left them; compared with each other."""
    pools, parts = cfg.pools, roles(cfg.pools)
    if parts == Roles():
        pools = replace(pools, pool_manifest=str(buffers(cfg) / MANIFEST))
        parts = roles(pools)
    parts.need("images", "image_feats", "text_feats", remedy=", or run buffer.py first")
    if pools.pool_manifest:  # which was not read when options that do nothing were told
        for line in idle_options(replace(pools, pool_manifest="", images=parts.images, texts=parts.texts)):
            print(f"note: {line}")
    images = open_images(parts.images, pools)
    image_feats = open_features(parts.image_feats, pools, "features of the images")
    text_feats = open_features(parts.text_feats, pools, "features of the sentences")
    check_aligned(images, image_feats)
    if parts.texts:
        check_aligned(open_texts(parts.texts, pools), text_feats)
    check_one_teacher(image_feats, text_feats)
    note, teacher = image_feats.note, noted_teacher(pools.pool_manifest) if pools.pool_manifest else {}
    told = {"source": cfg.place.teacher or note.get("model", ""), "weights": note.get("weights", "")}
    return Inputs(images, image_feats, text_feats, told | teacher)


def buffers(cfg: Distill) -> Path:
    """Where buffer.py left its files."""
    return Path(cfg.place.buffer_path or home(cfg.method, cfg.run.name) / "buffers")


def run_folder(cfg: Distill, spec: StudentSpec, teacher: str) -> Path:
    """Where the run goes: named by the flags, or as published, after all that tells two runs apart by sight."""
    if not cfg.place.output_dir:
        return Path(cfg.place.save_dir or home(cfg.method, cfg.run.name))
    teacher = teacher or PUBLISHED_TEACHER  # first, for Path("") is a folder: this one
    teacher = Path(teacher).name if Path(teacher).is_dir() else teacher
    names = [name.replace(":", "_").replace("/", "-") for name in (spec.name, teacher)]
    words = [f"b{cfg.learn.batches.batch_size}", *filter(None, [cfg.place.prefix]), f"e{cfg.learn.epochs}"]
    return Path(cfg.place.output_dir) / "-".join(names + words)


def _note(cfg: Distill, inputs: Inputs) -> dict[str, Any]:
    """What student.pt says of its teacher and its training."""
    teacher = {"teacher": inputs.teacher.get("source", ""), "teacher_fingerprint": inputs.teacher.get("weights", "")}
    return teacher | {"seed": cfg.run.seed}


def _tell(learned: Learned, folder: Path) -> None:
    if len(learned.agreements) > 1:
        begun, found = learned.agreements[0], learned.agreements[-1]
        print(
            f"of held-out images the student takes the teacher's sentence for {found:.1f} % (untrained {begun:.1f}, by "
            f"chance {learned.chance:.1f})"
        )
    if learned.undecodable:
        print(f"note: {learned.undecodable:,} of {learned.seen:,} images could not be decoded and were passed over")
    if learned.steps < learned.planned:
        print(f"{learned.steps:,} of {learned.planned:,} steps are taken; --resume with another --steps goes on")
    print(f"the student is {folder / STUDENT}")
