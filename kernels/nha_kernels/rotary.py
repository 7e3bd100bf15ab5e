"""Rotary embedding as `transformers` applies it: on the first P of D dimensions, halves rotated together."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def rotate(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """Rotate the first P dimensions of x and leave the rest.

    Args:
        x: [..., D] queries or keys.
        cos, sin: broadcastable to [..., P] with P <= D and even; None or P = 0 rotates nothing.
    Returns:
        [..., D] in the dtype of x.
    """
    if cos is None or sin is None or cos.shape[-1] == 0:
        return x
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    turned = x[..., :rotary]
    swapped = torch.cat([-turned[..., half:], turned[..., :half]], dim=-1)
    turned = turned * cos.to(x.dtype) + swapped * sin.to(x.dtype)
    return turned if rotary == x.shape[-1] else torch.cat([turned, x[..., rotary:]], dim=-1)


def rotate_into(
    x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, front: int, tail: int
) -> torch.Tensor:
    """`rotate` of a view of any layout, written once into padded contiguous memory; no gradient for cos and sin.

    Args:
        x: [B,G,T,...,D]
        cos, sin: broadcastable to [B,G,T,...,P], or None.
        front, tail: zeros before and after the T tokens.
    Returns:
        [B,G,front+T+tail,...,D]
    """
    if cos is None or sin is None or cos.shape[-1] == 0:
        return F.pad(x, (0, 0) * (x.dim() - 3) + (front, tail)).contiguous()
    return _RotateInto.apply(x, cos.to(x.dtype), sin.to(x.dtype), front, tail)


class _RotateInto(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, front: int, tail: int) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.front, ctx.shape = front, x.shape
        out = x.new_empty(*x.shape[:2], front + x.shape[2] + tail, *x.shape[3:])
        out[:, :, :front] = 0
        out[:, :, front + x.shape[2] :] = 0
        half = cos.shape[-1] // 2
        _turn(x, cos, -sin[..., :half], sin[..., half:], out[:, :, front : front + x.shape[2]])
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        half = cos.shape[-1] // 2
        grad = grad[:, :, ctx.front : ctx.front + ctx.shape[2]]
        out = grad.new_empty(ctx.shape)
        _turn(grad, cos, sin[..., half:], -sin[..., :half], out)
        return out, None, None, None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, to_low: torch.Tensor, to_high: torch.Tensor, out: torch.Tensor) -> None:
    """out = x o cos, plus the high half times `to_low` on the low half and the low half times `to_high` on the high."""
    rotary, half = cos.shape[-1], cos.shape[-1] // 2
    low, high = x[..., :half], x[..., half:rotary]
    torch.mul(low, cos[..., :half], out=out[..., :half]).addcmul_(high, to_low)
    torch.mul(high, cos[..., half:], out=out[..., half:rotary]).addcmul_(low, to_high)
    out[..., rotary:] = x[..., rotary:]
