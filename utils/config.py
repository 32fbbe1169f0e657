"""A dataclass is the command line: each field is one flag, one YAML key, one type, one default and one line of help.

    @dataclass(frozen=True)
    class MatchConfig:
        syn_steps: int = option(8, "inner steps S on the learned set", low=1)

    @dataclass(frozen=True)
    class Distill:
        match: MatchConfig = section(MatchConfig)

    cfg, given = parse(Distill, "distill", argv, peers=(Buffer, Eval))

A verb's config is such sections side by side; the flags are flat (`--syn_steps 8`). Values are taken from, last wins:
defaults, `base` (what an input file recorded), the blocks `common` and `<verb>` of `--config FILE`, flags. What nobody
knows is an error that names the nearest known key. A section may define `check()`, which raises UserError for values
that cannot be, and `idle()`: option → what it would take for it to be read.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from utils.config_files import read_config
from utils.errors import UserError
from utils.parsing import is_utf8
from utils.registry import nearest

BLOCKS = ("common", "buffer", "distill", "eval")
SWITCHES = {
    "--debug": "show the traceback of an error",
    "--doctor": "say what is installed, what the machine has and what this command needs, and stop",
}
_TRUE, _FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def option(
    default: Any,
    help: str,
    *,
    aliases: Sequence[str] = (),
    choices: Sequence[str] | None = None,
    low: float | None = None,
    above: float | None = None,
    free: bool = False,
) -> Any:
    """A config field.

    aliases   further spellings, as in published commands (without the dashes in front; one letter has one)
    choices   the only values
    low       least value allowed; `above`: the value must be greater than this
    free      may differ between a run and its `--resume` (how long, how often; not what)
    """
    metadata = {
        "help": help,
        "aliases": tuple(aliases),
        "choices": choices,
        "low": low,
        "above": above,
        "free": free,
    }
    return dataclasses.field(default=default, metadata=metadata)


def with_default(default: Any, config: type, name: str) -> Any:
    """The config field `name` of another config class, with another default."""
    (known,) = (field for field in dataclasses.fields(config) if field.name == name)
    return dataclasses.field(default=default, metadata=known.metadata)


def section(kind: type) -> Any:
    """A field that holds another config; its options join the flat list of flags."""
    return dataclasses.field(default_factory=kind, metadata={"section": kind})


@dataclass(frozen=True)
class Option:
    """One field as the command line sees it."""

    name: str
    kind: Any
    default: Any
    path: tuple[str, ...]
    group: str
    help: str
    aliases: tuple[str, ...]
    choices: tuple[str, ...] | None
    low: float | None
    above: float | None
    free: bool

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)

    def read(self, value: Any, where: str) -> Any:
        """`value` (text, or what YAML made of it) as this option's type, checked; UserError names `where`."""
        try:
            result = _convert(value, self.kind)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{where} takes {_describe(self.kind)}, not '{_shown(value)}'") from None
        for item in result if isinstance(result, tuple) else (result,):
            self._check(item, where)
        return result

    def _check(self, item: Any, where: str) -> None:
        if isinstance(item, str) and ("\0" in item or not is_utf8(item)):
            raise UserError(f"{where} is '{_shown(item)}', which no UTF-8 file can hold; write it in UTF-8, no NUL")
        if self.choices is not None and item is not None and item not in self.choices:
            hint, known = nearest(str(item), self.choices), ", ".join(filter(None, self.choices))
            raise UserError(f"{where} does not know '{item}'{hint}; choose from {known}")
        if isinstance(item, (int, float)) and not isinstance(item, bool):
            if isinstance(item, float) and not math.isfinite(item):
                raise UserError(f"{where} takes a number, not {item}")
            if isinstance(item, int) and abs(item) >= 1 << 63:  # what tensors hold
                raise UserError(f"{where} takes a whole number below 2**63; write a smaller one")
            if self.low is not None and item < self.low:
                raise UserError(f"{where} is {item}; it must be at least {self.low}")
            if self.above is not None and item <= self.above:
                raise UserError(f"{where} is {item}; it must be greater than {self.above}")


