"""What a distillation of pairs leaves behind to look at: files of pairs, picture grids, captions, and one page."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.evaluation import Report
from methods.core.report import Curve, Page, Pair, Row, write_report
from methods.core.retrieval import Corpus
from utils.files import atomic, load_tensors, read_json, save_tensors, write_text
from utils.pictures import clip_std, png_bytes, save_grid, to_uint8
from utils.run import Run, read_log

SHOWN = 24  # pairs on the page
PUBLISHED_GRID = 90  # pictures in a grid, as published


class Gallery:
    """The run folder of a distillation as it fills.

    state()   the learned pairs, in the layout of a distilled file
    meta      what a distilled file notes beside them
    """

    def __init__(
        self, run: Run, corpus: Corpus, state: Callable[[], dict[str, Any]], meta: dict[str, Any], draw: bool
    ) -> None:
        self.run, self.corpus, self.state, self.meta, self.draw = run, corpus, state, meta, draw
        self._report: Report | None = None

    def scored(self, step: int, report: Report) -> None:
        """Log what this step's pairs scored on validation."""
        self._report = report
        self.run.log(step, **{f"val_{name}": mean for name, (mean, _) in report.mean_std().items()})

    def keep(self, step: int, best: bool) -> None:
        """Write `distilled_<step>.pt`, pictures and page; a copy as `distilled_best.pt` where it scored best so far."""
        folder, state = self.run.folder, self.state()
        meta = self.meta | {"step": step}
        if self._report is not None:
            meta["validation"] = {name: list(pair) for name, pair in self._report.mean_std().items()}
        path = folder / f"distilled_{step}.pt"
        save_tensors(path, state | {"meta": meta})
        if best or not (folder / "distilled_best.pt").exists() or not self._report:
            with atomic(folder / "distilled_best.pt") as temporary:
                shutil.copyfile(path, temporary)
        if self.draw:
            images = state["image"][:PUBLISHED_GRID]
            save_grid(folder / f"synthetic_images_{step}.png", images, upscale=4)
            save_grid(folder / f"clipped_synthetic_images_{step}_std_2.5.png", clip_std(images), upscale=4)
            captions = nearest_captions(self.corpus, state["text"])
            write_text(_sentences(folder, step), "\n".join(captions) + "\n")

        first = folder / "distilled_0.pt"
        start = load_tensors(first, "distilled file") if first.exists() else state  # old files may have been removed
        captions = [nearest_captions(self.corpus, part["text"][:SHOWN]) for part in (start, state)]
        write_report(folder, pairs_page(folder, start, state | {"meta": meta}, captions))


def refresh_page(folder: Path) -> None:
    """Write report.html again with the evaluations made since; nothing where `folder` is no run of distill.py.

    The captions are those that the run wrote: an evaluation may know another data set or text encoder.
    """
    start, best = folder / "distilled_0.pt", folder / "distilled_best.pt"
    if start.exists() and best.exists():
        states = [load_tensors(path, "distilled file") for path in (start, best)]
        if all("meta" in state for state in states):
            write_report(folder, pairs_page(folder, *states, [_written_captions(folder, state) for state in states]))


def _sentences(folder: Path, step: int) -> Path:
    return folder / f"synthetic_sentences_{step}.txt"


def _written_captions(folder: Path, state: dict[str, Any]) -> list[str]:
    path, count = _sentences(folder, state["meta"]["step"]), len(state["text"])
    lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
    return (lines + [""] * count)[:count]


