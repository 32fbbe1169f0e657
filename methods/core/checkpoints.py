"""States of a run in training, kept while it goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from utils.errors import UserError
from utils.files import check_version, load_tensors, save_tensors

FORMAT = 1  # of these files; what has none is of the first
_LOG = "log"  # the checksum of the log's lines before it
_KEY = "checkpoint"  # `format` would make a student of what holds one


class Stateful(Protocol):
    """What can be saved and taken up again."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The last states of a learner, `<name>_<step>.pt` in a folder.

    every   steps between two of them
    limit   how many are kept (0: all)
    epoch   steps of an epoch, at whose ends there is one, too; 0 where epochs have none

    One that is not due, as after a signal, is kept until the next: so an interrupted run ends with the files of
    another.
    """

    def __init__(self, folder: Path, name: str, every: int, limit: int, epoch: int = 0) -> None:
        self.folder, self.name, self.every, self.limit, self.epoch = folder, name, every, limit, epoch
        self.log_sum: int | None = None  # of the log's lines before the state that was restored

    def due(self, step: int) -> bool:
        """Whether a run that nobody disturbs keeps the state after so many steps."""
        return step % self.every == 0 or (self.epoch > 0 and step % self.epoch == 0)

    def found(self) -> list[tuple[int, Path]]:
        """Steps taken and the file, the oldest first."""
        files = ((path.stem.removeprefix(f"{self.name}_"), path) for path in self.folder.glob(f"{self.name}_*.pt"))
        return sorted((int(number), path) for number, path in files if number.isdigit())

    def save(self, step: int, learner: Stateful, log_sum: int | None = None) -> None:
        """Keep a state, then drop older ones that were not due or are beyond the limit; `log_sum` as `Run.log_sum` has
        it."""
        state = learner.state_dict() | {_KEY: FORMAT, _LOG: log_sum}
        save_tensors(self.folder / f"{self.name}_{step:08d}.pt", state)
        self._prune()

    def _prune(self) -> None:
        *older, last = self.found()
        kept = [*(each for each in older if self.due(each[0])), last][-self.limit :]
        for _, path in (each for each in older if each not in kept):
            path.unlink(missing_ok=True)

    def restore(self, learner: Stateful) -> int:
        """Load the last state there is; the steps it has taken. UserError for one that is damaged or of another run."""
        step, path = next(reversed(self.found()), (0, None))
        if path is not None:
            state = load_tensors(path, "checkpoint", remedy="delete it to go on from the one before")
            try:
                self.log_sum = state.pop(_LOG, None)
                check_version(path, state.pop(_KEY, 1), FORMAT)
                learner.load_state_dict(state)
            except (AttributeError, KeyError, ValueError, RuntimeError, TypeError) as error:
                reason = str(error).strip().splitlines()[-1].strip() or type(error).__name__
                raise UserError(
                    f"checkpoint {path} does not fit this run ({reason}); delete it, or choose another folder"
                ) from None
            self._prune()  # what a killed process did not come to drop
        return step

    def clear(self) -> None:
        for _, path in self.found():
            path.unlink()
