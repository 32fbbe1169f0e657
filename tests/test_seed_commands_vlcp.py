"""The commands that VLCP's authors published, word for word; their scripts are verbs of ours, as the README says."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.class_names import CIFAR
from data.subsets import subset_classes, wordnet_labels, wordnet_names
from methods.command import command
from methods.vlcp import CONFIGS
from utils.config import flat, idle_options, options_of, parse
from utils.errors import UserError
from utils.files import read_json

ROOT = Path(__file__).resolve().parents[1]
# The variables that the second command needs are exported as its README does.
EXPORTED = {
    "TRAIN_DIR": "ImageNette/train",
    "MODEL_NAME": "benjamin-paine/stable-diffusion-v1-5",
    "OUTPUT_DIR": "diffusers/cifar100_seed0",
}
COMMANDS = {
    "buffer, model_vqa.py": """
python LLaVA/llava/eval/model_vqa.py     --model-path liuhaotian/llava-v1.5-7b     --question-file     output.json
--image-folder    ImageNette/train     --answers-file   answer-file-our.jsonl
""",
    "buffer, train_text_to_image.py": """
accelerate launch train_text_to_image.py   --pretrained_model_name_or_path=$MODEL_NAME   --train_data_dir=$TRAIN_DIR
--use_ema   --resolution=512 --center_crop --random_flip   --train_batch_size=8   --gradient_accumulation_steps=4
--gradient_checkpointing   --mixed_precision="fp16"      --learning_rate=1e-05   --max_grad_norm=1
--lr_scheduler="constant" --lr_warmup_steps=0   --output_dir=${OUTPUT_DIR} --num_train_epochs 8 --validation_epochs 2
--seed 0 --checkpoints_total_limit 2 --checkpointing_steps 500
""",
    "distill, gen_prototype.py": """
python distiilation/gen_prototype.py     --batch_size 10   --spec nette   --contamination 0.1  --data_dir ~/ImageNette/
--dataset imagenet     --diffusion_checkpoints_path ~/diffusers/ImageNette_seed0     --ipc 10     --km_expand 1
--label_file_path distiilation/label-prompt/class_nette.txt     --save_prototype_path ./prototypes     --seed 0
--metajson_file ~/ImageNette/train/metadata.jsonl --threshold 0.7 --tpk 30
""",
    "distill, gen_syn_image.py": """
python distiilation/gen_syn_image.py     --dataset imagenet
--diffusion_checkpoints_path ~/diffusers/ImageNette_seed0     --guidance_scale 10     --strength 0.7     --ipc 10
--km_expand 1     --label_file_path distiilation/label-prompt/class_nette.txt
--prototype_path prototypes/nette-ipc10-0.7-30-kmexpand1.json
--save_init_image_path ../data/distilled_data-imagenet-nette-ipc10-0.7-30/
--text_prototype nette_text/text_10_0.7_30.json     --seed 0
""",
    "eval, Minimax": """
python evaluation/Minimax/train.py -d imagenet
--imagenet_dir ../data/distilled_data-imagenet-nette-ipc10-0.7-30/imagenet_ipc10_10_s0.7_g10.0_kmexpand1_seed0/
~/ImageNette/ -n resnet_ap --nclass 10 --norm_type instance --ipc 10 --tag test --slct_type random --repeat 3
--spec nette --seed 0
""",
    "eval, RDED": """
python evaluation/RDED/main.py --subset "cifar10" --arch-name "resnet18_modified" --factor 1 --num-crop 5 --mipc 300
--ipc 10 --stud-name "resnet18_modified" --re-epochs 500
--syn-data-path cifar10/distilled_data-cifar10-cifar10-ipc10-0.9-30-con_0.0/cifar10_ipc10_10_s0.7_g10.0_kmexpand1_seed0
""",
}
# Of each command every flag: where it acts, and what is there then. ~ is the home folder.
PLACES = {
    "buffer, model_vqa.py": """
--model-path                    caption.caption_model               liuhaotian/llava-v1.5-7b
--question-file                 caption.question_file               output.json
--image-folder                  data.data_path                      ImageNette/train
--answers-file                  caption.answers_file                answer-file-our.jsonl
""",
    "buffer, train_text_to_image.py": """
