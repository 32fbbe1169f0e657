"""Results on disk: the rows of a table as JSON, never one in place of another, and read back for a page."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from methods.core.evaluation import Report
from methods.core.report import Row
from utils.config import options_of, peek
from utils.errors import UserError
from utils.files import check_written, load_tensors, read_json, write_signed
from utils.locks import hold
from utils.metrics import mean_std

Points = tuple[list[float], list[float]]
FORMAT = 1  # of result.json; what has none is of the first
# Options of the machine that a file was made on. Whoever made it says neither where ours writes nor what it fetches.
LOCAL = ("cache_dir", "workers", "download")
POINTS = 500  # of a curve that is `shortened`


def as_record(name: str, size: int, report: Report) -> dict[str, Any]:
    """A report as result.json keeps it: the metrics of the epoch that counts and, as `last`, of the last one."""
    record = {"name": name, "size": size, "metrics": summarise(report.metrics), "protocol": report.protocol}
    return record | ({"last": summarise(report.last)} if report.last else {})


def summarise(metrics: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Metric → mean, std and values."""
    found = {name: (mean_std(values), values) for name, values in metrics.items()}
    return {name: {"mean": mean, "std": std, "values": values} for name, ((mean, std), values) in found.items()}


def as_row(record: dict[str, Any]) -> Row:
    """A recorded row as the table shows it."""
    metrics = {name: (float(value["mean"]), float(value["std"])) for name, value in record["metrics"].items()}
    return Row(record["name"], metrics, record["size"], reference=record["name"].startswith("full"))


def write_result(folder: Path, records: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write result.json to `folder`, or beside it under the next free number: an earlier result is never replaced, nor
    is that of another process that ends at the same time."""
    for place in _free_places(folder):
        try:
            _lock = hold(place, "--save_dir")  # until this returns, or as long as the caller has it
        except UserError:  # whoever is in there will have a result
            continue
        if not (place / "result.json").exists():
            write_signed(place / "result.json", {"format": FORMAT, "rows": records, "config": config})
            return place / "result.json"
    raise AssertionError("numbers do not end")


def free_place(folder: Path) -> Path:
    """`folder`, or the one beside it with the next free number, where there is no result.json yet.

    What belongs to a result is written there before it: a killed command, given again, finds the place still free.
    """
    return next(_free_places(folder))


def _free_places(folder: Path) -> Iterator[Path]:
    for number in itertools.count(1):
        place = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        if not (place / "result.json").exists():
            yield place


def read_result(path: Path) -> dict[str, Any]:
    """The `rows` and the `config` of a result.json; UserError where it is none."""
    found = read_json(path, "evaluation")
    check_written(
        path, found, FORMAT, ("rows", "config"), f"{path} is no result of an evaluation", "restore or remove it"
    )
    found.pop("format", None)
    return found


def read_student(path: Path) -> dict[str, Any]:
    """What a student scored, as its file says; UserError where that is damaged."""
    found = read_json(path, "student's result")
    try:
        scores = [found["last"], found["best"]]
        if not all(type(found[name]) is int for name in ("epoch", "looks", "images")) or not found["protocol"].keys():
            raise TypeError("an entry of another kind")
        if not all(type(score) is float and 0 <= score <= 100 for score in scores):
            raise ValueError(f"scores {scores}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"student's result {path} is damaged ({error!r}); remove it to train that student anew"
        ) from None
    return found


def recorded_rows(folder: Path, judged_by: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The rows of every evaluation in a run folder; of two of the same thing the later stands.

    judged_by   what an evaluation's config says of its protocol and networks; where rows differ in it, each row's name
                says which
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("eval/*/result.json"), key=lambda path: path.stat().st_mtime):
        found = read_result(path)
        try:
            how = judged_by(found["config"])
            rows |= {(as_row(row).name, how): row for row in found["rows"]}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"evaluation {path} is damaged ({error!r}); restore or remove it") from None
    several = len({how for _, how in rows}) > 1
    return [row | {"name": f"{name}, {how}"} if several else row for (name, how), row in rows.items()]


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """UserError where the page of a run folder cannot be drawn of the settings and results that are in it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(
            f"no page can be drawn of {folder}: its config.yaml, or a result.json in {folder / 'eval'}, is damaged "
            f"({error!r}); restore or remove it"
        ) from error


def protocols_of(records: Sequence[dict[str, Any]]) -> str:
    """One sentence on the protocols behind some rows."""
    return "; ".join(sorted({row["protocol"]["protocol"] + ": " + row["protocol"]["about"] for row in records}))


def noted_config(path: Path | str) -> dict[str, Any]:
    """The config that a distilled file notes; empty where there is no file, or one that notes nothing."""
    if not Path(path).is_file():
        return {}
    found: Any = load_tensors(path, "distilled file", mmap=True)
    for key in ("meta", "config"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}  # what is no distilled file is refused later


def recorded_options(
    argv: Sequence[str], method: str, row: Callable[[dict[str, str]], str], parts: Sequence[type], file: str = ""
) -> dict[str, Any]:
    """The options of some config classes that the distilled file of an eval.py command was made with.

    row    the name of the run folder, from the command's data set, where neither a name nor a config gives it
    file   the distilled file, where the command names it in a way of its own
    """
    found = noted_config(file or distilled_path(argv, method, row))
    kept = {name for part in parts for name in options_of(part)}
    return {name: value for name, value in found.items() if name in kept and name not in LOCAL}


def distilled_path(argv: Sequence[str], method: str, row: Callable[[dict[str, str]], str]) -> Path:
    """The distilled file that an eval.py command judges; `row` as for `recorded_options`."""
    early = peek(argv, ("distilled", "ckpt_path", "name", "dataset", "subset"))
    name = early.get("name") or (Path(early["config"]).stem if "config" in early else row(early))
    default = Path("runs") / method / name / "distilled_best.pt"
    return Path(early.get("distilled") or early.get("ckpt_path") or default)


def series(history: Sequence[dict[str, float]], *names: str) -> dict[str, Points]:
    """Curves from a run's log: name → (steps, values) for those of `names` that were logged."""
    found = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
    return {name: tuple(map(list, zip(*points, strict=True))) for name, points in found.items() if points}


def shortened(points: Points) -> Points:
    """A curve of at most POINTS points: a longer one's means over as many stretches."""
    if len(points[0]) <= POINTS:
        return points
    parts = [torch.tensor(values, dtype=torch.float64).tensor_split(POINTS) for values in points]
    xs, ys = ([float(stretch.mean()) for stretch in part] for part in parts)
    return xs, ys
