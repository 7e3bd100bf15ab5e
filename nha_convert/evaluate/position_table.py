"""NLL and agreement with the teacher by position, as a table's cells. Imports no torch."""

from __future__ import annotations

from typing import Any

from nha_convert.evaluate.table import NOT_MEASURED

POSITION_HEADER = ["tokens of context", "NLL teacher", "NLL window only", "NLL final", "KL", "top-1"]
COLUMNS = (
    ("teacher", "nll_buckets", ".4f"),
    ("window_only", "nll_buckets", ".4f"),
    ("final", "nll_buckets", ".4f"),
    ("final", "kl_buckets", ".4f"),
    ("final", "top1_buckets", ".3f"),
)
"""Row of eval.json, its metric, and how a value is written, in the order of the header."""
POSITION_NOTES = [
    "Means over the predictions with so much context; KL and top-1 of the final model against the teacher."
]


def position_rows(evaluation: dict[str, Any]) -> list[list[str]]:
    """Cells of `POSITION_HEADER` for every bucket of the final model, nearest first; none where it was not measured."""
    columns = [((evaluation.get(row) or {}).get(metric) or {}, form) for row, metric, form in COLUMNS]
    buckets = (evaluation.get("final") or {}).get("nll_buckets") or {}
    return [
        [bucket, *(format(found[bucket], form) if bucket in found else NOT_MEASURED for found, form in columns)]
        for bucket in buckets
    ]
