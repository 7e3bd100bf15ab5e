"""Tokenised documents on disk: one file of token ids, where each document starts, and which tokens have a loss.

    tokens.bin      int32, all documents one after the other
    starts.bin      int64 [documents + 1]
    labelled.bin    uint8 per token, 1 where it has a loss; absent where all have
    meta.json       counts; written last

Read by memory map: nothing is loaded that is not asked for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

BATCH = 16
"""Documents that are tokenised at a time; a stream is cut at a multiple of these."""


class TokenWriter:
    """Writes documents into a new folder; `close` makes it whole.

    Args:
        folder: is made.
        masked: documents come with masks of what has a loss.
    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, *, masked: bool) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.tokens = self.documents = self.labelled = 0
        self._tokens = (folder / "tokens.bin").open("wb")
        self._starts = (folder / "starts.bin").open("wb")
        self._labelled = (folder / "labelled.bin").open("wb") if masked else None
        self._starts.write(np.zeros(1, np.int64).tobytes())

    def add(self, ids: NDArray[np.int32], mask: NDArray[np.uint8] | None = None) -> None:
        """One document: int32 [n] and, where masked, uint8 [n]."""
        self.tokens += len(ids)
        self.documents += 1
        self._tokens.write(ids.astype("<i4").tobytes())
        self._starts.write(np.array([self.tokens], "<i8").tobytes())
        if self._labelled is not None:
            assert mask is not None and len(mask) == len(ids)
            self.labelled += int(mask.sum())
            self._labelled.write(mask.astype(np.uint8).tobytes())

    def close(self, about: dict[str, Any]) -> None:
        """Ends the files and writes meta.json, `about` included."""
        masked = self._labelled is not None
        for file in filter(None, (self._tokens, self._starts, self._labelled)):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        counts = {"tokens": self.tokens, "documents": self.documents}
        counts["labelled"] = self.labelled if masked else self.tokens
        (self.folder / "meta.json").write_text(json.dumps(counts | about), encoding="utf-8")

    def abandon(self) -> None:
        """Closes the files of a folder that is given up."""
        for file in filter(None, (self._tokens, self._starts, self._labelled)):
            with suppress(OSError):  # a full disk says so once more
                file.close()


class TokenStream(Sequence[int]):
    """The token ids of one split of a source, documents one after the other without special tokens.

    Travels to other processes as its path alone.

    Args:
        folder: what `TokenWriter` left.
        limit: read up to the batch of documents that reaches this many tokens.
    Attributes:
        starts: int64 [documents + 1], where each document starts; the last entry is the end.
        labelled: tokens of the whole folder that have a loss.
        bos: whether a document begins with the tokenizer's BOS, which is not stored.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        starts = np.asarray(np.memmap(folder / "starts.bin", "<i8", "r"))
        documents = meta["documents"]
        reached = int(np.searchsorted(starts, limit))  # documents whose end reaches the limit
        documents = min(documents, -(-reached // BATCH) * BATCH)
        self.starts: NDArray[np.int64] = starts[: documents + 1]
        self.labelled: int = meta["labelled"]
        self.bos: bool = meta["bos"]
        self._length = int(self.starts[-1])
        self._ids = self._map("tokens.bin", "<i4", meta["tokens"])
        self._mask = self._map("labelled.bin", np.uint8, meta["tokens"])

    def _map(self, name: str, dtype: Any, count: int) -> Any:
        if not (self.folder / name).is_file():
            return None
        # the plain view: slices of a memmap object take ten times as long
        return np.asarray(np.memmap(self.folder / name, dtype, "r")) if count else np.zeros(0, dtype)

    def __reduce__(self) -> Any:
        return TokenStream, (self.folder, self.limit)

    @property
    def digest(self) -> str:
        """What these tokens are: source, tokenizer and where the stream is cut."""
        return f"{self.folder.name.partition('-')[0]}/{self._length}"

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if isinstance(index, slice):
            return self.array(*index.indices(self._length)).tolist()
        if not -self._length <= index < self._length:
            raise IndexError(f"token {index} of {self._length}")
        return int(self._ids[index % self._length])

    def __iter__(self) -> Iterator[int]:
        for start in range(0, self._length, 1 << 16):
            yield from self[start : start + (1 << 16)]

    def array(self, start: int, end: int, step: int = 1) -> NDArray[np.int32]:
        """Token ids [start:end:step], a view of the file."""
        return self._ids[start:end:step]

    def mask(self, start: int, end: int) -> NDArray[np.bool_] | None:
        """Which of the tokens [start:end] have a loss; None where all have."""
        return None if self._mask is None else self._mask[start:end].astype(bool)


class Joined(Sequence[int]):
    """Sequences of token ids one after the other, none of them copied; read in slices."""

    def __init__(self, parts: Sequence[Sequence[int]]) -> None:
        self.parts = [part for part in parts if len(part)]
        self.ends = np.cumsum([len(part) for part in self.parts]).tolist()

    def __len__(self) -> int:
        return int(self.ends[-1]) if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        if not isinstance(index, slice):
            return self[range(len(self))[index] : range(len(self))[index] + 1][0]
        start, end, step = index.indices(len(self))
        ids: list[int] = []
        for part, last in zip(self.parts, self.ends):
            first = last - len(part)
            if first < end and start < last:
                ids += part[max(start - first, 0) : min(end - first, len(part))]
        return ids[::step]
