"""Networks trained for a number of steps: each as it is alone under torch's own optimiser, looked at when asked."""

import pytest
import torch
import torch.nn.functional as F

from data import build_images
from data.images import ImagesConfig
from methods.core import stepping
from methods.core.classification import RealSet
from methods.core.inner import InnerAdam, InnerSGD
from methods.core.stack import Stack
from methods.core.stepping import StepConfig, StepJudge, some_rows
from networks import build_network
from utils.errors import RunError, UserError
from utils.rng import derive_seed, generator, seeded

NET = "ConvNetD1W8"


@pytest.fixture(scope="module")
def digits():
    return build_images(ImagesConfig(dataset="digits", train_limit=40), "cpu")


def noise(images, rng):
    return images + 0.1 * torch.randn(images.shape, generator=rng)


def few(data, number=0, each=2, lr=0.01, augment=None):
    """A set of a few images of each class, its own for each network."""
    rng = generator(number, "few")
    own = [data["train"].indices_of(label) for label in range(10)]
    rows = torch.cat([rows[torch.randperm(len(rows), generator=rng)[:each]] for rows in own])
    return RealSet(data["train"], lr, augment, rows)


def judged(data, *looks, select="last", count=2, source=None, inner=InnerAdam, batch=0, split="test", network=NET):
    judge = StepJudge(data, StepConfig(num_eval=count, eval_steps=looks, select_step=select), 5)
    return judge.sets(source or (lambda number: few(data, number)), network, inner, batch, split)


def by_torch(data, number, steps, optimiser, batch, split="test", network=NET):
    """Accuracy and loss of one network after so many steps of a torch optimiser, as an ordinary loop has them."""
    with seeded(derive_seed(5, "judge net", number)):
        net = build_network(network, 8, 10, 1)
    rng, known, opt = generator(5, "judge steps", number), few(data, number, augment=noise), optimiser(net.parameters())
    for _ in range(steps):
        images, labels = known.batch(some_rows(len(known), batch, rng), rng)
        opt.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        opt.step()
    net.eval()
    test = data[split]
    with torch.no_grad():
        logits = net(test.images(torch.arange(len(test))))
    acc = 100 * float((logits.argmax(1) == test.labels).double().mean())
    return acc, float(F.cross_entropy(logits, test.labels))


class TestSteps:
    @pytest.mark.parametrize(
        "inner, optimiser, network",
        [
            (InnerAdam, lambda params: torch.optim.Adam(params, 0.01), NET),
            # Adam moves a bias in front of a batch norm by rounding alone.
            (InnerSGD, lambda params: torch.optim.SGD(params, 0.01), NET + "BN"),
            (
                lambda lr: InnerSGD(lr, 0.9, 5e-4),
                lambda params: torch.optim.SGD(params, 0.01, momentum=0.9, weight_decay=5e-4),
                NET,
            ),
        ],
    )
    @pytest.mark.parametrize("vectorised", [True, False])
    def test_side_by_side_is_alone_under_torch(self, digits, inner, optimiser, network, vectorised, monkeypatch):
        monkeypatch.setattr(Stack, "at_once", lambda self, images: vectorised and len(images) > 1)
        report = judged(
            digits, 4, 9, inner=inner, batch=7, source=lambda n: few(digits, n, augment=noise), network=network
        )
        for steps in (4, 9):
            for number in range(2):
                acc, loss = by_torch(digits, number, steps, optimiser, 7, network=network)
                assert report.metrics[f"loss@{steps}"][number] == pytest.approx(loss, abs=2e-4)
                assert report.metrics[f"acc@{steps}"][number] == pytest.approx(acc, abs=0.6)  # an image at a tie

    def test_the_rate_falls_at_its_step(self, digits):
        """After 3 steps at the full rate, at once for the fourth."""

        def inner(lr):
            return InnerSGD(lr, milestones=(3,), gamma=0.0)

        report = judged(digits, 2, 3, 6, inner=inner)
        assert report.metrics["loss@3"] == report.metrics["loss@6"] != report.metrics["loss@2"]
        assert report.protocol["optimiser"] == "SGD (rate x 0 at 3)"

    def test_so_many_steps_and_no_more(self, digits, monkeypatch):
        seen, gradient = [], Stack.gradient
        monkeypatch.setattr(Stack, "gradient", lambda self, *args: seen.append(args[1].shape) or gradient(self, *args))
        judged(digits, 5, 3, 3, batch=6)
        assert seen == [(2, 6, 1, 8, 8)] * 5

    def test_networks_of_other_rates_or_sizes_train_apart(self, digits):
        def source(number):
            return few(digits, number, each=1 + (number == 2), lr=0.02 if number == 1 else 0.01)

        report = judged(digits, 4, count=4, source=source)
        assert report.protocol["lr"] == [0.01, 0.02, 0.01, 0.01]
        assert report.metrics["loss"][0] == judged(digits, 4, count=1, source=source).metrics["loss"][0]

    def test_it_teaches(self, digits):
        report = judged(digits, 60, source=lambda number: few(digits, number, each=4))
        assert report.mean_std()["acc"][0] > 55 and report.mean_std()["loss"][0] < 1.6

    @pytest.mark.parametrize("label", ["", "random,"])
    def test_a_loss_that_is_not_finite(self, digits, monkeypatch, label):
        gradient, steps = Stack.gradient, []

        def broken(self, weights, images, labels):
            loss, grads = gradient(self, weights, images, labels)
            steps.append(1)
            return torch.where(torch.tensor([False, len(steps) >= 23]), torch.nan, loss), grads

        monkeypatch.setattr(Stack, "gradient", broken)
        judge = StepJudge(digits, StepConfig(num_eval=2, eval_steps=(30,)), 0)
        with pytest.raises(RunError, match=f"^{label} ?network 2/2, step 23: the loss is not finite"):
            judge.sets(lambda number: few(digits, number), NET, InnerAdam, 0, label=label)


