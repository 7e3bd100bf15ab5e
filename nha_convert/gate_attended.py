"""Gates that write what later queries will ask for: a pure function of tensors.

Shapes: n tokens, C hidden, G key/value heads, D head_dim, M slots.
"""

from __future__ import annotations

import math
from collections.abc import Callable

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
ROUTING_PENALTY = 1e-4
"""Of the squared rows of the regression that tells slots apart."""
SHARPNESS = 4.0
"""Of the logits that tell slots apart: a token that goes to one slot alone overwrites least."""
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
        hidden: [n, C]; keys: [n, G, D] un-rotated, times the `coherence` of the queries' channels where the
            slots are met by scaled or by rotated queries.
        received: [n, G] attention received from beyond the window, at least 0; where a head has none, all count alike.
        seed: of the clusters' starts.
    Returns:
        weight [G * M, C] and bias [G * M], fp32. A slot whose regression gives a small p for a token keeps about 1 - p
        of what it held.
    Raises:
        ValueError: fewer tokens than slots.
    """
    points, mean, deviation = _standardised(hidden)
    weights, biases = [], []
    for group in range(keys.shape[1]):
        asked_for, labels = _clusters(keys[:, group], received[:, group], slots, seed + group)
        rows, offsets = _logistic(points, F.one_hot(labels, slots) * asked_for[:, None])
        rows = rows / deviation
        weights.append(-rows)
        biases.append(rows @ mean - offsets - math.log(tau))  # a = sigmoid(z)^(1/tau) is near 1 - exp(-z) / tau
    return torch.cat(weights), torch.cat(biases)


def routed_gates(
    hidden: torch.Tensor, keys: torch.Tensor, received: torch.Tensor, *, slots: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routed gates that write tokens which attention will come back to, each into the slot of its cluster of keys.

    Per key/value head, the strength of the write is a logistic regression of whether a token is asked for, and the
    slots' softmax a multinomial one of its cluster, both on hidden states and both as in `attended_gates`.

    Args:
        As `attended_gates`.
    Returns:
        weight [G * M, C] and bias [G * M] of the slots, weight [G, C] and bias [G] of the strength; fp32.
    Raises:
        ValueError: fewer tokens than slots.
    """
    points, mean, deviation = _standardised(hidden)
    found: list[list[torch.Tensor]] = [[], [], [], []]
    for group in range(keys.shape[1]):
        asked_for, labels = _clusters(keys[:, group], received[:, group], slots, seed + group)
        fits = *_multinomial(points, labels, asked_for, slots), *_logistic(points, asked_for[:, None])
        for place in (0, 2):
            rows = fits[place] / deviation
            found[place].append(rows)
            found[place + 1].append(fits[place + 1] - rows @ mean)
    slot_weight, slot_bias, write_weight, write_bias = (torch.cat(parts) for parts in found)
    return slot_weight, slot_bias, write_weight, write_bias


def _standardised(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[n, C] of mean 0 and deviation 1, and both [C]."""
    hidden = hidden.float()
    mean, deviation = hidden.mean(0), hidden.std(0).clamp_min(1e-12)
    return (hidden - mean) / deviation, mean, deviation


def _clusters(keys: torch.Tensor, received: torch.Tensor, slots: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How much each token of a head is asked for, [n] between 0 and 1, and its cluster of keys, int64 [n]."""
    counts = received.float()
    _, labels = k_means(keys.float(), slots, seed=seed, weights=_floored(counts))
    return (counts / ASKED_FOR).clamp(max=1), labels


def _floored(counts: torch.Tensor) -> torch.Tensor:
    """Counts [n] with a little for every token; all alike where there are none."""
    average = counts.mean()
    return counts + FLOOR * average if average > 0 else torch.ones_like(counts)


def _minimised(loss: Callable[[], torch.Tensor], parameters: list[torch.Tensor]) -> list[torch.Tensor]:
    """The parameters, detached, after `FIT_STEPS` of L-BFGS."""
    solver = torch.optim.LBFGS(parameters, max_iter=FIT_STEPS, history_size=10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        found = loss()
        found.backward()
        return found

    with torch.enable_grad():
        solver.step(closure)
    return [parameter.detach() for parameter in parameters]


def _multinomial(
    points: torch.Tensor, labels: torch.Tensor, asked_for: torch.Tensor, slots: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, C] and offsets [M] of a multinomial regression, times `SHARPNESS`.

    Args:
        points: [n, C], of mean 0 and deviation 1.
        labels: int64 [n]; asked_for: [n], how much each token counts.
    """
    rows = points.new_zeros(slots, points.shape[1], requires_grad=True)
    offsets = points.new_zeros(slots, requires_grad=True)
    weight = _floored(asked_for)
    weight = weight / weight.sum()

    def loss() -> torch.Tensor:
        apart = F.cross_entropy(points @ rows.T + offsets, labels, reduction="none")
        return (weight * apart).sum() + ROUTING_PENALTY * rows.square().sum()

    rows, offsets = _minimised(loss, [rows, offsets])
    return SHARPNESS * rows, SHARPNESS * offsets


def _logistic(points: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [M, C] and offsets [M] of independent logistic regressions.

    Args:
        points: [n, C], of mean 0 and deviation 1.
        wanted: [n, M] probabilities.
    """
    rows = points.new_zeros(wanted.shape[1], points.shape[1], requires_grad=True)
    offsets = points.new_full((wanted.shape[1],), -5.0, requires_grad=True)  # near the rate at which a slot is written
    weight = 1 + (WRITE_WEIGHT - 1) * wanted

    def loss() -> torch.Tensor:
        logits = points @ rows.T + offsets
        apart = F.binary_cross_entropy_with_logits(logits, wanted, weight=weight, reduction="sum") / len(points)
        return apart + PENALTY * rows.square().sum()

    rows, offsets = _minimised(loss, [rows, offsets])
    return rows, offsets
