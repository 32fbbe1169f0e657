"""How a student CLIP is judged: `eval.py --method dimefm`, as ELEVATER does it.

    --mode zeroshot       a class is the mean direction of the sentences that name it (methods/core/zero_shot.py)
    --mode linear_probe   one linear layer on features that never change (methods/core/linear_probe.py)
    --mode robustness     zero-shot on ImageNet's five relatives, and their mean

The student's images meet its teacher's sentences. The teacher itself and any other CLIP are put to the same test
(`--rows student teacher ViT-B/32`). Every image goes once through each network, whatever is asked of it afterwards.

Where the released program differs or cannot be: it evaluates a random image tower where a checkpoint does not fit (here
that is an error), trains the projection under the name of a linear probe, reports the best epoch by the test images,
and softmaxes scores over classes before ranking images of several classes (`--elevater_compat` has the last two).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.benchmarks import ELEVATER, ROBUSTNESS, BenchmarkConfig, LabelledSet, open_benchmark
from methods.clip_gallery import refresh_page, save_examples, score_rows
from methods.clip_inputs import home
from methods.clip_names import PromptConfig, Prompts, prompts_of
from methods.clip_towers import STUDENT, TEACHER, FeatureCache, Tower, open_towers
from methods.core.linear_probe import Features, Probe, ProbeConfig, few_shots, probe
from methods.core.report import results_table
from methods.core.results import free_place, summarise, write_result
from methods.core.zero_shot import zero_shot_scores
from utils.config import flat, option, section
from utils.errors import UserError
from utils.files import digest, load_tensors, save_tensors, sweep, write_json
from utils.locks import hold
from utils.run import SetupConfig, pick_device
from utils.scores import classification_score

_SHARED = ("protocol", "network", "source", "sentences", "elevater_compat", "num_shots", "seeds")
MODES = {"zeroshot": "zero-shot", "linear_probe": "linear probe", "robustness": "robustness"}


@dataclass(frozen=True)
class JudgeConfig:
    """Which networks are judged, and how."""

    mode: tuple[str, ...] = option(("zeroshot",), "kinds of evaluation", choices=tuple(MODES))
    rows: tuple[str, ...] = option(
        (STUDENT, TEACHER), "networks: student, teacher, or any CLIP to compare with, as --teacher takes it"
    )
    ckpt: str = option("", "the student: its file or its run folder (empty: runs/dimefm/<name>)", aliases=("student",))
    teacher: str = option(
        "",
        "CLIP whose sentences the student has: a folder, a hub id, ViT-L/14, open_clip:ARCHITECTURE:TAG or tiny "
        "(empty: the one that it learned from)",
        free=True,
    )
    elevater_compat: bool = option(
        False, "as ELEVATER's program: probes report their best epoch on test, 11point_mAP ranks softmaxed scores"
    )
    batch_size: int = option(128, "images that go through a network at once", low=1, free=True)
    save_predictions: bool = option(False, "also write every image's probabilities, in ELEVATER's format")
    save_dir: str = option("", "folder of the results (empty: in the folder eval of the student's run)", free=True)

    def check(self) -> None:
        if not self.rows or not self.mode:
            raise UserError("--rows and --mode need at least one value each")


@dataclass(frozen=True)
class Eval:
    """Judge a student CLIP, its teacher and others by zero-shot classification and linear probes."""

    method: str = option("dimefm", "the system")
    data: BenchmarkConfig = section(BenchmarkConfig)
    run: SetupConfig = section(SetupConfig)
    judge: JudgeConfig = section(JudgeConfig)
    prompts: PromptConfig = section(PromptConfig)
    probe: ProbeConfig = section(ProbeConfig)

    def check(self) -> None:
        known = [one.name for one in ROBUSTNESS]
        odd = [name for name in self.data.names if name not in known]
        given = self.data.dataset != BenchmarkConfig().dataset
        if odd and given and set(self.judge.mode) == {"robustness"}:
            raise UserError(
                f"--mode robustness judges on {', '.join(known)}, not on {odd[0]}; take it out of --dataset, or add "
                "--mode zeroshot"
            )

    def idle(self) -> dict[str, str]:
        probed, found = "linear_probe" in self.judge.mode, {}
        if not probed:
            found = dict.fromkeys((*flat(self.probe), "toy_images"), "--mode linear_probe")
            if not {"csv", "voc2007classification"} & {*self.data.names}:
                found["elevater_compat"] = "--mode linear_probe or images of several classes"
        elif set(self.judge.mode) == {"linear_probe"} and not self.probe.init_head_with_text_encoder:
            found = dict.fromkeys(("templates", "class_names"), "--init_head_with_text_encoder")
        if not {STUDENT, TEACHER} & {*self.judge.rows}:
            found["teacher"] = "student or teacher among --rows"
        return found

    @property
    def tasks(self) -> list[tuple[str, str]]:
        """Every (mode, data set) to be done, in order."""
        known, names = [one.name for one in ROBUSTNESS], self.data.names
        relatives = [name for name in names if name in known] or known
        return [
            (mode, name)
            for mode in dict.fromkeys(self.judge.mode)
            for name in (relatives if mode == "robustness" else names)
        ]


def recorded(argv: Sequence[str]) -> dict[str, Any]:
    """What a student notes of its making decides nothing here: it is read with the student."""
    return {}


def evaluate(cfg: Eval) -> None:
    """Judge networks on data sets; print a table, write result.json, and refresh the run's page."""
    device = pick_device(cfg.run.device)
    student = _student_file(cfg)
    # The data sets first: what is missing there is told before a network is loaded.
    names = dict.fromkeys(name for _, name in cfg.tasks)
    sets = {name: open_benchmark(cfg.data, name, alone=len(names) == 1) for name in names}
    for mode, name in cfg.tasks:
        if mode == "linear_probe":
            sets[name].split("train")
    towers = open_towers(cfg.judge.rows, student, cfg.judge.teacher, cfg.data.cache_dir, device)
    folder = Path(cfg.judge.save_dir or student.parent / "eval" / _title(cfg))
    _lock = hold(folder, "--save_dir")  # two would go on with each other's progress
    judging = Judging(cfg, sets, towers, device, folder / "progress")
    records = [record for mode, name in cfg.tasks for record in judging.records(mode, name)]
    records += means(records)
    place = free_place(folder)
    for tower, name, mode, found in judging.predictions:
        write_json(place / "predictions" / f"{_plain(tower)}-{name}-{mode}.json", found)
    save_examples(place, sets, judging.shown)
    path = write_result(place, records, flat(cfg))
    rows, columns = score_rows(records)
    print(results_table(rows, columns, "images"))
    for line in dict.fromkeys(note for record in records for note in record["protocol"]["notes"]):
        print(f"note: {line}")
    print(f"written to {path}")
    refresh_page(student.parent)


