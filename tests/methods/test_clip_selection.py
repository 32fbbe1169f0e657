"""Sentences selected by the images they describe: the specification's toys, and slow obvious twins."""

import csv
from collections.abc import Iterator

import pytest
import torch

from methods.clip_selection import SelectConfig, Selection, cosines, distinct, nearest, select, write_selection

TOY = torch.tensor([[0.9, 0.8, 0.1, 0.2], [0.85, 0.3, 0.6, 0.1]])


def chosen(scores, images=None, texts=None, **options) -> Selection:
    """A selection by a matrix of scores."""
    images = torch.arange(scores.shape[0]) if images is None else images
    texts = torch.arange(scores.shape[1]) if texts is None else texts
    cfg = SelectConfig(**{"select_chunk": 3} | options)
    return select(lambda rows, columns: scores[rows][:, columns], images, texts, cfg)


def triples(found: Selection) -> list[tuple[int, float, int]]:
    return list(zip(found.ids.tolist(), found.scores.tolist(), found.owners.tolist(), strict=True))


def slow_union(scores, topk, budget) -> list[tuple[int, float, int]]:
    proposed = {}
    for image, row in enumerate(scores.tolist()):
        for text in sorted(range(len(row)), key=lambda text: (-row[text], text))[:topk]:
            if text not in proposed or row[text] > proposed[text][0]:
                proposed[text] = row[text], image
    order = sorted(proposed, key=lambda text: (-proposed[text][0], text))
    return [(text, *proposed[text]) for text in order[:budget]]


def slow_greedy(scores, order) -> Iterator[tuple[int, float, int]]:
    table, used = scores.tolist(), set()
    while True:
        waiting = list(range(len(table)))
        while waiting:
            images = waiting[:1] if order == "image" else waiting
            pairs = [(-table[i][t], t, i) for i in images for t in range(len(table[i])) if t not in used]
            if not pairs:
                return
            score, text, image = min(pairs)
            used.add(text)
            waiting.remove(image)
            yield text, -score, image


@pytest.mark.parametrize(
    ("options", "ids"),
    [
        ({"select_mode": "union", "topk": 1, "budget": 4}, {0}),
        ({"select_mode": "union", "topk": 2, "budget": 4}, {0, 1, 2}),
        ({"select_mode": "union", "topk": 2, "budget": 2}, {0, 1}),
        ({"select_mode": "greedy", "select_order": "best", "budget": 2}, {0, 2}),
        ({"select_mode": "greedy", "select_order": "image", "budget": 2}, {0, 1}),
    ],
)
def test_the_specifications_toys(options, ids):
    scores = TOY.flip(0) if options.get("select_order") == "image" else TOY  # there the images go 1, then 0
    assert set(chosen(scores, **options).ids.tolist()) == ids


def test_who_a_sentence_is_owed_to():
    assert triples(chosen(TOY, budget=2)) == [(0, pytest.approx(0.9), 0), (2, pytest.approx(0.6), 1)]
    found = chosen(TOY.flip(0), select_order="image", budget=2)
    assert triples(found) == [(0, pytest.approx(0.85), 0), (1, pytest.approx(0.8), 1)]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("coarse", [False, True], ids=["scores", "ties"])
def test_selections_equal_slow_twins(seed, coarse):
    rng = torch.Generator().manual_seed(seed)
    images, texts = 2 + 3 * seed, 40
    # Some sentences suit every image, as those of real corpora do, so lists run out; coarse scores have many ties.
    scores = torch.randn(images, texts, generator=rng) + 2 * torch.randn(texts, generator=rng)
    scores = (scores * 2).round() / 8 if coarse else scores / 8
    for budget in (1, 7, 33, 40):
        for topk in (1, 4, 40):
            found = chosen(scores, select_mode="union", topk=topk, budget=budget)
            assert triples(found) == slow_union(scores, topk, budget)
        for order in ("best", "image"):
            twin = list(slow_greedy(scores, order))
            for topk, chunk in ((1, 1), (3, 4), (40, 64)):  # these change the work, not the result
                found = chosen(scores, select_order=order, budget=budget, topk=topk, select_chunk=chunk)
                assert triples(found) == twin[:budget]


