"""Curves as SVG: matplotlib places the lines and ticks, the report's style sheet gives them their colours."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Text stays text, and no name in it is taken for mathematics. A salt makes the same chart the same bytes.
_OPTIONS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "trl-lopd",
    "text.parse_math": False,
    "axes.formatter.limits": (-4, 5),
}
# matplotlib writes attributes `style`, which a Content-Security-Policy forbids: what they hold becomes attributes, but
# for colours. Of its groups only those that were named here keep their name.
_STYLE, _DECLARATION = re.compile(r' style="([^"]*)"'), re.compile(r"([\w-]+): ?([^;#]+)(?:;|$)")
_NAMED, _ID = re.compile(r'<g id="(chart-[^"]*)"'), re.compile(r'<g id="[^"]*"')
_NO_PICTURE = re.compile(r"<metadata>.*?</metadata>|<style.*?</style>", re.DOTALL)

Points = list[tuple[float, float]]


def curves(series: list[tuple[str, Points]], band: tuple[float, float] | None = None) -> Markup:
    """One line for each of several series of points `(x, y)`, with a class that the style sheet colours, before a
    horizontal band."""

    def draw(axes: Axes) -> None:
        if band is not None:
            axes.axhspan(*band, gid="chart-band", linewidth=0)
        for tone, points in series:
            # A single point is no line.
            axes.plot(*zip(*points, strict=True), marker="o" if len(points) < 50 else "", ms=3, gid=tone)

    return _drawn(draw)


def marks(series: dict[str, Points]) -> Markup:
    """Points `(x, y)` of several kinds, each in a group with its kind for a class."""

    def draw(axes: Axes) -> None:
        for kind, points in series.items():
            if points:
                axes.plot(*zip(*points, strict=True), "o", ms=7, gid=f"chart-{kind}")

    return _drawn(draw)


def _drawn(draw: Callable[[Axes], None]) -> Markup:
    with matplotlib.rc_context(_OPTIONS):
        figure = Figure(figsize=(4.7, 2.5), layout="constrained")
        axes = figure.add_subplot()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.grid(axis="y", gid="chart-grid")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        draw(axes)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = _NO_PICTURE.sub("", text.getvalue().partition("<svg")[2])
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    svg = _STYLE.sub(lambda style: "".join(f' {key}="{value}"' for key, value in _DECLARATION.findall(style[1])), svg)
    svg = _ID.sub("<g", _NAMED.sub(r'<g class="\1"', svg))
    return Markup(f"<svg{svg}")
