"""Figures as inline SVG whose colours follow the page (CSS variables), so that light and dark both read well.

Matplotlib draws with placeholder colours; `inline_svg` turns each into a variable.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterable
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

WIDTH, HEIGHT = 4.4, 3.1
"""Inches of 72 user units; the page scales a figure to its column, 320 px on a phone."""
TEXT, GRID = "#010101", "#020202"
SERIES = {
    "teacher": "#030001",
    "window_only": "#030002",
    "memory_only": "#030003",
    "no_attention": "#030004",
    "swapped": "#030005",
    "aligned": "#030006",
    "final": "#030007",
}
OTHER = "#030008"
VARIABLES = {TEXT: "--text", GRID: "--grid", OTHER: "--other"} | {
    colour: f"--{key.replace('_', '-')}" for key, colour in SERIES.items()
}
MARKERS = {"teacher": "s", "window_only": "x", "memory_only": "+", "swapped": "v", "aligned": "^", "final": "o"}
"""So that no line is told from another by its colour alone."""
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
    "legend.handlelength": 2.2,
}


def style() -> Any:
    """Inside, figures are drawn in the page's style."""
    return rc_context(STYLE)


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element that scales to its container and names no other resource.

    Args:
        name: unlike that of any other figure of the page; makes ids.
        label: what a screen reader says.
    """
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r' id="(?:figure|axes|patch|text|line2d|legend|xtick|ytick|matplotlib\.axis|Line)[^"]*"', "", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)
    svg = svg.replace("'DejaVu Sans'", "inherit")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"(font(?:-family)?: ?[^;\"]*?)(?:inherit|sans-serif)[^;\"]*", r"\1system-ui, sans-serif", svg)


def axes_of(xlabel: str, ylabel: str, legend_rows: int = 0) -> tuple[Figure, Axes]:
    """One pair of axes, with room above for a legend of so many rows."""
    height = HEIGHT + 0.2 * legend_rows
    figure = Figure(figsize=(WIDTH, height))
    top = 1 - (0.1 + 0.2 * legend_rows) / height
    figure.subplots_adjust(left=0.19, right=0.97, bottom=0.52 / height, top=top)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_axisbelow(True)
    return figure, axes


def legend(axes: Axes, columns: int = 3) -> None:
    """Above the axes, where it covers no line."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.12, 1.0), ncols=columns, borderaxespad=0.1, columnspacing=1.2)


def log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic y with plain numbers, at some minor ticks too if two decades are shown; linear below a factor 3."""
    if not values or min(values) <= 0 or max(values) < 3 * min(values):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    shown = "235" if max(values) < 10 * min(values) else "25"  # of a decade: more would stand on each other

    def some(value: float, _: Any) -> str:
        return f"{value:g}" if f"{value:.0e}"[0] in shown else ""

    few = max(values) < 100 * min(values)
    axes.yaxis.set_minor_formatter(FuncFormatter(some) if few else NullFormatter())


def token_axis(axes: Axes, counts: Iterable[int]) -> None:
    """Logarithmic x with a tick at some of the counts, none on another."""
    axes.set_xscale("log", base=2)
    ticks = sorted(set(counts))
    step = -(-len(ticks) // 7)
    shown = ticks[::-1][::step][::-1]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_count(round(value))))


def short_count(number: int) -> str:
    """512, 1k, 32k: powers of two by 1024, others by 1000, exact ones only."""
    for size in (1024, 1000):
        if number >= size and number % size == 0:
            return f"{number // size}k"
    return f"{number}"
