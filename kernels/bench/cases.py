"""What is measured, in which order, and on which inputs.

Legend: B rows, T time, H query heads, G key/value heads, D head_dim, M slots, W window.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import torch
from nha_kernels import NHAState, log_decay_from_logits
from nha_kernels.floors import Shape as Shape  # of its cases, for those who read them

K = 1024


@dataclass(frozen=True)
class Case:
    """A layer at one length; `tokens` = B T."""

    shape: Shape
    time: int
    tokens: int

    @property
    def batch(self) -> int:
        """Rows."""
        return self.tokens // self.time


@dataclass(frozen=True)
class DecodeCase:
    """One token per row after `context` tokens; `layers` states follow each other, as in a model."""

    shape: Shape
    batch: int
    context: int
    layers: int


class Inputs(NamedTuple):
    """Tensors of one call."""

    q: torch.Tensor  # [B,T,H,D]
    k: torch.Tensor  # [B,T,G,D]
    v: torch.Tensor  # [B,T,G,D]
    log_decay: torch.Tensor  # [B,T,G,M] fp32
    cos: torch.Tensor  # [1,T,D]
    sin: torch.Tensor  # [1,T,D]
    grad: torch.Tensor  # [B,T,H,D] of o


LLAMA = Shape("Llama-3-8B", 32, 8, 128, 64, 64)
QWEN = Shape("Qwen2.5-7B", 28, 4, 128, 64, 64)
TOY = Shape("toy", 4, 2, 32, 16, 8)


def with_sizes(shape: Shape, slots: int, window: int) -> Shape:
    """The same heads with other slots and window."""
    return Shape(shape.model, shape.heads, shape.groups, shape.head_dim, slots, window)


def plan(toy: bool) -> list[Case | DecodeCase]:
    """Every case once, in the order in which they are measured.

    Args:
        toy: a few small ones that an interpreter can run.
    Returns:
        The acceptance lines' cases first, then one step away from them in every direction, then the rest of the grid.
    """
    if toy:
        attention = [Case(TOY, 32, 64), Case(TOY, 64, 64), Case(with_sizes(TOY, 16, 24), 64, 64)]
        return [*attention, *(DecodeCase(TOY, 2, context, 2) for context in (40, 80))]
    order: list[Case | DecodeCase] = [Case(LLAMA, t * K, 32 * K) for t in (32, 2, 4, 8)]
    order += [DecodeCase(with_sizes(LLAMA, 64, 512), 32, c * K, 32) for c in (4, 512, 32, 128)]

    order += [Case(with_sizes(LLAMA, 64, w), 32 * K, 32 * K) for w in (512, 2048)]
    order += [Case(LLAMA, 128 * K, 128 * K), Case(QWEN, 32 * K, 32 * K)]
    order += [Case(with_sizes(LLAMA, m, 64), 32 * K, 32 * K) for m in (32, 128)]
    order += [DecodeCase(with_sizes(s, 64, w), 32, 32 * K, 32) for s, w in product((LLAMA, QWEN), (64, 512, 2048))]
    order += [DecodeCase(with_sizes(LLAMA, 64, w), 1, 32 * K, 32) for w in (64, 512, 2048)]

    for tokens, shape, window, slots, time in product(
        (32 * K, 128 * K), (LLAMA, QWEN), (64, 512, 2048), (64, 32, 128), (32 * K, 8 * K, 2 * K, 128 * K)
    ):
        if time <= tokens:
            order.append(Case(with_sizes(shape, slots, window), time, tokens))
    return list(dict.fromkeys(order))


def make_inputs(shape: Shape, batch: int, time: int, *, device: torch.device, dtype: torch.dtype, seed: int) -> Inputs:
    """Fresh random inputs; decays as a trained gate gives them (tau = 8, logits around 0).

    Args:
        shape: heads and sizes.
        batch, time: B, T.
        device, dtype: of the tensors; log_decay is fp32.
        seed: another one gives another input set.
    Returns:
        The tensors of one call and the gradient of its output.
    """
    g = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=g, device=device, dtype=dtype)

    query, key = (batch, time, shape.heads, shape.head_dim), (batch, time, shape.groups, shape.head_dim)
    logits = normal(batch, time, shape.groups, shape.slots)
    frequency = 5e5 ** -(torch.arange(0, shape.head_dim, 2, device=device).float() / shape.head_dim)
    angle = torch.arange(time, device=device).float()[:, None] * frequency  # [T,D/2]
    angle = torch.cat([angle, angle], -1)[None]
    return Inputs(
        normal(*query),
        normal(*key),
        normal(*key),
        log_decay_from_logits(logits, 8.0),
        angle.cos().to(dtype),
        angle.sin().to(dtype),
        normal(*query),
    )


def make_state(case: DecodeCase, *, device: torch.device, dtype: torch.dtype, seed: int) -> NHAState:
    """A state that has seen `context` tokens, filled with random numbers: what a step costs does not depend on them."""
    s = case.shape
    state = NHAState.new(
        case.batch,
        s.groups,
        s.slots,
        s.head_dim,
        window=s.window,
        rotary_dim=s.head_dim,
        dtype=dtype,
        device=device,
    )
    g = torch.Generator(device).manual_seed(seed)
    for name, x in state.tensors().items():
        if name.endswith("log_decay"):
            logits = torch.randn(x.shape, generator=g, device=device, dtype=torch.float32)
            x.copy_(log_decay_from_logits(logits, 8.0))
        elif x.is_floating_point():
            x.normal_(generator=g)
    angle = torch.randn(*state.ring_cos.shape[:2], s.head_dim // 2, generator=g, device=device).repeat(1, 1, 2)
    state.ring_cos.copy_(angle.cos())
    state.ring_sin.copy_(angle.sin())
    state.seen.fill_(case.context)
    return state
