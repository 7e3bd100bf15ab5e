"""What each layer's slots do, as a table's cells. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nha_convert.evaluate.table import NOT_MEASURED

Cell = tuple[str, str]
"""A value, and its interval in brackets or nothing."""
USAGE_HEADER = ["slot mass", "effective slots", "write rate", "horizon, tokens"]
GAIN_HEADER = "own gain"
USAGE_NOTE = (
    "Means over heads, in brackets the lowest and the highest head. Slot mass: share of the softmax on the slots. "
    "Effective slots: how many are read. Write rate: share of a slot that one token overwrites. Horizon: median "
    "over a head's slots, in brackets the 10 % and 90 % quantile over slots."
)
GAIN_NOTE = "Own gain: by how much this layer's slots alone lower the NLL, nats per token, 95 % interval."
NO_GAINS = "Not measured; nha-convert eval RUN --save --set evaluate.layer_ablation=true measures it."


def span(interval: Sequence[float] | None, form: str) -> str:
    """`[low, high]`, or nothing."""
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]" if interval else ""


def layer_cells(row: dict[str, Any]) -> dict[int, list[Cell]]:
    """Layer -> cells of `USAGE_HEADER` and `GAIN_HEADER`, of every NHA layer of a student's row."""
    usage, gains = row.get("slot_usage") or {}, {gain["layer"]: gain for gain in row.get("layer_ablation") or []}
    places = {layer: place for place, layer in enumerate(usage.get("layers") or [])}
    return {
        layer: [*_usage_cells(usage, places.get(layer)), _gain_cell(gains.get(layer))]
        for layer in sorted({*places, *gains})
    }


def layer_notes(row: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know."""
    return [USAGE_NOTE, GAIN_NOTE if row.get("layer_ablation") else f"{GAIN_NOTE} {NO_GAINS}"]


def without_memory() -> list[Cell]:
    """The cells of a layer that has no slots."""
    return [(NOT_MEASURED, "")] * (len(USAGE_HEADER) + 1)


def _usage_cells(usage: dict[str, Any], place: int | None) -> list[Cell]:
    if place is None:
        return [(NOT_MEASURED, "")] * len(USAGE_HEADER)
    cells = []
    for name, form in (("slot_mass", ".3f"), ("effective_slots", ".1f"), ("write_rate", ".4f")):
        heads = usage[name][place]
        cells.append((f"{sum(heads) / len(heads):{form}}", span([min(heads), max(heads)], form)))
    low, middle, high = (usage[f"horizon_{name}"][place] for name in ("low", "median", "high"))
    means = [sum(heads) / len(heads) for heads in (low, middle, high)]
    return [*cells, (f"{means[1]:.0f}", span([means[0], means[2]], ".0f"))]


def _gain_cell(gain: dict[str, Any] | None) -> Cell:
    return (NOT_MEASURED, "") if gain is None else (f"{gain['nll_gain']:.4f}", span(gain["interval"], ".4f"))
