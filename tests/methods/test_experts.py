"""Experts: what is kept of them, what they share, who trains with whom, and going on after an interruption."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.experts import ClassExpertConfig, ExpertConfig, ExpertTask, train_class_experts, train_experts
from methods.core.stack import Ascent, Stack, StackTrainer
from methods.core.store import TrajectoryStore
from methods.core.training import partition
from networks import build_network
from networks.flat import FlatModule
from utils.config import parse, section
from utils.errors import RunError, UserError
from utils.rng import derive_seed, generator, seeded
from utils.run import read_log


@dataclass(frozen=True)
class Command:
    """Train experts."""

    expert: ClassExpertConfig = section(ClassExpertConfig)


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
        store = TrajectoryStore.begin(run.folder, shapes, cfg.store_dtype, {}, resume, not run.ranks.first)
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
    assert all(expert["done"] for expert in store.experts) and not list(run.folder.rglob("progress.pt"))
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


class Classes:
    """Small ConvNets on noise of three classes, each expert in its own order."""

    def __init__(self, name="ConvNetD2W8"):
        self.net = build_network(name, 8, 3)
        self.images = torch.randn(20, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(20) % 3
        self.met, self.stop, self.bad = [], None, None

    def batches(self, expert, epoch):
        self.met.append((expert, epoch))
        if (expert, epoch) == self.stop:
            raise KeyboardInterrupt
        rng = generator(0, expert, epoch)
        for rows in partition(20, 8, rng):
            images = self.images[rows] + 0.1 * torch.randn(len(rows), 3, 8, 8, generator=rng)
            yield images * (float("nan") if expert == self.bad else 1), self.labels[rows]

    def score(self, logits):
        assert not self.net.training
        with torch.no_grad():
            return {"acc": 100 * float((logits(self.images).argmax(1) == self.labels).float().mean())}

    def train(self, run, resume=False, lr=0.05, **options):
        cfg = ClassExpertConfig(**{"num_experts": 5, "train_epochs": 4, "batch_size_train": 8} | options)
        shapes = {"net": FlatModule(self.net).shapes}
        store = TrajectoryStore.begin(run.folder, shapes, cfg.store_dtype, {}, resume, not run.ranks.first)
        train_class_experts(self.net, self.batches, self.score, store, cfg, lr, run)
        return store


FTD = {"rho": 0.1, "gsam_alpha": 0.3, "mom": 0.5, "l2": 1e-3, "decay": True}


def same_snapshots(store, other, exact=True):
    ours, theirs = snapshots(store), snapshots(other)
    assert ours.keys() == theirs.keys()
    for key, vector in ours.items():
        if exact:
            assert torch.equal(vector, theirs[key]), key
        else:
            torch.testing.assert_close(vector, theirs[key], rtol=1e-4, atol=1e-5)


class TestTogether:
    @pytest.mark.parametrize("options", [{}, FTD], ids=["sgd", "ftd"])
    def test_company_changes_nothing(self, open_run, options):
        """Five experts by one, by two (one is left over) and by more than there are."""
        alone = Classes().train(open_run("alone"), **options)
        kept = snapshots(alone)
        assert set(kept) == {(expert, epoch) for expert in range(5) for epoch in range(5)}
        assert all(not torch.equal(a, b) for i, a in enumerate(kept.values()) for b in list(kept.values())[:i])
        for together in (2, 8):
            world, run = Classes(), open_run(f"by {together}")
            store = world.train(run, together=together, **options)
            same_snapshots(store, alone, exact=False)
            assert [expert["seed"] for expert in store.experts] == [expert["seed"] for expert in alone.experts]
            assert all(expert["done"] for expert in store.experts) and not list(run.folder.rglob("progress.pt"))
            for ours, theirs in zip(store.experts, alone.experts, strict=True):
                assert ours["metrics"].keys() == theirs["metrics"].keys() == {1, 2, 3, 4}
                for epoch, row in ours["metrics"].items():
                    assert row["loss"] == pytest.approx(theirs["metrics"][epoch]["loss"], rel=1e-4)
                    assert row["acc"] == pytest.approx(theirs["metrics"][epoch]["acc"], abs=5.1)
            rows = read_log(run.folder)
            steps = [row["step"] for row in rows]
            assert steps == sorted(set(steps)) and len(rows) == 20
            assert {(row["expert"], row["epoch"]) for row in rows} == {(n, e) for n in range(5) for e in (1, 2, 3, 4)}
            order = [(0, 0), (1, 0)] if together == 2 else [(expert, 0) for expert in range(5)]
            assert world.met[: len(order)] == order

    def test_they_are_those_of_plain_sgd(self, open_run):
        """Weights, order and rates of expert 1, by torch's own optimiser; the rate falls after epoch index 3 of 4."""
        options = {"train_epochs": 5, "decay": True, "mom": 0.9, "l2": 1e-3, "num_experts": 2}
        found = snapshots(Classes().train(open_run(), together=2, **options))
        world, seed = Classes(), derive_seed(0, "expert", 1)
        flat = FlatModule(world.net)
        flat.load(Stack(world.net).draw([derive_seed(seed, "weights")])[0])
        assert torch.equal(flat.flatten(), found[1, 0])
        optimizer = torch.optim.SGD(flat.parameters(), 0.05, 0.9, weight_decay=1e-3)
        for epoch in range(5):
            if epoch == 4:  # after epoch index 5 // 2 + 1 = 3
                optimizer = torch.optim.SGD(flat.parameters(), 0.005, 0.9, weight_decay=1e-3)
            for images, labels in world.batches(1, epoch):
                optimizer.zero_grad()
                F.cross_entropy(world.net(images), labels).backward()
                optimizer.step()
            torch.testing.assert_close(flat.flatten(), found[1, epoch + 1], rtol=1e-4, atol=1e-5)

    def test_gsam_is_handed_on(self, open_run):
        options = {"num_experts": 1, "train_epochs": 2}
        found = snapshots(Classes().train(open_run(), rho=0.2, gsam_alpha=1.0, adaptive=False, **options))
        world, seed = Classes(), derive_seed(0, "expert", 0)
        stack, recipe = Stack(world.net), ClassExpertConfig(train_epochs=2).recipe({"net": 0.05})
        trainer = StackTrainer(
            stack, stack.draw([derive_seed(seed, "weights")]), recipe, [seed], Ascent(0.2, 1.0, False)
        )
        trainer.fit(lambda epoch: ((images[None], labels[None]) for images, labels in world.batches(0, epoch)))
        assert torch.equal(trainer.weights[0], found[0, 2])
        assert not torch.allclose(
            found[0, 2], snapshots(Classes().train(open_run("plain"), **options))[0, 2], atol=1e-4
        )

    @pytest.mark.parametrize("stop", [(0, 0), (1, 2), (2, 0), (3, 3), (4, 1)])
    @pytest.mark.parametrize("later", [1, 2, 3])
    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, open_run, stop, later):
        """Whoever is under training goes on in the company it has, whatever is asked for now."""
        whole, world = Classes().train(open_run("whole"), together=2, **FTD), Classes()
        world.stop = stop
        with pytest.raises(KeyboardInterrupt):
            world.train(open_run("parts"), together=2, **FTD)
        resumed, run = Classes(), open_run("parts", resume=True)
        store = resumed.train(run, resume=True, together=later, **FTD)
        same_snapshots(store, whole, exact=later == 2)
        begun = stop[0] - stop[0] % 2
        assert resumed.met[0] == (begun, stop[1])  # finished experts are left alone, finished epochs too
        rows = read_log(run.folder)
        assert len(rows) == 20 and len({(row["expert"], row["epoch"]) for row in rows}) == 20
        if later == 2:
            assert store.experts == whole.experts and rows == read_log(open_run("whole", resume=True).folder)

    @pytest.mark.parametrize("stop", [(0, 2), (2, 0), (3, 3), None])
    @pytest.mark.parametrize("gone", ["all", "first", "middle", "garbled", "last", "torn"])
    def test_lines_that_were_lost_are_written_again(self, open_run, stop, gone):
        """The log of finished experts, too, ends as that of a run that nobody disturbed."""
        whole, world, run = open_run("whole"), Classes(), open_run("parts")
        Classes().train(whole, together=2)
        world.stop = stop
        with pytest.raises(KeyboardInterrupt) if stop else nullcontext():
            world.train(run, together=2)
        log, lines = run.folder / "log.jsonl", (run.folder / "log.jsonl").read_bytes().splitlines(keepends=True)
        cut = {"all": [], "first": lines[1:], "last": lines[:-1], "torn": [*lines[:-1], lines[-1][:5]]}
        cut |= {"middle": [*lines[:2], *lines[5:]], "garbled": [*lines[:3], b'"]\n', *lines[4:]]}
        log.write_bytes(b"".join(cut[gone]))
        resumed = Classes()
        resumed.train(open_run("parts", resume=True), resume=True, together=2)
        assert log.read_bytes() == (whole.folder / "log.jsonl").read_bytes()
        assert resumed.met[:1] == ([(stop[0] - stop[0] % 2, stop[1])] if stop else [])  # nobody is trained again

    @pytest.mark.parametrize("together", [1, 2])
    def test_a_line_that_the_manifest_denies(self, open_run, together):
        run = open_run()
        Classes().train(run, together=together, num_experts=3)
        log = run.folder / "log.jsonl"
        good = log.read_bytes()
        row = read_log(run.folder)[2]
        damaged = good.replace(f"{row['loss']!r}".encode(), f"{row['loss'] / 2!r}".encode(), 1)
        log.write_bytes(damaged)
        with pytest.raises(
            UserError, match=rf"log.jsonl is damaged: its line of step {row['step']} is not what .*json"
        ):
            Classes().train(open_run(resume=True), resume=True, together=together, num_experts=4)
        assert log.read_bytes() == damaged
        log.unlink()  # as the line says
        Classes().train(open_run(resume=True), resume=True, together=together, num_experts=3)
        assert log.read_bytes() == good

    def test_a_manifest_that_notes_no_companies(self, open_run):
        """The log of its experts is left as it is."""
        run = open_run()
        store = Classes().train(run, together=2, num_experts=2)
        for entry in store.experts:
            del entry["company"]
        store._write_manifest()
        before = (run.folder / "log.jsonl").read_bytes()
        store = Classes().train(open_run(resume=True), resume=True, num_experts=3)
        assert (run.folder / "log.jsonl").read_bytes().startswith(before) and len(read_log(run.folder)) == 12
        assert ["company" in entry for entry in store.experts] == [False, False, True]

    def test_a_manifest_of_impossible_companies(self, open_run):
        run = open_run()
        store = Classes().train(run, together=2, num_experts=4)
        for wrong in ([0, 4], [2, 9], [3, 4], [-5, 4], [4, 2], [4, 4], [2, 1 << 40]):
            store.experts[3]["company"] = wrong
            store._write_manifest()
            with pytest.raises(UserError, match=r"manifest.json is damaged: expert [23] was not in the company"):
                Classes().train(open_run(resume=True), resume=True, num_experts=4)

    def test_killed_between_two_finishes(self, open_run):
        """One of two is noted as finished, the other is not: neither is trained again."""
        whole = Classes().train(open_run("whole"), together=2)
        run, real = open_run("parts"), TrajectoryStore.finish

        def finish(store, expert, company):
            if expert == 1:
                raise KeyboardInterrupt
            real(store, expert, company)

        TrajectoryStore.finish = finish
        try:
            with pytest.raises(KeyboardInterrupt):
                Classes().train(run, together=2)
        finally:
            TrajectoryStore.finish = real
        resumed = Classes()
        store = resumed.train(open_run("parts", resume=True), resume=True, together=2)
        same_snapshots(store, whole)
        assert store.experts == whole.experts and {expert for expert, _ in resumed.met} == {2, 3, 4}

    def test_batch_norm_is_trained_one_by_one(self, open_run):
        name = "ConvNetD2W8BN"
        many, one = Classes(name), Classes(name)
        store = many.train(open_run("many"), together=4, num_experts=2)
        same_snapshots(store, one.train(open_run("one"), num_experts=2))
        assert many.met == one.met == [(expert, epoch) for expert in range(2) for epoch in range(4)]

    def test_running_statistics_go_on_after_an_interruption(self, open_run):
        """They are no snapshot's, but validation sees them."""
        whole, world = Classes("ConvNetD2W8BN").train(open_run("whole"), num_experts=2), Classes("ConvNetD2W8BN")
        world.stop = (1, 2)
        with pytest.raises(KeyboardInterrupt):
            world.train(open_run("parts"), num_experts=2)
        store = Classes("ConvNetD2W8BN").train(open_run("parts", resume=True), resume=True, num_experts=2)
        same_snapshots(store, whole)
        assert store.experts == whole.experts

    def test_who_fails_is_named(self, open_run):
        world = Classes()
        world.bad = 1
        with pytest.raises(RunError, match=r"experts 0 to 2, expert 1, epoch 1, by step 3: the loss is not finite"):
            world.train(open_run(), together=3)
        with pytest.raises(RunError, match=r"expert 1, epoch 1, by step 3: the loss is not finite"):
            world.train(open_run("alone"))

    def test_only_what_is_asked_for_is_kept_and_scored(self, open_run):
        store = Classes().train(open_run(), together=3, save_epochs=(0, 3), eval_freq=3)
        assert [store.epochs(expert) for expert in range(5)] == [[0, 3]] * 5
        assert all("acc" in expert["metrics"][3] and "acc" not in expert["metrics"][2] for expert in store.experts)


