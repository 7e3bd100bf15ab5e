"""The Triton path: brings a call into the kernels' flat layout, and the final state out of it.

Legend: B rows, T time, N documents, L query tokens in all, X key places in all, H query heads, G key/value heads,
D head_dim, M slots, W window, S sinks, P rotary dims.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .library import tile_attention
from .rotary import rotate
from .state import NHAState, ring_ranks


def nha_tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    *,
    window: int,
    sinks: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float | None,
    mask_empty: bool,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    initial_state: NHAState | None,
    branch: str,
    output_final_state: bool,
    return_lse: bool,
    by_name: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None, NHAState | None]:
    """`reference.nha_recurrent` on the Triton kernels.

    Args:
        As `ops.nha_attention`.
        by_name: run the kernels also where nothing can leave the window and PyTorch's own attention is the same.
    Returns:
        o [B,T,H,D] in q.dtype, lse [B,T,H] fp32 or None, final state or None.
    """
    batch, time, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    k, v = k.to(q.dtype), v.to(q.dtype)
    simple = initial_state is None and padding_mask is None and cu_seqlens is None and time <= window + sinks
    if simple and not by_name and mask_empty and branch != "slots" and not return_lse and not output_final_state:
        return _softmax_attention(q, k, v, cos, sin, scale), None, None
    rows = _Rows(q.shape, padding_mask, cu_seqlens, q.device)
    state = initial_state
    past = 0 if state is None else window + sinks
    tokens = [k, v, log_decay.float(), *(x.expand(batch, -1, -1) if past else x for x in (cos, sin) if x is not None)]
    flat = [rows.flat(x) for x in tokens]
    if state is not None:
        flat = rows.with_past(flat, state)
    turns = flat[3:] if len(flat) > 3 else [None, None]
    o, lse, final = tile_attention(
        rows.flat(q),
        *flat[:3],
        *turns,
        None if slot_q_scale is None else slot_q_scale.float().contiguous(),
        None if slot_bias is None else slot_bias.float().contiguous(),
        None if state is None else torch.stack([state.slot_k, state.slot_v]).float(),
        None if state is None else state.seen,
        rows.starts,
        rows.lengths,
        rows.documents,
        window if state is not None else min(window, time),
        sinks,
        past,
        scale,
        mask_empty,
        branch,
        output_final_state,
    )
    after = None
    if output_final_state:
        after = rows.final_state(flat, final, state, window, sinks, past, log_decay.shape[2:], dim)
    return rows.spread(o, 0.0), rows.spread(lse, float("-inf")) if return_lse else None, after


def _softmax_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor | None, sin: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Every key is exact and visible: causal softmax attention [B,T,H,D] as the base model computes it."""
    if cos is not None and sin is not None:
        q, k = (rotate(x, cos[:, :, None], sin[:, :, None]) for x in (q, k))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2)