class Judging:
    """All evaluations of one command.

    predictions   (network, data set, mode, ELEVATER's record), where they are asked for
    shown         data set → network → probabilities (N, K) of its zero-shot classes, for the page
    """

    def __init__(
        self, cfg: Eval, sets: dict[str, LabelledSet], towers: Sequence[Tower], device: torch.device, progress: Path
    ) -> None:
        self.cfg, self.sets, self.towers, self.device, self.progress = cfg, sets, towers, device, progress
        cache = Path(cfg.data.cache_dir) / "clip_features"
        self.cache = FeatureCache(cache, cfg.data.threads, cfg.judge.batch_size, device)
        self.predictions: list[tuple[str, str, str, dict[str, Any]]] = []
        self.shown: dict[str, dict[str, Tensor]] = {}
        self._prompts: dict[str, Prompts] = {}
        sweep(progress)

    def records(self, mode: str, name: str) -> list[dict[str, Any]]:
        """A record of each network on a data set."""
        return [self._record(mode, self.sets[name], tower) for tower in self.towers]

    def _record(self, mode: str, found: LabelledSet, tower: Tower) -> dict[str, Any]:
        prompts = self._words(found)
        vectors = self.cache.classes(tower, prompts.names, prompts.templates)
        test, labels = self._features(tower, found, "test"), found.split("test").labels
        if mode == "linear_probe":
            values, scores, how = self._probes(tower, found, vectors, Features(test, labels))
        else:
            scores = [zero_shot_scores(test, vectors)]
            values = [classification_score(found.metric, scores[0], labels, self.cfg.judge.elevater_compat)]
            count = len(prompts.templates)
            how = {"about": f"mean of {count} sentence{'s' * (count > 1)} a class", "trained": 0}
            self.shown.setdefault(found.name, {})[tower.name] = scores[0].softmax(dim=1)
        if self.cfg.judge.save_predictions:
            self.predictions.append((tower.name, found.name, mode, self._predicted(tower, found, scores, how)))
        protocol = {
            "protocol": MODES[mode],
            "network": tower.name,
            "source": tower.source,
            "sentences": tower.clip.name,
            "data": found.name,
            "metric": found.metric,
            "classes": len(found.classes),
            "class_names": prompts.named,
            "templates": prompts.worded,
            "elevater_compat": self.cfg.judge.elevater_compat,
            "notes": [*found.notes, *prompts.notes],
        }
        name = f"{tower.name}, {found.name}, {MODES[mode]}"
        metrics = summarise({found.metric: values})
        return {"name": name, "size": len(labels), "metrics": metrics, "protocol": protocol | how}

    def _words(self, found: LabelledSet) -> Prompts:
        if found.name not in self._prompts:
            self._prompts[found.name] = prompts_of(found, self.cfg.prompts)
        return self._prompts[found.name]

    def _features(self, tower: Tower, found: LabelledSet, split: str) -> Tensor:
        listing = found.split(split)
        content = listing.pictures.content(self.cfg.data.cache_dir, self.cfg.data.threads)
        return self.cache.images(tower, listing, content, found.crop, f"{found.name} {split}")

    def _probes(
        self, tower: Tower, found: LabelledSet, vectors: Tensor, test: Features
    ) -> tuple[list[float], list[Tensor], dict[str, Any]]:
        """A probe on all training images, or one on each draw of few; metrics, scores of the test images, and how."""
        cfg, shots = self.cfg.probe, self.cfg.probe.num_shots
        whole = Features(self._features(tower, found, "train"), found.split("train").labels)
        rows = [few_shots(whole.labels, shots, seed) for seed in cfg.shot_seeds] if shots > 0 else []
        probes = [self._probe(tower, found, vectors, whole.rows(drawn), test) for drawn in rows]
        probes = probes or [self._probe(tower, found, vectors, whole, test)]
        first = "best on test" if self.cfg.judge.elevater_compat else "last"
        how = {
            "about": f"{first} of {cfg.probe_epochs} epochs on {len(rows[0] if rows else whole):,} images",
            "num_shots": shots,
            "seeds": list(cfg.shot_seeds) if rows else [],
            "epochs": [one.epoch for one in probes],
            "lr": [one.lr for one in probes],
            "l2": [one.l2 for one in probes],
            "trials": [one.trials for one in probes],
            "val": [None if math.isnan(one.val) else one.val for one in probes],
            "trained": probes[0].trained,
        }
        return [one.score for one in probes], [one.scores for one in probes], how

    def _probe(self, tower: Tower, found: LabelledSet, vectors: Tensor, train: Features, test: Features) -> Probe:
        """A probe, out of its file where that is there: a search takes minutes to hours."""
        cfg, compat = self.cfg.probe, self.cfg.judge.elevater_compat
        begin = vectors if cfg.init_head_with_text_encoder else None
        asked = {name: value for name, value in flat(cfg).items() if name not in ("num_shots", "shot_seeds")}
        parts = [train.vectors, train.labels, test.vectors, test.labels, *([] if begin is None else [begin])]
        mark = digest("probe 1", asked, found.metric, compat, self.cfg.run.seed, *parts)
        path = self.progress / f"{_plain(tower.name)}-{found.name}-{mark[:16]}.pt"
        if path.is_file():
            return Probe(**load_tensors(path, "probe's result", remedy="remove it, and it is made again"))
        what = f"{tower.name}, {found.name}"
        made = probe(
            cfg, train, test, len(found.classes), found.metric, self.cfg.run.seed, self.device, begin, compat, what
        )
        save_tensors(path, vars(made))
        return made

    def _predicted(
        self, tower: Tower, found: LabelledSet, scores: Sequence[Tensor], how: dict[str, Any]
    ) -> dict[str, Any]:
        """What ELEVATER's leaderboard takes."""
        total = tower.weights + sum(
            part.numel() for name, part in tower.clip.net.named_parameters() if not name.startswith("vis")
        )
        shots = how.get("num_shots", 0)
        return {
            "model_name": tower.source,
            "dataset_name": found.published.ident if found.published else found.name,
            "num_trainable_params": how["trained"],
            "num_params": total,
            "num_visual_params": tower.weights,
            "num_backbone_params": total,
            "n_shot": shots if shots >= 0 else -1,
            "rnd_seeds": how.get("seeds") or [self.cfg.run.seed],
            "predictions": [
                [[round(value, 6) for value in row] for row in one.double().softmax(dim=1).tolist()] for one in scores
            ],
        }


