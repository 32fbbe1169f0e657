"""Class vectors and zero-shot scores: the specification's toy, and what must not matter."""

import pytest
import torch

from methods.core.zero_shot import class_vectors, zero_shot_scores
from utils.errors import RunError, UserError

RAW = {"a cat": (2.0, 0.0), "the cat": (0.0, 1.0), "a dog": (0.0, 3.0), "the dog": (0.0, 1.0), "a": (0.0, 0.0)}


def encode(sentences):
    return torch.tensor([RAW[sentence] for sentence in sentences])


def test_each_sentence_counts_alike():
    # Without the first normalisation cat would be (0.8944, 0.4472).
    found = class_vectors(encode, ["cat", "dog"], ["a {}", "the {}"])
    assert torch.allclose(found, torch.tensor([[0.7071, 0.7071], [0.0, 1.0]]), atol=1e-4)


def test_many_sentences_are_encoded_in_parts_and_once_each():
    asked = []

    def count(sentences):
        asked.extend(sentences)
        rows = [sum(map(ord, sentence)) for sentence in sentences]
        return torch.stack([torch.randn(5, generator=torch.Generator().manual_seed(row)) for row in rows])

    names = [f"class {number}" for number in range(300)]
    found = class_vectors(count, names, ["{}", "a {}", "always this"])
    assert found.shape == (300, 5) and torch.allclose(found.norm(dim=1), torch.ones(300))
    assert len(asked) == len(set(asked)) == 601
    assert torch.equal(found[7:8], class_vectors(count, names[7:8], ["{}", "a {}", "always this"]))


def test_scores_are_a_hundred_cosines():
    images, classes = torch.tensor([[3.0, 0.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
    expected = torch.tensor([[100.0, 0.0], [70.7107, 70.7107]])
    assert torch.allclose(zero_shot_scores(images, classes), expected, atol=1e-3)
    assert torch.allclose(zero_shot_scores(7 * images, classes, 1.0), expected / 100, atol=1e-5)


def test_nothing_to_say_is_told():
    with pytest.raises(UserError, match="1 class names and 0 templates"):
        class_vectors(encode, ["cat"], [])
    with pytest.raises(RunError, match="no direction"):
        class_vectors(encode, ["a"], ["{}"])