def test_only_the_rows_that_are_asked_for_take_part():
    scores = torch.rand(6, 9, generator=torch.Generator().manual_seed(0))
    images, texts = torch.tensor([1, 2, 5]), torch.tensor([0, 3, 4, 8])
    for mode in ("union", "greedy"):
        found = chosen(scores, images, texts, select_mode=mode, budget=3)
        within = chosen(scores[images][:, texts], select_mode=mode, budget=3)
        assert torch.equal(found.ids, texts[within.ids]) and torch.equal(found.owners, images[within.owners])
        assert torch.equal(found.scores, scores[found.owners, found.ids])


def test_there_may_be_less_than_the_budget():
    assert len(chosen(TOY, budget=9)) == 4 and len(chosen(TOY, select_order="image", budget=9)) == 4
    assert len(chosen(TOY, select_mode="union", topk=1, budget=9)) == 1
    for mode in ("union", "greedy"):
        assert len(chosen(TOY, texts=torch.arange(0), select_mode=mode, budget=2)) == 0
        assert len(chosen(TOY, images=torch.arange(0), select_mode=mode, budget=2)) == 0


def test_the_nearest_are_exact_in_any_blocks():
    rng = torch.Generator().manual_seed(0)
    scores = (torch.randn(5, 50, generator=rng) * 4).round() / 4  # with ties, negative numbers and both zeros
    scores[0] = torch.where(torch.arange(50) % 2 == 0, 0.0, -0.0)
    columns = torch.arange(3, 50, 2)
    twin = scores[:, columns].sort(dim=1, descending=True, stable=True)
    for chunk in (1, 7, 100):
        ids, values = nearest(lambda rows, c: scores[rows][:, c], torch.arange(5), columns, 6, chunk)
        assert torch.equal(values, twin.values[:, :6]) and torch.equal(ids, columns[twin.indices[:, :6]])


class Vectors:
    """Features in memory, which note how many are asked for at once."""

    def __init__(self, vectors):
        self.vectors, self.most = vectors, 0

    def rows(self, indices):
        self.most = max(self.most, len(indices))
        return self.vectors[indices]


def test_cosines_a_block_at_a_time():
    rng = torch.Generator().manual_seed(0)
    images, texts = (Vectors(7 * torch.randn(count, 8, generator=rng)) for count in (30, 45))
    score = cosines(images, texts)
    whole = torch.cosine_similarity(images.vectors[:, None], texts.vectors[None], dim=2)
    for mode in ("union", "greedy"):
        cfg = SelectConfig(budget=20, topk=3, select_mode=mode, select_chunk=8)
        found = select(score, torch.arange(30), torch.arange(45), cfg)
        twin = slow_union(whole, 3, 20) if mode == "union" else list(slow_greedy(whole, "best"))[:20]
        assert found.ids.tolist() == [text for text, _, _ in twin]
        torch.testing.assert_close(found.scores, whole[found.owners, found.ids])
    assert images.most == texts.most == 8


def test_texts_that_say_the_same_count_once():
    texts = ["a cat", "", "a  cat ", "the ﬁsh", "the fish", " \t", "A cat", "caf\u00e9", "cafe\u0301", "a cat"]
    assert distinct(texts).tolist() == [0, 3, 6, 7]


def test_the_audit_holds_every_sentence_whole(tmp_path):
    texts = ["one, two", 'a "red" circle', "a line\nand another", "café"]
    write_selection(tmp_path / "selection.csv", chosen(TOY, budget=4), texts.__getitem__)
    with open(tmp_path / "selection.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["id", "score", "owner", "text"]
    assert [(int(row["id"]), row["text"]) for row in rows] == [(i, texts[i]) for i in (0, 2, 1, 3)]
    assert [row["score"] for row in rows[:2]] == ["0.900000", "0.600000"] and rows[1]["owner"] == "1"


def test_what_a_selection_leaves_unread_is_told():
    assert set(SelectConfig().idle()) == {"select_mode", "select_order", "topk", "select_chunk"}
    assert set(SelectConfig(budget=3, select_mode="union").idle()) == {"select_order"}
    assert not SelectConfig(budget=3).idle()
