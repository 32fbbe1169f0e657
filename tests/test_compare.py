"""`eval.py --compare` and `--cross`, from files to tables: who is trained on what, how often, and what is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch

from methods import pair_judging
from methods.core.evaluation import Report
from methods.core.retrieval import Judge
from methods.pair_judging import recorded
from networks import build_network
from tests.conftest import TinyRun, works
from utils.files import load_tensors
from utils.metrics import RETRIEVAL

pytestmark = pytest.mark.usefixtures("own_folder")
JUDGED = ("--num_eval", "2", "--epoch_eval_train", "2", "--device", "cpu")


@pytest.fixture
def here(tiny_run: TinyRun) -> tuple[str, ...]:
    return ("--cache_dir", str(tiny_run.root / "cache"), *JUDGED)


@pytest.fixture
def lors(tiny_run: TinyRun) -> str:
    """A file as LoRS leaves it: six pairs, a similarity of rank 2, rates, and not a word of how it was made."""
    chance = torch.Generator().manual_seed(0)
    width = load_tensors(tiny_run.distilled, "pairs")["text"].shape[1]
    diag, left, right = torch.ones(6), *(torch.randn(2, 6, 2, generator=chance) * 0.1)
    state = {
        "image": torch.randn(6, 3, 16, 16, generator=chance),
        "text": torch.randn(6, width, generator=chance) * 0.5,
        "similarity_params": [diag, left, right],
        "similarity_mat": torch.diag(diag) + 1.5 * left @ right.T,
        "syn_lr_img": torch.tensor(0.05),
        "syn_lr_txt": torch.tensor(0.02),
    }
    torch.save(state, "lors.pt")
    return "lors.pt"


def result(place: str) -> list[dict]:
    return json.loads(Path(place, "result.json").read_text())["rows"]


@pytest.fixture
def trained(monkeypatch) -> list[tuple]:
    """What networks were trained on, without any training: (loss, label, sizes, rates) of each set that was judged.

    The scores are made up: random pairs have 2 and 3, the n-th other set has 10 n and 10 n + 2.
    """
    seen, losses = [], {}
    real = pair_judging.judged_loss

    def noted_loss(cfg):
        found = real(cfg)
        losses[found] = cfg
        return found

    def pairs(self, source, split="test", label=""):
        phases = source(0)
        cfg = losses[self.loss_fn]
        rates = [tuple(round(rate, 6) for rate in part.lr.values()) for part in phases]
        seen.append(((cfg.loss_type, cfg.temperature), label, [len(part.images) for part in phases], rates))
        base = 10 * sum(name != "random," for _, name, *_ in seen)
        values = [2.0, 3.0] if label == "random," else [base, base + 2.0]
        how = {"networks": 2, "epochs": 2, "select": "val", "protocol": "clean", "about": "as made up"}
        scores = {name: values for name in RETRIEVAL}
        return Report(scores, how, scores)

    monkeypatch.setattr(pair_judging, "judged_loss", noted_loss)
    monkeypatch.setattr(Judge, "pairs", pairs)
    return seen


def test_sets_side_by_side(tiny_run, here, lors, capsys):
    """Nothing made up: a file of ours, one of LoRS, a coreset, random pairs and all data."""
    flags = ("--compare", f"ours={tiny_run.distilled}", f"LoRS={lors}", "--num_pairs", "6", "--name", "toy", *here)
    flags += ("--data", "random", "herding", "distilled", "full", "--coreset_features", "raw", "--full_epochs", "2")
    works("eval", *flags)
    said = capsys.readouterr().out
    place = "runs/vldd/toy/compare"
    rows = {row["set"]: row for row in result(place)}
    assert list(rows) == ["random", "herding", "ours", "LoRS", "full"]
    assert [row["size"] for row in rows.values()] == [6, 6, 8, 6, 200]
    width = load_tensors(tiny_run.distilled, "pairs")["text"].shape[1]
    pair = 4 * (3 * 16 * 16 + width)
    assert [row["bytes"] for row in rows.values()][:4] == [6 * pair, 6 * pair, 8 * pair + 8, 6 * pair + 4 * 30 + 8]
    for row in rows.values():
        assert all(len(part["values"]) == 2 for part in row["metrics"].values())
        assert row["metrics"]["last"] == row["last"]["r_mean"]
    with open(f"{place}/comparison.csv") as file:
        lines = {line["set"]: line for line in csv.DictReader(file)}
    assert {name: float(line["r_mean"]) for name, line in lines.items()} == {
        name: row["metrics"]["r_mean"]["mean"] for name, row in rows.items()
    }
    for text in (said, Path(place, "comparison.md").read_text()):
        assert all(f"| {name} " in text for name in rows) and "beats random" in text
    assert f"look at {place}/report.html" in said
    assert "herding: " in Path(place, "report.html").read_text()
    works("eval", *flags, "--data", "distilled")
    again = {row["set"]: row for row in result(f"{place}-2")}
    assert again["LoRS"]["metrics"]["r_mean"] == rows["LoRS"]["metrics"]["r_mean"], "whatever else is judged beside it"
    assert again["ours"]["metrics"]["gain"] == rows["ours"]["metrics"]["gain"]


def test_each_set_by_its_own_recipe_and_every_random_set_once(tiny_run, here, lors, trained):
    state = load_tensors(tiny_run.distilled, "pairs")
    config = state["meta"]["config"] | {"loss_type": "WBCE", "temperature": 0.2}
    torch.save(state | {"meta": state["meta"] | {"config": config}}, "wbce.pt")
    flags = ("--compare", f"ours={tiny_run.distilled}", f"same={tiny_run.distilled}", "wbce.pt", lors)
    own = [tuple(round(float(state[name]), 6) for name in ("syn_lr_img", "syn_lr_txt"))]
    works("eval", *flags, "--data", "distilled", "random", "--loss_type", "CWCL", *here, "--save_dir", "out")
    assert [(label, loss, sizes) for loss, label, sizes, _ in trained] == [
        ("random,", ("InfoNCE", 0.07), [8]),
        ("ours,", ("InfoNCE", 0.07), [8]),
        ("same,", ("InfoNCE", 0.07), [8]),  # and its random pairs are those of `ours`
        ("random,", ("WBCE", 0.2), [8]),
        ("wbce,", ("WBCE", 0.2), [8]),
        ("random,", ("CWCL", 0.07), [6]),
        ("lors,", ("CWCL", 0.07), [6]),  # notes nothing, so the flags count
        ("random,", ("CWCL", 0.07), [8]),  # random pairs as such: the flags' recipe, as many as each file has
        ("random,", ("CWCL", 0.07), [6]),
    ]
    assert [rates for *_, rates in trained] == [*[own] * 5, *[[(0.05, 0.02)]] * 2, *[[(0.1, 0.1)]] * 2]
    rows = {row["set"]: row for row in result("out")}
    assert list(rows) == ["ours", "same", "wbce", "lors", "random, 8 pairs", "random, 6 pairs"]
    assert rows["ours"]["metrics"]["gain"]["values"] == [8.0, 9.0]
    assert rows["lors"]["metrics"]["gain"]["values"] == [38.0, 39.0] and rows["lors"]["beats_random"]
    assert rows["lors"]["place"] == [1, 1] and rows["random, 8 pairs"]["place"] == [5, 6]


def test_a_random_row_of_the_same_recipe_is_not_trained_again(tiny_run, here, trained):
    """Learned rates of 0.1 are as good as the flags' 0.1."""
    state = load_tensors(tiny_run.distilled, "pairs")
    tenth = {"syn_lr_img": torch.tensor(0.1), "syn_lr_txt": torch.tensor(0.1)}
    torch.save(state | tenth, "ours.pt")
    works("eval", "--compare", "ours.pt", "--data", "random", "distilled", *here)
    assert [label for _, label, *_ in trained] == ["random,", "ours,"]


