"""Run folders: who may enter, what is written first, the log, named chance, trackers."""

import json
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import yaml

from utils.config import option, section
from utils.errors import UserError
from utils.locks import LOCK
from utils.run import Run, RunConfig, pick_device, read_log


@dataclass(frozen=True)
class Learning:
    """A section that a run may have."""

    rate: float = option(0.1, "a rate")
    looks: int = option(5, "how often to look up", free=True)


@dataclass(frozen=True)
class Command:
    """A small command."""

    method: str = option("vldd", "the system")
    run: RunConfig = section(RunConfig)
    learn: Learning = section(Learning)


def command(rate=0.1, looks=5, **run):
    return Command(run=RunConfig(**{"device": "cpu"} | run), learn=Learning(rate, looks))


def begin(folder, **options):
    """A run that got somewhere."""
    run = Run(folder, command(**options), "distill", "--save_dir")
    run.log(0, loss=1.0)
    return run


class TestFolder:
    def test_the_config_is_written_before_anything_else(self, tmp_path):
        run = Run(tmp_path / "a" / "b", command(rate=0.25), "distill", "--save_dir")
        assert sorted(path.name for path in run.folder.iterdir()) == [LOCK, "config.yaml"] and not run.resumed
        recorded = yaml.safe_load((run.folder / "config.yaml").read_text())
        assert recorded["method"] == "vldd" and recorded["distill"]["rate"] == 0.25

    def test_another_run_is_not_overwritten(self, tmp_path):
        begin(tmp_path)
        before = (tmp_path / "config.yaml").read_bytes()
        with pytest.raises(UserError, match=r"already holds a run; --resume goes on with it, or choose another --out"):
            Run(tmp_path, command(), "distill", "--out")
        assert (tmp_path / "config.yaml").read_bytes() == before

    def test_what_a_kill_left_half_written_is_swept(self, tmp_path):
        begin(tmp_path)
        (tmp_path / "expert_000").mkdir()
        halves = [tmp_path / ".checkpoint.pt.x1.part", tmp_path / "expert_000" / ".epoch_001.safetensors.x2.part"]
        whole = [tmp_path / "expert_000" / "epoch_000.safetensors", tmp_path / "notes.part"]
        for path in halves + whole:
            path.write_text("x")
        Run(tmp_path, command(resume=True), "distill", "--save_dir")
        assert not any(path.exists() for path in halves) and all(path.exists() for path in whole)

    def test_resuming(self, tmp_path):
        assert not begin(tmp_path).resumed
        run = Run(tmp_path, command(resume=True), "distill", "--save_dir")
        assert run.resumed and len(read_log(tmp_path)) == 1
        assert not Run(tmp_path / "new", command(resume=True), "distill", "--save_dir").resumed

    def test_resuming_with_other_options(self, tmp_path):
        begin(tmp_path)
        with pytest.raises(UserError, match=r"other options \(rate was 0\.1, is 0\.2\); choose another --save_dir"):
            Run(tmp_path, command(rate=0.2, resume=True), "distill", "--save_dir")
        with pytest.raises(UserError, match="seed was 0, is 1"):
            Run(tmp_path, command(seed=1, resume=True), "distill", "--save_dir")

    def test_free_options_may_change(self, tmp_path):
        begin(tmp_path)
        assert Run(tmp_path, command(looks=9, resume=True), "distill", "--save_dir").resumed

    def test_a_command_that_stopped_at_a_mistake_can_be_given_again(self, tmp_path):
        Run(tmp_path, command(rate=0.1), "distill", "--save_dir")  # then it failed
        run = Run(tmp_path, command(rate=0.2), "distill", "--save_dir")
        assert not run.resumed
        assert yaml.safe_load((tmp_path / "config.yaml").read_text())["distill"]["rate"] == 0.2

    @pytest.mark.parametrize("content", ["a: [", "buffer: {rate: 1}", "- 1", "distill: 3", "", "\x00"])
    def test_a_damaged_config(self, tmp_path, content):
        begin(tmp_path)
        (tmp_path / "config.yaml").write_text(content)
        with pytest.raises(UserError, match=r"config\.yaml is damaged or of another verb than distill"):
            Run(tmp_path, command(resume=True), "distill", "--save_dir")


