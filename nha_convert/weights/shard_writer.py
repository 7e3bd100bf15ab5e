"""Writes the shards of an export from tensors in memory and from tensors that lie in other files, one at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from ..errors import WorkError
from .base_shards import plan_shards
from .shard_files import Move, create_shard, move_tensors, tensor_bytes, write_tensor
from .weight_files import INDEX, StoredTensor

PATTERN = "model{suffix}.safetensors"


@dataclass(frozen=True)
class NewTensor:
    """A tensor that no file holds yet: dtype as safetensors names it, and what gives its bytes."""

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], memoryview]


def write_shards(
    folder: Path, tensors: Mapping[str, StoredTensor | NewTensor], max_shard_size: str, *, quiet: bool = False
) -> None:
    """Write `model*.safetensors`, with an index where there is more than one.

    Args:
        max_shard_size: such as `5GB`; a larger tensor gets a shard of its own.
        quiet: no progress bar.
    Raises:
        WorkError: a tensor holds NaN or infinity.
    """
    plan = plan_shards(dict(sorted(tensors.items())), PATTERN, max_shard_size)
    sizes = {name: tensor_bytes(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    wrong: list[str] = []
    with Progress(console=Console(stderr=True), disable=quiet or not sys.stderr.isatty()) as progress:
        bar = progress.add_task("weights", total=sum(sizes.values()))

        def advance(done: int) -> None:
            progress.advance(bar, done)

        for shard, names in plan.items():
            wrong += _write_shard(folder / shard, {name: tensors[name] for name in names}, advance)
    if wrong:
        raise WorkError(
            f"{len(wrong)} tensors hold NaN or infinity ({', '.join(sorted(wrong)[:3])}), so nothing was written; "
            "look at the losses of the run that made them"
        )
    if len(plan) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted((name, shard) for shard, names in plan.items() for name in names)),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path, tensors: Mapping[str, StoredTensor | NewTensor], advance: Callable[[int], None]
) -> list[str]:
    """Write one file; names of the tensors that are not finite."""
    places = create_shard(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()})
    wrong, moves = [], []
    for name, tensor in tensors.items():
        if isinstance(tensor, StoredTensor):
            moves.append(Move(name, tensor, path, places[name].start))
            continue
        data = tensor.read()
        if not write_tensor(places[name], data):
            wrong.append(name)
        advance(len(data))
    return wrong + [move.name for move in move_tensors(moves, advance)]
