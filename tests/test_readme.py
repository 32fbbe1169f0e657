"""Every command in README.md is one that the scripts take, and every file that it names is there."""

import re
import shlex
from pathlib import Path

import pytest

from methods import get_method
from methods.command import method_name
from utils.config import parse

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def commands() -> list[list[str]]:
    """The words of each shell command in the README's code blocks, loops over the verbs written out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL):
        block = block.replace("\\\n", " ")
        block = re.sub(
            r"for verb in ([a-z ]+); do\n(.*?)\ndone",
            lambda loop: "\n".join(loop[2].replace("$verb", verb) for verb in loop[1].split()),
            block,
            flags=re.DOTALL,
        )
        found += [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]
    return found


VERBS = ("buffer.py", "distill.py", "eval.py")
# A verb and its flags, as python or torchrun is given them; in an array of jobs one of its numbers stands for all.
SCRIPTS = [
    ["python", *(re.sub(r"\$SLURM_ARRAY_TASK_ID", "3", word) for word in words[at:])]
    for words in commands()
    for at in range(1, len(words))
    if words[0] in ("python", "torchrun") and words[at] in VERBS
]


def test_it_shows_each_script():
    assert {words[1] for words in SCRIPTS} == {"buffer.py", "distill.py", "eval.py"}


def test_torchrun_is_shown_where_it_is_taken():
    """Of each verb, and only of methods whose verb several processes share."""
    shown = [words for words in commands() if words[0] == "torchrun"]
    found = [(word.removesuffix(".py"), words) for words in shown for word in words if word in VERBS]
    assert {verb for verb, _ in found} == {"buffer", "distill", "eval"} and len(found) == len(shown)
    assert all(verb in get_method(method_name(words)).SHARED for verb, words in found)


@pytest.mark.parametrize("words", SCRIPTS, ids=lambda words: " ".join(words[1:4]))
def test_each_command_is_taken(words: list[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    verb = words[1].removesuffix(".py")
    configs = dict(get_method(method_name(words[2:])).CONFIGS)
    config = configs.pop(verb)
    parse(config, verb, words[2:], peers=tuple(configs.values()))


def test_each_target_of_make_is_there():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+)", README)) <= targets


def test_each_file_is_there():
    named = set(re.findall(r"`((?:configs|methods|tests|utils|data|networks)/[\w./]*\w)`", README))
    named |= set(re.findall(r"python -m (tests\.benchmarks\.\w+)", README))
    paths = [ROOT / (name.replace(".", "/") + ".py" if name.startswith("tests.") else name) for name in named]
    assert paths and not [path for path in paths if not path.exists()]


def test_each_configuration_is_in_the_table():
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert files <= set(re.findall(r"`(configs/[\w./]+\.yaml)`", README))
