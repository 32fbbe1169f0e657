"""Networks side by side: each as if alone, SGD as torch has it, GSAM by hand, interruptions, failures."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods.core.stack import Ascent, Stack, StackTrainer, stack_loss
from methods.core.training import Recipe, Trainer
from networks import build_network
from networks.flat import FlatModule
from utils.errors import RunError
from utils.rng import seeded

SEEDS = (5, 6, 7, 8)
RECIPE = Recipe({"net": 0.05}, 5, momentum=0.9, weight_decay=5e-3, milestones=(2, 4), gamma=0.2)
ASCENT = Ascent(rho=0.1, alpha=0.3)


def convnet(dtype=torch.float64, name="ConvNetD2W8"):
    return build_network(name, 8, 3).to(dtype)


def batches_of(numbers, dtype=torch.float64, soft=False, size=6):
    """Two batches an epoch, different for each network: those of network k do not depend on the others."""

    def one(k, epoch, step):
        rng = torch.Generator().manual_seed(1000 * k + 10 * epoch + step)
        images = torch.randn(size, 3, 8, 8, generator=rng, dtype=torch.float64).to(dtype)
        if soft:
            return images, torch.rand(size, 3, generator=rng, dtype=torch.float64).softmax(1).to(dtype)
        return images, torch.randint(3, (size,), generator=rng)

    def batches(epoch):
        for step in range(2):
            parts = [one(k, epoch, step) for k in numbers]
            yield torch.stack([images for images, _ in parts]), torch.stack([labels for _, labels in parts])

    return batches


def train(numbers, dtype=torch.float64, soft=False, vectorised=None, recipe=RECIPE, ascent=None, name="ConvNetD2W8"):
    """Weights and losses of the networks with these numbers, trained as one stack."""
    stack, losses = Stack(convnet(dtype, name), vectorised), []
    seeds = [SEEDS[k] for k in numbers]
    trainer = StackTrainer(stack, stack.draw(seeds), recipe, seeds, ascent)
    trainer.fit(batches_of(numbers, dtype, soft), lambda epoch, loss: losses.append(loss))
    return trainer.weights, torch.stack(losses)


class TestStack:
    @pytest.mark.parametrize("vectorised", [False, True])
    @pytest.mark.parametrize("soft", [False, True])
    @pytest.mark.parametrize("ascent", [None, ASCENT])
    @pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-4)])
    def test_four_together_are_four_alone(self, vectorised, soft, ascent, dtype, tolerance):
        together, losses = train(range(4), dtype, soft, vectorised, ascent=ascent)
        for k in range(4):
            alone, loss = train([k], dtype, soft, ascent=ascent)
            torch.testing.assert_close(together[k], alone[0], rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(losses[:, k], loss[:, 0], rtol=tolerance, atol=tolerance)
        assert not torch.allclose(together[0], together[1], atol=1e-2)

    @pytest.mark.parametrize(
        "name", ["ConvNetD2W8LN", "ConvNetD2W8GN", "ConvNetD2W8NN", "ConvNetD2W8MP", "ConvNetD2W8AS", "MLP"]
    )
    def test_other_networks_vectorise_too(self, name):
        (many, _), (single, _) = (
            train(range(3), vectorised=True, name=name),
            train(range(3), vectorised=False, name=name),
        )
        torch.testing.assert_close(many, single, rtol=1e-10, atol=1e-10)

    def test_weights_are_drawn_from_their_own_seed(self):
        stack, before = Stack(convnet(torch.float32)), torch.get_rng_state()
        weights = stack.draw([3, 4, 3])
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(weights[0], weights[2]) and not torch.equal(weights[0], weights[1])
        assert torch.equal(weights[:1], Stack(convnet(torch.float32)).draw([3]))
        with seeded(3):  # the framework's own initialisation
            assert torch.equal(weights[0], FlatModule(build_network("ConvNetD2W8", 8, 3)).flatten())

    def test_weights_that_nobody_draws(self):
        class Odd(nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = nn.Parameter(torch.ones(3))

        with pytest.raises(ValueError, match="Odd has weights but no reset_parameters"):
            Stack(Odd()).draw([0])

    @pytest.mark.parametrize("vectorised", [False, True])
    def test_its_gradient_is_that_of_each_network(self, vectorised):
        stack = Stack(convnet(), vectorised)
        weights, (images, labels) = stack.draw(SEEDS[:3]), next(batches_of(range(3))(0))
        loss, grads = stack.gradient(weights, images, labels)
        for k in range(3):
            leaf = weights[k].clone().requires_grad_()
            alone = F.cross_entropy(stack.flat(leaf, images[k]), labels[k])
            torch.testing.assert_close(loss[k], alone.detach())
            torch.testing.assert_close(grads[k], torch.autograd.grad(alone, leaf)[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(stack_loss(stack(weights, images), labels), loss)

    def test_who_is_computed_at_once(self, monkeypatch):
        few, many, single = torch.zeros(2, 128, 3, 32, 32), torch.zeros(2, 129, 3, 32, 32), torch.zeros(1, 4, 3, 32, 32)
        default, always, never = (Stack(convnet(), vectorised) for vectorised in (None, True, False))
        for images in (few, many, single):
            assert not default.at_once(images) and not never.at_once(images)
            assert always.at_once(images) == (len(images) > 1)
        monkeypatch.setattr(Stack, "device", torch.device("cuda"))
        assert default.at_once(few) and not default.at_once(many) and not default.at_once(single)
        assert not never.at_once(few)

    @pytest.mark.parametrize(
        "net",
        [
            lambda: build_network("ConvNetD2W8BN", 8, 3),
            lambda: nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, 3)),
        ],
    )
    def test_what_can_only_be_alone(self, net):
        stack = Stack(net())
        assert stack.single and not Stack(convnet()).single
        with pytest.raises(ValueError, match=r"2 networks with running statistics or dropout.*one by one"):
            stack.draw([0, 1])
        with pytest.raises(ValueError, match="one by one"):
            StackTrainer(stack, stack.draw([0]).repeat(2, 1), RECIPE, [0, 1])
        with pytest.raises(ValueError, match="one by one"):
            stack(stack.draw([0]).repeat(2, 1), torch.zeros(2, 4, 3, 8, 8))


class TestTraining:
    @pytest.mark.parametrize("momentum, decay", [(0.0, 0.0), (0.9, 0.0), (0.9, 5e-2), (0.0, 5e-2)])
    @pytest.mark.parametrize("reset", [False, True])
    def test_it_is_sgd(self, momentum, decay, reset):
        """torch.optim.SGD, made anew at the milestones where the momentum is to be lost."""
        recipe = Recipe({"net": 0.05}, 5, momentum, decay, (2, 4), 0.2, reset)
        weights, losses = train([1], recipe=recipe)

        flat = FlatModule(convnet())
        flat.load(Stack(flat.net).draw([SEEDS[1]])[0])
        make = lambda lr: torch.optim.SGD(flat.parameters(), lr, momentum, weight_decay=decay)  # noqa: E731
        rate, optimizer, seen = 0.05, make(0.05), []
        for epoch in range(5):
            if epoch in (2, 4):
                rate *= 0.2
                if reset:
                    optimizer = make(rate)
                optimizer.param_groups[0]["lr"] = rate
            means = []
            for images, labels in batches_of([1])(epoch):
                optimizer.zero_grad()
                loss = F.cross_entropy(flat.net(images[0]), labels[0])
                loss.backward()
                optimizer.step()
                means.append(float(loss.detach()))
            seen.append(sum(means) / 2)
        torch.testing.assert_close(weights[0], flat.flatten(), rtol=1e-11, atol=1e-12)
        assert losses[:, 0].tolist() == pytest.approx(seen)

    @pytest.mark.parametrize("reset", [False, True])
    def test_one_network_is_the_ordinary_trainer(self, reset):
        recipe = Recipe({"net": 0.05}, 5, 0.9, 5e-3, (2, 4), 0.2, reset)
        flat = FlatModule(convnet())
        flat.load(Stack(flat.net).draw([SEEDS[2]])[0])
        trainer = Trainer(flat.net, {"net": flat.parameters()}, recipe, 0)
        trainer.fit(batches_of([2]), lambda batch: F.cross_entropy(flat.net(batch[0][0]), batch[1][0]))
        torch.testing.assert_close(train([2], recipe=recipe)[0][0], flat.flatten(), rtol=1e-11, atol=1e-12)

    def test_losing_the_momentum_matters(self):
        kept, lost = (train([0], recipe=Recipe({"net": 0.05}, 5, 0.9, 0, (2,), 1.0, reset))[0] for reset in (0, 1))
        assert not torch.allclose(kept, lost, atol=1e-4)

    @pytest.mark.parametrize("stop", [1, 2, 3])
    @pytest.mark.parametrize("numbers, name", [((0, 1, 2), "ConvNetD2W8"), ((0,), "ConvNetD2W8BN")])
    def test_an_interrupted_run_ends_as_an_uninterrupted_one(self, tmp_path, stop, numbers, name):
        seeds = [SEEDS[k] for k in numbers]
        batches = batches_of(numbers, torch.float32)

        def begin():
            stack = Stack(convnet(torch.float32, name))
            return StackTrainer(stack, stack.draw(seeds), RECIPE, seeds, ASCENT)

        whole, first, second, seen = begin(), begin(), begin(), []
        whole.fit(batches)

        def on_epoch(epoch, loss):
            if epoch == stop:
                torch.save(first.state_dict(), tmp_path / "state.pt")
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            first.fit(batches, on_epoch)
        second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        second.fit(batches, lambda epoch, loss: seen.append(epoch))
        assert torch.equal(second.weights, whole.weights) and seen == list(range(stop + 1, 6))
        for name, value in whole.stack.buffers().items():
            assert torch.equal(second.stack.buffers()[name], value)

    def test_a_state_is_a_copy(self):
        stack = Stack(convnet())
        trainer = StackTrainer(stack, stack.draw(SEEDS[:2]), RECIPE, SEEDS[:2])
        state = trainer.state_dict()
        before = copy.deepcopy(state)
        drawn = trainer.weights
        trainer.load_state_dict(state)
        trainer.fit(batches_of(range(2)))
        assert torch.equal(state["weights"], before["weights"]) and torch.equal(drawn, before["weights"])

    @pytest.mark.parametrize("vectorised", [False, True])
    def test_a_loss_that_is_not_finite_names_its_network(self, vectorised):
        stack, done = Stack(convnet(), vectorised), []
        trainer = StackTrainer(
            stack, stack.draw(SEEDS[:3]), RECIPE, SEEDS[:3], names=["expert 4", "expert 5", "expert 6"]
        )

        def batches(epoch):
            for images, labels in batches_of(range(3))(epoch):
                if epoch == 1:
                    images[1] = float("nan")
                yield images, labels

        with pytest.raises(RunError, match=r"experts, expert 5, epoch 2, by step 2: the loss is not finite; lower"):
            trainer.fit(batches, lambda epoch, loss: done.append(epoch), "experts")
        assert done == [1]

    def test_as_many_seeds_as_networks(self):
        stack = Stack(convnet())
        with pytest.raises(ValueError, match="2 seeds for 3 networks"):
            StackTrainer(stack, stack.draw(SEEDS[:3]), RECIPE, SEEDS[:2])


class TestRunningStatistics:
    def run(self, ascent=None, seed=5):
        stack = Stack(convnet(name="ConvNetD2W8BN"))
        trainer = StackTrainer(stack, stack.draw([seed]), RECIPE, [seed], ascent)
        trainer.fit(batches_of([0]))
        return stack, trainer

    def test_they_are_those_of_an_ordinary_network(self):
        stack, _ = self.run()
        net = convnet(name="ConvNetD2W8BN")
        FlatModule(net).load(Stack(convnet(name="ConvNetD2W8BN")).draw([5])[0])
        trainer = Trainer(net, {"net": list(net.parameters())}, RECIPE, 5)
        trainer.fit(batches_of([0]), lambda batch: F.cross_entropy(net(batch[0][0]), batch[1][0]))
        for name, value in net.named_buffers():
            torch.testing.assert_close(stack.buffers()[name], value)

    def test_drawing_begins_them_anew(self):
        stack, _ = self.run()
        stack.draw([9])
        fresh = Stack(convnet(name="ConvNetD2W8BN")).buffers()
        assert all(torch.equal(value, fresh[name]) for name, value in stack.buffers().items())

    def test_uphill_they_stand_still(self):
        """Ten batches count as ten, not as twenty, and none is met at the weights uphill."""
        stack, _ = self.run(Ascent(rho=0.5, alpha=0.3))
        assert {int(value) for name, value in stack.buffers().items() if "num_batches" in name} == {10}
        first = Stack(convnet(name="ConvNetD2W8BN"))
        trainer = StackTrainer(first, first.draw([5]), Recipe({"net": 0.0}, 1), [5], Ascent(0.5, 0.3))
        trainer.fit(batches_of([0]))
        plain = Stack(convnet(name="ConvNetD2W8BN"))
        StackTrainer(plain, plain.draw([5]), Recipe({"net": 0.0}, 1), [5]).fit(batches_of([0]))
        assert all(torch.equal(value, plain.buffers()[name]) for name, value in first.buffers().items())


class TestAscent:
    def test_by_hand(self):
        """L = ½ Σ cᵢ wᵢ², whose gradient is c w: everything written out in plain numbers."""
        c, w, rho, alpha = [1.0, 3.0], [2.0, -1.0], 0.5, 0.3
        g = [c[0] * w[0], c[1] * w[1]]  # 2, −3
        size = ((abs(w[0]) * g[0]) ** 2 + (abs(w[1]) * g[1]) ** 2) ** 0.5  # √(16 + 9) = 5
        assert size == 5
        e = [rho * w[i] ** 2 * g[i] / size for i in range(2)]  # 0.8, −0.3
        p = [c[i] * (w[i] + e[i]) for i in range(2)]  # 2.8, −3.9
        dot, pp, gg = (sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((g, p), (p, p), (g, g)))
        cosine = dot / (pp * gg) ** 0.5
        expected = [p[i] - alpha * (g[i] - cosine * gg**0.5 * p[i] / pp**0.5) for i in range(2)]

        ascent = Ascent(rho, alpha)
        weights, grads = torch.tensor([w], dtype=torch.float64), torch.tensor([g], dtype=torch.float64)
        uphill = ascent.uphill(weights, grads)
        torch.testing.assert_close(uphill, torch.tensor([[0.8, -0.3]], dtype=torch.float64), rtol=1e-10, atol=0)
        second = torch.tensor([c], dtype=torch.float64) * (weights + uphill)
        torch.testing.assert_close(ascent.direction(grads, second)[0].tolist(), expected, rtol=1e-10, atol=0)
        plain = Ascent(rho, alpha, adaptive=False).uphill(weights, grads)
        torch.testing.assert_close(plain, rho * grads / 13**0.5, rtol=1e-10, atol=0)

    def test_each_network_by_its_own_norms(self):
        rng = torch.Generator().manual_seed(0)
        weights, grads, second = torch.randn(3, 2, 7, generator=rng, dtype=torch.float64)
        both = ASCENT.uphill(weights, grads), ASCENT.direction(grads, second)
        for k in range(2):
            assert torch.allclose(both[0][k], ASCENT.uphill(weights[k : k + 1], grads[k : k + 1])[0])
            assert torch.allclose(both[1][k], ASCENT.direction(grads[k : k + 1], second[k : k + 1])[0])

    def test_a_step_of_a_linear_classifier(self):
        """The trainer's steps against autograd and the formulas of the paper, with torch's own SGD around them."""
        net = nn.Sequential(nn.Flatten(), nn.Linear(192, 3)).double()
        stack = Stack(net)
        start = stack.draw([1])
        recipe = Recipe({"net": 0.1}, 2, 0.9, 1e-2)
        trainer = StackTrainer(stack, start, recipe, [1], ASCENT)
        trainer.fit(batches_of([0]))
        w = start[0].clone().requires_grad_()
        optimizer = torch.optim.SGD([w], 0.1, 0.9, weight_decay=1e-2)
        for epoch in range(2):
            for images, labels in batches_of([0])(epoch):

                def gradient(at, images=images[0], labels=labels[0]):
                    at = at.detach().requires_grad_()
                    logits = images.flatten(1) @ at[:576].view(3, 192).T + at[576:]
                    return torch.autograd.grad(F.cross_entropy(logits, labels), at)[0]

                g = gradient(w)
                scale = w.detach().abs()
                p = gradient(w.detach() + ASCENT.rho * scale**2 * g / ((scale * g).norm() + 1e-12))
                cosine = (g @ p) / (g.norm() * p.norm())
                w.grad = p - ASCENT.alpha * (g - cosine * g.norm() * p / p.norm())
                optimizer.step()
        torch.testing.assert_close(trainer.weights[0], w.detach(), rtol=1e-10, atol=1e-12)

    def test_no_radius_is_plain_sgd(self):
        plain, _ = train([0, 1])
        assert torch.equal(train([0, 1], ascent=Ascent(0.0, 0.3))[0], plain)
        torch.testing.assert_close(train([0, 1], ascent=Ascent(1e-9, 0.0))[0], plain, rtol=1e-6, atol=1e-7)
        assert not torch.allclose(train([0, 1], ascent=Ascent(0.5, 0.3))[0], plain, atol=1e-4)

    def test_where_nothing_pulls_nothing_moves(self):
        zero = torch.zeros(1, 4)
        assert torch.equal(ASCENT.uphill(torch.ones(1, 4), zero), zero) and torch.equal(
            ASCENT.direction(zero, zero), zero
        )
