"""eval.py on posters: what is judged, by which plan and recipe, against which real images, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data import build_images
from data.images import ImagesConfig
from data.zca import ZCA
from methods import poster_judging
from methods.command import command
from methods.core.classification import AccuracyJudge
from methods.core.evaluation import Report
from methods.core.inner import InnerAdam, InnerSGD
from methods.core.stepping import StepConfig, StepJudge
from methods.poster import Poster, PosterConfig, real_canvas
from methods.poster_files import load_poster
from methods.poster_judging import Eval, InnerConfig, Judging, PosterImagesConfig, PosterNetworkConfig, at_hand
from methods.poster_labels import fixed_labels, map_grid, map_labels
from methods.poster_layout import GridConfig, plan
from networks import build_network
from utils.config import flat, idle_options, parse
from utils.rng import derive_seed, generator

GRID = {
    **{"poster_width": 36, "poster_height": 14, "patch_num_x": 8, "patch_num_y": 4},
    **{"poster_class_num_x": 5, "poster_class_num_y": 2},
}
DATA = {"dataset": "digits", "train_limit": 20, "model": "ConvNetD1W8"}
RECIPE = {"inner_lr": 0.01, "distill_batch_size": 16, "syn_strategy": "rotate"}
JUDGED = "--method podd --device cpu --num_eval 2 --eval_steps 3 6 --random_lrs 0.01"
FLAGS = " ".join(f"--{name} {value}" for name, value in (GRID | DATA | RECIPE).items())
ORDER = torch.tensor([[3, 1, 4, 0, 5], [9, 2, 6, 8, 7]])
LAYOUT = plan(GridConfig(**GRID), 8, ORDER)


@pytest.fixture(scope="module")
def digits():
    return build_images(ImagesConfig(dataset="digits", train_limit=20), "cpu")


@pytest.fixture(scope="module")
def canvas(digits):
    return real_canvas(digits, LAYOUT, generator(0, "canvas"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def note(digits, **more):
    """`meta` of a distilled file."""
    config = {"method": "podd"} | GRID | DATA | RECIPE | {"holdout": 0.1, "order": "auto", "train_lr": False}
    meta = {"format": 1, "config": config | more, "classes": list(digits.classes), "zca": None, "step": 7}
    return meta | {"order": ORDER.tolist(), "mean": [0.0], "std": [1.0]}


@pytest.fixture
def file(digits, canvas):
    """`file(label_map, lr, **config)`: a distilled file of a poster of real digits."""

    def write(label_map=None, lr=0.01, path="made.pt", **config):
        state = {"poster": canvas, "lr": torch.tensor(lr), "meta": note(digits, **config)}
        torch.save(state | ({} if label_map is None else {"label_map": label_map}), path)
        return path

    return write


def made(path):
    """The path, its folder made."""
    Path(path).parent.mkdir(parents=True)
    return path


def run(*flags):
    assert command("eval", " ".join([JUDGED, *flags]).split()) == 0


def judge(*flags, place="e"):
    """The rows of result.json, by name."""
    run(*flags, f"--save_dir {place}")
    return {row["name"]: row for row in json.loads(Path(place, "result.json").read_text())["rows"]}


def values(row, metric="acc"):
    return row["metrics"][metric]["values"]


@pytest.fixture
def judging(digits, file):
    """`judging(*flags, file=…)`: what a command's verdict is made by, before it does anything."""

    def make(*flags, path=""):
        words = f"{FLAGS} {JUDGED} {' '.join(flags)}".split()
        cfg, _ = parse(Eval, "eval", words)
        layout = plan(cfg.grid, 8, ORDER)
        return Judging(cfg, digits, layout, load_poster(path or file()), "ConvNetD1W8")

    return make


