"""Where each class goes on a poster (PoCO): classes whose names mean similar things become neighbours.

Neighbouring classes share pixels, so they should share looks; names stand for looks. Each name becomes a vector, the
distance of two classes is one minus the cosine of theirs, and `place_classes` fills the grid greedily. As published, a
name is read by CLIP's text tower and its vector is the last hidden state of all 77 positions, padding among them. Any
other encoder of the transformers library gives the mean over a name's tokens; `words` needs no weights: it compares
names by the letters that they share.

The order is worked out once and kept. For the published posters one comes with the code (class_orders.json), so no
weights are needed to start.
Source: PoDD (arXiv 2403.12040).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import published_name
from data.subsets import wordnet_names
from networks.text import HUB_IDS, TransformerEncoder
from networks.towers import CLIP, TowerConfig
from utils.config import option
from utils.errors import UserError
from utils.files import check_version, digest, read_json, write_json, write_text
from utils.registry import nearest

FORMAT = 1  # of order.json; what has none is of the first
WORDS = "words"
SHIPPED = Path(__file__).with_name("class_orders.json")
# What PoDD reads in place of a data set's own names.
_RENAMED = {"CIFAR10": {"ship": "boat"}, "CIFAR100": {"keyboard": "computer keyboard"}}
_BATCH = 64  # names a forward pass
_DECIMALS = 12  # of a distance: names that are equally far tie on every machine, however it adds


@dataclass(frozen=True)
class OrderConfig:
    """Which class goes where on the poster."""

    order: str = option(
        "auto",
        "places of the classes: auto (the order that comes with the code, else text), text (similar names side by "
        "side), table (the data set's own order, row by row), or an order.json",
    )
    order_encoder: str = option(
        CLIP,
        "what reads the classes' names: hub id or folder of a text encoder, or words (letters that names share; needs "
        "no weights). Any but the default is used even where an order comes with the code",
        aliases=("text_encoder",),
    )

    def idle(self) -> dict[str, str]:
        return {} if self.order in ("auto", "text") else {"order_encoder": "--order auto or text"}


@dataclass(frozen=True)
class Order:
    """Which class goes where.

    grid     (rows, columns) long: the class of each area
    encoder  what read the names, such as openai/clip-vit-base-patch32; or `table`
    source   where it is from: `shipped`, `computed`, `cached`, `table` or the path of a file
    """

    grid: Tensor
    encoder: str
    source: str

    def lines(self, classes: Sequence[str]) -> list[str]:
        """The grid with the classes' names, a line a row, in columns."""
        cells = [[classes[number].replace("_", " ") for number in row] for row in self.grid.tolist()]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        return ["  ".join(name.ljust(width) for name, width in zip(row, widths, strict=True)).rstrip() for row in cells]

    def save(self, path: Path | str, classes: Sequence[str]) -> None:
        """Write an order.json, whole or not at all: how it was made, the grid, and the same with names."""
        rows, columns = self.grid.shape
        head = {"format": FORMAT, "encoder": self.encoder, "rows": rows, "columns": columns}
        tables = {"grid": self.grid.tolist(), "names": _named(self.grid, classes)}
        head["digest"] = _told(head | tables)
        parts = [f'"{name}": {json.dumps(value)}' for name, value in head.items()]
        # A line a row, so that it can be read, and changed by hand (without the line of its digest).
        parts += [f'"{name}": [\n  ' + ",\n  ".join(map(json.dumps, table)) + "\n ]" for name, table in tables.items()]
        write_text(path, "{\n " + ",\n ".join(parts) + "\n}\n")


def load_order(path: Path | str, classes: Sequence[str]) -> Order:
    """The order in a file of `Order.save`; `grid` alone is enough in one written by hand.

    UserError where it is missing, damaged or of other classes.
    """
    state = read_json(path, "order of classes")
    if isinstance(state, dict) and isinstance(version := state.get("format", 1), int):
        check_version(path, version, FORMAT)
    if isinstance(state, dict) and state.get("digest", told := _told(state)) != told:
        raise UserError(
            f"order of classes {path} is not as it was written; restore it, or drop the line of its digest to use it so"
        )
    grid = _grid(state, len(classes))
    if grid is None:
        raise UserError(
            f"order of classes {path} has no 'grid' of rows of class numbers, each of 0 to {len(classes) - 1} once; "
            "correct it, or use --order table"
        )
    named = _named(grid, classes)
    if state.get("names", named) != named:
        raise UserError(
            f"order of classes {path} has other names than the data set; give another or, where class numbers mean "
            "the same, remove its 'names'"
        )
    return Order(grid, str(state.get("encoder", "a file")), str(path))


