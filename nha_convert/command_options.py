"""What the commands share: arguments and options, ways to print, folders that arguments mean."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .errors import InputError, WorkError
from .weights.weight_files import check_weights

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE|MODEL", help="shipped recipe, YAML file, Hub id, model folder or `embedded`")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="change a setting: nha.window=32, stages.align.tokens=1M, nha.window=[64,full]; ~KEY goes back to the "
        "default; may be repeated",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars, no table")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON on stdout")]


def prepare_libraries(quiet: bool) -> None:
    """Set before torch and transformers are imported: no progress bars outside terminals, no advice in between."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, once per process and stage
    if quiet or not sys.stderr.isatty():
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        from transformers.utils import logging

        logging.disable_progress_bar()


def print_rich(renderable: Any) -> None:
    """A rich renderable on stdout; outside a terminal wide enough for every column."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(renderable)


def print_json(content: Any) -> None:
    print(json.dumps(content, indent=2, default=str))


def checkpoint_folder(path: Path) -> Path:
    """The checkpoint folder that a path means: itself, or the export of a run folder.

    Raises:
        InputError: neither holds a config.json, or its weights are damaged.
    """
    path = path.expanduser()
    for folder in (path, path / "export"):
        if (folder / "config.json").is_file():
            check_weights(folder)
            return folder
    if (path / "recipe.yaml").is_file():
        raise InputError(f"{path}: this run has exported nothing yet; finish it: nha-convert run {path} --resume")
    raise InputError(
        f"{path}: no checkpoint folder (no config.json in it); give the `export` folder of a run or what swap wrote"
    )


def require_run(folder: Path) -> None:
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}: no recipe.yaml, so this is no run folder; make one with `nha-convert run`")


def require_passed(verification: dict[str, Any], folder: Path) -> None:
    if not verification["passed"]:
        raise WorkError("\n".join(f"{folder}: {failure}" for failure in verification["failures"]))
