"""How the chunked path cuts a call up: sizes, inputs, and the scores of one segment.

A group is some rows of the call, a segment some of its tokens; few enough of both that the scores held at once are
small. A group of several rows has one segment.

Legend: N = B x G rows, T tokens (padded to whole blocks), R query heads per key/value head, D head_dim, M slots,
W window, S sinks, A = T + W + block places of the key array, T' = T - start tokens that may see slots,
n, t, t': those of one segment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .blocks import band_scores, key_spans, sink_band
from .tiles import TILE, Decays, scan_states, tile_decays

EMPTY = -1e30  # stands for the maximum of a row that sees nothing


@dataclass(frozen=True)
class Plan:
    """Sizes and choices that hold for one call."""

    tokens: int  # T
    start: int  # first token that may see slots, a multiple of the tile length
    window: int
    sinks: int
    hidden: int  # before this place of the key array there may be keys that the window does not show
    repeat: int  # R
    block: int
    scale: float
    fresh: bool  # no past: the first W places of the key array are empty
    attend_slots: bool
    attend_window: bool
    workspace: int  # scores held at once

    @property
    def attend_exact(self) -> bool:
        """Whether there are window or sinks; if so, every query sees a key of theirs."""
        return self.attend_window and self.window + self.sinks > 0

    def _per_token(self) -> int:
        return self.repeat * (self.block + self.window + 64)

    def row_groups(self, rows: int) -> Iterator[slice]:
        """Rows to work on together."""
        together = max(1, self.workspace // (self._per_token() * self.tokens))
        for at in range(0, rows, together):
            yield slice(at, min(at + together, rows))

    def segments(self, rows: int) -> Iterator[slice]:
        """Tokens to score together for that many rows; all of them unless there is one row."""
        step = self.tokens if rows > 1 else max(1, self.workspace // (self._per_token() * self.block)) * self.block
        for at in range(0, self.tokens, step):
            yield slice(at, min(at + step, self.tokens))

    def tiles_of(self, segment: slice) -> slice:
        """Tiles whose tokens lie in the segment."""
        first, last = max(segment.start - self.start, 0), max(segment.stop - self.start, 0)
        return slice(first // TILE, last // TILE)

    def skip(self, segment: slice) -> int:
        """Leading places of a span that are empty for every block of the segment."""
        return max(0, self.window - (segment.stop - self.block)) if self.fresh else 0


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; None where a part takes no part."""

    slot_q: torch.Tensor | None  # [N,T'*R,D] times scale and slot_q_scale
    q: torch.Tensor | None  # [N,T*R,D] rotated
    turned_k: torch.Tensor | None  # [N,A,D] rotated
    k: torch.Tensor | None  # [N,A,D] un-rotated
    v: torch.Tensor  # [N,A,D]
    log_decay: torch.Tensor | None  # [N,T',M] of the token each place absorbs, 0 where none
    slot_bias: torch.Tensor | None  # [N,R]
    sink_k: torch.Tensor | None  # [N,S,D] rotated
    sink_v: torch.Tensor | None  # [N,S,D]
    slot_k: torch.Tensor | None  # [N,M,D] initial state
    slot_v: torch.Tensor | None  # [N,M,D]
    key_mask: torch.Tensor | None = None  # [N,A] 0 or -inf; -inf only before place `hidden`
    slot_mask: torch.Tensor | None = None  # [N,first of T'] 0 or -inf, nothing hidden after
    sink_mask: torch.Tensor | None = None  # [N,min(T,S),S] 0 or -inf

    def rows(self, group: slice) -> Inputs:
        """The same for some of the rows."""
        rows: dict[str, Any] = {name: None if x is None else x[group] for name, x in vars(self).items()}
        return Inputs(**rows)


States = tuple[torch.Tensor, torch.Tensor]  # slot keys and values [n,C,M,D] as of the middle of every tile

DIFFERENTIABLE = 11  # the first fields of Inputs


