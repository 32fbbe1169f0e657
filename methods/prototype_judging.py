"""How class images are judged: `eval.py --method vlcp`, by the two published protocols.

Fresh students train on the images and classify the real test images. `minimax` has hard labels (`core/hard_labels.py`),
`rded` those of a teacher (`core/soft_labels.py`). Real images of the same budget, chosen in several ways, are put to
the same test. Both published protocols report the best of many tests on the test images themselves; the table says so,
and has the last epoch beside it. With `--best_on val` a share of the real training images is held out to choose by.

Each student's result is a file of its own in the results' folder, named after all that it depends on, so the same
command goes on after it was killed, and another one never takes what is not its own.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data.catalogue import CatalogueConfig, build_catalogue
from data.subsets import wordnet_names
from methods.core.evaluation import evaluate as score_students
from methods.core.evaluation import one_by_one
from methods.core.hard_labels import HardConfig, HardLabels
from methods.core.photo_students import PhotoStudents, StudentConfig, preset_size
from methods.core.photos import Photos
from methods.core.report import results_table
from methods.core.results import protocols_of, read_result, read_student, summarise, write_result
from methods.core.soft_labels import SoftConfig, SoftLabels, tested_size
from methods.core.teachers import Teacher, TeacherConfig, open_teacher
from methods.prototype_gallery import columns, refresh_page, table_row
from methods.prototype_inputs import (
    PROTOCOLS,
    InputConfig,
    Inputs,
    data_of,
    default_protocol,
    find_inputs,
    published_teacher,
    rded_name,
    recorded,
)
from methods.prototype_sources import SOURCES, Files, RealImages, distilled_files, labels_of, latent_features, selected
from utils.config import flat, option, options_of, section, with_default
from utils.errors import UserError
from utils.files import digest, sweep, write_signed
from utils.locks import hold
from utils.metrics import mean_std
from utils.ranks import Ranks, open_ranks
from utils.rng import derive_seed
from utils.run import SetupConfig, pick_device

__all__ = ["Eval", "evaluate", "recorded"]  # recorded: prototype_inputs.py has it
RAW = 32  # pixels a side that raw features have at most


@dataclass(frozen=True)
class JudgeConfig:
    """How often and by what a set of images is judged."""

    protocol: str = option(
        "",
        "minimax: hard labels; rded: a teacher's (empty: rded for imagenet1k, cifar10, cifar100 and tiny_imagenet, and "
        "where --stud-name or --syn-data-path is given; else minimax)",
        choices=("", *PROTOCOLS),
    )
    ipc: int = option(0, "images a class (0: as many as the distilled sets have)", aliases=("i",), low=0)
    repeat: int = option(3, "students of each network on each set of images", low=1)
    best_on: str = option(
        "test",
        "which images choose the best epoch: test, as published, or val, a share of the real training images",
        choices=("test", "val"),
    )
    holdout: float = option(0.1, "that share of each class, which no row trains on", above=0)
    full_epochs: int = option(300, "epochs on all real training images", low=1)

    def check(self) -> None:
        if self.holdout >= 1:
            raise UserError(f"--holdout is {self.holdout}; it must be below 1")

    def idle(self) -> dict[str, str]:
        return {} if self.best_on == "val" else {"holdout": "--best_on val"}


@dataclass(frozen=True)
class HardFlags(HardConfig):
    """The students of --protocol minimax."""

    net_type: tuple[str, ...] = with_default(("resnet_ap",), HardConfig, "net_type")

    def idle(self) -> dict[str, str]:
        each = [self.of(name).idle() for name in self.net_type]
        return {name: told for name, told in each[0].items() if all(name in other for other in each)}

    def of(self, name: str) -> HardConfig:
        return HardConfig(**flat(self) | {"net_type": name})


@dataclass(frozen=True)
class SoftFlags(SoftConfig):
    """The students of --protocol rded."""

    stud_name: tuple[str, ...] = option(
        (),
        "students of --protocol rded, as torchvision names them, or resnet18_modified, conv3 … (empty: --arch_name)",
        aliases=("stud-name",),
    )

    def of(self, name: str) -> SoftConfig:
        return SoftConfig(**flat(self) | {"stud_name": name})


@dataclass(frozen=True)
class Eval:
    """Train fresh networks on distilled class images, on as many real ones or on all of these; report accuracies."""

    method: str = option("vlcp", "the system")
    data: CatalogueConfig = section(CatalogueConfig)
    run: SetupConfig = section(SetupConfig)
    inputs: InputConfig = section(InputConfig)
    judge: JudgeConfig = section(JudgeConfig)
    student: StudentConfig = section(StudentConfig)
    hard: HardFlags = section(HardFlags)
    soft: SoftFlags = section(SoftFlags)
    teacher: TeacherConfig = section(TeacherConfig)

    def check(self) -> None:
        data_of(self.data, self.inputs)

    def idle(self) -> dict[str, str]:
        found = {} if "full" in self.inputs.source else {"full_epochs": "--data full"}
        if self.protocol == "rded":
            found |= {} if self.soft.sgd else {"momentum": "--protocol minimax, or --sgd"}
            return found | dict.fromkeys(options_of(HardConfig), "--protocol minimax")
        found |= {"mix_p": "images that are mixed (--mix_type)"} if self.student.mixing[0] == "none" else {}
        return found | dict.fromkeys({**options_of(SoftConfig), **options_of(TeacherConfig)}, "--protocol rded")

    @property
    def protocol(self) -> str:
        named = self.judge.protocol or ("rded" if self.soft.stud_name else "")
        return named or default_protocol(self.data, self.inputs)

    @property
    def experiment(self) -> str:
        """What RDED calls the folder below which it looks for distilled images."""
        subset, arch, inputs = rded_name(self.data, self.inputs), self.teacher.arch_name, self.inputs
        factor, ipc = self.student.factor, self.judge.ipc
        return f"{subset}_{arch}_f{factor}_mipc{inputs.mipc}_ipc{ipc}_cr{inputs.num_crop}"

    @property
    def networks(self) -> tuple[str, ...]:
        """Without those named twice."""
        named = (self.soft.stud_name or (self.teacher.arch_name,)) if self.protocol == "rded" else self.hard.net_type
        return tuple(dict.fromkeys(named))


def evaluate(cfg: Eval) -> None:
    """Judge sets of class images by the accuracy of students trained on them; print a table and write result.json.

    Under torchrun the processes share the students.
    """
    with open_ranks(pick_device(cfg.run.device)) as ranks:
        _evaluate(cfg, ranks)


def _evaluate(cfg: Eval, ranks: Ranks) -> None:
    with ranks.in_turn():
        inputs = find_inputs(cfg.data, cfg.inputs, cfg.run.name, cfg.experiment)
        judging = Judging(cfg, inputs, JudgedImages(cfg, inputs), ranks)
        folder = Path(cfg.inputs.save_dir or inputs.home / "eval" / judging.title)
        if ranks.first:
            _lock = hold(folder, "--save_dir")  # two would go on with each other's progress, and sweep it away
            sweep(folder / "progress")
    rows = judging.rows(folder / "progress")
    if not ranks.first:
        return
    print(results_table([table_row(row) for row in rows], columns(rows), "images"))
    print(f"{protocols_of(rows)}. Accuracy on test in %, mean ± std over n students, each trained from scratch")
    for row in rows:
        print(f"{row['name']}: {row['protocol']['what']}; {row['protocol']['students']}")
    for recipe in dict.fromkeys(recipe_of(row["protocol"]) for row in rows):
        names = [row["name"] for row in rows if recipe_of(row["protocol"]) == recipe]
        print(f"{' | '.join(names)}: {recipe}")
    print(f"written to {write_result_once(folder, rows, flat(cfg))}")
    refresh_page(inputs.home)


def recipe_of(protocol: dict[str, Any]) -> str:
    """All that a row's numbers depend on besides its images, in a line."""
    names = ("network", "size", "epochs", "factor", "batch", "lr", "schedule", "augmentation")
    said = [f"{name} {protocol[name]}" for name in names]
    if "teacher" in protocol:
        said.append(f"teacher {protocol['teacher']}, {protocol['teacher_accuracy']:.1f} % on test")
    return "; ".join([*said, f"tested {protocol['looks']} times, best epoch chosen on {protocol['best_on']}"])


