"""Which sentences of a large corpus are worth distilling with: those that say what the images show.

Cosines of teacher features tell it, image against sentence, m × M of them, of which a block at a time is made. Two
rules, both of a total budget of K sentences:

union    Each image proposes its `topk` nearest sentences; of all that are proposed, the K of the highest score stay.
greedy   Each image takes the best sentence that none has taken yet, again and again until K are taken. In each round
         the images go by their scores (`--select_order best`: the best pair that is left first) or by their row
         (`image`). `topk` sentences an image are held at once, which changes the memory and not what is taken.

Of equal scores the sentence of the lower row is the better one, then the image of the lower row. Sentences that are the
same once normalised (NFKC, white space) count once, by the first.

The filter of DIME-FM (Sun et al., ICCV 2023) was never published; these are two readings of "visually grounded".
"""

from __future__ import annotations

import csv
import heapq
import itertools
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from utils.config import option
from utils.files import atomic
from utils.progress import progress

# Scores of images and sentences, given by row: (n,) long, (c,) long → (n, c) float32.
Scores = Callable[[Tensor, Tensor], Tensor]
_COLUMN = (1 << 32) - 1  # the greatest number of a column that a key holds


@dataclass(frozen=True)
class SelectConfig:
    """Which sentences are kept."""

    budget: int = option(0, "sentences to keep in all; 0 is all of them, without looking at their scores", low=0)
    select_mode: str = option(
        "greedy",
        "union: the best of what images propose; greedy: images take unused ones in turn",
        choices=("union", "greedy"),
    )
    select_order: str = option(
        "best",
        "whose turn it is in a greedy round: the best pair first, or image after image",
        choices=("best", "image"),
    )
    topk: int = option(16, "sentences an image proposes; greedy: those held at once, which only costs memory", low=1)
    select_chunk: int = option(2048, "images, and sentences, of one block of scores", low=1, free=True)

    def idle(self) -> dict[str, str]:
        if not self.budget:
            return dict.fromkeys(("select_mode", "select_order", "topk", "select_chunk"), "a --budget")
        return {} if self.select_mode == "greedy" else {"select_order": "--select_mode greedy"}


@dataclass(frozen=True)
class Selection:
    """What was selected, in order: the first k of it are the selection of a budget of k.

    ids     (K,) long, rows of the sentences
    scores  (K,) float32, cosines with the images that they are owed to
    owners  (K,) long, rows of these images
    """

    ids: Tensor
    scores: Tensor
    owners: Tensor

    def __len__(self) -> int:
        return len(self.ids)


class Rows(Protocol):
    """Vectors by row, such as `data.feature_files.Features`."""

    def rows(self, indices: Tensor) -> Tensor: ...


def cosines(images: Rows, texts: Rows, device: torch.device | str = "cpu") -> Scores:
    """Scores that are the cosines of two sets of vectors, which stay where they are until they are asked for."""

    def unit(vectors: Rows, rows: Tensor) -> Tensor:
        return F.normalize(vectors.rows(rows).to(device, torch.float32), dim=1)

    return lambda rows, columns: unit(images, rows) @ unit(texts, columns).T


def distinct(texts: Iterable[str]) -> Tensor:
    """The rows, (n,) long, of the texts that differ from all before them and say anything at all."""
    seen, rows = set(), []
    for row, text in enumerate(texts):
        normal = " ".join(unicodedata.normalize("NFKC", text).split())
        key = blake2b(normal.encode("utf-8", "surrogatepass"), digest_size=16).digest()  # a corpus need not fit
        if normal and key not in seen:
            seen.add(key)
            rows.append(row)
    return torch.tensor(rows, dtype=torch.long)


def nearest(score: Scores, rows: Tensor, columns: Tensor, k: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The best columns of each row and their scores, (n, k) long and (n, k) float32, the best first; `chunk` columns
    are looked at in one block. Fewer than k where there are fewer columns. The columns are in ascending order."""
    found = torch.empty(len(rows), 0, dtype=torch.long)
    for start in range(0, len(columns), chunk):
        part = columns[start : start + chunk]
        keys = _keys(score(rows, part).cpu(), torch.arange(start, start + len(part)))
        keys = keys.topk(min(k, len(part)), dim=1).values
        found = torch.cat([found, keys], dim=1)
        found = found.topk(min(k, found.shape[1]), dim=1).values
    return columns[_COLUMN - (found & _COLUMN)], _scores(found)


def _keys(scores: Tensor, numbers: Tensor) -> Tensor:
    """Whole numbers, no two of a row alike, that are in the order of the scores, and of equal ones the first number
    leads: what is taken cannot hang on how a sort treats ties."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).long()  # + 0.0 makes one zero of the two
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + (_COLUMN - numbers)


def _scores(keys: Tensor) -> Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int32).view(torch.float32)


def select(score: Scores, images: Tensor, texts: Tensor, cfg: SelectConfig) -> Selection:
    """The sentences to keep, of the rows `texts` (M,), for the rows `images` (m,), both ascending.

    Fewer than the budget where there are fewer or, in mode union, where fewer are proposed.
    """

    def within(rows: Tensor, columns: Tensor) -> Tensor:
        return score(images[rows], texts[columns])

    pick = _union if cfg.select_mode == "union" else _greedy
    ids, scores, owners = pick(within, len(images), len(texts), cfg)
    return Selection(texts[ids], scores, images[owners])


