import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data import DataConfig, build_dataset


class Library:
    """A tiny captioned data set on disk: 12 train, 4 val and 4 test JPEGs of several shapes."""

    def __init__(self, root: Path) -> None:
        self.root, self.images, self.notes = root, root / "images", root / "notes"
        self.notes.mkdir(parents=True)
        rng = np.random.default_rng(0)
        self.names: dict[str, list[str]] = {}
        for split, count in {"train": 12, "val": 4, "test": 4}.items():
            self.names[split] = [f"flickr30k-images/{split}{i}.jpg" for i in range(count)]
            for name in self.names[split]:
                self.picture(self.images / name, rng.integers(20, 90, 2), rng)
        train = [
            {"image": name, "caption": f"A {kind} photo, number {i}.", "image_id": f"id{i}"}
            for kind in ("nice", "plain")  # the captions of one image are not adjacent
            for i, name in enumerate(self.names["train"])
        ]
        self.write("train", train)
        for split in ("val", "test"):
            counts = (5, 6, 5, 5)
            self.write(
                split,
                [
                    {"image": name, "caption": [f"{split} {i} caption {c}!" for c in range(count)]}
                    for i, (name, count) in enumerate(zip(self.names[split], counts, strict=True))
                ],
            )

    @staticmethod
    def picture(path: Path, shape, rng) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((int(shape[1]), int(shape[0])), Image.Resampling.BICUBIC).save(path, quality=95)

    def file(self, split: str) -> Path:
        return self.notes / f"flickr30k_{split}.json"

    def write(self, split: str, records) -> None:
        self.file(split).write_text(json.dumps(records), encoding="utf-8")

    def records(self, split: str):
        return json.loads(self.file(split).read_text(encoding="utf-8"))

    def config(self, **changes) -> DataConfig:
        values = {
            "dataset": "flickr",
            "image_root": str(self.images),
            "ann_root": str(self.notes),
            "image_size": 16,
            "cache_dir": str(self.root / "cache"),
            "workers": 2,
        }
        return DataConfig(**(values | changes))

    def data(self, **changes):
        return build_dataset(self.config(**changes), "cpu")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path)
