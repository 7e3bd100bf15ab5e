"""The tables of the recall tasks and of lm-evaluation-harness, teacher beside student. Imports no torch."""

from __future__ import annotations

from typing import Any

from nha_convert.evaluate.table import NOT_MEASURED, row_names


def has_tasks(evaluation: dict[str, Any]) -> bool:
    """Whether some row of an evaluation asked the tasks."""
    return any((evaluation.get(key) or {}).get("tasks") for key, _ in row_names(evaluation))


def task_distances(evaluation: dict[str, Any]) -> list[int]:
    """Every distance in tokens that some row measured, ascending."""
    cells = (cell for _, cells in _rows(evaluation) for cell in cells.values())
    return sorted({cell["distance"] for cell in cells if "exact_match" in cell})


def task_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """Task, model, then exact match with half the width of its interval, for every distance of `task_distances`.

    Rows of one task stand together, the teacher's first; associative recall has a task for each number of pairs.
    """
    rows = _rows(evaluation)
    distances = task_distances(evaluation)
    kinds = dict.fromkeys(kind for _, cells in rows for kind, _ in cells)
    lines = []
    for kind in kinds:
        for name, cells in rows:
            if any(one == kind for one, _ in cells):
                lines.append([kind, name, *(_cell(cells.get((kind, distance))) for distance in distances)])
    return lines


def task_notes(evaluation: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know: what a cell is, and what was left out and why."""
    rows = _rows(evaluation)
    prompts = sorted({cell["prompts"] for _, cells in rows for cell in cells.values() if "prompts" in cell})
    counts = f"{prompts[0]}" if len(prompts) == 1 else f"{prompts[0]} to {prompts[-1]}" if prompts else "no"
    notes = [
        f"Exact match of generated answers by distance in tokens, {counts} questions per cell, ± half the 95 % "
        "interval (Wilson)."
    ]
    reasons: dict[str, list[str]] = {}
    for kind, distance, reason in dict.fromkeys(
        (kind, distance, cell["left_out"])
        for _, cells in rows
        for (kind, distance), cell in cells.items()
        if "left_out" in cell
    ):
        reasons.setdefault(reason, []).append(f"{kind} at {distance}")
    return notes + [f"Left out: {', '.join(places)}: {reason}." for reason, places in reasons.items()]


def harness_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """Task, metric, and for teacher and final model the value with its standard error; [] where nothing was run."""
    found = evaluation.get("harness") or {}
    teacher, final = (found.get(key) or {} for key in ("teacher", "final"))
    return [
        [task, metric, _with_error(teacher.get(task), metric), _with_error(final.get(task), metric)]
        for task, metrics in (teacher | final).items()
        for metric in metrics
        if not metric.split(" (")[0].endswith("_stderr")
    ]


def _with_error(metrics: dict[str, float] | None, metric: str) -> str:
    """`harness.run_harness` names an error as its metric, `_stderr` in front of the filter where it names one."""
    if metrics is None or metric not in metrics:
        return NOT_MEASURED
    name, opening, chosen = metric.partition(" (")
    error = metrics.get(f"{name}_stderr{opening}{chosen}")
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ±{error:.4f}")


def _rows(evaluation: dict[str, Any]) -> list[tuple[str, dict[tuple[str, int], dict[str, Any]]]]:
    """(name, {(task, distance): cell}) of every row that asked tasks."""
    rows = []
    for key, name in row_names(evaluation):
        tasks = (evaluation.get(key) or {}).get("tasks") or {}
        cells = {
            (task if "pairs" not in cell else f"{task}, {cell['pairs']} pairs", cell["distance"]): cell
            for task, measured in tasks.items()
            for cell in measured
        }
        if cells:
            rows.append((name, cells))
    return rows


def _cell(cell: dict[str, Any] | None) -> str:
    if cell is None or "exact_match" not in cell:
        return NOT_MEASURED
    return f"{cell['exact_match']:.2f} ±{(cell['high'] - cell['low']) / 2:.2f}"
