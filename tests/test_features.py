"""Every advertised feature, end to end through the three verbs on drawn pictures, and what it must change."""

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from methods import vldd
from methods.command import command
from methods.core.store import TrajectoryStore
from methods.lors import LOSSES
from tests.data.conftest import Library
from utils.files import digest, load_tensors
from utils.run import read_log

ROOT = Path(__file__).resolve().parents[1]
DATA = "--dataset toy --toy_images 48 --image_size 16"
SMALL = "--image_encoder ConvNetD1W8 --text_encoder tfidf --text_dim 16"
EXPERTS = "--num_experts 1 --train_epochs 1 --batch_size_train 16 --expert_captions one --eval_freq 0"
PAIRS = "--num_pairs 4 --syn_steps 2 --iterations 2 --max_start_epoch 1 --lr_img 1 --lr_txt 1 --lr_lr 1e-6 --eval_it 0"
PAIRS = f"{PAIRS} --lr_teacher_img 0.01 --lr_teacher_txt 0.01 --draw false"
JUDGED = "--num_eval 1 --epoch_eval_train 2 --protocol vldd"
RECALLS = {f"{way}@{k}" for way in ("tr", "ir") for k in (1, 5, 10)} | {"tr_mean", "ir_mean", "r_mean"}
# Published networks of published width; the first are timm's own, thousands of weights only.
TOWERS = {
    "test_nfnet": 192,
    "test_vit": 64,
    "test_resnet": 96,
    "test_efficientnet": 256,
    "mlp": 128,
    "ConvNetD2W8BN": 128,
    "ConvNetD2W8NN": 128,
}
PUBLISHED = {
    "nfnet": 2304,
    "nf_resnet50": 1000,
    "nf_regnet": 1000,
    "vit": 1000,
    "resnet18": 512,
    "resnet18_gn": 512,
    "resnet50": 2048,
    "clip": 512,
}


pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """Two experts of three epochs, all kept, and four pairs learned from them; nobody writes here."""
    root = tmp_path_factory.mktemp("world")
    here = f"--cache_dir {root}/cache"
    longer = "--num_experts 2 --train_epochs 3 --eval_freq 2"
    buffer(f"{DATA} {SMALL} {here}", longer, root / "b")
    made = f"{DATA} {SMALL} {here} --buffer_path {root}/b"
    distill(made, place=root / "d")
    return SimpleNamespace(root=root, made=made, buffers=root / "b", pairs=root / "d" / "distilled_best.pt", here=here)


def run(verb: str, *flags: str) -> None:
    assert command(verb, [*" ".join(flags).split(), "--device", "cpu"]) == 0


def buffer(made: str, more: str = "", place: Path | str = "b") -> TrajectoryStore:
    """The experts that buffer.py leaves below `place`."""
    run("buffer", made, EXPERTS, more, f"--buffer_path {place}")
    return experts_in(place)


def experts_in(place: Path | str) -> TrajectoryStore:
    (manifest,) = Path(place).rglob("manifest.json")
    return TrajectoryStore.open(manifest.parent)


