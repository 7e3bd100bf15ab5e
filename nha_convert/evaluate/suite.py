"""One evaluation: the rows of eval.json, and the table that shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Group
from rich.table import Table
from torch import Tensor

from nha_convert.evaluate.ablation import BRANCHES, branch_reader, layer_gains, layer_readers, memory_recovery
from nha_convert.evaluate.bootstrap import (
    CONFIDENCE,
    DRAWS,
    bootstrap_interval,
    gap_of_sums,
    mean_of_sums,
    recovery_of_sums,
)
from nha_convert.evaluate.layer_table import GAIN_HEADER, USAGE_HEADER, layer_cells, layer_notes
from nha_convert.evaluate.nll import (
    compare,
    default_batch_size,
    evaluating,
    logits_of,
    position_buckets,
    teacher_logits_of,
)
from nha_convert.evaluate.position_table import POSITION_HEADER, POSITION_NOTES, position_rows
from nha_convert.evaluate.recall import ask_task, recall_by_generation, recall_distances
from nha_convert.evaluate.recall_tasks import tasks_named
from nha_convert.evaluate.slots import read_slots, slot_mass, slot_usage
from nha_convert.evaluate.table import table_header, table_notes, table_rows
from nha_convert.evaluate.task_table import harness_rows, has_tasks, task_distances, task_notes, task_rows
from nha_convert.modeling.attention_nha import branch_mode, nha_layers, teacher_mode
from nha_convert.settings import EvaluateSettings

SLOT_MASS_WINDOWS = 4
"""Windows of held-out text over which the slots' share of attention is averaged."""
UNIT_WITHOUT_WINDOW = 64
"""Tokens that a recall multiple stands for where the window is 0."""
SEED_STEP = 1_000_003
"""Between the seeds of two settings: `ask_task` adds a distance to each."""


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
        measured = _read({"teacher": logits_of(model)}, (model,), tokenizer, held_out, settings, None, quiet)
        row = _row("teacher", measured, settings.seed)
        if with_recall:
            row |= _recall(model, tokenizer, filler, settings, unit, quiet)
            row |= _tasks(model, tokenizer, filler, settings, unit, quiet)
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
        with_branches: read every branch alone, each layer without its slots (`settings.layer_ablation`), and ask the
            tasks (`settings.tasks`); False reads only the window, which memory recovery needs.
    Returns:
        {"label", "nll", "kl", "top1", each with "..._buckets", "intervals" (`_row`), "nll_teacher",
        "memory_recovery", "ablation": {"window", "slots", "none"} (NLL), "branches": {"window_only", "memory_only",
        "no_attention"} (rows), "layer_ablation" (`layer_gains`), "recall", "recall_left_out", "tasks" (`_tasks`),
        "slot_mass", "slot_usage" (`slots`), "seconds"}; what was not asked for is not there.
    """
    started = time.perf_counter()
    unit = student_window(model) if window is None else window
    readers = {"teacher": teacher_logits_of(model, teacher), label: logits_of(model)}
    branches = BRANCHES if with_branches else {"window_only": BRANCHES["window_only"]}
    readers |= {name: branch_reader(model, branch) for name, branch in branches.items()}
    layers = layer_readers(model) if with_branches and settings.layer_ablation else {}
    readers |= {f"layer {index}": reader for index, reader in layers.items()}
    models = (model,) if teacher is None else (model, teacher)
    measured = _read(readers, models, tokenizer, held_out, settings, "teacher", quiet)
    row = _student_row(measured, label, branches, list(layers), settings.seed)
    length = settings.sequence_length
    sample = held_out.reshape(-1)[: SLOT_MASS_WINDOWS * length]
    usage = read_slots(model, sample, length, bos=tokenizer.bos_token_id)
    row |= {"slot_mass": slot_mass(usage, length), "slot_usage": slot_usage(usage)}
    if with_recall:
        row |= _recall(model, tokenizer, filler, settings, unit, quiet)
        if with_branches:
            row |= _tasks(model, tokenizer, filler, settings, unit, quiet)
    if with_window_recall:
        with branch_mode(model, "window"):
            row["branches"]["window_only"] |= _recall(model, tokenizer, filler, settings, unit, quiet)
    return row | {"seconds": round(time.perf_counter() - started, 3)}


def _read(
    readers: dict[str, Callable[[Tensor], Tensor]],
    models: tuple[Any, ...],
    tokenizer: Any,
    held_out: Tensor,
    settings: EvaluateSettings,
    reference: str | None,
    quiet: bool,
) -> dict[str, dict[str, Any]]:
    """NLL of every reader, KL and top-1 agreement with the reference, as `compare` gives them."""
    length = settings.sequence_length
    with evaluating(*models):
        return compare(
            readers,
            held_out.reshape(-1)[: settings.tokens],
            length,
            reference=reference,
            buckets=position_buckets(length),
            batch_size=default_batch_size(models[0], length),
            bos=tokenizer.bos_token_id,
            quiet=quiet,
        )


def _row(name: str, measured: dict[str, dict[str, Any]], seed: int) -> dict[str, Any]:
    """One reader's row: means, buckets, and under "intervals" each mean's [low, high] and how they were found."""
    result = measured[name]
    windows = result["window_tokens"]
    row: dict[str, Any] = {"label": name, "tokens": result["tokens"]}
    how = {"confidence": CONFIDENCE, "windows": len(windows), "draws": DRAWS, "seed": seed}
    row["intervals"] = {"bootstrap": how}
    for metric, sums in result["windows"].items():
        row[metric] = result[metric]["mean"]
        row[f"{metric}_buckets"] = result[metric]["buckets"]
        row["intervals"][metric] = bootstrap_interval(mean_of_sums, (sums, windows), seed=seed)
    return row


def _student_row(
    measured: dict[str, dict[str, Any]], label: str, branches: dict[str, str], layers: Sequence[int], seed: int
) -> dict[str, Any]:
    """What one pass over the text says of a student: its own row, its branches', and its layers' own ablations."""
    rows = {name: _row(name, measured, seed) for name in ("teacher", label, *branches)}
    row = rows[label]
    row["branches"] = {name: rows[name] for name in branches}
    row["ablation"] = {branch: rows[name]["nll"] for name, branch in branches.items()}
    row["nll_teacher"] = rows["teacher"]["nll"]
    row["memory_recovery"] = memory_recovery(row["nll"], row["nll_teacher"], row["ablation"]["window"])
    row["intervals"] |= _paired_intervals(measured, label, seed)
    if layers:
        masked = {index: measured[f"layer {index}"] for index in layers}
        row["layer_ablation"] = layer_gains(measured[label], masked, seed)
    return row


def _paired_intervals(measured: dict[str, dict[str, Any]], label: str, seed: int) -> dict[str, Any]:
    """[low, high] of the NLL above the teacher's, of what the slots gain, and of memory recovery."""
    student, teacher, window = (measured[name]["windows"]["nll"] for name in (label, "teacher", "window_only"))
    tokens = measured[label]["window_tokens"]
    return {
        "nll_above_teacher": bootstrap_interval(gap_of_sums, (student, teacher, tokens), seed=seed),
        "nll_gain_of_slots": bootstrap_interval(gap_of_sums, (window, student, tokens), seed=seed),
        "memory_recovery": bootstrap_interval(recovery_of_sums, (student, teacher, window, tokens), seed=seed),
    }


