"""What one attention layer remembers between calls, the same for prefill, chunked prefill and decode.

Legend: B rows, G key/value heads, M slots, D head_dim, C = window + 1 ring places, S sinks, P rotary dims (0: none).
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch


@dataclass
class NHAState:
    """Memory slots, the ring of the last `window` tokens, the sinks and how many tokens each row has seen.

    The token of rank r (its index among the real tokens of its row) stands at ring place r % (window + 1) if r >= sinks
    and at sink place r otherwise. Keys are kept as the op was given them, as the slots absorb them; cos and sin,
    where there are any, beside them. The slots hold every token of rank sinks <= r < seen - window.
    """

    slot_k: torch.Tensor  # [B,G,M,D] fp32
    slot_v: torch.Tensor  # [B,G,M,D] fp32
    ring_k: torch.Tensor  # [B,G,C,D]
    ring_v: torch.Tensor  # [B,G,C,D]
    ring_log_decay: torch.Tensor  # [B,G,C,M] fp32
    ring_cos: torch.Tensor  # [B,C,P] fp32
    ring_sin: torch.Tensor  # [B,C,P] fp32
    sink_k: torch.Tensor  # [B,G,S,D]
    sink_v: torch.Tensor  # [B,G,S,D]
    sink_cos: torch.Tensor  # [B,S,P] fp32
    sink_sin: torch.Tensor  # [B,S,P] fp32
    seen: torch.Tensor  # [B] int64
    window: int
    sinks: int

    @classmethod
    def new(
        cls,
        batch: int,
        groups: int,
        slots: int,
        head_dim: int,
        *,
        window: int,
        sinks: int = 0,
        rotary_dim: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> NHAState:
        """An empty state.

        Args:
            batch, groups, slots, head_dim: B, G, M, D.
            window: exact tokens a query sees, itself included.
            sinks: first tokens of a row that stay exact for ever.
            rotary_dim: last dimension of cos and sin; 0 where nothing is rotated.
            dtype: of the kept keys and values; slots, log decay, cos and sin are fp32 (fp64 if dtype is).
            device: where it lives.
        Returns:
            A state with seen = 0 in every row.
        Raises:
            ValueError: a size is negative.
        """
        sizes = {"batch": batch, "groups": groups, "slots": slots, "head_dim": head_dim}
        for name, size in (sizes | {"window": window, "sinks": sinks, "rotary_dim": rotary_dim}).items():
            if size < 0:
                raise ValueError(f"{name} must not be negative, got {size}")
        exact = torch.float64 if dtype == torch.float64 else torch.float32

        def zeros(*shape: int, dtype: torch.dtype = exact) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        ring = window + 1
        return cls(
            slot_k=zeros(batch, groups, slots, head_dim),
            slot_v=zeros(batch, groups, slots, head_dim),
            ring_k=zeros(batch, groups, ring, head_dim, dtype=dtype),
            ring_v=zeros(batch, groups, ring, head_dim, dtype=dtype),
            ring_log_decay=zeros(batch, groups, ring, slots),
            ring_cos=zeros(batch, ring, rotary_dim),
            ring_sin=zeros(batch, ring, rotary_dim),
            sink_k=zeros(batch, groups, sinks, head_dim, dtype=dtype),
            sink_v=zeros(batch, groups, sinks, head_dim, dtype=dtype),
            sink_cos=zeros(batch, sinks, rotary_dim),
            sink_sin=zeros(batch, sinks, rotary_dim),
            seen=torch.zeros(batch, dtype=torch.int64, device=device),
            window=window,
            sinks=sinks,
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor by field name, batch first."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("window", "sinks")}

    def with_tensors(self, tensors: dict[str, torch.Tensor]) -> NHAState:
        """A state of the same window and sinks that holds the given tensors.

        Args:
            tensors: every field of `tensors()`.
        Returns:
            A new state.
        """
        return NHAState(**tensors, window=self.window, sinks=self.sinks)

    @property
    def batch(self) -> int:
        """Rows."""
        return self.seen.shape[0]

    @property
    def rotary_dim(self) -> int:
        """Last dimension of the kept cos and sin; 0 where nothing is rotated."""
        return self.ring_cos.shape[-1]

    def select(self, index: torch.Tensor) -> NHAState:
        """A new state of the rows `index` [N] (int64), in that order; rows may repeat."""
        index = index.to(self.seen.device)
        return self.with_tensors({name: x.index_select(0, index) for name, x in self.tensors().items()})

    def reorder(self, index: torch.Tensor) -> NHAState:
        """Replace this state's rows by the rows `index` [B], as beam search does; returns itself."""
        for name, x in self.select(index).tensors().items():
            setattr(self, name, x)
        return self

    def repeat(self, times: int) -> NHAState:
        """A new state with every row `times` times, copies side by side (as `repeat_interleave`)."""
        return self.with_tensors({name: x.repeat_interleave(times, 0) for name, x in self.tensors().items()})

    def clone(self) -> NHAState:
        """A new state on its own memory."""
        return self.with_tensors({name: x.clone() for name, x in self.tensors().items()})

    def detach(self) -> NHAState:
        """A new state on the same memory, cut from the graph."""
        return self.with_tensors({name: x.detach() for name, x in self.tensors().items()})

    def to(self, device: torch.device | str) -> NHAState:
        """A new state on `device`."""
        return self.with_tensors({name: x.to(device) for name, x in self.tensors().items()})

    @classmethod
    def cat(cls, states: list[NHAState]) -> NHAState:
        """One state of all rows of `states`, which agree in everything else."""
        names = states[0].tensors()
        return states[0].with_tensors({name: torch.cat([s.tensors()[name] for s in states]) for name in names})


def ring_ranks(end: torch.Tensor, window: int, sinks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which token stands at every place of a ring.

    Args:
        end: [B or 1] tokens seen.
        window, sinks: of the state.
    Returns:
        rank [B or 1, window + 1] of the newest token at each place, and whether it is one that the ring holds.
    """
    place = torch.arange(window + 1, device=end.device)
    rank = end[:, None] - 1 - (end[:, None] - 1 - place).remainder(window + 1)
    return rank, (rank >= end[:, None] - window) & (rank >= sinks)
