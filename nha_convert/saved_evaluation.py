"""`eval RUN --save`: what a run did not measure, into its own eval.json and report. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .files import read_json_object, write_json

EVALUATION = "eval.json"
ROWS = ("teacher", "final")
PARTS = ("tasks", "layer_ablation")
"""Of a row; what a run may lack."""
SETTINGS = ("tasks", "task_pairs", "task_prompts", "task_distances", "layer_ablation")
"""Of `evaluate`; others would change numbers that the run has."""


def check_save(run: Path, overrides: Sequence[str], *, others: Sequence[str]) -> None:
    """Refuses what cannot stand beside a run's own numbers, before anything is loaded.

    Args:
        overrides: `--set`.
        others: further options that were given and change what is measured.
    Raises:
        InputError: not a finished run, or another text, teacher, window or setting than the run's own.
    """
    if not (run / EVALUATION).is_file():
        raise InputError(f"--save {run}: no {EVALUATION}, so this is no finished run folder; use --json FILE instead")
    allowed = ", ".join(f"evaluate.{name}" for name in SETTINGS)
    names = [one.partition("=")[0].removeprefix("~") for one in overrides]
    wrong = [*others, *(f"--set {name}" for name in names if name.removeprefix("evaluate.") not in SETTINGS)]
    if wrong:
        raise InputError(
            f"--save: {', '.join(wrong)} would not fit the numbers of {run / EVALUATION}; allowed are --tasks and "
            f"--set of {allowed}; use --json FILE for the rest"
        )


def save_evaluation(run: Path, evaluation: dict[str, Any]) -> list[str]:
    """Adds what was measured to a run's eval.json, and to the rows that `run --resume` reads back.

    Args:
        evaluation: of `evaluate_checkpoint`, of this run.
    Returns:
        what was added or replaced, such as `final.tasks`.
    Raises:
        InputError: eval.json, or a row of the run, cannot be read.
    """
    kept, added = read_json_object(run / EVALUATION), []
    for name in ROWS:
        new = {part: evaluation[name][part] for part in PARTS if part in evaluation[name]}
        row = run / "evaluation" / f"{name}.json"
        if new and row.is_file():
            write_json(row, read_json_object(row) | new)
        kept[name] = kept[name] | new
        added += [f"{name}.{part}" for part in new]
    if "harness" in evaluation:
        kept["harness"] = evaluation["harness"]
        added.append("harness")
    before = kept["settings"]["evaluate"]
    asked = {name: evaluation["settings"][name] for name in SETTINGS}
    asked["tasks"] = list(dict.fromkeys([*before["tasks"], *asked["tasks"]]))
    kept["settings"] = kept["settings"] | {"evaluate": before | asked}
    write_json(run / EVALUATION, kept)
    return added