class TestDistilled:
    def test_it_is_judged_by_its_own_recipe(self, file, digits, canvas):
        """Data, network, plan, rate, batch and augmentation are those that the file notes."""
        row = judge(f"--distilled {file()} --source distilled --seed 3")["distilled"]
        cfg = PosterConfig(**RECIPE)
        known = Poster(canvas, None, LAYOUT, cfg).poster_set(cfg.augment())
        judge_of = StepJudge(digits, StepConfig(num_eval=2, eval_steps=(3, 6)), derive_seed(3, "eval"))
        report = judge_of.sets(lambda number: known, "ConvNetD1W8", InnerAdam, 16)
        assert {name: part["values"] for name, part in row["metrics"].items()} == report.metrics
        about = {"batch": 16, "augmentation": "rotate", "steps": 6, "networks": 2, "pixels": 504, "bytes": 4 * 504}
        assert about.items() <= row["protocol"].items() and row["size"] == 504
        assert row["protocol"]["lr"] == pytest.approx(0.01)

    def test_flags_win(self, file):
        row = judge(f"--distilled {file()} --source distilled --distill_batch_size 0 --comp_aug --patch_num_x 9")
        assert row["distilled"]["protocol"]["batch"] == 36
        assert row["distilled"]["protocol"]["augmentation"] == "rotate, composed"

    def test_a_learned_rate(self, file):
        path = file(lr=0.004, train_lr=True)
        assert judge(f"--distilled {path} --source distilled")["distilled"]["protocol"]["lr"] == pytest.approx(0.004)
        row = judge(f"--distilled {path} --source distilled --inner_lr 0.02", place="told")["distilled"]
        assert row["protocol"]["lr"] == pytest.approx(0.02)

    def test_learned_labels(self, file, judging, monkeypatch):
        label_map = torch.rand(10, 2, 5, generator=generator(0, "map"))
        sets = []
        monkeypatch.setattr(Judging, "_judged", lambda self, source, label: sets.append(source(0)) or Report({}, {}))
        report = judging(path=file(label_map)).distilled()
        expected = map_labels(label_map, map_grid(LAYOUT, (2, 5)))
        torch.testing.assert_close(sets[0].labels, expected)
        assert report.protocol["bytes"] == 4 * (504 + 100) and "100 learned label values" in report.protocol["what"]
        judging().distilled()
        assert torch.equal(sets[1].labels, fixed_labels(LAYOUT, "majority"))

    def test_other_networks(self, file):
        rows = judge(f"--distilled {file()} --networks ConvNetD2W8 MLP convnet2 --source distilled")
        assert [row["protocol"]["network"] for row in rows.values()] == ["ConvNetD2W8", "MLP", "ConvNetNN"]
        assert list(rows) == ["ConvNetD2W8, distilled", "MLP, distilled", "ConvNetNN, distilled"]

    def test_where_it_is_written(self, file, monkeypatch):
        pages = []
        monkeypatch.setattr(poster_judging, "refresh_page", pages.append)
        file(path=made("runs/podd/digits/distilled_best.pt"))
        run("--dataset digits --source distilled")
        run("--name digits --source distilled --networks MLP")
        assert Path("runs/podd/digits/eval/6-steps-ConvNetD1W8/result.json").exists()
        assert Path("runs/podd/digits/eval/6-steps-MLP/result.json").exists()
        assert pages == [Path("runs/podd/digits")] * 2


