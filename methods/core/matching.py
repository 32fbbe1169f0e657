"""Trajectory matching: one outer step in which students, trained on the learned set, follow a piece of an expert's way.

Source: MTT (Cazenavette et al., CVPR 2022). The systems differ in what is learned and in the student's loss; VLDD
follows two weight groups at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from methods.core.inner import MODES, Draw, InnerSGD, Params, StepLoss, hypergradient
from methods.core.replay import Replay
from methods.core.trajectories import Segment, matching_loss
from utils.config import option


@dataclass(frozen=True)
class MatchConfig:
    """The inner loop and the segment that it has to follow."""

    # Where they lie may change on resuming; that they are the same experts is pinned.
    buffer_path: str = option(
        "", "folder of the trajectories, root or leaf (empty: runs/<method>/<name>/buffers)", free=True
    )
    syn_steps: int = option(8, "inner steps S on the learned set", low=1)
    expert_epochs: int = option(1, "epochs R of the expert that they stand for", low=1)
    max_start_epoch: int = option(2, "start epochs are below this", low=1)
    max_files: int | None = option(None, "use only so many published buffer files (none: all)", low=1)
    max_experts: int | None = option(None, "use only so many experts (of each published file; none: all)", low=1)
    segments: int = option(
        0, "segments an outer step follows, whose gradients are averaged (0: one for each process)", low=0, free=True
    )
    mode: str = option(
        "exact", "gradient through the inner loop (methods/core/inner.py)", aliases=("grad",), choices=MODES
    )


class Learned(Protocol):
    """What a matching step needs of the learned set: its tensors, and the learned inner rate of each weight group."""

    leaves: list[Tensor]
    lr: Params


def match(
    step_loss: StepLoss,
    learned: Learned,
    segment: Segment,
    draws: Sequence[Draw],
    mode: str,
    merged: bool = False,
    replay: Replay | None = None,
) -> dict[str, float]:
    """Train a student from the segment's start on `draws`, add the gradient of its gap to the leaves' `.grad`.

    merged   take all groups' gaps as one (see `matching_loss`), but for the inner rates: as LoRS released it, each
             keeps the weight that its own branch has without it
    replay   how steps are replayed, planned for this loop (None: one by one)

    Returns numbers to log: `loss` (and `loss_<group>` where there are several groups), `lr_<group>`, starts and expert.
    """
    parts: Params = {}

    def objective(final: Params) -> Tensor:
        loss, branches = matching_loss(final, segment, merged)
        parts.update(branches)
        return loss

    how = {"keep": replay.keep, "engine": replay.engine(step_loss)} if replay else {}
    inner = InnerSGD(learned.lr)
    loss = hypergradient(step_loss, segment.start, draws, inner, objective, learned.leaves, mode, **how)
    if merged:
        travelled = segment.travelled()
        for group, way in travelled.items():  # a tower that is frozen has a rate, but no way
            learned.lr[group].grad *= sum(travelled.values()) / way
    named = {"loss": loss} | ({f"loss_{group}": part for group, part in parts.items()} if len(parts) > 1 else {})
    named |= {f"lr_{group}": rate for group, rate in learned.lr.items()}
    began = {"start_epoch": segment.epoch} | {f"start_epoch_{group}": at for group, at in segment.apart.items()}
    return on_host(named) | began | {"expert": segment.expert}


def on_host(named: Params) -> dict[str, float]:
    """Scalars as plain numbers, by one copy for all: each float() of its own would wait for the device."""
    values = torch.stack([value.detach() for value in named.values()]).tolist() if named else []
    return dict(zip(named, values, strict=True))
