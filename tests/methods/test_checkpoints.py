"""States of a learner in a folder: which are kept."""

from types import SimpleNamespace

from methods.core.checkpoints import Checkpoints


def test_those_beyond_the_limit_go_when_a_run_goes_on(tmp_path):
    """A process that was killed right after it wrote one did not drop the oldest, and there may be none to come."""
    learner = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None)
    for step in (1, 2, 3):
        Checkpoints(tmp_path, "checkpoint", 1, 0).save(step, learner)
    kept = Checkpoints(tmp_path, "checkpoint", 1, 2)
    assert kept.restore(learner) == 3
    assert [step for step, _ in kept.found()] == [2, 3]
