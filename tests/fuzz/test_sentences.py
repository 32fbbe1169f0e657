"""Captions of any kind through what makes numbers of them: cleaning, tfidf, a tiny BERT and CLIP's tokeniser, and
through the choice of text prototypes."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from transformers import BertConfig, CLIPTextConfig

from data.captions import clean_caption
from methods.prototype_captions import clean
from methods.prototype_texts import TextConfig, text_prototypes
from networks.prompts import fill
from networks.text import LsaEncoder, TransformerEncoder
from networks.towers import TowerConfig
from tests.fuzz.cases import fuzz, outcome, texts

huge = st.sampled_from(
    ["cat " * 5000, "c" * 100_000, "é" * 9999, "猫" * 700, "[PAD] [SEP] [CLS] [MASK] [UNK]", "<|endoftext|>"]
)
captions = st.one_of(texts, texts, st.text(max_size=60), huge, st.sampled_from(["a red cat", "two dogs run", "the"]))
lists = st.lists(captions, min_size=1, max_size=6)
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


class Tiny(TransformerEncoder):
    """A text encoder of a few weights, its vocabulary learned from the captions."""

    def __init__(self, kind: str, known: list[str]) -> None:
        super().__init__(TowerConfig(text_encoder=kind, text_pretrained=False), lambda: known)

    def _config(self):
        if self.cfg.text_encoder == "bert":
            return BertConfig(**SIZES, vocab_size=120)
        return CLIPTextConfig(**SIZES, vocab_size=600, projection_dim=16)


@fuzz(500, 8, known=lists, asked=lists)
def test_tfidf(scratch, known, asked) -> None:
    """Captions have finite embeddings, the same each time, or nothing can be learned from them, in one line."""

    def main() -> None:
        encoder = LsaEncoder(lambda: known, 4)
        found = encoder.encode(asked)
        assert found.shape == (len(asked), encoder.width) and np.isfinite(found).all()
        assert np.array_equal(found, LsaEncoder(lambda: known, 4).encode(asked))

    outcome(main)


@fuzz(150, 4, known=lists, asked=lists, kind=st.sampled_from(["bert", "clip"]))
def test_transformers(scratch, known, asked, kind) -> None:
    """A tokeniser is learned from any captions, and any captions have finite embeddings."""
    encoder = Tiny(kind, known)
    found = encoder.encode(asked, quiet=True)
    assert found.shape == (len(asked), 16) and np.isfinite(found).all()
    assert encoder.fingerprint


@fuzz(600, 12, text=captions)
def test_cleaning(scratch, text) -> None:
    """What is clean stays as it is, and has no more words than are read."""
    cleaned = clean_caption(text)
    assert len(cleaned.split(" ")) <= 30
    assert clean(clean(text)) == clean(text)
    assert fill("a photo of a {}.", text) == f"a photo of a {text}."


named = st.lists(st.lists(captions, max_size=4), min_size=1, max_size=3)


@fuzz(
    600,
    12,
    clusters=named,
    label=captions,
    match=st.sampled_from(["word", "substring"]),
    score=st.sampled_from(["sum", "mean"]),
    ties=st.sampled_from(["word", "first"]),
)
def test_text_prototypes(scratch, clusters, label, match, score, ties) -> None:
    """Each cluster gets one of its own captions, word for word, or the label."""
    cfg = TextConfig(text_match=match, score=score, ties=ties)
    pairs = [[(f"{number}/{place}", text) for place, text in enumerate(own)] for number, own in enumerate(clusters)]
    found = text_prototypes(pairs, label, cfg)
    assert len(found) == len(clusters)
    for own, one in zip(pairs, found, strict=True):
        assert (one.file, one.text) in own if one.file else one.text == label


def test_a_caption_of_nothing_is_one_for_every_encoder() -> None:
    """The shortest case of all, by name: an empty caption among others."""
    for kind in ("bert", "clip"):
        assert np.isfinite(Tiny(kind, ["a cat", ""]).encode(["", "a cat"], quiet=True)).all()
