"""Gates that write what later queries will ask for: a pure function of tensors.

Shapes: n tokens, C hidden, G key/value heads, D head_dim, M slots.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from .gate_calibration import k_means

POWER = 1.5
"""Of the shares of attention that a token's weight adds up: what is looked at sharply needs a slot more than what is
looked at by many in passing, which an average serves as well."""
ASKED_FOR = 0.05
"""Attention received at which a token is to be written for certain; in proportion below."""
WRITE_WEIGHT = 4.0
"""How much a token that is to be written counts against one that is not."""
FLOOR = 1e-3
"""Least weight of a token among the clusters, in units of the mean."""
PENALTY = 1e-6
"""Of the squared rows, per token."""
FIT_STEPS = 60


def coherence(distances: torch.Tensor, cos: torch.Tensor, head_dim: int) -> torch.Tensor:
    """How much of a channel's rotated product is left, on average, over the distances that a head looks across.

    A slot has no position, so its score has to stand for all distances. The product of a pair of channels at distance d
    turns with cos(d * frequency): fast channels add up to noise there, slow ones keep their sign.

    Args:
        distances: [H, T] attention by distance, at least 0.
        cos: [T, rotary_dim] of positions 0, 1, ..., with the family's own factor in it.
    Returns:
        fp32 [H, D], at least 0; 1 in channels that are not rotated, and in heads that look nowhere.
    """
    total = distances.sum(1, keepdim=True)
    turned = (distances @ cos.float() / total.clamp_min(torch.finfo(total.dtype).tiny)) * cos[0].float()  # [H,P]
    found = torch.ones(len(distances), head_dim, device=distances.device)
    found[:, : cos.shape[1]] = torch.where(total > 0, turned.clamp_min(0), 1.0)
    return found


def attended_gates(
    hidden: torch.Tensor,
    keys: torch.Tensor,
    received: torch.Tensor,
    *,
    slots: int,
    tau: float,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of slots that keep by default and write tokens which attention will come back to.

    Per key/value head, tokens count by the attention that the teacher gives them once they have left the window. Their
    keys are clustered, one cluster per slot. A slot's row and bias are a logistic regression, on hidden states, of
    whether a token is asked for and is of the slot's cluster: so a row knows the cluster, what makes a token worth
    keeping, and how rarely it may err, since each false write costs the slot what it held.

    Args:
        hidden: [n, C]; keys: [n, G, D] un-rotated, times what the slots' queries are scaled by.
        received: [n, G] attention received from beyond the window, at least 0; where a head has none, all count alike.
        seed: of the clusters' starts.
    Returns:
        weight [G * M, C] and bias [G * M], fp32. A slot whose regression gives a small p for a token keeps about 1 - p
        of what it held.
    Raises:
        ValueError: fewer tokens than slots.
    """
    hidden = hidden.float()
    mean, deviation = hidden.mean(0), hidden.std(0).clamp_min(1e-12)
    points = (hidden - mean) / deviation  # [n,C]
    weights, biases = [], []
    for group in range(keys.shape[1]):
        counts = received[:, group].float()
        average = counts.mean()
        asked_for = (counts / ASKED_FOR).clamp(max=1)  # [n]
        counts = counts + FLOOR * average if average > 0 else torch.ones_like(counts)
        _, labels = k_means(keys[:, group].float(), slots, seed=seed + group, weights=counts)
        rows, offsets = _logistic(points, F.one_hot(labels, slots) * asked_for[:, None])
        rows = rows / deviation
        weights.append(-rows)
        biases.append(rows @ mean - offsets - math.log(tau))  # a = sigmoid(z)^(1/tau) is near 1 - exp(-z) / tau
    return torch.cat(weights), torch.cat(biases)


def _logistic(points: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, C] and offsets [M] of independent logistic regressions.

    Args:
        points: [n, C], of mean 0 and deviation 1.
        wanted: [n, M] probabilities.
    """
    rows = points.new_zeros(wanted.shape[1], points.shape[1], requires_grad=True)
    offsets = points.new_full((wanted.shape[1],), -5.0, requires_grad=True)  # near the rate at which a slot is written
    weight = 1 + (WRITE_WEIGHT - 1) * wanted
    solver = torch.optim.LBFGS([rows, offsets], max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        solver.zero_grad()
        logits = points @ rows.T + offsets
        apart = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum") / len(points)
        found = apart + PENALTY * rows.square().sum()
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(loss)
    return rows.detach(), offsets.detach()
