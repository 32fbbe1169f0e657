"""Snapshots written and read back, the published layout, which segments are drawn, and how distance is measured."""

import json
import os
import pickle
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from methods.core.training import partition
from methods.core.trajectories import (
    PublishedTrajectories,
    Segment,
    TrajectoryStore,
    check_trajectories,
    export_published,
    gaps,
    matching_loss,
    open_trajectories,
    sample_segment,
)
from methods.lors import Similarity
from methods.pairs import PairsConfig, SyntheticPairs
from networks.flat import FlatModule
from networks.towers import ProjectionHead, TowerConfig, build_image_tower
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

    def test_manifest(self, tmp_path):
        write(tmp_path, epochs=(0, 2))
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        assert manifest["version"] == 1 and manifest["dtype"] == "float32" and manifest["config"] == {"dataset": "toy"}
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
            (lambda m: m | {"version": 2}, "format 2, newer than this 1"),
            (lambda m: {k: v for k, v in m.items() if k != "shapes"}, "manifest.json is damaged"),
            (lambda m: m | {"experts": [{"seed": 1}]}, "manifest.json is damaged"),
            (lambda m: [m], "manifest.json is damaged"),
        ],
    )
    def test_damaged_manifest(self, tmp_path, damage, message):
        write(tmp_path)
        path = tmp_path / "manifest.json"
        path.write_text(json.dumps(damage(json.loads(path.read_text()))))
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


def reference_file(path, experts, group, legacy=False):
    """A replay buffer as the reference writes it: experts → epochs → tensors in parameters() order."""
    buffer = []
    for expert, epochs in experts:
        rows = []
        for epoch in range(epochs):
            flat = snapshot(expert, epoch)[group]
            rows.append([flat[:6].view(3, 2), flat[6:]] if group == "img" else [flat.view(2, 2)])
        buffer.append(rows)
    torch.save(buffer, path, _use_new_zipfile_serialization=not legacy)


