"""Every file in configs/ is accepted by every verb, and the command in its header finds it again."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from methods import get_method
from methods.core.hard_labels import epochs_of
from methods.poster_labels import map_shape
from methods.poster_layout import plan
from tests.test_seed_commands_podd import words as published
from tests.test_seed_commands_vlcp import typed as seed_command
from utils.config import BLOCKS, flat, idle_options, parse

ROOT = Path(__file__).resolve().parents[1]
# configs/models describes networks, not rows.
FILES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "models")
VERBS = ("buffer", "distill", "eval")

# The papers' settings. Row, then inner steps N, expert epochs M, bound of start epochs T+, images a step, whitening,
# rates of pixels, of the inner rate, and the inner rate's beginning; then the paper's figure.
# MTT: experts of 50 epochs. The author's commands, as DC-BENCH republished them; ImageNet as in MTT's issue 1.
MTT = """
cifar10_1       50  2   2  all  zca  1e2  1e-7  1e-2  46.3 ± 0.8
cifar10_10      30  2  20  all  zca  1e2  1e-5  1e-3  65.3 ± 0.7
cifar10_50      30  2  40  all   -   1e3  1e-5  1e-3  71.6 ± 0.2
cifar100_1      20  3  20  all  zca  1e3  1e-5  1e-2  24.3 ± 0.3
cifar100_10     20  2  20  all   -   1e3  1e-5  1e-2  40.1 ± 0.4
cifar100_50     80  2  40  125  zca  1e3  1e-5  1e-2  47.7 ± 0.2
tiny_1          10  2  10  all   -   1e4  1e-4  1e-2  8.8 ± 0.3
tiny_10         20  2  40  200   -   1e4  1e-4  1e-2  23.2 ± 0.2
tiny_50         20  2  40  300   -   1e4  1e-4  1e-2  28.0 ± 0.3
imagenette_1    20  2  10  all   -   1e5  1e-6  1e-2  47.7 ± 0.9
imagewoof_1     20  2  10  all   -   1e5  1e-6  1e-2  28.6 ± 0.8
imagefruit_1    20  2  10  all   -   1e5  1e-6  1e-2  26.6 ± 0.8
imageyellow_1   20  2  10  all   -   1e5  1e-6  1e-2  45.2 ± 0.8
imagemeow_1     20  2  10  all   -   1e5  1e-6  1e-2  30.7 ± 1.6
imagesquawk_1   20  2  10  all   -   1e5  1e-6  1e-2  39.4 ± 1.5
imagenette_10   20  2  10   20   -   1e5  1e-6  1e-2  63.0 ± 1.3
imagewoof_10    20  2  10   20   -   1e5  1e-6  1e-2  35.8 ± 1.8
imagefruit_10   20  2  10   20   -   1e5  1e-6  1e-2  40.3 ± 1.3
imageyellow_10  20  2  10   20   -   1e5  1e-6  1e-2  60.0 ± 1.5
imagemeow_10    20  2  10   20   -   1e5  1e-6  1e-2  40.4 ± 2.2
imagesquawk_10  20  2  10   20   -   1e5  1e-6  1e-2  52.3 ± 1.0
""".strip().splitlines()
# TESLA's published commands. FTD's Table 7 and its issue 3, with GSAM's alpha and the decay of the average.
TESLA = """
tesla_cifar10_1     50  2   5  all   -   1e3  1e-7  1e-2  48.5 ± 0.8
tesla_cifar100_50   80  2  40  125  zca  1e3  1e-5  1e-2  47.9 ± 0.3
tesla_imagenet1k_1  10  3  10  100   -   1e4  1e-4  1e-2  7.7 ± 0.2
""".strip().splitlines()
FTD = """
ftd_cifar10_1       50  2   2   all  zca  1e2  1e-7  1e-2  0.3  0.9999  46.8 ± 0.3
ftd_cifar10_10      30  2  20   all  zca  1e2  1e-5  1e-3  0.3  0.9995  66.6 ± 0.3
ftd_cifar10_50      30  2  40   all   -   1e3  1e-5  1e-2  1    0.999   73.8 ± 0.2
ftd_cifar100_1      40  3  20   all  zca  1e3  1e-5  1e-2  1    0.9995  25.2 ± 0.2
ftd_cifar100_10     20  2  40   all  zca  1e3  1e-5  1e-2  1    0.9995  43.4 ± 0.3
ftd_cifar100_50     80  2  40  1000  zca  1e3  1e-5  1e-2  1    0.999   50.7 ± 0.3
ftd_tiny_1          30  2  10   all   -   1e4  1e-4  1e-2  1    0.999   10.4 ± 0.3
ftd_tiny_10         20  2  40   500   -   1e4  1e-4  1e-2  1    0.999   24.5 ± 0.2
ftd_imagenette_1    20  2  10    64   -   1e4  1e-4  1e-2  1    0.999   52.2
ftd_imagewoof_1     20  2  10    64   -   1e4  1e-4  1e-2  1    0.999   30.1
ftd_imagefruit_1    20  2  10    64   -   1e4  1e-4  1e-2  1    0.999   29.1
ftd_imagemeow_1     20  2  10    64   -   1e4  1e-4  1e-2  1    0.999   33.8
ftd_imagenette_10   20  2  10    64   -   1e4  1e-4  1e-3  1    0.999   67.7
ftd_imagewoof_10    20  2  10    64   -   1e4  1e-4  1e-3  1    0.999   38.8
ftd_imagefruit_10   20  2  10    64   -   1e4  1e-4  1e-3  1    0.999   44.9
ftd_imagemeow_10    20  2  10    64   -   1e4  1e-4  1e-3  1    0.999   43.3
""".strip().splitlines()
# DATM: experts of 100 epochs by GSAM. N, M, first and last start epochs (c→T/e: below c at first, below T from step e),
# images a step, rates of pixels, of the inner rate and of labels, the threshold of the loss; then the paper's figure.
DATM = """
datm_cifar10_1      80  2   0  4            10  1e2  1e-7   5  1.1  46.9 ± 0.5
datm_cifar10_10     80  2   0  10→20/1000  100  1e2  1e-5   2  1    66.8 ± 0.2
datm_cifar10_50     80  2   0  20→40/2000  500  1e3  1e-5   2  1    76.1 ± 0.3
datm_cifar10_500    40  2  40  60         1000   50  1e-5  10  1    83.5 ± 0.2
datm_cifar10_1000  100  2  40  60         1000   50  1e-5  10  1    85.5 ± 0.4
datm_cifar100_1     40  3   0  10→20/1000 1000  1e3  1e-5  10  1    27.9 ± 0.2
datm_cifar100_10    80  2   0  30→50/2000 1000  1e3  1e-5  10  1    47.2 ± 0.4
datm_cifar100_50    80  2  20  70         1000  1e3  1e-5  10  1    55.0 ± 0.2
datm_cifar100_100   80  2  30  70         1000   50  1e-5  10  1    57.5 ± 0.2
datm_tiny_1         40  2   0  15→20/2000 1000  1e4  1e-4  10  1    17.1 ± 0.3
datm_tiny_10        40  2  10  50          500  1e2  1e-4  10  1    31.1 ± 0.3
datm_tiny_50        20  2  40  70         1000  1e2  1e-4  10  1    39.7 ± 0.3
""".strip().splitlines()
# PoDD: row, images a class, width and height of the poster, cells of its label map; then the paper's figure, as the
# cover has it (0.4) or as it is attributed to the paper (1.0).
PODD = """
cifar10_03   0.3    87   35    -   -
cifar10_05   0.5   113   45    -   -
cifar10_09   0.9   153   60    -   -
cifar10_10   1.0   160   64    -   59.1
cifar100_03  0.3   175  175  10x10  -
cifar100_04  0.4   202  202  10x10  35.7
cifar100_05  0.5   226  226  10x10  -
cifar100_09  0.9   303  303  10x10  -
cifar100_10  1.0   320  320  10x10  38.3
cub200_03    0.3   352  174  20x10  -
cub200_05    0.5   455  225  20x10  -
cub200_09    0.9   610  302  20x10  -
cub200_10    1.0   640  320  20x10  16.2
tiny_03      0.3   703  349  20x10  -
tiny_05      0.5   908  451  20x10  -
tiny_09      0.9  1211  608  20x10  -
tiny_10      1.0  1280  640  20x10  20.0
""".strip().splitlines()
# VLCP: row, threshold of common words, share of outliers, epochs; then the paper's figures in the title's words.
VLCP = """
woof_10        0.7  0.1  2000  ConvNet-6 34.8 ± 2.4, ResNetAP-10 39.5 ± 1.5, ResNet-18 39.9 ± 2.6
woof_20        0.7  0.1  1500  ConvNet-6 37.9 ± 1.9, ResNetAP-10 44.5 ± 2.2, ResNet-18 44.5 ± 2.0
woof_50        0.7  0.1  1500  ConvNet-6 54.5 ± 0.6, ResNetAP-10 57.3 ± 0.5, ResNet-18 58.9 ± 1.5
woof_70        0.7  0.1  1000  ConvNet-6 55.8, ResNetAP-10 60.6, ResNet-18 60.3
woof_100       0.7  0.1  1000  ConvNet-6 62.7, ResNetAP-10 65.7, ResNet-18 68.3
nette_10       0.7  0.1  2000  ResNetAP-10 64.8 ± 3.6
nette_20       0.7  0.1  1500  ResNetAP-10 71.4 ± 0.5
nette_50       0.7  0.1  1500  ResNetAP-10 81.2 ± 0.8
idc_10         0.7  0.1  2000  ResNetAP-10 57.0 ± 1.4
idc_20         0.7  0.1  1500  ResNetAP-10 63.3 ± 1.2
idc_50         0.7  0.1  1500  ResNetAP-10 71.9 ± 0.4
imagenet1k_10  0.7  0.1   500  ResNet-18 46.7 ± 0.4
imagenet1k_50  0.7  0.1   500  ResNet-18 60.5 ± 0.2
cifar10_10     0.9  0     500  ResNet-18 39.0 ± 0.7
cifar10_50     0.9  0     500  ResNet-18 63.2 ± 0.3
cifar100_10    0.2  0     500  ResNet-18 50.6 ± 0.7
cifar100_50    0.2  0     500  ResNet-18 66.1 ± 0.3
""".strip().splitlines()
UNVERIFIED = {f"image{name}_1" for name in ("fruit", "yellow", "meow", "squawk")}
UNVERIFIED |= {row.split()[0] for row in FTD if row.startswith("ftd_image")}
# Set → dataset, subset (where it has any), side, network.
SETS = {
    "cifar10": ("CIFAR10", None, 0, "ConvNet"),
    "cifar100": ("CIFAR100", None, 0, "ConvNet"),
    "tiny": ("Tiny", None, 0, "ConvNetD4"),
    "imagenet1k": ("ImageNet", "all", 64, "ConvNetD4"),
}


def read(file: Path, verb: str, *flags: str) -> object:
    """The config of a verb, as its script would parse it."""
    method = get_method(yaml.safe_load(file.read_text(encoding="utf-8"))["method"])
    configs = dict(method.CONFIGS)
    config = configs.pop(verb)
    return parse(config, verb, ["--config", str(file), *flags], peers=tuple(configs.values()))[0]


def header_commands(file: Path) -> list[tuple[str, list[str]]]:
    """(verb, flags) of each command in the comment lines of a config, the shell's loop over verbs written out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            continue
        loop = re.fullmatch(r"# for verb in ([a-z ]+); do (.+); done", line)
        written = [loop[2].replace("$verb", verb) for verb in loop[1].split()] if loop else [line.removeprefix("# ")]
        for command in written:
            words = shlex.split(command) if command.startswith("python ") else []
            if words[1:2] and words[1].endswith(".py"):
                found.append((words[1].removesuffix(".py"), words[2:]))
    return found


