"""TSV files with an index, as DIME-FM's data are packed, to the byte.

`X.tsv` has a record a line: key, TAB, payload, LF; no header, no quoting. `X.lineidx` has the byte offset of each
record, a decimal a line. `X.linelist`, where there is one, has the numbers of the records to keep, which are read
sorted; one that occurs twice is two rows. Payloads of images are base64 of the encoded file, those of features base64
of float32 numbers, low byte first, those of texts JSON or the bare caption.

The index is kept in memory, eight bytes a record, and a record is one `os.pread`. Files are bytes here: only LF ends a
record, and a text is decoded a field at a time. The published reader opens files as text, where a lone CR splits a
record, and its writer's offsets count characters, so that one "é" shifts all that follow; offsets are therefore never
believed unseen: each must follow an LF.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.byte_files import CR, LF, TAB, ByteFile, line_ends
from utils.errors import UserError
from utils.files import atomic
from utils.rng import generator

_SAMPLE = 64  # records looked at when a file is opened, besides the first and the last
_KEY = 256  # bytes read for a key, before all of a record is


class TsvFile:
    """A TSV file's records, by row from 0.

    path  X.tsv; X.lineidx and X.linelist are looked for beside it, and without an index the file is read through once
    what  the name of such a file in messages

    UserError where the file is missing, truncated or was changed by a text-mode transfer, or the index is another's.
    The offsets of some records are tried at once, those of all by `check`.
    """

    def __init__(self, path: Path | str, what: str = "TSV file") -> None:
        self.path, self.what = Path(path), what
        self.file = ByteFile(path, what)
        self.index = self.path.with_suffix(".lineidx")
        self._bounds = self._read_index() if self.index.is_file() else self._make_index()
        self._try(self._some_bounds())
        self._try_last()
        self._lines = self._read_list(self.path.with_suffix(".linelist"))

    def __len__(self) -> int:
        return len(self._bounds) - 1 if self._lines is None else len(self._lines)

    def key(self, row: int) -> str:
        """The first field. Of a long record only the beginning is read."""
        start, end = self._span(row)
        head = self._from(start, min(_KEY, end - start))
        tab = head.find(b"\t")
        return self._text(row, head[:tab] if tab >= 0 else self._two(row)[0])

    def keys(self, rows: Iterable[int]) -> list[str]:
        """The first fields of these rows."""
        return [self.key(row) for row in rows]

    def payload(self, row: int) -> bytes:
        """The second field of two."""
        return self._two(row)[1]

    def pair(self, row: int) -> tuple[str, bytes]:
        """Key and payload, by one reading."""
        key, payload = self._two(row)
        return self._text(row, key), payload

    def record(self, row: int) -> tuple[bytes, ...]:
        """All fields of a record."""
        start, end = self._span(row)
        line = self._from(start, end - start)
        if line[-1] != LF or line.find(b"\n") != len(line) - 1:
            raise self._misfit(start)
        if line[-2:] == b"\r\n":
            raise self._carriage_returns()
        return tuple(line[:-1].split(b"\t"))

    def where(self, row: int) -> str:
        """How messages call a record, lines counted from 1."""
        return f"line {self._line(row) + 1} of {self.path}"

    def check(self) -> None:
        """Go through the whole file: every record where the index has it, with two fields, none ending in CR LF.

        UserError for the first that is not.
        """
        line, tabs, before, offset = 0, 0, 0, 0
        for block in self.file.blocks():
            ends = np.flatnonzero(block == LF)
            known = self._bounds[line + 1 : line + 1 + len(ends)]
            wrong = np.flatnonzero(known != ends[: len(known)] + offset + 1)
            if len(wrong) or len(known) < len(ends):
                raise self._misfit(int(known[wrong[0]]) if len(wrong) else int(ends[len(known)]) + offset + 1)
            if (block[ends[ends > 0] - 1] == CR).any() or (before == CR and block[0] == LF):
                raise self._carriage_returns()
            # TABs before each LF, less those before the one in front of it.
            found = np.searchsorted(np.flatnonzero(block == TAB), ends)
            fields = np.diff(found, prepend=0) + 1
            fields[:1] += tabs
            if (fields != 2).any():
                bad = int(np.flatnonzero(fields != 2)[0])
                raise self._fields(line + bad, int(fields[bad]))
            tabs = int((block == TAB).sum()) - (int(found[-1]) if len(ends) else -tabs)
            line, before, offset = line + len(ends), block[-1], offset + len(block)
        if line != len(self._bounds) - 1:
            raise self._misfit(int(self._bounds[line + 1]))

    def _from(self, start: int, length: int) -> bytes:
        """`length` bytes of a record's beginning, which must be one."""
        if not start:
            return self.file.at(0, length)
        content = self.file.at(start - 1, length + 1)
        if content[0] != LF:
            raise self._misfit(start)
        return content[1:]

    def _line(self, row: int) -> int:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)} in {self.path}")
        return row if self._lines is None else int(self._lines[row])

    def _span(self, row: int) -> tuple[int, int]:
        line = self._line(row)
        return int(self._bounds[line]), int(self._bounds[line + 1])

    def _two(self, row: int) -> tuple[bytes, ...]:
        fields = self.record(row)
        if len(fields) != 2:
            raise self._fields(self._line(row), len(fields))
        return fields

    def _text(self, row: int, field: bytes) -> str:
        try:
            return field.decode()
        except UnicodeDecodeError:
            raise UserError(f"the key in {self.where(row)} is not UTF-8; pack the file again") from None

    def _read_index(self) -> np.ndarray:
        """Where records begin, and the size: (n + 1,) int64."""
        starts = _numbers(self.index, "offsets", "; remove it, and the offsets are found by reading the TSV file")
        if len(starts) and starts[-1] >= self.file.size:
            raise UserError(
                f"{self.what} {self.path} is truncated: it has {self.file.size} bytes, "
                f"and {self.index.name} knows a record at {starts[-1]}; fetch both again"
            )
        bounds = np.append(starts, self.file.size)
        if bounds[0] != 0 or (np.diff(bounds) <= 0).any():
            raise self._misfit(int(bounds[0] if bounds[0] else bounds[1:][np.diff(bounds) <= 0][0]))
        return bounds

    def _make_index(self) -> np.ndarray:
        ends = line_ends(self.file)
        if self.file.size > (ends[-1] if len(ends) else 0):
            raise self._truncated()
        return np.insert(ends, 0, 0)

    def _read_list(self, path: Path) -> np.ndarray | None:
        if not path.is_file():
            return None
        lines = np.sort(_numbers(path, "record numbers", "; mend or remove it"))
        if len(lines) and lines[-1] >= len(self._bounds) - 1:
            raise UserError(
                f"{path} keeps record {lines[-1]} of {self.path.name}, which has {len(self._bounds) - 1}, "
                "counted from 0; mend or remove the list"
            )
        return lines

    def _some_bounds(self) -> Iterable[int]:
        """Ends of the first record, of the last and of some between."""
        count = len(self._bounds) - 1
        if not count:
            return []
        some = torch.randint(count, (min(_SAMPLE, count),), generator=generator(0, "tsv", count)) + 1
        return self._bounds[sorted({1, count, *some.tolist()})].tolist()

    def _try(self, bounds: Iterable[int]) -> None:
        for bound in bounds:
            tail = self.file.at(max(0, bound - 2), min(2, bound))
            if tail == b"\r\n":
                raise self._carriage_returns()
            if tail[-1] != LF:
                raise self._truncated() if bound == self.file.size else self._misfit(bound)

    def _try_last(self) -> None:
        """The last record that the index knows must be the file's last."""
        start = int(self._bounds[-2]) if len(self._bounds) > 1 else 0
        offset = start
        for block in self.file.blocks(start):
            found = np.flatnonzero(block == LF)
            offset += int(found[0]) + 1 if len(found) else len(block)
            if len(found):
                break
        if offset != self.file.size:
            raise self._misfit(start)

    def _truncated(self) -> UserError:
        return UserError(f"{self.what} {self.path} is truncated: its last record has no end; fetch it again")

    def _carriage_returns(self) -> UserError:
        return UserError(
            f"{self.what} {self.path} has lines that end in CR LF: it was transferred or saved as a text, "
            "which moves every record; fetch it again, as binary data"
        )

    def _misfit(self, offset: int) -> UserError:
        # A file whose line ends were changed misses its offsets too; the ends are what to tell of.
        first = self.file.at(0, min(self.file.size, 1 << 20)).split(b"\n", 1)
        if len(first) > 1 and first[0].endswith(b"\r"):
            return self._carriage_returns()
        return UserError(
            f"{self.index} does not fit {self.path.name}: no record is whole from byte {offset} on; "
            "remove it, and the offsets are found by reading the TSV file"
        )

    def _fields(self, line: int, count: int) -> UserError:
        return UserError(
            f"line {line + 1} of {self.path} has {count} field{'s' * (count != 1)}; a record is a key, a TAB and a "
            "payload: pack the file again"
        )


