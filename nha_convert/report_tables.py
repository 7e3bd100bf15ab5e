"""The report's tables as HTML: what was measured with its intervals, layers, branches, costs, where it comes from."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from nha_convert.evaluate.benchmark_table import DECODE_HEADER, PREFILL_HEADER, bench_notes, decode_rows, prefill_rows
from nha_convert.evaluate.layer_table import (
    GAIN_HEADER,
    USAGE_HEADER,
    layer_cells,
    layer_notes,
    span,
    without_memory,
)
from nha_convert.evaluate.table import NOT_MEASURED, recall_columns, table_header, table_notes, table_rows
from nha_convert.evaluate.task_table import harness_rows, has_tasks, task_distances, task_notes, task_rows

NOT = '<p class="soft">not measured{}</p>'
BRANCHES = (
    ("final", "slots and window"),
    ("window_only", "window only (slots masked)"),
    ("memory_only", "memory only (window masked)"),
    ("no_attention", "no attention in NHA layers"),
)


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    notes: Sequence[str] = (),
) -> str:
    """A table that scrolls inside its own container.

    Args:
        rows: (class, cells); a cell is what it says and, below it and smaller, its interval. The first one is the
            row's name.
        notes: lines below the table.
    """
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in header)
    lines = []
    for kind, cells in rows:
        texts = [html.escape(text) + (f"<small>{html.escape(below)}</small>" if below else "") for text, below in cells]
        first, rest = f'<th scope="row">{texts[0]}</th>', "".join(f"<td>{text}</td>" for text in texts[1:])
        lines.append(f'<tr class="{html.escape(kind)}">{first}{rest}</tr>' if kind else f"<tr>{first}{rest}</tr>")
    below = f'<p class="soft">{"<br>".join(map(html.escape, notes))}</p>' if notes else ""
    label = html.escape(caption)
    return (
        f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table><caption>{label}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def _plain(cells: Sequence[str]) -> list[tuple[str, str]]:
    """Cells without intervals; a trailing `[low, high]` goes below its number."""
    return [(text, f"[{rest}") if rest else (text, "") for text, _, rest in (c.partition(" [") for c in cells)]


def measured_tables(evaluation: dict[str, Any]) -> str:
    """The main table with its intervals, and those of recall tasks and of lm-evaluation-harness where there are any."""
    rows = [
        (key, list(zip(cells, _intervals(evaluation, key)))) for key, cells in table_rows(evaluation, complete=True)
    ]
    notes = [*table_notes(evaluation), f"In brackets: 95 % intervals{_seed(evaluation)}. {NOT_MEASURED}: not measured."]
    parts = [table("Student against teacher", table_header(evaluation), rows, notes)]
    if has_tasks(evaluation):
        header = ["task", "model", *(f"{distance}" for distance in task_distances(evaluation))]
        tasks = [("final" if row[1] == "final" else "", _task_cells(row)) for row in task_rows(evaluation)]
        parts.append(table("Recall tasks, exact match by distance in tokens", header, tasks, task_notes(evaluation)))
    if found := harness_rows(evaluation):
        notes = ["± is the standard error that the harness gives."]
        header = ["task", "metric", "teacher", "final"]
        parts.append(table("lm-evaluation-harness", header, [("", _plain(row)) for row in found], notes))
    return "".join(parts)


def _task_cells(row: Sequence[str]) -> list[tuple[str, str]]:
    return [(text, f"±{half}" if half else "") for text, _, half in (cell.partition(" ±") for cell in row)]


def _seed(evaluation: dict[str, Any]) -> str:
    how = ((evaluation.get("final") or evaluation.get("teacher") or {}).get("intervals") or {}).get("bootstrap")
    if not how:
        return ""
    return f" (bootstrap over {how['windows']} windows, {how['draws']} draws, seed {how['seed']}; recall: Wilson)"


def _intervals(evaluation: dict[str, Any], key: str) -> list[str]:
    """`[low, high]` for every column of `table_header`; empty where there is none."""
    row = evaluation.get(key) or {}
    found = row.get("intervals") or {}
    nll = (evaluation.get("teacher") or {}).get("nll")
    gap = found.get("nll_above_teacher")
    relative = [100 * bound / nll for bound in gap] if gap and nll and key != "teacher" else None
    cells = ["", span(found.get("nll"), ".3f"), span(relative, "+.2f"), span(found.get("kl"), ".4f")]
    cells.append(span(found.get("top1"), ".3f"))
    for distance in recall_columns(evaluation):
        cell = (row.get("recall") or {}).get(str(distance)) or {}
        cells.append(span([cell["low"], cell["high"]] if "low" in cell else None, ".2f"))
    return [*cells, span(found.get("memory_recovery"), ".3f")]


def layer_table(row: dict[str, Any], layers: Sequence[dict[str, Any]]) -> str:
    """What every layer is and does.

    Args:
        row: the final model's.
        layers: of plan.json: {"layer", "attention", "window", "slots"}.
    """
    measured = layer_cells(row)
    known = {layer["layer"]: layer for layer in layers} or {layer: {} for layer in measured}
    if not known:
        return NOT.format("")
    rows = []
    for index, layer in known.items():
        kind = "full" if layer.get("attention") == "full" else f"window {layer.get('window', NOT_MEASURED)}"
        cells = [(str(index), ""), (kind, ""), (str(layer.get("slots") or NOT_MEASURED), "")]
        rows.append(("", cells + measured.get(index, without_memory())))
    header = ["layer", "attention", "slots", *USAGE_HEADER, GAIN_HEADER]
    return table("Layers of the final model", header, rows, layer_notes(row))


def branch_table(evaluation: dict[str, Any]) -> str:
    """The final model with parts of its attention masked."""
    teacher = (evaluation.get("teacher") or {}).get("nll")
    rows = []
    for key, name in BRANCHES:
        row = evaluation.get(key) or {}
        if "nll" not in row:
            continue
        found = row.get("intervals") or {}
        cells = [(name, ""), (f"{row['nll']:.4f}", span(found.get("nll"), ".3f"))]
        cells.append((f"{row['nll'] - teacher:+.4f}" if teacher is not None else NOT_MEASURED, ""))
        for metric, form in (("kl", ".4f"), ("top1", ".3f")):
            known = row.get(metric) is not None
            cells.append((f"{row[metric]:{form}}" if known else NOT_MEASURED, span(found.get(metric), form)))
        rows.append((key, cells))
    if not any(key != "final" for key, _ in rows):
        return NOT.format("")
    gain = ((evaluation.get("final") or {}).get("intervals") or {}).get("nll_gain_of_slots")
    notes = [f"All slots together lower the NLL by {gain[0]:.4f} to {gain[1]:.4f} nats, 95 % interval."] if gain else []
    header = ["the final model with", "NLL", "above the teacher", "KL", "top-1"]
    return table("Parts of the attention masked", header, rows, notes)


def cost_tables(bench: dict[str, Any] | None) -> str:
    """Decoding, prefill and cache, teacher beside student."""
    if not bench or not bench.get("decode"):
        return NOT.format("; nha-convert bench RUN measures it")
    decode = [("", _plain(row)) for row in decode_rows(bench)]
    prefill = [("", _plain(row)) for row in prefill_rows(bench)]
    last = bench_notes(bench)
    parts = [table("One decoded token", DECODE_HEADER, decode, () if prefill else last)]
    if prefill:
        parts.append(table("Prefill", PREFILL_HEADER, prefill, last))
    return "".join(parts)


def facts_table(caption: str, facts: Sequence[tuple[str, str]]) -> str:
    """Names and values."""
    lines = "".join(f'<tr><th scope="row">{html.escape(a)}</th><td>{html.escape(b)}</td></tr>' for a, b in facts)
    return f'<table class="facts"><caption>{html.escape(caption)}</caption><tbody>{lines}</tbody></table>'
