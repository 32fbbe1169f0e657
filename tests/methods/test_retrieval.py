"""Captioned data, the protocols, and fresh towers trained and scored on the drawn toy set."""

import dataclasses
from collections import Counter

import pytest
import torch

from data.captions import DataConfig
from methods.core import retrieval as module
from methods.core.retrieval import PROTOCOLS, Corpus, Judge, JudgeConfig, PairSet
from methods.lors import contrastive_loss
from methods.pairs import PairsConfig, start_pairs
from networks.towers import TowerConfig
from utils.errors import UserError
from utils.metrics import retrieval_recall
from utils.rng import derive_seed

CHANCE = (0.5 + 2.5 + 5.0) / 3  # r_mean in % among 200 images


def loss_fn(u, v, similarity):
    return contrastive_loss(u @ v.T / 0.07, similarity)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_set(corpus, count=12, lr=(0.1, 0.1), seed=0, similarity=None):
    images, captions = corpus.random_pairs(count, generator(seed))
    real = corpus["train"].eval_images(images), corpus.texts("train", captions)
    return PairSet(*real, similarity, {"img": lr[0], "txt": lr[1]})


class TestCorpus:
    def test_random_pairs(self, corpus):
        train = corpus["train"]
        images, captions = corpus.random_pairs(40, generator())
        assert len(set(images.tolist())) == 40
        assert torch.equal(train.image_of[captions], images)
        every = [corpus.random_pairs(96, generator(seed)) for seed in range(20)]
        assert all(sorted(images.tolist()) == list(range(96)) for images, _ in every)
        # Over twenty draws an image meets all of its five captions, about as often each.
        places = Counter(int(c) % 5 for _, captions in every for c in captions)
        assert set(places) == set(range(5)) and max(places.values()) < 1.25 * min(places.values())
        with pytest.raises(UserError, match="num_pairs is 97, but toy trains on 96 images"):
            corpus.random_pairs(97, generator())

    @pytest.mark.parametrize("captions, count", [("all", 480), ("one", 96)])
    def test_an_epoch(self, corpus, tmp_path, captions, count):
        """Each image comes with a caption of its own; a last, smaller batch is dropped."""
        plain = Corpus(
            DataConfig(dataset="toy", image_size=16, toy_images=96, no_aug=True, cache_dir=str(tmp_path)),
            TowerConfig(image_encoder="ConvNetD2W8", text_encoder="tfidf", text_dim=64),
            torch.device("cpu"),
        )
        train = plain["train"]
        images = {image.numpy().tobytes(): i for i, image in enumerate(train.eval_images(torch.arange(96)))}
        words: dict[bytes, set[int]] = {}  # two captions may embed alike
        for i, text in enumerate(plain.texts("train", slice(None))):
            words.setdefault(text.numpy().tobytes(), set()).add(int(train.image_of[i]))
        seen, batches = Counter(), list(plain.epoch(25, generator(), captions))
        assert [len(batch[0]) for batch in batches] == [25] * (count // 25)
        for pixels, texts, similarity in batches:
            assert similarity is None
            for image, text in zip(pixels, texts, strict=True):
                number = images[image.numpy().tobytes()]
                assert number in words[text.numpy().tobytes()]
                seen[number] += 1
        assert max(seen.values()) <= (5 if captions == "all" else 1)
        whole = list(plain.epoch(count, generator(1), captions))
        assert len(whole) == 1 and len(whole[0][0]) == count

    def test_epochs_follow_their_generator(self, corpus):
        first, again, other = (
            [part for batch in corpus.epoch(32, generator(seed), "one") for part in batch[:2]] for seed in (1, 1, 2)
        )
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first[0], other[0])

    def test_recall_is_that_of_the_towers_as_they_are(self, corpus):
        towers = corpus.towers(16, 0)
        val = corpus["val"]
        with torch.no_grad():
            towers.eval()
            u = towers.embed_images(val.eval_images(torch.arange(val.num_images)))
            v = towers.embed_texts(corpus.texts("val", slice(None)))
        towers.train()  # dropout must not play a part
        expected = retrieval_recall(u, v, val.image_of)
        for batch in (7, 200):
            assert corpus.recall(towers, "val", batch) == pytest.approx(expected, abs=0.11)
        assert corpus.recall(towers, "test") != corpus.recall(towers, "val")

    def test_texts(self, corpus):
        every = corpus.texts("train", slice(None))
        assert every.shape == (480, 16) and every.dtype == torch.float32
        for rows in ([3, 1, 3], torch.tensor([3, 1, 3])):
            assert torch.equal(corpus.texts("train", rows), every[[3, 1, 3]])