def place_classes(distances: Tensor, rows: int, columns: int) -> Tensor:
    """Which class goes where, (rows, columns) long: PoCO's greedy placement.

    distances  (K, K), K = rows · columns

    Cells are visited by anti-diagonals, each from the bottom left to the top right. Class 0 comes first; then each
    cell gets, of the classes that are left, the one whose distances to its filled neighbours (left and above) sum to
    least; ties go to the earlier class.
    """
    if distances.shape != (rows * columns, rows * columns):
        raise ValueError(f"distances {tuple(distances.shape)} do not fit a grid of {rows} x {columns}")
    grid = torch.full((rows, columns), -1)
    left = torch.ones(rows * columns, dtype=torch.bool)
    for row, column in visits(rows, columns):
        beside = [grid[row - 1, column]] if row else []
        beside += [grid[row, column - 1]] if column else []
        total = sum((distances[:, number] for number in beside), torch.zeros(len(left)))
        chosen = total.masked_fill(~left, torch.inf).argmin()  # the first of equals, and of all where nothing is beside
        grid[row, column] = chosen
        left[chosen] = False
    return grid


def visits(rows: int, columns: int) -> list[tuple[int, int]]:
    """The cells of a grid by anti-diagonals, each from the bottom left to the top right."""
    cells = [(row, column) for row in range(rows) for column in range(columns)]
    return sorted(cells, key=lambda cell: (sum(cell), -cell[0]))


def class_order(
    cfg: OrderConfig, dataset: str, classes: Sequence[str], rows: int, columns: int, cache_dir: Path | str
) -> Order:
    """The order that `cfg` asks for, of the classes of `dataset` on a grid of `rows` x `columns`.

    Computed orders are kept in `cache_dir/orders`. `auto` falls back on `words`, and prints so, where neither an order
    comes with the code nor CLIP is to be had. UserError where grid and classes do not fit, or an encoder that was asked
    for cannot be loaded.
    """
    if rows * columns != len(classes):
        raise UserError(
            f"a class grid of {columns} x {rows} (width x height) has {rows * columns} places for {len(classes)} "
            "classes; --poster_class_num_x times --poster_class_num_y must be their number"
        )
    if cfg.order == "table":
        return Order(torch.arange(rows * columns).view(rows, columns), "table", "table")
    if cfg.order not in ("auto", "text"):
        return _given(cfg.order, classes, rows, columns)
    texts = class_texts(dataset, classes)
    if cfg.order == "text" or cfg.order_encoder != CLIP:
        return _computed(cfg.order_encoder, texts, rows, columns, cache_dir)
    if shipped := _shipped(dataset, texts, rows, columns):
        return shipped
    try:
        return _computed(CLIP, texts, rows, columns, cache_dir)
    except UserError:
        print(
            f"note: {CLIP} is not to be had; classes are placed by the letters of their names (--order_encoder words)"
        )
        return _computed(WORDS, texts, rows, columns, cache_dir)


def class_texts(dataset: str, classes: Sequence[str]) -> list[str]:
    """What is read for each class: its name with spaces for underscores, and PoDD's own word for two of CIFAR's.

    A WordNet name, such as n01443537, is read as what people call it.
    """
    renamed = _RENAMED.get(published_name(dataset), {})
    if any(re.fullmatch(r"n\d{8}", name) for name in classes):
        renamed = renamed | dict(zip(*wordnet_names(), strict=True))
    return [renamed.get(name, name).replace("_", " ") for name in classes]


class NameEncoder(TransformerEncoder):
    """A text encoder that reads names as PoCO does: from CLIP the last hidden states of all positions, side by side;
    from others the mean over a name's tokens."""

    def __init__(self, source: str) -> None:
        super().__init__(TowerConfig(text_encoder=source, text_pooling="mean"), list)
        self.remedy = "use --order_encoder words, which needs none, a folder that has them, or --order table"

    @torch.no_grad()
    def encode(self, captions: Sequence[str], quiet: bool = False) -> np.ndarray:
        net, tokenizer = self._loaded
        if not hasattr(net, "text_projection"):  # no CLIP
            return super().encode(captions, quiet)
        options = {"padding": "max_length", "truncation": True, "max_length": self._limit, "return_tensors": "pt"}
        ids = tokenizer(list(captions), **options)["input_ids"]
        # Without a mask, as published: what stands at the padding is part of the vector.
        states = [net(input_ids=part).last_hidden_state.flatten(1) for part in ids.split(_BATCH)]
        return torch.cat(states).numpy()