def options_of(config: type, path: tuple[str, ...] = ()) -> dict[str, Option]:
    """Every option of a config class by name, sections opened, in order of definition."""
    hints = typing.get_type_hints(config)
    found: dict[str, Option] = {}
    for field in dataclasses.fields(config):
        here = (*path, field.name)
        if "section" in field.metadata:
            inner = options_of(field.metadata["section"], here)
            twice = found.keys() & inner.keys()
            assert not twice, f"{config.__name__} names {twice} twice"
            found |= inner
        else:
            group = path[-1] if path else "run"
            found[field.name] = Option(field.name, hints[field.name], field.default, here, group, **field.metadata)
    return found


def parse(
    config: type, verb: str, argv: Sequence[str], peers: Sequence[type] = (), base: dict[str, Any] | None = None
) -> tuple[Any, set[str]]:
    """The checked config of one command, and the names that YAML or a flag gave.

    peers   the other verbs' configs: their keys are accepted (and passed over) in the YAML block `common`
    base    values below the YAML file, such as those a distilled file recorded; names unknown here are passed over
    """
    options = options_of(config)
    flags = _parse_flags(options, verb, argv, config.__doc__ or "")
    values = {
        name: options[name].read(value, f"recorded {name}") for name, value in (base or {}).items() if name in options
    }
    file = flags.pop("config", None)
    given = _read_yaml(file, verb, options, peers) if file else {}
    for name, text in flags.items():
        given[name] = options[name].read(text, f"--{name}")
    values |= given
    cfg = _build(config, values)
    _check(cfg)
    return cfg, set(given)


