"""Gradient of the chunked path's core, from the inputs, the output, its lse and the saved tile states.

With P the softmax weights, dP their gradient and Delta = do . o - dlse, score gradients are dS = P (dP - Delta); dP has
the form of the scores with (do, V) in place of (q, K). The gradient of the log decay leaves out what a token writes for
its own row: decay plays no part there, and its two halves would only cancel.

Legend: n rows x key/value heads, C tiles, L tile length, R query heads per key/value head, M slots, D head_dim,
t tokens of a segment, c tiles of a segment.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .blocks import add_spans
from .segments import DIFFERENTIABLE, EMPTY, Group, Inputs, Plan, States
from .tiles import TILE, decay_gradient, fade, mix, scan_back, scores_apart, write_gradient

STATEFUL = ("k", "v", "log_decay", "slot_k", "slot_v")  # what the gradient reaches through the slot state


def gradients(
    plan: Plan,
    x: Inputs,
    states: list[States | None],
    needed: Sequence[bool],
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    final: tuple[torch.Tensor | None, torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """Gradients of the first `DIFFERENTIABLE` fields of Inputs.

    Args:
        plan, x: the call.
        states: per row group, from the forward pass.
        needed: which gradients are wanted, by field.
        o, lse: [N,T*R,D], [N,T*R] results.
        do, dlse, final: their gradients and those of the final slot keys and values [N,M,D]; None is 0.
    Returns:
        One tensor per field, None where it is not wanted.
    """
    names = list(vars(x))[:DIFFERENTIABLE]
    grads = {name: torch.zeros_like(getattr(x, name)) for name, want in zip(names, needed, strict=True) if want}
    do = torch.zeros_like(o) if do is None else do.contiguous()
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta -= dlse
    lse = lse.clamp(min=EMPTY)
    exact = plan.attend_window and not grads.keys().isdisjoint(("q", "turned_k", "v", "sink_k", "sink_v"))
    slots = plan.attend_slots and not grads.keys().isdisjoint(("slot_q", "slot_bias", *STATEFUL))
    for group, kept in zip(plan.row_groups(len(o)), states, strict=True):
        g = Group(plan, x.rows(group), kept)
        back = _Back(g, {name: grad[group] for name, grad in grads.items()}, do[group], lse[group], delta[group])
        for segment in plan.segments(g.count):
            if exact and plan.window:
                back.window(segment)
            if exact and g.x.sink_k is not None:
                back.sinks(segment)
            if slots:
                back.slots(segment)
        if back.stateful:
            back.through_states([None if y is None else y[group] for y in final])
    for name in {"q", "turned_k", "sink_k"} & grads.keys():
        grads[name].mul_(plan.scale)
    return [grads.get(name) for name in names]


class _Back:
    """Backward pass of one group; adds to `grads` in place. Gradients of q and of exact keys lack the scale."""

    def __init__(
        self, g: Group, grads: dict[str, torch.Tensor], do: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
    ) -> None:
        self.g, self.grads, self.do, self.lse, self.delta = g, grads, do, lse, delta
        self.stateful = g.states is not None and not grads.keys().isdisjoint(STATEFUL)
        if self.stateful and g.states is not None:
            self.increments = [torch.zeros_like(s) for s in g.states]  # [n,C,M,D] x 2
            self.absorbed = [torch.zeros_like(y) if n in grads else None for n, y in zip("kv", g.absorbed, strict=True)]
            if g.decays is not None:
                self.from_rows = torch.zeros_like(g.decays.write)  # [n*C,L,M]
                self.write = torch.zeros_like(g.decays.write)

    def _rows(self, segment: slice, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """do [number,..,D], lse [number,..,1] and Delta [number,..,1] of a segment."""
        do, lse, delta = (self.g.token_rows(x, segment) for x in (self.do, self.lse, self.delta))
        return do.reshape(number, -1, do.shape[2]), lse.reshape(number, -1, 1), delta.reshape(number, -1, 1)

    def window(self, segment: slice) -> None:
        """Gradients of q, rotated k and v through the window."""
        g, p = self.g, self.g.plan
        assert g.x.q is not None and g.x.turned_k is not None
        weights = g.window_scores(segment)
        do, lse, delta = self._rows(segment, len(weights))
        weights.sub_(lse).exp_()  # [n*b,Q*R,X]
        place = {"first": segment.start, "block": p.block, "window": p.window, "skip": p.skip(segment)}
        if "v" in self.grads:
            add_spans(self.grads["v"], torch.bmm(weights.transpose(1, 2), do), **place)
        if self.grads.keys().isdisjoint(("q", "turned_k")):
            return
        score = torch.baddbmm(delta, do, g.spans(g.x.v, segment).transpose(1, 2), beta=-1).mul_(weights)
        if "q" in self.grads:
            into = g.token_rows(self.grads["q"], segment)
            into += torch.bmm(score, g.spans(g.x.turned_k, segment)).view_as(into)
        if "turned_k" in self.grads:
            rows = g.token_rows(g.x.q, segment).reshape_as(do)
            add_spans(self.grads["turned_k"], torch.bmm(score.transpose(1, 2), rows), **place)

    def sinks(self, segment: slice) -> None:
        """Gradients of q, sink keys and sink values."""
        g = self.g
        assert g.x.q is not None and g.x.sink_k is not None and g.x.sink_v is not None
        weights = g.sink_scores(segment)
        do, lse, delta = self._rows(segment, g.count)
        weights.sub_(lse).exp_()  # [n,t*R,S]
        if "sink_v" in self.grads:
            self.grads["sink_v"] += torch.bmm(weights.transpose(1, 2), do)
        score = torch.baddbmm(delta, do, g.x.sink_v.transpose(1, 2), beta=-1).mul_(weights)
        if "q" in self.grads:
            into = g.token_rows(self.grads["q"], segment)
            into += torch.bmm(score, g.x.sink_k)
        if "sink_k" in self.grads:
            self.grads["sink_k"] += torch.bmm(score.transpose(1, 2), g.token_rows(g.x.q, segment))

    def slots(self, segment: slice) -> None:
        """Gradients through the slots' scores and read-out; what reaches the state is left in `increments`."""
        g, grads, tail = self.g, self.grads, self.g.sees_slots(segment)
        if tail.start >= tail.stop:
            return
        d, (state_k, state_v), (inside_k, inside_v) = g.slot_side(segment)
        do, lse, delta = (g.tiled(g.token_rows(x, segment)[:, tail]) for x in (self.do, self.lse, self.delta))
        queries = g.slot_queries(segment)
        weights, scored, key_pairs, own_key = scores_apart(d, queries, state_k, inside_k)
        score, read, value_pairs, own_value = scores_apart(d, do, state_v, inside_v)
        weights.sub_((lse - g.tiled(g.slot_offset(segment)))[..., None]).exp_()  # P [n*c,L*R,M]
        score.sub_(delta[..., None]).mul_(weights)  # dS
        if "slot_bias" in grads:
            grads["slot_bias"] += score.sum(-1).view(g.count, -1, g.plan.repeat).sum(1)
        at = g.plan.tiles_of(segment)
        some = at if g.count == 1 else slice(None)
        if "log_decay" in grads:
            self.from_rows[some] = _over_heads(scored.mul_(score).addcmul_(read, weights))
            self.write[some] = _own(own_key, score) + _own(own_value, weights)
        faded, mixed = fade(d, score), mix(d, score)
        if "slot_q" in grads:
            into = grads["slot_q"][:, g.slot_rows(segment)]
            into += torch.bmm(faded, state_k).baddbmm_(mixed, inside_k).view_as(into)
        if not self.stateful:
            return
        read_out = fade(d, weights)
        if "log_decay" in grads:
            write = write_gradient(d, [(key_pairs, faded), (value_pairs, read_out)])
            self.write[some] += write
            self.from_rows[some] -= write.mul_(d.write)
        for i, (x, rows) in enumerate(((faded, queries), (read_out, do))):
            self.increments[i][:, at] = torch.bmm(x.transpose(1, 2), rows).view_as(self.increments[i][:, at])
            tokens = self.absorbed[i]
            if tokens is not None:
                tokens[some] = torch.bmm((mixed if i == 0 else mix(d, x)).transpose(1, 2), rows)

    def through_states(self, final: list[torch.Tensor | None]) -> None:
        """Gradients through the state scan."""
        g, d, grads = self.g, self.g.decays, self.grads
        assert d is not None and g.states is not None and g.x.log_decay is not None
        weight = d.write * d.tail
        from_state, whole = torch.zeros_like(weight), torch.zeros_like(d.carry)
        for i, name in enumerate("kv"):
            handed, initial = scan_back(d, self.increments[i], final[i])
            after = handed.flatten(0, 1)  # [n*C,M,D]
            into = self.absorbed[i]
            if into is not None:
                place = slice(g.plan.start, g.plan.start + g.x.log_decay.shape[1])
                grads[name][:, place] += into.baddbmm_(weight, after).view(g.count, -1, after.shape[2])
            if f"slot_{name}" in grads:
                grads[f"slot_{name}"] += initial
            if "log_decay" in grads:
                from_state.baddbmm_(g.absorbed[i], after.transpose(1, 2))
                whole += (after * g.states[i].flatten(0, 1)).sum(-1)
        if "log_decay" in grads:
            self.write.addcmul_(from_state, d.tail)
            whole *= d.carry
            grads["log_decay"] += decay_gradient(
                g.x.log_decay, self.from_rows, from_state.mul_(weight), whole, self.write
            )


def _over_heads(x: torch.Tensor) -> torch.Tensor:
    """[n*c,L,M] summed over the R rows of each token."""
    return x.view(len(x), TILE, -1, x.shape[2]).sum(2)


def _own(own: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """[n*c,L,M] sum over r of own [n*c,L,R] times x [n*c,L*R,M]."""
    heads = x.view(*own.shape, -1).unbind(2)
    out = own[:, :, :1] * heads[0]
    for r in range(1, len(heads)):
        out.addcmul_(own[:, :, r, None], heads[r])
    return out
