"""Which caption stands for a cluster of images: words tell, not a language model.

For a class with captions D and clusters C_1 … C_k of them:
1. Words in at least `threshold` of D tell the class, not the cluster, and are passed over (so a lower threshold passes
   over more); so are stop words and the words of the label.
2. The `tpk` most frequent of the others, T_k with counts f_k(w), describe cluster k.
3. A caption s scores Σ f_k(w) over the words w of T_k that are in it. The best one is the prototype, verbatim.

Paper: VLCP (Zou et al., ICCV 2025). Its released code looks for words as parts of longer ones ("red" in "hundred";
"pet" in the label "petrol pump"), with capitals told apart, and breaks ties by what came first; where no caption
scores, the prompt is empty. Here words are whole, capitals do not matter, ties go by the word, and the caption nearest
to the centroid, or else the label, takes the place of an empty prompt. `COMPAT` are the released code's choices.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from utils.config import option

COMPAT = {"text_match": "substring", "score": "sum", "ties": "first"}

# Articles, pronouns, prepositions, conjunctions, auxiliaries and the rests of contractions. Words that tell how things
# look or where they are (thin, top, front, full, off to the left) are not among them.
_STOP = """
    a an the
    i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she her hers
    herself it its itself they them their theirs themselves one ones
    this that these those here there who whom whose which what when where why how
    of in on at to with from by for as into onto upon about against among amongst between within without through
    throughout during before after until till since per via toward towards
    and or but nor so yet if while whereas although though because unless than then also too
    am is are was were be been being do does did doing done have has had having can cannot could will would shall should
    may might must ought
    not no only just very more most some any each every both either neither other another such same own all
    ca wo sha ai gon na
    """
STOP_WORDS = frozenset(_STOP.split())

# What always ends a word (with a full stop at the end of one), as in the Treebank's rules; a comma or a colon does not
# where a digit follows.
_APART = re.compile(r"[\s;@#$%&?!*()\[\]{}<>\"“”«»„—–…]+|--+|\.{2,}|[,:](?!\d)")
_CONTRACTED = re.compile(r"(?:n't|'(?:s|m|d|ll|re|ve))$")


@dataclass(frozen=True)
class TextConfig:
    """How one caption stands for a cluster."""

    threshold: float = option(0.7, "words in at least this share of a class's captions are passed over", above=0)
    tpk: int = option(30, "most frequent words of a cluster that count", low=1)
    text_match: str = option(
        "word",
        "words are looked for whole, or as parts of others",
        aliases=("text-match",),
        choices=("word", "substring"),
    )
    score: str = option("sum", "a caption's score: its words' counts, or these per word of it", choices=("sum", "mean"))
    ties: str = option(
        "word", "words of equal count go by the alphabet, or the first seen leads", choices=("word", "first")
    )


@dataclass(frozen=True)
class TextPrototype:
    """The caption of a cluster.

    file   whose caption it is; empty where it is the label
    words  T_k with counts, most frequent first
    score  of the caption; 0 where it stands in for none that scores
    """

    text: str
    file: str
    words: tuple[tuple[str, int], ...]
    score: float


def tokens(text: str) -> list[str]:
    """The words of a text in lower case, in order: what consists of letters only, once white space, punctuation and
    the ends of contractions are taken off. Words with a hyphen, a slash or a digit vanish whole."""
    found = []
    for part in _APART.split(text.replace("’", "'").replace("‘", "'")):
        word = _CONTRACTED.sub("", part.rstrip(".,:").strip("'`").lower()).strip("'`")
        if word.isalpha():
            found.append(word)
    return found


def common_words(captions: Iterable[str], threshold: float, stop: frozenset[str] = STOP_WORDS) -> set[str]:
    """Words, stop words aside, that are in at least `threshold` (a share) of the captions."""
    sets = [set(tokens(caption)) for caption in captions]
    df = Counter(word for words in sets for word in words)
    return {word for word, count in df.items() if count >= threshold * len(sets)} - stop


def word_counts(captions: Iterable[str], label: str, cfg: TextConfig, passed_over: Iterable[str]) -> dict[str, int]:
    """The `tpk` most frequent words of these captions, those of the label and `passed_over` left out: T_k, f_k."""
    known, own = set(passed_over), set(tokens(label.replace("_", " ")))

    def told(word: str) -> bool:
        return word in (label if cfg.text_match == "substring" else own)

    counts = Counter(word for caption in captions for word in tokens(caption) if word not in known and not told(word))
    if cfg.ties == "first":
        return dict(counts.most_common(cfg.tpk))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))[: cfg.tpk])


def score(caption: str, counts: dict[str, int], cfg: TextConfig) -> float:
    """How well a caption tells the cluster whose words these are."""
    words = tokens(caption)
    within = caption if cfg.text_match == "substring" else set(words)
    total = sum(count for word, count in counts.items() if word in within)
    return total / max(1, len(words)) if cfg.score == "mean" else total


def text_prototypes(
    clusters: Sequence[Sequence[tuple[str, str]]],
    label: str,
    cfg: TextConfig,
    nearest: Sequence[Sequence[str]] | None = None,
    stop: frozenset[str] = STOP_WORDS,
) -> list[TextPrototype]:
    """The text prototype of every cluster of one class.

    clusters  of each the (file, caption) pairs of its members; members without a caption are left out or blank
    nearest   of each the files of its members, the nearest to the centroid first: whose caption stands in where none
              scores (None: the first pair's)
    """
    clusters = [[pair for pair in pairs if pair[1].strip()] for pairs in clusters]
    if cfg.ties == "word":  # equal scores, too, are then independent of the order that captions come in
        clusters = [sorted(pairs) for pairs in clusters]
    passed_over = stop | common_words((caption for pairs in clusters for _, caption in pairs), cfg.threshold, stop)
    found = []
    for number, pairs in enumerate(clusters):
        counts = word_counts((caption for _, caption in pairs), label, cfg, passed_over)
        scores = [score(caption, counts, cfg) for _, caption in pairs]
        best = max(scores, default=0)
        if best > 0:
            file, text = pairs[scores.index(best)]
        else:
            known = dict(pairs)
            order = [file for file in nearest[number] if file in known] if nearest else []
            file = next(iter(order or known), "")
            text = known.get(file, label)
        found.append(TextPrototype(text, file, tuple(counts.items()), best))
    return found
