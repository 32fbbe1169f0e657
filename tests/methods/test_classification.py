"""Pools, protocols, augmentations, accuracy of fresh networks on small made-up images, and DD-Ranking's scores."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import build_images
from data.images import ImagesConfig
from methods.core import classification as module
from methods.core.classification import AccuracyConfig, AccuracyJudge, RealSet, accuracy
from methods.core.image_protocols import AUGMENTATIONS, POOLS, PROTOCOLS, build_augment, pool
from methods.core.stack import Stack, StackTrainer
from methods.core.training import partition
from networks import build_network
from networks.flat import FlatModule
from utils.errors import UserError
from utils.metrics import augmentation_robustness, improvement
from utils.rng import derive_seed, generator

NET = "ConvNetD2W8"


class Split:
    """Images of three classes: one of three patterns under noise."""

    def __init__(self, seed, count, size=8, channels=3):
        rng = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(count) % 3
        patterns = torch.randn(3, channels, size, size, generator=torch.Generator().manual_seed(99))
        self.pixels = patterns[self.labels] + 1.5 * torch.randn(count, channels, size, size, generator=rng)

    def __len__(self):
        return len(self.labels)

    def images(self, indices):
        return self.pixels[indices]


class Data:
    name, classes, channels, size, device = "made up", ("a", "b", "c"), 3, 8, torch.device("cpu")
    mean, std, zca = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25), None

    def __init__(self):
        self.splits = {"train": Split(0, 90), "val": Split(1, 60), "test": Split(2, 75)}
        self.looks = []

    def __getitem__(self, split):
        self.looks.append(split)
        return self.splits[split]


@dataclasses.dataclass
class Small:
    """A training set; `seen` notes the rows of each batch."""

    images: torch.Tensor
    labels: torch.Tensor
    lr: float = 0.05
    augment: object = None
    seen: list = dataclasses.field(default_factory=list)

    def __len__(self):
        return len(self.images)

    def batch(self, rows, rng):
        self.seen.append(rows.tolist())
        images = self.images[rows]
        return images if self.augment is None else self.augment(images, rng), self.labels[rows]


def noise(images, rng):
    return images + 0.1 * torch.randn(images.shape, generator=rng)


def random_set(data, count=12, seed=0, lr=0.05, soft=False, augment=None):
    train = data.splits["train"]
    rows = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:count]
    labels = train.labels[rows]
    return Small(train.images(rows), F.one_hot(labels, 3).float() if soft else labels, lr, augment)


def judge(data=None, protocol="clean", seed=5, **options):
    settings = {"protocol": protocol, "num_eval": 2, "epoch_eval_train": 4} | options
    return AccuracyJudge(data or Data(), AccuracyConfig(**settings), seed)


class TestPools:
    @pytest.mark.parametrize(
        "letter, model, names",
        [
            ("S", "ConvNet", "ConvNet"),
            ("S", "ConvNetBN", "ConvNet"),
            ("S", "ResNet18BN_AP", "ResNet18"),
            ("S", "convnetd4bn", "convnetd4"),
            ("S", "ConvNet-4-BN", "ConvNet-4"),
            ("S", "ConvNetD4W64", "ConvNetD4W64"),
            ("M", "ConvNetD4", "ConvNet AlexNet VGG11 ResNet18_AP ResNet18"),
            ("W", "ConvNet", "ConvNetW32 ConvNetW64 ConvNetW128 ConvNetW256"),
            ("D", "ConvNet", "ConvNetD1 ConvNetD2 ConvNetD3 ConvNetD4"),
            ("A", "ConvNet", "ConvNetAS ConvNetAR ConvNetAL"),
            ("P", "ConvNet", "ConvNetNP ConvNetMP ConvNetAP"),
            ("N", "ConvNet", "ConvNetNN ConvNetBN ConvNetLN ConvNetIN ConvNetGN"),
            ("C", "ResNet18BN", "ResNet18BN ConvNet"),
            ("C", "ConvNet", "ConvNet"),
            ("B", "ConvNet", "ConvNet ConvNetBN ResNet18 ResNet18BN AlexNet VGG11 ResNet18_AP"),
            ("BN", "ConvNet", "ConvNet ConvNetBN ResNet18 ResNet18BN AlexNet VGG11 ResNet18_AP"),
            ("X", "ConvNetBN", "ConvNetBN"),
        ],
    )
    def test_letters(self, letter, model, names):
        assert pool(letter, model) == names.split()

    def test_every_member_can_be_built(self):
        for names in POOLS.values():
            for name in names:
                with torch.device("meta"):  # shapes only
                    build_network(name, 32, 10)


def trace(protocol, epochs, lr=1.0):
    """The rate of each epoch, and the epochs before which the momentum is lost."""
    recipe = PROTOCOLS[protocol].recipe(lr, epochs, 0.9, 0.0)
    stack, rates, lost = Stack(torch.nn.Linear(2, 2)), [], []
    trainer = StackTrainer(stack, stack.draw([0]), dataclasses.replace(recipe, lr={"net": 1e-6}), [0])

    def batches(epoch):
        rates.append(trainer.lr / 1e-6 * lr)
        if epoch and trainer._momentum is None:
            lost.append(epoch)
        return [(torch.ones(1, 1, 2), torch.zeros(1, 1, dtype=torch.long))]

    trainer.fit(batches)
    return rates, lost


class TestProtocols:
    @pytest.mark.parametrize("epochs, before, after", [(1000, 502, 499), (10, 7, 4)])
    @pytest.mark.parametrize("protocol", ["mtt", "dc_bench"])
    def test_rates_as_released(self, protocol, epochs, before, after):
        """Epoch indices 0–501 at α and 502–1000 at α/10; of 10 epochs 0–6 and 7–10; a new optimiser there."""
        rates, lost = trace(protocol, epochs)
        assert rates == pytest.approx([1.0] * before + [0.1] * after)
        assert len(rates) == epochs + 1 and lost == [before]

    @pytest.mark.parametrize("protocol", ["clean", "dd_ranking"])
    def test_rates_half_way(self, protocol):
        rates, lost = trace(protocol, 1000)
        assert rates == pytest.approx([1.0] * 500 + [0.1] * 500) and lost == []

    def test_one_epoch_is_at_the_full_rate(self):
        assert [trace(name, 1)[0] for name in PROTOCOLS] == [[1.0], [1.0, 1.0], [1.0, 1.0], [1.0]]

    def test_when_networks_are_looked_at(self):
        ranking = PROTOCOLS["dd_ranking"]
        assert ranking.select == "test" and "ON TEST" in ranking.about
        assert ranking.visited(1000, soft=False) == set(range(10, 1001, 10))
        assert ranking.visited(1000, soft=True) == set(range(20, 1001, 20))
        assert ranking.visited(7, soft=False) == {7}
        assert all(PROTOCOLS[name].select == "last" for name in ("clean", "mtt", "dc_bench"))
        assert PROTOCOLS["mtt"].visited(1001, soft=False) == {1001}

    @pytest.mark.parametrize("name", list(PROTOCOLS))
    def test_what_the_networks_are_trained_with(self, monkeypatch, name):
        made = []

        class Stop(Exception):
            pass

        def trainer(stack, weights, recipe, seeds, names):
            made.append((recipe, len(weights)))
            raise Stop

        monkeypatch.setattr(module, "StackTrainer", trainer)
        data = Data()
        for options in ({}, {"eval_aug": "dsa"}, {"eval_mom": 0.5, "eval_l2": 0.1, "epoch_eval_train": 20}):
            tested = judge(data, name, **({"num_eval": 5, "epoch_eval_train": 0} | options))
            with pytest.raises(Stop):
                tested.sets(lambda network: random_set(data, lr=0.3), NET)
        (recipe, count), (augmented, _), (told, _) = made
        late = name in ("mtt", "dc_bench")
        assert count == 5 and recipe.lr == {"net": 0.01 if name == "dc_bench" else 0.3}
        assert (recipe.momentum, recipe.weight_decay, recipe.gamma) == (0.9, 5e-4, 0.1)
        assert recipe.reset_momentum == late
        assert recipe.epochs == {"dc_bench": 301, "mtt": 1001}.get(name, 1000)
        assert augmented.epochs == 1000 + late and PROTOCOLS[name].batch == 256
        assert (told.momentum, told.weight_decay, told.epochs) == (0.5, 0.1, 20 + late)


class TestAugmentations:
    def test_who_says_which(self):
        own = noise
        for protocol in ("clean", "mtt", "dd_ranking"):
            assert judge(protocol=protocol).augmentation == "own" and judge(protocol=protocol).augment(own) is own
            assert judge(protocol=protocol, eval_aug="none").augment(own) is None
        bench = judge(protocol="dc_bench")
        assert bench.augmentation == "none" and bench.augment(own) is None
        assert judge(protocol="dc_bench", eval_aug="own").augment(own) is own
        digits = Data()
        digits.name = "MNIST"
        assert judge(digits, "dc_bench").augmentation == "crop_scale_rotate"
        assert judge(digits, "dc_bench", epoch_eval_train=0).epochs == 1000

    @pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if name != "none"])
    def test_they_follow_their_generator(self, name):
        data = SimpleNamespace(**{k: getattr(Data, k) for k in ("mean", "std", "device", "zca")}, size=32)
        images = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1
        change, copy, before = build_augment(name, data), images.clone(), torch.get_rng_state()
        results = [change(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, *range(2, 8))]
        assert torch.equal(results[0], results[1]) and torch.equal(images, copy)
        assert any(not torch.allclose(other, results[0], atol=1e-3) for other in results[2:])
        assert all(result.shape == images.shape and result.dtype == torch.float32 for result in results)
        assert torch.equal(torch.get_rng_state(), before)

    def test_bytes_are_normalised_again(self):
        """A crop without movement and no flip gives the pictures back, but for what bytes cannot say."""
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (Data.mean, Data.std))
        data = SimpleNamespace(mean=Data.mean, std=Data.std, device=Data.device, zca=None, size=32)
        pictures = torch.randint(256, (2, 3, 32, 32), generator=torch.Generator().manual_seed(0)) / 255
        images = (pictures - mean) / std
        change = build_augment("randaug", data)  # one of whose fourteen operations is none at all
        found = [change(images, torch.Generator().manual_seed(seed)) for seed in range(60)]
        nearest = min((result - images).abs().max() for result in found)
        assert nearest < 1.01 / 255 / min(Data.std)

    def test_one_draw_for_the_whole_batch(self):
        data = SimpleNamespace(mean=(0.0,) * 3, std=(1.0,) * 3, device=Data.device, zca=None, size=32)
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        for name in ("cifar_aug", "imagenet_aug", "autoaug", "randaug"):
            result = build_augment(name, data)(image.expand(4, -1, -1, -1), torch.Generator().manual_seed(4))
            assert all(torch.equal(each, result[0]) for each in result)

    def test_cifar_aug_removes_one_square(self):
        """Of up to 16 × 16, zero after normalisation, at one place for all."""
        data = SimpleNamespace(mean=(0.5,) * 3, std=(1.0,) * 3, device=Data.device, zca=None, size=32)
        change, areas = build_augment("cifar_aug", data), []
        for seed in range(40):
            result = change(torch.full((2, 3, 32, 32), 0.4), torch.Generator().manual_seed(seed))
            assert torch.equal(result[0], result[1])
            zero = result[0, 0] == 0
            rows, columns = (int(zero.any(axis).sum()) for axis in (1, 0))
            assert int(zero.sum()) == rows * columns  # a rectangle
            areas.append((rows, columns))
        assert all(8 <= side <= 16 for pair in areas for side in pair) and (16, 16) in areas
        assert any(min(pair) < 16 for pair in areas)

    def test_whitened_images_are_no_bytes(self):
        data = SimpleNamespace(mean=Data.mean, std=Data.std, device=Data.device, zca=object(), size=32)
        for name in ("cifar_aug", "imagenet_aug", "autoaug", "randaug"):
            with pytest.raises(UserError, match=f"--eval_aug {name} works on bytes, which whitened images are not"):
                build_augment(name, data)


class TestAccuracy:
    def test_against_a_loop(self):
        split = Split(4, 23)
        net = build_network(NET, 8, 3)
        right = sum(int(net(split.pixels[i : i + 1]).argmax()) == int(split.labels[i]) for i in range(23))
        for batch in (1, 7, 23, 100):
            assert accuracy(net, split, batch) == pytest.approx(100 * right / 23)

    def test_nan_is_not_the_first_class(self):
        split = Split(4, 30)
        assert accuracy(lambda images: torch.full((len(images), 3), float("nan")), split, 8) == 0
        assert accuracy(lambda images: torch.eye(3)[[0] * len(images)], split, 8) == pytest.approx(100 / 3)

    def test_no_graph(self):
        def logits(images):
            assert not torch.is_grad_enabled()
            return images.flatten(1)[:, :3]

        accuracy(logits, Split(4, 30), 8)


class TestJudge:
    @pytest.mark.parametrize("network", [NET, "ConvNetD2W8BN"])
    @pytest.mark.parametrize("protocol", ["clean", "mtt", "dd_ranking"])
    def test_a_report(self, protocol, network):
        data = Data()
        report = judge(data, protocol, num_eval=3).sets(lambda number: random_set(data), network)
        assert set(report.metrics) == {"acc"} and len(report.metrics["acc"]) == 3
        about = report.protocol
        assert about["epochs"] == 4 + (protocol == "mtt") and about["networks"] == 3 and about["split"] == "test"
        assert (about["network"], about["batch"], about["lr"]) == (network, 256, 0.05)
        assert (about["momentum"], about["weight_decay"], about["augmentation"]) == (0.9, 5e-4, "own")
        assert about["protocol"] == protocol and about["about"] == PROTOCOLS[protocol].about
        assert about["select"] == ("test" if protocol == "dd_ranking" else "last")
        assert set(data.looks) == {"test"}

    @pytest.mark.parametrize("soft, network", [(False, NET), (True, NET), (False, "ConvNetD2W8BN")])
    def test_networks_are_what_they_are_alone(self, soft, network):
        """Three in a stack against torch's own optimiser, network by network."""
        data = Data()
        tested = judge(data, "mtt", num_eval=3, epoch_eval_train=6, batch_train=5)
        report = tested.sets(lambda number: random_set(data, seed=number, soft=soft, augment=noise), network)
        for number in range(3):
            small = random_set(data, seed=number, soft=soft, augment=noise)
            flat = FlatModule(build_network(network, 8, 3))
            flat.load(Stack(flat.net).draw([derive_seed(5, "judge net", number)])[0])
            optimizer = torch.optim.SGD(flat.parameters(), 0.05, 0.9, weight_decay=5e-4)
            for epoch in range(7):
                if epoch == 5:
                    optimizer = torch.optim.SGD(flat.parameters(), 0.005, 0.9, weight_decay=5e-4)
                rng = generator(5, "judge", number, epoch)
                for rows in partition(12, 5, rng):
                    images, labels = small.batch(rows, rng)
                    optimizer.zero_grad()
                    F.cross_entropy(flat.net(images), labels).backward()
                    optimizer.step()
            test = data.splits["test"]
            flat.net.eval()  # running statistics, not those of the test images
            ours = 100 * float((flat.net(test.pixels).argmax(1) == test.labels).float().mean())
            assert report.metrics["acc"][number] == pytest.approx(ours, abs=1.4)  # at most one of 75 images
        assert len(set(report.metrics["acc"])) > 1

    def test_in_company_or_alone(self, monkeypatch):
        data = Data()
        source = lambda number: random_set(data, seed=number, augment=noise)  # noqa: E731
        together = judge(data, num_eval=4, epoch_eval_train=10, batch_train=5).sets(source, NET)
        groups = []
        real = AccuracyJudge._train

        def one_by_one(self, stack, group, *rest):
            groups.append(list(group))
            for number in group:
                yield from real(self, stack, [number], *rest)

        monkeypatch.setattr(AccuracyJudge, "_train", one_by_one)
        alone = judge(data, num_eval=4, epoch_eval_train=10, batch_train=5).sets(source, NET)
        assert groups == [[0, 1, 2, 3]]
        assert together.metrics["acc"] == pytest.approx(alone.metrics["acc"], abs=1.4)
        assert together.protocol == alone.protocol

    def test_sets_that_differ_in_size_or_rate_train_apart(self):
        data = Data()
        kinds = [{"count": 12}, {"count": 9}, {"count": 12, "lr": 0.02}, {"count": 12}]
        source = lambda number: random_set(data, seed=number, **kinds[number])  # noqa: E731
        mixed = judge(data, num_eval=4).sets(source, NET)
        assert mixed.protocol["lr"] == [0.05, 0.05, 0.02, 0.05]
        for number, kind in enumerate(kinds):
            same = judge(data, num_eval=4).sets(lambda _, n=number, k=kind: random_set(data, seed=n, **k), NET)
            assert mixed.metrics["acc"][number] == pytest.approx(same.metrics["acc"][number], abs=1.4)

    @pytest.mark.parametrize("network", [NET, "ConvNetD2W8BN"])
    def test_a_source_is_asked_once_a_network(self, network):
        data, asked = Data(), []
        judge(data, num_eval=3).sets(lambda number: (asked.append(number), random_set(data))[1], network)
        assert sorted(asked) == [0, 1, 2]

    @pytest.mark.parametrize("rate", [-0.1, 0.0, float("nan"), float("inf")])
    def test_a_rate_that_nobody_can_train_at(self, rate):
        data = Data()
        with pytest.raises(UserError, match=f"at the rate {rate:g}; give it a positive one"):
            judge(data).sets(lambda number: random_set(data, lr=rate), NET)
        judge(data, "dc_bench").sets(lambda number: random_set(data, lr=rate), NET)  # which has a rate of its own

    def test_each_epoch_meets_everything_once(self):
        data = Data()
        small = random_set(data)
        judge(data, num_eval=1, batch_train=5).sets(lambda number: small, NET)
        batches = small.seen[1:]  # the first look is at the kind of labels
        assert [len(rows) for rows in batches] == [5, 5, 2] * 4
        epochs = [[*batches[i], *batches[i + 1], *batches[i + 2]] for i in range(0, 12, 3)]
        assert all(sorted(rows) == list(range(12)) for rows in epochs) and epochs[0] != epochs[1]

    @pytest.mark.parametrize("network", [NET, "ConvNetD2W8BN"])
    def test_the_best_epoch_is_the_one_reported(self, monkeypatch, network):
        """DD-Ranking: three looks at test a network, of which the best is reported, and the last beside it."""
        data, looks, real = Data(), [], module.accuracy

        def watched(*args):
            looks.append(real(*args))
            return looks[-1]

        monkeypatch.setattr(module, "accuracy", watched)
        tested = judge(data, "dd_ranking", epoch_eval_train=30)
        report = tested.sets(lambda number: random_set(data, seed=number), network)
        assert len(looks) == 2 * 3
        columns = [looks[number::2] for number in range(2)] if network == NET else [looks[:3], looks[3:]]
        assert report.metrics["acc"] == [max(column) for column in columns]
        assert report.last["acc"] == [column[-1] for column in columns]
        epochs = [10 * (1 + column.index(max(column))) for column in columns]
        assert report.protocol["chosen_epochs"] == epochs

    def test_soft_labels_are_looked_at_half_as_often(self):
        data = Data()
        for soft, looks in ((False, 4), (True, 2)):
            data.looks.clear()
            judge(data, "dd_ranking", num_eval=1, epoch_eval_train=40).sets(
                lambda n, s=soft: random_set(data, soft=s), NET
            )
            assert data.looks == ["test"] * looks

    def test_validation_alone_while_distilling(self):
        data = Data()
        report = judge(data).sets(lambda number: random_set(data), NET, "val")
        assert set(data.looks) == {"val"} and report.protocol["split"] == "val"

    def test_equal_seeds_equal_reports(self):
        data = Data()
        once, again = (judge(data, num_eval=4).sets(lambda number: random_set(data), NET) for _ in range(2))
        assert once == again and len(set(once.metrics["acc"])) > 1
        other = judge(data, seed=6, num_eval=4).sets(lambda number: random_set(data), NET)
        assert other.metrics != once.metrics

    def test_judging_leaves_chance_and_the_set_alone(self):
        data = Data()
        small = random_set(data)
        images, before = small.images.clone(), torch.get_rng_state()
        judge(data).sets(lambda number: small, NET)
        assert torch.equal(small.images, images) and torch.equal(torch.get_rng_state(), before)

    def test_all_data_teach_more_than_a_few(self):
        data = Data()
        few = judge(data, epoch_eval_train=10).sets(lambda number: random_set(data, 3, seed=number), NET)
        full = judge(data).full(NET, 10, 16, 0.05, noise)
        assert full.mean_std()["acc"][0] > few.mean_std()["acc"][0] + 5 and full.mean_std()["acc"][0] > 70
        about = full.protocol
        assert (about["epochs"], about["batch"], about["lr"], about["select"]) == (10, 16, 0.05, "last")
        assert (about["protocol"], about["augmentation"], about["network"]) == ("clean", "own", NET)

    def test_real_images_as_a_set(self):
        split = Split(0, 20)
        every, some = RealSet(split, 0.1), RealSet(split, 0.1, noise, torch.tensor([4, 7, 9]))
        assert len(every) == 20 and len(some) == 3
        images, labels = every.batch(torch.tensor([3, 1]), generator(0))
        assert torch.equal(images, split.pixels[[3, 1]]) and labels.tolist() == [0, 1]
        images, labels = some.batch(torch.tensor([2, 0]), generator(0))
        assert torch.equal(images, noise(split.pixels[[9, 4]], generator(0))) and labels.tolist() == [0, 1]

    def test_a_rate_is_searched_for_each_network(self):
        data, rates = Data(), (1e-6, 0.05)
        source = lambda number: random_set(data, seed=number)  # noqa: E731
        report = judge(data, epoch_eval_train=10).searched(source, NET, rates=rates)
        each = [
            judge(data, epoch_eval_train=10).sets(lambda n, r=rate: random_set(data, seed=n, lr=r), NET).metrics["acc"]
            for rate in rates
        ]
        assert report.metrics["acc"] == [max(pair) for pair in zip(*each, strict=True)]
        assert report.protocol["lr"] == [0.05, 0.05] and "best of 2 rates ON TEST" in report.protocol["about"]


