"""What an attention layer must at least compute and move, and how long a device needs for that. Plain numbers only.

Counted for the launches of the Triton path (forward 2, backward 5, decode 1) with rotation inside the kernel and fp32
slots, and for softmax attention over all tokens; every formula of this kind stands here and nowhere else.

Legend: T time, H query heads, G key/value heads, R = H / G, D head_dim, M slots, W window.
"""

from __future__ import annotations

from dataclasses import dataclass

TILE = 64  # rows of a tile: intra-tile products, waste at the window's edges, one stored slot state per tile
HALF, SINGLE = 2, 4  # bytes of bf16 and fp32


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention layer."""

    model: str
    heads: int
    groups: int
    head_dim: int
    slots: int
    window: int


@dataclass(frozen=True)
class Work:
    """Of one token in one layer: FLOPs (a multiply-add counts 2) and bytes of device memory."""

    flops: float
    bytes: float
    io_bytes: float  # inputs read once and outputs written once, nothing in between


@dataclass(frozen=True)
class Peaks:
    """Ceilings: matrix FLOP/s, and bytes/s of a device copy (read and written both counted)."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class _Bytes:
    """Bytes per token of every tensor that a launch reads or writes."""

    query: float  # q, o, dq or do
    key: float  # k, v, dk or dv
    gate: float  # the gates' logits or their gradient
    decay: float  # cumulative log decay, fp32
    write: float  # write strengths
    state: float  # slot states at the tiles' starts, keys and values
    lse: float  # fp32
    scores: float  # P and dS over the slots

    @classmethod
    def of(cls, s: Shape, element: int) -> _Bytes:
        return cls(
            query=s.heads * s.head_dim * element,
            key=s.groups * s.head_dim * element,
            gate=s.groups * s.slots * element,
            decay=s.groups * s.slots * SINGLE,
            write=s.groups * s.slots * element,
            state=2 * s.slots * s.head_dim * element * s.groups / TILE,
            lse=s.heads * SINGLE,
            scores=2 * s.heads * s.slots * element,
        )


def window_keys(window: int, time: int | None) -> float:
    """Mean keys per query that a tiled window computes with, the waste at its edges included.

    Args:
        window: W.
        time: T, for the rows that have fewer than W keys before them; None is T >> W.
    Returns:
        Keys per query.
    """
    if time is None:
        return window + TILE
    seen = min(window, time)
    return seen * (1 - seen / (2 * time)) + TILE


def forward(s: Shape, time: int | None = None, element: int = HALF) -> Work:
    """Forward of one token: slot states; fused scores, softmax and read-out.

    Args:
        s: the layer.
        time: T, as in `window_keys`.
        element: bytes of a number of the call's tensors.
    Returns:
        FLOPs and bytes per token.
    """
    d, m, b = s.head_dim, s.slots, _Bytes.of(s, element)
    slots = 4 * m * d + 4 * TILE * d + 4 * TILE * m
    states = 4 * m * d * s.groups / s.heads
    near = 4 * d * window_keys(s.window, time)
    state_launch = 2 * b.key + b.gate + b.decay + b.write + b.state
    fused_launch = 2 * b.query + 3 * b.key + b.decay + b.write + b.state + b.lse
    return Work(
        s.heads * (slots + states + near), state_launch + fused_launch, 2 * b.query + 2 * b.key + b.gate + b.lse
    )


def backward(s: Shape, time: int | None = None, element: int = HALF) -> Work:
    """Backward of one token, slot states recomputed.

    Args:
        s: the layer.
        time: T, as in `window_keys`.
        element: bytes of a number of the call's tensors.
    Returns:
        FLOPs and bytes per token.
    """
    d, m, b = s.head_dim, s.slots, _Bytes.of(s, element)
    q_side = 3 * (2 * m * d + 2 * TILE * d + 2 * TILE * m)
    scan = 4 * m * d
    kv_side = 8 * TILE * d + 8 * TILE * m + 8 * m * d * s.groups / s.heads
    gates = 4 * TILE * d
    near = 14 * d * window_keys(s.window, time)
    launches = (
        (2 * b.key + b.gate + b.state)  # states
        + (4 * b.query + 2 * b.lse + 3 * b.key + b.decay + b.write + b.state + b.scores)  # q side
        + (2 * b.query + b.scores + b.decay + b.state)  # reverse scan
        + (2 * b.query + b.scores + 2 * b.lse + 6 * b.key + 2 * b.gate + b.decay + 2 * b.state)  # kv side
        + (2 * b.query + 2 * b.key + b.scores + 2 * b.lse + b.gate + b.decay + 2 * b.state)  # gates
    )
    io = 4 * b.query + 4 * b.key + 2 * b.gate + b.lse
    return Work(s.heads * (q_side + scan + kv_side + gates + near), launches, io)


def softmax_forward(s: Shape, time: int, reach: int | None = None, element: int = HALF) -> Work:
    """Forward of one token in causal softmax attention, in one launch: scores and read-out.

    Args:
        s: the layer; its slots and window are not read.
        time: T.
        reach: tokens that a query sees, itself included, where the layer is sliding-window attention; None is all.
        element: bytes of a number of the call's tensors.
    Returns:
        FLOPs and bytes per token; the FLOPs grow with T.
    """
    b = _Bytes.of(s, element)
    moved = 2 * b.query + 2 * b.key + b.lse
    return Work(4 * s.heads * s.head_dim * window_keys(reach or time, time), moved, moved)


def softmax_backward(s: Shape, time: int, reach: int | None = None, element: int = HALF) -> Work:
    """Backward of `softmax_forward`, scores computed again: five products where the forward pass has two."""
    b = _Bytes.of(s, element)
    moved = 4 * b.query + 4 * b.key + b.lse
    return Work(10 * s.heads * s.head_dim * window_keys(reach or time, time), moved, moved)


def decode(s: Shape) -> Work:
    """One decode step of one row: slots read and written, window read, one token written to the ring, one absorbed.

    Args:
        s: the layer.
    Returns:
        FLOPs and bytes per row and step; the context does not occur.
    """
    b = _Bytes.of(s, HALF)
    slots = 2 * s.groups * s.slots * s.head_dim * SINGLE
    near = 2 * s.window * b.key
    token = 2 * b.query + 2 * (2 * b.key + b.gate) + (2 * b.key + b.gate)
    flops = 4 * s.heads * s.head_dim * (s.slots + s.window) + 4 * s.groups * s.slots * s.head_dim
    moved = 2 * slots + near + token
    return Work(flops, moved, moved)


def floor(work: Work, tokens: int, peaks: Peaks) -> dict[str, float]:
    """How long a device needs at least.

    Args:
        work: per token.
        tokens: how many.
        peaks: the device's ceilings.
    Returns:
        compute_ms, memory_ms and io_ms, and their floor ms = max(compute_ms, memory_ms).
    """
    compute, memory = work.flops * tokens / peaks.flops * 1e3, work.bytes * tokens / peaks.bandwidth * 1e3
    return {
        "ms": max(compute, memory),
        "compute_ms": compute,
        "memory_ms": memory,
        "io_ms": work.io_bytes * tokens / peaks.bandwidth * 1e3,
    }
