"""A run: one folder with its config, its log, its chance, and the trackers that watch it."""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from utils.config import differences, dump, flat, option
from utils.errors import UserError
from utils.files import atomic, check_written, read_json, sweep, write_signed, write_text
from utils.locks import hold
from utils.parsing import parse_yaml
from utils.ranks import Ranks
from utils.rng import generator

FORMAT = 1  # of inputs.json; what has none is of the first
_INPUTS = "inputs.json"


@dataclass(frozen=True)
class SetupConfig:
    """Which row, whose chance, on what."""

    name: str = option(
        "", "name of the row; folders default to runs/<method>/<name> (empty: the config file's name)", free=True
    )
    seed: int = option(0, "feeds every random choice", low=0)
    device: str = option("auto", "cpu, cuda, cuda:1, mps; auto takes the first that is there", free=True)
    deterministic: bool = option(False, "the same bits each time, on one device; refuse operations that cannot")


@dataclass(frozen=True)
class RunConfig(SetupConfig):
    """How a command runs that fills a run folder."""

    resume: bool = option(False, "go on with the run in this folder, if there is one", free=True)
    tensorboard: bool = option(False, "also log to TensorBoard event files in the run folder", free=True)
    wandb: str = option("", "also log to this Weights & Biases project", free=True)


def pick_device(name: str) -> torch.device:
    """The device called `name`; `auto` is the first of cuda, mps and cpu that is there."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        return device
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not on this machine; use auto or cpu") from None


class Run:
    """An open run folder.

    A folder that already holds a run of this verb is refused unless `resume`; then its config must agree with this one
    in all but the free options. `config.yaml` is written before any work starts, and as long as nothing but the digests
    of inputs is beside it there is nothing to lose: a command that stopped at a mistake can be given again, corrected.
    A folder that another process is filling is refused (locks.py), until that one ends.

    ranks   the processes of the run, where there are several: the first one writes, the others only look
    """

    def __init__(self, folder: Path | str, cfg: Any, verb: str, where: str, ranks: Ranks | None = None) -> None:
        self.folder, self.ranks = Path(folder), ranks or Ranks(pick_device(cfg.run.device))
        self.device, self.seed, self.resumed = self.ranks.device, cfg.run.seed, False
        self._rngs: dict[str, torch.Generator] = {}
        self._log_path, self._trackers, self._sums = self.folder / "log.jsonl", [], _Sums()
        if self.ranks.first:
            self._enter(cfg, verb, where)
        self.resumed = self.ranks.broadcast(self.resumed)

    def _enter(self, cfg: Any, verb: str, where: str) -> None:
        self._lock = hold(self.folder, where)
        config = self.folder / "config.yaml"
        recorded = _recorded(config, verb) if config.exists() else None
        if recorded is not None and (_begun(self.folder) or recorded.keys() != flat(cfg).keys()):
            if not cfg.run.resume:
                raise UserError(
                    f"{self.folder} already holds a run; --resume goes on with it, or choose another {where}"
                )
            changed = differences(recorded, cfg)
            if changed:
                raise UserError(
                    f"{self.folder} holds a run with other options ({'; '.join(changed)}); choose another {where}"
                )
            self.resumed = True
            sweep(self.folder)
        else:
            write_text(config, dump(cfg, verb, cfg.method))
        self._trackers = _trackers(self.folder, cfg)

    def rng(self, name: str) -> torch.Generator:
        """The run's generator of that name; each purpose has its own, so that none disturbs another."""
        if name not in self._rngs:
            self._rngs[name] = generator(self.seed, name)
        return self._rngs[name]

    def rng_state(self) -> dict[str, torch.Tensor]:
        return {name: rng.get_state() for name, rng in self._rngs.items()}

    def load_rng_state(self, state: dict[str, torch.Tensor]) -> None:
        for name, value in state.items():
            self.rng(name).set_state(value)

    def pin(self, anew: bool = False, **inputs: str | None) -> None:
        """Note digests of what the run works on; UserError where a resumed run works on something else, unless `anew`:
        nothing hangs on it yet.

        Folders may move between a run and its resumption, so it is their content that is compared.
        """
        if not self.ranks.first:
            return
        path = self.folder / _INPUTS
        if self.resumed and path.exists() and not anew:
            was = read_inputs(self.folder)
            if changed := [name for name, value in inputs.items() if was.get(name) != value]:
                raise UserError(
                    f"{self.folder} holds a run on another {' and '.join(changed)}; resume it with the files it began "
                    "with, or choose another folder"
                )
        else:
            write_signed(path, {"format": FORMAT} | inputs)

    def check_same(self, *values: Any) -> None:
        """UserError unless all processes have these same plain values, and see this folder."""
        if not self.ranks.same([*values, (self.folder / "config.yaml").exists()]):
            raise UserError(
                f"the processes do not see the same files: give them one place for {self.folder} and for the data"
            )

    def log(self, step: int, **numbers: float) -> None:
        """Append one line of numbers to log.jsonl and tell the trackers."""
        if not self.ranks.first:
            return
        line = json.dumps({"step": step} | numbers) + "\n"
        with open(self._log_path, "a", encoding="utf-8") as file:
            file.write(line)
        self._sums.add(step, line.encode())
        for tracker in self._trackers:
            tracker(step, numbers)

    def log_sum(self, step: int) -> int:
        """A checksum of the log's lines before `step`, the last one logged or the next: a checkpoint of that step notes
        it for `rewind`."""
        return self._sums.before(step)

    def rewind(self, step: int, known: int | None = None, needed: bool = False) -> None:
        """Forget log lines of `step` and later: the resumed run writes them again. Those before stay as they are.

        known    their checksum; UserError where they have another
        needed   the run computes from them; else a log that was taken away is begun anew
        """
        if not self.ranks.first:
            return
        lines = self._log_path.read_bytes().splitlines(keepends=True) if self._log_path.exists() else []
        kept, torn = [], []
        self._sums = _Sums()
        for line in lines:
            row = _row(line)
            if row is not None and row["step"] >= step:
                break
            torn.append(line)
            if row is not None:  # what is no row is kept where rows follow it
                torn[-1] = line.rstrip(b"\r\n") + b"\n"  # of a last line the end alone may be missing
                self._sums.add(row["step"], b"".join(torn))
                kept, torn = kept + torn, []
        found = self._sums.before(step)
        if known is not None and found != known and (needed or lines):
            way = "" if needed else ", or take it away to go on without its lines"
            raise UserError(
                f"{self._log_path} is damaged: its lines before step {step} are not those of the checkpoint; "
                f"restore it{way}"
            )
        with atomic(self._log_path) as temporary:
            temporary.write_bytes(b"".join(kept))


