"""What can be judged: names of files, what they weigh, and the recipe that networks learn each set by."""

from pathlib import Path

import pytest
import torch

from methods.core.retrieval import PairSet
from methods.lors import LossConfig
from methods.pair_sources import (
    Learned,
    PairRecipe,
    SourceConfig,
    check_alike,
    list_entries,
    named_file,
    random_sets,
    read_learned,
    real_counts,
    tower_pair,
)
from utils.errors import UserError

CPU = torch.device("cpu")


def save(path: Path, count: int, width: int, size: int, matrix=None, params=(), **parts: object) -> Path:
    """A file of LoRS's layout; nothing but its shapes and its similarity matters, so one zero stands for all pixels."""
    zero = torch.zeros(())
    state = {"image": zero.expand(count, 3, size, size), "text": zero.expand(count, width)}
    state |= {"similarity_mat": torch.eye(count) if matrix is None else matrix, "similarity_params": list(params)}
    rates = {"syn_lr_img": torch.tensor(0.5), "syn_lr_txt": torch.tensor(0.25)}
    torch.save(state | rates | parts, path)
    return path


def low_rank(count: int, rank: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    diag, left, right = torch.ones(count), torch.ones(count, rank), torch.full((count, rank), 0.1)
    return torch.diag(diag) + left @ right.T, [diag, left, right]


def learned(*counts: int, matrix=None, config=None, name="ours", lr=(0.5, 0.25), **noted) -> Learned:
    rates = dict(zip(("img", "txt"), lr, strict=True))
    phases = [PairSet(torch.zeros(n, 3, 8, 8), torch.zeros(n, 5), matrix, rates) for n in counts]
    return Learned(name, Path(f"{name}.pt"), phases, {"config": config or {}, **noted}, 0)


class TestNames:
    @pytest.mark.parametrize(
        "text, name, file",
        [
            ("LoRS=a/b.pt", "LoRS", "a/b.pt"),
            ("runs/vldd/flickr_100/distilled_best.pt", "flickr_100", "runs/vldd/flickr_100/distilled_best.pt"),
            ("distilled_best.pt", "distilled_best", "distilled_best.pt"),
            ("a/ours.pt", "ours", "a/ours.pt"),
            ("two words = x.pt", "two words", "x.pt"),
        ],
    )
    def test_of_files(self, text, name, file):
        assert named_file(text) == (name, Path(file))

    def test_a_file_may_have_the_sign_in_its_own_name(self, tmp_path):
        path = tmp_path / "lr=1" / "ours.pt"
        path.parent.mkdir()
        path.touch()
        assert named_file(str(path)) == ("ours", path)

    @pytest.mark.parametrize("text", ["=a.pt", "NAME=", " =a.pt"])
    def test_half_of_one_is_refused(self, text):
        with pytest.raises(UserError, match=f"takes FILE or NAME=FILE, not '{text}'"):
            named_file(text)

    def test_of_towers(self):
        assert tower_pair("nf_resnet50+bert") == ("nf_resnet50", "bert")
        for text in ("bert", "+bert", "vit+", "vit+bert+clip", ""):
            with pytest.raises(UserError, match="takes IMAGE\\+TEXT"):
                tower_pair(text)

    @pytest.mark.parametrize(
        "options, wanted",
        [
            ({"compare": ("a/x.pt", "b/x.pt")}, "the set 'x' is named twice; tell them apart by --compare NAME=FILE"),
            ({"compare": ("a.pt",), "distilled": "b.pt"}, "takes the place of --distilled"),
            ({"compare": ("a.pt",), "data": ("random",)}, "--compare needs distilled among --data"),
            ({"compare": ("herding=a.pt",)}, "cannot be called 'herding'"),
            ({"cross": ("vit+bert", "vit+bert")}, "the pair of towers 'vit.bert' is named twice"),
            ({"cross": ("vit",)}, "takes IMAGE\\+TEXT"),
            ({"data": ("random", "random")}, "the word of --data 'random' is named twice"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, wanted):
        with pytest.raises(UserError, match=wanted):
            SourceConfig(**options).check()


class TestBytes:
    """All of it as float32: pixels and embeddings, the similarity as stored, and two rates a phase."""

    def test_of_lors_with_99_pairs(self, tmp_path):
        """Rank 10, 224 pixels, BERT: 3 · 224² + 768 = 151,296 numbers a pair, and 1 + 2 · 10 for its similarity."""
        matrix, params = low_rank(99, 10)
        found = read_learned("lors", save(tmp_path / "lors.pt", 99, 768, 224, matrix, params), CPU)
        assert found.bytes == 99 * 151_296 * 4 + 99 * 21 * 4 + 8 == 59_921_540
        assert found.count == 99 and found.config == {}

    @pytest.mark.parametrize(
        "kind, numbers", [("identity", 0), ("full", 36), ("low-rank", 6 * 5), ("matrix alone", 36)]
    )
    def test_of_each_similarity(self, tmp_path, kind, numbers):
        matrix, params = low_rank(6, 2)
        parts = {
            "identity": (None, [torch.eye(6)]),  # as LoRS saves it
            "full": (matrix, [matrix]),
            "low-rank": (matrix, params),
            "matrix alone": (matrix, []),
        }[kind]
        found = read_learned("x", save(tmp_path / "x.pt", 6, 5, 8, *parts), CPU)
        assert found.bytes == 4 * (6 * (3 * 64 + 5) + numbers + 2)

    def test_of_phases(self, tmp_path):
        rates = {"syn_lr_img": torch.tensor([0.5, 0.4]), "syn_lr_txt": torch.tensor([0.5, 0.4])}
        path = save(tmp_path / "x.pt", 6, 5, 8, phases=[2, 4], **rates)
        assert read_learned("x", path, CPU).bytes == 4 * (6 * (3 * 64 + 5) + 4)

    def test_of_real_pairs(self, corpus):
        random, full = list_entries(SourceConfig(data=("random", "full"), num_pairs=7), LossConfig(), [], None, 0)
        assert random.bytes(corpus, 16) == 4 * 7 * (3 * 16 * 16 + 16) and random.size(corpus) == 7
        captions = len(corpus["train"].captions)
        assert captions > 96, "all captions are needed, several an image"
        assert full.bytes(corpus, 16) == 4 * (96 * 3 * 16 * 16 + captions * 16) and full.size(corpus) == 96


class TestRecipes:
    def test_a_compared_set_has_its_own(self):
        noted = {"loss_type": "WBCE", "temperature": 0.1, "clamp_similarity": True, "dataset": "flickr"}
        both = [learned(4, config=noted, name="a"), learned(2, 3, name="b", lr=(0.3, 0.2))]
        source = SourceConfig(compare=("a.pt", "b.pt"))
        a, b = list_entries(source, LossConfig("CWCL", 0.05), both, None, 0)
        assert a.recipe == PairRecipe(LossConfig("WBCE", 0.1, True), (4,), (0.5,), (0.25,))
        assert b.recipe == PairRecipe(LossConfig("CWCL", 0.05), (2, 3), (0.3, 0.3), (0.2, 0.2)), "nothing noted: flags"
        assert [part.lr for part in b.sets(None, 0)] == [{"img": 0.3, "txt": 0.2}] * 2
        (single,) = list_entries(SourceConfig(), LossConfig("KL"), both[:1], None, 0)
        assert single.recipe.loss.loss_type == "KL", "the flags know what the file notes, and may say otherwise"

    def test_rates_given_by_hand_are_those_of_every_set(self):
        source = SourceConfig(data=("distilled", "random"), syn_lr_img=2.0)
        ours, random = list_entries(source, LossConfig(), [learned(4)], None, 0)
        assert (ours.recipe.lr_img, ours.recipe.lr_txt) == ((2.0,), (0.25,))
        assert (random.recipe.lr_img, random.recipe.lr_txt) == ((2.0,), (0.1,))
        assert ours.sets(None, 0)[0].lr == {"img": 2.0, "txt": 0.25}

    def test_real_sets_are_as_large_as_the_learned_ones(self):
        three = [learned(4, name="a"), learned(2, 3, name="b"), learned(4, name="c")]
        assert real_counts(SourceConfig(), three) == [4, 5]
        assert real_counts(SourceConfig(num_pairs=9), three) == [9] and real_counts(SourceConfig(), []) == [100]
        entries = list_entries(SourceConfig(data=("random",)), LossConfig(), three, None, 0)
        assert [entry.name for entry in entries] == ["random, 4 pairs", "random, 5 pairs"]
        assert list_entries(SourceConfig(data=("random",)), LossConfig(), three[:1], None, 0)[0].name == "random"

    def test_what_makes_no_difference_to_real_pairs_makes_no_recipe(self):
        """A rate of 0.1 in float32, a clamped identity, and a text rate that VLDD's protocol does not use."""
        single = float(torch.tensor(0.1))
        assert single != 0.1
        ours = PairRecipe(LossConfig(clamp_similarity=True), (4,), (single,), (0.3,))
        flags = PairRecipe(LossConfig(), (4,), (0.1,), (0.1,))
        assert ours.on_real("vldd") == flags.on_real("vldd") and ours.on_real("clean") != flags.on_real("clean")
        other = PairRecipe(LossConfig(temperature=0.1), (4,), (0.1,), (0.1,))
        assert other.on_real("vldd") != flags.on_real("vldd") and hash(flags) == hash(flags.on_real("clean"))

    def test_random_pairs_of_a_recipe(self, corpus):
        """The phases and rates of the set; the same pairs, whatever the loss; others for another network."""
        recipe = PairRecipe(LossConfig(), (3, 5), (0.5, 0.4), (0.2, 0.1))
        first, second = random_sets(recipe, 7, corpus, 0)
        assert [len(first.images), len(second.images)] == [3, 5]
        assert first.lr == {"img": 0.5, "txt": 0.2} and second.lr == {"img": 0.4, "txt": 0.1}
        assert first.similarity is None and second.similarity is None
        one = PairRecipe(LossConfig("KL"), (8,), (0.1,), (0.1,))
        (whole,), (other,) = (random_sets(one, 7, corpus, number) for number in (0, 1))
        assert torch.equal(whole.images, torch.cat([first.images, second.images]))
        assert torch.equal(whole.texts[:3], first.texts) and not torch.equal(whole.images, other.images)

    def test_a_coreset_is_one_set_for_all_networks(self, corpus):
        asked = []

        class Chooser:
            def pairs(self, kind, count):
                asked.append((kind, count))
                return torch.arange(count), torch.arange(count) * 2

            def about(self, kind):
                return f"how {kind} chooses"

        (entry,) = list_entries(SourceConfig(data=("herding",), num_pairs=3), LossConfig(), [], Chooser(), 0)
        (one,), (again,) = entry.sets(corpus, 0), entry.sets(corpus, 1)
        assert torch.equal(one.images, again.images) and asked == [("herding", 3)], "chosen once"
        assert torch.equal(one.images, corpus["train"].eval_images(torch.arange(3)))
        assert torch.equal(one.texts, corpus.texts("train", [0, 2, 4]))
        assert entry.about == "how herding chooses" and one.lr == {"img": 0.1, "txt": 0.1}


class TestRefused:
    def test_a_loss_of_probabilities_with_another_similarity(self):
        matrix = torch.eye(4) * 1.5 - 0.25
        noted = {"loss_type": "BCE"}
        source = SourceConfig(compare=("ours.pt",))
        with pytest.raises(UserError, match=r"BCE needs .* ours.pt goes from -0.25 to 1.25; give --clamp_similarity"):
            list_entries(source, LossConfig(), [learned(4, matrix=matrix, config=noted)], None, 0)
        clamped = learned(4, matrix=matrix, config=noted | {"clamp_similarity": True})
        (entry,) = list_entries(source, LossConfig(), [clamped], None, 0)
        assert torch.equal(entry.sets(None, 0)[0].similarity, torch.eye(4))
        bare = learned(4, matrix=matrix)
        (entry,) = list_entries(source, LossConfig("BCE", clamp_similarity=True), [bare], None, 0)
        assert torch.equal(entry.sets(None, 0)[0].similarity, torch.eye(4)), "a file of LoRS goes by the flags"
        assert torch.equal(bare.phases[0].similarity, matrix), "and is left as it is"

    @pytest.mark.parametrize(
        "other, wanted",
        [
            ({"dataset": "coco"}, "b.pt was made with dataset coco, a.pt with flickr"),
            ({"image_size": 32}, "b.pt was made with image_size 32, a.pt with 16"),
            ({"text_encoder": "clip"}, "b.pt was made with text_encoder clip, a.pt with bert"),
            ({"train_limit": 9}, "b.pt was made with train_limit 9"),
        ],
    )
    def test_files_that_are_not_alike(self, other, wanted):
        config = {"dataset": "flickr", "image_size": 16, "text_encoder": "bert", "toy_images": 1}
        bare, a = learned(4, name="bare"), learned(4, name="a", config=config)
        alike = learned(4, name="c", config=config | {"toy_images": 2, "image_encoder": "vit"})
        check_alike([bare, a, alike])
        with pytest.raises(UserError, match=wanted):
            check_alike([bare, a, alike, learned(4, name="b", config=config | other)])

    def test_text_encoders_of_one_name(self):
        config = {"dataset": "flickr", "text_encoder": "bert"}
        a, b, c = (
            learned(4, name=n, config=config, text_fingerprint=p) for n, p in (("a", "1"), ("b", "2"), ("c", None))
        )
        check_alike([a, c])
        with pytest.raises(UserError, match=r"b.pt was made with another bert than a.pt"):
            check_alike([a, c, b])
