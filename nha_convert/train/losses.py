"""The parts that losses are made of, each a sum over tokens or rows, so that parts of a batch add up to its whole.

B batch, T time, N predicted tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .fused_losses import can_fuse, fused_sums

IGNORE = -100
CHUNK = 1 << 25
"""Logits of one model that are alive at once; where N * V is larger, the head is run again in the backward pass."""

Batch = Mapping[str, torch.Tensor]
"""input_ids, labels and position_ids, each int64 [B, T]."""


def shifted_targets(batch: Batch) -> torch.Tensor:
    """What each token is to predict.

    Args:
        batch: labels are the text itself, -100 where there is no loss; a step of position_ids other than 1 starts a
            new document.
    Returns:
        int64 [B, T]; -100 where the next token has no label or belongs to another document, and in the last column.
    """
    targets = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE)
    positions = batch.get("position_ids")
    if positions is None:
        return targets
    starts = F.pad(positions.diff(dim=-1) != 1, (0, 1), value=True)  # the token after this one starts a document
    return targets.masked_fill(starts, IGNORE)


def token_sums(
    head: nn.Module,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    targets: torch.Tensor,
    functions: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """Losses of next-token distributions, from hidden states, the head applied to a few tokens at a time.

    On a GPU with Liger-Kernel installed, its fused kernels compute them (`fused_losses`).

    Args:
        head: language-model head, hidden -> V.
        student, teacher: [B, T, hidden] final hidden states; the teacher's is needed for `kl` and `reverse_kl`.
        targets: int64 [B, T] from `shifted_targets`.
        functions: temperature by name: `ce` (cross entropy, its temperature is not read), `kl` (teacher || student)
            or `reverse_kl` (student || teacher), both on logits divided by the temperature and times its square.
    Returns:
        0-dim fp32 sums over the predicted tokens, by name.
    """
    there = targets.flatten() >= 0  # [B*T]
    wanted = targets.flatten()[there]  # [N]
    rows = student.flatten(0, 1)[there]  # [N,hidden]
    teacher_rows = None if teacher is None else teacher.flatten(0, 1)[there]  # [N,hidden]

    if can_fuse(head, rows):
        return fused_sums(cast(nn.Linear, head), rows, teacher_rows, wanted, functions)

    def chunk(rows: torch.Tensor, teacher_rows: torch.Tensor | None, wanted: torch.Tensor) -> torch.Tensor:
        mine = _log_probabilities(head, rows, functions)
        with torch.no_grad():
            theirs = None if teacher_rows is None else _log_probabilities(head, teacher_rows, functions, ("ce",))
        return torch.stack([_distance(name, t, mine, theirs, wanted) for name, t in functions.items()])

    size = max(1, CHUNK // _width(head, rows))
    sums = torch.zeros(len(functions), device=rows.device)
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        pieces = (rows[part], None if teacher_rows is None else teacher_rows[part], wanted[part])
        if len(rows) <= size:
            sums = sums + chunk(*pieces)
        else:
            sums = sums + checkpoint(chunk, *pieces, use_reentrant=False, preserve_rng_state=False)
    if not len(rows):
        sums = sums + 0 * student.float().sum()  # a graph all the same: every rank has to have one
    return dict(zip(functions, sums))


def _width(head: nn.Module, rows: torch.Tensor) -> int:
    """V."""
    return int(getattr(head, "out_features", 0) or head(rows[:1]).shape[-1])


def _log_probabilities(
    head: nn.Module, rows: torch.Tensor, functions: Mapping[str, float], without: tuple[str, ...] = ()
) -> dict[float, torch.Tensor]:
    """fp32 [n, V] by temperature, one for all functions that share it."""
    logits = head(rows).float()  # [n,V]
    needed = {1.0 if name == "ce" else t for name, t in functions.items() if name not in without}
    return {t: F.log_softmax(logits if t == 1 else logits / t, -1) for t in needed}


def _distance(
    name: str,
    temperature: float,
    mine: dict[float, torch.Tensor],
    theirs: dict[float, torch.Tensor] | None,
    wanted: torch.Tensor,
) -> torch.Tensor:
    """One function of `token_sums`, summed over one chunk."""
    if name == "ce":
        return F.nll_loss(mine[1.0], wanted, reduction="sum")
    if theirs is None:
        raise ValueError(f"{name} compares with a teacher, and none was given")
    found, given = mine[temperature], theirs[temperature]
    if name == "kl":
        return F.kl_div(found, given, log_target=True, reduction="sum") * temperature**2
    if name == "reverse_kl":
        return F.kl_div(given, found, log_target=True, reduction="sum") * temperature**2
    raise ValueError(f"no such function: {name}")


def row_errors(student: torch.Tensor, teacher: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    """||student - teacher||^2 / ||teacher||^2 of each row.

    Args:
        student, teacher: [B, T, hidden].
        weights: [B, T] at least 0, how much each token counts on both sides of the quotient; None: all alike.
    Returns:
        fp32 [B]; 0 is the teacher, 1 is what zeros give.
    """
    if weights is None:
        return _ratio(student, teacher, (1, 2))
    root = weights.float().sqrt()[..., None]
    return _ratio(student.float() * root, teacher.float() * root, (1, 2))


def token_errors(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """||student - teacher||^2 / ||teacher||^2 of each token, so that a token of huge states counts no more than others.

    Args:
        student, teacher: [B, T, hidden].
    Returns:
        fp32 [B, T].
    """
    return _ratio(student, teacher, (2,))


def _ratio(student: torch.Tensor, teacher: torch.Tensor, dims: tuple[int, ...]) -> torch.Tensor:
    difference = (student.float() - teacher.float()).square().sum(dims)
    energy = teacher.float().square().sum(dims)
    return difference / energy.clamp_min(torch.finfo(torch.float32).tiny)


def weighted(terms: Iterable[tuple[float, Any]]) -> torch.Tensor:
    """The sum of weight * value."""
    return torch.stack([weight * value for weight, value in terms]).sum()
