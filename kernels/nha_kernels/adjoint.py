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
from .segments import DIFFERENTIABLE, EMPTY, Group, Inputs, Plan, flat
from .tiles import Decays, decay_gradient, fade, grown, mix, pair_scores, scan_back, write_gradient


def gradients(
    plan: Plan,
    x: Inputs,
    states: list[torch.Tensor],
    needed: Sequence[bool],
    o: torch.Tensor,
    lse: torch.Tensor,
    do: torch.Tensor | None,
    dlse: torch.Tensor | None,
    dfinal: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """Gradients of the first `DIFFERENTIABLE` fields of Inputs.

    Args:
        plan, x: the call.
        states: per row group, [n,C+1,M,2D] from the forward pass.
        needed: which gradients are wanted, by field.
        o, lse: [N,T*R,D], [N,T*R] results.
        do, dlse, dfinal: their gradients and that of the final state [N,M,2D]; None is 0.
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
    exact = plan.attend_window and not grads.keys().isdisjoint(("q", "k", "kv", "sink_k", "sink_v"))
    slots = not grads.keys().isdisjoint(("slot_q", "kv", "log_decay", "slot_bias", "slots"))
    for group, kept in zip(plan.row_groups(len(o)), states, strict=True):
        g = Group(plan, x.rows(group), kept)
        back = _Back(g, {name: grad[group] for name, grad in grads.items()}, do[group], lse[group], delta[group])
        for segment in plan.segments(g.count):
            if exact and plan.window:
                back.window(segment)
            if exact and g.x.sink_k is not None:
                back.sinks(segment)
            if slots and plan.attend_slots:
                back.slots(segment)
        if g.states is not None and not grads.keys().isdisjoint(("kv", "log_decay", "slots")):
            back.states(None if dfinal is None else dfinal[group])
    for name in ("q", "k"):
        if name in grads:
            grads[name].mul_(plan.scale)
    if "sink_k" in grads:
        grads["sink_k"].mul_(plan.scale)
    return [grads.get(name) for name in names]


class _Back:
    """Backward pass of one group; adds to `grads` in place."""

    def __init__(
        self, g: Group, grads: dict[str, torch.Tensor], do: torch.Tensor, lse: torch.Tensor, delta: torch.Tensor
    ) -> None:
        self.g, self.grads, self.do, self.lse, self.delta = g, grads, do, lse, delta
        self.wants_states = g.states is not None and not grads.keys().isdisjoint(("kv", "log_decay", "slots"))
        if self.wants_states:
            assert g.states is not None
            self.increments = torch.zeros_like(g.states)  # [n,C+1,M,2D]
            self.absorbed = torch.zeros_like(g.absorbed) if "kv" in grads else None  # [n*C,L,2D]
            if "log_decay" in grads:
                self.from_rows = torch.zeros_like(g.tile_log_decay)  # [n*C,L,M]
                self.write = torch.zeros_like(g.tile_log_decay)

    def _rows(self, segment: slice, shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """do [..,D], lse [..,1] and Delta [..,1] of a segment, cut into [shape]."""
        do, lse, delta = (self.g.token_rows(x, segment) for x in (self.do, self.lse, self.delta))
        return do.reshape(*shape, self.g.dim), lse.reshape(*shape, 1), delta.reshape(*shape, 1)

    def window(self, segment: slice) -> None:
        """Gradients of rotated q, rotated k (both without the scale) and v through the window."""
        g, p = self.g, self.g.plan
        assert g.x.q is not None and g.x.k is not None
        weights = g.window_scores(segment)
        do, lse, delta = self._rows(segment, (len(weights), -1))
        weights.sub_(lse).exp_()  # [n*b,Q*R,X]
        place = {"first": segment.start, "block": p.block, "window": p.window, "skip": p.skip(segment)}
        if "kv" in self.grads:
            add_spans(self.grads["kv"][..., g.dim :], torch.bmm(weights.transpose(1, 2), do), **place)
        if "q" not in self.grads and "k" not in self.grads:
            return
        values = g.spans(g.x.kv[..., g.dim :], segment)
        score = torch.baddbmm(delta, do, values.transpose(1, 2), beta=-1).mul_(weights)
        if "q" in self.grads:
            into = g.token_rows(self.grads["q"], segment)
            into += torch.bmm(score, g.spans(g.x.k, segment)).view_as(into)
        if "k" in self.grads:
            rows = g.token_rows(g.x.q, segment).reshape(*score.shape[:2], g.dim)
            add_spans(self.grads["k"], torch.bmm(score.transpose(1, 2), rows), **place)

    def sinks(self, segment: slice) -> None:
        """Gradients of rotated q, sink keys (both without the scale) and sink values."""
        g = self.g
        assert g.x.q is not None and g.x.sink_k is not None and g.x.sink_v is not None
        weights = g.sink_scores(segment)
        do, lse, delta = self._rows(segment, (g.count, weights.shape[1]))
        weights.sub_(lse).exp_()  # [n,t*R,S]
        if "sink_v" in self.grads:
            self.grads["sink_v"].baddbmm_(weights.transpose(1, 2), do)
        score = torch.baddbmm(delta, do, g.x.sink_v.transpose(1, 2), beta=-1).mul_(weights)
        if "q" in self.grads:
            into = g.token_rows(self.grads["q"], segment)
            into += torch.bmm(score, g.x.sink_k)
        if "sink_k" in self.grads:
            self.grads["sink_k"].baddbmm_(score.transpose(1, 2), g.token_rows(g.x.q, segment))

    def slots(self, segment: slice) -> None:
        """Gradients through the slots' scores and read-out; what reaches the state is left in `increments`."""
        g, p, grads = self.g, self.g.plan, self.grads
        tail, at = g.sees_slots(segment), p.tiles_of(segment)
        if tail.start >= tail.stop:
            return
        assert g.decays is not None and g.states is not None and g.x.slot_q is not None
        some = g.flat_tiles(at)
        d, inside, states = g.decays.part(some), g.absorbed[some], flat(g.states[:, at])
        do, lse, delta = (g.tiled(g.token_rows(x, segment)[:, tail]) for x in (self.do, self.lse, self.delta))
        rows = g.tiled(g.x.slot_q[:, at.start * p.tile * p.repeat : at.stop * p.tile * p.repeat])

        scored, key_pairs, own_key = g.slot_scores(segment, strict=True)
        read, value_pairs, own_value = pair_scores(d, do, states[..., g.dim :], inside[..., g.dim :], True)
        assert own_key is not None and own_value is not None
        weights = g.offset(self._with_own(d, scored, own_key), segment).sub_(lse[..., None]).exp_()  # [n*c,L*R,M]
        score = self._with_own(d, read, own_value).sub_(delta[..., None]).mul_(weights)
        faded = fade(d, score, p.repeat)
        if "slot_bias" in grads:
            grads["slot_bias"] += score.view(g.count, -1, p.repeat, score.shape[-1]).sum((1, 3))
        raised, mixed = grown(d, score, p.repeat), mix(d, faded)
        if "slot_q" in grads:
            into = torch.bmm(raised, states[..., : g.dim]).baddbmm_(mixed, inside[..., : g.dim])
            first = at.start * p.tile * p.repeat
            grads["slot_q"][:, first : first + into.shape[0] * into.shape[1] // g.count] = into.view(
                g.count, -1, g.dim
            )
        if not self.wants_states:
            return
        faded_weights = fade(d, weights, p.repeat)
        back = [torch.bmm(raised.transpose(1, 2), rows)]
        back.append(torch.bmm(grown(d, weights, p.repeat).transpose(1, 2), do))
        self.increments[:, at] = torch.cat(back, -1).view(g.count, -1, *states.shape[1:])
        if self.absorbed is not None:
            self.absorbed[some, :, : g.dim] = torch.bmm(mixed.transpose(1, 2), rows)
            self.absorbed[some, :, g.dim :] = torch.bmm(mix(d, faded_weights).transpose(1, 2), do)
        if "log_decay" in grads:
            write = write_gradient(d, [(key_pairs, faded), (value_pairs, faded_weights)], p.repeat)
            through = scored.mul_(score).addcmul_(read, weights).view(*write.shape[:2], p.repeat, -1).sum(2)
            self.from_rows[some] = through.addcmul_(write, d.write, value=-1)
            own = [
                torch.einsum("clr,clrm->clm", o, x.view(*o.shape, -1)) for o, x in ((own_key, score), (own_value, weights))
            ]
            self.write[some] = write.add_(own[0]).add_(own[1])

    def _with_own(self, d: Decays, scores: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        """New [n*c,L*R,M]: scores plus what each row's own token writes."""
        grouped = scores.view(*own.shape, -1)
        return torch.addcmul(grouped, own[..., None], d.write[:, :, None]).view_as(scores)

    def states(self, final: torch.Tensor | None) -> None:
        """Gradients through the state scan."""
        g = self.g
        assert g.decays is not None and g.states is not None
        d = g.decays
        adjoint = scan_back(d, self.increments, final)
        after = flat(adjoint[:, 1:])  # [n*C,M,2D] of the state after each tile
        weight = d.write * d.tail
        if self.absorbed is not None:
            start, length = g.plan.start, g.x.log_decay.shape[1]
            self.absorbed.baddbmm_(weight, after)
            self.grads["kv"][:, start : start + length] += self.absorbed.view(g.count, length, -1)
        if "log_decay" in self.grads:
            back = torch.bmm(g.absorbed, after.transpose(1, 2))  # [n*C,L,M]
            whole = (after * flat(g.states[:, :-1])).sum(-1).mul_(d.carry)
            self.write.addcmul_(back, d.tail)
            out = decay_gradient(g.tile_log_decay, self.from_rows, back.mul_(weight), whole, self.write)
            self.grads["log_decay"] += out.view_as(self.grads["log_decay"])
        if "slots" in self.grads:
            self.grads["slots"] += adjoint[:, 0]
