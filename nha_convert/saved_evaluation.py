"""`eval RUN --save`: what a run did not measure, into its own eval.json and report. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json_object, write_json
from .settings import EvaluateSettings

EVALUATION = "eval.json"
ROWS = ("teacher", "final")
SETTINGS = {
    "tasks": ("tasks", "task_pairs", "task_prompts", "task_distances"),
    "layer_ablation": ("layer_ablation",),
}
"""Parts of a row that can be added, and the settings of `evaluate` that each follows."""
HARNESS = "harness"
RECALL = "recall"


def check_save(run: Path, overrides: Sequence[str], *, harness: bool, others: Sequence[str]) -> list[str]:
    """What `--save` adds; refuses what cannot stand beside a run's own numbers, before anything is loaded.

    Args:
        overrides: `--set`.
        harness: whether tasks of lm-evaluation-harness were named.
        others: further options that were given and change what is measured.
    Returns:
        keys of `SETTINGS`, and `HARNESS`.
    Raises:
        InputError: not a finished run; another text, teacher, window or setting than the run's own; nothing to add.
    """
    if not (run / EVALUATION).is_file():
        raise InputError(
            f"--save {run}: no {EVALUATION}, so this is no finished run folder (the one above `export`); give that, "
            "or use --json FILE instead"
        )
    read_json_object(run / EVALUATION)
    known = {f"evaluate.{name}": part for part, names in SETTINGS.items() for name in names}
    given = [one.partition("=")[0].removeprefix("~") for one in overrides]
    if wrong := [*others, *(f"--set {name}" for name in given if name not in known)]:
        raise InputError(
            f"--save: {', '.join(wrong)} would not fit the numbers of {run / EVALUATION}; allowed are --tasks and "
            f"--set of {', '.join(known)}; use --json FILE for the rest"
        )
    parts = [part for part in SETTINGS if part in {known[name] for name in given}] + [HARNESS] * harness
    if not parts:
        raise InputError(
            "--save: nothing to add; name it, such as --set 'evaluate.tasks=[mqar]', --set "
            "evaluate.layer_ablation=true or --tasks arc_easy"
        )
    return parts


def settings_to_save(settings: EvaluateSettings, parts: Sequence[str]) -> EvaluateSettings:
    """The settings that measure these parts and nothing that the run has.

    Raises:
        InputError: tasks were named, but none beside `recall`, which a run always has.
    """
    tasks = [task for task in settings.tasks if task != RECALL]
    if "tasks" in parts and not tasks:
        raise InputError("--save: evaluate.tasks names none beside recall; name one, such as mqar")
    layers = "layer_ablation" in parts and settings.layer_ablation
    return settings.model_copy(update={"tasks": tasks if "tasks" in parts else [RECALL], "layer_ablation": layers})


def save_evaluation(run: Path, evaluation: dict[str, Any], parts: Sequence[str]) -> None:
    """Adds parts to a run's eval.json; recall tasks and layers also to the rows that it is made from on `--resume`.

    Tasks that the run or an earlier call asked stay, but for those that were asked again.

    Args:
        evaluation: of `evaluate_checkpoint`, of this run.
    Raises:
        InputError: eval.json, or a row of the run, cannot be read.
    """
    kept = read_json_object(run / EVALUATION)
    for name in ROWS:
        row = run / "evaluation" / f"{name}.json"
        if row.is_file():
            write_json(row, _with(read_json_object(row), evaluation[name], parts))
        kept[name] = _with(kept[name], evaluation[name], parts)
    if HARNESS in parts:
        before = kept.get(HARNESS) or {}
        kept[HARNESS] = {name: (before.get(name) or {}) | evaluation[HARNESS][name] for name in ROWS}
    settings = kept["settings"]["evaluate"]
    asked = {name: evaluation["settings"][name] for part in parts for name in SETTINGS.get(part, ())}
    if "tasks" in asked:
        asked["tasks"] = list(dict.fromkeys([*settings["tasks"], *asked["tasks"]]))
    kept["settings"]["evaluate"] = settings | asked
    write_json(run / EVALUATION, kept)


def _with(row: dict[str, Any], measured: dict[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """A row with the parts that were measured; the teacher has no layers of its own."""
    new = {part: measured[part] for part in parts if part in measured}
    if "tasks" in new:
        new["tasks"] = (row.get("tasks") or {}) | new["tasks"]
    return row | new
