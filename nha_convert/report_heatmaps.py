"""The report's heatmaps. One hue, fainter for less, on the page's own ground, and the number in every cell."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from nha_convert.evaluate.table import row_names
from nha_convert.report_svg import GRID, SERIES, WIDTH, inline_svg, short_count, style

Cell = float | None
FAINT, STRONG = 0.04, 0.55
"""Opacity of the lowest and of the highest value: the text above stays readable in both colour schemes."""
MOST_WRITTEN = 14
"""Columns up to which cells have their number written in them."""
STEPS = 8
"""Logged steps of alignment that are shown."""


def heatmap(
    values: Sequence[Sequence[Cell]],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    labels: tuple[str, str],
    name: str,
    label: str,
    limits: tuple[float, float],
    write: Callable[[float], str] = "{:.2f}".format,
    notes: Sequence[Sequence[str]] | None = None,
    logarithmic: bool = False,
) -> str:
    """A heatmap as inline SVG.

    Args:
        values: [rows][columns]; None is not measured.
        labels: of the columns' and of the rows' axis.
        name, label: as in `inline_svg`.
        limits: values that are faintest and strongest.
        write: a cell's text.
        notes: a second line for every cell.
        logarithmic: colour by the logarithm.
    """
    tall = 0.46 if notes else 0.27 if len(rows) <= 40 else 0.16
    height = 0.75 + tall * max(2, len(rows))
    widest = max(len(text) for text in rows)
    with style():
        figure = Figure(figsize=(WIDTH, height))
        figure.subplots_adjust(
            left=(0.42 + 0.09 * widest) / WIDTH, right=0.985, bottom=0.55 / height, top=1 - 0.08 / height
        )
        axes = figure.add_subplot()
        axes.grid(False)
        written = len(columns) <= MOST_WRITTEN and len(rows) <= 40
        for y, line in enumerate(values):
            for x, value in enumerate(line):
                share = _share(value, limits, logarithmic)
                opacity = FAINT + (STRONG - FAINT) * share
                look: dict[str, Any] = {"facecolor": SERIES["final"], "edgecolor": "none", "alpha": opacity}
                axes.add_patch(Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, **look))
                if written:
                    text = "–" if value is None else write(value)
                    below = f"\n{notes[y][x]}" if notes and value is not None and notes[y][x] else ""
                    axes.text(x, y, text + below, ha="center", va="center", fontsize=9.6, linespacing=1.1)
        axes.set_xlim(-0.5, len(columns) - 0.5)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        _ticks(axes.set_xticks, columns, 8 if max(map(len, columns)) > 4 else 14)
        _ticks(axes.set_yticks, rows, 40)
        axes.tick_params(length=0, labelsize=9.5)
        scale = "" if written else f"; faint: {write(limits[0])}, strong: {write(limits[1])}"
        axes.set_xlabel(labels[0] + scale)
        axes.set_ylabel(labels[1])
        for spine in axes.spines.values():
            spine.set_visible(False)
        axes.spines["bottom"].set(visible=True, color=GRID)
        return inline_svg(figure, name, label)


def _share(value: Cell, limits: tuple[float, float], logarithmic: bool) -> float:
    """How strongly a value is coloured, 0 to 1."""
    low, high = (math.log(limit) for limit in limits) if logarithmic else limits
    if value is None or high <= low:
        return 0.0
    place = math.log(max(value, limits[0])) if logarithmic else value
    return min(1.0, max(0.0, (place - low) / (high - low)))


def _ticks(setter: Any, names: Sequence[str], most: int) -> None:
    step = -(-len(names) // most)
    setter(range(0, len(names), step), list(names)[::step])


def recall_maps(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """(title, svg) for the teacher and for the final model: exact match by distance and number of pairs.

    From the task `mqar` where it was asked, else from the recall columns, which have one number of pairs.
    """
    maps = []
    for key, name in row_names(evaluation):
        row = evaluation.get(key) or {}
        cells = _recall_cells(row, evaluation) if key in ("teacher", "final") else {}
        if not cells:
            continue
        pairs, distances = sorted({one for one, _ in cells}), sorted({distance for _, distance in cells})
        found = [[cells.get((one, distance)) for distance in distances] for one in pairs]
        values = [[cell["exact_match"] if cell else None for cell in line] for line in found]
        halves = [[f"±{(cell['high'] - cell['low']) / 2:.2f}" if cell else "" for cell in line] for line in found]
        svg = heatmap(
            values,
            rows=[str(one) for one in pairs],
            columns=[short_count(distance) for distance in distances],
            labels=("tokens between statement and answer", "pairs"),
            name=f"recall-map-{key}",
            label=f"Recall of the {name} model by distance and number of pairs, exact match",
            limits=(0.0, 1.0),
            notes=halves,
        )
        maps.append((f"Recall by distance and pairs: {name}", svg))
    return maps


def _recall_cells(row: dict[str, Any], evaluation: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    """(pairs, distance in tokens) -> cell."""
    asked = (row.get("tasks") or {}).get("mqar") or []
    cells = {(cell["pairs"], cell["distance"]): cell for cell in asked if "exact_match" in cell}
    if cells:
        return cells
    settings = evaluation.get("settings") or {}
    pairs = (settings.get("evaluate") or settings).get("recall_pairs", 1)
    return {(pairs, int(distance)): cell for distance, cell in (row.get("recall") or {}).items()}


def alignment_errors(metrics: list[dict[str, Any]]) -> str | None:
    """Error of each layer's attention output by step of alignment; None if not logged."""
    rows = [row for row in metrics if any(key.startswith("align/layer_") for key in row)]
    if not rows:
        return None
    stage = rows[-1].get("stage")
    rows = [row for row in rows if row.get("stage") == stage]
    picked = sorted({round((len(rows) - 1) * (index / (STEPS - 1)) ** 2) for index in range(STEPS)})
    shown = [rows[index] for index in picked]
    names = sorted({key for row in shown for key in row if key.startswith("align/layer_")})
    values = [[row.get(name) for row in shown] for name in names]
    measured = [value for line in values for value in line if value is not None and value > 0]
    return heatmap(
        values,
        rows=[str(int(name.rsplit("_", 1)[1])) for name in names],
        columns=[str(row.get("step")) for row in shown],
        labels=("step of alignment", "layer"),
        name="alignment",
        label="Alignment error of each layer by step, as a share of the teacher's energy",
        limits=(min(measured, default=1e-3), max(measured, default=1.0)),
        write=lambda value: f"{value:.2f}" if value >= 0.095 else f"{value:.3f}".removeprefix("0"),
        logarithmic=True,
    )


