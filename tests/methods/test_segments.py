"""The segments of an outer step: which they are, when they are read, and what several processes make of them."""

import threading
from types import SimpleNamespace

import pytest
import torch

from methods.core.segments import Segments
from methods.core.trajectories import Place, draw_place
from tests.processes import together, told
from utils.errors import UserError
from utils.ranks import ALONE
from utils.rng import generator


class Store:
    """Three experts of six epochs, whose weights are their numbers; `reads` is what was read, and by which thread."""

    def __init__(self, folder="x", lost=()):
        self.folder, self.lost, self.count, self.shapes, self.reads = folder, lost, 3, {"net": []}, []

    def epochs(self, expert):
        return list(range(6))

    def read(self, expert, epoch):
        self.reads.append((expert, epoch, threading.current_thread().name))
        if (expert, epoch) in self.lost:
            raise UserError(f"snapshot {expert}/{epoch} is gone")
        return {"net": torch.tensor([10.0 * expert + epoch])}


def place_in(store):
    return lambda step, rng: draw_place(store, rng, 4, 1)


def begin(place, count=1, ranks=ALONE, seed=7):
    """Segments of a run with one generator a name."""
    rngs = {name: generator(seed, name) for name in ("experts", "draws")}
    run = SimpleNamespace(ranks=ranks, device=ranks.device, rng=rngs.__getitem__, rngs=rngs)
    return Segments(run, count, place), run


def starts(segments, steps, first=0):
    """Where each step's segment began."""
    seen = []
    for step in range(first, first + steps):
        segments.follow(step, [], list, lambda segment, draws: seen.append(segment) or {"loss": 0.0})
    return [
        (segment.expert, segment.epoch, segment.start["net"].item(), segment.target["net"].item()) for segment in seen
    ]


class TestReadingAhead:
    def test_the_segments_are_those_that_are_drawn(self):
        """The same places, weights and generator as without reading ahead, at every step."""
        store, rng = Store(), generator(7, "experts")
        segments, run = begin(place_in(store))
        for step in range(30):
            place = draw_place(store, rng, 4, 1)
            (found,) = starts(segments, 1, step)
            assert found == (place.expert, place.starts[0], 10 * place.expert + place.starts[0], found[2] + 1)
            assert torch.equal(run.rng("experts").get_state(), rng.get_state())

    def test_the_next_one_is_read_while_this_one_is_followed(self):
        store = Store()
        segments, _ = begin(place_in(store))

        def follow(segment, draws):
            segments._ahead[1].result(timeout=10)
            seen.append(len(store.reads))
            return {"loss": 0.0}

        seen = []
        for step in range(4):
            segments.follow(step, [], list, follow)
        assert seen == [4, 6, 8, 10], "two snapshots a step, those of the next included"
        assert len({thread for *_, thread in store.reads}) == 1 and "segments" in store.reads[0][2]

    def test_another_choice_than_was_foreseen_is_read_anew(self):
        """Nothing that was read ahead is taken for what is asked for."""
        stores = Store("a"), Store("b")
        segments, run = begin(lambda step, rng: draw_place(stores[turn], rng, 4, 1))
        for turn in (0, 1, 1, 0):
            before = len(stores[turn].reads)
            starts(segments, 1)
            assert len(stores[turn].reads) > before or turn == 1
        run.rng("experts").manual_seed(99)
        (found,) = starts(segments, 1)
        place = draw_place(stores[0], torch.Generator().manual_seed(99), 4, 1)
        assert found[:2] == (place.expert, place.starts[0])

    def test_another_epoch_of_the_same_expert_is_read_anew(self):
        segments, _ = begin(lambda step, rng: Place(store, 1, (turn,), 1))
        store = Store()
        for turn in (0, 3, 2):
            assert starts(segments, 1) == [(1, turn, 10 + turn, 11 + turn)]

    def test_each_phase_is_read_before_its_turn(self):
        """What a step follows may hang on its number: that of the next step is asked for, not of this one."""
        store = Store()
        segments, _ = begin(lambda step, rng: Place(store, step % 3, (step % 2,), 1))
        followed = starts(segments, 6)
        segments._ahead[1].result(timeout=10)
        assert [place[:2] for place in followed] == [(step % 3, step % 2) for step in range(6)]
        assert len(store.reads) == 2 * (6 + 1), "nothing was read in vain"

    def test_a_run_that_goes_on_follows_the_same(self):
        whole = starts(begin(place_in(Store()))[0], 9)
        segments, run = begin(place_in(Store()))
        assert starts(segments, 5) == whole[:5]
        resumed, again = begin(place_in(Store()))
        again.rng("experts").set_state(run.rng("experts").get_state())
        assert starts(resumed, 4, 5) == whole[5:]

    def test_what_cannot_be_read_is_told_by_the_step_that_needs_it(self):
        whole = starts(begin(place_in(Store()))[0], 12)
        lost = whole[6][:2]
        needs = next(n for n, (expert, epoch, *_) in enumerate(whole) if lost in ((expert, epoch), (expert, epoch + 1)))
        assert needs > 0
        segments, _ = begin(place_in(Store(lost=[lost])))
        assert starts(segments, needs) == whole[:needs]
        with pytest.raises(UserError, match=f"snapshot {lost[0]}/{lost[1]} is gone"):
            starts(segments, 1, needs)

    def test_memory_is_the_segments_own(self):
        weights = torch.tensor([1.0, 2.0])
        store = SimpleNamespace(
            count=1,
            epochs=lambda e: [0, 1],
            read=lambda e, t: {"net": weights + t if t else weights},
            shapes={"net": []},
        )
        segment = draw_place(store, generator(0), 1, 1).read()
        weights.zero_()
        assert segment.start["net"].tolist() == [1, 2]