class TestReal:
    @pytest.mark.parametrize(
        "size, counts", [("14", [0] * 3 + [1] * 7), ("42", [2] * 7 + [3] * 3), ("8", [0] * 6 + [1] * 4)]
    )
    def test_whole_images_of_no_more_pixels(self, judging, digits, monkeypatch, size, counts):
        """36 x 14 pixels are 7.9 images of 8 x 8, 36 x 42 are 23.6."""
        sets = self.caught(monkeypatch)
        grid = "--poster_width 36 --patch_num_x 8 --patch_num_y 8"
        what = judging(f"--poster_height {size} {grid}", *(["--class_area_height 4"] if size == "8" else []))
        report, (source,) = what.random(), sets
        rows = [source(number, 0.01).rows for number in range(3)]
        for chosen in rows:
            assert len(set(chosen.tolist())) == len(chosen) == sum(counts)
            assert sorted(torch.bincount(digits["train"].labels[chosen], minlength=10).tolist()) == counts
        assert len({tuple(chosen.tolist()) for chosen in rows}) == 3
        own = [torch.bincount(digits["train"].labels[chosen], minlength=10).tolist() for chosen in rows]
        assert len({*map(tuple, own)}) > 1  # which classes have more is drawn, too
        assert torch.equal(rows[1], source(1, 0.5).rows) and source(1, 0.5).lr == 0.5
        assert report.protocol["pixels"] == 64 * sum(counts)
        other = judging(f"--poster_height {size} {grid} --seed 1")
        other.random()
        assert not torch.equal(rows[0], sets[1](0, 0.01).rows)

    def test_less_than_one_image(self, judging, monkeypatch):
        sets = self.caught(monkeypatch)
        what = judging()
        what.cfg = replace(what.cfg, grid=replace(what.cfg.grid, poster_width=7, poster_height=8))
        assert what.random().protocol["pixels"] == 64 and len(sets[0](0, 0.01)) == 1

    def test_posters_of_real_images(self, judging, monkeypatch, digits):
        sets = self.caught(monkeypatch)
        judging(path="").crops()
        first, second, faster = (sets[0](number, lr) for number, lr in ((0, 0.01), (1, 0.01), (0, 0.5)))
        assert torch.equal(first.labels, fixed_labels(LAYOUT, "majority")) and first.augment is not None
        assert not torch.equal(first.patches, second.patches)
        assert torch.equal(first.patches, faster.patches) and (first.lr, faster.lr) == (0.01, 0.5)
        # The upper left corner lies in the area of class 3 alone.
        corner = digits["train"].images(digits["train"].indices_of(3))[:, :, :6, :7]
        assert (corner == first.patches[0][:, :6, :7]).all((1, 2, 3)).any()

    def caught(self, monkeypatch):
        """The sources that are judged, in place of training on them."""
        sets = []

        def catch(self, name, source):
            sets.append(source)
            return Report({"acc": [0.0]}, {})

        monkeypatch.setattr(Judging, "_at_best_rate", catch)
        return sets

    @pytest.mark.parametrize("holdout, split, best", [("0.1", "val", 0.003), ("0", "test", 0.001)])
    def test_the_rate_is_chosen_by_one_network(self, file, monkeypatch, holdout, split, best):
        asked = []
        table = {"val": {0.001: 40, 0.003: 60, 0.01: 20}, "test": {0.001: 70, 0.003: 30, 0.01: 10}}

        def sets(self, source, network, inner, batch, split, label, augmentation):
            asked.append((split, source(0).lr, self.cfg.num_eval, batch))
            about = {"protocol": "steps", "about": "", "networks": self.cfg.num_eval}
            return Report({"acc": [table[split][source(0).lr]] * self.cfg.num_eval}, about)

        monkeypatch.setattr(StepJudge, "sets", sets)
        for source in ("random", "crops"):
            asked.clear()
            flags = f"--source {source} --random_lrs 0.001 0.003 0.01 --holdout {holdout}"
            row = judge(f"--distilled {file()}", flags, place=source)[source]
            assert asked == [(split, lr, 1, 16) for lr in (0.001, 0.003, 0.01)] + [("test", best, 2, 16)]
            assert values(row) == [table["test"][best]] * 2
            assert row["protocol"]["rates"] == [0.001, 0.003, 0.01] and row["protocol"]["rate_chosen_on"] == split

    def test_all_of_them(self, file, monkeypatch):
        seen, full = [], AccuracyJudge.full
        monkeypatch.setattr(AccuracyJudge, "full", lambda *args, **more: seen.append(args[1:]) or full(*args, **more))
        row = judge(f"--distilled {file()} --source full --full_epochs 2 --full_batch 32 --full_lr 0.02")["full"]
        assert seen[0][:4] == ("ConvNetD1W8", 2, 32, 0.02) and seen[0][4] is not None
        assert len(values(row)) == 2 and row["size"] == 200 * 64

    def test_without_a_distilled_file(self):
        run(FLAGS, "--source random crops --order table --save_dir e")
        found = {row["name"]: row for row in json.loads(Path("e/result.json").read_text())["rows"]}
        assert found["random"]["size"] == 448 and found["crops"]["size"] == 504


