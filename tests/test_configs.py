"""Every file in configs/ is accepted by every verb, and the command in its header finds it again."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
import yaml

from methods import get_method
from utils.config import BLOCKS, parse

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
VERBS = ("buffer", "distill", "eval")


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
    sizes = (100, 200, 500, 1000)
    assert {f"vldd/{data}_{count}.yaml" for data in ("flickr", "coco") for count in sizes} <= names
    assert "smoke/vldd.yaml" in names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
class TestEachConfig:
    @pytest.mark.parametrize("verb", VERBS)
    def test_every_verb_reads_it(self, file: Path, verb: str):
        tree = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert set(tree) <= {"method", *BLOCKS}
        assert read(file, verb).method == tree["method"]

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


@pytest.mark.parametrize("count", [100, 200, 500, 1000])
@pytest.mark.parametrize("data", ["flickr", "coco"])
def test_a_row_of_the_paper_is_what_its_name_says(data: str, count: int):
    file = ROOT / "configs" / "vldd" / f"{data}_{count}.yaml"
    distill, evaluate = read(file, "distill"), read(file, "eval")
    assert (distill.data.dataset, distill.pairs.num_pairs) == (data, count)
    assert (distill.match.syn_steps, distill.match.expert_epochs, distill.match.max_start_epoch) == (8, 1, 2)
    assert (distill.pairs.lr_img, distill.pairs.lr_txt, distill.pairs.lr_lr) == (1000, 1000, 0.01)
    assert (evaluate.judge.protocol, evaluate.judge.num_eval) == ("vldd", 5)
    assert "Paper: tr@1" in file.read_text(encoding="utf-8").splitlines()[0]
