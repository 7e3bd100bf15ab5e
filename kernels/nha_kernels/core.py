"""The chunked path's differentiable core: one softmax over slots, sinks and window.

Scores never exist for the whole sequence at once; what is kept for the backward pass is the inputs, the output, its
lse and the state at the start of every tile.

Legend: N = B x G rows, T tokens (padded to whole blocks), R query heads per key/value head, D head_dim, M slots,
n, t, t': rows, tokens, and tokens that may see slots, of one segment.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from .adjoint import gradients
from .segments import EMPTY, Group, Inputs, Plan
from .tiles import fade, mix, tile_scores

FUSED = ("cpu",)  # devices on which PyTorch's own fused attention takes sinks and window


def _attend(g: Group, segment: slice, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Write output [n,t*R,D] and lse [n,t*R] of a segment into [n,T*R,..]."""
    plan, tail = g.plan, g.sees_slots(segment)
    rows = slice(segment.start * plan.repeat, segment.stop * plan.repeat)
    o, lse = o[:, rows], lse[:, rows]
    out, top = _exact(g, segment, o)
    if not plan.attend_slots or tail.start >= tail.stop:
        o.copy_(out)
        lse.copy_(top)
        return
    o[:, : tail.start], lse[:, : tail.start] = out[:, : tail.start], top[:, : tail.start]
    out, exact_top, o, lse = out[:, tail], top[:, tail].clamp(min=EMPTY), o[:, tail], lse[:, tail]

    d, (state_k, state_v), (absorbed_k, absorbed_v) = g.slot_side(segment)
    slot, offset = tile_scores(d, g.slot_queries(segment), state_k, absorbed_k), g.slot_offset(segment)
    top = torch.maximum(exact_top, slot.amax(-1).view_as(offset) + offset)  # [n,t'*R]
    slot.sub_((top - offset).view(*slot.shape[:2], 1)).exp_()
    share = exact_top.sub_(top).exp_() if plan.attend_exact else torch.zeros_like(top)
    total = slot.sum(-1).view_as(top) + share
    read = torch.bmm(fade(d, slot), state_v).baddbmm_(mix(d, slot), absorbed_v).view_as(out)
    inverse = total.clamp(min=1e-30).reciprocal_()
    out.mul_((share * inverse)[..., None])
    torch.addcmul(out, read, inverse[..., None], out=o)
    torch.add(top, total.log_(), out=lse)


def _exact(g: Group, segment: slice, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [n,t*R,D] and lse [n,t*R] of a segment over window and sinks alone; 0 and -inf where there are none."""
    if not g.plan.attend_exact:
        return torch.zeros_like(like), torch.full(like.shape[:2], float("-inf"), dtype=like.dtype, device=like.device)
    if like.device.type in FUSED:
        queries, keys, values, mask = g.exact_keys(segment)
        out, top = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, attn_mask=mask, scale=g.plan.scale
        )
        return out.view(like.shape), top.view(like.shape[:2])
    window = g.window_scores(segment) if g.plan.window else None
    sink = None if g.x.sink_k is None else g.sink_scores(segment)
    parts = [x.view(*like.shape[:2], -1) for x in (window, sink) if x is not None]
    top = torch.stack([x.logsumexp(-1) for x in parts]).logsumexp(0)  # [n,t*R]
    out = torch.zeros_like(like)
    if window is not None:
        weights = window.sub_(top.view(*window.shape[:2], 1)).exp_()
        out = torch.bmm(weights, g.spans(g.x.v, segment)).view(like.shape)
    if sink is not None:
        assert g.x.sink_v is not None
        out.baddbmm_(sink.sub_(top[..., None]).exp_(), g.x.sink_v)
    return out, top


class SlotWindowAttention(torch.autograd.Function):
    """o [N,T*R,D], lse [N,T*R] and the final slot keys and values [N,M,D] (or None) of `Inputs`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, masks: dict[str, Any], *tensors: Any) -> Any:
        x = Inputs(*tensors, **masks)
        count, _, dim = x.v.shape
        o = x.v.new_empty(count, plan.tokens * plan.repeat, dim)
        lse = x.v.new_empty(o.shape[:2])
        groups = []
        keep = any(ctx.needs_input_grad)
        final_k = final_v = None
        if x.log_decay is not None:
            final_k = x.v.new_empty(count, x.log_decay.shape[2], dim)
            final_v = torch.empty_like(final_k)
        for rows in plan.row_groups(count):
            g = Group(plan, x.rows(rows))
            for segment in plan.segments(g.count):
                _attend(g, segment, o[rows], lse[rows])
            if final_k is not None and final_v is not None:
                final_k[rows], final_v[rows] = g.final
            if keep:
                groups.append(g.states)
        ctx.set_materialize_grads(False)
        if keep:
            ctx.plan, ctx.masks, ctx.states = plan, masks, groups
            ctx.save_for_backward(o, lse, *tensors)
        return o, lse, final_k, final_v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Any, dlse: Any, dfinal_k: Any, dfinal_v: Any) -> Any:
        o, lse, *tensors = ctx.saved_tensors
        x = Inputs(*tensors, **ctx.masks)
        final = (dfinal_k, dfinal_v)
        grads = gradients(ctx.plan, x, ctx.states, ctx.needs_input_grad[2:], o, lse, do, dlse, final)
        return None, None, *grads
