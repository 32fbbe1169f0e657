"""The outer loop on a quadratic: the optimiser, interruptions, what is kept, and what ends a run."""

import os
import signal
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from methods.core.outer import PATIENCE, OuterConfig, outer_loop
from tests.processes import together, told
from utils.errors import Interrupted, RunError, UserError
from utils.files import load_tensors
from utils.ranks import Ranks
from utils.run import read_log
from utils.stopping import terminable

GOAL = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Quadratic:
    """Three numbers and a scalar that are drawn to a goal, each at its own rate."""

    def __init__(self, lr=(0.1, 0.3)):
        self.point = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        self.rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        self.leaves, self.outer, self.projected = [self.point, self.rate], lr, 0

    def param_groups(self):
        return [{"params": [leaf], "lr": lr} for leaf, lr in zip(self.leaves, self.outer, strict=True)]

    def project(self):
        self.projected += 1

    def trouble(self):
        return None if float(self.rate.detach()) > 0 else "the rate is not positive"

    def state_dict(self):
        return {"point": self.point.detach().clone(), "rate": self.rate.detach().clone()}

    @torch.no_grad()
    def load_state_dict(self, state):
        self.point.copy_(state["point"])
        self.rate.copy_(state["rate"])

    def numbers(self):
        return torch.cat([leaf.detach().reshape(-1) for leaf in self.leaves])


class World:
    """A quadratic, a noisy step on it, and a record of all that the loop asked for."""

    def __init__(self, run, stop=None, spoil=None, scores=None, lr=(0.1, 0.3)):
        self.run, self.learned, self.stop, self.spoil = run, Quadratic(lr), stop, spoil
        self.scores, self.done, self.evaluated, self.kept = scores or {}, [], [], []

    def step(self, _):
        number = len(self.done)
        if number == self.stop:
            raise KeyboardInterrupt
        noise = torch.randn(3, generator=self.run.rng("noise"), dtype=torch.float64)
        loss = (self.learned.point - GOAL - 0.1 * noise).square().sum() + (self.learned.rate - 1).square()
        loss.backward()
        self.done.append(float(loss.detach()))
        numbers = {"loss": float(loss.detach()), "rate": float(self.learned.rate.detach())}
        if self.spoil and number == self.spoil[0]:
            self.spoil[1](self, numbers)
        return numbers

    def evaluate(self, step):
        self.evaluated.append(step)
        torch.randn(1, generator=self.run.rng("judge"))
        return self.scores.get(step, 0.0)

    def keep(self, step, best):
        self.kept.append((step, best, self.learned.numbers()))

    def go(self, **options):
        settings = {"iterations": 7, "eval_it": 3, "checkpoint_every": 2, "momentum": 0.5} | options
        outer_loop(self.step, self.learned, OuterConfig(**settings).plan(), self.run, self.evaluate, self.keep)
        return self


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_it_is_sgd_with_momentum(open_run, momentum):
    ours = World(open_run()).go(momentum=momentum)
    twin, run = Quadratic(), open_run("twin")
    optimizer = torch.optim.SGD(twin.param_groups(), lr=0.0, momentum=momentum)
    by_hand, speed = twin.numbers(), torch.zeros(4, dtype=torch.float64)
    for _ in range(7):
        noise = torch.randn(3, generator=run.rng("noise"), dtype=torch.float64)
        optimizer.zero_grad()
        ((twin.point - GOAL - 0.1 * noise).square().sum() + (twin.rate - 1).square()).backward()
        optimizer.step()
        pull = 2 * (by_hand - torch.cat([GOAL + 0.1 * noise, torch.ones(1, dtype=torch.float64)]))
        speed = momentum * speed + pull
        by_hand = by_hand - torch.tensor([0.1, 0.1, 0.1, 0.3], dtype=torch.float64) * speed
    torch.testing.assert_close(ours.learned.numbers(), twin.numbers(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours.learned.numbers(), by_hand, rtol=1e-12, atol=1e-13)
    assert ours.learned.projected == len(ours.done) == 7


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 6])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(open_run, stop):
    """Wherever it stopped: numbers, momentum, chance, log and files are the same, bit for bit."""
    whole = World(open_run("whole")).go()
    with pytest.raises(KeyboardInterrupt):
        World(open_run("parts"), stop=stop).go()
    resumed = World(open_run("parts", resume=True)).go()
    assert 7 - stop <= len(resumed.done) <= 7 - stop + 2  # at most what a checkpoint interval loses
    assert torch.equal(resumed.learned.numbers(), whole.learned.numbers())
    assert read_log(resumed.run.folder) == read_log(whole.run.folder)
    ends = [{step: numbers for step, _, numbers in world.kept} for world in (whole, resumed)]
    assert all(torch.equal(numbers, ends[0][step]) for step, numbers in ends[1].items())
    torn = [world.run.rng("judge").get_state() for world in (whole, resumed)]
    assert torch.equal(*torn)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where, when", [("step", 0), ("step", 3), ("step", 6), ("evaluate", 0), ("evaluate", 6)])
