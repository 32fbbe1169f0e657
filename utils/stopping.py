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
import signal
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from utils.errors import Elsewhere, Interrupted
from utils.ranks import ALONE, Ranks

_LATER = 0.01  # seconds until a signal that could not be heard comes again
_AGAIN = 0.5  # seconds after which one that was raised must be under way to the end
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
            _echo.stop()
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


class _Echo:
    """Says a signal again until what it raised is on its way: code that is not Python's can drop an exception, or raise
    its own instead, where it calls back (as for the items of a tensor's storage)."""

    number = 0  # of the signal that the command has not ended by yet

    def start(self, number: int, seconds: float) -> None:
        self.number = number
        signal.setitimer(signal.ITIMER_REAL, seconds)

    def stop(self) -> int:
        """The signal's number, 0 if there was none."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        number, self.number = self.number, 0
        return number

    def sound(self, alarm: int, frame: FrameType | None) -> None:
        """Unless files are being put in order on its account."""
        if _on_its_way(sys.exc_info()[1]):
            self.start(self.number, _AGAIN)
        elif number := self.stop():
            signal.raise_signal(number)


_echo = _Echo()


@contextmanager
def terminable() -> Iterator[None]:
    """Within the block SIGTERM is an interruption, as SIGINT is anyway; neither gets lost."""
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    main = threading.current_thread() is threading.main_thread()
    before = {number: was for number, was in usual.items() if main and signal.getsignal(number) is was}
    alarm = signal.signal(signal.SIGALRM, _echo.sound) if before else None
    for number in before:
        signal.signal(number, _end)
    try:
        yield
    except (Exception, SystemExit) as error:
        if _echo.number and not isinstance(error, Elsewhere):
            raise Interrupted(_echo.number) from error
        raise
    finally:
        for number, was in before.items():
            signal.signal(number, was)
        if before:
            _echo.stop()  # before its handler goes: an alarm that nobody hears ends the process
            signal.signal(signal.SIGALRM, alarm)


def _end(number: int, frame: FrameType | None) -> None:
    unheard = _unheard(frame)
    _echo.start(number, _LATER if unheard else _AGAIN)
    if not unheard:
        raise Interrupted(number)


def _unheard(frame: FrameType | None) -> bool:
    """Whether Python would only print what is raised here: while an object is taken away."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or code.co_filename in _FINALIZERS:
            return True
        frame = frame.f_back
    return False


def _on_its_way(error: BaseException | None) -> bool:
    """Whether an interruption is among what is being handled."""
    while error is not None and not isinstance(error, Interrupted):
        error = error.__context__
    return error is not None