class TestProtocols:
    def test_lors_looks_at_eleven_of_101_epochs(self):
        """The reference counts from 0: 0, 10, …, 100; here epochs are counted from 1."""
        lors = PROTOCOLS["lors"]
        assert lors.epochs == 101 and lors.visited(101) == {1 + 10 * i for i in range(11)}
        assert lors.select == "test" and lors.batch == 128 and lors.batches == "subsets"

    def test_vldd_looks_once_at_the_last_of_51_epochs(self):
        vldd = PROTOCOLS["vldd"]
        assert vldd.epochs == 51 and vldd.visited(51) == {51}
        assert vldd.select == "last" and vldd.batch == 64 and vldd.rates == "image" and vldd.decay is None

    def test_clean_selects_on_validation(self):
        clean = PROTOCOLS["clean"]
        assert clean.select == "val" and clean.visited(100) == {1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100}

    def test_any_number_of_epochs_can_be_visited(self):
        for epochs in range(1, 130):
            visited = PROTOCOLS["lors"].visited(epochs)
            assert {1, epochs} <= visited <= set(range(1, epochs + 1)) and len(visited) <= 20

    @pytest.mark.parametrize("name", list(PROTOCOLS))
    def test_what_the_networks_are_trained_with(self, corpus, monkeypatch, name):
        made = []

        class Stop(Exception):
            pass

        def trainer(net, groups, recipe, seed):
            made.append((recipe, groups))
            raise Stop

        monkeypatch.setattr(module, "Trainer", trainer)
        judge = Judge(corpus, JudgeConfig(protocol=name), 16, loss_fn, 0)
        with pytest.raises(Stop):
            judge.pairs(lambda network: [random_set(corpus, lr=(0.3, 0.2))])
        recipe, groups = made[0]
        assert recipe.epochs == {"clean": 100, "vldd": 51, "lors": 101}[name]
        assert recipe.lr == {"img": 0.3, "txt": 0.3 if name == "vldd" else 0.2}
        assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)
        assert recipe.milestones == ((51,) if name == "lors" else ()) and recipe.gamma == 0.1
        assert list(groups) == ["img", "txt"] and sum(map(len, groups.values())) == len(list(judge.towers.parameters()))

    def test_batches_of_a_partition(self):
        parts = list(module._rows(100, 64, "partition", generator()))
        assert [len(part) for part in parts] == [64, 36]
        assert sorted(torch.cat(parts).tolist()) == list(range(100))

    def test_batches_of_subsets(self):
        """499 pairs, 128 a batch: four independent draws, which cover 69 % of the pairs on average."""
        cover = []
        for seed in range(50):
            parts = list(module._rows(499, 128, "subsets", generator(seed)))
            assert [len(part) for part in parts] == [128] * 4
            assert all(len(set(part.tolist())) == 128 for part in parts)
            cover.append(len(set(torch.cat(parts).tolist())) / 499)
        assert sum(cover) / len(cover) == pytest.approx(0.69, abs=0.01)
        assert [len(part) for part in module._rows(99, 128, "subsets", generator())] == [99]

    @pytest.mark.parametrize(
        "pairs, protocol, steps", [(100, "vldd", 102), (1000, "vldd", 816), (99, "lors", 101), (499, "lors", 404)]
    )
    def test_optimiser_steps(self, pairs, protocol, steps):
        about = PROTOCOLS[protocol]
        batches = sum(1 for _ in module._rows(pairs, about.batch, about.batches, generator()))
        assert batches * about.epochs == steps


