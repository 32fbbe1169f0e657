"""Sets of several phases: what learns, what is written and read, and what a set can begin with."""

import itertools

import pytest
import torch

from methods.core.outer import OuterConfig, outer_loop
from methods.lors import KINDS
from methods.pair_files import read_phases
from methods.pairs import PairsConfig, start_pairs
from tests.methods.conftest import CPU, generator, load_pairs, pairs
from utils.errors import UserError


def moved(*counts, seed=0, **options):
    """A set that is no longer what it was at the start."""
    learned = pairs(*counts, seed=seed, **options)
    rng = generator(seed + 100)
    with torch.no_grad():
        for leaf in learned.leaves:
            leaf += 0.05 * torch.rand(leaf.shape, generator=rng)
    return learned


def save(learned, path, **changes):
    torch.save(learned.published() | changes, path)
    return path


def tensors(learned):
    return [[tensor.detach().clone() for tensor in phase.tensors] for phase in learned.phases]


class TestLearning:
    def test_every_phase_has_rates_of_its_own(self):
        learned = pairs(4, 6, 3, sim_type="lowrank", lr_img=1.0, lr_txt=2.0, lr_lr=3.0, lr_sim=4.0)
        assert [len(phase) for phase in learned.phases] == [4, 6, 3]
        assert [group["lr"] for group in learned.param_groups()] == [1.0, 2.0, 3.0, 4.0] * 3
        assert len(learned.leaves) == 21 == len({id(leaf) for leaf in learned.leaves})

    def test_a_step_on_one_leaves_the_others_bit_for_bit(self, open_run):
        """Also where momentum would go on. The average of a phase moves when the phase does, and only then."""
        learned = pairs(4, 6, sim_type="full", lr_img=0.1, lr_txt=0.1, lr_lr=0.01, lr_sim=0.1, ema_decay=0.5)
        states = [tensors(learned)]
        averages = []

        def step(number):
            loss = sum(leaf.square().sum() for leaf in learned.phases[number % 2].leaves)
            loss.backward()
            states.append(tensors(learned))
            averages.append([kept.images.detach().clone() for kept in learned.average])
            return {"loss": float(loss.detach())}

        cfg = OuterConfig(iterations=4, eval_it=0, momentum=0.9)
        outer_loop(step, learned, cfg.plan(), open_run(), lambda step: 0.0, lambda step, best: None)
        states = [*states[2:], tensors(learned)]  # after each step
        before = states[0]
        for number, after in enumerate(states[1:], 1):
            stood, went = (number + 1) % 2, number % 2
            assert all(torch.equal(a, b) for a, b in zip(before[stood], after[stood], strict=True))
            assert not any(torch.equal(a, b) for a, b in zip(before[went], after[went], strict=True))
            before = after
        moved = [[not torch.equal(a, b) for a, b in zip(*two, strict=True)] for two in itertools.pairwise(averages)]
        assert moved == [[True, False], [False, True], [True, False]]

    def test_start(self, corpus):
        """Distinct images over all phases; the same as those of one phase with as many."""
        cfg = PairsConfig(num_pairs=(5, 3), sim_type="lowrank", sim_rank=2)
        learned = start_pairs(corpus, cfg, 16, generator(1))
        assert [len(phase) for phase in learned.phases] == [5, 3]
        assert [phase.similarity.leaves[1].shape for phase in learned.phases] == [(5, 2), (3, 2)]
        whole = start_pairs(corpus, PairsConfig(num_pairs=(8,)), 16, generator(1)).phases[0]
        assert torch.equal(torch.cat([phase.images for phase in learned.phases]), whole.images)
        assert len({image.detach().numpy().tobytes() for image in whole.images}) == 8

    def test_kmeans_gives_each_phase_some_of_all_clusters(self, corpus):
        features = 100 * torch.eye(12).repeat_interleave(8, 0) + 0.1 * torch.randn(96, 12, generator=generator(4))
        cfg = PairsConfig(num_pairs=(6, 6), pair_init="kmeans")
        plain = corpus["train"].eval_images(torch.arange(96)).flatten(1)
        clusters = []
        for phase in start_pairs(corpus, cfg, 16, generator(), lambda: features).phases:
            clusters.append((torch.cdist(phase.images.detach().flatten(1), plain).argmin(1) // 8).tolist())
        assert sorted(clusters[0] + clusters[1]) == list(range(12))
        assert clusters[0] + clusters[1] != list(range(12))

    def test_numbers_that_do_not_fit(self):
        with pytest.raises(UserError, match="--num_pairs names no number"):
            PairsConfig(num_pairs=()).check()
        with pytest.raises(UserError, match="--sim_rank is 5 for 4 pairs"):
            PairsConfig(num_pairs=(6, 4), sim_type="lowrank", sim_rank=5).check()


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_layout(self, tmp_path, kind):
        learned = moved(4, 6, sim_type=kind)
        state = learned.published()
        first, second = learned.phases
        assert state["phases"] == [4, 6]
        assert torch.equal(state["image"], torch.cat([first.images, second.images]))
        assert torch.equal(state["text"], torch.cat([first.texts, second.texts]))
        assert state["syn_lr_img"].tolist() == [float(phase.lr["img"].detach()) for phase in learned.phases]
        assert state["syn_lr_txt"].shape == (2,)
        matrix = state["similarity_mat"]
        assert matrix.shape == (10, 10) and not matrix[:4, 4:].any() and not matrix[4:, :4].any()
        assert torch.equal(matrix[:4, :4], first.similarity.saved()[1])
        assert torch.equal(matrix[4:, 4:], second.similarity.saved()[1])
        assert len(state["similarity_params"]) == {"identity": 2, "full": 2, "lowrank": 6}[kind]

    @pytest.mark.parametrize("kind", KINDS)
    def test_what_is_read_is_what_is_judged(self, tmp_path, kind):
        learned = moved(4, 6, sim_type=kind)
        found, _ = load_pairs(save(learned, tmp_path / "d.pt"), CPU)
        for ours, judged in zip(found, learned.pair_sets(), strict=True):
            assert torch.equal(ours.images, judged.images) and torch.equal(ours.texts, judged.texts)
            assert ours.lr == judged.lr and (ours.similarity is None) == (kind == "identity")
            assert kind == "identity" or torch.equal(ours.similarity, judged.similarity)

    @pytest.mark.parametrize("kind, extra", [("identity", 0), ("full", 16 + 36), ("lowrank", 4 * 5 + 6 * 5)])
    def test_what_is_stored(self, tmp_path, kind, extra):
        """Floats: pairs of 48 + 5, a similarity (none where it is the identity), two rates a phase."""
        parts, _ = read_phases(save(moved(4, 6, sim_type=kind), tmp_path / "d.pt"))
        assert sum(part.floats() for part in parts) == 10 * 53 + extra + 4

    def test_one_phase_has_lors_layout(self):
        state = moved(5, sim_type="lowrank").published()
        assert "phases" not in state and state["syn_lr_img"].shape == () and len(state["similarity_params"]) == 3

    @pytest.mark.parametrize(
        "changes", [{"phases": [4, 5]}, {"phases": [10]}, {"phases": [0, 10]}, {"syn_lr_txt": torch.tensor([0.1])}]
    )
    def test_phases_that_do_not_add_up(self, tmp_path, changes):
        path = save(moved(4, 6), tmp_path / "bad.pt", **changes)
        with pytest.raises(UserError, match="10 pairs and its rates do not make phases of"):
            load_pairs(path, CPU)

    def test_every_rate_is_looked_at(self, tmp_path):
        path = save(moved(4, 6), tmp_path / "bad.pt", syn_lr_img=torch.tensor([0.1, -0.5]))
        with pytest.raises(UserError, match=r"its learned rate of img is -0\.5"):
            load_pairs(path, CPU)


def begun(corpus, path, *counts, clamp=False, **options):
    settings = {"num_pairs": counts, "sim_rank": 2, "resume_from": str(path)} | options
    return start_pairs(corpus, PairsConfig(**settings), 16, generator(9), clamp=clamp)


class TestBeginning:
    """`--resume_from`: what a distilled file holds is what a set begins with."""

    @pytest.mark.parametrize("counts", [(6,), (4, 6)])
    @pytest.mark.parametrize("kind", KINDS)
    def test_all_of_it(self, corpus, tmp_path, kind, counts):
        learned = moved(*counts, size=16, width=16, sim_type=kind)
        found = begun(corpus, save(learned, tmp_path / "d.pt"), *counts, sim_type=kind, ema_decay=0.9)
        for ours, theirs, average in zip(found.phases, learned.phases, found.average, strict=True):
            for a, b, c in zip(ours.tensors, theirs.tensors, average.tensors, strict=True):
                assert torch.equal(a, b) and torch.equal(c, b) and (a.requires_grad and a.is_leaf)

    def test_factors_that_make_the_identity(self, corpus, tmp_path):
        """Before any step S = I, and yet L is what it was drawn as."""
        learned = pairs(6, size=16, width=16, sim_type="lowrank")
        found = begun(corpus, save(learned, tmp_path / "d.pt"), 6, sim_type="lowrank")
        for a, b in zip(found.phases[0].similarity.leaves, learned.phases[0].similarity.leaves, strict=True):
            assert torch.equal(a, b)

    @pytest.mark.parametrize("kind", ["full", "lowrank"])
    def test_a_file_without_similarity(self, corpus, tmp_path, kind):
        """VLDD's pairs go on as LoRS's: S begins as the identity."""
        learned = moved(6, size=16, width=16)
        (phase,) = begun(corpus, save(learned, tmp_path / "d.pt"), 6, sim_type=kind).phases
        assert torch.equal(phase.similarity.saved()[1], torch.eye(6))
        assert torch.equal(phase.images, learned.phases[0].images)

    @pytest.mark.parametrize("kind", ["full", "lowrank"])
    def test_unclamped_ones_go_on_clamped(self, corpus, tmp_path, kind):
        learned = moved(6, size=16, width=16, sim_type=kind)
        before = learned.phases[0].similarity.saved()[1]
        assert float(before.max()) > 1
        found = begun(corpus, save(learned, tmp_path / "d.pt"), 6, sim_type=kind, clamp=True)
        torch.testing.assert_close(found.phases[0].similarity.saved()[1], before.clamp(0, 1))

    @pytest.mark.parametrize(
        "counts, options, message",
        [
            ((5,), {}, r"holds 6 pairs, --num_pairs is 5; give --num_pairs 6"),
            ((3, 3), {}, r"holds 6 pairs, --num_pairs is 3 3; give --num_pairs 6"),
            ((6,), {"sim_type": "identity"}, r"\(6,\), \(6, 2\), \(6, 2\), which is not --sim_type identity"),
            ((6,), {"sim_type": "full"}, "which is not --sim_type full"),
            ((6,), {"sim_rank": 3}, r"which is not --sim_type lowrank \(with this --sim_rank\)"),
            ((6,), {"alpha": 1.0}, "does not come out at this --alpha"),
        ],
    )
    def test_what_does_not_fit(self, corpus, tmp_path, counts, options, message):
        path = save(moved(6, size=16, width=16, sim_type="lowrank"), tmp_path / "d.pt")
        with pytest.raises(UserError, match=message):
            begun(corpus, path, *counts, **({"sim_type": "lowrank"} | options))

    @pytest.mark.parametrize(
        "sizes, message",
        [
            ({"size": 8}, r"holds images \(6, 3, 8, 8\), not \(6, 3, 16, 16\); correct --image_size"),
            ({"width": 5}, r"holds texts \(6, 5\), not \(6, 16\); correct --text_encoder"),
        ],
    )
    def test_other_sizes(self, corpus, tmp_path, sizes, message):
        path = save(moved(6, **({"size": 16, "width": 16} | sizes)), tmp_path / "d.pt")
        with pytest.raises(UserError, match=message):
            begun(corpus, path, 6)

    def test_a_similarity_without_its_factors(self, corpus, tmp_path):
        learned = moved(6, size=16, width=16, sim_type="lowrank")
        path = save(learned, tmp_path / "d.pt", similarity_params=[])
        with pytest.raises(UserError, match="holds a similarity of no parameters"):
            begun(corpus, path, 6, sim_type="lowrank")

    @pytest.mark.parametrize("option", [{"pair_init": "kmeans"}, {"pix_init": "noise"}, {"txt_init": "noise"}])
    def test_two_beginnings(self, option):
        with pytest.raises(UserError, match="--resume_from says what to begin with; leave --pair_init"):
            PairsConfig(resume_from="d.pt", **option).check()
