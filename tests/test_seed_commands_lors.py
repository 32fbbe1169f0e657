"""The commands that LoRS's authors published, word for word.

Their distill_tesla_lors.py is distill.py here, evaluate_only.py is eval.py; `EXP_NAME` is a script's name, `$1` a GPU.
"""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from methods.command import command, method_name
from methods.vldd import CONFIGS
from tests.data.conftest import Library
from utils.config import flat, parse

ROOT = Path(__file__).resolve().parents[1]
BUFFER = (
    "CUDA_VISIBLE_DEVICES=$1 python buffer.py --dataset={data} --train_epochs=10 --num_experts=20 "
    "--buffer_path='buffer' --image_encoder=nfnet --text_encoder=bert --image_size=224"
)
FLICKR = (
    "python distill_tesla_lors.py --dataset=flickr --buffer_path='buffer/flickr/nfnet_bert/InfoNCE' "
    "--image_encoder=nfnet --text_encoder=bert --syn_steps=8 --expert_epochs=1 "
)
COCO = (
    "python distill_tesla_lors.py --dataset=coco --buffer_path='buffer/coco/nfnet_bert/InfoNCE' "
    "--image_encoder=nfnet --text_encoder=bert --image_root='distill_utils/data/COCO/' --merge_loss_branches "
    "--syn_steps=8 --expert_epochs=1 --max_start_epoch=2 "
)
RATES = "--lr_teacher_img 0.1 --lr_teacher_txt 0.1 "
DISTILL = {
    "flickr_100": FLICKR + "--max_start_epoch=2 --lr_img=100 --lr_txt=100 --lr_lr=1e-2 " + RATES + "--lr_sim=10.0 "
    "--sim_type lowrank --sim_rank 10 --alpha 3 --num_queries 99 --mini_batch_size=20 --loss_type WBCE "
    "--name ${EXP_NAME}",
    "flickr_200": FLICKR + "--max_start_epoch=2 --lr_img=1000 --lr_txt=1000 --lr_lr=1e-2 " + RATES + "--lr_sim=10.0 "
    "--sim_type lowrank --sim_rank 5 --alpha 1.0 --num_queries 199 --mini_batch_size=20 --loss_type WBCE "
    "--name ${EXP_NAME}",
    "flickr_500": FLICKR + "--max_start_epoch=3 --lr_img=1000 --lr_txt=1000 --lr_lr=1e-2 " + RATES + "--lr_sim=100 "
    "--sim_type lowrank --sim_rank 20 --alpha 0.01 --num_queries 499 --mini_batch_size=40 --loss_type WBCE "
    "--name ${EXP_NAME} --eval_it 300",
    "coco_100": COCO + "--lr_img=1000 --lr_txt=1000 --lr_lr=1e-2 " + RATES + "--lr_sim=5.0 --sim_type lowrank "
    "--sim_rank 10 --alpha 1.0 --num_queries 99 --mini_batch_size=20 --loss_type WBCE --name ${EXP_NAME}",
    "coco_200": COCO + "--lr_img=1000 --lr_txt=1000 --lr_lr=1e-2 " + RATES + "--lr_sim=50 --sim_type lowrank "
    "--sim_rank 20 --alpha 1.0 --num_queries 199 --mini_batch_size=20 --loss_type WBCE --name ${EXP_NAME} "
    "--Iteration 2000",
    "coco_500": COCO + "--lr_img=5000 --lr_txt=5000 --lr_lr=1e-2 " + RATES + "--lr_sim=500 --sim_type lowrank "
    "--sim_rank 40 --alpha 1.0 --num_queries 499 --mini_batch_size=30 --temperature 0.1 --no_aug --loss_type WBCE "
    "--name ${EXP_NAME}",
}
EVALUATE = (
    "python evaluate_only.py --dataset=flickr --num_eval 1 --ckpt_path tmp/flickr_500_distilled.pt --loss_type WBCE "
    "--image_encoder=nf_resnet50 --text_encoder=bert --batch_train 64"
)
SCRIPTS = {"buffer.py": "buffer", "distill_tesla_lors.py": "distill", "evaluate_only.py": "eval"}
FIELD = {"num_queries": "num_pairs", "Iteration": "iterations", "ckpt_path": "distilled"}  # ours, where it differs
COMMANDS = {
    **{f"buffer_{data}": BUFFER.format(data=data) for data in ("flickr", "coco")},
    **{f"distill_{row}": text for row, text in DISTILL.items()},
    "evaluate_only": EVALUATE,
}
SMALL = (
    *("--image_encoder", "ConvNetD1W4", "--text_encoder", "tfidf", "--text_dim", "8", "--joint_width", "8"),
    *("--image_size", "16", "--device", "cpu"),
)


def words(name: str) -> tuple[str, list[str]]:
    """(verb, flags) of a published command."""
    data, _, count = name.removeprefix("distill_").partition("_")
    text = COMMANDS[name].replace("${EXP_NAME}", f"distill_{data}_lors_{count}")
    _, script, *flags = [word for word in shlex.split(text) if not word.startswith("CUDA_VISIBLE_DEVICES=")]
    return SCRIPTS[script], flags


def pairs(flags: list[str]) -> dict[str, object]:
    """What the flags say: name → text, a number where it is one, True for a flag that stands alone."""
    said: dict[str, object] = {}
    for word in flags:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            said[name] = value if equals else True
        else:
            said[name] = word
    return {name: float(value) if _is_number(value) else value for name, value in said.items()}


def _is_number(text: object) -> bool:
    return isinstance(text, str) and text.replace(".", "").replace("e-", "").isdigit()


