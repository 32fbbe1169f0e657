"""What buffer.py does for `--method dimefm`: a teacher, its features of unpaired images and sentences, a selection.

    --stages teacher    the tiny CLIP learns, where none can be downloaded (clip_teacher.py)
             features   image_feats.*, text_feats.*: what the teacher says of the pools (clip_features.py)
             select     selected.tsv, selected_feats.npy: the --budget sentences that the images call for, of all that
                        there are; selection.csv says which image called for each (clip_selection.py)

All files are in one run folder. `pools.yaml`, which is written last, lists what distill.py is to learn from and whose
features they are; it is a --pool_manifest as any other.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from data.feature_files import FeatureWriter
from data.pools import (
    FORMAT,
    Features,
    PoolsConfig,
    check_aligned,
    check_one_teacher,
    lasting,
    manifest_digest,
    open_features,
    open_images,
    open_texts,
    roles,
)
from data.tsv import TsvWriter
from methods.clip_features import FeatureConfig, extract_images, extract_texts, note_on
from methods.clip_selection import SelectConfig, cosines, distinct, select, write_selection
from methods.clip_teacher import TEACHER, TeacherConfig, train_teacher
from networks.clip import load_clip
from utils.config import option, section
from utils.errors import UserError
from utils.files import write_text
from utils.parsing import parse_yaml
from utils.progress import progress
from utils.run import Run, RunConfig

MANIFEST = "pools.yaml"
STAGES = ("teacher", "features", "select")
_OPEN = {"images": open_images, "texts": open_texts}
_FEATS = {"images": "image_feats", "texts": "text_feats"}
_ABOUT = (
    "model",
    "weights",
    "layer",
    "normalised",
    "precision",
)  # of a note, what holds for a selection too


@dataclass(frozen=True)
class BufferStages:
    """Which stages buffer.py does, and where its files go."""

    stages: tuple[str, ...] = option(("features",), "what to do", choices=STAGES, aliases=("stage",), free=True)
    buffer_path: str = option("", "run folder (empty: runs/dimefm/<name>/buffers)", aliases=("output_dir",), free=True)


@dataclass(frozen=True)
class Buffer:
    """Extract a teacher's features of unpaired images and sentences."""

    method: str = option("dimefm", "the system")
    pools: PoolsConfig = section(PoolsConfig)
    run: RunConfig = section(RunConfig)
    steps: BufferStages = section(BufferStages)
    teacher: TeacherConfig = section(TeacherConfig)
    features: FeatureConfig = section(FeatureConfig)
    select: SelectConfig = section(SelectConfig)

    def check(self) -> None:
        if "select" in self.steps.stages and not self.select.budget:
            raise UserError("--stages select needs to know how many sentences to keep; give --budget")

    def idle(self) -> dict[str, str]:
        learning = ("teacher_pairs", "teacher_images", "teacher_epochs", "teacher_batch", "teacher_lr")
        found = {} if "teacher" in self.steps.stages else dict.fromkeys(learning, "--stages teacher")
        return found | ({} if "select" in self.steps.stages else {"budget": "--stages select"})


def home(method: str, name: str) -> Path:
    """The folder of a row's runs where no flag names one."""
    return Path("runs") / method / (name or "pools")


def buffer(cfg: Buffer) -> None:
    """Features, and what else the stages make, in the run folder; what is there already is not made again."""
    given = asdict(roles(cfg.pools))
    if set(cfg.steps.stages) != {"teacher"} and not (given["images"] or given["texts"]):
        raise UserError("there are neither images nor sentences; give --images and --texts, such as toy")
    pools = {role: open_(given[role], cfg.pools) for role, open_ in _OPEN.items() if given[role]}
    for role, pool in pools.items():
        if given[feats := _FEATS[role]]:
            check_aligned(pool, open_features(given[feats], cfg.pools))
    run = Run(cfg.steps.buffer_path or home(cfg.method, cfg.run.name) / "buffers", cfg, "buffer", "--buffer_path")
    if "teacher" in cfg.steps.stages:
        print(f"the teacher is in {train_teacher(cfg.teacher, run, cfg.pools.cache_dir, cfg.pools.threads)}")
    files = {role: [lasting(role, name, cfg.pools) for name in names] for role, names in given.items()}
    if "features" in cfg.steps.stages:
        _extract(cfg, run, {role: pool for role, pool in pools.items() if not given[_FEATS[role]]})
    for feats in _FEATS.values():
        own = run.folder / f"{feats}.{cfg.features.feature_format}"
        if not files[feats] and own.is_file():
            files[feats] = [own.name]
    if "select" in cfg.steps.stages:
        files |= _select(cfg, run, pools, {feats: _opened(files[feats], run.folder, cfg) for feats in _FEATS.values()})
    if any(files[feats] for feats in _FEATS.values()):
        write_manifest(run.folder / MANIFEST, files, _teacher(cfg, run, files))
        print(f"what distill.py needs is listed in {run.folder / MANIFEST}")


