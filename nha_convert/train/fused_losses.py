"""Losses of next-token distributions by Liger-Kernel, which applies the head and differentiates in one go on a GPU.

N predicted tokens, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from functools import cache

import torch
from torch import nn

BETA = {"kl": 0.0, "reverse_kl": 1.0}
"""The end of Liger's generalised Jensen-Shannon divergence that each function is."""


@cache
def _installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def can_fuse(head: nn.Module, rows: torch.Tensor) -> bool:
    """Whether a plain head on a GPU meets an installed Liger-Kernel."""
    plain = type(head) is nn.Linear and head.bias is None
    return plain and rows.device.type == "cuda" and len(rows) > 0 and _installed()


def fused_sums(
    head: nn.Linear,
    student: torch.Tensor,
    teacher: torch.Tensor | None,
    wanted: torch.Tensor,
    functions: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """What `losses.token_sums` gives.

    Args:
        head: language-model head without bias, hidden -> V.
        student, teacher: [N, hidden] final hidden states of the predicted tokens.
        wanted: int64 [N] in [0, V).
        functions: temperature by name: `ce`, `kl`, `reverse_kl`.
    Returns:
        0-dim fp32 sums over the tokens, by name.
    Raises:
        ValueError: `kl` or `reverse_kl` without a teacher.
    """
    logging.getLogger("liger_kernel").setLevel(logging.ERROR)  # it warns of backends that are not installed
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy, liger_fused_linear_jsd

    sums: dict[str, torch.Tensor] = {}
    for name, temperature in functions.items():
        if name == "ce":
            sums[name] = liger_fused_linear_cross_entropy(student, head.weight, wanted, reduction="sum").float()
            continue
        if teacher is None:
            raise ValueError(f"{name} compares with a teacher, and none was given")
        mean = liger_fused_linear_jsd(
            student, head.weight, teacher, head.weight.detach(), None, BETA[name], -100, temperature
        )
        sums[name] = mean.float() * (len(student) * temperature**2)
    return sums