class TsvWriter:
    """Writes X.tsv and X.lineidx, both whole or not at all.

    with TsvWriter("texts.tsv") as writer:
        writer.add("t0", json.dumps({"captions": ["a cat"]}))
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.index = self.path.with_suffix(".lineidx")
        if self.index == self.path:
            raise UserError(f"{path} is the name of an index; end the name of a TSV file in .tsv")
        self._stack, self._offset = ExitStack(), 0

    def __enter__(self) -> TsvWriter:
        with ExitStack() as stack:
            # Left in reverse: the TSV file is moved first. Between the two moves it has no index, which can be found.
            paths = [stack.enter_context(atomic(path)) for path in (self.index, self.path)]
            stack.push(self._drop_old_index)
            self._offsets, self._records = (stack.enter_context(open(path, "wb", 1 << 20)) for path in paths)
            self._stack = stack.pop_all()
        return self

    def add(self, key: str, payload: bytes | str) -> None:
        """One record; UserError for a TAB, CR or LF in it."""
        line = record(key, payload, self.path)
        self._records.write(line)
        self._offsets.write(b"%d\n" % self._offset)
        self._offset += len(line)

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _drop_old_index(self, kind: type | None, *_: Any) -> None:
        if kind is None:
            self.index.unlink(missing_ok=True)


def record(key: str, payload: bytes | str, path: Path | str) -> bytes:
    """A line of a TSV file, for `path`; UserError for a TAB, CR or LF in its fields."""
    fields = key.encode(), payload.encode() if isinstance(payload, str) else payload
    for field in fields:
        if b"\t" in field or b"\n" in field or b"\r" in field:
            shown = field[:40].decode(errors="replace")
            raise UserError(f"{path} cannot hold {shown!r}: a field of a TSV file has no TAB, CR or LF; replace them")
    return b"\t".join(fields) + b"\n"


def _numbers(path: Path, what: str, remedy: str) -> np.ndarray:
    """Whole numbers from 0, a line each, (n,) int64."""
    content = path.read_bytes()
    if content.translate(None, b"0123456789\n"):
        raise UserError(f"{path} is not a list of {what}, a line each{remedy}")
    return np.fromstring(content, dtype=np.int64, sep="\n") if content.strip() else np.empty(0, dtype=np.int64)
