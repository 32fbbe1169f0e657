"""Which caption stands for a cluster: the numbers are small enough to be worked out by hand."""

import random

import pytest

from methods.prototype_texts import (
    COMPAT,
    STOP_WORDS,
    TextConfig,
    common_words,
    score,
    text_prototypes,
    tokens,
    word_counts,
)
from utils.config import options_of
from utils.errors import UserError

# A stop-word list of the examples' own, so that ours may grow.
WORDS = "a an the and or of in on at to with is are was it its this that has have which"
STOP = frozenset(WORDS.split())
DOGS = {
    1: "The dog is brown and sits on grass.",
    2: "A brown dog with a red collar stands on grass.",
    3: "The dog is black.",
    4: "The dog has black fur and a red collar.",
    5: "A small brown dog with black ears.",
}
PUBLISHED = TextConfig(**COMPAT)


def cluster(*numbers):
    return [(f"dog/{number}.png", DOGS[number]) for number in numbers]


A, B = cluster(1, 2, 5), cluster(3, 4)


def captions(*texts):
    return [(f"cat/{number}.png", text) for number, text in enumerate(texts)]


def chosen(clusters, label, cfg=None, nearest=None, stop=STOP):
    return text_prototypes(clusters, label, cfg or TextConfig(), nearest, stop)


def test_the_published_way_is_one_name():
    assert {name: getattr(PUBLISHED, name) for name in COMPAT} == COMPAT
    assert (PUBLISHED.text_match, PUBLISHED.score, PUBLISHED.ties) == ("substring", "sum", "first")
    assert (TextConfig().text_match, TextConfig().threshold, TextConfig().tpk) == ("word", 0.7, 30)


class TestTokens:
    @pytest.mark.parametrize(
        "text, words",
        [
            ("It has a short-haired coat and doesn't look up.", "it has a coat and does look up"),
            ("black/white fur; brown,black nose (pink) 3 legs end.Next", "fur brown black nose pink legs"),
            ("The dog's ears aren't the dogs' best; they'll do.", "the dog ears are the dogs best they do"),
            ("I'm sure he’d say it isn’t “red”...", "i sure he say it is red"),
            ("Ça va? Très bien!Oui", "ça va très bien oui"),
            ("a -- b - c [d] {e} <f> 'g' \"h\"", "a b c d e f g h"),
            ("3 4th 50% x2 e.g. U.S. o'clock", ""),
            ("", ""),
        ],
    )
    def test_words_of_letters_in_lower_case(self, text, words):
        assert tokens(text) == words.split()


def test_stop_words_are_no_looks():
    assert STOP <= STOP_WORDS
    looks = "thin thick top bottom front side back full empty fire red black left right long small open round cat"
    assert not STOP_WORDS & set(looks.split())
    assert all(tokens(word) == [word] for word in STOP_WORDS)


class TestDogs:
    """Five captions, two clusters."""

    def test_words_in_most_captions_are_common(self):
        everything = [caption for _, caption in A + B]
        assert common_words(everything, 0.7, STOP) == {"dog"}  # 5 of 5; brown and black have 3
        assert common_words(everything, 0.5, STOP) == {"dog", "brown", "black"}
        assert common_words(everything, 0.4, STOP) == {"dog", "brown", "black", "grass", "red", "collar"}
        assert common_words(everything, 2.0, STOP) == set()

    @pytest.mark.parametrize("cfg", [TextConfig(), PUBLISHED], ids=["ours", "published"])
    def test_at_0_7(self, cfg):
        first, second = chosen([A, B], "dog", cfg)
        assert dict(first.words) == dict(
            brown=3, grass=2, sits=1, red=1, collar=1, stands=1, small=1, black=1, ears=1
        ) and first.words[:2] == (("brown", 3), ("grass", 2))
        assert (first.text, first.file, first.score) == (DOGS[2], "dog/2.png", 8)
        assert dict(second.words) == dict(black=2, fur=1, red=1, collar=1)
        assert (second.text, second.file, second.score) == (DOGS[4], "dog/4.png", 5)
        counts = dict(first.words)
        assert [score(DOGS[number], counts, cfg) for number in (1, 2, 5)] == [6, 8, 6]
        assert score(DOGS[3], dict(second.words), cfg) == 2

    @pytest.mark.parametrize("match", ["word", "substring"])
    def test_at_0_5(self, match):
        first, second = chosen([A, B], "dog", TextConfig(threshold=0.5, text_match=match))
        assert (first.text, first.score) == (DOGS[2], 5)
        assert (second.text, second.score) == (DOGS[4], 3)

    def test_our_own_stop_words_choose_the_same(self):
        assert [found.text for found in text_prototypes([A, B], "dog", TextConfig())] == [DOGS[2], DOGS[4]]

    def test_few_words_a_cluster(self):
        found, _ = chosen([A, B], "dog", TextConfig(tpk=1))
        assert found.words == (("brown", 3),) and found.text == DOGS[1]  # all have it; the first counts