class _Rows:
    """Where the documents' tokens stand; never asks the device for a value.

    Attributes:
        documents: N.
        starts, lengths: [N] int64 first token and number of tokens, or None where all have T.
    """

    def __init__(
        self,
        shape: torch.Size,
        padding_mask: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        device: torch.device,
    ) -> None:
        self.batch, self.time = shape[:2]
        self.documents, self.starts, self.lengths = self.batch, None, None
        self.order: torch.Tensor | None = None  # [L] places of the input, real tokens of each row first
        self.device, self.mask = device, None if padding_mask is None else padding_mask.to(device)
        if cu_seqlens is not None:
            cu_seqlens = cu_seqlens.to(device)
            self.documents = cu_seqlens.shape[0] - 1
            self.starts, self.lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        elif self.mask is not None:
            first = torch.arange(self.batch, device=device) * self.time
            self.starts, self.lengths = first, self.mask.sum(1)
            self.order = (torch.argsort(~self.mask, dim=1, stable=True) + first[:, None]).flatten()

    def flat(self, x: torch.Tensor) -> torch.Tensor:
        """[L,...] contiguous from [B,T,...]; rotary factors that all rows share, [1,T,P], stay one row."""
        if self.order is not None and x.shape[0] != self.batch:
            x = x.expand(self.batch, *x.shape[1:])
        x = x.reshape(-1, *x.shape[2:])
        return x.contiguous() if self.order is None else x.index_select(0, self.order)

    def spread(self, x: torch.Tensor, fill: float) -> torch.Tensor:
        """[B,T,...] from [L,...], `fill` in place of padding."""
        if self.mask is None or self.starts is None:
            return x.view(self.batch, self.time, *x.shape[1:])
        rank = (self.mask.cumsum(1) - 1).clamp(min=0) + self.starts[:, None]
        x = x.index_select(0, rank.flatten()).view(self.batch, self.time, *x.shape[1:])
        return x.masked_fill(~self.mask.view(self.batch, self.time, *[1] * (x.dim() - 2)), fill)

    def _first(self) -> torch.Tensor:
        """[N] first token of every document."""
        if self.starts is not None:
            return self.starts
        return torch.arange(self.documents, device=self.device) * self.time

    def _length(self) -> torch.Tensor:
        """[N] tokens of every document."""
        return torch.full_like(self._first(), self.time) if self.lengths is None else self.lengths

    def with_past(self, flat: list[torch.Tensor], state: NHAState) -> list[torch.Tensor]:
        """Keys, values, log decay and rotary factors [X,...] with each document's sinks and ring before its own.

        Args:
            flat: k, v [L,G,D], log_decay [L,G,M] and, where keys are rotated, cos, sin [L,P].
            state: what is held.
        """
        first, length, seen = self._first(), self._length(), state.seen
        number, past = self.documents, state.window + state.sinks
        sink = torch.arange(state.sinks, device=self.device)
        held = sink < seen[:, None]  # [N,S]; the other sinks are among the new tokens
        new = (first[:, None] + (sink - seen[:, None]).clamp(min=0).minimum((length[:, None] - 1).clamp(min=0))).clamp(
            max=flat[0].shape[0] - 1
        )
        place = (seen[:, None] - state.window + torch.arange(state.window, device=self.device)).remainder(
            state.window + 1
        )
        index = self._interleave(flat[0].shape[0], past)
        ring = ("ring_k", "ring_v", "ring_log_decay", "ring_cos", "ring_sin")
        sinks = ("sink_k", "sink_v", None, "sink_cos", "sink_sin")
        out = []
        for x, ring_name, sink_name in zip(flat, ring, sinks, strict=False):
            kept = _tokens_first(getattr(state, ring_name))
            kept = kept.gather(1, _index(place, kept)).to(x.dtype)  # [N,W,...]
            chosen = x[new.flatten()].view(number, -1, *x.shape[1:])
            if sink_name is not None:
                old = _tokens_first(getattr(state, sink_name)).to(x.dtype)
                chosen = torch.where(held.view(*held.shape, *[1] * (x.dim() - 1)), old, chosen)
            before = torch.cat([chosen, kept], 1)  # [N,S+W,...]
            if index is None:
                out.append(torch.cat([before, x.view(number, -1, *x.shape[1:])], 1).flatten(0, 1))
            else:
                out.append(torch.cat([before.flatten(0, 1), x]).index_select(0, index))
        return out

    def _interleave(self, tokens: int, past: int) -> torch.Tensor | None:
        """Which of N * past places of the past, then `tokens`, stands at each place; None for rows of equal length."""
        if self.starts is None or self.lengths is None or self.order is not None:
            return None
        own = torch.arange(tokens, device=self.device)
        doc = torch.searchsorted((self.starts + self.lengths)[:-1].contiguous(), own, right=True)
        index = torch.empty(self.documents * past + tokens, dtype=torch.int64, device=self.device)
        index[own + (doc + 1) * past] = self.documents * past + own
        at = (self.starts + torch.arange(self.documents, device=self.device) * past)[:, None]
        at = at + torch.arange(past, device=self.device)
        index[at.flatten()] = torch.arange(self.documents * past, device=self.device)
        return index

    def final_state(
        self,
        flat: list[torch.Tensor],
        final: torch.Tensor,
        state: NHAState | None,
        window: int,
        sinks: int,
        past: int,
        heads: torch.Size,
        dim: int,
    ) -> NHAState:
        """What a later call needs.

        Args:
            flat: as the kernels got them, with the past.
            final: [2,N,G,M,D] slots, or empty where nothing was absorbed.
        """
        groups, slots = heads
        rotary = flat[3].shape[-1] if len(flat) > 3 else 0
        number = self.documents
        out = NHAState.new(
            number,
            groups,
            slots,
            dim,
            window=window,
            sinks=sinks,
            rotary_dim=rotary,
            dtype=flat[0].dtype,
            device=self.device,
        )
        seen = torch.zeros_like(self._first()) if state is None else state.seen
        end = seen + self._length()
        tensors: dict[str, Any] = {"seen": end}
        if final.numel():
            tensors["slot_k"], tensors["slot_v"] = final.unbind(0)
        first = self._first() + torch.arange(number, device=self.device) * past
        rank, held = ring_ranks(end, window, sinks)  # [N,W+1]
        ring = first[:, None] + past + rank - seen[:, None]
        sink = torch.arange(sinks, device=self.device)
        reached = sink < end[:, None]
        names = ("k", "v", "log_decay", "cos", "sin")
        for name, x in zip(names, flat, strict=False):
            shared = name in ("cos", "sin") and x.shape[0] != flat[0].shape[0]  # one row of factors for all
            offset = first[:, None] if shared else 0
            for prefix, at, ok in (("ring", ring, held), ("sink", first[:, None] + sink, reached)):
                if prefix == "sink" and name == "log_decay":
                    continue
                kept = getattr(out, f"{prefix}_{name}")
                y = x[(at - offset).clamp(0, x.shape[0] - 1).flatten()].view(*at.shape, *x.shape[1:])
                y = y.masked_fill(~ok.view(*ok.shape, *[1] * (y.dim() - 2)), 0)
                tensors[f"{prefix}_{name}"] = (y.transpose(1, 2) if y.dim() == 4 else y).contiguous().to(kept.dtype)
        return out.with_tensors(out.tensors() | tensors)


def _tokens_first(x: torch.Tensor) -> torch.Tensor:
    """[N,C,(G,)D] from [N,(G,)C,D]."""
    return x.transpose(1, 2) if x.dim() == 4 else x


def _index(place: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Places [N,W] shaped to gather along dimension 1 of x."""
    return place.view(*place.shape, *[1] * (x.dim() - 2)).expand(*place.shape, *x.shape[2:])