def judge(corpus, protocol="vldd", **options):
    settings = {"protocol": protocol, "num_eval": 2, "epoch_eval_train": 3} | options
    return Judge(corpus, JudgeConfig(**settings), 16, loss_fn, 5)


class TestJudge:
    @pytest.mark.parametrize("protocol", list(PROTOCOLS))
    def test_when_which_split_is_scored(self, corpus, monkeypatch, protocol):
        looks = []
        real = corpus.recall
        monkeypatch.setattr(
            corpus, "recall", lambda towers, split, batch: (looks.append(split), real(towers, split))[1]
        )
        report = judge(corpus, protocol).pairs(lambda network: [random_set(corpus)])
        twice = [epoch != 3 for epoch in report.protocol["chosen_epochs"]]  # the last epoch has a look of its own
        each = {"clean": ["val"] * 3 + ["test"], "vldd": ["test"], "lors": ["test"] * 3}[protocol]
        assert looks == [look for more in twice for look in each + ["test"] * (more and protocol == "clean")]
        assert len(report.metrics["r_mean"]) == 2
        about = report.protocol
        assert (about["protocol"], about["split"], about["networks"], about["epochs"]) == (protocol, "test", 2, 3)
        assert about["select"] == PROTOCOLS[protocol].select and about["about"]

    def test_validation_alone_while_distilling(self, corpus, monkeypatch):
        real = corpus.recall

        def recall(towers, split, batch):
            assert split == "val"
            return real(towers, split)

        monkeypatch.setattr(corpus, "recall", recall)
        assert judge(corpus, "clean").pairs(lambda network: [random_set(corpus)], "val").protocol["split"] == "val"

    def test_the_selected_network_is_the_one_reported(self, corpus, monkeypatch):
        """Validation prefers the first of three epochs; the reported score is that of the first epoch's weights."""
        states, order = [], iter([3.0, 2.0, 1.0, 5.0, 0.0])
        real = corpus.recall

        def recall(towers, split, batch):
            states.append((split, torch.cat([p.detach().reshape(-1).clone() for p in towers.parameters()])))
            return real(towers, split) | {"r_mean": next(order)}

        monkeypatch.setattr(corpus, "recall", recall)
        report = judge(corpus, "clean", num_eval=1).pairs(lambda network: [random_set(corpus)])
        assert report.protocol["chosen_epochs"] == [1] and report.protocol["validation_r_mean"] == 3.0
        assert report.metrics["r_mean"] == [0.0] and report.last["r_mean"] == [5.0]
        assert [split for split, _ in states] == ["val"] * 3 + ["test"] * 2
        assert torch.equal(states[3][1], states[2][1]) and torch.equal(states[4][1], states[0][1])
        assert not torch.equal(states[4][1], states[2][1])

    def test_equal_seeds_equal_reports(self, corpus):
        once, again = (judge(corpus).pairs(lambda network: [random_set(corpus)]) for _ in range(2))
        assert once == again
        assert once.metrics["r_mean"][0] != once.metrics["r_mean"][1]  # networks differ
        other = Judge(corpus, judge(corpus).cfg, 16, loss_fn, 6).pairs(lambda network: [random_set(corpus)])
        assert other.metrics != once.metrics

    def test_each_network_starts_from_its_own_weights(self, corpus, monkeypatch):
        tested, seeds = judge(corpus, num_eval=3), []
        renew = tested.towers.renew
        monkeypatch.setattr(tested.towers, "renew", lambda seed: (seeds.append(seed), renew(seed))[1])
        tested.pairs(lambda network: [random_set(corpus)])
        tested.pairs(lambda network: [random_set(corpus, seed=1)])
        assert len(set(seeds)) == 3 and seeds[:3] == seeds[3:]  # the same three for every set that is judged

    def test_judging_leaves_the_pairs_alone(self, corpus):
        pairs = random_set(corpus, similarity=torch.eye(12) + 0.1)
        copies = [part.clone() for part in (pairs.images, pairs.texts, pairs.similarity)]
        judge(corpus).pairs(lambda network: [pairs])
        for part, copy in zip((pairs.images, pairs.texts, pairs.similarity), copies, strict=True):
            assert torch.equal(part, copy)
        assert pairs.lr == {"img": 0.1, "txt": 0.1}

    def test_the_similarity_of_a_batch_is_that_of_its_pairs(self, corpus):
        marks = torch.arange(12.0)[:, None] * 100 + torch.arange(12.0)
        pairs, seen = random_set(corpus, similarity=marks), []
        towers_input = []

        def loss(u, v, similarity):
            seen.append(similarity)
            return loss_fn(u, v, None)

        tested = Judge(corpus, JudgeConfig(protocol="lors", num_eval=1, epoch_eval_train=1, batch_train=5), 16, loss, 0)
        embed = tested.towers.embed_encoded
        tested.towers.embed_encoded = lambda images: (towers_input.append(images), embed(images))[1]
        tested.pairs(lambda network: [pairs])
        for images, square in zip(towers_input, seen, strict=False):
            rows = [next(i for i in range(12) if torch.equal(image, pairs.images[i])) for image in images]
            assert torch.equal(square, marks[rows][:, rows])
        assert [len(square) for square in seen] == [5, 5, 5]

    def test_a_source_is_asked_once_a_network(self, corpus):
        asked = []
        judge(corpus, num_eval=3).pairs(lambda network: (asked.append(network), [random_set(corpus, seed=network)])[1])
        assert asked == [0, 1, 2]