def settings(verb: str, *flags: str) -> dict[str, object]:
    """The config of a verb, as its script would parse it; a list of one is the one."""
    peers = tuple(config for name, config in CONFIGS.items() if name != verb)
    found = flat(parse(CONFIGS[verb], verb, flags, peers)[0])
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_published_flag_sets_its_field_and_no_other(name: str):
    verb, flags = words(name)
    assert method_name(flags) == "vldd"  # --method is not needed
    said = {FIELD.get(flag, flag): value for flag, value in pairs(flags).items()}
    found, default = settings(verb, *flags), settings(verb)
    assert {field: found[field] for field in said} == said
    assert {field for field in found if found[field] != default[field]} <= set(said)


@pytest.mark.parametrize("row", DISTILL)
def test_a_row_of_the_table_is_its_script(row: str):
    said = pairs(words(f"distill_{row}")[1])
    for flag in ("name", "buffer_path", "image_root"):  # folders are flags, never in YAML
        said.pop(flag, None)
    found = settings("distill", "--config", str(ROOT / f"configs/vldd/lors_{row}.yaml"))
    assert {flag: found[FIELD.get(flag, flag)] for flag in said} == said
    # What the released code does without being told.
    assert (found["mode"], found["mini_batches"], found["protocol"]) == ("detached", "consecutive", "lors")
    assert (found["iterations"], found["eval_it"]) == (said.get("Iteration", 3000), said.get("eval_it", 50))
    assert found["merge_loss_branches"] == ("merge_loss_branches" in said)
    assert (found["temperature"], found["no_aug"]) == (said.get("temperature", 0.07), "no_aug" in said)


@pytest.fixture
def library(tmp_path, monkeypatch) -> Library:
    """Twelve photographs' worth of Flickr30K, also where LoRS keeps COCO; the folder is the working one."""
    monkeypatch.chdir(tmp_path)
    library = Library(tmp_path / "library")
    Path("distill_utils/data").mkdir(parents=True)
    shutil.copytree(library.images, "distill_utils/data/COCO")
    for split in ("train", "val", "test"):
        shutil.copy(library.file(split), library.notes / f"coco_karpathy_{split}.json")
    return library


@pytest.mark.parametrize(
    "row, fewer",
    [("flickr_100", ()), ("coco_500", ("--sim_rank", "4", "--mini_batch_size", "5", "--lr_sim", "5"))],
)
def test_the_commands_run(row: str, fewer: tuple[str, ...], library: Library):
    """Experts, and pairs that follow them, by the published commands with smaller sizes added at their ends."""
    data = row.split("_")[0]
    places = ["--ann_root", str(library.notes), *(["--image_root", str(library.images)] if data == "flickr" else [])]
    _, flags = words(f"buffer_{data}")
    # buffer.py of LoRS has COCO's place built in. Where its distillation is told to look, ours finds what ours wrote.
    flags += [*places, "--image_root", str(library.images), *SMALL, "--num_experts", "1", "--train_epochs", "2"]
    flags += ["--batch_size_train", "6", "--lr_teacher_img", "0.05", "--lr_teacher_txt", "0.05"]
    assert command("buffer", flags) == 0
    _, flags = words(f"distill_{row}")
    flags += [*places, *SMALL, "--num_queries", "12", "--num_eval", "1", "--epoch_eval_train", "1", *fewer]
    assert command("distill", [*flags, "--Iteration", "2"]) == 0
    folder = Path(f"runs/vldd/distill_{data}_lors_{row.split('_')[1]}")
    state = torch.load(folder / "distilled_2.pt", weights_only=True)
    diag, left, right = state["similarity_params"]
    alpha, rank = (3.0, 10) if row == "flickr_100" else (1.0, 4)
    assert left.shape == right.shape == (12, rank)
    torch.testing.assert_close(state["similarity_mat"], torch.diag(diag) + alpha / rank * left @ right.T)
    assert not torch.equal(right, torch.zeros_like(right))  # the similarity is learned


def test_a_file_of_the_reference_is_judged_by_its_command(library: Library):
    """evaluate_only.py on a file made by hand in LoRS's layout: pairs, [ω, L, R], S and two rates, and nothing else."""
    rng = torch.Generator().manual_seed(0)
    diag, left, right = (torch.randn(*shape, generator=rng) for shape in ((6,), (6, 2), (6, 2)))
    Path("tmp").mkdir()
    state = {
        "image": torch.randn(6, 3, 32, 32, generator=rng),
        "text": torch.randn(6, 768, generator=rng),
        "similarity_params": [diag, left, right],
        "similarity_mat": torch.diag(diag) + 1.5 * left @ right.T,
        "syn_lr_img": torch.tensor(0.01),
        "syn_lr_txt": torch.tensor(0.02),
    }
    torch.save(state, "tmp/flickr_500_distilled.pt")
    _, flags = words("evaluate_only")
    offline = ["--image_pretrained", "false", "--text_pretrained", "false", "--image_size", "32", "--device", "cpu"]
    places = ["--image_root", str(library.images), "--ann_root", str(library.notes)]
    assert command("eval", [*flags, *places, *offline, "--epoch_eval_train", "1"]) == 0
    result = json.loads(Path("tmp/eval/clean-nf_resnet50-bert/result.json").read_text(encoding="utf-8"))
    (row,) = result["rows"]
    assert (row["name"], row["size"], row["protocol"]["networks"]) == ("distilled", 6, 1)
    assert (result["config"]["loss_type"], result["config"]["batch_train"]) == ("WBCE", 64)
