"""Slot side of the chunked path: decay factors of a tile, the state scan, scores and read-out, and their adjoints.

A tile is a run of tokens whose slot scores come from the state at its start plus the pairs inside it:

    scores = [ (Q Kc^T) o e^G + sum_J tril(Q K'_J^T) lift_J o fall_J ],   state' = e^Glast o state + (s tail)^T K'

G is the running sum of log decay inside the tile. Pairs are taken in sub-chunks J of 16 tokens, relative to the middle
of J, so that with the floor of `gates.LOG_DECAY_FLOOR` every factor stays below 2^112 in fp32.

Legend: N rows x key/value heads, C tiles, L tile length, R query heads per key/value head, M slots, D head_dim.
Rows of queries are ordered [token, query head]; keys and values stand side by side in [.., 2D].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

SUB = 16  # tokens per sub-chunk; the decay floor allows no more in fp32


@lru_cache(maxsize=32)
def _sums(length: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[X,L] matrix that turns log decays into G (L rows), tail sums (L) and, per J, sums from the middle of J."""
    place = torch.arange(length, device=device)
    later, step = place[:, None], place[None, :]
    parts = [(step <= later), (step > later)]
    signed = [x.to(dtype) for x in parts]
    for first in range(0, length, SUB):
        middle = first + SUB // 2 - 1
        rows = later[first:]
        after = ((step > middle) & (step <= rows)).to(dtype)
        before = ((step > rows) & (step <= middle)).to(dtype)
        signed.append(after - before)
    return torch.cat(signed)


