"""Backward pass, key side and gate side.

The program of tile c owns the tokens that the tile's rows absorb, places c BT + past - W onward: the slots' and the
window's shares of a token's gradient meet in one accumulator, for any window, and nothing is added up across programs.

Legend: as in triton_common and scan.
"""

from __future__ import annotations

from .triton_common import (
    FLOOR,
    LOG2E,
    NEG_INF,
    SIZES,
    dot,
    half_columns,
    load_turn,
    locate,
    narrow,
    tl,
    triton,
    turn,
    write_strength,
)


@triton.jit
def row_tile(doc, c, first_tile, tiles, RAGGED: tl.constexpr):
    """Tile c of a document, counted over all documents."""
    if RAGGED:
        return tl.load(first_tile + doc) + c
    else:
        return doc.to(tl.int32) * tiles + c


@triton.jit
def tile_decays(g2, log_decay, row_ok, absorbs, left, m, m_ok, STRIDE: tl.constexpr, BT: tl.constexpr):
    """G, write strength, 2^(G_last - G) and log decay [BT,BM]; g2 and log_decay point to the tile's first row.

    Strength is 0 where a row absorbs nothing, the third 0 past the `left` rows that the document still has.
    """
    keep = row_ok[:, None] & m_ok[None, :]
    at = tl.arange(0, BT)[:, None] * STRIDE + m[None, :]
    decay = tl.load(g2 + at, mask=keep, other=0.0)
    last = tl.minimum(BT, left) - 1
    whole = tl.load(g2 + last * STRIDE + m, mask=m_ok, other=0.0)
    la = tl.load(log_decay + at, mask=absorbs[:, None] & m_ok[None, :], other=0.0)
    write = tl.where(absorbs[:, None], write_strength(tl.maximum(la, FLOOR)), 0.0)
    return decay, write, tl.where(keep, tl.exp2(whole[None, :] - decay), 0.0), la


