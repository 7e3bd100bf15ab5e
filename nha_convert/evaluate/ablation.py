"""What each branch of the attention is worth, and how much of the attention the slots receive.

Legend: B windows, T tokens, H query heads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from nha_kernels.ops import nha_attention
from torch import Tensor

from nha_convert.evaluate.nll import (
    Buckets,
    PositionSums,
    compare,
    default_batch_size,
    eval_windows,
    evaluating,
    logits_of,
    position_buckets,
)
from nha_convert.evaluate.table import memory_recovery
from nha_convert.modeling.attention_nha import branch_mode, nha_layers

__all__ = ["BRANCHES", "branch_ablation", "branch_reader", "memory_recovery", "slot_mass"]

BRANCHES = {"window_only": "window", "memory_only": "slots", "no_attention": "none"}
"""Row of eval.json -> what is left of every NHA layer's attention."""


def branch_reader(model: Any, branch: str) -> Callable[[Tensor], Tensor]:
    """ids [B, T] -> logits [B, T, V] with only `branch` of every NHA layer."""

    def read(ids: Tensor) -> Tensor:
        with branch_mode(model, branch):
            return logits_of(model)(ids)

    return read


def branch_ablation(
    model: Any,
    tokens: Tensor,
    sequence_length: int,
    buckets: Buckets | None = None,
    batch_size: int | None = None,
    *,
    bos: int | None = None,
    quiet: bool = False,
) -> dict[str, dict[str, Any]]:
    """NLL of the whole model and of each branch of its NHA layers alone; full-attention layers stay as they are.

    Args:
        tokens: [N] held-out ids.
        buckets: half-open position ranges; doubling widths if None.
    Returns:
        {"full", "window", "slots", "none"}, each {"mean": nats per token, "buckets": ...}.
    """
    readers = {"full": branch_reader(model, "both")}
    readers |= {branch: branch_reader(model, branch) for branch in BRANCHES.values()}
    with evaluating(model):
        measured = compare(
            readers,
            tokens,
            sequence_length,
            buckets=buckets,
            batch_size=batch_size or default_batch_size(model, sequence_length),
            bos=bos,
            quiet=quiet,
            description="ablation",
        )
    return {name: result["nll"] for name, result in measured.items()}


def slot_mass(
    model: Any,
    tokens: Tensor,
    sequence_length: int,
    buckets: Buckets | None = None,
    batch_size: int | None = None,
    *,
    bos: int | None = None,
) -> list[dict[str, Any]]:
    """The slots' share of the softmax in every NHA layer, mean over heads and positions.

    Args:
        tokens: [N] held-out ids.
        buckets: half-open position ranges; doubling widths if None.
    Returns:
        [{"layer": index, "mean": share, "buckets": {"0-16": share, ...}}, ...] in the order of the layers; empty for
        a model none of whose layers runs NHA.
    """
    layers = [(index, layer) for index, layer in nha_layers(model) if layer.runs_nha]
    if not layers:
        return []
    sums = {index: PositionSums(sequence_length) for index, _ in layers}

    def measure(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            share = _slot_share(layer, hidden_states, kwargs["position_embeddings"])  # [B,T,H]
            sums[index].add(share.mean(-1), 0)

        return hook

    with evaluating(model), ExitStack() as hooks:
        for index, layer in layers:
            handle = layer.register_forward_pre_hook(measure(index), with_kwargs=True)
            hooks.callback(handle.remove)
        for ids in eval_windows(tokens, sequence_length, bos, batch_size or default_batch_size(model, sequence_length)):
            logits_of(model)(ids)
    positions = list(buckets) if buckets is not None else position_buckets(sequence_length)
    return [{"layer": index, **sums[index].result(positions)} for index, _ in layers]


def _slot_share(layer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
    """exp(lse of the slots - lse of slots and window) [B,T,H]; 0 where nothing has been absorbed."""
    query, key, value = layer._nha_projections(hidden_states)
    log_decay, slot_q_scale, slot_bias = layer.nha(hidden_states)
    cos, sin = position_embeddings

    def lse(branch: str) -> Tensor:
        _, values, _ = nha_attention(
            query,
            key,
            value,
            log_decay,
            window=layer.nha_window,
            cos=cos,
            sin=sin,
            sinks=layer.config.nha_sinks,
            scale=layer.scaling,
            mask_empty=layer.config.nha_mask_empty,
            slot_q_scale=slot_q_scale,
            slot_bias=slot_bias,
            branch=branch,
            return_lse=True,
        )
        return values.float()

    return torch.nan_to_num(torch.exp(lse("slots") - lse("both")), nan=0.0)