class TestLog:
    def test_one_line_a_step(self, tmp_path):
        run = begin(tmp_path)
        run.log(1, loss=0.5, rate=2.0)
        lines = (tmp_path / "log.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5, "rate": 2.0}]
        assert read_log(tmp_path) == [json.loads(line) for line in lines]

    def test_no_log(self, tmp_path):
        assert read_log(tmp_path) == []

    def test_a_line_cut_short_is_left_out(self, tmp_path):
        run = begin(tmp_path)
        run.log(1, loss=0.5)
        path = tmp_path / "log.jsonl"
        path.write_text(path.read_text()[:-7])
        assert [row["step"] for row in read_log(tmp_path)] == [0]
        run.rewind(1)
        run.log(1, loss=0.25)
        assert [row["loss"] for row in read_log(tmp_path)] == [1.0, 0.25]

    def test_a_line_that_lacks_no_more_than_its_end_is_kept(self, tmp_path):
        """Who reads the log counts it, and so would not write it again."""
        run = begin(tmp_path)
        run.log(1, loss=0.5)
        known, path = run.log_sum(2), tmp_path / "log.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        assert [row["step"] for row in read_log(tmp_path)] == [0, 1]
        run.rewind(2, known)
        assert path.read_bytes() == whole

    @pytest.mark.parametrize("way", ["cut", "flipped", "gone"])
    def test_damaged_lines_before_a_checkpoint_are_told(self, tmp_path, way):
        """By their checksum; those of its step and later do not count. A log that is needed may not be taken away."""
        run = Run(tmp_path, command(), "distill", "--save_dir")
        for step in (0, 1, 1, 2):
            run.log(step, loss=step / 3)
        known, path = run.log_sum(2), tmp_path / "log.jsonl"
        run.log(3, loss=1.0)
        whole = path.read_bytes()
        run.rewind(2, known)
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[:3])
        path.write_bytes({"cut": whole[:30], "flipped": whole.replace(b"0.33", b"0.32", 1), "gone": b""}[way])
        if way == "gone":
            path.unlink()
            run.rewind(2, known)
            path.unlink()
        with pytest.raises(UserError, match=r"log.jsonl is damaged: its lines before step 2 .* restore it"):
            run.rewind(2, known, needed=way == "gone")

    def test_bytes_that_are_no_rows(self, tmp_path):
        """Those between rows stay where they are; nobody reads them."""
        run, path = Run(tmp_path, command(), "distill", "--save_dir"), tmp_path / "log.jsonl"
        path.write_bytes(b'{"step": 0}\n\xff\n[1]\n{"step": "x"}\n{"step": 1}\n{"step"')
        assert read_log(tmp_path) == [{"step": 0}, {"step": 1}]
        run.rewind(2)
        assert path.read_bytes() == b'{"step": 0}\n\xff\n[1]\n{"step": "x"}\n{"step": 1}\n'

    def test_rewinding(self, tmp_path):
        run = begin(tmp_path)
        for step in (1, 2, 2, 3):
            run.log(step, loss=float(step))
        run.rewind(2)
        assert [row["step"] for row in read_log(tmp_path)] == [0, 1]
        run.rewind(0)
        assert read_log(tmp_path) == []


class TestChance:
    def test_each_name_has_its_own(self, tmp_path):
        run, other = begin(tmp_path / "a"), begin(tmp_path / "b")
        torch.rand(100, generator=run.rng("init"))  # disturbs no other
        first, second = (torch.rand(4, generator=r.rng("draws")) for r in (run, other))
        assert torch.equal(first, second)
        assert not torch.equal(first, torch.rand(4, generator=run.rng("draws")))  # it goes on, not back
        seeded = Run(tmp_path / "c", command(seed=1), "distill", "--save_dir")
        assert not torch.equal(first, torch.rand(4, generator=seeded.rng("draws")))

    def test_saved_and_restored(self, tmp_path):
        run, other = begin(tmp_path / "a"), begin(tmp_path / "b")
        torch.rand(3, generator=run.rng("draws"))
        torch.save(run.rng_state(), tmp_path / "state.pt")
        expected = torch.rand(5, generator=run.rng("draws"))  # drawn after saving: the state must be a copy
        other.load_rng_state(torch.load(tmp_path / "state.pt", weights_only=True))
        assert torch.equal(torch.rand(5, generator=other.rng("draws")), expected)


class TestDevices:
    def test_names(self):
        assert pick_device("cpu") == torch.device("cpu")
        assert pick_device("auto").type in ("cpu", "cuda", "mps")

    @pytest.mark.parametrize("name", ["gpu", "cuda:99", "cpu:x", ""])
    def test_devices_that_are_not_there(self, name):
        with pytest.raises(UserError, match=f"--device {name} is not on this machine; use auto or cpu"):
            pick_device(name)

    def test_a_wrong_device_leaves_no_folder(self, tmp_path):
        with pytest.raises(UserError):
            Run(tmp_path / "a", command(device="cuda:99"), "distill", "--save_dir")
        assert not (tmp_path / "a").exists()


class TestTrackers:
    def test_wandb_hears_every_line(self, tmp_path, monkeypatch):
        heard = []
        fake = SimpleNamespace(
            init=lambda **options: heard.append(options), log=lambda numbers, step: heard.append((step, numbers))
        )
        monkeypatch.setitem(sys.modules, "wandb", fake)
        begin(tmp_path / "row", wandb="project")
        assert heard[0]["project"] == "project" and heard[0]["name"] == "row" and heard[0]["config"]["rate"] == 0.1
        assert heard[1] == (0, {"loss": 1.0}) and len(read_log(tmp_path / "row")) == 1

    @pytest.mark.parametrize(
        "package, options", [("wandb", {"wandb": "project"}), ("torch.utils.tensorboard", {"tensorboard": True})]
    )
    def test_a_tracker_that_is_not_installed(self, tmp_path, monkeypatch, package, options):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=r"needs the package (wandb|tensorboard); pip install"):
            Run(tmp_path, command(**options), "distill", "--save_dir")

    def test_tensorboard_writes_event_files(self, tmp_path):
        pytest.importorskip("torch.utils.tensorboard")
        begin(tmp_path, tensorboard=True)
        assert list((tmp_path / "tensorboard").glob("events*"))

    def test_none_by_default(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "wandb", None)
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        begin(tmp_path)
