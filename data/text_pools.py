"""Sentences without images, from wherever they are: a TSV file, lines of text, JSON, a webdataset archive, or of the
toy world. Files of lines are indexed, not read: a corpus of gigabytes opens in seconds and stays on disk."""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data.byte_files import ByteFile, line_ends
from data.chain import Chain
from data.payloads import caption_in, caption_of
from data.tar_files import TarFile
from data.toy import shape_sentences
from data.tsv import TsvFile
from utils.errors import UserError
from utils.files import check_kept
from utils.parsing import parse_json


class TextPool(Chain):
    """Sentences of one or several places, end to end."""

    def text(self, row: int, chance: float = 0.0) -> str:
        """One sentence; where there are several of a row, `chance` in [0, 1) picks one. UserError for a row without."""
        shard, inner = self.find(row)
        try:
            return shard.text(inner, chance)
        except UnicodeDecodeError:
            raise UserError(f"{_place(shard, inner)} is not UTF-8; save the file again as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{_place(shard, inner)} is no caption: {error}; correct or remove it") from None


class TsvTexts:
    """Sentences of a TSV file."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, TsvFile(path, "TSV file of texts")
        self.key, self.raw, self.where = self.file.key, self.file.payload, self.file.where

    def __len__(self) -> int:
        return len(self.file)

    def text(self, row: int, chance: float) -> str:
        return caption_of(self.file.payload(row), chance)


class LineTexts:
    """A sentence a line; lines that are empty are none. The key is the sentence's number.

    read  what makes a caption of a line and of chance: in .jsonl files each is JSON
    """

    def __init__(self, path: Path, read: Callable[[bytes, float], str]) -> None:
        self.path, self.read = path, read
        self.file = ByteFile(path, "texts")
        ends = line_ends(self.file)
        if self.file.size > (ends[-1] if len(ends) else 0):
            ends = np.append(ends, self.file.size + 1)  # the last line's LF may be missing
        starts = np.insert(ends, 0, 0)[:-1]
        kept = np.flatnonzero(ends - 1 > starts)
        # A lone character may be the CR of an empty line.
        alone = [i for i in kept[(ends - starts)[kept] == 2].tolist() if not self.file.at(int(starts[i]), 1).strip()]
        self.lines = np.setdiff1d(kept, alone, assume_unique=True)
        self.starts, self.ends = starts[self.lines], ends[self.lines] - 1

    def __len__(self) -> int:
        return len(self.lines)

    def key(self, row: int) -> str:
        return str(row)

    def raw(self, row: int) -> bytes:
        start = int(self.starts[row])
        line = self.file.at(start, int(self.ends[row]) - start)
        return line.removeprefix(BOM_UTF8).removesuffix(b"\r")

    def where(self, row: int) -> str:
        return f"line {self.lines[row] + 1} of {self.path}"

    def text(self, row: int, chance: float) -> str:
        return self.read(self.raw(row), chance)


class ListTexts:
    """Sentences in memory: of a JSON list of texts or of objects with captions, or others. The key is the number."""

    def __init__(self, path: Path, items: list[Any]) -> None:
        self.path, self.items = path, items

    def __len__(self) -> int:
        return len(self.items)

    def key(self, row: int) -> str:
        return str(row)

    def raw(self, row: int) -> bytes:
        return json.dumps(self.items[row]).encode()

    def text(self, row: int, chance: float) -> str:
        return caption_in(self.items[row], chance)


class TarTexts:
    """Sentences of a webdataset archive: its .txt members."""

    def __init__(self, path: Path, cache: Path | str = "") -> None:
        self.path, self.file = path, TarFile(path, {"txt"}, "texts", cache)
        self.key, self.raw = self.file.key, self.file.raw

    def __len__(self) -> int:
        return len(self.file)

    def text(self, row: int, chance: float) -> str:
        return self.raw(row).decode().strip()


def drawn_texts(count: int) -> ListTexts:
    """`count` sentences of drawn shapes."""
    return ListTexts(Path("toy"), shape_sentences(count))


def open_text_shard(path: Path, cache: Path | str = "") -> Any:
    """The texts at a path, by its ending; UserError where it is none of KINDS.

    cache  folder where the places of an archive's members are remembered
    """
    check_kept(path, "texts")
    if path.suffix == ".tar":
        return TarTexts(path, cache)
    if path.suffix in KINDS:
        return KINDS[path.suffix](path)
    raise UserError(f"texts {path} do not end in {', '.join(KINDS)}; name such a file, or toy")


def _plain(line: bytes, chance: float) -> str:
    return line.decode()


def _json(line: bytes, chance: float) -> str:
    return caption_in(json.loads(line.decode()), chance)


def _list(path: Path) -> ListTexts:
    try:
        items = parse_json(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"no texts at {path}; correct the path") from None
    except ValueError as error:
        raise UserError(f"texts {path} are not valid JSON ({error}); correct them, or name lines .jsonl") from None
    if not isinstance(items, list):
        raise UserError(f"texts {path} are a JSON {type(items).__name__}, not a list; write a list of sentences")
    return ListTexts(path, items)


KINDS: dict[str, Callable[[Path], Any]] = {
    ".tsv": TsvTexts,
    ".txt": lambda path: LineTexts(path, _plain),
    ".json": _list,
    ".jsonl": lambda path: LineTexts(path, _json),
    ".tar": TarTexts,
}


def _place(shard: Any, row: int) -> str:
    return shard.where(row) if hasattr(shard, "where") else f"text {shard.key(row)} of {shard.path}"
