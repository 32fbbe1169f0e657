"""Signals: the first waits for the loop to look, the second does not; several processes leave together."""

import os
import signal
import threading
import time
import weakref
from contextlib import suppress

import pytest
import torch

from tests.processes import together, told
from utils.errors import Interrupted, UserError, run_main
from utils.stopping import _AGAIN, stoppable, terminable

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture(autouse=True)
def listening():
    """As in a terminal, wherever the tests run; and all handlers are what they were, whatever came."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    was = signal.getsignal(signal.SIGTERM)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.getsignal(signal.SIGTERM) == was
    signal.signal(signal.SIGINT, before)


def send(number):
    os.kill(os.getpid(), number)


@BOTH
def test_a_step_is_finished_and_the_command_says_one_line(number, capsys):
    done = []

    @terminable()
    def main(words):
        with stoppable() as stop:
            for step in range(9):
                if step == 3:
                    send(number)
                done.append(step)
                if stop.asked:
                    stop.end()

    assert run_main(main, [], "x.py") == 128 + number and done == [0, 1, 2, 3]
    assert capsys.readouterr().err == "x.py: interrupted; --resume goes on from the last checkpoint\n"


@BOTH
def test_where_nothing_can_be_kept_it_ends_at_once(number, capsys):
    done = []

    @terminable()
    def main(words):
        send(number)
        done.append(1)

    assert run_main(main, [], "x.py") == 128 + number and not done
    assert capsys.readouterr().err.count("\n") == 1


class Sender:
    """Sends a signal when it is taken away, where an exception would only be printed."""

    def __init__(self, number):
        self.number = number

    def __del__(self):
        send(self.number)


@BOTH
@pytest.mark.parametrize("finalized", [False, True])
def test_a_signal_while_an_object_is_taken_away_is_not_lost(number, finalized, capsys):
    @terminable()
    def main(words):
        if finalized:
            weakref.finalize(threading.Event(), send, number)
        else:
            Sender(number)
        time.sleep(30)

    began = time.monotonic()
    assert run_main(main, [], "x.py") == 128 + number and time.monotonic() - began < 20
    assert capsys.readouterr().err == "x.py: interrupted; --resume goes on from the last checkpoint\n"


class Deaf:
    """Gets a signal where PyTorch asks for an item, which makes an error of its own of whatever is raised there."""

    def __init__(self, number):
        self.number = number

    def __len__(self):
        return 1

    def __getitem__(self, place):
        send(self.number)
        raise IndexError

    def measure(self):
        torch.tensor(self)


@BOTH
def test_an_error_that_a_signal_was_made_of_is_told_as_the_signal(number, capsys):
    with pytest.raises(ValueError, match="could not determine the shape"), terminable():
        Deaf(0).measure()  # no signal, and an error all the same

    @terminable()
    def main(words):
        try:
            Deaf(number).measure()
        except ValueError as error:
            raise UserError("the file cannot be read") from error

    assert run_main(main, [], "x.py") == 128 + number
    assert capsys.readouterr().err == "x.py: interrupted; --resume goes on from the last checkpoint\n"


@BOTH
@pytest.mark.parametrize("loop", [False, True])
def test_a_signal_that_was_dropped_comes_again(number, loop):
    """And then waits for the end of a step as any other."""
    done = []

    @terminable()
    def main(words):
        with suppress(ValueError):
            Deaf(number).measure()
        if not loop:
            time.sleep(30)
        with stoppable() as stop:
            while not stop.asked and time.monotonic() < began + 20:
                time.sleep(0.01)
            time.sleep(2 * _AGAIN)
            done.append(1)
            stop.end()

    began = time.monotonic()
    assert run_main(main, [], "x.py") == 128 + number and time.monotonic() - began < 20
    assert done == [1] * loop


@BOTH
def test_what_puts_files_in_order_is_not_disturbed(number):
    done = []

    @terminable()
    def main(words):
        try:
            send(number)
        finally:
            with suppress(OSError):
                try:
                    raise OSError
                finally:
                    time.sleep(2.5 * _AGAIN)
                    done.append(1)

    assert run_main(main, [], "x.py") == 128 + number and done == [1]
    time.sleep(1.5 * _AGAIN)  # and nothing comes afterwards


@BOTH
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_at_once(number, first):
    done = []

    @terminable()
    def main(words):
        with stoppable():
            send(first)
            done.append(1)
            send(number)
            done.append(2)

    assert run_main(main, [], "x.py") == 128 + number and done == [1]


def test_a_loop_that_never_looks_ends_with_its_block():
    done = []
    with pytest.raises(Interrupted), stoppable():
        send(signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_an_error_is_told_rather_than_the_signal():
    with pytest.raises(ZeroDivisionError), stoppable():
        send(signal.SIGINT)
        raise ZeroDivisionError


@BOTH
def test_what_can_be_broken_off_is(number):
    done = []
    with terminable(), stoppable() as stop:
        with stop.at_once():
            send(number)
            done.append(1)
        time.sleep(1.5 * _AGAIN)
        assert stop.asked and not done
        with pytest.raises(Interrupted) as ended:
            stop.end()
        assert ended.value.number == number
        stop._number = 0


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stoppable() as stop:
            send(signal.SIGINT)
            assert not stop.asked and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_other_threads_take_no_signals():
    found = []

    def work():
        with terminable(), stoppable() as stop:
            found.append(stop.asked)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


@BOTH
@pytest.mark.parametrize("who", [(1,), (0, 1, 2)])
def test_all_processes_leave_at_the_same_step(tmp_path, number, who):
    """Also where the launcher passes on what they have had already."""

    def work(ranks):
        with stoppable(ranks) as stop:
            for step in range(1000):
                if step == 5 and ranks.rank in who:
                    send(number)
                    send(number)
                if stop.asked:
                    (tmp_path / f"{ranks.rank} left after {step}").touch()
                    stop.end()

    done = together(work, 3)
    (line,) = told(done)
    assert line == "x.py: interrupted; --resume goes on from the last checkpoint"
    assert sorted(end.rc for end in done) == [1, 1, 128 + number]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{rank} left after 5" for rank in range(3)]
