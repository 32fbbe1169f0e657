"""eval.py on labelled images: what is judged, by which rate, in which space, against which random images."""

import json
import math
from pathlib import Path

import pytest
import torch

from data.zca import ZCA
from methods import image_judging, images
from methods.command import command
from methods.core.classification import AccuracyJudge
from methods.core.evaluation import Report
from methods.image_files import load_images
from methods.image_judging import Judging
from methods.images import ImageSet
from utils.metrics import improvement
from utils.rng import derive_seed

DATA = "--dataset digits --model ConvNetD1W8 --train_limit 10 --device cpu"
JUDGED = "--num_eval 2 --epoch_eval_train 3"
LEARN = "--syn_steps 1 --expert_epochs 1 --max_start_epoch 1 --lr_img 10 --lr_teacher 0.02 --iterations 1 --eval_it 0"
KINDS = {
    "hard": "",
    "soft": "--labels learned --ipc 2",
    "texture": "--texture --canvas_samples 3",
    "zca": "--zca",
    "all": "--holdout 0 --select last",
}


def run(verb, *flags):
    assert command(verb, [word for flag in flags for word in str(flag).split()]) == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made / <kind> / distilled_best.pt` of each of KINDS; nobody writes here."""
    root = tmp_path_factory.mktemp("made")
    for kind, flags in KINDS.items():
        here = f"{DATA} --cache_dir {root}/cache --buffer_path {root}/buffers_{kind}"
        data = {"zca": "--zca", "all": "--holdout 0"}.get(kind, "")
        run("buffer", here, data, "--num_experts 1 --train_epochs 2")
        run("distill", here, flags, LEARN, JUDGED, f"--draw false --save_dir {root}/{kind}")
    return root


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def refused(capsys):
    def call(*flags):
        assert command("eval", [word for flag in flags for word in str(flag).split()]) == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return call


def judge(file, *more, place="e"):
    """The rows of result.json, by name."""
    run("eval", f"--distilled {file}", JUDGED, *more, f"--save_dir {place}")
    found = json.loads(Path(place, "result.json").read_text())["rows"]
    return {row["name"]: row for row in found}


def values(row, metric="acc"):
    return row["metrics"][metric]["values"]


@pytest.fixture
def judging(monkeypatch):
    """`judging(file, *flags)`: the Judging that a command comes to, before it does anything."""
    made = []

    class Stopped(Exception):
        pass

    def stop(self, prefix):
        made.append(self)
        raise Stopped

    def make(file, *more):
        monkeypatch.setattr(Judging, "rows", stop)
        with pytest.raises(Stopped):
            run("eval", f"--distilled {file}", JUDGED, *more)
        monkeypatch.undo()
        return made[-1]

    return make


class TestDistilled:
    def test_the_same_seed_gives_the_same_numbers(self, made):
        file = made / "hard/distilled_best.pt"
        first, again, other = (
            judge(file, f"--seed {seed}", place=place) for seed, place in ((4, "a"), (4, "b"), (5, "c"))
        )
        assert first == again
        assert values(first["distilled"]) != values(other["distilled"])
        assert values(first["random"]) != values(other["random"])

    def test_it_is_what_the_judge_says_of_the_file(self, made, judging):
        file = made / "hard/distilled_best.pt"
        row = judge(file, "--data distilled --seed 3")["distilled"]
        found, what = load_images([file]), judging(file, "--seed 3")
        images = ImageSet(found.images, found.labels, found.lr, 8, what.cfg.net.augment())
        report = AccuracyJudge(what.data, what.cfg.judge, derive_seed(3, "eval")).sets(lambda n: images, "ConvNetD1W8")
        assert values(row) == report.metrics["acc"] and row["size"] == 10
        assert row["protocol"]["lr"] == pytest.approx(found.lr) and row["protocol"]["augmentation"] == "own"

    def test_another_rate(self, made):
        row = judge(made / "hard/distilled_best.pt", "--data distilled --syn_lr 0.5")["distilled"]
        assert row["protocol"]["lr"] == 0.5

    def test_textures_are_judged_by_windows(self, made, monkeypatch):
        cuts, cut = [], images.windows

        def spy(canvases, size, samples, rng):
            found = cut(canvases, size, samples, rng)
            cuts.append((tuple(canvases.shape), tuple(found.shape)))
            return found

        monkeypatch.setattr(images, "windows", spy)
        judge(made / "texture/distilled_best.pt", "--data distilled")
        assert set(cuts[1:]) == {((10, 1, 16, 16), (30, 1, 8, 8))}  # the first asks for one row only
        cuts.clear()
        judge(made / "hard/distilled_best.pt", "--data distilled --name plain", place="plain")
        assert not cuts

    def test_every_network_of_a_pool_has_its_rows(self, made, capsys):
        names = ("ConvNetD1W8", "ConvNetD2W8", "MLP")
        rows = judge(made / "hard/distilled_best.pt", "--networks", *names)
        assert list(rows) == [f"{name}, {what}" for name in names for what in ("random", "distilled")]
        for name, row in rows.items():
            assert row["protocol"]["network"] == name.split(",")[0] and len(values(row)) == 2
        assert "networks of ConvNetD1W8, ConvNetD2W8, MLP" in capsys.readouterr().out

    def test_eval_mode_names_a_pool(self, made):
        rows = judge(made / "hard/distilled_best.pt", "--eval_mode A --data distilled --epoch_eval_train 1")
        assert [row["protocol"]["network"] for row in rows.values()] == ["ConvNetAS", "ConvNetAR", "ConvNetAL"]

    def test_the_page_learns_of_it(self, made):
        run("eval", f"--distilled {made}/hard/distilled_best.pt", JUDGED, "--data distilled")
        assert (made / "hard/eval/clean-ConvNetD1W8/result.json").exists()
        assert "last epoch" in (made / "hard/report.html").read_text()

    def test_the_protocol_that_is_printed_is_the_one_that_was_asked_for(self, made, capsys):
        """Full data is trained by a recipe of its own."""
        judge(made / "hard/distilled_best.pt", "--data full distilled --full_epochs 1 --protocol mtt")
        assert "protocol mtt (" in capsys.readouterr().out

    def test_the_file_notes_what_it_was_made_with(self, made, judging):
        meta = load_images([made / "soft/distilled_best.pt"]).meta
        data = judging(made / "soft/distilled_best.pt").data
        assert meta["labels"] == "learned" and meta["zca"] is None and meta["step"] == 1
        assert meta["classes"] == [str(digit) for digit in range(10)]
        assert (meta["mean"], meta["std"]) == (list(data.mean), list(data.std))
        config = {"dataset": "digits", "model": "ConvNetD1W8", "train_limit": 10, "ipc": 2, "syn_steps": 1}
        assert config.items() <= meta["config"].items()


class TestRandom:
    def test_each_network_has_its_own_images(self, made, judging):
        what = judging(made / "soft/distilled_best.pt")  # two images a class
        rows = [what._random(number, 0.01).rows for number in range(3)]
        labels = what.data["train"].labels
        for chosen in rows:
            assert len(set(chosen.tolist())) == 20 and labels[chosen].tolist() == [k for k in range(10) for _ in "ab"]
        assert len({tuple(chosen.tolist()) for chosen in rows}) == 3
        assert torch.equal(rows[1], what._random(1, 0.5).rows)  # whatever the rate
        other = judging(made / "soft/distilled_best.pt", "--seed 1")
        assert not torch.equal(rows[0], other._random(0, 0.01).rows)

    def test_as_many_as_asked(self, made, refused):
        file = made / "hard/distilled_best.pt"
        assert judge(file, "--ipc 3 --random_lrs 0.01")["random"]["size"] == 30
        assert "a class has 10 training images, fewer than --ipc 11" in refused(
            f"--distilled {file}", JUDGED, "--ipc 11"
        )

    def test_without_a_distilled_file(self):
        run("eval", DATA, JUDGED, "--data random --random_lrs 0.01 --ipc 2 --save_dir e")
        (row,) = json.loads(Path("e/result.json").read_text())["rows"]
        assert row["size"] == 20 and row["protocol"]["rates"] == [0.01]

    @pytest.fixture
    def scores(self, monkeypatch):
        """Accuracy by split and rate, in place of training; what was asked for."""
        asked, table = [], {"val": {0.001: 40, 0.05: 60, 0.1: 20}, "test": {0.001: 70, 0.05: 30, 0.1: 10}}

        def sets(self, source, network, split="test", label=""):
            rate = source(0).lr
            asked.append((split, rate, self.cfg.num_eval))
            about = {"protocol": self.cfg.protocol, "about": "", "networks": self.cfg.num_eval}
            return Report({"acc": [table[split].get(rate, 0)] * self.cfg.num_eval}, about)

        monkeypatch.setattr(AccuracyJudge, "sets", sets)
        return asked

    def test_the_rate_is_chosen_on_held_out_images(self, made, scores):
        row = judge(made / "hard/distilled_best.pt", "--data random --random_lrs 0.001 0.05 0.1")["random"]
        assert scores == [("val", 0.001, 1), ("val", 0.05, 1), ("val", 0.1, 1), ("test", 0.05, 2)]
        assert values(row) == [30, 30]
        assert row["protocol"]["rate_chosen_on"] == "val" and row["protocol"]["rates"] == [0.001, 0.05, 0.1]

    def test_or_on_test_where_none_are_held_out(self, made, scores):
        row = judge(made / "all/distilled_best.pt", "--data random --random_lrs 0.001 0.05 0.1")["random"]
        assert values(row) == [70, 70] and row["protocol"]["rate_chosen_on"] == "test"

    @pytest.mark.parametrize("flags, rate", [("--random_lrs 0.1", 0.1), ("--protocol dc_bench", 0.01)])
    def test_one_rate_is_not_searched_for(self, made, scores, flags, rate):
        """DC-BENCH trains everything at 0.01."""
        row = judge(made / "hard/distilled_best.pt", "--data random", flags)["random"]
        assert scores == [("test", rate, 2)] and row["protocol"]["rates"] == [rate]

    def test_dd_ranking_lets_each_network_choose(self, made):
        row = judge(made / "hard/distilled_best.pt", "--data random --protocol dd_ranking --random_lrs 0.001 0.05")
        assert "best of 2 rates ON TEST" in row["random"]["protocol"]["about"]


class TestScores:
    def test_gain_is_network_by_network(self, made):
        rows = judge(made / "hard/distilled_best.pt", "--num_eval 3")
        ours, theirs, gain = values(rows["distilled"]), values(rows["random"]), values(rows["distilled"], "gain")
        assert gain == [a - b for a, b in zip(ours, theirs, strict=True)] and len(gain) == 3
        assert "lrs" not in rows["distilled"]["metrics"] and "gain" not in rows["random"]["metrics"]

    def test_no_gain_without_random_images(self, made):
        rows = judge(made / "hard/distilled_best.pt", "--data distilled full --full_epochs 1")
        assert set(rows["distilled"]["metrics"]) == {"acc"} == set(rows["full"]["metrics"])

    def test_ddrankings_score(self, made):
        rows = judge(made / "hard/distilled_best.pt", "--data distilled full random --full_epochs 2 --full_batch 32")
        assert list(rows) == ["distilled", "full", "random"]
        own, full, random = (rows[name]["metrics"]["acc"]["mean"] for name in rows)
        expected = 100 * improvement(full, own, own, random)["lrs"]
        assert values(rows["distilled"], "lrs") == [pytest.approx(expected)]
        assert rows["full"]["size"] == 100

    def test_soft_labels_are_made_hard_against_full_data(self, made, monkeypatch):
        """HLR is of hard labels: full 80, hard 50; IOR of the set as it is: 60 against 40."""
        sets, file = [], made / "soft/distilled_best.pt"

        def judged(self, source, network, split="test", label=""):
            sets.append(source(0))
            acc = 40.0 if label.startswith("random") else 60.0 if source(0).labels.is_floating_point() else 50.0
            return Report({"acc": [acc] * 2}, {"protocol": "clean", "about": "", "networks": 2})

        full = Report({"acc": [80.0, 80.0]}, {"protocol": "clean", "about": "", "networks": 2})
        monkeypatch.setattr(AccuracyJudge, "sets", judged)
        monkeypatch.setattr(AccuracyJudge, "full", lambda *args, **options: full)
        rows = judge(file, "--data random distilled full --random_lrs 0.01")
        # 0.5 · 0.2 − 0.5 · 0.3 = −0.05, which the map takes to 0.248192
        assert values(rows["distilled"], "lrs") == [pytest.approx(24.8192, abs=1e-3)]
        assert values(rows["distilled"], "gain") == [20, 20]
        soft, hard = (found for found in sets if isinstance(found, ImageSet))
        assert torch.equal(hard.labels, soft.labels.argmax(1)) and torch.equal(hard.images, soft.images)
        assert hard.lr == soft.lr == load_images([file]).lr

    def test_ddrankings_robustness(self, made, monkeypatch):
        """60 against 40 with augmentation, 50 against 45 without: half of 0.2 and half of 0.05 are won."""
        seen = []

        def judged(self, source, network, split="test", label=""):
            random, bare = label.startswith("random"), self.augmentation == "none"
            seen.append((random, source(0).augment is None))
            acc = {(False, False): 60.0, (True, False): 40.0, (False, True): 50.0, (True, True): 45.0}[random, bare]
            return Report({"acc": [acc] * 2}, {"protocol": "clean", "about": "", "networks": 2})

        monkeypatch.setattr(AccuracyJudge, "sets", judged)
        rows = judge(made / "hard/distilled_best.pt", "--random_lrs 0.01 --robust")
        expected = (math.exp(0.125) - math.exp(-1)) / (math.e - math.exp(-1))
        assert values(rows["distilled"], "ars") == [pytest.approx(100 * expected)]
        assert set(seen) == {(False, False), (True, False), (False, True), (True, True)}


class TestWhitening:
    def test_the_one_in_the_file_is_used(self, made, tmp_path, monkeypatch):
        """Nothing is fitted, though the cache is empty; the very space of distillation comes back."""
        monkeypatch.setattr("data.images.fit_zca", lambda *args: pytest.fail("fitted anew"))
        seen, build = [], image_judging.build_images
        monkeypatch.setattr(image_judging, "build_images", lambda *args: seen.append(build(*args)) or seen[-1])
        judge(made / "zca/distilled_best.pt", "--data distilled", f"--cache_dir {tmp_path}/empty")
        assert seen[0].zca.digest == load_images([made / "zca/distilled_best.pt"]).meta["zca"]

    @pytest.mark.parametrize("unit", [False, True])
    def test_another_fit_is_used_where_it_is_carried(self, made, monkeypatch, unit):
        state = torch.load(made / "zca/distilled_best.pt", weights_only=True)
        other = ZCA(state["zca"]["mean"], 2 * state["zca"]["matrix"], unit=unit)
        state |= {"zca": other.state(), "meta": state["meta"] | {"zca": other.digest}}
        torch.save(state, "other.pt")
        seen, build = [], image_judging.build_images
        monkeypatch.setattr(image_judging, "build_images", lambda *args: seen.append(build(*args)) or seen[-1])
        judge("other.pt", "--data distilled")
        pixels = seen[0]["test"].pixels.whole().float() / 255
        torch.testing.assert_close(seen[0]["test"].images(torch.arange(len(pixels))), other.whiten(pixels))

    def test_a_step_file_names_it(self, made, refused):
        step = made / "zca/distilled_0.pt"
        judge(step, "--data distilled")
        flags = (f"--distilled {step}", JUDGED)
        assert "was made with a whitening; give the --zca" in refused(*flags, "--zca false")
        assert "was made with another whitening" in refused(*flags, "--train_limit 9")
        plain = f"--distilled {made}/hard/distilled_0.pt"
        assert "was made with no whitening" in refused(plain, JUDGED, "--zca true")
        torch.save(torch.load(made / "zca/distilled_best.pt", weights_only=True) | {"zca": {"mean": 3}}, "bad.pt")
        assert "whitening is not a mean and a matrix" in refused("--distilled bad.pt", JUDGED)


class TestWhatDoesNotFit:
    @pytest.mark.parametrize(
        "flags, says",
        [
            ("--dataset toy --toy_images 20 --res 8", "has labels for 10 classes, toy has 6"),
            ("--res 16", "holds images of 1 x 8 x 8, digits is 1 x 16 x 16; give the --dataset and --res"),
            ("--networks ConvNetD5", "ConvNetD5"),
        ],
    )
    def test_flags(self, made, refused, flags, says):
        assert says in refused(f"--distilled {made}/hard/distilled_best.pt", JUDGED, flags, "--save_dir e")
        assert not Path("e").exists()

    @pytest.mark.parametrize(
        "labels, says",
        [
            (torch.full((10,), 10), "has labels for 11 classes, digits has 10"),
            (torch.full((10,), -1), "has labels for 0 classes, digits has 10"),
            (torch.rand(10, 9).softmax(1), "has labels for 9 classes, digits has 10"),
        ],
    )
    def test_labels_of_published_tensors(self, refused, labels, says):
        torch.save(torch.randn(10, 1, 8, 8), "images_best.pt")
        torch.save(labels, "labels_best.pt")
        assert says in refused("--distilled images_best.pt", DATA, JUDGED)

    def test_classes_of_other_names(self, made, refused):
        """As many classes of the same size, such as another subset of ImageNet."""
        state = torch.load(made / "hard/distilled_best.pt", weights_only=True)
        state["meta"]["classes"] = [f"dog {number}" for number in range(10)]
        torch.save(state, "dogs.pt")
        line = refused("--distilled dogs.pt", JUDGED)
        assert "dogs.pt is of the classes dog 0, dog 1, dog 2, …, digits has 0, 1, 2, …" in line and "--subset" in line

    def test_textures_smaller_than_the_images(self, made, refused):
        line = refused(f"--distilled {made}/texture/distilled_best.pt", JUDGED, "--res 32")
        assert "holds images of 1 x 16 x 16, digits is 1 x 32 x 32" in line

    def test_published_images_without_labels(self, refused):
        torch.save(torch.randn(12, 1, 8, 8), "images_best.pt")
        line = refused("--distilled images_best.pt", DATA, JUDGED)
        assert "has 12 images and no labels, which is no multiple of 10 classes" in line


class TestPublished:
    @pytest.fixture(autouse=True)
    def tensors(self, made):
        torch.save(load_images([made / "hard/distilled_best.pt"]).images, "images_best.pt")

    def test_they_score_as_the_file_that_they_are_of(self, made):
        rows = judge(made / "soft/images_best.pt", DATA, place="published")
        assert rows == judge(made / "soft/distilled_best.pt", place="own")

    def test_no_rate_is_told(self, capsys):
        row = judge("images_best.pt", DATA, "--data distilled")["distilled"]
        assert "no learned rate beside images_best.pt: 0.01 is used" in capsys.readouterr().out
        assert row["protocol"]["lr"] == 0.01 and row["size"] == 10

    def test_labels_in_a_file_of_another_name(self, made):
        """Of two files, and wrong ones: every image is said to be the next digit."""
        plain = judge("images_best.pt", DATA, "--data distilled --syn_lr 0.1 --epoch_eval_train 60", place="plain")
        torch.save((torch.arange(6) + 1) % 10, "a.pt")
        torch.save((torch.arange(6, 10) + 1) % 10, "b.pt")
        flags = (DATA, "--data distilled --syn_lr 0.1 --epoch_eval_train 60 --label_files a.pt b.pt")
        wrong = judge("images_best.pt", *flags, place="wrong")
        assert wrong["distilled"]["metrics"]["acc"]["mean"] < plain["distilled"]["metrics"]["acc"]["mean"] / 2

    def test_several_files(self):
        whole = torch.load("images_best.pt", weights_only=True)
        torch.save(whole[:4], "images_a.pt")
        torch.save(whole[4:], "images_b.pt")
        one = judge("images_best.pt", DATA, "--data distilled", place="one")
        assert judge("images_a.pt images_b.pt", DATA, "--data distilled", place="two") == one