def test_there_are_configs():
    names = {str(file.relative_to(ROOT / "configs")) for file in FILES}
    assert {f"mtt/{row.split()[0]}.yaml" for row in (*MTT, *FTD, *TESLA, *DATM)} <= names
    assert {f"podd/{row.split()[0]}.yaml" for row in PODD} <= names
    assert {f"smoke/{name}.yaml" for name in ("vldd", "mtt", "podd", "vlcp")} | {
        "mtt/imagesquawk_texture.yaml"
    } <= names
    assert {f"vlcp/{row.split()[0]}.yaml" for row in VLCP} == {name for name in names if name.startswith("vlcp/")}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
class TestEachConfig:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_reads_it(self, file: Path, verb: str):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert set(tree) <= {"method", *BLOCKS}
        cfg = read(file, verb)
        assert cfg.method == tree["method"] and not idle_options(cfg)

    def test_its_header_says_how_to_run_it(self, file: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(ROOT)
        commands = header_commands(file)
        assert [verb for verb, _ in commands] == list(VERBS)
        for verb, words in commands:
            assert words[:2] == ["--config", str(file.relative_to(ROOT))]
            read(file, verb, *words[2:])

    def test_its_folder_is_its_method(self, file: Path):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert tree["method"] == (file.stem if file.parent.name == "smoke" else file.parent.name)
        assert importlib.import_module(f"methods.{tree['method']}")

    def test_it_names_no_machine(self, file: Path):
        """Folders are flags, never in YAML."""
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        keys = {key for block in BLOCKS for key in tree.get(block) or {}}
        assert not [key for key in keys if key.endswith(("_root", "_path", "_dir"))]


def class_row(name: str, figure: str) -> tuple[object, object, object]:
    """The buffer, distill and eval configs of a row of class images, after what all of them have in common."""
    file = ROOT / "configs" / "mtt" / f"{name}.yaml"
    buffer, distill, evaluate = (read(file, verb) for verb in VERBS)
    title, *header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f"Paper: {figure} %" in title
    assert ("unverified" in title) == (name in UNVERIFIED) == any("Unverified:" in line for line in header)
    assert header[1].startswith("# Ours: ") and "README.md, Protocols" in header[0]
    known, ipc = name.removeprefix("ftd_").removeprefix("tesla_").removeprefix("datm_").split("_")
    dataset, subset, res, model = SETS.get(known, ("ImageNet", known, 128, "ConvNetD5"))
    for cfg in (buffer, distill, evaluate):
        assert (cfg.data.dataset, cfg.data.res, cfg.net.model) == (dataset, res, model)
        assert subset is None or cfg.data.subset == subset
        assert (cfg.data.holdout, cfg.net.dsa, cfg.data.train_limit) == (0.1, True, 0)
        # As released: CIFAR-100 that is not whitened has CIFAR-10's statistics.
        assert cfg.data.norm == ("mtt" if dataset == "CIFAR100" and not cfg.data.zca else "data")
    assert buffer.data == distill.data == evaluate.data
    assert (distill.images.ipc, distill.images.texture, distill.images.no_aug) == (int(ipc), False, False)
    assert (buffer.expert.batch_size_train, buffer.expert.mom, buffer.expert.l2) == (256, 0, 0)
    assert (buffer.real.lr_teacher, buffer.expert.decay, buffer.expert.save_epochs) == (0.01, False, ())
    assert (distill.outer.momentum, distill.outer.eval_it, distill.show.select) == (0.5, 1000, "val")
    assert (evaluate.judge.protocol, evaluate.judge.num_eval, evaluate.judge.eval_mode) == ("clean", 5, "S")
    assert evaluate.source.source == ("random", "distilled", "full")
    # The last start epoch that can be drawn still has its target among the snapshots.
    assert buffer.expert.train_epochs >= distill.match.max_start_epoch - 1 + distill.match.expert_epochs
    return buffer, distill, evaluate


def check_inner(distill: object, words: list[str]) -> None:
    """Settings N, M, T+, images a step, whitening and three rates, as a row of the tables above has them."""
    match, images = distill.match, distill.images
    assert [match.syn_steps, match.expert_epochs, match.max_start_epoch] == [int(word) for word in words[:3]]
    assert images.batch_syn == (None if words[3] == "all" else int(words[3]))
    assert distill.data.zca == (words[4] == "zca")
    assert [images.lr_img, images.lr_lr, images.lr_teacher] == [float(word) for word in words[5:8]]
    assert (match.min_start_epoch, match.Sequential_Generation, distill.outer.threshold) == (0, False, 0)


@pytest.mark.parametrize("row", MTT, ids=lambda row: row.split()[0])
def test_a_row_of_mtt(row: str):
    name, *words = row.split(maxsplit=9)
    buffer, distill, _ = class_row(name, words[8])
    check_inner(distill, words)
    assert (buffer.expert.num_experts, buffer.expert.train_epochs, buffer.expert.rho) == (100, 50, 0)
    assert (distill.outer.iterations, distill.match.mode) == (5000, "exact")
    assert (distill.images.label_kind, distill.images.ema_decay, distill.images.start) == ("hard", 0, "real")


@pytest.mark.parametrize("row", TESLA, ids=lambda row: row.split()[0])
def test_a_row_of_tesla(row: str):
    name, *words = row.split(maxsplit=9)
    buffer, distill, _ = class_row(name, words[8])
    check_inner(distill, words)
    whole = "imagenet1k" in name
    assert (buffer.expert.num_experts, buffer.expert.train_epochs) == (50 if whole else 100, 50)
    assert (distill.outer.iterations, distill.match.mode) == (10000, "detached")
    assert distill.images.label_kind == ("teacher" if whole else "hard")


@pytest.mark.parametrize("row", FTD, ids=lambda row: row.split()[0])
def test_a_row_of_ftd(row: str):
    name, *words = row.split(maxsplit=11)
    buffer, distill, _ = class_row(name, words[10])
    check_inner(distill, words)
    expert = buffer.expert
    assert (expert.num_experts, expert.train_epochs) == (100, 50)
    assert (expert.rho, expert.gsam_alpha, expert.adaptive) == (0.01, float(words[8]), True)
    assert (distill.images.ema_decay, distill.images.label_kind) == (float(words[9]), "hard")
    assert (distill.outer.iterations, distill.match.mode) == (5000, "exact")


@pytest.mark.parametrize("row", DATM, ids=lambda row: row.split()[0])
def test_a_row_of_datm(row: str):
    name, steps, epochs, first, starts, batch, lr_img, lr_lr, lr_y, threshold, figure = row.split(maxsplit=10)
    buffer, distill, evaluate = class_row(name, figure)
    match, images, expert = distill.match, distill.images, buffer.expert
    assert (match.syn_steps, match.expert_epochs, match.min_start_epoch) == (int(steps), int(epochs), int(first))
    below, _, step = starts.partition("/")
    begins, ends = int(below.split("→")[0]), int(below.split("→")[-1])
    assert match.Sequential_Generation == bool(step)
    assert [match.starts_below(at) for at in (0, int(step or 0), 10000)] == [begins, ends, ends]
    assert (distill.data.zca, images.batch_syn) == (True, int(batch))
    assert (images.lr_img, images.lr_lr, images.lr_y) == (float(lr_img), float(lr_lr), float(lr_y))
    assert (images.lr_teacher, images.momentum_y, images.label_kind) == (0.01, 0.9, "learned")
    assert images.start == ("real" if name == "datm_cifar100_50" else "samples_predicted_correctly")
    assert (distill.outer.threshold, distill.outer.iterations) == (float(threshold), 10000)
    assert (distill.judge.batch_train, evaluate.judge.batch_train, distill.judge.num_eval) == (128, 128, 1)
    assert (expert.num_experts, expert.train_epochs) == (100, 100)
    assert (expert.rho, expert.gsam_alpha, expert.adaptive) == (0.01, 0.3, True)


def test_the_row_of_textures():
    file = ROOT / "configs" / "mtt" / "imagesquawk_texture.yaml"
    buffer, distill, evaluate = (read(file, verb) for verb in VERBS)
    assert buffer.data == distill.data == evaluate.data
    assert (distill.data.dataset, distill.data.subset, distill.data.res) == ("ImageNet", "imagesquawk", 256)
    assert (buffer.net.model, buffer.expert.num_experts, buffer.expert.train_epochs) == ("ConvNetD5", 100, 50)
    images, match = distill.images, distill.match
    assert (images.texture, images.canvas_size, images.canvas_samples, images.start) == (True, 2, 1, "noise")
    assert (images.ipc, match.syn_steps, match.expert_epochs, match.max_start_epoch) == (1, 20, 2, 10)
    assert (images.lr_img, images.lr_lr, images.lr_teacher) == (1000, 1e-6, 0.01)


def test_each_row_of_class_images_is_in_a_table_above():
    known = {row.split()[0] for row in (*MTT, *TESLA, *FTD, *DATM)} | {"imagesquawk_texture"}
    assert {file.stem for file in (ROOT / "configs/mtt").glob("*.yaml") if "_mini_" not in file.name} == known


@pytest.mark.parametrize("row", PODD, ids=lambda row: row.split()[0])
def test_a_row_of_podd(row: str):
    """The published command of its data set, but for the name and the poster's size."""
    name, ipc, width, height, cells, figure = row.split()
    file = ROOT / "configs" / "podd" / f"{name}.yaml"
    title, *header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert f" {ipc} images a class ({width} x {height} pixels). Paper: " in title
    assert ("not known to us" in title) == (figure == "-") and (figure == "-" or f"Paper: {figure} %" in title)
    assert ("unverified" in title) == (ipc == "1.0") == any("Unverified:" in line for line in header)
    assert "README.md, Posters" in header[0] and header[1].startswith("# Ours: ")
    buffer, distill, evaluate = (read(file, verb) for verb in VERBS)
    assert buffer.data == distill.data == evaluate.data
    assert buffer.grid == distill.grid == evaluate.grid
    known = name.split("_")[0]
    seed = parse(type(distill), "distill", published(known))[0]
    own = {"name", "poster_width", "poster_height"}
    assert {key: value for key, value in flat(distill).items() if key not in own} == {
        key: value for key, value in flat(seed).items() if key not in own
    }
    assert (distill.grid.poster_width, distill.grid.poster_height) == (int(width), int(height))
    assert name.endswith("_09") == (distill.grid == seed.grid)
    rows, columns = distill.grid.poster_class_num_y, distill.grid.poster_class_num_x
    order = torch.arange(rows * columns).view(rows, columns)
    layout = plan(distill.grid, 64 if known == "tiny" else 32, order)
    assert layout.ipc == pytest.approx(float(ipc), abs=0.01)
    found = map_shape(layout, layout.classes * distill.poster.comp_ipc, distill.poster.label_shape)
    assert ("x".join(map(str, found[::-1])) if distill.poster.train_y else "-") == cells
    assert evaluate.source.source == ("random", "crops", "distilled", "full")


def test_the_demo_of_podd_is_below_an_image_a_class():
    """300 pixels for ten digits of 64, judged as they were chosen."""
    file = ROOT / "configs" / "smoke" / "podd.yaml"
    distill, evaluate = read(file, "distill"), read(file, "eval")
    layout = plan(distill.grid, 8, torch.arange(10).view(2, 5))
    assert (layout.pixels, round(layout.ipc, 2), len(layout.patches)) == (300, 0.47, 36)
    assert evaluate.judge.looks == distill.judge.looks and evaluate.judge.num_eval == 5


@pytest.mark.parametrize("row", VLCP, ids=lambda row: row.split()[0])
def test_a_row_of_vlcp(row: str):
    """The published commands' settings, each protocol with its students."""
    name, threshold, contamination, epochs, figures = row.split(maxsplit=4)
    file, (known, ipc) = ROOT / "configs" / "vlcp" / f"{name}.yaml", name.split("_")
    title, *header = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert title.endswith(f" {ipc} images a class. Paper: {figures} %.")
    assert "best epoch on test" in header[0] and header[1].startswith("# Ours: not run: ")
    buffer, distill, evaluate = (read(file, verb) for verb in VERBS)
    assert buffer.data == distill.data == evaluate.data
    dataset, spec = (known, "") if known.startswith("cifar") else ("imagenet", known)
    assert (distill.data.source, distill.data.nclass) == ((dataset, spec), 0)
    tuned, command = buffer.tuning, parse(type(buffer), "buffer", seed_command("buffer, train_text_to_image.py")[1])[0]
    given = {key: value for key, value in flat(tuned).items() if key != "model"}
    assert given == {key: flat(command.tuning)[key] for key in given}
    assert tuned.model == "benjamin-paine/stable-diffusion-v1-5" and buffer.caption.temperature == 0.2
    seed = parse(type(distill), "distill", seed_command("distill, gen_syn_image.py")[1])[0]
    assert (distill.prototypes.ipc, distill.texts.tpk, distill.prototypes.size) == (int(ipc), 30, 512)
    assert (distill.texts.threshold, distill.prototypes.contamination) == (float(threshold), float(contamination))
    assert distill.synthesis == seed.synthesis
    side = {"imagenet1k": 224, "cifar10": 32, "cifar100": 32}.get(known, 256)
    assert distill.synthesis.side(distill.data.row) == side
    soft = dataset != "imagenet" or spec == "imagenet1k"
    small = "resnet18_modified" if dataset != "imagenet" else "resnet18"
    hard = ("convnet", "resnet_ap", "resnet") if known == "woof" else ("resnet_ap",)
    assert (evaluate.protocol, evaluate.networks) == (("rded", (small,)) if soft else ("minimax", hard))
    assert (evaluate.judge.ipc, evaluate.student.epochs, evaluate.judge.repeat) == (int(ipc), int(epochs), 3)
    assert evaluate.student.factor == (2 if spec == "imagenet1k" else 1)
    assert soft or int(epochs) == epochs_of(int(ipc), 10)
