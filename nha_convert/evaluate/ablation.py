"""What each branch of the attention is worth, in the whole model and in one layer alone.

Legend: B windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from nha_convert.evaluate.bootstrap import bootstrap_interval, gap_of_sums
from nha_convert.evaluate.nll import Buckets, compare, default_batch_size, evaluating, logits_of
from nha_convert.evaluate.table import memory_recovery
from nha_convert.modeling.attention_nha import branch_mode, nha_layers

__all__ = ["BRANCHES", "branch_ablation", "branch_reader", "layer_gains", "layer_readers", "memory_recovery"]

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


def layer_readers(model: Any) -> dict[int, Callable[[Tensor], Tensor]]:
    """Layer index -> ids [B, T] to logits [B, T, V] with that layer's slots masked while all others run as they are."""

    def reader(layer: Any) -> Callable[[Tensor], Tensor]:
        def read(ids: Tensor) -> Tensor:
            before, layer.nha_branch = layer.nha_branch, "window"
            try:
                return logits_of(model)(ids)
            finally:
                layer.nha_branch = before

        return read

    return {index: reader(layer) for index, layer in nha_layers(model) if layer.runs_nha}


def layer_gains(whole: dict[str, Any], masked: dict[int, dict[str, Any]], seed: int = 0) -> list[dict[str, Any]]:
    """What the slots of each layer alone are worth, the others running.

    Args:
        whole: what `compare` says of the whole model.
        masked: layer index -> what it says, of the same tokens, with that layer's slots masked.
    Returns:
        [{"layer", "nll" (with its slots masked), "nll_gain" (by how much its slots lower the NLL; nats per token),
        "interval" ([low, high] of the gain, 95 % by bootstrap over windows, or None)}, ...] in the order of the layers.
    """
    gains = []
    for index, result in masked.items():
        columns = result["windows"]["nll"], whole["windows"]["nll"], whole["window_tokens"]
        gains.append(
            {
                "layer": index,
                "nll": result["nll"]["mean"],
                "nll_gain": result["nll"]["mean"] - whole["nll"]["mean"],
                "interval": bootstrap_interval(gap_of_sums, columns, seed=seed),
            }
        )
    return gains
