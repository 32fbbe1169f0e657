"""The published layout: written for MTT's and VLDD's scripts, and read without loading what is not asked for."""

import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import nn

from methods.core.published import PublishedTrajectories, export_published
from methods.core.store import TrajectoryStore
from methods.core.trajectories import check_trajectories, open_trajectories
from networks import build_network
from networks.flat import FlatModule
from tests.methods.student import sample_segment
from tests.methods.test_trajectories import CPU, SHAPES, equal, snapshot, write
from utils.errors import UserError


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


def convnet_store(folder, experts=3, epochs=2):
    """Experts that were trained indeed: one step an epoch, on random images."""
    net = build_network("ConvNet", 32, 10)
    flat = FlatModule(net)
    store = TrajectoryStore.create(folder, {"net": flat.shapes}, "float32", {})
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
    for expert in range(experts):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        for epoch in range(epochs + 1):
            store.add(expert, epoch, {"net": flat.flatten()}, expert, {})
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            optimizer.step()
        store.finish(expert)
    return store


def test_buffers_of_convnets(tmp_path):
    """The specification's section 10, item 13."""
    store = convnet_store(tmp_path / "store")
    assert export_published(store, tmp_path / "out", per_file=2) == 3
    files = [tmp_path / "out" / f"replay_buffer_{number}.pt" for number in range(2)]
    assert sorted((tmp_path / "out").iterdir()) == files
    buffers = [torch.load(path, weights_only=True) for path in files]
    assert [len(buffer) for buffer in buffers] == [2, 1]
    for expert in (expert for buffer in buffers for expert in buffer):
        assert len(expert) == 3
        for epoch in expert:
            assert len(epoch) == 14 and sum(tensor.numel() for tensor in epoch) == 320_010
            assert all(tensor.dtype == torch.float32 for tensor in epoch)
        assert not any(torch.equal(expert[0][0], expert[e][0]) for e in (1, 2))
        assert not torch.equal(expert[1][0], expert[2][0])
    for path, experts in zip(files, (2, 1), strict=True):
        assert 3_840_120 * experts < path.stat().st_size < 3_840_120 * experts + 50_000
    found = open_trajectories(tmp_path / "out", ("net",))
    assert found.count == 3
    check_trajectories(found, store.shapes, 1, 2)
    assert all(equal(found.read(e, t), store.read(e, t)) for e in range(3) for t in range(3))


def test_a_net_with_the_weights_of_a_buffer_is_the_net(tmp_path):
    """The order of the tensors is that of the network, so the reference's own loop over `parameters()` fits."""
    store = convnet_store(tmp_path / "store", experts=1, epochs=1)
    export_published(store, tmp_path / "out")
    net, images = build_network("ConvNet", 32, 10), torch.randn(2, 3, 32, 32)
    (expert,) = torch.load(tmp_path / "out" / "replay_buffer_0.pt", weights_only=True)
    with torch.no_grad():
        for weight, value in zip(net.parameters(), expert[1], strict=True):
            weight.copy_(value)
        assert torch.equal(net(images), FlatModule(net)(store.read(0, 1)["net"], images))


@pytest.mark.parametrize("per_file, sizes", [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (10, [5])])
def test_experts_a_file(tmp_path, per_file, sizes):
    store = write(tmp_path / "store", experts=5)
    export_published(store, tmp_path / "out", per_file)
    for group in SHAPES:
        paths = [tmp_path / "out" / f"{group}_replay_buffer_{number}.pt" for number in range(len(sizes))]
        assert [len(torch.load(path, weights_only=True)) for path in paths] == sizes
    assert len(list((tmp_path / "out").iterdir())) == 2 * len(sizes)
    found = open_trajectories(tmp_path / "out", ("img", "txt"))
    assert all(equal(found.read(expert, 2), snapshot(expert, 2)) for expert in range(5))


def test_a_folder_with_buffers_is_refused_and_left_alone(tmp_path):
    """The reference appends to it; then experts of two recipes would lie side by side."""
    reference_file(tmp_path / "txt_replay_buffer_7.pt", [(0, 3)], "txt")
    with pytest.raises(UserError, match=r"txt_replay_buffer_7\.pt exists already; choose another folder"):
        export_published(write(tmp_path / "store"), tmp_path)
    store = write(tmp_path / "unfinished")
    store.add(2, 0, snapshot(2, 0), 9, {})
    with pytest.raises(UserError, match=r"expert 2 of .* is not finished"):
        export_published(store, tmp_path / "more")
    assert not (tmp_path / "more").exists()
    assert len(list(tmp_path.glob("*.pt"))) == 1


