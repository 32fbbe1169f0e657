"""Coresets of labelled images: which real images of each class herding, k-center and forgetting choose.

Each class is chosen from by itself, so that a coreset has as many images of each as random and distilled sets have.
Images are seen as in testing, without augmentation. The first expert is asked, of the network of `--model`; whichever
networks are judged, they train on the same images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor

from data.images import ImageData
from data.zca import ZCA
from methods.core.coresets import (
    DEFINITIONS,
    NEVER,
    CoresetConfig,
    check_expert,
    forgetting,
    forgetting_epochs,
    herding,
    k_center,
)
from methods.core.trajectories import Trajectories
from methods.image_experts import BATCH, WHITENING, check_same_data, without_graph
from networks import has_batch_norm
from networks.flat import FlatModule
from networks.layers import Classifier
from utils.errors import UserError
from utils.progress import progress
from utils.rng import generator

FEATURES = {
    "expert": "what the last layer of the first expert sees after its last epoch",
    "raw": "the pixels as networks see them",
}


class ImageCoresets:
    """Chooses training images: `rows("herding", 10)` are ten of each class; also kcenter and forgetting.

    net       of the experts, for this data; it is lent, and ends with other weights
    experts   the first is asked; None where `cfg.needs_experts` says so
    """

    def __init__(self, data: ImageData, net: Classifier, experts: Trajectories | None, cfg: CoresetConfig) -> None:
        self.data, self.net, self.experts, self.cfg = data, net, experts, cfg
        self.flat_net = FlatModule(net)
        self.rows = cache(self._rows)

    def check(self, kinds: Sequence[str], cfg: Any) -> None:
        """UserError where the experts cannot be asked, or did not learn this data as the command `cfg` has it."""
        if self.experts is None:
            return
        check_same_data(self.experts, cfg, self.data)
        check_expert(self.experts, {"net": self.flat_net.shapes}, kinds)
        path = self.experts.folder / WHITENING
        if self.data.zca is not None and path.exists() and ZCA.load(path).digest != self.data.zca.digest:
            raise UserError(
                f"the experts in {self.experts.folder} saw images whitened otherwise than the distilled ones"
            )
        if has_batch_norm(self.net):
            print(f"note: {cfg.net.model} has batch norm, whose running statistics are no part of a trajectory")

    def about(self, kind: str) -> dict[str, str]:
        """For reports: how a coreset is defined, and what it was chosen by."""
        if kind == "forgetting":
            epochs = ", ".join(map(str, forgetting_epochs(self.experts)))
            by = (
                f"right: the image's class has the highest logit of the first expert after epochs {epochs}; "
                f"{NEVER[self.cfg.never_learned]}; ties in a fixed random order"
            )
        else:
            by = FEATURES[self.cfg.coreset_features]
        return {"definition": f"of each class {DEFINITIONS[kind]}", "features": f"{by}; no augmentation"}

    def _rows(self, kind: str, ipc: int) -> Tensor:
        """(classes · ipc,) long: of the training split, class by class; `rows` does this once."""
        if kind != "forgetting" and self.cfg.coreset_features == "expert":
            self.flat_net.load(self._weights(self.experts.epochs(0)[-1]))
        own = [self.data["train"].indices_of(label) for label in range(len(self.data.classes))]
        labels = progress(range(len(own)), kind, leave=False)
        return torch.cat([own[label][self._choose(kind, ipc, label, own[label])] for label in labels])

    def _choose(self, kind: str, ipc: int, label: int, rows: Tensor) -> Tensor:
        if kind != "forgetting":
            return {"herding": herding, "kcenter": k_center}[kind](self._features(rows), ipc)
        rng = generator(0, "forgetting ties", label)
        try:
            return forgetting(self._correct[:, rows], ipc, self.cfg.never_learned, rng)
        except UserError as error:
            raise UserError(f"class {self.data.classes[label]}: {error}") from None

    @torch.no_grad()
    def _features(self, rows: Tensor) -> Tensor:
        """(n, F) of some training images."""
        train, found = self.data["train"], None
        self.net.eval()
        for part in torch.arange(len(rows)).split(BATCH):
            images = train.images(rows[part])
            seen = self.net.features(images) if self.cfg.coreset_features == "expert" else images.flatten(1)
            if found is None:
                found = seen.new_empty(len(rows), seen.shape[1])
            found[part] = seen
        return found

    @cached_property
    def _correct(self) -> Tensor:
        """(epochs, N) bool: which training images the first expert got right after each epoch."""
        train, epochs = self.data["train"], forgetting_epochs(self.experts)
        right = torch.empty(len(epochs), len(train), dtype=torch.bool)
        for number, epoch in enumerate(progress(epochs, "forgetting", leave=False)):
            weights = self._weights(epoch)
            for rows in torch.arange(len(train)).split(BATCH):
                said = without_graph(self.flat_net, weights, train.images(rows)).argmax(1)
                right[number, rows] = (said == train.labels[rows.to(train.labels.device)]).cpu()
        return right

    def _weights(self, epoch: int) -> Tensor:
        return self.experts.read(0, epoch)["net"].to(self.data.device)
