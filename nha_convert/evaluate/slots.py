"""How the slots are used: their share of the attention, how many of them share it, how fast they are written.

Legend: B windows, T tokens, H query heads, G key/value heads, R query heads per key/value head, D head_dim, M slots,
W window, S sinks, C tiles.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from nha_kernels.gates import write_strength
from nha_kernels.ops import nha_attention
from nha_kernels.tiles import TILE, scan_states, tile_decays, tile_scores
from torch import Tensor

from nha_convert.evaluate.nll import (
    Buckets,
    PositionSums,
    default_batch_size,
    eval_windows,
    evaluating,
    logits_of,
    position_buckets,
)
from nha_convert.modeling.attention_nha import nha_layers

HORIZON_QUANTILES = {"low": 0.1, "median": 0.5, "high": 0.9}
"""Over the slots of one key/value head."""


class LayerUsage:
    """Sums of one layer over all tokens read so far.

    Attributes:
        mass: the slots' share of the softmax, mean over heads, by position.
        weights: [H,M] softmax weight of every slot, summed over tokens.
        writes: [G,M] write strength, summed over tokens.
        tokens: how many.
    """

    def __init__(self, sequence_length: int) -> None:
        self.mass = PositionSums(sequence_length)
        self.weights = torch.zeros((), dtype=torch.float64)
        self.writes = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, weights: Tensor, log_decay: Tensor) -> None:
        """One batch: weights [B,T,H,M], log_decay [B,T,G,M]."""
        self.mass.add(weights.sum(-1).mean(-1), 0)
        self.weights = self.weights + weights.sum((0, 1)).cpu().double()
        self.writes = self.writes + write_strength(log_decay).sum((0, 1)).cpu().double()
        self.tokens += weights.shape[0] * weights.shape[1]

    def summary(self) -> dict[str, list[float]]:
        """What `slot_usage` says of one layer: a list over heads under each name."""
        mass = self.weights.sum(-1)  # [H]
        share = self.weights / mass.clamp(min=1e-30)[:, None]
        effective = torch.special.entr(share).sum(-1).exp() * (mass > 0)
        writes = self.writes / self.tokens  # [G,M]
        horizons = 1 / writes.clamp(min=1e-12)
        return {
            "slot_mass": (mass / self.tokens).tolist(),
            "effective_slots": effective.tolist(),
            "write_rate": writes.mean(-1).tolist(),
            **{f"horizon_{name}": horizons.quantile(q, -1).tolist() for name, q in HORIZON_QUANTILES.items()},
        }


def read_slots(
    model: Any, tokens: Tensor, sequence_length: int, batch_size: int | None = None, *, bos: int | None = None
) -> dict[int, LayerUsage]:
    """What every layer that runs NHA does with its slots, in one pass over held-out text.

    Args:
        tokens: [N] held-out ids.
        sequence_length: tokens of a window, BOS included.
    Returns:
        Layer index -> its sums; empty for a model none of whose layers runs NHA.
    """
    layers = [(index, layer) for index, layer in nha_layers(model) if layer.runs_nha]
    if not layers:
        return {}
    usage = {index: LayerUsage(sequence_length) for index, _ in layers}

    def measure(index: int) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden_states = args[0] if args else kwargs["hidden_states"]
            usage[index].add(*slot_weights(layer, hidden_states, kwargs["position_embeddings"]))

        return hook

    with evaluating(model), ExitStack() as hooks:
        for index, layer in layers:
            handle = layer.register_forward_pre_hook(measure(index), with_kwargs=True)
            hooks.callback(handle.remove)
        for ids in eval_windows(tokens, sequence_length, bos, batch_size or default_batch_size(model, sequence_length)):
            logits_of(model)(ids)
    return usage


def slot_mass(usage: dict[int, LayerUsage], sequence_length: int, buckets: Buckets | None = None) -> list[dict]:
    """The slots' share of the softmax in every NHA layer, mean over heads and positions.

    Args:
        usage: from `read_slots`, at the same sequence length.
        buckets: half-open position ranges; doubling widths if None.
    Returns:
        [{"layer": index, "mean": share, "buckets": {"0-16": share, ...}}, ...] in the order of the layers.
    """
    positions = list(buckets) if buckets is not None else position_buckets(sequence_length)
    return [{"layer": index, **one.mass.result(positions)} for index, one in usage.items()]


def slot_usage(usage: dict[int, LayerUsage]) -> dict[str, Any]:
    """Arrays [layer][head] that say how the slots are used.

    Args:
        usage: from `read_slots`.
    Returns:
        {"layers": their indices, "tokens": read by each, and per layer a list over query heads under "slot_mass"
        (share of the softmax) and "effective_slots" (exp of the entropy of the mean slot weights: 1 where one slot
        takes all, M where all take alike, 0 where none was ever read), over key/value heads under "write_rate" (mean
        of 1 - decay over tokens and slots) and "horizon_low", "horizon_median", "horizon_high" (quantiles 0.1, 0.5
        and 0.9 over the slots of 1 / (1 - mean decay), in tokens)}; {} where no layer runs NHA.
    """
    if not usage:
        return {}
    summaries = [one.summary() for one in usage.values()]
    arrays = {name: [summary[name] for summary in summaries] for name in summaries[0]}
    return {"layers": list(usage), "tokens": next(iter(usage.values())).tokens, **arrays}


def slot_weights(
    layer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Softmax weight of every slot in the joint softmax with the window, 0 where nothing has been absorbed.

    Args:
        layer: an NHA attention module.
        hidden_states: [B,T,hidden], its input.
        position_embeddings: cos and sin.
    Returns:
        weights [B,T,H,M] and log_decay [B,T,G,M], both fp32.
    """
    query, key, value, cos, sin = layer._nha_inputs(hidden_states, position_embeddings)
    log_decay, slot_q_scale, slot_bias = layer.nha(hidden_states)
    sinks, mask_empty = layer.config.nha_sinks, layer.config.nha_mask_empty
    _, lse, _ = nha_attention(
        query,
        key,
        value,
        log_decay,
        window=layer.nha_window,
        cos=cos,
        sin=sin,
        sinks=sinks,
        scale=layer.scaling,
        mask_empty=mask_empty,
        slot_q_scale=slot_q_scale,
        slot_bias=slot_bias,
        return_lse=True,
    )  # [B,T,H]
    scaled = query.float() if slot_q_scale is None else query.float() * slot_q_scale
    scores = slot_products(scaled, key.float(), log_decay, layer.nha_window, sinks) * layer.scaling  # [B,T,H,M]
    scores = scores if slot_bias is None else scores + slot_bias[:, None]
    weights = torch.exp(scores - lse.float()[..., None])
    if mask_empty:
        weights[:, : layer.nha_window + sinks] = 0
    return weights, log_decay