def test_a_signal_costs_no_step_but_the_one_under_way(open_run, number, where, when):
    """The state that this one started from is kept, also in an evaluation, which is broken off; resumed, all is as
    uninterrupted, and a second interruption in between changes nothing."""
    scores = {0: 5.0, 3: 9.0, 6: 7.0, 7: 8.0}
    whole = World(open_run("whole"), scores=scores).go(checkpoint_every=100)
    assert (whole.run.folder / "checkpoint.pt").exists()
    for again in range(2):
        world = World(open_run("parts", resume=True), scores=scores)
        real, calls = getattr(world, where), []

        def told(step, real=real, calls=calls):
            calls.append(step)
            if step == when:
                os.kill(os.getpid(), number)
            return real(step)

        setattr(world, where, told)
        with listening(), pytest.raises(Interrupted) as ended:
            world.go(checkpoint_every=100)
        assert ended.value.number == number and calls[-1] == when
        assert torch.load(world.run.folder / "checkpoint.pt", weights_only=True)["step"] == when
        assert len(world.done) == (1 if again else when + 1)
    resumed = World(open_run("parts", resume=True), scores=scores).go(checkpoint_every=100)
    assert len(resumed.done) == 7 - when
    assert torch.equal(resumed.learned.numbers(), whole.learned.numbers())
    assert read_log(resumed.run.folder) == read_log(whole.run.folder)
    ends = [{step: (best, numbers) for step, best, numbers in world.kept} for world in (whole, resumed)]
    assert all(best == ends[0][step][0] for step, (best, _) in ends[1].items())