def test_parameters_are_read_as_plain_tensors(tmp_path):
    """A buffer of `net.parameters()` as they are; their snapshots may not carry a graph into the loss."""
    net = nn.Linear(3, 2)
    for weight in net.parameters():
        weight.data = weight.data.half()
    torch.save(
        [[[*net.parameters()], [weight + 1 for weight in net.state_dict().values()]]], tmp_path / "replay_buffer_0.pt"
    )
    found = open_trajectories(tmp_path, ("net",))
    segment = sample_segment(found, torch.Generator(), 1, 1, CPU)
    start = segment.start["net"]
    assert start.dtype == torch.float32 and not start.requires_grad and type(start) is torch.Tensor
    assert torch.equal(start, torch.cat([net.weight.flatten(), net.bias]).float().detach())
    assert found.shapes == {"net": [("", [2, 3]), ("", [2])]}


def resident(path) -> int:
    """Bytes of a file that are mapped into this process and in memory; -1 where it is not mapped."""
    blocks = Path("/proc/self/smaps").read_text().split("VmFlags")
    mapped = [block for block in blocks if str(path) in block]
    sizes = [int(line.split()[1]) for block in mapped for line in block.splitlines() if line.startswith("Rss:")]
    return 1024 * sum(sizes) if mapped else -1


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="only Linux tells what is mapped")
def test_a_segment_touches_only_its_own_bytes(tmp_path):
    """Of 2 × 10 snapshots of 5 MB: a published file is gigabytes, a step needs two snapshots of it."""
    numbers = 5 << 18  # of 4 bytes
    path = tmp_path / "replay_buffer_0.pt"
    torch.save([[[torch.full((numbers,), 10.0 * expert + epoch)] for epoch in range(10)] for expert in range(2)], path)
    found = open_trajectories(tmp_path, ("net",))
    check_trajectories(found, {"net": [("w", [numbers])]}, 5, 4)
    assert 0 <= resident(path) < 4 << 20  # the table of contents, and no weights
    segment = sample_segment(found, torch.Generator().manual_seed(0), 5, 4, CPU)
    assert (segment.target["net"] - segment.start["net"] == 4).all()
    assert 2 * 4 * numbers <= resident(path) < 2 * 4 * numbers + (6 << 20)
    found.preload()
    path.unlink()
    assert (found.read(1, 9)["net"] == 19).all()
    assert resident(path) == -1  # nothing holds the file any longer


@pytest.mark.parametrize("legacy", [False, True])
def test_preloaded_is_the_same(tmp_path, legacy):
    reference_file(tmp_path / "img_replay_buffer_0.pt", [(0, 3), (1, 3)], "img", legacy)
    reference_file(tmp_path / "txt_replay_buffer_0.pt", [(0, 3), (1, 3)], "txt", legacy)
    found = open_trajectories(tmp_path, ("img", "txt"))
    found.preload()
    check_trajectories(found, SHAPES, 2, 1)
    found.read(1, 2)["img"].zero_()
    assert all(equal(found.read(expert, epoch), snapshot(expert, epoch)) for expert in range(2) for epoch in range(3))


def test_limits(tmp_path):
    """MTT's --max_files and --max_experts: files beyond the first few are not even opened."""
    for number in (0, 1, 10):
        for group in SHAPES:
            experts = [(10 * number + expert, 2) for expert in range(3)]
            reference_file(tmp_path / f"{group}_replay_buffer_{number}.pt", experts, group)

    def experts_read(**limits):
        found = open_trajectories(tmp_path, ("img", "txt"), **limits)
        place = {tuple(snapshot(expert, 1)["txt"].tolist()): expert for expert in range(103)}
        return [place[tuple(found.read(expert, 1)["txt"].tolist())] for expert in range(found.count)]

    assert experts_read() == [0, 1, 2, 10, 11, 12, 100, 101, 102]
    assert experts_read(max_files=2) == [0, 1, 2, 10, 11, 12]
    assert experts_read(max_experts=1) == [0, 10, 100]
    assert experts_read(max_files=1, max_experts=2) == [0, 1]
    assert experts_read(max_files=9, max_experts=9) == experts_read()
    (tmp_path / "txt_replay_buffer_10.pt").write_bytes(b"damaged")
    assert experts_read(max_files=2) == [0, 1, 2, 10, 11, 12]
    with pytest.raises(UserError, match="cannot be read"):
        experts_read()


@pytest.mark.parametrize("preload", [False, True])
def test_a_flipped_byte_is_told_when_it_is_read(tmp_path, preload):
    for group in SHAPES:
        reference_file(tmp_path / f"{group}_replay_buffer_0.pt", [(0, 3), (1, 3)], group)
    path, number = tmp_path / "img_replay_buffer_0.pt", snapshot(1, 1)["img"][7:8].numpy().tobytes()
    content = path.read_bytes()
    path.write_bytes(content.replace(number, bytes([number[0] ^ 1]) + number[1:]))
    found = open_trajectories(tmp_path, ("img", "txt"))
    assert equal(found.read(1, 2), snapshot(1, 2))
    with pytest.raises(UserError, match=r"expert 1, epoch 1 \(img\) is not what the checksums .*; fetch or make it"):
        found.preload() if preload else found.read(1, 1)
