"""What a stage keeps on disk: trained tensors only, whole or not at all.

A checkpoint is written beside, as `.checkpoint-N.partial`, gets its COMPLETE marker last and is then renamed. The
marker holds size and checksum of every file, so that a checkpoint which was torn later (a full disk, a lost cache)
is seen; the one before it is kept for that case.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..errors import InputError, WorkError
from .engine import copy_whole

COMPLETE = "COMPLETE"
TRAINED = "trained.safetensors"
KEPT = 2
"""Checkpoints of a stage that stay on disk: the last, and the one to fall back on."""


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters that learn, by name; shards where the model is sharded."""
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes a safetensors file beside and renames it."""
    beside = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, beside)
    os.replace(beside, path)


def load_tensors(model: nn.Module, path: Path) -> None:
    """Copies a file's tensors into the parameters of the same names, whole or sharded.

    Raises:
        WorkError: the file is damaged, or has a tensor that the model lacks or holds in another shape.
    """
    parameters = dict(model.named_parameters())
    try:
        with safe_open(path, "pt") as file, torch.no_grad():
            for name in file.keys():  # noqa: SIM118  (not a mapping)
                tensor = file.get_tensor(name)
                if name not in parameters or parameters[name].shape != tensor.shape:
                    found = list(parameters[name].shape) if name in parameters else "none"
                    raise WorkError(f"{path}: {name} has shape {list(tensor.shape)}, the model's has {found}")
                copy_whole(parameters[name], tensor)
    except SafetensorError as error:
        raise WorkError(f"{path}: damaged ({error}); remove {path.parent} and run the stage again") from error


def load_plain(path: Path) -> Any:
    """Reads tensors, numbers and containers of them from a file of `torch.save`; nothing in it is run.

    Raises:
        InputError: it holds something else, as a file that others made may.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path}: holds more than tensors and numbers, so this version of nha-convert did not write it, and it was "
            f"not read; remove {path.parent} to go on from the checkpoint before it"
        ) from error


def _checksum(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    size = crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _damage(path: Path) -> tuple[dict[str, Any], str]:
    """A checkpoint's marker, and what is wrong with its files; empty where nothing is."""
    if not (path / COMPLETE).is_file():
        return {}, f"no {COMPLETE} marker"
    try:
        marker = read_marker(path)
        files = marker["files"]
    except (ValueError, KeyError, TypeError):
        return {}, f"{COMPLETE} is damaged"
    for name, (size, crc) in files.items():
        if not (path / name).is_file():
            return marker, f"{name} is missing"
        if (path / name).stat().st_size != size:
            return marker, f"{name} has {(path / name).stat().st_size} bytes, {size} were written"
        if _checksum(path / name) != [size, crc]:
            return marker, f"{name} has other content than was written"
    return marker, ""


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """What a whole checkpoint says of itself: step, identity, text, ranks, files."""
    marker: dict[str, Any] = json.loads((checkpoint / COMPLETE).read_text(encoding="utf-8"))
    return marker


def latest_checkpoint(folder: Path) -> tuple[tuple[Path, dict[str, Any]] | None, list[str]]:
    """The furthest whole checkpoint of a stage's folder.

    Returns:
        Its folder and what its marker says, or None; and a line for every torn one that stands after it.
    """
    places = [(int(match[1]), path) for path in folder.glob("checkpoint-*") if (match := _named(path))]
    torn: list[str] = []
    for _, path in sorted(places, reverse=True):
        marker, damage = _damage(path)
        if not damage:
            return (path, marker), torn
        torn.append(f"{path}: torn ({damage}), left out")
    return None, torn


def _named(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty folder for the files of step `step`."""
    partial = folder / f".checkpoint-{step}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def finish_checkpoint(partial: Path, marker: dict[str, Any]) -> Path:
    """Marks the files whole, gives the folder its name and removes all checkpoints but it and the one before."""
    files = sorted(path for path in partial.iterdir() if path.is_file())
    for path in files:
        _to_disk(path)
    sums = {path.name: _checksum(path) for path in files}
    (partial / COMPLETE).write_text(json.dumps({**marker, "files": sums}) + "\n", encoding="utf-8")
    _to_disk(partial / COMPLETE)
    final = partial.with_name(partial.name.removeprefix(".").removesuffix(".partial"))
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)
    there = sorted((path for path in partial.parent.glob("checkpoint-*") if _named(path)), key=_step)
    before = [path for path in there if _step(path) < _step(final) and (path / COMPLETE).is_file()]
    remove_checkpoints(partial.parent, keep=[*before[1 - KEPT :], final])
    return final


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _to_disk(path: Path) -> None:
    """Waits until a file's content has left the system's cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def remove_checkpoints(folder: Path, keep: list[Path] | None = None) -> None:
    """Removes checkpoints, whole or partial, except some."""
    for path in [*folder.glob("checkpoint-*"), *folder.glob(".checkpoint-*.partial")]:
        if path not in (keep or []):
            (path / COMPLETE).unlink(missing_ok=True)  # first, so that a half-removed folder does not count
            shutil.rmtree(path, ignore_errors=True)
