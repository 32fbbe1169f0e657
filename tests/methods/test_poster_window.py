"""Windows of RaT-BPTT: their draws, their kinds, and the four rules for moving on."""

import pytest

from methods.poster_window import PLATEAU, WindowConfig, Windows
from utils.errors import UserError


def starts(cfg, count, seed=0, epoch_steps=1, losses=None):
    windows = Windows(cfg, seed, epoch_steps, {} if losses is None else losses)
    return [windows.at(step) for step in range(count)]


@pytest.mark.parametrize(
    "seed, least, total, first",
    [
        (0, 0, 200, [98, 107, 10, 66, 130, 124, 103, 77, 122, 91, 55, 129]),
        (0, 0, 260, [98, 194, 107, 10, 66, 130]),
        (1, 0, 200, [34, 16, 65, 30, 126, 115]),
    ],
)
def test_random_starts_are_those_of_public_logs(seed, least, total, first):
    cfg = WindowConfig(window=60, minwindow=least, totwindow=total)
    assert starts(cfg, len(first), seed) == [(start, 60) for start in first]


def test_the_starts_of_later_epochs():
    found = starts(WindowConfig(), 150)
    assert [found[number - 1][0] for number in (10, 20, 30, 50, 150)] == [91, 79, 122, 114, 25]


def test_an_epoch_shares_its_start_unless_asked_otherwise():
    shared = starts(WindowConfig(), 7, epoch_steps=3)
    assert [start for start, _ in shared] == [98, 98, 98, 107, 107, 107, 10]
    each = starts(WindowConfig(start_per="step"), 4, epoch_steps=3)
    assert [start for start, _ in each] == [98, 107, 10, 66]


def test_a_resumed_run_draws_what_it_would_have_drawn():
    windows = Windows(WindowConfig(), 0, 1, {})
    assert windows.at(29) == (122, 60)  # without having been asked for the ones before
    assert windows.at(0) == (98, 60)


def test_both_ends_are_drawn():
    cfg = WindowConfig(window=3, minwindow=2, totwindow=7)
    assert {start for start, _ in starts(cfg, 100)} == {2, 3, 4}
    lengths = starts(WindowConfig(window=3, totwindow=5, cctype=3), 100)
    assert {*lengths} == {(0, 3), (0, 4), (0, 5)}


def test_fixed_and_standard_windows():
    assert {*starts(WindowConfig(cctype=0), 5)} == {(140, 60)}
    assert {*starts(WindowConfig(cctype=2, ddtype="standard"), 5)} == {(0, 60)}


def test_kind_1_moves_when_the_loss_stands_still():
    """Two steps an epoch; better at epochs 0 and 100, then never: it moves at 300, 500 (to the cap) and ends at 700."""
    cfg, losses = WindowConfig(cctype=1, window=60, minwindow=10, totwindow=160), {}
    windows, moves, ended = Windows(cfg, 0, 2, losses), [], None
    for epoch in range(0, 800, 50):
        step = 2 * epoch
        losses[step] = {0: 3.0, 50: 3.5, 100: 2.0}.get(epoch, 2.0 + epoch / 1000)
        moves.append((epoch, windows.at(step)[0]))
        if windows.finished(step):
            ended = epoch
            break
    assert [(epoch, start) for epoch, start in moves if epoch in (0, 250, 300, 450, 500, 650)] == [
        (0, 10),
        (250, 10),
        (300, 70),
        (450, 70),
        (500, 100),
        (650, 100),
    ]
    assert ended == 100 + 3 * PLATEAU
    # A resumed run finds the losses of later steps in its log; they do not count yet.
    assert Windows(cfg, 0, 2, losses).at(2 * 450) == (70, 60)


@pytest.mark.parametrize("least, ends", [(140, True), (0, False)])
def test_kind_0_ends_only_at_its_one_start(least, ends):
    cfg, losses = WindowConfig(cctype=0, minwindow=least), {0: 1.0, 199: 1.0}
    assert not Windows(cfg, 0, 1, losses).finished(199)
    losses[200] = 1.0
    assert Windows(cfg, 0, 1, losses).finished(200) is ends
    losses[201] = 0.5
    assert not Windows(cfg, 0, 1, losses).finished(201)


@pytest.mark.parametrize("kind", [2, 3])
def test_random_kinds_never_end(kind):
    assert not Windows(WindowConfig(cctype=kind), 0, 1, {0: 1.0, 5000: 1.0}).finished(5000)


@pytest.mark.parametrize(
    "options, words",
    [
        (
            {"minwindow": 141},
            "--minwindow 141 is beyond the last start of a window, --totwindow 200 - --window 60 = 140",
        ),
        ({"window": 201}, "--window 201 is more than --totwindow 200"),
        ({"cctype": 4}, "--cctype is 4; it is 0, 1, 2 or 3"),
    ],
)
def test_windows_that_cannot_be(options, words):
    with pytest.raises(UserError) as error:
        WindowConfig(**options).check()
    assert words in str(error.value)


def test_a_standard_window_has_any_length():
    WindowConfig(ddtype="standard", window=300, minwindow=5).check()


def test_what_does_nothing():
    assert WindowConfig(cctype=0, start_per="step").idle() == {"start_per": "--cctype 2 or 3"}
    assert {*WindowConfig(ddtype="standard").idle()} == {"minwindow", "totwindow", "cctype", "start_per"}
    assert WindowConfig(cctype=3).idle() == {"minwindow": "--cctype 0, 1 or 2"}
    assert WindowConfig().idle() == {}
