"""Figures as inline SVG. matplotlib draws in placeholder colours, which become CSS variables: a figure fits a light and a dark page.

Text stays text, and is not drawn as paths.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup, escape
from matplotlib import style as mpl_style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

VARIABLES = ("ink", "muted", "rule", "paper", *(f"hue-{i}" for i in range(6)))  # of page.css
PLACEHOLDER = {name: f"#c0de{i:02x}" for i, name in enumerate(VARIABLES)}
MARKERS, GLYPHS = "os^DvX", "●■▲◆▼✖"
SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.edgecolor": PLACEHOLDER["muted"],
    "axes.labelcolor": PLACEHOLDER["ink"],
    "text.color": PLACEHOLDER["ink"],
    "xtick.color": PLACEHOLDER["muted"],
    "ytick.color": PLACEHOLDER["muted"],
    "grid.color": PLACEHOLDER["rule"],
    "grid.linewidth": 0.8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


@dataclass(frozen=True)
class SeriesStyle:
    """Colour, marker and line of a series, the same in all figures.

    Attributes:
        variable: Colour, as a variable of page.css.
        marker: Marker of matplotlib; "" for none.
        glyph: The marker as a character, for legends.
        dash: Line style of matplotlib; "" for no line.
    """

    variable: str
    marker: str
    glyph: str
    dash: str = "-"

    @property
    def is_arm(self) -> bool:
        """Whether this is the style of an arm; references are drawn in ink."""
        return self.variable.startswith("hue")

    @property
    def border(self) -> str:
        """The line style in CSS."""
        return {"-": "solid", "--": "dashed"}.get(self.dash, "dotted")

    @property
    def colour(self) -> str:
        return PLACEHOLDER[self.variable]


ARM_STYLES = tuple(
    SeriesStyle(f"hue-{i % 6}", MARKERS[(i + i // 6) % 6], GLYPHS[(i + i // 6) % 6]) for i in range(36)
)  # 36 different styles
TEACHER, FEW_STEPS = SeriesStyle("ink", "*", "★", "--"), SeriesStyle("ink", "p", "⬟", "-.")
FLOOR, HALVES = SeriesStyle("muted", "P", "✚", ":"), SeriesStyle("muted", "d", "◊", ":")


@dataclass(frozen=True)
class Line:
    """One series: the mean over runs, and the range that they span."""

    name: str
    style: SeriesStyle
    x: Sequence[float]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None

    @classmethod
    def over(cls, name: str, style: SeriesStyle, x: Sequence[float], runs: ArrayLike) -> Line:
        """Mean and range over runs (runs, points); NaN where a run has no value."""
        y = np.asarray(runs, dtype=np.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # a point without any run is NaN, and is not drawn
            return cls(name, style, x, np.nanmean(y, 0), np.nanmin(y, 0), np.nanmax(y, 0))

    def cell(self, i: int) -> str:
        """Text of the i-th point in the table of numbers."""
        if self.low is None or self.high is None or self.low[i] == self.high[i]:
            return format_number(self.y[i])
        return f"{format_number(self.y[i])} [{format_number(self.low[i])}, {format_number(self.high[i])}]"


class Points(NamedTuple):
    """One series of a scatter plot, with a point for each run."""

    name: str
    style: SeriesStyle
    x: list[float]
    y: list[float]


@dataclass(frozen=True)
class Figure:
    """A figure: drawing, caption, and its numbers as a table."""

    title: str
    caption: str
    svg: Markup
    headings: list[str]
    rows: list[list[str]]


@dataclass
class Group:
    """Figures that share a legend, which lists every series in any of them."""

    title: str
    figures: list[Figure]
    legend: dict[str, SeriesStyle] = field(default_factory=dict)

    def add(self, figure: Figure, shown: Iterable[Line | Points]) -> None:
        """Adds a figure that shows these series."""
        self.figures.append(figure)
        self.legend |= {series.name: series.style for series in shown}


def format_number(x: float | None) -> str:
    """Formats a number with three digits; a dash for None, NaN and infinity."""
    return "–" if x is None or not math.isfinite(x) else f"{x:.3g}"


def inline_svg(draw: Callable[[Axes], None], name: str, label: str, size: tuple[float, float] = (4.4, 3.0)) -> Markup:
    """Draws an <svg> element that has no size, colours or font of its own.

    Args:
        draw: Draws on the axes that it is called with.
        name: Prefix of all ids, unique in the page.
        label: Text for screen readers.
        size: Width and height in inches, for text of 10 points.
    """
    with mpl_style.context(["default", {**SETTINGS, "svg.hashsalt": name}]):
        canvas = Canvas(figsize=size, layout="constrained")
        draw(canvas.subplots())
        file = io.StringIO()
        canvas.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = re.sub(r"<(metadata|style)\b.*?</\1>", "", file.getvalue(), flags=re.DOTALL)  # a <style> would apply to the whole page
    start = re.search(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", text)
    assert start is not None  # matplotlib always writes it
    text = re.sub(r"\s*\n\s*", " ", text[start.end() :])
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', text).replace("url(#", f"url(#{name}-")
    text = re.sub(r' (?:d|x|y|transform)="[^"]*"', lambda m: re.sub(r"\d+\.\d\d+", lambda x: f"{float(x[0]):.1f}", m[0]), text)
    text = re.sub(
        r' transform="rotate\(-?0 [^"]*"|<path d="[^"]*" style="fill: none"/>|font-family: [^;"]*; ', "", text
    )  # these have no effect
    text = re.sub(r"<g([^>]*)>((?: <use [^>]*?( style=\"[^\"]*\")/>)(?: <use [^>]*\3/>)+) </g>", hoist_style, text).replace(" <g/>", "")
    text = re.sub(r"#c0de([0-9a-f]{2})", lambda m: f"var(--{VARIABLES[int(m[1], 16)]})", text)
    return Markup(f'<svg {start[1]} role="img" aria-label="{escape(label)}">{text}')


def hoist_style(group: re.Match[str]) -> str:
    """Moves the style that all marks of a group share to the group."""
    attributes, marks, style = group.groups()
    return f"<g{attributes}{style}>{marks.replace(style, '')}</g>"


def line_figure(
    name: str,
    title: str,
    caption: str,
    lines: list[Line],
    xlabel: str,
    ylabel: str,
    *,
    log: bool = True,
    drawstyle: str = "default",
    falling: bool = False,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """A figure of lines with bands.

    Args:
        name: Id of the figure.
        title: Heading.
        caption: What to look for, the number of runs, the meaning of the band.
        lines: At least one; the table has a row for every x in any of them.
        xlabel: Label of the x axis and of the table's first column.
        ylabel: Label of the y axis.
        log: Whether the y axis is logarithmic if all values are positive and span more than a factor of ten.
        drawstyle: Draw style of matplotlib.
        falling: Whether x decreases to the right, as times do.
        limits: Limits of the y axis; None: those of the values.
    """
    values = np.concatenate([part[np.isfinite(part)] for line in lines for part in (line.y, line.low, line.high) if part is not None])
    every_x = sorted({x for line in lines for x in line.x})
    logarithmic = log and len(values) > 0 and values.min() > 0 and values.max() > 10 * values.min()

    def draw(axes: Axes) -> None:
        for i, line in enumerate(lines):
            keep = np.isfinite(line.y)
            x, y, style = np.asarray(line.x, dtype=np.float64)[keep], line.y[keep], line.style
            (drawn,) = axes.plot(x, y, color=style.colour, ls=style.dash or "none", lw=1.5, drawstyle=drawstyle)
            drawn.set(marker=style.marker or "none", markersize=8 if style.marker == "*" else 5.5, mec=PLACEHOLDER["paper"], mew=0.5)
            every = max(1, len(x) // 8)  # markers of different lines do not overlap
            drawn.set_markevery((i * every // len(lines), every))
            if line.low is not None and line.high is not None and (style.is_arm or not style.dash):
                axes.fill_between(x, line.low[keep], line.high[keep], color=style.colour, alpha=0.12, lw=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if len(every_x) <= 6 and falling:
            axes.set_xticks(every_x, [f"{x:.3g}" for x in every_x])
        else:
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=every_x[-1] >= 2))
        if falling:
            axes.invert_xaxis()
        if limits is not None:
            axes.set_ylim(*limits)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if values.max() < 300 * values.min() else (1,)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())

    at = [{x: line.cell(i) for i, x in enumerate(line.x)} for line in lines]
    rows = [[f"{x:.4g}", *(cells.get(x, "–") for cells in at)] for x in (every_x[::-1] if falling else every_x)]
    label = f"{title}: {ylabel} over {xlabel}, a line for each of {', '.join(line.name for line in lines)}. The numbers follow as a table."
    return Figure(title, caption, inline_svg(draw, name, label), [xlabel, *(line.name for line in lines)], rows)


def scatter_figure(name: str, title: str, caption: str, points: list[Points], xlabel: str, ylabel: str) -> Figure:
    """A scatter plot with a hollow point for each run and a filled one at their mean; references have only the mean.

    Args:
        name: Id of the figure.
        title: Heading.
        caption: What to look for.
        points: Each series.
        xlabel: Label of the x axis, and of a column of the table.
        ylabel: Label of the y axis, and of a column of the table.
    """

    def draw(axes: Axes) -> None:
        for _, style, x, y in points:
            if style.is_arm:
                axes.scatter(x, y, s=26, marker=style.marker, facecolors="none", edgecolors=style.colour, linewidths=1)
            mean = axes.scatter(np.mean(x), np.mean(y), s=64, marker=style.marker, color=style.colour, linewidths=0.6, zorder=3)
            mean.set_edgecolor(PLACEHOLDER["paper"])
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(0.12)

    rows = [[label, format_number(a), format_number(b)] for label, _, x, y in points for a, b in zip(x, y, strict=True)]
    label = f"{title}: {ylabel} against {xlabel}, a point for each run of {', '.join(label for label, *_ in points)}. The numbers follow."
    return Figure(title, caption, inline_svg(draw, name, label), ["model", xlabel, ylabel], rows)
