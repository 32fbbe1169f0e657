"""Results on disk: the rows of a table as JSON, never one in place of another, and read back for a page."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from methods.core.evaluation import Report
from methods.core.report import Row
from utils.files import read_json, write_text

Points = tuple[list[float], list[float]]


def as_record(name: str, size: int, report: Report) -> dict[str, Any]:
    """A report as result.json keeps it."""
    means = report.mean_std()
    metrics = {
        metric: {"mean": means[metric][0], "std": means[metric][1], "values": values}
        for metric, values in report.metrics.items()
    }
    return {"name": name, "size": size, "metrics": metrics, "protocol": report.protocol}


def as_row(record: dict[str, Any]) -> Row:
    """A recorded row as the table shows it."""
    metrics = {name: (value["mean"], value["std"]) for name, value in record["metrics"].items()}
    return Row(record["name"], metrics, record["size"], reference=record["name"].startswith("full"))


def write_result(folder: Path, records: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write result.json to `folder`, or beside it under the next free number: an earlier result is never replaced."""
    place, number = folder, 1
    while (place / "result.json").exists():
        number += 1
        place = folder.with_name(f"{folder.name}-{number}")
    write_text(place / "result.json", json.dumps({"rows": records, "config": config}, indent=1) + "\n")
    return place / "result.json"


def recorded_rows(folder: Path, judged_by: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
    """The rows of every evaluation in a run folder; of two of the same thing the later stands.

    judged_by   what an evaluation's config says of its protocol and networks; where rows differ in it, each row's name
                says which
    """
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("eval/*/result.json"), key=lambda path: path.stat().st_mtime):
        found = read_json(path, "evaluation")
        how = judged_by(found["config"])
        rows |= {(row["name"], how): row for row in found["rows"]}
    several = len({how for _, how in rows}) > 1
    return [row | {"name": f"{name}, {how}"} if several else row for (name, how), row in rows.items()]


def protocols_of(records: Sequence[dict[str, Any]]) -> str:
    """One sentence on the protocols behind some rows."""
    return "; ".join(sorted({row["protocol"]["protocol"] + ": " + row["protocol"]["about"] for row in records}))


def series(history: Sequence[dict[str, float]], *names: str) -> dict[str, Points]:
    """Curves from a run's log: name → (steps, values) for those of `names` that were logged."""
    found = {name: [(row["step"], row[name]) for row in history if name in row] for name in names}
    return {name: tuple(map(list, zip(*points, strict=True))) for name, points in found.items() if points}
