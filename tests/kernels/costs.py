"""Counts what a call costs: kernels launched, bytes kept for the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from nha_kernels import nha_attention


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the Triton kernels launched inside, in order; in the interpreter."""
    names: list[str] = []
    from triton.runtime.interpreter import InterpretedFunction as Kernel

    launch = Kernel.__getitem__

    def counted(kernel, grid):
        names.append(kernel.fn.__name__)
        return launch(kernel, grid)

    with mock.patch.object(Kernel, "__getitem__", counted):
        yield names


def saved_bytes_per_token() -> float:
    """Bytes that one layer keeps per token at Llama-3-8B's shapes in bf16, without the shared rotary factors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    time, heads, groups, dim, slots = 4096, 32, 8, 128, 64
    kept: dict[int, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[id(x)] = x
        return x

    with FakeTensorMode(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        q = torch.empty(1, time, heads, dim, dtype=torch.bfloat16, requires_grad=True)
        k, v = (torch.empty(1, time, groups, dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        log_decay = torch.empty(1, time, groups, slots, requires_grad=True)
        cos, sin = (torch.empty(1, time, dim, dtype=torch.bfloat16) for _ in range(2))
        o, _ = nha_attention(q, k, v, log_decay, window=64, cos=cos, sin=sin, backend="triton")
    assert o.shape == q.shape
    rotary = 2 * time * dim * 2
    return (sum(x.numel() * x.element_size() for x in kept.values()) - rotary) / time
