"""One token per row in Triton, in place on the state: one launch, or two where a head's work is split over programs.

Legend: B rows, H query heads, G key/value heads (R = H / G), D head_dim, M slots, W window, C = W + 1 ring places,
S sinks, P rotary dims. `head` counts rows x key/value heads; `rank` is that of the incoming token.

A head's work is a list of units: blocks of BM slots, then blocks of BN window keys, counted from the newest. Program
`split` of a head takes every `splits`-th unit; the last one also writes the incoming token into the state, attends to
it from registers and takes the sinks. No program reads what another writes:
- the ring place and the sink place of the incoming token are read by none;
- the place that the absorbed token leaves is another one, as the ring holds one more than the window; without a window
  the incoming token is absorbed from registers;
- a block of slots belongs to one program;
- `seen` is raised after the launch: by the second one, or by torch.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .state import NHAState
from .tiling import power_of_two
from .triton_common import (
    FLOOR,
    LOG2E,
    NEG_INF,
    SIZES,
    dot,
    half_columns,
    load_turn,
    narrow,
    softmax_step,
    tl,
    triton,
    turn,
    wide,
    write_strength,
)

SLOT_BLOCK = 16
SINK_BLOCK = 16
COMBINE_BLOCK = 16
STATS = 4  # floats after the D of a partial output: maximum, sum, and two that keep rows aligned to 16 bytes
UNSPECIALISED = (*SIZES, "splits", "cos_step", "real_step")


@triton.jit
def take_in(
    k, v, log_decay, cos, sin, keys, values, kept_decay, kept_cos, kept_sin, place, g, d,
    D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BQ: tl.constexpr, DECAY: tl.constexpr,
):  # fmt: skip
    """Copy the incoming token of one head to a ring or sink place, head 0 of the row its cos and sin too.

    All pointers are at the head's (cos, sin: the row's) first element.
    """
    tl.store(keys + place * D + d, narrow(tl.load(k + d, mask=d < D), keys.dtype.element_ty), mask=d < D)
    tl.store(values + place * D + d, narrow(tl.load(v + d, mask=d < D), values.dtype.element_ty), mask=d < D)
    if DECAY:
        m = tl.arange(0, BQ)
        tl.store(kept_decay + place * M + m, tl.load(log_decay + m, mask=m < M).to(tl.float32), mask=m < M)
    if P > 0:
        ok = d < tl.where(g == 0, P, 0)
        tl.store(kept_cos + place * P + d, tl.load(cos + d, mask=ok).to(tl.float32), mask=ok)
        tl.store(kept_sin + place * P + d, tl.load(sin + d, mask=ok).to(tl.float32), mask=ok)


@triton.jit
def absorb(slots, at, ok, keep, write, token, absorbs):
    """A block of slots [BM,BD] after taking `token` [BD] in; written back if it does."""
    old = tl.load(slots + at, mask=ok, other=0.0)
    new = old * keep[:, None] + write[:, None] * token[None, :]
    if absorbs:
        tl.store(slots + at, new, mask=ok)
    return new


@triton.jit
def incoming_step(
    top, total, acc, q_a, q_b, k, v, cosine, sine, ring_k, ring_v, j, col_a, col_b, d, scale2,
    D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Online softmax over the incoming token alone, its key and value as the ring will keep them."""
    half_ok = (j < D // 2)[None, :]
    a = narrow(tl.load(k + col_a[None, :], mask=half_ok, other=0.0), ring_k.dtype.element_ty).to(tl.float32)
    b = narrow(tl.load(k + col_b[None, :], mask=half_ok, other=0.0), ring_k.dtype.element_ty).to(tl.float32)
    if P > 0:
        a, b = turn(a, b, cosine, sine)
    x = narrow(tl.load(v + d, mask=d < D, other=0.0), ring_v.dtype.element_ty).to(tl.float32)
    score = (tl.sum(q_a * a, 1) + tl.sum(q_b * b, 1)) * scale2
    best = tl.maximum(top, score)
    fade, weight = tl.exp2(top - best), tl.exp2(score - best)
    return best, total * fade + weight, acc * fade[:, None] + weight[:, None] * x[None, :]


@triton.jit
def exact_step(
    top, total, acc, q_a, q_b, keys, values, cos, sin, turn_row, place, ok, j, col_a, col_b, d, scale2,
    D: tl.constexpr, P: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax over the un-rotated keys and the values at `place` [BN], where ok."""
    at = place[:, None] * D
    half_ok = ok[:, None] & (j < D // 2)[None, :]
    a = tl.load(keys + at + col_a[None, :], mask=half_ok, other=0.0).to(tl.float32)
    b = tl.load(keys + at + col_b[None, :], mask=half_ok, other=0.0).to(tl.float32)
    if P > 0:
        cosine, sine = load_turn(cos, sin, turn_row, place, j, ok, P)
        a, b = turn(a, b, cosine, sine)
    x = tl.load(values + at + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    scores = dot(q_a, tl.trans(a), PRECISION) + dot(q_b, tl.trans(b), PRECISION)
    scores = tl.where(ok[None, :], scores * scale2, NEG_INF)
    return softmax_step(top, total, acc, scores, x, PRECISION)


@triton.jit(do_not_specialize=UNSPECIALISED)
def decode(
    q, k, v, log_decay, cos, sin, slot_q_scale, slot_bias, real, slot_k, slot_v, ring_k, ring_v, ring_log_decay,
    ring_cos, ring_sin, sink_k, sink_v, sink_cos, sink_sin, seen, o, parts,
    W, S, splits, cos_step, real_step, scale2,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BR: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr, BQ: tl.constexpr,
    SLOTS: tl.constexpr, EXACT: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK_EMPTY: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, PADDED: tl.constexpr, SPLIT: tl.constexpr, STATS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one row and key/value head: o [.., R, D], or a partial one [.., R, D + STATS] if SPLIT.

    SLOTS: the slots are attended to (they absorb anyway); EXACT: window and sinks are.
    """
    split = tl.program_id(0) % splits
    head = wide(tl.program_id(0) // splits)
    row = head // G
    g = head % G
    rank = tl.load(seen + row)
    here = tl.full([], 1, tl.int32)
    if PADDED:
        here = tl.load(real + row * real_step).to(tl.int32)
    C = W + 1
    place = (rank % C).to(tl.int32)
    r = tl.arange(0, BR)
    j = tl.arange(0, BH)
    d = tl.arange(0, BD)
    col_a, col_b = half_columns(j, D // 2, P)
    q += head * (R * D)
    k += head * D
    v += head * D
    log_decay += head * M
    top = tl.full([BR], NEG_INF, tl.float32)
    total = tl.zeros([BR], tl.float32)
    acc = tl.zeros([BR, BD], tl.float32)

    # slots, each block updated before it is attended to
    absorbs = (rank >= W + S) & (here > 0)
    used = absorbs
    if SLOTS and not MASK_EMPTY:
        used = here > 0
    gone_k, gone_v, gone_decay = k, v, log_decay
    if WINDOW:
        gone = head * C + (rank + 1) % C
        gone_k, gone_v, gone_decay = ring_k + gone * D, ring_v + gone * D, ring_log_decay + gone * M
    token_ok = d < tl.where(absorbs, D, 0)
    token_k = narrow(tl.load(gone_k + d, mask=token_ok, other=0.0), ring_k.dtype.element_ty).to(tl.float32)
    token_v = narrow(tl.load(gone_v + d, mask=token_ok, other=0.0), ring_v.dtype.element_ty).to(tl.float32)
    slot_k += head * (M * D)
    slot_v += head * (M * D)
    if SLOTS:
        slot_q_at = r[:, None] * D + d[None, :]
        slot_q_ok = (r < R)[:, None] & (d < D)[None, :]
        slot_q = tl.load(q + slot_q_at, mask=slot_q_ok, other=0.0).to(tl.float32)
        if HAS_SCALE:
            slot_q *= tl.load(slot_q_scale + g * (R * D) + slot_q_at, mask=slot_q_ok, other=0.0).to(tl.float32)
        bias2 = tl.zeros([BR], tl.float32)
        if HAS_BIAS:
            bias2 = tl.load(slot_bias + g * R + r, mask=r < R, other=0.0).to(tl.float32) * LOG2E
    slot_blocks: tl.constexpr = (M + BM - 1) // BM
    for block in tl.range(split, tl.where(used, slot_blocks, 0), splits, num_stages=1):
        m = block * BM + tl.arange(0, BM)
        fall = tl.load(gone_decay + m, mask=m < tl.where(absorbs, M, 0), other=0.0).to(tl.float32)
        fall = tl.maximum(fall, FLOOR)
        keep, write = tl.exp(fall), write_strength(fall)
        at = m[:, None] * D + d[None, :]
        ok = (m < M)[:, None] & (d < D)[None, :]
        keys = absorb(slot_k, at, ok, keep, write, token_k, absorbs)
        values = absorb(slot_v, at, ok, keep, write, token_v, absorbs)
        if SLOTS:
            scores = dot(slot_q, tl.trans(keys), PRECISION) * scale2 + bias2[:, None]
            scores = tl.where((m < M)[None, :], scores, NEG_INF)
            top, total, acc = softmax_step(top, total, acc, scores, values, PRECISION)

    # the incoming token, and sinks before it
    last = tl.where(split == splits - 1, here, 0)
    to_sink = rank < S
    ring_k += head * C * D
    ring_v += head * C * D
    sink_k += head * S * D
    sink_v += head * S * D
    cos += row * cos_step
    sin += row * cos_step
    if last > 0:
        if to_sink:
            if SINKS:
                take_in(
                    k, v, log_decay, cos, sin, sink_k, sink_v, ring_log_decay, sink_cos + row * S * P,
                    sink_sin + row * S * P, rank.to(tl.int32), g, d, D, M, P, BQ, False,
                )  # fmt: skip
        else:
            take_in(
                k, v, log_decay, cos, sin, ring_k, ring_v, ring_log_decay + head * C * M, ring_cos + row * C * P,
                ring_sin + row * C * P, place, g, d, D, M, P, BQ, True,
            )  # fmt: skip
    if EXACT:
        one = tl.arange(0, 1)
        head_ok = (r < R)[:, None] & (j < D // 2)[None, :]
        q_a = tl.load(q + r[:, None] * D + col_a[None, :], mask=head_ok, other=0.0).to(tl.float32)
        q_b = tl.load(q + r[:, None] * D + col_b[None, :], mask=head_ok, other=0.0).to(tl.float32)
        cosine, sine = load_turn(cos, sin, 0, one, j, one < 1, P)
        if P > 0:
            q_a, q_b = turn(q_a, q_b, cosine, sine)
        if (last > 0) & (to_sink | (W > 0)):
            top, total, acc = incoming_step(
                top, total, acc, q_a, q_b, k, v, cosine, sine, ring_k, ring_v, j, col_a, col_b, d, scale2, D, P
            )
        if SINKS:
            sinks = tl.where(last > 0, tl.minimum(rank, S), 0).to(tl.int32)
            for s0 in tl.range(0, sinks, BS, num_stages=1):
                s = s0 + tl.arange(0, BS)
                top, total, acc = exact_step(
                    top, total, acc, q_a, q_b, sink_k, sink_v, sink_cos, sink_sin, row * S, s, s < sinks, j, col_a,
                    col_b, d, scale2, D, P, PRECISION,
                )  # fmt: skip
        if WINDOW:  # ages 1 to `oldest`; the token of age 0 is the incoming one
            oldest = tl.where(here > 0, tl.minimum(rank - S, W - 1), 0).to(tl.int32)
            first = (split + slot_blocks * (splits - 1)) % splits
            for x0 in tl.range(first * BN, oldest, splits * BN):
                age = x0 + 1 + tl.arange(0, BN)
                at = place - age
                at = tl.where(at < 0, at + C, at)
                top, total, acc = exact_step(
                    top, total, acc, q_a, q_b, ring_k, ring_v, ring_cos, ring_sin, row * C, at, age <= oldest, j,
                    col_a, col_b, d, scale2, D, P, PRECISION,
                )  # fmt: skip

    ok = (r < R)[:, None] & (d < D)[None, :]
    if SPLIT:
        parts += (head * splits + split) * (R * (D + STATS))
        tl.store(parts + r[:, None] * (D + STATS) + d[None, :], acc, mask=ok)
        tl.store(parts + r * (D + STATS) + D, top, mask=r < R)
        tl.store(parts + r * (D + STATS) + D + 1, total, mask=r < R)
    else:
        acc *= tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)[:, None]
        tl.store(o + head * (R * D) + r[:, None] * D + d[None, :], narrow(acc, o.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=UNSPECIALISED)
def combine(
    parts, o, seen, real, splits, real_step,
    R: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BX: tl.constexpr, BD: tl.constexpr, PADDED: tl.constexpr,
    STATS: tl.constexpr,
):  # fmt: skip
    """Output of one row and query head from the partial ones of its splits, in their order; raises `seen`."""
    program = wide(tl.program_id(0))
    if program % (G * R) == 0:
        row = program // (G * R)
        step = tl.full([], 1, tl.int64)
        if PADDED:
            step = tl.load(real + row * real_step).to(tl.int64)
        tl.store(seen + row, tl.load(seen + row) + step)
    parts += (program // R * splits * R + program % R) * (D + STATS)
    d = tl.arange(0, BD)
    top = tl.full([], NEG_INF, tl.float32)
    total = tl.full([], 0.0, tl.float32)
    acc = tl.zeros([BD], tl.float32)
    for x0 in tl.range(0, splits, BX, num_stages=1):
        x = x0 + tl.arange(0, BX)
        at = x * (R * (D + STATS))
        tops = tl.load(parts + at + D, mask=x < splits, other=NEG_INF)
        totals = tl.load(parts + at + D + 1, mask=x < splits, other=0.0)
        part = tl.load(parts + at[:, None] + d[None, :], mask=(x < splits)[:, None] & (d < D)[None, :], other=0.0)
        best = tl.maximum(top, tl.max(tops, 0))
        safe = tl.where(best == NEG_INF, 0.0, best)
        fade, weight = tl.exp2(top - safe), tl.exp2(tops - safe)
        total = total * fade + tl.sum(totals * weight, 0)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        top = best
    acc *= tl.where(total > 0.0, 1.0 / tl.where(total > 0.0, total, 1.0), 0.0)
    tl.store(o + program * D + d, narrow(acc, o.dtype.element_ty), mask=d < D)


@lru_cache(maxsize=8)
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; 1 for the interpreter's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def choose_blocks(dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Window keys per block, and warps, for which registers do not spill (or little, for D = 256 in fp32)."""
    row = power_of_two(dim) * dtype.itemsize  # bytes of a key
    return 16 if row > 512 else 32, 4 if row <= 256 else 8


def choose_splits(heads: int, slots: int, window: int, multiprocessors: int, key_block: int) -> int:
    """Programs per row and key/value head.

    Args:
        heads: B * G.
        slots, window: M, W.
        multiprocessors: of the device.
        key_block: window keys per block.
    Returns:
        1 where the heads alone give every multiprocessor two programs; else as many as do, each with equally many
        units of work (blocks of slots or of window keys), at most one program per unit.
    """
    if heads >= 2 * multiprocessors:
        return 1
    units = -(-slots // SLOT_BLOCK) + -(-max(window - 1, 0) // key_block)
    each = -(-units // min(units, -(-2 * multiprocessors // heads)))
    return -(-units // each)


def decode_step_triton(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_decay: torch.Tensor,
    state: NHAState,
    *,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    scale: float | None,
    mask_empty: bool,
    slot_q_scale: torch.Tensor | None,
    slot_bias: torch.Tensor | None,
    padding_mask: torch.Tensor | None,
    branch: str,
    splits: int = 0,
) -> torch.Tensor:
    """Take one token per row into the state and attend from it. Waits for no device; fit for graph capture.

    Args:
        As `ops.nha_decode`; q, k, v in fp32, bf16 or fp16, the state's slots in fp32, D even and at most 256.
        splits: programs per row and key/value head; 0 chooses.
    Returns:
        o [B,1,H,D] in q.dtype.
    Reference: decode_torch.decode_step.
    """
    batch, _, heads, dim = q.shape
    groups, slots = log_decay.shape[2:]
    assert state.slot_k.dtype == torch.float32 and dim % 2 == 0 and dim <= 256, "not for this kernel"
    for name, x in state.tensors().items():
        if not x.is_contiguous():  # kernels write it in place
            setattr(state, name, x.contiguous())
    q, k, v, log_decay = q.contiguous(), k.contiguous(), v.contiguous(), log_decay.contiguous()
    rotary = 0 if cos is None else cos.shape[-1]
    cos, sin = (q, q) if cos is None or sin is None else (cos.contiguous(), sin.contiguous())
    slot_scale = q if slot_q_scale is None else slot_q_scale.contiguous()  # q stands for pointers that are not read
    bias = q if slot_bias is None else slot_bias.contiguous()
    real = state.seen if padding_mask is None else padding_mask
    key_block, warps = choose_blocks(dim, q.dtype)
    splits = splits or choose_splits(batch * groups, slots, state.window, processors(q.device), key_block)
    shared = {"R": heads // groups, "G": groups, "D": dim, "BD": power_of_two(dim), "STATS": STATS}
    shared |= {"PADDED": padding_mask is not None}
    out = torch.empty_like(q)
    parts = out
    if splits > 1:
        parts = torch.empty(batch * heads * splits * (dim + STATS), dtype=torch.float32, device=q.device)
    decode[(batch * groups * splits,)](
        q, k, v, log_decay, cos, sin, slot_scale, bias, real, state.slot_k, state.slot_v, state.ring_k, state.ring_v,
        state.ring_log_decay, state.ring_cos, state.ring_sin, state.sink_k, state.sink_v, state.sink_cos,
        state.sink_sin, state.seen, out, parts, state.window, state.sinks, splits,
        rotary if rotary and cos.shape[0] > 1 else 0, real.stride(0),
        (dim**-0.5 if scale is None else scale) * LOG2E.value, M=slots, P=rotary, BR=power_of_two(heads // groups),
        BM=SLOT_BLOCK, BN=key_block, BS=SINK_BLOCK, BH=power_of_two(dim // 2), BQ=power_of_two(slots),
        SLOTS=branch != "window", EXACT=branch != "slots", WINDOW=state.window > 0, SINKS=state.sinks > 0,
        MASK_EMPTY=mask_empty, HAS_SCALE=slot_q_scale is not None, HAS_BIAS=slot_bias is not None, SPLIT=splits > 1,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", **shared, num_warps=warps,
        num_stages=2,
    )  # fmt: skip
    if splits > 1:
        combine[(batch * heads,)](
            parts, out, state.seen, real, splits, real.stride(0), BX=COMBINE_BLOCK, **shared, num_warps=4
        )
    else:
        state.seen += 1 if padding_mask is None else padding_mask[:, 0]
    return out
