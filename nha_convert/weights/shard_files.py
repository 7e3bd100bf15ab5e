"""Safetensors files written piece by piece, and tensors moved from file to file without loading a shard.

Every byte that is moved is looked at on the way: a tensor with NaN or infinity is named.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from .finite import all_finite
from .weight_files import DTYPE_BITS, StoredTensor

BLOCK = 1 << 20
"""Bytes read, looked at and written at once; small enough to stay in a core's cache."""
_PART = 1 << 26
"""Bytes of one job of a thread, so that a large embedding is shared."""


@dataclass(frozen=True)
class Move:
    """A tensor to read, and where its bytes go: the start of its place in `target`, or nowhere (it is only read)."""

    name: str
    tensor: StoredTensor
    target: Path | None = None
    start: int = 0

    @property
    def size(self) -> int:
        return self.tensor.end - self.tensor.start


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def create_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, StoredTensor]:
    """Write the header of a safetensors file, and give the file its final size.

    Args:
        tensors: (dtype, shape) by name. Wider dtypes come first, so that each tensor is aligned.
    Returns:
        The place of every tensor, still to be filled.
    """
    spans, at = {}, 0
    for name in sorted(tensors, key=lambda name: -DTYPE_BITS[tensors[name][0]]):
        dtype, shape = tensors[name]
        spans[name] = (at, at := at + tensor_bytes(dtype, shape))
    header = {"__metadata__": {"format": "pt"}} | {
        name: {"dtype": tensors[name][0], "shape": list(tensors[name][1]), "data_offsets": span}
        for name, span in spans.items()
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    base = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(base + at)
    return {
        name: StoredTensor(*tensors[name], path, base + start, base + end) for name, (start, end) in spans.items()
    }


def write_tensor(place: StoredTensor, data: memoryview) -> bool:
    """Fill a tensor's place; whether its values are all finite."""
    finite = True
    with place.path.open("r+b", buffering=0) as file:
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            finite = all_finite(block, place.dtype) and finite
            _write_at(file.fileno(), block, place.start + start)
    return finite


def copy_header(source: Path, target: Path, first: int) -> None:
    """Start a copy of a safetensors file: its first bytes, up to the first tensor, and its size."""
    with source.open("rb") as file, target.open("wb") as copy:
        copy.write(file.read(first))
        copy.truncate(source.stat().st_size)


def move_tensors(moves: Iterable[Move], advance: Callable[[int], None], *, threads: int = 2) -> list[Move]:
    """Read every tensor, write it where it is to go, and look at its values.

    Args:
        advance: called with the number of bytes done, as they are done.
    Returns:
        The moves whose tensor holds NaN or infinity, in their order.
    """
    moves, stop, wrong = list(moves), threading.Event(), set()
    with ThreadPoolExecutor(threads) as pool:
        jobs = [pool.submit(_move_part, move, *part, stop) for move in moves for part in _parts(move)]
        try:
            for job in as_completed(jobs):
                move, done, finite = job.result()
                advance(done)
                if not finite:
                    wrong.add(move)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return [move for move in moves if move in wrong]


def _parts(move: Move) -> Iterator[tuple[int, int]]:
    for start in range(0, move.size, _PART):
        yield start, min(start + _PART, move.size)


def _move_part(move: Move, start: int, end: int, stop: threading.Event) -> tuple[Move, int, bool]:
    finite, buffer = True, memoryview(bytearray(min(BLOCK, end - start)))
    target = None if move.target is None else os.open(move.target, os.O_WRONLY)
    try:
        with move.tensor.path.open("rb", buffering=0) as file:
            file.seek(move.tensor.start + start)
            for at in range(start, end, BLOCK):
                if stop.is_set():
                    break
                block = buffer[: min(BLOCK, end - at)]
                _read_into(file.fileno(), block, move.tensor)
                finite = all_finite(block, move.tensor.dtype) and finite
                if target is not None:
                    _write_at(target, block, move.start + at)
    finally:
        if target is not None:
            os.close(target)
    return move, end - start, finite


def _read_into(file: int, block: memoryview, tensor: StoredTensor) -> None:
    done = 0
    while done < len(block):
        count = os.readv(file, [block[done:]])
        if not count:
            raise OSError(f"{tensor.path} became shorter while it was read")
        done += count


def _write_at(file: int, block: memoryview, at: int) -> None:
    done = 0
    while done < len(block):
        done += os.pwrite(file, block[done:], at + done)
