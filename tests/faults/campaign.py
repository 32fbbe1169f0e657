"""One fault after another: a command is given in a copy of its world, disturbed, given again, and its files are
compared with those of an undisturbed run."""

from __future__ import annotations

import importlib
import os
import random
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from methods.command import command
from tests.conftest import contents
from tests.faults.children import NOBODY, UNDISTURBED, Ended, Fault, run
from tests.faults.damage import KINDS, harm, is_data, pick
from tests.faults.worlds import WORLDS, Case
from utils.files import digest

FAULTS = ("kill", "stop", "disk", "tmpfs", "rights", *KINDS)
# What may come of a fault; the last five may not.
GOOD = ("survived", "refused", "harmless", "data", "skipped")
BAD = ("unnamed", "wrong", "traceback", "lost", "hang")
_POINTER = re.compile(r"/files_[0-9a-f]{32}\.txt$")
_REMOVE = re.compile(r"\b(?:remove|delete) (?:it|them)\b")


@dataclass(frozen=True)
class Outcome:
    """What came of a fault, and what there is to say of it."""

    case: Case
    kind: str
    number: int
    result: str
    note: str

    @property
    def name(self) -> str:
        return f"{self.case.name}/{self.kind}/{self.number}"


@dataclass
class Prepared:
    """A command in its world: files before it and after it, and how long it takes, in seconds and in files moved."""

    case: Case
    before: Path
    after: dict[str, Any]
    wall: float
    moves: int


class Broken(AssertionError):
    """A fault ended badly: which way, and what was seen."""

    def __init__(self, way: str, what: str) -> None:
        super().__init__(f"{way}: {what}")
        self.way, self.what = way, what


