"""Gates that write what later queries will ask for: a pure function of tensors.

Shapes: n tokens, C hidden, G key/value heads, D head_dim, M slots.
"""

from __future__ import annotations

import torch

from .gate_calibration import k_means
from .gate_init import Horizons, logit_of_horizon, spread_horizons

WRITE_HORIZON = 1.05
"""Tokens that a slot looks back over when a token of its own comes: what it held is gone."""
KEEP = 100.0
"""How many times its horizon a slot looks back over while other tokens come: its own end what it holds."""
SHRINKAGE = 0.02
"""Added to the covariance's diagonal, in units of its mean."""
FLOOR = 1e-3
"""Least weight of a token among the clusters, in units of the mean."""
POWER = 1.5
"""Of the shares of attention that a token's weight adds up: what is looked at sharply needs a slot more than what is
looked at by many in passing, which an average serves as well."""


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
    horizons: Horizons,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of slots that keep by default and write tokens which attention will come back to.

    Per key/value head, tokens count by the attention that the teacher gives them once they have left the window. Their
    keys are clustered, one cluster per slot; a slot's row is the linear discriminant that tells its cluster's tokens
    from text at large: covariance^-1 (mean of the cluster - mean of all) of hidden states. So a row knows the cluster
    and also what makes a token worth keeping. Scale and bias put the logit of an average token at `KEEP` times the
    slot's horizon from the spread, and that of the cluster's mean at `WRITE_HORIZON` tokens. The more attention a
    cluster receives, the shorter the slot's horizon.

    Args:
        hidden: [n, C]; keys: [n, G, D] un-rotated, times what the slots' queries are scaled by.
        received: [n, G] attention received from beyond the window, at least 0; where a head has none, all count alike.
        horizons: ends of the spread.
        seed: of the clusters' starts.
    Returns:
        weight [G * M, C] and bias [G * M], fp32.
    Raises:
        ValueError: fewer tokens than slots.
    """
    hidden = hidden.float()
    mean = hidden.mean(0)
    centred = hidden - mean  # [n,C]
    covariance = centred.T @ centred / len(centred)
    covariance.diagonal().add_((SHRINKAGE * covariance.diagonal().mean()).clamp_min(1e-12))
    keep = logit_of_horizon(KEEP * spread_horizons(slots, horizons), tau).float().to(hidden.device)  # [M]
    write = float(logit_of_horizon(torch.tensor(WRITE_HORIZON), tau))
    weights, biases = [], []
    for group in range(keys.shape[1]):
        counts = received[:, group].float()
        average = counts.mean()
        counts = counts + FLOOR * average if average > 0 else torch.ones_like(counts)
        _, labels = k_means(keys[:, group].float(), slots, seed=seed + group, weights=counts)
        own = torch.nn.functional.one_hot(labels, slots) * counts[:, None]  # [n,M]
        own = own[:, own.sum(0).argsort(descending=True, stable=True)]
        means = own.T @ centred / own.sum(0).clamp_min(torch.finfo(own.dtype).tiny)[:, None]  # [M,C]
        directions = torch.linalg.solve(covariance, means.T).T  # [M,C]
        apart = (directions * means).sum(-1)  # [M] squared Mahalanobis distance of the two means
        gain = (keep - write) / apart.clamp_min(1.0)
        weights.append(-gain[:, None] * directions)
        biases.append(keep + gain * (directions @ mean))
    return torch.cat(weights), torch.cat(biases)
