"""Backward pass, query side: gradient of the queries, and the softmax weights on the slots with their gradients.

With P the weights, dP their gradient and delta = do . o - dlse, score gradients are dS = P (dP - delta); on the slots
dP has the form of the scores with (do, V) in place of (q, K).

Legend: as in triton_common and scan.
"""

from __future__ import annotations

from .forward import slot_products
from .triton_common import (
    FLOOR,
    LOG2E,
    NEG_INF,
    SIZES,
    dot,
    half_columns,
    lifted_writes,
    load_scale,
    load_turn,
    locate,
    narrow,
    tl,
    triton,
    turn,
    wide,
    write_strength,
)


@triton.jit
def read_keys(
    grads, faded, state_k, k, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j, col_a, col_b,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """What score gradients [BT,BM] read from the slot keys, halves [BT,BH]; `faded` is grads 2^G."""
    dtype = k.dtype.element_ty
    at = m[:, None] * D
    ok = m_ok[:, None] & (j < D // 2)[None, :]
    acc_a = dot(faded, tl.load(state_k + at + col_a[None, :], mask=ok, other=0.0), PRECISION)
    acc_b = dot(faded, tl.load(state_k + at + col_b[None, :], mask=ok, other=0.0), PRECISION)
    for first in tl.range(t0, t0 + BT, BC, num_stages=1):
        write, middle = lifted_writes(g2, log_decay, first, length, hidden, G * M, m, m_ok, BC)
        token = first + tl.arange(0, BC)
        fall = tl.where((row_ok & (i >= first))[:, None], tl.exp2(decay - middle[None, :]), 0.0)
        mixed = dot(grads * fall, tl.trans(write), DECAY_PRECISION)
        mixed = narrow(tl.where(i[:, None] >= token[None, :], mixed, 0.0), dtype)
        token_ok = ((token >= hidden) & (token < length))[:, None] & (j < D // 2)[None, :]
        token_at = tl.arange(0, BC)[:, None] * (G * D)
        base = k + wide(first) * (G * D)
        acc_a += dot(mixed, tl.load(base + token_at + col_a[None, :], mask=token_ok, other=0.0), PRECISION)
        acc_b += dot(mixed, tl.load(base + token_at + col_b[None, :], mask=token_ok, other=0.0), PRECISION)
    return acc_a, acc_b


@triton.jit
def slot_block(
    m, q_a, q_b, grad_a, grad_b, state_k, state_v, k, v, g2, log_decay, slot_weights, slot_grads, decay_grads, log_sum,
    drop, n, i, row_ok, t0, length, hidden, j, col_a, col_b, scale_a, scale_b, scale, bias2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    MASK_EMPTY: tl.constexpr, HAS_SCALE: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """Store weights, score gradients and what acts on the running decay, for slots m.

    Returns:
        what the score gradients read from the slot keys, halves [BT,BH] x 2, and the score gradients' sums [BT].
    """
    dtype = k.dtype.element_ty
    scale2 = scale * LOG2E
    tile_g2 = g2 + t0.to(tl.int64) * (G * M)
    tile_decay = log_decay + t0.to(tl.int64) * (G * M)
    m_ok = m < M
    keep = row_ok[:, None] & m_ok[None, :]
    decay = tl.load(tile_g2 + n[:, None] * (G * M) + m[None, :], mask=keep, other=0.0)
    scores, own_k = slot_products(
        q_a, q_b, state_k, k, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j, col_a, col_b, scale_a,
        scale_b, G, D, M, BT, BC, HAS_SCALE, True, PRECISION, DECAY_PRECISION,
    )  # fmt: skip
    tl.debug_barrier()  # one after the other, or the registers do not suffice
    grads, own_v = slot_products(
        grad_a, grad_b, state_v, v, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j, col_a, col_b, 1.0,
        1.0, G, D, M, BT, BC, False, True, PRECISION, DECAY_PRECISION,
    )  # fmt: skip
    ok = keep
    if MASK_EMPTY:
        ok = ok & (i >= hidden)[:, None]
    tl.debug_barrier()
    absorbs = (row_ok & (i >= hidden))[:, None] & m_ok[None, :]
    at = n[:, None] * (G * M) + m[None, :]
    own_write = tl.maximum(tl.load(tile_decay + at, mask=absorbs, other=0.0), FLOOR)
    own_write = write_strength(own_write)
    whole = (scores + own_k[:, None] * own_write) * scale2
    weights = tl.where(ok, tl.exp2(whole + bias2 - log_sum[:, None]), 0.0)
    whole = weights * (grads + own_v[:, None] * own_write - drop[:, None])
    at = n[:, None] * (H * M) + m[None, :]
    share = scores * whole * scale + grads * weights
    tl.store(decay_grads + at, narrow(share, decay_grads.dtype.element_ty), mask=keep)
    grads = whole
    tl.store(slot_weights + at, narrow(weights, slot_weights.dtype.element_ty), mask=keep)
    tl.store(slot_grads + at, narrow(grads, slot_grads.dtype.element_ty), mask=keep)
    faded = narrow(grads * tl.exp2(decay), dtype)
    tl.debug_barrier()
    read_a, read_b = read_keys(
        grads, faded, state_k, k, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j, col_a, col_b,
        G, D, M, BT, BC, PRECISION, DECAY_PRECISION,
    )  # fmt: skip
    return read_a, read_b, tl.sum(grads, 1)


@triton.jit(do_not_specialize=SIZES)
def query_side(
    q, k, turned, v, log_decay, g2, states, cos, sin, slot_q_scale, slot_bias, o, lse, do, dlse,
    dq, slot_weights, slot_grads, decay_grads, delta, part_scale, part_bias, part_sink,
    starts, lengths, first_tile, tile_doc, seen, T, tiles, total_tiles, past, W, S, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK_EMPTY: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DLSE: tl.constexpr, RAGGED: tl.constexpr,
    SEEN: tl.constexpr, SHARED_COS: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, delta, slot weights with their score gradients, and this tile's share of the parameters' and sinks'."""
    tile = tl.program_id(0) // H
    h = tl.program_id(0) % H
    g = h // (H // G)
    doc, c, start, length, hidden = locate(
        tile, starts, lengths, first_tile, tile_doc, seen, T, tiles, W, S, RAGGED, SEEN
    )
    t0 = c * BT
    if t0 >= length:
        return
    i = t0 + tl.arange(0, BT)
    row_ok = i < length
    row0 = start + t0
    n = tl.arange(0, BT)
    j = tl.arange(0, BH)
    col_a, col_b = half_columns(j, D // 2, P)
    d = tl.arange(0, BD)
    head_ok = row_ok[:, None] & (j < D // 2)[None, :]
    first_row = row0 * H + h
    head_row = n * H
    q_at = n[:, None] * (H * D)
    q += first_row * D
    o += first_row * D
    do += first_row * D
    dq += first_row * D
    lse += first_row
    delta += first_row
    slot_weights += first_row * M
    slot_grads += first_row * M
    decay_grads += first_row * M
    full_at = q_at + d[None, :]
    full_ok = row_ok[:, None] & (d < D)[None, :]
    dtype = q.dtype.element_ty
    key0 = start + doc * past
    grad = tl.load(do + full_at, mask=full_ok, other=0.0)
    drop = tl.sum(tl.load(o + full_at, mask=full_ok, other=0.0).to(tl.float32) * grad.to(tl.float32), 1)
    if HAS_DLSE:
        drop -= tl.load(dlse + first_row + head_row, mask=row_ok, other=0.0)
    tl.store(delta + head_row, drop, mask=row_ok)
    log_sum = tl.load(lse + head_row, mask=row_ok, other=0.0)
    log_sum = tl.where(log_sum == NEG_INF, 0.0, log_sum) * LOG2E
    scale2 = scale * LOG2E
    acc_a = tl.zeros([BT, BH], tl.float32)
    acc_b = tl.zeros([BT, BH], tl.float32)

    if SLOTS:
        q_a = tl.load(q + q_at + col_a[None, :], mask=head_ok, other=0.0)
        q_b = tl.load(q + q_at + col_b[None, :], mask=head_ok, other=0.0)
        grad_a = tl.load(do + q_at + col_a[None, :], mask=head_ok, other=0.0)
        grad_b = tl.load(do + q_at + col_b[None, :], mask=head_ok, other=0.0)
        scale_a, scale_b = load_scale(slot_q_scale + h * D, j, col_a, col_b, D, HAS_SCALE)
        bias2 = 0.0
        if HAS_BIAS:
            bias2 = tl.load(slot_bias + h).to(tl.float32) * LOG2E
        bias_sum = tl.zeros([BT], tl.float32)
        absorbed = (key0 + past - W) * G + g
        rows_g2 = g2 + (start * G + g) * M
        rows_decay = log_decay + absorbed * M
        rows_k = k + absorbed * D
        rows_v = v + absorbed * D
        state_k = states + (tile.to(tl.int64) * G + g) * (M * D)
        state_v = state_k + total_tiles.to(tl.int64) * (G * M * D)
        for block in tl.static_range((M + BM - 1) // BM):
            read_a, read_b, sums = slot_block(
                block * BM + tl.arange(0, BM), q_a, q_b, grad_a, grad_b, state_k, state_v, rows_k, rows_v, rows_g2,
                rows_decay, slot_weights, slot_grads, decay_grads, log_sum, drop, n, i, row_ok, t0, length, hidden, j,
                col_a, col_b, scale_a, scale_b, scale, bias2, H, G, D, M, BT, BC, MASK_EMPTY, HAS_SCALE, PRECISION,
                DECAY_PRECISION,
            )  # fmt: skip
            bias_sum += sums
            if block == 0:  # nothing is held while the first scores are made
                acc_a, acc_b = read_a, read_b
            else:
                acc_a += read_a
                acc_b += read_b
        if HAS_BIAS:
            tl.store(part_bias + tile.to(tl.int64) * H + h, tl.sum(bias_sum, 0))
        if HAS_SCALE:
            raw_a = tl.load(q + q_at + col_a[None, :], mask=head_ok, other=0.0).to(tl.float32)
            raw_b = tl.load(q + q_at + col_b[None, :], mask=head_ok, other=0.0).to(tl.float32)
            at = part_scale + (tile.to(tl.int64) * H + h) * D
            tl.store(at + col_a, tl.sum(acc_a * raw_a, 0) * scale, mask=j < D // 2)
            tl.store(at + col_b, tl.sum(acc_b * raw_b, 0) * scale, mask=j < D // 2)
            acc_a *= scale_a[None, :]
            acc_b *= scale_b[None, :]

    if WINDOW or SINKS:
        if SLOTS:
            tl.debug_barrier()  # as in the forward pass
        q_a = tl.load(q + q_at + col_a[None, :], mask=head_ok, other=0.0)
        q_b = tl.load(q + q_at + col_b[None, :], mask=head_ok, other=0.0)
        turn_row = (doc * 0 if SHARED_COS else key0) + t0 + past
        if P > 0:
            cosine, sine = load_turn(cos, sin, turn_row, n, j, row_ok, P)
            q_a, q_b = turn(q_a.to(tl.float32), q_b.to(tl.float32), cosine, sine)
            q_a, q_b = narrow(q_a, dtype), narrow(q_b, dtype)
            acc_a, acc_b = turn(acc_a, acc_b, cosine, sine)
        grad = tl.load(do + full_at, mask=full_ok, other=0.0)
        turned += (key0 * G + g) * D
        v += (key0 * G + g) * D
    if SINKS:
        for s0 in tl.range(0, S, BS, num_stages=1):
            s = s0 + tl.arange(0, BS)
            s_ok = (s < S) & (s < past + length)
            key_at = s[:, None] * (G * D)
            key_ok = s_ok[:, None] & (j < D // 2)[None, :]
            k_a = tl.load(turned + key_at + col_a[None, :], mask=key_ok, other=0.0)
            k_b = tl.load(turned + key_at + col_b[None, :], mask=key_ok, other=0.0)
            values = tl.load(v + key_at + d[None, :], mask=s_ok[:, None] & (d < D)[None, :], other=0.0)
            scores = dot(q_a, tl.trans(k_a), PRECISION) + dot(q_b, tl.trans(k_b), PRECISION)
            seen_ok = (s_ok[None, :] & (s[None, :] <= i[:, None] + (W + S - hidden))) & row_ok[:, None]
            weights = tl.where(seen_ok, tl.exp2(scores * scale2 - log_sum[:, None]), 0.0)
            grads = weights * (dot(grad, tl.trans(values), PRECISION) - drop[:, None])
            grads = narrow(grads, dtype)
            acc_a += dot(grads, k_a, PRECISION)
            acc_b += dot(grads, k_b, PRECISION)
            sink_a = dot(tl.trans(grads), q_a, PRECISION)
            sink_b = dot(tl.trans(grads), q_b, PRECISION)
            if P > 0:
                sink_row = doc * 0 if SHARED_COS else key0
                sink_cosine, sink_sine = load_turn(cos, sin, sink_row, s, j, s_ok, P)
                sink_a, sink_b = turn(sink_a, sink_b, sink_cosine, -sink_sine)
            sink_at = (((tile.to(tl.int64) * H + h) * S + s) * (2 * D))[:, None]
            sink_keep = (s < S)[:, None] & (j < D // 2)[None, :]
            tl.store(part_sink + sink_at + col_a[None, :], sink_a * scale, mask=sink_keep)
            tl.store(part_sink + sink_at + col_b[None, :], sink_b * scale, mask=sink_keep)
            sink_v = dot(tl.trans(narrow(weights, dtype)), grad, PRECISION)
            tl.store(part_sink + sink_at + D + d[None, :], sink_v, mask=(s < S)[:, None] & (d < D)[None, :])
    if WINDOW:
        low = tl.maximum(tl.maximum(t0 + past - W + 1, hidden + past - W), 0)
        high = tl.minimum(t0 + BT, length) + past
        for x0 in range(low, high, BN):
            x = x0 + tl.arange(0, BN)
            x_ok = x < high
            base = wide(x0) * (G * D)
            key_at = tl.arange(0, BN)[:, None] * (G * D)
            key_ok = x_ok[:, None] & (j < D // 2)[None, :]
            k_a = tl.load(turned + base + key_at + col_a[None, :], mask=key_ok, other=0.0)
            k_b = tl.load(turned + base + key_at + col_b[None, :], mask=key_ok, other=0.0)
            values = tl.load(v + base + key_at + d[None, :], mask=x_ok[:, None] & (d < D)[None, :], other=0.0)
            scores = dot(q_a, tl.trans(k_a), PRECISION) + dot(q_b, tl.trans(k_b), PRECISION)
            age = i[:, None] + past - x[None, :]
            seen_ok = (age >= 0) & (age < W) & x_ok[None, :] & row_ok[:, None]
            weights = tl.where(seen_ok, tl.exp2(scores * scale2 - log_sum[:, None]), 0.0)
            grads = weights * (dot(grad, tl.trans(values), PRECISION) - drop[:, None])
            grads = narrow(grads, dtype)
            acc_a += dot(grads, k_a, PRECISION)
            acc_b += dot(grads, k_b, PRECISION)
    if (WINDOW or SINKS) and P > 0:
        cosine, sine = load_turn(cos, sin, turn_row, n, j, row_ok, P)
        acc_a, acc_b = turn(acc_a, acc_b, cosine, -sine)
    tl.store(dq + q_at + col_a[None, :], narrow(acc_a * scale, dtype), mask=head_ok)
    tl.store(dq + q_at + col_b[None, :], narrow(acc_b * scale, dtype), mask=head_ok)