def write_result_once(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write result.json to `folder`, or beside it under the next free number; where it is there already, leave it."""
    for path in sorted(folder.parent.glob("*/result.json")):
        same_name = path.parent.name.startswith(folder.name)
        if same_name and read_result(path) == {"rows": rows, "config": config}:
            return path
    return write_result(folder, rows, config)


class JudgedImages:
    """The files that each row of the table trains on, and those that it is tested on; found and checked at once.

    Classes are in the sorted order of their folders' names.
    """

    def __init__(self, cfg: Eval, inputs: Inputs) -> None:
        self.cfg, self.inputs = cfg, inputs
        self.catalogue = build_catalogue(inputs.data)
        self.catalogue.need_test()
        chosen_on_val = cfg.judge.best_on == "val"
        self.real = RealImages(
            self.catalogue, cfg.run.seed, cfg.judge.holdout if chosen_on_val else 0.0, self._features
        )
        self.test = [self.catalogue.test_paths(place) for place in self.real.places]
        self.sets = [self._distilled(folder) for folder in inputs.folders] if "distilled" in cfg.inputs.source else []
        self.ipc = self._ipc()
        for row in cfg.inputs.source:
            if row == "distilled":
                for number in range(len(self.sets)):
                    self.files(row, number, 0)
            elif row != "full":
                self.real.check(self.ipc)

    def files(self, row: str, generation: int, repeat: int) -> Files:
        """What student `repeat` of a row trains on; `generation`: which of the distilled sets."""
        if row == "distilled":
            files, seed = self.sets[generation], derive_seed(self.cfg.run.seed, "set", generation)
            return selected(files, self.ipc, self.cfg.inputs.slct_type, self.real.idents, seed, repeat)
        if row == "random":
            return self.real.random(self.ipc, repeat)
        return self.real.kept if row == "full" else self.real.chosen(row, self.ipc)

    def photos(self, files: Files, what: str) -> Photos:
        data = self.inputs.data
        return Photos([file for some in files for file in some], labels_of(files), data.cache_dir, data.threads, what)

    def _ipc(self) -> int:
        asked, rows = self.cfg.judge.ipc, self.cfg.inputs.source
        if asked or not self.sets:
            if not asked and set(rows) != {"full"}:
                raise UserError("--ipc is not given, and there are no distilled images to take it from")
            return asked
        return min(len(some) for files in self.sets for some in files)

    def _distilled(self, folder: Path) -> Files:
        spared: list[str] = []
        if self.inputs.data.nclass:
            with suppress(UserError):  # the data has folders of the first classes only
                spared = [kind.ident for kind in build_catalogue(replace(self.inputs.data, nclass=0)).kinds]
        files, note = distilled_files(folder, self.real.idents, spared, self._ident)
        if note:
            print(f"note: {note}")
        return files

    def _ident(self, name: str) -> str | None:
        number = self.catalogue.class_number(name)
        return None if number is None else self.catalogue.kinds[number].ident

    def _features(self, ident: str, files: list[Path]) -> Tensor:
        if self.cfg.inputs.coreset_features == "latent":
            names = [file.relative_to(self.catalogue.train_root).as_posix() for file in files]
            return latent_features(self.inputs.home, ident, names)
        return self.photos([files], ident).squares(RAW).flatten(1).float() / 255


class Judging:
    """All students of one command."""

    def __init__(self, cfg: Eval, inputs: Inputs, images: JudgedImages, ranks: Ranks) -> None:
        self.cfg, self.inputs, self.images, self.ranks, self.device = cfg, inputs, images, ranks, ranks.device
        self.classes, self.split = len(images.real.idents), cfg.judge.best_on
        self.best = f"best on {self.split}"
        self.tests = {"test": images.photos(images.test, "test")}
        if self.split == "val":
            print("note: distilled images may have been made from real ones that --best_on val holds out")
            self.tests["val"] = images.photos(images.real.held, "held-out")
        self.contents = {split: photos.content() for split, photos in self.tests.items()}
        self.teachers: dict[int, Teacher] = {}
        # A network that does not take these images is told now, not after a teacher's or the first one's hours.
        some, nobody = self.tests["test"], Teacher(nn.Identity(), cfg.teacher.arch_name, "", 0.0)
        tried = [self._students(name, some, 0, not images.ipc, nobody) for name in cfg.networks]
        self.epochs = tried[0].epochs
        for name in cfg.networks if cfg.protocol == "rded" else ():
            self._teacher(name)

    @property
    def title(self) -> str:
        """The name of the results' folder."""
        cfg = self.cfg
        parts = [cfg.protocol, self.inputs.data.row, "-".join(cfg.networks)[:60], f"ipc{self.images.ipc}"]
        parts += [*filter(None, [cfg.inputs.tag]), f"e{self.epochs}", f"seed{cfg.run.seed}"]
        return "-".join(parts + (["val"] if self.split == "val" else []))

    def rows(self, progress: Path) -> list[dict[str, Any]]:
        """A record of each thing asked for, network by network."""
        several, asked = len(self.cfg.networks) > 1, dict.fromkeys(self.cfg.inputs.source)
        return [
            self._row(row, network, progress, f"{network}, " if several else "")
            for network in self.cfg.networks
            for row in asked
        ]

    def _row(self, row: str, network: str, progress: Path, prefix: str) -> dict[str, Any]:
        sets, repeats = len(self.images.sets) if row == "distilled" else 1, self.cfg.judge.repeat
        jobs = [(row, network, g, r, progress) for g in range(sets) for r in range(repeats)]
        parts = self.ranks.all([self._student(*job) for job in jobs[self.ranks.rank :: self.ranks.world]])
        found = [parts[at % self.ranks.world][at // self.ranks.world] for at in range(len(jobs))]
        metrics = {"last": [one["last"] for one in found], self.best: [one["best"] for one in found]}
        size = found[0]["images"]
        protocol = found[0]["protocol"] | {
            "what": SOURCES[row],
            "best_on": self.split,
            "n": len(found),
            "students": f"{repeats} students" + (f" on each of {sets} sets" if sets > 1 else ""),
            "looks": found[0]["looks"],
            "chosen_epochs": [one["epoch"] for one in found],
            "classes": self.classes,
        }
        if self.split == "val":
            protocol |= {"holdout": self.cfg.judge.holdout}
        if sets > 1:
            each = [mean_std(one["best"] for one in found[g * repeats : (g + 1) * repeats])[0] for g in range(sets)]
            protocol |= {"sets": [str(path) for path in self.inputs.folders], "best_of_each_set": each}
        return {"name": prefix + row, "size": size, "metrics": summarise(metrics), "protocol": protocol}

    def _student(self, row: str, network: str, generation: int, repeat: int, progress: Path) -> dict[str, Any]:
        """What one student scored, out of its file where that is there."""
        photos = self.images.photos(self.images.files(row, generation, repeat), f"{network}, {row}")
        students = self._students(network, photos, generation, row == "full")
        path = progress / f"{row}-{network}-{generation}-{repeat}-{self._digest(students, network, repeat)[:16]}.json"
        if path.is_file():
            return read_student(path)
        train = one_by_one(students.train)
        report = score_students(train, students.score, [repeat], students.epochs, self.split, "acc", students.visited)
        found = {
            "last": report.last["acc"][0],
            "best": report.metrics["acc"][0],
            "epoch": report.protocol["chosen_epochs"][0],
            "looks": len(students.visited),
            "images": len(photos),
            "protocol": students.protocol,
        }
        write_signed(path, found)
        return found

    def _students(
        self, network: str, photos: Photos, generation: int, full: bool, teacher: Teacher | None = None
    ) -> PhotoStudents:
        """Students of a network on these images; `full`: all there are, for --full_epochs; `teacher`: another."""
        cfg, dataset = self.cfg, self.images.catalogue.dataset
        student = replace(cfg.student, epochs=cfg.judge.full_epochs) if full else cfg.student
        ipc = max(1, len(photos) // self.classes) if full else self.images.ipc
        given = (photos, self.tests, self.classes, ipc, derive_seed(cfg.run.seed, "eval", generation), self.device)
        if cfg.protocol == "minimax":
            return HardLabels(student, cfg.hard.of(network), *given, dataset, f"{photos.what},")
        teacher = teacher or self._teacher(network)
        return SoftLabels(student, cfg.soft.of(network), *given, teacher, dataset, f"{photos.what},")

    def _teacher(self, network: str) -> Teacher:
        """The teacher, tried on the test images; networks of one size share it."""
        cfg, idents, dataset = self.cfg, self.images.real.idents, self.images.catalogue.dataset
        size = cfg.student.size or preset_size(dataset, self.classes, (cfg.teacher.arch_name, network))
        if size not in self.teachers:
            wnids = wordnet_names()[0]
            rows = [wnids.index(ident) for ident in idents] if {*idents} <= {*wnids} else None
            self.teachers[size] = open_teacher(
                published_teacher(cfg.teacher, rded_name(self.inputs.data, cfg.inputs), self.classes),
                size,
                tested_size(size),
                idents,
                lambda: self.images.photos(self.images.real.kept, "training"),
                self.tests["test"],
                self.inputs.home,
                cfg.run.seed,
                self.device,
                rows,
            )
            found = self.teachers[size]
            print(f"teacher {found.arch} ({found.source}): {found.accuracy:.1f} % of the test images")
        return self.teachers[size]

    def _digest(self, students: PhotoStudents, network: str, repeat: int) -> str:
        """Of all that a student's result depends on."""
        cfg = self.cfg
        own = cfg.hard.of(network) if cfg.protocol == "minimax" else cfg.soft.of(network)
        teacher = getattr(students, "teacher", None)
        weights = [] if teacher is None else [part for item in teacher.net.state_dict().items() for part in item]
        return digest(
            [students.protocol, students.epochs, sorted(students.visited), students.seed, repeat, self.split],
            [flat(students.student), flat(own), self.images.real.idents],
            [students.photos.content(), self.contents],
            *weights,
        )