def _union(score: Scores, images: int, texts: int, cfg: SelectConfig) -> tuple[Tensor, Tensor, Tensor]:
    best, owner = np.full(texts, -np.inf, np.float32), np.zeros(texts, np.int64)
    for rows in progress(torch.arange(images).split(cfg.select_chunk), what="selecting", unit="block"):
        ids, scores = nearest(score, rows, torch.arange(texts), cfg.topk, cfg.select_chunk)
        ids, scores, owners = (part.flatten().numpy() for part in (ids, scores, rows[:, None].expand(ids.shape)))
        order = np.lexsort((-owners, scores))  # of several proposals the best is the last, which numpy then keeps
        order = order[scores[order] > best[ids[order]]]
        best[ids[order]], owner[ids[order]] = scores[order], owners[order]
    proposed = np.flatnonzero(best > -np.inf)
    chosen = proposed[np.argsort(-best[proposed], kind="stable")[: cfg.budget]]
    return tuple(torch.from_numpy(part) for part in (chosen, best[chosen], owner[chosen]))


def _greedy(score: Scores, images: int, texts: int, cfg: SelectConfig) -> tuple[Tensor, Tensor, Tensor]:
    lists = _Lists(score, images, texts, cfg.topk, cfg.select_chunk)
    rounds = _best_first if cfg.select_order == "best" else _image_by_image
    count = min(cfg.budget, texts) if images else 0
    taken = itertools.islice(itertools.chain.from_iterable(rounds(lists) for _ in itertools.count()), count)
    found = np.array(list(progress(taken, what="selecting", total=count, unit="sentence")), np.float64).reshape(-1, 3)
    ids, scores, owners = torch.from_numpy(found).unbind(1)  # all of them exact in float64
    return ids.long(), scores.float(), owners.long()


class _Lists:
    """The best unused sentences of each image: the first k when a list was made, made anew once all of it is used."""

    def __init__(self, score: Scores, images: int, texts: int, k: int, chunk: int) -> None:
        self.images, self.chunk = images, chunk
        self._score, self._k = score, k
        self._unused = np.ones(texts, bool)
        self._ids = np.zeros((images, k), np.int64)
        self._scores = np.full((images, k), np.inf, np.float32)
        self._next, self._length = np.zeros(images, np.int64), np.zeros(images, np.int64)

    def best(self, image: int) -> tuple[float, int] | None:
        """Score and sentence of the image's best unused one; None where its list must be made anew."""
        while self._next[image] < self._length[image]:
            sentence = int(self._ids[image, self._next[image]])
            if self._unused[sentence]:
                return float(self._scores[image, self._next[image]]), sentence
            self._next[image] += 1
        return None

    def bound(self, image: int) -> float:
        """No sentence outside the image's list has a greater score than this."""
        return float(self._scores[image, self._length[image] - 1])

    def fill(self, images: Iterable[int]) -> None:
        """Make the lists of these images anew, in one look at what is unused."""
        rows, left = torch.tensor(list(images)), torch.from_numpy(np.flatnonzero(self._unused))
        ids, scores = nearest(self._score, rows, left, self._k, self.chunk)
        length = ids.shape[1]
        self._ids[rows, :length], self._scores[rows, :length] = ids, scores
        self._next[rows], self._length[rows] = 0, length

    def take(self, image: int) -> tuple[int, float, int]:
        """Use the image's best sentence up: sentence, score, image."""
        score, sentence = self.best(image)
        self._unused[sentence] = False
        return sentence, score, image


def _image_by_image(lists: _Lists) -> Iterator[tuple[int, float, int]]:
    """One round: each image takes one sentence, in the order of the rows."""
    for image in range(lists.images):
        if lists.best(image) is None:
            turns = range(image, min(image + lists.chunk, lists.images))
            lists.fill(turn for turn in turns if lists.best(turn) is None)
        yield lists.take(image)


def _best_first(lists: _Lists) -> Iterator[tuple[int, float, int]]:
    """One round: each image takes one sentence, the best pair of all first.

    An image waits in the queue with its best sentence or, where its list is used up, with no sentence and the most that
    one could score: its list is made anew only when its turn may have come.
    """

    def place(image: int) -> tuple[float, int, int]:
        found = lists.best(image)
        if found is None:
            empty[image] = None
            return -lists.bound(image), -1, image
        return -found[0], found[1], image

    empty: dict[int, None] = {}  # in order, unlike a set
    queue = [place(image) for image in range(lists.images)]
    heapq.heapify(queue)
    while queue:
        _, sentence, image = queue[0]
        if sentence < 0 and image in empty:
            others = itertools.islice((other for other in empty if other != image), lists.chunk - 1)
            batch = [image, *others]
            lists.fill(batch)
            for other in batch:
                del empty[other]
        now = place(image)
        if now == queue[0] and now[1] >= 0:
            heapq.heappop(queue)
            yield lists.take(image)
        else:
            heapq.heapreplace(queue, now)


def write_selection(path: Path, found: Selection, texts: Callable[[int], str]) -> None:
    """The audit of a selection as CSV: id (a sentence's row), score, owner (the image's row) and the sentence."""
    with atomic(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("id", "score", "owner", "text"))
        for sentence, score, owner in zip(*map(Tensor.tolist, vars(found).values()), strict=True):
            rows.writerow((sentence, f"{score:.6f}", owner, texts(sentence)))
