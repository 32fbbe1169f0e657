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
    early = peek(argv, ("method", "dataset"))
    method = get_method(early.get("method") or _method_for(early.get("dataset")))
    configs = dict(method.CONFIGS)
    config = configs.pop(verb)
    base = method.recorded(argv) if verb == "eval" else {}
    if "config" in early:
        base["name"] = Path(early["config"]).stem
    cfg, _ = parse(config, verb, argv, peers=tuple(configs.values()), base=base)
    {"buffer": method.buffer, "distill": method.distill, "eval": method.evaluate}[verb](cfg)


def _method_for(dataset: str | None) -> str:
    """Without `--method` the data decides: captioned images are VLDD's."""
    if dataset is None or is_captioned(dataset):
        return "vldd"
    raise UserError(
        f"unknown dataset '{dataset}'{nearest(dataset, list_datasets())}; known: {', '.join(list_datasets())}"
    )
