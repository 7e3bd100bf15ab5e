"""Measures a checkpoint on disk against its teacher, outside a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from . import modeling  # noqa: F401  (registers the NHA classes)
from .data import held_out_tokens, recall_filler, texts, token_stream
from .data_settings import SourceSettings
from .devices import find_device
from .errors import InputError
from .evaluate.harness import check_tasks, run_harness
from .evaluate.suite import UNIT_WITHOUT_WINDOW, evaluate_student, evaluate_teacher, student_window
from .inference_windows import change_windows
from .model_source import resolve_model
from .modeling.attention_nha import nha_layers, teacher_mode
from .recipe import EvaluateSettings, load_recipe
from .settings import NHASettings

LEAST_FILLER = 8192
"""Tokens of text that recall prompts are filled from at least."""


def evaluate_checkpoint(
    checkpoint: Path,
    *,
    teacher: str | None = None,
    text: str | None = None,
    settings: EvaluateSettings | None = None,
    with_recall: bool = True,
    device: str = "auto",
    quiet: bool = False,
    windows: NHASettings | None = None,
    tasks: Sequence[str] = (),
    recipe: Path | None = None,
) -> dict[str, Any]:
    """The rows of a checkpoint and its teacher, as in eval.json.

    Args:
        checkpoint: folder of an NHA model, or of an ordinary one (then only the row `teacher` is measured).
        teacher: Hub id, folder or `embedded`; None takes the model of the checkpoint's recipe.yaml, and where it has
            none (what swap writes) its own backbone.
        text: file, glob or folder of .txt, all of it measured; None takes the held-out mix of the checkpoint's
            recipe.yaml, and where it has none the held-out part of the standard library.
        windows: other windows than the checkpoint's (`change_windows`); None leaves them.
        tasks: of lm-evaluation-harness, run on the checkpoint and on its teacher.
        recipe: in place of the checkpoint's recipe.yaml, in which a run's local paths are cut to their names.
    Returns:
        {"teacher", "window_only", "memory_only", "no_attention", "final", "memory_recovery", "settings", "windows"},
        and with `tasks` {"harness": {"teacher", "final"}} (`run_harness`).
    Raises:
        InputError: something cannot be loaded, there is less text than one sequence, or the harness lacks a task.
        WorkError: a task of the harness could not be run.
    """
    if tasks:
        check_tasks(tasks)
    settings = settings or EvaluateSettings()
    place = find_device(device)
    model, tokenizer = _load(checkpoint, place)
    if windows is not None:
        change_windows(model, windows)
    _check_length(model, settings, checkpoint)
    recipe = recipe or checkpoint / "recipe.yaml"
    held_out, filler = _text(recipe, text, tokenizer, settings, quiet)
    measured: tuple[Any, ...] = (tokenizer, held_out, filler, settings)
    own: dict[str, Any] = {"with_recall": with_recall, "quiet": quiet}
    kept = settings.model_dump(mode="json")
    if not nha_layers(model):
        row = {"teacher": evaluate_teacher(model, *measured, window=0, **own), "settings": kept}
        return row | _harness(None, model, tokenizer, tasks)
    reference = _teacher(checkpoint, teacher, recipe, place)
    row = evaluate_student(model, *measured, label="final", teacher=reference, **own)
    against = model if reference is None else reference
    return {
        "teacher": evaluate_teacher(against, *measured, window=student_window(model), **own),
        **row["branches"],
        "final": row,
        "memory_recovery": {"final": row["memory_recovery"]},
        "settings": kept,
        "windows": model.config.nha_windows,
        **_harness(model, against, tokenizer, tasks),
    }


def _check_length(model: Any, settings: EvaluateSettings, checkpoint: Path) -> None:
    context = int(model.config.max_position_embeddings)
    if settings.sequence_length > context:
        raise InputError(
            f"evaluate.sequence_length: {settings.sequence_length} is beyond the {context} positions of {checkpoint}; "
            f"use --set evaluate.sequence_length={context}"
        )


def _harness(model: Any | None, teacher: Any, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """{"harness": what lm-evaluation-harness says of both, asked the same}; `teacher` may be `model` itself."""
    if not tasks:
        return {}
    window = UNIT_WITHOUT_WINDOW if model is None else student_window(model) or UNIT_WITHOUT_WINDOW
    with teacher_mode(teacher):
        rows = {"teacher": run_harness(teacher, tokenizer, tasks, window=window)}
    if model is not None:
        rows["final"] = run_harness(model, tokenizer, tasks, window=window)
    return {"harness": rows}


def _load(folder: Path, place: torch.device) -> tuple[Any, Any]:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(place).eval()
        return model, AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def _teacher(checkpoint: Path, name: str | None, recipe: Path, place: torch.device) -> Any | None:
    """The teacher as its own model, or None: the checkpoint's backbone is the teacher's."""
    if name is None and recipe.is_file():
        name = load_recipe(str(recipe)).model
    if name is None:
        return None
    try:
        return _load(resolve_model(name), place)[0]
    except InputError as error:
        raise InputError(f"{error}\n{name} is the teacher of {checkpoint}; name where it is with --teacher") from error


def _text(
    kept: Path, path: str | None, tokenizer: Any, settings: EvaluateSettings, quiet: bool
) -> tuple[torch.Tensor, list[int]]:
    """Token ids [N] to measure on, and the filler of recall prompts; `kept` is a recipe, if it is there."""
    if path is None and kept.is_file():
        recipe = load_recipe(str(kept)).model_copy(update={"evaluate": settings})
        return held_out_tokens(recipe, tokenizer, quiet=quiet), recall_filler(recipe, tokenizer, quiet=quiet)
    limit = max(settings.tokens, LEAST_FILLER)
    if path is None:
        ids = list(token_stream(SourceSettings(source="stdlib"), tokenizer, "held_out", limit=limit, quiet=quiet))
    else:
        source = SourceSettings(source="text", path=path)
        ids = []
        for document in [*texts(source, "train"), *texts(source, "held_out")]:
            ids += tokenizer(document, add_special_tokens=False, verbose=False)["input_ids"]
            if len(ids) >= limit:
                break
    if len(ids) < settings.sequence_length:
        raise InputError(
            f"--text: {settings.sequence_length} tokens are needed (evaluate.sequence_length), found {len(ids)}; "
            "give more text or lower the length with --set"
        )
    return torch.tensor(ids[: settings.tokens], dtype=torch.long), ids
