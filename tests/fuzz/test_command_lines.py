"""Command lines of all verbs and methods: random flags and values, well formed or not, with and without `--config`.

The verbs themselves are replaced by one that notes the config it got, so that it is parsing, checking and the choice of
method that a case goes through.
"""

from __future__ import annotations

import contextlib
import io
import math
from typing import Any

import yaml
from hypothesis import strategies as st

from methods import METHODS, get_method
from methods.command import command
from tests.fuzz.cases import fuzz, numbers, one_line, texts, trees, whole
from utils.config import Option, dump, flag, flat, options_of, parse, parse_bool

VERBS = {"buffer": "buffer", "distill": "distill", "eval": "evaluate"}
OPTIONS = {
    (method, verb): options_of(get_method(method).CONFIGS[verb]) for method in METHODS for verb in VERBS
}  # fmt: skip
# Bytes of a command line that are not UTF-8 arrive as lone surrogates; NUL cannot arrive.
words = st.one_of(texts, st.text(max_size=6), st.sampled_from(["\udcff", "a\udc80"])).filter(
    lambda word: "\0" not in word
)
switches = st.sampled_from(["true", "false", "YES", "0", "maybe", "1.0", ""])


def _numeral(value: Any) -> str:
    return repr(value) if abs(value) < 1e300 or isinstance(value, float) else "1" + "0" * 400


def values_of(known: Option) -> st.SearchStrategy:
    """Words for one option: likely ones of its kind, and any."""
    numerals = numbers.map(_numeral)
    likely = st.one_of(whole.map(_numeral), numerals, switches, st.just(str(known.default)))
    if known.choices:
        likely = st.sampled_from([str(choice) for choice in known.choices])
    return st.one_of(likely, likely, likely, words)


@st.composite
def flags(draw: st.DrawFn, options: dict[str, Option]) -> list[str]:
    """One flag with its value or values, in one of the ways of writing it, or what only looks like a flag."""
    known = options[draw(st.sampled_from(sorted(options)))]
    name = flag(draw(st.sampled_from(known.spellings)))
    given = draw(st.lists(values_of(known), min_size=1, max_size=1 if draw(st.booleans()) else 3))
    odd = draw(st.integers(0, 30))
    if odd == 0:
        return [draw(words)]
    if odd == 1:
        return ["--" + draw(words), *given]
    if odd == 2:
        return [name]
    if odd == 3:
        return [name[:-1], *given]
    if odd < 15 and name.startswith("--"):
        return [f"{name}={given[0]}"]
    return [name, *given]


@st.composite
def command_lines(draw: st.DrawFn) -> tuple[str, str, list[str]]:
    """A verb, a method, and words behind them."""
    verb, method = draw(st.sampled_from(sorted(VERBS))), draw(st.sampled_from(sorted(METHODS)))
    groups = draw(st.lists(flags(OPTIONS[method, verb]), max_size=4))
    front = ["--method", method] if draw(st.integers(0, 9)) else []
    return verb, method, [*front, *(word for group in groups for word in group)]


@st.composite
def config_files(draw: st.DrawFn) -> tuple[str, str, list[str], bytes]:
    """A verb, a method, flags, and a YAML file: of known keys with any values, or of anything."""
    verb, method, argv = draw(command_lines())
    options = OPTIONS[method, verb]

    def entries() -> dict[Any, Any]:
        names = draw(st.lists(st.sampled_from(sorted(options)), max_size=3, unique=True))
        return {name: draw(st.one_of(values_of(options[name]), trees, trees)) for name in names}

    tree: Any = {"method": method, "common": entries(), verb: entries()}
    odd = draw(st.integers(0, 12))
    if odd == 0:
        tree = draw(trees)
    elif odd == 1:
        tree[draw(texts)] = draw(trees)
    elif odd == 2:
        tree["common"] = draw(trees)
    elif odd == 3:
        tree[verb][draw(texts)] = draw(trees)
    elif odd == 4:
        tree["method"] = draw(trees)
    content = yaml.safe_dump(tree, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 5)) == 0:
        place = draw(st.integers(0, len(content)))
        content = content[:place] + draw(st.sampled_from(ODD_YAML)) + content[place:]
    return verb, method, argv, content


