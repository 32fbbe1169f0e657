"""What the tests share: one thread a process, commands that work or are refused, one tiny distillation to look at."""

import contextlib
import gc
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from methods.command import command

ROOT = Path(__file__).resolve().parents[1]

# The smallest thing that is still VLDD: drawn pictures, a network of a few thousand weights, no download.
TINY = (
    *("--dataset", "toy", "--toy_images", "200", "--image_size", "16"),
    *("--image_encoder", "ConvNetD2W16", "--joint_width", "32", "--text_encoder", "tfidf"),
)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tensors this small gain nothing from threads, and threads that wait for each other on a busy machine lose."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def kept_tests() -> Iterator[None]:
    """Some thousand tests are no garbage, and need not be looked through whenever there may be some."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True, scope="session")
def no_power_cut() -> Iterator[None]:
    """What is written is not waited for until it is on the disk: no test can see a difference, and there are some
    hundred thousand files. That files are synced, and in which order, utils/test_files.py tests by the calls."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        yield


def works(verb: str, *flags: object) -> None:
    """Run a command in this process; it must end well."""
    assert command(verb, [str(flag) for flag in flags]) == 0


@pytest.fixture
def refused(capsys):
    """refused(verb, *flags, code) runs a command that must fail; its one line, without the `<verb>.py: error: `."""

    def run(verb: str, *flags: object, code: int = 2) -> str:
        capsys.readouterr()
        assert command(verb, [str(flag) for flag in flags]) == code
        text = capsys.readouterr().err
        *before, last = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
        begin = f"{verb}.py: error: "
        assert last.startswith(begin), text
        assert "Traceback" not in text and not any(line.startswith(begin) for line in before), text
        return last.removeprefix(begin)

    return run


@contextlib.contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def unreadable(folder: Path, path: Path) -> Iterator[None]:
    """In `folder`, a file below it may not be read, not even by root."""
    folder.chmod(0o755)
    path.chmod(0)
    root = os.geteuid() == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # nobody may not come here from above
        os.seteuid(65534 if root else os.geteuid())
        try:
            yield
        finally:
            os.seteuid(0 if root else os.geteuid())


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, whole, but for the lock of a run that is still open in this process."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def rewrite(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file as someone would who knows what he does: its checksum goes."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree.pop("checksum", None)
    path.write_text(json.dumps(change(tree)), encoding="utf-8")


def plain(value):
    """Tensors as lists, so that whole files can be compared by `==`."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {name: plain(part) for name, part in value.items() if name not in ("config", "report")}
    return [plain(part) for part in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    rc: int
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def run_verb() -> Callable[..., Outcome]:
    """run_verb(verb, *flags, cwd) runs `<verb>.py` with these flags in the folder `cwd`, offline, on one thread."""

    def run(verb: str, *flags: object, cwd: Path | str, timeout: float = 300) -> Outcome:
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        env = os.environ | offline | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(ROOT / f"{verb}.py"), *map(str, flags)]
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@dataclass(frozen=True)
class TinyRun:
    """A finished toy distillation. Tests read it; one that writes works on a copy.

    root       the folder that the commands ran in; caches are in `root / "cache"`
    buffers    buffer.py's --buffer_path: 2 experts of 3 epochs
    folder     distill.py's --save_dir: 8 pairs, steps 0, 2 and 4 evaluated
    distilled  the file of learned pairs
    flags      data and towers, as both commands had them
    """

    root: Path
    buffers: Path
    folder: Path
    distilled: Path
    flags: tuple[str, ...] = TINY


@pytest.fixture(scope="session")
def tiny_run(run_verb: Callable[..., Outcome], tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    """Two experts and eight learned pairs, made once a session through the scripts."""
    root = tmp_path_factory.mktemp("tiny")
    buffers, folder = root / "buffers", root / "run"
    experts = ("--num_experts", 2, "--train_epochs", 3, "--buffer_path", buffers)
    learned = ("--num_pairs", 8, "--syn_steps", 2, "--iterations", 4, "--eval_it", 2, "--checkpoint_every", 2)
    rates = ("--lr_img", 100, "--lr_txt", 100, "--lr_lr", 1e-5)
    judged = ("--num_eval", 1, "--epoch_eval_train", 3)
    places = ("--buffer_path", buffers, "--save_dir", folder)
    for verb, flags in (("buffer", experts), ("distill", (*learned, *rates, *judged, *places))):
        done = run_verb(verb, *TINY, *flags, cwd=root)
        assert done.rc == 0, done.stderr
    return TinyRun(root, buffers, folder, folder / "distilled_best.pt")


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    """The test works in a folder of its own, and reaches no model hub."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
