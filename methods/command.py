"""What the three scripts do alike: find the method, parse its config, call its verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from data import is_captioned, list_datasets
from methods import get_method
from utils.config import parse, peek
from utils.errors import UserError, run_main
from utils.registry import nearest


def command(verb: str, argv: Sequence[str] | None = None) -> int:
    """Run `buffer`, `distill` or `eval` with these arguments (None: the process's); the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    again = ("give the command again; nothing was written",) if verb == "eval" else ()
    return run_main(lambda words: _run(verb, words), argv, f"{verb}.py", *again)


def _run(verb: str, argv: Sequence[str]) -> None:
    method, early = get_method(method_name(argv)), peek(argv, ())
    configs = dict(method.CONFIGS)
    config = configs.pop(verb)
    base = method.recorded(argv) if verb == "eval" else {}
    if "config" in early:
        base["name"] = Path(early["config"]).stem
    cfg, _ = parse(config, verb, argv, peers=tuple(configs.values()), base=base)
    {"buffer": method.buffer, "distill": method.distill, "eval": method.evaluate}[verb](cfg)


def method_name(argv: Sequence[str]) -> str:
    """The method that a command names; without `--method` the data decides: captioned images are VLDD's."""
    early = peek(argv, ("method", "dataset"))
    if "method" in early:
        return early["method"]
    dataset = early.get("dataset", "flickr")
    if is_captioned(dataset):
        return "vldd"
    known = list_datasets()
    raise UserError(f"unknown dataset '{dataset}'{nearest(dataset, known)}; known: {', '.join(known)}")
