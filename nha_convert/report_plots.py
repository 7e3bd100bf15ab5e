"""The report's curves: losses, NLL and recall against distance, cache and latency against context."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any

from matplotlib.ticker import EngFormatter

from nha_convert.evaluate.table import row_names
from nha_convert.report_svg import MARKERS, OTHER, SERIES, axes_of, inline_svg, legend, log_scale, style, token_axis

BY_POSITION = {
    "nll": ("NLL (nats)", "Negative log likelihood"),
    "kl": ("KL to the teacher (nats)", "KL divergence of the teacher's prediction from the model's"),
    "top1": ("same most likely token", "Share of tokens with the teacher's most likely one"),
}
"""Metric of eval.json -> its axis, and what it is."""
SMOOTHED = 30
"""Logged steps from which on a running mean is drawn over the single ones."""


def _names(evaluation: dict[str, Any], metric: str, keys: tuple[str, ...] | None = None) -> list[tuple[str, str]]:
    return [
        (key, name)
        for key, name in row_names(evaluation)
        if (evaluation.get(key) or {}).get(metric) and (keys is None or key in keys)
    ]


def _look(key: str) -> dict[str, Any]:
    return {
        "color": SERIES.get(key, OTHER),
        "marker": MARKERS.get(key, "D"),
        "markersize": 4,
        "linewidth": 1.4,
        "linestyle": "--" if key == "teacher" else "-",
    }


def _rows_of_legend(entries: int, columns: int = 3) -> int:
    return -(-entries // columns)


def loss_curves(metrics: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """(title, svg) per stage: training loss against tokens, a running mean over the single steps."""
    stages: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for row in metrics:
        if row.get("loss") is not None:
            stages[str(row.get("stage"))].append((row.get("tokens", row.get("step", 0)), row["loss"]))
    plots = []
    for stage, points in stages.items():
        tokens, losses = (list(column) for column in zip(*points))
        many = len(points) >= SMOOTHED
        with style():
            figure, axes = axes_of("tokens seen", "loss")
            single: dict[str, Any] = {
                "color": SERIES["final"],
                "linewidth": 1.4,
                "marker": "." if len(points) < 3 else None,
            }
            axes.plot(tokens, losses, **(single | {"alpha": 0.35, "linewidth": 1} if many else single))
            if many:
                axes.plot(tokens, _running_mean(losses, len(losses) // 15), color=SERIES["final"], linewidth=1.8)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            log_scale(axes, losses)
            label = f"Training loss of {stage}: {losses[0]:.4g} at first, {losses[-1]:.4g} at the end"
            plots.append((f"Training loss, {_stage_name(stage)}", inline_svg(figure, f"loss-{stage}", label)))
    return plots


def _stage_name(stage: str) -> str:
    number, dash, kind = stage.partition("-")
    return f"stage {int(number)} ({kind})" if dash and number.isdigit() else stage


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean of some `width` values around each, as many before as after it."""
    reach = [min(width // 2, index, len(values) - 1 - index) for index in range(len(values))]
    parts = (values[index - far : index + far + 1] for index, far in enumerate(reach))
    return [sum(part) / len(part) for part in parts]


def by_position(evaluation: dict[str, Any], metric: str) -> str | None:
    """One of `BY_POSITION` against the tokens of context before the predicted one; None if no row has it."""
    axis, what = BY_POSITION[metric]
    rows = _names(evaluation, f"{metric}_buckets", ("teacher", "window_only", "swapped", "aligned", "final"))
    if not rows:
        return None
    with style():
        figure, axes = axes_of("tokens of context", axis, _rows_of_legend(len(rows)))
        ends: list[int] = []
        for key, name in rows:
            buckets = evaluation[key][f"{metric}_buckets"]
            bounds = [[int(bound) for bound in re.findall(r"\d+", bucket)] for bucket in buckets]
            ends += [high for _, high in bounds]
            axes.plot([max(1.0, sum(pair) / 2) for pair in bounds], list(buckets.values()), label=name, **_look(key))
        token_axis(axes, ends)
        legend(axes)
        names = ", ".join(name for _, name in rows)
        return inline_svg(figure, metric, f"{what} by position in the context, of {names}")


def recall_by_distance(evaluation: dict[str, Any]) -> str | None:
    """Exact match against distance with 95 % intervals; None if no row has it."""
    rows = _names(evaluation, "recall")
    if not rows:
        return None
    with style():
        figure, axes = axes_of("tokens between statement and answer", "exact match", _rows_of_legend(len(rows)))
        for place, (key, name) in enumerate(rows):
            cells = evaluation[key]["recall"]
            shift = 2 ** (0.05 * (place - (len(rows) - 1) / 2))  # so that intervals do not cover each other
            axes.errorbar(
                [int(distance) * shift for distance in cells],
                [cell["exact_match"] for cell in cells.values()],
                yerr=[
                    [max(0.0, cell["exact_match"] - cell["low"]) for cell in cells.values()],
                    [max(0.0, cell["high"] - cell["exact_match"]) for cell in cells.values()],
                ],
                label=name,
                elinewidth=0.8,
                **_look(key),
            )
        token_axis(axes, (int(distance) for key, _ in rows for distance in evaluation[key]["recall"]))
        axes.set_ylim(-0.04, 1.04)
        legend(axes)
        return inline_svg(figure, "recall", "Recall by generation against distance, with 95 % intervals")


def cache_memory(bench: dict[str, Any] | None) -> str | None:
    """Bytes of cache against context, both logarithmic; None where nothing was timed."""
    rows = (bench or {}).get("decode")
    if not rows:
        return None
    with style():
        figure, axes = axes_of("tokens of context", "bytes of cache", 1)
        contexts = [row["context"] for row in rows]
        sizes = {mode: [row["cache_bytes"][mode] for row in rows] for mode in ("teacher", "student")}
        for mode, values in sizes.items():
            axes.plot(contexts, values, label=mode, **_look("teacher" if mode == "teacher" else "final"))
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(EngFormatter(sep="", places=0))
        token_axis(axes, contexts)
        legend(axes)
        label = f"Cache at {contexts[-1]} tokens: teacher {sizes['teacher'][-1]} bytes, student {sizes['student'][-1]}"
        return inline_svg(figure, "cache", label)


def decode_latency(bench: dict[str, Any] | None) -> str | None:
    """Milliseconds per decoded token against context with the medians' intervals; None where nothing was timed."""
    rows = (bench or {}).get("decode")
    if not rows:
        return None
    with style():
        figure, axes = axes_of("tokens of context", "ms per decoded token", 1)
        contexts = [row["context"] for row in rows]
        for place, mode in enumerate(("teacher", "student")):
            times = [{key: 1e3 * row[mode][key] for key in ("low", "median", "high")} for row in rows]
            axes.errorbar(
                [context * 2 ** (0.04 * (place - 0.5)) for context in contexts],
                [time["median"] for time in times],
                yerr=[
                    [time["median"] - time["low"] for time in times],
                    [time["high"] - time["median"] for time in times],
                ],
                label=mode,
                elinewidth=0.8,
                capsize=2,
                **_look("teacher" if mode == "teacher" else "final"),
            )
        log_scale(axes, [1e3 * row[mode]["median"] for row in rows for mode in ("teacher", "student")])
        token_axis(axes, contexts)
        legend(axes)
        last = ", ".join(f"{mode} {1e3 * rows[-1][mode]['median']:.3g} ms" for mode in ("teacher", "student"))
        return inline_svg(figure, "latency", f"Time per decoded token at {contexts[-1]} tokens of context: {last}")
