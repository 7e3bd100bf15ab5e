"""Rows of whole documents from several sources in their shares."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch.utils.data import Dataset

from ..recall_documents import RecallGenerator
from .packing import PackedSource, random_numbers
from .windows import Stream, fingerprint, recall_item


class PackedDataset(Dataset):
    """Rows of T tokens of packed documents; item i depends on (seed, stage, i) alone.

    Each source goes through all its documents before any comes again, and draws another order then.

    Args:
        streams: (weight, tokens) per source; None as tokens draws a recall document, which fills its row.
        length: items.
        sequence_length: T.
        bos: id put in front of every document, or None.
        padding: id that fills a row's end; no loss falls on it.
        recall: makes the recall documents; needed where a stream is None.
        seed: anything with a fixed repr.
    Attributes:
        sources: the packed sources, None for recall.
        fingerprint: a digest of the text that the items are made of.
    """

    def __init__(
        self,
        streams: list[tuple[float, Stream]],
        *,
        length: int,
        sequence_length: int,
        bos: int | None,
        padding: int,
        recall: RecallGenerator | None,
        seed: object,
    ) -> None:
        self.length, self.sequence_length, self.seed, self.recall = length, sequence_length, seed, recall
        self.prefix = [] if bos is None else [bos]
        self.sources = [
            None
            if stream is None
            else PackedSource(
                stream,
                sequence_length=sequence_length,
                prefix=self.prefix if stream.bos else [],
                padding=padding,
                seed=(seed, place),
            )
            for place, (_, stream) in enumerate(streams)
        ]
        bounds = np.cumsum([weight for weight, _ in streams])
        drawn = random_numbers((seed, "sources"), length) * bounds[-1]
        self.turn = np.searchsorted(bounds[:-1], drawn, side="right")  # [length] whose row each item is
        self.number = np.zeros(length, np.int64)  # [length] and which of its rows
        for place in range(len(streams)):
            mine = self.turn == place
            self.number[mine] = np.arange(mine.sum())
        self.fingerprint = fingerprint(
            [stream for _, stream in streams], recall, bounds.tolist(), length, sequence_length, bos, padding, seed
        )

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` (-100 where there is no loss) and `position_ids`, all int64 [T]."""
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        source = self.sources[self.turn[index]]
        if source is not None:
            return source.item(int(self.number[index]))
        assert self.recall is not None
        rng = random.Random(f"{self.seed!r}/{index}")
        return recall_item(self.recall, self.prefix, self.sequence_length - len(self.prefix), rng)
