"""Experts on image–text pairs that lie on disk: where, and whether they had the towers that are at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods.core.retrieval import Corpus
from methods.core.trajectories import Trajectories, check_shapes, open_trajectories
from networks.towers import Towers
from utils.errors import UserError
from utils.files import digest
from utils.run import read_inputs


def leaf(cfg: Any) -> Path:
    """Where the trajectories of a command's data and towers lie below `buffer_path`, as VLDD publishes them."""
    return Path(cfg.data.dataset) / slug(cfg.towers.image_encoder) / slug(cfg.towers.text_encoder)


def slug(encoder: str) -> str:
    """An encoder's name as one path part; it may be a hub id or a folder."""
    return encoder.strip("/").replace("/", "_")


def open_experts(
    root: Path | str,
    cfg: Any,
    corpus: Corpus,
    towers: Towers,
    max_files: int | None = None,
    max_experts: int | None = None,
) -> Trajectories:
    """The experts in the folder `root`, or below it as VLDD or LoRS publish them.

    LoRS's scripts name their own leaf, <dataset>/<image>_<text>/<loss>; where that is not there, what buffer.py wrote
    for these towers beside it is meant. max_files, max_experts: only so many, as in `open_trajectories`.

    UserError where there are none, or they are of other towers: of other shapes, or with other frozen parts. Epochs are
    checked by whoever knows which it needs.
    """
    root, own = Path(root), leaf(cfg)
    theirs = own.parent.parent / f"{own.parent.name}_{own.name}"
    if not root.exists() and root.parts[-3:-2] == own.parts[:1]:
        root = root.parents[2]
    experts = open_trajectories(root, tuple(towers.flat), (str(own), f"{theirs}/*"), max_files, max_experts)
    check_shapes(experts, {group: part.shapes for group, part in towers.flat.items()})
    _check_frozen(experts.folder, inputs(cfg, corpus, towers))
    return experts


def inputs(cfg: Any, corpus: Corpus, towers: Towers) -> dict[str, str | None]:
    """Digests of what a run works on: its training pairs, and whatever of the towers does not learn."""
    frozen = [weight.detach().cpu() for weight in towers.image.parameters() if not weight.requires_grad]
    found = {"training_set": corpus.data.fingerprint("train"), "text_encoder": corpus.text_fingerprint}
    return found | ({"frozen_image": digest(cfg.towers.lora_alpha, *frozen)} if frozen else {})


def _check_frozen(folder: Path, ours: dict[str, str | None]) -> None:
    """UserError where the experts in `folder` had other frozen parts: what they learned then means nothing here.

    Shapes do not tell, and published trajectories note nothing.
    """
    path = folder / "inputs.json"
    was = read_inputs(folder) if path.is_file() else {}
    for name, remedy in (("text_encoder", "--text_… and data"), ("frozen_image", "--image_… and --lora_…")):
        if was.get(name) and ours.get(name) and was[name] != ours[name]:
            raise UserError(
                f"the experts in {folder} had another {name.replace('_', ' ')}: its weights, settings or what it was "
                f"learned from differ; give the {remedy} flags that buffer.py had"
            )