class _Sums:
    """Running checksums of log lines, whose steps never fall."""

    def __init__(self) -> None:
        self._step, self._earlier, self._all = -1, 0, 0

    def add(self, step: int, line: bytes) -> None:
        if step > self._step:
            self._step, self._earlier = step, self._all
        self._all = zlib.crc32(line, self._all)

    def before(self, step: int) -> int:
        return self._all if step > self._step else self._earlier


def read_inputs(folder: Path) -> dict[str, Any]:
    """Digests of what the run in a folder works on, as it pinned them; UserError where they are missing or damaged."""
    path = folder / _INPUTS
    found = read_json(path, "inputs of a run")
    check_written(path, found, FORMAT, (), f"{path} holds no inputs of a run", "restore it, or begin anew elsewhere")
    return found


def read_log(folder: Path) -> list[dict[str, float]]:
    """All rows of a run's log.jsonl; what is none, as a last line cut short by a crash, is left out."""
    path = folder / "log.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: bytes) -> dict[str, float] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _begun(folder: Path) -> bool:
    files = (path.name for path in folder.iterdir() if path.is_file())
    return any(name not in ("config.yaml", _INPUTS) and not name.startswith(".") for name in files)


def _recorded(config: Path, verb: str) -> dict[str, Any]:
    try:
        return dict(parse_yaml(config.read_text(encoding="utf-8"))[verb])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{config} is damaged or of another verb than {verb}; choose another folder") from None


def _trackers(folder: Path, cfg: Any) -> list[Any]:
    trackers = []
    if cfg.run.tensorboard:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("--tensorboard needs the package tensorboard; pip install tensorboard") from None
        writer = SummaryWriter(str(folder / "tensorboard"))

        def to_tensorboard(step: int, numbers: dict[str, float]) -> None:
            for name, value in numbers.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        trackers.append(to_tensorboard)
    if cfg.run.wandb:
        try:
            import wandb
        except ImportError:
            raise UserError("--wandb needs the package wandb; pip install wandb") from None
        wandb.init(project=cfg.run.wandb, name=folder.name, dir=str(folder), config=flat(cfg), resume="allow")
        trackers.append(lambda step, numbers: wandb.log(numbers, step=step))
    return trackers
