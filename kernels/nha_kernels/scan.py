"""Launch 1 (tile states, rotated keys) and the backward pass's reverse scan.

The state at the start of every tile is a serial scan over the tiles of a document. Where documents and heads alone
cannot fill a GPU, the tiles are cut into segments that are scanned side by side from an empty state; the program that
finishes last (a ticket tells which; only its identity depends on timing, never the order of a sum) then carries the
state from segment to segment and corrects the tiles' states.

Legend: N documents, H query heads, G key/value heads (R = H / G), D head_dim, M slots, P rotary dims.
States and adjoints [2, tiles, G, M, D]: keys, then values.
"""

from __future__ import annotations

from .triton_common import (
    FLOOR,
    LOG2E,
    SIZES,
    dot,
    half_columns,
    load_turn,
    narrow,
    tl,
    triton,
    turn,
    wide,
    write_strength,
)


@triton.jit
def rotate_keys(
    program, k, cos, sin, turned, rows, per_doc,
    G: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, SHARED_COS: tl.constexpr,
):  # fmt: skip
    """Write rotated keys of BR places of one head."""
    g = program % G
    first = (program // G).to(tl.int64) * BR
    row = first + tl.arange(0, BR)
    j = tl.arange(0, BH)
    col_a, col_b = half_columns(j, D // 2, P)
    ok = row < rows
    keep = ok[:, None] & (j < D // 2)[None, :]
    at = (row * G + g)[:, None] * D
    a = tl.load(k + at + col_a[None, :], mask=keep, other=0.0).to(tl.float32)
    b = tl.load(k + at + col_b[None, :], mask=keep, other=0.0).to(tl.float32)
    turn_row = row % per_doc if SHARED_COS else row
    cosine, sine = load_turn(cos, sin, first * 0, turn_row, j, ok, P)
    a, b = turn(a, b, cosine, sine)
    tl.store(turned + at + col_a[None, :], narrow(a, turned.dtype.element_ty), mask=keep)
    tl.store(turned + at + col_b[None, :], narrow(b, turned.dtype.element_ty), mask=keep)


@triton.jit
def absorb_tile(
    log_decay, x, g2, carry, c, length, hidden, m, m_ok, d, d_ok, keep_g2,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state after tile c, and the tile's whole log2 decay [BM]; writes g2 if asked.

    log_decay, x, g2 point to row 0 of the document and head (log_decay and x: the token that row 0 absorbs).
    """
    i = c * BT + tl.arange(0, BT)
    at = i.to(tl.int64) * G
    ok = (i >= hidden) & (i < length)
    m_at = at[:, None] * M + m[None, :]
    la = tl.load(log_decay + m_at, mask=ok[:, None] & m_ok[None, :], other=0.0)
    la = tl.maximum(la, FLOOR)
    s = tl.where(ok[:, None], write_strength(la), 0.0)
    la2 = la * LOG2E
    g = tl.cumsum(la2, 0)
    whole = tl.sum(la2, 0)
    if keep_g2:
        tl.store(g2 + m_at, g, mask=(i < length)[:, None] & m_ok[None, :])
    token = tl.load(x + at[:, None] * D + d[None, :], mask=ok[:, None] & d_ok[None, :], other=0.0)
    write = s * tl.exp2(whole[None, :] - g)
    carry = carry * tl.exp2(whole)[:, None] + dot(narrow(tl.trans(write), token.dtype), token, PRECISION)
    return carry, whole


@triton.jit
def scan_block(
    program, segments, starts, lengths, first_tile, T, tiles, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """What one program of a scan works on.

    Returns:
        block of dimensions, side (0 keys, 1 values), segment, ticket of this block's segments, head of N * G, document,
        head g, the document's first tile, first row and length, and the block's slots [BM] and dimensions [BD].
    """
    ND: tl.constexpr = (D + BD - 1) // BD
    NM: tl.constexpr = (M + BM - 1) // BM
    i_d = program % ND
    side = program // ND % 2
    i_m = program // (2 * ND) % NM
    segment = program // (2 * ND * NM) % segments
    head = program // (2 * ND * NM * segments)
    doc = (head // G).to(tl.int64)
    if RAGGED:
        first = tl.load(first_tile + doc)
        start, length = tl.load(starts + doc), tl.load(lengths + doc).to(tl.int32)
    else:
        first = (doc * tiles).to(tl.int32)
        start, length = doc * T, T
    ticket = (head * NM + i_m) * (2 * ND) + side * ND + i_d
    m = i_m * BM + tl.arange(0, BM)
    d = i_d * BD + tl.arange(0, BD)
    return i_d, side, segment, ticket, head, doc, head % G, first, start, length, m, d


@triton.jit(do_not_specialize=SIZES)
def tile_states(
    k, v, log_decay, cos, sin, initial, turned, g2, states, final, tile_decay, parts, part_decay, tickets,
    starts, lengths, first_tile, seen, T, tiles, total_tiles, past, W, S, N, rows, per_doc,
    scan_programs, segments, segment_tiles,
    G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, P: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BR: tl.constexpr, BH: tl.constexpr, RAGGED: tl.constexpr, SEEN: tl.constexpr,
    INITIAL: tl.constexpr, SEGMENTED: tl.constexpr, SHARED_COS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """States at the start of every tile, final states, g2; the programs after `scan_programs` rotate keys."""
    program = tl.program_id(0)
    if program >= scan_programs:
        rotate_keys(program - scan_programs, k, cos, sin, turned, rows, per_doc, G, D, P, BR, BH, SHARED_COS)
        return
    i_d, side, segment, ticket, head, doc, g, first, start, length, m, d = scan_block(
        program, segments, starts, lengths, first_tile, T, tiles, G, D, M, BM, BD, RAGGED,
    )  # fmt: skip
    hidden = W + S
    if SEEN:
        hidden -= tl.minimum(tl.load(seen + doc), W + S).to(tl.int32)
    m_ok, d_ok = m < M, d < D
    ok = m_ok[:, None] & d_ok[None, :]
    in_state = m[:, None] * D + d[None, :]
    if side == 0:
        x = k
    else:
        x = v
    absorbed = (start + (doc + 1) * past - W) * G + g  # the token that row 0 absorbs
    x += absorbed * D
    log_decay += absorbed * M
    g2 += (start * G + g) * M
    tile_size: tl.constexpr = G * M * D
    states += side * (total_tiles.to(tl.int64) * tile_size) + g * (M * D)
    end = side * (N.to(tl.int64) * tile_size) + (doc * G + g) * (M * D)
    carry = tl.zeros([BM, BD], tl.float32)
    if INITIAL and segment == 0:
        carry = tl.load(initial + end + in_state, mask=ok, other=0.0)
    since = tl.zeros([BM], tl.float32)
    number = tl.cdiv(length, BT)
    last = tl.minimum((segment + 1) * segment_tiles, number)
    for c in range(segment * segment_tiles, last):
        at = wide(first + c)
        tl.store(states + at * tile_size + in_state, narrow(carry, states.dtype.element_ty), mask=ok)
        if SEGMENTED:
            tl.store(tile_decay + (at * G + g) * M + m, since, mask=m_ok)
        carry, whole = absorb_tile(
            log_decay, x, g2, carry, c, length, hidden, m, m_ok, d, d_ok, (side == 0) & (i_d == 0),
            G, D, M, BT, PRECISION,
        )  # fmt: skip
        since += whole
    if SEGMENTED:
        join_segments(
            states, tile_decay, parts, part_decay, tickets + ticket,
            final + end, carry, since, head, g, side, segment, segments, segment_tiles, first, number, m, m_ok,
            in_state, ok, G, M, D, False,
        )  # fmt: skip
    else:
        tl.store(final + end + in_state, carry, mask=ok)


@triton.jit
def join_segments(
    states, tile_decay, parts, part_decay, ticket, out, carry, since, head, g, side, segment, segments,
    segment_tiles, first, number, m, m_ok, in_state, ok, G: tl.constexpr, M: tl.constexpr, D: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Leave this segment's sum; the last program to come carries the state through all segments.

    tile_decay [tiles,G,M] is the log2 decay from each segment's beginning, part_decay [N*G,segments,M] a segment's
    whole, parts [N*G,segments,2,M,D] what each makes of an empty state. BACKWARD counts tiles from a document's end.
    """
    head = head.to(tl.int64)
    parts += (head * (2 * segments) + side) * (M * D)
    part_decay += head * segments * M
    tl.store(parts + segment * (2 * M * D) + in_state, carry, mask=ok)
    tl.store(part_decay + segment * M + m, since, mask=m_ok)
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="acq_rel") == segments - 1:
        carry = tl.load(parts + in_state, mask=ok, other=0.0, cache_modifier=".cg")
        for later in range(1, segments):
            for u in range(later * segment_tiles, tl.minimum((later + 1) * segment_tiles, number)):
                c = u
                if BACKWARD:
                    c = number - 1 - u
                at = wide(first + c)
                since = tl.load(tile_decay + (at * G + g) * M + m, mask=m_ok, other=0.0, cache_modifier=".cg")
                place = states + at * (G * M * D) + in_state
                own = tl.load(place, mask=ok, other=0.0, cache_modifier=".cg").to(tl.float32)
                tl.store(place, narrow(own + carry * tl.exp2(since)[:, None], states.dtype.element_ty), mask=ok)
            since = tl.load(part_decay + later * M + m, mask=m_ok, other=0.0, cache_modifier=".cg")
            own = tl.load(parts + later * (2 * M * D) + in_state, mask=ok, other=0.0, cache_modifier=".cg")
            carry = own + carry * tl.exp2(since)[:, None]
        tl.store(out + in_state, carry, mask=ok)


@triton.jit(do_not_specialize=SIZES)
def reverse_scan(
    q, do, weights, score_grads, g2, slot_q_scale, final_grad, adjoints, initial_grad, tile_decay, parts, part_decay,
    tickets, part_scale, part_bias, part_sink, scale_grad, bias_grad, sink_grad,
    starts, lengths, first_tile, T, tiles, total_tiles, S, N, scale, scan_programs, segments, segment_tiles,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, M: tl.constexpr, BT: tl.constexpr, BM: tl.constexpr,
    BD: tl.constexpr, BS: tl.constexpr, SLOTS: tl.constexpr, RAGGED: tl.constexpr, FINAL: tl.constexpr,
    HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adjoint of the state that every tile hands on, and of the initial state.

    The programs after `scan_programs` add up what the query side left per tile: first one per query head for
    slot_q_scale and slot_bias, then one per document, head and sink.
    """
    program = tl.program_id(0)
    if program >= scan_programs:
        other = program - scan_programs
        parameters = H if HAS_SCALE or HAS_BIAS else 0
        if other < parameters:
            add_parameters(
                part_scale, part_bias, scale_grad, bias_grad, other, total_tiles, H, D, BS, HAS_SCALE, HAS_BIAS
            )
        else:
            add_sinks(
                part_sink, sink_grad, lengths, first_tile, other - parameters, tiles, S, H, G, D, BT, BS, RAGGED,
            )  # fmt: skip
        return
    R: tl.constexpr = H // G
    i_d, side, segment, ticket, head, doc, g, first, start, length, m, d = scan_block(
        program, segments, starts, lengths, first_tile, T, tiles, G, D, M, BM, BD, RAGGED,
    )  # fmt: skip
    m_ok, d_ok = m < M, d < D
    ok = m_ok[:, None] & d_ok[None, :]
    in_state = m[:, None] * D + d[None, :]
    if side == 0:
        x = q
        p = score_grads
    else:
        x = do
        p = weights
    tile_size: tl.constexpr = G * M * D
    adjoints += side * (total_tiles.to(tl.int64) * tile_size) + g * (M * D)
    end = side * (N.to(tl.int64) * tile_size) + (doc * G + g) * (M * D)
    carry = tl.zeros([BM, BD], tl.float32)
    if FINAL and segment == 0:
        carry = tl.load(final_grad + end + in_state, mask=ok, other=0.0)
    since = tl.zeros([BM], tl.float32)
    number = tl.cdiv(length, BT)
    last = tl.minimum((segment + 1) * segment_tiles, number)
    for u in range(segment * segment_tiles, last):
        c = number - 1 - u
        at = wide(first + c)
        tl.store(adjoints + at * tile_size + in_state, narrow(carry, adjoints.dtype.element_ty), mask=ok)
        if SEGMENTED:
            tl.store(tile_decay + (at * G + g) * M + m, since, mask=m_ok)
        i = c * BT + tl.arange(0, BT)
        row_ok = i < length
        row = start + i
        keep = row_ok[:, None] & m_ok[None, :]
        decay = tl.load(g2 + (row * G + g)[:, None] * M + m[None, :], mask=keep, other=0.0)
        whole = tl.load(g2 + ((start + tl.minimum(c * BT + BT, length) - 1) * G + g) * M + m, mask=m_ok, other=0.0)
        decay = tl.exp2(decay)
        carry = carry * tl.exp2(whole)[:, None]
        since += whole
        if SLOTS:
            for r in tl.static_range(R):
                at = row * H + g * R + r
                weight = tl.load(p + at[:, None] * M + m[None, :], mask=keep, other=0.0).to(tl.float32) * decay
                rows = tl.load(x + at[:, None] * D + d[None, :], mask=row_ok[:, None] & d_ok[None, :], other=0.0)
                if HAS_SCALE:
                    factor = tl.load(slot_q_scale + (g * R + r) * D + d, mask=d_ok & (side == 0), other=1.0)
                    rows = narrow(rows.to(tl.float32) * factor[None, :], x.dtype.element_ty)
                weight = weight * tl.where(side == 0, scale, 1.0)
                carry += dot(narrow(tl.trans(weight), rows.dtype), rows, PRECISION)
    if SEGMENTED:
        join_segments(
            adjoints, tile_decay, parts, part_decay, tickets + ticket,
            initial_grad + end, carry, since, head, g, side, segment, segments, segment_tiles, first, number, m, m_ok,
            in_state, ok, G, M, D, True,
        )  # fmt: skip
    else:
        tl.store(initial_grad + end + in_state, carry, mask=ok)


@triton.jit
def add_parameters(
    part_scale, part_bias, scale_grad, bias_grad, h, total_tiles,
    H: tl.constexpr, D: tl.constexpr, BS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradients of slot_q_scale [H,D] and slot_bias [H] for one query head, tiles in order."""
    d = tl.arange(0, BS)
    tile = tl.arange(0, 16)
    scale_sum = tl.zeros([BS], tl.float32)
    bias_sum = tl.zeros([16], tl.float32)
    for t0 in range(0, total_tiles, 16):
        at = (t0 + tile).to(tl.int64) * H + h
        ok = t0 + tile < total_tiles
        if HAS_SCALE:
            keep = ok[:, None] & (d < D)[None, :]
            scale_sum += tl.sum(tl.load(part_scale + at[:, None] * D + d[None, :], mask=keep, other=0.0), 0)
        if HAS_BIAS:
            bias_sum += tl.load(part_bias + at, mask=ok, other=0.0)
    if HAS_SCALE:
        tl.store(scale_grad + h * D + d, scale_sum, mask=d < D)
    if HAS_BIAS:
        tl.store(bias_grad + h, tl.sum(bias_sum, 0))


@triton.jit
def add_sinks(
    part_sink, sink_grad, lengths, first_tile, index, tiles, S,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    """Gradient of one sink's key and value [N,G,S,2,D], tiles and query heads in order; part_sink [tiles,H,S,2,D]."""
    R: tl.constexpr = H // G
    s = index % S
    g = index // S % G
    doc = (index // (S * G)).to(tl.int64)
    if RAGGED:
        first = tl.load(first_tile + doc)
        number = tl.cdiv(tl.load(lengths + doc).to(tl.int32), BT)
    else:
        first = (doc * tiles).to(tl.int32)
        number = tiles
    d = tl.arange(0, BS)
    tile = tl.arange(0, 16)
    for side in tl.static_range(2):
        total = tl.zeros([BS], tl.float32)
        for t0 in range(0, number, 16):
            ok = (t0 + tile < number)[:, None] & (d < D)[None, :]
            for r in tl.static_range(R):
                at = (((first + t0 + tile).to(tl.int64) * H + g * R + r) * S + s) * (2 * D) + side * D
                total += tl.sum(tl.load(part_sink + at[:, None] + d[None, :], mask=ok, other=0.0), 0)
        tl.store(sink_grad + (((doc * G + g) * S + s) * 2 + side) * D + d, total, mask=d < D)
