"""Slot side of the chunked path: decay factors of a tile, the state scan, scores and read-out, and their adjoints.

A tile is a run of 16 tokens whose slot scores come from the state and the pairs inside the tile, all taken relative to
the middle of the tile, G being the running sum of log decay inside it:

    scores = [ Q (e^Gmid Kc)^T + tril(Q K'^T) (s o e^(Gmid - G)) ] o e^(G - Gmid)

The states are kept already multiplied by e^Gmid, "as of the middle". With the floor of `gates.LOG_DECAY_FLOOR` every
factor stays below 2^112 in fp32.

Legend: n rows x key/value heads, C tiles per row, L = 16 tile length, R query heads per key/value head, M slots,
D head_dim. Query-side rows are ordered [token, query head].
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

TILE = 16  # the decay floor allows no more in fp32
MIDDLE = TILE // 2 - 1


@lru_cache(maxsize=8)
def _sums(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[3L,L] matrix that turns log decays into G - Gmid, Glast - G, and G."""
    step = torch.arange(TILE, device=device)
    row = step[:, None]
    after = ((step > MIDDLE) & (step <= row)).to(dtype)
    before = ((step > row) & (step <= MIDDLE)).to(dtype)
    return torch.cat([after - before, (step > row).to(dtype), (step <= row).to(dtype)])


