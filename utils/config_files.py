"""Files of options: what is in one, and whether a word is from it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.parsing import parse_yaml


def read_config(file: str) -> dict[str, Any]:
    """The keys and values of `--config FILE`; UserError where there are none."""
    try:
        tree = parse_yaml(Path(file).read_text(encoding="utf-8"))
    except FileNotFoundError:
        close = difflib.get_close_matches(file, [str(path) for path in Path("configs").rglob("*.yaml")], n=1)
        raise UserError(f"no config file {file}" + (f" (did you mean {close[0]}?)" if close else "")) from None
    except IsADirectoryError:
        raise UserError(f"config {file} is a folder; name a .yaml file in it") from None
    except ValueError as error:
        raise UserError(f"config {file} is not valid YAML ({error})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config {file} holds {type(tree).__name__}, not keys and values")
    return tree


def quoted(message: str, file: str) -> str:
    """The first of a file's words that a message quotes, or path that it names; "" for none."""
    words = _words(read_config(file))
    return next((word for word in words if f"'{word}'" in message or ("/" in word and word in message)), "")


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _words(item)