class TestClassConfig:
    def test_defaults_are_those_of_mtt(self):
        cfg = ClassExpertConfig()
        assert (cfg.num_experts, cfg.train_epochs, cfg.batch_size_train, cfg.rho) == (100, 50, 256, 0.0)
        recipe = cfg.recipe({"net": 0.01})
        assert (recipe.momentum, recipe.weight_decay, recipe.milestones, recipe.epochs) == (0.0, 0.0, (), 50)
        assert ClassExpertConfig(decay=True).recipe({"net": 0.01}).milestones == (27,)  # after epoch index 26

    def test_published_spellings(self):
        flags = ["--num_experts=7", "--batch_train=64", "--rho_max=0.01", "--rho_min=0.01", "--alpha=1"]
        cfg, _ = parse(Command, "buffer", flags)
        expert = cfg.expert
        assert (expert.num_experts, expert.batch_size_train, expert.rho, expert.gsam_alpha) == (7, 64, 0.01, 1.0)

    def test_a_radius_that_would_change(self):
        with pytest.raises(UserError, match=r"--rho_min 0.5 is not --rho_max 2: the radius is constant"):
            ClassExpertConfig(rho=2.0, rho_min=0.5).check()
        ClassExpertConfig(rho=2.0, rho_min=2.0).check()
        with pytest.raises(UserError, match="save_epochs names 51"):
            ClassExpertConfig(save_epochs=(51,)).check()