class TestTable:
    def test_every_source_in_the_order_asked(self, file, capsys):
        rows = judge(f"--distilled {file()} --source full distilled crops random --full_epochs 1")
        assert list(rows) == ["full", "distilled", "crops", "random"]
        for name in ("distilled", "crops"):
            each = zip(values(rows[name]), values(rows["random"]), values(rows[name], "gain"), strict=True)
            assert all(gain == ours - theirs for ours, theirs, gain in each)
        assert "gain" not in rows["random"]["metrics"] and "gain" not in rows["full"]["metrics"]
        out = capsys.readouterr().out
        assert [word.strip() for word in out.splitlines()[0].split("|")[1:-1]] == [
            *("data", "pixels", "acc", "gain", "acc@3", "acc@6")
        ]
        assert "6 steps of Adam, of which the last counts" in out
        assert "random: 7 whole images of 7 classes, others for each network; 448 pixels, 1.8 kB" in out

    def test_no_gain_without_random_images(self, file):
        rows = judge(f"--distilled {file()} --source distilled crops")
        assert not any("gain" in row["metrics"] for row in rows.values())

    def test_the_same_seed_gives_the_same_numbers(self, file):
        path = file()
        first, again, other = (
            judge(f"--distilled {path} --seed {n}", place=place) for n, place in zip((4, 4, 5), "abc", strict=True)
        )
        assert first == again and values(first["random"], "loss") != values(other["random"], "loss")

    def test_sgd_with_decay(self, file):
        row = judge(f"--distilled {file()} --source distilled --inner_optim SGD --decay")["distilled"]
        assert "SGD (momentum 0.9, weight decay 0.0005, rate x 0.2 at 600)" in row["protocol"]["about"]


class TestPublished:
    def test_flags_are_its_plan(self, canvas, capsys):
        torch.save(canvas[None], "x_poster.pt")
        row = judge("--distilled x_poster.pt --source distilled --order table", FLAGS)["distilled"]
        assert row["size"] == 504 and "classes are placed by table" in capsys.readouterr().out

    def test_its_order_decides_its_labels(self, canvas, monkeypatch):
        torch.save(canvas[None], "x_poster.pt")
        Path("order.json").write_text(json.dumps({"grid": ORDER.tolist()}))
        sets = []
        monkeypatch.setattr(Judging, "rows", lambda self, prefix: sets.append(self._cut(canvas, None)) or [])
        for order in ("table", "order.json"):
            run("--distilled x_poster.pt --source distilled", FLAGS, f"--order {order}")
        assert torch.equal(sets[1].labels, fixed_labels(LAYOUT, "majority"))
        assert not torch.equal(sets[0].labels, sets[1].labels)

    def test_labels_beside_it(self, canvas):
        torch.save(canvas[None], "x_poster.pt")
        torch.save(torch.rand(1, 10, 2, 5), "x_label.pt")
        row = judge("--distilled x_poster.pt --source distilled --order table", FLAGS)["distilled"]
        assert row["protocol"]["bytes"] == 4 * 604


