"""What a run of experts leaves in its folder until all are finished, so that it may be killed at any moment.

expert_003/progress.pt     the state, after its last whole epoch, of the company that begins with expert 3, and what the
                           manifest says of these experts (or will: only the first of several processes writes it)
expert_003/finished.json   the latter alone, of a company that is finished and has yet to be taken into manifest and log

Companies are begun in order, by whichever process is free, and end in any. Log lines are in order for all that: a
company's are written when those before it are complete. Nothing of this is left in the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from methods.core.store import TrajectoryStore, as_entry
from utils.errors import RunError, UserError
from utils.files import check_written, load_tensors, read_json, save_tensors, write_signed
from utils.run import Run, read_log

FORMAT = 1  # of progress.pt and finished.json; what has none is of the first
_PATIENCE = 60  # seconds that a network's disk may take to show what another machine has written


@dataclass(frozen=True)
class Company:
    """Experts that are trained side by side.

    path   of their state
    begun  their entries in the manifest as of that state; none where there is none
    """

    experts: range
    path: Path
    begun: tuple[dict[str, Any], ...] = ()


@dataclass
class ExpertFiles:
    """The companies of a run: which there are, and what becomes of their files.

    epochs   that an expert has
    """

    store: TrajectoryStore
    run: Run
    epochs: int
    _unlogged: list[range] = field(default_factory=list)  # in order; only the first process knows them
    _logged: int = 0  # lines of the first of them

    def plan(self, count: int, together: int) -> list[Company]:
        """The companies that are not finished, in order, when there are to be `count` experts; those that have begun
        stay together, whatever `together` is now.

        UserError for a state that cannot be read.
        """
        begun, finished = (self._begun(), self._finished()) if self.run.resumed else ([], [])
        done = {expert for expert, entry in enumerate(self.store.experts) if entry["done"]}
        taken = done.union(*finished, *(company.experts for company in begun))
        begun = [company for company in begun if company.experts[0] < count]
        waiting = [expert for expert in range(count) if expert not in taken]
        new = [Company(experts, self.store.place(experts[0]) / "progress.pt") for experts in _chunks(waiting, together)]
        plan = sorted([*begun, *new], key=lambda company: company.experts[0])
        ready = [experts for experts in finished if experts[0] < count]
        self._unlogged = sorted([*ready, *(company.experts for company in plan)], key=lambda experts: experts[0])
        self._rewind({company.experts: company.begun for company in plan})
        return plan

    def load(self, company: Company) -> dict[str, Any] | None:
        """The state to go on from, if there is one."""
        return _load(company.path) if company.begun else None

    def begin(self, company: Company) -> None:
        """Take up what was known of a company when its state was kept."""
        for expert, entry in zip(company.experts, company.begun, strict=bool(company.begun)):
            self.store.entry(expert).update(as_entry(entry) | {"done": False})

    def save(self, company: Company, state: dict[str, Any]) -> None:
        """Keep the state after an epoch whose snapshots are written."""
        self.collect(company.experts)
        entries = [self.store.entry(expert) for expert in company.experts]
        about = {"format": FORMAT, "expert": company.experts[0], "together": len(company.experts), "entries": entries}
        save_tensors(company.path, about | state)

    def finish(self, company: Company) -> None:
        """Note that a company has had all its epochs."""
        experts = company.experts
        if self.run.ranks.world == 1:
            self.collect(experts)
            self._enter(experts)
        else:
            entries = [self.store.entry(expert) for expert in experts]
            ends = [experts.start, experts.stop]
            write_signed(self._note(experts), {"format": FORMAT, "experts": ends, "entries": entries})
        company.path.unlink(missing_ok=True)
        self.collect()

    def collect(self, own: Sequence[int] = ()) -> None:
        """Take into manifest and log what is complete, in order, and of the company `own` the epochs that it has had.

        Only the first process does.
        """
        if not self.run.ranks.first:
            return
        while self._unlogged and self._note(self._unlogged[0]).exists():
            experts = self._unlogged[0]
            for expert, entry in zip(experts, _read_note(self._note(experts), self.store)[1], strict=True):
                self.store.entry(expert).update(entry)
            self._log(experts)
            self._enter(experts)
            self._note(experts).unlink()
        if self._unlogged and self._unlogged[0] == own:
            self._log(own)

    def collect_all(self) -> None:
        """Take all into manifest and log, once every process has finished its companies.

        RunError where what another one has written cannot be seen.
        """
        for _ in range(_PATIENCE):
            self.collect()
            if not self._unlogged or not self.run.ranks.first:
                return
            time.sleep(1)
        raise RunError(f"{self._note(self._unlogged[0])} cannot be seen from here; --resume goes on when it can")

    def _enter(self, experts: range) -> None:
        """Note in the manifest that these, whose lines are in the log, are finished."""
        for expert in experts:
            self.store.finish(expert, experts)
        self._unlogged.remove(experts)
        self._logged = 0

    def _log(self, experts: range) -> None:
        """Log the epochs that the first company not yet logged has had."""
        for row in self._rows(experts, [self.store.entry(expert) for expert in experts])[self._logged :]:
            self.run.log(**row)
            self._logged += 1

    def _rows(self, experts: range, entries: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """A company's lines of the log, numbered as they are written: epoch by epoch, within it expert by expert."""
        first, size = experts[0] * (self.epochs + 1), len(experts)
        return [
            {"step": first + epoch * size + place, "expert": expert, "epoch": epoch} | entry["metrics"][epoch]
            for epoch in range(1, self.epochs + 1)
            for place, (expert, entry) in enumerate(zip(experts, entries, strict=True))
            if epoch in entry["metrics"]
        ]

    def _rewind(self, begun: dict[range, tuple[dict[str, Any], ...]]) -> None:
        """Forget the lines that will be written again, and write those of finished experts that are gone.

        UserError where a line says otherwise than the manifest.
        """
        known = self._known()
        companies = [*known, *self._unlogged[:1]]
        if not companies:
            return
        kept = [row for experts in known for row in self._rows(experts, [self.store.entry(one) for one in experts])]
        started = begun.get(self._unlogged[0]) if self._unlogged else None
        wanted = kept + (self._rows(self._unlogged[0], started) if started else [])
        first = companies[0][0] * (self.epochs + 1)
        found = [row for row in read_log(self.run.folder) if row["step"] >= first]
        self._compare(found, kept)
        same = 0
        while same < min(len(wanted), len(found)) and repr(wanted[same]) == repr(found[same]):
            same += 1
        forgotten = [row["step"] for row in (*found[same : same + 1], *kept[same : same + 1])]
        if self._unlogged or forgotten:
            self.run.rewind(min(forgotten, default=sys.maxsize))
        for row in kept[same:]:
            self.run.log(**row)
        self._logged = max(0, same - len(kept))

    def _known(self) -> list[range]:
        """The companies, of those that are in manifest and log, whose lines the manifest tells: the last ones, for it
        once noted no companies."""
        found: list[range] = []
        end = self._unlogged[0][0] if self._unlogged else len(self.store.experts)
        while end and "company" in (entry := self.store.experts[end - 1]):
            start, stop = company = entry["company"]
            alike = 0 <= start < stop == end
            if not alike or any(self.store.experts[one].get("company") != company for one in range(start, stop)):
                raise UserError(
                    f"{self.store.folder}/manifest.json is damaged: expert {end - 1} was not in the company "
                    f"{company}; restore it, or make the trajectories again in another folder"
                )
            found.insert(0, range(start, stop))
            end = start
        return found

    def _compare(self, found: Sequence[dict[str, Any]], known: Sequence[dict[str, Any]]) -> None:
        told = {row["step"]: repr(row) for row in known}
        for row in found:
            if told.get(row["step"], repr(row)) != repr(row):
                raise UserError(
                    f"{self.run.folder}/log.jsonl is damaged: its line of step {row['step']} is not what "
                    f"{self.store.folder}/manifest.json says of it; restore it, or take the log away to have it anew"
                )

    def _begun(self) -> list[Company]:
        """The companies that have a state, but are not finished; what a killed process did not come to remove goes."""
        found = []
        # One process, which had one company at a time, once kept its state in the folder itself.
        for path in [*self.run.folder.glob("progress.pt"), *sorted(self.run.folder.glob("expert_*/progress.pt"))]:
            state = _load(path, mmap=True)
            experts = range(state["expert"], state["expert"] + state.get("together", 1))
            entries = state.get("entries") or [self.store.entry(expert) for expert in experts]
            if self._note(experts).exists() or all(self.store.entry(expert)["done"] for expert in experts):
                path.unlink()
            else:
                found.append(Company(experts, path, tuple(entries)))
        return found

    def _finished(self) -> list[range]:
        """The finished companies that are not in the manifest; notes that a killed process did not remove go."""
        found = []
        for path in sorted(self.run.folder.glob("expert_*/finished.json")):
            experts, _ = _read_note(path, self.store)
            if all(self.store.entry(expert)["done"] for expert in experts):
                path.unlink()
            else:
                found.append(experts)
        return found

    def _note(self, experts: range) -> Path:
        return self.store.place(experts[0]) / "finished.json"


