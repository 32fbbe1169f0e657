"""Snapshots written and read back, which segments are drawn, and how distance is measured."""

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from methods.core.published import export_published
from methods.core.store import TrajectoryStore
from methods.core.training import partition
from methods.core.trajectories import (
    Segment,
    check_trajectories,
    gaps,
    matching_loss,
    open_trajectories,
)
from methods.lors import Similarity
from methods.pairs import PairsConfig, Phase
from networks.flat import FlatModule
from networks.heads import ProjectionHead
from networks.towers import TowerConfig, build_image_tower
from tests.conftest import rewrite, unreadable
from tests.methods.student import sample_segment
from utils.errors import UserError

SHAPES = {"img": [("conv.weight", [3, 2]), ("conv.bias", [3])], "txt": [("w", [2, 2])]}
SIZES = {"img": 9, "txt": 4}
CPU = torch.device("cpu")


def snapshot(expert, epoch):
    """Random, and different for every expert, epoch and group."""
    rng = torch.Generator().manual_seed(1000 * expert + epoch)
    return {group: torch.randn(size, generator=rng) for group, size in SIZES.items()}


def write(folder, experts=2, epochs=(0, 1, 2), dtype="float32"):
    store = TrajectoryStore.create(folder, SHAPES, dtype, {"dataset": "toy"})
    for expert in range(experts):
        for epoch in epochs:
            store.add(expert, epoch, snapshot(expert, epoch), 7 + expert, {"loss": 1.0 / (1 + epoch)})
        store.finish(expert)
    return store


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[group], b[group]) for group in a)


