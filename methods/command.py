"""What the three scripts do alike: find the method, parse its config, call its verb."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data import is_captioned, is_labelled, list_datasets
from methods import get_method
from methods.core.results import noted_config
from methods.doctor import doctor
from utils.config import idle_options, parse, peek
from utils.config_files import quoted
from utils.devices import deterministic
from utils.errors import Elsewhere, UserError, run_main
from utils.locks import release
from utils.ranks import one_process, speaks
from utils.registry import nearest
from utils.stopping import terminable


def command(verb: str, argv: Sequence[str] | None = None) -> int:
    """Run `buffer`, `distill` or `eval` with these arguments (None: the process's); the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    again = ("give the command again",) if verb == "eval" else ()
    try:
        return run_main(terminable()(lambda words: _traced(verb, words)), argv, f"{verb}.py", *again)
    finally:
        release()


def _traced(verb: str, argv: Sequence[str]) -> None:
    """Run it; an error about what is not in the command itself names the file of options that has or lacks it."""
    try:
        _run(verb, argv)
    except UserError as error:
        with suppress(UserError, OSError):  # the file may be gone by now
            error.args = (f"{error}{_of_file(str(error), argv)}",)
        raise


def _of_file(said: str, argv: Sequence[str]) -> str:
    """What is to be said of `--config FILE`; nothing where there is none, or it is named already."""
    early = peek(argv, ("method",))
    file = early.get("config", "")
    if not file or file in said:
        return ""
    word = quoted(said, file)
    if word and not any(each == word or each.endswith(f"={word}") for each in argv):
        return f"; '{word}' is from {file}"
    return f"; {file} names no --method" if said.startswith("unknown flag") and "method" not in early else ""


def _run(verb: str, argv: Sequence[str]) -> None:
    name, early = method_name(argv), peek(argv, ())
    method = get_method(name)
    if verb not in getattr(method, "SHARED", ()):
        one_process(f"{verb}.py --method {name}")
    configs = dict(method.CONFIGS)
    config = configs.pop(verb)
    base = method.recorded(argv) if verb == "eval" else getattr(method, "preset", lambda words: {})(argv)
    if "config" in early:
        base["name"] = Path(early["config"]).stem
    try:
        cfg, _ = parse(config, verb, argv, peers=tuple(configs.values()), base=base)
    except UserError as error:
        if not speaks():  # all processes of a run have the same flags
            raise Elsewhere from error
        raise
    for line in idle_options(cfg) if speaks() else ():
        print(f"note: {line}")
    if "--doctor" in argv:
        doctor(verb, cfg)
        return
    with deterministic(cfg.run.deterministic):
        {"buffer": method.buffer, "distill": method.distill, "eval": method.evaluate}[verb](cfg)


def method_name(argv: Sequence[str]) -> str:
    """The method that a command names; without `--method` its data decides, or the distilled file that it judges.

    A distilled file notes its own. Else captioned images are VLDD's, labelled ones MTT's, and `folder` and `toy`, which
    can be either, are captioned.
    """
    early = peek(argv, ("method", "dataset", "distilled"))
    if "method" in early:
        return early["method"]
    dataset, noted = early.get("dataset", ""), noted_config(early.get("distilled", "")).get("method")
    if noted:
        return noted
    if not dataset or is_captioned(dataset):
        return "vldd"
    if is_labelled(dataset):
        return "mtt"
    known = list_datasets()
    raise UserError(f"unknown dataset '{dataset}'{nearest(dataset.lower(), known)}; known: {', '.join(known)}")
