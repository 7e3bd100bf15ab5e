"""What can be refused before anything is loaded or written: model, family, sizes, text, output folder. No torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from .errors import InputError
from .model_files import local_folder
from .plan import Dimensions, model_dimensions
from .recipe import Recipe, load_recipe
from .search.record import with_chosen_layers
from .text_sources import find_place, text_files
from .weights.weight_files import check_weights
from .work_folder import check_writable

NOT_COMPARED = (
    *("output", "export.max_shard_size", "runtime.threads", "runtime.logging_steps", "runtime.engine"),
    *("runtime.micro_batch", "runtime.gradient_checkpointing", "runtime.compile", "runtime.cpu_offload"),
    *("runtime.layers_at_once", "runtime.cached_tokens", "runtime.rank_timeout", "runtime.report_to"),
    *("data.workers", "data.cache"),
    "nha.layer",  # the settings that it stands for are compared
)
"""Settings that may differ when a run goes on."""


def preflight(recipe: Recipe, out: Path, resume: bool = False) -> Path:
    """All cheap checks, then the model's folder (a Hub id is fetched, the local cache first).

    Args:
        out: the run folder.
        resume: `out` may hold an unfinished or finished run of the same recipe.
    Returns:
        The folder of the model.
    Raises:
        InputError: something is wrong; nothing was written.
    """
    check_inputs(recipe, out, resume)
    folder = local_folder(recipe.model)
    if folder is None:
        from .model_source import resolve_model

        folder = resolve_model(recipe.model)
        check_weights(folder)
    return folder


def check_inputs(recipe: Recipe, out: Path, resume: bool = False) -> None:
    """The checks of `preflight` that fetch no weights.

    Raises:
        InputError: something is wrong.
    """
    dimensions = model_dimensions(recipe.model)
    folder = local_folder(recipe.model)
    if folder is not None:
        check_weights(folder)
    problems = [*_size_problems(recipe, dimensions), *_text_problems(recipe)]
    if problems:
        raise InputError("\n".join(problems))
    check_output(recipe, out, resume)


def _size_problems(recipe: Recipe, dimensions: Dimensions) -> list[str]:
    """Settings that do not fit the model."""
    windows = recipe.nha.planned(dimensions.layers).windows(dimensions.layers)
    problems = []
    if recipe.stages and all(window is None for window in windows):
        problems.append(
            "nha.window: every layer keeps full attention, so the stages have nothing to train; "
            "set nha.window to a number such as 64, or `stages: []`"
        )
    lengths = {f"stages.{index}.sequence_length": stage.sequence_length for index, stage in enumerate(recipe.stages)}
    lengths["evaluate.sequence_length"] = recipe.evaluate.sequence_length
    if recipe.nha.auto and recipe.search.sequence_length:
        lengths["search.sequence_length"] = recipe.search.sequence_length
    return problems + [
        f"{key}: {length} is beyond the {dimensions.context} positions of {recipe.model}; set it to at most that"
        for key, length in lengths.items()
        if length > dimensions.context
    ]


def _text_problems(recipe: Recipe) -> list[str]:
    """Local text that is not there, or is of no known format."""
    problems = []
    for index, source in enumerate(recipe.data.sources):
        try:
            if source.source == "text":
                text_files(str(source.path))
            elif source.source in ("dataset", "chat"):
                find_place(source)
        except InputError as error:
            problems.append(str(error).replace("data.sources:", f"data.sources.{index}.path:", 1))
    return problems


def holds_something(folder: Path) -> bool:
    """Whether a folder has entries, those that a killed write left behind (`.name`) not counted."""
    return any(not path.name.startswith(".") for path in folder.iterdir())


def check_output(recipe: Recipe, out: Path, resume: bool) -> None:
    """Whether a run may write into `out`.

    Raises:
        InputError: it holds something and `resume` is not set, or with `resume` it holds another recipe's run.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: is a file; choose another folder with --out DIR")
    check_writable(out)
    if not out.exists() or not holds_something(out):
        return
    kept = out / "recipe.yaml"
    if not resume:
        go_on = "go on with --resume, " if kept.is_file() else ""
        raise InputError(f"{out}: is not empty; {go_on}choose another folder with --out DIR, or delete it: rm -r {out}")
    if not kept.is_file():
        raise InputError(
            f"{out}: cannot be resumed, it holds no recipe.yaml and so is no run folder; choose another with --out DIR"
        )
    before = load_recipe(str(kept))
    differences = _differences(before, recipe if before.nha.auto else with_chosen_layers(recipe, out))
    if differences:
        raise InputError(
            "\n".join(f"{out}: cannot be resumed with another recipe: {one}" for one in differences)
            + f"\n{out}: undo the change, or start anew with --out DIR"
        )


def _differences(before: Recipe, now: Recipe) -> list[str]:
    """`key: old in the folder, new now` of every setting that differs and matters."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    return [
        f"{key} is {_shown(old.get(key))} in the folder, {_shown(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if key not in NOT_COMPARED and old.get(key) != new.get(key)
    ]


def _shown(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if entries is None or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in entries:
        flat |= _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat


def finished(out: Path) -> bool:
    """Whether a run folder holds all that a run writes: evaluation, export that passed verification, report."""
    there = [out / name for name in ("eval.json", "verify.json", "report.html", "export/config.json")]
    return all(path.is_file() for path in there) and bool(
        json.loads((out / "verify.json").read_text(encoding="utf-8"))["passed"]
    )
