"""One call on the Triton path against the fp64 recurrence, on whatever device its tensors are."""

from __future__ import annotations

import torch
from nha_kernels import NHAState
from op_cases import EXACT, FLOAT, assert_close, run

FORWARD, GRADIENT = 2e-6, 1e-5  # of the largest entry, fp32 against fp64: the numbers


def assert_exact(x: dict[str, torch.Tensor], tau: float = 8.0, state: NHAState | None = None, **options) -> None:
    """Every output, final state and gradient of the Triton path in fp32 against the fp64 recurrence."""
    want = run(x, EXACT, tau, state, backend="reference", **options)
    got = run(x, FLOAT, tau, state, backend="triton", **options)
    for name in want:
        tolerance = GRADIENT if name.startswith("d") else FORWARD
        assert_close({name: got[name]} if name in got else {}, {name: want[name]}, tolerance)


def padding(time: int) -> torch.Tensor:
    """Padding [2,T]: on the left, and in the middle."""
    mask = torch.ones(2, time, dtype=torch.bool)
    mask[0, :7] = False
    mask[1, 13:20] = False
    return mask
