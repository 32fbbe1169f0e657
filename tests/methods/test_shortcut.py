"""Straight ways: a trajectory worked by hand, and what holds for any."""

import pytest
import torch

from methods.core.published import PublishedTrajectories, export_published
from methods.core.shortcut import Shortcut
from methods.core.store import TrajectoryStore
from methods.core.trajectories import check_trajectories
from tests.methods.conftest import CPU, generator
from tests.methods.student import sample_segment
from utils.errors import UserError

SHAPES = {"img": [("conv.weight", [2]), ("conv.bias", [1])], "txt": [("w", [1])]}
# The weight goes 5, 5 and 10 far, the bias 0, 1 and ½ (and back), w stays.
WAY = [
    {"img": torch.tensor([0.0, 0, 1]), "txt": torch.tensor([5.0])},
    {"img": torch.tensor([3.0, 4, 1]), "txt": torch.tensor([5.0])},
    {"img": torch.tensor([3.0, 9, 2]), "txt": torch.tensor([5.0])},
    {"img": torch.tensor([13.0, 9, 1.5]), "txt": torch.tensor([5.0])},
]


def write(folder, ways=(WAY,), shapes=SHAPES, skip=()):
    """A store of these experts; `skip` has the (expert, epoch) that were not kept."""
    store = TrajectoryStore.create(folder, shapes, "float32", {})
    for expert, way in enumerate(ways):
        for epoch, snapshot in enumerate(way):
            store.add(expert, epoch, None if (expert, epoch) in skip else snapshot, 0, {})
        store.finish(expert)
    return store


def wander(seed, epochs=7):
    """Random steps, longer and longer, of five layers in two groups."""
    rng, snapshot, way = generator(seed), {"img": torch.zeros(9), "txt": torch.zeros(5)}, []
    for epoch in range(epochs):
        snapshot = {g: v + (1 + epoch) * torch.randn(v.shape, generator=rng) for g, v in snapshot.items()}
        way.append(snapshot)
    return way


LAYERS = {"img": [("a", [4]), ("b", [2, 2]), ("c", [1])], "txt": [("d", [3]), ("e", [2])]}


class TestPlaces:
    @pytest.mark.parametrize(
        "last, weights, biases",
        [
            (3, [(0, 0), (3.25, 2.25), (6.5, 4.5), (13, 9)], [1, 1, 1 + 2 / 3 * 0.5, 1.5]),  # β ¼, ½, 1 and 0, ⅔, 1
            (2, [(0, 0), (1.5, 4.5), (3, 9)], [1, 1, 2]),  # β ½, 1 and 0, 1
            (1, [(0, 0), (3, 4)], [1, 1]),
        ],
    )
    def test_by_hand(self, tmp_path, last, weights, biases):
        way = Shortcut(write(tmp_path), last)
        assert way.count == 1 and way.epochs(0) == list(range(last + 1))
        for epoch, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            found = way.read(0, epoch)
            assert found["img"].tolist() == pytest.approx([*weight, bias])
            assert found["txt"].tolist() == [5]  # what never moves stays

    @pytest.mark.parametrize("published", [False, True])
    def test_straight_from_end_to_end_at_the_experts_pace(self, tmp_path, published):
        ways = [wander(seed) for seed in range(2)]
        store = write(tmp_path / "own", ways, LAYERS)
        if published:
            export_published(store, tmp_path / "published")
            store = PublishedTrajectories(tmp_path / "published", ("img", "txt"))
        short = Shortcut(store, 5)
        assert short.count == 2 and short.folder == store.folder and short.shapes == store.shapes
        for expert, own in enumerate(ways):
            for end in (0, 5):
                assert all(torch.equal(short.read(expert, end)[group], own[end][group]) for group in own[end])
            steps = [short.read(expert, epoch) for epoch in range(6)]
            for group, layers in LAYERS.items():
                at = 0
                for _, shape in layers:
                    rows = slice(at, at := at + torch.Size(shape).numel())
                    begin, line = own[0][group][rows], own[5][group][rows] - own[0][group][rows]
                    lengths = [float((own[e + 1][group][rows] - own[e][group][rows]).norm()) for e in range(5)]
                    for epoch in range(6):
                        place = sum(lengths[:epoch]) / sum(lengths)
                        torch.testing.assert_close(steps[epoch][group][rows], begin + place * line)

    def test_layers_have_places_of_their_own(self, tmp_path):
        found = Shortcut(write(tmp_path), 3).read(0, 1)["img"]
        assert found[0] > 0 and found[2] == 1  # at epoch 1 the weight has gone a quarter, the bias nothing

    def test_reading_twice_gives_the_same_and_a_copy(self, tmp_path):
        way = Shortcut(write(tmp_path), 3)
        first = way.read(0, 2)
        kept = {group: vector.clone() for group, vector in first.items()}
        for vector in first.values():
            vector.zero_()
        assert all(torch.equal(way.read(0, 2)[group], vector) for group, vector in kept.items())


class TestWhatItNeeds:
    def test_epochs_that_were_not_kept(self, tmp_path):
        store = write(tmp_path, skip={(0, 1)})
        with pytest.raises(UserError, match=r"shortcut 3 needs epochs 0 to 3, but the experts in .* keep \[0, 2, 3\]"):
            Shortcut(store, 3)

    def test_more_epochs_than_there_are(self, tmp_path):
        with pytest.raises(UserError, match=r"shortcut 4 needs epochs 0 to 4, .* keep \[0, 1, 2, 3\]"):
            Shortcut(write(tmp_path), 4)
        with pytest.raises(UserError, match="keep none"):
            Shortcut(TrajectoryStore.create(tmp_path / "empty", SHAPES, "float32", {}), 1)

    def test_experts_that_are_whole_serve(self, tmp_path):
        """The second lacks an epoch; the third takes its number, and is read as itself."""
        ways = [wander(seed) for seed in range(3)]
        short = Shortcut(write(tmp_path, ways, LAYERS, skip={(1, 2)}), 4)
        assert short.count == 2
        assert torch.equal(short.read(1, 4)["img"], ways[2][4]["img"])

    def test_segments_are_checked_and_drawn_from_it(self, tmp_path):
        short = Shortcut(write(tmp_path, [wander(seed) for seed in range(2)], LAYERS), 5)
        check_trajectories(short, LAYERS, 4, 2)
        with pytest.raises(UserError, match=r"max_start_epoch 5 \+ expert_epochs 2 need epochs up to 6, .*keep \[0, 1"):
            check_trajectories(short, LAYERS, 5, 2)
        with pytest.raises(UserError, match="is of another network"):
            check_trajectories(short, LAYERS | {"txt": [("d", [4])]}, 4, 2)
        rng, seen = generator(3), set()
        for _ in range(60):
            segment = sample_segment(short, rng, 4, 2, CPU, 1)
            seen.add((segment.expert, segment.epoch))
            assert torch.equal(segment.start["img"], short.read(segment.expert, segment.epoch)["img"])
            assert torch.equal(segment.target["txt"], short.read(segment.expert, segment.epoch + 2)["txt"])
        assert seen == {(expert, epoch) for expert in range(2) for epoch in (1, 2, 3)}

    def test_damage_is_found_before_anything_is_learned(self, tmp_path):
        short = Shortcut(write(tmp_path, [wander(0)], LAYERS), 5)
        path = tmp_path / "expert_000" / "epoch_004.safetensors"
        path.write_bytes(path.read_bytes()[:-5])
        with pytest.raises(UserError, match="is damaged"):  # also where no segment starts or ends
            check_trajectories(short, LAYERS, 1, 1)
