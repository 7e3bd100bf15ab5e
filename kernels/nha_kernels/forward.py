"""Launch 2: slots, sinks and window under one online softmax, one program per tile and query head.

Legend: as in triton_common and scan.
"""

from __future__ import annotations

from .triton_common import (
    LN2,
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
    scaled,
    softmax_step,
    tl,
    triton,
    turn,
    wide,
)


@triton.jit
def slot_products(
    x_a, x_b, state, tokens, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j, col_a, col_b, scale_a,
    scale_b, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    HAS_SCALE: tl.constexpr, APART: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """Products of rows x (halves) with slots [BT,BM] as each row finds them; of queries with keys, unscaled scores.

    APART leaves out what a row's own token writes, and gives its product with the row [BT] beside it (else 0): no
    decay acts on it, and in the gradient of the decay its two halves would only cancel.
    """
    at = m[None, :] * D
    ok = (j < D // 2)[:, None] & m_ok[None, :]
    held = scaled(tl.load(state + at + col_a[:, None], mask=ok, other=0.0), scale_a, HAS_SCALE)
    out = dot(x_a, held, PRECISION)
    held = scaled(tl.load(state + at + col_b[:, None], mask=ok, other=0.0), scale_b, HAS_SCALE)
    out += dot(x_b, held, PRECISION)
    out *= tl.exp2(decay)
    own = tl.zeros([BT], tl.float32)
    for first in tl.range(t0, t0 + BT, BC, num_stages=1):
        write, middle = lifted_writes(g2, log_decay, first, length, hidden, G * M, m, m_ok, BC)
        n = tl.arange(0, BC)
        token_ok = ((first + n >= hidden) & (first + n < length))[None, :] & (j < D // 2)[:, None]
        token = tokens + wide(first) * (G * D) + n[None, :] * (G * D)
        x = scaled(tl.load(token + col_a[:, None], mask=token_ok, other=0.0), scale_a, HAS_SCALE)
        pairs = dot(x_a, x, PRECISION)
        x = scaled(tl.load(token + col_b[:, None], mask=token_ok, other=0.0), scale_b, HAS_SCALE)
        pairs += dot(x_b, x, PRECISION)
        if APART:
            own += tl.sum(tl.where(i[:, None] == (first + n)[None, :], pairs, 0.0), 1)
            pairs = tl.where(i[:, None] > (first + n)[None, :], pairs, 0.0)
        else:
            pairs = tl.where(i[:, None] >= (first + n)[None, :], pairs, 0.0)
        fall = tl.where((row_ok & (i >= first))[:, None], tl.exp2(decay - middle[None, :]), 0.0)
        out += dot(pairs, write, DECAY_PRECISION) * fall
    return out, own


@triton.jit
def slot_values(
    weights, state_v, v, g2, log_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, d,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
    DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """What weights [BT,BM] read from the slots, [BT,BD]."""
    dtype = v.dtype.element_ty
    values = tl.load(state_v + m[:, None] * D + d[None, :], mask=m_ok[:, None] & (d < D)[None, :], other=0.0)
    acc = dot(narrow(weights * tl.exp2(decay), dtype), values, PRECISION)
    for first in tl.range(t0, t0 + BT, BC, num_stages=1):
        write, middle = lifted_writes(g2, log_decay, first, length, hidden, G * M, m, m_ok, BC)
        token = first + tl.arange(0, BC)
        fall = tl.where((row_ok & (i >= first))[:, None], tl.exp2(decay - middle[None, :]), 0.0)
        mixed = dot(weights * fall, tl.trans(write), DECAY_PRECISION)
        mixed = tl.where(i[:, None] >= token[None, :], mixed, 0.0)
        token_ok = ((token >= hidden) & (token < length))[:, None] & (d < D)[None, :]
        token_at = tl.arange(0, BC)[:, None] * (G * D) + d[None, :]
        base = v + wide(first) * (G * D)
        acc += dot(narrow(mixed, dtype), tl.load(base + token_at, mask=token_ok, other=0.0), PRECISION)
    return acc


@triton.jit(do_not_specialize=SIZES)
def attend(
    q, k, turned, v, log_decay, g2, states, cos, sin, slot_q_scale, slot_bias, o, lse,
    starts, lengths, first_tile, tile_doc, seen, T, tiles, total_tiles, past, W, S, scale2,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    SLOTS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, MASK_EMPTY: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, RAGGED: tl.constexpr, SEEN: tl.constexpr,
    SHARED_COS: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """Output [.., H, D] and lse [.., H] of one tile and query head."""
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
    q += (row0 * H + h) * D
    q_at = n[:, None] * (H * D)
    dtype = q.dtype.element_ty
    key0 = start + doc * past  # first place of the document
    top = tl.full([BT], NEG_INF, tl.float32)
    total = tl.zeros([BT], tl.float32)
    acc = tl.zeros([BT, BD], tl.float32)

    if SLOTS:
        q_a = tl.load(q + q_at + col_a[None, :], mask=head_ok, other=0.0)
        q_b = tl.load(q + q_at + col_b[None, :], mask=head_ok, other=0.0)
        scale_a, scale_b = load_scale(slot_q_scale + h * D, j, col_a, col_b, D, HAS_SCALE)
        bias2 = 0.0
        if HAS_BIAS:
            bias2 = tl.load(slot_bias + h).to(tl.float32) * LOG2E
        absorbed = (key0 + past - W) * G + g  # the token that row 0 absorbs
        rows_g2 = g2 + (start * G + g) * M
        rows_decay = log_decay + absorbed * M
        rows_k = k + absorbed * D
        rows_v = v + absorbed * D
        state_k = states + (tile.to(tl.int64) * G + g) * (M * D)
        state_v = state_k + total_tiles.to(tl.int64) * (G * M * D)
        blocks: tl.constexpr = (M + BM - 1) // BM
        any_visible = t0 + BT > hidden
        if not MASK_EMPTY:
            any_visible = t0 >= 0
        if any_visible:
            for block in tl.static_range(blocks):
                m = block * BM + tl.arange(0, BM)
                m_ok = m < M
                at = n[:, None] * (G * M) + m[None, :]
                decay = tl.load(
                    rows_g2 + t0.to(tl.int64) * (G * M) + at, mask=row_ok[:, None] & m_ok[None, :], other=0.0
                )
                scores, own = slot_products(
                    q_a, q_b, state_k, rows_k, rows_g2, rows_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, j,
                    col_a, col_b, scale_a, scale_b, G, D, M, BT, BC, HAS_SCALE, False,
                    PRECISION, DECAY_PRECISION,
                )  # fmt: skip
                scores = scores * scale2 + bias2
                seen_ok = m_ok[None, :]
                if MASK_EMPTY:
                    seen_ok = seen_ok & (i >= hidden)[:, None]
                scores = tl.where(seen_ok, scores, NEG_INF)
                best = tl.maximum(top, tl.max(scores, 1))
                safe = tl.where(best == NEG_INF, 0.0, best)
                weights = tl.exp2(scores - safe[:, None])
                read = slot_values(
                    weights, state_v, rows_v, rows_g2, rows_decay, decay, i, row_ok, t0, length, hidden, m, m_ok, d,
                    G, D, M, BT, BC, PRECISION, DECAY_PRECISION,
                )  # fmt: skip
                if block == 0:  # nothing is held while the first scores are made
                    total = tl.sum(weights, 1)
                    acc = read
                else:
                    fade = tl.exp2(top - safe)
                    total = total * fade + tl.sum(weights, 1)
                    acc = acc * fade[:, None] + read
                top = best

    if WINDOW or SINKS:
        if SLOTS:
            tl.debug_barrier()  # keeps the compiler from loading what follows while the slots fill the registers
        q_a = tl.load(q + q_at + col_a[None, :], mask=head_ok, other=0.0)
        q_b = tl.load(q + q_at + col_b[None, :], mask=head_ok, other=0.0)
        if P > 0:
            turn_row = (doc * 0 if SHARED_COS else key0) + t0 + past
            cosine, sine = load_turn(cos, sin, turn_row, n, j, row_ok, P)
            q_a, q_b = turn(q_a.to(tl.float32), q_b.to(tl.float32), cosine, sine)
            q_a, q_b = narrow(q_a, dtype), narrow(q_b, dtype)
        turned += (key0 * G + g) * D
        v += (key0 * G + g) * D
    if SINKS:
        for s0 in tl.range(0, S, BS, num_stages=1):
            s = s0 + tl.arange(0, BS)
            s_ok = s < S
            at = s[None, :] * (G * D)
            ok = (j < D // 2)[:, None] & (s_ok & (s < past + length))[None, :]
            scores = dot(q_a, tl.load(turned + at + col_a[:, None], mask=ok, other=0.0), PRECISION)
            scores += dot(q_b, tl.load(turned + at + col_b[:, None], mask=ok, other=0.0), PRECISION)
            ok = (s_ok & (s < past + length))[:, None] & (d < D)[None, :]
            values = tl.load(v + s[:, None] * (G * D) + d[None, :], mask=ok, other=0.0)
            reached = s_ok[None, :] & (s[None, :] <= i[:, None] + (W + S - hidden))
            scores = tl.where(reached, scores * scale2, NEG_INF)
            top, total, acc = softmax_step(top, total, acc, scores, values, PRECISION)
    if WINDOW:
        low = tl.maximum(tl.maximum(t0 + past - W + 1, hidden + past - W), 0)
        high = tl.minimum(t0 + BT, length) + past
        for x0 in range(low, high, BN):
            x = x0 + tl.arange(0, BN)
            x_ok = x < high
            at = tl.arange(0, BN)[None, :] * (G * D)
            base = wide(x0) * (G * D)
            ok = (j < D // 2)[:, None] & x_ok[None, :]
            scores = dot(q_a, tl.load(turned + base + at + col_a[:, None], mask=ok, other=0.0), PRECISION)
            scores += dot(q_b, tl.load(turned + base + at + col_b[:, None], mask=ok, other=0.0), PRECISION)
            ok = x_ok[:, None] & (d < D)[None, :]
            values = tl.load(v + base + tl.arange(0, BN)[:, None] * (G * D) + d[None, :], mask=ok, other=0.0)
            age = i[:, None] + past - x[None, :]
            scores = tl.where((age >= 0) & (age < W) & x_ok[None, :], scores * scale2, NEG_INF)
            top, total, acc = softmax_step(top, total, acc, scores, values, PRECISION)

    some = total > 0.0
    acc = acc * tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)[:, None]
    o += (row0 * H + h) * D
    tl.store(o + q_at + d[None, :], narrow(acc, o.dtype.element_ty), mask=row_ok[:, None] & (d < D)[None, :])
    tl.store(lse + row0 * H + h + n * H, tl.where(some, (top + tl.log2(total)) * LN2, NEG_INF), mask=row_ok)
