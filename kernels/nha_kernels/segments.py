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

import torch

from .blocks import band_scores, key_spans
from .tiles import pair_scores, scan_states, tile_decays

EMPTY = -1e30  # stands for the maximum of a row that sees nothing


@dataclass(frozen=True)
class Plan:
    """Sizes and choices that hold for one call."""

    tokens: int  # T
    start: int  # first token that may see slots, a multiple of `tile`
    window: int
    hidden: int  # W + S: places of the key array from here on hold keys that the window may show
    repeat: int  # R
    tile: int
    block: int
    scale: float
    fresh: bool  # no past: the first W places of the key array are empty
    attend_slots: bool
    attend_window: bool
    workspace: int  # scores held at once

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
        return slice(first // self.tile, last // self.tile)

    def skip(self, segment: slice) -> int:
        """Leading places of a span that are empty for every block of the segment."""
        return max(0, self.window - (segment.stop - self.block) - 1) if self.fresh else 0


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call; None where a part takes no part."""

    slot_q: torch.Tensor | None  # [N,T'*R,D] times scale and slot_q_scale
    q: torch.Tensor | None  # [N,T*R,D] rotated
    k: torch.Tensor | None  # [N,A,D] rotated
    kv: torch.Tensor  # [N,A,2D] un-rotated keys | values
    log_decay: torch.Tensor | None  # [N,T',M] of the token each place absorbs, 0 where none
    slot_bias: torch.Tensor | None  # [N,R]
    sink_k: torch.Tensor | None  # [N,S,D] rotated
    sink_v: torch.Tensor | None  # [N,S,D]
    slots: torch.Tensor | None  # [N,M,2D] initial state
    key_mask: torch.Tensor | None = None  # [N,A] 0 or -inf; -inf only before place W + S
    slot_mask: torch.Tensor | None = None  # [N,first of T'] 0 or -inf, nothing hidden after
    sink_mask: torch.Tensor | None = None  # [N,min(T,S),S] 0 or -inf

    def rows(self, group: slice) -> Inputs:
        """The same for some of the rows."""
        return Inputs(**{name: None if x is None else x[group] for name, x in vars(self).items()})


DIFFERENTIABLE = 9  # the first fields of Inputs


def flat(x: torch.Tensor) -> torch.Tensor:
    """[n*c,...] from [n,c,...]."""
    return x.reshape(-1, *x.shape[2:])


class Group:
    """Some rows of one call: what their segments share."""

    def __init__(self, plan: Plan, x: Inputs, states: torch.Tensor | None = None) -> None:
        self.plan, self.x, self.count = plan, x, len(x.kv)
        self.dim = x.kv.shape[2] // 2
        self.decays, self.states = None, states
        if x.log_decay is not None:
            length = x.log_decay.shape[1]
            self.slots = x.log_decay.shape[2]
            self.tile_log_decay = x.log_decay.reshape(-1, plan.tile, self.slots)  # [n*C,L,M]
            self.absorbed = x.kv[:, plan.start : plan.start + length].reshape(-1, plan.tile, 2 * self.dim)
            self.decays = tile_decays(self.tile_log_decay)
            if states is None:
                self.states = scan_states(self.decays, self.absorbed, x.slots, self.count)

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
        return x.reshape(-1, self.plan.tile * self.plan.repeat, *x.shape[2:])

    def flat_tiles(self, at: slice) -> slice:
        """Tiles of a segment within [n*C,...]: a segment is shorter than the sequence only where n is 1."""
        return at if self.count == 1 else slice(0, self.count * at.stop)

    def spans(self, x: torch.Tensor, segment: slice) -> torch.Tensor:
        """[n*b,X,...] of a segment from [n,A,...]."""
        p = self.plan
        number = (segment.stop - segment.start) // p.block
        return key_spans(x, segment.start, number, p.block, p.window, p.skip(segment))

    def window_scores(self, segment: slice) -> torch.Tensor:
        """[n*b,block*R,X]"""
        p, x = self.plan, self.x
        assert x.q is not None and x.k is not None
        rows = self.token_rows(x.q, segment).reshape(-1, p.block * p.repeat, self.dim)
        out = band_scores(rows, self.spans(x.k, segment), p.block, p.window, p.skip(segment), p.scale)
        hidden = p.hidden - segment.start - 1 - p.skip(segment)  # places of the first span that may be masked
        if hidden > 0:
            number = min(-(-hidden // p.block), (segment.stop - segment.start) // p.block)
            mask = key_spans(x.key_mask, segment.start, number, p.block, p.window, p.skip(segment))
            first = out.view(self.count, -1, *out.shape[1:])[:, :number]
            first += mask.view(self.count, number, 1, -1)
        return out

    def sink_scores(self, segment: slice) -> torch.Tensor:
        """[n,t*R,S]"""
        p, x = self.plan, self.x
        assert x.q is not None and x.sink_k is not None and x.sink_mask is not None
        out = torch.bmm(self.token_rows(x.q, segment), x.sink_k.transpose(1, 2)).mul_(p.scale)
        masked = x.sink_mask[:, segment]
        grouped = out[:, : masked.shape[1] * p.repeat].view(self.count, masked.shape[1], p.repeat, out.shape[2])
        grouped += masked[:, :, None]
        return out

    def slot_scores(self, segment: slice, strict: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Scores [n*c,L*R,M] without bias and mask, and what `pair_scores` returns with them."""
        assert self.decays is not None and self.states is not None and self.x.slot_q is not None
        at = self.plan.tiles_of(segment)
        some, step = self.flat_tiles(at), self.plan.tile * self.plan.repeat
        rows = self.tiled(self.x.slot_q[:, at.start * step : at.stop * step])
        state = flat(self.states[:, at, :, : self.dim])
        return pair_scores(self.decays.part(some), rows, state, self.absorbed[some, :, : self.dim], strict)

    def offset(self, scores: torch.Tensor, segment: slice) -> torch.Tensor:
        """Bias and mask added in place to slot scores [n*c,L*R,M]."""
        x, at, tile = self.x, self.plan.tiles_of(segment), self.plan.tile
        grouped = scores.view(self.count, (at.stop - at.start) * tile, self.plan.repeat, -1)
        if x.slot_bias is not None:
            grouped += x.slot_bias[:, None, :, None]
        if x.slot_mask is not None and x.slot_mask.shape[1] > at.start * tile:
            mask = x.slot_mask[:, at.start * tile : at.stop * tile]
            grouped[:, : mask.shape[1]] += mask[:, :, None, None]
        return scores
