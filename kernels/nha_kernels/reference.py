"""The definition: one token at a time, in fp64, differentiable. Slow on purpose; every other path is held to it.

Legend: B rows, T time, H query heads, G key/value heads (R = H / G), D head_dim, M slots, W window, S sinks.
"""

from __future__ import annotations

import torch

from .gates import LOG_DECAY_FLOOR, write_strength
from .rotary import rotate
from .state import NHAState


def nha_recurrent(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    window: int,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    sinks: int = 0,
    scale: float | None = None,
    mask_empty: bool = True,
    slot_q_scale: torch.Tensor | None = None,
    slot_bias: torch.Tensor | None = None,
    padding_mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    initial_state: NHAState | None = None,
    branch: str = "both",
) -> tuple[torch.Tensor, torch.Tensor, NHAState]:
    """Gated memory slots, sinks and a sliding window under one softmax, token by token.

    Args:
        As `ops.nha_attention`.
    Returns:
        o [B,T,H,D] and lse [B,T,H] in fp64, and the final state.
    Source: arXiv 2510.07019, section 3.
    """
    q, k, v = q.double(), k.double(), v.double()
    log_decay = log_decay.double().clamp(min=LOG_DECAY_FLOOR)
    batch, time, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    slot_q = q if slot_q_scale is None else q * slot_q_scale.double()
    bias = q.new_zeros(heads) if slot_bias is None else slot_bias.double()
    if cos is not None and sin is not None:
        cos, sin = cos.double().expand(batch, -1, -1), sin.double().expand(batch, -1, -1)

    documents = _documents(batch, time, padding_mask, cu_seqlens)
    o = [[q.new_zeros(heads, dim)] * time for _ in range(batch)]
    lse = [[q.new_full((heads,), float("-inf"))] * time for _ in range(batch)]
    states = []
    split = [[row.unbind(0) for row in x.unbind(0)] for x in (q, slot_q, k, v, log_decay)]  # [B][T]
    for d, (b, places) in enumerate(documents):
        row = _Row(k.shape[2], log_decay.shape[-1], dim, window, sinks, q, cos, initial_state, d)
        for t in places:
            q_t, slot_q_t, k_t, v_t, log_decay_t = (x[b][t] for x in split)
            turn = (cos[b, t], sin[b, t]) if cos is not None and sin is not None else None
            row.append(k_t, v_t, log_decay_t, turn)
            o[b][t], lse[b][t] = row.attend(q_t, slot_q_t, turn, bias, scale, mask_empty, branch)
        states.append(row.state())
    stack = [torch.stack([torch.stack(row) for row in x]) for x in (o, lse)]
    return stack[0], stack[1], NHAState.cat(states)


