"""One page that shows a run: results, settings, curves and pictures, in a single HTML file that needs nothing else.

    write_report(folder, Page("VLDD, toy shapes", rows=rows, curves=[Curve("matching loss", "step", series)]))

Plain data in, `report.html` out: styles, charts and pictures are inside the file, nothing is fetched and no script
runs, so it can be mailed or archived. Equal pages give equal bytes.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from methods.core.charts import SERIES, Curve, chart_svg
from methods.core.report_style import STYLE
from utils.files import write_text
from utils.metrics import RETRIEVAL, format_mean_std


@dataclass
class Row:
    """One line of results.

    name       `distilled`, `random`, `full data`
    metrics    name → (mean, std), higher is better
    size       how many items it was trained on
    reference  True for an upper bound that should not win the comparison, such as full data
    words      name → what else is said of it, such as `60.5 MB`
    amounts    name → the length of a bar below those words
    """

    name: str
    metrics: dict[str, tuple[float, float]]
    size: int | None = None
    reference: bool = False
    words: dict[str, str] = field(default_factory=dict)
    amounts: dict[str, float] = field(default_factory=dict)


@dataclass
class Table:
    """Rows under a heading.

    scope    what of many such tables this one is about, beside the heading
    columns  metrics and words, in order; those that no row has are left out
    unit     what `Row.size` counts
    note     what is said below it, such as the protocol behind its numbers
    marked   whether the row that leads a column clearly is marked
    """

    heading: str
    rows: Sequence[Row]
    columns: Sequence[str] = RETRIEVAL
    unit: str = "pairs"
    note: str = ""
    marked: bool = True
    scope: str = ""

    @property
    def title(self) -> str:
        return ", ".join(filter(None, (self.heading, self.scope)))


@dataclass
class Pair:
    """A learned picture (PNG file) and its caption, after and, where known, before distillation."""

    before_png: bytes | None
    after_png: bytes
    before_text: str = ""
    after_text: str = ""


@dataclass
class View:
    """A picture by itself (PNG or GIF file) and its caption; `wide` ones have a row of the page to themselves."""

    picture: bytes
    text: str = ""
    wide: bool = False


@dataclass
class Page:
    """What `write_report` shows; what is empty is left out.

    rows     the results, with their `columns`, `unit` and `note` (see Table)
    tables   further ones, below
    pairs    learned pictures in a grid; views: those that are looked at one by one; `shown`: the heading of both
    facts    settings and circumstances, name → value
    """

    title: str
    subtitle: str = ""
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    columns: Sequence[str] = RETRIEVAL
    unit: str = "pairs"
    note: str = ""
    tables: list[Table] = field(default_factory=list)
    shown: str = "Learned data"


def write_report(folder: Path | str, page: Page) -> Path:
    """Write `page` to `folder`/report.html, whole or not at all; the path of the file."""
    path = Path(folder) / "report.html"
    write_text(path, render(page))
    return path


def results_table(rows: Sequence[Row], columns: Sequence[str] = RETRIEVAL, unit: str = "pairs") -> str:
    """The rows as an aligned Markdown table: data, size, then each of `columns` that any row has: mean ± std."""
    columns = _present(rows, columns)
    cells = [["data", unit, *columns]]
    for row in rows:
        size = "–" if row.size is None else str(row.size)
        cells.append([row.name, size, *(_plain(row, name) for name in columns)])
    # A `|` would end the cell early.
    cells = [[" ".join(cell.split()).replace("|", "\\|") for cell in line] for line in cells]
    # A rule is a dash and a colon at least.
    widths = [max(2, *map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    lines = [
        " | ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in (cells[0], rule, *cells[1:])
    ]
    return "\n".join(f"| {line} |" for line in lines)


def _plain(row: Row, name: str) -> str:
    return format_mean_std(*row.metrics[name]) if name in row.metrics else row.words.get(name, "–")


def render(page: Page) -> str:
    """The page as HTML. Every text is escaped: captions come from strangers."""
    tables = [Table("Results", page.rows, page.columns, page.unit, page.note), *page.tables]
    sections = [
        *(_section(table.heading, _table(table) if table.rows else "", scope=table.scope) for table in tables),
        _section("Progress", "".join(map(_chart, page.curves, range(len(page.curves)))), "charts"),
        _section(page.shown, "".join(map(_pair, page.pairs)), "pairs"),
        _section(page.shown, "".join(map(_view, page.views)), "views"),
        _section("Settings", "".join(_fact(name, value) for name, value in page.facts.items()), "facts", tag="dl"),
    ]
    title, subtitle = escape(page.title), escape(page.subtitle)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<header><h1>{title}</h1>{f"<p>{subtitle}</p>" if subtitle else ""}</header>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


def _section(heading: str, body: str, kind: str = "", tag: str = "div", scope: str = "") -> str:
    heading = escape(heading) + (f" <span>{escape(scope)}</span>" if scope else "")
    return f'<section><h2>{heading}</h2>\n<{tag} class="{kind}">\n{body}</{tag}></section>\n' if body else ""


def _present(rows: Sequence[Row], columns: Sequence[str]) -> list[str]:
    return [name for name in columns if any(name in row.metrics or name in row.words for row in rows)]


# --- results ---------------------------------------------------------------------------------------------------------


def _table(table: Table) -> str:
    columns = _present(table.rows, table.columns)
    marks = {name: _best(table.rows, name) if table.marked else None for name in columns}
    scale = {name: max((_reach(row, name) for row in table.rows), default=0.0) for name in columns}
    for name in columns:  # what full data takes is no measure for the others
        if owned := [row.amounts[name] for row in table.rows if name in row.amounts and not row.reference]:
            scale[name] = max(owned)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("data", table.unit, *columns))
    body = "".join(_result_row(row, columns, table.unit, marks, scale) for row in table.rows)
    note = "".join(f'<p class="note">{escape(line)}</p>\n' for line in table.note.splitlines())
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>\n{note}"


def _best(rows: Sequence[Row], name: str) -> Row | None:
    """The row that leads a column: none where its mean ± std reaches into that of another."""
    racing = [row for row in rows if name in row.metrics and not row.reference]
    best = max(racing, key=lambda row: row.metrics[name][0], default=None)
    clear = best is not None and all(apart(best.metrics[name], row.metrics[name]) for row in racing if row is not best)
    return best if clear else None


def apart(high: tuple[float, float], low: tuple[float, float]) -> bool:
    """Whether one interval mean ± std lies above another and does not touch it: only then one is called better."""
    return high[0] - high[1] > low[0] + low[1]


def _reach(row: Row, name: str) -> float:
    end = sum(row.metrics.get(name, (0.0,)))
    return end if math.isfinite(end) else 0.0


def _result_row(
    row: Row, columns: Sequence[str], unit: str, marks: dict[str, Row | None], scale: dict[str, float]
) -> str:
    size = "–" if row.size is None else f"{row.size:,}"
    cells = [f'<th scope="row">{escape(row.name)}</th>', f'<td data-name="{escape(unit)}" class="size">{size}</td>']
    for name in columns:
        label = f'data-name="{escape(name)}"'
        if name in row.metrics:
            mean, std = row.metrics[name]
            best = " class=best" if marks[name] is row else ""
            shown, spread = format_mean_std(mean, std).split(" ", 1)
            number = f'<span class="number">{shown}<small> {spread}</small></span>'
            cells.append(f"<td {label}{best}>{number}{_bar(mean, std, scale[name])}</td>")
        else:
            bar = _bar(row.amounts[name], 0.0, scale[name]) if name in row.amounts and not row.reference else ""
            cells.append(f"<td {label} class=words>{escape(row.words.get(name, '–'))}{bar}</td>")
    return f"<tr{' class=reference' if row.reference else ''}>{''.join(cells)}</tr>\n"


def _bar(mean: float, std: float, scale: float) -> str:
    """A bar as long as the mean and, over its end, a line from mean − std to mean + std; 100 % is the column's most."""
    if scale <= 0 or not math.isfinite(mean + std):
        return '<i class="bar"></i>'
    low, middle, high = (100 * min(max(value / scale, 0), 1) for value in (mean - std, mean, mean + std))
    return (
        f'<i class="bar"><b style="width:{middle:.2f}%"></b><u style="left:{low:.2f}%;width:{high - low:.2f}%"></u></i>'
    )


