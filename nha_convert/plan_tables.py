"""A plan on a terminal. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantities import count, size

if TYPE_CHECKING:
    from rich.console import Group


def render_plan(plan: dict[str, Any]) -> Group:
    """The plan as rich tables: layers, parameters, stages, cache."""
    from rich.console import Group
    from rich.text import Text

    counts = plan["parameters"]
    share = 100 * counts["new"] / counts["model"]
    head = Text(f"{plan['model']} ({plan['family']}, {plan['dtype']}) -> {plan['output']}", style="bold")
    facts = Text(f"{count(counts['model'])} parameters of the model, {count(counts['new'])} new ones ({share:.2f} %)")
    start = plan["gates_start"]
    if start is not None:
        text = f"; gates start `{start['method']}` from {count(start['tokens'])} tokens"
        least = f"at least {size(start['bytes'])} of activations"
        facts.append(f"{text} ({start['flops'] / 1e15:.2g} PFLOP before the first stage, {least})")
    notes = [Text(f"note: {note}") for note in plan["notes"]]
    return Group(head, facts, _layer_table(plan), *_stage_table(plan), *_hours(plan), _cache_table(plan), *notes)


def _layer_table(plan: dict[str, Any]) -> Any:
    """Runs of equal layers in one row each."""
    from rich.table import Table

    table = Table(title="Layers", title_justify="left")
    for column in ("layers", "attention", "window", "slots", "sinks", "new parameters each"):
        table.add_column(column, justify="left" if column in ("layers", "attention") else "right")
    runs: list[list[dict[str, Any]]] = []
    for row in plan["layers"]:
        same = runs and all(runs[-1][0][key] == row[key] for key in row if key != "layer")
        runs[-1].append(row) if same else runs.append([row])
    for run in runs:
        first, last = run[0], run[-1]
        label = str(first["layer"]) if first is last else f"{first['layer']}-{last['layer']}"
        cells = ["-" if first[key] is None else str(first[key]) for key in ("window", "slots", "sinks")]
        table.add_row(label, first["attention"], *cells, count(first["new_parameters"]))
    return table


def _stage_table(plan: dict[str, Any]) -> list[Any]:
    from rich.table import Table

    if not plan["stages"]:
        return []
    table = Table(title="Stages (memory of one process that holds all of it)", title_justify="left")
    table.add_column("stage")
    timed = "gpu" in plan
    columns = ("tokens", "steps", "batch x length", "trained", "frozen", "peak memory")
    for column in (*columns, *(("PFLOP", "hours") if timed else ())):
        table.add_column(column, justify="right")
    for row in plan["stages"]:
        times = (f"{row['training_flops'] / 1e15:.3g}", hours(row["hours"])) if timed else ()
        table.add_row(
            row["stage"],
            count(row["tokens"]),
            str(row["steps"]),
            f"{row['batch_size']} x {row['sequence_length']}",
            count(row["trained_parameters"]),
            count(row["frozen_parameters"]),
            size(row["peak_bytes"]),
            *times,
        )
    return [table]


def _hours(plan: dict[str, Any]) -> list[Any]:
    """The hours in all, and on what."""
    from rich.text import Text

    if "gpu" not in plan or not plan["stages"]:
        return []
    gpu = plan["gpu"]
    several = gpu["count"] > 1
    name = f"{gpu['count']} x {gpu['name']}" if several else gpu["name"]
    shared = ", divided by their number as if nothing were lost between them" if several else ""
    share = f"{100 * gpu['share']:.0f} %"
    return [
        Text(
            f"{hours(plan['hours'])} hours of training in all on {name}: an estimate, from {share} of its "
            f"data sheet's peaks{shared}; evaluation and export come on top"
        )
    ]


def _cache_table(plan: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title="Cache of one sequence", title_justify="left")
    for column in ("context", "model", "NHA", "share"):
        table.add_column(column, justify="right")
    for row in plan["cache"]:
        teacher, student = row["teacher_bytes"], row["student_bytes"]
        table.add_row(str(row["context"]), size(teacher), size(student), f"{100 * student / teacher:.1f} %")
    return table


def hours(number: float) -> str:
    """Hours in three digits."""
    if 0 < number < 0.01:
        return "< 0.01"
    return f"{number:.3g}" if number < 1000 else f"{number:.0f}"
