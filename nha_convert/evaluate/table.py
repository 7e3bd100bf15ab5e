"""The table of an evaluation: which rows, which columns, how a value is written. Imports no torch."""

from __future__ import annotations

import re
from typing import Any

ROWS: tuple[tuple[str, str], ...] = (
    ("teacher", "teacher"),
    ("window_only", "window only"),
    ("memory_only", "memory only"),
    ("no_attention", "no attention"),
    ("swapped", "swapped"),
    ("aligned", "aligned"),
    ("final", "final"),
)
"""Keys of eval.json in the table's order, with the name a reader sees."""
NOT_MEASURED = "–"


def memory_recovery(nll_student: float, nll_teacher: float, nll_window: float) -> float | None:
    """How much of what the memory is worth the student has: 1 is the teacher, 0 a dead memory.

    Args:
        nll_student, nll_teacher, nll_window: NLL of the student, of its teacher, and of the student with its slots
            masked.
    Returns:
        1 - (NLL_student - NLL_teacher) / (NLL_window - NLL_teacher), negative where the memory does harm; None
        where the window alone is as good as the teacher, so that there is nothing to recover.
    """
    worth = nll_window - nll_teacher
    return None if worth <= 1e-6 else 1 - (nll_student - nll_teacher) / worth


def row_names(evaluation: dict[str, Any]) -> list[tuple[str, str]]:
    """(key, name) of every row in order: `ROWS`, and before the final one those of further stages (stage_2, ...)."""
    stages = sorted(
        (key for key in evaluation if re.fullmatch(r"stage_[0-9]+", key)), key=lambda key: int(key.split("_")[1])
    )
    return [*ROWS[:-1], *((key, key.replace("_", " ")) for key in stages), ROWS[-1]]


def recall_columns(evaluation: dict[str, Any]) -> list[int]:
    """Every distance in tokens that some row measured, ascending."""
    rows = (evaluation.get(key) or {} for key, _ in row_names(evaluation))
    return sorted(
        {int(distance) for row in rows for distance, cell in (row.get("recall") or {}).items() if "exact_match" in cell}
    )


def table_header(evaluation: dict[str, Any]) -> list[str]:
    """The column names, one recall column per measured distance."""
    columns = ["", "NLL", "vs teacher", "KL", "top-1"]
    columns += [f"recall {distance}" for distance in recall_columns(evaluation)]
    return [*columns, "memory recovery"]


def table_rows(evaluation: dict[str, Any], *, complete: bool = False) -> list[tuple[str, list[str]]]:
    """(key, cells) of every measured row, or of all with `complete`; `NOT_MEASURED` where a number is missing."""
    teacher = (evaluation.get("teacher") or {}).get("nll")
    distances = recall_columns(evaluation)
    recovery = evaluation.get("memory_recovery") or {}
    rows = []
    for key, name in row_names(evaluation):
        row = evaluation.get(key) or {}
        if not row and not complete:
            continue
        nll = row.get("nll")
        relative = None if nll is None or not teacher or key == "teacher" else 100 * (nll / teacher - 1)
        cells = [
            name,
            _text(nll, ".4f"),
            _text(relative, "+.2f", " %"),
            _text(row.get("kl"), ".4f"),
            _text(row.get("top1"), ".3f"),
        ]
        for distance in distances:
            cells.append(_text((row.get("recall") or {}).get(str(distance), {}).get("exact_match"), ".2f"))
        rows.append((key, [*cells, _text(recovery.get(key, row.get("memory_recovery")), ".3f")]))
    return rows


def table_notes(evaluation: dict[str, Any]) -> list[str]:
    """What a reader of the table has to know: units, prompts behind the recall, distances left out and why."""
    notes = ["NLL and KL in nats per token of held-out text; KL and top-1 against the teacher."]
    rows = [evaluation[key] for key, _ in row_names(evaluation) if evaluation.get(key)]
    cells = [cell for row in rows for cell in (row.get("recall") or {}).values() if "prompts" in cell]
    if cells:
        widest = max(cell["high"] - cell["low"] for cell in cells) / 2
        notes.append(
            f"Recall: exact match of generated answers, {cells[0]['prompts']} prompts per distance (in tokens), "
            f"95 % interval at most ±{widest:.2f}."
        )
    final = (evaluation.get("final") or {}).get("intervals") or {}
    named = (("NLL above the teacher's", "nll_above_teacher", ".4f"), ("memory recovery", "memory_recovery", ".3f"))
    spans = [(name, final[key], form) for name, key, form in named if final.get(key)]
    if spans:
        said = ", ".join(f"{name} {low:{form}} to {high:{form}}" for name, (low, high), form in spans)
        notes.append(f"Final, 95 % intervals by bootstrap over {final['bootstrap']['windows']} windows: {said}.")
    left_out: dict[str, str] = {}
    for row in rows:
        left_out.update(row.get("recall_left_out") or {})
    notes += [f"Recall at {distance} tokens left out: {reason}." for distance, reason in left_out.items()]
    return notes


def _text(value: float | None, form: str, unit: str = "") -> str:
    return NOT_MEASURED if value is None else format(value, form) + unit