class TestFaultsOfThePublishedWay:
    def test_words_inside_other_words(self):
        known = captions("A red cat.", "A red cat again.", "Scattered hundred bred.")
        (ours,) = chosen([known], "cat", TextConfig(threshold=2.0))
        assert (ours.text, ours.score) == ("A red cat again.", 3)
        assert dict(ours.words) == dict(red=2, again=1, scattered=1, hundred=1, bred=1)
        (theirs,) = chosen([known], "cat", TextConfig(**COMPAT, threshold=2.0))
        assert (theirs.text, theirs.score) == ("Scattered hundred bred.", 4)

    def test_capitals(self):
        known = captions("Red cat.", "A red cat.", "Red cat sleeping.")
        (ours,) = chosen([known], "cat", TextConfig(threshold=2.0))
        assert (ours.text, ours.score, dict(ours.words)) == ("Red cat sleeping.", 4, dict(red=3, sleeping=1))
        (theirs,) = chosen([known], "cat", TextConfig(**COMPAT, threshold=2.0))
        assert (theirs.text, theirs.score) == ("A red cat.", 3)

    @pytest.mark.parametrize(
        "label, inside, own",
        [
            ("gas pump, gasoline pump, petrol pump, island dispenser", "pet land line is", "gas pump petrol"),
            ("Old English sheepdog, bobtail", "she dog sheep bob tail", "old english sheepdog bobtail"),
        ],
    )
    def test_words_of_the_label(self, label, inside, own):
        everything = [f"{inside} {own}"]
        assert set(word_counts(everything, label, TextConfig(), frozenset())) == set(inside.split())
        gone = set(word_counts(everything, label, PUBLISHED, frozenset()))
        assert gone == ({"old", "english"} if "Old" in label else set())  # their capitals hide them

    def test_a_label_of_a_folder_name(self):
        assert set(word_counts(["an aquarium fish swims"], "aquarium_fish", TextConfig(), STOP)) == {"swims"}


class TestTies:
    KNOWN = ("zebra cat ant", "ant zebra", "bee zebra")

    def test_ours_go_by_the_word(self):
        (found,) = chosen([captions(*self.KNOWN)], "dog", TextConfig(threshold=2.0, tpk=3))
        assert found.words == (("zebra", 3), ("ant", 2), ("bee", 1))

    def test_published_ones_by_what_came_first(self):
        (found,) = chosen([captions(*self.KNOWN)], "dog", TextConfig(**COMPAT, threshold=2.0, tpk=3))
        assert found.words == (("zebra", 3), ("ant", 2), ("cat", 1))

    def test_ours_do_not_depend_on_the_order_of_captions(self):
        for seed in range(20):
            shuffled = random.Random(seed).sample(A, len(A))
            assert chosen([shuffled, B], "dog") == chosen([A, B], "dog")
        alike = captions("a red cat", "the red cat")
        assert chosen([alike[::-1]], "cat") == chosen([alike], "cat")


def test_the_mean_prefers_short_captions():
    known = captions("red fox", "a red fox on the long wide green hill far from all that lives", "red")
    threshold = dict(threshold=2.0)
    (total,) = chosen([known], "dog", TextConfig(**threshold))
    assert total.file == "cat/1.png"
    (mean,) = chosen([known], "dog", TextConfig(**threshold, score="mean"))
    assert mean.file == "cat/2.png" and mean.score == 3  # 3 reds over one token; "red fox" has 5 over two


class TestNeverEmpty:
    """The published way sends an empty prompt where no caption scores."""

    SAME = captions("The cat.", "A cat.", "It is a cat!")

    @pytest.mark.parametrize("cfg", [TextConfig(), PUBLISHED], ids=["ours", "published"])
    def test_the_caption_nearest_to_the_centroid(self, cfg):
        (found,) = chosen([self.SAME], "cat", cfg, nearest=[["cat/9.png", "cat/1.png", "cat/0.png"]])
        assert (found.text, found.file, found.words, found.score) == ("A cat.", "cat/1.png", (), 0)

    def test_then_the_first(self):
        assert chosen([self.SAME], "cat")[0].text == "The cat."

    def test_then_the_label(self):
        blank, full = captions("", " \n"), captions("a red hat")
        found = chosen([[], blank, full], "tabby, tabby cat", TextConfig(threshold=2.0), [[], ["cat/0.png"], []])
        assert [item.text for item in found] == ["tabby, tabby cat", "tabby, tabby cat", "a red hat"]
        assert [item.file for item in found] == ["", "", "cat/0.png"]

    def test_captions_without_words(self):
        assert chosen([captions("1234", "...")], "cat")[0].text == "1234"


def test_a_threshold_that_takes_every_word():
    with pytest.raises(UserError, match=r"--threshold is 0\.0; it must be greater than 0"):
        options_of(TextConfig)["threshold"].read("0", "--threshold")
