"""RaT-BPTT's window: how many inner steps go before it without a graph, and how many are differentiated.

Source: Feng, Vedantam and Kempe, Embarrassingly Simple Dataset Distillation (ICLR 2024), and the kinds of its released
code, by their numbers.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from utils.config import option
from utils.errors import UserError

PLATEAU = 200  # epochs without a better loss, after which kinds 0 and 1 move or end


@dataclass(frozen=True)
class WindowConfig:
    """Which of the inner steps are differentiated."""

    window: int = option(60, "inner steps that are differentiated", low=1)
    minwindow: int = option(0, "least steps before them", low=0)
    totwindow: int = option(200, "most steps in all", low=1)
    ddtype: str = option(
        "curriculum",
        "curriculum: steps without a graph come first; standard: the window is all",
        choices=("curriculum", "standard"),
    )
    cctype: int = option(
        2,
        "steps before the window: 0 as many as --totwindow leaves; 1 --minwindow, more whenever the loss stands still; "
        "2 random; 3 none, and a window of random length up to --totwindow",
        low=0,
    )
    start_per: str = option(
        "epoch", "2 and 3 draw anew each epoch, as released, or each outer step", choices=("epoch", "step")
    )

    def check(self) -> None:
        if self.cctype > 3:
            raise UserError(f"--cctype is {self.cctype}; it is 0, 1, 2 or 3")
        if self.ddtype == "standard":  # the window is all, however long
            return
        if self.window > self.totwindow:
            raise UserError(
                f"--window {self.window} is more than --totwindow {self.totwindow}, which holds it; lower it"
            )
        if self.minwindow > self.last_start:
            raise UserError(
                f"--minwindow {self.minwindow} is beyond the last start of a window, --totwindow {self.totwindow} - "
                f"--window {self.window} = {self.last_start}; lower it"
            )

    def idle(self) -> dict[str, str]:
        if self.ddtype == "standard":
            return dict.fromkeys(("minwindow", "totwindow", "cctype", "start_per"), "--ddtype curriculum")
        found = {"minwindow": "--cctype 0, 1 or 2"} if self.cctype == 3 else {}
        return found | ({} if self.cctype in (2, 3) else {"start_per": "--cctype 2 or 3"})

    @property
    def last_start(self) -> int:
        return self.totwindow - self.window


class Windows:
    """The window of each outer step. Nothing in it needs saving: draws follow from the seed, moves from the losses.

    epoch_steps   outer steps an epoch
    losses        outer step → loss of the networks that judged it, known so far; filled by the caller
    """

    def __init__(self, cfg: WindowConfig, seed: int, epoch_steps: int, losses: Mapping[int, float]) -> None:
        self.cfg, self.epoch_steps, self.losses = cfg, epoch_steps, losses
        self._chance, self._drawn = random.Random(seed), []  # Python's, whose draws public logs show

    def at(self, step: int) -> tuple[int, int]:
        """Inner steps before the window, and in it."""
        cfg = self.cfg
        if cfg.ddtype == "standard":
            return 0, cfg.window
        if cfg.cctype == 2:
            return self._draw(step, cfg.minwindow, cfg.last_start), cfg.window
        if cfg.cctype == 3:
            return 0, self._draw(step, cfg.window, cfg.totwindow)
        return (cfg.last_start if cfg.cctype == 0 else self._moved(step)[0]), cfg.window

    def finished(self, step: int) -> bool:
        """Whether kind 0 or 1 has nowhere left to move after the evaluation at this step.

        As released, kind 0 ends only where its one start is --minwindow too.
        """
        cfg = self.cfg
        if cfg.ddtype == "standard" or cfg.cctype not in (0, 1):
            return False
        return self._moved(step)[1] and (cfg.cctype == 1 or cfg.minwindow == cfg.last_start)

    def _draw(self, step: int, low: int, high: int) -> int:
        number = step // self.epoch_steps if self.cfg.start_per == "epoch" else step
        while len(self._drawn) <= number:
            self._drawn.append(self._chance.randint(low, high))
        return self._drawn[number]

    def _moved(self, step: int) -> tuple[int, bool]:
        """The start of the window after the evaluations up to `step`, and whether the last one found it stuck."""
        start, best, since, stuck = self.cfg.minwindow, float("inf"), 0, False
        for at in sorted(place for place in self.losses if place <= step):
            epoch, stuck = at // self.epoch_steps, False
            if self.losses[at] < best:
                best, since = self.losses[at], epoch
            elif epoch >= since + PLATEAU:
                since, stuck = epoch, self.cfg.cctype == 0 or start == self.cfg.last_start
                start = min(start + self.cfg.window, self.cfg.last_start)
        return start, stuck
