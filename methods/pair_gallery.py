"""What a distillation of pairs leaves behind to look at: files of pairs, picture grids, captions, and one page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from methods.core.gallery import Gallery, first_state
from methods.core.report import Curve, Page, Pair, write_report
from methods.core.results import as_row, protocols_of, readable, recorded_rows, series
from methods.core.retrieval import Corpus
from utils.files import load_tensors, write_text
from utils.pictures import clip_std, png_bytes, save_grid, to_uint8
from utils.run import Run, read_log

SHOWN = 24  # pairs on the page
PUBLISHED_GRID = 90  # pictures in a grid, as published


def pair_gallery(
    run: Run, corpus: Corpus, state: Callable[[], dict[str, Any]], meta: dict[str, Any], draw: bool, keep: int = 0
) -> Gallery:
    """The gallery of a run that learns pairs; `draw` asks for grids and captions at each evaluation, `keep` is the
    limit of files."""

    def show(step: int, state: dict[str, Any], best: bool) -> None:
        folder = run.folder
        if draw:
            images = state["image"][:PUBLISHED_GRID]
            save_grid(folder / f"synthetic_images_{step}.png", images, upscale=4)
            save_grid(folder / f"clipped_synthetic_images_{step}_std_2.5.png", clip_std(images), upscale=4)
            captions = nearest_captions(corpus, state["text"])
            write_text(_sentences(folder, step), "\n".join(captions) + "\n")
        start = first_state(folder, state)
        captions = [nearest_captions(corpus, part["text"][:SHOWN]) for part in (start, state)]
        write_report(folder, pairs_page(folder, start, state, captions))

    return Gallery(run, state, meta, show, limit=keep)


def refresh_page(folder: Path) -> None:
    """Write report.html again with the evaluations made since; nothing where `folder` is no run of distill.py.

    The captions are those that the run wrote: an evaluation may know another data set or text encoder.
    """
    start, best = folder / "distilled_0.pt", folder / "distilled_best.pt"
    if start.exists() and best.exists():
        states = [load_tensors(path, "distilled file") for path in (start, best)]
        if all("meta" in state for state in states):
            captions = [_written_captions(folder, state) for state in states]
            with readable(folder):
                write_report(folder, pairs_page(folder, *states, captions))


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
    rows = recorded_rows(folder, judged_by)
    mean, std = meta["mean"], meta["std"]
    shown = slice(0, SHOWN)
    pictures = [[png_bytes(image) for image in to_uint8(state["image"][shown], mean, std)] for state in (before, after)]
    pairs = [Pair(*four) for four in zip(*pictures, *(texts[shown] for texts in captions), strict=True)]

    marks = {
        row["name"]: row["protocol"]["validation_r_mean"] for row in rows if "validation_r_mean" in row["protocol"]
    }
    curves = [
        Curve("Matching loss of each branch", "step", series(history, "loss_img", "loss_txt")),
        Curve("Learned inner rates", "step", series(history, "lr_img", "lr_txt"), log_y=True),
        Curve("Validation r_mean, %", "step", series(history, "val_r_mean"), marks=marks),
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
        note=protocols_of(rows),
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


def judged_by(config: dict[str, Any]) -> str:
    """The protocol and the towers of an evaluation."""
    return f"{config['protocol']}, {config['image_encoder']} + {config['text_encoder']}"