class Campaign:
    """The worlds of some methods below `root`, made once, and faults in them.

    Every trial is in the folder `here`, so that places which files name are the same in all of them.
    """

    def __init__(self, root: Path, seed: int, limit: float = 120) -> None:
        self.root, self.here, self.seed, self.limit = root, root / "here", seed, limit
        self.mounted = False

    def prepare(self, cases: Sequence[Case]) -> Iterator[Prepared]:
        """Run each command undisturbed, twice; AssertionError where it fails, or the two differ.

        What the first one imports is imported here, so that no fork need do it again.
        """
        for method in dict.fromkeys(case.method for case in cases):
            self._place(None)
            self._sound(run(lambda m=method: WORLDS[m](self.here) or 0, self.here, limit=self.limit), method)
            for case in (case for case in cases if case.method == method):
                before = self.root / "before" / case.name.replace("/", "-")
                shutil.copytree(self.here, before, symlinks=True)
                first = self._sound(self._give(case), case.name)
                for module in first.modules:
                    _bring(module)
                after = files(self.here)
                shutil.copytree(self.here, self.root / "after")
                self._place(before)
                second = self._sound(self._give(case), case.name)
                assert not (odd := differences(files(self.here), after)), f"{case.name} differs by itself: {odd}"
                self._place(self.root / "after")
                shutil.rmtree(self.root / "after")
                yield Prepared(case, before, after, second.wall, second.moves)

    def trial(self, ready: Prepared, kind: str, number: int) -> Outcome:
        """One fault, which `seed` and the words of its name decide."""
        rng = random.Random(f"{self.seed} {ready.case.name} {kind} {number}")
        try:
            if kind in KINDS:
                result, note = self._damage(ready, kind, rng)
            else:
                result, note = getattr(self, f"_{kind}")(ready, rng)
        except Broken as broken:
            result, note = broken.way, broken.what
        finally:
            self._unmount()
        return Outcome(ready.case, kind, number, result, note)

    def _give(self, case: Case, fault: Fault = UNDISTURBED) -> Ended:
        return run(lambda: command(case.verb, [*case.words]), self.here, fault, self.limit)

    def _place(self, source: Path | None) -> None:
        """Begin anew, with the files of another folder."""
        shutil.rmtree(self.here, ignore_errors=True)
        shutil.copytree(source, self.here, symlinks=True) if source else self.here.mkdir(parents=True)

    @staticmethod
    def _sound(done: Ended, what: str) -> Ended:
        assert done.rc == 0, f"{what} fails by itself: {done.rc} {done.err}"
        return done

    # ---- what may end a process

    def _moment(self, ready: Prepared, rng: random.Random, number: int = signal.SIGKILL) -> Fault:
        """Any moment of a whole run: by the clock, or just before or after some file gets its name."""
        if rng.random() < 0.5:
            return Fault(after=rng.uniform(0, ready.wall), signal=number)
        return Fault(move=rng.randint(1, max(1, ready.moves)), late=rng.random() < 0.5, signal=number)

    def _kill(self, ready: Prepared, rng: random.Random) -> tuple[str, str]:
        self._place(ready.before)
        moments = [self._moment(ready, rng) for _ in range(3)]
        for moment in moments:
            done = self._give(ready.case, moment)
            if done.rc != -9:
                self._told(done)
                if done.rc:
                    raise Broken("wrong", f"refused after a kill: {done.err}")
        self._ends_well(ready, f"after {moments}")
        return "survived", ""

    def _stop(self, ready: Prepared, rng: random.Random) -> tuple[str, str]:
        """SIGINT or SIGTERM, which end a command with its state kept."""
        self._place(ready.before)
        moments = [self._moment(ready, rng, rng.choice((signal.SIGINT, signal.SIGTERM))) for _ in range(3)]
        for moment in moments:
            done = self._give(ready.case, moment)
            # SIGTERM at once, without a word, is what comes in the instant when its handler is gone again.
            if done.rc not in (0, 128 + moment.signal, -signal.SIGTERM) or "Traceback" in done.err:
                raise Broken(
                    "hang" if done.rc is None else "traceback", f"{moment}: exit {done.rc}: {done.err[-1500:]}"
                )
        self._ends_well(ready, f"after {moments}")
        return "survived", ""

    def _disk(self, ready: Prepared, rng: random.Random) -> tuple[str, str]:
        """No file may grow beyond some size, from some moment on; then there is room again."""
        self._place(ready.before)
        size = int(2 ** rng.uniform(0, 17))
        fault = Fault(room=size, since=rng.choice((0.0, rng.uniform(0, ready.wall))))
        return self._short_of_room(ready, self._give(ready.case, fault), f"{fault}")

    def _tmpfs(self, ready: Prepared, rng: random.Random) -> tuple[str, str]:
        """A small disk of its own, which is full at some file, then has room again."""
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", self.here], capture_output=True).returncode:
            return "skipped", "a tmpfs needs rights to mount it"
        self.mounted = True
        shutil.copytree(ready.before, self.here, symlinks=True, dirs_exist_ok=True)
        room = shutil.disk_usage(self.here).used // 1024 + int(2 ** rng.uniform(2, 9))
        subprocess.run(["mount", "-o", f"remount,size={room}k", self.here], check=True)
        done = self._give(ready.case)
        subprocess.run(["mount", "-o", "remount,size=1g", self.here], check=True)
        return self._short_of_room(ready, done, f"a disk of {room} KiB")

    def _short_of_room(self, ready: Prepared, done: Ended, what: str) -> tuple[str, str]:
        line = self._told(done)
        if done.rc == 0:
            self._same(ready, what)
            return "harmless", ""
        if not re.search(r"disk is full|larger than this disk|No space|File too large", line):
            raise Broken("unnamed", f"{what}: {line}")
        self._ends_well(ready, f"{what}: {line}")
        return "survived", ""

    def _unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", self.here], check=True)
            self.mounted = False

    # ---- what may befall files

    def _partial(self, ready: Prepared, rng: random.Random) -> str:
        """The world before the command, after it, or, most of the time, as a kill left it."""
        self._place(ready.before)
        share = rng.random()
        if share < 0.2 and any(self.here.iterdir()):
            return "before it"
        moment = Fault(move=rng.randint(1, max(1, ready.moves)), late=True) if share < 0.8 else Fault()
        self._give(ready.case, moment)
        return f"after move {moment.move}" if moment.move else "when it is done"

    def _rights(self, ready: Prepared, rng: random.Random) -> tuple[str, str]:
        """A file or folder that may not be written, or not be read; then its rights are as they were."""
        when = self._partial(ready, rng)
        places = sorted(path for path in self.here.rglob("*") if not path.is_symlink())
        target = rng.choice([self.here, *(path for path in places if rng.random() < 0.5 or path.is_dir())])
        name, meek = str(target.relative_to(self.here)), os.geteuid() == 0
        for path in (self.here, *places) if meek else ():
            os.chown(path, NOBODY, NOBODY)
        for parent in self.here.parents if meek else ():
            if not os.stat(parent).st_mode & 1:
                return "skipped", "nobody may not come here"
        was = target.stat().st_mode
        target.chmod(rng.choice((0o444, 0o000)) if target.is_file() else rng.choice((0o555, 0o000)))
        what = f"{name}, {when}, with rights {target.stat().st_mode & 0o777:o}"
        done = self._give(ready.case, Fault(meek=meek))
        target.chmod(was)
        line = self._told(done)
        if done.rc == 0:
            self._same(ready, what)
            return "harmless", ""
        if "no permission" not in line and not _named(line, name):
            raise Broken("unnamed", f"{what}: {line}")
        self._ends_well(ready, f"{what}: {line}")
        return "refused", line

    def _damage(self, ready: Prepared, kind: str, rng: random.Random) -> tuple[str, str]:
        when = self._partial(ready, rng)
        name = pick(self.here, rng)
        path, before = self.here / name, contents(self.here)
        was = path.read_bytes()
        what = f"{name}, {when}: {harm(path, kind, rng)}"
        harmed = path.read_bytes()
        if harmed == was:
            return "harmless", what
        done = self._give(ready.case)
        line = self._told(done, what)
        if done.rc == 0:
            return self._went_on(ready, name, harmed, what)
        if not _named(line, name) and not (is_data(name) and re.search(r"another|other options", line)):
            raise Broken("unnamed", f"{what}: {line}")
        gone = [each for each in before if each != name and not self._kept(ready, each, before[each])]
        if gone:
            raise Broken("lost", f"{what}: {line}: {gone}")
        if _REMOVE.search(line) and "restore it" not in line and not is_data(name):
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(was)
        self._ends_well(ready, f"{what}: {line}", name)
        return "refused", f"{what}: {line}"

    def _went_on(self, ready: Prepared, name: str, harmed: bytes, what: str) -> tuple[str, str]:
        """The command ended well: the files must be those of an undisturbed run."""
        odd = differences(files(self.here), ready.after)
        path = self.here / name
        still = path.exists() and path.read_bytes() == harmed
        others = [each for each in odd if each != name]
        if not others and (still or name not in odd):
            return ("harmless" if still else "survived"), what
        if is_data(name):
            return "data", what
        raise Broken("wrong", f"{what}; other files: {odd}")

    def _kept(self, ready: Prepared, name: str, data: bytes) -> bool:
        """Whether a good file is still good: as it was, or as the command leaves it, or one in the making."""
        path = self.here / name
        if not path.exists():
            return name not in ready.after or name.endswith(".part")
        return path.read_bytes() == data or not _given(ready, name)

    # ---- how it must end

    def _told(self, done: Ended, what: str = "") -> str:
        """The one line of a command that failed; Broken where it hung or crashed."""
        if done.rc is None:
            raise Broken("hang", f"{what} {done.err[-300:]}")
        if "Traceback" in done.err or done.rc not in (0, 1, 2):
            raise Broken("traceback", f"{what}: exit {done.rc}: {done.err[-1500:]}")
        lines = [line.strip() for line in re.split(r"[\r\n]+|\x1b\[A", done.err) if "error: " in line]
        if done.rc and len(lines) != 1:
            raise Broken("unnamed", f"{what}: {lines}")
        return lines[0] if done.rc else ""

    def _ends_well(self, ready: Prepared, what: str, harmed: str = "") -> None:
        """Given again, undisturbed, the command ends at the files of an undisturbed run."""
        done = self._give(ready.case)
        line = self._told(done, what)
        if done.rc:
            raise Broken("lost", f"{what}; given again: {line}")
        self._same(ready, what, harmed)

    def _same(self, ready: Prepared, what: str, harmed: str = "") -> None:
        """Broken where files differ; but the user's own may, and what a command only reads may be gone, as advised."""
        odd = differences(files(self.here), ready.after)
        if harmed in odd and (is_data(harmed) or (_given(ready, harmed) and not (self.here / harmed).exists())):
            odd.remove(harmed)
        if odd:
            raise Broken("wrong", f"{what}; other files: {odd}")


