"""What the distillation of a poster leaves behind to look at: pictures, an animation, class map, and one page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data.images import ImageData
from methods.core.gallery import Gallery
from methods.core.report import Curve, Page, View, write_report
from methods.core.results import as_row, protocols_of, readable, recorded_rows, series, shortened
from methods.poster_files import publish
from methods.poster_layout import Layout
from methods.poster_pictures import (
    animation,
    class_map,
    drawn,
    label_picture,
    save_png,
    save_poster,
    top_shares,
    visible,
)
from utils.files import atomic, load_tensors, write_json
from utils.run import Run, read_log

METRICS = ("acc", "gain")
_ASKED = (
    *("dataset", "model", "zca", "zca_kind", "poster_init", "window", "minwindow", "totwindow", "cctype"),
    *("inner_optim", "inner_lr", "distill_batch_size", "lr", "batch_size", "syn_strategy", "real_strategy"),
    *("select", "seed"),
)


class PosterGallery(Gallery):
    """The gallery of a run that learns a poster; `draw` asks for a picture at each evaluation, and the animation;
    `keep` is the limit of files."""

    def __init__(
        self,
        run: Run,
        data: ImageData,
        state: Callable[[], dict[str, Any]],
        meta: dict[str, Any],
        layout: Layout,
        finest: Callable[[], dict[str, Any]],
        draw: bool = True,
        keep: int = 0,
    ) -> None:
        budget = {"ipc": layout.ipc, "patches": len(layout.patches)}
        super().__init__(run, state, meta | budget, self._show, finest, keep)
        self.data, self.layout, self.draw = data, layout, draw
        self._last: int | None = None  # step that was shown

    def _show(self, step: int, state: dict[str, Any], best: bool) -> None:
        folder, data, poster, self._last = self.run.folder, self.data, state["poster"], step
        if best or self.draw or step == 0:
            canvas = visible(poster, self.layout.patches, data.zca, data.mean, data.std)
        if self.draw or step == 0:  # the page shows how it began
            save_poster(folder / f"poster_{step}.png", canvas)
        if best:
            save_poster(folder / "poster.png", canvas)
            save_poster(folder / "poster_raw.png", poster)
            save_png(folder / "poster_classes.png", class_map(drawn(canvas), self.layout, data.classes))
            if "label_map" in state:
                save_png(folder / "labels.png", label_picture(state["label_map"], data.classes))
            publish(folder, poster, state.get("label_map"))
            # What the tensors alone do not tell: without it nobody can judge them as they were meant.
            write_json(folder / "card_best.json", {"lr": float(state["lr"])} | state["meta"])
        if best and self.draw:
            self._animate()
        refresh_page(folder)

    def finish(self) -> None:
        """Make the animation of all evaluations, and the page anew; to be called when the run ends."""
        if self.draw and self._last is not None:
            self._animate()
            refresh_page(self.run.folder)

    def _animate(self) -> None:
        """Write progress.gif of the posters so far; a run that goes on from a checkpoint may find later ones."""
        frames = {int(path.stem.removeprefix("poster_")): path for path in self.run.folder.glob("poster_[0-9]*.png")}
        kept = [frames[number] for number in sorted(frames) if number <= self._last]
        with atomic(self.run.folder / "progress.gif") as temporary:
            temporary.write_bytes(animation(kept, self.layout, self.data.classes))


def refresh_page(folder: Path) -> None:
    """Write report.html again, about the best poster so far and the evaluations made since; nothing where `folder` is
    no run of distill.py."""
    path = folder / "distilled_best.pt"
    if not path.exists():
        return
    best = load_tensors(path, "distilled file", mmap=True)  # a whitening in it may have gigabytes
    if isinstance(best, dict) and "poster" in best and "meta" in best:
        with readable(folder):
            write_report(folder, poster_page(folder, best))


def poster_page(folder: Path, best: dict[str, Any]) -> Page:
    """The page of a distillation: results, curves, the poster before and after, and what its labels say.

    best   a distilled file, with its `meta`; the pictures are those in `folder`
    """
    history, meta = read_log(folder), best["meta"]
    config, (height, width) = meta["config"], best["poster"].shape[1:]
    rows = recorded_rows(folder, judged_by)
    facts = _budget(best) | {name: config[name] for name in _ASKED}
    return Page(
        title="A distilled poster",
        subtitle=f"{config['dataset']} · {width} × {height} pixels · {meta['ipc']:.2f} images a class",
        rows=[as_row(row) for row in rows],
        facts=facts,
        curves=_curves(history),
        views=_views(folder, meta),
        columns=columns(rows),
        unit="pixels",
        note="\n".join([protocols_of(rows), *(f"{row['name']}: {row['protocol']['what']}" for row in rows)]),
    )


def columns(rows: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    """METRICS, and then the accuracies after so many steps that any of some recorded rows has."""
    found = {name for row in rows for name in row["metrics"] if name.startswith("acc@")}
    return METRICS + tuple(sorted(found, key=lambda name: int(name.removeprefix("acc@"))))


def judged_by(config: dict[str, Any]) -> str:
    """How an evaluation counts; its rows name their networks themselves."""
    return f"{max(config['eval_steps'])} steps, {config['select_step']}"


def _budget(best: dict[str, Any]) -> dict[str, str]:
    """What a poster costs, and what its labels say."""
    poster, label_map, meta = best["poster"], best.get("label_map"), best["meta"]
    channels, height, width = poster.shape
    labels = 0 if label_map is None else label_map.numel()
    rows, across = len(meta["order"]), len(meta["order"][0])
    facts = {
        "poster": f"{width} × {height} × {channels}",
        "pixels": f"{width * height:,}",
        "images a class": f"{meta['ipc']:.3f}",
        "bytes with labels": f"{4 * (poster.numel() + labels):,}",
        "patches": f"{meta['patches']:,}",
        "class grid": f"{across} × {rows}",
        "chosen at step": f"{meta['step']:,}",
    }
    if label_map is None:
        facts["labels"] = f"fixed, {meta['config']['label_mode']}"
    else:
        shares, tops = top_shares(label_map)
        facts["labels"] = f"learned, {tops.shape[1]} × {tops.shape[0]} cells, {labels:,} values"
        facts["mean top share"] = f"{float(shares.mean()):.1%}"
        facts["classes that top a cell"] = f"{len(tops[shares > 0].unique())} of {len(label_map)}"
    return facts


def _curves(history: Sequence[dict[str, float]]) -> list[Curve]:
    """The curves of a run's log, where it has them."""
    judged = sorted({name for row in history for name in row if name.startswith(("train_", "val_", "test_"))})
    accuracies = [name for name in judged if name.partition("_")[2].startswith("acc@")]
    accuracies = accuracies or [name for name in judged if name.endswith("_acc")]
    accuracies.sort(key=lambda name: int(name.partition("@")[2] or 0))
    losses = [name for name in judged if name.endswith("_loss")]

    def curve(title: str, names: Sequence[str], log_y: bool = False) -> Curve:
        found = {name: shortened(points) for name, points in series(history, *names).items()}
        return Curve(title, "step", found, log_y=log_y)

    curves = [
        curve("Outer loss", ["loss"]),
        curve("Accuracy while distilling, %", accuracies),
        curve("Loss of networks while distilling", losses),
        curve("Gradient norm of the poster", ["grad_norm"], log_y=True),
        curve("Inner steps before the window", ["warmup"]),
        curve("Learned inner rate", ["lr"], log_y=True),
    ]
    return [curve for curve in curves if curve.series]


def _views(folder: Path, meta: dict[str, Any]) -> list[View]:
    """The pictures in a run folder that the page shows."""
    config = meta["config"]
    how = "whitening undone" if meta["zca"] else "normalisation undone"
    how += ", but for each patch's own brightness" if meta["zca"] and config["zca_kind"] == "podd" else ""
    wanted = [
        ("poster_0.png", "before distillation", False),
        ("poster.png", f"after step {meta['step']:,}; {how}", False),
        ("poster_classes.png", "the area of each class", True),
        ("labels.png", "the label map: in each cell the class with the largest share, paler where that is less", True),
        ("poster_raw.png", "as networks see it", False),
        ("progress.gif", "how it was learned: evaluation by evaluation, all drawn to one scale", False),
    ]
    found = [(folder / name, text, wide) for name, text, wide in wanted if (folder / name).exists()]
    return [View(path.read_bytes(), text, wide) for path, text, wide in found]