# --- charts ---------------------------------------------------------------------------------------------------------


def _chart(curve: Curve, index: int) -> str:
    swatches = [_swatch(name, place, "") for place, name in enumerate(curve.series)]
    swatches += [_swatch(name, len(curve.series) + place, " dashed") for place, name in enumerate(curve.marks)]
    legend = f'<p class="legend">{"".join(swatches)}</p>'
    title = escape(curve.title)
    return f'<figure class="chart"><figcaption>{title}</figcaption>{legend}{chart_svg(curve, index)}</figure>\n'


def _swatch(name: str, place: int, kind: str) -> str:
    return f'<span><i class="swatch{kind}" style="color:var(--series-{place % SERIES})"></i>{escape(name)}</span>'


# --- pictures and settings -------------------------------------------------------------------------------------------


def _pair(pair: Pair) -> str:
    pictures = [_picture(pair.after_png, "after", pair.after_text)]
    texts = [f"<span>{escape(pair.after_text)}</span>"] if pair.after_text else []
    if pair.before_png is not None:
        pictures.insert(0, _picture(pair.before_png, "before", pair.before_text))
    if pair.before_text and pair.before_text != pair.after_text:
        texts.insert(0, f"<del>{escape(pair.before_text)}</del>")
    caption = f"<figcaption>{' '.join(texts)}</figcaption>" if texts else ""
    return f'<figure class="pair"><div>{"".join(pictures)}</div>{caption}</figure>\n'


def _picture(png: bytes, moment: str, text: str) -> str:
    # A PNG file states its width in bytes 16 to 19. Small pictures keep their pixels, larger ones are smoothed.
    kind = " class=pixels" if int.from_bytes(png[16:20], "big") < 160 else ""
    alt = escape(f"{moment}: {text}" if text else moment)
    return f'<img{kind} src="{_data(png)}" alt="{alt}" title="{moment}">'


def _view(view: View) -> str:
    caption = f"<figcaption>{escape(view.text)}</figcaption>" if view.text else ""
    image = f'<img src="{_data(view.picture)}" alt="{escape(view.text)}">'
    return f'<figure class="view{" wide" if view.wide else ""}">{image}{caption}</figure>\n'


def _data(picture: bytes) -> str:
    """A PNG or GIF file as an address that holds all of it."""
    kind = "gif" if picture.startswith(b"GIF8") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _fact(name: str, value: Any) -> str:
    if isinstance(value, bool):
        value = str(value).lower()
    elif isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return f"<div><dt>{escape(str(name))}</dt><dd>{escape('–' if value is None else str(value))}</dd></div>\n"
