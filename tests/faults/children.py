"""A command in a forked process, which may be killed, starved of disk or stripped of rights, and how it ended."""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from methods.core import teachers

NOBODY = 65534
PAGES = ("image_judging", "poster_judging", "prototype_judging", "poster_gallery", "dimefm", "clip_judging")
PAGES = (*PAGES, "pair_judging", "pair_gallery", "image_gallery", "prototype_gallery", "clip_gallery")


@dataclass(frozen=True)
class Ended:
    """How a command ended; `rc` is None for one that hung.

    moves    how many files it had moved into place
    modules  what it had imported
    """

    rc: int | None
    err: str
    wall: float
    moves: int = 0
    modules: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    """What befalls a process while it runs.

    after    kill it so many seconds after its start
    move     kill it when it moves its so-maniest file into place; `late`: just after
    signal   by this one; others than SIGKILL come only while it works, where its handlers are
    room     from `since` seconds on no file of it may grow beyond so many bytes
    meek     it runs as nobody, whom rights hold back
    """

    after: float | None = None
    move: int = 0
    late: bool = False
    signal: int = signal.SIGKILL
    room: int | None = None
    since: float = 0.0
    meek: bool = False


UNDISTURBED = Fault()


def run(work: Callable[[], int], folder: Path, fault: Fault = UNDISTURBED, limit: float = 120) -> Ended:
    """Call `work()` in a fork that stands in `folder`; killed and told as hung after `limit` seconds."""
    said, told, began = os.pipe(), os.pipe(), time.monotonic()
    if (child := os.fork()) == 0:
        _live(work, folder, fault, said, told)
    os.close(said[1])
    os.close(told[1])
    for pipe in (said[0], told[0]):
        os.set_blocking(pipe, False)
    text, moves, status, starved, late, struck = b"", b"", None, fault.room is None, False, fault.after is None
    while status is None:
        time.sleep(0.005)
        text, moves = text + _read(said[0]), moves + _read(told[0])
        wall = time.monotonic() - began
        if not starved and wall >= fault.since:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.prlimit(child, resource.RLIMIT_FSIZE, (fault.room, hard))
            starved = True
        late = wall > limit
        if late:
            os.kill(child, signal.SIGKILL)
        elif not struck and wall >= fault.after and moves:
            os.kill(child, fault.signal)
            struck = True
        done, found = os.waitpid(child, 0 if late else os.WNOHANG)
        status = found if done else None
    text, moves = text + _read(said[0]), moves + _read(told[0])
    os.close(said[0])
    os.close(told[0])
    note = _note(moves)
    err = text.decode(errors="replace")
    code = None if late else os.waitstatus_to_exitcode(status)
    return Ended(code, err, time.monotonic() - began, note.get("moves", 0), note.get("modules", []))


def _read(pipe: int) -> bytes:
    found = b""
    while True:
        try:
            part = os.read(pipe, 1 << 16)
        except BlockingIOError:
            return found
        if not part:
            return found
        found += part


def _note(told: bytes) -> dict[str, Any]:
    """What a child told of itself at its end; nothing, if it was killed before, or amid it."""
    try:
        return json.loads(told)
    except ValueError:
        return {}


def _live(work: Callable[[], int], folder: Path, fault: Fault, said: tuple[int, int], told: tuple[int, int]) -> None:
    """The child's whole life: nothing of the parent's may happen twice."""
    code, moves = 1, [0]
    try:
        gc.freeze()
        os.close(said[0])
        os.close(told[0])
        os.chdir(folder)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(said[1], 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
        tqdm.set_lock(threading.RLock())
        if fault.meek and os.geteuid() == 0:
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        with pytest.MonkeyPatch.context() as patch:
            _spare(patch)
            _count(patch, moves, fault)
            os.write(told[1], b" ")  # it works from now on
            code = work()
            _deaf()
    except BaseException:
        traceback.print_exc()
    finally:
        with os.fdopen(told[1], "wb") as pipe:
            pipe.write(json.dumps({"moves": moves[0], "modules": sorted(sys.modules)}).encode())
        os._exit(code)


def _deaf() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _spare(patch: pytest.MonkeyPatch) -> None:
    """No pages: nothing is read from them, and their charts take most of the time. States are kept at each occasion."""
    for name in PAGES:
        module = importlib.import_module(f"methods.{name}")
        for drawn in ("refresh_page", "write_report"):
            if hasattr(module, drawn):
                patch.setattr(module, drawn, lambda *args: None)
    patch.setattr(teachers, "SAVE_EVERY", -1.0)


def _count(patch: pytest.MonkeyPatch, moves: list[int], fault: Fault) -> None:
    """Count files moved into place, and die at one of them."""
    real, lock = os.replace, threading.Lock()

    def replace(source: object, target: object, **options: object) -> None:
        with lock:
            moves[0] += 1
            last = moves[0] == fault.move
        if last and not fault.late:
            os.kill(os.getpid(), fault.signal)
        real(source, target, **options)
        if last and fault.late:
            os.kill(os.getpid(), fault.signal)

    patch.setattr(os, "replace", replace)
