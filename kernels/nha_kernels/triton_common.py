"""What all Triton kernels share: dots, gates, rotation by halves, and finding a program's tile.

Rows are the query tokens of one document counted from 0, places its keys: `past` keys of earlier calls, then its own,
so that row i stands at place i + past. Tile c holds rows c BT .. c BT + BT - 1; row i absorbs the token at place
i + past - W, from row `hidden` = max(W + S - seen, 0) on. Decays are base-2 logarithms, `g2` is their running sum over
the rows of a tile.

A head's dimensions are worked on in two halves, a and b, of D / 2 columns each, so that column j of a and column j of b
rotate together: for P rotary dimensions a holds 0 .. P/2 and b holds P/2 .. P, and each half of what is left. A sum
over dimensions does not mind their order.
"""

from __future__ import annotations

try:  # a machine without triton copies this file with a checkpoint, and never imports it
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the Triton kernels need triton: pip install triton, or use backend='torch'") from missing

from .gates import LOG_DECAY_FLOOR

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors too."""

SIZES = ["T", "tiles", "key_tiles", "total_tiles", "past", "W", "S", "N", "rows", "per_doc"]
SIZES += ["scan_programs", "segments", "segment_tiles"]
"""Integer arguments by name: no value of theirs is compiled in, so no length compiles anew."""

EMULATED = tl.constexpr(INTERPRETED)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FLOOR = tl.constexpr(LOG_DECAY_FLOOR)
NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def wide(x):
    """x as a 64-bit integer; loop counters are plain integers in the interpreter."""
    return tl.full([], 1, tl.int64) * x


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest; the interpreter's own conversion to bf16 cuts digits off."""
    if EMULATED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b; the interpreter multiplies the raw bits of 16-bit operands, so there they are widened first."""
    if EMULATED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def write_strength(log_decay):
    """1 - exp(log_decay) without cancellation."""
    near = -log_decay * (1.0 + log_decay * (0.5 + log_decay * (0.16666667 + log_decay * 0.041666667)))
    return tl.where(log_decay > -0.02, near, 1.0 - tl.exp(log_decay))


@triton.jit
def half_columns(j, HALF: tl.constexpr, P: tl.constexpr):
    """Columns of halves a and b."""
    if P == 0 or P == 2 * HALF:
        a, b = j, j + HALF
    else:
        a = tl.where(j < P // 2, j, j + P // 2)
        b = tl.where(j < P // 2, j + P // 2, j + HALF)
    return a, b


@triton.jit
def load_turn(cos, sin, first, rows, j, row_ok, P: tl.constexpr):
    """cos and sin [rows,columns] of both halves at `first + rows`; 1 and 0 past P.

    Only the first P/2 columns are read: what transformers' rotary modules return repeats them.
    """
    ok = row_ok[:, None] & (j < P // 2)[None, :]
    at = rows[:, None] * P + j[None, :]
    c = tl.load(cos + first * P + at, mask=ok, other=1.0).to(tl.float32)
    s = tl.load(sin + first * P + at, mask=ok, other=0.0).to(tl.float32)
    return c, s


@triton.jit
def turn(a, b, c, s):
    """Rotate halves forward; `turn(a, b, c, -s)` is the adjoint."""
    return a * c - b * s, b * c + a * s


@triton.jit
def load_scale(slot_q_scale, j, col_a, col_b, D: tl.constexpr, HAS_SCALE: tl.constexpr):
    """One head's slot_q_scale, halves [BH]."""
    a, b = 1.0, 1.0
    if HAS_SCALE:
        a = tl.load(slot_q_scale + col_a, mask=j < D // 2, other=0.0)
        b = tl.load(slot_q_scale + col_b, mask=j < D // 2, other=0.0)
    return a, b


@triton.jit
def scaled(keys, scale, HAS_SCALE: tl.constexpr):
    """Keys [BH,...] times slot_q_scale, which so leaves the queries as they are loaded."""
    if HAS_SCALE:
        keys = narrow(keys.to(tl.float32) * scale[:, None], keys.dtype)
    return keys


@triton.jit
def locate(tile, starts, lengths, first_tile, tile_doc, seen, T, tiles, W, S, RAGGED: tl.constexpr, SEEN: tl.constexpr):
    """Document, tile in it, its first query row, its length, and the first row that absorbs, of a program's tile."""
    if RAGGED:
        doc = tl.load(tile_doc + tile).to(tl.int64)
        c = tile - tl.load(first_tile + doc)
        start = tl.load(starts + doc)
        length = tl.load(lengths + doc).to(tl.int32)
    else:
        doc = (tile // tiles).to(tl.int64)
        c = tile % tiles
        start = doc * T
        length = T
    hidden = W + S
    if SEEN:
        hidden -= tl.minimum(tl.load(seen + doc), W + S).to(tl.int32)
    return doc, c, start, length, hidden


@triton.jit
def lifted_writes(g2, log_decay, first, length, hidden, STRIDE: tl.constexpr, m, m_ok, BC: tl.constexpr):
    """Write strengths of a sub-chunk as of its middle, s 2^(Gm - G) [BC,BM], and Gm [BM].

    g2 points to row 0, log_decay to the token that row 0 absorbs; `first` is the sub-chunk's first row.
    """
    rows = first + tl.arange(0, BC)
    base = wide(first) * STRIDE
    middle = (tl.minimum(first + BC // 2 - 1, length - 1) - first) * STRIDE
    g_mid = tl.load(g2 + base + middle + m, mask=m_ok, other=0.0)
    ok = ((rows >= hidden) & (rows < length))[:, None] & m_ok[None, :]
    at = tl.arange(0, BC)[:, None] * STRIDE + m[None, :]
    g = tl.load(g2 + base + at, mask=ok, other=0.0)
    la = tl.maximum(tl.load(log_decay + base + at, mask=ok, other=0.0), FLOOR)
    return tl.where(ok, write_strength(la) * tl.exp2(g_mid[None, :] - g), 0.0), g_mid


@triton.jit
def softmax_step(top, total, acc, scores, values, PRECISION: tl.constexpr):
    """Online softmax (base 2) over one more block of scores [BT,BN] and values [BN,BD]."""
    best = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(best == NEG_INF, 0.0, best)
    fade = tl.exp2(top - safe)
    weights = tl.exp2(scores - safe[:, None])
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None] + dot(narrow(weights, values.dtype), values, PRECISION)
    return best, total, acc
