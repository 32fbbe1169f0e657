"""What a distillation of labelled images leaves behind to look at: grids, textures, published tensors, and one page."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.images import ImageData
from data.zca import ZCA
from methods.core.gallery import Gallery, first_state
from methods.core.report import Curve, Page, Pair, write_report
from methods.core.results import as_row, protocols_of, readable, recorded_rows, series
from methods.image_files import as_targets, publish
from utils.files import atomic, load_tensors, save_tensors, write_json
from utils.pictures import clip_std, png_bytes, save_grid, to_uint8
from utils.run import Run, read_log

SHOWN = 40  # images on the page
METRICS = ("acc", "gain", "lrs", "ars")
MANY = 50  # images a class from which on grids are drawn only when asked for, as published


def image_gallery(
    run: Run,
    data: ImageData,
    state: Callable[[], dict[str, Any]],
    meta: dict[str, Any],
    draw: bool,
    finest: Callable[[], dict[str, Any]],
    keep: int = 0,
) -> Gallery:
    """The gallery of a run that learns images; `draw` asks for grids at each evaluation, `keep` is the limit of
    files."""

    fitted = functools.partial(data.pictures, fit=True)

    def show(step: int, state: dict[str, Any], best: bool) -> None:
        folder, images = run.folder, product(state)
        if best:
            publish(folder, images, state["labels"], state["lr"])
            # What the tensors alone do not tell: without it nobody can judge them as they were meant.
            write_json(folder / "card_best.json", {"lr": float(state["lr"])} | state["meta"])
        if best and draw:
            save_pictures(folder / "pictures_best", data.pictures(images), len(data.classes))
            if data.zca is not None:  # for programs that know of no whitening; as published
                save_tensors(folder / "images_zca_best.pt", data.zca.unwhiten(images.to(data.device)).cpu())
        if draw:
            save_grids(folder, step, images, data)
        write_report(folder, images_page(folder, first_state(folder, state), state, fitted))

    return Gallery(run, state, meta, show, finest, keep)


def product(state: dict[str, Any]) -> Tensor:
    """The images that a file is about: their average over the outer steps, where that was asked for."""
    return state.get("average", state["images"])


def save_grids(folder: Path, step: int, images: Tensor, data: ImageData) -> None:
    """Grids of ten a row: each picture stretched to its own range; all of them cut at 2.5 standard deviations; the same
    with whitening undone; and of canvases, each laid out 3 × 3, where a seam would show."""
    size = images.shape[-1]
    upscale = 4 if size <= 64 else 1  # small images in blocks of 4 × 4, as published
    views = {"synthetic_images": images}
    if data.zca is not None:
        views["dewhitened_images"] = data.zca.unwhiten(images.to(data.device)).cpu()
    for name, view in views.items():
        view = view.expand(-1, 3, -1, -1)  # grey is three equal colours
        save_grid(folder / f"{name}_{step}.png", view, upscale=upscale)
        save_grid(folder / f"clipped_{name}_{step}_std_2.5.png", clip_std(view), upscale=upscale)
    if size > data.size:
        save_grid(folder / f"textures_{step}.png", clip_std(images).expand(-1, 3, -1, -1).repeat(1, 1, 3, 3), per_row=5)


def save_pictures(folder: Path, pictures: Tensor, classes: int) -> None:
    """Each picture (N, 3, H, W) uint8, in class order, as `<class number>/<number in it>.png`: a folder of images."""
    each = len(pictures) // classes
    for number, picture in enumerate(pictures):
        with atomic(folder / f"{number // each:04d}" / f"{number % each:04d}.png") as temporary:
            temporary.write_bytes(png_bytes(picture))


def refresh_page(folder: Path) -> None:
    """Write report.html again with the evaluations made since; nothing where `folder` is no run of distill.py."""
    start, best = folder / "distilled_0.pt", folder / "distilled_best.pt"
    if not (start.exists() and best.exists()):
        return
    before, after = (load_tensors(path, "distilled file") for path in (start, best))
    if not all(isinstance(state, dict) and "meta" in state for state in (before, after)):
        return
    zca, meta = after.get("zca"), after["meta"]

    def pictures(images: Tensor) -> Tensor:
        if zca:
            return to_uint8(ZCA.from_state(zca).visible(images), fit=True).expand(-1, 3, -1, -1)
        return to_uint8(images, meta["mean"], meta["std"], fit=True).expand(-1, 3, -1, -1)

    with readable(folder):
        write_report(folder, images_page(folder, before, after, pictures))


def images_page(
    folder: Path, before: dict[str, Any], after: dict[str, Any], pictures: Callable[[Tensor], Tensor]
) -> Page:
    """The page of a distillation: results, loss, rate and accuracy over time, and images before and after.

    before, after   two distilled files, with their `meta`; pictures   learned images → (N, 3, H, W) uint8
    """
    history, meta = read_log(folder), after["meta"]
    rows = recorded_rows(folder, judged_by)
    logged = sorted({name for row in history for name in row if name.startswith(("val_acc", "test_acc"))})
    chosen = _spread(len(after["images"]))
    pngs = [[png_bytes(image) for image in pictures(product(state)[chosen])] for state in (before, after)]
    names = [label_text(state, meta, chosen) for state in (before, after)]
    config = meta["config"]
    asked = (
        "dataset",
        "model",
        "res",
        "zca",
        "ipc",
        "syn_steps",
        "expert_epochs",
        "min_start_epoch",
        "max_start_epoch",
    )
    asked += ("batch_syn", "labels", "lr_img", "lr_lr", "dsa_strategy", "mode", "seed")
    curves = [
        Curve("Matching loss", "step", series(history, "loss")),
        Curve("Learned inner rate", "step", series(history, "lr_net"), log_y=True),
        Curve("Accuracy while distilling, %", "step", series(history, *logged)),
    ]
    return Page(
        title=f"{len(after['images'])} distilled {'textures' if config['texture'] else 'images'}",
        subtitle=f"{config['dataset']} · {config['model']} · {config['ipc']} a class",
        rows=[as_row(row) for row in rows],
        facts={name: config[name] for name in asked},
        curves=[curve for curve in curves if curve.series],
        pairs=[Pair(*four) for four in zip(*pngs, *names, strict=True)],
        columns=METRICS,
        unit="images",
        note=protocols_of(rows),
    )


def _spread(count: int) -> Tensor:
    """Up to SHOWN places, spread over all classes."""
    return torch.linspace(0, count - 1, min(count, SHOWN)).round().long()


def label_text(state: dict[str, Any], meta: dict[str, Any], chosen: Tensor) -> list[str]:
    """What each image is of, in words: its class, or the likeliest classes of a soft label."""
    targets = as_targets(state["labels"][chosen], meta["labels"] == "learned")
    if targets.dim() == 1:
        return [meta["classes"][label] for label in targets.tolist()]
    likely = [row.topk(min(2, len(row))) for row in targets]
    return [
        ", ".join(
            f"{meta['classes'][label]} {share:.0%}" for share, label in zip(*map(Tensor.tolist, top), strict=True)
        )
        for top in likely
    ]


def judged_by(config: dict[str, Any]) -> str:
    """The protocol of an evaluation; its rows name their networks themselves."""
    return config["protocol"]
