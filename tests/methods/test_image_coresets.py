"""Coresets of handwritten digits: what is chosen, from what, and how eval.py judges it."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from data import build_images
from data.images import ImagesConfig
from data.zca import ZCA
from methods import image_coresets
from methods.command import command
from methods.core.classification import AccuracyJudge, RealSet
from methods.core.coresets import CoresetConfig, herding, k_center
from methods.core.evaluation import Report
from methods.core.store import TrajectoryStore
from methods.image_coresets import ImageCoresets
from methods.image_judging import fresh_network
from tests.conftest import works
from utils.errors import UserError
from utils.files import save_tensors

DATA = ("--method", "mtt", "--dataset", "digits", "--train_limit", 20, "--model", "ConvNetD1W8", "--device", "cpu")
EXPERTS = ("--num_experts", 2, "--train_epochs", 4, "--batch_train", 32, "--lr_teacher", 0.05)
JUDGED = ("--num_eval", 2, "--epoch_eval_train", 2)
KINDS = ("herding", "kcenter", "forgetting")
LEAF = Path("digits/ConvNetD1W8")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Two experts of four epochs in `made / buffers`, whitened ones in `made / whitened`."""
    root = tmp_path_factory.mktemp("made")
    for name, more in (("buffers", ()), ("whitened", ("--zca",))):
        works("buffer", *DATA, *EXPERTS, *more, "--buffer_path", root / name, "--cache_dir", root / "cache")
    return root


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def data(made):
    cfg = ImagesConfig(dataset="digits", train_limit=20, cache_dir=str(made / "cache"))
    return build_images(cfg, torch.device("cpu"))


@pytest.fixture
def store(made):
    return TrajectoryStore.open(made / "buffers" / LEAF)


@pytest.fixture
def coresets(data, store):
    """coresets(options): of the first expert."""
    return lambda **options: ImageCoresets(data, network(data), store, CoresetConfig(**options))


def network(data, weights=None):
    net = fresh_network("ConvNetD1W8", data, 0)
    if weights is not None:
        torch.nn.utils.vector_to_parameters(weights, net.parameters())
    return net.eval()


def judge(*flags):
    """The rows of result.json, by name."""
    works("eval", *DATA, *JUDGED, *flags, "--save_dir", "e")
    return {row["name"]: row for row in json.loads(Path("e/result.json").read_text())["rows"]}


@pytest.mark.parametrize("features", ["expert", "raw"])
@pytest.mark.parametrize("kind, choose", [("herding", herding), ("kcenter", k_center)])
def test_each_class_by_its_own_features(data, store, coresets, kind, choose, features, monkeypatch):
    monkeypatch.setattr(image_coresets, "BATCH", 7)
    chosen = coresets(coreset_features=features).rows(kind, 5)
    net, seen, train = network(data, store.read(0, 4)["net"]), [], data["train"]
    net.classifier.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    expected = []
    for label in range(10):
        own = train.indices_of(label)
        with torch.no_grad():
            net(train.images(own))
        expected.append(own[choose(seen[-1] if features == "expert" else train.images(own).flatten(1), 5)])
    assert torch.equal(chosen, torch.cat(expected))
    assert train.labels[chosen].tolist() == [label for label in range(10) for _ in range(5)]
    assert len(set(chosen.tolist())) == 50


