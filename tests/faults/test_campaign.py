"""No fault ends at a wrong result, a traceback or a lost file: a few faults of two methods, and many of all of them."""

from pathlib import Path

import pytest
import torch

from tests.faults.campaign import BAD, FAULTS, Campaign, differences, files
from tests.faults.worlds import WORLDS, cases


def campaign(root: Path, methods: list[str], count: int, seed: int) -> None:
    """Inject so many faults, of all kinds by turns; those that ended badly are told by their names."""
    root.chmod(0o755)
    fleet, bad = Campaign(root, seed), []
    ready = list(fleet.prepare([case for case in cases() if case.method in methods]))
    for number in range(count):
        turn, one = divmod(number, len(ready))
        done = fleet.trial(ready[one], FAULTS[(turn + one) % len(FAULTS)], turn)
        bad += [f"{done.name}: {done.result}: {done.note}"] if done.result in BAD else []
    again = f"python -m tests.faults --seed {seed} --again NAME"
    assert not bad, "\n".join([*bad, f"once more: {again}"])


def test_the_smallest_difference_is_seen(tmp_path):
    """Or the campaign would see nothing."""
    made = {"weights": torch.ones(3, dtype=torch.bfloat16), "list": [torch.tensor(float("nan")), 1.0]}
    other = made | {"weights": made["weights"].clone()}
    other["weights"][2] = 1.0078125  # the next number
    found = []
    for number, state in enumerate([made, made, other]):
        (folder := tmp_path / str(number)).mkdir()
        torch.save(state, folder / f"{'x' * (1 + number)}.pt")  # which torch notes in the file
        (folder / f"{'x' * (1 + number)}.pt").rename(folder / "x.pt")
        found.append(files(folder))
    assert not differences(found[0], found[1]) and differences(found[0], found[2]) == ["x.pt"]
    assert differences(found[0], {}) == differences({}, found[0]) == ["x.pt"]


def test_a_few_faults(tmp_path):
    campaign(tmp_path, ["mtt", "podd"], 15, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("method", WORLDS)
def test_many_faults(tmp_path, method):
    campaign(tmp_path, [method], 72, seed=2)