class TestStore:
    @pytest.mark.parametrize("reopen", [False, True])
    def test_float32_comes_back_exactly(self, tmp_path, reopen):
        store = write(tmp_path)
        store = open_trajectories(tmp_path, ("img", "txt")) if reopen else store
        assert store.count == 2 and store.epochs(1) == [0, 1, 2]
        for expert in range(2):
            for epoch in range(3):
                assert equal(store.read(expert, epoch), snapshot(expert, epoch))

    def test_bfloat16_comes_back_to_its_precision_and_as_float32(self, tmp_path):
        store = write(tmp_path, dtype="bfloat16")
        for group, vector in store.read(1, 2).items():
            wanted = snapshot(1, 2)[group]
            assert vector.dtype == torch.float32
            assert torch.equal(vector, wanted.bfloat16().float())
            assert ((vector - wanted).abs() <= wanted.abs() * 2**-8).all() and not torch.equal(vector, wanted)

    def test_snapshots_do_not_follow_the_live_weights(self, tmp_path):
        store, live = TrajectoryStore.create(tmp_path, SHAPES, "float32", {}), snapshot(0, 0)
        for epoch in range(2):
            store.add(0, epoch, live, 0, {})
            for vector in live.values():
                vector += 1
        assert equal(store.read(0, 0), snapshot(0, 0))
        assert equal(store.read(0, 1), {group: vector + 1 for group, vector in snapshot(0, 0).items()})

    def test_only_the_file_of_the_snapshot_is_read(self, tmp_path):
        store = write(tmp_path)
        kept = tmp_path / "expert_001" / "epoch_002.safetensors"
        for path in tmp_path.glob("expert_*/*"):
            if path != kept:
                path.unlink()
        assert equal(store.read(1, 2), snapshot(1, 2))
        with pytest.raises(UserError, match=r"epoch_001\.safetensors is gone; "):
            store.read(1, 1)

    def test_a_snapshot_that_may_not_be_read_is_not_gone(self, tmp_path):
        write(tmp_path)
        store, path = TrajectoryStore.open(tmp_path), tmp_path / "expert_001" / "epoch_001.safetensors"
        store.folder = Path()
        with unreadable(tmp_path, path), pytest.raises(PermissionError) as told:
            store.read(1, 1)
        assert str(told.value.filename) == "expert_001/epoch_001.safetensors"

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_preloaded_once_and_for_all(self, tmp_path, dtype):
        write(tmp_path, dtype=dtype)
        store, plain = TrajectoryStore.open(tmp_path), TrajectoryStore.open(tmp_path)
        wanted = {(expert, epoch): plain.read(expert, epoch) for expert in range(2) for epoch in range(3)}
        store.preload()
        for path in tmp_path.glob("expert_*/*"):
            path.unlink()
        for _ in range(2):
            for place, vectors in wanted.items():
                found = store.read(*place)
                assert equal(found, vectors)
                for vector in found.values():
                    vector.zero_()  # whoever reads may write: what is kept stays
        ones = {group: torch.ones(size) for group, size in SIZES.items()}
        store.add(0, 1, ones, 7, {})
        assert equal(store.read(0, 1), ones)

    @pytest.mark.parametrize("preload", [False, True])
    def test_a_flipped_byte_is_told(self, tmp_path, preload):
        write(tmp_path)
        path = tmp_path / "expert_001" / "epoch_001.safetensors"
        content = path.read_bytes()
        path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        store = TrajectoryStore.open(tmp_path)
        store.check(1, 1)  # which reads no numbers
        assert equal(store.read(1, 2), snapshot(1, 2))
        with pytest.raises(UserError, match=r"epoch_001\.safetensors is damaged .* digest says.*; restore it, or make"):
            store.preload() if preload else store.read(1, 1)
        path.write_bytes(content)
        assert equal(store.read(1, 1), snapshot(1, 1))  # what was refused is looked at again, what was sound is not

    def test_a_store_without_digests_is_read(self, tmp_path):
        experts = [{name: told for name, told in one.items() if name != "digests"} for one in write(tmp_path).experts]
        rewrite(tmp_path / "manifest.json", lambda manifest: manifest | {"version": 1, "experts": experts})
        store = TrajectoryStore.open(tmp_path)
        assert equal(store.read(1, 1), snapshot(1, 1))
        store.add(1, 3, snapshot(1, 3), 8, {})
        assert store.entry(1)["digests"].keys() == {3} and equal(store.read(1, 3), snapshot(1, 3))

    def test_numbers_that_are_not_finite_are_told(self, tmp_path):
        store = write(tmp_path)
        store.add(0, 1, snapshot(0, 1) | {"txt": torch.tensor([0, float("nan"), 0, 0])}, 7, {})
        with pytest.raises(UserError, match=r"epoch_001\.safetensors: its txt has numbers that are not finite"):
            store.read(0, 1)

    def test_manifest(self, tmp_path):
        write(tmp_path, epochs=(0, 2))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["version"] == 2 and manifest["dtype"] == "float32" and manifest["config"] == {"dataset": "toy"}
        assert manifest["shapes"]["img"] == [["conv.weight", [3, 2]], ["conv.bias", [3]]]
        assert [expert["seed"] for expert in manifest["experts"]] == [7, 8]
        assert manifest["experts"][0]["epochs"] == [0, 2] and manifest["experts"][0]["done"]
        reopened = TrajectoryStore.open(tmp_path)
        assert reopened.experts[1]["metrics"] == {0: {"loss": 1.0}, 2: {"loss": 1 / 3}}
        assert reopened.shapes == SHAPES

    def test_an_epoch_that_is_not_kept_leaves_its_metrics(self, tmp_path):
        store = write(tmp_path, experts=1, epochs=(0, 1))
        store.add(0, 2, None, 7, {"loss": 0.5})
        assert TrajectoryStore.open(tmp_path).epochs(0) == [0, 1]
        assert TrajectoryStore.open(tmp_path).experts[0]["metrics"][2] == {"loss": 0.5}

    def test_writing_an_epoch_again_names_it_once(self, tmp_path):
        store = write(tmp_path, experts=1)
        store.add(0, 1, snapshot(5, 5), 7, {})
        assert store.epochs(0) == [0, 1, 2] and equal(store.read(0, 1), snapshot(5, 5))

    def test_a_store_is_never_begun_over_another(self, tmp_path):
        write(tmp_path)
        with pytest.raises(UserError, match="already holds trajectories; --resume"):
            TrajectoryStore.create(tmp_path, SHAPES, "float32", {})

    @pytest.mark.parametrize(
        "damage, message",
        [
            (lambda m: m | {"version": 3}, "format 3, newer than this 2"),
            (lambda m: {k: v for k, v in m.items() if k != "shapes"}, "manifest.json is damaged"),
            (lambda m: m | {"experts": [{"seed": 1}]}, "manifest.json is damaged"),
            (lambda m: [m], "manifest.json is damaged"),
        ],
    )
    def test_damaged_manifest(self, tmp_path, damage, message):
        write(tmp_path)
        rewrite(tmp_path / "manifest.json", damage)
        with pytest.raises(UserError, match=message):
            TrajectoryStore.open(tmp_path)

    def test_damaged_snapshots(self, tmp_path):
        store = write(tmp_path)
        paths = [tmp_path / "expert_000" / f"epoch_{epoch:03d}.safetensors" for epoch in range(2)]
        paths[0].write_bytes(paths[0].read_bytes()[:-5])
        with pytest.raises(UserError, match=r"epoch_000\.safetensors is damaged"):
            store.read(0, 0)
        store.shapes = SHAPES | {"txt": [("w", [5])]}
        with pytest.raises(UserError, match=r"does not fit its manifest \(txt\)"):
            store.read(0, 1)


