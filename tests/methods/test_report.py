"""The report page: whole, self-contained, safe, and equal for equal input."""

import math
import re
from html.parser import HTMLParser

import pytest
import torch

from methods.core.report import Curve, Page, Pair, Row, Table, View, apart, render, results_table, write_report
from utils.metrics import RETRIEVAL
from utils.pictures import png_bytes

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Reader(HTMLParser):
    """Checks that each element is closed in order, and keeps texts, tags and attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.seen, self.texts = [], [], []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def tags(self, name):
        return [attrs for tag, attrs in self.seen if tag == name]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def sample(evil="a dog"):
    picture = png_bytes(torch.full((3, 8, 8), 200, dtype=torch.uint8))
    large = png_bytes(torch.zeros(3, 224, 224, dtype=torch.uint8))
    metrics = [
        {name: (base + place, 0.25 * place) for place, name in enumerate(RETRIEVAL)} for base in (1.0, 10.0, 60.0)
    ]
    return Page(
        title=f"Title {evil}",
        subtitle=f"Subtitle {evil}",
        rows=[
            Row("random", metrics[0], 12),
            Row(f"distilled {evil}", metrics[1], 12),
            Row("full data", metrics[2], 29_000, reference=True),
        ],
        facts={"syn_steps": 8, f"name {evil}": f"value {evil}", "draw": True, "ks": (1, 5), "nothing": None},
        curves=[
            Curve(f"loss {evil}", f"step {evil}", {f"image {evil}": ([0, 1, 2], [1.0, math.nan, 0.01])}, log_y=True),
            Curve("recall", "step", {"ours": ([0, 50], [3.0, 9.0]), "b": ([], [])}, marks={f"full {evil}": 60.0}),
        ],
        pairs=[Pair(picture, large, f"before {evil}", f"after {evil}"), Pair(None, picture, "", f"only {evil}")],
        note=f"note {evil}",
    )


def test_page_is_one_whole_file_with_everything_in_it(tmp_path):
    path = write_report(tmp_path / "run", sample())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["report.html"] == [path.name]
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    reader = Reader(page)
    for base in (1.0, 10.0, 60.0):
        for place in range(7):
            assert f"{base + place:.1f} ± {0.25 * place:.1f}" in reader.text
    for words in (
        "29,000",
        "syn_steps 8",
        "draw true",
        "ks 1, 5",
        "nothing –",
        "Title a dog",
        "note a dog",
        "loss a dog",
    ):
        assert words in reader.text
    for words in ("before a dog", "after a dog", "only a dog", "full a dog", "image a dog", "step a dog"):
        assert words in reader.text
    assert len(reader.tags("svg")) == 2 and len(reader.tags("img")) == 3


def test_nothing_outside_the_file_is_named_and_nothing_runs():
    page = render(sample())
    assert not re.search(r"https?:|//\w|@import|url\((?!#)", re.sub(r"base64,[^\"]*", "", page))
    reader = Reader(page)
    for tag, attrs in reader.seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name, value in attrs.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("data:image/png;base64,", "#"))


@pytest.mark.parametrize(
    "evil", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onload='x", "a & b", "</style>", "$x^2$"]
)
def test_texts_of_strangers_stay_texts(evil):
    page, plain = render(sample(evil)), Reader(render(sample()))
    reader = Reader(page)
    # The same elements with the same attribute names as for a harmless text: none was smuggled in.
    assert [(tag, list(attrs)) for tag, attrs in reader.seen] == [(tag, list(attrs)) for tag, attrs in plain.seen]
    for words in (
        "Title",
        "Subtitle",
        "distilled",
        "name",
        "value",
        "before",
        "after",
        "only",
        "note",
        "full",
        "loss",
        "image",
        "step",
    ):
        assert f"{words} {evil}" in reader.text
    assert {attrs["alt"] for attrs in reader.tags("img")} == {
        f"before: before {evil}",
        f"after: after {evil}",
        f"after: only {evil}",
    }


def test_equal_pages_give_equal_bytes(tmp_path):
    first = write_report(tmp_path / "a", sample()).read_bytes()
    assert first == write_report(tmp_path / "b", sample()).read_bytes()
    assert first != write_report(tmp_path / "b", sample("a cat")).read_bytes()


def test_ids_are_unique_and_references_lead_somewhere():
    reader = Reader(render(sample()))
    ids = [attrs["id"] for _, attrs in reader.seen if "id" in attrs]
    assert len(ids) == len(set(ids))
    uses = {attrs["href"] for attrs in reader.tags("use")} | {
        attrs["clip-path"][4:-1] for _, attrs in reader.seen if "clip-path" in attrs
    }
    assert uses and uses <= {f"#{name}" for name in ids}


def test_best_is_highlighted_and_full_data_does_not_compete():
    content = sample()
    content.rows[2].metrics["r_mean"] = content.rows[1].metrics["r_mean"]  # not even where it is only as good
    rows = re.findall(r"<tr.*?</tr>", render(content))[1:]
    assert [row.count("class=best") for row in rows] == [0, 7, 0]
    # ir@1: full data's 60 ± 0 is the longest bar, 10 a sixth of it.
    bars = [re.search(r'<b style="width:([\d.]+)%"', row).group(1) for row in rows]
    assert bars == ["1.67", "16.67", "100.00"]


def test_only_a_clear_lead_is_marked():
    """An interval that touches that of the second leaves the column without a mark; so does a table that asks so."""
    two = [Row("a", {"x": (5.0, 1.0), "y": (5.0, 1.0)}), Row("b", {"x": (3.0, 0.9), "y": (3.0, 1.0)})]
    assert apart((5.0, 1.0), (3.0, 0.9)) and not apart((5.0, 1.0), (3.0, 1.0)) and not apart((3.0, 0.9), (5.0, 1.0))
    first, second = re.findall(r"<tr.*?</tr>", render(Page("t", rows=two, columns=("x", "y"))))[1:]
    assert 'data-name="x" class=best' in first and first.count("class=best") == 1 and "class=best" not in second
    assert "class=best>" not in render(Page("t", tables=[Table("h", two, ("x", "y"), marked=False)]))


def test_words_and_amounts():
    """Words stand where a number would; an amount has a bar as long as its share of the largest, but for full data."""
    rows = [
        Row("a", {"x": (1.0, 0.0)}, 4, words={"bytes": "2 <kB>", "kind": "yes"}, amounts={"bytes": 2000}),
        Row("b", {}, 4, words={"bytes": "8 kB"}, amounts={"bytes": 8000}),
        Row("full", {}, 9, reference=True, words={"bytes": "1 GB"}, amounts={"bytes": 1e9}),
    ]
    columns = ("bytes", "x", "kind", "nothing")
    page = render(Page("t", tables=[Table("Budget & more", rows, columns, note="one\ntwo <b>", scope="of <x>")]))
    reader = Reader(page)
    assert "Budget & more of <x>" in reader.text and "one two <b>" in reader.text and "nothing" not in reader.text
    lines = re.findall(r"<tr.*?</tr>", page)[1:]
    assert [re.findall(r'<b style="width:([\d.]+)%"', line) for line in lines] == [["25.00", "100.00"], ["100.00"], []]
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in results_table(rows, columns).splitlines()
    ]
    assert cells[0] == ["data", "pairs", "bytes", "x", "kind"] and cells[2] == ["a", "4", "2 <kB>", "1.0 ± 0.0", "yes"]
    assert cells[3] == ["b", "4", "8 kB", "–", "–"]


def test_charts_follow_the_pages_colours_and_label_narrow_log_ranges():
    page = render(sample())
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0|#000000|font-family", page[page.index("<body") :])
    narrow = Curve("loss", "step", {"x": ([0, 1], [0.5, 0.6])}, log_y=True)
    labels = Reader(render(Page("t", curves=[narrow]))).text
    assert "mathdefault" not in labels and re.search(r"0\.5\d", labels)


def test_small_pictures_keep_their_pixels():
    kinds = [attrs.get("class") for attrs in Reader(render(sample())).tags("img")]
    assert kinds == ["pixels", None, "pixels"]


@pytest.mark.parametrize("evil", ["a poster", '"><img src=x onerror=alert(1)>'])
def test_pictures_by_themselves(evil):
    still = png_bytes(torch.zeros(3, 8, 20, dtype=torch.uint8))
    reader = Reader(render(Page("t", views=[View(still, evil), View(b"GIF89a...", "moves", wide=True)])))
    assert [attrs["alt"] for attrs in reader.tags("img")] == [evil, "moves"] and f"{evil} moves" in reader.text
    kinds = [attrs["src"].partition(";")[0] for attrs in reader.tags("img")]
    assert kinds == ["data:image/png", "data:image/gif"]
    assert [attrs["class"] for attrs in reader.tags("figure")] == ["view", "view wide"]


@pytest.mark.parametrize("log_y", [True, False])
@pytest.mark.parametrize("ys", [[], [math.nan] * 3, [0.0, 0.0, 0.0], [1e-30, 1.0, 1e30], [-1.0, -2.0, math.inf]])
@pytest.mark.filterwarnings("error")
def test_odd_curves(ys, log_y):
    Reader(render(Page("t", curves=[Curve("odd", "step", {"x": (list(range(len(ys))), ys)}, log_y)])))


def test_an_empty_page_and_odd_numbers():
    assert "Results" not in Reader(render(Page("nothing yet"))).text
    rows = [Row("a", {"accuracy": (math.nan, 0.0)}), Row("b", {"accuracy": (0.0, 0.0), "other": (1.0, 0.0)})]
    text = Reader(render(Page("t", rows=rows, columns=("accuracy", "missing"), unit="images"))).text
    assert "nan ± 0.0" in text and "images" in text and "missing" not in text and "other" not in text


def test_results_table():
    rows = sample().rows
    del rows[0].metrics["tr@1"]
    rows[0].name, rows[2].size = "a|b", None
    lines = results_table(rows).splitlines()
    assert len(lines) == 5 and len({len(line) for line in lines}) == 1
    assert re.split(r" *\| *", lines[0].strip("| ")) == ["data", "pairs", *RETRIEVAL]
    assert re.split(r" *(?<!\\)\| *", lines[2].strip("| ")) == [
        *("a\\|b", "12", "1.0 ± 0.0", "2.0 ± 0.2", "3.0 ± 0.5", "–", "5.0 ± 1.0", "6.0 ± 1.2", "7.0 ± 1.5")
    ]
    assert "–" in lines[4]
    assert results_table([Row("x", {"accuracy": (50.0, 1.0)}, 10)], ("accuracy",), "images").splitlines() == [
        "| data | images |   accuracy |",
        "| ---- | -----: | ---------: |",
        "| x    |     10 | 50.0 ± 1.0 |",
    ]
