"""What is installed, and what the machine has."""

from __future__ import annotations

import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path

import torch

REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
OPTIONAL = {"tensorboard": "--tensorboard", "wandb": "--wandb", "clip-benchmark": "words of ELEVATER's sets"}
GIB = 2**30


def versions() -> tuple[list[str], list[str]]:
    """The packages of requirements.txt with their versions, and what is wrong with them."""
    found, wrong = [], []
    lines = REQUIREMENTS.read_text(encoding="utf-8").splitlines() if REQUIREMENTS.is_file() else []
    for line in lines:
        if asked := re.fullmatch(r"([a-z0-9-]+)(\S*)", line):
            name, bounds = asked.groups()
            try:
                version = metadata.version(name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{name} is not installed; pip install '{line}'")
                continue
            found.append(f"{name} {version}")
            if not _within(version, bounds):
                wrong.append(f"{name} {version} is not {bounds}; pip install '{line}'")
    return found, wrong


def optional() -> list[str]:
    """Packages that only a flag asks for, and are not there."""
    there = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    return [f"{name} ({use})" for name, use in OPTIONAL.items() if name not in there]


def devices() -> list[str]:
    """A line each: the processor, and every GPU."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    lines = [f"cpu: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {memory:.0f} GiB"]
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        lines.append(f"cuda:{number}: {about.name}, {about.total_memory / GIB:.0f} GiB, {about.major}.{about.minor}")
    return lines + ["mps: there"] * torch.backends.mps.is_available()


def compiler() -> str | None:
    """The C++ compiler that --compile needs on a CPU."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def free_bytes(path: Path | str) -> int:
    """Room on the disk of a path, of which parts may not be there yet."""
    place = Path(path).absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def _within(version: str, bounds: str) -> bool:
    """Whether a version is within bounds such as `>=2.8,<3`."""
    ours = _numbers(version)
    for sign, bound in re.findall(r"(>=|<|==)([0-9.]+)", bounds):
        theirs = _numbers(bound)
        fits = {">=": ours >= theirs, "<": ours[: len(theirs)] < theirs, "==": ours == theirs}
        if not fits[sign]:
            return False
    return True


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.match(r"[0-9.]*", version)[0].split(".") if part]