class TestPhases:
    """A network is trained on one phase after another, all epochs on each."""

    def test_the_second_begins_where_the_first_ended(self, corpus, monkeypatch):
        """Against a loop by hand: SGD with momentum anew on each phase, its own rates and similarity."""
        seen, epochs = [], 3
        phases = [
            random_set(corpus, 6, (0.2, 0.1), 1),
            random_set(corpus, 5, (0.05, 0.3), 2, torch.eye(5) + 0.1),
        ]
        real = corpus.recall

        def recall(towers, split, batch):
            seen.append({name: value.clone() for name, value in towers.state_dict().items()})
            return real(towers, split)

        monkeypatch.setattr(corpus, "recall", recall)
        tested = judge(corpus, "clean", num_eval=1, epoch_eval_train=epochs)
        for layer in tested.towers.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0  # whose masks are another chance than that of a loop by hand
        report = tested.pairs(lambda network: phases)
        assert report.protocol["epochs"] == 6 and len(seen) >= 6

        towers = tested.towers.renew(derive_seed(5, "judge net", 0)).train()
        done = 0
        for pairs in phases:
            groups = [{"params": flat.parameters(), "lr": pairs.lr[group]} for group, flat in towers.flat.items()]
            optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=5e-4)
            for _ in range(epochs):
                loss = loss_fn(towers.embed_images(pairs.images), towers.embed_texts(pairs.texts), pairs.similarity)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                for name, value in towers.state_dict().items():
                    torch.testing.assert_close(seen[done][name], value, rtol=1e-4, atol=1e-5)
                done += 1
        assert done == 6

    def test_every_phase_has_looks_of_its_own(self, corpus, monkeypatch):
        looks, real = [], corpus.recall
        monkeypatch.setattr(
            corpus, "recall", lambda towers, split, batch: (looks.append(split), real(towers, split))[1]
        )
        sets = [random_set(corpus, 6, seed=1), random_set(corpus, 5, seed=2)]
        for protocol, wanted in (("vldd", ["test"]), ("lors", ["test"] * 6)):
            looks.clear()
            judge(corpus, protocol, num_eval=1).pairs(lambda network: sets)
            assert looks[: len(wanted)] == wanted and len(looks) <= len(wanted) + 1

    def test_the_second_phase_matters(self, corpus):
        first, second = random_set(corpus, 6, seed=1), random_set(corpus, 6, seed=2)
        both, alone = (judge(corpus).pairs(lambda network, s=sets: s) for sets in ([first, second], [first]))
        assert both.metrics != alone.metrics and alone.protocol["epochs"] == 3


