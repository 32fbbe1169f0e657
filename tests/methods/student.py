"""A whole outer step of VLDD in small: pairs, towers, an expert's segment, and the gradient of all that is learned."""

from types import SimpleNamespace

import torch

from methods.core.inner import InnerAdam, InnerSGD, hypergradient, unroll
from methods.core.matching import match
from methods.core.trajectories import Segment, draw_place, matching_loss
from methods.lors import contrastive_loss
from methods.pair_blending import blending
from networks.towers import TowerConfig, build_towers
from tests.methods.conftest import CPU, generator, pairs

N, SIZE, WIDTH, STEPS = 6, 8, 5, 4
HEADS = {"image_trainable": False, "image_projection": True}  # a frozen trunk, a head on either side
RATES = {"lr_teacher_img": 0.05, "lr_teacher_txt": 0.03}


def sample_segment(store, rng, max_start_epoch, expert_epochs, device, *more, **options):
    """A segment at a place that is drawn."""
    return draw_place(store, rng, max_start_epoch, expert_epochs, *more, **options).read().to(device)


class Student:
    """Six pairs, a ConvNet and a head with dropout, an expert's segment; four inner steps on four pairs each.

    counts  pairs of each phase; `number` is the one that a step takes
    once    encode images once a step; else a frozen trunk is asked in every inner step
    """

    def __init__(
        self,
        encoder="ConvNetD2W4",
        sim_type="lowrank",
        loss_type="WBCE",
        kind="sgd",
        *,
        counts=(N,),
        clamp=False,
        blend=0.0,
        merged=False,
        consecutive=False,
        apart=False,
        once=True,
        batch=4,
        **towers,
    ):
        settings = {"image_encoder": encoder, "joint_width": 6, "dropout": 0.2} | towers
        self.towers = build_towers(TowerConfig(**settings), WIDTH, SIZE, 0).to(torch.get_default_dtype()).train()
        self.learned = pairs(*counts, size=SIZE, width=WIDTH, seed=1, clamp=clamp, sim_type=sim_type, **RATES)
        self.loss_type, self.blend, self.merged, self.once, self.number = loss_type, blend, merged, once, 0
        rng = generator(2)
        with torch.no_grad():
            for phase in self.learned.phases:  # at the identity some of these gradients are zero
                for leaf in phase.similarity.leaves:
                    leaf += 0.3 * torch.randn(leaf.shape, generator=rng)
        way = [self.towers.flatten()]
        for _ in range(3):
            way.append({g: vector + 0.1 * torch.randn(vector.shape, generator=rng) for g, vector in way[-1].items()})
        store = SimpleNamespace(
            count=1, epochs=lambda e: [0, 1, 2, 3], read=lambda e, t: way[t], folder="x", shapes=dict.fromkeys(way[0])
        )
        self.segment = sample_segment(store, rng, 3, 1, CPU, 0, True) if apart else Segment(way[0], way[1], 0, 0)
        self.draws = [phase.draws(rng, STEPS, batch, consecutive) for phase in self.learned.phases]
        self.kind = kind

    @property
    def pairs(self):
        """The phase that a step takes."""
        return self.learned.phases[self.number]

    @property
    def inner(self):
        return InnerSGD(self.pairs.lr) if self.kind == "sgd" else InnerAdam(self.pairs.lr, eps=1e-3)

    def step_loss(self, params, draw):
        batch = self.pairs.batch(draw)
        images = batch.images if self.once else self.towers.encode(batch.images)
        u, v = self.towers.functional(params, images, batch.texts, blending(draw, self.blend))
        return contrastive_loss(u @ v.T / 0.2, batch.similarity, self.loss_type)

    def objective(self, final):
        return matching_loss(final, self.segment, self.merged)[0]

    def _in_step(self, work):
        for leaf in self.learned.leaves:
            leaf.grad = None
        if not self.once:
            return work()
        with self.pairs.encoded(self.towers, self.draws[self.number]):
            return work()

    def value(self):
        """The objective after the inner loop, as a number."""
        draws = self.draws[self.number]
        final = self._in_step(lambda: unroll(self.step_loss, self.segment.start, draws, self.inner))
        return float(self.objective(final).detach())

    def grads(self, mode, window=None):
        """The objective, and the gradients of the phase's leaves."""
        args = (self.step_loss, self.segment.start, self.draws[self.number], self.inner, self.objective)
        loss = self._in_step(lambda: hypergradient(*args, self.pairs.leaves, mode, window))
        return loss, [leaf.grad.clone() for leaf in self.pairs.leaves if leaf.grad is not None]

    def match(self, mode):
        """What `match` gives to log, and the gradients."""
        args = (self.segment, self.draws[self.number], mode, self.merged)
        numbers = self._in_step(lambda: match(self.step_loss, self.pairs, *args))
        return numbers, [leaf.grad.clone() for leaf in self.pairs.leaves if leaf.grad is not None]


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def slope(student, leaf, at, step=1e-6):
    """The central difference quotient of the objective by one number of a leaf."""
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf.view(-1)[at] += sign * step
        values.append(student.value())
        with torch.no_grad():
            leaf.view(-1)[at] -= sign * step
    return (values[0] - values[1]) / (2 * step)
