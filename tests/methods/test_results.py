"""Results that never replace another, and the rows that a page makes of them."""

import json
import os
import subprocess
import sys
from subprocess import PIPE

import pytest

from methods.core.evaluation import Report
from methods.core.results import as_record, as_row, recorded_rows, series, shortened, write_result
from tests.conftest import ROOT
from tests.processes import held
from utils.errors import UserError
from utils.files import read_json
from utils.locks import LOCK

JUDGED = {"protocol": "clean", "network": "nfnet + bert"}
ROW = {"name": "distilled", "size": 8, "metrics": {}}


def how(config):
    return f"{config['protocol']}, {config['network']}"


def test_a_result_never_replaces_another(tmp_path):
    places = [write_result(tmp_path / "eval" / "clean", [{"name": f"row {i}"}], {"seed": i}) for i in range(3)]
    assert [place.parent.name for place in places] == ["clean", "clean-2", "clean-3"]
    for i, place in enumerate(places):
        assert read_json(place, "") == {"format": 1, "rows": [{"name": f"row {i}"}], "config": {"seed": i}}


def test_no_result_is_lost_where_several_end_at_once(tmp_path):
    code = """
import sys
from pathlib import Path
from methods.core.results import write_result
input(print("ready", flush=True) or "")
print(*(write_result(Path(sys.argv[1]), [{"name": f"{sys.argv[2]} {i}"}], {}).parent for i in range(12)))
"""
    runs = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "e"), name], cwd=ROOT, stdin=PIPE, stdout=PIPE)
        for name in "ab"
    ]
    assert [run.stdout.readline() for run in runs] == [b"ready\n"] * 2
    for run in runs:
        run.stdin.write(b"go\n")
        run.stdin.flush()
    told = [run.communicate(timeout=120)[0].split() for run in runs]
    assert len({*told[0], *told[1]}) == 24
    rows = [json.loads(path.read_text())["rows"][0]["name"] for path in tmp_path.glob("e*/result.json")]
    assert sorted(rows) == sorted(f"{name} {i}" for name in "ab" for i in range(12))


def test_a_result_goes_beside_where_another_process_is(tmp_path):
    with held(tmp_path / "e"):
        assert write_result(tmp_path / "e", [], {}).parent.name == "e-2"
    assert write_result(tmp_path / "e", [], {}).parent.name == "e"
    assert not (tmp_path / "e" / LOCK).exists()


def test_the_later_of_two_rows_stands(tmp_path):
    for number, (folder, value) in enumerate((("b", 1), ("a", 2), ("c", 3))):
        rows = [ROW | {"value": value}, ROW | {"name": f"only {folder}", "value": value}]
        path = write_result(tmp_path / "eval" / folder, rows, JUDGED)
        os.utime(path, (1000 + number, 1000 + number))
    found = {row["name"]: row["value"] for row in recorded_rows(tmp_path, how)}
    assert found == {"distilled": 3, "only b": 1, "only a": 2, "only c": 3}
    write_result(tmp_path / "eval" / "d", [ROW | {"value": 4}], JUDGED | {"network": "mlp + bert"})
    found = {row["name"]: row["value"] for row in recorded_rows(tmp_path, how)}
    assert found["distilled, clean, nfnet + bert"] == 3 and found["distilled, clean, mlp + bert"] == 4


def test_records_and_rows():
    record = as_record("full", 96, Report({"tr@1": [1.0, 3.0]}, {"protocol": "clean"}))
    assert record["metrics"]["tr@1"] == {"mean": 2.0, "std": 1.0, "values": [1.0, 3.0]}
    row = as_row(json.loads(json.dumps(record)))
    assert row.name == "full" and row.reference and row.size == 96 and row.metrics == {"tr@1": (2.0, 1.0)}
    assert not as_row(record | {"name": "distilled"}).reference


def test_a_record_keeps_the_last_epoch_beside_the_one_that_counts():
    record = as_record("distilled", 4, Report({"acc": [10.0, 30.0]}, {}, {"acc": [9.0, 11.0]}))
    assert record["last"] == {"acc": {"mean": 10.0, "std": 1.0, "values": [9.0, 11.0]}}
    assert record["metrics"]["acc"]["mean"] == 20.0
    assert "last" not in as_record("distilled", 4, Report({"acc": [10.0]})), "nobody looked"


def test_curves_leave_out_what_was_not_logged():
    history = [{"step": 0, "loss": 1.0, "val": 5.0}, {"step": 1, "loss": 0.5}]
    assert series(history, "loss", "val", "lr") == {"loss": ([0, 1], [1.0, 0.5]), "val": ([0], [5.0])}


def test_long_curves_are_means_of_stretches():
    steps = [float(step) for step in range(100_000)]
    xs, ys = shortened((steps, [2 * step for step in steps]))
    assert len(xs) == len(ys) == 500 and ys[7] == pytest.approx(2 * xs[7])
    assert xs[0] == pytest.approx(99.5) and shortened(([1.0], [2.0])) == ([1.0], [2.0])


@pytest.mark.parametrize("change", [{"rows": None}, {"rows": [{}]}, {"config": None}, {"rows": [ROW | {"metrics": 3}]}])
def test_a_damaged_result_is_told(tmp_path, change):
    path = write_result(tmp_path / "eval" / "a", [ROW], JUDGED)
    path.write_text(json.dumps({"rows": [ROW], "config": JUDGED} | change))
    with pytest.raises(UserError, match=r"result.json is (damaged|no result)"):
        recorded_rows(tmp_path, how)
