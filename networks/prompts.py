"""What a class is called, and the sentences that it is put into: names and templates, "{}" standing for the name.

The long published lists are read from the packages that keep them: ImageNet's from open_clip, those of other data sets
from clip-benchmark, which is optional.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json
from utils.registry import nearest

PHOTO = ("a photo of a {}.",)
NAMED = ("photo", "simple", "imagenet")
_IMAGENET = ("imagenet", "imagenet-1k")
# Data sets by the names of ELEVATER → by those of clip-benchmark, where they differ.
BENCHMARK_NAMES = {
    "eurosat-clip": "eurosat",
    "fgvc-aircraft-2013b": "fgvc_aircraft",
    "flower102": "flowers",
    "kitti-distance": "kitti_closest_vehicle_distance",
    "oxford-iiit-pets": "pets",
    "patchcamelyon": "pcam",
    "rendered-sst2": "renderedsst2",
    "resisc45-clip": "resisc45",
    "stanfordcar": "cars",
    "voc2007classification": "voc2007",
}


def templates(name: str) -> tuple[str, ...]:
    """Templates by name: photo (one), simple (7), imagenet (80), a data set's own, or a file with one a line.

    UserError for what is not to be had.
    """
    if name == "photo":
        return PHOTO
    if name in ("simple", *_IMAGENET):
        from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

        published = SIMPLE_IMAGENET_TEMPLATES if name == "simple" else OPENAI_IMAGENET_TEMPLATES
        return tuple(template("{}") for template in published)
    if Path(name).is_file():
        return tuple(_template(line, f"templates {name}") for line in _lines(name, "templates"))
    found = _benchmark_list("en_zeroshot_classification_templates.json", name, "templates", NAMED)
    return tuple(_template(line, f"templates of {name}") for line in found)


def class_names(name: str) -> tuple[str, ...]:
    """Class names in the order of labels: imagenet, a data set of clip-benchmark, or a file with one a line."""
    if name in _IMAGENET:
        from open_clip import IMAGENET_CLASSNAMES

        return tuple(IMAGENET_CLASSNAMES)
    if Path(name).is_file():
        return tuple(_lines(name, "class names"))
    return tuple(_benchmark_list("en_classnames.json", name, "class names", ("imagenet",)))


def fill(template: str, name: str) -> str:
    """The sentence of a class."""
    return template.replace("{}", name)


def _template(line: str, where: str) -> str:
    line = line.replace("{c}", "{}")  # clip-benchmark's spelling
    if "{}" not in line:
        raise UserError(f"{where}: '{line}' has no {{}} for the class name")
    return line


def _lines(path: str, what: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError:
        raise UserError(f"{what} {path} is not UTF-8 text") from None
    if not any(lines):
        raise UserError(f"{what} {path} is empty; put one on each line")
    return [line for line in lines if line]


def _benchmark_list(file: str, name: str, what: str, named: Sequence[str]) -> list[str]:
    package = find_spec("clip_benchmark")
    if package is None or not package.submodule_search_locations:
        raise UserError(
            f"no {what} called '{name}'{nearest(name, named)} without the package clip-benchmark: "
            f"pip install --no-deps clip-benchmark, or name a file with one a line"
        )
    lists: dict[str, Any] = read_json(Path(package.submodule_search_locations[0]) / "datasets" / file, what)
    name = BENCHMARK_NAMES.get(name, name)
    if name not in lists:
        raise UserError(f"clip-benchmark has no {what} of '{name}'{nearest(name, lists)}; name a file with one a line")
    return lists[name]
