"""Host side of the prefill kernels: sizes, tile maps, launches.

Legend: N documents, L query tokens in all, X key places in all, H query heads, G key/value heads, D head_dim, M slots,
P rotary dims, S sinks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .backward import query_side
from .backward_kv import gate_side, key_side
from .forward import attend
from .scan import reverse_scan, tile_states
from .tiling import SINK_BLOCK, SUB_CHUNK, Tiling, architecture, choose_tiling, power_of_two
from .triton_common import LOG2E


@dataclass(frozen=True)
class Options:
    """What is no tensor in a call."""

    window: int
    sinks: int
    past: int  # key places before a document's own tokens
    scale: float
    mask_empty: bool
    slots: bool  # attend to slots
    exact: bool  # attend to window and sinks
    states: bool  # slots are written, or asked for


@dataclass(frozen=True)
class Tensors:
    """Tensors of a call; all contiguous.

    Without `starts` the N documents have equal length L / N; with it document n has `lengths[n]` query tokens from
    row starts[n] on. Its keys begin at place starts[n] + n * past.
    """

    q: torch.Tensor  # [L,H,D]
    k: torch.Tensor  # [X,G,D], X = L + N * past
    v: torch.Tensor  # [X,G,D]
    log_decay: torch.Tensor  # [X,G,M] fp32
    cos: torch.Tensor | None  # [X or X / N,P]
    sin: torch.Tensor | None
    slot_q_scale: torch.Tensor | None  # [H,D]
    slot_bias: torch.Tensor | None  # [H]
    initial: torch.Tensor | None  # [2,N,G,M,D] fp32
    seen: torch.Tensor | None  # [N] int64
    starts: torch.Tensor | None  # [N] int64
    lengths: torch.Tensor | None  # [N] int64


class TileCall:
    """One prefill call: allocates scratch, launches forward and backward kernels."""

    def __init__(
        self, x: Tensors, options: Options, documents: int, tiling: Tiling | None = None, backward: bool = False
    ) -> None:
        self.x, self.options, self.documents = x, options, documents
        self.rows, self.heads, self.dim = x.q.shape
        self.groups, self.slots = x.log_decay.shape[1:]
        self.rotary = 0 if x.cos is None else x.cos.shape[1]
        self.time = self.rows if x.starts is not None else self.rows // documents
        self.arch, self.processors = architecture(x.q.device)
        self.tiling = tiling or choose_tiling(self.dim, self.slots, x.q.dtype, self.arch, backward)
        self.shared_cos = x.cos is not None and x.cos.shape[0] != x.k.shape[0]
        self.per_doc = self.time + options.past
        self.tiles, self.total_tiles, self.maps = self._map(0)

    def _map(self, more: int) -> tuple[int, int, tuple[Any, ...]]:
        """Tiles per document, tiles in all, and (starts, lengths, first_tile, tile_doc) of documents + `more` rows.

        For documents of unequal length `tiles` is 0 and the total an upper bound known without asking the device.
        """
        size, x = self.tiling.rows, self.x
        if x.starts is None or x.lengths is None:
            tiles = -(-(self.time + more) // size)
            return tiles, tiles * self.documents, (x.q, x.q, x.q, x.q)  # the pointers are not read
        number = torch.div(x.lengths + (more + size - 1), size, rounding_mode="floor")
        ends = number.cumsum(0)
        total = (self.rows + self.documents * more) // size + self.documents
        tile_doc = torch.searchsorted(ends, torch.arange(total, device=ends.device), right=True)
        tile_doc = tile_doc.clamp(max=self.documents - 1).to(torch.int32)
        return 0, total, (x.starts, x.lengths, (ends - number).to(torch.int32), tile_doc)

    def _segments(self) -> tuple[int, int]:
        """Segments of the state scan, and tiles in each."""
        t = self.tiling
        most = self.tiles or -(-self.time // t.rows)
        if self.arch.startswith("gfx"):
            number = 1  # AMD's barrier does not wait for other waves' stores, which the ticket relies on
        elif t.segments:
            number = t.segments
        else:
            alone = self.documents * self.groups * 2 * -(-self.slots // t.scan_slots) * -(-self.dim // t.scan_dims)
            number = min(-(-2 * self.processors // alone), most // 16)
        number = max(1, min(number, most))
        size = -(-most // number)
        return -(-most // size), size

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device=self.x.q.device)

    def _flags(self) -> dict[str, Any]:
        """Compile-time choices that every kernel shares."""
        exact = self.x.q.dtype == torch.float32
        return {
            "RAGGED": self.x.starts is not None,
            "PRECISION": "ieee" if exact else "tf32",
        }

    def _attention_flags(self) -> dict[str, Any]:
        """Compile-time choices of the kernels that score."""
        x, t, o = self.x, self.tiling, self.options
        return self._flags() | {
            "H": self.heads,
            "G": self.groups,
            "D": self.dim,
            "M": self.slots,
            "P": self.rotary,
            "BT": t.rows,
            "BC": min(SUB_CHUNK, t.rows),
            "BH": power_of_two(self.dim // 2),
            "BD": power_of_two(self.dim),
            "HAS_SCALE": x.slot_q_scale is not None,
            "HAS_BIAS": x.slot_bias is not None,
            "SEEN": x.seen is not None,
            "SHARED_COS": self.shared_cos,
            "MASK_EMPTY": o.mask_empty,
            "DECAY_PRECISION": "ieee" if x.q.dtype == torch.float32 else "tf32",
        }

    def _scan_scratch(self, segments: int) -> list[torch.Tensor]:
        """tile_decay, parts, part_decay and tickets of a segmented scan; any tensor where there is one segment."""
        if segments == 1:
            return [self.x.log_decay] * 4
        heads, t = self.documents * self.groups, self.tiling
        blocks = heads * -(-self.slots // t.scan_slots) * 2 * -(-self.dim // t.scan_dims)
        return [
            self._empty(self.total_tiles, self.groups, self.slots),
            self._empty(heads, segments, 2, self.slots, self.dim),
            self._empty(heads, segments, self.slots),
            torch.zeros(blocks, dtype=torch.int32, device=self.x.q.device),
        ]

    def _scan_programs(self, segments: int) -> int:
        t = self.tiling
        return (
            self.documents * self.groups * segments * 2 * -(-self.slots // t.scan_slots) * -(-self.dim // t.scan_dims)
        )

    def prepare(self) -> tuple[torch.Tensor, ...]:
        """Launch 1: rotated keys, g2 [L,G,M], tile states [2,tiles,G,M,D], final states [2,N,G,M,D].

        Where nothing is rotated the keys themselves; where no token can be absorbed no states (any tensor).
        """
        x, t, o = self.x, self.tiling, self.options
        turned = torch.empty_like(x.k) if self.rotary and o.exact else x.k
        g2 = states = final = x.log_decay
        segments, size = self._segments()
        scan, rotate, block = 0, 0, 64
        if o.states:
            g2 = self._empty(self.rows, self.groups, self.slots)
            states = self._empty(2, self.total_tiles, self.groups, self.slots, self.dim, dtype=x.q.dtype)
            final = self._empty(2, self.documents, self.groups, self.slots, self.dim)
            scan = self._scan_programs(segments)
        if turned is not x.k:
            rotate = -(-x.k.shape[0] // block) * self.groups
        if scan + rotate:
            tile_states[(scan + rotate,)](
                x.k, x.v, x.log_decay, _or(x.cos, x.k), _or(x.sin, x.k), _or(x.initial, x.k), turned, g2, states,
                final, *self._scan_scratch(segments), *self.maps[:3], _or(x.seen, x.k), self.time, self.tiles,
                self.total_tiles, o.past, o.window, o.sinks, self.documents, x.k.shape[0], self.per_doc, scan, segments,
                size, G=self.groups, D=self.dim, M=self.slots, P=self.rotary, BT=t.rows, BM=t.scan_slots,
                BD=t.scan_dims, BR=block, BH=power_of_two(self.dim // 2), SEEN=x.seen is not None,
                INITIAL=x.initial is not None, SEGMENTED=segments > 1, SHARED_COS=self.shared_cos, **self._flags(),
                num_warps=4, num_stages=t.scan_stages,
            )  # fmt: skip
        return turned, g2, states, final

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """o [L,H,D], lse [L,H] and the final states [2,N,G,M,D] (empty where none were asked for)."""
        x, t, o = self.x, self.tiling, self.options
        turned, g2, states, final = self.prepare()
        out, lse = torch.empty_like(x.q), self._empty(self.rows, self.heads)
        attend[(self.total_tiles * self.heads,)](
            x.q, x.k, turned, x.v, x.log_decay, g2, states, _or(x.cos, x.k), _or(x.sin, x.k), _or(x.slot_q_scale, x.k),
            _or(x.slot_bias, x.k), out, lse, *self.maps, _or(x.seen, x.k), self.time, self.tiles, self.total_tiles,
            o.past, o.window, o.sinks, o.scale * LOG2E.value, BN=t.keys, BM=t.slots,
            BS=SINK_BLOCK, SLOTS=o.slots, WINDOW=o.exact and o.window > 0, SINKS=o.exact and o.sinks > 0,
            **self._attention_flags(), num_warps=t.warps[0], num_stages=t.stages[0],
        )  # fmt: skip
        return out, lse, final if o.states else self._empty(0)

    def backward(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad: torch.Tensor,
        lse_grad: torch.Tensor | None,
        final_grad: torch.Tensor | None,
        need_keys: bool = True,
    ) -> Gradients:
        """Gradients of the tensors of the call.

        Args:
            out, lse: what `forward` gave.
            grad: [L,H,D], of out.
            lse_grad: [L,H] or None for 0.
            final_grad: [2,N,G,M,D] or None for 0.
            need_keys: whether k and v want one.
        """
        x, o = self.x, self.options
        turned, g2, states, _ = self.prepare()
        kept = self._query_side(turned, g2, states, out, lse, grad, lse_grad)
        adjoints, initial, scale, bias, sink = self._reverse_scan(kept, g2, grad, final_grad)
        more, total, key_maps = self._map(o.window)
        maps = (*key_maps[:2], self.maps[2], *key_maps[2:])
        shared = (_or(x.seen, x.k), self.time, more, self.tiles, self.total_tiles)
        made = torch.empty_like if o.past == 0 and x.starts is None else torch.zeros_like
        dk = dv = None
        flags = self._attention_flags()
        if need_keys:
            dk, dv = made(x.k), made(x.v)
            self._key_side(turned, g2, adjoints, lse, grad, kept, sink, dk, dv, maps, shared, total)
        decay = made(x.log_decay) if o.states else torch.zeros_like(x.log_decay)
        if o.states:
            t = self.tiling
            for name in ("P", "BH", "HAS_BIAS", "SHARED_COS", "MASK_EMPTY"):
                del flags[name]
            gate_side[(total * self.groups * -(-self.slots // t.gate_slots),)](
                x.q, x.k, x.v, x.log_decay, g2, states, adjoints, _or(x.slot_q_scale, x.k), grad, kept.weights,
                kept.grads, kept.decay, decay, *maps, *shared, o.past, o.window, o.sinks, o.scale, BM=t.gate_slots,
                SLOTS=o.slots, **flags,
                num_warps=t.warps[3], num_stages=t.stages[3],
            )  # fmt: skip
        return Gradients(kept.dq, dk, dv, decay, scale, bias, initial)

    def _query_side(
        self,
        turned: torch.Tensor,
        g2: torch.Tensor,
        states: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        grad: torch.Tensor,
        lse_grad: torch.Tensor | None,
    ) -> QuerySide:
        """Launch 2 of the backward pass."""
        x, t, o = self.x, self.tiling, self.options
        exact = o.exact and o.sinks > 0
        make = torch.zeros if x.starts is not None else torch.empty  # unequal lengths leave some tiles unused
        device, tiles = x.q.device, self.total_tiles
        wide = torch.float32 if x.q.dtype == torch.float16 else x.q.dtype

        def share(wanted: bool, *shape: int) -> torch.Tensor:
            return make(*shape, device=device) if wanted else lse

        kept = QuerySide(
            dq=torch.empty_like(x.q) if x.starts is None else torch.zeros_like(x.q),
            weights=self._empty(self.rows, self.heads, self.slots, dtype=x.q.dtype) if o.slots else x.q,
            grads=self._empty(self.rows, self.heads, self.slots, dtype=x.q.dtype) if o.slots else x.q,
            decay=self._empty(self.rows, self.heads, self.slots, dtype=wide) if o.slots else x.q,
            delta=torch.empty_like(lse),
            scale=share(o.slots and x.slot_q_scale is not None, tiles, self.heads, self.dim),
            bias=share(o.slots and x.slot_bias is not None, tiles, self.heads),
            sink=share(exact, tiles, self.heads, o.sinks, 2, self.dim),
        )
        query_side[(tiles * self.heads,)](
            x.q, x.k, turned, x.v, x.log_decay, g2, states, _or(x.cos, x.k), _or(x.sin, x.k), _or(x.slot_q_scale, x.k),
            _or(x.slot_bias, x.k), out, lse, grad, _or(lse_grad, lse), kept.dq, kept.weights, kept.grads, kept.decay,
            kept.delta, kept.scale, kept.bias, kept.sink, *self.maps, _or(x.seen, x.k), self.time, self.tiles, tiles,
            o.past, o.window, o.sinks, o.scale, BN=t.keys, BM=t.slots, BS=SINK_BLOCK, SLOTS=o.slots,
            WINDOW=o.exact and o.window > 0, SINKS=exact, HAS_DLSE=lse_grad is not None, **self._attention_flags(),
            num_warps=t.warps[1], num_stages=t.stages[1],
        )  # fmt: skip
        return kept

    def _reverse_scan(
        self, kept: QuerySide, g2: torch.Tensor, grad: torch.Tensor, final_grad: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...]:
        """Launch 3: adjoints, and gradients of the initial states, slot_q_scale, slot_bias and sinks (or any)."""
        x, t, o = self.x, self.tiling, self.options
        adjoints = initial = kept.delta
        wide = torch.float32 if x.q.dtype == torch.float16 else x.q.dtype  # a slot gathers gradient all its life
        segments, size = self._segments()
        scan = self._scan_programs(segments) if o.states else 0
        if o.states:
            adjoints = torch.empty(
                2, self.total_tiles, self.groups, self.slots, self.dim, dtype=wide, device=x.q.device
            )
            initial = self._empty(2, self.documents, self.groups, self.slots, self.dim)
        has_scale, has_bias = o.slots and x.slot_q_scale is not None, o.slots and x.slot_bias is not None
        sinks = o.sinks if o.exact else 0
        scale = self._empty(self.heads, self.dim) if has_scale else kept.delta
        bias = self._empty(self.heads) if has_bias else kept.delta
        sink = self._empty(self.documents, self.groups, sinks, 2, self.dim)
        programs = scan + (self.heads if has_scale or has_bias else 0) + self.documents * self.groups * sinks
        if programs:
            reverse_scan[(programs,)](
                x.q, grad, kept.weights, kept.grads, g2, _or(x.slot_q_scale, x.k), _or(final_grad, x.k), adjoints,
                initial, *self._scan_scratch(segments), kept.scale, kept.bias, kept.sink, scale, bias, sink,
                *self.maps[:3], self.time, self.tiles, self.total_tiles, sinks, self.documents, o.scale, scan,
                segments, size, H=self.heads, G=self.groups, D=self.dim, M=self.slots, BT=t.rows, BM=t.scan_slots,
                BD=t.scan_dims, BS=power_of_two(self.dim), SLOTS=o.slots, FINAL=final_grad is not None,
                HAS_SCALE=has_scale, HAS_BIAS=has_bias, SEGMENTED=segments > 1, **self._flags(), num_warps=4,
            )  # fmt: skip
        return adjoints, initial, scale, bias, sink

    def _key_side(
        self, turned: torch.Tensor, g2: torch.Tensor, adjoints: torch.Tensor, lse: torch.Tensor, grad: torch.Tensor,
        kept: QuerySide, sink: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, maps: tuple[Any, ...],
        shared: tuple[Any, ...], total: int,
    ) -> None:  # fmt: skip
        """Launch 4: dk and dv."""
        x, t, o = self.x, self.tiling, self.options
        sinks, flags = o.exact and o.sinks > 0, self._attention_flags()
        for name in ("HAS_BIAS", "MASK_EMPTY"):
            del flags[name]
        key_side[(total * self.groups,)](
            x.q, turned, x.v, x.log_decay, g2, adjoints, _or(x.cos, x.k), _or(x.sin, x.k),
            _or(x.slot_q_scale, x.k), lse, grad, kept.weights, kept.grads, kept.delta, sink, dk, dv, *maps, *shared,
            o.past, o.window, o.sinks, o.scale, BN=t.keys, BM=t.slots, SLOTS=o.slots, STATES=o.states,
            WINDOW=o.exact and o.window > 0, SINKS=sinks and o.past == 0, **flags,
            num_warps=t.warps[2], num_stages=t.stages[2],
        )  # fmt: skip
        if sinks and o.past:  # sinks of earlier calls stand before all that the programs own
            places = torch.arange(o.sinks, device=dk.device)
            base = torch.arange(self.documents, device=dk.device) * self.per_doc
            if x.starts is not None:
                base = x.starts + torch.arange(self.documents, device=dk.device) * o.past
            at = (base[:, None] + places).flatten()
            of = sink.transpose(1, 2)  # [N,S,G,2,D]
            dk[at] = of[..., 0, :].flatten(0, 1).to(dk.dtype)
            dv[at] = of[..., 1, :].flatten(0, 1).to(dv.dtype)


@dataclass
class QuerySide:
    """What the query side leaves for the other backward launches."""

    dq: torch.Tensor  # [L,H,D]
    weights: torch.Tensor  # [L,H,M] softmax weights on the slots
    grads: torch.Tensor  # [L,H,M] gradients of their scores
    decay: torch.Tensor  # [L,H,M] what acts on the running decay
    delta: torch.Tensor  # [L,H]
    scale: torch.Tensor  # [tiles,H,D]
    bias: torch.Tensor  # [tiles,H]
    sink: torch.Tensor  # [tiles,H,S,2,D]


@dataclass
class Gradients:
    """Gradients of `Tensors`; those of absent tensors hold anything."""

    q: torch.Tensor
    k: torch.Tensor | None
    v: torch.Tensor | None
    log_decay: torch.Tensor
    slot_q_scale: torch.Tensor
    slot_bias: torch.Tensor
    initial: torch.Tensor


def _or(x: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """x, or a tensor whose pointer is not read."""
    return other if x is None else x
