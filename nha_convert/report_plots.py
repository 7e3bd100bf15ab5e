"""The report's figures as inline SVG whose colours follow the page (CSS variables), so light and dark both read well.

Matplotlib draws with placeholder colours; `inline_svg` turns each into a variable.
"""

from __future__ import annotations

import io
import re
from collections import defaultdict
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from nha_convert.evaluate.table import row_names

WIDTH, HEIGHT = 4.4, 2.9
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
STYLE = {
    "svg.fonttype": "none",
    "font.size": 9,
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
    "legend.fontsize": 8,
}


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element that scales to its container and names no other resource."""
    buffer = io.StringIO()
    with rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("'DejaVu Sans'", "inherit")
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return re.sub(r"(font(?:-family)?: ?[^;\"]*?)(?:inherit|sans-serif)[^;\"]*", r"\1system-ui, sans-serif", svg)


def _axes(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, HEIGHT))
    figure.subplots_adjust(left=0.15, right=0.97, bottom=0.17, top=0.97)
    axes = figure.add_subplot()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.set_axisbelow(True)
    return figure, axes


def _log_scale(axes: Axes, values: list[float]) -> None:
    """Logarithmic y with plain numbers; the minor ticks get some, too, where less than a decade is shown."""
    if not values or min(values) <= 0:
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}" if max(values) < 10 * min(values) else NullFormatter())


def _names(evaluation: dict[str, Any], metric: str, keys: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    return [
        (key, name)
        for key, name in row_names(evaluation)
        if (evaluation.get(key) or {}).get(metric) and (keys is None or key in keys)
    ]


def loss_curves(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, svg) per stage: training loss against tokens."""
    stages: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in metrics:
        if row.get("loss") is not None:
            stages[str(row.get("stage"))].append((row.get("tokens", row.get("step", 0)), row["loss"]))
    plots = []
    for stage, points in stages.items():
        with rc_context(STYLE):
            figure, axes = _axes("tokens seen", "loss")
            axes.plot(*zip(*points), color=SERIES["final"], linewidth=1.4, marker="." if len(points) < 3 else None)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            _log_scale(axes, [loss for _, loss in points])
            plots.append((f"Training loss: {stage}", inline_svg(figure, f"loss-{stage}")))
    return plots


def alignment_errors(metrics: list[dict[str, Any]]) -> str | None:
    """Error of each layer's attention output at the first and the last logged step of alignment; None if not logged."""
    rows = [row for row in metrics if any(key.startswith("align/layer_") for key in row)]
    if not rows:
        return None
    with rc_context(STYLE):
        figure, axes = _axes("layer", "error / teacher's energy")
        errors: list[float] = []
        for row, name, colour in ((rows[0], "first step", "swapped"), (rows[-1], "last step", "final")):
            layers = {int(key.rsplit("_", 1)[1]): row[key] for key in row if key.startswith("align/layer_")}
            errors += layers.values()
            axes.plot(*zip(*sorted(layers.items())), "o", color=SERIES[colour], label=f"{name} ({row.get('step')})")
        _log_scale(axes, errors)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
        return inline_svg(figure, "alignment")


def nll_by_position(evaluation: dict[str, Any]) -> str | None:
    """NLL against the tokens of context before the predicted one; None if no row has it."""
    rows = _names(evaluation, "nll_buckets", ("teacher", "window_only", "swapped", "aligned", "final"))
    if not rows:
        return None
    with rc_context(STYLE):
        figure, axes = _axes("tokens of context", "NLL (nats)")
        for key, name in rows:
            buckets = evaluation[key]["nll_buckets"]
            middles = [max(1.0, sum(map(int, bucket.split("-"))) / 2) for bucket in buckets]
            axes.plot(
                middles,
                list(buckets.values()),
                color=SERIES[key],
                label=name,
                marker=".",
                linewidth=1.4,
                linestyle="--" if key == "teacher" else "-",
            )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.legend()
        return inline_svg(figure, "nll")


def recall_by_distance(evaluation: dict[str, Any]) -> str | None:
    """Exact match against distance with 95 % intervals; None if no row has it."""
    rows = _names(evaluation, "recall")
    if not rows:
        return None
    with rc_context(STYLE):
        figure, axes = _axes("tokens between statement and answer", "exact match")
        for place, (key, name) in enumerate(rows):
            cells = evaluation[key]["recall"]
            shift = 2 ** (0.05 * (place - (len(rows) - 1) / 2))  # so that intervals do not cover each other
            share = [cell["exact_match"] for cell in cells.values()]
            axes.errorbar(
                [int(distance) * shift for distance in cells],
                share,
                yerr=[
                    [max(0.0, cell["exact_match"] - cell["low"]) for cell in cells.values()],
                    [max(0.0, cell["high"] - cell["exact_match"]) for cell in cells.values()],
                ],
                color=SERIES.get(key, OTHER),
                label=name,
                marker=".",
                linewidth=1.4,
                elinewidth=0.8,
                linestyle="--" if key == "teacher" else "-",
            )
        axes.set_xscale("log", base=2)
        distances = sorted({int(distance) for key, _ in rows for distance in evaluation[key]["recall"]})
        axes.set_xticks(distances, [str(distance) for distance in distances])
        axes.minorticks_off()
        axes.set_ylim(-0.04, 1.04)
        axes.legend()
        return inline_svg(figure, "recall")


def slot_masses(evaluation: dict[str, Any]) -> str | None:
    """The slots' share of the softmax per layer; None if no row has it."""
    rows = _names(evaluation, "slot_mass")
    if not rows:
        return None
    with rc_context(STYLE):
        figure, axes = _axes("layer", "softmax share of the slots")
        for key, name in rows:
            layers = [(layer["layer"], layer["mean"]) for layer in evaluation[key]["slot_mass"]]
            axes.plot(*zip(*layers), color=SERIES.get(key, OTHER), label=name, marker="o", markersize=4, linewidth=1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylim(bottom=0)
        axes.legend()
        return inline_svg(figure, "slots")
