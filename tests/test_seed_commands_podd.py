"""The commands that PoDD's authors published, word for word; their main.py is distill.py."""

import hashlib
import pickle
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.subsets import wordnet_names
from methods.command import command
from methods.podd import CONFIGS
from tests.methods.test_poster_order import CIFAR10, CIFAR100, TINY
from utils.config import flat, idle_options, options_of, parse
from utils.errors import UserError
from utils.files import load_tensors, read_json

pytestmark = pytest.mark.usefixtures("own_folder")  # no test reaches a hub

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "cifar10": """
python main.py --name=PoDD-CIFAR10-LT1-90 --distill_batch_size=96 --patch_num_x=16 --patch_num_y=6 --dataset=cifar10
--num_train_eval=8 --update_steps=1 --batch_size=5000 --ddtype=curriculum --cctype=2 --epoch=10000 --test_freq=10
--print_freq=10 --arch=convnet --window=60 --minwindow=0 --totwindow=200 --inner_optim=Adam --outer_optim=Adam
--inner_lr=0.001 --lr=0.001 --syn_strategy=flip_rotate --real_strategy=flip_rotate --seed=0 --zca --comp_ipc=1
--class_area_width=32 --class_area_height=32 --poster_width=153 --poster_height=60 --poster_class_num_x=5
--poster_class_num_y=2
""",
    "cifar100": """
python main.py --name=PoDD-CIFAR100-LT1-90 --distill_batch_size=50 --patch_num_x=20 --patch_num_y=20
--dataset=cifar100 --num_train_eval=8 --update_steps=1 --batch_size=2000 --ddtype=curriculum --cctype=2
--epoch=10000 --test_freq=10 --print_freq=10 --arch=convnet --window=100 --minwindow=0 --totwindow=300
--inner_optim=Adam --outer_optim=Adam --inner_lr=0.001 --lr=0.001 --syn_strategy=flip_rotate
--real_strategy=flip_rotate --seed=0 --zca --comp_ipc=1 --class_area_width=32 --class_area_height=32
--poster_width=303 --poster_height=303 --poster_class_num_x=10 --poster_class_num_y=10 --train_y
""",
    "cub200": """
python main.py --name=PoDD-CUB200-LT1-90 --distill_batch_size=200 --patch_num_x=60 --patch_num_y=30
--dataset=cub-200 --num_train_eval=8 --update_steps=1 --batch_size=3000 --ddtype=curriculum --cctype=2
--epoch=10000 --test_freq=25 --print_freq=10 --arch=convnet --window=60 --minwindow=0 --totwindow=200
--inner_optim=Adam --outer_optim=Adam --inner_lr=0.001 --lr=0.001 --syn_strategy=flip_rotate
--real_strategy=flip_rotate --seed=1 --zca --comp_ipc=1 --class_area_width=32 --class_area_height=32
--poster_width=610 --poster_height=302 --poster_class_num_x=20 --poster_class_num_y=10 --train_y
""",
    "tiny": """
python main.py --name=PoDD_TinyImageNet-LT1-90 --distill_batch_size=30 --patch_num_x=40 --patch_num_y=20
--dataset=tiny-imagenet-200 --num_train_eval=8 --update_steps=1 --batch_size=500 --ddtype=curriculum --cctype=2
--epoch=10000 --test_freq=5 --print_freq=1 --arch=convnet --window=100 --minwindow=0 --totwindow=300
--inner_optim=Adam --outer_optim=Adam --inner_lr=0.0005 --lr=0.0005 --syn_strategy=flip_rotate
--real_strategy=flip_rotate --seed=0 --zca --comp_ipc=1 --class_area_width=64 --class_area_height=64
--poster_width=1211 --poster_height=608 --poster_class_num_x=20 --poster_class_num_y=10 --train_y
""",
}
# Each flag of the released script that means something, with another value than its default, and where it acts.
FLAGS = """
--name run                      run.name                  run
--seed 3                        run.seed                  3
--workers 2                     data.workers              2
--root images                   data.data_path            images
--dataset cifar100              data.dataset              cifar100
--dataset cub-200               data.dataset              cub-200
--dataset tiny-imagenet-200     data.dataset              tiny-imagenet-200
--zca                           data.zca                  True
--arch convnet2                 net.name                  ConvNetNN
--arch convnet4                 net.name                  ConvNetD4
--arch convnetw                 net.name                  ConvNetW128x2
--arch convnetw4                net.name                  ConvNetD4W128x2
--arch convnetw2                net.name                  ConvNetW128x2BN
--lr 0.01                       poster.lr                 0.01
--inner_optim SGD               inner.inner_optim         SGD
--outer_optim Adam              outer.outer_optim         Adam
--decay --inner_optim SGD       inner.decay               True
--inner_lr 0.01                 poster.inner_lr           0.01
--label_lr_scale 10             poster.label_lr_scale     10.0
--distill_batch_size 10         poster.distill_batch_size 10
--window 30                     window.window             30
--minwindow 20                  window.minwindow          20
--totwindow 100                 window.totwindow          100
--num_train_eval 10             judge.num_eval            10
--train_y                       poster.train_y            True
--train_lr                      poster.train_lr           True
--batch_size 200                outer.batch_size          200
--eps 1e-6                      outer.eps                 1e-06
--wd 0.1                        outer.wd                  0.1
--test_freq 5                   outer.test_freq           5
--print_freq 20                 outer.print_freq          20
--epochs 100                    outer.epochs              100
--epoch 100                     outer.epochs              100
--ddtype standard               window.ddtype             standard
--cctype 3                      window.cctype             3
--clip_coef 0.8                 poster.clip_coef          0.8
--comp_aug                      poster.comp_aug           True
--comp_aug_real                 outer.comp_aug_real       True
--syn_strategy color_crop       poster.syn_strategy       color_crop
--real_strategy flip            outer.real_strategy       flip
--update_steps 2                outer.update_steps        2
--comp_ipc 10                   poster.comp_ipc           10
--class_area_width 20           grid.class_area_width     20
--class_area_height 21          grid.class_area_height    21
--load_poster_run_name abc      show.init_from            abc
--poster_class_num_x 10         grid.poster_class_num_x   10
--poster_class_num_y 1          grid.poster_class_num_y   1
--poster_width 200              grid.poster_width         200
--poster_height 70              grid.poster_height        70
--patch_num_x 20                grid.patch_num_x          20
--patch_num_y 8                 grid.patch_num_y          8
""".strip().splitlines()
DEAD = ("--rank=0", "--steps_per_epoch=10", "--batch_update_steps=1", "--start_epoch=0")
# What makes the commands small; it stands at the end, where a later flag wins over an earlier one. Whitening needs the
# eigenvectors of as many dimensions as an image has values: seconds at 32 px, minutes at Tiny ImageNet's 64.
FEW = """
--method podd --device cpu --max_outer_steps 1 --window 1 --totwindow 3 --num_train_eval 1 --eval_steps 2
--arch ConvNetW4 --batch_size 20 --distill_batch_size 8 --res 16
"""


