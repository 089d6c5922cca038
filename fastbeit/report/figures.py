"""Curves as inline SVG that follows the page's light or dark theme.

matplotlib draws with marker colours such as ``#000011``, which are replaced by CSS variables in the
text of the SVG: one drawing serves both themes. Text stays text: it is searchable, and takes the
page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from fastbeit.report.markup import Markup, tag

# Marker colour in matplotlib -> variable in style.py.
COLOURS = {
    "ink": "#000001",
    "muted": "#000002",
    "line": "#000003",
    "model": "#000011",
    "chance": "#000012",
    "random": "#000013",
    "pixels": "#000014",
    "extra": "#000015",
}
MOST_POINTS = 600


class Curve(NamedTuple):
    """One line of a chart.

    Attributes:
        label: in the legend.
        colour: a key of COLOURS.
        y: values, None where not known.
        style: matplotlib's line style.
        marker: matplotlib's marker, or None.
    """

    label: str
    colour: str
    y: Sequence[float | None]
    style: str = "-"
    marker: str | None = None


def chart(
    title: str,
    x: Sequence[float],
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    summary: str,
    levels: Sequence[tuple[str, str, float]] = (),
    integer_x: bool = False,
    from_zero: bool = False,
    wide: bool = False,
) -> Markup:
    """A figure: title, chart, and ``summary`` as the text that stands for it.

    Args:
        x: common to all curves.
        levels: horizontal lines: (label, colour, value).
        integer_x: a tick at every x (blocks).
        from_zero: let the y axis begin at zero.
        wide: twice as wide, with the legend beside the chart.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    # A fixed salt: the same run gives the same file.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "font.size": 9}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(11.4, 3.2) if wide else (5.6, 3.0), layout="constrained")
        axes = figure.add_subplot()
        for curve in curves:
            axes.plot(
                *thin(x, curve.y),
                label=curve.label,
                color=COLOURS[curve.colour],
                linestyle=curve.style,
                linewidth=1.6,
                marker=curve.marker,
                markersize=4.5,
            )
        for label, colour, value in levels:
            axes.axhline(value, label=label, color=COLOURS[colour], linestyle=":", linewidth=1.4)
        if integer_x:
            axes.set_xticks(list(x))
        elif x and max(x) >= 10_000:
            axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
        if from_zero:
            axes.margins(y=0.08)
            axes.set_ylim(bottom=0)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(True, axis="y", color=COLOURS["line"], linewidth=0.7)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(COLOURS["line"])
        axes.tick_params(colors=COLOURS["muted"], length=0)
        axes.xaxis.label.set_color(COLOURS["muted"])
        axes.yaxis.label.set_color(COLOURS["muted"])
        if len(curves) + len(levels) > 1:
            place: Any = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if wide else {}
            axes.legend(frameon=False, labelcolor=COLOURS["ink"], fontsize=8.5, **place)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    drawing = tag("div", _themed(buffer.getvalue()), role="img", aria_label=f"{title}. {summary}")
    return tag(
        "figure", tag("figcaption", title), drawing, class_="chart wide" if wide else "chart"
    )


def thin(
    x: Sequence[float], y: Sequence[float | None], most: int = MOST_POINTS
) -> tuple[list[float], list[float]]:
    """At most about ``most`` points: means over equal runs of points; None becomes a gap."""
    size = max(1, math.ceil(len(x) / most))
    xs, ys = [], []
    for start in range(0, len(x), size):
        known = [v for v in y[start : start + size] if v is not None]
        chunk = x[start : start + size]
        xs.append(sum(chunk) / len(chunk))
        ys.append(sum(known) / len(known) if known else math.nan)
    return xs, ys


def _themed(svg: str) -> Markup:
    """The <svg> element alone, without size, metadata or fixed colours and fonts."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Elements of an inline SVG need no namespace: HTML knows them, and xlink:href is href.
    svg = re.sub(r'\s+xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'(<svg[^>]*?)\s+width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\s+height="[^"]*"', r"\1", svg, count=1)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg.replace("<svg", '<svg aria-hidden="true" focusable="false"', 1))