class Group:
    """Some rows of one call: what their segments share."""

    def __init__(self, plan: Plan, x: Inputs, states: States | None = None) -> None:
        self.plan, self.x, self.count = plan, x, len(x.v)
        self.decays, self.states = None, states
        if x.log_decay is not None:
            assert x.k is not None
            held = slice(plan.start, plan.start + x.log_decay.shape[1])  # query i's place holds the token it absorbs
            dim, both = x.k.shape[2], torch.cat([x.k[:, held], x.v[:, held]], 2).view(-1, TILE, 2 * x.k.shape[2])
            self.absorbed = (both[..., :dim], both[..., dim:])  # [n*C,L,D] x 2
            self.decays = tile_decays(x.log_decay)
            if states is None:
                initial = None if x.slot_k is None or x.slot_v is None else torch.cat([x.slot_k, x.slot_v], 2)
                every, final = scan_states(self.decays, both, initial, self.count)
                self.states = (every[..., :dim], every[..., dim:])
                self.final = (final[..., :dim], final[..., dim:])

    def token_rows(self, x: torch.Tensor, segment: slice) -> torch.Tensor:
        """[n,t*R,...] of a segment from [n,T*R,...]."""
        return x[:, segment.start * self.plan.repeat : segment.stop * self.plan.repeat]

    def sees_slots(self, segment: slice) -> slice:
        """The segment's rows that may see slots, counted from its first."""
        first = max(self.plan.start - segment.start, 0)
        length = segment.stop - segment.start
        return slice(min(first, length) * self.plan.repeat, length * self.plan.repeat)

    def tiled(self, x: torch.Tensor) -> torch.Tensor:
        """[n*c,L*R,...] from [n,t'*R,...]."""
        return x.reshape(-1, TILE * self.plan.repeat, *x.shape[2:])

    def spans(self, x: torch.Tensor, segment: slice) -> torch.Tensor:
        """[n*b,X,...] of a segment from [n,A,...]."""
        p = self.plan
        number = (segment.stop - segment.start) // p.block
        return key_spans(x, segment.start, number, p.block, p.window, p.skip(segment))

    def window_scores(self, segment: slice) -> torch.Tensor:
        """[n*b,block*R,X]"""
        p, x = self.plan, self.x
        assert x.q is not None and x.turned_k is not None
        rows = self.token_rows(x.q, segment).reshape(-1, p.block * p.repeat, x.q.shape[2])
        out = band_scores(rows, self.spans(x.turned_k, segment), p.block, p.window, p.skip(segment), p.scale)
        self._mask_spans(out.view(self.count, -1, *out.shape[1:]), segment)
        return out

    def sink_scores(self, segment: slice) -> torch.Tensor:
        """[n,t*R,S]"""
        p, x = self.plan, self.x
        assert x.q is not None and x.sink_k is not None
        out = torch.bmm(self.token_rows(x.q, segment), x.sink_k.transpose(1, 2)).mul_(p.scale)
        self._mask_sinks(out, segment)
        return out

    def _mask_sinks(self, scores: torch.Tensor, segment: slice) -> None:
        """Add the mask of sinks to [n,t*R,S]."""
        if self.x.sink_mask is not None:
            masked, repeat = self.x.sink_mask[:, segment], self.plan.repeat
            first = scores[:, : masked.shape[1] * repeat].unflatten(1, (masked.shape[1], repeat))
            first += masked[:, :, None]

    def _mask_spans(self, scores: torch.Tensor, segment: slice) -> None:
        """Add the mask of keys to [n,b,...,X]."""
        p, first = self.plan, segment.start
        hidden = p.hidden - first - p.skip(segment)  # places of the first span that may be masked
        if hidden > 0:
            number = min(-(-hidden // p.block), scores.shape[1])
            assert self.x.key_mask is not None
            mask = key_spans(self.x.key_mask, first, number, p.block, p.window, p.skip(segment))
            part = scores[:, :number]
            part += mask.view(self.count, number, 1, -1)

    def exact_keys(self, segment: slice) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `scaled_dot_product_attention` takes for sinks and window together.

        Returns:
            queries [n*b,1,block*R,D]; keys, values [n*b,1,S+X,D]; additive mask [block*R,S+X] or [n*b,1,block*R,S+X].
        """
        p, x = self.plan, self.x
        assert x.q is not None
        blocks, skip = (segment.stop - segment.start) // p.block, p.skip(segment)

        def keys(sink: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
            parts = [] if sink is None else [sink[:, None].expand(-1, blocks, -1, -1).flatten(0, 1)]
            parts += [self.spans(tokens, segment)] if tokens is not None and p.window else []
            return (parts[0] if len(parts) == 1 else torch.cat(parts, 1))[:, None]

        mask = sink_band(p.block, p.window, skip, p.repeat, p.sinks, x.q.dtype, x.q.device)
        if (p.window and segment.start + skip < p.hidden) or (
            x.sink_mask is not None and segment.start < x.sink_mask.shape[1]
        ):
            mask = mask.expand(self.count, blocks, -1, -1).clone(memory_format=torch.contiguous_format)
            if p.window:
                self._mask_spans(mask[..., p.sinks :], segment)
            self._mask_sinks(mask.view(self.count, -1, mask.shape[3])[..., : p.sinks], segment)
            mask = mask.view(-1, 1, *mask.shape[2:])
        queries = self.token_rows(x.q, segment).reshape(-1, 1, p.block * p.repeat, x.q.shape[2])
        return queries, keys(x.sink_k, x.turned_k), keys(x.sink_v, x.v), mask

    def slot_queries(self, segment: slice) -> torch.Tensor:
        """[n*c,L*R,D]"""
        assert self.x.slot_q is not None
        return self.tiled(self.x.slot_q[:, self.slot_rows(segment)])

    def slot_rows(self, segment: slice) -> slice:
        """The segment's rows among the T'*R that may see slots."""
        at, step = self.plan.tiles_of(segment), TILE * self.plan.repeat
        return slice(at.start * step, at.stop * step)

    def slot_side(self, segment: slice) -> tuple[Decays, States, States]:
        """Decays, states [n*c,M,D] x 2 and absorbed keys and values [n*c,L,D] x 2 of a segment."""
        assert self.decays is not None and self.states is not None
        at = self.plan.tiles_of(segment)
        some = at if self.count == 1 else slice(None)  # several rows have one segment
        (state_k, state_v), (absorbed_k, absorbed_v) = self.states, self.absorbed
        states = (state_k[:, at].flatten(0, 1), state_v[:, at].flatten(0, 1))
        return self.decays.part(some), states, (absorbed_k[some], absorbed_v[some])

    def slot_offset(self, segment: slice) -> torch.Tensor:
        """[n,t'*R] what is added to every slot score of a row: bias, and -inf where the slots are empty."""
        x, at, repeat = self.x, self.plan.tiles_of(segment), self.plan.repeat
        first, last = at.start * TILE, at.stop * TILE
        out = x.v.new_zeros(self.count, last - first, repeat)
        if x.slot_bias is not None:
            out += x.slot_bias[:, None]
        if x.slot_mask is not None and x.slot_mask.shape[1] > first:
            mask = x.slot_mask[:, first:last]
            out[:, : mask.shape[1]] += mask[..., None]
        return out.flatten(1)
