"""Hidden states of many rows in a file, so that one layer after the other can go over them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import TracebackType

import numpy as np
import torch

from ..errors import InputError

NAME = ".hidden_states"


class HiddenCache:
    """Rows of hidden states [T, hidden], written and read anywhere; the file is gone on leaving the context.

    Plain reads and writes: what is not asked for takes no memory of this process.

    Args:
        folder: where the file is made.
        rows: how many there are.
        shape: (T, hidden) of a row.
        dtype: of the states.
    Raises:
        InputError: there is too little space.
    """

    def __init__(self, folder: Path, rows: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = Path(folder) / NAME, shape, dtype
        self.row_bytes = shape[0] * shape[1] * dtype.itemsize
        self.path.unlink(missing_ok=True)  # of a killed process
        size, free = rows * self.row_bytes, shutil.disk_usage(folder).free
        if size > free:
            raise InputError(
                f"{folder}: hidden states of {rows * shape[0]} tokens take {size / 1e9:.1f} GB, {free / 1e9:.1f} GB "
                "are free there; lower runtime.cached_tokens, or make room"
            )

    def __enter__(self) -> HiddenCache:
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def write(self, first: int, states: torch.Tensor) -> None:
        """Puts [B, T, hidden] into rows `first` to `first + B - 1`.

        Raises:
            OSError: no space left, although there was.
        """
        data = states.detach().to("cpu", self.dtype).contiguous().view(torch.uint8).numpy().data.cast("B")
        done = 0
        while done < len(data):
            done += os.pwrite(self._file, data[done:], first * self.row_bytes + done)

    def read(self, first: int, count: int) -> torch.Tensor:
        """Rows `first` to `first + count - 1`: [count, T, hidden] on the CPU."""
        buffer = np.empty(count * self.row_bytes, np.uint8)
        view, done = buffer.data, 0
        while done < len(view):
            done += os.preadv(self._file, [view[done:]], first * self.row_bytes + done)
        return torch.from_numpy(buffer).view(self.dtype).view(count, *self.shape)
