"""Experts: what is kept of them, what they share, and going on after an interruption."""

import pytest
import torch
from torch import nn

from methods.core.experts import ExpertConfig, ExpertTask, train_experts
from methods.core.training import partition
from methods.core.trajectories import TrajectoryStore
from networks.flat import FlatModule
from utils.errors import UserError
from utils.rng import derive_seed, generator, seeded
from utils.run import read_log

DATA = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
LR = {"body": 0.1, "head": 0.2}


class World:
    """Two linear layers with dropout between them, regressing on noise."""

    def __init__(self):
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 2))
        self.flat = {"body": FlatModule(self.net[0]), "head": FlatModule(self.net[2])}
        self.renewed, self.scored, self.stop = [], 0, None

    def renew(self, seed):
        self.renewed.append(seed)
        with seeded(seed):
            self.net[0].reset_parameters(), self.net[2].reset_parameters()

    def batches(self, expert, epoch):
        if (expert, epoch) == self.stop:
            raise KeyboardInterrupt
        return partition(20, 8, generator(0, expert, epoch))

    def loss_fn(self, rows):
        return (self.net(DATA[rows]) - DATA[rows, :2]).square().mean()

    def score(self):
        self.scored += 1
        self.net.eval()  # as a scorer does
        return {"r_mean": 1.0}

    def train(self, run, resume=False, **options):
        cfg = ExpertConfig(**{"num_experts": 3, "train_epochs": 4, "batch_size_train": 8} | options)
        shapes = {group: part.shapes for group, part in self.flat.items()}
        made = resume and (run.folder / "manifest.json").exists()
        new = TrajectoryStore.open if made else lambda at: TrajectoryStore.create(at, shapes, cfg.store_dtype, {})
        store = new(run.folder)
        task = ExpertTask(self.net, self.flat, self.renew, self.batches, self.loss_fn, self.score)
        train_experts(task, store, cfg, LR, run)
        return store


def snapshots(store):
    return {
        (expert, epoch): torch.cat(list(store.read(expert, epoch).values()))
        for expert in range(store.count)
        for epoch in store.epochs(expert)
    }


def test_every_epoch_of_every_expert(open_run):
    world, run = World(), open_run()
    store = world.train(run)
    found = snapshots(store)
    assert set(found) == {(expert, epoch) for expert in range(3) for epoch in range(5)}
    kept = list(found.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(kept) for b in kept[:i])
    assert len(set(world.renewed)) == 3 and world.scored == 12
    assert all(expert["done"] for expert in store.experts) and not (run.folder / "progress.pt").exists()
    assert [row["step"] for row in read_log(run.folder)] == [
        5 * expert + epoch for expert in range(3) for epoch in (1, 2, 3, 4)
    ]


def test_snapshots_are_those_of_plain_sgd(open_run):
    """Epoch 0 is before training; each group has its own rate; dropout is on though the scorer turned it off."""
    world = World()
    found = snapshots(world.train(open_run(), num_experts=1, decay=True))
    twin, seed = World(), derive_seed(0, "expert", 0)
    twin.renew(world.renewed[0])
    assert torch.equal(torch.cat([flat.flatten() for flat in twin.flat.values()]), found[0, 0])
    rates = [{"params": twin.flat[group].parameters(), "lr": LR[group]} for group in LR]
    optimizer = torch.optim.SGD(rates)
    for epoch in range(4):
        if epoch == 3:  # after half of four epochs and one more
            for group in optimizer.param_groups:
                group["lr"] *= 0.1
        with seeded(derive_seed(seed, "epoch", epoch)):
            for rows in twin.batches(0, epoch):
                optimizer.zero_grad()
                twin.loss_fn(rows).backward()
                optimizer.step()
        ours = torch.cat([flat.flatten() for flat in twin.flat.values()])
        torch.testing.assert_close(ours, found[0, epoch + 1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("stop", [(0, 0), (0, 2), (1, 0), (2, 3)])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(open_run, stop):
    whole = World().train(open_run("whole"))
    world = World()
    world.stop = stop
    with pytest.raises(KeyboardInterrupt):
        world.train(open_run("parts"))
    resumed = World()
    store = resumed.train(open_run("parts", resume=True), resume=True)
    ours, theirs = snapshots(store), snapshots(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert len(resumed.renewed) == 3 - stop[0]  # finished experts are left alone
    assert store.experts == whole.experts


def test_only_what_is_asked_for_is_kept_and_scored(open_run):
    world = World()
    store = world.train(open_run(), save_epochs=(0, 2), eval_freq=3)
    assert [store.epochs(expert) for expert in range(3)] == [[0, 2]] * 3
    assert world.scored == 6  # epochs 3 and 4, the last, of three experts
    assert set(store.experts[0]["metrics"]) == {1, 2, 3, 4}
    assert "r_mean" in store.experts[0]["metrics"][3] and "r_mean" not in store.experts[0]["metrics"][2]
    quiet = World()
    quiet.train(open_run("quiet"), eval_freq=0)
    assert quiet.scored == 0
    whole = snapshots(World().train(open_run("all")))
    assert all(torch.equal(vector, whole[key]) for key, vector in snapshots(store).items())


def test_epochs_that_are_never_reached():
    with pytest.raises(UserError, match="save_epochs names 5, but experts train 4 epochs"):
        ExpertConfig(train_epochs=4, save_epochs=(0, 5)).check()
