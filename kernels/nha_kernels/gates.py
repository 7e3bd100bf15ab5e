"""Gate numerics: from logits to the slots' log decay and write strength.

Legend: G key/value heads, M slots.
"""

import math

import torch
import torch.nn.functional as F

LOG_DECAY_FLOOR = -9.7
"""Natural log of the strongest decay per token (14 bits).

Sixteen such steps span 2^224, so every factor taken from the middle of a 16-token sub-chunk stays below 2^112 and
fp32 cannot overflow. A slot that decays this fast has forgotten all but 6e-5 of its past anyway.
"""


def log_decay_from_logits(logits: torch.Tensor, tau: float) -> torch.Tensor:
    """Natural log of the slot decay, `logsigmoid(logits) / tau`, floored at `LOG_DECAY_FLOOR`.

    Args:
        logits: [..., G, M] gate logits of any floating dtype.
        tau: temperature > 0; larger means longer memory.
    Returns:
        [..., G, M] log decay <= 0, fp32 (fp64 for fp64 logits). The gradient is 0 where the floor is reached.
    Raises:
        ValueError: tau is not positive.
    Source: arXiv 2510.07019, section 3.
    """
    if not tau > 0:
        raise ValueError(f"tau must be positive, got {tau}")
    if logits.dtype != torch.float64:
        logits = logits.float()
    return (F.logsigmoid(logits) / tau).clamp(min=LOG_DECAY_FLOOR)


def log_decay_from_routing(write_logits: torch.Tensor, slot_logits: torch.Tensor) -> torch.Tensor:
    """Natural log of the slot decay where one write of each token is shared out among the slots.

    A token is written with strength p = sigmoid(write_logits), of which slot m takes softmax(slot_logits)_m: all slots
    together are overwritten by p of one slot at most, where gates that do not know of each other may write a token into
    many.

    Args:
        write_logits: [..., G] of any floating dtype.
        slot_logits: [..., G, M] of any floating dtype.
    Returns:
        [..., G, M] log decay in [`LOG_DECAY_FLOOR`, 0], fp32 (fp64 for fp64 logits).
    """
    if slot_logits.dtype != torch.float64:
        write_logits, slot_logits = write_logits.float(), slot_logits.float()
    shares = torch.sigmoid(write_logits)[..., None] * slot_logits.softmax(-1)  # [...,G,M]
    decay = torch.log1p(shares * math.expm1(LOG_DECAY_FLOOR))
    return decay.clamp(min=LOG_DECAY_FLOOR)  # in fp32 a whole write comes out 2e-4 below it


def write_strength(log_decay: torch.Tensor) -> torch.Tensor:
    """Share of a slot that one token overwrites, `1 - exp(log_decay)`, exact also where the decay is close to 1.

    Args:
        log_decay: [...] natural log of the decay, <= 0.
    Returns:
        [...] strength in [0, 1).
    """
    return -torch.expm1(log_decay)
