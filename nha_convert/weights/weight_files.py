"""Which tensors a model folder holds, and whether its files are what they say. Reads headers only; imports no torch.

Everything that a file claims is checked before it is used: a checkpoint may come from anybody.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import read_json_object, shown
from .config_check import layers_problem, shape_problem, size_problems

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
HEADER_LIMIT = 100_000_000
"""Bytes of a header or an index; safetensors itself reads no longer header."""
DTYPE_BITS = (
    dict.fromkeys(("F64", "I64", "U64", "C64"), 64)
    | dict.fromkeys(("F32", "I32", "U32"), 32)
    | dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
    | dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F8_E8M0"), 8)
    | {"F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}
)
_SHOWN_PROBLEMS = 10
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: dtype as safetensors names it, and [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


def check_weights(folder: Path) -> dict[str, StoredTensor]:
    """Compares the headers of a model folder's weights with its files, its index and its config.json.

    Returns:
        Every tensor by name.
    Raises:
        InputError: no safetensors, or something in them contradicts itself or the rest; one line per problem.
    """
    folder = Path(folder)
    config = checked_config(folder)
    tensors = stored_tensors(folder)
    compare_sizes(folder, config, tensors)
    return tensors


def checked_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json, its sizes such as a model can have.

    Raises:
        InputError: it cannot be read, or a size is none; one line per problem.
    """
    path = regular_file(folder, "config.json")
    config = read_json_object(path)
    refuse(size_problems(str(path), config))
    return config


def compare_sizes(folder: Path, config: dict[str, Any], tensors: Mapping[str, Any]) -> None:
    """Whether tensors (described by `shape`) have the layers and the embedding of a config.

    Raises:
        InputError: they do not.
    """
    found = [layers_problem(config, tensors)]
    found += [shape_problem(config, name, tensor.shape) for name, tensor in tensors.items()]
    refuse(f"{folder}: {shown(said)}; weights and config.json are of different models" for said in found if said)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name, from `model.safetensors` or the shards that the index names.

    Raises:
        InputError: as for `check_weights`.
    """
    if os.path.lexists(folder / WEIGHTS):  # read before an index, as transformers does
        return read_header(regular_file(folder, WEIGHTS))
    if not os.path.lexists(folder / INDEX):
        raise InputError(_no_weights(folder))
    weight_map = read_index(folder, INDEX)
    headers: dict[str, dict[str, StoredTensor]] = {}
    problems = []
    for shard in sorted(set(weight_map.values())):
        try:
            headers[shard] = read_header(regular_file(folder, shard, indexed=True))
        except InputError as error:
            problems.append(str(error))
    refuse(problems)
    refuse(index_problems(folder, weight_map, headers))
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def _no_weights(folder: Path) -> str:
    if only_pickles(folder):
        return (
            f"{folder}: holds no *.safetensors, only pickled weights ({PICKLES}), which may run code when they are "
            "read; convert them with `nha-convert swap MODEL OUT --allow-pickle`, which reads tensors alone, or save "
            "the model as safetensors first"
        )
    return (
        f"{folder}: holds no *.safetensors that can be read, neither {WEIGHTS} nor {INDEX}; save the model with "
        "save_pretrained first"
    )


def only_pickles(folder: Path) -> bool:
    """Whether a folder's weights are pickled, and there are no safetensors beside them."""
    there = [os.path.lexists(folder / name) for name in (WEIGHTS, INDEX, PICKLES, PICKLE_INDEX)]
    return any(there[2:]) and not any(there[:2])


def index_problems(folder: Path, weight_map: dict[str, str], shards: dict[str, Any]) -> list[str]:
    """What an index and its shards (each a collection of names) say against each other."""
    problems = [
        f"{folder / shard}: lacks {shown(name)}, which the index puts there; fetch it again"
        for name, shard in weight_map.items()
        if name not in shards[shard]
    ]
    for shard, names in shards.items():
        for name in names:
            if weight_map.get(name) != shard:
                where = f"puts into {weight_map[name]}" if name in weight_map else "does not list"
                problems.append(f"{folder / shard}: holds {shown(name)}, which the index {where}; fetch it again")
    return problems


def read_index(folder: Path, name: str) -> dict[str, str]:
    """Tensor name -> file name, from an index of shards; every file name is plain, without a folder.

    Raises:
        InputError: the index is no index, or names what is not a plain file name; one line per problem.
    """
    path = regular_file(folder, name)
    if path.stat().st_size > HEADER_LIMIT:
        raise InputError(f"{path}: {path.stat().st_size} bytes are no index of shards; at most {HEADER_LIMIT}")
    content = _parse(path, path.read_bytes(), "the index")
    weight_map = content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: is no index of shards: it has no `weight_map` object; fetch it again")
    ending = ".bin" if name == PICKLE_INDEX else ".safetensors"
    wrong: dict[str, str] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            wrong.setdefault(repr(shard), f"{path}: weight_map gives {shown(tensor)} the file {shown(repr(shard))}")
        elif not _is_plain(shard) or not shard.endswith(ending):
            wrong.setdefault(shard, f"{path}: weight_map gives {shown(tensor)} the file {shown(shard)}")
    refuse(f"{said}; the name of a *{ending} file beside the index is needed" for said in wrong.values())
    return weight_map