class TestMistakes:
    @pytest.fixture
    def refused(self, capsys):
        def call(*flags):
            assert command("eval", " ".join([JUDGED, *flags]).split()) == 2
            return capsys.readouterr().err.strip().splitlines()[-1].removeprefix("eval.py: error: ")

        return call

    def test_no_file(self, refused):
        assert "runs/podd/digits/distilled_best.pt" in refused("--dataset digits --source distilled")

    @pytest.mark.parametrize(
        "flags, line",
        [
            ("--dataset toy", "made.pt is of the classes 0, 1, 2, …, toy has "),
            (
                "--poster_width 35",
                "made.pt is of 36 x 14 pixels (width x height), the plan of 35 x 14; give --poster_w",
            ),
            ("--patch_num_x 2", "of the poster's 504 pixels are in no patch"),
            ("--poster_class_num_x 2 --poster_class_num_y 5", "the order of classes has 2 rows of 5"),
            ("--res 16", "made.pt was made with --res 0, not 16"),
            ("--zca", "made.pt was made with no whitening; give the --zca"),
            ("--distill_batch_size 33", "--distill_batch_size 33 is more than the 32 patches"),
            ("--model Convnetx", "cannot read the network name 'Convnetx'"),
            ("--networks convnet9 Resnt18", "unknown network 'Resnt18' (did you mean 'ResNet18'?)"),
            ("--arch VGX", "unknown --model 'VGX'"),
            ("--syn_strategy flop", "unknown augmentation 'flop'"),
            ("--source herding", "--source does not know 'herding'"),
            ("--eval_steps 0", "--eval_steps is 0; it must be greater than 0"),
        ],
    )
    def test_what_does_not_fit(self, file, refused, flags, line):
        assert line in refused(f"--distilled {file(res=0)}", flags)

    def test_crops_without_a_label(self, refused, monkeypatch):
        """Told before the first row is judged."""
        monkeypatch.setattr(poster_judging, "Judging", None)
        flags = "--class_area_width 2 --class_area_height 2 --poster_width 60 --patch_num_x 9"
        line = refused(FLAGS, flags, "--order table --source random crops")
        assert "patches lie outside all class areas" in line and "eval.py: leave out crops" in line

    def test_too_few_images(self, refused):
        flags = "--poster_height 42 --patch_num_y 8 --train_limit 2 --source random"
        assert refused(FLAGS, flags) == (
            "a class has 2 training images, too few for the 23 of 10 classes that have as many pixels as the poster; "
            "leave out --source random, or raise --train_limit"
        )

    def test_published_ones(self, refused, canvas):
        torch.save(canvas.expand(3, -1, -1)[None].clone(), "x_poster.pt")
        assert "x_poster.pt has 3 channels, images of digits have 1" in refused(
            "--distilled x_poster.pt --order table", FLAGS
        )
        torch.save(canvas[None], "y_poster.pt")
        torch.save(torch.rand(1, 9, 2, 5), "y_label.pt")
        assert "has labels of 9 classes, digits has 10" in refused("--distilled y_poster.pt --order table", FLAGS)

    def test_another_whitening(self, refused, digits, canvas):
        config = {"zca": True, "zca_kind": "podd"}
        meta = note(digits, **config) | {"zca": "of another fit"}
        torch.save({"poster": canvas, "lr": torch.tensor(0.01), "meta": meta}, "made.pt")
        assert "made.pt was made with another whitening" in refused("--distilled made.pt")

    def test_the_whitening_in_the_file_is_used(self, digits, canvas, monkeypatch):
        white = build_images(ImagesConfig(dataset="digits", train_limit=20, zca=True, zca_kind="podd"), "cpu").zca
        other = ZCA(white.mean, 2 * white.matrix, unit=True)
        meta = note(digits, zca=True) | {"zca": other.digest}
        torch.save({"poster": canvas, "lr": torch.tensor(0.01), "meta": meta, "zca": other.state()}, "made.pt")
        seen, build = [], poster_judging.build_images
        monkeypatch.setattr(poster_judging, "build_images", lambda *args: seen.append(build(*args)) or seen[-1])
        judge("--distilled made.pt --source distilled")
        assert seen[0].zca.digest == other.digest

    def test_notes(self, file, canvas, capsys):
        run(f"--distilled {file()} --source distilled --order table")
        assert "made.pt has its own order of classes; --order" in capsys.readouterr().out
        torch.save(canvas[None], "x_poster.pt")
        run("--distilled x_poster.pt --source distilled --order table --zca", FLAGS)
        assert "x_poster.pt notes no whitening" in capsys.readouterr().out