def slot_products(query: Tensor, key: Tensor, log_decay: Tensor, window: int, sinks: int) -> Tensor:
    """Products of every query with the slots' keys as that token finds them; 0 while the slots are empty.

    Args:
        query: [B,T,H,D], key: [B,T,G,D], log_decay: [B,T,G,M], all fp32.
    Returns:
        [B,T,H,M]
    """
    batch, time, heads, dim = query.shape
    groups, slots = log_decay.shape[2:]
    lead, pad = min(time, window + sinks), -time % TILE

    def absorbed(x: Tensor) -> Tensor:
        """[B*G,T',D or M]: row t holds what the slots take in before the output of t."""
        shifted = x[:, sinks : sinks + time - lead]
        return F.pad(shifted, (0, 0, 0, 0, lead, pad)).transpose(1, 2).reshape(batch * groups, time + pad, -1)

    decays = tile_decays(absorbed(log_decay))
    inside = absorbed(key).reshape(-1, TILE, dim)  # [B*G*C,L,D]
    states, _ = scan_states(decays, inside, None, batch * groups)  # [B*G,C,M,D]
    rows = F.pad(query, (0, 0, 0, 0, 0, pad)).view(batch, time + pad, groups, -1, dim).transpose(1, 2)  # [B,G,T',R,D]
    rows = rows.reshape(len(inside), -1, dim)
    products = tile_scores(decays, rows, states.flatten(0, 1), inside)  # [B*G*C,L*R,M]
    products = products.view(batch, groups, time + pad, -1, slots).transpose(1, 2)  # [B,T',G,R,M]
    return products.reshape(batch, time + pad, heads, slots)[:, :time]