def test_phases_are_compared_with_random_phases(tiny_run, here, trained):
    state = load_tensors(tiny_run.distilled, "pairs")
    rates = {"syn_lr_img": torch.tensor([0.3, 0.2]), "syn_lr_txt": torch.tensor([0.5, 0.4])}
    torch.save(state | rates | {"phases": [3, 5]}, "phased.pt")
    works("eval", "--compare", "phased.pt", *here)
    assert [sizes for _, _, sizes, _ in trained] == [[3, 5], [3, 5]]
    assert [found for *_, found in trained] == [[(0.3, 0.5), (0.2, 0.4)]] * 2


def test_towers_in_turn(tiny_run, here, trained, capsys):
    flags = ("--cross", "ConvNetD1W8+tfidf", "mlp+tfidf", "--data", "random", "distilled", "--save_dir", "out", *here)
    state = load_tensors(tiny_run.distilled, "pairs")
    torch.save(state | {"syn_lr_img": torch.tensor(0.1), "syn_lr_txt": torch.tensor(0.1)}, "ours.pt")
    works("eval", "--distilled", "ours.pt", *flags)
    rows = result("out")
    assert [row["name"] for row in rows] == [
        *("random, ConvNetD1W8+tfidf", "distilled, ConvNetD1W8+tfidf", "random, mlp+tfidf", "distilled, mlp+tfidf")
    ]
    labels = [label for _, label, *_ in trained]
    assert labels == ["random,", "distilled,"] * 2, "the towers that judge learn from random pairs, too"
    assert [row["place"] for row in rows] == [[2, 2], [1, 1]] * 2
    said = capsys.readouterr().out
    assert "Mean of the six recalls" in said and "| ConvNetD1W8+tfidf |  mlp+tfidf |" in said


