"""Rotary embedding as `transformers` applies it: on the first P of D dimensions, halves rotated together."""

import torch


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
