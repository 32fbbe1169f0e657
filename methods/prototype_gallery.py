"""What a distillation into prototypes leaves behind to look at: a sheet of each class, a grid of images, one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.catalogue import CatalogueConfig
from methods.core.report import Curve, Page, Row, View, write_report
from methods.core.results import as_row, protocols_of, readable, recorded_rows, series, shortened
from methods.prototype_files import Manifest, Prototypes
from methods.prototype_inputs import InputConfig, default_protocol
from methods.prototype_pictures import FURTHER, Shown, excerpt, noted, save_grid, save_sheet
from methods.prototype_synthesis import planned
from methods.prototype_texts import TextConfig, score
from utils.config import options_of
from utils.parsing import parse_yaml
from utils.run import read_log

SHEETS = 12  # on the page, at most
BYTES = 12_000_000  # of them, about; sheets of many photographs are large
SHAPE = 0.85  # height to width of what the page shows of a sheet: a screen
CLASSES = 100  # of which the grid may show images
METRICS = ("last", "best on test", "best on val", "n")
GRID = "images.png"
_FOUND = ("size", "contamination", "latent", "medoid", "threshold", "tpk", "text_match", "score")
_DRAWN = (
    *("strength", "guidance_scale", "num_inference_steps", "scheduler", "negative_prompt", "prompt_template"),
    *("long_prompt", "seed"),
)


class PrototypeGallery:
    """The sheets and the page of a run folder, filled class by class.

    images       where the drawn images are, `<class>/<class>-image<i>-<j>.png`
    train_root   where the training images are, `<class>/<file>`; None where they are not at hand
    config       the command's options
    """

    def __init__(self, folder: Path, images: Path, train_root: Path | None, config: dict[str, Any]) -> None:
        self.folder, self.images, self.config = folder, images, config
        self.train_root = train_root or None
        self._first: list[tuple[str, list[Path]]] = []  # names and images, for the grid
        self._classes: list[str] = []

    def add(self, found: Prototypes) -> None:
        """Write a class's sheet; a picture that cannot be read is grey there."""
        plan = planned(self.images, found, self.config["ipc"])
        members = found.members if found.files else [None] * len(found.texts)
        rows = [
            self._shown(found, number, [image.path for image in plan if image.prototype == number], members[number])
            for number in range(len(found.texts))
        ]
        save_sheet(self.folder / "sheets" / f"{found.ident}.png", found.label, _counted(found, len(plan)), rows)
        self._classes.append(found.ident)
        if len(self._first) < CLASSES:
            self._first.append((found.label.split(",")[0], [image.path for image in plan]))

    def finish(self) -> Path:
        """Write the grid and the page, to be called when all classes are there; the page's path."""
        if self._first:
            save_grid(self.folder / GRID, self._first)
        return write_report(self.folder, prototypes_page(self.folder, self.config, self._classes))

    def _shown(self, found: Prototypes, number: int, drawn: list[Path], members: list[str] | None) -> Shown:
        """A prototype's row; `members` of its cluster, None where these are not known, as of published prototypes."""
        text = found.texts[number]
        if members is None:
            return Shown(drawn, text)
        source, root, how = found.text_files[number], self.train_root, TextConfig(text_match=self.config["text_match"])
        words = [(word, count, score(text, {word: 1}, how) > 0) for word, count in found.words[number]]
        origin = f"caption of {Path(source).name}" if source else "the label, for want of a caption"
        note = f"{len(members):,} image{'s' * (len(members) > 1)} · {origin}"
        if root is None:
            return Shown(drawn, text, words=words, note=note)
        files = [root / name for name in _spread(members, [found.nearest[number], source])]
        if source:
            note += " (framed)"
        return Shown(drawn, text, files, root / source if source else None, words, note)


def refresh_page(folder: Path) -> None:
    """Write report.html again with the evaluations made since; nothing where `folder` is no run of distill.py."""
    path, classes = folder / "config.yaml", Manifest(folder).section("prototypes").get("classes")
    if not (path.is_file() and classes and (folder / "sheets").is_dir()):
        return
    try:
        known = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # nothing that a page could be about
    if isinstance(known, dict) and known.get("method") == "vlcp" and isinstance(known.get("distill"), dict):
        with readable(folder):
            write_report(folder, prototypes_page(folder, known["distill"], classes))


def prototypes_page(folder: Path, config: dict[str, Any], classes: Sequence[str]) -> Page:
    """The page of a distillation: results, how the model was tuned, the images, and where each of them came from."""
    rows, ipc = recorded_rows(folder, judged_by), config["ipc"]
    data, tuned = _part(CatalogueConfig, config).row, _tuned(folder, config)
    views, further = _views(folder, classes)
    return Page(
        title=f"{len(classes) * ipc:,} images from prototypes",
        subtitle=f"{data} · {len(classes):,} classes · {ipc} a class",
        rows=[table_row(row) for row in rows],
        facts=_facts(config, tuned) | further,
        curves=_curves(tuned),
        views=views,
        columns=columns(rows),
        unit="images",
        note=protocols_of(rows),
    )