def _read_note(path: Path, store: TrajectoryStore) -> tuple[range, list[dict[str, Any]]]:
    """The experts that a note of finished ones is of, and what the manifest is to say of them."""
    found = read_json(path, "note of finished experts")
    told, remedy = f"note of finished experts {path} is damaged", "remove it to train these experts anew"
    check_written(path, found, FORMAT, ("experts", "entries"), told, remedy)
    try:
        return _company(found["experts"], found["entries"], path, store)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"{told} ({error!r}); {remedy}") from None


def _company(
    ends: Sequence[int], entries: Sequence[dict[str, Any]], path: Path, store: TrajectoryStore
) -> tuple[range, list[dict[str, Any]]]:
    """Experts from the first to behind the last, and their entries, as a file in the first one's folder has them."""
    start, stop = ends
    if not (type(start) is type(stop) is int and 0 <= start < stop and store.place(start).name == path.parent.name):
        raise ValueError(f"experts {start!r} to {stop!r}")
    known = [as_entry(entry) for entry in entries]
    if len(known) != stop - start or not all(isinstance(row, dict) for one in known for row in one["metrics"].values()):
        raise ValueError("entries that are not those of its experts")
    return range(start, stop), known


def _load(path: Path, mmap: bool = False) -> dict[str, Any]:
    remedy = "remove it to begin that expert anew"
    state = load_tensors(path, "expert in progress", mmap, remedy)
    check_written(path, state, FORMAT, ("expert", "epoch"), f"expert in progress {path} is damaged", remedy)
    return state


def _chunks(waiting: Sequence[int], together: int) -> list[range]:
    """Neighbours among these numbers, at most `together` at a time."""
    found: list[range] = []
    for number in waiting:
        if found and found[-1].stop == number and len(found[-1]) < together:
            found[-1] = range(found[-1].start, number + 1)
        else:
            found.append(range(number, number + 1))
    return found