class TestConfigs:
    @pytest.mark.parametrize(
        "typed, name",
        [
            ("convnet", "ConvNet"),
            ("convnet2", "ConvNetNN"),
            ("convnet4", "ConvNetD4"),
            ("convnetw", "ConvNetW128x2"),
            ("convnetw4", "ConvNetD4W128x2"),
            ("convnetw2", "ConvNetW128x2BN"),
            ("ConvNetW4", "ConvNetW4"),
            ("ResNet18", "ResNet18"),
        ],
    )
    def test_networks(self, typed, name):
        assert PosterNetworkConfig(model=typed).name == name

    @pytest.mark.parametrize(
        "typed, count", [("convnet", 320_010), ("convnet2", 319_242), ("convnet4", 452_490), ("convnetw", 1_562_634)]
    )
    def test_their_weights(self, typed, count):
        """CIFAR-10, as the released code has them."""
        net = build_network(PosterNetworkConfig(model=typed).name, 32, 10)
        assert sum(part.numel() for part in net.parameters()) == count

    def test_inner_optimisers(self):
        assert isinstance(InnerConfig().optimiser(0.1), InnerAdam)
        sgd = InnerConfig(inner_optim="SGD", decay=True)
        for made_, step in ((sgd.optimiser(0.1), 200), (sgd.optimiser_when_judged(0.1), 600)):
            assert isinstance(made_, InnerSGD) and (made_.momentum, made_.weight_decay, made_.gamma) == (0.9, 5e-4, 0.2)
            assert tuple(made_.milestones) == (step,)
        assert InnerConfig(inner_optim="SGD").optimiser(0.1).milestones == ()
        assert InnerConfig().idle() == {"decay": "--inner_optim SGD"} and not sgd.idle()

    @pytest.mark.parametrize(
        "dataset, given, there, found",
        [
            ("cifar10", "", ["dataset", "dataset/cifar10"], "dataset/cifar10"),
            ("cifar100", "", ["dataset", "dataset/cifar10"], "dataset"),
            ("cifar10", "D", ["dataset/cifar10", "D/cifar10"], "D/cifar10"),
            ("cifar10", "D", ["D/CIFAR10"], "D/CIFAR10"),
            ("cifar10", "D", ["D"], "D"),
            ("cifar10", "", [], ""),
            ("cub-200", "", ["dataset/CUB200"], "dataset/CUB200"),
            ("cub-200", "", ["dataset/CUB200", "datasets/CUB200"], "datasets/CUB200"),
            ("tiny-imagenet-200", "", ["tiny-imagenet-200"], "tiny-imagenet-200"),
            ("Tiny", "", ["datasets/tiny-imagenet-200"], "datasets/tiny-imagenet-200"),
            ("folder", "D", ["D/folder"], "D"),
        ],
    )
    def test_where_data_is_looked_for(self, dataset, given, there, found):
        for place in there:
            Path(place).mkdir(parents=True, exist_ok=True)
        cfg = PosterImagesConfig(dataset=dataset, data_path=given)
        assert at_hand(cfg) == replace(cfg, data_path=found)

    def test_defaults(self):
        cfg, _ = parse(Eval, "eval", [])
        known = flat(cfg)
        expected = {"method": "podd", "dataset": "cifar10", "zca_kind": "podd", "holdout": 0.1, "model": "convnet"}
        expected |= {"num_eval": 8, "eval_steps": [300, 600, 1000, 2000], "select_step": "last"}
        assert expected.items() <= known.items()
        assert not idle_options(cfg)
