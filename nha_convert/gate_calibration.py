"""Gates from what a layer sees on text: pure functions of tensors.

Shapes: N sequences, T tokens, n = N * T tokens in all, C hidden, H query heads, G key/value heads, D head_dim, M slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from nha_kernels.gates import log_decay_from_logits, log_decay_from_routing
from nha_kernels.ops import nha_attention
from nha_kernels.rotary import rotate

from .gate_init import Horizons, logit_of_horizon, spread_horizons

KMEANS_STEPS = 12
WRITE_HORIZON = 4.0
"""Tokens that a slot looks back over while tokens of its own cluster come."""
STEEPEST = 4.0
"""The largest norm of a cluster's row, in norms of the row of W_k that is longest."""
SCALES = (0.5, 0.7, 1.4, 2.0)
SHIFTS = (-2.0, -1.0, -0.5, 0.5, 1.0, 2.0)
SLOT_BIASES = (-2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0)
"""No lower: slots that start quiet are never found by the alignment that follows."""


@dataclass
class LayerInputs:
    """What one layer sees and gives in the teacher, and how its student attends.

    Attributes:
        hidden: [N, T, C].
        query: [N, T, H, D]; key, value: [N, T, G, D]; all un-rotated, normalised as the layer does.
        cos, sin: [1 or N, T, rotary_dim].
        heads: [N, T, H, D] the teacher's output of each head, before `o_proj`.
        output_weight: [C, H * D] of `o_proj`.
        window, sinks, scale, mask_empty, tau: of the student's layer.
        own_window: the teacher's own sliding window, or None.
        slot_rotary: the slots take rotated keys and are met by rotated queries.
    """

    hidden: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    heads: torch.Tensor
    output_weight: torch.Tensor
    window: int
    sinks: int
    scale: float
    mask_empty: bool
    tau: float
    own_window: int | None = None
    slot_rotary: bool = False

    def rotated(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as the window sees them."""
        turn = self.cos[:, :, None], self.sin[:, :, None]  # [1 or N,T,1,rotary_dim]
        return rotate(self.query, *turn), rotate(self.key, *turn)

    def first(self, sequences: int) -> LayerInputs:
        """The same of the first sequences alone."""
        fields = dict(self.__dict__)
        for name in ("hidden", "query", "key", "value", "heads"):
            fields[name] = fields[name][:sequences]
        for name in ("cos", "sin"):
            fields[name] = fields[name] if len(fields[name]) == 1 else fields[name][:sequences]
        return LayerInputs(**fields)

    def attend(self, log_decay: torch.Tensor, query_scale: torch.Tensor, **options: Any) -> Any:
        """`nha_attention` of the student's layer.

        Args:
            log_decay: [N, T, G, M].
            query_scale: [H, D].
            options: further ones of `nha_attention`.
        """
        query, key = self.rotated() if self.slot_rotary else (self.query, self.key)
        return nha_attention(
            query,
            key,
            self.value,
            log_decay,
            window=self.window,
            cos=None if self.slot_rotary else self.cos,
            sin=None if self.slot_rotary else self.sin,
            sinks=self.sinks,
            scale=self.scale,
            mask_empty=self.mask_empty,
            slot_q_scale=query_scale,
            **options,
        )


@dataclass
class GateStart:
    """The starting values of one layer's new parameters, fp32.

    Attributes:
        weight: [G * M, C]; bias: [G * M].
        slot_q_scale: [H, D] factors of the queries that meet the slots.
        slot_bias: [H].
        write_weight: [G, C], write_bias: [G] of routed gates; None with independent ones.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    slot_q_scale: torch.Tensor
    slot_bias: torch.Tensor
    write_weight: torch.Tensor | None = None
    write_bias: torch.Tensor | None = None

    def to(self, device: torch.device | str) -> GateStart:
        """The same on `device`."""
        return replace(self, **{name: x.to(device) for name, x in self.__dict__.items() if x is not None})

    def moved(self, rows: torch.Tensor, shift: torch.Tensor) -> GateStart:
        """These gates with the rows of each key/value head scaled, and what decides how much is written shifted.

        Args:
            rows: [G] factors of the rows; of routed gates, of the logits that slots are told apart by.
            shift: [G] added to the biases; of routed gates, to those of the write's strength.
        """
        slots = len(self.bias) // len(rows)
        scale, added = rows.repeat_interleave(slots), shift.repeat_interleave(slots)
        if self.write_bias is None:
            return replace(self, weight=scale[:, None] * self.weight, bias=self.bias + added)
        return replace(
            self, weight=scale[:, None] * self.weight, bias=scale * self.bias, write_bias=self.write_bias + shift
        )

    def log_decay(self, hidden: torch.Tensor, groups: int, tau: float) -> torch.Tensor:
        """[N, T, G, M] of hidden states [N, T, C]."""
        hidden = hidden.float()
        logits = (hidden @ self.weight.T + self.bias).unflatten(-1, (groups, -1))
        if self.write_weight is None or self.write_bias is None:
            return log_decay_from_logits(logits, tau)
        return log_decay_from_routing(hidden @ self.write_weight.T + self.write_bias, logits)


# ---- clusters ---------------------------------------------------------------------------------------
def k_means(
    points: torch.Tensor, count: int, *, seed: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Lloyd's algorithm from k-means++ starts; a cluster that loses its last point takes the point that fits worst.

    Args:
        points: [n, D], fp32.
        count: clusters.
        weights: [n] above 0, how much each point counts; None: all alike.
    Returns:
        centroids [count, D] and the cluster of each point, int64 [n].
    Raises:
        ValueError: fewer points than clusters.
    """
    if len(points) < count:
        raise ValueError(f"{count} clusters need at least as many points, found {len(points)}")
    weights = points.new_ones(len(points)) if weights is None else weights
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()

    def drawn(mass: torch.Tensor, draw: float) -> int:  # a point, with a chance in proportion to its mass
        total = mass.double().cumsum(0)
        return min(int(torch.searchsorted(total, draw * total[-1], right=True)), len(points) - 1)

    chosen = [drawn(weights, draws[0])]
    nearest = (points - points[chosen[0]]).square().sum(-1)  # [n]
    for draw in draws[1:]:
        chosen.append(drawn(nearest * weights, draw))
        nearest = torch.minimum(nearest, (points - points[chosen[-1]]).square().sum(-1))
    centroids = points[chosen].clone()
    for _ in range(KMEANS_STEPS):
        distance, labels = torch.cdist(points, centroids).min(-1)  # [n]
        sizes = weights.new_zeros(count).index_add_(0, labels, weights)
        sums = torch.zeros_like(centroids).index_add_(0, labels, points * weights[:, None])
        centroids = sums / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)[:, None]
        empty = (sizes == 0).nonzero()[:, 0]
        centroids[empty] = points[(distance * weights).topk(len(empty)).indices]
    return centroids, torch.cdist(points, centroids).argmin(-1)


def cluster_gates(
    hidden: torch.Tensor,
    keys: torch.Tensor,
    key_weight: torch.Tensor,
    *,
    slots: int,
    tau: float,
    horizons: Horizons,
    seed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gates of slots that keep by default and write what belongs to their own cluster of keys.

    A slot's row is the direction of hidden space that the key projection maps to its centroid (seen from the mean of
    all keys), turned round, so that logits fall where the keys are near. Scale and bias put the mean logit of its own
    cluster at a horizon of `WRITE_HORIZON` tokens and that of all others at the slot's own from the spread. The larger
    a cluster, the shorter the slot's horizon.

    Args:
        hidden: [n, C]; keys: [n, G, D] un-rotated.
        key_weight: [G * D, C], with the scale of the key norm where the family has one.
        horizons: ends of the spread.
        seed: of the clusters' starts.
    Returns:
        weight [G * M, C] and bias [G * M], fp32.
    Raises:
        ValueError: fewer tokens than slots.
    """
    groups = keys.shape[1]
    hidden, rows = hidden.float(), key_weight.float().unflatten(0, (groups, -1))  # [G,D,C]
    keep = logit_of_horizon(spread_horizons(slots, horizons), tau).float().to(hidden.device)  # [M]
    write = float(logit_of_horizon(torch.tensor(WRITE_HORIZON), tau))
    weights, biases = [], []
    for group in range(groups):
        centroids, labels = k_means(keys[:, group].float(), slots, seed=seed + group)
        order = torch.bincount(labels, minlength=slots).argsort(descending=True, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(slots, device=order.device)  # the largest cluster gets the shortest horizon
        centroids, labels = centroids[order], place[labels]
        directions = (centroids - keys[:, group].float().mean(0)) @ rows[group]  # [M,C]
        near = hidden @ directions.T  # [n,M]
        own = torch.nn.functional.one_hot(labels, slots).to(near.dtype)  # [n,M]
        sizes = own.sum(0)
        inside = (near * own).sum(0) / sizes.clamp_min(1)
        outside = (near * (1 - own)).sum(0) / (len(near) - sizes).clamp_min(1)
        limit = STEEPEST * rows[group].norm(dim=-1).max() / directions.norm(dim=-1).clamp_min(1e-12)
        gain = torch.where(inside > outside, (keep - write) / (inside - outside).clamp_min(1e-12), 0.0)  # [M]
        gain = torch.minimum(gain, limit)
        weights.append(-gain[:, None] * directions)
        biases.append(keep + gain * outside)
    return torch.cat(weights), torch.cat(biases)


# ---- calibration against the layer's own output -----------------------------------------------------
class _Branches:
    """Both halves of the attention of one choice of gates, from which every slot bias follows without another run.

    With p = sigmoid(lse of the slots + slot bias - lse of the rest) the output is rest + p (slots - rest), so its error
    is a polynomial in p whose coefficients are [N, T, H] numbers.
    """

    def __init__(self, inputs: LayerInputs, log_decay: torch.Tensor, query_scale: torch.Tensor) -> None:
        heads, dim = inputs.query.shape[2:]

        def half(branch: str) -> tuple[torch.Tensor, torch.Tensor]:
            output, lse, _ = inputs.attend(log_decay, query_scale, branch=branch, return_lse=True)
            return output.float(), lse.float()

        rest, rest_lse = half("window")
        slots, slots_lse = half("slots")
        weight = inputs.output_weight.float().unflatten(1, (heads, dim))  # [C,H,D]
        measure = torch.einsum("chd,che->hde", weight, weight)  # [H,D,D]
        missing, step = rest - inputs.heads.float(), slots - rest

        def inner(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
            return torch.einsum("nthd,hde,nthe->nth", left, measure, right)

        self.constant, self.linear, self.square = inner(missing, missing), inner(missing, step), inner(step, step)
        self.odds = (slots_lse - rest_lse).nan_to_num(nan=-torch.inf)

    def errors(self, slot_bias: torch.Tensor) -> torch.Tensor:
        """[H] squared error of each head's share of the layer's output, summed over tokens."""
        share = torch.sigmoid(self.odds + slot_bias)
        return (self.constant + 2 * share * self.linear + share.square() * self.square).sum((0, 1))


def calibrated(inputs: LayerInputs, start: GateStart, *, with_query_scale: bool, with_slot_bias: bool) -> GateStart:
    """Scales gates to the teacher's attention: a search over four numbers per head that no gradient takes part in.

    In turn, each query head's query scale and slot bias, and the shift and the scale of a key/value head's gates
    (`GateStart.moved`) go to the best of a few values, as measured by the error of the heads' shares of the layer's
    output.

    Args:
        start: where to begin; its slot biases are not read.
        with_query_scale, with_slot_bias: whether the layer has these parameters; else the queries keep their scale and
            the biases are 0.
    Returns:
        The gates found, on the CPU.
    """
    groups, heads = inputs.key.shape[2], inputs.query.shape[2]
    device = inputs.hidden.device
    start = start.to(device)
    biases = SLOT_BIASES if with_slot_bias else (0.0,)

    def measured(state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """[H] errors at each head's best slot bias, and these biases."""
        decay = start.moved(state["rows"], state["shift"]).log_decay(inputs.hidden, groups, inputs.tau)
        branches = _Branches(inputs, decay, state["query"][:, None] * start.slot_q_scale)
        errors = torch.stack([branches.errors(torch.full((heads,), value, device=device)) for value in biases])
        best = errors.min(0)
        return best.values, torch.tensor(biases, device=device)[best.indices]

    state = {
        "rows": torch.ones(groups, device=device),
        "shift": torch.zeros(groups, device=device),
        "query": torch.ones(heads, device=device),
    }
    found = measured(state)
    if with_query_scale:
        found = _improve(state, "query", lambda old, scale: old * scale, SCALES, measured, found)
    found = _improve(state, "shift", lambda old, shift: old + shift, SHIFTS, measured, found)
    found = _improve(state, "rows", lambda old, scale: old * scale, SCALES, measured, found)
    gates = start.moved(state["rows"], state["shift"])
    return replace(gates, slot_q_scale=state["query"][:, None] * start.slot_q_scale, slot_bias=found[1]).to("cpu")


Measured = tuple[torch.Tensor, torch.Tensor]


def _improve(
    state: dict[str, torch.Tensor],
    name: str,
    move: Callable[[torch.Tensor, float], torch.Tensor],
    values: tuple[float, ...],
    measured: Callable[[dict[str, torch.Tensor]], Measured],
    found: Measured,
) -> Measured:
    """Tries each move of one entry of the state on all heads at once, and keeps it where the error falls."""
    before = state[name]
    errors, biases = found
    for value in values:
        tried = state | {name: move(before, value)}
        new_errors, new_biases = measured(tried)
        per_entry = (-1, len(errors) // len(before))  # query heads of each entry
        better = new_errors.view(per_entry).sum(1) < errors.view(per_entry).sum(1)
        heads = better.repeat_interleave(per_entry[1])
        state[name] = torch.where(better, tried[name], state[name])
        errors, biases = torch.where(heads, new_errors, errors), torch.where(heads, new_biases, biases)
    return errors, biases


def output_error(inputs: LayerInputs, start: GateStart) -> float:
    """|| student - teacher ||^2 / || teacher ||^2 of the layer's output, before it meets the residual."""
    start = start.to(inputs.hidden.device)
    decay = start.log_decay(inputs.hidden, inputs.key.shape[2], inputs.tau)
    output, _ = inputs.attend(decay, start.slot_q_scale, slot_bias=start.slot_bias)
    weight = inputs.output_weight.float()
    wanted = inputs.heads.float().flatten(2) @ weight.T
    return float((output.float().flatten(2) @ weight.T - wanted).square().sum() / wanted.square().sum())