class TestPublished:
    def test_export_reads_back_equal(self, tmp_path):
        store, folder = write(tmp_path / "store"), tmp_path / "published"
        assert export_published(store, folder) == 2
        assert {path.name for path in folder.iterdir()} == {
            f"{group}_replay_buffer_{n}.pt" for group in SHAPES for n in (0, 1)
        }
        found = open_trajectories(folder, ("img", "txt"))
        assert isinstance(found, PublishedTrajectories) and found.count == 2 and found.epochs(0) == [0, 1, 2]
        for expert in range(2):
            for epoch in range(3):
                assert equal(found.read(expert, epoch), store.read(expert, epoch))
        check_trajectories(found, SHAPES, 2, 1)
        raw = torch.load(folder / "img_replay_buffer_1.pt", weights_only=True)
        assert len(raw) == 1 and len(raw[0]) == 3 and [list(t.shape) for t in raw[0][0]] == [[3, 2], [3]]
        size = (folder / "img_replay_buffer_1.pt").stat().st_size
        assert size < 3 * 9 * 4 + 4000  # each tensor its own bytes, not those of the whole vector

    def test_export_refuses(self, tmp_path):
        with pytest.raises(UserError, match=r"expert 0 keeps epochs \[0, 2\]"):
            export_published(write(tmp_path / "gap", epochs=(0, 2)), tmp_path / "out")
        store = write(tmp_path / "store")
        export_published(store, tmp_path / "out")
        with pytest.raises(UserError, match="exists already"):
            export_published(store, tmp_path / "out")
        store.add(2, 0, snapshot(2, 0), 9, {})
        with pytest.raises(UserError, match=r"expert 2 of .* is not finished"):
            export_published(store, tmp_path / "more")

    @pytest.mark.parametrize("legacy", [False, True])
    def test_files_of_the_reference(self, tmp_path, legacy):
        for group in SHAPES:
            reference_file(tmp_path / f"{group}_replay_buffer_0.pt", [(4, 3)], group, legacy)
        found = open_trajectories(tmp_path, ("img", "txt"))
        assert equal(found.read(0, 2), snapshot(4, 2))
        segment = sample_segment(found, torch.Generator().manual_seed(0), 1, 2, CPU)
        assert equal(segment.target, snapshot(4, 2))

    def test_one_network_and_several_experts_a_file(self, tmp_path):
        """MTT's layout: `replay_buffer_<n>.pt`, up to ten experts each."""
        reference_file(tmp_path / "replay_buffer_0.pt", [(0, 3), (1, 3)], "img")
        reference_file(tmp_path / "replay_buffer_1.pt", [(2, 2)], "img")
        found = open_trajectories(tmp_path, ("net",))
        assert found.count == 3 and [len(found.epochs(expert)) for expert in range(3)] == [3, 3, 2]
        assert torch.equal(found.read(1, 2)["net"], snapshot(1, 2)["img"])
        assert torch.equal(found.read(2, 1)["net"], snapshot(2, 1)["img"])

    @pytest.mark.parametrize("backwards", [False, True])
    def test_images_and_texts_are_paired_by_number(self, tmp_path, monkeypatch, backwards):
        """Whatever order the folder lists its files in, and 10 comes after 9."""
        for expert in (0, 2, 9, 10):
            for group in SHAPES:
                reference_file(tmp_path / f"{group}_replay_buffer_{expert}.pt", [(expert, 2)], group)
        reference_file(tmp_path / "img_replay_buffer_5.pt", [(5, 2)], "img")  # its text half is missing
        listed = sorted(tmp_path.iterdir(), key=lambda p: (p.name[0], p.name), reverse=backwards)
        monkeypatch.setattr(type(tmp_path), "iterdir", lambda self: iter(listed))
        found = open_trajectories(tmp_path, ("img", "txt"))
        assert found.count == 4
        for place, expert in enumerate((0, 2, 9, 10)):
            assert equal(found.read(place, 1), snapshot(expert, 1))

    def test_groups_of_different_lengths_are_as_long_as_the_shorter(self, tmp_path):
        reference_file(tmp_path / "img_replay_buffer_0.pt", [(0, 3)], "img")
        reference_file(tmp_path / "txt_replay_buffer_0.pt", [(0, 2)], "txt")
        assert open_trajectories(tmp_path, ("img", "txt")).epochs(0) == [0, 1]
        reference_file(tmp_path / "txt_replay_buffer_0.pt", [(0, 3), (1, 3)], "txt")
        with pytest.raises(UserError, match="different numbers of experts"):
            open_trajectories(tmp_path, ("img", "txt"))

    @pytest.mark.parametrize("legacy", [False, True])
    def test_pickled_code_is_not_run(self, tmp_path, legacy):
        class Bomb:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "boom"),)

        path = tmp_path / "replay_buffer_0.pt"
        if legacy:
            path.write_bytes(pickle.dumps([Bomb()], protocol=2))
        else:
            torch.save([[[Bomb()]]], path)
        with pytest.raises(UserError, match=r"replay buffer .*replay_buffer_0\.pt cannot be read"):
            open_trajectories(tmp_path, ("net",))
        assert not (tmp_path / "boom").exists()

    @pytest.mark.parametrize(
        "buffer", [{"a": 1}, [torch.ones(2)], [[torch.ones(2)]], [[[1, 2]]], [[]], torch.ones(3), "text"]
    )
    def test_files_of_something_else(self, tmp_path, buffer):
        torch.save(buffer, tmp_path / "replay_buffer_0.pt")
        with pytest.raises(UserError, match="no published replay buffer"):
            open_trajectories(tmp_path, ("net",))

    def test_empty_and_unpaired_buffers(self, tmp_path):
        torch.save([], tmp_path / "replay_buffer_0.pt")
        with pytest.raises(UserError, match="are empty"):
            open_trajectories(tmp_path, ("net",))
        reference_file(tmp_path / "img_replay_buffer_0.pt", [(0, 2)], "img")
        reference_file(tmp_path / "txt_replay_buffer_1.pt", [(0, 2)], "txt")
        with pytest.raises(UserError, match="share a number for img and txt"):
            open_trajectories(tmp_path, ("img", "txt"))


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
        cfg = PairsConfig(num_pairs=1)
        images, texts = (torch.empty(1, *shape, device="meta") for shape in ((3, 224, 224), (768,)))
        similarity = Similarity("identity", 1, 1, 1.0, torch.Generator(), "meta")
        assert sum(leaf.numel() for leaf in SyntheticPairs(images, texts, similarity, cfg).leaves[:2]) == 151_296

    @pytest.mark.parametrize("captions, steps", [(145_000, 1_132), (566_747, 4_427)])
    def test_steps_an_epoch(self, captions, steps):
        batches = list(partition(captions, 128, torch.Generator().manual_seed(0), drop_last=True))
        assert len(batches) == steps and all(len(batch) == 128 for batch in batches)