ODD_YAML = [
    *(b"\t", b"\0", b"\xff", b": ", b"&a *a", b"&a [*a]", b"[", b"{", b"- ", b"|\n", b"\n---\n", b"? ", b"%YAML 9\n"),
    *(b"2026-13-45", b"2026-01-01", b"!!binary aa=", b"!!python/object:os.system x", b"!!set {a}", b"!!int x"),
    *(b"1" * 5000, b"[" * 3000, b"0o9", b"1:90:1", b"!!float x", b"!!timestamp x", b"<<: *a", b"&a {<<: [*a]}"),
    b"&a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b]\n"
    b"d: &d [*c,*c,*c,*c,*c,*c,*c,*c]\ne: &e [*d,*d,*d,*d,*d,*d,*d,*d]\ncommon: {ipc: [*e,*e,*e,*e,*e,*e,*e,*e]}\n",
]


def run(verb: str, argv: list[str]) -> tuple[int, list[Any]]:
    """The exit code of a command whose verb does nothing, and the config that came to it."""
    seen: list[Any] = []
    modules = [get_method(name) for name in METHODS]
    kept = [getattr(module, VERBS[verb]) for module in modules]
    out, err = (
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=how, write_through=True)
        for how in ("strict", "backslashreplace")
    )
    try:
        for module in modules:
            setattr(module, VERBS[verb], seen.append)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                rc = command(verb, argv)
            except SystemExit as ended:  # --help
                assert ended.code in (None, 0), ended.code
                return 0, []
    finally:
        for module, own in zip(modules, kept, strict=True):
            setattr(module, VERBS[verb], own)
    one_line(rc, err.buffer.getvalue().decode(), f"{verb}.py")
    assert len(seen) == (rc == 0)
    return rc, seen


def same(known: Option, value: Any, text: str) -> bool:
    """Whether an option's value is what its word says."""
    if value is None:
        return text.lower() in ("none", "null")
    if isinstance(value, bool):
        return value == parse_bool(text)
    if isinstance(value, int):
        return value == (int(text) if text.strip().lstrip("+-").isdigit() else float(text))
    return math.isclose(value, float(text)) if isinstance(value, float) else value == text


def check_kept(verb: str, method: str, cfg: Any) -> None:
    """A config that was accepted says the same when its config.yaml is read."""
    with open("kept.yaml", "w", encoding="utf-8") as file:
        file.write(dump(cfg, verb, cfg.method))
    config = get_method(cfg.method).CONFIGS[verb]
    again, _ = parse(config, verb, ["--config", "kept.yaml"])
    assert flat(again) == flat(cfg)


@fuzz(4000, 80, line=command_lines())
def test_command_lines(scratch, line) -> None:
    """Any command line is taken as it says, or refused in one line."""
    verb, method, argv = line
    rc, seen = run(verb, argv)
    if not rc and seen:
        check_kept(verb, method, seen[0])


@st.composite
def plain_lines(draw: st.DrawFn) -> tuple[str, str, dict[str, str]]:
    """A verb, a method, and options with one word each, written `--name=word`."""
    verb, method = draw(st.sampled_from(sorted(VERBS))), draw(st.sampled_from(sorted(METHODS)))
    options = OPTIONS[method, verb]
    single = sorted(name for name, known in options.items() if "tuple" not in str(known.kind) and name != "method")
    names = draw(st.lists(st.sampled_from(single), min_size=1, max_size=2, unique=True))
    return verb, method, {name: draw(values_of(options[name])) for name in names}


@fuzz(2000, 40, line=plain_lines())
def test_values_are_what_was_typed(scratch, line) -> None:
    """An option that is accepted has the value that its word says."""
    verb, method, given = line
    _, seen = run(verb, ["--method", method, *(f"--{name}={word}" for name, word in given.items())])
    for name, word in given.items() if seen else ():
        known = OPTIONS[method, verb][name]
        assert same(known, flat(seen[0])[name], word), (name, word, flat(seen[0])[name])


@fuzz(2500, 50, drawn=config_files())
def test_config_files(scratch, drawn) -> None:
    """Any YAML behind `--config` is taken, or refused in one line."""
    verb, method, argv, content = drawn
    (scratch / "row.yaml").write_bytes(content)
    rc, seen = run(verb, [*argv, "--config", "row.yaml"])
    if not rc and seen:
        check_kept(verb, method, seen[0])
