"""What a stage keeps on disk: trained tensors only, complete or not at all.

A checkpoint is written beside, as `.checkpoint-N.partial`, gets its COMPLETE marker last and is then renamed.
Whatever lacks the marker does not count.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import WorkError

COMPLETE = "COMPLETE"
TRAINED = "trained.safetensors"


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that learn, by name, on the CPU."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file beside and renames it."""
    beside = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


def load_tensors(model: nn.Module, path: Path) -> None:
    """Copies a file's tensors into the parameters of the same names.

    Raises:
        WorkError: the file is damaged, or has a tensor that the model lacks or holds in another shape.
    """
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            names = list(file.keys())
            for name in names:
                tensor = file.get_tensor(name)
                if name not in parameters or parameters[name].shape != tensor.shape:
                    found = list(parameters[name].shape) if name in parameters else "none"
                    raise WorkError(f"{path}: {name} has shape {list(tensor.shape)}, the model's has {found}")
                parameters[name].copy_(tensor)
    except SafetensorError as error:
        raise WorkError(f"{path}: damaged ({error}); remove {path.parent} and run the stage again") from error


def latest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The furthest complete checkpoint of a stage's folder, and what its marker says."""
    found = []
    for path in folder.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / COMPLETE).is_file():
            found.append((int(match[1]), path))
    if not found:
        return None
    path = max(found)[1]
    return path, json.loads((path / COMPLETE).read_text(encoding="utf-8"))


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty folder for the files of step `step`."""
    partial = folder / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(partial: Path, marker: dict[str, Any]) -> Path:
    """Marks the files complete, gives the folder its name and removes the checkpoints before it."""
    (partial / COMPLETE).write_text(json.dumps(marker) + "\n", encoding="utf-8")
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    remove_checkpoints(partial.parent, keep=final)
    return final


def remove_checkpoints(folder: Path, keep: Path | None = None) -> None:
    """Removes checkpoints, whole or partial, except one."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.partial")]:
        if path != keep:
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed folder does not count
            shutil.rmtree(path, ignore_errors=True)