def _is_plain(name: str) -> bool:
    return not any(character in "/\\:" or not character.isprintable() for character in name) and len(name) < 250


def regular_file(folder: Path, name: str, *, indexed: bool = False) -> Path:
    """`folder / name`, made sure to be a file that lies there (or, in the Hub's cache, in the same repository).

    Raises:
        InputError: it is missing, not a regular file, or a link that leaves the folder.
    """
    path = folder / name
    if not os.path.lexists(path):
        raise InputError(f"{path}: is missing{', but the index names it' if indexed else ''}; fetch it again")
    home, end = folder.resolve(), Path(os.path.realpath(path))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (end.is_relative_to(home) or end.is_relative_to(blobs)):
        raise InputError(f"{path}: is a link that leaves the model's folder (to {end}); put the file itself there")
    if not end.exists():
        raise InputError(f"{path}: is a link to nothing ({end}); fetch it again")
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is {_KINDS.get(stat.S_IFMT(mode), 'no file')}, not a file; fetch the model again")
    return path


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Every tensor of a safetensors file, its header checked as safetensors itself does.

    Raises:
        InputError: the header is damaged, or does not describe the file; one line per problem.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise InputError(
                f"{path}: is truncated inside its header, or is no safetensors file ({size} bytes, of which the header "
                f"would take {length}); fetch it again"
            )
        if length > HEADER_LIMIT:
            raise InputError(f"{path}: its header has {length} bytes; at most {HEADER_LIMIT} are read")
        raw = file.read(length)
    if not raw.startswith(b"{"):
        raise InputError(f"{path}: its header is no JSON object; fetch it again")
    header = _parse(path, raw, "its header")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise InputError(f"{path}: __metadata__ in its header must map names to texts; fetch it again")
    refuse(f"{path}: {said}; fetch it again" for name, entry in header.items() if (said := _wrong_entry(name, entry)))
    base = 8 + length
    tensors = {
        name: StoredTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            base + entry["data_offsets"][0],
            base + entry["data_offsets"][1],
        )
        for name, entry in header.items()
    }
    refuse(f"{path}: {said}; fetch it again" for said in _layout_problems(tensors, base, size))
    return tensors


def _wrong_entry(name: str, entry: Any) -> str | None:
    """What is wrong with one tensor's entry in a header."""

    def counts(value: Any) -> bool:
        return isinstance(value, list) and all(type(one) is int and 0 <= one < 1 << 63 for one in value)

    name = shown(name)
    if not isinstance(entry, dict):
        return f"{name} is described by {type(entry).__name__}, not by an object"
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return f"{name} has the dtype {shown(str(dtype))}; known are {', '.join(DTYPE_BITS)}"
    if not counts(shape):
        return f"{name} has the shape {shown(str(shape))}; a list of counts is needed"
    if not counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:  # type: ignore[arg-type,index]
        return f"{name} has the data_offsets {shown(str(offsets))}; [start, end] from 0 on are needed"
    bits = math.prod(shape) * DTYPE_BITS[dtype]  # type: ignore[arg-type]
    if bits != 8 * (offsets[1] - offsets[0]):  # type: ignore[index]
        return f"{name}: {offsets[1] - offsets[0]} bytes, but {dtype} of shape {shape} takes {bits / 8:.0f}"  # type: ignore[index]
    return None


def _layout_problems(tensors: dict[str, StoredTensor], base: int, size: int) -> list[str]:
    """Whether the tensors fill a file from the header to its end, without gaps and each for itself."""
    at, before, problems = base, "the header", []
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start < at:
            problems.append(f"{shown(name)} overlaps {before} ({at - tensor.start} bytes)")
        elif tensor.start > at:
            problems.append(f"{tensor.start - at} bytes between {before} and {shown(name)} belong to no tensor")
        if tensor.end >= at:
            at, before = tensor.end, shown(name)
    if not problems and at != size:
        problems.append(f"is {'truncated' if size < at else 'too long'}: {size} bytes, its header says {at}")
    return problems


def _parse(path: Path, raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise InputError(f"{path}: {what} has {shown(twice)} twice; fetch it again")
        return found

    try:
        content = json.loads(raw, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {what} is not JSON ({shown(str(error))}); fetch it again") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: {what} is a JSON {type(content).__name__}, not an object; fetch it again")
    return content


def refuse(problems: Iterable[str]) -> None:
    """Raises one InputError with a line for each problem, if there are any."""
    found = list(problems)
    if len(found) > _SHOWN_PROBLEMS:
        found[_SHOWN_PROBLEMS:] = [f"{found[0].split(': ')[0]}: and {len(found) - _SHOWN_PROBLEMS} more problems"]
    if found:
        raise InputError("\n".join(found))
