"""DIME-FM's training, killed and gone on with, leaves the files of a run that nobody disturbed; so do two processes."""

from pathlib import Path

import pytest
import torch

from methods.clip_learning import Learner
from methods.command import command
from networks.clip_students import load_student
from tests.conftest import ROOT, contents, plain
from tests.methods.clip_world import World
from tests.processes import killed, torchrun
from utils.run import read_log

FLAGS = (
    *("--method", "dimefm", "--images", "toy", "--toy_images", "44", "--toy_size", "20", "--device", "cpu"),
    *("--image_feats", "features/images.npy", "--text_feats", "features/texts.npy", "--student", "vit_tiny"),
    *("--batch_size", "8", "--text_batch", "6", "--epochs", "3", "--warmup_epochs", "1", "--use_pvl_loss"),
    *("--checkpoint_every", "0.6", "--print_freq", "2", "--workers", "1", "--resume"),
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dimefm")
    World(root)
    return root


@pytest.fixture(scope="module")
def whole(root) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert command("distill", [*FLAGS, "--save_dir", "whole"]) == 0
    return root / "whole"


def files(folder: Path) -> dict:
    """Every file, byte for byte, but tensors by their values: torch notes the random name of a temporary file. The
    config names the folder."""
    found = {name: data for name, data in contents(folder).items() if name not in ("config.yaml", "report.html")}
    return {
        name: plain(torch.load(folder / name, weights_only=True)) if name.endswith(".pt") else data
        for name, data in found.items()
    }


def kept(folder: Path) -> list[int]:
    """Steps of the checkpoints."""
    return sorted(int(path.stem.removeprefix("checkpoint_")) for path in folder.glob("checkpoint_*.pt"))


def test_killed_again_and_again(root, whole, monkeypatch):
    """In a step, before the first checkpoint; at the very moment when a checkpoint gets its name; in a later step."""
    monkeypatch.chdir(root)
    flags = [*FLAGS, "--save_dir", "cut"]

    def interrupted_after(steps: int) -> None:
        left, real = [steps], Learner.step

        def step(self, batch):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return real(self, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "step", step)
            assert command("distill", flags) == 130

    interrupted_after(2)
    killed("distill", flags, "checkpoint_00000006.pt")
    assert kept(root / "cut") == [3, 5]
    assert list(Path("cut").glob(".*.part"))  # a whole file that has not got its name
    interrupted_after(5)
    assert command("distill", flags) == 0
    assert files(root / "cut") == files(whole) and {"log.jsonl", "student.pt"} <= files(whole).keys()
    assert command("distill", flags) == 0  # it is finished
    assert files(root / "cut") == files(whole)


KILLED = f"""
import os, signal, sys
import torch
torch.set_num_threads(1)
from methods.clip_learning import Learner
from methods.command import command
real = Learner.step
def step(self, batch):
    if self.done == 7 and self.ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, batch)
Learner.step = step
sys.exit(command("distill", {[*FLAGS, "--save_dir", "two"]!r}))
"""


def test_two_processes_by_torchrun(root, whole):
    """One of them is killed, which one line tells; gone on with, they learn what one process learned."""
    (root / "killed.py").write_text(KILLED)
    done = torchrun("killed.py", cwd=root)
    assert done.rc != 0
    told = [line for line in done.stderr.splitlines() if "distill.py: error:" in line]
    assert len(told) == 1 and "a process of this run ended before its time" in told[0], done.stderr[-3000:]
    assert done.stderr.count("Traceback") <= 1, done.stderr[-3000:]  # torchrun's own
    assert kept(root / "two") == [5, 6]
    done = torchrun(ROOT / "distill.py", *FLAGS, "--save_dir", "two", cwd=root)
    assert done.rc == 0, done.stderr[-3000:]
    assert done.stdout.count("the student is") == 1
    logs = [read_log(folder) for folder in (whole, root / "two")]
    assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*logs, strict=True))
    nets = [load_student(folder / "student.pt")[0] for folder in (whole, root / "two")]
    (one, two), pixels = nets, torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(two(pixels), one(pixels), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize("done, what", [(6, "step 8: the loss is"), (8, "step 9: the weights are")])
def test_what_is_not_finite_is_not_kept(root, monkeypatch, refused, done, what):
    """The seventh step's update is told by the eighth's loss; the ninth's when its weights would be kept."""
    monkeypatch.chdir(root)
    real, folder = Learner.rate, f"broken{done}"
    monkeypatch.setattr(Learner, "rate", lambda self: float("inf") if self.done == done else real(self))
    line = refused("distill", *FLAGS, "--save_dir", folder, code=1)
    assert line.startswith(f"{what} not finite; lower --base_lr")
    assert line.endswith("--resume goes on from the last checkpoint, of step 6") and kept(root / folder) == [5, 6]
    monkeypatch.setattr(Learner, "rate", real)
    assert command("distill", [*FLAGS, "--save_dir", folder]) == 0
