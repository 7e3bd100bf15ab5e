"""NHA as a plain PyTorch programme in the dtype of its inputs: what the kernels' rounding is measured against.

Matrix products and the softmax weights are in the inputs' dtype, as in transformers' eager attention; gates and slot
states are fp32.

Legend: as in op_cases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from nha_kernels import write_strength
from nha_kernels.rotary import rotate
from op_cases import noise

LEARNED = ("q", "k", "v", "log_decay", "slot_q_scale", "slot_bias")


def output_and_gradients(
    attention: Callable[..., torch.Tensor], x: dict[str, torch.Tensor], cast: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Output and every gradient of an attention function of the inputs, or of the inputs cast."""
    leaves = {n: (y if cast is None else y.to(cast)).detach().requires_grad_(n in LEARNED) for n, y in x.items()}
    o = attention(**leaves)
    o.backward(noise(o, 1))
    return {"o": o.detach()} | {f"d{n}": leaves[n].grad for n in LEARNED}


def same_dtype_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    window: int,
    sinks: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    slot_q_scale: torch.Tensor,
    slot_bias: torch.Tensor,
) -> torch.Tensor:
    """o [B,T,H,D] in q.dtype; arguments as `nha_attention`, empty slots masked."""
    batch, time, heads, dim = q.shape
    groups, dtype, scale = k.shape[2], q.dtype, dim**-0.5
    repeat = heads // groups
    slot_q = (q.float() * slot_q_scale).to(dtype).view(batch, time, groups, repeat, dim)
    turned_q = rotate(q, cos[:, :, None], sin[:, :, None]).view(batch, time, groups, repeat, dim)
    turned_k = rotate(k, cos[:, :, None], sin[:, :, None]).transpose(1, 2)  # [B,G,T,D]
    values, keys = v.transpose(1, 2), k.transpose(1, 2)
    decay, write = log_decay.exp().transpose(1, 2)[..., None], write_strength(log_decay).transpose(1, 2)[..., None]
    slot_k = torch.zeros(batch, groups, log_decay.shape[-1], dim, device=q.device)
    slot_v = torch.zeros_like(slot_k)
    out = []
    for t in range(time):
        j = t - window
        if j >= sinks:
            slot_k = decay[:, :, j] * slot_k + write[:, :, j] * keys[:, :, j, None].float()
            slot_v = decay[:, :, j] * slot_v + write[:, :, j] * values[:, :, j, None].float()
        exact = [*range(min(sinks, t + 1)), *range(max(j + 1, sinks), t + 1)]
        scores = [(turned_q[:, t] @ turned_k[:, :, exact].transpose(2, 3)).float() * scale]
        read = [values[:, :, exact]]
        if j >= sinks:
            score = (slot_q[:, t] @ slot_k.to(dtype).transpose(2, 3)).float() * scale
            scores.append(score + slot_bias.view(groups, repeat, 1))
            read.append(slot_v.to(dtype))
        weights = torch.cat(scores, -1).softmax(-1).to(dtype)
        out.append((weights @ torch.cat(read, 2)).reshape(batch, heads, dim))
    return torch.stack(out, 1)
