"""Raw bytes of tensors in safetensors folders, for statements about bytes rather than values. Imports no torch."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 1 << 22


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor's bytes lie: dtype as safetensors names it, and [start, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    path: Path
    start: int
    end: int


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of a model folder by name; the index decides where there is one."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        headers = {name: _header(folder / name) for name in sorted(set(weight_map.values()))}
        return {tensor: headers[name][tensor] for tensor, name in weight_map.items()}
    return _header(folder / "model.safetensors")


def _header(path: Path) -> dict[str, StoredTensor]:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        header = json.loads(file.read(length))
    base = 8 + length
    return {
        name: StoredTensor(
            entry["dtype"],
            tuple(entry["shape"]),
            path,
            base + entry["data_offsets"][0],
            base + entry["data_offsets"][1],
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors agree in dtype, shape and every byte."""
    if (one.dtype, one.shape, one.end - one.start) != (other.dtype, other.shape, other.end - other.start):
        return False
    with one.path.open("rb") as first, other.path.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.end - one.start
        while left:
            size = min(left, _BLOCK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """sha256 of the named files."""
    hashes = {}
    for name in sorted(names):
        digest = hashlib.sha256()
        with (folder / name).open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
        hashes[name] = digest.hexdigest()
    return hashes