@lru_cache(maxsize=16)
def _triangle(repeat: int, strict: bool, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[L*R,L] ones where the row's token comes after the column's (or is it, unless strict)."""
    ones = torch.ones(TILE, TILE, dtype=dtype, device=device).tril(-1 if strict else 0)
    return ones.repeat_interleave(repeat, 0)


class Decays(NamedTuple):
    """Decay factors of every tile; all finite."""

    write: torch.Tensor  # [n*C,L,M] s
    fall: torch.Tensor  # [n*C,L,M] e^(G - Gmid)
    lift: torch.Tensor  # [n*C,L,M] e^(Gmid - G)
    lifted: torch.Tensor  # [n*C,L,M] s e^(Gmid - G)
    tail: torch.Tensor  # [n*C,L,M] from after each token to the middle of the next tile (to the end in the last)
    carry: torch.Tensor  # [n*C,M] from the middle of each tile to the middle of the next (to the end in the last)
    first: torch.Tensor  # [n,M] from the beginning to the middle of the first tile

    def part(self, tiles: slice) -> Decays:
        """The same for some of the tiles, to score them (the scan wants all)."""
        return self._replace(
            write=self.write[tiles], fall=self.fall[tiles], lift=self.lift[tiles], lifted=self.lifted[tiles]
        )


def tile_decays(log_decay: torch.Tensor) -> Decays:
    """Decay factors.

    Args:
        log_decay: [n,T',M] floored log decay, T' a multiple of the tile length.
    """
    rows, length, slots = log_decay.shape
    tiled = log_decay.reshape(-1, TILE, slots)
    total = torch.bmm(_sums(log_decay.dtype, log_decay.device)[: 2 * TILE].expand(len(tiled), -1, -1), tiled)
    fall, tail = total[:, :TILE], total[:, TILE:]
    write = -torch.expm1(tiled)
    lift = torch.exp(-fall)
    to_middle = tiled[:, : MIDDLE + 1].sum(1).view(rows, -1, slots)  # [n,C,M]
    first = to_middle[:, 0].exp()
    after = torch.cat([to_middle[:, 1:], torch.zeros_like(to_middle[:, :1])], 1).view(-1, slots)
    carry = (fall[:, -1] + after).exp_()
    tail += after[:, None]
    total.exp_()
    return Decays(write, fall, lift, lift * write, tail, carry, first)


def scan_states(
    d: Decays, tokens: torch.Tensor, initial: torch.Tensor | None, rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """States as of the middle of every tile, and the final state.

    Args:
        d: of n*C tiles.
        tokens: [n*C,L,D] absorbed keys, values, or both side by side.
        initial: [n,M,D] or None for empty slots.
        rows: n.
    Returns:
        [n,C,M,D] and [n,M,D].
    """
    added = torch.bmm((d.write * d.tail).transpose(1, 2), tokens).view(rows, -1, d.carry.shape[1], tokens.shape[2])
    carry = d.carry.view(rows, -1, d.carry.shape[1], 1)
    states = torch.empty_like(added)
    states[:, 0] = 0 if initial is None else initial * d.first[..., None]
    steps = list(zip(added.unbind(1), states.unbind(1), carry.unbind(1), strict=True))  # indexing costs more than maths
    for (new, state, fall), (_, into, _) in zip(steps[:-1], steps[1:], strict=True):
        torch.addcmul(new, state, fall, out=into)
    return states, torch.addcmul(*steps[-1])


def scan_back(d: Decays, increments: torch.Tensor, final: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Adjoints of the state each tile hands on, and of the initial state.

    Args:
        d: of n*C tiles.
        increments: [n,C,M,D] what each tile's own queries want of its state.
        final: [n,M,D] adjoint of the final state, or None for 0.
    Returns:
        [n,C,M,D] and [n,M,D].
    """
    carry = d.carry.view(*increments.shape[:3], 1)
    handed = torch.empty_like(increments)
    handed[:, -1] = 0 if final is None else final
    for c in range(increments.shape[1] - 1, 0, -1):
        torch.addcmul(increments[:, c], handed[:, c], carry[:, c], out=handed[:, c - 1])
    return handed, torch.addcmul(increments[:, 0], handed[:, 0], carry[:, 0]) * d.first[..., None]


def fade(d: Decays, x: torch.Tensor) -> torch.Tensor:
    """[n*c,L*R,M] o e^(G - Gmid), in place."""
    x.view(len(x), TILE, -1, x.shape[2]).mul_(d.fall[:, :, None])
    return x


def tile_scores(d: Decays, rows: torch.Tensor, state: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Products of query-side rows with the slots as each row finds them.

    Args:
        d: of n*c tiles.
        rows: [n*c,L*R,D] queries.
        state: [n*c,M,D] slot keys as of the middle of the tile.
        inside: [n*c,L,D] keys absorbed in the tile.
    Returns:
        [n*c,L*R,M]
    """
    pairs = torch.bmm(rows, inside.transpose(1, 2))
    pairs.mul_(_triangle(rows.shape[1] // TILE, False, rows.dtype, rows.device))
    return fade(d, torch.bmm(rows, state.transpose(1, 2)).baddbmm_(pairs, d.lifted))


def scores_apart(
    d: Decays, rows: torch.Tensor, state: torch.Tensor, inside: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `tile_scores` of keys, or of values with output gradients as rows, kept in parts for the gradient.

    Args:
        As `tile_scores`.
    Returns:
        scores [n*c,L*R,M]; the same without what the row's own token writes; pair products [n*c,L*R,L] strictly below
        the diagonal; own products [n*c,L,R].
    """
    repeat = rows.shape[1] // TILE
    pairs = torch.bmm(rows, inside.transpose(1, 2))
    own = pairs.view(-1, TILE, repeat, TILE).diagonal(dim1=1, dim2=3).transpose(1, 2).contiguous()
    pairs.mul_(_triangle(repeat, True, rows.dtype, rows.device))
    apart = fade(d, torch.bmm(rows, state.transpose(1, 2)).baddbmm_(pairs, d.lifted))
    whole = torch.addcmul(apart.view(*own.shape, -1), own[..., None], d.write[:, :, None])
    return whole.view_as(apart), apart, pairs, own


def mix(d: Decays, faded: torch.Tensor) -> torch.Tensor:
    """Weights on slots turned into weights on the tokens absorbed inside the tile.

    Args:
        d: of n*c tiles.
        faded: [n*c,L*R,M] weights after `fade`.
    Returns:
        [n*c,L*R,L], zero above the diagonal.
    """
    above = _triangle(faded.shape[1] // TILE, False, faded.dtype, faded.device) == 0
    out = torch.bmm(faded, d.lifted.transpose(1, 2))
    return out.masked_fill_(above, 0)  # what stands above the diagonal may be infinite


def write_gradient(d: Decays, sides: list[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    """Gradient of the write strength through pairs inside a tile, own tokens left out.

    Args:
        d: of n*c tiles.
        sides: for keys and for values, pair products [n*c,L*R,L] strictly below the diagonal and faded weights.
    Returns:
        [n*c,L,M]
    """
    total = torch.bmm(sides[0][0].transpose(1, 2), sides[0][1])
    for pairs, faded in sides[1:]:
        total.baddbmm_(pairs.transpose(1, 2), faded)
    return total.mul_(d.lift)


def decay_gradient(
    log_decay: torch.Tensor, from_rows: torch.Tensor, from_state: torch.Tensor, whole: torch.Tensor, write: torch.Tensor
) -> torch.Tensor:
    """Gradient of the log decay from the gradients of everything that is built of it.

    Args:
        log_decay: [n,T',M].
        from_rows: [n*C,L,M] acts on G at each token: reaches every earlier token of the tile.
        from_state: [n*C,L,M] acts on Glast - G at each token: reaches every later token.
        whole: [n*C,M] acts on Glast.
        write: [n*C,L,M] gradient of the write strength s.
    Returns:
        [n,T',M]
    """
    back = _sums(log_decay.dtype, log_decay.device)[TILE:].t().expand(len(write), -1, -1)  # Glast - G, then G
    out = torch.bmm(back, torch.cat([from_state, from_rows], 1)).add_(whole[:, None])
    return out.view_as(log_decay).addcmul_(log_decay.exp(), write.view_as(log_decay), value=-1)