class TestFrozenTrunk:
    @pytest.fixture
    def frozen(self, tmp_path):
        data = DataConfig(dataset="toy", image_size=16, toy_images=40, cache_dir=str(tmp_path))
        options = {"image_trainable": False, "image_projection": True, "joint_width": 16}
        towers = TowerConfig(image_encoder="ConvNetD2W8", text_encoder="tfidf", text_dim=16, **options)
        return Corpus(data, towers, torch.device("cpu"))

    def test_a_split_is_encoded_once(self, frozen):
        """Whatever the heads, and whichever towers ask; the recall is that of encoding anew."""
        asked, found = [], []
        for seed in (0, 1):
            towers = frozen.towers(16, seed)
            towers.image.trunk.register_forward_pre_hook(lambda net, args: asked.append(len(args[0])))
            found.append([frozen.recall(towers, split, 64) for split in ("val", "test", "val")])
            assert sum(asked) == 400  # 200 of each split
            part = frozen["val"]
            with torch.no_grad():
                u = towers.image.joint(towers.image.trunk(part.eval_images(torch.arange(part.num_images))))
                v = towers.text(frozen.texts("val", slice(None)))
            u, v = (torch.nn.functional.normalize(rows, dim=1) for rows in (u, v))
            assert found[-1][0] == pytest.approx(retrieval_recall(u, v, part.image_of), abs=0.11)
            assert found[-1][0] == found[-1][2]
            asked[:] = [400]
        assert found[0] != found[1]

    def test_a_judge_encodes_a_set_once_a_network(self, frozen):
        asked = []
        tested = judge(frozen, num_eval=2, epoch_eval_train=5)
        tested.corpus.recall(tested.towers, "test")
        tested.towers.image.trunk.register_forward_pre_hook(lambda net, args: asked.append(len(args[0])))
        pairs = random_set(frozen)
        tested.pairs(lambda network: [pairs])
        assert asked == [12, 12]

    def test_a_trunk_that_learns_is_asked_each_time(self, corpus):
        asked = []
        towers = corpus.towers(16, 0)
        towers.image.trunk.register_forward_pre_hook(lambda net, args: asked.append(len(args[0])))
        for _ in range(2):
            corpus.recall(towers, "val")
        assert sum(asked) == 400


def test_towers_learn_to_retrieve(tmp_path):
    """After five epochs on 600 drawn images: far better than chance on scenes never seen."""
    data = DataConfig(dataset="toy", image_size=16, toy_images=600, cache_dir=str(tmp_path))
    towers = TowerConfig(image_encoder="ConvNetD2W16", text_encoder="tfidf", text_dim=32, joint_width=32)
    found = Corpus(data, towers, torch.device("cpu"))
    untrained = found.recall(found.towers(16, 0), "test")["r_mean"]
    cfg = JudgeConfig(protocol="clean", num_eval=1)
    report = Judge(found, cfg, 16, loss_fn, 0).full(5, 64, {"img": 0.2, "txt": 0.2}, "all")
    assert untrained < 2 * CHANCE
    assert report.metrics["r_mean"][0] > 4 * CHANCE
    assert 1 <= report.protocol["chosen_epochs"][0] <= 5


def test_undistilled_pairs_score_as_random_ones(corpus):
    """At step 0 the learned pairs are real ones, so nothing yet sets them apart from a random choice."""
    tested = judge(corpus, num_eval=6, epoch_eval_train=20)
    (start,) = start_pairs(corpus, PairsConfig(num_pairs=(24,)), 16, generator(3)).pair_sets()
    assert start.similarity is None and start.lr == {"img": pytest.approx(0.1), "txt": pytest.approx(0.1)}
    ours = tested.pairs(lambda network: [start]).mean_std()["r_mean"]
    random = tested.pairs(lambda network: [random_set(corpus, 24, seed=network)]).mean_std()["r_mean"]
    assert abs(ours[0] - random[0]) < 2 * max(random[1], 0.5)
    broken = dataclasses.replace(start, texts=start.texts.roll(1, 0))  # what it means to do worse: wrong captions
    assert tested.pairs(lambda network: [broken]).mean_std()["r_mean"][0] < ours[0]
