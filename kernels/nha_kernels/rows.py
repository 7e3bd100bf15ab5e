"""Padding and packed documents: brings real tokens to the front of rows, and results back.

Legend: B x T places of the input, n rows of a group, L tokens of its longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .state import NHAState


@dataclass(frozen=True)
class Rows:
    """Rows to run together; in each, `lengths` real tokens come first."""

    places: torch.Tensor  # [n,L] places in the flattened input; what lies past a row's length is any place
    lengths: torch.Tensor  # [n]
    index: torch.Tensor | None  # [n] which row of a state each is; None: all in order

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """[n,L,...] from [B,T,...]."""
        return x.reshape(-1, *x.shape[2:]).index_select(0, self.places.flatten()).view(*self.places.shape, *x.shape[2:])

    @staticmethod
    def join(
        groups: list[Rows],
        results: list[tuple[torch.Tensor, torch.Tensor | None, NHAState | None]],
        batch: int,
        time: int,
    ) -> tuple[torch.Tensor, torch.Tensor | None, NHAState | None]:
        """Results of all groups in the order of the input; 0 (lse -inf) where there is no real token.

        Args:
            groups: of one input.
            results: per group o [n,L,H,D], lse [n,L,H] or None, final state or None.
            batch, time: B, T.
        Returns:
            o [B,T,H,D], lse [B,T,H] or None, final state or None.
        """
        device, before, index = groups[0].places.device, 0, None
        for rows in groups:
            number, longest = rows.places.shape
            index = torch.full((batch * time,), -1, device=device) if index is None else index
            real = torch.arange(longest, device=device) < rows.lengths[:, None]
            index[rows.places[real]] = before + real.flatten().nonzero()[:, 0]
            before += number * longest
        assert index is not None
        index = torch.where(index < 0, before, index)

        def spread(parts: list[torch.Tensor], fill: float) -> torch.Tensor:
            rest = parts[0].shape[2:]
            every = torch.cat([*(x.reshape(-1, *rest) for x in parts), parts[0].new_full((1, *rest), fill)])
            return every.index_select(0, index).view(batch, time, *rest)

        o = spread([r[0] for r in results], 0.0)
        lses = [r[1] for r in results if r[1] is not None]
        states = [r[2] for r in results if r[2] is not None]
        if not states:
            return o, spread(lses, float("-inf")) if lses else None, None
        state = NHAState.cat(states)
        order = [rows.index for rows in groups if rows.index is not None]
        if order:
            state = state.select(torch.cat(order).argsort())
        return o, spread(lses, float("-inf")) if lses else None, state


def by_mask(mask: torch.Tensor) -> Rows:
    """Rows without their padding.

    Args:
        mask: [B,T] bool, True for real tokens.
    """
    batch, time = mask.shape
    lengths = mask.sum(1)
    longest = max(1, int(lengths.max()))
    order = torch.argsort(mask.logical_not(), dim=1, stable=True)[:, :longest]
    return Rows(order + torch.arange(batch, device=mask.device)[:, None] * time, lengths, None)


def by_document(cu_seqlens: torch.Tensor) -> list[Rows]:
    """Packed documents, those of similar length together, so that padding at most doubles the work.

    Args:
        cu_seqlens: [N+1] offsets.
    """
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    total = int(cu_seqlens[-1])
    sizes = [max(64, 1 << (length - 1).bit_length()) if length else 64 for length in lengths.tolist()]
    groups = []
    for size in sorted(set(sizes)):
        index = torch.tensor([i for i, s in enumerate(sizes) if s == size], device=starts.device)
        longest = max(1, int(lengths[index].max()))
        places = starts[index, None] + torch.arange(longest, device=starts.device)
        groups.append(Rows(places.clamp(max=total - 1), lengths[index], index))
    return groups
