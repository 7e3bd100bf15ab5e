"""Weights in `pytorch_model*.bin`, read as tensors alone: whatever else a pickle asks for is refused, not run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..files import shown
from .weight_files import PICKLE_INDEX, PICKLES, index_problems, read_index, refuse, regular_file

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class PickledTensor:
    """A tensor in a pickle: dtype as safetensors names it, and the bytes of its shard that it is made of."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    storage: tuple[Any, ...]
    """Equal for two tensors of a shard that are the same memory, as tied weights are."""


def pickled_tensors(folder: Path) -> dict[str, PickledTensor]:
    """Every tensor of a model folder with pickled weights, one shard mapped at a time.

    Raises:
        InputError: a shard is damaged, missing, holds more than tensors or contradicts the index.
    """
    if (folder / PICKLES).exists():
        return _described(regular_file(folder, PICKLES))
    weight_map = read_index(folder, PICKLE_INDEX)
    shards = {
        name: _described(regular_file(folder, name, indexed=True)) for name in sorted(set(weight_map.values()))
    }
    refuse(index_problems(folder, weight_map, shards))
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _described(path: Path) -> dict[str, PickledTensor]:
    return {
        name: PickledTensor(
            DTYPES[tensor.dtype],
            tuple(tensor.shape),
            path,
            (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride()),
        )
        for name, tensor in load_pickle(path).items()
    }


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one pickled shard, memory-mapped where the file's format allows it.

    Raises:
        InputError: it is damaged, asks for something other than tensors, or holds something else.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pickle's protocol: what cannot be read is said below
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"asks for {shown(asked[1])}" if asked else "asks for more than tensors, or is damaged"
        raise InputError(f"{path}: {what}; nothing of it was run, save the model as safetensors") from error
    except Exception as error:  # a damaged archive raises many unrelated classes
        raise InputError(f"{path}: cannot be read as pickled tensors ({_line(error)}); fetch it again") from error
    if not isinstance(content, dict) or not content:
        raise InputError(f"{path}: holds {type(content).__name__}, not tensors by name; save the model anew")
    refuse(f"{path}: {said}; save the model as safetensors" for said in map(_wrong, content.items()) if said)
    return content


def _wrong(entry: tuple[Any, Any]) -> str | None:
    name, tensor = shown(str(entry[0])), entry[1]
    if not isinstance(entry[0], str) or not isinstance(tensor, torch.Tensor):
        return f"{name} is {type(tensor).__name__}, not a tensor"
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.dtype not in DTYPES:
        return f"{name} is a tensor of {tensor.dtype} and {tensor.layout}, which cannot be converted"
    return None


def _line(error: Exception) -> str:
    return shown((str(error).strip() or type(error).__name__).splitlines()[0])


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row order; its own memory where that is contiguous."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data
