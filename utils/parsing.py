"""JSON and YAML from anybody: plain values, or one error for whatever is wrong with them; and the names of files that
are among these values."""

from __future__ import annotations

import json
import math
import os
from pathlib import PurePosixPath
from typing import Any

import yaml

_MOST = 1_000_000  # values that aliases may stand for, all in all
_DIGITS = 4300  # of one number: more take a time that grows with their square, and Python before 3.10.7 has no limit


class Malformed(ValueError, yaml.YAMLError):
    """What is wrong with a text, in one line."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Malformed for what is none: beside JSON's own rules, names must be unique in an object, numbers finite and of at
    most a few thousand digits, and nesting not too deep to be read.
    """
    try:
        return json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_finite, parse_int=_whole
        )
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except ValueError as error:
        raise Malformed(_said(error)) from None


def parse_yaml(text: str) -> Any:
    """The value of a YAML text: plain values only, whatever its tags ask for.

    Malformed for what is none, for names given twice in a mapping, for what holds itself, and for aliases that stand
    for a million values: a few lines of them would fill the memory of whoever goes through.
    """
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _weigh(node, {})
        return loader.construct_document(node)
    except RecursionError:
        raise Malformed("it is nested too deep") from None
    except (yaml.YAMLError, ValueError, OverflowError, TypeError, AttributeError) as error:
        raise Malformed(_said(error)) from None


def is_utf8(text: str) -> bool:
    """Whether a UTF-8 file can hold a text: JSON's escapes may spell halves of characters, of which nothing is made."""
    return not any("\ud800" <= sign <= "\udfff" for sign in text)


def is_name(name: str) -> bool:
    """Whether a file can have this path: one without NUL, that the system's bytes can spell."""
    try:
        return b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        return False


def is_below(name: str) -> bool:
    """Whether a path that a file names is below the folder it counts from: not absolute, without `..`, and one that a
    file can have.

    Links on the disk are followed all the same: they are of whoever unpacked the files there.
    """
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and is_name(name)


def is_plain(name: str) -> bool:
    """Whether a name from a file can be that of a file or folder of its own: of one part, neither `.` nor `..`."""
    return bool(name) and is_below(name) and name == PurePosixPath(name).name


def _weigh(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, with all that aliases repeat; 0 in `known` for one that is being weighed."""
    if id(node) in known:
        if not known[id(node)]:
            raise Malformed("it holds itself")
        return known[id(node)]
    known[id(node)] = 0
    if node.tag == "tag:yaml.org,2002:int":
        _count(node.value)
    parts = list(node.value) if isinstance(node, yaml.CollectionNode) else []
    if isinstance(node, yaml.MappingNode):
        _twice([key.value for key, _ in parts if isinstance(key, yaml.ScalarNode) and key.value != "<<"])
        parts = [part for pair in parts for part in pair]
    known[id(node)] = 1 + sum(_weigh(part, known) for part in parts)
    if known[id(node)] > _MOST:
        raise Malformed(f"it stands for more than {_MOST} values")
    return known[id(node)]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _twice([name for name, _ in pairs])
    return dict(pairs)


def _twice(names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise Malformed(f"it has the name '{next(name for name in names if names.count(name) > 1)[:60]}' twice")


def _refuse(word: str) -> float:
    raise Malformed(f"it has the number {word}")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise Malformed(f"it has the number {digits[:20]}")
    return value


def _whole(digits: str) -> int:
    _count(digits)
    return int(digits)


def _count(digits: str) -> None:
    if len(digits) > _DIGITS:
        raise Malformed("it has a number of too many digits")


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
