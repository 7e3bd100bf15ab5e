"""Which rows each process trains on, and when: the same rows in the same step however many processes there are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import InputError

ITEM = "item"
"""The column that says which item of the dataset a row is."""


@dataclass(frozen=True)
class BatchPlan:
    """How the rows of one optimizer step are cut.

    Row r of step s is item `s * rows + r` of the dataset. Ranks take neighbouring pieces, and each cuts its piece
    into micro-batches; sizes differ by one row at most.

    Attributes:
        rows: of a step, over all ranks.
        ranks: processes.
        accumulation: micro-batches per step and rank.
    """

    rows: int
    ranks: int
    accumulation: int

    def pieces(self, step: int, rank: int) -> list[list[int]]:
        """The items of each micro-batch of a rank in a step."""
        count = self.ranks * self.accumulation
        edges = [step * self.rows + index * self.rows // count for index in range(count + 1)]
        own = range(rank * self.accumulation, (rank + 1) * self.accumulation)
        return [list(range(edges[index], edges[index + 1])) for index in own]


def plan_batches(rows: int, ranks: int, micro_batch: int | None, where: str = "stages") -> BatchPlan:
    """The plan with the fewest micro-batches of at most `micro_batch` rows.

    Args:
        rows: rows of a step.
        where: the stage's key in messages.
    Raises:
        InputError: a micro-batch would be without rows.
    """
    accumulation = -(-rows // (ranks * (micro_batch or rows)))
    if rows < ranks * accumulation:
        fitting = ranks * accumulation
        raise InputError(
            f"{where}.batch_size: {rows} rows cannot be dealt out to {ranks} processes with runtime.micro_batch = "
            f"{micro_batch or 'all'}; set batch_size to at least {fitting}, raise runtime.micro_batch, or use fewer "
            "processes"
        )
    return BatchPlan(rows, ranks, accumulation)


class RankBatches(Sampler[list[int]]):
    """The micro-batches of one rank over all steps of a stage, in order."""

    def __init__(self, plan: BatchPlan, rank: int, steps: int) -> None:
        self.plan, self.rank, self.steps = plan, rank, steps

    def __len__(self) -> int:
        return self.steps * self.plan.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            yield from self.plan.pieces(step, self.rank)


class Numbered(Dataset):
    """A dataset whose items know their number."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**self.dataset[index], ITEM: torch.tensor(index)}


def batch_loader(dataset: Any, plan: BatchPlan, rank: int, steps: int, *, pin: bool) -> DataLoader:
    """Batches of one rank: the dataset's columns stacked to [rows, T], and `item` [rows]; draws no random number."""
    return DataLoader(
        Numbered(dataset),
        batch_sampler=RankBatches(plan, rank, steps),
        pin_memory=pin,
        generator=torch.Generator(),
    )
