"""JSON files that are larger than memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from utils.errors import UserError


def json_lists(path: Path | str, what: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Each key of a JSON file {key: [items]} with its items, in the order of the file, one item in memory at a time.

    Items are read while they are asked for, which must be before the next key is. UserError naming `what` for a file
    that is cut short or of another form; what comes before that place is told first.
    """
    with open(path, encoding="utf-8-sig") as file:
        yield from _Reader(file, f"{what} {path}").lists()


class _Reader:
    """Reads {key: [items]} from a text file of any length, holding no more of it than one item needs."""

    CHUNK = 1 << 20  # characters
    LIMIT = 1 << 28  # of one item: more is a file that lacks an end

    def __init__(self, file: TextIO, name: str) -> None:
        self.file, self.name = file, name
        self.text, self.at, self.before = "", 0, 0  # what is at hand, how much of it is taken, what was forgotten
        self.decoder = json.JSONDecoder()

    def lists(self) -> Iterator[tuple[str, Iterator[Any]]]:
        """Each key with its items; these are read while they are asked for, and must be before the next key."""
        sign = self._sign("{")
        if self._next() == "}":
            sign = self._sign("}")
        while sign != "}":
            key = self._value()
            if not isinstance(key, str):
                self._fail()
            self._sign(":")
            yield key, self._items()
            sign = self._sign(",}")
        if self._next():
            self._fail()

    def _items(self) -> Iterator[Any]:
        self._sign("[")
        if self._next() == "]":
            self._sign("]")
            return
        sign = ","
        while sign == ",":
            yield self._value()
            sign = self._sign(",]")

    def _sign(self, allowed: str) -> str:
        """The next character that is no white space, taken; it must be one of these."""
        sign = self._next()
        if not sign or sign not in allowed:
            self._fail()
        self.at += 1
        return sign

    def _next(self) -> str:
        """The next character that is no white space, not taken; empty at the end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def _value(self) -> Any:
        if not self._next():
            self._fail()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except RecursionError:
                self._fail()
            except json.JSONDecodeError as error:
                # At the end of what was read it may only be cut; a string is told where it begins.
                cut = error.pos > len(self.text) - 32 or error.msg.startswith("Unterminated")
                if not cut or not self._more():
                    self._fail()
                continue
            if end == len(self.text) and self._more():
                continue  # a number may go on
            self.at = end
            return value

    def _more(self) -> bool:
        """Read on; False at the end of the file. What was taken is forgotten."""
        rest = self.text[self.at :]
        if len(rest) > self.LIMIT:
            return False
        self.before += self.at
        try:
            new = self.file.read(max(self.CHUNK, len(rest)))
        except UnicodeDecodeError:
            self._fail()
        self.text, self.at = rest + new, 0
        return bool(new)

    def _fail(self) -> None:
        raise UserError(
            f"{self.name} is cut short or not JSON of the form {{name: [items]}} (at character "
            f"{self.before + self.at:,}); write or fetch it again"
        ) from None