class TestSampling:
    def test_equal_seeds_draw_equal_segments(self, tmp_path):
        store = write(tmp_path, experts=3)
        drawn = [
            [sample_segment(store, rng, 2, 1, CPU) for _ in range(5)]
            for rng in (torch.Generator().manual_seed(1), torch.Generator().manual_seed(1))
        ]
        for a, b in zip(*drawn, strict=True):
            assert (a.expert, a.epoch) == (b.expert, b.epoch) and equal(a.start, b.start)
        assert len({(s.expert, s.epoch) for s in drawn[0]}) > 1

    def test_every_expert_and_start_epoch_is_as_likely(self):
        """3 experts × 4 start epochs, 6,000 draws: each 500 times, within four standard deviations."""
        store = SimpleNamespace(
            count=3, epochs=lambda e: list(range(6)), read=lambda e, t: {"img": torch.tensor([float(t)])}, folder="x"
        )
        rng = torch.Generator().manual_seed(2)
        drawn = (sample_segment(store, rng, 4, 2, CPU) for _ in range(6000))
        counts = Counter((segment.expert, segment.epoch) for segment in drawn)
        assert set(counts) == {(expert, epoch) for expert in range(3) for epoch in range(4)}
        assert all(abs(count - 500) < 4 * (500 * 11 / 12) ** 0.5 for count in counts.values())

    def test_a_window_leaves_out_the_early_epochs(self, tmp_path):
        """DATM starts between two epochs; an expert that lacks those before it does as well as any."""
        store = write(tmp_path, experts=2, epochs=range(2, 7))
        rng = torch.Generator().manual_seed(5)
        drawn = [sample_segment(store, rng, 5, 2, CPU, min_start_epoch=3) for _ in range(40)]
        assert {(segment.expert, segment.epoch) for segment in drawn} == {(e, t) for e in (0, 1) for t in (3, 4)}
        assert equal(drawn[0].target, snapshot(drawn[0].expert, drawn[0].epoch + 2))

    def test_the_same_draws_without_a_window(self, tmp_path):
        store, rng = write(tmp_path, epochs=range(5)), torch.Generator().manual_seed(6)
        again = torch.Generator().manual_seed(6)
        for _ in range(10):
            segment = sample_segment(store, rng, 3, 2, CPU, 0)
            expert = int(torch.randint(2, (), generator=again))
            assert (segment.expert, segment.epoch) == (expert, int(torch.randint(3, (), generator=again)))

    def test_the_last_start_and_the_snapshots_it_needs(self, tmp_path):
        """max_start_epoch 2 starts at 0 or 1; 18 and 3 need 21 snapshots, the last of index 20."""
        store, rng = write(tmp_path / "a", experts=1, epochs=range(4)), torch.Generator().manual_seed(7)
        assert {sample_segment(store, rng, 2, 2, CPU).epoch for _ in range(40)} == {0, 1}
        check_trajectories(write(tmp_path / "b", experts=1, epochs=range(21)), SHAPES, 18, 3)
        with pytest.raises(UserError, match=r"up to 20, .*19\]"):
            check_trajectories(write(tmp_path / "c", experts=1, epochs=range(20)), SHAPES, 18, 3)

    def test_start_and_target_are_of_one_expert(self, tmp_path):
        store, rng = write(tmp_path, experts=3, epochs=range(5)), torch.Generator().manual_seed(3)
        for _ in range(10):
            segment = sample_segment(store, rng, 3, 2, CPU)
            assert equal(segment.start, snapshot(segment.expert, segment.epoch))
            assert equal(segment.target, snapshot(segment.expert, segment.epoch + 2))

    def test_experts_that_lack_an_epoch_are_left_out(self, tmp_path):
        store, rng = write(tmp_path), torch.Generator().manual_seed(4)
        for epoch in (0, 1):
            store.add(2, epoch, snapshot(2, epoch), 0, {})  # an expert that was interrupted
        assert {sample_segment(store, rng, 2, 1, CPU).expert for _ in range(30)} == {0, 1}
        assert {sample_segment(store, rng, 1, 1, CPU).expert for _ in range(60)} == {0, 1, 2}

    def test_an_expert_that_stood_still(self, tmp_path):
        store = write(tmp_path, experts=1, epochs=(0,))
        store.add(0, 1, {**snapshot(0, 1), "txt": snapshot(0, 0)["txt"]}, 0, {})
        with pytest.raises(UserError, match=r"expert 0 of .* did not move from epoch 0"):
            sample_segment(store, torch.Generator(), 1, 1, CPU)


