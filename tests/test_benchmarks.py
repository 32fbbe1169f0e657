"""The form of docs/benchmarks.md, and that its benchmarks run; nothing here asks how fast."""

from tests.benchmarks.table import Row, Scale, environment, judged, markdown, merged, parse


def test_a_row_is_judged_as_it_is_shown():
    assert judged("recall", "time", 1.2549, "x", at_most=1.25) == Row(
        "recall", "time", "1.25", "x", "at most 1.25", True
    )
    assert judged("recall", "time", 1.256, at_most=1.25).met is False
    assert judged("experts", "speed", 0.896, at_least=0.9).met is True and judged("a", "b", 3.0).met is None
    assert judged("memory", "MB", 1234.4, form=",.0f", at_most=1200).figure == "1,234"


def test_a_table_is_read_as_it_was_written():
    rows = [Row("a", "b, c", "1.0", "x", "at most 2", True, "70 % convolution"), judged("a", "d", 3, at_most=2)]
    assert parse(markdown(rows)) == rows
    assert "**missed**" in markdown(rows) and "|" not in parse(markdown([Row("a|b", "c\nd", "1")]))[0].group


def test_a_run_replaces_its_own_rows():
    first = merged(
        "# Title\n\nBy hand.\n\n## Others' code\n\nKept.\n", "cpu", [Row("b", "x", "1"), Row("a", "y", "2")], "old"
    )
    again = merged(merged(first, "cuda", [Row("b", "x", "9")], "gpu"), "cpu", [Row("a", "z", "3")], "new")
    heads = ["# Title", "", "By hand.", "", "## CPU", "", "- b: old", "- a: new", ""]
    assert again.splitlines()[:9] == heads
    places = [again.index(part) for part in ("| a | z | 3 |", "| b | x | 1 |", "## GPU", "| b | x | 9 |", "## Others")]
    assert places == sorted(places) and "| a | y" not in again and again.endswith("Kept.\n")
    assert merged(again, "cpu", [Row("a", "z", "3")], "new") == again


def test_scales_and_hardware():
    assert [Scale("cpu", True).of(1, 2, 3), Scale().of(1, 2, 3), Scale("cuda").of(1, 2, 3), Scale("cuda").of(1, 2)] == [
        1,
        2,
        3,
        2,
    ]
    assert "threads" in environment("cpu") and "torch " in environment("cpu") and "\n" not in environment("cpu")