def test_towers_in_turn_are_trained(tiny_run, here):
    """Nothing made up: the numbers are those of an evaluation with these towers."""
    ours = ("--distilled", tiny_run.distilled)
    works("eval", *ours, "--cross", "ConvNetD1W8+tfidf", "mlp+tfidf", *here, "--save_dir", "cross")
    works("eval", *ours, "--image_encoder", "mlp", *here, "--save_dir", "alone")
    (alone,), (_, crossed) = result("alone"), result("cross")
    assert all(crossed["metrics"][name] == part for name, part in alone["metrics"].items())


def test_weights_are_of_the_encoder_that_they_came_with(tiny_run, here, trained):
    """A file made from a state dict of one network can be judged by others, which begin without it."""
    torch.save(build_network("ConvNetD2W16", 16).state_dict(), "w.pt")
    ours = ("--distilled", tiny_run.distilled, "--image_weights", "w.pt", "--image_encoder", "ConvNetD2W16")
    works("eval", *ours, "--cross", "ConvNetD2W16+tfidf", "mlp+tfidf", *here, "--save_dir", "out")
    assert [row["towers"] for row in result("out")] == ["ConvNetD2W16+tfidf", "mlp+tfidf"]


def test_towers_that_do_not_fit_are_refused_before_any_work(tiny_run, here, trained, refused, lors):
    flags = ("--compare", tiny_run.distilled, lors, "--data", "random", "distilled", *here)
    state = load_tensors(lors, "pairs")
    torch.save(state | {"text": state["text"][:, :7]}, "narrow.pt")
    line = refused("eval", *flags[:3], "narrow.pt", *flags[3:], "--cross", "mlp+tfidf")
    assert line.startswith("mlp+tfidf: narrow.pt holds texts 7 wide, but tfidf gives")
    line = refused("eval", *flags, "--cross", "mlp+tfidf", "nonesuch+tfidf")
    assert "nonesuch" in line and not trained
    assert "--cross takes IMAGE+TEXT" in refused("eval", *flags, "--cross", "mlp")