def means(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A record of each network's mean over ELEVATER's sets, and over ImageNet's relatives, where it has several."""
    found = []
    for label, group in (("ELEVATER", ELEVATER), ("robustness", ROBUSTNESS)):
        names = {one.name for one in group}
        own = [record for record in records if record["protocol"]["data"] in names]
        for mode, network in dict.fromkeys((one["protocol"]["protocol"], one["protocol"]["network"]) for one in own):
            some = [one for one in own if (one["protocol"]["protocol"], one["protocol"]["network"]) == (mode, network)]
            if len(some) < 2:
                continue
            what = f"mean of {len(some)}" + ("" if len(some) == len(group) else f" of the {len(group)}") + f", {label}"
            value = sum(next(iter(one["metrics"].values()))["mean"] for one in some) / len(some)
            # What differs between the sets, such as a probe's rates, is no part of their mean.
            protocol = {name: value for name, value in some[0]["protocol"].items() if name in _SHARED}
            protocol |= {"data": what, "metric": "mean", "classes": 0, "notes": [], "about": what}
            record = {"name": f"{network}, {what}, {mode}", "size": sum(one["size"] for one in some)}
            found.append(record | {"metrics": summarise({"mean": [value]}), "protocol": protocol})
    return found


def _student_file(cfg: Eval) -> Path:
    """Where the student should be."""
    place = Path(cfg.judge.ckpt).expanduser() if cfg.judge.ckpt else home(cfg.method, cfg.run.name)
    return place / "student.pt" if place.is_dir() or not cfg.judge.ckpt else place


def _title(cfg: Eval) -> str:
    """The name of the results' folder."""
    words = [*dict.fromkeys(cfg.judge.mode), *(_plain(word) for word in cfg.data.dataset)]
    shots = [f"shots{cfg.probe.num_shots}"] if "linear_probe" in cfg.judge.mode and cfg.probe.num_shots > 0 else []
    return "-".join([*words, *shots, f"seed{cfg.run.seed}"])[:120]


def _plain(name: str) -> str:
    """A name as part of a file's."""
    return "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(name).name)
