"""One evaluation: the rows of eval.json, and the table that shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table
from torch import Tensor

from nha_convert.evaluate.ablation import BRANCHES, branch_reader, memory_recovery, slot_mass
from nha_convert.evaluate.nll import (
    compare,
    default_batch_size,
    evaluating,
    logits_of,
    position_buckets,
    teacher_logits_of,
)
from nha_convert.evaluate.recall import recall_by_generation, recall_distances
from nha_convert.evaluate.table import table_header, table_notes, table_rows
from nha_convert.modeling.attention_nha import branch_mode, nha_layers, teacher_mode
from nha_convert.settings import EvaluateSettings

SLOT_MASS_WINDOWS = 4
"""Windows of held-out text over which the slots' share of attention is averaged."""
UNIT_WITHOUT_WINDOW = 64
"""Tokens that a recall multiple stands for where the window is 0."""


def student_window(model: Any) -> int:
    """The largest window of the layers that run NHA; 0 if none does."""
    return max((layer.nha_window for _, layer in nha_layers(model) if layer.nha_window is not None), default=0)


def evaluate_teacher(
    model: Any,
    tokenizer: Any,
    held_out: Tensor,
    filler: Sequence[int],
    settings: EvaluateSettings,
    *,
    window: int | None = None,
    with_recall: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """The row the others are compared with.

    Args:
        model: an ordinary model, or a student with an untouched backbone (read in teacher mode).
        held_out: [N] ids of text nobody trained on; the first `settings.tokens` count.
        filler: ids of ordinary text for the recall prompts.
        window: tokens that a recall multiple stands for; the student's largest window if None.
    Returns:
        {"label", "nll", "nll_buckets", "recall", ...} as in eval.json.
    """
    started = time.perf_counter()
    unit = student_window(model) if window is None else window
    with teacher_mode(model):
        row = _readings({"teacher": logits_of(model)}, (model,), tokenizer, held_out, settings, None, quiet)["teacher"]
        if with_recall:
            row |= _recall(model, tokenizer, filler, settings, unit, quiet)
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def evaluate_student(
    model: Any,
    tokenizer: Any,
    held_out: Tensor,
    filler: Sequence[int],
    settings: EvaluateSettings,
    *,
    label: str,
    window: int | None = None,
    teacher: Any | None = None,
    with_recall: bool = True,
    with_window_recall: bool = False,
    with_branches: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """One row: the model as it stands, its teacher and each of its branches alone, read in one pass.

    Args:
        held_out: [N] ids of text nobody trained on; the first `settings.tokens` count.
        filler: ids of ordinary text for the recall prompts.
        label: the row's name.
        window: tokens that a recall multiple stands for; the model's largest window if None.
        teacher: a model of its own; None reads `model` in teacher mode, which is right only while the backbone is
            untouched.
        with_window_recall: ask the window alone for recall, too.
        with_branches: read every branch alone; False reads only the window, which memory recovery needs.
    Returns:
        {"label", "nll", "kl", "top1", each with "..._buckets", "nll_teacher", "memory_recovery",
        "ablation": {"window", "slots", "none"} (NLL), "branches": {"window_only", "memory_only", "no_attention"}
        (rows), "recall", "recall_left_out", "slot_mass", "seconds"}.
    """
    started = time.perf_counter()
    unit = student_window(model) if window is None else window
    readers = {"teacher": teacher_logits_of(model, teacher), label: logits_of(model)}
    branches = BRANCHES if with_branches else {"window_only": BRANCHES["window_only"]}
    readers |= {name: branch_reader(model, branch) for name, branch in branches.items()}
    models = (model,) if teacher is None else (model, teacher)
    rows = _readings(readers, models, tokenizer, held_out, settings, "teacher", quiet)
    row = rows[label]
    row["branches"] = {name: rows[name] for name in branches}
    row["ablation"] = {branch: rows[name]["nll"] for name, branch in branches.items()}
    row["nll_teacher"] = rows["teacher"]["nll"]
    row["memory_recovery"] = memory_recovery(row["nll"], row["nll_teacher"], row["ablation"]["window"])
    length = settings.sequence_length
    sample = held_out.reshape(-1)[: SLOT_MASS_WINDOWS * length]
    row["slot_mass"] = slot_mass(model, sample, length, bos=tokenizer.bos_token_id)
    if with_recall:
        row |= _recall(model, tokenizer, filler, settings, unit, quiet)
    if with_window_recall:
        with branch_mode(model, "window"):
            rows["window_only"] |= _recall(model, tokenizer, filler, settings, unit, quiet)
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def _readings(
    readers: dict[str, Callable[[Tensor], Tensor]],
    models: tuple[Any, ...],
    tokenizer: Any,
    held_out: Tensor,
    settings: EvaluateSettings,
    reference: str | None,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """NLL of every reader, KL and top-1 agreement with the reference, as rows."""
    length = settings.sequence_length
    with evaluating(*models):
        measured = compare(
            readers,
            held_out.reshape(-1)[: settings.tokens],
            length,
            reference=reference,
            buckets=position_buckets(length),
            batch_size=default_batch_size(models[0], length),
            bos=tokenizer.bos_token_id,
            quiet=quiet,
        )
    rows: dict[str, dict[str, Any]] = {}
    for name, result in measured.items():
        row: dict[str, Any] = {"label": name, "tokens": result["tokens"]}
        for metric in ("nll", "kl", "top1"):
            if metric in result:
                row[metric] = result[metric]["mean"]
                row[f"{metric}_buckets"] = result[metric]["buckets"]
        rows[name] = row
    return rows


def _recall(
    model: Any, tokenizer: Any, filler: Sequence[int], settings: EvaluateSettings, window: int, quiet: bool
) -> dict[str, Any]:
    """The recall part of a row; distances with no room for them are listed with the reason."""
    context = int(model.config.max_position_embeddings)
    answer = settings.recall_value_length
    measured, too_far = recall_distances(settings.recall_distances, window or UNIT_WITHOUT_WINDOW, context, answer)
    cells = recall_by_generation(
        model,
        tokenizer,
        filler,
        distances=measured,
        pairs=settings.recall_pairs,
        prompts=settings.recall_prompts,
        span=context - answer - 1,
        value_length=answer,
        quiet=quiet,
    )
    left_out = {str(distance): f"no room in the trained context of {context} tokens" for distance in too_far}
    left_out |= {distance: cell["left_out"] for distance, cell in cells.items() if "left_out" in cell}
    return {
        "recall": {distance: cell for distance, cell in cells.items() if "exact_match" in cell},
        "recall_left_out": left_out,
    }


def summary_table(evaluation: dict[str, Any]) -> Table:
    """The measured rows as a rich table, its caption saying what was left out.

    Args:
        evaluation: the content of eval.json, complete or not.
    """
    table = Table(title="Student against teacher", caption="\n".join(table_notes(evaluation)), caption_justify="left")
    for index, column in enumerate(table_header(evaluation)):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for key, cells in table_rows(evaluation):
        table.add_row(*cells, style="bold" if key == "final" else None)
    return table