--pretrained_model_name_or_path tuning.model                        benjamin-paine/stable-diffusion-v1-5
--train_data_dir                data.data_path                      ImageNette/train
--use_ema                       tuning.use_ema                      True
--resolution                    tuning.resolution                   512
--center_crop                   tuning.center_crop                  True
--random_flip                   tuning.random_flip                  True
--train_batch_size              tuning.train_batch_size             8
--gradient_accumulation_steps   tuning.gradient_accumulation_steps  4
--gradient_checkpointing        tuning.gradient_checkpointing       True
--mixed_precision               tuning.mixed_precision              fp16
--learning_rate                 tuning.learning_rate                1e-05
--max_grad_norm                 tuning.max_grad_norm                1.0
--lr_scheduler                  tuning.lr_scheduler                 constant
--lr_warmup_steps               tuning.lr_warmup_steps              0
--output_dir                    steps.buffer_path                   diffusers/cifar100_seed0
--num_train_epochs              tuning.num_train_epochs             8
--validation_epochs             tuning.validation_epochs            2
--seed                          run.seed                            0
--checkpoints_total_limit       tuning.checkpoints_total_limit      2
--checkpointing_steps           tuning.checkpointing_steps          500
""",
    "distill, gen_prototype.py": """
--batch_size                    prototypes.batch_size               10
--spec                          data.spec                           nette
--contamination                 prototypes.contamination            0.1
--data_dir                      data.data_path                      ~/ImageNette/
--dataset                       data.dataset                        imagenet
--diffusion_checkpoints_path    steps.diffusion_checkpoints_path    ~/diffusers/ImageNette_seed0
--ipc                           prototypes.ipc                      10
--km_expand                     exchange.km_expand                  1
--label_file_path               data.label_file_path                distiilation/label-prompt/class_nette.txt
--save_prototype_path           exchange.save_prototype_path        ./prototypes
--seed                          run.seed                            0
--metajson_file                 given.metajson_file                 ~/ImageNette/train/metadata.jsonl
--threshold                     texts.threshold                     0.7
--tpk                           texts.tpk                           30
""",
    "distill, gen_syn_image.py": """
--dataset                       data.dataset                        imagenet
--diffusion_checkpoints_path    steps.diffusion_checkpoints_path    ~/diffusers/ImageNette_seed0
--guidance_scale                synthesis.guidance_scale            10.0
--strength                      synthesis.strength                  0.7
--ipc                           prototypes.ipc                      10
--km_expand                     exchange.km_expand                  1
--label_file_path               data.label_file_path                distiilation/label-prompt/class_nette.txt
--prototype_path                exchange.prototype_path             prototypes/nette-ipc10-0.7-30-kmexpand1.json
--save_init_image_path          steps.save_init_image_path          ../data/distilled_data-imagenet-nette-ipc10-0.7-30/
--text_prototype                exchange.text_prototype             nette_text/text_10_0.7_30.json
--seed                          run.seed                            0
""",
    "eval, Minimax": """
-d                              data.dataset                        imagenet
--imagenet_dir                  inputs.imagenet_dir                 (SYN,~/ImageNette/)
-n                              hard.net_type                       (resnet_ap)
--nclass                        data.nclass                         10
--norm_type                     hard.norm_type                      instance
--ipc                           judge.ipc                           10
--tag                           inputs.tag                          test
--slct_type                     inputs.slct_type                    random
--repeat                        judge.repeat                        3
--spec                          data.spec                           nette
--seed                          run.seed                            0
""",
    "eval, RDED": """
