"""One call on the Triton path against the fp64 recurrence, on whatever device its tensors are."""

from __future__ import annotations

import torch
from nha_kernels import NHAState
from op_cases import EXACT, FLOAT, differences, run

FORWARD, GRADIENT = 2e-6, 1e-5  # of the largest entry, fp32 against fp64: the numbers


def wrong(x: dict[str, torch.Tensor], tau: float = 8.0, state: NHAState | None = None, **options) -> dict[str, str]:
    """Outputs, final states and gradients of the Triton path in fp32 that the fp64 recurrence does not confirm."""
    want = run(x, EXACT, tau, state, backend="reference", **options)
    got = run(x, FLOAT, tau, state, backend="triton", **options)
    return differences(got, want, {name: GRADIENT if name.startswith("d") else FORWARD for name in want})


def padding(time: int) -> torch.Tensor:
    """Padding [2,T]: on the left, and in the middle."""
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, 13:20] = False
    return mask