def test_forgetting_counts_what_the_first_expert_lost(data, store, coresets):
    train, right = data["train"], torch.zeros(4, 200, dtype=torch.bool)
    for epoch in (1, 2, 3, 4):  # not before training
        net = network(data, store.read(0, epoch)["net"])
        for image in range(200):
            with torch.no_grad():
                right[epoch - 1, image] = net(train.images(torch.tensor([image]))).argmax() == train.labels[image]
    flips, ever = (right[:-1] & ~right[1:]).sum(0), right.any(0)
    assert flips.sum() > 5 and 20 < ever.sum() < 200
    flips[~ever] = 9
    chosen = coresets().rows("forgetting", 6).view(10, 6)
    for label in range(10):
        own = train.indices_of(label)
        assert set(chosen[label].tolist()) <= set(own.tolist())
        assert flips[chosen[label]].tolist() == sorted(flips[own].tolist(), reverse=True)[:6]
    least = min(int(ever[train.indices_of(label)].sum()) for label in range(10))
    dropped = coresets(never_learned="drop")
    assert ever[dropped.rows("forgetting", least)].all()
    with pytest.raises(UserError, match=rf"^class \d: cannot choose {least + 1} of {least} samples that were ever"):
        dropped.rows("forgetting", least + 1)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_are_the_beginning_of_more_whatever_was_asked_before(coresets, kind):
    asked = coresets()
    few, many = asked.rows(kind, 3).view(10, 3), asked.rows(kind, 20).view(10, 20)
    assert torch.equal(many[:, :3], few)
    for other in KINDS:
        asked.rows(other, 2)
    assert torch.equal(asked.rows(kind, 4).view(10, 4), many[:, :4])


class TestEval:
    def test_a_row_says_what_it_is(self, made, capsys):
        rows = judge("--data", "random", *KINDS, "--ipc", 2, "--random_lrs", 0.01, "--buffer_path", made / "buffers")
        assert list(rows) == ["random", *KINDS] and all(row["size"] == 20 for row in rows.values())
        for kind in KINDS:
            about = rows[kind]["protocol"]
            assert about["definition"].startswith("of each class ")
            ours, random, gain = (
                rows[name]["metrics"][metric]["values"]
                for name, metric in ((kind, "acc"), ("random", "acc"), (kind, "gain"))
            )
            assert gain == [a - b for a, b in zip(ours, random, strict=True)]
        assert "what the last layer of the first expert sees" in rows["herding"]["protocol"]["features"]
        assert "after epochs 1, 2, 3, 4; those it never got right" in rows["forgetting"]["protocol"]["features"]
        assert "features" not in rows["random"]["protocol"] and "gain" not in rows["random"]["metrics"]
        assert "kcenter: of each class the sample nearest to the mean" in capsys.readouterr().out

    def test_it_has_the_rates_that_random_images_have_and_the_same_images_for_every_network(self, made, monkeypatch):
        asked = []

        def sets(self, source, network, split="test", label=""):
            found = [source(number) for number in range(self.cfg.num_eval)]
            assert all(isinstance(one, RealSet) for one in found)
            rate, images = found[0].lr, [tuple(one.rows.tolist()) for one in found]
            asked.append((label.split(",")[0], network, split, rate, images))
            value = {("val", 0.05): 60.0, ("test", 0.05): 30.0}.get((split, rate), 40.0)
            about = {"protocol": self.cfg.protocol, "about": "", "networks": self.cfg.num_eval}
            return Report({"acc": [value] * self.cfg.num_eval}, about)

        monkeypatch.setattr(AccuracyJudge, "sets", sets)
        rates = ("--random_lrs", 0.001, 0.05)
        nets = ("--networks", "ConvNetD1W8", "MLP")
        rows = judge("--data", "random", "herding", *rates, *nets, "--ipc", 3, "--buffer_path", made / "buffers")
        searches = {name: [call[1:4] for call in asked if call[0] == name] for name in ("random", "herding")}
        tried = [("val", 0.001), ("val", 0.05), ("test", 0.05)]
        assert searches["random"] == searches["herding"] == [(name, *call) for name in nets[1:] for call in tried]
        sets_of = {name: {rows for call in asked if call[0] == name for rows in call[4]} for name in searches}
        assert len(sets_of["herding"]) == 1 and len(sets_of["random"]) == 2
        for row in rows.values():
            assert row["protocol"]["rate_chosen_on"] == "val" and row["protocol"]["rates"] == [0.001, 0.05]
            assert row["metrics"]["acc"]["values"] == [30.0, 30.0]

    def test_raw_features_need_no_experts(self):
        row = judge("--data", "kcenter", "--coreset_features", "raw", "--random_lrs", 0.01)["kcenter"]
        assert row["size"] == 10 and "the pixels as networks see them" in row["protocol"]["features"]

    def test_the_whitening_is_that_of_the_experts(self, made, monkeypatch):
        seen, rows = [], torch.arange(10)
        monkeypatch.setattr(ImageCoresets, "_rows", lambda self, *_: seen.append(self.data.zca.digest) or rows)
        shutil.copytree(made / "whitened", "b")
        file = Path("b/digits_ZCA/ConvNetD1W8/zca.safetensors")
        fitted = ZCA.load(file)
        own = ZCA(fitted.mean + 0.1, fitted.matrix)  # as if fitted elsewhere, where sums round otherwise
        own.save(file)
        judge("--zca", "--data", "herding", "--random_lrs", 0.01, "--buffer_path", "b")
        assert seen == [own.digest] != [fitted.digest]


