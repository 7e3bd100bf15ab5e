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
from .segments import EMPTY, Group, Inputs, Plan, flat
from .tiles import fade, grown, mix


def _attend(g: Group, segment: slice, o: torch.Tensor, lse: torch.Tensor) -> None:
    """Write output [n,t*R,D] and lse [n,t*R] of a segment into [n,T*R,..]."""
    plan, x = g.plan, g.x
    rows = slice(segment.start * plan.repeat, segment.stop * plan.repeat)
    out, top, total = torch.zeros_like(o[:, rows]), torch.full_like(lse[:, rows], EMPTY), torch.zeros_like(lse[:, rows])
    window = g.window_scores(segment) if plan.attend_window and plan.window else None
    sink = g.sink_scores(segment) if plan.attend_window and x.sink_k is not None else None
    slot, tail = None, g.sees_slots(segment)
    if plan.attend_slots and tail.start < tail.stop:
        slot = g.offset(g.slot_scores(segment, strict=False)[0], segment)

    every = slice(0, rows.stop - rows.start)
    parts = [(window, every), (sink, every), (slot, tail)]
    for scores, which in parts:
        if scores is not None:
            torch.maximum(top[:, which], scores.amax(-1).view_as(top[:, which]), out=top[:, which])
    for scores, which in parts:
        if scores is not None:
            scores.sub_(top[:, which].reshape(scores.shape[:2])[..., None]).exp_()
            total[:, which] += scores.sum(-1).view_as(total[:, which])
    if window is not None:
        out = torch.bmm(window, g.spans(x.kv[..., g.dim :], segment)).view_as(out)
    if sink is not None:
        assert x.sink_v is not None
        out.baddbmm_(sink, x.sink_v)
    if slot is not None:
        assert g.decays is not None and g.states is not None
        at = plan.tiles_of(segment)
        d, absorbed = g.decays.part(g.flat_tiles(at)), g.absorbed[g.flat_tiles(at), :, g.dim :]
        read = torch.bmm(grown(d, slot, plan.repeat), flat(g.states[:, at, :, g.dim :]))
        read.baddbmm_(mix(d, fade(d, slot, plan.repeat)), absorbed)
        out[:, tail] += read.view_as(out[:, tail])
    o[:, rows] = out.div_(total.clamp(min=1e-30)[..., None])
    lse[:, rows] = top + total.log()


class SlotWindowAttention(torch.autograd.Function):
    """o [N,T*R,D], lse [N,T*R] and the final state [N,M,2D] (or None) of `Inputs`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, masks: dict[str, torch.Tensor | None], *tensors: torch.Tensor | None) -> Any:
        x = Inputs(*tensors, **masks)
        count, _, width = x.kv.shape
        o = x.kv.new_empty(count, plan.tokens * plan.repeat, width // 2)
        lse = x.kv.new_empty(o.shape[:2])
        states = []
        for rows in plan.row_groups(count):
            g = Group(plan, x.rows(rows))
            states.append(g.states)
            for segment in plan.segments(g.count):
                _attend(g, segment, o[rows], lse[rows])
        final = None if x.log_decay is None else torch.cat([s[:, -1] for s in states])
        if any(ctx.needs_input_grad):
            ctx.plan, ctx.masks, ctx.states = plan, masks, states
            ctx.save_for_backward(o, lse, *tensors)
            ctx.set_materialize_grads(False)
        return o, lse, final

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Any, dlse: Any, dfinal: Any) -> Any:
        o, lse, *tensors = ctx.saved_tensors
        x = Inputs(*tensors, **ctx.masks)
        grads = gradients(ctx.plan, x, ctx.states, ctx.needs_input_grad[2:], o, lse, do, dlse, dfinal)
        return None, None, *grads
