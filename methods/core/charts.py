"""Curves as SVG elements of a page: its own font, and its own colours, so that they follow light and dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

Points = tuple[Sequence[float], Sequence[float]]

# Colours that stand in for the page's own while matplotlib draws, so that charts follow light and dark.
_INK, _FAINT = "#010203", "#040506"
SERIES = 6  # colours, then again from the first
_STAND_INS = {_INK: "var(--soft)", _FAINT: "var(--line)"} | {
    f"#0a0b{index:02x}": f"var(--series-{index})" for index in range(SERIES)
}


@dataclass
class Curve:
    """One chart: `series` and, dashed across it, the constants `marks`. Points that are not finite leave gaps."""

    title: str
    x_label: str
    series: dict[str, Points]
    log_y: bool = False
    marks: dict[str, float] = field(default_factory=dict)


def chart_svg(curve: Curve, index: int) -> str:
    """The chart of a curve, the `index`-th of its page."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    settings = {
        "svg.fonttype": "none",  # text stays text, in the page's own font
        "svg.hashsalt": f"chart {index}",  # equal input, equal ids; another chart, other ids
        "text.parse_math": False,  # a `$` in a label is a `$`
        "font.size": 12,
        "text.color": _INK,
        "axes.labelcolor": _INK,
        "axes.edgecolor": _FAINT,
        "axes.formatter.useoffset": False,
        "grid.color": _FAINT,
        "xtick.color": _FAINT,
        "ytick.color": _FAINT,
        "xtick.labelcolor": _INK,
        "ytick.labelcolor": _INK,
    }
    colours = [f"#0a0b{place:02x}" for place in range(SERIES)]
    with matplotlib.rc_context(settings):
        # A figure of its own canvas: neither pyplot's global state nor a display is involved.
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_axisbelow(True)
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_xlabel(curve.x_label)
        for place, (xs, ys) in enumerate(curve.series.values()):
            marker = "o" if len(xs) < 30 else None  # single evaluations show; a dense curve stays a line
            axes.plot(xs, ys, color=colours[place % SERIES], linewidth=1.8, marker=marker, markersize=3.5)
        for place, value in enumerate(curve.marks.values(), start=len(curve.series)):
            axes.axhline(value, color=colours[place % SERIES], linewidth=1.4, linestyle=(0, (4, 3)))
        levels = [*curve.marks.values(), *(y for _, ys in curve.series.values() for y in ys)]
        if curve.log_y and any(0 < level < math.inf for level in levels):
            _log_axis(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), curve.title)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    axes.set_yscale("log", nonpositive="mask")
    low, high = axes.get_ylim()
    # Powers of ten alone would leave a narrow range without any label, and 1-3-10 would crowd a wide one.
    steps = (1.0, 3.0) if high / low < 1e4 else (1.0,)
    axes.yaxis.set_major_locator(MaxNLocator(5) if high / low < 10 else LogLocator(subs=steps))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter("{x:g}")


def _inline(svg: str, title: str) -> str:
    """matplotlib's SVG file as an element of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style type=.*?</style>", "", svg, count=1, flags=re.DOTALL)  # would style the whole page
    box = re.search(r'viewBox="[^"]*"', svg).group()
    svg = re.sub(r"<svg[^>]*>", f'<svg {box} role="img" aria-label="{escape(title)}">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in each chart, and nobody refers to them
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)  # the page's own font
    svg = svg.replace("xlink:href", "href")
    for stand_in, colour in _STAND_INS.items():
        svg = svg.replace(stand_in, colour)
    return svg
