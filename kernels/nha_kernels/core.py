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


def _attend(g: Group, segment: slice, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Write output [n,t*R,D] and lse [n,t*R] of a segment into [n,T*R,..]."""
    plan, x = g.plan, g.x
    rows = slice(segment.start * plan.repeat, segment.stop * plan.repeat)
    out, top, total = torch.zeros_like(o[:, rows]), torch.full_like(lse[:, rows], EMPTY), torch.zeros_like(lse[:, rows])
    window = g.window_scores(segment) if plan.attend_window and plan.window else None
    sink = g.sink_scores(segment) if plan.attend_window and x.sink_k is not None else None
    slot, tail, offset = None, g.sees_slots(segment), None
    if plan.attend_slots and tail.start < tail.stop:
        d, (state_k, state_v), (absorbed_k, absorbed_v) = g.slot_side(segment)
        slot, offset = tile_scores(d, g.slot_queries(segment), state_k, absorbed_k), g.slot_offset(segment)

    every = slice(0, rows.stop - rows.start)
    parts = [(window, every, None), (sink, every, None), (slot, tail, offset)]
    for scores, which, added in parts:
        if scores is not None:
            here = top[:, which]
            best = scores.amax(-1).view_as(here)
            torch.maximum(here, best if added is None else best + added, out=here)
    for scores, which, added in parts:
        if scores is not None:
            here = top[:, which] if added is None else top[:, which] - added
            scores.sub_(here.reshape(scores.shape[:2])[..., None]).exp_()
            total[:, which] += scores.sum(-1).view_as(here)
    if window is not None:
        out = torch.bmm(window, g.spans(x.v, segment)).view_as(out)
    if sink is not None:
        assert x.sink_v is not None
        out.baddbmm_(sink, x.sink_v)
    if slot is not None:
        read = torch.bmm(fade(d, slot), state_v).baddbmm_(mix(d, slot), absorbed_v)
        out[:, tail] += read.view_as(out[:, tail])
    o[:, rows] = out.div_(total.clamp(min=1e-30)[..., None])
    lse[:, rows] = top + total.log()


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
