"""One progress bar for the whole toolkit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """As tqdm's, but one that a signal left half made ends without a word."""

    def close(self) -> None:
        with suppress(AttributeError):
            super().close()


def progress(items: Iterable[Any] | None = None, what: str = "", **options: Any) -> Bar:
    """A progress bar on standard error, named `what`; in a log file (no terminal) it speaks once every half minute.

    Of the processes that torchrun starts the first one shows its bars.
    """
    patience = 0.1 if sys.stderr.isatty() else 30.0
    if os.environ.get("RANK", "0") != "0":
        options["disable"] = True
    return Bar(items, desc=what, file=sys.stderr, dynamic_ncols=True, mininterval=patience, **options)


def close_bars() -> None:
    """End every open bar, so that what is printed next has a line of its own."""
    for bar in list(getattr(Bar, "_instances", ())):
        bar.close()