@triton.jit
def own_rise(g2, decay, n, row_ok, first, left, m, m_ok, STRIDE: tl.constexpr, BC: tl.constexpr):
    """2^(G - Gm) of rows from a sub-chunk on and 2^(Gm - G) of its own rows [BT,BM], each 0 elsewhere."""
    middle = tl.minimum(first + BC // 2 - 1, left - 1)
    g_mid = tl.load(g2 + middle * STRIDE + m, mask=m_ok, other=0.0)
    rest = ((n >= first) & row_ok)[:, None]
    own = ((n >= first) & (n < first + BC) & row_ok)[:, None]
    fall = tl.where(rest, tl.exp2(decay - g_mid[None, :]), 0.0)
    rise = tl.where(own, tl.exp2(tl.where(own, g_mid[None, :] - decay, 0.0)), 0.0)
    return fall, rise


@triton.jit(do_not_specialize=SIZES)
def key_side(
    q, turned, v, log_decay, g2, adjoints, cos, sin, slot_q_scale, lse, do, slot_weights, slot_grads, delta,
    sink_grad, dk, dv,
    starts, lengths, first_tile, first_key_tile, key_tile_doc, seen, T, key_tiles, tiles, total_tiles, past, W, S,
    scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BT: tl.constexpr,
    BC: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr,
    SLOTS: tl.constexpr, STATES: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    HAS_SCALE: tl.constexpr, RAGGED: tl.constexpr, SEEN: tl.constexpr,
    SHARED_COS: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of the tokens that one tile absorbs."""
    R: tl.constexpr = H // G
    key_tile = tl.program_id(0) // G
    g = tl.program_id(0) % G
    doc, c, start, length, hidden = locate(
        key_tile, starts, lengths, first_key_tile, key_tile_doc, seen, T, key_tiles, W, S, RAGGED, SEEN
    )
    t0 = c * BT
    if t0 >= length + W:
        return
    n = tl.arange(0, BT)
    i = t0 + n
    row_ok = i < length
    absorbs = row_ok & (i >= hidden)
    x = i + past - W
    x_ok = (x >= 0) & (x < past + length)
    j = tl.arange(0, BH)
    col_a, col_b = half_columns(j, D // 2, P)
    d = tl.arange(0, BD)
    dtype = q.dtype.element_ty
    key0 = start + doc * past
    place0 = key0 + t0 + past - W  # of the tile's first token
    x_at = n[:, None] * (G * D)
    turned += (place0 * G + g) * D
    v += (place0 * G + g) * D
    dk += (place0 * G + g) * D
    dv += (place0 * G + g) * D
    row0 = (start + t0) * H + g * R
    half_ok = x_ok[:, None] & (j < D // 2)[None, :]
    full_ok = x_ok[:, None] & (d < D)[None, :]
    acc_a = tl.zeros([BT, BH], tl.float32)
    acc_b = tl.zeros([BT, BH], tl.float32)
    acc_v = tl.zeros([BT, BD], tl.float32)

    if STATES:
        g2 += ((start + t0) * G + g) * M
        log_decay += ((place0) * G + g) * M
        tile = row_tile(doc, c, first_tile, tiles, RAGGED)
        handed_k = adjoints + (tile.to(tl.int64) * G + g) * (M * D)
        handed_v = handed_k + total_tiles.to(tl.int64) * (G * M * D)
        blocks: tl.constexpr = (M + BM - 1) // BM
        before = i[:, None] <= i[None, :]  # the row (second) comes after the token (first)
        for block in tl.range(0, tl.where((t0 < length) & (t0 + BT > hidden), blocks, 0), num_stages=1):
            m = block * BM + tl.arange(0, BM)
            m_ok = m < M
            decay, write, to_end, la = tile_decays(g2, log_decay, row_ok, absorbs, length - t0, m, m_ok, G * M, BT)
            to_state = narrow(write * to_end, adjoints.dtype.element_ty)
            at = m[:, None] * D
            ok = m_ok[:, None] & (j < D // 2)[None, :]
            acc_a += dot(to_state, tl.load(handed_k + at + col_a[None, :], mask=ok, other=0.0), PRECISION)
            acc_b += dot(to_state, tl.load(handed_k + at + col_b[None, :], mask=ok, other=0.0), PRECISION)
            ok = m_ok[:, None] & (d < D)[None, :]
            acc_v += dot(to_state, tl.load(handed_v + at + d[None, :], mask=ok, other=0.0), PRECISION)
            if SLOTS:
                for r in tl.range(0, R, num_stages=1):
                    head = row0 + r
                    slot_at = n[:, None] * (H * M) + m[None, :]
                    keep = row_ok[:, None] & m_ok[None, :]
                    grads = tl.load(slot_grads + head * M + slot_at, mask=keep, other=0.0).to(tl.float32)
                    mix = tl.zeros([BT, BT], tl.float32)
                    for first in tl.range(0, BT, BC, num_stages=1):
                        fall, rise = own_rise(g2, decay, n, row_ok, first, length - t0, m, m_ok, G * M, BC)
                        mix += dot(write * rise, tl.trans(grads * fall), DECAY_PRECISION)
                    mix = narrow(tl.where(before, mix, 0.0), dtype)
                    rows_ok = row_ok[:, None] & (j < D // 2)[None, :]
                    q_a = tl.load(q + head * D + n[:, None] * (H * D) + col_a[None, :], mask=rows_ok, other=0.0)
                    q_b = tl.load(q + head * D + n[:, None] * (H * D) + col_b[None, :], mask=rows_ok, other=0.0)
                    if HAS_SCALE:
                        factor = slot_q_scale + (g * R + r) * D
                        scale_a = tl.load(factor + col_a, mask=j < D // 2, other=0.0)
                        scale_b = tl.load(factor + col_b, mask=j < D // 2, other=0.0)
                        q_a = narrow(q_a.to(tl.float32) * scale_a[None, :], dtype)
                        q_b = narrow(q_b.to(tl.float32) * scale_b[None, :], dtype)
                    # the handed adjoint already holds the scale; here it is taken out again at the end
                    acc_a += dot(mix, q_a, PRECISION) * scale
                    acc_b += dot(mix, q_b, PRECISION) * scale
                    weights = tl.load(slot_weights + head * M + slot_at, mask=keep, other=0.0).to(tl.float32)
                    mix = tl.zeros([BT, BT], tl.float32)
                    for first in tl.range(0, BT, BC, num_stages=1):
                        fall, rise = own_rise(g2, decay, n, row_ok, first, length - t0, m, m_ok, G * M, BC)
                        mix += dot(write * rise, tl.trans(weights * fall), DECAY_PRECISION)
                    mix = narrow(tl.where(before, mix, 0.0), dtype)
                    grad_ok = row_ok[:, None] & (d < D)[None, :]
                    grad = tl.load(do + head * D + n[:, None] * (H * D) + d[None, :], mask=grad_ok, other=0.0)
                    acc_v += dot(mix, grad, PRECISION)

    if WINDOW:
        turn_row = place0 - (key0 if SHARED_COS else doc * 0)
        if P > 0:
            cosine, sine = load_turn(cos, sin, turn_row, n, j, x_ok, P)
            acc_a, acc_b = turn(acc_a, acc_b, cosine, sine)
        k_a = tl.load(turned + x_at + col_a[None, :], mask=half_ok, other=0.0)
        k_b = tl.load(turned + x_at + col_b[None, :], mask=half_ok, other=0.0)
        values = tl.load(v + x_at + d[None, :], mask=full_ok, other=0.0)
        exact = x_ok & (x >= hidden + past - W) & (x >= S)
        low = tl.maximum(t0 - W, 0)
        high = tl.minimum(t0 + BT - 1, length)
        for r in range(0, R):
            for i0 in range(low, high, BN):
                query = i0 + tl.arange(0, BN)
                query_ok = query < high
                head = (start + i0) * H + g * R + r
                at = tl.arange(0, BN)
                ok = query_ok[:, None] & (j < D // 2)[None, :]
                q_a = tl.load(q + head * D + at[:, None] * (H * D) + col_a[None, :], mask=ok, other=0.0)
                q_b = tl.load(q + head * D + at[:, None] * (H * D) + col_b[None, :], mask=ok, other=0.0)
                if P > 0:
                    query_row = (doc * 0 if SHARED_COS else key0) + i0 + past
                    query_cosine, query_sine = load_turn(cos, sin, query_row, at, j, query_ok, P)
                    q_a, q_b = turn(q_a.to(tl.float32), q_b.to(tl.float32), query_cosine, query_sine)
                    q_a, q_b = narrow(q_a, dtype), narrow(q_b, dtype)
                grad_ok = query_ok[:, None] & (d < D)[None, :]
                grad = tl.load(do + head * D + at[:, None] * (H * D) + d[None, :], mask=grad_ok, other=0.0)
                log_sum = tl.load(lse + head + at * H, mask=query_ok, other=0.0)
                log_sum = tl.where(log_sum == NEG_INF, 0.0, log_sum) * LOG2E
                drop = tl.load(delta + head + at * H, mask=query_ok, other=0.0)
                scores = dot(k_a, tl.trans(q_a), PRECISION) + dot(k_b, tl.trans(q_b), PRECISION)
                age = query[None, :] + past - x[:, None]
                ok = (age >= 0) & (age < W) & query_ok[None, :] & exact[:, None]
                weights = tl.where(ok, tl.exp2(scores * (scale * LOG2E) - log_sum[None, :]), 0.0)
                acc_v += dot(narrow(weights, dtype), grad, PRECISION)
                grads = weights * (dot(values, tl.trans(grad), PRECISION) - drop[None, :])
                grads = narrow(grads * scale, dtype)
                acc_a += dot(grads, q_a, PRECISION)
                acc_b += dot(grads, q_b, PRECISION)
        if P > 0:
            cosine, sine = load_turn(cos, sin, turn_row, n, j, x_ok, P)
            acc_a, acc_b = turn(acc_a, acc_b, cosine, -sine)
    if SINKS:
        at = (((doc * G + g) * S + x) * (2 * D))[:, None]
        sink = (x_ok & (x < S))[:, None]
        acc_a += tl.load(sink_grad + at + col_a[None, :], mask=sink & (j < D // 2)[None, :], other=0.0)
        acc_b += tl.load(sink_grad + at + col_b[None, :], mask=sink & (j < D // 2)[None, :], other=0.0)
        acc_v += tl.load(sink_grad + at + D + d[None, :], mask=sink & (d < D)[None, :], other=0.0)
    tl.store(dk + x_at + col_a[None, :], narrow(acc_a, dtype), mask=half_ok)
    tl.store(dk + x_at + col_b[None, :], narrow(acc_b, dtype), mask=half_ok)
    tl.store(dv + x_at + d[None, :], narrow(acc_v, dtype), mask=full_ok)


@triton.jit(do_not_specialize=SIZES)
def gate_side(
    q, k, v, log_decay, g2, states, adjoints, slot_q_scale, do, slot_weights, slot_grads, decay_grads, dlog_decay,
    starts, lengths, first_tile, first_key_tile, key_tile_doc, seen, T, key_tiles, tiles,
    total_tiles, past, W, S, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, SLOTS: tl.constexpr, HAS_SCALE: tl.constexpr,
    RAGGED: tl.constexpr, SEEN: tl.constexpr, PRECISION: tl.constexpr, DECAY_PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the log decay of the tokens that one tile absorbs, for BM slots; 0 for tokens never absorbed."""
    R: tl.constexpr = H // G
    NM: tl.constexpr = (M + BM - 1) // BM
    i_m = tl.program_id(0) % NM
    g = tl.program_id(0) // NM % G
    key_tile = tl.program_id(0) // (NM * G)
    doc, c, start, length, hidden = locate(
        key_tile, starts, lengths, first_key_tile, key_tile_doc, seen, T, key_tiles, W, S, RAGGED, SEEN
    )
    t0 = c * BT
    if t0 >= length + W:
        return
    n = tl.arange(0, BT)
    i = t0 + n
    row_ok = i < length
    absorbs = row_ok & (i >= hidden)
    x = i + past - W
    m = i_m * BM + tl.arange(0, BM)
    m_ok = m < M
    d = tl.arange(0, BD)
    key0 = start + doc * past
    place0 = key0 + t0 + past - W  # of the tile's first token
    out = dlog_decay + (place0 * G + g) * M + n[:, None] * (G * M) + m[None, :]
    out_ok = ((x >= 0) & (x < past + length))[:, None] & m_ok[None, :]
    if (t0 >= length) | (t0 + BT <= hidden):
        tl.store(out, tl.zeros([BT, BM], tl.float32), mask=out_ok)
        return
    dtype = q.dtype.element_ty
    g2 += ((start + t0) * G + g) * M
    log_decay += ((place0) * G + g) * M
    decay, write, to_end, la = tile_decays(g2, log_decay, row_ok, absorbs, length - t0, m, m_ok, G * M, BT)
    tile = row_tile(doc, c, first_tile, tiles, RAGGED)
    in_state = m[:, None] * D + d[None, :]
    state_ok = m_ok[:, None] & (d < D)[None, :]
    side_size = total_tiles.to(tl.int64) * (G * M * D)
    handed = adjoints + (tile.to(tl.int64) * G + g) * (M * D)
    held = states + (tile.to(tl.int64) * G + g) * (M * D)
    x_at = (place0 * G + g) * D + n[:, None] * (G * D) + d[None, :]
    row0 = (start + t0) * H + g * R
    x_keep = absorbs[:, None] & (d < D)[None, :]
    before = i[:, None] < i[None, :]  # the row (second) comes after the token (first)
    same = i[:, None] == i[None, :]
    from_rows = tl.zeros([BT, BM], tl.float32)  # acts on G of each row
    to_pairs = tl.zeros([BT, BM], tl.float32)  # act on the write strength: through later rows of the tile,
    to_state = tl.zeros([BT, BM], tl.float32)  # through the state after the tile,
    to_own = tl.zeros([BT, BM], tl.float32)  # and through the token's own row
    through = tl.zeros([BM], tl.float32)  # acts on the whole tile's decay
    for side in tl.static_range(2):
        adjoint = tl.load(handed + side * side_size + in_state, mask=state_ok, other=0.0)
        state = tl.load(held + side * side_size + in_state, mask=state_ok, other=0.0)
        through += tl.sum(state.to(tl.float32) * adjoint.to(tl.float32), 1)
        if side == 0:
            token = tl.load(k + x_at, mask=x_keep, other=0.0)
        else:
            token = tl.load(v + x_at, mask=x_keep, other=0.0)
        to_state += dot(narrow(token, adjoint.dtype), tl.trans(adjoint), PRECISION) * to_end
        if SLOTS:
            for r in tl.range(0, R, num_stages=1):
                head = row0 + r
                slot_at = head * M + n[:, None] * (H * M) + m[None, :]
                keep = row_ok[:, None] & m_ok[None, :]
                full_at = head * D + n[:, None] * (H * D) + d[None, :]
                full_ok = row_ok[:, None] & (d < D)[None, :]
                if side == 0:
                    from_rows += tl.load(decay_grads + slot_at, mask=keep, other=0.0).to(tl.float32)
                    weights = tl.load(slot_grads + slot_at, mask=keep, other=0.0).to(tl.float32)
                    rows = tl.load(q + full_at, mask=full_ok, other=0.0)
                    if HAS_SCALE:
                        factor = tl.load(slot_q_scale + (g * R + r) * D + d, mask=d < D, other=0.0)
                        rows = narrow(rows.to(tl.float32) * factor[None, :], dtype)
                    pairs = dot(token, tl.trans(rows), PRECISION) * scale
                else:
                    weights = tl.load(slot_weights + slot_at, mask=keep, other=0.0).to(tl.float32)
                    rows = tl.load(do + full_at, mask=full_ok, other=0.0)
                    pairs = dot(token, tl.trans(rows), PRECISION)
                to_own += tl.sum(tl.where(same, pairs, 0.0), 1)[:, None] * weights
                pairs = tl.where(before, pairs, 0.0)
                for first in tl.range(0, BT, BC, num_stages=1):
                    fall, rise = own_rise(g2, decay, n, row_ok, first, length - t0, m, m_ok, G * M, BC)
                    to_pairs += dot(pairs, weights * fall, DECAY_PRECISION) * rise
    through *= tl.exp2(tl.sum(tl.where((i == tl.minimum(t0 + BT, length) - 1)[:, None], decay, 0.0), 0))
    change = from_rows - write * to_pairs
    grad = tl.cumsum(change, 0, reverse=True) + through[None, :]
    earlier = tl.where(i[:, None] > i[None, :], 1.0, 0.0)
    grad += dot(earlier, write * to_state, DECAY_PRECISION)
    grad -= tl.exp(tl.maximum(la, FLOOR)) * (to_pairs + to_state + to_own)
    grad = tl.where(absorbs[:, None] & (la >= FLOOR), grad, 0.0)
    tl.store(out, grad, mask=out_ok)
