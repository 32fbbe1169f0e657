"""The two ways a command can fail, and the one place that turns them into an exit code."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Sequence

from utils.progress import close_bars

# Where libraries begin to advise ways that would run whatever is in a file.
_ADVICE = (" If you trust", " In PyTorch 2.6", " Re-running", " (1) ")


def first_line(error: BaseException) -> str:
    """The first line of an error's text, for quoting in another, without advice to trust a file."""
    text = next(iter(str(error).strip().splitlines()), type(error).__name__)
    for words in _ADVICE:
        text = text.split(words)[0]
    return text


class UserError(Exception):
    """The user can mend it: what is wrong, the value, what to do. Exit code 2."""


class RunError(Exception):
    """The computation itself failed: the step, and the last good state. Exit code 1."""


class Lost(RunError):
    """Another process of the run is gone, whatever this one was at. Exit code 1."""


class Elsewhere(RunError):
    """One of several processes ends because another one failed, and that one tells why. Exit code 1."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the command. Exit code 128 + its number: 130 for SIGINT, 143 for SIGTERM."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = int(number)


# A full, read-only or forbidden disk is the user's to mend; any other OSError is told as it is.
_DISK = {
    errno.ENOSPC: "the disk is full; free some room or choose another folder",
    errno.EDQUOT: "the disk quota is used up; free some room or choose another folder",
    errno.EFBIG: "the file is larger than this disk or limit allows; choose another folder",
    errno.EROFS: "the disk is read-only; choose another folder",
    errno.EACCES: "no permission; choose another folder or change its rights",
    errno.ENOTDIR: "a part of this path is a file, not a folder; choose another",
    errno.EEXIST: "this is a file, not a folder; choose another",
    errno.EPERM: "not permitted; choose another folder or change its rights",
}
_LONGEST = 3000  # characters of a message


def run_main(
    main: Callable[[Sequence[str]], None],
    argv: Sequence[str],
    prog: str,
    remedy: str = "--resume goes on from the last checkpoint",
) -> int:
    """Call `main(argv)`; its exit code: 0, 2 for a user's mistake, 1 for a failed computation, 130 when interrupted (by
    SIGTERM: 143).

    remedy   what to do after an interruption

    A failure is one line on standard error; `--debug` among the arguments adds the traceback.
    """
    try:
        main(argv)
        sys.stdout.flush()
        return 0
    except Exception as error:
        full = _out_of_memory(error)
        if not full and not isinstance(error, (UserError, RunError, OSError)):
            raise
        close_bars()
        if "--debug" in argv:
            traceback.print_exc()
        if not isinstance(error, Elsewhere):
            print(f"{prog}: error: {_one_line(error)}{full}", file=sys.stderr)
        return 1 if full or isinstance(error, RunError) else 2
    except KeyboardInterrupt as error:
        close_bars()
        print(f"{prog}: interrupted; {remedy}", file=sys.stderr)
        return 128 + error.number if isinstance(error, Interrupted) else 130


def _out_of_memory(error: Exception) -> str:
    """What to do about it, where memory ran out; torch says so in a RuntimeError of its own (which is not imported here
    for its name)."""
    full = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if full or "can't allocate memory" in str(error):
        return "; memory ran out: use smaller batches, images or networks"
    return ""


def _one_line(error: BaseException) -> str:
    if isinstance(error, BrokenPipeError):
        # Whoever read our output left; a second failure at shutdown would add a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return "the reader of this command's output closed it"
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return _printable(" ".join((where + _DISK.get(error.errno, error.strerror or str(error))).split()))
    return _printable(" ".join(str(error).split()))


def _printable(text: str) -> str:
    """A text whose control characters, which could command a terminal, and lone surrogates are spelt out; of a very
    long one, the beginning and the end, where the remedy is."""
    text = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