def files(folder: Path) -> dict[str, Any]:
    """Every file below a folder, tensors by their values: torch notes the random name of a temporary file."""
    found: dict[str, Any] = {}
    for name, data in contents(folder).items():
        if name.endswith((".pt", ".pth")):
            with suppress(Exception):  # it was damaged, and was not read again
                data = _bits(torch.load(folder / name, weights_only=True))
        if _POINTER.search(name):  # its name holds dates; a copy's has others
            name = f"{name[:-40]} to {data!r}"
        if not name.endswith((".part", ".lock")):
            found[name] = data
    return found


def _bits(value: Any) -> Any:
    """Tensors, among plain values, by digests: as lists of numbers they would fill the memory, and forks take long."""
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), list(value.shape), digest(value.contiguous().reshape(-1).view(torch.uint8))]
    if isinstance(value, dict):
        return {name: _bits(part) for name, part in value.items() if name not in ("config", "report")}
    return [_bits(part) for part in value] if isinstance(value, (list, tuple)) else value


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """The files that only one has, or that differ; numbers that are no numbers are equal to their like.

    A second evaluation writes its result beside the first, which has to be the same. A cache may know other files too.
    """
    found = {name: data for name, data in found.items() if not _same_result(name, data, found, wanted)}
    gone = {name for name in wanted if name not in found}
    more = {name for name in found if name not in wanted and not name.startswith("cache/")}
    both = {name for name in found if name in wanted and found[name] != wanted[name]}
    return sorted(gone | more | {name for name in both if repr(found[name]) != repr(wanted[name])})


def _same_result(name: str, data: Any, found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    first = re.sub(r"-\d+/", "/", name, count=1)
    return name not in wanted and first in found and data == wanted.get(first)


def _given(ready: Prepared, name: str) -> bool:
    """Whether a file was there before the command, which may not change it."""
    return (ready.before / name).exists()


def _named(line: str, name: str) -> bool:
    """Whether a line names a file: whole, by its last part, or by the folder that it is in."""
    path = Path(name)
    return path.name in line or (len(path.parts) > 1 and str(path.parent) in line)


def _bring(module: str) -> None:
    with suppress(Exception):  # what came by another way than an import, or only once
        importlib.import_module(module)


@contextmanager
def quiet_threads() -> Iterator[None]:
    """One thread: a fork of a process with more would wait for those that it has not."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