class TestRefusals:
    """One line, before anything is trained."""

    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch):
        monkeypatch.setattr(AccuracyJudge, "sets", lambda *args, **options: pytest.fail("trained"))

    @pytest.mark.parametrize(
        "flags, words",
        [
            ("--data herding", "no trajectories in runs/mtt/digits/buffers"),
            ("--data forgetting --coreset_features raw", "no trajectories in runs/mtt/digits/buffers"),
            ("--data herdin", "does not know 'herdin'"),
            ("--data kcenter --coreset_features pixels", "does not know 'pixels'; choose from expert, raw"),
            ("--data kcenter --coreset_features raw --ipc 21", "a class has 20 training images, fewer than --ipc 21"),
            ("--data herding --buffer_path {} --ipc 21", "a class has 20 training images, fewer than --ipc 21"),
            ("--data herding --buffer_path {} --train_limit 10", "had --train_limit 20, not 10"),
            ("--data herding --buffer_path {} --holdout 0.2", "had --holdout 0.1, not 0.2"),
            ("--data herding --buffer_path {}/digits/ConvNetD1W8 --model ConvNetD2W8", "had --model ConvNetD1W8"),
        ],
    )
    def test_one_line(self, refused, made, flags, words):
        assert words in refused("eval", *DATA, *JUDGED, *flags.format(made / "buffers").split())

    def test_too_few_epochs(self, refused, made, tmp_path):
        works("buffer", *DATA, *EXPERTS, "--save_epochs", 0, 4, "--buffer_path", "b", "--cache_dir", made / "cache")
        said = refused("eval", *DATA, *JUDGED, "--data", "forgetting", "--buffer_path", "b")
        assert "forgetting compares epochs, and the first expert in b/digits/ConvNetD1W8 keeps [4]" in said

    def test_two_whitenings(self, refused, made):
        """The distilled images carry one, the experts have another."""
        zca = ZCA.load(made / "whitened/digits_ZCA/ConvNetD1W8/zca.safetensors")
        other = ZCA(zca.mean + 0.1, zca.matrix)
        meta = {"format": 1, "zca": other.digest, "labels": "hard", "config": {}}
        state = {"images": torch.randn(10, 1, 8, 8), "labels": torch.arange(10), "lr": torch.tensor(0.01)}
        save_tensors(Path("d.pt"), state | {"zca": other.state(), "meta": meta})
        flags = ("--zca", "--data", "distilled", "herding", "--distilled", "d.pt", "--buffer_path", made / "whitened")
        assert "saw images whitened otherwise than the distilled ones" in refused("eval", *DATA, *JUDGED, *flags)

    def test_options_that_nothing_reads(self, capsys, monkeypatch):
        monkeypatch.setattr("methods.image_judging.Judging.rows", lambda *args: pytest.fail("judged"))
        flags = ("--data", "random", "--never_learned", "drop", "--coreset_features", "raw", "--ipc", "999")
        assert command("eval", [str(flag) for flag in (*DATA, *JUDGED, *flags)]) == 2
        said = capsys.readouterr().out
        assert "--never_learned drop does nothing without --data forgetting" in said
        assert "--coreset_features raw does nothing without --data herding or kcenter" in said