def letter_vectors(texts: Sequence[str]) -> np.ndarray:
    """Vectors (K, D) float64 of texts: which runs of two to four letters each has, rare ones counting more (tf-idf)."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    try:
        return TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 4)).fit_transform(texts).toarray()
    except ValueError as error:
        raise UserError(f"the classes' names cannot be compared ({error}); use --order table") from None


def cosine_distances(vectors: np.ndarray) -> Tensor:
    """One minus the cosine of each two rows (K, D), as (K, K) float64; a row of zeros is at 1 from all others."""
    unit = torch.nn.functional.normalize(torch.from_numpy(vectors).double(), dim=1)
    return (1 - unit @ unit.T).fill_diagonal_(0).round(decimals=_DECIMALS)


def _computed(source: str, texts: Sequence[str], rows: int, columns: int, folder: Path | str) -> Order:
    """The order that the encoder `source` gives, from the cache in `folder` where it is there."""
    source = HUB_IDS.get(source.lower(), source)
    encoder = None if source == WORDS else NameEncoder(source)
    # A hub id stands for its weights, so that nothing is loaded for an order that is there; a folder may change.
    name = encoder.fingerprint if encoder and Path(source).is_dir() else source
    path = Path(folder) / "orders" / f"{digest('order 1', name, list(texts), rows, columns)[:32]}.json"
    try:
        grid = _grid(read_json(path, "order"), len(texts))
    except UserError:  # not there yet, or damaged
        grid = None
    if grid is not None and grid.shape == (rows, columns):
        return Order(grid, source, "cached")
    vectors = encoder.encode(texts, quiet=True) if encoder else letter_vectors(texts)
    grid = place_classes(cosine_distances(vectors), rows, columns)
    write_json(path, {"encoder": source, "grid": grid.tolist()})
    return Order(grid, source, "computed")


def _shipped(dataset: str, texts: Sequence[str], rows: int, columns: int) -> Order | None:
    """The order that comes with the code for these classes on such a grid, if one does."""
    found = read_json(SHIPPED, "orders of classes").get(f"{published_name(dataset)} {rows}x{columns}")
    if found is None or found["names"] != names_digest(texts):
        return None
    return Order(torch.tensor(found["grid"]), found["encoder"], "shipped")


def names_digest(texts: Sequence[str]) -> str:
    """What tells one list of names from another; case, spaces and signs do not count."""
    return digest([re.sub(r"[^a-z0-9]", "", text.lower()) for text in texts])[:12]


def _told(state: dict[str, Any]) -> str:
    """A digest of all that a file of an order says but this."""
    return digest({name: value for name, value in state.items() if name != "digest"})


def _given(path: str, classes: Sequence[str], rows: int, columns: int) -> Order:
    if not Path(path).is_file():
        hint = nearest(path, ("auto", "text", "table"))
        raise UserError(f"--order is auto, text, table or an order.json; there is no file {path}{hint}")
    order = load_order(path, classes)
    if order.grid.shape != (rows, columns):
        high, wide = order.grid.shape
        raise UserError(
            f"order of classes {path} is {wide} x {high} (width x height), the poster's class grid {columns} x {rows}; "
            f"give --poster_class_num_x {wide} --poster_class_num_y {high} or another order"
        )
    return order


def _grid(state: Any, count: int) -> Tensor | None:
    """`grid` in a file's content as (rows, columns) long, or None where it is not each of `count` classes once."""
    rows = state.get("grid") if isinstance(state, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, list) and len(row) == len(rows[0]) for row in rows):
        return None
    numbers = [number for row in rows for number in row]
    if not all(type(number) is int for number in numbers) or sorted(numbers) != list(range(count)):
        return None
    return torch.tensor(rows)


def _named(grid: Tensor, classes: Sequence[str]) -> list[list[str]]:
    return [[classes[number] for number in row] for row in grid.tolist()]