def learn(ranks, count, steps=5):
    """Some steps on three tensors: one of all segments, one of every second step, one of none; in float64."""
    segments, run = begin(place_in(Store()), count, ranks)
    leaves = [torch.full((2,), value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.2, 0.3)]
    history = []

    def draws():
        return [SimpleNamespace(seed=int(torch.randint(1000, (), generator=run.rng("draws"))))]

    for step in range(steps):

        def follow(segment, draws, step=step):
            first, second, _ = leaves
            loss = (first * segment.start["net"]).sin().sum() + (draws[0].seed * first / 100).cos().sum()
            if step % 2:
                loss = loss * second.sum()
            loss.backward()
            first.grad *= 1 + segment.expert  # as where a segment weighs its gradients: its own alone
            return {"loss": float(loss.detach()), "start_epoch": segment.epoch, "expert": segment.expert}

        history.append(segments.follow(step, leaves, draws, follow))
        assert [leaf.grad is not None for leaf in leaves] == [True, bool(step % 2), False]
        with torch.no_grad():
            for leaf in leaves[: 1 + step % 2]:
                leaf -= 0.001 * leaf.grad
                leaf.grad = None
    return leaves, history, run.rng("draws").get_state()


def oracle(count, steps=5):
    """The same by one gradient of the mean, segment by segment by hand; the tensors, and the mean losses and epochs."""
    store, rng, chance, history = Store(), generator(7, "experts"), generator(7, "draws"), []
    first, second = (torch.full((2,), value, dtype=torch.float64, requires_grad=True) for value in (0.1, 0.2))
    for step in range(steps):
        places = [draw_place(store, rng, 4, 1) for _ in range(count)]
        seeds = [int(torch.randint(1000, (), generator=chance)) for _ in range(count)]
        grads = [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
        total = 0.0
        for place, seed in zip(places, seeds, strict=True):
            loss = (first * place.read().start["net"]).sin().sum() + (seed * first / 100).cos().sum()
            loss = loss * second.sum() if step % 2 else loss
            found = torch.autograd.grad(loss, [first, second], allow_unused=True)
            grads[0] += (1 + place.expert) * found[0] / count
            grads[1] += found[1] / count if step % 2 else 0
            total += float(loss.detach())
        history.append((total / count, sum(place.starts[0] for place in places) / count))
        with torch.no_grad():
            for leaf, grad in zip((first, second), grads, strict=True):
                leaf -= 0.001 * grad
    return first, second, history


class TestAverage:
    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_one_process_is_the_plain_mean(self, count):
        (first, second, third), history, _ = learn(ALONE, count)
        wanted = oracle(count)
        torch.testing.assert_close(first, wanted[0], rtol=1e-12, atol=0)
        torch.testing.assert_close(second, wanted[1], rtol=1e-12, atol=0)
        assert third.tolist() == [0.3, 0.3]
        assert [(row["loss"], row["start_epoch"]) for row in history] == [pytest.approx(row) for row in wanted[2]]
        assert ("expert" in history[0]) == (count == 1), "of experts there is no mean"

    @pytest.mark.parametrize("count, world", [(0, 2), (3, 2), (2, 3)])
    def test_several_processes_are_as_one(self, tmp_path, count, world):
        """Each reads no other segments than its own, and all end with the same tensors, to the bit."""

        def work(ranks):
            torch.save(learn(ranks, count), tmp_path / f"{ranks.rank}.pt")

        done = together(work, world)
        assert [end.rc for end in done] == [0] * world, told(done)
        wanted, numbers, chance = learn(ALONE, count or world)
        found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
        for leaves, history, state in found:
            assert history == numbers == found[0][1] and torch.equal(state, chance)
            for ours, first, one in zip(leaves, found[0][0], wanted, strict=True):
                assert torch.equal(ours, first)
                torch.testing.assert_close(ours, one, rtol=1e-12, atol=0)
        note = f"note: --segments {count} keeps as many of {world} processes busy; the others only judge"
        assert (note in done[0].stdout) == (count == 2)

    def test_each_process_reads_its_own(self):
        def work(ranks):
            store = Store()
            segments, _ = begin(place_in(store), 4, ranks)
            followed = starts(segments, 3)
            segments._ahead[1].result(timeout=10)
            both = {(expert, epoch + more) for expert, epoch, *_ in followed for more in (0, 1)}
            ahead = segments._ahead[0]
            both |= {(ahead.expert, ahead.starts[0] + more) for more in (0, 1)}
            assert {read[:2] for read in store.reads} == both and len(store.reads) == 2 * (6 + 1)

        done = together(work)
        assert [end.rc for end in done] == [0, 0], told(done)
