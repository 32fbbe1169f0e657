"""States of a learner in a folder: which are kept."""

from types import SimpleNamespace

import pytest

from methods.core.checkpoints import Checkpoints


def test_those_beyond_the_limit_go_when_a_run_goes_on(tmp_path):
    """A process that was killed right after it wrote one did not drop the oldest, and there may be none to come."""
    learner = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    for step in (1, 2, 3):
        Checkpoints(tmp_path, "checkpoint", 1, 0).save(step, learner)
    kept = Checkpoints(tmp_path, "checkpoint", 1, 2)
    assert kept.restore(learner) == 3
    assert [step for step, _ in kept.found()] == [2, 3]


@pytest.mark.parametrize("limit, left", [(1, [12]), (2, [10, 12]), (3, [9, 10, 12]), (0, [3, 5, 6, 9, 10, 12])])
@pytest.mark.parametrize("stops", [(), (1,), (4, 8, 11), (7, 11), (2, 4, 7, 8, 11)])
def test_after_signals_they_are_those_of_an_undisturbed_run(tmp_path, stops, limit, left):
    """Every third step and at the ends of epochs of five; a signal leaves one more, which the next makes needless."""
    learner = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    kept = Checkpoints(tmp_path, "checkpoint", 3, limit, epoch=5)
    for step in range(1, 13):
        if kept.due(step) or step in stops:
            kept.save(step, learner)
            assert kept.restore(learner) == step
    assert [step for step, _ in kept.found()] == left