class TestRanking:
    @pytest.mark.parametrize(
        "advantage, score", [(-100, 0.0), (-5, 0.248192), (0, 0.268941), (5, 0.290755), (100, 1.0)]
    )
    def test_the_map(self, advantage, score):
        found = improvement(0, 2 * advantage, 0, 0)["lrs"], augmentation_robustness(advantage, 0, advantage, 0)
        assert found == (pytest.approx(score, abs=1e-6), pytest.approx(score, abs=1e-6))

    def test_the_scores_of_percentages(self):
        """HLR 20, IOR 10: the released program makes −0.154 of them, the formula 0.248."""
        assert improvement(85, 65, 60, 50) == {"hlr": 20, "ior": 10, "lrs": pytest.approx(0.248192, abs=1e-6)}
        assert improvement(85, 65, 60, 50, weight=1)["lrs"] == pytest.approx(improvement(0, 20, 0, 0)["lrs"])
        assert augmentation_robustness(60, 50, 40, 40) == pytest.approx(0.290755, abs=1e-6)
        assert augmentation_robustness(60, 50, 40, 45, weight=0) < 0.2689


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """300 drawn shapes of 16 pixels, a tenth held out."""
    cfg = ImagesConfig(dataset="toy", res=16, toy_images=300, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return build_images(cfg, torch.device("cpu"))


class TestDrawnShapes:
    """The toy set, through everything that images go through."""

    def test_more_images_more_accuracy(self, shapes):
        """One of each class teaches next to nothing, all 270 much: 17 % are chance."""
        tested, train = judge(shapes, epoch_eval_train=20, batch_train=32), shapes["train"]

        def one_each(number):
            picks = [own[number % len(own)] for own in map(train.indices_of, range(6))]
            return RealSet(train, 0.05, rows=torch.stack(picks))

        one = tested.sets(one_each, "ConvNetD2W16").mean_std()["acc"][0]
        every = tested.sets(lambda number: RealSet(train, 0.05), "ConvNetD2W16")
        assert 10 < one < 28 and every.mean_std()["acc"][0] > one + 10
        assert tested.full("ConvNetD2W16", 20, 32, 0.05, None).metrics["acc"] == every.metrics["acc"]

    @pytest.mark.parametrize("name", AUGMENTATIONS)
    def test_each_augmentation_can_be_trained_with(self, shapes, name):
        tested = judge(shapes, "dc_bench", epoch_eval_train=1, eval_aug=name, num_eval=1)
        real = RealSet(shapes["train"], 0.01, tested.augment(None), torch.arange(12))
        report = tested.sets(lambda number: real, "ConvNetD2W8")
        assert report.protocol["augmentation"] == name and 0 <= report.metrics["acc"][0] <= 100

    def test_whitened_shapes_have_no_bytes(self, tmp_path):
        cfg = ImagesConfig(dataset="toy", res=8, toy_images=60, zca=True, cache_dir=str(tmp_path))
        with pytest.raises(UserError, match=r"--eval_aug autoaug works on bytes"):
            judge(build_images(cfg, torch.device("cpu")), "dc_bench", eval_aug="autoaug").augment(None)
