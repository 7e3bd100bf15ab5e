"""Raw bytes of tensors in safetensors folders, for statements about bytes rather than values. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from .weight_files import StoredTensor

_BLOCK = 1 << 22


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
