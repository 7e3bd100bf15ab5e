"""Windows of T tokens from random places of the sources' streams of text."""

from __future__ import annotations

import hashlib
import random
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch.utils.data import Dataset

from ..recall_documents import RecallGenerator
from .token_file import TokenStream

Stream = TokenStream | None
"""A source's tokens; None makes recall documents."""


def fingerprint(streams: Sequence[Stream], recall: RecallGenerator | None, *settings: object) -> str:
    """A digest of the text behind a stage's items, for whoever resumes: other text, another digest."""
    made = f"recall, far {recall.far}" if recall is not None and recall.far else "recall"
    parts = [made if stream is None else stream.digest for stream in streams]
    return hashlib.sha256(repr((parts, settings)).encode()).hexdigest()[:16]


class WindowDataset(Dataset):
    """Windows of T tokens, BOS first where the tokenizer has one; item i depends on (seed, stage, i) alone.

    Args:
        streams: (weight, tokens) per source; None as tokens draws a recall document.
        length: items.
        sequence_length: T.
        bos: id put in front of every window, or None.
        recall: makes the recall documents; needed where a stream is None.
        seed: anything with a fixed repr; drawn from together with the item's number.
    Attributes:
        fingerprint: a digest of the text that the items are made of.
    """

    def __init__(
        self,
        streams: list[tuple[float, Stream]],
        *,
        length: int,
        sequence_length: int,
        bos: int | None,
        recall: RecallGenerator | None,
        seed: object,
    ) -> None:
        self.streams = [stream for _, stream in streams]
        self.bounds = list(accumulate(weight for weight, _ in streams))
        self.length, self.sequence_length, self.seed = length, sequence_length, seed
        self.prefix = [] if bos is None else [bos]
        self.recall = recall
        self.fingerprint = fingerprint(self.streams, recall, self.bounds, length, sequence_length, bos, seed)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` (-100 where there is no loss) and `position_ids`, all int64 [T]."""
        if not 0 <= index < self.length:
            raise IndexError(f"item {index} of {self.length}")
        rng = random.Random(f"{self.seed!r}/{index}")
        stream = self.streams[bisect(self.bounds[:-1], rng.random() * self.bounds[-1])]
        count = self.sequence_length - len(self.prefix)
        if stream is None:
            assert self.recall is not None
            return recall_item(self.recall, self.prefix, count, rng)
        start = rng.randrange(len(stream) - count + 1)
        item = one_document(self.prefix + stream[start : start + count])
        mask = stream.mask(start, start + count)
        if mask is not None:
            item["labels"][len(self.prefix) :][~torch.from_numpy(mask)] = -100
            item["labels"][: len(self.prefix)] = -100
        return item


def recall_item(recall: RecallGenerator, prefix: list[int], count: int, rng: random.Random) -> dict[str, torch.Tensor]:
    """A row that is one recall document of `count` tokens behind `prefix`."""
    recall.rng = rng
    return one_document(prefix + recall.document(count).input_ids)


def one_document(ids: list[int]) -> dict[str, torch.Tensor]:
    """A row of T tokens that is one document, with loss everywhere."""
    input_ids = torch.tensor(ids, dtype=torch.long)  # [T]
    return {"input_ids": input_ids, "labels": input_ids.clone(), "position_ids": torch.arange(len(ids))}