@pytest.mark.parametrize(
    "files, wanted",
    [
        (("A={ours}", "A={ours}"), "the set 'A' is named twice"),
        (("={ours}",), "--compare takes FILE or NAME=FILE"),
        (("A=",), "--compare takes FILE or NAME=FILE, not 'A='"),
        (("{ours}", "nowhere.pt"), "no distilled file at nowhere.pt"),
        (("full={ours}",), "a set cannot be called 'full'"),
        (("{ours}", "other.pt"), "other.pt was made with image_size 32, "),
        (("{ours}", "--distilled", "{ours}"), "--compare takes the place of --distilled"),
        (("{ours}", "--data", "random"), "--compare needs distilled among --data"),
        (("{ours}", "--num_pairs", "201", "--data", "distilled", "random"), "num_pairs is 201"),
        (("{ours}", "{lors}", "--loss_type", "BCE"), "give --clamp_similarity"),
    ],
)
def test_what_cannot_be_compared(tiny_run, here, trained, refused, lors, files, wanted):
    state = load_tensors(tiny_run.distilled, "pairs")
    config = state["meta"]["config"] | {"image_size": 32}
    torch.save(state | {"meta": state["meta"] | {"config": config}}, "other.pt")
    flags = [text.format(ours=tiny_run.distilled, lors=lors) for text in files]
    assert wanted in refused("eval", *here, "--compare", *flags)
    assert not trained and not Path("runs").exists()


def test_files_named_in_a_config(tiny_run, here, trained):
    """The first of them says which data and towers, as on the command line."""
    Path("row.yaml").write_text(
        f"method: vldd\neval:\n  compare: ['a={tiny_run.distilled}', 'b={tiny_run.distilled}']\n"
    )
    works("eval", "--config", "row.yaml", *here)
    assert [row["name"] for row in result("runs/vldd/row/compare")] == ["a", "b"]
    assert len(trained) == 3


def test_a_coreset_says_how_it_was_chosen(tiny_run, here, trained, capsys):
    flags = ("--data", "forgetting", "random", "--num_pairs", "9", "--buffer_path", tiny_run.buffers, *here)
    works("eval", "--distilled", tiny_run.distilled, *flags, "--save_dir", "out")
    coreset, random = result("out")
    assert coreset["size"] == 9 and "about" not in random
    assert f"forgetting: {coreset['about']}\n" in capsys.readouterr().out and "epochs" in coreset["about"]
    works("eval", "--distilled", tiny_run.distilled, *flags[3:], "--data", "herding", "--save_dir", "out")
    assert "expert" in result("out-2")[0]["about"]


def test_coresets_without_experts_are_refused(tiny_run, here, trained, refused):
    flags = ("--distilled", tiny_run.distilled, "--data", "random", "herding", *here)
    assert "nowhere" in refused("eval", *flags, "--buffer_path", "nowhere") and not trained
    assert "201" in refused("eval", *flags, "--coreset_features", "raw", "--num_pairs", "201") and not trained


def test_a_list_may_have_commas(tiny_run):
    """What the first file notes is found, however the files are told apart."""
    spaced = recorded(["--compare", f"A={tiny_run.distilled}", "B=b.pt"])
    assert spaced["dataset"] == "toy" and spaced == recorded(["--compare", f"A={tiny_run.distilled},B=b.pt"])


def test_options_of_coresets_that_nothing_reads(tiny_run, here, trained, capsys):
    works("eval", "--distilled", tiny_run.distilled, "--never_learned", "drop", *here, "--save_dir", "out")
    assert "--never_learned drop does nothing without --data forgetting" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags", [("--compare", "{ours}", "--save_dir", "out"), ("--distilled", "{ours}", "--save_dir", "out")]
)
def test_results_are_written_before_they_are_told(tiny_run, here, trained, monkeypatch, refused, flags):
    """Whoever reads the output may have left long ago (`eval.py ... | head`)."""

    def gone(*args):
        raise OSError("nobody reads this")

    monkeypatch.setattr(pair_judging, "overview", gone)
    monkeypatch.setattr(pair_judging, "results_table", gone)
    assert refused("eval", *(flag.format(ours=tiny_run.distilled) for flag in flags), *here) == "nobody reads this"
    assert len(result("out")) == 1
