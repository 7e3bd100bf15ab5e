"""A base model's weights written to a swapped checkpoint: linked, copied, cut anew, or converted from pickles."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import split_state_dict_into_shards_factory

from ..errors import InputError
from ..files import shown
from .pickled_weights import PickledTensor, load_pickle, raw_bytes
from .shard_files import Move, copy_header, create_shard, move_tensors, tensor_bytes, write_tensor
from .weight_files import WEIGHTS, StoredTensor, refuse

PATTERN = "model-base{suffix}.safetensors"  # `model.safetensors` would be read in place of the index
Advance = Callable[[int], None]


def plan_shards(tensors: Mapping[str, Any], pattern: str, max_shard_size: str) -> dict[str, list[str]]:
    """Names of the tensors of each file, in the tensors' order.

    Args:
        tensors: described by `dtype` and `shape`.
        pattern: with `{suffix}` where the shard's number goes.
        max_shard_size: such as `2GB`; a larger tensor has a shard of its own.
    """
    plan = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: tensor_bytes(tensor.dtype, tensor.shape),
        filename_pattern=pattern,
        max_shard_size=max_shard_size,
    )
    return dict(plan.filename_to_tensors)


def check_shard_size(size: str | None) -> None:
    """Whether a size such as `2GB` can be read.

    Raises:
        InputError: it cannot, or is nothing.
    """
    if size is None:
        return
    try:
        plan_shards({}, PATTERN, size)
        positive = float(size.strip()[:-2]) > 0
    except (ValueError, OverflowError):
        positive = False
    if not positive:
        raise InputError(f"--max-shard-size {size}: give a number above 0 with KB, MB, GB or TB, such as 2GB")


def link_or_copy(tensors: Mapping[str, StoredTensor], work: Path, copy: bool, advance: Advance) -> list[str]:
    """Shards as they are, hard-linked where that is possible and `copy` does not forbid it.

    Returns:
        Names of the files written.
    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    names = {path: PATTERN.format(suffix="") if path.name == WEIGHTS else path.name for path in _files(tensors)}
    targets = {path: work / name for path, name in names.items()}
    linked = {path for path, target in targets.items() if not copy and _linked(path, target)}
    for path, target in targets.items():
        if path not in linked:
            starts = [tensor.start for tensor in tensors.values() if tensor.path == path]
            copy_header(path, target, min(starts))
    moves = [
        Move(name, tensor, None if tensor.path in linked else targets[tensor.path], tensor.start)
        for name, tensor in _in_file_order(tensors).items()
    ]
    _refuse_not_finite(move_tensors(moves, advance))
    return sorted(names.values())


def _linked(source: Path, target: Path) -> bool:
    try:
        os.link(source.resolve(), target)  # the Hub's cache holds links to blobs
    except OSError:  # another file system, or one without hard links
        return False
    return True


def cut_anew(tensors: Mapping[str, StoredTensor], work: Path, max_shard_size: str, advance: Advance) -> list[str]:
    """Shards of at most `max_shard_size`, filled from the old ones.

    Returns:
        Names of the files written.
    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    ordered = _in_file_order(tensors)
    plan = plan_shards(ordered, PATTERN, max_shard_size)
    moves = []
    for file, names in plan.items():
        places = create_shard(work / file, {name: (tensors[name].dtype, tensors[name].shape) for name in names})
        moves += [Move(name, tensors[name], work / file, places[name].start) for name in names]
    _refuse_not_finite(move_tensors(moves, advance))
    return sorted(plan)


def convert_pickles(
    tensors: Mapping[str, PickledTensor], work: Path, max_shard_size: str | None, advance: Advance
) -> list[str]:
    """Pickled tensors as safetensors, one shard of the source mapped at a time.

    Args:
        max_shard_size: None keeps the source's shards.
    Returns:
        Names of the files written.
    Raises:
        InputError: a tensor holds NaN or infinity.
    """
    sources = sorted({tensor.path for tensor in tensors.values()})
    if max_shard_size is not None:
        plan = plan_shards(tensors, PATTERN, max_shard_size)
    else:
        suffixes = [f"-{i:05d}-of-{len(sources):05d}" if len(sources) > 1 else "" for i in range(1, len(sources) + 1)]
        plan = {
            PATTERN.format(suffix=suffix): [name for name, tensor in tensors.items() if tensor.path == source]
            for source, suffix in zip(sources, suffixes)
        }
    places: dict[str, StoredTensor] = {}
    for file, names in plan.items():
        places |= create_shard(work / file, {name: (tensors[name].dtype, tensors[name].shape) for name in names})
    wrong = []
    for source in sources:
        content = load_pickle(source)
        for name in (name for name, tensor in tensors.items() if tensor.path == source):
            if not write_tensor(places[name], raw_bytes(content[name])):
                wrong.append(_not_finite(source, name))
            advance(places[name].end - places[name].start)
    refuse(wrong)
    return sorted(plan)


def _files(tensors: Mapping[str, StoredTensor]) -> list[Path]:
    return sorted({tensor.path for tensor in tensors.values()})


def _in_file_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    return dict(sorted(tensors.items(), key=lambda item: (item[1].path, item[1].start)))


def _refuse_not_finite(moves: list[Move]) -> None:
    refuse(_not_finite(move.tensor.path, move.name) for move in moves)


def _not_finite(path: Path, name: str) -> str:
    return f"{path}: {shown(name)} holds NaN or infinity; fetch it again, or name a model that is whole"