def slot_mass_by_head(row: dict[str, Any]) -> str | None:
    """The slots' share of the softmax by layer and query head; None if the row has none."""
    usage = row.get("slot_usage") or {}
    values = usage.get("slot_mass")
    if not values:
        return None
    return heatmap(
        values,
        rows=[str(layer) for layer in usage["layers"]],
        columns=[str(head) for head in range(len(values[0]))],
        labels=("query head", "layer"),
        name="mass-heads",
        label="The slots' share of the softmax by layer and query head",
        limits=(0.0, max(0.01, max(max(line) for line in values))),
    )


def slot_mass_by_position(row: dict[str, Any]) -> str | None:
    """The slots' share of the softmax by layer and position in the context; None if the row has none."""
    layers = [layer for layer in row.get("slot_mass") or [] if layer.get("buckets")]
    if not layers:
        return None
    buckets = list(layers[0]["buckets"])
    values = [[layer["buckets"].get(bucket) for bucket in buckets] for layer in layers]
    return heatmap(
        values,
        rows=[str(layer["layer"]) for layer in layers],
        columns=["< " + short_count(int(bucket.split("-")[1])) for bucket in buckets],
        labels=("tokens of context", "layer"),
        name="mass-positions",
        label="The slots' share of the softmax by layer and position in the context",
        limits=(0.0, max(0.01, max(value for line in values for value in line if value is not None))),
    )
