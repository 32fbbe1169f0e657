"""The comparison: gains and places by hand, and the same numbers in JSON, CSV, Markdown and on the page."""

import csv
import io
import json
import re
from pathlib import Path

import pytest

from methods.core.evaluation import Report
from methods.lors import LossConfig
from methods.pair_compare import as_csv, compared, comparison_tables, markdown, overview, rank, write_comparison
from methods.pair_sources import Entry, Learned, PairRecipe
from utils.metrics import RETRIEVAL

RECIPE = PairRecipe(LossConfig(), (4,), (0.1,), (0.1,))
CONFIG = {"dataset": "toy", "seed": 3, "image_size": 16, "protocol": "clean", "eval_mom": 0.9, "eval_l2": 5e-4}
CONFIG |= {"text_cache": "", "image_pretrained": True, "joint_width": 0}


def report(*values: float, last: tuple[float, ...] = ()) -> Report:
    how = {"networks": len(values), "epochs": 9, "select": "val", "protocol": "clean", "about": "epoch chosen"}
    scores = {name: [value / 2 for value in values] for name in RETRIEVAL} | {"r_mean": list(values)}
    return Report(scores, how, {"r_mean": list(last or values)})


def record(name: str, found: Report, random: Report | None = None, kind: str = "distilled", towers="a+b") -> dict:
    learned = Learned(name, Path(f"{name}.pt"), [], {}, 4000) if kind == "distilled" else None
    made = compared(Entry(name, kind, RECIPE, about=f"about {kind}", learned=learned), found, random)
    return made | {"size": 4, "bytes": 4000, "towers": towers, "recipe": RECIPE.as_words()}


def table() -> list[dict]:
    random = report(2.0, 4.0, last=(1.0, 1.0))
    records = [
        record("random", random, random, "random"),
        record("good", report(8.0, 12.0), random),
        record("so | so", report(4.0, 5.0), random),
        record("full", report(40.0, 60.0), None, "full"),
    ]
    rank(records)
    return records


class TestNumbers:
    def test_the_gain_is_that_of_each_network_over_the_same_one_on_random_pairs(self):
        _, good, middling, full = table()
        assert good["metrics"]["gain"] == {"mean": 7.0, "std": 1.0, "values": [6.0, 8.0]}
        assert good["metrics"]["random"]["mean"] == 3.0
        # The spread of the differences 4 - 2 and 5 - 4, and nothing made of the two spreads 0.5 and 1.
        assert middling["metrics"]["gain"] == {"mean": 1.5, "std": 0.5, "values": [2.0, 1.0]}
        assert "gain" not in full["metrics"] and "random" not in full["metrics"]

    def test_random_pairs_gain_nothing_over_themselves(self):
        random = table()[0]
        assert "gain" not in random["metrics"] and "beats_random" not in random
        assert random["metrics"]["random"] == random["metrics"]["r_mean"]
        assert random["metrics"]["last"] == {"mean": 1.0, "std": 0.0, "values": [1.0, 1.0]}

    def test_the_share_of_all_data(self):
        random, good, _, full = table()
        assert good["metrics"]["of full"] == {"mean": 20.0, "std": 4.0, "values": [16.0, 24.0]}
        assert full["metrics"]["of full"]["mean"] == 100.0 and random["metrics"]["of full"]["mean"] == 6.0
        alone = [record("a", report(1.0, 2.0), report(1.0, 1.0))]
        rank(alone)
        assert "of full" not in alone[0]["metrics"]

    def test_better_only_where_intervals_do_not_touch(self):
        """random is 2 to 4; good 8 to 12; so-so 4 to 5, which touches it."""
        random, good, middling, full = table()
        assert good["beats_random"] and not middling["beats_random"]
        assert (random["place"], good["place"], middling["place"]) == ([2, 3], [1, 1], [2, 3])
        assert "place" not in full, "all data does not compete"

    def test_a_single_network_proves_nothing(self):
        one = [record("a", report(50.0), report(1.0)), record("b", report(1.0), report(1.0))]
        rank(one)
        assert not one[0]["beats_random"] and [found["place"] for found in one] == [[1, 2], [1, 2]]
        assert not any(found.marked for found in comparison_tables(one))


