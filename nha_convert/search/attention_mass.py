"""How much of the teacher's softmax lies beyond a window: what an NHA layer has to keep in its slots.

Legend: B rows, T time, H query heads, G key/value heads, D head_dim, C queries at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nha_kernels.rotary import rotate
from torch import Tensor

from ..families import FAMILIES
from .teacher_pass import teacher_pass

SCORES_AT_ONCE = 2**24
"""Attention scores (B * H * C * T) that are held at a time: 64 MB in fp32."""


def far_attention(
    model: Any, rows: Tensor, windows: Mapping[int, Sequence[int]], *, at_once: int = SCORES_AT_ONCE
) -> dict[int, dict[int, float]]:
    """The share of the teacher's attention that is neither on a window's tokens nor on sinks.

    Args:
        model: an NHA model, which is read in teacher mode.
        rows: int64 [N, T], each one document.
        windows: layer -> windows to measure it with.
        at_once: scores held at a time.
    Returns:
        layer -> {window: share}, the mean over tokens and heads; 0 where every token fits the window.
    """
    config = model.config
    own = FAMILIES[config.model_type.removeprefix("nha_")].sliding_windows(config.to_dict())
    sums = {layer: torch.zeros(len(of_layer), dtype=torch.float64) for layer, of_layer in windows.items()}

    def measure(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            query, key, _ = layer._nha_projections(hidden)  # [B,T,H,D], [B,T,G,D]
            cos, sin = (values[:, :, None] for values in kwargs["position_embeddings"])  # [B or 1,T,1,D]
            turned = rotate(query, cos, sin), rotate(key, cos, sin)
            sums[index] += _far_sums(*turned, layer.scaling, windows[index], config.nha_sinks, own[index], at_once)

        return hook

    teacher_pass(model, rows, windows, measure, before=True)
    return {
        layer: {window: float(total / rows.numel()) for window, total in zip(windows[layer], totals)}
        for layer, totals in sums.items()
    }


def _far_sums(
    query: Tensor, key: Tensor, scale: float, windows: Sequence[int], sinks: int, own: int | None, at_once: int
) -> Tensor:
    """Sums over rows and tokens of the mean over heads, fp64 [windows], on the CPU.

    Args:
        query: [B, T, H, D], rotated; key: [B, T, G, D], rotated.
        own: the layer's own sliding window, or None.
    """
    rows, length, heads, _ = query.shape
    groups = key.shape[2]
    key = key.transpose(1, 2)[:, :, None]  # [B,G,1,T,D]
    query = query.unflatten(2, (groups, heads // groups)).permute(0, 2, 3, 1, 4)  # [B,G,R,T,D]
    step = max(1, at_once // (rows * heads * length))
    places = torch.arange(length, device=query.device)
    total = torch.zeros(len(windows), dtype=torch.float64)
    for start in range(0, length, step):
        end = min(start + step, length)
        age = places[start:end, None] - places[:end]  # [C, end]
        hidden = (age < 0) if own is None else (age < 0) | (age >= own)
        scores = (query[:, :, :, start:end] @ key[:, :, :, :end].transpose(-1, -2)).float() * scale
        shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)  # [B,G,R,C,end]
        for place, window in enumerate(windows):
            far = (age >= window) & (places[:end] >= sinks)
            total[place] += float((shares * far).sum(dtype=torch.float64)) / heads
    return total
