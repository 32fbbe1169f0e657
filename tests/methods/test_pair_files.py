"""The files that hold learned pairs: ours, LoRS's, and what is none."""

import pytest
import torch

from methods.lors import KINDS
from methods.pair_files import FORMAT
from tests.methods.conftest import CPU, generator, load_pairs, pairs
from utils.errors import UserError


class TestFiles:
    @pytest.mark.parametrize("kind", KINDS)
    def test_round_trip(self, tmp_path, kind):
        learned, other = pairs(sim_type=kind), pairs(sim_type=kind, seed=5)
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 0.5
        torch.save(learned.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for ours, theirs in zip(learned.leaves, other.leaves, strict=True):
            assert torch.equal(ours, theirs) and theirs.requires_grad and theirs.is_leaf
        (a,), (b,) = learned.pair_sets(), other.pair_sets()
        assert torch.equal(a.images, b.images) and a.lr == b.lr
        assert (a.similarity is None) == (kind == "identity")

    def test_a_state_is_a_copy(self):
        learned = pairs(sim_type="lowrank")
        state, kept, (judged,) = learned.published(), learned.state_dict(), learned.pair_sets()
        parts = [state["image"], state["text"], state["syn_lr_img"], *state["similarity_params"], judged.images]
        parts += kept["phases"][0]
        before = [part.clone() for part in parts]
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 1
        assert all(torch.equal(a, b) for a, b in zip(parts, before, strict=True))
        assert not judged.images.requires_grad

    def test_the_layout_is_that_of_lors(self):
        state = pairs(sim_type="lowrank").published()
        assert list(state) == [
            "image",
            "text",
            "similarity_params",
            "similarity_mat",
            "syn_lr_img",
            "syn_lr_txt",
        ]
        assert [tuple(part.shape) for part in state["similarity_params"]] == [(6,), (6, 2), (6, 2)]
        assert state["similarity_mat"].shape == (6, 6) and state["syn_lr_img"].shape == ()
        identity = pairs().published()
        assert torch.equal(identity["similarity_mat"], torch.eye(6))
        assert torch.equal(identity["similarity_params"][0], torch.eye(6))

    @pytest.mark.parametrize("kind", KINDS)
    def test_a_distilled_file_gives_the_judged_pairs(self, tmp_path, kind):
        learned = pairs(sim_type=kind)
        with torch.no_grad():
            for leaf in learned.leaves:
                leaf += 0.25
        torch.save(learned.published() | {"meta": {"format": FORMAT, "step": 3}}, tmp_path / "distilled.pt")
        (found,), meta = load_pairs(tmp_path / "distilled.pt", CPU)
        (judged,) = learned.pair_sets()
        assert meta["step"] == 3 and found.lr == judged.lr
        for ours, theirs in (("images", "images"), ("texts", "texts"), ("similarity", "similarity")):
            a, b = getattr(found, ours), getattr(judged, theirs)
            assert (a is None and b is None) or torch.equal(a, b)


def lors_file(path, **changes):
    """A file as LoRS writes it, by hand: low-rank similarity, rates as parameters, nothing else noted."""
    rng = generator(2)
    diag, left, right = torch.ones(4), torch.randn(4, 2, generator=rng), torch.randn(4, 2, generator=rng)
    state = {
        "image": torch.randn(4, 3, 8, 8, generator=rng),
        "text": torch.randn(4, 5, generator=rng),
        "similarity_params": [diag, left, right],
        "similarity_mat": torch.diag(diag) + 3.0 / 2 * left @ right.T,
        "syn_lr_img": torch.tensor(0.12),
        "syn_lr_txt": torch.tensor(0.34),
    }
    state |= changes
    torch.save({name: value for name, value in state.items() if value is not None}, path)
    return state


class TestLoading:
    def test_a_file_of_lors(self, tmp_path):
        state = lors_file(tmp_path / "lors.pt")
        (found,), meta = load_pairs(tmp_path / "lors.pt", CPU)
        assert meta == {}
        assert torch.equal(found.images, state["image"]) and torch.equal(found.texts, state["text"])
        assert torch.equal(found.similarity, state["similarity_mat"])
        assert found.lr == pytest.approx({"img": 0.12, "txt": 0.34})

    def test_tensors_that_learned_and_other_precisions(self, tmp_path):
        """LoRS saves what autograd holds: parameters, tensors that ask for a gradient."""
        changes = {
            "image": torch.ones(4, 3, 8, 8, dtype=torch.float64).requires_grad_(),
            "similarity_mat": torch.eye(4, dtype=torch.float64),
            "syn_lr_img": torch.tensor([0.5], requires_grad=True),
        }
        lors_file(tmp_path / "lors.pt", **changes)
        (found,), _ = load_pairs(tmp_path / "lors.pt", CPU)
        assert found.images.dtype == torch.float32 and not found.images.requires_grad
        assert found.similarity is None and found.lr["img"] == 0.5

    @pytest.mark.parametrize("name", ["image", "text", "similarity_mat"])
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_values_that_are_not_finite(self, tmp_path, name, value):
        state = lors_file(tmp_path / "good.pt")
        state[name].view(-1)[3] = value
        torch.save(state, tmp_path / "bad.pt")
        with pytest.raises(UserError, match=f"bad.pt: its {name.split('_')[0]} values are not finite"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize(
        "changes",
        [
            {"image": torch.zeros(3, 3, 8, 8)},
            {"image": torch.zeros(4, 3, 8)},
            {"text": torch.zeros(5, 5)},
            {"text": torch.zeros(4, 1, 5)},
            {"similarity_mat": torch.eye(3)},
            {"similarity_mat": torch.ones(4)},
        ],
    )
    def test_shapes_that_do_not_belong_together(self, tmp_path, changes):
        lors_file(tmp_path / "bad.pt", **changes)
        with pytest.raises(UserError, match="do not belong together"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize("missing", ["image", "text", "similarity_mat", "syn_lr_img", "syn_lr_txt"])
    def test_parts_that_are_missing(self, tmp_path, missing):
        lors_file(tmp_path / "bad.pt", **{missing: None})
        with pytest.raises(UserError, match=r"bad\.pt is no file of distilled pairs"):
            load_pairs(tmp_path / "bad.pt", CPU)

    @pytest.mark.parametrize("content", [[1, 2], {"image": "text"}, torch.zeros(3), {"meta": 3}])
    def test_files_of_something_else(self, tmp_path, content):
        torch.save(content, tmp_path / "bad.pt")
        with pytest.raises(UserError, match="is no file of distilled pairs"):
            load_pairs(tmp_path / "bad.pt", CPU)

    def test_a_newer_format(self, tmp_path):
        lors_file(tmp_path / "new.pt", meta={"format": FORMAT + 1})
        with pytest.raises(UserError, match=f"format {FORMAT + 1}, newer than this {FORMAT}; update the toolkit"):
            load_pairs(tmp_path / "new.pt", CPU)

    def test_no_file(self, tmp_path):
        with pytest.raises(UserError, match="no distilled file at"):
            load_pairs(tmp_path / "none.pt", CPU)
