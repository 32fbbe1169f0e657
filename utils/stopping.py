"""SIGINT and SIGTERM: loops that keep a state end where they can go on, all else ends at once.

with stoppable(run.ranks) as stop:
    for step in steps:
        ...                                # a first signal waits here, a second one ends the command at once
        if stop.asked:
            save()
            stop.end()                     # exit code 130, or 143 for SIGTERM
"""

from __future__ import annotations

import _weakrefset
import os
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from utils.errors import Interrupted
from utils.ranks import ALONE, Ranks

_LATER = 0.01  # seconds until a signal that could not be heard comes again
_FINALIZERS = (weakref.__file__, _weakrefset.__file__)
_ECHO = 1.0  # seconds in which a launcher passes on a signal that its processes had from the terminal, too


class Stop:
    """Whether a loop has been told to end, and by which signal."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self._number, self._since = ranks, 0, 0.0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether to end now. Several processes must ask at the same places, and are told the same: as soon as one of
        them has had a signal, all end."""
        self._number = self.ranks.most(self._number)
        return self._number > 0

    def end(self) -> NoReturn:
        raise Interrupted(self._number)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A signal ends what is done in this block at once; then `asked` is true. Several processes would no longer be
        at the same place, so they end."""
        self._restore()
        try:
            yield
        except KeyboardInterrupt as error:
            if self.ranks.world > 1:
                raise
            self._number = getattr(error, "number", signal.SIGINT)
        finally:
            self._listen()

    def _listen(self) -> None:
        """Take signals, but those that are ignored (as by nohup) stay so."""
        if threading.current_thread() is threading.main_thread():
            known = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
            self._before = {number: was for number, was in known.items() if was not in (signal.SIG_IGN, None)}
            for number in self._before:
                signal.signal(number, self._take)

    def _restore(self) -> None:
        for number, was in self._before.items():
            signal.signal(number, was)

    def _take(self, number: int, frame: Any) -> None:
        if self._number:
            if self.ranks.world == 1 or time.monotonic() > self._since + _ECHO:
                self._restore()
                signal.raise_signal(number)
            return
        self._number, self._since = number, time.monotonic()


@contextmanager
def stoppable(ranks: Ranks = ALONE) -> Iterator[Stop]:
    """Within the block a first SIGINT or SIGTERM waits until `asked` is looked at, at the latest until its end."""
    stop = Stop(ranks)
    stop._listen()
    try:
        yield stop
    finally:
        stop._restore()
    if stop._number:
        stop.end()


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM is an interruption, as SIGINT is anyway; neither gets lost."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    main = threading.current_thread() is threading.main_thread()
    before = {number: was for number, was in usual.items() if main and signal.getsignal(number) is was}
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    finally:
        for number, was in before.items():
            signal.signal(number, was)


def _end(number: int, frame: FrameType | None) -> None:
    if not _unheard(frame):
        raise Interrupted(number)
    timer = threading.Timer(_LATER, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _unheard(frame: FrameType | None) -> bool:
    """Whether Python would only print what is raised here: while an object is taken away."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in _FINALIZERS:
            return True
        frame = frame.f_back
    return False