def peek(argv: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """The values of a few flags, read (leniently) before it is known which config the rest belongs to; of several the
    first.

    Where `--config FILE` is given, its top level and its blocks count too, below the flags.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("config", *names):
        parser.add_argument(flag(name), default=None)
    if odd := [word for word in argv if word.startswith("-") and word.endswith("=--")]:
        raise UserError(f"{odd[0]} has no value that can be read; write another")  # argparse would read nothing
    try:
        found, _ = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    values = {name: value for name, value in vars(found).items() if value is not None}
    if "config" in values:
        tree = read_config(values["config"])
        for block in (tree, *(tree.get(name) or {} for name in BLOCKS)):
            if isinstance(block, dict):
                found = {name: block[name] for name in names if block.get(name) not in (None, [])}
                values = {name: str(v[0] if isinstance(v, list) else v) for name, v in found.items()} | values
    return values


def idle_options(cfg: Any, told: dict[str, str] | None = None) -> list[str]:
    """A line for each option that is not at its default and still does nothing, as `idle()` tells of its section, or of
    what holds that (`told`)."""
    told, lines = (told or {}) | getattr(cfg, "idle", dict)(), []
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if "section" in field.metadata:
            lines += idle_options(value, told)
        elif field.name in told and value != field.default:
            lines.append(f"--{field.name} {value} does nothing without {told[field.name]}")
    return lines


def flat(cfg: Any) -> dict[str, Any]:
    """A config as plain name → value, ready for YAML, JSON or a tensor file."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if "section" in field.metadata:
            plain |= flat(value)
        else:
            plain[field.name] = list(value) if isinstance(value, tuple) else value
    return plain


def differences(old: dict[str, Any], cfg: Any) -> list[str]:
    """`name: was → is` for each option that may not change between a run and its resumption, but did."""
    new = flat(cfg)
    return [
        f"{name} was {old[name]!r}, is {new[name]!r}"
        for name, known in options_of(type(cfg)).items()
        if not known.free and name in old and old[name] != new[name]
    ]


def dump(cfg: Any, verb: str, method: str) -> str:
    """The config as a YAML text that `--config` reads back."""
    return yaml.safe_dump({"method": method, verb: flat(cfg)}, sort_keys=False, allow_unicode=True)


def flag(name: str) -> str:
    """How a name is typed: `--ipc`, but `-n` where it is one letter."""
    return f"{'-' if len(name) == 1 else '--'}{name}"


def parse_bool(text: Any) -> bool:
    """true/false, 1/0, yes/no or on/off in any case; ValueError otherwise."""
    if isinstance(text, bool):
        return text
    if str(text).lower() in _TRUE:
        return True
    if str(text).lower() in _FALSE:
        return False
    raise ValueError(text)


def _convert(value: Any, kind: Any) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # `X | None`
        if value is None or str(value).lower() in ("none", "null"):
            return None
        (kind,) = (part for part in inner if part is not type(None))
        return _convert(value, kind)
    if value is None or isinstance(value, dict):
        raise ValueError(value)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else str(value).split(",")
        return tuple(_convert(part, inner[0]) for item in items for part in _split(item))
    if isinstance(value, list):
        raise ValueError(value)
    if kind is bool:
        return parse_bool(value)
    if kind is str:
        return str(value)
    if isinstance(value, bool):
        raise ValueError(value)
    if kind is int and isinstance(value, (str, float)):
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(value) if isinstance(value, str) and value.strip().lstrip("+-").isdigit() else int(number)
    return kind(value)


def _shown(value: Any) -> str:
    """A value as messages have it; of a long one, the beginning."""
    return f"{str(value)[:200]}{'...' if len(str(value)) > 200 else ''}"


def _split(item: Any) -> list[Any]:
    return [part.strip() for part in item.split(",") if part.strip()] if isinstance(item, str) else [item]


def _describe(kind: Any) -> str:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return " or ".join("none" if part is type(None) else _describe(part) for part in inner)
    if origin is tuple:
        return f"a list of values, each {_describe(inner[0])}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise UserError(message)


def _parse_flags(options: dict[str, Option], verb: str, argv: Sequence[str], about: str) -> dict[str, Any]:
    parser = _Parser(
        prog=f"{verb}.py",
        description=about,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with a row of a table; flags win over it")
    for name, about in SWITCHES.items():
        parser.add_argument(name, action="store_true", help=about)
    groups: dict[str, Any] = {}
    for known in options.values():
        group = groups.setdefault(known.group, parser.add_argument_group(known.group))
        many = typing.get_origin(known.kind) is tuple
        extra: dict[str, Any] = {"nargs": "+"} if many else {}
        if known.kind is bool:
            extra = {"nargs": "?", "const": "true"}
        choices = f" [{', '.join(known.choices)}]" if known.choices else ""
        default = ",".join(map(str, known.default)) if many else known.default
        group.add_argument(
            *(flag(name) for name in known.spellings),
            dest=known.name,
            metavar=known.name.upper(),
            help=f"{known.help}{choices} (default: {default})".replace("%", "%%"),
            **extra,
        )
    found, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].split("=")[0]
        spellings = [flag(name) for known in options.values() for name in known.spellings] + ["--config", *SWITCHES]
        if word.startswith("-"):
            raise UserError(f"unknown flag {word}{nearest(word, spellings)}; {verb}.py --help lists all")
        raise UserError(f"unexpected word '{unknown[0]}'; flags start with --")
    values = vars(found)
    for name in SWITCHES:  # command.py and errors.py look for them
        values.pop(name.removeprefix("--"), None)
    return values


def _read_yaml(file: str, verb: str, options: dict[str, Option], peers: Sequence[type]) -> dict[str, Any]:
    tree = read_config(file)
    for key in tree:
        if key not in ("method", *BLOCKS):
            raise UserError(f"config {file} has an unknown block '{key}'; blocks are method, {', '.join(BLOCKS)}")
    elsewhere = {name for peer in peers for known in options_of(peer).values() for name in known.spellings}
    by_spelling = {name: known for known in options.values() for name in known.spellings}
    values: dict[str, Any] = {}
    if "method" in tree and "method" in options:
        values["method"] = str(tree["method"])
    for block in ("common", verb):
        entries = tree.get(block) or {}
        if not isinstance(entries, dict):
            raise UserError(f"block '{block}' of {file} is not keys and values")
        for key, value in entries.items():
            if key in by_spelling:
                if any(other != key and by_spelling.get(other) is by_spelling[key] for other in entries):
                    raise UserError(f"{file}: '{key}' and another spelling of it are both in '{block}'; keep one")
                values[by_spelling[key].name] = by_spelling[key].read(value, f"{file}: {key}")
            elif block != "common" or key not in elsewhere:
                raise UserError(f"{file}: unknown key '{key}' in '{block}'{nearest(str(key), by_spelling)}")
    return values


def _build(config: type, values: dict[str, Any]) -> Any:
    parts = {}
    for field in dataclasses.fields(config):
        if "section" in field.metadata:
            parts[field.name] = _build(field.metadata["section"], values)
        elif field.name in values:
            parts[field.name] = values[field.name]
    return config(**parts)


def _check(cfg: Any) -> None:
    for field in dataclasses.fields(cfg):
        if "section" in field.metadata:
            _check(getattr(cfg, field.name))
    if hasattr(cfg, "check"):
        cfg.check()