class TestChecks:
    def test_a_store_that_fits(self, tmp_path):
        check_trajectories(write(tmp_path), SHAPES, 2, 1)
        check_trajectories(write(tmp_path / "few", epochs=(0, 3)), SHAPES, 1, 3)

    def test_a_window(self, tmp_path):
        late = write(tmp_path, epochs=(3, 4, 5))
        check_trajectories(late, SHAPES, 5, 1, min_start_epoch=3)
        with pytest.raises(UserError, match="need epochs up to 5"):
            check_trajectories(late, SHAPES, 5, 1, min_start_epoch=2)
        with pytest.raises(UserError, match="min_start_epoch 5 leaves no epoch below max_start_epoch 5"):
            check_trajectories(late, SHAPES, 5, 1, min_start_epoch=5)

    @pytest.mark.parametrize(
        "shapes, message",
        [
            ({"net": []}, r"records img and txt, not the group net"),
            ({"txt": [("w", [4, 2])]}, r"another network: txt has w \[2, 2\] where w \[4, 2\] is needed"),
            ({"txt": [("v", [2, 2])]}, r"txt has w \[2, 2\] where v \[2, 2\] is needed"),
            ({"txt": [("w", [2, 2]), ("b", [2])]}, "txt has 1 weights, 2 are needed"),
            ({"img": [("conv.weight", [3, 2])]}, "img has 2 weights, 1 are needed"),
        ],
    )
    def test_another_network(self, tmp_path, shapes, message):
        with pytest.raises(UserError, match=message):
            check_trajectories(write(tmp_path), shapes, 1, 1)

    def test_too_few_epochs(self, tmp_path):
        store = write(tmp_path)
        with pytest.raises(UserError, match=r"max_start_epoch 3 \+ expert_epochs 1 need epochs up to 3, .*\[0, 1, 2\]"):
            check_trajectories(store, SHAPES, 3, 1)
        empty = TrajectoryStore.create(tmp_path / "empty", SHAPES, "float32", {})
        with pytest.raises(UserError, match="keep none"):
            check_trajectories(empty, SHAPES, 1, 1)


class TestStartsApart:
    """AMD: each group begins at an epoch of its own, of the same expert."""

    def test_each_group_has_its_own_epochs(self, tmp_path):
        store, rng = write(tmp_path, experts=3, epochs=range(6)), torch.Generator().manual_seed(9)
        seen = set()
        for _ in range(60):
            segment = sample_segment(store, rng, 4, 2, CPU, 1, apart=True)
            assert list(segment.apart) == ["img", "txt"] and segment.epoch == segment.apart["img"]
            for group, epoch in segment.apart.items():
                assert torch.equal(segment.start[group], snapshot(segment.expert, epoch)[group])
                assert torch.equal(segment.target[group], snapshot(segment.expert, epoch + 2)[group])
            seen.add(tuple(segment.apart.values()))
        assert seen == {(img, txt) for img in (1, 2, 3) for txt in (1, 2, 3)}

    def test_every_combination_is_as_likely(self):
        """2 experts × 3 × 3 start epochs, 9,000 draws: each 500 times, within four standard deviations."""
        store = SimpleNamespace(
            count=2,
            epochs=lambda e: list(range(4)),
            read=lambda e, t: {"img": torch.tensor([float(t)]), "txt": torch.tensor([float(t)])},
            folder="x",
            shapes={"img": [], "txt": []},
        )
        rng = torch.Generator().manual_seed(2)
        drawn = (sample_segment(store, rng, 3, 1, CPU, apart=True) for _ in range(9000))
        counts = Counter((segment.expert, *segment.apart.values()) for segment in drawn)
        assert set(counts) == {(expert, img, txt) for expert in (0, 1) for img in range(3) for txt in range(3)}
        assert all(abs(count - 500) < 4 * (500 * 17 / 18) ** 0.5 for count in counts.values())

    def test_together_both_have_one(self, tmp_path):
        store, rng = write(tmp_path, epochs=range(6)), torch.Generator().manual_seed(9)
        for _ in range(10):
            segment = sample_segment(store, rng, 4, 2, CPU)
            assert segment.apart == {} and equal(segment.start, snapshot(segment.expert, segment.epoch))

    def test_a_group_that_did_not_move_names_its_own_epoch(self):
        still = torch.ones(1)
        store = SimpleNamespace(
            count=1,
            epochs=lambda e: [0, 1],
            read=lambda e, t: {"img": torch.tensor([float(t)]), "txt": still},
            folder="x",
            shapes={"img": [], "txt": []},
        )
        with pytest.raises(UserError, match="expert 0 of x did not move from epoch 0"):
            sample_segment(store, torch.Generator(), 1, 1, CPU, apart=True)