def _extract(cfg: Buffer, run: Run, pools: dict[str, Any]) -> None:
    """The stage features: a file for each of these pools."""
    if not pools:
        return
    source = str(run.folder / TEACHER) if (run.folder / TEACHER).is_dir() else cfg.teacher.teacher
    clip = load_clip(source, cfg.pools.cache_dir, run.device, cfg.features.precision(run.device))
    for role, pool in pools.items():
        place = (clip, pool, run.folder, _FEATS[role], cfg.features)
        if role == "images":
            path = extract_images(*place, cfg.pools.threads, cfg.pools.bad_images)
        else:
            path = extract_texts(*place)
        print(f"features of {len(pool):,} {role}, {clip.dim} numbers each, in {path}")


def _select(cfg: Buffer, run: Run, pools: dict[str, Any], features: dict[str, Features | None]) -> dict[str, list[str]]:
    """The stage select: the kept sentences and their features, which take the place of all."""
    images, texts, pool = features["image_feats"], features["text_feats"], pools.get("texts")
    if images is None or texts is None or pool is None:
        raise UserError(
            "--stages select needs sentences, and features of images and of sentences; add --stages features"
        )
    check_one_teacher(images, texts)
    check_aligned(pool, texts)  # which may be of an earlier command
    path, audit = run.folder / "selected.tsv", run.folder / "selection.csv"
    if audit.is_file():
        print(f"sentences are selected already: {audit}")
    else:
        candidates = distinct(pool.text(row) for row in progress(range(len(pool)), what="reading", unit="sentence"))
        seen = torch.tensor([row for row in range(len(images)) if row not in images.bad])
        found = select(cosines(images, texts, run.device), seen, candidates, cfg.select)
        if len(found) < cfg.select.budget:
            print(f"note: {_short(cfg.select, len(found), len(candidates))}")
        with TsvWriter(path) as file:
            for row in found.ids.tolist():
                file.add(str(pool.key(row)), json.dumps({"captions": [pool.text(row)]}, ensure_ascii=False))
        note = {name: texts.note[name] for name in _ABOUT if name in texts.note}
        note |= note_on(open_texts([str(path)], cfg.pools))
        for old in run.folder.glob("selected_feats.*"):
            old.unlink()  # of a run that was killed: these take a moment
        writer = FeatureWriter(run.folder, "selected_feats", len(found), texts.dim, note)
        for rows in found.ids.split(cfg.select.select_chunk):
            writer.add(texts.rows(rows))
        writer.finish()
        write_selection(audit, found, pool.text)
        print(f"{len(found):,} of {len(pool):,} sentences in {path}; {audit} tells for which images")
    return {"texts": [path.name], "text_feats": ["selected_feats.npy"]}


def _short(cfg: SelectConfig, found: int, there: int) -> str:
    if found == there:
        return f"--budget {cfg.budget} is more than there is; all {there:,} different sentences are kept"
    return f"--budget {cfg.budget} is more than images propose, which is {found:,} of {there:,}; raise --topk"


def _opened(names: list[str], folder: Path, cfg: Buffer) -> Features | None:
    return open_features([str(folder / name) for name in names], cfg.pools) if names else None


def _teacher(cfg: Buffer, run: Run, files: dict[str, list[str]]) -> dict[str, Any]:
    """Whose features these are: `source`, as --teacher takes it, `weights`, their digest, and `dim`."""
    known = noted_teacher(cfg.pools.pool_manifest) if cfg.pools.pool_manifest else {}
    feats = next(files[feats] for feats in _FEATS.values() if files[feats])
    features = _opened(feats, run.folder, cfg)
    source = known.get("source", cfg.teacher.teacher)
    if (run.folder / TEACHER).is_dir():
        source = TEACHER
    elif source and Path(source).expanduser().is_dir():
        source = str(Path(source).expanduser().absolute())
    return {"source": source, "weights": features.note.get("weights", ""), "dim": features.dim}


def write_manifest(path: Path, files: dict[str, list[str]], teacher: dict[str, Any]) -> None:
    """The files of each part, and the teacher, as YAML; names are beside the manifest, or absolute."""
    noted = {"format": FORMAT} | files | {"teacher": teacher}
    # The digest stands near the top: whatever is cut off, it is of more than is left.
    noted = {"format": FORMAT, "digest": manifest_digest(noted)} | noted
    write_text(path, yaml.safe_dump(noted, sort_keys=False, allow_unicode=True))


def noted_teacher(path: Path | str) -> dict[str, Any]:
    """What a manifest tells of the teacher: source, weights and dim, the source as good from here; {} where nothing."""
    path = Path(path)
    tree = parse_yaml(path.read_text(encoding="utf-8"))
    teacher = tree.get("teacher") if isinstance(tree, dict) else None
    if not isinstance(teacher, dict):
        return {}
    if not isinstance(teacher.get("source", ""), str):
        raise UserError(
            f"manifest {path}: the teacher's source is {teacher['source']!r}; it must be a name or a folder"
        )
    beside = path.parent / teacher.get("source", "")
    return teacher | ({"source": str(beside)} if teacher.get("source") == TEACHER and beside.is_dir() else {})