class TestRows:
    def test_distinct_in_order_and_uniform(self):
        rng, met = generator(0, "rows"), torch.zeros(10)
        for _ in range(600):
            rows = some_rows(10, 4, rng)
            assert len(set(rows.tolist())) == 4 and rows.tolist() == sorted(rows.tolist())
            met[rows] += 1
        assert met.min() > 190 and met.max() < 290  # 240 on average, deviation 12

    @pytest.mark.parametrize("size", [0, 10, 11])
    def test_all_of_them(self, size):
        assert some_rows(10, size, generator(0, "rows")).tolist() == list(range(10))


class TestReport:
    def test_what_it_says(self, digits):
        report = judged(digits, 2, 4, batch=50)
        assert set(report.metrics) == {"acc", "loss", "acc@2", "loss@2", "acc@4", "loss@4"}
        assert report.metrics["acc"] == report.metrics["acc@4"] == report.last["acc"]
        about = {"networks": 2, "steps": 4, "select": "last", "chosen_steps": [4, 4], "optimiser": "Adam", "lr": 0.01}
        about |= {"batch": 20, "augmentation": "own", "network": NET, "split": "test", "protocol": "steps"}
        assert report.protocol == about | {"about": "4 steps of Adam, of which the last counts"}

    @pytest.mark.parametrize("select", ["val", "train"])
    def test_the_best_step_counts(self, digits, monkeypatch, select):
        """Network by network, by what the split that chooses says; each state is looked at once a split."""
        table = iter([50.0, 20.0, 30.0, 40.0])  # network 0 and 1 after one step, then after two
        asked, test = [], iter([1.0, 2.0, 3.0, 4.0])

        def measured(logits, split, batch):
            asked.append(split is digits["test"])
            return {"acc": next(test if asked[-1] else table), "loss": 0.5}

        monkeypatch.setattr(stepping, "accuracy_and_loss", measured)
        report = judged(digits, 1, 2, select=select)
        assert report.metrics["acc"] == [1.0, 4.0] and report.last["acc"] == [3.0, 4.0]
        assert report.protocol["chosen_steps"] == [1, 2] and len(asked) == 8
        told = {"val": {"validation_acc": 45.0}, "train": {"training_acc": 45.0, "training_loss": 0.5}}[select]
        assert told.items() <= report.protocol.items()

    def test_validation_alone_while_distilling(self, digits, monkeypatch):
        seen, measure = [], stepping.accuracy_and_loss
        monkeypatch.setattr(
            stepping,
            "accuracy_and_loss",
            lambda logits, split, batch: seen.append(split) or measure(logits, split, batch),
        )
        report = judged(digits, 1, 2, select="val", split="val")
        assert seen == [digits["val"]] * 4 and report.protocol["split"] == "val"

    def test_equal_seeds_equal_reports(self, digits):
        assert judged(digits, 3, batch=5) == judged(digits, 3, batch=5)

    def test_chance_is_left_alone(self, digits):
        torch.manual_seed(3)
        before = torch.get_rng_state()
        judged(digits, 2)
        assert torch.equal(before, torch.get_rng_state())

    def test_mistakes(self, digits):
        with pytest.raises(UserError, match="--eval_steps names no step"):
            StepConfig(eval_steps=()).check()
        with pytest.raises(UserError, match="rate -1; give it a positive one"):
            judged(digits, 2, source=lambda number: few(digits, lr=-1.0))
        bare = build_images(ImagesConfig(dataset="digits", holdout=0), "cpu")
        with pytest.raises(UserError, match="--holdout"):
            judged(bare, 2, select="val")
