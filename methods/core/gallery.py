"""The run folder of a distillation as it fills: a file of the learned set at each evaluation, and the best of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from methods.core.evaluation import Report
from utils.config import option
from utils.files import atomic, load_tensors, save_tensors
from utils.run import Run


@dataclass(frozen=True)
class KeepConfig:
    """What of a distillation stays on the disk."""

    keep: int = option(
        0,
        "distilled_<step>.pt files that stay beside the first and the best: the last so many (0: all)",
        low=0,
        free=True,
    )


class Gallery:
    """Keeps the learned set and shows it.

    state()                   the learned set, in the layout of a distilled file
    meta                      what a distilled file notes beside it
    show(step, state, best)   writes pictures and the page of a state that was just kept, its `meta` included
    limit                     how many of the last `distilled_<step>.pt` stay (0: all); step 0 does, pages begin with it
    finest()                  what only `distilled_best.pt` carries, being large (empty: nothing)
    """

    def __init__(
        self,
        run: Run,
        state: Callable[[], dict[str, Any]],
        meta: dict[str, Any],
        show: Callable[[int, dict[str, Any], bool], None],
        finest: Callable[[], dict[str, Any]] = dict,
        limit: int = 0,
    ) -> None:
        self.limit = limit
        self.run, self.state, self.meta, self.show, self.finest = run, state, meta, show, finest
        self._report: Report | None = None

    def scored(self, step: int, report: Report, split: str = "val") -> None:
        """Log what this step's set scored, by which the best is chosen."""
        self._report, self._split = report, split
        self.run.log(step, **{f"{split}_{name}": mean for name, (mean, _) in report.mean_std().items()})

    def keep(self, step: int, best: bool) -> None:
        """Write `distilled_<step>.pt`, pictures and page; also `distilled_best.pt` where it scored best so far.

        Of several processes the first one does.
        """
        if not self.run.ranks.first:
            return
        folder, meta = self.run.folder, self.meta | {"step": step}
        if self._report is not None:
            meta["validation"] = {name: list(pair) for name, pair in self._report.mean_std().items()}
            meta["validated_on"] = self._split
        state = self.state() | {"meta": meta}
        path, best_path = folder / f"distilled_{step}.pt", folder / "distilled_best.pt"
        save_tensors(path, state)
        best = best or not best_path.exists() or self._report is None
        if best:
            if more := self.finest():
                save_tensors(best_path, state | more)
            else:
                with atomic(best_path) as temporary:
                    shutil.copyfile(path, temporary)
        self._prune()
        self.show(step, state, best)

    def _prune(self) -> None:
        found = [path.stem.removeprefix("distilled_") for path in self.run.folder.glob("distilled_*.pt")]
        steps = sorted(int(step) for step in found if step.isdigit() and int(step))
        for step in steps[: -self.limit] if self.limit else []:
            (self.run.folder / f"distilled_{step}.pt").unlink()


def first_state(folder: Path, otherwise: dict[str, Any]) -> dict[str, Any]:
    """The learned set as the run in `folder` began; `otherwise` where that file has been removed."""
    path = folder / "distilled_0.pt"
    return load_tensors(path, "distilled file") if path.exists() else otherwise