class TestDistance:
    def test_half_way_is_a_quarter_and_the_start_is_one(self):
        start, target = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
        segment = Segment({"w": start}, {"w": target}, 0, 0)
        assert float(matching_loss({"w": torch.tensor([0.5, 0.5, 0])}, segment)[0]) == 0.25
        assert float(matching_loss({"w": start}, segment)[0]) == 1
        assert float(matching_loss({"w": target}, segment)[0]) == 0

    def test_groups_count_the_same_however_far_they_travelled(self):
        segment = Segment(
            {"img": torch.zeros(2), "txt": torch.zeros(3)}, {"img": torch.full((2,), 100.0), "txt": torch.ones(3)}, 0, 0
        )
        final = {"img": torch.full((2,), 50.0, requires_grad=True), "txt": torch.tensor([1.0, 1, 0])}
        parts = gaps(final, segment)
        assert {group: float(part.detach()) for group, part in parts.items()} == pytest.approx(
            {"img": 0.25, "txt": 1 / 3}
        )
        loss, branches = matching_loss(final, segment)
        assert float(loss.detach()) == pytest.approx(0.25 + 1 / 3) and equal(branches, parts)
        loss.backward()
        assert final["img"].grad.tolist() == pytest.approx([2 * -50 / 20000] * 2)


class TestOpening:
    def test_root_or_leaf(self, tmp_path):
        leaf = tmp_path / "flickr" / "nfnet" / "bert"
        write(leaf)
        below = ("flickr/nfnet/bert", "flickr/nfnet_bert/*")
        for folder in (tmp_path, leaf, str(leaf)):
            assert open_trajectories(folder, ("img", "txt"), below).folder == leaf
        lors = tmp_path / "b" / "flickr" / "nfnet_bert" / "InfoNCE"
        export_published(TrajectoryStore.open(leaf), lors)
        assert open_trajectories(tmp_path / "b", ("img", "txt"), below).folder == lors

    def test_limits(self, tmp_path):
        write(tmp_path, experts=3)
        store = open_trajectories(tmp_path, ("img", "txt"), max_experts=2)
        assert store.count == 2 and open_trajectories(tmp_path, ("img", "txt")).count == 3
        rng = torch.Generator().manual_seed(8)
        assert {sample_segment(store, rng, 2, 1, CPU).expert for _ in range(40)} == {0, 1}
        with pytest.raises(UserError, match="no replay buffers; max_files 1 means nothing there, max_experts"):
            open_trajectories(tmp_path, ("img", "txt"), max_files=1)

    def test_nothing_there(self, tmp_path):
        with pytest.raises(UserError, match=r"no trajectories in .*img_replay_buffer_\*\.pt.*flickr/x.*run buffer\.py"):
            open_trajectories(tmp_path / "none", ("img", "txt"), ("flickr/x",))


class TestPublishedSizes:
    """The specification's section 10, item 8, from shapes alone."""

    def test_bytes_of_an_expert(self):
        with torch.device("meta"):
            image = build_image_tower(TowerConfig(image_encoder="nfnet", image_pretrained=False), 224, 0)
            text = ProjectionHead(768, image.width)
        assert image.width == 2304
        image_bytes, text_bytes = (11 * 4 * FlatModule(net).size for net in (image, text))
        assert (image_bytes, text_bytes) == (1_441_857_472, 311_832_576)

    def test_numbers_in_a_pair(self):
        cfg = PairsConfig(num_pairs=(1,))
        images, texts = (torch.empty(1, *shape, device="meta") for shape in ((3, 224, 224), (768,)))
        similarity = Similarity("identity", 1, 1, 1.0, torch.Generator(), "meta")
        assert sum(leaf.numel() for leaf in Phase(images, texts, similarity, cfg).leaves[:2]) == 151_296

    @pytest.mark.parametrize("captions, steps", [(145_000, 1_132), (566_747, 4_427)])
    def test_steps_an_epoch(self, captions, steps):
        batches = list(partition(captions, 128, torch.Generator().manual_seed(0), drop_last=True))
        assert len(batches) == steps and all(len(batch) == 128 for batch in batches)