def distill(made: str, more: str = "", place: Path | str = "d") -> tuple[dict, dict, list[dict]]:
    """The first and the last file of pairs in `place`, and the log."""
    run("distill", made, PAIRS, more, f"--save_dir {place}")
    files = sorted(Path(place).glob("distilled_[0-9]*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    return load_tensors(files[0], "first"), load_tensors(files[-1], "last"), read_log(Path(place))


def judge(pairs: Path | str, more: str = "", place: str = "e") -> list[dict]:
    """The rows of result.json in `place`; each holds every recall, in per cent."""
    run("eval", f"--distilled {pairs}", JUDGED, more, f"--save_dir {place}")
    rows = json.loads(Path(place, "result.json").read_text())["rows"]
    for row in rows:
        assert set(row["metrics"]) == RECALLS
        values = [value for metric in row["metrics"].values() for value in metric["values"]]
        assert all(0 <= value <= 100 for value in values) and max(values) > 0
    return rows


def config_of(place: str = "e") -> dict:
    return json.loads(Path(place, "result.json").read_text())["config"]


def same(a: dict, b: dict, *names: str) -> bool:
    return all(torch.equal(a[name], b[name]) for name in names or ("image", "text", "syn_lr_img", "syn_lr_txt"))


def through(data: str, towers: str, judged: str = "") -> tuple[TrajectoryStore, dict, list[dict]]:
    """All three verbs; both sides of the pairs moved."""
    experts = buffer(f"{data} {towers}")
    start, end, log = distill(f"{data} {towers} --buffer_path b")
    assert [row["step"] for row in log] == [0, 1] and all(0 < row["loss"] < 1e3 for row in log)
    assert not same(start, end, "text") and torch.isfinite(end["image"]).all()
    return experts, end, judge("d/distilled_best.pt", judged)


# Image towers


@pytest.mark.parametrize(
    "name", [*TOWERS, *(pytest.param(name, marks=pytest.mark.slow) for name in PUBLISHED)], ids=str
)
def test_image_towers(world, name):
    size = 32 if name in PUBLISHED or name.startswith("test_") else 16
    data = f"{DATA} {world.here}".replace("--image_size 16", f"--image_size {size}")
    towers = SMALL.replace("ConvNetD1W8", f"{name} --image_pretrained false")
    experts, pairs, _ = through(data, towers)
    shapes = {group: dict(parts) for group, parts in experts.shapes.items()}
    assert shapes["txt"]["projection.weight"] == [(TOWERS | PUBLISHED)[name], 16]
    assert pairs["image"].shape == (4, 3, size, size)
    start, end = (experts.read(0, epoch) for epoch in (0, 1))
    assert not torch.equal(start["img"], end["img"]) and not torch.equal(start["txt"], end["txt"])


def test_logits_or_features(world):
    widths = []
    for output in ("features", "logits"):
        towers = f"{SMALL} --image_encoder test_vit --image_pretrained false --image_output {output}"
        experts = buffer(f"{DATA} {world.here} --image_size 32 {towers}", place=output)
        widths.append(dict(experts.shapes["txt"])["projection.weight"][0])
    assert widths == [64, 1000]


def test_batchnorm_networks_get_the_gradient_of_unrolling(world):
    towers = f"{DATA} {world.here} {SMALL} --image_encoder test_resnet --image_pretrained false --image_size 32"
    buffer(towers)
    exact, unrolled = (
        distill(f"{towers} --buffer_path b --lr_img 100", f"--mode {mode}", mode)[1] for mode in ("exact", "unroll")
    )
    torch.testing.assert_close(exact["image"], unrolled["image"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(exact["text"], unrolled["text"], rtol=1e-3, atol=1e-4)


def test_low_rank_adapters_alone_are_recorded_and_matched(world, monkeypatch):
    trunks, train_experts = [], vldd.train_experts

    def spy(task, *rest):
        def note() -> None:
            trunks.append(digest(*(p.detach() for p in task.net.image.parameters() if not p.requires_grad)))

        task = dataclasses.replace(task, renew=lambda seed, renew=task.renew: (note(), renew(seed)))
        train_experts(task, *rest)
        note()

    monkeypatch.setattr(vldd, "train_experts", spy)
    towers = f"{SMALL} --image_encoder test_vit --image_pretrained false --lora_rank 2"
    made = f"{DATA} {world.here} --image_size 32 {towers}"
    experts = buffer(made, "--num_experts 2")
    names = [name for name, _ in experts.shapes["img"]]
    assert names and all(name.endswith((".A", ".B")) for name in names)
    assert len(trunks) == 3 and len(set(trunks)) == 1, "nothing else moved, in any expert"
    assert torch.equal(experts.read(0, 0)["img"], experts.read(1, 0)["img"])
    assert not torch.equal(experts.read(0, 1)["img"], experts.read(1, 1)["img"])
    start, end, _ = distill(f"{made} --buffer_path b", "--lr_img 100")
    assert not same(start, end, "image")
    judge("d/distilled_best.pt")
    assert config_of()["lora_rank"] == 2


@pytest.mark.parametrize(
    "made, other, says",
    [
        ("--image_encoder test_vit --lora_rank 2", "--lora_alpha 9", "another frozen image"),
        ("--image_trainable false --joint_width 8", "--image_weights w.pt", "another frozen image"),
        ("--text_encoder tfidf", "--train_limit 20", "another text encoder"),
    ],
)
def test_experts_with_other_frozen_parts_are_refused(world, capsys, made, other, says):
    """Their shapes fit, but what they learned means nothing here."""
    from networks import build_network

    torch.save(build_network("ConvNetD1W8", 16).state_dict(), "w.pt")
    made = f"{DATA} {world.here} {SMALL} --image_pretrained false {made}"
    made += " --image_size 32" if "vit" in made else ""
    buffer(made)
    assert command("distill", f"{made} {PAIRS} --buffer_path b --save_dir d {other}".split()) == 2
    assert says in capsys.readouterr().err.strip().splitlines()[-1]
    distill(f"{made} --buffer_path b")


def test_frozen_image_tower(world):
    frozen = f"{SMALL} --image_trainable false --joint_width 8"
    experts, _, _ = through(f"{DATA} {world.here}", frozen)
    assert list(experts.shapes) == ["txt"] and dict(experts.shapes["txt"])["projection.weight"] == [8, 16]


def test_joint_width(world):
    experts, _, _ = through(f"{DATA} {world.here}", f"{SMALL} --joint_width 8")
    assert dict(experts.shapes["img"])["joint.weight"][0] == 8
    assert dict(experts.shapes["txt"])["projection.weight"] == [8, 16]


def test_image_weights_start_every_expert(world):
    from networks import build_network

    torch.manual_seed(7)
    net = build_network("ConvNetD1W8", 16)
    torch.save(net.state_dict(), "w.pt")
    experts, _, _ = through(f"{DATA} {world.here}", f"{SMALL} --image_weights w.pt")
    flat = torch.cat([weight.detach().flatten() for weight in net.parameters()])
    assert torch.equal(experts.read(0, 0)["img"], flat)


def test_trunk_images(world):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    np.savez("t.npz", train_images=images, train_labels=np.arange(64) % 3)
    towers = f"{SMALL} --trunk_images t.npz --trunk_epochs 1"
    made = f"{DATA} {towers} --cache_dir cache"
    experts = buffer(made, "--num_experts 2")
    assert torch.equal(experts.read(0, 0)["img"], experts.read(1, 0)["img"])
    assert not torch.equal(experts.read(0, 0)["img"], experts_in(world.buffers).read(0, 0)["img"])
    distill(f"{made} --buffer_path b")
    judge("d/distilled_best.pt")
    assert len(list(Path("cache/trunks").iterdir())) == 1, "trained once for three verbs"


# Text towers


@pytest.fixture(scope="module")
def text_folders(tmp_path_factory) -> Path:
    """Tiny encoders of three families, saved as the transformers library saves them: bert, distilbert, clip."""
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPModel,
        DistilBertConfig,
        DistilBertModel,
    )

    from networks.text import _learn_byte_pairs, _learn_word_pieces

    root = tmp_path_factory.mktemp("text")
    words = ["a red circle above a blue square", "a large green triangle to the left of a small yellow star"]
    torch.manual_seed(3)
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    pairs = _learn_byte_pairs(words, 400)
    special = {"bos_token_id": pairs.bos_token_id, "eos_token_id": pairs.eos_token_id}
    nets = {
        "bert": BertModel(BertConfig(vocab_size=200, max_position_embeddings=40, **small)),
        "distilbert": DistilBertModel(DistilBertConfig(vocab_size=200, dim=16, n_layers=1, n_heads=2, hidden_dim=32)),
        "clip": CLIPModel(
            CLIPConfig(
                text_config={"projection_dim": 6, "vocab_size": 400, "max_position_embeddings": 60, **small, **special},
                vision_config={"projection_dim": 6, "image_size": 32, "patch_size": 8, **small},
                projection_dim=6,
            )
        ),
    }
    for name, net in nets.items():
        net.save_pretrained(root / name)
        (pairs if name == "clip" else _learn_word_pieces(words, 200)).save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name, width", [("bert", 16), ("distilbert", 16), ("clip", 6)])
def test_local_text_encoders(world, text_folders, name, width):
    towers = f"--image_encoder ConvNetD1W8 --text_encoder {text_folders / name}"
    experts, pairs, _ = through(f"{DATA} {world.here}", towers)
    assert dict(experts.shapes["txt"])["projection.weight"][1] == pairs["text"].shape[1] == width


def test_text_pooling(world, text_folders):
    towers = f"{DATA} {world.here} --image_encoder ConvNetD1W8 --text_encoder {text_folders / 'bert'}"
    starts = []
    for pooling in ("cls", "mean"):
        made = f"{towers} --text_pooling {pooling}"
        buffer(made, place=pooling)
        starts.append(distill(f"{made} --buffer_path {pooling}", place=f"d_{pooling}")[0])
    assert same(*starts, "image") and not same(*starts, "text")


def test_both_sides_of_a_local_clip_with_adapters(world, text_folders):
    folder = text_folders / "clip"
    towers = f"--image_encoder {folder} --text_encoder {folder} --lora_rank 2 --lora_targets q_proj v_proj"
    experts, pairs, _ = through(f"{DATA} {world.here} --image_size 24", towers)
    assert len(experts.shapes["img"]) == 4 and pairs["text"].shape == (4, 6)
    assert dict(experts.shapes["txt"])["projection.weight"] == [6, 6]


@pytest.mark.slow
@pytest.mark.parametrize("name, width", [("bert", 768), ("distilbert", 768), ("clip", 512)])
def test_published_text_encoders_untrained(tmp_path, name, width):
    data = library(tmp_path, "folder")
    _, pairs, _ = through(data, f"--image_encoder ConvNetD1W8 --text_encoder {name} --text_pretrained false")
    assert pairs["text"].shape == (4, width)


def test_published_embeddings(world, monkeypatch):
    """With `--text_cache` no text encoder is needed; the same embeddings give the same pairs."""
    from data import DataConfig
    from methods.core.retrieval import Corpus
    from networks.towers import TowerConfig

    data = DataConfig(dataset="toy", toy_images=48, image_size=16, cache_dir=str(world.root / "cache"))
    corpus = Corpus(data, TowerConfig(image_encoder="ConvNetD1W8", text_encoder="tfidf", text_dim=16), "cpu")
    for split, middle in (("train", "train_"), ("test", "")):
        np.savez(f"toy_bert_{middle}text_embed.npz", bert_test_embed=corpus.embeddings(split))
    made = f"{DATA} {world.here} --image_encoder ConvNetD1W8 --text_encoder bert --text_cache ."
    buffer(made, "--num_experts 2 --train_epochs 3")
    _, pairs, _ = distill(f"{made} --buffer_path b")
    assert same(pairs, load_tensors(world.pairs, "pairs"))
    ours, theirs = judge("d/distilled_best.pt"), judge(world.pairs, place="e2")
    assert ours[0]["metrics"] == theirs[0]["metrics"]


@pytest.mark.parametrize(
    "encoder, says", [("bert", "pretrained weights of bert-base-uncased"), ("tfidf", "of different widths")]
)
def test_published_embeddings_without_their_encoder(world, capsys, encoder, says):
    """None are published for validation; that is told before an hour of training, not after."""
    for middle, count in (("train_", 48 * 5), ("", 200 * 5)):
        np.savez(f"toy_{encoder}_{middle}text_embed.npz", bert_test_embed=np.ones((count, 7), np.float32))
    made = f"{DATA} {world.here} {SMALL} --text_encoder {encoder} --text_cache ."
    for _ in range(2):  # the folder is not taken
        assert command("buffer", f"{made} --buffer_path b".split()) == 2
        error = capsys.readouterr().err
        assert says in error and "expert 0" not in error


# Experts


@pytest.mark.parametrize(
    "flag, from_epoch", [("--mom 0.9", 1), ("--l2 0.1", 1), ("--decay", 3), ("--expert_captions all", 1)]
)
def test_expert_options(world, flag, from_epoch):
    plain, ours = experts_in(world.buffers), buffer(f"{DATA} {SMALL} {world.here}", f"--train_epochs 3 {flag}")
    for epoch in range(4):
        parts = plain.read(0, epoch), ours.read(0, epoch)
        assert same(*parts, "img", "txt") == (epoch < from_epoch)
    lengths = [
        float((experts.read(0, from_epoch)["img"] - experts.read(0, from_epoch - 1)["img"]).norm())
        for experts in (plain, ours)
    ]
    if flag == "--decay":
        assert lengths[1] == pytest.approx(lengths[0] / 10, rel=0.3)
    if flag.startswith("--expert_captions"):  # several captions an image are several times as many steps
        assert lengths[1] > 1.5 * lengths[0]


@pytest.mark.parametrize("freq, epochs", [(0, []), (1, [1, 2, 3]), (2, [2, 3])])
def test_eval_freq(world, freq, epochs):
    experts = buffer(f"{DATA} {SMALL} {world.here}", f"--train_epochs 3 --eval_freq {freq}")
    log = read_log(experts.folder)
    assert [row["epoch"] for row in log] == [1, 2, 3]
    assert [row["epoch"] for row in log if "r_mean" in row] == epochs


def test_few_epochs_in_half_the_numbers(world):
    experts = buffer(f"{DATA} {SMALL} {world.here}", "--train_epochs 3 --save_epochs 0 2 --store_dtype bfloat16")
    files = sorted(path.name for path in experts.folder.rglob("*.safetensors"))
    assert files == ["epoch_000.safetensors", "epoch_002.safetensors"]
    whole = next(world.buffers.rglob("epoch_000.safetensors")).stat().st_size
    assert next(experts.folder.rglob("epoch_000.safetensors")).stat().st_size < 0.55 * whole
    full = experts_in(world.buffers).read(0, 2)
    for group, vector in experts.read(0, 2).items():
        assert vector.dtype == torch.float32 and torch.equal(vector, full[group].bfloat16().float())
    _, _, log = distill(f"{DATA} {SMALL} {world.here} --buffer_path b", "--expert_epochs 2")
    assert all(0 < row["loss"] < 1e3 for row in log)
    assert command("distill", f"{DATA} {SMALL} {world.here} {PAIRS} --buffer_path b --save_dir x".split()) == 2


def test_published_trajectories_give_the_same_pairs(world):
    """Exported, and found as a leaf, in VLDD's layout and in that of LoRS."""
    layouts = {"leaf": "leaf", "vldd": "vldd/toy/ConvNetD1W8/tfidf", "lors": "lors/toy/ConvNetD1W8_tfidf/InfoNCE"}
    native = load_tensors(world.pairs, "pairs")
    for root, leaf in layouts.items():
        run("buffer", DATA, SMALL, f"--buffer_path {world.buffers} --export {leaf}")
        names = {f"{group}_replay_buffer_{n}.pt" for group in ("img", "txt") for n in (0, 1)}
        assert {path.name for path in Path(leaf).iterdir()} == names
        _, pairs, _ = distill(f"{DATA} {SMALL} {world.here} --buffer_path {root}", place=f"d_{root}")
        assert same(pairs, native)


# Distillation


def test_noise(world):
    real = distill(world.made, place="real")[0]
    start, end, _ = distill(world.made, "--pix_init noise --txt_init noise", "noise")
    assert not same(real, start, "image") and not same(real, start, "text") and not same(start, end, "image")
    mean = start["image"].mean(dim=(0, 2, 3))
    assert torch.allclose(mean, torch.tensor([-0.0626, -0.0221, 0.0680]), atol=0.12)
    assert float(start["text"].std()) == pytest.approx(0.5253, rel=0.25)
    images = distill(world.made, "--pix_init noise", "images")[0]
    assert same(images, real, "text") and same(images, start, "image")


def test_kmeans_chooses_real_pairs(world):
    from data import DataConfig
    from data.toy import toy_data

    random = distill(world.made, "--no_aug", "random")[0]
    chosen = distill(world.made, "--no_aug --pair_init kmeans", "chosen")[0]
    train = toy_data(DataConfig(dataset="toy", toy_images=48, image_size=16), "cpu").train
    real = train.eval_images(torch.arange(48)).flatten(1)
    for pairs in (random, chosen):
        nearest, _ = torch.cdist(pairs["image"].flatten(1), real, compute_mode="donot_use_mm_for_euclid_dist").min(
            dim=1
        )
        assert float(nearest.max()) < 1e-4
    assert not same(random, chosen, "image")
    assert len({tuple(image.flatten().tolist()) for image in chosen["image"]}) == 4


@pytest.mark.parametrize("flag, learned, real", [("image_only", "image", "text"), ("text_only", "text", "image")])
def test_one_side_stays_real(world, flag, learned, real):
    start, end, _ = distill(world.made, f"--{flag}")
    assert same(start, end, real) and not same(start, end, learned)


def test_modes(world):
    runs = {mode: distill(world.made, f"--mode {mode}", mode) for mode in ("exact", "unroll", "detached")}
    first = [log[0]["loss"] for _, _, log in runs.values()]
    assert first == pytest.approx([first[0]] * 3, rel=1e-6)
    ends = {mode: end for mode, (_, end, _) in runs.items()}
    for name in ("image", "text", "syn_lr_img", "syn_lr_txt"):
        torch.testing.assert_close(ends["exact"][name], ends["unroll"][name], rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ends["exact"]["image"], ends["detached"]["image"], rtol=1e-4, atol=1e-6)
    one = [distill(world.made, f"--syn_steps 1 --mode {mode}", f"1{mode}")[1] for mode in ("exact", "detached")]
    torch.testing.assert_close(one[0]["image"], one[1]["image"], rtol=1e-4, atol=1e-6)


def test_student_logit_scale(world):
    losses = [distill(world.made, f"--student_logit_scale {scale}", scale)[2][0]["loss"] for scale in ("exp", "log")]
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", ["full", "lowrank"])
def test_similarity_learns_by_every_loss(world, kind, loss):
    kept = "--clamp_similarity" if loss == "BCE" else ""  # it knows no targets beyond [0, 1]
    start, end, _ = distill(world.made, f"--sim_type {kind} --sim_rank 2 --loss_type {loss} --lr_sim 10 {kept}")
    assert torch.equal(start["similarity_mat"], torch.eye(4))
    assert not torch.equal(end["similarity_mat"], torch.eye(4)) and torch.isfinite(end["similarity_mat"]).all()
    assert len(end["similarity_params"]) == {"full": 1, "lowrank": 3}[kind]
    if kind == "lowrank":
        judge("d/distilled_best.pt")
        assert config_of()["loss_type"] == loss


def test_mini_batches(world):
    start, end, _ = distill(world.made, "--mini_batch_size 2 --syn_steps 1 --iterations 1")
    moved = (start["image"] != end["image"]).flatten(1).any(dim=1)
    assert int(moved.sum()) == 2, "one step of two pairs moves two"


@pytest.mark.parametrize("draw", ["true", "false"])
def test_draw(world, draw):
    distill(world.made, f"--draw {draw}")
    drawn = sorted(path.name for path in Path("d").iterdir() if path.suffix in (".png", ".txt"))
    kinds = ("clipped_synthetic_images_{}_std_2.5.png", "synthetic_images_{}.png", "synthetic_sentences_{}.txt")
    assert drawn == (sorted(kind.format(step) for kind in kinds for step in (0, 2)) if draw == "true" else [])
    assert "data:image/png;base64," in Path("d/report.html").read_text()


# Evaluation


@pytest.mark.parametrize(
    "protocol, select, epochs", [("clean", "val", 100), ("vldd", "last", 51), ("lors", "test", 101)]
)
def test_protocols(world, protocol, select, epochs):
    (row,) = judge(world.pairs, f"--protocol {protocol} --epoch_eval_train 0 --num_eval 2")
    how = row["protocol"]
    assert (how["protocol"], how["select"], how["epochs"], how["networks"]) == (protocol, select, epochs, 2)
    assert ("validation_r_mean" in how) == (select == "val") and len(how["chosen_epochs"]) == 2
    assert all(len(metric["values"]) == 2 for metric in row["metrics"].values())
    assert all(metric["mean"] == pytest.approx(sum(metric["values"]) / 2) for metric in row["metrics"].values())


@pytest.mark.parametrize("data", ["random", "full", "distilled", "random distilled full", "full,random"])
def test_what_is_judged(world, data):
    rows = judge(world.pairs, f"--data {data} --num_pairs 5 --full_epochs 2 --full_batch 16")
    assert [row["name"] for row in rows] == data.replace(",", " ").split()
    sizes = {"random": 5, "full": 48, "distilled": 4}
    assert [row["size"] for row in rows] == [sizes[row["name"]] for row in rows]


def test_random_and_full_need_no_pairs(world):
    run("eval", DATA, SMALL, world.here, "--data random full --num_pairs 5 --num_eval 2 --epoch_eval_train 10")
    (result,) = Path("runs/vldd/toy/eval").glob("clean-*/result.json")
    random, full = json.loads(result.read_text())["rows"]
    assert random["protocol"]["select"] == full["protocol"]["select"] == "val"
    assert full["protocol"]["epochs"] == 10 and full["metrics"]["r_mean"]["mean"] > random["metrics"]["r_mean"]["mean"]
    values = random["metrics"]["r_mean"]["values"]
    assert values[0] != values[1], "other pairs and other weights for each network"


def test_the_same_file_scores_the_same_and_nothing_is_overwritten(world):
    import shutil

    shutil.copytree(world.root / "d", "d")
    run("eval", "--distilled d/distilled_best.pt --data distilled random --num_pairs 6", JUDGED)
    (first,) = Path("d/eval").glob("*/result.json")
    before = first.read_text()
    assert first.parent.name == "vldd-ConvNetD1W8-tfidf"
    run("eval", "--distilled d/distilled_best.pt --data random distilled --num_pairs 6", JUDGED)
    assert first.read_text() == before
    (second,) = set(Path("d/eval").glob("*/result.json")) - {first}
    rows = [{row["name"]: row for row in json.loads(path.read_text())["rows"]} for path in (first, second)]
    assert rows[0] == rows[1]
    page = Path("d/report.html").read_text()
    assert "random" in page and "distilled" in page
    assert f"{rows[0]['random']['metrics']['r_mean']['mean']:.1f}" in page
    assert "random" not in (world.root / "d/report.html").read_text()


@pytest.mark.parametrize("flag", ["--syn_lr_img 0.5", "--protocol clean --syn_lr_txt 3"])
def test_rates_given_by_hand(world, flag):
    base = " ".join(flag.split()[:-2])
    learned, ours = judge(world.pairs, base, "a"), judge(world.pairs, flag, "b")
    assert learned[0]["metrics"] != ours[0]["metrics"]


def test_other_towers_than_recorded(world):
    import shutil

    shutil.copytree(world.root / "d", "d")
    for towers in ("", "--image_encoder mlp --joint_width 8"):
        run("eval", "--distilled d/distilled_best.pt", JUDGED, towers)
    page = Path("d/report.html").read_text()
    assert all(f"distilled, vldd, {name} + tfidf" in page for name in ("ConvNetD1W8", "mlp")), "two rows, told apart"
    (row,) = judge(world.pairs, "--image_encoder mlp --joint_width 8")
    config = config_of()
    assert (config["image_encoder"], config["text_encoder"], config["image_size"]) == ("mlp", "tfidf", 16)
    assert row["metrics"] != judge(world.pairs, place="own")[0]["metrics"]


def test_file_of_lors(world):
    """It notes nothing, so the flags say everything; the numbers are those of the same pairs with notes."""
    state = load_tensors(world.pairs, "pairs")
    del state["meta"]
    torch.save(state, "lors.pt")
    ours = judge("lors.pt", f"{DATA} {SMALL} {world.here}", "bare")
    assert ours == judge(world.pairs, place="noted")
    assert command("eval", f"--distilled lors.pt {DATA} {SMALL} {JUDGED} --image_size 32".split()) == 2


# Runs


@pytest.mark.parametrize("verb", ["buffer", "distill"])
def test_tensorboard(world, verb):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    if verb == "buffer":
        buffer(f"{DATA} {SMALL} {world.here}", "--tensorboard --train_epochs 2")
    else:
        distill(world.made, "--tensorboard")
    (events,) = Path(".").rglob("events.out.tfevents.*")
    log = read_log(events.parents[1])
    found = EventAccumulator(str(events)).Reload().Scalars("loss")
    assert [item.value for item in found] == pytest.approx([row["loss"] for row in log], rel=1e-5)


def test_wandb(world, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    asked = f"{world.made} {PAIRS} --save_dir d --wandb trial".split()
    assert command("distill", asked) == 2
    assert capsys.readouterr().err == "distill.py: error: --wandb needs the package wandb; pip install wandb\n"
    told = []
    fake = SimpleNamespace(init=lambda **options: told.append(options), log=lambda row, step: told.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    assert command("distill", asked) == 0, "the refusal left nothing in the way"
    assert told[0]["project"] == "trial" and [step for step, _ in told[1:]] == [0, 1]
    assert "loss" in told[1][1]


def test_config_file_and_flags():
    config = f"--config {ROOT / 'configs/smoke/vldd.yaml'}"
    few = "--toy_images 60 --image_size 16 --image_encoder ConvNetD1W8"
    run("buffer", config, few, "--num_experts 1 --train_epochs 4 --eval_freq 0")
    run("distill", config, few, "--num_pairs 4 --iterations 1 --syn_steps 2 --eval_it 0 --pair_init random")
    run("eval", config, few, "--data random distilled --num_eval 1 --epoch_eval_train 2")
    (name,) = Path("runs/vldd").iterdir()
    (result,) = name.glob("eval/*/result.json")
    found = json.loads(result.read_text())
    assert [row["size"] for row in found["rows"]] == [4, 4]
    config = found["config"]
    assert (config["joint_width"], config["image_size"], config["toy_images"]) == (64, 16, 60), config
    assert torch.load(name / "distilled_1.pt", weights_only=True)["image"].shape == (4, 3, 16, 16)


def library(root: Path, dataset: str) -> str:
    """The flags of twelve photographs' worth of a data set on disk."""
    made = Library(root / "library")
    names = {"folder": "mine_{}.json", "coco": "coco_karpathy_{}.json", "flickr": "flickr30k_{}.json"}
    for split in ("train", "val", "test"):
        made.file(split).rename(made.notes / names[dataset].format(split))
    return f"--dataset {dataset} --image_root {made.images} --ann_root {made.notes} --image_size 16 --cache_dir cache"


@pytest.mark.parametrize("dataset", ["folder", "coco", "flickr"])
def test_files(tmp_path, dataset):
    experts, pairs, rows = through(library(tmp_path, dataset), SMALL, "--data distilled full --full_batch 8")
    assert experts.folder.relative_to("b").parts[0] == dataset
    assert rows[1]["size"] == 12 and pairs["image"].shape == (4, 3, 16, 16)