def columns(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """The columns of a table of recorded rows."""
    return tuple(name for name in METRICS if name == "n" or any(name in row["metrics"] for row in rows))


def table_row(record: dict[str, Any]) -> Row:
    """A recorded row as tables show it."""
    full = "full" in record["name"].split(", ")
    return replace(as_row(record), words={"n": str(record["protocol"]["n"])}, reference=full)


def judged_by(config: dict[str, Any]) -> str:
    """The protocol and the network of an evaluation; rows of several networks name these themselves."""
    protocol = config["protocol"] or ("rded" if config["stud_name"] else "")
    protocol = protocol or default_protocol(_part(CatalogueConfig, config), _part(InputConfig, config))
    networks = (config["stud_name"] or [config["arch_name"]]) if protocol == "rded" else config["net_type"]
    said = [protocol, *(networks if len(networks) == 1 else [])]
    said += [f"{config[name]} {text}" for name, text in (("ipc", "a class"), ("epochs", "epochs")) if config[name]]
    return ", ".join(said + [config["tag"]] * bool(config["tag"]))


def _part(kind: type, config: dict[str, Any]) -> Any:
    """The section `kind` of a flat config."""
    return kind(**{name: config[name] for name in options_of(kind) if name in config})


def _spread(members: list[str], first: list[str]) -> list[str]:
    """The members of a cluster to show: the `first` ones, and others spread over the rest."""
    chosen = [name for name in dict.fromkeys(first) if name in members]
    others = [name for name in members if name not in chosen]
    count = min(len(others), 1 + FURTHER - len(chosen))
    return chosen + [others[place * len(others) // count] for place in range(count)]


def _counted(found: Prototypes, drawn: int) -> str:
    said = [found.ident] if found.ident != found.label else []
    if found.files:
        out = len(found.files) - sum(found.sizes)
        told = f", {out:,} of them {'outliers' if out > 1 else 'an outlier'}" if out else ""
        said.append(f"{len(found.files):,} training images{told}")
    said.append(f"{len(found.texts):,} prototypes")
    return " · ".join(said + ([f"{drawn:,} images"] if drawn > len(found.texts) else []))


def _views(folder: Path, classes: Sequence[str]) -> tuple[list[View], dict[str, str]]:
    """The pictures of the page, and where those are that it does not show."""
    views = []
    if (folder / GRID).exists():
        shown = noted(folder / GRID, "classes")
        text = f"images of the first {shown} of {len(classes):,} classes" if shown < len(classes) else "all images"
        views.append(View((folder / GRID).read_bytes(), text, wide=True))
    size, rest = 0, []
    for ident in classes:
        path = folder / "sheets" / f"{ident}.png"
        if not path.is_file():
            continue
        if len(views) > SHEETS or size > BYTES:
            rest.append(path.name)
            continue
        picture, shown, rows = excerpt(path, SHAPE)
        size += len(picture)
        some = f", the first {shown} of {rows} prototypes" if shown < rows else ""
        views.append(View(picture, f"sheets/{path.name}{some}", wide=True))
    more = f" and {len(rest) - SHEETS:,} more" if len(rest) > SHEETS else ""
    return views, {"further sheets": f"in sheets: {', '.join(rest[:SHEETS])}{more}"} if rest else {}


def _facts(config: dict[str, Any], tuned: Path) -> dict[str, Any]:
    """What a distillation was asked for, with the model and the captions that it had."""
    published, buffers = config["prototype_path"], Manifest(tuned)
    facts = {"model": config["diffusion_checkpoints_path"]}
    if base := buffers.section("model").get("base"):
        facts["model"] = f"{base}, tuned"
    captions = buffers.section("captions")
    if published:
        facts["prototypes"] = published
    elif config["metajson_file"]:
        facts["captions"] = config["metajson_file"]
    elif captions:
        facts["captions"] = f"{captions['count']:,}, {captions['by']}"
    facts |= {name: config[name] for name in (*(() if published else _FOUND), *_DRAWN)}
    return {name: value for name, value in facts.items() if value != ""}


def _tuned(folder: Path, config: dict[str, Any]) -> Path:
    """The folder in which buffer.py tuned the model that a distillation drew with."""
    named = config["diffusion_checkpoints_path"]
    if not named:
        return Path(config["buffer_path"] or folder / "buffers")
    place = Path(named).expanduser()
    return place.parent if place.name == "model" else place


def _curves(folder: Path) -> list[Curve]:
    """How a model was tuned, if that is known."""
    history = read_log(folder)
    first = min((row["step"] for row in history if "loss" in row), default=0)  # the autoencoder's steps come before
    found = {name: shortened(points) for name, points in series(history, "loss", "vae_loss").items()}
    curves = []
    if "loss" in found:
        steps, losses = found["loss"]
        curves.append(Curve("Loss of the denoiser", "step", {"loss": ([step - first for step in steps], losses)}))
    if "vae_loss" in found:
        curves.append(Curve("Loss of the autoencoder", "step", {"loss": found["vae_loss"]}, log_y=True))
    return curves
