"""What a student CLIP leaves behind to look at: its scores, how it learned, and what it sees in some test images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from data.benchmarks import LabelledSet
from methods.core.charts import Curve
from methods.core.report import Page, Pair, Row, write_report
from methods.core.results import readable, recorded_rows, series, shortened
from utils.errors import UserError
from utils.files import atomic, check_written, read_json, write_json
from utils.metrics import format_mean_std
from utils.parsing import is_below, parse_yaml
from utils.pictures import open_image
from utils.run import read_log
from utils.scores import MULTI

FORMAT = 1  # of the list of examples; before it, a list had no number and was nothing else
EXAMPLES = 8  # images of a data set on the page
SIDE = 160  # pixels of one, at most
TOP = 3  # classes that are named for it
_FACTS = ("student", "teacher", "batch_size", "epochs", "base_lr", "use_pvl_loss", "use_udist_loss", "amp", "seed")


def score_rows(records: Sequence[dict[str, Any]]) -> tuple[list[Row], tuple[str, ...]]:
    """Records as a table: a row for each data set and mode, a column for each network; and the columns.

    Not the other way around: twenty data sets side by side fit on no page. Scores are words: a column's bars and its
    best would compare data sets.
    """
    found: dict[str, Row] = {}
    networks: dict[str, None] = {}
    for record in records:
        how = record["protocol"]
        ((_, score),) = record["metrics"].items()
        name, networks[how["network"]] = how["network"], None
        said = record["name"].removeprefix(f"{name}, ")
        row = found.setdefault(said, _row(said, record))
        several = len(score["values"]) > 1  # one number has no deviation
        row.words[name] = format_mean_std(score["mean"], score["std"]) if several else f"{score['mean']:.1f}"
    return list(found.values()), ("metric", "chance", *networks)


def _row(said: str, record: dict[str, Any]) -> Row:
    metric, classes = record["protocol"]["metric"], record["protocol"]["classes"]
    words = {"metric": metric}
    if metric == "roc_auc":
        words["chance"] = "50.0"
    elif metric != MULTI and classes:
        words["chance"] = f"{100 / classes:.1f}"
    return Row(said, {}, record["size"], words=words)


def save_examples(folder: Path, sets: Mapping[str, LabelledSet], shown: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write some test images of each data set, and the classes that each network finds likeliest, to `folder`."""
    told = []
    for name, scores in shown.items():
        listing = sets[name].split("test")
        for row in _spread(listing.labels):
            file = f"examples/{name}-{row}.png"
            with atomic(folder / file) as temporary:
                temporary.write_bytes(_thumbnail(listing.pictures.image(row)))
            guesses = [f"{network}: {_top(found[row], sets[name].words)}" for network, found in scores.items()]
            told.append({"file": file, "text": " · ".join([_true(listing.labels[row], sets[name].words), *guesses])})
    if told:
        write_json(folder / "examples.json", {"format": FORMAT, "examples": told})


def refresh_page(folder: Path) -> None:
    """Write report.html of a run of distill.py, with the evaluations made since; nothing where there is no run."""
    path = folder / "config.yaml"
    if not path.is_file():
        return
    try:
        known = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError:
        return  # nothing that a page could be about
    if isinstance(known, dict) and known.get("method") == "dimefm" and isinstance(known.get("distill"), dict):
        with readable(folder):
            write_report(folder, clip_page(folder, known["distill"]))


def clip_page(folder: Path, config: dict[str, Any]) -> Page:
    """The page of a run: scores, losses and agreement with the teacher, examples, settings."""
    records = recorded_rows(folder, judged_by)
    rows, columns = score_rows(records)
    notes = dict.fromkeys(note for record in records for note in record["protocol"]["notes"])
    about = dict.fromkeys(
        f"{one['protocol']['data']}, {one['protocol']['protocol']}: {one['protocol']['about']}" for one in records
    )
    return Page(
        title="A small CLIP from unpaired images and sentences",
        subtitle=f"{config.get('student', '')} · learned from {config.get('teacher') or 'the teacher of its features'}",
        rows=rows,
        facts={name: config[name] for name in _FACTS if name in config},
        curves=_curves(folder),
        pairs=_examples(folder),
        shown="Test images, and what they are taken for",
        columns=columns,
        unit="images",
        note="\n".join(["; ".join(about), *notes]),
    )


def judged_by(config: dict[str, Any]) -> str:
    """What tells two evaluations of the same thing apart."""
    said = [f"{config['num_shots']} shots"] if config["num_shots"] > 0 else []
    said += [config["templates"]] * (config["templates"] != "auto")
    said += [f"names {config['class_names']}"] * (config["class_names"] != "auto")
    said += ["no search"] * bool(config["no_tuning"] and "linear_probe" in config["mode"])
    return ", ".join(said + ["elevater_compat"] * bool(config["elevater_compat"]))


def _curves(folder: Path) -> list[Curve]:
    history = read_log(folder)
    losses = {name: shortened(points) for name, points in series(history, "loss", "vl", "pvl", "udist").items()}
    agreed = series(history, "agreement")
    curves = [Curve("Losses", "step", losses, log_y=True)] if losses else []
    return curves + ([Curve("Agreement with the teacher, %", "step", agreed)] if agreed else [])


def _examples(folder: Path) -> list[Pair]:
    """The examples of the last evaluation that has some."""
    files = sorted(folder.glob("eval/*/examples.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        return []
    told, remedy = read_json(files[-1], "list of examples"), "remove it to draw the page without examples"
    if isinstance(told, dict):
        check_written(files[-1], told, FORMAT, ("examples",), f"{files[-1]} is no list of examples", remedy)
        told = told["examples"]
    try:
        strange = next((one["file"] for one in told if not is_below(one["file"])), "")
        if strange:
            raise UserError(f"{files[-1]} has the picture {strange!r}, which is not beside it; {remedy}")
        return [Pair(None, _picture(files[-1].parent / one["file"]), after_text=str(one["text"])) for one in told]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{files[-1]} is no list of examples ({error!r}); {remedy}") from None


def _picture(path: Path) -> bytes:
    """The content of a PNG file; UserError for what is none, which should not be in a page that is passed on."""
    content = path.read_bytes()
    try:
        open_image(content, ("PNG",)).close()
    except Exception:  # PIL raises a dozen kinds
        raise UserError(f"{path} is no PNG picture; remove the list of examples beside its folder") from None
    return content


def _spread(labels: Tensor) -> list[int]:
    """Rows of some images, spread over all of them."""
    count = min(EXAMPLES, len(labels))
    return [(2 * place + 1) * len(labels) // (2 * count) for place in range(count)]


def _thumbnail(image: Any) -> bytes:
    image = image.copy()
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue()


def _true(label: Tensor, words: Sequence[str]) -> str:
    own = label.nonzero()[:, 0].tolist() if label.ndim else [int(label)]
    return f"is {', '.join(words[k] for k in own) or 'none of them'}"


def _top(probabilities: Tensor, words: Sequence[str]) -> str:
    best = probabilities.topk(min(TOP, len(words)))
    return ", ".join(
        f"{words[k]} {100 * p:.0f} %" for p, k in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    )
