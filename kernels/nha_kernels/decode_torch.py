"""One token per row in plain PyTorch, in place on the state.

Legend: B rows, H query heads, G key/value heads (R = H / G), D head_dim, M slots, C = W + 1 ring places, S sinks,
P rotary dims.
"""

from __future__ import annotations

import torch

from .gates import LOG_DECAY_FLOOR, write_strength
from .rotary import rotate
from .state import NHAState


def decode_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: NHAState,
    *,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float | None,
    mask_empty: bool,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    branch: str,
) -> torch.Tensor:
    """Take one token per row into the state and attend from it.

    Args:
        As `ops.nha_decode`.
    Returns:
        o [B,1,H,D] in q.dtype.
    """
    batch, _, heads, dim = q.shape
    groups, exact = k.shape[2], state.slot_k.dtype
    scale = dim**-0.5 if scale is None else scale
    rank = _common_rank(state, padding_mask)
    seeable = branch != "window" or state.window + state.sinks > 0
    if rank is not None and rank >= state.window + state.sinks and seeable:
        return _steady_step(q, k, v, log_decay, state, rank, cos, sin, scale, slot_q_scale, slot_bias, branch)
    real = torch.ones_like(state.seen, dtype=torch.bool) if padding_mask is None else padding_mask[:, 0]
    _take_in(k, v, log_decay, cos, sin, state, real)
    _absorb(state, real)
    state.seen += real

    grouped = q.to(exact).reshape(batch, groups, heads // groups, dim)  # [B,G,R,D]
    newest = state.seen - 1  # [B] rank
    scores, values = [grouped.new_empty(*grouped.shape[:3], 0)], [state.slot_v[:, :, :0]]
    if branch != "window":
        slot_q = grouped if slot_q_scale is None else grouped * slot_q_scale.to(exact).view(groups, -1, dim)
        score = slot_q @ state.slot_k.transpose(-1, -2) * scale  # [B,G,R,M]
        if slot_bias is not None:
            score = score + slot_bias.to(exact).view(groups, -1, 1)
        if mask_empty:
            empty = newest < state.window + state.sinks
            score = score.masked_fill(empty[:, None, None, None], float("-inf"))
        scores.append(score)
        values.append(state.slot_v)
    if branch != "slots":
        turned = grouped if cos is None or sin is None else rotate(grouped, cos[:, :, None], sin[:, :, None])
        for keys, value, seen in _exact_keys(state, newest):
            score = turned @ keys.to(exact).transpose(-1, -2) * scale
            scores.append(score.masked_fill(~seen[:, None, None], float("-inf")))
            values.append(value.to(exact))
    score = torch.cat(scores, -1)
    some = torch.isfinite(score).any(-1, keepdim=True) & real[:, None, None, None]
    weight = score.masked_fill(~some, 0).softmax(-1).masked_fill(~some, 0)
    o = weight @ torch.cat(values, 2)
    return o.reshape(batch, 1, heads, dim).to(q.dtype)


def _common_rank(state: NHAState, padding_mask: torch.Tensor | None) -> int | None:
    """Rank of the coming token, if it is real and the same in every row and known without waiting for a device."""
    if padding_mask is not None or state.seen.device.type != "cpu":
        return None
    ranks = set(state.seen.tolist())
    return ranks.pop() if len(ranks) == 1 else None


def _steady_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: NHAState,
    rank: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    branch: str,
) -> torch.Tensor:
    """`decode_step` where every row takes in the token of the same rank >= W + S.

    A token is absorbed, and nothing is masked but the ring place that it leaves. Few operations: at one token their
    number is the cost.
    """
    batch, _, heads, dim = q.shape
    groups, exact, window, sinks = k.shape[2], state.slot_k.dtype, state.window, state.sinks
    place, gone = rank % (window + 1), (rank - window) % (window + 1)
    for kept, x in ((state.ring_k, k), (state.ring_v, v), (state.ring_log_decay, log_decay)):
        kept.select(2, place).copy_(x.select(1, 0))
    if cos is not None and sin is not None:
        state.ring_cos.select(1, place).copy_(cos.select(1, 0))
        state.ring_sin.select(1, place).copy_(sin.select(1, 0))
    decay = state.ring_log_decay.select(2, gone).clamp(min=LOG_DECAY_FLOOR).unsqueeze(-1)  # [B,G,M,1]
    keep, write = decay.exp(), write_strength(decay)
    for slot, ring in ((state.slot_k, state.ring_k), (state.slot_v, state.ring_v)):
        slot.mul_(keep).addcmul_(write, ring.narrow(2, gone, 1).to(exact))
    state.seen += 1

    grouped = q.to(exact).reshape(batch, groups, -1, dim) * scale  # [B,G,R,D]
    scores, values = [], []
    if branch != "window":
        slot_q = grouped if slot_q_scale is None else grouped * slot_q_scale.to(exact).view(groups, -1, dim)
        score = slot_q @ state.slot_k.transpose(2, 3)  # [B,G,R,M]
        scores.append(score if slot_bias is None else score.add_(slot_bias.to(exact).view(groups, -1, 1)))
        values.append(state.slot_v)
    if branch != "slots" and window + sinks:
        keys, turn = [state.sink_k] * (sinks > 0), [(state.sink_cos, state.sink_sin)] * (sinks > 0)
        values += [state.sink_v.to(exact)] * (sinks > 0)
        if window:
            keys, turn = [*keys, state.ring_k], [*turn, (state.ring_cos, state.ring_sin)]
            values.append(state.ring_v.to(exact))
        key = torch.cat(keys, 2).to(exact)  # [B,G,S+C,D]
        if cos is not None and sin is not None:
            every_cos, every_sin = (torch.cat(x, 1).unsqueeze(1) for x in zip(*turn, strict=True))
            key = rotate(key, every_cos, every_sin)
            grouped = rotate(grouped, cos.unsqueeze(1), sin.unsqueeze(1))
        score = grouped @ key.transpose(2, 3)
        if window:
            score.select(3, sinks + gone).fill_(float("-inf"))
        scores.append(score)
    weight = torch.cat(scores, 3).softmax(-1)
    return (weight @ torch.cat(values, 2)).view(batch, 1, heads, dim).to(q.dtype)


