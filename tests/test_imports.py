"""Imports run one way, importing does no work, and every imported package is in the one list of dependencies."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
OURS = {"methods", "networks", "data", "utils", "buffer", "distill", "eval"}
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.py"),
        *(p for part in ("methods", "networks", "data", "utils") for p in (ROOT / part).rglob("*.py")),
    )
)
TESTS = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("*.py"))
# What may be imported from where: the arrow of the style guide.
BELOW = {
    "script": {"methods", "core", "networks", "data", "utils"},
    "methods": {"methods", "core", "networks", "data", "utils"},
    "core": {"core", "networks", "data", "utils"},
    "networks": {"networks", "utils"},
    "data": {"data", "utils"},
    "utils": {"utils"},
}
# Systems do not import systems; beside these each may use the parts of methods/ that are no system.
SYSTEMS = {"vldd", "mtt", "podd", "vlcp", "dimefm"}
# The package that a top-level module comes in, where the names differ.
PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
PACKAGES |= {"open_clip": "open-clip-torch"}
OPTIONAL = {"tensorboard", "wandb", "h5py"}  # asked for by a flag, which names them if they are missing


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file: `from a import b` gives `a.b`."""
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(module: str) -> str:
    """The layer of one of our modules, given with dots."""
    top, *rest = module.split(".")
    if top == "methods" and rest[:1] == ["core"]:
        return "core"
    return top if top in BELOW else "script"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_run_one_way(path: Path):
    here = layer(".".join(path.with_suffix("").parts))
    for module in imported(path):
        if module.split(".")[0] in OURS:
            assert layer(module) in BELOW[here], f"{path} ({here}) imports {module} ({layer(module)})"


@pytest.mark.parametrize("path", sorted(p for p in SOURCES if p.parts[0] == "methods" and p.stem in SYSTEMS), ids=str)
def test_systems_do_not_import_systems(path: Path):
    for module in imported(path):
        parts = module.split(".")
        assert parts[0] != "methods" or len(parts) < 2 or parts[1] not in SYSTEMS, f"{path} imports {module}"


def test_networks_and_data_know_no_method_by_name():
    for path in SOURCES:
        if path.parts[0] in ("networks", "data", "utils") or path.parts[:2] == ("methods", "core"):
            parts = {part for module in imported(path) for part in module.split(".") if module.startswith("methods")}
            assert not parts & SYSTEMS, path


def test_importing_does_no_work():
    """No heavy package, no device, no change of threads or of chance, from any module of ours."""
    modules = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    modules = [module for module in modules if layer(module) != "script"]
    assert "methods.vldd" in modules
    heavy = (
        "timm",
        "transformers",
        "diffusers",
        "torchvision",
        "sklearn",
        "scipy",
        "matplotlib",
        "PIL",
        "tokenizers",
        "wandb",
    )
    code = f"""
import importlib, sys, torch
before = torch.get_num_threads(), torch.initial_seed()
for name in {modules}:
    importlib.import_module(name)
print([name for name in {heavy} if name in sys.modules])
print(torch.cuda.is_initialized(), (torch.get_num_threads(), torch.initial_seed()) == before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", "False True"]
    assert done.stderr == ""


def listed(file: str = "requirements.txt") -> dict[str, str]:
    """Package → version range, as in a list of requirements."""
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    wanted = [line for line in lines if line and not line.startswith("#")]
    return {re.match(r"[A-Za-z0-9-]+", line)[0]: line for line in wanted}


def third_party(paths: list[Path]) -> set[str]:
    tops = {module.split(".")[0] for path in paths for module in imported(path)}
    tops -= OURS | {"tests"} | set(sys.stdlib_module_names)
    return {PACKAGES.get(top, top) for top in tops}


def test_every_import_is_listed_and_all_that_is_listed_is_imported():
    assert third_party(SOURCES) - OPTIONAL <= set(listed())
    assert third_party(SOURCES + TESTS) - OPTIONAL - {"pytest", "hypothesis", "scipy"} == set(
        listed()
    )  # scikit-learn brings scipy
    assert set(listed("tests/requirements.txt")) == {"pytest", "pytest-xdist", "hypothesis", "h5py", "ruff"}


def test_dependencies_have_ranges():
    for package, line in listed().items():
        assert re.fullmatch(r"[a-z0-9-]+>=[0-9.]+(,<[0-9.]+)?", line), (
            f"{package} needs a lower bound, as a range: {line}"
        )


def test_the_conda_environment_has_no_list_of_its_own():
    tree = yaml.safe_load((ROOT / "requirements.yaml").read_text(encoding="utf-8"))
    assert tree["name"] == "vl-distill"
    assert tree["dependencies"] == ["python>=3.10", "pip", {"pip": ["-r requirements.txt"]}]
