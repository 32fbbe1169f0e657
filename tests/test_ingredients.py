"""The commands with what later papers added: phases, straight ways, an average, heads on frozen trunks."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import works
from tests.test_resume import learned

DATA = ("--dataset", "toy", "--toy_images", 80, "--image_size", 8, "--text_encoder", "tfidf", "--text_dim", 16)
TRUNK = ("--image_encoder", "ConvNetD1W8", "--device", "cpu", "--workers", 1)
FEW = ("--syn_steps", 2, "--lr_img", 10, "--lr_txt", 10, "--lr_lr", 1e-6, "--draw", "false")
JUDGED = ("--num_eval", 1, "--epoch_eval_train", 2, "--checkpoint_every", 2)
PHASED = ("--num_pairs", 6, 4, "--min_start_epoch", 0, 1, "--max_start_epoch", 2, 3, "--shortcut", 3, 4)
LEARNED = ("--sim_type", "lowrank", "--sim_rank", 2, "--lr_sim", 0.1, "--loss_type", "WBCE", "--clamp_similarity")
LORS = ("--mini_batches", "consecutive", "--mini_batch_size", 3, "--merge_loss_branches")
ALL = (*FEW, *PHASED, *LEARNED, *LORS, "--ema_decay", 0.8, "--independent_starts", "--blend", 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two experts of four epochs; the flags of data, towers and their buffers."""
    root = tmp_path_factory.mktemp("world")
    flags = (*DATA, *TRUNK, "--cache_dir", root / "cache", "--buffer_path", root / "b")
    works("buffer", *flags, "--num_experts", 2, "--train_epochs", 4, "--batch_size_train", 64)
    return flags