@contextmanager
def listening():
    """SIGINT and SIGTERM as in a command, wherever the tests run."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with terminable():
            yield
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_finished_run_has_nothing_left_to_do(open_run):
    whole = World(open_run()).go()
    again = World(open_run(resume=True)).go()
    assert again.done == [] and torch.equal(again.learned.numbers(), whole.learned.numbers())
    longer = World(open_run(resume=True)).go(iterations=9)
    other = World(open_run("other")).go(iterations=9)
    assert len(longer.done) == 2 and torch.equal(longer.learned.numbers(), other.learned.numbers())


def test_rates_may_be_changed_on_resuming(open_run):
    with pytest.raises(KeyboardInterrupt):
        World(open_run(), stop=4).go()
    resumed = World(open_run(resume=True), lr=(0.0, 0.3))
    before = torch.load(resumed.run.folder / "checkpoint.pt", weights_only=True)["learned"]
    resumed.go()
    assert torch.equal(resumed.learned.point.detach(), before["point"])
    assert not torch.equal(resumed.learned.rate.detach(), before["rate"])


@pytest.mark.parametrize(
    "iterations, eval_it, evaluated, kept",
    [(7, 3, [0, 3, 6, 7], [0, 3, 6, 7]), (6, 3, [0, 3, 6], [0, 3, 6]), (5, 0, [], [0, 5]), (0, 3, [0], [0])],
)
def test_what_is_evaluated_and_kept(open_run, iterations, eval_it, evaluated, kept):
    world = World(open_run()).go(iterations=iterations, eval_it=eval_it)
    assert world.evaluated == evaluated and [step for step, _, _ in world.kept] == kept
    assert torch.equal(world.kept[0][2], Quadratic().numbers())  # step 0 is before any update
    assert torch.equal(world.kept[-1][2], world.learned.numbers())


def test_the_best_is_what_scored_more_than_all_before(open_run):
    world = World(open_run(), scores={0: 5.0, 1: 4.0, 2: 6.0, 3: 6.0, 4: 7.0}).go(iterations=4, eval_it=1)
    assert [best for _, best, _ in world.kept] == [True, False, True, False, True]


def test_the_best_is_remembered_over_an_interruption(open_run):
    scores = {0: 5.0, 3: 9.0, 6: 7.0, 7: 8.0}
    with pytest.raises(KeyboardInterrupt):
        World(open_run(), stop=5, scores=scores).go()
    resumed = World(open_run(resume=True), scores=scores).go()
    assert [(step, best) for step, best, _ in resumed.kept] == [(6, False), (7, False)]


def nan_loss(world, numbers):
    numbers["loss"] = float("nan")


def nan_branch(world, numbers):
    numbers["loss_txt"] = float("inf")


def nan_gradient(world, numbers):
    world.learned.point.grad[1] = float("nan")


def overshoot(world, numbers):
    world.learned.rate.grad.fill_(1e6)


@pytest.mark.parametrize(
    "spoil, what",
    [
        (nan_loss, "loss is nan"),
        (nan_branch, "loss_txt is inf"),
        (nan_gradient, "a gradient is not finite"),
        (overshoot, "the rate is not positive"),
    ],
)
def test_what_is_not_sound_ends_the_run(open_run, spoil, what):
    world = World(open_run(), spoil=(5, spoil))
    with pytest.raises(RunError, match=rf"step 5: {what}; the last good state is that of step 4 in .*checkpoint\.pt"):
        world.go()
    log = read_log(world.run.folder)
    assert [row["step"] for row in log] == [0, 1, 2, 3, 4]
    # What is left is sound: the run goes on from step 4 and ends as if nothing had happened.
    whole, resumed = World(open_run("whole")).go(), World(open_run(resume=True)).go()
    assert len(resumed.done) == 3
    assert torch.equal(resumed.learned.numbers(), whole.learned.numbers())
    assert read_log(resumed.run.folder) == read_log(whole.run.folder)


def test_failing_at_once(open_run):
    world = World(open_run(), spoil=(0, nan_loss))
    with pytest.raises(RunError, match="step 0: loss is nan, before anything was learned"):
        world.go()
    assert not (world.run.folder / "checkpoint.pt").exists()
    assert len(World(open_run(resume=True)).go().done) == 7


@pytest.mark.parametrize("damage", ["cut", "other", "odd"])
def test_a_damaged_checkpoint(open_run, damage):
    World(open_run()).go()
    path = open_run(resume=True).folder / "checkpoint.pt"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "other":
        state = torch.load(path, weights_only=True)
        state["learned"]["point"] = torch.zeros(4)
        torch.save(state, path)
    else:
        torch.save([1, 2], path)
    with pytest.raises(UserError, match=r"checkpoint"):
        World(open_run(resume=True)).go()


def test_gradients_of_one_step_are_forgotten_in_the_next(open_run):
    """A leaf that plays no part in a step stays where it is but for its momentum."""
    world = World(open_run())
    world.step = lambda _: (world.learned.point.sum().backward(), {"loss": 0.0})[1]
    world.go(momentum=0.0)
    torch.testing.assert_close(world.learned.point.detach(), torch.full((3,), -0.7, dtype=torch.float64))
    assert float(world.learned.rate.detach()) == 2.0


def test_a_loss_above_the_threshold_moves_nothing(open_run):
    """Neither the point nor its momentum: the next step goes on as if that one had not been."""
    run = open_run()
    world = World(run)
    losses = iter([0.5, 3.0, 0.5])
    world.step = lambda _: (world.learned.point.sum().backward(), {"loss": next(losses)})[1]
    world.go(iterations=3, threshold=1.0, momentum=0.5)
    moved = 0.1 * (1 + 1.5)  # two steps of SGD with momentum
    torch.testing.assert_close(world.learned.point.detach(), torch.full((3,), -moved, dtype=torch.float64))
    assert [row.get("skipped", 0) for row in read_log(run.folder)] == [0, 1, 0] and world.learned.projected == 2


def test_long_gradients_are_shortened_each_by_its_own_norm(open_run):
    world = World(open_run())
    world.step = lambda _: ((3 * world.learned.point.sum() + 0.2 * world.learned.rate).backward(), {"loss": 0.0})[1]
    world.go(iterations=1, clip_grad=1.5)
    moved = 0.1 * 1.5 / 3**0.5  # a gradient of three 3s, brought to the norm 1.5
    torch.testing.assert_close(world.learned.point.detach(), torch.full((3,), -moved, dtype=torch.float64))
    assert float(world.learned.rate.detach()) == pytest.approx(2 - 0.3 * 0.2)


def test_with_a_threshold_a_loss_that_is_not_finite_is_skipped_too(open_run):
    run = open_run()
    world = World(run)
    losses = iter([0.5, float("nan"), 0.5])
    world.step = lambda _: (world.learned.point.sum().backward(), {"loss": next(losses)})[1]
    world.go(iterations=3, threshold=1.0, momentum=0.0)
    torch.testing.assert_close(world.learned.point.detach(), torch.full((3,), -0.2, dtype=torch.float64))
    assert [row.get("skipped", 0) for row in read_log(run.folder)] == [0, 1, 0]


def test_a_state_of_which_nothing_can_be_computed_is_not_kept(open_run):
    """Steps that are skipped for a loss that is not finite leave the last state that is known to be sound."""
    run = open_run()
    world = World(run)
    world.step = lambda step: (world.learned.point.sum().backward(), {"loss": 0.5 if step < 4 else float("nan")})[1]
    with pytest.raises(RunError, match=rf"{PATIENCE} steps in a row .* the last good state is that of step 3 in"):
        world.go(iterations=3 * PATIENCE, threshold=2.0, eval_it=0, checkpoint_every=3)
    assert load_tensors(run.folder / "checkpoint.pt", "checkpoint")["step"] == 3


def test_a_run_that_only_skips_ends(open_run):
    world = World(open_run())
    world.step = lambda _: (world.learned.point.sum().backward(), {"loss": 9.0})[1]
    with pytest.raises(
        RunError, match=f"step {PATIENCE - 1}: {PATIENCE} steps in a row had a loss above --threshold 2"
    ):
        world.go(iterations=3 * PATIENCE, threshold=2.0, eval_it=0)


def test_skipped_steps_in_a_row_are_counted_over_interruptions(open_run):
    """The run ends at the step at which it would have ended."""

    def go(run, stop=None):
        world = World(run)

        def step(number):
            if number == stop:
                raise KeyboardInterrupt
            world.learned.point.sum().backward()
            return {"loss": 0.5 if number < 4 else 9.0}

        world.step = step
        world.go(iterations=3 * PATIENCE, threshold=2.0, eval_it=0, checkpoint_every=7)

    for stop in (30, 31, 80):
        with pytest.raises(KeyboardInterrupt):
            go(open_run(resume=True), stop)
    with pytest.raises(RunError, match=f"step {PATIENCE + 3}: {PATIENCE} steps in a row had a loss above"):
        go(open_run(resume=True))


def bare_run(folder, ranks):
    """Only a folder, its processes, named chance and a log: no config and no tracker."""
    rngs = {name: torch.Generator().manual_seed(0) for name in ("noise", "judge")}
    chance = {"rng": rngs.__getitem__, "rng_state": dict}
    log = {"log": lambda step, **numbers: None, "log_sum": lambda step: 0}
    return SimpleNamespace(folder=folder, ranks=ranks, resumed=False, **log, **chance)


def test_a_run_is_all_it_needs(tmp_path):
    assert len(World(bare_run(tmp_path, Ranks(torch.device("cpu")))).go().done) == 7


def test_processes_begin_with_what_the_first_one_has(tmp_path):
    """However little it differed at first, which the first checkpoint would not let pass."""

    def work(ranks):
        world = World(bare_run(tmp_path, ranks))
        with torch.no_grad():
            world.learned.point.add_(1e-9 * (1 + ranks.rank))
        world.step = lambda _: (world.learned.point.sum().backward(), {"loss": 1.0})[1]
        world.go(momentum=0.0)
        torch.save(world.learned.point.detach(), tmp_path / f"{ranks.rank}.pt")

    done = together(work)
    assert [end.rc for end in done] == [0, 0], told(done)
    for rank in range(2):
        end = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(end, torch.full_like(end, 1e-9 - 0.7), rtol=0, atol=1e-12)
