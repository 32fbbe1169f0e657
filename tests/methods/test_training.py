"""The training loop against one written by hand; interruptions, batches, prefetching, failures."""

import threading
import time

import pytest
import torch
from torch import nn

from methods.core.training import CHECK_EVERY, Recipe, Trainer, partition, prefetch
from utils.errors import RunError

DATA = torch.randn(24, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TARGET = torch.randn(24, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def network(dropout=0.0, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def trainer(net, seed=3, **recipe):
    groups = {"body": list(net[0].parameters()), "head": list(net[3].parameters())}
    settings = {"lr": {"body": 0.1, "head": 0.3}, "epochs": 6} | recipe
    return Trainer(net, groups, Recipe(**settings), seed)


def batches(epoch):
    return partition(24, 7, torch.Generator().manual_seed(epoch))


def loss_of(net):
    return lambda rows: (net(DATA[rows]) - TARGET[rows]).square().mean()


def weights(net):
    return torch.cat([p.detach().reshape(-1) for p in net.parameters()])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 5e-2])
def test_it_is_sgd(momentum, decay):
    """Two rates, momentum, weight decay, and rates cut to a fifth after epochs 2 and 4, written out."""
    net, seen = network(), []
    run = trainer(net, momentum=momentum, weight_decay=decay, milestones=(2, 4), gamma=0.2)
    run.fit(batches, loss_of(net), lambda epoch, loss: seen.append((epoch, loss)))

    twin = network()
    params, velocity = list(twin.parameters()), [torch.zeros_like(p) for p in twin.parameters()]
    means = []
    for epoch in range(6):
        cut = 0.2 ** sum(epoch >= milestone for milestone in (2, 4))
        losses = []
        for rows in batches(epoch):
            loss = loss_of(twin)(rows)
            losses.append(float(loss.detach()))
            for i, grad in enumerate(torch.autograd.grad(loss, params)):
                velocity[i] = momentum * velocity[i] + grad + decay * params[i].detach()
                with torch.no_grad():
                    params[i] -= cut * (0.1 if i < 2 else 0.3) * velocity[i]
        means.append(sum(losses) / len(losses))
    torch.testing.assert_close(weights(net), weights(twin), rtol=1e-10, atol=1e-12)
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in seen] == pytest.approx(means)


@pytest.mark.parametrize("stop", [1, 3])
def test_an_interrupted_run_ends_as_an_uninterrupted_one(tmp_path, stop):
    """Bit for bit, with dropout and momentum, through a file, in another process's place."""
    recipe = {"momentum": 0.9, "weight_decay": 1e-3, "milestones": (2, 4)}
    whole = network(dropout=0.4)
    trainer(whole, **recipe).fit(batches, loss_of(whole))

    first = network(dropout=0.4)
    run = trainer(first, **recipe)

    def on_epoch(epoch, loss):
        if epoch == stop:
            torch.save(run.state_dict(), tmp_path / "state.pt")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.fit(batches, loss_of(first), on_epoch)

    torch.rand(17)  # other chance in between
    second, seen = network(dropout=0.4, seed=9), []
    run = trainer(second, **recipe)
    run.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run.fit(batches, loss_of(second), lambda epoch, loss: seen.append(epoch))
    assert torch.equal(weights(second), weights(whole))
    assert seen == list(range(stop + 1, 7))


def test_dropout_follows_the_seed_alone():
    results = []
    for seed, chance in ((3, 0), (3, 1), (4, 0)):
        net = network(dropout=0.4)
        torch.manual_seed(chance)
        trainer(net, seed).fit(batches, loss_of(net))
        results.append(weights(net))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_each_epoch_has_its_own_dropout():
    net, drawn = network(), []

    def loss(number):
        drawn.append(torch.rand(3).tolist())
        return loss_of(net)(torch.arange(24))

    trainer(net).fit(lambda _: range(2), loss)
    assert len({tuple(numbers) for numbers in drawn}) == 12


def test_training_mode_is_set_anew_each_epoch():
    net = network(dropout=0.4)
    modes = []

    def loss(rows):
        modes.append(net.training)
        return loss_of(net)(rows)

    trainer(net).fit(batches, loss, lambda epoch, _: net.eval())  # as a scorer does
    assert all(modes)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("step", [2, CHECK_EVERY + 1])
def test_a_loss_that_is_not_finite_ends_it(bad, step):
    net, done = network(), []

    def loss(number):
        return loss_of(net)(torch.arange(24)) * (bad if (number == step and len(done) == 1) else 1)

    with pytest.raises(RunError, match=r"epoch 2.*not finite.*lower the rate") as error:
        trainer(net).fit(lambda _: range(1, 31), loss, lambda epoch, _: done.append(epoch))
    assert done == [1]
    assert f"step {20 if step < 20 else 30}" in str(error.value)


def test_an_epoch_without_batches():
    net = network()
    with pytest.raises(RunError, match="no batches"):
        trainer(net).fit(lambda _: [], loss_of(net))


@pytest.mark.parametrize("count, size", [(10, 3), (9, 3), (2, 5), (1, 1)])
def test_a_partition_covers_everything_once(count, size):
    parts = list(partition(count, size, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(parts).tolist()) == list(range(count))
    assert all(len(part) == size for part in parts[:-1]) and 0 < len(parts[-1]) <= size


@pytest.mark.parametrize("count, size, sizes", [(10, 3, [3, 3, 3]), (9, 3, [3, 3, 3]), (2, 5, [2])])
def test_a_smaller_last_batch_can_be_dropped(count, size, sizes):
    """Unless it is the only one."""
    parts = list(partition(count, size, torch.Generator().manual_seed(0), drop_last=True))
    assert [len(part) for part in parts] == sizes
    assert len(set(torch.cat(parts).tolist())) == sum(sizes)


def test_partitions_are_shuffled():
    rng = torch.Generator().manual_seed(0)
    first, second = (torch.cat(list(partition(50, 7, rng))).tolist() for _ in range(2))
    assert first != second and first != list(range(50))


class TestPrefetch:
    def test_in_order_and_ahead(self):
        made = []

        def make(index):
            assert threading.current_thread() is not threading.main_thread()
            made.append(int(index))
            return index * 10

        source = prefetch(make, torch.arange(6), ahead=2)
        assert int(next(source)) == 0
        time.sleep(0.2)
        assert made[:3] == [0, 1, 2] and len(made) <= 3  # two wait, no more
        assert [int(item) for item in source] == [10, 20, 30, 40, 50]
        assert made == list(range(6))

    def test_an_error_arrives_where_its_batch_would(self):
        def make(index):
            if index == 2:
                raise OSError("no such picture")
            return int(index)

        source = prefetch(make, torch.arange(5))
        assert [next(source), next(source)] == [0, 1]
        with pytest.raises(OSError, match="no such picture"):
            next(source)

    def test_nothing_and_little(self):
        assert list(prefetch(int, [])) == []
        assert list(prefetch(int, [torch.tensor(4)], ahead=8)) == [4]

    def test_leaving_early_leaves_no_thread(self):
        source = prefetch(int, torch.arange(100))
        next(source)
        source.close()
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