@lru_cache(maxsize=32)
def _triangle(length: int, repeat: int, strict: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[L*R,L] ones where the row's token comes after the column's (or is it, unless strict)."""
    ones = torch.ones(length, length, dtype=dtype, device=device).tril(-1 if strict else 0)
    return ones.repeat_interleave(repeat, 0)


class Decays(NamedTuple):
    """Decay factors of every tile, [N*C,.,M]."""

    grow: torch.Tensor  # [.,L,M] e^G
    tail: torch.Tensor  # [.,L,M] e^(Glast - G)
    falls: list[torch.Tensor]  # per J [.,L-16J,M] e^(G - Gmid), rows from J on
    lifts: list[torch.Tensor]  # per J [.,16,M] e^(Gmid - G)
    write: torch.Tensor  # [.,L,M] s

    @property
    def carry(self) -> torch.Tensor:
        """[N*C,M] decay of the state over the whole tile."""
        return self.grow[:, -1]

    def part(self, tiles: slice) -> Decays:
        """The same for some of the tiles."""
        return Decays(
            self.grow[tiles],
            self.tail[tiles],
            [x[tiles] for x in self.falls],
            [x[tiles] for x in self.lifts],
            self.write[tiles],
        )


def tile_decays(log_decay: torch.Tensor) -> Decays:
    """Decay factors of tiles.

    Args:
        log_decay: [N*C,L,M] floored log decay.
    Returns:
        The factors; every one is finite.
    """
    tiles, length, _ = log_decay.shape
    sums = _sums(length, log_decay.dtype, log_decay.device)
    total = torch.bmm(sums.expand(tiles, -1, -1), log_decay)
    lifts, falls, at = [], [], 2 * length
    for first in range(0, length, SUB):
        lifts.append(total[:, at : at + SUB].neg().exp_())
        at += length - first
    total.exp_()
    at = 2 * length
    for first in range(0, length, SUB):
        falls.append(total[:, at : at + length - first])
        at += length - first
    return Decays(total[:, :length], total[:, length : 2 * length], falls, lifts, -torch.expm1(log_decay))


def scan_states(d: Decays, kv: torch.Tensor, initial: torch.Tensor | None, rows: int) -> torch.Tensor:
    """State at the start of every tile, and after the last.

    Args:
        d: of N*C tiles.
        kv: [N*C,L,2D] absorbed keys and values.
        initial: [N,M,2D] or None for empty slots.
        rows: N.
    Returns:
        [N,C+1,M,2D]
    """
    weight = (d.write * d.tail).transpose(1, 2)  # [N*C,M,L]
    count, slots, width = len(kv) // rows, weight.shape[1], kv.shape[2]
    states = kv.new_empty(rows, count + 1, slots, width)
    if rows == 1:
        torch.bmm(weight, kv, out=states[0, 1:])
    else:
        states[:, 1:] = torch.bmm(weight, kv).view(rows, count, slots, width)
    states[:, 0] = 0 if initial is None else initial
    carry = d.carry.reshape(rows, count, slots, 1)
    for c in range(count):
        states[:, c + 1].addcmul_(states[:, c], carry[:, c])
    return states


def scan_back(d: Decays, increments: torch.Tensor, final: torch.Tensor | None) -> torch.Tensor:
    """Adjoint of the state at the start of every tile, and after the last; works in place.

    Args:
        d: of N*C tiles.
        increments: [N,C+1,M,2D] what each tile's own queries add; the last entry is overwritten.
        final: [N,M,2D] adjoint of the final state, or None for 0.
    Returns:
        [N,C+1,M,2D]
    """
    rows, count = increments.shape[0], increments.shape[1] - 1
    increments[:, -1] = 0 if final is None else final
    carry = d.carry.reshape(rows, count, -1, 1)
    for c in reversed(range(count)):
        increments[:, c].addcmul_(increments[:, c + 1], carry[:, c])
    return increments


def pair_scores(
    d: Decays, rows: torch.Tensor, state: torch.Tensor, inside: torch.Tensor, strict: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Products of query-side rows with the slots as each row finds them.

    Args:
        d: of n tiles.
        rows: [n,L*R,D] queries, or output gradients.
        state: [n,M,D] slot keys (or values) at the start of the tile.
        inside: [n,L,D] keys (or values) absorbed in the tile.
        strict: leave out what a row's own token writes, and return it apart: own[row] * s.
    Returns:
        scores [n,L*R,M], pair products [n,L*R,L] with the triangle applied, and own [n,L,R] if strict.
    """
    tiles, length = inside.shape[:2]
    repeat = rows.shape[1] // length
    out = torch.bmm(rows, state.transpose(1, 2))
    grouped = out.view(tiles, length, repeat, -1)
    grouped.mul_(d.grow[:, :, None])
    pairs = torch.bmm(rows, inside.transpose(1, 2))
    own = None
    if strict:
        own = pairs.view(tiles, length, repeat, length).diagonal(dim1=1, dim2=3).transpose(1, 2).contiguous()
    pairs.mul_(_triangle(length, repeat, strict, pairs.dtype, pairs.device))
    for j, (fall, lift) in enumerate(zip(d.falls, d.lifts, strict=True)):
        first = j * SUB
        part = torch.bmm(pairs[:, first * repeat :, first : first + SUB], d.write[:, first : first + SUB] * lift)
        grouped[:, first:].addcmul_(part.view(tiles, length - first, repeat, -1), fall[:, :, None])
    return out, pairs, own


def fade(d: Decays, weights: torch.Tensor, repeat: int) -> list[torch.Tensor]:
    """Weights on slots as sub-chunk J's tokens find them.

    Args:
        d: of n tiles.
        weights: [n,L*R,M] softmax weights, or score gradients.
        repeat: R.
    Returns:
        Per J, [n,(L-16J)*R,M]: the rows from J on.
    """
    tiles, length = len(weights), weights.shape[1] // repeat
    grouped = weights.view(tiles, length, repeat, -1)
    return [(grouped[:, length - f.shape[1] :] * f[:, :, None]).view(tiles, f.shape[1] * repeat, -1) for f in d.falls]


def mix(d: Decays, faded: list[torch.Tensor]) -> torch.Tensor:
    """Weights on slots turned into weights on the tokens absorbed inside the tile.

    Args:
        d: of n tiles.
        faded: from `fade`.
    Returns:
        [n,L*R,L], zero above the diagonal.
    """
    tiles, rows, _ = faded[0].shape
    length = d.write.shape[1]
    repeat = rows // length
    above = _triangle(length, repeat, False, d.write.dtype, d.write.device) == 0
    parts = []
    for j, (weights, lift) in enumerate(zip(faded, d.lifts, strict=True)):
        first = j * SUB
        parts.append(torch.bmm(weights, (d.write[:, first : first + SUB] * lift).transpose(1, 2)))
    out = parts[0] if len(parts) == 1 else parts[0].new_zeros(tiles, rows, length)
    if len(parts) > 1:
        for j, part in enumerate(parts):
            out[:, j * SUB * repeat :, j * SUB : (j + 1) * SUB] = part
    return out.masked_fill_(above, 0)  # what stands above the diagonal may be infinite


def grown(d: Decays, weights: torch.Tensor, repeat: int) -> torch.Tensor:
    """Weights on slots turned into weights on the state at the start of the tile: [n,L*R,M] o e^G."""
    tiles, length = len(weights), weights.shape[1] // repeat
    return (weights.view(tiles, length, repeat, -1) * d.grow[:, :, None]).view_as(weights)


def write_gradient(
    d: Decays, sides: list[tuple[torch.Tensor, list[torch.Tensor]]], repeat: int
) -> torch.Tensor:
    """Gradient of the write strengths through pairs inside a tile, own tokens left out.

    Args:
        d: of n tiles.
        sides: for keys and for values, pair products [n,L*R,L] strictly below the diagonal, and faded weights.
        repeat: R.
    Returns:
        [n,L,M]
    """
    parts = []
    for j, lift in enumerate(d.lifts):
        first = j * SUB
        back = [pairs[:, first * repeat :, first : first + SUB].transpose(1, 2) for pairs, _ in sides]
        total = torch.bmm(back[0], sides[0][1][j]).baddbmm_(back[1], sides[1][1][j])
        parts.append(total.mul_(lift))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def decay_gradient(
    log_decay: torch.Tensor, from_rows: torch.Tensor, from_state: torch.Tensor, whole: torch.Tensor, write: torch.Tensor
) -> torch.Tensor:
    """Gradient of the log decay from the gradients of everything that is built of it.

    Args:
        log_decay: [n,L,M].
        from_rows: [n,L,M] acts on G at each token: reaches every earlier token of the tile.
        from_state: [n,L,M] acts on Glast - G at each token: reaches every later token.
        whole: [n,M] acts on Glast.
        write: [n,L,M] gradient of the write strength s.
    Returns:
        [n,L,M]
    """
    tiles, length, _ = log_decay.shape
    sums = _sums(length, log_decay.dtype, log_decay.device)[: 2 * length].t().expand(tiles, -1, -1)
    out = torch.bmm(sums, torch.cat([from_rows, from_state], 1)).add_(whole[:, None])
    return out.addcmul_(log_decay.exp(), write, value=-1)
