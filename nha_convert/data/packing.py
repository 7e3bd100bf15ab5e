"""Whole documents in rows of T tokens: none crosses a row, and none sees another (`position_ids` start anew)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .token_file import TokenStream

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Packing:
    """Which pieces of which documents stand in which row.

    Attributes:
        document, start, length: int64 [pieces], row after row: a document's number, the piece's first token in it
            and how many tokens.
        bounds: int64 [rows + 1], where each row's pieces begin.
    """

    document: Counts
    start: Counts
    length: Counts
    bounds: Counts

    @property
    def rows(self) -> int:
        return len(self.bounds) - 1


def random_numbers(seed: object, count: int) -> NDArray[np.float64]:
    """`count` numbers in [0, 1), the same for the same seed on every machine.

    Args:
        seed: anything with a fixed repr.
    """
    digest = hashlib.sha256(repr(seed).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big"))).random(count)


def pack(lengths: Counts, size: int, extra: int, seed: object) -> Packing:
    """Best fit of the longest first: each piece goes into the fullest row that still holds it.

    A document longer than a row is cut into full rows and a rest, which is packed as a short document is.

    Args:
        lengths: int64 [documents], tokens of each; those without any are left out.
        size: T, tokens of a row.
        extra: tokens that stand in front of each piece (BOS), and count.
        seed: draws the order of documents of the same length.
    Returns:
        Every token of every document exactly once.
    """
    room = size - extra
    pieces = -(-lengths // room)
    document = np.repeat(np.arange(len(lengths)), pieces)
    start = (np.arange(len(document)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * room
    length = np.minimum(lengths[document] - start, room)
    full = length == room
    row = np.zeros(len(document), np.int64)
    row[full] = np.arange(full.sum())
    short = np.flatnonzero(~full)
    short = short[np.lexsort((random_numbers((seed, "packing"), len(short)), -length[short]))]
    row[short] = full.sum() + _best_fit((length[short] + extra).tolist(), size)
    order = np.lexsort((start, document, row))
    rows = int(row.max()) + 1 if len(row) else 0
    bounds = np.searchsorted(row[order], np.arange(rows + 1))
    return Packing(document[order], start[order], length[order], bounds)


def _best_fit(lengths: list[int], size: int) -> Counts:
    """The row of each length, which come longest first: always the row with the least sufficient room."""
    open_rows: list[list[int]] = [[] for _ in range(size + 1)]  # rows by their room
    rooms = 0  # bit r: some row has room r
    placed, rows = np.empty(len(lengths), np.int64), 0
    for index, length in enumerate(lengths):
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[room].pop()
            if not open_rows[room]:
                rooms ^= 1 << room
        else:
            room, row, rows = size, rows, rows + 1
        placed[index] = row
        open_rows[room - length].append(row)
        rooms |= 1 << (room - length)
    return placed


def row_order(packing: Packing, seed: object) -> Counts:
    """A shuffled order of the rows in which the pieces of a cut document keep theirs.

    Returns:
        int64 [rows]: the row at each place.
    """
    key = random_numbers(seed, packing.rows)
    row = np.repeat(np.arange(packing.rows), np.diff(packing.bounds))
    after = np.flatnonzero(packing.start > 0)
    last = np.full(int(packing.document.max(initial=-1)) + 1, -1)  # the rest of each cut document: its last piece
    np.maximum.at(last, packing.document[after], packing.start[after])
    cut = last[packing.document] > 0
    is_last = cut & (packing.start == last[packing.document])
    limit = np.ones(len(last))
    limit[packing.document[is_last]] = key[row[is_last]]
    earlier = np.flatnonzero(cut & ~is_last)  # all pieces but the last fill a row
    earlier = earlier[np.lexsort((packing.start[earlier], packing.document[earlier]))]
    drawn = random_numbers((seed, "pieces"), len(earlier)) * limit[packing.document[earlier]]
    key[row[earlier]] = drawn[np.lexsort((drawn, packing.document[earlier]))]
    return np.argsort(key, kind="stable")


class PackedSource:
    """The rows of one source, epoch after epoch, each epoch in an order of its own.

    Args:
        stream: the documents.
        sequence_length: T.
        prefix: token ids in front of each piece: BOS, or nothing.
        padding: the token that fills a row's end.
        seed: of the packing and of all orders.
    """

    def __init__(
        self, stream: TokenStream, *, sequence_length: int, prefix: list[int], padding: int, seed: object
    ) -> None:
        self.stream, self.sequence_length, self.prefix, self.padding = stream, sequence_length, prefix, padding
        self.seed = seed
        self.packing = pack(np.diff(stream.starts), sequence_length, len(prefix), seed)
        self._order: tuple[int, Counts] = (-1, np.zeros(0, np.int64))

    def __len__(self) -> int:
        """Rows of an epoch."""
        return self.packing.rows

    def pieces(self, number: int) -> list[tuple[int, int, int]]:
        """(document, first token in it, tokens) of all pieces of row `number`, counted over all epochs."""
        epoch, place = divmod(number, len(self))
        if self._order[0] != epoch:
            self._order = epoch, row_order(self.packing, (self.seed, epoch))
        row = int(self._order[1][place])
        at = slice(int(self.packing.bounds[row]), int(self.packing.bounds[row + 1]))
        packing = self.packing
        return list(zip(packing.document[at].tolist(), packing.start[at].tolist(), packing.length[at].tolist()))

    def item(self, number: int) -> dict[str, torch.Tensor]:
        """Row `number`: `input_ids`, `labels` and `position_ids`, int64 [T].

        No loss falls on the first token of a piece (another document stands before it) and on padding, which is a
        document of its own at the row's end.
        """
        size, extra = self.sequence_length, len(self.prefix)
        ids = np.full(size, self.padding, np.int64)
        labels = np.full(size, -100, np.int64)
        positions = np.zeros(size, np.int64)
        end = 0
        for document, start, length in self.pieces(number):
            first, begin = int(self.stream.starts[document]) + start, end
            text, end = begin + extra, begin + extra + length
            ids[begin:text], ids[text:end] = self.prefix, self.stream.array(first, first + length)
            mask = self.stream.mask(first, first + length)
            labels[text:end] = ids[text:end] if mask is None else np.where(mask, ids[text:end], -100)
            labels[begin] = -100
            positions[begin:end] = np.arange(end - begin)
        positions[end:] = np.arange(size - end)
        item = {"input_ids": ids, "labels": labels, "position_ids": positions}
        return {name: torch.from_numpy(values) for name, values in item.items()}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_order": (-1, np.zeros(0, np.int64))}  # is drawn again where it is needed
