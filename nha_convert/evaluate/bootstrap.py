"""Confidence intervals by drawing documents anew: what another sample of as much text would have measured.

A document is one evaluation window: what the model reads as one context, and so what is independent of the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DRAWS = 1000
CONFIDENCE = 0.95


def bootstrap_interval(
    statistic: Callable[..., Tensor], columns: Sequence[Tensor], *, seed: int = 0, draws: int = DRAWS
) -> list[float] | None:
    """Percentile interval of a function of sums over documents; documents are drawn whole, with replacement.

    Args:
        statistic: as many tensors [draws] as there are columns, each the column's sum over the drawn documents, to the
            statistic [draws].
        columns: sums within each document, each [N]. A draw takes the same documents in all of them, so differences
            between models that read the same text are paired.
    Returns:
        [low, high] of the central 95 %; None for fewer than two documents, or where a draw leaves the statistic
        undefined (nan).
    Source: B. Efron, Bootstrap methods: another look at the jackknife (1979).
    """
    count = len(columns[0])
    if count < 2:
        return None
    picks = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))  # [draws,N]
    values = statistic(*(column.double()[picks].sum(1) for column in columns))
    if values.isnan().any():
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = values.quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return [low, high]


def recovery_of_sums(student: Tensor, teacher: Tensor, window: Tensor, tokens: Tensor) -> Tensor:
    """`table.memory_recovery` of summed NLLs, nan where the window alone is as good as the teacher; all [draws]."""
    worth = (window - teacher) / tokens
    return torch.where(worth > 1e-6, 1 - (student - teacher) / tokens / worth, torch.nan)


def mean_of_sums(total: Tensor, count: Tensor) -> Tensor:
    """Mean per token."""
    return total / count


def gap_of_sums(one: Tensor, other: Tensor, count: Tensor) -> Tensor:
    """Mean per token of `one` - `other`."""
    return (one - other) / count
