"""How much of the teacher's softmax lies beyond a window: what an NHA layer has to keep in its slots.

Legend: B rows, T time, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from nha_kernels.rotary import rotate
from torch import Tensor

from ..far_attention import SCORES_AT_ONCE, attention_shares, beyond, own_windows
from .teacher_pass import teacher_pass


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
    own = own_windows(config)
    sums = {layer: torch.zeros(len(of_layer), dtype=torch.float64) for layer, of_layer in windows.items()}

    def measure(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            query, key, _ = layer._nha_projections(hidden)  # [B,T,H,D], [B,T,G,D]
            cos, sin = (values[:, :, None] for values in kwargs["position_embeddings"])  # [B or 1,T,1,D]
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            heads = query.shape[2]
            for age, shares in attention_shares(query, key, layer.scaling, own=own[index], at_once=at_once):
                for place, window in enumerate(windows[index]):
                    far = beyond(age, window, config.nha_sinks)
                    sums[index][place] += float((shares * far).sum(dtype=torch.float64)) / heads

        return hook

    teacher_pass(model, rows, windows, measure, before=True)
    return {
        layer: {window: float(total / rows.numel()) for window, total in zip(windows[layer], totals)}
        for layer, totals in sums.items()
    }
