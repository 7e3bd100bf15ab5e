"""The chunked PyTorch path: linear memory in T, differentiable; the CPU backend.

Brings a call into the core's layout: rows compacted, the tokens of the past before the call's own, every absorbed token
at the place of the query before which it is absorbed.

Legend: B rows, T time, H query heads, G key/value heads (R = H / G), N = B x G, D head_dim, M slots, W window, S sinks,
P rotary dims, A places of the key array (W of the past, T padded to blocks, one block of nothing).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .core import SlotWindowAttention
from .gates import LOG_DECAY_FLOOR
from .rotary import rotate, rotate_into
from .rows import Rows, by_document, by_mask
from .segments import Inputs, Plan
from .state import NHAState, ring_ranks
from .tiles import TILE

WORKSPACE = {"cpu": 2_400_000}  # scores held at once: what caches hold, more elsewhere
WORKSPACE_ELSEWHERE = 100_000_000
PIECE = 1024  # tokens to work on together where nothing is kept for a gradient


def nha_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial_state: NHAState | None,
    output_final_state: bool,
    return_lse: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None, NHAState | None]:
    """Chunked form of `reference.nha_recurrent`.

    Args:
        As `ops.nha_attention`.
    Returns:
        o [B,T,H,D], lse [B,T,H] if return_lse, final state if output_final_state; None otherwise.
    """
    with torch.autocast(q.device.type, enabled=False):
        exact = torch.float64 if torch.float64 in (q.dtype, k.dtype, v.dtype, log_decay.dtype) else torch.float32
        kept = k.dtype if exact == torch.float32 else exact
        tokens = [x.to(exact) for x in (q, k, v)] + [log_decay.to(exact).clamp(min=LOG_DECAY_FLOOR)]
        if cos is not None and sin is not None:
            tokens += [cos.to(exact), sin.to(exact)]
        groups = _row_groups(q, padding_mask, cu_seqlens)
        if groups is None:
            return _run(tokens, None, initial_state, kept, output_final_state, return_lse, **options)
        results = []
        for rows in groups:
            state = initial_state if rows.index is None or initial_state is None else initial_state.select(rows.index)
            taken = [rows.take(x.expand(q.shape[0], *x.shape[1:])) for x in tokens]
            results.append(_run(taken, rows.lengths, state, kept, output_final_state, return_lse, **options))
        return Rows.join(groups, results, q.shape[0], q.shape[1])


def _row_groups(
    q: torch.Tensor, padding_mask: torch.Tensor | None, cu_seqlens: torch.Tensor | None
) -> list[Rows] | None:
    """Rows to run together, real tokens first; None where the input is that already."""
    if cu_seqlens is not None:
        return by_document(cu_seqlens.to(q.device))
    if padding_mask is None or bool(padding_mask.all()):
        return None
    return [by_mask(padding_mask)]


def _run(
    tokens: list[torch.Tensor],
    lengths: torch.Tensor | None,
    state: NHAState | None,
    kept: torch.dtype,
    output_final_state: bool,
    return_lse: bool,
    *,
    window: int,
    sinks: int,
    scale: float | None,
    mask_empty: bool,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    branch: str,
) -> tuple[torch.Tensor, torch.Tensor | None, NHAState | None]:
    """Rows whose real tokens come first, `lengths` [B] of them (None: all).

    Long calls without gradient go piece by piece, so that what a piece makes stays in caches and with the allocator.
    """
    settings = (window, sinks, scale, slot_q_scale, slot_bias, mask_empty, branch)
    call = _Call(tokens, lengths, state, *settings)
    if call.plain and not return_lse:
        return call.softmax_attention(), None, call.final_state(None, kept) if output_final_state else None
    step = max(PIECE // call.batch, 4 * call.window, 8 * TILE) // TILE * TILE
    if call.differentiable() or call.time <= step:
        o, lse, slots = call.attend(output_final_state)
        return o.flatten(2, 3), lse, call.final_state(slots, kept) if output_final_state else None

    o = call.q.new_empty(call.batch, call.time, call.groups, call.heads // call.groups, call.dim)
    lse = o.new_empty(call.batch, call.time, call.heads)
    for at in range(0, call.time, step):
        place = slice(at, min(at + step, call.time))
        left = None if lengths is None else (lengths - at).clamp(0, step)
        piece = _Call([x[:, place] for x in tokens], left, state, *settings)
        o[:, place], lse[:, place], slots = piece.attend(output_final_state)
        state = piece.final_state(slots, kept)
    return o.flatten(2, 3), lse, state if output_final_state else None


class _Call:
    """One call in the core's layout."""

    def __init__(
        self,
        tokens: list[torch.Tensor],
        lengths: torch.Tensor | None,
        state: NHAState | None,
        window: int,
        sinks: int,
        scale: float | None,
        slot_q_scale: torch.Tensor | None,
        slot_bias: torch.Tensor | None,
        mask_empty: bool,
        branch: str,
    ) -> None:
        self.q, self.k, self.v, self.log_decay = tokens[:4]
        self.cos: torch.Tensor | None = tokens[4] if len(tokens) > 4 else None
        self.sin: torch.Tensor | None = tokens[5] if len(tokens) > 4 else None
        self.lengths, self.state, self.branch, self.mask_empty = lengths, state, branch, mask_empty
        self.batch, self.time, self.heads, self.dim = self.q.shape
        self.groups, self.slots = self.log_decay.shape[2:]
        self.full_window, self.sinks = window, sinks
        self.window = window if state is not None else min(window, self.time)
        self.scale = self.dim**-0.5 if scale is None else scale
        self.slot_q_scale, self.slot_bias = slot_q_scale, slot_bias
        self.absorbs = state is not None or self.time > window + sinks  # False: no token can be absorbed
        self.plain = not self.absorbs and mask_empty and branch != "slots"
        self.seen = torch.zeros(1, dtype=torch.int64, device=self.q.device) if state is None else state.seen

        self.steady = False  # True: known that every row is past its first W + S tokens, so that nothing is hidden
        if state is not None and state.seen.device.type == "cpu":
            self.steady = bool((state.seen >= self.window + sinks).all())

    def differentiable(self) -> bool:
        """Whether a gradient may be asked of this call."""
        tensors = [self.q, self.k, self.v, self.log_decay, self.slot_q_scale, self.slot_bias]
        tensors += [] if self.state is None else list(self.state.tensors().values())
        return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)

    def softmax_attention(self) -> torch.Tensor:
        """Every key is exact and visible: causal softmax attention [B,T,H,D]."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        q, k = _turned(q, self.cos, self.sin), _turned(k, self.cos, self.sin)
        grouped = self.heads != self.groups
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        return o.transpose(1, 2)

    def plan(self) -> Plan:
        """Sizes of this call."""
        up = -(-self.time // TILE) * TILE
        block = min(32 if self.window <= 64 else 64, up)
        closed = self.window + self.sinks if self.state is None and self.mask_empty else 0
        return Plan(
            tokens=-(-self.time // block) * block,
            start=closed // TILE * TILE,
            window=self.window,
            sinks=self.sinks,
            hidden=0 if self.steady else self.window + self.sinks,
            repeat=self.heads // self.groups,
            block=block,
            scale=self.scale,
            fresh=self.state is None,
            attend_slots=self.branch != "window" and (self.absorbs or not self.mask_empty),
            attend_window=self.branch != "slots",
            workspace=WORKSPACE.get(self.q.device.type, WORKSPACE_ELSEWHERE),
        )

    def attend(self, output_final_state: bool) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor] | None]:
        """o [B,T,G,R,D], lse [B,T,H] and the final slots [B,G,M,D] x 2, or None if nothing was absorbed."""
        p = self.plan()
        inputs = self.inputs(p, p.attend_slots or (self.absorbs and output_final_state))
        masks = {name: getattr(inputs, name) for name in ("key_mask", "slot_mask", "sink_mask")}
        tensors = [x for name, x in vars(inputs).items() if name not in masks]
        o, lse, *slots = SlotWindowAttention.apply(p, masks, *tensors)
        o = o.view(self.batch, self.groups, p.tokens, p.repeat, self.dim)[:, :, : self.time]
        lse = lse.view(self.batch, self.groups, p.tokens, p.repeat)[:, :, : self.time]
        o = o.transpose(1, 2)  # [B,T,G,R,D]
        lse = lse.transpose(1, 2).reshape(self.batch, self.time, self.heads)
        if slots[0] is None:
            return o, lse, None
        return o, lse, [x.view(self.batch, self.groups, self.slots, self.dim) for x in slots]

    def inputs(self, p: Plan, with_slots: bool) -> Inputs:
        """The core's tensors."""
        fresh, tail = self.state is None, p.tokens - self.time + p.block
        front = self.window if fresh else 0
        k, v, log_decay, cos, sin = self.with_past()
        sink_k, sink_v, sink_cos, sink_sin = self.sink_tokens()
        has_sinks = self.sinks > 0 and p.attend_window
        bias = None
        if p.attend_slots and self.slot_bias is not None:
            bias = self.slot_bias.to(k.dtype).view(1, self.groups, -1).expand(self.batch, -1, -1).flatten(0, 1)

        def keys(x: torch.Tensor, *turn: torch.Tensor | None) -> torch.Tensor:  # [N,A,D] from [B,G,X,D]
            cos, sin = (y[:, None] if y is not None else None for y in turn) if turn else (None, None)
            return rotate_into(x, cos, sin, front, tail).flatten(0, 1)

        state = self.state if with_slots else None
        return Inputs(
            slot_q=self.slot_queries(p) if p.attend_slots else None,
            q=self.queries(self.q, p, 0, self.cos, self.sin) if p.attend_window else None,
            turned_k=keys(k, cos, sin) if p.attend_window and p.window else None,
            k=keys(k) if with_slots else None,
            v=keys(v),
            log_decay=self.absorbed_decay(log_decay, p) if with_slots else None,
            slot_bias=bias,
            sink_k=_turned(sink_k, sink_cos, sink_sin).flatten(0, 1) if has_sinks else None,
            sink_v=sink_v.flatten(0, 1) if has_sinks else None,
            slot_k=None if state is None else state.slot_k.to(k.dtype).flatten(0, 1),
            slot_v=None if state is None else state.slot_v.to(k.dtype).flatten(0, 1),
            **({} if self.steady else self.masks(p)),
        )

    def queries(
        self, x: torch.Tensor, p: Plan, start: int, cos: torch.Tensor | None = None, sin: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[N,(T-start)*R,D] from [B,T,H,D], rotated by cos and sin [B or 1,T,P]."""
        x = x[:, start:].view(self.batch, -1, self.groups, p.repeat, self.dim).transpose(1, 2)  # [B,G,T,R,D]
        cos, sin = (None if y is None else y[:, None, :, None] for y in (cos, sin))
        return rotate_into(x, cos, sin, 0, p.tokens - self.time).view(self.batch * self.groups, -1, self.dim)

    def slot_queries(self, p: Plan) -> torch.Tensor:
        """[N,T'*R,D] times scale and slot_q_scale."""
        factor = self.scale if self.slot_q_scale is None else self.slot_q_scale.to(self.q.dtype) * self.scale
        return self.queries(self.q * factor, p, p.start)

    def with_past(self) -> list[Any]:
        """Un-rotated k, v [B,G,X,D], log_decay [B,G,X,M], cos, sin [B or 1,X,P] or None; X is W of the past, then T."""
        own: list[Any] = [x.transpose(1, 2) for x in (self.k, self.v, self.log_decay)]
        own += [self.cos, self.sin]
        s = self.state
        if s is None or self.window == 0:
            return own
        rank = self.seen[:, None] - self.window + torch.arange(self.window, device=self.q.device)
        place = rank.remainder(self.window + 1)  # [B,W]
        past = [s.ring_k, s.ring_v, s.ring_log_decay, s.ring_cos, s.ring_sin]
        return [
            y if y is None else torch.cat([_pick(x, place).to(y.dtype), y.expand(self.batch, *y.shape[1:])], -2)
            for x, y in zip(past, own, strict=True)
        ]

    def absorbed_decay(self, log_decay: torch.Tensor, p: Plan) -> torch.Tensor:
        """[N,T',M] log decay of the token that is absorbed before each query, 0 where there is none."""
        length = p.tokens - p.start
        if self.state is None:
            log_decay = log_decay[:, :, self.sinks : max(self.time - self.window, self.sinks)]
            front = min(self.window + self.sinks, p.tokens) - p.start
        else:
            log_decay, front = log_decay[:, :, : self.time], 0
        log_decay = F.pad(log_decay, (0, 0, front, length - front - log_decay.shape[2]))
        if self.state is not None or self.lengths is not None:
            place = torch.arange(p.start, p.tokens, device=self.q.device)
            length_of = self.time if self.lengths is None else self.lengths[:, None]
            taken = (self.seen[:, None] + place - self.window >= self.sinks) & (place < length_of)  # [B,T']
            log_decay = log_decay.masked_fill(~taken[:, None, :, None], 0.0)
        return log_decay.reshape(-1, length, self.slots)

    def sink_tokens(self) -> list[Any]:
        """Un-rotated sink k, v [B,G,S,D] and cos, sin [B or 1,S,P] or None; places not reached yet hold anything."""
        own: list[Any] = [x.transpose(1, 2) for x in (self.k, self.v)]
        own += [self.cos, self.sin]
        s = self.state
        place = torch.arange(self.sinks, device=self.q.device)
        if s is None:
            return [x if x is None else x[..., place.clamp(max=self.time - 1), :] for x in own]
        new = (place - self.seen[:, None]).clamp(0, self.time - 1)  # [B,S]
        kept = place < self.seen[:, None]
        out = []
        for old, x in zip([s.sink_k, s.sink_v, s.sink_cos, s.sink_sin], own, strict=True):
            if x is not None:
                x = _pick(x.expand(self.batch, *x.shape[1:]), new)
                x = torch.where(kept.view(self.batch, *[1] * (x.dim() - 3), -1, 1), old.to(x.dtype), x)
            out.append(x)
        return out

    def masks(self, p: Plan) -> dict[str, torch.Tensor | None]:
        """Additive masks of keys, slots and sinks, 0 or -inf; None where nothing is hidden."""
        device = self.q.device
        out: dict[str, torch.Tensor | None] = {}
        hidden = self.window + self.sinks  # only what lies before this rank can be hidden

        def rows(seen: torch.Tensor) -> torch.Tensor:  # [N,...] from bool [B or 1,...]
            bias = torch.zeros(seen.shape, dtype=self.q.dtype, device=device).masked_fill_(~seen, float("-inf"))
            bias = bias[:, None].expand(self.batch, self.groups, *bias.shape[1:])
            return bias.reshape(-1, *bias.shape[2:])

        if p.attend_window and p.window:
            place = torch.arange(p.tokens + p.window + p.block, device=device)
            out["key_mask"] = rows(self.seen[:, None] + place - p.window >= self.sinks)
        if p.attend_slots and self.mask_empty and hidden > p.start:
            token = torch.arange(p.start, min(hidden, p.tokens), device=device)
            out["slot_mask"] = rows(self.seen[:, None] + token >= hidden)
        if p.attend_window and self.sinks:
            rank = self.seen[:, None] + torch.arange(min(self.sinks, p.tokens), device=device)
            out["sink_mask"] = rows(rank[..., None] >= torch.arange(self.sinks, device=device))
        return out

    def final_state(self, slots: list[torch.Tensor] | None, kept: torch.dtype) -> NHAState:
        """What a later call needs; `slots` [B,G,M,D] x 2, or None if nothing was absorbed."""
        out = NHAState.new(
            self.batch,
            self.groups,
            self.slots,
            self.dim,
            window=self.full_window,
            sinks=self.sinks,
            rotary_dim=0 if self.cos is None else self.cos.shape[-1],
            dtype=kept,
            device=self.q.device,
        )
        end = self.seen + (self.time if self.lengths is None else self.lengths)  # [B or 1]
        tensors = {"seen": end.expand(self.batch).clone()}
        if slots is not None:
            tensors["slot_k"], tensors["slot_v"] = slots
        rank, held = ring_ranks(end, self.full_window, self.sinks)
        past = 0 if self.state is None else self.window
        at = (rank - self.seen[:, None] + past).clamp(0, self.time + past - 1).expand(self.batch, -1)
        reached = torch.arange(self.sinks, device=self.q.device) < end[:, None]
        names = ("k", "v", "log_decay", "cos", "sin")
        for name, x in zip(names, self.with_past(), strict=True):
            if x is not None:
                x = _pick(x.expand(self.batch, *x.shape[1:]), at)
                tensors[f"ring_{name}"] = x.masked_fill(~_like(held, x), 0).to(getattr(out, f"ring_{name}").dtype)
        for name, x in zip(("k", "v", "cos", "sin"), self.sink_tokens(), strict=True):
            if x is not None:
                x = x.expand(self.batch, *x.shape[1:])
                tensors[f"sink_{name}"] = x.masked_fill(~_like(reached, x), 0).to(getattr(out, f"sink_{name}").dtype)
        return out.with_tensors(out.tensors() | tensors)


def _turned(x: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None) -> torch.Tensor:
    """x [B,heads,X,D] rotated by cos and sin [B or 1,X,P]."""
    return x if cos is None or sin is None else rotate(x, cos[:, None], sin[:, None])


def _pick(x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """[B,(G,)N,D] of x [B,(G,)X,D] at places [B,N]."""
    index = place[:, None, :, None] if x.dim() == 4 else place[:, :, None]
    return x.gather(-2, index.expand(*x.shape[:-2], place.shape[1], x.shape[-1]))


def _like(mask: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Row mask [B or 1,X] shaped to x [B,(G,)X,D]."""
    return mask[:, None, :, None] if x.dim() == 4 else mask[:, :, None]