def log(folder: Path) -> list[dict]:
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """Five steps of two phases, with all of it at once."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    works("distill", *world, *ALL, *JUDGED, "--eval_it", 1, "--iterations", 5, "--save_dir", folder)
    return folder


class TestPhases:
    def test_what_is_logged(self, whole):
        rows = log(whole)
        assert len(rows) == 5
        for step, row in enumerate(rows):
            first, below = ((0, 2), (1, 3))[step % 2]
            assert first <= row["start_epoch_img"] < below and first <= row["start_epoch_txt"] < below
            assert row["start_epoch"] == row["start_epoch_img"]
            assert 0 <= row["sim_min"] <= row["sim_max"] <= 1
            assert {"loss_img", "loss_txt", "lr_img", "lr_txt", "expert"} <= set(row)
        assert any(row["start_epoch_img"] != row["start_epoch_txt"] for row in rows)

    def test_a_step_moves_one_phase(self, whole):
        """The average of the other, too: it stands where its pairs stand until they have moved once."""
        states = [load(whole / f"distilled_{step}.pt") for step in range(3)]
        for state in states:
            assert state["phases"] == [6, 4] and state["syn_lr_img"].shape == (2,)
            assert not state["similarity_mat"][:6, 6:].any() and not state["similarity_mat"][6:, :6].any()
        one, two = slice(0, 6), slice(6, 10)
        first, second, third = states
        for name in ("image", "text"):
            assert not torch.equal(first[name][one], second[name][one])
            assert torch.equal(first[name][two], second[name][two])
            assert not torch.equal(second[name][two], third[name][two])
        for turn, factors in ((one, slice(0, 3)), (two, slice(3, 6))):
            before, after = (second, third) if turn is two else (first, second)
            pairs = zip(before["similarity_params"][factors], after["similarity_params"][factors], strict=True)
            assert [torch.equal(a, b) for a, b in pairs] == [False, True, False]  # R = 0 gives L no gradient

    def test_resumed_it_ends_the_same_bit_for_bit(self, world, whole, tmp_path):
        flags = (*world, *ALL, *JUDGED, "--eval_it", 1, "--save_dir", tmp_path / "run")
        works("distill", *flags, "--iterations", 3)
        works("distill", *flags, "--iterations", 5, "--resume")
        assert learned(tmp_path / "run") == learned(whole)
        ours, theirs = (load(folder / "checkpoint.pt") for folder in (tmp_path / "run", whole))
        assert set(ours["learned"]) == {"phases", "average"}
        for name, phases in ours["learned"].items():
            for tensors, others in zip(phases, theirs["learned"][name], strict=True):
                assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))

    def test_the_file_has_the_average_and_the_checkpoint_both(self, whole):
        state, published = load(whole / "checkpoint.pt")["learned"], load(whole / "distilled_5.pt")
        for name, same in (("average", True), ("phases", False)):
            images = torch.cat([phase[0] for phase in state[name]])
            assert torch.equal(images, published["image"]) == same

    def test_it_is_judged(self, world, whole, tmp_path, capsys):
        flags = (*world[:-2], "--distilled", whole / "distilled_5.pt", "--num_eval", 1, "--epoch_eval_train", 2)
        works("eval", *flags, "--save_dir", tmp_path / "eval")
        (path,) = (tmp_path / "eval").rglob("result.json")
        (row,) = (row for row in json.loads(path.read_text())["rows"] if row["name"] == "distilled")
        assert row["protocol"]["epochs"] == 4  # two on either phase

    def test_a_set_begins_with_a_file(self, world, whole, tmp_path, capsys, refused):
        """Whose rates count; which may have moved when the run goes on, but has to be the same one."""
        file, moved = whole / "distilled_5.pt", tmp_path / "moved.pt"
        flags = (*world, *ALL, "--eval_it", 0, "--iterations", 0, "--save_dir", tmp_path / "run")
        works("distill", *flags, "--resume_from", file, "--lr_teacher_img", 0.5)
        assert "--lr_teacher_img 0.5 does nothing without a start of its own" in capsys.readouterr().out
        shutil.copyfile(file, moved)
        again = (*flags, "--lr_teacher_img", 0.5, "--resume", "--resume_from")
        works("distill", *again, moved)
        assert "another begun_with" in refused("distill", *again, whole / "distilled_4.pt")
        ours, theirs = load(tmp_path / "run" / "distilled_0.pt"), load(file)
        for name in ("image", "text", "syn_lr_img", "syn_lr_txt"):
            assert torch.equal(ours[name], theirs[name])
        for a, b in zip(ours["similarity_params"], theirs["similarity_params"], strict=True):
            assert torch.equal(a, b)


PLAIN = ("--num_pairs", 6, "--max_start_epoch", 3, "--mini_batch_size", 2, "--sim_type", "full", "--lr_sim", 0.5)


def three_steps(world, folder, *flags) -> tuple[list[dict], dict]:
    """What three steps log and leave."""
    works("distill", *world, *FEW, *PLAIN, *flags, "--eval_it", 0, "--iterations", 3, "--save_dir", folder / "run")
    return log(folder / "run"), load(folder / "run" / "distilled_3.pt")


@pytest.fixture(scope="module")
def plain(world, tmp_path_factory):
    return three_steps(world, tmp_path_factory.mktemp("plain"))


class TestEach:
    """No option is read for nothing: with the same chance, each by itself changes what is learned."""

    @pytest.mark.parametrize(
        "flags",
        [
            ("--blend", 1),
            ("--shortcut", 4),
            ("--min_start_epoch", 2),
            ("--independent_starts",),
            ("--mini_batches", "consecutive"),
            ("--merge_loss_branches",),
            ("--ema_decay", 0.5),
            ("--clamp_similarity",),
            ("--momentum_syn", 0.9),
            ("--momentum_lr", 0.9),
            ("--momentum_sim", 0.9),
            ("--num_pairs", 4, 2),
        ],
        ids=lambda flags: flags[0],
    )
    def test_it_acts(self, world, plain, tmp_path, flags):
        (rows, state), (before, start) = three_steps(world, tmp_path, *flags), plain
        names = ("image", "text", "similarity_mat", "syn_lr_img", "syn_lr_txt")
        same = {name for name in names if torch.equal(state[name], start[name])}
        other = set(names) - same
        losses = [row["loss"] for row in rows], [row["loss"] for row in before]
        if flags[0] == "--ema_decay":  # what is kept differs, what learns does not
            assert losses[0] == losses[1] and other == set(names)
        elif flags[0].startswith("--momentum"):
            assert losses[0][:2] == losses[1][:2]  # the second step is the first that momentum enters
            first = {"syn": "image", "lr": "syn_lr_img", "sim": "similarity_mat"}[flags[0].split("_")[1]]
            assert first in other
        else:
            assert {"image", "text", "similarity_mat"} <= other


class TestRefusals:
    @pytest.mark.parametrize(
        "flags, message",
        [
            (
                ("--loss_type", "BCE", "--sim_type", "full"),
                "--loss_type BCE needs targets in [0, 1], which a learned similarity leaves: give --clamp_similarity, "
                "or --loss_type WBCE, which takes any",
            ),
            (
                ("--num_pairs", 4, 4, "--shortcut", 3, 3, 3),
                "--shortcut has 3 numbers, --num_pairs 2: give one for each phase, or one for all",
            ),
            (("--num_pairs", 6, "--max_start_epoch", 1, 2), "--max_start_epoch has 2 numbers, --num_pairs 1: give"),
            (("--max_start_epoch", ""), "--max_start_epoch names no number; give one, or one for each phase"),
            (("--shortcut", 5), "shortcut 5 needs epochs 0 to 5, but the experts in"),
            (
                ("--shortcut", 2, "--max_start_epoch", 2, "--expert_epochs", 2),
                "max_start_epoch 2 + expert_epochs 2 need epochs up to 3",
            ),
            (("--min_start_epoch", 2), "min_start_epoch 2 leaves no epoch below max_start_epoch 2"),
            (
                ("--num_pairs", 6, 4, "--sim_type", "lowrank", "--sim_rank", 5),
                "--sim_rank is 5 for 4 pairs; it can be 4 at most",
            ),
        ],
    )
    def test_what_cannot_be(self, world, tmp_path, refused, flags, message):
        said = refused("distill", *world, *FEW, *flags, "--save_dir", tmp_path / "run")
        assert said.startswith(message)

    def test_clamped_bce_runs(self, world, tmp_path):
        flags = ("--loss_type", "BCE", "--sim_type", "full", "--clamp_similarity", "--lr_sim", 100)
        short = ("--num_pairs", 5, "--iterations", 3, "--eval_it", 0, "--save_dir", tmp_path / "run")
        works("distill", *world, *FEW, *flags, *short)
        matrix = load(tmp_path / "run" / "distilled_3.pt")["similarity_mat"]
        assert bool(((matrix >= 0) & (matrix <= 1)).all()) and not torch.equal(matrix, torch.eye(5))

    @pytest.mark.parametrize(
        "flags, note",
        [
            (("--clamp_similarity",), "clamp_similarity"),
            (("--momentum_sim", 0.9), "momentum_sim"),
            (("--sim_type", "full", "--alpha", 1), "alpha"),
            (("--ema_decay", 0.9), ""),
        ],
    )
    def test_what_does_nothing_is_noted(self, world, tmp_path, capsys, flags, note):
        short = ("--num_pairs", 5, "--iterations", 0, "--eval_it", 0, "--save_dir", tmp_path / "run")
        works("distill", *world, *FEW, *flags, *short)
        notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
        assert len(notes) == bool(note) and all(note in line for line in notes)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Experts, twelve distilled pairs and their scores: two heads of 16 pixels' frozen features."""
    root = tmp_path_factory.mktemp("heads")
    data = ("--dataset", "toy", "--toy_images", 300, "--image_size", 16, "--text_encoder", "tfidf")
    trunk = ("--image_encoder", "ConvNetD2W16", "--image_trainable", "false", "--image_projection")
    trunk = (*trunk, "--joint_width", 32, "--device", "cpu", "--workers", 1)
    flags = (*data, *trunk, "--cache_dir", root / "cache", "--buffer_path", root / "b")
    experts = ("--num_experts", 2, "--train_epochs", 6, "--batch_size_train", 50, "--expert_captions", "one")
    works("buffer", *flags, *experts)
    pairs = ("--num_pairs", 12, "--syn_steps", 8, "--expert_epochs", 3, "--max_start_epoch", 4)
    rates = ("--lr_img", 3000, "--lr_txt", 300, "--lr_lr", 1e-4, "--draw", "false", "--eval_it", 0)
    works("distill", *flags, *pairs, *rates, "--iterations", 60, "--save_dir", root / "run")
    many = ("--num_eval", 5, "--epoch_eval_train", 40, "--data", "random", "distilled")
    best = root / "run" / "distilled_best.pt"
    works("eval", *flags[:-2], "--distilled", best, *many)
    return root


class TestHeads:
    """RepBlend: heads on frozen trunks, from experts to judged pairs."""

    def test_two_branches_are_matched(self, heads):
        rows = log(heads / "run")
        assert all({"loss_img", "loss_txt"} <= set(row) for row in rows)
        early, late = (sum(row["loss"] for row in part) / 15 for part in (rows[:15], rows[-15:]))
        assert late < 0.9 * early

    def test_only_heads_are_kept(self, heads):
        (manifest,) = heads.rglob("manifest.json")
        shapes = json.loads(manifest.read_text())["shapes"]
        assert set(shapes) == {"img", "txt"}
        assert {name.split(".")[0] for name, _ in shapes["img"]} == {"joint"}

    def test_distilled_pairs_beat_random_ones(self, heads):
        (path,) = heads.rglob("result.json")
        rows = {row["name"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
        ours, random = (rows[name]["metrics"]["r_mean"]["values"] for name in ("distilled", "random"))
        assert min(ours) > max(random)