def _take_in(
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    state: NHAState,
    real: torch.Tensor,
) -> None:
    """Write the token at its ring place, or among the sinks if its rank is below S."""
    rows = torch.arange(len(real), device=real.device)
    to_sink = real & (state.seen < state.sinks)
    for prefix, places, chosen in (
        ("sink", state.sinks, to_sink),
        ("ring", state.window + 1, real & ~to_sink),
    ):
        if places == 0:
            continue
        at = state.seen % places
        new = {"k": k[:, 0], "v": v[:, 0]}
        if cos is not None and sin is not None:
            new |= {"cos": cos[:, 0].expand(len(real), -1), "sin": sin[:, 0].expand(len(real), -1)}
        if prefix == "ring":
            new["log_decay"] = log_decay[:, 0]
        for name, x in new.items():
            kept = getattr(state, f"{prefix}_{name}")
            index = (rows, slice(None), at) if kept.dim() == 4 else (rows, at)
            where = chosen.view(-1, *[1] * (x.dim() - 1))
            kept[index] = torch.where(where, x.to(kept.dtype), kept[index])


def _absorb(state: NHAState, real: torch.Tensor) -> None:
    """Let the slots take the token that leaves the window, where there is one that is no sink."""
    rows = torch.arange(len(real), device=real.device)
    leaving = state.seen - state.window  # [B] rank
    chosen = real & (leaving >= state.sinks)
    at = leaving.remainder(state.window + 1)
    log_decay = state.ring_log_decay[rows, :, at].clamp(min=LOG_DECAY_FLOOR)
    log_decay = log_decay.masked_fill(~chosen[:, None, None], 0.0)[..., None]  # [B,G,M,1]; 0 keeps the slot as it is
    decay, write = log_decay.exp(), write_strength(log_decay)
    for slot, ring in ((state.slot_k, state.ring_k), (state.slot_v, state.ring_v)):
        slot.mul_(decay).addcmul_(write, ring[rows, :, at].to(slot.dtype)[:, :, None])


def _exact_keys(state: NHAState, rank: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Rotated keys, values and visibility [B,places] of the sinks and of the ring."""
    parts = []
    if state.sinks:
        keys = rotate(state.sink_k.to(state.slot_k.dtype), state.sink_cos[:, None], state.sink_sin[:, None])
        seen = torch.arange(state.sinks, device=rank.device) <= rank[:, None]
        parts.append((keys, state.sink_v, seen))
    if state.window:
        places = torch.arange(state.window + 1, device=rank.device)
        age = (rank[:, None] - places).remainder(state.window + 1)  # tokens since that place was written
        seen = (age < state.window) & (rank[:, None] - age >= state.sinks)
        keys = rotate(state.ring_k.to(state.slot_k.dtype), state.ring_cos[:, None], state.ring_sin[:, None])
        parts.append((keys, state.ring_v, seen))
    return parts