--subset                        inputs.subset                       cifar10
--arch-name                     teacher.arch_name                   resnet18_modified
--factor                        student.factor                      1
--num-crop                      inputs.num_crop                     5
--mipc                          inputs.mipc                         300
--ipc                           judge.ipc                           10
--stud-name                     soft.stud_name                      (resnet18_modified)
--re-epochs                     student.epochs                      500
--syn-data-path                 inputs.syn_data_path                SYN
""",
}
SYN = {
    "eval, Minimax": "../data/distilled_data-imagenet-nette-ipc10-0.7-30/imagenet_ipc10_10_s0.7_g10.0_kmexpand1_seed0/",
    "eval, RDED": "cifar10/distilled_data-cifar10-cifar10-ipc10-0.9-30-con_0.0/"
    "cifar10_ipc10_10_s0.7_g10.0_kmexpand1_seed0",
}
# Flags of the released scripts that no command has but that mean something; other values than their defaults.
MORE = """
buffer   --num-chunks 2                  caption.num_chunks              2
buffer   --num-chunks 2 --chunk-idx 1    caption.chunk_idx               1
buffer   --temperature 0.2               caption.temperature             0.2
buffer   --top_p 0.9                     caption.top_p                   0.9
buffer   --num_beams 2                   caption.num_beams               2
buffer   --max_train_steps 5             tuning.max_train_steps          5
buffer   --snr_gamma 5                   tuning.snr_gamma                5.0
buffer   --validation_prompts dog        tuning.validation_prompts       dog
distill  --num_workers 3                 data.workers                    3
distill  --size 256                      prototypes.size                 256
distill  -g 8                            synthesis.guidance_scale        8.0
distill  -s 0.75                         synthesis.strength              0.75
eval     --dataset cifar10               data.dataset                    cifar10
eval     --net_type convnet              hard.net_type                   ('convnet',)
eval     --depth 18                      hard.depth                      18
eval     --width 0.5                     hard.width                      0.5
eval     --norm_type batch               hard.norm_type                  batch
eval     --size 128                      student.size                    128
eval     --epochs 10                     student.epochs                  10
eval     --batch_size 32                 student.batch_size              32
eval     --lr 0.1                        student.lr                      0.1
eval     --momentum 0.5                  student.momentum                0.5
eval     --wd 1e-3                       student.wd                      0.001
eval     --mixup vanilla                 student.mixup                   vanilla
eval     --beta 0.5                      student.cutmix                  0.5
eval     --mix_p 0.5                     hard.mix_p                      0.5
eval     -i 20                           judge.ipc                       20
eval     -f 2                            student.factor                  2
eval     -s drawn                        inputs.slct_type                drawn
eval     --rrc false                     hard.rrc                        False
eval     --dsa true                      hard.dsa                        True
eval     --decode_type bound             hard.decode_type                bound
eval     --batch_syn_max 64              hard.batch_syn_max              64
eval     -j 4                            data.workers                    4
eval     --re-batch-size 50              student.batch_size              50
eval     --re-accum-steps 2              soft.re_accum_steps             2
eval     --mix-type mixup                student.mix_type                mixup
eval     --mixup 0.5                     student.mixup                   0.5
eval     --cutmix 0.5                    student.cutmix                  0.5
eval     --max-scale-crops 0.8           soft.max_scale_crops            0.8
eval     --sgd                           soft.sgd                        True
eval     --cos false                     soft.cos                        False
eval     --learning-rate 0.2             student.lr                      0.2
eval     --weight-decay 1e-3             student.wd                      0.001
eval     --adamw-lr 0.002                student.lr                      0.002
eval     --adamw-weight-decay 0.02       student.wd                      0.02
eval     --temperature 5                 soft.temperature                5.0
eval     --input-size 64                 student.size                    64
""".strip().splitlines()
# What parses in the released scripts and does nothing there.
DEAD = ("--phase=1", "--exp-name=x", "--min-scale-crops=0.1")
# What makes the commands small; it stands at the end, where a later flag wins over an earlier one.
FEW = {
    "buffer, model_vqa.py": "--model-path tiny --max_new_tokens 3 --stages caption",
    "buffer, train_text_to_image.py": "--pretrained_model_name_or_path tiny --resolution 32 --max_train_steps 2 "
    "--mixed_precision no --train_batch_size 2 --gradient_accumulation_steps 2 --output_dir diffusers/ImageNette_seed0",
    "distill, gen_prototype.py": "--size 32 --stages prototypes",
    "distill, gen_syn_image.py": "--num_inference_steps 3 --output_size 32 --synthesis_batch 10",
    "eval, Minimax": "--size 16 --epochs 1 --width 0.0625",
    "eval, RDED": "--input-size 8 --re-epochs 1 --repeat 1 --teacher_epochs 1 --teacher_check false",
}


def typed(name: str) -> tuple[str, list[str]]:
    """The verb of a published command, and its words after the script's name as a shell hands them over."""
    line = re.sub(r"\$\{?(\w+)\}?", lambda found: EXPORTED[found[1]], COMMANDS[name])
    words = shlex.split(re.sub(r"(?<=\s)~/", f"{Path.home()}/", line))
    script = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return name.split(",")[0], words[script + 1 :]


