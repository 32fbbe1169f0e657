"""The form of docs/benchmarks.md, and that its benchmarks run; nothing here asks how fast."""

from importlib.util import find_spec

import torch
from torch import nn

from tests.benchmarks.__main__ import GROUPS, main
from tests.benchmarks.table import NOT_RUN, Row, Scale, environment, judged, markdown, merged, parse
from tests.benchmarks.timing import flops


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


def test_a_tiny_subset_makes_a_document(tmp_path):
    path = tmp_path / "docs" / "benchmarks.md"
    main(["--quick", "--device", "cpu", "--only", "hypergradient", "recall", "--out", str(path)])
    text = path.read_text(encoding="utf-8")
    cpu, gpu = text.split("## GPU")
    found = parse(cpu)
    assert {row.group for row in found} == {"hypergradient", "recall"} and all(float(row.figure) > 0 for row in found)
    assert "- hypergradient, recall: " in cpu and {row.figure for row in parse(gpu)} == {NOT_RUN}
    path.write_text(text + "\n## Published code\n\nBy hand.\n", encoding="utf-8")
    main(["--quick", "--device", "cpu", "--only", "recall", "--out", str(path)])
    again = path.read_text(encoding="utf-8")
    assert again.endswith("## Published code\n\nBy hand.\n") and len(parse(again)) == len(parse(text))


def test_groups_have_modules():
    assert not [name for name in GROUPS if find_spec(f"tests.benchmarks.{name}") is None]


def test_flops_of_a_convolution_in_groups():
    images = torch.randn(2, 8, 6, 6)
    whole, grouped = (nn.Conv2d(8, 8, 3, padding=1, groups=groups) for groups in (1, 4))

    def both_ways(layer):
        return lambda: layer(images).sum().backward()  # the images ask for no gradient

    assert flops(lambda: whole(images)) == 4 * flops(lambda: grouped(images)) == 2 * 2 * 36 * 9 * 8 * 8
    assert flops(both_ways(whole)) == 4 * flops(both_ways(grouped)) == 2 * flops(lambda: whole(images))