def words(name: str) -> list[str]:
    """The published flags."""
    return shlex.split(COMMANDS[name])[2:]


def parsed(verb: str, *flags: str) -> object:
    peers = tuple(config for name, config in CONFIGS.items() if name != verb)
    return parse(CONFIGS[verb], verb, flags, peers)[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_published_flag_acts(name):
    """Each one is at its place, and all that is given is no more than that."""
    places = {line.split()[0]: line.split()[-2] for line in FLAGS}
    cfg = parsed("distill", *words(name))
    given = set()
    for word in words(name):
        flag, _, value = word.partition("=")
        part, option = places.get(flag, "net.model" if flag == "--arch" else "").split(".")
        found = getattr(getattr(cfg, part), "model" if flag == "--arch" else option)
        assert found == type(found)(value or True), word
        given.add("model" if flag == "--arch" else option)
    defaults = flat(parsed("distill"))
    assert {key for key, value in flat(cfg).items() if value != defaults[key]} <= given
    assert idle_options(cfg) == []


@pytest.mark.parametrize("line", FLAGS, ids=lambda line: line.split("  ")[0])
def test_every_flag_of_the_released_script(line):
    *flag, path, value = line.split()
    found = parsed("distill", *flag)
    for name in path.split("."):
        found = getattr(found, name)
    assert str(found) == value


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_option_is_read_somewhere(verb):
    """A flag that parses and does nothing is worse than one that is refused."""
    folders = ("methods", "data", "networks", "utils")
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    assert not [name for name in options_of(CONFIGS[verb]) if not re.search(rf"\.{name}\b", source)]


@pytest.mark.parametrize("flag", DEAD)
def test_flags_that_did_nothing_are_refused(flag):
    with pytest.raises(UserError, match=f"unknown flag {flag.split('=')[0]}"):
        parsed("distill", *words("cifar10"), flag)


@pytest.mark.parametrize(
    "verb, flags, others",
    [
        ("distill", "--label_lr_scale 2 --comp_ipc 3 --label_shape reference", "--train_y"),
        ("distill", "--lr_lr 0.1", "--train_lr"),
        ("distill", "--decay", "--inner_optim SGD"),
        ("distill", "--cctype 0 --start_per step", "--cctype 2"),
        ("distill", "--ddtype standard --cctype 3", "--ddtype curriculum"),
        ("distill", "--order table --order_encoder words", "--order text"),
        ("distill", "--zca_kind mtt", "--zca"),
    ],
)
def test_flags_that_take_another_say_so(verb, flags, others):
    alone = idle_options(parsed(verb, *flags.split()))
    assert alone and all(f"without {others.split()[0]}" in line for line in alone), alone
    assert idle_options(parsed(verb, *flags.split(), *others.split())) == []


# --- the commands run ---


def pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def cifar(kind: str, names: list[str], monkeypatch) -> None:
    """CIFAR's pickled batches, six training images of each class and one to test on, where torchvision finds them."""
    from torchvision import datasets

    known, count = getattr(datasets, kind), len(names)
    folder = Path("dataset", kind.lower(), known.base_folder)
    folder.mkdir(parents=True)

    def write(name: str, content: dict) -> str:
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    labels, key = list(range(count)) * 6, "labels" if kind == "CIFAR10" else "fine_labels"
    parts = np.array_split(np.arange(6 * count), len(known.train_list))
    for split, lists, rows in (("train", known.train_list, parts), ("test", known.test_list, [np.arange(count)])):
        found = []
        for seed, ((name, _), own) in enumerate(zip(lists, rows, strict=True)):
            found.append([name, write(name, {"data": pixels(len(own), seed), key: [labels[row] for row in own]})])
        monkeypatch.setattr(known, f"{split}_list", found)
    meta = known.meta["filename"], {known.meta["key"]: names}
    monkeypatch.setattr(known, "meta", known.meta | {"md5": write(*meta)})


def picture(path: Path, rng: np.random.Generator, sides: tuple[int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(path)


def birds() -> None:
    """CUB's tables and folders, 200 kinds: two training images of each and one to test on."""
    root, rng = Path("datasets/CUB200/CUB_200_2011"), np.random.default_rng(0)
    tables: dict[str, list[object]] = {"images": [], "image_class_labels": [], "train_test_split": []}
    for label in range(1, 201):
        kind = f"{label:03}.Bird_{label}"
        for number in range(3):
            name = f"{kind}/Bird_{label}_{number}.jpg"
            picture(root / "images" / name, rng, (9, 12))
            for table, value in zip(tables.values(), (name, label, int(number < 2)), strict=True):
                table.append(value)
    for name, values in tables.items():
        lines = [f"{number} {value}\n" for number, value in enumerate(values, 1)]
        (root / f"{name}.txt").write_text("".join(lines))


def tiny(formatted: bool) -> None:
    """Tiny ImageNet's 200 classes, two training images of each and one of its val; that sorted into classes, or not."""
    root, rng = Path("tiny-imagenet-200/tiny-imagenet-200"), np.random.default_rng(0)
    notes = []
    for number, wnid in enumerate(wordnet_names()[0][int(place)] for place in TINY.split()):
        for image in range(2):
            picture(root / "train" / wnid / "images" / f"{wnid}_{image}.JPEG", rng, (64, 64))
        name = f"val_{number}.JPEG"
        place = root / "val" / wnid / "images" if formatted else root / "val" / "images"
        picture(place / name, rng, (64, 64))
        notes.append(f"{name}\t{wnid}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(notes))


def run(verb: str, flags: list[str], more: str) -> None:
    assert command(verb, [*flags, *more.split()]) == 0


def ends(name: str, size: tuple[int, int], cells: tuple[int, int] | None, encoder: str) -> dict:
    """What one step leaves: a poster of (width, height) pixels that moved, and a label map of (rows, columns) cells."""
    (flag,) = (word for word in words(name) if word.startswith("--name="))
    folder = Path("runs/podd", flag.removeprefix("--name="))
    first, last, best = (load_tensors(folder / f"distilled_{step}.pt", "file") for step in (0, 1, "best"))
    assert first["poster"].shape == (3, *size[::-1]) and torch.isfinite(last["poster"]).all()
    assert not torch.equal(first["poster"], last["poster"])
    assert (tuple(first["label_map"].shape[1:]) if "label_map" in first else None) == cells
    if cells:
        assert (first["label_map"].amax((1, 2)) == 1).all()  # each class has a cell to start with
        assert not torch.equal(first["label_map"], last["label_map"]) and last["label_map"].min() >= 0
    assert best["zca"]["unit"] and last["meta"]["zca"] and last["meta"]["config"]["zca_kind"] == "podd"
    assert read_json(folder / "order.json", "order")["encoder"] == encoder
    assert {path.name for path in folder.iterdir()} >= {
        *("poster.png", "poster_raw.png", "poster_classes.png", "progress.gif", "order.json", "best_poster.pt"),
        *("distilled_best.pt", "log.jsonl", "config.yaml", "report.html"),
    }
    assert (folder / "best_label.pt").exists() == bool(cells)
    return last


def test_cifar10(monkeypatch):
    """Under dataset/cifar10, as the released script leaves it. All three verbs; then the tensors that it publishes."""
    cifar("CIFAR10", CIFAR10, monkeypatch)
    run("distill", words("cifar10"), FEW)
    last = ends("cifar10", (153, 60), None, "all-MiniLM-L6-v2")
    assert last["meta"]["classes"] == CIFAR10 and (last["meta"]["patches"], last["meta"]["order"][0][0]) == (96, 0)
    run("buffer", words("cifar10")[:1], "--method podd --dataset cifar10")
    home = Path("runs/podd/PoDD-CIFAR10-LT1-90")
    assert read_json(home / "buffers/order.json", "order") == read_json(home / "order.json", "order")
    judged = "--method podd --device cpu --num_eval 1 --eval_steps 2 --random_lrs 0.001"
    run("eval", words("cifar10")[:1], f"{judged} --data random crops distilled --save_dir e")
    rows = {row["name"]: row for row in read_json("e/result.json", "results")["rows"]}
    # Patches of 16 px, for which --res asks: as many whole images of that side.
    assert {name: row["size"] for name, row in rows.items()} == {"random": 35 * 256, "crops": 9180, "distilled": 9180}
    Path("checkpoints").mkdir()
    shutil.copy(home / "best_poster.pt", "checkpoints/abc_poster.pt")
    named = "--load_poster_run_name abc --name again --holdout 0 --select train"
    run("distill", words("cifar10"), f"{FEW} {named}")
    first = load_tensors("runs/podd/again/distilled_0.pt", "file")["poster"]
    assert torch.equal(first, load_tensors(home / "distilled_best.pt", "file")["poster"])


def test_cifar100(monkeypatch):
    """Under --root/cifar100, as the released script's default has it."""
    cifar("CIFAR100", CIFAR100.split(), monkeypatch)
    run("distill", words("cifar100"), f"{FEW} --root dataset")
    ends("cifar100", (303, 303), (10, 10), "all-MiniLM-L6-v2")


def test_cub200():
    birds()
    run("distill", words("cub200"), FEW)
    last = ends("cub200", (610, 302), (10, 20), "words")  # these birds are none of CUB's, and there is no CLIP
    assert last["meta"]["classes"][0] == "Bird_1" and last["meta"]["patches"] == 1800


@pytest.mark.parametrize(
    "formatted, size, patches",
    [(True, (1211, 608), (80, 40)), (False, (320, 160), (40, 20))],
    ids=["formatted", "as unpacked, a smaller poster"],
)
def test_tiny_imagenet(formatted, size, patches):
    """Patches of 16 px need to be more, to leave no pixel of the poster out."""
    tiny(formatted)
    grid = "--poster_width {} --poster_height {} --patch_num_x {} --patch_num_y {}".format(*size, *patches)
    run("distill", words("tiny"), f"{FEW} {grid}")
    last = ends("tiny", size, (10, 20), "all-MiniLM-L6-v2")
    assert last["meta"]["patches"] == patches[0] * patches[1]