def _documents(
    batch: int, time: int, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> list[tuple[int, list[int]]]:
    """Row and places of the real tokens of every document."""
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        return [(0, list(range(a, b))) for a, b in zip(ends[:-1], ends[1:], strict=True)]
    if padding_mask is None:
        return [(b, list(range(time))) for b in range(batch)]
    return [(b, padding_mask[b].nonzero()[:, 0].tolist()) for b in range(batch)]


class _Row:
    """One document in flight: slots, and every kept token by rank."""

    def __init__(
        self,
        groups: int,
        slots: int,
        dim: int,
        window: int,
        sinks: int,
        like: torch.Tensor,
        cos: torch.Tensor | None,
        initial: NHAState | None,
        row: int,
    ) -> None:
        self.window, self.sinks, self.seen = window, sinks, 0
        self.rotary_dim = 0 if cos is None else cos.shape[-1]
        self.slot_k = like.new_zeros(groups, slots, dim)  # [G,M,D]
        self.slot_v = like.new_zeros(groups, slots, dim)
        self.kept: dict[int, tuple] = {}  # rank -> k [G,D], v [G,D], log_decay [G,M] | None, (cos, sin) | None
        if initial is not None:
            self.slot_k, self.slot_v = initial.slot_k[row].double(), initial.slot_v[row].double()
            self.seen = int(initial.seen[row])
            for rank in range(self.seen):
                if rank < sinks:
                    at, ring = rank, False
                elif rank >= self.seen - window:
                    at, ring = rank % (window + 1), True
                else:
                    continue
                self.kept[rank] = self._load(initial, row, at, ring)

    def _load(self, s: NHAState, row: int, at: int, ring: bool) -> tuple:
        k, v, cos, sin = (
            (s.ring_k, s.ring_v, s.ring_cos, s.ring_sin) if ring else (s.sink_k, s.sink_v, s.sink_cos, s.sink_sin)
        )
        turn = (cos[row, at].double(), sin[row, at].double()) if self.rotary_dim else None
        log_decay = s.ring_log_decay[row, :, at].double() if ring else None
        return k[row, :, at].double(), v[row, :, at].double(), log_decay, turn

    def append(self, k: torch.Tensor, v: torch.Tensor, log_decay: torch.Tensor, turn: tuple | None) -> None:
        """Take a token in; the one that leaves the window, if it is no sink, goes into the slots."""
        self.kept[self.seen] = (k, v, log_decay, turn)
        leaving = self.seen - self.window
        self.seen += 1
        if leaving >= self.sinks:
            k, v, log_decay, _ = self.kept.pop(leaving)
            decay, write = log_decay.exp()[..., None], write_strength(log_decay)[..., None]  # [G,M,1]
            self.slot_k = decay * self.slot_k + write * k[:, None]
            self.slot_v = decay * self.slot_v + write * v[:, None]

    def attend(
        self,
        q: torch.Tensor,
        slot_q: torch.Tensor,
        turn: tuple | None,
        bias: torch.Tensor,
        scale: float,
        mask_empty: bool,
        branch: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Output [H,D] and lse [H] of the newest token."""
        heads, groups = q.shape[0], self.slot_k.shape[0]
        scores, values = [], []
        if branch != "window" and (not mask_empty or self.seen - self.window > self.sinks):
            grouped = slot_q.view(groups, heads // groups, -1)  # [G,R,D]
            scores.append(grouped @ self.slot_k.transpose(1, 2) * scale + bias.view(groups, -1, 1))  # [G,R,M]
            values.append(self.slot_v)
        if branch != "slots" and self.kept:
            grouped = (q if turn is None else rotate(q, *turn)).view(groups, heads // groups, -1)
            tokens = [self.kept[rank] for rank in sorted(self.kept)]
            keys = torch.stack([k if t is None else rotate(k, *t) for k, _, _, t in tokens], 1)  # [G,N,D]
            scores.append(grouped @ keys.transpose(1, 2) * scale)
            values.append(torch.stack([v for _, v, _, _ in tokens], 1))
        if not scores:
            return torch.zeros_like(q), q.new_full((heads,), float("-inf"))
        score = torch.cat(scores, -1)
        o = score.softmax(-1) @ torch.cat(values, 1)
        return o.reshape(heads, -1), score.logsumexp(-1).reshape(heads)

    def state(self) -> NHAState:
        """What a later call needs to go on."""
        groups, slots, dim = self.slot_k.shape
        state = NHAState.new(
            1,
            groups,
            slots,
            dim,
            window=self.window,
            sinks=self.sinks,
            rotary_dim=self.rotary_dim,
            dtype=torch.float64,
            device=self.slot_k.device,
        )
        places: dict[str, list[torch.Tensor]] = {}  # one tensor without batch per ring or sink place
        for name, x in state.tensors().items():
            if name.startswith(("ring", "sink")):
                along = 2 if x.dim() == 4 else 1
                places[name] = list(x[0].unbind(along - 1))
        for rank, (k, v, log_decay, turn) in self.kept.items():
            ring = rank >= self.sinks
            prefix, at = ("ring", rank % (self.window + 1)) if ring else ("sink", rank)
            places[f"{prefix}_k"][at], places[f"{prefix}_v"][at] = k, v
            if ring:
                places["ring_log_decay"][at] = log_decay
            if turn is not None:
                places[f"{prefix}_cos"][at], places[f"{prefix}_sin"][at] = turn
        tensors = state.tensors()
        for name, parts in places.items():
            if parts:
                tensors[name] = torch.stack(parts, 1 if tensors[name].dim() == 4 else 0)[None]
        tensors["slot_k"], tensors["slot_v"] = self.slot_k[None], self.slot_v[None]
        tensors["seen"] = torch.full_like(state.seen, self.seen)
        return state.with_tensors(tensors)
