"""Two processes learn what one learns: weights, gradients, stochastic depth, what cannot be read, one that dies."""

import functools
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from methods.clip_learning import Learner
from networks.clip_students import StudentSpec
from tests.conftest import plain
from tests.methods.clip_world import ALONE, CFG, LOSSES, World, student
from tests.processes import together, told
from utils.run import read_log

# Stochastic depth, whose chance must not depend on who has an image.
DEEP = StudentSpec(
    "deep",
    "timm",
    32,
    {
        "model": "swin_tiny_patch4_window7_224",
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 1, 2, 2),
        "drop_path_rate": 0.5,
    },
)


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def weights(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


class Double(nn.Module):
    """A student in float64."""

    def __init__(self, net):
        super().__init__()
        self.net, self.mean, self.std = net.double(), net.mean, net.std

    def forward(self, pixels):
        return self.net(pixels.double())


# Images that cannot be decoded: two anywhere, or all that one of the processes has in one step.
BAD = {"none": (), "some": (2, 9), "a whole share": "the second half of step 1"}


class TestProcesses:
    @pytest.mark.parametrize("bad", BAD)
    def test_two_learn_what_one_learns(self, world, bad):
        """All 15 steps, all weights, to 1e-6."""
        rows = self.undecodable(world, bad)
        one = student()
        world.run("one", bad=rows, net=one)

        def work(ranks):
            net = student()
            with torch.no_grad():
                net.projection += ranks.rank  # what counts is the first one's
            world.run("two", bad=rows, net=net, ranks=ranks)
            torch.save(weights(net), world.root / f"rank{ranks.rank}.pt")

        done = together(work)
        assert [end.rc for end in done] == [0, 0], told(done)
        first, second = (torch.load(world.root / f"rank{rank}.pt") for rank in range(2))
        assert plain(first) == plain(second)
        for name, value in weights(one).items():
            torch.testing.assert_close(first[name], value, rtol=0, atol=1e-6, msg=name)
        two = student()
        two.load_state_dict(first)
        pixels = torch.randn(5, 3, 16, 16)
        torch.testing.assert_close(two.eval()(pixels), one(pixels), rtol=1e-4, atol=1e-5)
        logs = [read_log(world.root / name) for name in ("one", "two")]
        assert len(logs[0]) == len(logs[1])
        assert all(a == pytest.approx(b, rel=1e-4) for a, b in zip(*logs, strict=True))

    def undecodable(self, world, bad):
        feed = world.feed()
        second = feed._slice("images", feed.rows, 8, 1, 0)  # of 8 images a step, those of step 1
        return second[4:].tolist() if isinstance(BAD[bad], str) else BAD[bad]

    @pytest.mark.parametrize("bad", BAD)
    def test_gradients_in_float64(self, world, bad):
        rows = self.undecodable(world, bad)

        def gradient(ranks):
            learner, feed = Learner(Double(student()), LOSSES, CFG, 5, 5, ranks), world.feed(rows, ranks=ranks)
            for step in range(3):
                learner.step(feed.batch(step))
            return [weight.grad for weight in learner.net.parameters()], weights(learner.net)

        together(lambda ranks: torch.save(gradient(ranks), world.root / f"{ranks.rank}.pt"))
        (wanted, ends), (found, found_ends) = gradient(ALONE), torch.load(world.root / "1.pt")
        for a, b in zip(wanted, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
        for name, value in ends.items():
            torch.testing.assert_close(found_ends[name], value, rtol=0, atol=1e-9)

    def test_two_are_killed_and_go_on(self, world):
        """One process dies; the run ends with one line, and resumes to what it would have been."""
        whole, cut = (functools.partial(self.two, world, name) for name in ("whole", "cut"))
        assert [end.rc for end in whole()] == [0, 0]
        done = cut(die=8)
        (line,) = told(done)
        assert [end.rc for end in done] == [1, -9] and "a process of this run ended before its time" in line
        assert [end.rc for end in cut()] == [0, 0]
        assert world.files("cut") == world.files("whole")

    def two(self, world, name, die=None):
        def losses(images, texts, student):
            left.append(1)
            if len(left) == die and ranked.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return LOSSES(images, texts, student)

        left, ranked = [], None

        def work(ranks):
            nonlocal ranked
            ranked = ranks
            world.run(name, ranks=ranks, losses=losses)

        return together(work)

    def test_other_files_and_other_networks_are_refused(self, world):
        def other(ranks):
            world.run("a", bad=(), ranks=ranks, images="images" if ranks.first else "holes")

        (line,) = told(together(other))
        assert "the processes do not see the same files: give them one place for" in line

        def normalising(ranks):
            net = student()
            net.visual.ln_post = nn.BatchNorm1d(32)
            world.run("b", ranks=ranks, net=net)

        (line,) = told(together(normalising))
        assert "this student normalises over the batch, of which 2 processes see a part each" in line

    def test_stochastic_depth(self, world):
        """Which images skip which blocks is the same for two processes; it does change what is learned."""

        def projection(ranks, rate=0.5):
            spec = replace(DEEP, options=DEEP.options | {"drop_path_rate": rate})
            learner = Learner(Double(student(spec=spec)), LOSSES, CFG, 5, 5, ranks)
            feed = world.feed(ranks=ranks, size=32)
            for step in range(2):
                learner.step(feed.batch(step))
            return learner.net.net.projection.detach()

        done = together(lambda ranks: torch.save(projection(ranks), world.root / f"{ranks.rank}.pt"))
        assert [end.rc for end in done] == [0, 0], told(done)
        wanted = projection(ALONE)
        torch.testing.assert_close(torch.load(world.root / "1.pt"), wanted, rtol=0, atol=1e-9)
        assert not torch.allclose(projection(ALONE, 0.0), wanted, rtol=0, atol=1e-7)