def parsed(verb: str, *flags: str) -> object:
    peers = tuple(config for name, config in CONFIGS.items() if name != verb)
    return parse(CONFIGS[verb], verb, ("--method", "vlcp", *flags), peers)[0]


def at(cfg: object, path: str) -> object:
    for name in path.split("."):
        cfg = getattr(cfg, name)
    return cfg


@pytest.mark.parametrize("name", COMMANDS)
def test_every_published_flag_acts(name):
    """Each one is at its place with its value, and nothing else differs from the defaults."""
    verb, words = typed(name)
    cfg, seen, others = parsed(verb, *words), set(), flat(parsed(verb))
    for line in PLACES[name].strip().splitlines():
        flag, path, value = line.split(maxsplit=2)
        value = value.replace("SYN", SYN.get(name, "")).replace("~", str(Path.home()))
        found = at(cfg, path)
        assert f"({','.join(found)})" == value if isinstance(found, tuple) else str(found) == value, flag
        seen.add(flag)
        others.pop(path.split(".")[1])
    assert seen == {word.split("=")[0] for word in words if word.startswith("-")}
    assert {key: value for key, value in flat(cfg).items() if key in others} == others
    assert idle_options(cfg) == []


@pytest.mark.parametrize("line", MORE, ids=lambda line: " ".join(line.split()[:3]))
def test_every_flag_of_the_released_scripts_that_acts(line):
    verb, *flag, path, value = line.split()
    assert str(at(parsed(verb, *flag), path)) == value


@pytest.mark.parametrize("flag", DEAD)
def test_flags_that_did_nothing_are_refused(flag):
    with pytest.raises(UserError, match=f"unknown flag {flag.split('=')[0]}"):
        parsed("eval", flag)


@pytest.mark.parametrize("verb", CONFIGS)
def test_every_option_is_read_somewhere(verb):
    """A flag that parses and does nothing is worse than one that is refused."""
    folders = ("methods", "data", "networks", "utils")
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in (ROOT / folder).rglob("*.py"))
    names = [name for name in options_of(CONFIGS[verb]) if name != "compat"]  # is read before the others are parsed
    assert not [name for name in names if not re.search(rf"\.{name}\b", source)]


def test_protocols_and_networks_follow_from_the_commands():
    minimax, rded = (parsed("eval", *typed(name)[1]) for name in COMMANDS if name.startswith("eval"))
    assert (minimax.protocol, minimax.networks) == ("minimax", ("resnet_ap",))
    assert (rded.protocol, rded.networks) == ("rded", ("resnet18_modified",))
    assert rded.experiment == "cifar10_resnet18_modified_f1_mipc300_ipc10_cr5"


# --- the commands run ---


