"""Window side of the chunked path: blocks of queries against the span of keys they can see.

The key array holds W tokens of the past (or nothing) before the call's own tokens and Q places of nothing after them;
query i sees its places i + 1 .. i + W. A block of queries sees one span of keys; spans of neighbouring blocks overlap,
and hold one place too many, which keeps their length even.

Legend: n rows x key/value heads, b blocks, Q block length, R query heads per key/value head, X span, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache(maxsize=32)
def _band(block: int, window: int, skip: int, repeat: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[Q*R,X] 0 where a query of the block sees the span's key, -inf elsewhere."""
    query = torch.arange(block, device=device)[:, None]
    key = torch.arange(skip, block + window, device=device)[None]
    seen = (key > query) & (key <= query + window)
    band = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, float("-inf"))
    return band.repeat_interleave(repeat, 0)


@lru_cache(maxsize=32)
def sink_band(
    block: int, window: int, skip: int, repeat: int, sinks: int, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """[Q*R,S+X] 0 at the sinks, and in the span of keys where the query sees them; -inf elsewhere. No span if W = 0."""
    seen = torch.zeros(block * repeat, sinks, dtype=dtype, device=device)
    return torch.cat([seen, _band(block, window, skip, repeat, dtype, device)], 1) if window else seen


def key_spans(x: torch.Tensor, first: int, blocks: int, block: int, window: int, skip: int) -> torch.Tensor:
    """What each block sees of x.

    Args:
        x: [n,T+W+Q,...] keys, values (last dimension D) or key masks (no last dimension).
        first: token at which the first block begins.
        blocks, block: b, Q.
        skip: leading places of the span to leave out.
    Returns:
        [n*b,X,D], a view where n is 1; or [n*b,X].
    """
    width = block + window - skip
    start = first + skip
    part = x[:, start : start + (blocks - 1) * block + width]
    part = part.unfold(1, width, block)  # [n,b,(D,)X]
    if x.dim() == 3:
        part = part.transpose(2, 3)
    return part.reshape(-1, *part.shape[2:])


def band_scores(
    rows: torch.Tensor, keys: torch.Tensor, block: int, window: int, skip: int, scale: float
) -> torch.Tensor:
    """Scores of the window.

    Args:
        rows: [n*b,Q*R,D] rotated queries.
        keys: [n*b,X,D] rotated keys.
    Returns:
        [n*b,Q*R,X], -inf outside of the window.
    """
    band = _band(block, window, skip, rows.shape[1] // block, rows.dtype, rows.device)
    return torch.baddbmm(band.expand(len(rows), -1, -1), rows, keys.transpose(1, 2), alpha=scale)


def add_spans(out: torch.Tensor, x: torch.Tensor, first: int, block: int, window: int, skip: int) -> None:
    """Add the blocks' span gradients to the key array; the adjoint of `key_spans`, in a fixed order.

    Args:
        out: [n,T+W+Q,D], changed in place.
        x: [n*b,X,D]
    """
    rows, width = out.shape[0], x.shape[1]
    x = x.view(rows, -1, width, x.shape[2])
    blocks = x.shape[1]
    start = first + skip
    for at in range(0, width, block):
        size = min(block, width - at)
        whole = out[:, start + at : start + at + blocks * block]
        whole.view(rows, blocks, block, -1)[:, :, :size] += x[:, :, at : at + size]