def pairs_page(folder: Path, before: dict[str, Any], after: dict[str, Any], captions: list[list[str]]) -> Page:
    """The page of a distillation: results, losses, rates, recall over time, and pairs before and after.

    before, after   two distilled files, with their `meta`; captions   the nearest ones of each
    """
    history, meta = read_log(folder), after["meta"]
    rows = recorded_rows(folder)
    mean, std = meta["mean"], meta["std"]
    shown = slice(0, SHOWN)
    pictures = [[png_bytes(image) for image in to_uint8(state["image"][shown], mean, std)] for state in (before, after)]
    pairs = [Pair(*four) for four in zip(*pictures, *(texts[shown] for texts in captions), strict=True)]

    def series(*names: str) -> dict[str, tuple[list[float], list[float]]]:
        found = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
        return {name: tuple(map(list, zip(*points, strict=True))) for name, points in found.items() if points}

    marks = {
        row["name"]: row["protocol"]["validation_r_mean"] for row in rows if "validation_r_mean" in row["protocol"]
    }
    curves = [
        Curve("Matching loss of each branch", "step", series("loss_img", "loss_txt")),
        Curve("Learned inner rates", "step", series("lr_img", "lr_txt"), log_y=True),
        Curve("Validation r_mean, %", "step", series("val_r_mean"), marks=marks),
    ]
    config = meta["config"]
    towers = f"{config['image_encoder']} + {config['text_encoder']}"
    asked = ("dataset", "image_encoder", "text_encoder", "image_size", "num_pairs", "syn_steps", "expert_epochs")
    asked += ("max_start_epoch", "lr_img", "lr_txt", "lr_lr", "loss_type", "temperature", "mode", "seed")
    return Page(
        title=f"{len(after['image'])} distilled pairs",
        subtitle=f"{config['dataset']} · {towers} · {config['image_size']} px",
        rows=[as_row(row) for row in rows],
        facts={name: config[name] for name in asked},
        curves=[curve for curve in curves if curve.series],
        pairs=pairs,
        note="; ".join(sorted({row["protocol"]["protocol"] + ": " + row["protocol"]["about"] for row in rows})),
    )


def nearest_captions(corpus: Corpus, texts: Tensor, chunk: int = 65536) -> list[str]:
    """For each learned embedding (N, D) the training caption with the greatest cosine. For the eye only: what trains
    a network is the embedding, not this sentence."""
    train, wanted = corpus["train"], F.normalize(texts.float().to(corpus.device), dim=1)
    score = torch.full((len(wanted),), -torch.inf, device=corpus.device)
    index = torch.zeros(len(wanted), dtype=torch.long, device=corpus.device)
    for at in range(0, len(train.captions), chunk):
        cosines = wanted @ F.normalize(corpus.texts("train", slice(at, at + chunk)), dim=1).T
        found, place = cosines.max(dim=1)
        better = found > score
        score, index = torch.where(better, found, score), torch.where(better, place + at, index)
    return [train.captions[i] for i in index.tolist()]


def recorded_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of every evaluation in a run folder; of two of the same thing the later stands.

    Where they were judged by several protocols or networks, each row's name says which.
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("eval/*/result.json"), key=lambda path: path.stat().st_mtime):
        found = read_json(path, "evaluation")
        config = found["config"]
        how = f"{config['protocol']}, {config['image_encoder']} + {config['text_encoder']}"
        rows |= {(row["name"], how): row for row in found["rows"]}
    several = len({how for _, how in rows}) > 1
    return [row | {"name": f"{name}, {how}"} if several else row for (name, how), row in rows.items()]


def as_row(row: dict[str, Any]) -> Row:
    """A recorded row as the table shows it."""
    metrics = {name: (value["mean"], value["std"]) for name, value in row["metrics"].items()}
    return Row(row["name"], metrics, row["size"], reference=row["name"].startswith("full"))


def as_record(name: str, size: int, report: Report) -> dict[str, Any]:
    """A report as result.json keeps it."""
    means = report.mean_std()
    metrics = {
        metric: {"mean": means[metric][0], "std": means[metric][1], "values": values}
        for metric, values in report.metrics.items()
    }
    return {"name": name, "size": size, "metrics": metrics, "protocol": report.protocol}


def write_result(folder: Path, rows: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write result.json to `folder`, or beside it under the next free number: an earlier result is never replaced."""
    place, number = folder, 1
    while (place / "result.json").exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    write_text(place / "result.json", json.dumps({"rows": rows, "config": config}, indent=1) + "\n")
    return place / "result.json"