class TestShown:
    def test_csv_is_read_back(self):
        records = table()
        lines = list(csv.DictReader(io.StringIO(as_csv(records, {"dataset": "toy", "seed": 3}))))
        assert [line["name"] for line in lines] == ["random", "good", "so | so", "full"]
        for line, found in zip(lines, records, strict=True):
            for name in (*RETRIEVAL, "last", "gain", "random", "of full"):
                part = found["metrics"].get(name)
                assert line[name] == ("" if part is None else str(part["mean"]))
                assert line[f"{name} std"] == ("" if part is None else str(part["std"]))
                assert [float(value) for value in line[f"{name} values"].split()] == (part["values"] if part else [])
            assert (line["size"], line["bytes"], line["towers"], line["dataset"]) == ("4", "4000", "a+b", "toy")
            assert (line["protocol"], line["networks"], line["epochs"], line["seed"]) == ("clean", "2", "9", "3")
            assert (line["loss"], line["temperature"], line["rates, image / text"]) == ("InfoNCE", "0.07", "0.1 / 0.1")
        assert [line["beats random"] for line in lines] == ["", "True", "False", ""]
        assert [line["place"] for line in lines] == ["2-3", "1-1", "2-3", ""]
        assert [line["file"] for line in lines] == ["", "good.pt", "so | so.pt", ""]

    def test_markdown(self):
        text = markdown(table())
        rows = [re.split(r" *(?<!\\)\| *", line.strip("| ")) for line in text.splitlines() if line.startswith("|")]
        assert rows[0] == [
            *("data", "pairs", "bytes", "r_mean", "last", "random", "gain", "beats random", "place", "of full")
        ]
        assert set("".join(rows[1])) == {"-", ":"}, "the rule below the head"
        assert rows[3] == [
            *("good", "4", "4.0 kB", "10.0 ± 2.0", "10.0 ± 2.0", "3.0 ± 1.0", "7.0 ± 1.0", "yes", "1", "20.0 ± 4.0")
        ]
        assert rows[4][0] == "so \\| so" and rows[4][7:9] == ["no", "2–3"]
        assert rows[5][5:9] == ["–"] * 4
        assert [line for line in text.splitlines() if line.startswith("## ")] == [
            "## Comparison",
            "## Recall in %",
            "## Recipes",
        ]
        assert "do not touch" in text and "clean: epoch chosen" in text and "distilled: about distilled" in text
        assert "do not touch" not in overview(table())

    def test_towers_side_by_side(self):
        """One more table: sets by towers; places and shares are within one pair of towers."""
        records = []
        for towers, values in (("vit+bert", (10.0, 12.0)), ("mlp+bert", (1.0, 1.2))):
            group = [record("ours", report(*values), report(2.0, 2.0), towers=towers)]
            group += [record("full", report(20.0, 20.0), None, "full", towers)]
            rank(group)
            records += group
        matrix, *overviews, _, _, _ = comparison_tables(records)
        assert matrix.columns == ["vit+bert", "mlp+bert"] and [row.name for row in matrix.rows] == ["ours", "full"]
        assert matrix.rows[0].metrics == {"vit+bert": (11.0, 1.0), "mlp+bert": (1.1, pytest.approx(0.1))}
        assert [found.title for found in overviews] == ["Comparison, vit+bert", "Comparison, mlp+bert"]
        assert [found.rows[0].words["beats random"] for found in overviews] == ["yes", "no"]

    def test_files_of_a_comparison(self, tmp_path):
        records = table()
        first, second = (write_comparison(tmp_path / "compare", records, CONFIG) for _ in range(2))
        assert (first.name, second.name) == ("compare", "compare-2"), "an earlier one stays"
        names = ["comparison.csv", "comparison.md", "report.html", "result.json"]
        assert sorted(path.name for path in first.iterdir()) == names == sorted(p.name for p in second.iterdir())
        kept = json.loads((first / "result.json").read_text())
        assert kept["rows"] == records and kept["config"] == CONFIG
        page = (first / "report.html").read_text(encoding="utf-8")
        for words in ("10.0<small> ± 2.0", "4.0 kB", "so | so", "beats random", ">yes<", "Recipes", "about random"):
            assert words in page
        assert page.count('class=best><span class="number">10.0') == 3, "r_mean twice and last: its lead is clear"
