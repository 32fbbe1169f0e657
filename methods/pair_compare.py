"""Sets of pairs side by side: what each gains over random pairs, what share of all data it reaches, what it weighs.

Every number is a mean ± std over fresh networks. One set is called better than another only where these intervals do
not touch; where a single network judged there is no interval, and nothing is called better.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods.core.evaluation import Report
from methods.core.report import Page, Row, Table, apart, results_table, write_report
from methods.core.results import as_record, protocols_of, summarise, write_result
from methods.pair_sources import Entry
from utils.files import write_text
from utils.metrics import RETRIEVAL, format_bytes, format_mean_std

OVERVIEW = ("bytes", "r_mean", "last", "random", "gain", "beats random", "place", "of full")
NAMED = 6  # more sets are too many for a title
LEGEND = """r_mean: the mean of the six recalls, in the epoch that counts; last: after the last epoch.
random: as many random real pairs, new ones for each network, under the row's own recipe (loss, temperature, rates, \
phases). gain: r_mean minus that, network by network. beats random: yes only where the two intervals mean ± std do not \
touch. place: from the best to the worst place that intervals allow; two sets that share a place are not told apart.
of full: r_mean in % of that of all data. bytes: pixels, embeddings, similarity as stored and learned rates, in float32.
"""


def compared(entry: Entry, report: Report, random: Report | None) -> dict[str, Any]:
    """The record of an entry, with what it gains over random pairs of its recipe.

    random   None for full data; for random pairs their own report, and then there is no gain
    """
    record = as_record(entry.name, 0, report)
    more = {"last": report.last["r_mean"]}
    if random is not None:
        more["random"] = random.metrics["r_mean"]
    if random is not None and entry.kind != "random":  # network by network: equal beginnings
        both = zip(report.metrics["r_mean"], random.metrics["r_mean"], strict=True)
        more["gain"] = [ours - theirs for ours, theirs in both]
    record["metrics"] |= summarise(more)
    record |= {"set": entry.name, "kind": entry.kind, "about": entry.about}
    if "gain" in more:
        record["beats_random"] = _better(record["metrics"]["r_mean"], record["metrics"]["random"])
    return record | ({"file": str(entry.learned.path)} if entry.learned else {})


def rank(records: Sequence[dict[str, Any]]) -> None:
    """Add to each record its place among these, and its share of what full data reaches, where that is among them."""
    racing = [record for record in records if record["kind"] != "full"]
    for record in racing:
        mine = record["metrics"]["r_mean"]
        others = [other["metrics"]["r_mean"] for other in racing if other is not record]
        ahead, behind = sum(_better(other, mine) for other in others), sum(_better(mine, other) for other in others)
        record["place"] = [1 + ahead, len(racing) - behind]
    ceiling = next((record["metrics"]["r_mean"]["mean"] for record in records if record["kind"] == "full"), 0)
    for record in records if ceiling else ():
        shares = [100 * value / ceiling for value in record["metrics"]["r_mean"]["values"]]
        record["metrics"] |= summarise({"of full": shares})


def _better(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the values of one metric lie above those of another beyond their spread; never with a single network."""
    return len(one["values"]) > 1 and apart((one["mean"], one["std"]), (other["mean"], other["std"]))


# --- what is shown ---------------------------------------------------------------------------------------------------


def comparison_tables(records: Sequence[dict[str, Any]]) -> list[Table]:
    """The tables of a comparison: sets by towers where there are several, then all of each pair of towers."""
    towers = list(dict.fromkeys(record["towers"] for record in records))
    marked = len(records[0]["metrics"]["r_mean"]["values"]) > 1
    found = []
    if len(towers) > 1:
        found.append(Table("Mean of the six recalls", _matrix(records), towers, marked=marked))
    overviews, recalls = [], []
    for pair in towers:
        group = [record for record in records if record["towers"] == pair]
        rows, scope = [_row(record) for record in group], pair if len(towers) > 1 else ""
        note = LEGEND + protocols_of(group) if pair == towers[-1] else ""
        overviews.append(Table("Comparison", rows, OVERVIEW, note=note, marked=marked, scope=scope))
        recalls.append(Table("Recall in %", rows, RETRIEVAL, marked=marked, scope=scope))
    return [*found, *overviews, *recalls, _recipes([r for r in records if r["towers"] == towers[0]])]


