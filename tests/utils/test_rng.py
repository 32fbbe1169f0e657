"""Named chance: the same everywhere, independent by name, and without a trace in torch's own."""

import subprocess
import sys

import pytest
import torch

from utils.rng import derive_seed, draw_seed, generator, seeded


def test_a_seed_is_the_same_in_every_process():
    code = "from utils.rng import derive_seed; print(derive_seed(3, 'expert', 2))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "1"}
    )
    assert int(done.stdout) == derive_seed(3, "expert", 2)


def test_seeds_differ_by_every_part_of_their_name():
    names = [(0,), (1,), (0, "a"), (0, "b"), (0, "a", 1), (0, "a", 2), (0, "a", "b"), (1, "a")]
    seeds = [derive_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in (derive_seed(0, i) for i in range(500)))  # what torch takes
    assert derive_seed(0, "net", 1) == derive_seed(0, "net", "1")


def test_generators():
    first, again, other = generator(0, "draws"), generator(0, "draws"), generator(0, "init")
    assert torch.equal(torch.rand(5, generator=first), torch.rand(5, generator=again))
    assert not torch.equal(torch.rand(5, generator=again), torch.rand(5, generator=other))


def test_drawn_seeds():
    rng = generator(0)
    seeds = [draw_seed(rng) for _ in range(100)]
    assert len(set(seeds)) == 100 and all(0 <= seed < 2**62 for seed in seeds)
    assert seeds[:3] == [draw_seed(again) for again in [generator(0)] for _ in range(3)]


def test_within_the_block_chance_follows_the_seed():
    def inside(seed):
        with seeded(seed):
            return torch.rand(4), torch.nn.functional.dropout(torch.ones(20), 0.5), torch.randperm(9)

    torch.manual_seed(1)
    first = inside(7)
    torch.manual_seed(2)
    again, other = inside(7), inside(8)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


@pytest.mark.parametrize("fails", [False, True])
def test_afterwards_it_is_as_before(fails):
    torch.manual_seed(5)
    torch.rand(3)
    expected = torch.rand(4)
    torch.manual_seed(5)
    torch.rand(3)
    try:
        with seeded(9):
            torch.rand(11)
            with seeded(10, torch.device("cpu")):
                torch.rand(2)
            if fails:
                raise RuntimeError
    except RuntimeError:
        pass
    assert torch.equal(torch.rand(4), expected)


def test_an_inner_block_leaves_the_outer_one_alone():
    with seeded(1):
        torch.rand(2)
        expected = torch.rand(3)
    with seeded(1):
        torch.rand(2)
        with seeded(2):
            torch.rand(50)
        assert torch.equal(torch.rand(3), expected)


def test_seeding_again_and_again_leaves_nothing_behind():
    """torch.manual_seed on a machine without a GPU keeps a stack trace of every call, for a GPU that never comes."""
    kept = getattr(torch.cuda, "_queued_calls", [])
    before = len(kept)
    for seed in range(5):
        with seeded(seed):
            torch.rand(1)
    assert len(kept) == before