def _recall(
    model: Any, tokenizer: Any, filler: Sequence[int], settings: EvaluateSettings, window: int, quiet: bool
) -> dict[str, Any]:
    """The recall part of a row; distances with no room for them are listed with the reason."""
    if "recall" not in settings.tasks:
        return {}
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
        seed=settings.seed * SEED_STEP,
        quiet=quiet,
    )
    left_out = {str(distance): f"no room in the trained context of {context} tokens" for distance in too_far}
    left_out |= {distance: cell["left_out"] for distance, cell in cells.items() if "left_out" in cell}
    return {
        "recall": {distance: cell for distance, cell in cells.items() if "exact_match" in cell},
        "recall_left_out": left_out,
    }


def _tasks(
    model: Any, tokenizer: Any, filler: Sequence[int], settings: EvaluateSettings, window: int, quiet: bool
) -> dict[str, Any]:
    """{"tasks": {name: [{"distance", "pairs" (mqar), and a cell of `ask_task`, or "left_out": reason}, ...]}}."""
    names = [name for name in settings.tasks if name != "recall"]
    if not names:
        return {}
    context = int(model.config.max_position_embeddings)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for name in names:
        for task in tasks_named(name, settings.task_pairs):
            unit = window or UNIT_WITHOUT_WINDOW
            measured, too_far = recall_distances(settings.task_distances, unit, context, task.answer)
            cells = ask_task(
                model,
                tokenizer,
                filler,
                task,
                distances=measured,
                prompts=settings.task_prompts,
                span=context - task.answer - 1,
                seed=settings.seed * SEED_STEP,
                quiet=quiet,
            )
            reason = {"left_out": f"no room in the trained context of {context} tokens"}
            cells |= {str(distance): reason for distance in too_far}
            results[name] += [{"distance": int(distance), **task.details, **cell} for distance, cell in cells.items()]
    return {"tasks": results}


def summary_table(evaluation: dict[str, Any]) -> Table | Group:
    """The measured rows for rich, captions saying what was left out; then by position, by layer, and tasks if asked.

    Args:
        evaluation: the content of eval.json, complete or not.
    """
    table = Table(title="Student against teacher", caption="\n".join(table_notes(evaluation)), caption_justify="left")
    for index, column in enumerate(table_header(evaluation)):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    for key, cells in table_rows(evaluation):
        table.add_row(*cells, style="bold" if key == "final" else None)
    further = []
    final = evaluation.get("final") or {}
    if positions := position_rows(evaluation):
        further.append(_plain_table("By position", POSITION_HEADER, positions, POSITION_NOTES, names=1))
    if layers := layer_cells(final):
        rows = [[str(index), *("\n".join(filter(None, one)) for one in own)] for index, own in layers.items()]
        header = ["layer", *USAGE_HEADER, GAIN_HEADER]
        further.append(_plain_table("Layers of the final model", header, rows, layer_notes(final), names=1))
    if has_tasks(evaluation):
        header = ["", "", *map(str, task_distances(evaluation))]
        further.append(_plain_table("Recall tasks", header, task_rows(evaluation), task_notes(evaluation)))
    if rows := harness_rows(evaluation):
        notes = ["± is the standard error that the harness gives."]
        further.append(_plain_table("lm-evaluation-harness", ["", "", "teacher", "final"], rows, notes))
    return Group(table, *further) if further else table


def _plain_table(title: str, header: list[str], rows: list[list[str]], notes: list[str], *, names: int = 2) -> Table:
    """A table whose first columns are names."""
    table = Table(title=title, caption="\n".join(notes), caption_justify="left")
    for index, column in enumerate(header):
        table.add_column(column, justify="left" if index < names else "right", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table