def picture(path: Path, rng: np.random.Generator, hue: int) -> None:
    """16 x 12 pixels: noise about a colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 120, (12, 16, 3)) + np.array([0, hue % 128, hue // 2])
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def nette(root: Path) -> list[str]:
    """ImageNette in the published layout, a dozen training images of each class and one to test on."""
    rng = np.random.default_rng(0)
    wnids = [wordnet_names()[0][number] for number in subset_classes("imagenette")[0]]
    for hue, wnid in enumerate(wnids):
        for number in range(12):
            picture(root / "train" / wnid / f"{wnid}_{number}.png", rng, 25 * hue)
        picture(root / "val" / wnid / "ILSVRC2012_val_1.png", rng, 25 * hue)
    return wnids


def run(name: str, more: str = "") -> None:
    """A published command, at its end what makes it small."""
    verb, words = typed(name)
    assert command(verb, ["--method", "vlcp", *words, *f"{FEW[name]} --device cpu {more}".split()]) == 0


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A home folder in which commands are typed; no test reaches a hub or another server."""
    from huggingface_hub import constants

    root = tmp_path_factory.mktemp("seed") / "home"
    root.mkdir()

    def unreachable(*args: object, **options: object) -> None:
        raise OSError("no route")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("HOME", str(root))
        patch.setattr(constants, "HF_HUB_CACHE", str(root / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        patch.setattr("torch.hub._hub_dir", str(root / "torch"))
        patch.setattr("urllib.request.urlopen", unreachable)
        yield root


@pytest.fixture(scope="module")
def published(home):
    """The README's commands up to the images, one after another, as they stand but smaller; the classes."""
    wnids = nette(home / "ImageNette")
    labels = home / "distiilation" / "label-prompt" / "class_nette.txt"
    labels.parent.mkdir(parents=True)
    labels.write_text("".join(f"{wnid}\t{wordnet_labels()[wnid]}\n" for wnid in wnids))
    # config_produce_llava.py writes the questions; llava_result_sum puts the captions where the others look for them.
    asked = "--image-folder ImageNette/train --questions_out output.json --stages caption --buffer_path asked"
    flags = f"--method vlcp --device cpu {asked} --caption_model tiny --max_new_tokens 1".split()
    assert command("buffer", flags) == 0
    run("buffer, model_vqa.py")
    shutil.copy(home / "runs/vlcp/imagenet/buffers/metadata.jsonl", home / "ImageNette/train")
    run("buffer, train_text_to_image.py")
    run("distill, gen_prototype.py")
    run("distill, gen_syn_image.py")
    return wnids


def test_captions(home, published):
    """Every image has a question with its class's name and an answer as LLaVA's script lays it out."""
    asked, answered = (
        [json.loads(line) for line in Path(name).read_text().splitlines()]
        for name in ("output.json", "answer-file-our.jsonl")
    )
    assert len(asked) == len(answered) == 120
    assert set(asked[0]) == {"question_id", "image", "text", "category"} and "tench, Tinca tinca" in asked[0]["text"]
    assert {*answered[0]} == {"question_id", "prompt", "text", "answer_id", "model_id", "metadata"}
    assert [row["question_id"] for row in answered] == [row["question_id"] for row in asked]


def test_tuning(home, published):
    assert {"vae", "unet", "text_encoder", "tokenizer", "scheduler", "model_index.json"} <= {
        path.name for path in (home / "diffusers/ImageNette_seed0/model").iterdir()
    }


def test_prototypes(home, published):
    """The files of the published names, which the next command reads."""
    images = read_json("prototypes/nette-ipc10-0.7-30-kmexpand1.json", "prototypes")
    texts = read_json("prototypes/nette_text/text_10_0.7_30.json", "captions")
    assert {*images} == {*texts} == {*published}
    assert all(np.shape(images[wnid]) == (10, 4, 4, 4) and len(texts[wnid]) == 10 for wnid in published)
    noted = read_json(home / "runs/vlcp/nette/prototypes" / f"{published[0]}.json", "prototypes")
    assert noted["label"] == "tench, Tinca tinca" and noted["clusters"].count(-1) == 2  # a tenth are outliers


def test_images(home, published):
    """Under the published folder's name, found again by the commands that judge."""
    folder = Path(SYN["eval, Minimax"])
    assert {path.name for path in folder.iterdir()} == {*published}
    assert {path.name for path in (folder / published[0]).iterdir()} == {
        f"{published[0]}-image{number}-0.png" for number in range(10)
    }


def test_minimax(home, published):
    run("eval, Minimax")
    (path,) = home.glob("runs/vlcp/nette/eval/minimax-nette-resnet_ap-ipc10-test-e1-seed0/result.json")
    rows = {row["name"]: row for row in read_json(path, "results")["rows"]}
    assert {name: row["size"] for name, row in rows.items()} == {"random": 100, "distilled": 100}
    told = rows["distilled"]["protocol"]
    assert (told["n"], told["network"], told["norm"], told["protocol"]) == (3, "resnet_ap-10", "instance", "minimax")


def cifar10(root: Path, syn: Path, named: list[str]) -> None:
    """CIFAR-10 as RDED keeps it and distilled images, ten a class; test folders and those of the latter are `named`."""
    rng = np.random.default_rng(1)
    for number, (name, renamed) in enumerate(zip(CIFAR["cifar10"], named, strict=True)):
        for image in range(10):
            picture(root / "train" / name / f"{image}.png", rng, 25 * number)
            picture(syn / renamed / f"{name}-image{image}0.png", rng, 25 * number)
        picture(root / "val" / renamed / "0.png", rng, 25 * number)


def judged(folder: str) -> dict[str, object]:
    """The protocol of the distilled row."""
    rows = {row["name"]: row for row in read_json(f"{folder}/result.json", "results")["rows"]}
    assert {name: row["size"] for name, row in rows.items()} == {"random": 100, "distilled": 100}
    return rows["distilled"]["protocol"]


def test_rded(home):
    """The data are in data/cifar10, where RDED has them."""
    cifar10(home / "data/cifar10", home / SYN["eval, RDED"], list(CIFAR["cifar10"]))
    run("eval, RDED", "--save_dir judged")
    told = judged("judged")
    assert (told["network"], told["protocol"], told["factor"]) == ("resnet18_modified", "rded", 1)
    assert told["teacher"] == "resnet18_modified (trained here)"


def test_rded_with_folders_as_its_scripts_rename_and_place_them(home, tmp_path, monkeypatch):
    """Classes by number; images below the experiment's folder. Smaller still by another network."""
    monkeypatch.chdir(tmp_path)
    numbers = [f"{number:05d}" for number in range(10)]
    cifar10(Path("data/cifar10"), Path("exp/cifar10_conv1_f1_mipc300_ipc10_cr5", SYN["eval, RDED"]), numbers)
    run("eval, RDED", "--save_dir judged --arch-name conv1 --stud-name conv1")
    assert judged("judged")["network"] == "conv1"


@pytest.mark.parametrize(
    "name, more, about",
    [
        (
            "buffer, model_vqa.py",
            "--answers-file a --buffer_path l --recaption --stages caption",
            "llava-hf/llava-1.5-7b-hf",
        ),
        ("buffer, train_text_to_image.py", "--output_dir m --mixed_precision no", EXPORTED["MODEL_NAME"]),
        ("distill, gen_prototype.py", "--save_dir p --diffusion_checkpoints_path {}", EXPORTED["MODEL_NAME"]),
        (
            "distill, gen_syn_image.py",
            "--save_dir s --save_init_image_path i --diffusion_checkpoints_path {}",
            EXPORTED["MODEL_NAME"],
        ),
        ("eval, Minimax", "--protocol rded --teacher torchvision", "resnet18-f37072fd.pth"),
        ("eval, RDED", "--teacher observers/cifar10_resnet18_modified.pth", "observers/cifar10_resnet18_modified.pth"),
    ],
    ids=["LLaVA", "Stable Diffusion", "its autoencoder", "its sampler", "torchvision's weights", "RDED's observer"],
)
def test_what_needs_weights_says_so_at_once(home, published, refused, name, more, about):
    """One line, exit 2, no waiting."""
    if "RDED" in name and not Path("data").is_dir():
        cifar10(home / "data/cifar10", home / SYN["eval, RDED"], list(CIFAR["cifar10"]))
    verb, words = typed(name)
    start = time.monotonic()
    line = refused(verb, "--method", "vlcp", *words, "--device", "cpu", *more.format(about).split())
    assert about in line and ("not here" in line or line.startswith("no ")), line
    assert time.monotonic() - start < 20


def test_half_precision_needs_a_gpu(home, published, refused):
    verb, words = typed("buffer, train_text_to_image.py")
    line = refused(verb, "--method", "vlcp", *words, "--device", "cpu", "--output_dir", "half")
    assert line == "--mixed_precision fp16 needs a GPU; give --mixed_precision no (or bf16) on the CPU"