def _row(record: dict[str, Any]) -> Row:
    metrics = {name: (part["mean"], part["std"]) for name, part in record["metrics"].items() if name != "random"}
    words = {"bytes": format_bytes(record["bytes"])}
    if "random" in record["metrics"]:
        words["random"] = format_mean_std(*(record["metrics"]["random"][part] for part in ("mean", "std")))
    if "beats_random" in record:
        words["beats random"] = "yes" if record["beats_random"] else "no"
    if "place" in record:
        words["place"] = "–".join(map(str, dict.fromkeys(record["place"])))
    full = record["kind"] == "full"
    return Row(record["set"], metrics, record["size"], full, words, {"bytes": record["bytes"]})


def _matrix(records: Sequence[dict[str, Any]]) -> list[Row]:
    rows: dict[str, Row] = {}
    for record in records:
        row = rows.setdefault(record["set"], Row(record["set"], {}, record["size"], record["kind"] == "full"))
        mean = record["metrics"]["r_mean"]
        row.metrics[record["towers"]] = mean["mean"], mean["std"]
    return list(rows.values())


def _recipes(records: Sequence[dict[str, Any]]) -> Table:
    """How networks learned from each set, and what it is."""
    rows = [
        Row(record["set"], {}, record["size"], words=record["recipe"] | {"file": record.get("file", "–")})
        for record in records
    ]
    columns = list(dict.fromkeys(name for row in rows for name in row.words))
    note = "\n".join(dict.fromkeys(f"{r['kind']}: {r['about']}" for r in records if r["about"]))
    return Table("Recipes", rows, columns, note=note, marked=False)


def overview(records: Sequence[dict[str, Any]]) -> str:
    """What a terminal shows: the tables without their notes."""
    tables = [
        (table.title, results_table(table.rows, table.columns, table.unit)) for table in comparison_tables(records)
    ]
    return "\n\n".join(f"{title}\n{table}" for title, table in tables)


def markdown(records: Sequence[dict[str, Any]]) -> str:
    parts = []
    for table in comparison_tables(records):
        parts.append(f"## {table.title}\n\n{results_table(table.rows, table.columns, table.unit)}\n")
        parts += [f"{line}\n" for line in table.note.splitlines()]
    return "\n".join(parts)


def as_csv(records: Sequence[dict[str, Any]], shared: dict[str, Any]) -> str:
    """One line a record, with every metric's mean, std and values (of the networks in turn); `shared` ends each."""
    metrics = list(dict.fromkeys(name for record in records for name in record["metrics"]))
    lines = []
    for record in records:
        line = {name: record.get(name, "") for name in ("name", "set", "kind", "towers", "size", "bytes")}
        for name in metrics:
            part = record["metrics"].get(name, {"mean": "", "std": "", "values": []})
            line |= {
                name: part["mean"],
                f"{name} std": part["std"],
                f"{name} values": " ".join(map(str, part["values"])),
            }
        line |= {"beats random": record.get("beats_random", ""), "place": "-".join(map(str, record.get("place", [])))}
        line |= record["recipe"] | {
            name: record["protocol"][name] for name in ("protocol", "select", "epochs", "networks")
        }
        lines.append(line | shared | {"file": record.get("file", "")})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def write_comparison(folder: Path, records: list[dict[str, Any]], config: dict[str, Any]) -> Path:
    """Write result.json, comparison.md, comparison.csv and report.html to `folder`, or to the next free one beside it.

    The folder that they went to.
    """
    place = write_result(folder, records, config).parent
    write_text(place / "comparison.md", markdown(records))
    write_text(place / "comparison.csv", as_csv(records, {name: config[name] for name in ("dataset", "seed")}))
    tables, how = comparison_tables(records), records[0]["protocol"]
    towers = ", ".join(dict.fromkeys(record["towers"] for record in records))
    facts = (
        "dataset",
        "image_size",
        "protocol",
        "eval_mom",
        "eval_l2",
        "text_cache",
        "image_pretrained",
        "joint_width",
    )
    sets = list(dict.fromkeys(record["set"] for record in records))
    page = Page(
        title=" · ".join(sets) if len(sets) <= NAMED else f"{len(sets)} sets of pairs side by side",
        subtitle=f"{config['dataset']} · {config['image_size']} px · {how['networks']} networks of {towers}",
        facts={name: config[name] for name in facts if config[name] != ""} | {"seed": config["seed"]},
        tables=tables,
    )
    write_report(place, page)
    return place
